//! Moves pages into a pages image, with more than one processor at work.
//!
//! The pages come as a sequence of [`Span`]s, cut into chunks that fit into a processor's own
//! cache. A worker takes the next chunk, reads it into its buffer, leaves out pages that need not
//! be stored, waits for its turn to learn where in the image its pages go (the pages lie dense and
//! in order, so that is known only when the chunk before has been read), and writes them there
//! while the next worker is already at the following chunk. A small task never sees a second
//! thread.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::sys::uio::pwritev;

use super::pagemap::{PagemapWriter, Run};
use super::{PAGE, PagesError};
use crate::image::PagesSink;
use crate::sys::{Errno, pid::HostPid, process_vm};
use crate::{deadline, interrupt, progress};

/// Pages in one chunk: 256 KiB lie in the second cache of any processor of these days, beside what
/// the kernel needs there (measured: larger ones are slower).
const CHUNK_PAGES: u64 = 64;
/// The same in bytes: the most that [`PagesStream::room`](crate::image::PagesStream::room) is asked for.
#[allow(clippy::cast_possible_truncation)] // a small constant
pub const CHUNK: usize = (CHUNK_PAGES * PAGE) as usize;
/// Chunks done before another thread is worth its start.
const CHUNKS_ALONE: u64 = 16;
/// More threads than this only wait for memory.
const MOST_THREADS: usize = 4;

/// Pages to store, alike in everything that matters for copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Address and flags in the pagemap.
    pub run: Run,
    /// A page of zeros is the same as no page.
    pub zero_is_absent: bool,
    /// The fast way of reading is known to fail here (PROT_NONE and the like).
    pub unreadable: bool,
}

/// Where pages come from.
pub trait Source: Sync {
    /// Fills `into`, which is as long as all spans together, with their pages.
    fn read(&self, spans: &[Span], into: &mut [u8]) -> Result<(), PagesError>;
}

/// The memory of a stopped task.
#[derive(Debug)]
pub struct TaskMemory {
    pid: HostPid,
    mem: File,
}

impl TaskMemory {
    /// Of the living thread `pid`.
    pub fn open(pid: HostPid) -> io::Result<Self> {
        Ok(Self { pid, mem: File::open(format!("/proc/{pid}/mem"))? })
    }

    /// Reads through /proc/PID/mem, which asks for no permission of the area.
    fn read_mem(&self, addr: u64, into: &mut [u8]) -> Result<(), PagesError> {
        self.mem.read_exact_at(into, addr).map_err(|source| PagesError::Memory {
            pid: self.pid,
            addr,
            source,
        })
    }

    /// Reads readable spans at once; how many bytes came.
    fn read_fast(&self, spans: &[Span], into: &mut [u8]) -> usize {
        let remote: Vec<(u64, usize)> =
            spans.iter().map(|span| (span.run.start, bytes(span.run.pages))).collect();
        process_vm::read(self.pid, &remote, into).unwrap_or(0)
    }
}

impl Source for TaskMemory {
    fn read(&self, spans: &[Span], into: &mut [u8]) -> Result<(), PagesError> {
        let mut into = into;
        let mut left = spans;
        while let Some(first) = left.first() {
            let alike = left.iter().take_while(|span| span.unreadable == first.unreadable).count();
            let (now, later) = left.split_at(alike);
            let len = now.iter().map(|span| bytes(span.run.pages)).sum();
            let (buffer, rest) = into.split_at_mut(len);
            let got = if first.unreadable { 0 } else { self.read_fast(now, buffer) };
            // What the fast way left (all of it, or from the page on that it could not read).
            let mut at = 0;
            for span in now {
                let span_len = bytes(span.run.pages);
                let done = got.saturating_sub(at).min(span_len);
                if let Some(missing) = buffer.get_mut(at + done..at + span_len)
                    && !missing.is_empty()
                {
                    self.read_mem(span.run.start + done as u64, missing)?;
                }
                at += span_len;
            }
            left = later;
            into = rest;
        }
        Ok(())
    }
}

/// An object of shared memory; addresses are offsets in it.
#[derive(Debug)]
pub struct SharedObject<'a> {
    /// Its id in the images.
    pub shmid: u32,
    /// Open for reading.
    pub file: &'a File,
}

impl Source for SharedObject<'_> {
    fn read(&self, spans: &[Span], into: &mut [u8]) -> Result<(), PagesError> {
        let mut at = 0;
        for span in spans {
            let len = bytes(span.run.pages);
            let buffer = into.get_mut(at..at + len).unwrap_or_default();
            let shared = |source| PagesError::Shared { shmid: self.shmid, offset: span.run.start, source };
            read_to_end_of_file(self.file, span.run.start, buffer).map_err(shared)?;
            at += len;
        }
        Ok(())
    }
}

/// Fills `into` from `offset`; zeros behind the end of the file (its last page may be begun only).
fn read_to_end_of_file(file: &File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..)
        && !rest.is_empty()
    {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Pages read.
    pub pages_read: u64,
    /// Pages in the image.
    pub pages_written: u64,
}

/// Copies the pages of `spans` from `source` into `pages` (the image `pages_id`) and their runs
/// into `pagemap`, and finishes both. Without a pagemap there is one already, which has all spans.
pub fn copy<S: Source>(
    source: &S,
    spans: impl Iterator<Item = Result<Span, PagesError>> + Send,
    pagemap: Option<PagemapWriter>,
    pages: PagesSink,
    pages_id: u32,
) -> Result<Copied, PagesError> {
    let copy = Copy {
        source,
        pages: &pages,
        pages_id,
        feed: Mutex::new(Feed { spans, begun: None, chunks: 0, failed: false }),
        tail: Mutex::new(Tail { turn: 0, offset: 0, pagemap, copied: Copied::default(), failed: false }),
        turn_changed: Condvar::new(),
    };
    let mut buffer = Buffer::default();
    if copy.work(&mut buffer, CHUNKS_ALONE)? == Progress::More {
        let threads = match &pages {
            PagesSink::File(_) => {
                std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS)
            }
            // Most of the time one of them waits for room in the socket or pipe.
            PagesSink::Stream(_) => MOST_THREADS,
        };
        std::thread::scope(|scope| {
            // Where no more threads may be made (a pids cgroup, a limit of memory), those that there are do it all.
            let others: Vec<_> = (1..threads)
                .map_while(|_| {
                    let work = || copy.work(&mut Buffer::default(), u64::MAX);
                    std::thread::Builder::new().spawn_scoped(scope, work).ok()
                })
                .collect();
            let mut result = copy.work(&mut buffer, u64::MAX).map(drop);
            for other in others {
                let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                // The one that failed tells; the others were only told to stop.
                result = result.and(other.map(drop));
            }
            result
        })?;
    }
    let tail = copy.tail.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed = |source| PagesError::Pages { action: "write", pages_id, source };
    match &pages {
        PagesSink::File(file) => {
            if file.metadata().map_err(failed)?.len() > tail.offset {
                // Room that was set aside and not needed.
                file.set_len(tail.offset).map_err(failed)?;
            }
        }
        PagesSink::Stream(stream) => stream.end().map_err(failed)?,
    }
    tail.pagemap.map_or(Ok(()), PagemapWriter::finish)?;
    Ok(tail.copied)
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    More,
    Done,
}

/// One worker's memory, kept from chunk to chunk.
#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    spans: Vec<Span>,
    kept: Vec<Kept>,
}

/// A part of the buffer that goes into the image.
#[derive(Debug)]
struct Kept {
    at: usize,
    run: Run,
}

struct Copy<'a, S, I> {
    source: &'a S,
    pages: &'a PagesSink,
    pages_id: u32,
    feed: Mutex<Feed<I>>,
    tail: Mutex<Tail>,
    turn_changed: Condvar,
}

/// The front: pages not taken by a worker yet.
struct Feed<I> {
    spans: I,
    /// The rest of a span that did not fit into the last chunk.
    begun: Option<Span>,
    chunks: u64,
    failed: bool,
}

/// The end: where the next chunk goes.
struct Tail {
    turn: u64,
    offset: u64,
    pagemap: Option<PagemapWriter>,
    copied: Copied,
    failed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of so many pages; chunks are far smaller than any `usize`.
fn bytes(pages: u64) -> usize {
    usize::try_from(pages * PAGE).unwrap_or(usize::MAX)
}

impl<I: Iterator<Item = Result<Span, PagesError>>> Feed<I> {
    /// Fills `chunk` with the next spans; its number, or `None` when nothing is left.
    fn next_chunk(&mut self, chunk: &mut Vec<Span>) -> Result<Option<u64>, PagesError> {
        chunk.clear();
        let mut room = CHUNK_PAGES;
        while room > 0 && !self.failed {
            let span = match self.begun.take() {
                Some(span) => span,
                None => match self.spans.next() {
                    Some(span) => span?,
                    None => break,
                },
            };
            let pages = span.run.pages.min(room);
            chunk.push(Span { run: Run { pages, ..span.run }, ..span });
            room -= pages;
            if pages < span.run.pages {
                let rest =
                    Run { start: span.run.start + pages * PAGE, pages: span.run.pages - pages, ..span.run };
                self.begun = Some(Span { run: rest, ..span });
            }
        }
        if chunk.is_empty() {
            return Ok(None);
        }
        self.chunks += 1;
        Ok(Some(self.chunks - 1))
    }
}

/// Tells all workers to stop unless disarmed: a worker that is gone would be waited for.
struct StopOthers<'a, 'b, S, I>(&'b Copy<'a, S, I>, bool);

impl<S, I> Drop for StopOthers<'_, '_, S, I> {
    fn drop(&mut self) {
        if self.1 {
            lock(&self.0.feed).failed = true;
            lock(&self.0.tail).failed = true;
            self.0.turn_changed.notify_all();
        }
    }
}

impl<S: Source, I: Iterator<Item = Result<Span, PagesError>>> Copy<'_, S, I> {
    /// Copies up to `most` chunks.
    fn work(&self, buffer: &mut Buffer, most: u64) -> Result<Progress, PagesError> {
        let mut stop = StopOthers(self, true);
        for _ in 0..most {
            // Gigabytes may lie ahead, and the tree is frozen.
            interrupt::check()?;
            deadline::progress();
            let Some(number) = lock(&self.feed).next_chunk(&mut buffer.spans)? else {
                stop.1 = false;
                return Ok(Progress::Done);
            };
            self.chunk(number, buffer)?;
        }
        stop.1 = false;
        Ok(Progress::More)
    }

    fn chunk(&self, number: u64, buffer: &mut Buffer) -> Result<(), PagesError> {
        let pages_read = buffer.spans.iter().map(|span| span.run.pages).sum();
        let failed = |source| PagesError::Pages { action: "write", pages_id: self.pages_id, source };
        if let PagesSink::Stream(stream) = self.pages
            && let Some(mut room) = stream.room(bytes(pages_read)).map_err(failed)?
        {
            let into = room.bytes_mut().get_mut(..bytes(pages_read)).unwrap_or_default();
            self.source.read(&buffer.spans, into)?;
            progress::add(pages_read * PAGE);
            keep(&buffer.spans, into, &mut buffer.kept);
            let len = close_up(&buffer.kept, into);
            let send = stream.stage_room(room, len);
            if let Some((_, tail)) = self.turn(number, pages_read, &buffer.kept)? {
                send().map_err(failed)?;
                self.next_turn(tail);
            }
            return Ok(());
        }
        buffer.bytes.resize(bytes(pages_read).max(buffer.bytes.len()), 0);
        let into = buffer.bytes.get_mut(..bytes(pages_read)).unwrap_or_default();
        self.source.read(&buffer.spans, into)?;
        progress::add(pages_read * PAGE);
        keep(&buffer.spans, into, &mut buffer.kept);

        let parts = parts(&buffer.kept, &buffer.bytes);
        match self.pages {
            PagesSink::File(file) => match self.turn(number, pages_read, &buffer.kept)? {
                Some((offset, tail)) => {
                    self.next_turn(tail);
                    write_parts(file, offset, &parts).map_err(failed)
                }
                None => Ok(()),
            },
            PagesSink::Stream(stream) => {
                let send = stream.stage(&parts);
                if let Some((_, tail)) = self.turn(number, pages_read, &buffer.kept)? {
                    // Those who wait for their turn are told when these pages are on their way.
                    send().map_err(failed)?;
                    self.next_turn(tail);
                }
                Ok(())
            }
        }
    }

    /// Waits for the turn of chunk `number`, notes its pages, and says where they begin in the image. `None`
    /// when another worker has failed.
    fn turn(
        &self,
        number: u64,
        pages_read: u64,
        kept: &[Kept],
    ) -> Result<Option<(u64, MutexGuard<'_, Tail>)>, PagesError> {
        let mut tail = lock(&self.tail);
        while tail.turn != number && !tail.failed {
            tail = self.turn_changed.wait(tail).unwrap_or_else(PoisonError::into_inner);
        }
        if tail.failed {
            return Ok(None);
        }
        let mut pages_written = 0;
        for kept in kept {
            tail.pagemap.as_mut().map_or(Ok(()), |pagemap| pagemap.push(kept.run))?;
            pages_written += kept.run.pages;
        }
        let offset = tail.offset;
        tail.offset += pages_written * PAGE;
        tail.copied.pages_read += pages_read;
        tail.copied.pages_written += pages_written;
        Ok(Some((offset, tail)))
    }

    fn next_turn(&self, mut tail: MutexGuard<'_, Tail>) {
        tail.turn += 1;
        drop(tail);
        self.turn_changed.notify_all();
    }
}

/// The bytes of what is kept; neighbours in one piece.
fn parts<'b>(kept: &[Kept], bytes_read: &'b [u8]) -> Vec<IoSlice<'b>> {
    let mut parts = Vec::new();
    let mut open: Option<Range<usize>> = None;
    let mut close = |range: Option<Range<usize>>| {
        parts.extend(range.and_then(|range| bytes_read.get(range)).map(IoSlice::new));
    };
    for kept in kept {
        let end = kept.at + bytes(kept.run.pages);
        match &mut open {
            Some(range) if range.end == kept.at => range.end = end,
            _ => close(open.replace(kept.at..end)),
        }
    }
    close(open);
    parts
}

/// Moves what is kept together, to the front; how long it is.
fn close_up(kept: &[Kept], bytes_read: &mut [u8]) -> usize {
    let mut len = 0;
    for kept in kept {
        let from = kept.at..kept.at + bytes(kept.run.pages);
        let next = len + from.len();
        if kept.at != len && from.end <= bytes_read.len() {
            bytes_read.copy_within(from, len);
        }
        len = next;
    }
    len
}

/// Writes `parts` one after another from `offset` on.
fn write_parts(file: &File, mut offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
    let mut written = 0;
    if parts.len() > 1 {
        // A short write is told again, with its reason, by the part that did not fit.
        let at = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        written = pwritev(file, parts, at).unwrap_or(0);
    }
    for part in parts {
        let done = written.min(part.len());
        written -= done;
        let rest = part.get(done..).unwrap_or_default();
        file.write_all_at(rest, offset + done as u64)?;
        offset += part.len() as u64;
    }
    Ok(())
}

/// Finds what of a chunk goes into the image.
fn keep(spans: &[Span], bytes_read: &[u8], kept: &mut Vec<Kept>) {
    kept.clear();
    let mut at = 0;
    for span in spans {
        if !span.zero_is_absent {
            kept.push(Kept { at, run: span.run });
            at += bytes(span.run.pages);
            continue;
        }
        let mut open = false;
        for page in 0..span.run.pages {
            let content = bytes_read.get(at..at + PAGE as usize).unwrap_or_default();
            if is_zero(content) {
                open = false;
            } else if open && let Some(last) = kept.last_mut() {
                last.run.pages += 1;
            } else {
                let run = Run { start: span.run.start + page * PAGE, pages: 1, ..span.run };
                kept.push(Kept { at, run });
                open = true;
            }
            at += PAGE as usize;
        }
    }
}

/// Whether all bytes are zero; random bytes are told from that by the first few of them.
fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|byte| *byte == 0)
        && blocks.iter().all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Runs of a file of shared memory that are data, from SEEK_DATA and SEEK_HOLE.
pub fn data_runs(file: &File, shmid: u32) -> Result<Vec<Run>, PagesError> {
    use nix::unistd::{Whence, lseek};
    let mut runs = Vec::new();
    let mut at = 0;
    loop {
        let seek = |offset: u64, whence| {
            let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
            lseek(file.as_fd(), offset, whence).map(|offset| u64::try_from(offset).unwrap_or(0))
        };
        let shared = |e: Errno| PagesError::Shared { shmid, offset: at, source: e.into() };
        let start = match seek(at, Whence::SeekData) {
            Ok(start) => start / PAGE * PAGE,
            Err(Errno::ENXIO) => return Ok(runs),
            Err(e) => return Err(shared(e)),
        };
        let end = seek(start, Whence::SeekHole).map_err(shared)?.next_multiple_of(PAGE);
        if end <= start {
            return Ok(runs);
        }
        runs.push(Run { start, pages: (end - start) / PAGE, flags: super::pagemap::PRESENT });
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::image::{ImageKind, MemStore, Store};
    use crate::pages::pagemap::PagemapReader;
    use crate::pages::pagemap::{LAZY, PRESENT};

    /// Memory whose pages are told from their addresses; some are zero.
    struct Made {
        fail_at: Option<u64>,
        reads: AtomicU64,
    }

    impl Made {
        fn new(fail_at: Option<u64>) -> Made {
            Made { fail_at, reads: AtomicU64::new(0) }
        }
    }

    fn page(addr: u64) -> Vec<u8> {
        let mut page = vec![0; PAGE as usize];
        if !(addr / PAGE).is_multiple_of(5) {
            page[..8].copy_from_slice(&addr.to_le_bytes());
        }
        // Only the last byte tells this one from zeros.
        page[4095] = u8::from((addr / PAGE).is_multiple_of(15));
        page
    }

    impl Source for Made {
        fn read(&self, spans: &[Span], into: &mut [u8]) -> Result<(), PagesError> {
            // Workers out of step.
            if self.reads.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            let addrs = spans.iter().flat_map(|s| (s.run.start..s.run.end()).step_by(PAGE as usize));
            for (addr, into) in addrs.zip(into.chunks_mut(PAGE as usize)) {
                if self.fail_at.is_some_and(|fail| addr >= fail) {
                    let source = io::Error::from_raw_os_error(libc::EIO);
                    return Err(PagesError::Memory { pid: HostPid::own(), addr, source });
                }
                into.copy_from_slice(&page(addr));
            }
            Ok(())
        }
    }

    fn copy_spans(source: &Made, spans: &[Span]) -> Result<(MemStore, Copied), PagesError> {
        let store = MemStore::new();
        let pagemap = PagemapWriter::create(&store, ImageKind::Pagemap, 1, 1)?;
        let pages = store.create_pages("pages-1.img", 0)?;
        let copied = copy(source, spans.iter().map(|span| Ok(*span)), Some(pagemap), pages, 1)?;
        Ok((store, copied))
    }

    fn read_back(store: &MemStore) -> BTreeMap<u64, (u32, Vec<u8>)> {
        let image = store.open_raw("pages-1.img").unwrap().unwrap();
        let reader = PagemapReader::open(store, ImageKind::Pagemap, 1).unwrap().unwrap();
        let mut back = BTreeMap::new();
        for placed in reader.runs(image.len()).unwrap() {
            for i in 0..placed.run.pages {
                let mut bytes = vec![0; PAGE as usize];
                image.read_exact_at(&mut bytes, placed.offset + i * PAGE).unwrap();
                back.insert(placed.run.start + i * PAGE, (placed.run.flags, bytes));
            }
        }
        back
    }

    fn span(start: u64, pages: u64, zero_is_absent: bool) -> Span {
        let run = Run { start, pages, flags: PRESENT };
        Span { run, zero_is_absent, unreadable: false }
    }

    #[test]
    fn nothing_to_copy() {
        let (store, copied) = copy_spans(&Made::new(None), &[]).unwrap();
        assert_eq!(copied, Copied::default());
        assert!(read_back(&store).is_empty());
    }

    #[test]
    fn zeros() {
        assert!(is_zero(&[0; 4096]) && is_zero(&[]) && is_zero(&[0; 65]));
        for at in [0, 1, 63, 64, 4095] {
            let mut page = [0; 4096];
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
        }
    }

    #[test]
    fn a_failure_ends_all_workers() {
        let spans = [span(0x10_0000, 20_000, true)];
        for fail in [0, 1, 500, 5_000, 19_999] {
            let error = copy_spans(&Made::new(Some(0x10_0000 + fail * PAGE)), &spans).unwrap_err();
            assert!(matches!(error, PagesError::Memory { .. }), "{error}");
        }
    }

    #[test]
    fn a_failing_list_of_pages_ends_all_workers() {
        let store = MemStore::new();
        let pagemap = PagemapWriter::create(&store, ImageKind::Pagemap, 1, 1).unwrap();
        let pages = store.create_pages("pages-1.img", 0).unwrap();
        let failed = || PagesError::Scan {
            pid: HostPid::own(),
            addr: 0,
            source: io::Error::from_raw_os_error(libc::ESRCH),
        };
        let spans = (0..5000).map(|i| if i < 4000 { Ok(span(i * 2 * PAGE, 1, true)) } else { Err(failed()) });
        let error = copy(&Made::new(None), spans, Some(pagemap), pages, 1).unwrap_err();
        assert!(matches!(error, PagesError::Scan { .. }), "{error}");
    }

    #[test]
    fn data_of_a_file_with_holes() {
        let store = MemStore::new();
        let PagesSink::File(file) = store.create_pages("x.img", 0).unwrap() else { panic!("a stream") };
        assert!(data_runs(&file, 1).unwrap().is_empty());
        file.set_len(100 * PAGE).unwrap();
        assert!(data_runs(&file, 1).unwrap().is_empty());
        file.write_all_at(&[1; 10], 50 * PAGE - 5).unwrap();
        file.write_all_at(&[1; 10], 99 * PAGE).unwrap();
        let run = |start, pages| Run { start: start * PAGE, pages, flags: PRESENT };
        assert_eq!(data_runs(&file, 1).unwrap(), [run(49, 2), run(99, 1)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn every_page_once_in_order(
            steps in prop::collection::vec((0u64..3, 1u64..700, any::<bool>(), any::<bool>()), 1..40)
        ) {
            let mut at = 0x10_0000;
            let mut spans = Vec::new();
            let mut want = BTreeMap::new();
            for (gap, pages, zero_is_absent, lazy) in steps {
                let flags = if lazy { PRESENT | LAZY } else { PRESENT };
                let run = Run { start: at + gap * PAGE, pages, flags };
                spans.push(Span { run, zero_is_absent, unreadable: false });
                for addr in (run.start..run.end()).step_by(PAGE as usize) {
                    let content = page(addr);
                    if !zero_is_absent || content.iter().any(|b| *b != 0) {
                        want.insert(addr, (flags, content));
                    }
                }
                at = run.end();
            }
            let (store, copied) = copy_spans(&Made::new(None), &spans).unwrap();
            prop_assert_eq!(copied.pages_written, want.len() as u64);
            prop_assert_eq!(copied.pages_read, spans.iter().map(|s| s.run.pages).sum::<u64>());
            prop_assert!(read_back(&store) == want);
        }
    }
}
