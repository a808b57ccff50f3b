//! Names of hosts to addresses. The resolver of the C library may take its time, so it has a thread of its own.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{LOOK, NetError};
use crate::{interrupt, sys};

/// The addresses of a name, in the order in which they are to be tried; at least one.
pub type Addresses = Vec<SocketAddr>;

/// A question that has been asked.
#[derive(Debug)]
pub(super) struct Question {
    name: String,
    answer: Receiver<io::Result<Addresses>>,
    /// The thread has the other end: its end is the news.
    done: OwnedFd,
}

/// The address in `name` if it is a number: `192.0.2.1`, `2001:db8::1`, `[2001:db8::1]`.
pub(super) fn number(name: &str) -> Option<IpAddr> {
    bare(name).parse().ok()
}

/// Without the brackets that IPv6 addresses often come in.
pub(super) fn bare(name: &str) -> &str {
    name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name)
}

/// A name that can never be one of a host. Whether there is such a host is another matter: names of hosts that are there come
/// late when a network does.
pub(super) fn check(name: &str) -> Result<(), NetError> {
    let scoped = name.contains('%');
    let fits = |c: char| c.is_alphanumeric() || "-._".contains(c);
    if number(name).is_some() || scoped || !name.is_empty() && name.chars().all(fits) {
        return Ok(());
    }
    let hint = if name.contains([':', '/']) { "; it is a host alone, --port takes the port" } else { "" };
    Err(NetError::Resolve {
        name: name.to_owned(),
        why: format!("it does not resolve: it is no name of a host{hint}"),
    })
}

impl Question {
    pub(super) fn ask(name: &str, port: u16) -> io::Result<Self> {
        let (send, answer) = channel();
        let (done, held) = sys::pipe::pipe2(libc::O_CLOEXEC | libc::O_NONBLOCK)?;
        let host = bare(name).to_owned();
        thread::Builder::new().name("resolver".to_owned()).spawn(move || {
            let found = (host.as_str(), port).to_socket_addrs().map(Vec::from_iter);
            // Nobody may want to know any more.
            let _ = send.send(found);
            drop(held);
        })?;
        Ok(Self { name: name.to_owned(), answer, done })
    }

    /// Readable when the answer is there.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// The answer, if it is there.
    pub(super) fn answer(&self) -> Option<Result<Addresses, NetError>> {
        let failed = |why: String| Some(Err(NetError::Resolve { name: self.name.clone(), why }));
        match self.answer.try_recv() {
            Ok(Ok(mut found)) => {
                let mut seen = Vec::new();
                found.retain(|address| {
                    let new = !seen.contains(address);
                    seen.push(*address);
                    new
                });
                if found.is_empty() { failed("it has no address".to_owned()) } else { Some(Ok(found)) }
            }
            Ok(Err(error)) => {
                let text = error.to_string();
                let why = text.strip_prefix("failed to lookup address information: ").unwrap_or(&text);
                failed(format!("it does not resolve: {why}"))
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => failed("the resolver failed".to_owned()),
        }
    }
}

/// Waits for the addresses of `name`, at most `timeout`.
pub fn now(name: &str, port: u16, timeout: Duration) -> Result<Addresses, NetError> {
    if let Some(ip) = number(name) {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    check(name)?;
    let failed = |why: String| NetError::Resolve { name: name.to_owned(), why };
    let question = Question::ask(name, port).map_err(|e| failed(e.to_string()))?;
    let until = Instant::now() + timeout;
    loop {
        if let Some(answer) = question.answer() {
            return answer;
        }
        interrupt::check()?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(format!("it does not resolve: no answer within {} s", timeout.as_secs_f32())));
        }
        let mut fds = [PollFd::new(question.fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::ZERO));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn numbers_need_no_resolver() {
        for (name, wanted) in [
            ("192.0.2.7", "192.0.2.7:5"),
            ("::1", "[::1]:5"),
            ("[2001:db8::1]", "[2001:db8::1]:5"),
            ("::", "[::]:5"),
        ] {
            let found = now(name, 5, Duration::ZERO).unwrap();
            assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), [wanted]);
        }
    }

    #[test]
    fn names_are_resolved() {
        let found = now("localhost", 7, PATIENCE).unwrap();
        assert!(
            !found.is_empty() && found.iter().all(|a| a.ip().is_loopback() && a.port() == 7),
            "{found:?}"
        );
    }

    #[test]
    fn what_is_no_name_is_named() {
        for name in ["", "a b", "not a host.invalid", "1.2.3.4.5", "a:7", "http://a"] {
            let error = now(name, 7, PATIENCE).unwrap_err().to_string();
            assert!(error.starts_with(&format!("address {name}: it ")) && !error.contains('\n'), "{error}");
            assert_eq!(check(name).is_err(), name != "1.2.3.4.5", "{name}");
        }
        for name in ["::1", "fe80::1%lo", "no-such-host.invalid", "a_b"] {
            assert!(check(name).is_ok(), "{name}");
        }
    }
}
