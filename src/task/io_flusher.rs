//! PR_SET_IO_FLUSHER: a thread that serves the block layer from user space, for which the kernel does no I/O to find memory.
//!
//! It is read from the flags in /proc/PID/stat, since the prctl that asks needs CAP_SYS_RESOURCE.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

const PR_SET_IO_FLUSHER: i32 = 57;
/// PF_MEMALLOC_NOIO. Linux 5.6: user space sets it by this prctl alone, and a stopped thread is in no piece of the kernel that does.
const PF_MEMALLOC_NOIO: u32 = 0x0008_0000;

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    parts.core.io_flusher = (view.stat.flags & PF_MEMALLOC_NOIO != 0).then_some(true);
    Ok(())
}

/// Before the credentials.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    if !plan.thread()?.io_flusher() {
        return Ok(());
    }
    if !plan.supervisor.can_raise_limits {
        return Err(TaskError::Unsupported {
            what: format!("thread {} as an I/O flusher (PR_SET_IO_FLUSHER)", plan.tid),
            reason: "crtool runs without CAP_SYS_RESOURCE".into(),
        });
    }
    let args = [PR_SET_IO_FLUSHER.into(), 1u64.into()];
    list.call("PR_SET_IO_FLUSHER", libc::SYS_prctl, &args, Want::Zero);
    Ok(())
}
