//! `crtool restore`.

mod job;

use std::{
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};

use super::{explained, report, watchdog::Watchdog};
use crate::{
    exit::{Exit, Incomplete},
    interrupt,
    progress::{Shown, Surface},
    remote::client::RemoteSnapshot,
    restore::Restored,
    settings::{RemoteSettings, ReportSettings, RestoreSettings},
    sys,
};

/// Restores a tree and, unless detached, stays as its parent until its root ends.
pub fn run(settings: &RestoreSettings, report: ReportSettings) -> anyhow::Result<Exit> {
    interrupt::watch().context("hold back of signals")?;
    let watchdog =
        Watchdog::start("restore".into(), "nothing is left of what was restored").context("watchdog")?;
    let shown = Shown::begin(Surface::Terminal);
    let restored = match &settings.remote {
        None => crate::restore::restore(settings)
            .map_err(explained)
            .with_context(|| format!("restore from {}", settings.common.images_dir.display()))?,
        Some(remote) => from_cache(settings, remote)
            .map_err(explained)
            .with_context(|| format!("restore of snapshot {}", remote.snapshot))?,
    };
    drop(shown);
    // From here on crtool waits for the tree, if at all.
    drop(watchdog);
    done(settings, report, restored)
}

/// Restores from the cache of this host; what fails leaves the snapshot there.
fn from_cache(settings: &RestoreSettings, remote: &RemoteSettings) -> anyhow::Result<Restored> {
    let (begun, mut wait) = (Instant::now(), remote.wait_snapshot);
    loop {
        let store = RemoteSnapshot::take(remote, wait)?;
        match crate::restore::restore_from(&store, settings) {
            // Its tree runs on at the source, and may be sent again.
            Err(error) if store.has_passed() && remote.snapshot_id == 0 => {
                tracing::warn!("{:#}; waiting for the next one", explained(error));
                // In whole seconds, for messages.
                wait = remote.wait_snapshot.saturating_sub(Duration::from_secs(begun.elapsed().as_secs()));
            }
            restored => return restored.inspect_err(|error| store.give_up(&format!("{error:#}"))),
        }
    }
}

/// What remains when the tree with root `root` runs.
pub fn done(settings: &RestoreSettings, report: ReportSettings, restored: Restored) -> anyhow::Result<Exit> {
    let Restored { root, stats, job } = restored;
    const RUNS: Incomplete = Incomplete("the tree is restored and runs");
    if let Err(error) = stats.write(&settings.common.work_dir, settings.common.owner_check) {
        tracing::warn!("{:#}", anyhow::Error::from(error));
    }
    if report.display_stats {
        report::display(&stats);
    }
    report::ready(report.status_fd).context(RUNS)?;
    tracing::info!("Restore finished successfully. Tasks resumed.");
    if let Some([program, arguments @ ..]) = settings.exec_cmd.as_deref() {
        let error = sys::own::with_first_limits(Command::new(program).args(arguments)).exec();
        return Err(error).with_context(|| format!("exec of {}", program.display())).context(RUNS);
    }
    if settings.detached {
        return Ok(Exit::Success);
    }
    // Opened while it is our child and not reaped: it cannot be anybody else.
    let pidfd = sys::pidfd::open(root.as_raw(), 0)
        .with_context(|| format!("wait for restored root {root}"))
        .context(RUNS)?;
    let ended = match job {
        None => wait(root, pidfd.as_fd()),
        Some(terminal) => job::wait(root, pidfd.as_fd(), terminal),
    };
    ended.with_context(|| format!("wait for restored root {root}"))
}

/// Waits for the end of a child, or for a signal that tells us to stop waiting.
fn wait(root: Pid, pidfd: BorrowedFd<'_>) -> anyhow::Result<Exit> {
    let signals = interrupt::watch()?;
    loop {
        if let Err(interrupted) = interrupt::check() {
            tracing::warn!("{interrupted}; the restored tree runs on");
            return Ok(Exit::Tree(death(interrupted.signal)));
        }
        let mut fds =
            [PollFd::new(pidfd, PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds.first().and_then(PollFd::any) == Some(true) {
            break;
        }
    }
    end(waitpid(root, None)?)
}

/// The answer for a root that has ended.
fn end(status: WaitStatus) -> anyhow::Result<Exit> {
    match status {
        WaitStatus::Exited(_, status) => {
            // The kernel keeps eight bits of it.
            Ok(Exit::Tree(u8::try_from(status & 0xff).unwrap_or(1)))
        }
        WaitStatus::Signaled(_, signal, _) => Ok(Exit::Tree(death(signal))),
        other => anyhow::bail!("it neither exited nor died: {other:?}"),
    }
}

/// The shell's way to tell a signal.
fn death(signal: nix::sys::signal::Signal) -> u8 {
    u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::RestoreStats;

    #[expect(clippy::zombie_processes, reason = "what is tested waits for it")]
    fn waited(script: &str) -> Exit {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let mut settings = RestoreSettings::new(std::path::Path::new("."));
        let dir = tempfile::tempdir().unwrap();
        settings.common.work_dir = dir.path().to_owned();
        let restored = Restored { root: pid, stats: RestoreStats::default(), job: None };
        done(&settings, ReportSettings::default(), restored).unwrap()
    }

    #[test]
    fn status_of_the_tree() {
        assert_eq!(waited("exit 0"), Exit::Tree(0));
        assert_eq!(waited("sleep 0.05; exit 7"), Exit::Tree(7));
        assert_eq!(waited("kill -KILL $$"), Exit::Tree(137));
    }
}
