//! What /proc says of tasks: their stat, their threads, who is whose child.
//!
//! Of tasks that run all of it may be out of date when it is read; of a tree whose threads are held it is true.

use std::{collections::HashSet, fs};

use super::TraceError;
use crate::{
    proc::{
        children,
        stat::{self, Stat},
    },
    sys::{fd::read_proc, pid::HostPid},
};

/// /proc/PID/stat.
pub(crate) fn stat(pid: HostPid) -> Result<Stat, TraceError> {
    stat_at(format!("/proc/{pid}/stat"))
}

/// /proc/PID/task/TID/stat.
pub(crate) fn thread_stat(pid: HostPid, tid: HostPid) -> Result<Stat, TraceError> {
    stat_at(format!("/proc/{pid}/task/{tid}/stat"))
}

fn stat_at(path: String) -> Result<Stat, TraceError> {
    let text = read_proc(&path).map_err(|source| TraceError::Proc { path, source })?;
    Ok(stat::parse(&text)?)
}

/// Whether a task is dead, reaped or not.
pub(crate) fn is_dead(stat: &Stat) -> bool {
    matches!(stat.state, stat::State::Zombie | stat::State::Dead)
}

/// Thread ids of a process, the leader first; empty when it is gone.
pub(crate) fn tids(pid: HostPid) -> Vec<HostPid> {
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mut tids: Vec<HostPid> =
        dir.flatten().filter_map(|e| Some(HostPid::new(e.file_name().to_str()?.parse().ok()?))).collect();
    tids.sort_unstable_by_key(|tid| (*tid != pid, *tid));
    tids
}

/// Children of the threads `tids` of a process, zombies too. A child belongs to the thread that forked it.
pub(crate) fn children(pid: HostPid, tids: impl IntoIterator<Item = HostPid>) -> Vec<HostPid> {
    let mut all = Vec::new();
    for tid in tids {
        if let Ok(bytes) = read_proc(&format!("/proc/{pid}/task/{tid}/children"))
            && let Ok(pids) = children::parse(&bytes)
        {
            all.extend(pids.into_iter().map(HostPid::new));
        }
    }
    all
}

/// Pages of a process that are in memory; `None` when it is gone.
pub(crate) fn resident_pages(pid: HostPid) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    text.split(' ').nth(1)?.parse().ok()
}

/// The processes of a tree that may run, as far as they can be seen now: parents before their children, siblings by pid.
pub(crate) fn walk(root: HostPid) -> Vec<HostPid> {
    let mut all = Vec::new();
    let mut seen = HashSet::new();
    let mut stack = vec![root];
    while let Some(pid) = stack.pop() {
        if !seen.insert(pid) {
            continue;
        }
        all.push(pid);
        let mut below = children(pid, tids(pid));
        below.sort_unstable_by(|a, b| b.cmp(a));
        stack.extend(below);
    }
    all
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_is_below_its_parent() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let (own, pid) = (HostPid::own(), HostPid::new(child.id().cast_signed()));
        let all = walk(own);
        let seen = (all[0], all.contains(&pid), stat(pid).unwrap().ppid, tids(pid));
        let _ = child.kill();
        assert!(child.wait().is_ok());
        assert_eq!(seen, (own, true, own, vec![pid]));
        assert!(stat(pid).is_err() && tids(pid).is_empty());
    }
}
