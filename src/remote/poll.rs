//! Waiting for many descriptors at once, for the daemons' one thread.
//!
//! A thin layer over epoll: descriptors are borrowed, and told apart by tokens of the caller's. A descriptor that
//! is closed while it is watched is forgotten by the kernel; one that was duplicated or sent away must be
//! removed first.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Most events taken at once.
const EVENTS: usize = 64;

/// What a descriptor is watched for. Its end and errors are told in any case, also with nothing set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    /// Something can be read.
    pub read: bool,
    /// Something can be written.
    pub write: bool,
    /// Told once for each time that something came, not as long as it is there.
    pub edge: bool,
}

impl Interest {
    /// Errors only.
    pub const NONE: Self = Self { read: false, write: false, edge: false };
    /// Reading.
    pub const READ: Self = Self { read: true, write: false, edge: false };
    /// Writing.
    pub const WRITE: Self = Self { read: false, write: true, edge: false };
    /// Both.
    #[cfg(test)]
    pub const BOTH: Self = Self { read: true, write: true, edge: false };

    /// What either wants.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            read: self.read || other.read,
            write: self.write || other.write,
            edge: self.edge || other.edge,
        }
    }

    fn flags(self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, self.read);
        flags.set(EpollFlags::EPOLLOUT, self.write);
        flags.set(EpollFlags::EPOLLET, self.edge);
        flags
    }
}

/// What happened to a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Which, as the caller named it.
    pub token: u64,
    /// A read will not wait; it may tell the end or an error.
    pub readable: bool,
    /// A write will not wait; it may tell an error.
    pub writable: bool,
}

/// A set of watched descriptors.
#[derive(Debug)]
pub struct Poll {
    epoll: Epoll,
}

impl Poll {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Watches one more. EEXIST if it is watched already.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(interest.flags(), token))?)
    }

    /// Watches it for something else. ENOENT if it is not watched.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        let mut event = EpollEvent::new(interest.flags(), token);
        Ok(self.epoll.modify(fd, &mut event)?)
    }

    /// Watches it no longer. ENOENT if it is not watched.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    /// Waits for events, until `deadline` at the latest; for ever without one. May return none early.
    pub fn wait(&self, deadline: Option<Instant>) -> io::Result<Vec<Event>> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let n = match self.epoll.wait(&mut events, timeout(deadline)) {
            Ok(n) => n,
            Err(Errno::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let end = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        Ok(events
            .iter()
            .take(n)
            .map(|event| Event {
                token: event.data(),
                readable: event.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | end),
                writable: event.events().intersects(EpollFlags::EPOLLOUT | end),
            })
            .collect())
    }
}

/// Whole milliseconds, rounded up so that a deadline has passed when the wait for it is over; a day at most.
fn timeout(deadline: Option<Instant>) -> EpollTimeout {
    let Some(deadline) = deadline else { return EpollTimeout::NONE };
    let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_secs(86_400));
    let ms = left.as_nanos().div_ceil(1_000_000);
    i32::try_from(ms).ok().and_then(|ms| EpollTimeout::try_from(ms).ok()).unwrap_or(EpollTimeout::ZERO)
}

impl AsFd for Poll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(30))
    }

    #[test]
    fn what_comes_is_told() {
        let poll = Poll::new().unwrap();
        let (mut a, mut b) = UnixStream::pair().unwrap();
        poll.add(a.as_fd(), 7, Interest::READ).unwrap();
        assert_eq!(poll.wait(Some(Instant::now())).unwrap(), []);
        b.write_all(b"x").unwrap();
        let read = Event { token: 7, readable: true, writable: false };
        assert_eq!(poll.wait(soon()).unwrap(), [read]);
        assert_eq!(poll.wait(soon()).unwrap(), [read], "as long as it is there");
        poll.modify(a.as_fd(), 8, Interest::BOTH).unwrap();
        assert_eq!(poll.wait(soon()).unwrap(), [Event { token: 8, readable: true, writable: true }]);
        a.read_exact(&mut [0]).unwrap();
        poll.modify(a.as_fd(), 9, Interest::NONE).unwrap();
        assert_eq!(poll.wait(Some(Instant::now())).unwrap(), []);
        drop(b);
        assert_eq!(poll.wait(soon()).unwrap().first().map(|e| e.token), Some(9), "the end is always told");
        poll.remove(a.as_fd()).unwrap();
        assert_eq!(poll.wait(Some(Instant::now())).unwrap(), []);
    }

    #[test]
    fn an_edge_is_told_once_for_each_write() {
        let poll = Poll::new().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        poll.add(read.as_fd(), 1, Interest { edge: true, ..Interest::READ }).unwrap();
        for _ in 0..3 {
            nix::unistd::write(&write, b"x").unwrap();
            assert_eq!(poll.wait(soon()).unwrap().len(), 1);
            assert_eq!(poll.wait(Some(Instant::now())).unwrap(), []);
        }
    }

    #[test]
    fn a_wait_ends_after_its_deadline() {
        let poll = Poll::new().unwrap();
        let deadline = Instant::now() + Duration::from_micros(1500);
        poll.wait(Some(deadline)).unwrap();
        assert!(Instant::now() >= deadline);
    }
}
