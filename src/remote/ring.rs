//! Memory through which a dump gives the proxy the bytes of pages, instead of through the pipe.
//!
//! The pipe costs a page of the kernel's for every page of the process, with its accounting and its part in a list
//! of fragments down to the network card. In the ring a dump reads pages straight out of the process into memory
//! that the proxy sends from.
//!
//! The ring is a memfd that the proxy makes for one snapshot, of [`SLOTS`] slots of [`SLOT`] bytes. Frames keep
//! their order because their heads still go through the pipe; that of a `Data` frame says in its `stream`, which is 0
//! otherwise, where in the ring its payload lies: [`Place`]. The proxy counts up an eventfd (a semaphore) by one for
//! each such frame when its payload is with the connection, in the order of the heads; a dump that remembers the order
//! knows which slots are free again.
//!
//! The dump is not trusted with more than its own snapshot: the memfd is sealed against getting shorter, only
//! the kernel reads the payload, or a copy is made first, and a payload that changes under way has a wrong
//! checksum for the cache. What a dump trusts the proxy with, it does anyway.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sys::mapping::{Access, Mapping};
use crate::sys::{event, mapping};

/// Bytes of a slot: what a thread of a dump reads at once.
pub const SLOT: usize = crate::pages::copy::CHUNK;
/// Slots of a ring. Each thread of a dump holds one, and some are on their way: more than that only leave the
/// processor's cache.
pub const SLOTS: usize = 16;
/// Places are counted in these.
const UNIT: usize = 4096;

/// Where in a ring a payload begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(usize);

// A frame may hold a whole slot.
const _: () = assert!(SLOT <= super::wire::MAX_DATA as usize && SLOT.is_multiple_of(UNIT));

impl Place {
    /// At this byte, the first of a page.
    pub fn at(byte: usize) -> Self {
        Self(byte / UNIT)
    }

    /// As the `stream` of a head says it; never 0.
    pub fn encode(self) -> u32 {
        u32::try_from(self.0 + 1).unwrap_or(u32::MAX)
    }

    /// What a `stream` says; `None` for 0.
    pub fn decode(stream: u32) -> Option<Self> {
        stream.checked_sub(1).map(|unit| Self(unit as usize))
    }

    /// In bytes, if `len` bytes from there are in a ring.
    pub fn within(self, len: usize) -> Option<usize> {
        let byte = self.0.checked_mul(UNIT)?;
        (byte.checked_add(len)? <= SLOT * SLOTS).then_some(byte)
    }
}

/// The proxy's side.
#[derive(Debug)]
pub struct Ring {
    memory: OwnedFd,
    freed: EventFd,
    mapping: Mapping,
}

impl Ring {
    /// A new one.
    pub fn new() -> io::Result<Self> {
        let memory = event::memfd(c"crtool-ring", libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&memory, i64::try_from(SLOT * SLOTS).unwrap_or(i64::MAX))?;
        event::add_seals(memory.as_fd(), SEALS)?;
        let freed =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE)?;
        let mapping = Mapping::shared(memory.as_fd(), 0, SLOT * SLOTS, Access::Read, None)?;
        Ok(Self { memory, freed, mapping })
    }

    /// What the dump gets: the memory, and what is counted up.
    pub fn ends(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.memory.try_clone()?, self.freed.as_fd().try_clone_to_owned()?])
    }

    /// The payload of a frame is with the connection.
    pub fn free(&self) {
        // It fails only when somebody has counted it up to 2^64: the dump itself, which then waits in vain.
        let _ = self.freed.write(1);
    }

    /// A copy of what is at `from`; whoever asks has checked the place.
    pub fn read(&self, from: usize, into: &mut [u8]) -> io::Result<()> {
        Ok(self.mapping.read(from, into)?)
    }

    /// Sends `head` and `len` bytes of the ring to a socket, as far as it takes them.
    pub fn send(&self, socket: BorrowedFd<'_>, head: &[u8], from: usize, len: usize) -> io::Result<usize> {
        Ok(mapping::send(socket, head, &self.mapping, from, len)?)
    }
}

/// What keeps the length as it is; nothing can be added to them.
const SEALS: u32 = (libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL).cast_unsigned();

/// Whether a memfd that came as a ring is one: of the right length for good.
pub fn is_ring(memory: BorrowedFd<'_>) -> bool {
    let length =
        nix::sys::stat::fstat(memory).is_ok_and(|stat| usize::try_from(stat.st_size) == Ok(SLOT * SLOTS));
    length && event::seals(memory).is_ok_and(|seals| seals & SEALS == SEALS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let place = Place::at(3 * UNIT);
        assert_eq!(Place::decode(place.encode()), Some(place));
        assert_eq!((place.encode(), Place::decode(0)), (4, None));
        let last = Place::at(SLOT * SLOTS - UNIT);
        assert_eq!(last.within(UNIT), Some(SLOT * SLOTS - UNIT));
        assert_eq!(last.within(UNIT + 1), None);
        assert_eq!(Place::decode(u32::MAX).unwrap().within(1), None);
    }

    #[test]
    fn what_is_written_is_sent_and_counted() {
        use crate::sys::mapping::Slot;
        use std::io::Read;
        let ring = Ring::new().unwrap();
        let [memory, freed] = ring.ends().unwrap();
        assert!(is_ring(memory.as_fd()));
        assert!(nix::unistd::ftruncate(&memory, 0).is_err());
        let mut slots = Slot::map(memory.as_fd(), SLOTS, SLOT).unwrap();
        let slot = &mut slots[2];
        slot.bytes_mut()[..5].copy_from_slice(b"pages");
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(ring.send(ours.as_fd(), b"head", slot.offset(), 5).unwrap(), 9);
        let mut got = [0; 9];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"headpages");
        assert!(ring.send(ours.as_fd(), b"", SLOT * SLOTS, 1).is_err());
        let count = |fd: &OwnedFd| {
            let mut count = [0; 8];
            nix::unistd::read(fd, &mut count).map(|_| u64::from_ne_bytes(count))
        };
        assert!(count(&freed).is_err());
        ring.free();
        ring.free();
        assert_eq!([count(&freed), count(&freed)], [Ok(1), Ok(1)]);
    }

    #[test]
    fn another_file_is_no_ring() {
        let plain = event::memfd(c"x", libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&plain, (SLOT * SLOTS) as i64).unwrap();
        assert!(!is_ring(plain.as_fd()));
    }
}
