//! Files of /proc that belong to a task: which task, and what must be there before they can be opened again.
//!
//! Such a path is a name for a task, and another task may have that name after a restore. So it is saved only for tasks of the
//! tree, and opened only for those. Of a task that is gone a descriptor still works after a fashion (reading gives ESRCH): to
//! open it again somebody must have that pid for a while, a child of the supervisor that does nothing.

use super::FileError;
use crate::sys::{self, Errno, clone};

/// Children with chosen pids, ended and reaped when dropped.
#[derive(Debug, Default)]
pub(super) struct StandIns(Vec<i32>);

impl Drop for StandIns {
    fn drop(&mut self) {
        for pid in self.0.drain(..) {
            let _ = sys::task::kill(pid, libc::SIGKILL);
            clone::reap(pid);
        }
    }
}

/// Makes a child for each of `pids`. The tree exists already, so no pid of its own is taken. They must stay until every task
/// has gone to its current directory: one of a task that is gone cannot be entered.
pub(super) fn stand_ins(pids: &[i32]) -> Result<StandIns, FileError> {
    let mut made = StandIns::default();
    for &pid in pids {
        match clone::stand_in(pid) {
            Ok(()) => made.0.push(pid),
            Err(Errno::EEXIST) => {
                return Err(FileError::unsupported(
                    format!(
                        "a file of /proc/{pid} is open, of a task that was gone; now another task has that pid"
                    ),
                    "restore in a pid namespace where it is free, or reboot",
                ));
            }
            Err(e) => return Err(FileError::sys("make a task with the pid of one that is gone")(e)),
        }
    }
    Ok(made)
}
