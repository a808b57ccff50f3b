//! The demo's destination: a pid namespace of its own, as another host has, with an image-cache that restores.
//!
//! A tree keeps its pids, and the one at the source runs until the restored one does, so both cannot be in one pid
//! namespace. A process makes the namespace, and its first child there is the init that starts the cache and reaps. If either ends, the
//! kernel ends everybody in it. What init has to say lies in files of the destination's directory: [`READY`], and [`ENDED`] with
//! a line `PID STATUS` for each child.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        signal::{SigSet, Signal},
        wait::{WaitStatus, wait},
    },
    unistd::Pid,
};

/// In the environment: the directory of the destination, and that makes `crtool demo` the destination.
pub(super) const DIR: &str = "CRTOOL_DEMO_DESTINATION";
/// In the environment: the arguments of the cache, a line each.
pub(super) const CACHE: &str = "CRTOOL_DEMO_CACHE";
/// In the environment of init: it is that.
const INIT: &str = "CRTOOL_DEMO_INIT";
/// In the environment: pids from here on are given out in the namespace, so that those of the tree are free there.
pub(super) const FIRST_PID: &str = "CRTOOL_DEMO_FIRST_PID";
/// Made when the cache can be reached.
const READY: &str = "ready";
/// What has ended, and how.
const ENDED: &str = "ended";

/// Is the destination until somebody ends it.
pub(super) fn run(dir: &Path) -> anyhow::Result<()> {
    // Nobody is left behind when the demo is killed.
    set_pdeathsig(Signal::SIGKILL).context("signal at the end of the parent")?;
    // Whoever is told to end ends.
    SigSet::all().thread_unblock().context("signals")?;
    if env::var_os(INIT).is_some() {
        return init(dir);
    }
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)
        .context("a pid namespace for the destination (the demo needs CAP_SYS_ADMIN)")?;
    let mut child = Command::new("/proc/self/exe").arg("demo").env(INIT, "1").spawn()?;
    let status = child.wait()?;
    ensure!(status.success(), "the destination ended: {status}");
    Ok(())
}

fn init(dir: &Path) -> anyhow::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("mounts of the destination")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, none).context("/proc of the destination")?;
    if let Ok(first) = env::var(FIRST_PID) {
        fs::write("/proc/sys/kernel/ns_last_pid", first).context("first pid of the destination")?;
    }
    let words = env::var(CACHE).context("no arguments of the cache")?;
    let mut cache = Some(start(&words)?);
    loop {
        match wait().context("wait for children")? {
            WaitStatus::Exited(pid, status) if cache.as_ref().is_some_and(|cache| is(cache, pid)) => {
                if status != 0 {
                    // It has said why.
                    return Ok(());
                }
                cache = None;
                fs::write(dir.join(READY), "")?;
            }
            WaitStatus::Exited(pid, status) => note(dir, pid, status)?,
            WaitStatus::Signaled(pid, signal, _) => note(dir, pid, 128 + signal as i32)?,
            _ => {}
        }
    }
}

/// Returns when the cache has been started; what is started ends when the cache can be reached.
fn start(words: &str) -> anyhow::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.args(words.lines()).env_remove(DIR).env_remove(CACHE).env_remove(INIT).stdin(Stdio::null());
    command.spawn().context("start of image-cache")
}

fn is(child: &Child, pid: Pid) -> bool {
    child.id().cast_signed() == pid.as_raw()
}

fn note(dir: &Path, pid: Pid, status: i32) -> anyhow::Result<()> {
    let mut file = fs::OpenOptions::new().create(true).append(true).open(dir.join(ENDED))?;
    Ok(file.write_all(format!("{pid} {status}\n").as_bytes())?)
}

/// The destination, as the demo sees it.
#[derive(Debug, Clone)]
pub(super) struct Destination(PathBuf);

impl Destination {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Whether its cache can be reached.
    pub(super) fn is_ready(&self) -> bool {
        self.0.join(READY).exists()
    }

    /// How its process `pid` ended, as a shell says it, if it has.
    pub(super) fn ended(&self, pid: Pid) -> Option<i32> {
        let all = fs::read_to_string(self.0.join(ENDED)).ok()?;
        let ends = all.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.split_once(' '));
        ends.filter(|(ended, _)| *ended == pid.to_string()).find_map(|(_, status)| status.parse().ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let there = Destination::new(dir.path().to_owned());
        assert_eq!(there.ended(Pid::from_raw(7)), None);
        note(dir.path(), Pid::from_raw(77), 1).unwrap();
        note(dir.path(), Pid::from_raw(7), 137).unwrap();
        assert_eq!(there.ended(Pid::from_raw(7)), Some(137));
        fs::write(dir.path().join(ENDED), "7 1").unwrap();
        assert_eq!(there.ended(Pid::from_raw(7)), None, "not all of the line is there");
    }
}
