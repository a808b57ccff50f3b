//! State that images cannot carry: named when it is not what a new task has anyway.

use std::sync::OnceLock;

use super::{Odd, ProcessCx, Result, TaskError, ThreadParts, ThreadView, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    sys::{Errno, prctl, ptrace},
};

const PR_TSC_ENABLE: u32 = 1;
const PR_MCE_KILL_DEFAULT: u64 = 2;
/// What PR_GET_SPECULATION_CTRL tells by name.
const SPECULATION: [&str; 3] = ["store bypass", "indirect branch", "L1D flush"];

/// What is odd about a thread; `own` is what crtool has and a restored thread would have.
fn odd_things(odd: &Odd, own: &Odd, real_time: bool, seccomp: bool) -> Vec<String> {
    let mut all = Vec::new();
    // The kernel sets it to 0 for a thread with a real-time policy.
    let slack = odd.timer_slack_ns.filter(|ns| !(real_time && *ns == 0));
    if slack.is_some() && slack != own.timer_slack_ns {
        all.push(format!("timer slack of {} ns (PR_SET_TIMERSLACK)", slack.unwrap_or(0)));
    }
    if odd.tsc.is_some_and(|tsc| tsc != PR_TSC_ENABLE) && !seccomp {
        all.push("forbidden time stamp counter (PR_SET_TSC)".into());
    }
    if odd.mce_kill.is_some_and(|policy| policy != PR_MCE_KILL_DEFAULT) {
        all.push("machine check policy (PR_MCE_KILL)".into());
    }
    if odd.io_flusher.is_some_and(|on| on != 0) {
        all.push("I/O flusher (PR_SET_IO_FLUSHER)".into());
    }
    if odd.core_cookie.is_some_and(|cookie| cookie != 0) && odd.core_cookie != own.core_cookie {
        all.push("core scheduling cookie (PR_SCHED_CORE)".into());
    }
    if odd.cpuid == Some(0) {
        all.push("faulting cpuid instruction (ARCH_SET_CPUID)".into());
    }
    for ((name, theirs), ours) in SPECULATION.iter().zip(odd.speculation).zip(own.speculation) {
        // Filters may bring their own settings, and do so again when they are restored.
        if theirs.is_some() && theirs != ours && !seccomp {
            all.push(format!("speculation control of {name} (PR_SET_SPECULATION_CTRL)"));
        }
    }
    all
}

/// What crtool itself has of it; read once, since it does not change it.
fn own() -> Result<Odd> {
    static OWN: OnceLock<Odd> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(*own);
    }
    let path = "/proc/self/timerslack_ns".to_owned();
    let slack = parse_proc(0, path, |bytes| crate::proc::number::dec("timerslack_ns", bytes))?;
    let speculation = [0, 1, 2].map(|what| prctl::get(prctl::GET_SPECULATION_CTRL, what).ok());
    let own = Odd { timer_slack_ns: Some(slack), speculation, ..Odd::default() };
    Ok(*OWN.get_or_init(|| own))
}

pub(super) fn dump_thread(
    view: &ThreadView<'_>,
    _: &mut ThreadParts,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let (cx, status) = (view.cx, &view.status);
    let seccomp = status.seccomp.unwrap_or(0) != 0;
    let mut all = odd_things(&cx.inside.odd, &own()?, view.stat.rt_priority > 0, seccomp);
    match ptrace::syscall_user_dispatch_mode(cx.tid) {
        Ok(0) | Err(Errno::EIO | Errno::EINVAL) => {}
        Ok(_) => all.push("syscall user dispatch (PR_SET_SYSCALL_USER_DISPATCH)".into()),
        Err(e) => {
            return Err(TaskError::request("PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG", cx.tid, e));
        }
    }
    for feature in &status.x86_thread_features {
        all.push(format!("shadow stack ({})", feature.escape_ascii()));
    }
    if status.untag_mask.is_some_and(|mask| mask != u64::MAX) {
        all.push("tagged addresses (ARCH_ENABLE_TAGGED_ADDR)".into());
    }
    findings.extend(all.into_iter().map(|what| Finding {
        pid: cx.pid,
        what: format!("thread {}: {what}", cx.tid),
        reason: "the image format has no place for it".into(),
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
    if cx.inside.has_ldt {
        refuse("local descriptor table (modify_ldt)");
    }
    // A leader's parent gets this signal when it ends.
    let stat = parse_proc(cx.pid, format!("/proc/{}/stat", cx.pid), crate::proc::stat::parse)?;
    if stat.exit_signal != libc::SIGCHLD {
        refuse(&format!("exit signal {} instead of SIGCHLD (clone)", stat.exit_signal));
    }
    if cx.inside.mdwe != 0 {
        refuse("memory deny write execute (PR_SET_MDWE)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_thread_has_nothing_odd() {
        let usual = Odd {
            timer_slack_ns: Some(50_000),
            tsc: Some(1),
            mce_kill: Some(2),
            io_flusher: None,
            speculation: [Some(3), None, Some(5)],
            core_cookie: Some(0),
            cpuid: Some(1),
        };
        assert!(odd_things(&usual, &usual, false, false).is_empty());
        let real_time = Odd { timer_slack_ns: Some(0), ..usual };
        assert!(odd_things(&real_time, &usual, true, false).is_empty());
        let odd = Odd {
            timer_slack_ns: Some(1),
            tsc: Some(2),
            mce_kill: Some(0),
            io_flusher: Some(1),
            speculation: [Some(5), None, Some(5)],
            core_cookie: Some(7),
            cpuid: Some(0),
        };
        assert_eq!(odd_things(&odd, &usual, false, false).len(), 7);
    }
}
