//! What became of a tree whose dump or restore is gone, for the daemon that was told of both.
//!
//! A dump kills its tree once the cache has all of it, and a restore lets its tree go. If it dies on the way, somebody must
//! say whether the tree may run elsewhere, and only what is certain counts: neither that a root is dead, which may
//! have run before, nor that it is alive, which may die the next moment. What crtool itself wrote down is certain
//! ([`Decision`]), once it can write no more: hence the end of its process is waited for, since sockets close before that.
//!
//! The tree is not looked at. The daemon may not be allowed to, or be in another pid namespace; and no time is
//! measured, so that it does not matter how busy the host is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::proc::fdinfo;
use crate::tracee::{Decision, Stage};

/// What is certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing yet.
    Open,
    /// Nothing was done to the tree: what was dumped runs on, what was to be restored has never run.
    Untouched,
    /// It was let go.
    LetGo,
    /// It was killed.
    Killed,
    /// It was being killed or let go, and nobody has said that it is done. It may still be said: see
    /// [`KillGuard`](crate::tracee::KillGuard).
    Between,
}

/// Whether the process has ended.
pub(super) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    // An error would come from lack of memory only, and is no end.
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

/// The pid behind a pidfd as /proc here shows it; 0 if that does not show it, -1 if it is gone. An error if it
/// is no pidfd.
pub(super) fn pid_of(pidfd: BorrowedFd<'_>) -> io::Result<i32> {
    let bytes = std::fs::read(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let info = fdinfo::parse(&bytes).map_err(io::Error::other)?;
    info.pidfd.map(|p| p.pid).ok_or_else(|| io::Error::other("it is no pidfd"))
}

/// Of one dump or restore.
#[derive(Debug)]
pub(super) struct Witness {
    process: OwnedFd,
    decision: Decision,
}

impl Witness {
    /// Of the process behind a pidfd, and the descriptor that it gave. An error says what is missing: without a witness
    /// nothing must be done to the tree.
    pub(super) fn new(process: Option<OwnedFd>, decision: OwnedFd) -> io::Result<Self> {
        let process = process.ok_or_else(|| io::Error::other("its process cannot be watched"))?;
        Ok(Self { process, decision: Decision::of(decision)? })
    }

    /// Readable when the process ends.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// What can be said by now.
    pub(super) fn look(&self) -> Verdict {
        // In this order: while it lives it may go on.
        let ended = has_ended(self.fd());
        match (self.decision.stage(), ended) {
            (Ok(Stage::LetGo), _) => Verdict::LetGo,
            (Ok(Stage::Killed), _) => Verdict::Killed,
            (_, false) => Verdict::Open,
            (Ok(Stage::Untouched), true) => Verdict::Untouched,
            (Ok(Stage::Begun) | Err(_), true) => Verdict::Between,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::sys;

    struct Sleeper(Child);

    impl Sleeper {
        fn new() -> Self {
            Self(Command::new("sleep").arg("1000").spawn().unwrap())
        }

        fn witness(&self, decision: &Decision) -> Witness {
            let pidfd = sys::pidfd::open(self.0.id().cast_signed(), 0).unwrap();
            Witness::new(Some(pidfd), decision.as_fd().try_clone_to_owned().unwrap()).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn what_was_begun_is_known_when_the_process_can_go_on_no_more() {
        for (stage, living, dead) in [
            (Stage::Untouched, Verdict::Open, Verdict::Untouched),
            (Stage::Begun, Verdict::Open, Verdict::Between),
            (Stage::LetGo, Verdict::LetGo, Verdict::LetGo),
            (Stage::Killed, Verdict::Killed, Verdict::Killed),
        ] {
            let (child, decision) = (Sleeper::new(), Decision::new().unwrap());
            let witness = child.witness(&decision);
            decision.advance(stage).unwrap();
            assert_eq!(witness.look(), living);
            drop(child);
            assert_eq!(witness.look(), dead);
        }
    }

    #[test]
    fn who_finishes_the_work_is_heard() {
        let (child, decision) = (Sleeper::new(), Decision::new().unwrap());
        let witness = child.witness(&decision);
        decision.advance(Stage::Begun).unwrap();
        drop(child);
        assert_eq!(witness.look(), Verdict::Between);
        decision.advance(Stage::Killed).unwrap();
        assert_eq!(witness.look(), Verdict::Killed);
    }

    #[test]
    fn there_is_none_without_a_process_or_a_decision() {
        let decision = || Decision::new().unwrap().as_fd().try_clone_to_owned().unwrap();
        assert!(Witness::new(None, decision()).is_err());
        let own = || sys::pidfd::open(std::process::id().cast_signed(), 0).unwrap();
        assert!(Witness::new(Some(own()), std::fs::File::open("/dev/null").unwrap().into()).is_err());
        assert!(Witness::new(Some(own()), decision()).is_ok());
        assert_eq!(pid_of(own().as_fd()).unwrap(), std::process::id().cast_signed());
        assert!(pid_of(decision().as_fd()).is_err());
    }
}
