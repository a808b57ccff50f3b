//! Fills a file of memory (shared memory, a memfd) from images of pages, with more than one
//! processor at work.
//!
//! Files of huge pages take no write(2): their pages are mapped one by one, written, unmapped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::{PAGE, Pages, PagesError, Piece};
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

/// Bytes that lie together in the object: parts of the pages, one behind the other.
#[derive(Debug)]
struct Chunk {
    to: u64,
    len: u64,
    parts: Range<usize>,
}

/// Writes all of `pages` to their places in `object`, which is new: pages of zeros need not be made. Those that are on their way
/// are waited for.
pub fn fill(object: Object<'_>, pages: &Pages) -> Result<(), PagesError> {
    let stat = fstatfs(object.file).map_err(|e| object.failed(0, e.into()))?;
    let huge = (stat.filesystem_type() == HUGETLBFS_MAGIC)
        .then(|| u64::try_from(stat.block_size()).unwrap_or(PAGE).max(PAGE));
    let (chunks, parts) = chunks(object, pages.pieces(), huge)?;
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        let mut buffer = Vec::new();
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            crate::deadline::progress();
            let parts = parts.get(chunk.parts.clone()).unwrap_or_default();
            if let Err(e) = object.write(chunk, pages, parts, huge, &mut buffer) {
                next.store(chunks.len(), Ordering::Relaxed);
                failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(e);
            }
        }
    };
    let threads = if chunks.len() <= CHUNKS_ALONE {
        1
    } else {
        std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS)
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Where no more threads may be made (a pids cgroup, a limit of memory), those that there are do it all.
            if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Cuts and joins pieces to chunks that one buffer holds and, for huge pages, that lie in one of them.
fn chunks(
    object: Object<'_>,
    pieces: &[Piece],
    huge: Option<u64>,
) -> Result<(Vec<Chunk>, Vec<Piece>), PagesError> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut parts = Vec::new();
    for piece in pieces {
        if piece.end > object.size.next_multiple_of(PAGE) {
            return Err(PagesError::BehindEnd { shmid: object.shmid, offset: piece.start });
        }
        // The last page may be begun only: what lies behind the end cannot be written.
        let end = piece.end.min(object.size);
        let mut to = piece.start;
        while to < end {
            let room = |from: u64| huge.map_or(CHUNK, |huge| CHUNK.min(huge - from % huge));
            let open = chunks.last_mut().filter(|open| open.to + open.len == to && open.len < room(open.to));
            let left = open.as_ref().map_or(room(to), |open| room(open.to) - open.len);
            let len = left.min(end - to);
            parts.push(piece.within(to, to + len));
            match open {
                Some(open) => {
                    open.len += len;
                    open.parts.end = parts.len();
                }
                None => chunks.push(Chunk { to, len, parts: parts.len() - 1..parts.len() }),
            }
            to += len;
        }
    }
    Ok((chunks, parts))
}

impl Object<'_> {
    fn failed(&self, offset: u64, source: io::Error) -> PagesError {
        PagesError::Fill { shmid: self.shmid, offset, source }
    }

    fn write(
        &self,
        chunk: &Chunk,
        pages: &Pages,
        parts: &[Piece],
        huge: Option<u64>,
        buffer: &mut Vec<u8>,
    ) -> Result<(), PagesError> {
        let mut write = |parts: &[Piece], to: u64, len: u64| {
            buffer.resize(usize::try_from(len).unwrap_or(0), 0);
            pages.fetch(parts, buffer)?;
            let written = match huge {
                None => self.file.write_all_at(buffer, to),
                Some(huge) => self.write_mapped(buffer, to, huge),
            };
            written.map_err(|source| self.failed(to, source))
        };
        let mut data = Vec::new();
        for part in parts {
            pages.wait_for(part)?;
            pages.without_holes(*part, &mut data)?;
        }
        if data.iter().map(Piece::len).sum::<u64>() == chunk.len {
            return write(parts, chunk.to, chunk.len);
        }
        data.iter().try_for_each(|piece| write(&[*piece], piece.start, piece.len()))
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
    use std::os::fd::AsRawFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::image::{ImageKind, MemStore, PagesSink, Store};
    use crate::pages::pagemap::{PARENT, PRESENT, PagemapWriter, Run};

    fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn byte(page: u64) -> u8 {
        (page % 251) as u8 + 1
    }

    fn run(page: u64, pages: u64) -> Run {
        Run { start: page * PAGE, pages, flags: PRESENT }
    }

    /// A snapshot of an object with the pages of `runs`, numbered from `first` on.
    fn snapshot(store: MemStore, runs: &[Run], first: u64) -> MemStore {
        let mut pagemap = PagemapWriter::create(&store, ImageKind::ShmemPagemap, 4, 7).unwrap();
        let PagesSink::File(image) = store.create_pages("pages-7.img", 0).unwrap() else { panic!("no file") };
        let mut number = 0;
        for run in runs {
            pagemap.push(*run).unwrap();
            for _ in (0..run.pages).filter(|_| run.flags == PRESENT) {
                image.write_all_at(&[byte(first + number); PAGE as usize], number * PAGE).unwrap();
                number += 1;
            }
        }
        pagemap.finish().unwrap();
        store
    }

    fn pages(store: &MemStore) -> Pages {
        Pages::read(store, ImageKind::ShmemPagemap, 4).unwrap().unwrap()
    }

    #[test]
    fn pages_at_their_places_and_nothing_else() {
        let object = memfd(5000 * PAGE + 100);
        let runs = [run(3, 1), run(10, 3000), run(5000, 1)];
        let size = 5000 * PAGE + 100;
        let pages = pages(&snapshot(MemStore::new(), &runs, 0));
        fill(Object { shmid: 1, file: &object, size }, &pages).unwrap();
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
    fn pages_of_two_snapshots_in_turn() {
        let parent = snapshot(MemStore::new(), &[run(0, 3000)], 0);
        let runs: Vec<Run> = (0..3000)
            .map(|page| Run { flags: [PRESENT, PARENT][page as usize % 2], ..run(page, 1) })
            .collect();
        let child = snapshot(MemStore::on(&parent), &runs, 100_000);
        let object = memfd(3000 * PAGE);
        fill(Object { shmid: 4, file: &object, size: 3000 * PAGE }, &pages(&child)).unwrap();
        for page in 0..3000u64 {
            let mut got = [0; PAGE as usize];
            object.read_exact_at(&mut got, page * PAGE).unwrap();
            let want = if page % 2 == 0 { byte(100_000 + page / 2) } else { byte(page) };
            assert!(got.iter().all(|b| *b == want), "page {page}");
        }
    }

    #[test]
    fn chunks_fit_into_a_buffer_and_into_a_huge_page() {
        let object = memfd(0);
        let object = Object { shmid: 4, file: &object, size: 8 << 20 };
        let piece = |start: u64, pages: u64, image| Piece {
            start: start * PAGE,
            end: (start + pages) * PAGE,
            image,
            offset: start * PAGE,
        };
        let pieces = [piece(0, 1, 0), piece(1, 200, 1), piece(201, 700, 0), piece(1000, 1, 1)];
        for (huge, most) in [(None, CHUNK), (Some(2 << 20), 2 << 20), (Some(64 << 10), 64 << 10)] {
            let (chunks, parts) = chunks(object, &pieces, huge).unwrap();
            let mut at = 0;
            for chunk in &chunks {
                assert!(chunk.len <= most.min(CHUNK) && chunk.parts.start == at);
                assert!(huge.is_none_or(|huge| chunk.to / huge == (chunk.to + chunk.len - 1) / huge));
                let mut to = chunk.to;
                for part in &parts[chunk.parts.clone()] {
                    assert_eq!((part.start, part.offset), (to, to));
                    to = part.end;
                }
                assert_eq!(to, chunk.to + chunk.len);
                at = chunk.parts.end;
            }
            assert_eq!(at, parts.len());
            let mut joined: Vec<Piece> = Vec::new();
            for part in &parts {
                if joined.last_mut().is_none_or(|last| !last.join(part)) {
                    joined.push(*part);
                }
            }
            assert_eq!(joined, pieces);
        }
    }

    #[test]
    fn pages_behind_the_end_and_missing_ones() {
        let object = memfd(20 * PAGE);
        let object = Object { shmid: 4, file: &object, size: 20 * PAGE };
        let error = fill(object, &pages(&snapshot(MemStore::new(), &[run(20, 1)], 0))).unwrap_err();
        assert_eq!(error.to_string(), "pages at 0x14000 lie behind the end of shared memory 4");
        let big = memfd(5000 * PAGE);
        let big = Object { shmid: 4, file: &big, size: 5000 * PAGE };
        for (object, count) in [(object, 2), (big, 5000)] {
            let store = snapshot(MemStore::new(), &[run(0, count)], 0);
            let pages = pages(&store);
            let file = pages.images()[0].file().unwrap().0.try_clone().unwrap();
            File::options()
                .write(true)
                .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
                .unwrap()
                .set_len(PAGE)
                .unwrap();
            let error = fill(object, &pages).unwrap_err();
            assert_eq!(error.to_string(), "read memory:/pages-7.img");
        }
    }
}
