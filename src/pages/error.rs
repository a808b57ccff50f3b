//! What can go wrong between a task's memory and its image.

use std::io;
use std::path::PathBuf;

use crate::{image::ImageError, sys::pid::HostPid};

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
        pid: HostPid,
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
        pid: HostPid,
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
    /// Pages that are left to a parent, and that nobody has.
    #[error(
        "{}: its pages {start:#x}-{end:#x} are in a parent snapshot, but {} {what}: the chain of snapshots is damaged",
        image.display(),
        path.display()
    )]
    Nowhere {
        /// The pagemap.
        image: PathBuf,
        /// First address.
        start: u64,
        /// First address behind them.
        end: u64,
        /// Where they would have to be.
        path: PathBuf,
        /// What there is instead.
        what: &'static str,
    },
    /// Pages that were to be fetched from the source.
    #[error("{}: its pages {start:#x}-{end:#x} are in no image (--lazy-pages); not supported yet", image.display())]
    Elsewhere {
        /// The pagemap.
        image: PathBuf,
        /// First address.
        start: u64,
        /// First address behind them.
        end: u64,
    },
    /// Parents that lead back to where they began.
    #[error("{}: this parent snapshot is one that led here: the links make a loop", path.display())]
    Loop {
        /// The link that closes it.
        path: PathBuf,
    },
    /// Too many snapshots above one another.
    #[error("{}: a chain of more than {most} parent snapshots", path.display())]
    Deep {
        /// Where it begins.
        path: PathBuf,
        /// The limit.
        most: usize,
    },
    /// Something is wrong in a parent.
    #[error("parent snapshot {}", path.display())]
    Parent {
        /// Where it is.
        path: PathBuf,
        /// What.
        source: Box<PagesError>,
    },
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
}
