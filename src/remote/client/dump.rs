//! The store that a remote dump writes into.

use std::os::fd::{BorrowedFd, IntoRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;

use super::super::{Failure, draw, host, pb};
use super::direct::Direct;
use super::link::Fate;
use super::packets::checked;
use super::proxied::Proxied;
use super::sink::{Outgoing, Pages, Small};
use super::{control, image_error, needs};
use crate::image::{BEFORE_PAGES, ImageError, ImageFile, ImageSink, PagesSink, Store};
use crate::settings::{DEFAULT_REMOTE_TIMEOUT, DumpSettings, Leave, NetSettings, RemoteSettings};

/// A snapshot on its way to a cache. Dropped before [`Store::confirm`] it is forgotten there.
#[derive(Debug)]
pub struct RemoteDump {
    id: u64,
    /// The tree is ended last.
    run_first: bool,
    outgoing: Arc<Outgoing>,
    /// `remote:NAME`, as messages say it.
    path: PathBuf,
    unfinished: Arc<AtomicBool>,
    /// The cache has all of it: from here on only the end of the tree tells which of the two may run.
    complete: AtomicBool,
    /// Nothing is left to be taken back.
    settled: AtomicBool,
}

impl RemoteDump {
    /// Opens the snapshot, before anything is frozen.
    pub fn connect(remote: &RemoteSettings, dump: &DumpSettings, run_first: bool) -> Result<Self, Failure> {
        let name = checked(&remote.snapshot)?;
        let pid = dump.pid.as_raw();
        let comm = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let expected = needs::expected(dump);
        let begin = pb::SnapshotBegin {
            parent: String::new(),
            pid,
            comm: String::from_utf8_lossy(comm.trim_ascii_end()).into_owned(),
            host: host(),
            source_survives: dump.leave != Leave::Killed,
            expected_bytes: expected.bytes,
            created: created.as_secs(),
            before_pages: BEFORE_PAGES.to_owned(),
            id: draw(),
            name,
            run_first,
            options: if run_first { options(dump) } else { Vec::new() },
            needs: Some(expected.needs),
        };
        let (id, name) = (begin.id, begin.name.clone());
        let link: Box<dyn super::link::Link> = match &remote.direct {
            None => Box::new(Proxied::open(&remote.work_dir, begin, remote.timeout)?),
            Some(net) => Box::new(Direct::open(net, begin)?),
        };
        // Through a proxy it is the proxy's matter.
        let compress = remote.direct.is_none() || remote.compress;
        Ok(Self::over(id, &name, run_first, Outgoing::new(link, compress)))
    }

    /// Opens a snapshot for images of this host that lie in `directory`, in the cache of the same host.
    pub fn load(work_dir: &Path, begin: pb::SnapshotBegin, directory: &str) -> Result<Self, Failure> {
        let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let begin =
            pb::SnapshotBegin { name: checked(&begin.name)?, host: host(), id: draw(), created, ..begin };
        let (id, name) = (begin.id, begin.name.clone());
        let net = NetSettings {
            address: None,
            port: 0,
            ps_socket: Some(control::load(work_dir, directory)?.into_raw_fd()),
            tls: None,
            timeout: DEFAULT_REMOTE_TIMEOUT,
        };
        let outgoing = Outgoing::new(Box::new(Direct::open(&net, begin)?), false);
        Ok(Self::over(id, &name, false, outgoing))
    }

    fn over(id: u64, name: &str, run_first: bool, outgoing: Outgoing) -> Self {
        Self {
            id,
            run_first,
            outgoing: Arc::new(outgoing),
            path: PathBuf::from(format!("remote:{name}")),
            unfinished: Arc::default(),
            complete: AtomicBool::new(false),
            settled: AtomicBool::new(false),
        }
    }

    /// Tells it from all others.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The journal that the cache keeps; 0 if that is not known.
    pub fn journal(&self) -> u64 {
        self.outgoing.link().journal()
    }

    /// Whether the cache starts a restore by itself.
    pub fn restores(&self) -> bool {
        self.outgoing.link().restores()
    }

    /// Nothing is sent any more after this.
    pub fn limit(&self, until: Instant) {
        self.outgoing.limit(until);
    }

    /// Waits until the restored tree is complete at the destination, and stopped.
    pub fn armed(&self, until: Option<Instant>) -> Result<pb::Armed, Failure> {
        self.outgoing.link().armed(until)
    }

    /// It may run there; see [`Self::fate`].
    pub fn go(&self) -> Result<(), Failure> {
        self.settled.store(true, Ordering::Release);
        self.outgoing.link().go()
    }

    /// What became of it, as far as that is known within `patience`.
    pub fn fate(&self, patience: Duration) -> Result<Fate, Failure> {
        self.outgoing.link().fate(patience)
    }

    /// The tree runs on here, after [`Self::go`].
    pub fn back(&self, reason: &str) {
        self.outgoing.link().abort(reason);
    }

    /// Waits until the cache is known to have the last word.
    pub fn taken(&self) -> Result<(), Failure> {
        self.outgoing.link().taken()
    }

    /// Waits until the cache says what became of the snapshot.
    pub fn wait_restored(&self, patience: Duration) -> Result<pb::Restored, Failure> {
        self.outgoing.link().restored(patience)
    }

    /// Says why the dump failed, for those who wait at the cache. To be called before it is dropped.
    pub fn give_up(&self, reason: &str) {
        // What is complete may be the only one, but for a tree that is ended last.
        let only = self.complete.load(Ordering::Acquire) && !self.run_first;
        if only || self.settled.swap(true, Ordering::AcqRel) {
            return;
        }
        let reason: Vec<&str> = reason.split_whitespace().collect();
        self.outgoing.link().abort(&format!("the dump failed and the tree runs on: {}", reason.join(" ")));
    }

    fn failed(&self, action: &'static str) -> impl Fn(Failure) -> ImageError + '_ {
        move |failure| image_error(action, &self.path, failure)
    }
}

/// Options of a restore that follow from those of the dump.
fn options(dump: &DumpSettings) -> Vec<String> {
    let common = &dump.common;
    let all = [
        (common.file_locks, "file-locks"),
        (common.link_remap, "link-remap"),
        (common.evasive_devices, "evasive-devices"),
    ];
    all.iter().filter(|(given, _)| *given).map(|(_, name)| (*name).to_owned()).collect()
}

impl Store for RemoteDump {
    fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, ImageError> {
        let small = Small::begin(self.outgoing.clone(), name);
        Ok(Box::new(small.map_err(|f| image_error("send", &self.path_of(name), f))?))
    }

    fn create_pages(&self, name: &str, expected: u64) -> Result<PagesSink, ImageError> {
        let pages = Pages::begin(self.outgoing.clone(), name, expected);
        Ok(PagesSink::Stream(Box::new(pages.map_err(|f| image_error("send", &self.path_of(name), f))?)))
    }

    fn open_raw(&self, name: &str) -> Result<Option<ImageFile>, ImageError> {
        // What has been sent is elsewhere.
        Err(ImageError::Io { action: "open", path: self.path_of(name), source: Errno::EOPNOTSUPP.into() })
    }

    fn pages_come_last(&self) -> bool {
        true
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        Err(ImageError::Io { action: "list", path: self.path.clone(), source: Errno::EOPNOTSUPP.into() })
    }

    fn commit(&self) -> Result<(), ImageError> {
        if self.unfinished.load(Ordering::Acquire) {
            return Err(ImageError::Unfinished { path: self.path.clone() });
        }
        self.outgoing.commit().map_err(self.failed("send"))?;
        let prepared = self.outgoing.link().prepared().map_err(self.failed("commit"))?;
        self.complete.store(true, Ordering::Release);
        tracing::info!("the cache has all {} bytes", prepared.bytes);
        Ok(())
    }

    fn withdraw(&self) -> Result<(), ImageError> {
        if !self.settled.swap(true, Ordering::AcqRel) {
            self.outgoing.link().abort("the dump failed after its last image; the tree runs on");
        }
        Ok(())
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError> {
        Ok(None)
    }

    fn link_parent(&self, target: &Path) -> Result<(), ImageError> {
        let source = Errno::EOPNOTSUPP.into();
        Err(ImageError::Io { action: "link", path: target.to_owned(), source })
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn unfinished(&self) -> Arc<AtomicBool> {
        self.unfinished.clone()
    }

    fn guard(&self, decision: BorrowedFd<'_>) -> Result<(), ImageError> {
        self.outgoing.link().guard(decision).map_err(self.failed("commit"))
    }

    fn recheck(&self) -> Result<(), ImageError> {
        self.outgoing.link().recheck().map_err(self.failed("keep"))
    }

    fn confirm(&self, survives: bool) -> Result<(), ImageError> {
        self.settled.store(true, Ordering::Release);
        self.outgoing.link().confirm(survives).map_err(self.failed("confirm"))
    }
}

impl Drop for RemoteDump {
    fn drop(&mut self) {
        if self.settled.load(Ordering::Acquire) {
            return;
        }
        if self.complete.load(Ordering::Acquire) && !self.run_first {
            // Tasks may have been killed: to have the images thrown away could be the end of the tree. Without a word
            // they are kept; the proxy looks whether the root lives, a cache without one is in doubt.
            let name = self.path.display();
            tracing::warn!(
                "{name}: complete in the cache, but not confirmed; see `crtool image-cache list` there"
            );
            return;
        }
        self.outgoing.link().abort("the dump did not succeed; the tree runs on");
    }
}
