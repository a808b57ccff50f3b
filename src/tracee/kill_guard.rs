//! A kill_guard: a short-lived process that kills a tree should crtool be killed before it has dealt with all of it.
//!
//! A tree is killed, or let go, one thread at a time, and `kill -9` of crtool may come between any two. The
//! kill_guard is a copy of crtool that executes nothing but a list. It sleeps on a pipe that only crtool holds at the
//! other end: a byte tells it that there is nothing to do, the end of the pipe that crtool is gone. So one system call
//! decides for the whole tree: from clone(2) of the kill_guard on, the tree is killed if crtool is; from write(2) of
//! that byte on, it lives. It does not see to it that nobody runs for a moment in between: that is EXITKILL's part.

use std::{fs::File, io::Write as _, os::fd::AsRawFd as _, sync::Arc};

use nix::{fcntl::OFlag, unistd::pipe2};

use super::{Area, CODE_LEN, List, Memory, Op, RemoteAddr, TraceError, Want};
use crate::sys::{
    clone::{CloneArgs, clone_into, reap},
    mapping::Mapping,
    pid::HostPid,
    task,
};

/// Room in the shared memory besides one step for each process: the runner, the other steps.
const ROOM: usize = 8 << 10;
/// Generous for one step.
const STEP: usize = 128;

/// The kill_guard at its post.
#[derive(Debug)]
pub(crate) struct KillGuard {
    pid: HostPid,
    word: Option<File>,
}

impl KillGuard {
    /// Makes the kill_guard. From then until it is dismissed, these processes are killed in this order if crtool dies.
    pub(crate) fn arm(pids: &[HostPid]) -> Result<Self, TraceError> {
        let failed = |what| move |source| TraceError::KillGuard { what, source };
        let (end, word) = pipe2(OFlag::O_CLOEXEC).map_err(failed("pipe"))?;
        let len = (ROOM + pids.len() * STEP).next_multiple_of(4096);
        // Its own copy once it is cloned: nobody else can change what it is going to do.
        let map = Arc::new(Mapping::private(len, None).map_err(failed("memory"))?);
        let at = RemoteAddr(map.addr() as u64);
        let mut area = Area::with_code(at, len, Memory::Own(Arc::clone(&map)));

        let mut quit = List::new("end of the kill_guard");
        quit.call("exit_group", libc::SYS_exit_group, &[0u64.into()], Want::Any);
        let quit = area.place(&quit)?.start;
        let mut list = List::new("kill_guard");
        // It keeps one descriptor: neither crtool's end of the pipe nor anything whose end others wait for.
        list.call("dup2", libc::SYS_dup2, &[end.as_raw_fd().into(), 0u64.into()], Want::Zero);
        list.call("close_range", libc::SYS_close_range, &[1u64.into(), u32::MAX.into()], Want::Zero);
        let byte = list.space(1);
        list.call("read", libc::SYS_read, &[0u64.into(), byte.into(), 1u64.into()], Want::Zero);
        for pid in pids {
            list.call("kill", libc::SYS_kill, &[pid.get().into(), libc::SIGKILL.into()], Want::Any);
        }
        list.op(Op::Jump(quit));
        let start = area.place(&list)?.start;
        let slot = area.slot()?;
        area.arm(slot, start, quit)?;
        area.flush()?;
        map.protect_code(CODE_LEN).map_err(failed("memory"))?;

        // Without an exit signal nobody is told of its end but who waits for it: us, or init.
        let made = clone_into(&CloneArgs::default(), area.runner().0, start.0, slot.0);
        Ok(Self { pid: made.map_err(failed("clone"))?, word: Some(word.into()) })
    }

    /// Tells it that there is nothing left to do, without waiting for its end.
    pub(crate) fn disarm(&mut self) {
        if let Some(mut word) = self.word.take() {
            // The pipe is empty: this fails only when the kill_guard is gone.
            let _ = word.write_all(b".");
            // It would not hear that if somebody had stopped it.
            let _ = task::kill(self.pid, libc::SIGKILL);
        }
    }
}

impl Drop for KillGuard {
    /// Not dismissed, it does its work now. Waits for its end.
    fn drop(&mut self) {
        if self.word.take().is_some() {
            let _ = task::kill(self.pid, libc::SIGCONT);
        }
        reap(self.pid);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt as _, process::Command};

    use super::*;

    #[test]
    fn kills_unless_dismissed() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = HostPid::new(child.id().cast_signed());
        let mut kill_guard = KillGuard::arm(&[pid]).unwrap();
        kill_guard.disarm();
        drop(kill_guard);
        assert!(child.try_wait().unwrap().is_none());
        drop(KillGuard::arm(&[pid]).unwrap());
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
}
