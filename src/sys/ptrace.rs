//! ptrace(2), one function per request. All work on a *thread* id.

use std::mem::size_of;

use libc::{c_long, c_void, user_regs_struct};

use super::{Errno, Result, pid::HostPid, pod, ret, ticker};

/// Tells system call stops from SIGTRAP stops.
pub const O_TRACESYSGOOD: u64 = 1;
/// Kills the tracee when its tracer goes: restore only.
pub const O_EXITKILL: u64 = 1 << 20;
/// Suspends the tracee's seccomp filters while traced (needs CAP_SYS_ADMIN).
pub const O_SUSPEND_SECCOMP: u64 = 1 << 21;
/// Register note of the bitmap of ioperm(2).
pub const NT_386_IOPERM: i32 = 0x201;
/// Register note of the whole xsave area.
pub const NT_X86_XSTATE: i32 = 0x202;
/// Stop event of a seized task.
pub const EVENT_STOP: i32 = 128;

const PTRACE_SETOPTIONS: u32 = 0x4200;
const PTRACE_SEIZE: u32 = 0x4206;
const PTRACE_INTERRUPT: u32 = 0x4207;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;

fn request(req: u32, tid: HostPid, addr: u64, data: u64) -> Result<c_long> {
    // SAFETY: callers pass in `addr` and `data` what the request asks for; pointers among them
    // point to live buffers of the stated size (see each front).
    ret(unsafe { libc::ptrace(req, tid.get(), addr as *mut c_void, data as *mut c_void) })
}

/// PTRACE_SEIZE: traces without stopping. EPERM when somebody else traces, or for a dead leader. EINTR while its
/// process executes a program, if a signal comes whose handler is that of a [`Ticker`](super::ticker::Ticker).
pub fn seize(tid: HostPid, options: u64) -> Result<()> {
    let tid = i64::from(tid.get()).cast_unsigned();
    // SAFETY: no pointers; interrupted before it has the lock it has done nothing.
    unsafe { ticker::interruptible(libc::SYS_ptrace, [u64::from(PTRACE_SEIZE), tid, 0, options]) }.map(drop)
}
/// PTRACE_INTERRUPT: asks for a stop; wait for it.
pub fn interrupt(tid: HostPid) -> Result<()> {
    request(PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}
/// PTRACE_CONT with a signal to deliver (0 for none).
pub fn cont(tid: HostPid, signal: i32) -> Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as u64).map(drop)
}
/// PTRACE_SYSCALL: continue to the next system call entry or exit.
pub fn syscall(tid: HostPid, signal: i32) -> Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal as u64).map(drop)
}
/// PTRACE_DETACH.
pub fn detach(tid: HostPid, signal: i32) -> Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as u64).map(drop)
}
/// PTRACE_SETOPTIONS.
pub fn set_options(tid: HostPid, options: u64) -> Result<()> {
    request(PTRACE_SETOPTIONS, tid, 0, options).map(drop)
}

/// PTRACE_GETREGS.
pub fn get_regs(tid: HostPid) -> Result<user_regs_struct> {
    let mut regs: user_regs_struct = pod::zeroed();
    request(libc::PTRACE_GETREGS, tid, 0, std::ptr::from_mut(&mut regs) as u64)?;
    Ok(regs)
}
/// PTRACE_SETREGS. The kernel sanitises segments and flags.
pub fn set_regs(tid: HostPid, regs: &user_regs_struct) -> Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(regs) as u64).map(drop)
}
/// PTRACE_GETREGSET into `buf`; returns the number of bytes the kernel wrote.
pub fn get_regset(tid: HostPid, note: i32, buf: &mut [u8]) -> Result<usize> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(libc::PTRACE_GETREGSET, tid, note as u64, std::ptr::from_mut(&mut iov) as u64)?;
    Ok(iov.iov_len.min(buf.len()))
}
/// PTRACE_SETREGSET.
pub fn set_regset(tid: HostPid, note: i32, buf: &[u8]) -> Result<()> {
    let mut iov = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
    request(libc::PTRACE_SETREGSET, tid, note as u64, std::ptr::from_mut(&mut iov) as u64).map(drop)
}
/// PTRACE_GETSIGMASK: the mask that counts for user code (a temporary one of sigsuspend is not it).
pub fn get_sigmask(tid: HostPid) -> Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, 8, std::ptr::from_mut(&mut mask) as u64)?;
    Ok(mask)
}
/// PTRACE_SETSIGMASK.
pub fn set_sigmask(tid: HostPid, mask: u64) -> Result<()> {
    request(PTRACE_SETSIGMASK, tid, 8, std::ptr::from_ref(&mask) as u64).map(drop)
}
/// PTRACE_GETSIGINFO of the current signal stop.
pub fn get_siginfo(tid: HostPid) -> Result<[u8; 128]> {
    let mut info = [0u8; 128];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as u64)?;
    Ok(info)
}

#[repr(C)]
struct PeekSigInfoArgs {
    off: u64,
    flags: u32,
    nr: i32,
}

/// PTRACE_PEEKSIGINFO: up to 32 queued signals from index `off` of the private or shared queue.
pub fn peek_siginfo(tid: HostPid, shared: bool, off: u64) -> Result<Vec<[u8; 128]>> {
    let mut infos = [[0u8; 128]; 32];
    let args = PeekSigInfoArgs { off, flags: u32::from(shared), nr: 32 };
    let n = request(PTRACE_PEEKSIGINFO, tid, std::ptr::from_ref(&args) as u64, infos.as_mut_ptr() as u64)?;
    Ok(infos[..usize::try_from(n).unwrap_or(0).min(32)].to_vec())
}

/// Registration of restartable sequences, `struct ptrace_rseq_configuration` (Linux 5.13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfiguration {
    /// Address of `struct rseq` in the target, 0 when not registered.
    pub abi_pointer: u64,
    /// Its registered size.
    pub abi_size: u32,
    /// Signature before abort handlers.
    pub signature: u32,
    /// Always 0.
    pub flags: u32,
    /// Always 0.
    pub pad: u32,
}
// SAFETY: integers only, no padding.
unsafe impl pod::Pod for RseqConfiguration {}

/// PTRACE_GET_RSEQ_CONFIGURATION (Linux 5.13).
pub fn get_rseq(tid: HostPid) -> Result<RseqConfiguration> {
    let mut conf: RseqConfiguration = pod::zeroed();
    request(
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RseqConfiguration>() as u64,
        std::ptr::from_mut(&mut conf) as u64,
    )?;
    Ok(conf)
}

/// PTRACE_SECCOMP_GET_FILTER: the `index`-th filter, the oldest is 0. ENOENT past the newest.
pub fn seccomp_filter(tid: HostPid, index: u64) -> Result<Vec<libc::sock_filter>> {
    let count = request(PTRACE_SECCOMP_GET_FILTER, tid, index, 0)?;
    let count = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
    let mut insns: Vec<libc::sock_filter> = vec![pod::zeroed(); count];
    request(PTRACE_SECCOMP_GET_FILTER, tid, index, insns.as_mut_ptr() as u64)?;
    Ok(insns)
}

/// PTRACE_SECCOMP_GET_METADATA: flags of the `index`-th filter.
pub fn seccomp_filter_flags(tid: HostPid, index: u64) -> Result<u64> {
    let mut meta = [index, 0u64];
    request(PTRACE_SECCOMP_GET_METADATA, tid, 16, meta.as_mut_ptr() as u64)?;
    Ok(meta[1])
}

/// PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG (Linux 6.4): mode, 0 when off.
pub fn syscall_user_dispatch_mode(tid: HostPid) -> Result<u64> {
    let mut conf = [0u64; 4];
    request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32, conf.as_mut_ptr() as u64)?;
    Ok(conf[0])
}
