//! The tracees: puppets under ptrace, each of their threads waiting or running a list.
//!
//! The tracees knows who is there, lets lists run, and takes reports until everybody it waits for has
//! reached a trap. Dropped before [`Tracees::release`], it kills and reaps everything it holds; and if crtool
//! itself is killed, EXITKILL does the same.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use super::pid_allocator::PidAllocator;
use crate::{
    interrupt,
    sys::{Errno, ptrace, task, wait, wait::Status},
    tracee::{Area, Placed, RemoteAddr, TraceError},
};

/// What a tracee of ours is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Announced, not seen yet.
    Expected,
    /// Running a list.
    Running,
    /// At a trap.
    Waiting,
    /// Ended, as planned.
    Gone,
}

/// One thread of a puppet.
#[derive(Debug)]
struct Member {
    label: String,
    slot: RemoteAddr,
    lists: Vec<Placed>,
    doing: Doing,
    /// It is to end by itself.
    ends: bool,
}

/// All tracees of a restore.
#[derive(Debug)]
pub(super) struct Tracees {
    pub(super) area: Area,
    members: HashMap<i32, Member>,
    /// Process ids, in the order in which they are forked.
    leaders: Vec<i32>,
    armed: bool,
    pub(super) pids: PidAllocator,
    /// The id that was found to be taken last, and when that was found first.
    taken: Option<(i32, Instant)>,
}

impl Tracees {
    pub(super) fn new(area: Area, pids: PidAllocator) -> Self {
        Self { area, members: HashMap::new(), leaders: Vec::new(), armed: true, pids, taken: None }
    }

    /// Announces a thread that a list is going to make.
    pub(super) fn expect(&mut self, tid: i32, leader: bool, label: String, slot: RemoteAddr, list: Placed) {
        if leader {
            self.leaders.push(tid);
        }
        self.members
            .insert(tid, Member { label, slot, lists: vec![list], doing: Doing::Expected, ends: false });
    }

    /// Gives a waiting thread its next list; it starts with [`Tracees::resume`].
    pub(super) fn next_list(&mut self, tid: i32, list: Placed) -> Result<()> {
        let member = self.members.get_mut(&tid).context("a list for nobody")?;
        self.area.set_next(member.slot, list.start)?;
        member.lists.push(list);
        Ok(())
    }

    /// Marks a thread that is there and runs (the root, just seized).
    pub(super) fn running(&mut self, tid: i32) {
        if let Some(member) = self.members.get_mut(&tid) {
            member.doing = Doing::Running;
        }
    }

    /// Lets a waiting thread go on.
    pub(super) fn resume(&mut self, tid: i32) -> Result<()> {
        let member = self.members.get_mut(&tid).context("nobody to resume")?;
        ptrace::cont(tid, 0).with_context(|| format!("{}: resume", member.label))?;
        member.doing = Doing::Running;
        Ok(())
    }

    /// Lets a waiting thread die of `signal` (its mask open), or run to its end with 0.
    pub(super) fn end(&mut self, tid: i32, signal: i32) -> Result<()> {
        let member = self.members.get_mut(&tid).context("nobody to end")?;
        member.ends = true;
        if signal != 0 {
            ptrace::set_sigmask(tid, 0)?;
        }
        ptrace::cont(tid, signal).with_context(|| format!("{}: end", member.label))?;
        member.doing = Doing::Running;
        Ok(())
    }

    /// Takes reports until nobody runs or is expected.
    pub(super) fn settle(&mut self) -> Result<()> {
        let mut busy =
            self.members.values().filter(|m| matches!(m.doing, Doing::Expected | Doing::Running)).count();
        while busy > 0 {
            let (tid, raw) = match wait::wait_raw(-1, 0) {
                Ok(Some(report)) => report,
                Ok(None) => continue,
                Err(Errno::EINTR) => {
                    interrupt::check()?;
                    continue;
                }
                Err(e) => return Err(anyhow!(e).context("wait for the tasks being restored")),
            };
            if self.report(tid, Status::from_raw(raw))? {
                busy -= 1;
            }
        }
        Ok(())
    }

    /// Takes one report; says whether its thread has come to rest.
    fn report(&mut self, tid: i32, status: Status) -> Result<bool> {
        let Some(member) = self.members.get_mut(&tid) else { return Ok(false) };
        match status {
            Status::Stopped(_, ptrace::EVENT_STOP) => {
                member.doing = Doing::Running;
                ptrace::cont(tid, 0).with_context(|| format!("{}: start", member.label))?;
                Ok(false)
            }
            Status::Stopped(libc::SIGTRAP, 0) => {
                member.doing = Doing::Waiting;
                let lists: Vec<&Placed> = member.lists.iter().collect();
                match self.area.failure(member.slot, &lists)? {
                    Some(TraceError::Call { call, source: Errno::EEXIST, .. })
                        if call.starts_with("clone of ") =>
                    {
                        let id = call.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                        self.again(tid, id)
                    }
                    Some(failure) => Err(anyhow!(failure).context(member.label.clone())),
                    None => Ok(true),
                }
            }
            Status::Stopped(signal @ (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE), 0) => {
                let at = ptrace::get_regs(tid).map(|r| r.rip).unwrap_or(0);
                bail!("{}: signal {signal} at {at:#x} while being restored", member.label)
            }
            Status::Stopped(signal, 0) => {
                // Nobody else can mean a task that is not there yet; stop signals cannot be blocked.
                ptrace::cont(tid, if member.ends { signal } else { 0 })
                    .with_context(|| format!("{}: resume", member.label))?;
                Ok(false)
            }
            Status::Exited(_) | Status::Signaled(..) if member.ends => {
                member.doing = Doing::Gone;
                Ok(true)
            }
            Status::Exited(code) => bail!("{}: ended with status {code} while being restored", member.label),
            Status::Signaled(signal, _) => {
                bail!("{}: killed by signal {signal} while being restored", member.label)
            }
            _ => Ok(false),
        }
    }

    /// Lets a thread that could not clone `id`, because that id was taken, try again, if there is hope.
    fn again(&mut self, tid: i32, id: i32) -> Result<bool> {
        let slot = self.members.get(&tid).context("nobody to try again")?.slot;
        if self.pids.gave(id) {
            let other = self.pids.pick()?;
            tracing::debug!("pid {id} has been taken by somebody else; {other} does as well");
            self.area.set_child_id(slot, other)?;
        } else if !self.may_become_free(id) {
            return Err(super::taken(id, Errno::EEXIST));
        }
        interrupt::check()?;
        let member = self.members.get_mut(&tid).context("nobody to try again")?;
        let mut regs = ptrace::get_regs(tid)?;
        regs.rbx = self.area.retry(slot)?.0;
        regs.rip = self.area.runner().0;
        regs.orig_rax = u64::MAX;
        ptrace::set_regs(tid, &regs)?;
        ptrace::cont(tid, 0).with_context(|| format!("{}: resume", member.label))?;
        member.doing = Doing::Running;
        Ok(false)
    }

    /// A process that is expected as `old` will be `new`.
    pub(super) fn rename(&mut self, old: i32, new: i32) {
        if let Some(member) = self.members.remove(&old) {
            self.members.insert(new, member);
        }
        for pid in self.leaders.iter_mut().filter(|pid| **pid == old) {
            *pid = new;
        }
    }

    /// Whether an id that is taken may be free in a moment, which is waited for: the kernel gives it back somewhat later
    /// than the parent of its last owner is told, what keeps it is a group or session of the dead, or whoever has it
    /// came after all ids had been found free, and may be gone as fast.
    pub(super) fn may_become_free(&mut self, id: i32) -> bool {
        let since = self.taken.filter(|(last, _)| *last == id).map_or_else(Instant::now, |(_, since)| since);
        self.taken = Some((id, since));
        let may = since.elapsed() < super::patience(super::who_is(id).as_ref());
        if may {
            std::thread::sleep(Duration::from_micros(500));
        }
        may
    }

    /// A system call in a waiting thread, from which nothing has to come back but its result. The
    /// thread is left at the exit of the call.
    pub(super) fn bare_call(&self, tid: i32, nr: i64, args: [u64; 6]) -> Result<i64> {
        let mut regs = ptrace::get_regs(tid)?;
        regs.rip = self.area.bare_syscall().0;
        regs.orig_rax = u64::MAX;
        regs.rax = nr.cast_unsigned();
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        ptrace::set_regs(tid, &regs)?;
        for _ in 0..2 {
            ptrace::syscall(tid, 0)?;
            loop {
                match wait::wait(tid)? {
                    Status::Stopped(signal, 0) if signal == libc::SIGTRAP | 0x80 => break,
                    Status::Stopped(_, _) => ptrace::syscall(tid, 0)?,
                    other => bail!("thread {tid}: {other:?} while its helper memory was being removed"),
                }
            }
        }
        Ok(ptrace::get_regs(tid)?.rax.cast_signed())
    }

    /// From the end of a bare call to a stop from which the kernel looks for signals, and restarts calls, before the
    /// thread executes anything. All its signals must be blocked.
    pub(super) fn stop_before_user_code(&self, tid: i32) -> Result<()> {
        ptrace::interrupt(tid)?;
        ptrace::cont(tid, 0)?;
        loop {
            match wait::wait(tid)? {
                Status::Stopped(_, ptrace::EVENT_STOP) => return Ok(()),
                Status::Stopped(_, _) => ptrace::cont(tid, 0)?,
                other => bail!("thread {tid}: {other:?} before its registers were set"),
            }
        }
    }

    /// Brings the waiting threads of a process into a group stop by `signal`; SIGSTOP if the kernel ignores it
    /// (an orphaned process group).
    pub(super) fn stop_process(&self, tids: &[i32], signal: i32) -> Result<()> {
        let Some(leader) = tids.first().copied() else { return Ok(()) };
        for try_signal in [signal, libc::SIGSTOP] {
            ptrace::set_sigmask(leader, !(1u64 << (try_signal - 1)))?;
            task::kill(leader, try_signal)?;
            ptrace::cont(leader, 0)?;
            let event = loop {
                match wait::wait(leader)? {
                    Status::Stopped(event, ptrace::EVENT_STOP) => break event,
                    Status::Stopped(got, 0) => {
                        // Whatever becomes of the signal, no instruction is executed.
                        ptrace::interrupt(leader)?;
                        ptrace::cont(leader, if got == try_signal { got } else { 0 })?;
                    }
                    other => bail!("thread {leader}: {other:?} while being stopped"),
                }
            };
            if event != libc::SIGTRAP {
                break;
            }
        }
        for tid in tids.iter().skip(1) {
            ptrace::interrupt(*tid)?;
            ptrace::cont(*tid, 0)?;
            while let Status::Stopped(_, event) = wait::wait(*tid)? {
                if event == ptrace::EVENT_STOP {
                    break;
                }
                ptrace::cont(*tid, 0)?;
            }
        }
        Ok(())
    }

    /// Nothing is killed from here on: everybody has its final state.
    pub(super) fn release(&mut self) {
        self.armed = false;
    }

    fn kill_all(&mut self) {
        for pid in &self.leaders {
            if self.members.get(pid).is_some_and(|m| m.doing != Doing::Gone && m.doing != Doing::Expected) {
                let _ = task::kill(*pid, libc::SIGKILL);
            }
        }
        // Threads report to us as their tracer, leaders last; reap until nobody is left.
        let mut left: Vec<i32> = self
            .members
            .iter()
            .filter(|(_, m)| !matches!(m.doing, Doing::Gone | Doing::Expected))
            .map(|(tid, _)| *tid)
            .collect();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !left.is_empty() && std::time::Instant::now() < deadline {
            match wait::poll(-1) {
                Ok(Some((tid, Status::Exited(_) | Status::Signaled(..)))) => left.retain(|t| *t != tid),
                // Somebody appeared after the kill (a clone in flight), or reports a stop on its way out.
                Ok(Some((tid, _))) => {
                    let _ = task::kill(tid, libc::SIGKILL);
                    let _ = ptrace::cont(tid, 0);
                }
                Ok(None) => std::thread::sleep(std::time::Duration::from_micros(200)),
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
    }
}

impl Drop for Tracees {
    fn drop(&mut self) {
        if self.armed {
            self.kill_all();
        }
    }
}
