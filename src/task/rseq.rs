//! Restartable sequences: the area a thread registered. A critical section that it was in has been left
//! when it was stopped: `tracee/rseq.rs`.

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    image::pb,
    sys::{pid::HostPid, ptrace},
    tracee::{List, Want},
};

fn registration(tid: HostPid) -> Result<Option<ptrace::RseqConfiguration>> {
    crate::tracee::rseq::registration(tid)
        .map_err(|e| TaskError::request("PTRACE_GET_RSEQ_CONFIGURATION", tid, e))
}

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    parts.core.rseq_entry = registration(view.cx.tid)?.map(|conf| pb::RseqEntry {
        rseq_abi_pointer: conf.abi_pointer,
        rseq_abi_size: conf.abi_size,
        signature: conf.signature,
        rseq_cs_pointer: None,
    });
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(entry) = plan.thread()?.rseq_entry.as_ref().filter(|e| e.rseq_abi_pointer != 0) else {
        return Ok(());
    };
    let args =
        [entry.rseq_abi_pointer.into(), entry.rseq_abi_size.into(), 0u64.into(), entry.signature.into()];
    list.call("rseq", libc::SYS_rseq, &args, Want::Zero);
    Ok(())
}
