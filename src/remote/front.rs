//! What a daemon is to the outside before it does anything: its sockets, its pid file, its place in the background.
//!
//! ```text
//!  caller        crtool image-cache -d         daemon
//!    │──────────────▶│ background()────fork──────▶│ Front::cache(): sockets
//!    │               │◀──────────────ready()──────│ pid file, status descriptor
//!    │◀─────status 0─│                            │ loop
//! ```
//!
//! The local socket is for the user who started the daemon, and for root: it has mode 0600 from its first moment
//! on, and who connects is looked at ([`Front::accept_local`]). Everything here may wait; nothing the loop calls does.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, UnixCredentials, bind, connect, listen,
    sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, Uid, geteuid, getpid, setsid};

use super::net::connect::{Connector, Target};
use super::net::listen::{self, Listeners};
use super::net::tls::TlsServer;
use super::net::{NetError, Stream};
use super::{CACHE_SOCKET, Failure, PROXY_SOCKET, local, pb};
use crate::pidfile::{self, PidfileError};
use crate::settings::{CacheSettings, DaemonSettings, ProxySettings};
use crate::{interrupt, sys};

/// Connections to the local socket that may wait to be accepted.
const BACKLOG: i32 = 128;
/// How long another daemon may take to put its socket into the same directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// A daemon that cannot start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FrontError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Pidfile(#[from] PidfileError),
    #[error("socket {}: another {daemon}{} uses it; stop that one, or choose another work dir (-W)", path.display(), of_pid(*pid))]
    Alive { path: PathBuf, daemon: &'static str, pid: Option<i32> },
    #[error("socket {}: a file of that name is there and is no socket; remove it or choose another work dir (-W)", path.display())]
    NoSocket { path: PathBuf },
    #[error("socket {}: the path is longer than 107 bytes; choose another work dir (-W)", path.display())]
    TooLong { path: PathBuf },
    #[error("{action} {}", path.display())]
    Path { action: &'static str, path: PathBuf, source: Errno },
    #[error("{action}")]
    Call { action: &'static str, source: Errno },
    #[error("write to status descriptor {fd}")]
    Status { fd: RawFd, source: io::Error },
}

fn of_pid(pid: Option<i32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

fn call(action: &'static str) -> impl Fn(Errno) -> FrontError {
    move |source| FrontError::Call { action, source }
}

/// Which of the two a process is after [`background`].
#[derive(Debug)]
pub enum Place {
    /// The daemon, or what may become one.
    Daemon(Readiness),
    /// The process that the caller started; the daemon is ready (true) or has failed and said why.
    Caller(bool),
}

/// Who waits to hear that the daemon is ready.
#[derive(Debug)]
pub struct Readiness {
    caller: Option<OwnedFd>,
}

/// Goes into the background, if that is asked for. To be called while there is one thread only.
pub fn background(settings: &DaemonSettings) -> Result<Place, FrontError> {
    if !settings.detach {
        return Ok(Place::Daemon(Readiness { caller: None }));
    }
    let (news, caller) = sys::pipe::pipe2(libc::O_CLOEXEC).map_err(call("pipe to the daemon"))?;
    match sys::fork::fork().map_err(call("fork of the daemon"))? {
        sys::fork::Side::Child => {
            drop(news);
            // Signals of the caller's terminal are not for it.
            setsid().map_err(call("new session of the daemon"))?;
            Ok(Place::Daemon(Readiness { caller: Some(caller) }))
        }
        sys::fork::Side::Parent(pid) => {
            drop(caller);
            let mut word = [0];
            let ready = loop {
                match nix::unistd::read(&news, &mut word) {
                    Err(Errno::EINTR) => {}
                    other => break other == Ok(1),
                }
            };
            if !ready {
                // It has said why it failed, and ends now; unless it was killed.
                match waitpid(Pid::from_raw(pid), None) {
                    Ok(WaitStatus::Signaled(_, signal, _)) => {
                        crate::log::failure(&format!(
                            "the daemon was killed by {signal} before it was ready"
                        ));
                    }
                    Ok(WaitStatus::Exited(_, 0)) => {
                        crate::log::failure("the daemon ended before it was ready")
                    }
                    _ => {}
                }
            }
            Ok(Place::Caller(ready))
        }
    }
}

impl Readiness {
    /// The daemon listens. Writes the pid file, tells the status descriptor and the caller; a daemon in the
    /// background lets go of terminal and current directory.
    pub fn ready(self, front: &mut Front, settings: &DaemonSettings) -> Result<(), FrontError> {
        if let Some(file) = &settings.pidfile {
            pidfile::write(&front.work_dir, file, getpid(), settings.owner_check)?;
            front.pidfile = Some(front.work_dir.join(file));
        }
        if self.caller.is_some() {
            let null = File::options().read(true).write(true).open("/dev/null").map_err(|error| {
                let source = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
                FrontError::Path { action: "open", path: "/dev/null".into(), source }
            })?;
            nix::unistd::chdir("/").map_err(call("change of directory to /"))?;
            nix::unistd::dup2_stdin(&null).map_err(call("dup2"))?;
            nix::unistd::dup2_stdout(&null).map_err(call("dup2"))?;
            nix::unistd::dup2_stderr(&null).map_err(call("dup2"))?;
        }
        if let Some(fd) = settings.status_fd {
            tell(fd).map_err(|source| FrontError::Status { fd, source })?;
        }
        if let Some(caller) = self.caller {
            // A caller that did not wait has gone its way.
            let _ = nix::unistd::write(&caller, &[0]);
        }
        Ok(())
    }
}

/// One zero byte, and closed.
fn tell(fd: RawFd) -> io::Result<()> {
    use std::io::Write as _;
    File::from(sys::fd::dup(fd)?).write_all(&[0])?;
    Ok(sys::fd::give_up(fd)?)
}

/// A process at the local socket, allowed to be there.
#[derive(Debug)]
pub struct LocalPeer {
    /// The connection, not blocking, SOCK_SEQPACKET.
    pub fd: OwnedFd,
    /// Whose it is.
    pub pid: i32,
}

/// All that a daemon listens to.
#[derive(Debug)]
pub struct Front {
    work_dir: PathBuf,
    pidfile: Option<PathBuf>,
    local: LocalSocket,
    listeners: Option<Listeners>,
    given: Option<Stream>,
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
        Self::open(&settings.work_dir, CACHE_SOCKET, "image-cache", listeners, given, None)
    }

    /// Opens what an image-proxy listens to: its local socket; and checks where it will connect to.
    pub fn proxy(settings: &ProxySettings) -> Result<Self, FrontError> {
        let net = &settings.net;
        let (mut given, mut connector) = (None, None);
        match net.ps_socket {
            Some(fd) => given = Some(Stream::given_client(fd, net)?),
            None => {
                let target = Target::new(net)?;
                // A mistyped name is told at once, not to the first dump.
                target.check_name()?;
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
        let local = LocalSocket::open(work_dir, name, daemon)?;
        let place = match (&listeners, &given, &connector) {
            (Some(listeners), _, _) => format!("listening on {}", listeners.addresses()),
            (_, Some(given), _) => format!("connected to {}", given.peer()),
            (_, _, Some(connector)) => format!("for the cache at {}", connector.target().name()),
            _ => String::new(),
        };
        tracing::info!("{daemon}: {place}, socket {}", local.path.display());
        let spare = std::cell::RefCell::new(spare());
        Ok(Self {
            work_dir: work_dir.to_owned(),
            pidfile: None,
            local,
            listeners,
            given,
            connector,
            signals,
            spare,
        })
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
        self.local.fd.as_fd()
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
            let fd = self.accepted(|| listen::accept(self.local.fd.as_fd()))?;
            let Ok(who) = socket::getsockopt(&fd, sockopt::PeerCredentials) else { continue };
            if is_allowed(&who) {
                return Some(LocalPeer { fd, pid: who.pid() });
            }
            tracing::warn!("uid {} (pid {}) was sent away: not our user", who.uid(), who.pid());
            let text = format!("this daemon is for uid {} and for root", geteuid());
            let failed = pb::Failed::from(Failure::new(pb::FailCode::FailDenied, text));
            let reply = pb::LocalReply { what: Some(pb::local_reply::What::Failed(failed)) };
            let _ = local::send(fd.as_fd(), &reply, &[]);
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

impl Drop for Front {
    fn drop(&mut self) {
        let Some(path) = self.pidfile.take() else { return };
        // Another daemon may have written its own since.
        if fs::read_to_string(&path).is_ok_and(|pid| pid == getpid().to_string()) {
            let _ = fs::remove_file(path);
        }
    }
}

fn spare() -> Option<OwnedFd> {
    File::open("/dev/null").ok().map(OwnedFd::from)
}

/// The user who runs the daemon, and root.
fn is_allowed(who: &UnixCredentials) -> bool {
    who.uid() == 0 || Uid::from_raw(who.uid()) == geteuid()
}

/// A socket with a name in the work dir. The name goes when this is dropped.
#[derive(Debug)]
struct LocalSocket {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the name, to know it again.
    id: (u64, u64),
}

impl LocalSocket {
    fn open(work_dir: &Path, name: &str, daemon: &'static str) -> Result<Self, FrontError> {
        let path = work_dir.join(name);
        let failed = |action: &'static str| {
            let path = path.clone();
            move |source| FrontError::Path { action, path, source }
        };
        let address = UnixAddr::new(&path).map_err(|_| FrontError::TooLong { path: path.clone() })?;
        // From looking at what is there until our own is, nobody else does the same.
        let _lock = lock(work_dir)?;
        match fs::symlink_metadata(&path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(FrontError::NoSocket { path }),
            Ok(_) => {
                if let Some(pid) = owner(&address) {
                    return Err(FrontError::Alive { path, daemon, pid });
                }
                tracing::info!("socket {}: left by a daemon that is gone", path.display());
                nix::unistd::unlink(&path).map_err(failed("remove"))?;
            }
            // Binding will say what is wrong.
            Err(_) => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
            .map_err(failed("make of socket"))?;
        // The name gets the mode that the socket has; so there is no moment at which it is open to others.
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(failed("make of socket"))?;
        bind(fd.as_raw_fd(), &address).map_err(failed("make of socket"))?;
        let meta = fs::symlink_metadata(&path).map_err(|error| {
            failed("make of socket")(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
        })?;
        let made = Self { fd, path: path.clone(), id: (meta.dev(), meta.ino()) };
        listen(&made.fd, Backlog::new(BACKLOG).map_err(failed("listen on"))?).map_err(failed("listen on"))?;
        Ok(made)
    }
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        // Somebody may have removed it and made their own.
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Keeps other daemons from changing the sockets of this directory.
fn lock(work_dir: &Path) -> Result<Flock<File>, FrontError> {
    let failed = |source| FrontError::Path { action: "lock of work dir", path: work_dir.to_owned(), source };
    let mut dir = File::open(work_dir)
        .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EAGAIN)) if Instant::now() < until => dir = back,
            Err((_, error)) => return Err(failed(error)),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Who listens at a socket: its pid, if it can be told. Nobody if `None`.
fn owner(address: &UnixAddr) -> Option<Option<i32>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).ok()?;
    match connect(probe.as_raw_fd(), address) {
        Ok(()) => Some(socket::getsockopt(&probe, sockopt::PeerCredentials).ok().map(|who| who.pid())),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => None,
        // It is there: busy, of another kind or of another user.
        Err(_) => Some(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::settings::NetSettings;

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
            restore: None,
            max_per_source: None,
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

    #[test]
    fn readiness_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (read, write) = sys::pipe::pipe2(libc::O_CLOEXEC).unwrap();
        let daemon = DaemonSettings {
            pidfile: Some("p".into()),
            status_fd: Some(std::os::fd::IntoRawFd::into_raw_fd(write)),
            ..DaemonSettings::default()
        };
        let mut front = Front::cache(&settings(dir.path())).unwrap();
        let Place::Daemon(readiness) = background(&daemon).unwrap() else { panic!("not asked for") };
        readiness.ready(&mut front, &daemon).unwrap();
        let mut told = Vec::new();
        io::Read::read_to_end(&mut File::from(read), &mut told).unwrap();
        assert_eq!(told, [0]);
        let pidfile = dir.path().join("p");
        assert_eq!(fs::read_to_string(&pidfile).unwrap(), getpid().to_string());
        drop(front);
        assert!(!pidfile.exists());
    }
}
