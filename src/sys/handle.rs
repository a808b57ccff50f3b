//! name_to_handle_at(2), open_by_handle_at(2): files by what the file system calls them.

use std::{
    ffi::CStr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use super::{Errno, Result, ret_int};

/// Longest handle (MAX_HANDLE_SZ).
pub const MAX: usize = 128;

#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX],
}

/// The type and bytes of a file's handle: of `name` in `dir`, or with an empty name of `dir` itself; of a symbolic link itself.
/// It may be one that only tells files apart and cannot be opened (AT_HANDLE_FID, Linux 6.5), where a file system has no other.
pub fn of(dir: BorrowedFd<'_>, name: &CStr) -> Result<(i32, Vec<u8>)> {
    const AT_HANDLE_FID: i32 = 0x200;
    let mut handle = Handle { bytes: MAX as u32, kind: 0, data: [0; MAX] };
    let mut mount = 0i32;
    let flags = libc::AT_EMPTY_PATH | AT_HANDLE_FID;
    let at = (&raw mut handle).cast();
    // SAFETY: the name is terminated; the kernel fills the header and at most `bytes` bytes behind it, and one int.
    ret_int(unsafe { libc::name_to_handle_at(dir.as_raw_fd(), name.as_ptr(), at, &raw mut mount, flags) })?;
    let len = (handle.bytes as usize).min(MAX);
    Ok((handle.kind, handle.data[..len].to_vec()))
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
