//! Time limits.
//!
//! A [`Deadline`] says how long something may take, and every wait asks it ([`Deadline::check`]). That is enough while
//! crtool runs. Where it hangs itself, a command has a watchdog (`command/watchdog.rs`), which learns here when it is time
//! to give up: it hands in [`Timers`] to be set, and asks why ([`overdue`]) when they have expired. A user of the
//! library has none, since nobody but a command may end its process.

use std::{
    cell::Cell,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    exit::Exit,
    interrupt::{self, Interrupted},
    sys::pid::HostPid,
    sys::timer::{PollTimer, SignalTimer},
};

/// How long after it was time to give up each of [`Timers`] expires.
const CONTINUE: Duration = Duration::from_millis(500);
const END: Duration = Duration::from_millis(600);
const KILL: Duration = Duration::from_millis(900);
/// Whoever is interrupted by a signal ends by itself and removes its files, if it gets a processor. On a busy machine that may
/// take a while: so long it is waited for as long as it does not hang, looking again and again.
const END_INTERRUPTED: Duration = Duration::from_secs(4);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const KILL_INTERRUPTED: Duration = Duration::from_secs(5);
/// What is left to do after a failure (files to remove) may take so long.
const CLEANUP: Duration = Duration::from_secs(5);
/// Progress sets the timers anew not more often than this.
const REARM: Duration = Duration::from_millis(100);

/// How long something may take; `None` for as long as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// From its beginning to its end.
    Total(Option<Duration>),
    /// From one [`progress`] to the next.
    Idle(Option<Duration>),
}

/// Why a wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Late {
    /// By a signal.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// All of it took too long.
    #[error("not done within {0} seconds (--timeout)")]
    TimedOut(u64),
    /// Nothing moved any more.
    #[error("no progress within {0} seconds (--timeout)")]
    Stuck(u64),
    /// What a failure left to be done took too long.
    #[error("it failed, and its files could not be removed within {0} seconds")]
    Cleanup(u64),
}

/// A time limit of what is going on. Dropped, there is none any more but for what a failure leaves to be done.
#[derive(Debug)]
#[must_use = "the limit holds as long as this value"]
pub struct Deadline {
    /// And since when.
    limit: Cell<(Limit, Instant)>,
    done: bool,
}

impl Deadline {
    /// Begins now.
    pub fn begin(limit: Limit) -> Self {
        let this = Self { limit: Cell::new((limit, Instant::now())), done: false };
        this.announce();
        this
    }

    /// What comes now has another limit, and all of its time.
    pub fn next(&self, limit: Limit) {
        self.limit.set((limit, Instant::now()));
        self.announce();
    }

    fn announce(&self) {
        progress();
        let mut clock = clock();
        (clock.limit, clock.cleanup) = (Some(self.limit.get()), None);
        clock.arm();
    }

    /// An error when it is time to give up: the user wants it, or the limit has been reached.
    pub fn check(&self) -> Result<(), Late> {
        interrupt::check()?;
        let (limit, begun) = self.limit.get();
        over(limit, begun).map_or(Ok(()), Err)
    }

    /// What the command is for is done: see [`settle`].
    pub fn finish(mut self) {
        self.done = true;
    }
}

/// Takes the last step of what the command is for, after which `holds` is the case. What is left then is not worth a
/// failure, but if it hangs, a signal ends it all the same, with the status that says so. The watchdog does not come
/// between the step and that.
pub fn settle<R>(holds: &'static str, step: impl FnOnce() -> R) -> R {
    let mut clock = clock();
    let result = step();
    (clock.status, clock.holds, clock.limit) = (Exit::Incomplete, holds, None);
    clock.arm();
    result
}

/// As [`Deadline::check`] of the limit that holds now, if there is one.
pub fn check() -> Result<(), Late> {
    interrupt::check()?;
    let limit = clock().limit;
    limit.and_then(|(limit, begun)| over(limit, begun)).map_or(Ok(()), Err)
}

impl Drop for Deadline {
    fn drop(&mut self) {
        let mut clock = clock();
        clock.limit = None;
        if !self.done {
            // Everything has been let go. Only files of ours may be left to be removed.
            clock.cleanup = Some(Instant::now() + CLEANUP);
        }
        clock.arm();
    }
}

/// When a limit is reached, seen from now.
fn end_of(limit: Limit, begun: Instant) -> Option<Instant> {
    match limit {
        Limit::Total(limit) => Some(begun + limit?),
        Limit::Idle(limit) => Some(begun.max(last_progress()) + limit?),
    }
}

/// The error, if a limit has been reached.
fn over(limit: Limit, begun: Instant) -> Option<Late> {
    if end_of(limit, begun)? > Instant::now() {
        return None;
    }
    Some(match limit {
        Limit::Total(limit) => Late::TimedOut(limit.unwrap_or_default().as_secs()),
        Limit::Idle(limit) => Late::Stuck(limit.unwrap_or_default().as_secs()),
    })
}

/// Times below are nanoseconds after this one.
fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

static PROGRESSED: AtomicU64 = AtomicU64::new(0);
static ARMED: AtomicU64 = AtomicU64::new(0);

fn last_progress() -> Instant {
    epoch() + Duration::from_nanos(PROGRESSED.load(Ordering::Relaxed))
}

/// Something has moved: a limit for standstill begins anew. Costs next to nothing.
pub fn progress() {
    let now = u64::try_from(epoch().elapsed().as_nanos()).unwrap_or(u64::MAX);
    PROGRESSED.store(now, Ordering::Relaxed);
    if now.saturating_sub(ARMED.load(Ordering::Relaxed)) > REARM.as_nanos() as u64 {
        clock().arm();
    }
}

/// Does what may hang before a watchdog is there: in a thread of its own, which is left behind when the time is over. A
/// process that ends takes it along.
pub(crate) fn within<R: Send + 'static>(
    limit: Option<Duration>,
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, Late> {
    let Some(limit) = limit else { return Ok(work()) };
    let (begin, begun) = mpsc::channel();
    let (done, result) = mpsc::channel();
    let thread = thread::Builder::new().stack_size(256 << 10).spawn(move || {
        let work: Box<dyn FnOnce() -> R + Send> = begun.recv().ok()?;
        // Too late, nobody listens any more.
        done.send(work()).ok()
    });
    // Where there can be no thread, it may hang.
    let Ok(thread) = thread else { return Ok(work()) };
    let _ = begin.send(Box::new(work));
    match result.recv_timeout(limit) {
        Ok(result) => {
            let _ = thread.join();
            Ok(result)
        }
        Err(mpsc::RecvTimeoutError::Timeout) => Err(Late::Stuck(limit.as_secs())),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(_) => Err(Late::Stuck(0)),
        },
    }
}

/// Something of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// Anything of it.
    Task,
    /// The file behind a descriptor.
    Fd(i32),
    /// What a link in /proc/PID leads to: `cwd`, `exe`.
    Link(&'static str),
    /// A mapped file, by the address range as /proc/PID/map_files names it.
    Mapped(u64, u64),
}

static AT: Mutex<Option<(HostPid, Object)>> = Mutex::new(None);

/// Remembers what of which task is being looked at, for the message of a command that hangs there.
pub fn looking_at(pid: HostPid, object: Object) {
    *AT.lock().unwrap_or_else(PoisonError::into_inner) = Some((pid, object));
}

/// Nothing is enforced while it lives: the time belongs to somebody else (a script of the user), or the work must be
/// finished whatever it takes (a tree that is being killed).
#[derive(Debug)]
#[must_use = "only as long as this value lives"]
pub struct Pause(());

/// Suspends the watchdog.
pub fn pause() -> Pause {
    let mut clock = clock();
    clock.pauses += 1;
    clock.arm();
    Pause(())
}

impl Drop for Pause {
    fn drop(&mut self) {
        progress();
        let mut clock = clock();
        clock.pauses -= 1;
        clock.arm();
    }
}

/// What the watchdog enforces.
#[derive(Debug)]
struct Clock {
    limit: Option<(Limit, Instant)>,
    /// After a failure: until when its files have to be removed.
    cleanup: Option<Instant>,
    /// When a signal was seen.
    interrupted: Option<Instant>,
    pauses: u32,
    timers: Option<Timers>,
    status: Exit,
    /// What is the case when the process ends now.
    holds: &'static str,
}

/// Timers of the watchdog.
#[derive(Debug)]
pub(crate) struct Timers {
    /// Continues a process that is stopped.
    pub(crate) cont: Option<SignalTimer>,
    /// For the watchdog's thread.
    pub(crate) end: &'static PollTimer,
    /// Ends a process in which no thread runs.
    pub(crate) kill: Option<SignalTimer>,
}

static CLOCK: Mutex<Clock> = Mutex::new(Clock {
    limit: None,
    cleanup: None,
    interrupted: None,
    pauses: 0,
    timers: None,
    status: Exit::Failure,
    holds: "",
});

fn clock() -> MutexGuard<'static, Clock> {
    CLOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Clock {
    /// When it is time to give up.
    fn end(&self) -> Option<Instant> {
        let limit = self.limit.and_then(|(limit, begun)| end_of(limit, begun));
        // Once the work is done, images that are on their way to the disk get a while for that.
        let rest = if self.status == Exit::Incomplete { CLEANUP } else { Duration::ZERO };
        let interrupted = self.interrupted.map(|begun| begun + rest);
        let end = self.cleanup.or_else(|| limit.into_iter().chain(interrupted).min());
        end.filter(|_| self.pauses == 0)
    }

    /// Sets the timers for that.
    fn arm(&mut self) {
        ARMED.store(PROGRESSED.load(Ordering::Relaxed), Ordering::Relaxed);
        let end = self.end();
        let Some(timers) = &self.timers else { return };
        let after = |grace: Duration| end.map(|end| (end + grace).saturating_duration_since(Instant::now()));
        // The kernel refuses none of these: the timers are there, the times are valid.
        let _ = timers.end.set(after(END));
        let kill = if self.interrupted.is_some() { KILL_INTERRUPTED } else { KILL };
        for (timer, grace) in [(&timers.cont, CONTINUE), (&timers.kill, kill)] {
            let _ = timer.as_ref().map(|timer| timer.set(after(grace)));
        }
    }

    /// Whether a signal has come just now.
    fn may_still_end(&self) -> bool {
        self.interrupted.is_some_and(|since| since.elapsed() < END_INTERRUPTED)
    }

    /// Why the process has to end now, if it has to.
    fn overdue(&self) -> Option<Late> {
        self.end().filter(|end| *end + END <= Instant::now())?;
        if let Err(interrupted) = interrupt::check() {
            return Some(interrupted.into());
        }
        if self.cleanup.is_some() {
            return Some(Late::Cleanup(CLEANUP.as_secs()));
        }
        self.limit.and_then(|(limit, begun)| over(limit, begun))
    }
}

/// From now on, `timers` are set to when it is time to give up. `holds` says what is the case then.
pub(crate) fn watch(timers: Timers, holds: &'static str) {
    let mut clock = clock();
    (clock.timers, clock.holds) = (Some(timers), holds);
    clock.arm();
}

/// No timers are set any more.
pub(crate) fn unwatch() {
    clock().timers = None;
}

/// A signal asks the process to end.
pub(crate) fn interrupted() {
    let mut clock = clock();
    clock.interrupted = Some(Instant::now());
    clock.arm();
}

/// Why the process has to end now, with which status, and what holds then. `None`: something has moved since the timers
/// were set, and they are set anew; or a signal asks for the end, and the thread that does the work `runs`.
pub(crate) fn overdue(runs: impl Fn() -> bool) -> Option<(Late, Exit, &'static str)> {
    // Before the lock is taken: whoever waits for it does not run.
    let runs = runs();
    let mut clock = clock();
    let late = clock.overdue();
    match late {
        None => clock.arm(),
        Some(Late::Interrupted(_)) if clock.may_still_end() && runs => {
            // The kernel refuses nothing of this.
            let _ = clock.timers.as_ref().map(|timers| timers.end.set(Some(LOOK_AGAIN)));
            return None;
        }
        Some(_) => {}
    }
    Some((late?, clock.status, clock.holds))
}

/// What is being looked at, in words; empty if nobody has said.
pub(crate) fn place() -> String {
    let at = *AT.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((pid, object)) = at else { return String::new() };
    let (name, link) = match object {
        Object::Task => return format!("at task {pid}"),
        Object::Fd(fd) => (format!("fd {fd}"), format!("fd/{fd}")),
        Object::Link(name) => (name.to_owned(), name.to_owned()),
        Object::Mapped(start, end) => ("a mapping".to_owned(), format!("map_files/{start:x}-{end:x}")),
    };
    // The name of a file is with the kernel: its file system is not asked.
    let file = std::fs::read_link(format!("/proc/{pid}/{link}")).unwrap_or_default();
    format!("at {name} of task {pid} ({})", file.display())
}
