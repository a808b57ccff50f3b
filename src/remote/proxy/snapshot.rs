//! One snapshot on its way through the proxy, from `open` to what became of it, and what lists show of it.
//!
//! ```text
//! Waiting ─▶ Offered ─▶ Sending ─▶ Committed ─▶ Prepared ─▶ Settled ─▶ Over
//!    └──────────┴──────────┴───────────┴──────────────────────┘▲
//! ```
//!
//! Up to `Prepared` nothing has happened to the tree: whatever goes wrong, the dump is told and the snapshot is
//! over. From then on it is the dump's word that counts, or the verdict of its [`Witness`], and the proxy
//! owes that word to the cache until the cache has it: over a new connection if need be (`Resume`).

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::pipe::Pipe;
use crate::remote::pb;
use crate::remote::pb::snapshot_info::State;
use crate::remote::witness::Witness;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// There is no connection yet.
    Waiting,
    /// The cache is asked whether it has room; until it has, the tree runs and nothing is sent.
    Offered,
    /// Frames are relayed.
    Sending,
    /// The list of images has been relayed, or begun to be: the cache may have it all.
    Committed,
    /// The cache has it all, and the dump knows.
    Prepared,
    /// The last word is known.
    Settled,
    /// Nothing more happens to it.
    Over,
}

/// The last word of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Word {
    /// It may be restored.
    Confirm {
        /// The tree was left at the source on purpose.
        survives: bool,
    },
    /// It may run there; it does not run here meanwhile.
    Go,
    /// The tree runs on here.
    Abort {
        /// Why.
        reason: String,
    },
}

/// One of them.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) begin: pb::SnapshotBegin,
    pub(super) phase: Phase,
    /// Its stream on the connection that is open now.
    pub(super) stream: Option<u32>,
    /// The dump, while its socket is open and it is to hear of the snapshot.
    pub(super) dump: Option<u64>,
    /// Pid of that, for messages.
    pub(super) dump_pid: i32,
    pub(super) pipe: Option<Pipe>,
    /// Of what the dump does to its tree.
    pub(super) witness: Option<Witness>,
    /// Since when the dump is gone without a word.
    pub(super) watch: Option<Instant>,
    pub(super) next_look: Instant,
    /// How many the cache has before it, as long as it has to wait.
    pub(super) place: Option<u32>,
    /// Since when a frame is there in part.
    pub(super) partial: Option<Instant>,
    /// In the queue of those that may have a frame.
    pub(super) queued: bool,
    /// When the connection must be there.
    pub(super) deadline: Instant,
    pub(super) begun: Instant,
    /// Known once settled.
    pub(super) word: Option<Word>,
    /// Go may have been said: the journal that the cache kept then.
    pub(super) went: Option<u64>,
    /// The cache is known to have the word.
    pub(super) acked: bool,
    /// The number of the Ping whose answer will show that.
    pub(super) ack_at: u64,
    pub(super) bytes: u64,
    pub(super) images: u32,
    state: State,
    since: u64,
    text: String,
    restored_pid: i32,
}

impl Snapshot {
    /// A dump begins.
    pub(super) fn new(begin: pb::SnapshotBegin, dump: u64, dump_pid: i32, deadline: Instant) -> Self {
        let now = Instant::now();
        Self {
            begin,
            phase: Phase::Waiting,
            stream: None,
            dump: Some(dump),
            dump_pid,
            pipe: None,
            witness: None,
            watch: None,
            next_look: now,
            place: None,
            partial: None,
            queued: false,
            deadline,
            begun: now,
            word: None,
            went: None,
            acked: false,
            ack_at: 0,
            bytes: 0,
            images: 0,
            state: State::Receiving,
            since: unix_now(),
            text: "waits for the connection to the cache".to_owned(),
            restored_pid: 0,
        }
    }

    /// The loss of a connection would be the loss of something.
    pub(super) fn is_under_way(&self) -> bool {
        match self.phase {
            Phase::Settled => !self.acked,
            phase => phase != Phase::Over,
        }
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.begin.name
    }

    /// As lists show it from now on.
    pub(super) fn show(&mut self, state: State, text: impl Into<String>) {
        if state != self.state {
            self.since = unix_now();
        }
        self.state = state;
        self.text = text.into();
    }

    /// Runs at the destination.
    pub(super) fn show_restored(&mut self, pid: i32, text: &str) {
        self.show(State::Restored, text);
        self.restored_pid = pid;
    }

    /// What lists show.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// What there is to say.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Lets go of everything but what lists show.
    pub(super) fn end(&mut self) {
        self.phase = Phase::Over;
        (self.stream, self.dump) = (None, None);
        (self.witness, self.watch, self.partial) = (None, None, None);
    }

    /// The cache must still be told the last word.
    pub(super) fn owes(&self) -> bool {
        self.phase == Phase::Settled && self.stream.is_none()
    }

    /// For those who wait for it, once it is over.
    pub(super) fn outcome(&self) -> pb::Restored {
        pb::Restored { ok: self.state == State::Restored, pid: self.restored_pid, text: self.text.clone() }
    }

    /// For lists.
    pub(super) fn info(&self) -> pb::SnapshotInfo {
        pb::SnapshotInfo {
            origin: String::new(),
            saved: String::new(),
            name: self.begin.name.clone(),
            state: self.state.into(),
            pid: self.begin.pid,
            comm: self.begin.comm.clone(),
            host: self.begin.host.clone(),
            bytes: self.bytes,
            images: self.images,
            created: self.begin.created,
            since: self.since,
            text: self.text.clone(),
            parent: self.begin.parent.clone(),
            restored_pid: self.restored_pid,
            source_survives: self.begin.source_survives,
            resident: 0,
            run_first: self.begin.run_first,
            id: self.begin.id,
        }
    }
}

/// Seconds since 1970.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
