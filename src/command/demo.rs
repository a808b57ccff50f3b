//! `crtool demo`: a small workload migrates, before the user's eyes.
//!
//! A cache and a proxy are started on the loopback interface, a restore that waits, and a dump: the workload goes
//! through memory from one to the other and counts on where it stopped. Everything is done with this very program as a
//! user would do it; the workload is `crtool demo` with [`workload::DIR`] in its environment. Source and
//! destination are two directories below one of the demo's own. At every end, also after Ctrl-C, the processes
//! and the directory are gone.

mod processes;
mod screen;
mod workload;

use std::{
    env,
    fs::{self, File},
    io::Write as _,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::WaitStatus,
    },
    unistd::Pid,
};

use crate::{
    image::{ImageKind, framing::EntryReader, pb},
    interrupt,
};
use processes::{Processes, Tool};
use screen::Screen;
use workload::Progress;

/// How long the workload counts before and after it migrates.
const COUNTING: Duration = Duration::from_millis(1200);
/// A step that takes longer than this has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at the workload: often enough to look alive.
const GLANCE: Duration = Duration::from_millis(25);
/// What the demo writes is logs and numbers; with this much room it does not run out of it.
const ROOM: usize = 4 << 20;
/// How often another port is tried: the free one that was found may be taken by somebody before the cache has it.
const PORTS: u32 = 5;

/// Migrates a small workload; or is that workload.
pub fn run() -> anyhow::Result<()> {
    match env::var_os(workload::DIR) {
        Some(dir) => workload::run(Path::new(&dir)),
        None => Demo::new()?.show(),
    }
}

struct Demo {
    // Fields are dropped in this order: first whoever uses the directory.
    processes: Processes,
    workspace: Workspace,
    screen: Screen,
}

/// The directory of the demo, gone at its end.
struct Workspace(PathBuf);

impl Workspace {
    fn build() -> anyhow::Result<Self> {
        let template = env::temp_dir().join("crtool-demo-XXXXXX");
        let dir = nix::unistd::mkdtemp(&template).with_context(|| format!("make {}", template.display()))?;
        let workspace = Self(dir);
        for side in [workspace.source(), workspace.destination()] {
            fs::create_dir(&side).with_context(|| format!("make {}", side.display()))?;
        }
        let trial = workspace.0.join("room");
        File::create(&trial)
            .and_then(|mut file| file.write_all(&vec![1; ROOM]))
            .with_context(|| format!("{} needs {} MiB of room", env::temp_dir().display(), ROOM >> 20))
            .context("set TMPDIR to a directory that has it")?;
        fs::remove_file(trial)?;
        Ok(workspace)
    }

    fn source(&self) -> PathBuf {
        self.0.join("src")
    }

    fn destination(&self) -> PathBuf {
        self.0.join("dst")
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Demo {
    fn new() -> anyhow::Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "dump and restore need root: run the demo as root");
        interrupt::watch().context("hold back of signals")?;
        let workspace = Workspace::build()?;
        let processes = Processes::new(&workspace.0)?;
        Ok(Self { processes, workspace, screen: Screen::new() })
    }

    fn show(mut self) -> anyhow::Result<()> {
        let pid = self.start()?;
        self.screen.say(
            "start",
            &format!(
                "process {pid} counts: {} MiB of memory, 2 threads, a pipe between them, an open file",
                workload::MEMORY >> 20
            ),
        );
        let port = self.cache()?;
        self.screen.say("cache", &format!("image-cache holds images in memory, port {port} of 127.0.0.1"));
        self.proxy(port)?;
        self.screen.say("proxy", "image-proxy carries them there");
        let first = self.count(Progress::default(), COUNTING)?;
        self.screen.say("count", &format!("1 ... {}", first.last));

        let destination = self.workspace.destination();
        let mut waiting = self.tool("restore", &["--remote", "-d"], &destination)?;
        let dump = self.tool("dump", &["--remote", "-t", &pid.to_string()], &self.workspace.source())?;
        self.finish(dump, Some(&mut waiting))?;
        let saved = Carried::read(&self.workspace.source()).context("statistics of the dump")?;
        self.screen.say(
            "dump",
            &format!(
                "{} in {}, {} per second; then process {pid} is ended",
                screen::mebibytes(saved.bytes),
                screen::millis(saved.frozen),
                screen::mebibytes(saved.per_second()),
            ),
        );
        self.finish(waiting, None)?;
        self.processes.restored(pid);
        let second = self.count(first, COUNTING)?;
        self.screen.say(
            "restore",
            &format!("process {pid} runs again; it stood still for {}", screen::millis(second.pause)),
        );
        self.screen.say("count", &format!("{} ... {}", first.last + 1, second.last));

        kill(pid, Signal::SIGTERM).context("ask the workload to end")?;
        let end = self.wait()?;
        let last = self.progress(second)?;
        ensure!(end == WaitStatus::Exited(pid, 0), "the workload found its state damaged: {end:?}");
        self.screen.say("end", &format!("1 ... {} without a gap", last.last));
        Ok(())
    }

    /// Starts the workload in a session of its own, with no descriptor of ours.
    fn start(&mut self) -> anyhow::Result<Pid> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("demo")
            .env(workload::DIR, &self.workspace.0)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.processes.workload(&mut command)
    }

    /// Starts a cache on a port that is free, and tells which.
    fn cache(&mut self) -> anyhow::Result<u16> {
        let mut tries = 0;
        loop {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("look for a free port")?;
            let port = free.local_addr()?.port();
            drop(free);
            tries += 1;
            match self.daemon("image-cache", port, &self.workspace.destination()) {
                Err(error) if tries < PORTS && format!("{error:#}").contains("in use") => {}
                result => return result.map(|()| port),
            }
        }
    }

    fn proxy(&mut self, port: u16) -> anyhow::Result<()> {
        self.daemon("image-proxy", port, &self.workspace.source())
    }

    /// Starts a daemon; returns when it can be reached.
    fn daemon(&mut self, command: &'static str, port: u16, dir: &Path) -> anyhow::Result<()> {
        let port = port.to_string();
        let tool = self.tool(command, &["-d", "--address", "127.0.0.1", "--port", &port], dir)?;
        self.finish(tool, None)
    }

    /// Watches the workload count for a while.
    fn count(&mut self, from: Progress, time: Duration) -> anyhow::Result<Progress> {
        let begin = Instant::now();
        let mut now = from;
        while begin.elapsed() < time || now == from {
            ensure!(begin.elapsed() < PATIENCE, "the workload does not count: it stays at {}", now.last);
            self.rest(GLANCE)?;
            now = self.progress(now)?;
            self.screen.watch("count", now.last);
            if let Some(end) = self.processes.ended()? {
                bail!("the workload ended too early: {end:?}");
            }
        }
        Ok(now)
    }

    fn progress(&self, from: Progress) -> anyhow::Result<Progress> {
        from.read(&self.workspace.0).context("what the workload wrote")
    }

    /// Starts this program's own `command`.
    fn tool(&self, command: &'static str, words: &[&str], dir: &Path) -> anyhow::Result<Tool> {
        let log = format!("{command}.log");
        let said = dir.join(format!("{command}.err"));
        let mut child = Command::new("/proc/self/exe");
        child
            .arg(command)
            .args(words)
            .args(["--no-default-config", "-v3", "-o", &log, "-W"])
            .arg(dir)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said).with_context(|| format!("make {}", said.display()))?);
        self.processes.tool(command, &mut child, said)
    }

    /// Waits until `tool` has done its work, and looks at `other` meanwhile: if that fails, `tool` waits in vain.
    fn finish(&mut self, mut tool: Tool, mut other: Option<&mut Tool>) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            // A dead child that nobody reaps still has its pid: dump and restore wait for that.
            self.processes.ended()?;
            if tool.done()? {
                return Ok(());
            }
            if let Some(other) = other.as_mut() {
                other.done()?;
            }
            interrupt::check()?;
            ensure!(begin.elapsed() < PATIENCE, "{} takes too long", tool.name());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the workload has ended.
    fn wait(&mut self) -> anyhow::Result<WaitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.processes.ended()? {
                return Ok(status);
            }
            ensure!(begin.elapsed() < PATIENCE, "the workload does not end");
            self.rest(Duration::from_millis(1))?;
        }
    }

    /// Sleeps, unless the user has had enough.
    fn rest(&self, time: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + time;
        loop {
            interrupt::check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(GLANCE));
        }
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        self.screen.clear();
    }
}

/// What a dump has carried.
struct Carried {
    bytes: u64,
    frozen: Duration,
}

impl Carried {
    /// From the statistics that it wrote.
    fn read(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(ImageKind::StatsDump.file_name(None));
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let len = file.metadata()?.len();
        let mut reader = EntryReader::new(file, len, &path);
        reader.expect_magic(ImageKind::StatsDump)?;
        let entry: pb::StatsEntry = reader.next_entry()?.context("no entry")?;
        let dump = entry.dump.context("no numbers of a dump")?;
        Ok(Self {
            bytes: dump.pages_written * 4096,
            frozen: Duration::from_micros(u64::from(dump.frozen_time)),
        })
    }

    /// Bytes per second of the freeze.
    fn per_second(&self) -> u64 {
        let micros = u64::try_from(self.frozen.as_micros()).unwrap_or(u64::MAX).max(1);
        self.bytes.saturating_mul(1_000_000) / micros
    }
}
