//! Scheduling: policy, real-time priority, nice value, deadlines, time slice, utilisation clamps.
//!
//! Policy, priority and nice value are in fields of CRIU's, the rest of sched_getattr(2) in one of ours. What a thread has used
//! up of a deadline budget is not saved: it begins a new period.

use std::sync::OnceLock;

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    image::pb,
    sys::pid::HostPid,
    sys::sched::{self, SchedAttr},
    tracee::{List, Want},
};

const RESET_ON_FORK: u32 = 0x4000_0000;
const FLAG_RESET_ON_FORK: u64 = 1;
/// SCHED_FLAG_RESET_ON_FORK, RECLAIM, DL_OVERRUN.
const FLAGS: u64 = 7;
const FLAG_UTIL_CLAMP_MIN: u64 = 0x20;
const FLAG_UTIL_CLAMP_MAX: u64 = 0x40;
const DEADLINE: u32 = 6;
/// A number that has no policy.
const SCHED_ISO: u32 = 4;
/// Length of `struct sched_attr` before it had utilisation clamps.
const LEN_WITHOUT_CLAMPS: u32 = 48;
const LEN: u32 = 56;
/// SCHED_CAPACITY_SCALE.
const CLAMP_MAX: u32 = 1024;

/// What crtool itself has, and a restored task would have by default.
fn own() -> Result<SchedAttr> {
    static OWN: OnceLock<SchedAttr> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(*own);
    }
    let attr = sched::attr(0).map_err(|e| TaskError::request("sched_getattr", HostPid::own(), e))?;
    Ok(*OWN.get_or_init(|| attr))
}

/// Whether a thread's policy is one for which the kernel keeps no timer slack.
pub(super) fn is_real_time(thread: &pb::ThreadCoreEntry) -> bool {
    let policy = thread.sched_policy() & !RESET_ON_FORK;
    [libc::SCHED_FIFO, libc::SCHED_RR].iter().any(|p| p.cast_unsigned() == policy) || policy == DEADLINE
}

/// The part of `attr` for which CRIU's message has no place; `own` is what a new task has.
fn more(attr: &SchedAttr, own: &SchedAttr, idle_nice: Option<i32>) -> Option<pb::SchedAttrEntry> {
    let deadline = attr.policy == DEADLINE;
    // Linux 6.12: also the time slice of other policies. That of crtool is the machine's.
    let runtime = deadline || attr.runtime != 0 && attr.runtime != own.runtime;
    // A task with a real-time policy has another lower clamp by default.
    let rt = attr.priority > 0;
    let (min, max) = (!rt && attr.util_min != own.util_min, attr.util_max != own.util_max);
    let entry = pb::SchedAttrEntry {
        flags: attr.flags & FLAGS,
        runtime_ns: runtime.then_some(attr.runtime),
        deadline_ns: deadline.then_some(attr.deadline),
        period_ns: deadline.then_some(attr.period),
        util_min: min.then_some(attr.util_min),
        util_max: max.then_some(attr.util_max),
        idle_nice,
    };
    let plain = pb::SchedAttrEntry { flags: attr.flags & FLAG_RESET_ON_FORK, ..Default::default() };
    (entry != plain).then_some(entry)
}

pub(super) fn dump(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let (pid, tid) = (view.cx.pid, view.cx.tid);
    let attr = sched::attr(tid.get()).map_err(|e| TaskError::request("sched_getattr", tid, e))?;
    if attr.policy > DEADLINE || attr.policy == SCHED_ISO {
        findings.push(Finding {
            pid,
            what: format!("thread {tid}: scheduling policy {}", attr.policy),
            reason: "crtool does not know it".into(),
            hint: "change it with chrt before the dump".into(),
        });
    }
    let reset = if attr.flags & FLAG_RESET_ON_FORK == 0 { 0 } else { RESET_ON_FORK };
    parts.core.sched_nice = i32::try_from(view.stat.nice).ok();
    parts.core.sched_policy = Some(attr.policy | reset);
    parts.core.sched_prio = (attr.priority > 0).then_some(attr.priority);
    // Linux 6.18: sched_setattr to SCHED_IDLE puts its nice value into the priority alone.
    let in_priority = i32::try_from(view.stat.priority).ok().map(|priority| priority - 20);
    let idle = attr.policy == libc::SCHED_IDLE.cast_unsigned() && in_priority != parts.core.sched_nice;
    parts.core.sched_attr = more(&attr, &own()?, in_priority.filter(|_| idle));
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
    let Some(more) = &thread.sched_attr else {
        let param = list.value(&priority);
        let name = format!("sched_setscheduler to policy {policy:#x}, priority {priority}");
        let args = [0u64.into(), policy.into(), param.into()];
        list.call(name, libc::SYS_sched_setscheduler, &args, Want::Zero);
        return Ok(());
    };
    let attr = attr_of(thread, more)?;
    let clamps = attr.flags & (FLAG_UTIL_CLAMP_MIN | FLAG_UTIL_CLAMP_MAX) != 0;
    if clamps && own()?.util_max == 0 {
        return Err(TaskError::Unsupported {
            what: format!("the utilisation clamps of thread {}", plan.tid),
            reason: "this kernel has none (CONFIG_UCLAMP_TASK)".into(),
        });
    }
    let name = format!("sched_setattr to policy {}, runtime {} ns", attr.policy, attr.runtime);
    let attr = list.value(&attr);
    list.call(name, libc::SYS_sched_setattr, &[0u64.into(), attr.into(), 0u64.into()], Want::Zero);
    Ok(())
}

/// All of it as sched_setattr takes it.
fn attr_of(thread: &pb::ThreadCoreEntry, more: &pb::SchedAttrEntry) -> Result<SchedAttr> {
    let clamp = [more.util_min, more.util_max].into_iter().flatten().any(|clamp| clamp > CLAMP_MAX);
    if more.flags & !FLAGS != 0 || clamp || more.idle_nice.is_some_and(|nice| !(-20..=19).contains(&nice)) {
        return Err(TaskError::image(format!(
            "scheduling flags {:#x}, or clamps beyond {CLAMP_MAX}",
            more.flags
        )));
    }
    let flag = |clamp: Option<u32>, flag| if clamp.is_some() { flag } else { 0 };
    let clamps = flag(more.util_min, FLAG_UTIL_CLAMP_MIN) | flag(more.util_max, FLAG_UTIL_CLAMP_MAX);
    Ok(SchedAttr {
        size: if clamps == 0 { LEN_WITHOUT_CLAMPS } else { LEN },
        policy: thread.sched_policy() & !RESET_ON_FORK,
        flags: more.flags | clamps,
        nice: more.idle_nice.unwrap_or(thread.sched_nice()),
        priority: thread.sched_prio(),
        runtime: more.runtime_ns(),
        deadline: more.deadline_ns(),
        period: more.period_ns(),
        util_min: more.util_min(),
        util_max: more.util_max(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: SchedAttr = SchedAttr {
        size: 56,
        policy: 0,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime: 2_800_000,
        deadline: 0,
        period: 0,
        util_min: 0,
        util_max: 1024,
    };

    #[test]
    fn only_what_is_no_default_is_told() {
        for usual in [
            OWN,
            SchedAttr { flags: 1, nice: 5, ..OWN },
            SchedAttr { policy: 1, priority: 7, runtime: 0, util_min: 1024, ..OWN },
        ] {
            assert_eq!(more(&usual, &OWN, None), None);
        }
        for odd in [
            SchedAttr { runtime: 10_000_000, ..OWN },
            SchedAttr { policy: DEADLINE, runtime: 1, deadline: 2, period: 3, flags: 6, ..OWN },
            SchedAttr { policy: DEADLINE, runtime: OWN.runtime, ..OWN },
            SchedAttr { util_min: 5, util_max: 700, flags: 1, ..OWN },
        ] {
            let entry = more(&odd, &OWN, None).unwrap();
            let thread = pb::ThreadCoreEntry {
                sched_policy: Some(odd.policy),
                sched_nice: Some(odd.nice),
                ..Default::default()
            };
            let set = attr_of(&thread, &entry).unwrap();
            let clamps = set.flags & !FLAGS;
            assert_eq!(set.flags & FLAGS, odd.flags);
            let own = |set: u32, own: u32| if set == 0 { own } else { set };
            let back = SchedAttr {
                size: 56,
                flags: odd.flags,
                util_min: own(set.util_min, OWN.util_min),
                util_max: own(set.util_max, OWN.util_max),
                runtime: if set.runtime == 0 { OWN.runtime } else { set.runtime },
                ..set
            };
            assert_eq!(back, odd, "{clamps:#x}");
        }
    }

    #[test]
    fn crafted_attributes_are_refused() {
        let thread = pb::ThreadCoreEntry::default();
        for bad in [
            pb::SchedAttrEntry { flags: 8, ..Default::default() },
            pb::SchedAttrEntry { util_max: Some(1025), ..Default::default() },
        ] {
            assert!(attr_of(&thread, &bad).is_err());
        }
    }
}
