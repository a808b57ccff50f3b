//! Nothing of a trial outlives it, however the trial or the harness ends.
//!
//! The processes of a trial are in a pid namespace, whose init dies with the harness ([`dies_with_us`](crate::sys::dies_with_us)),
//! and the kernel kills all the others with it. What that leaves is for a process outside: a cgroup of the trial, tasks
//! in it that are frozen (those of version 1 cannot be killed), and the directory.

use std::{
    env, fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Completion, Failed};
use nix::sys::signal::Signal;

use crate::site::signal;

/// Names of the cgroups of a trial, one a line, in its directory.
pub const GROUPS: &str = "groups";
/// There when a trial that is to be held has got so far.
pub const HELD: &str = "held";

/// Clears away when it is dropped, or when the process that has it ends.
#[derive(Debug)]
pub struct Guard {
    process: Child,
    word: Option<ChildStdin>,
}

impl Guard {
    pub fn start(dir: &Path) -> std::io::Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .env("HANGS_GUARD", dir)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let word = process.stdin.take();
        Ok(Self { process, word })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.word.take());
        let _ = self.process.wait();
    }
}

/// The guard's process.
pub fn main(dir: &Path) -> ExitCode {
    // What is sent to the harness and its group is not for us.
    let _ = nix::unistd::setsid();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    for group in fs::read_to_string(dir.join(GROUPS)).unwrap_or_default().lines() {
        remove_group(Path::new(group));
    }
    // The last of the trial may be writing still.
    let begin = Instant::now();
    while fs::remove_dir_all(dir).is_err() && dir.exists() && begin.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(5));
    }
    ExitCode::SUCCESS
}

/// Thaws a cgroup, kills who is in it, and removes it.
pub fn remove_group(group: &Path) {
    let begin = Instant::now();
    while group.exists() && begin.elapsed() < Duration::from_secs(10) {
        let _ = fs::write(group.join("freezer.state"), "THAWED");
        let _ = fs::write(group.join("cgroup.freeze"), "0");
        let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        // One of another pid namespace is shown as 0.
        for pid in members.lines().filter_map(|line| line.parse().ok()).filter(|&pid: &i32| pid > 0) {
            signal(pid, Signal::SIGKILL);
        }
        let _ = fs::remove_dir(group);
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whose environment names `mark`: every process of a trial in a directory below it.
fn marked(mark: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mark = mark.to_string_lossy().into_owned();
    let all = entries.map(|entry| entry.path()).filter(|path| {
        let text = fs::read(path.join("environ")).unwrap_or_default();
        String::from_utf8_lossy(&text).contains(&mark)
    });
    all.collect()
}

/// A harness that runs trial `name` is killed in the middle: soon there is no process of it, no directory, no cgroup.
pub fn killed(name: &str) -> Result<Completion, Failed> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Completion::ignored_with("needs root"));
    }
    let place = tempfile::Builder::new().prefix("hangs-").tempdir()?;
    let mut harness = Command::new(env::current_exe()?)
        .args(["--exact", name])
        .env("TMPDIR", place.path())
        .env("HANGS_HOLD", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let until = |what: &str, holds: &mut dyn FnMut() -> bool| {
        let begin = Instant::now();
        while !holds() {
            if begin.elapsed() > Duration::from_secs(20) {
                let left: Vec<String> = marked(place.path())
                    .iter()
                    .map(|path| fs::read_to_string(path.join("stat")).unwrap_or_default())
                    .collect();
                return Err(Failed::from(format!("not true after a long time: {what}; {left:?}")));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    let trial = || fs::read_dir(place.path()).ok()?.flatten().next().map(|entry| entry.path());
    let mut over = None;
    let held = until("the trial is at its worst", &mut || {
        over = harness.try_wait().ok().flatten();
        over.is_some() || trial().is_some_and(|dir| dir.join(HELD).exists())
    });
    if over.is_some() {
        return Ok(Completion::ignored_with("the trial cannot be had here"));
    }
    let groups = trial().and_then(|dir| fs::read_to_string(dir.join(GROUPS)).ok()).unwrap_or_default();
    harness.kill()?;
    harness.wait()?;
    held?;
    until("no process is left", &mut || marked(place.path()).is_empty())?;
    until("no cgroup is left", &mut || groups.lines().all(|group| !Path::new(group).exists()))?;
    until("no directory is left", &mut || trial().is_none())?;
    Ok(Completion::Completed)
}
