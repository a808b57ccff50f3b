//! Damaged images: one clear error and nothing left, never a panic, a hang or half a tree.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::reaper::End;
use crate::site::Site;

/// A snapshot of the target, which is dead then, and its images in order.
pub fn snapshot(site: &Site) -> Result<(PathBuf, Vec<PathBuf>), String> {
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    let entries = fs::read_dir(&images).map_err(|e| e.to_string())?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "img"));
    files.sort();
    if files.len() < 10 {
        return Err(format!("only {} images: {files:?}", files.len()));
    }
    Ok((images, files))
}

/// Restores from a directory with one file damaged, and puts the file right again.
pub fn with(
    site: &Site,
    images: &Path,
    file: &Path,
    damaged: Option<&[u8]>,
    may_pass: bool,
) -> Result<bool, String> {
    let right = fs::read(file).map_err(|e| e.to_string())?;
    match damaged {
        Some(bytes) => fs::write(file, bytes),
        None => fs::remove_file(file),
    }
    .map_err(|e| e.to_string())?;
    let run = site.run(&["restore", "-d"], images)?;
    fs::write(file, right).map_err(|e| e.to_string())?;
    // Registers may be wrong such that nothing shows but that the program fails at once.
    let failed_at_once = run.end == End::Exited(2) && run.said.contains("as soon as it ran");
    if may_pass && (run.end == End::Exited(0) || failed_at_once) {
        site.clear()?;
        // What a damaged tree says about itself is no news.
        let _ = fs::remove_file(site.dir.join("wrong"));
        return Ok(true);
    }
    run.failed_cleanly()?;
    if run.said.trim().lines().count() > 1 {
        return Err(format!("more than one line:\n{}", run.said));
    }
    site.nothing_left()?;
    Ok(false)
}

/// In the end the images, all right again, still hold the tree.
fn intact(site: &Site, images: &Path) -> Result<(), String> {
    site.restore(images)?;
    site.finish()
}

pub fn name(file: &Path) -> String {
    file.file_name().map(|n| n.display().to_string()).unwrap_or_default()
}

pub fn truncated(site: &mut Site) -> Result<(), String> {
    let (images, files) = snapshot(site)?;
    for file in &files {
        let bytes = fs::read(file).map_err(|e| e.to_string())?;
        let len = bytes.len();
        let mut cuts =
            vec![0, 1, 7, 8, 9, 12, len / 3, len / 2, len.saturating_sub(5), len.saturating_sub(1)];
        cuts.retain(|&cut| cut < len);
        cuts.dedup();
        for cut in cuts {
            // An image of entries may have lost whole entries that nobody needs: the shorter file is a good one.
            let passed = with(site, &images, file, Some(&bytes[..cut]), true)
                .map_err(|text| format!("{} cut to {cut} of {len}: {text}", name(file)))?;
            if passed && (cut == 0 || cut + 1 == len) {
                return Err(format!("{} cut to {cut} of {len} was restored", name(file)));
            }
        }
    }
    intact(site, &images)
}

pub fn flipped(site: &mut Site) -> Result<(), String> {
    let (images, files) = snapshot(site)?;
    let mut refused = 0;
    for file in &files {
        // Bits of page contents are the program's own.
        if name(file).starts_with("pages-") {
            continue;
        }
        let bytes = fs::read(file).map_err(|e| e.to_string())?;
        for turn in 0..Site::times(16) {
            // The head first: a magic, a size.
            let span = if turn < 4 { bytes.len().min(16) } else { bytes.len() };
            let (at, bit) = (site.random(span as u64), site.random(8));
            let at = usize::try_from(at).map_err(|e| e.to_string())?;
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let passed = with(site, &images, file, Some(&damaged), true)
                .map_err(|text| format!("{}, bit {bit} of byte {at} flipped: {text}", name(file)))?;
            refused += usize::from(!passed);
        }
    }
    if refused < 50 {
        return Err(format!("only {refused} damaged snapshots were refused"));
    }
    intact(site, &images)
}

pub fn missing(site: &mut Site) -> Result<(), String> {
    let (images, files) = snapshot(site)?;
    for file in &files {
        // A tree without them could have been saved just so.
        let optional =
            ["cpuinfo.img", "fs-", "seccomp.img", "cgroup.img", "tty-info", "timens", "rule-", "route"];
        let may_pass = optional.iter().any(|o| name(file).starts_with(o));
        with(site, &images, file, None, may_pass)
            .map_err(|text| format!("without {}: {text}", name(file)))?;
    }
    intact(site, &images)
}
