//! Raw calls of a tree that looks at signals: the only unsafe code here.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static HANDLED: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];

extern "C" fn count(signal: i32) {
    HANDLED[usize::from(signal == libc::SIGCHLD)].fetch_add(1, Ordering::SeqCst);
}

/// From now on each SIGCONT and each SIGCHLD is counted.
pub fn count_signals() {
    let action = SigAction::new(SigHandler::Handler(count), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGCONT, Signal::SIGCHLD] {
        // SAFETY: the handler does nothing but count.
        unsafe { sigaction(signal, &action) }.expect("a handler");
    }
}

/// How many there have been of each since the last call.
pub fn counted() -> [u32; 2] {
    HANDLED.each_ref().map(|count| count.swap(0, Ordering::SeqCst))
}

/// Takes a signal that waits, if there is one: its `si_code`.
pub fn take(signal: Signal) -> Option<i32> {
    let set: SigSet = [signal].into_iter().collect();
    // SAFETY: zeros are a siginfo, and a time.
    let (mut info, now): (libc::siginfo_t, libc::timespec) = unsafe { std::mem::zeroed() };
    let set: *const libc::sigset_t = set.as_ref();
    // SAFETY: all three are live. The C library's front would not tell what was sent to a thread.
    let got = unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, set, &raw mut info, &raw const now, 8) };
    (got == i64::from(signal as i32)).then_some(info.si_code)
}
