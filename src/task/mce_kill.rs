//! When a thread is told of memory that has gone bad (PR_MCE_KILL): at once, when it is touched, or as the system does it.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

const PR_MCE_KILL: i32 = 33;
const PR_MCE_KILL_SET: u64 = 1;
/// 0 is late, 1 early.
const PR_MCE_KILL_DEFAULT: u32 = 2;

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    parts.core.mce_kill = view.cx.inside.mce_kill.filter(|policy| *policy != PR_MCE_KILL_DEFAULT);
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(policy) = plan.thread()?.mce_kill else { return Ok(()) };
    if policy > PR_MCE_KILL_DEFAULT {
        return Err(TaskError::image(format!("machine check policy {policy}")));
    }
    let args = [PR_MCE_KILL.into(), PR_MCE_KILL_SET.into(), policy.into()];
    list.call(format!("PR_MCE_KILL_SET to {policy}"), libc::SYS_prctl, &args, Want::Zero);
    Ok(())
}
