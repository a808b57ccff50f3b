//! The place of a trial: two hosts, their daemons, the tools, and the tree that goes from one to the other.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsStr,
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crtool::remote::{
    CACHE_SOCKET, PROXY_SOCKET,
    client::control::{self, Daemon},
    pb::{SnapshotInfo, snapshot_info::State},
};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::forwarder::Forwarder;
use crate::hosts::{Host, Hosts};
use crate::reaper::{End, Reaper};
use crate::roles;
use crate::steps::Steps;
use crate::target;
use crate::tree::{Journals, Member, held, members};

/// Nothing that is waited for takes longer.
pub const LIMIT: Duration = Duration::from_secs(60);
/// What the daemons and tools take for a silent peer, in seconds. Every machine can answer within that.
pub const TIMEOUT: &str = "10";

pub const CACHE: &str = "image-cache";
pub const PROXY: &str = "image-proxy";

/// How images get to the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Proxied,
    Direct,
}

pub struct Site {
    pub dir: PathBuf,
    pub hosts: Hosts,
    pub reaper: Reaper,
    /// Where the tree is.
    pub at: Host,
    /// Ports on each host where sources find the cache of the other one, if somebody stands between.
    pub detour: Option<[u16; 2]>,
    /// Caches restore what `migrate` sends.
    pub restores: bool,
    inits: [i32; 2],
    daemons: BTreeMap<(&'static str, &'static str), i32>,
    /// Daemons that could not take their sockets away, and have no successors.
    killed: BTreeSet<(&'static str, &'static str)>,
    journals: Journals,
    /// Pid of the tree's root on each host that it is on.
    root: i32,
    random: u64,
    runs: Cell<usize>,
}

/// A run of a tool that has ended.
#[derive(Debug)]
pub struct Ended {
    pub end: End,
    /// What it said on standard error.
    pub said: String,
    pub took: Duration,
}

/// A tool at work.
#[derive(Debug)]
pub struct Tool {
    pub pid: i32,
    pub begin: Instant,
    words: String,
    out: PathBuf,
    reaper: Reaper,
    ended: Cell<Option<(End, Duration)>>,
}

impl Site {
    /// Makes the hosts. To be called before anything else is started.
    pub fn new(dir: PathBuf) -> Result<Self, String> {
        let hosts = Hosts::join()?;
        let mut inits = [0; 2];
        // The tree has low pids, which no tool gets, on either host.
        for (host, last_pid) in [(Host::Left, 99), (Host::Right, 20000)] {
            let work = dir.join(host.name());
            fs::create_dir(&work).map_err(|e| format!("make {}: {e}", work.display()))?;
            hosts.enter(host)?;
            let outer = roles::start_init(last_pid)?;
            let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"));
            let init = children.ok().and_then(|text| text.trim().parse().ok());
            inits[host as usize] = init.ok_or("unshare has no child")?;
        }
        hosts.leave()?;
        let random = env::var("REMOTE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5eed);
        Ok(Self {
            journals: Journals::new(&dir),
            dir,
            hosts,
            reaper: Reaper::start(),
            at: Host::Left,
            detour: None,
            restores: false,
            inits,
            daemons: BTreeMap::new(),
            killed: BTreeSet::new(),
            root: 0,
            random,
            runs: Cell::new(0),
        })
    }

    /// How often to do what is done `times` by default.
    pub fn times(times: usize) -> usize {
        env::var("REMOTE_FACTOR").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1) * times
    }

    /// The next random number below `limit`.
    pub fn random(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit.max(1)
    }

    /// Pid of the init of a host.
    pub fn init(&self, host: Host) -> i32 {
        self.inits[host as usize]
    }

    pub fn work(&self, host: Host) -> PathBuf {
        self.dir.join(host.name())
    }

    /// The work dir of a host as the host sees it, for ourselves: something may be mounted there.
    pub fn work_there(&self, host: Host) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.inits[host as usize]));
        root.join(self.work(host).strip_prefix("/").unwrap_or(Path::new("")))
    }

    /// Starts a program on a host: in its network, among its processes, with its /proc.
    fn start(
        &self,
        host: Host,
        words: &[&OsStr],
        set: impl FnOnce(&mut Command),
        out: &Path,
    ) -> Result<i32, String> {
        let file = File::create(out).map_err(|e| format!("make {}: {e}", out.display()))?;
        let init = self.inits[host as usize];
        let namespace =
            |of: &str| File::open(format!("/proc/{of}/ns/pid")).map_err(|e| format!("pids of {of}: {e}"));
        let (there, home) = (namespace(&init.to_string())?, namespace("self")?);
        let mut command = Command::new(env::current_exe().map_err(|e| e.to_string())?);
        command.args(words).env(roles::ENTER, init.to_string());
        command.stdin(Stdio::null()).stdout(file.try_clone().map_err(|e| e.to_string())?).stderr(file);
        set(&mut command);
        self.hosts.enter(host)?;
        setns(&there, CloneFlags::CLONE_NEWPID).map_err(|e| format!("enter the pids of a host: {e}"))?;
        #[allow(clippy::zombie_processes)] // the reaper waits for it
        let child = command.spawn();
        setns(&home, CloneFlags::CLONE_NEWPID).map_err(|e| format!("leave the pids of a host: {e}"))?;
        self.hosts.leave()?;
        Ok(child.map_err(|e| format!("start {words:?}: {e}"))?.id().cast_signed())
    }

    /// Starts crtool on a host, with its work dir.
    pub fn begin(&self, host: Host, words: &[&str]) -> Result<Tool, String> {
        self.begin_stepped(host, words, None)
    }

    /// Starts it in the hands of a stepper, if there is one.
    pub fn begin_stepped(&self, host: Host, words: &[&str], steps: Option<&Steps>) -> Result<Tool, String> {
        let work = self.work(host);
        let number = self.runs.replace(self.runs.get() + 1);
        let out = self.dir.join(format!("{number}.out"));
        let tool = env::var_os("REMOTE_TOOL").unwrap_or_else(|| env!("CARGO_BIN_EXE_crtool").into());
        let own = env::current_exe().map_err(|e| e.to_string())?;
        let mut all: Vec<&OsStr> = steps.iter().map(|_| own.as_os_str()).chain([tool.as_os_str()]).collect();
        all.extend(words.iter().map(OsStr::new));
        if !words.contains(&"-W") {
            all.extend([OsStr::new("-W"), work.as_os_str()]);
        }
        let begin = Instant::now();
        let set = |command: &mut Command| steps.iter().for_each(|steps| steps.order(command));
        let pid = self.start(host, &all, set, &out)?;
        Ok(Tool {
            pid,
            begin,
            words: format!("crtool {}", words.join(" ")),
            out,
            reaper: self.reaper.clone(),
            ended: Cell::new(None),
        })
    }

    /// Runs crtool on a host to its end.
    pub fn run(&self, host: Host, words: &[&str]) -> Result<Ended, String> {
        self.begin(host, words)?.end()
    }

    /// Starts a daemon unless it runs, and waits until it can be asked.
    pub fn daemon(&mut self, host: Host, name: &'static str, more: &[&str]) -> Result<i32, String> {
        let key = (host.name(), name);
        if let Some(&pid) = self.daemons.get(&key) {
            return Ok(pid);
        }
        let log = format!("{name}.log");
        let own = ["-o", &log];
        let own = if more.contains(&"-o") { &[][..] } else { &own[..] };
        let tool = self.begin(host, &[&[name, "-v4"], own, more].concat())?;
        self.daemons.insert(key, tool.pid);
        self.killed.remove(&key);
        let begin = Instant::now();
        while control::snapshots(kind(name), &self.work_there(host)).is_err() {
            if let Some(end) = self.reaper.wait(tool.pid, Duration::from_millis(2)) {
                self.daemons.remove(&key);
                return Err(format!("{name} on {key:?} ended with {end:?}: {}", tool.said()));
            }
            if begin.elapsed() > LIMIT {
                return Err(format!("{name} on {key:?} cannot be asked: {}", tool.said()));
            }
        }
        Ok(tool.pid)
    }

    /// The daemons of a migration from where the tree is: the cache first, or the proxy.
    pub fn daemons(&mut self, way: Way) -> Result<(), String> {
        let (from, to) = (self.at, self.at.other());
        let words = ["--port", "9996", "--timeout", TIMEOUT, "--restore"];
        self.daemon(to, CACHE, if self.restores { &words } else { &words[..4] })?;
        if way == Way::Proxied {
            let (address, port) = self.cache_address();
            self.daemon(from, PROXY, &["--address", &address, "--port", &port, "--timeout", TIMEOUT])?;
        }
        Ok(())
    }

    pub fn cache_address(&self) -> (String, String) {
        match self.detour {
            Some(ports) => ("127.0.0.1".to_owned(), ports[self.at as usize].to_string()),
            None => (self.at.other().ipv4().to_owned(), "9996".to_owned()),
        }
    }

    /// Pid of a daemon that runs.
    /// Has caches start restores, and leads dumps of this host to the cache of the other by a forwarder.
    pub fn detour_to_restores(&mut self) -> Result<Forwarder, String> {
        self.restores = true;
        let cache = SocketAddr::new(self.at.other().ipv4().parse().expect("an address"), 9996);
        let forwarder = Forwarder::start(&self.hosts, self.at, cache)?;
        self.detour = Some([forwarder.port; 2]);
        Ok(forwarder)
    }

    pub fn pid_of(&self, host: Host, name: &'static str) -> Option<i32> {
        self.daemons.get(&(host.name(), name)).copied()
    }

    /// Whether something lies in the work dir of a host that its next proxy is to tell a cache.
    pub fn has_last_word(&self, host: Host) -> Result<bool, String> {
        let mut entries = fs::read_dir(self.work_there(host)).map_err(|e| e.to_string())?.flatten();
        Ok(entries.any(|entry| entry.file_name().to_string_lossy().starts_with("last-word-")))
    }

    /// Forgets a daemon that was killed, once it is gone.
    pub fn gone(&mut self, host: Host, name: &'static str) -> Result<(), String> {
        let Some(pid) = self.daemons.remove(&(host.name(), name)) else { return Ok(()) };
        self.killed.insert((host.name(), name));
        match self.reaper.wait(pid, LIMIT) {
            Some(End::Killed(libc::SIGKILL)) => Ok(()),
            end => Err(format!("{name} on host {} was killed, and ended with {end:?}", host.name())),
        }
    }

    /// Ends a daemon as an operator does.
    pub fn stop(&mut self, host: Host, name: &'static str) -> Result<(), String> {
        let Some(pid) = self.daemons.remove(&(host.name(), name)) else { return Ok(()) };
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        match self.reaper.wait(pid, LIMIT) {
            Some(End::Exited(0)) => Ok(()),
            end => Err(format!("{name} on host {} ended by SIGTERM: {end:?}", host.name())),
        }
    }

    /// Starts the tree with so many MiB besides its own, and waits until it counts.
    pub fn start_tree(&mut self, ballast: usize) -> Result<(), String> {
        self.start_tree_with(1, ballast)
    }

    /// Starts the tree with so many MiB that change, and so many that do not.
    pub fn start_tree_with(&mut self, changing: usize, ballast: usize) -> Result<(), String> {
        self.start_role(target::ROOT, changing, ballast)?;
        self.works()
    }

    /// Starts a tree, and waits until it is ready.
    pub fn start_role(&mut self, role: &str, changing: usize, ballast: usize) -> Result<(), String> {
        let exe = env::current_exe().map_err(|e| e.to_string())?;
        let dir = self.dir.clone();
        let others = [target::CHECKS, target::GO, target::LINES, "ready", "end"];
        for name in target::JOURNALS.iter().chain(&others) {
            let _ = fs::remove_file(dir.join(name));
        }
        self.journals = Journals::new(&dir);
        let set = |command: &mut Command| {
            command.env(target::ROLE, role).env(target::DIR, &dir);
            command.env(target::CHANGING, changing.to_string()).env(target::BALLAST, ballast.to_string());
        };
        // Its output is nowhere: a file of ours would be the same on both hosts, and need not be.
        let set = |command: &mut Command| {
            set(command);
            command.stdout(Stdio::null()).stderr(Stdio::null());
        };
        self.pids_after(self.at, 99)?;
        let pid = self.start(self.at, &[exe.as_os_str()], set, &self.dir.join("tree.out"))?;
        let begin = Instant::now();
        while !self.dir.join("ready").exists() {
            if let Some(end) = self.reaper.wait(pid, Duration::from_millis(1)) {
                return Err(format!("the tree ended at once: {end:?}"));
            }
            if begin.elapsed() > LIMIT {
                return Err("the tree does not get ready".into());
            }
        }
        let members = members(self.inits[self.at as usize]);
        let root = members.iter().find(|m| m.pid == pid).ok_or("the tree is not on its host")?;
        self.root = root.inner;
        self.pids_after(self.at, 20000)
    }

    /// There is no tree any more.
    pub fn forget_tree(&mut self) {
        self.root = 0;
    }

    /// What starts on a host from now on has pids above `last`.
    fn pids_after(&self, host: Host, last: u32) -> Result<(), String> {
        self.shell(host, &format!("echo {last} > /proc/sys/kernel/ns_last_pid"))
    }

    /// Runs a line of shell on a host.
    pub fn shell(&self, host: Host, line: &str) -> Result<(), String> {
        let out = self.dir.join("sh.out");
        let pid = self.start(host, &["/bin/sh", "-c", line].map(OsStr::new), |_| (), &out)?;
        match self.reaper.wait(pid, LIMIT) {
            Some(End::Exited(0)) => Ok(()),
            end => Err(format!("{line}: {end:?}: {}", fs::read_to_string(&out).unwrap_or_default())),
        }
    }

    pub fn root(&self) -> String {
        self.root.to_string()
    }

    /// Words of a dump of the tree.
    pub fn dump_words(&self, way: Way, name: &str) -> Vec<String> {
        let root = self.root();
        let words = ["dump", "-t", &root, "--remote", "-D", name, "-v4", "-o", "dump.log"];
        let mut words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        if way == Way::Direct {
            let (address, port) = self.cache_address();
            words.extend(["--address".to_owned(), address, "--port".to_owned(), port]);
        }
        // Who is not there is waited for so long.
        words.extend(["--timeout".to_owned(), "5".to_owned()]);
        words
    }

    pub fn begin_dump(&self, way: Way, name: &str) -> Result<Tool, String> {
        let words = self.dump_words(way, name);
        self.begin(self.at, &words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts a restore on the other host.
    pub fn begin_restore(&self, name: &str) -> Result<Tool, String> {
        self.begin(self.at.other(), &Self::restore_words(name))
    }

    pub fn restore_words(name: &str) -> [&str; 8] {
        ["restore", "--remote", "-d", "-D", name, "-v4", "-o", "restore.log"]
    }

    /// A migration without trouble; how long dump and restore took.
    pub fn migrate(&mut self, way: Way, name: &str) -> Result<(Duration, Duration), String> {
        self.daemons(way)?;
        let dump = self.begin_dump(way, name)?.end()?.succeeded()?;
        let restore = self.begin_restore(name)?.end()?.succeeded()?;
        self.arrived()?;
        Ok((dump.took, restore.took))
    }

    /// The tree is on the other host now, and only there.
    pub fn arrived(&mut self) -> Result<(), String> {
        self.leaves(self.at)?;
        self.at = self.at.other();
        self.works()
    }

    /// What the cache of a host knows of a snapshot; nothing also if there is no cache.
    pub fn snapshot(&self, host: Host, name: &str) -> Option<SnapshotInfo> {
        let all = control::snapshots(Daemon::Cache, &self.work_there(host)).ok()?.0;
        all.into_iter().filter(|s| s.name == name).max_by_key(|s| !over(s.state()))
    }

    /// Processes of the tree on a host.
    pub fn members(&self, host: Host) -> Vec<Member> {
        members(self.inits[host as usize])
    }

    /// The tree counts where it is said to be, whole, and nowhere else.
    pub fn works(&mut self) -> Result<(), String> {
        let (before, checks) = (self.journals.counts()?, self.journals.checks());
        let begin = Instant::now();
        loop {
            let now = self.journals.counts()?;
            let there = self.members(self.at);
            let roots = there.iter().filter(|m| m.inner == self.root).count();
            // Two counts and checks more: the first may have been under way.
            let counts = (0..2).all(|n| now[n] > before[n] + 1) && self.journals.checks() > checks + 1;
            let held: Vec<_> = there.iter().flat_map(|m| held(m.pid)).collect();
            if counts && roots == 1 && there.len() == 2 && held.is_empty() {
                break;
            }
            if begin.elapsed() > LIMIT {
                return Err(format!(
                    "the tree does not work on host {}: {there:?}, {held:?}, counts {before:?}, then {now:?}",
                    self.at.name()
                ));
            }
            thread::sleep(Duration::from_millis(1));
        }
        match self.members(self.at.other()).as_slice() {
            [] => Ok(()),
            others => Err(format!("the tree is on both hosts: also {others:?}")),
        }
    }

    /// Waits until the tree is on a host no more.
    pub fn leaves(&self, host: Host) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            let left = self.members(host);
            if left.is_empty() {
                return Ok(());
            }
            if begin.elapsed() > LIMIT {
                return Err(format!("the tree is still on host {}: {left:?}", host.name()));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What an operator sees who looks whether the tree runs on a host: it counts, or it is gone. Only what is about to
    /// die is waited for.
    pub fn runs_on(&mut self, host: Host) -> Result<bool, String> {
        let before = self.journals.counts()?;
        let begin = Instant::now();
        loop {
            let now = self.journals.counts()?;
            if self.members(host).is_empty() {
                return Ok(false);
            }
            if now[0] > before[0] + 2 {
                return Ok(true);
            }
            if begin.elapsed() > LIMIT {
                return Err(format!("the tree neither runs nor dies: {:?}", self.members(host)));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A daemon that nobody has killed still runs.
    pub fn daemons_live(&self) -> Result<(), String> {
        for (key, &pid) in &self.daemons {
            if let Some(end) = self.reaper.wait(pid, Duration::ZERO) {
                return Err(format!("{key:?} has ended by itself: {end:?}"));
            }
        }
        Ok(())
    }

    /// Ends the tree, takes its verdict, and ends the daemons.
    pub fn finish(&mut self) -> Result<(), String> {
        self.daemons_live()?;
        if self.root != 0 {
            self.works()?;
            let root = self.members(self.at).into_iter().find(|m| m.inner == self.root);
            let root = root.ok_or("the tree has no root")?;
            kill(Pid::from_raw(root.pid), Signal::SIGTERM).map_err(|e| format!("end of the tree: {e}"))?;
            self.leaves(self.at)?;
            let end = fs::read_to_string(self.dir.join("end")).unwrap_or_default();
            self.journals.counts()?;
            if end != "well" {
                return Err(format!("the tree ended {end:?}"));
            }
            self.root = 0;
        }
        for host in [Host::Left, Host::Right] {
            for name in [PROXY, CACHE] {
                self.stop(host, name)?;
            }
        }
        for (host, name) in std::mem::take(&mut self.killed) {
            let socket = if name == CACHE { CACHE_SOCKET } else { PROXY_SOCKET };
            fs::remove_file(self.dir.join(host).join(socket))
                .map_err(|e| format!("socket of {name}: {e}"))?;
        }
        self.nothing_left()
    }

    /// Nothing runs but the hosts themselves, and the work dirs hold no sockets and no images.
    fn nothing_left(&self) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
            let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
            // Ourselves, and for each host its init and the init's parent.
            let left: Vec<i32> = pids.filter(|pid| !self.is_host(*pid)).collect();
            if left.is_empty() {
                break;
            }
            if begin.elapsed() > LIMIT {
                let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let left: Vec<String> = left.iter().map(|pid| format!("{pid} {:?}", name(pid))).collect();
                return Err(format!("processes left: {}", left.join(", ")));
            }
            thread::sleep(Duration::from_millis(2));
        }
        for host in [Host::Left, Host::Right] {
            for entry in fs::read_dir(self.work_there(host)).map_err(|e| e.to_string())?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                // Last words to a cache that was killed with what it had stay.
                // So does what a cache or a migrate was writing when it was killed, for a minute.
                let kept = name.ends_with(".log")
                    || name.starts_with('.') && name.ends_with(".journal.new")
                    || ["stats-", "handover", "last-word-"].iter().any(|kind| name.starts_with(kind));
                if !kept {
                    return Err(format!("left in the work dir of host {}: {name}", host.name()));
                }
            }
        }
        Ok(())
    }

    fn is_host(&self, pid: i32) -> bool {
        let parent = |pid: i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().find_map(|l| l.strip_prefix("PPid:")?.trim().parse::<i32>().ok())
        };
        pid == 1 || self.inits.iter().any(|&init| pid == init || parent(init) == Some(pid))
    }

    /// The ends of all logs, for the message of a failure.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for host in [Host::Left, Host::Right] {
            for name in ["dump", "migrate", PROXY, CACHE, "restore"] {
                let path = self.work_there(host).join(format!("{name}.log"));
                let log = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
                let lines: Vec<&str> = log.lines().collect();
                let end = lines.get(lines.len().saturating_sub(25)..).unwrap_or_default().join("\n");
                text.push_str(&format!("--- {name} on host {}:\n{end}\n", host.name()));
            }
        }
        text
    }
}

/// Nothing will become of a snapshot in this state.
pub fn over(state: State) -> bool {
    matches!(state, State::Restored | State::Failed | State::Dropped)
}

fn kind(name: &str) -> Daemon {
    if name == CACHE { Daemon::Cache } else { Daemon::Proxy }
}

impl Tool {
    /// Sends it a signal; it may have ended by now.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid), signal);
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// Its end, if it comes within a time.
    pub fn end_within(&self, limit: Duration) -> Option<Ended> {
        if self.ended.get().is_none() {
            let end = self.reaper.wait(self.pid, limit)?;
            self.ended.set(Some((end, self.begin.elapsed())));
        }
        let (end, took) = self.ended.get()?;
        Some(Ended { end, said: format!("{}: {}", self.words, self.said()), took })
    }

    /// Waits for its end.
    pub fn end(&self) -> Result<Ended, String> {
        self.end_within(LIMIT).ok_or_else(|| format!("it hangs: {}: {}", self.words, self.said()))
    }
}

impl Ended {
    pub fn succeeded(self) -> Result<Self, String> {
        if self.end == End::Exited(0) { Ok(self) } else { Err(format!("{:?}: {}", self.end, self.said)) }
    }

    /// It failed as a command fails: status 1, something said, no panic.
    pub fn failed(self, about: &str) -> Result<Self, String> {
        let panicked = self.said.contains("panicked") || self.said.contains("internal error");
        if self.end == End::Exited(1) && self.said.contains(about) && !panicked {
            Ok(self)
        } else {
            Err(format!("not a clean failure that speaks of {about:?}: {:?}: {}", self.end, self.said))
        }
    }
}
