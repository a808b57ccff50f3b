//! Signals that were sent and not yet delivered, with everything that came with them.
//!
//! They are queued by the restored threads to themselves, which may carry any siginfo. All signals are
//! blocked then, so nothing is delivered and nothing is discarded as ignored.

use libc::c_long;

use super::{ProcessCx, Result, TaskError, ThreadParts, ThreadPlan, ThreadView, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    sys::{pod, ptrace},
    tracee::{Arg, List, Want},
};

/// `struct siginfo`.
const SIGINFO_LEN: usize = 128;
/// As many as can be pending in a new process by the way it was made: SIGCHLD, SIGCONT, and some to spare.
const DRAINS: usize = 8;

fn signal_of(info: &[u8]) -> u32 {
    info.get(..4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// All queued signals. `set` are those that pend: one sent when memory or RLIMIT_SIGPENDING
/// had run out pends without an entry in the queue, and is delivered as if kill had sent it.
fn queue(tid: i32, shared: bool, set: u64, first: Option<[u8; SIGINFO_LEN]>) -> Result<pb::SignalQueueEntry> {
    let mut infos: Vec<[u8; SIGINFO_LEN]> = first.into_iter().collect();
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
    parts.core.signals_p = Some(queue(view.cx.tid, false, view.status.sigpnd, view.cx.in_delivery)?);
    Ok(())
}

pub(super) fn dump_process(
    cx: &ProcessCx,
    entry: &mut pb::TaskCoreEntry,
    _: &mut Vec<Finding>,
) -> Result<()> {
    let path = format!("/proc/{}/task/{}/status", cx.pid, cx.tid);
    let status = parse_proc(cx.tid, path, crate::proc::status::parse)?;
    entry.signals_s = Some(queue(cx.tid, true, status.shdpnd, None)?);
    Ok(())
}

/// SIGKILL and SIGSTOP cannot be blocked, so they cannot be queued this way.
fn is_blockable(signal: u32) -> bool {
    i32::try_from(signal).is_ok_and(|s| s != libc::SIGKILL && s != libc::SIGSTOP)
}

pub(super) fn queues(core: &pb::CoreEntry) -> impl Iterator<Item = &pb::SiginfoEntry> {
    let shared = core.tc.as_deref().and_then(|tc| tc.signals_s.as_ref());
    let private = core.thread_core.as_deref().and_then(|t| t.signals_p.as_ref());
    shared.into_iter().chain(private).flat_map(|queue| &queue.signals)
}

/// Whether a SIGSTOP was on its way, to be sent again when the task is let go.
pub(super) fn has_stop(core: &pb::CoreEntry) -> bool {
    queues(core).any(|info| i32::try_from(signal_of(&info.siginfo)) == Ok(libc::SIGSTOP))
}

fn send(
    list: &mut List,
    queue: Option<&pb::SignalQueueEntry>,
    name: &'static str,
    nr: c_long,
    to: &[i32],
) -> Result<()> {
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
        if is_blockable(signal) {
            let data = list.bytes(pod::bytes_of(&bytes));
            let mut args: Vec<Arg> = to.iter().map(|id| (*id).into()).collect();
            args.extend([Arg::from(signal), Arg::from(data)]);
            list.call(format!("{name} of signal {signal}"), nr, &args, Want::Zero);
        }
    }
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    if let Some(tc) = plan.process() {
        // What came while the process was made was not meant for it.
        let all = list.value(&u64::MAX);
        let no_wait = list.value(&[0u64; 2]);
        for _ in 0..DRAINS {
            let args = [all.into(), 0u64.into(), no_wait.into(), 8u64.into()];
            list.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &args, Want::Any);
        }
        let to = [plan.pid];
        send(list, tc.signals_s.as_ref(), "rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &to)?;
    }
    let to = [plan.pid, plan.tid];
    let private = plan.thread()?.signals_p.as_ref();
    send(list, private, "rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &to)
}
