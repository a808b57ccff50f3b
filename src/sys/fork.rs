//! fork(2) of a process with one thread.

use super::{Errno, Result, ret_int};

/// Which of the two this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The process that forked, and the pid of the new one.
    Parent(libc::pid_t),
    /// The new process.
    Child,
}

/// Becomes two processes. EDEADLK where there are other threads: locks that they hold would stay locked in
/// the child for ever.
pub fn fork() -> Result<Side> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(Errno::EDEADLK);
    }
    // SAFETY: this is the only thread, so nothing is half-done in the memory that the child gets.
    let pid = ret_int(unsafe { libc::fork() })?;
    Ok(if pid == 0 { Side::Child } else { Side::Parent(pid) })
}
