//! name_to_handle_at(2), open_by_handle_at(2): files by what the file system calls them.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{Errno, Result, ret_int};

/// Longest handle (MAX_HANDLE_SZ).
pub const MAX: usize = 128;

#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX],
}

/// Opens the file with this handle in the file system that `mount` lies in. ESTALE when it is gone.
pub fn open(mount: BorrowedFd<'_>, kind: i32, data: &[u8], flags: i32) -> Result<OwnedFd> {
    let mut handle = Handle { bytes: 0, kind, data: [0; MAX] };
    handle.data.get_mut(..data.len()).ok_or(Errno::EOVERFLOW)?.copy_from_slice(data);
    handle.bytes = u32::try_from(data.len()).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel reads the header and `bytes` bytes behind it, which `handle` has.
    let fd = ret_int(unsafe { libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut handle).cast(), flags) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
