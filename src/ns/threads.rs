//! Namespaces that a single thread has: one of its own (unshare(2), setns(2)), or a pid namespace prepared for the processes
//! that it will fork. Images have a place for the namespaces of a process, so both are refused.
//!
//! A pid namespace without a first process has no link in /proc/PID/ns; the time namespace for children is in `time.rs`.

use std::{os::unix::ffi::OsStrExt, sync::LazyLock};

use nix::{
    fcntl::{OFlag, open, readlinkat},
    sys::stat::Mode,
};

use crate::{finding::Finding, sys::pid::HostPid};

/// Whether this kernel shows the pid namespace for children (Linux 4.12).
static SHOWS_PREPARED: LazyLock<bool> =
    LazyLock::new(|| std::fs::exists("/proc/self/ns/pid_for_children").unwrap_or(false));

/// What a thread may have of its own. User, pid and time namespaces are those of the whole process.
const OF_THREADS: [&str; 5] = ["net", "ipc", "uts", "mnt", "cgroup"];

/// The namespaces of one thread, by their numbers; `None` for those that this kernel does not have or show.
#[derive(Debug)]
pub(crate) struct Namespaces {
    of_thread: [Option<u64>; OF_THREADS.len()],
    pid: Option<u64>,
    /// Linux 4.12.
    pid_for_children: Option<u64>,
    pub(super) time: Option<u64>,
    pub(super) time_for_children: Option<u64>,
}

impl Namespaces {
    /// `None` for a thread that is gone.
    pub(crate) fn of(pid: HostPid, tid: HostPid) -> Option<Self> {
        let path = format!("/proc/{pid}/task/{tid}/ns");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = open(path.as_str(), flags, Mode::empty()).ok()?;
        // The link says the number: stat would have to make the inode, which takes three times as long.
        let number = |name| number_in(readlinkat(&dir, name).ok()?.as_bytes());
        Some(Self {
            of_thread: OF_THREADS.map(number),
            pid: number("pid"),
            pid_for_children: number("pid_for_children"),
            time: number("time"),
            time_for_children: number("time_for_children"),
        })
    }

    /// Names what a thread of `process` has that the process has not; `process` are the namespaces of another thread of it.
    pub(crate) fn compare(&self, process: &Self, pid: HostPid, tid: HostPid, findings: &mut Vec<Finding>) {
        for (name, (own, of_process)) in OF_THREADS.iter().zip(self.of_thread.iter().zip(&process.of_thread))
        {
            if own != of_process {
                findings.push(Finding {
                    pid,
                    what: format!("thread {tid}: {name} namespace"),
                    reason: "its own (unshare, setns): images have a place for those of a process only"
                        .into(),
                    hint: String::new(),
                });
            }
        }
    }

    /// Names a pid namespace that is prepared for children.
    pub(crate) fn prepared(&self, pid: HostPid, tid: HostPid, findings: &mut Vec<Finding>) {
        if *SHOWS_PREPARED && self.pid.is_some() && self.pid_for_children != self.pid {
            let what = "pid namespace for children";
            findings.push(Finding {
                pid,
                what: if pid == tid { what.into() } else { format!("thread {tid}: {what}") },
                reason: "another one is prepared for the processes that it will fork, for which images have no place".into(),
                hint: "dump it before it prepares the namespace, or what runs inside by itself".into(),
            });
        }
    }
}

/// The number in a link such as `net:[4026531840]`.
pub(super) fn number_in(link: &[u8]) -> Option<u64> {
    let (_, number) = std::str::from_utf8(link).ok()?.split_once(":[")?;
    number.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_namespaces() {
        assert_eq!(number_in(b"net:[4026531840]"), Some(4_026_531_840));
        for none in [&b""[..], b"net:[]", b"net:4026531840", b"net:[1", b"\xff:[1]"] {
            assert_eq!(number_in(none), None);
        }
        let own = Namespaces::of(HostPid::own(), HostPid::own()).unwrap();
        let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata("/proc/self/ns/net").unwrap());
        assert_eq!(own.of_thread[0], Some(inode));
        assert_eq!(own.pid, own.pid_for_children);
    }
}
