//! The frozen tree: every task found, every thread held in a ptrace stop.
//!
//! A process is held when all its threads are; only then are its children looked for, so a parent cannot make others
//! meanwhile. What appears all the same (a sibling that a child makes with CLONE_PARENT, an orphan that a subreaper of
//! the tree is given) is found by a second look at everybody's children, and again until nothing is new.
//! Dropping the tree lets every thread go on as it was.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use crate::{
    deadline::{self, Late},
    finding::Finding,
    kept::Form,
    proc::stat::Stat,
    sys::{pid::HostPid, wait},
    tracee::{
        Seized, Stop, Thread, TraceError, procfs,
        silent::{self, FrozenGroups},
        vdso::Vdso,
    },
};

/// Ends a wait early: an error says why.
pub(super) type Check<'c> = &'c dyn Fn() -> Result<(), TraceError>;

/// What a task is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Running or sleeping.
    Alive,
    /// Stopped by job control, with this signal.
    Stopped(i32),
    /// Dead, not reaped; the wait status.
    Zombie(i32),
}

/// One process of the tree.
#[derive(Debug)]
pub(super) struct Process {
    /// Process id.
    pub(super) pid: HostPid,
    /// Its parent within the tree; none for the root.
    pub(super) ppid: HostPid,
    /// Process group.
    pub(super) pgid: HostPid,
    /// Session.
    pub(super) sid: HostPid,
    /// What it is doing.
    pub(super) state: State,
    /// Its threads, the leader first; empty for a zombie, and for one that cannot be held.
    pub(super) threads: Vec<Thread>,
    /// The leader has exited while other threads run.
    pub(super) dead_leader: bool,
    /// Signal its parent gets at its end.
    pub(super) exit_signal: i32,
    /// Start time in ticks since boot: with the pid it names a process for good.
    pub(super) starttime: u64,
    /// Why (a part of) it cannot be held.
    pub(super) unheld: Vec<Finding>,
}

/// All processes, parents before children, siblings by pid.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The root is the first.
    pub(super) processes: Vec<Process>,
}

impl Tree {
    /// Holds everything below and including `root`.
    pub(super) fn freeze(root: HostPid, check: Check<'_>) -> Result<Self, TraceError> {
        let mut groups = FrozenGroups::default();
        let first = Process::hold(root, &mut groups, check)?.ok_or(TraceError::Died(root))?;
        let mut tree = Self { processes: vec![first] };
        let mut known = HashSet::from([root]);
        let mut next = 0;
        loop {
            // Those that are found are appended, and looked at in their turn.
            while let Some(process) = tree.processes.get(next) {
                let below = process.children();
                tree.hold_new(below, &mut known, &mut groups, check)?;
                next += 1;
            }
            let mut parents = HashMap::new();
            for process in &tree.processes {
                check()?;
                parents.extend(process.children().into_iter().map(|child| (child, process.pid)));
            }
            let new = parents.keys().copied().filter(|pid| !known.contains(pid)).collect();
            if !tree.hold_new(new, &mut known, &mut groups, check)? {
                return tree.finished(&parents);
            }
        }
    }

    /// Holds those of `pids` that are not known yet; says whether any was there to be held.
    fn hold_new(
        &mut self,
        pids: Vec<HostPid>,
        known: &mut HashSet<HostPid>,
        groups: &mut FrozenGroups,
        check: Check<'_>,
    ) -> Result<bool, TraceError> {
        let before = self.processes.len();
        for pid in pids {
            check()?;
            if known.contains(&pid) {
                continue;
            }
            // One that is gone, or whose pid somebody outside of the tree has by now, is no part of it: let go at once.
            if let Some(mut process) = Process::hold(pid, groups, check)?
                && known.contains(&process.ppid)
            {
                if Form::of_tree(known.len() + process.threads.len()) == Form::Packed {
                    process.threads.iter_mut().for_each(|thread| thread.xstate.compress());
                }
                known.insert(pid);
                self.processes.push(process);
            }
        }
        Ok(self.processes.len() > before)
    }

    /// The tree in order, when nobody runs any more; `parents` is who has whom for a child now.
    fn finished(mut self, parents: &HashMap<HostPid, HostPid>) -> Result<Self, TraceError> {
        if let Some(root) = self.processes.first_mut() {
            // Who its parent is belongs to the world outside.
            root.ppid = HostPid::NONE;
        }
        for process in self.processes.iter_mut().skip(1) {
            // Its parent may have died since: then it has another one, in the tree or not.
            process.ppid = parents.get(&process.pid).copied().ok_or(TraceError::Died(process.ppid))?;
        }
        self.order();
        Ok(self)
    }

    /// Parents before their children, siblings by pid.
    fn order(&mut self) {
        let Some(root) = self.processes.first().map(|p| p.pid) else { return };
        let mut below: HashMap<HostPid, Vec<HostPid>> = HashMap::new();
        let mut rest: HashMap<HostPid, Process> = HashMap::with_capacity(self.processes.len());
        for process in std::mem::take(&mut self.processes) {
            below.entry(process.ppid).or_default().push(process.pid);
            rest.insert(process.pid, process);
        }
        let mut stack = vec![root];
        while let Some(pid) = stack.pop() {
            self.processes.extend(rest.remove(&pid));
            let mut children = below.remove(&pid).unwrap_or_default();
            children.sort_unstable_by(|a, b| b.cmp(a));
            stack.extend(children);
        }
    }

    /// Every thread is still there and held: nothing moved while it was read.
    pub(super) fn verify(&self) -> Result<(), TraceError> {
        for process in &self.processes {
            for thread in &process.threads {
                thread.stopped.regs()?;
            }
            if !matches!(process.state, State::Zombie(_)) {
                let held: HashSet<HostPid> = process.threads.iter().map(Thread::tid).collect();
                let now = procfs::tids(process.pid);
                if now.is_empty() || now.iter().any(|t| !held.contains(t) && *t != process.pid) {
                    return Err(TraceError::Died(process.pid));
                }
            }
        }
        Ok(())
    }
}

/// How long a thread may take to stop before the reason is looked for: most often it only has to come out of a vfork,
/// since its child is not held yet.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often threads of a process may not be seized before that counts: it may be the moment.
const REFUSALS: usize = 20;

impl Process {
    /// Holds all threads of a process, and reads what they cannot change any more. `None`: there is no such process.
    pub(super) fn hold(
        pid: HostPid,
        groups: &mut FrozenGroups,
        check: Check<'_>,
    ) -> Result<Option<Self>, TraceError> {
        let mut process = Self {
            pid,
            ppid: HostPid::NONE,
            pgid: HostPid::NONE,
            sid: HostPid::NONE,
            state: State::Alive,
            threads: Vec::new(),
            dead_leader: false,
            exit_signal: 0,
            starttime: 0,
            unheld: Vec::new(),
        };
        deadline::looking_at(pid, deadline::Object::Task);
        let frozen = groups.of(pid);
        if let Some(group) = &frozen {
            process.unheld.push(Finding {
                pid,
                what: "task".into(),
                reason: format!("its cgroup is frozen ({})", group.display()),
                hint: "thaw it first".into(),
            });
        }
        // Those of its threads that have to be reaped by us should they end.
        let ours = RefCell::new(Vec::new());
        let mut refusals = 0;
        loop {
            check()?;
            let listed = procfs::tids(pid);
            let round = if frozen.is_some() {
                Round::default()
            } else {
                process.hold_threads(&listed, &ours, check)?
            };
            let stat = match procfs::stat(pid) {
                Ok(stat) => stat,
                Err(error) if procfs::tids(pid).is_empty() => {
                    tracing::debug!("task {pid} is gone: {error}");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            let there = u64::try_from(process.threads.len() + round.dead + round.traced).unwrap_or(u64::MAX);
            let dead = process.threads.is_empty() && procfs::is_dead(&stat) && stat.num_threads <= 1;
            let complete = stat.num_threads == there && process.threads.iter().all(|t| t.stopped.holds());
            if dead || frozen.is_some() || (complete && there > round.dead as u64) {
                process.read(&stat, dead);
                return Ok(Some(process));
            }
            if let Some(error) = round.refused {
                refusals += 1;
                if refusals > REFUSALS {
                    return Err(error);
                }
            }
            if round.held == 0 {
                // A thread is about to end: nothing to do but to wait for that.
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    /// Tries to hold those of the threads `listed` that are not held yet.
    fn hold_threads(
        &mut self,
        listed: &[HostPid],
        ours: &RefCell<Vec<HostPid>>,
        check: Check<'_>,
    ) -> Result<Round, TraceError> {
        let pid = self.pid;
        // While the process executes a program (execve), its other threads end, and we have to take their reports for
        // it to go on. The one that executes then has the id of the leader.
        for thread in std::mem::take(&mut self.threads) {
            if thread.stopped.holds() {
                self.threads.push(thread);
            } else {
                thread.stopped.forget();
            }
        }
        let take_ends = || {
            ours.borrow_mut().retain(|tid| !matches!(wait::take_end(*tid), Ok(true)));
            check()
        };
        let held: HashSet<HostPid> = self.threads.iter().map(Thread::tid).collect();
        let mut round = Round::default();
        let mut seized = Vec::new();
        self.unheld.clear();
        self.dead_leader = false;
        for tid in listed.iter().copied().filter(|tid| !held.contains(tid)) {
            let thread = match Seized::seize(tid, &take_ends) {
                Ok(thread) => Some(thread),
                Err(error) => self.not_seized(tid, error, &mut round)?,
            };
            if let Some(thread) = thread {
                ours.borrow_mut().push(tid);
                seized.push(thread);
            }
        }
        let vdso = Vdso::new();
        let mut seized = seized.into_iter();
        while let Some(thread) = seized.next() {
            let tid = thread.tid();
            let begun = Instant::now();
            let patient = || {
                let late = match take_ends() {
                    Err(TraceError::Late(Late::TimedOut(limit))) => Some(Late::TimedOut(limit).into()),
                    Ok(()) if begun.elapsed() > PATIENCE && silent::in_vfork(pid, tid) => {
                        Some(TraceError::Vfork(tid))
                    }
                    other => return other,
                };
                // A leader that has ended does not report before all other threads have.
                match procfs::thread_stat(pid, tid) {
                    Ok(stat) if procfs::is_dead(&stat) => Err(TraceError::Died(tid)),
                    _ => late.map_or(Ok(()), |late| Err(silent::reason(pid, tid).unwrap_or(late))),
                }
            };
            let stopped = thread.settle(&patient).and_then(|stopped| vdso.leave(stopped, &patient));
            let stopped = match stopped.and_then(Thread::new) {
                Ok(thread) => thread,
                Err(TraceError::Died(_)) => continue,
                Err(error) => {
                    Seized::let_go(seized.collect());
                    return Err(error);
                }
            };
            round.held += 1;
            self.take(stopped);
        }
        self.threads.sort_by_key(|t| (t.tid() != pid, t.tid()));
        Ok(round)
    }

    fn take(&mut self, mut thread: Thread) {
        thread.seccomp_suspended = thread.stopped.seccomp_suspended();
        if let Stop::Group(signal) = thread.stopped.stop() {
            self.state = State::Stopped(signal);
        }
        self.threads.push(thread);
    }

    /// Why a thread could not be seized: it is dead, gone, traced by somebody else, or by us under another id.
    fn not_seized(
        &mut self,
        tid: HostPid,
        error: TraceError,
        round: &mut Round,
    ) -> Result<Option<Seized>, TraceError> {
        match procfs::thread_stat(self.pid, tid) {
            Ok(stat) if procfs::is_dead(&stat) => {
                round.dead += 1;
                self.dead_leader |= tid == self.pid;
                Ok(None)
            }
            Err(_) => Ok(None),
            Ok(_) => match error {
                TraceError::Traced { tracer, .. } if tracer.get() == nix::unistd::gettid().as_raw() => {
                    Seized::adopt(tid).map(Some).or_else(|error| match error {
                        TraceError::Died(_) => Ok(None),
                        error => Err(error),
                    })
                }
                TraceError::Traced { tracer, .. } => {
                    round.traced += 1;
                    self.unheld.push(Finding {
                        pid: self.pid,
                        what: if tid == self.pid { "task".into() } else { format!("thread {tid}") },
                        reason: format!("it is traced by task {tracer}"),
                        hint: "end that debugger first".into(),
                    });
                    Ok(None)
                }
                TraceError::Died(_) => Ok(None),
                error => {
                    // It may have died, and somebody who executes a program got its id before we asked why.
                    round.refused = Some(error);
                    Ok(None)
                }
            },
        }
    }

    /// Takes what is final now that nobody runs.
    fn read(&mut self, stat: &Stat, dead: bool) {
        self.ppid = stat.ppid;
        self.pgid = stat.pgrp;
        self.sid = stat.session;
        self.exit_signal = stat.exit_signal;
        self.starttime = stat.starttime;
        // There are many processes, most of them with one thread.
        self.threads.shrink_to_fit();
        if dead {
            self.state = State::Zombie(stat.exit_code);
            self.dead_leader = false;
        }
    }

    /// A thread that is alive; its /proc files stand for the process.
    pub(super) fn agent(&self) -> Option<&Thread> {
        self.threads.first()
    }

    /// Its children, zombies too.
    fn children(&self) -> Vec<HostPid> {
        if !self.unheld.is_empty() {
            return procfs::children(self.pid, procfs::tids(self.pid));
        }
        procfs::children(self.pid, self.threads.iter().map(Thread::tid))
    }
}

/// What one round over the threads of a process has come to.
#[derive(Debug, Default)]
struct Round {
    /// Held, new.
    held: usize,
    /// Dead, and not gone yet.
    dead: usize,
    /// Traced by somebody else.
    traced: usize,
    /// Why a thread that is alive could not be seized.
    refused: Option<TraceError>,
}
