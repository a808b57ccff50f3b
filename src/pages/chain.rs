//! The pages of one address space or object, wherever in a chain of snapshots they lie.
//!
//! A pagemap may say of pages that the parent snapshot has them, and the parent's may say the same of its own. What is
//! nearest is newest: a page is looked for in a snapshot only if all before it said that their parent has it; an
//! older version further up is never looked at. Runs of a pagemap need not end where the runs of the next one do.
//!
//! [`Pages::read`] settles all of it before anything is made of the pages: two sorted sequences are merged for
//! each snapshot, up to the one in which nothing is missing any more. A page that nobody has is an error: the chain is damaged.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::sys::uio::preadv;
use nix::unistd::{Whence, lseek};

use super::pagemap::{PARENT, PRESENT, PagemapReader, Placed};
use super::{PAGE, PagesError};
use crate::image::{Arrival, ImageError, ImageKind, Part, Store};
use crate::sys::Errno;

/// Most snapshots above one another. Each costs a descriptor, and one more for each task.
const MOST_PARENTS: usize = 256;
/// Most parts of one read (UIO_MAXIOV).
const MOST_PARTS: usize = 1024;

/// Consecutive pages that lie so in an image too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Which of [`Pages::images`].
    pub image: usize,
    /// Where they begin in the image.
    pub offset: u64,
}

impl Piece {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether nothing is in it.
    #[allow(dead_code)] // beside `len`
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// What of it lies in `[start, end)`, which begins below its end.
    pub fn within(self, start: u64, end: u64) -> Self {
        let from = self.start.max(start);
        Self { start: from, end: self.end.min(end), offset: self.offset + (from - self.start), ..self }
    }

    /// What of it lies behind `cut`, if anything does.
    pub fn after(self, cut: u64) -> Option<Self> {
        (cut < self.end).then(|| self.within(cut, self.end))
    }

    /// The same in pieces of at most `most` bytes.
    pub fn in_parts(self, most: u64) -> impl Iterator<Item = Self> {
        let starts = std::iter::successors(Some(self.start), move |start| start.checked_add(most));
        starts
            .take_while(move |start| *start < self.end)
            .map(move |start| self.within(start, start.saturating_add(most)))
    }

    /// Appends `next` if both in memory and in the image it is what follows.
    pub fn join(&mut self, next: &Self) -> bool {
        let joined =
            self.image == next.image && self.end == next.start && self.offset + self.len() == next.offset;
        if joined {
            self.end = next.end;
        }
        joined
    }
}

/// An image in which pages lie.
#[derive(Debug)]
pub struct PagesImage {
    /// The file in which it lies, open for reading, and where; not before the first bytes have arrived.
    file: OnceLock<(File, u64)>,
    /// As messages name it.
    pub path: PathBuf,
    /// Open for writing too: what has been read is to be freed at once. Never that of a parent.
    pub consumed: bool,
    /// Pages of zeros may be holes.
    holes: bool,
    /// It was opened before all of it was there.
    arriving: Option<Arriving>,
}

#[derive(Debug)]
struct Arriving {
    from: Arc<dyn Arrival>,
    name: String,
    /// So many bytes are known to be there.
    there: AtomicU64,
}

impl PagesImage {
    /// With its length; of one that is arriving, all that there can be.
    fn open(store: &dyn Store, name: &str) -> Result<Option<(Self, u64)>, PagesError> {
        let (path, consumed, holes) = (store.path_of(name), store.consumed(), store.has_holes());
        if let Some(from) = store.arrival() {
            let arriving = Some(Arriving { from, name: name.to_owned(), there: AtomicU64::new(0) });
            return Ok(Some((Self { file: OnceLock::new(), path, consumed, holes, arriving }, u64::MAX)));
        }
        let Some(file) = store.open_raw(name)? else { return Ok(None) };
        let (start, len) = (file.start(), file.len());
        let file = (file.into_file(), start).into();
        Ok(Some((Self { file, path, consumed, holes, arriving: None }, len)))
    }

    /// The file in which it lies, and where it begins there, once something of it is there.
    pub fn file(&self) -> Result<(&File, u64), PagesError> {
        if self.file.get().is_none() {
            self.wait(1)?;
        }
        let file = self.file.get().map(|(file, start)| (file, *start));
        file.ok_or_else(|| self.failed(io::ErrorKind::UnexpectedEof.into()))
    }

    /// Waits until the first `least` bytes are there; how many are.
    pub fn wait(&self, least: u64) -> Result<u64, PagesError> {
        let Some(arriving) = &self.arriving else { return Ok(u64::MAX) };
        let there = arriving.there.load(Ordering::Relaxed);
        if there >= least {
            return Ok(there);
        }
        let Part { file, start, len, complete } = arriving.from.part(&arriving.name, least)?;
        if len < least {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        let there = if complete { u64::MAX } else { len };
        let _ = self.file.set((file, start));
        arriving.there.store(there, Ordering::Relaxed);
        Ok(there)
    }

    /// Whether it has its bytes in memory and nowhere else.
    pub fn is_in_memory(&self) -> bool {
        let in_memory = |file: &File| fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC);
        self.arriving.is_some() || self.file.get().is_some_and(|(file, _)| in_memory(file))
    }

    fn is_arriving(&self) -> bool {
        self.arriving.as_ref().is_some_and(|arriving| arriving.there.load(Ordering::Relaxed) < u64::MAX)
    }

    fn failed(&self, source: io::Error) -> PagesError {
        ImageError::Io { action: "read", path: self.path.clone(), source }.into()
    }
}

/// All pages of one address space or object, in order of their addresses.
#[derive(Debug, Default)]
pub struct Pages {
    images: Vec<PagesImage>,
    pieces: Vec<Piece>,
}

/// Addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    start: u64,
    end: u64,
}

impl Pages {
    /// Reads and checks the pagemap `kind` of `id`, and those of the parents as far as it needs them. `None` if `store`
    /// has none.
    pub fn read(store: &dyn Store, kind: ImageKind, id: u64) -> Result<Option<Self>, PagesError> {
        let mut pages = Self::default();
        let Some(mut wanted) = pages.own(store, kind, id)? else { return Ok(None) };
        let name = kind.file_name(id);
        let mut seen = vec![store.identity()];
        let mut parent: Option<Arc<dyn Store>> = None;
        while let Some(first) = wanted.first().copied() {
            let at: &dyn Store = parent.as_deref().unwrap_or(store);
            let nowhere = |missing: Stretch, path, what| PagesError::Nowhere {
                image: store.path_of(&name),
                start: missing.start,
                end: missing.end,
                path,
                what,
            };
            let Some(next) = at.parent()? else {
                return Err(nowhere(first, place(at), "has no parent"));
            };
            let identity = next.identity();
            if identity.is_some() && seen.contains(&identity) {
                return Err(PagesError::Loop { path: place(&*next) });
            }
            if seen.len() > MOST_PARENTS {
                return Err(PagesError::Deep { path: place(store), most: MOST_PARENTS });
            }
            seen.push(identity);
            wanted = match pages.further(&*next, kind, id, &wanted) {
                Ok(Ok(further)) => further,
                Ok(Err(Missing::Pagemap)) => {
                    return Err(nowhere(first, next.path_of(&name), "is missing"));
                }
                Ok(Err(Missing::Pages(missing))) => {
                    return Err(nowhere(missing, next.path_of(&name), "does not have them"));
                }
                Err(source) => {
                    return Err(PagesError::Parent { path: place(&*next), source: Box::new(source) });
                }
            };
            parent = Some(next);
        }
        // Each snapshot brought a sorted sequence.
        pages.pieces.sort_by_key(|piece| piece.start);
        // Those of all tasks of a tree are kept.
        pages.pieces.shrink_to_fit();
        pages.images.shrink_to_fit();
        Ok(Some(pages))
    }

    /// The pages that the snapshot itself has; what it says that its parent has.
    fn own(
        &mut self,
        store: &dyn Store,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<Vec<Stretch>>, PagesError> {
        let Some((runs, image)) = self.runs(store, kind, id)? else { return Ok(None) };
        let mut wanted = Vec::new();
        for Placed { run, offset } in runs {
            let stretch = Stretch { start: run.start, end: run.end() };
            if run.flags & PARENT != 0 {
                append(&mut wanted, stretch);
            } else if run.flags & PRESENT != 0 {
                self.pieces.push(Piece { start: run.start, end: run.end(), image, offset });
            } else {
                return Err(PagesError::Elsewhere {
                    image: store.path_of(&kind.file_name(id)),
                    start: run.start,
                    end: run.end(),
                });
            }
        }
        self.forget_unused(image);
        Ok(Some(wanted))
    }

    /// The pages of `wanted` that a parent has; what it says that its own parent has.
    fn further(
        &mut self,
        store: &dyn Store,
        kind: ImageKind,
        id: u64,
        wanted: &[Stretch],
    ) -> Result<Result<Vec<Stretch>, Missing>, PagesError> {
        let Some((runs, image)) = self.runs(store, kind, id)? else { return Ok(Err(Missing::Pagemap)) };
        let further = merge(wanted, &runs, image, &mut self.pieces);
        self.forget_unused(image);
        Ok(further.map_err(Missing::Pages))
    }

    /// The runs of a pagemap, checked against its image of pages, and the number which that gets here.
    fn runs(
        &mut self,
        store: &dyn Store,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<(Vec<Placed>, usize)>, PagesError> {
        let Some(pagemap) = PagemapReader::open(store, kind, id)? else { return Ok(None) };
        let name = ImageKind::Pages.file_name(u64::from(pagemap.pages_id()));
        let (file, len) = PagesImage::open(store, &name)?.unzip();
        let runs = match pagemap.runs(len.unwrap_or(0)) {
            Err(PagesError::Entry { .. }) if file.is_none() => {
                return Err(ImageError::Absent { path: store.path_of(&name) }.into());
            }
            runs => runs?,
        };
        let image = self.images.len();
        self.images.extend(file);
        Ok(Some((runs, image)))
    }

    /// Closes an image, the last one opened, if nothing in it is wanted.
    fn forget_unused(&mut self, image: usize) {
        if self.pieces.last().is_none_or(|piece| piece.image != image) {
            self.images.truncate(image);
        }
    }

    /// Where the bytes are.
    pub fn images(&self) -> &[PagesImage] {
        &self.images
    }

    /// What there is.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// How many pages.
    pub fn count(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() / PAGE).sum()
    }

    /// First address behind the last page.
    pub fn end(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    /// The parts of pieces that lie in `[start, end)`.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = Piece> + '_ {
        let at = self.pieces.partition_point(|piece| piece.end <= start);
        let pieces = self.pieces.get(at..).unwrap_or_default().iter();
        pieces.take_while(move |piece| piece.start < end).map(move |piece| piece.within(start, end))
    }

    /// Whether any page lies in `[start, end)`.
    pub fn any_in(&self, start: u64, end: u64) -> bool {
        self.within(start, end).next().is_some()
    }

    /// Whether a part of them may not be there yet.
    pub fn are_arriving(&self) -> bool {
        self.images.iter().any(PagesImage::is_arriving)
    }

    /// Waits until all of them are there.
    pub fn wait(&self) -> Result<(), PagesError> {
        for (number, image) in self.images.iter().enumerate().filter(|(_, image)| image.is_arriving()) {
            let mine = self.pieces.iter().filter(|piece| piece.image == number);
            image.wait(mine.map(|piece| piece.offset + piece.len()).max().unwrap_or(0))?;
        }
        Ok(())
    }

    /// Waits until a piece is there.
    pub fn wait_for(&self, piece: &Piece) -> Result<(), PagesError> {
        self.images.get(piece.image).map_or(Ok(()), |image| image.wait(piece.offset + piece.len()).map(drop))
    }

    /// Appends to `into` what of a piece, all of which is there, is no hole: for places where a page of zeros and no page are the
    /// same.
    pub fn without_holes(&self, piece: Piece, into: &mut Vec<Piece>) -> Result<(), PagesError> {
        let Some(image) = self.images.get(piece.image).filter(|image| image.holes) else {
            into.push(piece);
            return Ok(());
        };
        let (file, base) = image.file()?;
        let failed = |e: Errno| image.failed(e.into());
        let seek = |offset: u64, whence| {
            let offset = i64::try_from(base + offset).map_err(|_| Errno::EOVERFLOW)?;
            lseek(file, offset, whence).map(|offset| u64::try_from(offset).unwrap_or(0).saturating_sub(base))
        };
        let (mut at, end) = (piece.offset, piece.offset + piece.len());
        while at < end {
            let from = match seek(at, Whence::SeekData) {
                Err(Errno::ENXIO) => break,
                found => (found.map_err(failed)? / PAGE * PAGE).max(at),
            };
            if from >= end {
                break;
            }
            let hole = seek(from, Whence::SeekHole).map_err(failed)?;
            at = hole.next_multiple_of(PAGE).max(from + 1).min(end);
            into.push(piece.within(piece.start + (from - piece.offset), piece.start + (at - piece.offset)));
        }
        Ok(())
    }

    /// Reads `pieces` one behind the other into `into`, which is as long as they are; those that are not there yet are waited
    /// for. What lies together in an image is read at once, whatever comes between from others.
    pub fn fetch(&self, pieces: &[Piece], into: &mut [u8]) -> Result<(), PagesError> {
        pieces.iter().try_for_each(|piece| self.wait_for(piece))?;
        if let [piece] = pieces
            && let Some(image) = self.images.get(piece.image)
        {
            let (file, base) = image.file()?;
            return file.read_exact_at(into, base + piece.offset).map_err(|e| image.failed(e));
        }
        let mut reads: Vec<Read<'_>> = self.images.iter().map(|_| Read::default()).collect();
        let mut rest = into;
        for piece in pieces {
            let (Some(image), Some(read)) = (self.images.get(piece.image), reads.get_mut(piece.image)) else {
                continue;
            };
            let len = usize::try_from(piece.len()).unwrap_or(usize::MAX).min(rest.len());
            let (part, behind) = rest.split_at_mut(len);
            rest = behind;
            if read.parts.len() == MOST_PARTS || read.end != piece.offset {
                read.perform(image.file()?).map_err(|e| image.failed(e))?;
                *read = Read { offset: piece.offset, end: piece.offset, parts: Vec::new() };
            }
            read.end += len as u64;
            read.parts.push(IoSliceMut::new(part));
        }
        for (image, read) in self.images.iter().zip(&mut reads).filter(|(_, read)| !read.parts.is_empty()) {
            read.perform(image.file()?).map_err(|e| image.failed(e))?;
        }
        Ok(())
    }
}

/// Bytes that lie together in an image, and where they go.
#[derive(Debug, Default)]
struct Read<'b> {
    offset: u64,
    end: u64,
    parts: Vec<IoSliceMut<'b>>,
}

impl Read<'_> {
    fn perform(&mut self, (file, base): (&File, u64)) -> io::Result<()> {
        let mut parts = self.parts.as_mut_slice();
        let mut offset = base + self.offset;
        while !parts.is_empty() {
            let at = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
            match preadv(file.as_fd(), parts, at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    offset += n as u64;
                    IoSliceMut::advance_slices(&mut parts, n);
                }
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// What a parent lacks.
#[derive(Debug)]
enum Missing {
    Pagemap,
    Pages(Stretch),
}

/// Where a snapshot is, for messages.
fn place(store: &dyn Store) -> PathBuf {
    // Without the slash behind it.
    store.path_of("").components().collect()
}

fn append(stretches: &mut Vec<Stretch>, next: Stretch) {
    match stretches.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => stretches.push(next),
    }
}

/// Finds `wanted` in `runs`, both sorted: what is there goes to `found`, what lies further up comes back. Fails with the first
/// pages that are in no run.
fn merge(
    wanted: &[Stretch],
    runs: &[Placed],
    image: usize,
    found: &mut Vec<Piece>,
) -> Result<Vec<Stretch>, Stretch> {
    let mut further = Vec::new();
    let mut runs = runs.iter().peekable();
    for stretch in wanted {
        let mut at = stretch.start;
        while at < stretch.end {
            while runs.next_if(|placed| placed.run.end() <= at).is_some() {}
            let Some(Placed { run, offset }) = runs.peek().filter(|placed| placed.run.start <= at) else {
                let end = runs.peek().map_or(stretch.end, |placed| placed.run.start.min(stretch.end));
                return Err(Stretch { start: at, end });
            };
            let end = run.end().min(stretch.end);
            if run.flags & PARENT != 0 {
                append(&mut further, Stretch { start: at, end });
            } else if run.flags & PRESENT != 0 {
                let piece = Piece { start: at, end, image, offset: offset + (at - run.start) };
                if found.last_mut().is_none_or(|last| !last.join(&piece)) {
                    found.push(piece);
                }
            } else {
                return Err(Stretch { start: at, end });
            }
            at = end;
        }
    }
    Ok(further)
}
