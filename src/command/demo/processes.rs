//! The processes of the demo: started here, and all gone when [`Processes`] is.
//!
//! Daemons and the restored workload are no children of the demo at first: whoever started them ends, and
//! they come to the demo as the nearest subreaper. All of them have [`MARK`] with the demo's directory in their
//! environment; that is how they are told from children that the caller of the demo may have had.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::destination::Destination;
use crate::{proc::stat, tracee::procfs};

/// In the environment of every process of a demo: its directory.
const MARK: &str = "CRTOOL_DEMO_STAGE";
/// Who does not end by itself after this time is killed.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to look again whether somebody is left.
const UNSURE: Duration = Duration::from_millis(500);

/// Where the workload is.
enum Workload {
    /// Our child.
    Here(Pid),
    /// With this pid there; we see it by another one.
    There { pid: Pid, seen: Pid, at: Destination },
}

/// All processes of the demo.
pub(super) struct Processes {
    mark: Vec<u8>,
    dir: PathBuf,
    workload: Option<Workload>,
}

impl Processes {
    /// Nobody yet. `dir` is the demo's directory.
    pub(super) fn new(dir: &Path) -> anyhow::Result<Self> {
        nix::sys::prctl::set_child_subreaper(true).context("set child subreaper")?;
        let mark = [MARK.as_bytes(), b"=", dir.as_os_str().as_bytes()].concat();
        Ok(Self { mark, dir: dir.to_owned(), workload: None })
    }

    /// Starts the workload.
    pub(super) fn workload(&mut self, command: &mut Command) -> anyhow::Result<Pid> {
        let child = command.env(MARK, &self.dir).spawn().context("start of the workload")?;
        let pid = pid_of(&child)?;
        self.workload = Some(Workload::Here(pid));
        Ok(pid)
    }

    /// Starts a command; its messages go to `said`.
    pub(super) fn tool(
        &self,
        name: &'static str,
        command: &mut Command,
        said: PathBuf,
    ) -> anyhow::Result<Tool> {
        let child = command.env(MARK, &self.dir).spawn().with_context(|| format!("start of {name}"))?;
        Ok(Tool { name, child, said, done: false })
    }

    /// The workload is at the destination.
    pub(super) fn moved(&mut self, pid: Pid, at: Destination) -> anyhow::Result<()> {
        let own = own_ids().context("own pids")?;
        let seen = pids().into_iter().find(|&seen| {
            ids(seen).is_some_and(|ids| ids.len() > own && ids.last() == Some(&pid.as_raw()))
                && self.is_marked(seen)
        });
        let seen = seen.with_context(|| format!("process {pid} is not at the destination"))?;
        self.workload = Some(Workload::There { pid, seen, at });
        Ok(())
    }

    /// By a signal.
    pub(super) fn ask_workload_to_end(&self) -> anyhow::Result<()> {
        match self.workload {
            Some(Workload::Here(pid) | Workload::There { seen: pid, .. }) => {
                kill(pid, Signal::SIGTERM).context("ask the workload to end")
            }
            None => bail!("there is no workload"),
        }
    }

    /// How the workload ended, as a shell says it, if it has.
    pub(super) fn ended(&mut self) -> anyhow::Result<Option<i32>> {
        let status = match &self.workload {
            None => None,
            Some(Workload::There { pid, at, .. }) => at.ended(*pid),
            Some(Workload::Here(pid)) => match waitpid(*pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, status)) => Some(status),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(128 + signal as i32),
                Ok(_) | Err(Errno::EINTR) => None,
                Err(error) => return Err(error).with_context(|| format!("wait for process {pid}")),
            },
        };
        if status.is_some() {
            self.workload = None;
        }
        Ok(status)
    }

    fn is_marked(&self, pid: Pid) -> bool {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|entry| entry == self.mark)
    }

    /// Our children that belong to the demo and are not dead yet. And whether these are all: one
    /// that has ended since it was listed may have left us a child that was not, and one that executes a program shows no
    /// environment for a moment.
    fn left(&self) -> (Vec<Pid>, bool) {
        let mut all = true;
        let left = children()
            .into_iter()
            .filter(|&pid| {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                all &= !environment.is_empty();
                let marked = environment.split(|&byte| byte == 0).any(|entry| entry == self.mark);
                let lives = marked && waitpid(pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive);
                all &= lives || !marked;
                lives
            })
            .collect();
        (left, all)
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let begin = Instant::now();
        let mut told = Vec::new();
        // Whoever ends may leave children to us: until there are none.
        loop {
            let (left, all) = self.left();
            // A child of our caller's may have an empty environment for good.
            if left.is_empty() && (all || begin.elapsed() > UNSURE) {
                break;
            }
            for pid in left {
                // Our child, not waited for: nobody else can have this pid.
                let workload = matches!(self.workload, Some(Workload::Here(here)) if here == pid);
                if begin.elapsed() > PATIENCE || workload {
                    let _ = kill(pid, Signal::SIGKILL);
                } else if !told.contains(&pid) {
                    let _ = kill(pid, Signal::SIGTERM);
                    told.push(pid);
                }
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A command at work.
pub(super) struct Tool {
    name: &'static str,
    child: Child,
    said: PathBuf,
    done: bool,
}

impl Tool {
    pub(super) fn name(&self) -> &str {
        self.name
    }

    /// True when it has succeeded; an error, with what it said, when it has failed.
    pub(super) fn done(&mut self) -> anyhow::Result<bool> {
        if self.done {
            return Ok(true);
        }
        let Some(status) = self.child.try_wait()? else { return Ok(false) };
        self.done = true;
        if !status.success() {
            bail!("{} failed ({status}): {}", self.name, self.said());
        }
        Ok(true)
    }

    /// Its messages.
    pub(super) fn said(&self) -> String {
        let said = fs::read(&self.said).unwrap_or_default();
        String::from_utf8_lossy(&said).replace("Error (crtool): ", "").trim().to_owned()
    }
}

fn pid_of(child: &Child) -> anyhow::Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id()).context("pid out of range")?))
}

/// Everybody.
fn pids() -> Vec<Pid> {
    let number = |name: &OsStr| name.to_str().and_then(|name| name.parse::<i32>().ok());
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| number(&entry.file_name())).map(Pid::from_raw).collect()
}

/// The pids of a process: ours, and those in namespaces further in.
fn ids(pid: Pid) -> Option<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().map(|id| id.parse().ok()).collect()
}

/// How many pids we have ourselves.
fn own_ids() -> Option<usize> {
    ids(Pid::this()).map(|ids| ids.len())
}

/// Our children that are not dead, those of all our threads.
fn children() -> Vec<Pid> {
    let own = std::process::id().cast_signed();
    pids()
        .into_iter()
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/stat"))
                .ok()
                .and_then(|bytes| stat::parse(&bytes).ok())
                .is_some_and(|stat| stat.ppid.get() == own && !procfs::is_dead(&stat))
        })
        .collect()
}
