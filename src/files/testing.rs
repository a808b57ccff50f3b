//! Round trips of kinds through the test process.

use std::{
    cell::OnceCell,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use nix::unistd::Pid;

use super::{DumpCx, FdView, FileKind, Opened, RestoreCx, Stat, fd_view::Source};
use crate::{
    image::MemStore,
    proc::fdinfo,
    settings::{DumpSettings, RestoreSettings},
    sys::pid::HostPid,
};

/// Runs `look` with the view of one of our own descriptors.
pub(super) fn with_view<T>(fd: &OwnedFd, look: impl FnOnce(&FdView<'_>) -> T) -> T {
    let number = fd.as_raw_fd();
    let link = nix::fcntl::readlink(format!("/proc/self/fd/{number}").as_str()).unwrap();
    let info = fdinfo::parse(&std::fs::read(format!("/proc/self/fdinfo/{number}")).unwrap()).unwrap();
    let stat = Stat::new(&nix::sys::stat::fstat(fd).unwrap());
    let me = crate::sys::pidfd::open(Pid::this().as_raw(), 0).unwrap();
    let view = FdView {
        pid: HostPid::own(),
        fd: number,
        link: std::os::unix::ffi::OsStrExt::as_bytes(link.as_os_str()),
        info: &info,
        stat,
        source: Source::Task(me.as_fd()),
        fetched: OnceCell::new(),
    };
    look(&view)
}

/// Dumps `fd`, opens it again, dumps that; both entries must be the same. Gives the new file and the entry.
pub(super) fn round_trip<K: FileKind>(fd: &OwnedFd) -> (OwnedFd, K::Entry)
where
    K::Entry: PartialEq + std::fmt::Debug,
{
    let store = MemStore::default();
    let settings = DumpSettings::new(Pid::this(), Path::new("."));
    let mut cx = DumpCx::new(&store, &settings);
    let dump = |cx: &mut DumpCx<'_>, fd: &OwnedFd| {
        with_view(fd, |view| {
            assert!(K::owns(view), "{} does not own {}", K::NAME, view.link_text());
            K::dump(cx, view, 1).unwrap()
        })
    };
    let before = dump(&mut cx, fd);
    K::finish_dump(&mut cx).unwrap();
    let settings = RestoreSettings::new(Path::new("."));
    let mut rcx = RestoreCx::new(&store, &settings);
    let again = match K::open(&mut rcx, &before).unwrap() {
        Opened::Now(fd) => fd,
        Opened::Late => K::open_late(&mut rcx, &before).unwrap(),
    };
    K::before_resume(&mut rcx, &before, again.as_fd()).unwrap();
    let after = dump(&mut cx, &again);
    assert_eq!(before, after);
    (again, before)
}
