//! I/O priority (ioprio_set(2)): class, level and hint of a thread.
//!
//! Not saved: whether threads share one I/O context (CLONE_IO), so that a later change of one would be a change of all.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    sys::task,
    tracee::{List, Want},
};

const WHO_PROCESS: i32 = 1;

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    let tid = view.cx.tid;
    parts.core.ioprio = Some(task::ioprio(tid).map_err(|e| TaskError::request("ioprio_get", tid, e))?);
    Ok(())
}

/// Before the credentials: real-time classes need CAP_SYS_NICE or CAP_SYS_ADMIN.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(want) = plan.thread()?.ioprio else { return Ok(()) };
    if want > u32::from(u16::MAX) {
        return Err(TaskError::image(format!("I/O priority {want:#x}")));
    }
    if want != plan.supervisor.own.ioprio {
        let args = [WHO_PROCESS.into(), 0u64.into(), want.into()];
        list.call(format!("ioprio_set to {want:#x}"), libc::SYS_ioprio_set, &args, Want::Zero);
    }
    Ok(())
}
