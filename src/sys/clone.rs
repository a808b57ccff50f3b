//! clone3(2) of this process into the runner: the child never runs Rust code.

use std::os::fd::AsRawFd as _;

use libc::pid_t;

use super::{Errno, Result, passing::AtWork, pid::HostPid};

/// `struct clone_args` (Linux 5.5, with set_tid).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct CloneArgs {
    /// CLONE_* flags.
    pub flags: u64,
    /// Where to store a pidfd.
    pub pidfd: u64,
    /// Where to store the child's tid in the child.
    pub child_tid: u64,
    /// Where to store the child's tid in the parent.
    pub parent_tid: u64,
    /// Signal to the parent at exit.
    pub exit_signal: u64,
    /// Lowest byte of the stack, 0: the parent's.
    pub stack: u64,
    /// Its size.
    pub stack_size: u64,
    /// Thread-local storage.
    pub tls: u64,
    /// Address of an array of `pid_t`, one for each pid namespace, innermost first.
    pub set_tid: u64,
    /// Its length.
    pub set_tid_size: u64,
    /// cgroup descriptor.
    pub cgroup: u64,
}
// SAFETY: integers only, no padding.
unsafe impl super::pod::Pod for CloneArgs {}

/// Clones this process; the child continues at `runner` with `entry` in rbx and `slot` in rbp, and with all signals blocked, so
/// that no handler of ours runs in it. Returns the child's pid. EEXIST when the wanted pid is taken.
pub fn clone_into(args: &CloneArgs, runner: u64, entry: u64, slot: u64) -> Result<HostPid> {
    if args.flags & libc::CLONE_VM as u64 != 0 {
        return Err(Errno::EINVAL);
    }
    let blocked = Blocked::all()?;
    let pid = clone_blocked(args, runner, entry, slot);
    drop(blocked);
    pid
}

/// All signals of this thread are blocked as long as it lives. Also the two that the C library keeps for itself and leaves out
/// when it is asked for all.
struct Blocked(u64);

impl Blocked {
    fn all() -> Result<Self> {
        let (all, mut old) = (u64::MAX, 0u64);
        // SAFETY: both are live words.
        super::ret(unsafe { set_mask(&raw const all, &raw mut old) })?;
        Ok(Self(old))
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the mask is a live word; the other pointer is none.
        unsafe { set_mask(&raw const self.0, std::ptr::null_mut()) };
    }
}

/// rt_sigprocmask(SIG_SETMASK).
///
/// # Safety
///
/// Both pointers are null or valid.
unsafe fn set_mask(to: *const u64, old: *mut u64) -> libc::c_long {
    // SAFETY: the caller says so.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, to, old, size_of::<u64>()) }
}

fn clone_blocked(args: &CloneArgs, runner: u64, entry: u64, slot: u64) -> Result<HostPid> {
    let pid: i64;
    // SAFETY: without CLONE_VM the child has its own copy of everything; it jumps to position-
    // independent code in a shared mapping and never returns here. The parent continues as from
    // any system call: rax, rcx and r11 are clobbered, rbx and rbp are put back.
    unsafe {
        std::arch::asm!(
            "push rbx",
            "push rbp",
            "mov rbx, r12",
            "mov rbp, r13",
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "jmp r14",
            "2:",
            "pop rbp",
            "pop rbx",
            inlateout("rax") libc::SYS_clone3 => pid,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") size_of::<CloneArgs>(),
            in("r12") entry,
            in("r13") slot,
            in("r14") runner,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if pid < 0 {
        return Err(Errno::from_raw(i32::try_from(-pid).unwrap_or(0)));
    }
    pid_t::try_from(pid).map(HostPid::new).map_err(|_| Errno::ERANGE)
}

/// Makes a child of this process with the pid `pid`, which sleeps until it is killed, or ends with the thread that made it. It
/// tells nobody of its end.
/// EEXIST when the pid is taken.
pub fn stand_in(pid: HostPid) -> Result<()> {
    let args = CloneArgs { set_tid: (&raw const pid).addr() as u64, set_tid_size: 1, ..CloneArgs::default() };
    let parent = std::process::id();
    let blocked = Blocked::all()?;
    // SAFETY: all pointers live across the calls. The child, a copy of one thread, makes nothing but system calls,
    // so it does not matter what other threads of ours were doing; all its signals are blocked, so no handler of ours runs in
    // it, and nothing but its end wakes it.
    let made = unsafe {
        let made = super::ret(libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()));
        if made == Ok(0) {
            libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
            while libc::syscall(libc::SYS_getppid) == libc::c_long::from(parent) {
                libc::syscall(libc::SYS_pause);
            }
            libc::syscall(libc::SYS_exit_group, 0);
        }
        made
    };
    drop(blocked);
    made.map(drop)
}

/// Descriptors below this are closed one by one by [`table_holder`].
const MOST_CLOSED: i32 = 1 << 16;

/// So many milliseconds [`table_holder`] waits for those who remove names ([`super::passing`]) after our end.
const MOST_WAITED: u32 = 5000;

/// Makes a child that shares the descriptor table of this process, and holds it until this process has ended.
///
/// A process that ends closes its files before it lets go of its tracees, and the close of one on a file system that does
/// not answer (FUSE, NFS) takes for ever, even after SIGKILL. As long as somebody else has the table, nothing is
/// closed. The child has a session of its own, so that what is sent to this process and its group does not reach it.
/// Nobody is told of its end but who waits for it ([`reap`]).
pub fn table_holder() -> Result<HostPid> {
    let own = super::pidfd::open(pid_t::try_from(std::process::id()).map_err(|_| Errno::ERANGE)?, 0)?;
    let mut ended = libc::pollfd { fd: own.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let args = CloneArgs { flags: libc::CLONE_FILES as u64, ..CloneArgs::default() };
    let at_work = AtWork::share()?;
    // The child keeps the number, which nobody else may get.
    std::mem::forget(own);
    // SAFETY: `args` and `ended` live across the call. The child, a copy of one thread, makes nothing but system calls
    // with memory of its own, so it does not matter what other threads of ours were doing.
    unsafe {
        let at = &raw const args;
        let pid = super::ret(libc::syscall(libc::SYS_clone3, at, size_of::<CloneArgs>()))?;
        if pid == 0 {
            libc::syscall(libc::SYS_setsid);
            libc::syscall(libc::SYS_prctl, libc::PR_SET_NAME, c"crtool-files".as_ptr());
            while libc::syscall(libc::SYS_poll, &raw mut ended, 1, -1) != 1 {}
            // Children of the process that has ended still work with these descriptors.
            let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            for _ in 0..MOST_WAITED {
                if !at_work.any() {
                    break;
                }
                libc::syscall(libc::SYS_nanosleep, &raw const pause, 0);
            }
            // One after another: what lies before a file that hangs (locks, sockets) is let go all the same.
            for fd in 0..MOST_CLOSED {
                libc::syscall(libc::SYS_close, fd);
            }
            libc::syscall(libc::SYS_exit_group, 0);
        }
        pid_t::try_from(pid).map(HostPid::new).map_err(|_| Errno::ERANGE)
    }
}

/// Waits for the end of a child.
pub fn reap(pid: HostPid) {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(pid.get(), std::ptr::null_mut(), libc::__WALL) } == -1
        && Errno::last() == Errno::EINTR
    {}
}
