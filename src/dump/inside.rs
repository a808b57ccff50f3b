//! What only a task itself can tell, asked by one list for each thread.

use anyhow::{Context, Result};

use super::tree::Process;
use crate::{
    finding::Finding,
    image::pb,
    mem,
    proc::{maps::VmaName, status::Status},
    sys::Errno,
    task::{
        self, ProcessInside, ThreadInside,
        sem_undo::{self, Semaphores},
    },
    tracee::{GadgetCache, Injection, List, RemoteAddr, Thread, TraceError, procfs},
};

/// Room in the area for the runner and the process part, and for each thread (frame, list, results).
const AREA_BASE: usize = 64 << 10;
const AREA_PER_THREAD: usize = 8 << 10;
const PAGE: usize = 4096;

/// What a process told.
#[derive(Debug)]
pub(super) struct Inside {
    pub(super) process: ProcessInside,
    pub(super) memory: mem::Inside,
    /// In the order of [`Process::threads`].
    pub(super) threads: Vec<ThreadInside>,
    /// A `syscall` instruction of the process itself.
    pub(super) exit_gadget: RemoteAddr,
}

/// Runs the queries in all threads of a process. `None`: nothing may be run in it, see `findings`.
pub(super) fn look(
    process: &Process,
    cache: &mut GadgetCache,
    check: &dyn Fn() -> Result<(), TraceError>,
    findings: &mut Vec<Finding>,
) -> Result<Option<Inside>> {
    let pid = process.pid;
    let mut clean = true;
    let mut capabilities = Vec::with_capacity(process.threads.len());
    for thread in &process.threads {
        let status = crate::tracee::read_status(pid, thread.tid())?;
        capabilities.push(status.cap_eff);
        if let Some((what, reason, hint)) = unfit(&status, thread)? {
            let what = if thread.tid() == pid {
                what.to_owned()
            } else {
                format!("thread {}: {what}", thread.tid())
            };
            findings.push(Finding { pid, what, reason: reason.into(), hint: hint.into() });
            clean = false;
        }
    }
    if !clean {
        return Ok(None);
    }
    let agent = process.agent().context("no thread is alive")?;
    let all: Vec<&Thread> = process.threads.iter().collect();
    let frame = agent.xstate.len() * 2;
    let maps = crate::tracee::read_maps(agent.tid())?;
    // The page that the kernel shows to everybody is none of the task's areas.
    let areas = maps.iter().filter(|area| area.name != Some(VmaName::Vsyscall)).map(|area| area.start);
    let mut areas: Vec<u64> = areas.collect();
    // Threads that have adjustments of semaphores in common are asked once.
    let mut with_undo = Vec::new();
    for thread in &all {
        if sem_undo::has_list(thread.tid(), &with_undo)? {
            with_undo.push(thread.tid());
        }
    }
    let semaphores = if with_undo.is_empty() { Semaphores::default() } else { Semaphores::used()? };
    let len = AREA_BASE + all.len() * (AREA_PER_THREAD + frame) + mem::room(areas.len()) + 2 * PAGE;
    let len = len + with_undo.len() * semaphores.room();
    let len = len.next_multiple_of(PAGE);
    let timers = task::posix_timer_ids(pid)?;
    let mut injection = Injection::enter_mapped(pid, agent, &all, &maps, len, cache, check)?;
    drop(maps);
    areas.retain(|start| !injection.has_removed(*start));
    let untouched = injection.last_page()?;
    let mut jobs = Vec::with_capacity(all.len());
    let mut queries = Vec::with_capacity(all.len());
    let mut process_queries = None;
    for (thread, cap_eff) in all.iter().zip(capabilities) {
        let mut list = List::new(format!("queries of thread {}", thread.tid()));
        let undo = with_undo.contains(&thread.tid()).then_some(&semaphores);
        queries.push(task::thread_queries(&mut list, cap_eff, undo));
        if process_queries.is_none() {
            process_queries =
                Some((task::process_queries(&mut list, &timers), mem::queries(&mut list, &areas, untouched)));
        }
        jobs.push((*thread, list));
    }
    let placed = injection.run(&jobs)?;
    let mut threads = Vec::with_capacity(all.len());
    for (queries, placed) in queries.iter().zip(&placed) {
        threads.push(queries.read(&injection.results(placed)?)?);
    }
    let first = injection.results(placed.first().context("no list")?)?;
    let (of_process, of_memory) = process_queries.context("no queries")?;
    let (process, mut memory) = (of_process.read(&first)?, of_memory.read(&first)?);
    let exit_gadget = injection.own_syscall();
    injection.leave()?;
    if memory.more_room() > 0 {
        let len = (AREA_BASE + frame + memory.more_room()).next_multiple_of(PAGE);
        let mut injection = Injection::enter(pid, agent, &all, len, cache, check)?;
        let mut list = List::new(format!("more queries of task {pid}"));
        let more = memory.more(&mut list);
        let placed = injection.run(&[(agent, list)])?;
        memory.read_more(&more, &injection.results(placed.first().context("no list")?)?)?;
        injection.leave()?;
    }
    Ok(Some(Inside { process, memory, threads, exit_gadget }))
}

/// Why nothing can be run in a thread.
fn unfit(status: &Status, thread: &Thread) -> Result<Option<(&'static str, &'static str, &'static str)>> {
    const CS_32BIT: u64 = 0x23;
    if thread.regs.cs == CS_32BIT {
        return Ok(Some(("32-bit code", "tasks in compatibility mode are not supported yet", "")));
    }
    if status.seccomp.unwrap_or(0) != 0 && !thread.seccomp_suspended {
        return Ok(Some((
            "seccomp",
            "its filters cannot be suspended and would kill it",
            "run crtool with CAP_SYS_ADMIN and outside of seccomp",
        )));
    }
    if status.x86_thread_features.iter().any(|f| f == b"shstk") {
        return Ok(Some((
            "shadow stack",
            "not supported yet",
            "start it without (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)",
        )));
    }
    let dispatch = match crate::sys::ptrace::syscall_user_dispatch_mode(thread.tid()) {
        // Linux 6.4 tells it.
        Err(Errno::EIO | Errno::EINVAL) => 0,
        told => told.context("PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG")?,
    };
    if dispatch != 0 {
        return Ok(Some(("syscall user dispatch", "not supported yet", "")));
    }
    Ok(None)
}

/// The core image of a leader that has exited: a thread that will exit again as soon as it runs. The
/// format knows no dead threads, and this is the same for whoever restores it.
pub(super) fn dead_leader(
    process: &Process,
    like: &pb::CoreEntry,
    syscall: RemoteAddr,
) -> Result<pb::CoreEntry> {
    let stat = procfs::thread_stat(process.pid, process.pid)?;
    let mut core = like.clone();
    if let Some(info) = core.thread_info.as_mut() {
        info.clear_tid_addr = 0;
        let regs = &mut info.gpregs;
        regs.ax = libc::SYS_exit.cast_unsigned();
        regs.orig_ax = u64::MAX;
        regs.di = u64::from((stat.exit_code.cast_unsigned() >> 8) & 0xff);
        regs.ip = syscall.0;
    }
    if let Some(thread) = core.thread_core.as_mut() {
        thread.futex_rla = 0;
        thread.pdeath_sig = None;
        thread.call_left_ns = None;
        thread.signals_p = Some(pb::SignalQueueEntry::default());
        thread.blk_sigset = Some(u64::MAX);
        thread.rseq_entry = None;
        thread.comm = Some(stat.comm);
    }
    Ok(core)
}
