//! timerfd(2): a timer whose expirations are read.
//!
//! Saved: clock, time left (also for absolute timers, as CRIU), interval, flags of the last timerfd_settime, and expirations
//! not yet read, all as of the moment at which the clocks of the tree stand in the images. A timer runs on while the tree is frozen;
//! it starts again in the last step of a restore, with what is left of it then by the clocks of the tree: a periodic one keeps its
//! phase, and has counted what it missed. What is due at a time of the wall clock, once, is due at that time after a restore too.
//!
//! A periodic timer stands still from its first unread expiration on: the kernel counts those that follow when somebody asks.
//! fdinfo shows no time left then, as for a timer that is not armed; what tells them apart is the unread expiration.

use std::{collections::HashMap, os::fd::BorrowedFd, time::Duration};

use nix::time::{ClockId, clock_gettime};

use super::{
    DumpCx, DumpTables, FdView, FileError, FileKind, Opened, Place, RestoreCx, flags, kind::packed_in,
};
use crate::{
    image::pb,
    ns::time::from_nanoseconds,
    proc::fdinfo,
    sys::{Errno, event},
};

const ABSTIME: u32 = libc::TFD_TIMER_ABSTIME.cast_unsigned();
const NS: i64 = 1_000_000_000;
/// How often, and how long after each other, a timer is looked at that may go off right now.
const LOOKS: u32 = 5;
const PAUSE: Duration = Duration::from_micros(100);

/// A timer.
#[derive(Debug)]
pub(super) struct Timerfd;

impl FileKind for Timerfd {
    type Entry = pb::TimerfdEntry;
    const NAME: &'static str = "timerfd";
    const TYPE: pb::FdTypes = pb::FdTypes::Timerfd;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.is_anon_inode("[timerfd]")
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let timer = state(fd)?;
        cx.state::<Read>().0.insert(id, monotonic()?);
        let (mut vsec, mut vnsec) = timer.it_value;
        if is_expired(timer.ticks, (vsec, vnsec), timer.it_interval) {
            // It has just been asked, so what it stands at has just been counted, and this is the next one.
            (vsec, vnsec) = timer.it_interval;
        }
        let clock = timer.clockid;
        let due = match (clock, timer.it_interval) {
            (libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM, (0, 0))
                if timer.settime_flags & ABSTIME != 0 && (vsec, vnsec) != (0, 0) =>
            {
                let now = event::clock_now(libc::CLOCK_REALTIME)
                    .map_err(FileError::sys("read the clock of a timer"))?;
                let ns = vnsec.saturating_add(now.tv_nsec.cast_unsigned());
                let sec = vsec.saturating_add(now.tv_sec.cast_unsigned());
                Some((sec.saturating_add(ns / NS.cast_unsigned()), ns % NS.cast_unsigned()))
            }
            _ => None,
        };
        Ok(pb::TimerfdEntry {
            id,
            flags: fd.flags(),
            fown: fd.fown()?,
            clockid: clock.cast_unsigned(),
            ticks: timer.ticks,
            settime_flags: timer.settime_flags,
            vsec,
            vnsec,
            isec: timer.it_interval.0,
            insec: timer.it_interval.1,
            due_sec: due.map(|due| due.0),
            due_nsec: due.map(|due| due.1),
        })
    }

    fn complete(
        cx: &mut DumpCx<'_>,
        _tables: &DumpTables,
        entry: &mut Self::Entry,
        _at: Place,
    ) -> Result<(), FileError> {
        let read = cx.state::<Read>().0.remove(&entry.id);
        if let (Some(clock), Some(read)) = (cx.clock, read) {
            pass(entry, clock.saturating_sub(read));
        }
        Ok(())
    }

    fn open(_cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        value(entry)?;
        let fd = event::timerfd(entry.clockid.cast_signed(), libc::TFD_CLOEXEC)
            .map_err(FileError::sys("create a timer (alarm clocks need CAP_WAKE_ALARM)"))?;
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError> {
        // Alarm clocks are for those who have CAP_WAKE_ALARM; nobody sees one that is made and closed.
        Self::open(cx, entry).map(drop)
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        entry: &Self::Entry,
        fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        value(entry)?;
        let mut entry = *entry;
        let elapsed = cx.clocks.map(|clocks| clocks.elapsed()).transpose();
        pass(&mut entry, elapsed.map_err(FileError::sys("read the clocks"))?.unwrap_or_default());
        let entry = &entry;
        let mut value = value(entry)?;
        let armed = value.it_value.tv_sec != 0 || value.it_value.tv_nsec != 0;
        if armed && entry.settime_flags & ABSTIME != 0 {
            value.it_value = match due(entry)? {
                Some(due) => due,
                None => {
                    let now = event::clock_now(entry.clockid.cast_signed())
                        .map_err(FileError::sys("read the clock of a timer"))?;
                    later(now, value.it_value)
                        .ok_or(FileError::entry(entry.id, "its time left is too long"))?
                }
            };
        }
        event::timerfd_settime(fd, entry.settime_flags.cast_signed(), &value)
            .map_err(FileError::sys("start a timer"))?;
        if entry.ticks != 0 {
            event::timerfd_set_ticks(fd, entry.ticks)
                .map_err(FileError::sys("set the unread expirations of a timer (TFD_IOC_SET_TICKS)"))?;
        }
        Ok(())
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(tfd);
}

/// When each timer was read, by CLOCK_MONOTONIC of crtool.
#[derive(Debug, Default)]
struct Read(HashMap<u32, Duration>);

fn monotonic() -> Result<Duration, FileError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC);
    now.map(Duration::from).map_err(FileError::sys("read CLOCK_MONOTONIC"))
}

/// Lets `gone` pass for a timer that runs. One that is due by the wall clock does not care. One that stands still at an
/// expiration that has been counted, as other tools save it, goes on with the next one.
fn pass(entry: &mut pb::TimerfdEntry, gone: Duration) {
    let time = |sec: u64, ns: u64| Duration::from_secs(sec).saturating_add(Duration::from_nanos(ns));
    let (left, interval) = (time(entry.vsec, entry.vnsec), time(entry.isec, entry.insec));
    let stands_still = entry.ticks > 0 && !interval.is_zero() && left <= Duration::from_nanos(1);
    let left = if stands_still { interval } else { left };
    if left.is_zero() || entry.due_sec.is_some() {
        return;
    }
    let left = match left.checked_sub(gone) {
        Some(left) if !left.is_zero() => left,
        _ if interval.is_zero() => Duration::from_nanos(1),
        _ => {
            let late = gone.saturating_sub(left).as_nanos();
            let missed = u64::try_from(late / interval.as_nanos()).unwrap_or(u64::MAX).saturating_add(1);
            entry.ticks = entry.ticks.saturating_add(missed);
            interval - from_nanoseconds(late % interval.as_nanos())
        }
    };
    (entry.vsec, entry.vnsec) = (left.as_secs(), left.subsec_nanos().into());
}

/// Whether a periodic timer has gone off and waits to be asked: it has no time left, and something to be read.
fn is_expired(ticks: u64, left: (u64, u64), interval: (u64, u64)) -> bool {
    left == (0, 0) && interval != (0, 0) && ticks > 0
}

/// What fdinfo shows of a timer, when it shows all there is to it.
fn state(fd: &FdView<'_>) -> Result<fdinfo::Timerfd, FileError> {
    let path = format!("/proc/{}/fdinfo/{}", fd.pid, fd.fd);
    let mut look = 0;
    loop {
        // Asking for the time left makes the kernel count what was missed, so fdinfo is right only after that.
        event::timerfd_gettime(fd.file()?).map_err(FileError::sys("read the time left of a timer"))?;
        let text =
            std::fs::read(&path).map_err(|e| FileError::path("read", path.as_bytes())(errno_of(&e)))?;
        let timer = fdinfo::parse(&text)?.timerfd.ok_or(FileError::unsupported(
            "the kernel does not tell the state of this timer",
            "a kernel with CONFIG_PROC_FS and CONFIG_CHECKPOINT_RESTORE does",
        ))?;
        // A periodic one without time left: it is not armed, or it goes off right now.
        let unclear = timer.it_value == (0, 0) && timer.it_interval != (0, 0);
        if !unclear || look == LOOKS {
            return Ok(timer);
        }
        look += 1;
        std::thread::sleep(PAUSE);
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

fn time(entry: &pb::TimerfdEntry, sec: u64, ns: u64) -> Result<libc::timespec, FileError> {
    match (i64::try_from(sec), i64::try_from(ns)) {
        (Ok(tv_sec), Ok(tv_nsec)) if tv_nsec < NS => Ok(libc::timespec { tv_sec, tv_nsec }),
        _ => Err(FileError::entry(entry.id, format!("{sec} s {ns} ns is no time"))),
    }
}

/// `left` after `now`; `None` when no clock goes so far.
fn later(now: libc::timespec, left: libc::timespec) -> Option<libc::timespec> {
    let ns = now.tv_nsec + left.tv_nsec;
    let tv_sec = left.tv_sec.checked_add(now.tv_sec)?.checked_add(ns / NS)?;
    Some(libc::timespec { tv_sec, tv_nsec: ns % NS })
}

/// When it is due by the wall clock, if the images say so.
fn due(entry: &pb::TimerfdEntry) -> Result<Option<libc::timespec>, FileError> {
    let Some(sec) = entry.due_sec else { return Ok(None) };
    let clock = entry.clockid.cast_signed();
    if !matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM) {
        return Err(FileError::entry(entry.id, "it is due by a clock that it does not run on"));
    }
    time(entry, sec, entry.due_nsec()).map(Some)
}

/// Time left and interval, checked.
fn value(entry: &pb::TimerfdEntry) -> Result<libc::itimerspec, FileError> {
    let interval = (entry.isec, entry.insec);
    let expired = is_expired(entry.ticks, (entry.vsec, entry.vnsec), interval);
    Ok(libc::itimerspec {
        it_value: time(entry, entry.vsec, if expired { 1 } else { entry.vnsec })?,
        it_interval: time(entry, entry.isec, entry.insec)?,
    })
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::super::trial::Trial;
    use super::*;
    use std::{
        io::Read,
        os::fd::{AsFd, OwnedFd},
        time::Duration,
    };

    fn timer(clock: i32, flags: i32, left_ns: i64, interval_ns: i64) -> OwnedFd {
        let fd = event::timerfd(clock, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC).unwrap();
        let mut value = libc::itimerspec {
            it_value: libc::timespec { tv_sec: left_ns / NS, tv_nsec: left_ns % NS },
            it_interval: libc::timespec { tv_sec: interval_ns / NS, tv_nsec: interval_ns % NS },
        };
        if flags & libc::TFD_TIMER_ABSTIME != 0 {
            value.it_value.tv_sec += event::clock_now(clock).unwrap().tv_sec;
        }
        event::timerfd_settime(fd.as_fd(), flags, &value).unwrap();
        fd
    }

    fn ticks(fd: OwnedFd) -> std::io::Result<u64> {
        let mut count = [0; 8];
        std::fs::File::from(fd).read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }

    fn left(fd: &OwnedFd) -> f64 {
        let value = event::timerfd_gettime(fd.as_fd()).unwrap().it_value;
        value.tv_sec as f64 + value.tv_nsec as f64 / 1e9
    }

    #[test]
    fn time_left_and_interval() {
        for flags in [0, libc::TFD_TIMER_ABSTIME, libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET] {
            let fd = timer(libc::CLOCK_REALTIME, flags, 500 * NS, 3 * NS);
            let mut trial = Trial::new();
            let entry = trial.dump::<Timerfd>(&fd);
            assert_eq!((entry.settime_flags, entry.isec), (flags.cast_unsigned(), 3));
            let again = trial.restore::<Timerfd>(&entry);
            assert!((400.0..=500.0).contains(&left(&again)), "{flags} {}", left(&again));
            assert_eq!(trial.dump::<Timerfd>(&again).settime_flags, flags.cast_unsigned());
        }
    }

    #[test]
    fn expired_and_unread() {
        let once = timer(libc::CLOCK_MONOTONIC, 0, 1, 0);
        let often = timer(libc::CLOCK_BOOTTIME, 0, 1, 1_000_000);
        let off = timer(libc::CLOCK_MONOTONIC, 0, 0, 0);
        for fd in [&once, &often] {
            let mut expired = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut expired, PollTimeout::NONE), Ok(1));
        }
        std::thread::sleep(Duration::from_millis(20));
        let mut trial = Trial::new();
        let entry = trial.dump::<Timerfd>(&once);
        assert_eq!((entry.ticks, entry.vsec, entry.vnsec), (1, 0, 0));
        assert_eq!(ticks(trial.restore::<Timerfd>(&entry)).unwrap(), 1);

        let entry = trial.dump::<Timerfd>(&often);
        assert!(entry.ticks >= 15 && entry.vnsec > 0, "{entry:?}");
        assert!(ticks(trial.restore::<Timerfd>(&entry)).unwrap() >= entry.ticks);
        assert!(ticks(often).unwrap() >= entry.ticks, "the source lost ticks");

        let entry = trial.dump::<Timerfd>(&off);
        let error = ticks(trial.restore::<Timerfd>(&entry)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    }

    /// Faster than anybody can look: it must run on, and count.
    #[test]
    fn short_periods() {
        for clock in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME] {
            for period in [1, 100, 2_000, 10_000, 50_000, 100_000, 1_000_000] {
                for read in [false, true] {
                    let fd = timer(clock, 0, period, period);
                    if read {
                        std::thread::sleep(Duration::from_micros(200));
                        let _ = ticks(fd.try_clone().unwrap());
                    }
                    let mut trial = Trial::new();
                    let entry = trial.dump::<Timerfd>(&fd);
                    assert_ne!((entry.vsec, entry.vnsec), (0, 0), "period {period}");
                    assert!(entry.vnsec <= period.cast_unsigned());
                    let again = trial.restore::<Timerfd>(&entry);
                    std::thread::sleep(Duration::from_millis(20));
                    let first = ticks(again.try_clone().unwrap()).unwrap();
                    let most = entry.ticks + 10_000_000_000 / period.cast_unsigned() + 1;
                    let least = entry.ticks + 10_000_000 / period.cast_unsigned();
                    assert!((least..=most).contains(&first), "period {period}: {entry:?} then {first}");
                    std::thread::sleep(Duration::from_millis(5));
                    assert!(ticks(again).unwrap() >= 1, "period {period}: it stands still");
                }
            }
        }
    }

    /// As CRIU saves one that has gone off: no time left, something to be read.
    #[test]
    fn expired_without_time_left_in_the_images() {
        let fd = timer(libc::CLOCK_MONOTONIC, 0, NS, 5_000);
        let trial = Trial::new();
        let mut entry = Trial::new().dump::<Timerfd>(&fd);
        (entry.vsec, entry.vnsec, entry.ticks) = (0, 0, 7);
        let again = trial.restore::<Timerfd>(&entry);
        std::thread::sleep(Duration::from_millis(1));
        assert!(ticks(again.try_clone().unwrap()).unwrap() > 7);
        std::thread::sleep(Duration::from_millis(1));
        assert!(ticks(again).unwrap() >= 1);
        // Not armed, with an interval all the same.
        entry.ticks = 0;
        let again = trial.restore::<Timerfd>(&entry);
        assert!(ticks(again).is_err());
    }

    #[test]
    fn a_timer_that_is_not_armed_stays_so() {
        let fd = timer(libc::CLOCK_MONOTONIC, 0, 0, 5_000);
        let mut trial = Trial::new();
        let entry = trial.dump::<Timerfd>(&fd);
        assert_eq!((entry.vsec, entry.vnsec, entry.insec), (0, 0, 5_000));
        assert!(ticks(trial.restore::<Timerfd>(&entry)).is_err());
    }

    #[test]
    fn due_at_a_time_of_the_wall_clock() {
        let fd = timer(libc::CLOCK_REALTIME, libc::TFD_TIMER_ABSTIME, 3600 * NS, 0);
        let mut trial = Trial::new();
        let mut entry = trial.dump::<Timerfd>(&fd);
        let now = event::clock_now(libc::CLOCK_REALTIME).unwrap().tv_sec.cast_unsigned();
        assert!((now + 3598..=now + 3601).contains(&entry.due_sec()), "{entry:?}");
        // A restore ten minutes later: ten minutes less are left.
        entry.due_sec = Some(entry.due_sec() - 600);
        assert!((2990.0..3001.0).contains(&left(&trial.restore::<Timerfd>(&entry))));
        // A day later: it has gone off in the meantime, once.
        entry.due_sec = Some(entry.due_sec() - 86_400);
        assert_eq!(ticks(trial.restore::<Timerfd>(&entry)).unwrap(), 1);
        // Any other goes on with what was left.
        for (clock, flags, interval) in [
            (libc::CLOCK_MONOTONIC, libc::TFD_TIMER_ABSTIME, 0),
            (libc::CLOCK_REALTIME, 0, 0),
            (libc::CLOCK_REALTIME, libc::TFD_TIMER_ABSTIME, NS),
        ] {
            assert_eq!(trial.dump::<Timerfd>(&timer(clock, flags, NS, interval)).due_sec, None);
        }
    }

    #[test]
    fn alarm_clocks() {
        for clock in [libc::CLOCK_REALTIME_ALARM, libc::CLOCK_BOOTTIME_ALARM] {
            if event::timerfd(clock, libc::TFD_CLOEXEC).is_err() {
                eprintln!("skipped: no alarm clocks");
                return;
            }
            let fd = timer(clock, 0, 500 * NS, 3 * NS);
            let mut trial = Trial::new();
            let entry = trial.dump::<Timerfd>(&fd);
            assert!((400.0..=500.0).contains(&left(&trial.restore::<Timerfd>(&entry))));
        }
    }

    #[test]
    fn time_passes() {
        let after = |(sec, ns), interval_ns, ticks, gone_ns| {
            let mut entry = pb::TimerfdEntry { vsec: sec, vnsec: ns, ticks, ..Default::default() };
            (entry.isec, entry.insec) = (0, interval_ns);
            pass(&mut entry, Duration::from_nanos(gone_ns));
            ((entry.vsec, entry.vnsec), entry.ticks)
        };
        assert_eq!(after((5, 0), 0, 0, 1_000_000_001), ((3, 999_999_999), 0));
        assert_eq!(after((0, 5), 0, 0, 5), ((0, 1), 0));
        // Due at 5, 12, 19, 26.
        assert_eq!(after((0, 5), 7, 1, 4), ((0, 1), 1));
        assert_eq!(after((0, 5), 7, 1, 5), ((0, 7), 2));
        assert_eq!(after((0, 5), 7, 1, 20), ((0, 6), 4));
        assert_eq!(after((0, 5), 7, 1, 26), ((0, 7), 5));
        // Standing still at 0, which is counted; due at 7, 14, 21.
        assert_eq!(after((0, 1), 7, 1, 20), ((0, 1), 3));
        assert_eq!(after((0, 0), 7, 1, 6), ((0, 1), 1));
        assert_eq!(after((0, 0), 7, 0, 20), ((0, 0), 0), "it is not armed");
        assert_eq!(after((0, 5), 1, u64::MAX, u64::MAX), ((0, 1), u64::MAX));
    }

    #[test]
    fn crafted_times_are_refused() {
        let fd = timer(libc::CLOCK_MONOTONIC, 0, NS, 0);
        let mut entry = Trial::new().dump::<Timerfd>(&fd);
        entry.vnsec = u64::MAX;
        assert!(matches!(value(&entry), Err(FileError::Entry { .. })));
        let mut entry = Trial::new().dump::<Timerfd>(&fd);
        (entry.settime_flags, entry.due_sec) = (ABSTIME, Some(5));
        assert!(matches!(due(&entry), Err(FileError::Entry { .. })));
        (entry.clockid, entry.due_nsec) = (0, Some(u64::MAX));
        assert!(matches!(due(&entry), Err(FileError::Entry { .. })));
    }
}
