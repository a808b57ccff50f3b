//! Files that the destination may read by another way: what the tree has written is there before the tree is.
//!
//! A network file system keeps what a process wrote in the page cache of its host, for seconds after the process has ended when it wrote
//! through a mapping. A tree that goes on elsewhere would read there what was before. So a file that the tree may write to is flushed
//! while the tree is frozen, when a dump goes to another host.
//!
//! Not flushed: file systems that only this host can read. To use such a disk elsewhere it has to be unmounted here, which
//! flushes it.

use nix::{fcntl::OFlag, sys::statfs::fstatfs, unistd::fsync};

use super::{FdView, FileError};
use crate::{sys::Errno, view};

/// Magic numbers of file systems that one host alone has mounted, from linux/magic.h and the file systems' own headers.
const OF_THIS_HOST: &[i64] = &[
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0xF2F5_2010, // f2fs
    0x2FC1_2FC1, // zfs
    0xCA45_1A4E, // bcachefs
    0x794C_7630, // overlayfs: what is written lies in a directory of another file system of this host
    0x0102_1994, // tmpfs
    0x8584_58F6, // ramfs
    0x9584_58F6, // hugetlbfs
    0x4D44,      // vfat
    0x2011_BAB0, // exfat
    0x3153_464A, // jfs
    0x3434,      // nilfs2
    0x5265_4973, // reiserfs
    0x1501_3346, // udf
    0x9FA0,      // proc
    0x6265_6572, // sysfs
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x6165_676C, // pstore
    0x6367_7270, // cgroup2
    0x0027_E0EB, // cgroup
    0x1CD1,      // devpts
    0x1980_0202, // mqueue
    0xDE5E_81E4, // efivarfs
    0xCAFE_4A11, // bpf
    0x6273_6E66, // nsfs
];

/// Writes out what of the regular file behind `fd` has been written, if another host may read it.
pub(super) fn flush(fd: &FdView<'_>) -> Result<(), FileError> {
    let writable = libc::O_WRONLY | libc::O_RDWR;
    if fd.flags() & writable.cast_unsigned() == 0 {
        return Ok(());
    }
    let file = fd.file()?;
    let stat = fstatfs(file).map_err(FileError::path("look at the file system of", fd.link))?;
    if OF_THIS_HOST.contains(&stat.filesystem_type().0) {
        return Ok(());
    }
    let failed = FileError::path("flush", fd.link);
    match fsync(file) {
        // Mapped, and known to us by its place alone.
        Err(Errno::EBADF) => {
            view::reopen(file, OFlag::O_RDONLY | OFlag::O_NONBLOCK).and_then(fsync).map_err(failed)
        }
        done => done.map_err(failed),
    }
}
