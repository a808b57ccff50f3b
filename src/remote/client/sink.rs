//! Images to frames.
//!
//! Small images gather in memory and go in one piece with their beginning and end. Pages go as they come: their
//! checksums and their compression are made in the thread that read them, before it waits for its turn.

use std::fmt::{self, Debug};
use std::io::{self, IoSlice, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::super::ring::{Place, SLOT};
use super::super::wire::{self, FEATURE_LZ4, Header, Kind, LZ4, MAX_DATA, Sum};
use super::super::{Failure, crc, name, pb, pb::FailCode};
use super::link::Link;
use crate::image::{ImageSink, PagesStream};
use crate::sys::mapping::Slot;

const PAGE: usize = 4096;
/// An image is sent in frames of at most this.
const FRAME: usize = MAX_DATA as usize;
/// Small images wait until they have this much.
const GATHER: usize = 256 << 10;
/// After so many frames that shrank by less than an eighth ...
const POOR: u32 = 8;
/// ... so many go as they are, before another try.
const REST: u32 = 256;

/// One snapshot on its way out.
#[derive(Debug)]
pub(super) struct Outgoing {
    link: Box<dyn Link>,
    table: Mutex<Table>,
    lz4: Option<Lz4>,
    limit: Mutex<Option<Instant>>,
}

/// What the commit will list.
#[derive(Debug, Default)]
struct Table {
    begun: u32,
    ended: Vec<pb::commit::Image>,
}

/// Whether compression has paid lately.
#[derive(Debug, Default)]
struct Lz4 {
    poor: AtomicU32,
    rest: AtomicU32,
}

impl Lz4 {
    /// The block, if it is worth sending.
    fn block(&self, raw: &[u8]) -> Option<Vec<u8>> {
        let skip = |left: u32| left.checked_sub(1);
        if self.rest.fetch_update(Ordering::Relaxed, Ordering::Relaxed, skip).is_ok() {
            return None;
        }
        let block = lz4_flex::block::compress(raw);
        if block.len() < raw.len() - raw.len() / 8 {
            self.poor.store(0, Ordering::Relaxed);
            return Some(block);
        }
        if self.poor.fetch_add(1, Ordering::Relaxed) + 1 >= POOR {
            self.poor.store(0, Ordering::Relaxed);
            self.rest.store(REST, Ordering::Relaxed);
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outgoing {
    /// Through `link`; compressed if `compress` and the other side can.
    pub(super) fn new(link: Box<dyn Link>, compress: bool) -> Self {
        let lz4 = (compress && link.features() & FEATURE_LZ4 != 0).then(Lz4::default);
        Self { link, table: Mutex::default(), lz4, limit: Mutex::default() }
    }

    /// Nothing is sent any more after this.
    pub(super) fn limit(&self, until: Instant) {
        *lock(&self.limit) = Some(until);
    }

    fn in_time(&self) -> Result<(), Failure> {
        match *lock(&self.limit) {
            Some(until) if Instant::now() > until => {
                let text = "the tree would stand still for longer than it may (--max-pause)";
                Err(Failure::new(FailCode::FailTimeout, text))
            }
            _ => Ok(()),
        }
    }

    fn send(&self, frames: &mut [IoSlice<'_>]) -> Result<(), Failure> {
        self.in_time()?;
        self.link.send(frames)
    }

    pub(super) fn link(&self) -> &dyn Link {
        &*self.link
    }

    /// Sends the list of all images.
    pub(super) fn commit(&self) -> Result<(), Failure> {
        let table = lock(&self.table);
        if table.begun as usize != table.ended.len() {
            return Err(Failure::new(FailCode::FailShort, "an image was not written to its end"));
        }
        let commit = pb::Commit { images: table.ended.clone() };
        let frame = wire::frame(Kind::Commit, self.link.stream(), 0, &commit);
        self.send(&mut [IoSlice::new(&frame)])
    }

    fn number(&self) -> u32 {
        let mut table = lock(&self.table);
        table.begun += 1;
        table.begun
    }

    fn begin(&self, image: u32, name: &str, expected_bytes: u64) -> Vec<u8> {
        let begin = pb::ImageBegin { name: name.to_owned(), expected_bytes };
        wire::frame(Kind::ImageBegin, self.link.stream(), image, &begin)
    }

    fn ended(&self, image: u32, sum: Sum) {
        let entry = pb::commit::Image { image, size: sum.size, crc32c: sum.crc };
        lock(&self.table).ended.push(entry);
    }

    fn end_frame(&self, image: u32, sum: Sum) -> Vec<u8> {
        let end = pb::ImageEnd { size: sum.size, crc32c: sum.crc };
        wire::frame(Kind::ImageEnd, self.link.stream(), image, &end)
    }
}

/// One frame, ready to be sent.
struct Staged<'p> {
    head: Header,
    /// The same as it travels.
    header: [u8; wire::HEADER],
    parts: Vec<&'p [u8]>,
    block: Option<Vec<u8>>,
}

/// Cuts `parts` into frames.
struct Stager<'p> {
    stream: u32,
    image: u32,
    lz4: Option<&'p Lz4>,
    done: Vec<Staged<'p>>,
    open: Vec<&'p [u8]>,
    len: usize,
}

impl<'p> Stager<'p> {
    fn new(outgoing: &'p Outgoing, image: u32) -> Self {
        let (stream, lz4) = (outgoing.link.stream(), outgoing.lz4.as_ref());
        Self { stream, image, lz4, done: Vec::new(), open: Vec::new(), len: 0 }
    }

    /// Data, as it is.
    fn data(&mut self, mut bytes: &'p [u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(FRAME - self.len));
            self.open.push(now);
            self.len += now.len();
            if self.len == FRAME {
                self.close();
            }
            bytes = later;
        }
    }

    /// So many zeros, which are not sent.
    fn zeros(&mut self, mut len: usize) {
        self.close();
        while len > 0 {
            let now = len.min(FRAME);
            let raw = u32::try_from(now).unwrap_or(MAX_DATA);
            let crc = wire::crc_of_zeros(raw);
            let head = Header {
                kind: Kind::Zero,
                flags: 0,
                stream: self.stream,
                image: self.image,
                len: 0,
                raw,
                crc,
            };
            self.done.push(Staged { head, header: head.encode(), parts: Vec::new(), block: None });
            len -= now;
        }
    }

    /// Pages: runs of zeros are told apart.
    fn pages(&mut self, bytes: &'p [u8]) {
        let (mut at, mut from) = (0, 0);
        while at < bytes.len() {
            let end = bytes.len().min(at + PAGE);
            if !bytes.get(at..end).is_some_and(is_zero) {
                at = end;
                continue;
            }
            self.data(bytes.get(from..at).unwrap_or_default());
            let first = at;
            while at < bytes.len() {
                let end = bytes.len().min(at + PAGE);
                if !bytes.get(at..end).is_some_and(is_zero) {
                    break;
                }
                at = end;
            }
            self.zeros(at - first);
            from = at;
        }
        self.data(bytes.get(from..).unwrap_or_default());
    }

    /// Ends the open frame.
    fn close(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let parts = std::mem::take(&mut self.open);
        let raw = u32::try_from(std::mem::take(&mut self.len)).unwrap_or(MAX_DATA);
        let crc = parts.iter().fold(0, |crc, part| crc::append(crc, part));
        let mut head = Header::data(self.stream, self.image, raw, crc);
        let block = self.lz4.and_then(|lz4| match parts.as_slice() {
            [one] => lz4.block(one),
            many => lz4.block(&many.concat()),
        });
        if let Some(block) = &block {
            head.flags = LZ4;
            head.len = u32::try_from(block.len()).unwrap_or(MAX_DATA);
        }
        self.done.push(Staged { head, header: head.encode(), parts, block });
    }
}

/// Whether all bytes are zero; random bytes are told from that by the first few of them.
fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|byte| *byte == 0)
        && blocks.iter().all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
}

/// All of it in the order in which it travels.
fn slices<'s>(staged: &'s [Staged<'_>], into: &mut Vec<IoSlice<'s>>) {
    for frame in staged {
        into.push(IoSlice::new(&frame.header));
        match &frame.block {
            Some(block) => into.push(IoSlice::new(block)),
            None => into.extend(frame.parts.iter().copied().map(IoSlice::new)),
        }
    }
}

fn io_error(failure: Failure) -> io::Error {
    io::Error::other(failure)
}

/// An image that is written from front to back.
pub(super) struct Small {
    outgoing: Arc<Outgoing>,
    name: String,
    image: u32,
    begun: bool,
    sum: Sum,
    held: Vec<u8>,
}

impl Debug for Small {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.name, self.sum.size + self.held.len() as u64)
    }
}

impl Small {
    pub(super) fn begin(outgoing: Arc<Outgoing>, name: &str) -> Result<Self, Failure> {
        name::check_image(name)?;
        let image = outgoing.number();
        let sum = Sum::default();
        Ok(Self { outgoing, name: name.to_owned(), image, begun: false, sum, held: Vec::new() })
    }

    /// Sends what is held, with the beginning if it is the first and with the end if it is the last.
    fn pass_on(&mut self, last: bool) -> io::Result<()> {
        let begin = if self.begun { Vec::new() } else { self.outgoing.begin(self.image, &self.name, 0) };
        self.begun = true;
        let mut stager = Stager::new(&self.outgoing, self.image);
        stager.data(&self.held);
        stager.close();
        for frame in &stager.done {
            self.sum.push(frame.head.raw, frame.head.crc);
        }
        let end = if last { self.outgoing.end_frame(self.image, self.sum) } else { Vec::new() };
        let mut parts = vec![IoSlice::new(&begin)];
        slices(&stager.done, &mut parts);
        parts.push(IoSlice::new(&end));
        parts.retain(|part| !part.is_empty());
        self.outgoing.send(&mut parts).map_err(io_error)?;
        self.held.clear();
        if last {
            self.outgoing.ended(self.image, self.sum);
        }
        Ok(())
    }
}

impl Write for Small {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.held.len() >= GATHER {
            self.pass_on(false)?;
        }
        self.held.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageSink for Small {
    fn end(&mut self) -> io::Result<()> {
        self.pass_on(true)
    }
}

/// A pages image.
#[derive(Debug)]
pub(super) struct Pages {
    outgoing: Arc<Outgoing>,
    image: u32,
    sum: Mutex<Sum>,
}

impl Pages {
    pub(super) fn begin(outgoing: Arc<Outgoing>, name: &str, expected: u64) -> Result<Self, Failure> {
        name::check_image(name)?;
        let image = outgoing.number();
        let begin = outgoing.begin(image, name, expected);
        outgoing.send(&mut [IoSlice::new(&begin)])?;
        Ok(Self { outgoing, image, sum: Mutex::default() })
    }
}

impl PagesStream for Pages {
    fn stage<'p>(&'p self, parts: &'p [IoSlice<'p>]) -> Box<dyn FnOnce() -> io::Result<()> + 'p> {
        let mut stager = Stager::new(&self.outgoing, self.image);
        for part in parts {
            stager.pages(part);
        }
        stager.close();
        let staged = stager.done;
        Box::new(move || {
            let mut sum = lock(&self.sum);
            for frame in &staged {
                sum.push(frame.head.raw, frame.head.crc);
            }
            let mut parts = Vec::with_capacity(staged.len() * 2);
            slices(&staged, &mut parts);
            self.outgoing.send(&mut parts).map_err(io_error)
        })
    }

    fn room(&self, len: usize) -> io::Result<Option<Slot>> {
        // What is compressed goes from where the compression leaves it.
        if self.outgoing.lz4.is_some() || len > SLOT {
            return Ok(None);
        }
        self.outgoing.in_time().and_then(|()| self.outgoing.link.room()).map_err(io_error)
    }

    fn stage_room<'p>(&'p self, room: Slot, len: usize) -> Box<dyn FnOnce() -> io::Result<()> + 'p> {
        let bytes = room.bytes().get(..len).unwrap_or_default();
        let mut stager = Stager::new(&self.outgoing, self.image);
        stager.pages(bytes);
        stager.close();
        let mut placed = 0;
        let mut frames: Vec<(Header, [u8; wire::HEADER])> = Vec::with_capacity(stager.done.len());
        for staged in &stager.done {
            // A slot is shorter than a frame may be, so that only zeros part frames: one piece each.
            let mut header = staged.header;
            if let Some(part) = staged.parts.first() {
                let at = part.as_ptr().addr() - bytes.as_ptr().addr();
                let stream = Place::at(room.offset() + at).encode();
                header = Header { stream, ..staged.head }.encode();
                placed += 1;
            }
            frames.push((staged.head, header));
        }
        drop(stager);
        Box::new(move || {
            let mut sum = lock(&self.sum);
            for (head, _) in &frames {
                sum.push(head.raw, head.crc);
            }
            let mut parts: Vec<_> = frames.iter().map(|(_, header)| IoSlice::new(header)).collect();
            self.outgoing.link.send_placed(&mut parts, room, placed).map_err(io_error)
        })
    }

    fn end(&self) -> io::Result<()> {
        let sum = *lock(&self.sum);
        let end = self.outgoing.end_frame(self.image, sum);
        self.outgoing.send(&mut [IoSlice::new(&end)]).map_err(io_error)?;
        self.outgoing.ended(self.image, sum);
        Ok(())
    }
}
