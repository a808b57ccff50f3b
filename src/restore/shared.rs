//! Shared memory objects: made and filled once by the supervisor, inherited by every puppet.

use std::{collections::HashMap, fs::File, os::fd::AsRawFd as _};

use anyhow::{Context, Result};

use crate::{
    image::{ImageKind, Store, pb},
    pages::{
        PAGE, Pages,
        fill::{Object, fill},
    },
    sys::mapping::AnonShared,
};

/// All shared memory objects of a tree.
#[derive(Debug, Default)]
pub(super) struct SharedObjects {
    objects: HashMap<u64, File>,
    /// Those that are not filled yet, in the order of their pages.
    empty: Vec<(u64, u64, Pages)>,
}

impl SharedObjects {
    /// Makes the anonymous shared memory that areas map, as large as the furthest of them, empty.
    pub(super) fn make(store: &dyn Store, wanted: WantedObjects) -> Result<Self> {
        let (mut objects, mut empty) = (HashMap::new(), Vec::new());
        for (shmid, Wanted { end, bytes, huge }) in wanted.0 {
            let pages = Pages::read(store, ImageKind::ShmemPagemap, shmid)?.unwrap_or_default();
            // Where no area says how long it is, its end may still be mapped by nobody any more.
            let size = bytes.unwrap_or_else(|| end.max(pages.end()));
            let file =
                object(size, huge).with_context(|| format!("shared memory {shmid} of {size} bytes"))?;
            if !pages.pieces().is_empty() {
                empty.push((shmid, size, pages));
            }
            objects.insert(shmid, file);
        }
        empty.sort_unstable_by_key(|(shmid, ..)| *shmid);
        Ok(Self { objects, empty })
    }

    /// Fills them.
    pub(super) fn fill(&mut self) -> Result<()> {
        for (shmid, size, pages) in std::mem::take(&mut self.empty) {
            let file = self.objects.get(&shmid).with_context(|| format!("no shared memory {shmid}"))?;
            let shmid = u32::try_from(shmid).context("id of shared memory")?;
            fill(Object { shmid, file, size }, &pages)?;
        }
        Ok(())
    }

    /// Number of the descriptor of an object.
    pub(super) fn get(&self, shmid: u64) -> Result<i32> {
        let fd = self.objects.get(&shmid).with_context(|| format!("no shared memory {shmid}"))?;
        Ok(fd.as_raw_fd())
    }
}

/// The anonymous shared memory that the areas of tasks map.
#[derive(Debug, Default)]
pub(super) struct WantedObjects(HashMap<u64, Wanted>);

impl WantedObjects {
    /// Adds what a task has mapped.
    pub(super) fn add(&mut self, mm: &pb::MmEntry) -> Result<()> {
        for vma in &mm.vmas {
            if vma.status & super::layout::status::ANON_SHARED != 0 {
                let end =
                    vma.pgoff.checked_add(vma.end - vma.start).context("shared mapping out of range")?;
                let object = self.0.entry(vma.shmid).or_default();
                object.end = object.end.max(end);
                object.bytes = object.bytes.or(vma.object_bytes);
                object.huge |= vma.flags & HUGE_BITS;
            }
        }
        Ok(())
    }
}

/// What the areas that map an object say of it.
#[derive(Debug, Default)]
struct Wanted {
    /// Where the furthest of them ends.
    end: u64,
    /// Its length, if that is not where the furthest of them ends.
    bytes: Option<u64>,
    /// MAP_HUGETLB bits.
    huge: u32,
}

/// MAP_HUGETLB and the size that goes with it.
const HUGE_BITS: u32 = (libc::MAP_HUGETLB | libc::MAP_HUGE_MASK << libc::MAP_HUGE_SHIFT).cast_unsigned();

/// An object as mmap(MAP_SHARED | MAP_ANONYMOUS) makes it, open as a file.
fn object(size: u64, huge: u32) -> Result<File> {
    let page = match huge >> libc::MAP_HUGE_SHIFT {
        0 => PAGE,
        log => 1u64.checked_shl(log).unwrap_or(PAGE),
    };
    let mapped = size.max(1).checked_next_multiple_of(page).context("its size is no file size")?;
    let map = AnonShared::new(usize::try_from(mapped)?, huge.cast_signed())?;
    let (start, end) = (map.addr(), map.addr() + map.len());
    let path = format!("/proc/self/map_files/{start:x}-{end:x}");
    let file = File::options().read(true).write(true).open(&path).with_context(|| path.clone())?;
    if size != mapped {
        // It was made shorter than its mappings.
        file.set_len(size).context("ftruncate")?;
    }
    Ok(file)
}
