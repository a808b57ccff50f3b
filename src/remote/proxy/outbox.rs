//! What goes to the cache, in order: frames of ours and frames of dumps.
//!
//! Small things are put together in a buffer; the payload of a large frame of a dump stays in its pipe until the
//! connection takes it, by splice where the connection is plain, in small pieces through the buffer under
//! TLS; one in the ring of a dump is sent from there. While such a payload goes out, frames of ours wait behind it.
//!
//! A frame that has begun is always finished: with what its dump has written, or, if that is not to come, with
//! zeros. The checksum in its head gives those away, and the stream is aborted besides.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::pipe::{Payload, Rest};
use crate::remote::ring::Ring;
use crate::sys;

/// Frames are put together up to here.
const ENOUGH: usize = 64 << 10;
/// Up to here copying a payload out of the ring is cheaper than a call of its own.
const SMALL: usize = 16 << 10;

/// A connection that takes bytes without waiting for it.
pub(super) trait Sink {
    /// Whether [`Sink::splice_from`] can be used.
    fn is_plain(&self) -> bool;
    /// As `Write::write`; `WouldBlock` when it takes nothing now.
    fn write(&mut self, from: &[u8]) -> io::Result<usize>;
    /// Moves bytes out of a pipe; `WouldBlock` when the pipe is empty, or nothing is taken now.
    fn splice_from(&mut self, pipe: BorrowedFd<'_>, len: usize) -> io::Result<usize>;
    /// Takes `head` and `len` bytes of `ring` behind it; plain connections only. As `write` otherwise.
    fn send_from(&mut self, head: &[u8], ring: &Ring, at: usize, len: usize) -> io::Result<usize>;
    /// True when nothing waits inside it.
    fn flush(&mut self) -> io::Result<bool>;
}

/// Where a payload comes from.
#[derive(Debug)]
enum Source {
    /// The pipe of this dump.
    Dump(u64),
    /// The pipe of a dump that is given up otherwise.
    Orphan(OwnedFd),
    /// The ring of a dump, whatever becomes of the dump.
    Ring(Payload),
    /// Nowhere.
    Zeros,
}

#[derive(Debug)]
struct Tail {
    source: Source,
    left: usize,
    /// Whether it may still be on its way into the pipe.
    may_wait: bool,
}

impl Tail {
    /// So many bytes have been taken from it; of a ring, from the place where it begins.
    fn advance(&mut self, len: usize) {
        self.left -= len;
        if let Source::Ring(payload) = &mut self.source {
            payload.at += len;
        }
    }
}

/// How far it got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Everything is with the connection.
    Drained,
    /// The connection takes no more now.
    Blocked,
    /// The rest of a frame has not come into the pipe yet.
    Starved,
}

/// Bytes on their way.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    buffer: Vec<u8>,
    at: usize,
    tail: Option<Tail>,
    /// Frames of ours, behind the tail.
    behind: Vec<u8>,
    /// All that the connection has taken.
    sent: u64,
}

impl Outbox {
    /// Whether there is room for a frame of a dump.
    pub(super) fn has_room(&self) -> bool {
        self.tail.is_none() && self.buffer.len() - self.at < ENOUGH
    }

    /// A frame of ours.
    pub(super) fn push(&mut self, frame: &[u8]) {
        match self.tail {
            None => self.buffer.extend_from_slice(frame),
            Some(_) => self.behind.extend_from_slice(frame),
        }
    }

    /// A frame of a dump, only when there is room. `take` puts the first part of it into the buffer it is
    /// given; `may_wait` if the rest is not in the pipe yet.
    pub(super) fn relay(&mut self, dump: u64, may_wait: bool, take: impl FnOnce(&mut Vec<u8>) -> Rest) {
        match take(&mut self.buffer) {
            Rest::None => {}
            Rest::Pipe(left) => self.tail = Some(Tail { source: Source::Dump(dump), left, may_wait }),
            Rest::Ring(payload, left) => {
                if left > SMALL || payload.copy(left, &mut self.buffer).is_err() {
                    self.tail = Some(Tail { source: Source::Ring(payload), left, may_wait: false });
                }
            }
        }
    }

    /// The dump whose payload goes out now.
    pub(super) fn relaying(&self) -> Option<u64> {
        match self.tail {
            Some(Tail { source: Source::Dump(dump), .. }) => Some(dump),
            _ => None,
        }
    }

    /// The dump is given up; if its payload goes out now, what of it has come still does.
    pub(super) fn orphan(&mut self, dump: u64, pipe: OwnedFd) {
        if let Some(tail) = self.tail.as_mut().filter(|t| matches!(t.source, Source::Dump(d) if d == dump)) {
            tail.source = Source::Orphan(pipe);
            tail.may_wait = false;
        }
    }

    /// Nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.at == self.buffer.len() && self.tail.is_none() && self.behind.is_empty()
    }

    /// All bytes that the connection has taken.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Gives the connection what it takes. `pipe` finds the pipe of a dump.
    pub(super) fn pump<'a, S: Sink + ?Sized>(
        &mut self,
        sink: &mut S,
        pipe: impl Fn(u64) -> Option<BorrowedFd<'a>>,
    ) -> io::Result<Pumped> {
        loop {
            let ring = match &self.tail {
                Some(Tail { source: Source::Ring(payload), left, .. })
                    if *left > 0 && !payload.lost && sink.is_plain() =>
                {
                    Some((payload, *left))
                }
                _ => None,
            };
            if self.at < self.buffer.len() || ring.is_some() {
                let head = self.buffer.get(self.at..).unwrap_or_default();
                let taken = match ring {
                    Some((payload, left)) => sink.send_from(head, &payload.ring, payload.at, left),
                    None => sink.write(head),
                };
                match taken {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => {
                        let of_head = n.min(head.len());
                        self.at += of_head;
                        self.sent += n as u64;
                        if let Some(tail) = &mut self.tail {
                            tail.advance(n - of_head);
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Pumped::Blocked),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // Its dump has made holes in it, and there is no memory to fill them. Holes can be read.
                    Err(e) if e.raw_os_error() == Some(libc::EFAULT) && ring.is_some() => {
                        if let Some(Tail { source: Source::Ring(payload), .. }) = &mut self.tail {
                            payload.lost = true;
                        }
                    }
                    Err(e) => return Err(e),
                }
                continue;
            }
            self.buffer.clear();
            self.buffer.shrink_to(2 * ENOUGH);
            self.at = 0;
            let Some(tail) = &mut self.tail else {
                if self.behind.is_empty() {
                    return Ok(if sink.flush()? { Pumped::Drained } else { Pumped::Blocked });
                }
                std::mem::swap(&mut self.buffer, &mut self.behind);
                continue;
            };
            if tail.left == 0 {
                self.tail = None;
                continue;
            }
            let from = match &tail.source {
                Source::Dump(dump) => pipe(*dump),
                Source::Orphan(fd) => Some(fd.as_fd()),
                Source::Ring(payload) => {
                    let now = tail.left.min(ENOUGH);
                    payload.copy(now, &mut self.buffer)?;
                    tail.advance(now);
                    continue;
                }
                Source::Zeros => None,
            };
            let moved = match from {
                None => {
                    let n = tail.left.min(ENOUGH);
                    self.buffer.resize(n, 0);
                    tail.left -= n;
                    continue;
                }
                Some(from) if sink.is_plain() => sink.splice_from(from, tail.left),
                Some(from) => {
                    self.buffer.resize(tail.left.min(ENOUGH), 0);
                    let got = nix::unistd::read(from, &mut self.buffer).map_err(io::Error::from);
                    self.buffer.truncate(*got.as_ref().unwrap_or(&0));
                    got
                }
            };
            match moved {
                // What was said to be there is not.
                Ok(0) => tail.source = Source::Zeros,
                Ok(n) => {
                    tail.left -= n;
                    if sink.is_plain() {
                        self.sent += n as u64;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // Either side may be the reason, and only one can be asked.
                    let there = from.map_or(Ok(0), sys::pipe::readable_bytes);
                    if there.is_ok_and(|n| n > 0) && sink.is_plain() {
                        return Ok(Pumped::Blocked);
                    }
                    if tail.may_wait {
                        return Ok(Pumped::Starved);
                    }
                    tail.source = Source::Zeros;
                }
                Err(e) => return Err(e),
            }
        }
    }
}
