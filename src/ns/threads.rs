//! Namespaces that a single thread has: one of its own (unshare(2), setns(2)), or a pid namespace prepared for the processes
//! that it will fork. Images have a place for the namespaces of a process, so both are refused.
//!
//! A pid namespace without a first process has no link in /proc/PID/ns; the time namespace for children is in `time.rs`.

use std::{os::fd::OwnedFd, sync::LazyLock};

use nix::{
    fcntl::{AtFlags, OFlag, open},
    sys::stat::{Mode, fstatat},
};

use crate::{finding::Finding, sys::pid::HostPid};

/// What a thread may have of its own. User, pid and time namespaces are those of the whole process.
const NAMES: [&str; 5] = ["net", "ipc", "uts", "mnt", "cgroup"];

/// Whether this kernel shows the pid namespace for children (Linux 4.12).
static SHOWS_PREPARED: LazyLock<bool> =
    LazyLock::new(|| std::fs::exists("/proc/self/ns/pid_for_children").unwrap_or(false));

/// The namespaces of one thread.
#[derive(Debug)]
pub(crate) struct Namespaces(OwnedFd);

impl Namespaces {
    /// `None` for a thread that is gone.
    pub(crate) fn of(pid: HostPid, tid: HostPid) -> Option<Self> {
        let path = format!("/proc/{pid}/task/{tid}/ns");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        open(path.as_str(), flags, Mode::empty()).ok().map(Self)
    }

    fn inode(&self, name: &str) -> Option<(u64, u64)> {
        let stat = fstatat(&self.0, name, AtFlags::empty()).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }

    /// Names what a thread of `process` has that the process has not; `process` are the namespaces of another thread of it.
    pub(crate) fn compare(&self, process: &Self, pid: HostPid, tid: HostPid, findings: &mut Vec<Finding>) {
        for name in NAMES {
            if self.inode(name) != process.inode(name) {
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
        let own = self.inode("pid");
        if *SHOWS_PREPARED && own.is_some() && self.inode("pid_for_children") != own {
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
