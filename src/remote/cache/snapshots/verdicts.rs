//! What a source says of a snapshot when all of it is here, and what it means that its connection is gone.
//!
//! The source has the last word on its tree: that it is gone (Confirm), that it runs on there (Abort), that it may run here (Go). It
//! says so over the connection that brought the snapshot, or later over another (Resume). Only its origin counts: nobody
//! else learns anything, and nobody else changes anything.

use std::time::{Duration, Instant};

use super::{Snapshots, label, reason};
use crate::remote::cache::images::Images;
use crate::remote::cache::ledger::Origin;
use crate::remote::cache::snapshot::{Owner, Snapshot, word};
use crate::remote::handover::Event;
use crate::remote::journal::Reached;
use crate::remote::pb::{self, FailCode, resume::Verdict, snapshot_info::State};
use crate::remote::{Failure, wire, wire::Kind};

impl Snapshots {
    /// The source has let the tree go, or keeps it on purpose: the snapshot can be restored.
    pub(crate) fn confirm(&mut self, id: u64, survives: bool) {
        let Some(snapshot) = self.table.get_mut(id) else { return };
        snapshot.survives = survives;
        let reader = snapshot.reader.map_or_else(String::new, |reader| format!("by pid {}", reader.pid));
        self.happen(id, Event::Confirm, &reader);
    }

    /// The source does not run its tree until it hears what became of it here: it may run.
    pub(crate) fn go(&mut self, id: u64) {
        // Before anybody is told to let it go.
        if self.table.get(id).is_some_and(|s| s.state == State::Armed)
            && let Err(failure) = self.note(id, Reached::Going)
        {
            return self.fail(id, failure);
        }
        self.happen(id, Event::Go, "the tree is being let go");
    }

    /// The source takes it back: its tree runs on there. That counts until the tree is let go here.
    pub(crate) fn abort(&mut self, id: u64, why: &str) {
        let why = reason(why);
        self.happen(id, Event::Abort, if why.is_empty() { "the source gave up" } else { &why });
    }

    /// A connection is gone, and `why`.
    pub(crate) fn lost(&mut self, source: u64, why: &str) {
        for id in self.table.forget_source(source) {
            let theirs = |s: &&mut Snapshot| s.owner.is_some_and(|owner| owner.source == source);
            let Some(snapshot) = self.table.get_mut(id).filter(theirs) else { continue };
            snapshot.owner = None;
            let text = match snapshot.state {
                State::Receiving => {
                    format!("the connection to the source was lost before all images had come: {why}")
                }
                _ => format!("the source vanished before it confirmed that its tree is gone: {why}"),
            };
            if snapshot.state == State::Armed {
                snapshot.alone = Some(Instant::now());
                snapshot.text = format!("the connection to the source is gone: {why}");
                self.alone.insert(id);
            }
            self.happen_as(id, Event::Lost, &Failure::new(FailCode::FailLost, text));
        }
    }

    /// Gives up to wait for sources that are gone: their trees, which wait here, are not let go. When the next one is due.
    pub(crate) fn abandon(&mut self, now: Instant, patience: Duration) -> Option<Instant> {
        let alone = |s: &Snapshot| s.alone.filter(|_| s.state == State::Armed).map(|since| since + patience);
        let mut next: Option<Instant> = None;
        for id in self.alone.clone() {
            match self.table.get(id).and_then(alone) {
                Some(until) if now < until => next = Some(next.map_or(until, |next| next.min(until))),
                Some(_) => {
                    let text = "the source vanished before it said that the restored tree may run";
                    self.happen(id, Event::Abandoned, text);
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
    pub(crate) fn resume(&mut self, owner: Owner, origin: &Origin, resume: &pb::Resume) {
        if let Err(failure) = self.try_resume(owner, origin, resume) {
            self.answer(owner, Kind::Failed, &pb::Failed::from(failure));
        }
    }

    fn answer<M: prost::Message>(&mut self, owner: Owner, kind: Kind, message: &M) {
        self.letters.push((owner, wire::frame(kind, owner.stream, 0, message)));
    }

    fn try_resume(&mut self, owner: Owner, origin: &Origin, resume: &pb::Resume) -> Result<(), Failure> {
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
        let found = self.table.of_dump(resume.id).rev().find(|(_, s)| same(s)).map(|(id, _)| id);
        let Some((id, snapshot)) = found.and_then(|id| Some((id, self.table.get_mut(id)?))) else {
            // What is here may still be let go by the word of its own source: nobody is told that it never was.
            let is_here = self.table.of_dump(resume.id).next().is_some();
            let written = if is_here { None } else { self.of_journal(origin, resume) };
            match (&resume.verdict, written) {
                (Some(Verdict::Go(_) | Verdict::Abort(_)), Some(Ok(restored))) => {
                    self.answer(owner, Kind::Restored, &restored);
                    return Ok(());
                }
                (Some(Verdict::Go(_)), Some(Err(fell))) => {
                    self.answer(owner, Kind::Fell, &fell);
                    return Ok(());
                }
                (Some(Verdict::Abort(_)), Some(Err(fell))) => {
                    return Err(Failure::new(FailCode::FailAborted, fell.text));
                }
                _ => {}
            }
            let name = label(&resume.name);
            let text = format!("the cache knows no snapshot {name} of that dump that {origin} has brought");
            return Err(Failure::new(FailCode::FailNotFound, text));
        };
        // The restore of a cache that is gone has written down that it has let the tree go.
        if snapshot.state == State::InDoubt
            && let Some(journal) = &self.journal
            && let Some((Reached::Running, pid)) = journal.look_up(resume.id, origin)
        {
            self.ran(id, pid);
        }
        let Some(snapshot) = self.table.get_mut(id) else { return Ok(()) };
        let verdict = match (&resume.verdict, snapshot.state) {
            (None, state) | (Some(_), state @ State::Receiving) => {
                let text = format!("snapshot {} cannot be resumed: {}", snapshot.begin.name, word(state));
                return Err(Failure::new(FailCode::FailProtocol, text));
            }
            (Some(Verdict::Confirm(_) | Verdict::Abort(_)), State::Failed) => return Err(snapshot.failure()),
            (Some(verdict), _) => verdict,
        };
        (snapshot.owner, snapshot.alone) = (Some(owner), None);
        self.table.brought(owner.source, id);
        match verdict {
            Verdict::Go(_) => {
                self.go(id);
                return Ok(());
            }
            Verdict::Abort(abort) => self.abort(id, &abort.reason),
            Verdict::Confirm(confirm) => self.confirm(id, confirm.survives),
        }
        let Some(snapshot) = self.table.get(id) else { return Ok(()) };
        match snapshot.state {
            state @ (State::Restored | State::Dropped | State::Unknown) => {
                let (ok, pid, text) =
                    (state == State::Restored, snapshot.restored_pid, snapshot.text.clone());
                self.answer(owner, Kind::Restored, &pb::Restored { ok, pid, text });
            }
            State::Failed => return Err(Failure::new(FailCode::FailAborted, "the source gave up")),
            _ => {
                let bytes = snapshot.images.as_ref().map_or(0, Images::size);
                self.answer(owner, Kind::Prepared, &pb::Prepared { bytes });
            }
        }
        Ok(())
    }

    /// What an earlier cache has written down of a tree that its source waits for, if that says it all.
    fn of_journal(&self, origin: &str, resume: &pb::Resume) -> Option<Result<pb::Restored, pb::Fell>> {
        let journal = self.journal.as_ref()?;
        let fell = |text: &str| Some(Err(pb::Fell { text: text.to_owned() }));
        match journal.look_up(resume.id, origin) {
            None if resume.journal == journal.identity() && !journal.knows(resume.id) => {
                fell("the cache was started anew before the tree was let go there")
            }
            None => None,
            Some((Reached::Fell, _)) => fell("its restore failed there"),
            Some((Reached::Running, pid)) => {
                let text = format!("runs as pid {pid}, let go under an earlier cache");
                Some(Ok(pb::Restored { ok: true, pid, text }))
            }
            // Its restore was told to let it go. That writes down when it has; to look at the tree proves nothing, for what is
            // alive may be about to die, and what is dead may have run.
            Some((Reached::Going, _)) => None,
        }
    }
}
