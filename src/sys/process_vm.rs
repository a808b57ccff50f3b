//! process_vm_readv(2) and process_vm_writev(2): the fastest copies out of and into another process.

use libc::iovec;

use super::{Result, pid::HostPid, ret};

/// Reads `remote` ranges (address, length) one after another into `buf`; returns bytes read,
/// which is short when a page in the middle cannot be read. EFAULT when the first cannot.
/// At most 1024 ranges in a call.
pub fn read(pid: HostPid, remote: &[(u64, usize)], buf: &mut [u8]) -> Result<usize> {
    let remote: Vec<iovec> =
        remote.iter().map(|&(addr, len)| iovec { iov_base: addr as *mut _, iov_len: len }).collect();
    let local = iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: `local` is `buf`; remote addresses are only used in the other process, by the kernel.
    let n = ret(unsafe {
        libc::process_vm_readv(pid.get(), &raw const local, 1, remote.as_ptr(), remote.len() as _, 0)
    } as libc::c_long)?;
    Ok(usize::try_from(n).unwrap_or(0))
}

/// Writes `bytes` at `at`; returns bytes written, which is short when a page in the middle cannot be written. EFAULT when
/// the first cannot.
pub fn write(pid: HostPid, at: u64, bytes: &[u8]) -> Result<usize> {
    let local = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = iovec { iov_base: at as *mut _, iov_len: bytes.len() };
    // SAFETY: `local` is `bytes`, which is only read; the remote address is only used in the other process, by the kernel.
    let n = ret(unsafe { libc::process_vm_writev(pid.get(), &raw const local, 1, &raw const remote, 1, 0) }
        as libc::c_long)?;
    Ok(usize::try_from(n).unwrap_or(0))
}
