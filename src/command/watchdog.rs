//! Ends a command that hangs, so that the tree it holds goes on.
//!
//! A file system that does not answer keeps a thread in the kernel, where it asks no [deadline](crate::deadline) and
//! where SIGTERM does not reach it; a crtool that is stopped does not even notice that its time is over; and all the
//! while the tree is frozen. The end of the process is always good for the tree: the kernel lets go of tasks whose tracer
//! has ended, what was being run in them puts itself back, and tasks that are being restored have EXITKILL.
//!
//! | after the deadline, or after a signal that asks crtool to end | |
//! |---|---|
//! | at once | waits fail (`Deadline::check`): the usual way out |
//! | 0.5 s | SIGCONT, from a timer of the kernel: for a crtool that is stopped |
//! | 0.6 s | the thread says what happened and ends the process with the status of a failure; after a signal, not before 4 s as long as the thread that does the work can run and only gets no processor |
//! | 0.9 s (5 s after a signal) | SIGKILL, from a timer of the kernel: for one in which no thread runs (a debugger, a frozen cgroup) |
//!
//! The kernel holds the clock, so nobody's parent, process group or signals change, and no process can be stopped in
//! crtool's place. Only the descriptors need somebody else: see [`table_holder`].
//! A sleep in the kernel that not even SIGKILL ends (a block device that is gone) cannot be helped.

use std::{
    io,
    os::fd::AsFd as _,
    thread::{self, JoinHandle},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        signal::{SigSet, SigmaskHow, sigprocmask},
    },
    unistd::gettid,
};

use crate::{
    deadline::{self, Timers},
    interrupt, log,
    proc::stat,
    sys::{
        Errno,
        clone::{reap, table_holder},
        pid::HostPid,
        task,
        timer::{PollTimer, SignalTimer, exit_now},
    },
};

/// Ends this process when it hangs. Dropped, it does not.
#[derive(Debug)]
pub(super) struct Watchdog {
    thread: Option<JoinHandle<()>>,
    quit: &'static EventFd,
    /// The process that holds the descriptor table.
    holder: Option<HostPid>,
}

impl Watchdog {
    /// Watches over the calling thread. `command` says in messages what it does, `holds` what is the case when it is
    /// ended. There is one for each process, and once.
    pub(super) fn start(command: String, holds: &'static str) -> io::Result<Self> {
        // They are there until the process ends, for the thread may be in the middle of anything.
        let end: &'static PollTimer = Box::leak(Box::new(PollTimer::new()?));
        let quit: &'static EventFd = Box::leak(Box::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?));
        // Each takes one of the signals that may be pending (ulimit -i).
        let timer = |signal: i32| match SignalTimer::new(signal) {
            Ok(timer) => Some(timer),
            Err(error) => {
                tracing::warn!(
                    "if crtool is stopped, its time limit does not hold: no timer for that: {error}"
                );
                None
            }
        };
        let (cont, kill) = (timer(libc::SIGCONT), timer(libc::SIGKILL));
        let watched = gettid().as_raw();
        // Signals are for the calling thread; those that are held back are seen through their descriptor.
        let mut old = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut old))?;
        let holder = table_holder();
        let thread = thread::Builder::new()
            .name("watchdog".into())
            .stack_size(256 << 10)
            .spawn(move || watch(&command, watched, end, quit));
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&old), None)?;
        let holder = holder
            .inspect_err(|error| {
                tracing::warn!("if crtool hangs in a file of the tree, the tree stays frozen: no process to hold its descriptors: {error}");
            })
            .ok();
        let thread = thread
            .inspect_err(|error| {
                tracing::warn!(
                    "if crtool hangs, its time limit does not hold: no thread to watch over it: {error}"
                );
            })
            .ok();
        if thread.is_some() {
            deadline::watch(Timers { cont, end, kill }, holds);
        }
        Ok(Self { thread, quit, holder })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        deadline::unwatch();
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(holder) = self.holder.take() {
            let _ = task::kill(holder, libc::SIGKILL);
            reap(holder);
        }
    }
}

/// The watchdog's thread.
fn watch(command: &str, watched: i32, end: &PollTimer, quit: &EventFd) {
    let mut signals = interrupt::watched();
    loop {
        let mut fds = vec![quit.as_fd(), end.as_fd()];
        fds.extend(signals.map(|signals| signals.as_fd()));
        let mut fds: Vec<PollFd<'_>> = fds.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => return,
        }
        let ready = |index: usize| fds.get(index).and_then(PollFd::any) == Some(true);
        if ready(0) {
            return;
        }
        if ready(2) {
            // Whoever looks first takes the signal; it is remembered for all.
            let _ = interrupt::check();
            deadline::interrupted();
            signals = None;
        }
        if ready(1)
            && let Some((late, exit, holds)) = deadline::overdue(|| is_runnable(watched))
        {
            log::failure(&format!("{command}: {late}{}; {holds}", whereabouts(watched)));
            exit_now(exit.status());
        }
    }
}

/// Whether the thread that does the work runs, or would if others had not the processors: then it does not hang in the kernel.
fn is_runnable(tid: i32) -> bool {
    let stat = std::fs::read(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
    stat::parse(&stat).is_ok_and(|stat| stat.state == stat::State::Running)
}

/// Where the thread that does the work hangs.
fn whereabouts(tid: i32) -> String {
    let function = std::fs::read_to_string(format!("/proc/self/task/{tid}/wchan")).unwrap_or_default();
    let function = match function.as_str() {
        "" | "0" => String::new(),
        function => format!("crtool hangs in the kernel ({function})"),
    };
    let parts: Vec<String> =
        [function, deadline::place()].into_iter().filter(|part| !part.is_empty()).collect();
    if parts.is_empty() { String::new() } else { format!(": {}", parts.join(", ")) }
}
