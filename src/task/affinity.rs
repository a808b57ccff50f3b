//! The processors that a thread may run on (sched_setaffinity(2)).
//!
//! Saved if the thread is bound: if crtool, or the machine, has processors that the thread may not use. On a machine that lacks
//! some of them it is bound to the rest; on one that has none of them it is not bound, and a warning says so.

use std::sync::{LazyLock, OnceLock};

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    sys::{pid::HostPid, sched},
    tracee::{List, Want},
};

/// Most bytes of a mask: 65,536 processors.
const MAX: usize = 8192;

/// Those of crtool, which a task that it makes has.
fn own() -> Result<&'static [u8]> {
    static OWN: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let own = of(HostPid::NONE)?;
    Ok(OWN.get_or_init(|| own))
}

fn of(tid: HostPid) -> Result<Vec<u8>> {
    sched::affinity(tid.get()).map_err(|e| TaskError::request("sched_getaffinity", tid, e))
}

/// The processors of this machine that are running.
static ONLINE: LazyLock<Option<Vec<u8>>> = LazyLock::new(|| {
    let text = std::fs::read("/sys/devices/system/cpu/online").ok()?;
    crate::proc::number::bits_of_list("online", &text).ok()
});

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    let mask = of(view.cx.tid)?;
    let all = ONLINE.as_ref().is_some_and(|online| missing(online, &mask).is_empty());
    if mask != own()? && !all {
        parts.core.cpus_allowed = Some(mask);
    }
    Ok(())
}

/// Processors in `of` that are not in `mask`.
fn missing(of: &[u8], mask: &[u8]) -> Vec<usize> {
    let has = |mask: &[u8], cpu: usize| mask.get(cpu / 8).is_some_and(|byte| byte >> (cpu % 8) & 1 == 1);
    (0..of.len() * 8).filter(|cpu| has(of, *cpu) && !has(mask, *cpu)).collect()
}

/// Behind a scheduling policy that wants all processors, and before the credentials.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(mask) = &plan.thread()?.cpus_allowed else { return Ok(()) };
    if mask.len() > MAX {
        return Err(TaskError::image(format!("an affinity mask of {} bytes", mask.len())));
    }
    let lacks = ONLINE.as_ref().map(|online| missing(mask, online)).unwrap_or_default();
    let lacks: Vec<String> = lacks.iter().map(ToString::to_string).collect();
    match sched::can_have_affinity(mask) {
        true if lacks.is_empty() => {}
        true => tracing::warn!(
            "thread {} was bound to processors that are not here ({}), besides others: it is bound to these alone",
            plan.tid,
            lacks.join(", ")
        ),
        false => {
            tracing::warn!(
                "thread {} was bound to processors that are not here or may not be used: it is not bound any more",
                plan.tid
            );
            return Ok(());
        }
    }
    let data = list.bytes(mask);
    list.call(
        "sched_setaffinity",
        libc::SYS_sched_setaffinity,
        &[0u64.into(), mask.len().into(), data.into()],
        Want::Zero,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::missing;

    #[test]
    fn processors_that_are_missing() {
        assert_eq!(missing(&[0b1011, 1], &[0b0001]), [1, 3, 8]);
        assert!(missing(&[1], &[0xff, 0xff]).is_empty() && missing(&[], &[]).is_empty());
    }
}
