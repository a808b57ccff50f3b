//! Probes about open files.

use std::{
    cmp::Ordering,
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::MetadataExt as _,
    },
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    timerfd::{ClockId, TimerFd, TimerFlags},
};

use super::{Trouble, call, child::Script, expect};
use crate::sys::{self, Errno, mapping, pid::HostPid, pod};

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
    let pid = HostPid::own();
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

/// A file of an overlay, mapped, is the file that is open, and not the one below it.
pub(super) fn overlay_maps() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    let private = u64::from((libc::MS_REC | libc::MS_PRIVATE) as u32);
    let apart = script.call(libc::SYS_unshare, &[libc::CLONE_NEWNS.into()]);
    let [none, root, tmp, tmpfs, overlay] =
        [&b"none\0"[..], b"/\0", b"/tmp\0", b"tmpfs\0", b"overlay\0"].map(|text| script.data(text));
    script.call(libc::SYS_mount, &[none.into(), root.into(), 0.into(), private.into(), 0.into()]);
    script.call(libc::SYS_mount, &[none.into(), tmp.into(), tmpfs.into(), 0.into(), 0.into()]);
    for dir in [&b"/tmp/lower\0"[..], b"/tmp/upper\0", b"/tmp/work\0", b"/tmp/merged\0"] {
        let dir = script.data(dir);
        script.call(libc::SYS_mkdir, &[dir.into(), 0o755.into()]);
    }
    let open = |script: &mut Script, path: &[u8], flags: i32| {
        let path = script.data(path);
        script.call(
            libc::SYS_openat,
            &[libc::AT_FDCWD.into(), path.into(), (flags | libc::O_CLOEXEC).into(), 0o600.into()],
        )
    };
    open(&mut script, b"/tmp/lower/file\0", libc::O_CREAT | libc::O_RDWR);
    let merged = script.data(b"/tmp/merged\0");
    let layers = script.data(b"lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work\0");
    let mounted = script
        .call(libc::SYS_mount, &[overlay.into(), merged.into(), overlay.into(), 0.into(), layers.into()]);
    let fd = open(&mut script, b"/tmp/merged/file\0", libc::O_RDONLY);
    let at = script.call(
        libc::SYS_mmap,
        &[0.into(), 4096.into(), libc::PROT_READ.into(), libc::MAP_PRIVATE.into(), fd.into(), 0.into()],
    );
    let child = call("fork", script.start())?;
    call("unshare", child.result(apart))?;
    call("mount of an overlay", child.result(mounted))?;
    let (fd, at) = (call("open", child.result(fd))?, call("mmap", child.result(at))?);
    let id = |path: String| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).map_err(Trouble::Proc);
    let proc = format!("/proc/{}", child.pid());
    let mapped = id(format!("{proc}/map_files/{at:x}-{:x}", at + 4096))?;
    expect(mapped == id(format!("{proc}/fd/{fd}"))?, "what is mapped seems to be another file")
}
