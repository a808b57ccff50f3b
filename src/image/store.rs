//! Where images are kept: one trait, a directory and memory behind it.
//!
//! A dump writes into a store and commits it; until then, and if the store is dropped
//! before, nothing of it can be restored, and what was in the store before is as it was. A restore opens a store and
//! only reads.

mod dir;
mod file;
mod memory;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, IoSlice, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use prost::{Message, Name};

pub use dir::{DirStore, Sync as DirSync};
pub use file::ImageFile;
pub use memory::MemStore;

use super::error::ImageError;
use super::extras::HasExtra;
use super::framing::{EntryReader, EntryWriter};
use super::names::ImageKind;
use crate::sys::mapping::Slot;

/// Name of the image whose presence makes a snapshot complete.
pub(crate) const INVENTORY: &str = "inventory.img";
/// Where pages come last, the image before them.
pub(crate) const BEFORE_PAGES: &str = "pstree.img";

/// An image being written from front to back.
pub trait ImageSink: Write + Send + Debug {
    /// All bytes are there; nothing is written any more. An image dropped before is incomplete.
    fn end(&mut self) -> io::Result<()>;
}

impl ImageSink for File {
    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A pages image that leaves this process as it is written.
pub trait PagesStream: Send + Sync + Debug {
    /// Makes `parts` ready (checksums, compression) in the caller's thread. What comes back sends them; it must
    /// be called in the order in which the parts stand in the image.
    fn stage<'p>(&'p self, parts: &'p [IoSlice<'p>]) -> Box<dyn FnOnce() -> io::Result<()> + 'p>;

    /// Memory of the stream's own for `len` bytes of pages, which spares the stream a copy; `None` if it has none.
    /// One that is free is waited for; each thread may have one.
    fn room(&self, len: usize) -> io::Result<Option<Slot>>;

    /// As [`stage`](Self::stage), for the first `len` bytes of `room`, which came from here.
    fn stage_room<'p>(&'p self, room: Slot, len: usize) -> Box<dyn FnOnce() -> io::Result<()> + 'p>;

    /// All pages are there.
    fn end(&self) -> io::Result<()>;
}

/// A pages image being written, by several threads.
#[derive(Debug)]
pub enum PagesSink {
    /// Written at any position, in any order.
    File(File),
    /// Sent in order.
    Stream(Box<dyn PagesStream>),
}

/// A place for the images of one snapshot.
pub trait Store: Send + Sync {
    /// Makes the image `name`. One of an older snapshot with that name is replaced.
    fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, ImageError>;

    /// Makes the image `name` for pages, likely of `expected` bytes (0 if unknown).
    fn create_pages(&self, name: &str, expected: u64) -> Result<PagesSink, ImageError>;

    /// Opens the file `name` for reading, or `None` when there is no such image.
    fn open_raw(&self, name: &str) -> Result<Option<ImageFile>, ImageError>;

    /// Where images come from that have not all arrived: those before the pages are there, `open_raw` knows no others, and pages
    /// are read from here. `None` once all are there.
    fn arrival(&self) -> Option<Arc<dyn Arrival>> {
        None
    }

    /// Waits until all images are there and checked, and the snapshot may be restored.
    fn arrived(&self) -> Result<(), ImageError> {
        Ok(())
    }

    /// Whether pages of zeros may be holes in the images of pages.
    fn has_holes(&self) -> bool {
        false
    }

    /// Names of all images, sorted.
    fn names(&self) -> Result<Vec<String>, ImageError>;

    /// Makes the snapshot restorable: all images are there and written to their end.
    fn commit(&self) -> Result<(), ImageError>;

    /// Takes a commit back: the tree goes on here after all, so nobody may restore it.
    fn withdraw(&self) -> Result<(), ImageError>;

    /// The snapshot this one builds on (pages marked "parent" lie there), if any. It is opened once.
    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError>;

    /// What tells this place from any other, where two ways can lead to one.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// Records the snapshot at `target` as the parent. No dump builds on another yet.
    fn link_parent(&self, target: &Path) -> Result<(), ImageError>;

    /// The path of image `name` as error messages say it.
    fn path_of(&self, name: &str) -> PathBuf;

    /// Raised when a writer was dropped before its image was complete.
    fn unfinished(&self) -> Arc<AtomicBool>;

    /// Before [`Self::commit`]: the file in which is written what is decided about the tree. It tells, should this
    /// process die before it can say so.
    fn guard(&self, _decision: BorrowedFd<'_>) -> Result<(), ImageError> {
        Ok(())
    }

    /// After [`Self::commit`], when time has passed since: whether what was written is still where it was brought.
    fn recheck(&self) -> Result<(), ImageError> {
        Ok(())
    }

    /// Whether all pages are to come behind all other images but the inventory: somebody reads these meanwhile. The last before
    /// the pages is [`BEFORE_PAGES`].
    fn pages_come_last(&self) -> bool {
        false
    }

    /// The last word of a dump, after [`Self::commit`]: from now on the snapshot may be restored. The tree has
    /// been killed or, with `survives`, goes on on purpose.
    fn confirm(&self, _survives: bool) -> Result<(), ImageError> {
        Ok(())
    }

    /// What a restore reports. [`Outcome::Starting`] comes before the tree runs, and an error keeps it from it.
    fn report(&self, _outcome: Outcome<'_>) -> Result<(), ImageError> {
        Ok(())
    }

    /// Whether pages images are open for writing too, for the reader to punch holes where it has read.
    fn consumed(&self) -> bool {
        false
    }
}

/// Images on their way.
pub trait Arrival: Send + Sync + Debug {
    /// Waits for the first `least` bytes of an image, or for all of it if it has less.
    fn part(&self, name: &str, least: u64) -> Result<Part, ImageError>;
}

/// What has arrived of an image.
#[derive(Debug)]
pub struct Part {
    /// The file in which it lies, with bytes that are checked and others.
    pub file: File,
    /// Where in the file it begins.
    pub start: u64,
    /// How many of its bytes are checked, from the front.
    pub len: u64,
    /// There are no more.
    pub complete: bool,
}

/// How far a restore has come.
#[derive(Debug, Clone, Copy)]
pub enum Outcome<'a> {
    /// Everything is ready; the tree is about to run.
    Starting {
        /// A pidfd of its root.
        root: BorrowedFd<'a>,
        /// The file in which is written what is decided about it.
        decision: BorrowedFd<'a>,
    },
    /// It runs, under this pid.
    Running(i32),
}

/// Images by kind and message, on top of any store.
pub trait TypedStore: Store {
    /// Makes an image of `kind`, its magic written, for entries one by one.
    fn create(&self, kind: ImageKind, id: impl Into<Option<u64>>) -> Result<ImageWriter, ImageError> {
        let name = kind.file_name(id);
        let file = BufWriter::new(self.create_raw(&name)?);
        let entries = EntryWriter::new(file, kind, &self.path_of(&name))?;
        Ok(ImageWriter { entries, finished: false, unfinished: self.unfinished() })
    }

    /// Opens the image of `kind`, its magic checked, or `None` when there is none.
    fn open(&self, kind: ImageKind, id: impl Into<Option<u64>>) -> Result<Option<ImageReader>, ImageError> {
        let name = kind.file_name(id);
        let path = self.path_of(&name);
        let Some(file) = self.open_raw(&name)? else {
            return Ok(None);
        };
        let len = file.len();
        let mut entries = EntryReader::new(BufReader::new(file), len, &path);
        entries.expect_magic(kind)?;
        Ok(Some(ImageReader { entries }))
    }

    /// Whether the image is there.
    fn exists(&self, kind: ImageKind, id: impl Into<Option<u64>>) -> Result<bool, ImageError> {
        Ok(self.open_raw(&kind.file_name(id))?.is_some())
    }

    /// Writes an image of one entry.
    fn write_one<M: Message>(
        &self,
        kind: ImageKind,
        id: impl Into<Option<u64>>,
        message: &M,
    ) -> Result<(), ImageError> {
        self.write_all(kind, id, [message])
    }

    /// Writes an image of these entries; an empty list makes an image without entries.
    fn write_all<'m, M: Message + 'm>(
        &self,
        kind: ImageKind,
        id: impl Into<Option<u64>>,
        messages: impl IntoIterator<Item = &'m M>,
    ) -> Result<(), ImageError> {
        let mut image = self.create(kind, id)?;
        for message in messages {
            image.entry(message)?;
        }
        image.finish()
    }

    /// Reads an image of exactly one entry, or `None` when there is no such image.
    fn read_one<M: Message + Name + Default>(
        &self,
        kind: ImageKind,
        id: impl Into<Option<u64>>,
    ) -> Result<Option<M>, ImageError> {
        let Some(mut image) = self.open(kind, id)? else {
            return Ok(None);
        };
        let path = image.path().to_owned();
        let message = image.next_entry::<M>()?.ok_or(ImageError::Empty { path: path.clone() })?;
        if image.left() > 0 {
            return Err(ImageError::MoreThanOne { path });
        }
        Ok(Some(message))
    }

    /// As [`Self::read_one`], where the image must be there.
    fn need_one<M: Message + Name + Default>(
        &self,
        kind: ImageKind,
        id: impl Into<Option<u64>>,
    ) -> Result<M, ImageError> {
        let id = id.into();
        self.read_one(kind, id)?.ok_or_else(|| ImageError::Absent { path: self.path_of(&kind.file_name(id)) })
    }

    /// Reads all entries; none when there is no such image.
    fn read_all<M: Message + Name + Default>(
        &self,
        kind: ImageKind,
        id: impl Into<Option<u64>>,
    ) -> Result<Vec<M>, ImageError> {
        let mut messages = Vec::new();
        if let Some(mut image) = self.open(kind, id)? {
            while let Some(message) = image.next_entry()? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    /// Reads all entries, each with the bytes that follow it.
    fn read_all_with_extra<M: Message + Name + Default + HasExtra>(
        &self,
        kind: ImageKind,
        id: impl Into<Option<u64>>,
    ) -> Result<Vec<(M, Vec<u8>)>, ImageError> {
        let mut entries = Vec::new();
        if let Some(mut image) = self.open(kind, id)? {
            while let Some(message) = image.next_entry::<M>()? {
                let extra = image.extra(message.extra_len())?;
                entries.push((message, extra));
            }
        }
        Ok(entries)
    }
}

impl<S: Store + ?Sized> TypedStore for S {}

/// An image being read, entry by entry.
#[derive(Debug)]
pub struct ImageReader {
    entries: EntryReader<BufReader<ImageFile>>,
}

impl ImageReader {
    /// The file standing behind what was read so far, with the number of bytes left in it:
    /// for contents too large for memory (ghost files).
    pub fn into_payload(self) -> (ImageFile, u64) {
        let (at, left) = (self.entries.position(), self.entries.left());
        let mut file = self.entries.into_inner().into_inner();
        file.seek(at);
        (file, left)
    }
}

impl Deref for ImageReader {
    type Target = EntryReader<BufReader<ImageFile>>;
    fn deref(&self) -> &Self::Target {
        &self.entries
    }
}

impl DerefMut for ImageReader {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.entries
    }
}

/// An image being written. Dropped before [`ImageWriter::finish`], it keeps its store from
/// being committed.
#[derive(Debug)]
pub struct ImageWriter {
    entries: EntryWriter<BufWriter<Box<dyn ImageSink>>>,
    finished: bool,
    unfinished: Arc<AtomicBool>,
}

impl ImageWriter {
    /// Writes out what is still in buffers: the image is complete.
    pub fn finish(mut self) -> Result<(), ImageError> {
        self.entries.flush()?;
        let path = self.entries.path().to_owned();
        let ended = self.entries.get_mut().get_mut().end();
        ended.map_err(|source| ImageError::Io { action: "write", path, source })?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.unfinished.store(true, Ordering::Release);
        }
    }
}

impl Deref for ImageWriter {
    type Target = EntryWriter<BufWriter<Box<dyn ImageSink>>>;
    fn deref(&self) -> &Self::Target {
        &self.entries
    }
}

impl DerefMut for ImageWriter {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.entries
    }
}

/// Refuses names that would leave the store or that no file can have.
fn check_name(name: &str) -> Result<(), ImageError> {
    let bad = name.is_empty()
        || name.len() > 255
        || name.starts_with('.')
        || name.bytes().any(|b| b == b'/' || b == 0);
    if bad { Err(ImageError::Name { name: name.to_owned() }) } else { Ok(()) }
}
