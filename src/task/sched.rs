//! Scheduling: policy, real-time priority, nice value.

use std::sync::OnceLock;

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    sys::sched,
    tracee::{List, Want},
};

const RESET_ON_FORK: u32 = 0x4000_0000;
/// SCHED_FLAG_RESET_ON_FORK.
const FLAG_RESET_ON_FORK: u64 = 1;

/// What crtool itself has, and a restored task would have by default.
struct Own {
    attr: sched::SchedAttr,
    affinity: Vec<u8>,
}

fn own() -> Result<&'static Own> {
    static OWN: OnceLock<Own> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let attr = sched::attr(0).map_err(|e| TaskError::request("sched_getattr", 0, e))?;
    let affinity = affinity(0)?;
    Ok(OWN.get_or_init(|| Own { attr, affinity }))
}

fn affinity(tid: i32) -> Result<Vec<u8>> {
    sched::affinity(tid).map_err(|e| TaskError::request("sched_getaffinity", tid, e))
}

pub(super) fn dump(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let (pid, tid) = (view.cx.pid, view.cx.tid);
    let attr = sched::attr(tid).map_err(|e| TaskError::request("sched_getattr", tid, e))?;
    let mut refuse = |what: String| {
        findings.push(Finding {
            pid,
            what: format!("thread {tid}: {what}"),
            reason: "the image format has no place for it".into(),
            hint: "change it with chrt or uclampset before the dump".into(),
        });
    };
    match i32::try_from(attr.policy).unwrap_or(-1) {
        libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE | libc::SCHED_FIFO | libc::SCHED_RR => {}
        6 => refuse("scheduling policy SCHED_DEADLINE".into()),
        other => refuse(format!("scheduling policy {other}")),
    }
    let own = own()?;
    // A task with a real-time policy has another lower clamp by default.
    let rt = attr.priority > 0;
    if (!rt && attr.util_min != own.attr.util_min) || attr.util_max != own.attr.util_max {
        refuse(format!("utilisation clamps {}..{}", attr.util_min, attr.util_max));
    }
    if affinity(tid)? != own.affinity {
        // No refusal: it is a matter of speed, and the format has no place for it.
        tracing::warn!("thread {tid} of process {pid} is bound to processors; this is not saved");
    }
    let reset = if attr.flags & FLAG_RESET_ON_FORK == 0 { 0 } else { RESET_ON_FORK };
    parts.core.sched_nice = i32::try_from(view.stat.nice).ok();
    parts.core.sched_policy = Some(attr.policy | reset);
    parts.core.sched_prio = (attr.priority > 0).then_some(attr.priority);
    Ok(())
}

/// Before the credentials: most of it needs CAP_SYS_NICE.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let thread = plan.thread()?;
    let nice = thread.sched_nice();
    if !(-20..=19).contains(&nice) {
        return Err(TaskError::image(format!("nice value {nice}")));
    }
    let args = [libc::PRIO_PROCESS.into(), 0u64.into(), nice.into()];
    list.call(format!("setpriority to nice value {nice}"), libc::SYS_setpriority, &args, Want::Zero);
    let (policy, priority) = (thread.sched_policy(), thread.sched_prio());
    let param = list.value(&priority);
    let name = format!("sched_setscheduler to policy {policy:#x}, priority {priority}");
    let args = [0u64.into(), policy.into(), param.into()];
    list.call(name, libc::SYS_sched_setscheduler, &args, Want::Zero);
    Ok(())
}
