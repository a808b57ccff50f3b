//! Images against `crit`, against CRIU, and against damage.
//!
//! `crit::*` shows generated images of every kind with both tools; `criu::*` and `crtool::*` do the
//! same with images that CRIU and crtool make of small programs, and encode them again;
//! `hostile::*` damages images of every kind. `LIVE_PEER` takes another CRIU than the installed one.

mod generate;
mod hostile;
mod oracle;
mod programs;
#[allow(unreachable_pub)] // shared with other tests
#[path = "../live/chain.rs"]
mod split;

use std::process::ExitCode;

use crtool::image::ImageKind;
use crtool::image::names::Family;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use programs::Maker;

/// What a trial says: done, or why it cannot run here.
type Verdict = Result<Option<String>, String>;

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    for &kind in ImageKind::ALL.iter().filter(|kind| kind.family() != Family::Raw) {
        trials.push(trial(format!("crit::{kind:?}"), move || oracle::same_as_crit(kind)));
        trials.push(trial(format!("hostile::cut_{kind:?}"), move || hostile::cut(kind)));
        trials.push(trial(format!("hostile::flipped_{kind:?}"), move || hostile::flipped(kind)));
    }
    trials.push(trial("crit::socket_names".into(), oracle::socket_names));
    trials.push(trial("hostile::random".into(), hostile::random));
    trials.push(trial("hostile::huge_claims".into(), hostile::huge_claims));
    trials.push(trial("hostile::random_json".into(), hostile::random_json));
    trials.push(trial("unknown_fields_come_back".into(), oracle::unknown_fields_come_back));
    for program in programs::PROGRAMS {
        for (who, maker) in [("criu", Maker::Criu), ("crtool", Maker::Crtool)] {
            let name = format!("{who}::{}", program.name);
            trials.push(trial(name, move || programs::same_as_crit(program, maker)));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

fn trial(name: String, run: impl FnOnce() -> Verdict + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || match run() {
        Ok(None) => Ok(Completion::Completed),
        Ok(Some(reason)) => Ok(Completion::ignored_with(reason)),
        Err(text) => Err(Failed::from(text)),
    })
}
