//! What goes wrong around dump and restore: killed, interrupted, out of time, out of space, damaged images. Whatever
//! happens, the tree runs on as it was, or it is complete on the other side, and nothing is left over.
//!
//! One binary, four roles: the harness, the init of a pid namespace for one trial (`FAULTS_WORKER`), the
//! target (`FAULTS_TARGET`), a tree that checks itself all the time, and a debugger of the tool (`FAULTS_STEPPER`). Random moments come from a fixed seed;
//! `FAULTS_SEED` takes another, `FAULTS_FACTOR` (say 10) makes all loops that much longer.

#![allow(unreachable_pub)] // a test binary exports nothing: `pub` means "for the other modules"

mod aim;
mod chain;
mod damage;
mod directory;
mod elsewhere;
mod kills;
#[path = "../real/reaper.rs"]
mod reaper;
mod refusals;
mod site;
#[path = "../live/chain.rs"]
mod split;
mod stepper;
mod steps;
mod sys;
mod target;

use std::{
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use site::Site;

type Run = fn(&mut Site) -> Result<(), String>;

/// Every trial, and how its target is started.
const TRIALS: &[(&str, target::Kind, Run)] = &[
    ("dump_killed_at_random", target::Kind::Busy, kills::dump_of_running),
    ("dump_that_kills_killed_at_random", target::Kind::Busy, kills::dump_that_kills),
    ("dump_killed_at_each_step_of_its_end", target::Kind::Family, steps::end_of_dump),
    ("restore_killed_at_each_step_of_its_end", target::Kind::Family, steps::end_of_restore),
    ("restore_killed_at_random", target::Kind::Busy, kills::restore),
    ("dump_interrupted_by_sigint", target::Kind::Busy, refusals::sigint),
    ("dump_interrupted_by_sigterm", target::Kind::Busy, refusals::sigterm),
    ("dump_out_of_time", target::Kind::Busy, refusals::timeout),
    ("dump_of_a_task_in_vfork", target::Kind::Stuck, refusals::stuck),
    ("dump_on_full_disk", target::Kind::Busy, refusals::full_disk),
    ("dump_into_read_only_directory", target::Kind::Busy, refusals::read_only),
    ("dump_into_a_snapshot_killed_at_random", target::Kind::Busy, directory::killed_before_commit),
    (
        "snapshot_replaced_killed_at_each_step",
        target::Kind::Family,
        directory::killed_at_each_step_of_a_replacement,
    ),
    ("one_directory_whatever_happens", target::Kind::Busy, directory::whatever_happens),
    ("crtool_under_limits", target::Kind::Busy, refusals::limits),
    ("fifty_rounds", target::Kind::Busy, refusals::fifty_rounds),
    ("truncated_images", target::Kind::Busy, damage::truncated),
    ("flipped_bits", target::Kind::Busy, damage::flipped),
    ("missing_images", target::Kind::Busy, damage::missing),
    ("images_with_protection_keys", target::Kind::Family, elsewhere::protection_keys),
    ("chain_with_wrong_links", target::Kind::Busy, chain::links),
    ("chain_without_pages", target::Kind::Busy, chain::pages),
    ("chain_with_flipped_bits", target::Kind::Busy, chain::flipped),
];

fn main() -> ExitCode {
    if let Some(kind) = env::var_os("FAULTS_TARGET") {
        return target::main(&kind.to_string_lossy());
    }
    if let Some(at) = env::var_os("FAULTS_STEPPER") {
        return steps::main(&at.to_string_lossy());
    }
    if let Some(name) = env::var_os("FAULTS_WORKER") {
        return worker(&name.to_string_lossy());
    }
    let args = Arguments::from_args();
    let trials = TRIALS.iter().map(|&(name, ..)| Trial::ignorable_test(name, move || trial(name)));
    libtest_mimic::run(&args, trials.collect()).exit_code()
}

fn trial(name: &str) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    let dir = tempfile::Builder::new().prefix("faults-").tempdir()?;
    let verdict = dir.path().join("verdict");
    let out = fs::File::create(&verdict)?;
    let status = Command::new("unshare")
        .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(env::current_exe()?)
        .env("FAULTS_WORKER", name)
        .env("FAULTS_DIR", dir.path())
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .status()?;
    if status.success() {
        return Ok(Completion::Completed);
    }
    Err(Failed::from(format!("{status}\n{}", String::from_utf8_lossy(&fs::read(&verdict)?))))
}

/// Init of the trial's pid namespace.
fn worker(name: &str) -> ExitCode {
    sys::close_inherited();
    let &(_, kind, run) = TRIALS.iter().find(|(n, ..)| *n == name).expect("a trial of the table");
    let dir = env::var_os("FAULTS_DIR").expect("FAULTS_DIR").into();
    match Site::new(dir, kind).and_then(|mut site| run(&mut site)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            println!("{text}");
            ExitCode::FAILURE
        }
    }
}
