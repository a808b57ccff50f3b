//! The frozen tree: every task found, every thread held in a ptrace stop.
//!
//! Seizing goes on to a fix-point: threads and children that appear while others are being stopped are
//! found by looking again until nothing is new. Dropping the tree lets every thread go on as it was.

use std::{collections::HashSet, fs};

use crate::{
    interrupt,
    proc::{children, stat},
    tracee::{Stop, Stopped, Thread, TraceError},
};

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
    pub(super) pid: i32,
    /// Its parent within the tree; 0 for the root.
    pub(super) ppid: i32,
    /// Process group.
    pub(super) pgid: i32,
    /// Session.
    pub(super) sid: i32,
    /// What it is doing.
    pub(super) state: State,
    /// Its threads, the leader first; empty for a zombie.
    pub(super) threads: Vec<Thread>,
    /// The leader has exited while other threads run.
    pub(super) dead_leader: bool,
    /// Signal its parent gets at its end.
    pub(super) exit_signal: i32,
    /// Start time in ticks since boot: with the pid it names a process for good.
    pub(super) starttime: u64,
}

impl Process {
    /// A thread that is alive; its /proc files stand for the process.
    pub(super) fn agent(&self) -> Option<&Thread> {
        self.threads.first()
    }
}

/// All processes, parents before children.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The root is the first.
    pub(super) processes: Vec<Process>,
}

fn read(path: String) -> Result<Vec<u8>, TraceError> {
    fs::read(&path).map_err(|source| TraceError::Proc { path, source })
}

fn read_stat(path: String) -> Result<stat::Stat, TraceError> {
    Ok(stat::parse(&read(path)?)?)
}

/// Thread ids of a process, the leader first; empty when it is gone.
pub(super) fn tids(pid: i32) -> Vec<i32> {
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mut tids: Vec<i32> = dir.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    tids.sort_unstable_by_key(|tid| (*tid != pid, *tid));
    tids
}

/// Children of all threads of a process.
pub(super) fn children_of(pid: i32) -> Vec<i32> {
    let mut all = Vec::new();
    for tid in tids(pid) {
        if let Ok(bytes) = fs::read(format!("/proc/{pid}/task/{tid}/children"))
            && let Ok(pids) = children::parse(&bytes)
        {
            all.extend(pids);
        }
    }
    all
}

impl Tree {
    /// Seizes everything below and including `root`.
    pub(super) fn freeze(root: i32, check: &dyn Fn() -> Result<(), TraceError>) -> Result<Self, TraceError> {
        let mut tree = Self::default();
        if !tree.add(root, 0, check)? {
            return Err(TraceError::Died(root));
        }
        loop {
            let mut grew = false;
            let mut index = 0;
            while index < tree.processes.len() {
                check()?;
                let process = &mut tree.processes[index];
                if !matches!(process.state, State::Zombie(_)) {
                    grew |= process.seize_threads(check)?;
                }
                let pid = tree.processes[index].pid;
                let known: HashSet<i32> = tree.processes.iter().map(|p| p.pid).collect();
                for child in children_of(pid) {
                    if !known.contains(&child) {
                        grew |= tree.add(child, pid, check)?;
                    }
                }
                index += 1;
            }
            if !grew {
                break;
            }
        }
        tree.settle_groups()?;
        tree.order();
        Ok(tree)
    }

    fn add(
        &mut self,
        pid: i32,
        ppid: i32,
        check: &dyn Fn() -> Result<(), TraceError>,
    ) -> Result<bool, TraceError> {
        let stat = match read_stat(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat,
            Err(e) if ppid == 0 => return Err(e),
            // Gone before we came.
            Err(_) => return Ok(false),
        };
        let mut process = Process {
            pid,
            ppid,
            pgid: stat.pgrp,
            sid: stat.session,
            state: State::Alive,
            threads: Vec::new(),
            dead_leader: false,
            exit_signal: stat.exit_signal,
            starttime: stat.starttime,
        };
        process.seize_threads(check)?;
        if process.threads.is_empty() {
            match read_stat(format!("/proc/{pid}/stat")) {
                Ok(stat) if matches!(stat.state, stat::State::Zombie | stat::State::Dead) => {
                    process.state = State::Zombie(stat.exit_code)
                }
                _ => return Ok(false),
            }
        }
        self.processes.push(process);
        Ok(true)
    }

    /// Groups and sessions are final only now that nobody runs any more.
    fn settle_groups(&mut self) -> Result<(), TraceError> {
        for process in &mut self.processes {
            let stat = read_stat(format!("/proc/{}/stat", process.pid))?;
            process.pgid = stat.pgrp;
            process.sid = stat.session;
            if stat.starttime != process.starttime {
                return Err(TraceError::Died(process.pid));
            }
            if matches!(process.state, State::Zombie(_)) {
                process.state = State::Zombie(stat.exit_code);
            }
        }
        // A task whose parent died meanwhile has a new one, in the tree or not.
        let pids: HashSet<i32> = self.processes.iter().map(|p| p.pid).collect();
        for process in self.processes.iter_mut().skip(1) {
            let stat = read_stat(format!("/proc/{}/stat", process.pid))?;
            if !pids.contains(&stat.ppid) {
                return Err(TraceError::Died(process.ppid));
            }
            process.ppid = stat.ppid;
        }
        Ok(())
    }

    /// Parents before their children, siblings by pid.
    fn order(&mut self) {
        let mut rest = std::mem::take(&mut self.processes);
        let Some(root) = rest.first().map(|p| p.pid) else { return };
        let mut stack = vec![root];
        while let Some(pid) = stack.pop() {
            if let Some(at) = rest.iter().position(|p| p.pid == pid) {
                self.processes.push(rest.remove(at));
            }
            let mut below: Vec<i32> = rest.iter().filter(|p| p.ppid == pid).map(|p| p.pid).collect();
            below.sort_unstable_by(|a, b| b.cmp(a));
            stack.extend(below);
        }
    }

    /// Every thread is still there and held: nothing moved while it was read.
    pub(super) fn verify(&self) -> Result<(), TraceError> {
        for process in &self.processes {
            for thread in &process.threads {
                thread.stopped.regs()?;
            }
            if !matches!(process.state, State::Zombie(_)) {
                let held: HashSet<i32> = process.threads.iter().map(Thread::tid).collect();
                let now = tids(process.pid);
                if now.is_empty() || now.iter().any(|t| !held.contains(t) && *t != process.pid) {
                    return Err(TraceError::Died(process.pid));
                }
            }
        }
        Ok(())
    }
}

impl Process {
    /// Seizes threads until none is new; says whether any was.
    fn seize_threads(&mut self, check: &dyn Fn() -> Result<(), TraceError>) -> Result<bool, TraceError> {
        let mut grew = false;
        loop {
            let held: HashSet<i32> = self.threads.iter().map(Thread::tid).collect();
            let mut seized = Vec::new();
            for tid in tids(self.pid) {
                if held.contains(&tid) || (tid == self.pid && self.dead_leader) {
                    continue;
                }
                match Stopped::seize(tid) {
                    Ok(suspended) => seized.push((tid, suspended)),
                    Err(TraceError::Died(_)) => {}
                    Err(error) => {
                        // A dead leader, or a zombie, cannot be seized.
                        match read_stat(format!("/proc/{}/task/{tid}/stat", self.pid)) {
                            Ok(stat) if matches!(stat.state, stat::State::Zombie | stat::State::Dead) => {
                                self.dead_leader |= tid == self.pid;
                            }
                            Err(_) => {}
                            Ok(_) => return Err(error),
                        }
                    }
                }
            }
            if seized.is_empty() {
                break;
            }
            for (tid, suspended) in seized {
                let pid = self.pid;
                let begun = std::time::Instant::now();
                // Its child is not held yet, so most often it only has to get to its program.
                let patient = || match check() {
                    Err(TraceError::TimedOut(limit)) => {
                        not_in_vfork(pid, tid).and(Err(TraceError::TimedOut(limit)))
                    }
                    Ok(()) if begun.elapsed() > VFORK_PATIENCE => not_in_vfork(pid, tid),
                    checked => checked,
                };
                let stopped = match Stopped::settle(tid, &patient) {
                    Ok(stopped) => stopped,
                    Err(TraceError::Died(_)) => continue,
                    Err(e) => return Err(e),
                };
                if let Stop::Group(signal) = stopped.stop() {
                    self.state = State::Stopped(signal);
                }
                let mut thread = Thread::new(stopped)?;
                thread.seccomp_suspended = suspended;
                self.threads.push(thread);
                grew = true;
            }
        }
        self.threads.sort_by_key(|t| (t.tid() != self.pid, t.tid()));
        Ok(grew)
    }
}

/// How long a thread may take to come out of a vfork.
const VFORK_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// A thread in vfork sleeps until its child runs a program or ends, and does not stop for anybody.
fn not_in_vfork(pid: i32, tid: i32) -> Result<(), TraceError> {
    let at = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
    let mut words = at.split(' ');
    let number = words.next().and_then(|n| n.parse::<i64>().ok());
    let flags = words.next().and_then(|f| u64::from_str_radix(f.trim_start_matches("0x"), 16).ok());
    let vfork = match number {
        Some(libc::SYS_vfork) => true,
        Some(libc::SYS_clone) => flags.is_some_and(|f| f & libc::CLONE_VFORK as u64 != 0),
        _ => fs::read(format!("/proc/{pid}/task/{tid}/wchan"))
            .is_ok_and(|w| w.windows(5).any(|s| s == b"vfork")),
    };
    if vfork { Err(TraceError::Vfork(tid)) } else { Ok(()) }
}

/// A check for waits: Ctrl-C and the like, and the time limit.
pub(super) fn checker(limit: Option<std::time::Duration>) -> impl Fn() -> Result<(), TraceError> {
    let begun = std::time::Instant::now();
    move || {
        interrupt::check()?;
        match limit {
            Some(limit) if begun.elapsed() > limit => Err(TraceError::TimedOut(limit.as_secs())),
            _ => Ok(()),
        }
    }
}
