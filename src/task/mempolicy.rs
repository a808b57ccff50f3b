//! The memory policy of a thread (set_mempolicy(2)): see `mem/policy.rs`.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    mem::policy::{self, Tried},
    tracee::List,
};

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    parts.core.mempolicy = view.cx.inside.mempolicy.clone();
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(entry) = &plan.thread()?.mempolicy else { return Ok(()) };
    policy::plan_thread(list, entry, &format!("thread {}", plan.tid), &mut Tried::default())
        .map_err(TaskError::image)
}
