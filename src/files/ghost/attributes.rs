//! What a file without a name has besides its content: owner, mode, extended attributes (access control lists among them),
//! times, and attribute flags.
//!
//! Not saved: when it was made and last changed (btime, ctime), which nobody can set.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags, OFlag},
    sys::stat::{FchmodatFlags, Mode, fchmodat},
    unistd::{Gid, Uid, fchownat},
};

use super::FileError;
use crate::{
    files::{FdView, path::readable},
    image::pb,
    sys::{Errno, inode, passing, xattr},
    view,
};

/// Attribute flags that are restored (FS_*_FL): synchronous, immutable, append only, no dump, no access times, synchronous
/// directory.
const KEPT: u32 = 0x8 | inode::IMMUTABLE | inode::APPEND | 0x40 | 0x80 | 0x0001_0000;

/// The magic link of a descriptor: leads to the file itself, also where that is a symbolic link or cannot be opened.
fn magic(fd: &impl AsFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).unwrap_or_default()
}

/// Puts all of them into `entry`.
pub(super) fn dump(fd: &FdView<'_>, entry: &mut pb::GhostFileEntry) -> Result<(), FileError> {
    let stat = &fd.stat;
    let time = |(seconds, nanoseconds): (i64, i64)| {
        let usec = (nanoseconds / 1000).cast_unsigned();
        (pb::Timeval { tv_sec: seconds.cast_unsigned(), tv_usec: usec }, u32::try_from(nanoseconds).ok())
    };
    let ((atim, atim_nsec), (mtim, mtim_nsec)) = (time(stat.atime), time(stat.mtime));
    (entry.uid, entry.gid, entry.mode) = (stat.uid, stat.gid, stat.mode);
    (entry.atim, entry.mtim) = (Some(atim), Some(mtim));
    (entry.atim_nsec, entry.mtim_nsec) = (atim_nsec, mtim_nsec);
    let file = fd.file()?;
    entry.xattrs = xattrs(&magic(&file))?;
    if matches!(stat.kind(), libc::S_IFREG | libc::S_IFDIR) {
        let flags = readable(file).and_then(|file| inode::flags(file.as_fd()));
        // Where the file system knows none there are none.
        let flags = flags.unwrap_or(0);
        if flags & inode::VERITY != 0 {
            return Err(FileError::unsupported(
                "it is deleted and protected by fs-verity, which cannot be set up again",
                "",
            ));
        }
        entry.attributes = Some(flags & KEPT).filter(|flags| *flags != 0);
    }
    Ok(())
}

fn xattrs(path: &CStr) -> Result<Vec<pb::GhostXattrEntry>, FileError> {
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(Errno::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(FileError::sys("list the extended attributes of a deleted file")(e)),
    };
    let mut all = Vec::new();
    for name in names {
        match xattr::get(path, &name) {
            Ok(value) => all.push(pb::GhostXattrEntry { name: name.into_bytes(), value }),
            // Made up when asked for the list, or gone since.
            Err(Errno::ENODATA | Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(FileError::sys("read an extended attribute of a deleted file")(e)),
        }
    }
    Ok(all)
}

/// Sets all but the flags. The owner first, since that takes set-id bits and capabilities away; the times last, since all
/// else changes them.
pub(super) fn apply(object: &OwnedFd, entry: &pb::GhostFileEntry, name: &[u8]) -> Result<(), FileError> {
    let failed = |action: &'static str| FileError::path(action, name);
    let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    fchownat(object, "", owner.0, owner.1, AtFlags::AT_EMPTY_PATH)
        .map_err(failed("set the owner of the deleted file"))?;
    let path = magic(object);
    if entry.mode & libc::S_IFMT != libc::S_IFLNK {
        let mode = Mode::from_bits_truncate(entry.mode & 0o7777);
        fchmodat(AT_FDCWD, &*path, mode, FchmodatFlags::FollowSymlink)
            .map_err(failed("set the mode of the deleted file"))?;
    }
    for attribute in &entry.xattrs {
        let attribute_name = CString::new(&attribute.name[..])
            .map_err(|_| failed("set an extended attribute of the deleted file")(Errno::EINVAL))?;
        match xattr::set(&path, &attribute_name, &attribute.value) {
            // Labels of a security module that is not there.
            Err(Errno::EOPNOTSUPP) if attribute.name.starts_with(b"security.") => {
                tracing::warn!("a deleted file loses its {}", attribute_name.to_string_lossy());
            }
            result => result.map_err(failed("set an extended attribute of the deleted file"))?,
        }
    }
    let times = [(entry.atim, entry.atim_nsec), (entry.mtim, entry.mtim_nsec)];
    passing::set_times(object.as_fd(), &times.map(time)).map_err(failed("set the times of the deleted file"))
}

fn time((of, nsec): (Option<pb::Timeval>, Option<u32>)) -> libc::timespec {
    match of {
        Some(of) => libc::timespec {
            tv_sec: of.tv_sec.cast_signed(),
            tv_nsec: nsec
                .filter(|nsec| *nsec < 1_000_000_000)
                .map_or_else(|| (of.tv_usec.min(999_999) * 1000).cast_signed(), i64::from),
        },
        None => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
    }
}

/// Sets the attribute flags, when everybody has opened the file: some forbid that.
pub(super) fn set_flags(object: &OwnedFd, flags: u32) -> Result<(), FileError> {
    let failed = FileError::sys;
    let action = "set the attributes of a deleted file (FS_IOC_SETFLAGS)";
    let file = view::reopen(object.as_fd(), OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(failed(action))?;
    let now = inode::flags(file.as_fd()).map_err(failed(action))?;
    let then = now & !KEPT | flags & KEPT;
    if then == now { Ok(()) } else { inode::set_flags(file.as_fd(), then).map_err(failed(action)) }
}
