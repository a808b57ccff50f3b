//! Ghosts: files without any name, whose content travels with the images.
//!
//! Saved once per inode in `ghost-file-N.img`: type, owner, mode, times, extended attributes and attribute flags, target of a
//! symbolic link, and the content of a regular file, with its holes. At restore the file is made again under its old name if
//! nobody has it (so /proc shows the same path), else under another one beside it, and the name is removed at once; not even a
//! restore that is killed leaves it behind. Directories that are gone are made for that moment only. A file that O_TMPFILE
//! made never had a name, so it is made by O_TMPFILE, and a task can give it one (linkat).

mod attributes;
mod content;
#[cfg(test)]
mod tests;

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{DumpCx, FdView, FileError, RestoreCx, device, path::to_path};
use crate::{
    image::{ImageKind, TypedStore, pb},
    sys::{
        Errno,
        passing::{self, Failed, Origin, Step},
    },
    view,
};

/// Alternative names tried at restore, before giving up.
const NAMES: u32 = 1000;
/// `__O_TMPFILE`, without the O_DIRECTORY that O_TMPFILE contains.
pub(super) const TMPFILE: u32 = (libc::O_TMPFILE & !libc::O_DIRECTORY).cast_unsigned();

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Device number as CRIU stores it: 12 bits major, 20 bits minor.
fn kernel_dev(dev: u64) -> u32 {
    (libc::major(dev) << 20) | (libc::minor(dev) & 0xf_ffff)
}

/// Whether O_TMPFILE made the file: a description says so, or its name, which the kernel makes from the inode number.
fn is_tmpfile(fd: &FdView<'_>) -> bool {
    let name = view::split(fd.link).map_or(&b""[..], |(_, name)| name);
    fd.stat.kind() == libc::S_IFREG
        && (fd.flags() & TMPFILE != 0 || name == format!("#{} (deleted)", fd.stat.ino).as_bytes())
}

/// Writes `ghost-file-ID.img`.
pub(super) fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<(), FileError> {
    let stat = &fd.stat;
    let regular = stat.kind() == libc::S_IFREG;
    let in_use = stat.blocks.saturating_mul(512);
    if regular && in_use > cx.settings.ghost_limit {
        return Err(FileError::unsupported(
            format!("it is deleted and has {in_use} bytes, more than may travel with the images"),
            format!("--ghost-limit {in_use} allows it"),
        ));
    }
    let mut entry = pb::GhostFileEntry {
        dev: Some(kernel_dev(stat.dev)),
        ino: Some(stat.ino),
        tmpfile: is_tmpfile(fd).then_some(true),
        ..Default::default()
    };
    attributes::dump(fd, &mut entry)?;
    match stat.kind() {
        libc::S_IFREG => {
            entry.huge_page = content::huge_page(&fd.file()?);
            if in_use < stat.size || entry.huge_page.is_some() {
                entry.chunks = Some(true);
                entry.size = Some(stat.size);
            }
        }
        libc::S_IFCHR if device::is_simple(stat.rdev) => {
            entry.rdev = u32::try_from(stat.rdev).ok();
        }
        libc::S_IFLNK => entry.symlnk_target = Some(link_target(fd)?),
        libc::S_IFDIR | libc::S_IFIFO => {}
        _ => return Err(FileError::unsupported("a deleted file of this type cannot be made again", "")),
    }
    let mut image = cx.store.create(ImageKind::GhostFile, u64::from(id))?;
    image.entry(&entry)?;
    // Of a tree that runs nobody wants the content.
    if regular && stat.size > 0 && cx.frozen {
        content::dump(&fd.file()?, stat.size, &entry, cx.settings.ghost_fiemap, &mut image)?;
    }
    image.finish()?;
    Ok(())
}

fn link_target(fd: &FdView<'_>) -> Result<Vec<u8>, FileError> {
    nix::fcntl::readlinkat(fd.file()?, "")
        .map(super::path::bytes_of)
        .map_err(FileError::sys("read a deleted symbolic link"))
}

/// A ghost that was made again.
#[derive(Debug)]
pub(super) struct Made {
    /// An O_PATH descriptor of the file, which has no name.
    pub(super) object: OwnedFd,
    /// The description that O_TMPFILE gave, and the entry that it is for.
    pub(super) description: Option<(u32, OwnedFd)>,
    /// Attribute flags, to be set when all have opened it.
    pub(super) attributes: Option<u32>,
}

/// Sets attribute flags of a ghost, when all have opened it.
pub(super) fn set_attributes(object: &OwnedFd, attributes: u32) -> Result<(), FileError> {
    attributes::set_flags(object, attributes)
}

/// Makes the file of `ghost-file-ID.img` again, for `file`, which is one of those that show it; the one that was made by
/// O_TMPFILE, if there is such a one.
pub(super) fn open(cx: &mut RestoreCx<'_>, file: &pb::RegFileEntry, id: u32) -> Result<Made, FileError> {
    let Some(mut image) = cx.store.open(ImageKind::GhostFile, u64::from(id))? else {
        return Err(FileError::entry(id, "the image of a deleted file is not there"));
    };
    let Some(entry) = image.next_entry::<pb::GhostFileEntry>()? else {
        return Err(FileError::entry(id, "the image of a deleted file is empty"));
    };
    let name = &file.name[..];
    let regular = entry.mode & libc::S_IFMT == libc::S_IFREG;
    let description = match entry.tmpfile {
        Some(true) if regular => make_nameless(cx, file)?,
        _ => None,
    };
    let object = match &description {
        Some(made) => view::reopen(made.as_fd(), OFlag::O_PATH).map_err(FileError::path("open", name))?,
        None => make(cx, &entry, name, id)?,
    };
    content::check_place(&object, &entry, name)?;
    if regular {
        content::fill(&object, &entry, image, name)?;
    }
    attributes::apply(&object, &entry, name)?;
    let description = description.filter(|_| file.flags & TMPFILE != 0).map(|made| (file.id, made));
    Ok(Made { object, description, attributes: entry.attributes })
}

/// A file that never has a name. Its description has the flags of `file` where that is one of O_TMPFILE. `None` where the file
/// system cannot do it.
fn make_nameless(cx: &RestoreCx<'_>, file: &pb::RegFileEntry) -> Result<Option<OwnedFd>, FileError> {
    let (dir, ..) = cx.view()?.nearest(&file.name).map_err(FileError::name("make", &file.name))?;
    let kept = libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_SYNC | libc::O_DSYNC;
    let kept = kept | libc::O_NOATIME | libc::O_DIRECT;
    let mut flags = if file.flags & TMPFILE != 0 { file.flags.cast_signed() & kept } else { libc::O_RDWR };
    if flags & libc::O_ACCMODE == libc::O_RDONLY {
        flags = libc::O_RDWR;
    }
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    match openat(&dir, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(made) => Ok(Some(made)),
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL) => Ok(None),
        Err(e) => Err(FileError::path("make the nameless file of", &file.name)(e)),
    }
}

/// Makes an empty file of the right type, under `name` or beside it, and takes the name away again.
fn make(cx: &RestoreCx<'_>, entry: &pb::GhostFileEntry, name: &[u8], id: u32) -> Result<OwnedFd, FileError> {
    let unusable = |_| FileError::path("use", name)(Errno::EINVAL);
    let target = CString::new(entry.symlnk_target.as_deref().unwrap_or_default()).map_err(unusable)?;
    let origin = match entry.mode & libc::S_IFMT {
        libc::S_IFREG => Origin::Regular,
        libc::S_IFDIR => Origin::Directory,
        libc::S_IFIFO => Origin::Fifo,
        libc::S_IFLNK => Origin::Symlink(&target),
        libc::S_IFCHR if device::is_simple(u64::from(entry.rdev())) => {
            Origin::CharDevice(u64::from(entry.rdev()))
        }
        _ => {
            return Err(FileError::Changed {
                path: to_path(name).to_owned(),
                what: format!("a deleted file of mode {:o} cannot be made again", entry.mode),
            });
        }
    };
    let (dir, parents, last) = cx.view()?.nearest(name).map_err(FileError::name("make", name))?;
    for attempt in 0..NAMES {
        let mut alternative = last.as_bytes().to_vec();
        match attempt {
            0 => {}
            1 => alternative.extend_from_slice(format!(".cr.{id:x}.ghost").as_bytes()),
            _ => alternative.extend_from_slice(format!(".cr.{id:x}.{attempt}.ghost").as_bytes()),
        }
        let alternative = CString::new(alternative).map_err(unusable)?;
        let Failed { step, errno } = match passing::open(dir.as_fd(), &parents, &alternative, origin) {
            Ok(object) => return object_of(object, name),
            Err(Failed { step: Step::Make, errno: Errno::EEXIST }) => continue,
            Err(failed) => failed,
        };
        let action = match step {
            Step::Parent(_) => "make the directory of the deleted file",
            Step::Begin | Step::Make => "make the deleted file",
            Step::Open => "open the deleted file made at",
            Step::Swapped => "keep others from taking the place of the deleted file made at",
            Step::Remove => "remove the name of the deleted file",
        };
        return Err(FileError::path(action, name)(errno));
    }
    Err(FileError::path("find a free name for the deleted file", name)(Errno::EEXIST))
}

/// As an O_PATH descriptor: one that can write would keep the kernel from running a program.
fn object_of(made: OwnedFd, name: &[u8]) -> Result<OwnedFd, FileError> {
    let flags = nix::fcntl::fcntl(&made, nix::fcntl::FcntlArg::F_GETFL)
        .map_err(FileError::path("read the flags of", name))?;
    if flags & libc::O_PATH != 0 {
        return Ok(made);
    }
    view::reopen(made.as_fd(), OFlag::O_PATH).map_err(FileError::path("open", name))
}
