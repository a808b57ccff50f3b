//! The store that a remote restore reads from: images lie in memory of the cache, large ones in one file.
//!
//! It may be taken before all images are there ([`Store::arrival`]): then pages are read as they come.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use super::super::journal::{self, Reached};
use super::super::pb::{self, FailCode, local_reply, local_request, snapshot_info::State};
use super::super::{CACHE_SOCKET, Failure};
use super::control::{self, Daemon};
use super::image_error;
use super::packets::{Packets, checked, wait_for};
use crate::deadline;
use crate::image::{Arrival, ImageError, ImageFile, ImageSink, Outcome, PagesSink, Part, Store};
use crate::progress;
use crate::settings::RemoteSettings;

/// How long the cache may take for an answer it need not wait for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A wait is worth a line after this.
const QUIET: Duration = Duration::from_secs(1);

/// What has begun to arrive comes to an end by itself, one way or the other: the cache watches over that.
const ARRIVAL: Duration = Duration::from_secs(24 * 3600);

/// A snapshot in the cache of this host, held for one restore. Dropped before the tree runs, the snapshot
/// can be restored again.
#[derive(Debug)]
pub struct RemoteSnapshot {
    session: Arc<Session>,
    names: RwLock<BTreeSet<String>>,
    /// Not all images are there.
    arriving: AtomicBool,
    /// They never will be: it has failed at its source.
    passed: AtomicBool,
    /// Up the chain of parents.
    generation: u32,
    path: PathBuf,
    parent: OnceLock<Arc<RemoteSnapshot>>,
}

#[derive(Debug)]
struct Session {
    packets: Mutex<Packets>,
    name: String,
    path: PathBuf,
    /// Freed as it is read.
    free: bool,
    ran: AtomicBool,
    /// The source ends its tree after this one runs: which snapshot, and where the journal of the cache is.
    run_first: Option<(u64, PathBuf)>,
}

/// Somebody may sit in front of a restore that waits: one line tells for what, and what became of the last one.
fn tell_what_is_awaited(remote: &RemoteSettings) {
    let (name, limit) = (&remote.snapshot, remote.wait_snapshot.as_secs());
    let Ok((all, _)) = control::snapshots(Daemon::Cache, &remote.work_dir) else { return };
    let last = all.iter().rev().find(|info| info.name == *name);
    let over =
        |info: &pb::SnapshotInfo| matches!(info.state(), State::Failed | State::Dropped | State::Restored);
    let line = match last {
        Some(info) if !over(info) => {
            tracing::info!("snapshot {name} has begun to arrive: {} bytes so far", info.bytes);
            return;
        }
        Some(info) => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            let (state, ago) = (info.state().as_str_name(), now.saturating_sub(info.since));
            format!("; the last one of that name is {state} since {ago} s: {}", info.text)
        }
        None => String::new(),
    };
    tracing::warn!("waiting at most {limit} s (--timeout) for a snapshot {name} to come{line}");
}

fn tell_what_there_is(info: &pb::SnapshotInfo) {
    tracing::info!(
        "snapshot {} of task {} ({}) at {}: {} images, {} bytes",
        info.name,
        info.pid,
        info.comm,
        info.host,
        info.images,
        info.bytes
    );
}

impl Session {
    fn packets(&self) -> MutexGuard<'_, Packets> {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of all images there are now, of the snapshot itself or one up the chain of parents.
    fn names(&self, generation: u32) -> Result<BTreeSet<String>, Failure> {
        let mut names = BTreeSet::new();
        let mut after = String::new();
        loop {
            let packets = self.packets();
            let what = local_request::What::ListImages(pb::ListImages { after, generation });
            let (reply, _) = packets.ask(what, &[], PATIENCE)?;
            let local_reply::What::Images(page) = reply else { return Err(packets.unexpected(&reply)) };
            drop(packets);
            names.extend(page.images.into_iter().map(|image| image.name));
            match names.last() {
                Some(last) if page.more => after = last.clone(),
                _ => return Ok(names),
            }
        }
    }

    fn read(&self, read: pb::ReadImage, patience: Duration) -> Result<(pb::ImageInfo, File), Failure> {
        let packets = self.packets();
        let (reply, mut fds) = packets.ask(local_request::What::ReadImage(read), &[], patience)?;
        match (reply, fds.pop()) {
            (local_reply::What::Image(info), Some(fd)) => Ok((info, File::from(fd))),
            (reply, _) => Err(packets.unexpected(&reply)),
        }
    }
}

impl Arrival for Session {
    fn part(&self, name: &str, least: u64) -> Result<Part, ImageError> {
        // Whether bytes come in time is the cache's matter.
        let _pause = deadline::pause();
        let read = pb::ReadImage { name: name.to_owned(), least: least.max(1), ..Default::default() };
        let read = self.read(read, ARRIVAL);
        let (info, file) = read.map_err(|failure| image_error("read", &self.path.join(name), failure))?;
        Ok(Part { file, start: info.offset, len: info.size, complete: info.complete })
    }
}

impl RemoteSnapshot {
    /// Waits until a snapshot begins, `wait` at most, and takes it: as soon as it is described, if that is of use, else when it can
    /// be restored. One that fails before is not the last of its name: the wait goes on.
    pub fn take(remote: &RemoteSettings, wait: Duration) -> Result<Self, Failure> {
        let name = checked(&remote.snapshot)?;
        let path = remote.work_dir.join(CACHE_SOCKET);
        let packets = Packets::connect("image-cache", &path, remote.timeout)?;
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        // What is freed as it is read could not be read again if the dump failed.
        let early = !remote.free_as_read;
        let get =
            local_request::What::Get(pb::Get { name: name.clone(), id: remote.snapshot_id, wait_ms, early });
        let until = Instant::now() + PATIENCE;
        packets.send(get, &[], until)?;
        progress::phase("waiting for the snapshot", 0);
        let mut fds = [PollFd::new(packets.fd(), PollFlags::POLLIN)];
        if !wait_for(&mut fds, Instant::now() + QUIET)? {
            tell_what_is_awaited(remote);
        }
        // What has begun to arrive is waited for: the cache says when it does not come.
        let mut told: Option<Instant> = None;
        let reply = loop {
            let (reply, _) = packets.receive(Instant::now() + wait + ARRIVAL)?;
            let local_reply::What::Passed(failed) = reply else { break reply };
            // Not a line for each, if somebody sends many that come to nothing.
            if told.is_none_or(|told| told.elapsed() >= QUIET) {
                tracing::warn!("{}; waiting for the next one", Failure::from(failed));
                told = Some(Instant::now());
            }
        };
        let local_reply::What::Snapshot(info) = reply else { return Err(packets.unexpected(&reply)) };
        let arriving = early && info.state() != State::Restoring;
        if !info.saved.is_empty() {
            tracing::warn!("snapshot {name} is in {} too: restore only one of them", info.saved);
        }
        if arriving {
            tracing::info!(
                "snapshot {} of task {} ({}) at {} arrives",
                info.name,
                info.pid,
                info.comm,
                info.host
            );
        } else {
            tell_what_there_is(&info);
        }
        let path = PathBuf::from(format!("remote:{name}"));
        let run_first = info.run_first.then(|| (info.id, remote.work_dir.clone()));
        let session = Session {
            packets: Mutex::new(packets),
            name,
            path: path.clone(),
            free: remote.free_as_read && !info.run_first,
            ran: AtomicBool::new(false),
            run_first,
        };
        Self::with_names(Arc::new(session), 0, path, arriving)
    }

    /// Takes a snapshot to make a copy of it.
    pub fn take_to_save(work_dir: &Path, name: &str) -> Result<Self, Failure> {
        let name = checked(name)?;
        let packets = Packets::connect("image-cache", &work_dir.join(CACHE_SOCKET), Duration::ZERO)?;
        let what = local_request::What::Save(pb::Save { name: name.clone() });
        let (reply, _) = packets.ask(what, &[], PATIENCE)?;
        let local_reply::What::Snapshot(info) = reply else { return Err(packets.unexpected(&reply)) };
        tell_what_there_is(&info);
        let path = PathBuf::from(format!("remote:{name}"));
        let session = Session {
            packets: Mutex::new(packets),
            name,
            path: path.clone(),
            free: false,
            ran: AtomicBool::new(false),
            run_first: None,
        };
        Self::with_names(Arc::new(session), 0, path, false)
    }

    /// The copy is complete, and where; the snapshot is to be dropped if `drop`. An error: the copy is no good.
    pub fn saved(&self, directory: &str, drop: bool) -> Result<(), Failure> {
        let saved = pb::Saved { directory: directory.to_owned(), drop };
        self.session.packets().tell(local_request::What::Saved(saved), &[], PATIENCE)
    }

    fn with_names(
        session: Arc<Session>,
        generation: u32,
        path: PathBuf,
        arriving: bool,
    ) -> Result<Self, Failure> {
        let (names, arriving) = (RwLock::new(session.names(generation)?), AtomicBool::new(arriving));
        let (passed, parent) = (AtomicBool::default(), OnceLock::new());
        Ok(Self { session, names, arriving, passed, generation, path, parent })
    }

    /// Whether it has failed at its source before all of it had come: the tree runs on there.
    pub fn has_passed(&self) -> bool {
        self.passed.load(Ordering::Acquire)
    }

    /// Tells why the restore failed; the snapshot can be restored again.
    pub fn give_up(&self, reason: &str) {
        if !self.session.ran.load(Ordering::Acquire) {
            let what = local_request::What::GiveUp(pb::Abort { reason: reason.to_owned() });
            // The end of the connection says the same, but for the reason.
            let _ = self.session.packets().tell(what, &[], Duration::from_secs(5));
        }
    }

    fn read_only(&self, action: &'static str, name: &str) -> ImageError {
        ImageError::Io { action, path: self.path_of(name), source: Errno::EROFS.into() }
    }
}

impl Store for RemoteSnapshot {
    fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, ImageError> {
        Err(self.read_only("create", name))
    }

    fn create_pages(&self, name: &str, _expected: u64) -> Result<PagesSink, ImageError> {
        Err(self.read_only("create", name))
    }

    fn open_raw(&self, name: &str) -> Result<Option<ImageFile>, ImageError> {
        if !self.names.read().unwrap_or_else(PoisonError::into_inner).contains(name) {
            return Ok(None);
        }
        let failed = |failure| image_error("read", &self.path_of(name), failure);
        let consume = self.consumed() && name.starts_with("pages-");
        let read = pb::ReadImage { name: name.to_owned(), generation: self.generation, consume, least: 0 };
        let (info, file) = self.session.read(read, PATIENCE).map_err(failed)?;
        Ok(Some(ImageFile::part(file, info.offset, info.size)))
    }

    fn arrival(&self) -> Option<Arc<dyn Arrival>> {
        self.arriving.load(Ordering::Acquire).then(|| -> Arc<dyn Arrival> { self.session.clone() })
    }

    fn arrived(&self) -> Result<(), ImageError> {
        if !self.arriving.load(Ordering::Acquire) {
            return Ok(());
        }
        let _pause = deadline::pause();
        let failed = |failure| image_error("wait for", &self.path, failure);
        let get = pb::Get { name: self.session.name.clone(), id: 0, wait_ms: 0, early: false };
        let packets = self.session.packets();
        let (reply, _) = packets.ask(local_request::What::Get(get), &[], ARRIVAL).map_err(failed)?;
        let info = match reply {
            local_reply::What::Snapshot(info) => info,
            local_reply::What::Passed(why) => {
                self.passed.store(true, Ordering::Release);
                return Err(failed(why.into()));
            }
            other => return Err(failed(packets.unexpected(&other))),
        };
        drop(packets);
        tell_what_there_is(&info);
        let names = self.session.names(self.generation).map_err(failed)?;
        *self.names.write().unwrap_or_else(PoisonError::into_inner) = names;
        self.arriving.store(false, Ordering::Release);
        Ok(())
    }

    fn has_holes(&self) -> bool {
        true
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        Ok(self.names.read().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect())
    }

    fn commit(&self) -> Result<(), ImageError> {
        Err(self.read_only("commit", ""))
    }

    fn withdraw(&self) -> Result<(), ImageError> {
        Err(self.read_only("withdraw", ""))
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError> {
        if let Some(parent) = self.parent.get() {
            return Ok(Some(parent.clone()));
        }
        let path = self.path.join("parent");
        match Self::with_names(self.session.clone(), self.generation.saturating_add(1), path.clone(), false) {
            Ok(parent) => Ok(Some(self.parent.get_or_init(|| Arc::new(parent)).clone())),
            Err(failure) if failure.code == FailCode::FailNotFound => Ok(None),
            Err(failure) => Err(image_error("open the parent snapshot", &path, failure)),
        }
    }

    fn link_parent(&self, _target: &Path) -> Result<(), ImageError> {
        Err(self.read_only("link", "parent"))
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn unfinished(&self) -> Arc<AtomicBool> {
        Arc::default()
    }

    fn report(&self, outcome: Outcome<'_>) -> Result<(), ImageError> {
        let failed = |failure| image_error("report the restore of", &self.path, failure);
        let packets = self.session.packets();
        match outcome {
            // The source has the tree still, and says when it may run; without the cache it never does.
            Outcome::Starting { root, decision } if self.session.run_first.is_some() => packets
                .tell(local_request::What::Starting(pb::Empty {}), &[root, decision], ARRIVAL)
                .map_err(failed),
            Outcome::Starting { root, decision } => {
                match packets.tell(local_request::What::Starting(pb::Empty {}), &[root, decision], PATIENCE) {
                    // With the cache the images are gone. Nobody else can restore them, and not to go on would be
                    // the end of the tree.
                    Err(failure) if failure.code == FailCode::FailLost && packets.has_ended(PATIENCE) => {
                        tracing::warn!("{failure}; all has been read, the tree goes on");
                        Ok(())
                    }
                    told => told.map_err(failed),
                }
            }
            Outcome::Running(pid) => {
                self.session.ran.store(true, Ordering::Release);
                let told = packets.tell(local_request::What::Ran(pb::Ran { pid }), &[], PATIENCE);
                if let (Err(_), Some((id, work_dir))) = (&told, &self.session.run_first) {
                    // The source waits for this; the next cache tells it.
                    if let Err(e) = journal::note(work_dir, *id, Reached::Running, pid) {
                        tracing::error!("the journal of the cache: {e}");
                    }
                }
                told.map_err(failed)
            }
        }
    }

    fn consumed(&self) -> bool {
        self.session.free && self.generation == 0
    }
}
