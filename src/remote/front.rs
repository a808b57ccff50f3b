//! What a daemon listens to: TCP or a connection that it was given, its local socket, and signals.
//!
//! Everything that makes one may wait; nothing that the loop calls does.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signalfd::SignalFd;

use super::local::door::{Door, DoorError, LocalPeer};
use super::net::connect::{Connector, Target};
use super::net::listen::{self, Listeners};
use super::net::tls::TlsServer;
use super::net::{NetError, Stream};
use super::{CACHE_SOCKET, PROXY_SOCKET};
use crate::interrupt;
use crate::settings::{CacheSettings, ProxySettings};

/// A daemon that cannot start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FrontError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Door(#[from] DoorError),
    #[error("{action}")]
    Call { action: &'static str, source: Errno },
}

fn call(action: &'static str) -> impl Fn(Errno) -> FrontError {
    move |source| FrontError::Call { action, source }
}

/// All that a daemon listens to.
#[derive(Debug)]
pub struct Front {
    work_dir: PathBuf,
    local: Door,
    listeners: Option<Listeners>,
    given: Option<Stream>,
    kept: Vec<(String, OwnedFd)>,
    connector: Option<Connector>,
    signals: &'static SignalFd,
    /// Given up for a moment when no descriptor is left, so that who knocks can be turned away.
    spare: std::cell::RefCell<Option<OwnedFd>>,
}

impl Front {
    /// Opens what an image-cache listens to: TCP, or the connection it was given, and its local socket.
    pub fn cache(settings: &CacheSettings) -> Result<Self, FrontError> {
        let net = &settings.net;
        let (mut listeners, mut given) = (None, None);
        let tls = net.tls.as_ref().map(TlsServer::new).transpose()?;
        match net.ps_socket {
            Some(fd) => {
                let stream = Stream::given(fd, net.timeout)?;
                let peer = stream.peer().to_owned();
                given = Some(match &tls {
                    Some(tls) => {
                        stream.secured_server(tls).map_err(|source| NetError::Connect { peer, source })?
                    }
                    None => stream,
                });
            }
            None => {
                let opened = Listeners::open(net.address.as_deref(), net.port, net.timeout)?;
                if opened.is_reachable() && net.tls.is_none() {
                    tracing::warn!(
                        "listening on {} without --tls: whoever reaches that port can bring process trees, and see \
                         what it costs; use --tls, a firewall or --address",
                        opened.addresses()
                    );
                }
                listeners = Some(match tls {
                    Some(tls) => opened.with_tls(tls),
                    None => opened,
                });
            }
        }
        let front = Self::open(&settings.work_dir, CACHE_SOCKET, "image-cache", listeners, given, None)?;
        Ok(Self { kept: super::notify::take_kept(), ..front })
    }

    /// Opens what an image-proxy listens to: its local socket; and checks where it will connect to.
    pub fn proxy(settings: &ProxySettings) -> Result<Self, FrontError> {
        let net = &settings.net;
        let (mut given, mut connector) = (None, None);
        match net.ps_socket {
            Some(fd) => given = Some(Stream::given_client(fd, net)?),
            None => {
                let target = Target::new(net)?;
                let made = Connector::new(target).map_err(|error| {
                    call("epoll")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
                })?;
                connector = Some(made);
            }
        }
        Self::open(&settings.work_dir, PROXY_SOCKET, "image-proxy", None, given, connector)
    }

    fn open(
        work_dir: &Path,
        name: &str,
        daemon: &'static str,
        listeners: Option<Listeners>,
        given: Option<Stream>,
        connector: Option<Connector>,
    ) -> Result<Self, FrontError> {
        let signals = interrupt::watch().map_err(call("hold back of signals"))?;
        let local = Door::open(work_dir, name, daemon)?;
        let place = match (&listeners, &given, &connector) {
            (Some(listeners), _, _) => format!("listening on {}", listeners.addresses()),
            (_, Some(given), _) => format!("connected to {}", given.peer()),
            (_, _, Some(connector)) => format!("for the cache at {}", connector.target().name()),
            _ => String::new(),
        };
        tracing::info!("{daemon}: {place}, socket {}", local.path().display());
        let spare = std::cell::RefCell::new(spare());
        let kept = Vec::new();
        Ok(Self { work_dir: work_dir.to_owned(), local, listeners, given, kept, connector, signals, spare })
    }

    /// Where its socket is.
    pub fn work_dir(&self) -> &Path {
        &self.work_dir
    }

    /// Readable when the daemon is told to end. To be watched for reading.
    pub fn signals(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// Was the daemon told to end?
    pub fn is_told_to_end(&self) -> bool {
        match interrupt::check() {
            Ok(()) => false,
            Err(interrupted) => {
                tracing::info!("{interrupted}");
                true
            }
        }
    }

    /// The local socket, to be watched for reading.
    pub fn local(&self) -> BorrowedFd<'_> {
        self.local.fd()
    }

    /// Whoever connects from now on finds nobody there.
    pub fn stop_listening(&mut self) {
        self.listeners = None;
    }

    /// The TCP sockets, to be watched for reading; none with `--ps-socket`, and none of a proxy.
    pub fn listeners(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listeners.iter().flat_map(Listeners::fds)
    }

    /// Where it listens, for messages; nothing with `--ps-socket`, and of a proxy.
    pub fn addresses(&self) -> Option<String> {
        self.listeners.as_ref().map(Listeners::addresses)
    }

    /// The connection that was given with `--ps-socket`; the first time only.
    pub fn take_given(&mut self) -> Option<Stream> {
        self.given.take()
    }

    /// What the service manager has kept of an earlier cache; the first time only.
    pub fn take_kept(&mut self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.kept)
    }

    /// What makes connections to the cache; of a proxy without `--ps-socket`, the first time only.
    pub fn take_connector(&mut self) -> Option<Connector> {
        self.connector.take()
    }

    /// Takes a TCP connection that waits, if there is one.
    pub fn accept(&self) -> Option<Stream> {
        let listeners = self.listeners.as_ref()?;
        self.accepted(|| listeners.accept())
    }

    /// Takes a local process that waits, if there is one. Who is not allowed here is sent away.
    pub fn accept_local(&self) -> Option<LocalPeer> {
        loop {
            if let Some(peer) = self.local.admit(self.accepted(|| listen::accept(self.local.fd()))?) {
                return Some(peer);
            }
        }
    }

    /// Takes what `accept` gives. A connection that cannot be taken is turned away: left waiting it would wake
    /// the loop again and again.
    fn accepted<T>(&self, accept: impl Fn() -> io::Result<Option<T>>) -> Option<T> {
        let error = match accept() {
            Ok(taken) => return taken,
            Err(error) => error,
        };
        tracing::warn!("a connection was turned away: {error}");
        if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
            drop(self.spare.take());
            drop(accept());
            drop(self.spare.replace(spare()));
        }
        None
    }
}

fn spare() -> Option<OwnedFd> {
    File::open("/dev/null").ok().map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    use std::fs;
    use std::time::Duration;

    use nix::unistd::getpid;

    use super::*;
    use crate::settings::{DaemonSettings, NetSettings};

    fn settings(dir: &Path) -> CacheSettings {
        let net = NetSettings {
            address: Some("127.0.0.1".to_owned()),
            port: 0,
            ps_socket: None,
            tls: None,
            timeout: Duration::from_secs(60),
        };
        CacheSettings {
            net,
            work_dir: dir.to_owned(),
            max_memory: None,
            spill: None,
            restore: None,
            max_per_source: None,
            at_once: 1,
            daemon: DaemonSettings::default(),
        }
    }

    #[test]
    fn the_socket_is_for_its_owner_and_goes_with_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let front = Front::cache(&settings(dir.path())).unwrap();
        let path = dir.path().join(CACHE_SOCKET);
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(front.accept_local().is_none() && front.accept().is_none());
        let error = Front::cache(&settings(dir.path())).unwrap_err().to_string();
        let wanted = format!("another image-cache (pid {}) uses it", getpid());
        assert!(error.contains(&wanted), "{error}");
        assert_eq!(front.accept_local().map(|peer| peer.pid), Some(getpid().as_raw()), "the probe");
        drop(front);
        assert!(!path.exists());
    }

    #[test]
    fn what_lies_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CACHE_SOCKET);
        fs::write(&path, "precious").unwrap();
        let error = Front::cache(&settings(dir.path())).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        // Of another kind, and alive.
        let other = UnixListener::bind(&path).unwrap();
        let error = Front::cache(&settings(dir.path())).unwrap_err().to_string();
        assert!(error.contains("another image-cache uses it"), "{error}");
        // Dead.
        drop(other);
        assert!(path.exists());
        drop(Front::cache(&settings(dir.path())).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn a_name_of_somebody_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CACHE_SOCKET);
        let front = Front::cache(&settings(dir.path())).unwrap();
        fs::rename(&path, dir.path().join("old")).unwrap();
        let second = Front::cache(&settings(dir.path())).unwrap();
        drop(front);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_work_dir_that_will_not_do() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(200));
        fs::create_dir(&deep).unwrap();
        let error = Front::cache(&settings(&deep)).unwrap_err().to_string();
        assert!(error.contains("longer than 107 bytes"), "{error}");
        let error = anyhow::Error::from(Front::cache(&settings(&dir.path().join("no"))).unwrap_err());
        assert!(format!("{error:#}").contains("/no: ENOENT"), "{error:#}");
    }
}
