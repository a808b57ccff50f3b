//! Pipes beyond read and write: capacity, amount, copying without consuming.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{Errno, Result, ret, ret_int};

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

/// Whether the kernel puts notifications into the pipe (O_NOTIFICATION_PIPE), from `linux/watch_queue.h`.
pub fn has_watch_queue(fd: BorrowedFd<'_>) -> bool {
    const IOC_WATCH_QUEUE_SET_SIZE: libc::Ioctl = 0x5760;
    // A queue for no notification is refused; before that the kernel says ENODEV where there is none, or ENOTTY where it
    // was built without.
    // SAFETY: no pointers.
    let answer = ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), IOC_WATCH_QUEUE_SET_SIZE, 0) });
    matches!(answer, Err(Errno::EINVAL | Errno::EBUSY))
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
