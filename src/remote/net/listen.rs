//! Waiting for connections: which addresses, and what is wrong with them.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, accept4, bind, listen, setsockopt,
    sockopt,
};

use super::tls::TlsServer;
use super::{NetError, Stream, peer_of, resolve, std_address};
use crate::sys;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// The sockets on which one daemon waits for connections; several if its name stands for several addresses.
#[derive(Debug)]
pub struct Listeners {
    sockets: Vec<(OwnedFd, SocketAddr)>,
    timeout: Duration,
    tls: Option<TlsServer>,
}

impl Listeners {
    /// Listens on `address`, a name or a number; on all of this host, IPv4 and IPv6, if `None`. Port 0 is any.
    /// Names are resolved here, within `timeout`.
    pub fn open(address: Option<&str>, port: u16, timeout: Duration) -> Result<Self, NetError> {
        let addresses = match address {
            Some(name) => resolve::now(name, port, timeout)?,
            None => vec![SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))],
        };
        let mut sockets: Vec<(OwnedFd, SocketAddr)> = Vec::new();
        for wanted in addresses {
            let mut wanted = wanted;
            // One port for all, also where it is the kernel's choice.
            if let Some((_, first)) = sockets.first() {
                wanted.set_port(first.port());
            }
            let socket = match open(wanted) {
                // A kernel without IPv6.
                Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) if address.is_none() => {
                    wanted = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
                    open(wanted)
                }
                other => other,
            };
            match socket {
                Ok(socket) => sockets.push(socket),
                // "localhost" has an IPv6 address in the hosts file of machines that have no IPv6.
                Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) if !sockets.is_empty() => {}
                Err(errno) => return Err(NetError::Listen { address: wanted, errno }),
            }
        }
        Ok(Self { sockets, timeout, tls: None })
    }

    /// Speaks TLS with whoever connects.
    #[must_use]
    pub fn with_tls(self, tls: TlsServer) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// Can other hosts connect?
    pub fn is_reachable(&self) -> bool {
        self.sockets.iter().any(|(_, addr)| !addr.ip().to_canonical().is_loopback())
    }

    /// The port, also where it was left to the kernel.
    #[cfg(test)]
    pub fn port(&self) -> u16 {
        self.sockets.first().map_or(0, |(_, addr)| addr.port())
    }

    /// The sockets, to be watched for reading.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|(fd, _)| fd.as_fd())
    }

    /// Where it listens, for messages: "[::]:9996".
    pub fn addresses(&self) -> String {
        self.sockets.iter().map(|(_, addr)| addr.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// Takes a connection that waits at one of the sockets, if there is one.
    pub fn accept(&self) -> io::Result<Option<Stream>> {
        for (fd, _) in &self.sockets {
            if let Some(fd) = accept(fd.as_fd())? {
                let peer = peer_of(&fd);
                let stream = Stream::new(fd, peer, self.timeout)?;
                return match &self.tls {
                    Some(tls) => stream.secured_server(tls).map(Some),
                    None => Ok(Some(stream)),
                };
            }
        }
        Ok(None)
    }
}

/// Takes a connection that waits at `listener`, if there is one.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            Ok(fd) => return Ok(Some(sys::fd::adopt(fd)?)),
            Err(Errno::EAGAIN) => return Ok(None),
            // It was there and is gone again; accept(2) also passes on errors of the network.
            Err(
                Errno::EINTR
                | Errno::ECONNABORTED
                | Errno::EPROTO
                | Errno::ENETDOWN
                | Errno::ENOPROTOOPT
                | Errno::EHOSTDOWN
                | Errno::ENONET
                | Errno::EHOSTUNREACH
                | Errno::EOPNOTSUPP
                | Errno::ENETUNREACH,
            ) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn open(address: SocketAddr) -> Result<(OwnedFd, SocketAddr), Errno> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(family, SockType::Stream, flags, None)?;
    // Connections of an earlier daemon that linger in the kernel are no hindrance; a living one is.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &!address.ip().is_unspecified())?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    let bound: SockaddrStorage = socket::getsockname(fd.as_raw_fd())?;
    Ok((fd, std_address(&bound).unwrap_or(address)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn what_cannot_be_listened_on() {
        let one = Listeners::open(Some("127.0.0.1"), 0, PATIENCE).unwrap();
        assert!(!one.is_reachable());
        assert_eq!(one.addresses(), format!("127.0.0.1:{}", one.port()));
        let busy = Listeners::open(Some("127.0.0.1"), one.port(), PATIENCE).unwrap_err().to_string();
        assert!(busy.contains("Address already in use; is another image-cache running?"), "{busy}");
        let busy = Listeners::open(None, one.port(), PATIENCE).unwrap_err().to_string();
        assert!(busy.contains("Address already in use"), "{busy}");
        let foreign = Listeners::open(Some("192.0.2.1"), 0, PATIENCE).unwrap_err().to_string();
        assert!(foreign.contains("192.0.2.1:0") && foreign.contains("an address of this host"), "{foreign}");
        assert!(Listeners::open(None, 0, PATIENCE).unwrap().is_reachable());
        assert!(one.accept().unwrap().is_none());
    }
}
