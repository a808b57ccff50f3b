//! The address that the kernel clears and wakes when a thread ends (set_tid_address).

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    parts.info.clear_tid_addr = view.cx.inside.tid_address;
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let info = plan.core.thread_info.as_deref().ok_or_else(|| TaskError::image("registers are missing"))?;
    list.call("set_tid_address", libc::SYS_set_tid_address, &[info.clear_tid_addr.into()], Want::Ok);
    Ok(())
}
