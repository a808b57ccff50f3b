//! Signals that were sent and not yet delivered, with everything that came with them.
//!
//! They are queued by the restored threads to themselves, which may carry any siginfo, by calls that the supervisor makes in
//! them one by one at the very end ([`pending_signals`]). All signals are blocked then, so nothing is delivered and nothing is
//! discarded as ignored. What a list does before is to take what came while the process was made.
//!
//! A SIGSTOP pends only where a process is stopped already. Nothing blocks it, so it is sent when the task is let go.

use super::{ProcessCx, Result, TaskError, ThreadParts, ThreadPlan, ThreadView, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    sys::{pid::HostPid, ptrace},
    tracee::{List, Want},
};

/// `struct siginfo`.
const SIGINFO_LEN: usize = 128;
/// As many as can be pending in a new process by the way it was made: SIGCHLD, SIGCONT, and some to spare.
const DRAINS: usize = 8;

/// All queued signals. `set` are those that pend: one sent when memory or RLIMIT_SIGPENDING
/// had run out pends without an entry in the queue, and is delivered as if kill had sent it.
fn queue(tid: HostPid, shared: bool, set: u64) -> Result<pb::SignalQueueEntry> {
    let mut infos: Vec<[u8; SIGINFO_LEN]> = Vec::new();
    let mut at = 0;
    loop {
        let some = ptrace::peek_siginfo(tid, shared, at)
            .map_err(|e| TaskError::request("PTRACE_PEEKSIGINFO", tid, e))?;
        at += some.len() as u64;
        if some.is_empty() {
            break;
        }
        infos.extend(some);
    }
    let queued = infos.iter().map(|info| signal_of(info)).filter(|s| (1..=64).contains(s));
    let queued = queued.fold(0u64, |mask, signal| mask | 1 << (signal - 1));
    for signal in (1u32..=64).filter(|s| (set & !queued) >> (s - 1) & 1 == 1) {
        let mut info = [0u8; SIGINFO_LEN];
        info[..4].copy_from_slice(&signal.to_ne_bytes());
        infos.push(info);
    }
    let signals = infos.iter().map(|info| pb::SiginfoEntry { siginfo: info.to_vec() }).collect();
    Ok(pb::SignalQueueEntry { signals })
}

pub(super) fn dump_thread(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    _: &mut Vec<Finding>,
) -> Result<()> {
    parts.core.signals_p = Some(queue(view.cx.tid, false, view.status.sigpnd)?);
    Ok(())
}

pub(super) fn dump_process(
    cx: &ProcessCx,
    entry: &mut pb::TaskCoreEntry,
    _: &mut Vec<Finding>,
) -> Result<()> {
    let path = format!("/proc/{}/task/{}/status", cx.pid, cx.tid);
    let status = parse_proc(cx.tid, path, crate::proc::status::parse)?;
    entry.signals_s = Some(queue(cx.tid, true, status.shdpnd)?);
    Ok(())
}

/// The signal of a siginfo; 0 is none.
pub fn signal_of(info: &[u8]) -> u32 {
    info.get(..4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Both queues of a core image: that of the process, and that of the thread.
fn queues(core: &pb::CoreEntry) -> [(Option<&pb::SignalQueueEntry>, bool); 2] {
    let shared = core.tc.as_deref().and_then(|tc| tc.signals_s.as_ref());
    let private = core.thread_core.as_deref().and_then(|t| t.signals_p.as_ref());
    [(shared, true), (private, false)]
}

/// All signals that pended, of both queues.
pub(super) fn infos(core: &pb::CoreEntry) -> impl Iterator<Item = &pb::SiginfoEntry> {
    queues(core).into_iter().flat_map(|(queue, _)| queue).flat_map(|queue| &queue.signals)
}

/// What is to be queued by a thread, in order, and whether to its process. SIGKILL and SIGSTOP are not among them, since
/// nothing blocks them.
pub fn pending_signals(core: &pb::CoreEntry) -> Result<Vec<([u8; SIGINFO_LEN], bool)>> {
    let mut all = Vec::new();
    for (queue, shared) in queues(core) {
        for info in queue.iter().flat_map(|queue| &queue.signals) {
            let bytes: [u8; SIGINFO_LEN] = info
                .siginfo
                .as_slice()
                .try_into()
                .map_err(|_| TaskError::image(format!("a siginfo of {} bytes", info.siginfo.len())))?;
            let signal = signal_of(&bytes);
            if !(1..=64).contains(&signal) {
                return Err(TaskError::image(format!("a pending signal {signal}")));
            }
            if ![libc::SIGKILL, libc::SIGSTOP].contains(&signal.cast_signed()) {
                all.push((bytes, shared));
            }
        }
    }
    Ok(all)
}

/// Where a SIGSTOP pended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PendingStop {
    /// It was sent to the process.
    Process,
    /// It was sent to the thread.
    Thread,
}

/// A SIGSTOP that pended, to be sent when the task is let go.
pub fn pending_stop(core: &pb::CoreEntry) -> Option<PendingStop> {
    queues(core).into_iter().find_map(|(queue, shared)| {
        let stop = |info: &pb::SiginfoEntry| signal_of(&info.siginfo) == libc::SIGSTOP.cast_unsigned();
        let there = queue.is_some_and(|queue| queue.signals.iter().any(stop));
        there.then_some(if shared { PendingStop::Process } else { PendingStop::Thread })
    })
}

/// Takes what came while the process was made, which was not meant for it.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    if plan.process().is_some() {
        let all = list.value(&u64::MAX);
        let no_wait = list.value(&[0u64; 2]);
        for _ in 0..DRAINS {
            let args = [all.into(), 0u64.into(), no_wait.into(), 8u64.into()];
            list.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &args, Want::Any);
        }
    }
    Ok(())
}
