//! inotify(7): watches on files, told of by events.
//!
//! Saved: the watches with their numbers, masks and the paths of what they watch. Events that wait to be read are lost, as in
//! CRIU: reading them would take them from the task, and nothing can put them back.

use std::{
    ffi::CString,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, readlink},
    sys::stat::{FileStat, fstat, major, minor},
};

use super::{
    DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, flags, irmap, kind::packed_in,
    pipe_data::io_error,
};
use crate::{
    image::pb,
    proc::{
        fdinfo::{InotifyWatch, kernel_dev},
        mountinfo,
    },
    sys::{self, Errno, event, pid::HostPid},
    view::{self, Last, View},
};

/// Words of a handle in images, whatever its length.
const HANDLE_WORDS: usize = 16;

/// Numbers are given out one by one, so a higher one costs time at restore; 16 million take some 20 seconds.
const HIGHEST_WD: u32 = 1 << 24;

/// A set of watches.
#[derive(Debug)]
pub(super) struct Inotify;

/// Instances that were made to see whether it can be done.
#[derive(Debug, Default)]
struct Tried(Vec<OwnedFd>);

impl FileKind for Inotify {
    type Entry = pb::InotifyFileEntry;
    const NAME: &'static str = "inotify";
    const TYPE: pb::FdTypes = pb::FdTypes::Inotify;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.is_anon_inode("inotify") || fd.is_anon_inode("[inotify]")
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let waiting = sys::pipe::readable_bytes(fd.file()?)
            .map_err(FileError::sys("read the amount of waiting inotify events"))?;
        if waiting > 0 {
            tracing::warn!("pid {} fd {}: {waiting} bytes of inotify events are lost", fd.pid, fd.fd);
        }
        let mut wd =
            fd.info.inotify.iter().map(|watch| dump(cx, fd.pid, watch)).collect::<Result<Vec<_>, _>>()?;
        wd.sort_by_key(|watch| watch.wd);
        Ok(pb::InotifyFileEntry { id, flags: fd.flags(), fown: fd.fown()?, wd })
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        let fd = make()?;
        let mut watches: Vec<_> = entry.wd.iter().collect();
        watches.sort_by_key(|watch| watch.wd);
        for watch in watches {
            add(&*cx.view()?, &fd, entry.id, watch)?;
        }
        // Files opened from here on would be told of too: what restoring causes is dropped in before_resume.
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError> {
        // Each counts against a limit of the user's, so all are there together.
        let instance = make()?;
        cx.state::<Tried>().0.push(instance);
        let view = cx.view()?;
        entry.wd.iter().try_for_each(|watch| find_watched(&view, entry.id, watch).map(drop))
    }

    fn before_resume(
        _cx: &mut RestoreCx<'_>,
        entry: &Self::Entry,
        fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        let fd = fd.try_clone_to_owned().map_err(|e| io_error("duplicate an inotify", &e))?;
        drain(&fd)?;
        flags::apply(&fd, entry.flags)
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(ify);
}

/// One watch.
fn dump(cx: &DumpCx<'_>, pid: HostPid, watch: &InotifyWatch) -> Result<pb::InotifyWdEntry, FileError> {
    let path = find(cx, pid, watch)?;
    let (kind, bytes) = watch.handle.as_ref().map_or((0, &[][..]), |handle| (handle.kind, &handle.bytes[..]));
    let mut words: Vec<u64> = bytes
        .chunks(8)
        .map(|piece| piece.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)))
        .collect();
    words.resize(HANDLE_WORDS.max(words.len()), 0);
    Ok(pb::InotifyWdEntry {
        id: 0,
        i_ino: watch.ino,
        mask: watch.mask,
        ignored_mask: 0,
        s_dev: watch.sdev,
        wd: watch.wd.cast_unsigned(),
        f_handle: pb::FhEntry {
            bytes: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            r#type: kind.cast_unsigned(),
            handle: words,
            path: Some(path),
            mnt_id: None,
        },
    })
}

/// The path of what is watched: by its file handle, or where that does not lead to it, by search.
fn find(cx: &DumpCx<'_>, pid: HostPid, watch: &InotifyWatch) -> Result<Vec<u8>, FileError> {
    const REMOVE: &str = "remove the watch before the dump";
    let refused = |what: String, hint: &'static str| {
        Err(FileError::unsupported(format!("watch {}: {what}", watch.wd), hint))
    };
    let mut hidden = None;
    if !cx.settings.force_irmap {
        match by_handle(cx, pid, watch)? {
            Some(Found::At(path)) => return Ok(path),
            Some(Found::Deleted(path)) => {
                return refused(format!("{} was deleted", String::from_utf8_lossy(&path)), REMOVE);
            }
            Some(Found::Hidden(path)) => hidden = Some(path),
            None => {}
        }
    }
    if let Some(path) = irmap::find(cx, pid, watch)? {
        return Ok(path);
    }
    match hidden {
        Some(path) => {
            refused(format!("{} is hidden by another file", String::from_utf8_lossy(&path)), REMOVE)
        }
        None => refused(
            format!("no path of inode {} was found", watch.ino),
            "--irmap-scan-path DIR says where to search for it; or remove the watch before the dump",
        ),
    }
}

/// Where a handle leads to.
enum Found {
    /// To a file with this path.
    At(Vec<u8>),
    /// To one without a name.
    Deleted(Vec<u8>),
    /// To one whose name leads to another file.
    Hidden(Vec<u8>),
}

/// In any mount of its file system that the task sees. `None`: the file system does not open files by handles, or it is on
/// none of those mounts.
fn by_handle(cx: &DumpCx<'_>, pid: HostPid, watch: &InotifyWatch) -> Result<Option<Found>, FileError> {
    let mountinfo = format!("/proc/{pid}/mountinfo");
    let text = std::fs::read(&mountinfo).map_err(|e| io_error("read mountinfo", &e))?;
    let view = cx.view()?;
    let mut found = None;
    let handle = watch.handle.as_ref();
    for mount in mountinfo::parse(&text)?.iter().filter(|mount| mount.dev == kernel_dev(watch.sdev)) {
        let (Some(handle), Ok(dir)) = (handle, open_mount(&view, &mount.mountpoint)) else { continue };
        match sys::handle::open(dir.as_fd(), handle.kind, &handle.bytes, libc::O_PATH | libc::O_CLOEXEC) {
            Ok(file) => {
                let link = format!("/proc/self/fd/{}", file.as_raw_fd());
                let path =
                    readlink(link.as_str()).map_err(FileError::sys("read the path of a watched file"))?;
                let path = std::os::unix::ffi::OsStringExt::into_vec(path);
                // Only a path that leads back to the same file is worth storing.
                if view.stat(&path).is_ok_and(|stat| is_watched(&stat, watch)) {
                    return Ok(Some(Found::At(path)));
                }
                let names = fstat(&file).map_err(FileError::sys("stat a watched file"))?.st_nlink;
                found = Some(if names == 0 { Found::Deleted(path) } else { Found::Hidden(path) });
            }
            Err(Errno::ESTALE | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOTDIR) => {}
            Err(e) => return Err(FileError::sys("open a watched file by its handle")(e)),
        }
    }
    Ok(found)
}

/// Opens the place of a mount for open_by_handle_at, which takes no O_PATH descriptor. A file that is mounted on another
/// is opened only where that does nothing.
fn open_mount(view: &View, path: &[u8]) -> Result<OwnedFd, FileError> {
    let object = view.find(path, Last::Itself).map_err(FileError::name("open", path))?;
    let kind = fstat(&object).map_err(FileError::path("stat", path))?.st_mode & libc::S_IFMT;
    if !matches!(kind, libc::S_IFDIR | libc::S_IFREG) {
        return Err(FileError::path("open", path)(Errno::ENOTDIR));
    }
    view::reopen(object.as_fd(), OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(FileError::path("open", path))
}

fn is_watched(stat: &FileStat, watch: &InotifyWatch) -> bool {
    let dev = kernel_dev(watch.sdev);
    // btrfs and the like show another device in stat than in fdinfo: there the inode number must do.
    let same_dev =
        (major(stat.st_dev), minor(stat.st_dev)) == (u64::from(dev.0), u64::from(dev.1)) || dev.0 == 0;
    stat.st_ino == watch.ino && same_dev
}

/// An inotify without watches.
fn make() -> Result<OwnedFd, FileError> {
    match event::inotify(libc::IN_CLOEXEC | libc::IN_NONBLOCK) {
        Err(Errno::EMFILE) => Err(FileError::unsupported(
            "so many inotify instances are more than one user may have",
            "raise /proc/sys/fs/inotify/max_user_instances",
        )),
        made => made.map_err(FileError::sys("make an inotify")),
    }
}

/// What is watched, found again and checked.
fn find_watched(view: &View, id: u32, watch: &pb::InotifyWdEntry) -> Result<OwnedFd, FileError> {
    if watch.wd == 0 || watch.wd > HIGHEST_WD {
        return Err(FileError::entry(id, format!("{:#x} is no usable watch number", watch.wd)));
    }
    let path = watch.f_handle.path.as_deref().unwrap_or_default();
    // A path that led to the file at dump is no symbolic link, unless the link itself was watched.
    view.find(path, Last::Itself).map_err(FileError::name("find the watched", path))
}

/// Adds one watch under its number.
fn add(view: &View, fd: &OwnedFd, id: u32, watch: &pb::InotifyWdEntry) -> Result<(), FileError> {
    let path = watch.f_handle.path.as_deref().unwrap_or_default();
    let object = find_watched(view, id, watch)?;
    let stat = fstat(&object).map_err(FileError::path("find the watched", path))?;
    if stat.st_ino != watch.i_ino {
        tracing::warn!("{}: another file than the one that was watched", String::from_utf8_lossy(path));
    }
    // The descriptor's link is followed to it, and not further where it is a symbolic link itself.
    let name = CString::new(format!("/proc/self/fd/{}", object.as_raw_fd())).unwrap_or_default();
    let mask = watch.mask & !libc::IN_DONT_FOLLOW;
    let wanted = watch.wd.cast_signed();
    let mut drain_at = 0;
    loop {
        let got = event::inotify_add(fd.as_fd(), &name, mask).map_err(FileError::path("watch", path))?;
        if got == wanted {
            return Ok(());
        }
        if got > wanted {
            return Err(FileError::entry(id, format!("watch {wanted} came out as {got}: on a file twice?")));
        }
        // Numbers go up by one: each that is not wanted is given back, at the price of an event.
        event::inotify_remove(fd.as_fd(), got).map_err(FileError::sys("remove a watch"))?;
        drain_at += 1;
        if drain_at % 1024 == 0 {
            drain(fd)?;
        }
    }
}

/// Throws away what can be read.
fn drain(fd: &OwnedFd) -> Result<(), FileError> {
    flags::apply(fd, libc::O_NONBLOCK.cast_unsigned())?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match nix::unistd::read(fd, &mut buffer) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(FileError::sys("read inotify events")(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::trial::Trial;
    use super::*;

    fn cstr(path: &std::path::Path) -> CString {
        CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
    }

    #[test]
    fn watches_keep_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a b\n(deleted)");
        std::fs::write(&odd, "x").unwrap();
        let fd = event::inotify(libc::IN_CLOEXEC | libc::IN_NONBLOCK).unwrap();
        let first = event::inotify_add(fd.as_fd(), &cstr(dir.path()), libc::IN_CREATE).unwrap();
        for _ in 0..20 {
            let gone = event::inotify_add(fd.as_fd(), &cstr(&odd), libc::IN_OPEN).unwrap();
            event::inotify_remove(fd.as_fd(), gone).unwrap();
        }
        let mask = libc::IN_MODIFY | libc::IN_ONESHOT | libc::IN_EXCL_UNLINK;
        let last = event::inotify_add(fd.as_fd(), &cstr(&odd), mask).unwrap();
        assert_eq!((first, last), (1, 22));
        drain(&fd).unwrap();
        let mut trial = Trial::new();
        let entry = trial.dump::<Inotify>(&fd);
        assert_eq!(entry.wd.iter().map(|watch| watch.wd).collect::<Vec<_>>(), [1, 22]);
        let again = trial.restore::<Inotify>(&entry);
        assert_eq!(trial.dump::<Inotify>(&again).wd, entry.wd);

        let mut buffer = [0; 512];
        assert_eq!(nix::unistd::read(&again, &mut buffer).unwrap_err(), Errno::EAGAIN);
        std::fs::write(dir.path().join("new"), "x").unwrap();
        let len = nix::unistd::read(&again, &mut buffer).unwrap();
        assert_eq!((len, buffer[0]), (32, 1));
        std::fs::write(&odd, "y").unwrap();
        assert!(nix::unistd::read(&again, &mut buffer).unwrap() >= 16);
        assert_eq!(buffer[0], 22);
    }

    /// Found by search only: below a directory that was named, below the current directory, not elsewhere.
    #[test]
    fn search_for_paths() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let path = dir.path().join("a/b/watched");
        std::fs::write(&path, b"").unwrap();
        std::os::unix::fs::symlink("watched", dir.path().join("a/b/link")).unwrap();
        let fd = event::inotify(libc::IN_CLOEXEC | libc::IN_NONBLOCK).unwrap();
        event::inotify_add(fd.as_fd(), &cstr(&path), libc::IN_MODIFY).unwrap();
        let link = cstr(&dir.path().join("a/b/link"));
        event::inotify_add(fd.as_fd(), &link, libc::IN_ATTRIB | libc::IN_DONT_FOLLOW).unwrap();
        event::inotify_add(fd.as_fd(), &cstr(dir.path()), libc::IN_CREATE).unwrap();
        let mut trial = Trial::new();
        let plain = trial.dump::<Inotify>(&fd);
        trial.dump_settings.force_irmap = true;
        let error = trial.try_dump::<Inotify>(&fd).unwrap_err();
        assert!(error.to_string().contains("--irmap-scan-path"), "{error}");
        trial.dump_settings.irmap_scan_paths = vec!["/no/such/place".into(), dir.path().to_owned()];
        let searched = trial.dump::<Inotify>(&fd);
        assert_eq!(searched.wd, plain.wd);
        let again = trial.restore::<Inotify>(&searched);
        trial.dump_settings.force_irmap = false;
        assert_eq!(trial.dump::<Inotify>(&again).wd, plain.wd);
    }

    #[test]
    fn a_deleted_file_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gone");
        let held = std::fs::File::create(&path).unwrap();
        let fd = event::inotify(libc::IN_CLOEXEC).unwrap();
        event::inotify_add(fd.as_fd(), &cstr(&path), libc::IN_MODIFY).unwrap();
        std::fs::remove_file(&path).unwrap();
        let error = Trial::new().try_dump::<Inotify>(&fd).unwrap_err();
        assert!(
            error.to_string().starts_with("watch 1: ") && error.to_string().contains("deleted"),
            "{error}"
        );
        drop(held);
    }

    #[test]
    fn crafted_numbers_are_refused() {
        let fd = event::inotify(libc::IN_CLOEXEC).unwrap();
        event::inotify_add(fd.as_fd(), c"/", libc::IN_CREATE).unwrap();
        let mut trial = Trial::new();
        let mut entry = trial.dump::<Inotify>(&fd);
        for wd in [0, u32::MAX, HIGHEST_WD + 1] {
            entry.wd[0].wd = wd;
            assert!(matches!(trial.try_restore::<Inotify>(&[&entry]), Err(FileError::Entry { .. })));
        }
    }
}
