//! What becomes of the tree once its images are safe.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{
    Unconfirmed,
    tree::{State, Tree},
};
use crate::{
    proc::stat,
    settings::Leave,
    sys::{Errno, task, wait},
};

/// How long to wait for killed tasks to be reaped by their parents.
const REAP_PATIENCE: Duration = Duration::from_secs(2);

/// Kills the tree, or lets it go on running or stopped. `told` is called when it is certain which (with whether
/// the tree goes on): a killed tree runs no instruction any more, but its tasks need not be reaped yet.
pub(super) fn decide(tree: Tree, leave: Leave, told: &dyn Fn(bool) -> Result<()>) -> Result<()> {
    match leave {
        Leave::Killed => kill(tree, told),
        Leave::Running => {
            told(true)?;
            let_go(tree)
        }
        Leave::Stopped => {
            told(true)?;
            for process in tree.processes.iter().filter(|p| p.state == State::Alive) {
                task::kill(process.pid, libc::SIGSTOP)
                    .with_context(|| format!("stop of task {}", process.pid))?;
            }
            let_go(tree)
        }
    }
}

fn let_go(tree: Tree) -> Result<()> {
    // Children before parents, so that nobody misses what a child does first.
    for process in tree.processes.into_iter().rev() {
        for thread in process.threads {
            thread.stopped.detach()?;
        }
    }
    Ok(())
}

fn kill(tree: Tree, told: &dyn Fn(bool) -> Result<()>) -> Result<()> {
    let mut pids = Vec::new();
    for process in &tree.processes {
        if !matches!(process.state, State::Zombie(_)) {
            match task::kill(process.pid, libc::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(e) => return Err(e).with_context(|| format!("kill of task {}", process.pid)),
            }
        }
        pids.push((process.pid, process.starttime));
    }
    // Every moment until the destination may go on is one in which nobody is served.
    let told = told(false).context(Unconfirmed);
    // As their tracer we are told first; only then are their parents.
    for process in tree.processes.into_iter().rev() {
        let mut threads = process.threads;
        threads.reverse();
        for thread in threads {
            let tid = thread.tid();
            thread.stopped.forget();
            loop {
                match wait::wait(tid) {
                    Ok(wait::Status::Exited(_) | wait::Status::Signaled(..)) | Err(_) => break,
                    Ok(_) => {}
                }
            }
        }
    }
    let deadline = Instant::now() + REAP_PATIENCE;
    let mut pause = Duration::from_micros(50);
    loop {
        pids.retain(|(pid, start)| read_stat(*pid).is_some_and(|s| s.starttime == *start));
        let Some((pid, _)) = pids.first().copied() else { return told };
        if Instant::now() > deadline {
            let parent = read_stat(pid).map_or(0, |s| s.ppid);
            let name =
                read_stat(parent).map(|s| String::from_utf8_lossy(&s.comm).into_owned()).unwrap_or_default();
            if pids.len() == 1 {
                tracing::warn!("pid {pid} is still in use: its parent {parent} ({name}) has not reaped it");
                return told;
            }
            let rest: Vec<String> = pids.iter().map(|(p, _)| p.to_string()).collect();
            tracing::warn!(
                "pids {} are still in use: {parent} ({name}) has not reaped {pid}",
                rest.join(" ")
            );
            return told;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

fn read_stat(pid: i32) -> Option<stat::Stat> {
    stat::parse(&std::fs::read(format!("/proc/{pid}/stat")).ok()?).ok()
}
