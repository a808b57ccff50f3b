//! Calls that wait for a time which has begun to run: poll, nanosleep, clock_nanosleep and futex with a timeout.
//!
//! Interrupted, such a call leaves in the kernel until when it waits, which crtool reads where it may (`host/peek.rs`). A
//! restored thread makes the call again with the time that is left, is interrupted at once, and so has in the kernel what the
//! saved one had: nobody sees the other timeout. Images of other tools do not say what is left, and threads with seccomp filters
//! may not be allowed the call by which the kernel goes on: there it has ended with EINTR, as it stands in the registers.

use std::time::Duration;

use super::{Result, TaskError};
use crate::{
    arch::registers::{self, TimedCall, Timeout},
    host::peek::RestartBlock,
    image::pb,
    ns::time::Clocks,
    sys::pod,
};

/// SECCOMP_MODE_DISABLED, as images have it.
const NO_FILTERS: i32 = pb::SeccompMode::Disabled as i32;
/// Nothing is mapped below it: what is less is no address.
const LEAST_ADDRESS: i32 = 4096;

/// Whether a thread for which /proc/PID/task/TID/syscall says this may wait for a while.
pub(super) fn may_be_timed(text: &str) -> bool {
    let mut words = text.split_ascii_whitespace();
    let number = words.next().and_then(|word| word.parse::<i64>().ok());
    let argument = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let mut arguments = words.map_while(argument);
    match number {
        Some(libc::SYS_poll) => arguments.nth(2).is_some_and(|timeout| low(timeout).cast_signed() >= 0),
        Some(libc::SYS_futex) => arguments.nth(3).is_some_and(|timeout| timeout != 0),
        Some(libc::SYS_nanosleep | libc::SYS_clock_nanosleep | libc::SYS_restart_syscall) => true,
        _ => false,
    }
}

/// What an interrupted call still waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Its arguments tell all of it.
    AsAsked,
    /// A time from the moment of the images on.
    For(Duration),
}

/// The call that left a restart block, by its number, and what it still waits for. The kernel forgets the number when a thread goes on
/// with a call (restart_syscall), but not the arguments, which are kept in the block as well: so a block is only believed
/// where it agrees with them, and a number that is not known is that of the only call which does. `host` are the clocks of
/// the host.
pub(super) fn waits(regs: &pb::UserX86RegsEntry, block: &RestartBlock, host: Clocks) -> Option<(i64, Wait)> {
    let kinds = [of_poll, of_futex, of_nanosleep];
    let mut found = kinds.into_iter().filter_map(|kind| kind(regs, block, host));
    let (only, None) = (found.next()?, found.next()) else { return None };
    let number = regs.orig_ax.cast_signed();
    (number == only.0 || number == libc::SYS_restart_syscall).then_some(only)
}

fn monotonic(until: Duration, host: Clocks) -> Wait {
    Wait::For(until.saturating_sub(host.monotonic))
}

/// The half of a register in which an argument of 32 bits is.
fn low(register: u64) -> u32 {
    u32::try_from(register & 0xffff_ffff).unwrap_or(0)
}

fn of_poll(regs: &pb::UserX86RegsEntry, block: &RestartBlock, host: Clocks) -> Option<(i64, Wait)> {
    let poll = block.poll;
    let has_timeout = low(regs.dx).cast_signed() >= 0;
    let agrees = (poll.fds, poll.count, poll.has_timeout) == (regs.di, low(regs.si), has_timeout.into());
    // The number of a clock, of clock_nanosleep, is no address.
    let address = regs.di == 0 || !matches!(i32::try_from(regs.di), Ok(..LEAST_ADDRESS));
    let (sec, nsec) = poll.until;
    let until = Duration::from_secs(sec).saturating_add(Duration::from_nanos(nsec));
    let wait = if has_timeout { monotonic(until, host) } else { Wait::AsAsked };
    (agrees && address).then_some((libc::SYS_poll, wait))
}

fn of_futex(regs: &pb::UserX86RegsEntry, block: &RestartBlock, host: Clocks) -> Option<(i64, Wait)> {
    let futex = block.futex;
    let (to_a_time, bitset) = match regs.si & registers::FUTEX_OPERATION {
        registers::FUTEX_WAIT => (false, u32::MAX),
        registers::FUTEX_WAIT_BITSET => (true, low(regs.r9)),
        _ => return None,
    };
    let agrees = (futex.word, futex.value, futex.bitset) == (regs.di, low(regs.dx), bitset) && regs.r10 != 0;
    let until = Duration::from_nanos(futex.until);
    let wait = if to_a_time { Wait::AsAsked } else { monotonic(until, host) };
    agrees.then_some((libc::SYS_futex, wait))
}

fn of_nanosleep(regs: &pb::UserX86RegsEntry, block: &RestartBlock, host: Clocks) -> Option<(i64, Wait)> {
    let sleep = block.nanosleep;
    let until = Duration::from_nanos(sleep.until);
    // The first argument of one is an address, of the other the number of a clock. Those of processor time begin anew, and alarms
    // wake machines: they are not gone on with.
    let (number, rest, clock) = match i32::try_from(regs.di) {
        // For a while from now on, both are the same to the kernel.
        Ok(libc::CLOCK_REALTIME | libc::CLOCK_MONOTONIC) => {
            (libc::SYS_clock_nanosleep, regs.r10, libc::CLOCK_MONOTONIC)
        }
        Ok(libc::CLOCK_BOOTTIME) => (libc::SYS_clock_nanosleep, regs.r10, libc::CLOCK_BOOTTIME),
        Ok(..LEAST_ADDRESS) => return None,
        _ => (libc::SYS_nanosleep, regs.si, libc::CLOCK_MONOTONIC),
    };
    let wait = match clock {
        libc::CLOCK_BOOTTIME => Wait::For(until.saturating_sub(host.boottime)),
        _ => monotonic(until, host),
    };
    ((sleep.rest, sleep.clock) == (rest, clock)).then_some((number, wait))
}

/// Whether these are the registers of a thread whose call a restore can make again.
pub(super) fn is_known(regs: &pb::UserX86RegsEntry) -> bool {
    registers::from_entry(regs).is_some_and(|of| TimedCall::of(&of, regs.orig_ax).is_some())
}

/// A call for a restored thread to be interrupted in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Again {
    call: TimedCall,
    left: Duration,
}

/// The call in which a thread was, if it can be in it again. `elapsed` is how long the clocks of the tree have been going on.
pub(crate) fn again(core: &pb::CoreEntry, elapsed: Duration) -> Result<Option<Again>> {
    let (Some(info), Some(thread)) = (core.thread_info.as_deref(), core.thread_core.as_deref()) else {
        return Ok(None);
    };
    let Some(left_ns) = thread.call_left_ns else { return Ok(None) };
    let filtered = thread.seccomp_mode.is_some_and(|mode| mode != NO_FILTERS);
    let Some(regs) = registers::from_entry(&info.gpregs).filter(|_| !filtered) else { return Ok(None) };
    let call = TimedCall::of(&regs, info.gpregs.orig_ax).ok_or_else(|| {
        TaskError::image(format!("call {} is none that waits for a while", info.gpregs.orig_ax.cast_signed()))
    })?;
    Ok(Some(Again { call, left: Duration::from_nanos(left_ns).saturating_sub(elapsed) }))
}

impl Again {
    /// Its number.
    pub(crate) fn number(&self) -> i64 {
        self.call.number
    }

    /// Memory that it needs, if any.
    pub(crate) fn memory(&self) -> Option<Vec<u8>> {
        let time = [self.left.as_secs(), self.left.subsec_nanos().into()];
        (self.call.timeout.1 == Timeout::Timespec).then(|| pod::bytes_of(&time).to_vec())
    }

    /// Its arguments; `memory` is where that is.
    pub(crate) fn arguments(&self, memory: u64) -> [u64; 6] {
        let mut arguments = self.call.arguments;
        let (index, how) = self.call.timeout;
        if let Some(argument) = arguments.get_mut(index) {
            *argument = match how {
                // Never too early: what is left of the last one is waited for as a whole.
                Timeout::Milliseconds => {
                    let ms = self.left.as_nanos().div_ceil(1_000_000);
                    u64::try_from(ms).unwrap_or(u64::MAX).min(i32::MAX.unsigned_abs().into())
                }
                Timeout::Timespec => memory,
            };
        }
        arguments
    }

    /// The registers of the thread, when it has made the call and been interrupted.
    pub(crate) fn enter(&self, regs: &mut libc::user_regs_struct, result: i64) {
        self.call.enter(regs, result);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::peek::{Futex, Nanosleep, Poll};

    const HOST: Clocks = Clocks { monotonic: Duration::from_secs(100), boottime: Duration::from_secs(200) };
    const TEXT: u64 = 0x7000_0000_1000;

    fn regs(number: i64, [di, si, dx, r10]: [u64; 4]) -> pb::UserX86RegsEntry {
        pb::UserX86RegsEntry { orig_ax: number.cast_unsigned(), di, si, dx, r10, ..Default::default() }
    }

    fn sleeping(clock: i32, rest: u64, until: Duration) -> RestartBlock {
        let until = u64::try_from(until.as_nanos()).unwrap();
        RestartBlock { nanosleep: Nanosleep { clock, rest, until }, ..Default::default() }
    }

    /// As it is named, as the kernel has forgotten its name, and as another call.
    fn check(number: i64, arguments: [u64; 4], block: &RestartBlock, wait: Option<Wait>) {
        let want = wait.map(|wait| (number, wait));
        assert_eq!(waits(&regs(number, arguments), block, HOST), want);
        assert_eq!(waits(&regs(libc::SYS_restart_syscall, arguments), block, HOST), want);
        assert_eq!(waits(&regs(libc::SYS_read, arguments), block, HOST), None);
    }

    #[test]
    fn calls_are_recognized() {
        let five = Some(Wait::For(Duration::from_secs(5)));
        let (at, boot) = (Duration::from_secs(105), Duration::from_secs(205));
        let sleep = sleeping(libc::CLOCK_MONOTONIC, TEXT, at);
        check(libc::SYS_nanosleep, [TEXT, TEXT, 0, 0], &sleep, five);
        check(libc::SYS_nanosleep, [TEXT, 0, 0, 0], &sleep, None);
        check(libc::SYS_clock_nanosleep, [1, 0, TEXT, TEXT], &sleep, five);
        check(libc::SYS_clock_nanosleep, [0, 0, TEXT, TEXT], &sleep, five);
        check(libc::SYS_clock_nanosleep, [7, 0, TEXT, TEXT], &sleep, None);
        check(libc::SYS_clock_nanosleep, [7, 0, TEXT, 0], &sleeping(7, 0, boot), five);
        // An alarm of CLOCK_BOOTTIME, whose restart block has a number of another kind.
        check(libc::SYS_clock_nanosleep, [9, 0, TEXT, 0], &sleeping(1, 0, boot), None);
        let over = sleeping(libc::CLOCK_MONOTONIC, TEXT, Duration::from_secs(3));
        check(libc::SYS_nanosleep, [TEXT, TEXT, 0, 0], &over, Some(Wait::For(Duration::ZERO)));
        let mut poll = Poll { fds: TEXT, count: 3, has_timeout: 1, until: (105, 0) };
        let block = |poll| RestartBlock { poll, ..Default::default() };
        check(libc::SYS_poll, [TEXT, 3, 9000, 0], &block(poll), five);
        check(libc::SYS_poll, [TEXT, 4, 9000, 0], &block(poll), None);
        poll.has_timeout = 0;
        check(libc::SYS_poll, [TEXT, 3, u64::from(u32::MAX), 0], &block(poll), Some(Wait::AsAsked));
        let futex = Futex { word: TEXT, value: 7, bitset: u32::MAX, until: 105_000_000_000 };
        let block = RestartBlock { futex, ..Default::default() };
        check(libc::SYS_futex, [TEXT, 128, 7, TEXT], &block, five);
        check(libc::SYS_futex, [TEXT, 128, 8, TEXT], &block, None);
        check(libc::SYS_futex, [TEXT, 128, 7, 0], &block, None);
        // The same bytes read as those of other calls.
        let poll = Poll { fds: TEXT, count: 0, has_timeout: 2, until: (0, 0) };
        let futex = Futex { value: 0, ..futex };
        let block = RestartBlock { futex, poll, ..Default::default() };
        check(libc::SYS_futex, [TEXT, 0, 0, TEXT], &block, five);
        let poll = Poll { fds: 1, ..Default::default() };
        let block = RestartBlock { poll, ..sleeping(libc::CLOCK_MONOTONIC, 0, at) };
        check(libc::SYS_clock_nanosleep, [1, 0, 1 << 31, 0], &block, five);
        // A block that nobody has written.
        check(libc::SYS_nanosleep, [TEXT, TEXT, 0, 0], &RestartBlock::default(), None);
    }

    #[test]
    fn threads_that_may_wait_for_a_while() {
        let of = |number: i64, [a, b, c, d]: [u64; 4]| {
            may_be_timed(&format!("{number} {a:#x} {b:#x} {c:#x} {d:#x} 0x0 0x0 0x7ffe 0x7f00\n"))
        };
        assert!(of(libc::SYS_poll, [TEXT, 1, 0, 0]) && !of(libc::SYS_poll, [TEXT, 1, 0xffff_ffff, 5]));
        assert!(of(libc::SYS_futex, [TEXT, 0, 0, TEXT]) && !of(libc::SYS_futex, [TEXT, 0, 0, 0]));
        assert!(of(libc::SYS_nanosleep, [0; 4]) && of(libc::SYS_restart_syscall, [0; 4]));
        assert!(!of(libc::SYS_read, [0; 4]));
        assert!(
            ["running\n", "-1 0x7ffe 0x7f00\n", "", "7", "7 0x", "202 x"].iter().all(|s| !may_be_timed(s))
        );
    }

    fn core(left: u64, number: i64, ax: i64) -> pb::CoreEntry {
        let mut core = pb::CoreEntry::default();
        let gpregs = regs(number, [TEXT, 1, 9000, 0]);
        let mut info = pb::ThreadInfoX86 { gpregs, ..Default::default() };
        (info.gpregs.ax, info.gpregs.cs) = (ax.cast_unsigned(), registers::USER_CS);
        info.gpregs.mode = Some(pb::UserX86RegsMode::Native as i32);
        core.thread_info = Some(Box::new(info));
        let thread = pb::ThreadCoreEntry { call_left_ns: Some(left), ..Default::default() };
        core.thread_core = Some(Box::new(thread));
        core
    }

    #[test]
    fn made_again_with_what_is_left() {
        let eintr = -i64::from(libc::EINTR);
        let poll = again(&core(1_500_000, libc::SYS_poll, eintr), Duration::ZERO).unwrap().unwrap();
        assert_eq!((poll.memory(), poll.arguments(5)), (None, [TEXT, 1, 2, 0, 0, 0]), "not too early");
        let over = again(&core(1_500_000, libc::SYS_poll, eintr), Duration::from_secs(1)).unwrap().unwrap();
        assert_eq!(over.arguments(5), [TEXT, 1, 0, 0, 0, 0]);
        let long = again(&core(u64::MAX, libc::SYS_poll, eintr), Duration::ZERO).unwrap().unwrap();
        assert_eq!(long.arguments(5)[2], u64::from(i32::MAX.unsigned_abs()));
        let sleep = again(&core(1_500_000, libc::SYS_nanosleep, eintr), Duration::ZERO).unwrap().unwrap();
        let bytes = [0u64, 1_500_000].map(u64::to_ne_bytes).concat();
        assert_eq!((sleep.memory(), sleep.arguments(5)), (Some(bytes), [5, 1, 9000, 0, 0, 0]));
        assert!(again(&core(5, libc::SYS_poll, 0), Duration::ZERO).is_err());
        assert!(again(&core(5, libc::SYS_write, eintr), Duration::ZERO).is_err());
        assert!(again(&core(5, -1, eintr), Duration::ZERO).is_err());
    }

    proptest! {
        #[test]
        fn images_name_four_calls(left: u64, number in -1i64..460, ax in prop_oneof![Just(-4i64), any::<i64>()], elapsed: u64) {
            if let Ok(Some(call)) = again(&core(left, number, ax), Duration::from_nanos(elapsed)) {
                let four = [libc::SYS_poll, libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_futex];
                prop_assert!(four.contains(&call.number()) && ax == -4);
            }
        }
    }
}
