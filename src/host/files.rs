//! Probes about open files.

use std::{
    cmp::Ordering,
    fs::{self, File},
    os::fd::{AsFd, AsRawFd},
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    timerfd::{ClockId, TimerFd, TimerFlags},
};

use super::{Trouble, call, child::Script, expect};
use crate::sys::{self, Errno, mapping, pod};

fn fdinfo(fd: &impl AsFd) -> Result<String, Trouble> {
    let fd = fd.as_fd().as_raw_fd();
    fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(Trouble::Proc)
}

/// The mount of an open file is told.
pub(super) fn mnt_id() -> Result<(), Trouble> {
    let file = File::open("/").map_err(Trouble::Proc)?;
    expect(fdinfo(&file)?.contains("\nmnt_id:\t"), "fdinfo has no mnt_id")
}

/// The locks of an open file are told.
pub(super) fn fdinfo_lock() -> Result<(), Trouble> {
    let file = File::from(call("memfd_create", mapping::memfd(c"probe", 1))?);
    file.lock().map_err(Trouble::Proc)?;
    expect(fdinfo(&file)?.contains("\nlock:\t"), "fdinfo has no locks")
}

/// The state of a timerfd is told.
pub(super) fn timerfd() -> Result<(), Trouble> {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC);
    let info = fdinfo(&call("timerfd_create", timer)?)?;
    expect(info.contains("\nclockid: 1\n") && info.contains("\nit_value: "), "fdinfo does not tell the state")
}

/// What an epoll descriptor watches is told apart by the open file.
pub(super) fn kcmp_epoll() -> Result<(), Trouble> {
    let epoll = call("epoll_create", Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC))?;
    let [watched, other] = {
        let (a, b) = call("pipe", nix::unistd::pipe())?;
        [a, b]
    };
    let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
    call("epoll_ctl", epoll.add(&watched, event))?;
    let number = |fd: &dyn AsRawFd| fd.as_raw_fd().unsigned_abs();
    let pid = nix::unistd::getpid().as_raw();
    let (efd, tfd) = (number(&epoll.0), number(&watched));
    let same = |fd| call("KCMP_EPOLL_TFD", sys::kcmp::kcmp_epoll(pid, fd, pid, efd, tfd, 0));
    expect(
        same(tfd)? == Ordering::Equal && same(number(&other))? != Ordering::Equal,
        "watched files are not told apart",
    )
}

/// Restrictions on how a path is walked are kept.
pub(super) fn openat2() -> Result<(), Trouble> {
    const RESOLVE_NO_MAGICLINKS: u64 = 2;
    let mut script = call("pipe", Script::new())?;
    let flags = u64::from(libc::O_RDONLY.unsigned_abs());
    let how = script.data(pod::bytes_of(&[flags, 0, RESOLVE_NO_MAGICLINKS]));
    let plain = script.data(b"/proc/self/status\0");
    let magic = script.data(b"/proc/self/exe\0");
    let [plain, magic] = [plain, magic].map(|path| {
        script.call(libc::SYS_openat2, &[libc::AT_FDCWD.into(), path.into(), how.into(), 24.into()])
    });
    let child = call("fork", script.start())?;
    call("openat2", child.result(plain))?;
    expect(child.result(magic) == Err(Errno::ELOOP), "restrictions have no effect")
}

/// The login uid is told.
pub(super) fn loginuid() -> Result<(), Trouble> {
    let text = fs::read_to_string("/proc/self/loginuid").map_err(Trouble::Proc)?;
    expect(text.trim().parse::<u32>().is_ok(), "it is no number")
}

/// The file system is there.
pub(super) fn autofs() -> Result<(), Trouble> {
    let text = fs::read_to_string("/proc/filesystems").map_err(Trouble::Proc)?;
    let found = text.lines().any(|line| line.split_whitespace().next_back() == Some("autofs"));
    expect(found, "the kernel has no such file system")
}
