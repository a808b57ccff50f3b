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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;
    use crate::remote::ring;

    fn rings() -> (ring::Ring, Ring) {
        let far = ring::Ring::new().unwrap();
        let [memory, count] = far.ends().unwrap();
        let near = Ring::new(&memory, count).unwrap();
        (far, near)
    }

    #[test]
    fn all_slots_are_free_once() {
        let (_far, near) = rings();
        let slots: Vec<Slot> = std::iter::from_fn(|| near.take().unwrap()).collect();
        let mut at: Vec<usize> = slots.iter().map(Slot::offset).collect();
        at.sort_unstable();
        assert_eq!(at, (0..SLOTS).map(|slot| slot * SLOT).collect::<Vec<_>>());
    }

    #[test]
    fn a_slot_is_free_with_its_last_frame() {
        let (far, near) = rings();
        let mut slots: Vec<Slot> = std::iter::from_fn(|| near.take().unwrap()).collect();
        let (three, one, none) = (slots.remove(0), slots.remove(0), slots.remove(0));
        let at = [three.offset(), one.offset(), none.offset()];
        near.sent(three, 3).unwrap();
        near.sent(one, 1).unwrap();
        assert!(near.take().unwrap().is_none());
        near.sent(none, 0).unwrap();
        let next = || near.take().unwrap().map(|slot| slot.offset());
        assert_eq!((next(), next()), (Some(at[2]), None));
        far.free();
        far.free();
        assert_eq!(next(), None);
        far.free();
        assert_eq!((next(), next()), (Some(at[0]), None));
        far.free();
        assert_eq!((next(), next()), (Some(at[1]), None));
        far.free();
        assert_eq!(near.take().unwrap_err().code, FailCode::FailProtocol);
    }

    #[test]
    fn nobody_waits_while_there_is_a_slot() {
        const THREADS: usize = 6;
        const ROUNDS: usize = 3000;
        let (far, near) = rings();
        let over = AtomicBool::new(false);
        let used = Mutex::new(vec![false; SLOTS]);
        // Frames whose heads are "in the pipe".
        let pipe = Mutex::new(VecDeque::new());
        let work = |seed: usize| {
            for round in 0..ROUNDS {
                let slot = loop {
                    if let Some(slot) = near.take().unwrap() {
                        break slot;
                    }
                    let mut fds = [PollFd::new(near.fd(), PollFlags::POLLIN)];
                    assert!(poll(&mut fds, 40_000u16).unwrap() > 0, "a slot is waited for in vain");
                };
                let number = slot.offset() / SLOT;
                assert!(!std::mem::replace(&mut used.lock().unwrap()[number], true), "two have it");
                let frames = (seed + round * 7) % 4;
                let mut pipe = pipe.lock().unwrap();
                if frames == 0 {
                    used.lock().unwrap()[number] = false;
                }
                near.sent(slot, frames).unwrap();
                pipe.extend((0..frames).map(|frame| (frame + 1 == frames).then_some(number)));
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) || !pipe.lock().unwrap().is_empty() {
                    let Some(last) = pipe.lock().unwrap().pop_front() else {
                        std::thread::yield_now();
                        continue;
                    };
                    if let Some(slot) = last {
                        used.lock().unwrap()[slot] = false;
                    }
                    far.free();
                }
            });
            let work = &work;
            let threads: Vec<_> = (0..THREADS).map(|seed| scope.spawn(move || work(seed))).collect();
            for thread in threads {
                thread.join().unwrap();
            }
            over.store(true, Ordering::Release);
        });
    }
}
