//! `kill -9` of a restore at the calls by which it lets its tree go. What the tree has to do is done once in the end:
//! not twice since it was restored again after it had run, and not never since it was taken for running.

use std::{
    fs::{self, File},
    thread,
    time::{Duration, Instant},
};

use crtool::remote::pb::snapshot_info::State;

use crate::hosts::Host;
use crate::site::{LIMIT, Site, Way};
use crate::steps::Steps;
use crate::target::{self, GO, LINES};
use crate::tree::kill_dead;

/// Who has been let go for a moment, until it is killed, has written its line by then.
const MOMENT: Duration = Duration::from_millis(300);
/// Steps at which a restore is killed, besides those at which it deals with the tree.
const OTHERS: usize = 12;

/// A program that writes a line and ends.
pub fn ends(site: &mut Site) -> Result<(), String> {
    series(site, target::ONCE)
}

/// The same, and its root ends at once.
pub fn root_leaves(site: &mut Site) -> Result<(), String> {
    series(site, target::LEAVES)
}

/// Starts a tree, and dumps it into the cache of the other host, whose name for it is `name`.
fn start(site: &mut Site, role: &str) -> Result<(), String> {
    site.start_role(role, 0, 0)?;
    site.daemons(Way::Proxied)?;
    site.begin_dump(Way::Proxied, NAME)?.end()?.succeeded()?;
    site.leaves(site.at)?;
    File::create(site.dir.join(GO)).map_err(|e| e.to_string())?;
    Ok(())
}

const NAME: &str = "once";

/// Restores without an accident: how many beginnings and ends of sendmsg(2) come before it tells that it starts.
fn sends(site: &mut Site, role: &str) -> Result<usize, String> {
    start(site, role)?;
    let steps = Steps::after_sends(0, 0, &site.dir);
    let tool = site.begin_stepped(site.at.other(), &Site::restore_words(NAME), Some(&steps))?;
    steps.end(&tool, None)?.succeeded()?;
    done(site)?;
    let sends = steps.made()?.iter().filter(|&&call| call == libc::SYS_sendmsg).count();
    // It starts, and it runs.
    sends.checked_sub(4).ok_or_else(|| format!("only {sends} packets"))
}

fn series(site: &mut Site, role: &str) -> Result<(), String> {
    let sends = sends(site, role)?;
    start(site, role)?;
    let steps = Steps::after_sends(sends, 0, &site.dir);
    let tool = site.begin_stepped(site.at.other(), &Site::restore_words(NAME), Some(&steps))?;
    steps.end(&tool, None)?.succeeded()?;
    done(site)?;
    let made = steps.made()?;
    // The tree is touched by these; among the others some are chosen.
    let touches = [libc::SYS_ptrace, libc::SYS_ftruncate, libc::SYS_kill, libc::SYS_sendmsg];
    let stride = made.len().div_ceil(Site::times(OTHERS)).max(1);
    let chosen = (1..=made.len()).filter(|at| touches.contains(&made[at - 1]) || at % stride == 0);
    let mut ways = [0; 3];
    for at in chosen {
        start(site, role)?;
        let way = killed(site, sends, at).map_err(|e| format!("{role}, step {at} of {made:?}: {e}"))?;
        ways[way as usize] += 1;
    }
    let [again, ran, doubt] = ways;
    println!("{role}: {} steps; {again} restored again, {ran} had run, {doubt} in doubt", made.len());
    if again == 0 || ran == 0 {
        return Err("not before and after it was let go".into());
    }
    // Of a restore that was killed as it wrote its statistics.
    let _ = fs::remove_file(site.work(site.at.other()).join(".stats-restore.new"));
    site.finish()
}

/// What the cache says of a tree whose restore was killed.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    Again,
    Ran,
    Doubt,
}

/// Restores with an accident, and does what the documentation says.
fn killed(site: &mut Site, sends: usize, at: usize) -> Result<Outcome, String> {
    let host = site.at.other();
    let steps = Steps::after_sends(sends, at, &site.dir);
    let tool = site.begin_stepped(host, &Site::restore_words(NAME), Some(&steps))?;
    let ended = steps.end(&tool, None)?;
    let begin = Instant::now();
    let way = loop {
        match site.snapshot(host, NAME).map(|s| s.state()) {
            Some(State::Ready) => break Outcome::Again,
            Some(State::Restored) => break Outcome::Ran,
            Some(State::InDoubt) => break Outcome::Doubt,
            _ if begin.elapsed() > LIMIT => {
                return Err(format!("{:?}: {ended:?}", site.snapshot(host, NAME)));
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
    };
    let restore = |site: &mut Site| site.begin_restore(NAME)?.end()?.succeeded().map(drop);
    match way {
        Outcome::Ran => {}
        Outcome::Again if lines(site) > 0 => {
            return Err(format!("it has run, and can be restored: {ended:?}"));
        }
        Outcome::Again => restore(site)?,
        Outcome::Doubt => {
            thread::sleep(MOMENT);
            let ran = lines(site) > 0 || !site.members(host).is_empty();
            let word = if ran { "drop" } else { "release" };
            site.run(host, &["image-cache", word, NAME])?.succeeded()?;
            if !ran {
                restore(site)?;
            }
        }
    }
    done(site).map_err(|e| format!("{way:?}: {e}: {ended:?}"))?;
    Ok(way)
}

/// How often it has done its work.
fn lines(site: &Site) -> usize {
    fs::read_to_string(site.dir.join(LINES)).unwrap_or_default().lines().count()
}

/// The tree does its work, once, and is ended.
fn done(site: &mut Site) -> Result<(), String> {
    let begin = Instant::now();
    while lines(site) == 0 {
        if begin.elapsed() > LIMIT {
            return Err("its work is not done".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    for host in [Host::Left, Host::Right] {
        for member in site.members(host) {
            kill_dead(member.pid);
        }
        site.leaves(host)?;
    }
    site.forget_tree();
    match lines(site) {
        1 => Ok(()),
        lines => Err(format!("its work is done {lines} times")),
    }
}
