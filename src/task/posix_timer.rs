//! POSIX timers: ids, clocks, how they notify, and the time left.
//!
//! The time left in an image is that of the moment at which the clocks of the tree stand there, and timers of these clocks are
//! set again to the time at which they were to expire, not to what was left of it: so a periodic one keeps its phase however
//! long the restore takes, and counts what it missed as overruns. Timers of CLOCK_REALTIME may have been set to a time of the
//! day or not, which the kernel does not tell: they go on with what was left.
//!
//! The overrun count that a restored timer_getoverrun returns is lost: nothing can set it.

use std::{collections::HashSet, time::Duration};

use super::{ProcessCx, Result, Supervisor, TaskError, ThreadPlan, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    ns::time::from_nanoseconds,
    proc::timers::{self, Timer},
    sys::{pid::HostPid, prctl},
    tracee::{List, Want},
};

/// More ids than this are not counted up to on a kernel that cannot be told them.
const MAX_COUNTED: u32 = 4096;
/// The low bits of a clock id made from a descriptor.
const CLOCKFD: i32 = 3;

fn list_of(pid: HostPid) -> Result<Vec<Timer>> {
    let path = format!("/proc/{pid}/timers");
    if !std::path::Path::new(&path).exists() && std::path::Path::new(&format!("/proc/{pid}")).exists() {
        // A kernel without CONFIG_POSIX_TIMERS.
        return Ok(Vec::new());
    }
    let mut all = parse_proc(pid, path, timers::parse)?;
    all.sort_by_key(|timer| timer.id);
    Ok(all)
}

/// Ids of the timers of a process, ascending, for [`super::process_queries`].
pub fn ids(pid: HostPid) -> Result<Vec<i32>> {
    Ok(list_of(pid)?.iter().map(|timer| timer.id).collect())
}

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, findings: &mut Vec<Finding>) -> Result<()> {
    let all = list_of(cx.pid)?;
    if all.len() != cx.inside.posix_timers.len() {
        return Err(TaskError::image("timers changed while the process was stopped"));
    }
    entry.timer_restore_ids = cx.inside.timer_restore_ids.then_some(true);
    let timers = entry.timers.get_or_insert_default();
    for (timer, (times, overrun)) in all.iter().zip(&cx.inside.posix_timers) {
        if let Some(reason) = obstacle(timer, cx.threads) {
            findings.push(Finding {
                pid: cx.pid,
                what: format!("POSIX timer {}", timer.id),
                reason: reason.into(),
                hint: String::new(),
            });
            continue;
        }
        let by_thread = timer.sigev_notify & libc::SIGEV_THREAD_ID != 0;
        let [isec, insec, vsec, vnsec] = *times;
        timers.posix.push(pb::PosixTimerEntry {
            it_id: timer.id.cast_unsigned(),
            clock_id: timer.clockid.cast_unsigned(),
            si_signo: timer.signal.cast_unsigned(),
            it_sigev_notify: timer.sigev_notify.cast_unsigned(),
            sival_ptr: timer.sigval,
            overrun: *overrun,
            isec,
            insec,
            vsec,
            vnsec,
            notify_thread_id: by_thread.then_some(timer.target),
        });
    }
    Ok(())
}

/// Why a timer cannot be made again.
fn obstacle(timer: &Timer, threads: usize) -> Option<&'static str> {
    if timer.clockid < 0 && timer.clockid & 7 == CLOCKFD {
        Some("its clock is a device")
    } else if timer.clockid == libc::CLOCK_THREAD_CPUTIME_ID && threads > 1 {
        Some("the kernel does not tell which thread's processor time it counts")
    } else if timer.sigev_notify & libc::SIGEV_THREAD_ID != 0 && timer.target <= 0 {
        Some("the thread that it notifies has ended")
    } else {
        None
    }
}

/// A time in seconds and nanoseconds of an image.
fn duration(sec: u64, nsec: u64) -> Duration {
    Duration::from_secs(sec).saturating_add(Duration::from_nanos(nsec))
}

/// Whether the time of a clock passes while the process does not run.
fn goes_by_itself(clock: u32) -> bool {
    !matches!(clock.cast_signed(), ..0 | libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Lets `gone` pass since the timers were read. `waiting` are the ids of those whose signal waits to be taken: it stands for
/// all expirations until then.
pub(super) fn settle(timers: &mut [pb::PosixTimerEntry], gone: Duration, waiting: &HashSet<u32>) {
    for timer in timers.iter_mut().filter(|timer| goes_by_itself(timer.clock_id)) {
        let (left, interval) = (duration(timer.vsec, timer.vnsec), duration(timer.isec, timer.insec));
        if left.is_zero() {
            continue;
        }
        let left = match left.checked_sub(gone) {
            Some(left) if !left.is_zero() => left,
            _ if !waiting.contains(&timer.it_id) => Duration::from_nanos(1),
            // It was disarmed by its only expiration.
            _ if interval.is_zero() => Duration::ZERO,
            _ => {
                let late = gone.saturating_sub(left).as_nanos() % interval.as_nanos();
                interval - from_nanoseconds(late)
            }
        };
        (timer.vsec, timer.vnsec) = (left.as_secs(), left.subsec_nanos().into());
    }
}

/// The id of the timer that sent a signal, by its siginfo.
pub(super) fn sender(info: &[u8]) -> Option<u32> {
    let word = |at: usize| info.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    (word(8)?.cast_signed() == libc::SI_TIMER).then(|| word(16)).flatten()
}

/// How to set a timer again: flags, and when it expires.
fn due(timer: &pb::PosixTimerEntry, supervisor: &Supervisor) -> Result<(i32, Duration)> {
    let left = duration(timer.vsec, timer.vnsec);
    let start = supervisor.clocks.and_then(|clocks| clocks.start(timer.clock_id.cast_signed()));
    Ok(match start {
        _ if left.is_zero() => (0, left),
        Some(start) => (libc::TIMER_ABSTIME, start.saturating_add(left)),
        None if goes_by_itself(timer.clock_id) => {
            (0, left.saturating_sub(supervisor.elapsed()?).max(Duration::from_nanos(1)))
        }
        None => (0, left),
    })
}

/// By the leader, once all threads are there.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(tc) = plan.process() else { return Ok(()) };
    let Some(timers) = &tc.timers else { return Ok(()) };
    let stays = tc.timer_restore_ids() && plan.supervisor.timer_ids;
    if timers.posix.is_empty() && !stays {
        return Ok(());
    }
    let mut all: Vec<_> = timers.posix.iter().collect();
    all.sort_by_key(|timer| timer.it_id);
    let chosen = plan.supervisor.timer_ids;
    let mode = |list: &mut List, on: u64| {
        let args = [prctl::TIMER_CREATE_RESTORE_IDS.into(), on.into()];
        list.call("PR_TIMER_CREATE_RESTORE_IDS", libc::SYS_prctl, &args, Want::Zero);
    };
    if chosen {
        mode(list, 1);
    }
    let mut next = 0;
    for timer in &all {
        if timer.it_id > i32::MAX.cast_unsigned() {
            return Err(TaskError::image(format!("POSIX timer {}", timer.it_id)));
        }
        if !chosen {
            count_up(list, &mut next, timer.it_id)?;
        }
        create(list, timer)?;
    }
    if chosen && !stays {
        mode(list, 0);
    }
    for timer in &all {
        let times = [timer.isec, timer.insec, timer.vsec, timer.vnsec];
        if times != [0; 4] {
            let (flags, when) = due(timer, plan.supervisor)?;
            let value = list.value(&[timer.isec, timer.insec, when.as_secs(), when.subsec_nanos().into()]);
            let args = [timer.it_id.into(), flags.into(), value.into(), 0u64.into()];
            let name = format!("timer_settime of POSIX timer {}", timer.it_id);
            list.call(name, libc::SYS_timer_settime, &args, Want::Zero);
        }
    }
    Ok(())
}

fn create(list: &mut List, timer: &pb::PosixTimerEntry) -> Result<()> {
    let mut event = [0u32; 16];
    event[0] = u32::try_from(timer.sival_ptr & 0xffff_ffff).unwrap_or(0);
    event[1] = u32::try_from(timer.sival_ptr >> 32).unwrap_or(0);
    event[2] = timer.si_signo;
    event[3] = timer.it_sigev_notify;
    if timer.it_sigev_notify & libc::SIGEV_THREAD_ID.cast_unsigned() != 0 {
        let tid = timer.notify_thread_id.ok_or_else(|| {
            TaskError::image(format!("POSIX timer {} does not say which thread it notifies", timer.it_id))
        })?;
        event[4] = tid.cast_unsigned();
    }
    let event = list.value(&event);
    let id = list.value(&timer.it_id);
    let args = [timer.clock_id.cast_signed().into(), event.into(), id.into()];
    let name = format!("timer_create of POSIX timer {}", timer.it_id);
    list.call(name, libc::SYS_timer_create, &args, Want::Zero);
    Ok(())
}

/// Makes and deletes timers until the next one gets `id`: a new process begins with 0.
fn count_up(list: &mut List, next: &mut u32, id: u32) -> Result<()> {
    if id > MAX_COUNTED {
        return Err(TaskError::Unsupported {
            what: format!("POSIX timer {id}"),
            reason: "this kernel cannot make a timer with a chosen id (Linux 6.15 can)".into(),
        });
    }
    while *next < id {
        let cell = list.value(next);
        let args = [libc::CLOCK_MONOTONIC.into(), 0u64.into(), cell.into()];
        list.call("timer_create to count up", libc::SYS_timer_create, &args, Want::Zero);
        list.call("timer_delete to count up", libc::SYS_timer_delete, &[(*next).into()], Want::Zero);
        *next += 1;
    }
    *next = id + 1;
    Ok(())
}
