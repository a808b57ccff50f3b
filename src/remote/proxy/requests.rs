//! What the processes of this host ask for.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::client::Client;
use super::link::Dial;
use super::relay::{LISTENER, MAX_CLIENTS, MAX_REASON, Relay};
use super::snapshot::{Phase, Snapshot, Word, unix_now};
use crate::remote::local::Packet;
use crate::remote::pb::local_reply::What as Reply;
use crate::remote::pb::local_request::What as Request;
use crate::remote::pb::snapshot_info::State;
use crate::remote::poll::Interest;
use crate::remote::witness::Witness;
use crate::remote::{Failure, draw, name, pb, pb::FailCode};

/// Requests of one process before others get their turn.
const REQUESTS: usize = 16;
/// Longest comm and host, in bytes.
const MAX_SHORT: usize = 255;

impl<D: Dial> Relay<D> {
    pub(super) fn accept(&mut self, now: Instant) {
        for _ in 0..REQUESTS {
            // Whoever has nothing to do here makes room for whoever comes.
            let idle = self.clients.iter().find(|(_, client)| client.is_idle()).map(|(id, _)| *id);
            if self.clients.len() >= MAX_CLIENTS
                && let Some(idle) = idle
            {
                self.drop_client(idle, now);
            }
            if self.clients.len() >= MAX_CLIENTS {
                self.full = true;
                let _ = self.poll.modify(self.door.fd(), LISTENER, Interest::NONE);
                return;
            }
            let Some(socket) = self.door.accept() else { return };
            match Client::new(socket, now + self.rules.timeout) {
                Ok(client) => {
                    let id = self.number();
                    if self.poll.add(client.fd(), id * 2, Interest::READ).is_ok() {
                        self.clients.insert(id, client);
                    }
                }
                Err(e) => tracing::warn!("local connection: {e}"),
            }
        }
    }

    /// Takes the requests of a process.
    pub(super) fn hear_client(&mut self, id: u64, now: Instant) {
        for _ in 0..REQUESTS {
            let Some(client) = self.clients.get_mut(&id) else { return };
            match client.receive() {
                Ok(Some(packet)) => {
                    client.ask_by = None;
                    if let Err(failure) = self.request(id, packet, now)
                        && let Some(client) = self.clients.get_mut(&id)
                    {
                        client.refuse(&failure);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // A stranger's packet harms nobody else.
                Err(e) if e.raw_os_error() == Some(libc::EBADMSG) => {
                    client.refuse(&Failure::new(FailCode::FailProtocol, "this is no request"));
                    return self.drop_client(id, now);
                }
                Ok(None) | Err(_) => return self.drop_client(id, now),
            }
        }
        let Some(client) = self.clients.get_mut(&id) else { return };
        let behind = client.is_behind();
        if behind != client.watched_for_room {
            client.watched_for_room = behind;
            let interest = if behind { Interest::WRITE } else { Interest::READ };
            let _ = self.poll.modify(client.fd(), id * 2, interest);
        }
    }

    pub(super) fn request(
        &mut self,
        id: u64,
        packet: Packet<pb::LocalRequest>,
        now: Instant,
    ) -> Result<(), Failure> {
        let own = self.clients.get(&id).and_then(|c| c.snapshot);
        match packet.message.what {
            Some(Request::Open(begin)) => self.open(id, begin, now),
            Some(Request::Guard(_)) => self.guard(id, packet.fds),
            Some(Request::Confirm(confirm)) => {
                let word = Word::Confirm { survives: confirm.survives };
                self.last_word(id, own, word, now)
            }
            Some(Request::Go(_)) => {
                let own = own.filter(|own| self.snapshots.get(own).is_some_and(|s| s.begin.run_first));
                let journal = self.link.peer().map_or(0, |hello| hello.journal);
                if let Some(s) = own.and_then(|own| self.snapshots.get_mut(&own)) {
                    s.went.get_or_insert(journal);
                }
                self.last_word(id, own, Word::Go, now)
            }
            Some(Request::Resume(resume)) => self.resume_for(id, resume, now),
            Some(Request::Abort(mut abort)) => {
                name::shorten(&mut abort.reason, MAX_REASON);
                let goes = |s: &Snapshot| s.phase == Phase::Settled && s.word == Some(Word::Go);
                if let Some(own) = own
                    && let Some(s) =
                        self.snapshots.get_mut(&own).filter(|s| s.phase <= Phase::Prepared || goes(s))
                {
                    tracing::warn!("{}: given up by the dump: {}", s.name(), abort.reason);
                    s.dump = None;
                    self.settle(own, Word::Abort { reason: abort.reason }, now);
                }
                Ok(())
            }
            Some(Request::Status(_)) => {
                let infos = self.snapshots.values().map(Snapshot::info).collect();
                let (pid, target, state) = (std::process::id(), self.link.target(), self.link.state());
                if let Some(client) = self.clients.get_mut(&id) {
                    client.reply_list(infos, &format!("image-proxy (pid {pid}) to {target}: {state}"));
                }
                Ok(())
            }
            Some(Request::WaitRestored(wait)) => {
                let newest = self.snapshots.iter().rev().find(|(_, s)| s.begin.name == wait.name);
                let Some((&on, _)) = newest else {
                    let text = format!("no snapshot {:?} has gone through this proxy", wait.name);
                    return Err(Failure::new(FailCode::FailNotFound, text));
                };
                self.await_end(id, on, now.checked_add(Duration::from_millis(wait.wait_ms)));
                Ok(())
            }
            _ => odd("this is a request for image-cache, or one of another version; this is image-proxy"),
        }
    }

    /// A process waits to hear what becomes of a snapshot, or hears it at once.
    pub(super) fn await_end(&mut self, id: u64, on: u64, until: Option<Instant>) {
        let over = self.snapshots.get(&on).filter(|s| s.phase == Phase::Over).map(Snapshot::outcome);
        let Some(client) = self.clients.get_mut(&id) else { return };
        match over {
            Some(outcome) => client.reply(Reply::Restored(outcome)),
            None => client.waits = Some((on, until)),
        }
    }

    /// A dump shows what it decides about its tree.
    pub(super) fn guard(&mut self, id: u64, fds: Vec<OwnedFd>) -> Result<(), Failure> {
        let Some(client) = self.clients.get(&id) else { return Ok(()) };
        let Some(s) = client.snapshot.and_then(|own| self.snapshots.get_mut(&own)) else {
            return odd("what is decided about a tree, and no snapshot of it");
        };
        let Some(decision) = fds.into_iter().next() else {
            return odd("what is decided about a tree, without a descriptor of it");
        };
        let witness = Witness::new(client.process(), decision)
            .map_err(|e| Failure::new(FailCode::FailProtocol, format!("no witness of the dump: {e}")))?;
        if s.phase <= Phase::Sending {
            s.witness = Some(witness);
        }
        Ok(())
    }

    /// A dump says that its snapshot may be restored, or let go on. If that was given up over there, or settled by hand, before
    /// this word, the dump hears what became of it.
    pub(super) fn last_word(
        &mut self,
        id: u64,
        own: Option<u64>,
        word: Word,
        now: Instant,
    ) -> Result<(), Failure> {
        let at = own.and_then(|own| self.snapshots.get(&own)).map(|s| s.phase);
        let (Some(own), Some(phase)) = (own, at.filter(|phase| *phase >= Phase::Prepared)) else {
            return odd("the last word before the cache had all of the snapshot");
        };
        self.await_end(id, own, None);
        if phase == Phase::Prepared {
            self.settle(own, word, now);
        }
        Ok(())
    }

    /// Somebody settles what a dump has handed over, which is gone by now, through this proxy or another one.
    pub(super) fn resume_for(&mut self, id: u64, resume: pb::Resume, now: Instant) -> Result<(), Failure> {
        name::check_snapshot(&resume.name)?;
        let word = match resume.verdict {
            Some(pb::resume::Verdict::Go(_)) => Word::Go,
            Some(pb::resume::Verdict::Abort(mut abort)) => {
                name::shorten(&mut abort.reason, MAX_REASON);
                Word::Abort { reason: abort.reason }
            }
            _ => return Err(Failure::new(FailCode::FailProtocol, "this is not settled by a proxy")),
        };
        let known = self.snapshots.iter().rev().find(|(_, s)| resume.id != 0 && s.begin.id == resume.id);
        let key = match known.map(|(key, s)| (*key, s.phase)) {
            Some((key, Phase::Over)) => {
                self.await_end(id, key, None);
                return Ok(());
            }
            Some((key, _)) => key,
            None => {
                let begin = pb::SnapshotBegin {
                    name: resume.name,
                    id: resume.id,
                    run_first: true,
                    host: self.rules.host.clone(),
                    ..pb::SnapshotBegin::default()
                };
                let key = self.number();
                self.snapshots.insert(key, Snapshot::new(begin, 0, 0, now));
                key
            }
        };
        self.await_end(id, key, None);
        let Some(s) = self.snapshots.get_mut(&key) else { return Ok(()) };
        (s.phase, s.dump) = (Phase::Settled, None);
        if let Some(stream) = s.stream.take() {
            self.streams.remove(&stream);
        }
        s.word = Some(word);
        s.went.get_or_insert(resume.journal);
        s.acked = false;
        s.show(State::InDoubt, "what became of the tree is asked");
        self.resume(key, now);
        Ok(())
    }

    pub(super) fn open(
        &mut self,
        id: u64,
        mut begin: pb::SnapshotBegin,
        now: Instant,
    ) -> Result<(), Failure> {
        name::check_snapshot(&begin.name)?;
        if !begin.parent.is_empty() {
            name::check_snapshot(&begin.parent)?;
        }
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        if client.snapshot.is_some() {
            return Err(Failure::new(FailCode::FailProtocol, "one connection is for one snapshot"));
        }
        if self.ending.is_some() || self.link.is_spent() {
            return Err(Failure::new(FailCode::FailLost, "image-proxy is about to end"));
        }
        name::shorten(&mut begin.comm, MAX_SHORT);
        name::shorten(&mut begin.host, MAX_SHORT);
        if begin.host.is_empty() {
            begin.host.clone_from(&self.rules.host);
        }
        if begin.created == 0 {
            begin.created = unix_now();
        }
        if begin.id == 0 {
            begin.id = draw();
        }
        let pid = client.pid;
        let key = self.number();
        if let Some(client) = self.clients.get_mut(&id) {
            client.snapshot = Some(key);
        }
        let snapshot = Snapshot::new(begin, id, pid, now + self.rules.timeout);
        self.snapshots.insert(key, snapshot);
        self.forget();
        if self.link.is_up() {
            self.offer(key);
        } else {
            self.link.need(now);
        }
        Ok(())
    }

    /// The process is gone, or is not wanted any more.
    pub(super) fn drop_client(&mut self, id: u64, now: Instant) {
        let Some(client) = self.clients.remove(&id) else { return };
        let _ = self.poll.remove(client.fd());
        let Some(own) = client.snapshot else { return };
        let Some(s) = self.snapshots.get_mut(&own) else { return };
        s.dump = None;
        match s.phase {
            Phase::Waiting | Phase::Offered | Phase::Sending => {
                let reason = format!("the dump (pid {}) ended before the snapshot was complete", s.dump_pid);
                tracing::error!("{}: {reason}; the tree runs on", s.name());
                self.settle(own, Word::Abort { reason }, now);
            }
            Phase::Committed | Phase::Prepared => {
                tracing::warn!("{}: the dump (pid {}) ended without a last word", s.name(), s.dump_pid);
                s.watch = Some(now);
                s.next_look = now;
            }
            Phase::Settled | Phase::Over => {}
        }
    }
}

fn odd(text: &str) -> Result<(), Failure> {
    Err(Failure::new(FailCode::FailProtocol, text))
}
