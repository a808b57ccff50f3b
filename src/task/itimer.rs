//! Interval timers: real, virtual, profiling, with the time left.
//!
//! The time left of a real timer in an image is that of the moment at which the clocks of the tree stand there.
//!
//! Three corrections when they are set again. A real timer whose signal waits in the queue has stopped: it goes on
//! when the signal is taken, which the kernel shows as no time left. Timers of processor time get one tick more than
//! they are set to, which getitimer shows. And for a real timer the restore itself takes time, which the tree sees on its clocks.

use std::time::Duration;

use super::{ProcessCx, Result, Supervisor, TaskError, ThreadPlan};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

fn to_entry([isec, iusec, vsec, vusec]: [u64; 4]) -> pb::ItimerEntry {
    pb::ItimerEntry { isec, iusec, vsec, vusec }
}

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    let [real, virt, prof] = cx.inside.itimers.map(to_entry);
    let timers = entry.timers.get_or_insert_default();
    (timers.real, timers.virt, timers.prof) = (real, virt, prof);
    Ok(())
}

const MICROSECONDS: u64 = 1_000_000;

/// Lets `gone` pass of the time left of a running timer. What should have expired since expires at once.
fn passed(left: [u64; 2], gone: Duration) -> [u64; 2] {
    let [sec, usec] = left;
    let left = Duration::from_secs(sec).saturating_add(Duration::from_micros(usec));
    let left = left.saturating_sub(gone).max(Duration::from_micros(1));
    [left.as_secs(), left.subsec_micros().into()]
}

/// Lets `gone` pass since the timers were read.
pub(super) fn settle(timers: &mut pb::TaskTimersEntry, gone: Duration) {
    let real = &mut timers.real;
    if [real.vsec, real.vusec] != [0, 0] {
        [real.vsec, real.vusec] = passed([real.vsec, real.vusec], gone);
    }
}

/// What to set, so that getitimer shows what is wanted.
fn corrected(
    which: i32,
    [isec, iusec, vsec, vusec]: [u64; 4],
    supervisor: &Supervisor,
    gone: Duration,
) -> [u64; 4] {
    if [vsec, vusec] == [0, 0] {
        return [isec, iusec, isec, iusec];
    }
    if which == libc::ITIMER_REAL {
        let [vsec, vusec] = passed([vsec, vusec], gone);
        return [isec, iusec, vsec, vusec];
    }
    let left = vsec.saturating_mul(MICROSECONDS).saturating_add(vusec);
    let left = left.saturating_sub(supervisor.tick_ns / 1000).max(1);
    [isec, iusec, left / MICROSECONDS, left % MICROSECONDS]
}

/// By the leader, as late as privileges allow: the time goes on from here.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(timers) = plan.process().and_then(|tc| tc.timers.as_ref()) else { return Ok(()) };
    let all = [
        (libc::ITIMER_REAL, "setitimer ITIMER_REAL", timers.real),
        (libc::ITIMER_VIRTUAL, "setitimer ITIMER_VIRTUAL", timers.virt),
        (libc::ITIMER_PROF, "setitimer ITIMER_PROF", timers.prof),
    ];
    let gone = plan.supervisor.elapsed()?;
    for (which, name, timer) in all {
        let words = [timer.isec, timer.iusec, timer.vsec, timer.vusec];
        if words == [0; 4] {
            continue;
        }
        if timer.iusec >= MICROSECONDS || timer.vusec >= MICROSECONDS {
            return Err(TaskError::image(format!("{name}: more than a second of microseconds")));
        }
        let value = list.value(&corrected(which, words, plan.supervisor, gone));
        list.call(name, libc::SYS_setitimer, &[which.into(), value.into(), 0u64.into()], Want::Zero);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_waits_for_its_signal_goes_on() {
        let supervisor = Supervisor { tick_ns: 4_000_000, ..Default::default() };
        let corrected = |which, words| corrected(which, words, &supervisor, Duration::from_micros(5));
        assert_eq!(corrected(libc::ITIMER_REAL, [1, 2, 0, 0]), [1, 2, 1, 2]);
        assert_eq!(corrected(libc::ITIMER_REAL, [1, 2, 3, 4]), [1, 2, 2, 999_999]);
        assert_eq!(corrected(libc::ITIMER_REAL, [1, 2, 0, 4]), [1, 2, 0, 1]);
        assert_eq!(corrected(libc::ITIMER_REAL, [1, 2, u64::MAX, 0]), [1, 2, u64::MAX - 1, 999_995]);
        assert_eq!(corrected(libc::ITIMER_PROF, [1, 2, 3, 4000]), [1, 2, 3, 0]);
        assert_eq!(corrected(libc::ITIMER_PROF, [1, 2, 3, 3999]), [1, 2, 2, 999_999]);
        assert_eq!(corrected(libc::ITIMER_VIRTUAL, [0, 0, 0, 10]), [0, 0, 0, 1]);
    }
}
