//! Calls about tasks that std and nix lack.

use super::{Result, pid::HostPid, ret, ret_int};

/// get_robust_list(tid): head address and length.
pub fn get_robust_list(tid: HostPid) -> Result<(u64, u64)> {
    let mut head = 0u64;
    let mut len = 0u64;
    // SAFETY: both are live words.
    ret(unsafe { libc::syscall(libc::SYS_get_robust_list, tid.get(), &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// ioprio_get(IOPRIO_WHO_PROCESS, tid); 0 is the calling thread.
pub fn ioprio(tid: HostPid) -> Result<u32> {
    // SAFETY: no pointers.
    let value = ret(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid.get()) })?;
    Ok(u32::try_from(value).unwrap_or(0))
}

/// The number of our session keyring.
pub fn session_keyring() -> Result<i32> {
    // SAFETY: KEYCTL_GET_KEYRING_ID of KEY_SPEC_SESSION_KEYRING takes no pointers.
    let id = ret(unsafe { libc::syscall(libc::SYS_keyctl, 0, -3, 0) })?;
    Ok(i32::try_from(id).unwrap_or(0))
}

/// kill(2).
pub fn kill(pid: HostPid, signal: i32) -> Result<()> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::kill(pid.get(), signal) }).map(drop)
}

/// tgkill(2).
pub fn tgkill(pid: HostPid, tid: HostPid, signal: i32) -> Result<()> {
    // SAFETY: no pointers.
    ret(unsafe { libc::syscall(libc::SYS_tgkill, pid.get(), tid.get(), signal) }).map(drop)
}
