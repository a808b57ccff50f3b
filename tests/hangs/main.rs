//! What could make crtool wait for ever: file systems that do not answer, programs that execute others all the time,
//! somebody who stops the tree or crtool itself. It ends in time, says why, and the tree runs on; or it succeeds.
//!
//! One binary, several roles: the harness, the init of a trial's pid and mount namespace (`HANGS_WORKER`), a file system
//! (`HANGS_FUSE`), the programs that are dumped (`HANGS_TARGET`), and who clears away when all else is killed (`HANGS_GUARD`).
//! `HANGS_FACTOR` makes the storms that much longer; with `HANGS_HOLD` a trial goes on for ever where it is at its worst.

#![allow(unreachable_pub)] // a test binary exports nothing: `pub` means "for the other modules"

mod files;
mod fuse;
mod guard;
#[path = "../real/reaper.rs"]
mod reaper;
mod site;
mod stopped;
mod storms;
mod sys;
mod target;

use std::{
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use site::{Site, Trouble};

type Run = fn(&mut Site) -> Result<(), Trouble>;

/// Every trial.
const TRIALS: &[(&str, Run)] = &[
    ("dump_of_a_directory_that_does_not_answer", files::cwd),
    ("dump_of_an_open_file_that_does_not_answer", files::open),
    ("dump_of_a_mapped_file_that_does_not_answer", files::mapped),
    ("dump_of_a_program_that_does_not_answer", files::program),
    ("dump_of_a_task_that_waits_for_a_file", files::waiting),
    ("images_in_a_directory_that_does_not_answer", files::images),
    ("dump_of_the_file_system_with_its_user", files::server_in_the_tree),
    ("restore_of_an_open_file_that_does_not_answer", files::restore_open),
    ("restore_of_a_directory_that_does_not_answer", files::restore_cwd),
    ("restore_of_a_mapped_file_that_does_not_answer", files::restore_mapped),
    ("dump_that_is_stopped", stopped::dump),
    ("restore_that_is_stopped", stopped::restore),
    ("check_that_is_stopped", stopped::check),
    ("dump_in_the_hands_of_a_debugger", stopped::debugged),
    ("dump_of_a_task_whose_tracer_is_stopped", stopped::tracer),
    ("dump_of_a_task_whose_tracer_is_in_the_tree", stopped::tracer_in_the_tree),
    ("dump_in_a_frozen_cgroup", stopped::frozen_crtool),
    ("dump_of_a_frozen_cgroup_v1", stopped::frozen_tree_v1),
    ("dump_of_a_frozen_cgroup_v2", stopped::frozen_tree_v2),
    ("restore_whose_tasks_are_stopped", stopped::stopped_tasks),
    ("programs_executed_by_a_thread", storms::exec_by_thread),
    ("programs_executed_by_the_leader", storms::exec_by_leader),
    ("threads_that_come_and_go", storms::threads),
    ("processes_that_come_and_go", storms::processes),
    ("signals_that_stop_and_continue", storms::stops),
];

/// Trials of the tests themselves, by the trial that is killed in the middle: one whose processes are busy, one whose
/// processes cannot be killed.
const KILLED: &[&str] = &["programs_executed_by_a_thread", "dump_of_a_frozen_cgroup_v1"];

fn main() -> ExitCode {
    if let Some(kind) = env::var_os("HANGS_TARGET") {
        return target::main(&kind.to_string_lossy());
    }
    if let Some(dir) = env::var_os("HANGS_FUSE") {
        return fuse::main(dir.as_ref());
    }
    if let Some(name) = env::var_os("HANGS_WORKER") {
        return worker(&name.to_string_lossy());
    }
    if let Some(dir) = env::var_os("HANGS_GUARD") {
        return guard::main(dir.as_ref());
    }
    let args = Arguments::from_args();
    let trials = TRIALS.iter().map(|&(name, ..)| Trial::ignorable_test(name, move || trial(name)));
    let killed = KILLED.iter().map(|&name| {
        Trial::ignorable_test(format!("nothing_is_left_of_a_killed_trial::{name}"), move || {
            guard::killed(name)
        })
    });
    libtest_mimic::run(&args, trials.chain(killed).collect()).exit_code()
}

/// Exit status of a worker whose trial cannot be had here.
const SKIPPED: u8 = 77;

fn trial(name: &str) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    let dir = tempfile::Builder::new().prefix("hangs-").tempdir()?;
    let _guard = guard::Guard::start(dir.path())?;
    let verdict = dir.path().join("verdict");
    let out = fs::File::create(&verdict)?;
    let status = sys::dies_with_us(&mut Command::new("unshare"))
        .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(env::current_exe()?)
        .env("HANGS_WORKER", name)
        .env("HANGS_DIR", dir.path())
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .status()?;
    let text = String::from_utf8_lossy(&fs::read(&verdict)?).into_owned();
    match status.code() {
        Some(0) => Ok(Completion::Completed),
        Some(code) if code == i32::from(SKIPPED) => Ok(Completion::ignored_with(text.trim().to_owned())),
        _ => Err(Failed::from(format!("{status}\n{text}"))),
    }
}

/// Init of the trial's pid namespace.
fn worker(name: &str) -> ExitCode {
    sys::close_inherited();
    let &(_, run) = TRIALS.iter().find(|(n, ..)| *n == name).expect("a trial of the table");
    let dir = env::var_os("HANGS_DIR").expect("HANGS_DIR").into();
    match Site::new(dir).and_then(|mut site| run(&mut site)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Trouble::Skip(text)) => {
            println!("{text}");
            ExitCode::from(SKIPPED)
        }
        Err(Trouble::Fail(text)) => {
            println!("{text}");
            ExitCode::FAILURE
        }
    }
}
