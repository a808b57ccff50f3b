//! Entries of a pagemap: runs of pages, in address order, none over another.
//!
//! A pagemap is one `pagemap_head` (which `pages-N.img`) and then entries. The pages of entries
//! with [`PRESENT`] lie one after another in that file. Pages of shared memory have offsets in
//! the object for addresses.

use crate::image::{ImageKind, ImageReader, ImageWriter, TypedStore, pb};

use super::{PAGE, PagesError};

/// The pages are in the parent snapshot.
pub const PARENT: u32 = 1 << 0;
/// The pages may be left for later, to be fetched when touched.
pub const LAZY: u32 = 1 << 1;
/// The pages are in this snapshot's pages image.
pub const PRESENT: u32 = 1 << 2;

/// Most pages in one entry: the older count has 32 bits.
const MOST_PAGES: u64 = u32::MAX as u64;

/// Consecutive pages of the same flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First address, a multiple of the page size.
    pub start: u64,
    /// Number of pages, not zero.
    pub pages: u64,
    /// [`PARENT`], [`LAZY`], [`PRESENT`].
    pub flags: u32,
}

impl Run {
    /// First address behind the run.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }

    /// Appends `next` if it continues this run and the sum fits into one entry.
    pub fn join(&mut self, next: &Run) -> bool {
        let fits = self.pages.checked_add(next.pages).is_some_and(|sum| sum <= MOST_PAGES);
        let joined = self.end() == next.start && self.flags == next.flags && fits;
        if joined {
            self.pages += next.pages;
        }
        joined
    }

    fn to_entry(self) -> pb::PagemapEntry {
        pb::PagemapEntry {
            vaddr: self.start,
            compat_nr_pages: u32::try_from(self.pages).unwrap_or(u32::MAX),
            in_parent: None,
            flags: Some(self.flags),
            nr_pages: Some(self.pages),
        }
    }

    /// The run of an entry; what is wrong with it otherwise.
    fn from_entry(entry: &pb::PagemapEntry) -> Result<Run, &'static str> {
        let pages = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
        // Images older than the flags say it by one bool.
        let flags = match (entry.flags, entry.in_parent == Some(true)) {
            (flags, true) => flags.unwrap_or(0) | PARENT,
            (flags, false) => flags.unwrap_or(PRESENT),
        };
        if !entry.vaddr.is_multiple_of(PAGE) {
            return Err("address within a page");
        }
        if pages == 0 {
            return Err("no pages");
        }
        if flags & PARENT != 0 && flags & PRESENT != 0 {
            return Err("both in this snapshot and in its parent");
        }
        let bytes = pages.checked_mul(PAGE).ok_or("too many pages")?;
        entry.vaddr.checked_add(bytes).ok_or("address and length beyond the address space")?;
        Ok(Run { start: entry.vaddr, pages, flags })
    }
}

/// Writes a pagemap; runs that touch become one entry.
#[derive(Debug)]
pub struct PagemapWriter {
    image: ImageWriter,
    open: Option<Run>,
}

impl PagemapWriter {
    /// Makes the pagemap `kind` of `id`, whose pages are in `pages-PAGES_ID.img`.
    pub fn create<S: TypedStore + ?Sized>(
        store: &S,
        kind: ImageKind,
        id: u64,
        pages_id: u32,
    ) -> Result<Self, PagesError> {
        let mut image = store.create(kind, id)?;
        image.entry(&pb::PagemapHead { pages_id })?;
        Ok(Self { image, open: None })
    }

    /// Appends a run, which must begin where the last one ended or behind it.
    pub fn push(&mut self, run: Run) -> Result<(), PagesError> {
        if let Some(open) = &mut self.open {
            debug_assert!(open.end() <= run.start, "pagemap out of order: {open:x?} then {run:x?}");
            if open.join(&run) {
                return Ok(());
            }
            self.image.entry(&open.to_entry())?;
        }
        self.open = Some(run);
        Ok(())
    }

    /// Writes what is still held back: the pagemap is complete.
    pub fn finish(mut self) -> Result<(), PagesError> {
        if let Some(open) = self.open.take() {
            self.image.entry(&open.to_entry())?;
        }
        Ok(self.image.finish()?)
    }
}

/// A run and where its pages begin in the pages image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// The run.
    pub run: Run,
    /// Offset of its first page; of no meaning unless the run is [`PRESENT`].
    pub offset: u64,
}

/// Reads a pagemap, checking each entry and the order.
#[derive(Debug)]
pub struct PagemapReader {
    image: ImageReader,
    name: String,
    pages_id: u32,
    /// First address that the next entry may have.
    least: u64,
    offset: u64,
}

impl PagemapReader {
    /// Opens the pagemap `kind` of `id`, or `None` when there is none.
    pub fn open<S: TypedStore + ?Sized>(
        store: &S,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<Self>, PagesError> {
        let Some(mut image) = store.open(kind, id)? else { return Ok(None) };
        let name = kind.file_name(id);
        let head = image.next_entry::<pb::PagemapHead>()?;
        let Some(pb::PagemapHead { pages_id }) = head else {
            return Err(PagesError::Entry { image: name, entry: 0, what: "missing" });
        };
        Ok(Some(Self { image, name, pages_id, least: 0, offset: 0 }))
    }

    /// Number of the image with the pages.
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// The next run, or `None` at the end.
    pub fn next_run(&mut self) -> Result<Option<Placed>, PagesError> {
        let Some(entry) = self.image.next_entry::<pb::PagemapEntry>()? else { return Ok(None) };
        let checked = Run::from_entry(&entry).and_then(|run| {
            if run.start < self.least {
                return Err("overlaps the entry before it");
            }
            let offset = self.offset;
            if run.flags & PRESENT != 0 {
                self.offset = offset.checked_add(run.pages * PAGE).ok_or("too many pages")?;
            }
            self.least = run.end();
            Ok(Placed { run, offset })
        });
        checked.map(Some).map_err(|what| PagesError::Entry {
            image: self.name.clone(),
            entry: self.image.entries_read().saturating_sub(1),
            what,
        })
    }

    /// All runs that are left, checked against the length of the pages image.
    pub fn runs(mut self, pages_len: u64) -> Result<Vec<Placed>, PagesError> {
        let mut runs = Vec::new();
        while let Some(placed) = self.next_run()? {
            runs.push(placed);
        }
        if self.offset > pages_len {
            let entry = self.image.entries_read().saturating_sub(1);
            return Err(PagesError::Entry {
                image: self.name,
                entry,
                what: "pages missing from the pages image",
            });
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::MemStore;

    fn write(runs: &[Run]) -> MemStore {
        let store = MemStore::new();
        let mut writer = PagemapWriter::create(&store, ImageKind::Pagemap, 7, 3).unwrap();
        runs.iter().for_each(|run| writer.push(*run).unwrap());
        writer.finish().unwrap();
        store
    }

    fn read(store: &MemStore, len: u64) -> Result<Vec<Placed>, PagesError> {
        PagemapReader::open(store, ImageKind::Pagemap, 7).unwrap().unwrap().runs(len)
    }

    fn entry(vaddr: u64, pages: u64) -> pb::PagemapEntry {
        Run { start: vaddr, pages, flags: PRESENT }.to_entry()
    }

    fn read_entries(entries: &[pb::PagemapEntry]) -> Result<Vec<Placed>, PagesError> {
        let store = MemStore::new();
        let mut image = store.create(ImageKind::Pagemap, 7).unwrap();
        image.entry(&pb::PagemapHead { pages_id: 1 }).unwrap();
        entries.iter().for_each(|e| image.entry(e).unwrap());
        image.finish().unwrap();
        read(&store, u64::MAX)
    }

    #[test]
    fn touching_runs_of_the_same_flags_become_one() {
        let run = |start, pages, flags| Run { start, pages, flags };
        let store = write(&[
            run(0x1000, 1, PRESENT),
            run(0x2000, 2, PRESENT),
            run(0x4000, 1, PRESENT | LAZY),
            run(0x6000, 1, PRESENT | LAZY),
        ]);
        let got = read(&store, 5 * PAGE).unwrap();
        let want = [
            Placed { run: run(0x1000, 3, PRESENT), offset: 0 },
            Placed { run: run(0x4000, 1, PRESENT | LAZY), offset: 3 * PAGE },
            Placed { run: run(0x6000, 1, PRESENT | LAZY), offset: 4 * PAGE },
        ];
        assert_eq!(got, want);
        assert!(read(&store, 5 * PAGE - 1).is_err(), "a short pages image");
    }

    #[test]
    fn an_entry_holds_no_more_than_its_older_count_can_say() {
        let mut run = Run { start: 0, pages: MOST_PAGES - 1, flags: PRESENT };
        assert!(run.join(&Run { start: run.end(), pages: 1, flags: PRESENT }));
        assert!(!run.join(&Run { start: run.end(), pages: 1, flags: PRESENT }));
        assert_eq!(run.to_entry().compat_nr_pages, u32::MAX);
    }

    #[test]
    fn pages_of_the_parent_take_no_room() {
        let store = write(&[
            Run { start: 0x1000, pages: 4, flags: PARENT },
            Run { start: 0x9000, pages: 1, flags: PRESENT },
        ]);
        assert_eq!(read(&store, PAGE).unwrap()[1].offset, 0);
    }

    #[test]
    fn entries_without_flags_are_present_or_in_the_parent() {
        let old = |in_parent| pb::PagemapEntry { in_parent, flags: None, nr_pages: None, ..entry(0x1000, 2) };
        for (in_parent, flags) in [(None, PRESENT), (Some(false), PRESENT), (Some(true), PARENT)] {
            let got = read_entries(&[old(in_parent)]).unwrap();
            assert_eq!(got[0].run, Run { start: 0x1000, pages: 2, flags });
        }
    }

    #[test]
    fn hostile_entries_are_refused() {
        for bad in [
            vec![entry(0x1001, 1)],
            vec![entry(0x1000, 0)],
            vec![entry(0xffff_ffff_ffff_f000, 1)],
            vec![entry(0, u64::MAX)],
            vec![entry(0x1000, u64::MAX / PAGE)],
            vec![entry(0x2000, 1), entry(0x1000, 1)],
            vec![entry(0x1000, 2), entry(0x2000, 1)],
        ] {
            let error = read_entries(&bad).unwrap_err();
            assert!(error.to_string().starts_with("pagemap-7.img: entry "), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(steps in prop::collection::vec((0u64..4, 1u64..600, 0u32..3), 0..60)) {
            let mut at = 0x10_0000;
            let mut pages = std::collections::BTreeMap::new();
            let mut runs = Vec::new();
            for (gap, len, flags) in steps {
                let run = Run { start: at + gap * PAGE, pages: len, flags: [PRESENT, PRESENT | LAZY, PARENT][flags as usize] };
                runs.push(run);
                pages.extend((0..len).map(|i| (run.start + i * PAGE, run.flags)));
                at = run.end();
            }
            let got = read(&write(&runs), u64::MAX).unwrap();
            let mut offset = 0;
            let mut back = std::collections::BTreeMap::new();
            for (i, placed) in got.iter().enumerate() {
                if placed.run.flags & PRESENT != 0 {
                    prop_assert_eq!(placed.offset, offset);
                    offset += placed.run.pages * PAGE;
                }
                if i > 0 {
                    let before = got[i - 1].run;
                    prop_assert!(before.end() < placed.run.start || before.flags != placed.run.flags);
                }
                back.extend((0..placed.run.pages).map(|p| (placed.run.start + p * PAGE, placed.run.flags)));
            }
            prop_assert_eq!(back, pages);
        }

        #[test]
        fn any_entry_is_read_or_refused(vaddr: u64, compat: u32, nr: Option<u64>, flags: Option<u32>) {
            let entry = pb::PagemapEntry { vaddr, compat_nr_pages: compat, in_parent: None, flags, nr_pages: nr };
            if let Ok(run) = Run::from_entry(&entry) {
                prop_assert!(run.start < run.end());
            }
        }
    }
}
