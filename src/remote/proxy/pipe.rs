//! The pipe that a dump writes frames into, read frame by frame.
//!
//! The connection to the cache is shared, and a frame that has begun there must be finished before the next one
//! of any dump. So a frame is handed on only when all of it is here: in the pipe, where it can be spliced from,
//! or in the buffer of this module. Which of the two:
//!
//! - Up to [`AHEAD`] bytes are read at once, so that small frames cost one call for many of them.
//! - The payload of a frame that fits into the pipe four times is waited for in the pipe. The pipe is watched
//!   by edges, and a writer that blocks in the middle of a long write makes none: [`Next::Partial`] asks for another
//!   look soon, and for [`Pipe::gather`] if that does not help.
//! - What is larger, or comes slowly, is gathered in the buffer, at most [`MAX_DATA`] and a little.
//! - Only a list of images longer than that ([`Kind::Commit`]) is handed on while it comes.
//! - What lies in the [ring](crate::remote::ring) is there already: only the head comes through the pipe.
//!
//! Which kinds a dump may send, and that none is malformed, is checked here; not which may follow which, nor
//! what is in them: the cache does that.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use crate::remote::ring::{Place, Ring};
use crate::remote::wire::{HEADER, Header, Kind, MAX_DATA};
use crate::remote::{Failure, pb::FailCode};
use crate::sys;

/// Bytes read beyond what is needed: whole small frames, or a little of a large one, which is copied then.
const AHEAD: usize = 4 << 10;
/// Up to here copying a payload is cheaper than a splice of its own.
const SMALL: usize = 16 << 10;
/// What the pipe is asked to hold: enough for the dump to go on while frames are sent.
const CAPACITY: u32 = 1 << 20;

/// What there is to relay.
#[derive(Debug)]
pub(super) enum Next {
    /// A frame: take it with [`Pipe::take`] before the next call.
    Frame(Header),
    /// Nothing; the pipe will tell.
    Empty,
    /// The beginning of a frame; the pipe may not tell when the rest is there.
    Partial,
    /// The writer is gone; `cut` in the middle of a frame.
    End {
        /// Some bytes of a frame were there.
        cut: bool,
    },
    /// No frame that a dump may send.
    Bad(Failure),
}

/// The reading end.
#[derive(Debug)]
pub(super) struct Pipe {
    fd: OwnedFd,
    capacity: usize,
    buffer: Vec<u8>,
    /// What of the buffer has been taken.
    at: usize,
    /// The frame whose head has been read.
    header: Option<Header>,
    gather: bool,
    ring: Option<Arc<Ring>>,
}

/// Where the rest of a frame is, once its head and what was buffered of it have been taken.
#[derive(Debug)]
pub(super) enum Rest {
    /// There is none.
    None,
    /// So many bytes of its payload are still in the pipe, or on their way into it.
    Pipe(usize),
    /// All of its payload is in the ring: where, and how many bytes.
    Ring(Payload, usize),
}

/// A payload in a ring, which stays there until this is gone.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) ring: Arc<Ring>,
    /// Where it begins, in bytes.
    pub(super) at: usize,
    /// It cannot be sent from where it is.
    pub(super) lost: bool,
}

impl Payload {
    /// Appends the first `len` bytes of it to `into`.
    pub(super) fn copy(&self, len: usize, into: &mut Vec<u8>) -> io::Result<()> {
        let old = into.len();
        into.resize(old + len, 0);
        let copied = self.ring.read(self.at, into.get_mut(old..).unwrap_or_default());
        if copied.is_err() {
            into.truncate(old);
        }
        copied
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        self.ring.free();
    }
}

impl Pipe {
    /// A new pipe, with a ring beside it if there shall be one, and the end for the dump.
    pub(super) fn new(ring: Option<Ring>) -> io::Result<(Self, OwnedFd)> {
        let (read, write) = sys::pipe::pipe2(libc::O_CLOEXEC)?;
        // A user near the limit for pipes gets a smaller one.
        let mut want = CAPACITY;
        while sys::pipe::set_capacity(read.as_fd(), want).is_err() && want > 1 << 16 {
            want /= 2;
        }
        Ok((Self::of(read, ring.map(Arc::new))?, write))
    }

    /// Makes the end non-blocking.
    fn of(fd: OwnedFd, ring: Option<Arc<Ring>>) -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let capacity = sys::pipe::capacity(fd.as_fd())? as usize;
        Ok(Self { fd, capacity, buffer: Vec::new(), at: 0, header: None, gather: false, ring })
    }

    /// For watching and splicing.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether there is a ring beside it.
    pub(super) fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Only the descriptor, when what is left of a frame shall be sent and nothing else.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Takes what has come of the frame out of the pipe instead of waiting for the rest there.
    pub(super) fn gather(&mut self) {
        self.gather = true;
    }

    /// Looks for the next frame.
    pub(super) fn next(&mut self) -> Next {
        match self.look() {
            Ok(next) => next,
            Err(Stop::Dry) => Next::Empty,
            Err(Stop::End) => Next::End { cut: self.header.is_some() || self.here() > 0 },
            Err(Stop::Bad(failure)) => Next::Bad(failure),
        }
    }

    fn look(&mut self) -> Result<Next, Stop> {
        let header = match self.header {
            Some(header) => header,
            None => {
                while self.here() < HEADER {
                    self.fill(HEADER - self.here())?;
                }
                let head = self.buffer.get(self.at..).and_then(<[u8]>::first_chunk).ok_or(Stop::Dry)?;
                let header = check(Header::decode(head)?, self.ring.is_some())?;
                self.at += HEADER;
                self.header = Some(header);
                header
            }
        };
        let len = header.len as usize;
        if header.stream != 0 {
            return Ok(Next::Frame(header));
        }
        if header.kind == Kind::Commit && header.len > MAX_DATA {
            return Ok(Next::Frame(header));
        }
        if len > self.here() + SMALL && len <= self.capacity / 4 && !self.gather {
            let there = sys::pipe::readable_bytes(self.fd.as_fd()).map_err(io::Error::from)?;
            let enough = self.here() + there as usize >= len;
            return Ok(if enough { Next::Frame(header) } else { Next::Partial });
        }
        while self.here() < len {
            self.fill(len - self.here())?;
        }
        Ok(Next::Frame(header))
    }

    /// Appends what is buffered of the frame to `into`, behind its head with `stream` in it.
    pub(super) fn take(&mut self, stream: u32, into: &mut Vec<u8>) -> Rest {
        let Some(header) = self.header.take() else { return Rest::None };
        let len = header.len as usize;
        let place = Place::decode(header.stream).and_then(|place| place.within(len)).zip(self.ring.clone());
        let buffered = if place.is_some() { 0 } else { len.min(self.here()) };
        into.extend_from_slice(&Header { stream, ..header }.encode());
        into.extend_from_slice(self.buffer.get(self.at..self.at + buffered).unwrap_or_default());
        self.at += buffered;
        self.gather = false;
        if self.at == self.buffer.len() {
            self.buffer.clear();
            self.at = 0;
            // The memory of a gathered frame is not kept for the small ones.
            self.buffer.shrink_to(AHEAD + SMALL);
        }
        match place {
            Some((at, ring)) => Rest::Ring(Payload { ring, at, lost: false }, len),
            None if len == buffered => Rest::None,
            None => Rest::Pipe(len - buffered),
        }
    }

    /// Bytes in the buffer.
    fn here(&self) -> usize {
        self.buffer.len() - self.at
    }

    /// Reads at least one byte; about `want`.
    fn fill(&mut self, want: usize) -> Result<(), Stop> {
        if self.at > 0 {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
        // In steps: memory is taken when bytes are there, not when they are announced.
        let step = (want + AHEAD).min(64 << 10);
        let old = self.buffer.len();
        self.buffer.resize(old + step, 0);
        let got = loop {
            match nix::unistd::read(&self.fd, self.buffer.get_mut(old..).unwrap_or_default()) {
                Err(Errno::EINTR) => {}
                other => break other,
            }
        };
        self.buffer.truncate(old + got.unwrap_or(0));
        match got {
            Ok(0) => Err(Stop::End),
            Ok(_) => Ok(()),
            Err(Errno::EAGAIN) => Err(Stop::Dry),
            Err(e) => Err(io::Error::from(e).into()),
        }
    }
}

/// Why there is no frame.
enum Stop {
    Dry,
    End,
    Bad(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Bad(failure)
    }
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Self {
        Self::Bad(Failure::new(FailCode::FailInternal, format!("read of the pipe of the dump: {e}")))
    }
}

/// What a dump may send.
fn check(header: Header, ring: bool) -> Result<Header, Failure> {
    let known =
        matches!(header.kind, Kind::ImageBegin | Kind::Data | Kind::Zero | Kind::ImageEnd | Kind::Commit);
    let placed = match Place::decode(header.stream) {
        None => true,
        Some(place) => ring && header.kind == Kind::Data && place.within(header.len as usize).is_some(),
    };
    if !known || !placed {
        let text = format!("bad frame: {:?} for stream {} from a dump", header.kind, header.stream);
        return Err(Failure::new(FailCode::FailProtocol, text));
    }
    Ok(header)
}
