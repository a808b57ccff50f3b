//! Images as files in a directory.

use std::collections::BTreeSet;
use std::fmt::{self, Debug, Formatter};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};

use super::{INVENTORY, ImageSink, PagesSink, Store, check_name};
use crate::image::error::ImageError;

/// The inventory's name until the snapshot is committed.
const PENDING_INVENTORY: &str = ".inventory.img.part";
/// The link to the parent snapshot's directory.
const PARENT: &str = "parent";

/// A directory of images: written by a dump, read by a restore.
pub struct DirStore {
    dir: OwnedFd,
    path: PathBuf,
    mode: DirMode,
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
    Read,
    Write(Mutex<Made>),
}

/// What a dump has made so far.
#[derive(Debug, Default)]
struct Made {
    names: BTreeSet<String>,
    committed: bool,
}

impl DirStore {
    /// For a restore: reads the images in `path`.
    pub fn open(path: &Path) -> Result<DirStore, ImageError> {
        DirStore::at(path, DirMode::Read)
    }

    /// For a dump: writes images into the existing directory `path`. Nothing is touched
    /// before the first image is made.
    pub fn for_dump(path: &Path) -> Result<DirStore, ImageError> {
        DirStore::at(path, DirMode::Write(Mutex::default()))
    }

    fn at(path: &Path, mode: DirMode) -> Result<DirStore, ImageError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = openat(AT_FDCWD, path, flags, Mode::empty()).map_err(|e| io_error("open", path, e))?;
        Ok(DirStore::of(dir, path.to_owned(), mode))
    }

    fn of(dir: OwnedFd, path: PathBuf, mode: DirMode) -> DirStore {
        DirStore { dir, path, mode, unfinished: Arc::default(), parent: OnceLock::new() }
    }

    fn unlink(&self, name: &str) -> Result<(), ImageError> {
        match unlinkat(&self.dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(io_error("remove", &self.path.join(name), e)),
        }
    }

    /// Notes that `name` is about to be made by this dump.
    fn note(&self, name: &str) -> Result<(), ImageError> {
        let first = match &self.mode {
            DirMode::Read => return Err(io_error("create", &self.path.join(name), Errno::EROFS)),
            DirMode::Write(made) => {
                let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
                if made.committed {
                    return Err(io_error("create", &self.path.join(name), Errno::EROFS));
                }
                let first = made.names.is_empty();
                made.names.insert(name.to_owned());
                first
            }
        };
        if first {
            // From here on an older snapshot in this directory is no longer whole.
            self.unlink(INVENTORY)?;
        }
        Ok(())
    }

    fn make(&self, name: &str) -> Result<File, ImageError> {
        self.note(name)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        // A new file instead of truncating: the old one may be linked from elsewhere.
        self.unlink(name)?;
        openat(&self.dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map(File::from)
            .map_err(|e| io_error("create", &self.path.join(name), e))
    }
}

impl Store for DirStore {
    fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, ImageError> {
        check_name(name)?;
        Ok(Box::new(self.make(if name == INVENTORY { PENDING_INVENTORY } else { name })?))
    }

    fn create_pages(&self, name: &str, _expected: u64) -> Result<PagesSink, ImageError> {
        check_name(name)?;
        self.make(name).map(PagesSink::File)
    }

    fn open_raw(&self, name: &str) -> Result<Option<File>, ImageError> {
        check_name(name)?;
        // Not blocking: the "image" may be a FIFO that somebody put there.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = match openat(&self.dir, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(e) => return Err(io_error("open", &self.path.join(name), e)),
        };
        let failed = |source| ImageError::Io { action: "open", path: self.path.join(name), source };
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        Ok(Some(file))
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        let failed = |e| io_error("list", &self.path, e);
        let mut dir = Dir::openat(&self.dir, ".", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(failed)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(failed)?;
            if let Ok(name) = entry.file_name().to_str()
                && check_name(name).is_ok()
            {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn commit(&self) -> Result<(), ImageError> {
        if self.unfinished.load(Ordering::Acquire) {
            return Err(ImageError::Unfinished { path: self.path.clone() });
        }
        let DirMode::Write(made) = &self.mode else {
            return Ok(());
        };
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.names.contains(PENDING_INVENTORY) {
            renameat(&self.dir, PENDING_INVENTORY, &self.dir, INVENTORY)
                .map_err(|e| io_error("create", &self.path.join(INVENTORY), e))?;
            made.names.remove(PENDING_INVENTORY);
            made.names.insert(INVENTORY.to_owned());
        }
        made.committed = true;
        Ok(())
    }

    fn withdraw(&self) -> Result<(), ImageError> {
        let DirMode::Write(made) = &self.mode else {
            return Ok(());
        };
        // The rest goes with the store.
        made.lock().unwrap_or_else(PoisonError::into_inner).committed = false;
        self.unlink(INVENTORY)
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError> {
        if let Some(parent) = self.parent.get() {
            return Ok(Some(parent.clone()));
        }
        let path = self.path.join(PARENT);
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = match openat(&self.dir, PARENT, flags, Mode::empty()) {
            Ok(dir) => dir,
            // A link to something that is not there is another matter than no link.
            Err(Errno::ENOENT) if readlinkat(&self.dir, PARENT).is_err() => return Ok(None),
            Err(e) => return Err(io_error("open the parent snapshot", &path, e)),
        };
        let parent = DirStore::of(dir, path, DirMode::Read);
        Ok(Some(self.parent.get_or_init(|| Arc::new(parent)).clone()))
    }

    fn identity(&self) -> Option<(u64, u64)> {
        fstat(&self.dir).ok().map(|stat| (stat.st_dev, stat.st_ino))
    }

    fn link_parent(&self, target: &Path) -> Result<(), ImageError> {
        self.note(PARENT)?;
        self.unlink(PARENT)?;
        symlinkat(target, &self.dir, PARENT).map_err(|e| io_error("create", &self.path.join(PARENT), e))
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
        let DirMode::Write(made) = &self.mode else {
            return;
        };
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.committed {
            return;
        }
        for name in std::mem::take(&mut made.names) {
            if let Err(e) = self.unlink(&name) {
                tracing::warn!("{e}");
            }
        }
    }
}

fn io_error(action: &'static str, path: &Path, errno: Errno) -> ImageError {
    ImageError::Io { action, path: path.to_owned(), source: errno.into() }
}
