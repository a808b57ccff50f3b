//! sched_getattr(2) and affinity.

use libc::pid_t;

use super::{Result, pod, ret};

/// `struct sched_attr` as Linux 5.3 has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedAttr {
    /// Bytes the kernel filled.
    pub size: u32,
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*; 1 is reset-on-fork.
    pub flags: u64,
    /// For normal policies.
    pub nice: i32,
    /// For real-time policies.
    pub priority: u32,
    /// For SCHED_DEADLINE; the slice for normal policies (Linux 6.12).
    pub runtime: u64,
    /// For SCHED_DEADLINE.
    pub deadline: u64,
    /// For SCHED_DEADLINE.
    pub period: u64,
    /// Lower utilisation clamp.
    pub util_min: u32,
    /// Upper utilisation clamp.
    pub util_max: u32,
}
const _: () = assert!(size_of::<SchedAttr>() == 56);
// SAFETY: integers only, no padding.
unsafe impl pod::Pod for SchedAttr {}

/// sched_getattr(tid); 0 is the calling thread.
pub fn attr(tid: pid_t) -> Result<SchedAttr> {
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: `attr` is live and `size` bytes long.
    ret(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attr, size, 0) })?;
    Ok(attr)
}

/// sched_getaffinity(tid), as many bytes as the kernel has for it.
pub fn affinity(tid: pid_t) -> Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the buffer is live and of the stated size.
    let len = ret(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) })?;
    mask.truncate(usize::try_from(len).unwrap_or(0));
    Ok(mask)
}
