//! What arrives: frames of a stream become images of its snapshot, as far as there is room for them.
//!
//! Which frame may follow which is for [`source`](crate::remote::cache::source), where the bytes lie for
//! [`images`](crate::remote::cache::images). Memory is asked for before the payload of a frame is read, and counted when it is there.

use super::{Snapshots, mib};
use crate::remote::cache::images::{IMAGE_COST, Images};
use crate::remote::pb::{self, FailCode};
use crate::remote::{Failure, handover::Event, wire};

impl Snapshots {
    /// Whether so many bytes more of a snapshot fit.
    fn room(&mut self, id: u64, cost: u64) -> Result<(), Failure> {
        let Some(snapshot) = self.table.get(id) else { return Ok(()) };
        let more = snapshot.reserved_with(cost) - snapshot.reserved();
        if more == 0 {
            return Ok(());
        }
        let (origin, so_far) = (snapshot.origin.clone(), mib(snapshot.charged()));
        self.room_after_a_look(&origin, more).map_err(|lack| {
            let name = self.table.get(id).map_or("", |s| &s.begin.name);
            let text = format!("snapshot {name} does not fit: it has {so_far} MiB so far; {lack}");
            Failure::new(FailCode::FailMemory, text)
        })
    }

    /// Whether one more image fits.
    pub(crate) fn room_for_image(&mut self, id: u64) -> Result<(), Failure> {
        self.room(id, IMAGE_COST)
    }

    /// Whether a frame of bytes or zeros fits.
    pub(crate) fn room_for(&mut self, id: u64, image: u32, raw: u32, zeros: bool) -> Result<(), Failure> {
        let Some(images) = self.images(id) else { return Ok(()) };
        let cost = images.cost(image, raw, zeros)?;
        self.room(id, cost)
    }

    /// An image begins.
    pub(crate) fn image_begin(&mut self, id: u64, image: u32, begin: pb::ImageBegin) -> Result<(), Failure> {
        self.on_images(id, |images| images.begin(image, begin))
    }

    /// Bytes of an image.
    pub(crate) fn append(&mut self, id: u64, image: u32, bytes: &[u8]) -> Result<(), Failure> {
        self.on_images(id, |images| images.append(image, bytes))
    }

    /// A frame of bytes has come whole.
    pub(crate) fn appended(&mut self, id: u64, header: &wire::Header, crc: u32) -> Result<(), Failure> {
        self.on_images(id, |images| images.appended(header.image, header.raw, crc, header.crc))?;
        self.has_come(id, header.image);
        Ok(())
    }

    /// Zeros of an image.
    pub(crate) fn zeros(&mut self, id: u64, header: &wire::Header) -> Result<(), Failure> {
        self.on_images(id, |images| images.zeros(header.image, header.raw, header.crc))?;
        self.has_come(id, header.image);
        Ok(())
    }

    /// More of an image has come.
    fn has_come(&mut self, id: u64, image: u32) {
        if self.images(id).is_some_and(|images| images.has_awaited(image)) {
            self.changes += 1;
        }
    }

    /// An image has ended.
    pub(crate) fn image_end(&mut self, id: u64, image: u32, end: &pb::ImageEnd) -> Result<(), Failure> {
        self.on_images(id, |images| images.end(image, end))?;
        if self.table.get(id).is_some_and(|s| s.reader.is_some() || s.is_described()) {
            self.changes += 1;
        }
        Ok(())
    }

    /// All images have come: checks that and answers.
    pub(crate) fn commit(&mut self, id: u64, commit: &pb::Commit) -> Result<(), Failure> {
        self.on_images(id, |images| images.check(commit))?;
        // What was promised and did not come is for others.
        self.counted(id, |snapshot| snapshot.begin.expected_bytes = 0);
        if let Some(snapshot) = self.table.get(id) {
            let bytes = snapshot.images.as_ref().map_or(0, Images::size);
            let took = snapshot.began.elapsed().as_secs_f64();
            tracing::info!(
                "snapshot {} is complete: {} images, {bytes} bytes in {took:.3} s, {:.0} MB/s",
                snapshot.begin.name,
                commit.images.len(),
                bytes as f64 / took.max(1e-6) / 1e6,
            );
        }
        self.keep(id);
        self.happen(id, Event::Complete, "");
        Ok(())
    }
}
