//! The last word about a snapshot: that it may be restored, or let go on, or is to be forgotten.
//!
//! From the moment at which the cache may have all of a snapshot, the proxy owes it that word, over a new connection if need be
//! (`Resume`), and so does the next proxy (see `last_words`). The dump says it; of a dump that is gone its [`Witness`] tells.

use std::path::Path;
use std::time::{Duration, Instant};

use super::link::Dial;
use super::relay::Relay;
use super::snapshot::{Phase, Snapshot, Word};
use crate::remote::last_words::{Confirm, LastWord};
use crate::remote::pb::local_reply::What as Reply;
use crate::remote::pb::snapshot_info::State;
use crate::remote::wire::{self, Kind};
use crate::remote::witness::Verdict;
use crate::remote::{Failure, pb};

/// Snapshots that lists still show when they are over.
pub(super) const HISTORY: usize = 1000;
/// Snapshots whose end is not known, the oldest of which are forgotten beyond that.
const MAX_OPEN: usize = 4000;
/// How often is looked what became of a tree whose dump is gone.
const LOOK: Duration = Duration::from_millis(50);
/// Whoever finishes the work of a dump that was killed takes no longer.
const FINISHED: Duration = Duration::from_secs(10);

impl<D: Dial> Relay<D> {
    /// The last word about a snapshot is known.
    pub(super) fn settle(&mut self, id: u64, word: Word, now: Instant) {
        self.close_pipe(id);
        let target = self.link.target();
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        let before = std::mem::replace(&mut s.phase, Phase::Settled);
        (s.witness, s.watch) = (None, None);
        s.word = Some(word.clone());
        if before >= Phase::Committed {
            write_down(self.rules.work_dir.as_deref(), s, &target);
        }
        let Some(stream) = s.stream else {
            if before == Phase::Waiting {
                let Word::Abort { reason } = word else { return };
                return self.over(id, State::Failed, &reason);
            }
            let text = "the connection broke before the cache heard what became of the tree; trying again";
            s.show(State::InDoubt, text);
            self.resume(id, now);
            return;
        };
        let frame = match &word {
            Word::Confirm { survives } => {
                let seconds = s.begun.elapsed().as_secs_f64();
                let rate = s.bytes as f64 / 1e6 / seconds.max(1e-6);
                let (name, bytes) = (s.name().to_owned(), s.bytes);
                tracing::info!("{name}: {bytes} bytes in {seconds:.3} s ({rate:.0} MB/s), all at {target}");
                s.show(State::Ready, "");
                wire::frame(Kind::Confirm, stream, 0, &pb::Confirm { survives: *survives })
            }
            Word::Go => {
                s.show(State::Starting, "told to run there");
                wire::frame(Kind::Go, stream, 0, &pb::Go {})
            }
            Word::Abort { reason } => {
                s.show(State::Failed, reason.as_str());
                wire::frame(Kind::Abort, stream, 0, &pb::Abort { reason: reason.clone() })
            }
        };
        self.link.out.push(&frame);
        // To Go there is an answer of its own.
        s.ack_at = if word == Word::Go { u64::MAX } else { self.link.ping(now) };
        if let Word::Abort { reason } = word
            && before < Phase::Committed
        {
            // The cache cannot have it all, and forgets it without this word too.
            self.over(id, State::Failed, &reason);
        }
    }

    /// Brings a last word over a new connection, if there is one.
    pub(super) fn resume(&mut self, id: u64, now: Instant) {
        if !self.link.is_up() {
            return;
        }
        let stream = self.next_stream;
        let Some(s) = self.snapshots.get_mut(&id).filter(|s| s.owes()) else { return };
        let verdict = match &s.word {
            Some(Word::Confirm { survives }) => {
                pb::resume::Verdict::Confirm(pb::Confirm { survives: *survives })
            }
            Some(Word::Abort { reason }) => pb::resume::Verdict::Abort(pb::Abort { reason: reason.clone() }),
            Some(Word::Go) => pb::resume::Verdict::Go(pb::Go {}),
            None => return,
        };
        let resume = pb::Resume {
            name: s.begin.name.clone(),
            id: s.begin.id,
            verdict: Some(verdict),
            journal: s.went.unwrap_or(0),
        };
        s.stream = Some(stream);
        // A Pong proves nothing here: there is an answer of its own.
        s.ack_at = u64::MAX;
        self.next_stream += 1;
        self.streams.insert(stream, id);
        self.link.out.push(&wire::frame(Kind::Resume, stream, 0, &resume));
        self.link.ping(now);
    }

    /// The snapshot cannot go on, and nothing has happened to its tree.
    pub(super) fn fail(&mut self, id: u64, failure: &Failure) {
        let Some(s) = self.snapshots.get(&id).filter(|s| s.phase < Phase::Prepared) else { return };
        tracing::error!("{}: {}", s.name(), failure.text);
        self.dismiss(id, failure);
        self.settle(id, Word::Abort { reason: failure.text.clone() }, Instant::now());
    }

    /// Nothing more happens to the snapshot.
    pub(super) fn over(&mut self, id: u64, state: State, text: &str) {
        self.close_pipe(id);
        let Some(s) = self.snapshots.get_mut(&id).filter(|s| s.phase != Phase::Over) else { return };
        if let Some(stream) = s.stream {
            self.streams.remove(&stream);
        }
        if s.state() != State::Restored {
            s.show(state, text);
        }
        s.end();
        if let Some(work_dir) = &self.rules.work_dir {
            LastWord::forget(work_dir, s.begin.id);
        }
        let outcome = s.outcome();
        self.tell_waiting(id, &Reply::Restored(outcome));
        self.forget();
    }

    /// Keeps lists short.
    pub(super) fn forget(&mut self) {
        let over = self.snapshots.values().filter(|s| s.phase == Phase::Over).count();
        let open = self.snapshots.len() - over;
        let oldest = |which: &dyn Fn(&Snapshot) -> bool| {
            self.snapshots.iter().find(|(_, s)| which(s)).map(|(id, _)| *id)
        };
        let id = if over > HISTORY {
            oldest(&|s| s.phase == Phase::Over)
        } else if open > MAX_OPEN {
            oldest(&|s| s.phase == Phase::Settled && s.acked)
        } else {
            None
        };
        if let Some(s) = id.and_then(|id| self.snapshots.remove(&id))
            && let Some(stream) = s.stream
        {
            self.streams.remove(&stream);
        }
    }

    /// Last words that the cache is now known to have.
    pub(super) fn acked(&mut self) {
        let pongs = self.link.pongs();
        for id in self.which(|s| s.phase == Phase::Settled && !s.acked && s.ack_at <= pongs) {
            match self.snapshots.get(&id).and_then(|s| s.word.clone()) {
                Some(Word::Abort { reason }) => self.over(id, State::Failed, &reason),
                _ => self.taken(id),
            }
        }
    }

    /// The cache is known to have the last word; the dump hears of it.
    pub(super) fn taken(&mut self, id: u64) {
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        s.acked = true;
        if let Some(work_dir) = &self.rules.work_dir {
            LastWord::forget(work_dir, s.begin.id);
        }
        self.tell_dump(id, Reply::Done(pb::Empty {}));
    }

    /// Takes over what an earlier proxy, or a dump whose proxy was gone, had still to say.
    pub(super) fn take_over(&mut self) {
        let (target, now) = (self.link.target(), Instant::now());
        let all = self.rules.work_dir.as_deref().map(LastWord::all).unwrap_or_default();
        for last in all {
            if last.target != target {
                let (name, its) = (&last.name, &last.target);
                tracing::warn!(
                    "{name}: the last word about it is for the cache at {its}, and stays in the work dir"
                );
                continue;
            }
            let begin = pb::SnapshotBegin {
                name: last.name,
                id: last.id,
                pid: last.pid,
                host: self.rules.host.clone(),
                ..pb::SnapshotBegin::default()
            };
            let mut s = Snapshot::new(begin, 0, 0, now);
            (s.phase, s.dump) = (Phase::Settled, None);
            s.word = Some(match last.word {
                Ok(Confirm { survives }) => Word::Confirm { survives },
                Err(reason) => Word::Abort { reason },
            });
            s.show(
                State::InDoubt,
                "an earlier image-proxy could not bring the last word to the cache; trying again",
            );
            tracing::info!("{}: {}", s.name(), s.text());
            let key = self.number();
            self.snapshots.insert(key, s);
        }
    }

    /// Finds out what became of a tree whose dump is gone.
    pub(super) fn look(&mut self, id: u64, now: Instant) {
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        s.next_look = now + LOOK;
        let (Some(since), Some(witness)) = (s.watch, &s.witness) else { return };
        let (name, pid) = (s.begin.name.clone(), s.begin.pid);
        match witness.look() {
            Verdict::Open => {}
            Verdict::Between | Verdict::LetGo => {
                let text = format!(
                    "the dump was killed while it killed the tree, and that was not finished: kill what is left of \
                     process {pid} and its children"
                );
                if s.text() != text && now.saturating_duration_since(since) >= FINISHED {
                    tracing::error!("{name}: {text}");
                    s.show(State::InDoubt, text);
                }
            }
            Verdict::Untouched => {
                let reason = format!("the dump (pid {}) was killed; the tree runs on", s.dump_pid);
                tracing::error!("{name}: {reason}");
                self.settle(id, Word::Abort { reason }, now);
            }
            // Without the cache's word that it has it all there is nothing to confirm yet, unless that word is lost.
            Verdict::Killed if s.phase == Phase::Committed && s.stream.is_some() => {}
            Verdict::Killed => {
                tracing::warn!("{name}: the tree is gone, so the snapshot may be restored");
                self.settle(id, Word::Confirm { survives: false }, now);
            }
        }
    }

    /// What is to be done by hand when the last word cannot be brought over.
    pub(super) fn advice(&self, s: &Snapshot) -> String {
        let (name, target) = (s.name(), self.link.target());
        match &s.word {
            Some(Word::Confirm { .. }) => format!(
                "the tree is gone here, and {target} may not know: look there with `crtool image-cache list`, \
                 and if the snapshot is in doubt, `crtool image-cache release {name}`"
            ),
            Some(Word::Abort { .. }) => format!(
                "the tree runs on here, and {target} may not know: look there with `crtool image-cache list`, \
                 and if the snapshot is in doubt, `crtool image-cache drop {name}`"
            ),
            Some(Word::Go) => format!(
                "{target} may run the tree, which is stopped here: `crtool migrate settle` asks, as soon as a proxy is there"
            ),
            None => format!(
                "{target} has all of it and was not told whether the tree is gone here: if process {} runs, \
                 `crtool image-cache drop {name}` there, else `crtool image-cache release {name}`",
                s.begin.pid
            ),
        }
    }
}

/// Keeps the last word about a snapshot for another proxy, should this one be killed before the cache has it.
fn write_down(work_dir: Option<&Path>, s: &Snapshot, target: &str) {
    let word = match &s.word {
        Some(Word::Confirm { survives }) => Ok(Confirm { survives: *survives }),
        Some(Word::Abort { reason }) => Err(reason.clone()),
        // Whoever says that keeps a journal.
        Some(Word::Go) | None => return,
    };
    let pb::SnapshotBegin { id, name, pid, .. } = &s.begin;
    let last = LastWord { id: *id, name: name.clone(), target: target.to_owned(), pid: *pid, word };
    if let Some(Err(error)) = work_dir.map(|work_dir| last.write(work_dir)) {
        tracing::warn!(
            "{name}: if image-proxy is killed now, the cache does not hear the last word: {error}"
        );
    }
}
