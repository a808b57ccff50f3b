//! General registers: interrupted system calls, and their image message.
//!
//! What a call returns when a stop interrupts it (Linux 6.18, every call that can sleep tried): most are made again by the
//! kernel. Those that wait for a time that has begun to run leave a restart block (ERESTART_RESTARTBLOCK: poll, nanosleep,
//! clock_nanosleep and futex with a timeout), which no image can carry; without a timeout, or to an absolute time, they are
//! made again all the same, and for the others a restore makes a new restart block, if the time that was left is known
//! ([`TimedCall`]). Some end with EINTR whether or not a handler runs (epoll_wait, semop, rt_sigtimedwait,
//! io_getevents): those that have no timeout are made again too, so that a program sees nothing of a dump.

use libc::user_regs_struct;

use crate::{image::pb, sys::pod};

const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

/// What the thread will find when it goes on: decides what an interrupted system call returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// No signal is waiting to be handled.
    #[default]
    None,
    /// A handler will run that was installed with SA_RESTART.
    Restarting,
    /// A handler will run that was installed without SA_RESTART.
    Interrupting,
}

/// Sets the registers of a thread that was stopped in a system call to what it will see when no signal
/// waits for it: the call is made again, or has returned EINTR where the kernel alone could go on with it.
/// Registers of a thread that was elsewhere stay as they are.
pub fn restart(regs: &mut user_regs_struct) {
    restart_for(regs, Delivery::None);
}

/// As [`restart`], for a thread that has a signal waiting: some calls end with EINTR when a handler runs.
pub fn restart_for(regs: &mut user_regs_struct, delivery: Delivery) {
    if regs.orig_rax.cast_signed() < 0 {
        return;
    }
    let again = match -regs.rax.cast_signed() {
        ERESTARTNOINTR => true,
        ERESTARTSYS => delivery != Delivery::Interrupting,
        ERESTARTNOHAND => delivery == Delivery::None,
        ERESTART_RESTARTBLOCK => delivery == Delivery::None && !time_runs(regs),
        _ => return,
    };
    if again {
        // `syscall` and `int 0x80` are both two bytes long.
        regs.rip = regs.rip.wrapping_sub(2);
        regs.rax = regs.orig_rax;
    } else {
        regs.rax = (-i64::from(libc::EINTR)).cast_unsigned();
    }
}

/// A flag of clock_nanosleep: to a time, not for a while.
const TIMER_ABSTIME: u64 = libc::TIMER_ABSTIME as u64;

/// Operations of futex, without their flags.
pub(crate) const FUTEX_OPERATION: u64 = 0x7f;
pub(crate) const FUTEX_WAIT: u64 = 0;
pub(crate) const FUTEX_WAIT_BITSET: u64 = 9;

/// Whether an argument that is an int is below zero.
fn is_negative(argument: u64) -> bool {
    argument & 0x8000_0000 != 0
}

/// Whether a call that left a restart block waits for a time that its arguments alone do not tell.
fn time_runs(regs: &user_regs_struct) -> bool {
    match regs.orig_rax.cast_signed() {
        libc::SYS_poll => !is_negative(regs.rdx),
        libc::SYS_futex => regs.rsi & FUTEX_OPERATION != FUTEX_WAIT_BITSET,
        _ => true,
    }
}

/// Whether a thread was interrupted in a call that waits for a time which its arguments alone do not tell.
pub fn waits_for_a_while(regs: &user_regs_struct) -> bool {
    regs.orig_rax.cast_signed() >= 0
        && regs.rax == (-ERESTART_RESTARTBLOCK).cast_unsigned()
        && time_runs(regs)
}

/// Says in an image which call it was that has ended: a thread that goes on with one has another number.
pub fn name_call(entry: &mut pb::UserX86RegsEntry, number: i64) {
    entry.orig_ax = number.cast_unsigned();
}

/// Lets the call of an image that has ended be made again, with the same arguments.
pub fn make_again(entry: &mut pb::UserX86RegsEntry) {
    entry.ip = entry.ip.wrapping_sub(2);
    entry.ax = entry.orig_ax;
}

/// How a call is told how long to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// In milliseconds.
    Milliseconds,
    /// By the address of a `struct timespec`.
    Timespec,
}

/// A call that leaves a restart block when it is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimedCall {
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// Which of them says how long to wait, and how.
    pub timeout: (usize, Timeout),
}

impl TimedCall {
    /// The call that the registers of an image say has ended with EINTR, where such a one can be.
    pub fn of(regs: &user_regs_struct, orig_rax: u64) -> Option<Self> {
        let number = orig_rax.cast_signed();
        let timeout = match number {
            libc::SYS_poll if !is_negative(regs.rdx) => (2, Timeout::Milliseconds),
            libc::SYS_nanosleep => (0, Timeout::Timespec),
            libc::SYS_clock_nanosleep if regs.rsi & TIMER_ABSTIME == 0 => (2, Timeout::Timespec),
            libc::SYS_futex if regs.rsi & FUTEX_OPERATION == FUTEX_WAIT && regs.r10 != 0 => {
                (3, Timeout::Timespec)
            }
            _ => return None,
        };
        let ended = regs.rax == (-i64::from(libc::EINTR)).cast_unsigned();
        let arguments = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
        ended.then_some(Self { number, arguments, timeout })
    }

    /// Sets the registers of a thread that has just made the call with another timeout, and been interrupted in it
    /// unless it has ended. For the same registers as [`interrupted`].
    pub fn enter(&self, regs: &mut user_regs_struct, result: i64) {
        regs.rax = result.cast_unsigned();
        if result == -ERESTART_RESTARTBLOCK {
            regs.orig_rax = self.number.cast_unsigned();
        }
    }
}

/// Sets the registers of a thread that was interrupted in a call without a timeout, which ends with EINTR whoever
/// interrupts it, such that the kernel makes the call again unless a handler runs. Returns whether it was in one. A signal
/// that nobody handles may end such a call as well: then it is made again too, of which the program knows nothing.
pub fn interrupted_for_nothing(regs: &mut user_regs_struct) -> bool {
    if regs.rax != (-i64::from(libc::EINTR)).cast_unsigned() {
        return false;
    }
    let waits_for_ever = waits_for_ever(regs);
    if waits_for_ever {
        regs.rax = (-ERESTARTNOHAND).cast_unsigned();
    }
    waits_for_ever
}

/// As [`interrupted_for_nothing`], for registers of an image whose call was `orig_rax`: other tools save such a thread, and one
/// whose restart block was not needed, as if its call had ended with EINTR. For the same registers as [`interrupted`].
pub fn ended_for_nothing(regs: &mut user_regs_struct, orig_rax: u64) -> bool {
    let mut in_call = user_regs_struct { orig_rax, ..*regs };
    let block = [libc::SYS_poll, libc::SYS_futex].contains(&orig_rax.cast_signed()) && !time_runs(&in_call);
    if block && regs.rax == (-i64::from(libc::EINTR)).cast_unsigned() {
        in_call.rax = (-ERESTARTNOHAND).cast_unsigned();
    } else if !interrupted_for_nothing(&mut in_call) {
        return false;
    }
    *regs = in_call;
    true
}

/// Whether a call that ends with EINTR after any stop has no timeout.
fn waits_for_ever(regs: &user_regs_struct) -> bool {
    match regs.orig_rax.cast_signed() {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => is_negative(regs.r10),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => regs.r10 == 0,
        libc::SYS_rt_sigtimedwait => regs.rdx == 0,
        libc::SYS_io_getevents => regs.r8 == 0,
        libc::SYS_semop => true,
        _ => false,
    }
}

/// The `syscall` instruction.
pub const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Missing in libc: io_pgetevents, and futex_wait (Linux 6.7).
const SYS_IO_PGETEVENTS: i64 = 333;
const SYS_FUTEX_WAIT: i64 = 455;

/// The error with which the kernel leaves an interrupted call that is to be made again: EINTR if any handler runs.
const IF_NO_HANDLER: &[i64] = &[
    libc::SYS_pause,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_getevents,
    SYS_IO_PGETEVENTS,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_clock_nanosleep,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
];
/// EINTR if a handler without SA_RESTART runs. Others, not listed, are made again whatever happens.
const IF_RESTARTING: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_sendfile,
    libc::SYS_futex_waitv,
    SYS_FUTEX_WAIT,
    libc::SYS_mq_timedsend,
    libc::SYS_mq_timedreceive,
];

/// Undoes [`restart`], for a thread that stands at `instruction`: in its call again, interrupted, so that the
/// kernel decides by the signals that have come meanwhile. Returns whether it was at such a call. Only for registers
/// that are set in a stop after which the kernel looks for signals; elsewhere the thread would see the error.
pub fn interrupted(regs: &mut user_regs_struct, orig_rax: u64, instruction: [u8; 2]) -> bool {
    let number = orig_rax.cast_signed();
    if instruction != SYSCALL || number < 0 || regs.rax != orig_rax {
        return false;
    }
    let error = if number == libc::SYS_futex {
        match regs.rsi & FUTEX_OPERATION {
            FUTEX_WAIT | FUTEX_WAIT_BITSET if regs.r10 == 0 => ERESTARTSYS,
            FUTEX_WAIT_BITSET => ERESTARTNOHAND,
            _ => return false,
        }
    } else if IF_NO_HANDLER.contains(&number) {
        ERESTARTNOHAND
    } else if IF_RESTARTING.contains(&number) {
        ERESTARTSYS
    } else {
        return false;
    };
    regs.rip = regs.rip.wrapping_add(2);
    regs.orig_rax = orig_rax;
    regs.rax = (-error).cast_unsigned();
    true
}

/// Code segment of 64-bit user code; 32-bit code has another.
pub const USER_CS: u64 = 0x33;
const USER_DS: u64 = 0x2b;

macro_rules! same {
    ($($entry:ident: $reg:ident),* $(,)?) => {
        /// The image message of general registers.
        pub fn to_entry(regs: &user_regs_struct) -> pb::UserX86RegsEntry {
            pb::UserX86RegsEntry { $($entry: regs.$reg,)* mode: Some(pb::UserX86RegsMode::Native as i32) }
        }

        /// Registers from their image message; `None` for a 32-bit thread.
        pub fn from_entry(entry: &pb::UserX86RegsEntry) -> Option<user_regs_struct> {
            if entry.mode() != pb::UserX86RegsMode::Native || entry.cs != USER_CS {
                return None;
            }
            let mut regs: user_regs_struct = pod::zeroed();
            $(regs.$reg = entry.$entry;)*
            // No system call is to be made again: the image's registers say so by themselves.
            regs.orig_rax = u64::MAX;
            if regs.ss & 3 != 3 {
                regs.ss = USER_DS;
            }
            Some(regs)
        }
    };
}
same! {
    r15: r15, r14: r14, r13: r13, r12: r12, bp: rbp, bx: rbx, r11: r11, r10: r10, r9: r9, r8: r8,
    ax: rax, cx: rcx, dx: rdx, si: rsi, di: rdi, orig_ax: orig_rax, ip: rip, cs: cs, flags: eflags,
    sp: rsp, ss: ss, fs_base: fs_base, gs_base: gs_base, ds: ds, es: es, fs: fs, gs: gs,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sys::pod;

    proptest! {
        #[test]
        fn every_register_comes_back(words: [u64; 27]) {
            let mut regs: user_regs_struct = pod::from_bytes(pod::bytes_of(&words)).unwrap();
            regs.cs = USER_CS;
            regs.ss |= 3;
            let back = from_entry(&to_entry(&regs)).unwrap();
            regs.orig_rax = u64::MAX;
            prop_assert_eq!(format!("{back:?}"), format!("{regs:?}"));
        }
    }

    #[test]
    fn thirty_two_bit_threads_are_refused() {
        let mut regs: user_regs_struct = pod::zeroed();
        regs.cs = 0x23;
        assert!(from_entry(&to_entry(&regs)).is_none());
        regs.cs = USER_CS;
        let mut entry = to_entry(&regs);
        assert!(from_entry(&entry).is_some());
        entry.mode = Some(pb::UserX86RegsMode::Compat as i32);
        assert!(from_entry(&entry).is_none());
    }

    fn after(orig_rax: i64, rax: i64, delivery: Delivery) -> (u64, i64) {
        let mut regs: user_regs_struct = pod::zeroed();
        regs.rip = 0x1002;
        regs.orig_rax = orig_rax.cast_unsigned();
        regs.rax = rax.cast_unsigned();
        restart_for(&mut regs, delivery);
        (regs.rip, regs.rax.cast_signed())
    }

    #[test]
    fn calls_are_made_again_or_end_with_eintr() {
        use Delivery::{Interrupting, None, Restarting};
        let again = (0x1000, 34);
        let eintr = (0x1002, -4);
        for (error, delivery, want) in [
            (512, None, again),
            (512, Restarting, again),
            (512, Interrupting, eintr),
            (513, None, again),
            (513, Interrupting, again),
            (514, None, again),
            (514, Restarting, eintr),
            (514, Interrupting, eintr),
        ] {
            assert_eq!(after(34, -error, delivery), want, "{error} {delivery:?}");
        }
    }

    #[test]
    fn restart_blocks() {
        use Delivery::{Interrupting, None, Restarting};
        let after = |number: i64, rsi: u64, rdx: u64, delivery| {
            let mut regs: user_regs_struct = pod::zeroed();
            (regs.rip, regs.rsi, regs.rdx, regs.r10) = (0x1002, rsi, rdx, 1);
            regs.orig_rax = number.cast_unsigned();
            regs.rax = i64::cast_unsigned(-516);
            restart_for(&mut regs, delivery);
            (regs.rip, regs.rax) == (0x1000, regs.orig_rax)
        };
        let minus = |n: i32| u64::from(n.cast_unsigned());
        assert!(after(libc::SYS_poll, 1, minus(-1), None) && after(libc::SYS_poll, 1, minus(-77), None));
        assert!(!after(libc::SYS_poll, 1, minus(-1), Restarting));
        assert!(!after(libc::SYS_poll, 1, minus(-1), Interrupting));
        assert!(!after(libc::SYS_poll, 1, 600_000, None));
        // With FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME.
        assert!(after(libc::SYS_futex, 9 | 128, 0, None) && after(libc::SYS_futex, 9 | 256, 0, None));
        assert!(!after(libc::SYS_futex, 128, 0, None));
        assert!(!after(libc::SYS_nanosleep, 0, 0, None) && !after(libc::SYS_clock_nanosleep, 0, 0, None));
    }

    #[test]
    fn calls_that_end_with_eintr_for_nothing() {
        let interrupted = |number: i64, rdx: u64, r10: u64, r8: u64, rax: i64| {
            let mut regs: user_regs_struct = pod::zeroed();
            (regs.rdx, regs.r10, regs.r8) = (rdx, r10, r8);
            (regs.orig_rax, regs.rax) = (number.cast_unsigned(), rax.cast_unsigned());
            let was = interrupted_for_nothing(&mut regs);
            assert_eq!(regs.rax.cast_signed(), if was { -514 } else { rax });
            was
        };
        let forever = u64::from(u32::MAX);
        assert!(interrupted(libc::SYS_epoll_wait, 1, forever, 0, -4));
        assert!(interrupted(libc::SYS_epoll_pwait, 1, forever, 7, -4));
        assert!(interrupted(libc::SYS_epoll_pwait2, 1, 0, 7, -4));
        assert!(interrupted(libc::SYS_semop, 1, 1, 1, -4) && interrupted(libc::SYS_semtimedop, 1, 0, 1, -4));
        assert!(interrupted(libc::SYS_rt_sigtimedwait, 0, 8, 0, -4));
        assert!(interrupted(libc::SYS_io_getevents, 1, 1, 0, -4));
        for number in [libc::SYS_epoll_wait, libc::SYS_epoll_pwait2, libc::SYS_semtimedop] {
            assert!(!interrupted(number, 1, 1000, 0, -4));
        }
        assert!(!interrupted(libc::SYS_rt_sigtimedwait, 1, 8, 0, -4));
        assert!(!interrupted(libc::SYS_io_getevents, 1, 1, 1, -4));
        assert!(!interrupted(libc::SYS_epoll_wait, 1, forever, 0, 0));
        assert!(!interrupted(libc::SYS_close, 0, 0, 0, -4) && !interrupted(-1, 0, 0, 0, -4));
    }

    #[test]
    fn a_call_to_be_made_again_is_interrupted_again() {
        for (number, error) in [
            (libc::SYS_pause, 514),
            (libc::SYS_read, 512),
            (libc::SYS_clock_nanosleep, 514),
            (libc::SYS_futex, 512),
        ] {
            let mut before: user_regs_struct = pod::zeroed();
            before.rip = 0x1002;
            before.orig_rax = number.cast_unsigned();
            before.rax = i64::cast_unsigned(-error);
            let mut regs = before;
            restart(&mut regs);
            let orig_rax = std::mem::replace(&mut regs.orig_rax, u64::MAX);
            assert!(!interrupted(&mut regs, orig_rax, [0x90, 0x90]));
            assert!(interrupted(&mut regs, orig_rax, SYSCALL));
            assert_eq!(format!("{regs:?}"), format!("{before:?}"));
        }
        let mut regs: user_regs_struct = pod::zeroed();
        regs.rax = libc::SYS_clone.cast_unsigned();
        assert!(!interrupted(&mut regs, libc::SYS_clone.cast_unsigned(), SYSCALL));
        regs.rax = 5;
        assert!(!interrupted(&mut regs, 0, SYSCALL));
        assert!(!interrupted(&mut regs, u64::MAX, SYSCALL));
    }

    #[test]
    fn other_registers_stay() {
        assert_eq!(after(-1, -512, Delivery::None), (0x1002, -512));
        assert_eq!(after(34, -4, Delivery::None), (0x1002, -4));
        assert_eq!(after(0, 5, Delivery::None), (0x1002, 5));
        assert_eq!(after(34, -515, Delivery::None), (0x1002, -515));
    }
}
