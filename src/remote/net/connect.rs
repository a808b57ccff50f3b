//! Making a connection: a name may have several addresses, nobody may be there yet.
//!
//! [`Connector`] takes one step at a time and never waits. After a failure it rests for a moment and begins
//! again, for as long as its owner goes on asking; how long that is sensible is the owner's business.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockopt, socket, sockopt,
};

use super::resolve::{self, Question};
use super::tls::TlsClient;
use super::{LOOK, NetError, Stream};
use crate::interrupt;
use crate::remote::poll::{Interest, Poll};
use crate::settings::NetSettings;

/// Rest after the first failure; doubled after each further one.
const FIRST_REST: Duration = Duration::from_millis(50);
/// Longest rest.
const LONGEST_REST: Duration = Duration::from_millis(250);

/// Where to connect to, checked.
#[derive(Debug, Clone)]
pub struct Target {
    address: String,
    port: u16,
    timeout: Duration,
    tls: Option<TlsClient>,
}

impl Target {
    /// What `settings` say; certificates are read here. Without an address it is this host.
    pub fn new(settings: &NetSettings) -> Result<Self, NetError> {
        let address = settings.address.clone().unwrap_or_else(|| "localhost".to_owned());
        resolve::check(&address)?;
        let tls = match &settings.tls {
            Some(tls) => Some(TlsClient::new(tls, Some(&address))?),
            None => None,
        };
        Ok(Self { address, port: settings.port, timeout: settings.timeout, tls })
    }

    /// For messages: "dst.example:9996".
    pub fn name(&self) -> String {
        let bare = resolve::bare(&self.address);
        if bare.contains(':') { format!("[{bare}]:{}", self.port) } else { format!("{bare}:{}", self.port) }
    }
}

/// Where a [`Connector`] is.
#[derive(Debug)]
pub enum Progress {
    /// On its way.
    Pending,
    /// Here it is; the connector is at its beginning again.
    Ready(Stream),
    /// Not this time. It begins again at that time.
    Failed(NetError, Instant),
}

/// A connection in the making.
#[derive(Debug)]
pub struct Connector {
    target: Target,
    state: State,
    /// Watches what the state waits for: one descriptor to its owner, whatever that is.
    poll: Poll,
    rest: Duration,
}

#[derive(Debug)]
enum State {
    Resting { until: Instant },
    Resolving { question: Question, until: Instant },
    Trying { socket: OwnedFd, address: SocketAddr, left: Vec<SocketAddr>, until: Instant, all_until: Instant },
    Greeting { stream: Stream, until: Instant },
}

impl Connector {
    /// Begins at the first [`step`](Self::step).
    pub fn new(target: Target) -> io::Result<Self> {
        let state = State::Resting { until: Instant::now() };
        Ok(Self { target, state, poll: Poll::new()?, rest: FIRST_REST })
    }

    /// Where to, for messages.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Readable when [`step`](Self::step) can get on. The same descriptor all the time.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }

    /// When to take the next step even if [`fd`](Self::fd) stays silent.
    pub fn wake_at(&self) -> Instant {
        match &self.state {
            State::Resting { until }
            | State::Resolving { until, .. }
            | State::Trying { until, .. }
            | State::Greeting { until, .. } => *until,
        }
    }

    /// Gets on as far as is possible without waiting.
    pub fn step(&mut self, now: Instant) -> Progress {
        match self.advance(now) {
            Ok(Some(stream)) => {
                self.rest = FIRST_REST;
                self.state = State::Resting { until: now };
                Progress::Ready(stream)
            }
            Ok(None) => Progress::Pending,
            Err(error) => {
                let until = now + self.rest;
                self.rest = (self.rest * 2).min(LONGEST_REST);
                self.state = State::Resting { until };
                Progress::Failed(error, until)
            }
        }
    }

    fn failed(&self, source: io::Error) -> NetError {
        NetError::Connect { peer: self.target.name(), source }
    }

    fn advance(&mut self, now: Instant) -> Result<Option<Stream>, NetError> {
        loop {
            match std::mem::replace(&mut self.state, State::Resting { until: now }) {
                State::Resting { until } if now < until => {
                    self.state = State::Resting { until };
                    return Ok(None);
                }
                State::Resting { .. } => {
                    let all_until = now + self.target.timeout;
                    let (host, port) = (&self.target.address, self.target.port);
                    if let Some(ip) = resolve::number(host) {
                        self.try_next(vec![SocketAddr::new(ip, port)], now, all_until)?;
                    } else {
                        let question = Question::ask(host, port).map_err(|e| self.failed(e))?;
                        self.poll.add(question.fd(), 0, Interest::READ).map_err(|e| self.failed(e))?;
                        self.state = State::Resolving { question, until: all_until };
                    }
                }
                State::Resolving { question, until } => match question.answer() {
                    Some(answer) => self.try_next(answer?, now, until)?,
                    None if now < until => {
                        self.state = State::Resolving { question, until };
                        return Ok(None);
                    }
                    None => {
                        let why = "it does not resolve: no answer in time".to_owned();
                        return Err(NetError::Resolve { name: self.target.address.clone(), why });
                    }
                },
                State::Trying { socket, address, left, until, all_until } => {
                    let error = match has_connected(&socket) {
                        Ok(true) => {
                            let stream = Stream::new(socket, address.to_string(), self.target.timeout);
                            let stream = match &self.target.tls {
                                Some(tls) => stream.and_then(|stream| stream.secured_client(tls)),
                                None => stream,
                            };
                            let stream = stream.map_err(|e| self.failed(e))?;
                            self.state = State::Greeting { stream, until: all_until };
                            continue;
                        }
                        Ok(false) if now < until => {
                            self.state = State::Trying { socket, address, left, until, all_until };
                            return Ok(None);
                        }
                        Ok(false) => Errno::ETIMEDOUT,
                        Err(error) => error,
                    };
                    if left.is_empty() {
                        return Err(self.failed(error.into()));
                    }
                    tracing::debug!("connect to {address}: {}", error.desc());
                    self.try_next(left, now, all_until)?;
                }
                State::Greeting { mut stream, until } => match stream.greet() {
                    Ok(true) => {
                        self.poll.remove(stream.fd()).map_err(|e| self.failed(e))?;
                        return Ok(Some(stream));
                    }
                    Ok(false) if now < until => {
                        let watched = self.poll.modify(stream.fd(), 0, stream.interest());
                        watched.map_err(|e| self.failed(e))?;
                        self.state = State::Greeting { stream, until };
                        return Ok(None);
                    }
                    Ok(false) => return Err(self.failed(Errno::ETIMEDOUT.into())),
                    Err(source) => return Err(self.failed(source)),
                },
            }
        }
    }

    /// Begins with the first of these addresses that is not refused at once.
    fn try_next(
        &mut self,
        addresses: Vec<SocketAddr>,
        now: Instant,
        all_until: Instant,
    ) -> Result<(), NetError> {
        let mut addresses = std::collections::VecDeque::from(addresses);
        let mut refused = Errno::EDESTADDRREQ;
        while let Some(address) = addresses.pop_front() {
            match begin(address) {
                Ok(socket) => {
                    self.poll.add(socket.as_fd(), 0, Interest::WRITE).map_err(|e| self.failed(e))?;
                    // An address that does not answer leaves time for the others.
                    let others = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
                    let share = all_until.saturating_duration_since(now) / others.saturating_add(1);
                    let (left, until) = (Vec::from(addresses), now + share);
                    self.state = State::Trying { socket, address, left, until, all_until };
                    return Ok(());
                }
                Err(error) => refused = error,
            }
        }
        Err(self.failed(refused.into()))
    }
}

/// Sends the first packet.
fn begin(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS | Errno::EINTR) => Ok(fd),
        Err(error) => Err(error),
    }
}

/// Has the other side answered?
fn has_connected(socket: &OwnedFd) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(0) | Err(Errno::EINTR) => Ok(false),
        Ok(_) => match getsockopt(socket, sockopt::SocketError)? {
            0 => Ok(true),
            error => Err(Errno::from_raw(error)),
        },
        Err(error) => Err(error),
    }
}

impl Stream {
    /// What `settings` say: the connection that was given, or a new one, as [`connect`](Self::connect) makes it.
    pub fn to_cache(settings: &NetSettings, deadline: Instant, retry: bool) -> Result<Self, NetError> {
        let Some(fd) = settings.ps_socket else {
            return Self::connect(Target::new(settings)?, deadline, retry);
        };
        let given = Self::given_client(fd, settings)?;
        let peer = given.peer().to_owned();
        let failed = |source| NetError::Connect { peer: peer.clone(), source };
        let mut given = given;
        while !given.greet().map_err(failed)? {
            if given.wait(Interest::NONE, deadline)? == Interest::NONE {
                return Err(failed(Errno::ETIMEDOUT.into()));
            }
        }
        Ok(given)
    }

    /// The connection that was given, with TLS if that is wanted; its handshake is still to come then.
    pub fn given_client(fd: RawFd, settings: &NetSettings) -> Result<Self, NetError> {
        let tls =
            settings.tls.as_ref().map(|tls| TlsClient::new(tls, settings.address.as_deref())).transpose()?;
        let given = Self::given(fd, settings.timeout)?;
        let peer = given.peer().to_owned();
        match tls {
            Some(tls) => given.secured_client(&tls).map_err(|source| NetError::Connect { peer, source }),
            None => Ok(given),
        }
    }

    /// Connects, waiting until `deadline` at most. With `retry` somebody who is not there yet is waited for;
    /// without it the first failure counts.
    pub fn connect(target: Target, deadline: Instant, retry: bool) -> Result<Self, NetError> {
        let name = target.name();
        let started = |source| NetError::Connect { peer: name.clone(), source };
        let mut connector = Connector::new(target).map_err(started)?;
        let mut told = false;
        let mut last = None;
        loop {
            interrupt::check()?;
            let now = Instant::now();
            let wake_at = match connector.step(now) {
                Progress::Ready(stream) => return Ok(stream),
                Progress::Pending => connector.wake_at(),
                Progress::Failed(error, again_at) => {
                    // A certificate or a name does not get better by waiting.
                    if !retry || !error.may_pass() || again_at >= deadline {
                        return Err(error);
                    }
                    if !std::mem::replace(&mut told, true) {
                        tracing::info!("{error}; trying again");
                    }
                    last = Some(error);
                    again_at
                }
            };
            if now >= deadline {
                return Err(last.unwrap_or_else(|| started(Errno::ETIMEDOUT.into())));
            }
            let left = wake_at.min(deadline).saturating_duration_since(now).min(LOOK);
            let mut fds = [PollFd::new(connector.fd(), PollFlags::POLLIN)];
            // Not less than the millisecond that poll(2) counts in.
            let wait = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::ZERO);
            let _ = poll(&mut fds, wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::remote::net::listen::Listeners;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn target(address: &str, port: u16) -> Target {
        Target { address: address.to_owned(), port, timeout: PATIENCE, tls: None }
    }

    /// A port of 127.0.0.1 at which nobody listens: held by a socket that is bound and no more.
    fn silent_port() -> (OwnedFd, u16) {
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let any = SockaddrStorage::from(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        nix::sys::socket::bind(fd.as_raw_fd(), &any).unwrap();
        let bound: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd()).unwrap();
        let port = super::super::std_address(&bound).unwrap().port();
        (fd, port)
    }

    fn ready(connector: &mut Connector) -> Stream {
        let until = Instant::now() + PATIENCE;
        loop {
            match connector.step(Instant::now()) {
                Progress::Ready(stream) => return stream,
                Progress::Pending | Progress::Failed(..) => {
                    assert!(Instant::now() < until);
                    let mut fds = [PollFd::new(connector.fd(), PollFlags::POLLIN)];
                    poll(&mut fds, 20u8).unwrap();
                }
            }
        }
    }

    #[test]
    fn numbers_and_names_of_both_families() {
        for bound in [None, Some("127.0.0.1"), Some("localhost"), Some("[::1]"), Some("::")] {
            let listeners = Listeners::open(bound, 0, PATIENCE).unwrap();
            let port = listeners.port();
            let asked = match bound {
                None | Some("::") => &["127.0.0.1", "::1", "localhost"][..],
                Some(one) => &[one],
            };
            for host in asked {
                let far = ready(&mut Connector::new(target(host, port)).unwrap());
                let until = Instant::now() + PATIENCE;
                let near = loop {
                    if let Some(near) = listeners.accept().unwrap() {
                        break near;
                    }
                    assert!(Instant::now() < until);
                };
                assert!(far.peer().ends_with(&format!(":{port}")), "{}", far.peer());
                assert!(!near.peer().contains("ffff"), "mapped addresses are shown as IPv4: {}", near.peer());
            }
        }
    }

    #[test]
    fn a_refusal_says_where_and_what_to_do() {
        let (_held, port) = silent_port();
        let soon = Instant::now() + PATIENCE;
        let error = Stream::connect(target("127.0.0.1", port), soon, false).unwrap_err();
        let wanted =
            format!("connect to 127.0.0.1:{port}: Connection refused; is image-cache running there?");
        assert_eq!(error.to_string(), wanted);
    }

    #[test]
    fn who_comes_late_is_waited_for() {
        let (held, port) = silent_port();
        let mut connector = Connector::new(target("127.0.0.1", port)).unwrap();
        let until = Instant::now() + PATIENCE;
        let again_at = loop {
            assert!(Instant::now() < until);
            if let Progress::Failed(_, again_at) = connector.step(Instant::now()) {
                break again_at;
            }
        };
        assert!(matches!(connector.step(again_at - Duration::from_millis(1)), Progress::Pending));
        assert_eq!(connector.wake_at(), again_at);
        nix::sys::socket::listen(&held, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        ready(&mut connector);
        Stream::connect(target("127.0.0.1", port), until, true).unwrap();
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let (_held, port) = silent_port();
        let soon = Instant::now() + Duration::from_millis(120);
        let error = Stream::connect(target("127.0.0.1", port), soon, true).unwrap_err();
        assert!(error.to_string().contains("Connection refused"), "{error}");
        // A listener whose queue is full does not answer.
        let full = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = full.local_addr().unwrap().port();
        nix::sys::socket::listen(&full, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let mut held = Vec::new();
        let error = loop {
            let soon = Instant::now() + Duration::from_millis(300);
            match Stream::connect(target("127.0.0.1", port), soon, true) {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
            assert!(held.len() < 1000);
        };
        assert!(error.to_string().contains("timed out"), "{error}");
    }

    #[test]
    fn a_name_that_does_not_resolve() {
        let soon = Instant::now() + PATIENCE;
        let error = Stream::connect(target("no host.invalid", 1), soon, true).unwrap_err().to_string();
        assert!(error.starts_with("address no host.invalid: it does not resolve: "), "{error}");
    }
}
