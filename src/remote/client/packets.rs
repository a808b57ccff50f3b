//! A connection to a daemon of this host: packets there and back, never waiting without an end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::geteuid;

use super::super::local::door::{self, Refused};
use super::super::local::{self, Packet};
use super::super::pb::{self, FailCode, local_reply, local_request};
use super::super::{Failure, name};
use crate::interrupt;
use crate::sys::pidfd;

/// How long a signal may go unseen.
const LOOK: Duration = Duration::from_millis(100);

/// A connection to the proxy or the cache.
#[derive(Debug)]
pub(super) struct Packets {
    socket: OwnedFd,
    path: PathBuf,
    daemon: &'static str,
    /// The daemon itself; none where the kernel cannot tell.
    process: Option<OwnedFd>,
}

fn lost(text: String) -> Failure {
    Failure::new(FailCode::FailLost, text)
}

fn not_entered(daemon: &str, path: &Path, refused: Refused) -> Failure {
    let why = match refused {
        Refused::Call(e @ (Errno::ENOENT | Errno::ECONNREFUSED)) => {
            format!("{}; is {daemon} running with this work dir (-W)?", e.desc())
        }
        Refused::Call(e @ (Errno::EACCES | Errno::EPERM)) => {
            format!("{}; it is for the user who started it, and for root", e.desc())
        }
        Refused::Call(e) => e.desc().to_owned(),
        Refused::NoSocket => "it is no socket; choose another work dir (-W)".to_owned(),
        Refused::Stranger { uid } => {
            let text = format!(
                "{daemon} at {} belongs to uid {uid}, neither to root nor to uid {}: it is not trusted; choose a work dir (-W) \
                 in which others cannot make files",
                path.display(),
                geteuid()
            );
            return Failure::new(FailCode::FailDenied, text);
        }
    };
    lost(format!("{daemon} at {}: {why}", path.display()))
}

/// Waits until one of `fds` is ready, a signal comes or `until` has passed; which are ready.
pub(super) fn wait_for(fds: &mut [PollFd<'_>], until: Instant) -> Result<bool, Failure> {
    loop {
        interrupt::check().map_err(|e| Failure::new(FailCode::FailAborted, e.to_string()))?;
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::ZERO);
        match poll(fds, timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(lost(format!("poll: {e}"))),
        }
    }
}

impl Packets {
    /// Connects to the `daemon` that listens at `path`; one that is not there yet is waited for. One of another user is
    /// refused, unless that is root.
    pub(super) fn connect(daemon: &'static str, path: &Path, patience: Duration) -> Result<Self, Failure> {
        let until = Instant::now() + patience;
        let mut told = false;
        loop {
            match door::enter(path) {
                Ok(socket) => {
                    let process = pidfd::of_peer(socket.as_fd()).ok();
                    return Ok(Self { socket, path: path.to_owned(), daemon, process });
                }
                Err(Refused::Call(Errno::ENOENT | Errno::ECONNREFUSED | Errno::EAGAIN))
                    if Instant::now() < until =>
                {
                    if !std::mem::replace(&mut told, true) {
                        tracing::info!("waiting for {daemon} at {}", path.display());
                    }
                    interrupt::check().map_err(|e| Failure::new(FailCode::FailAborted, e.to_string()))?;
                    std::thread::sleep(LOOK.min(Duration::from_millis(20)));
                }
                Err(refused) => return Err(not_entered(daemon, path, refused)),
            }
        }
    }

    /// Whether the daemon has ended, which is waited for: its sockets close before it does.
    pub(super) fn has_ended(&self, patience: Duration) -> bool {
        let Some(process) = &self.process else { return false };
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match poll(&mut fds, PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::ZERO)) {
                Ok(ready) if ready > 0 => return true,
                _ if left.is_zero() => return false,
                _ => {}
            }
        }
    }

    fn gone(&self) -> Failure {
        lost(format!("{} at {} went away", self.daemon, self.path.display()))
    }

    fn broken(&self, e: &io::Error) -> Failure {
        match e.raw_os_error() {
            Some(libc::EPIPE | libc::ECONNRESET) => self.gone(),
            _ => lost(format!("{} at {}: {e}", self.daemon, self.path.display())),
        }
    }

    /// Sends a request.
    pub(super) fn send(
        &self,
        what: local_request::What,
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), Failure> {
        let request = pb::LocalRequest { what: Some(what) };
        loop {
            match local::send(self.socket.as_fd(), &request, fds) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
                    if !wait_for(&mut fds, until)? {
                        return Err(self.silent());
                    }
                }
                // The reason may have come before the end.
                Err(e) => return Err(self.last_word().unwrap_or_else(|| self.broken(&e))),
            }
        }
    }

    fn silent(&self) -> Failure {
        let text = format!(
            "{0} at {1} does not answer; crtool {0} status says what it waits for",
            self.daemon,
            self.path.display()
        );
        Failure::new(FailCode::FailTimeout, text)
    }

    /// A refusal that has come already.
    fn last_word(&self) -> Option<Failure> {
        // An error of the socket is told before what lies in it, and once.
        for _ in 0..2 {
            match local::receive::<pb::LocalReply>(self.socket.as_fd()) {
                Ok(Some(Packet { message, .. })) => match message.what {
                    Some(local_reply::What::Failed(failed)) => return Some(failed.into()),
                    _ => return None,
                },
                Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => {}
                _ => return None,
            }
        }
        None
    }

    /// The next reply, if one is there. A refusal is an error.
    pub(super) fn try_receive(&self) -> Result<Option<(local_reply::What, Vec<OwnedFd>)>, Failure> {
        match local::receive::<pb::LocalReply>(self.socket.as_fd()) {
            Ok(Some(Packet { message: pb::LocalReply { what: Some(what) }, fds })) => match what {
                local_reply::What::Failed(failed) => Err(failed.into()),
                what => Ok(Some((what, fds))),
            },
            Ok(Some(_)) => {
                let text = format!("{} says what this crtool does not know: another version?", self.daemon);
                Err(Failure::new(FailCode::FailVersion, text))
            }
            Ok(None) => Err(self.gone()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The reason may have come before the end.
            Err(e) => Err(self.last_word().unwrap_or_else(|| self.broken(&e))),
        }
    }

    /// Waits for the next reply. A refusal is an error.
    pub(super) fn receive(&self, until: Instant) -> Result<(local_reply::What, Vec<OwnedFd>), Failure> {
        loop {
            if let Some(reply) = self.try_receive()? {
                return Ok(reply);
            }
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if !wait_for(&mut fds, until)? {
                return Err(self.silent());
            }
        }
    }

    /// Asks and waits for the answer.
    pub(super) fn ask(
        &self,
        what: local_request::What,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(local_reply::What, Vec<OwnedFd>), Failure> {
        let until = Instant::now() + patience;
        self.send(what, fds, until)?;
        self.receive(until)
    }

    /// Asks for something that is answered by `Done`.
    pub(super) fn tell(
        &self,
        what: local_request::What,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(), Failure> {
        match self.ask(what, fds, patience)? {
            (local_reply::What::Done(_), _) => Ok(()),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// A reply that is none to what was asked.
    pub(super) fn unexpected(&self, reply: &local_reply::What) -> Failure {
        let text = format!("{} answered something else than was asked: {reply:?}", self.daemon);
        Failure::new(FailCode::FailProtocol, text)
    }

    /// For poll(2).
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The name of a snapshot, checked before anybody is asked.
pub(super) fn checked(snapshot: &str) -> Result<String, Failure> {
    name::check_snapshot(snapshot)?;
    Ok(snapshot.to_owned())
}
