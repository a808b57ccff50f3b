//! A forked child that does nothing but a list of system calls: for asking the kernel by effect what it can do,
//! without touching this process.

use libc::{c_long, pid_t};

use super::{Result, mapping::Mapping, ret_int};

/// An argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// A value; an address of ours is one too, the child has a copy of our memory there.
    Val(u64),
    /// What call number N of the list returned.
    Result(usize),
}

/// One call.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub nr: c_long,
    /// Its arguments.
    pub args: [Word; 6],
}

/// What stands in `results` for a call that was not made (yet).
pub const NOT_MADE: i64 = i64::MIN;

/// Forks a child that makes `calls` in order, stores what the kernel returned (negative for an error) into
/// `results`, eight bytes each, and then sleeps until it is killed. It dies with us. ERANGE when `results` is
/// too short. Where a call makes another process, that process ends at once.
pub fn fork_calls(calls: &[Call], results: &Mapping) -> Result<pid_t> {
    for (index, _) in calls.iter().enumerate() {
        results.write(index * 8, &NOT_MADE.to_ne_bytes())?;
    }
    let base = results.addr() as *mut i64;
    let parent = std::process::id();
    // SAFETY: between here and its death the child only makes raw system calls and touches `results` and
    // `calls`, which it has copies of: no allocation, no lock, no destructor.
    let pid = ret_int(unsafe { libc::fork() })?;
    if pid == 0 {
        // SAFETY: in the child, see above; `base` has room for all of `calls`, checked before the fork.
        unsafe { child(calls, base, parent) }
    }
    Ok(pid)
}

/// # Safety
/// Only in a child that has just been forked; `results` has room for `calls`.
unsafe fn child(calls: &[Call], results: *mut i64, parent: u32) -> ! {
    // SAFETY: raw calls; what they do to memory they do to this child alone. Indices are in range.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // It may have died before that.
        if libc::getppid().cast_unsigned() != parent {
            libc::_exit(0);
        }
        for (index, call) in calls.iter().enumerate() {
            let mut args = [0u64; 6];
            for (arg, word) in args.iter_mut().zip(&call.args) {
                *arg = match *word {
                    Word::Val(value) => value,
                    Word::Result(n) => results.add(n.min(index)).read_volatile().cast_unsigned(),
                };
            }
            let [a, b, c, d, e, f] = args;
            let mut value = libc::syscall(call.nr, a, b, c, d, e, f);
            if value == -1 {
                value = -c_long::from(*libc::__errno_location());
            }
            let forks = matches!(call.nr, libc::SYS_clone3 | libc::SYS_clone | libc::SYS_fork);
            if forks && value == 0 {
                libc::_exit(0);
            }
            results.add(index).write_volatile(value);
        }
        loop {
            libc::pause();
        }
    }
}
