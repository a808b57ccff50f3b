//! The ends of the way: a dump that writes into it and a restore that reads from it, as stores of images.
//!
//! A dump writes frames ([`sink`]) through a [`link::Link`]: the pipe to the proxy, or a connection of its own to
//! the cache. A restore asks the cache for images and gets descriptors ([`restore`]). What an operator wants to
//! know or change is asked with [`control`]. Nothing here is needed by the daemons.

pub mod control;
mod direct;
mod dump;
mod link;
mod needs;
mod packets;
mod proxied;
mod restore;
mod ring;
mod sink;
#[cfg(test)]
mod tests;

pub use dump::RemoteDump;
pub use link::Fate;
pub use restore::RemoteSnapshot;

use std::io;
use std::path::Path;
use std::time::Duration;

use super::{Failure, pb};
use crate::image::ImageError;
use crate::settings::RemoteSettings;

/// A failure on the way as what happened to an image.
fn image_error(action: &'static str, path: &Path, failure: Failure) -> ImageError {
    ImageError::Io { action, path: path.to_owned(), source: io::Error::other(failure) }
}

/// Asks what became of a tree that was handed over to a cache: over a connection of our own, or through the proxy of the work dir.
pub fn ask(remote: &RemoteSettings, resume: pb::Resume, patience: Duration) -> Result<Fate, Failure> {
    match &remote.direct {
        Some(net) => direct::ask(net, resume, patience),
        None => proxied::ask(&remote.work_dir, resume, patience),
    }
}

/// Says that such a tree runs on here; `false` if it is too late, since it runs there or is about to.
pub fn take_back(remote: &RemoteSettings, resume: pb::Resume) -> Result<bool, Failure> {
    match &remote.direct {
        Some(net) => direct::take_back(net, resume),
        None => proxied::take_back(&remote.work_dir, resume, remote.timeout * 3),
    }
}
