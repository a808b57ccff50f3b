//! The ends of the way: a dump that writes into it and a restore that reads from it, as stores of images.
//!
//! A dump writes frames ([`sink`]) through a [`link::Link`]: the pipe to the proxy, or a connection of its own to
//! the cache. A restore asks the cache for images and gets descriptors ([`restore`]). What an operator wants to
//! know or change is asked with [`control`]. Nothing here is needed by the daemons.

pub mod control;
mod direct;
mod dump;
mod link;
mod packets;
mod proxied;
mod restore;
mod ring;
mod sink;
#[cfg(test)]
mod tests;

pub use dump::RemoteDump;
pub use restore::RemoteSnapshot;

use std::io;
use std::path::Path;

use super::Failure;
use crate::image::ImageError;

/// A failure on the way as what happened to an image.
fn image_error(action: &'static str, path: &Path, failure: Failure) -> ImageError {
    ImageError::Io { action, path: path.to_owned(), source: io::Error::other(failure) }
}
