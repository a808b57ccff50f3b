//! Why a thread does not stop, or does not run: what a wait for it says when its time is over.
//!
//! Looked at from outside, through /proc and the cgroup file systems; nothing is done to the thread. A thread in vfork(2)
//! sleeps until its child executes a program or ends. One in a frozen cgroup stops for nobody (cgroup v1), or stops but
//! executes nothing (v2). One in an uninterruptible sleep waits for a device or a file system.

use std::{
    collections::HashMap,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::TraceError;
use crate::{
    proc::{
        cgroup,
        mountinfo::{self, Mount},
        stat,
    },
    sys::pid::HostPid,
};

/// The reason why a thread is silent, if there is one that can be seen.
pub(crate) fn reason(pid: HostPid, tid: HostPid) -> Option<TraceError> {
    if in_vfork(pid, tid) {
        return Some(TraceError::Vfork(tid));
    }
    if let Some(group) = FrozenGroups::default().of(pid) {
        return Some(TraceError::FrozenGroup { tid, group });
    }
    let at = format!("/proc/{pid}/task/{tid}");
    let stat = stat::parse(&fs::read(format!("{at}/stat")).ok()?).ok()?;
    if stat.state != stat::State::DiskSleep {
        return None;
    }
    let place = fs::read_to_string(format!("{at}/wchan")).unwrap_or_default();
    Some(TraceError::Asleep { tid, place })
}

/// Whether a thread sleeps in vfork until its child has a memory of its own.
pub(crate) fn in_vfork(pid: HostPid, tid: HostPid) -> bool {
    let at = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
    let mut words = at.split(' ');
    let number = words.next().and_then(|n| n.parse::<i64>().ok());
    let flags = words.next().and_then(|f| u64::from_str_radix(f.trim_start_matches("0x"), 16).ok());
    match number {
        Some(libc::SYS_vfork) => true,
        Some(libc::SYS_clone) => flags.is_some_and(|f| f & libc::CLONE_VFORK as u64 != 0),
        // The flags of clone3 are in memory.
        _ => fs::read(format!("/proc/{pid}/task/{tid}/wchan"))
            .is_ok_and(|w| w.windows(5).any(|s| s == b"vfork")),
    }
}

/// Which cgroups are frozen. Each is looked at once: the tasks of a tree mostly are in the same ones.
#[derive(Debug, Default)]
pub(crate) struct FrozenGroups {
    /// By the text of /proc/PID/cgroup.
    known: HashMap<Vec<u8>, Option<PathBuf>>,
    mounts: Option<Vec<Mount>>,
}

impl FrozenGroups {
    /// The frozen cgroup that a process is in. `None` also where that cannot be told.
    pub(crate) fn of(&mut self, pid: HostPid) -> Option<PathBuf> {
        let text = fs::read(format!("/proc/{pid}/cgroup")).ok()?;
        if let Some(known) = self.known.get(&text) {
            return known.clone();
        }
        let mounts = self.mounts.get_or_insert_with(|| {
            let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
            mountinfo::parse(&text).unwrap_or_default()
        });
        let found = cgroup::parse(&text).unwrap_or_default().iter().find_map(|group| frozen(mounts, group));
        self.known.insert(text, found.clone());
        found
    }
}

fn frozen(mounts: &[Mount], group: &cgroup::Membership) -> Option<PathBuf> {
    let freezer = group.controllers.split(|b| *b == b',').any(|name| name == b"freezer");
    if !group.is_unified() && !freezer {
        return None;
    }
    mounts.iter().find_map(|mount| {
        let is_it = match &mount.fstype[..] {
            b"cgroup2" => group.is_unified(),
            b"cgroup" => freezer && mount.super_options.split(|b| *b == b',').any(|name| name == b"freezer"),
            _ => false,
        };
        let below = group.path.strip_prefix(&mount.root[..]).or_else(|| group.path.strip_prefix(b"/"))?;
        let below = below.strip_prefix(b"/").unwrap_or(below);
        let dir = Path::new(std::ffi::OsStr::from_bytes(&mount.mountpoint))
            .join(std::ffi::OsStr::from_bytes(below));
        let says = |file: &str, text: &str| {
            fs::read_to_string(dir.join(file)).is_ok_and(|read| read.lines().any(|line| line == text))
        };
        let frozen = is_it
            && (says("cgroup.events", "frozen 1")
                || says("cgroup.freeze", "1")
                || ["FROZEN", "FREEZING"].iter().any(|state| says("freezer.state", state)));
        frozen.then_some(dir)
    })
}
