//! A connection between hosts, plain or with TLS, that never blocks.
//!
//! [`Stream`] moves bytes and knows nothing of frames. [`connect`] makes one, [`listen`] waits for one. A stream
//! with TLS looks the same; only its interest in the socket is not that of its user: see [`Stream::interest`].

pub mod connect;
pub mod listen;
pub mod resolve;
mod subject;
pub mod tls;

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    self, AddressFamily, MsgFlags, SockType, SockaddrLike as _, SockaddrStorage, getsockname, setsockopt,
    sockopt,
};

use self::tls::{Session, TlsClient, TlsServer};
use super::poll::Interest;
use super::ring::Ring;
use super::{Failure, pb::FailCode};
use crate::interrupt;

/// How long a signal may go unseen.
const LOOK: Duration = Duration::from_millis(100);

/// A connection that cannot be had, or was lost.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum NetError {
    #[error("descriptor {fd} given with --ps-socket: {why}")]
    Given { fd: RawFd, why: &'static str },
    #[error("option --{option}: {}: {why}", path.display())]
    TlsFile { option: &'static str, path: PathBuf, why: String },
    #[error("address {name}: {why}")]
    Resolve { name: String, why: String },
    #[error("listen on {address}: {}{}", errno.desc(), listen_hint(*errno))]
    Listen { address: SocketAddr, errno: Errno },
    #[error("connect to {peer}: {}{}", plainly(source), connect_hint(source))]
    Connect { peer: String, source: io::Error },
    #[error("{what} {peer}: {}", plainly(source))]
    Io { what: &'static str, peer: String, source: io::Error },
    #[cfg(test)]
    #[error("{peer}: the connection was closed")]
    Closed { peer: String },
    #[cfg(test)]
    #[error("{peer}: nothing moved for {} s", patience.as_secs_f32())]
    Silent { peer: String, patience: Duration },
    #[error(transparent)]
    Interrupted(#[from] interrupt::Interrupted),
}

/// What to do about an address that cannot be listened on.
fn listen_hint(error: Errno) -> &'static str {
    match error {
        Errno::EADDRINUSE => "; is another image-cache running? --port chooses another port",
        Errno::EADDRNOTAVAIL => "; --address is an address of this host, or left out for all of them",
        Errno::EACCES => "; ports below 1024 are for root",
        _ => "",
    }
}

/// What to do about somebody who is not there.
fn connect_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNREFUSED) => "; is image-cache running there?",
        Some(Errno::ETIMEDOUT | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => {
            "; is the address right, and the port open in the firewall?"
        }
        _ => "",
    }
}

impl NetError {
    /// May it be different in a moment, with nobody doing anything about it here?
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connect { source, .. } => source.raw_os_error().is_some(),
            // A host that has just started knows no names yet.
            Self::Resolve { .. } => true,
            _ => false,
        }
    }

    /// The host is there, and nobody listens.
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// What an error says, without the number that std puts behind it.
fn plainly(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    }
}

impl From<NetError> for Failure {
    fn from(error: NetError) -> Self {
        let code = match error {
            #[cfg(test)]
            NetError::Silent { .. } => FailCode::FailTimeout,
            NetError::Interrupted(_) => FailCode::FailAborted,
            _ => FailCode::FailLost,
        };
        Self::new(code, error.to_string())
    }
}

/// So many bytes at most wait in a socket that is shared: the kernel would take several MiB, each of which is a tenth of a second at
/// 100 Mbit/s.
const UNSENT: i32 = 1 << 20;

/// One connection. Nothing about it blocks, but for the methods whose names end in `within`.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    /// For messages.
    peer: String,
    /// The host of the other side.
    address: String,
    tls: Option<Box<Session>>,
}

impl Stream {
    /// A connection that was accepted or made. `timeout` is the longest silence that users of the stream bear.
    pub fn new(fd: OwnedFd, peer: String, timeout: Duration) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        if matches!(family(&fd), Some(AddressFamily::Inet | AddressFamily::Inet6)) {
            setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
            setsockopt(&fd, sockopt::KeepAlive, &true)?;
            // Twice: it also counts while the other side takes nothing, as a cache at its limit does.
            let timeout_ms = u32::try_from(timeout.as_millis().saturating_mul(2)).unwrap_or(u32::MAX);
            setsockopt(&fd, sockopt::TcpUserTimeout, &timeout_ms)?;
        }
        let address = host_of(&fd);
        Ok(Self { fd, peer, address, tls: None })
    }

    /// For the pages and last words of several trees: few bytes wait in the socket, so that a last word about one does not wait there
    /// behind the pages of another. What carries one tree only is a twentieth faster without.
    pub fn share(&self) {
        // On a socket of another family, and where it is not known, there is nothing to be limited.
        let _ = crate::sys::fd::limit_unsent(self.fd.as_fd(), UNSENT);
    }

    /// Speaks TLS from here on, as the side that connected.
    pub fn secured_client(self, tls: &TlsClient) -> io::Result<Self> {
        Ok(Self { tls: Some(Box::new(Session::client(tls, &self.peer)?)), ..self })
    }

    /// Speaks TLS from here on, as the side that accepted.
    pub fn secured_server(self, tls: &TlsServer) -> io::Result<Self> {
        Ok(Self { tls: Some(Box::new(Session::server(tls, &self.peer)?)), ..self })
    }

    /// The connection that the caller of this program handed over as descriptor `fd`.
    pub fn given(fd: RawFd, timeout: Duration) -> Result<Self, NetError> {
        let bad = |why| NetError::Given { fd, why };
        let owned = crate::sys::fd::dup(fd).map_err(|_| bad("it is not open"))?;
        match socket::getsockopt(&owned, sockopt::SockType) {
            Ok(SockType::Stream) => {}
            Ok(_) => return Err(bad("it is a socket, but no stream")),
            Err(_) => return Err(bad("it is no socket")),
        }
        if socket::getsockopt(&owned, sockopt::AcceptConn).unwrap_or(false) {
            return Err(bad("it listens; an established connection is wanted"));
        }
        if socket::getpeername::<SockaddrStorage>(owned.as_raw_fd()).is_err() {
            return Err(bad("it is not connected"));
        }
        // The number itself is of no use any more, and would keep the connection open.
        let _ = crate::sys::fd::give_up(fd);
        let peer = peer_of(&owned);
        Self::new(owned, peer.clone(), timeout).map_err(|source| NetError::Io {
            what: "connection to",
            peer,
            source,
        })
    }

    /// The socket, to be watched.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// No TLS: bytes can be spliced.
    pub fn is_plain(&self) -> bool {
        self.tls.is_none()
    }

    /// The other side, for messages: "192.0.2.7:9996".
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Who the other side is: the subject of its certificate once that is proven, else an address without port.
    pub fn origin(&self) -> &str {
        self.tls.as_ref().and_then(|tls| tls.subject()).unwrap_or(&self.address)
    }

    /// The other side has a certificate that is good.
    pub fn is_proven(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.subject().is_some())
    }

    /// Where the other side is: an address without port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// As if it came from there.
    pub fn from(self, origin: &str) -> Self {
        Self { address: origin.to_owned(), ..self }
    }

    /// Bytes of memory that it takes beside what the kernel has.
    pub fn buffered(&self) -> u64 {
        self.tls.as_ref().map_or(0, |tls| tls.buffered())
    }

    /// Whether something has come that [`read`](Self::read) does not give: the beginning of TLS.
    pub fn has_begun(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_begun())
    }

    /// What must be watched besides what the user of the stream wants.
    pub fn interest(&self) -> Interest {
        self.tls.as_ref().map_or(Interest::NONE, |tls| tls.interest())
    }

    /// Bytes have come that [`read`](Self::read) can give without the socket becoming readable. Who stops reading
    /// before `WouldBlock` must ask this before it waits.
    pub fn pending(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.pending())
    }

    /// Bytes that have come; 0 at the orderly end. WouldBlock when there are none; UnexpectedEof when the
    /// connection was cut.
    pub fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(tls) = &mut self.tls {
            return tls.read(self.fd.as_fd(), into);
        }
        again(|| socket::recv(self.fd.as_raw_fd(), into, MsgFlags::empty()))
    }

    /// Takes some of `from`. WouldBlock when nothing can be taken now. What was taken is on its way, but for what
    /// [`flush`](Self::flush) is for.
    pub fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if let Some(tls) = &mut self.tls {
            return tls.write(self.fd.as_fd(), &[IoSlice::new(from)]);
        }
        again(|| socket::send(self.fd.as_raw_fd(), from, MsgFlags::MSG_NOSIGNAL))
    }

    /// As [`write`](Self::write), from several places.
    pub fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        // UIO_MAXIOV: the kernel refuses more.
        let from = from.get(..from.len().min(1024)).unwrap_or_default();
        if let Some(tls) = &mut self.tls {
            return tls.write(self.fd.as_fd(), from);
        }
        again(|| socket::sendmsg::<()>(self.fd.as_raw_fd(), from, &[], MsgFlags::MSG_NOSIGNAL, None))
    }

    /// Moves at most `len` bytes out of a pipe without looking at them; plain connections only (EOPNOTSUPP). 0
    /// when the pipe has ended; WouldBlock when it is empty or the connection is full.
    pub fn splice_from(&mut self, pipe: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
        if !self.is_plain() {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        again(|| splice(pipe, None, self.fd.as_fd(), None, len, flags))
    }

    /// Takes some of `head` and of `len` bytes of `ring` behind it; plain connections only (EOPNOTSUPP). As
    /// [`write`](Self::write) otherwise.
    pub fn send_from(&mut self, head: &[u8], ring: &Ring, at: usize, len: usize) -> io::Result<usize> {
        if !self.is_plain() {
            return Err(Errno::EOPNOTSUPP.into());
        }
        loop {
            match ring.send(self.fd.as_fd(), head, at, len) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Pushes what is still held back; true when nothing is left that could be sent now. What waits for the
    /// handshake goes when the handshake does.
    pub fn flush(&mut self) -> io::Result<bool> {
        match &mut self.tls {
            Some(tls) => tls.push(self.fd.as_fd()),
            None => Ok(true),
        }
    }

    /// Gets on with the handshake of TLS, for who has nothing to read or write yet; true when it is done.
    pub fn greet(&mut self) -> io::Result<bool> {
        match &mut self.tls {
            Some(tls) => tls.greet(self.fd.as_fd()),
            None => Ok(true),
        }
    }

    /// Says that nothing more will be written. The other side reads to an orderly end.
    pub fn end(&mut self) -> io::Result<()> {
        match &mut self.tls {
            Some(tls) => tls.end(self.fd.as_fd()),
            None => shut(self.fd.as_fd()),
        }
    }

    /// Waits until the socket is ready for what is wanted (and what [`interest`](Self::interest) adds), a signal
    /// comes (an error then, if the process [watches](interrupt::watch)) or `until` has passed: nothing then.
    pub fn wait(&self, want: Interest, until: Instant) -> Result<Interest, NetError> {
        let want = want.and(self.interest());
        if want.read && self.pending() {
            return Ok(Interest::READ);
        }
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, want.read);
        flags.set(PollFlags::POLLOUT, want.write);
        loop {
            interrupt::check()?;
            let left = until.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.fd.as_fd(), flags)];
            let timeout = PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::ZERO);
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return Ok(Interest::NONE),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => {
                    let came = fds.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty());
                    let broken = PollFlags::POLLHUP | PollFlags::POLLERR;
                    let ready = Interest {
                        read: came.intersects(PollFlags::POLLIN | broken),
                        write: came.intersects(PollFlags::POLLOUT | broken),
                        edge: false,
                    };
                    return Ok(ready);
                }
                Err(source) => return Err(self.failed("wait for", source.into())),
            }
        }
    }

    /// Fills `into`, waiting; fails when nothing came for `patience`.
    #[cfg(test)]
    pub fn read_exact_within(&mut self, into: &mut [u8], patience: Duration) -> Result<(), NetError> {
        let mut done = 0;
        let mut until = Instant::now() + patience;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read(rest) {
                Ok(0) => return Err(NetError::Closed { peer: self.peer.clone() }),
                Ok(count) => {
                    done += count;
                    until = Instant::now() + patience;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.must_wait(Interest::READ, until, patience)?;
                }
                Err(source) => return Err(self.failed("read from", source)),
            }
        }
        Ok(())
    }

    /// Sends all of `from`, waiting; fails when nothing could be sent for `patience`.
    #[cfg(test)]
    pub fn write_all_within(&mut self, from: &[u8], patience: Duration) -> Result<(), NetError> {
        self.write_slices_within(&mut [IoSlice::new(from)], patience)
    }

    /// As [`write_all_within`](Self::write_all_within), from several places; the slices are used up.
    #[cfg(test)]
    pub fn write_slices_within(
        &mut self,
        from: &mut [IoSlice<'_>],
        patience: Duration,
    ) -> Result<(), NetError> {
        let mut from = from;
        // Takes the empty ones off the front.
        IoSlice::advance_slices(&mut from, 0);
        let mut until = Instant::now() + patience;
        loop {
            let step = if from.is_empty() {
                match self.flush() {
                    Ok(true) => return Ok(()),
                    Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
                    Err(error) => Err(error),
                }
            } else {
                self.write_vectored(from)
            };
            match step {
                Ok(count) => {
                    IoSlice::advance_slices(&mut from, count);
                    until = Instant::now() + patience;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // With TLS room may depend on what is read.
                    let want = if self.is_plain() { Interest::WRITE } else { self.interest() };
                    self.must_wait(want, until, patience)?;
                }
                Err(source) => return Err(self.failed("send to", source)),
            }
        }
    }

    #[cfg(test)]
    fn must_wait(&self, want: Interest, until: Instant, patience: Duration) -> Result<(), NetError> {
        if self.wait(want, until)? == Interest::NONE {
            return Err(NetError::Silent { peer: self.peer.clone(), patience });
        }
        Ok(())
    }

    fn failed(&self, what: &'static str, source: io::Error) -> NetError {
        NetError::Io { what, peer: self.peer.clone(), source }
    }
}

/// Ends the direction that goes out.
fn shut(fd: BorrowedFd<'_>) -> io::Result<()> {
    match socket::shutdown(fd.as_raw_fd(), socket::Shutdown::Write) {
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Repeats a call that a signal broke off.
fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

fn family(fd: &OwnedFd) -> Option<AddressFamily> {
    getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok()?.family()
}

/// The other end of a socket, for messages.
pub(crate) fn peer_of(fd: &OwnedFd) -> String {
    match socket::getpeername::<SockaddrStorage>(fd.as_raw_fd()) {
        Ok(address) => shown(&address),
        Err(_) => "a connection that is gone".to_owned(),
    }
}

/// The host at the other end of a socket; of IPv6 its network of 64 bits, all of which one host may use.
fn host_of(fd: &OwnedFd) -> String {
    let address = socket::getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|a| std_address(&a));
    match address.map(|address| address.ip().to_canonical()) {
        Some(IpAddr::V4(v4)) => v4.to_string(),
        Some(IpAddr::V6(v6)) => {
            let network = v6.to_bits() >> 64 << 64;
            format!("{}/64", std::net::Ipv6Addr::from_bits(network))
        }
        None => "a local socket".to_owned(),
    }
}

/// An address as people write it.
fn shown(address: &SockaddrStorage) -> String {
    match std_address(address) {
        Some(address) => SocketAddr::new(address.ip().to_canonical(), address.port()).to_string(),
        None => "a local socket".to_owned(),
    }
}

/// As std has it; `None` for other families.
fn std_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from(*v4));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from(*v6)))
}

#[cfg(test)]
mod tests;
