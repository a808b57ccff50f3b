//! `kill -9` of crtool at random moments.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::aim::Aim;
use crate::reaper::End;
use crate::site::{LIMIT, Site, processes};

/// Whether the snapshot in a directory is complete.
fn complete(images: &Path) -> bool {
    images.join("inventory.img").exists()
}

/// Kills as often as are wanted take at most so many times as many attempts.
const PATIENCE: usize = 20;

/// A dump that would let the tree run is killed: the tree runs, and still can be dumped.
pub fn dump_of_running(site: &mut Site) -> Result<(), String> {
    let wanted = Site::times(100);
    let mut aim = Aim::within(site.durations()?.0);
    let before = site.picture()?;
    let mut cut = 0;
    for number in 0..wanted * PATIENCE {
        if cut == wanted {
            break;
        }
        let images = site.fresh("images")?;
        let moment = site.moment(&aim);
        let tool = site.begin_dump(&["-R"], &images)?;
        thread::sleep(moment);
        tool.signal(Signal::SIGKILL);
        let run = tool.end()?;
        let when = format!("dump {number}, killed after {moment:?} of {aim:?} ({:?})", run.end);
        site.works().map_err(|text| format!("{when}: {text}"))?;
        if run.end != End::Killed(libc::SIGKILL) {
            run.succeeded(&when)?;
            aim.too_late(run.took);
            continue;
        }
        aim.hit();
        cut += 1;
        if cut % 7 == 0 && !complete(&images) {
            let run = site.run(&["restore", "-d"], &images)?;
            run.failed_cleanly().map_err(|text| format!("{when}, restore of what is there: {text}"))?;
        }
    }
    if cut < wanted {
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
    let mut aim = Aim::within(site.durations()?.0);
    for number in 0..Site::times(60) {
        let images = site.fresh("images")?;
        // The end is where it gets interesting.
        let moment = if number % 2 == 0 { aim.later() } else { aim };
        let moment = site.moment(&moment);
        let tool = site.begin_dump(&[], &images)?;
        thread::sleep(moment);
        tool.signal(Signal::SIGKILL);
        let run = tool.end()?;
        let when = format!("dump {number}, killed after {moment:?} of {aim:?} ({:?})", run.end);
        if run.end == End::Killed(libc::SIGKILL) {
            aim.hit();
        } else {
            run.succeeded(&when)?;
            aim.too_late(run.took);
        }
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
    let wanted = Site::times(50);
    let mut aim = Aim::within(site.durations()?.1);
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    let mut gone = 0;
    for number in 0..wanted * PATIENCE {
        if gone == wanted {
            break;
        }
        let moment = site.moment(&aim);
        let tool = site.begin(&["restore", "-d"], &images)?;
        thread::sleep(moment);
        tool.signal(Signal::SIGKILL);
        let run = tool.end()?;
        let when = format!("restore {number}, killed after {moment:?} of {aim:?} ({:?})", run.end);
        if let Err(text) = nothing_or_all(site) {
            return Err(format!("{when}: {text}"));
        }
        if run.end == End::Killed(libc::SIGKILL) {
            aim.hit();
            gone += usize::from(processes().is_empty());
        } else {
            run.succeeded(&when)?;
            aim.too_late(run.took);
        }
        site.clear()?;
    }
    if gone < wanted {
        return Err(format!("only {gone} killed restores left nothing: the moments are badly chosen"));
    }
    site.restore(&images)?;
    site.finish()
}

/// Either nothing of the tree remains, or all of it works.
pub fn nothing_or_all(site: &Site) -> Result<(), String> {
    // Those that die with their tracer need a moment for it, and so do those that go on without one.
    let begin = Instant::now();
    loop {
        if processes().is_empty() {
            return Ok(());
        }
        let said = if site.counts() { site.works() } else { Err("it does not count".into()) };
        match said {
            Ok(()) => return Ok(()),
            Err(text) if begin.elapsed() > LIMIT => {
                return Err(format!("neither gone nor at work: {text}"));
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}
