//! One snapshot: who brought it, how far it is, who has it, and what it takes of memory.
//!
//! Plain data, and what can be read off it. Its images are in [`images`](super::images); what happens to it is decided in
//! [`snapshots`](super::snapshots).

use std::time::{Instant, SystemTime};

use super::super::Failure;
use super::super::handover::Held;
use super::super::pb::snapshot_info::State;
use super::super::pb::{self, FailCode};
use super::images::Images;
use super::keep::Kept;
use super::ledger::Origin;

/// What a snapshot takes beside its images.
pub(super) const SNAPSHOT_COST: u64 = 4096;

/// Where what becomes of a snapshot is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    /// The connection.
    pub(super) source: u64,
    /// The stream on it.
    pub(super) stream: u32,
}

/// How the offer of a snapshot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// What its tree needs is being looked at.
    Looked,
    /// It waits, and its source was told how many are before it.
    Waits(Option<u32>),
    /// There is room for it: images come, or came.
    Given,
}

/// A restore that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reader {
    pub(super) client: u64,
    pub(super) pid: i32,
}

/// One snapshot.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) begin: pb::SnapshotBegin,
    pub(super) state: State,
    /// Seconds since 1970.
    pub(super) since: u64,
    pub(super) began: Instant,
    pub(super) turn: Turn,
    /// What its tree needs and did not find when that was looked at. For people.
    pub(super) lacks: Vec<String>,
    /// What there is to say, and of which kind if it is a failure.
    pub(super) text: String,
    pub(super) code: FailCode,
    /// `None` once they are freed.
    pub(super) images: Option<Images>,
    /// What lists show of freed ones.
    pub(super) size: u64,
    pub(super) count: usize,
    /// Who brought it, as long as that connection lives.
    pub(super) owner: Option<Owner>,
    pub(super) reader: Option<Reader>,
    pub(super) parent: Option<u64>,
    /// Snapshots whose images are of no use without this one's.
    pub(super) children: usize,
    /// The tree runs at the source in any case.
    pub(super) survives: bool,
    /// The tree is known not to run at the source any more, or to be meant to.
    pub(super) confirmed: bool,
    /// A restore was told to let the tree run, and what became of that is not known.
    pub(super) started: bool,
    /// Since when the source of one that waits for its word is not connected any more.
    pub(super) alone: Option<Instant>,
    /// Not all its bytes are there any more.
    pub(super) freed: bool,
    /// A newer one has the name.
    pub(super) replaced: bool,
    pub(super) restored_pid: i32,
    /// Whose it is: only the same source can replace it.
    pub(super) origin: Origin,
    /// When enough had come last, and how many bytes since then.
    pub(super) moved: Instant,
    pub(super) came: u64,
    /// The service manager holds it.
    pub(super) kept: Option<Kept>,
    /// Who makes a copy of it.
    pub(super) saver: Option<Reader>,
    /// Where a copy of it was put.
    pub(super) saved: String,
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

impl Snapshot {
    /// One of which nothing has come.
    pub(super) fn new(begin: pb::SnapshotBegin, origin: Origin) -> Self {
        let now = Instant::now();
        Self {
            state: State::Receiving,
            since: seconds(),
            began: now,
            turn: Turn::Waits(None),
            lacks: Vec::new(),
            text: String::new(),
            code: FailCode::FailUnknown,
            images: Some(Images::default()),
            size: 0,
            count: 0,
            owner: None,
            reader: None,
            parent: None,
            children: 0,
            survives: begin.source_survives,
            confirmed: false,
            started: false,
            alone: None,
            freed: false,
            replaced: false,
            restored_pid: 0,
            origin,
            moved: now,
            came: 0,
            kept: None,
            saver: None,
            saved: String::new(),
            begin,
        }
    }

    /// It is in another state from now on; what there is to say of that.
    pub(super) fn enter(&mut self, state: State, text: &str) {
        (self.state, self.since, self.text) = (state, seconds(), text.to_owned());
    }

    /// What the table of the hand-over knows it by.
    pub(super) fn held(&self) -> Held {
        Held {
            state: self.state,
            run_first: self.begin.run_first,
            taken: self.reader.is_some(),
            linked: self.owner.is_some(),
            confirmed: self.confirmed,
            started: self.started,
            freed: self.freed,
        }
    }

    /// What the next cache has to know of it.
    pub(super) fn record(&self, number: u64) -> pb::Kept {
        pb::Kept {
            begin: Some(self.begin.clone()),
            origin: self.origin.to_string(),
            number,
            parent: self.parent.unwrap_or(0),
            images: self.images.as_ref().map(|images| images.record().0).unwrap_or_default(),
        }
    }

    /// How far it is, for the next cache.
    pub(super) fn kept_state(&self) -> pb::KeptState {
        pb::KeptState {
            state: self.state.into(),
            since: self.since,
            text: self.text.clone(),
            saved: self.saved.clone(),
            survives: self.survives,
            confirmed: self.confirmed,
            started: self.started,
            freed: self.freed,
            replaced: self.replaced,
            restored_pid: self.restored_pid,
            taken: self.reader.is_some(),
        }
    }

    /// Writes down how far it is, if it is kept.
    pub(super) fn note(&self) {
        if let Some(Err(e)) = self.kept.as_ref().map(|kept| kept.note(&self.kept_state())) {
            tracing::error!("snapshot {}: what is kept of it is old: {e}", self.begin.name);
        }
    }

    /// Whether images of it may come, or came.
    pub(super) fn has_turn(&self) -> bool {
        self.turn == Turn::Given
    }

    /// An error if somebody makes a copy of it.
    pub(super) fn not_being_saved(&self) -> Result<(), Failure> {
        let text =
            |saver: Reader| format!("snapshot {} is being saved by pid {}", self.begin.name, saver.pid);
        self.saver.map_or(Ok(()), |saver| Err(Failure::new(FailCode::FailBusy, text(saver))))
    }

    /// Whether something can still become of it.
    pub(super) fn is_live(&self) -> bool {
        self.held().is_live()
    }

    /// Bytes of memory it takes.
    pub(super) fn charged(&self) -> u64 {
        self.images.as_ref().map_or(0, Images::charged)
    }

    /// Whether all has come but pages and the inventory.
    pub(super) fn is_described(&self) -> bool {
        let last = &self.begin.before_pages;
        self.state != State::Receiving || self.images.as_ref().is_some_and(|images| images.is_complete(last))
    }

    /// Why it is not to be had any more, for whoever waits for it.
    pub(super) fn ended(&self) -> Failure {
        let mut failure = self.failure();
        failure.text = format!("snapshot {} {}: {}", self.begin.name, word(self.state), failure.text);
        if self.state == State::Restored {
            failure = Failure::new(FailCode::FailBusy, failure.text);
        }
        failure
    }

    /// Bytes of memory that are kept for it, when it takes so many more than now.
    pub(super) fn reserved_with(&self, more: u64) -> u64 {
        let promised = if self.has_turn() { self.begin.expected_bytes } else { 0 };
        let kept = self.kept.as_ref().map_or(0, Kept::size);
        let held =
            |images: &Images| SNAPSHOT_COST.saturating_add(promised.max(images.charged() + kept + more));
        self.images.as_ref().map_or(0, held)
    }

    /// Bytes of memory that are kept for it now.
    pub(super) fn reserved(&self) -> u64 {
        self.reserved_with(0)
    }

    /// Why it is not to be had.
    pub(super) fn failure(&self) -> Failure {
        Failure::new(self.code, self.text.clone())
    }

    /// As lists show it.
    pub(super) fn info(&self) -> pb::SnapshotInfo {
        let (bytes, images) = match &self.images {
            Some(images) => (images.size(), images.count()),
            None => (self.size, self.count),
        };
        pb::SnapshotInfo {
            name: self.begin.name.clone(),
            state: self.state.into(),
            pid: self.begin.pid,
            comm: self.begin.comm.clone(),
            host: self.begin.host.clone(),
            bytes,
            images: u32::try_from(images).unwrap_or(u32::MAX),
            created: self.begin.created,
            since: self.since,
            text: self.text.clone(),
            parent: self.begin.parent.clone(),
            restored_pid: self.restored_pid,
            source_survives: self.survives,
            resident: self.charged(),
            run_first: self.begin.run_first,
            id: self.begin.id,
            origin: self.origin.to_string(),
            saved: self.saved.clone(),
        }
    }
}
