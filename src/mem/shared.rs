//! Objects of shared memory: anonymous ones and memfds, each once for the whole tree.
//!
//! They are told apart by device and inode and named in the images by a 32-bit id, `shmid`, by
//! habit the inode number. Content is the data of the object (SEEK_DATA), whoever maps which part
//! of it; nothing is read through a mapping.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::MemError;
use crate::image::{ImageKind, Store};
use crate::pages::copy::{SharedObject, Span, copy, data_runs};
use crate::pages::{PAGE, PagemapWriter, PagesError, Run};
use crate::stats::DumpStats;

/// The objects met so far, and the files that areas have led to. Clones are the same collection: the areas and the open files of all
/// tasks lead to the same objects.
#[derive(Debug, Clone, Default)]
pub struct SharedMemory(Arc<Mutex<Objects>>);

#[derive(Debug, Default)]
struct Objects {
    by_inode: BTreeMap<(u64, u64), u32>,
    by_shmid: BTreeMap<u32, Object>,
    /// Devices of the kernel's own mounts for shared memory, by page size.
    devices: BTreeMap<u64, u64>,
    /// Objects behind private memory on huge pages, which nobody shares.
    private: BTreeSet<(u64, u64)>,
    /// Ids of mapped files in `files.img`: the tasks of a tree mostly have the same libraries.
    files: HashMap<FileKey, u32>,
}

/// What makes two areas share an entry of `files.img`. The name is as maps prints it to us, so
/// it means the same in every task of our mount namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct FileKey {
    pub(super) dev: (u32, u32),
    pub(super) ino: u64,
    pub(super) path: Vec<u8>,
    pub(super) flags: i32,
}

#[derive(Debug)]
struct Object {
    file: File,
    pages_id: Option<u32>,
}

impl SharedMemory {
    /// None met.
    pub fn new() -> Self {
        Self::default()
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of the object behind `fd` (of any mode, O_PATH too), whose content will be written.
    pub fn object(&self, fd: impl AsFd) -> Result<u32, MemError> {
        // Through /proc the inode is opened anew, for reading, with a position of its own.
        let reopen = || File::open(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
        let file = reopen().map_err(|source| MemError::Shared { dev: 0, ino: 0, source })?;
        let meta = file.metadata().map_err(|source| MemError::Shared { dev: 0, ino: 0, source })?;
        let key = (meta.dev(), meta.ino());
        let mut objects = self.objects();
        if let Some(shmid) = objects.by_inode.get(&key) {
            return Ok(*shmid);
        }
        let shmid = objects.free_id(meta.ino());
        objects.by_inode.insert(key, shmid);
        objects.by_shmid.insert(shmid, Object { file, pages_id: None });
        Ok(shmid)
    }

    /// The id of an object known by device and inode.
    pub(super) fn known(&self, dev: u64, ino: u64) -> Option<u32> {
        self.objects().by_inode.get(&(dev, ino)).copied()
    }

    /// Length of an object in bytes.
    pub(super) fn object_bytes(&self, shmid: u64) -> Result<u64, MemError> {
        let failed = |source| MemError::Shared { dev: 0, ino: shmid, source };
        let objects = self.objects();
        let object = u32::try_from(shmid).ok().and_then(|shmid| objects.by_shmid.get(&shmid));
        let object = object.ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        Ok(object.file.metadata().map_err(failed)?.len())
    }

    /// Remembers that an object is that of a private area.
    pub(super) fn is_private(&self, dev: u64, ino: u64) {
        self.objects().private.insert((dev, ino));
    }

    /// Whether an object was met as that of a private area.
    pub(super) fn is_of_private_area(&self, dev: u64, ino: u64) -> bool {
        self.objects().private.contains(&(dev, ino))
    }

    /// The id of a mapped file met before, in this task or another.
    pub(super) fn known_file(&self, key: &FileKey) -> Option<u32> {
        self.objects().files.get(key).copied()
    }

    /// Remembers the id of a mapped file.
    pub(super) fn file_is(&self, key: FileKey, id: u32) {
        self.objects().files.insert(key, id);
    }

    /// Whether `dev` is where the kernel keeps anonymous shared memory and memfds of this page size.
    pub(super) fn is_kernel_mount(&self, dev: u64, page_bytes: u64) -> Result<bool, MemError> {
        let mut objects = self.objects();
        if let Some(known) = objects.devices.get(&page_bytes) {
            return Ok(*known == dev);
        }
        let failed = |source| MemError::SharedDevice { source };
        let mut flags = MFdFlags::MFD_CLOEXEC;
        if page_bytes > PAGE {
            let size = page_bytes.trailing_zeros() << libc::MFD_HUGE_SHIFT;
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(size);
        }
        let probe = memfd_create("crtool", flags).map_err(|e| failed(e.into()))?;
        let found = File::from(probe).metadata().map_err(failed)?.dev();
        objects.devices.insert(page_bytes, found);
        Ok(found == dev)
    }

    /// Writes the content of every object not written before. `next_pages_id` counts pages images.
    pub(super) fn dump(
        &self,
        store: &dyn Store,
        next_pages_id: &mut u32,
        stats: &mut DumpStats,
    ) -> Result<(), MemError> {
        for object in self.unwritten(next_pages_id, stats)? {
            let DescribedObject { shmid, pages_id, file, runs } = object;
            let spans = runs.into_iter().map(|run| Ok(Span { run, zero_is_absent: true, unreadable: false }));
            let pagemap = PagemapWriter::create(store, ImageKind::ShmemPagemap, u64::from(shmid), pages_id)?;
            write(store, (shmid, pages_id, &file), spans, Some(pagemap), stats)?;
        }
        Ok(())
    }

    /// Writes the pagemap of every object not written before, with all its data.
    pub(super) fn describe(
        &self,
        store: &dyn Store,
        next_pages_id: &mut u32,
        stats: &mut DumpStats,
    ) -> Result<Vec<DescribedObject>, MemError> {
        let objects = self.unwritten(next_pages_id, stats)?;
        for object in &objects {
            let id = u64::from(object.shmid);
            let mut pagemap = PagemapWriter::create(store, ImageKind::ShmemPagemap, id, object.pages_id)?;
            object.runs.iter().try_for_each(|run| pagemap.push(*run))?;
            pagemap.finish()?;
        }
        Ok(objects)
    }

    fn unwritten(
        &self,
        next_pages_id: &mut u32,
        stats: &mut DumpStats,
    ) -> Result<Vec<DescribedObject>, MemError> {
        let mut objects = self.objects();
        let mut found = Vec::new();
        for (shmid, object) in objects.by_shmid.iter_mut().filter(|(_, object)| object.pages_id.is_none()) {
            let failed = |source| MemError::Shared { dev: 0, ino: 0, source };
            let file = object.file.try_clone().map_err(failed)?;
            let runs = data_runs(&file, *shmid)?;
            stats.shpages_scanned += file.metadata().map_err(failed)?.len().div_ceil(PAGE);
            let pages_id = *next_pages_id;
            *next_pages_id += 1;
            object.pages_id = Some(pages_id);
            found.push(DescribedObject { shmid: *shmid, pages_id, file, runs });
        }
        Ok(found)
    }
}

/// An object whose pages are to be written.
#[derive(Debug)]
pub(super) struct DescribedObject {
    shmid: u32,
    pages_id: u32,
    file: File,
    /// Where its data are.
    runs: Vec<Run>,
}

impl DescribedObject {
    /// Writes its pages.
    pub(super) fn pages(self, store: &dyn Store, stats: &mut DumpStats) -> Result<(), MemError> {
        let Self { shmid, pages_id, file, runs } = self;
        let spans = runs.into_iter().map(|run| Ok(Span { run, zero_is_absent: false, unreadable: false }));
        write(store, (shmid, pages_id, &file), spans, None, stats)
    }
}

fn write(
    store: &dyn Store,
    (shmid, pages_id, file): (u32, u32, &File),
    spans: impl Iterator<Item = Result<Span, PagesError>> + Send,
    pagemap: Option<PagemapWriter>,
    stats: &mut DumpStats,
) -> Result<(), MemError> {
    let pages = store.create_pages(&ImageKind::Pages.file_name(u64::from(pages_id)), 0)?;
    let copied = copy(&SharedObject { shmid, file }, spans, pagemap, pages, pages_id)?;
    stats.shpages_written += copied.pages_written;
    Ok(())
}

impl Objects {
    /// An id nobody has, the inode number if possible.
    fn free_id(&self, ino: u64) -> u32 {
        let wanted = u32::try_from(ino).ok().filter(|id| *id != 0 && !self.by_shmid.contains_key(id));
        wanted.unwrap_or_else(|| {
            let taken = |id: &u32| self.by_shmid.contains_key(id);
            (1..=u32::MAX).rev().find(|id| !taken(id)).unwrap_or(u32::MAX)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::image::MemStore;
    use crate::pages::pagemap::PagemapReader;
    use crate::pages::pagemap::Placed;

    fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn one_object_has_one_id() {
        let shared = SharedMemory::new();
        let (one, two) = (memfd(PAGE), memfd(PAGE));
        let id = shared.object(&one).unwrap();
        assert_eq!(shared.clone().object(one.try_clone().unwrap()).unwrap(), id);
        assert_ne!(shared.object(&two).unwrap(), id);
        let meta = one.metadata().unwrap();
        assert_eq!(shared.known(meta.dev(), meta.ino()), Some(id));
        assert!(shared.is_kernel_mount(meta.dev(), PAGE).unwrap());
        assert!(!shared.is_kernel_mount(meta.dev() + 1, PAGE).unwrap());
    }

    #[test]
    fn inodes_of_two_devices_do_not_clash() {
        let mut objects = Objects::default();
        let id = objects.free_id(77);
        assert_eq!(id, 77);
        objects.by_shmid.insert(id, Object { file: memfd(0), pages_id: None });
        assert_ne!(objects.free_id(77), 77);
        assert_eq!(objects.free_id(1 << 40), u32::MAX);
        assert_ne!(objects.free_id(0), 0);
    }

    #[test]
    fn data_and_nothing_else_is_written_once() {
        let shared = SharedMemory::new();
        let mut file = memfd(1000 * PAGE + 5);
        file.write_all(&[1; 4096]).unwrap();
        file.write_all_at(&[0; 8192], 10 * PAGE).unwrap();
        file.write_all_at(&[2; 8192], 20 * PAGE).unwrap();
        file.write_all_at(&[3; 5], 1000 * PAGE).unwrap();
        let id = shared.object(&file).unwrap();
        let (store, mut next, mut stats) = (MemStore::new(), 5, DumpStats::default());
        shared.dump(&store, &mut next, &mut stats).unwrap();
        shared.dump(&store, &mut next, &mut stats).unwrap();
        assert_eq!((next, stats.shpages_written, stats.shpages_scanned), (6, 4, 1001));
        let pages = store.open_raw("pages-5.img").unwrap().unwrap();
        let pagemap = PagemapReader::open(&store, ImageKind::ShmemPagemap, u64::from(id)).unwrap().unwrap();
        assert_eq!(pagemap.pages_id(), 5);
        let runs = pagemap.runs(pages.len()).unwrap();
        let run = |page, pages| Run { start: page * PAGE, pages, flags: 4 };
        assert_eq!(
            runs,
            [
                Placed { run: run(0, 1), offset: 0 },
                Placed { run: run(20, 2), offset: PAGE },
                Placed { run: run(1000, 1), offset: 3 * PAGE },
            ]
        );
        let mut last = [9; 4096];
        pages.read_exact_at(&mut last, 3 * PAGE).unwrap();
        assert_eq!((&last[..6], last[4095]), (&[3, 3, 3, 3, 3, 0][..], 0));
    }
}
