//! Files of /proc of tasks that are gone.
//!
//! A descriptor of such a file still works after a fashion (reading gives ESRCH), and its path tells a pid. To open it
//! again somebody must have that pid for a moment: a child of the supervisor that has exited and is not reaped yet.

use super::FileError;
use crate::sys::{Errno, clone};

/// Zombies with chosen pids, reaped when dropped.
#[derive(Debug, Default)]
pub(super) struct StandIns(Vec<i32>);

impl Drop for StandIns {
    fn drop(&mut self) {
        for pid in self.0.drain(..) {
            clone::reap(pid);
        }
    }
}

/// Makes a zombie for each of `pids`. The tree exists already, so no pid of its own is taken.
pub(super) fn stand_ins(pids: &[i32]) -> Result<StandIns, FileError> {
    let mut made = StandIns::default();
    for &pid in pids {
        match clone::zombie(pid) {
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
