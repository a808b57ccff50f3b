//! Memory through which a dump gives the proxy the bytes of pages, instead of through the pipe.
//!
//! The pipe costs a page of the kernel's for every page of the process, with its accounting and its part in a list
//! of fragments down to the network card. In the ring a dump reads pages straight out of the process into memory
//! that the proxy sends from.
//!
//! The ring is a memfd that the proxy makes for one snapshot, of [`SLOTS`] slots of [`SLOT`] bytes. Frames keep
//! their order because their heads still go through the pipe; that of a `Data` frame says in its `stream`, which is 0
//! otherwise, where in the ring its payload lies: [`Place`]. For each such frame whose payload is with the connection
//! the proxy writes one byte into a second pipe, in the order of the heads; a dump that remembers the order knows which
//! slots are free again.
//!
//! The dump is not trusted with more than its own snapshot. The memfd is sealed against getting shorter, and the
//! payload is only read by the kernel: what cannot be had (a hole in it, and no memory left) is an error and not a
//! signal. A payload that changes under way has a wrong checksum for the cache. Bytes that the dump does not read are
//! not waited for; an eventfd would not do, as the two sides would share O_NONBLOCK. What a dump trusts the proxy with,
//! it does anyway.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use crate::sys::mapping::{Access, Mapping};
use crate::sys::{event, mapping, pipe};

/// Bytes of a slot. A proxy and a dump that do not agree do without a ring.
pub const SLOT: usize = 256 << 10;
/// Slots of a ring. Each thread of a dump holds one, and some are on their way: more than that only leave the
/// processor's cache.
pub const SLOTS: usize = 16;
/// Places are counted in these.
const UNIT: usize = 4096;

// A frame may hold a whole slot, and a slot all that a thread of a dump reads at once.
const _: () = assert!(SLOT <= super::wire::MAX_DATA as usize && SLOT.is_multiple_of(UNIT));
const _: () = assert!(crate::pages::copy::CHUNK <= SLOT);

/// Where in a ring a payload begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(usize);

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
    memory: File,
    mapping: Mapping,
    freed: OwnedFd,
}

impl Ring {
    /// A new one, and what the dump gets: the memory, and the pipe that tells what is free.
    pub fn new() -> io::Result<(Self, [OwnedFd; 2])> {
        let memory = event::memfd(c"crtool-ring", libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&memory, i64::try_from(SLOT * SLOTS).unwrap_or(i64::MAX))?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        event::add_seals(memory.as_fd(), seals.cast_unsigned())?;
        let mapping = Mapping::shared(memory.as_fd(), 0, SLOT * SLOTS, Access::Read, None)?;
        let (tells, freed) = pipe::pipe2(libc::O_CLOEXEC | libc::O_NONBLOCK)?;
        let theirs = [memory.try_clone()?, tells];
        Ok((Self { memory: memory.into(), mapping, freed }, theirs))
    }

    /// The payload of a frame is with the connection.
    pub fn free(&self) {
        // There is room for all bytes that a dump can be told before it reads; what goes beyond is its own loss.
        let _ = nix::unistd::write(&self.freed, &[0]);
    }

    /// A copy of what is at `from`; whoever asks has checked the place.
    pub fn read(&self, from: usize, into: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(into, from as u64)
    }

    /// Sends `head` and `len` bytes of the ring to a socket, as far as it takes them. EFAULT when the memory cannot be
    /// had; then [`read`](Self::read) still can.
    pub fn send(&self, socket: BorrowedFd<'_>, head: &[u8], from: usize, len: usize) -> io::Result<usize> {
        Ok(mapping::send(socket, head, &self.mapping, from, len)?)
    }
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
    fn what_is_written_is_sent_and_told() {
        use std::io::Read;

        use crate::sys::mapping::Slot;

        let (ring, [memory, tells]) = Ring::new().unwrap();
        assert!(nix::unistd::ftruncate(&memory, 0).is_err());
        let mut slots = Slot::map(memory, SLOTS, SLOT).unwrap();
        let slot = &mut slots[2];
        slot.bytes_mut()[..5].copy_from_slice(b"pages");
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(ring.send(ours.as_fd(), b"head", slot.offset(), 5).unwrap(), 9);
        let mut got = [0; 9];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"headpages");
        assert!(ring.send(ours.as_fd(), b"", SLOT * SLOTS, 1).is_err());
        let mut copy = [0; 5];
        ring.read(slot.offset(), &mut copy).unwrap();
        assert_eq!(&copy, b"pages");
        assert!(ring.read(SLOT * SLOTS - 1, &mut copy).is_err());
        let told = || nix::unistd::read(&tells, &mut [0; 9]);
        assert!(told().is_err());
        ring.free();
        ring.free();
        assert_eq!(told(), Ok(2));
    }

    #[test]
    fn a_dump_that_does_not_read_is_not_waited_for() {
        let (ring, [_memory, tells]) = Ring::new().unwrap();
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty());
        nix::fcntl::fcntl(&tells, flags).unwrap();
        for _ in 0..100_000 {
            ring.free();
        }
        drop(tells);
        ring.free();
    }

    #[test]
    fn memory_of_another_kind_is_not_mapped() {
        use crate::sys::mapping::Slot;
        let open = event::memfd(c"x", libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&open, (SLOT * SLOTS) as i64).unwrap();
        assert!(Slot::map(open, SLOTS, SLOT).is_err());
        let (_ring, [memory, _]) = Ring::new().unwrap();
        assert!(Slot::map(memory, SLOTS + 1, SLOT).is_err());
    }
}
