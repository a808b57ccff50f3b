//! Memory protection keys.

use super::{Errno, Result, ret};

/// The last page below 2^56: no address of user space with four or five levels of page tables.
pub const NEVER_MAPPED: u64 = 0x00ff_ffff_ffff_f000;

/// Whether `key` is allocated in this process. A processor without keys has none, not even key 0.
///
/// pkey_mprotect looks at the key before it looks for the memory, and the memory is never there: nothing is changed.
pub fn is_allocated(key: u32) -> Result<bool> {
    let args = (libc::SYS_pkey_mprotect, NEVER_MAPPED, 4096u64, libc::PROT_READ, key);
    // SAFETY: no memory is there, so the call cannot change any.
    match ret(unsafe { libc::syscall(args.0, args.1, args.2, args.3, args.4) }) {
        Ok(_) | Err(Errno::ENOMEM) => Ok(true),
        Err(Errno::EINVAL | Errno::ENOSYS) => Ok(false),
        Err(e) => Err(e),
    }
}
