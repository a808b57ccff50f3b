//! `crtool migrate`: the tree ends at the source only after the restored one runs. Whoever dies, wherever the connection
//! breaks: it runs on one host exactly, and nothing is lost, also not with the cache.

use std::{
    fs,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use crtool::remote::{pb::snapshot_info::State, wire::Kind};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::aim::Aim;
use crate::forwarder::{Fault, Forwarder, Frame, Spot};
use crate::hosts::Host;
use crate::kills::Victim;
use crate::reaper::End;
use crate::site::{CACHE, LIMIT, PROXY, Site, Tool, Way, over};

/// Kills as often as are wanted take at most so many times as many attempts.
const PATIENCE: usize = 20;

/// Words of a migration of the tree.
fn words(site: &Site, way: Way, name: &str) -> Vec<String> {
    let root = site.root();
    let words = ["migrate", "-t", &root, "-D", name, "-v4", "-o", "migrate.log", "--timeout", "5"];
    let mut words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    if way == Way::Direct {
        let (address, port) = site.cache_address();
        words.extend(["--to".to_owned(), format!("{address}:{port}")]);
    }
    words
}

pub fn begin(site: &Site, way: Way, name: &str) -> Result<Tool, String> {
    let words = words(site, way, name);
    site.begin(site.at, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The restore that a cache has started.
pub fn restore_on(site: &Site, host: Host) -> Option<i32> {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let home = namespace(site.init(host))?;
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|&pid| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|&byte| byte == 0).collect();
        words.get(1) == Some(&&b"restore"[..]) && namespace(pid).as_ref() == Some(&home)
    })
}

fn kill_now(pid: Option<i32>) {
    if let Some(pid) = pid {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Waits for the end of a migration, with daemons that are started again as a service manager does.
fn ended(site: &mut Site, way: Way, tool: &Tool, victim: Victim) -> Result<End, String> {
    let (from, to) = (site.at, site.at.other());
    match victim {
        Victim::Proxy => site.gone(from, PROXY)?,
        Victim::Cache => site.gone(to, CACHE)?,
        _ => {}
    }
    site.daemons(way)?;
    let ended = tool.end()?;
    let killed = victim == Victim::Dump && ended.end == End::Killed(libc::SIGKILL);
    if !killed && !matches!(ended.end, End::Exited(0..=2)) {
        return Err(format!("the migration ended with {:?}: {}", ended.end, ended.said));
    }
    if ended.end == End::Exited(1) && ended.said.trim().is_empty() {
        return Err("it does not say why it failed".into());
    }
    Ok(ended.end)
}

/// Does what an operator does after an accident, and looks where the tree is then: whether it moved.
fn settle(site: &mut Site, name: &str, end: End) -> Result<bool, String> {
    let (from, to) = (site.at, site.at.other());
    let begin = Instant::now();
    let journals = |site: &Site| -> Vec<String> {
        let entries = fs::read_dir(site.work_there(from)).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names
            .filter_map(|name| Some(name.strip_prefix("migrate-")?.strip_suffix(".journal")?.to_owned()))
            .collect()
    };
    // Whether it was asked in vain.
    let mut unknown = String::new();
    while let Some(id) = journals(site).into_iter().next() {
        if end != End::Killed(libc::SIGKILL) {
            return Err(format!("the migration ended with {end:?}, and left its journal"));
        }
        let settled = site.run(from, &["migrate", "settle", "--timeout", "5"])?;
        if settled.end == End::Exited(0) {
            continue;
        }
        settled.failed("not known").map(|ended| unknown = ended.said)?;
        // A restore that works on ends by itself, one way or the other.
        if begin.elapsed() > Duration::from_secs(20) {
            return Err(format!("migration {id} cannot be settled without an operator: {unknown}"));
        }
        thread::sleep(Duration::from_millis(20));
    }
    // What dies with a restore that was killed takes a moment.
    loop {
        let (here, there) = (site.members(from), site.members(to));
        let snapshot = site.snapshot(to, name);
        let state = snapshot.as_ref().map(|s| s.state());
        let settled = state.is_none_or(|state| over(state) || state == State::InDoubt);
        if here.is_empty() != there.is_empty() && settled && restore_on(site, to).is_none() {
            break;
        }
        if begin.elapsed() > LIMIT {
            return Err(format!("here {here:?}, there {there:?}, snapshot {snapshot:?}"));
        }
        thread::sleep(Duration::from_millis(2));
    }
    let moved = site.members(from).is_empty();
    match end {
        End::Exited(0 | 2) if !moved => {
            return Err(format!("the migration ended with {end:?}, and the tree stayed"));
        }
        End::Exited(1) if moved => return Err("the migration failed, and the tree moved".into()),
        _ => {}
    }
    if moved {
        site.arrived()?;
    } else {
        site.works()?;
        let in_doubt = |site: &Site| site.snapshot(to, name).is_some_and(|s| s.state() == State::InDoubt);
        if in_doubt(site) {
            let dropped = site.run(to, &["image-cache", "drop", name])?;
            // A proxy may have said first that the tree runs on here.
            if in_doubt(site) || dropped.end != End::Exited(1) {
                dropped.succeeded()?;
            }
        }
    }
    Ok(moved)
}

/// One migration without trouble; how long it took.
pub fn plain(site: &mut Site, way: Way, name: &str) -> Result<Duration, String> {
    site.daemons(way)?;
    let ended = begin(site, way, name)?.end()?.succeeded()?;
    site.arrived()?;
    Ok(ended.took)
}

pub fn series(site: &mut Site, way: Way, victim: Victim, times: usize) -> Result<(), String> {
    site.restores = true;
    if site.members(site.at).is_empty() {
        site.start_tree(0)?;
    }
    let mut usual = Duration::ZERO;
    for number in 0..2 {
        usual = plain(site, way, &format!("probe {victim:?} {number}"))?;
    }
    let mut aim = Aim::within(usual);
    let (wanted, mut cut, mut moves) = (Site::times(times), 0, 0);
    for number in 0..wanted * PATIENCE {
        if cut == wanted {
            break;
        }
        let late = number % 2 == 0;
        let moment = if late { aim.later() } else { aim }.moment(|limit| site.random(limit));
        let name = format!("{way:?} {victim:?} {number}");
        let (moved, in_time) = one(site, way, victim, &name, moment)
            .map_err(|text| format!("{name}, killed after {moment:?} of {aim:?}: {text}"))?;
        match in_time {
            true => aim.hit(),
            false if late => {}
            false => aim.too_late(moment),
        }
        cut += usize::from(in_time);
        moves += usize::from(moved);
    }
    println!("{way:?} {victim:?}: {cut} killed, the tree moved {moves} times");
    if cut < wanted {
        return Err(format!(
            "only {cut} were killed before their end: the moments are badly chosen: {aim:?}"
        ));
    }
    Ok(())
}

/// One migration in which the victim is killed so long after its start; whether the tree moved, and the victim was killed before
/// the end.
fn one(
    site: &mut Site,
    way: Way,
    victim: Victim,
    name: &str,
    moment: Duration,
) -> Result<(bool, bool), String> {
    site.daemons(way)?;
    let (from, to) = (site.at, site.at.other());
    let tool = begin(site, way, name)?;
    if victim == Victim::Restore {
        // Its moments count from when it is there.
        while restore_on(site, to).is_none() && tool.end_within(Duration::ZERO).is_none() {
            thread::sleep(Duration::from_micros(200));
        }
    }
    thread::sleep(moment);
    let mut in_time = tool.end_within(Duration::ZERO).is_none();
    match victim {
        Victim::Dump => tool.signal(Signal::SIGKILL),
        Victim::Proxy => kill_now(site.pid_of(from, PROXY)),
        Victim::Cache => kill_now(site.pid_of(to, CACHE)),
        Victim::Restore => {
            let restore = restore_on(site, to);
            in_time &= restore.is_some();
            kill_now(restore);
        }
        Victim::Nobody => {}
    }
    let end = ended(site, way, &tool, victim)?;
    Ok((settle(site, name, end)?, in_time))
}

pub fn source(site: &mut Site) -> Result<(), String> {
    series(site, Way::Direct, Victim::Dump, 15)
}

pub fn source_proxied(site: &mut Site) -> Result<(), String> {
    series(site, Way::Proxied, Victim::Dump, 10)
}

pub fn proxy(site: &mut Site) -> Result<(), String> {
    series(site, Way::Proxied, Victim::Proxy, 8)
}

pub fn cache(site: &mut Site) -> Result<(), String> {
    series(site, Way::Direct, Victim::Cache, 10)
}

pub fn cache_proxied(site: &mut Site) -> Result<(), String> {
    series(site, Way::Proxied, Victim::Cache, 5)
}

pub fn restore(site: &mut Site) -> Result<(), String> {
    series(site, Way::Direct, Victim::Restore, 15)
}

/// Frames of a migration of which each is the last one before something happens.
const KINDS: [(bool, Kind); 9] = [
    (true, Kind::SnapshotBegin),
    (true, Kind::Data),
    (true, Kind::Commit),
    (true, Kind::Go),
    (false, Kind::Prepared),
    (false, Kind::Armed),
    (false, Kind::Restored),
    (true, Kind::ImageBegin),
    (true, Kind::ImageEnd),
];

/// What happens to the first frame of a kind.
const FAULTS: [Fault; 4] =
    [Fault::Before, Fault::After, Fault::Kill { after: false }, Fault::Kill { after: true }];

/// At the first frame of each kind: the connection breaks before or after it, or one of them is killed.
pub fn kinds(site: &mut Site) -> Result<(), String> {
    for way in [Way::Direct, Way::Proxied] {
        site.restores = true;
        let at = |host: Host| SocketAddr::new(host.ipv4().parse().expect("an address"), 9996);
        let left = Forwarder::start(&site.hosts, Host::Left, at(Host::Right))?;
        let right = Forwarder::start(&site.hosts, Host::Right, at(Host::Left))?;
        site.detour = Some([left.port, right.port]);
        site.start_tree(0)?;
        let (mut hits, mut moves, mut runs) = (0, 0, 0);
        for (from_source, kind) in KINDS {
            for fault in FAULTS {
                let victims: &[Victim] = match (fault, way) {
                    (Fault::Kill { .. }, Way::Direct) => &[Victim::Dump, Victim::Cache, Victim::Restore],
                    (Fault::Kill { .. }, Way::Proxied) => &[Victim::Dump, Victim::Proxy],
                    _ => &[Victim::Nobody],
                };
                for &victim in victims {
                    if (victim, kind) == (Victim::Restore, Kind::SnapshotBegin) {
                        // There is none yet.
                        continue;
                    }
                    let name = format!("{way:?} {kind:?} {fault:?} {victim:?}");
                    let spot = Spot { from_source, frame: Frame::First(kind), fault };
                    let forwarder = if site.at == Host::Left { &left } else { &right };
                    let begun = Instant::now();
                    let (moved, hit) = at_frame(site, forwarder, way, spot, victim, &name)
                        .map_err(|e| format!("{name}: {e}"))?;
                    if begun.elapsed() > Duration::from_secs(2) {
                        println!("{name}: {:?}, hit {hit}, moved {moved}", begun.elapsed());
                    }
                    runs += 1;
                    hits += usize::from(hit);
                    moves += usize::from(moved);
                }
            }
        }
        println!("{way:?}: {hits} of {runs} migrations disturbed, the tree moved {moves} times");
        if hits * 2 < runs {
            return Err(format!("{way:?}: only {hits} of {runs} were disturbed"));
        }
        site.finish()?;
    }
    Ok(())
}

fn at_frame(
    site: &mut Site,
    forwarder: &Forwarder,
    way: Way,
    spot: Spot,
    victim: Victim,
    name: &str,
) -> Result<(bool, bool), String> {
    site.daemons(way)?;
    let (from, to) = (site.at, site.at.other());
    forwarder.arm(Some(spot));
    let tool = begin(site, way, name)?;
    match victim {
        Victim::Dump => forwarder.aim_at(tool.pid),
        Victim::Proxy => forwarder.aim_at(site.pid_of(from, PROXY).unwrap_or(0)),
        Victim::Cache => forwarder.aim_at(site.pid_of(to, CACHE).unwrap_or(0)),
        Victim::Restore => {
            // It is started when the snapshot begins.
            let begun = Instant::now();
            while spot.frame != Frame::First(Kind::SnapshotBegin)
                && tool.end_within(Duration::ZERO).is_none()
                && begun.elapsed() < LIMIT
            {
                if let Some(restore) = restore_on(site, to) {
                    forwarder.aim_at(restore);
                    break;
                }
                thread::sleep(Duration::from_micros(200));
            }
        }
        Victim::Nobody => {}
    }
    // Whoever is killed is started again while the migration goes on.
    let begun = Instant::now();
    while forwarder.hit().is_none() && tool.end_within(Duration::from_micros(500)).is_none() {
        if begun.elapsed() > LIMIT {
            return Err("neither hit nor ended".into());
        }
    }
    let hit = forwarder.disarm().is_some();
    let dead = if hit || victim == Victim::Dump { victim } else { Victim::Nobody };
    let end = ended(site, way, &tool, dead)?;
    Ok((settle(site, name, end)?, hit))
}

/// A migration that is killed, and its proxy too, when a frame of this kind does not arrive; the id of its journal.
fn killed_at(
    site: &mut Site,
    forwarder: &Forwarder,
    way: Way,
    (from_source, kind): (bool, Kind),
) -> Result<String, String> {
    site.daemons(way)?;
    let from = site.at;
    forwarder.arm(Some(Spot {
        from_source,
        frame: Frame::First(kind),
        fault: Fault::Stall(Duration::from_secs(3600)),
    }));
    let tool = begin(site, way, &format!("{way:?} {kind:?}"))?;
    let begun = Instant::now();
    while forwarder.hit().is_none() {
        if begun.elapsed() > LIMIT || tool.end_within(Duration::ZERO).is_some() {
            return Err(format!("no {kind:?}: {}", tool.said()));
        }
        thread::sleep(Duration::from_millis(1));
    }
    tool.signal(Signal::SIGKILL);
    tool.end()?;
    if let Some(proxy) = site.pid_of(from, PROXY) {
        kill_now(Some(proxy));
        site.gone(from, PROXY)?;
    }
    forwarder.disarm();
    site.daemons(way)?;
    let entries = fs::read_dir(site.work_there(from)).map_err(|e| e.to_string())?.flatten();
    let mut ids = entries.filter_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        Some(name.strip_prefix("migrate-")?.strip_suffix(".journal")?.to_owned())
    });
    ids.next().ok_or_else(|| "no journal".to_owned())
}

/// What an operator says neither ends the last copy of a tree nor doubles it, where the destination can be asked and says
/// otherwise. Where nobody answers it is done.
fn better(site: &mut Site, way: Way) -> Result<(), String> {
    let forwarder = site.detour_to_restores()?;
    site.start_tree(0)?;
    let (from, to) = (site.at, site.at.other());

    // It was not said to go.
    let id = killed_at(site, &forwarder, way, (true, Kind::Go))?;
    let path = site.work_there(from).join(format!("migrate-{id}.journal"));
    let journal = fs::read_to_string(&path).map_err(|e| e.to_string())?;
    let unsaid = journal.strip_suffix("going\n").ok_or("Go is not written down")?;
    fs::write(&path, unsaid).map_err(|e| e.to_string())?;
    site.run(from, &["migrate", "kill", &id])?.failed("it was not handed over")?;
    site.run(from, &["migrate", "thaw", &id])?.succeeded()?;
    site.works()?;

    // It does not run there.
    let id = killed_at(site, &forwarder, way, (true, Kind::Go))?;
    kill_now(restore_on(site, to));
    site.run(from, &["migrate", "kill", &id, "--timeout", "5"])?.failed("does not run at the destination")?;
    site.run(from, &["migrate", "thaw", &id])?.succeeded()?;
    site.works()?;

    // It runs there, and a cache that was started anew knows it too.
    let id = killed_at(site, &forwarder, way, (false, Kind::Restored))?;
    for anew in [false, true] {
        if anew {
            kill_now(site.pid_of(to, CACHE));
            site.gone(to, CACHE)?;
            site.daemons(way)?;
        }
        let thawed = site.run(from, &["migrate", "thaw", &id, "--timeout", "5"])?;
        thawed.failed("it runs at the destination").map_err(|e| format!("cache started anew {anew}: {e}"))?;
    }
    for (host, daemon) in [(to, CACHE), (from, PROXY)] {
        kill_now(site.pid_of(host, daemon));
        site.gone(host, daemon)?;
    }
    let killed = site.run(from, &["migrate", "kill", &id, "--timeout", "1"])?.succeeded()?;
    if !killed.said.contains("is not known") {
        return Err(format!("nobody answers: {}", killed.said));
    }
    site.arrived()
}

pub fn knows_better(site: &mut Site) -> Result<(), String> {
    better(site, Way::Direct)
}

pub fn knows_better_proxied(site: &mut Site) -> Result<(), String> {
    better(site, Way::Proxied)
}

/// Whoever settles it is killed at any moment: the tree is stopped with its journal there, or goes on; asked again, it goes on.
pub fn settle_killed(site: &mut Site) -> Result<(), String> {
    let forwarder = site.detour_to_restores()?;
    site.start_tree(0)?;
    let (from, to) = (site.at, site.at.other());
    let mut usual = None;
    let mut half = 0;
    for number in 0..Site::times(10) {
        let id = killed_at(site, &forwarder, Way::Direct, (true, Kind::Go))?;
        let path = site.work_there(from).join(format!("migrate-{id}.journal"));
        kill_now(restore_on(site, to));
        let tool = site.begin(from, &["migrate", "settle", "--timeout", "5"])?;
        if let Some(usual) = usual {
            thread::sleep(Duration::from_micros(site.random(usual)));
            tool.signal(Signal::SIGKILL);
        }
        let ended = tool.end()?;
        usual.get_or_insert(u64::try_from(ended.took.as_micros()).unwrap_or(u64::MAX));
        let stopped = |pid: i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.contains("State:\tT")
        };
        let members = site.members(from);
        let stopped = members.iter().filter(|member| stopped(member.pid)).count();
        let open = path.exists();
        println!("{number}: {:?}, {stopped} of {} stopped, journal {open}", ended.end, members.len());
        half += usize::from(stopped != 0 && stopped != members.len());
        if stopped != 0 && !open {
            return Err(format!("{number}: {stopped} of {members:?} are stopped, and there is no journal"));
        }
        if open {
            site.run(from, &["migrate", "settle", "--timeout", "5"])?.succeeded()?;
        }
        site.works()?;
    }
    println!("{half} times it ran in part until it was settled again");
    Ok(())
}
