//! System V semaphores.

use super::{Result, ret_int};

/// The values of all `count` semaphores of a set (GETALL).
pub fn values(id: i32, count: usize) -> Result<Vec<u16>> {
    // A set keeps its number of semaphores; another one that has got its id meanwhile may be larger, which the kernel
    // does not ask for: room for the largest there can be (SEMMSL).
    let mut values = vec![0u16; count.max(1 << 16)];
    // SAFETY: the buffer has room for more semaphores than a set can have.
    ret_int(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    values.truncate(count);
    Ok(values)
}
