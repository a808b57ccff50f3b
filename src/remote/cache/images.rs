//! The images of one snapshot as they arrive, and the check that they are all there.
//!
//! Where their bytes lie is for [`memory`](super::memory); of what becomes of the snapshot nothing is known here.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::super::pb::{self, FailCode};
use super::super::wire::{self, MAX_IMAGES, Sum};
use super::super::{Failure, crc, name};
use super::keep::read_piece;
use super::memory::{Bytes, Readable, Space};
use super::protocol;
use crate::image::ImageFile;

/// What an image is charged beyond its bytes: names and tables take memory too.
pub(super) const IMAGE_COST: u64 = 1024;
/// Without it nothing can be restored.
const INVENTORY: &str = "inventory.img";

/// An image.
#[derive(Debug)]
struct Image {
    name: String,
    bytes: Bytes,
    /// Of the frames that have come whole.
    sum: Sum,
    complete: bool,
}

/// The images of a snapshot.
#[derive(Debug, Default)]
pub(super) struct Images {
    all: HashMap<u32, Image>,
    names: BTreeMap<String, u32>,
    space: Space,
    /// Bytes of memory that complete images take in that.
    filed: u64,
    open: usize,
    charged: u64,
    size: u64,
    /// An image of which a reader waits for so many bytes.
    awaited: Option<(String, u64)>,
}

/// What a request for an image finds.
#[derive(Debug)]
pub(super) enum Found {
    /// A descriptor, and what is known about it.
    Image(pb::ImageInfo, OwnedFd),
    /// It has begun and not ended, or not begun.
    NotYet,
}

fn unstored(name: &str, e: &io::Error) -> Failure {
    let (code, hint) = match e.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => (FailCode::FailInternal, ": raise its limit (ulimit -n)"),
        Some(libc::ENOSPC | libc::ENOMEM) => (FailCode::FailMemory, ": the host has no memory left"),
        None if e.kind() == io::ErrorKind::FileTooLarge => {
            (FailCode::FailMemory, ": it is larger than 4 TiB")
        }
        _ => (FailCode::FailInternal, ""),
    };
    Failure::new(code, format!("image {name} cannot be kept: {e}{hint}"))
}

fn not_handed_out(name: &str, e: &io::Error) -> Failure {
    Failure::new(FailCode::FailInternal, format!("image {name} cannot be handed out: {e}"))
}

impl Images {
    /// Bytes of memory they take.
    pub(super) fn charged(&self) -> u64 {
        self.charged
    }

    /// Bytes of images that have come.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// How many.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// How many have begun and not ended.
    pub(super) fn open(&self) -> usize {
        self.open
    }

    /// Longest list of images that a commit may bring now, in bytes.
    pub(super) fn longest_commit(&self) -> u64 {
        // Tag and length, and three fields of at most 1 + 10 bytes.
        64 + self.all.len() as u64 * 40
    }

    /// Bytes of memory that a frame for the image will take.
    pub(super) fn cost(&self, image: u32, raw: u32, zeros: bool) -> Result<u64, Failure> {
        let bytes = match self.all.get(&image) {
            Some(Image { bytes, complete: false, .. }) => bytes,
            Some(Image { name, .. }) => {
                return Err(protocol(format!("bytes for image {name} after its end")));
            }
            None => return Err(protocol(format!("bytes for image number {image}, which has not begun"))),
        };
        Ok(if zeros { bytes.cost_of_zeros(raw) } else { bytes.cost(raw) })
    }

    /// A new one.
    pub(super) fn begin(&mut self, image: u32, begin: pb::ImageBegin) -> Result<(), Failure> {
        name::check_image(&begin.name)?;
        if self.all.contains_key(&image) {
            return Err(protocol(format!("image {}: number {image} begins twice", begin.name)));
        }
        if self.names.contains_key(&begin.name) {
            return Err(protocol(format!("image {} begins twice", begin.name)));
        }
        if self.all.len() >= MAX_IMAGES as usize {
            return Err(protocol(format!("more than {MAX_IMAGES} images")));
        }
        self.names.insert(begin.name.clone(), image);
        let new = Image { name: begin.name, bytes: Bytes::new(), sum: Sum::default(), complete: false };
        self.all.insert(image, new);
        self.open += 1;
        self.charged += IMAGE_COST;
        Ok(())
    }

    fn arriving(&mut self, image: u32) -> Result<(&mut Image, &mut Space), Failure> {
        match self.all.get_mut(&image) {
            Some(found) if !found.complete => Ok((found, &mut self.space)),
            Some(found) => Err(protocol(format!("image {} has ended already", found.name))),
            None => Err(protocol(format!("image number {image} has not begun"))),
        }
    }

    fn grow(
        &mut self,
        image: u32,
        with: impl FnOnce(&mut Bytes, &mut Space) -> io::Result<()>,
    ) -> Result<(), Failure> {
        let (found, space) = self.arriving(image)?;
        let before = (found.bytes.size(), found.bytes.charged());
        let done = with(&mut found.bytes, space).map_err(|e| unstored(&found.name, &e));
        let after = (found.bytes.size(), found.bytes.charged());
        self.size += after.0 - before.0;
        self.charged = (self.charged + after.1).saturating_sub(before.1);
        done
    }

    /// Bytes of a frame, which may be checked later.
    pub(super) fn append(&mut self, image: u32, bytes: &[u8]) -> Result<(), Failure> {
        self.grow(image, |place, space| place.append(space, bytes))
    }

    /// All bytes of a frame have come, and are `raw` bytes of that CRC32C.
    pub(super) fn appended(&mut self, image: u32, raw: u32, crc: u32, sent: u32) -> Result<(), Failure> {
        let (found, _) = self.arriving(image)?;
        if crc != sent {
            let text = format!("image {} was damaged on its way: wrong checksum", found.name);
            return Err(Failure::new(FailCode::FailChecksum, text));
        }
        found.sum.push(raw, crc);
        Ok(())
    }

    /// Zeros that did not travel.
    pub(super) fn zeros(&mut self, image: u32, raw: u32, sent: u32) -> Result<(), Failure> {
        self.grow(image, |place, space| place.append_zeros(space, raw))?;
        self.appended(image, raw, wire::crc_of_zeros(raw), sent)
    }

    /// All of it has come.
    pub(super) fn end(&mut self, image: u32, end: &pb::ImageEnd) -> Result<(), Failure> {
        self.grow(image, Bytes::end)?;
        let (found, _) = self.arriving(image)?;
        if found.sum.size != end.size {
            let text =
                format!("image {} has {} bytes, {} were announced", found.name, found.sum.size, end.size);
            return Err(Failure::new(FailCode::FailShort, text));
        }
        if found.sum.crc != end.crc32c {
            let text = format!("image {} was damaged on its way: wrong checksum of the whole", found.name);
            return Err(Failure::new(FailCode::FailChecksum, text));
        }
        found.complete = true;
        self.filed += found.bytes.filed();
        self.open -= 1;
        Ok(())
    }

    /// Whether the list names exactly what has come.
    pub(super) fn check(&self, commit: &pb::Commit) -> Result<(), Failure> {
        let short = |text| Err(Failure::new(FailCode::FailShort, text));
        if let Some(open) = self.all.values().find(|image| !image.complete) {
            return short(format!("image {} has not ended", open.name));
        }
        if commit.images.len() != self.all.len() {
            let (came, listed) = (self.all.len(), commit.images.len());
            return short(format!("{came} images have come, {listed} were announced"));
        }
        if !self.names.contains_key(INVENTORY) {
            return short(format!("there is no {INVENTORY} among its images: it is no snapshot of a tree"));
        }
        let mut seen = std::collections::HashSet::new();
        for listed in &commit.images {
            let Some(found) = self.all.get(&listed.image).filter(|_| seen.insert(listed.image)) else {
                return short(format!("image number {} did not come", listed.image));
            };
            if found.sum != (Sum { size: listed.size, crc: listed.crc32c }) {
                return short(format!("image {} is not what was announced", found.name));
            }
        }
        Ok(())
    }

    /// Infos of those after `after`, as many as fit into about `room` bytes, and whether there are more.
    pub(super) fn list(&self, after: &str, room: usize) -> pb::Images {
        use std::ops::Bound::{Excluded, Unbounded};
        let mut page = pb::Images::default();
        let mut taken = 0;
        for (name, image) in self.names.range::<str, _>((Excluded(after), Unbounded)) {
            taken += name.len() + 24;
            if taken > room {
                page.more = true;
                break;
            }
            page.images.extend(self.all.get(image).map(Image::info));
        }
        page
    }

    /// Whether an image is complete.
    pub(super) fn is_complete(&self, name: &str) -> bool {
        self.complete(name).is_some()
    }

    fn complete(&self, name: &str) -> Option<&Image> {
        let image = self.names.get(name).and_then(|image| self.all.get(image));
        image.filter(|image| image.complete)
    }

    /// One for a reader.
    pub(super) fn read(&self, name: &str) -> Result<Found, Failure> {
        let Some(image) = self.complete(name) else { return Ok(Found::NotYet) };
        let readable = image.bytes.reader(&self.space).map_err(|e| not_handed_out(name, &e))?;
        Ok(image.found(readable))
    }

    /// One for a reader, when it is complete or `least` bytes of it have come and are checked. Else these are waited for, see
    /// [`Self::has_awaited`].
    pub(super) fn read_part(&mut self, name: &str, least: u64) -> Result<Found, Failure> {
        let enough = |image: &&Image| image.complete || image.sum.size >= least;
        if let Some(image) = self.names.get(name).and_then(|image| self.all.get(image)).filter(enough) {
            let failed = |e: io::Error| not_handed_out(name, &e);
            if image.complete || image.bytes.ready_part(&mut self.space).map_err(failed)? {
                return Ok(image.found(image.bytes.reader(&self.space).map_err(failed)?));
            }
        }
        self.awaited = Some((name.to_owned(), least));
        Ok(Found::NotYet)
    }

    /// Whether what has come of an image is what somebody waits for.
    pub(super) fn has_awaited(&self, image: u32) -> bool {
        self.awaited.as_ref().is_some_and(|(name, least)| {
            let awaited = self.all.get(&image).filter(|image| image.name == *name);
            awaited.is_some_and(|image| image.sum.size >= *least)
        })
    }

    /// As [`Self::read`], for a reader that punches holes where it has read. `true`: from now on what is there
    /// cannot be restored again.
    pub(super) fn consume(&self, name: &str) -> Result<(Found, bool), Failure> {
        let Some(image) = self.complete(name) else { return Ok((Found::NotYet, false)) };
        let (readable, itself) = image.bytes.consumer(&self.space).map_err(|e| not_handed_out(name, &e))?;
        Ok((image.found(readable), itself))
    }

    /// What there is to keep of them, and the file with the large ones.
    pub(super) fn record(&self) -> (Vec<pb::kept::Image>, Option<BorrowedFd<'_>>) {
        let record = |(image, found): (&u32, &Image)| pb::kept::Image {
            image: *image,
            name: found.name.clone(),
            size: found.sum.size,
            crc32c: found.sum.crc,
            large: found.bytes.place().is_ok(),
            offset: found.bytes.place().unwrap_or(0),
            content: found.bytes.place().err().unwrap_or_default().to_vec(),
        };
        (self.all.iter().map(record).collect(), self.space.fd())
    }

    /// Images of an earlier cache, all of them complete.
    pub(super) fn adopt(record: &[pb::kept::Image], file: Option<File>) -> io::Result<Self> {
        let bad = |name: &str| io::Error::other(format!("image {name} is not there"));
        let last = record.iter().filter(|image| image.large).map(|image| image.offset).max();
        let mut images = Self::default();
        if let (Some(file), Some(last)) = (file, last) {
            images.space = Space::adopt(file, last)?;
        }
        for kept in record {
            let place = if kept.large { Ok(kept.offset) } else { Err(kept.content.clone()) };
            let missing = match &place {
                Ok(_) => images.space.fd().is_none(),
                Err(content) => content.len() as u64 != kept.size,
            };
            if missing {
                return Err(bad(&kept.name));
            }
            let bytes = Bytes::adopt(kept.size, place);
            images.size += kept.size;
            images.charged += IMAGE_COST + bytes.charged();
            let sum = Sum { size: kept.size, crc: kept.crc32c };
            images.names.insert(kept.name.clone(), kept.image);
            images.all.insert(kept.image, Image { name: kept.name.clone(), bytes, sum, complete: true });
        }
        images.filed = images.space.taken();
        images.charged += images.filed;
        Ok(images)
    }

    /// Takes an image of which a copy lies in a file.
    pub(super) fn take(
        &mut self,
        kept: &pb::kept::Image,
        from: &mut ImageFile,
        piece: &mut [u8],
    ) -> Result<(), Failure> {
        let failed = |e: io::Error| unstored(&kept.name, &e);
        self.begin(kept.image, pb::ImageBegin { name: kept.name.clone(), expected_bytes: 0 })?;
        loop {
            let bytes = read_piece(from, piece).map_err(failed)?;
            if bytes.is_empty() {
                return self.end(kept.image, &pb::ImageEnd { size: kept.size, crc32c: kept.crc32c });
            }
            let raw = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let crc = crc::of(bytes);
            if bytes.iter().all(|byte| *byte == 0) {
                self.zeros(kept.image, raw, crc)?;
            } else {
                self.append(kept.image, bytes)?;
                self.appended(kept.image, raw, crc, crc)?;
            }
        }
    }

    /// All of them, for a copy.
    pub(super) fn readable(&self) -> impl Iterator<Item = (String, io::Result<ImageFile>)> + '_ {
        self.all.values().map(|image| {
            let readable = image.bytes.reader(&self.space);
            let file = readable
                .map(|Readable { fd, offset }| ImageFile::part(File::from(fd), offset, image.bytes.size()));
            (image.name.clone(), file)
        })
    }

    /// Looks how much is left where images are being consumed.
    pub(super) fn measure(&mut self) {
        let freed = self.filed.saturating_sub(self.space.taken());
        self.filed -= freed;
        self.charged = self.charged.saturating_sub(freed);
    }
}

impl Image {
    fn info(&self) -> pb::ImageInfo {
        pb::ImageInfo { name: self.name.clone(), size: self.sum.size, complete: self.complete, offset: 0 }
    }

    fn found(&self, Readable { fd, offset }: Readable) -> Found {
        Found::Image(pb::ImageInfo { offset, ..self.info() }, fd)
    }
}
