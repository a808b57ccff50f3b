//! What would stop a dump of a tree, found while the tree runs.
//!
//! The same collection as that of a dump, into nothing. Each process is held for the moments in which it is looked at, one
//! after another, because what only it can tell (its timers, its signal stack) is asked in its name; between them all
//! of the tree runs. Tasks that come or go meanwhile are passed over. Nothing in the file system is touched.

use anyhow::{Context, Result};

use super::{
    collect::{Collected, Source},
    look_at_root, restorable,
    tree::Process,
};
use crate::{
    deadline::{Deadline, Limit},
    finding::Finding,
    image::MemStore,
    kept::Form,
    settings::DumpSettings,
    sys::{pid::HostPid, ticker::Ticker},
    tracee::{procfs, silent::FrozenGroups},
};

/// Names everything in the tree of `settings.pid` that would stop a dump with these settings.
pub fn check_tree(settings: &DumpSettings) -> Result<Vec<Finding>> {
    let root = HostPid::new(settings.pid.as_raw());
    look_at_root(root)?;
    let ticker = Ticker::start()?;
    let deadline = Deadline::begin(Limit::Total(settings.timeout));
    let check = || Ok(deadline.check()?);
    let store = MemStore::new();
    let mut collected = Collected::new(&store, settings, Source::Running);
    let mut groups = FrozenGroups::default();
    let pids = procfs::walk(root);
    collected.form = Form::of_tree(pids.len());
    for pid in pids {
        let held = ticker.busy(|| Process::hold(pid, &mut groups, &check));
        let Some(mut process) = held.context("stop of a task")? else { continue };
        if pid == root {
            process.ppid = HostPid::NONE;
        }
        collected.process(&process, &check)?;
    }
    if let Err(error) = collected.complete() {
        // Descriptors have been closed since: no reason against a dump.
        tracing::info!("{error:#}");
    }
    restorable::check(&mut collected, settings).context("what a restore would make of the tree")?;
    deadline.finish();
    Ok(collected.findings())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixStream, process::Command};

    use nix::unistd::Pid;

    use super::*;
    use crate::arch::target::until_asleep;

    fn survey(child: &std::process::Child, shell_job: bool) -> Vec<Finding> {
        let pid = Pid::from_raw(child.id().cast_signed());
        let mut settings = DumpSettings::new(pid, std::path::Path::new("."));
        settings.common.shell_job = shell_job;
        check_tree(&settings).unwrap()
    }

    #[test]
    fn names_what_is_in_the_way() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut child = Command::new("setsid")
            .args(["sleep", "1000"])
            .stdin(std::os::fd::OwnedFd::from(theirs))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        until_asleep(HostPid::new(child.id().cast_signed()));
        let findings = survey(&child, false);
        let before = fs::read(format!("/proc/{}/status", child.id())).unwrap();
        let _ = child.kill();
        let _ = child.wait();
        drop(ours);
        // The harness may have left it more descriptors than the one that counts.
        let socket = findings.iter().filter(|finding| finding.what.starts_with("fd 0 (socket:[")).count();
        assert_eq!(socket, 1, "{findings:?}");
        assert!(!findings.iter().any(|finding| finding.what == "session"), "{findings:?}");
        assert!(String::from_utf8(before).unwrap().contains("State:\tS"), "it was left running");
    }

    #[test]
    fn a_job_of_ours_needs_shell_job() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        until_asleep(HostPid::new(child.id().cast_signed()));
        let [without, with] = [false, true].map(|shell_job| survey(&child, shell_job));
        let _ = child.kill();
        let _ = child.wait();
        let session = |findings: &[Finding]| findings.iter().any(|finding| finding.what == "session");
        assert!(session(&without) && !session(&with), "{without:?} {with:?}");
    }

    #[test]
    fn nobody() {
        let settings = DumpSettings::new(Pid::from_raw(2_000_000_000), std::path::Path::new("."));
        assert!(check_tree(&settings).unwrap_err().to_string().contains("no process has pid 2000000000"));
    }
}
