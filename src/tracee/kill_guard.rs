//! A kill_guard: a short-lived process that kills a tree should crtool be killed before it has dealt with all of it.
//!
//! A tree is killed, or let go, one thread at a time, and `kill -9` of crtool may come between any two. The
//! kill_guard is a copy of crtool that executes nothing but a list. It sleeps on a pipe that only crtool holds at the
//! other end, and whose end tells it that crtool is gone. Then it looks at the [`Decision`]: if the work is begun and not
//! done, it kills all and writes that down. So one system call decides for the whole tree, that by which crtool says
//! that the work is begun, or done. The kill_guard does not see to it that nobody runs for a moment in between: that is
//! EXITKILL's part.

use std::{
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::Arc,
};

use nix::{fcntl::OFlag, unistd::pipe2};

use super::{
    Area, CODE_LEN, List, Memory, Op, RemoteAddr, TraceError, Want,
    decision::{Decision, Stage},
};
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
    /// Its end is the end of crtool.
    pipe: Option<OwnedFd>,
}

impl KillGuard {
    /// Makes the kill_guard. These processes are killed in this order if crtool dies while `decision` is
    /// [`Stage::Begun`].
    pub(crate) fn arm(pids: &[HostPid], decision: &Decision) -> Result<Self, TraceError> {
        let failed = |what| move |source| TraceError::KillGuard { what, source };
        let (end, pipe) = pipe2(OFlag::O_CLOEXEC).map_err(failed("pipe"))?;
        let len = (ROOM + pids.len() * STEP).next_multiple_of(4096);
        // Its own copy once it is cloned: nobody else can change what it is going to do.
        let map = Arc::new(Mapping::private(len, None).map_err(failed("memory"))?);
        let at = RemoteAddr(map.addr() as u64);
        let mut area = Area::with_code(at, len, Memory::Own(Arc::clone(&map)));

        let mut quit = List::new("end of the kill_guard");
        quit.call("exit_group", libc::SYS_exit_group, &[0u64.into()], Want::Any);
        let quit = area.place(&quit)?.start;
        let mut list = List::new("kill_guard");
        // It keeps two descriptors: neither crtool's end of the pipe nor anything whose end others wait for.
        let decision = decision.as_fd().as_raw_fd();
        list.call("dup2", libc::SYS_dup2, &[end.as_raw_fd().into(), 0u64.into()], Want::Zero);
        list.call("dup2", libc::SYS_dup2, &[decision.into(), 1u64.into()], Want::Ok);
        list.call("close_range", libc::SYS_close_range, &[2u64.into(), u32::MAX.into()], Want::Zero);
        let byte = list.space(1);
        list.call("read", libc::SYS_read, &[0u64.into(), byte.into(), 1u64.into()], Want::Zero);
        let begun = Want::Equal(Stage::Begun as u64);
        list.call("lseek", libc::SYS_lseek, &[1u64.into(), 0u64.into(), libc::SEEK_END.into()], begun);
        for pid in pids {
            list.call("kill", libc::SYS_kill, &[pid.get().into(), libc::SIGKILL.into()], Want::Any);
        }
        list.call("ftruncate", libc::SYS_ftruncate, &[1u64.into(), (Stage::Killed as u64).into()], Want::Any);
        list.op(Op::Jump(quit));
        let start = area.place(&list)?.start;
        let slot = area.slot()?;
        area.arm(slot, start, quit)?;
        area.flush()?;
        map.protect_code(CODE_LEN).map_err(failed("memory"))?;

        // Without an exit signal nobody is told of its end but who waits for it: us, or init.
        let made = clone_into(&CloneArgs::default(), area.runner().0, start.0, slot.0);
        Ok(Self { pid: made.map_err(failed("clone"))?, pipe: Some(pipe) })
    }

    /// Ends it: there is nothing left to do.
    pub(crate) fn dismiss(mut self) {
        // Before the end of the pipe, which it would not hear of if somebody had stopped it.
        let _ = task::kill(self.pid, libc::SIGKILL);
        drop(self.pipe.take());
    }
}

impl Drop for KillGuard {
    /// Not dismissed, it looks now whether there is work to be done. Waits for its end.
    fn drop(&mut self) {
        if self.pipe.take().is_some() {
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
    fn kills_if_the_work_is_begun_and_not_done() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = HostPid::new(child.id().cast_signed());
        let decision = Decision::new().unwrap();
        let guard = || KillGuard::arm(&[pid], &decision).unwrap();
        drop(guard());
        assert_eq!(decision.stage().unwrap(), Stage::Untouched);
        guard().dismiss();
        for stage in [Stage::LetGo, Stage::Killed] {
            let other = Decision::new().unwrap();
            other.advance(stage).unwrap();
            drop(KillGuard::arm(&[pid], &other).unwrap());
            assert_eq!(other.stage().unwrap(), stage);
        }
        assert!(child.try_wait().unwrap().is_none());
        decision.advance(Stage::Begun).unwrap();
        drop(guard());
        assert_eq!(decision.stage().unwrap(), Stage::Killed);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
}
