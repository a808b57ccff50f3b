//! To and fro, many times, with the same daemons on both hosts: nothing gets more from round to round.

use std::{
    collections::BTreeSet,
    env,
    fmt::{self, Display},
    fs,
    os::unix::fs::MetadataExt,
    thread,
    time::{Duration, Instant},
};

use crate::hosts::Host;
use crate::run_first;
use crate::site::{CACHE, LIMIT, PROXY, Site, Way};

/// MiB that change all the time.
const CHANGING: usize = 16;
/// By then everything has happened on each host, in each way.
const WARM: usize = 5;
/// What the memory in use by a process may grow: the allocator's waste, and a daemon's history of snapshots.
const SLACK_KIB: u64 = 2 << 10;
/// Mappings that the allocator of a daemon may make besides.
const SLACK_MAPPINGS: u64 = 8;

/// `CRTOOL_SOAK`, an even number.
fn rounds() -> usize {
    let asked = env::var("CRTOOL_SOAK").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(10);
    asked.max(WARM + 1).next_multiple_of(2)
}

/// Time besides, for a machine that has much else to do.
pub fn limit() -> Duration {
    Duration::from_secs(5) * u32::try_from(rounds()).unwrap_or(u32::MAX)
}

/// Dumps and restores, through proxies.
pub fn soak(site: &mut Site) -> Result<(), String> {
    to_and_fro(site, |site, name| {
        let (dump, restore) = site.migrate(Way::Proxied, name)?;
        Ok(dump + restore)
    })
}

/// The same with `migrate`, without and with a proxy in turn.
pub fn migrate(site: &mut Site) -> Result<(), String> {
    site.restores = true;
    let mut way = Way::Direct;
    to_and_fro(site, move |site, name| {
        // Two rounds each: to and fro.
        let took = run_first::plain(site, way, name)?;
        if site.at == Host::Left {
            way = if way == Way::Direct { Way::Proxied } else { Way::Direct };
        }
        Ok(took)
    })
}

fn to_and_fro(
    site: &mut Site,
    mut move_it: impl FnMut(&mut Site, &str) -> Result<Duration, String>,
) -> Result<(), String> {
    for _ in [Host::Left, Host::Right] {
        site.daemons(Way::Proxied)?;
        site.at = site.at.other();
    }
    site.start_tree_with(CHANGING, 0)?;
    let rounds = rounds();
    let begin = Instant::now();
    let (mut warm, mut times) = (None, Vec::new());
    for round in 1..=rounds {
        let name = format!("soak {round}");
        times.push(move_it(site, &name).map_err(|e| format!("round {round} of {rounds}: {e}"))?);
        site.daemons_live()?;
        if round == WARM {
            warm = Some(settled(site)?);
        }
    }
    let took = begin.elapsed();
    let (warm, now) = (warm.ok_or("too few rounds")?, settled(site)?);
    times.sort();
    let (middle, longest) = (times.get(rounds / 2), times.last());
    let [middle, longest] = [middle, longest].map(|time| time.copied().unwrap_or_default());
    println!("{rounds} rounds in {took:.1?}, each {middle:.0?}, at most {longest:.0?}");
    println!("after round {WARM}, and after round {rounds}:");
    let mut more = Vec::new();
    for (then, now) in warm.iter().zip(&now) {
        println!("{}", then.of);
        println!("    {then}");
        println!("    {now}");
        if let Some(what) = then.grown(now) {
            more.push(format!("{}: {what}", now.of));
        }
    }
    if more.is_empty() && warm.len() == now.len() {
        Ok(())
    } else {
        Err(format!("more than before: {more:?}"))
    }
}

/// How much there is of everything that somebody has.
#[derive(Debug, PartialEq, Eq)]
struct Figures {
    of: String,
    /// Must not get more.
    counted: Vec<(&'static str, u64)>,
    /// May get more, by so much.
    loose: Vec<(&'static str, u64, u64)>,
    files: BTreeSet<String>,
}

impl Figures {
    /// What there is more of.
    fn grown(&self, now: &Self) -> Option<String> {
        let counted = self.counted.iter().zip(&now.counted).find(|(then, now)| now.1 > then.1);
        let loose = self.loose.iter().zip(&now.loose).find(|(then, now)| now.1 > then.1 + then.2);
        let file = now.files.difference(&self.files).next();
        (counted.map(|c| format!("{c:?}")))
            .or(loose.map(|l| format!("{l:?}")))
            .or(file.map(|name| format!("file {name}")))
    }

    fn of_process(of: String, pid: i32, mappings: u64) -> Self {
        let proc = format!("/proc/{pid}");
        let status = fs::read_to_string(format!("{proc}/status")).unwrap_or_default();
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
            value.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        let fds: Vec<_> = fs::read_dir(format!("{proc}/fd")).into_iter().flatten().flatten().collect();
        let memfds = fds.iter().filter(|fd| {
            fs::read_link(fd.path()).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:"))
        });
        let held: u64 = memfds.filter_map(|fd| Some(fs::metadata(fd.path()).ok()?.blocks() / 2)).sum();
        let maps = fs::read_to_string(format!("{proc}/maps")).unwrap_or_default();
        let counted = vec![
            ("fds", fds.len() as u64),
            ("threads", field("Threads:")),
            ("locked KiB", field("VmLck:")),
            ("mapped shmem KiB", field("RssShmem:")),
            ("memfd KiB", held),
        ];
        let maps = maps.lines().count() as u64;
        let loose = vec![("RSS KiB", field("VmRSS:"), SLACK_KIB), ("mappings", maps, mappings)];
        Self { of, counted, loose, files: BTreeSet::new() }
    }

    fn of_host(site: &Site, host: Host) -> Self {
        let of =
            |name: &str| fs::read_to_string(format!("/proc/{}/{name}", site.init(host))).unwrap_or_default();
        let established = of("net/tcp").lines().filter(|l| l.split_whitespace().nth(3) == Some("01")).count();
        let names = fs::read_dir(site.work_there(host)).into_iter().flatten().flatten();
        let names = names.map(|e| e.file_name().to_string_lossy().into_owned());
        // Of these the newest thousand are kept.
        let kept = |name: &str| {
            name.starts_with("handover-") && name.ends_with(".journal")
                || name.starts_with("restore-") && name.ends_with(".log")
        };
        let files: BTreeSet<_> = names.filter(|name| !kept(name)).collect();
        let counted = vec![
            ("mounts", of("mountinfo").lines().count() as u64),
            ("connections", established as u64),
            ("unix sockets", of("net/unix").lines().skip(1).count() as u64),
            ("files", files.len() as u64),
        ];
        Self { of: format!("host {}", host.name()), counted, loose: Vec::new(), files }
    }
}

impl Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, number) in &self.counted {
            write!(f, "{name} {number}, ")?;
        }
        for (name, number, _) in &self.loose {
            write!(f, "{name} {number}, ")?;
        }
        Ok(())
    }
}

fn figures(site: &Site) -> Vec<Figures> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter(|e| e.file_name().to_string_lossy().starts_with(|c: char| c.is_ascii_digit()));
    let counted = vec![("processes", pids.count() as u64)];
    let mut all = vec![Figures { of: "all".to_owned(), counted, loose: Vec::new(), files: BTreeSet::new() }];
    for host in [Host::Left, Host::Right] {
        all.push(Figures::of_host(site, host));
        for name in [CACHE, PROXY] {
            let pid = site.pid_of(host, name).unwrap_or(0);
            all.push(Figures::of_process(format!("{name} on host {}", host.name()), pid, SLACK_MAPPINGS));
        }
    }
    let mut members = site.members(site.at);
    members.sort_by_key(|member| member.inner);
    all.extend(
        members.iter().map(|m| Figures::of_process(format!("process {} of the tree", m.inner), m.pid, 0)),
    );
    all
}

/// What stays when the last restore has been forgotten: the same for a while.
fn settled(site: &Site) -> Result<Vec<Figures>, String> {
    let begin = Instant::now();
    let counted = |all: &[Figures]| all.iter().map(|f| f.counted.clone()).collect::<Vec<_>>();
    let mut last = figures(site);
    let mut same = 0;
    while same < 5 {
        thread::sleep(Duration::from_millis(50));
        let now = figures(site);
        same = if counted(&now) == counted(&last) { same + 1 } else { 0 };
        last = now;
        if begin.elapsed() > LIMIT {
            return Err("the daemons do not come to rest".into());
        }
    }
    Ok(last)
}
