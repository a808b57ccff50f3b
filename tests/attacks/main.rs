//! Attacks on crtool, which has all rights: by programs that it dumps, by processes of the same user while it restores, by
//! images. Whatever they do, nobody gets more than was theirs.
//!
//! One binary, several roles: the harness, the init of a trial's pid and mount namespace (`ATTACKS_INIT`), the trial itself
//! (`ATTACKS_TRIAL`), and whoever plays a part in it (`ATTACKS_ROLE`). `ATTACKS_TOOL` attacks another crtool.

#![allow(unreachable_pub)] // a test binary exports nothing: `pub` means "for the other modules"

#[macro_use]
mod sys;
mod gadget;
mod hostile;
mod images;
mod mounts;
mod neighbours;
mod roles;
mod site;
mod stepper;
mod tables;
mod threads;

use std::{
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};

use site::{Site, Trouble, Verdict};

type Run = fn(&mut Site) -> Verdict;

/// Every trial.
const TRIALS: &[(&str, Run)] = &[
    ("dump_of_code_in_a_shared_file_that_maps_a_file_there", gadget::shared_there),
    ("dump_of_code_in_a_shared_file_that_maps_a_file_elsewhere", gadget::shared_elsewhere),
    ("dump_of_code_in_a_file_that_maps_a_file_there", gadget::private_there),
    ("dump_of_code_in_a_file_that_maps_a_file_elsewhere", gadget::private_elsewhere),
    ("dump_of_memory_shared_with_others_that_maps_a_file_there", gadget::together_there),
    ("dump_of_memory_shared_with_others_that_maps_a_file_elsewhere", gadget::together_elsewhere),
    ("dump_of_code_that_makes_no_call", gadget::endless),
    ("dump_of_a_sandbox_with_code_that_makes_another_call", gadget::sandbox),
    ("restore_with_signals_that_look_like_the_end_of_a_list", neighbours::traps),
    ("restore_beside_a_process_of_the_same_user", neighbours::user),
    ("restore_beside_a_root_without_capabilities", neighbours::bare_root),
    ("restore_of_a_task_that_may_queue_no_signals", neighbours::no_queue),
    ("restore_of_tables_that_are_shared", tables::shapes),
    ("restore_with_a_thread_that_is_held_at_its_end", threads::held),
    ("trees_on_mounts_of_any_kind", mounts::any),
    ("images_that_belong_to_somebody_else", images::of_somebody_else),
    ("images_with_one_thing_changed", hostile::one_thing_changed),
];

/// Exit status of a trial that cannot run here.
const SKIPPED: u8 = 77;

fn main() -> ExitCode {
    if let Some(role) = env::var_os("ATTACKS_ROLE") {
        return roles::main(&role.to_string_lossy());
    }
    if let Some(name) = env::var_os("ATTACKS_TRIAL") {
        return play(&name.to_string_lossy());
    }
    if let Some(name) = env::var_os("ATTACKS_INIT") {
        return init(&name.to_string_lossy());
    }
    let args = Arguments::from_args();
    let trials = TRIALS.iter().map(|&(name, ..)| Trial::ignorable_test(name, move || trial(name)));
    libtest_mimic::run(&args, trials.collect()).exit_code()
}

fn trial(name: &str) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    let dir = tempfile::Builder::new().prefix("attacks-").tempdir()?;
    let verdict = dir.path().join("verdict");
    let out = fs::File::create(&verdict)?;
    let status = Command::new("unshare")
        .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(env::current_exe()?)
        .env("ATTACKS_INIT", name)
        .env("ATTACKS_DIR", dir.path())
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .status()?;
    let said = String::from_utf8_lossy(&fs::read(&verdict)?).into_owned();
    if env::var_os("ATTACKS_KEEP").is_some() {
        println!("{}\n{said}", dir.keep().display());
    }
    match status.code() {
        Some(0) => Ok(Completion::Completed),
        Some(code) if code == i32::from(SKIPPED) => Ok(Completion::ignored_with(said.trim().to_owned())),
        _ => Err(Failed::from(format!("{status}\n{said}"))),
    }
}

/// Asks for everybody's end, so that no pid stays taken.
fn init(name: &str) -> ExitCode {
    sys::close_inherited();
    let own = env::current_exe().expect("own path");
    let child = Command::new(own).env_remove("ATTACKS_INIT").env("ATTACKS_TRIAL", name).spawn();
    let player = Pid::from_raw(child.expect("start the trial").id().cast_signed());
    loop {
        match waitpid(None::<Pid>, None) {
            Ok(WaitStatus::Exited(pid, status)) if pid == player => {
                return ExitCode::from(u8::try_from(status).unwrap_or(1));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == player => {
                println!("the trial ended with {signal}");
                return ExitCode::FAILURE;
            }
            _ => {}
        }
    }
}

fn play(name: &str) -> ExitCode {
    let &(_, run) = TRIALS.iter().find(|(n, ..)| *n == name).expect("a trial of the table");
    let verdict = run(&mut Site::new(site::dir()));
    match verdict {
        Ok(()) => ExitCode::SUCCESS,
        Err(Trouble::Skip(why)) => {
            println!("{why}");
            ExitCode::from(SKIPPED)
        }
        Err(Trouble::Fail(text)) => {
            println!("{text}");
            ExitCode::FAILURE
        }
    }
}
