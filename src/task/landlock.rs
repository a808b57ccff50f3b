//! The Landlock domain that restricts a thread (landlock_restrict_self(2)): refused, because nobody can read its rules, and a task
//! restored without them could do what it was forbidden.
//!
//! The kernel shows it nowhere. A thread in a domain may not look into processes outside of it, whatever its capabilities, so
//! each thread that could otherwise look into crtool is asked whether it can. One without CAP_SYS_PTRACE, which may not in
//! any case, cannot be asked: its domain is lost (docs/limits.md).

use super::{Result, TaskError, ThreadParts, ThreadView};
use crate::{
    finding::Finding,
    tracee::{CallId, List, Results, Want},
};

const CAP_SYS_PTRACE: u32 = 19;

/// Where the answer will be; `None` for a thread that is not asked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Question(Option<CallId>);

/// Asks a thread with these effective capabilities. It shares crtool's pid namespace: another one is refused.
pub(super) fn ask(list: &mut List, cap_eff: u64) -> Question {
    if cap_eff >> CAP_SYS_PTRACE & 1 == 0 {
        return Question(None);
    }
    let answer = list.space(16);
    let args = [u64::from(std::process::id()).into(), answer.into(), answer.into()];
    Question(Some(list.call("get_robust_list of crtool", libc::SYS_get_robust_list, &args, Want::Any)))
}

impl Question {
    /// Whether the thread is in a domain that crtool is not in.
    pub(super) fn read(self, results: &Results) -> Result<bool> {
        let Some(call) = self.0 else { return Ok(false) };
        let result = results.value(call).map_err(TaskError::Results)?;
        Ok(result == -i64::from(libc::EPERM))
    }
}

pub(super) fn dump(view: &ThreadView<'_>, _: &mut ThreadParts, findings: &mut Vec<Finding>) -> Result<()> {
    if view.cx.inside.landlock {
        findings.push(Finding {
            pid: view.cx.pid,
            what: format!("thread {}: Landlock domain (landlock_restrict_self)", view.cx.tid),
            reason: "its rules cannot be read, and a task restored without them would be less restricted"
                .into(),
            hint: "let the program start without Landlock".into(),
        });
    }
    Ok(())
}
