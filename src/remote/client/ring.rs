//! A dump's side of the [ring](crate::remote::ring): which slots are free, and which frames lie in the others.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::super::ring::{SLOT, SLOTS};
use super::super::{Failure, pb::FailCode};
use crate::sys::mapping::Slot;

/// One snapshot's ring. Each thread that waits for a slot is woken while there is one: both descriptors stay readable
/// until all that they count is taken.
#[derive(Debug)]
pub(super) struct Ring {
    /// A byte for each frame that the proxy is done with.
    told: OwnedFd,
    /// Counts `spare`; a semaphore.
    spares: EventFd,
    slots: Mutex<Slots>,
}

#[derive(Debug)]
struct Slots {
    /// Never used, or given back without a frame.
    spare: Vec<Slot>,
    /// A frame each, in the order of their heads in the pipe; the last one of a slot has it.
    sent: VecDeque<Option<Slot>>,
    /// When the proxy was last done with a frame.
    moved: Instant,
}

/// What asking for a slot gives.
#[derive(Debug)]
pub(super) enum Taken {
    /// One.
    Slot(Slot),
    /// None now; when the proxy was last done with a frame.
    None(Instant),
    /// The proxy has closed the ring.
    Closed,
}

impl Ring {
    /// What came from the proxy.
    pub(super) fn new(memory: OwnedFd, told: OwnedFd) -> nix::Result<Self> {
        fcntl(&told, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let spare = Slot::map(memory, SLOTS, SLOT)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        let spares = EventFd::from_value_and_flags(SLOTS as u32, flags)?;
        let slots = Slots { spare, sent: VecDeque::new(), moved: Instant::now() };
        Ok(Self { told, spares, slots: Mutex::new(slots) })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of these at least one is readable while slots are free.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.told.as_fd(), self.spares.as_fd()]
    }

    /// A free slot, if there is one now.
    pub(super) fn take(&self) -> Result<Taken, Failure> {
        let mut slots = self.slots();
        loop {
            if self.spares.read().is_ok()
                && let Some(slot) = slots.spare.pop()
            {
                return Ok(Taken::Slot(slot));
            }
            match nix::unistd::read(&self.told, &mut [0]) {
                Ok(0) => return Ok(Taken::Closed),
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(Taken::None(slots.moved)),
                Err(Errno::EINTR) => continue,
                Err(e) => {
                    return Err(Failure::new(FailCode::FailLost, format!("ring of image-proxy: {e}")));
                }
            }
            slots.moved = Instant::now();
            match slots.sent.pop_front() {
                Some(Some(slot)) => return Ok(Taken::Slot(slot)),
                Some(None) => {}
                None => {
                    let text = "image-proxy frees more of the ring than was used";
                    return Err(Failure::new(FailCode::FailProtocol, text));
                }
            }
        }
    }

    /// The heads of `frames` frames with their payload in `slot` go into the pipe next.
    pub(super) fn sent(&self, slot: Slot, frames: usize) {
        let mut slots = self.slots();
        match frames.checked_sub(1) {
            None => {
                slots.spare.push(slot);
                // It counts to 16 at most.
                let _ = self.spares.write(1);
            }
            Some(others) => {
                slots.sent.extend(std::iter::repeat_with(|| None).take(others));
                slots.sent.push_back(Some(slot));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;
    use crate::remote::ring;

    fn rings() -> (ring::Ring, Ring) {
        let (far, [memory, told]) = ring::Ring::new().unwrap();
        (far, Ring::new(memory, told).unwrap())
    }

    fn take(ring: &Ring) -> Option<Slot> {
        match ring.take().unwrap() {
            Taken::Slot(slot) => Some(slot),
            Taken::None(_) => None,
            Taken::Closed => panic!("closed"),
        }
    }

    #[test]
    fn all_slots_are_free_once() {
        let (_far, near) = rings();
        let slots: Vec<Slot> = std::iter::from_fn(|| take(&near)).collect();
        let mut at: Vec<usize> = slots.iter().map(Slot::offset).collect();
        at.sort_unstable();
        assert_eq!(at, (0..SLOTS).map(|slot| slot * SLOT).collect::<Vec<_>>());
    }

    #[test]
    fn a_slot_is_free_with_its_last_frame() {
        let (far, near) = rings();
        let mut slots: Vec<Slot> = std::iter::from_fn(|| take(&near)).collect();
        let (three, one, none) = (slots.remove(0), slots.remove(0), slots.remove(0));
        let at = [three.offset(), one.offset(), none.offset()];
        near.sent(three, 3);
        near.sent(one, 1);
        assert!(take(&near).is_none());
        near.sent(none, 0);
        let next = || take(&near).map(|slot| slot.offset());
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
    fn a_ring_that_is_closed() {
        let (far, near) = rings();
        while take(&near).is_some() {}
        drop(far);
        assert!(matches!(near.take(), Ok(Taken::Closed)));
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
                    if let Some(slot) = take(&near) {
                        break slot;
                    }
                    let mut fds = near.fds().map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                    assert!(poll(&mut fds, 40_000u16).unwrap() > 0, "a slot is waited for in vain");
                };
                let number = slot.offset() / SLOT;
                assert!(!std::mem::replace(&mut used.lock().unwrap()[number], true), "two have it");
                let frames = (seed + round * 7) % 4;
                let mut pipe = pipe.lock().unwrap();
                if frames == 0 {
                    used.lock().unwrap()[number] = false;
                }
                near.sent(slot, frames);
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
