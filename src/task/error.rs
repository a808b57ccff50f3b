//! What can go wrong with a task's state.

use crate::{
    mem::MemError,
    proc::ParseError,
    sys::{Errno, fd, pid::HostPid},
    tracee::TraceError,
};

/// An error of this layer.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The task ended while we looked at it.
    #[error("task {0} is gone")]
    Vanished(HostPid),
    /// A file of /proc cannot be read.
    #[error("{path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of /proc is not as expected.
    #[error("{path}")]
    Parse {
        /// The file.
        path: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
    /// The kernel refused a request about a thread.
    #[error("{what} of thread {tid}")]
    Request {
        /// The request.
        what: &'static str,
        /// The thread.
        tid: HostPid,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A call made inside the task failed.
    #[error("{what} inside the task")]
    Inside {
        /// The call.
        what: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Reading back what a list found out.
    #[error("results of a list")]
    Results(#[source] TraceError),
    /// The clocks cannot be read.
    #[error("read of the clocks")]
    Clocks(#[source] Errno),
    /// Something about memory.
    #[error(transparent)]
    Memory(#[from] MemError),
    /// The image says something that cannot be.
    #[error("core image: {what}")]
    Image {
        /// What it says.
        what: String,
    },
    /// The image asks for something that cannot be had here.
    #[error("{what} cannot be restored: {reason}")]
    Unsupported {
        /// The object.
        what: String,
        /// Why, and what to do.
        reason: String,
    },
}

impl TaskError {
    pub(crate) fn image(what: impl Into<String>) -> Self {
        Self::Image { what: what.into() }
    }

    pub(super) fn request(what: &'static str, tid: HostPid, source: Errno) -> Self {
        if source == Errno::ESRCH { Self::Vanished(tid) } else { Self::Request { what, tid, source } }
    }
}

/// Result of this layer.
pub type Result<T> = std::result::Result<T, TaskError>;

/// Reads a file of /proc about task `tid`.
pub(super) fn read_proc(tid: HostPid, path: String) -> Result<Vec<u8>> {
    fd::read_proc(&path).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) if !std::path::Path::new(&format!("/proc/{tid}")).exists() => {
            TaskError::Vanished(tid)
        }
        _ => TaskError::Read { path, source },
    })
}

/// Reads and parses a file of /proc about task `tid`.
pub(super) fn parse_proc<T>(
    tid: HostPid,
    path: String,
    parse: impl FnOnce(&[u8]) -> std::result::Result<T, ParseError>,
) -> Result<T> {
    let bytes = read_proc(tid, path.clone())?;
    parse(&bytes).map_err(|source| TaskError::Parse { path, source })
}
