//! Access to I/O ports (ioperm(2), iopl(2)): refused, since the ports are a device whose state is not saved.
//!
//! The bitmap of ioperm is seen by ptrace. Level 3 of iopl is seen by asking for it in a thread that has no right to get it; in
//! one with CAP_SYS_RAWIO it cannot be seen.

use super::{Result, TaskError, ThreadParts, ThreadView};
use crate::{
    finding::Finding,
    sys::{Errno, ptrace},
    tracee::{CallId, List, Results, Want},
};

const CAP_SYS_RAWIO: u32 = 17;

/// Where the answer will be; `None` for a thread that is not asked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Question(Option<CallId>);

/// Asks a thread with these effective capabilities.
pub(super) fn ask(list: &mut List, cap_eff: u64) -> Question {
    let may = cap_eff >> CAP_SYS_RAWIO & 1 == 1;
    Question((!may).then(|| list.call("iopl", libc::SYS_iopl, &[3u64.into()], Want::Any)))
}

impl Question {
    /// Whether the thread has level 3.
    pub(super) fn read(self, results: &Results) -> Result<bool> {
        let Some(call) = self.0 else { return Ok(false) };
        Ok(results.value(call).map_err(TaskError::Results)? == 0)
    }
}

pub(super) fn dump(view: &ThreadView<'_>, _: &mut ThreadParts, findings: &mut Vec<Finding>) -> Result<()> {
    let tid = view.cx.tid;
    let mut one = [0u8; 8];
    let bitmap = match ptrace::get_regset(tid, ptrace::NT_386_IOPERM, &mut one) {
        Ok(_) => true,
        // No bitmap; a kernel without.
        Err(Errno::ENXIO | Errno::EINVAL | Errno::ENODEV) => false,
        Err(e) => return Err(TaskError::request("PTRACE_GETREGSET of NT_386_IOPERM", tid, e)),
    };
    let mut refuse = |what: &str| {
        findings.push(Finding {
            pid: view.cx.pid,
            what: format!("thread {tid}: {what}"),
            reason: "what it does with them is a device's state, which is not saved".into(),
            hint: "let the program give them up before the dump".into(),
        });
    };
    if bitmap {
        refuse("access to I/O ports (ioperm)");
    }
    if view.cx.inside.iopl {
        refuse("access to all I/O ports (iopl)");
    }
    Ok(())
}
