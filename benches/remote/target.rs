//! What is moved: a task with so much random memory that notices when it did not run.
//!
//! It has a session of its own, `/dev/null` as its three descriptors and nothing else open. It says in the file `ready`
//! of its directory where its memory is, then looks at the clock again and again until SIGTERM, checks its memory,
//! and leaves the longest time in which it could not look in the file `gap`.

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::source::{Source, child_of};
use crate::tool::Reaper;

/// Its size in bytes.
pub const SIZE: &str = "BENCH_TARGET";
/// Its directory.
const DIR: &str = "BENCH_DIR";
/// How often it looks at the clock.
const LOOK: Duration = Duration::from_micros(500);
/// A target has this long to set up and to check itself.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A target at work.
#[derive(Debug)]
pub struct Target {
    /// Its pid there, and at the destination once it is.
    pub pid: i32,
    /// Its pid for the benchmark while it is at the source.
    pub at: i32,
    /// The process of ours that waits for its end there.
    pub carrier: i32,
    /// Where its memory is.
    pub start: u64,
    pub bytes: u64,
}

impl Target {
    pub fn start(source: &Source, dir: &Path, bytes: u64, reaper: &Reaper) -> Result<Self, String> {
        let prefix = source.prefix();
        let child = Command::new(&prefix[0])
            .args(&prefix[1..])
            .arg(env::current_exe().map_err(|e| e.to_string())?)
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env(SIZE, bytes.to_string())
            .env(DIR, dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("start the target: {e}"))?;
        let carrier = child.id().cast_signed();
        let begin = Instant::now();
        let ready = dir.join("ready");
        while !ready.exists() {
            if begin.elapsed() > PATIENCE || reaper.wait(carrier, Duration::from_millis(2)).is_some() {
                return Err("the target does not get ready".into());
            }
        }
        let text = fs::read_to_string(&ready).map_err(|e| format!("{}: {e}", ready.display()))?;
        let bad = || format!("{}: {text}", ready.display());
        let (start, pid) = text.trim().split_once(' ').ok_or_else(bad)?;
        let (start, pid) = (start.parse().map_err(|_| bad())?, pid.parse().map_err(|_| bad())?);
        let at = child_of(carrier).ok_or("the target is not where it was started")?;
        Ok(Self { pid, at, carrier, start, bytes })
    }

    /// Tells it to end, where it is now: the longest time in which it did not run, if all its memory is as it was.
    pub fn end(&self, moved: bool, dir: &Path, reaper: &Reaper) -> Result<Duration, String> {
        let (pid, ends) = if moved { (self.pid, self.pid) } else { (self.at, self.carrier) };
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM);
        match reaper.wait(ends, PATIENCE) {
            Some((ended, _)) if ended.status == 0 => {}
            ended => return Err(format!("the target is not intact: {ended:?}")),
        }
        let path = dir.join("gap");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        text.parse().map(Duration::from_nanos).map_err(|e| format!("{}: {e}", path.display()))
    }
}

pub fn main(size: &str) -> ExitCode {
    let bytes: usize = size.parse().expect("size of the target");
    let dir = env::var_os(DIR).expect("directory of the target");
    let dir = Path::new(&dir);
    close_inherited();
    nix::unistd::setsid().expect("new session");
    let term: SigSet = [Signal::SIGTERM].into_iter().collect();
    term.thread_block().expect("block SIGTERM");
    let mut words: Vec<u64> = Vec::with_capacity(bytes / 8);
    words.extend(content().take(bytes / 8));
    let told = SignalFd::with_flags(&term, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).expect("signalfd");
    fs::write(dir.join("ready.new"), format!("{} {}\n", words.as_ptr().addr(), std::process::id()))
        .expect("say where");
    fs::rename(dir.join("ready.new"), dir.join("ready")).expect("say ready");
    // Not the monotonic clock: CRIU lets that go on, by a time namespace, from where it was at the dump.
    let (mut last, mut gap) = (SystemTime::now(), Duration::ZERO);
    while told.read_signal().expect("look for SIGTERM").is_none() {
        thread::sleep(LOOK);
        let now = SystemTime::now();
        gap = gap.max(now.duration_since(last).unwrap_or_default());
        last = now;
    }
    if !words.iter().copied().eq(content().take(bytes / 8)) {
        return ExitCode::FAILURE;
    }
    fs::write(dir.join("gap"), gap.as_nanos().to_string()).expect("leave the gap");
    ExitCode::SUCCESS
}

/// What the memory of every target holds, word by word.
pub fn content() -> impl Iterator<Item = u64> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

/// What the caller's shell left open is not the target's. What `/dev/null` was opened by others is on a mount of theirs,
/// which CRIU does not find.
fn close_inherited() {
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null").expect("/dev/null");
    nix::unistd::dup2_stdin(&null).expect("stdin");
    nix::unistd::dup2_stdout(&null).expect("stdout");
    nix::unistd::dup2_stderr(&null).expect("stderr");
    drop(null);
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}
