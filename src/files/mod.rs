//! Open files: one file per kind, one table.
//!
//! Saved: every open file description of the tree once (`files.img`), every descriptor table once (`fdinfo-N.img`), and
//! what kinds keep in images of their own. Descriptions are the same when the kernel says so (kcmp), whoever holds them.
//! A file that is mapped, executed, or a current or root directory gets an entry too, without a descriptor.
//!
//! [`FilesDump`] and [`FilesRestore`] drive it; a kind is a row of [`KINDS`] and implements [`FileKind`].

#[cfg(test)]
mod attacks;
mod build_id;
mod device;
mod dump;
mod epoll;
mod error;
mod eventfd;
mod external;
mod fd_view;
mod fifo;
mod flags;
mod flush;
mod fown;
mod ghost;
mod inotify;
mod install;
mod irmap;
mod kind;
mod locks;
mod memfd;
mod path;
mod pidfd;
mod pipe;
mod pipe_data;
mod procfs;
mod refused;
mod regular;
mod remap;
mod restore;
mod signalfd;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod timerfd;
#[cfg(test)]
mod trial;
mod tty;

use std::collections::BTreeMap;

pub use dump::FilesDump;
pub use error::FileError;
pub use fd_view::{FdView, Stat};
pub(crate) use install::{Descriptors, FIRST_SHARED, SUPERVISOR};
pub use kind::{DumpCx, FileKind, Opened, Place, Planned, RestoreCx};
use kind::{Kind, kind};

use crate::sys::pid::{HostPid, NsPid};
pub(crate) use regular::{FileUse, describe_file, would_find_file};
pub use restore::FilesRestore;
pub(crate) use tty::{JobGroups, JobTerminal};

/// What a descriptor can be. The first row that owns it decides, so special rows come before general ones. What cannot
/// be saved has its rows in `refused.rs`.
static KINDS: &[Kind] = &[
    kind::<eventfd::Eventfd>(),
    kind::<timerfd::Timerfd>(),
    kind::<signalfd::Signalfd>(),
    kind::<pidfd::Pidfd>(),
    kind::<epoll::Epoll>(),
    kind::<inotify::Inotify>(),
    kind::<memfd::Memfd>(),
    kind::<pipe::Pipe>(),
    kind::<fifo::Fifo>(),
    kind::<tty::Tty>(),
    kind::<regular::Regular>(),
];

/// One descriptor of a table that was dumped.
#[derive(Debug, Clone)]
pub struct DumpedFd {
    /// Its number.
    pub fd: i32,
    /// The id of its description in `files.img`.
    pub id: u32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// Device of its inode, as in stat.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
    /// Locks that fdinfo shows on it.
    pub locks: Vec<crate::proc::locks::Lock>,
}

/// One descriptor table that was dumped.
#[derive(Debug, Clone)]
pub struct DumpTable {
    /// Its id.
    pub files_id: u32,
    /// A task that uses it.
    pub pid: HostPid,
    /// In order of numbers.
    pub fds: Vec<DumpedFd>,
}

/// All descriptor tables of a tree that was dumped.
#[derive(Debug, Default)]
pub struct DumpTables(pub Vec<DumpTable>);

/// One descriptor table of a tree that is restored: number -> (id in `files.img`, FD_CLOEXEC).
#[derive(Debug, Clone, Default)]
pub struct RestoreTable {
    /// The task whose list installs it.
    pub pid: NsPid,
    /// Its descriptors.
    pub fds: BTreeMap<i32, TableFd>,
}

/// One descriptor of a table that is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableFd {
    /// The id of its description in `files.img`.
    pub id: u32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
}
