//! `kill -9` of everyone who takes part in a migration, at each step of what they say to each other: at the calls by
//! which a tool speaks with its daemon or kills the tree, and at the frames that go from host to host.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use crtool::remote::wire::Kind;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::cuts::{KINDS, Road};
use crate::forwarder::{Fault, Frame, Spot};
use crate::kills::{Outcome, Plan, Victim, expect, settle};
use crate::reaper::End;
use crate::site::{CACHE, Ended, LIMIT, PROXY, Site, Tool, Way};
use crate::stepper::Stepper;
use crate::tree::kill_dead;

/// What the stepper is to do, in its environment: number of the step, whom to kill there, and directory.
pub const STEPPER: &str = "REMOTE_STEPPER";

/// The calls by which a tool speaks to its daemon or the cache, and by which it kills. How often it listens differs
/// from run to run.
const CALLS: [i64; 6] = [
    libc::SYS_connect,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_splice,
    libc::SYS_kill,
    libc::SYS_pidfd_send_signal,
];

/// What a stepper is to do.
#[derive(Debug)]
pub struct Steps {
    /// Kills when so many steps are done: beginnings and ends of calls. 0: it only counts.
    at: usize,
    /// The tool itself is killed; else somebody whom the stepper does not see.
    own: bool,
    /// After so many beginnings and ends of sendmsg(2) every call is a step; else those of [`CALLS`].
    all_after: Option<usize>,
    /// Seen by both hosts.
    dir: PathBuf,
}

/// The stepper waits there for the end of somebody else.
const THERE: &str = "steps.there";
/// It can go on.
const DONE: &str = "steps.done";
/// How many steps there were, and whether somebody was killed.
const TOLD: &str = "steps.told";

/// The numbers of the calls that were steps.
const MADE: &str = "steps.made";

impl Steps {
    /// Kills the tool itself, at one of all calls after so many beginnings and ends of sendmsg(2).
    pub fn after_sends(sends: usize, at: usize, dir: &Path) -> Self {
        Self { all_after: Some(sends), ..Self::new(at, true, dir) }
    }

    fn new(at: usize, own: bool, dir: &Path) -> Self {
        for name in [THERE, DONE, TOLD] {
            let _ = fs::remove_file(dir.join(name));
        }
        Self { at, own, all_after: None, dir: dir.to_owned() }
    }

    pub fn order(&self, command: &mut Command) {
        let (own, all) =
            (u8::from(self.own), self.all_after.map_or(String::from("-"), |sends| sends.to_string()));
        command.env(STEPPER, format!("{} {own} {all} {}", self.at, self.dir.display()));
    }

    /// Waits for the end of the tool, and kills somebody else when it is there.
    pub fn end(&self, tool: &Tool, victim: Option<i32>) -> Result<Ended, String> {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            if let Some(ended) = tool.end_within(Duration::from_millis(1)) {
                return Ok(ended);
            }
            if self.dir.join(THERE).exists() && !self.dir.join(DONE).exists() {
                kill_dead(victim.ok_or("there is nobody to be killed")?);
                fs::write(self.dir.join(DONE), "").map_err(|e| format!("tell the stepper: {e}"))?;
            }
        }
        tool.end()
    }

    /// The numbers of the calls that were steps, of a tool that was not killed.
    pub fn made(&self) -> Result<Vec<i64>, String> {
        let text = fs::read_to_string(self.dir.join(MADE)).map_err(|e| format!("calls: {e}"))?;
        Ok(text.split_whitespace().filter_map(|word| word.parse().ok()).collect())
    }

    /// How many steps there were, and whether somebody was killed.
    pub fn told(&self) -> Result<(usize, bool), String> {
        let text =
            fs::read_to_string(self.dir.join(TOLD)).map_err(|e| format!("what the stepper tells: {e}"))?;
        let mut words = text.split(' ');
        let steps = words.next().and_then(|word| word.parse().ok()).ok_or("the stepper tells nonsense")?;
        Ok((steps, words.next() == Some("killed")))
    }
}

/// The stepper: runs the command of its arguments, and ends as that does.
pub fn main(order: &str) -> ExitCode {
    let mut words = order.splitn(4, ' ');
    let at: usize = words.next().and_then(|word| word.parse().ok()).expect(STEPPER);
    let own = words.next() == Some("1");
    let all_after: Option<usize> = words.next().and_then(|word| word.parse().ok());
    let dir = Path::new(words.next().expect(STEPPER));
    let mut args = env::args_os().skip(1);
    let mut command = Command::new(args.next().expect("a tool"));
    let mut tool = Stepper::start(command.args(args).env_remove(STEPPER));
    let call = format!("/proc/{}/syscall", tool.pid());
    let tell = |steps: usize, what: &str| fs::write(dir.join(TOLD), format!("{steps} {what}")).expect("tell");
    let (mut steps, mut what) = (0, "not");
    let mut sends = 0;
    let mut calls = String::new();
    loop {
        if let Some(status) = tool.step() {
            tell(steps, what);
            fs::write(dir.join(MADE), calls).expect("tell");
            return ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX));
        }
        let text = fs::read_to_string(&call).unwrap_or_default();
        let number = text.split(' ').next().and_then(|word| word.parse().ok());
        let Some(number): Option<i64> = number else { continue };
        sends += usize::from(number == libc::SYS_sendmsg);
        let counts = match all_after {
            None => CALLS.contains(&number),
            Some(after) => sends > after,
        };
        if !counts {
            continue;
        }
        calls += &format!("{number} ");
        steps += 1;
        if steps != at {
            continue;
        }
        what = "killed";
        if own {
            tool.kill();
            tell(steps, what);
            kill(Pid::this(), Signal::SIGKILL).expect("end like the tool");
        }
        fs::write(dir.join(THERE), "").expect("say that it is there");
        while !dir.join(DONE).exists() {
            thread::sleep(Duration::from_micros(200));
        }
    }
}

/// The dump, its proxy and the cache, at the steps of a dump.
pub fn dump(site: &mut Site) -> Result<(), String> {
    for victim in [Victim::Dump, Victim::Proxy, Victim::Cache] {
        series(site, Plan { way: Way::Proxied, victim, early: false }, false)?;
    }
    Ok(())
}

pub fn dump_direct(site: &mut Site) -> Result<(), String> {
    for victim in [Victim::Dump, Victim::Cache] {
        series(site, Plan { way: Way::Direct, victim, early: false }, false)?;
    }
    Ok(())
}

/// The restore and its cache, at the steps of a restore.
pub fn restore(site: &mut Site) -> Result<(), String> {
    for victim in [Victim::Restore, Victim::Cache] {
        series(site, Plan { way: Way::Proxied, victim, early: false }, true)?;
    }
    Ok(())
}

/// Last steps that are all tried: there lies the point of no return.
const LAST: usize = 10;

/// Steps out of so many, the last ones and some of the others; all if there is much time.
fn some(steps: usize) -> Vec<usize> {
    let others = steps.saturating_sub(LAST);
    let stride = others.div_ceil(Site::times(10)).max(1);
    (1..=others).step_by(stride).chain(others + 1..=steps).collect()
}

/// Migrations in each of which the victim is killed at another step of the dump or the restore.
fn series(site: &mut Site, plan: Plan, restore: bool) -> Result<(), String> {
    if site.members(site.at).is_empty() {
        site.start_tree(0)?;
    }
    // Once all the daemons have been used.
    for number in 0..2 {
        site.migrate(plan.way, &format!("{:?} {number}", plan.victim))?;
    }
    let counted = Plan { victim: Victim::Nobody, ..plan };
    let (_, steps, _) = one(site, counted, restore, 0, &format!("count {:?}", plan.victim))?;
    let chosen = some(steps);
    let (mut kills, mut outcomes) = (0, [0; 3]);
    for &at in &chosen {
        let name = format!("{:?} at {at}", plan.victim);
        let (outcome, _, killed) = one(site, plan, restore, at, &name)
            .map_err(|text| format!("{plan:?}, step {at} of {steps}, restore {restore}: {text}"))?;
        kills += usize::from(killed);
        outcomes[outcome as usize] += 1;
        if outcome == Outcome::LostWithCache {
            site.start_tree(0)?;
        }
    }
    let [stayed, moved, lost] = outcomes;
    let of = if restore { "restore" } else { "dump" };
    println!(
        "{:?} {:?} at {of}: {steps} steps, {kills} killed, {stayed} trees stayed, {moved} moved, {lost} were lost with the cache",
        plan.way, plan.victim
    );
    if kills * 2 < chosen.len() {
        Err(format!("only {kills} of {} were killed", chosen.len()))
    } else {
        Ok(())
    }
}

/// One migration; what became of the tree, how many steps there were, and whether somebody was killed.
fn one(
    site: &mut Site,
    plan: Plan,
    restore: bool,
    at: usize,
    name: &str,
) -> Result<(Outcome, usize, bool), String> {
    site.daemons(plan.way)?;
    let (from, to) = (site.at, site.at.other());
    let daemon = match plan.victim {
        Victim::Proxy => site.pid_of(from, PROXY),
        Victim::Cache => site.pid_of(to, CACHE),
        _ => None,
    };
    let steps = Steps::new(at, daemon.is_none(), &site.dir);
    let words = site.dump_words(plan.way, name);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut restored = None;
    let dump = if restore {
        let dump = site.begin(from, &words)?.end()?.succeeded()?;
        let tool = site.begin_stepped(to, &Site::restore_words(name), Some(&steps))?;
        restored = Some(steps.end(&tool, daemon)?);
        dump
    } else {
        steps.end(&site.begin_stepped(from, &words, Some(&steps))?, daemon)?
    };
    let stepped = restored.as_ref().unwrap_or(&dump);
    let (count, killed) = steps.told().map_err(|e| format!("{e}: {stepped:?}"))?;
    let expected = match stepped.end {
        End::Killed(libc::SIGKILL) => killed && daemon.is_none(),
        End::Exited(0) => true,
        End::Exited(1 | 2) => killed && daemon.is_some() && !stepped.said.trim().is_empty(),
        _ => false,
    };
    if !expected {
        return Err(format!("it ended with {:?}: {}", stepped.end, stepped.said));
    }
    if killed {
        match plan.victim {
            Victim::Proxy => site.gone(from, PROXY)?,
            Victim::Cache => site.gone(to, CACHE)?,
            _ => {}
        }
    }
    let outcome = settle(site, plan, name, None, dump.end).map_err(|e| format!("{e}\n{stepped:?}"))?;
    let outcome = expect(outcome, dump.end)?;
    match &restored {
        // Without a cache it is there, or lost, as the restore says.
        Some(ended) if killed && plan.victim == Victim::Cache => {
            let must = if ended.end == End::Exited(0) { Outcome::Moved } else { Outcome::LostWithCache };
            if outcome != must {
                return Err(format!("the tree {outcome:?}, and the restore: {ended:?}"));
            }
        }
        Some(ended) if outcome != Outcome::Moved => return Err(format!("the tree {outcome:?}: {ended:?}")),
        _ => {}
    }
    Ok((outcome, count, killed))
}

/// The dump, the proxy and the cache, at the first frame of each kind, just before or just after it goes on its way.
pub fn kinds(site: &mut Site) -> Result<(), String> {
    let victims: [(Way, &[Victim]); 2] = [
        (Way::Proxied, &[Victim::Dump, Victim::Proxy, Victim::Cache]),
        (Way::Direct, &[Victim::Dump, Victim::Cache]),
    ];
    for (way, victims) in victims {
        let road = Road::open(site, way)?;
        for &victim in victims {
            let (mut kills, mut outcomes) = (0, [0; 3]);
            for (number, (from_source, kind, _)) in KINDS.into_iter().enumerate() {
                // The greeting of a proxy comes before any dump, and the last news after it.
                if kind == Kind::Hello && way == Way::Proxied || kind == Kind::Restored {
                    continue;
                }
                for turn in 0..Site::times(1).min(2) {
                    let after = (number + turn) % 2 == 0;
                    let name = format!("{way:?} {victim:?} {kind:?} {from_source} {after}");
                    let plan = Plan { way, victim, early: false };
                    let (outcome, killed) = at_frame(&road, site, plan, (from_source, kind, after), &name)
                        .map_err(|e| format!("{name}: {e}"))?;
                    kills += usize::from(killed);
                    outcomes[outcome as usize] += 1;
                    if outcome == Outcome::LostWithCache {
                        site.start_tree(0)?;
                    }
                }
            }
            let [stayed, moved, lost] = outcomes;
            println!(
                "{way:?} {victim:?}: {kills} killed, {stayed} trees stayed, {moved} moved, {lost} were lost with the cache"
            );
        }
        site.finish()?;
    }
    Ok(())
}

fn at_frame(
    road: &Road,
    site: &mut Site,
    plan: Plan,
    (from_source, kind, after): (bool, Kind, bool),
    name: &str,
) -> Result<(Outcome, bool), String> {
    site.daemons(plan.way)?;
    let (from, to) = (site.at, site.at.other());
    let forwarder = road.at(from);
    let daemon = match plan.victim {
        Victim::Proxy => site.pid_of(from, PROXY),
        Victim::Cache => site.pid_of(to, CACHE),
        _ => None,
    };
    forwarder.arm(Some(Spot { from_source, frame: Frame::First(kind), fault: Fault::Kill { after } }));
    let tool = site.begin_dump(plan.way, name)?;
    forwarder.aim_at(daemon.unwrap_or(tool.pid));
    let dump = tool.end()?;
    let killed = forwarder.disarm().is_some();
    let itself = killed && plan.victim == Victim::Dump;
    if !itself && !matches!(dump.end, End::Exited(0..=2)) {
        return Err(format!("the dump ended with {:?}: {}", dump.end, dump.said));
    }
    if killed {
        match plan.victim {
            Victim::Proxy => site.gone(from, PROXY)?,
            Victim::Cache => site.gone(to, CACHE)?,
            _ => {}
        }
    }
    let outcome = settle(site, plan, name, None, dump.end).map_err(|e| format!("{e}\n{dump:?}"))?;
    Ok((expect(outcome, dump.end)?, killed))
}
