//! The host that targets leave, as far as it matters: pids of its own.
//!
//! On one host the pid of a target is free only when the last page of its memory is, and a restore would wait for that.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tool::Reaper;

/// Pids begin here: what the destination has for itself is below.
const FIRST: u32 = 20_000;
const LIMIT: Duration = Duration::from_secs(30);

/// A pid namespace below that of the benchmark, with a /proc that shows it; gone when dropped.
#[derive(Debug)]
pub struct Source {
    unshare: i32,
    init: i32,
    reaper: Reaper,
}

impl Source {
    pub fn start(dir: &Path, reaper: &Reaper) -> Result<Self, String> {
        let ready = dir.join("source");
        let script = format!(
            "echo {FIRST} >/proc/sys/kernel/ns_last_pid && : >{} && exec sleep 1000000",
            ready.display()
        );
        let child = Command::new("unshare")
            .args([
                "--pid",
                "--fork",
                "--mount",
                "--mount-proc",
                "--kill-child=KILL",
                "--",
                "sh",
                "-c",
                &script,
            ])
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| format!("start unshare (util-linux): {e}"))?;
        let mut source = Self { unshare: child.id().cast_signed(), init: 0, reaper: reaper.clone() };
        let begin = Instant::now();
        while !ready.exists() {
            if begin.elapsed() > LIMIT || reaper.wait(source.unshare, Duration::from_millis(1)).is_some() {
                return Err("the namespace of the source does not get ready".into());
            }
        }
        source.init = child_of(source.unshare).ok_or("the namespace of the source is empty")?;
        Ok(source)
    }

    /// What goes before a command that is to run there.
    pub fn prefix(&self) -> Vec<String> {
        ["nsenter", "-t", &self.init.to_string(), "-p", "-m", "--"].map(str::to_owned).to_vec()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.unshare), Signal::SIGKILL);
        self.reaper.wait(self.unshare, LIMIT);
    }
}

/// The only child of a process with one thread.
pub fn child_of(pid: i32) -> Option<i32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .ok()?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}
