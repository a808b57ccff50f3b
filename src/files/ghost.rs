//! Ghosts: files without any name, whose content travels with the images.
//!
//! Saved once per inode in `ghost-file-N.img`: type, owner, mode, times, target of a symbolic link, and the content of a
//! regular file, with its holes. At restore the file is made again under its old name if nobody has it (so /proc shows
//! the same path), else under another one beside it, and the name is removed at once; not even a restore that is killed
//! leaves it behind. Directories that are gone are made for that moment only.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags, OFlag},
    sys::stat::Mode,
    unistd::{Gid, Uid, Whence, fchownat, lseek},
};

use super::{
    DumpCx, FdView, FileError, RestoreCx, device,
    path::{readable, to_path},
};
use crate::{
    image::{ImageKind, ImageReader, ImageWriter, TypedStore, pb},
    sys::{
        Errno,
        passing::{self, Failed, Origin, Step},
    },
    view,
};

/// Content is copied in pieces of this size.
const PIECE: usize = 256 << 10;
/// Alternative names tried at restore, before giving up.
const NAMES: u32 = 1000;

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Device number as CRIU stores it: 12 bits major, 20 bits minor.
fn kernel_dev(dev: u64) -> u32 {
    (libc::major(dev) << 20) | (libc::minor(dev) & 0xf_ffff)
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
    let time = |(seconds, nanoseconds): (i64, i64)| pb::Timeval {
        tv_sec: seconds.cast_unsigned(),
        tv_usec: (nanoseconds / 1000).cast_unsigned(),
    };
    let mut entry = pb::GhostFileEntry {
        uid: stat.uid,
        gid: stat.gid,
        mode: stat.mode,
        dev: Some(kernel_dev(stat.dev)),
        ino: Some(stat.ino),
        atim: Some(time(stat.atime)),
        mtim: Some(time(stat.mtime)),
        ..Default::default()
    };
    match stat.kind() {
        libc::S_IFREG => {
            if in_use < stat.size {
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
        let file = readable(fd.file()?).map_err(FileError::sys("read a deleted file"))?;
        if entry.chunks == Some(true) {
            dump_chunks(&file, &mut image)?;
        } else {
            lseek(&file, 0, Whence::SeekSet).map_err(FileError::sys("read a deleted file"))?;
            copy_out(&mut File::from(file).take(stat.size), &mut image)?;
        }
    }
    image.finish()?;
    Ok(())
}

fn link_target(fd: &FdView<'_>) -> Result<Vec<u8>, FileError> {
    nix::fcntl::readlinkat(fd.file()?, "")
        .map(super::path::bytes_of)
        .map_err(FileError::sys("read a deleted symbolic link"))
}

/// Parts that hold data, each with where it belongs.
fn dump_chunks(file: &OwnedFd, image: &mut ImageWriter) -> Result<(), FileError> {
    let failed = FileError::sys;
    let mut at = 0i64;
    loop {
        let data = match lseek(file, at, Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => return Ok(()),
            Err(e) => return Err(failed("find data in a deleted file")(e)),
        };
        let hole = lseek(file, data, Whence::SeekHole).map_err(failed("find holes in a deleted file"))?;
        let chunk = pb::GhostChunkEntry { off: data.cast_unsigned(), len: (hole - data).cast_unsigned() };
        image.entry(&chunk)?;
        lseek(file, data, Whence::SeekSet).map_err(failed("read a deleted file"))?;
        let copy = file.try_clone().map_err(|e| failed("read a deleted file")(errno(&e)))?;
        copy_out(&mut File::from(copy).take(chunk.len), image)?;
        at = hole;
    }
}

/// Appends all that `from` gives; less than its limit means that the file shrank while the task was frozen.
fn copy_out(from: &mut io::Take<File>, image: &mut ImageWriter) -> Result<(), FileError> {
    let mut piece = vec![0u8; PIECE.min(usize::try_from(from.limit()).unwrap_or(PIECE))];
    while from.limit() > 0 {
        let got = from.read(&mut piece).map_err(|e| FileError::sys("read a deleted file")(errno(&e)))?;
        if got == 0 {
            return Err(FileError::sys("read a deleted file that became shorter")(Errno::EIO));
        }
        image.extra(piece.get(..got).unwrap_or_default())?;
    }
    Ok(())
}

/// Makes the file of `ghost-file-ID.img` again. The result is an O_PATH descriptor of a file without a name.
pub(super) fn open(cx: &mut RestoreCx<'_>, name: &[u8], id: u32) -> Result<OwnedFd, FileError> {
    let Some(mut image) = cx.store.open(ImageKind::GhostFile, u64::from(id))? else {
        return Err(FileError::entry(id, "the image of a deleted file is not there"));
    };
    let Some(entry) = image.next_entry::<pb::GhostFileEntry>()? else {
        return Err(FileError::entry(id, "the image of a deleted file is empty"));
    };
    let failed = |action: &'static str| FileError::path(action, name);
    let object = make(cx, &entry, name, id)?;
    if entry.mode & libc::S_IFMT == libc::S_IFREG {
        fill(&object, &entry, image, name)?;
    }
    let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    fchownat(&object, "", owner.0, owner.1, AtFlags::AT_EMPTY_PATH)
        .map_err(failed("set the owner of the deleted file"))?;
    if entry.mode & libc::S_IFMT != libc::S_IFLNK {
        let through = format!("/proc/self/fd/{}", object.as_raw_fd());
        nix::sys::stat::fchmodat(
            AT_FDCWD,
            through.as_str(),
            Mode::from_bits_truncate(entry.mode & 0o7777),
            nix::sys::stat::FchmodatFlags::FollowSymlink,
        )
        .map_err(failed("set the mode of the deleted file"))?;
    }
    passing::set_times(object.as_fd(), &[entry.atim, entry.mtim].map(time))
        .map_err(failed("set the times of the deleted file"))?;
    Ok(object)
}

fn time(of: Option<pb::Timeval>) -> libc::timespec {
    match of {
        Some(of) => libc::timespec {
            tv_sec: of.tv_sec.cast_signed(),
            tv_nsec: (of.tv_usec.min(999_999) * 1000).cast_signed(),
        },
        None => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
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

/// Writes the content.
fn fill(
    object: &OwnedFd,
    entry: &pb::GhostFileEntry,
    mut image: ImageReader,
    name: &[u8],
) -> Result<(), FileError> {
    let failed = |e: io::Error| FileError::path("write the deleted file", name)(errno(&e));
    let through = format!("/proc/self/fd/{}", object.as_raw_fd());
    let mut file = File::options().write(true).open(through).map_err(failed)?;
    if entry.chunks != Some(true) {
        let (content, left) = image.into_payload()?;
        let copied = io::copy(&mut content.take(left), &mut file).map_err(failed)?;
        if copied != left {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        return Ok(());
    }
    let size = entry.size();
    file.set_len(size).map_err(failed)?;
    while let Some(chunk) = image.next_entry::<pb::GhostChunkEntry>()? {
        if chunk.off.checked_add(chunk.len).is_none_or(|end| end > size) {
            return Err(FileError::Changed {
                path: image.path().to_owned(),
                what: "a piece of the content lies behind the end of the file".into(),
            });
        }
        file.seek(SeekFrom::Start(chunk.off)).map_err(failed)?;
        let mut left = chunk.len;
        while left > 0 {
            let piece = image.extra(left.min(PIECE as u64))?;
            left -= piece.len() as u64;
            file.write_all(&piece).map_err(failed)?;
        }
    }
    Ok(())
}
