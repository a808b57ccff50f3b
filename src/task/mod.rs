//! The state of tasks: one file for each resource, dump and restore side by side.
//!
//! [`THREAD`] and [`PROCESS`] are the written tables; their order is the order of a restore.
//!
//! A dump calls [`dump_thread`] for each thread and [`dump_process`] once. A restore plans, in this order:
//! [`plan_process_early`] (before descriptors and the root directory change), [`plan_process`], the clones of
//! the threads, then [`plan_thread`] in each thread's own list. The leader's comes after the clones, since
//! timers may name threads. What only ptrace can set is in [`final_state`].

mod affinity;
mod autogroup;
pub(crate) mod call;
mod comm;
mod coredump_filter;
mod creds;
mod dumpable;
mod error;
mod inside;
mod io_flusher;
mod ioprio;
mod itimer;
mod keyrings;
mod landlock;
mod loginuid;
mod mce_kill;
mod mdwe;
mod membarrier;
mod mempolicy;
mod oom;
mod pdeath;
mod pending;
mod personality;
mod ports;
mod posix_timer;
mod refuse;
mod rlimit;
pub(crate) mod robust_list;
mod rseq;
mod sched;
pub mod seccomp;
pub mod sem_undo;
pub(crate) mod settle;
pub mod sigaction;
mod sigaltstack;
mod speculation;
mod state;
mod subreaper;
mod supervisor;
#[cfg(test)]
mod tests;
mod thp;
mod tid_address;
mod timer_slack;
mod tls;
mod tsc;
mod xcomp;

pub use dumpable::dumpable_to_set;
pub use error::{Result, TaskError};
pub use inside::{ProcessInside, ThreadInside, process_queries, thread_queries};
pub use pending::{PendingStop, pending_signals, pending_stop, signal_of};
pub use posix_timer::ids as posix_timer_ids;
pub use state::final_state;
pub use supervisor::Supervisor;

use libc::user_regs_struct;

use crate::{
    finding::Finding,
    image::pb,
    proc::{stat::Stat, status::Status},
    sys::pid::{HostPid, NsPid},
    tracee::List,
};

/// A stopped thread, as ptrace and its list of queries showed it.
#[derive(Debug, Clone)]
pub struct ThreadCx {
    /// Its process.
    pub pid: HostPid,
    /// Its own id.
    pub tid: HostPid,
    /// Registers as PTRACE_GETREGS gave them before anything ran in the thread, outside of restartable sequences.
    pub regs: user_regs_struct,
    /// The xsave area of the same moment.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub sigmask: u64,
    /// Signals whose handlers have SA_RESTART: [`ProcessInside::restarting`].
    pub restarting: u64,
    /// What it told from inside.
    pub inside: ThreadInside,
}

/// A process, through its leader or another thread that lives.
#[derive(Debug, Clone)]
pub struct ProcessCx {
    /// Its id.
    pub pid: HostPid,
    /// The stopped thread through which it is asked: the leader unless that is dead.
    pub tid: HostPid,
    /// Number of its threads.
    pub threads: usize,
    /// Blocked signals of the leader.
    pub sigmask: u64,
    /// The signal that stopped it, if job control had.
    pub stop_signal: Option<i32>,
    /// Whether it is the leader of its session.
    pub leads_session: bool,
    /// What it told from inside.
    pub inside: ProcessInside,
}

/// What is dumped of a thread.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ThreadParts {
    /// Registers.
    pub info: pb::ThreadInfoX86,
    /// Everything else.
    pub core: pb::ThreadCoreEntry,
}

/// A thread being dumped, with what /proc says of it.
pub(crate) struct ThreadView<'a> {
    cx: &'a ThreadCx,
    status: Status,
    stat: Stat,
}

/// A thread being restored.
#[derive(Debug, Clone, Copy)]
pub struct ThreadPlan<'a> {
    /// Its core image.
    pub core: &'a pb::CoreEntry,
    /// Its process.
    pub pid: NsPid,
    /// Its own id.
    pub tid: NsPid,
    /// Filters of the whole tree.
    pub seccomp: &'a seccomp::Plan,
    /// Who restores it.
    pub supervisor: &'a Supervisor,
}

impl<'a> ThreadPlan<'a> {
    fn thread(&self) -> Result<&'a pb::ThreadCoreEntry> {
        self.core.thread_core.as_deref().ok_or_else(|| TaskError::image("thread part is missing"))
    }

    /// The process part, which only the leader's image has.
    fn process(&self) -> Option<&'a pb::TaskCoreEntry> {
        self.core.tc.as_deref()
    }
}

/// One resource of a thread.
struct ThreadPart {
    name: &'static str,
    dump: fn(&ThreadView<'_>, &mut ThreadParts, &mut Vec<Finding>) -> Result<()>,
    plan: fn(&ThreadPlan<'_>, &mut List) -> Result<()>,
}

/// One resource of a process.
struct ProcessPart {
    name: &'static str,
    dump: fn(&ProcessCx, &mut pb::TaskCoreEntry, &mut Vec<Finding>) -> Result<()>,
    when: When,
    plan: fn(&pb::TaskCoreEntry, &Supervisor, &mut List) -> Result<()>,
}

/// When a resource of a process is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// While /proc and the descriptors of the supervisor are still there.
    Early,
    /// Before the threads are made.
    Normal,
    /// By the leader's own list: see [`THREAD`].
    Leader,
}

/// Resources of a thread, in the order of a restore. Credentials come late because most of what comes before
/// them needs privileges, and in three steps, since filters need them too; what a change of credentials
/// resets comes last.
static THREAD: &[ThreadPart] = &[
    ThreadPart { name: "registers", dump: state::dump, plan: nothing },
    ThreadPart { name: "refuse", dump: refuse::dump_thread, plan: nothing },
    ThreadPart { name: "landlock", dump: landlock::dump, plan: nothing },
    ThreadPart { name: "ports", dump: ports::dump, plan: nothing },
    ThreadPart { name: "keyrings", dump: keyrings::dump, plan: nothing },
    ThreadPart { name: "sem_undo", dump: sem_undo::dump, plan: nothing },
    ThreadPart { name: "comm", dump: comm::dump_thread, plan: comm::plan },
    ThreadPart { name: "xcomp", dump: xcomp::dump_thread, plan: xcomp::plan_thread },
    ThreadPart { name: "tls", dump: tls::dump, plan: tls::plan },
    ThreadPart { name: "tid_address", dump: tid_address::dump, plan: tid_address::plan },
    ThreadPart { name: "rseq", dump: rseq::dump, plan: rseq::plan },
    ThreadPart { name: "sigaltstack", dump: sigaltstack::dump, plan: sigaltstack::plan },
    ThreadPart { name: "pending", dump: pending::dump_thread, plan: pending::plan },
    ThreadPart { name: "itimer", dump: leader_only, plan: itimer::plan },
    ThreadPart { name: "posix_timer", dump: leader_only, plan: posix_timer::plan },
    ThreadPart { name: "personality", dump: personality::dump_thread, plan: personality::plan_thread },
    ThreadPart { name: "mempolicy", dump: mempolicy::dump, plan: mempolicy::plan },
    ThreadPart { name: "affinity", dump: affinity::dump, plan: affinity::plan },
    ThreadPart { name: "sched", dump: sched::dump, plan: sched::plan },
    ThreadPart { name: "ioprio", dump: ioprio::dump, plan: ioprio::plan },
    ThreadPart { name: "timer_slack", dump: timer_slack::dump, plan: timer_slack::plan },
    ThreadPart { name: "mce_kill", dump: mce_kill::dump, plan: mce_kill::plan },
    ThreadPart { name: "io_flusher", dump: io_flusher::dump, plan: io_flusher::plan },
    ThreadPart { name: "tsc", dump: tsc::dump, plan: tsc::plan },
    ThreadPart { name: "speculation", dump: speculation::dump, plan: speculation::plan },
    ThreadPart { name: "creds", dump: creds::dump, plan: creds::plan },
    ThreadPart { name: "seccomp", dump: seccomp::dump_mode, plan: seccomp::plan },
    ThreadPart { name: "creds, the last step", dump: creds::nothing_more, plan: creds::plan_last },
    ThreadPart { name: "pdeath", dump: pdeath::dump, plan: pdeath::plan },
    ThreadPart { name: "robust_list", dump: robust_list::dump, plan: robust_list::plan },
];

/// Resources of a process, in the order of a restore.
static PROCESS: &[ProcessPart] = &[
    ProcessPart { name: "refuse", dump: refuse::dump_process, when: When::Early, plan: no_plan },
    ProcessPart { name: "keyrings", dump: keyrings::dump_session, when: When::Early, plan: no_plan },
    ProcessPart { name: "comm", dump: comm::dump_process, when: When::Leader, plan: no_plan },
    ProcessPart { name: "personality", dump: personality::dump, when: When::Early, plan: personality::plan },
    ProcessPart { name: "loginuid", dump: loginuid::dump, when: When::Early, plan: loginuid::plan },
    ProcessPart { name: "oom", dump: oom::dump, when: When::Early, plan: oom::plan },
    ProcessPart {
        name: "coredump_filter",
        dump: coredump_filter::dump,
        when: When::Early,
        plan: coredump_filter::plan,
    },
    ProcessPart { name: "autogroup", dump: autogroup::dump, when: When::Early, plan: autogroup::plan },
    ProcessPart { name: "xcomp", dump: xcomp::dump, when: When::Early, plan: xcomp::plan },
    ProcessPart { name: "subreaper", dump: subreaper::dump, when: When::Normal, plan: subreaper::plan },
    ProcessPart { name: "membarrier", dump: membarrier::dump, when: When::Normal, plan: membarrier::plan },
    ProcessPart { name: "sigaction", dump: sigaction::dump, when: When::Normal, plan: sigaction::plan },
    ProcessPart { name: "mdwe", dump: mdwe::dump, when: When::Normal, plan: mdwe::plan },
    ProcessPart { name: "rlimit", dump: rlimit::dump, when: When::Normal, plan: rlimit::plan },
    ProcessPart { name: "itimer", dump: itimer::dump, when: When::Leader, plan: no_plan },
    ProcessPart { name: "posix_timer", dump: posix_timer::dump, when: When::Leader, plan: no_plan },
    ProcessPart { name: "pending", dump: pending::dump_process, when: When::Leader, plan: no_plan },
];

fn nothing(_: &ThreadPlan<'_>, _: &mut List) -> Result<()> {
    Ok(())
}

fn leader_only(_: &ThreadView<'_>, _: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    Ok(())
}

fn no_plan(_: &pb::TaskCoreEntry, _: &Supervisor, _: &mut List) -> Result<()> {
    Ok(())
}

/// Dumps a stopped thread. What cannot be saved is added to `findings`.
pub fn dump_thread(
    cx: &ThreadCx,
    seccomp: &mut seccomp::Dump,
    findings: &mut Vec<Finding>,
) -> Result<ThreadParts> {
    let at = format!("/proc/{}/task/{}", cx.pid, cx.tid);
    let view = ThreadView {
        cx,
        status: error::parse_proc(cx.tid, format!("{at}/status"), crate::proc::status::parse)?,
        stat: error::parse_proc(cx.tid, format!("{at}/stat"), crate::proc::stat::parse)?,
    };
    let mut parts = ThreadParts::default();
    for part in THREAD {
        tracing::trace!(tid = %cx.tid, part = part.name, "dump");
        (part.dump)(&view, &mut parts, findings)?;
    }
    seccomp.thread(&view, &mut parts, findings)?;
    Ok(parts)
}

/// Dumps the process part of a stopped process, alive or stopped by job control.
pub fn dump_process(cx: &ProcessCx, findings: &mut Vec<Finding>) -> Result<pb::TaskCoreEntry> {
    let stat = error::parse_proc(cx.pid, format!("/proc/{}/stat", cx.pid), crate::proc::stat::parse)?;
    let mut entry = pb::TaskCoreEntry {
        task_state: if cx.stop_signal.is_some() { TASK_STOPPED } else { TASK_ALIVE },
        exit_code: 0,
        flags: stat.flags,
        blk_sigset: cx.sigmask,
        stop_signo: cx.stop_signal.and_then(|s| u32::try_from(s).ok()),
        ..Default::default()
    };
    for part in PROCESS {
        tracing::trace!(pid = cx.pid.get(), part = part.name, "dump");
        (part.dump)(cx, &mut entry, findings)?;
    }
    Ok(entry)
}

/// `task_state` of a task that runs.
pub const TASK_ALIVE: u32 = 1;
/// `task_state` of a zombie.
pub const TASK_DEAD: u32 = 2;
/// `task_state` of a task stopped by job control.
pub const TASK_STOPPED: u32 = 3;

fn plan_when(core: &pb::CoreEntry, supervisor: &Supervisor, when: When, list: &mut List) -> Result<()> {
    let tc = core.tc.as_deref().ok_or_else(|| TaskError::image("process part is missing"))?;
    for part in PROCESS.iter().filter(|part| part.when == when) {
        tracing::trace!(part = part.name, "plan");
        (part.plan)(tc, supervisor, list)?;
    }
    Ok(())
}

/// Adds what must happen while the supervisor's root directory and descriptors are there.
pub fn plan_process_early(core: &pb::CoreEntry, supervisor: &Supervisor, list: &mut List) -> Result<()> {
    plan_when(core, supervisor, When::Early, list)
}

/// Adds what a process has once for all its threads, before they are made.
pub fn plan_process(
    core: &pb::CoreEntry,
    mm: &pb::MmEntry,
    supervisor: &Supervisor,
    list: &mut List,
) -> Result<()> {
    thp::plan(mm, list);
    plan_when(core, supervisor, When::Normal, list)
}

/// Adds what each thread has of its own; for the leader also what needs all threads to be there.
pub fn plan_thread(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    for part in THREAD {
        tracing::trace!(tid = %plan.tid, part = part.name, "plan");
        (part.plan)(plan, list)?;
    }
    Ok(())
}

/// Whether the image is of this architecture.
pub fn check_march(core: &pb::CoreEntry) -> Result<()> {
    if core.mtype() == pb::core_entry::March::X8664 {
        return Ok(());
    }
    Err(TaskError::Unsupported {
        what: format!("a task of {}", core.mtype().as_str_name()),
        reason: "this machine is X86_64".into(),
    })
}
