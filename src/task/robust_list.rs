//! The list of robust futexes that a thread holds.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    sys,
    tracee::{List, Want},
};

/// `struct robust_list_head`, the only length there is.
const LEN: u32 = 24;

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    let tid = view.cx.tid;
    let (head, len) =
        sys::task::get_robust_list(tid).map_err(|e| TaskError::request("get_robust_list", tid, e))?;
    parts.core.futex_rla = head;
    parts.core.futex_rla_len = u32::try_from(len).unwrap_or(LEN);
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let thread = plan.thread()?;
    if thread.futex_rla != 0 && thread.futex_rla_len != LEN {
        return Err(TaskError::image(format!("a robust list of {} bytes", thread.futex_rla_len)));
    }
    // Also an empty one is set: a clone may have inherited another.
    let args = [thread.futex_rla.into(), LEN.into()];
    list.call("set_robust_list", libc::SYS_set_robust_list, &args, Want::Zero);
    Ok(())
}
