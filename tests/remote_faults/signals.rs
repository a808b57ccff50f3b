//! A tree that was stopped for a hand-over and goes on here after all is as it was frozen: no handler has run, nobody was told of
//! a stop, who was stopped stays stopped, and what waited waits.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use crtool::remote::wire::Kind;
use nix::{
    sys::{
        signal::{SigSet, Signal, kill, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::forwarder::{Fault, Forwarder, Frame, Spot};
use crate::reaper::End;
use crate::run_first::{begin, restore_on};
use crate::site::{CACHE, LIMIT, Site, Tool, Way};
use crate::sys;
use crate::target::{GO, ROLE};
use crate::tree::kill_dead;

/// Its root, and its children.
pub const ROOT: &str = "signals";
const CHILDREN: [&str; 3] = ["signals.cont", "signals.tstp", "signals.stopped"];
/// The root writes how often it has looked around, and what it has found.
const TURNS: &str = "turns";
const NOTICED: &str = "noticed";

pub fn main(role: &str, dir: &Path) -> ExitCode {
    if role == ROOT { root(dir) } else { child(role, dir) }
}

fn root(dir: &Path) -> ExitCode {
    nix::unistd::setsid().expect("new session");
    sys::count_signals();
    for role in CHILDREN {
        let mut command = Command::new(env::current_exe().expect("own path"));
        command.env(ROLE, role).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        #[allow(clippy::zombie_processes)] // it is killed with this process
        let child = command.spawn().expect("start a child");
        while role != CHILDREN[2] && !dir.join(role).exists() {
            thread::sleep(Duration::from_millis(1));
        }
        if role == CHILDREN[2] {
            let pid = Pid::from_raw(child.id().cast_signed());
            let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("wait for its stop");
            assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
        }
    }
    // What it takes to get there does not count.
    thread::sleep(Duration::from_millis(20));
    let _ = sys::counted();
    let any = || waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED | WaitPidFlag::WCONTINUED));
    File::create(dir.join("ready")).expect("say that it is ready");
    for turn in 1u64.. {
        let seen = format!("{:?} {:?}", sys::counted(), any());
        if seen != "[0, 0] Ok(StillAlive)" {
            fs::write(dir.join(NOTICED), &seen).expect("say what it has noticed");
        }
        fs::write(dir.join(TURNS), turn.to_string()).expect("say that it runs");
        thread::sleep(Duration::from_millis(1));
    }
    ExitCode::SUCCESS
}

/// One for which signals wait, sent to the process and to its thread, or one that is stopped.
fn child(role: &str, dir: &Path) -> ExitCode {
    let signal = match role {
        "signals.cont" => Signal::SIGCONT,
        "signals.tstp" => Signal::SIGTSTP,
        _ => {
            raise(Signal::SIGSTOP).expect("stop");
            fs::write(dir.join(role), "it goes on").expect("say so");
            thread::sleep(Duration::from_secs(3600));
            return ExitCode::SUCCESS;
        }
    };
    [signal].into_iter().collect::<SigSet>().thread_block().expect("block it");
    kill(nix::unistd::getpid(), signal).expect("a signal to the process");
    raise(signal).expect("a signal to the thread");
    File::create(dir.join(role)).expect("say that it is ready");
    while !dir.join(GO).exists() {
        thread::sleep(Duration::from_millis(1));
    }
    let waited = [sys::take(signal), sys::take(signal), sys::take(signal)];
    fs::write(dir.join(format!("{role}.end")), format!("{waited:?}")).expect("say what waited");
    thread::sleep(Duration::from_secs(3600));
    ExitCode::SUCCESS
}

/// Waits for a file that says something.
fn told(dir: &Path, name: &str) -> Result<String, String> {
    let begin = Instant::now();
    loop {
        match fs::read_to_string(dir.join(name)) {
            Ok(text) if !text.is_empty() => return Ok(text),
            _ if begin.elapsed() > LIMIT => return Err(format!("{name} is not written")),
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// It runs here, as it was.
fn goes_on(site: &mut Site) -> Result<(), String> {
    let dir = site.dir.clone();
    let turns = |dir: &Path| told(dir, TURNS)?.parse::<u64>().map_err(|e| e.to_string());
    let (before, begin) = (turns(&dir)?, Instant::now());
    // Enough for what comes late.
    while turns(&dir).unwrap_or(before) < before + 50 {
        if begin.elapsed() > LIMIT {
            return Err("it does not run".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    if let Ok(text) = fs::read_to_string(dir.join(NOTICED)) {
        return Err(format!("it has noticed something: {text}"));
    }
    if dir.join(CHILDREN[2]).exists() {
        return Err("who was stopped goes on".into());
    }
    let state = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().filter(|line| line.starts_with("State:\tT")).count()
    };
    let members = site.members(site.at);
    let stopped: usize = members.iter().map(|member| state(member.pid)).sum();
    if (members.len(), stopped) != (4, 1) {
        return Err(format!("{stopped} of {members:?} are stopped"));
    }
    File::create(dir.join(GO)).map_err(|e| e.to_string())?;
    for role in &CHILDREN[..2] {
        // SI_TKILL, SI_USER: what was sent to the thread is taken first.
        let waited = told(&dir, &format!("{role}.end"))?;
        if waited != "[Some(-6), Some(0), None]" {
            return Err(format!("{role}: {waited} waited"));
        }
    }
    for member in members {
        kill_dead(member.pid);
    }
    site.leaves(site.at)?;
    site.forget_tree();
    for name in [NOTICED, TURNS].iter().chain(&CHILDREN) {
        let _ = fs::remove_file(dir.join(name));
        let _ = fs::remove_file(dir.join(format!("{name}.end")));
    }
    Ok(())
}

/// A migration that has said Go, which does not get there.
fn gone(site: &mut Site, name: &str) -> Result<(Tool, Forwarder), String> {
    let forwarder = site.detour_to_restores()?;
    site.start_role(ROOT, 0, 0)?;
    site.daemons(Way::Direct)?;
    let fault = Fault::Stall(Duration::from_secs(3600));
    forwarder.arm(Some(Spot { from_source: true, frame: Frame::First(Kind::Go), fault }));
    let tool = begin(site, Way::Direct, name)?;
    let begun = Instant::now();
    while forwarder.hit().is_none() {
        if begun.elapsed() > LIMIT || tool.end_within(Duration::ZERO).is_some() {
            return Err(format!("it does not say Go: {}", tool.said()));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok((tool, forwarder))
}

/// The same of one that is killed then.
fn gone_and_killed(site: &mut Site, name: &str) -> Result<Forwarder, String> {
    let (tool, forwarder) = gone(site, name)?;
    tool.signal(Signal::SIGKILL);
    tool.end()?;
    Ok(forwarder)
}

/// The id of the only journal.
fn journal(site: &Site) -> Result<(PathBuf, String), String> {
    let entries = fs::read_dir(site.work_there(site.at)).map_err(|e| e.to_string())?.flatten();
    let mut paths = entries.map(|entry| entry.path()).filter_map(|path| {
        let name = path.file_name()?.to_string_lossy().into_owned();
        let id = name.strip_prefix("migrate-")?.strip_suffix(".journal")?.to_owned();
        Some((path, id))
    });
    paths.next().ok_or_else(|| "no journal".to_owned())
}

/// The migrate lives, and hears that the restored tree is dead.
pub fn taken_back(site: &mut Site) -> Result<(), String> {
    let (tool, _forwarder) = gone(site, "taken back")?;
    if let Some(restore) = restore_on(site, site.at.other()) {
        kill_dead(restore);
    }
    tool.end()?.failed("goes on here")?;
    goes_on(site)
}

/// The cache is gone after Go, and the migrate is interrupted: it says that it cannot end, and asks on until a cache knows.
pub fn asked_on(site: &mut Site) -> Result<(), String> {
    let (tool, _forwarder) = gone(site, "asked on")?;
    let to = site.at.other();
    kill_dead(site.pid_of(to, CACHE).ok_or("no cache")?);
    site.gone(to, CACHE)?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        tool.signal(signal);
        let begun = Instant::now();
        while !tool.said().contains(&format!("interrupted by {signal}; it stays frozen here")) {
            if begun.elapsed() > LIMIT || tool.end_within(Duration::ZERO).is_some() {
                return Err(format!("of {signal} it says: {}", tool.said()));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    site.daemons(Way::Direct)?;
    tool.end()?.failed("goes on here")?;
    goes_on(site)
}

/// The migrate is killed, and the operator lets the tree go on.
pub fn thawed(site: &mut Site) -> Result<(), String> {
    let _forwarder = gone_and_killed(site, "thawed")?;
    let (path, id) = journal(site)?;
    // Elsewhere nobody knows whether it is there; nothing is done, and nothing believed.
    let there = site.work(site.at).display().to_string();
    for words in [&["settle"][..], &["thaw", &id], &["kill", &id]] {
        let words = [&["migrate"], words, &["-W", &there]].concat();
        let ended = site.run(site.at.other(), &words)?.failed("is not known")?;
        if !ended.said.contains("of which no process is seen here") || !path.exists() {
            return Err(format!("from another host: {}", ended.said));
        }
    }
    let listed = site.run(site.at, &["migrate", "list"])?.succeeded()?;
    if !listed.said.contains("stopped; crtool migrate settle") {
        return Err(listed.said);
    }
    site.run(site.at, &["migrate", "thaw", &id])?.succeeded()?;
    if path.exists() {
        return Err("its journal is still there".into());
    }
    goes_on(site)
}

/// The migrate and the restore are killed, and somebody in the pid namespace above settles it.
pub fn settled_from_above(site: &mut Site) -> Result<(), String> {
    let _forwarder = gone_and_killed(site, "settled")?;
    if let Some(restore) = restore_on(site, site.at.other()) {
        kill_dead(restore);
    }
    let out = site.dir.join("above.out");
    let file = || File::options().create(true).append(true).open(&out).map_err(|e| e.to_string());
    let mut command = Command::new(env!("CARGO_BIN_EXE_crtool"));
    command.args(["migrate", "settle", "--no-default-config", "--timeout", "5", "-W"]);
    command.arg(site.work_there(site.at)).stdin(Stdio::null()).stdout(file()?).stderr(file()?);
    site.hosts.enter(site.at)?;
    #[allow(clippy::zombie_processes)] // the reaper waits for it
    let child = command.spawn();
    site.hosts.leave()?;
    let end = site.reaper.wait(child.map_err(|e| e.to_string())?.id().cast_signed(), LIMIT);
    let said = fs::read_to_string(&out).map_err(|e| e.to_string())?;
    if end != Some(End::Exited(0)) || !said.contains("it does not run at the destination, and goes on here") {
        return Err(format!("{end:?}: {said}"));
    }
    goes_on(site)
}

/// Journals of destinations that are dead take together as long as one.
pub fn many_dead_destinations(site: &mut Site) -> Result<(), String> {
    let forwarder = gone_and_killed(site, "many")?;
    let (path, id) = journal(site)?;
    let text = fs::read_to_string(&path).map_err(|e| e.to_string())?;
    for number in 1..10 {
        let other = format!("{number:016x}");
        let copy = text.replace(&id, &other);
        let to = path.with_file_name(format!("migrate-{other}.journal"));
        fs::write(to, copy).map_err(|e| e.to_string())?;
    }
    let cache = site.pid_of(site.at.other(), CACHE).unwrap_or(0);
    // It takes connections, and says nothing.
    kill(Pid::from_raw(cache), Signal::SIGSTOP).map_err(|e| e.to_string())?;
    let settled = site.run(site.at, &["migrate", "settle", "--timeout", "3"])?.failed("is not known")?;
    kill_dead(cache);
    site.gone(site.at.other(), CACHE)?;
    if settled.said.matches("is not known").count() != 10 || settled.took > Duration::from_secs(15) {
        return Err(format!("in {:?}: {}", settled.took, settled.said));
    }
    for entry in fs::read_dir(site.work_there(site.at)).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("migrate-0000") {
            fs::remove_file(entry.path()).map_err(|e| e.to_string())?;
        }
    }
    site.run(site.at, &["migrate", "thaw", &id, "--timeout", "1"])?.succeeded()?;
    drop(forwarder);
    goes_on(site)?;
    // What the restore of a cache that was killed had made dies with it.
    site.daemons(Way::Direct)
}

/// The root is killed while it is stopped: nothing goes on, nobody believes that it does, and what is left is ended.
pub fn members_die(site: &mut Site) -> Result<(), String> {
    let _forwarder = gone_and_killed(site, "members")?;
    let (path, id) = journal(site)?;
    let root: i32 = site.root().parse().map_err(|_| "its root")?;
    let all = site.members(site.at);
    let outer = all.iter().find(|member| member.inner == root).ok_or("no root")?.pid;
    kill(Pid::from_raw(outer), Signal::SIGKILL).map_err(|e| e.to_string())?;
    site.run(site.at, &["migrate", "thaw", &id])?.failed("is not there any more")?;
    if site.members(site.at).iter().filter(|member| member.pid != outer).count() != all.len() - 1
        || !path.exists()
    {
        return Err("something has happened to the rest, or to the journal".into());
    }
    site.run(site.at, &["migrate", "kill", &id])?.succeeded()?;
    site.leaves(site.at)?;
    site.forget_tree();
    for name in [NOTICED, TURNS].iter().chain(&CHILDREN) {
        let _ = fs::remove_file(site.dir.join(name));
    }
    // It waits for somebody who says what became of the tree.
    kill_dead(site.pid_of(site.at.other(), CACHE).unwrap_or(0));
    site.gone(site.at.other(), CACHE)?;
    site.daemons(Way::Direct)
}
