use std::collections::BTreeMap;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;
use crate::image::{DirStore, ImageFile, ImageSink, MemStore, PagesSink, TypedStore, pb};
use crate::pages::pagemap::LAZY;

const FIRST: u64 = 0x10_0000;
const ID: u64 = 7;

/// Entries of one snapshot, as (page, pages, flags).
type Entries = Vec<(u64, u64, u32)>;

/// What a page holds: no two in all snapshots are alike.
fn content(snapshot: usize, page: u64) -> Vec<u8> {
    let word = (snapshot as u64 + 1) << 32 | page;
    word.to_le_bytes().repeat(PAGE as usize / 8)
}

/// Writes a snapshot, its entries just as they are.
fn write(store: &dyn Store, snapshot: usize, entries: &Entries) {
    let mut pagemap = store.create(ImageKind::Pagemap, ID).unwrap();
    pagemap.entry(&pb::PagemapHead { pages_id: 3 }).unwrap();
    let PagesSink::File(image) = store.create_pages("pages-3.img", 0).unwrap() else { panic!("no file") };
    let mut at = 0;
    for &(page, pages, flags) in entries {
        let entry = pb::PagemapEntry {
            vaddr: FIRST + page * PAGE,
            compat_nr_pages: pages as u32,
            in_parent: None,
            flags: Some(flags),
            nr_pages: Some(pages),
        };
        pagemap.entry(&entry).unwrap();
        for page in (page..page + pages).filter(|_| flags & PRESENT != 0) {
            image.write_all_at(&content(snapshot, page), at).unwrap();
            at += PAGE;
        }
    }
    pagemap.finish().unwrap();
}

/// A chain in memory, the child first.
fn chain(snapshots: &[Entries]) -> MemStore {
    let mut above: Option<MemStore> = None;
    for (number, entries) in snapshots.iter().enumerate().rev() {
        let store = above.as_ref().map_or_else(MemStore::new, MemStore::on);
        write(&store, number, entries);
        above = Some(store);
    }
    above.unwrap()
}

fn read(store: &dyn Store) -> Result<Pages, PagesError> {
    Ok(Pages::read(store, ImageKind::Pagemap, ID)?.unwrap())
}

fn error(store: &dyn Store) -> String {
    format!("{:#}", anyhow::Error::from(read(store).unwrap_err()))
}

/// Page by page: who has it. `Err` is the first page that nobody has.
fn model(snapshots: &[Entries]) -> Result<BTreeMap<u64, usize>, ()> {
    let flags_of = |snapshot: &Entries, page: u64| {
        snapshot.iter().find(|(first, pages, _)| (*first..first + pages).contains(&page)).map(|entry| entry.2)
    };
    let mut found = BTreeMap::new();
    let own = &snapshots[0];
    for page in own.iter().flat_map(|(first, pages, _)| *first..first + pages) {
        let mut number = 0;
        loop {
            match snapshots.get(number).and_then(|snapshot| flags_of(snapshot, page)) {
                Some(PARENT) => number += 1,
                Some(flags) if flags & PRESENT != 0 => break,
                _ => return Err(()),
            }
        }
        found.insert(page, number);
    }
    Ok(found)
}

/// All pages by address, from pieces read in heaps of `heap`.
fn contents(pages: &Pages, heap: usize) -> BTreeMap<u64, Vec<u8>> {
    let single: Vec<Piece> = pages.pieces().iter().flat_map(|piece| piece.in_parts(PAGE)).collect();
    let mut all = BTreeMap::new();
    for some in single.chunks(heap) {
        let mut bytes = vec![0; some.len() * PAGE as usize];
        pages.fetch(some, &mut bytes).unwrap();
        for (piece, page) in some.iter().zip(bytes.chunks(PAGE as usize)) {
            assert!(all.insert((piece.start - FIRST) / PAGE, page.to_vec()).is_none(), "{piece:x?} twice");
        }
    }
    all
}

/// Entries of one snapshot of up to 64 pages; with `full` there are no gaps.
fn entries(full: bool) -> impl Strategy<Value = Entries> {
    let flags = prop_oneof![4 => Just(PARENT), 4 => Just(PRESENT), 1 => Just(PRESENT | LAZY)];
    let step = (if full { 0..1u64 } else { 0..3 }, 1..6u64, flags);
    prop::collection::vec(step, 1..40).prop_map(move |steps| {
        let mut at = 0;
        let mut entries = Entries::new();
        for (gap, pages, flags) in steps {
            let first = at + gap;
            let pages = pages.min(64u64.saturating_sub(first));
            if pages > 0 {
                entries.push((first, pages, flags));
            }
            at = first + pages;
        }
        if full && at < 64 {
            entries.push((at, 64 - at, PRESENT));
        }
        entries
    })
}

/// Chains in which every page is somewhere, and chains that may be damaged.
fn snapshots() -> impl Strategy<Value = Vec<Entries>> {
    let whole = (entries(false), prop::collection::vec(entries(true), 0..4)).prop_map(|(child, others)| {
        let mut all = vec![child];
        all.extend(others);
        all.push(vec![(0, 64, PRESENT)]);
        all
    });
    prop_oneof![3 => whole, 1 => prop::collection::vec(entries(false), 1..4)]
}

proptest! {
    #[test]
    fn as_page_by_page(snapshots in snapshots(), heap in 1..70usize) {
        let store = chain(&snapshots);
        match (read(&store), model(&snapshots)) {
            (Ok(pages), Ok(model)) => {
                let got = contents(&pages, heap);
                let want: BTreeMap<u64, Vec<u8>> =
                    model.iter().map(|(page, number)| (*page, content(*number, *page))).collect();
                prop_assert_eq!(got, want);
                prop_assert_eq!(pages.count(), model.len() as u64);
                prop_assert!(pages.pieces().windows(2).all(|two| two[0].end <= two[1].start));
            }
            (Err(PagesError::Nowhere { start, .. }), Err(())) => prop_assert!(start >= FIRST),
            (got, want) => prop_assert!(false, "{got:x?} {want:?}"),
        }
    }

    #[test]
    fn within_is_a_cut(snapshots in snapshots(), from in 0u64..70, len in 1u64..30) {
        let Ok(pages) = read(&chain(&snapshots)) else { return Ok(()) };
        let (start, end) = (FIRST + from * PAGE, FIRST + (from + len) * PAGE);
        let parts: Vec<Piece> = pages.within(start, end).flat_map(|piece| piece.in_parts(PAGE)).collect();
        let all = pages.pieces().iter().flat_map(|piece| piece.in_parts(PAGE));
        let want: Vec<Piece> = all.filter(|piece| piece.start >= start && piece.end <= end).collect();
        prop_assert_eq!(pages.any_in(start, end), !want.is_empty());
        prop_assert_eq!(parts, want);
    }
}

#[test]
fn no_read_is_longer_than_the_kernel_takes() {
    const MOST: u64 = 1 << 30;
    let piece = Piece { start: 0x1000, end: 0x1000 + 5 * MOST / 2, image: 2, offset: 0x3000 };
    let parts: Vec<Piece> = piece.in_parts(MOST).collect();
    assert_eq!(parts.len(), 3);
    let second = Piece { start: 0x1000 + MOST, end: 0x1000 + 2 * MOST, image: 2, offset: 0x3000 + MOST };
    assert_eq!(parts[1], second);
    assert_eq!(parts[2].end, piece.end);
    let small = Piece { start: 0x1000, end: 0x2000, image: 0, offset: 0 };
    assert_eq!(small.in_parts(MOST).collect::<Vec<_>>(), [small]);
}

#[test]
fn more_parts_than_one_read_takes() {
    let alternate =
        |which: u64| (0..5000).map(move |page| (page, 1, [PRESENT, PARENT][(page % 2 == which) as usize]));
    let store = chain(&[alternate(0).collect(), vec![(0, 5000, PRESENT)]]);
    let pages = read(&store).unwrap();
    assert_eq!(pages.pieces().len(), 5000);
    for (page, bytes) in contents(&pages, 5000) {
        assert!(bytes == content(if page % 2 == 0 { 1 } else { 0 }, page), "{page}");
    }
    // Two pages of one snapshot beside each other are one piece, as they are in the image.
    let store = chain(&[vec![(0, 9, PARENT)], vec![(0, 4, PRESENT), (4, 9, PRESENT)]]);
    assert_eq!(read(&store).unwrap().pieces().len(), 1);
}

#[test]
fn what_nobody_has_is_named() {
    let own = vec![(0, 2, PRESENT), (2, 6, PARENT)];
    for (chain, wanted) in [
        (
            chain(std::slice::from_ref(&own)),
            "0x102000-0x108000 are in a parent snapshot, but memory: has no parent",
        ),
        (chain(&[own.clone(), vec![(0, 5, PRESENT), (7, 1, PRESENT)]]), "0x105000-0x107000 are in a parent"),
        (chain(&[own.clone(), vec![(0, 5, PRESENT)]]), "0x105000-0x108000 are in a parent"),
        (
            chain(&[own.clone(), vec![(2, 6, PARENT)], vec![(0, 3, PRESENT)]]),
            "0x103000-0x108000 are in a parent",
        ),
        (chain(&[own.clone(), vec![(0, 9, LAZY)]]), "0x102000-0x108000 are in a parent"),
    ] {
        let error = error(&chain);
        assert!(error.contains(wanted) && error.starts_with("memory:/pagemap-7.img: its pages"), "{error}");
        assert!(error.ends_with(": the chain of snapshots is damaged"), "{error}");
    }
    let store = MemStore::on(&MemStore::new());
    write(&store, 0, &own);
    assert!(error(&store).contains("but memory:/pagemap-7.img is missing"), "{}", error(&store));
    let lazy = chain(&[vec![(1, 2, LAZY)]]);
    assert!(error(&lazy).contains("its pages 0x101000-0x103000 are in no image"), "{}", error(&lazy));
    let both = chain(&[vec![(1, 2, PRESENT | PARENT)]]);
    let wanted = "pagemap-7.img: entry 1: both in this snapshot and in its parent";
    assert_eq!(error(&both), wanted);
    assert!(Pages::read(&MemStore::new(), ImageKind::Pagemap, ID).unwrap().is_none());
}

#[test]
fn a_parent_that_nobody_asks_need_not_be_there() {
    let dir = tempfile::tempdir().unwrap();
    symlink("gone", dir.path().join("parent")).unwrap();
    let store = dumped(dir.path(), 0, &vec![(0, 2, PRESENT)]);
    assert_eq!(read(&store).unwrap().count(), 2);
}

/// A committed snapshot in a directory, opened for reading.
fn dumped(path: &Path, snapshot: usize, entries: &Entries) -> DirStore {
    std::fs::create_dir_all(path).unwrap();
    let store = DirStore::for_dump(path).unwrap();
    write(&store, snapshot, entries);
    store.commit().unwrap();
    DirStore::open(path).unwrap()
}

#[test]
fn links_that_lead_nowhere_or_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let all = vec![(0, 4, PARENT)];
    dumped(&path("child"), 0, &all);
    // Anew each time: what was found once is remembered.
    let child = || DirStore::open(&path("child")).unwrap();
    dumped(&path("middle"), 1, &all);
    symlink("../middle", path("child/parent")).unwrap();
    let said = error(&child());
    assert!(said.contains("child/parent has no parent"), "{said}");

    symlink("../gone", path("middle/parent")).unwrap();
    let said = error(&child());
    assert!(
        said.contains("open the parent snapshot ") && said.contains("child/parent/parent: No such file"),
        "{said}"
    );

    std::fs::remove_file(path("middle/parent")).unwrap();
    for back in ["../child", "."] {
        symlink(back, path("middle/parent")).unwrap();
        let said = error(&child());
        assert!(said.contains("the links make a loop"), "{said}");
        std::fs::remove_file(path("middle/parent")).unwrap();
    }
    // A link to itself is the kernel's affair.
    symlink("parent", path("middle/parent")).unwrap();
    assert!(error(&child()).contains("Too many levels of symbolic links"), "{}", error(&child()));
    std::fs::remove_file(path("middle/parent")).unwrap();

    dumped(&path("first"), 2, &vec![(0, 9, PRESENT)]);
    symlink(path("first"), path("middle/parent")).unwrap();
    assert_eq!(read(&child()).unwrap().count(), 4);
    assert!(read(&child()).unwrap().images()[0].path.ends_with("child/parent/parent/pages-3.img"));

    std::fs::File::options().write(true).open(path("first/pages-3.img")).unwrap().set_len(8 * PAGE).unwrap();
    let said = error(&child());
    let wanted = "child/parent/parent: pagemap-7.img: entry 1: pages missing from the pages image";
    assert!(said.starts_with("parent snapshot ") && said.ends_with(wanted), "{said}");
    std::fs::remove_file(path("first/pages-3.img")).unwrap();
    let said = error(&child());
    assert!(said.ends_with("parent/parent/pages-3.img: no such image"), "{said}");
}

#[test]
fn a_chain_has_an_end() {
    let all = |flags| vec![(0, 1, flags)];
    let most: Vec<Entries> = (0..MOST_PARENTS).map(|_| all(PARENT)).chain([all(PRESENT)]).collect();
    assert_eq!(read(&chain(&most)).unwrap().count(), 1);
    let more: Vec<Entries> = std::iter::once(all(PARENT)).chain(most).collect();
    assert_eq!(error(&chain(&more)), "memory:: a chain of more than 256 parent snapshots");
}

/// A store whose pages go as they are read, but not those of its parents, or come as they are read.
struct Moving(MemStore, Option<Arc<Coming>>);

/// Brings two pages at a time, behind two of another image.
#[derive(Debug)]
struct Coming {
    pages: MemStore,
    asked: Mutex<Vec<u64>>,
}

impl Arrival for Coming {
    fn part(&self, name: &str, least: u64) -> Result<Part, ImageError> {
        self.asked.lock().unwrap().push(least);
        let whole = self.pages.open_raw(name)?.unwrap();
        let len = least.next_multiple_of(2 * PAGE).min(whole.len());
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 2 * PAGE).unwrap();
        Ok(Part { file, start: 2 * PAGE, len, complete: len == whole.len() })
    }
}

impl Store for Moving {
    fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, ImageError> {
        self.0.create_raw(name)
    }
    fn create_pages(&self, name: &str, expected: u64) -> Result<PagesSink, ImageError> {
        self.0.create_pages(name, expected)
    }
    fn open_raw(&self, name: &str) -> Result<Option<ImageFile>, ImageError> {
        self.0.open_raw(name)
    }
    fn names(&self) -> Result<Vec<String>, ImageError> {
        self.0.names()
    }
    fn commit(&self) -> Result<(), ImageError> {
        self.0.commit()
    }
    fn withdraw(&self) -> Result<(), ImageError> {
        self.0.withdraw()
    }
    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError> {
        self.0.parent()
    }
    fn link_parent(&self, target: &Path) -> Result<(), ImageError> {
        self.0.link_parent(target)
    }
    fn path_of(&self, name: &str) -> PathBuf {
        self.0.path_of(name)
    }
    fn unfinished(&self) -> Arc<AtomicBool> {
        self.0.unfinished()
    }
    fn consumed(&self) -> bool {
        self.1.is_none()
    }
    fn has_holes(&self) -> bool {
        true
    }
    fn arrival(&self) -> Option<Arc<dyn Arrival>> {
        self.1.clone().map(|coming| -> Arc<dyn Arrival> { coming })
    }
}

#[test]
fn only_the_child_is_consumed() {
    let store = Moving(chain(&[vec![(0, 2, PARENT), (2, 2, PRESENT)], vec![(0, 9, PRESENT)]]), None);
    let pages = read(&store).unwrap();
    let consumed: Vec<bool> = pages.images().iter().map(|image| image.consumed).collect();
    assert_eq!(consumed, [true, false]);
    // Those that have nothing which is wanted are closed again.
    let store = chain(&[vec![(0, 9, PARENT)], vec![(0, 9, PARENT), (9, 1, PRESENT)], vec![(0, 9, PRESENT)]]);
    assert_eq!(read(&store).unwrap().images().len(), 1);
}

#[test]
fn pages_that_arrive_are_waited_for() {
    let pages = chain(&[vec![(0, 3, PRESENT), (10, 2, PRESENT)]]);
    let coming = Arc::new(Coming { pages: pages.clone(), asked: Mutex::default() });
    let asked = || std::mem::take(&mut *coming.asked.lock().unwrap());
    let arriving = read(&Moving(pages, Some(coming.clone()))).unwrap();
    assert!(asked().is_empty() && arriving.are_arriving(), "to know which there are takes none of them");
    let fetch = |page: u64| {
        let piece = arriving.within(FIRST + page * PAGE, FIRST + (page + 1) * PAGE).next().unwrap();
        let mut bytes = vec![0; PAGE as usize];
        arriving.fetch(&[piece], &mut bytes).unwrap();
        assert_eq!(bytes, content(0, page), "{page}");
    };
    fetch(2);
    assert_eq!(asked(), [3 * PAGE]);
    // What has come once is not asked for again.
    (0..3).chain([10]).for_each(fetch);
    assert_eq!(asked(), [0_u64; 0]);
    assert!(arriving.are_arriving());
    arriving.wait().unwrap();
    assert_eq!(asked(), [5 * PAGE]);
    assert!(!arriving.are_arriving());
    // More than there will ever be.
    let short = Coming { pages: chain(&[vec![(0, 1, PRESENT)]]), asked: Mutex::default() };
    let long = read(&Moving(chain(&[vec![(0, 3, PRESENT)]]), Some(Arc::new(short)))).unwrap();
    assert_eq!(long.wait().unwrap_err().to_string(), "read memory:/pages-3.img");
}

#[test]
fn holes_are_left_out() {
    let store = chain(&[vec![(0, 8, PRESENT)]]);
    let image = store.open_raw("pages-3.img").unwrap().unwrap().into_file();
    let file = File::options().write(true).open(format!("/proc/self/fd/{}", image.as_raw_fd())).unwrap();
    file.set_len(2 * PAGE).unwrap();
    file.set_len(4 * PAGE).unwrap();
    file.write_all_at(&[1], 4 * PAGE).unwrap();
    file.set_len(8 * PAGE).unwrap();
    let left = |store: &dyn Store| {
        let pages = read(store).unwrap();
        let mut left = Vec::new();
        for piece in pages.within(FIRST + PAGE, FIRST + 8 * PAGE) {
            pages.without_holes(piece, &mut left).unwrap();
        }
        left.iter()
            .map(|piece| ((piece.start - FIRST) / PAGE, piece.len() / PAGE, piece.offset / PAGE))
            .collect()
    };
    let all: Vec<(u64, u64, u64)> = left(&store);
    assert_eq!(all, [(1, 7, 1)], "of a store whose holes mean nothing");
    let data: Vec<(u64, u64, u64)> = left(&Moving(store, None));
    assert_eq!(data, [(1, 1, 1), (4, 1, 4)]);
}
