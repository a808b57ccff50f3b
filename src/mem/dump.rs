//! Writing address spaces and shared memory.
//!
//! Into a directory go the pages of a task first and `mm-PID.img` behind them, shared memory at the end; the pagemap is written as
//! pages are copied, because only who has read a page knows that it is zero and can be left out. Where the images leave this
//! host ([`Store::pages_come_last`]), all pagemaps and areas come first ([`MemoryDump::describe`]) and all pages after them
//! ([`MemoryDump::pages`]), so that who restores can make address spaces while pages are on their way. Then pages of zeros are in the
//! pagemaps, and are holes in the images.

use std::ops::Range;
use std::time::Instant;

use super::reserve::ReservedImages;
use super::scan::Scan;
use super::shared::DescribedObject;
use super::{AddressSpace, MemError, SharedMemory, vma};
use crate::pages::copy::{Span, TaskMemory, copy};
use crate::pages::{PAGE, PagemapWriter, PagesError};
use crate::progress;
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
    described: Vec<Described>,
    shared: Vec<DescribedObject>,
}

/// A task whose pagemap is written and whose pages are not.
#[derive(Debug)]
struct Described {
    pid: HostPid,
    tid: HostPid,
    pages_id: u32,
    /// Looked for once: what the kernel says of pages may change though their content does not.
    spans: Box<[Span]>,
}

impl<'a> MemoryDump<'a> {
    /// Into `store`.
    pub fn new(store: &'a dyn Store) -> Self {
        let aside = ReservedImages::default();
        Self { store, next_pages_id: 1, aside, described: Vec::new(), shared: Vec::new() }
    }

    /// Makes room for the pages of the processes `tree`, which still run: less to do once they are frozen.
    pub fn reserve(&mut self, tree: &[HostPid]) -> Result<(), MemError> {
        self.aside = ReservedImages::make(self.store, tree, &mut self.next_pages_id)?;
        Ok(())
    }

    /// The number of the next pages image.
    fn pages_id(&mut self) -> u32 {
        self.next_pages_id += 1;
        self.next_pages_id - 1
    }

    /// The pages image `pages_id` that is made now.
    fn pages_image(&self, pages_id: u32) -> Result<PagesSink, MemError> {
        Ok(self.store.create_pages(&ImageKind::Pages.file_name(u64::from(pages_id)), 0)?)
    }

    /// Writes the pages and the areas of one task, under its pid `image_pid` of the images.
    pub fn task(
        &mut self,
        image_pid: NsPid,
        space: AddressSpace,
        stats: &mut DumpStats,
    ) -> Result<(), MemError> {
        let id = u64::from(image_pid.bits());
        let (pages_id, pages) = match self.aside.take(space.pid) {
            Some(made) => made,
            None => {
                let pages_id = self.pages_id();
                (pages_id, self.pages_image(pages_id)?)
            }
        };
        let memory = memory_of(space.pid, space.tid)?;
        let mut guards = Vec::new();
        let begin = Instant::now();
        let scan = Scan::new(space.tid, &space.targets, &mut guards)?;
        let pagemap = PagemapWriter::create(self.store, ImageKind::Pagemap, id, pages_id)?;
        let copied = copy(&memory, scan, Some(pagemap), pages, pages_id)?;
        stats.memwrite_time += begin.elapsed();
        stats.pages_scanned += space.private_pages;
        stats.pages_written += copied.pages_written;
        self.areas(id, space, &guards)
    }

    /// Writes `mm-ID.img`.
    fn areas(&self, id: u64, mut space: AddressSpace, guards: &[Range<u64>]) -> Result<(), MemError> {
        space.entry.vmas.extend(guards.iter().map(|guard| pb::VmaEntry {
            start: guard.start,
            end: guard.end,
            status: vma::GUARD,
            fd: -1,
            ..Default::default()
        }));
        Ok(self.store.write_one(ImageKind::Mm, id, &space.entry)?)
    }

    /// Writes all of one task but its pages, which [`Self::pages`] writes.
    pub(crate) fn describe(
        &mut self,
        image_pid: NsPid,
        space: AddressSpace,
        stats: &mut DumpStats,
    ) -> Result<(), MemError> {
        let id = u64::from(image_pid.bits());
        let pages_id = match self.aside.number(space.pid) {
            Some(made) => made,
            None => self.pages_id(),
        };
        let mut guards = Vec::new();
        let mut spans = Vec::new();
        let mut pagemap = PagemapWriter::create(self.store, ImageKind::Pagemap, id, pages_id)?;
        for span in Scan::new(space.tid, &space.targets, &mut guards)? {
            let span = Span { zero_is_absent: false, ..span? };
            pagemap.push(span.run)?;
            spans.push(span);
        }
        pagemap.finish()?;
        stats.pages_scanned += space.private_pages;
        let (pid, tid, spans) = (space.pid, space.tid, spans.into());
        self.described.push(Described { pid, tid, pages_id, spans });
        self.areas(id, space, &guards)
    }

    /// As [`Self::describe`], for the objects of shared memory.
    pub(crate) fn describe_shared(
        &mut self,
        shared: &SharedMemory,
        stats: &mut DumpStats,
    ) -> Result<(), MemError> {
        self.shared = shared.describe(self.store, &mut self.next_pages_id, stats)?;
        Ok(())
    }

    /// Writes the pages of everything that has been described, in the same order.
    pub(crate) fn pages(&mut self, stats: &mut DumpStats) -> Result<(), MemError> {
        let known = self.described.iter().flat_map(|described| &described.spans).map(|span| span.run.pages);
        let known: u64 = known.sum();
        progress::phase("memory", known * PAGE);
        for Described { pid, tid, pages_id, spans } in std::mem::take(&mut self.described) {
            let pages = match self.aside.take(pid) {
                Some((_, made)) => made,
                None => self.pages_image(pages_id)?,
            };
            let begin = Instant::now();
            let spans = spans.iter().map(|span| Ok(*span));
            let copied = copy(&memory_of(pid, tid)?, spans, None, pages, pages_id)?;
            stats.memwrite_time += begin.elapsed();
            stats.pages_written += copied.pages_written;
        }
        for object in std::mem::take(&mut self.shared) {
            object.pages(self.store, stats)?;
        }
        self.end_unused()
    }

    /// Writes the objects of shared memory that areas and files of all tasks have led to.
    pub fn shared(&mut self, shared: &SharedMemory, stats: &mut DumpStats) -> Result<(), MemError> {
        shared.dump(self.store, &mut self.next_pages_id, stats)?;
        self.end_unused()
    }

    /// A task that was there before the freeze and ended: its image stays, empty and named by nobody.
    fn end_unused(&mut self) -> Result<(), MemError> {
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

fn memory_of(pid: HostPid, tid: HostPid) -> Result<TaskMemory, MemError> {
    Ok(TaskMemory::open(tid).map_err(|source| PagesError::Memory { pid, addr: 0, source })?)
}
