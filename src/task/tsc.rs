//! Whether a thread may read the time stamp counter (PR_SET_TSC), and ask the processor what it is (ARCH_SET_CPUID).
//! Where it may not, it gets SIGSEGV: that is how recorders and virtual machines keep such answers to themselves.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    tracee::{List, Want},
};

const PR_SET_TSC: i32 = 26;
const PR_TSC_ENABLE: u32 = 1;
const PR_TSC_SIGSEGV: u32 = 2;
const ARCH_SET_CPUID: u64 = 0x1012;

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    let inside = &view.cx.inside;
    parts.core.tsc = inside.tsc.filter(|mode| *mode != PR_TSC_ENABLE);
    parts.core.cpuid_faults = (inside.cpuid == Some(0)).then_some(true);
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let thread = plan.thread()?;
    match thread.tsc {
        None | Some(PR_TSC_ENABLE) => {}
        Some(PR_TSC_SIGSEGV) => {
            let args = [PR_SET_TSC.into(), PR_TSC_SIGSEGV.into()];
            list.call("PR_SET_TSC", libc::SYS_prctl, &args, Want::Zero);
        }
        Some(other) => return Err(TaskError::image(format!("PR_SET_TSC {other}"))),
    }
    if thread.cpuid_faults() {
        if !plan.supervisor.own.cpuid_can_fault {
            return Err(TaskError::Unsupported {
                what: format!("the forbidden cpuid instruction of thread {} (ARCH_SET_CPUID)", plan.tid),
                reason: "this processor cannot forbid it".into(),
            });
        }
        list.call("ARCH_SET_CPUID", libc::SYS_arch_prctl, &[ARCH_SET_CPUID.into(), 0u64.into()], Want::Zero);
    }
    Ok(())
}
