//! What can be wrong with an image.

use std::{io, path::PathBuf};

use crate::ownership::OwnershipError;

fn by(pid: Option<i32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// An image that cannot be written, read or believed. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was attempted: "create", "read", ...
        action: &'static str,
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file or directory that somebody else may have put there.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// Somebody else is at work in the directory.
    #[error("images directory {} is in use: {what}{}", path.display(), by(*pid))]
    Busy {
        /// The directory.
        path: PathBuf,
        /// What they do.
        what: &'static str,
        /// Who, if that is known.
        pid: Option<i32>,
    },
    /// Another kind of file.
    #[error("{}: magic is {got:#010x}, not {want:#010x}", path.display())]
    Magic {
        /// The image.
        path: PathBuf,
        /// Expected.
        want: u32,
        /// Found.
        got: u32,
    },
    /// No magic of any image.
    #[error("{}: no image with entries (magic {got:#010x}; pages and tarballs are raw data)", path.display())]
    UnknownMagic {
        /// The file.
        path: PathBuf,
        /// Found.
        got: u32,
    },
    /// The file ends inside an entry or before the end of its magic.
    #[error("{}: cut short in entry {entry}", path.display())]
    Truncated {
        /// The image.
        path: PathBuf,
        /// Number of the entry, from 0.
        entry: usize,
    },
    /// The bytes of an entry are no message of the expected type.
    #[error("{}: entry {entry} is no {message}", path.display())]
    Decode {
        /// The image.
        path: PathBuf,
        /// Number of the entry, from 0.
        entry: usize,
        /// Expected message.
        message: String,
        /// What is wrong.
        source: prost::DecodeError,
    },
    /// A field that must be there is not.
    #[error("{}: entry {entry}: {message}.{field} is missing", path.display())]
    MissingField {
        /// The image.
        path: PathBuf,
        /// Number of the entry, from 0.
        entry: usize,
        /// Message the field belongs to.
        message: &'static str,
        /// The field.
        field: &'static str,
    },
    /// An entry, or what follows it, is larger than any real one.
    #[error("{}: entry {entry} claims {size} bytes, more than {limit}", path.display())]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// Number of the entry, from 0.
        entry: usize,
        /// Claimed.
        size: u64,
        /// Allowed.
        limit: u64,
    },
    /// An entry with more values than any real one, or in an encoding that no image has.
    #[error("{}: entry {entry} has more values than any real one, or groups of them", path.display())]
    Crafted {
        /// The image.
        path: PathBuf,
        /// Number of the entry, from 0.
        entry: usize,
    },
    /// A needed image is not there.
    #[error("{}: no such image", path.display())]
    Absent {
        /// The image.
        path: PathBuf,
    },
    /// An image without any entry where one is needed.
    #[error("{}: has no entry", path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Entries where there should be no more.
    #[error("{}: has more than one entry", path.display())]
    MoreThanOne {
        /// The image.
        path: PathBuf,
    },
    /// A name that no image can have.
    #[error("{name:?} cannot name an image")]
    Name {
        /// The name.
        name: String,
    },
    /// Commit of a store in which not all was written to its end.
    #[error("{}: an image was not written to its end", path.display())]
    Unfinished {
        /// The store.
        path: PathBuf,
    },
}
