//! The signal a task gets when its parent ends.
//!
//! The root of a tree restored with `-d` would get it as soon as crtool ends, and mostly die of it: the restore sees
//! to it that crtool is not its parent.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    let signal = view.cx.inside.pdeath_signal;
    parts.core.pdeath_sig = (signal != 0).then_some(signal);
    Ok(())
}

/// After the credentials: changing them resets it.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let signal = plan.thread()?.pdeath_sig.unwrap_or(0);
    if signal > 64 {
        return Err(TaskError::image(format!("parent-death signal {signal}")));
    }
    let args = [libc::PR_SET_PDEATHSIG.into(), signal.into()];
    list.call("PR_SET_PDEATHSIG", libc::SYS_prctl, &args, Want::Zero);
    Ok(())
}
