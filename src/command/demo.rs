//! `crtool demo`: a small workload is started, saved, ended and continued, before the user's eyes.
//!
//! Everything happens in a directory of its own and with this very program: the workload is `crtool demo` with
//! [`workload::DIR`] in its environment, dump and restore are started as a user would start them. At every end,
//! also after Ctrl-C, the processes and the directory are gone.

mod screen;
mod workload;

use std::{
    env,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::{
    image::{ImageKind, framing::EntryReader, pb},
    interrupt,
};
use screen::Screen;
use workload::Progress;

/// How long the workload counts before the dump and after the restore.
const COUNTING: Duration = Duration::from_millis(1200);
/// A step that takes longer than this has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at the workload: often enough to look alive.
const GLANCE: Duration = Duration::from_millis(25);

/// Dumps and restores a small workload; or is that workload.
pub fn run() -> anyhow::Result<()> {
    match env::var_os(workload::DIR) {
        Some(dir) => workload::run(Path::new(&dir)),
        None => Demo::new()?.show(),
    }
}

/// Everything that has to go at the end.
struct Demo {
    dir: PathBuf,
    /// The workload while it is our child.
    pid: Option<Pid>,
    screen: Screen,
}

impl Demo {
    fn new() -> anyhow::Result<Self> {
        interrupt::watch().context("hold back of signals")?;
        // The restored workload loses its parent, the restore command, and is ours then.
        nix::sys::prctl::set_child_subreaper(true).context("set child subreaper")?;
        let template = env::temp_dir().join("crtool-demo-XXXXXX");
        let dir = nix::unistd::mkdtemp(&template).with_context(|| format!("make {}", template.display()))?;
        Ok(Self { dir, pid: None, screen: Screen::new() })
    }

    fn show(mut self) -> anyhow::Result<()> {
        ensure!(nix::unistd::geteuid().is_root(), "dump and restore need root: run the demo as root");
        let images = self.dir.join("images");
        fs::create_dir(&images).with_context(|| format!("make {}", images.display()))?;

        let pid = self.start()?;
        self.screen.say(
            "start",
            &format!(
                "process {pid} counts: {} MiB of memory, 2 threads, a pipe between them, an open file",
                workload::MEMORY >> 20
            ),
        );
        let first = self.count(Progress::default(), COUNTING)?;
        self.screen.say("count", &format!("1 ... {}", first.last));

        let begin = Instant::now();
        self.tool("dump", &["-t", &pid.to_string()], &images)?;
        let took = begin.elapsed();
        ensure!(self.pid.is_none(), "the dump is complete but process {pid} still runs");
        let saved = self.progress(first)?;
        let frozen = frozen(&images).context("statistics of the dump")?;
        self.screen.say(
            "dump",
            &format!(
                "at {}, in {} (frozen {}); {} of images; process {pid} is gone",
                saved.last,
                screen::millis(took),
                screen::millis(frozen),
                screen::mebibytes(size(&images)?),
            ),
        );
        self.rest(Duration::from_millis(400))?;
        ensure!(self.progress(saved)? == saved, "something still counts after the dump");

        let begin = Instant::now();
        self.tool("restore", &["-d"], &images)?;
        let took = begin.elapsed();
        self.pid = Some(pid);
        self.screen.say("restore", &format!("process {pid} runs again, in {}", screen::millis(took)));
        let second = self.count(saved, COUNTING)?;
        self.screen.say("count", &format!("{} ... {}", saved.last + 1, second.last));

        kill(pid, Signal::SIGTERM).context("ask the workload to end")?;
        let end = self.wait()?;
        let last = self.progress(second)?;
        ensure!(end == WaitStatus::Exited(pid, 0), "the workload found its state damaged: {end:?}");
        self.screen.say(
            "end",
            &format!(
                "1 ... {} without a gap, {} before the dump and {} after the restore",
                last.last,
                saved.last,
                last.last - saved.last
            ),
        );
        Ok(())
    }

    /// Starts the workload in a session of its own, with no descriptor of ours.
    fn start(&mut self) -> anyhow::Result<Pid> {
        let child = Command::new("/proc/self/exe")
            .arg("demo")
            .env(workload::DIR, &self.dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start the workload")?;
        let pid = pid_of(&child)?;
        self.pid = Some(pid);
        Ok(pid)
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
            if let Some(end) = self.ended()? {
                bail!("the workload ended too early: {end:?}");
            }
        }
        Ok(now)
    }

    fn progress(&self, from: Progress) -> anyhow::Result<Progress> {
        from.read(&self.dir).context("what the workload wrote")
    }

    /// Runs this program's own `command` and lets the workload's death not go unnoticed meanwhile.
    fn tool(&mut self, command: &str, words: &[&str], images: &Path) -> anyhow::Result<()> {
        let said = self.dir.join(format!("{command}.err"));
        let mut child = Command::new("/proc/self/exe")
            .arg(command)
            .args(words)
            .args(["-v4", "-o", &format!("{command}.log"), "-D"])
            .arg(images)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said).context("make a file for messages")?)
            .spawn()
            .with_context(|| format!("start of {command}"))?;
        let begin = Instant::now();
        let mut told = false;
        let status: ExitStatus = loop {
            // A dead child that nobody reaps still has its pid: the dump waits for that.
            self.ended()?;
            if let Some(status) = child.try_wait()? {
                break status;
            }
            let stop = interrupt::check().is_err() || begin.elapsed() > PATIENCE;
            if stop && !told {
                told = true;
                // It has not been waited for: the pid is its own.
                kill(pid_of(&child)?, Signal::SIGTERM).with_context(|| format!("stop of {command}"))?;
            }
            thread::sleep(Duration::from_millis(1));
        };
        if command == "restore" {
            // Even a restore that failed may have left something; it is our child then.
            self.adopt();
        }
        interrupt::check()?;
        if !status.success() {
            let said = fs::read_to_string(&said).unwrap_or_default();
            bail!("{command} failed ({status}): {}", said.trim());
        }
        Ok(())
    }

    /// Takes charge of a child whose pid is the workload's.
    fn adopt(&mut self) {
        if let Ok(pid) = fs::read_to_string(self.dir.join("pid"))
            && let Ok(pid) = pid.trim().parse().map(Pid::from_raw)
            && waitpid(pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive)
        {
            self.pid = Some(pid);
        }
    }

    /// How the workload ended, if it has.
    fn ended(&mut self) -> anyhow::Result<Option<WaitStatus>> {
        let Some(pid) = self.pid else { return Ok(None) };
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => Ok(None),
            Ok(status) => {
                self.pid = None;
                Ok(Some(status))
            }
            Err(Errno::EINTR) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("wait for process {pid}")),
        }
    }

    /// Waits until the workload has ended.
    fn wait(&mut self) -> anyhow::Result<WaitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
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
        if let Some(pid) = self.pid.take() {
            // Our child, not waited for: nobody else can have this pid.
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn pid_of(child: &Child) -> anyhow::Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id()).context("pid out of range")?))
}

/// The time frozen, from the statistics of the dump.
fn frozen(images: &Path) -> anyhow::Result<Duration> {
    let path = images.join(ImageKind::StatsDump.file_name(None));
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let len = file.metadata()?.len();
    let mut reader = EntryReader::new(file, len, &path);
    reader.expect_magic(ImageKind::StatsDump)?;
    let entry: pb::StatsEntry = reader.next_entry()?.context("no entry")?;
    let dump = entry.dump.context("no numbers of a dump")?;
    Ok(Duration::from_micros(u64::from(dump.frozen_time)))
}

/// All images together.
fn size(images: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(images)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|e| e == "img") {
            sum += entry.metadata()?.len();
        }
    }
    Ok(sum)
}
