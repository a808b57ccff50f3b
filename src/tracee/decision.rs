//! What was decided about a tree, in a file that outlives whoever decides it.
//!
//! A dump kills a tree, and a restore lets one go, one thread at a time, and crtool may be killed between any two. How
//! far it had come must be known then, to the [`KillGuard`](super::KillGuard), which finishes the work, and to the
//! daemon that has to say whether the tree may run on another host. Looking at the tree does not tell: a task may have
//! been sent SIGKILL and show nothing of it for a moment, a root that is dead may have run and ended by itself, or be
//! dead while its children run, and one that was killed may have been killed by others after it had run.
//!
//! So crtool writes each step down by one system call. It is the length of a file in memory, which only becomes shorter:
//! that takes no memory and no permission and is under no limit, and whoever holds the file can read it without
//! any privilege and from any pid namespace.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::sys::event;

/// How far the killing or the release of a tree has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing has been done. Should crtool die, a tree that is dumped runs on, all of it; one that is restored is
    /// killed by EXITKILL, and nobody of it has run.
    Untouched = 3,
    /// Some have been dealt with. Should crtool die, the [`KillGuard`](super::KillGuard) kills all; who had been let go
    /// may run until then.
    Begun = 2,
    /// The restored tree lives, whatever happens to crtool.
    LetGo = 1,
    /// All have been sent SIGKILL; nobody runs an instruction of its own any more.
    Killed = 0,
}

/// The decision about one tree.
#[derive(Debug)]
pub(crate) struct Decision(File);

impl Decision {
    /// Nothing is decided.
    pub(crate) fn new() -> io::Result<Self> {
        let file = File::from(event::memfd(c"decision", libc::MFD_CLOEXEC)?);
        file.set_len(Stage::Untouched as u64)?;
        Ok(Self(file))
    }

    /// That of somebody else. An error if the descriptor is nothing of the kind.
    pub(crate) fn of(fd: OwnedFd) -> io::Result<Self> {
        let decision = Self(File::from(fd));
        decision.stage()?;
        Ok(decision)
    }

    /// From now on it has come so far.
    pub(crate) fn advance(&self, to: Stage) -> io::Result<()> {
        self.0.set_len(to as u64)
    }

    /// How far it has come.
    pub(crate) fn stage(&self) -> io::Result<Stage> {
        let stages = [Stage::Killed, Stage::LetGo, Stage::Begun, Stage::Untouched];
        let meta = self.0.metadata()?;
        let found = usize::try_from(meta.len()).ok().and_then(|len| stages.get(len));
        found.copied().filter(|_| meta.is_file()).ok_or_else(|| io::Error::other("it holds no decision"))
    }
}

impl AsFd for Decision {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_it_sees_it() {
        let own = Decision::new().unwrap();
        let theirs = Decision::of(own.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(theirs.stage().unwrap(), Stage::Untouched);
        for stage in [Stage::Begun, Stage::LetGo, Stage::Killed] {
            own.advance(stage).unwrap();
            assert_eq!(theirs.stage().unwrap(), stage);
        }
        assert!(Decision::of(File::open("/dev/null").unwrap().into()).is_err());
        assert!(Decision::of(File::open("/proc/self/exe").unwrap().into()).is_err());
    }
}
