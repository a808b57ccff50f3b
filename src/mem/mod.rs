//! Address spaces: areas, their pages, shared memory.
//!
//! A dump [`collect`]s the areas of a stopped task (what they are, with every finding of what
//! cannot be saved), then [`MemoryDump::task`] writes the pages and `mm-PID.img`, and
//! [`MemoryDump::shared`] writes each object of shared memory once for the whole tree.
//!
//! Content is: in private areas every page that is the task's own (anonymous, present or swapped),
//! whatever the protection; in shared anonymous memory and memfds all data of the object. Pages of
//! files, untouched memory, the zero page and, in private anonymous memory, pages of zeros are
//! left out. Guard regions become areas of their own behind the others.

pub mod aio;
mod anon_name;
mod collect;
mod dump;
mod error;
mod inside;
mod ldt;
mod lock_future;
mod locks;
mod merge;
pub mod pkeys;
pub mod policy;
mod reserve;
mod scan;
mod shared;
pub mod vma;

/// Value of PR_GET_THP_DISABLE (Linux 6.18): transparent huge pages are off but where they are advised.
pub const THP_EXCEPT_ADVISED: u32 = 3;

pub(crate) use collect::KeptSpace;
pub use collect::{AddressSpace, MappedFile, Task, VmaFiles, collect};
pub use dump::MemoryDump;
pub use error::MemError;
pub use inside::{Inside, queries, room};
pub use shared::SharedMemory;

use crate::{
    sys::pid::NsPid,
    {image::pb, tracee::List},
};

/// Plans what an address space has besides its areas and their content, when they are there and no other is forked from it.
/// What holds for memory that is mapped later comes last.
pub fn plan_last(mm: &pb::MmEntry, pid: NsPid, list: &mut List) -> Result<(), MemError> {
    locks::check(mm, pid)?;
    policy::plan(mm, pid, list)?;
    anon_name::plan(mm, pid, list)?;
    ldt::plan(mm, pid, list)?;
    merge::plan(mm, list);
    lock_future::plan(mm, pid, list)
}
