//! Files with a path: regular files, directories, symbolic links and others opened with O_PATH, simple devices.
//!
//! Saved: path, flags, position, and what tells at restore that the file is still the same (mode, size, build id). The
//! content stays where it is; only a file whose name is gone travels or is linked back, see `remap.rs`.

use std::{
    ffi::CString,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags, OFlag},
    sys::{
        stat::fstat,
        statvfs::{FsFlags, fstatvfs},
    },
    unistd::{AccessFlags, faccessat},
};

use super::{
    DumpCx, DumpTables, FdView, FileError, FileKind, Opened, Place, RestoreCx, Stat, build_id, device,
    external, flags, flush,
    kind::{packed_in, symlinks},
    path::{proc_pid, to_path},
    procfs, remap,
};
use crate::{
    image::pb,
    settings::{FileValidation, RestoreSettings},
    sys::{Errno, inode},
    view::{Last, View, ViewError},
};

/// Flags of open(2) that speak of the act of opening; most are not kept by the kernel, but an image may hold anything.
const AT_OPEN: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY;
/// `__O_TMPFILE` without the O_DIRECTORY that O_TMPFILE contains.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// A file with a path.
#[derive(Debug)]
pub(super) struct Regular;

impl FileKind for Regular {
    type Entry = pb::RegFileEntry;
    const NAME: &'static str = "regular file";
    const TYPE: pb::FdTypes = pb::FdTypes::Reg;

    fn owns(fd: &FdView<'_>) -> bool {
        let path_only = fd.flags() & libc::O_PATH.cast_unsigned() != 0;
        fd.link.first() == Some(&b'/')
            && match fd.stat.kind() {
                libc::S_IFREG | libc::S_IFDIR => true,
                libc::S_IFCHR => path_only || device::is_simple(fd.stat.rdev),
                _ => path_only,
            }
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let mut entry = pb::RegFileEntry {
            id,
            flags: fd.flags(),
            pos: u64::try_from(fd.info.pos).unwrap_or(0),
            fown: fd.fown()?,
            mode: Some(fd.stat.mode),
            ..Default::default()
        };
        // The owner of files of /proc changes with what their task is.
        if matches!(fd.stat.kind(), libc::S_IFREG | libc::S_IFDIR | libc::S_IFIFO)
            && proc_pid(fd.link).is_none()
        {
            (entry.uid, entry.gid) = (Some(fd.stat.uid), Some(fd.stat.gid));
        }
        let regular = fd.stat.kind() == libc::S_IFREG;
        if regular && entry.flags & libc::O_APPEND.cast_unsigned() == 0 {
            entry.size = Some(fd.stat.size);
        }
        if let Some(key) = external::file_key(cx.settings, fd) {
            entry.name = key;
            entry.ext = Some(true);
            return Ok(entry);
        }
        if cx.settings.common.evasive_devices
            && fd.stat.kind() == libc::S_IFCHR
            && let Some((name, mode)) = device::evade(&*cx.view()?, fd.link, fd.stat.rdev)
        {
            entry.name = name;
            entry.mode = Some(mode);
            return Ok(entry);
        }
        if regular && cx.frozen && cx.settings.remote.is_some() {
            flush::flush(fd)?;
        }
        entry.name = remap::name(cx, fd, id)?;
        if regular && entry.size.is_some() {
            entry.build_id = build_id::of(cx, fd)?;
        }
        Ok(entry)
    }

    fn complete(
        _cx: &mut DumpCx<'_>,
        tables: &DumpTables,
        entry: &mut Self::Entry,
        _at: Place,
    ) -> Result<(), FileError> {
        if entry.ext == Some(true) { Ok(()) } else { procfs::check_holder(entry.id, &entry.name, tables) }
    }

    fn finish_dump(cx: &mut DumpCx<'_>) -> Result<(), FileError> {
        remap::write(cx)
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        if proc_pid(&entry.name).is_some() && entry.ext != Some(true) {
            return Ok(Opened::Late);
        }
        open_entry(cx, entry).map(Opened::Now)
    }

    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError> {
        if entry.ext == Some(true) || proc_pid(&entry.name).is_some() {
            // Given when the tree is restored; or checked already, as a file of a task of the tree.
            return Ok(());
        }
        if remap::is_remapped(cx, entry.id) { remap::would_make(cx, entry) } else { check_access(entry) }
    }

    fn open_late(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<OwnedFd, FileError> {
        let gone = remap::is_of_dead_task(cx, entry.id);
        if let Some(fd) = procfs::open_late(cx, entry, gone)? {
            return Ok(fd);
        }
        open_entry(cx, entry)
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        _entry: &Self::Entry,
        _fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        remap::before_resume(cx)
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(reg);
}

fn open_entry(cx: &mut RestoreCx<'_>, entry: &pb::RegFileEntry) -> Result<OwnedFd, FileError> {
    let fd = match external::inherited(cx.settings, entry)? {
        Some(fd) => fd,
        None => match remap::object(cx, entry)? {
            Some(object) => match remap::description(cx, entry.id) {
                Some(description) => description,
                None => reopen(&*cx.view()?, &object, &stat(&object, entry)?, entry)?,
            },
            None => return open_there(&*cx.view()?, cx.settings, entry),
        },
    };
    seek(&fd, entry)?;
    Ok(fd)
}

/// Opens a file that is where its name says.
fn open_there(
    view: &View,
    settings: &RestoreSettings,
    entry: &pb::RegFileEntry,
) -> Result<OwnedFd, FileError> {
    let (object, found) = find_with_stat(view, settings, entry)?;
    let fd = match by_name(view, &found, entry)? {
        Some(fd) => fd,
        None => reopen(view, &object, &found, entry)?,
    };
    seek(&fd, entry)?;
    Ok(fd)
}

/// So many files are opened by one thread alone; to start another takes about as long as to open ten.
const FEW: usize = 200;
/// More threads would wait for each other, since they share one descriptor table.
const MOST_THREADS: usize = 4;

/// Opens those of `files` that are where their names say, by several threads where there are many. One that cannot be
/// opened is left to [`FileKind::open`], which says why.
pub(super) fn open_ahead(cx: &mut RestoreCx<'_>, files: &[Rc<pb::FileEntry>]) -> Vec<(u32, OwnedFd)> {
    if files.len() <= FEW || !cx.settings.inherit_fds.is_empty() {
        return Vec::new();
    }
    let mut there: Vec<&pb::RegFileEntry> = Vec::with_capacity(files.len());
    for file in files {
        if let Some(entry) = file.reg.as_deref()
            && entry.ext != Some(true)
            && proc_pid(&entry.name).is_none()
            && !remap::is_remapped(cx, entry.id)
        {
            there.push(entry);
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    if there.len() <= FEW || threads < 2 {
        return Vec::new();
    }
    let settings = cx.settings;
    let open = |entries: &[&pb::RegFileEntry]| {
        let mut opened = Vec::with_capacity(entries.len());
        if let Ok(view) = View::own(symlinks(settings)) {
            for &entry in entries {
                if let Ok(fd) = open_there(&view, settings, entry) {
                    opened.push((entry.id, fd));
                }
            }
        }
        opened
    };
    std::thread::scope(|scope| {
        let (own, others) = there.split_at(there.len().div_ceil(threads));
        // Where no more threads may be made, their files are left.
        let others: Vec<_> = others
            .chunks(own.len())
            .map_while(|part| std::thread::Builder::new().spawn_scoped(scope, move || open(part)).ok())
            .collect();
        let mut opened = open(own);
        for other in others {
            opened.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        opened
    })
}

/// The file that has the entry's name, if it is still the one that was saved: an O_PATH descriptor. What is checked is what
/// is opened later, through that descriptor, whoever renames or replaces files in the meantime.
pub(super) fn find(cx: &RestoreCx<'_>, entry: &pb::RegFileEntry) -> Result<OwnedFd, FileError> {
    find_with_stat(&*cx.view()?, cx.settings, entry).map(|(object, _)| object)
}

/// As [`find`], with what was looked at.
fn find_with_stat(
    view: &View,
    settings: &RestoreSettings,
    entry: &pb::RegFileEntry,
) -> Result<(OwnedFd, Stat), FileError> {
    let last = match entry.mode() & libc::S_IFMT {
        libc::S_IFLNK => Last::Itself,
        libc::S_IFDIR => Last::Directory,
        _ => Last::Target,
    };
    let object = match view.find(&entry.name, last) {
        // No directory any more: what it is now is said below.
        Err(ViewError::Sys(Errno::ENOTDIR)) => view.find(&entry.name, Last::Itself),
        found => found,
    }
    .map_err(FileError::name("open", &entry.name))?;
    let found = validate(settings, &object, entry)?;
    Ok((object, found))
}

/// As [`find`], for a restore with these settings that has not begun.
pub(crate) fn would_find_file(settings: &RestoreSettings, entry: &pb::RegFileEntry) -> Result<(), FileError> {
    let view = View::own(symlinks(settings)).map_err(FileError::path("open", b"/"))?;
    find_with_stat(&view, settings, entry).map(drop)
}

/// What tells a regular file again that has the name `path`, without what belongs to a descriptor of it. The build id of programs
/// and libraries only: to read it takes a while.
pub(crate) fn describe_file(object: &OwnedFd, path: &[u8], code: bool) -> Option<pb::RegFileEntry> {
    let found = Stat::new(&fstat(object).ok()?);
    (found.kind() == libc::S_IFREG && found.nlink > 0).then(|| pb::RegFileEntry {
        name: path.to_vec(),
        mode: Some(found.mode),
        uid: Some(found.uid),
        gid: Some(found.gid),
        size: Some(found.size),
        build_id: if code { build_id::read(object).unwrap_or_default() } else { Vec::new() },
        ..Default::default()
    })
}

fn stat(object: &OwnedFd, entry: &pb::RegFileEntry) -> Result<Stat, FileError> {
    fstat(object).map(|stat| Stat::new(&stat)).map_err(FileError::path("stat", &entry.name))
}

/// Whether the object of an entry would be found, or could be made again.
pub(super) fn would_find(cx: &mut RestoreCx<'_>, id: u32) -> Result<(), FileError> {
    let entry = cx.regular_entry(id)?;
    if remap::is_remapped(cx, id) { remap::would_make(cx, &entry) } else { find(cx, &entry).map(drop) }
}

/// Whether the file can be opened with the entry's flags by its name, which the dump has just seen to lead to it. Permissions
/// may have changed since the task has opened it, and file systems and files may have become read-only.
fn check_access(entry: &pb::RegFileEntry) -> Result<(), FileError> {
    let flags = entry.flags.cast_signed();
    if flags & libc::O_PATH != 0 {
        return Ok(());
    }
    let wanted = match flags & libc::O_ACCMODE {
        libc::O_RDONLY => AccessFlags::R_OK,
        libc::O_WRONLY => AccessFlags::W_OK,
        _ => AccessFlags::R_OK | AccessFlags::W_OK,
    };
    let path =
        CString::new(&entry.name[..]).map_err(|_| FileError::entry(entry.id, "its path holds a NUL byte"))?;
    faccessat(AT_FDCWD, &*path, wanted, AtFlags::AT_EACCESS)
        .map_err(FileError::path("open it again with the access it had:", &entry.name))?;
    let append_only = wanted.contains(AccessFlags::W_OK)
        && flags & libc::O_APPEND == 0
        && inode::is_append_only(&path).unwrap_or(false);
    if append_only {
        return Err(FileError::unsupported(
            "it has become append-only (chattr +a), and is open for writing anywhere",
            "chattr -a",
        ));
    }
    Ok(())
}

/// How a file is used besides being open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum FileUse {
    /// It is the program that a task runs.
    Program,
    /// It is mapped so that it can be executed.
    Code,
}

/// Whether the kernel would take the file for that (PR_SET_MM_MAP, mmap).
pub(super) fn would_serve(cx: &mut RestoreCx<'_>, id: u32, usage: FileUse) -> Result<(), FileError> {
    let Some(entry) = cx.entries.get(&id).and_then(|file| file.reg.clone()) else { return Ok(()) };
    if entry.ext == Some(true) {
        return Ok(());
    }
    if usage == FileUse::Program && entry.mode() & 0o111 == 0 {
        return Err(FileError::unsupported(
            "the program that it runs may not be executed any more: the kernel would not take it at restore",
            "chmod +x",
        ));
    }
    let object = match remap::is_remapped(cx, id) {
        true => cx.view()?.nearest(&entry.name).map(|(dir, ..)| dir),
        false => cx.view()?.find(&entry.name, Last::Target),
    };
    let object = object.map_err(FileError::name("find", &entry.name))?;
    let fs = fstatvfs(&object).map_err(FileError::path("look at the file system of", &entry.name))?;
    if fs.flags().contains(FsFlags::ST_NOEXEC) {
        return Err(FileError::unsupported(
            format!("{} is on a file system mounted noexec", String::from_utf8_lossy(&entry.name)),
            "mount it without noexec",
        ));
    }
    Ok(())
}

/// O_NOFOLLOW is a flag that F_GETFL shows, and only opening by name gives it. `None` where it was not set, or the name
/// leads to something else now.
fn by_name(view: &View, found: &Stat, entry: &pb::RegFileEntry) -> Result<Option<OwnedFd>, FileError> {
    let flags = open_flags(entry, found.mode);
    if flags & libc::O_NOFOLLOW == 0 || !matches!(found.kind(), libc::S_IFREG | libc::S_IFDIR) {
        return Ok(None);
    }
    let mut how = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC;
    if flags & libc::O_PATH == 0 {
        // What has the name by now may be a fifo, which must not keep us waiting.
        how |= OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    }
    let Ok(fd) = view.open_by_name(&entry.name, how) else { return Ok(None) };
    if !stat(&fd, entry)?.same_file(found) {
        return Ok(None);
    }
    if flags & libc::O_PATH == 0 {
        flags::apply(&fd, flags.cast_unsigned())?;
    }
    Ok(Some(fd))
}

/// Flags to open a file of type `mode` with: those of the entry that are more than an act.
fn open_flags(entry: &pb::RegFileEntry, mode: u32) -> i32 {
    let mut flags = entry.flags.cast_signed() & !(AT_OPEN | TMPFILE);
    let kind = mode & libc::S_IFMT;
    if kind != libc::S_IFDIR {
        flags &= !libc::O_DIRECTORY;
    }
    if !matches!(kind, libc::S_IFREG | libc::S_IFDIR) {
        // Set when the owner is in place. Regular files never signal anybody, and only open(2) gives them the flag.
        flags &= !libc::O_ASYNC;
    }
    flags
}

/// A description of `object`, which is `found`, with the entry's flags.
fn reopen(
    view: &View,
    object: &OwnedFd,
    found: &Stat,
    entry: &pb::RegFileEntry,
) -> Result<OwnedFd, FileError> {
    let mode = found.mode;
    let flags = open_flags(entry, mode);
    if flags & libc::O_PATH != 0 && mode & libc::S_IFMT == libc::S_IFLNK {
        // /proc/self/fd would be followed through the link; the descriptor itself is what is wanted.
        return object.try_clone().map_err(|_| FileError::path("duplicate", &entry.name)(Errno::last()));
    }
    if matches!(mode & libc::S_IFMT, libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFBLK)
        && flags & libc::O_PATH == 0
    {
        return Err(FileError::Changed {
            path: to_path(&entry.name).to_owned(),
            what: format!("is {}, which is not opened as a file", kind_name(mode)),
        });
    }
    if mode & libc::S_IFMT == libc::S_IFCHR && flags & libc::O_PATH == 0 && !device::is_simple(found.rdev) {
        return Err(FileError::Changed {
            path: to_path(&entry.name).to_owned(),
            what: "is not one of the devices that can be opened again".into(),
        });
    }
    view.reopen(object.as_fd(), OFlag::from_bits_retain(flags)).map_err(FileError::path("open", &entry.name))
}

/// Adds an entry for the path of a fifo or terminal, which has an entry of its own; returns its id.
pub(super) fn add_path_of(cx: &mut DumpCx<'_>, fd: &FdView<'_>) -> Result<u32, FileError> {
    let id = cx.next_id();
    let reg = Regular::dump(cx, fd, id)?;
    cx.add_entry(pb::FileEntry {
        r#type: Regular::TYPE.into(),
        id,
        reg: Some(reg.into()),
        ..Default::default()
    });
    Ok(id)
}

/// The object that [`add_path_of`] recorded, found again and checked, as an O_PATH descriptor: open it through
/// /proc/self/fd with the flags of its own entry.
pub(super) fn path_of(cx: &mut RestoreCx<'_>, id: u32) -> Result<OwnedFd, FileError> {
    let entry = cx.regular_entry(id)?;
    if let Some(object) = remap::object(cx, &entry)? {
        return Ok(object);
    }
    find(cx, &entry)
}

/// Is this still the file that was dumped? What it is now.
pub(super) fn validate(
    settings: &RestoreSettings,
    object: &OwnedFd,
    entry: &pb::RegFileEntry,
) -> Result<Stat, FileError> {
    let found = stat(object, entry)?;
    validate_stat(settings, &found, entry)?;
    // Nothing else may be opened just to look at it.
    if found.kind() == libc::S_IFREG {
        validate_build_id(settings, object, entry)?;
    }
    Ok(found)
}

fn validate_stat(settings: &RestoreSettings, stat: &Stat, entry: &pb::RegFileEntry) -> Result<(), FileError> {
    let changed = |what: String| FileError::Changed { path: to_path(&entry.name).to_owned(), what };
    if let Some(mode) = entry.mode {
        let mask = if settings.skip_file_rwx_check { libc::S_IFMT } else { !0 };
        if stat.mode & libc::S_IFMT != mode & libc::S_IFMT {
            return Err(changed(format!("is {} now, but was {}", kind_name(stat.mode), kind_name(mode))));
        }
        if stat.mode & mask != mode & mask {
            return Err(changed(format!(
                "mode is {:o}, but was {:o} (--skip-file-rwx-check allows it)",
                stat.mode & 0o7777,
                mode & 0o7777
            )));
        }
    }
    let owner = (entry.uid.unwrap_or(stat.uid), entry.gid.unwrap_or(stat.gid));
    if owner != (stat.uid, stat.gid) && !settings.skip_file_rwx_check {
        return Err(changed(format!(
            "belongs to user {} and group {}, but belonged to {} and {} (--skip-file-rwx-check allows it)",
            stat.uid, stat.gid, owner.0, owner.1
        )));
    }
    if let Some(size) = entry.size
        && stat.kind() == libc::S_IFREG
        && stat.size != size
    {
        return Err(changed(format!("size is {} bytes, but was {size}", stat.size)));
    }
    Ok(())
}

fn validate_build_id(
    settings: &RestoreSettings,
    object: &OwnedFd,
    entry: &pb::RegFileEntry,
) -> Result<(), FileError> {
    if settings.common.file_validation == FileValidation::BuildId
        && !entry.build_id.is_empty()
        && build_id::read(object).is_some_and(|id| id != entry.build_id)
    {
        return Err(FileError::Changed {
            path: to_path(&entry.name).to_owned(),
            what: "its build id differs: the program or library is another one".into(),
        });
    }
    Ok(())
}

/// What a file of this mode is, for messages.
pub(super) fn kind_name(mode: u32) -> &'static str {
    match mode & libc::S_IFMT {
        libc::S_IFREG => "a regular file",
        libc::S_IFDIR => "a directory",
        libc::S_IFLNK => "a symbolic link",
        libc::S_IFCHR => "a character device",
        libc::S_IFBLK => "a block device",
        libc::S_IFIFO => "a fifo",
        libc::S_IFSOCK => "a socket",
        _ => "of no known type",
    }
}

fn seek(fd: &OwnedFd, entry: &pb::RegFileEntry) -> Result<(), FileError> {
    if entry.pos == 0 || entry.flags & libc::O_PATH.cast_unsigned() != 0 {
        return Ok(());
    }
    let at =
        i64::try_from(entry.pos).map_err(|_| FileError::entry(entry.id, "its position is no file offset"))?;
    nix::unistd::lseek(fd, at, nix::unistd::Whence::SeekSet)
        .map(drop)
        .map_err(FileError::path("set the position in", &entry.name))
}
