//! One short file per command: settings, the call, the report.

pub mod check;
mod daemon;
pub mod demo;
pub mod dump;
pub mod image;
pub mod image_cache;
pub mod image_proxy;
mod report;
pub mod restore;
mod snapshots;

use std::io;

use nix::{errno::Errno, unistd::geteuid};

/// Says of what was not permitted that root may.
fn unprivileged(error: anyhow::Error) -> anyhow::Error {
    let denied = |cause: &(dyn std::error::Error + 'static)| {
        let errno = cause.downcast_ref::<Errno>();
        let io = cause.downcast_ref::<io::Error>();
        matches!(errno, Some(Errno::EPERM | Errno::EACCES))
            || io.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    if geteuid().is_root() || !error.chain().any(denied) {
        return error;
    }
    error.context(format!("this takes root, and crtool was run by user {}", geteuid()))
}
