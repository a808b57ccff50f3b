//! Memory that is locked (mlock(2), mlockall(2)): whether a restore may lock as much.
//!
//! The lock of an area is in the flags of its entry (`vma.rs`), that of memory to come in `lock_future.rs`.

use nix::sys::resource::{Resource, getrlimit};

use super::MemError;
use crate::{
    sys::pid::{HostPid, NsPid},
    {image::pb, proc::status},
};

const CAP_IPC_LOCK: u32 = 14;

/// Refuses what the kernel would not lock for a task of ours: a call that locks an area also fails for pages that cannot be had,
/// which does no harm, so its result does not tell.
pub(super) fn check(mm: &pb::MmEntry, pid: NsPid) -> Result<(), MemError> {
    let locked = mm.vmas.iter().filter(|area| area.flags & libc::MAP_LOCKED.cast_unsigned() != 0);
    let bytes: u64 = locked.map(|area| area.end.saturating_sub(area.start)).fold(0, u64::saturating_add);
    if bytes == 0 && mm.lock_future.is_none() {
        return Ok(());
    }
    let proc = |source| MemError::Proc { pid: HostPid::own(), file: "status".into(), source };
    let own = std::fs::read("/proc/self/status").map_err(proc)?;
    let own = status::parse(&own).map_err(|source| MemError::Parse { pid: HostPid::own(), source })?;
    if own.cap_eff >> CAP_IPC_LOCK & 1 == 1 {
        return Ok(());
    }
    let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(|e| proc(e.into()))?;
    if bytes <= limit && limit != 0 {
        return Ok(());
    }
    Err(MemError::Unsupported {
        pid,
        what: format!("{bytes} bytes of locked memory (mlock)"),
        reason: format!("crtool runs without CAP_IPC_LOCK and with RLIMIT_MEMLOCK {limit}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_without_locks_needs_nothing() {
        check(&pb::MmEntry::default(), NsPid::new(1)).unwrap();
        let area = pb::VmaEntry {
            start: 0,
            end: 4096,
            flags: libc::MAP_LOCKED.cast_unsigned(),
            ..Default::default()
        };
        let all = check(&pb::MmEntry { vmas: vec![area], ..Default::default() }, NsPid::new(1));
        let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        assert!(all.is_ok() || limit < 4096);
    }
}
