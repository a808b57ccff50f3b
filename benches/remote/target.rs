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
    pub pid: i32,
    /// Where its memory is.
    pub start: u64,
    pub bytes: u64,
}

impl Target {
    pub fn start(dir: &Path, bytes: u64, reaper: &Reaper) -> Result<Self, String> {
        let child = Command::new(env::current_exe().map_err(|e| e.to_string())?)
            .env_clear()
            .env(SIZE, bytes.to_string())
            .env(DIR, dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("start the target: {e}"))?;
        let pid = child.id().cast_signed();
        let begin = Instant::now();
        let ready = dir.join("ready");
        while !ready.exists() {
            if begin.elapsed() > PATIENCE || reaper.wait(pid, Duration::from_millis(2)).is_some() {
                return Err("the target does not get ready".into());
            }
        }
        let text = fs::read_to_string(&ready).map_err(|e| format!("{}: {e}", ready.display()))?;
        let start = text.trim().parse().map_err(|e| format!("{}: {e}", ready.display()))?;
        Ok(Self { pid, start, bytes })
    }

    /// Tells it to end: the longest time in which it did not run, if all its memory is as it was.
    pub fn end(&self, dir: &Path, reaper: &Reaper) -> Result<Duration, String> {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        let _ = nix::sys::signal::kill(pid, Signal::SIGTERM);
        match reaper.wait(self.pid, PATIENCE) {
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
    fs::write(dir.join("ready.new"), format!("{}\n", words.as_ptr().addr())).expect("say where");
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

/// What the caller's shell left open is not the target's.
fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}
