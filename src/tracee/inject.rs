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

use std::{
    cell::Cell,
    fs::File,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use super::{
    Area, GadgetCache, Gadgets, List, Op, Placed, RemoteAddr, RemoteMemory, Stop, Stopped, TraceError, Want,
};
use crate::{
    arch::{registers, sigframe, xsave},
    proc::{
        maps::{self, Vma, VmaName},
        status::Status as TaskStatus,
    },
    sys::{
        Errno,
        mapping::{Access, Mapping},
        ptrace,
        wait::Status,
    },
};

const PAGE: u64 = 4096;
/// Of an area. On x86 what can be written or run can be read as well, so the kernel needs not be told; and as
/// nobody else leaves it out, this is how an area is recognised that a killed crtool has left behind.
const PROT: i32 = libc::PROT_WRITE | libc::PROT_EXEC;
/// Bytes below the stack pointer that belong to the running function (System V ABI).
const RED_ZONE: u64 = 128;
const ALL_BLOCKED: u64 = u64::MAX;
/// A thread that runs code of ours is waited for even when the user or the clock says that it is enough: to pull its
/// stack or its code from under it would kill it. What it runs is short; one that takes longer than this hangs.
const GRACE: Duration = Duration::from_secs(5);

/// True state of a stopped thread, read once when it stopped.
#[derive(Debug)]
pub struct Thread {
    /// The thread, held.
    pub stopped: Stopped,
    /// Its general registers.
    pub regs: libc::user_regs_struct,
    /// Its xsave area.
    pub xstate: Vec<u8>,
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
        let xstate = stopped.xstate()?;
        let sigmask = stopped.sigmask()?;
        Ok(Self { stopped, regs, xstate, sigmask, seccomp_suspended: false })
    }

    /// Its id.
    pub fn tid(&self) -> i32 {
        self.stopped.tid()
    }

    fn put_back(&self) -> Result<(), TraceError> {
        // The mask first: until the registers are back the thread still heals itself.
        self.stopped.set_sigmask(self.sigmask)?;
        if xsave::with_rights_for_key_0(&self.xstate).is_some() {
            self.stopped.set_xstate(&self.xstate)?;
        }
        self.stopped.set_regs(&self.regs)
    }
}

/// A process with an area mapped into it.
pub struct Injection<'t> {
    pid: i32,
    agent: &'t Thread,
    gadgets: Gadgets,
    memory: RemoteMemory,
    scratch: Option<RemoteAddr>,
    saved: Vec<u8>,
    area: Option<Area>,
    check: &'t dyn Fn() -> Result<(), TraceError>,
    /// Since when `check` says that it is enough.
    enough: Cell<Option<Instant>>,
    live: bool,
    /// A thread could not be caught: it still needs the area, and heals itself.
    lost: bool,
}

fn proc_bytes(path: String) -> Result<Vec<u8>, TraceError> {
    std::fs::read(&path).map_err(|source| TraceError::Proc { path, source })
}

/// Reads /proc/TID/maps.
pub fn read_maps(tid: i32) -> Result<Vec<Vma>, TraceError> {
    Ok(maps::parse(&proc_bytes(format!("/proc/{tid}/maps"))?)?)
}

/// Reads /proc/PID/task/TID/status.
pub fn read_status(pid: i32, tid: i32) -> Result<TaskStatus, TraceError> {
    Ok(crate::proc::status::parse(&proc_bytes(format!("/proc/{pid}/task/{tid}/status"))?)?)
}

/// Areas have a number of pages that leaves this remainder, divided by [`LENGTH_STEP`].
const LENGTH_MARK: u64 = 37;
const LENGTH_STEP: u64 = 64;

/// The next length that says whose the area is. What is not used takes no memory.
fn marked_length(len: u64) -> u64 {
    let pages = len.div_ceil(PAGE);
    (pages + (LENGTH_MARK + LENGTH_STEP - pages % LENGTH_STEP) % LENGTH_STEP) * PAGE
}

fn ours_by_length(len: u64) -> bool {
    len.is_multiple_of(PAGE) && len / PAGE % LENGTH_STEP == LENGTH_MARK
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
        pid: i32,
        agent: &'t Thread,
        threads: &[&Thread],
        len: usize,
        cache: &mut GadgetCache,
        check: &'t dyn Fn() -> Result<(), TraceError>,
    ) -> Result<Self, TraceError> {
        let tid = agent.tid();
        let len = usize::try_from(marked_length(len as u64)).unwrap_or(len);
        let maps = read_maps(tid)?;
        let memory = RemoteMemory::open(tid)?;
        let gadgets = cache.search(pid, &maps, &memory)?;
        let sps: Vec<u64> = threads.iter().map(|t| t.regs.rsp).collect();
        // The frame's own 64-byte alignment needs slack on top.
        let len_frame =
            (sigframe::build(&agent.regs, &agent.xstate, agent.sigmask, RemoteAddr(0)).bytes.len() + 256)
                as u64;
        let scratch = scratch_place(&maps, &sps, agent.regs.rsp, len_frame);
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
            check,
            enough: Cell::new(None),
            live: true,
            lost: false,
        };
        check()?;

        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let result =
            this.single_call(libc::SYS_mmap, [0, len as u64, PROT as u64, flags as u64, u64::MAX, 0])?;
        let remote = match Errno::result(if (-4095..0).contains(&result) { -1 } else { 0 }) {
            Ok(_) => RemoteAddr(result.cast_unsigned()),
            Err(_) => {
                let source = Errno::from_raw(i32::try_from(-result).unwrap_or(0));
                return Err(TraceError::Inject { what: "mmap of the list area", pid, source });
            }
        };
        let path = format!("/proc/{tid}/map_files/{:x}-{:x}", remote.0, remote.0 + len as u64);
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| TraceError::Proc { path, source });
        let area = file.and_then(|file| {
            let map =
                Mapping::shared(file.as_fd(), 0, len, Access::ReadWrite, None).map_err(TraceError::Area)?;
            Area::new(map, remote)
        });
        match area {
            Ok(area) => this.area = Some(area),
            Err(e) => {
                this.unmap(remote, len as u64)?;
                return Err(e);
            }
        }
        this.remove_stale(&maps, threads)?;
        Ok(this)
    }

    /// Areas that an injection which was killed has left behind.
    fn remove_stale(&mut self, maps: &[Vma], threads: &[&Thread]) -> Result<(), TraceError> {
        for vma in
            maps.iter().filter(|v| v.shared && v.prot == PROT && v.path() == Some(b"/dev/zero (deleted)"))
        {
            // A task that has been stopped all the time is still on its way back through it.
            if threads.iter().any(|t| (vma.start..vma.end).contains(&t.regs.rip)) {
                continue;
            }
            let code = crate::sys::runner::code();
            let mut head = vec![0u8; code.len()];
            let read = self.memory.read_some(RemoteAddr(vma.start), &mut head) == code.len();
            // Killed right after the mmap, it is still empty. Then only its odd length and protection tell it
            // from memory of the program's own.
            let empty = ours_by_length(vma.len()) && head.iter().all(|&byte| byte == 0);
            if read && (head == code || empty) {
                self.unmap(RemoteAddr(vma.start), vma.len())?;
            }
        }
        Ok(())
    }

    /// The area.
    pub fn area(&mut self) -> Result<&mut Area, TraceError> {
        self.area.as_mut().ok_or(TraceError::Area(Errno::EBADF))
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

    /// Lets the agent's next stop be one from which the kernel restarts interrupted calls by itself.
    fn stop_before_user_code(&self) -> Result<(), TraceError> {
        let tid = self.agent.tid();
        ptrace::interrupt(tid).map_err(|e| TraceError::request("PTRACE_INTERRUPT", tid, e))?;
        ptrace::cont(tid, 0).map_err(|e| TraceError::request("PTRACE_CONT", tid, e))?;
        loop {
            match self.agent.stopped.report(&self.patience())? {
                Status::Stopped(_, ptrace::EVENT_STOP) => return Ok(()),
                Status::Stopped(signal, 0) => {
                    // A stop signal that nothing blocks; sent again when the thread is itself.
                    ptrace::cont(tid, 0).map_err(|e| TraceError::request("PTRACE_CONT", tid, e))?;
                    let _ = crate::sys::task::kill(self.pid, signal);
                }
                stop => return Err(TraceError::Stop { tid, stop, doing: "being put back" }),
            }
        }
    }

    /// One system call of the agent through its own code.
    fn single_call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, TraceError> {
        let agent = self.agent;
        let mut sp = agent.regs.rsp;
        if let Some(scratch) = self.scratch {
            let mut heal = agent.regs;
            crate::arch::restart(&mut heal);
            // The word before the frame is the return address.
            let at = scratch.plus(64);
            let frame = sigframe::build(&heal, &agent.xstate, agent.sigmask, at);
            self.memory.write(at, &frame.bytes)?;
            let slot = RemoteAddr(frame.rsp.0.wrapping_sub(8));
            let back = self.gadgets.sigreturn.unwrap_or_default();
            self.memory.write(slot, &back.0.to_ne_bytes())?;
            sp = slot.0;
        }
        let mut regs = agent.regs;
        regs.orig_rax = u64::MAX;
        regs.rax = nr.cast_unsigned();
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        regs.rip = self.gadgets.syscall_ret.0;
        regs.rsp = sp;
        regs.eflags &= !0x0500; // no single steps, no reversed string operations
        let result = (|| {
            agent.stopped.set_regs(&regs)?;
            agent.stopped.set_sigmask(ALL_BLOCKED)?;
            self.to_syscall_stop()?;
            self.to_syscall_stop()?;
            Ok(agent.stopped.regs()?.rax.cast_signed())
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

    fn to_syscall_stop(&self) -> Result<(), TraceError> {
        let tid = self.agent.tid();
        loop {
            ptrace::syscall(tid, 0).map_err(|e| TraceError::request("PTRACE_SYSCALL", tid, e))?;
            match self.agent.stopped.report(&self.patience())? {
                Status::Stopped(signal, 0) if signal == libc::SIGTRAP | 0x80 => return Ok(()),
                Status::Stopped(_, ptrace::EVENT_STOP) => {}
                Status::Stopped(libc::SIGSTOP, 0) => {
                    let _ = crate::sys::task::kill(self.pid, libc::SIGSTOP);
                }
                stop => return Err(TraceError::Stop { tid, stop, doing: "making a system call" }),
            }
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
        let mut placed = Vec::with_capacity(jobs.len());
        let mut slots = Vec::with_capacity(jobs.len());
        let mut signals = Vec::with_capacity(jobs.len());
        for (thread, list) in jobs {
            let status = read_status(pid, thread.tid())?;
            let signal = stop_signal(&status, thread.sigmask);
            let mut heal = thread.regs;
            crate::arch::restart(&mut heal);
            let size = sigframe::build(&heal, &thread.xstate, thread.sigmask, RemoteAddr(0)).bytes.len();
            let at = area.alloc(size + 128, 64)?;
            let frame = sigframe::build(&heal, &thread.xstate, thread.sigmask, at);
            area.write(at, &frame.bytes)?;
            let mut tail = List::new("end of injection");
            if let Some(signal) = signal {
                let ns_pid = *status.nstgid.last().unwrap_or(&status.tgid);
                let ns_tid = *status.nspid.last().unwrap_or(&status.pid);
                tail.call(
                    "tgkill",
                    libc::SYS_tgkill,
                    &[ns_pid.into(), ns_tid.into(), signal.into()],
                    Want::Any,
                );
            }
            tail.op(Op::Sigreturn(frame.rsp));
            let tail = area.place(&tail)?;
            let mut list = list.clone();
            list.op(Op::Jump(tail.start));
            let list = area.place(&list)?;
            let slot = area.slot()?;
            area.arm(slot, list.start, tail.start)?;
            placed.push(list);
            slots.push(slot);
            signals.push(signal);
        }
        let runner = area.runner();
        let mut started = 0;
        let mut outcome = Ok(());
        for (index, (thread, _)) in jobs.iter().enumerate() {
            outcome = start(thread, runner, placed[index].start, slots[index], signals[index]);
            if outcome.is_err() {
                break;
            }
            started = index + 1;
        }
        // Whoever was started must be caught again, whatever happened to others.
        for (index, (thread, _)) in jobs.iter().enumerate().take(started) {
            let caught = catch(thread, signals[index], &self.patience());
            // Also one that was caught in another way than it should stands still.
            let back = thread.put_back();
            self.lost |= back.is_err();
            outcome = outcome.and(caught).and(back);
        }
        outcome?;
        let area = self.area()?;
        let all: Vec<&Placed> = placed.iter().collect();
        for slot in slots {
            if let Some(failure) = area.failure(slot, &all)? {
                return Err(failure);
            }
        }
        Ok(placed)
    }

    /// Unmaps the area; the process is as it was.
    pub fn leave(mut self) -> Result<(), TraceError> {
        self.close()
    }

    fn close(&mut self) -> Result<(), TraceError> {
        if !std::mem::take(&mut self.live) || self.lost {
            return Ok(());
        }
        match self.area.take() {
            Some(area) => self.unmap(area.start(), area.len() as u64),
            None => Ok(()),
        }
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

fn start(
    thread: &Thread,
    runner: RemoteAddr,
    list: RemoteAddr,
    slot: RemoteAddr,
    signal: Option<i32>,
) -> Result<(), TraceError> {
    let tid = thread.tid();
    let mut regs = thread.regs;
    regs.orig_rax = u64::MAX;
    regs.rax = 0;
    regs.rip = runner.0;
    regs.rbx = list.0;
    regs.rbp = slot.0;
    regs.eflags &= !0x0500;
    thread.stopped.set_regs(&regs)?;
    if let Some(xstate) = xsave::with_rights_for_key_0(&thread.xstate) {
        // A list writes its results to memory with protection key 0, like all memory that nobody gave a key.
        thread.stopped.set_xstate(&xstate)?;
    }
    thread.stopped.set_sigmask(ALL_BLOCKED & !signal.map_or(0, |s| 1u64 << (s - 1)))?;
    match signal {
        Some(_) => ptrace::cont(tid, 0).map_err(|e| TraceError::request("PTRACE_CONT", tid, e)),
        None => ptrace::syscall(tid, 0).map_err(|e| TraceError::request("PTRACE_SYSCALL", tid, e)),
    }
}

/// Waits until `thread` has run its list and is stopped where its registers can be put back.
fn catch(
    thread: &Thread,
    signal: Option<i32>,
    check: &dyn Fn() -> Result<(), TraceError>,
) -> Result<(), TraceError> {
    let tid = thread.tid();
    let go = |req: fn(i32, i32) -> Result<(), Errno>| {
        req(tid, 0).map_err(|e| TraceError::request("ptrace", tid, e))
    };
    let mut at_end = false;
    loop {
        match thread.stopped.report(check)? {
            Status::Stopped(got, 0) if Some(got) == signal => {
                let info =
                    ptrace::get_siginfo(tid).map_err(|e| TraceError::request("PTRACE_GETSIGINFO", tid, e))?;
                let code = i32::from_ne_bytes([info[8], info[9], info[10], info[11]]);
                if code == -6 {
                    return Ok(());
                }
                go(ptrace::cont)?;
            }
            // Without a signal to stop with, every call stops; the last one is rt_sigreturn.
            Status::Stopped(got, 0) if got == libc::SIGTRAP | 0x80 => {
                let mut regs = thread.stopped.regs()?;
                if regs.orig_rax == libc::SYS_rt_sigreturn as u64 && !at_end {
                    at_end = true;
                    regs.orig_rax = u64::MAX;
                    thread.stopped.set_regs(&regs)?;
                    go(ptrace::syscall)?;
                } else if at_end {
                    ptrace::interrupt(tid).map_err(|e| TraceError::request("PTRACE_INTERRUPT", tid, e))?;
                    go(ptrace::cont)?;
                } else {
                    go(ptrace::syscall)?;
                }
            }
            Status::Stopped(_, ptrace::EVENT_STOP) if at_end => return Ok(()),
            Status::Stopped(_, ptrace::EVENT_STOP) => match signal {
                Some(_) => go(ptrace::cont)?,
                None => go(ptrace::syscall)?,
            },
            Status::Stopped(libc::SIGSTOP, 0) => {
                let _ = crate::sys::task::kill(tid, libc::SIGSTOP);
                return Err(TraceError::Stop {
                    tid,
                    stop: Status::Stopped(libc::SIGSTOP, 0),
                    doing: "running a list (somebody stops the tree)",
                });
            }
            stop => return Err(TraceError::Stop { tid, stop, doing: "running a list" }),
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
        until_asleep(child.0.id().cast_signed());
        child
    }

    fn hold(tid: i32) -> Thread {
        let seized = crate::tracee::Seized::seize(tid, &|| Ok(())).unwrap();
        Thread::new(seized.settle(&|| Ok(())).unwrap()).unwrap()
    }

    #[test]
    fn lengths_are_marked() {
        for len in [0, 1, 4096, 37 * 4096, 37 * 4096 + 1, 1 << 20] {
            let marked = marked_length(len);
            assert!(marked >= len && marked < len + 65 * PAGE && ours_by_length(marked), "{len}");
        }
        assert!(!ours_by_length(1 << 20));
    }

    fn run_once(tid: i32) {
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
        let area = injection.area().unwrap();
        assert_eq!(area.result(&placed[0], pid).unwrap(), i64::from(tid));
        assert_eq!(area.result(&placed[0], n).unwrap(), 6);
        assert_eq!(area.data(&placed[0], buf, 6).unwrap(), b"sleep\n");
        injection.leave().unwrap();
        thread.stopped.detach().unwrap();
    }

    #[test]
    fn leaves_no_trace() {
        let child = sleeper();
        let tid = i32::try_from(child.0.id()).unwrap();
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
    fn failed_call_is_named_and_heals() {
        let child = sleeper();
        let tid = i32::try_from(child.0.id()).unwrap();
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
