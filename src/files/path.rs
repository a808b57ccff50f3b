//! Paths as the kernel and the images have them: bytes.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use crate::sys::Errno;

/// What /proc appends to the name of a file that is no longer there.
pub(super) const DELETED: &[u8] = b" (deleted)";

/// Bytes as a path.
pub(super) fn to_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A path as bytes.
pub(super) fn bytes_of(text: OsString) -> Vec<u8> {
    text.into_vec()
}

/// The task that a path under /proc speaks of: `/proc/17/status` -> 17.
pub(super) fn proc_pid(path: &[u8]) -> Option<i32> {
    let rest = path.strip_prefix(b"/proc/")?;
    let digits = rest.split(|&b| b == b'/').next()?;
    let text = std::str::from_utf8(digits).ok()?;
    text.parse().ok().filter(|pid| *pid > 0)
}

/// The regular file behind `file` opened again for reading, with a position of its own.
pub(super) fn readable(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    open(path.as_str(), flags | OFlag::O_NOATIME, Mode::empty())
        .or_else(|_| open(path.as_str(), flags, Mode::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces() {
        assert_eq!(proc_pid(b"/proc/17/status"), Some(17));
        assert_eq!(proc_pid(b"/proc/17"), Some(17));
        assert_eq!(proc_pid(b"/proc/meminfo"), None);
        assert_eq!(proc_pid(b"/procs/17"), None);
    }
}
