//! State that is not carried: named when it is not what a new task has anyway.

use super::{ProcessCx, Result, TaskError, ThreadParts, ThreadView, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    sys::{Errno, ptrace},
};

pub(super) fn dump_thread(
    view: &ThreadView<'_>,
    _: &mut ThreadParts,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let (cx, status) = (view.cx, &view.status);
    let mut all = Vec::new();
    if cx.inside.core_cookie.is_some_and(|cookie| cookie != 0) {
        all.push(("core scheduling cookie (PR_SCHED_CORE)".into(), "a cookie cannot be chosen"));
    }
    match ptrace::syscall_user_dispatch_mode(cx.tid) {
        Ok(0) | Err(Errno::EIO | Errno::EINVAL) => {}
        Ok(_) => all.push((
            "syscall user dispatch (PR_SET_SYSCALL_USER_DISPATCH)".into(),
            "what runs in the thread for a dump would be dispatched",
        )),
        Err(e) => {
            return Err(TaskError::request("PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG", cx.tid, e));
        }
    }
    for feature in &status.x86_thread_features {
        all.push((format!("shadow stack ({})", feature.escape_ascii()), "not supported yet"));
    }
    if status.untag_mask.is_some_and(|mask| mask != u64::MAX) {
        all.push(("tagged addresses (ARCH_ENABLE_TAGGED_ADDR)".into(), "not supported yet"));
    }
    findings.extend(all.into_iter().map(|(what, reason): (String, &str)| Finding {
        pid: cx.pid,
        what: format!("thread {}: {what}", cx.tid),
        reason: reason.into(),
        hint: String::new(),
    }));
    Ok(())
}

pub(super) fn dump_process(
    cx: &ProcessCx,
    _: &mut pb::TaskCoreEntry,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let mut refuse = |what: &str| {
        findings.push(Finding {
            pid: cx.pid,
            what: what.into(),
            reason: "the image format has no place for it".into(),
            hint: String::new(),
        });
    };
    // A leader's parent gets this signal when it ends.
    let stat = parse_proc(cx.pid, format!("/proc/{}/stat", cx.pid), crate::proc::stat::parse)?;
    if stat.exit_signal != libc::SIGCHLD {
        refuse(&format!("exit signal {} instead of SIGCHLD (clone)", stat.exit_signal));
    }
    Ok(())
}
