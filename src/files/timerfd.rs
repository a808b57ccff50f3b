//! timerfd(2): a timer whose expirations are read.
//!
//! Saved: clock, time left (also for absolute timers, as CRIU), interval, flags of the last timerfd_settime, and expirations
//! not yet read. A timer runs on while the tree is frozen; it starts again in the last step of a restore.

use std::os::fd::BorrowedFd;

use super::{DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, flags, kind::packed_in};
use crate::{image::pb, proc::fdinfo, sys::event};

const ABSTIME: u32 = libc::TFD_TIMER_ABSTIME.cast_unsigned();
const NS: i64 = 1_000_000_000;

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

    fn dump(_cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        // A periodic timer that nobody reads stands still after its first expiration; asking for the time left
        // makes the kernel count what it missed, so fdinfo is right only after that.
        event::timerfd_gettime(fd.file()?).map_err(FileError::sys("read the time left of a timer"))?;
        let path = format!("/proc/{}/fdinfo/{}", fd.pid, fd.fd);
        let text = std::fs::read(&path).map_err(|e| {
            FileError::path("read", path.as_bytes())(crate::sys::Errno::from_raw(
                e.raw_os_error().unwrap_or(0),
            ))
        })?;
        let timer = fdinfo::parse(&text)?.timerfd.ok_or(FileError::unsupported(
            "the kernel does not tell the state of this timer",
            "a kernel with CONFIG_PROC_FS and CONFIG_CHECKPOINT_RESTORE does",
        ))?;
        Ok(pb::TimerfdEntry {
            id,
            flags: fd.flags(),
            fown: fd.fown()?,
            clockid: timer.clockid.cast_unsigned(),
            ticks: timer.ticks,
            settime_flags: timer.settime_flags,
            vsec: timer.it_value.0,
            vnsec: timer.it_value.1,
            isec: timer.it_interval.0,
            insec: timer.it_interval.1,
        })
    }

    fn open(_cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        value(entry)?;
        let fd = event::timerfd(entry.clockid.cast_signed(), libc::TFD_CLOEXEC)
            .map_err(FileError::sys("create a timer (alarm clocks need CAP_WAKE_ALARM)"))?;
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn before_resume(
        _cx: &mut RestoreCx<'_>,
        entry: &Self::Entry,
        fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        let mut value = value(entry)?;
        let armed = value.it_value.tv_sec != 0 || value.it_value.tv_nsec != 0;
        if armed && entry.settime_flags & ABSTIME != 0 {
            let now = event::clock_now(entry.clockid.cast_signed())
                .map_err(FileError::sys("read the clock of a timer"))?;
            let ns = now.tv_nsec + value.it_value.tv_nsec;
            value.it_value.tv_nsec = ns % NS;
            value.it_value.tv_sec = value
                .it_value
                .tv_sec
                .checked_add(now.tv_sec + ns / NS)
                .ok_or(FileError::entry(entry.id, "its time left is too long"))?;
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

/// Time left and interval, checked.
fn value(entry: &pb::TimerfdEntry) -> Result<libc::itimerspec, FileError> {
    let time = |sec: u64, ns: u64| match (i64::try_from(sec), i64::try_from(ns)) {
        (Ok(tv_sec), Ok(tv_nsec)) if tv_nsec < NS => Ok(libc::timespec { tv_sec, tv_nsec }),
        _ => Err(FileError::entry(entry.id, format!("{sec} s {ns} ns is no time"))),
    };
    Ok(libc::itimerspec {
        it_value: time(entry.vsec, entry.vnsec)?,
        it_interval: time(entry.isec, entry.insec)?,
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

    #[test]
    fn crafted_times_are_refused() {
        let fd = timer(libc::CLOCK_MONOTONIC, 0, NS, 0);
        let mut entry = Trial::new().dump::<Timerfd>(&fd);
        entry.vnsec = u64::MAX;
        assert!(matches!(value(&entry), Err(FileError::Entry { .. })));
    }
}
