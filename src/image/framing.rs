//! Entries in an image: magic, then `u32` size and message, again and again.
//!
//! All numbers are little endian. What a kind puts after its messages is read by the
//! caller between two entries ([`EntryReader::extra`]). Sizes are checked against the
//! bytes that are there before anything is allocated.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use prost::{Message, Name};

use super::error::ImageError;
use super::names::{Family, ImageKind};
use super::wire;

/// First word of most images.
pub const IMG_COMMON: u32 = 0x5456_4319;
/// First word of statistics and caches.
pub const IMG_SERVICE: u32 = 0x5510_5940;

/// Largest message believed. A mm image with 65,530 mappings (the kernel's default limit)
/// has about 6 MiB.
pub const ENTRY_LIMIT: u64 = 64 << 20;
/// Largest extra kept in memory. Pipes reach 1 MiB by default, socket queues some MiB.
pub const EXTRA_LIMIT: u64 = 256 << 20;

/// The words a file of `kind` begins with.
pub fn magic_bytes(kind: ImageKind) -> Vec<u8> {
    let first = match kind.family() {
        Family::Raw => return Vec::new(),
        Family::Inventory => None,
        Family::Common => Some(IMG_COMMON),
        Family::Service => Some(IMG_SERVICE),
    };
    let mut bytes = Vec::with_capacity(8);
    bytes.extend(first.into_iter().flat_map(u32::to_le_bytes));
    bytes.extend(kind.magic().to_le_bytes());
    bytes
}

/// Appends `message` as an entry to `out`.
pub fn put_entry<M: Message>(out: &mut Vec<u8>, message: &M) {
    let len = message.encoded_len();
    let size = u32::try_from(len).expect("a message of ours below 4 GiB");
    out.reserve(4 + len);
    out.extend(size.to_le_bytes());
    message.encode_raw(out);
}

/// Reads the entries of one image in order.
#[derive(Debug)]
pub struct EntryReader<R> {
    from: R,
    path: PathBuf,
    /// Bytes not read yet.
    left: u64,
    /// Bytes read so far.
    at: u64,
    /// Number of entries read so far.
    entries: usize,
    /// Number of the entry being read, with what follows it.
    entry: usize,
    buffer: Vec<u8>,
    /// The table of the message decoded last, and its name: images have thousands of one kind.
    table: Option<(&'static str, Option<wire::Table>)>,
}

impl<R: Read> EntryReader<R> {
    /// Reads from `from`, which holds `len` bytes; `path` is for the errors.
    pub fn new(from: R, len: u64, path: &Path) -> Self {
        EntryReader {
            from,
            path: path.to_owned(),
            left: len,
            at: 0,
            entries: 0,
            entry: 0,
            buffer: Vec::new(),
            table: None,
        }
    }

    /// File the entries come from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Position in the file: everything before it has been read.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Bytes from the position to the end of the image.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Number of entries read so far.
    pub fn entries_read(&self) -> usize {
        self.entries
    }

    /// Reads the magic and checks that this is an image of `kind`.
    pub fn expect_magic(&mut self, kind: ImageKind) -> Result<(), ImageError> {
        let want = match kind.family() {
            Family::Raw => return Ok(()),
            Family::Inventory => vec![kind.magic()],
            Family::Common => vec![IMG_COMMON, kind.magic()],
            Family::Service => vec![IMG_SERVICE, kind.magic()],
        };
        for want in want {
            let got = self.word()?;
            if got != want {
                return Err(ImageError::Magic { path: self.path.clone(), want, got });
            }
        }
        Ok(())
    }

    /// Reads the magic and finds the kind that it belongs to.
    pub fn read_magic(&mut self) -> Result<ImageKind, ImageError> {
        let mut magic = self.word()?;
        let first = magic;
        if first == IMG_COMMON || first == IMG_SERVICE {
            magic = self.word()?;
        }
        let family = match first {
            IMG_COMMON => Family::Common,
            IMG_SERVICE => Family::Service,
            _ => Family::Inventory,
        };
        ImageKind::by_magic(magic)
            .filter(|kind| kind.family() == family)
            .ok_or(ImageError::UnknownMagic { path: self.path.clone(), got: magic })
    }

    /// The next entry, or `None` at the end of the image. Required fields are there.
    pub fn next_entry<M: Message + Name + Default>(&mut self) -> Result<Option<M>, ImageError> {
        if self.next_bytes()?.is_none() {
            return Ok(None);
        }
        self.decoded().map(Some)
    }

    /// As [`Self::inner_bytes`], decoded. Required fields are there.
    #[cfg(any(test, feature = "internals"))]
    pub fn inner<M: Message + Name + Default>(&mut self) -> Result<M, ImageError> {
        self.inner_bytes()?;
        self.decoded()
    }

    /// What has been read last, if its required fields are there.
    fn decoded<M: Message + Name + Default>(&mut self) -> Result<M, ImageError> {
        let table = match self.table {
            Some((name, table)) if name == M::NAME => table,
            _ => wire::table(&M::full_name()),
        };
        self.table = Some((M::NAME, table));
        let (bytes, path, entry) = (&self.buffer, &self.path, self.entry);
        // Before decoding: what lacks a field may be small on disk and large in memory.
        if let Some(wire::Missing { message, field }) = survey(table, bytes, path, entry)? {
            return Err(ImageError::MissingField { path: path.to_owned(), entry, message, field });
        }
        M::decode(bytes.as_slice()).map_err(|source| {
            let (path, message) = (path.to_owned(), M::NAME.to_owned());
            ImageError::Decode { path, entry, message, source }
        })
    }

    /// The encoded message of the next entry, or `None` at the end of the image.
    pub fn next_bytes(&mut self) -> Result<Option<&[u8]>, ImageError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.entry = self.entries;
        self.framed()?;
        self.entries += 1;
        Ok(Some(&self.buffer))
    }

    /// A size and as many bytes, into the buffer.
    fn framed(&mut self) -> Result<(), ImageError> {
        let size = u64::from(self.word()?);
        if size > ENTRY_LIMIT {
            return Err(self.too_large(size, ENTRY_LIMIT));
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        self.fill(&mut buffer, size)?;
        self.buffer = buffer;
        Ok(())
    }

    /// The `len` bytes that follow the message read last.
    pub fn extra(&mut self, len: u64) -> Result<Vec<u8>, ImageError> {
        if len > EXTRA_LIMIT {
            return Err(self.too_large(len, EXTRA_LIMIT));
        }
        let mut extra = Vec::new();
        self.fill(&mut extra, len)?;
        Ok(extra)
    }

    /// Leaves out the `len` bytes that follow the message read last.
    pub fn skip(&mut self, len: u64) -> Result<(), ImageError> {
        if len > self.left {
            return Err(self.truncated());
        }
        let skipped = io::copy(&mut self.from.by_ref().take(len), &mut io::sink());
        if skipped.map_err(|source| self.io(source))? != len {
            return Err(self.truncated());
        }
        self.left -= len;
        self.at += len;
        Ok(())
    }

    /// The encoded message, with its own size, inside what follows the message read last: a
    /// message of a SysV queue, a chunk of a ghost file. The image must not end here.
    pub fn inner_bytes(&mut self) -> Result<&[u8], ImageError> {
        self.framed()?;
        Ok(&self.buffer)
    }

    fn word(&mut self) -> Result<u32, ImageError> {
        let mut word = [0; 4];
        if self.left < 4 {
            return Err(self.truncated());
        }
        self.from.read_exact(&mut word).map_err(|source| self.io(source))?;
        self.left -= 4;
        self.at += 4;
        Ok(u32::from_le_bytes(word))
    }

    /// Appends the next `len` bytes to `buffer`, or fails when there are fewer.
    fn fill(&mut self, buffer: &mut Vec<u8>, len: u64) -> Result<(), ImageError> {
        if len > self.left {
            return Err(self.truncated());
        }
        let read = self.from.by_ref().take(len).read_to_end(buffer);
        let read = read.map_err(|source| self.io(source))?;
        if read as u64 != len {
            return Err(self.truncated());
        }
        self.left -= len;
        self.at += len;
        Ok(())
    }

    fn truncated(&self) -> ImageError {
        ImageError::Truncated { path: self.path.clone(), entry: self.entry }
    }

    fn too_large(&self, size: u64, limit: u64) -> ImageError {
        ImageError::TooLarge { path: self.path.clone(), entry: self.entry, size, limit }
    }

    fn io(&self, source: io::Error) -> ImageError {
        ImageError::Io { action: "read", path: self.path.clone(), source }
    }

    /// The reader beneath, standing at [`Self::position`].
    pub fn into_inner(self) -> R {
        self.from
    }
}

/// Refuses an entry that no dump can have written; else says what it lacks, if anything.
pub(super) fn survey(
    table: Option<wire::Table>,
    bytes: &[u8],
    path: &Path,
    entry: usize,
) -> Result<Option<wire::Missing>, ImageError> {
    let survey = wire::survey(table, bytes);
    if survey.group || survey.values > wire::VALUES_LIMIT {
        return Err(ImageError::Crafted { path: path.to_owned(), entry });
    }
    Ok(survey.missing)
}

/// Writes the entries of one image in order.
#[derive(Debug)]
pub struct EntryWriter<W> {
    to: W,
    path: PathBuf,
    buffer: Vec<u8>,
}

impl<W: Write> EntryWriter<W> {
    /// Writes to `to`, beginning with the magic of `kind`; `path` is for the errors.
    pub fn new(to: W, kind: ImageKind, path: &Path) -> Result<Self, ImageError> {
        let mut writer = EntryWriter { to, path: path.to_owned(), buffer: Vec::new() };
        writer.extra(&magic_bytes(kind))?;
        Ok(writer)
    }

    /// Writes one entry.
    pub fn entry<M: Message>(&mut self, message: &M) -> Result<(), ImageError> {
        self.buffer.clear();
        put_entry(&mut self.buffer, message);
        self.to.write_all(&self.buffer).map_err(|source| self.io(source))
    }

    /// Writes what follows a message, as it is.
    pub fn extra(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.to.write_all(bytes).map_err(|source| self.io(source))
    }

    /// Writes out what is still in buffers.
    pub fn flush(&mut self) -> Result<(), ImageError> {
        self.to.flush().map_err(|source| self.io(source))
    }

    /// File the entries go to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The writer beneath.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    fn io(&self, source: io::Error) -> ImageError {
        ImageError::Io { action: "write", path: self.path.clone(), source }
    }
}
