//! What becomes of the tree once its images are safe.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::{
    Fate, HandOver, Unconfirmed,
    stopped::{Before, go_on, stop_for_good},
    tree::{State, Tree},
};
use crate::{
    exit::{Exit, Incomplete},
    settings::Leave,
    sys::{Errno, own, pid::HostPid, ptrace, task, wait},
    task::robust_list::{self, SharedBytes},
    tracee::{Decision, KillGuard, Stage, Thread, TraceError, procfs},
};

/// How long to wait for killed tasks to be reaped by their parents.
const REAP_PATIENCE: Duration = Duration::from_secs(2);

/// What holds whatever goes wrong here.
const SAFE: Incomplete = Incomplete("the images are complete");

/// Kills the tree, or lets it go on running or stopped. `told` is called when it is certain which (with whether
/// the tree goes on): a killed tree runs no instruction any more, but its tasks need not be reaped yet.
///
/// `words` are those that the kernel would clear in files that others may have mapped.
pub(super) fn decide(
    tree: Tree,
    leave: Leave,
    decision: &Decision,
    words: Vec<SharedBytes>,
    told: &dyn Fn(bool) -> Result<()>,
) -> Result<()> {
    match leave {
        Leave::Killed => kill(tree, decision, words, told),
        Leave::Running => {
            told(true)?;
            let_go(tree, None).context(SAFE)
        }
        Leave::Stopped => {
            told(true)?;
            let mut failed = None;
            for process in tree.processes.iter().filter(|p| p.state == State::Alive) {
                if let Err(e) = task::kill(process.pid, libc::SIGSTOP) {
                    failed.get_or_insert(anyhow!(e).context(format!("stop of task {}", process.pid)));
                }
            }
            let_go(tree, failed).context(SAFE)
        }
    }
}

/// Hands the tree over: it runs there before it ends here. An error before [`HandOver::go`], or the word that it does not
/// run there, lets it go on here.
pub(super) fn hand_over(
    tree: Tree,
    decision: &Decision,
    words: Vec<SharedBytes>,
    to: &dyn HandOver,
) -> Result<()> {
    to.armed()?;
    let before = Before::of(&tree)?;
    // Before the tree is stopped for good: whoever finds it stopped finds this too.
    to.stopping(&before)?;
    // From here on the end of crtool leaves the tree stopped, so that it does not run in two places.
    let begun = stop_for_good(&tree, &before).and_then(|()| to.go());
    match begun {
        Ok(Fate::There) => kill(tree, decision, words, &|_| Ok(())),
        Ok(Fate::Here(why)) => {
            go_on(tree, &before).context(SAFE)?;
            Err(anyhow!(why))
        }
        Err(error) => {
            go_on(tree, &before).context(SAFE)?;
            Err(error)
        }
    }
}

/// Lets everybody go, also when that fails for one; `failed` is what went wrong before.
pub(super) fn let_go(tree: Tree, mut failed: Option<anyhow::Error>) -> Result<()> {
    let mut dying = Vec::new();
    // Children before parents, so that nobody misses what a child does first; leaders after the other threads, because
    // the end of a leader is reported only after all others have ended.
    for process in tree.processes.into_iter().rev() {
        for thread in process.threads.into_iter().rev() {
            let tid = thread.tid();
            thread.stopped.forget();
            match ptrace::detach(tid, 0) {
                Ok(()) => {}
                Err(Errno::ESRCH) => dying.push((process.pid, tid)),
                Err(e) => {
                    failed.get_or_insert(anyhow!(e).context(format!("release of task {tid}")));
                }
            }
        }
    }
    // Not before all have been let go: whoever executes a program, and so ends these, waits for their ends to be taken.
    let deadline = Instant::now() + REAP_PATIENCE;
    for (pid, tid) in dying {
        // A thread that another one ends by executing a program exits with 0, and a leader whose pid it takes is not
        // there any more: such a process goes on. The report tells it from one that was killed, which may take a while
        // to be seen dead in /proc.
        if matches!(end_of(tid, deadline), Some(wait::Status::Signaled(..))) {
            failed.get_or_insert(anyhow!(TraceError::Died(tid)).context(format!("release of task {pid}")));
        }
    }
    failed.map_or(Ok(()), Err)
}

/// How a dying thread ends; `None` if somebody else has its id, or if it does not end in time, since it writes a core or
/// closes a file that does not answer.
fn end_of(tid: HostPid, deadline: Instant) -> Option<wait::Status> {
    let mut pause = Duration::from_micros(20);
    loop {
        match wait::poll(tid) {
            Ok(Some((_, end @ (wait::Status::Exited(_) | wait::Status::Signaled(..))))) => return Some(end),
            Ok(_) | Err(Errno::EINTR) if Instant::now() < deadline => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
            _ => return None,
        }
    }
}

/// Kills everybody, the root first: when it is dead or about to die, so is the whole tree.
fn kill(
    tree: Tree,
    decision: &Decision,
    mut words: Vec<SharedBytes>,
    told: &dyn Fn(bool) -> Result<()>,
) -> Result<()> {
    let alive = || tree.processes.iter().filter(|p| !matches!(p.state, State::Zombie(_)));
    let pids: Vec<HostPid> = alive().map(|p| p.pid).collect();
    let kill_guard = match KillGuard::arm(&pids, decision) {
        Ok(kill_guard) => Some(kill_guard),
        Err(error) => {
            tracing::warn!("if crtool is killed now, a part of the tree runs on: {:#}", anyhow!(error));
            None
        }
    };
    // The point of no return. Killed before, crtool leaves all of the tree running, after it nothing.
    decision.advance(Stage::Begun).context("decide that the tree is killed")?;
    // One thread of each process first, which is enough for all of them.
    let leaders = alive().flat_map(|p| p.threads.first());
    for tid in leaders.chain(alive().flat_map(|p| p.threads.iter().skip(1))).map(Thread::tid) {
        match ptrace::set_options(tid, ptrace::O_EXITKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => tracing::warn!("thread {tid} would outlive crtool if it were killed now: {e}"),
        }
    }
    own::set_out_of_memory_status(Exit::Incomplete.status());
    // From here on the tree dies, whatever happens.
    for tid in alive().flat_map(|p| &p.threads).map(Thread::tid) {
        if let Err(error) = robust_list::disarm(tid, &mut words) {
            tracing::warn!("locks that thread {tid} holds may be found broken: {:#}", anyhow!(error));
        }
    }
    let mut failed = None;
    for pid in &pids {
        match task::kill(*pid, libc::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => {
                failed.get_or_insert(anyhow!(e).context(format!("kill of task {pid}")));
            }
        }
    }
    let killed = match failed {
        Some(error) => Err(error),
        None => decision.advance(Stage::Killed).context("say that the tree is killed"),
    };
    // Before somebody else may have these pids.
    if let Some(kill_guard) = kill_guard {
        kill_guard.dismiss();
    }
    killed.context(SAFE)?;
    if !words.is_empty() {
        // Whoever is told may go on with these files.
        reap(tree);
        words.iter().for_each(SharedBytes::put_back);
        return told(false).context(Unconfirmed);
    }
    // Every moment until the destination may go on is one in which nobody is served.
    let told = told(false).context(Unconfirmed);
    reap(tree);
    told
}

/// Takes the end of everybody, and waits a while for their parents to do so.
fn reap(tree: Tree) {
    let mut pids: Vec<(HostPid, u64)> = tree.processes.iter().map(|p| (p.pid, p.starttime)).collect();
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
        pids.retain(|(pid, start)| procfs::stat(*pid).is_ok_and(|s| s.starttime == *start));
        let Some((pid, _)) = pids.first().copied() else { return };
        if Instant::now() > deadline {
            let parent = procfs::stat(pid).map_or(HostPid::NONE, |s| s.ppid);
            let name = procfs::stat(parent)
                .map(|s| String::from_utf8_lossy(&s.comm).into_owned())
                .unwrap_or_default();
            if pids.len() == 1 {
                tracing::warn!("pid {pid} is still in use: its parent {parent} ({name}) has not reaped it");
                return;
            }
            let rest: Vec<String> = pids.iter().map(|(p, _)| p.to_string()).collect();
            tracing::warn!(
                "pids {} are still in use: {parent} ({name}) has not reaped {pid}",
                rest.join(" ")
            );
            return;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
