//! Timers of the kernel: one that sends this process a signal, one to be polled.
//!
//! A signal from a timer reaches a process whatever its threads are doing: SIGKILL ends one that is stopped or sleeps
//! in the kernel, SIGCONT continues one that is stopped.

use std::{
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

use super::{Result, ret_int};

/// Once, `after` from now; never, for `None`.
fn once(after: Option<Duration>) -> libc::itimerspec {
    // A time of zero would disarm the timer.
    let after = after.map_or(Duration::ZERO, |after| after.max(Duration::from_nanos(1)));
    let seconds = libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX);
    libc::itimerspec {
        it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: libc::timespec { tv_sec: seconds, tv_nsec: after.subsec_nanos().into() },
    }
}

/// Sends this process a signal when its time has come. Gone after exec, and not inherited by children.
pub struct SignalTimer(libc::timer_t);

// SAFETY: an id of the kernel's, which may be used by any thread of the process.
unsafe impl Send for SignalTimer {}

impl std::fmt::Debug for SignalTimer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SignalTimer")
    }
}

impl SignalTimer {
    /// A timer for `signal`, not armed.
    pub fn new(signal: i32) -> Result<Self> {
        // SAFETY: zero is a valid start for the struct.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = signal;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both are live.
        ret_int(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) })?;
        Ok(Self(timer))
    }

    /// Sends the signal once, `after` from now; not at all, for `None`.
    pub fn set(&self, after: Option<Duration>) -> Result<()> {
        let when = once(after);
        // SAFETY: the timer is ours, the old value is not wanted.
        ret_int(unsafe { libc::timer_settime(self.0, 0, &raw const when, std::ptr::null_mut()) }).map(drop)
    }
}

impl Drop for SignalTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// A timer that is readable when its time has come (timerfd).
#[derive(Debug)]
pub struct PollTimer(OwnedFd);

impl PollTimer {
    /// Not armed.
    pub fn new() -> Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: no pointers.
        let fd = ret_int(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
        // SAFETY: just made, owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Becomes readable once, `after` from now; not at all, for `None`. What it was before is forgotten.
    pub fn set(&self, after: Option<Duration>) -> Result<()> {
        let when = once(after);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&self.0);
        // SAFETY: `when` is live, the old value is not wanted.
        ret_int(unsafe { libc::timerfd_settime(fd, 0, &raw const when, std::ptr::null_mut()) }).map(drop)
    }
}

impl AsFd for PollTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Ends the process at once with this status: no destructors, no handlers, no buffers, whatever other threads hold.
pub fn exit_now(status: u8) -> ! {
    // SAFETY: the kernel ends all threads.
    unsafe { libc::_exit(status.into()) }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn is_readable_when_its_time_has_come() {
        let timer = PollTimer::new().unwrap();
        let readable = |ms: u16| poll(&mut [PollFd::new(timer.as_fd(), PollFlags::POLLIN)], ms).unwrap() == 1;
        assert!(!readable(20));
        timer.set(Some(Duration::ZERO)).unwrap();
        assert!(readable(1000));
        timer.set(None).unwrap();
        assert!(!readable(20));
    }

    /// SIGURG is ignored by default: what counts is that the kernel takes the timer.
    #[test]
    fn a_signal_timer_can_be_set_and_unset() {
        for signal in [libc::SIGKILL, libc::SIGCONT, libc::SIGURG] {
            let timer = SignalTimer::new(signal).unwrap();
            timer.set(Some(Duration::from_secs(1000))).unwrap();
            timer.set(None).unwrap();
        }
        SignalTimer::new(libc::SIGURG).unwrap().set(Some(Duration::ZERO)).unwrap();
        assert!(SignalTimer::new(1000).is_err());
    }
}
