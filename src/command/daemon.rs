//! How a daemon of live migration starts and ends, whichever it is.

use anyhow::Context as _;

use crate::{
    exit::Exit,
    remote::{
        Failure,
        front::{self, Front, FrontError, Place},
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
    let readiness = match front::background(settings).context(name)? {
        Place::Caller(true) => return Ok(Exit::Success),
        // The daemon itself has said why.
        Place::Caller(false) => return Ok(Exit::Failure),
        Place::Daemon(readiness) => readiness,
    };
    let mut front = open().context(name)?;
    readiness.ready(&mut front, settings).context(name)?;
    serve(front).context(name)?;
    tracing::info!("{name}: end");
    Ok(Exit::Success)
}
