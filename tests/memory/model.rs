//! What an image says the memory is, compared with what it is.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use crtool::image::{ImageKind, Store, TypedStore, pb};
use crtool::mem::vma;
use crtool::pages::pagemap::PagemapReader;

use crate::PAGE;

/// The pages of one pagemap, by address.
pub fn pages(store: &dyn Store, kind: ImageKind, id: u64) -> BTreeMap<u64, Vec<u8>> {
    let mut pages = BTreeMap::new();
    let Some(pagemap) = PagemapReader::open(store, kind, id).unwrap() else { return pages };
    let name = ImageKind::Pages.file_name(u64::from(pagemap.pages_id()));
    let image = store.open_raw(&name).unwrap().expect("a pages image");
    let len = image.len();
    let mut total = 0;
    for placed in pagemap.runs(len).unwrap() {
        for page in 0..placed.run.pages {
            let mut bytes = vec![0; PAGE];
            image.read_exact_at(&mut bytes, placed.offset + page * PAGE as u64).unwrap();
            pages.insert(placed.run.start + page * PAGE as u64, bytes);
            total += PAGE as u64;
        }
    }
    assert_eq!(total, len, "nothing lies in {name} that no entry names");
    pages
}

/// Compares every page of every area of the stopped `pid` with the images; `file` opens a mapped
/// file by area. Areas above `most` pages are compared only where there are pages in the images.
pub fn compare(pid: i32, store: &dyn Store, most: u64) {
    let mm: pb::MmEntry = store.need_one(ImageKind::Mm, u64::from(pid.cast_unsigned())).unwrap();
    let own = pages(store, ImageKind::Pagemap, u64::from(pid.cast_unsigned()));
    let mem = File::open(format!("/proc/{pid}/mem")).unwrap();
    let guards: Vec<_> = mm.vmas.iter().filter(|v| v.status & vma::GUARD != 0).collect();
    let mut in_areas = 0;
    let mut shared = BTreeMap::new();
    for area in mm.vmas.iter().filter(|v| v.status & (vma::GUARD | vma::VSYSCALL | vma::VVAR) == 0) {
        in_areas += own.range(area.start..area.end).count();
        let droppable = area.flags & 0xf == vma::MAP_DROPPABLE;
        if droppable {
            continue;
        }
        let whole = (area.end - area.start) / PAGE as u64 <= most;
        let all = (area.start..area.end).step_by(PAGE).take(if whole { usize::MAX } else { 0 });
        let some = own.range(area.start..area.end).map(|(addr, _)| *addr);
        for addr in all.chain(some.take(if whole { 0 } else { usize::MAX })) {
            let guarded = guards.iter().any(|g| g.start <= addr && addr < g.end);
            let mut real = vec![0; PAGE];
            let readable = mem.read_exact_at(&mut real, addr).is_ok();
            let offset = addr - area.start + area.pgoff;
            if guarded {
                assert!(!readable, "{addr:x} is no guard page");
                assert!(!own.contains_key(&addr));
                continue;
            }
            let imaged = if area.status & vma::ANON_SHARED != 0
                || area.status & vma::MEMFD != 0 && !own.contains_key(&addr)
            {
                let shmid =
                    if area.status & vma::ANON_SHARED != 0 { area.shmid } else { memfd_shmid(pid, area) };
                let object =
                    shared.entry(shmid).or_insert_with(|| pages(store, ImageKind::ShmemPagemap, shmid));
                object.get(&offset).cloned().unwrap_or_else(|| vec![0; PAGE])
            } else if let Some(content) = own.get(&addr) {
                content.clone()
            } else if area.status & vma::ANON_PRIVATE != 0 {
                vec![0; PAGE]
            } else {
                let mut bytes = vec![0; PAGE];
                let n = mapped(pid, area).read_at(&mut bytes, offset).unwrap();
                assert_eq!(n > 0, readable, "{addr:x} beyond the end of its file or not");
                if n == 0 {
                    continue;
                }
                bytes
            };
            assert!(readable, "{addr:x} cannot be read");
            assert!(real == imaged, "{addr:x} in area {:x}-{:x} differs", area.start, area.end);
        }
    }
    assert_eq!(in_areas, own.len(), "every page of the image lies in an area");
}

/// The file behind an area. /dev/zero has zeros without end.
fn mapped(pid: i32, area: &pb::VmaEntry) -> File {
    File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", area.start, area.end)).unwrap()
}

fn memfd_shmid(pid: i32, area: &pb::VmaEntry) -> u64 {
    use std::os::unix::fs::MetadataExt;
    mapped(pid, area).metadata().unwrap().ino()
}
