//! What lies in pipes and fifos: `pipes-data.img`, `fifo-data.img`.
//!
//! Content is copied with tee(2), which leaves it where it is. One entry per pipe holds capacity and bytes; a pipe in packet
//! mode gets one entry per packet instead, since the next reader must find the same borders.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{ErrorKind, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{FileError, flags};
use crate::{
    image::{ImageKind, ImageWriter, Store, TypedStore, pb},
    sys::{Errno, pipe},
};

/// Largest packet: more than this comes from ordinary writes (PIPE_BUF, and a page everywhere).
const PACKET: usize = 4096;

/// Capacities above this are no pipe's (2^31 is the kernel's own limit).
const CAPACITY: u32 = 1 << 31;

/// Writes one of the two images, which is made with its first entry.
#[derive(Debug, Default)]
pub(super) struct DataWriter {
    image: Option<ImageWriter>,
    /// Of each pipe, what its content needs.
    needs: BTreeMap<u32, Need>,
}

/// What a pipe must have room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    capacity: Option<u32>,
    /// Bytes that its content takes up.
    room: usize,
}

impl Need {
    /// Whether a pipe can be made so here: tried with one of ours.
    pub(super) fn try_out(self) -> Result<(), FileError> {
        let (_read, write) = pipe::pipe2(libc::O_CLOEXEC).map_err(FileError::sys("make a pipe"))?;
        self.resize(&write)
    }

    /// Sets the capacity. Where that is not allowed it goes on, if the content still fits.
    fn resize(self, end: &OwnedFd) -> Result<(), FileError> {
        let Some(want) = self.capacity else { return Ok(()) };
        let now = pipe::capacity(end.as_fd()).map_err(FileError::sys("read the capacity of a pipe"))?;
        if want == now {
            return Ok(());
        }
        if want > CAPACITY {
            return Err(FileError::sys("set the capacity of a pipe")(Errno::EINVAL));
        }
        match pipe::set_capacity(end.as_fd(), want) {
            Ok(_) => Ok(()),
            Err(Errno::EPERM) if self.room <= now as usize => {
                tracing::warn!("a pipe keeps {now} bytes of capacity, not {want}: no CAP_SYS_RESOURCE");
                Ok(())
            }
            Err(Errno::EPERM) => Err(FileError::unsupported(
                format!("a pipe of {want} bytes with {} in it cannot be made here", self.room),
                "CAP_SYS_RESOURCE or a larger /proc/sys/fs/pipe-max-size allows it",
            )),
            Err(e) => Err(FileError::sys("set the capacity of a pipe (F_SETPIPE_SZ)")(e)),
        }
    }
}

impl DataWriter {
    /// Saves the pipe that `end` belongs to. `readable`: `end` can be read from; else there is only a capacity.
    pub(super) fn dump(
        &mut self,
        store: &dyn Store,
        kind: ImageKind,
        pipe_id: u32,
        end: BorrowedFd<'_>,
        readable: bool,
    ) -> Result<(), FileError> {
        let capacity = pipe::capacity(end).map_err(FileError::sys("read the capacity of a pipe"))?;
        let mut pieces = if readable { copy(end, capacity)? } else { Vec::new() };
        if pieces.is_empty() {
            pieces.push(Vec::new());
        }
        let room = room_of(&pieces);
        self.needs.insert(pipe_id, Need { capacity: Some(capacity), room });
        let image = match &mut self.image {
            Some(image) => image,
            none => none.insert(store.create(kind, None)?),
        };
        for piece in pieces {
            let bytes = u32::try_from(piece.len())
                .map_err(|_| FileError::unsupported("it holds more than 4 GiB", ""))?;
            image.entry(&pb::PipeDataEntry { pipe_id, bytes, size: Some(capacity) })?;
            image.extra(&piece)?;
        }
        Ok(())
    }

    /// The image is complete.
    pub(super) fn finish(&mut self) -> Result<(), FileError> {
        if let Some(image) = self.image.take() {
            image.finish()?;
        }
        Ok(())
    }

    /// What each pipe that was saved needs.
    pub(super) fn needs(&self) -> BTreeMap<u32, Need> {
        self.needs.clone()
    }
}

/// Bytes that pieces take up: a packet takes a whole slot, whatever its size.
fn room_of(pieces: &[Vec<u8>]) -> usize {
    let bytes = pieces.iter().map(Vec::len).sum::<usize>();
    let slots = pieces.iter().filter(|piece| !piece.is_empty()).count();
    bytes.max(slots.saturating_mul(PACKET))
}

/// The content of a pipe, in as many pieces as reads of any size would give: one, or one per packet.
fn copy(end: BorrowedFd<'_>, capacity: u32) -> Result<Vec<Vec<u8>>, FileError> {
    let there = pipe::readable_bytes(end).map_err(FileError::sys("read the amount in a pipe"))? as usize;
    if there == 0 {
        return Ok(Vec::new());
    }
    let (read, write) =
        pipe::pipe2(libc::O_CLOEXEC | libc::O_NONBLOCK).map_err(FileError::sys("make a pipe"))?;
    // As many slots as the source has; where that is not allowed, ours may still be large enough.
    if pipe::capacity(read.as_fd()).is_ok_and(|ours| ours < capacity) {
        let _ = pipe::set_capacity(read.as_fd(), capacity);
    }
    let copied =
        pipe::tee(end, write.as_fd(), there).map_err(FileError::sys("copy the content of a pipe"))?;
    if copied != there {
        return Err(FileError::unsupported(
            format!("only {copied} of its {there} bytes fit into a pipe of ours"),
            "CAP_SYS_RESOURCE or a larger /proc/sys/fs/pipe-max-size allows it",
        ));
    }
    drop(write);
    let mut from = File::from(read);
    let mut pieces = Vec::new();
    let mut buffer = vec![0; there];
    let mut left = there;
    while left > 0 {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                left = left.saturating_sub(len);
                pieces.push(buffer.get(..len).unwrap_or_default().to_vec());
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(io_error("read the content of a pipe", &e)),
        }
    }
    if left > 0 {
        return Err(FileError::unsupported(format!("{left} of its {there} bytes are missing"), ""));
    }
    Ok(pieces)
}

/// What is to be put into one pipe.
#[derive(Debug, Default)]
pub(super) struct Content {
    capacity: Option<u32>,
    pieces: Vec<Vec<u8>>,
}

/// Fails when there is no image of contents. Every dump writes one when it meets an end to read from, also if
/// the pipe is empty: without it contents are lost.
pub(super) fn must_exist(store: &dyn Store, kind: ImageKind) -> Result<(), FileError> {
    let name = kind.file_name(None);
    match store.open_raw(&name)? {
        Some(_) => Ok(()),
        None => Err(FileError::Path { action: "open", path: store.path_of(&name), source: Errno::ENOENT }),
    }
}

/// Reads one of the two images.
pub(super) fn read(store: &dyn Store, kind: ImageKind) -> Result<BTreeMap<u32, Content>, FileError> {
    let mut all: BTreeMap<u32, Content> = BTreeMap::new();
    for (entry, bytes) in store.read_all_with_extra::<pb::PipeDataEntry>(kind, None)? {
        let content = all.entry(entry.pipe_id).or_default();
        content.capacity = content.capacity.max(entry.size.filter(|size| *size > 0));
        if !bytes.is_empty() {
            content.pieces.push(bytes);
        }
    }
    Ok(all)
}

impl Content {
    #[cfg(test)]
    pub(super) fn of(pieces: Vec<Vec<u8>>) -> Self {
        Self { capacity: None, pieces }
    }

    /// Gives the pipe its capacity and content. `packets`: its writers are in packet mode.
    pub(super) fn fill(&self, write: &OwnedFd, packets: bool) -> Result<(), FileError> {
        self.resize(write)?;
        if self.pieces.is_empty() {
            return Ok(());
        }
        let packets = packets || self.pieces.len() > 1;
        for piece in &self.pieces {
            let direct = if packets && piece.len() <= PACKET { libc::O_DIRECT } else { 0 };
            flags::apply(write, (libc::O_NONBLOCK | direct).cast_unsigned())?;
            let mut rest: &[u8] = piece;
            while !rest.is_empty() {
                match nix::unistd::write(write, rest) {
                    Ok(len) => rest = rest.get(len..).unwrap_or_default(),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => {
                        return Err(FileError::sys("put all bytes back into a pipe")(Errno::ENOSPC));
                    }
                    Err(e) => return Err(FileError::sys("write the content of a pipe")(e)),
                }
            }
        }
        flags::apply(write, 0)
    }

    /// Sets the capacity.
    pub(super) fn resize(&self, end: &OwnedFd) -> Result<(), FileError> {
        Need { capacity: self.capacity, room: room_of(&self.pieces) }.resize(end)
    }

    /// Whether a pipe that others may have kept alive holds this already: exactly this, or nothing.
    pub(super) fn is_in(&self, read: BorrowedFd<'_>) -> Result<bool, FileError> {
        let capacity = pipe::capacity(read).map_err(FileError::sys("read the capacity of a pipe"))?;
        let there = copy(read, capacity)?;
        if there.is_empty() {
            return Ok(self.pieces.is_empty());
        }
        if there == self.pieces {
            return Ok(true);
        }
        Err(FileError::unsupported("it holds other data now than it did", "somebody else uses it"))
    }
}

pub(super) fn io_error(action: &'static str, error: &std::io::Error) -> FileError {
    FileError::sys(action)(Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_made_is_known_before() {
        let need = |capacity, room| Need { capacity: Some(capacity), room }.try_out();
        need(1 << 16, 1 << 16).unwrap();
        need(1 << 17, 0).unwrap();
        assert!(need(CAPACITY + 1, 0).is_err());
        let most = 1u32 << 30;
        let allowed =
            pipe::pipe2(libc::O_CLOEXEC).and_then(|(_, write)| pipe::set_capacity(write.as_fd(), most));
        if allowed == Err(Errno::EPERM) {
            need(most, 1 << 16).unwrap();
            let error = need(most, (1 << 16) + 1).unwrap_err();
            assert!(error.to_string().contains("pipe-max-size"), "{error}");
        }
    }
}
