//! From ids as crtool sees them to ids as the tree sees them, and back.
//!
//! A tree lives in the pid namespace of crtool: a dump refuses any other, and a restore makes none. So the numbers are
//! the same. What depends on that goes through these two functions, but for names below `/proc/PID` (`files/procfs.rs`).

use crate::sys::pid::{HostPid, NsPid};

/// At a dump: the id that the tree has for what crtool sees as `pid`.
pub(crate) fn in_tree(pid: HostPid) -> NsPid {
    NsPid::new(pid.get())
}

/// At a restore: the id by which crtool sees what the tree has as `pid`.
pub(crate) fn on_host(pid: NsPid) -> HostPid {
    HostPid::new(pid.get())
}
