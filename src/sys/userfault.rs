//! userfaultfd(2), as far as pages are put into memory with it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::mapping::AnonPrivate;
use super::{Result, ret, ret_int};

/// Flag of userfaultfd(2): needs no privilege (Linux 5.11).
pub const USER_MODE_ONLY: i32 = 1;
/// `struct uffdio_api`: version, features, what the kernel can do.
pub const API: u64 = 0xc018_aa3f;
/// Content of that for version 0xaa.
pub const API_WORDS: [u64; 3] = [0xaa, 0, 0];
/// `struct uffdio_register`: start, length, mode, what can be done.
pub const REGISTER: u64 = 0xc020_aa00;
/// Mode of that: pages that are missing.
pub const MISSING: u64 = 1;
/// `struct uffdio_copy`: to, from, length, mode, how much was done.
pub const COPY: u64 = 0xc028_aa03;
/// Mode of that: nobody waits for the pages.
pub const DONT_WAKE: u64 = 1;

/// Whether this process, and those it forks, can put a page into private memory of their own.
pub fn works() -> bool {
    try_it().is_ok_and(|same| same)
}

fn try_it() -> Result<bool> {
    const PAGE: usize = 4096;
    // SAFETY: no pointers.
    let number = ret(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) })?;
    // SAFETY: a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(number as i32) };
    let memory = AnonPrivate::new(PAGE)?;
    let page = [7u8; PAGE];
    let at = memory.addr() as u64;
    let mut api = API_WORDS;
    let mut register = [at, PAGE as u64, MISSING, 0];
    let mut copy = [at, page.as_ptr() as u64, PAGE as u64, DONT_WAKE, 0];
    for (request, words) in [(API, &mut api[..]), (REGISTER, &mut register), (COPY, &mut copy)] {
        // SAFETY: each request reads and writes its words, as many as its number says; the copy goes into `memory`.
        ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), request, words.as_mut_ptr()) })?;
    }
    let mut back = [0; PAGE];
    memory.read(0, &mut back)?;
    Ok(back == page)
}
