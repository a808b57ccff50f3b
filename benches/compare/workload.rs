//! What is dumped: programs of one trait each, that know whether they are intact.
//!
//! A workload has a session of its own, `/dev/null` as its three descriptors and nothing else open. It makes the file
//! `ready` in its directory, waits for SIGTERM, looks at itself and exits with 0 if all is as it was.

use std::{
    env,
    fs::{self, File},
    io::{Seek as _, SeekFrom},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::sys;

/// Its kind and size: `random:16777216`.
pub const KIND: &str = "BENCH_WORKLOAD";
/// Which of several processes it is, which is not the first of its tree.
const CHILD: &str = "BENCH_CHILD";
/// Its directory.
pub const DIR: &str = "BENCH_DIR";

pub fn main(kind: &str) -> ExitCode {
    let (kind, count) = kind.split_once(':').unwrap_or((kind, "0"));
    let count: usize = count.parse().expect("size of a workload");
    let dir = env::var_os(DIR).expect("directory of a workload");
    let dir = Path::new(&dir);
    close_inherited();
    if kind == "clocks" {
        sys::enter_time_namespace(DAY).expect("time namespace");
        let own = env::current_exe().expect("own path");
        panic!("{}", Command::new(own).env(KIND, format!("random:{count}")).exec());
    }
    // A child belongs to its parent's session.
    let child = env::var_os(CHILD);
    if child.is_none() {
        nix::unistd::setsid().expect("new session");
    }
    let term: SigSet = [Signal::SIGTERM].into_iter().collect();
    term.thread_block().expect("block SIGTERM");
    let told = || {
        let name = child.as_ref().map_or("ready".into(), |number| format!("child{}", number.display()));
        fs::write(dir.join(name), "").expect("say ready");
        term.wait().expect("wait for SIGTERM");
    };
    let intact = match kind {
        "random" => memory(count, 1, told),
        "half" => memory(count, 2, told),
        "processes" => processes("idle", count, dir, told),
        "spread" => processes(&format!("random:{}", count / 16), 16, dir, told),
        "idle" => {
            told();
            true
        }
        "threads" => threads(count, told),
        "mappings" => {
            let start = sys::mappings(count);
            told();
            sys::mappings_are_intact(start, count)
        }
        "files" => files(dir, count, told),
        _ => panic!("no workload {kind}"),
    };
    if intact { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the caller's shell left open is not the workload's.
fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}

/// Words per stretch of memory that is random or zero.
const STRETCH: usize = (1 << 20) / 8;

/// `bytes` of memory in stretches of 1 MiB: of `of`, one is random and the rest are zeros that have been written.
fn memory(bytes: usize, of: usize, told: impl FnOnce()) -> bool {
    let mut words: Vec<u64> = Vec::with_capacity(bytes / 8);
    let mut state = SEED;
    while words.len() < bytes / 8 {
        let random = (words.len() / STRETCH).is_multiple_of(of);
        words.extend((0..STRETCH).map(|_| if random { next(&mut state) } else { 0 }));
    }
    told();
    let mut state = SEED;
    words.chunks(STRETCH).enumerate().all(|(number, stretch)| {
        if number.is_multiple_of(of) {
            stretch.iter().all(|&word| word == next(&mut state))
        } else {
            stretch.iter().all(|&word| word == 0)
        }
    })
}

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A day, in seconds.
const DAY: u64 = 86_400;

/// A parent with `count` children of this kind.
fn processes(kind: &str, count: usize, dir: &Path, told: impl FnOnce()) -> bool {
    let own = env::current_exe().expect("own path");
    let start = |number: usize| {
        let mut command = Command::new(&own);
        command.env(KIND, kind).env(CHILD, number.to_string()).spawn().expect("start a child")
    };
    let mut children: Vec<_> = (0..count).map(start).collect();
    for number in 0..count {
        let path = dir.join(format!("child{number}"));
        while !path.exists() {
            thread::sleep(Duration::from_millis(1));
        }
        fs::remove_file(path).expect("what a child has said");
    }
    told();
    for child in &children {
        let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    }
    children.iter_mut().all(|child| child.wait().is_ok_and(|end| end.success()))
}

/// `count` threads besides the first.
fn threads(count: usize, told: impl FnOnce()) -> bool {
    for _ in 0..count {
        thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(|| {
                loop {
                    thread::park()
                }
            })
            .expect("start a thread");
    }
    told();
    fs::read_dir("/proc/self/task").expect("own threads").count() == count + 1
}

/// `count` open files, each at a position of its own.
fn files(dir: &Path, count: usize, told: impl FnOnce()) -> bool {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("setrlimit");
    let mut files: Vec<File> = (0..count)
        .map(|number| {
            let path = dir.join(format!("file{number}"));
            fs::write(&path, vec![b'x'; number]).expect("make a file");
            let mut file = File::open(&path).expect("open a file");
            file.seek(SeekFrom::End(0)).expect("seek");
            file
        })
        .collect();
    told();
    files.iter_mut().enumerate().all(|(number, file)| file.stream_position().ok() == Some(number as u64))
}
