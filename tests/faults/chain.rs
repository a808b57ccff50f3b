//! Chains of snapshots that are damaged: one line that says where, nothing has been made, and the parents stay as they are.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use crtool::image::{DirStore, ImageKind, Store, TypedStore, pb};

use crate::damage;
use crate::reaper::End;
use crate::site::Site;
use crate::split::{self, older};

const PAGE: usize = 4096;

/// A chain of the target, which is dead then: the child and its two parents.
fn chain(site: &mut Site) -> Result<[PathBuf; 3], String> {
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    let seed = site.random(u64::MAX);
    let divided = split::split(&images, 3, seed).map_err(|e| format!("make a chain: {e}"))?;
    if divided.stale == 0 || divided.pages.contains(&0) {
        return Err(format!("hardly a chain: {divided:?}"));
    }
    let parents = [older(&images, 1), older(&images, 2)];
    let [first, second] = parents;
    Ok([images, first, second])
}

/// The restore is refused with one line that has all of `wanted`, before there is any process.
fn refused(site: &Site, images: &Path, wanted: &[&str]) -> Result<(), String> {
    let run = site.run(&["restore", "-d"], images)?;
    run.failed_cleanly()?;
    let said = run.said.trim();
    if said.lines().count() != 1 || !wanted.iter().all(|part| said.contains(part)) {
        return Err(format!("not one line with {wanted:?}:\n{said}"));
    }
    let log = fs::read_to_string(site.dir.join("tool.log")).unwrap_or_default();
    if log.contains("creation of") {
        return Err(format!("refused when there were processes already: {said}"));
    }
    site.nothing_left()
}

fn io<T>(result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

/// Puts another link in place of the one in `dir`, for a while.
fn with_link(
    dir: &Path,
    target: Option<&Path>,
    work: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    let link = dir.join("parent");
    let right = io(fs::read_link(&link))?;
    io(fs::remove_file(&link))?;
    if let Some(target) = target {
        io(symlink(target, &link))?;
    }
    work().map_err(|text| format!("{} -> {target:?}: {text}", link.display()))?;
    let _ = fs::remove_file(&link);
    io(symlink(right, link))
}

/// What a restore may not change: names, sizes, the room they take, contents.
fn picture(dirs: &[PathBuf]) -> Result<Vec<(PathBuf, u64, Vec<u8>)>, String> {
    let mut all = Vec::new();
    for dir in dirs {
        for entry in io(fs::read_dir(dir))?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "img") {
                let blocks = io(fs::metadata(&path))?.blocks();
                all.push((path.clone(), blocks, io(fs::read(&path))?));
            }
        }
    }
    all.sort();
    Ok(all)
}

/// In the end it is still a chain that can be restored, and the restore leaves it as it is.
fn intact(site: &Site, dirs: &[PathBuf; 3]) -> Result<(), String> {
    let before = picture(dirs)?;
    site.restore(&dirs[0])?;
    if !fs::read_to_string(site.dir.join("tool.log")).unwrap_or_default().contains("creation of") {
        return Err("the log does not tell of processes".to_owned());
    }
    if picture(dirs)? != before {
        return Err("the restore has changed images".to_owned());
    }
    site.finish()
}

pub fn links(site: &mut Site) -> Result<(), String> {
    let dirs = chain(site)?;
    let [child, first, second] = &dirs;
    let gone = Path::new("../gone");
    with_link(child, None, || refused(site, child, &["images has no parent", "in a parent snapshot"]))?;
    with_link(first, None, || refused(site, child, &["images/parent has no parent", "is damaged"]))?;
    for (dir, place) in
        [(child, "images/parent: No such file"), (first, "images/parent/parent: No such file")]
    {
        with_link(dir, Some(gone), || refused(site, child, &["open the parent snapshot", place]))?;
        with_link(dir, Some(Path::new("core-1.img")), || {
            refused(site, child, &["open the parent snapshot"])
        })?;
    }
    let looped = |target: &Path| {
        refused(site, child, &["the links make a loop"]).map_err(|text| format!("{target:?}: {text}"))
    };
    with_link(child, Some(Path::new(".")), || looped(child))?;
    with_link(first, Some(Path::new(".")), || looped(first))?;
    with_link(first, Some(child), || looped(child))?;
    with_link(child, Some(Path::new("parent")), || {
        refused(site, child, &["Too many levels of symbolic links"])
    })?;
    // Absolute or relative, it is the same.
    with_link(first, Some(second), || intact(site, &dirs))
}

/// Names of the pagemaps of a directory.
fn pagemaps(dir: &Path) -> Result<Vec<(ImageKind, u64)>, String> {
    let store = DirStore::open(dir).map_err(|e| e.to_string())?;
    let names = store.names().map_err(|e| e.to_string())?;
    let mut all = Vec::new();
    for name in names {
        let id = |prefix: &str| name.strip_prefix(prefix)?.strip_suffix(".img")?.parse().ok();
        all.extend(id("pagemap-").map(|id| (ImageKind::Pagemap, id)));
        all.extend(id("pagemap-shmem-").map(|id| (ImageKind::ShmemPagemap, id)));
    }
    Ok(all)
}

type Read = (u32, Vec<pb::PagemapEntry>);

fn read(dir: &Path, kind: ImageKind, id: u64) -> Result<Read, Box<dyn std::error::Error>> {
    let store = DirStore::open(dir)?;
    let mut image = store.open(kind, id)?.ok_or("no pagemap")?;
    let head = image.next_entry::<pb::PagemapHead>()?.ok_or("no head")?;
    let mut entries = Vec::new();
    while let Some(entry) = image.next_entry()? {
        entries.push(entry);
    }
    Ok((head.pages_id, entries))
}

/// Takes one entry and its pages out of a pagemap.
fn without(dir: &Path, kind: ImageKind, id: u64, number: usize) -> Result<(), Box<dyn std::error::Error>> {
    let (pages_id, mut entries) = read(dir, kind, id)?;
    let pages = dir.join(ImageKind::Pages.file_name(u64::from(pages_id)));
    let mut bytes = fs::read(&pages)?;
    let len = |entry: &pb::PagemapEntry| match entry.flags {
        Some(flags) if flags & 4 != 0 => entry.nr_pages.unwrap_or(0) as usize * PAGE,
        _ => 0,
    };
    let at: usize = entries[..number].iter().map(len).sum();
    bytes.drain(at..at + len(&entries[number]));
    entries.remove(number);
    fs::write(pages, bytes)?;
    let path = dir.join(kind.file_name(id));
    fs::remove_file(&path)?;
    let fresh = dir.join("fresh");
    fs::create_dir_all(&fresh)?;
    let store = DirStore::for_dump(&fresh)?;
    let mut image = store.create(kind, id)?;
    image.entry(&pb::PagemapHead { pages_id })?;
    entries.iter().try_for_each(|entry| image.entry(entry))?;
    image.finish()?;
    store.commit()?;
    fs::rename(fresh.join(kind.file_name(id)), path)?;
    fs::remove_dir(fresh)?;
    Ok(())
}

pub fn pages(site: &mut Site) -> Result<(), String> {
    let dirs = chain(site)?;
    let [child, first, second] = &dirs;
    let text = |e: Box<dyn std::error::Error>| e.to_string();
    let (mut passed, mut failed) = (0, 0);
    for dir in [first, second] {
        let all = pagemaps(dir)?;
        for (kind, id) in &all {
            let path = dir.join(kind.file_name(*id));
            let pages =
                dir.join(ImageKind::Pages.file_name(u64::from(read(dir, *kind, *id).map_err(text)?.0)));
            let right = [io(fs::read(&path))?, io(fs::read(&pages))?];
            // Without the pagemap, without the pages.
            io(fs::remove_file(&path))?;
            refused(site, child, &[&kind.file_name(*id), "is missing: the chain of snapshots is damaged"])?;
            io(fs::write(&path, &right[0]))?;
            io(fs::remove_file(&pages))?;
            refused(site, child, &["parent snapshot ", "no such image"])?;
            for cut in [0, 1, right[1].len() / 2, right[1].len() - 1] {
                io(fs::write(&pages, &right[1][..cut]))?;
                refused(site, child, &["parent snapshot ", "pages missing from the pages image"])?;
            }
            io(fs::write(&pages, &right[1]))?;
            // Without an entry: some are older versions that nobody asks for.
            let count = read(dir, *kind, *id).map_err(text)?.1.len() as u64;
            for _ in 0..Site::times(6) {
                let number = usize::try_from(site.random(count)).map_err(|e| e.to_string())?;
                without(dir, *kind, *id, number).map_err(text)?;
                let run = site.run(&["restore", "-d"], child)?;
                if run.end == End::Exited(0) {
                    passed += 1;
                    site.works()?;
                    site.clear()?;
                } else {
                    failed += 1;
                    refused(site, child, &["does not have them: the chain of snapshots is damaged"])?;
                }
                io(fs::write(&path, &right[0]))?;
                io(fs::write(&pages, &right[1]))?;
            }
        }
    }
    if passed == 0 || failed == 0 {
        return Err(format!("of the chains that lack an entry {passed} were restored, {failed} refused"));
    }
    intact(site, &dirs)
}

pub fn flipped(site: &mut Site) -> Result<(), String> {
    let dirs = chain(site)?;
    let mut refused = 0;
    for dir in &dirs[1..] {
        for (kind, id) in pagemaps(dir)? {
            let file = dir.join(kind.file_name(id));
            let bytes = io(fs::read(&file))?;
            for _ in 0..Site::times(16) {
                let (at, bit) = (site.random(bytes.len() as u64), site.random(8));
                let at = usize::try_from(at).map_err(|e| e.to_string())?;
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                let passed = damage::with(site, &dirs[0], &file, Some(&damaged), true)
                    .map_err(|text| format!("{}, bit {bit} of byte {at}: {text}", file.display()))?;
                refused += usize::from(!passed);
            }
        }
    }
    if refused < 10 {
        return Err(format!("only {refused} damaged chains were refused"));
    }
    intact(site, &dirs)
}
