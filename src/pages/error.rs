//! What can go wrong between a task's memory and its image.

use std::io;

use crate::image::ImageError;

/// Contents that cannot be copied, or a pagemap that cannot be believed.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The user wants us to stop.
    #[error(transparent)]
    Interrupted(#[from] crate::interrupt::Interrupted),
    /// A page that is there cannot be read.
    #[error("read memory of {pid} at {addr:#x}")]
    Memory {
        /// Whose.
        pid: i32,
        /// First byte that could not be read.
        addr: u64,
        /// Why.
        source: io::Error,
    },
    /// Shared memory cannot be read.
    #[error("read shared memory {shmid} at {offset:#x}")]
    Shared {
        /// Its id in the images.
        shmid: u32,
        /// First byte that could not be read.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// Shared memory cannot be filled.
    #[error("fill shared memory {shmid} at {offset:#x}")]
    Fill {
        /// Its id in the images.
        shmid: u32,
        /// First byte that could not be written.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// Pages of shared memory for which it has no room.
    #[error("pages at {offset:#x} lie behind the end of shared memory {shmid}")]
    BehindEnd {
        /// Its id in the images.
        shmid: u32,
        /// Where they would go.
        offset: u64,
    },
    /// The kernel does not say which pages there are.
    #[error("scan pages of {pid} at {addr:#x}")]
    Scan {
        /// Whose.
        pid: i32,
        /// Where.
        addr: u64,
        /// Why.
        source: io::Error,
    },
    /// Pages cannot be written to, or read from, their image.
    #[error("{action} pages-{pages_id}.img")]
    Pages {
        /// "write" or "read".
        action: &'static str,
        /// The image.
        pages_id: u32,
        /// Why.
        source: io::Error,
    },
    /// An entry of a pagemap that no dump writes.
    #[error("{image}: entry {entry}: {what}")]
    Entry {
        /// File name of the image.
        image: String,
        /// Number of the entry, from 0.
        entry: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
}
