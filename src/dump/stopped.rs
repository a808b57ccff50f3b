//! A tree that stays stopped while nobody knows where it runs, and goes on here after all.
//!
//! A tree that may run elsewhere must not run here, not even when crtool is killed. So its processes are brought into a group stop
//! while their threads are held, which they stay in when they are held no more. The root is sent SIGSTOP and held as it is, so that its
//! parent, outside of the tree, is not told of a stop that may never be seen: whichever thread goes on first takes the signal before it
//! executes anything. [`go_on`] takes all of that back; if crtool was killed, another one holds the tree again before it does
//! ([`go_on_again`]). The tree is as it was frozen then, and its programs notice nothing:
//!
//! - Processes that somebody else had stopped before stay stopped.
//! - Only SIGCONT ends a group stop. It is sent while all threads are held, and kept from the program. What the kernel
//!   tells parents within the tree of the stop and of its end (SIGCHLD, wait with WCONTINUED) is taken back too. The former at once:
//!   SIGCHLD has a lower number than SIGSTOP, so that a parent which is let go would enter its handler before it stops.
//! - A stop signal discards SIGCONTs that wait because they are blocked, and SIGCONT discards stop signals. Those are
//!   queued again, by their own threads, since nobody else may send any siginfo.
//!
//! Not taken back: when crtool was killed, the parent of the root is told that its child has stopped and that it goes on. A SIGCHLD that
//! waits for a parent of which a child has died stays, whatever it tells of.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result, anyhow};

use super::{
    finish::let_go,
    tree::{Process, State, Tree},
};
use crate::{
    deadline::{Deadline, Limit},
    sys::{
        pid::{HostPid, NsPid},
        ptrace, task,
        ticker::Ticker,
        wait,
    },
    task::signal_of,
    tracee::{GadgetCache, Injection, List, Thread, TraceError, Want, procfs, read_status},
};

/// What SIGCONT discards.
const STOP_SIGNALS: [i32; 4] = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
/// `struct siginfo`.
const SIGINFO: usize = 128;
/// Room in a process for what queues its signals, for each thread and each signal.
const AREA: usize = 64 << 10;
const AREA_PER_THREAD: usize = 32 << 10;
const AREA_PER_SIGNAL: usize = 512;

/// A process, or one of its threads, as the pid namespace has it in which the tree was frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Pid of the process.
    pub pid: i32,
    /// Start time of the process in ticks since boot.
    pub start: u64,
}

/// A signal that waits to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Whose.
    pub process: Member,
    /// The thread that it was sent to; `None` if it was sent to the process.
    pub thread: Option<i32>,
    /// What came with it.
    pub info: [u8; SIGINFO],
}

/// What cannot be seen any more in a tree that was stopped for good.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Before {
    /// All that lived, parents before their children.
    pub members: Vec<Member>,
    /// Who had been stopped before.
    pub stopped: Vec<Member>,
    /// For whom a SIGCHLD waited.
    pub told: Vec<Member>,
    /// SIGCONTs that waited.
    pub continued: Vec<Waiting>,
}

impl Before {
    /// Of a tree that is held.
    pub(super) fn of(tree: &Tree) -> Result<Self> {
        let mut before = Self::default();
        for process in &tree.processes {
            let member = Member { pid: process.pid.get(), start: process.starttime };
            match process.state {
                State::Zombie(_) => continue,
                State::Stopped(_) => before.stopped.push(member),
                State::Alive => {}
            }
            before.members.push(member);
            for (thread, info) in queued(process, &[libc::SIGCONT, libc::SIGCHLD])? {
                let thread = thread.map(HostPid::get);
                if signal_of(&info) == libc::SIGCONT.cast_unsigned() {
                    before.continued.push(Waiting { process: member, thread, info });
                } else if thread.is_none() {
                    before.told.push(member);
                }
            }
        }
        Ok(before)
    }
}

/// Every process stays stopped when its tracer is gone. Those that are stopped already stay so.
pub(super) fn stop_for_good(tree: &Tree, before: &Before) -> Result<()> {
    let told: HashSet<i32> = before.told.iter().map(|member| member.pid).collect();
    let running = || tree.processes.iter().enumerate().filter(|(_, p)| p.state == State::Alive);
    for (at, process) in running() {
        let stopped = task::kill(process.pid, libc::SIGSTOP).map_err(Into::into);
        let stopped = if at == 0 { stopped } else { stopped.and_then(|()| stop_together(process)) };
        stopped.with_context(|| format!("stop of task {}", process.pid))?;
    }
    for (_, process) in running().filter(|(_, process)| !told.contains(&process.pid.get())) {
        take_child_notice(tree, process).with_context(|| is_told(process))?;
    }
    Ok(())
}

/// Takes the stop back, and lets everybody go.
pub(super) fn go_on(tree: Tree, before: &Before) -> Result<()> {
    let ours = tree.processes.iter().filter(|p| p.state == State::Alive);
    let ours = ours.map(|p| (p, Member { pid: p.pid.get(), start: p.starttime })).collect();
    // The root was not brought into its stop.
    let grouped = tree.processes.iter().skip(1).map(|p| p.pid).collect();
    let failed = start_again(&tree, ours, &grouped, before, 0);
    let_go(tree, failed)
}

fn stays(process: &Process) -> String {
    format!("task {} stays stopped: SIGCONT lets it go on", process.pid)
}

fn is_told(process: &Process) -> String {
    format!("task {} is told of stops of its children that were not theirs", process.pid)
}

/// Holds a tree again that a crtool which is gone has stopped, and lets it go on as it was. `level` is which of the ids in
/// /proc/PID/status counts in the pid namespace of `before`, 0 in our own.
pub fn go_on_again(root: HostPid, before: &Before, level: usize) -> Result<()> {
    let ticker = Ticker::start()?;
    let deadline = Deadline::begin(Limit::Total(None));
    let check = || Ok(deadline.check()?);
    let tree = ticker.busy(|| Tree::freeze(root, &check)).context("hold of the stopped tree")?;
    let mut unknown = None;
    let mut ours = Vec::new();
    let stopped = tree.processes.iter().filter(|p| matches!(p.state, State::Stopped(_)));
    let grouped = stopped.map(|p| p.pid).collect();
    // Also those that are only about to stop, since whoever held them has just been killed.
    for process in tree.processes.iter().filter(|p| !matches!(p.state, State::Zombie(_))) {
        match id_at(process.pid, level).map(|pid| Member { pid, start: process.starttime }) {
            Ok(member) if before.stopped.contains(&member) => {}
            Ok(member) => ours.push((process, member)),
            Err(error) => drop(unknown.get_or_insert_with(|| error.context(stays(process)))),
        }
    }
    let failed = start_again(&tree, ours, &grouped, before, level);
    deadline.finish();
    let_go(tree, unknown.or(failed))
}

/// Lets processes that were stopped be as they were, but for being held; `grouped` are those in a group stop, for the others
/// SIGSTOP may wait. What went wrong, if anything did.
fn start_again(
    tree: &Tree,
    ours: Vec<(&Process, Member)>,
    grouped: &HashSet<HostPid>,
    before: &Before,
    level: usize,
) -> Option<anyhow::Error> {
    let mut failed = Failures::default();
    let root = tree.processes.first().map_or(HostPid::NONE, |root| root.pid);
    let mut again = Vec::new();
    for (process, _) in &ours {
        let mut end = || {
            if process.state == State::Alive {
                take(process, libc::SIGSTOP)?;
            }
            if !grouped.contains(&process.pid) {
                return Ok(());
            }
            let waiting = queued(process, &STOP_SIGNALS)?;
            again.extend(waiting.into_iter().map(|(thread, info)| (*process, thread, info)));
            task::kill(process.pid, libc::SIGCONT)?;
            take(process, libc::SIGCONT)
        };
        failed.note(end(), || stays(process));
        if process.pid != root {
            // There is one such state for all who could wait for it: it is ours that is taken here.
            let _ = wait::take_continued(process.pid);
        }
    }
    for (process, _) in ours.iter().filter(|(_, member)| !before.told.contains(member)) {
        failed.note(take_child_notice(tree, process), || is_told(process));
    }
    let known: BTreeMap<Member, &Process> =
        ours.into_iter().map(|(process, member)| (member, process)).collect();
    for waiting in &before.continued {
        let Some(process) = known.get(&waiting.process) else { continue };
        let named =
            |tid: &HostPid| waiting.thread.is_some_and(|id| id_at(*tid, level).is_ok_and(|at| at == id));
        let thread = process.threads.iter().map(Thread::tid).find(named);
        if thread.is_some() == waiting.thread.is_some() {
            again.push((*process, thread, waiting.info));
        }
    }
    queue_again(again, &mut failed);
    failed.0
}

/// The id of a task, seen from so many pid namespaces below ours.
fn id_at(pid: HostPid, level: usize) -> Result<i32> {
    let status = read_status(pid, pid)?;
    Ok(status.nspid.get(level).copied().unwrap_or(if level == 0 { pid.get() } else { 0 }))
}

/// The first of what went wrong; everybody else goes on all the same.
#[derive(Debug, Default)]
struct Failures(Option<anyhow::Error>);

impl Failures {
    fn note(&mut self, result: Result<()>, what: impl FnOnce() -> String) {
        if let Err(error) = result {
            self.0.get_or_insert_with(|| error.context(what()));
        }
    }
}

/// The thread that a signal was sent to, if it was not sent to the process; and what came with it.
type Queued = (Option<HostPid>, [u8; SIGINFO]);

/// Which of `signals` wait for a process, and for which of its threads.
fn queued(process: &Process, signals: &[i32]) -> Result<Vec<Queued>> {
    let mut all = Vec::new();
    let shared = process.threads.iter().take(1).map(|thread| (thread, true));
    for (thread, shared) in shared.chain(process.threads.iter().map(|thread| (thread, false))) {
        let tid = thread.tid();
        let mut at = 0;
        loop {
            let some = ptrace::peek_siginfo(tid, shared, at)
                .map_err(|e| anyhow!(e).context(format!("signals that wait for thread {tid}")))?;
            if some.is_empty() {
                break;
            }
            at += some.len() as u64;
            let wanted = |info: &[u8; SIGINFO]| signals.iter().any(|s| s.cast_unsigned() == signal_of(info));
            all.extend(some.into_iter().filter(wanted).map(|info| ((!shared).then_some(tid), info)));
        }
    }
    Ok(all)
}

/// Takes a signal that waits for a process before any of its threads does. One thread goes on with everything else
/// blocked, until it is about to take it, from where it goes on without: it executes nothing meanwhile.
fn take(process: &Process, signal: i32) -> Result<()> {
    reach(process, signal).map(drop)
}

/// The thread that is about to take a signal.
fn reach(process: &Process, signal: i32) -> Result<Option<HostPid>> {
    let Some(tid) = process.threads.iter().find(|t| t.stopped.holds()).map(Thread::tid) else {
        return Ok(None);
    };
    // Somebody else may have sent what takes it away.
    if read_status(process.pid, tid)?.shdpnd & bit(signal) == 0 {
        return Ok(None);
    }
    let mask = ptrace::get_sigmask(tid)?;
    ptrace::set_sigmask(tid, !bit(signal))?;
    let mut pass_on = 0;
    let reached = loop {
        match ptrace::cont(tid, pass_on).and_then(|()| wait::wait(tid)) {
            // That somebody has ended or begun a group stop is told first.
            Ok(wait::Status::Stopped(_, ptrace::EVENT_STOP)) => pass_on = 0,
            Ok(wait::Status::Stopped(libc::SIGSTOP, 0)) if signal != libc::SIGSTOP => pass_on = libc::SIGSTOP,
            other => break other,
        }
    };
    ptrace::set_sigmask(tid, mask)?;
    match reached? {
        wait::Status::Stopped(got, 0) if got == signal => Ok(Some(tid)),
        other => Err(anyhow!("thread {tid} reported {other:?} instead of signal {signal}")),
    }
}

/// Brings all threads of a process into the group stop of the SIGSTOP that waits for it: that of the last one is what the kernel
/// tells the parent.
fn stop_together(process: &Process) -> Result<()> {
    let Some(first) = reach(process, libc::SIGSTOP)? else { return Ok(()) };
    let others =
        process.threads.iter().filter(|t| t.tid() != first && t.stopped.holds()).map(|t| (t.tid(), 0));
    for (tid, signal) in std::iter::once((first, libc::SIGSTOP)).chain(others) {
        ptrace::cont(tid, signal)?;
        match wait::wait(tid)? {
            wait::Status::Stopped(_, ptrace::EVENT_STOP) => {}
            other => return Err(anyhow!("thread {tid} reported {other:?} instead of a stop")),
        }
    }
    Ok(())
}

/// Takes a SIGCHLD which says that a child has stopped or goes on.
fn take_child_notice(tree: &Tree, process: &Process) -> Result<()> {
    let of_stop = |info: &[u8; SIGINFO]| {
        let code = info.get(8..12).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
        matches!(code, libc::CLD_STOPPED | libc::CLD_CONTINUED)
    };
    let waits = queued(process, &[libc::SIGCHLD])?;
    if !waits.iter().any(|(thread, info)| thread.is_none() && of_stop(info)) {
        return Ok(());
    }
    // A second SIGCHLD is not queued, so this one may stand for the end of a child too.
    let died = |child: &Process| {
        child.ppid == process.pid && procfs::stat(child.pid).is_ok_and(|stat| procfs::is_dead(&stat))
    };
    if tree.processes.iter().any(died) { Ok(()) } else { take(process, libc::SIGCHLD) }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Lets threads queue signals for themselves and their processes.
fn queue_again(all: Vec<(&Process, Option<HostPid>, [u8; SIGINFO])>, failed: &mut Failures) {
    let mut processes: BTreeMap<HostPid, (&Process, Vec<Queued>)> = BTreeMap::new();
    for (process, thread, info) in all {
        processes.entry(process.pid).or_insert((process, Vec::new())).1.push((thread, info));
    }
    let mut cache = GadgetCache::default();
    for (pid, (process, signals)) in processes {
        let queued = queue_in(process, &signals, &mut cache);
        failed.note(queued.map_err(Into::into), || format!("signals that waited for task {pid} are lost"));
    }
}

fn queue_in(process: &Process, signals: &[Queued], cache: &mut GadgetCache) -> Result<(), TraceError> {
    let Some(agent) = process.agent() else { return Ok(()) };
    let all: Vec<&Thread> = process.threads.iter().collect();
    let len = AREA + all.len() * AREA_PER_THREAD + signals.len() * AREA_PER_SIGNAL;
    let check = || Ok(());
    let mut injection = Injection::enter(process.pid, agent, &all, len, cache, &check)?;
    let mut jobs = Vec::new();
    for thread in &all {
        let tid = thread.tid();
        let of_thread = |to: &Option<HostPid>| to.unwrap_or(agent.tid()) == tid;
        let mut list = List::new(format!("signals of thread {tid}"));
        let status = read_status(process.pid, tid)?;
        let innermost = |ids: &[i32], outer: i32| NsPid::new(ids.last().copied().unwrap_or(outer));
        let (own_pid, own_tid) =
            (innermost(&status.nstgid, process.pid.get()), innermost(&status.nspid, tid.get()));
        for (to, info) in signals.iter().filter(|(to, _)| of_thread(to)) {
            let signal = signal_of(info);
            let at = list.bytes(info);
            if to.is_none() {
                let args = [own_pid.into(), signal.into(), at.into()];
                list.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &args, Want::Zero);
            } else {
                let args = [own_pid.into(), own_tid.into(), signal.into(), at.into()];
                list.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &args, Want::Zero);
            }
        }
        if !list.is_empty() {
            jobs.push((*thread, list));
        }
    }
    injection.run(&jobs)?;
    injection.leave()
}
