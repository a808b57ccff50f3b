//! Calls about tasks that std and nix lack.

use libc::pid_t;

use super::{Result, ret, ret_int};

/// get_robust_list(tid): head address and length.
pub fn get_robust_list(tid: pid_t) -> Result<(u64, u64)> {
    let mut head = 0u64;
    let mut len = 0u64;
    // SAFETY: both are live words.
    ret(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// ioprio_get(IOPRIO_WHO_PROCESS, tid); 0 is the calling thread.
pub fn ioprio(tid: pid_t) -> Result<u32> {
    // SAFETY: no pointers.
    let value = ret(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) })?;
    Ok(u32::try_from(value).unwrap_or(0))
}

/// The number of our session keyring.
pub fn session_keyring() -> Result<i32> {
    // SAFETY: KEYCTL_GET_KEYRING_ID of KEY_SPEC_SESSION_KEYRING takes no pointers.
    let id = ret(unsafe { libc::syscall(libc::SYS_keyctl, 0, -3, 0) })?;
    Ok(i32::try_from(id).unwrap_or(0))
}

/// kill(2).
pub fn kill(pid: pid_t, signal: i32) -> Result<()> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// tgkill(2).
pub fn tgkill(pid: pid_t, tid: pid_t, signal: i32) -> Result<()> {
    // SAFETY: no pointers.
    ret(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) }).map(drop)
}
