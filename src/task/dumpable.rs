//! `dumpable`: whether others may look into a process. Its value is in the mm image.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

pub(super) fn dump(_: &ThreadView<'_>, _: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    Ok(())
}

/// In every thread, after its credentials: changing them resets it for the whole process.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let value: u32 = match plan.dumpable {
        // 2 (only root may read the core file) cannot be set: not dumpable is the nearest that is safe.
        0 | 2 => 0,
        1 => 1,
        other => return Err(TaskError::image(format!("dumpable {other}"))),
    };
    let args = [libc::PR_SET_DUMPABLE.into(), value.into()];
    list.call("PR_SET_DUMPABLE", libc::SYS_prctl, &args, Want::Zero);
    Ok(())
}
