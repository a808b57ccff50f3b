//! `dumpable`: whether others may look into a process. Its value is in the mm image.
//!
//! Changes of credentials reset it for the whole process, and from the moment it is set any process of the same user may
//! write the memory of the task. So the supervisor sets it, when nothing of its own is in the process but the call itself.

use super::{Result, TaskError};

/// What PR_SET_DUMPABLE is to be called with for the value of an image.
pub fn dumpable_to_set(value: i32) -> Result<u64> {
    match value {
        // 2 (only root may read the core file) cannot be set; where it is not there already, not dumpable is the nearest
        // that is safe.
        0 | 2 => Ok(0),
        1 => Ok(1),
        other => Err(TaskError::image(format!("dumpable {other}"))),
    }
}
