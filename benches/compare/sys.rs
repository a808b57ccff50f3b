//! The raw calls of the benchmark.
#![allow(unsafe_code)]

use std::{io, ptr, time::Duration};

/// A child that ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    pub pid: i32,
    pub status: i32,
    /// Largest resident size of it and of those it waited for, in KiB.
    pub peak_kib: u64,
    /// Processor time of it and of those it waited for.
    pub cpu: Duration,
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
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    let cpu = Duration::from_secs_f64(seconds(usage.ru_utime) + seconds(usage.ru_stime));
    Ok(Ended { pid, status, peak_kib: usage.ru_maxrss.try_into().unwrap_or(0), cpu })
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

/// The first `len` bytes of a file of at least that size, shared and writable, until the process ends.
pub fn map_shared(file: &std::fs::File, len: usize) -> io::Result<&'static mut [u8]> {
    use std::os::fd::AsRawFd as _;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let start =
        unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is never taken down, and the caller alone knows the file.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), len) })
}

/// Moves up to `len` bytes from `from` to `to` (at `to_offset`, which advances, if it is a file); one of them is a pipe.
pub fn splice(from: i32, to: i32, to_offset: Option<&mut i64>, len: usize) -> io::Result<usize> {
    let offset = to_offset.map_or(ptr::null_mut(), ptr::from_mut);
    // SAFETY: the only pointer is null or to a live variable.
    let moved = unsafe { libc::splice(from, ptr::null_mut(), to, offset, len, libc::SPLICE_F_MOVE) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Lets what this process executes next be in a time namespace whose monotonic clock is ahead by so many seconds.
pub fn enter_time_namespace(ahead: u64) -> std::io::Result<()> {
    const CLONE_NEWTIME: libc::c_int = 0x80;
    // SAFETY: one plain number.
    if unsafe { libc::unshare(CLONE_NEWTIME) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    std::fs::write("/proc/self/timens_offsets", format!("monotonic {ahead} 0\n"))
}
