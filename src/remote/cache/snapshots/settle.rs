//! What follows from an event: the table in [`handover`](crate::remote::handover) decides, and this carries it out.
//!
//! The new state is entered, which lists show and the service manager keeps; the source is told; the journal has it, for
//! a source that ends its tree last; what is replaced goes; and the memory of what has ended is freed, unless others build on
//! it. Why something happens is for the modules that say so.

use super::{Snapshots, in_doubt};
use crate::remote::cache::images::Images;
use crate::remote::cache::ledger::What;
use crate::remote::cache::snapshot::word;
use crate::remote::handover::{Event, Held, Next, Say};
use crate::remote::journal::Reached;
use crate::remote::pb::{self, FailCode, snapshot_info::State};
use crate::remote::{Failure, wire, wire::Kind};

impl Snapshots {
    /// Something happens to a snapshot, and `why`, for people. What the table makes of it.
    pub(super) fn happen(&mut self, id: u64, event: Event, why: &str) -> Option<Held> {
        self.happen_as(id, event, &Failure::new(FailCode::FailAborted, why))
    }

    /// The same, with what those hear who ask for the snapshot if it has ended by that.
    pub(super) fn happen_as(&mut self, id: u64, event: Event, why: &Failure) -> Option<Held> {
        let (before, after) = self.enter(id, event, why)?;
        let has_begun = |state| after.state == state && before.state != state;
        if has_begun(State::Restored) {
            warn(self.note(id, Reached::Running));
        } else if event == Event::Undone && before.started {
            warn(self.note(id, Reached::Fell));
        }
        if has_begun(State::InDoubt)
            && let Some(snapshot) = self.table.get(id)
        {
            tracing::warn!("{}", in_doubt(snapshot).text);
        }
        if after.confirmed && !before.confirmed {
            self.replace(id);
        }
        if before.is_live() && !after.is_live() {
            self.end(id, after.state);
        }
        Some(after)
    }

    /// Enters what the table says, and tells the source.
    fn enter(&mut self, id: u64, event: Event, why: &Failure) -> Option<(Held, Held)> {
        let snapshot = self.table.get_mut(id)?;
        let before = snapshot.held();
        let Next { held, say } = before.after(event);
        (snapshot.confirmed, snapshot.started) = (held.confirmed, held.started);
        if matches!(event, Event::Undone | Event::Vanished) || !held.is_live() {
            snapshot.reader = None;
        }
        if before.state != State::Armed || held.state != State::Armed {
            snapshot.alone = None;
        }
        if held.state != before.state {
            snapshot.enter(held.state, &why.text);
            snapshot.code = why.code;
        }
        if held != before {
            self.changes += 1;
            snapshot.note();
        }
        let (pid, bytes) = (snapshot.restored_pid, snapshot.images.as_ref().map_or(0, Images::size));
        let text = why.text.clone();
        match say {
            None => {}
            Some(Say::Prepared) => self.tell(id, Kind::Prepared, &pb::Prepared { bytes }),
            Some(Say::Armed) => self.tell(id, Kind::Armed, &pb::Armed { pid }),
            Some(Say::Restored) => self.tell(id, Kind::Restored, &pb::Restored { ok: true, pid, text }),
            Some(Say::Ended) => self.tell(id, Kind::Restored, &pb::Restored { ok: false, pid: 0, text }),
            Some(Say::Fell) => self.tell(id, Kind::Fell, &pb::Fell { text }),
            Some(Say::Failed) => self.tell(id, Kind::Failed, &pb::Failed::from(why.clone())),
        }
        Some((before, held))
    }

    pub(super) fn tell<M: prost::Message>(&mut self, id: u64, kind: Kind, message: &M) {
        if let Some(owner) = self.table.get(id).and_then(|s| s.owner) {
            self.letters.push((owner, wire::frame(kind, owner.stream, 0, message)));
        }
    }

    /// What comes of it goes to nobody.
    pub(super) fn forget_owner(&mut self, id: u64) {
        if let Some(snapshot) = self.table.get_mut(id) {
            snapshot.owner = None;
        }
    }

    /// Writes down how far a tree has come that its source ends last.
    pub(super) fn note(&self, id: u64, reached: Reached) -> Result<(), Failure> {
        let Some(snapshot) = self.table.get(id).filter(|s| s.begin.run_first) else { return Ok(()) };
        let Some(journal) = &self.journal else { return Ok(()) };
        journal.note(snapshot.begin.id, reached, snapshot.restored_pid, &snapshot.origin).map_err(|e| {
            let text = format!("snapshot {}: the journal of the cache: {e}", snapshot.begin.name);
            Failure::new(FailCode::FailInternal, text)
        })
    }

    /// It can be restored: what had its name before goes, or will when its restore is over.
    fn replace(&mut self, id: u64) {
        let Some(name) = self.table.get(id).map(|s| s.begin.name.clone()) else { return };
        let older: Vec<u64> = self.live(&name).map(|(old, _)| old).filter(|old| *old < id).collect();
        for old in older {
            let Some(snapshot) = self.table.get_mut(old) else { continue };
            snapshot.replaced = true;
            if matches!(snapshot.state, State::Ready | State::InDoubt) {
                self.drop_replaced(old);
            }
        }
        tracing::info!("snapshot {name} is ready to be restored");
    }

    pub(super) fn drop_replaced(&mut self, id: u64) {
        let text = "replaced by a newer snapshot of that name";
        self.happen_as(id, Event::Dropped, &Failure::new(FailCode::FailReplaced, text));
    }

    /// It cannot be used; the source hears why.
    pub(crate) fn fail(&mut self, id: u64, failure: Failure) {
        if !self.has_turn(id) {
            tracing::warn!("a snapshot was refused: {failure}");
        }
        self.happen_as(id, Event::Spoiled, &failure);
    }

    /// It has come to an end: what it takes is freed, unless others need it.
    fn end(&mut self, id: u64, state: State) {
        let Some(snapshot) = self.table.get_mut(id) else { return };
        if !snapshot.has_turn() {
            return self.forget_offer(id);
        }
        let (name, text) = (&snapshot.begin.name, &snapshot.text);
        if state == State::Failed {
            snapshot.owner = None;
            tracing::error!("snapshot {name} is lost to the cache: {text}");
        } else {
            tracing::info!("snapshot {name} has ended: {}: {text}", word(state));
        }
        self.free(id, state == State::Restored);
        self.trim();
    }

    /// Frees the images of one that has ended and that no other needs, and its parents' as far as they were
    /// there for it alone.
    pub(super) fn free(&mut self, id: u64, mut restored: bool) {
        let mut next = Some(id);
        while let Some(id) = next.take() {
            let Some(snapshot) = self.table.get(id).filter(|s| s.children == 0) else { return };
            if snapshot.is_live() {
                // The tree went on from it to the child that runs now.
                if !(restored && snapshot.state == State::Ready && snapshot.survives) {
                    return;
                }
                self.forget_owner(id);
                let why = Failure::new(FailCode::FailAborted, "a snapshot that builds on it was restored");
                self.enter(id, Event::Dropped, &why);
            }
            let Some(snapshot) = self.table.get_mut(id) else { return };
            let reserved = snapshot.reserved();
            if let Some(images) = snapshot.images.take() {
                (snapshot.size, snapshot.count) = (images.size(), images.count());
                self.ledger.change(&snapshot.origin, What::Memory, reserved, 0);
                self.ledger.remove(&snapshot.origin, What::Snapshots);
                self.ledger.add(&snapshot.origin, What::Records);
                if let (Some(kept), Some(keeper)) = (snapshot.kept.take(), &mut self.keeper) {
                    keeper.forget(&kept);
                }
                self.ended.push_back(id);
                self.consumed.remove(&id);
                self.changes += 1;
            }
            restored |= snapshot.state == State::Restored;
            next = snapshot.parent.take();
            if let Some(parent) = next.and_then(|parent| self.table.get_mut(parent)) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }

    /// Forgets the oldest records; of a source that has more than its share, its own.
    fn trim(&mut self) {
        while self.ledger.used(What::Records) > self.ledger.most(What::Records) {
            let of = |id: &u64| self.table.get(*id).map(|s| s.origin.clone());
            let greedy = self.ended.back().and_then(of).filter(|of| self.ledger.is_over(of, What::Records));
            let at =
                greedy.and_then(|greedy| self.ended.iter().position(|id| of(id).as_ref() == Some(&greedy)));
            let Some(oldest) = self.ended.remove(at.unwrap_or(0)) else { return };
            self.forget(oldest);
        }
    }

    pub(super) fn forget(&mut self, id: u64) {
        if let Some(snapshot) = self.table.remove(id) {
            self.ledger.remove(&snapshot.origin, What::Records);
        }
    }
}

fn warn(noted: Result<(), Failure>) {
    if let Err(failure) = noted {
        tracing::error!("{failure}");
    }
}
