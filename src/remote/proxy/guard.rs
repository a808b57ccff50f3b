//! Whether the tree at the source is gone, when nobody is left to say so.
//!
//! A dump that has been told that its snapshot is complete kills the tree, first its root, and then confirms. If it
//! vanishes in between, the root decides: dead or dying, the snapshot is all there is of the tree and must be
//! kept; alive, the tree goes on here and the snapshot must never run.
//!
//! The dump traces the tree with PTRACE_O_EXITKILL at that time. Its socket closes before its end has that effect,
//! so its end is waited for first: a pidfd becomes readable only after all that was traced has been sent
//! SIGKILL. A signal that was sent shows: as pending, then in PF_EXITING, then as the end. Between the first two
//! lies an instant that nothing shows, hence [`SETTLE`]. How long a dying task takes is no matter: to take apart
//! a large address space is long work.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::proc::{fdinfo, stat, status};

/// How long a root must look alive, after the dump has ended, until it is believed to be.
const SETTLE: Duration = Duration::from_secs(2);
/// How often it is looked at.
pub(super) const LOOK: Duration = Duration::from_millis(50);
/// The kernel's flag of a task that is past the point where signals matter.
const PF_EXITING: u32 = 4;
/// SIGKILL in a signal set.
const KILL: u64 = 1 << (libc::SIGKILL - 1);

/// How a process looks.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Life {
    Alive,
    /// Nothing can stop its end.
    Dying,
    Dead,
    /// It has not ended; more cannot be seen.
    Hidden(String),
}

/// What is known of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing yet; look again after [`LOOK`].
    Open,
    /// As `Open`, and why it may stay so.
    Unknown(String),
    /// It runs here.
    Alive,
    /// It is gone.
    Gone,
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

/// The root of a tree, by the pidfd that the dump gave.
#[derive(Debug)]
pub(super) struct Root {
    pidfd: OwnedFd,
}

impl Root {
    /// An error if it is no pidfd.
    pub(super) fn new(pidfd: OwnedFd) -> io::Result<Self> {
        pid_of(pidfd.as_fd())?;
        Ok(Self { pidfd })
    }

    fn look(&self) -> Life {
        // What is read of a process that ends meanwhile may be of another one: its end is asked last.
        let seen = pid_of(self.pidfd.as_fd()).and_then(|pid| match pid {
            1.. => tasks(pid),
            0 => Ok(Life::Hidden("/proc does not show it".to_owned())),
            _ => Ok(Life::Dead),
        });
        if has_ended(self.pidfd.as_fd()) {
            return Life::Dead;
        }
        seen.unwrap_or_else(|e| Life::Hidden(e.to_string()))
    }
}

/// What is looked at of a task.
#[derive(Debug, Clone, Copy)]
struct Task {
    state: stat::State,
    flags: u32,
    pending: u64,
}

/// All tasks of a process.
fn tasks(pid: i32) -> io::Result<Life> {
    let mut tasks = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let read = |file| std::fs::read(path.join(file));
        let (stat, status) = match (read("stat"), read("status")) {
            (Ok(stat), Ok(status)) => (stat, status),
            (Err(e), _) | (_, Err(e)) if is_gone(&e) => continue,
            (Err(e), _) | (_, Err(e)) => return Err(e),
        };
        let stat = stat::parse(&stat).map_err(io::Error::other)?;
        let status = status::parse(&status).map_err(io::Error::other)?;
        let pending = status.sigpnd | status.shdpnd;
        tasks.push(Task { state: stat.state, flags: stat.flags, pending });
    }
    Ok(judge(&tasks))
}

/// One task that lives is enough; the leader may have ended long before.
fn judge(tasks: &[Task]) -> Life {
    let is_dying = |task: &Task| {
        matches!(task.state, stat::State::Zombie | stat::State::Dead)
            || task.flags & PF_EXITING != 0
            || task.pending & KILL != 0
    };
    if tasks.iter().all(is_dying) { Life::Dying } else { Life::Alive }
}

fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Looks at the tree of a dump that has closed its socket without a last word.
#[derive(Debug)]
pub(super) struct Watch {
    /// The dump itself; none if it had ended before it could be held.
    dump: Option<OwnedFd>,
    /// Since when it is known to have ended.
    ended: Option<Instant>,
}

impl Watch {
    /// Of this dump.
    pub(super) fn new(dump: Option<OwnedFd>) -> Self {
        Self { dump, ended: None }
    }

    /// What can be said by now.
    pub(super) fn look(&mut self, root: &Root, now: Instant) -> Verdict {
        if self.ended.is_none() && self.dump.as_ref().is_none_or(|dump| has_ended(dump.as_fd())) {
            self.ended = Some(now);
        }
        match (root.look(), self.ended) {
            (Life::Dead, _) | (Life::Dying, Some(_)) => Verdict::Gone,
            (Life::Alive, Some(ended)) if now.saturating_duration_since(ended) >= SETTLE => Verdict::Alive,
            (Life::Hidden(why), Some(_)) => Verdict::Unknown(why),
            _ => Verdict::Open,
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

        fn pidfd(&self) -> OwnedFd {
            sys::pidfd::open(self.0.id().cast_signed(), 0).unwrap()
        }

        fn root(&self) -> Root {
            Root::new(self.pidfd()).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn ends_are_seen() {
        let mut child = Sleeper::new();
        let root = child.root();
        assert_eq!(root.look(), Life::Alive);
        child.0.kill().unwrap();
        // Dying or dead; reaped or not.
        assert_ne!(root.look(), Life::Alive);
        let mut fds = [PollFd::new(root.pidfd.as_fd(), PollFlags::POLLIN)];
        assert!(poll(&mut fds, 60_000u16).unwrap() > 0);
        assert_eq!(root.look(), Life::Dead);
        child.0.wait().unwrap();
        assert_eq!(root.look(), Life::Dead);
        assert!(Root::new(std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }

    #[test]
    fn one_living_task_is_enough() {
        let alive = Task { state: stat::State::Sleeping, flags: 0x40_0000, pending: 0 };
        let zombie = Task { state: stat::State::Zombie, ..alive };
        let exiting = Task { flags: 0x40_0000 | PF_EXITING, ..alive };
        let killed = Task { pending: KILL, state: stat::State::DiskSleep, ..alive };
        let other = Task { pending: 1 << (libc::SIGTERM - 1), ..alive };
        assert_eq!(judge(&[zombie, alive]), Life::Alive);
        assert_eq!(judge(&[zombie, exiting, killed]), Life::Dying);
        assert_eq!(judge(&[other]), Life::Alive);
    }

    #[test]
    fn the_dump_must_have_ended_first() {
        let (mut dump, child) = (Sleeper::new(), Sleeper::new());
        let root = child.root();
        let mut watch = Watch::new(Some(dump.pidfd()));
        let now = Instant::now();
        assert_eq!(watch.look(&root, now + 100 * SETTLE), Verdict::Open);
        dump.0.kill().unwrap();
        dump.0.wait().unwrap();
        assert_eq!(watch.look(&root, now), Verdict::Open);
        assert_eq!(watch.look(&root, now + SETTLE / 2), Verdict::Open);
        assert_eq!(watch.look(&root, now + SETTLE), Verdict::Alive);
        drop(child);
        assert_eq!(watch.look(&root, now + SETTLE), Verdict::Gone);
    }

    #[test]
    fn a_dead_root_is_gone_whoever_lives() {
        let (dump, child) = (Sleeper::new(), Sleeper::new());
        let root = child.root();
        drop(child);
        let mut watch = Watch::new(Some(dump.pidfd()));
        assert_eq!(watch.look(&root, Instant::now()), Verdict::Gone);
        assert_eq!(Watch::new(None).look(&root, Instant::now()), Verdict::Gone);
    }
}
