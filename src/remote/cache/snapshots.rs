//! All snapshots of a cache: which there are, what they take together, and what lists show of them.
//!
//! What becomes of each is decided by the table in [`handover`](super::super::handover) and nowhere else, and [`settle`]
//! carries that out. Everything else follows the life of a snapshot:
//!
//! - [`offers`]: from its announcement to its turn, and how long that lasts.
//! - [`arrival`]: its images come.
//! - [`verdicts`]: what its source says when all of it is here, and what a lost connection means.
//! - [`restores`]: it is read, restored, let run.
//! - [`operator`]: it is saved, dropped, released by hand.
//! - [`restart`]: the cache ends, and the next one takes it over.
//!
//! No sockets are read or written; what a source has to be told waits in [`Snapshots::take_letters`].

mod arrival;
mod offers;
mod operator;
mod restart;
mod restores;
mod settle;
mod table;
mod verdicts;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::super::journal::Journal;
use super::super::pb::snapshot_info::State;
use super::super::pb::{self, FailCode};
use super::super::{Failure, name};
use super::images::Images;
use super::keep::Keeper;
use super::ledger::{Lack, Ledger, Limits, Origin, What, mib};
use super::restorer::Wanted;
use super::snapshot::{Owner, Snapshot, word};
use offers::Offers;
use table::Table;

/// Longest reason kept, in bytes.
const REASON: usize = 1000;
/// Longest name of a task or host kept, in bytes.
const LABEL: usize = 256;
/// How many other names a refusal tells.
const NAMES: usize = 8;

/// All snapshots.
#[derive(Debug)]
pub(super) struct Snapshots {
    table: Table,
    last: u64,
    ledger: Ledger,
    /// Of the cache.
    timeout: Duration,
    changes: u64,
    letters: Vec<(Owner, Vec<u8>)>,
    offers: Offers,
    /// Those that have ended and whose images are freed, oldest first.
    ended: VecDeque<u64>,
    /// Those whose tree waits here and whose source is gone, and some that were such.
    alone: BTreeSet<u64>,
    /// Those whose images may become fewer without a word.
    consumed: BTreeSet<u64>,
    /// The cache starts restores by itself: for those.
    wanted: Option<Vec<Wanted>>,
    keeper: Option<Keeper>,
    /// Of what sources hand over that end their trees last.
    journal: Option<Journal>,
    closing: bool,
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
            table: Table::default(),
            last: 0,
            ledger: Ledger::new(limits),
            timeout,
            changes: 0,
            letters: Vec::new(),
            offers: Offers::default(),
            ended: VecDeque::new(),
            alone: BTreeSet::new(),
            consumed: BTreeSet::new(),
            wanted: None,
            keeper: None,
            journal: None,
            closing: false,
        }
    }

    /// From now on what is let go is written down.
    pub(super) fn keep_journal(&mut self, journal: Journal) {
        self.journal = Some(journal);
    }

    /// Which journal that is; 0 for none.
    pub(super) fn journal(&self) -> u64 {
        self.journal.as_ref().map_or(0, Journal::identity)
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
        self.table.get(id)
    }

    /// All of them, oldest first.
    pub(super) fn all(&self) -> impl Iterator<Item = &Snapshot> {
        self.table.values()
    }

    /// Images of a snapshot that are still there.
    pub(super) fn images(&self, id: u64) -> Option<&Images> {
        self.table.get(id)?.images.as_ref()
    }

    /// The snapshot itself, or one up its chain of parents.
    pub(super) fn generation(&self, id: u64, generation: u32) -> Option<&Snapshot> {
        let mut snapshot = self.table.get(id)?;
        for _ in 0..generation {
            snapshot = self.table.get(snapshot.parent?)?;
        }
        Some(snapshot)
    }

    /// Whether a snapshot waits to be restored, or arrives.
    pub(super) fn has_live(&self) -> bool {
        self.table.values().any(Snapshot::is_live)
    }

    /// The number of the newest snapshot.
    pub(super) fn newest(&self) -> u64 {
        self.last
    }

    fn live<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (u64, &'a Snapshot)> {
        self.table.named(name).filter(|(_, s)| s.is_live())
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

    /// One of that name that has begun after `newest`, and failed before anybody could see it arrive.
    pub(super) fn failed_since(&self, name: &str, newest: u64) -> Option<u64> {
        let failed = |(id, s): &(u64, &Snapshot)| *id > newest && s.state == State::Failed;
        let found = self.table.named(name).find(failed).map(|(id, _)| id);
        found.filter(|_| self.named(name).is_none())
    }

    /// Why a name is not to be had, after waiting.
    pub(super) fn not_found(&self, name: &str, waited: Duration) -> Failure {
        let found = self.named(name).and_then(|id| self.table.get(id));
        if let Some(snapshot) = found.filter(|s| s.state == State::InDoubt) {
            return in_doubt(snapshot);
        }
        let mut text = format!("no snapshot {name} has come");
        if !waited.is_zero() {
            text += &format!(" in {} s", waited.as_secs_f64());
        }
        if let Some(last) = self.table.named(name).next_back().map(|(_, s)| s) {
            text += &format!("; the last one of that name: {}", word(last.state));
            if !last.text.is_empty() {
                text += &format!(" ({})", last.text);
            }
        }
        let others: Vec<&Snapshot> = self.table.values().filter(|s| s.is_live()).collect();
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

    /// Takes one in, and counts what it takes.
    fn insert(&mut self, snapshot: Snapshot) -> u64 {
        self.last += 1;
        self.changes += 1;
        if let Some(parent) = snapshot.parent.and_then(|parent| self.table.get_mut(parent)) {
            parent.children += 1;
        }
        self.ledger.add(&snapshot.origin, What::Snapshots);
        self.ledger.change(&snapshot.origin, What::Memory, 0, snapshot.reserved());
        self.table.insert(self.last, snapshot);
        self.last
    }

    /// Works on a snapshot and keeps count of its memory.
    fn counted<T>(&mut self, id: u64, work: impl FnOnce(&mut Snapshot) -> T) -> Option<T> {
        let snapshot = self.table.get_mut(id)?;
        let before = snapshot.reserved();
        let result = work(snapshot);
        self.ledger.change(&snapshot.origin, What::Memory, before, snapshot.reserved());
        Some(result)
    }

    /// The same for its images.
    fn on_images<T>(
        &mut self,
        id: u64,
        work: impl FnOnce(&mut Images) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let done = self.counted(id, |snapshot| snapshot.images.as_mut().map(work)).flatten();
        done.unwrap_or_else(|| Err(Failure::new(FailCode::FailInternal, "the images are gone")))
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
