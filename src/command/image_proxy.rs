//! `crtool image-proxy`, and questions to one that runs.

use std::{
    io::{self, Write as _},
    path::Path,
    time::SystemTime,
};

use super::{
    daemon,
    snapshots::{Which, table},
};
use crate::{
    exit::Exit,
    remote::{
        client::control::{self, Daemon},
        front::Front,
        proxy,
    },
    settings::ProxySettings,
};

/// Runs a proxy until it is told to end.
pub fn run(settings: &ProxySettings) -> anyhow::Result<Exit> {
    daemon::run(
        "image-proxy",
        &settings.daemon,
        || Front::proxy(settings),
        |front| proxy::run(front, settings),
    )
}

/// Asks the proxy whose socket is in `work_dir`, and prints what it says.
pub fn status(work_dir: &Path) -> anyhow::Result<Exit> {
    let (snapshots, daemon) = control::snapshots(Daemon::Proxy, work_dir)?;
    // A reader that has seen enough is no failure.
    let _ = write!(io::stdout(), "{daemon}\n\n{}", table(&snapshots, Which::All, SystemTime::now()));
    Ok(Exit::Success)
}
