//! One descriptor of a frozen task, as the kinds look at it.

use std::{
    cell::OnceCell,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{FileError, fown};
use crate::{
    sys::pid::HostPid,
    {image::pb, proc::fdinfo::Fdinfo, sys::pidfd},
};

/// What is known of a file without opening it: fields of stat(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Device of the file system (as in stat: `makedev` encoding).
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Number of names.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device that a device node stands for.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last access: seconds, nanoseconds.
    pub atime: (i64, i64),
    /// Last modification: seconds, nanoseconds.
    pub mtime: (i64, i64),
    /// 512-byte blocks in use.
    pub blocks: u64,
}

impl Stat {
    /// From the C struct.
    pub fn new(s: &libc::stat) -> Self {
        Self {
            dev: s.st_dev,
            ino: s.st_ino,
            mode: s.st_mode,
            nlink: s.st_nlink,
            uid: s.st_uid,
            gid: s.st_gid,
            rdev: s.st_rdev,
            size: s.st_size.cast_unsigned(),
            atime: (s.st_atime, s.st_atime_nsec),
            mtime: (s.st_mtime, s.st_mtime_nsec),
            blocks: s.st_blocks.cast_unsigned(),
        }
    }

    /// The type bits of the mode (`S_IFREG`, ...); 0 for anonymous inodes.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// The same inode?
    pub fn same_file(&self, other: &Self) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

/// Where the descriptor of a view comes from.
#[derive(Debug)]
pub(super) enum Source<'a> {
    /// In the task's table: fetched when first needed.
    Task(BorrowedFd<'a>),
    /// Opened by the caller (a mapping, exe, cwd, root): the object is the same, the description is ours.
    Ours(BorrowedFd<'a>),
}

/// One descriptor of a frozen task.
///
/// Its link text, fdinfo and stat are read already; the description itself is fetched on first use.
#[derive(Debug)]
pub struct FdView<'a> {
    /// The task.
    pub pid: HostPid,
    /// Its number there; -1 for a file that is mapped, exe, cwd or root.
    pub fd: i32,
    /// What `/proc/PID/fd/FD` links to; may end in ` (deleted)`.
    pub link: &'a [u8],
    /// `/proc/PID/fdinfo/FD`.
    pub info: &'a Fdinfo,
    /// fstat of it.
    pub stat: Stat,
    pub(super) source: Source<'a>,
    pub(super) fetched: OnceCell<OwnedFd>,
}

impl FdView<'_> {
    /// Our own descriptor of the same open file description: position, flags and queues are shared with the task, so
    /// only look, and put back what changes.
    pub fn file(&self) -> Result<BorrowedFd<'_>, FileError> {
        match self.source {
            Source::Ours(fd) => Ok(fd),
            Source::Task(pidfd) => {
                if self.fetched.get().is_none() {
                    let fd = pidfd::getfd(pidfd, self.fd).map_err(FileError::sys("fetch the descriptor"))?;
                    let _ = self.fetched.set(fd);
                }
                self.fetched.get().map(AsFd::as_fd).ok_or(FileError::Sys {
                    action: "fetch the descriptor",
                    source: crate::sys::Errno::EBADF,
                })
            }
        }
    }

    /// Flags of the description as images hold them: everything fdinfo says but O_CLOEXEC, which belongs to the
    /// descriptor.
    pub fn flags(&self) -> u32 {
        self.info.flags & !(libc::O_CLOEXEC.cast_unsigned())
    }

    /// Who gets SIGIO and the like (F_GETOWN_EX, F_GETSIG, F_GETOWNER_UIDS).
    pub fn fown(&self) -> Result<pb::FownEntry, FileError> {
        if matches!(self.source, Source::Ours(_)) || self.flags() & libc::O_PATH.cast_unsigned() != 0 {
            return Ok(pb::FownEntry::default());
        }
        fown::dump(self.file()?)
    }

    /// Whether the link text is exactly `anon_inode:NAME` (the kernel writes some with brackets, as `[eventfd]`).
    pub fn is_anon_inode(&self, name: &str) -> bool {
        self.link.strip_prefix(b"anon_inode:").is_some_and(|rest| rest == name.as_bytes())
    }

    /// The link text for messages.
    pub fn link_text(&self) -> String {
        String::from_utf8_lossy(self.link).into_owned()
    }
}
