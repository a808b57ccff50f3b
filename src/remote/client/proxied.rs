//! The way through image-proxy: frames into a pipe, everything else in packets.
//!
//! A proxy that refuses a snapshot sends the reason and closes the pipe: EPIPE here means that the reason is in
//! the socket.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::uio::writev;

use super::super::pb::{self, FailCode, local_reply, local_request};
use super::super::{Failure, PROXY_SOCKET};
use super::link::Link;
use super::packets::{Packets, wait_for};

/// At most this many parts in a writev(2) (UIO_MAXIOV).
const MOST_PARTS: usize = 1024;

/// One snapshot's way through the proxy.
#[derive(Debug)]
pub(super) struct Proxied {
    packets: Packets,
    pipe: Mutex<OwnedFd>,
    features: u64,
    /// The proxy gives the cache up after this; we wait a little longer for its word.
    patience: Duration,
}

impl Proxied {
    /// Opens a snapshot at the proxy of `work_dir`.
    pub(super) fn open(
        work_dir: &Path,
        begin: pb::SnapshotBegin,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let packets = Packets::connect("image-proxy", &work_dir.join(PROXY_SOCKET), timeout)?;
        let patience = timeout * 3;
        let (reply, mut fds) = packets.ask(local_request::What::Open(begin), &[], patience)?;
        let local_reply::What::Opened(opened) = reply else { return Err(packets.unexpected(&reply)) };
        let pipe = fds.pop().ok_or_else(|| {
            Failure::new(FailCode::FailProtocol, "image-proxy sent no pipe with its answer")
        })?;
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|e| Failure::new(FailCode::FailInternal, format!("pipe of image-proxy: {e}")))?;
        Ok(Self { packets, pipe: Mutex::new(pipe), features: opened.features, patience })
    }

    /// Why the pipe is closed.
    fn reason(&self) -> Failure {
        match self.packets.receive(Instant::now() + Duration::from_secs(5)) {
            Err(failure) => failure,
            Ok((other, _)) => self.packets.unexpected(&other),
        }
    }
}

impl Link for Proxied {
    fn stream(&self) -> u32 {
        0
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn send(&self, frames: &mut [IoSlice<'_>]) -> Result<(), Failure> {
        let pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = frames;
        let mut until = Instant::now() + self.patience;
        while !left.is_empty() {
            let now = left.len().min(MOST_PARTS);
            match writev(pipe.as_fd(), left.get(..now).unwrap_or_default()) {
                Ok(written) => {
                    IoSlice::advance_slices(&mut left, written);
                    until = Instant::now() + self.patience;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let mut fds = [
                        PollFd::new(pipe.as_fd(), PollFlags::POLLOUT),
                        PollFd::new(self.packets.fd(), PollFlags::POLLIN),
                    ];
                    if !wait_for(&mut fds, until)? {
                        let text = "image-proxy takes nothing any more: the way to the cache is stuck";
                        return Err(Failure::new(FailCode::FailTimeout, text));
                    }
                    if fds.last().and_then(PollFd::any).unwrap_or(false) {
                        // Nothing but a refusal can come while images are on their way.
                        return Err(self.reason());
                    }
                }
                Err(Errno::EPIPE) => return Err(self.reason()),
                Err(e) => {
                    return Err(Failure::new(FailCode::FailLost, format!("pipe to image-proxy: {e}")));
                }
            }
        }
        Ok(())
    }

    fn prepared(&self) -> Result<pb::Prepared, Failure> {
        match self.packets.receive(Instant::now() + self.patience)? {
            (local_reply::What::Prepared(prepared), _) => Ok(prepared),
            (other, _) => Err(self.packets.unexpected(&other)),
        }
    }

    fn guard(&self, root: BorrowedFd<'_>) -> Result<(), Failure> {
        let until = Instant::now() + self.patience;
        self.packets.send(local_request::What::Guard(pb::Empty {}), &[root], until)
    }

    fn confirm(&self, survives: bool) -> Result<(), Failure> {
        let what = local_request::What::Confirm(pb::Confirm { survives });
        self.packets.send(what, &[], Instant::now() + self.patience)
    }

    fn abort(&self, reason: &str) {
        let what = local_request::What::Abort(pb::Abort { reason: reason.to_owned() });
        // Without the message the end of the socket says the same.
        let _ = self.packets.send(what, &[], Instant::now() + Duration::from_secs(1));
    }

    fn restored(&self, patience: Duration) -> Result<pb::Restored, Failure> {
        match self.packets.receive(Instant::now() + patience)? {
            (local_reply::What::Restored(restored), _) => Ok(restored),
            (other, _) => Err(self.packets.unexpected(&other)),
        }
    }
}
