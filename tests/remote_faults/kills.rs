//! `kill -9` of everyone who takes part in a migration, at random moments.

use std::{thread, time::Duration};

use crtool::remote::pb::snapshot_info::State;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::aim::Aim;
use crate::hosts::Host;
use crate::reaper::End;
use crate::site::{CACHE, LIMIT, PROXY, Site, Tool, Way};

/// Kills as often as are wanted take at most so many times as many attempts.
const PATIENCE: usize = 20;

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Dump,
    Proxy,
    Cache,
    Restore,
    Nobody,
}

/// One migration, and what happens to it.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub way: Way,
    pub victim: Victim,
    /// The restore is there before the dump, and waits.
    pub early: bool,
}

/// What became of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is where it was.
    Stayed,
    /// It is on the other host.
    Moved,
    /// The cache had the only copy, and was killed.
    LostWithCache,
}

pub fn dump(site: &mut Site) -> Result<(), String> {
    series(site, Plan { way: Way::Proxied, victim: Victim::Dump, early: false }, 20)
}

pub fn dump_direct(site: &mut Site) -> Result<(), String> {
    series(site, Plan { way: Way::Direct, victim: Victim::Dump, early: false }, 15)
}

pub fn proxy(site: &mut Site) -> Result<(), String> {
    series(site, Plan { way: Way::Proxied, victim: Victim::Proxy, early: false }, 20)
}

pub fn cache(site: &mut Site) -> Result<(), String> {
    series(site, Plan { way: Way::Proxied, victim: Victim::Cache, early: false }, 15)
}

pub fn cache_direct(site: &mut Site) -> Result<(), String> {
    series(site, Plan { way: Way::Direct, victim: Victim::Cache, early: false }, 10)
}

pub fn restore(site: &mut Site) -> Result<(), String> {
    series(site, Plan { way: Way::Proxied, victim: Victim::Restore, early: false }, 20)
}

pub fn early_restore(site: &mut Site) -> Result<(), String> {
    series(site, Plan { way: Way::Proxied, victim: Victim::Restore, early: true }, 10)
}

/// Everyone in turn, while a restore waits for what comes.
pub fn anyone(site: &mut Site) -> Result<(), String> {
    for victim in [Victim::Dump, Victim::Proxy, Victim::Cache] {
        series(site, Plan { way: Way::Proxied, victim, early: true }, 8)?;
    }
    Ok(())
}

/// Migrations to and fro, in each of which the victim is killed at another moment.
fn series(site: &mut Site, plan: Plan, times: usize) -> Result<(), String> {
    if site.members(site.at).is_empty() {
        site.start_tree(0)?;
    }
    let mut usual = Duration::ZERO;
    for number in 0..2 {
        let (dump, restore) = site.migrate(plan.way, &format!("probe {:?} {number}", plan.victim))?;
        usual = match (plan.victim, plan.early) {
            (Victim::Restore | Victim::Cache, true) => dump + restore,
            (Victim::Restore, false) => restore,
            _ => dump,
        };
    }
    let mut aim = Aim::within(usual);
    let (wanted, mut cut, mut outcomes) = (Site::times(times), 0, [0; 3]);
    for number in 0..wanted * PATIENCE {
        if cut == wanted {
            break;
        }
        // The end is where it gets interesting.
        let late = number % 3 == 0;
        let moment = if late { aim.later() } else { aim }.moment(|limit| site.random(limit));
        let name = format!("{:?} {number}", plan.victim);
        let (outcome, in_time) = one(site, plan, &name, moment).map_err(|text| {
            format!("{plan:?}, number {number}, killed after {moment:?} of {aim:?}: {text}")
        })?;
        // As fast as the machine is just now.
        match in_time {
            true => aim.hit(),
            false if late => {}
            false => aim.too_late(moment),
        }
        cut += usize::from(in_time);
        outcomes[outcome as usize] += 1;
        if outcome == Outcome::LostWithCache {
            site.start_tree(0)?;
        }
    }
    let [stayed, moved, lost] = outcomes;
    println!("{plan:?}: {cut} killed, {stayed} trees stayed, {moved} moved, {lost} were lost with the cache");
    if cut < wanted {
        return Err(format!("only {cut} were killed before their end: the moments are badly chosen"));
    }
    Ok(())
}

/// One migration in which the victim is killed so long after its start; afterwards the tree works in one place. Also
/// tells whether what it took part in had not ended before.
fn one(site: &mut Site, plan: Plan, name: &str, moment: Duration) -> Result<(Outcome, bool), String> {
    site.daemons(plan.way)?;
    let (from, to) = (site.at, site.at.other());
    let mut restore = if plan.early { Some(site.begin_restore(name)?) } else { None };
    let dump = site.begin_dump(plan.way, name)?;
    if plan.victim == Victim::Restore && !plan.early {
        dump.end()?.succeeded()?;
        restore = Some(site.begin_restore(name)?);
    }
    thread::sleep(moment);
    let part = match (&restore, plan.victim) {
        (Some(restore), Victim::Restore | Victim::Cache) => restore,
        _ => &dump,
    };
    let in_time = part.end_within(Duration::ZERO).is_none();
    match plan.victim {
        Victim::Dump | Victim::Restore => part.signal(Signal::SIGKILL),
        Victim::Proxy => kill_daemon(site.pid_of(from, PROXY)),
        Victim::Cache => kill_daemon(site.pid_of(to, CACHE)),
        Victim::Nobody => {}
    }
    let ended = dump.end()?;
    match plan.victim {
        Victim::Proxy => site.gone(from, PROXY)?,
        Victim::Cache => site.gone(to, CACHE)?,
        _ => {}
    }
    let killed = ended.end == End::Killed(libc::SIGKILL) && plan.victim == Victim::Dump;
    if !killed && !matches!(ended.end, End::Exited(0..=2)) {
        return Err(format!("the dump ended with {:?}: {}", ended.end, ended.said));
    }
    if let (Victim::Restore, Some(tool)) = (plan.victim, &restore) {
        let restored = tool.end()?;
        if !matches!(restored.end, End::Exited(0) | End::Killed(libc::SIGKILL)) {
            return Err(format!("the restore ended with {:?}: {}", restored.end, restored.said));
        }
        restore = None;
    }
    let outcome = settle(site, plan, name, restore, ended.end)?;
    expect(outcome, ended.end).map(|outcome| (outcome, in_time))
}

/// Whether images of a snapshot still come.
pub fn receiving_on(site: &Site, host: Host, name: &str) -> bool {
    site.snapshot(host, name).is_some_and(|snapshot| snapshot.state() == State::Receiving)
}

pub fn kill_daemon(pid: Option<i32>) {
    if let Some(pid) = pid {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// What the dump said when it ended is what became of the tree.
pub fn expect(outcome: Outcome, dump: End) -> Result<Outcome, String> {
    let stays = match dump {
        End::Exited(0 | 2) => Some(false),
        End::Exited(1) => Some(true),
        _ => None,
    };
    match stays {
        Some(stays) if stays != (outcome == Outcome::Stayed) => {
            Err(format!("the dump ended with {dump:?}, but {outcome:?}"))
        }
        _ => Ok(outcome),
    }
}

/// Does what an operator does after an accident, as the documentation says, and looks where the tree is then.
pub fn settle(
    site: &mut Site,
    plan: Plan,
    name: &str,
    waiting: Option<Tool>,
    dump: End,
) -> Result<Outcome, String> {
    let (from, to) = (site.at, site.at.other());
    let mut waiting = waiting;
    let begin = std::time::Instant::now();
    loop {
        let snapshot = site.snapshot(to, name);
        let state = snapshot.as_ref().map(|s| s.state());
        if begin.elapsed() > LIMIT {
            return Err(format!("the snapshot stays as it is: {snapshot:?}"));
        }
        if let Some(tool) = &waiting
            && let Some(ended) = tool.end_within(Duration::ZERO)
        {
            waiting = None;
            match ended.end {
                End::Exited(0) => {
                    site.arrived().map_err(|e| format!("after a restore that waited: {e}"))?;
                    return Ok(Outcome::Moved);
                }
                End::Exited(1) if !ended.said.trim().is_empty() => {}
                end => return Err(format!("the waiting restore ended with {end:?}: {}", ended.said)),
            }
        }
        match state {
            Some(State::Ready) if waiting.is_none() => {
                // Whoever says that it can be restored says that the source is gone, or as good as gone.
                let alive: Vec<_> = site.members(from).into_iter().filter(|m| !m.dying).collect();
                if !alive.is_empty() {
                    return Err(format!("it can be restored, and the source is not gone: {alive:?}"));
                }
                site.begin_restore(name)?.end()?.succeeded()?;
                site.arrived()?;
                return Ok(Outcome::Moved);
            }
            Some(State::InDoubt)
                if snapshot.as_ref().is_some_and(|s| s.text.contains("while it let the tree go")) =>
            {
                // Whoever had been let go was killed at once, and may have counted before.
                site.leaves(to)?;
                site.run(to, &["image-cache", "drop", name])?.succeeded()?;
                return gone_with_cache(site);
            }
            Some(State::InDoubt) if dump == End::Exited(0) => {
                return Err(format!("the dump ended well, and the cache was not told: {snapshot:?}"));
            }
            // What it had to say, or its dump, lies in its work dir.
            Some(State::InDoubt)
                if plan.way == Way::Proxied
                    && site.pid_of(from, PROXY).is_none()
                    && site.has_last_word(from)? =>
            {
                site.daemons(plan.way)?;
            }
            Some(State::InDoubt) if plan.way == Way::Direct || site.pid_of(from, PROXY).is_none() => {
                // Nobody is left who could tell the cache.
                let word = if site.runs_on(from)? { "drop" } else { "release" };
                site.run(to, &["image-cache", word, name])?.succeeded()?;
            }
            Some(State::Restored) => {
                if let Some(tool) = waiting.take() {
                    tool.end()?.succeeded()?;
                }
                site.arrived()?;
                return Ok(Outcome::Moved);
            }
            None | Some(State::Failed | State::Dropped)
                if site.pid_of(to, CACHE).is_some() || dump != End::Exited(0) =>
            {
                if let Some(tool) = waiting.take()
                    && !gives_up(&tool)?
                {
                    site.arrived()?;
                    return Ok(Outcome::Moved);
                }
                return stayed(site, dump);
            }
            None => {
                if let Some(tool) = waiting.take()
                    && !gives_up(&tool)?
                {
                    site.arrived()?;
                    return Ok(Outcome::Moved);
                }
                return gone_with_cache(site);
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
        site.daemons_live()?;
    }
}

/// A restore that waits for what does not come hears of it, or is told to end. If it had all of the tree when the
/// cache died, it goes on: `false`.
fn gives_up(tool: &Tool) -> Result<bool, String> {
    let ended = match tool.end_within(Duration::from_millis(50)) {
        Some(ended) => ended,
        None => {
            tool.signal(Signal::SIGTERM);
            tool.end()?
        }
    };
    match ended.end {
        End::Exited(0) => Ok(false),
        End::Exited(1) if !ended.said.trim().is_empty() => Ok(true),
        end => Err(format!("a restore of what does not come ended with {end:?}: {}", ended.said)),
    }
}

/// Nothing came of the migration.
fn stayed(site: &mut Site, dump: End) -> Result<Outcome, String> {
    // The dump may have killed the tree when the cache had said that it has everything, and died.
    if dump != End::Exited(1) && site.pid_of(site.at.other(), CACHE).is_none() && !site.runs_on(site.at)? {
        return gone_with_cache(site);
    }
    site.works()?;
    Ok(Outcome::Stayed)
}

/// The cache was killed when it had the tree: it may have been restored, or is lost.
fn gone_with_cache(site: &mut Site) -> Result<Outcome, String> {
    site.leaves(site.at)?;
    let to = site.at.other();
    if site.runs_on(to)? {
        site.arrived()?;
        return Ok(Outcome::Moved);
    }
    Ok(Outcome::LostWithCache)
}
