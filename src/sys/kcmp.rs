//! kcmp(2): are two kernel objects of two tasks the same one?

use std::cmp::Ordering;

use super::{Errno, Result, pid::HostPid, ret};

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Kind {
    /// Open file descriptions of two descriptors.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// cwd, root and umask.
    Fs = 3,
    /// Signal handlers.
    Sighand = 4,
    /// System V semaphore undo lists.
    Sysvsem = 6,
}

fn order(value: libc::c_long) -> Result<Ordering> {
    match value {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 | 3 => Ok(Ordering::Greater),
        _ => Err(Errno::EINVAL),
    }
}

/// Compares object `kind` of two tasks; `a` and `b` are descriptor numbers for [`Kind::File`].
/// The order is total and stable while both live.
pub fn kcmp(pid1: HostPid, pid2: HostPid, kind: Kind, a: u64, b: u64) -> Result<Ordering> {
    // SAFETY: no pointers are passed.
    order(ret(unsafe { libc::syscall(libc::SYS_kcmp, pid1.get(), pid2.get(), kind as i32, a, b) })?)
}

#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

/// Is descriptor `fd` of `pid1` the target that epoll `efd` of `pid2` registered as `tfd`,
/// the `toff`-th such registration? ENOENT when there is none.
pub fn kcmp_epoll(pid1: HostPid, fd: u32, pid2: HostPid, efd: u32, tfd: u32, toff: u32) -> Result<Ordering> {
    let slot = EpollSlot { efd, tfd, toff };
    // SAFETY: `slot` lives across the call.
    order(ret(unsafe {
        libc::syscall(libc::SYS_kcmp, pid1.get(), pid2.get(), 7, u64::from(fd), &raw const slot)
    })?)
}
