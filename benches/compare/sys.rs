//! The raw calls of the benchmark.
#![allow(unsafe_code)]

use std::{io, ptr};

/// A child that ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    pub pid: i32,
    pub status: i32,
    /// Largest resident size of it and of those it waited for, in KiB.
    pub peak_kib: u64,
}

/// Waits for any child.
pub fn wait_any() -> io::Result<Ended> {
    let mut status = 0;
    // SAFETY: a structure of numbers only.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live variables of the right types.
    let pid = unsafe { libc::wait4(-1, &raw mut status, 0, &raw mut usage) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Ended { pid, status, peak_kib: usage.ru_maxrss.try_into().unwrap_or(0) })
}

/// One page after the other with permissions that differ from its neighbours', so that each is a mapping; every
/// page begins with its number.
pub fn mappings(count: usize) -> *const u64 {
    let len = count * 4096;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(start != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
    let start = start.cast::<u64>();
    for number in 0..count {
        // SAFETY: inside the mapping, which is writable still.
        let page = unsafe { start.add(number * 512) };
        // SAFETY: as above.
        unsafe { page.write(number as u64) };
        if number % 2 == 1 {
            // SAFETY: a page of the mapping that nobody refers to.
            let result = unsafe { libc::mprotect(page.cast(), 4096, libc::PROT_READ) };
            assert!(result == 0, "mprotect: {}", io::Error::last_os_error());
        }
    }
    start
}

/// Are the pages of [`mappings`] as they were made?
pub fn mappings_are_intact(start: *const u64, count: usize) -> bool {
    (0..count).all(|number| {
        // SAFETY: `start` comes from `mappings` with this count; all pages are readable.
        unsafe { start.add(number * 512).read() == number as u64 }
    })
}
