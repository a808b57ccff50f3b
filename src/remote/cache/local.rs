//! Commands of this host: restores that take a snapshot, operators who look and drop.
//!
//! A request that cannot be answered yet waits, and the client is not read meanwhile; so one answer at most is
//! owed to each, and a client that reads nothing costs no more than that. A restore that goes away gives its
//! snapshot back, unless its tree may run: see [`Watch`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::local::{self, Packet};
use super::super::pb::snapshot_info::State;
use super::super::pb::{self, FailCode, local_reply, local_request};
use super::super::poll::Interest;
use super::super::witness::{Verdict, Witness, has_ended, pid_of};
use super::super::{Failure, name};
use super::images::Found;
use super::protocol;
use super::snapshot::{Reader, Snapshot};
use super::snapshots::Snapshots;

/// Bytes of names in one packet of a list; the rest of a packet is room for what surrounds them.
const PAGE: usize = 64 << 10;
/// Requests taken from one client before others have their turn.
const TURN: usize = 64;
/// The tree that a restore is about to let go.
#[derive(Debug)]
struct Starting {
    root: OwnedFd,
    /// Of the root; -1 if it cannot be told.
    pid: i32,
    witness: Witness,
}

/// A request that waits for its answer.
#[derive(Debug)]
enum Pending {
    Get {
        get: pb::Get,
        until: Option<Instant>,
        newest: u64,
        seen: Option<u64>,
        doubt: Option<Instant>,
    },
    /// What it has is to become such that it can be restored; if it is in doubt, until then.
    Whole {
        doubt: Option<Instant>,
    },
    Read(pb::ReadImage),
    Starting,
}

/// One connection of a command.
#[derive(Debug)]
pub(super) struct Client {
    id: u64,
    pid: i32,
    socket: OwnedFd,
    /// The process itself, to see its end.
    process: Option<OwnedFd>,
    taken: Option<u64>,
    /// What it has is for a copy.
    saves: bool,
    /// Connections on which it brings snapshots.
    loads: Vec<(OwnedFd, String)>,
    starting: Option<Starting>,
    pending: Option<Pending>,
    out: VecDeque<(pb::LocalReply, Option<OwnedFd>)>,
    gone: bool,
    timeout: Duration,
    watches: Vec<Watch>,
    watched: Interest,
}

/// What a request leads to at once.
type Answer = Result<Option<(local_reply::What, Option<OwnedFd>)>, Failure>;

fn answer(what: local_reply::What) -> Answer {
    Ok(Some((what, None)))
}

fn done() -> Answer {
    answer(local_reply::What::Done(pb::Empty {}))
}

impl Client {
    /// A process of a user who may enter.
    pub(super) fn new(
        id: u64,
        pid: i32,
        process: Option<OwnedFd>,
        socket: OwnedFd,
        timeout: Duration,
    ) -> Self {
        Self {
            id,
            pid,
            socket,
            process,
            taken: None,
            saves: false,
            loads: Vec::new(),
            starting: None,
            pending: None,
            out: VecDeque::new(),
            gone: false,
            timeout,
            watches: Vec::new(),
            watched: Interest::READ,
        }
    }

    /// Its socket.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What it is watched for.
    pub(super) fn interest(&self) -> Interest {
        let idle = self.pending.is_none() && self.out.is_empty();
        Interest { read: idle, write: !self.out.is_empty(), edge: false }
    }

    /// What it is watched for as yet; reading, at first.
    pub(super) fn watched(&self) -> Interest {
        self.watched
    }

    /// It is watched for something else now.
    pub(super) fn set_watched(&mut self, watched: Interest) {
        self.watched = watched;
    }

    /// Whether it has no snapshot and waits for nothing: it can ask again if it is sent away.
    pub(super) fn is_idle(&self) -> bool {
        self.taken.is_none() && self.pending.is_none() && self.out.is_empty()
    }

    /// Whether it went away.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// When [`Self::retry`] has something to say at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.pending {
            Some(Pending::Get { until, doubt, .. }) => [*until, *doubt].into_iter().flatten().min(),
            Some(Pending::Whole { doubt }) => *doubt,
            _ => None,
        }
    }

    /// Connections that it has brought.
    pub(super) fn take_loads(&mut self) -> Vec<(OwnedFd, String)> {
        std::mem::take(&mut self.loads)
    }

    /// Trees that have to be watched from now on.
    pub(super) fn take_watches(&mut self) -> Vec<Watch> {
        std::mem::take(&mut self.watches)
    }

    /// Something happened to the socket.
    pub(super) fn ready(&mut self, snapshots: &mut Snapshots, daemon: &str) {
        self.write();
        for _ in 0..TURN {
            if self.pending.is_some() || !self.out.is_empty() {
                // Nothing is asked for now, so this is the end; what was said before still counts.
                if !self.hung_up() {
                    return;
                }
                self.pending = None;
                self.out.clear();
            }
            match local::receive::<pb::LocalRequest>(self.socket.as_fd()) {
                Ok(Some(packet)) => self.request(snapshots, packet, daemon),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) => return self.leave(snapshots),
                Err(e) if e.raw_os_error() == Some(libc::EBADMSG) => {
                    self.push(Err(protocol("this is no request")));
                    self.write();
                    return self.leave(snapshots);
                }
                Err(_) => return self.leave(snapshots),
            }
        }
    }

    fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        let end = PollFlags::POLLHUP | PollFlags::POLLERR;
        poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds.first().and_then(PollFd::revents).is_some_and(|came| came.intersects(end))
    }

    fn push(&mut self, reply: Answer) {
        let (what, fd) = match reply {
            Ok(Some(reply)) => reply,
            Ok(None) => return,
            Err(failure) => (local_reply::What::Failed(failure.into()), None),
        };
        self.out.push_back((pb::LocalReply { what: Some(what) }, fd));
    }

    fn write(&mut self) {
        while let Some((reply, fd)) = self.out.front() {
            let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
            match local::send(self.socket.as_fd(), reply, &fds) {
                Ok(()) => {
                    self.out.pop_front();
                }
                // Also when too many descriptors are on their way.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // Its end is seen by reading.
                Err(_) => self.out.clear(),
            }
        }
    }

    fn request(&mut self, snapshots: &mut Snapshots, packet: Packet<pb::LocalRequest>, daemon: &str) {
        use local_request::What;
        let Packet { message, fds } = packet;
        let reply = match message.what {
            Some(What::Get(get)) => self.get(snapshots, get),
            Some(What::ListImages(list)) => self.list(snapshots, &list),
            Some(What::ReadImage(read)) => {
                self.pending = Some(Pending::Read(read));
                Ok(None)
            }
            Some(What::Starting(_)) => self.starting(fds),
            Some(What::Ran(ran)) => match self.taken.take() {
                Some(id) => {
                    self.starting = None;
                    snapshots.ran(id, ran.pid);
                    done()
                }
                None => Err(protocol("nothing was being restored")),
            },
            Some(What::GiveUp(abort)) => {
                // It has ended the tree itself.
                self.starting = None;
                self.release(snapshots, &abort.reason);
                done()
            }
            Some(What::Save(save)) => self.save(snapshots, &save.name),
            Some(What::Saved(saved)) => match self.taken.take().filter(|_| self.saves) {
                Some(id) => snapshots.saved(id, &saved).and_then(|()| done()),
                None => Err(protocol("nothing was being saved")),
            },
            Some(What::Load(load)) => {
                self.loads.extend(fds.into_iter().map(|fd| (fd, load.directory.clone())));
                done()
            }
            Some(What::Status(_)) => {
                snapshots.measure();
                self.status(snapshots, daemon);
                Ok(None)
            }
            Some(What::Drop(drop)) => snapshots.drop_by_hand(&drop.name, drop.force).and_then(|()| done()),
            Some(What::Release(release)) => snapshots.release(&release.name).and_then(|()| done()),
            Some(_) => Err(protocol("this is image-cache; that is asked of image-proxy")),
            None => Err(protocol("this is no request that image-cache knows")),
        };
        self.push(reply);
        self.retry(snapshots, Instant::now());
    }

    fn get(&mut self, snapshots: &Snapshots, get: pb::Get) -> Answer {
        name::check_snapshot(&get.name)?;
        if let Some(other) = self.taken.and_then(|id| snapshots.get(id)) {
            if other.begin.name == get.name && !get.early {
                self.pending = Some(Pending::Whole { doubt: None });
                return Ok(None);
            }
            return Err(protocol(format!("snapshot {} is being restored already", other.begin.name)));
        }
        if get.id != 0
            && !snapshots.all().any(|s| s.begin.id == get.id && s.begin.name == get.name && s.is_live())
        {
            let text = format!("snapshot {} is not here any more", get.name);
            return Err(Failure::new(FailCode::FailNotFound, text));
        }
        let until = Instant::now().checked_add(Duration::from_millis(get.wait_ms));
        let newest = snapshots.newest();
        self.pending = Some(Pending::Get { get, until, newest, seen: None, doubt: None });
        Ok(None)
    }

    fn save(&mut self, snapshots: &mut Snapshots, name: &str) -> Answer {
        if self.taken.is_some() {
            return Err(protocol("it has a snapshot already"));
        }
        let id = snapshots.take_to_save(name, Reader { client: self.id, pid: self.pid })?;
        (self.taken, self.saves) = (Some(id), true);
        let info = snapshots.get(id).map(Snapshot::info);
        answer(local_reply::What::Snapshot(info.unwrap_or_default()))
    }

    fn list(&self, snapshots: &Snapshots, list: &pb::ListImages) -> Answer {
        let found = self.own(snapshots).and_then(|id| {
            let images = snapshots.generation(id, list.generation).and_then(|s| s.images.as_ref());
            images.ok_or_else(|| chain_ends(list.generation))
        });
        answer(local_reply::What::Images(found?.list(&list.after, PAGE)))
    }

    fn own(&self, snapshots: &Snapshots) -> Result<u64, Failure> {
        let id = self.taken.ok_or_else(|| protocol("no snapshot was asked for"))?;
        match snapshots.get(id) {
            Some(snapshot) if snapshot.is_live() => Ok(id),
            Some(snapshot) => Err(snapshot.failure()),
            None => Err(Failure::new(FailCode::FailNotFound, "the snapshot is gone")),
        }
    }

    fn starting(&mut self, fds: Vec<OwnedFd>) -> Answer {
        let Ok([root, decision]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(protocol(
                "a pidfd of the root and what is decided about the tree have to come with it",
            ));
        };
        let pid = pid_of(root.as_fd()).map_err(|e| protocol(format!("descriptor of the root: {e}")))?;
        let process = self.process.as_ref().and_then(|process| process.try_clone().ok());
        let witness = Witness::new(process, decision)
            .map_err(|e| protocol(format!("no witness of the restore: {e}")))?;
        self.starting = Some(Starting { root, pid, witness });
        self.pending = Some(Pending::Starting);
        Ok(None)
    }

    fn status(&mut self, snapshots: &Snapshots, daemon: &str) {
        let (daemon, closing) = (daemon.to_owned(), snapshots.is_closing());
        let empty = || pb::Snapshots { daemon: daemon.clone(), closing, ..pb::Snapshots::default() };
        let mut page = empty();
        let mut room = PAGE;
        for snapshot in snapshots.all() {
            let info = snapshot.info();
            let len = prost::Message::encoded_len(&info) + 8;
            if len > room && !page.snapshots.is_empty() {
                page.more = true;
                let full = std::mem::replace(&mut page, empty());
                self.push(answer(local_reply::What::Snapshots(full)));
                room = PAGE;
            }
            room = room.saturating_sub(len);
            page.snapshots.push(info);
        }
        self.push(answer(local_reply::What::Snapshots(page)));
    }

    /// Answers what waits, if it can be answered now.
    pub(super) fn retry(&mut self, snapshots: &mut Snapshots, now: Instant) {
        let reply = match self.pending.take() {
            None => Ok(None),
            Some(Pending::Get { get, until, mut newest, mut seen, mut doubt }) => {
                let reader = Reader { client: self.id, pid: self.pid };
                seen = seen.or_else(|| snapshots.failed_since(&get.name, newest));
                let failed = |s: &&Snapshot| s.state == State::Failed && get.id == 0;
                if let Some(failed) = seen.and_then(|id| snapshots.get(id)).filter(failed) {
                    let passed = local_reply::What::Passed(failed.ended().into());
                    (newest, seen, doubt) = (snapshots.newest(), None, None);
                    // Whoever reads nothing is not told of each.
                    if self.out.is_empty() {
                        self.push(answer(passed));
                    }
                }
                match snapshots.take(&get, &mut seen, reader) {
                    Ok(Some(id)) => {
                        self.taken = Some(id);
                        let info = snapshots.get(id).map(Snapshot::info);
                        answer(local_reply::What::Snapshot(info.unwrap_or_default()))
                    }
                    Err(failure) => Err(failure),
                    Ok(None) => {
                        doubt = self.doubt(snapshots, seen, doubt, now);
                        // What has begun to arrive is waited for to its end.
                        let until = if seen.is_some() { doubt } else { until };
                        if until.is_some_and(|until| now >= until) {
                            Err(snapshots.not_found(&get.name, Duration::from_millis(get.wait_ms)))
                        } else {
                            self.pending = Some(Pending::Get { get, until, newest, seen, doubt });
                            Ok(None)
                        }
                    }
                }
            }
            Some(Pending::Whole { doubt }) => self.whole(snapshots, doubt, now),
            Some(Pending::Read(read)) => self.read(snapshots, read),
            Some(Pending::Starting) => match self.asks_to_start(snapshots) {
                Ok(true) => done(),
                Ok(false) => {
                    self.pending = Some(Pending::Starting);
                    Ok(None)
                }
                Err(failure) => {
                    self.starting = None;
                    Err(failure)
                }
            },
        };
        self.push(reply);
        self.write();
    }

    fn asks_to_start(&self, snapshots: &mut Snapshots) -> Result<bool, Failure> {
        let pid = self.starting.as_ref().map_or(0, |starting| starting.pid);
        snapshots.starting(self.own(snapshots)?, pid)
    }

    /// Until when a snapshot may be in doubt, if it is.
    fn doubt(
        &self,
        snapshots: &Snapshots,
        id: Option<u64>,
        since: Option<Instant>,
        now: Instant,
    ) -> Option<Instant> {
        let snapshot = id.and_then(|id| snapshots.get(id)).filter(|s| s.state == State::InDoubt)?;
        // A source that has not said Go when it vanished lets its tree go on.
        if snapshot.begin.run_first { Some(now) } else { since.or(now.checked_add(self.timeout)) }
    }

    fn whole(&mut self, snapshots: &Snapshots, doubt: Option<Instant>, now: Instant) -> Answer {
        let Some(snapshot) = self.taken.and_then(|id| Some((id, snapshots.get(id)?))) else {
            return Err(protocol("no snapshot was asked for"));
        };
        if snapshot.1.state == State::Failed {
            return answer(local_reply::What::Passed(snapshot.1.ended().into()));
        }
        if snapshots.can_be_restored(snapshot.0)? {
            return answer(local_reply::What::Snapshot(snapshot.1.info()));
        }
        let doubt = self.doubt(snapshots, self.taken, doubt, now);
        if doubt.is_some_and(|until| now >= until) {
            return Err(snapshots.not_found(&snapshot.1.begin.name, Duration::ZERO));
        }
        self.pending = Some(Pending::Whole { doubt });
        Ok(None)
    }

    fn read(&mut self, snapshots: &mut Snapshots, read: pb::ReadImage) -> Answer {
        name::check_image(&read.name)?;
        let id = self.own(snapshots)?;
        if read.consume
            && read.generation == 0
            && let Some(Found::Image(info, fd)) = snapshots.consume(id, &read.name)?
        {
            return Ok(Some((local_reply::What::Image(info), Some(fd))));
        }
        let part = match (read.generation, read.least) {
            (_, 0) | (1.., _) => None,
            (0, least) => Some(snapshots.read_part(id, &read.name, least)?),
        };
        let snapshot =
            snapshots.generation(id, read.generation).ok_or_else(|| chain_ends(read.generation))?;
        let images = snapshot.images.as_ref().ok_or_else(|| snapshot.failure())?;
        match part.map_or_else(|| images.read(&read.name), Ok)? {
            Found::Image(info, fd) => Ok(Some((local_reply::What::Image(info), Some(fd)))),
            Found::NotYet if snapshot.state == State::Receiving => {
                self.pending = Some(Pending::Read(read));
                Ok(None)
            }
            Found::NotYet => {
                let text = format!("snapshot {} has no image {}", snapshot.begin.name, read.name);
                Err(Failure::new(FailCode::FailNotFound, text))
            }
        }
    }

    /// Gives back what it has.
    fn release(&mut self, snapshots: &mut Snapshots, why: &str) {
        let Some(id) = self.taken.take() else { return };
        if self.saves {
            return snapshots.not_saved(id);
        }
        match self.starting.take() {
            Some(starting) if snapshots.get(id).is_some_and(|s| s.state == State::Starting) => {
                snapshots.orphan(id);
                self.watches.push(Watch { id, starting, why: why.to_owned() });
            }
            _ => snapshots.let_go(id, why),
        }
    }

    /// It is gone.
    pub(super) fn leave(&mut self, snapshots: &mut Snapshots) {
        self.gone = true;
        self.pending = None;
        let why = format!("its restore (pid {}) ended without a word", self.pid);
        self.release(snapshots, &why);
    }
}

fn chain_ends(generation: u32) -> Failure {
    Failure::new(FailCode::FailNotFound, format!("the snapshot has no parent number {generation}"))
}

/// The tree of a restore that went away between "starting" and "ran".
#[derive(Debug)]
pub(super) struct Watch {
    id: u64,
    starting: Starting,
    why: String,
}

impl Watch {
    /// What to watch for its end: the restore, and the root.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.starting.witness.fd(), self.starting.root.as_fd()]
    }

    /// Looks; true when all is done that can be.
    pub(super) fn look(&self, snapshots: &mut Snapshots) -> bool {
        match self.starting.witness.look() {
            Verdict::Open => return false,
            Verdict::LetGo => snapshots.ran(self.id, self.starting.pid),
            // It dies with its restore, which takes as long as it takes; whoever restores it needs its pids.
            Verdict::Untouched if !has_ended(self.starting.root.as_fd()) => return false,
            Verdict::Untouched => {
                snapshots.let_go(self.id, &format!("{}; nobody of the tree has run", self.why));
            }
            Verdict::Between | Verdict::Killed => snapshots.vanished(self.id, &self.why),
        }
        true
    }
}
