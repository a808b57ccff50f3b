//! Timer slack (PR_SET_TIMERSLACK): how late a thread's timers may be, so that several can come together.
//!
//! Not saved: the default that PR_SET_TIMERSLACK with 0 goes back to. It is what the thread that made this one had at that time,
//! and the kernel tells it only by going back.

use super::{Result, ThreadParts, ThreadPlan, ThreadView, sched};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    parts.core.timer_slack_ns = view.cx.inside.timer_slack_ns;
    Ok(())
}

/// Behind the scheduling policy: a real-time policy makes it 0, and nothing else does.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let thread = plan.thread()?;
    let Some(want) = thread.timer_slack_ns.filter(|ns| *ns != 0) else { return Ok(()) };
    if want != plan.supervisor.own.timer_slack_ns && !sched::is_real_time(thread) {
        let args = [libc::PR_SET_TIMERSLACK.into(), want.into()];
        list.call(format!("PR_SET_TIMERSLACK to {want} ns"), libc::SYS_prctl, &args, Want::Zero);
    }
    Ok(())
}
