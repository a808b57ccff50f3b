//! The alternate signal stack.

use super::{Result, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

const SS_DISABLE: u32 = 2;
const SS_AUTODISARM: u32 = 1 << 31;

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    let (ss_sp, ss_flags, ss_size) = view.cx.inside.altstack;
    parts.core.sas = Some(pb::ThreadSasEntry { ss_sp, ss_size, ss_flags });
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(sas) = &plan.thread()?.sas else { return Ok(()) };
    // SS_ONSTACK only says where the stack pointer was; it is so again once the registers are set.
    let words = if sas.ss_flags & SS_DISABLE != 0 {
        [0, u64::from(SS_DISABLE), 0]
    } else {
        [sas.ss_sp, u64::from(sas.ss_flags & SS_AUTODISARM), sas.ss_size]
    };
    let stack = list.value(&words);
    list.call("sigaltstack", libc::SYS_sigaltstack, &[stack.into(), 0u64.into()], Want::Zero);
    Ok(())
}
