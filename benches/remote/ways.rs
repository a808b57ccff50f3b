//! The ways a target can go.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::certificates;
use crate::daemon::{self, Daemon, Watch};
use crate::floor::{self, Form};
use crate::source::Source;
use crate::target::Target;
use crate::tool::{Reaper, Run, Tool};

/// One way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Only the bytes.
    Floor(Form),
    /// crtool, the dump speaks to the cache.
    Direct,
    /// The same, and the restore frees what it has read.
    Free,
    /// crtool with TLS, the dump speaks to the cache.
    DirectTls,
    /// crtool, through image-proxy.
    Proxy,
    /// crtool, through image-proxy, TLS between proxy and cache.
    ProxyTls,
    /// crtool migrate, which speaks to the cache: the source ends last.
    Migrate,
    /// The same through image-proxy.
    MigrateProxy,
    /// Four at once, which take turns; the longest gap of all counts.
    MigrateFour,
    /// CRIU and its page server.
    PageServer,
    /// CRIU, tar over TCP.
    Tar,
}

/// All of them.
pub const WAYS: &[Way] = &[
    Way::Floor(Form::Write),
    Way::Floor(Form::Map),
    Way::Floor(Form::Splice),
    Way::Direct,
    Way::Free,
    Way::DirectTls,
    Way::Proxy,
    Way::ProxyTls,
    Way::Migrate,
    Way::MigrateProxy,
    Way::MigrateFour,
    Way::PageServer,
    Way::Tar,
];

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor(Form::Write) => "floor",
            Self::Floor(Form::Map) => "floor-map",
            Self::Floor(Form::Splice) => "floor-splice",
            Self::Direct => "direct",
            Self::Free => "free",
            Self::DirectTls => "direct-tls",
            Self::Proxy => "proxy",
            Self::ProxyTls => "proxy-tls",
            Self::Migrate => "migrate",
            Self::MigrateProxy => "migrate-proxy",
            Self::MigrateFour => "migrate-four",
            Self::PageServer => "page-server",
            Self::Tar => "tar",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Self::Floor(Form::Write) => "floor, recv and pwrite",
            Self::Floor(Form::Map) => "floor, recv into a mapping",
            Self::Floor(Form::Splice) => "floor, splice",
            Self::Direct => "crtool, direct",
            Self::Free => "crtool, direct, `--free-as-read`",
            Self::DirectTls => "crtool, direct, TLS",
            Self::Proxy => "crtool, through the proxy",
            Self::ProxyTls => "crtool, through the proxy, TLS",
            Self::Migrate => "crtool, `migrate`, direct",
            Self::MigrateProxy => "crtool, `migrate`, through the proxy",
            Self::MigrateFour => "crtool, `migrate` of four at once, direct",
            Self::PageServer => "CRIU, page server",
            Self::Tar => "CRIU, tar over TCP",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        WAYS.iter().copied().find(|way| way.name() == name)
    }

    pub fn needs_peer(self) -> bool {
        matches!(self, Self::PageServer | Self::Tar)
    }
}

/// What one run gave. Times in seconds, sizes in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sample {
    /// From the start of the command until the destination has acknowledged all.
    pub sent: f64,
    /// Longest time in which the target did not run.
    pub gap: Option<f64>,
    /// Processor time of the one who reads the target's memory, and of the target for it.
    pub cpu_dump: f64,
    /// Of the one between.
    pub cpu_proxy: Option<f64>,
    /// Of the one who takes it at the destination.
    pub cpu_cache: Option<f64>,
    /// Of the one who makes the target again, and of the new target for it.
    pub cpu_restore: Option<f64>,
    /// Largest resident size of the proxy.
    pub proxy_peak: Option<u64>,
    /// What the cache keeps in memory: at most, half-way through the restore, and once that is over.
    pub cache: Option<daemon::Kept>,
}

/// Where a run takes place and with what.
#[derive(Debug)]
pub struct Place<'a> {
    pub dir: &'a Path,
    pub source: &'a Source,
    pub ours: &'a Tool,
    pub ours_path: &'a Path,
    pub peer: Option<&'a Tool>,
    pub reaper: &'a Reaper,
    /// Targets that go at the same time.
    pub beside: &'a [Target],
}

fn seconds(run: Run) -> f64 {
    run.wall.as_secs_f64()
}

fn cpu(run: Run) -> f64 {
    run.cpu.as_secs_f64()
}

impl Place<'_> {
    /// Moves `target`, all but the check that it is intact.
    pub fn go(&self, way: Way, target: &Target) -> Result<Sample, String> {
        match way {
            Way::Floor(form) => {
                let (sent, received) = floor::run(form, target, self.reaper)?;
                Ok(Sample {
                    sent: seconds(sent),
                    cpu_dump: cpu(sent),
                    cpu_cache: Some(cpu(received)),
                    ..Sample::default()
                })
            }
            Way::Direct
            | Way::Free
            | Way::DirectTls
            | Way::Proxy
            | Way::ProxyTls
            | Way::Migrate
            | Way::MigrateProxy
            | Way::MigrateFour => self.ours(target, way),
            Way::PageServer => self.page_server(target),
            Way::Tar => self.tar(target),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Takes the end of a target that was dumped: what a tool let it do in its own name, and its end, cost
    /// processor time too, beyond the `before`.
    fn gone(&self, target: &Target, before: f64) -> Result<f64, String> {
        let ended = self.reaper.wait(target.carrier, Duration::from_secs(10));
        let (ended, _) = ended.ok_or_else(|| "the target survived its dump".to_owned())?;
        Ok(ended.cpu.as_secs_f64() - before)
    }

    /// Certificates of this run, and the options that name them.
    fn tls(&self) -> Result<Vec<String>, String> {
        certificates::make(self.dir, &["127.0.0.1"], &self.path("authority-key.pem"))?;
        let files = [
            ("--tls-cacert", certificates::AUTHORITY),
            ("--tls-cert", certificates::CERTIFICATE),
            ("--tls-key", certificates::KEY),
        ];
        let named = files
            .iter()
            .flat_map(|(option, file)| [(*option).to_owned(), self.path(file).display().to_string()]);
        Ok(std::iter::once("--tls".to_owned()).chain(named).collect())
    }

    fn ours(&self, target: &Target, way: Way) -> Result<Sample, String> {
        let through_proxy = matches!(way, Way::Proxy | Way::ProxyTls | Way::MigrateProxy);
        let run_first = matches!(way, Way::Migrate | Way::MigrateProxy | Way::MigrateFour);
        let tls = if matches!(way, Way::DirectTls | Way::ProxyTls) { self.tls()? } else { Vec::new() };
        let tls: Vec<&str> = tls.iter().map(String::as_str).collect();
        let port = daemon::free_port()?;
        let (port_word, pid) = (port.to_string(), target.pid.to_string());
        let start = |name, words: &[&str], ready: &dyn Fn() -> bool| {
            let words: Vec<&str> = words.iter().chain(&tls).copied().collect();
            Daemon::start(name, self.ours_path, &words, self.dir, ready, self.reaper)
        };
        let mut cache_words =
            vec!["image-cache", "--address", "127.0.0.1", "--port", &port_word, "-o", "cache.log"];
        cache_words.extend(run_first.then_some("--restore"));
        let cache = start("image-cache", &cache_words, &|| daemon::listens(port))?;
        let proxy_socket = self.path("img-proxy.sock");
        let proxy_words = ["image-proxy", "--address", "127.0.0.1", "--port", &port_word, "-o", "proxy.log"];
        let proxy = through_proxy
            .then(|| start("image-proxy", &proxy_words, &|| proxy_socket.exists()))
            .transpose()?;

        let work = self.dir.to_string_lossy();
        let mut words = vec!["dump", "-t", &pid, "--remote", "-W", &work, "-o", "dump.log", "-v4"];
        let to = format!("127.0.0.1:{port}");
        if run_first {
            words[0] = "migrate";
            words.remove(3);
            words.extend((!through_proxy).then_some(["--to", &to]).into_iter().flatten());
        } else if !through_proxy {
            words.extend(["--address", "127.0.0.1", "--port", &port_word]);
            words.extend(&tls);
        }
        let watch = Watch::start(cache.pid);
        let out = self.path("out");
        // It may be started first, and then it is: nobody waits for it to start, as nobody would have to.
        let mut restore_words = vec!["restore", "-d", "--remote", "-W", &work, "-o", "restore.log"];
        restore_words.extend((way == Way::Free).then_some("--free-as-read"));
        let restore = match run_first {
            false => Some(self.ours.start(&restore_words, &self.path("out.restore"))?),
            // The cache starts it.
            true => None,
        };
        let others: Vec<_> = self
            .beside
            .iter()
            .map(|other| {
                let (pid, name) = (other.pid.to_string(), format!("beside {}", other.pid));
                let log = format!("{name}.log");
                let words = ["migrate", "-t", &pid, "-W", &work, "-o", &log, "--to", &to, "-D", &name];
                self.ours.behind(&self.source.prefix()).start(&words, &self.path(&name))
            })
            .collect::<Result<_, _>>()?;
        let before = daemon::cpu(target.at);
        let dump = self.ours.behind(&self.source.prefix()).run(self.reaper, &words, &out, false)?;
        let sent = Instant::now();
        for other in others {
            other.end(self.reaper, false)?;
        }
        let in_its_name = self.gone(target, before)?;
        let restore = restore.map(|restore| restore.end(self.reaper, false)).transpose()?;
        let restored = restore.map(|restore| cpu(restore) + daemon::cpu(target.pid));
        let kept = watch.end(sent.elapsed(), Duration::from_secs(5));
        let sample = Sample {
            sent: acknowledged(&self.path("dump.log"))?,
            gap: None,
            cpu_dump: cpu(dump) + in_its_name,
            cpu_proxy: proxy.as_ref().map(Daemon::cpu),
            cpu_cache: Some(cache.cpu()),
            cpu_restore: restored,
            proxy_peak: proxy.as_ref().map(Daemon::peak_kib),
            cache: Some(kept),
        };
        proxy.map(|proxy| proxy.end(self.reaper)).transpose()?;
        cache.end(self.reaper)?;
        Ok(sample)
    }

    fn peer(&self) -> Result<&Tool, String> {
        self.peer.ok_or_else(|| "no CRIU".to_owned())
    }

    fn dirs<const N: usize>(&self, names: [&str; N]) -> Result<[String; N], String> {
        for name in names {
            fs::create_dir(self.path(name)).map_err(|e| format!("make {name}: {e}"))?;
        }
        Ok(names.map(|name| self.path(name).to_string_lossy().into_owned()))
    }

    fn page_server(&self, target: &Target) -> Result<Sample, String> {
        let peer = self.peer()?;
        let [near, far] = self.dirs(["near", "far"])?;
        let port = daemon::free_port()?;
        let (port_word, pid) = (port.to_string(), target.pid.to_string());
        let net = ["--address", "127.0.0.1", "--port", &port_word];
        let server_words = [&["page-server", "-D", &far, "-W", &far, "-o", "server.log"], &net[..]].concat();
        let server = peer.start(&server_words, &self.path("server.out"))?;
        let begin = Instant::now();
        while !daemon::listens(port) {
            if begin.elapsed() > Duration::from_secs(30) {
                return Err("the page server does not get ready".into());
            }
            thread::sleep(Duration::from_millis(2));
        }
        let out = self.path("out");
        let words = ["dump", "-t", &pid, "-D", &near, "-W", &near, "-o", "log", "--page-server"];
        let before = daemon::cpu(target.at);
        let dump =
            peer.behind(&self.source.prefix()).run(self.reaper, &[&words, &net[..]].concat(), &out, false)?;
        let server = server.end(self.reaper, false)?;
        let in_its_name = self.gone(target, before)?;
        // All the rest is small.
        let rest = tar(self.reaper, &near, &far)?;
        let restore =
            peer.run(self.reaper, &["restore", "-d", "-D", &far, "-o", "log.restore"], &out, false)?;
        let restored = cpu(restore) + daemon::cpu(target.pid);
        Ok(Sample {
            sent: seconds(dump) + seconds(rest),
            cpu_dump: cpu(dump) + in_its_name,
            cpu_cache: Some(cpu(server) + cpu(rest)),
            cpu_restore: Some(restored),
            ..Sample::default()
        })
    }

    fn tar(&self, target: &Target) -> Result<Sample, String> {
        let peer = self.peer()?;
        let [near, far] = self.dirs(["near", "far"])?;
        let pid = target.pid.to_string();
        let out = self.path("out");
        let before = daemon::cpu(target.at);
        let dump = peer.behind(&self.source.prefix()).run(
            self.reaper,
            &["dump", "-t", &pid, "-D", &near, "-o", "log"],
            &out,
            false,
        )?;
        let in_its_name = self.gone(target, before)?;
        let sent = tar(self.reaper, &near, &far)?;
        let restore =
            peer.run(self.reaper, &["restore", "-d", "-D", &far, "-o", "log.restore"], &out, false)?;
        let restored = cpu(restore) + daemon::cpu(target.pid);
        Ok(Sample {
            sent: seconds(dump) + seconds(sent),
            cpu_dump: cpu(dump) + in_its_name,
            cpu_proxy: Some(cpu(sent)),
            cpu_restore: Some(restored),
            ..Sample::default()
        })
    }
}

/// Copies a directory over loopback TCP with a tar at either end, whose stdin and stdout are the sockets: what both cost.
fn tar(reaper: &Reaper, near: &str, far: &str) -> Result<Run, String> {
    let failed = |e: std::io::Error| format!("tar: {e}");
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(failed)?;
    let out = TcpStream::connect(listener.local_addr().map_err(failed)?).map_err(failed)?;
    let (into, _) = listener.accept().map_err(failed)?;
    let begin = Instant::now();
    // Its usual 10 KiB at a time would be no fair match.
    let common = ["-b", "512", "-f", "-"];
    let to = Command::new("tar")
        .args(common)
        .args(["-x", "-C", far])
        .stdin(Stdio::from(OwnedFd::from(into)))
        .spawn()
        .map_err(failed)?;
    let from = Command::new("tar")
        .args(common)
        .args(["-c", "-C", near, "."])
        .stdin(Stdio::null())
        .stdout(Stdio::from(OwnedFd::from(out)))
        .spawn()
        .map_err(failed)?;
    let mut total = Run { wall: Duration::ZERO, peak_kib: 0, cpu: Duration::ZERO };
    for tar in [from, to] {
        match reaper.wait(tar.id().cast_signed(), Duration::from_secs(120)) {
            Some((ended, at)) if ended.status == 0 => {
                total.wall = total.wall.max(at - begin);
                total.cpu += ended.cpu;
            }
            ended => return Err(format!("tar failed: {ended:?}")),
        }
    }
    Ok(total)
}

/// When a dump of ours, as its log says, had the acknowledgement; in seconds from its start.
fn acknowledged(log: &Path) -> Result<f64, String> {
    let text = fs::read(log).map_err(|e| format!("{}: {e}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find(|line| line.contains("the cache has all"));
    let time = line.and_then(|line| line.strip_prefix('(')?.split_once(')')?.0.trim().parse().ok());
    time.ok_or_else(|| format!("{} does not say when the cache had all", log.display()))
}

/// The last errors of all logs in a directory.
pub fn errors(dir: &Path) -> String {
    let logs = [
        "dump.log",
        "restore.log",
        "proxy.log",
        "cache.log",
        "near/log",
        "far/server.log",
        "far/log.restore",
    ];
    let mut said = String::new();
    for log in logs {
        let text = fs::read(dir.join(log)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("Error")).collect();
        for line in lines.iter().skip(lines.len().saturating_sub(3)) {
            said += &format!("\n    {log}: {line}");
        }
    }
    said
}
