//! The proxy's one thread: frames from dumps to the cache, answers back, and the last word of each snapshot.
//!
//! Order of a turn: what has happened is taken in, then the clock is looked at, then as much is sent as the
//! connection takes. Nothing waits for anything but the poll.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::client::Client;
use super::inbox::Heard;
use super::link::{CLOSED, Dial, Link, News};
use super::outbox::Pumped;
use super::pipe::{Next, Pipe};
use super::snapshot::{Phase, Snapshot, Word, unix_now};
use crate::remote::last_words::{Confirm, LastWord};
use crate::remote::local::Packet;
use crate::remote::pb::local_reply::What as Reply;
use crate::remote::pb::local_request::What as Request;
use crate::remote::pb::snapshot_info::State;
use crate::remote::poll::{Event, Interest, Poll};
use crate::remote::ring::Ring;
use crate::remote::wire::{self, FEATURE_LZ4, Kind, MAX_DATA};
use crate::remote::witness::{Verdict, Witness};
use crate::remote::{Failure, draw, name, pb, pb::FailCode};

/// Snapshots at once of which images come; each may hold a frame of [`MAX_DATA`] in memory.
const MAX_DUMPS: usize = 64;
/// Dumps at once that have a ring each.
const MAX_RINGS: usize = 8;
/// Processes at the socket at once.
const MAX_CLIENTS: usize = 256;
/// Snapshots that lists still show when they are over.
const HISTORY: usize = 1000;
/// Snapshots whose end is not known, the oldest of which are forgotten beyond that.
const MAX_OPEN: usize = 4000;
/// A frame that is there in part is looked at again so soon, since the pipe may not tell ...
const RECHECK: Duration = Duration::from_millis(1);
/// ... and is taken out of the pipe after this.
const GATHER_AFTER: Duration = Duration::from_millis(4);
/// Frames before what has happened is looked at again.
const FRAMES: usize = 256;
/// Requests of one process before others get their turn.
const REQUESTS: usize = 16;
/// Longest comm and host, in bytes.
const MAX_SHORT: usize = 255;
/// Longest reason.
const MAX_REASON: usize = 1000;

/// How often is looked what became of a tree whose dump is gone.
const LOOK: Duration = Duration::from_millis(50);
/// Whoever finishes the work of a dump that was killed takes no longer.
const FINISHED: Duration = Duration::from_secs(10);

const LISTENER: u64 = 0;
const STOP: u64 = 1;
const LINK: u64 = 2;
const DIAL: u64 = 4;
/// Numbers of clients and snapshots begin here; a token is twice that, and one more for a pipe.
const FIRST: u64 = 16;

/// How it works, besides where to.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    /// Longest silence of the cache, and longest wait for it to be there.
    pub(super) timeout: Duration,
    /// Longest time between being told to end and the end, for what cannot be taken back.
    pub(super) settle: Duration,
    /// Dumps shall compress.
    pub(super) compress: bool,
    /// Name of this host.
    pub(super) host: String,
    /// Where last words lie until the cache has them.
    pub(super) work_dir: Option<PathBuf>,
}

/// Where the processes of this host come in.
pub(super) trait Door: Debug {
    /// Readable when somebody waits.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Lets one in; the connection does not block. `None` when nobody waits.
    fn accept(&self) -> Option<OwnedFd>;
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Told to, or its only connection ended and nothing was lost by that.
    Well,
    /// Its only connection ended too early.
    Lost,
}

/// Everything.
#[derive(Debug)]
pub(super) struct Relay<D: Dial> {
    poll: Poll,
    door: Box<dyn Door>,
    link: Link<D>,
    rules: Rules,
    clients: BTreeMap<u64, Client>,
    snapshots: BTreeMap<u64, Snapshot>,
    /// Snapshots by their streams on the connection.
    streams: HashMap<u32, u64>,
    next_stream: u32,
    next: u64,
    /// Snapshots that may have a frame, in turn.
    ready: VecDeque<u64>,
    /// Since when the rest of a frame has not come, and what had been sent then.
    starved: Option<(Instant, u64)>,
    /// The listener has more than may be taken now.
    full: bool,
    /// Told to end; at this time at the latest.
    ending: Option<Instant>,
    spoilt: bool,
}

impl<D: Dial> Relay<D> {
    /// Listens at a UNIX socket that does not block.
    pub(super) fn new(dial: D, door: Box<dyn Door>, rules: Rules) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add(door.fd(), LISTENER, Interest::READ)?;
        if let Some(fd) = dial.fd() {
            poll.add(fd, DIAL, Interest::READ)?;
        }
        let hello = pb::Hello {
            version: wire::VERSION,
            features: FEATURE_LZ4,
            software: concat!("crtool ", env!("CARGO_PKG_VERSION")).to_owned(),
            host: rules.host.clone(),
            timeout_ms: u32::try_from(rules.timeout.as_millis()).unwrap_or(u32::MAX),
            ..pb::Hello::default()
        };
        let mut link = Link::new(dial, hello, rules.timeout, LINK);
        link.need(Instant::now());
        let mut relay = Self {
            poll,
            door,
            link,
            rules,
            clients: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            streams: HashMap::new(),
            next_stream: 1,
            next: FIRST,
            ready: VecDeque::new(),
            starved: None,
            full: false,
            ending: None,
            spoilt: false,
        };
        relay.take_over();
        Ok(relay)
    }

    /// Ends soon after this becomes readable.
    pub(super) fn stop_at(&self, stop: BorrowedFd<'_>) -> io::Result<()> {
        // Once is enough, and it is not read here.
        self.poll.add(stop, STOP, Interest { edge: true, ..Interest::READ })
    }

    /// Works until it is told to end.
    pub(super) fn run(&mut self) -> io::Result<Ended> {
        let mut busy = false;
        loop {
            let asked = Instant::now();
            let greets = self.dial(asked);
            let deadline = if busy || greets { Some(asked) } else { self.deadline() };
            let events = self.poll.wait(deadline)?;
            let now = Instant::now();
            for event in events {
                self.take(event, now);
            }
            if self.link.is_pending() {
                self.hear_cache(now);
            }
            self.tick(now);
            busy = self.send(now) || self.link.is_pending();
            if let Some(ended) = self.ended(now) {
                return Ok(ended);
            }
        }
    }

    fn take(&mut self, event: Event, now: Instant) {
        match event.token {
            LISTENER => self.accept(now),
            STOP => self.end_soon(now),
            DIAL => self.link.hurry(now),
            LINK => {
                if event.readable {
                    self.hear_cache(now);
                }
            }
            pipe if pipe % 2 == 1 => self.queue(pipe / 2),
            client => {
                let id = client / 2;
                if event.writable
                    && let Some(client) = self.clients.get_mut(&id)
                {
                    client.flush();
                }
                self.hear_client(id, now);
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    // ---- The clock.

    /// When something has to be done though nothing happens.
    fn deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let snapshots = self.snapshots.values().filter(|s| s.phase != Phase::Over).flat_map(|s| {
            [
                (s.phase == Phase::Waiting).then_some(s.deadline),
                s.watch.as_ref().map(|_| s.next_look),
                (s.partial.is_some() && !s.queued).then_some(now + RECHECK),
            ]
        });
        let clients = self.clients.values().flat_map(|c| [c.ask_by, c.waits.and_then(|(_, until)| until)]);
        let starved = self.starved.map(|(since, _)| since + self.rules.timeout / 4);
        snapshots.chain(clients).chain([self.link.deadline(now), starved, self.ending]).flatten().min()
    }

    fn tick(&mut self, now: Instant) {
        if let Err(failure) = self.link.keep_alive(now) {
            self.lose(&failure);
        }
        let ids: Vec<u64> =
            self.snapshots.iter().filter(|(_, s)| s.phase != Phase::Over).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(s) = self.snapshots.get(&id) else { continue };
            if s.phase == Phase::Waiting && (now >= s.deadline || self.link.is_spent()) {
                let text = match self.link.error() {
                    Some(why) => format!("no connection to the cache: {why}"),
                    None => format!("no connection to the cache: {} does not answer", self.link.target()),
                };
                self.fail(id, &Failure::new(FailCode::FailLost, text));
            } else if s.watch.is_some() && now >= s.next_look {
                self.look(id, now);
            } else if s.partial.is_some() {
                self.queue(id);
            }
        }
        if self.link.is_nobody() {
            let text = format!("no connection to the cache: {}", self.link.error().unwrap_or_default());
            let failure = Failure::new(FailCode::FailLost, text);
            let confirmed = |s: &&mut Snapshot| s.phase == Phase::Settled && !s.acked;
            for s in self.snapshots.values_mut().filter(confirmed) {
                // Nobody knows when it can be told. The word stays.
                if let Some(client) = s.dump.take().and_then(|dump| self.clients.get_mut(&dump)) {
                    client.waits = None;
                    refuse(client, &failure);
                }
            }
        }
        let ids: Vec<u64> = self.clients.keys().copied().collect();
        for id in ids {
            let Some(client) = self.clients.get_mut(&id) else { continue };
            if client.ask_by.is_some_and(|by| now >= by) {
                tracing::warn!("process {} connected and asked for nothing: dropped", client.pid);
                self.drop_client(id, now);
            } else if let Some((_, Some(until))) = client.waits
                && now >= until
            {
                client.waits = None;
                let text = "the cache has not said in time what became of the snapshot".to_owned();
                refuse(client, &Failure::new(FailCode::FailTimeout, text));
            }
        }
        if let Some((since, sent)) = self.starved {
            let id = self.link.out.relaying();
            if let Some(id) = id.filter(|_| self.link.out.sent() == sent) {
                if now.saturating_duration_since(since) >= self.rules.timeout / 4 {
                    let text = "the dump stopped in the middle of the list of images";
                    self.fail(id, &Failure::new(FailCode::FailTimeout, text));
                    self.starved = None;
                }
            } else {
                self.starved = None;
            }
        }
        if self.full && self.ending.is_none() && self.clients.len() < MAX_CLIENTS {
            self.full = false;
            let _ = self.poll.modify(self.door.fd(), LISTENER, Interest::READ);
        }
    }

    /// Goes on to connect as long as somebody needs it, and for a while after the start. Whether there is a connection
    /// now that was not there before: the other side says nothing before it was greeted.
    fn dial(&mut self, now: Instant) -> bool {
        let owed = |s: &Snapshot| s.phase == Phase::Waiting || s.owes() && !s.acked;
        let awaited = self.clients.values().any(|c| c.waits.is_some());
        if awaited || self.snapshots.values().any(owed) {
            self.link.need(now);
        }
        let open = self.link.is_open();
        let Some(failure) = self.link.dial(&self.poll, now) else { return self.link.is_open() && !open };
        // It will not get better by waiting.
        let waits = |s: &Snapshot| s.phase == Phase::Waiting;
        let ids: Vec<u64> = self.snapshots.iter().filter(|(_, s)| waits(s)).map(|(id, _)| *id).collect();
        for id in ids {
            self.fail(id, &failure);
        }
        false
    }

    /// Told to end: what can be taken back is, what cannot has a while to be settled.
    fn end_soon(&mut self, now: Instant) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(now + self.rules.settle);
        tracing::info!("told to end");
        let _ = self.poll.remove(self.door.fd());
        let failure = Failure::new(FailCode::FailLost, "image-proxy was told to end");
        let ids: Vec<u64> = self.snapshots.keys().copied().collect();
        for id in ids {
            match self.snapshots.get(&id) {
                Some(s) if s.phase <= Phase::Sending => self.fail(id, &failure),
                Some(s) if s.phase == Phase::Committed && s.watch.is_none() => self.fail(id, &failure),
                _ => {}
            }
        }
    }

    /// Whether there is nothing left to do.
    fn ended(&self, now: Instant) -> Option<Ended> {
        let open = |s: &Snapshot| s.phase != Phase::Waiting && s.is_under_way();
        if let Some(by) = self.ending {
            let settled = !self.snapshots.values().any(open) && self.link.is_drained();
            if settled || now >= by {
                for s in self.snapshots.values().filter(|s| open(s)) {
                    tracing::error!("{}: {}; image-proxy ends", s.name(), self.advice(s));
                }
                return Some(Ended::Well);
            }
            return None;
        }
        // Those who must hear of it have their packets by now.
        let spent = self.link.is_spent() && !self.snapshots.values().any(|s| s.watch.is_some());
        spent.then(|| {
            let open: Vec<&Snapshot> = self.snapshots.values().filter(|s| open(s)).collect();
            for s in &open {
                tracing::error!("{}: {}; image-proxy ends", s.name(), self.advice(s));
            }
            let lost = self.spoilt || !open.is_empty();
            if lost { Ended::Lost } else { Ended::Well }
        })
    }

    /// What is to be done by hand when the last word cannot be brought over.
    fn advice(&self, s: &Snapshot) -> String {
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
            Some(Word::Go { .. }) => format!(
                "{target} may run the tree, which is stopped here: `crtool migrate settle` asks, as soon as a proxy is there"
            ),
            None => format!(
                "{target} has all of it and was not told whether the tree is gone here: if process {} runs, \
                 `crtool image-cache drop {name}` there, else `crtool image-cache release {name}`",
                s.begin.pid
            ),
        }
    }

    // ---- Frames to the cache.

    fn queue(&mut self, id: u64) {
        if let Some(s) = self.snapshots.get_mut(&id)
            && s.pipe.is_some()
            && !std::mem::replace(&mut s.queued, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Sends as much as the connection takes; true if there is more to be done at once.
    fn send(&mut self, now: Instant) -> bool {
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
    fn relay(&mut self, id: u64, now: Instant) {
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
    fn pipe_ended(&mut self, id: u64, cut: bool, now: Instant) {
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

    fn close_pipe(&mut self, id: u64) {
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        let Some(pipe) = s.pipe.take() else { return };
        let _ = self.poll.remove(pipe.fd());
        s.partial = None;
        self.link.orphan(id, pipe.into_fd());
    }

    /// Opens the stream of a snapshot that has waited for the connection, and asks whether there is room for it.
    fn offer(&mut self, id: u64) {
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
    fn begin(&mut self, id: u64, room: pb::Room) {
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
    fn say_place(&mut self, id: u64) {
        let Some(s) = self.snapshots.get(&id).filter(|s| s.phase == Phase::Offered) else { return };
        if let (Some(place), Some(client)) = (s.place, s.dump.and_then(|dump| self.clients.get_mut(&dump))) {
            let timeout_ms = u32::try_from(self.rules.timeout.as_millis()).unwrap_or(u32::MAX);
            client.reply(Reply::Queue(pb::Queue { place, target: self.link.target(), timeout_ms }));
        }
    }

    /// The last word about a snapshot is known.
    fn settle(&mut self, id: u64, word: Word, now: Instant) {
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
            Word::Go { .. } => {
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
        s.ack_at = if matches!(word, Word::Go { .. }) { u64::MAX } else { self.link.ping(now) };
        if let Word::Abort { reason } = word
            && before < Phase::Committed
        {
            // The cache cannot have it all, and forgets it without this word too.
            self.over(id, State::Failed, &reason);
        }
    }

    /// Brings a last word over a new connection, if there is one.
    fn resume(&mut self, id: u64, now: Instant) {
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
            Some(Word::Go { .. }) => pb::resume::Verdict::Go(pb::Go {}),
            None => return,
        };
        let journal = if let Some(Word::Go { journal }) = s.word { journal } else { 0 };
        let resume =
            pb::Resume { name: s.begin.name.clone(), id: s.begin.id, verdict: Some(verdict), journal };
        s.stream = Some(stream);
        // A Pong proves nothing here: there is an answer of its own.
        s.ack_at = u64::MAX;
        self.next_stream += 1;
        self.streams.insert(stream, id);
        self.link.out.push(&wire::frame(Kind::Resume, stream, 0, &resume));
        self.link.ping(now);
    }

    /// The snapshot cannot go on, and nothing has happened to its tree.
    fn fail(&mut self, id: u64, failure: &Failure) {
        let Some(s) = self.snapshots.get_mut(&id).filter(|s| s.phase < Phase::Prepared) else { return };
        tracing::error!("{}: {}", s.name(), failure.text);
        if let Some(client) = s.dump.take().and_then(|dump| self.clients.get_mut(&dump)) {
            refuse(client, failure);
        }
        self.settle(id, Word::Abort { reason: failure.text.clone() }, Instant::now());
    }

    /// Nothing more happens to the snapshot.
    fn over(&mut self, id: u64, state: State, text: &str) {
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
        for client in self.clients.values_mut().filter(|c| c.waits.is_some_and(|(on, _)| on == id)) {
            client.waits = None;
            client.reply(Reply::Restored(outcome.clone()));
        }
        self.forget();
    }

    /// Keeps lists short.
    fn forget(&mut self) {
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

    // ---- What the cache says.

    fn hear_cache(&mut self, now: Instant) {
        for news in self.link.hear(now) {
            match news {
                News::Up => self.up(now),
                News::Lost(failure) => self.lose(&failure),
                News::Heard(heard) => {
                    if let Err(failure) = self.answer(heard) {
                        self.lose(&failure);
                    }
                }
            }
        }
    }

    fn up(&mut self, now: Instant) {
        tracing::info!("{}: {}", self.link.target(), self.link.state());
        let ids: Vec<u64> = self.snapshots.keys().copied().collect();
        // What is still in the way there is cleared first.
        for id in &ids {
            self.resume(*id, now);
        }
        for id in ids {
            if self.snapshots.get(&id).is_some_and(|s| s.phase == Phase::Waiting) {
                self.offer(id);
            }
        }
    }

    /// An answer; an error if no cache would send it.
    fn answer(&mut self, heard: Heard) -> Result<(), Failure> {
        let stream = match heard {
            Heard::Prepared(stream, _)
            | Heard::Failed(stream, _)
            | Heard::Restored(stream, _)
            | Heard::Armed(stream, _)
            | Heard::Fell(stream, _)
            | Heard::Room(stream, _)
            | Heard::Queue(stream, _) => stream,
            _ => {
                self.acked();
                let waits = |s: &Snapshot| s.phase == Phase::Offered && s.place.is_some();
                let ids: Vec<u64> =
                    self.snapshots.iter().filter(|(_, s)| waits(s)).map(|(id, _)| *id).collect();
                ids.into_iter().for_each(|id| self.say_place(id));
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
                if let Some(client) = s.dump.and_then(|dump| self.clients.get_mut(&dump)) {
                    client.reply(Reply::Prepared(prepared));
                }
                self.close_pipe(id);
            }
            (Heard::Armed(_, armed), Phase::Prepared) => {
                s.show(State::Armed, "");
                if let Some(client) = s.dump.and_then(|dump| self.clients.get_mut(&dump)) {
                    client.reply(Reply::Armed(armed));
                }
            }
            (Heard::Fell(_, mut fell), Phase::Settled) => {
                name::shorten(&mut fell.text, MAX_REASON);
                tracing::warn!("{}: it does not run there: {}", s.name(), fell.text);
                s.show(State::InDoubt, fell.text.as_str());
                for client in self.clients.values_mut().filter(|c| c.waits.is_some_and(|(on, _)| on == id)) {
                    client.waits = None;
                    client.reply(Reply::Fell(fell.clone()));
                }
            }
            // What was asked for comes later.
            (Heard::Armed(..), Phase::Settled) => {}
            (Heard::Prepared(..), Phase::Settled) => {
                if matches!(s.word, Some(Word::Confirm { .. })) {
                    tracing::info!("{}: the cache knows now that it may be restored", s.name());
                    s.show(State::Ready, "");
                    self.taken(id);
                } else if s.begin.run_first {
                    // Too late to have it back: what becomes of it there follows.
                    s.show(State::Starting, "it was let go there before it could be taken back");
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
    fn refused(&mut self, id: u64, phase: Phase, mut failed: pb::Failed) {
        name::shorten(&mut failed.text, MAX_REASON);
        let failure = Failure::from(failed);
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        match (phase, &s.word) {
            (Phase::Settled, Some(Word::Abort { reason })) => {
                let reason = reason.clone();
                self.over(id, State::Failed, &reason);
            }
            // It may have run under another cache: asked again when the connection is a new one.
            (Phase::Settled, Some(Word::Go { .. })) if failure.code == FailCode::FailNotFound => {
                tracing::error!("{}: {}; {}", s.name(), failure.text, "what became of the tree is not known");
                s.show(State::InDoubt, failure.text.as_str());
                for client in self.clients.values_mut().filter(|c| c.waits.is_some_and(|(on, _)| on == id)) {
                    client.waits = None;
                    refuse(client, &failure);
                }
            }
            (Phase::Settled, _) => {
                tracing::error!("{}: the cache does not have it any more: {}", s.name(), failure.text);
                self.over(id, State::Failed, &failure.text);
            }
            (Phase::Prepared, _) => {
                // Too late for the dump, which may be killing the tree, but for one that ends it last.
                if s.begin.run_first
                    && let Some(client) = s.dump.take().and_then(|dump| self.clients.get_mut(&dump))
                {
                    refuse(client, &failure);
                }
                let name = s.name();
                tracing::error!("{name}: the cache gave it up after it had all: {}", failure.text);
                self.over(id, State::Failed, &failure.text);
            }
            _ => {
                tracing::error!("{}: refused by {}: {}", s.name(), self.link.target(), failure.text);
                if let Some(client) = s.dump.take().and_then(|dump| self.clients.get_mut(&dump)) {
                    refuse(client, &failure);
                }
                self.over(id, State::Failed, &failure.text);
            }
        }
    }

    /// Last words that the cache is now known to have.
    fn acked(&mut self) {
        let pongs = self.link.pongs();
        let heard = |s: &Snapshot| s.phase == Phase::Settled && !s.acked && s.ack_at <= pongs;
        let ids: Vec<u64> = self.snapshots.iter().filter(|(_, s)| heard(s)).map(|(id, _)| *id).collect();
        for id in ids {
            match self.snapshots.get(&id).and_then(|s| s.word.clone()) {
                Some(Word::Abort { reason }) => self.over(id, State::Failed, &reason),
                _ => self.taken(id),
            }
        }
    }

    /// The cache is known to have the last word; the dump hears of it.
    fn taken(&mut self, id: u64) {
        let Some(s) = self.snapshots.get_mut(&id) else { return };
        s.acked = true;
        if let Some(work_dir) = &self.rules.work_dir {
            LastWord::forget(work_dir, s.begin.id);
        }
        if let Some(client) = s.dump.and_then(|dump| self.clients.get_mut(&dump)) {
            client.reply(Reply::Done(pb::Empty {}));
        }
    }

    /// Takes over what an earlier proxy, or a dump whose proxy was gone, had still to say.
    fn take_over(&mut self) {
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

    /// The connection is gone.
    fn lose(&mut self, failure: &Failure) {
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
        let ids: Vec<u64> = self.snapshots.keys().copied().collect();
        for id in ids {
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
                    if let Some(client) = s.dump.take().and_then(|dump| self.clients.get_mut(&dump)) {
                        refuse(client, &failure);
                    }
                    self.over(id, State::Failed, &failure.text);
                }
                // Go has not been said: the dump lets its tree go on.
                Phase::Prepared if s.begin.run_first && s.watch.is_none() => {
                    if let Some(client) = s.dump.take().and_then(|dump| self.clients.get_mut(&dump)) {
                        refuse(client, &failure);
                    }
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

    // ---- Processes of this host.

    fn accept(&mut self, now: Instant) {
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
    fn hear_client(&mut self, id: u64, now: Instant) {
        for _ in 0..REQUESTS {
            let Some(client) = self.clients.get_mut(&id) else { return };
            match client.receive() {
                Ok(Some(packet)) => {
                    client.ask_by = None;
                    if let Err(failure) = self.request(id, packet, now)
                        && let Some(client) = self.clients.get_mut(&id)
                    {
                        refuse(client, &failure);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // A stranger's packet harms nobody else.
                Err(e) if e.raw_os_error() == Some(libc::EBADMSG) => {
                    refuse(client, &Failure::new(FailCode::FailProtocol, "this is no request"));
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

    fn request(&mut self, id: u64, packet: Packet<pb::LocalRequest>, now: Instant) -> Result<(), Failure> {
        let odd = |text: &str| Err(Failure::new(FailCode::FailProtocol, text));
        let own = self.clients.get(&id).and_then(|c| c.snapshot);
        match packet.message.what {
            Some(Request::Open(begin)) => self.open(id, begin, now),
            Some(Request::Guard(_)) => {
                let s = own.and_then(|own| self.snapshots.get_mut(&own));
                let (Some(s), Some(client)) = (s, self.clients.get(&id)) else {
                    return odd("what is decided about a tree, and no snapshot of it");
                };
                let Some(decision) = packet.fds.into_iter().next() else {
                    return odd("what is decided about a tree, without a descriptor of it");
                };
                let witness = Witness::new(client.process(), decision).map_err(|e| {
                    Failure::new(FailCode::FailProtocol, format!("no witness of the dump: {e}"))
                })?;
                if s.phase <= Phase::Sending {
                    s.witness = Some(witness);
                }
                Ok(())
            }
            Some(Request::Confirm(confirm)) => {
                let phase = own.and_then(|own| self.snapshots.get(&own)).map(|s| s.phase);
                match (own, phase) {
                    (Some(own), Some(Phase::Prepared)) => {
                        if let Some(client) = self.clients.get_mut(&id) {
                            client.waits = Some((own, None));
                        }
                        self.settle(own, Word::Confirm { survives: confirm.survives }, now);
                        Ok(())
                    }
                    (Some(own), Some(Phase::Over)) => {
                        // It was given up over there, or restored by hand, before this word.
                        if let (Some(s), Some(client)) = (self.snapshots.get(&own), self.clients.get_mut(&id))
                        {
                            client.reply(Reply::Restored(s.outcome()));
                        }
                        Ok(())
                    }
                    _ => odd("the last word before the cache had all of the snapshot"),
                }
            }
            Some(Request::Go(_)) => {
                let journal = self.link.peer().map_or(0, |hello| hello.journal);
                let own = own.filter(|own| {
                    self.snapshots.get(own).is_some_and(|s| s.begin.run_first && s.phase >= Phase::Prepared)
                });
                let Some(own) = own else { return odd("Go before the cache had all of the snapshot") };
                let over = self.snapshots.get(&own).filter(|s| s.phase == Phase::Over).map(Snapshot::outcome);
                if let Some(client) = self.clients.get_mut(&id) {
                    match over {
                        Some(outcome) => client.reply(Reply::Restored(outcome)),
                        None => client.waits = Some((own, None)),
                    }
                }
                if self.snapshots.get(&own).is_some_and(|s| s.phase == Phase::Prepared) {
                    self.settle(own, Word::Go { journal }, now);
                }
                Ok(())
            }
            Some(Request::Resume(resume)) => self.resume_for(id, resume, now),
            Some(Request::Abort(mut abort)) => {
                name::shorten(&mut abort.reason, MAX_REASON);
                let live = own.filter(|own| {
                    self.snapshots.get(own).is_some_and(|s| {
                        s.phase <= Phase::Prepared
                            || s.phase == Phase::Settled && matches!(s.word, Some(Word::Go { .. }))
                    })
                });
                if let Some(own) = live {
                    if let Some(s) = self.snapshots.get_mut(&own) {
                        tracing::warn!("{}: given up by the dump: {}", s.name(), abort.reason);
                        s.dump = None;
                    }
                    self.settle(own, Word::Abort { reason: abort.reason }, now);
                }
                Ok(())
            }
            Some(Request::Status(_)) => {
                let infos = self.snapshots.values().map(Snapshot::info).collect();
                let daemon = format!(
                    "image-proxy (pid {}) to {}: {}",
                    std::process::id(),
                    self.link.target(),
                    self.link.state()
                );
                if let Some(client) = self.clients.get_mut(&id) {
                    client.reply_list(infos, &daemon);
                }
                Ok(())
            }
            Some(Request::WaitRestored(wait)) => {
                let newest = self.snapshots.iter().rev().find(|(_, s)| s.begin.name == wait.name);
                let Some((&on, s)) = newest else {
                    let text = format!("no snapshot {:?} has gone through this proxy", wait.name);
                    return Err(Failure::new(FailCode::FailNotFound, text));
                };
                let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
                if s.phase == Phase::Over {
                    client.reply(Reply::Restored(s.outcome()));
                } else {
                    client.waits = Some((on, now.checked_add(Duration::from_millis(wait.wait_ms))));
                }
                Ok(())
            }
            _ => odd("this is a request for image-cache, or one of another version; this is image-proxy"),
        }
    }

    /// Somebody settles what a dump has handed over, which is gone by now, through this proxy or another one.
    fn resume_for(&mut self, id: u64, resume: pb::Resume, now: Instant) -> Result<(), Failure> {
        name::check_snapshot(&resume.name)?;
        let word = match resume.verdict {
            Some(pb::resume::Verdict::Go(_)) => Word::Go { journal: resume.journal },
            Some(pb::resume::Verdict::Abort(mut abort)) => {
                name::shorten(&mut abort.reason, MAX_REASON);
                Word::Abort { reason: abort.reason }
            }
            _ => return Err(Failure::new(FailCode::FailProtocol, "this is not settled by a proxy")),
        };
        let known = self.snapshots.iter().rev().find(|(_, s)| resume.id != 0 && s.begin.id == resume.id);
        if let Some((_, s)) = known.filter(|(_, s)| s.phase == Phase::Over) {
            let outcome = s.outcome();
            if let Some(client) = self.clients.get_mut(&id) {
                client.reply(Reply::Restored(outcome));
            }
            return Ok(());
        }
        let key = match known.map(|(key, _)| *key) {
            Some(key) => key,
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
        if let Some(client) = self.clients.get_mut(&id) {
            client.waits = Some((key, None));
        }
        let Some(s) = self.snapshots.get_mut(&key) else { return Ok(()) };
        (s.phase, s.dump) = (Phase::Settled, None);
        if let Some(stream) = s.stream.take() {
            self.streams.remove(&stream);
        }
        s.word = Some(word);
        s.acked = false;
        s.show(State::InDoubt, "what became of the tree is asked");
        self.resume(key, now);
        Ok(())
    }

    fn open(&mut self, id: u64, mut begin: pb::SnapshotBegin, now: Instant) -> Result<(), Failure> {
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
    fn drop_client(&mut self, id: u64, now: Instant) {
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

    /// Finds out what became of a tree whose dump is gone.
    fn look(&mut self, id: u64, now: Instant) {
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
}

/// Keeps the last word about a snapshot for another proxy, should this one be killed before the cache has it.
fn write_down(work_dir: Option<&Path>, s: &Snapshot, target: &str) {
    let word = match &s.word {
        Some(Word::Confirm { survives }) => Ok(Confirm { survives: *survives }),
        Some(Word::Abort { reason }) => Err(reason.clone()),
        // Whoever says that keeps a journal.
        Some(Word::Go { .. }) | None => return,
    };
    let pb::SnapshotBegin { id, name, pid, .. } = &s.begin;
    let last = LastWord { id: *id, name: name.clone(), target: target.to_owned(), pid: *pid, word };
    if let Some(Err(error)) = work_dir.map(|work_dir| last.write(work_dir)) {
        tracing::warn!(
            "{name}: if image-proxy is killed now, the cache does not hear the last word: {error}"
        );
    }
}

fn refuse(client: &mut Client, failure: &Failure) {
    client.reply(Reply::Failed(failure.clone().into()));
}
