//! pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::pid_t;

use super::{Result, ret};

/// PIDFD_THREAD: the descriptor names a thread (Linux 6.9).
pub const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// pidfd_open(pid, flags).
pub fn open(pid: pid_t, flags: u32) -> Result<OwnedFd> {
    // SAFETY: no pointers; on success the number is a new descriptor nobody else owns.
    unsafe {
        let fd = ret(libc::syscall(libc::SYS_pidfd_open, pid, flags))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// pidfd_getfd: our own descriptor of the target's open file description `fd`, close-on-exec.
pub fn getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers; on success the number is a new descriptor nobody else owns.
    unsafe {
        let fd = ret(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// SO_PEERPIDFD: the process that connected to, or made, the other end of a UNIX socket. ESRCH or EINVAL when it
/// is gone already. Linux 6.5.
pub fn of_peer(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    const SO_PEERPIDFD: i32 = 77;
    let (mut fd, mut len) = (-1i32, size_of::<i32>() as libc::socklen_t);
    let at = (&raw mut fd).cast();
    // SAFETY: `fd` is a live int and `len` says so.
    super::ret_int(unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, at, &raw mut len)
    })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pidfd of a process, or with [`PIDFD_THREAD`] of a main thread, that has exited and was reaped.
pub fn of_dead_child(flags: u32) -> Result<OwnedFd> {
    // SAFETY: the child only exits, so it does not matter what other threads of ours were doing.
    let pid = unsafe {
        let pid = super::ret_int(libc::fork())?;
        if pid == 0 {
            libc::_exit(0);
        }
        pid
    };
    let fd = open(pid, flags);
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } == -1
        && super::Errno::last() == super::Errno::EINTR
    {}
    fd
}
