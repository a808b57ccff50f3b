//! Real programs, as a user runs them: each goes once undisturbed and once through two dumps and restores, and must
//! come to the same result.
//!
//! One binary, two roles: the harness, and (with `REAL_WORKER` in the environment) the init of a pid namespace in
//! which one program lives, so that nothing outlives its trial. `REAL_TOOL` takes another tool than crtool.

#![allow(unreachable_pub)] // a test binary exports nothing: `pub` means "for the other modules"

mod program;
mod reaper;
mod worker;

use std::{
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use program::{PROGRAMS, Program};

fn main() -> ExitCode {
    if let Some(name) = env::var_os("REAL_WORKER") {
        return worker::main(&name.to_string_lossy());
    }
    let args = Arguments::from_args();
    let trials = PROGRAMS.iter().map(|program| Trial::ignorable_test(program.name, move || trial(program)));
    libtest_mimic::run(&args, trials.collect()).exit_code()
}

fn trial(program: &'static Program) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    if let Err(reason) = program.is_there() {
        return Ok(Completion::ignored_with(reason));
    }
    let dir = tempfile::Builder::new().prefix("real-").tempdir()?;
    let verdict = dir.path().join("verdict");
    let out = fs::File::create(&verdict)?;
    let status = Command::new("unshare")
        .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(env::current_exe()?)
        .env("REAL_WORKER", program.name)
        .env("REAL_DIR", dir.path())
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .status()?;
    let said = String::from_utf8_lossy(&fs::read(&verdict)?).into_owned();
    match status.code() {
        Some(0) => Ok(Completion::Completed),
        Some(worker::SKIPPED) => Ok(Completion::ignored_with(said.trim().to_owned())),
        _ => Err(Failed::from(format!("{status}\n{said}"))),
    }
}
