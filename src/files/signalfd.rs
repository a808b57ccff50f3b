//! signalfd(2): signals read from a descriptor.
//!
//! Saved: the mask. What waits to be read are pending signals of the task that reads, not of the file.

use super::{DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, flags, kind::packed_in};
use crate::{image::pb, sys::event};

/// A set of signals.
#[derive(Debug)]
pub(super) struct Signalfd;

impl FileKind for Signalfd {
    type Entry = pb::SignalfdEntry;
    const NAME: &'static str = "signalfd";
    const TYPE: pb::FdTypes = pb::FdTypes::Signalfd;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.is_anon_inode("[signalfd]")
    }

    fn dump(_cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let sigmask =
            fd.info.sigmask.ok_or(FileError::unsupported("the kernel does not tell its mask", ""))?;
        Ok(pb::SignalfdEntry { id, flags: fd.flags(), fown: fd.fown()?, sigmask })
    }

    fn open(_cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        let fd =
            event::signalfd(entry.sigmask, libc::SFD_CLOEXEC).map_err(FileError::sys("create a signalfd"))?;
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn would_open(_: &mut RestoreCx<'_>, _: &Self::Entry) -> Result<(), FileError> {
        // Any mask can be had.
        Ok(())
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(sgfd);
}

#[cfg(test)]
mod tests {
    use super::super::testing::round_trip;
    use super::*;

    #[test]
    fn mask_and_flags() {
        for (mask, flags) in [(0, 0), (1 << 63 | 1 << 9, libc::SFD_NONBLOCK), (1 << 31, 0)] {
            let fd = event::signalfd(mask, libc::SFD_CLOEXEC | flags).unwrap();
            let (_, entry) = round_trip::<Signalfd>(&fd);
            assert_eq!(entry.sigmask, mask);
            assert_eq!(entry.flags & libc::O_NONBLOCK.cast_unsigned() != 0, flags != 0);
        }
    }
}
