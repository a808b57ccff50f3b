//! Leases of files: fcntl(F_SETLEASE).

use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Errno, Result, ret_int};

/// Whether the file behind `reader`, a description of ours that only reads, is open for writing anywhere: then the kernel runs
/// no program from it. Descriptors that memfd_create gave are not counted.
///
/// A lease is taken for a moment, which the kernel refuses for such a file. Whoever opens it for writing in that moment waits
/// until the lease is given back; the signal by which we would be told is one that is ignored by default.
pub fn is_open_for_writing(reader: BorrowedFd<'_>) -> Result<bool> {
    const F_SETSIG: libc::c_int = 10;
    let fd = reader.as_raw_fd();
    // SAFETY: no pointers.
    ret_int(unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) })?;
    // SAFETY: no pointers.
    match ret_int(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) }) {
        Ok(_) => {
            // SAFETY: no pointers.
            ret_int(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) })?;
            Ok(false)
        }
        Err(Errno::EAGAIN) => Ok(true),
        Err(errno) => Err(errno),
    }
}
