//! crtool under ptrace, which stops at each of its system calls.
#![allow(unsafe_code)] // between fork and exec

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Command},
};

use nix::{
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// A stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// It begins; otherwise it is over.
    pub enters: bool,
    pub number: i64,
    pub args: [u64; 4],
    pub result: i64,
}

/// The program, stopped. It ends with us.
#[derive(Debug)]
pub struct Stepper {
    child: Child,
    /// A signal that it has got, and has not been given.
    pass: Option<Signal>,
    within: bool,
}

impl Stepper {
    /// Starts it, to its first instruction.
    pub fn start(command: &mut Command) -> Self {
        // SAFETY: one system call, without memory of its own.
        unsafe { command.pre_exec(|| ptrace::traceme().map_err(Into::into)) };
        let child = command.spawn().expect("start crtool");
        let stepper = Self { child, pass: None, within: false };
        match waitpid(stepper.pid(), None).expect("wait for crtool") {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
            other => panic!("crtool begins with {other:?}"),
        }
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(stepper.pid(), options).expect("options");
        stepper
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Lets it go to where it begins a system call, or comes back from one. `Err` is its status when it has ended: negative
    /// for a signal.
    pub fn step(&mut self) -> Result<Call, i32> {
        loop {
            if ptrace::syscall(self.pid(), self.pass.take()).is_err() {
                return Err(i32::MIN);
            }
            match waitpid(self.pid(), None).expect("wait for crtool") {
                WaitStatus::PtraceSyscall(_) => {
                    self.within = !self.within;
                    let regs = ptrace::getregs(self.pid()).expect("registers of crtool");
                    return Ok(Call {
                        enters: self.within,
                        number: regs.orig_rax.cast_signed(),
                        args: [regs.rdi, regs.rsi, regs.rdx, regs.r10],
                        result: regs.rax.cast_signed(),
                    });
                }
                WaitStatus::Stopped(_, signal) => self.pass = Some(signal),
                WaitStatus::Exited(_, status) => return Err(status),
                WaitStatus::Signaled(_, signal, _) => return Err(-(signal as i32)),
                other => panic!("crtool ends with {other:?}"),
            }
        }
    }

    /// Lets it go to its end; its status.
    pub fn finish(mut self) -> i32 {
        // The rest is not looked at.
        if ptrace::detach(self.pid(), self.pass.take()).is_err() {
            return i32::MIN;
        }
        match waitpid(self.pid(), None) {
            Ok(WaitStatus::Exited(_, status)) => status,
            Ok(WaitStatus::Signaled(_, signal, _)) => -(signal as i32),
            other => panic!("crtool ends with {other:?}"),
        }
    }
}
