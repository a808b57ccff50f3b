//! `kill -9` of crtool at random moments.

use std::{fs, path::Path, thread, time::Duration};

use nix::sys::signal::Signal;

use crate::reaper::End;
use crate::site::{Site, processes};

/// Whether the snapshot in a directory is complete.
fn complete(images: &Path) -> bool {
    images.join("inventory.img").exists()
}

/// A dump that would let the tree run is killed: the tree runs, and still can be dumped.
pub fn dump_of_running(site: &mut Site) -> Result<(), String> {
    let (dump, _) = site.durations()?;
    let before = site.picture();
    let mut cut = 0;
    for number in 0..Site::times(150) {
        let images = site.fresh("images")?;
        let moment = site.moment(dump + dump / 10);
        let tool = site.begin_dump(&["-R"], &images)?;
        thread::sleep(moment);
        tool.signal(Signal::SIGKILL);
        let end = tool.end()?.end;
        let when = format!("dump {number}, killed after {moment:?} of {dump:?} ({end:?})");
        site.works().map_err(|text| format!("{when}: {text}"))?;
        if end == End::Killed(libc::SIGKILL) {
            cut += 1;
            if number % 10 == 0 && !complete(&images) {
                let run = site.run(&["restore", "-d"], &images)?;
                run.failed_cleanly().map_err(|text| format!("{when}, restore of what is there: {text}"))?;
            }
        }
    }
    if cut < 50 {
        return Err(format!("only {cut} dumps were killed before their end: the moments are badly chosen"));
    }
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    site.restore(&images)?;
    // Also what killed dumps left in the tree, if anything, is gone now.
    site.same(&before)?;
    site.finish()
}

/// A dump that is to end the tree is killed: the tree runs, or the images are complete.
pub fn dump_that_kills(site: &mut Site) -> Result<(), String> {
    let (dump, _) = site.durations()?;
    for number in 0..Site::times(60) {
        let images = site.fresh("images")?;
        // The end is where it gets interesting.
        let moment = if number % 2 == 0 { dump / 2 + site.moment(dump) } else { site.moment(dump) };
        let tool = site.begin_dump(&[], &images)?;
        thread::sleep(moment);
        tool.signal(Signal::SIGKILL);
        let end = tool.end()?.end;
        let when = format!("dump {number}, killed after {moment:?} of {dump:?} ({end:?})");
        if complete(&images) {
            // What had not been killed yet is the caller's to kill.
            site.clear()?;
            site.restore(&images).map_err(|text| format!("{when}: {text}"))?;
        } else {
            site.works().map_err(|text| format!("{when}: {text}"))?;
        }
    }
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    site.restore(&images)?;
    site.finish()
}

/// A restore is killed: the whole tree runs, or nothing is left.
pub fn restore(site: &mut Site) -> Result<(), String> {
    let (_, restore) = site.durations()?;
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    let (mut gone, mut runs) = (0, 0);
    for number in 0..Site::times(80) {
        let moment = site.moment(restore + restore / 10);
        let tool = site.begin(&["restore", "-d"], &images)?;
        thread::sleep(moment);
        tool.signal(Signal::SIGKILL);
        let end = tool.end()?.end;
        let when = format!("restore {number}, killed after {moment:?} of {restore:?} ({end:?})");
        if let Err(text) = nothing_or_all(site) {
            return Err(format!("{when}: {text}"));
        }
        if processes().is_empty() {
            gone += 1
        } else {
            runs += 1
        }
        site.clear()?;
    }
    if gone < 20 {
        return Err(format!(
            "{gone} restores left nothing, {runs} a whole tree: the moments are badly chosen"
        ));
    }
    site.restore(&images)?;
    site.finish()
}

/// Either nothing of the tree remains, or all of it works.
fn nothing_or_all(site: &Site) -> Result<(), String> {
    // Those that die with their tracer need a moment for it.
    for _ in 0..200 {
        if processes().is_empty() {
            return Ok(());
        }
        if fs::metadata(format!("/proc/{}", site.pid)).is_ok() && site_works_soon(site) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    site.works().map_err(|text| format!("neither gone nor at work: {text}"))
}

/// A look without patience: does the first thread count at all?
fn site_works_soon(site: &Site) -> bool {
    let read = || fs::read(site.dir.join("progress")).unwrap_or_default();
    let before = read();
    thread::sleep(Duration::from_millis(20));
    read() != before && site.works().is_ok()
}
