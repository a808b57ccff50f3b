//! futex(2) wake on a word shared with another process.

use super::{Result, ret};

/// Wakes everybody waiting on the shared word at `addr` (an address of ours).
pub fn wake_all(addr: usize) -> Result<()> {
    // SAFETY: FUTEX_WAKE does not touch memory; a bad address is EFAULT.
    ret(unsafe { libc::syscall(libc::SYS_futex, addr, libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) }).map(drop)
}
