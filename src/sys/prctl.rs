//! prctl(2), the requests that only ask and pass no address.

use super::{Errno, Result, ret};

/// PR_GET_SPECULATION_CTRL.
pub const GET_SPECULATION_CTRL: i32 = 52;
/// PR_TIMER_CREATE_RESTORE_IDS; with argument 2 it asks (Linux 6.15).
pub const TIMER_CREATE_RESTORE_IDS: i32 = 77;

/// What this thread has, for the requests named above. EINVAL for others and where the kernel lacks it.
pub fn get(option: i32, arg: u64) -> Result<u64> {
    let asks = match option {
        GET_SPECULATION_CTRL => true,
        TIMER_CREATE_RESTORE_IDS => arg == 2,
        _ => false,
    };
    if !asks {
        return Err(Errno::EINVAL);
    }
    // SAFETY: neither request takes an address.
    let value = ret(unsafe { libc::syscall(libc::SYS_prctl, option, arg, 0u64, 0u64, 0u64) })?;
    u64::try_from(value).map_err(|_| Errno::ERANGE)
}

/// Whether this kernel lets memory have names: asked for no memory at all.
pub fn can_name_memory() -> bool {
    const PR_SET_VMA: i32 = 0x5356_4d41;
    // SAFETY: a range of no bytes, and no name.
    unsafe { libc::syscall(libc::SYS_prctl, PR_SET_VMA, 0u64, 0u64, 0u64, 0u64) == 0 }
}
