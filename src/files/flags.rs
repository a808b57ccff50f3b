//! Status flags of a description: what open(2) set and fcntl(F_SETFL) can set again.

use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::FileError;

/// What F_SETFL changes; all other flags are decided when the file is opened.
const SETTABLE: u32 =
    (libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME).cast_unsigned();

/// Makes the status flags of `fd` those of `flags`. O_ASYNC is left to the owner's restore, when there is one to signal.
pub(super) fn apply(fd: &OwnedFd, flags: u32) -> Result<(), FileError> {
    let want = (flags & SETTABLE & !libc::O_ASYNC.cast_unsigned()).cast_signed();
    let now = fcntl(fd, FcntlArg::F_GETFL).map_err(FileError::sys("read the flags of a file"))?;
    if now & SETTABLE.cast_signed() != want {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::from_bits_retain(want)))
            .map_err(FileError::sys("set the flags of a file"))?;
    }
    Ok(())
}

/// Sets O_ASYNC if `flags` has it: the owner is in place, so signals go to the right task.
pub(super) fn apply_async(fd: &OwnedFd, flags: u32) -> Result<(), FileError> {
    if flags & libc::O_ASYNC.cast_unsigned() == 0 {
        return Ok(());
    }
    let now = fcntl(fd, FcntlArg::F_GETFL).map_err(FileError::sys("read the flags of a file"))?;
    let with = OFlag::from_bits_retain(now | libc::O_ASYNC);
    fcntl(fd, FcntlArg::F_SETFL(with)).map(drop).map_err(FileError::sys("set O_ASYNC of a file"))
}
