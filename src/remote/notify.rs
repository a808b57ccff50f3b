//! What a service manager is told, and what it hands over: the protocol of sd_notify(3) and sd_listen_fds(3).
//!
//! A datagram of lines `NAME=VALUE` to the socket that `NOTIFY_SOCKET` names. Descriptors beside it are kept for the next
//! start of the service (`FDSTORE=1`), which gets them as 3 and up, named by `LISTEN_FDNAMES`. Without a manager that wants to
//! hear anything nothing is done here.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket,
};

use crate::sys;

/// First descriptor that is handed over.
const FIRST: RawFd = 3;
/// How long the manager may take to read what it is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// The service manager.
#[derive(Debug)]
pub struct Notify {
    socket: OwnedFd,
    address: UnixAddr,
}

impl Notify {
    /// The one that started this process, if it wants to hear from it.
    pub fn from_env() -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET")?;
        Self::to(name.as_encoded_bytes())
            .inspect_err(|e| tracing::warn!("NOTIFY_SOCKET {}: {e}", name.display()))
            .ok()
    }

    fn to(name: &[u8]) -> io::Result<Self> {
        let address = match name {
            [b'@', rest @ ..] => UnixAddr::new_abstract(rest)?,
            [b'/', ..] => UnixAddr::new(Path::new(&String::from_utf8_lossy(name).into_owned()))?,
            _ => return Err(Errno::EAFNOSUPPORT.into()),
        };
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket, address })
    }

    /// Tells these lines, with these descriptors.
    pub fn tell(&self, lines: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let bytes = [IoSlice::new(lines.as_bytes())];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            match sendmsg(self.socket.as_raw_fd(), &bytes, control, flags, Some(&self.address)) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
                    if poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX))? == 0 {
                        return Err(Errno::EAGAIN.into());
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until all that was told before has been read, descriptors and all.
    pub fn settle(&self) {
        let Ok((read, write)) = sys::pipe::pipe2(libc::O_CLOEXEC) else { return };
        if self.tell("BARRIER=1", &[write.as_fd()]).is_err() {
            return;
        }
        drop(write);
        let mut fds = [PollFd::new(read.as_fd(), PollFlags::empty())];
        let _ = poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX));
    }
}

/// How many descriptors the manager keeps for the next start; 0 if it keeps none.
pub fn most_kept() -> usize {
    std::env::var("FDSTORE").ok().and_then(|most| most.parse().ok()).unwrap_or(0)
}

/// What was kept for this start, with its names. The first time only.
pub fn take_kept() -> Vec<(String, OwnedFd)> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<i32>().ok());
    // A daemon in the background is the child of whom it was meant for.
    let ours = |pid| pid == nix::unistd::getpid().as_raw() || pid == nix::unistd::getppid().as_raw();
    if !number("LISTEN_PID").is_some_and(ours) {
        return Vec::new();
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat_with(String::new));
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, 1 << 20);
    let taken = (FIRST..FIRST.saturating_add(count)).zip(names).filter_map(|(fd, name)| {
        let ours = sys::fd::dup(fd).ok()?;
        let _ = sys::fd::give_up(fd);
        Some((name, ours))
    });
    taken.collect()
}
