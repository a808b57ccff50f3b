//! What goes to the cache: offers of dumps that begin, and their frames, one of each in turn.
//!
//! A dump may write when the cache has said that there is room for it. The frames of one dump never keep those of
//! another waiting, nor does any of them keep back a last word: frames wait in the pipes, and only one at a time goes out.

use std::io;
use std::time::{Duration, Instant};

use super::link::Dial;
use super::outbox::Pumped;
use super::pipe::{Next, Pipe};
use super::relay::Relay;
use super::snapshot::{Phase, Snapshot};
use crate::remote::pb::local_reply::What as Reply;
use crate::remote::pb::snapshot_info::State;
use crate::remote::poll::Interest;
use crate::remote::ring::Ring;
use crate::remote::wire::{self, FEATURE_LZ4, Kind, MAX_DATA};
use crate::remote::{Failure, pb, pb::FailCode};

/// Snapshots at once of which images come; each may hold a frame of [`MAX_DATA`] in memory.
pub(super) const MAX_DUMPS: usize = 64;
/// Dumps at once that have a ring each.
pub(super) const MAX_RINGS: usize = 8;
/// A frame of which the rest has not come is taken out of the pipe after this.
const GATHER_AFTER: Duration = Duration::from_millis(4);
/// Frames before what has happened is looked at again.
const FRAMES: usize = 256;

impl<D: Dial> Relay<D> {
    /// Opens the stream of a snapshot that has waited for the connection, and asks whether there is room for it.
    pub(super) fn offer(&mut self, id: u64) {
        let stream = self.next_stream;
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        (s.phase, s.stream) = (Phase::Offered, Some(stream));
        s.show(State::Receiving, "waits for the answer of the cache");
        self.link.out.push(&wire::frame(Kind::SnapshotBegin, stream, 0, &s.begin));
        s.begin.needs = None;
        self.streams.insert(stream, id);
        self.next_stream += 1;
    }

    /// The cache has room: the dump may begin.
    pub(super) fn begin(&mut self, id: u64, room: pb::Room) {
        let at_work = |s: &&Snapshot| matches!(s.phase, Phase::Sending | Phase::Committed);
        let dumps = self.snapshots.values().filter(at_work).count();
        if dumps >= MAX_DUMPS {
            let text = format!("image-proxy has {dumps} dumps at work, which is all it takes; try later");
            return self.fail(id, &Failure::new(FailCode::FailBusy, text));
        }
        let features = if self.rules.compress { self.link.features() & FEATURE_LZ4 } else { 0 };
        let rings =
            self.snapshots.values().filter_map(|s| s.pipe.as_ref()).filter(|pipe| pipe.has_ring()).count();
        // What is compressed is not sent from where it was read. Without a ring all goes through the pipe.
        let failed = |e: &io::Error| tracing::debug!("no ring for the dump: {e}");
        let ring = (rings < MAX_RINGS && features & FEATURE_LZ4 == 0)
            .then(|| Ring::new().inspect_err(failed).ok())
            .flatten();
        let hello = self.link.peer().cloned().unwrap_or_default();
        let opened = pb::Opened {
            features,
            ring: ring.is_some(),
            journal: hello.journal,
            restores: hello.restores,
            target: self.link.target(),
            lacks: room.lacks,
        };
        let (ring, ends) = ring.map_or((None, Vec::new()), |(ring, ends)| (Some(ring), Vec::from(ends)));
        let pipe = Pipe::new(ring).map(|(pipe, end)| (pipe, ends, end));
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        let Some(client) = s.dump.and_then(|dump| self.clients.get_mut(&dump)) else { return };
        let added = pipe.and_then(|(pipe, mut ends, end)| {
            let edges = Interest { edge: true, ..Interest::READ };
            self.poll.add(pipe.fd(), id * 2 + 1, edges)?;
            ends.push(end);
            Ok((pipe, ends))
        });
        let (pipe, ends) = match added {
            Ok(both) => both,
            Err(e) => {
                let text = format!("pipe for the dump: {e}");
                return self.fail(id, &Failure::new(FailCode::FailInternal, text));
            }
        };
        s.pipe = Some(pipe);
        s.phase = Phase::Sending;
        s.place = None;
        s.begun = Instant::now();
        s.show(State::Receiving, "");
        tracing::info!("{}: begins, {} (pid {})", s.name(), s.begin.comm, s.begin.pid);
        client.reply_with(Reply::Opened(opened), ends);
    }

    /// Says to a dump that waits for its turn how many are before it, and with that that the cache is there.
    pub(super) fn say_place(&mut self, id: u64) {
        let Some(s) = self.snapshots.get(&id).filter(|s| s.phase == Phase::Offered) else { return };
        if let (Some(place), Some(client)) = (s.place, s.dump.and_then(|dump| self.clients.get_mut(&dump)))
            // One that does not read hears of it when it does.
            && !client.is_behind()
        {
            let timeout_ms = u32::try_from(self.rules.timeout.as_millis()).unwrap_or(u32::MAX);
            client.reply(Reply::Queue(pb::Queue { place, target: self.link.target(), timeout_ms }));
        }
    }

    pub(super) fn queue(&mut self, id: u64) {
        if let Some(s) = self.snapshots.get_mut(&id)
            && s.pipe.is_some()
            && !std::mem::replace(&mut s.queued, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Sends as much as the connection takes; true if there is more to be done at once.
    pub(super) fn send(&mut self, now: Instant) -> bool {
        for _ in 0..FRAMES {
            while self.link.is_up() && self.link.out.has_room() {
                let Some(id) = self.ready.pop_front() else { break };
                self.relay(id, now);
            }
            let snapshots = &self.snapshots;
            let pipe = |id| snapshots.get(&id).and_then(|s| s.pipe.as_ref()).map(Pipe::fd);
            match self.link.pump(pipe) {
                Ok(Pumped::Drained) if !self.ready.is_empty() && self.link.is_up() => continue,
                Ok(Pumped::Starved) => {
                    self.starved.get_or_insert((now, self.link.out.sent()));
                }
                Ok(_) => {}
                Err(failure) => {
                    // What the cache said before it hung up is the better reason.
                    self.hear_cache(now);
                    self.lose(&failure);
                }
            }
            if let Err(failure) = self.link.watch(&self.poll) {
                self.lose(&failure);
            }
            return false;
        }
        true
    }

    /// One frame of a dump.
    pub(super) fn relay(&mut self, id: u64, now: Instant) {
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        s.queued = false;
        let (Some(pipe), Some(stream)) = (&mut s.pipe, s.stream) else { return };
        if s.partial.is_some_and(|since| now.saturating_duration_since(since) >= GATHER_AFTER) {
            pipe.gather();
        }
        let header = match pipe.next() {
            Next::Frame(header) => header,
            Next::Empty => {
                s.partial = None;
                return;
            }
            Next::Partial => {
                s.partial.get_or_insert(now);
                return;
            }
            Next::End { cut } => return self.pipe_ended(id, cut, now),
            Next::Bad(failure) => return self.fail(id, &failure),
        };
        s.partial = None;
        if s.phase != Phase::Sending {
            let text = format!("bad frame: {:?} after the list of images", header.kind);
            return self.fail(id, &Failure::new(FailCode::FailProtocol, text));
        }
        if header.kind == Kind::Commit && s.witness.is_none() {
            // It was sent before the frame, but by another way.
            if let Some(dump) = s.dump {
                self.hear_client(dump, now);
            }
            if self.snapshots.get(&id).is_some_and(|s| s.phase == Phase::Sending && s.witness.is_none()) {
                let text = "the dump has not shown what it decides about its tree before the list of images";
                return self.fail(id, &Failure::new(FailCode::FailProtocol, text));
            }
        }
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        let Some(pipe) = s.pipe.as_mut().filter(|_| s.phase == Phase::Sending) else { return };
        match header.kind {
            Kind::ImageBegin => s.images += 1,
            Kind::Data | Kind::Zero => s.bytes += u64::from(header.raw),
            Kind::Commit => s.phase = Phase::Committed,
            _ => {}
        }
        let may_wait = header.kind == Kind::Commit && header.len > MAX_DATA;
        self.link.out.relay(id, may_wait, |buffer| pipe.take(stream, buffer));
        s.queued = true;
        self.ready.push_back(id);
    }

    /// The dump has closed its end of the pipe.
    pub(super) fn pipe_ended(&mut self, id: u64, cut: bool, now: Instant) {
        // It may have said why, or be gone altogether.
        if let Some(dump) = self.snapshots.get(&id).and_then(|s| s.dump) {
            self.hear_client(dump, now);
        }
        match self.snapshots.get(&id).map(|s| s.phase) {
            Some(Phase::Sending) => {
                let place = if cut { "in the middle of a frame" } else { "before the list of images" };
                let text = format!("the dump closed its pipe {place}");
                self.fail(id, &Failure::new(FailCode::FailShort, text));
            }
            Some(Phase::Committed | Phase::Prepared) => self.close_pipe(id),
            _ => {}
        }
    }

    pub(super) fn close_pipe(&mut self, id: u64) {
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        let Some(pipe) = s.pipe.take() else { return };
        let _ = self.poll.remove(pipe.fd());
        s.partial = None;
        self.link.orphan(id, pipe.into_fd());
    }
}
