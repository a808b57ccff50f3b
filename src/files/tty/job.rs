//! The terminal of a shell job, while crtool stands between the shell and the job.
//!
//! A shell gives the terminal to the process group of the job that it starts in the foreground; here that is crtool's. A
//! restored job whose processes have a group of their own must be given it by crtool, and crtool must take it back when the job
//! ends or stops, because the shell knows of crtool only. Settings of the terminal are those that the job had made, if it
//! had the terminal when it was dumped; else they were its shell's, and mean nothing here. Its size is that of the terminal
//! which is there: a job that knew another one is told.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    sys::{
        signal::{SigSet, Signal, killpg},
        stat::Mode,
    },
    unistd::{Pid, getpgid, getpgrp, getppid, getsid},
};

use super::{
    super::{FileError, FilesRestore},
    pair, settings,
};
use crate::{
    sys::pid::{HostPid, NsPid},
    {image::pb, sys::tty},
};

/// The process groups of a tree that gets its session from its caller.
#[derive(Debug, Clone)]
pub(crate) struct JobGroups {
    /// That of the root.
    pub(crate) root: HostPid,
    /// Each group of the images, and what it is now.
    pub(crate) all: HashMap<NsPid, HostPid>,
}

/// The controlling terminal of crtool and of the job. Dropped while the job has it, it is as it was before.
#[derive(Debug)]
pub(crate) struct JobTerminal {
    terminal: OwnedFd,
    /// As it was found.
    before: tty::Termios,
    /// As the job had set it up, if it had the foreground.
    wanted: Option<tty::Termios>,
    /// The group of the job that is to have the terminal.
    group: i32,
    own: i32,
    /// It is the job's now.
    given: bool,
    /// The job knew another size of its terminal.
    other_size: bool,
}

impl FilesRestore<'_> {
    /// The terminal of a job that is restored by a caller who stays with it; `None` if there is no terminal.
    pub(crate) fn job_terminal(&mut self, groups: &JobGroups) -> Result<Option<JobTerminal>, FileError> {
        let info = pair::job_info(&mut self.cx)?;
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let Ok(terminal) = open("/dev/tty", flags, Mode::empty()) else { return Ok(None) };
        JobTerminal::new(terminal, info.as_ref(), groups).map(Some)
    }
}

impl JobTerminal {
    fn new(
        terminal: OwnedFd,
        info: Option<&pb::TtyInfoEntry>,
        groups: &JobGroups,
    ) -> Result<Self, FileError> {
        let before =
            tty::termios(terminal.as_fd()).map_err(FileError::sys("read the settings of our terminal"))?;
        let size = tty::winsize(terminal.as_fd()).map_err(FileError::sys("read the size of our terminal"))?;
        let had = info.and_then(|info| groups.all.get(&NsPid::new(info.pgrp.cast_signed())));
        let wanted = info.filter(|_| had.is_some()).and_then(|info| info.termios.as_ref());
        let other_size = info.and_then(|info| info.winsize).is_some_and(|was| {
            [was.ws_row, was.ws_col, was.ws_xpixel, was.ws_ypixel]
                != [size.rows, size.cols, size.xpixel, size.ypixel].map(u32::from)
        });
        Ok(Self {
            before,
            wanted: wanted.map(settings::termios),
            group: had.copied().unwrap_or(groups.root).get(),
            own: getpgrp().as_raw(),
            given: false,
            other_size,
            terminal,
        })
    }

    /// The group that has the terminal.
    fn foreground(&self) -> i32 {
        tty::foreground(self.terminal.as_fd()).unwrap_or(0)
    }

    /// Whether the shell has given the terminal to us.
    pub(crate) fn is_ours(&self) -> bool {
        self.foreground() == self.own
    }

    /// Whether the job has the group of crtool: whoever gives the terminal to one gives it to both, and its keys reach both.
    pub(crate) fn is_shared(&self) -> bool {
        self.group == self.own
    }

    /// Sets the terminal up as the job had it, and gives it to the job. If it is not ours to give, the job is in the
    /// background as we are.
    pub(crate) fn hand_over(&mut self) -> Result<(), FileError> {
        if !self.is_ours() {
            return Ok(());
        }
        if let Some(wanted) = self.wanted.take() {
            tty::set_termios(self.terminal.as_fd(), &wanted)
                .map_err(FileError::sys("set our own terminal up"))?;
        }
        if !self.is_shared() {
            self.set_foreground(self.group)
                .map_err(FileError::sys("give our terminal to the job (TIOCSPGRP)"))?;
        }
        self.given = true;
        Ok(())
    }

    fn set_foreground(&self, group: i32) -> crate::sys::Result<()> {
        // From the background this would stop us, if the signal were not held back.
        let mut held = SigSet::empty();
        held.add(Signal::SIGTTOU);
        held.thread_block()?;
        tty::set_foreground(self.terminal.as_fd(), group)
    }

    /// The job, which runs, is told if its terminal has another size than it knows.
    pub(crate) fn tell_size(&self) {
        if self.other_size {
            // A group that is gone need not be told.
            let _ = killpg(Pid::from_raw(self.group), Signal::SIGWINCH);
        }
    }

    /// Takes the terminal back from a job that has stopped or ended.
    pub(crate) fn take_back(&mut self) {
        if !std::mem::take(&mut self.given) || self.is_shared() {
            return;
        }
        // A job that is a shell itself gives it to groups of its own.
        let group = self.foreground();
        if let Err(error) = self.set_foreground(self.own) {
            tracing::warn!("the terminal cannot be taken back from the job: {error}");
        } else if group != 0 && group != self.own {
            self.group = group;
        }
    }

    /// We have been continued by a shell, which gives the terminal to us or keeps it.
    pub(crate) fn look_again(&mut self) {
        let group = self.foreground();
        let shells = [getsid(None).ok(), Some(getppid())];
        let of_shell = |shell: &Option<Pid>| getpgid(*shell).is_ok_and(|its| its.as_raw() == group);
        if group == self.own || shells.iter().any(|shell| shell.is_some() && of_shell(shell)) {
            self.given = false;
        }
    }

    /// A job that died cannot have put the settings of the terminal back.
    pub(crate) fn put_settings_back(&self) {
        if self.is_ours()
            && let Err(error) = tty::set_termios(self.terminal.as_fd(), &self.before)
        {
            tracing::warn!("the settings of the terminal cannot be put back: {error}");
        }
    }
}

impl Drop for JobTerminal {
    fn drop(&mut self) {
        if self.given {
            self.take_back();
            self.put_settings_back();
        }
    }
}
