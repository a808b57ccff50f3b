//! The proxy's one thread: what has happened, the clock, and what is sent.
//!
//! Order of a turn: what has happened is taken in, then the clock is looked at, then as much is sent as the
//! connection takes. Nothing waits for anything but the poll. What is done with frames, answers, last words and requests
//! stands in the modules beside this one; here is what they share.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::client::Client;
use super::link::{Dial, Link};
use super::snapshot::{Phase, Snapshot};
use crate::remote::pb::local_reply::What as Reply;
use crate::remote::poll::{Event, Interest, Poll};
use crate::remote::{Failure, pb::FailCode};

/// Processes at the socket at once.
pub(super) const MAX_CLIENTS: usize = 256;
/// Longest reason, in bytes.
pub(super) const MAX_REASON: usize = 1000;
/// A frame that is there in part is looked at again so soon, since the pipe may not tell.
const RECHECK: Duration = Duration::from_millis(1);

pub(super) const LISTENER: u64 = 0;
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
    pub(super) poll: Poll,
    pub(super) door: Box<dyn Door>,
    pub(super) link: Link<D>,
    pub(super) rules: Rules,
    pub(super) clients: BTreeMap<u64, Client>,
    pub(super) snapshots: BTreeMap<u64, Snapshot>,
    /// Snapshots by their streams on the connection.
    pub(super) streams: HashMap<u32, u64>,
    pub(super) next_stream: u32,
    pub(super) next: u64,
    /// Snapshots that may have a frame, in turn.
    pub(super) ready: VecDeque<u64>,
    /// Since when the rest of a frame has not come, and what had been sent then.
    pub(super) starved: Option<(Instant, u64)>,
    /// The listener has more than may be taken now.
    pub(super) full: bool,
    /// Told to end; at this time at the latest.
    pub(super) ending: Option<Instant>,
    pub(super) spoilt: bool,
}

impl<D: Dial> Relay<D> {
    /// Listens at a UNIX socket that does not block.
    pub(super) fn new(dial: D, door: Box<dyn Door>, rules: Rules) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add(door.fd(), LISTENER, Interest::READ)?;
        if let Some(fd) = dial.fd() {
            poll.add(fd, DIAL, Interest::READ)?;
        }
        let mut link = Link::new(dial, rules.timeout, LINK);
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

    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Those of which `which` holds.
    pub(super) fn which(&self, which: impl Fn(&Snapshot) -> bool) -> Vec<u64> {
        self.snapshots.iter().filter(|(_, s)| which(s)).map(|(id, _)| *id).collect()
    }

    /// Says something to the dump of a snapshot, if it is to hear of it still.
    pub(super) fn tell_dump(&mut self, id: u64, what: Reply) {
        if let Some(client) =
            self.snapshots.get(&id).and_then(|s| s.dump).and_then(|dump| self.clients.get_mut(&dump))
        {
            client.reply(what);
        }
    }

    /// Refuses a snapshot to its dump, which hears of it no more.
    pub(super) fn dismiss(&mut self, id: u64, failure: &Failure) {
        self.tell_dump(id, Reply::Failed(failure.clone().into()));
        if let Some(s) = self.snapshots.get_mut(&id) {
            s.dump = None;
        }
    }

    /// Answers those who wait to hear what became of a snapshot.
    pub(super) fn tell_waiting(&mut self, id: u64, what: &Reply) {
        for client in self.clients.values_mut().filter(|c| c.waits.is_some_and(|(on, _)| on == id)) {
            client.waits = None;
            client.reply(what.clone());
        }
    }

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
        self.tick_snapshots(now);
        self.tick_clients(now);
        self.tick_starved(now);
        if self.full && self.ending.is_none() && self.clients.len() < MAX_CLIENTS {
            self.full = false;
            let _ = self.poll.modify(self.door.fd(), LISTENER, Interest::READ);
        }
    }

    fn tick_snapshots(&mut self, now: Instant) {
        for id in self.which(|s| s.phase != Phase::Over) {
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
            for id in self.which(|s| s.phase == Phase::Settled && !s.acked) {
                // Nobody knows when it can be told. The word stays.
                if let Some(client) =
                    self.snapshots.get(&id).and_then(|s| s.dump).and_then(|dump| self.clients.get_mut(&dump))
                {
                    client.waits = None;
                }
                self.dismiss(id, &failure);
            }
        }
    }

    fn tick_clients(&mut self, now: Instant) {
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
                let text = "the cache has not said in time what became of the snapshot";
                client.refuse(&Failure::new(FailCode::FailTimeout, text));
            }
        }
    }

    /// A dump that does not write the rest of its list of images keeps all others waiting.
    fn tick_starved(&mut self, now: Instant) {
        let Some((since, sent)) = self.starved else { return };
        match self.link.out.relaying().filter(|_| self.link.out.sent() == sent) {
            Some(id) if now.saturating_duration_since(since) >= self.rules.timeout / 4 => {
                let text = "the dump stopped in the middle of the list of images";
                self.fail(id, &Failure::new(FailCode::FailTimeout, text));
                self.starved = None;
            }
            Some(_) => {}
            None => self.starved = None,
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
        for id in self.which(|s| s.phase == Phase::Waiting) {
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
        let undone =
            |s: &Snapshot| s.phase <= Phase::Sending || s.phase == Phase::Committed && s.watch.is_none();
        for id in self.which(undone) {
            self.fail(id, &failure);
        }
    }

    /// Whether there is nothing left to do.
    fn ended(&self, now: Instant) -> Option<Ended> {
        let open = self.which(|s| s.phase != Phase::Waiting && s.is_under_way());
        let (over, ended) = match self.ending {
            Some(by) => (now >= by || open.is_empty() && self.link.is_drained(), Ended::Well),
            // Those who must hear of it have their packets by now.
            None => {
                let lost = self.spoilt || !open.is_empty();
                let over = self.link.is_spent() && !self.snapshots.values().any(|s| s.watch.is_some());
                (over, if lost { Ended::Lost } else { Ended::Well })
            }
        };
        if over {
            for s in open.iter().filter_map(|id| self.snapshots.get(id)) {
                tracing::error!("{}: {}; image-proxy ends", s.name(), self.advice(s));
            }
        }
        over.then_some(ended)
    }
}
