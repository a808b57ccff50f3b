//! What can go wrong with an address space.

use std::{error::Error, io};

use crate::{
    image::ImageError,
    pages::PagesError,
    proc::ParseError,
    sys::{
        Errno,
        pid::{HostPid, NsPid},
    },
    tracee::TraceError,
};

/// An address space that cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// A file of /proc, gone with its task perhaps.
    #[error("read /proc/{pid}/{file}")]
    Proc {
        /// The task.
        pid: HostPid,
        /// Its file.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// A file of /proc that looks unlike the kernel's.
    #[error("understand address space of {pid}")]
    Parse {
        /// The task.
        pid: HostPid,
        /// Where.
        source: ParseError,
    },
    /// A mapped file.
    #[error("save file mapped at {start:#x} in {pid}")]
    File {
        /// The task.
        pid: HostPid,
        /// First address of the area.
        start: u64,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Shared memory that cannot be opened.
    #[error("open shared memory {dev}:{ino}")]
    Shared {
        /// Device of the object.
        dev: u64,
        /// Its inode.
        ino: u64,
        /// Why.
        source: io::Error,
    },
    /// Memory that shared memory is told apart by.
    #[error("find the device of shared memory")]
    SharedDevice {
        /// Why.
        source: io::Error,
    },
    /// Reading back what a list found out.
    #[error("results of a list")]
    Inside(#[source] TraceError),
    /// A question about a protection key that the kernel did not answer.
    #[error("whether protection key {key} is allocated")]
    Pkey {
        /// The key.
        key: usize,
        /// Why.
        source: Errno,
    },
    /// A call made inside the task failed.
    #[error("{what} inside the task")]
    Call {
        /// The call.
        what: &'static str,
        /// Why.
        source: Errno,
    },
    /// The image says something that cannot be.
    #[error("mm-{pid}.img: {what}")]
    BadImage {
        /// The task.
        pid: NsPid,
        /// What it says.
        what: String,
    },
    /// The image asks for something that cannot be had here.
    #[error("{what} of task {pid} cannot be restored: {reason}")]
    Unsupported {
        /// The task.
        pid: NsPid,
        /// The object.
        what: String,
        /// Why, and what to do.
        reason: String,
    },
    /// Contents.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
}
