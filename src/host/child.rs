//! A child that makes a list of system calls, stops where told to, and dies with its maker: for a probe to try things on,
//! or to make what crtool itself must not have.

use std::{
    io::Read as _,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};

use crate::sys::{
    self, Errno,
    mapping::{self, Access, Mapping},
    pid::HostPid,
    probe::{Call, NOT_MADE, Word, fork_calls},
};

/// Longest time a probe waits for its child. It needs microseconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Room for results.
const RESULTS_BYTES: usize = 4096;

/// A list of calls in the making.
#[derive(Debug)]
pub(crate) struct Script {
    calls: Vec<Call>,
    /// Data of the calls, where the child finds it: a box does not move.
    data: Vec<Box<[u8]>>,
    said: (OwnedFd, OwnedFd),
    go: (OwnedFd, OwnedFd),
}

/// A call of a script, for its result or for passing it on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made(usize);

impl From<Made> for Word {
    fn from(made: Made) -> Self {
        Self::Result(made.0)
    }
}

macro_rules! words {
    ($($from:ty),*) => { $(
        impl From<$from> for Word {
            fn from(value: $from) -> Self {
                Self::Val(i64::from(value).cast_unsigned())
            }
        }
    )* };
}
words!(i32, u32, i64);

impl From<u64> for Word {
    fn from(value: u64) -> Self {
        Self::Val(value)
    }
}

impl Script {
    /// An empty list.
    pub(crate) fn new() -> Result<Self, Errno> {
        let said = pipe2(OFlag::O_CLOEXEC)?;
        let go = pipe2(OFlag::O_CLOEXEC)?;
        Ok(Self { calls: Vec::new(), data: Vec::new(), said, go })
    }

    /// Adds a call.
    pub(crate) fn call(&mut self, nr: libc::c_long, args: &[Word]) -> Made {
        let mut all = [Word::Val(0); 6];
        for (slot, arg) in all.iter_mut().zip(args) {
            *slot = *arg;
        }
        self.calls.push(Call { nr, args: all });
        Made(self.calls.len() - 1)
    }

    /// Adds data; its address is the same here and in the child.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> u64 {
        let boxed: Box<[u8]> = bytes.into();
        let addr = boxed.as_ptr() as u64;
        self.data.push(boxed);
        addr
    }

    /// The child waits here until [`Child::go`].
    pub(crate) fn rest(&mut self) {
        self.say();
        let byte = self.data(&[0]);
        let fd = self.go.0.as_raw_fd();
        self.call(libc::SYS_read, &[fd.into(), byte.into(), 1.into()]);
    }

    fn say(&mut self) {
        let byte = self.data(&[0]);
        let fd = self.said.1.as_raw_fd();
        self.call(libc::SYS_write, &[fd.into(), byte.into(), 1.into()]);
    }

    /// Starts the child and waits until it rests or has made all calls.
    pub(crate) fn start(mut self) -> Result<Child, Errno> {
        self.say();
        let fd = mapping::memfd(c"probe", RESULTS_BYTES as u64)?;
        let results = Mapping::shared(fd.as_fd(), 0, RESULTS_BYTES, Access::ReadWrite, None)?;
        let pid = fork_calls(&self.calls, &results)?;
        let ((said, said_by_child), (heard_by_child, go)) = (self.said, self.go);
        // So that the death of the child is seen as the end of the pipe.
        drop((said_by_child, heard_by_child));
        let child = Child { pid: HostPid::new(pid), results, said, go, _data: self.data };
        child.wait()?;
        Ok(child)
    }
}

/// A child that has made calls; killed and reaped when dropped.
#[derive(Debug)]
pub(crate) struct Child {
    pid: HostPid,
    results: Mapping,
    said: OwnedFd,
    go: OwnedFd,
    _data: Vec<Box<[u8]>>,
}

impl Child {
    /// Its pid.
    pub(crate) fn pid(&self) -> HostPid {
        self.pid
    }

    fn wait(&self) -> Result<(), Errno> {
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.said.as_fd(), PollFlags::POLLIN)];
        let begin = Instant::now();
        // A command that asks for one feature may have a timer that interrupts its waits.
        loop {
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(Errno::ETIMEDOUT),
                Err(Errno::EINTR) if begin.elapsed() < PATIENCE => {}
                Err(e) => return Err(e),
                Ok(_) => break,
            }
        }
        match nix::unistd::read(&self.said, &mut [0])? {
            1 => Ok(()),
            _ => Err(Errno::ESRCH),
        }
    }

    /// Lets it go on, and waits until it rests again or has made all calls.
    pub(crate) fn go(&self) -> Result<(), Errno> {
        nix::unistd::write(&self.go, &[0])?;
        self.wait()
    }

    /// What a call returned.
    pub(crate) fn result(&self, call: Made) -> Result<i64, Errno> {
        let mut bytes = [0; 8];
        self.results.read(call.0 * 8, &mut bytes)?;
        match i64::from_ne_bytes(bytes) {
            NOT_MADE => Err(Errno::ESRCH),
            value @ -4095..=-1 => Err(Errno::from_raw(i32::try_from(-value).unwrap_or(libc::EPROTO))),
            value => Ok(value),
        }
    }

    /// Its /proc file.
    pub(crate) fn proc(&self, file: &str) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::fs::File::open(format!("/proc/{}/{file}", self.pid))?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Stops it by ptrace.
    pub(crate) fn seize(&self, options: u64) -> Result<(), Errno> {
        sys::ptrace::seize(self.pid, options)?;
        sys::ptrace::interrupt(self.pid)?;
        match sys::wait::wait(self.pid)? {
            sys::wait::Status::Stopped(..) => Ok(()),
            _ => Err(Errno::ESRCH),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = sys::task::kill(self.pid, libc::SIGKILL);
        while let Ok(sys::wait::Status::Stopped(..) | sys::wait::Status::Continued) =
            sys::wait::wait(self.pid)
        {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_errors() {
        let mut script = Script::new().unwrap();
        let pid = script.call(libc::SYS_getpid, &[]);
        let bad = script.call(libc::SYS_close, &[(-1).into()]);
        script.rest();
        let probed = script.call(libc::SYS_kill, &[pid.into(), 0.into()]);
        let child = script.start().unwrap();
        assert_eq!(child.result(pid), Ok(i64::from(child.pid().get())));
        assert_eq!(child.result(bad), Err(Errno::EBADF));
        assert_eq!(child.result(probed), Err(Errno::ESRCH), "not made yet");
        child.go().unwrap();
        assert_eq!(child.result(probed), Ok(0));
        let proc = format!("/proc/{}", child.pid());
        drop(child);
        assert!(!std::path::Path::new(&proc).exists());
    }

    #[test]
    fn a_dead_child_is_no_success() {
        let mut script = Script::new().unwrap();
        script.call(libc::SYS_exit_group, &[0.into()]);
        assert!(script.start().is_err());
    }
}
