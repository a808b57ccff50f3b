//! A daemon in the foreground, and what it costs.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::TcpListener,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tool::Reaper;

/// It listens, or has ended, within this.
const LIMIT: Duration = Duration::from_secs(30);

/// One running daemon; killed when dropped before its end.
#[derive(Debug)]
pub struct Daemon {
    pub pid: i32,
    name: &'static str,
    ended: bool,
}

impl Daemon {
    /// Starts `program` and waits for what it does when it is ready.
    pub fn start(
        name: &'static str,
        program: &Path,
        words: &[&str],
        dir: &Path,
        ready: impl Fn() -> bool,
        reaper: &Reaper,
    ) -> Result<Self, String> {
        let out = dir.join(format!("{name}.out"));
        let file = File::create(&out).map_err(|e| format!("{}: {e}", out.display()))?;
        let child = Command::new(program)
            .args(words)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(|e| e.to_string())?)
            .stderr(file)
            .spawn()
            .map_err(|e| format!("start {name}: {e}"))?;
        let daemon = Self { pid: child.id().cast_signed(), name, ended: false };
        let begin = Instant::now();
        while !ready() {
            if begin.elapsed() > LIMIT || reaper.wait(daemon.pid, Duration::from_millis(2)).is_some() {
                let said = fs::read_to_string(&out).unwrap_or_default();
                return Err(format!("{name} does not get ready: {}", said.trim()));
            }
        }
        Ok(daemon)
    }

    /// Tells it to end; it has to do so with status 0.
    pub fn end(mut self, reaper: &Reaper) -> Result<(), String> {
        self.ended = true;
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGTERM);
        match reaper.wait(self.pid, LIMIT) {
            Some((ended, _)) if ended.status == 0 => Ok(()),
            ended => {
                let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
                Err(format!("{} did not end well: {ended:?}", self.name))
            }
        }
    }

    /// Processor time of all its threads.
    pub fn cpu(&self) -> f64 {
        cpu(self.pid)
    }

    /// Its largest resident size so far, in KiB.
    pub fn peak_kib(&self) -> u64 {
        status(self.pid, "VmHWM:")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.ended {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

/// Processor time so far of a living process, in seconds, that of threads that have ended included: a target is
/// filled by some that do. In steps of 10 ms.
pub fn cpu(pid: i32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // utime and stime, the twelfth and thirteenth behind the name (proc_pid_stat(5)), in USER_HZ.
    let ticks = text.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn status(pid: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

/// What a process keeps in memory, in KiB: private pages, and every block of its memfds and of other files without a
/// name, mapped or not.
fn kept_kib(pid: i32) -> u64 {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut files = BTreeMap::new();
    for fd in fds {
        let path = fd.path();
        let nameless = fs::read_link(&path).is_ok_and(|link| link.to_string_lossy().ends_with(" (deleted)"));
        // The same file under two numbers is there once.
        if let (true, Ok(data)) = (nameless, fs::metadata(&path)) {
            files.insert((data.dev(), data.ino()), data.blocks() / 2);
        }
    }
    status(pid, "RssAnon:") + status(pid, "RssFile:") + files.values().sum::<u64>()
}

/// Looks at what a process keeps in memory, again and again.
#[derive(Debug)]
pub struct Watch {
    pid: i32,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(Instant, u64)>>,
}

/// What was seen, in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kept {
    pub most: u64,
    /// Half-way through the restore.
    pub halfway: u64,
    /// Once it was over.
    pub after: u64,
}

impl Watch {
    pub fn start(pid: i32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::spawn(move || {
            let mut kept = Vec::new();
            while !told.load(Ordering::Acquire) {
                kept.push((Instant::now(), kept_kib(pid)));
                // Often enough for what changes by gigabytes in a second, and cheap.
                thread::sleep(Duration::from_millis(4));
            }
            kept
        });
        Self { pid, stop, thread }
    }

    /// Ends the watched time, in which a restore took the last `restore`; waits until nearly nothing is left or
    /// `patience` is over.
    pub fn end(self, restore: Duration, patience: Duration) -> Kept {
        let halfway = Instant::now() - restore / 2;
        self.stop.store(true, Ordering::Release);
        let seen = self.thread.join().unwrap_or_default();
        let mut kept = Kept {
            most: seen.iter().map(|(_, kib)| *kib).max().unwrap_or(0),
            halfway: seen.iter().rfind(|(at, _)| *at <= halfway).map_or(0, |(_, kib)| *kib),
            after: 0,
        };
        let until = Instant::now() + patience;
        loop {
            kept.after = kept_kib(self.pid);
            if kept.after < kept.most / 16 || Instant::now() > until {
                return kept;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A port that is free now.
pub fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(|e| format!("no port: {e}"))?;
    listener.local_addr().map(|address| address.port()).map_err(|e| format!("no port: {e}"))
}

/// Whether something of this pid namespace's network listens at `port`; asking does not connect.
pub fn listens(port: u16) -> bool {
    let hex = format!(":{port:04X} ");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        // Column 2 is the local address, column 4 the state, 0A is LISTEN.
        text.lines().any(|line| line.contains(&hex) && line.split_whitespace().nth(3) == Some("0A"))
    })
}
