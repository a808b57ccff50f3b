//! The first act while images arrive: processes are made, and their memory is filled with pages as they come.
//!
//! Everything small is there before the pages ([`Store::arrival`]). One process is made and filled after the other, parents before
//! children as a dump sends them: its areas are mapped by one list, each part of its pages that has come is brought into place by
//! another, and what only the pages tell (its vdso, what it shares with its maker) is planned when they are there. In between it
//! is stopped, and crtool waits for more. So what is left to be done when the last byte has come is the last part of the last
//! process.
//!
//! Until the snapshot may be restored nothing is touched that the source may still change: of files only those are opened that are
//! mapped and have their names, and whether these names still lead to them is looked at again at the end ([`FilesRestore::recheck`]).
//! Whatever goes wrong here is no failure of the restore: what was made is killed, the rest is waited for, and the tree is made anew
//! from what is there then.
//!
//! It is not tried for trees with terminals or with tasks that share their memory: how these are made depends on what is known
//! only at the end.

use std::collections::HashSet;

use anyhow::{Context as _, Result, ensure};

use super::{clocks::TreeClocks, create::Construction, images::Images, layout::status, plan, who_is};
use crate::{
    files::{Descriptors, FilesRestore},
    image::Store,
    process_tree::{Step, ids::on_host},
    settings::RestoreSettings,
    tracee::{List, Op},
};

/// So many more bytes are waited for, if there are so many.
const STEP: u64 = 4 << 20;

/// Nothing that was made before all was there is used.
#[derive(Debug, thiserror::Error)]
#[error("what was made while images arrived is given up")]
pub(super) struct GivenUp;

/// Makes all processes, each with its memory.
pub(super) fn make<'i>(
    store: &'i dyn Store,
    images: &'i Images,
    settings: &'i RestoreSettings,
) -> Result<Construction<'i>> {
    for tid in images.tasks.iter().flat_map(|task| &task.tids) {
        ensure!(who_is(*tid).is_none(), "pid {tid} is taken");
    }
    ensure!(!super::clocks::share_memory(images), "tasks share their memory");
    let forks = plan::forks(images, settings)?;
    let mut files = FilesRestore::read(store, settings, &images.tables())?;
    files.open_mapped(&mapped_files(images)?)?;
    let mut tree = Construction::new(store, images, forks, files, TreeClocks::later())?;
    tree.create_ahead(settings)?;
    tree.moves()?;
    tree.shared.fill()?;
    Ok(tree)
}

/// Whether what was made is right, now that all is there.
pub(super) fn check(tree: &Construction<'_>) -> Result<()> {
    tree.pages.iter().try_for_each(|pages| pages.wait())?;
    Ok(tree.files.recheck()?)
}

/// Ids of the files that are mapped or run.
fn mapped_files(images: &Images) -> Result<HashSet<u32>> {
    let mut ids = HashSet::new();
    for task in &images.tasks {
        let Some(mm) = task.mm() else { continue };
        ids.insert(mm.exe_file_id);
        let of_file = status::FILE_PRIVATE | status::FILE_SHARED | status::MEMFD;
        for vma in mm.vmas.iter().filter(|vma| vma.status & of_file != 0) {
            ids.insert(u32::try_from(vma.shmid).context("file id of a mapping")?);
        }
    }
    Ok(ids)
}

impl Construction<'_> {
    /// Makes all processes, each with its memory, as its pages come.
    fn create_ahead(&mut self, settings: &RestoreSettings) -> Result<()> {
        let first = self.forks.first;
        let (mut descriptors, mapped) = self.begin_ahead(first)?;
        self.start_first(settings)?;
        self.puppets.settle()?;
        self.fill_ahead(first, mapped, &mut descriptors)?;
        // Processes that are made, and how many of their steps are done.
        let mut open = vec![(first, 0)];
        while let Some((index, done)) = open.pop() {
            let process = self.forks.processes.get(index).context("a process that is not planned")?;
            let makes = |step: &Step| match step {
                Step::Make { child, .. } => Some(*child),
                _ => None,
            };
            let left = process.steps.get(done..).unwrap_or_default();
            let next = left.iter().enumerate().find_map(|(at, step)| Some((done + at + 1, makes(step)?)));
            let end = next.map_or(process.steps.len(), |(end, _)| end);
            let begun = next.map(|(_, child)| Ok((child, self.begin_ahead(child)?)));
            let begun: Option<(usize, (Descriptors, bool))> =
                begun.transpose().map_err(|e: anyhow::Error| e)?;
            let mut list = List::new(format!("creation by {}", self.pid(index)?));
            let mut own = self.descriptors_of(index);
            self.plan_steps(index, done..end, &mut own, &mut list)?;
            self.next_shared = self.next_shared.max(own.end());
            self.run_ahead(index, list)?;
            if let Some((child, (mut descriptors, mapped))) = begun {
                self.fill_ahead(child, mapped, &mut descriptors)?;
                open.extend([(index, end), (child, 0)]);
            }
        }
        self.know_ids();
        Ok(())
    }

    /// Plans what a process does first, and announces it.
    fn begin_ahead(&mut self, index: usize) -> Result<(Descriptors, bool)> {
        let mut list = List::new(format!("creation of {}", self.pid(index)?));
        let mut descriptors = self.descriptors_of(index);
        let mapped = self.plan_begin(index, &mut descriptors, &mut list)?;
        self.announce(index, list)?;
        Ok((descriptors, mapped))
    }

    /// Fills the memory of a process that has mapped it, if it has any.
    fn fill_ahead(&mut self, index: usize, mapped: bool, descriptors: &mut Descriptors) -> Result<()> {
        let pid = self.pid(index)?;
        // Lists of so many parts would fill the area.
        let area = self.place(index)?.0;
        let used = self.puppets.area(area)?.used();
        while let Some(there) = self.wait_for_pages(index, mapped)? {
            self.puppets.rewind(area, used)?;
            let mut list = List::new(format!("filling of {pid}"));
            if self.plan_load(index, Some(&there), descriptors, &mut list)? {
                self.run_ahead(index, list)?;
                self.puppets.look_for_progress();
                self.page_threads.check(&self.puppets)?;
                self.page_threads.forget();
            }
        }
        if mapped {
            self.puppets.rewind(area, used)?;
            let mut list = List::new(format!("memory of {pid}"));
            self.plan_last_of_memory(index, descriptors, &mut list)?;
            self.next_shared = self.next_shared.max(descriptors.end());
            self.run_ahead(index, list)?;
        }
        Ok(())
    }

    /// Waits for more pages of a process; how many bytes of each of its images are there. `None` when it needs no more.
    fn wait_for_pages(&self, index: usize, mapped: bool) -> Result<Option<Vec<u64>>> {
        let made = self.made.get(index).filter(|_| mapped);
        let Some(piece) = made.and_then(|made| made.next()) else { return Ok(None) };
        let pages = self.pages.get(index).context("a task without pages")?;
        let last = pages.pieces().iter().filter(|other| other.image == piece.image);
        let end = last.map(|piece| piece.offset + piece.len()).max().unwrap_or(0);
        let wanted = (piece.offset + STEP).min(end);
        let images = pages.images().iter().enumerate();
        let there = images.map(|(number, image)| image.wait(if number == piece.image { wanted } else { 0 }));
        Ok(Some(there.collect::<Result<_, _>>()?))
    }

    /// Lets a process that waits do this.
    fn run_ahead(&mut self, index: usize, mut list: List) -> Result<()> {
        if list.is_empty() {
            return Ok(());
        }
        list.op(Op::Stop);
        list.op(Op::Next);
        super::log_list(&list);
        let pid = self.puppets.current_id(self.pid(index)?);
        self.puppets.run_list(on_host(pid), &list)
    }
}
