//! The one connection to the cache: made when it is needed, and given up when the other side is silent.
//!
//! What is said on it, and whether the other side lives, is for its [`Session`] to know.

use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::outbox::{Outbox, Pumped, Sink};
use crate::remote::net::Stream;
use crate::remote::net::connect::{Connector, Progress};
use crate::remote::poll::{Interest, Poll};
use crate::remote::ring::Ring;
use crate::remote::session::{Session, inbox::Heard};
use crate::remote::{Failure, pb, pb::FailCode};
use crate::sys;

/// How a connection ends of which nothing is wanted any more.
pub(super) const CLOSED: &str = "the cache closed the connection";
/// Read at once.
const CHUNK: usize = 16 << 10;
/// Reads in a row before others get their turn.
const READS: usize = 8;
/// Between two connections, growing as long as none is greeted.
const PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// A connection, whatever lies below it.
pub(super) trait Conn: Sink + Debug {
    /// As `Read::read`.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize>;
    /// For watching.
    fn fd(&self) -> BorrowedFd<'_>;
    /// What it must be watched for, for needs of its own.
    fn interest(&self) -> Interest;
    /// More can be read though the socket may not say so.
    fn pending(&self) -> bool;
    /// Several trees go over it.
    fn share(&self) {}
}

impl Sink for Stream {
    fn is_plain(&self) -> bool {
        self.is_plain()
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write(from)
    }

    fn splice_from(&mut self, pipe: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
        self.splice_from(pipe, len)
    }

    fn send_from(&mut self, head: &[u8], ring: &Ring, at: usize, len: usize) -> io::Result<usize> {
        self.send_from(head, ring, at, len)
    }

    fn flush(&mut self) -> io::Result<bool> {
        self.flush()
    }
}

impl Dial for Connector {
    type Conn = Stream;

    fn target(&self) -> String {
        self.target().name()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd())
    }

    fn step(&mut self, now: Instant) -> Dialed<Stream> {
        match self.step(now) {
            Progress::Pending => Dialed::Pending(self.wake_at()),
            Progress::Ready(stream) => Dialed::Ready(stream),
            Progress::Failed(error, again) => {
                let (for_good, nobody) = (!error.may_pass(), error.is_nobody());
                Dialed::Failed { why: error.to_string(), again, for_good, nobody }
            }
        }
    }

    fn is_spent(&self) -> bool {
        false
    }
}

/// A connection that somebody else made; there is no second one.
#[derive(Debug)]
pub(super) struct Given {
    stream: Option<Stream>,
    peer: String,
}

impl Given {
    /// This one.
    pub(super) fn new(stream: Stream) -> Self {
        Self { peer: stream.peer().to_owned(), stream: Some(stream) }
    }
}

impl Dial for Given {
    type Conn = Stream;

    fn target(&self) -> String {
        self.peer.clone()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn step(&mut self, now: Instant) -> Dialed<Stream> {
        match self.stream.take() {
            Some(stream) => Dialed::Ready(stream),
            None => {
                let why = "the connection that was given is gone".to_owned();
                Dialed::Failed { why, again: now + MAX_PAUSE, for_good: true, nobody: false }
            }
        }
    }

    fn is_spent(&self) -> bool {
        self.stream.is_none()
    }
}

impl Conn for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.read(into)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }

    fn interest(&self) -> Interest {
        self.interest()
    }

    fn pending(&self) -> bool {
        self.pending()
    }

    fn share(&self) {
        self.share();
    }
}

/// How to get a connection.
pub(super) trait Dial {
    /// What it makes.
    type Conn: Conn;
    /// The other side, for messages.
    fn target(&self) -> String;
    /// Readable when the next step can be taken.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// Takes the next step, without waiting.
    fn step(&mut self, now: Instant) -> Dialed<Self::Conn>;
    /// There is no second connection to be had.
    fn is_spent(&self) -> bool;
}

/// Where a [`Dial`] is.
#[derive(Debug)]
pub(super) enum Dialed<C> {
    /// On the way; ask again then.
    Pending(Instant),
    /// Here it is.
    Ready(C),
    /// Not this time; ask again then.
    Failed {
        /// The whole line.
        why: String,
        /// When to ask again.
        again: Instant,
        /// Somebody must change something first.
        for_good: bool,
        /// The host is there, and no cache.
        nobody: bool,
    },
}

/// The connection and what is known of it.
#[derive(Debug)]
pub(super) struct Link<D: Dial> {
    dial: D,
    conn: Option<D::Conn>,
    timeout: Duration,
    /// When to take the next step of dialing; not dialing if `None`.
    dial_at: Option<Instant>,
    session: Session,
    pub(super) out: Outbox,
    watched: Interest,
    token: u64,
    blocked: bool,
    /// Before the next connection.
    pause: Duration,
    not_before: Instant,
    error: Option<String>,
    /// There was no cache when it was last tried.
    nobody: bool,
}

impl<D: Dial> Link<D> {
    /// Not connected.
    pub(super) fn new(dial: D, timeout: Duration, token: u64) -> Self {
        let now = Instant::now();
        Self {
            dial,
            conn: None,
            timeout,
            dial_at: None,
            session: Session::new(timeout, now),
            out: Outbox::default(),
            watched: Interest::NONE,
            token,
            blocked: false,
            pause: PAUSE,
            not_before: now,
            error: None,
            nobody: false,
        }
    }

    /// The other side, for messages.
    pub(super) fn target(&self) -> String {
        self.dial.target()
    }

    /// Frames can be sent.
    pub(super) fn is_up(&self) -> bool {
        self.session.peer().is_some()
    }

    /// Neither connected nor about to be.
    pub(super) fn is_idle(&self) -> bool {
        self.conn.is_none() && self.dial_at.is_none()
    }

    /// There is a connection, greeted or not.
    pub(super) fn is_open(&self) -> bool {
        self.conn.is_some()
    }

    /// More has come than was read.
    pub(super) fn is_pending(&self) -> bool {
        self.conn.as_ref().is_some_and(Conn::pending)
    }

    /// It was connected once and cannot be again.
    pub(super) fn is_spent(&self) -> bool {
        self.conn.is_none() && self.dial.is_spent()
    }

    /// What the cache can do, as in `Hello`.
    pub(super) fn peer(&self) -> Option<&pb::Hello> {
        self.session.peer()
    }

    pub(super) fn features(&self) -> u64 {
        self.session.peer().map_or(0, |hello| hello.features)
    }

    /// Why there is no connection.
    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// The host of the cache is there, and no cache: what it had is gone.
    pub(super) fn is_nobody(&self) -> bool {
        self.nobody && self.conn.is_none()
    }

    /// For people.
    pub(super) fn state(&self) -> String {
        match (self.session.peer(), &self.error) {
            (Some(peer), _) => format!("connected to {} on {}", peer.software, peer.host),
            (None, Some(error)) => format!("not connected: {error}"),
            (None, None) => "not connected".to_owned(),
        }
    }

    /// There is work for it.
    pub(super) fn need(&mut self, now: Instant) {
        if self.is_idle() {
            self.dial_at = Some(now.max(self.not_before));
        }
    }

    /// Sends a Ping; the number that [`Self::pongs`] has reached once it is answered.
    pub(super) fn ping(&mut self, now: Instant) -> u64 {
        self.out.push(&self.session.ping(now));
        self.session.pings()
    }

    /// How many Pings have been answered.
    pub(super) fn pongs(&self) -> u64 {
        self.session.pongs()
    }

    /// The next step can be taken at once.
    pub(super) fn hurry(&mut self, now: Instant) {
        if self.dial_at.is_some() {
            self.dial_at = Some(now.max(self.not_before));
        }
    }

    /// Takes the next step of dialing if it is time. A failure that will not get better by waiting is returned.
    pub(super) fn dial(&mut self, poll: &Poll, now: Instant) -> Option<Failure> {
        if self.dial_at.is_none_or(|at| now < at) || self.conn.is_some() {
            return None;
        }
        let conn = match self.dial.step(now) {
            Dialed::Pending(again) => {
                self.dial_at = Some(again);
                return None;
            }
            Dialed::Failed { why, again, for_good, nobody } => {
                self.nobody = nobody;
                if self.error.as_ref() != Some(&why) {
                    tracing::warn!("{why}; trying again");
                }
                self.error = Some(why.clone());
                self.dial_at = Some(again);
                return for_good.then(|| lost(why));
            }
            Dialed::Ready(conn) => conn,
        };
        conn.share();
        self.dial_at = None;
        self.nobody = false;
        self.watched = Interest::READ;
        if let Err(e) = poll.add(conn.fd(), self.token, self.watched) {
            self.error = Some(e.to_string());
            return None;
        }
        self.session = Session::new(self.timeout, now);
        self.out = Outbox::default();
        self.out.push(&self.session.opening());
        self.conn = Some(conn);
        None
    }

    /// Reads what has come and appends it to `heard`; an error says why the connection is of no more use.
    pub(super) fn hear(&mut self, now: Instant, heard: &mut Vec<Heard>) -> Result<(), Failure> {
        let Some(conn) = &mut self.conn else { return Ok(()) };
        let mut chunk = [0; CHUNK];
        for _ in 0..READS {
            let n = match conn.read(&mut chunk) {
                Ok(0) => return Err(lost(CLOSED)),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // TLS that one of the two sides will not have: no try will change that.
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    return Err(Failure::new(FailCode::FailProtocol, e.to_string()));
                }
                Err(e) => return Err(lost(e.to_string())),
            };
            let greeted = self.session.peer().is_some();
            let fed = self.session.feed(chunk.get(..n).unwrap_or_default(), now, heard);
            if !greeted && self.session.peer().is_some() {
                (self.error, self.pause) = (None, PAUSE);
            }
            fed?;
        }
        Ok(())
    }

    /// Sends what can be sent.
    pub(super) fn pump<'a>(
        &mut self,
        pipe: impl Fn(u64) -> Option<BorrowedFd<'a>>,
    ) -> Result<Pumped, Failure> {
        let Some(conn) = &mut self.conn else { return Ok(Pumped::Blocked) };
        if !self.blocked
            && let Some(pong) = self.session.pong()
        {
            self.out.push(&pong);
        }
        let pumped = self.out.pump(conn, pipe).map_err(|e| lost(e.to_string()))?;
        self.blocked = pumped == Pumped::Blocked;
        Ok(pumped)
    }

    /// Tells the poll what is waited for.
    pub(super) fn watch(&mut self, poll: &Poll) -> Result<(), Failure> {
        let Some(conn) = &self.conn else { return Ok(()) };
        let mut want = Interest::READ.and(conn.interest());
        want.write |= self.blocked;
        if want != self.watched {
            poll.modify(conn.fd(), self.token, want).map_err(|e| lost(e.to_string()))?;
            self.watched = want;
        }
        Ok(())
    }

    /// Sends Pings, and gives up a silent cache.
    pub(super) fn keep_alive(&mut self, now: Instant) -> Result<(), Failure> {
        let Some(conn) = &self.conn else { return Ok(()) };
        let waiting = sys::fd::unsent(conn.fd()).unwrap_or(0);
        if let Some(ping) = self.session.look(now, (self.out.sent(), waiting), false)? {
            self.out.push(&ping);
        }
        Ok(())
    }

    /// When [`Self::keep_alive`] or [`Self::dial`] has something to do.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        if self.conn.is_none() {
            return self.dial_at;
        }
        Some(self.session.next_look(now))
    }

    /// Drops the connection. What has not gone out is lost.
    pub(super) fn close(&mut self, poll: &Poll, why: &Failure) {
        if let Some(conn) = self.conn.take() {
            let _ = poll.remove(conn.fd());
            self.error = Some(format!("{}: {}", self.dial.target(), why.text));
            self.not_before = Instant::now() + self.pause;
            self.pause = (self.pause * 2).min(MAX_PAUSE);
        }
        self.blocked = false;
        self.session = Session::new(self.timeout, Instant::now());
        self.out = Outbox::default();
    }

    /// Everything has been given to the connection.
    pub(super) fn is_drained(&self) -> bool {
        self.conn.is_none() || self.out.is_empty() && !self.blocked
    }

    /// The pipe of a dump that ends while its frame goes out.
    pub(super) fn orphan(&mut self, dump: u64, pipe: OwnedFd) {
        self.out.orphan(dump, pipe);
    }
}

fn lost(text: impl Into<String>) -> Failure {
    Failure::new(FailCode::FailLost, text)
}
