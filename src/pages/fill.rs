//! Fills a file of memory (shared memory, a memfd) from a pages image, with more than one
//! processor at work.
//!
//! Files of huge pages take no write(2): their pages are mapped one by one, written, unmapped.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::pagemap::{PRESENT, Placed};
use super::{PAGE, PagesError};
use crate::sys::mapping::{Access, Mapping};

/// Bytes moved at once.
const CHUNK: u64 = 512 << 10;
/// Chunks for which one thread is enough.
const CHUNKS_ALONE: usize = 8;
/// More threads than this only wait for memory.
const MOST_THREADS: usize = 4;

/// A file to be filled.
#[derive(Debug, Clone, Copy)]
pub struct Object<'a> {
    /// Id of the shared memory, for errors.
    pub shmid: u32,
    /// Open for reading and writing, of its full size.
    pub file: &'a File,
    /// Its size in bytes.
    pub size: u64,
}

/// Bytes that lie together in the image and in the object.
#[derive(Debug, Clone, Copy)]
struct Piece {
    from: u64,
    to: u64,
    len: u64,
}

/// Writes the present pages of `runs`, from `pages` (the image `pages_id`), to their places in `object`.
pub fn fill(object: Object<'_>, runs: &[Placed], pages: &File, pages_id: u32) -> Result<(), PagesError> {
    let stat = fstatfs(object.file).map_err(|e| object.failed(0, e.into()))?;
    let huge = (stat.filesystem_type() == HUGETLBFS_MAGIC)
        .then(|| u64::try_from(stat.block_size()).unwrap_or(PAGE).max(PAGE));
    let pieces = pieces(object, runs, huge)?;
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        let mut buffer = Vec::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(e) = object.write(*piece, pages, pages_id, huge, &mut buffer) {
                next.store(pieces.len(), Ordering::Relaxed);
                failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(e);
            }
        }
    };
    let threads = if pieces.len() <= CHUNKS_ALONE {
        1
    } else {
        std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS)
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Cuts runs into pieces that one buffer holds and, for huge pages, that lie in one of them.
fn pieces(object: Object<'_>, runs: &[Placed], huge: Option<u64>) -> Result<Vec<Piece>, PagesError> {
    let mut pieces = Vec::new();
    for placed in runs.iter().filter(|placed| placed.run.flags & PRESENT != 0) {
        let run = placed.run;
        if run.end() > object.size.next_multiple_of(PAGE) {
            return Err(PagesError::BehindEnd { shmid: object.shmid, offset: run.start });
        }
        // The last page may be begun only: what lies behind the end cannot be written.
        let end = run.end().min(object.size);
        let mut to = run.start;
        while to < end {
            let mut len = CHUNK.min(end - to);
            if let Some(huge) = huge {
                len = len.min(huge - to % huge);
            }
            pieces.push(Piece { from: placed.offset + (to - run.start), to, len });
            to += len;
        }
    }
    Ok(pieces)
}

impl Object<'_> {
    fn failed(&self, offset: u64, source: io::Error) -> PagesError {
        PagesError::Fill { shmid: self.shmid, offset, source }
    }

    fn write(
        &self,
        piece: Piece,
        pages: &File,
        pages_id: u32,
        huge: Option<u64>,
        buffer: &mut Vec<u8>,
    ) -> Result<(), PagesError> {
        buffer.resize(usize::try_from(piece.len).unwrap_or(0), 0);
        pages.read_exact_at(buffer, piece.from).map_err(|source| PagesError::Pages {
            action: "read",
            pages_id,
            source,
        })?;
        let written = match huge {
            None => self.file.write_all_at(buffer, piece.to),
            Some(huge) => self.write_mapped(buffer, piece.to, huge),
        };
        written.map_err(|source| self.failed(piece.to, source))
    }

    /// mmap says when there is no huge page left; a later touch would be a SIGBUS.
    fn write_mapped(&self, bytes: &[u8], to: u64, huge: u64) -> io::Result<()> {
        let base = to / huge * huge;
        let out_of_range = |_| io::Error::from_raw_os_error(libc::EFBIG);
        let offset = i64::try_from(base).map_err(out_of_range)?;
        let len = usize::try_from(huge).map_err(out_of_range)?;
        let map = Mapping::shared(self.file.as_fd(), offset, len, Access::ReadWrite, None)?;
        Ok(map.write(usize::try_from(to - base).map_err(out_of_range)?, bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::pages::pagemap::{PARENT, Run};

    fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn byte(page: u64) -> u8 {
        (page % 251) as u8 + 1
    }

    fn image(pages: u64) -> File {
        let file = memfd(0);
        (0..pages).for_each(|i| file.write_all_at(&[byte(i); PAGE as usize], i * PAGE).unwrap());
        file
    }

    fn placed(page: u64, pages: u64, offset: u64) -> Placed {
        Placed { run: Run { start: page * PAGE, pages, flags: PRESENT }, offset: offset * PAGE }
    }

    #[test]
    fn pages_at_their_places_and_nothing_else() {
        let object = memfd(5000 * PAGE + 100);
        let runs = [placed(3, 1, 0), placed(10, 3000, 1), placed(5000, 1, 3001)];
        let size = 5000 * PAGE + 100;
        fill(Object { shmid: 1, file: &object, size }, &runs, &image(3002), 1).unwrap();
        assert_eq!(object.metadata().unwrap().len(), size, "not longer than before");
        for page in 0..5000u64 {
            let mut got = [0; PAGE as usize];
            object.read_exact_at(&mut got, page * PAGE).unwrap();
            let want = match page {
                3 => byte(0),
                10..3010 => byte(page - 9),
                _ => 0,
            };
            assert!(got.iter().all(|b| *b == want), "page {page}");
        }
        let mut last = [0; 100];
        object.read_exact_at(&mut last, 5000 * PAGE).unwrap();
        assert_eq!(last, [byte(3001); 100]);
    }

    #[test]
    fn pages_behind_the_end_and_missing_ones() {
        let object = memfd(20 * PAGE);
        let object = Object { shmid: 4, file: &object, size: 20 * PAGE };
        let error = fill(object, &[placed(20, 1, 0)], &image(1), 1).unwrap_err();
        assert_eq!(error.to_string(), "pages at 0x14000 lie behind the end of shared memory 4");
        let error = fill(object, &[placed(0, 2, 0)], &image(1), 7).unwrap_err();
        assert_eq!(error.to_string(), "read pages-7.img");
        let big = memfd(5000 * PAGE);
        let big = Object { shmid: 4, file: &big, size: 5000 * PAGE };
        let error = fill(big, &[placed(0, 5000, 0)], &image(4000), 7).unwrap_err();
        assert_eq!(error.to_string(), "read pages-7.img");
        let parent = Placed { run: Run { start: 0, pages: 5, flags: PARENT }, offset: 0 };
        fill(object, &[parent], &image(0), 1).unwrap();
    }
}
