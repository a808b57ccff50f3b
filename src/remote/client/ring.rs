//! A dump's side of the [ring](crate::remote::ring): which slots are free, and which frames lie in the others.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::super::ring::{SLOT, SLOTS, is_ring};
use super::super::{Failure, pb::FailCode};
use crate::sys::mapping::Slot;

/// One snapshot's ring. The eventfd is a semaphore, so that every thread that waits for a slot is woken while there
/// is one: it counts frames that the proxy is done with, and slots that are given back here.
#[derive(Debug)]
pub(super) struct Ring {
    count: OwnedFd,
    slots: Mutex<Slots>,
}

#[derive(Debug)]
struct Slots {
    /// Never used, or given back without a frame. They go first: with none of them left, what has been counted
    /// beyond them are frames.
    spare: Vec<Slot>,
    /// A frame each, in the order of their heads in the pipe; the last one of a slot has it.
    sent: VecDeque<Option<Slot>>,
}

impl Ring {
    /// What came from the proxy.
    pub(super) fn new(memory: &OwnedFd, count: OwnedFd) -> Result<Self, Failure> {
        if !is_ring(memory.as_fd()) {
            return Err(Failure::new(FailCode::FailProtocol, "what image-proxy sent as a ring is none"));
        }
        let failed = |e| Failure::new(FailCode::FailInternal, format!("map the ring of image-proxy: {e}"));
        let spare = Slot::map(memory.as_fd(), SLOTS, SLOT).map_err(failed)?;
        let ring = Self { count, slots: Mutex::new(Slots { spare, sent: VecDeque::new() }) };
        ring.count_up(SLOTS as u64)?;
        Ok(ring)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count_up(&self, by: u64) -> Result<(), Failure> {
        nix::unistd::write(&self.count, &by.to_ne_bytes()).map(drop).map_err(broken)
    }

    /// Readable while slots are free.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.count.as_fd()
    }

    /// A free slot, if there is one now.
    pub(super) fn take(&self) -> Result<Option<Slot>, Failure> {
        let mut slots = self.slots();
        loop {
            match nix::unistd::read(&self.count, &mut [0; 8]) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(broken(e)),
            }
            if let Some(slot) = slots.spare.pop() {
                return Ok(Some(slot));
            }
            match slots.sent.pop_front() {
                Some(Some(slot)) => return Ok(Some(slot)),
                Some(None) => {}
                None => {
                    let text = "image-proxy frees more of the ring than was used";
                    return Err(Failure::new(FailCode::FailProtocol, text));
                }
            }
        }
    }

    /// The heads of `frames` frames with their payload in `slot` go into the pipe next.
    pub(super) fn sent(&self, slot: Slot, frames: usize) -> Result<(), Failure> {
        let mut slots = self.slots();
        let Some(others) = frames.checked_sub(1) else {
            slots.spare.push(slot);
            return self.count_up(1);
        };
        slots.sent.extend(std::iter::repeat_with(|| None).take(others));
        slots.sent.push_back(Some(slot));
        Ok(())
    }
}

fn broken(e: Errno) -> Failure {
    Failure::new(FailCode::FailLost, format!("ring of image-proxy: {e}"))
}
