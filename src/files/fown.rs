//! Who gets the signals of a file: F_SETOWN_EX, F_SETSIG, and as which user they are sent.

use std::os::fd::BorrowedFd;

use super::FileError;
use crate::{
    image::pb,
    process_tree::ids::{in_tree, on_host},
    sys::{
        fown as sys,
        pid::{HostPid, NsPid},
    },
};

/// Kinds of owner in images: those of `enum pid_type`.
const PIDTYPE_PID: u32 = 0;
const PIDTYPE_TGID: u32 = 1;
const PIDTYPE_PGID: u32 = 2;

/// Reads the owner of a description.
pub(super) fn dump(fd: BorrowedFd<'_>) -> Result<pb::FownEntry, FileError> {
    let owner = sys::owner(fd).map_err(FileError::sys("read the owner of a file (F_GETOWN_EX)"))?;
    let signal = sys::signal(fd).map_err(FileError::sys("read the signal of a file (F_GETSIG)"))?;
    let mut entry = pb::FownEntry { uid: 0, euid: 0, signum: signal.cast_unsigned(), pid_type: 0, pid: 0 };
    if owner.pid != HostPid::NONE {
        entry.pid = in_tree(owner.pid).bits();
        entry.pid_type = match owner.kind {
            sys::F_OWNER_TID => PIDTYPE_PID,
            sys::F_OWNER_PGRP => PIDTYPE_PGID,
            _ => PIDTYPE_TGID,
        };
        (entry.uid, entry.euid) =
            sys::owner_uids(fd).map_err(FileError::sys("read the owner of a file (F_GETOWNER_UIDS)"))?;
    }
    Ok(entry)
}

/// Makes the owner again; the task it names must exist.
pub(super) fn apply(fd: BorrowedFd<'_>, entry: &pb::FownEntry) -> Result<(), FileError> {
    if entry.signum != 0 {
        sys::set_signal(fd, entry.signum.cast_signed())
            .map_err(FileError::sys("set the signal of a file (F_SETSIG)"))?;
    }
    if entry.pid != 0 {
        let kind = match entry.pid_type {
            PIDTYPE_PID => sys::F_OWNER_TID,
            PIDTYPE_PGID => sys::F_OWNER_PGRP,
            _ => sys::F_OWNER_PID,
        };
        let owner = sys::Owner { kind, pid: on_host(NsPid::new(entry.pid.cast_signed())) };
        sys::set_owner_as(fd, owner, entry.uid, entry.euid)
            .map_err(FileError::sys("set the owner of a file (F_SETOWN_EX)"))?;
    }
    Ok(())
}
