//! Waits that end in time: signals that interrupt blocking calls.
//!
//! While a [`Ticker`] lives, SIGALRM comes ten times a second or more often, and SIGCHLD when a child or a tracee has ended (not when
//! it has stopped). Their handler does nothing but end blocking calls with EINTR, so that a wait can look at its
//! deadline and at signals held back.
//!
//! Some calls the kernel restarts whatever the handler: PTRACE_SEIZE waits for a lock that an execve holds until
//! the tracer has taken the exit reports of its other threads, which it cannot while it waits for the lock.
//! [`interruptible`] makes a call from which the handler comes back with EINTR also there.

use std::arch::global_asm;

use super::{Errno, Result, ret_int};

global_asm!(
    ".globl crtool_interruptible",
    ".globl crtool_interruptible_call",
    ".globl crtool_interruptible_end",
    "crtool_interruptible:",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    // A call to be restarted has its instruction pointer here again.
    "crtool_interruptible_call:",
    "syscall",
    "crtool_interruptible_end:",
    "ret",
);

unsafe extern "C" {
    fn crtool_interruptible(nr: i64, a: u64, b: u64, c: u64, d: u64) -> i64;
    static crtool_interruptible_call: u8;
    static crtool_interruptible_end: u8;
}

/// A system call that every signal with a handler of a [`Ticker`] ends with EINTR, also one that arrives just before
/// it or that the kernel would restart. It must be one that has no effect when it is interrupted.
///
/// # Safety
/// As for the system call itself.
pub(super) unsafe fn interruptible(nr: i64, args: [u64; 4]) -> Result<i64> {
    // SAFETY: the caller answers for the call; the code follows the C calling convention.
    let result = unsafe { crtool_interruptible(nr, args[0], args[1], args[2], args[3]) };
    match i32::try_from(-result) {
        Ok(errno @ 1..=4095) => Err(Errno::from_raw(errno)),
        _ => Ok(result),
    }
}

/// Ends an [`interruptible`] call; anything else it interrupts is left alone.
extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let begin = (crtool_interruptible as *const ()).addr();
    let call = (&raw const crtool_interruptible_call).addr();
    let end = (&raw const crtool_interruptible_end).addr();
    // SAFETY: the kernel hands a handler with SA_SIGINFO the context it will go back to.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize].cast_unsigned() as usize;
    if (begin..=call).contains(&at) {
        registers[libc::REG_RIP as usize] = end as i64;
        registers[libc::REG_RAX as usize] = -i64::from(libc::EINTR);
    }
}

const SIGNALS: [i32; 2] = [libc::SIGALRM, libc::SIGCHLD];

/// Puts the former handlers back when dropped.
pub struct Ticker {
    old: [libc::sigaction; 2],
}

impl std::fmt::Debug for Ticker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticker")
    }
}

/// Microseconds between two signals, as a rule.
const CALM: i64 = 100_000;
/// And while threads are being stopped: each of those that execute programs may cost several of them.
const BUSY: i64 = 5_000;

fn set_timer(usec: i64) -> Result<()> {
    let every = libc::timeval { tv_sec: 0, tv_usec: usec };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: `timer` is live; the old value is not wanted.
    ret_int(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) }).map(drop)
}

fn set_handler(signal: i32) -> Result<libc::sigaction> {
    // SAFETY: the handler touches nothing but the context it is given; both structs are live, zero is a valid
    // start for them.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = interrupt as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_NOCLDSTOP;
        let mut old: libc::sigaction = std::mem::zeroed();
        ret_int(libc::sigaction(signal, &raw const new, &raw mut old))?;
        Ok(old)
    }
}

impl Ticker {
    /// Installs the handlers and starts the timer.
    pub fn start() -> Result<Self> {
        let old = [set_handler(SIGNALS[0])?, set_handler(SIGNALS[1])?];
        let this = Self { old };
        set_timer(CALM)?;
        Ok(this)
    }

    /// SIGALRM comes more often while `work` is done.
    pub fn busy<R>(&self, work: impl FnOnce() -> R) -> R {
        // The timer is there already: it cannot be refused.
        let _ = set_timer(BUSY);
        let result = work();
        let _ = set_timer(CALM);
        result
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        let _ = set_timer(0);
        for (signal, old) in SIGNALS.iter().zip(&self.old) {
            // SAFETY: `old` came from the kernel for this signal.
            unsafe { libc::sigaction(*signal, &raw const *old, std::ptr::null_mut()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own: the timer's signals go to one that does not block them, which may be any.
    #[test]
    fn ends_a_call_that_the_kernel_would_restart() {
        let handler = set_handler(libc::SIGUSR2).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            // SAFETY: no pointers.
            sender.send(unsafe { libc::pthread_self() }).unwrap();
            let (mut word, mut ours) = ([0i32; 2], 0u64);
            // SAFETY: a pipe of our own; a read of it has no effect when it is interrupted.
            unsafe {
                assert_eq!(libc::pipe(word.as_mut_ptr()), 0);
                let args = [word[0] as u64, (&raw mut ours) as u64, 8, 0];
                interruptible(libc::SYS_read, args)
            }
        });
        let thread = receiver.recv().unwrap();
        // Whether it comes before the call, in it, or long after: it ends it.
        let result = loop {
            // SAFETY: the thread is not joined yet.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR2) };
            std::thread::sleep(std::time::Duration::from_millis(1));
            if waiter.is_finished() {
                break waiter.join().unwrap();
            }
        };
        assert_eq!(result, Err(Errno::EINTR));
        // SAFETY: as it was before.
        unsafe { libc::sigaction(libc::SIGUSR2, &raw const handler, std::ptr::null_mut()) };
    }

    #[test]
    fn a_call_that_nobody_interrupts_gives_its_result() {
        // SAFETY: no pointers.
        let (own, bad) = unsafe {
            (interruptible(libc::SYS_getpid, [0; 4]), interruptible(libc::SYS_close, [u64::MAX, 0, 0, 0]))
        };
        assert_eq!((own, bad), (Ok(i64::from(std::process::id())), Err(Errno::EBADF)));
    }
}
