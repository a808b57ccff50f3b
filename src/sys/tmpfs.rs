//! A tmpfs that is mounted nowhere: only its descriptor leads to it.

use std::{
    ffi::CStr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use super::{Errno, Result, ret};

fn owned(fd: libc::c_long) -> Result<OwnedFd> {
    let fd = i32::try_from(ret(fd)?).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// fsopen("tmpfs"): a file system about to be made. Needs CAP_SYS_ADMIN.
pub fn begin() -> Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    // SAFETY: the name is a terminated string.
    owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })
}

/// fsconfig: sets an option.
pub fn set(fs: BorrowedFd<'_>, key: &CStr, value: &CStr) -> Result<()> {
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    let (fs, key, value) = (fs.as_raw_fd(), key.as_ptr(), value.as_ptr());
    // SAFETY: both are terminated strings.
    ret(unsafe { libc::syscall(libc::SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, value, 0) })?;
    Ok(())
}

/// fsconfig and fsmount: makes it; the descriptor of its root directory.
pub fn mount(fs: BorrowedFd<'_>) -> Result<OwnedFd> {
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    /// No set-user-id, devices and programs.
    const ATTRIBUTES: libc::c_uint = 2 | 4 | 8;
    let (fs, none) = (fs.as_raw_fd(), ptr::null::<libc::c_char>());
    // SAFETY: this command takes no pointers.
    ret(unsafe { libc::syscall(libc::SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, none, none, 0) })?;
    // SAFETY: no pointers.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, fs, FSMOUNT_CLOEXEC, ATTRIBUTES) })
}
