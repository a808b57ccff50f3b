//! Waiting for a job whose shell knows of crtool only.
//!
//! The job has the terminal. When it stops, so does crtool with its whole process group, after it has taken the terminal
//! back: the shell sees that its job has stopped. When the shell continues crtool, in the foreground or not, crtool continues the
//! job. A stop that nobody could undo, because crtool itself has no shell that watches over it, is undone at once.

use std::os::fd::{AsFd, BorrowedFd};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, killpg},
        signalfd::{SfdFlags, SignalFd, siginfo},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, getpgid, getpgrp},
};

use super::{death, end};
use crate::{exit::Exit, files::JobTerminal, interrupt};

/// `si_code` of a signal that the kernel sent, such as one of a key of the terminal.
const SI_KERNEL: i32 = 0x80;

/// Waits for the end of the job with root `root`, or for a signal that tells us to stop waiting.
pub(super) fn wait(root: Pid, pidfd: BorrowedFd<'_>, terminal: JobTerminal) -> anyhow::Result<Exit> {
    let interrupts = interrupt::watch()?;
    let signals: SigSet = [Signal::SIGCHLD, Signal::SIGCONT, Signal::SIGQUIT].into_iter().collect();
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut job = Job { root, terminal, signals };
    loop {
        // It may have stopped, or ended, before its signals were watched.
        match waitpid(root, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED))? {
            WaitStatus::StillAlive => {}
            WaitStatus::Stopped(_, signal) => {
                job.stopped(signal);
                continue;
            }
            status => {
                job.terminal.take_back();
                if matches!(status, WaitStatus::Signaled(..)) {
                    job.terminal.put_settings_back();
                }
                return end(status);
            }
        }
        let mut fds =
            [pidfd, interrupts.as_fd(), job.signals.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let told = job.told()?;
        if told.quit {
            tracing::warn!("interrupted by SIGQUIT; the restored tree runs on");
            return Ok(Exit::Tree(death(Signal::SIGQUIT)));
        }
        if told.continued {
            job.go_on();
        }
        if let Err(interrupted) = interrupt::check_those(|info| meant(&job.terminal, info)) {
            tracing::warn!("{interrupted}; the restored tree runs on");
            return Ok(Exit::Tree(death(interrupted.signal)));
        }
    }
}

/// Whether a signal means us: a key of a terminal that we share with the job means the job, which has got it as well.
fn meant(terminal: &JobTerminal, info: &siginfo) -> bool {
    !terminal.is_shared() || info.ssi_code != SI_KERNEL
}

/// What signals say to us.
#[derive(Debug, Default)]
struct Told {
    /// Somebody has continued us.
    continued: bool,
    /// We are to stop waiting.
    quit: bool,
}

/// A job and what crtool sees of it.
struct Job {
    root: Pid,
    terminal: JobTerminal,
    signals: SignalFd,
}

impl Job {
    /// The root has been stopped by `signal`.
    fn stopped(&mut self, signal: Signal) {
        // Whoever stopped it has stopped us as well, and continued both.
        if self.terminal.is_shared() {
            return;
        }
        if matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU) && self.terminal.is_ours() {
            // A shell has brought us to the foreground, without a word when it believed that we were running.
            return self.go_on();
        }
        self.terminal.take_back();
        // SIGSTOP would stop us also where nobody could ever continue us; of SIGTTOU we hold back our own.
        let same = if signal == Signal::SIGTTIN { signal } else { Signal::SIGTSTP };
        if let Err(error) = killpg(getpgrp(), same) {
            tracing::warn!("the process group of crtool cannot be stopped: {error}");
        }
        // Here we have been continued, which need not be said twice, or have never stopped.
        let _ = self.told();
        self.go_on();
    }

    /// What signals have said since they were read last.
    fn told(&self) -> nix::Result<Told> {
        let mut told = Told::default();
        while let Some(info) = self.signals.read_signal()? {
            let is = |signal: Signal| i32::try_from(info.ssi_signo) == Ok(signal as i32);
            told.continued |= is(Signal::SIGCONT);
            told.quit |= is(Signal::SIGQUIT) && meant(&self.terminal, &info);
        }
        Ok(told)
    }

    /// Lets the job go on, with the terminal if the shell has given it to us.
    fn go_on(&mut self) {
        self.terminal.look_again();
        if let Err(error) = self.terminal.hand_over() {
            tracing::warn!("{:#}", anyhow::Error::from(error));
        }
        // Ended meanwhile: that is seen next.
        if let Ok(group) = getpgid(Some(self.root)) {
            let _ = killpg(group, Signal::SIGCONT);
        }
    }
}
