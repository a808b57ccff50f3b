//! Migration between two hosts: each has a work dir, a cache for what comes and a proxy for what goes.
//!
//! The tree goes from left to right and, in a second round, back again.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crtool::remote::client::control::{self, Daemon};
use crtool::remote::pb;

use super::{STEP_LIMIT, Step, Stop, ensure};
use crate::certificates;
use crate::hosts::{Host, Hosts};
use crate::mode::Mode;
use crate::reaper::{Ended, Reaper};
use crate::sys;
use crate::tool::Tool;

/// Images do not get there: any of it is a failure.
const WORK_DIR_HOLDS: [&str; 5] = [".log", ".pid", "stats-dump", "stats-restore", "handover.id"];

const PORT: &str = "9996";

pub(super) struct Remote {
    hosts: Hosts,
    mode: Mode,
    dir: PathBuf,
    /// Where the tree is.
    at: Host,
    /// Dumps so far.
    dumps: usize,
    daemons: BTreeMap<(&'static str, &'static str), i32>,
}

impl Remote {
    /// Makes the hosts; to be called before anyone reaps children.
    pub(super) fn new(mode: Mode, dir: &Path) -> Step<Remote> {
        let hosts = Hosts::join()?;
        let remote =
            Remote { hosts, mode, dir: dir.to_owned(), at: Host::Left, dumps: 0, daemons: BTreeMap::new() };
        for host in [Host::Left, Host::Right] {
            let work = remote.work(host);
            std::fs::create_dir(&work).map_err(|e| format!("make {}: {e}", work.display()))?;
            if mode == Mode::RemoteTls {
                certificates::make(&work, &[host.ipv4(), host.ipv6()], &remote.dir.join("authority"))?;
            }
        }
        remote.hosts.enter(Host::Left)?;
        Ok(remote)
    }

    pub(super) fn work(&self, host: Host) -> PathBuf {
        self.dir.join(host.name())
    }

    pub(super) fn daemons(&self) -> impl Iterator<Item = i32> {
        self.daemons.values().copied()
    }

    /// This dump speaks to the cache itself.
    fn direct(&self) -> bool {
        match self.mode {
            Mode::Direct => true,
            Mode::RemoteTls => self.dumps.is_multiple_of(2),
            _ => false,
        }
    }

    /// One way by IPv4, the other by IPv6.
    fn way(&self, to: Host) -> Vec<String> {
        let address = if to == Host::Right { to.ipv4() } else { to.ipv6() };
        [&["--address".into(), address.into(), "--port".into(), PORT.into()][..], &self.tls(to.other())]
            .concat()
    }

    fn tls(&self, host: Host) -> Vec<String> {
        if self.mode != Mode::RemoteTls {
            return Vec::new();
        }
        let work = self.work(host);
        let file = |name: &str| work.join(name).display().to_string();
        let words = ["--tls", "--tls-cacert", &file(certificates::AUTHORITY)];
        let own = ["--tls-cert", &file(certificates::CERTIFICATE), "--tls-key", &file(certificates::KEY)];
        [&words[..], &own[..]].concat().into_iter().map(str::to_owned).collect()
    }

    /// A dump's tool, with all it needs to send the tree to the other host.
    pub(super) fn dumper(&mut self, tool: Tool, reaper: &Reaper) -> Step<Tool> {
        let to = self.at.other();
        self.dumps += 1;
        let mut words = vec!["--remote".to_owned()];
        let port = ["--port".to_owned(), PORT.to_owned()];
        self.daemon(reaper, to, "image-cache", [&port[..], &self.tls(to)].concat())?;
        if self.direct() {
            words.extend(self.way(to));
        } else {
            self.daemon(reaper, self.at, "image-proxy", self.way(to))?;
        }
        self.hosts.enter(self.at)?;
        Ok(tool.remote(self.work(self.at), words))
    }

    /// A restore's tool on the other host; the tree is there from now on.
    pub(super) fn restorer(&mut self, tool: Tool) -> Step<Tool> {
        self.at = self.at.other();
        self.hosts.enter(self.at)?;
        Ok(tool.remote(self.work(self.at), vec!["--remote".to_owned()]))
    }

    /// Starts a daemon unless it is there.
    fn daemon(&mut self, reaper: &Reaper, host: Host, name: &'static str, more: Vec<String>) -> Step {
        let key = (host.name(), name);
        if self.daemons.contains_key(&key) {
            return Ok(());
        }
        self.hosts.enter(host)?;
        let work = self.work(host);
        let (log, pidfile) = (format!("{name}.log"), format!("{name}.pid"));
        let words = [name, "-d", "-v4", "-o", &log, "--pidfile", &pidfile];
        let words = words.iter().map(|&word| word.to_owned()).chain(more).collect();
        let run = self
            .mode
            .dumper()
            .remote(work.clone(), words)
            .command(reaper, &self.dir.join(format!("{}.{name}", host.name())));
        ensure(run.succeeded(), || format!("{name} on host {} does not start: {}", host.name(), run.tail()))?;
        let pid = std::fs::read_to_string(work.join(&pidfile)).unwrap_or_default();
        let pid = pid.trim().parse().map_err(|e| format!("{pidfile} says {pid:?}: {e}"))?;
        self.daemons.insert(key, pid);
        Ok(())
    }

    /// The source hears that the tree runs at the destination, and the cache has no image any more.
    pub(super) fn arrived(&self, name: &str) -> Step {
        let source = self.work(self.at.other());
        if !self.direct() {
            let restored = control::wait_restored(&source, name, STEP_LIMIT)
                .map_err(|e| format!("image-proxy does not say that {name} was restored: {e}"))?;
            ensure(restored.ok, || format!("image-proxy heard of {name}: {restored:?}"))?;
        }
        self.cache_holds_nothing(self.at)
    }

    /// A dump that was refused leaves nothing in the cache.
    pub(super) fn refused(&self) -> Step {
        self.cache_holds_nothing(self.at.other())
    }

    /// The cache frees what nobody wants.
    pub(super) fn drop_snapshot(&self, name: &str) -> Step {
        let work = self.work(self.at);
        control::drop_snapshot(&work, name, true).map_err(|e| format!("drop snapshot {name}: {e}"))?;
        self.cache_holds_nothing(self.at)
    }

    fn cache_holds_nothing(&self, host: Host) -> Step {
        use pb::snapshot_info::State;
        let until = Instant::now() + STEP_LIMIT;
        loop {
            let (snapshots, _) = control::snapshots(Daemon::Cache, &self.work(host))
                .map_err(|e| format!("list of the cache on host {}: {e}", host.name()))?;
            let over = [State::Restored, State::Failed, State::Dropped];
            let held: Vec<_> =
                snapshots.iter().filter(|s| s.resident > 0 || !over.contains(&s.state())).collect();
            if held.is_empty() {
                return Ok(());
            }
            // What the tool said when it ended may not have been looked at yet.
            ensure(Instant::now() < until, || format!("the cache still holds {held:?}"))?;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the daemons; nothing of them may be left, and no image anywhere.
    pub(super) fn finish(&mut self, reaper: &Reaper) -> Step {
        for ((host, name), pid) in std::mem::take(&mut self.daemons) {
            sys::kill(pid, libc::SIGTERM);
            let ended = reaper.wait(pid, STEP_LIMIT);
            ensure(ended == Some(Ended::Exited(0)), || {
                format!("{name} on host {host} ended by SIGTERM: {ended:?}")
            })?;
        }
        for host in [Host::Left, Host::Right] {
            let work = self.work(host);
            for entry in
                std::fs::read_dir(&work).map_err(|e| format!("list {}: {e}", work.display()))?.flatten()
            {
                let name = entry.file_name().to_string_lossy().into_owned();
                let known =
                    WORK_DIR_HOLDS.iter().any(|end| name.ends_with(end)) || certificates::is_one(&name);
                let socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
                ensure(known && !socket, || format!("left in the work dir of host {}: {name}", host.name()))?;
            }
        }
        Ok(())
    }

    /// What the daemons have logged, for the message of a failure.
    pub(super) fn logs(&self) -> String {
        let mut text = String::new();
        for host in [Host::Left, Host::Right] {
            for name in ["image-proxy", "image-cache"] {
                let log = std::fs::read(self.work(host).join(format!("{name}.log"))).unwrap_or_default();
                let log = String::from_utf8_lossy(&log).into_owned();
                let lines: Vec<&str> = log.lines().collect();
                if !lines.is_empty() {
                    let end = lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n");
                    text.push_str(&format!("--- {name} on host {}:\n{end}\n", host.name()));
                }
            }
        }
        text
    }
}

impl From<Stop> for String {
    fn from(stop: Stop) -> String {
        match stop {
            Stop::Skip(text) | Stop::Fail(text) => text,
        }
    }
}
