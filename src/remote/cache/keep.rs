//! What outlives this cache: complete snapshots, handed to the next start by the service manager, or written to a disk.
//!
//! The service manager gets two descriptors of a snapshot as soon as that is complete, before its source hears so: the file
//! with its large images, and a memfd with all else. Thus no end of the cache loses it, a kill included. The first page of
//! the memfd says how far the snapshot is and is written anew whenever that changes, by one call within one page, which
//! is never half done.
//!
//! With `--spill` what is complete at an orderly end is written to a directory, one images directory for each snapshot with
//! the same record beside the images; the next start takes it from there and removes it.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use prost::Message as _;

use super::super::notify::Notify;
use super::super::{draw, pb};
use super::images::Images;
use crate::image::copy::{copy_image, is_image};
use crate::image::{DirStore, DirSync, ImageError, ImageFile, Store};
use crate::settings::OwnerCheck;
use crate::{ownership, sys};

const MAGIC: [u8; 8] = *b"crtkeep\x01";
/// Of the state; the record comes behind it.
const PAGE: usize = 4096;
/// Longest text in a state, so that it fits into its page.
const MOST_TEXT: usize = 1024;
/// Descriptors of a snapshot.
const EACH: usize = 2;
/// The record beside spilled images.
const RECORD: &str = "crtool-snapshot";
/// Largest record that is read: two million small images.
const MOST_RECORD: u64 = 64 << 30;

/// One snapshot that the service manager holds.
#[derive(Debug)]
pub(super) struct Kept {
    name: String,
    file: File,
    size: u64,
}

impl Kept {
    /// How far the snapshot is now.
    pub(super) fn note(&self, state: &pb::KeptState) -> io::Result<()> {
        self.file.write_all_at(&page(state), 0)
    }

    /// Bytes of memory it takes beside the images.
    pub(super) fn size(&self) -> u64 {
        self.size
    }
}

fn page(state: &pb::KeptState) -> Vec<u8> {
    let mut state = state.clone();
    if let Some((end, _)) = state.text.char_indices().find(|(at, c)| at + c.len_utf8() > MOST_TEXT) {
        state.text.truncate(end);
    }
    let mut page = MAGIC.to_vec();
    page.extend(state.encode_length_delimited_to_vec());
    page.resize(PAGE, 0);
    page
}

fn decoded(file: &File) -> io::Result<(pb::Kept, pb::KeptState)> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0)?;
    let state = page.strip_prefix(&MAGIC).ok_or_else(bad)?;
    let state = pb::KeptState::decode_length_delimited(state).map_err(io::Error::other)?;
    let len = file.metadata()?.len().checked_sub(PAGE as u64).filter(|len| *len <= MOST_RECORD);
    let mut record = vec![0; usize::try_from(len.ok_or_else(bad)?).map_err(|_| bad())?];
    file.read_exact_at(&mut record, PAGE as u64)?;
    Ok((pb::Kept::decode(&record[..]).map_err(io::Error::other)?, state))
}

/// What is known of a snapshot that an earlier cache had.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) snapshot: pb::Kept,
    pub(super) state: pb::KeptState,
    pub(super) images: Images,
    /// The service manager has it still.
    pub(super) kept: Option<Kept>,
    /// It lies here still.
    pub(super) spilled: Option<PathBuf>,
}

/// Holds snapshots at the service manager.
#[derive(Debug)]
pub(super) struct Keeper {
    notify: Notify,
    most: usize,
    held: usize,
}

impl Keeper {
    /// With room for so many descriptors.
    pub(super) fn new(notify: Notify, most: usize) -> Self {
        Self { notify, most, held: 0 }
    }

    /// Hands one over.
    pub(super) fn keep(
        &mut self,
        record: &pb::Kept,
        state: &pb::KeptState,
        images: Option<BorrowedFd<'_>>,
    ) -> io::Result<Kept> {
        if self.held + EACH > self.most {
            let text = format!("FileDescriptorStoreMax= is {}, and each snapshot takes two", self.most);
            return Err(io::Error::other(text));
        }
        let mut file = File::from(sys::event::memfd(c"crtool-snapshot", libc::MFD_CLOEXEC)?);
        file.write_all(&page(state))?;
        file.write_all(&record.encode_to_vec())?;
        let name = format!("crtool-{:016x}", draw());
        let fds: Vec<BorrowedFd<'_>> = std::iter::once(file.as_fd()).chain(images).collect();
        // The manager is not to look whether they are ready for something, which files are always.
        self.notify.tell(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), &fds)?;
        self.held += EACH;
        let size = file.metadata()?.len();
        Ok(Kept { name, file, size })
    }

    /// One that it has already.
    pub(super) fn add(&mut self, _: &Kept) {
        self.held += EACH;
    }

    /// Nothing is left to keep.
    pub(super) fn forget(&mut self, kept: &Kept) {
        self.held = self.held.saturating_sub(EACH);
        forget(&self.notify, &kept.name);
    }

    /// Everything that was handed over has arrived.
    pub(super) fn settle(&self) {
        self.notify.settle();
    }
}

fn forget(notify: &Notify, name: &str) {
    if let Err(e) = notify.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]) {
        tracing::warn!("the service manager cannot be told to let go of {name}: {e}");
    }
}

/// What the service manager has kept for this start.
pub(super) fn handed_over(fds: Vec<(String, OwnedFd)>) -> Vec<Record> {
    let mut found: Vec<(String, File, pb::Kept, pb::KeptState)> = Vec::new();
    let mut others: Vec<(String, File)> = Vec::new();
    for (name, fd) in fds {
        let file = File::from(fd);
        match decoded(&file) {
            Ok((record, state)) => found.push((name, file, record, state)),
            Err(_) => others.push((name, file)),
        }
    }
    let mut records = Vec::new();
    for (name, file, snapshot, state) in found {
        let at = others.iter().position(|(of, _)| *of == name);
        let space = at.map(|at| others.swap_remove(at).1);
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        match Images::adopt(&snapshot.images, space) {
            Ok(images) => {
                let kept = Some(Kept { name, file, size });
                records.push(Record { snapshot, state, images, kept, spilled: None });
            }
            Err(e) => tracing::error!(
                "snapshot {}: what the service manager kept of it cannot be used: {e}",
                snapshot.begin.unwrap_or_default().name
            ),
        }
    }
    for (name, _) in others {
        tracing::warn!("the service manager has handed over {name}, which is nothing of this cache");
    }
    records
}

fn failed(what: &str, path: &Path, e: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("{what} {}: {e}", path.display()))
}

/// Writes a snapshot below `dir`; where it lies then. After an error nothing of it is there: it is in memory still, and whoever
/// found it here too would let its tree run twice.
pub(super) fn spill(
    dir: &Path,
    record: &pb::Kept,
    state: &pb::KeptState,
    images: &Images,
) -> io::Result<PathBuf> {
    private_dir(dir)?;
    let begin = record.begin.clone().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = begin.name.chars().take(64).map(plain).collect();
    let place = dir.join(format!("{}-{:016x}", name.trim_start_matches('.'), draw()));
    private_dir(&place)?;
    let written = spill_to(&place, record.clone(), state, images);
    match written.and_then(|()| File::open(dir)?.sync_all()) {
        Ok(()) => Ok(place),
        Err(e) => {
            remove_spilled(&place);
            Err(failed("spill to", &place, e))
        }
    }
}

fn spill_to(place: &Path, mut record: pb::Kept, state: &pb::KeptState, images: &Images) -> io::Result<()> {
    let written = || -> Result<(), ImageError> {
        let store = DirStore::for_dump_checked(place, OwnerCheck::On, DirSync::BeforeCommit)?;
        let mut buffer = Vec::new();
        for (name, image) in images.readable() {
            let image = image.map_err(|e| ImageError::Io {
                action: "read",
                path: place.join(&name),
                source: io::Error::other(e),
            })?;
            if is_image(&name) {
                copy_image(&name, image, &store, &mut buffer)?;
            }
        }
        store.commit()
    };
    written().map_err(|e| io::Error::other(format!("{:#}", anyhow::Error::from(e))))?;
    // The images are in their files.
    record.images.iter_mut().for_each(|image| image.content = Vec::new());
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(place.join(RECORD))?;
    file.write_all(&page(state))?;
    file.write_all(&record.encode_to_vec())?;
    file.sync_all()?;
    File::open(place)?.sync_all()
}

fn private_dir(dir: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed("make directory", dir, e)),
        _ => Ok(()),
    }
}

/// What an earlier cache has spilled below `dir`. What cannot be used stays there.
pub(super) fn spilled(dir: &Path) -> Vec<Record> {
    let mut records = Vec::new();
    for place in fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if !place.join(RECORD).exists() {
            continue;
        }
        match read_spilled(&place) {
            Ok(record) => records.push(record),
            Err(e) => tracing::error!("what was spilled cannot be used: {e}"),
        }
    }
    records
}

fn read_spilled(place: &Path) -> io::Result<Record> {
    let bad = |e: &dyn std::fmt::Display| failed("read", place, e);
    // Before anything in it is opened: a directory of others may hold anything.
    let store = DirStore::open_checked(place, OwnerCheck::On)
        .map_err(|e| bad(&format!("{:#}", anyhow::Error::from(e))))?;
    let record = ownership::input(&place.join(RECORD), "record of a snapshot", OwnerCheck::On);
    let record = record.map_err(|e| bad(&format!("{:#}", anyhow::Error::from(e))))?;
    let (snapshot, state) = decoded(&record).map_err(|e| bad(&e))?;
    let mut images = Images::default();
    let mut piece = vec![0; 1 << 20];
    for kept in &snapshot.images {
        let found = store.open_raw(&kept.name).map_err(|e| bad(&format!("{:#}", anyhow::Error::from(e))))?;
        let mut image = found.ok_or_else(|| bad(&format!("image {} is missing", kept.name)))?;
        images.take(kept, &mut image, &mut piece).map_err(|failure| bad(&failure))?;
    }
    Ok(Record { snapshot, state, images, kept: None, spilled: Some(place.to_owned()) })
}

/// It is in the cache now.
pub(super) fn remove_spilled(place: &Path) {
    if let Err(e) = fs::remove_dir_all(place) {
        tracing::error!("{}: it is in the cache, and must not be restored from there: {e}", place.display());
    }
}

/// The next bytes of an image.
pub(super) fn read_piece<'b>(image: &mut ImageFile, piece: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let mut have = 0;
    while let Some(rest) = piece.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match image.read(rest)? {
            0 => break,
            count => have += count,
        }
    }
    Ok(piece.get(..have).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_put_there_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let place = dir.path().join(name);
            fs::create_dir(&place).unwrap();
            place
        };
        let pipe = place("pipe").join(RECORD);
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(place("noise").join(RECORD), vec![0xff; 2 * PAGE]).unwrap();
        if nix::unistd::geteuid().is_root() {
            let theirs = place("theirs");
            fs::write(theirs.join(RECORD), "").unwrap();
            std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
            let refused = read_spilled(&theirs).unwrap_err().to_string();
            assert!(refused.contains("65534"), "{refused}");
        }
        // It would wait for a writer for ever.
        assert!(spilled(dir.path()).is_empty());
    }
}
