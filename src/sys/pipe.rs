//! Pipes beyond read and write: capacity, amount, copying without consuming.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{Result, ret, ret_int};

/// pipe2(flags): read end, write end.
pub fn pipe2(flags: i32) -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two numbers into `ends`.
    ret_int(unsafe { libc::pipe2(ends.as_mut_ptr(), flags) })?;
    // SAFETY: two new descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// F_GETPIPE_SZ: capacity in bytes.
pub fn capacity(fd: BorrowedFd<'_>) -> Result<u32> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETPIPE_SZ) }).map(i32::cast_unsigned)
}

/// F_SETPIPE_SZ. EPERM above pipe-max-size (or the user's share) without CAP_SYS_RESOURCE.
pub fn set_capacity(fd: BorrowedFd<'_>, bytes: u32) -> Result<u32> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) }).map(i32::cast_unsigned)
}

/// FIONREAD: bytes that can be read (pipes, ttys, inotify).
pub fn readable_bytes(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut bytes: i32 = 0;
    // SAFETY: the kernel writes one int.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) })?;
    Ok(bytes.cast_unsigned())
}

/// tee(2), not blocking: lets `to` share what is in `from`, from its front.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK;
    // SAFETY: no pointers.
    let n = ret(unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), len, flags) as libc::c_long })?;
    Ok(n.unsigned_abs() as usize)
}
