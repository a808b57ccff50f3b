//! waitpid(2), its status word decoded once.

use super::{Errno, Result, pid::HostPid, ret_int};

/// Waits for any child or tracee.
pub const ANY: HostPid = HostPid::new(-1);

/// What a wait reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Ended by exit; the code.
    Exited(i32),
    /// Killed by a signal; whether it dumped core.
    Signaled(i32, bool),
    /// Stopped: the signal (with 0x80 at a system call), and the ptrace event or 0.
    Stopped(i32, i32),
    /// Continued by SIGCONT.
    Continued,
}

impl Status {
    /// Decodes a raw status word.
    pub fn from_raw(raw: i32) -> Self {
        if libc::WIFEXITED(raw) {
            Self::Exited(libc::WEXITSTATUS(raw))
        } else if libc::WIFSIGNALED(raw) {
            Self::Signaled(libc::WTERMSIG(raw), libc::WCOREDUMP(raw))
        } else if libc::WIFSTOPPED(raw) {
            Self::Stopped((raw >> 8) & 0xff, (raw >> 16) & 0xffff)
        } else {
            Self::Continued
        }
    }
}

/// waitpid with `__WALL`; `None` when `flags` has WNOHANG and nothing is there.
pub fn wait_raw(tid: HostPid, flags: i32) -> Result<Option<(HostPid, i32)>> {
    let mut status = 0;
    // SAFETY: `status` is a live int.
    let pid = ret_int(unsafe { libc::waitpid(tid.get(), &raw mut status, flags | libc::__WALL) })?;
    Ok((pid != 0).then_some((HostPid::new(pid), status)))
}

/// Takes the report of the end of `tid`, if it has ended; reports of stops stay. ECHILD when there is no such child or
/// tracee.
pub fn take_end(tid: HostPid) -> Result<bool> {
    // Whatever the flags, the kernel also shows that a tracee has stopped: look first, and leave it there.
    let ended = matches!(look(tid, libc::WNOWAIT)?, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED);
    if ended {
        look(tid, 0)?;
    }
    Ok(ended)
}

/// Takes the state that the process of a tracee goes on after a stop (WCONTINUED), if nobody has taken it. There is one for all
/// who wait for it, its parent too.
pub fn take_continued(tid: HostPid) -> Result<bool> {
    let taken = wait_raw(tid, libc::WNOHANG | libc::WCONTINUED)?;
    Ok(taken.is_some_and(|(_, raw)| libc::WIFCONTINUED(raw)))
}

/// Whether `tid` has something to report that nobody has taken. It stays.
pub fn has_report(tid: HostPid) -> Result<bool> {
    Ok(look(tid, libc::WNOWAIT)? != 0)
}

/// `si_code` of a report, 0 for none.
fn look(tid: HostPid, more: i32) -> Result<i32> {
    // SAFETY: integers only.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::__WALL | more;
    // SAFETY: `info` is live.
    ret_int(unsafe { libc::waitid(libc::P_PID, tid.bits(), &raw mut info, flags) })?;
    Ok(if info.si_signo == 0 { 0 } else { info.si_code })
}

/// Waits for `tid`, decoded, going on after EINTR.
pub fn wait(tid: HostPid) -> Result<Status> {
    loop {
        match wait_raw(tid, 0) {
            Ok(Some((_, raw))) => return Ok(Status::from_raw(raw)),
            Ok(None) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Takes a report of `tid` ([`ANY`]: of anybody) if there is one.
pub fn poll(tid: HostPid) -> Result<Option<(HostPid, Status)>> {
    Ok(wait_raw(tid, libc::WNOHANG)?.map(|(pid, raw)| (pid, Status::from_raw(raw))))
}
