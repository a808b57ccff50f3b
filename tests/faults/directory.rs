//! One directory of images, and whatever may happen in it: it always has one complete snapshot, and a tree that is gone
//! can be restored from it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;

use crate::aim::Aim;
use crate::kills::nothing_or_all as gone_or_at_work;
use crate::reaper::End;
use crate::refusals::{mount, unmount};
use crate::site::{Site, processes};
use crate::steps::{family, nothing_or_all, stepped};

/// Every file of a directory with its content, but for what a killed dump has left.
fn picture(dir: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, String> {
    let io = |e: std::io::Error| format!("{}: {e}", dir.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        if !entry.file_name().to_string_lossy().starts_with(".crtool-") {
            files.push((entry.path(), fs::read(entry.path()).map_err(io)?));
        }
    }
    files.sort();
    Ok(files)
}

/// Names of crtool's own in a directory.
fn left(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with('.'))
        .collect()
}

/// A dump into a directory that has a snapshot is killed, or comes to its end, at any moment before it moves it away.
pub fn killed_before_commit(site: &mut Site) -> Result<(), String> {
    let images = site.fresh("images")?;
    fs::write(images.join("notes"), "mine").map_err(|e| e.to_string())?;
    let mut aim = Aim::within(site.durations()?.0);
    site.dump(&["-R"], &images)?.succeeded("dump -R")?;
    let (mut kept, mut replaced) = (0, 0);
    for number in 0..Site::times(80) {
        if !left(&images).iter().all(|name| name == ".crtool-new") {
            site.dump(&["-R"], &images)?.succeeded("dump -R")?;
        }
        let before = picture(&images)?;
        let moment = site.moment(&aim);
        let signal = [Signal::SIGKILL, Signal::SIGTERM][number % 2];
        if signal == Signal::SIGTERM {
            // One that is ended before it has opened the directory leaves what the one before has left.
            let _ = fs::remove_dir_all(images.join(".crtool-new"));
        }
        let tool = site.begin_dump(&["-R"], &images)?;
        thread::sleep(moment);
        tool.signal(signal);
        let run = tool.end()?;
        let when = format!("dump {number}, {signal} after {moment:?} ({:?})", run.end);
        match run.end {
            End::Exited(0) => aim.too_late(run.took),
            _ => aim.hit(),
        }
        if run.end == End::Exited(0) {
            replaced += 1;
        } else if left(&images).iter().all(|name| name == ".crtool-new") {
            // Killed in the microseconds in which the last images come into place it may be the new one.
            if picture(&images)? == before {
                kept += 1;
            } else if run.end != End::Killed(libc::SIGKILL) {
                return Err(format!("{when}: what was there has changed"));
            }
        }
        if run.end == End::Exited(1) && !left(&images).is_empty() {
            return Err(format!("{when}: it left {:?}", left(&images)));
        }
        site.works().map_err(|text| format!("{when}: {text}"))?;
    }
    if kept < 10 || replaced < 3 {
        return Err(format!(
            "{kept} snapshots were kept and {replaced} replaced: the moments are badly chosen"
        ));
    }
    site.dump_and_kill(&images)?;
    site.restore(&images)?;
    if !left(&images).is_empty() || !images.join("notes").exists() {
        return Err(format!("left: {:?}", left(&images)));
    }
    site.finish()
}

/// Killed at each system call from when the old snapshot leaves its place on: the old one or the new one can be restored,
/// by whoever comes first.
pub fn killed_at_each_step_of_a_replacement(site: &mut Site) -> Result<(), String> {
    let tree = family()?;
    let images = site.fresh("images")?;
    let (mut gone, mut runs) = (0, 0);
    // All of them at first; where many calls do the same, some.
    let mut at = 1;
    loop {
        site.dump(&["-R"], &images)?.succeeded("dump -R")?;
        if !left(&images).is_empty() {
            return Err(format!("call {at}: a dump leaves {:?}", left(&images)));
        }
        let pid = site.pid.to_string();
        let from = images.join(".crtool-leaving");
        let run = site.begin_stepped(&from, at, &["dump", "-t", &pid], &images)?;
        let (ended, when) = stepped(run.end()?, at)?;
        if nothing_or_all(site, &tree).map_err(|text| format!("{when}: {text}"))? {
            gone += 1;
        } else {
            runs += 1;
            site.clear()?;
        }
        site.restore(&images).map_err(|text| format!("{when}, left {:?}: {text}", left(&images)))?;
        if ended || gone == 8 {
            break;
        }
        at += if gone > 0 { 1 } else { 1 + usize::try_from(site.random(4)).unwrap_or(0) };
    }
    if gone < 5 || runs < 20 {
        return Err(format!("{runs} trees ran on and {gone} were gone: the kills did not come at the end"));
    }
    site.finish()
}

/// Dumps, restores and kills in any order, on a file system that is often full. After each round a snapshot is there from
/// which the tree can be restored, if it is not at work.
pub fn whatever_happens(site: &mut Site) -> Result<(), String> {
    let (dump, restore) = site.durations()?;
    let longest = u64::try_from((dump + restore).as_micros()).unwrap_or(u64::MAX);
    let images = site.fresh("images")?;
    mount(&images, "size=8m")?;
    let filler = images.join("filler");
    site.dump(&["-R"], &images)?.succeeded("the first dump")?;
    let taken = picture(&images)?.iter().map(|(_, content)| content.len() as u64).sum::<u64>();
    let (mut full, mut killed, mut busy, mut back) = (0, 0, 0, 0);
    for round in 0..Site::times(40) {
        if site.random(3) == 0 {
            // Room for a part of another snapshot, or just enough.
            let room = site.random(taken + taken / 4);
            let file = File::create(&filler).map_err(|e| e.to_string())?;
            let free = (8u64 << 20).saturating_sub(taken + room);
            let _ = nix::fcntl::fallocate(
                &file,
                nix::fcntl::FallocateFlags::empty(),
                0,
                i64::try_from(free).unwrap_or(1),
            );
        }
        let pid = site.pid.to_string();
        let mut plan = Vec::new();
        for _ in 0..=site.random(3) {
            let words: &[&str] = match site.random(5) {
                0 => &["restore", "-d"],
                1 | 2 => &["dump", "-R", "-t", &pid],
                _ => &["dump", "-t", &pid],
            };
            let is_killed = site.random(3) == 0;
            let moment = Duration::from_micros(site.random(longest));
            let wait = Duration::from_micros(site.random(longest / 2));
            plan.push((words.to_vec(), is_killed.then_some(moment), wait));
        }
        let mut story: Vec<String> = plan.iter().map(|step| format!("{step:?}")).collect();
        let mut tools = Vec::new();
        for (number, (words, killed, wait)) in plan.iter().enumerate() {
            thread::sleep(*wait);
            tools.push((site.begin_beside(number, words, &images)?, *killed));
        }
        for (tool, when) in tools {
            if let Some(moment) = when {
                thread::sleep(moment);
                tool.signal(Signal::SIGKILL);
            }
            let run = tool.end()?;
            story.push(format!("{:?}: {}", run.end, run.said.trim()));
            killed += usize::from(run.end == End::Killed(libc::SIGKILL));
            full += usize::from(run.said.contains("No space left"));
            busy += usize::from(run.said.contains("is in use"));
            if run.said.contains("internal error") || run.end == End::Exited(70) {
                return Err(format!("round {round}: {story:#?}"));
            }
        }
        let _ = fs::remove_file(&filler);
        let told = |text: String| format!("round {round}: {text}; left {:?}; {story:#?}", left(&images));
        gone_or_at_work(site).map_err(told)?;
        if processes().is_empty() || site.random(2) == 0 {
            site.clear()?;
            site.restore(&images).map_err(told)?;
            back += 1;
        }
    }
    if full == 0 || killed == 0 || back == 0 {
        return Err(format!(
            "too little has happened: {full} full, {killed} killed, {busy} busy, {back} restored"
        ));
    }
    site.dump(&["-R"], &images)?.succeeded("the last dump")?;
    let names = left(&images);
    unmount(&images)?;
    if !names.is_empty() {
        return Err(format!("left: {names:?}"));
    }
    site.finish()
}
