//! The PAGEMAP_SCAN ioctl of /proc/PID/pagemap (Linux 6.7).

use std::{
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::{Result, pod, ret_int};

/// Page categories, `PAGE_IS_*`.
pub mod category {
    /// Written since it was write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// Backed by a file (or shared memory).
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In swap.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared zero page.
    pub const PFNZERO: u64 = 1 << 5;
    /// A guard region (Linux 6.15).
    pub const GUARD: u64 = 1 << 8;
}

/// A run of pages of the same categories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// Address after the last byte.
    pub end: u64,
    /// `category` bits, those of the return mask only.
    pub categories: u64,
}
// SAFETY: integers only, no padding.
unsafe impl pod::Pod for PageRegion {}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const _: () = assert!(size_of::<PmScanArg>() == 96);

/// Which pages a scan reports, and what it says of each.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    /// Categories inverted before matching.
    pub inverted: u64,
    /// All of these are needed.
    pub all: u64,
    /// One of these is needed (0: no demand).
    pub any: u64,
    /// Which categories come back.
    pub report: u64,
}

/// Scans `[start, end)`; fills `out` from its beginning and returns how many runs were written
/// and the address where the walk ended (`end` when all was seen).
pub fn scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: Query,
    out: &mut [PageRegion],
) -> Result<(usize, u64)> {
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: out.as_mut_ptr() as u64,
        vec_len: out.len() as u64,
        max_pages: 0,
        category_inverted: query.inverted,
        category_mask: query.all,
        category_anyof_mask: query.any,
        return_mask: query.report,
    };
    // SAFETY: `arg` and the vector it names live across the call, with their true lengths.
    let n = ret_int(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) })?;
    Ok((usize::try_from(n).unwrap_or(0).min(out.len()), arg.walk_end))
}
