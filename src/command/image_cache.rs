//! `crtool image-cache`, and questions to one that runs.

use std::{
    io::{self, Write as _},
    path::Path,
    time::SystemTime,
};

use super::{
    daemon, image_copies,
    snapshots::{Which, table},
};
use crate::{
    exit::Exit,
    remote::{
        cache,
        client::control::{self, Daemon},
        front::Front,
        pb,
    },
    settings::{CacheRequest, CacheSettings},
};

/// Runs a cache until it is told to end.
pub fn run(settings: &CacheSettings) -> anyhow::Result<Exit> {
    daemon::run(
        "image-cache",
        &settings.daemon,
        || {
            cache::prepare();
            Front::cache(settings)
        },
        |front| cache::run(front, settings),
    )
}

/// Asks the cache whose socket is in `work_dir`, and prints what it says.
pub fn ask(request: &CacheRequest, work_dir: &Path) -> anyhow::Result<Exit> {
    let text = match request {
        CacheRequest::List => {
            let pb::Snapshots { snapshots, closing, .. } = control::listing(Daemon::Cache, work_dir)?;
            if closing {
                tracing::warn!("this cache was told to end, and waits until it holds nothing");
            }
            table(&snapshots, Which::Held, SystemTime::now())
        }
        CacheRequest::Status => {
            let (snapshots, daemon) = control::snapshots(Daemon::Cache, work_dir)?;
            format!("{daemon}\n\n{}", table(&snapshots, Which::All, SystemTime::now()))
        }
        CacheRequest::Drop { name, force } => {
            control::drop_snapshot(work_dir, name, *force)?;
            String::new()
        }
        CacheRequest::Save { name, dir, drop, check } => {
            image_copies::save(work_dir, name, dir, *drop, *check)?;
            String::new()
        }
        CacheRequest::Load { name, dir, check } => {
            image_copies::load(work_dir, name, dir, *check)?;
            String::new()
        }
        CacheRequest::Release { name } => {
            control::release(work_dir, name)?;
            String::new()
        }
    };
    // A reader that has seen enough is no failure.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(Exit::Success)
}
