//! All snapshots of a cache: their names, their lives, the memory they take.
//!
//! What becomes of each is decided by the table in [`handover`](super::super::handover); here that is carried out. No sockets are read or
//! written; what a source has to be told waits in [`Snapshots::take_letters`].
//!
//! What begins is an offer first: its tree runs, and no image comes before the source was told that there is room. Offers get
//! their turn in the order in which they came, so many at once as the operator allows; memory is kept for one from its
//! turn on. One that stands still does not keep those behind it waiting for long.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::super::handover::{Event, Held, Say};
use super::super::journal::{Journal, Reached};
use super::super::pb::snapshot_info::State;
use super::super::pb::{self, FailCode, resume};
use super::super::wire::{self, Kind};
use super::super::{Failure, name};
use super::keep::{self, Keeper, Record};
use super::ledger::{HERE, Lack, Ledger, Limits, Origin, What};
use super::needs::{Looked, ToLook};
use super::restorer::Wanted;
use super::snapshot::{Found, IMAGE_COST, Images, Owner, Reader, Snapshot, Turn};
use super::table::Table;

/// Longest reason kept, in bytes.
const REASON: usize = 1000;
/// Longest name of a task or host kept, in bytes.
const LABEL: usize = 256;
/// What a snapshot takes beside its images.
pub(super) const SNAPSHOT_COST: u64 = 4096;
/// What has to come of a snapshot in one lease, in bytes: a name and memory are not kept for less. A link of 100 kbit/s brings
/// that in little more than a second.
const LEAST: u64 = 16 << 10;
/// Most options of a restore that a source may ask for.
const OPTIONS: usize = 16;
/// What sources hear once the cache is told to end.
const CLOSING: &str = "the cache is told to end, and takes nothing any more";
/// So many times the time-out may a snapshot that arrives stand still; its turn it has only for one.
const LEASE: u32 = 6;
/// How many other names a refusal tells.
const NAMES: usize = 8;

/// All snapshots.
#[derive(Debug)]
pub(super) struct Snapshots {
    snapshots: Table,
    last: u64,
    ledger: Ledger,
    /// Of the cache.
    timeout: Duration,
    /// Those that arrive, and some that did.
    arriving: BTreeSet<u64>,
    /// Offers that have not had their turn, in order.
    queue: VecDeque<u64>,
    /// How many are before the first of them, as it was told; none if it is not that queue any more.
    before_queue: Option<u32>,
    /// So many may arrive at once.
    at_once: usize,
    /// Offers whose needs are to be looked at.
    to_look: Vec<ToLook>,
    /// Those that have ended and whose images are freed, oldest first.
    ended: VecDeque<u64>,
    /// Those whose tree waits here and whose source is gone, and some that were such.
    alone: BTreeSet<u64>,
    /// Those whose images may become fewer without a word.
    consumed: BTreeSet<u64>,
    changes: u64,
    letters: Vec<(Owner, Vec<u8>)>,
    keeper: Option<Keeper>,
    closing: bool,
    /// Of what sources hand over that end their trees last.
    journal: Option<Journal>,
    /// The cache starts restores by itself: for those.
    restores: Option<Vec<Wanted>>,
}

/// A state, for people.
pub(super) fn word(state: State) -> &'static str {
    match state {
        State::Unknown => "unknown",
        State::Receiving => "arriving",
        State::Prepared => "complete, not yet confirmed",
        State::Ready => "ready",
        State::InDoubt => "in doubt",
        State::Restoring => "being restored",
        State::Starting => "starting",
        State::Restored => "restored",
        State::Failed => "failed",
        State::Dropped => "dropped",
        State::Armed => "restored, waits for the source",
    }
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// What somebody else calls a task or a host, fit for a line.
fn label(text: &str) -> String {
    let mut label: String = text.chars().filter(|c| !name::is_hidden(*c)).collect();
    if let Some((end, _)) = label.char_indices().find(|(at, c)| at + c.len_utf8() > LABEL) {
        label.truncate(end);
    }
    label
}

/// Why something was given up, fit for a line.
fn reason(text: &str) -> String {
    name::one_line(text, REASON)
}

impl Snapshots {
    /// An empty one, of a cache with this time-out.
    pub(super) fn new(limits: Limits, timeout: Duration) -> Self {
        Self {
            snapshots: Table::default(),
            last: 0,
            ledger: Ledger::new(limits),
            timeout,
            arriving: BTreeSet::new(),
            queue: VecDeque::new(),
            before_queue: None,
            at_once: usize::MAX,
            to_look: Vec::new(),
            ended: VecDeque::new(),
            alone: BTreeSet::new(),
            consumed: BTreeSet::new(),
            changes: 0,
            letters: Vec::new(),
            keeper: None,
            closing: false,
            journal: None,
            restores: None,
        }
    }

    /// From now on no more than so many arrive at once; others wait.
    pub(super) fn set_at_once(&mut self, at_once: usize) {
        self.at_once = at_once;
    }

    /// From now on what is let go is written down.
    pub(super) fn keep_journal(&mut self, journal: Journal) {
        self.journal = Some(journal);
    }

    /// From now on a restore is wanted for each snapshot whose source ends its tree last.
    pub(super) fn restore_all(&mut self) {
        self.restores = Some(Vec::new());
    }

    /// Whether that is so.
    pub(super) fn restores(&self) -> bool {
        self.restores.is_some()
    }

    /// What is wanted, once.
    pub(super) fn take_wanted(&mut self) -> Vec<Wanted> {
        self.restores.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// A restore that the cache has started is over without success: nothing comes of a snapshot that it has not taken.
    pub(super) fn restore_ended(&mut self, id: u64, why: &str) {
        let waits =
            |s: &&Snapshot| s.reader.is_none() && matches!(s.state, State::Receiving | State::Prepared);
        if self.snapshots.get(&id).filter(waits).is_some() {
            self.let_go(id, why);
        }
    }

    /// Which journal that is; 0 for none.
    pub(super) fn journal(&self) -> u64 {
        self.journal.as_ref().map_or(0, Journal::identity)
    }

    /// Writes down how far a tree has come that its source ends last.
    fn note(&self, id: u64, reached: Reached) -> Result<(), Failure> {
        let Some(snapshot) = self.snapshots.get(&id).filter(|s| s.begin.run_first) else { return Ok(()) };
        let Some(journal) = &self.journal else { return Ok(()) };
        journal.note(snapshot.begin.id, reached, snapshot.restored_pid, &snapshot.origin).map_err(|e| {
            let text = format!("snapshot {}: the journal of the cache: {e}", snapshot.begin.name);
            Failure::new(FailCode::FailInternal, text)
        })
    }

    /// What is used of everything that is counted.
    pub(super) fn ledger(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// Bytes of memory that all images take or have been promised.
    pub(super) fn used(&self) -> u64 {
        self.ledger.used(What::Memory)
    }

    /// The limit to that.
    pub(super) fn max(&self) -> Option<u64> {
        Some(self.ledger.most(What::Memory)).filter(|max| *max != u64::MAX)
    }

    /// Changes whenever somebody who waits may have got what they wait for.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// Frames for sources, in order.
    pub(super) fn take_letters(&mut self) -> Vec<(Owner, Vec<u8>)> {
        std::mem::take(&mut self.letters)
    }

    /// Those for one connection.
    pub(super) fn take_letters_to(&mut self, source: u64) -> Vec<u8> {
        let theirs = self.letters.extract_if(.., |(owner, _)| owner.source == source);
        theirs.flat_map(|(_, letter)| letter).collect()
    }

    /// One snapshot, also one that has ended.
    pub(super) fn get(&self, id: u64) -> Option<&Snapshot> {
        self.snapshots.get(&id)
    }

    /// All of them, oldest first.
    pub(super) fn all(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values()
    }

    fn live<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (u64, &'a Snapshot)> {
        self.snapshots.named(name).filter(|(_, s)| s.is_live())
    }

    /// The one a name stands for: what can be restored before what cannot be yet.
    fn named(&self, name: &str) -> Option<u64> {
        let rank = |state| match state {
            State::Ready => 0,
            State::Restoring | State::Armed | State::Starting => 1,
            State::InDoubt => 2,
            _ => 3,
        };
        self.live(name).min_by_key(|(_, s)| rank(s.state)).map(|(id, _)| id)
    }

    fn tell<M: prost::Message>(&mut self, id: u64, kind: Kind, message: &M) {
        if let Some(owner) = self.snapshots.get(&id).and_then(|s| s.owner) {
            self.letters.push((owner, wire::frame(kind, owner.stream, 0, message)));
        }
    }

    fn enter(&mut self, id: u64, state: State, text: impl Into<String>) {
        self.changes += 1;
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.state = state;
            snapshot.since = seconds();
            snapshot.text = text.into();
            snapshot.note();
        }
    }

    /// Lets the table decide what comes of an event, and carries that out; `why` is what there is to say. Ends are for the
    /// caller to carry out, since they free images.
    fn happen(&mut self, id: u64, event: Event, why: &str) -> Option<Held> {
        let snapshot = self.snapshots.get_mut(&id)?;
        let before = snapshot.held();
        let next = before.after(event);
        (snapshot.confirmed, snapshot.started) = (next.held.confirmed, next.held.started);
        if event == Event::Undone || event == Event::Vanished {
            snapshot.reader = None;
        }
        if snapshot.state != State::Armed || next.held.state != State::Armed {
            snapshot.alone = None;
        }
        let (pid, bytes) = (snapshot.restored_pid, snapshot.images.as_ref().map_or(0, Images::size));
        if next.held.is_live() && next.held != before {
            if next.held.state == before.state {
                self.changes += 1;
                if let Some(snapshot) = self.snapshots.get(&id) {
                    snapshot.note();
                }
            } else {
                self.enter(id, next.held.state, why);
            }
        }
        let text = why.to_owned();
        match next.say {
            None => {}
            Some(Say::Prepared) => self.tell(id, Kind::Prepared, &pb::Prepared { bytes }),
            Some(Say::Armed) => self.tell(id, Kind::Armed, &pb::Armed { pid }),
            Some(Say::Restored) => self.tell(id, Kind::Restored, &pb::Restored { ok: true, pid, text }),
            Some(Say::Fell) => self.tell(id, Kind::Fell, &pb::Fell { text }),
            Some(Say::Failed) => {
                let failed = pb::Failed { code: FailCode::FailAborted.into(), text };
                self.tell(id, Kind::Failed, &failed);
            }
        }
        Some(next.held)
    }

    /// Works on images and keeps count of the memory.
    fn on_images<T>(
        &mut self,
        id: u64,
        work: impl FnOnce(&mut Images) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let gone = || Failure::new(FailCode::FailInternal, "the images are gone");
        let snapshot = self.snapshots.get_mut(&id).ok_or_else(gone)?;
        let before = snapshot.reserved();
        let result = work(snapshot.images.as_mut().ok_or_else(gone)?);
        let after = snapshot.reserved();
        self.ledger.change(&snapshot.origin, What::Memory, before, after);
        result
    }

    // ---- What a source says.

    /// A snapshot begins.
    pub(super) fn begin(
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
        for (_, old) in self.live(&begin.name) {
            if old.origin != *origin {
                let text = format!(
                    "the cache has a snapshot {} of {}, and only that source can replace it; use another name (-D), or \
                     have it dropped (image-cache drop)",
                    begin.name, old.origin
                );
                return Err(Failure::new(FailCode::FailExists, text));
            }
            if matches!(old.state, State::Ready | State::InDoubt) && old.survives {
                continue;
            }
            let advice = match old.state {
                State::Ready => "restore it, drop it (image-cache drop), or use another name (-D)",
                State::InDoubt if old.started => "see whether its tree has run here (image-cache status)",
                State::InDoubt => {
                    "see whether its tree runs at the source: if so image-cache drop, if not image-cache release"
                }
                _ => "wait for it, or use another name (-D)",
            };
            let text = format!(
                "the cache has a snapshot {} of task {} ({}) at {} already: {}; {advice}",
                begin.name,
                old.begin.pid,
                old.begin.comm,
                old.begin.host,
                word(old.state),
            );
            return Err(Failure::new(FailCode::FailExists, text));
        }
        if self.has_seen(begin.id) {
            let text = format!("snapshot {}: it has been here already, and none comes twice", begin.name);
            return Err(Failure::new(FailCode::FailExists, text));
        }
        let mut parent = None;
        if !begin.parent.is_empty() {
            name::check_snapshot(&begin.parent)?;
            // What others build on cannot be dropped.
            let usable = |s: &Snapshot| s.state == State::Ready && (s.origin == *origin || **origin == *HERE);
            parent = self.live(&begin.parent).find(|(_, s)| usable(s)).map(|(id, _)| id);
            let Some(found) = parent.and_then(|id| self.snapshots.get_mut(&id)) else {
                let text = format!(
                    "snapshot {}: its parent {} is not in the cache; make a dump without a parent",
                    begin.name, begin.parent
                );
                return Err(Failure::new(FailCode::FailParent, text));
            };
            found.children += 1;
        }
        if self.max().is_none() {
            begin.expected_bytes = 0;
        }
        let needs = begin.needs.take();
        if let Err(failure) = self.admit(origin, &begin) {
            if let Some(found) = parent.and_then(|id| self.snapshots.get_mut(&id)) {
                found.children -= 1;
            }
            return Err(failure);
        }
        self.last += 1;
        let survives = begin.source_survives;
        let turn = if needs.is_some() { Turn::Looked } else { Turn::Waits(None) };
        if let Some(needs) = needs {
            self.to_look.push(ToLook { id: self.last, needs, restored: self.restores() && begin.run_first });
        }
        let snapshot = Snapshot {
            begin,
            turn,
            lacks: Vec::new(),
            state: State::Receiving,
            since: seconds(),
            began: Instant::now(),
            text: String::new(),
            code: FailCode::FailUnknown,
            images: Some(Images::default()),
            size: 0,
            count: 0,
            owner: Some(owner),
            reader: None,
            parent,
            children: 0,
            survives,
            confirmed: false,
            started: false,
            alone: None,
            freed: false,
            replaced: false,
            restored_pid: 0,
            origin: origin.clone(),
            moved: Instant::now(),
            came: 0,
            kept: None,
            saver: None,
            saved: String::new(),
        };
        self.ledger.add(origin, What::Snapshots);
        self.ledger.change(origin, What::Memory, 0, snapshot.reserved());
        self.snapshots.insert(self.last, snapshot);
        self.changes += 1;
        let (id, now) = (self.last, Instant::now());
        if &**origin == HERE {
            self.give_turn(id, now);
        } else {
            self.queue.push_back(id);
            self.before_queue = None;
            self.advance(now);
        }
        Ok(id)
    }

    /// Whether one more may wait for its turn: not if it never could have one.
    fn admit(&mut self, origin: &Origin, begin: &pb::SnapshotBegin) -> Result<(), Failure> {
        let refuse = |code| move |lack| not_taken(&begin.name, code, &lack);
        self.ledger.room(origin, What::Snapshots, 1).map_err(refuse(FailCode::FailBusy))?;
        let wanted = SNAPSHOT_COST.saturating_add(begin.expected_bytes);
        self.ledger.could_ever(origin, What::Memory, wanted).map_err(refuse(FailCode::FailMemory))?;
        self.room_after_a_look(origin, SNAPSHOT_COST).map_err(refuse(FailCode::FailMemory))
    }

    /// Offers whose needs are to be looked at, once.
    pub(super) fn take_to_look(&mut self) -> Vec<ToLook> {
        std::mem::take(&mut self.to_look)
    }

    /// What an offer needs has been looked at.
    pub(super) fn looked(&mut self, id: u64, looked: Looked) {
        let Some(snapshot) = self.snapshots.get_mut(&id).filter(|s| s.turn == Turn::Looked) else { return };
        match looked {
            Looked::Lacks(text) => {
                let text = format!("snapshot {} is not taken: {text}", snapshot.begin.name);
                self.fail(id, Failure::new(FailCode::FailLacks, text));
            }
            Looked::May(lacks) => {
                snapshot.lacks = lacks;
                snapshot.turn = Turn::Waits(None);
                self.before_queue = None;
            }
        }
    }

    /// Whether images of it may come.
    pub(super) fn has_turn(&self, id: u64) -> bool {
        self.snapshots.get(&id).is_some_and(|s| s.turn == Turn::Given)
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
        self.arriving.iter().filter_map(|id| self.snapshots.get(id)).filter(works)
    }

    /// Gives offers their turn, and tells the others how many are before them. When the next turn may be over without
    /// anything being said.
    fn advance(&mut self, now: Instant) -> Option<Instant> {
        let waits =
            |s: &Self, id: &u64| s.snapshots.get(id).is_some_and(|s| matches!(s.turn, Turn::Waits(_)));
        while !self.queue.is_empty() && self.at_work(now).count() < self.at_once {
            // What is still being looked at holds up nobody.
            let Some(at) = self.queue.iter().position(|id| waits(self, id)) else { break };
            if let Some(id) = self.queue.remove(at) {
                self.before_queue = None;
                self.give_turn(id, now);
            }
        }
        if self.queue.is_empty() {
            return None;
        }
        let before = u32::try_from(self.at_work(now).count()).unwrap_or(u32::MAX);
        if self.before_queue.replace(before) != Some(before) {
            for (place, id) in (before..).zip(self.queue.clone()) {
                let Some(snapshot) = self.snapshots.get_mut(&id) else { continue };
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
        let Some(snapshot) = self.snapshots.get(&id) else { return };
        let (origin, wanted) = (snapshot.origin.clone(), snapshot.begin.expected_bytes);
        let name = snapshot.begin.name.clone();
        if let Err(lack) = self.room_after_a_look(&origin, wanted) {
            return self.fail(id, not_taken(&name, FailCode::FailMemory, &lack));
        }
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
        let before = snapshot.reserved();
        snapshot.turn = Turn::Given;
        (snapshot.began, snapshot.moved) = (now, now);
        snapshot.text.clear();
        self.ledger.change(&origin, What::Memory, before, snapshot.reserved());
        let pb::SnapshotBegin { pid, comm, host, expected_bytes, .. } = &snapshot.begin;
        tracing::info!("snapshot {name} of task {pid} ({comm}) at {host} begins to arrive");
        tracing::debug!("it comes from {origin}, {expected_bytes} bytes are expected");
        if let (true, Some(wanted)) = (snapshot.begin.run_first, &mut self.restores) {
            wanted.push(Wanted {
                id,
                name,
                drawn: snapshot.begin.id,
                options: snapshot.begin.options.clone(),
            });
        }
        let room = pb::Room { lacks: std::mem::take(&mut snapshot.lacks) };
        self.arriving.insert(id);
        self.changes += 1;
        self.tell(id, Kind::Room, &room);
    }

    /// Whether a snapshot with this number has come before, as far as is remembered: one that is sent again by somebody who
    /// recorded it would run a second time.
    fn has_seen(&self, drawn: u64) -> bool {
        let noted = || self.journal.as_ref().is_some_and(|journal| journal.knows(drawn));
        drawn != 0 && (self.snapshots.of_dump(drawn).next().is_some() || noted())
    }

    /// An offer that comes to nothing leaves nothing: whoever waits for the name waits on.
    fn forget_offer(&mut self, id: u64) {
        self.queue.retain(|waits| *waits != id);
        self.before_queue = None;
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.state = State::Failed;
        }
        self.settle(id, false);
        self.ended.retain(|ended| *ended != id);
        if let Some(snapshot) = self.snapshots.remove(id) {
            self.ledger.remove(&snapshot.origin, What::Records);
        }
    }

    /// Whether so many bytes fit; restores that free what they have read do not say how much.
    fn room_after_a_look(&mut self, origin: &Origin, more: u64) -> Result<(), Lack> {
        match self.ledger.room(origin, What::Memory, more) {
            Err(_) if !self.consumed.is_empty() => {
                self.measure();
                self.ledger.room(origin, What::Memory, more)
            }
            room => room,
        }
    }

    /// Whether so many bytes more of a snapshot fit.
    fn room(&mut self, id: u64, cost: u64) -> Result<(), Failure> {
        let Some(snapshot) = self.snapshots.get(&id) else { return Ok(()) };
        let more = snapshot.reserved_with(cost) - snapshot.reserved();
        if more == 0 {
            return Ok(());
        }
        let origin = snapshot.origin.clone();
        self.room_after_a_look(&origin, more).map_err(|lack| {
            let (name, so_far) = match self.snapshots.get(&id) {
                Some(s) => (&s.begin.name[..], mib(s.charged())),
                None => ("", 0),
            };
            let text = format!("snapshot {name} does not fit: it has {so_far} MiB so far; {lack}");
            Failure::new(FailCode::FailMemory, text)
        })
    }

    /// Whether one more image fits.
    pub(super) fn room_for_image(&mut self, id: u64) -> Result<(), Failure> {
        self.room(id, IMAGE_COST)
    }

    /// Whether a frame of bytes or zeros fits.
    pub(super) fn room_for(&mut self, id: u64, image: u32, raw: u32, zeros: bool) -> Result<(), Failure> {
        match self.images(id) {
            Some(images) => {
                let cost = images.cost(image, raw, zeros)?;
                self.room(id, cost)
            }
            None => Ok(()),
        }
    }

    /// Gives up what has stood still for too long: it keeps memory from others. Others get their turn before. When the next
    /// one is due.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        let lease = self.timeout * LEASE;
        let mut next = None;
        for id in self.arriving.clone() {
            let Some(snapshot) = self.snapshots.get(&id).filter(|s| self.is_busy(s)) else {
                self.arriving.remove(&id);
                continue;
            };
            if snapshot.state != State::Receiving {
                continue;
            }
            let until = snapshot.moved + lease;
            if now >= until {
                let (came, lease) = (snapshot.came, lease.as_secs_f32());
                let text = format!(
                    "only {came} bytes of it came in {lease} s ({LEASE} times --timeout of the cache), {LEAST} are the least"
                );
                self.fail(id, Failure::new(FailCode::FailTimeout, text));
            } else if next.is_none_or(|next| until < next) {
                next = Some(until);
            }
        }
        self.advance(now).into_iter().chain(next).min()
    }

    /// So many bytes have come of frames with its images.
    pub(super) fn came(&mut self, id: u64, bytes: u64) {
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
        snapshot.came += bytes;
        if snapshot.came >= LEAST {
            (snapshot.moved, snapshot.came) = (Instant::now(), 0);
        }
    }

    /// Images of a snapshot that are still there.
    pub(super) fn images(&self, id: u64) -> Option<&Images> {
        self.snapshots.get(&id)?.images.as_ref()
    }

    /// An image begins.
    pub(super) fn image_begin(&mut self, id: u64, image: u32, begin: pb::ImageBegin) -> Result<(), Failure> {
        self.on_images(id, |images| images.begin(image, begin))
    }

    /// Bytes of an image.
    pub(super) fn append(&mut self, id: u64, image: u32, bytes: &[u8]) -> Result<(), Failure> {
        self.on_images(id, |images| images.append(image, bytes))
    }

    /// A frame of bytes has come whole.
    pub(super) fn appended(&mut self, id: u64, header: &wire::Header, crc: u32) -> Result<(), Failure> {
        self.on_images(id, |images| images.appended(header.image, header.raw, crc, header.crc))?;
        self.has_come(id, header.image);
        Ok(())
    }

    /// More of an image has come.
    fn has_come(&mut self, id: u64, image: u32) {
        if self.images(id).is_some_and(|images| images.has_awaited(image)) {
            self.changes += 1;
        }
    }

    /// Zeros of an image.
    pub(super) fn zeros(&mut self, id: u64, header: &wire::Header) -> Result<(), Failure> {
        self.on_images(id, |images| images.zeros(header.image, header.raw, header.crc))?;
        self.has_come(id, header.image);
        Ok(())
    }

    /// An image has ended.
    pub(super) fn image_end(&mut self, id: u64, image: u32, end: &pb::ImageEnd) -> Result<(), Failure> {
        self.on_images(id, |images| images.end(image, end))?;
        if self.snapshots.get(&id).is_some_and(|s| s.reader.is_some() || s.is_described()) {
            self.changes += 1;
        }
        Ok(())
    }

    /// All images have come: checks that and answers.
    pub(super) fn commit(&mut self, id: u64, commit: &pb::Commit) -> Result<(), Failure> {
        self.on_images(id, |images| images.check(commit))?;
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return Ok(()) };
        // What was promised and did not come is for others.
        let before = snapshot.reserved();
        snapshot.begin.expected_bytes = 0;
        self.ledger.change(&snapshot.origin, What::Memory, before, snapshot.reserved());
        let bytes = snapshot.images.as_ref().map_or(0, Images::size);
        let took = snapshot.began.elapsed().as_secs_f64();
        tracing::info!(
            "snapshot {} is complete: {} images, {bytes} bytes in {took:.3} s, {:.0} MB/s",
            snapshot.begin.name,
            commit.images.len(),
            bytes as f64 / took.max(1e-6) / 1e6,
        );
        self.keep(id);
        self.happen(id, Event::Complete, "");
        Ok(())
    }

    /// The source has let the tree go, or keeps it on purpose: the snapshot can be restored.
    pub(super) fn confirm(&mut self, id: u64, survives: bool) {
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
        snapshot.survives = survives;
        let reader = snapshot.reader.map_or_else(String::new, |reader| format!("by pid {}", reader.pid));
        self.confirmed(id, Event::Confirm, &reader);
    }

    /// The tree does not run at the source, by the word of that or of the operator.
    fn confirmed(&mut self, id: u64, event: Event, why: &str) {
        let before = self.snapshots.get(&id).is_some_and(|s| s.confirmed);
        let after = self.happen(id, event, why);
        if before || after.is_none_or(|held| !held.confirmed) {
            return;
        }
        let Some(name) = self.snapshots.get(&id).map(|s| s.begin.name.clone()) else { return };
        let older: Vec<(u64, State)> =
            self.live(&name).filter(|(old, _)| *old < id).map(|(old, s)| (old, s.state)).collect();
        for (old, state) in older {
            if let Some(old) = self.snapshots.get_mut(&old) {
                old.replaced = true;
            }
            if matches!(state, State::Ready | State::InDoubt) {
                self.end_replaced(old);
            }
        }
        tracing::info!("snapshot {name} is ready to be restored");
    }

    /// The source does not run its tree until it hears what became of it here: it may run.
    pub(super) fn go(&mut self, id: u64) {
        let Some(snapshot) = self.snapshots.get(&id) else { return };
        let text = snapshot.text.clone();
        if snapshot.state != State::Armed {
            self.happen(id, Event::Go, &text);
            return;
        }
        // Before anybody is told to let it go.
        match self.note(id, Reached::Going) {
            Ok(()) => drop(self.happen(id, Event::Go, "the tree is being let go")),
            Err(failure) => self.fail(id, failure),
        }
    }

    fn end_replaced(&mut self, id: u64) {
        let text = "replaced by a newer snapshot of that name";
        self.end(id, State::Dropped, Failure::new(FailCode::FailReplaced, text));
    }

    /// The source takes it back: its tree runs on there. That counts until the tree is let go here.
    pub(super) fn abort(&mut self, id: u64, why: &str) {
        let why = reason(why);
        let text = if why.is_empty() { "the source gave up".to_owned() } else { why };
        if self.is_offer(id) {
            return self.forget_offer(id);
        }
        if self.happen(id, Event::Abort, "").is_some_and(|held| held.state == State::Failed) {
            self.forget_owner(id);
            self.end(id, State::Failed, Failure::new(FailCode::FailAborted, text));
        }
    }

    /// What comes of it goes to nobody.
    fn forget_owner(&mut self, id: u64) {
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.owner = None;
        }
    }

    /// Whether it has not had its turn.
    fn is_offer(&self, id: u64) -> bool {
        self.snapshots.get(&id).is_some_and(|s| s.turn != Turn::Given)
    }

    /// It cannot be used; the source hears why.
    pub(super) fn fail(&mut self, id: u64, failure: Failure) {
        self.tell(id, Kind::Failed, &pb::Failed::from(failure.clone()));
        if self.is_offer(id) {
            tracing::warn!("a snapshot was refused: {failure}");
            return self.forget_offer(id);
        }
        self.forget_owner(id);
        self.end(id, State::Failed, failure);
    }

    /// A connection is gone, and `why`.
    pub(super) fn lost(&mut self, source: u64, why: &str) {
        for id in self.snapshots.forget_source(source) {
            let theirs = |s: &&Snapshot| s.owner.is_some_and(|owner| owner.source == source);
            if self.snapshots.get(&id).filter(theirs).is_none() {
                continue;
            }
            if self.is_offer(id) {
                self.forget_offer(id);
                continue;
            }
            self.forget_owner(id);
            let text = format!("the source vanished before it confirmed that its tree is gone: {why}");
            let before = self.snapshots.get(&id).map(|s| s.state);
            let after = self.happen(id, Event::Lost, &text).map(|held| held.state);
            match after {
                Some(State::Failed) if before != after => {
                    let text =
                        format!("the connection to the source was lost before all images had come: {why}");
                    self.end(id, State::Failed, Failure::new(FailCode::FailLost, text));
                }
                Some(State::InDoubt) if before != after => self.warn_of_doubt(id),
                Some(State::Armed) => {
                    if let Some(snapshot) = self.snapshots.get_mut(&id) {
                        snapshot.alone = Some(Instant::now());
                        self.alone.insert(id);
                        snapshot.text = format!("the connection to the source is gone: {why}");
                    }
                }
                _ => {}
            }
        }
    }

    fn warn(noted: Result<(), Failure>) {
        if let Err(failure) = noted {
            tracing::error!("{failure}");
        }
    }

    fn warn_of_doubt(&self, id: u64) {
        if let Some(snapshot) = self.snapshots.get(&id) {
            tracing::warn!("{}", in_doubt(snapshot).text);
        }
    }

    /// Gives up to wait for sources that are gone: their trees, which wait here, are not let go. When the next one is due.
    pub(super) fn abandon(&mut self, now: Instant, patience: Duration) -> Option<Instant> {
        let alone = |s: &Snapshot| s.alone.filter(|_| s.state == State::Armed).map(|since| since + patience);
        let mut next: Option<Instant> = None;
        for id in self.alone.clone() {
            match self.snapshots.get(&id).and_then(alone) {
                Some(until) if now < until => next = Some(next.map_or(until, |next| next.min(until))),
                Some(_) => {
                    let text = "the source vanished before it said that the restored tree may run";
                    self.happen(id, Event::Abandoned, text);
                    self.warn_of_doubt(id);
                }
                None => {
                    self.alone.remove(&id);
                }
            }
        }
        next
    }

    /// What became of a snapshot whose connection broke; the answer goes to `owner`, which is a connection of `origin`. Whoever
    /// has not brought it hears what they would hear if it were not here.
    pub(super) fn resume(&mut self, owner: Owner, origin: &Origin, resume: &pb::Resume) {
        let same = |s: &Snapshot| {
            let named = resume.id != 0 && s.begin.name == resume.name;
            if named && s.origin != *origin {
                let (name, whose) = (&s.begin.name, &s.origin);
                tracing::warn!(
                    "{origin} says what becomes of snapshot {name}, which {whose} has brought: refused"
                );
            }
            named && s.origin == *origin
        };
        let found =
            self.snapshots.of_dump(resume.id).rev().find(|(_, s)| same(s)).map(|(id, s)| (id, s.state));
        let refuse = |snapshots: &mut Self, failure: Failure| {
            let failed = pb::Failed::from(failure);
            snapshots.letters.push((owner, wire::frame(Kind::Failed, owner.stream, 0, &failed)));
        };
        let Some((id, state)) = found else {
            // What is here may still be let go by the word of its own source: nobody is told that it never was.
            let is_here = self.snapshots.of_dump(resume.id).next().is_some();
            if let (Some(resume::Verdict::Go(_)), false) = (&resume.verdict, is_here)
                && let Some(answer) = self.of_journal(origin, resume)
            {
                let frame = match answer {
                    Ok(restored) => wire::frame(Kind::Restored, owner.stream, 0, &restored),
                    Err(fell) => wire::frame(Kind::Fell, owner.stream, 0, &fell),
                };
                return self.letters.push((owner, frame));
            }
            let name = label(&resume.name);
            let text = format!("the cache knows no snapshot {name} of that dump that {origin} has brought");
            return refuse(self, Failure::new(FailCode::FailNotFound, text));
        };
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
        let Some(verdict) = &resume.verdict else {
            let text = format!("snapshot {} cannot be resumed: {}", snapshot.begin.name, word(state));
            return refuse(self, Failure::new(FailCode::FailProtocol, text));
        };
        match (state, verdict) {
            (State::Receiving, _) => {
                let text = format!("snapshot {} cannot be resumed: {}", snapshot.begin.name, word(state));
                return refuse(self, Failure::new(FailCode::FailProtocol, text));
            }
            (State::Failed, resume::Verdict::Confirm(_) | resume::Verdict::Abort(_)) => {
                let failure = snapshot.failure();
                return refuse(self, failure);
            }
            _ => (snapshot.owner, snapshot.alone) = (Some(owner), None),
        }
        self.snapshots.brought(owner.source, id);
        match verdict {
            resume::Verdict::Go(_) => return self.go(id),
            resume::Verdict::Abort(abort) => self.abort(id, &abort.reason),
            resume::Verdict::Confirm(confirm) => self.confirm(id, confirm.survives),
        }
        let Some(snapshot) = self.snapshots.get(&id) else { return };
        match snapshot.state {
            State::Restored | State::Dropped | State::Unknown => {
                let restored = pb::Restored {
                    ok: snapshot.state == State::Restored,
                    pid: snapshot.restored_pid,
                    text: snapshot.text.clone(),
                };
                self.tell(id, Kind::Restored, &restored);
            }
            State::Failed => refuse(self, Failure::new(FailCode::FailAborted, "the source gave up")),
            _ => {
                let bytes = self.images(id).map_or(0, Images::size);
                self.tell(id, Kind::Prepared, &pb::Prepared { bytes });
            }
        }
    }

    /// What an earlier cache has written down of a tree that its source waits for, if that says it all.
    fn of_journal(&self, origin: &str, resume: &pb::Resume) -> Option<Result<pb::Restored, pb::Fell>> {
        let journal = self.journal.as_ref()?;
        let fell = |text: &str| Some(Err(pb::Fell { text: text.to_owned() }));
        let ran = |pid: i32| {
            let text = format!("runs as pid {pid}, let go under an earlier cache");
            Some(Ok(pb::Restored { ok: true, pid, text }))
        };
        match journal.look_up(resume.id, origin) {
            None if resume.journal == journal.identity() && !journal.knows(resume.id) => {
                fell("the cache was started anew before the tree was let go there")
            }
            None => None,
            Some((Reached::Fell, _)) => fell("its restore failed there"),
            Some((Reached::Running, root)) => ran(root.pid),
            // Its restore was told to let it go. That writes down when it has; to look at the tree proves nothing, for what is
            // alive may be about to die, and what is dead may have run.
            Some((Reached::Going, _)) => None,
        }
    }

    // ---- How it ends.

    /// From now on complete snapshots are held by the service manager too.
    pub(super) fn keep_at(&mut self, keeper: Keeper) {
        self.keeper = Some(keeper);
    }

    /// Hands a complete snapshot to the service manager, if there is one that takes it.
    fn keep(&mut self, id: u64) {
        let (Some(keeper), Some(snapshot)) = (&mut self.keeper, self.snapshots.get_mut(&id)) else { return };
        let Some(images) = &snapshot.images else { return };
        let before = snapshot.reserved();
        match keeper.keep(&snapshot.record(id), &snapshot.kept_state(), images.record().1) {
            Ok(kept) => snapshot.kept = Some(kept),
            Err(e) => {
                let name = &snapshot.begin.name;
                tracing::warn!("snapshot {name} is not kept for the next start of this cache: {e}");
            }
        }
        self.ledger.change(&snapshot.origin, What::Memory, before, snapshot.reserved());
    }

    /// Takes what an earlier cache had. Nothing of it is refused: there is nobody else who has it.
    pub(super) fn adopt(&mut self, mut records: Vec<Record>) {
        records.sort_by_key(|record| record.snapshot.number);
        let needed: BTreeSet<u64> = records.iter().map(|record| record.snapshot.parent).collect();
        let mut numbers = HashMap::new();
        for Record { snapshot: old, state: held, images, kept, spilled } in records {
            let begin = old.begin.unwrap_or_default();
            let name = begin.name.clone();
            let state = match held.state() {
                State::Restoring | State::Starting if held.freed => {
                    tracing::error!(
                        "snapshot {name}: a restore had it, and freed what it had read, when the cache ended: nothing \
                         is left to be restored; see whether its tree runs here"
                    );
                    State::Unknown
                }
                State::Ready => State::Ready,
                State::Restored if needed.contains(&old.number) => State::Restored,
                State::Prepared | State::InDoubt | State::Restoring | State::Armed | State::Starting => {
                    State::InDoubt
                }
                _ => State::Unknown,
            };
            if state == State::Unknown {
                if let (Some(keeper), Some(kept)) = (&mut self.keeper, &kept) {
                    keeper.add(kept);
                    keeper.forget(kept);
                }
                continue;
            }
            let was_let_go = matches!(held.state(), State::Restoring | State::Starting);
            let text = match held.state() {
                State::Prepared => {
                    "the cache ended before the source confirmed that its tree is gone".to_owned()
                }
                State::Restoring | State::Starting => {
                    "the cache ended while a restore had it: its tree may run here".to_owned()
                }
                _ => held.text.clone(),
            };
            self.last += 1;
            let id = self.last;
            numbers.insert(old.number, id);
            let parent = numbers.get(&old.parent).copied();
            if let Some(parent) = parent.and_then(|parent| self.snapshots.get_mut(&parent)) {
                parent.children += 1;
            }
            let origin: Origin = old.origin.into();
            let snapshot = Snapshot {
                turn: Turn::Given,
                lacks: Vec::new(),
                begin,
                state,
                since: held.since,
                began: Instant::now(),
                text,
                code: FailCode::FailUnknown,
                images: Some(images),
                size: 0,
                count: 0,
                owner: None,
                reader: None,
                parent,
                children: 0,
                survives: held.survives,
                confirmed: held.confirmed,
                started: held.started || was_let_go,
                alone: None,
                freed: held.freed,
                replaced: held.replaced,
                restored_pid: held.restored_pid,
                origin: origin.clone(),
                moved: Instant::now(),
                came: 0,
                kept,
                saver: None,
                saved: held.saved,
            };
            tracing::info!("snapshot {name} of an earlier cache: {}", word(state));
            self.ledger.add(&origin, What::Snapshots);
            self.ledger.change(&origin, What::Memory, 0, snapshot.reserved());
            if let (Some(keeper), Some(kept)) = (&mut self.keeper, &snapshot.kept) {
                keeper.add(kept);
            }
            snapshot.note();
            self.snapshots.insert(id, snapshot);
            if self.snapshots.get(&id).is_some_and(|s| s.kept.is_none()) {
                self.keep(id);
            }
            if let Some(place) = spilled {
                keep::remove_spilled(&place);
            }
            if state == State::InDoubt {
                self.warn_of_doubt(id);
            }
        }
    }

    /// The cache is told to end: nothing begins any more, and what has not come whole fails, so that its tree runs on.
    pub(super) fn close(&mut self) {
        self.closing = true;
        let offers = std::mem::take(&mut self.queue);
        for id in std::mem::take(&mut self.arriving).into_iter().chain(offers) {
            if self.snapshots.get(&id).is_some_and(|s| s.state == State::Receiving) {
                self.fail(id, Failure::new(FailCode::FailBusy, CLOSING));
            }
        }
    }

    /// Whether it was told to end.
    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    /// How many snapshots an end would lose, or tear out of somebody's hands; `spilled`: not those that can be written to a
    /// disk.
    pub(super) fn at_risk(&self, spilled: bool) -> usize {
        let safe = |s: &Snapshot| {
            let elsewhere = s.survives && matches!(s.state, State::Ready | State::InDoubt);
            let held = s.kept.is_some() || spilled || elsewhere || !s.is_live();
            s.reader.is_none() && s.saver.is_none() && held
        };
        self.snapshots.values().filter(|s| s.images.is_some() && !safe(s)).count()
    }

    /// Writes all that the service manager does not hold below `dir`. How many could not be written.
    pub(super) fn spill(&mut self, dir: &Path) -> usize {
        let mut lost = 0;
        for id in self.snapshots.ids() {
            let Some(snapshot) = self.snapshots.get(&id) else { continue };
            let Some(images) = snapshot.images.as_ref().filter(|_| snapshot.kept.is_none()) else { continue };
            let name = snapshot.begin.name.clone();
            match keep::spill(dir, &snapshot.record(id), &snapshot.kept_state(), images) {
                Ok(()) => {
                    // Whoever brought it asks the next cache.
                    self.forget_owner(id);
                    let text = format!("written to {} for the next start", dir.display());
                    tracing::info!("snapshot {name}: {text}");
                    self.end(id, State::Dropped, Failure::new(FailCode::FailAborted, text));
                }
                Err(e) => {
                    tracing::error!("snapshot {name} cannot be spilled: {e}");
                    lost += 1;
                }
            }
        }
        lost
    }

    /// The cache ends. Says what goes with it.
    pub(super) fn part(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.settle();
        }
        for s in self.snapshots.values().filter(|s| s.is_live() && s.kept.is_none()) {
            let pb::SnapshotBegin { name, pid, comm, host, .. } = &s.begin;
            let line = format!("snapshot {name} of task {pid} ({comm}) at {host} ends with this cache");
            match s.state {
                State::Ready if !s.survives => {
                    tracing::error!("{line}: it was all there was of its tree");
                }
                State::InDoubt => {
                    tracing::error!("{line}: it was in doubt, and may be all there was of its tree")
                }
                state => tracing::warn!("{line}: {}", word(state)),
            }
        }
    }

    /// A snapshot has come to an end: what it takes is freed, unless others need it.
    fn end(&mut self, id: u64, state: State, why: Failure) {
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
        snapshot.code = why.code;
        snapshot.reader = None;
        let name = snapshot.begin.name.clone();
        if state == State::Failed {
            tracing::error!("snapshot {name} is lost to the cache: {}", why.text);
        } else {
            tracing::info!("snapshot {name} has ended: {}: {}", word(state), why.text);
        }
        self.enter(id, state, why.text);
        if state == State::Dropped {
            let text = self.snapshots.get(&id).map(|s| s.text.clone()).unwrap_or_default();
            self.tell(id, Kind::Restored, &pb::Restored { ok: false, pid: 0, text });
        }
        self.settle(id, state == State::Restored);
        self.trim();
    }

    /// Frees the images of one that has ended and that no other needs, and its parents' as far as they were
    /// there for it alone.
    fn settle(&mut self, id: u64, mut restored: bool) {
        let mut next = Some(id);
        while let Some(id) = next.take() {
            let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
            if snapshot.is_live() {
                // The tree went on from it to the child that runs now.
                if !(restored
                    && snapshot.state == State::Ready
                    && snapshot.survives
                    && snapshot.children == 0)
                {
                    return;
                }
                self.enter(id, State::Dropped, "a snapshot that builds on it was restored");
            }
            let Some(snapshot) = self.snapshots.get_mut(&id).filter(|s| s.children == 0) else { return };
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
            let parent = snapshot.parent.take();
            if let Some(parent) = parent.and_then(|parent| self.snapshots.get_mut(&parent)) {
                parent.children = parent.children.saturating_sub(1);
            }
            next = parent;
        }
    }

    /// Forgets the oldest records; of a source that has more than its share, its own.
    fn trim(&mut self) {
        while self.ledger.used(What::Records) > self.ledger.most(What::Records) {
            let of = |id: &u64| self.snapshots.get(id).map(|s| s.origin.clone());
            let greedy = self.ended.back().and_then(of).filter(|of| self.ledger.is_over(of, What::Records));
            let at =
                greedy.and_then(|greedy| self.ended.iter().position(|id| of(id).as_ref() == Some(&greedy)));
            let Some(oldest) = self.ended.remove(at.unwrap_or(0)) else { return };
            if let Some(snapshot) = self.snapshots.remove(oldest) {
                self.ledger.remove(&snapshot.origin, What::Records);
            }
        }
    }

    // ---- What a restore says.

    /// Gives a restore the snapshot that it wants. `None`: it is not there yet. `seen` remembers the one that is
    /// waited for, so that its end is told.
    pub(super) fn take(
        &mut self,
        wanted: &pb::Get,
        seen: &mut Option<u64>,
        reader: Reader,
    ) -> Result<Option<u64>, Failure> {
        let (name, early) = (wanted.name.as_str(), wanted.early);
        if let Some(ended) = seen.and_then(|id| self.snapshots.get(&id)).filter(|s| !s.is_live()) {
            return Err(ended.ended());
        }
        let id = match wanted.id {
            0 => self.named(name),
            drawn => self.live(name).find(|(_, s)| s.begin.id == drawn).map(|(id, _)| id),
        };
        let Some(id) = id else { return Ok(None) };
        let waited = seen.replace(id).is_some();
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return Ok(None) };
        if let Some(saver) = snapshot.saver {
            return Err(saving(name, saver));
        }
        if let Some(first) = snapshot.reader {
            let text = format!("snapshot {name} is being restored by another restore, pid {}", first.pid);
            return Err(Failure::new(FailCode::FailBusy, text));
        }
        match snapshot.state {
            State::Ready => {
                snapshot.reader = Some(reader);
                tracing::info!("snapshot {name} is being restored by pid {}", reader.pid);
                self.happen(id, Event::Take, &format!("by pid {}", reader.pid));
                Ok(Some(id))
            }
            // A source that ends its tree last waits for the restore.
            State::Receiving | State::Prepared
                if early && snapshot.parent.is_none() && snapshot.is_described()
                    || snapshot.begin.run_first && snapshot.state == State::Prepared =>
            {
                snapshot.reader = Some(reader);
                tracing::info!("snapshot {name} is read by pid {} as it arrives", reader.pid);
                Ok(Some(id))
            }
            // Whoever waits already goes on: the source may still come back.
            State::InDoubt if waited => Ok(None),
            State::InDoubt => Err(in_doubt(snapshot)),
            State::Starting => {
                let text =
                    format!("snapshot {name} was restored; what became of its tree is found out just now");
                Err(Failure::new(FailCode::FailBusy, text))
            }
            _ => Ok(None),
        }
    }

    /// Whether the restore that has a snapshot may go on as if it had got it only when it could be restored.
    pub(super) fn can_be_restored(&self, id: u64) -> Result<bool, Failure> {
        match self.snapshots.get(&id) {
            Some(snapshot) if !snapshot.is_live() => Err(snapshot.ended()),
            Some(snapshot) if snapshot.state == State::Prepared => Ok(snapshot.begin.run_first),
            Some(snapshot) => Ok(matches!(snapshot.state, State::Restoring | State::Starting)),
            None => Err(Failure::new(FailCode::FailNotFound, "the snapshot is gone")),
        }
    }

    /// The number of the newest snapshot.
    pub(super) fn newest(&self) -> u64 {
        self.last
    }

    /// One of that name that has begun after `newest`, and failed before anybody could see it arrive.
    pub(super) fn failed_since(&self, name: &str, newest: u64) -> Option<u64> {
        let failed = |(id, s): &(u64, &Snapshot)| *id > newest && s.state == State::Failed;
        let found = self.snapshots.named(name).find(failed).map(|(id, _)| id);
        found.filter(|_| self.named(name).is_none())
    }

    /// Why a name is not to be had, after waiting.
    pub(super) fn not_found(&self, name: &str, waited: Duration) -> Failure {
        let found = self.named(name).and_then(|id| self.snapshots.get(&id));
        if let Some(snapshot) = found.filter(|s| s.state == State::InDoubt) {
            return in_doubt(snapshot);
        }
        let mut text = format!("no snapshot {name} has come");
        if !waited.is_zero() {
            text += &format!(" in {} s", waited.as_secs_f64());
        }
        if let Some(last) = self.snapshots.named(name).next_back().map(|(_, s)| s) {
            text += &format!("; the last one of that name: {}", word(last.state));
            if !last.text.is_empty() {
                text += &format!(" ({})", last.text);
            }
        }
        let others: Vec<&Snapshot> = self.snapshots.values().filter(|s| s.is_live()).collect();
        if others.is_empty() {
            text += "; the cache is empty";
        } else {
            let shown: Vec<String> =
                others.iter().take(NAMES).map(|s| format!("{} ({})", s.begin.name, word(s.state))).collect();
            text += &format!("; there is {}", shown.join(", "));
            if others.len() > NAMES {
                text += &format!(" and {} more", others.len() - NAMES);
            }
        }
        Failure::new(FailCode::FailNotFound, text)
    }

    /// The snapshot itself, or one up its chain of parents.
    pub(super) fn generation(&self, id: u64, generation: u32) -> Option<&Snapshot> {
        let mut snapshot = self.snapshots.get(&id)?;
        for _ in 0..generation {
            snapshot = self.snapshots.get(&snapshot.parent?)?;
        }
        Some(snapshot)
    }

    /// An image for a restore that punches holes where it has read, if that may be: not before the source has
    /// confirmed, and not if others need it. It is read only then.
    pub(super) fn consume(&mut self, id: u64, name: &str) -> Result<Option<Found>, Failure> {
        if self.snapshots.get(&id).is_none_or(|s| s.state != State::Restoring || s.children > 0) {
            return Ok(None);
        }
        let (found, itself) = self.on_images(id, |images| images.consume(name))?;
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.freed |= itself;
            snapshot.note();
        }
        if itself {
            self.consumed.insert(id);
        }
        Ok(Some(found))
    }

    /// An image, or as much of it as there is, if that is so many bytes.
    pub(super) fn read_part(&mut self, id: u64, name: &str, least: u64) -> Result<Found, Failure> {
        self.on_images(id, |images| images.read_part(name, least))
    }

    /// Looks how much has become free without a word, as restores read.
    pub(super) fn measure(&mut self) {
        for id in self.consumed.clone() {
            // It fails only where there are no images.
            let _ = self.on_images(id, |images| {
                images.measure();
                Ok(())
            });
        }
    }

    /// The restore has the tree with root `pid` complete, and asks whether to let it go. `false`: not yet.
    pub(super) fn starting(&mut self, id: u64, pid: i32) -> Result<bool, Failure> {
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return Ok(false) };
        match snapshot.state {
            State::InDoubt => return Err(in_doubt(snapshot)),
            _ if !snapshot.is_live() => return Err(snapshot.failure()),
            _ => {}
        }
        if matches!(snapshot.state, State::Prepared | State::Restoring) {
            snapshot.restored_pid = pid;
        }
        let waits = snapshot.state == State::Prepared;
        let text =
            if waits { format!("as pid {pid}, stopped") } else { "the tree is being let go".to_owned() };
        Ok(self.happen(id, Event::Starting, &text).is_some_and(|held| held.may_run()))
    }

    /// The tree runs here.
    pub(super) fn ran(&mut self, id: u64, pid: i32) {
        let Some(snapshot) = self.snapshots.get_mut(&id) else { return };
        let before = std::mem::replace(&mut snapshot.restored_pid, pid);
        let text = format!("runs as pid {pid}");
        if self.happen(id, Event::Ran, &text).is_some_and(|held| held.state == State::Restored) {
            Self::warn(self.note(id, Reached::Running));
            self.end(id, State::Restored, Failure::new(FailCode::FailUnknown, text));
        } else if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.restored_pid = before;
        }
    }

    /// The restore did not succeed, and why; its tree certainly does not run. The snapshot can be restored again, if it is
    /// whole.
    pub(super) fn let_go(&mut self, id: u64, why: &str) {
        let why = reason(why);
        let Some(before) = self.snapshots.get(&id).map(Snapshot::held) else { return };
        let Some(after) = self.happen(id, Event::Undone, &format!("a restore failed: {why}")) else { return };
        self.changes += 1;
        if before.started {
            Self::warn(self.note(id, Reached::Fell));
        }
        let Some(snapshot) = self.snapshots.get(&id) else { return };
        let name = snapshot.begin.name.clone();
        match after.state {
            State::Ready if snapshot.freed => {
                let text = format!(
                    "its restore failed after bytes had been freed as they were read (--free-as-read): {why}"
                );
                self.tell(id, Kind::Restored, &pb::Restored { ok: false, pid: 0, text: text.clone() });
                self.end(id, State::Failed, Failure::new(FailCode::FailAborted, text));
            }
            State::Ready if snapshot.replaced => self.end_replaced(id),
            State::Ready => {
                tracing::warn!("the restore of snapshot {name} failed, it can be restored again: {why}");
            }
            State::Failed if before.state != State::Failed => {
                let text = format!("its restore failed, the tree stays at the source: {why}");
                self.forget_owner(id);
                self.end(id, State::Failed, Failure::new(FailCode::FailAborted, text));
            }
            State::InDoubt if before.state != State::InDoubt => self.warn_of_doubt(id),
            _ => {}
        }
    }

    /// The restore has it no more, but its tree may run: until that is known nobody else gets it.
    pub(super) fn orphan(&mut self, id: u64) {
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.reader = None;
        }
    }

    /// The restore was killed while it let the tree go, and some of that may have run. Kept, and given to nobody before
    /// somebody has looked.
    pub(super) fn vanished(&mut self, id: u64, why: &str) {
        let text = format!("{} while it let the tree go, some of which may have run", reason(why));
        if self.happen(id, Event::Vanished, &text).is_none_or(|held| held.state != State::InDoubt) {
            return;
        }
        if self.snapshots.get(&id).is_some_and(|s| s.freed) {
            let text = format!("{text}; bytes had been freed as they were read (--free-as-read)");
            return self.end(id, State::Failed, Failure::new(FailCode::FailInDoubt, text));
        }
        self.warn_of_doubt(id);
    }

    // ---- What an operator says.

    fn asked(&self, name: &str) -> Result<(u64, &Snapshot), Failure> {
        name::check_snapshot(name)?;
        let found = self.named(name).and_then(|id| Some((id, self.snapshots.get(&id)?)));
        found.ok_or_else(|| self.not_found(name, Duration::ZERO))
    }

    /// Gives a snapshot that is complete and waits to somebody who makes a copy of it.
    pub(super) fn take_to_save(&mut self, name: &str, saver: Reader) -> Result<u64, Failure> {
        let (id, snapshot) = self.asked(name)?;
        if let Some(saver) = snapshot.saver {
            return Err(saving(name, saver));
        }
        if !matches!(snapshot.state, State::Ready | State::InDoubt) {
            let text = format!(
                "snapshot {name} cannot be saved: {}; what is READY or IN_DOUBT can",
                word(snapshot.state)
            );
            return Err(Failure::new(FailCode::FailBusy, text));
        }
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.saver = Some(saver);
        }
        Ok(id)
    }

    /// The copy is complete, and where. An error: it is not to be used.
    pub(super) fn saved(&mut self, id: u64, saved: &pb::Saved) -> Result<(), Failure> {
        self.not_saved(id);
        let Some(snapshot) = self.snapshots.get_mut(&id) else {
            return Err(Failure::new(FailCode::FailNotFound, "the snapshot is gone"));
        };
        if !snapshot.is_live() {
            return Err(snapshot.ended());
        }
        tracing::info!("snapshot {} was saved in {}", snapshot.begin.name, label(&saved.directory));
        self.set_saved(id, &saved.directory);
        if saved.drop {
            let text = format!("saved in {} and dropped", label(&saved.directory));
            self.end(id, State::Dropped, Failure::new(FailCode::FailAborted, text));
        }
        Ok(())
    }

    /// There is a copy in a directory.
    pub(super) fn set_saved(&mut self, id: u64, directory: &str) {
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.saved = label(directory);
            snapshot.note();
        }
    }

    /// Nobody copies it any more.
    pub(super) fn not_saved(&mut self, id: u64) {
        self.changes += 1;
        if let Some(snapshot) = self.snapshots.get_mut(&id) {
            snapshot.saver = None;
        }
    }

    /// Frees a snapshot by hand.
    pub(super) fn drop_by_hand(&mut self, name: &str, force: bool) -> Result<(), Failure> {
        let (id, snapshot) = self.asked(name)?;
        let refuse = |code, text: &str| Err(Failure::new(code, format!("snapshot {name} {text}")));
        let pid = snapshot.reader.map_or(0, |reader| reader.pid);
        let saver = snapshot.saver.map_or(0, |saver| saver.pid);
        match snapshot.state {
            _ if snapshot.children > 0 => {
                return refuse(
                    FailCode::FailParent,
                    "is needed by snapshots that build on it; drop them first",
                );
            }
            State::Starting => return refuse(FailCode::FailBusy, "is being let go just now; ask again"),
            State::Restoring if !force => {
                let text = format!("is being restored by pid {pid}; --force drops it all the same");
                return refuse(FailCode::FailBusy, &text);
            }
            State::Armed => return refuse(FailCode::FailBusy, "is being handed over just now; ask again"),
            State::Prepared if !force => {
                return refuse(
                    FailCode::FailBusy,
                    "is being handed over by its source just now; ask again, or drop it with --force",
                );
            }
            _ if snapshot.saver.is_some() && !force => {
                let text = format!("is being saved by pid {saver}; --force drops it all the same");
                return refuse(FailCode::FailBusy, &text);
            }
            State::Ready if !force && !snapshot.survives && snapshot.saved.is_empty() => {
                return refuse(
                    FailCode::FailExists,
                    "is all there is of its tree, which is gone at the source; --force drops it all the same",
                );
            }
            State::Receiving | State::Prepared => {
                self.fail(id, Failure::new(FailCode::FailAborted, "dropped by hand at the cache"));
            }
            _ => {
                self.end(id, State::Dropped, Failure::new(FailCode::FailAborted, "dropped by hand"));
            }
        }
        Ok(())
    }

    /// What was in doubt is known: it runs nowhere.
    pub(super) fn release(&mut self, name: &str) -> Result<(), Failure> {
        let (id, snapshot) = self.asked(name)?;
        match snapshot.state {
            State::InDoubt => {
                self.confirmed(id, Event::Release, "");
                Ok(())
            }
            State::Ready => Ok(()),
            state => {
                let text = format!("snapshot {name} is not in doubt: {}", word(state));
                Err(Failure::new(FailCode::FailBusy, text))
            }
        }
    }

    /// Whether a snapshot waits to be restored, or arrives.
    pub(super) fn has_live(&self) -> bool {
        self.snapshots.values().any(Snapshot::is_live)
    }
}

fn not_taken(name: &str, code: FailCode, lack: &Lack) -> Failure {
    Failure::new(code, format!("snapshot {name} is not taken: {lack}"))
}

fn saving(name: &str, saver: Reader) -> Failure {
    Failure::new(FailCode::FailBusy, format!("snapshot {name} is being saved by pid {}", saver.pid))
}

/// Why a snapshot in doubt is not to be had, and what to do.
fn in_doubt(snapshot: &Snapshot) -> Failure {
    let pb::SnapshotBegin { name, pid, comm, host, .. } = &snapshot.begin;
    let question = if snapshot.started {
        format!(
            "See whether task {pid} ({comm}) or another one of its tree runs on this host, or has left traces of having run"
        )
    } else {
        format!("See whether task {pid} ({comm}) runs at {host}")
    };
    let text = format!(
        "snapshot {name} is in doubt: {}. {question}: if it does, image-cache drop {name}; if not, \
         image-cache release {name}",
        snapshot.text
    );
    Failure::new(FailCode::FailInDoubt, text)
}
