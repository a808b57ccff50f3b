//! The hand-over of a tree from one host to another, as one table: what each message, loss and end makes of it.
//!
//! There are two ways.
//!
//! - *Confirm first* (`dump --remote`): the source ends its tree when the destination has all of it, and says `Confirm`. From
//!   then on the destination owns it.
//! - *Run first* (`migrate`): the destination builds the tree and says `Armed`, the source says `Go`, the destination lets it
//!   run and says `Restored`, and only then the source ends its own. From `Go` on the source does not run its tree before
//!   it has heard `Fell`.
//!
//! ```text
//!              Commit           Confirm         Get            starting         ran
//!  RECEIVING ──────────▶ PREPARED ─────▶ READY ────▶ RESTORING ───────▶ STARTING ──▶ RESTORED
//!                            │ starting                                  ▲  (run first only)
//!                            └─────────▶ ARMED ──────── Go ──────────────┘
//!  IN_DOUBT: all of it is here, and nobody has said that the tree does not run elsewhere.
//! ```
//!
//! What holds, whatever is lost, doubled, late, or dies (the tests try all of it): the tree runs on one side at most, while
//! it runs on none, somebody has all of it, and a restore that has it never waits for what does not come. This module decides and does nothing: it knows no sockets, no images, no clocks. Both
//! daemons, the dump and `migrate` ask it.

use super::pb::snapshot_info::State;

/// What a destination knows of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Held {
    /// How far it is.
    pub state: State,
    /// The source ends its tree after the restored one runs.
    pub run_first: bool,
    /// A restore has it.
    pub taken: bool,
    /// The connection to the source is there.
    pub linked: bool,
    /// The tree is known not to run at the source any more, or to be meant to.
    pub confirmed: bool,
    /// A restore was told to let the tree run, and what became of that is not known.
    pub started: bool,
    /// Not all of it is there any more, because a restore has freed what it had read.
    pub freed: bool,
}

/// What happens at a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Event {
    /// All images have come.
    Complete,
    /// The source: its tree is gone, or meant to run on.
    Confirm,
    /// The source: let it run; it does not run its own meanwhile.
    Go,
    /// The source: its tree runs on there.
    Abort,
    /// The connection to the source is gone.
    Lost,
    /// And does not come back.
    Abandoned,
    /// A restore wants it.
    Take,
    /// That restore has the tree complete and stopped, and asks whether to let it run.
    Starting,
    /// The tree was seen to run here.
    Ran,
    /// The restore is over, and its tree certainly does not run.
    Undone,
    /// The restore is over, and nobody knows whether its tree runs.
    Vanished,
    /// The operator: it does not run anywhere.
    Release,
    /// What came cannot be used, or does not come, or has no room.
    Spoiled,
    /// It is elsewhere, or another one has its place, or the operator does not want it.
    Dropped,
    /// The destination was started anew, and has it from before. No connection outlives that.
    Restarted,
}

/// What the source is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Say {
    /// All of it is here.
    Prepared,
    /// The restored tree waits for `Go`.
    Armed,
    /// It runs here.
    Restored,
    /// It does not run here and is not going to.
    Fell,
    /// Nothing will come of it here.
    Failed,
    /// Nobody is going to restore it here, though it was confirmed.
    Ended,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// What is known from now on.
    pub held: Held,
    /// Told to the source.
    pub say: Option<Say>,
}

impl Held {
    /// Whether something can still become of it.
    pub fn is_live(&self) -> bool {
        !matches!(self.state, State::Restored | State::Failed | State::Dropped | State::Unknown)
    }

    /// Whether a restore may let the tree run.
    pub fn may_run(&self) -> bool {
        self.state == State::Starting
    }

    fn to(self, state: State) -> Next {
        Next { held: Self { state, ..self }, say: None }
    }

    fn saying(self, state: State, say: Say) -> Next {
        Next { held: Self { state, ..self }, say: Some(say) }
    }

    /// What becomes of it.
    pub fn after(self, event: Event) -> Next {
        let next = self.of_whole(event);
        // There is nothing to be restored a second time.
        if self.freed && matches!(next.held.state, State::Ready | State::InDoubt) {
            return next.held.saying(State::Failed, Say::Ended);
        }
        next
    }

    /// The same if nothing of it was freed.
    fn of_whole(mut self, event: Event) -> Next {
        use State::{
            Armed, Dropped, Failed, InDoubt, Prepared, Ready, Receiving, Restored, Restoring, Starting,
            Unknown,
        };
        let state = self.state;
        match event {
            Event::Take => self.taken = true,
            Event::Lost | Event::Abandoned => self.linked = false,
            Event::Undone | Event::Vanished => self.taken = false,
            Event::Restarted => (self.taken, self.linked) = (false, false),
            _ => {}
        }
        match (event, state) {
            (Event::Complete, Receiving) => self.saying(Prepared, Say::Prepared),
            (Event::Confirm, Prepared | InDoubt) if !self.started => {
                self.confirmed = true;
                self.to(if self.taken { Restoring } else { Ready })
            }
            // The tree at the source is gone meanwhile.
            (Event::Confirm, Armed) => {
                (self.confirmed, self.started) = (true, true);
                self.to(Starting)
            }
            (Event::Go, Armed) => {
                self.started = true;
                self.to(Starting)
            }
            (Event::Go, Prepared) => self.saying(state, Say::Fell),
            (Event::Go, InDoubt) if !self.started => self.saying(state, Say::Fell),
            (Event::Go, Failed | Dropped | Unknown) => self.saying(state, Say::Fell),
            (Event::Go, Restored) => self.saying(state, Say::Restored),
            (Event::Abort, Receiving | Prepared | Armed | Ready | Restoring | InDoubt) => self.to(Failed),
            (Event::Lost, Receiving) => self.to(Failed),
            (Event::Lost, Prepared) => self.to(InDoubt),
            (Event::Abandoned, Armed) => self.to(InDoubt),
            (Event::Take, Ready) => self.to(Restoring),
            (Event::Starting, Prepared) if self.run_first => self.saying(Armed, Say::Armed),
            (Event::Starting, Restoring) => {
                self.started = true;
                self.to(Starting)
            }
            (Event::Ran, Restoring | Starting) => self.saying(Restored, Say::Restored),
            (Event::Ran, InDoubt) if self.started => self.saying(Restored, Say::Restored),
            (Event::Undone, Restoring) => self.to(Ready),
            (Event::Undone, Starting) => {
                self.started = false;
                // The source has it still, if it lives; if not, what is here is all there is.
                if self.confirmed { self.to(Ready) } else { self.saying(InDoubt, Say::Fell) }
            }
            (Event::Undone | Event::Vanished, Receiving | Prepared) if self.run_first => {
                self.saying(Failed, Say::Failed)
            }
            (Event::Undone | Event::Vanished, Armed) if self.linked => self.saying(Failed, Say::Failed),
            (Event::Undone | Event::Vanished, Armed) => self.to(InDoubt),
            (Event::Vanished, Restoring) => self.to(Ready),
            (Event::Vanished, Starting) => self.to(InDoubt),
            (Event::Release, InDoubt) => {
                (self.confirmed, self.started) = (true, false);
                // A restore that has read it as it arrived goes on; it waits for nothing else.
                self.to(if self.taken { Restoring } else { Ready })
            }
            (Event::Spoiled, _) if self.is_live() => self.saying(Failed, Say::Failed),
            (Event::Dropped, _) if self.is_live() => self.saying(Dropped, Say::Ended),
            (Event::Restarted, Receiving) => self.to(Failed),
            (Event::Restarted, Prepared | Armed) => self.to(InDoubt),
            (Event::Restarted, Restoring | Starting) => {
                self.started = true;
                self.to(InDoubt)
            }
            _ => self.to(state),
        }
    }
}

/// How far a source is that hands its tree over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The tree is frozen, images are on their way or there; it goes on here if anything fails.
    Sending,
    /// `Go` was said: the tree goes on here only after `Fell`.
    Going,
    /// The tree goes on here.
    Back,
    /// It is ended here.
    Over,
}

/// What happens at a source that hands over with *run first*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Heard {
    /// The restored tree waits.
    Armed,
    /// It runs.
    Restored,
    /// It does not, and is not going to: that was said, or nothing will come of it there, or a cache that keeps the same journal
    /// has never let it run.
    Fell,
    /// The connection is gone, or the time is up, or the user has had enough.
    GivenUp,
    /// The operator says that it runs there.
    Kill,
    /// The operator says that it does not.
    Thaw,
}

impl Source {
    /// What becomes of it. The caller says `Go` when this becomes [`Source::Going`], kills the tree at [`Source::Over`], and
    /// lets it go on and says `Abort` at [`Source::Back`].
    #[must_use]
    pub fn after(self, heard: Heard) -> Self {
        match (self, heard) {
            (Self::Sending, Heard::Armed) => Self::Going,
            (Self::Sending, Heard::Fell | Heard::GivenUp) => Self::Back,
            (Self::Going, Heard::Restored | Heard::Kill) => Self::Over,
            (Self::Going, Heard::Fell | Heard::Thaw) => Self::Back,
            _ => self,
        }
    }
}

#[cfg(test)]
mod tests;
