//! The tree as it is seen from outside: where it is, and whether it counts as it must.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::target::{CHECKS, COMM, JOURNALS};

/// What the files of the tree say.
#[derive(Debug)]
pub struct Journals {
    dir: PathBuf,
    /// Counts that have been looked at, of the root and of the child.
    seen: [u64; 2],
}

impl Journals {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), seen: [0; 2] }
    }

    /// The last counts of root and child. An error if one is missing or there twice, or if the tree has found
    /// something wrong.
    pub fn counts(&mut self) -> Result<[u64; 2], String> {
        if let Ok(text) = fs::read_to_string(self.dir.join("wrong")) {
            return Err(format!("the tree found itself damaged: {text}"));
        }
        for (name, seen) in JOURNALS.iter().zip(&mut self.seen) {
            let Ok(file) = File::open(self.dir.join(name)) else { continue };
            let mut bytes = vec![0; 1 << 16];
            loop {
                let got = file.read_at(&mut bytes, *seen * 8).map_err(|e| format!("read {name}: {e}"))?;
                let whole = got / 8 * 8;
                for word in bytes.get(..whole).unwrap_or_default().chunks_exact(8) {
                    let count = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                    if count != *seen + 1 {
                        return Err(format!("{name}: {count} comes after {seen}"));
                    }
                    *seen = count;
                }
                if whole == 0 {
                    break;
                }
            }
        }
        Ok(self.seen)
    }

    /// How often the tree has found its memory to be right.
    pub fn checks(&self) -> u64 {
        let mut word = [0; 8];
        let read = File::open(self.dir.join(CHECKS)).and_then(|file| file.read_exact_at(&mut word, 0));
        read.map_or(0, |()| u64::from_le_bytes(word))
    }
}

/// A process of the tree, by its pid as the caller sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    pub pid: i32,
    /// By its pid on the host.
    pub inner: i32,
    /// It has been told to die, and will run no more.
    pub dying: bool,
}

/// The processes of the tree in the pid namespace of `init`, but for zombies.
pub fn members(init: i32) -> Vec<Member> {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(home) = namespace(init) else { return Vec::new() };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|&pid| namespace(pid).as_ref() == Some(&home)).filter_map(member).collect()
}

/// Who has the pid `inner` in the pid namespace of `init`, whatever it is.
pub fn with_pid(init: i32, inner: &str) -> Option<i32> {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let home = namespace(init)?;
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()).find(|&pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let own = status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last());
        own == Some(inner) && namespace(pid).as_ref() == Some(&home)
    })
}

fn member(pid: i32) -> Option<Member> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned()
    };
    let killed = |name: &str| u64::from_str_radix(&field(name), 16).is_ok_and(|bits| bits & 1 << 8 != 0);
    let inner = field("NSpid:").split_whitespace().last()?.parse().ok()?;
    let dead = field("State:").starts_with(['Z', 'X']);
    let dying = killed("SigPnd:") || killed("ShdPnd:");
    (field("Name:") == COMM && !dead).then_some(Member { pid, inner, dying })
}

/// Tasks of a process that are stopped or traced: none of a tree that was let go.
pub fn held(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let held = tasks.filter_map(|task| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (state, tracer) = (field("State:")?, field("TracerPid:")?);
        let held = state.starts_with(['T', 't']) || tracer != "0";
        held.then(|| format!("{}: {state}, tracer {tracer}", task.path().display()))
    });
    held.collect()
}

/// `kill -9`; the process is dead afterwards.
pub fn kill_dead(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let lives = |line: &str| line.strip_prefix("State:").is_some_and(|s| !s.trim().starts_with(['Z', 'X']));
    while fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default().lines().any(lives) {
        thread::sleep(Duration::from_micros(200));
    }
}
