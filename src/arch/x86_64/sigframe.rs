//! The frame from which rt_sigreturn takes a thread's state.
//!
//! It carries general registers, the xsave area and the signal mask. It does not carry fs and gs
//! bases, which rt_sigreturn leaves alone, nor the alternate signal stack: the frame holds a mode
//! that does not exist, which the kernel refuses and ignores, so that the stack stays as it is.
//!
//! Only what rt_sigreturn reads is built: `struct ucontext` and the xsave area behind it. The slot
//! of the return address before it and the siginfo that would follow are not there.

use libc::user_regs_struct;

use super::xsave::{self, FXSAVE_LEN, HEADER_END};
use crate::{sys::pod, tracee::RemoteAddr};

/// A frame and how to enter it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What must lie at the address the frame was built for.
    pub bytes: Vec<u8>,
    /// Stack pointer at the `syscall` of rt_sigreturn.
    pub rsp: RemoteAddr,
}

/// Words of `struct ucontext`: flags, link, three of the stack, 32 of `struct sigcontext_64`, the mask.
const UCONTEXT_WORDS: usize = 38;
/// UC_FP_XSTATE: the floating point state is an xsave area; UC_SIGCONTEXT_SS and
/// UC_STRICT_RESTORE_SS: `ss` is there and meant.
const UC_FLAGS: u64 = 1 | 2 | 4;
/// SS_ONSTACK and SS_DISABLE together: no mode, so the kernel changes nothing (and reports nothing).
const SS_NONE: u64 = 3;
/// Where the xsave area begins: behind `struct ucontext`, 64-byte aligned.
const FPSTATE_AT: usize = (UCONTEXT_WORDS * 8).next_multiple_of(64);
/// Where `struct _fpx_sw_bytes` lies in the xsave area.
const SW_BYTES: usize = 464;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;

/// Builds the frame for a thread with these registers, xsave area (as PTRACE_GETREGSET gives it) and
/// signal mask. `at` is where the bytes will lie, a multiple of 64.
///
/// Registers are taken as they are: call [`restart`](super::restart) before, where a system call was interrupted.
pub fn build(regs: &user_regs_struct, xstate: &[u8], sigmask: u64, at: RemoteAddr) -> Frame {
    debug_assert!(at.0.is_multiple_of(64), "the processor reads the xsave area only from a multiple of 64");
    let words: [u64; UCONTEXT_WORDS] = [
        UC_FLAGS,
        0,
        0,
        SS_NONE,
        0,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        regs.rax,
        regs.rcx,
        regs.rsp,
        regs.rip,
        regs.eflags,
        selectors([regs.cs, regs.gs, regs.fs, regs.ss]),
        0,
        0,
        0,
        0,
        at.0 + FPSTATE_AT as u64,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        sigmask,
    ];
    let mut bytes = pod::bytes_of(&words).to_vec();
    bytes.resize(FPSTATE_AT, 0);
    bytes.extend_from_slice(&fpstate(xstate));
    Frame { bytes, rsp: at }
}

/// Four 16-bit selectors in one word, the first lowest.
fn selectors(all: [u64; 4]) -> u64 {
    all.iter().rev().fold(0, |word, selector| word << 16 | selector & 0xffff)
}

/// The xsave area with the kernel's marks in it and behind it.
fn fpstate(xstate: &[u8]) -> Vec<u8> {
    let mut area = xstate.to_vec();
    area.resize(area.len().max(HEADER_END), 0);
    // The kernel takes no more than this thread may use: parts that need a permission it may not
    // have (AMX tiles) are left out when they hold nothing.
    let len = xsave::used_len(&area).min(area.len());
    let features = xsave::features(&area);
    let size = u32::try_from(len).unwrap_or(u32::MAX);
    let mut sw = [0u32; 12];
    sw[..5].copy_from_slice(&[FP_XSTATE_MAGIC1, size + 4, low32(features), low32(features >> 32), size]);
    put(&mut area, SW_BYTES, pod::bytes_of(&sw));
    // Behind the first word of the header the processor wants zeros.
    put(&mut area, FXSAVE_LEN + 8, &[0; 56]);
    let full = area.len();
    // The magic word sits right behind; the kernel may touch as much as the full area is long.
    area.resize(full + 64, 0);
    put(&mut area, len, &FP_XSTATE_MAGIC2.to_ne_bytes());
    area
}

fn low32(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = area.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{arch::target::Target, sys::ptrace};

    /// An area in which every byte of every register part differs from its neighbours.
    fn patterned(mut area: Vec<u8>) -> Vec<u8> {
        let fill = |area: &mut [u8], salt: usize| {
            for (at, byte) in area.iter_mut().enumerate() {
                *byte = u8::try_from((at * 7 + salt) % 251).unwrap();
            }
        };
        // Eight x87 registers of ten bytes, and the SSE ones.
        for at in (32..160).step_by(16) {
            fill(&mut area[at..at + 10], at);
        }
        fill(&mut area[160..416], 1);
        for part in xsave::parts().iter().filter(|p| [2, 5, 6, 7].contains(&p.feature)) {
            fill(&mut area[part.at..part.at + part.len], part.feature as usize);
        }
        let used = xsave::in_use(&area) | (xsave::features(&area) & 0xe7);
        put(&mut area, FXSAVE_LEN, &used.to_ne_bytes());
        area
    }

    #[test]
    fn rt_sigreturn_takes_everything_and_leaves_the_rest() {
        let target = Target::new();
        let pid = target.pid();
        // An alternate stack of its own, which must survive.
        let stack = target.scratch() - 65536;
        let words = [stack, 0, 32768u64];
        target.write(target.scratch(), pod::bytes_of(&words));
        assert_eq!(target.call(libc::SYS_sigaltstack, &[target.scratch(), 0]), 0);

        let mut want = target.regs;
        restart_values(&mut want);
        let xstate = patterned(target.xstate());
        let mask = 0x8000_0001_1234_5600u64;
        let at = RemoteAddr(target.scratch());
        let frame = build(&want, &xstate, mask, at);
        target.write(at.0, &frame.bytes);
        let mut regs = target.regs;
        regs.rsp = frame.rsp.0;
        regs.rax = libc::SYS_rt_sigreturn.cast_unsigned();
        let got = target.enter(regs);
        want.orig_rax = u64::MAX;
        assert_eq!(format!("{got:x?}"), format!("{want:x?}"));
        assert_eq!(got.fs_base, target.regs.fs_base);

        let after = target.xstate();
        assert_eq!(after.len(), xstate.len());
        assert_eq!(xsave::in_use(&after) & 0xe7, xsave::in_use(&xstate) & 0xe7);
        assert_eq!(after[..SW_BYTES], xstate[..SW_BYTES]);
        assert_eq!(after[HEADER_END..], xstate[HEADER_END..]);
        // SIGKILL and SIGSTOP cannot be blocked.
        assert_eq!(ptrace::get_sigmask(pid).unwrap(), mask & !(1 << 8 | 1 << 18));

        assert_eq!(target.call(libc::SYS_sigaltstack, &[0, target.scratch()]), 0);
        let mut bytes = [0u8; 24];
        target.read(target.scratch(), &mut bytes);
        assert_eq!(pod::from_bytes::<[u64; 3]>(&bytes), Some(words));
    }

    /// Distinct values in all general registers.
    fn restart_values(regs: &mut user_regs_struct) {
        let all = [
            &mut regs.r8,
            &mut regs.r9,
            &mut regs.r10,
            &mut regs.r11,
            &mut regs.r12,
            &mut regs.r13,
            &mut regs.r14,
            &mut regs.r15,
            &mut regs.rdi,
            &mut regs.rsi,
            &mut regs.rbp,
            &mut regs.rbx,
            &mut regs.rdx,
            &mut regs.rax,
            &mut regs.rcx,
        ];
        for (value, register) in (0x1111_2222_3333_0001u64..).zip(all) {
            *register = value;
        }
        // CF, PF, AF, ZF, SF, DF, OF.
        regs.eflags |= 0xcd5;
        regs.rsp -= 0x128;
    }

    #[test]
    fn without_marks_the_state_would_be_lost() {
        // The test above cannot pass by accident: a frame whose second mark is wrong loses the upper halves.
        let target = Target::new();
        let xstate = patterned(target.xstate());
        let at = RemoteAddr(target.scratch());
        let mut frame = build(&target.regs, &xstate, 0, at);
        let mark = FPSTATE_AT + xsave::used_len(&xstate);
        frame.bytes[mark] ^= 1;
        target.write(at.0, &frame.bytes);
        let mut regs = target.regs;
        regs.rsp = frame.rsp.0;
        regs.rax = libc::SYS_rt_sigreturn.cast_unsigned();
        target.enter(regs);
        assert_ne!(target.xstate()[HEADER_END..], xstate[HEADER_END..]);
    }
}
