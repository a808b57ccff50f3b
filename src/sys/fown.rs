//! fcntl(2) about who gets the signals of a file.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Result, pid::HostPid, ret, ret_int};

/// A thread.
pub const F_OWNER_TID: i32 = 0;
/// A process.
pub const F_OWNER_PID: i32 = 1;
/// A process group.
pub const F_OWNER_PGRP: i32 = 2;

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

/// `struct f_owner_ex`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Owner {
    /// `F_OWNER_*`.
    pub kind: i32,
    /// 0 for nobody.
    pub pid: HostPid,
}

/// F_GETOWN_EX.
pub fn owner(fd: BorrowedFd<'_>) -> Result<Owner> {
    let mut owner = Owner { kind: 0, pid: HostPid::NONE };
    // SAFETY: `owner` is a live `struct f_owner_ex`.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner)
}

/// F_GETSIG; 0 stands for SIGIO without details.
pub fn signal(fd: BorrowedFd<'_>) -> Result<i32> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) })
}

/// F_SETSIG.
pub fn set_signal(fd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETSIG, signal) }).map(drop)
}

/// F_GETOWNER_UIDS: real and effective user of whoever set the owner.
pub fn owner_uids(fd: BorrowedFd<'_>) -> Result<(u32, u32)> {
    let mut uids = [0u32; 2];
    // SAFETY: `uids` is two live `uid_t`.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) })?;
    Ok((uids[0], uids[1]))
}

/// F_SETOWN_EX with the real and effective user of the calling thread, for the time of the call, set to `uid` and `euid`.
pub fn set_owner_as(fd: BorrowedFd<'_>, owner: Owner, uid: u32, euid: u32) -> Result<()> {
    let set = || {
        // SAFETY: `owner` is a live `struct f_owner_ex`.
        ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) }).map(drop)
    };
    let (mut r, mut e, mut s) = (0u32, 0u32, 0u32);
    // SAFETY: three live words.
    ret(unsafe { libc::syscall(libc::SYS_getresuid, &raw mut r, &raw mut e, &raw mut s) })?;
    if (r, e) == (uid, euid) {
        return set();
    }
    // The raw call concerns this thread only; the saved user keeps the way back open.
    // SAFETY: no pointers.
    ret(unsafe { libc::syscall(libc::SYS_setresuid, uid, euid, e) })?;
    let done = set();
    // SAFETY: no pointers.
    ret(unsafe { libc::syscall(libc::SYS_setresuid, r, e, s) })?;
    done
}
