//! What stands in the way of a dump.

use std::fmt;

use crate::sys::pid::HostPid;

/// One thing that cannot be saved: which task, which object, why, and what the user can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The task.
    pub pid: HostPid,
    /// The object, such as `fd 7 (socket:[4711])`.
    pub what: String,
    /// Why it cannot be saved.
    pub reason: String,
    /// What can be done about it; may be empty.
    pub hint: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {}: {}: {}", self.pid, self.what, self.reason)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}
