//! sched_getattr(2), affinity, memory policies.

use libc::pid_t;

use super::{Errno, Result, pod, ret};

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

/// Whether a thread of ours may be bound to the processors of `mask`, some of which may not be there: tried in a thread that
/// ends at once.
pub fn can_have_affinity(mask: &[u8]) -> bool {
    let set = || {
        // SAFETY: the buffer is live and of the stated size.
        let result = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, mask.len(), mask.as_ptr()) };
        ret(result).is_ok()
    };
    std::thread::scope(|scope| scope.spawn(set).join().unwrap_or(false))
}

/// Bytes of the largest set of memory nodes that a kernel can be built for (NODES_SHIFT 10).
pub const NODES_LEN: usize = 128;

/// get_mempolicy(2) for the calling thread: its mode with flags, and its nodes. ENOSYS where there are no nodes.
pub fn memory_policy() -> Result<(u32, [u8; NODES_LEN])> {
    let (mut mode, mut nodes) = (0u32, [0u8; NODES_LEN]);
    let bits = NODES_LEN * 8;
    // SAFETY: both are live, and `nodes` has room for `bits`.
    ret(unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), bits, 0u64, 0u64)
    })?;
    Ok((mode, nodes))
}

/// Whether a thread of ours may have this memory policy: tried in a thread that ends at once.
pub fn can_have_memory_policy(mode: u32, nodes: &[u8; NODES_LEN]) -> Result<()> {
    let set = || {
        // The kernel counts one bit less than it is told.
        let bits = NODES_LEN * 8 + 1;
        // SAFETY: `nodes` is live and has that many bits but for the one that does not count.
        ret(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes.as_ptr(), bits) }).map(drop)
    };
    std::thread::scope(|scope| scope.spawn(set).join().unwrap_or(Err(Errno::EAGAIN)))
}
