//! What comes from the cache, and what it means for the snapshots here; also that nothing comes any more.

use std::time::Instant;

use super::link::{CLOSED, Dial};
use super::relay::{MAX_REASON, Relay};
use super::snapshot::{Phase, Snapshot, Word};
use crate::remote::pb::local_reply::What as Reply;
use crate::remote::pb::snapshot_info::State;
use crate::remote::session::inbox::Heard;
use crate::remote::{Failure, name, pb, pb::FailCode};

impl<D: Dial> Relay<D> {
    pub(super) fn hear_cache(&mut self, now: Instant) {
        let mut heard = Vec::new();
        let ended = self.link.hear(now, &mut heard);
        let answered = heard.into_iter().try_for_each(|heard| self.answer(heard, now));
        if let Err(failure) = answered.and(ended) {
            self.lose(&failure);
        }
    }

    pub(super) fn up(&mut self, now: Instant) {
        tracing::info!("{}: {}", self.link.target(), self.link.state());
        // What is still in the way there is cleared first.
        for id in self.which(Snapshot::owes) {
            self.resume(id, now);
        }
        for id in self.which(|s| s.phase == Phase::Waiting) {
            self.offer(id);
        }
    }

    /// An answer; an error if no cache would send it.
    pub(super) fn answer(&mut self, heard: Heard, now: Instant) -> Result<(), Failure> {
        let stream = match heard {
            Heard::Prepared(stream, _)
            | Heard::Failed(stream, _)
            | Heard::Restored(stream, _)
            | Heard::Armed(stream, _)
            | Heard::Fell(stream, _)
            | Heard::Room(stream, _)
            | Heard::Queue(stream, _) => stream,
            Heard::Hello(_) => {
                self.up(now);
                return Ok(());
            }
            Heard::Ping | Heard::Pong => {
                self.acked();
                for id in self.which(|s| s.phase == Phase::Offered && s.place.is_some()) {
                    self.say_place(id);
                }
                return Ok(());
            }
        };
        let Some(&id) = self.streams.get(&stream) else {
            // About one that was given up here meanwhile.
            if stream < self.next_stream {
                return Ok(());
            }
            return Err(Failure::new(FailCode::FailProtocol, format!("{heard:?} for no stream of ours")));
        };
        let Some(s) = self.snapshots.get_mut(&id) else { return Ok(()) };
        match (heard, s.phase) {
            (Heard::Room(_, room), Phase::Offered) => self.begin(id, room),
            (Heard::Queue(_, queue), Phase::Offered) => {
                s.place = Some(queue.place);
                s.show(State::Receiving, format!("waits for its turn, {} before it", queue.place));
                self.say_place(id);
            }
            // It was given up here meanwhile.
            (Heard::Room(..) | Heard::Queue(..), Phase::Settled) => {}
            (Heard::Prepared(_, prepared), Phase::Committed) => {
                s.phase = Phase::Prepared;
                s.show(State::Prepared, "");
                tracing::info!("{}: the cache has all {} bytes", s.name(), prepared.bytes);
                self.tell_dump(id, Reply::Prepared(prepared));
                self.close_pipe(id);
            }
            (Heard::Armed(_, armed), Phase::Prepared) => {
                s.show(State::Armed, "");
                self.tell_dump(id, Reply::Armed(armed));
            }
            (Heard::Fell(_, mut fell), Phase::Settled) => {
                name::shorten(&mut fell.text, MAX_REASON);
                tracing::warn!("{}: it does not run there: {}", s.name(), fell.text);
                s.show(State::InDoubt, fell.text.as_str());
                self.tell_waiting(id, &Reply::Fell(fell));
            }
            // What was asked for comes later.
            (Heard::Armed(..), Phase::Settled) => {}
            (Heard::Prepared(_, prepared), Phase::Settled) => {
                if matches!(s.word, Some(Word::Confirm { .. })) {
                    tracing::info!("{}: the cache knows now that it may be restored", s.name());
                    s.show(State::Ready, "");
                    self.taken(id);
                } else if s.begin.run_first {
                    // Too late to have it back: what becomes of it there follows.
                    s.show(State::Starting, "it was let go there before it could be taken back");
                    s.word = Some(Word::Go);
                    self.tell_waiting(id, &Reply::Prepared(prepared));
                } else {
                    let text = "the tree runs on here, but the cache was told to let it be restored";
                    tracing::error!("{}: {text}", s.name());
                    self.over(id, State::Failed, text);
                }
            }
            (Heard::Failed(_, failed), phase) => self.refused(id, phase, failed),
            (Heard::Restored(_, mut restored), Phase::Prepared | Phase::Settled) => {
                name::shorten(&mut restored.text, MAX_REASON);
                if restored.ok {
                    tracing::info!("{}: restored as process {}", s.name(), restored.pid);
                    s.show_restored(restored.pid, &restored.text);
                } else {
                    tracing::warn!("{}: not restored: {}", s.name(), restored.text);
                }
                self.over(id, State::Dropped, &restored.text);
            }
            (heard, phase) => {
                let text = format!("{heard:?} for a snapshot that is {phase:?}");
                return Err(Failure::new(FailCode::FailProtocol, text));
            }
        }
        Ok(())
    }

    /// The cache does not have the snapshot, or not any more.
    pub(super) fn refused(&mut self, id: u64, phase: Phase, mut failed: pb::Failed) {
        name::shorten(&mut failed.text, MAX_REASON);
        let failure = Failure::from(failed);
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        match (phase, &s.word) {
            // Nobody knows whether it ran under another cache, and this proxy does not either when it is asked again.
            (Phase::Settled, Some(Word::Abort { .. }))
                if s.went.is_some() && failure.code == FailCode::FailNotFound =>
            {
                tracing::warn!(
                    "{}: {}; nobody there has heard that the tree runs on here",
                    s.name(),
                    failure.text
                );
                self.tell_waiting(id, &Reply::Failed(failure.into()));
                self.over(id, State::Failed, "the tree runs on here");
                self.snapshots.remove(&id);
            }
            (Phase::Settled, Some(Word::Abort { reason })) => {
                let reason = reason.clone();
                self.over(id, State::Failed, &reason);
            }
            // It may have run under another cache: asked again when the connection is a new one.
            (Phase::Settled, Some(Word::Go)) if failure.code == FailCode::FailNotFound => {
                tracing::error!("{}: {}; {}", s.name(), failure.text, "what became of the tree is not known");
                s.show(State::InDoubt, failure.text.as_str());
                self.tell_waiting(id, &Reply::Failed(failure.into()));
            }
            (Phase::Settled, _) => {
                tracing::error!("{}: the cache does not have it any more: {}", s.name(), failure.text);
                self.over(id, State::Failed, &failure.text);
            }
            (Phase::Prepared, _) => {
                // Too late for the dump, which may be killing the tree, but for one that ends it last.
                tracing::error!("{}: the cache gave it up after it had all: {}", s.name(), failure.text);
                if s.begin.run_first {
                    self.dismiss(id, &failure);
                }
                self.over(id, State::Failed, &failure.text);
            }
            _ => {
                tracing::error!("{}: refused by {}: {}", s.name(), self.link.target(), failure.text);
                self.dismiss(id, &failure);
                self.over(id, State::Failed, &failure.text);
            }
        }
    }

    /// The connection is gone.
    pub(super) fn lose(&mut self, failure: &Failure) {
        if !self.link.is_open() {
            return;
        }
        let target = self.link.target();
        let greeted = self.link.is_up();
        self.link.close(&self.poll, failure);
        self.streams.clear();
        self.starved = None;
        let text = format!("the connection to {target} is lost: {}", failure.text);
        let under_way = self.snapshots.values().any(Snapshot::is_under_way);
        let awaited = self.snapshots.values().any(|s| s.phase == Phase::Settled);
        if under_way || !greeted {
            tracing::error!("{text}");
        } else if awaited || failure.text != CLOSED {
            tracing::warn!("{text}");
        } else {
            tracing::info!("{target} has closed the connection; nothing was on its way");
        }
        let code = if failure.code == FailCode::FailUnknown { FailCode::FailLost } else { failure.code };
        let failure = Failure::new(code, text);
        for id in self.which(|s| s.phase != Phase::Over) {
            let Some(s) = self.snapshots.get_mut(&id) else { continue };
            s.stream = None;
            match s.phase {
                // It will not get better by another try.
                Phase::Waiting
                    if matches!(
                        failure.code,
                        FailCode::FailProtocol | FailCode::FailVersion | FailCode::FailChecksum
                    ) =>
                {
                    self.fail(id, &failure);
                }
                Phase::Waiting | Phase::Over => {}
                Phase::Offered | Phase::Sending => {
                    self.spoilt = true;
                    self.dismiss(id, &failure);
                    self.over(id, State::Failed, &failure.text);
                }
                // Go has not been said: the dump lets its tree go on.
                Phase::Prepared if s.begin.run_first && s.watch.is_none() => {
                    self.dismiss(id, &failure);
                    self.settle(id, Word::Abort { reason: failure.text.clone() }, Instant::now());
                }
                // The cache may have it all, and its word of that may be lost.
                Phase::Committed if s.watch.is_none() => {
                    self.spoilt = true;
                    self.fail(id, &failure);
                }
                Phase::Committed | Phase::Prepared => {
                    let text = "the connection broke before the source said what became of the tree";
                    s.show(State::InDoubt, text);
                }
                Phase::Settled if s.acked => {
                    s.show(State::Ready, "the connection broke; what became of it is asked when it is back");
                }
                Phase::Settled => {
                    s.show(State::InDoubt, "the connection broke before the cache confirmed; trying again");
                    let s = self.snapshots.get(&id);
                    let advice = s.map(|s| format!("{}: {}", s.name(), self.advice(s)));
                    tracing::error!("{}; trying again until it is", advice.unwrap_or_default());
                }
            }
        }
        if self.link.is_spent() {
            self.ready.clear();
        }
    }
}
