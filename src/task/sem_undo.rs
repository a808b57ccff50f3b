//! System V semaphores that the kernel adjusts when a task ends (SEM_UNDO): refused, because the semaphores are no part of the
//! images, and when the dumped task is killed they are adjusted, so that what it held is free for others.
//!
//! Whether a thread has a list of adjustments, kcmp tells: a thread of crtool has none. But every thread of a process with threads has
//! one (CLONE_SYSVSEM), mostly empty, so the thread itself is asked about each semaphore that was ever used, by operations
//! that are bound to fail. Measured (Linux 6.18): all operations of one semop(2) are made one after the other and taken back
//! when one of them fails, and an adjustment that would leave -32768..=32767 fails with ERANGE. Moving the adjustment to one end of
//! that range, the value up and down, fails so if the adjustment is not 0; else an operation behind it that cannot
//! be made fails with EAGAIN. Nobody else can see any of it.

use nix::{
    sched::{CloneFlags, unshare},
    unistd::gettid,
};

use super::{Result, TaskError, ThreadParts, ThreadView, error::read_proc};
use crate::{
    finding::Finding,
    proc::sysvipc,
    sys::{
        Errno,
        kcmp::{Kind, kcmp},
        pid::HostPid,
        sem,
    },
    tracee::{CallId, List, Results, Want},
};

/// Largest value of a semaphore, and largest adjustment (SEMVMX, SEMAEM).
const MAX: i32 = 32767;
/// With a larger value a probe would need too many operations (SEMOPM).
const MOST: u16 = 30_000;
/// Semaphores that are asked about in all.
const LIMIT: usize = 8192;

/// One semaphore: set, number, value.
type Semaphore = (i32, u16, u16);

/// Semaphores that a task may have adjustments of.
#[derive(Debug, Clone, Default)]
pub struct Semaphores {
    all: Vec<Semaphore>,
    /// Sets that cannot be asked about.
    beyond: Vec<i32>,
}

impl Semaphores {
    /// Those of crtool's IPC namespace that have been used.
    pub fn used() -> Result<Self> {
        let path = "/proc/sysvipc/sem";
        if !std::fs::exists(path).unwrap_or(false) {
            // CONFIG_SYSVIPC is off.
            return Ok(Self::default());
        }
        let bytes = read_proc(HostPid::own(), path.into())?;
        let sets =
            sysvipc::semaphores(&bytes).map_err(|source| TaskError::Parse { path: path.into(), source })?;
        let mut found = Self::default();
        for set in sets.iter().filter(|set| set.otime != 0) {
            match sem::values(set.id, usize::try_from(set.count).unwrap_or(0)) {
                Ok(values)
                    if found.all.len() + values.len() <= LIMIT && values.iter().all(|v| *v <= MOST) =>
                {
                    found.all.extend((0..).zip(values).map(|(number, value)| (set.id, number, value)));
                }
                // Removed meanwhile.
                Err(Errno::EINVAL | Errno::EIDRM) => {}
                _ => found.beyond.push(set.id),
            }
        }
        Ok(found)
    }

    /// Bytes of a list's data and entries that the questions take.
    pub fn room(&self) -> usize {
        self.all.len() * 2 * 512
    }
}

/// Whether a thread has a list of adjustments that is not that of `known`.
pub fn has_list(tid: HostPid, known: &[HostPid]) -> Result<bool> {
    // This thread has made no adjustments, but whoever makes threads gets a list; now it has none.
    unshare(CloneFlags::CLONE_SYSVSEM)
        .map_err(|e| TaskError::request("unshare(CLONE_SYSVSEM)", HostPid::own(), e))?;
    let own = HostPid::new(gettid().as_raw());
    for other in known.iter().copied().chain([own]) {
        match kcmp(other, tid, Kind::Sysvsem, 0, 0) {
            Ok(order) if order.is_eq() => return Ok(false),
            // CONFIG_SYSVIPC is off.
            Err(Errno::EOPNOTSUPP) => return Ok(false),
            Ok(_) => {}
            Err(e) => return Err(TaskError::request("kcmp(KCMP_SYSVSEM)", tid, e)),
        }
    }
    Ok(true)
}

/// Where the answers will be.
#[derive(Debug, Clone, Default)]
pub struct Questions {
    calls: Vec<(i32, u16, CallId)>,
    beyond: Vec<i32>,
}

/// `struct sembuf`s that move the adjustment of a semaphore by `by` and its value nowhere, and then fail.
fn operations((_, number, value): Semaphore, by: i32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut push = |operation: i32, flags: i32| {
        for half in [i32::from(number), operation, flags] {
            bytes.extend_from_slice(&half.to_ne_bytes()[..2]);
        }
    };
    // Half of the room that is left to the value, should others raise it meanwhile.
    let step = (MAX - i32::from(value)) / 2;
    let mut left = by.abs();
    while left > 0 {
        let now = step.min(left);
        // The adjustment is counted down by what an operation with SEM_UNDO adds.
        let (up, down) = if by > 0 { (0, libc::SEM_UNDO) } else { (libc::SEM_UNDO, 0) };
        push(now, up);
        push(-now, down);
        left -= now;
    }
    push(-MAX - 1, libc::IPC_NOWAIT);
    bytes
}

/// Asks a thread about all of them.
pub fn ask(list: &mut List, semaphores: &Semaphores) -> Questions {
    let mut calls = Vec::with_capacity(2 * semaphores.all.len());
    for semaphore in &semaphores.all {
        let (id, number, _) = *semaphore;
        for by in [MAX, -MAX - 1] {
            let bytes = operations(*semaphore, by);
            let count = bytes.len() / 6;
            let data = list.bytes(&bytes);
            let args = [id.into(), data.into(), count.into()];
            calls.push((id, number, list.call("semop that fails", libc::SYS_semop, &args, Want::Any)));
        }
    }
    Questions { calls, beyond: semaphores.beyond.clone() }
}

impl Questions {
    /// Sets of which the thread has an adjustment, or of which that cannot be told.
    pub(super) fn read(&self, results: &Results) -> Result<Vec<i32>> {
        let mut found = self.beyond.clone();
        for (id, _, call) in &self.calls {
            let result = results.value(*call).map_err(TaskError::Results)?;
            match Errno::from_raw(i32::try_from(-result).unwrap_or(0)) {
                // No adjustment; not one of its semaphores; one that is not there any more.
                Errno::EAGAIN | Errno::EACCES | Errno::EINVAL | Errno::EIDRM | Errno::EFBIG => {}
                _ if found.contains(id) => {}
                _ => found.push(*id),
            }
        }
        Ok(found)
    }
}

pub(super) fn dump(view: &ThreadView<'_>, _: &mut ThreadParts, findings: &mut Vec<Finding>) -> Result<()> {
    for id in &view.cx.inside.sem_undo {
        findings.push(Finding {
            pid: view.cx.pid,
            what: format!("thread {}: operations on System V semaphore set {id} with SEM_UNDO", view.cx.tid),
            reason: "they are undone when the task is killed, and semaphores are not saved".into(),
            hint: "let the program release its semaphores before the dump".into(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_operations_that_end_where_they_began() {
        for value in [0, 1, 16_000, MOST] {
            for by in [MAX, -MAX - 1] {
                let bytes = operations((0, 3, value), by);
                let all: Vec<[i16; 3]> = bytes
                    .chunks(6)
                    .map(|op| [0, 2, 4].map(|at| i16::from_ne_bytes([op[at], op[at + 1]])))
                    .collect();
                assert!(all.len() < 64 && all.iter().all(|op| op[0] == 3), "{value} {by}: {}", all.len());
                let (mut now, mut adjusted) = (i32::from(value), 0);
                for op in &all[..all.len() - 1] {
                    now += i32::from(op[1]);
                    assert!((0..=MAX).contains(&now));
                    if i32::from(op[2]) == libc::SEM_UNDO {
                        adjusted -= i32::from(op[1]);
                    }
                }
                assert_eq!((now, adjusted), (i32::from(value), by));
                assert_eq!(all[all.len() - 1][1], i16::MIN);
            }
        }
    }
}
