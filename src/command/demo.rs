//! `crtool demo`: a small workload migrates, before the user's eyes.
//!
//! The destination is a pid namespace with an image-cache on the loopback interface ([`destination`]); `crtool migrate` moves the
//! workload there, through memory, and it counts on where it stopped. Everything is done with this very program as a user would do it; the workload is
//! `crtool demo` with [`workload::DIR`] in its environment. At every end, also after Ctrl-C, the processes and the directory are gone.

mod destination;
mod processes;
mod screen;
mod workload;

use std::{
    env,
    fs::{self, File},
    io::Write as _,
    net::{Ipv4Addr, TcpListener},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nix::unistd::Pid;

use crate::{
    image::{ImageKind, framing::EntryReader, pb},
    interrupt,
};
use destination::Destination;
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
    if let Some(dir) = env::var_os(workload::DIR) {
        return workload::run(Path::new(&dir));
    }
    match env::var_os(destination::DIR) {
        Some(dir) => destination::run(Path::new(&dir)),
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
        let (there, port) = self.destination(pid)?;
        self.screen.say(
            "cache",
            &format!("image-cache --restore waits in another pid namespace, port {port} of 127.0.0.1"),
        );
        let first = self.count(Progress::default(), COUNTING)?;
        self.screen.say("count", &format!("1 ... {}", first.last));

        let to = format!("127.0.0.1:{port}");
        let migrate =
            self.tool("migrate", &["-t", &pid.to_string(), "--to", &to], &self.workspace.source())?;
        self.finish(migrate)?;
        let saved = carried(&self.workspace.source()).context("statistics of the migration")?;
        self.processes.moved(pid, there)?;
        let second = self.count(first, COUNTING)?;
        self.screen.say(
            "migrate",
            &format!(
                "{} through memory; process {pid} runs there and is ended here; it stood still for {}",
                screen::mebibytes(saved),
                screen::millis(second.pause),
            ),
        );
        self.screen.say("count", &format!("{} ... {}", first.last + 1, second.last));

        self.processes.ask_workload_to_end()?;
        let end = self.wait()?;
        let last = self.progress(second)?;
        ensure!(end == 0, "the workload found its state damaged: status {end}");
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

    /// Starts the destination of process `pid`, on a port that is free; tells which.
    fn destination(&mut self, pid: Pid) -> anyhow::Result<(Destination, u16)> {
        let mut tries = 0;
        loop {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("look for a free port")?;
            let port = free.local_addr()?.port();
            drop(free);
            tries += 1;
            match self.start_destination(pid, port) {
                Err(error) if tries < PORTS && format!("{error:#}").contains("in use") => {}
                result => return result.map(|there| (there, port)),
            }
        }
    }

    fn start_destination(&mut self, pid: Pid, port: u16) -> anyhow::Result<Destination> {
        let dir = self.workspace.destination();
        let work_dir = dir.display().to_string();
        let words = [
            "image-cache",
            "-d",
            "--restore",
            "--address",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--no-default-config",
            "-v3",
            "-o",
            "image-cache.log",
            "-W",
            &work_dir,
        ]
        .join("\n");
        // Far from the pids of the tree, which have to be free there.
        let first_pid = if pid.as_raw() < 10_000 { 20_000 } else { 300 };
        let said = dir.join("image-cache.err");
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("demo")
            .env(destination::DIR, &dir)
            .env(destination::CACHE, words)
            .env(destination::FIRST_PID, first_pid.to_string())
            .current_dir(&dir)
            // Ctrl-C is for the demo.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said).with_context(|| format!("make {}", said.display()))?);
        let mut tool = self.processes.tool("the destination", &mut command, said)?;
        let there = Destination::new(dir);
        let begin = Instant::now();
        while !there.is_ready() {
            ensure!(!tool.done()?, "the destination has ended: {}", tool.said());
            interrupt::check()?;
            ensure!(begin.elapsed() < PATIENCE, "{} takes too long", tool.name());
            thread::sleep(Duration::from_millis(1));
        }
        Ok(there)
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
                bail!("the workload ended too early: status {end}");
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

    /// Waits until `tool` has done its work.
    fn finish(&mut self, mut tool: Tool) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            // A dead child that nobody reaps still has its pid.
            self.processes.ended()?;
            if tool.done()? {
                return Ok(());
            }
            interrupt::check()?;
            ensure!(begin.elapsed() < PATIENCE, "{} takes too long", tool.name());
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the workload has ended.
    fn wait(&mut self) -> anyhow::Result<i32> {
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

/// Bytes of memory that a migration has carried, from the statistics that it wrote.
fn carried(dir: &Path) -> anyhow::Result<u64> {
    let path = dir.join(ImageKind::StatsDump.file_name(None));
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let len = file.metadata()?.len();
    let mut reader = EntryReader::new(file, len, &path);
    reader.expect_magic(ImageKind::StatsDump)?;
    let entry: pb::StatsEntry = reader.next_entry()?.context("no entry")?;
    Ok(entry.dump.context("no numbers of a dump")?.pages_written * 4096)
}
