//! Control of speculation by the processor (PR_SET_SPECULATION_CTRL): store bypass, indirect branches, flushes of the L1 data cache.
//!
//! Saved is the state of each as the kernel tells it. Where programs do not control it at the source, the state was the
//! machine's and says nothing; where the machine of the restore is not affected, there is nothing to be kept.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

const PR_SET_SPECULATION_CTRL: i32 = 53;
/// Programs may change it.
const PRCTL: u32 = 1;
/// PR_SPEC_ENABLE, DISABLE, FORCE_DISABLE (for good), DISABLE_NOEXEC (until execve).
const STATES: u32 = 0x1e;
const NAMES: [&str; 3] = ["store bypass", "indirect branches", "L1 data cache flushes"];

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    // 0 is "not affected", as for what the kernel does not know.
    parts.core.speculation = view.cx.inside.speculation.iter().map(|state| state.unwrap_or(0)).collect();
    Ok(())
}

/// Before seccomp, which may force it off for whoever has filters, as it had done before.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let states = &plan.thread()?.speculation;
    if states.len() > NAMES.len() {
        return Err(TaskError::image(format!("{} states of speculation control", states.len())));
    }
    for (which, ((want, have), name)) in
        (0u64..).zip(states.iter().zip(plan.supervisor.own.speculation).zip(NAMES))
    {
        let (state, have) = (want & STATES, have.unwrap_or(0));
        if want & !(PRCTL | STATES) != 0 || state.count_ones() > 1 {
            return Err(TaskError::image(format!("speculation control of {name} {want:#x}")));
        }
        if want & PRCTL == 0 || state == have & STATES || have == 0 {
            continue;
        }
        if have & PRCTL == 0 {
            return Err(TaskError::Unsupported {
                what: format!(
                    "speculation control of {name} (PR_SET_SPECULATION_CTRL) of thread {}",
                    plan.tid
                ),
                reason: "this machine does not let programs change it".into(),
            });
        }
        let args = [PR_SET_SPECULATION_CTRL.into(), which.into(), state.into()];
        list.call(format!("PR_SET_SPECULATION_CTRL of {name}"), libc::SYS_prctl, &args, Want::Zero);
    }
    Ok(())
}
