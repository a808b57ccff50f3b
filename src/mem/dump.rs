//! Writing address spaces: pages first, `mm-PID.img` behind them, shared memory at the end.

use std::time::Instant;

use super::reserve::ReservedImages;
use super::scan::Scan;
use super::{AddressSpace, MemError, SharedMemory, vma};
use crate::pages::copy::{TaskMemory, copy};
use crate::pages::{PagemapWriter, PagesError};
use crate::stats::DumpStats;
use crate::{
    image::{ImageKind, PagesSink, Store, TypedStore, pb},
    sys::pid::{HostPid, NsPid},
};

/// The memory part of one dump: counts pages images.
#[allow(missing_debug_implementations)] // a store has none
pub struct MemoryDump<'a> {
    store: &'a dyn Store,
    next_pages_id: u32,
    aside: ReservedImages,
}

impl<'a> MemoryDump<'a> {
    /// Into `store`.
    pub fn new(store: &'a dyn Store) -> Self {
        Self { store, next_pages_id: 1, aside: ReservedImages::default() }
    }

    /// Makes room for the pages of the processes `tree`, which still run: less to do once they are frozen.
    pub fn reserve(&mut self, tree: &[HostPid]) -> Result<(), MemError> {
        self.aside = ReservedImages::make(self.store, tree, &mut self.next_pages_id)?;
        Ok(())
    }

    /// The pages image for the task `pid`: its number and where its pages go.
    fn pages_image(&mut self, pid: HostPid) -> Result<(u32, PagesSink), MemError> {
        if let Some(made) = self.aside.take(pid) {
            return Ok(made);
        }
        let pages_id = self.next_pages_id;
        self.next_pages_id += 1;
        Ok((pages_id, self.store.create_pages(&ImageKind::Pages.file_name(u64::from(pages_id)), 0)?))
    }

    /// Writes the pages and the areas of one task, under its pid `image_pid` of the images.
    pub fn task(
        &mut self,
        image_pid: NsPid,
        mut space: AddressSpace,
        stats: &mut DumpStats,
    ) -> Result<(), MemError> {
        let id = u64::from(image_pid.bits());
        let (pages_id, pages) = self.pages_image(space.pid)?;
        let memory = TaskMemory::open(space.tid).map_err(|source| PagesError::Memory {
            pid: space.pid,
            addr: 0,
            source,
        })?;
        let mut guards = Vec::new();
        let begin = Instant::now();
        let scan = Scan::new(space.tid, &space.targets, &mut guards)?;
        let pagemap = PagemapWriter::create(self.store, ImageKind::Pagemap, id, pages_id)?;
        let copied = copy(&memory, scan, pagemap, pages, pages_id)?;
        stats.memwrite_time += begin.elapsed();
        stats.pages_scanned += space.private_pages;
        stats.pages_written += copied.pages_written;
        space.entry.vmas.extend(guards.iter().map(|guard| pb::VmaEntry {
            start: guard.start,
            end: guard.end,
            status: vma::GUARD,
            fd: -1,
            ..Default::default()
        }));
        Ok(self.store.write_one(ImageKind::Mm, id, &space.entry)?)
    }

    /// Writes the objects of shared memory that areas and files of all tasks have led to.
    pub fn shared(&mut self, shared: &SharedMemory, stats: &mut DumpStats) -> Result<(), MemError> {
        shared.dump(self.store, &mut self.next_pages_id, stats)?;
        // A task that was there before the freeze and ended: its image stays, empty and named by nobody.
        while let Some((pages_id, pages)) = self.aside.take_any() {
            let ended = match pages {
                PagesSink::File(file) => file.set_len(0),
                PagesSink::Stream(stream) => stream.end(),
            };
            ended.map_err(|source| PagesError::Pages { action: "write", pages_id, source })?;
        }
        Ok(())
    }
}
