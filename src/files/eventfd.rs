//! eventfd(2): a counter.
//!
//! Saved: the counter, status flags, and whether it is a semaphore. CRIU does not save the latter; here it is bit 0 of
//! `flags` (`EFD_SEMAPHORE`), where O_RDWR leaves room and CRIU looks at nothing.

use super::{DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, flags, kind::packed_in};
use crate::{image::pb, sys};

const SEMAPHORE: u32 = libc::EFD_SEMAPHORE.cast_unsigned();

/// A counter.
#[derive(Debug)]
pub(super) struct Eventfd;

impl FileKind for Eventfd {
    type Entry = pb::EventfdFileEntry;
    const NAME: &'static str = "eventfd";
    const TYPE: pb::FdTypes = pb::FdTypes::Eventfd;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.is_anon_inode("[eventfd]")
    }

    fn dump(_cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let info =
            fd.info.eventfd.ok_or(FileError::unsupported("the kernel does not tell its counter", ""))?;
        let semaphore = if info.semaphore == Some(true) { SEMAPHORE } else { 0 };
        Ok(pb::EventfdFileEntry { id, flags: fd.flags() | semaphore, fown: fd.fown()?, counter: info.count })
    }

    fn open(_cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        let semaphore = entry.flags & 0b11 == 0b11;
        let fd =
            sys::eventfd::create(entry.counter, semaphore).map_err(FileError::sys("create an eventfd"))?;
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn would_open(_: &mut RestoreCx<'_>, _: &Self::Entry) -> Result<(), FileError> {
        // Any value can be had.
        Ok(())
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(efd);
}

#[cfg(test)]
mod tests {
    use super::super::testing::round_trip;
    use super::*;

    #[test]
    fn counter_and_flags() {
        for (count, semaphore, nonblock) in [(0, false, false), (u64::MAX - 1, true, true), (7, false, true)]
        {
            let fd = sys::eventfd::create(count, semaphore).unwrap();
            if nonblock {
                flags::apply(&fd, libc::O_NONBLOCK.cast_unsigned()).unwrap();
            }
            let (_, entry) = round_trip::<Eventfd>(&fd);
            assert_eq!(entry.counter, count);
            assert_eq!(entry.flags & SEMAPHORE != 0, semaphore);
            assert_eq!(entry.flags & libc::O_NONBLOCK.cast_unsigned() != 0, nonblock);
        }
    }
}
