//! Paths of watched files by search, where the kernel does not lead to them: from the inode to a name (CRIU calls it irmap).
//!
//! inotify tells device, inode number and file handle of what is watched, and nothing else. Where the handle cannot be
//! opened (overlayfs; or the user says so by `--force-irmap`) directories are searched: those of `--irmap-scan-path`, the
//! current directory of the task, and those that programs commonly watch. A file is recognised by its handle, or where it
//! has none by device and inode number.
//!
//! The cache of paths that CRIU keeps between a pre-dump and a dump is neither read nor written: there is no pre-dump.

use std::{
    collections::VecDeque,
    ffi::CStr,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    dir::{Dir, Type},
    fcntl::{AtFlags, OFlag, readlink},
    sys::{
        stat::{FileStat, fstat, fstatat, major, minor},
        statfs::{PROC_SUPER_MAGIC, SYSFS_MAGIC, fstatfs},
    },
};

use super::{DumpCx, FileError, path::bytes_of};
use crate::{
    proc::fdinfo::{InotifyWatch, kernel_dev},
    sys::{handle, pid::HostPid},
    view::{self, Last, View},
};

/// What is watched where nobody has said where to look, as CRIU does.
const COMMON: &[&[u8]] = &[b"/etc", b"/var/spool", b"/lib/udev", b"/usr/lib/udev", b"/"];
/// Entries of directories that are looked at below a path of the user's, and below others: the tree is frozen meanwhile.
const MOST_ASKED_FOR: usize = 4_000_000;
const MOST: usize = 100_000;

/// A path of what is watched; `None` when it was not found.
pub(super) fn find(
    cx: &DumpCx<'_>,
    pid: HostPid,
    watch: &InotifyWatch,
) -> Result<Option<Vec<u8>>, FileError> {
    let view = cx.view()?;
    for path in &cx.settings.irmap_scan_paths {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone()).into_os_string();
        let mut left = MOST_ASKED_FOR;
        if let Some(found) = search(&view, bytes_of(path), watch, &mut left, true) {
            return Ok(Some(found));
        }
    }
    let mut left = MOST;
    let cwd = readlink(format!("/proc/{pid}/cwd").as_str()).map(bytes_of).ok();
    let common = COMMON.iter().map(|path| path.to_vec());
    // What lies near first: the whole of / would use up what may be looked at.
    for path in cwd.into_iter().chain(common) {
        let below = path != b"/";
        if let Some(found) = search(&view, path, watch, &mut left, below) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Looks at `start`, what is in it and, if `below` says so, what is below that, nearest first.
fn search(
    view: &View,
    start: Vec<u8>,
    watch: &InotifyWatch,
    left: &mut usize,
    below: bool,
) -> Option<Vec<u8>> {
    let object = view.find(&start, Last::Itself).ok()?;
    if is_watched(&fstat(&object).ok()?, watch, &object, c"") {
        return Some(start);
    }
    let mut todo = VecDeque::from([start]);
    while let Some(path) = todo.pop_front() {
        // Whatever cannot be looked at is not what is searched for.
        let Ok(dir) = view.find(&path, Last::Directory) else { continue };
        let made_up =
            fstatfs(&dir).is_ok_and(|fs| [PROC_SUPER_MAGIC, SYSFS_MAGIC].contains(&fs.filesystem_type()));
        if made_up {
            continue;
        }
        let Ok(list) = view::reopen(dir.as_fd(), OFlag::O_RDONLY | OFlag::O_DIRECTORY) else { continue };
        let Ok(mut list) = Dir::from_fd(list) else { continue };
        for entry in list.iter().flatten() {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if *left == 0 {
                return None;
            }
            *left -= 1;
            let Ok(stat) = fstatat(&dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
            let is_dir = entry
                .file_type()
                .map_or(stat.st_mode & libc::S_IFMT == libc::S_IFDIR, |t| t == Type::Directory);
            let below_it = || [path.strip_suffix(b"/").unwrap_or(&path), b"/", name.to_bytes()].concat();
            if is_watched(&stat, watch, &dir, name) {
                return Some(below_it());
            }
            if is_dir && below {
                todo.push_back(below_it());
            }
        }
    }
    None
}

/// Whether `name` in `dir`, of which `stat` is known, is what is watched.
fn is_watched(stat: &FileStat, watch: &InotifyWatch, dir: &OwnedFd, name: &CStr) -> bool {
    let dev = kernel_dev(watch.sdev);
    let same_dev = (major(stat.st_dev), minor(stat.st_dev)) == (u64::from(dev.0), u64::from(dev.1));
    // Subvolumes of btrfs show devices of their own; a handle tells files of such file systems apart.
    if !same_dev && (dev.0 != 0 || major(stat.st_dev) != 0) {
        return false;
    }
    match (&watch.handle, handle::of(dir.as_fd(), name)) {
        (Some(watched), Ok((kind, bytes))) => (watched.kind, &watched.bytes) == (kind, &bytes),
        _ => same_dev && stat.st_ino == watch.ino,
    }
}
