//! Ctrl-C and friends, taken at safe points only.
//!
//! A command that must not be cut off in the middle calls [`watch`] first: from then on SIGINT, SIGTERM,
//! SIGHUP and SIGXCPU (a limit of processor time) wait. Between its steps it calls [`check`]; an error there goes up through the guards, which put
//! everything back. A library user who never calls `watch` keeps the signals as they were.

use std::sync::{
    OnceLock,
    atomic::{AtomicI32, Ordering},
};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd, siginfo},
    },
};

static WATCH: OnceLock<SignalFd> = OnceLock::new();
static SEEN: AtomicI32 = AtomicI32::new(0);

/// The user wants us to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by {signal}")]
pub struct Interrupted {
    /// How we were told.
    pub signal: Signal,
}

/// Holds the signals back until the end of the process. Threads made from here on hold them back too.
pub fn watch() -> Result<&'static SignalFd, Errno> {
    if let Some(fd) = WATCH.get() {
        return Ok(fd);
    }
    let signals =
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGXCPU].into_iter().collect::<SigSet>();
    signals.thread_block()?;
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    Ok(WATCH.get_or_init(|| fd))
}

/// Becomes readable when a signal has come; `None` if nobody watches.
pub(crate) fn watched() -> Option<&'static SignalFd> {
    WATCH.get()
}

/// An error once a signal has come; costs one read.
pub fn check() -> Result<(), Interrupted> {
    check_those(|_| true)
}

/// As [`check`], passing over signals that are not `meant` for us.
pub(crate) fn check_those(meant: impl Fn(&siginfo) -> bool) -> Result<(), Interrupted> {
    let Some(fd) = WATCH.get() else { return Ok(()) };
    if let Ok(Some(info)) = fd.read_signal()
        && meant(&info)
        && let Ok(number) = i32::try_from(info.ssi_signo)
    {
        SEEN.store(number, Ordering::Relaxed);
    }
    match Signal::try_from(SEEN.load(Ordering::Relaxed)) {
        Ok(signal) => Err(Interrupted { signal }),
        Err(_) => Ok(()),
    }
}

/// A signal that has come, after which [`check`] waits for the next one: for who has been told and cannot end yet.
pub(crate) fn forget() -> Option<Interrupted> {
    let seen = check().err();
    SEEN.store(0, Ordering::Relaxed);
    seen
}
