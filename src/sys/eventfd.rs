//! eventfd(2), with a counter of 64 bits.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{Result, ret, ret_int};

/// A close-on-exec eventfd that holds `count` (at most 2^64 - 2).
pub fn create(count: u64, semaphore: bool) -> Result<OwnedFd> {
    let semaphore = if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: no pointers; on success the number is a new descriptor nobody else owns.
    let fd = unsafe {
        let fd = ret_int(libc::eventfd(0, libc::EFD_CLOEXEC | semaphore))?;
        OwnedFd::from_raw_fd(fd)
    };
    if count > 0 {
        let bytes = count.to_ne_bytes();
        // SAFETY: `bytes` is 8 live bytes.
        ret(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } as libc::c_long)?;
    }
    Ok(fd)
}
