//! Images as files in a directory.
//!
//! Images are written into a directory of their own below the images directory ([`replace`]) and get their places at
//! commit, so that until then nothing that was there before is touched. A restore holds a lock on the inventory it
//! began with, and no dump replaces a snapshot while somebody reads it.
//!
//! The directory and the images in it are taken only if nobody but root and the caller could have put them there
//! (`ownership`), because a restored task has whatever credentials they say.

mod replace;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt::{self, Debug, Formatter};
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::symlinkat;

use super::{INVENTORY, ImageFile, ImageSink, PagesSink, Store, check_name};
use crate::image::error::ImageError;
use crate::ownership::{self, Names, OwnershipError};
use crate::settings::OwnerCheck;
use replace::Replacement;

/// The link to the parent snapshot's directory.
const PARENT: &str = "parent";
/// As messages name them.
const DIRECTORY: &str = "images directory";
const IMAGE: &str = "image";
/// How long somebody may be about to be done with a directory: a dump moves its images into place in less.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 3000 });

/// When the images of a dump must be on disk, and not only in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sync {
    /// Before the snapshot is committed. Where writes fail late (network file systems, a broken disk), this is when
    /// that is known.
    BeforeCommit,
    /// Before [`DirStore::finish`] returns, when the tree runs again.
    AtEnd,
    /// When the kernel finds the time.
    #[default]
    Never,
}

/// A directory of images: written by a dump, read by a restore.
pub struct DirStore {
    dir: OwnedFd,
    path: PathBuf,
    mode: DirMode,
    check: OwnerCheck,
    names: Names,
    unfinished: Arc<AtomicBool>,
    parent: OnceLock<Arc<dyn Store>>,
}

impl Debug for DirStore {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirStore").field("path", &self.path).field("mode", &self.mode).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum DirMode {
    Read(Snapshot),
    Write(Box<Mutex<Writing>>),
}

/// A snapshot to be read.
#[derive(Debug)]
struct Snapshot {
    /// Where its images are; what the first one has not is in the next.
    dirs: Vec<OwnedFd>,
    /// Its inventory, locked so that it stays.
    lock: Option<File>,
}

/// What a dump has made so far.
#[derive(Debug)]
struct Writing {
    replacement: Replacement,
    made: BTreeSet<String>,
    committed: bool,
    sync: Sync,
}

impl DirStore {
    /// For a restore: reads the images in `path`.
    #[cfg(any(test, feature = "internals"))]
    pub fn open(path: &Path) -> Result<DirStore, ImageError> {
        DirStore::open_checked(path, OwnerCheck::On)
    }

    /// As [`Self::open`], with `check` for whom the directory and its images may belong to.
    pub fn open_checked(path: &Path, check: OwnerCheck) -> Result<DirStore, ImageError> {
        let dir = ownership::open_dir(AT_FDCWD, DIRECTORY, path, check)?;
        DirStore::read(dir, path.to_owned(), check)
    }

    /// For somebody who only wants to see what is there: whoever it belongs to, and without keeping it.
    pub fn look(path: &Path) -> Result<DirStore, ImageError> {
        let (check, names) = (OwnerCheck::Off, Names::Unchecked);
        let dir = ownership::open_dir(AT_FDCWD, DIRECTORY, path, check)?;
        let dirs = current(&dir, path, check)?;
        Ok(DirStore::of(dir, path.to_owned(), DirMode::Read(Snapshot { dirs, lock: None }), check, names))
    }

    /// For a dump: writes images into the existing directory `path`. What is there is not touched before commit.
    #[cfg(any(test, feature = "internals"))]
    pub fn for_dump(path: &Path) -> Result<DirStore, ImageError> {
        DirStore::for_dump_checked(path, OwnerCheck::On, Sync::Never)
    }

    /// As [`Self::for_dump`], with `check` for whom the directory may belong to.
    pub fn for_dump_checked(path: &Path, check: OwnerCheck, sync: Sync) -> Result<DirStore, ImageError> {
        let dir = ownership::open_dir(AT_FDCWD, DIRECTORY, path, check)?;
        let names = ownership::check_dir(dir.as_fd(), DIRECTORY, path, check)?;
        let replacement = Replacement::begin(&dir, path, check)?;
        let writing = Writing { replacement, made: BTreeSet::new(), committed: false, sync };
        let mode = DirMode::Write(Box::new(Mutex::new(writing)));
        Ok(DirStore::of(dir, path.to_owned(), mode, check, names))
    }

    fn read(dir: OwnedFd, path: PathBuf, check: OwnerCheck) -> Result<DirStore, ImageError> {
        let names = ownership::check_dir(dir.as_fd(), DIRECTORY, &path, check)?;
        let snapshot = Snapshot::take(&dir, &path, check)?;
        Ok(DirStore::of(dir, path, DirMode::Read(snapshot), check, names))
    }

    fn of(dir: OwnedFd, path: PathBuf, mode: DirMode, check: OwnerCheck, names: Names) -> DirStore {
        DirStore { dir, path, mode, check, names, unfinished: Arc::default(), parent: OnceLock::new() }
    }

    /// The end of a dump that has been committed: its images are on disk if they are to be, and what they replace is
    /// gone. When that fails the old snapshot is back.
    pub fn finish(&self) -> Result<(), ImageError> {
        let DirMode::Write(writing) = &self.mode else { return Ok(()) };
        let mut writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
        if writing.committed && writing.sync == Sync::AtEnd {
            writing.sync = Sync::Never;
            let synced = replace::sync(&self.dir, &self.path, &writing.made);
            if let Err(error) = synced {
                self.take_back(&mut writing)?;
                return Err(error);
            }
        }
        Ok(())
    }

    fn take_back(&self, writing: &mut Writing) -> Result<(), ImageError> {
        writing.committed = false;
        let made = std::mem::take(&mut writing.made);
        writing.replacement.undo(&self.dir, &self.path, &made)
    }

    /// Notes that `name` is about to be made by this dump; where.
    fn note(&self, name: &str) -> Result<OwnedFd, ImageError> {
        let failed = |e| io_error("create", &self.path.join(name), e);
        let DirMode::Write(writing) = &self.mode else { return Err(failed(Errno::EROFS)) };
        let mut writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
        if writing.committed {
            return Err(failed(Errno::EROFS));
        }
        writing.made.insert(name.to_owned());
        writing.replacement.place()
    }

    fn make(&self, name: &str) -> Result<File, ImageError> {
        let place = self.note(name)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(&place, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map(File::from)
            .map_err(|e| io_error("create", &self.path.join(name), e))
    }

    /// Calls `ask` with each directory that images are in, up to the first that gives something.
    fn in_places<T>(
        &self,
        mut ask: impl FnMut(BorrowedFd<'_>) -> Result<Option<T>, ImageError>,
    ) -> Result<Option<T>, ImageError> {
        match &self.mode {
            DirMode::Read(snapshot) => {
                for dir in &snapshot.dirs {
                    if let Some(found) = ask(dir.as_fd())? {
                        return Ok(Some(found));
                    }
                }
                Ok(None)
            }
            DirMode::Write(writing) => {
                let writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
                if writing.committed {
                    ask(self.dir.as_fd())
                } else {
                    ask(writing.replacement.place()?.as_fd())
                }
            }
        }
    }

    fn open_image(&self, dir: BorrowedFd<'_>, name: &str) -> Result<Option<File>, ImageError> {
        let path = self.path.join(name);
        // Not blocking: the "image" may be a FIFO that somebody put there.
        let mut flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        if self.check == OwnerCheck::On {
            flags |= OFlag::O_NOFOLLOW;
        }
        let failed = |source| ImageError::Io { action: "open", path: path.clone(), source };
        let invalid = |what| failed(io::Error::new(io::ErrorKind::InvalidInput, what));
        let file = match openat(dir, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) if self.check == OwnerCheck::On => {
                return Err(invalid("a symbolic link and no image (--no-owner-check follows it)"));
            }
            Err(e) => return Err(failed(e.into())),
        };
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(invalid("not a regular file"));
        }
        ownership::check_file(file.as_fd(), IMAGE, &path, self.names)?;
        Ok(Some(file))
    }
}

impl Store for DirStore {
    fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, ImageError> {
        check_name(name)?;
        Ok(Box::new(self.make(name)?))
    }

    fn create_pages(&self, name: &str, _expected: u64) -> Result<PagesSink, ImageError> {
        check_name(name)?;
        self.make(name).map(PagesSink::File)
    }

    fn open_raw(&self, name: &str) -> Result<Option<ImageFile>, ImageError> {
        check_name(name)?;
        let file = self.in_places(|dir| self.open_image(dir, name))?;
        let failed = |source| ImageError::Io { action: "read", path: self.path.join(name), source };
        file.map(ImageFile::whole).transpose().map_err(failed)
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        let mut names = BTreeSet::new();
        self.in_places(|dir| {
            let found = names_in(dir).map_err(|e| io_error("list", &self.path, e))?;
            names.extend(found.into_iter().filter(|name| check_name(name).is_ok()));
            Ok(None::<()>)
        })?;
        Ok(names.into_iter().collect())
    }

    fn commit(&self) -> Result<(), ImageError> {
        if self.unfinished.load(Ordering::Acquire) {
            return Err(ImageError::Unfinished { path: self.path.clone() });
        }
        let DirMode::Write(writing) = &self.mode else {
            return Ok(());
        };
        let mut writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
        let writing = &mut *writing;
        let safe = writing.sync == Sync::BeforeCommit;
        if safe {
            replace::sync(&writing.replacement.place()?, &self.path, &writing.made)?;
        }
        writing.replacement.commit(&self.dir, &self.path, &writing.made)?;
        writing.committed = true;
        if safe && let Err(error) = replace::sync_dir(&self.dir, &self.path) {
            self.take_back(writing)?;
            return Err(error);
        }
        Ok(())
    }

    fn withdraw(&self) -> Result<(), ImageError> {
        let DirMode::Write(writing) = &self.mode else {
            return Ok(());
        };
        self.take_back(&mut writing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError> {
        if let Some(parent) = self.parent.get() {
            return Ok(Some(parent.clone()));
        }
        let path = self.path.join(PARENT);
        // A link is relative to the images directory, wherever it lies itself.
        let target = self.in_places(|dir| match readlinkat(dir, PARENT) {
            Ok(target) => Ok(Some(PathBuf::from(target))),
            Err(Errno::ENOENT) => Ok(None),
            // A directory by itself.
            Err(Errno::EINVAL) => Ok(Some(PathBuf::from(PARENT))),
            Err(e) => Err(io_error("open the parent snapshot", &path, e)),
        })?;
        let Some(target) = target else { return Ok(None) };
        let opened = ownership::open_dir(self.dir.as_fd(), "parent snapshot", &target, self.check);
        let dir = opened.map_err(|error| match error {
            OwnershipError::Io { source, .. } => {
                ImageError::Io { action: "open the parent snapshot", path: path.clone(), source }
            }
            stranger @ OwnershipError::Stranger { .. } => stranger.into(),
        })?;
        let parent = DirStore::read(dir, path, self.check)?;
        Ok(Some(self.parent.get_or_init(|| Arc::new(parent)).clone()))
    }

    fn identity(&self) -> Option<(u64, u64)> {
        fstat(&self.dir).ok().map(|stat| (stat.st_dev, stat.st_ino))
    }

    fn link_parent(&self, target: &Path) -> Result<(), ImageError> {
        let place = self.note(PARENT)?;
        symlinkat(target, &place, PARENT).map_err(|e| io_error("create", &self.path.join(PARENT), e))
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn unfinished(&self) -> Arc<AtomicBool> {
        self.unfinished.clone()
    }
}

impl Drop for DirStore {
    fn drop(&mut self) {
        let DirMode::Write(writing) = &self.mode else {
            return;
        };
        let writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.replacement.end(&self.dir, &self.path);
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // Also for a process of the tree that still has a copy of the descriptor.
        if let Some(lock) = &self.lock {
            let _ = lock.unlock();
        }
    }
}

impl Snapshot {
    /// Finds the snapshot in `dir` and keeps it there as long as this lives.
    fn take(dir: &OwnedFd, path: &Path, check: OwnerCheck) -> Result<Self, ImageError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let dirs = current(dir, path, check)?;
            let inventory = inventory(&dirs);
            let (busy, holder) = match &inventory {
                None => (replace::under_way(dir), "a dump into it is under way, and no snapshot is complete"),
                Some(file) => match file.try_lock_shared() {
                    // It may have been replaced meanwhile.
                    Ok(()) => (!same(file, self::inventory(&current(dir, path, check)?).as_ref()), ""),
                    Err(TryLockError::WouldBlock) => (true, "a dump is replacing the snapshot in it"),
                    Err(TryLockError::Error(error)) => {
                        tracing::debug!("lock of {}: {error}", path.join(INVENTORY).display());
                        (false, "")
                    }
                },
            };
            if !busy {
                return Ok(Self { dirs, lock: inventory });
            }
            if Instant::now() > deadline {
                return Err(ImageError::Busy { path: path.to_owned(), what: holder, pid: None });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The directories in which the snapshot of `dir` is. There is one at every moment of a commit, whoever is killed in it.
fn current(dir: &OwnedFd, path: &Path, check: OwnerCheck) -> Result<Vec<OwnedFd>, ImageError> {
    let own =
        || dir.try_clone().map_err(|source| ImageError::Io { action: "open", path: path.to_owned(), source });
    if nix::sys::stat::fstatat(dir, INVENTORY, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW).is_ok() {
        return Ok(vec![own()?]);
    }
    if let Some(previous) = replace::aside(dir, path, replace::PREVIOUS, check)? {
        return Ok(vec![previous]);
    }
    match replace::aside(dir, path, replace::LEAVING, check)? {
        Some(leaving) => Ok(vec![leaving, own()?]),
        None => Ok(vec![own()?]),
    }
}

/// The inventory that is in one of these directories, open for its lock.
fn inventory(dirs: &[OwnedFd]) -> Option<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    dirs.iter().find_map(|dir| openat(dir, INVENTORY, flags, Mode::empty()).ok()).map(File::from)
}

fn same(one: &File, other: Option<&File>) -> bool {
    let id = |file: &File| file.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    other.is_some_and(|other| id(one) == id(other))
}

fn names_in(dir: BorrowedFd<'_>) -> Result<Vec<String>, Errno> {
    let mut dir = Dir::openat(dir, ".", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        names.extend(entry?.file_name().to_str().ok().map(str::to_owned));
    }
    Ok(names)
}

fn io_error(action: &'static str, path: &Path, errno: Errno) -> ImageError {
    ImageError::Io { action, path: path.to_owned(), source: errno.into() }
}
