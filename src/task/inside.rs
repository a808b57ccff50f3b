//! What only the task itself can tell: one list of pure reads for each thread, one for the process.
//!
//! Every call is `Want::Any`: a call that the kernel or the processor does not have (ENOSYS, EINVAL, ENODEV) reads as "not in
//! use", every other failure is an error when the results are read.

use crate::{
    image::pb,
    mem::policy,
    sys::{Errno, pod, prctl::TIMER_CREATE_RESTORE_IDS},
    tracee::{CallId, Data, List, Results, Want},
};

use super::{
    error::{Result, TaskError},
    keyrings, landlock, ports,
    sem_undo::{self, Semaphores},
    sigaction::{KernelSigaction, SIGNALS},
};

const PR_SCHED_CORE: i32 = 62;
const PR_SCHED_CORE_GET: u64 = 0;
const PR_GET_MDWE: i32 = 66;
const PR_GET_THP_DISABLE: i32 = 42;
const PR_GET_SPECULATION_CTRL: i32 = 52;
const PR_GET_TID_ADDRESS: i32 = 40;
const PR_MCE_KILL_GET: i32 = 34;
const PR_GET_TIMERSLACK: i32 = 30;
const PR_GET_TSC: i32 = 25;
const PR_GET_SECUREBITS: i32 = 27;
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const ARCH_GET_XCOMP_GUEST_PERM: u64 = 0x1024;
const PR_TIMER_CREATE_RESTORE_IDS_GET: u64 = 2;
const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;
/// `struct user_desc`, and the first of the three descriptors a thread has in the GDT.
const USER_DESC_LEN: usize = 16;
/// First of the three.
pub(super) const GDT_TLS_MIN: u32 = 12;

/// What one thread told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThreadInside {
    /// sigaltstack: ss_sp, ss_flags, ss_size.
    pub altstack: (u64, u32, u64),
    /// Parent-death signal, 0 for none.
    pub pdeath_signal: u32,
    /// Address that is cleared and woken when the thread ends.
    pub tid_address: u64,
    /// Secure bits.
    pub securebits: u32,
    /// `struct user_desc` of the three entries of the GDT: entry, base, limit, flags.
    pub tls: [[u32; 4]; 3],
    /// PR_GET_TIMERSLACK; here and below `None` where the kernel does not have it.
    pub timer_slack_ns: Option<u64>,
    /// PR_GET_TSC: 1 when reading the time stamp counter is allowed.
    pub tsc: Option<u32>,
    /// PR_MCE_KILL_GET: 2 is the default.
    pub mce_kill: Option<u32>,
    /// PR_GET_SPECULATION_CTRL: store bypass, indirect branch, L1D flush.
    pub speculation: [Option<u32>; 3],
    /// Cookie of core scheduling.
    pub core_cookie: Option<u64>,
    /// ARCH_GET_CPUID: 0 when the cpuid instruction faults.
    pub cpuid: Option<u32>,
    /// personality(2).
    pub personality: u32,
    /// get_mempolicy(2).
    pub mempolicy: Option<pb::MempolicyEntry>,
    /// Sets of System V semaphores that are adjusted when it ends.
    pub sem_undo: Vec<i32>,
    /// Whether it is in a Landlock domain, as far as that can be told.
    pub landlock: bool,
    /// Whether it may use all I/O ports.
    pub iopl: bool,
    /// Whether it has a keyring of its own, and its process one.
    pub keyrings: [bool; 2],
}

/// What the process told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessInside {
    /// Handlers of the signals in [`SIGNALS`], in that order.
    pub sigactions: Vec<KernelSigaction>,
    /// Real, virtual, profiling: interval and time left, in seconds and microseconds.
    pub itimers: [[u64; 4]; 3],
    /// For each asked id: interval and time left in seconds and nanoseconds, and overruns.
    pub posix_timers: Vec<([u64; 4], u32)>,
    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME as it read them right after its timers, in seconds and nanoseconds.
    pub clocks: [[u64; 2]; 2],
    /// End of the heap.
    pub brk: u64,
    /// PR_GET_THP_DISABLE: 0, 1 when transparent huge pages are off, 3 when off but where advised (Linux 6.18).
    pub thp_disable: u32,
    /// Commands this process registered for, 0 also for a kernel that cannot tell (Linux 6.3).
    pub membarrier: u32,
    /// Whether orphans become its children.
    pub child_subreaper: bool,
    /// PR_GET_DUMPABLE: 0, 1 or 2.
    pub dumpable: u32,
    /// PR_GET_MDWE: memory-deny-write-execute bits.
    pub mdwe: u64,
    /// ARCH_GET_XCOMP_PERM.
    pub xcomp_perm: Option<u64>,
    /// ARCH_GET_XCOMP_GUEST_PERM.
    pub xcomp_guest_perm: Option<u64>,
    /// Whether PR_TIMER_CREATE_RESTORE_IDS is on.
    pub timer_restore_ids: bool,
    /// Number of a session keyring that has keys.
    pub session_keyring: Option<i32>,
}

/// Where the results of [`thread_queries`] will be.
#[derive(Debug, Clone)]
pub struct ThreadQueries {
    altstack: (CallId, Data),
    pdeath: (CallId, Data),
    tid_address: (CallId, Data),
    securebits: CallId,
    tls: [(CallId, Data); 3],
    timer_slack: CallId,
    tsc: (CallId, Data),
    mce_kill: CallId,
    speculation: [CallId; 3],
    core_cookie: (CallId, Data),
    cpuid: CallId,
    personality: CallId,
    mempolicy: policy::Question,
    sem_undo: sem_undo::Questions,
    landlock: landlock::Question,
    iopl: ports::Question,
    keyrings: keyrings::Questions,
}

/// Where the results of [`process_queries`] will be.
#[derive(Debug, Clone)]
pub struct ProcessQueries {
    sigactions: Vec<(CallId, Data)>,
    itimers: [(CallId, Data); 3],
    posix_timers: Vec<(CallId, Data, CallId)>,
    clocks: [(CallId, Data); 2],
    brk: CallId,
    thp_disable: CallId,
    membarrier: CallId,
    child_subreaper: (CallId, Data),
    dumpable: CallId,
    mdwe: CallId,
    xcomp_perm: (CallId, Data),
    xcomp_guest_perm: (CallId, Data),
    timer_restore_ids: CallId,
    session_keyring: keyrings::Session,
}

fn prctl(list: &mut List, name: &'static str, option: i32, arg2: u64) -> CallId {
    list.call(name, libc::SYS_prctl, &[option.into(), arg2.into()], Want::Any)
}

fn prctl_into(list: &mut List, name: &'static str, option: i32, len: usize) -> (CallId, Data) {
    let data = list.space(len);
    (list.call(name, libc::SYS_prctl, &[option.into(), data.into()], Want::Any), data)
}

fn xcomp(list: &mut List, request: u64) -> (CallId, Data) {
    let data = list.space(8);
    let args = [request.into(), data.into()];
    (list.call("ARCH_GET_XCOMP_PERM", libc::SYS_arch_prctl, &args, Want::Any), data)
}

/// Adds what every thread is asked; `cap_eff` are its effective capabilities, `semaphores` those that it may have
/// adjustments of.
pub fn thread_queries(list: &mut List, cap_eff: u64, semaphores: Option<&Semaphores>) -> ThreadQueries {
    let stack = list.space(24);
    let altstack = list.call("sigaltstack", libc::SYS_sigaltstack, &[0u64.into(), stack.into()], Want::Any);
    let tls = std::array::from_fn(|n| {
        let mut desc = [0u32; USER_DESC_LEN / 4];
        desc[0] = GDT_TLS_MIN + u32::try_from(n).unwrap_or(0);
        let desc = list.value(&desc);
        (list.call("get_thread_area", libc::SYS_get_thread_area, &[desc.into()], Want::Any), desc)
    });
    let cookie = list.space(8);
    let core_cookie = list.call(
        "PR_SCHED_CORE_GET",
        libc::SYS_prctl,
        &[PR_SCHED_CORE.into(), PR_SCHED_CORE_GET.into(), 0u64.into(), 0u64.into(), cookie.into()],
        Want::Any,
    );
    ThreadQueries {
        altstack: (altstack, stack),
        pdeath: prctl_into(list, "PR_GET_PDEATHSIG", libc::PR_GET_PDEATHSIG, 4),
        tid_address: prctl_into(list, "PR_GET_TID_ADDRESS", PR_GET_TID_ADDRESS, 8),
        securebits: prctl(list, "PR_GET_SECUREBITS", PR_GET_SECUREBITS, 0),
        tls,
        timer_slack: prctl(list, "PR_GET_TIMERSLACK", PR_GET_TIMERSLACK, 0),
        tsc: prctl_into(list, "PR_GET_TSC", PR_GET_TSC, 4),
        mce_kill: prctl(list, "PR_MCE_KILL_GET", PR_MCE_KILL_GET, 0),
        speculation: [0, 1, 2]
            .map(|what| prctl(list, "PR_GET_SPECULATION_CTRL", PR_GET_SPECULATION_CTRL, what)),
        core_cookie: (core_cookie, cookie),
        cpuid: list.call("ARCH_GET_CPUID", libc::SYS_arch_prctl, &[ARCH_GET_CPUID.into()], Want::Any),
        personality: list.call("personality", libc::SYS_personality, &[u32::MAX.into()], Want::Any),
        mempolicy: policy::ask(list, None),
        landlock: landlock::ask(list, cap_eff),
        iopl: ports::ask(list, cap_eff),
        keyrings: keyrings::ask(list),
        sem_undo: semaphores.map(|all| sem_undo::ask(list, all)).unwrap_or_default(),
    }
}

/// Adds what one thread of a process is asked for all of them. `posix_timers` are the ids that
/// /proc/PID/timers shows.
pub fn process_queries(list: &mut List, posix_timers: &[i32]) -> ProcessQueries {
    let sigactions = SIGNALS
        .iter()
        .map(|&signal| {
            let data = list.space(size_of::<KernelSigaction>());
            let args = [signal.into(), 0u64.into(), data.into(), 8u64.into()];
            (list.call("rt_sigaction", libc::SYS_rt_sigaction, &args, Want::Any), data)
        })
        .collect();
    let itimers = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF].map(|which| {
        let data = list.space(32);
        (list.call("getitimer", libc::SYS_getitimer, &[which.into(), data.into()], Want::Any), data)
    });
    let posix_timers = posix_timers
        .iter()
        .map(|&id| {
            let data = list.space(32);
            let time =
                list.call("timer_gettime", libc::SYS_timer_gettime, &[id.into(), data.into()], Want::Any);
            let overrun = list.call("timer_getoverrun", libc::SYS_timer_getoverrun, &[id.into()], Want::Any);
            (time, data, overrun)
        })
        .collect();
    let clocks = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].map(|id| {
        let data = list.space(16);
        (list.call("clock_gettime", libc::SYS_clock_gettime, &[id.into(), data.into()], Want::Any), data)
    });
    let membarrier =
        list.call("membarrier", libc::SYS_membarrier, &[MEMBARRIER_CMD_GET_REGISTRATIONS.into()], Want::Any);
    ProcessQueries {
        sigactions,
        itimers,
        posix_timers,
        clocks,
        brk: list.call("brk", libc::SYS_brk, &[0u64.into()], Want::Any),
        thp_disable: prctl(list, "PR_GET_THP_DISABLE", PR_GET_THP_DISABLE, 0),
        membarrier,
        child_subreaper: prctl_into(list, "PR_GET_CHILD_SUBREAPER", libc::PR_GET_CHILD_SUBREAPER, 4),
        dumpable: prctl(list, "PR_GET_DUMPABLE", libc::PR_GET_DUMPABLE, 0),
        mdwe: prctl(list, "PR_GET_MDWE", PR_GET_MDWE, 0),
        xcomp_perm: xcomp(list, ARCH_GET_XCOMP_PERM),
        xcomp_guest_perm: xcomp(list, ARCH_GET_XCOMP_GUEST_PERM),
        timer_restore_ids: prctl(
            list,
            "PR_TIMER_CREATE_RESTORE_IDS_GET",
            TIMER_CREATE_RESTORE_IDS,
            PR_TIMER_CREATE_RESTORE_IDS_GET,
        ),
        session_keyring: keyrings::ask_session(list),
    }
}

/// Results of a list that has run.
struct Told<'a>(&'a Results);

impl Told<'_> {
    /// What a call returned; `None` where the kernel or the processor does not have what it asks for.
    fn maybe(&self, call: CallId, what: &'static str) -> Result<Option<u64>> {
        match self.must(call, what) {
            Ok(value) => Ok(Some(value)),
            Err(TaskError::Inside { source: Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn must(&self, call: CallId, what: &'static str) -> Result<u64> {
        let value = self.0.value(call).map_err(TaskError::Results)?;
        u64::try_from(value).map_err(|_| TaskError::Inside {
            what,
            source: Errno::from_raw(i32::try_from(-value).unwrap_or(libc::EIO)),
        })
    }

    fn data<T: pod::Pod>(&self, data: Data) -> Result<T> {
        let bytes = self.0.data(data, size_of::<T>()).map_err(TaskError::Results)?;
        pod::from_bytes(bytes).ok_or(TaskError::Results(crate::tracee::TraceError::Area(Errno::EINVAL)))
    }

    fn must_data<T: pod::Pod>(&self, (call, data): (CallId, Data), what: &'static str) -> Result<T> {
        self.must(call, what)?;
        self.data(data)
    }

    fn maybe_data<T: pod::Pod>(&self, (call, data): (CallId, Data), what: &'static str) -> Result<Option<T>> {
        self.maybe(call, what)?.map(|_| self.data(data)).transpose()
    }
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl ThreadQueries {
    /// Reads what the thread told, once the list has run.
    pub fn read(&self, results: &Results) -> Result<ThreadInside> {
        let results = Told(results);
        let [sp, flags, size]: [u64; 3] = results.must_data(self.altstack, "sigaltstack")?;
        let mut tls = [[0; 4]; 3];
        for (to, from) in tls.iter_mut().zip(self.tls) {
            *to = results.maybe_data(from, "get_thread_area")?.unwrap_or_default();
        }
        let mut speculation = [None; 3];
        for (to, from) in speculation.iter_mut().zip(self.speculation) {
            *to = results.maybe(from, "PR_GET_SPECULATION_CTRL")?.map(narrow);
        }
        Ok(ThreadInside {
            altstack: (sp, narrow(flags & 0xffff_ffff), size),
            pdeath_signal: results.must_data(self.pdeath, "PR_GET_PDEATHSIG")?,
            tid_address: results.must_data(self.tid_address, "PR_GET_TID_ADDRESS")?,
            securebits: narrow(results.must(self.securebits, "PR_GET_SECUREBITS")?),
            tls,
            timer_slack_ns: results.maybe(self.timer_slack, "PR_GET_TIMERSLACK")?,
            tsc: results.maybe_data(self.tsc, "PR_GET_TSC")?,
            mce_kill: results.maybe(self.mce_kill, "PR_MCE_KILL_GET")?.map(narrow),
            speculation,
            core_cookie: results.maybe_data(self.core_cookie, "PR_SCHED_CORE_GET")?,
            cpuid: results.maybe(self.cpuid, "ARCH_GET_CPUID")?.map(narrow),
            personality: narrow(results.must(self.personality, "personality")?),
            sem_undo: self.sem_undo.read(results.0)?,
            landlock: self.landlock.read(results.0)?,
            iopl: self.iopl.read(results.0)?,
            keyrings: self.keyrings.read(results.0)?,
            mempolicy: self.mempolicy.read(results.0).map_err(TaskError::Memory)?,
        })
    }
}

impl ProcessQueries {
    /// Reads what the process told, once the list has run.
    pub fn read(&self, results: &Results) -> Result<ProcessInside> {
        let results = Told(results);
        let sigactions = self.sigactions.iter().map(|from| results.must_data(*from, "rt_sigaction"));
        let posix_timers = self.posix_timers.iter().map(|&(call, data, overrun)| {
            let times = results.must_data((call, data), "timer_gettime")?;
            Ok((times, narrow(results.must(overrun, "timer_getoverrun")?)))
        });
        let mut itimers = [[0; 4]; 3];
        for (to, from) in itimers.iter_mut().zip(self.itimers) {
            *to = results.must_data(from, "getitimer")?;
        }
        let mut clocks = [[0; 2]; 2];
        for (to, from) in clocks.iter_mut().zip(self.clocks) {
            *to = results.must_data(from, "clock_gettime")?;
        }
        let subreaper: u32 = results.must_data(self.child_subreaper, "PR_GET_CHILD_SUBREAPER")?;
        Ok(ProcessInside {
            sigactions: sigactions.collect::<Result<_>>()?,
            itimers,
            posix_timers: posix_timers.collect::<Result<_>>()?,
            clocks,
            brk: results.must(self.brk, "brk")?,
            thp_disable: narrow(results.maybe(self.thp_disable, "PR_GET_THP_DISABLE")?.unwrap_or(0)),
            membarrier: narrow(results.maybe(self.membarrier, "membarrier")?.unwrap_or(0)),
            child_subreaper: subreaper != 0,
            dumpable: narrow(results.must(self.dumpable, "PR_GET_DUMPABLE")?),
            mdwe: results.maybe(self.mdwe, "PR_GET_MDWE")?.unwrap_or(0),
            xcomp_perm: results.maybe_data(self.xcomp_perm, "ARCH_GET_XCOMP_PERM")?,
            xcomp_guest_perm: results.maybe_data(self.xcomp_guest_perm, "ARCH_GET_XCOMP_GUEST_PERM")?,
            timer_restore_ids: results.maybe(self.timer_restore_ids, "PR_TIMER_CREATE_RESTORE_IDS_GET")?
                == Some(1),
            session_keyring: self.session_keyring.read(results.0)?,
        })
    }
}
