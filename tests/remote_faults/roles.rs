//! The roles of the binary that are not trials: harness, worker, init of a host, and what starts a program there.

use std::{
    env, fs,
    io::{Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Completion, Failed};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::{site::Site, soak, steps, target};

pub type Run = fn(&mut Site) -> Result<(), String>;

/// A trial of the usual length that takes longer is stuck: each of its steps has a limit of its own.
const TRIAL_LIMIT: Duration = Duration::from_secs(600);

const WORKER: &str = "REMOTE_WORKER";
const DIR: &str = "REMOTE_DIR";
const INIT: &str = "REMOTE_INIT";
/// Pid of the init of the host where the program in the arguments is to run.
pub const ENTER: &str = "REMOTE_ENTER";

/// What this process is, unless it is the harness.
pub fn other_than_harness(trials: &[(&str, Run)]) -> Option<ExitCode> {
    let role = |name| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    if let Some(init) = role(ENTER) {
        return Some(enter(&init));
    }
    if let Some(order) = role(steps::STEPPER) {
        return Some(steps::main(&order));
    }
    if let Some(role) = role(target::ROLE) {
        return Some(target::main(&role));
    }
    if let Some(last_pid) = role(INIT) {
        return Some(init(&last_pid));
    }
    role(WORKER).map(|name| worker(trials, &name))
}

/// One trial, as the harness sees it.
pub fn trial(name: &str) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    let dir = tempfile::Builder::new().prefix("remote-").tempdir()?;
    let verdict = dir.path().join("verdict");
    let out = fs::File::create(&verdict)?;
    let mut child = Command::new("unshare")
        .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(env::current_exe()?)
        .env(WORKER, name)
        .env(DIR, dir.path())
        .stdin(Stdio::piped())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()?;
    let begin = Instant::now();
    let limit = TRIAL_LIMIT * u32::try_from(Site::times(1)).unwrap_or(1) + soak::limit();
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if begin.elapsed() > limit => {
                child.kill()?;
                child.wait()?;
                let said = String::from_utf8_lossy(&fs::read(&verdict)?).into_owned();
                return Err(Failed::from(format!("stuck for {limit:?}\n{said}")));
            }
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    let said = String::from_utf8_lossy(&fs::read(&verdict)?).into_owned();
    if env::var_os("REMOTE_KEEP").is_some() {
        eprintln!("{name}: kept in {}", dir.keep().display());
    }
    match (status.success(), said.strip_prefix("skipped: ")) {
        (true, Some(reason)) => Ok(Completion::ignored_with(reason.trim())),
        (true, None) => {
            // Its numbers.
            let lines: String = said.lines().map(|line| format!("{name}: {line}\n")).collect();
            eprint!("{lines}");
            Ok(Completion::Completed)
        }
        (false, _) => Err(Failed::from(format!("{status}\n{said}"))),
    }
}

/// Init of the trial's pid namespace.
fn worker(trials: &[(&str, Run)], name: &str) -> ExitCode {
    let &(_, run) = trials.iter().find(|(n, _)| *n == name).expect("a trial of the table");
    let dir = env::var_os(DIR).expect("a directory").into();
    // Its end is the end of the harness: nothing stays behind.
    thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::abort();
    });
    let ended = Site::new(dir).and_then(|mut site| {
        run(&mut site).and_then(|()| site.finish()).map_err(|text| format!("{text}\n{}", site.logs()))
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            println!("{text}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the init of a host in the network namespace of the caller; pids there go on after `last_pid`. Gives the pid
/// of unshare(1), whose child it is.
pub fn start_init(last_pid: u32) -> Result<i32, String> {
    let exe = env::current_exe().map_err(|e| e.to_string())?;
    let mut child = Command::new("unshare")
        .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(exe)
        .env(INIT, last_pid.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("start unshare: {e}"))?;
    let mut byte = [0];
    let ready = child.stdout.take().map(|mut out| out.read_exact(&mut byte));
    match ready {
        Some(Ok(())) => Ok(child.id().cast_signed()),
        _ => Err("a host's init does not start".into()),
    }
}

/// Init of a host: collects what ends there.
fn init(last_pid: &str) -> ExitCode {
    let chld: SigSet = [Signal::SIGCHLD].into_iter().collect();
    chld.thread_block().expect("block SIGCHLD");
    fs::write("/proc/sys/kernel/ns_last_pid", last_pid).expect("set the next pid");
    let mut out = std::io::stdout();
    out.write_all(b"!").and_then(|()| out.flush()).expect("say that it is ready");
    loop {
        match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => {
                let _ = chld.wait();
            }
            _ => {}
        }
    }
}

/// Becomes the program in the arguments, with the mounts of a host. The other namespaces are its already.
fn enter(init: &str) -> ExitCode {
    let path = Path::new("/proc").join(init).join("ns/mnt");
    let entered = fs::File::open(&path)
        .map_err(|e| e.to_string())
        .and_then(|namespace| setns(namespace, CloneFlags::CLONE_NEWNS).map_err(|e| e.to_string()));
    if let Err(text) = entered {
        eprintln!("enter {}: {text}", path.display());
        return ExitCode::FAILURE;
    }
    let mut words = env::args_os().skip(1);
    let Some(program) = words.next() else { return ExitCode::FAILURE };
    let error = Command::new(program).args(words).env_remove(ENTER).current_dir("/").exec();
    eprintln!("start a program on a host: {error}");
    ExitCode::FAILURE
}
