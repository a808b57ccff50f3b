//! Live tests: one binary that is harness, worker and target.
//!
//! Without further ado it is the harness: one trial per row of `cases::all()` and mode. With
//! `LIVE_WORKER` in the environment it runs one trial in its own pid and mount namespace; with
//! `LIVE_TARGET` it *is* the process that gets dumped: freshly executed, without test threads, and
//! judging after its restore whether everything is as it was.
//!
//! Environment: `LIVE_TOOL` takes another tool than crtool (with CRIU the suite checks itself:
//! every target must survive it, or say why not); `LIVE_PEER` is the CRIU for interop modes;
//! `LIVE_MODES` is a comma-separated list of modes to run (without it, and without a filter, each case goes from host
//! to host in one of the three remote modes, in turn: all take several minutes more); `LIVE_KEEP` keeps the directories;
//! `LIVE_SEED` is the seed of cases with random values.

// A test binary exports nothing; `pub` here means "for the other modules".
#![allow(unreachable_pub)]

#[macro_use]
mod sys;

mod asm;
mod case;
mod cases;
mod certificates;
mod chain;
mod gate;
mod hosts;
mod mode;
mod picture;
mod reaper;
mod tool;
mod worker;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use case::{Case, Expect};
use mode::Mode;

fn main() -> ExitCode {
    if let Some(name) = std::env::var_os("LIVE_TARGET") {
        sys::default_signals();
        return gate::main(&name.to_string_lossy());
    }
    if let Some(name) = std::env::var_os("LIVE_WORKER") {
        return worker::main(&name.to_string_lossy());
    }
    let args = Arguments::from_args();
    let wanted = std::env::var("LIVE_MODES").ok();
    let mut trials = Vec::new();
    let everything = wanted.is_some() || args.filter.is_some();
    for (number, case) in cases::all().enumerate() {
        for &mode in mode::ALL {
            let ways = [Mode::Remote, Mode::Direct, Mode::RemoteTls];
            if !everything && mode.remote() && mode != ways[number % ways.len()] {
                continue;
            }
            let listed = wanted.as_ref().is_none_or(|w| w.split(',').any(|m| m == mode.name()));
            if listed && mode.suits(case) {
                trials.push(trial(case, mode));
            }
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

fn trial(case: &'static Case, mode: Mode) -> Trial {
    let name = format!("{}::{}", mode.name(), case.name);
    Trial::ignorable_test(name, move || match skip_reason(case, mode) {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => match worker::launch(case, mode) {
            worker::Outcome::Passed => Ok(Completion::Completed),
            worker::Outcome::Skipped(reason) => Ok(Completion::ignored_with(reason)),
            worker::Outcome::Failed(text) => Err(Failed::from(text)),
        },
    })
}

/// Why this trial cannot run here, if it cannot.
fn skip_reason(case: &Case, mode: Mode) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    let peer_takes_part = mode.interop() || tool::main_tool().is_peer();
    if mode.interop() && tool::peer().is_none() {
        return Some("no CRIU at LIVE_PEER, /opt/criu-peer/bin/criu or in PATH".into());
    }
    if peer_takes_part {
        if let Some(reason) = case.peer_fails {
            return Some(format!("CRIU cannot: {reason}"));
        }
        if matches!(case.expect, Expect::Refused(_)) {
            return Some("the wording of a refusal is crtool's own".into());
        }
    }
    None
}
