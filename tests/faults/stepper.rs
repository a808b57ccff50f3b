//! A program under ptrace that goes from system call to system call.
#![allow(unsafe_code)] // between fork and exec

use std::{
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command},
};

use nix::{
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// The program, stopped. It ends with us.
#[derive(Debug)]
pub struct Stepper {
    child: Child,
    /// A signal that it has got, and has not been given.
    pass: Option<Signal>,
}

impl Stepper {
    /// Starts it, to its first instruction.
    pub fn start(command: &mut Command) -> Self {
        // SAFETY: one system call, without memory of its own.
        unsafe { command.pre_exec(|| ptrace::traceme().map_err(Into::into)) };
        let child = command.spawn().expect("start the tool");
        let stepper = Self { child, pass: None };
        match waitpid(stepper.pid(), None).expect("wait for the tool") {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
            other => panic!("the tool begins with {other:?}"),
        }
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(stepper.pid(), options).expect("options");
        stepper
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Lets it go to where it begins a system call, or comes back from one. Its status when it has ended by itself.
    pub fn step(&mut self) -> Option<i32> {
        loop {
            ptrace::syscall(self.pid(), self.pass.take()).expect("go on");
            match waitpid(self.pid(), None).expect("wait for the tool") {
                WaitStatus::PtraceSyscall(_) => return None,
                WaitStatus::Stopped(_, signal) => self.pass = Some(signal),
                WaitStatus::Exited(_, status) => return Some(status),
                other => panic!("the tool ends with {other:?}"),
            }
        }
    }

    /// `kill -9`, here and now.
    pub fn kill(&mut self) {
        kill(self.pid(), Signal::SIGKILL).expect("kill the tool");
        let end = self.child.wait().expect("wait for the tool");
        assert_eq!(end.signal(), Some(libc::SIGKILL), "{end:?}");
    }
}
