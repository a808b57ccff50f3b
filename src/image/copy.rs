//! All images of a snapshot from one store into another.
//!
//! Holes stay holes where the other store keeps files. Whether the copy is a snapshot is for the caller to commit.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::error::ImageError;
use super::store::{ImageFile, PagesSink, Store};

/// Bytes moved at once.
const PIECE: usize = 256 << 10;

/// Whether a file in an images directory is an image.
pub fn is_image(name: &str) -> bool {
    name.ends_with(".img")
}

/// Copies every image of `from`.
pub fn copy_images(from: &dyn Store, into: &dyn Store) -> Result<(), ImageError> {
    let mut buffer = Vec::new();
    for name in from.names()?.into_iter().filter(|name| is_image(name)) {
        let found = from.open_raw(&name)?;
        let image = found.ok_or_else(|| ImageError::Absent { path: from.path_of(&name) })?;
        copy_image(&name, image, into, &mut buffer)?;
    }
    Ok(())
}

/// Copies one image; `buffer` is used again for the next one.
pub fn copy_image(
    name: &str,
    mut image: ImageFile,
    into: &dyn Store,
    buffer: &mut Vec<u8>,
) -> Result<(), ImageError> {
    buffer.resize(PIECE, 0);
    let target = into.path_of(name);
    let failed = |source| ImageError::Io { action: "copy", path: target.clone(), source };
    if !name.starts_with("pages-") {
        let mut sink = into.create_raw(name)?;
        let copied = io::copy(&mut image.by_ref(), &mut sink).map_err(failed)?;
        if copied != image.len() {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        return sink.end().map_err(failed);
    }
    match into.create_pages(name, image.len())? {
        PagesSink::File(file) => copy_sparse(&image, &file, buffer).map_err(failed),
        PagesSink::Stream(stream) => {
            let mut at = 0;
            while at < image.len() {
                let piece = next(buffer, image.len() - at);
                image.read_exact_at(piece, at).map_err(failed)?;
                at += piece.len() as u64;
                stream.stage(&[IoSlice::new(piece)])().map_err(failed)?;
            }
            stream.end().map_err(failed)
        }
    }
}

fn next(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
    buffer.get_mut(..len).unwrap_or_default()
}

/// The next place at or behind `at` where data or a hole begins; none behind the end of the file.
fn seek(file: &File, at: u64, what: Whence) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    match lseek(file, at, what) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn copy_sparse(image: &ImageFile, into: &File, buffer: &mut [u8]) -> io::Result<()> {
    into.set_len(image.len())?;
    let end = image.start() + image.len();
    let mut at = image.start();
    while at < end
        && let Some(data) = seek(image.file(), at, Whence::SeekData)?.filter(|data| *data < end)
    {
        let hole = seek(image.file(), data, Whence::SeekHole)?.unwrap_or(end).min(end);
        at = data;
        while at < hole {
            let piece = next(buffer, hole - at);
            image.read_exact_at(piece, at - image.start())?;
            into.write_all_at(piece, at - image.start())?;
            at += piece.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::image::{DirStore, MemStore};

    #[test]
    fn images_come_over_with_their_holes_and_nothing_else_does() {
        let from = MemStore::new();
        let mut sink = from.create_raw("inventory.img").unwrap();
        sink.write_all(&[7; 600_000]).unwrap();
        from.create_raw("dump.log").unwrap().write_all(b"no image").unwrap();
        let PagesSink::File(pages) = from.create_pages("pages-1.img", 0).unwrap() else { panic!() };
        pages.write_all_at(&[1; 8192], 4096).unwrap();
        pages.write_all_at(&[2; 4096], 100 << 20).unwrap();
        pages.set_len(200 << 20).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let into = DirStore::for_dump(dir.path()).unwrap();
        copy_images(&from, &into).unwrap();
        into.commit().unwrap();
        let names: Vec<String> =
            into.names().unwrap().into_iter().filter(|name| name.contains('.')).collect();
        assert_eq!(names, ["inventory.img", "pages-1.img"]);
        let meta = std::fs::metadata(dir.path().join("pages-1.img")).unwrap();
        assert!(meta.len() == 200 << 20 && meta.blocks() * 512 < 1 << 20, "{}", meta.blocks());
        let image = into.open_raw("pages-1.img").unwrap().unwrap();
        let mut piece = [0; 3];
        for (at, expected) in [(4095, [0, 1, 1]), ((100 << 20) + 4094, [2, 2, 0]), (150 << 20, [0; 3])] {
            image.read_exact_at(&mut piece, at).unwrap();
            assert_eq!(piece, expected);
        }
    }
}
