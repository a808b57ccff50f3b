//! Contents of memory in images: `pagemap-*.img` says which pages, `pages-N.img` holds them.
//!
//! [`pagemap`] knows the entries (arithmetic, writing, reading), [`copy`] moves the bytes from a
//! task or a file into the image; [`chain`] finds them again, in a snapshot and its parents, and [`fill`] moves them into a
//! file. Which pages are content is decided in [`crate::mem`].

pub mod chain;
pub mod copy;
pub mod error;
pub mod fill;
pub mod pagemap;

pub use chain::{Pages, Piece};
pub use error::PagesError;
pub use pagemap::{PagemapWriter, Run};

/// Bytes in a page.
pub const PAGE: u64 = 4096;
