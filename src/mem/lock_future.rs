//! mlockall(MCL_FUTURE), perhaps with MCL_ONFAULT: areas yet to be mapped will be locked.
//!
//! The kernel does not tell it, but the area that a dump has mapped for its lists is such an area: memory that is locked cannot be
//! given back (MADV_DONTNEED is EINVAL), and if it was locked with all its pages, a page that nobody has touched is there. Locks of
//! areas that exist are in their own entries.

use super::MemError;
use crate::{
    image::pb,
    sys::{Errno, pid::NsPid},
    tracee::{CallId, Data, List, RemoteAddr, Results, Want},
};

const PAGE: u64 = 4096;
/// Values of the field `lock_future`, which are those of mlockall(2).
const FUTURE: u32 = libc::MCL_FUTURE.cast_unsigned();
const ONFAULT: u32 = libc::MCL_ONFAULT.cast_unsigned();

/// Where the answers will be.
#[derive(Debug, Clone)]
pub(super) struct Question {
    resident: (CallId, Data),
    drop: CallId,
}

/// Asks about a page of the area with the lists that nobody touches.
pub(super) fn ask(list: &mut List, page: RemoteAddr) -> Question {
    let vector = list.space(1);
    let mincore = [page.into(), PAGE.into(), vector.into()];
    let resident = (list.call("mincore", libc::SYS_mincore, &mincore, Want::Any), vector);
    let drop = [page.into(), PAGE.into(), libc::MADV_DONTNEED.into()];
    Question { resident, drop: list.call("madvise(MADV_DONTNEED)", libc::SYS_madvise, &drop, Want::Any) }
}

impl Question {
    /// Flags of mlockall, if new areas are locked.
    pub(super) fn read(&self, results: &Results) -> Result<Option<u32>, MemError> {
        let result = |call| results.value(call).map_err(MemError::Inside);
        let failed = |result: i64| Errno::from_raw(i32::try_from(-result).unwrap_or(0));
        match result(self.drop)? {
            0 => return Ok(None),
            locked if failed(locked) == Errno::EINVAL => {}
            other => return Err(MemError::Call { what: "madvise(MADV_DONTNEED)", source: failed(other) }),
        }
        let (call, vector) = self.resident;
        match result(call)? {
            0 => {}
            other => return Err(MemError::Call { what: "mincore", source: failed(other) }),
        }
        let resident = results.data(vector, 1).map_err(MemError::Inside)?;
        let there = resident.first().is_some_and(|page| page & 1 == 1);
        Ok(Some(if there { FUTURE } else { FUTURE | ONFAULT }))
    }
}

/// When nothing is mapped any more.
pub(super) fn plan(mm: &pb::MmEntry, pid: NsPid, list: &mut List) -> Result<(), MemError> {
    match mm.lock_future {
        None => Ok(()),
        Some(flags) if flags & !ONFAULT == FUTURE => {
            list.call("mlockall(MCL_FUTURE)", libc::SYS_mlockall, &[flags.into()], Want::Zero);
            Ok(())
        }
        Some(flags) => Err(MemError::BadImage { pid, what: format!("locks of new memory {flags:#x}") }),
    }
}
