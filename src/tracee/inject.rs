//! Running lists inside a stopped process, in a way that heals itself.
//!
//! 1. One thread, the agent, maps the area: it calls `mmap` through code of its own (`gadget.rs`), with
//!    a signal frame of its true state below its stack, to which that code returns.
//! 2. Every thread runs its list in the area; a list ends in a signal to the thread itself, which is
//!    ignored unless somebody traces it, and in rt_sigreturn to a frame of the thread's true state.
//! 3. Registers and masks are put back from outside; the agent unmaps the area as in 1.
//!
//! At no moment does a thread hold registers from which it would not, left alone, come back to where it
//! was. If crtool is killed in the middle, an unused mapping may stay; the next injection removes it.
//! Restart blocks (nanosleep and the like) are kept when crtool puts the state back, and end in EINTR
//! when the thread has to heal itself.
//!
//! The target may be hostile, so nothing that its code returns decides what crtool writes to: the area is private memory
//! at an address that crtool has chosen from the kernel's list of mappings, and it is written and read through /proc/PID/mem,
//! by which nothing can be changed but memory of the target that the target could change itself. What lists return are
//! the target's words about itself, to be checked like an image.
//!
//! A stop signal that comes meanwhile is not lost. If the process was running, the signal stops it as it would have done
//! without us: its threads are in a group stop, which does not hinder a tracer, and stay in it when they are let go. If it was
//! stopped before, the signal only waits; it is kept from the thread that has to run and sent again once all is put back.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Area, GadgetCache, Gadgets, List, Op, Placed, RemoteAddr, RemoteMemory, Results, Stop, Stopped,
    TraceError, Want,
    area::{self, CODE_LEN, Memory},
    room,
};
use crate::{
    arch::{registers, sigframe, xsave},
    kept::Packed,
    proc::{
        maps::{self, Vma, VmaName},
        status::Status as TaskStatus,
    },
    sys::{
        Errno,
        fd::read_proc,
        pid::{HostPid, NsPid},
        ptrace,
        runner::Slot,
        wait::Status,
    },
};

const PAGE: u64 = 4096;
/// Bytes below the stack pointer that belong to the running function (System V ABI).
const RED_ZONE: u64 = 128;
const ALL_BLOCKED: u64 = u64::MAX;
/// A thread that runs code of ours is waited for even when the user or the clock says that it is enough: to pull its
/// stack or its code from under it would kill it. What it runs is short; one that takes longer than this hangs.
const GRACE: Duration = Duration::from_millis(500);

/// The xsave area of a thread: it has 11 KiB where a processor has AMX, most of them zeros, and a dump keeps it for every
/// thread of a tree.
#[derive(Debug, Clone)]
pub struct Xstate(Packed);

impl Xstate {
    fn new(whole: &[u8]) -> Self {
        Self(Packed::without_zeros(whole))
    }

    /// Makes it smaller, for a tree of thousands.
    pub(crate) fn compress(&mut self) {
        self.0.compress();
    }

    /// Its length, zeros included.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// All of it.
    pub(crate) fn whole(&self) -> Vec<u8> {
        self.0.bytes()
    }
}

/// True state of a stopped thread, read once when it stopped.
#[derive(Debug)]
pub struct Thread {
    /// The thread, held.
    pub stopped: Stopped,
    /// Its general registers.
    pub regs: libc::user_regs_struct,
    /// Its xsave area.
    pub xstate: Xstate,
    /// Its signal mask.
    pub sigmask: u64,
    /// Its seccomp filters do not apply to what we run in it.
    pub seccomp_suspended: bool,
}

impl Thread {
    /// Reads the state of a thread that has just stopped.
    pub fn new(stopped: Stopped) -> Result<Self, TraceError> {
        let mut regs = stopped.regs()?;
        // A thread that job control has stopped gets the EINTR that the stop has earned it, ours or not.
        if stopped.stop() == Stop::Running && registers::interrupted_for_nothing(&mut regs) {
            stopped.set_regs(&regs)?;
        }
        super::rseq::leave_critical_section(stopped.tid(), &mut regs)?;
        let xstate = Xstate::new(&stopped.xstate()?);
        let sigmask = stopped.sigmask()?;
        Ok(Self { stopped, regs, xstate, sigmask, seccomp_suspended: false })
    }

    /// Its id.
    pub fn tid(&self) -> HostPid {
        self.stopped.tid()
    }

    fn put_back(&self) -> Result<(), TraceError> {
        // The mask first: until the registers are back the thread still heals itself.
        self.stopped.set_sigmask(self.sigmask)?;
        let xstate = self.xstate.whole();
        if xsave::with_rights_for_key_0(&xstate).is_some() {
            self.stopped.set_xstate(&xstate)?;
        }
        self.stopped.set_regs(&self.regs)
    }
}

/// A process with an area mapped into it.
pub struct Injection<'t> {
    pid: HostPid,
    agent: &'t Thread,
    gadgets: Gadgets,
    memory: Arc<RemoteMemory>,
    scratch: Option<RemoteAddr>,
    saved: Vec<u8>,
    area: Option<Area>,
    /// Areas of killed injections that are gone now.
    removed: Vec<std::ops::Range<u64>>,
    check: &'t dyn Fn() -> Result<(), TraceError>,
    /// Since when `check` says that it is enough.
    enough: Cell<Option<Instant>>,
    live: bool,
    /// A thread could not be caught: it still needs the area, and heals itself.
    lost: bool,
    /// SIGSTOPs that were kept from threads of a process that is stopped already.
    stops: RefCell<Vec<KeptStop>>,
}

/// Where a SIGSTOP pended that was kept from a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeptStop {
    /// It was sent to the process.
    Process,
    /// It was sent to this thread.
    Thread(HostPid),
}

fn proc_bytes(path: String) -> Result<Vec<u8>, TraceError> {
    read_proc(&path).map_err(|source| TraceError::Proc { path, source })
}

/// Reads /proc/TID/maps.
pub(crate) fn read_maps(tid: HostPid) -> Result<Vec<Vma>, TraceError> {
    Ok(maps::parse(&proc_bytes(format!("/proc/{tid}/maps"))?)?)
}

/// Reads /proc/PID/task/TID/status.
pub(crate) fn read_status(pid: HostPid, tid: HostPid) -> Result<TaskStatus, TraceError> {
    Ok(crate::proc::status::parse(&proc_bytes(format!("/proc/{pid}/task/{tid}/status"))?)?)
}

/// Where the signal frame goes: the far end of the main stack if the stack pointers leave room,
/// else right below the agent's stack pointer, as for a signal.
/// `None` when neither has room (a stack used to its last page).
fn scratch_place(maps: &[Vma], sps: &[u64], agent_sp: u64, len: u64) -> Option<RemoteAddr> {
    let stack = maps.iter().find(|v| matches!(v.name, Some(VmaName::Stack)));
    if let Some(stack) = stack {
        let lowest =
            sps.iter().copied().filter(|sp| (stack.start..stack.end).contains(sp)).min().unwrap_or(stack.end);
        if lowest.saturating_sub(stack.start) > len + RED_ZONE + 4 * PAGE
            && stack.prot & libc::PROT_WRITE != 0
        {
            return Some(RemoteAddr(stack.start + PAGE));
        }
    }
    let low = agent_sp.saturating_sub(RED_ZONE + len + 64) & !63;
    let room = maps
        .iter()
        .any(|v| v.start <= low && low + len <= v.end && v.prot & libc::PROT_WRITE != 0 && !v.shared);
    room.then_some(RemoteAddr(low))
}

impl std::fmt::Debug for Injection<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injection").field("pid", &self.pid).field("area", &self.area).finish_non_exhaustive()
    }
}

impl<'t> Injection<'t> {
    /// Maps an area of at least `len` bytes into the process of `agent`, one of `threads`, all of which are
    /// stopped. `check` may end waits early.
    pub fn enter(
        pid: HostPid,
        agent: &'t Thread,
        threads: &[&Thread],
        len: usize,
        cache: &mut GadgetCache,
        check: &'t dyn Fn() -> Result<(), TraceError>,
    ) -> Result<Self, TraceError> {
        Self::enter_mapped(pid, agent, threads, &read_maps(agent.tid())?, len, cache, check)
    }

    /// As [`Self::enter`], for who has read the `maps` of the process since it stopped.
    pub(crate) fn enter_mapped(
        pid: HostPid,
        agent: &'t Thread,
        threads: &[&Thread],
        maps: &[Vma],
        len: usize,
        cache: &mut GadgetCache,
        check: &'t dyn Fn() -> Result<(), TraceError>,
    ) -> Result<Self, TraceError> {
        let tid = agent.tid();
        let len = CODE_LEN + len.next_multiple_of(CODE_LEN);
        let memory = Arc::new(RemoteMemory::open(tid)?);
        let gadgets = cache.search(pid, maps, &memory)?;
        let no_room = TraceError::Inject { what: "room for the list area", pid, source: Errno::ENOMEM };
        let used = maps.iter().map(|v| (v.start, v.end)).collect();
        let at = RemoteAddr(room::free(used, len as u64).ok_or(no_room)?);
        let sps: Vec<u64> = threads.iter().map(|t| t.regs.rsp).collect();
        // The frame's own 64-byte alignment needs slack on top.
        let len_frame =
            (sigframe::build(&agent.regs, &agent.xstate.whole(), agent.sigmask, RemoteAddr(0)).bytes.len()
                + 256) as u64;
        // One frame of what undoes the first call, and one of the true state.
        let len_frame = 2 * len_frame;
        let scratch = scratch_place(maps, &sps, agent.regs.rsp, len_frame);
        let mut saved = vec![0u8; usize::try_from(len_frame).unwrap_or(0)];
        match scratch {
            Some(at) => memory.read(at, &mut saved)?,
            None => tracing::debug!(
                "process {pid}: no room for a signal frame; its first call cannot heal itself"
            ),
        }
        let mut this = Self {
            pid,
            agent,
            gadgets,
            memory,
            scratch,
            saved,
            area: None,
            removed: Vec::new(),
            check,
            enough: Cell::new(None),
            live: true,
            lost: false,
            stops: RefCell::default(),
        };
        check()?;
        this.map(at, len)?;
        this.remove_stale(maps, threads)?;
        Ok(this)
    }

    /// Maps the area at a free address. Whatever the target's code makes of the call, only the address that was asked for
    /// is used afterwards.
    ///
    /// Its header is written while the agent is still at the exit of the call, from where it would unmap the area itself if
    /// crtool died: by the header a later injection knows the area.
    fn map(&mut self, at: RemoteAddr, len: usize) -> Result<(), TraceError> {
        let mut area = Area::with_code(at, len, Memory::File(Arc::clone(&self.memory)));
        // If crtool dies, filters are in force again: one that forbids munmap would kill the task. An unused mapping does not.
        let filtered = read_status(self.pid, self.agent.tid())?.seccomp.is_some_and(|mode| mode != 0);
        let unmap = (!filtered).then_some((libc::SYS_munmap, [at.0, len as u64, 0, 0, 0, 0]));
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        let code = libc::PROT_READ | libc::PROT_EXEC;
        let data = libc::PROT_READ | libc::PROT_WRITE;
        let mmap = |prot: i32| [at.0, len as u64, prot as u64, flags as u64, u64::MAX, 0];
        let pid = self.pid;
        let failed = |what, result: i64| {
            let source = Errno::from_raw(i32::try_from(-result).unwrap_or(0));
            TraceError::Inject { what, pid, source }
        };
        let mut written = Ok(());
        let mut write = |result: i64| {
            if u64::try_from(result) == Ok(at.0) {
                written = area.flush();
            }
        };
        let mut mapped = self.call(libc::SYS_mmap, mmap(code | data), unmap, &mut write)?;
        // PR_SET_MDWE forbids memory that can be written and executed, and memory that becomes executable; code that was
        // so from the beginning and is written from outside it cannot forbid.
        let separate = mapped == -i64::from(libc::EACCES);
        if separate {
            mapped = self.call(libc::SYS_mmap, mmap(code), unmap, &mut write)?;
        }
        if (-4095..0).contains(&mapped) {
            return Err(failed("mmap of the list area", mapped));
        }
        self.area = Some(area);
        written?;
        if separate {
            let rest = [at.0 + CODE_LEN as u64, (len - CODE_LEN) as u64, data as u64, 0, 0, 0];
            let result = self.single_call(libc::SYS_mprotect, rest)?;
            if result != 0 {
                return Err(failed("mprotect of the list area", result));
            }
        }
        Ok(())
    }

    /// Areas that an injection which was killed has left behind.
    fn remove_stale(&mut self, maps: &[Vma], threads: &[&Thread]) -> Result<(), TraceError> {
        let executable =
            |v: &&Vma| !v.shared && v.ino == 0 && v.name.is_none() && v.prot & libc::PROT_EXEC != 0;
        for vma in maps.iter().filter(executable) {
            let at = RemoteAddr(vma.start);
            let mut page = vec![0u8; CODE_LEN];
            let read = self.memory.read_some(at, &mut page);
            let Some(len) = area::len_of_stale(at, &page[..read]) else { continue };
            // All of it must be memory like that of an area, not something that was mapped over it.
            let inside = maps.iter().filter(|v| v.start < at.0 + len && v.end > at.0);
            let plain =
                inside.clone().all(|v| !v.shared && v.ino == 0 && v.name.is_none() && v.end <= at.0 + len);
            let covered: u64 = inside.map(Vma::len).sum();
            // A task that has been stopped all the time is still on its way back through it.
            let in_use = threads.iter().any(|t| (at.0..at.0 + len).contains(&t.regs.rip));
            if plain && covered == len && !in_use {
                self.unmap(at, len)?;
                self.removed.push(at.0..at.0 + len);
            }
        }
        Ok(())
    }

    /// Whether `addr` was in an area that a killed injection had left behind, and that this one has removed.
    pub fn has_removed(&self, addr: u64) -> bool {
        self.removed.iter().any(|area| area.contains(&addr))
    }

    fn area(&mut self) -> Result<&mut Area, TraceError> {
        self.area.as_mut().ok_or(TraceError::Area(Errno::EBADF))
    }

    /// The last page of the area: if room was asked for that no list takes, one that nobody touches.
    pub(crate) fn last_page(&self) -> Result<RemoteAddr, TraceError> {
        let area = self.area.as_ref().ok_or(TraceError::Area(Errno::EBADF))?;
        Ok(area.start().plus((area.len() as u64).saturating_sub(PAGE)))
    }

    /// What a list that [`Self::run`] has run returned. They are the target's own words about itself.
    pub fn results(&self, placed: &Placed) -> Result<Results, TraceError> {
        self.area.as_ref().ok_or(TraceError::Area(Errno::EBADF))?.results(placed)
    }

    /// A `syscall` instruction of the process itself, which stays when the area goes.
    pub fn own_syscall(&self) -> RemoteAddr {
        self.gadgets.syscall_ret
    }

    /// The check for waits for a thread that must not be left alone.
    fn patience(&self) -> impl Fn() -> Result<(), TraceError> {
        || match (self.check)() {
            Ok(()) => Ok(()),
            Err(error) => {
                let since = self.enough.get().unwrap_or_else(Instant::now);
                self.enough.set(Some(since));
                if since.elapsed() > GRACE { Err(error) } else { Ok(()) }
            }
        }
    }

    /// The signal to go on with after a thread reported a stop signal, see the head of this module.
    fn after_stop_signal(&self, tid: HostPid) -> i32 {
        const SI_TKILL: [u8; 4] = (-6i32).to_ne_bytes();
        if !matches!(self.agent.stopped.stop(), Stop::Group(_)) {
            return libc::SIGSTOP;
        }
        let of_thread = ptrace::get_siginfo(tid).is_ok_and(|info| info[8..12] == SI_TKILL);
        let kept = if of_thread { KeptStop::Thread(tid) } else { KeptStop::Process };
        let mut stops = self.stops.borrow_mut();
        if !stops.contains(&kept) {
            stops.push(kept);
        }
        0
    }

    /// Lets the agent's next stop be one from which the kernel restarts interrupted calls by itself.
    fn stop_before_user_code(&self) -> Result<(), TraceError> {
        let tid = self.agent.tid();
        let cont = |signal| ptrace::cont(tid, signal).map_err(|e| TraceError::request("PTRACE_CONT", tid, e));
        ptrace::interrupt(tid).map_err(|e| TraceError::request("PTRACE_INTERRUPT", tid, e))?;
        cont(0)?;
        loop {
            match self.agent.stopped.report(&self.patience())? {
                Status::Stopped(event, ptrace::EVENT_STOP) => {
                    // Somebody has let the process go on meanwhile, which takes back stops that wait.
                    if event == libc::SIGTRAP {
                        self.stops.borrow_mut().clear();
                    }
                    return Ok(());
                }
                Status::Stopped(libc::SIGSTOP, 0) => cont(self.after_stop_signal(tid))?,
                stop => return Err(TraceError::Stop { tid, stop, doing: "being put back" }),
            }
            self.patience()()?;
        }
    }

    /// One system call of the agent through its own code.
    fn single_call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, TraceError> {
        self.call(nr, args, None, &mut |_| {})
    }

    /// One system call of the agent through its own code, at whose exit something is done with the result. If crtool dies
    /// meanwhile, the agent makes another call that undoes it before it goes back to where it was.
    fn call(
        &mut self,
        nr: i64,
        args: [u64; 6],
        undo: Option<(i64, [u64; 6])>,
        at_exit: &mut dyn FnMut(i64),
    ) -> Result<i64, TraceError> {
        let agent = self.agent;
        let mut sp = agent.regs.rsp;
        if let Some(scratch) = self.scratch {
            let mut heal = agent.regs;
            crate::arch::restart(&mut heal);
            let mut end = scratch.plus(64);
            sp = self.push_frame(&mut end, &heal, agent.sigmask)?;
            if let Some((nr, args)) = undo {
                end = RemoteAddr(end.0.next_multiple_of(64)).plus(64);
                let regs = self.regs_for(nr, args, sp);
                sp = self.push_frame(&mut end, &regs, ALL_BLOCKED)?;
            }
        }
        let regs = self.regs_for(nr, args, sp);
        let result = (|| {
            agent.stopped.set_regs(&regs)?;
            agent.stopped.set_sigmask(ALL_BLOCKED)?;
            self.to_syscall_stop()?;
            // The code is the target's, and somebody else may have changed it since it was chosen. What the registers are now is what
            // the kernel does. A target in a sandbox must not get another call by that, because its filters are suspended.
            let mut now = agent.stopped.regs()?;
            let same = now.orig_rax == nr.cast_unsigned()
                && [now.rdi, now.rsi, now.rdx, now.r10, now.r8, now.r9] == args;
            if !same {
                now.orig_rax = u64::MAX;
                agent.stopped.set_regs(&now)?;
            }
            self.to_syscall_stop()?;
            if !same {
                return Err(TraceError::Changed(agent.tid()));
            }
            let result = agent.stopped.regs()?.rax.cast_signed();
            at_exit(result);
            Ok(result)
        })();
        let back = self.stop_before_user_code().and_then(|()| agent.put_back());
        self.lost |= back.is_err();
        if let Some(scratch) = self.scratch
            && !self.lost
        {
            self.memory.write(scratch, &self.saved)?;
        }
        match (result, back) {
            (Ok(value), Ok(())) => Ok(value),
            (Err(e), _) | (_, Err(e)) => Err(e),
        }
    }

    /// Registers of the agent for a call of its own code that returns to the address at `sp`.
    fn regs_for(&self, nr: i64, args: [u64; 6], sp: u64) -> libc::user_regs_struct {
        let mut regs = self.agent.regs;
        regs.orig_rax = u64::MAX;
        regs.rax = nr.cast_unsigned();
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        regs.rip = self.gadgets.syscall_ret.0;
        regs.rsp = sp;
        regs.eflags &= !0x0500; // no single steps, no reversed string operations
        regs
    }

    /// Writes a signal frame of the agent with these registers at `end`, which is behind it then. Gives where the stack
    /// pointer has to be for a return to it: at the word before the frame.
    fn push_frame(
        &self,
        end: &mut RemoteAddr,
        regs: &libc::user_regs_struct,
        sigmask: u64,
    ) -> Result<u64, TraceError> {
        let frame = sigframe::build(regs, &self.agent.xstate.whole(), sigmask, *end);
        self.memory.write(*end, &frame.bytes)?;
        *end = end.plus(frame.bytes.len() as u64);
        let slot = RemoteAddr(frame.rsp.0.wrapping_sub(8));
        let back = self.gadgets.sigreturn.unwrap_or_default();
        self.memory.write(slot, &back.0.to_ne_bytes())?;
        Ok(slot.0)
    }

    fn to_syscall_stop(&self) -> Result<(), TraceError> {
        let tid = self.agent.tid();
        let mut signal = 0;
        loop {
            ptrace::syscall(tid, signal).map_err(|e| TraceError::request("PTRACE_SYSCALL", tid, e))?;
            signal = match self.agent.stopped.report(&self.patience())? {
                Status::Stopped(signal, 0) if signal == libc::SIGTRAP | 0x80 => return Ok(()),
                Status::Stopped(_, ptrace::EVENT_STOP) => 0,
                Status::Stopped(libc::SIGSTOP, 0) => self.after_stop_signal(tid),
                stop => return Err(TraceError::Stop { tid, stop, doing: "making a system call" }),
            };
            self.patience()()?;
        }
    }

    fn unmap(&mut self, at: RemoteAddr, len: u64) -> Result<(), TraceError> {
        match self.single_call(libc::SYS_munmap, [at.0, len, 0, 0, 0, 0])? {
            0 => Ok(()),
            e => Err(TraceError::Inject {
                what: "munmap of the list area",
                pid: self.pid,
                source: Errno::from_raw(i32::try_from(-e).unwrap_or(0)),
            }),
        }
    }

    /// Runs one list in each thread, all at the same time, and puts the threads back.
    pub fn run(&mut self, jobs: &[(&Thread, List)]) -> Result<Vec<Placed>, TraceError> {
        let pid = self.pid;
        (self.check)()?;
        let area = self.area()?;
        let runner = area.runner();
        let mut ready = Vec::with_capacity(jobs.len());
        for (thread, list) in jobs {
            ready.push(Job::place(pid, thread, list, area)?);
        }
        area.flush()?;
        let mut started = 0;
        let mut outcome = Ok(());
        for ((thread, _), job) in jobs.iter().zip(&ready) {
            outcome = job.start(thread, runner);
            if outcome.is_err() {
                break;
            }
            started += 1;
        }
        // Every thread that was started must be stopped again and put back before anything else happens, because its
        // registers point into the area.
        for ((thread, _), job) in jobs.iter().zip(&ready).take(started) {
            let caught = self.catch(thread, job);
            // Also one that was caught in another way than it should stands still.
            let back = thread.put_back();
            self.lost |= back.is_err();
            outcome = outcome.and(caught).and(back);
        }
        outcome?;
        let all: Vec<&Placed> = ready.iter().map(|job| &job.list).collect();
        let area = self.area()?;
        for job in &ready {
            if let Some(failure) = area.failure(job.slot, &all)? {
                return Err(failure.error);
            }
            if !area.is_done(job.slot)? {
                return Err(TraceError::Area(Errno::EPROTO));
            }
        }
        Ok(ready.into_iter().map(|job| job.list).collect())
    }

    /// Waits until `thread` has run its list and is stopped where its registers can be put back.
    fn catch(&self, thread: &Thread, job: &Job) -> Result<(), TraceError> {
        let tid = thread.tid();
        let go = |step: fn(HostPid, i32) -> Result<(), Errno>, signal: i32| {
            step(tid, signal).map_err(|e| TraceError::request("PTRACE_CONT", tid, e))
        };
        let run_on: fn(HostPid, i32) -> Result<(), Errno> =
            if job.signal.is_some() { ptrace::cont } else { ptrace::syscall };
        let mut at_end = false;
        loop {
            self.patience()()?;
            match thread.stopped.report(&self.patience())? {
                Status::Stopped(got, 0) if Some(got) == job.signal => {
                    // Others may send this signal too, which nobody would notice.
                    let area = self.area.as_ref().ok_or(TraceError::Area(Errno::EBADF))?;
                    if area.is_done(job.slot)? {
                        return Ok(());
                    }
                    go(ptrace::cont, 0)?;
                }
                // Without a signal to stop with, every call stops; the last one is rt_sigreturn.
                Status::Stopped(got, 0) if got == libc::SIGTRAP | 0x80 => {
                    let mut regs = thread.stopped.regs()?;
                    if regs.orig_rax == libc::SYS_rt_sigreturn as u64 && !at_end {
                        at_end = true;
                        regs.orig_rax = u64::MAX;
                        thread.stopped.set_regs(&regs)?;
                        go(ptrace::syscall, 0)?;
                    } else if at_end {
                        ptrace::interrupt(tid)
                            .map_err(|e| TraceError::request("PTRACE_INTERRUPT", tid, e))?;
                        go(ptrace::cont, 0)?;
                    } else {
                        go(ptrace::syscall, 0)?;
                    }
                }
                Status::Stopped(_, ptrace::EVENT_STOP) if at_end => return Ok(()),
                Status::Stopped(_, ptrace::EVENT_STOP) => go(run_on, 0)?,
                Status::Stopped(libc::SIGSTOP, 0) => {
                    let signal = self.after_stop_signal(tid);
                    go(if at_end { ptrace::cont } else { run_on }, signal)?;
                }
                stop => return Err(TraceError::Stop { tid, stop, doing: "running a list" }),
            }
        }
    }

    /// Unmaps the area; the process is as it was.
    pub fn leave(mut self) -> Result<(), TraceError> {
        self.close()
    }

    fn close(&mut self) -> Result<(), TraceError> {
        if !std::mem::take(&mut self.live) || self.lost {
            return Ok(());
        }
        let closed = match self.area.take() {
            Some(area) => self.unmap(area.start(), area.len() as u64),
            None => Ok(()),
        };
        for kept in self.stops.take() {
            // Gone meanwhile: its own affair.
            let _ = match kept {
                KeptStop::Process => crate::sys::task::kill(self.pid, libc::SIGSTOP),
                KeptStop::Thread(tid) => crate::sys::task::tgkill(self.pid, tid, libc::SIGSTOP),
            };
        }
        closed
    }
}

impl Drop for Injection<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            tracing::warn!("process {}: list area stays mapped: {e}", self.pid);
        }
    }
}

/// A signal that stops `thread` for its tracer and that nobody else notices: ignored, not blocked,
/// not pending.
fn stop_signal(status: &TaskStatus, mask: u64) -> Option<i32> {
    let bit = |signal: i32| 1u64 << (signal - 1);
    let free = |signal: i32| (mask | status.sigblk | status.sigpnd | status.shdpnd) & bit(signal) == 0;
    let by_default = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
    by_default.into_iter().find(|s| free(*s) && status.sigcgt & bit(*s) == 0).or_else(|| {
        (1..=64).find(|s| {
            free(*s)
                && status.sigign & bit(*s) != 0
                && ![libc::SIGKILL, libc::SIGSTOP, libc::SIGCONT].contains(s)
        })
    })
}

/// A list that has its place, and what its thread needs around it.
struct Job {
    list: Placed,
    slot: RemoteAddr,
    /// See [`stop_signal`].
    signal: Option<i32>,
}

impl Job {
    fn place(pid: HostPid, thread: &Thread, list: &List, area: &mut Area) -> Result<Self, TraceError> {
        let status = read_status(pid, thread.tid())?;
        let signal = stop_signal(&status, thread.sigmask);
        let mut heal = thread.regs;
        crate::arch::restart(&mut heal);
        let xstate = thread.xstate.whole();
        let size = sigframe::build(&heal, &xstate, thread.sigmask, RemoteAddr(0)).bytes.len();
        let at = area.alloc(size + 128, 64)?;
        let frame = sigframe::build(&heal, &xstate, thread.sigmask, at);
        area.write(at, &frame.bytes)?;
        let slot = area.slot()?;
        let mut tail = List::new("end of injection");
        tail.op(Op::Store(slot.plus(std::mem::offset_of!(Slot, done) as u64), 1));
        if let Some(signal) = signal {
            // It may be in a pid namespace below that of crtool.
            let innermost = |ids: &[i32], outer: i32| NsPid::new(ids.last().copied().unwrap_or(outer));
            let own_pid = innermost(&status.nstgid, status.tgid.get());
            let own_tid = innermost(&status.nspid, status.pid);
            let args = [own_pid.into(), own_tid.into(), signal.into()];
            tail.call("tgkill", libc::SYS_tgkill, &args, Want::Any);
        }
        tail.op(Op::Sigreturn(frame.rsp));
        let tail = area.place(&tail)?;
        let mut list = list.clone();
        list.op(Op::Jump(tail.start));
        let list = area.place(&list)?;
        area.arm(slot, list.start, tail.start)?;
        Ok(Self { list, slot, signal })
    }

    /// Sends `thread` into its list.
    fn start(&self, thread: &Thread, runner: RemoteAddr) -> Result<(), TraceError> {
        let tid = thread.tid();
        let mut regs = thread.regs;
        regs.orig_rax = u64::MAX;
        regs.rax = 0;
        regs.rip = runner.0;
        regs.rbx = self.list.start.0;
        regs.rbp = self.slot.0;
        regs.eflags &= !0x0500;
        thread.stopped.set_regs(&regs)?;
        if let Some(xstate) = xsave::with_rights_for_key_0(&thread.xstate.whole()) {
            // A list writes its results to memory with protection key 0, like all memory that nobody gave a key.
            thread.stopped.set_xstate(&xstate)?;
        }
        thread.stopped.set_sigmask(ALL_BLOCKED & !self.signal.map_or(0, |s| 1u64 << (s - 1)))?;
        match self.signal {
            Some(_) => ptrace::cont(tid, 0).map_err(|e| TraceError::request("PTRACE_CONT", tid, e)),
            None => ptrace::syscall(tid, 0).map_err(|e| TraceError::request("PTRACE_SYSCALL", tid, e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::arch::target::until_asleep;

    struct Sleeper(Child);
    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn sleeper() -> Sleeper {
        let child = Command::new("sleep").arg("600").stdout(Stdio::null()).spawn().unwrap();
        let child = Sleeper(child);
        until_asleep(HostPid::new(child.0.id().cast_signed()));
        child
    }

    fn hold(tid: HostPid) -> Thread {
        let seized = crate::tracee::Seized::seize(tid, &|| Ok(())).unwrap();
        Thread::new(seized.settle(&|| Ok(())).unwrap()).unwrap()
    }

    fn run_once(tid: HostPid) {
        let thread = hold(tid);
        let check = || Ok(());
        let mut injection =
            Injection::enter(tid, &thread, &[&thread], 64 << 10, &mut GadgetCache::default(), &check)
                .unwrap();
        let mut list = List::new("test");
        let pid = list.call("getpid", libc::SYS_getpid, &[], Want::Any);
        let name = list.cstr(b"/proc/self/comm");
        let fd = list.call("open", libc::SYS_open, &[name.into(), 0u64.into()], Want::Ok);
        let buf = list.space(16);
        let n = list.call("read", libc::SYS_read, &[fd.into(), buf.into(), 16u64.into()], Want::Ok);
        list.call("close", libc::SYS_close, &[fd.into()], Want::Zero);
        let placed = injection.run(&[(&thread, list)]).unwrap();
        let results = injection.results(&placed[0]).unwrap();
        assert_eq!(results.value(pid).unwrap(), i64::from(tid.get()));
        assert_eq!(results.value(n).unwrap(), 6);
        assert_eq!(results.data(buf, 6).unwrap(), b"sleep\n");
        injection.leave().unwrap();
        thread.stopped.detach().unwrap();
    }

    #[test]
    fn leaves_no_trace() {
        let child = sleeper();
        let tid = HostPid::new(child.0.id().cast_signed());
        let maps = || std::fs::read(format!("/proc/{tid}/maps")).unwrap();
        let call = || std::fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap();
        let (before, in_call) = (maps(), call());
        for _ in 0..5 {
            run_once(tid);
        }
        assert_eq!(String::from_utf8(before).unwrap(), String::from_utf8(maps()).unwrap());
        until_asleep(tid);
        // Still asleep, through the restart of the same call, with the same stack.
        let after = call();
        assert!(
            after.starts_with("219 ") || after.starts_with(in_call.split(' ').next().unwrap()),
            "{in_call} {after}"
        );
        assert_eq!(
            in_call.split(' ').rev().take(2).collect::<Vec<_>>(),
            after.split(' ').rev().take(2).collect::<Vec<_>>()
        );
    }

    #[test]
    fn states_of_registers_lose_nothing() {
        for whole in
            [vec![], vec![0; 11_008], vec![7; 576], [vec![0; 512], vec![3, 0, 0, 1], vec![0; 2000]].concat()]
        {
            let kept = Xstate::new(&whole);
            assert_eq!((kept.len(), kept.whole()), (whole.len(), whole));
        }
    }

    #[test]
    fn failed_call_is_named_and_heals() {
        let child = sleeper();
        let tid = HostPid::new(child.0.id().cast_signed());
        {
            let thread = hold(tid);
            let check = || Ok(());
            let mut injection =
                Injection::enter(tid, &thread, &[&thread], 64 << 10, &mut GadgetCache::default(), &check)
                    .unwrap();
            let mut list = List::new("test");
            list.call("close of nothing", libc::SYS_close, &[(-1i32).into()], Want::Zero);
            let error = injection.run(&[(&thread, list)]).unwrap_err();
            assert_eq!(error.to_string(), "test: step 0 (close of nothing)");
        }
        run_once(tid);
    }
}
