//! The tree: it counts, and writes every count down in files that both hosts see. Whoever counts twice, or leaves
//! a count out, is found out by what is written there.
//!
//! - A thread counts: it changes its memory, appends the count to `journal`, and sends it to a child.
//! - A thread compares the memory with a checksum that goes with every change; `checks` says how often it has.
//! - The child gets counts from a pipe, looks whether one is missing, and appends them to `journal.child`.
//!
//! What the tree itself finds wrong is in the file `wrong`. SIGTERM ends it: the file `end` says how.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};

use crate::signals;

/// Role in the environment: [`ROOT`] or [`CHILD`], or a tree that does its work once.
pub const ROLE: &str = "REMOTE_TARGET";
pub const ROOT: &str = "root";
pub const CHILD: &str = "child";
/// Writes one line to [`LINES`] as soon as there is [`GO`], and ends.
pub const ONCE: &str = "once";
/// Its root ends as soon as there is [`GO`]; a child writes the line, and goes on.
pub const LEAVES: &str = "leaves";
const STAYS: &str = "stays";
pub const GO: &str = "go";
pub const LINES: &str = "lines";
/// Where its files are.
pub const DIR: &str = "REMOTE_TARGET_DIR";
/// MiB of memory that it changes all the time.
pub const CHANGING: &str = "REMOTE_TARGET_CHANGING";
/// MiB of memory that it has besides.
pub const BALLAST: &str = "REMOTE_TARGET_BALLAST";
/// What its processes are called.
pub const COMM: &str = "counting";
/// The counts of the root and of the child, 8 bytes each.
pub const JOURNALS: [&str; 2] = ["journal", "journal.child"];
/// How often the memory was compared, 8 bytes.
pub const CHECKS: &str = "checks";

/// Words of memory that change with each count.
const CHANGES: u64 = 16;

struct State {
    count: u64,
    words: Vec<u64>,
    /// Checksum of the words.
    sum: u64,
}

impl State {
    fn new(mebibytes: usize) -> Self {
        let words = ballast(mebibytes);
        Self { count: 0, sum: sum(&words), words }
    }

    /// Counts on, and changes words far from each other.
    fn next(&mut self) {
        self.count += 1;
        for n in self.count * CHANGES..(self.count + 1) * CHANGES {
            let at = usize::try_from(n.wrapping_mul(7919)).unwrap_or(0) % self.words.len();
            let more = n | 1;
            self.words[at] = self.words[at].wrapping_add(more);
            self.sum = self.sum.wrapping_add(weight(at).wrapping_mul(more));
        }
    }
}

/// Which words are where, as a number.
fn sum(words: &[u64]) -> u64 {
    words.iter().enumerate().fold(0, |sum: u64, (n, &word)| sum.wrapping_add(weight(n).wrapping_mul(word)))
}

pub fn main(role: &str) -> ExitCode {
    close_inherited();
    fs::write("/proc/self/comm", COMM).expect("take a name");
    let dir = PathBuf::from(env::var_os(DIR).expect("a directory"));
    match role {
        CHILD => child(&dir),
        ONCE | LEAVES | STAYS => once(&dir, role),
        role if role.starts_with(signals::ROOT) => signals::main(role, &dir),
        _ => root(&dir),
    }
}

/// A tree whose work must be done once, wherever.
fn once(dir: &Path, role: &str) -> ExitCode {
    nix::unistd::setsid().expect("new session");
    let _child = (role == LEAVES).then(|| {
        let mut command = Command::new(env::current_exe().expect("own path"));
        command.env(ROLE, STAYS).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("start the child")
    });
    if role != LEAVES {
        File::create(dir.join("ready")).expect("say that it is ready");
    }
    while !dir.join(GO).exists() {
        thread::sleep(Duration::from_micros(300));
    }
    if role != LEAVES {
        journal(dir, LINES).write_all(b"done\n").expect("write the line");
    }
    if role == STAYS {
        thread::sleep(Duration::from_secs(3600));
    }
    ExitCode::SUCCESS
}

/// What the harness has open is not for the tree.
fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}

fn journal(dir: &Path, name: &str) -> File {
    OpenOptions::new().create(true).append(true).open(dir.join(name)).expect("open a journal")
}

fn wrong(dir: &Path, text: &str) {
    let line = format!("{text}\n");
    let file = OpenOptions::new().create(true).append(true).open(dir.join("wrong"));
    file.and_then(|mut f| f.write_all(line.as_bytes())).expect("say what is wrong");
}

fn root(dir: &Path) -> ExitCode {
    nix::unistd::setsid().expect("new session");
    let term: SigSet = [Signal::SIGTERM].into_iter().collect();
    term.thread_block().expect("block SIGTERM");
    let mebibytes = |name| env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let ballast = ballast(mebibytes(BALLAST));
    let mut command = Command::new(env::current_exe().expect("own path"));
    command.env(ROLE, CHILD).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    #[allow(clippy::zombie_processes)] // it ends when its input does, with this process
    let mut child = command.spawn().expect("start the child");
    let mut to_child = child.stdin.take().expect("a pipe");
    // A small pipe: the counting waits for the child now and then.
    let _ = nix::fcntl::fcntl(&to_child, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096));

    let state = Arc::new(Mutex::new(State::new(mebibytes(CHANGING).max(1))));
    let mut journal = journal(dir, JOURNALS[0]);
    let (own, of) = (state.clone(), dir.to_owned());
    let counting = move || {
        loop {
            let mut state = own.lock().expect("the state");
            state.next();
            let count = state.count;
            if journal.write_all(&count.to_le_bytes()).is_err() {
                wrong(&of, "a count could not be written down");
            }
            drop(state);
            if let Err(e) = to_child.write_all(&count.to_le_bytes()) {
                // Whoever kills the tree kills one process after the other: this one may see that the child is dead.
                thread::sleep(Duration::from_millis(300));
                wrong(&of, &format!("the pipe to the child: {e}"));
                return;
            }
            thread::sleep(Duration::from_micros(500));
        }
    };
    let checks = File::create(dir.join(CHECKS)).expect("make the file of checks");
    let (own, of) = (state.clone(), dir.to_owned());
    let summing = move || {
        for number in 1u64.. {
            let begin = Instant::now();
            if let Err(text) = check(&own) {
                wrong(&of, &text);
                return;
            }
            if checks.write_all_at(&number.to_le_bytes(), 0).is_err() {
                wrong(&of, "a check could not be written down");
            }
            // The counting waits meanwhile: most of the time is for that.
            thread::sleep((2 * begin.elapsed()).clamp(Duration::from_millis(7), Duration::from_millis(500)));
        }
    };
    thread::Builder::new().stack_size(128 << 10).spawn(counting).expect("start a thread");
    thread::Builder::new().stack_size(128 << 10).spawn(summing).expect("start a thread");
    File::create(dir.join("ready")).expect("say that it is ready");
    term.wait().expect("wait for SIGTERM");
    let mut verdict = check(&state);
    if ballast.iter().enumerate().any(|(n, &word)| word != weight(n)) {
        verdict = Err("the rest of the memory has changed".into());
    }
    if let Err(text) = &verdict {
        wrong(dir, text);
    }
    // Without us there is nobody to write to it: it ends by itself.
    fs::write(dir.join("end"), if verdict.is_ok() { "well" } else { "wrong" }).expect("say how it ends");
    if verdict.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Memory of which no page is empty and none like another.
fn ballast(mebibytes: usize) -> Vec<u64> {
    (0..mebibytes << 17).map(weight).collect()
}

fn weight(n: usize) -> u64 {
    (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The memory is what the counting has made of it.
fn check(state: &Mutex<State>) -> Result<(), String> {
    let state = state.lock().map_err(|_| "a thread has panicked".to_owned())?;
    let sum = sum(&state.words);
    if sum == state.sum {
        Ok(())
    } else {
        Err(format!("the checksum of the memory is {sum:x} at count {}, not {:x}", state.count, state.sum))
    }
}

fn child(dir: &Path) -> ExitCode {
    let mut journal = journal(dir, JOURNALS[1]);
    let mut word = [0; 8];
    let mut last = 0;
    // Not buffered: what has been read is counted.
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned().expect("own input"));
    while input.read_exact(&mut word).is_ok() {
        let count = u64::from_le_bytes(word);
        if count != last + 1 {
            wrong(dir, &format!("the child got {count} after {last}"));
        }
        last = count;
        journal.write_all(&word).expect("write a count down");
    }
    ExitCode::SUCCESS
}
