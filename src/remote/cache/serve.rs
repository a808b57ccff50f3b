//! The one thread: sockets to the parts that know what they mean, and time.
//!
//! Nothing here blocks. A connection is read until it has nothing more or has had its turn. None is ever made to wait: what
//! does not fit is refused when it begins, or fails by itself, so that no stream stands in the way of another.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::net::Stream;
use super::super::pb::FailCode;
use super::super::poll::{Interest, Poll};
use super::super::{Failure, local, pb};
use super::keep;
use super::ledger::{HERE, Lack, Limits, What, mib};
use super::local::{Client, Watch};
use super::needs::Looks;
use super::snapshots::Snapshots;
use super::source::Source;
use crate::settings::RestoreSettings;

/// Bytes taken from a connection at once: what fits into a cache of the CPU beside what else it needs.
const BUFFER: usize = 512 << 10;
/// How often one connection is read before others have their turn.
const TURN: usize = 8;
/// Most commands that have nothing to do here.
const MAX_IDLE: usize = 256;
/// Most commands at once.
const MAX_CLIENTS: usize = 4096;
/// Addresses remembered of those who have said who they are.
const MAX_ACQUAINTED: usize = 1024;
/// Connections of one address that are not too many, though none of them has said who it is.
const FEW: usize = 8;
/// How long the file systems of this host may take to say what is there.
const LOOK: Duration = Duration::from_secs(5);
/// Tokens below are the caller's.
const LOOKS: u64 = 1 << 32;
/// How long the reason of a refusal may take to arrive.
const LAST_WORD: Duration = Duration::from_secs(2);

/// A connection from a source, and its socket.
#[derive(Debug)]
struct Line {
    stream: Stream,
    source: Source,
    watched: Interest,
    /// What it takes, as it was counted.
    buffered: u64,
    spoke: bool,
    since: Instant,
    heard: Instant,
    /// It was refused; read until then for the sake of the reason.
    ending: Option<Instant>,
    said_last: bool,
    ended: bool,
    /// Ended with images on their way.
    torn: bool,
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    poll: Poll,
    snapshots: Snapshots,
    looks: Looks,
    most_strangers: usize,
    /// Addresses from which somebody has said who they are, and the last connection that did.
    acquainted: HashMap<String, u64>,
    /// When the next snapshot has stood still for too long.
    due: Option<Instant>,
    seen: u64,
    lines: BTreeMap<u64, Line>,
    clients: BTreeMap<u64, Client>,
    watches: BTreeMap<u64, Watch>,
    last: u64,
    timeout: Duration,
    buffer: Vec<u8>,
    /// What a list says about this cache.
    place: String,
    /// A connection was lost before all its snapshots were settled.
    torn: bool,
    /// When the first tree is given up that waits for a source which is gone.
    abandon_at: Option<Instant>,
}

impl Cache {
    /// One without any socket. `timeout` is the longest silence of a source.
    pub fn new(limits: Limits, timeout: Duration, place: String) -> io::Result<Self> {
        let (poll, looks) = (Poll::new()?, Looks::new(LOOK.min(timeout / 2))?);
        poll.add(looks.fd(), LOOKS, Interest::READ)?;
        Ok(Self {
            poll,
            snapshots: Snapshots::new(limits, timeout),
            looks,
            most_strangers: limits.strangers(),
            acquainted: HashMap::new(),
            due: None,
            seen: 0,
            lines: BTreeMap::new(),
            clients: BTreeMap::new(),
            watches: BTreeMap::new(),
            last: LOOKS,
            timeout,
            buffer: vec![0; BUFFER],
            place,
            torn: false,
            abandon_at: None,
        })
    }

    /// What it has.
    pub(super) fn snapshots(&mut self) -> &mut Snapshots {
        &mut self.snapshots
    }

    /// Connections from sources.
    pub fn lines(&self) -> usize {
        self.lines.len()
    }

    /// Whether a connection was lost before all its snapshots were settled.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Takes what an earlier cache had: what a service manager has kept, and what lies below `spill`.
    pub fn adopt(&mut self, kept: Vec<(String, OwnedFd)>, spill: Option<&Path>) {
        let mut records = keep::handed_over(kept);
        records.extend(spill.into_iter().flat_map(keep::spilled));
        self.snapshots.adopt(records);
    }

    /// It is told to end: nothing begins any more.
    pub fn close(&mut self) {
        self.place = "told to end, which it does when it holds nothing any more".to_owned();
        self.snapshots.close();
    }

    /// The last thing before its end: the other sides see an orderly one, and the log has what is lost by it.
    pub fn part(&mut self) {
        for line in self.lines.values_mut() {
            let _ = line.stream.end();
        }
        self.snapshots.part();
    }

    fn token(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// A source has connected.
    pub fn add_source(&mut self, stream: Stream) -> io::Result<()> {
        if let Some(stranger) = self.least_welcome() {
            self.lines.remove(&stranger);
        }
        let token = self.token();
        let watched = Interest::READ.and(stream.interest());
        self.poll.add(stream.fd(), token, watched)?;
        tracing::debug!("connection from {}", stream.peer());
        let now = Instant::now();
        let source = Source::new(token, stream.origin().into(), self.timeout);
        let line = Line {
            stream,
            source,
            watched,
            buffered: 0,
            spoke: false,
            since: now,
            heard: now,
            ending: None,
            said_last: false,
            ended: false,
            torn: false,
        };
        self.lines.insert(token, line);
        Ok(())
    }

    /// Who has to go when one more comes that has not said who it is: of the address with most of those, if these are more than
    /// a few; else of all who have no certificate to show and come from where nobody has ever said who they are; of those first
    /// one that has said nothing at all, then the oldest. So whoever opens many keeps out nobody else, wherever they come from.
    fn least_welcome(&self) -> Option<u64> {
        let strangers = || self.lines.iter().filter(|(_, line)| !line.source.is_known());
        if strangers().count() < self.most_strangers {
            return None;
        }
        let mut count: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, line) in strangers() {
            *count.entry(line.stream.origin()).or_default() += 1;
        }
        let unwelcome = |(token, line): &(&u64, &Line)| {
            let many = count.get(line.stream.origin()).copied().unwrap_or(0).max(FEW);
            let unknown = !line.stream.is_proven() && !self.acquainted.contains_key(line.stream.address());
            (many, unknown, !(line.spoke || line.stream.has_begun()), Reverse(**token))
        };
        strangers().max_by_key(unwelcome).map(|(token, _)| *token)
    }

    /// Somebody there has said who they are.
    fn is_acquainted(&mut self, address: String, token: u64) {
        self.acquainted.insert(address, token);
        if self.acquainted.len() > MAX_ACQUAINTED {
            let oldest = self.acquainted.values().copied().min();
            self.acquainted.retain(|_, token| Some(*token) != oldest);
        }
    }

    /// A command has connected: process `pid`, of a user who may enter; `process` is a pidfd of it.
    pub fn add_client(&mut self, socket: OwnedFd, pid: i32, process: Option<OwnedFd>) -> io::Result<()> {
        let idle: Vec<u64> =
            self.clients.iter().filter(|(_, client)| client.is_idle()).map(|(token, _)| *token).collect();
        if idle.len() >= MAX_IDLE
            && let Some(oldest) = idle.first()
        {
            self.clients.remove(oldest);
        }
        if self.clients.len() >= MAX_CLIENTS {
            let failed =
                Failure::new(FailCode::FailBusy, "too many commands talk to this image-cache").into();
            let reply = pb::LocalReply { what: Some(pb::local_reply::What::Failed(failed)) };
            return local::send(socket.as_fd(), &reply, &[]);
        }
        let token = self.token();
        self.poll.add(socket.as_fd(), token, Interest::READ)?;
        self.clients.insert(token, Client::new(token, pid, process, socket, self.timeout));
        Ok(())
    }

    fn describe(&mut self) -> String {
        let mut text = format!("image-cache, pid {}, {}", std::process::id(), self.place);
        text += &format!("; {} connections; {} MiB in use", self.lines.len(), mib(self.snapshots.used()));
        if let Some(max) = self.snapshots.max() {
            text += &format!(" of {} (--max-memory)", mib(max));
        }
        let buffers = self.snapshots.ledger().used(What::Buffers);
        if buffers >= 1 << 20 {
            text += &format!("; {} MiB of frames that have not come whole", mib(buffers));
        }
        text
    }

    /// Waits for something to happen, until `until` at the latest, and does what is to be done. The tokens of the
    /// caller's own descriptors that are ready.
    pub fn turn(&mut self, until: Option<Instant>) -> io::Result<Vec<u64>> {
        let events = self.poll.wait(self.deadline().into_iter().chain(until).min())?;
        let now = Instant::now();
        let mut others = Vec::new();
        let busy: Vec<u64> =
            self.lines.iter().filter(|(_, line)| line.stream.pending()).map(|(token, _)| *token).collect();
        let told: Vec<u64> = events.iter().map(|event| event.token).collect();
        for token in busy.into_iter().filter(|token| !told.contains(token)) {
            self.read(token, now);
        }
        for event in events {
            if self.lines.contains_key(&event.token) {
                if event.readable {
                    self.read(event.token, now);
                }
            } else if self.clients.contains_key(&event.token) {
                let daemon = self.describe();
                if let Some(client) = self.clients.get_mut(&event.token) {
                    client.ready(&mut self.snapshots, &daemon);
                }
            } else if event.token < LOOKS {
                others.push(event.token);
            }
        }
        self.settle(now);
        Ok(others)
    }

    /// When something has to be done though nothing happens.
    fn deadline(&self) -> Option<Instant> {
        let lines = self.lines.values().flat_map(|line| {
            [line.ending, Some(line.patience()), line.stream.pending().then_some(line.heard)]
        });
        let clients = self.clients.values().map(Client::deadline);
        lines.chain(clients).chain([self.abandon_at, self.due, self.looks.deadline()]).flatten().min()
    }

    /// Reads a connection.
    fn read(&mut self, token: u64, now: Instant) {
        let Some(line) = self.lines.get_mut(&token) else { return };
        let was_known = line.source.is_known();
        for _ in 0..TURN {
            match line.stream.read(&mut self.buffer) {
                Ok(0) => {
                    line.end(&mut self.snapshots, "it was closed there");
                    break;
                }
                Ok(count) => {
                    (line.heard, line.spoke) = (now, true);
                    line.feed(&mut self.snapshots, self.buffer.get(..count).unwrap_or_default(), now);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    // TLS that one of the two sides will not have.
                    if e.kind() == io::ErrorKind::InvalidData && !line.source.is_known() {
                        tracing::warn!("connection from {} is refused: {e}", line.stream.peer());
                    }
                    line.end(&mut self.snapshots, &e.to_string());
                    break;
                }
            }
        }
        if line.source.is_known() && !was_known {
            let address = line.stream.address().to_owned();
            self.is_acquainted(address, token);
        }
    }

    /// What follows from what has happened: answers, time-outs, ends.
    fn settle(&mut self, now: Instant) {
        for (token, line) in &mut self.lines {
            line.look_at_time(*token, &mut self.snapshots, now);
        }
        for look in self.snapshots.take_to_look() {
            self.looks.start(look, now);
        }
        for (id, looked) in self.looks.take(now) {
            self.snapshots.looked(id, looked);
        }
        self.abandon_at = self.snapshots.abandon(now, self.timeout);
        self.due = self.snapshots.expire(now);
        self.retry(now);
        for (owner, letter) in self.snapshots.take_letters() {
            if let Some(line) = self.lines.get_mut(&owner.source) {
                line.source.out().extend(letter);
            }
        }
        let mut over = Vec::new();
        for (token, line) in &mut self.lines {
            line.write();
            if line.ended {
                self.torn |= line.torn;
                over.push(*token);
                continue;
            }
            let want = line.interest();
            if want != line.watched && self.poll.modify(line.stream.fd(), *token, want).is_ok() {
                line.watched = want;
            }
        }
        for token in over {
            self.lines.remove(&token);
        }
        self.settle_clients();
    }

    /// Lets those try again who wait for something that may have come, as long as that changes anything.
    fn retry(&mut self, now: Instant) {
        loop {
            let changes = self.snapshots.changes();
            let changed = changes != self.seen;
            self.seen = changes;
            for client in self.clients.values_mut() {
                if changed || client.deadline().is_some_and(|until| now >= until) {
                    client.retry(&mut self.snapshots, now);
                }
            }
            let snapshots = &mut self.snapshots;
            self.watches.retain(|_, watch| !watch.look(snapshots));
            if self.snapshots.changes() == self.seen {
                return;
            }
        }
    }

    fn settle_clients(&mut self) {
        let (mut watches, mut loads) = (Vec::new(), Vec::new());
        for (token, client) in &mut self.clients {
            watches.extend(client.take_watches());
            loads.extend(client.take_loads());
            let want = client.interest();
            if want != client.watched() && self.poll.modify(client.fd(), *token, want).is_ok() {
                client.set_watched(want);
            }
        }
        self.clients.retain(|_, client| !client.is_gone());
        for (fd, directory) in loads {
            let added = Stream::new(fd, HERE.to_owned(), self.timeout)
                .and_then(|stream| self.add_source(stream.from(HERE)));
            match (added, self.lines.last_entry()) {
                (Ok(()), Some(mut line)) => line.get_mut().source.set_saved(directory),
                (Err(e), _) => tracing::warn!("a connection of this host cannot be served: {e}"),
                (Ok(()), None) => {}
            }
        }
        for watch in watches {
            if watch.look(&mut self.snapshots) {
                continue;
            }
            let token = self.token();
            for fd in watch.fds() {
                // Without it the end is seen later, at the next turn.
                let _ = self.poll.add(fd, token, Interest::READ);
            }
            self.watches.insert(token, watch);
        }
    }

    /// From now on the caller starts a restore for each of those, with these settings: [`Snapshots::take_wanted`].
    pub(super) fn restore_all(&mut self, restores: &RestoreSettings) {
        self.looks.of_restores(restores);
        self.snapshots.restore_all();
    }

    /// Watches a descriptor of the caller's for reading, as `token` below 2^32.
    pub fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.poll.add(fd, token, Interest::READ)
    }
}

impl Line {
    fn interest(&self) -> Interest {
        let read = Interest::READ;
        let write = Interest { write: !self.source.has_said_all(), ..Interest::NONE };
        read.and(write).and(self.stream.interest())
    }

    /// Hands bytes on.
    fn feed(&mut self, snapshots: &mut Snapshots, input: &[u8], now: Instant) {
        if !self.source.is_known() {
            self.count(snapshots, 0);
            self.source.set_origin(self.stream.origin().into());
        }
        let fed = self.source.feed(snapshots, input);
        let taken = self.source.buffered() + self.stream.buffered();
        let room =
            snapshots.ledger().room(self.source.origin(), What::Buffers, taken.saturating_sub(self.buffered));
        let full = |lack: Lack| Failure::new(FailCode::FailMemory, format!("there is no room: {lack}"));
        if let Err(failure) = fed.and(room.map_err(full)) {
            tracing::warn!("connection from {} is given up: {failure}", self.stream.peer());
            self.torn |= self.source.is_busy(snapshots);
            self.source.refuse(snapshots, &failure);
            self.ending = Some(now + LAST_WORD);
        }
        self.count(snapshots, self.source.buffered() + self.stream.buffered());
    }

    /// What it takes now.
    fn count(&mut self, snapshots: &mut Snapshots, taken: u64) {
        snapshots.ledger().change(self.source.origin(), What::Buffers, self.buffered, taken);
        self.buffered = taken;
    }

    /// Until when it may say nothing; who has not said who they are has to do that till then, whatever comes meanwhile.
    fn patience(&self) -> Instant {
        let since = if self.source.is_known() { self.heard } else { self.since };
        since + self.source.silence()
    }

    fn look_at_time(&mut self, token: u64, snapshots: &mut Snapshots, now: Instant) {
        if self.ending.is_some_and(|until| now >= until) {
            self.end(snapshots, "it was given up here, and was not closed there");
        } else if now >= self.patience() {
            let patience = self.source.silence().as_secs_f32();
            let mut why = format!("nothing was heard from it for {patience} s");
            if !self.source.is_known() {
                why = format!("it did not say who it is in {patience} s");
                tracing::warn!("connection {token} from {}: {why}", self.stream.peer());
            }
            self.end(snapshots, &why);
        }
    }

    /// The connection is gone.
    fn end(&mut self, snapshots: &mut Snapshots, why: &str) {
        let (peer, host) = (self.stream.peer(), self.source.host());
        self.torn |= self.source.is_busy(snapshots);
        if self.torn || !(self.source.is_between() || self.source.is_over()) {
            tracing::warn!("the connection to {host} ({peer}) was lost: {why}");
        } else {
            tracing::debug!("the connection to {host} ({peer}) has ended: {why}");
        }
        snapshots.lost(self.source.id(), why);
        self.count(snapshots, 0);
        self.source.leave(snapshots);
        self.ended = true;
    }

    /// Sends what waits.
    fn write(&mut self) {
        if self.ended {
            return;
        }
        if let Err(e) = push(&mut self.stream, self.source.out()) {
            // What came before the end is still to be read; the end itself is seen there.
            tracing::debug!("nothing can be sent to {}: {e}", self.stream.peer());
            self.source.out().clear();
        }
        if self.ending.is_some() && self.source.out().is_empty() && !self.said_last {
            self.said_last = true;
            // The reason has gone out; the other side closes when it has read it.
            let _ = self.stream.end();
        }
    }
}

/// Sends as much as is taken now.
fn push(stream: &mut Stream, out: &mut Vec<u8>) -> io::Result<()> {
    let mut sent = 0;
    let result = loop {
        let rest = out.get(sent..).unwrap_or_default();
        if rest.is_empty() {
            break stream.flush().map(|_| ());
        }
        match stream.write(rest) {
            Ok(count) => sent += count,
            Err(e) => break Err(e),
        }
    };
    out.drain(..sent);
    if out.is_empty() {
        // An idle connection takes nothing.
        *out = Vec::new();
    }
    match result {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
        _ => Ok(()),
    }
}
