//! What is in a regular file without a name: copied with its holes, and on hugetlbfs, whose files take no write(2), through
//! a mapping.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use nix::{
    sys::statfs::{HUGETLBFS_MAGIC, fstatfs},
    unistd::{Whence, lseek},
};

use super::{FileError, errno};
use crate::{
    files::path::{readable, to_path},
    image::{ImageReader, ImageWriter, pb},
    sys::{
        Errno, inode,
        mapping::{Access, Mapping},
    },
};

/// Content is copied in pieces of this size. Pages of hugetlbfs are a multiple of it.
const PIECE: usize = 256 << 10;

fn failed(errno: Errno) -> FileError {
    FileError::sys("read a deleted file")(errno)
}

/// Bytes of a page, when the file is on hugetlbfs.
pub(super) fn huge_page(file: &impl AsFd) -> Option<u64> {
    let fs = fstatfs(file).ok()?;
    (fs.filesystem_type() == HUGETLBFS_MAGIC).then(|| u64::try_from(fs.block_size()).unwrap_or(0))
}

/// Appends the content to the image: in pieces with their places if `entry` says chunks, else as it is.
pub(super) fn dump(
    file: &impl AsFd,
    size: u64,
    entry: &pb::GhostFileEntry,
    fiemap: bool,
    image: &mut ImageWriter,
) -> Result<(), FileError> {
    let file = File::from(readable(file.as_fd()).map_err(failed)?);
    if entry.chunks != Some(true) {
        return copy_out(&file, 0, size, image);
    }
    if entry.huge_page.is_some() {
        return dump_huge(&file, size, image);
    }
    for (off, len) in data(&file, size, fiemap)? {
        image.entry(&pb::GhostChunkEntry { off, len })?;
        copy_out(&file, off, len, image)?;
    }
    Ok(())
}

/// hugetlbfs does not tell what was never written; what is zero is left out, since it would take memory from a small pool.
fn dump_huge(file: &File, size: u64, image: &mut ImageWriter) -> Result<(), FileError> {
    let mut piece = vec![0u8; PIECE];
    let mut off = 0;
    while off < size {
        let len = (size - off).min(PIECE as u64);
        let bytes = piece.get_mut(..usize::try_from(len).unwrap_or(PIECE)).unwrap_or_default();
        file.read_exact_at(bytes, off).map_err(|e| failed(errno(&e)))?;
        if bytes.iter().any(|byte| *byte != 0) {
            image.entry(&pb::GhostChunkEntry { off, len })?;
            image.extra(bytes)?;
        }
        off += len;
    }
    Ok(())
}

/// Appends `len` bytes from `off` on; less means that the file shrank while the task was frozen.
fn copy_out(file: &File, off: u64, len: u64, image: &mut ImageWriter) -> Result<(), FileError> {
    let mut piece = vec![0u8; PIECE.min(usize::try_from(len).unwrap_or(PIECE))];
    let mut done = 0;
    while done < len {
        let want = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
        let bytes = piece.get_mut(..want).unwrap_or_default();
        match file.read_at(bytes, off + done) {
            Ok(0) => return Err(FileError::sys("read a deleted file that became shorter")(Errno::EIO)),
            Ok(got) => {
                image.extra(bytes.get(..got).unwrap_or_default())?;
                done += got as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(errno(&e))),
        }
    }
    Ok(())
}

/// Where there is data: offset and length of each part.
fn data(file: &File, size: u64, fiemap: bool) -> Result<Vec<(u64, u64)>, FileError> {
    if fiemap && let Some(parts) = extents(file, size)? {
        return Ok(parts);
    }
    let mut parts = Vec::new();
    let mut at = 0i64;
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(parts),
            Err(e) => return Err(FileError::sys("find data in a deleted file")(e)),
        };
        let end =
            lseek(file, start, Whence::SeekHole).map_err(FileError::sys("find holes in a deleted file"))?;
        if end <= start {
            return Ok(parts);
        }
        parts.push((start.cast_unsigned(), (end - start).cast_unsigned()));
        at = end;
    }
}

/// The same by FIEMAP, which needs one call for many parts. `None` where the file system does not know it.
fn extents(file: &File, size: u64) -> Result<Option<Vec<(u64, u64)>>, FileError> {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        let some = match inode::extents(file.as_fd(), at) {
            Ok(some) => some,
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EINVAL | Errno::EBADR) if at == 0 => {
                return Ok(None);
            }
            Err(e) => return Err(FileError::sys("find the extents of a deleted file (FIEMAP)")(e)),
        };
        let Some(last) = some.last().copied() else { break };
        for extent in some {
            let end = extent.logical.saturating_add(extent.length).min(size);
            if extent.is_unwritten() || end <= extent.logical {
                continue;
            }
            match parts.last_mut() {
                Some((off, len)) if *off + *len == extent.logical => *len = end - *off,
                _ => parts.push((extent.logical, end - extent.logical)),
            }
        }
        let next = last.logical.saturating_add(last.length);
        if last.is_last() || next <= at {
            break;
        }
        at = next;
    }
    Ok(Some(parts))
}

/// A file that is being filled.
struct Sink<'a> {
    file: File,
    huge: Option<u64>,
    name: &'a [u8],
}

impl Sink<'_> {
    fn failed(&self, error: &io::Error) -> FileError {
        FileError::path("write the deleted file", self.name)(errno(error))
    }

    fn write(&self, mut bytes: &[u8], mut off: u64) -> Result<(), FileError> {
        let Some(page) = self.huge else {
            return self.file.write_all_at(bytes, off).map_err(|e| self.failed(&e));
        };
        while !bytes.is_empty() {
            let within = off % page;
            let len = usize::try_from(page - within).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
            self.write_mapped(now, off - within, within, page).map_err(|e| match e.raw_os_error() {
                Some(libc::ENOMEM) => FileError::unsupported(
                    "no huge page is left for a deleted file of hugetlbfs",
                    "raise the pool: /proc/sys/vm/nr_hugepages",
                ),
                _ => self.failed(&e),
            })?;
            (bytes, off) = (rest, off + len as u64);
        }
        Ok(())
    }

    /// mmap says when there is no huge page left; a later touch would be a SIGBUS.
    fn write_mapped(&self, bytes: &[u8], base: u64, within: u64, page: u64) -> io::Result<()> {
        let out_of_range = |_| io::Error::from_raw_os_error(libc::EFBIG);
        let offset = i64::try_from(base).map_err(out_of_range)?;
        let len = usize::try_from(page).map_err(out_of_range)?;
        let map = Mapping::shared(self.file.as_fd(), offset, len, Access::ReadWrite, None)?;
        Ok(map.write(usize::try_from(within).map_err(out_of_range)?, bytes)?)
    }
}

/// Writes the content that follows `entry` in its image into `object`.
pub(super) fn fill(
    object: &OwnedFd,
    entry: &pb::GhostFileEntry,
    mut image: ImageReader,
    name: &[u8],
) -> Result<(), FileError> {
    let file = crate::view::reopen(object.as_fd(), nix::fcntl::OFlag::O_RDWR)
        .map_err(FileError::path("write the deleted file", name))?;
    let sink = Sink { file: File::from(file), huge: huge_page(object), name };
    let size = |size| sink.file.set_len(size).map_err(|e| sink.failed(&e));
    if entry.chunks != Some(true) {
        let (mut content, left) = image.into_payload();
        size(left)?;
        let mut piece = vec![0u8; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
        let mut done = 0;
        while done < left {
            let want = usize::try_from(left - done).unwrap_or(PIECE).min(PIECE);
            let bytes = piece.get_mut(..want).unwrap_or_default();
            content.read_exact(bytes).map_err(|e| sink.failed(&e))?;
            sink.write(bytes, done)?;
            done += want as u64;
        }
        return Ok(());
    }
    size(entry.size())?;
    while let Some(chunk) = image.next_entry::<pb::GhostChunkEntry>()? {
        if chunk.off.checked_add(chunk.len).is_none_or(|end| end > entry.size()) {
            return Err(FileError::Changed {
                path: image.path().to_owned(),
                what: "a piece of the content lies behind the end of the file".into(),
            });
        }
        let (mut off, mut left) = (chunk.off, chunk.len);
        while left > 0 {
            let piece = image.extra(left.min(PIECE as u64))?;
            sink.write(&piece, off)?;
            (off, left) = (off + piece.len() as u64, left - piece.len() as u64);
        }
    }
    Ok(())
}

/// The place of the file must have pages of the size it had.
pub(super) fn check_place(
    object: &OwnedFd,
    entry: &pb::GhostFileEntry,
    name: &[u8],
) -> Result<(), FileError> {
    let page = huge_page(object);
    if page == entry.huge_page || entry.huge_page.is_none() {
        return Ok(());
    }
    Err(FileError::Changed {
        path: to_path(name).to_owned(),
        what: format!("is not on a hugetlbfs with pages of {} bytes", entry.huge_page()),
    })
}
