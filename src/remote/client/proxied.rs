//! The way through image-proxy: frames into a pipe, pages into a ring beside it, everything else in packets.
//!
//! A proxy that refuses a snapshot sends the reason and closes the pipe: EPIPE here means that the reason is in
//! the socket.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::sys::uio::writev;

use super::super::last_words::{Confirm, LastWord};
use super::super::pb::{self, FailCode, local_reply, local_request, snapshot_info::State};
use super::super::{Failure, PROXY_SOCKET};
use super::control::{self, Daemon};
use super::link::{Fate, Link, lacking, waits};
use super::packets::{Packets, wait_for};
use super::ring::{Ring, Taken};
use crate::sys::mapping::Slot;

/// At most this many parts in a writev(2) (UIO_MAXIOV).
const MOST_PARTS: usize = 1024;

/// A slot of the ring may be on its way so long though everything moves.
const SLOWEST: Duration = Duration::from_secs(30);

/// One snapshot's way through the proxy.
#[derive(Debug)]
pub(super) struct Proxied {
    packets: Packets,
    work_dir: PathBuf,
    name: String,
    id: u64,
    /// Root of the tree.
    pid: i32,
    journal: u64,
    restores: bool,
    pipe: Mutex<OwnedFd>,
    ring: Option<Ring>,
    /// Why the proxy takes no more.
    refused: Mutex<Option<Failure>>,
    /// The cache has all of it.
    complete: AtomicBool,
    /// It has heard what became of the tree, or that nobody knows.
    answered: AtomicBool,
    features: u64,
    /// The cache, as the proxy calls it.
    target: String,
    /// The last word that was said.
    confirmed: Mutex<Option<Confirm>>,
    /// What came before it was asked for.
    restored: Mutex<Option<pb::Restored>>,
    /// The proxy gives the cache up after this; we wait a little longer for its word.
    patience: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (work_dir, name, id, pid) = (work_dir.to_owned(), begin.name.clone(), begin.id, begin.pid);
        let (mut until, mut told) = (Instant::now() + patience, None);
        packets.send(local_request::What::Open(begin), &[], until)?;
        let (opened, mut fds) = loop {
            match packets.receive(until)? {
                (local_reply::What::Opened(opened), fds) => break (opened, fds),
                // It says so again as long as it hears of the cache, and why it does not when it gives that up.
                (local_reply::What::Queue(queue), _) => {
                    waits(&mut told, queue.place, &queue.target);
                    until = Instant::now() + patience + Duration::from_millis(queue.timeout_ms.into());
                }
                (other, _) => return Err(packets.unexpected(&other)),
            }
        };
        lacking(&opened.lacks);
        let lacks = |what| {
            Failure::new(FailCode::FailProtocol, format!("image-proxy sent no {what} with its answer"))
        };
        let pipe = fds.pop().ok_or_else(|| lacks("pipe"))?;
        let ring = match (opened.ring, fds.pop(), fds.pop()) {
            (false, ..) => None,
            (true, Some(told), Some(memory)) => {
                let failed =
                    |e: &Errno| tracing::debug!("the ring of image-proxy cannot be used: {}", e.desc());
                Ring::new(memory, told).inspect_err(failed).ok()
            }
            (true, ..) => return Err(lacks("ring")),
        };
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|e| Failure::new(FailCode::FailInternal, format!("pipe of image-proxy: {e}")))?;
        let (pipe, complete) = (Mutex::new(pipe), AtomicBool::new(false));
        let refused = Mutex::default();
        Ok(Self {
            packets,
            work_dir,
            name,
            id,
            pid,
            journal: opened.journal,
            restores: opened.restores,
            pipe,
            ring,
            refused,
            complete,
            answered: AtomicBool::new(false),
            features: opened.features,
            target: opened.target,
            confirmed: Mutex::default(),
            restored: Mutex::default(),
            patience,
        })
    }

    /// Leaves the last word to the next proxy.
    fn write_down(&self, word: Result<Confirm, String>) {
        let last = LastWord {
            id: self.id,
            name: self.name.clone(),
            target: self.target.clone(),
            pid: self.pid,
            word,
        };
        if let Err(error) = last.write(&self.work_dir) {
            tracing::warn!("the last word cannot be left to another image-proxy: {error}");
        }
    }

    /// Why the pipe or the ring is closed. It is said once, and threads that ask together all hear it.
    fn reason(&self) -> Failure {
        let mut refused = lock(&self.refused);
        let receive = || match self.packets.receive(Instant::now() + Duration::from_secs(5)) {
            Err(failure) => failure,
            Ok((other, _)) => self.packets.unexpected(&other),
        };
        refused.get_or_insert_with(receive).clone()
    }

    /// Waits until one of `fds` is ready for `flags`; a refusal ends the wait.
    fn wait(&self, fds: &[BorrowedFd<'_>], flags: PollFlags, until: Instant) -> Result<(), Failure> {
        let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, flags)).collect();
        fds.push(PollFd::new(self.packets.fd(), PollFlags::POLLIN));
        if !wait_for(&mut fds, until)? {
            let text = "image-proxy takes nothing any more: the way to the cache is stuck";
            return Err(Failure::new(FailCode::FailTimeout, text));
        }
        if fds.last().and_then(PollFd::any).unwrap_or(false) {
            // Nothing but a refusal can come while images are on their way.
            return Err(self.reason());
        }
        Ok(())
    }

    fn write(&self, pipe: &OwnedFd, frames: &mut [IoSlice<'_>]) -> Result<(), Failure> {
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
                Err(Errno::EAGAIN) => self.wait(&[pipe.as_fd()], PollFlags::POLLOUT, until)?,
                Err(Errno::EPIPE) => return Err(self.reason()),
                Err(e) => {
                    return Err(Failure::new(FailCode::FailLost, format!("pipe to image-proxy: {e}")));
                }
            }
        }
        Ok(())
    }
}

/// What an answer says of a tree after `Go`.
fn fate(what: &local_reply::What) -> Option<Fate> {
    Some(match what {
        local_reply::What::Restored(restored) if restored.ok => Fate::Runs(restored.pid),
        local_reply::What::Restored(pb::Restored { text, .. })
        | local_reply::What::Fell(pb::Fell { text }) => Fate::Fell(text.clone()),
        _ => return None,
    })
}

/// Asks a proxy what became of a tree after `Go`; see [`pb::Resume`].
pub(super) fn ask(work_dir: &Path, resume: pb::Resume, patience: Duration) -> Result<Fate, Failure> {
    let packets = Packets::connect("image-proxy", &work_dir.join(PROXY_SOCKET), Duration::ZERO)?;
    let (reply, _) = packets.ask(local_request::What::Resume(resume), &[], patience)?;
    fate(&reply).ok_or_else(|| packets.unexpected(&reply))
}

/// Has a proxy say that the tree runs on here; `false` if it is too late, since it runs there or is about to.
pub(super) fn take_back(work_dir: &Path, resume: pb::Resume, patience: Duration) -> Result<bool, Failure> {
    let packets = Packets::connect("image-proxy", &work_dir.join(PROXY_SOCKET), Duration::ZERO)?;
    match packets.ask(local_request::What::Resume(resume), &[], patience)?.0 {
        local_reply::What::Restored(restored) => Ok(!restored.ok),
        local_reply::What::Fell(_) => Ok(true),
        // What is taken back is not to be restored any more.
        local_reply::What::Prepared(_) => Ok(false),
        other => Err(packets.unexpected(&other)),
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
        let pipe = lock(&self.pipe);
        self.write(&pipe, frames)
    }

    fn room(&self) -> Result<Option<Slot>, Failure> {
        let Some(ring) = &self.ring else { return Ok(None) };
        let begun = Instant::now();
        loop {
            match ring.take()? {
                Taken::Slot(slot) => return Ok(Some(slot)),
                Taken::Closed => return Err(self.reason()),
                // It is free only when all of it is with the connection, which may be slow and shared with many.
                Taken::None(moved) => {
                    let until = moved.max(begun) + self.patience.max(SLOWEST);
                    self.wait(&ring.fds(), PollFlags::POLLIN, until)?;
                }
            }
        }
    }

    fn send_placed(&self, frames: &mut [IoSlice<'_>], room: Slot, placed: usize) -> Result<(), Failure> {
        let pipe = lock(&self.pipe);
        if let Some(ring) = &self.ring {
            // Under the lock, so that slots are noted in the order in which the proxy frees them.
            ring.sent(room, placed);
        }
        self.write(&pipe, frames)
    }

    fn prepared(&self) -> Result<pb::Prepared, Failure> {
        match self.packets.receive(Instant::now() + self.patience)? {
            (local_reply::What::Prepared(prepared), _) => {
                self.complete.store(true, Ordering::Release);
                Ok(prepared)
            }
            (other, _) => Err(self.packets.unexpected(&other)),
        }
    }

    fn guard(&self, decision: BorrowedFd<'_>) -> Result<(), Failure> {
        let until = Instant::now() + self.patience;
        self.packets.send(local_request::What::Guard(pb::Empty {}), &[decision], until)
    }

    fn recheck(&self) -> Result<(), Failure> {
        // On this connection it says nothing more of its own accord.
        let (all, _) = control::snapshots(Daemon::Proxy, &self.work_dir)?;
        let own = all.iter().rev().find(|info| info.name == self.name);
        match own.map(|info| (info.state(), &info.text)) {
            Some((State::Prepared, _)) => Ok(()),
            Some((_, why)) => Err(Failure::new(FailCode::FailLost, format!("snapshot {}: {why}", self.name))),
            None => {
                let text = format!("image-proxy does not know snapshot {} any more", self.name);
                Err(Failure::new(FailCode::FailLost, text))
            }
        }
    }

    fn confirm(&self, survives: bool) -> Result<(), Failure> {
        let confirm = pb::Confirm { survives };
        *lock(&self.confirmed) = Some(Confirm { survives });
        let told =
            self.packets.send(local_request::What::Confirm(confirm), &[], Instant::now() + self.patience);
        told.inspect_err(|_| self.write_down(Ok(Confirm { survives })))
    }

    fn taken(&self) -> Result<(), Failure> {
        let Some(confirm) = *lock(&self.confirmed) else { return Ok(()) };
        // A connection that breaks is made anew meanwhile, if that is possible.
        match self.packets.receive(Instant::now() + self.patience / 3) {
            Ok((local_reply::What::Done(_), _)) => Ok(()),
            Ok((local_reply::What::Restored(restored), _)) if restored.ok => {
                *lock(&self.restored) = Some(restored);
                Ok(())
            }
            Ok((local_reply::What::Restored(restored), _)) => {
                Err(Failure::new(FailCode::FailLost, restored.text))
            }
            Ok((other, _)) => Err(self.packets.unexpected(&other)),
            Err(failure) => {
                // A proxy that is there does what can be done itself.
                if failure.code == FailCode::FailLost {
                    self.write_down(Ok(confirm));
                }
                Err(failure)
            }
        }
    }

    fn abort(&self, reason: &str) {
        let what = local_request::What::Abort(pb::Abort { reason: reason.to_owned() });
        // Without the message the end of the socket says the same, unless it is the proxy that has ended.
        let told = self.packets.send(what, &[], Instant::now() + Duration::from_secs(1));
        if let Err(failure) = told
            && self.complete.load(Ordering::Acquire)
        {
            self.write_down(Err(reason.to_owned()));
            tracing::warn!(
                "the tree runs on here, but the cache could not be told: {failure}; the next image-proxy with this work \
                 dir tells it, or see `crtool image-cache list` there, and drop {} if it is in doubt",
                self.name
            );
        }
    }

    fn journal(&self) -> u64 {
        self.journal
    }

    fn restores(&self) -> bool {
        self.restores
    }

    fn armed(&self, until: Option<Instant>) -> Result<pb::Armed, Failure> {
        // Without a limit it ends when the proxy knows of an end.
        let until = until.unwrap_or_else(|| Instant::now() + Duration::from_secs(365 * 24 * 3600));
        match self.packets.receive(until)? {
            (local_reply::What::Armed(armed), _) => Ok(armed),
            (other, _) => Err(self.packets.unexpected(&other)),
        }
    }

    fn go(&self) -> Result<(), Failure> {
        self.packets.send(local_request::What::Go(pb::Go {}), &[], Instant::now() + self.patience)
    }

    fn fate(&self, patience: Duration) -> Result<Fate, Failure> {
        if !self.answered.load(Ordering::Acquire) {
            match self.packets.receive(Instant::now() + patience) {
                Err(failure) if failure.code == FailCode::FailTimeout => return Err(failure),
                heard => {
                    // Nothing more comes on this connection.
                    self.answered.store(true, Ordering::Release);
                    if let Some(fate) = heard.ok().and_then(|(reply, _)| fate(&reply)) {
                        return Ok(fate);
                    }
                }
            }
        }
        // This proxy is gone, and another one may be there; or it does not know it, and may be told.
        let verdict = Some(pb::resume::Verdict::Go(pb::Go {}));
        let (name, id, journal) = (self.name.clone(), self.id, self.journal);
        ask(&self.work_dir, pb::Resume { name, id, verdict, journal }, patience)
    }

    fn restored(&self, patience: Duration) -> Result<pb::Restored, Failure> {
        if let Some(restored) = lock(&self.restored).take() {
            return Ok(restored);
        }
        // The proxy has nothing to say before.
        let unreported = |failure: Failure| match failure.code {
            FailCode::FailTimeout => {
                Failure::new(failure.code, format!("nobody has restored it in {} s", patience.as_secs()))
            }
            _ => failure,
        };
        match self.packets.receive(Instant::now() + patience).map_err(unreported)? {
            (local_reply::What::Restored(restored), _) => Ok(restored),
            (other, _) => Err(self.packets.unexpected(&other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
    };

    use super::*;
    use crate::remote::local;
    use crate::remote::ring;
    use crate::sys;

    /// A proxy that opens one snapshot: its end of the socket, and what it holds of pipe and ring.
    fn opened() -> (tempfile::TempDir, Proxied, OwnedFd, OwnedFd, ring::Ring) {
        let dir = tempfile::tempdir().unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&dir.path().join(PROXY_SOCKET)).unwrap()).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let far = std::thread::spawn(move || {
            let socket =
                sys::fd::adopt(accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap()).unwrap();
            local::receive::<pb::LocalRequest>(socket.as_fd()).unwrap().unwrap();
            let (ring, [memory, told]) = ring::Ring::new().unwrap();
            let (read, write) = nix::unistd::pipe().unwrap();
            let what = Some(local_reply::What::Opened(pb::Opened { ring: true, ..pb::Opened::default() }));
            let fds = [memory.as_fd(), told.as_fd(), write.as_fd()];
            local::send(socket.as_fd(), &pb::LocalReply { what }, &fds).unwrap();
            (socket, read, ring)
        });
        let near = Proxied::open(dir.path(), pb::SnapshotBegin::default(), Duration::from_secs(20)).unwrap();
        let (socket, pipe, ring) = far.join().unwrap();
        (dir, near, socket, pipe, ring)
    }

    #[test]
    fn a_restore_that_does_not_come_is_no_silence_of_the_proxy() {
        let (_dir, proxied, _socket, _pipe, _ring) = opened();
        let failure = proxied.restored(Duration::from_millis(1)).unwrap_err();
        assert_eq!(failure.text, "nobody has restored it in 0 s");
    }

    #[test]
    fn all_threads_hear_why_it_is_refused_at_once() {
        let (_dir, near, socket, pipe, ring) = opened();
        let _slots: Vec<Slot> = (0..ring::SLOTS).map(|_| near.room().unwrap().unwrap()).collect();
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| near.room().unwrap_err())).collect();
            std::thread::sleep(Duration::from_millis(50));
            let failed =
                pb::Failed { code: FailCode::FailMemory.into(), text: "the cache is full".to_owned() };
            let what = Some(local_reply::What::Failed(failed));
            local::send(socket.as_fd(), &pb::LocalReply { what }, &[]).unwrap();
            drop((pipe, ring));
            for thread in waiting {
                let failure = thread.join().unwrap();
                assert_eq!(
                    (failure.code, failure.text.as_str()),
                    (FailCode::FailMemory, "the cache is full")
                );
            }
        });
        assert_eq!(near.send(&mut [IoSlice::new(b"x")]).unwrap_err().code, FailCode::FailMemory);
    }

    #[test]
    fn a_proxy_that_dies_ends_the_wait() {
        let (_dir, near, socket, pipe, ring) = opened();
        let _slots: Vec<Slot> = (0..ring::SLOTS).map(|_| near.room().unwrap().unwrap()).collect();
        drop((socket, pipe, ring));
        let failure = near.room().unwrap_err();
        assert_eq!(failure.code, FailCode::FailLost, "{}", failure.text);
    }
}
