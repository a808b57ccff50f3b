//! How a daemon of live migration starts and ends, whichever it is.

use anyhow::Context as _;

use crate::{
    exit::Exit,
    remote::{
        Failure,
        daemon::{self, Place},
        front::{Front, FrontError},
    },
    settings::DaemonSettings,
};

/// Starts a daemon: into the background, sockets, readiness; then `serve` until it ends.
pub(super) fn run(
    name: &'static str,
    settings: &DaemonSettings,
    open: impl FnOnce() -> Result<Front, FrontError>,
    serve: impl FnOnce(Front) -> Result<(), Failure>,
) -> anyhow::Result<Exit> {
    let readiness = match daemon::background(settings).context(name)? {
        Place::Caller(true) => return Ok(Exit::Success),
        // The daemon itself has said why.
        Place::Caller(false) => return Ok(Exit::Failure),
        Place::Daemon(readiness) => readiness,
    };
    let front = open().context(name)?;
    let _running = readiness.ready(front.work_dir(), settings).context(name)?;
    serve(front).context(name)?;
    tracing::info!("{name}: end");
    Ok(Exit::Success)
}
