//! The way without a proxy: the dump speaks to the cache itself.
//!
//! A second thread hears what the cache says and keeps the connection alive while the dump is busy elsewhere; it
//! ends with the link. The last word is sent with a ping behind it: its answer proves that the word was taken. If
//! the connection breaks before that, the word is said again over a new one (`Resume`).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::super::Failure;
use super::super::net::Stream;
use super::super::pb::{self, FailCode};
use super::super::session::{self, Session};
use super::super::wire::{self, Kind};
use super::link::{Fate, Link, lacking, waits};
use super::packets::wait_for;
use crate::settings::NetSettings;
use crate::{interrupt, sys};

/// The only stream of the connection.
const STREAM: u32 = 1;
/// How often the second thread looks around.
const LOOK: Duration = Duration::from_millis(100);
/// Reads in a row.
const READS: usize = 32;
/// What has no limit ends by itself sooner.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// One snapshot's way to the cache.
#[derive(Debug)]
pub(super) struct Direct {
    shared: Arc<Shared>,
    net: NetSettings,
    name: String,
    id: u64,
    hearer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stream: Mutex<Stream>,
    /// Its number, for waiting without holding it.
    fd: OwnedFd,
    peer: String,
    /// Held while a frame is sent: frames do not mix.
    frame: Mutex<()>,
    heard: Mutex<Heard>,
    news: Condvar,
    over: AtomicBool,
    /// Past the point of no return Ctrl-C and the like change nothing any more.
    deaf: AtomicBool,
    /// Ends the second thread's wait.
    wake: EventFd,
    timeout: Duration,
}

/// What has come and gone.
#[derive(Debug)]
struct Heard {
    session: Session,
    prepared: Option<pb::Prepared>,
    restored: Option<pb::Restored>,
    armed: Option<pb::Armed>,
    fell: Option<pb::Fell>,
    room: Option<pb::Room>,
    /// How many are before it, when that was said.
    place: Option<u32>,
    failed: Option<Failure>,
    /// The cache itself has said that nothing will come of the snapshot.
    refused: bool,
    /// All bytes that the socket has taken.
    sent: u64,
}

impl Heard {
    /// What a frame says; an error if no cache would send it here.
    fn take(&mut self, frame: session::inbox::Heard) -> Result<(), Failure> {
        use session::inbox::Heard as Frame;
        match frame {
            Frame::Prepared(STREAM, prepared) => self.prepared = Some(prepared),
            Frame::Restored(STREAM, restored) => self.restored = Some(restored),
            Frame::Armed(STREAM, armed) => self.armed = Some(armed),
            Frame::Fell(STREAM, fell) => self.fell = Some(fell),
            Frame::Room(STREAM, room) => self.room = Some(room),
            Frame::Queue(STREAM, queue) => self.place = Some(queue.place),
            Frame::Failed(STREAM, failed) => {
                self.refused = true;
                self.failed.get_or_insert(failed.into());
            }
            Frame::Hello(_) | Frame::Pong | Frame::Ping => {}
            other => {
                return Err(Failure::new(FailCode::FailProtocol, format!("{other:?} for no stream of ours")));
            }
        }
        Ok(())
    }

    /// What became of a tree, as far as has been heard.
    fn fate(&self) -> Option<Fate> {
        let refused = self.failed.as_ref().filter(|_| self.refused).map(|failed| failed.text.clone());
        match (&self.restored, &self.fell) {
            (Some(restored), _) if restored.ok => Some(Fate::Runs(restored.pid)),
            (Some(pb::Restored { text, .. }), _) | (_, Some(pb::Fell { text })) => {
                Some(Fate::Fell(text.clone()))
            }
            _ => refused.map(Fate::Fell),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost(peer: &str, e: &io::Error) -> Failure {
    let code = match e.kind() {
        io::ErrorKind::TimedOut => FailCode::FailTimeout,
        _ => FailCode::FailLost,
    };
    Failure::new(code, format!("connection to {peer}: {e}"))
}

impl Shared {
    /// Connects and agrees on a version.
    fn connect(net: &NetSettings) -> Result<Self, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::new(FailCode::FailLost, e.to_string());
        let until = Instant::now() + net.timeout;
        let stream = Stream::to_cache(net, until, true)?;
        let peer = stream.peer().to_owned();
        let fd = stream.fd().try_clone_to_owned().map_err(|e| failed(&e))?;
        let session = Session::new(net.timeout, Instant::now());
        let opening = session.opening();
        let heard = Heard {
            session,
            prepared: None,
            restored: None,
            armed: None,
            fell: None,
            room: None,
            place: None,
            failed: None,
            refused: false,
            sent: 0,
        };
        let shared = Self {
            stream: Mutex::new(stream),
            fd,
            peer,
            frame: Mutex::default(),
            heard: Mutex::new(heard),
            news: Condvar::new(),
            over: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|e| failed(&e))?,
            timeout: net.timeout,
        };
        shared.send(&mut [IoSlice::new(&opening)])?;
        shared.greeted(until)?;
        Ok(shared)
    }

    /// Waits for what the cache says first.
    fn greeted(&self, until: Instant) -> Result<(), Failure> {
        loop {
            let open = self.hear()?;
            if lock(&self.heard).session.peer().is_some() {
                return Ok(());
            }
            if !open {
                return Err(lost(&self.peer, &io::ErrorKind::UnexpectedEof.into()));
            }
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            if !wait_for(&mut fds, until)? {
                let text = format!("{} accepts the connection and says nothing", self.peer);
                return Err(Failure::new(FailCode::FailTimeout, text));
            }
        }
    }

    /// Something that the cache said about itself.
    fn hello<T: Default>(&self, of: impl FnOnce(&pb::Hello) -> T) -> T {
        lock(&self.heard).session.peer().map(of).unwrap_or_default()
    }

    /// Why the snapshot is refused or lost, if it is.
    fn failure(&self) -> Result<(), Failure> {
        lock(&self.heard).failed.clone().map_or(Ok(()), Err)
    }

    fn fail(&self, failure: Failure) {
        lock(&self.heard).failed.get_or_insert(failure);
        self.news.notify_all();
    }

    /// Sends whole frames.
    fn send(&self, frames: &mut [IoSlice<'_>]) -> Result<(), Failure> {
        let _frame = lock(&self.frame);
        self.send_held(frames)
    }

    /// With `frame` held.
    fn send_held(&self, frames: &mut [IoSlice<'_>]) -> Result<(), Failure> {
        let patience = self.timeout * 3;
        let (mut left, mut until) = (frames, Instant::now() + patience);
        loop {
            self.failure()?;
            let done = {
                let mut stream = lock(&self.stream);
                if left.is_empty() {
                    stream.flush().map(|flushed| flushed.then_some(0))
                } else {
                    stream.write_vectored(left).map(Some)
                }
            };
            match done {
                Ok(Some(0)) if left.is_empty() => return Ok(()),
                Ok(Some(written)) if written > 0 => {
                    lock(&self.heard).sent += written as u64;
                    IoSlice::advance_slices(&mut left, written);
                    until = Instant::now() + patience;
                    continue;
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    // What the cache said last tells more than that it is gone.
                    let _ = self.hear();
                    self.failure()?;
                    return Err(lost(&self.peer, &e));
                }
            }
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)];
            self.heed()?;
            // Whoever waits for room for longer than a look is asked again whether to go on.
            let wait = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
            if poll(&mut fds, wait).unwrap_or(0) == 0 && Instant::now() > until {
                let text = format!("{} takes nothing any more", self.peer);
                let failure = Failure::new(FailCode::FailTimeout, text);
                // Nobody waits as long again to say that nothing comes of it.
                self.fail(failure.clone());
                return Err(failure);
            }
        }
    }

    /// Reads what has come; false at the end of the connection. A cache that never stops does not keep the caller from what else
    /// there is to do.
    fn hear(&self) -> Result<bool, Failure> {
        let mut piece = [0; 4096];
        for _ in 0..READS {
            // Held until it is understood: two threads may read.
            let mut stream = lock(&self.stream);
            match stream.read(&mut piece) {
                Ok(0) => return Ok(false),
                Ok(n) => self.take(piece.get(..n).unwrap_or_default())?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(lost(&self.peer, &e)),
            }
        }
        Ok(true)
    }

    fn take(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut heard = lock(&self.heard);
        let mut frames = Vec::new();
        let fed = heard.session.feed(bytes, Instant::now(), &mut frames);
        let taken = frames.into_iter().try_for_each(|frame| heard.take(frame));
        drop(heard);
        self.news.notify_all();
        taken.and(fed).map_err(|failure| self.of_peer(failure))
    }

    /// What a session says of the cache, with its name.
    fn of_peer(&self, failure: Failure) -> Failure {
        Failure { text: format!("{}: {}", self.peer, failure.text), ..failure }
    }

    /// The second thread.
    fn keep(&self) {
        while !self.over.load(Ordering::Acquire) {
            let mut fds = [
                PollFd::new(self.fd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            let wait = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
            if poll(&mut fds, wait).unwrap_or(0) > 0 {
                match self.hear() {
                    Ok(true) => {}
                    Ok(false) => {
                        let text = format!("{} closed the connection", self.peer);
                        return self.fail(Failure::new(FailCode::FailLost, text));
                    }
                    Err(failure) => return self.fail(failure),
                }
            }
            if let Err(failure) = self.keep_alive() {
                return self.fail(failure);
            }
        }
    }

    /// Pings if it is time; an error if the cache is silent.
    fn keep_alive(&self) -> Result<(), Failure> {
        let unsent = sys::fd::unsent(self.fd.as_fd()).unwrap_or(0);
        // Nobody pings while a frame is being sent: that must get on.
        let frame = self.frame.try_lock().ok();
        let frames = {
            let mut heard = lock(&self.heard);
            let (progress, busy) = ((heard.sent, unsent), frame.is_none());
            let pong = (!busy).then(|| heard.session.pong()).flatten();
            let ping = heard.session.look(Instant::now(), progress, busy).map_err(|e| self.of_peer(e))?;
            [pong, ping]
        };
        frames.iter().flatten().try_for_each(|frame| self.send_held(&mut [IoSlice::new(frame)]))
    }

    fn ping_held(&self) -> Result<(), Failure> {
        let ping = lock(&self.heard).session.ping(Instant::now());
        self.send_held(&mut [IoSlice::new(&ping)])
    }

    /// Waits until `found` finds what it looks for.
    fn wait<T>(
        &self,
        patience: Duration,
        what: &str,
        mut found: impl FnMut(&mut Heard) -> Option<T>,
    ) -> Result<T, Failure> {
        let until = Instant::now() + patience;
        let mut heard = lock(&self.heard);
        loop {
            if let Some(found) = found(&mut heard) {
                return Ok(found);
            }
            if let Some(failure) = &heard.failed {
                return Err(failure.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("{} did not {what} within {:.1} s", self.peer, patience.as_secs_f32());
                return Err(Failure::new(FailCode::FailTimeout, text));
            }
            heard = self.news.wait_timeout(heard, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
            self.heed()?;
        }
    }

    /// An error once a signal has come, as long as that matters.
    fn heed(&self) -> Result<(), Failure> {
        if self.deaf.load(Ordering::Acquire) {
            return Ok(());
        }
        interrupt::check().map_err(|e| Failure::new(FailCode::FailAborted, e.to_string()))
    }
}

impl Direct {
    /// Connects, offers the snapshot, and waits until there is room for it: nothing is frozen before.
    pub(super) fn open(net: &NetSettings, begin: pb::SnapshotBegin) -> Result<Self, Failure> {
        let id = begin.id;
        let name = begin.name.clone();
        let shared = Arc::new(Shared::connect(net)?);
        let frame = wire::frame(Kind::SnapshotBegin, STREAM, 0, &begin);
        let of_thread = shared.clone();
        let hearer = std::thread::Builder::new()
            .name("cache".to_owned())
            .spawn(move || of_thread.keep())
            .map_err(|e| Failure::new(FailCode::FailInternal, format!("thread: {e}")))?;
        let direct = Self { shared, net: net.clone(), name, id, hearer: Some(hearer) };
        direct.shared.send(&mut [IoSlice::new(&frame)])?;
        match direct.has_room() {
            Ok(room) => lacking(&room.lacks),
            Err(failure) => {
                if failure.code == FailCode::FailAborted {
                    direct.abort("the dump was interrupted while it waited for its turn; the tree runs on");
                }
                return Err(failure);
            }
        }
        Ok(direct)
    }

    /// Waits for the answer to the offer. That may take as long as others need: the hearer notices if the cache is gone.
    fn has_room(&self) -> Result<pb::Room, Failure> {
        let mut told = None;
        loop {
            let patience = if told.is_none() { self.net.timeout * 3 } else { FOREVER };
            let answer = self.shared.wait(patience, "answer", |heard| match heard.room.take() {
                Some(room) => Some(Ok(room)),
                None => heard.place.take().map(Err),
            })?;
            match answer {
                Ok(room) => return Ok(room),
                Err(place) => waits(&mut told, place, &self.shared.peer),
            }
        }
    }

    /// Waits until everything sent so far has been taken.
    fn answered(&self, patience: Duration) -> Result<(), Failure> {
        self.shared.wait(patience, "answer", |heard| heard.session.is_answered().then_some(()))?;
        // A refusal comes before the answer to the ping behind what is refused.
        self.shared.failure()
    }

    fn word(&self, frame: &[u8], patience: Duration) -> Result<(), Failure> {
        {
            let _frame = lock(&self.shared.frame);
            self.shared.send_held(&mut [IoSlice::new(frame)])?;
            self.shared.ping_held()?;
        }
        self.answered(patience)
    }

    /// Says the last word over a new connection, and waits for an answer.
    fn resume(&self, verdict: pb::resume::Verdict) -> Result<(), Failure> {
        let answered = |heard: &Heard| (heard.prepared.is_some() || heard.restored.is_some()).then_some(());
        again(&self.net, self.about(verdict), self.net.timeout, answered)
    }

    fn about(&self, verdict: pb::resume::Verdict) -> pb::Resume {
        let journal = self.journal();
        pb::Resume { name: self.name.clone(), id: self.id, verdict: Some(verdict), journal }
    }
}

/// Says something about a snapshot over a new connection, and waits until `found` finds the answer.
fn again<T>(
    net: &NetSettings,
    resume: pb::Resume,
    patience: Duration,
    found: impl Fn(&Heard) -> Option<T>,
) -> Result<T, Failure> {
    let shared = Shared::connect(net)?;
    shared.deaf.store(true, Ordering::Release);
    let frame = wire::frame(Kind::Resume, STREAM, 0, &resume);
    shared.send(&mut [IoSlice::new(&frame)])?;
    let until = Instant::now() + patience;
    loop {
        let open = shared.hear()?;
        let heard = lock(&shared.heard);
        if let Some(found) = found(&heard) {
            return Ok(found);
        }
        if let Some(failure) = &heard.failed {
            return Err(failure.clone());
        }
        drop(heard);
        shared.keep_alive()?;
        let left = until.saturating_duration_since(Instant::now());
        if !open || left.is_zero() {
            return Err(Failure::new(FailCode::FailTimeout, format!("{} does not answer", shared.peer)));
        }
        let mut fds = [PollFd::new(shared.fd.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::ZERO));
    }
}

/// Asks over a new connection what became of a tree after `Go`; see [`pb::Resume`].
pub(super) fn ask(net: &NetSettings, resume: pb::Resume, patience: Duration) -> Result<Fate, Failure> {
    again(net, resume, patience, |heard| match &heard.failed {
        // It may have run under another cache.
        Some(failed) if failed.code == FailCode::FailNotFound => None,
        _ => heard.fate(),
    })
}

/// Says over a new connection that the tree runs on here; `false` if it is too late, since it runs there or is about to.
pub(super) fn take_back(net: &NetSettings, resume: pb::Resume) -> Result<bool, Failure> {
    again(net, resume, net.timeout, |heard| match (&heard.restored, &heard.failed) {
        (Some(restored), _) => Some(!restored.ok),
        // It may have run under another cache; and a connection that broke says nothing.
        (None, Some(failed)) if !heard.refused || failed.code == FailCode::FailNotFound => None,
        (None, Some(_)) => Some(true),
        // What is taken back is not to be restored any more.
        (None, None) => heard.prepared.is_some().then_some(false),
    })
}

impl Link for Direct {
    fn stream(&self) -> u32 {
        STREAM
    }

    fn features(&self) -> u64 {
        self.shared.hello(|hello| hello.features)
    }

    fn journal(&self) -> u64 {
        self.shared.hello(|hello| hello.journal)
    }

    fn restores(&self) -> bool {
        self.shared.hello(|hello| hello.restores)
    }

    fn send(&self, frames: &mut [IoSlice<'_>]) -> Result<(), Failure> {
        self.shared.send(frames)
    }

    fn prepared(&self) -> Result<pb::Prepared, Failure> {
        // As long as the connection lives; the hearer notices when it does not.
        self.shared.wait(self.net.timeout * 3, "confirm the snapshot", |heard| heard.prepared)
    }

    fn guard(&self, _decision: BorrowedFd<'_>) -> Result<(), Failure> {
        // Nobody of ours outlives this process.
        Ok(())
    }

    fn recheck(&self) -> Result<(), Failure> {
        {
            let _frame = lock(&self.shared.frame);
            self.shared.ping_held()?;
        }
        self.answered(self.net.timeout)
    }

    fn confirm(&self, survives: bool) -> Result<(), Failure> {
        let confirm = pb::Confirm { survives };
        self.shared.deaf.store(true, Ordering::Release);
        match self.word(&wire::frame(Kind::Confirm, STREAM, 0, &confirm), self.net.timeout) {
            Ok(()) => Ok(()),
            Err(failure) => {
                tracing::warn!("{failure}; saying it again over a new connection");
                self.resume(pb::resume::Verdict::Confirm(confirm))
            }
        }
    }

    fn abort(&self, reason: &str) {
        if lock(&self.shared.heard).refused {
            return;
        }
        let abort = pb::Abort { reason: reason.to_owned() };
        // Whoever is asked to end says this all the same, and waits no longer than the watchdog does.
        let patience = if interrupt::check().is_err() { LOOK * 3 } else { self.net.timeout };
        self.shared.deaf.store(true, Ordering::Release);
        // Lost, the cache hears of it from the end of the connection; after a commit it is in doubt there.
        if let Err(failure) = self.word(&wire::frame(Kind::Abort, STREAM, 0, &abort), patience) {
            tracing::debug!("{failure}");
            if lock(&self.shared.heard).prepared.is_some()
                && let Err(failure) = take_back(&self.net, self.about(pb::resume::Verdict::Abort(abort)))
                && failure.code != FailCode::FailNotFound
            {
                tracing::warn!(
                    "the tree runs on here, but the cache could not be told: {failure}; drop it there"
                );
            }
        }
    }

    fn armed(&self, until: Option<Instant>) -> Result<pb::Armed, Failure> {
        let patience = until.map_or(FOREVER, |until| until.saturating_duration_since(Instant::now()));
        self.shared.wait(patience, "build the tree", |heard| heard.armed)
    }

    fn go(&self) -> Result<(), Failure> {
        self.shared.deaf.store(true, Ordering::Release);
        self.shared.send(&mut [IoSlice::new(&wire::frame(Kind::Go, STREAM, 0, &pb::Go {}))])
    }

    fn fate(&self, patience: Duration) -> Result<Fate, Failure> {
        match self.shared.wait(patience, "say what became of the tree", |heard| heard.fate()) {
            Err(failure) if failure.code == FailCode::FailTimeout && self.shared.failure().is_ok() => {
                Err(failure)
            }
            Err(_) => ask(&self.net, self.about(pb::resume::Verdict::Go(pb::Go {})), patience),
            fate => fate,
        }
    }

    fn restored(&self, patience: Duration) -> Result<pb::Restored, Failure> {
        self.shared.deaf.store(false, Ordering::Release);
        self.shared.wait(patience, "report a restore", |heard| heard.restored.clone())
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        let _ = self.shared.wake.write(1);
        if let Some(hearer) = self.hearer.take() {
            let _ = hearer.join();
        }
    }
}
