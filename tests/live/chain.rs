//! Makes a chain of snapshots of a whole one: its pages are divided by lot among several directories.
//!
//! The child keeps all other images. Its parents get pagemaps and pages only: those that are theirs, older versions of
//! some that are not (which nobody may take), and pages at addresses of which the child says nothing. Entries are
//! cut at any place, so that they do not end where those of the next directory end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use crtool::image::{DirStore, ImageKind, PagesSink, Store, TypedStore, pb};
use crtool::pages::pagemap::{PARENT, PRESENT, PagemapReader, Placed};

const PAGE: u64 = 4096;

/// What the lot of a chain was: the child's own pages first.
#[derive(Debug, Default, Clone)]
pub struct Divided {
    pub pages: Vec<u64>,
    /// Versions that are not the newest.
    pub stale: u64,
}

/// The lot: xorshift.
struct Lot(u64);

impl Lot {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// What one directory says of a page.
#[derive(Clone, Copy, PartialEq)]
enum Says {
    Nothing,
    Parent,
    /// Here it is: with the flags of the whole snapshot.
    Real(u32),
    Stale,
}

/// The directory of the parent that is so many generations older.
pub fn older(images: &Path, generation: usize) -> PathBuf {
    let mut name = images.file_name().unwrap_or_default().to_owned();
    name.push(format!(".older{generation}"));
    images.with_file_name(name)
}

/// Divides the snapshot in `images` between it and new directories beside it, so many in all.
pub fn split(images: &Path, generations: usize, seed: u64) -> io::Result<Divided> {
    let mut lot = Lot(seed | 1);
    (0..20).for_each(|_| {
        lot.below(2);
    });
    let mut divided = Divided { pages: vec![0; generations], stale: 0 };
    let mut dirs = vec![images.to_owned()];
    for generation in 1..generations {
        let dir = older(images, generation);
        std::fs::create_dir(&dir)?;
        symlink(
            Path::new("..").join(dir.file_name().unwrap_or_default()),
            dirs[generation - 1].join("parent"),
        )?;
        dirs.push(dir);
    }
    let whole = DirStore::open(images).map_err(io::Error::other)?;
    for name in whole.names().map_err(io::Error::other)? {
        let number =
            |prefix: &str| -> Option<u64> { name.strip_prefix(prefix)?.strip_suffix(".img")?.parse().ok() };
        let (kind, id) = match (number("pagemap-"), number("pagemap-shmem-")) {
            (Some(id), _) => (ImageKind::Pagemap, id),
            (_, Some(id)) => (ImageKind::ShmemPagemap, id),
            _ => continue,
        };
        one(&whole, &dirs, kind, id, &mut lot, &mut divided).map_err(io::Error::other)?;
    }
    Ok(divided)
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

fn one(
    whole: &DirStore,
    dirs: &[PathBuf],
    kind: ImageKind,
    id: u64,
    lot: &mut Lot,
    divided: &mut Divided,
) -> Result<(), Failed> {
    let pagemap = PagemapReader::open(whole, kind, id)?.ok_or("no pagemap")?;
    let pages_id = pagemap.pages_id();
    let name = ImageKind::Pages.file_name(u64::from(pages_id));
    let from = whole.open_raw(&name)?;
    let runs = pagemap.runs(u64::MAX)?;
    let mut says: Vec<BTreeMap<u64, Says>> = dirs.iter().map(|_| BTreeMap::new()).collect();
    let mut owner = 0;
    let mut left = 0;
    for Placed { run, .. } in &runs {
        for addr in (run.start..run.end()).step_by(PAGE as usize) {
            if left == 0 {
                owner = (owner + 1 + lot.below(dirs.len() as u64 - 1) as usize) % dirs.len();
                left = [1, 1, 2, 3, 5, 9][lot.below(6) as usize];
            }
            left -= 1;
            divided.pages[owner] += 1;
            for (generation, says) in says.iter_mut().enumerate() {
                let word = match generation {
                    _ if generation < owner => Says::Parent,
                    _ if generation == owner => Says::Real(run.flags),
                    _ if lot.below(2) == 0 => Says::Stale,
                    _ => Says::Nothing,
                };
                says.insert(addr, word);
            }
        }
        // Pages that have gone since.
        for (generation, says) in says.iter_mut().enumerate().skip(1) {
            if kind == ImageKind::Pagemap && lot.below(3) == 0 {
                let end = run.end() + (generation as u64) * PAGE;
                (run.end()..end).step_by(PAGE as usize).for_each(|addr| {
                    says.entry(addr).or_insert(Says::Stale);
                });
            }
        }
    }
    // What only seems to be gone is the next run's.
    let starts: Vec<(u64, u64)> = runs.iter().map(|placed| (placed.run.start, placed.run.end())).collect();
    let content = |addr: u64| -> Result<Vec<u8>, Failed> {
        let at = starts.partition_point(|(start, _)| *start <= addr) - 1;
        let offset = runs[at].offset + (addr - runs[at].run.start);
        let mut bytes = vec![0; PAGE as usize];
        from.as_ref().ok_or("no pages image")?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    };
    for (generation, (dir, says)) in dirs.iter().zip(&says).enumerate() {
        // The parents need not number their images as the child does.
        let number = pages_id + 10 * generation as u32;
        let fresh = dir.join("fresh");
        std::fs::create_dir_all(&fresh)?;
        let made = DirStore::for_dump(&fresh)?;
        let mut image = made.create(kind, id)?;
        image.entry(&pb::PagemapHead { pages_id: number })?;
        let pages_name = ImageKind::Pages.file_name(u64::from(number));
        let PagesSink::File(pages) = made.create_pages(&pages_name, 0)? else { return Err("no file".into()) };
        write(&mut image, &pages, says, &content, lot, divided)?;
        image.finish()?;
        made.commit()?;
        for name in [kind.file_name(id), pages_name] {
            std::fs::rename(fresh.join(&name), dir.join(&name))?;
        }
        std::fs::remove_dir(&fresh)?;
    }
    Ok(())
}

fn write(
    image: &mut crtool::image::ImageWriter,
    pages: &File,
    says: &BTreeMap<u64, Says>,
    content: &dyn Fn(u64) -> Result<Vec<u8>, Failed>,
    lot: &mut Lot,
    divided: &mut Divided,
) -> Result<(), Failed> {
    let mut open: Option<(u64, u64, u32)> = None;
    let mut entries = Vec::new();
    let mut at = 0;
    for (&addr, &word) in says {
        let flags = match word {
            Says::Nothing => continue,
            Says::Parent => PARENT,
            Says::Real(flags) => flags,
            Says::Stale => PRESENT,
        };
        match word {
            Says::Real(_) => pages.write_all_at(&content(addr)?, at)?,
            Says::Stale => {
                divided.stale += 1;
                pages.write_all_at(&[0xa5; PAGE as usize], at)?;
            }
            _ => {}
        }
        if flags & PRESENT != 0 {
            at += PAGE;
        }
        match &mut open {
            Some((start, count, same))
                if *start + *count * PAGE == addr && *same == flags && lot.below(16) != 0 =>
            {
                *count += 1;
            }
            _ => entries.extend(open.replace((addr, 1, flags))),
        }
    }
    entries.extend(open);
    for (vaddr, count, flags) in entries {
        image.entry(&pb::PagemapEntry {
            vaddr,
            compat_nr_pages: u32::try_from(count)?,
            in_parent: None,
            flags: Some(flags),
            nr_pages: Some(count),
        })?;
    }
    Ok(())
}
