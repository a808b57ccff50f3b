//! What can go wrong with open files.

use std::{borrow::Cow, path::PathBuf};

use crate::{
    image::ImageError,
    pages::PagesError,
    proc::ParseError,
    sys::{Errno, pid::HostPid},
    tracee::TraceError,
    view::ViewError,
};

/// An open file that cannot be saved or made again.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The object is of a kind, or in a state, that cannot be saved. At dump it becomes a finding.
    #[error("{reason}{}", if hint.is_empty() { String::new() } else { format!(" ({hint})") })]
    Unsupported {
        /// Why not.
        reason: Cow<'static, str>,
        /// What the user can do; may be empty.
        hint: Cow<'static, str>,
    },
    /// A system call failed.
    #[error("{action}")]
    Sys {
        /// What was attempted.
        action: &'static str,
        /// Why not.
        source: Errno,
    },
    /// A system call that names a path failed.
    #[error("{action} {}", path.display())]
    Path {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// A path does not lead where it should.
    #[error("{action} {}", path.display())]
    Name {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: ViewError,
    },
    /// The file found is not the one that was saved.
    #[error("{}: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// An image entry makes no sense.
    #[error("file {id:#x} in the images: {what}")]
    Entry {
        /// Its id.
        id: u32,
        /// What is wrong.
        what: Cow<'static, str>,
    },
    /// Which descriptor of which task it was.
    #[error("pid {pid}: fd {fd} ({link})")]
    Fd {
        /// The task.
        pid: HostPid,
        /// Its descriptor number.
        fd: i32,
        /// What /proc shows for it.
        link: String,
        /// What went wrong.
        source: Box<FileError>,
    },
    /// Which file of the images it was.
    #[error("file {id:#x} ({kind})")]
    File {
        /// Its id.
        id: u32,
        /// Its kind.
        kind: &'static str,
        /// What went wrong.
        source: Box<FileError>,
    },
    /// The content of a memory file cannot be read, or not be put into it.
    #[error("content of memory file {shmid}")]
    Content {
        /// Its id in the images.
        shmid: u32,
        /// Why not.
        source: PagesError,
    },
    /// An image cannot be written or read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// /proc says something unexpected.
    #[error(transparent)]
    Proc(#[from] ParseError),
    /// A list cannot be built or run.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

impl FileError {
    /// An object that cannot be saved, and what to do about it.
    pub fn unsupported(reason: impl Into<Cow<'static, str>>, hint: impl Into<Cow<'static, str>>) -> Self {
        Self::Unsupported { reason: reason.into(), hint: hint.into() }
    }

    /// An entry that makes no sense.
    pub fn entry(id: u32, what: impl Into<Cow<'static, str>>) -> Self {
        Self::Entry { id, what: what.into() }
    }

    /// For `map_err`: names the call that failed.
    pub fn sys(action: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::Sys { action, source }
    }

    /// For `map_err`: names what was attempted and the path that could not be resolved.
    pub(crate) fn name(action: &'static str, path: &[u8]) -> impl FnOnce(ViewError) -> Self {
        let path = crate::files::path::to_path(path).to_owned();
        move |error| match error {
            ViewError::Sys(source) => Self::Path { action, path, source },
            source => Self::Name { action, path, source },
        }
    }

    /// For `map_err`: names the call and the path.
    pub fn path(action: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> Self {
        let path = crate::files::path::to_path(path).to_owned();
        move |source| Self::Path { action, path, source }
    }
}
