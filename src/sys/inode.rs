//! What a file system tells of an inode beyond stat: attribute flags (lsattr), and where its data lies (FIEMAP).

use std::{
    ffi::CStr,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::{Result, ret_int};

const FS_IOC_GETFLAGS: libc::c_ulong = 0x8008_6601;
const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;

/// FS_*_FL: may be appended to only; nothing may be changed.
pub const APPEND: u32 = 0x20;
/// See [`APPEND`].
pub const IMMUTABLE: u32 = 0x10;
/// Its content is signed (fs-verity).
pub const VERITY: u32 = 0x0010_0000;

/// Its attribute flags. ENOTTY where the file system has none.
pub fn flags(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the kernel writes one int, whatever the number of the call says of a long.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_GETFLAGS, &raw mut flags) })?;
    Ok(flags.cast_unsigned())
}

/// Sets its attribute flags.
pub fn set_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<()> {
    let flags = flags.cast_signed();
    // SAFETY: the kernel reads one int.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_SETFLAGS, &raw const flags) })?;
    Ok(())
}

/// Whether what a path leads to may be appended to only, or not be changed at all (statx), without opening it.
pub fn is_append_only(path: &CStr) -> Result<bool> {
    let mut told = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is terminated, and the kernel fills the structure.
    ret_int(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), 0, 0, told.as_mut_ptr()) })?;
    // SAFETY: plain integers, zeroed and then filled.
    let told = unsafe { told.assume_init() };
    Ok(told.stx_attributes & libc::STATX_ATTR_APPEND as u64 != 0)
}

/// A stretch of a file that is allocated.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Extent {
    /// Where it begins in the file.
    pub logical: u64,
    physical: u64,
    /// Its length in bytes.
    pub length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}
const _: () = assert!(size_of::<Extent>() == 56);

impl Extent {
    /// The last one of the file.
    pub fn is_last(&self) -> bool {
        self.flags & 0x1 != 0
    }

    /// Allocated, but never written: it reads as zeros.
    pub fn is_unwritten(&self) -> bool {
        self.flags & 0x800 != 0
    }
}

const EXTENTS: usize = 128;

#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// Some extents from `start` on, in order; none when there are none left. EOPNOTSUPP where the file system does not tell.
pub fn extents(fd: BorrowedFd<'_>, start: u64) -> Result<Vec<Extent>> {
    // FIEMAP_FLAG_SYNC: what waits to be written has no place yet.
    let none = Extent { logical: 0, physical: 0, length: 0, reserved64: [0; 2], flags: 0, reserved: [0; 3] };
    let mut map = Fiemap {
        start,
        length: u64::MAX - start,
        flags: 0x1,
        mapped_extents: 0,
        extent_count: EXTENTS as u32,
        reserved: 0,
        extents: [none; EXTENTS],
    };
    // SAFETY: the kernel fills the header and as many extents as it says there is room for.
    ret_int(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) })?;
    let got = (map.mapped_extents as usize).min(EXTENTS);
    Ok(map.extents[..got].to_vec())
}
