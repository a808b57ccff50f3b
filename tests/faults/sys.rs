//! The raw calls of the fault tests.
#![allow(unsafe_code)]

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

/// How often the handler has seen SIGALRM.
pub static TICKS: AtomicU64 = AtomicU64::new(0);
/// How often it has seen any other signal.
pub static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handler(signal: libc::c_int) {
    let count = if signal == libc::SIGALRM { &TICKS } else { &HANDLED };
    count.fetch_add(1, Ordering::SeqCst);
}

/// Counts `signal` in [`HANDLED`] or [`TICKS`]; with `restart`, interrupted calls go on.
pub fn count_signal(signal: i32, restart: bool) {
    // SAFETY: a structure of numbers.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = if restart { libc::SA_RESTART } else { 0 };
    // SAFETY: the handler only adds to an atomic; the structure is complete.
    let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    assert!(result == 0, "sigaction");
}

/// SIGALRM every `micros`.
pub fn tick(micros: i64) {
    let every = libc::timeval { tv_sec: 0, tv_usec: micros };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: a complete structure, and nowhere to put the old one.
    let result = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    assert!(result == 0, "setitimer");
}

/// Sends `signal` to the calling thread.
pub fn raise(signal: i32) {
    // SAFETY: no pointers.
    unsafe { libc::raise(signal) };
}

/// Makes a child that does nothing, and waits for it as a vfork does: in a sleep that no signal ends.
pub fn stuck() {
    let flags = libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is a fork: the child has its own memory and stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid == 0 {
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
}

/// What the caller's shell left open is not for the trial.
pub fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}
