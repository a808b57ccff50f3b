//! What begins is an offer first: its tree runs, and no image comes before its source was told that there is room.
//!
//! Offers get their turn in the order in which they came, so many at once as the operator allows; memory is kept for one
//! from its turn on. One that stands still for a time-out lets those behind it go on, and one that stands still for much longer
//! is given up. Whether this host has what a tree needs is looked at in [`needs`](crate::remote::cache::needs).

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use super::{LABEL, Snapshots, label};
use crate::remote::cache::ledger::{HERE, Lack, Origin, What};
use crate::remote::cache::needs::{Looked, ToLook};
use crate::remote::cache::restorer::Wanted;
use crate::remote::cache::snapshot::{Owner, SNAPSHOT_COST, Snapshot, Turn, word};
use crate::remote::pb::{self, FailCode, snapshot_info::State};
use crate::remote::{Failure, name, wire::Kind};

/// What has to come of a snapshot in one lease, in bytes: a name and memory are not kept for less. A link of 100 kbit/s brings
/// that in little more than a second.
const LEAST: u64 = 16 << 10;
/// Most options of a restore that a source may ask for.
const OPTIONS: usize = 16;
/// What sources hear once the cache is told to end.
pub(super) const CLOSING: &str = "the cache is told to end, and takes nothing any more";
/// So many times the time-out may a snapshot that arrives stand still; its turn it has only for one.
const LEASE: u32 = 6;

/// What has not had its turn, and what has it.
#[derive(Debug)]
pub(super) struct Offers {
    /// Those that have not had their turn, in order.
    pub(super) queue: VecDeque<u64>,
    /// How many are before the first of them, as it was told; none if it is not that queue any more.
    told: Option<u32>,
    /// So many may arrive at once.
    at_once: usize,
    /// Those whose needs are to be looked at.
    to_look: Vec<ToLook>,
    /// Those that arrive, and some that did.
    pub(super) arriving: BTreeSet<u64>,
}

impl Default for Offers {
    fn default() -> Self {
        let (queue, arriving) = (VecDeque::new(), BTreeSet::new());
        Self { queue, told: None, at_once: usize::MAX, to_look: Vec::new(), arriving }
    }
}

fn not_taken(name: &str, code: FailCode, lack: &Lack) -> Failure {
    Failure::new(code, format!("snapshot {name} is not taken: {lack}"))
}

impl Snapshots {
    /// From now on no more than so many arrive at once; others wait.
    pub(crate) fn set_at_once(&mut self, at_once: usize) {
        self.offers.at_once = at_once;
    }

    /// A snapshot begins.
    pub(crate) fn begin(
        &mut self,
        owner: Owner,
        origin: &Origin,
        mut begin: pb::SnapshotBegin,
    ) -> Result<u64, Failure> {
        if self.closing {
            return Err(Failure::new(FailCode::FailBusy, CLOSING));
        }
        name::check_snapshot(&begin.name)?;
        (begin.comm, begin.host) = (label(&begin.comm), label(&begin.host));
        if begin.options.len() > OPTIONS || begin.options.iter().any(|option| option.len() > LABEL) {
            let text = format!("snapshot {}: too many options of a restore", begin.name);
            return Err(Failure::new(FailCode::FailProtocol, text));
        }
        self.may_have_name(origin, &begin.name)?;
        if self.has_seen(begin.id) {
            let text = format!("snapshot {}: it has been here already, and none comes twice", begin.name);
            return Err(Failure::new(FailCode::FailExists, text));
        }
        let parent = self.parent_of(origin, &begin)?;
        if self.max().is_none() {
            begin.expected_bytes = 0;
        }
        self.admit(origin, &begin)?;
        let (needs, restored) = (begin.needs.take(), self.restores() && begin.run_first);
        let turn = if needs.is_some() { Turn::Looked } else { Turn::Waits(None) };
        let new = Snapshot::new(begin, origin.clone());
        let id = self.insert(Snapshot { owner: Some(owner), parent, turn, ..new });
        self.offers.to_look.extend(needs.map(|needs| ToLook { id, needs, restored }));
        let now = Instant::now();
        if &**origin == HERE {
            self.give_turn(id, now);
        } else {
            self.offers.queue.push_back(id);
            self.offers.told = None;
            self.advance(now);
        }
        Ok(id)
    }

    /// Whether a new snapshot of `origin` may have that name.
    fn may_have_name(&self, origin: &Origin, name: &str) -> Result<(), Failure> {
        for (_, old) in self.live(name) {
            if old.origin != *origin {
                let text = format!(
                    "the cache has a snapshot {name} of {}, and only that source can replace it; use another name (-D), or \
                     have it dropped (image-cache drop)",
                    old.origin
                );
                return Err(Failure::new(FailCode::FailExists, text));
            }
            let advice = match old.state {
                State::Ready | State::InDoubt if old.survives => continue,
                State::Ready => "restore it, drop it (image-cache drop), or use another name (-D)",
                State::InDoubt if old.started => "see whether its tree has run here (image-cache status)",
                State::InDoubt => {
                    "see whether its tree runs at the source: if so image-cache drop, if not image-cache release"
                }
                _ => "wait for it, or use another name (-D)",
            };
            let pb::SnapshotBegin { pid, comm, host, .. } = &old.begin;
            let text = format!(
                "the cache has a snapshot {name} of task {pid} ({comm}) at {host} already: {}; {advice}",
                word(old.state),
            );
            return Err(Failure::new(FailCode::FailExists, text));
        }
        Ok(())
    }

    /// The snapshot that one builds on. What others build on cannot be dropped.
    fn parent_of(&self, origin: &Origin, begin: &pb::SnapshotBegin) -> Result<Option<u64>, Failure> {
        let pb::SnapshotBegin { name, parent, .. } = begin;
        if parent.is_empty() {
            return Ok(None);
        }
        name::check_snapshot(parent)?;
        let usable = |s: &Snapshot| s.state == State::Ready && (s.origin == *origin || **origin == *HERE);
        let found = self.live(parent).find(|(_, s)| usable(s)).map(|(id, _)| id);
        found.map(Some).ok_or_else(|| {
            let text = format!(
                "snapshot {name}: its parent {parent} is not in the cache; make a dump without a parent"
            );
            Failure::new(FailCode::FailParent, text)
        })
    }

    /// Whether one more may wait for its turn: not if it never could have one.
    fn admit(&mut self, origin: &Origin, begin: &pb::SnapshotBegin) -> Result<(), Failure> {
        let refuse = |code| move |lack| not_taken(&begin.name, code, &lack);
        self.ledger.room(origin, What::Snapshots, 1).map_err(refuse(FailCode::FailBusy))?;
        let wanted = SNAPSHOT_COST.saturating_add(begin.expected_bytes);
        self.ledger.could_ever(origin, What::Memory, wanted).map_err(refuse(FailCode::FailMemory))?;
        self.room_after_a_look(origin, SNAPSHOT_COST).map_err(refuse(FailCode::FailMemory))
    }

    /// Whether a snapshot with this number has come before, as far as is remembered: one that is sent again by somebody who
    /// recorded it would run a second time.
    fn has_seen(&self, drawn: u64) -> bool {
        let noted = || self.journal.as_ref().is_some_and(|journal| journal.knows(drawn));
        drawn != 0 && (self.table.of_dump(drawn).next().is_some() || noted())
    }

    /// Offers whose needs are to be looked at, once.
    pub(crate) fn take_to_look(&mut self) -> Vec<ToLook> {
        std::mem::take(&mut self.offers.to_look)
    }

    /// What an offer needs has been looked at.
    pub(crate) fn looked(&mut self, id: u64, looked: Looked) {
        let Some(snapshot) = self.table.get_mut(id).filter(|s| s.turn == Turn::Looked) else { return };
        match looked {
            Looked::Lacks(text) => {
                let text = format!("snapshot {} is not taken: {text}", snapshot.begin.name);
                self.fail(id, Failure::new(FailCode::FailLacks, text));
            }
            Looked::May(lacks) => {
                (snapshot.lacks, snapshot.turn) = (lacks, Turn::Waits(None));
                self.offers.told = None;
            }
        }
    }

    /// Whether images of it may come.
    pub(crate) fn has_turn(&self, id: u64) -> bool {
        self.table.get(id).is_some_and(Snapshot::has_turn)
    }

    /// Whether a snapshot needs this host and its network for itself: while it arrives, and while its source stands still
    /// until a restore that this cache has started lets it run. The next one would take the processors from that.
    fn is_busy(&self, snapshot: &Snapshot) -> bool {
        let handed_over = self.restores() && snapshot.begin.run_first;
        match snapshot.state {
            State::Receiving => true,
            State::Prepared | State::Armed | State::Starting => handed_over,
            _ => false,
        }
    }

    /// Those that have their turn: they are busy, and do not stand still.
    fn at_work(&self, now: Instant) -> impl Iterator<Item = &Snapshot> {
        let works =
            move |s: &&Snapshot| self.is_busy(s) && &*s.origin != HERE && now < s.moved + self.timeout;
        self.offers.arriving.iter().filter_map(|id| self.table.get(*id)).filter(works)
    }

    /// Gives offers their turn, and tells the others how many are before them. When the next turn may be over without
    /// anything being said.
    fn advance(&mut self, now: Instant) -> Option<Instant> {
        let waits = |s: &Self, id: u64| s.table.get(id).is_some_and(|s| matches!(s.turn, Turn::Waits(_)));
        while !self.offers.queue.is_empty() && self.at_work(now).count() < self.offers.at_once {
            // What is still being looked at holds up nobody.
            let Some(at) = self.offers.queue.iter().position(|id| waits(self, *id)) else { break };
            if let Some(id) = self.offers.queue.remove(at) {
                self.offers.told = None;
                self.give_turn(id, now);
            }
        }
        if self.offers.queue.is_empty() {
            return None;
        }
        let before = u32::try_from(self.at_work(now).count()).unwrap_or(u32::MAX);
        if self.offers.told.replace(before) != Some(before) {
            for (place, id) in (before..).zip(self.offers.queue.clone()) {
                let Some(snapshot) = self.table.get_mut(id) else { continue };
                if matches!(snapshot.turn, Turn::Waits(told) if told != Some(place)) {
                    snapshot.turn = Turn::Waits(Some(place));
                    snapshot.text = format!("waits for its turn, {place} before it (--at-once)");
                    self.tell(id, Kind::Queue, &pb::Queue { place, ..pb::Queue::default() });
                }
            }
        }
        self.at_work(now).map(|s| s.moved + self.timeout).min()
    }

    /// It may come, if there is room for all that it announces.
    fn give_turn(&mut self, id: u64, now: Instant) {
        let Some(snapshot) = self.table.get(id) else { return };
        let (origin, begin) = (snapshot.origin.clone(), snapshot.begin.clone());
        let pb::SnapshotBegin { name, pid, comm, host, expected_bytes, run_first, .. } = &begin;
        if let Err(lack) = self.room_after_a_look(&origin, *expected_bytes) {
            return self.fail(id, not_taken(name, FailCode::FailMemory, &lack));
        }
        let lacks = self.counted(id, |snapshot| {
            (snapshot.turn, snapshot.began, snapshot.moved) = (Turn::Given, now, now);
            snapshot.text.clear();
            std::mem::take(&mut snapshot.lacks)
        });
        tracing::info!("snapshot {name} of task {pid} ({comm}) at {host} begins to arrive");
        tracing::debug!("it comes from {origin}, {expected_bytes} bytes are expected");
        self.offers.arriving.insert(id);
        self.changes += 1;
        self.tell(id, Kind::Room, &pb::Room { lacks: lacks.unwrap_or_default() });
        if let (true, Some(wanted)) = (run_first, &mut self.wanted) {
            wanted.push(Wanted { id, drawn: begin.id, name: begin.name, options: begin.options });
        }
    }

    /// An offer that comes to nothing leaves nothing: whoever waits for the name waits on.
    pub(super) fn forget_offer(&mut self, id: u64) {
        self.offers.queue.retain(|waits| *waits != id);
        self.offers.told = None;
        self.free(id, false);
        self.ended.retain(|ended| *ended != id);
        self.forget(id);
    }

    /// Gives up what has stood still for too long: it keeps memory from others. Others get their turn before. When the next
    /// one is due.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Instant> {
        let lease = self.timeout * LEASE;
        let mut next: Option<Instant> = None;
        for id in self.offers.arriving.clone() {
            let Some(snapshot) = self.table.get(id).filter(|s| self.is_busy(s)) else {
                self.offers.arriving.remove(&id);
                continue;
            };
            let until = snapshot.moved + lease;
            if snapshot.state != State::Receiving {
            } else if now < until {
                next = Some(next.map_or(until, |next| next.min(until)));
            } else {
                let (came, lease) = (snapshot.came, lease.as_secs_f32());
                let text = format!(
                    "only {came} bytes of it came in {lease} s ({LEASE} times --timeout of the cache), {LEAST} are the least"
                );
                self.fail(id, Failure::new(FailCode::FailTimeout, text));
            }
        }
        self.advance(now).into_iter().chain(next).min()
    }

    /// So many bytes have come of frames with its images.
    pub(crate) fn came(&mut self, id: u64, bytes: u64) {
        let Some(snapshot) = self.table.get_mut(id) else { return };
        snapshot.came += bytes;
        if snapshot.came >= LEAST {
            (snapshot.moved, snapshot.came) = (Instant::now(), 0);
        }
    }
}
