//! pidfd_open(2): a descriptor of a process or thread.
//!
//! Saved: the pid, for processes of the tree and threads of them; of a reaped one only that it is dead, so all
//! descriptors of one dead process share one again. A process outside the tree would be a stranger after a restore: refused.

use std::{
    collections::{HashMap, hash_map::Entry},
    os::fd::{AsFd, OwnedFd},
};

use super::{DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, kind::packed_in};
use crate::{
    image::pb,
    proc::{stat, status},
    process_tree::ids::on_host,
    sys,
    sys::pid::{HostPid, NsPid},
};

/// Flags of pidfd_open: what an entry keeps, as CRIU without O_RDWR.
const FLAGS: u32 = libc::O_NONBLOCK.cast_unsigned() | sys::pidfd::PIDFD_THREAD;

/// What an entry holds for a process that was reaped.
const DEAD: i32 = -1;

/// A process.
#[derive(Debug)]
pub(super) struct Pidfd;

/// Dead processes made at restore, by inode of the pidfd in the images.
#[derive(Debug, Default)]
struct DeadPidfds(HashMap<u32, OwnedFd>);

impl FileKind for Pidfd {
    type Entry = pb::PidfdEntry;
    const NAME: &'static str = "pidfd";
    const TYPE: pb::FdTypes = pb::FdTypes::Pidfd;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.info.pidfd.is_some() && (fd.is_anon_inode("[pidfd]") || fd.link.starts_with(b"pidfd:["))
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let info =
            fd.info.pidfd.as_ref().ok_or(FileError::unsupported("the kernel does not tell its pid", ""))?;
        let nspid = match (info.pid, info.nspid.as_slice()) {
            (-1, _) => DEAD,
            (pid, [.., inner]) if pid > 0 => {
                let root = HostPid::new(cx.settings.pid.as_raw());
                if !descends_from(HostPid::new(pid), root)? {
                    return Err(FileError::unsupported(
                        format!("it stands for process {pid}, which is not in the tree"),
                        "let the program close it, or dump a tree that holds both",
                    ));
                }
                *inner
            }
            _ => {
                return Err(FileError::unsupported(
                    "it stands for a process of another pid namespace",
                    "let the program close it",
                ));
            }
        };
        // Before Linux 6.9 all pidfds share one inode; nothing is lost by that.
        let ino = u32::try_from(fd.stat.ino & u64::from(u32::MAX)).unwrap_or_default();
        Ok(pb::PidfdEntry { id, ino, flags: fd.flags() & FLAGS, nspid, fown: fd.fown()? })
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        if entry.flags & !FLAGS != 0 {
            return Err(FileError::entry(entry.id, format!("unknown flags {:#o}", entry.flags)));
        }
        if entry.nspid > 0 {
            return Ok(Opened::Late);
        }
        let fd = match cx.state::<DeadPidfds>().0.entry(entry.ino) {
            Entry::Occupied(fd) => fd.into_mut(),
            Entry::Vacant(place) => place.insert(
                sys::pidfd::of_dead_child(entry.flags)
                    .map_err(FileError::sys("make a descriptor of a dead process"))?,
            ),
        };
        sys::fd::dup_above(fd.as_fd(), 0).map(Opened::Now).map_err(FileError::sys("duplicate a descriptor"))
    }

    fn would_open(_: &mut RestoreCx<'_>, _: &Self::Entry) -> Result<(), FileError> {
        // The dump has seen that it stands for a task of the tree, or for one that is gone.
        Ok(())
    }

    fn open_late(_: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<OwnedFd, FileError> {
        sys::pidfd::open(on_host(NsPid::new(entry.nspid)).get(), entry.flags)
            .map_err(FileError::sys("open a pidfd of a task of the tree"))
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(pidfd);
}

/// Whether `pid`, a process or a thread, is `root`, or descends from it.
pub(super) fn descends_from(pid: HostPid, root: HostPid) -> Result<bool, FileError> {
    let read = |path: String| match std::fs::read(&path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => {
            let errno = sys::Errno::from_raw(e.raw_os_error().unwrap_or(0));
            Err(FileError::path("read", path.as_bytes())(errno))
        }
    };
    let Some(text) = read(format!("/proc/{pid}/status"))? else { return Ok(false) };
    let mut pid = status::parse(&text)?.tgid;
    // The chain of parents ends at 0; it cannot be longer than there are pids.
    for _ in 0..1 << 22 {
        if pid == root {
            return Ok(true);
        }
        if pid.get() <= 1 {
            return Ok(false);
        }
        let Some(text) = read(format!("/proc/{pid}/stat"))? else { return Ok(false) };
        pid = stat::parse(&text)?.ppid;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::super::trial::Trial;
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::process::Command;

    fn exited(fd: &OwnedFd) -> bool {
        poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn own_process_and_thread() {
        let me = std::process::id().cast_signed();
        let tid = nix::unistd::gettid().as_raw();
        let mut trial = Trial::new();
        for (pid, flags) in [(me, 0), (me, libc::O_NONBLOCK.cast_unsigned()), (tid, sys::pidfd::PIDFD_THREAD)]
        {
            let fd = sys::pidfd::open(pid, flags).unwrap();
            let entry = trial.dump::<Pidfd>(&fd);
            assert_eq!((entry.nspid, entry.flags), (pid, flags));
            let again = trial.restore::<Pidfd>(&entry);
            assert_eq!(trial.dump::<Pidfd>(&again).nspid, pid);
            assert!(!exited(&again));
        }
    }

    #[test]
    fn dead_process() {
        let mut child = Command::new("/bin/true").spawn().unwrap();
        let fd = sys::pidfd::open(child.id().cast_signed(), 0).unwrap();
        child.wait().unwrap();
        let mut trial = Trial::new();
        let entry = trial.dump::<Pidfd>(&fd);
        assert_eq!(entry.nspid, DEAD);
        let both = trial.try_restore::<Pidfd>(&[&entry, &entry]).unwrap();
        for again in &both {
            assert!(exited(again));
            assert_eq!(trial.dump::<Pidfd>(again).nspid, DEAD);
        }
    }

    #[test]
    fn outside_the_tree() {
        let fd = sys::pidfd::open(1, 0).unwrap();
        let error = Trial::new().try_dump::<Pidfd>(&fd).unwrap_err();
        assert!(error.to_string().contains("process 1, which is not in the tree"), "{error}");
    }
}
