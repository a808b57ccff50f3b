//! Images in memory, one memfd each: gone with the store.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{ImageFile, ImageSink, PagesSink, Store, check_name};
use crate::image::error::ImageError;

/// A snapshot in memory. Clones share the images.
#[derive(Debug, Clone, Default)]
pub struct MemStore {
    images: Arc<Mutex<BTreeMap<String, File>>>,
    unfinished: Arc<AtomicBool>,
    parent: Option<Box<MemStore>>,
}

impl MemStore {
    /// An empty store.
    pub fn new() -> MemStore {
        MemStore::default()
    }

    /// An empty store that builds on another.
    #[cfg(any(test, feature = "internals"))]
    pub fn on(parent: &MemStore) -> MemStore {
        MemStore { parent: Some(Box::new(parent.clone())), ..MemStore::default() }
    }
}

impl MemStore {
    fn make(&self, name: &str) -> Result<File, ImageError> {
        check_name(name)?;
        let failed = |source| ImageError::Io { action: "create", path: self.path_of(name), source };
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).map_err(|e| failed(e.into()))?;
        let file = File::from(file);
        let kept = file.try_clone().map_err(failed)?;
        self.images.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), kept);
        Ok(file)
    }
}

impl Store for MemStore {
    fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, ImageError> {
        Ok(Box::new(self.make(name)?))
    }

    fn create_pages(&self, name: &str, _expected: u64) -> Result<PagesSink, ImageError> {
        self.make(name).map(PagesSink::File)
    }

    fn open_raw(&self, name: &str) -> Result<Option<ImageFile>, ImageError> {
        check_name(name)?;
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = images.get(name) else {
            return Ok(None);
        };
        // Opened anew: a position of its own.
        let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let image = file.and_then(ImageFile::whole);
        image.map(Some).map_err(|source| ImageError::Io { action: "open", path: self.path_of(name), source })
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        Ok(self.images.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect())
    }

    fn commit(&self) -> Result<(), ImageError> {
        if self.unfinished.load(Ordering::Acquire) {
            return Err(ImageError::Unfinished { path: self.path_of("") });
        }
        Ok(())
    }

    fn withdraw(&self) -> Result<(), ImageError> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner).remove(super::INVENTORY);
        Ok(())
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError> {
        Ok(self.parent.as_ref().map(|parent| -> Arc<dyn Store> { Arc::new((**parent).clone()) }))
    }

    fn link_parent(&self, target: &Path) -> Result<(), ImageError> {
        let source = Errno::EOPNOTSUPP.into();
        Err(ImageError::Io { action: "link", path: target.to_owned(), source })
    }

    fn path_of(&self, name: &str) -> PathBuf {
        Path::new("memory:").join(name)
    }

    fn unfinished(&self) -> Arc<AtomicBool> {
        self.unfinished.clone()
    }
}
