//! Waits that end in time: a timer that interrupts blocking calls.
//!
//! While a [`Ticker`] lives, SIGALRM comes ten times a second and does nothing but end blocking
//! calls with EINTR, so that a wait can look at its deadline and at signals held back.

use super::{Result, ret_int};

extern "C" fn nothing(_: i32) {}

/// Puts the former handler back when dropped.
pub struct Ticker {
    old: libc::sigaction,
}

impl std::fmt::Debug for Ticker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticker")
    }
}

fn set_timer(usec: i64) -> Result<()> {
    let every = libc::timeval { tv_sec: 0, tv_usec: usec };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: `timer` is live; the old value is not wanted.
    ret_int(unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) }).map(drop)
}

impl Ticker {
    /// Installs the handler and starts the timer.
    pub fn start() -> Result<Self> {
        // SAFETY: the handler does nothing; both structs are live, zero is a valid start for them.
        let old = unsafe {
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = nothing as *const () as usize;
            let mut old: libc::sigaction = std::mem::zeroed();
            ret_int(libc::sigaction(libc::SIGALRM, &raw const new, &raw mut old))?;
            old
        };
        set_timer(100_000)?;
        Ok(Self { old })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        let _ = set_timer(0);
        // SAFETY: `old` came from the kernel for this signal.
        unsafe { libc::sigaction(libc::SIGALRM, &raw const self.old, std::ptr::null_mut()) };
    }
}
