//! One thread under ptrace: from running to [`Seized`] to [`Stopped`] and back, each state its own type.
//!
//! Each of the two lets its thread go on as it was when dropped: our own failure must never leave a
//! task stopped. There is no EXITKILL: if crtool dies, the kernel detaches and the task goes on.

use std::time::{Duration, Instant};

use thiserror::Error;

use crate::sys::{Errno, pid::HostPid, ptrace, wait, wait::Status};

/// What can go wrong with a tracee.
#[derive(Debug, Error)]
pub enum TraceError {
    /// The thread ended while we looked at it.
    #[error("thread {0} died")]
    Died(HostPid),
    /// Somebody else traces it.
    #[error("thread {tid} is traced by process {tracer}; end that debugger first")]
    Traced {
        /// The thread.
        tid: HostPid,
        /// Its tracer.
        tracer: HostPid,
    },
    /// The kernel refused a trace request.
    #[error("{what} of thread {tid}")]
    Request {
        /// The request.
        what: &'static str,
        /// The thread.
        tid: HostPid,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A stop that was not expected here.
    #[error("thread {tid} stopped with {stop:?} while {doing}")]
    Stop {
        /// The thread.
        tid: HostPid,
        /// What it reported.
        stop: Status,
        /// What was going on.
        doing: &'static str,
    },
    /// Its code does not do what it did.
    #[error(
        "thread {0} made another system call than crtool wanted: somebody has changed its code meanwhile"
    )]
    Changed(HostPid),
    /// A call of a list returned what it must not.
    #[error("{list}: step {index} ({call})")]
    Call {
        /// The list.
        list: String,
        /// The call.
        call: String,
        /// Its index.
        index: usize,
        /// The error, or for an unexpected value EPROTO.
        #[source]
        source: Errno,
    },
    /// The shared area cannot be used.
    #[error("shared list area")]
    Area(#[source] Errno),
    /// The shared area is too small.
    #[error("shared list area of {size} bytes cannot take {wanted} more")]
    AreaFull {
        /// Bytes asked for.
        wanted: usize,
        /// Size of the area.
        size: usize,
    },
    /// There is nobody to finish what crtool does should it be killed.
    #[error("a kill_guard cannot be made: {what}")]
    KillGuard {
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Asked to end by a signal, or not done in time.
    #[error(transparent)]
    Late(#[from] crate::deadline::Late),
    /// In vfork, where nobody can stop it.
    #[error("thread {0} is in vfork: it cannot be stopped until its child runs a program or ends; try again")]
    Vfork(HostPid),
    /// In a frozen cgroup, where it executes nothing.
    #[error("thread {tid} is in a frozen cgroup, {}: thaw it first", group.display())]
    FrozenGroup {
        /// The thread.
        tid: HostPid,
        /// The directory of the cgroup.
        group: std::path::PathBuf,
    },
    /// Nobody can stop it where it sleeps.
    #[error(
        "thread {tid} sleeps in the kernel, in {place}, and cannot be stopped there: what it waits for (a file system, a device) does not answer"
    )]
    Asleep {
        /// The thread.
        tid: HostPid,
        /// Function of the kernel, as /proc/TID/wchan has it.
        place: String,
    },
    /// The text of a /proc file.
    #[error(transparent)]
    Parse(#[from] crate::proc::ParseError),
    /// A /proc file of the target.
    #[error("{path}")]
    Proc {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The target's memory cannot be mapped or written as needed.
    #[error("{what} in process {pid}")]
    Inject {
        /// What was attempted.
        what: &'static str,
        /// Where.
        pid: HostPid,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Nothing to run a system call with.
    #[error("no system call instruction found in the memory of process {0}")]
    NoSyscall(HostPid),
}

impl TraceError {
    /// A failed call, from the raw result the runner stored.
    pub(super) fn call(list: &str, call: &str, index: usize, result: i64) -> Self {
        let source = match i32::try_from(-result) {
            Ok(errno @ 1..=4095) => Errno::from_raw(errno),
            _ => Errno::EPROTO,
        };
        Self::Call { list: list.into(), call: call.into(), index, source }
    }

    /// A failed ptrace request: ESRCH on a stopped tracee can only mean that it was killed, since
    /// nobody else can resume or detach it.
    pub(crate) fn request(what: &'static str, tid: HostPid, source: Errno) -> Self {
        if source == Errno::ESRCH { Self::Died(tid) } else { Self::Request { what, tid, source } }
    }
}

/// Why a seized thread is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It was running (or sleeping in a call).
    Running,
    /// It was already stopped by job control with this signal.
    Group(i32),
}

/// A thread that is traced and has been asked to stop, but may still run.
///
/// Dropped, it goes on as it was: it is waited for a moment, since only a thread that has stopped can be let go. One
/// that does not stop in time (it sleeps where nobody can wake it) stays traced until the tracer ends.
#[must_use = "dropped, the thread goes on"]
#[derive(Debug)]
pub struct Seized {
    tid: HostPid,
    attached: bool,
}

/// How long a thread that is to be let go may take to stop first.
const LET_GO: Duration = Duration::from_millis(200);

impl Seized {
    /// Traces a thread and asks it to stop, without waiting for that.
    ///
    /// The kernel makes us wait while the thread's process executes a program (execve); that in turn waits for the
    /// exit reports of the process's other threads. So whoever holds some of them takes these reports in `check`,
    /// which is called whenever a signal comes (see `sys::ticker`) and may also end the wait.
    pub fn seize(tid: HostPid, check: &dyn Fn() -> Result<(), TraceError>) -> Result<Self, TraceError> {
        // Its seccomp filters are in force as long as it runs.
        loop {
            match ptrace::seize(tid, ptrace::O_TRACESYSGOOD) {
                Ok(()) => return Self { tid, attached: true }.asked(),
                Err(Errno::EINTR) => check()?,
                Err(e) => return Err(seize_error(tid, e)),
            }
        }
    }

    /// Takes up a thread that this thread of ours traces already, under the id it has now: a thread that executes
    /// a program gets its leader's.
    pub(crate) fn adopt(tid: HostPid) -> Result<Self, TraceError> {
        Self { tid, attached: true }.asked()
    }

    fn asked(self) -> Result<Self, TraceError> {
        ptrace::interrupt(self.tid).map_err(|e| TraceError::request("PTRACE_INTERRUPT", self.tid, e))?;
        Ok(self)
    }

    /// Its id.
    pub fn tid(&self) -> HostPid {
        self.tid
    }

    /// Takes the reports of the thread until it is stopped. A signal on its way is delivered first; the stop that was
    /// asked for comes before the first instruction of its handler. [`TraceError::Died`] also says that the thread
    /// has another id now. `check` is called whenever the wait is interrupted, and may end it.
    pub fn settle(mut self, check: &dyn Fn() -> Result<(), TraceError>) -> Result<Stopped, TraceError> {
        let tid = self.tid;
        loop {
            let again = || {
                // A request that comes while the thread executes a program is lost now and then (Linux 6.18): it
                // costs nothing to ask again.
                let _ = ptrace::interrupt(tid);
                check()
            };
            let status = wait_checked(tid, &again).inspect_err(|_| {
                // It was waited for already.
                self.release(Instant::now());
            })?;
            match status {
                Status::Stopped(signal, ptrace::EVENT_STOP) => {
                    let stop = if signal == libc::SIGTRAP { Stop::Running } else { Stop::Group(signal) };
                    self.attached = false;
                    // From now on it runs nothing of its own.
                    let options = ptrace::O_TRACESYSGOOD | ptrace::O_SUSPEND_SECCOMP;
                    let seccomp_suspended = ptrace::set_options(tid, options).is_ok();
                    return Ok(Stopped { tid, stop, seccomp_suspended, attached: true });
                }
                Status::Stopped(signal, 0) => {
                    ptrace::cont(tid, signal).map_err(|e| TraceError::request("PTRACE_CONT", tid, e))?;
                }
                Status::Exited(_) | Status::Signaled(..) => {
                    self.attached = false;
                    return Err(TraceError::Died(tid));
                }
                other => return Err(TraceError::Stop { tid, stop: other, doing: "being seized" }),
            }
        }
    }

    /// Lets threads go on, all of them in the time that is allowed for one.
    pub(crate) fn let_go(seized: Vec<Self>) {
        let until = Instant::now() + LET_GO;
        for mut thread in seized {
            thread.release(until);
        }
    }

    fn release(&mut self, until: Instant) {
        let tid = self.tid;
        while std::mem::take(&mut self.attached) {
            match wait::poll(tid) {
                // A signal on its way must not be lost.
                Ok(Some((_, Status::Stopped(signal, 0)))) => drop(ptrace::detach(tid, signal)),
                Ok(Some((_, Status::Stopped(..)))) => drop(ptrace::detach(tid, 0)),
                Ok(None) | Err(Errno::EINTR) if Instant::now() < until => {
                    self.attached = true;
                    std::thread::sleep(Duration::from_micros(200));
                }
                Ok(None) => tracing::warn!("thread {tid} does not stop, and stays traced until crtool ends"),
                Ok(Some(_)) | Err(_) => {}
            }
        }
    }
}

impl Drop for Seized {
    fn drop(&mut self) {
        self.release(Instant::now() + LET_GO);
    }
}

fn seize_error(tid: HostPid, source: Errno) -> TraceError {
    match tracer_of(tid) {
        HostPid::NONE => TraceError::request("PTRACE_SEIZE", tid, source),
        tracer => TraceError::Traced { tid, tracer },
    }
}

/// A thread held in a ptrace stop.
#[derive(Debug)]
pub struct Stopped {
    tid: HostPid,
    stop: Stop,
    seccomp_suspended: bool,
    attached: bool,
}

impl Stopped {
    /// Whether it still stands still: nobody else can let it go, but it can be killed, and its id can go to a thread of
    /// its process that executes a program. If that one is traced too, it has stopped as well, but its report has not been
    /// taken.
    pub(crate) fn holds(&self) -> bool {
        ptrace::get_sigmask(self.tid).is_ok() && wait::has_report(self.tid) == Ok(false)
    }

    /// Its id.
    pub fn tid(&self) -> HostPid {
        self.tid
    }

    /// Whether its seccomp filters do not apply while it is traced.
    pub fn seccomp_suspended(&self) -> bool {
        self.seccomp_suspended
    }

    /// Why it is stopped.
    pub fn stop(&self) -> Stop {
        self.stop
    }

    /// General registers.
    pub fn regs(&self) -> Result<libc::user_regs_struct, TraceError> {
        ptrace::get_regs(self.tid).map_err(|e| TraceError::request("PTRACE_GETREGS", self.tid, e))
    }

    /// Sets general registers.
    pub fn set_regs(&self, regs: &libc::user_regs_struct) -> Result<(), TraceError> {
        ptrace::set_regs(self.tid, regs).map_err(|e| TraceError::request("PTRACE_SETREGS", self.tid, e))
    }

    /// The whole xsave area.
    pub fn xstate(&self) -> Result<Vec<u8>, TraceError> {
        // Kept for every thread of a tree: no more memory than there is state.
        let mut buf = [0u8; 16 << 10];
        let len = ptrace::get_regset(self.tid, ptrace::NT_X86_XSTATE, &mut buf)
            .map_err(|e| TraceError::request("PTRACE_GETREGSET", self.tid, e))?;
        Ok(buf.get(..len).unwrap_or_default().to_vec())
    }

    /// Sets the xsave area.
    pub(super) fn set_xstate(&self, xstate: &[u8]) -> Result<(), TraceError> {
        ptrace::set_regset(self.tid, ptrace::NT_X86_XSTATE, xstate)
            .map_err(|e| TraceError::request("PTRACE_SETREGSET", self.tid, e))
    }

    /// Blocked signals, bit n-1 for signal n.
    pub fn sigmask(&self) -> Result<u64, TraceError> {
        ptrace::get_sigmask(self.tid).map_err(|e| TraceError::request("PTRACE_GETSIGMASK", self.tid, e))
    }

    /// Sets blocked signals.
    pub fn set_sigmask(&self, mask: u64) -> Result<(), TraceError> {
        ptrace::set_sigmask(self.tid, mask).map_err(|e| TraceError::request("PTRACE_SETSIGMASK", self.tid, e))
    }

    /// Waits for the thread's next report.
    pub(super) fn report(&self, check: &dyn Fn() -> Result<(), TraceError>) -> Result<Status, TraceError> {
        match wait_checked(self.tid, check)? {
            Status::Exited(_) | Status::Signaled(..) => Err(TraceError::Died(self.tid)),
            status => Ok(status),
        }
    }

    /// Lets a thread that was stopped while it was running go on for a while, under its seccomp filters, and stops it again.
    /// One that is asked to stop at once does not come to run anything before it does.
    pub(crate) fn go_on(
        mut self,
        pause: Duration,
        check: &dyn Fn() -> Result<(), TraceError>,
    ) -> Result<Self, TraceError> {
        let tid = self.tid;
        ptrace::set_options(tid, ptrace::O_TRACESYSGOOD)
            .map_err(|e| TraceError::request("PTRACE_SETOPTIONS", tid, e))?;
        ptrace::cont(tid, 0).map_err(|e| TraceError::request("PTRACE_CONT", tid, e))?;
        self.attached = false;
        let thread = Seized { tid, attached: true };
        std::thread::sleep(pause);
        thread.asked()?.settle(check)
    }

    /// Lets the thread go on as it was (a job-control stop stays in effect). [`TraceError::Died`] when it was killed
    /// meanwhile, as by another thread that was let go before and executes a program.
    pub fn detach(mut self) -> Result<(), TraceError> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<(), TraceError> {
        if !std::mem::take(&mut self.attached) {
            return Ok(());
        }
        ptrace::detach(self.tid, 0).map_err(|e| {
            // Who executes the program waits until the end of this thread has been taken.
            let _ = wait::take_end(self.tid);
            TraceError::request("PTRACE_DETACH", self.tid, e)
        })
    }

    /// Forgets the thread, which is gone or about to be killed.
    pub fn forget(mut self) {
        self.attached = false;
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.let_go();
    }
}

/// Waits for a report of `tid`; each time the wait is interrupted, `check` may end it.
fn wait_checked(tid: HostPid, check: &dyn Fn() -> Result<(), TraceError>) -> Result<Status, TraceError> {
    loop {
        match wait::wait_raw(tid, 0) {
            Ok(Some((_, raw))) => return Ok(Status::from_raw(raw)),
            Ok(None) => {}
            Err(Errno::EINTR) => check()?,
            // Nobody has this id any more, or somebody we do not trace.
            Err(Errno::ECHILD) => return Err(TraceError::Died(tid)),
            Err(e) => return Err(TraceError::request("waitpid", tid, e)),
        }
    }
}

/// Who traces `tid`, from the text of its status file.
pub(crate) fn tracer_of(tid: HostPid) -> HostPid {
    let tracer = std::fs::read_to_string(format!("/proc/{tid}/status")).ok().and_then(|s| {
        s.lines().find_map(|l| l.strip_prefix("TracerPid:").and_then(|v| v.trim().parse().ok()))
    });
    tracer.map_or(HostPid::NONE, HostPid::new)
}
