//! What /proc shows of a whole tree: taken before and after, it must be the same.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;

use crate::sys;

/// Everything comparable about a tree, one line of text per item.
#[derive(Debug, Default, PartialEq)]
pub struct Picture {
    items: BTreeMap<String, String>,
}

/// Fields of /proc/PID/status that say what a task is, not how much it has done.
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "VmLck",
    "CoreDumping",
    "THP_enabled",
];

/// Fields of /proc/PID/stat by number and name, as proc(5) counts them.
const STAT: &[(usize, &str)] = &[
    (5, "pgrp"),
    (6, "session"),
    (7, "tty_nr"),
    (18, "priority"),
    (19, "nice"),
    (26, "startcode"),
    (27, "endcode"),
    (28, "startstack"),
    (38, "exit_signal"),
    (40, "rt_priority"),
    (41, "policy"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (49, "arg_end"),
    (50, "env_start"),
    (51, "env_end"),
    (52, "exit_code"),
];

/// What a zombie's parent can still see of it.
const STATUS_OF_ZOMBIE: &[&str] = &["Name", "Tgid", "Pid", "PPid", "TracerPid"];
const STAT_OF_ZOMBIE: &[&str] = &["pgrp", "session", "exit_signal", "exit_code"];

/// Files compared byte for byte, per process.
const PLAIN: &[&str] = &["cmdline", "environ", "auxv", "limits", "oom_score_adj", "coredump_filter"];
const LINKS: &[&str] = &["exe", "cwd", "root"];

/// Flags of a mapping that depend on its history or on the host, not on what the target asked for.
const UNTOLD_FLAGS: &[&str] = &["sd", "ac", "uw", "um"];

impl Picture {
    pub fn take(root: i32) -> Picture {
        let mut picture = Picture::default();
        let mut pids = tree_below(root);
        pids.insert(0, root);
        for pid in pids {
            picture.task(pid);
        }
        picture
    }

    fn put(&mut self, key: String, value: String) {
        self.items.insert(key, value);
    }

    fn task(&mut self, pid: i32) {
        let tids = numbers_in(&format!("/proc/{pid}/task"));
        let dead = tids.iter().filter(|&&tid| self.thread(pid, tid)).count();
        if dead == tids.len() {
            return;
        }
        for file in PLAIN {
            let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            self.put(format!("{pid}/{file}"), bytes.escape_ascii().to_string());
        }
        for link in LINKS {
            self.put(format!("{pid}/{link}"), link_text(&format!("/proc/{pid}/{link}")));
        }
        for fd in numbers_in(&format!("/proc/{pid}/fd")) {
            let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
            let kept = info.lines().filter(|l| l.starts_with("pos:") || l.starts_with("flags:"));
            let kept: Vec<&str> = kept.collect();
            let text = format!("{} {}", link_text(&format!("/proc/{pid}/fd/{fd}")), kept.join(" "));
            self.put(format!("{pid}/fd/{fd}"), text);
        }
        for (n, line) in mappings(pid).into_iter().enumerate() {
            let start = line.split('-').next().unwrap_or_default().to_owned();
            self.put(format!("{pid}/maps/{n:05} {start}"), line);
        }
    }

    /// One thread; true if it is a zombie, of which only little is left to compare.
    fn thread(&mut self, pid: i32, tid: i32) -> bool {
        let dir = format!("/proc/{pid}/task/{tid}");
        let state = match thread_stat(&dir, 3).as_str() {
            "R" | "S" | "D" | "I" => "runs".to_owned(),
            other => other.to_owned(),
        };
        let dead = state == "Z";
        self.put(format!("{pid}/{tid}/state"), state);
        let status = std::fs::read(format!("{dir}/status")).unwrap_or_default();
        for line in String::from_utf8_lossy(&status).lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            if STATUS.contains(&name) && (!dead || STATUS_OF_ZOMBIE.contains(&name)) {
                self.put(format!("{pid}/{tid}/status/{name}"), value.trim().to_owned());
            }
        }
        for (number, name) in STAT {
            if !dead || STAT_OF_ZOMBIE.contains(name) {
                self.put(format!("{pid}/{tid}/stat/{name}"), thread_stat(&dir, *number));
            }
        }
        if dead {
            return true;
        }
        for file in ["comm", "personality"] {
            let bytes = std::fs::read(format!("{dir}/{file}")).unwrap_or_default();
            self.put(format!("{pid}/{tid}/{file}"), bytes.escape_ascii().to_string());
        }
        let slack = std::fs::read_to_string(format!("/proc/{tid}/timerslack_ns")).unwrap_or_default();
        self.put(format!("{pid}/{tid}/timerslack_ns"), slack.trim().to_owned());
        false
    }

    /// As CRIU restores it: shared anonymous memory becomes a memfd called so.
    pub fn seen_by_criu(mut self) -> Picture {
        for value in self.items.values_mut() {
            for memfd in ["/memfd:/dev/zero (deleted)", "/memfd: (deleted)"] {
                *value = value.replace(memfd, "/dev/zero (deleted)");
            }
        }
        self
    }

    pub fn says(&self, key: &str, value: &str) -> bool {
        self.items.get(key).is_some_and(|v| v == value)
    }

    /// Whether any item whose key ends so has this value.
    pub fn any_says(&self, key_end: &str, value: &str) -> bool {
        self.items.iter().any(|(k, v)| k.ends_with(key_end) && v == value)
    }

    /// What differs, one line each; empty if nothing does.
    pub fn differences(&self, now: &Picture, may_differ: &[&str]) -> String {
        let keys: BTreeSet<&String> = self.items.keys().chain(now.items.keys()).collect();
        let mut lines = Vec::new();
        for key in keys {
            let (was, is) = (self.items.get(key), now.items.get(key));
            if was == is || may_differ.iter().any(|m| key.contains(m)) {
                continue;
            }
            let text = |v: Option<&String>| v.map_or("nothing".to_owned(), |v| format!("{v:?}"));
            lines.push(format!("{key}: was {}, is {}", text(was), text(is)));
        }
        let more = lines.len().saturating_sub(25);
        lines.truncate(25);
        if more > 0 {
            lines.push(format!("and {more} more"));
        }
        lines.join("\n")
    }
}

fn thread_stat(dir: &str, number: usize) -> String {
    sys::stat_number(&std::fs::read(format!("{dir}/stat")).unwrap_or_default(), number)
}

fn numbers_in(dir: &str) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut numbers: Vec<i32> =
        entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// A link's text without the parts that are a new kernel object's own: inode numbers, the name a
/// deleted file has got.
fn link_text(path: &str) -> String {
    let Ok(target) = std::fs::read_link(path) else {
        return String::new();
    };
    let text = target.as_os_str().as_bytes().escape_ascii().to_string();
    for kind in ["pipe:", "socket:", "pidfd:"] {
        if text.starts_with(kind) {
            return kind.to_owned();
        }
    }
    if text.ends_with(" (deleted)") && !text.starts_with("/memfd:") {
        return "(deleted)".to_owned();
    }
    text
}

/// The mappings of a task with their flags; neighbours that are one thing are told as one.
fn mappings(pid: i32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags: ") {
            if let Some(last) = all.last_mut() {
                let flags = flags.split_whitespace().filter(|f| !UNTOLD_FLAGS.contains(f));
                last.flags = flags.collect::<Vec<_>>().join(" ");
            }
        } else if let Some(key) = line.strip_prefix("ProtectionKey:") {
            if let Some(last) = all.last_mut().filter(|_| key.trim() != "0") {
                last.key = format!(" key {}", key.trim());
            }
        } else if let Some(mapping) = Mapping::parse(line) {
            all.push(mapping);
        }
    }
    let mut merged: Vec<Mapping> = Vec::new();
    for mapping in all {
        match merged.last_mut() {
            Some(last) if last.goes_on_in(&mapping) => last.end = mapping.end,
            _ => merged.push(mapping),
        }
    }
    merged.iter().map(Mapping::line).collect()
}

struct Mapping {
    start: u64,
    end: u64,
    access: String,
    offset: u64,
    path: String,
    flags: String,
    key: String,
}

impl Mapping {
    /// The head line of one mapping in smaps; no other line there starts with `hex-hex `.
    fn parse(line: &str) -> Option<Mapping> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let access = words.next()?.to_owned();
        let offset = u64::from_str_radix(words.next()?, 16).ok()?;
        let path = words.nth(2).unwrap_or_default().trim_start().to_owned();
        let gone = path.ends_with(" (deleted)");
        let path =
            if gone && path.starts_with('/') && !path.starts_with("/memfd:") && path != "/dev/zero (deleted)"
            {
                "(deleted)".to_owned()
            } else {
                path
            };
        Some(Mapping { start, end, access, offset, path, flags: String::new(), key: String::new() })
    }

    fn is_anonymous(&self) -> bool {
        self.path.is_empty() || self.path.starts_with('[')
    }

    fn goes_on_in(&self, next: &Mapping) -> bool {
        let same = self.access == next.access && self.path == next.path && self.flags == next.flags;
        let same = same && self.key == next.key;
        let follows = self.is_anonymous() || self.offset + (self.end - self.start) == next.offset;
        same && self.end == next.start && follows
    }

    fn line(&self) -> String {
        let Mapping { start, end, access, offset, path, flags, key } = self;
        let offset = if self.is_anonymous() { 0 } else { *offset };
        format!("{start:x}-{end:x} {access} {offset:x} {path} {{{flags}}}{key}")
    }
}

/// Which threads have been seen at rest: asleep, stopped, dead; or running for so long that it is what they do.
#[derive(Debug, Default)]
pub struct Rest {
    seen: BTreeSet<i32>,
    /// When a thread was first looked at, how long it had run, in nanoseconds.
    first: BTreeMap<i32, u64>,
}

impl Rest {
    /// Longer than it takes to get anywhere.
    const SPINS: u64 = 30_000_000;

    /// Looks once more; whether each thread of the tree below `root` has been at rest by now.
    pub fn all(&mut self, root: i32) -> bool {
        let pids = tree_below(root).into_iter().chain([root]);
        let threads: Vec<(i32, i32)> = pids
            .flat_map(|pid| numbers_in(&format!("/proc/{pid}/task")).into_iter().map(move |tid| (pid, tid)))
            .collect();
        for &(pid, tid) in &threads {
            let dir = format!("/proc/{pid}/task/{tid}");
            let schedstat = std::fs::read_to_string(format!("{dir}/schedstat")).unwrap_or_default();
            let ran = schedstat.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
            let first = *self.first.entry(tid).or_insert(ran);
            if thread_stat(&dir, 3) != "R" || ran > first + Self::SPINS {
                self.seen.insert(tid);
            }
        }
        threads.iter().all(|(_, tid)| self.seen.contains(tid))
    }
}

/// The tasks below `root`, by parent; sorted.
pub fn tree_below(root: i32) -> Vec<i32> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for pid in numbers_in("/proc") {
        if let Ok(parent) = sys::stat_field(pid, 4).parse() {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        for &child in children.get(&pid).into_iter().flatten() {
            found.push(child);
            open.push(child);
        }
    }
    found.sort_unstable();
    found
}
