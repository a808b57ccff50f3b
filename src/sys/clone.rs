//! clone3(2) of this process into the runner: the child never runs Rust code.

use libc::pid_t;

use super::{Errno, Result};

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

/// Clones this process; the child continues at `runner` with `entry` in rbx and `slot` in rbp.
/// Returns the child's pid. EEXIST when the wanted pid is taken.
pub fn clone_into(args: &CloneArgs, runner: u64, entry: u64, slot: u64) -> Result<pid_t> {
    if args.flags & libc::CLONE_VM as u64 != 0 {
        return Err(Errno::EINVAL);
    }
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
    pid_t::try_from(pid).map_err(|_| Errno::ERANGE)
}

/// Makes a child of this process with the pid `pid`, which waits until it is killed, and ends with us at the latest. It tells
/// nobody of its end. EEXIST when the pid is taken.
pub fn stand_in(pid: pid_t) -> Result<()> {
    // With our descriptors, not copies of them: what we close is closed.
    let args = CloneArgs {
        flags: libc::CLONE_FILES as u64,
        set_tid: (&raw const pid).addr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: no pointers.
    let parent = unsafe { libc::getpid() };
    // SAFETY: `args` and `pid` live across the call. The child, a copy of one thread, makes nothing but system calls without
    // memory, so it does not matter what other threads of ours were doing.
    unsafe {
        let at = &raw const args;
        if super::ret(libc::syscall(libc::SYS_clone3, at, size_of::<CloneArgs>()))? == 0 {
            libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            // We may have ended before it asked for that.
            while libc::syscall(libc::SYS_getppid) == libc::c_long::from(parent) {
                libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
            }
            libc::syscall(libc::SYS_exit_group, 0);
        }
    }
    Ok(())
}

/// Waits for the end of a child.
pub fn reap(pid: pid_t) {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) } == -1
        && Errno::last() == Errno::EINTR
    {}
}
