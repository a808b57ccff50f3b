//! Files with a path: regular files, directories, symbolic links and others opened with O_PATH, simple devices.
//!
//! Saved: path, flags, position, and what tells at restore that the file is still the same (mode, size, build id). The
//! content stays where it is; only a file whose name is gone travels or is linked back, see `remap.rs`.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fstat},
};

use super::{
    DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, Stat, build_id, device, external,
    kind::packed_in,
    path::{proc_pid, to_path},
    remap,
};
use crate::{image::pb, settings::FileValidation, sys::Errno};

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
            && let Some((name, mode)) = device::evade(fd.link, fd.stat.rdev)
        {
            entry.name = name;
            entry.mode = Some(mode);
            return Ok(entry);
        }
        entry.name = remap::name(cx, fd, id)?;
        if regular && entry.size.is_some() {
            entry.build_id = build_id::of(cx, fd)?;
        }
        Ok(entry)
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

    fn open_late(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<OwnedFd, FileError> {
        open_entry(cx, entry)
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
            Some(object) => reopen(&object, entry)?,
            None if matches!(entry.mode() & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR) => {
                open_by_name(cx, entry)?
            }
            None => {
                let link = entry.mode() & libc::S_IFMT == libc::S_IFLNK;
                let object = look_up(&entry.name, link)?;
                validate(cx, &object, entry)?;
                reopen(&object, entry)?
            }
        },
    };
    seek(&fd, entry)?;
    Ok(fd)
}

/// Opens a file that is neither fifo nor device, so that opening it neither waits nor does anything: half the calls of
/// [`look_up`] and [`reopen`], which counts for thousands of files.
fn open_by_name(cx: &RestoreCx<'_>, entry: &pb::RegFileEntry) -> Result<OwnedFd, FileError> {
    let path = absolute(&entry.name)?;
    let found = Stat::new(&nix::sys::stat::stat(path).map_err(FileError::path("open", &entry.name))?);
    validate_stat(cx, &found, entry)?;
    let flags = OFlag::from_bits_retain(open_flags(entry, found.mode) | libc::O_CLOEXEC | libc::O_NOCTTY);
    // O_NOFOLLOW is a flag that F_GETFL shows. It stays unless the name has become a link meanwhile.
    let fd = match open(path, flags, Mode::empty()) {
        Err(Errno::ELOOP) => open(path, flags - OFlag::O_NOFOLLOW, Mode::empty()),
        opened => opened,
    }
    .map_err(FileError::path("open", &entry.name))?;
    let opened = Stat::new(&fstat(&fd).map_err(FileError::path("stat", &entry.name))?);
    if !opened.same_file(&found) {
        return Err(FileError::Changed {
            path: path.to_owned(),
            what: "was replaced while it was opened".into(),
        });
    }
    validate_build_id(cx, &fd, entry)?;
    Ok(fd)
}

fn absolute(path: &[u8]) -> Result<&std::path::Path, FileError> {
    if path.first() == Some(&b'/') {
        return Ok(to_path(path));
    }
    Err(FileError::Changed { path: to_path(path).to_owned(), what: "is no absolute path".into() })
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

/// The file at `path`, without opening it: an O_PATH descriptor. Fifos do not block, devices do nothing. A symbolic link is
/// followed unless `link` itself is wanted.
pub(super) fn look_up(path: &[u8], link: bool) -> Result<OwnedFd, FileError> {
    let path_of = absolute(path)?;
    let mut flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    flags.set(OFlag::O_NOFOLLOW, link);
    open(path_of, flags, Mode::empty()).map_err(FileError::path("open", path))
}

/// A description of `object` with the entry's flags.
pub(super) fn reopen(object: &OwnedFd, entry: &pb::RegFileEntry) -> Result<OwnedFd, FileError> {
    let mode = fstat(object).map_err(FileError::path("stat", &entry.name))?.st_mode;
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
    if mode & libc::S_IFMT == libc::S_IFCHR && flags & libc::O_PATH == 0 {
        let rdev = fstat(object).map_err(FileError::path("stat", &entry.name))?.st_rdev;
        if !device::is_simple(rdev) {
            return Err(FileError::Changed {
                path: to_path(&entry.name).to_owned(),
                what: "is not one of the devices that can be opened again".into(),
            });
        }
    }
    // The magic link must be followed, whatever the flags say of the file's own name.
    let flags = OFlag::from_bits_retain((flags & !libc::O_NOFOLLOW) | libc::O_CLOEXEC | libc::O_NOCTTY);
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    open(path.as_str(), flags, Mode::empty()).map_err(FileError::path("open", &entry.name))
}

/// Adds an entry for the path of a fifo or terminal, which has an entry of its own; returns its id.
pub(super) fn add_path_of(cx: &mut DumpCx<'_>, fd: &FdView<'_>) -> Result<u32, FileError> {
    let id = cx.next_id();
    let reg = Regular::dump(cx, fd, id)?;
    cx.add_entry(pb::FileEntry { r#type: Regular::TYPE.into(), id, reg: Some(reg), ..Default::default() });
    Ok(id)
}

/// The object that [`add_path_of`] recorded, found again and checked, as an O_PATH descriptor: open it through
/// /proc/self/fd with the flags of its own entry.
pub(super) fn path_of(cx: &mut RestoreCx<'_>, id: u32) -> Result<OwnedFd, FileError> {
    let entry = cx.regular_entry(id)?;
    if let Some(object) = remap::object(cx, &entry)? {
        return Ok(object);
    }
    let object = look_up(&entry.name, false)?;
    validate(cx, &object, &entry)?;
    Ok(object)
}

/// Is this still the file that was dumped?
fn validate(cx: &RestoreCx<'_>, object: &OwnedFd, entry: &pb::RegFileEntry) -> Result<(), FileError> {
    let stat = Stat::new(&fstat(object).map_err(FileError::path("stat", &entry.name))?);
    validate_stat(cx, &stat, entry)?;
    validate_build_id(cx, object, entry)
}

fn validate_stat(cx: &RestoreCx<'_>, stat: &Stat, entry: &pb::RegFileEntry) -> Result<(), FileError> {
    let changed = |what: String| FileError::Changed { path: to_path(&entry.name).to_owned(), what };
    if let Some(mode) = entry.mode {
        let mask = if cx.settings.skip_file_rwx_check { libc::S_IFMT } else { !0 };
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
    if let Some(size) = entry.size
        && stat.kind() == libc::S_IFREG
        && stat.size != size
    {
        return Err(changed(format!("size is {} bytes, but was {size}", stat.size)));
    }
    Ok(())
}

fn validate_build_id(
    cx: &RestoreCx<'_>,
    object: &OwnedFd,
    entry: &pb::RegFileEntry,
) -> Result<(), FileError> {
    if cx.settings.common.file_validation == FileValidation::BuildId
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

fn kind_name(mode: u32) -> &'static str {
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
