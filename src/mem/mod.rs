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

mod collect;
mod dump;
mod error;
mod inside;
pub mod pkeys;
mod reserve;
mod scan;
mod shared;
pub mod vma;

pub use collect::{AddressSpace, MappedFile, Task, VmaFiles, collect};
pub use dump::MemoryDump;
pub use error::MemError;
pub use inside::{Inside, Queries, queries};
pub use shared::SharedMemory;
