//! What a dump needs of its way to the cache, whichever it is.

use std::fmt::Debug;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::super::{
    Failure,
    pb::{self, FailCode},
};
use crate::sys::mapping::Slot;

/// What became of a tree after `Go`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It runs there as this process.
    Runs(i32),
    /// It does not run there and is not going to, and why.
    Fell(String),
}

/// What the destination says to an offer: it waits, and so many are before it.
pub(super) fn waits(told: &mut Option<u32>, place: u32, at: &str) {
    match told.replace(place) {
        // The tree runs on, and it may take long.
        None => tracing::warn!("waiting for its turn at {at}: {place} before it; the tree runs on"),
        Some(before) if before != place => tracing::info!("waiting for its turn at {at}: {place} before it"),
        Some(_) => {}
    }
}

/// What it would not do without, and may yet find.
pub(super) fn lacking(lacks: &[String]) {
    for lack in lacks {
        tracing::warn!("at the destination now: {lack}");
    }
}

/// One snapshot's way to the cache.
pub(super) trait Link: Send + Sync + Debug {
    /// What frames go under.
    fn stream(&self) -> u32;

    /// What the other side understands, as in `Hello`.
    fn features(&self) -> u64;

    /// The journal that the cache keeps; 0 if it keeps none.
    fn journal(&self) -> u64;

    /// Whether the cache starts restores by itself.
    fn restores(&self) -> bool;

    /// Sends whole frames, in one piece.
    fn send(&self, frames: &mut [IoSlice<'_>]) -> Result<(), Failure>;

    /// Memory that the other side can read, if this way has such; one that is free is waited for.
    fn room(&self) -> Result<Option<Slot>, Failure> {
        Ok(None)
    }

    /// As `send`, for frames of which the payloads of `placed`, in their order, lie in `room` and are not sent.
    fn send_placed(&self, _frames: &mut [IoSlice<'_>], _room: Slot, _placed: usize) -> Result<(), Failure> {
        Err(Failure::new(FailCode::FailInternal, "this way to the cache has no room of its own"))
    }

    /// Waits for the answer to a commit.
    fn prepared(&self) -> Result<pb::Prepared, Failure>;

    /// Shows what is decided about the tree to whoever outlives this process.
    fn guard(&self, decision: BorrowedFd<'_>) -> Result<(), Failure>;

    /// Some time after `prepared`: whether the cache still has it, as far as can be known.
    fn recheck(&self) -> Result<(), Failure>;

    /// The last word: the snapshot may be restored.
    fn confirm(&self, survives: bool) -> Result<(), Failure>;

    /// After `confirm`: waits until the cache is known to have that word. At once where `confirm` has waited itself.
    fn taken(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// The other last word: the snapshot is to be forgotten. What goes wrong here is found out there.
    fn abort(&self, reason: &str);

    /// With *run first*: waits until the restored tree is complete there, and stopped.
    fn armed(&self, until: Option<Instant>) -> Result<pb::Armed, Failure>;

    /// After [`Self::armed`]: it may run there. Whether it does is asked with [`Self::fate`], also if this fails.
    fn go(&self) -> Result<(), Failure>;

    /// After [`Self::go`]: waits for what became of it, `patience` at most. An error says that this is not known yet: the
    /// question may be asked again.
    fn fate(&self, patience: Duration) -> Result<Fate, Failure>;

    /// Waits until the cache says what became of the snapshot.
    fn restored(&self, patience: Duration) -> Result<pb::Restored, Failure>;
}
