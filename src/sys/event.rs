//! timerfd, signalfd, epoll, inotify, memfd: descriptors that stand for kernel objects of their own.

use std::{
    ffi::CStr,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use super::{Result, ret_int};

/// Takes a number the kernel has just made.
fn owned(fd: i32) -> Result<OwnedFd> {
    let fd = ret_int(fd)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// timerfd_create(clock, flags).
pub fn timerfd(clock: i32, flags: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    owned(unsafe { libc::timerfd_create(clock, flags) })
}

/// timerfd_gettime: time left and interval. Catches up with expirations of a periodic timer that nobody has read.
pub fn timerfd_gettime(fd: BorrowedFd<'_>) -> Result<libc::itimerspec> {
    let mut value = MaybeUninit::<libc::itimerspec>::zeroed();
    // SAFETY: the kernel fills the struct.
    ret_int(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), value.as_mut_ptr()) })?;
    // SAFETY: plain integers, zeroed and then filled.
    Ok(unsafe { value.assume_init() })
}

/// timerfd_settime.
pub fn timerfd_settime(fd: BorrowedFd<'_>, flags: i32, value: &libc::itimerspec) -> Result<()> {
    // SAFETY: `value` is read; no old value is asked for.
    ret_int(unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, value, std::ptr::null_mut()) })?;
    Ok(())
}

/// TFD_IOC_SET_TICKS: expirations that were not read yet; not 0. Needs CONFIG_CHECKPOINT_RESTORE.
pub fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> Result<()> {
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: the kernel reads one u64.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) })?;
    Ok(())
}

/// clock_gettime.
pub fn clock_now(clock: i32) -> Result<libc::timespec> {
    let mut now = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the kernel fills the struct.
    ret_int(unsafe { libc::clock_gettime(clock, now.as_mut_ptr()) })?;
    // SAFETY: plain integers, zeroed and then filled.
    Ok(unsafe { now.assume_init() })
}

/// signalfd4(-1, mask, flags): signal N is bit N - 1.
pub fn signalfd(mask: u64, flags: i32) -> Result<OwnedFd> {
    // The raw call: glibc's own mask type is larger than the kernel's.
    // SAFETY: the kernel reads 8 bytes.
    let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, flags) };
    owned(fd as i32)
}

/// epoll_create1(flags).
pub fn epoll(flags: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    owned(unsafe { libc::epoll_create1(flags) })
}

/// EPOLL_CTL_ADD of our descriptor `target`.
#[cfg(test)]
pub fn epoll_add(epoll: BorrowedFd<'_>, target: i32, events: u32, data: u64) -> Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: `event` is read.
    ret_int(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, target, &raw mut event) })?;
    Ok(())
}

/// Takes at most one event, without waiting: true when there was one.
#[cfg(test)]
pub fn epoll_take(epoll: BorrowedFd<'_>) -> Result<bool> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: the kernel writes at most one event.
    Ok(ret_int(unsafe { libc::epoll_wait(epoll.as_raw_fd(), &raw mut event, 1, 0) })? > 0)
}

/// inotify_init1(flags).
pub fn inotify(flags: i32) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    owned(unsafe { libc::inotify_init1(flags) })
}

/// inotify_add_watch: the watch descriptor.
pub fn inotify_add(fd: BorrowedFd<'_>, path: &CStr, mask: u32) -> Result<i32> {
    // SAFETY: `path` is a terminated string.
    ret_int(unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) })
}

/// inotify_rm_watch.
pub fn inotify_remove(fd: BorrowedFd<'_>, wd: i32) -> Result<()> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::inotify_rm_watch(fd.as_raw_fd(), wd) })?;
    Ok(())
}

/// memfd_create(name, flags).
pub fn memfd(name: &CStr, flags: u32) -> Result<OwnedFd> {
    // SAFETY: `name` is a terminated string.
    owned(unsafe { libc::memfd_create(name.as_ptr(), flags) })
}

/// F_GET_SEALS.
pub fn seals(fd: BorrowedFd<'_>) -> Result<u32> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) }).map(i32::cast_unsigned)
}

/// F_ADD_SEALS.
pub fn add_seals(fd: BorrowedFd<'_>, seals: u32) -> Result<()> {
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(())
}
