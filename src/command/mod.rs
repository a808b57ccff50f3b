//! One short file per command: settings, the call, the report.

pub mod check;
mod daemon;
pub mod demo;
pub mod dump;
pub mod image;
pub mod image_cache;
mod image_copies;
pub mod image_proxy;
pub mod migrate;
mod report;
pub mod restore;
mod snapshots;
mod watchdog;

use std::io;

use nix::{
    errno::Errno,
    sys::resource::{RLIM_INFINITY, Resource, getrlimit},
    unistd::geteuid,
};

/// Says of what was not permitted that root may, and which limit may be in the way of what could not be had.
fn explained(error: anyhow::Error) -> anyhow::Error {
    let has = |errnos: &[Errno]| {
        error.chain().any(|cause| {
            let errno = cause.downcast_ref::<Errno>().copied();
            let io = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
            errno.or(io.map(Errno::from_raw)).is_some_and(|errno| errnos.contains(&errno))
        })
    };
    let limited = |resource: Resource| getrlimit(resource).is_ok_and(|(soft, _)| soft != RLIM_INFINITY);
    let why = if !geteuid().is_root() && has(&[Errno::EPERM, Errno::EACCES]) {
        format!("this takes root, and crtool was run by user {}", geteuid())
    } else if has(&[Errno::EFBIG]) {
        "a limit of the size of files (ulimit -f) or of their file system is in the way".to_owned()
    } else if has(&[Errno::ENOMEM]) && (limited(Resource::RLIMIT_AS) || limited(Resource::RLIMIT_DATA)) {
        "crtool's own limits of memory (ulimit -v, ulimit -d), which a tree has while it is made, may be in the way"
            .to_owned()
    } else if has(&[Errno::EAGAIN]) {
        "no more processes or threads may be made, it seems (pids.max of the control group, ulimit -u)"
            .to_owned()
    } else {
        return error;
    };
    error.context(why)
}
