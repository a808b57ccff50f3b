//! The store that a remote restore reads from: images lie in memory of the cache, large ones in one file.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use super::super::pb::{self, FailCode, local_reply, local_request, snapshot_info::State};
use super::super::{CACHE_SOCKET, Failure};
use super::control::{self, Daemon};
use super::image_error;
use super::packets::{Packets, checked, wait_for};
use crate::image::{ImageError, ImageFile, ImageSink, Outcome, PagesSink, Store};
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
    names: BTreeSet<String>,
    /// Up the chain of parents.
    generation: u32,
    path: PathBuf,
    parent: OnceLock<Arc<RemoteSnapshot>>,
}

#[derive(Debug)]
struct Session {
    packets: Mutex<Packets>,
    /// Freed as it is read.
    free: bool,
    ran: AtomicBool,
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

impl Session {
    fn packets(&self) -> MutexGuard<'_, Packets> {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RemoteSnapshot {
    /// Waits for the snapshot and takes it.
    pub fn take(remote: &RemoteSettings) -> Result<Self, Failure> {
        let name = checked(&remote.snapshot)?;
        let path = remote.work_dir.join(CACHE_SOCKET);
        let packets = Packets::connect("image-cache", &path, remote.timeout)?;
        let wait_ms = u64::try_from(remote.wait_snapshot.as_millis()).unwrap_or(u64::MAX);
        let get = local_request::What::Get(pb::Get { name, wait_ms, early: false });
        let until = Instant::now() + PATIENCE;
        packets.send(get, &[], until)?;
        let mut fds = [PollFd::new(packets.fd(), PollFlags::POLLIN)];
        if !wait_for(&mut fds, Instant::now() + QUIET)? {
            tell_what_is_awaited(remote);
        }
        // What has begun to arrive is waited for: the cache says when it does not come.
        let (reply, _) = packets.receive(Instant::now() + remote.wait_snapshot + ARRIVAL)?;
        let local_reply::What::Snapshot(info) = reply else { return Err(packets.unexpected(&reply)) };
        tracing::info!(
            "snapshot {} of task {} ({}) at {}: {} images, {} bytes",
            info.name,
            info.pid,
            info.comm,
            info.host,
            info.images,
            info.bytes
        );
        let session =
            Session { packets: Mutex::new(packets), free: remote.free_as_read, ran: AtomicBool::new(false) };
        Self::with_names(Arc::new(session), 0, PathBuf::from(format!("remote:{}", remote.snapshot)))
    }

    fn with_names(session: Arc<Session>, generation: u32, path: PathBuf) -> Result<Self, Failure> {
        let mut names = BTreeSet::new();
        let mut after = String::new();
        loop {
            let packets = session.packets();
            let what = local_request::What::ListImages(pb::ListImages { after, generation });
            let (reply, _) = packets.ask(what, &[], PATIENCE)?;
            let local_reply::What::Images(page) = reply else { return Err(packets.unexpected(&reply)) };
            drop(packets);
            names.extend(page.images.into_iter().map(|image| image.name));
            match names.last() {
                Some(last) if page.more => after = last.clone(),
                _ => return Ok(Self { session, names, generation, path, parent: OnceLock::new() }),
            }
        }
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
        if !self.names.contains(name) {
            return Ok(None);
        }
        let failed = |failure| image_error("read", &self.path_of(name), failure);
        let consume = self.consumed() && name.starts_with("pages-");
        let read = pb::ReadImage { name: name.to_owned(), generation: self.generation, consume };
        let packets = self.session.packets();
        let (reply, mut fds) =
            packets.ask(local_request::What::ReadImage(read), &[], PATIENCE).map_err(failed)?;
        match (reply, fds.pop()) {
            (local_reply::What::Image(info), Some(fd)) => {
                Ok(Some(ImageFile::part(File::from(fd), info.offset, info.size)))
            }
            (reply, _) => Err(failed(packets.unexpected(&reply))),
        }
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        Ok(self.names.iter().cloned().collect())
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
        match Self::with_names(self.session.clone(), self.generation.saturating_add(1), path.clone()) {
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
            Outcome::Starting(root) => {
                match packets.tell(local_request::What::Starting(pb::Empty {}), &[root], PATIENCE) {
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
                packets.tell(local_request::What::Ran(pb::Ran { pid }), &[], PATIENCE).map_err(failed)
            }
        }
    }

    fn consumed(&self) -> bool {
        self.session.free && self.generation == 0
    }
}
