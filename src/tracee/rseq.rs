//! A restartable sequence that a thread was stopped in.
//!
//! The kernel lets a thread abort its critical section when it goes on after having been preempted there. If other
//! code runs in the thread in between, the kernel forgets the section, and the thread would go on in the
//! middle of it. So the abort is done by hand, on the registers, as soon as the thread has stopped.

use libc::user_regs_struct;

use super::TraceError;
use crate::sys::{self, Errno, pid::HostPid, pod, process_vm, ptrace};

/// Where `struct rseq` has the address of the critical section.
const RSEQ_CS: u64 = 8;

fn read<T: pod::Pod>(tid: HostPid, at: u64) -> Result<Option<T>, TraceError> {
    let mut bytes = vec![0u8; size_of::<T>()];
    match process_vm::read(tid, &[(at, bytes.len())], &mut bytes) {
        Ok(n) if n == bytes.len() => Ok(pod::from_bytes(&bytes)),
        // A dangling registration: the kernel will say so to the thread, as it would have done.
        Ok(_) | Err(Errno::EFAULT) => Ok(None),
        Err(e) => Err(TraceError::request("process_vm_readv", tid, e)),
    }
}

/// What a stopped thread has registered; `None` for nothing, and for a kernel that cannot tell (before Linux 5.13).
pub(crate) fn registration(tid: HostPid) -> sys::Result<Option<ptrace::RseqConfiguration>> {
    match ptrace::get_rseq(tid) {
        Ok(conf) => Ok((conf.abi_pointer != 0).then_some(conf)),
        Err(Errno::EIO | Errno::EINVAL) => Ok(None),
        Err(e) => Err(e),
    }
}

/// If a stopped thread is in a critical section, lets `regs` go on at its abort handler, as the kernel does.
/// Returns whether it was.
pub(crate) fn leave_critical_section(tid: HostPid, regs: &mut user_regs_struct) -> Result<bool, TraceError> {
    let conf = registration(tid).map_err(|e| TraceError::request("PTRACE_GET_RSEQ_CONFIGURATION", tid, e))?;
    let Some(conf) = conf else { return Ok(false) };
    let Some(section) = read::<u64>(tid, conf.abi_pointer.wrapping_add(RSEQ_CS))? else { return Ok(false) };
    if section == 0 {
        return Ok(false);
    }
    // `struct rseq_cs`: version and flags, first address, length, abort handler.
    let Some([version_flags, start, len, abort]) = read::<[u64; 4]>(tid, section)? else { return Ok(false) };
    if version_flags != 0 || regs.rip.wrapping_sub(start) >= len {
        return Ok(false);
    }
    // The signature before the handler proves that it is one.
    if read::<u32>(tid, abort.wrapping_sub(4))? != Some(conf.signature) {
        return Ok(false);
    }
    regs.rip = abort;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::target::Target;

    #[test]
    fn a_critical_section_is_aborted() {
        let target = Target::new();
        let conf = registration(target.pid()).unwrap().expect("the C library registers an area");
        let (at, ip) = (target.scratch(), target.regs.rip);
        let abort = at + 100;
        let section = [0, ip - 3, 10, abort];
        let leave = |regs: &mut user_regs_struct| leave_critical_section(target.pid(), regs).unwrap();
        target.write(at, pod::bytes_of(&section));
        target.write(abort - 4, &conf.signature.to_ne_bytes());
        let mut regs = target.regs;
        assert!(!leave(&mut regs), "no section is entered");
        target.write(conf.abi_pointer + RSEQ_CS, &at.to_ne_bytes());
        assert!(leave(&mut regs));
        assert_eq!(regs.rip, abort);
        assert!(!leave(&mut regs), "the handler is outside");
        for outside in [ip - 4, ip + 7] {
            regs.rip = outside;
            assert!(!leave(&mut regs));
        }
        regs.rip = ip;
        target.write(abort - 4, &[0; 4]);
        assert!(!leave(&mut regs), "a handler without signature is none");
        target.write(conf.abi_pointer + RSEQ_CS, &8u64.to_ne_bytes());
        assert!(!leave(&mut regs), "nothing is there");
        target.write(conf.abi_pointer + RSEQ_CS, &[0; 8]);
    }
}
