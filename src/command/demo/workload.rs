//! The demo's workload, and how it is watched.
//!
//! One thread puts 1, 2, 3, ... into a pipe, the other takes them out, checks that none is missing, checks a page of
//! its memory for each, and appends them to a file that stays open. So a wrong byte of memory, a
//! lost byte in the pipe, a lost file position or a lost thread all show up as a gap. Beside each number stands how
//! many microseconds have passed since the one before: the longest such pause is the time it stood still. It ends
//! when SIGTERM comes, when its file has no name any more, or after [`LIMIT`] numbers, so that it cannot be left
//! behind for good.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    mem,
    os::unix::fs::MetadataExt as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

/// Names the directory that the workload writes to, and thereby makes `crtool demo` the workload.
pub(super) const DIR: &str = "CRTOOL_DEMO_WORKLOAD";
/// Bytes of memory that it fills and checks.
pub(super) const MEMORY: usize = 64 << 20;
/// It ends by itself at this number, one or two minutes later.
const LIMIT: u64 = 100_000;
/// Bytes of a page.
const PAGE: usize = 4096;

/// Counts until told to stop; an error if its own state is not what it must be.
pub(super) fn run(dir: &Path) -> anyhow::Result<()> {
    close_inherited();
    nix::unistd::setsid().context("new session")?;
    let end: SigSet = [Signal::SIGTERM].into_iter().collect();
    end.thread_block().context("block SIGTERM")?;
    let end = SignalFd::with_flags(&end, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;

    let mut memory = vec![0u8; MEMORY];
    for (number, page) in memory.chunks_exact_mut(PAGE).enumerate() {
        fill(page, number);
    }
    fs::write(dir.join("pid"), std::process::id().to_string()).context("write of pid")?;
    let mut file =
        OpenOptions::new().write(true).create_new(true).open(dir.join("count")).context("make of count")?;
    let (mut taker, mut giver) = io::pipe().context("make of a pipe")?;
    thread::Builder::new().name("giver".into()).spawn(move || {
        for number in 1..=LIMIT {
            if giver.write_all(&u64::to_le_bytes(number)).is_err() {
                break;
            }
        }
    })?;
    let mut before = Instant::now();
    for expected in 1..=LIMIT {
        let mut number = [0; 8];
        taker.read_exact(&mut number).context("read from the pipe")?;
        let number = u64::from_le_bytes(number);
        ensure!(number == expected, "the pipe gave {number} after {}", expected - 1);
        let page = usize::try_from(number).unwrap_or(0) % (MEMORY / PAGE);
        let mut right = [0; PAGE];
        fill(&mut right, page);
        ensure!(memory.chunks_exact(PAGE).nth(page) == Some(&right[..]), "page {page} has changed");
        let now = Instant::now();
        let pause = now.duration_since(mem::replace(&mut before, now));
        file.write_all(format!("{number} {}\n", pause.as_micros()).as_bytes()).context("write of count")?;
        if end.read_signal()?.is_some() || file.metadata()?.nlink() == 0 {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Different bytes for each page, none of them easy to guess.
fn fill(page: &mut [u8], number: usize) {
    let mut state = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// Whatever the user's shell or script left open is not for this process: it could stop the dump.
fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
    env::set_current_dir("/").ok();
}

/// How far the workload has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// The last number written.
    pub(super) last: u64,
    /// The longest time between two numbers.
    pub(super) pause: Duration,
    /// Bytes of the file up to there.
    at: u64,
}

impl Progress {
    /// Reads on and checks that each number is the successor of the one before.
    pub(super) fn read(mut self, dir: &Path) -> anyhow::Result<Self> {
        let Ok(mut file) = File::open(dir.join("count")) else { return Ok(self) };
        file.seek(SeekFrom::Start(self.at))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        for line in bytes.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n")) {
            let text = String::from_utf8_lossy(line);
            let (number, pause) = text.trim().split_once(' ').unwrap_or_default();
            ensure!(number.parse() == Ok(self.last + 1), "after {} comes {:?}", self.last, text.trim());
            self.last += 1;
            self.pause = self.pause.max(Duration::from_micros(pause.parse().context("a pause")?));
            self.at += line.len() as u64;
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| fs::write(dir.path().join("count"), text).unwrap();
        let start = Progress::default();
        assert_eq!(start.read(dir.path()).unwrap(), start);
        write("1 0\n2 1500\n3");
        let two = start.read(dir.path()).unwrap();
        assert_eq!((two.last, two.pause), (2, Duration::from_micros(1500)));
        write("1 0\n2 1500\n3 7\n4 9\n");
        let four = two.read(dir.path()).unwrap();
        assert_eq!((four.last, four.pause), (4, two.pause));
        for bad in ["1 0\n2 1500\n4 1\n", "1 0\n2 1500\n2 1\n", "1 0\n2 1500\n3\n", "1 0\n2 1500\n3 x\n"] {
            write(bad);
            assert!(two.read(dir.path()).is_err(), "{bad}");
        }
    }
}
