//! `crtool check`: what this machine can do, and what would stop a dump of a tree.

use std::io::{self, Write as _};

use anyhow::{Context as _, bail};

use super::watchdog::Watchdog;
use crate::{
    dump,
    exit::Exit,
    finding::Finding,
    host::{self, Category, Feature, Probe},
    interrupt,
    settings::{CheckSettings, DumpSettings},
};

/// Looks at the kernel, or at a tree.
pub fn run(settings: &CheckSettings) -> anyhow::Result<Exit> {
    match settings {
        CheckSettings::List => Ok(list()),
        CheckSettings::Features(names) => features(names),
        CheckSettings::Kernel { extra, experimental } => kernel(*extra, *experimental),
        CheckSettings::Tree(settings) => tree(settings),
    }
}

/// Prints a line; that nobody reads it is no failure.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

fn list() -> Exit {
    for name in host::PROBES.iter().map(|probe| probe.name) {
        say(name);
    }
    for name in host::UNUSED.iter().map(|unused| unused.name) {
        say(name);
    }
    Exit::Success
}

fn features(names: &[String]) -> anyhow::Result<Exit> {
    let mut exit = Exit::Success;
    for name in names {
        let missing = match host::feature(name) {
            None => bail!("unknown feature {name}; crtool check --feature list names them all"),
            Some(Feature::Unused(unused)) => {
                Some(format!("crtool does not support {} yet", unused.belongs_to))
            }
            Some(Feature::Probe(probe)) => missing(probe),
        };
        match missing {
            None => say(&format!("{name} is supported")),
            Some(why) => {
                say(&format!("{name} is not supported"));
                tracing::warn!("{name} is not supported: {why}");
                exit = Exit::Failure;
            }
        }
    }
    Ok(exit)
}

/// Why a feature is not there, if it is not.
fn missing(probe: &Probe) -> Option<String> {
    probe.ask().err().map(|trouble| format!("{:#}", anyhow::Error::from(trouble)))
}

fn kernel(extra: bool, experimental: bool) -> anyhow::Result<Exit> {
    let (mut bad, mut lacking) = (Vec::new(), Vec::new());
    for probe in host::PROBES {
        let wanted = match probe.category {
            Category::Essential => true,
            Category::Extra => extra,
            Category::Experimental => experimental,
        };
        if !wanted {
            continue;
        }
        let Some(why) = missing(probe) else {
            say(&format!("ok       {:<24} {}", probe.name, probe.purpose));
            continue;
        };
        say(&format!("missing  {:<24} {}: {why}", probe.name, probe.purpose));
        match probe.category {
            Category::Essential => bad.push(probe.name.to_owned()),
            Category::Extra | Category::Experimental => lacking.push(probe.name.to_owned()),
        }
    }
    for cap in host::missing_capabilities()? {
        let name = format!("CAP_{}", cap.name);
        say(&format!("without  {name:<24} {}", cap.limit));
        if cap.essential {
            bad.push(name);
        }
    }
    if !lacking.is_empty() {
        tracing::warn!("missing: {}", lacking.join(", "));
    }
    if !bad.is_empty() {
        tracing::error!("essential and missing: {}", bad.join(", "));
        say("Does not look good.");
        Ok(Exit::Failure)
    } else if !lacking.is_empty() {
        // As CRIU says it: scripts look for the beginning.
        say("Looks good but some kernel features are missing");
        say("which, depending on your process tree, may cause");
        say("dump or restore failure.");
        Ok(Exit::Failure)
    } else {
        say("Looks good.");
        Ok(Exit::Success)
    }
}

/// Names everything in a tree that would stop a dump; the tree is not touched.
fn tree(settings: &DumpSettings) -> anyhow::Result<Exit> {
    interrupt::watch().context("hold back of signals")?;
    let _watchdog =
        Watchdog::start(format!("check of pid {}", settings.pid), "the tree runs on").context("watchdog")?;
    let findings = dump::check_tree(settings)
        .map_err(super::explained)
        .with_context(|| format!("check of pid {}", settings.pid))?;
    Ok(tell(&findings))
}

/// Says what was found.
fn tell(findings: &[Finding]) -> Exit {
    for finding in findings {
        say(&finding.to_string());
    }
    if findings.is_empty() {
        say("Looks good.");
        Exit::Success
    } else {
        say("Does not look good.");
        Exit::Failure
    }
}
