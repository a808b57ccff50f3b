//! Registers: general ones, the xsave area, the signal mask, the address cleared at exit.
//!
//! An interrupted system call is decided at the dump: registers in the image are what the thread
//! will go on with. Only ptrace can set them, so a restore does it from outside, at the very end.

use libc::user_regs_struct;

use super::{Result, TaskError, ThreadParts, ThreadView};
use crate::{
    arch::{self, Delivery, registers, xsave},
    finding::Finding,
    image::pb,
    sys::{pid::HostPid, process_vm},
};

/// What ptrace sets before a thread is let go.
#[derive(Debug, Clone)]
pub struct FinalState {
    /// General registers, to be sanitised by the kernel.
    pub regs: user_regs_struct,
    /// The xsave area in the layout of this processor.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub sigmask: u64,
}

impl FinalState {
    /// Lets a thread that stood before a system call of `core`'s image be in it again: if a signal has come
    /// meanwhile, the kernel ends the call as it would have done. The thread's memory must be there, and it must be
    /// in a stop after which the kernel looks for signals. Returns whether anything was changed.
    pub fn enter_call(&mut self, tid: HostPid, core: &pb::CoreEntry) -> bool {
        let Some(info) = core.thread_info.as_deref() else { return false };
        if registers::ended_for_nothing(&mut self.regs, info.gpregs.orig_ax) {
            return true;
        }
        let mut instruction = [0u8; 2];
        match process_vm::read(tid, &[(self.regs.rip, 2)], &mut instruction) {
            Ok(2) => registers::interrupted(&mut self.regs, info.gpregs.orig_ax, instruction),
            // Nothing can be read there: it stands where it will fault.
            _ => false,
        }
    }
}

/// A handler that will run as soon as the thread goes on decides what its interrupted call returns.
fn delivery(view: &ThreadView<'_>) -> Delivery {
    let status = &view.status;
    // A signal to the process goes to the leader if it can, else to anybody.
    let leader = view.cx.tid == view.cx.pid || status.threads == 1;
    let pending = status.sigpnd | if leader { status.shdpnd } else { 0 };
    let waiting = pending & !view.cx.sigmask & status.sigcgt;
    match waiting & waiting.wrapping_neg() {
        0 => Delivery::None,
        first if first & view.cx.restarting != 0 => Delivery::Restarting,
        _ => Delivery::Interrupting,
    }
}

pub(super) fn dump(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let cx = view.cx;
    let refuse = |what: String, reason: &str| Finding {
        pid: cx.pid,
        what: format!("thread {}: {what}", cx.tid),
        reason: reason.into(),
        hint: String::new(),
    };
    if cx.regs.cs != registers::USER_CS {
        findings.push(refuse("32-bit code".into(), "only 64-bit programs can be saved"));
    }
    if let Some(feature) = xsave::not_in_image(&cx.xstate) {
        let what = format!("processor feature {} ({}) in use", xsave::name(feature), feature);
        findings.push(refuse(what, "the image format has no place for its registers"));
    }
    let mut regs = cx.regs;
    let delivery = delivery(view);
    if delivery == Delivery::None && registers::waits_for_a_while(&regs) {
        // How long is found out when the clocks of the tree are read.
        parts.core.call_left_ns = Some(0);
    }
    arch::restart_for(&mut regs, delivery);
    parts.info.gpregs = registers::to_entry(&regs);
    parts.info.fpregs = xsave::to_entry(&cx.xstate);
    if cx.tid != cx.pid {
        parts.core.blk_sigset = Some(cx.sigmask);
    }
    Ok(())
}

/// What a thread is to be set to at the end of a restore.
pub fn final_state(core: &pb::CoreEntry) -> Result<FinalState> {
    super::check_march(core)?;
    let info = core.thread_info.as_deref().ok_or_else(|| TaskError::image("registers are missing"))?;
    let regs = registers::from_entry(&info.gpregs).ok_or_else(|| TaskError::Unsupported {
        what: "a 32-bit thread".into(),
        reason: "only 64-bit programs can be restored".into(),
    })?;
    let xstate = xsave::from_entry(&info.fpregs).map_err(|error| match error {
        xsave::XsaveError::Lacks(_) => {
            TaskError::Unsupported { what: "the processor state".into(), reason: error.to_string() }
        }
        xsave::XsaveError::Length { .. } => TaskError::image(error.to_string()),
    })?;
    if info.fpregs.xsave.as_ref().and_then(|x| x.cet).is_some_and(|cet| cet.cet != 0) {
        return Err(TaskError::Unsupported {
            what: "a shadow stack".into(),
            reason: "crtool cannot restore shadow stacks yet".into(),
        });
    }
    let of_thread = core.thread_core.as_deref().and_then(|t| t.blk_sigset);
    let of_process = core.tc.as_deref().map(|tc| tc.blk_sigset);
    let sigmask = of_process.or(of_thread).ok_or_else(|| TaskError::image("the signal mask is missing"))?;
    Ok(FinalState { regs, xstate, sigmask })
}
