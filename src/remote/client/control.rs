//! What an operator asks the daemons of this host.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::super::pb::{self, FailCode, local_reply, local_request};
use super::super::{CACHE_SOCKET, Failure, PROXY_SOCKET};
use super::packets::{Packets, checked};

/// How long a daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// image-proxy.
    Proxy,
    /// image-cache.
    Cache,
}

fn connect(daemon: Daemon, work_dir: &Path) -> Result<Packets, Failure> {
    let (name, socket) = match daemon {
        Daemon::Proxy => ("image-proxy", PROXY_SOCKET),
        Daemon::Cache => ("image-cache", CACHE_SOCKET),
    };
    Packets::connect(name, &work_dir.join(socket), Duration::ZERO)
}

/// All snapshots that a daemon knows, and its line about itself.
pub fn snapshots(daemon: Daemon, work_dir: &Path) -> Result<(Vec<pb::SnapshotInfo>, String), Failure> {
    listing(daemon, work_dir).map(|listing| (listing.snapshots, listing.daemon))
}

/// The same, with all else that it says.
pub fn listing(daemon: Daemon, work_dir: &Path) -> Result<pb::Snapshots, Failure> {
    let packets = connect(daemon, work_dir)?;
    let mut all = Vec::new();
    let until = std::time::Instant::now() + PATIENCE;
    packets.send(local_request::What::Status(pb::Empty {}), &[], until)?;
    loop {
        let (reply, _) = packets.receive(until)?;
        let local_reply::What::Snapshots(page) = reply else { return Err(packets.unexpected(&reply)) };
        let mut page = page;
        all.append(&mut page.snapshots);
        if !page.more {
            return Ok(pb::Snapshots { snapshots: all, ..page });
        }
    }
}

/// Frees a snapshot of the cache.
pub fn drop_snapshot(work_dir: &Path, name: &str, force: bool) -> Result<(), Failure> {
    let what = local_request::What::Drop(pb::Drop { name: checked(name)?, force });
    connect(Daemon::Cache, work_dir)?.tell(what, &[], PATIENCE)
}

/// Says that the source of a snapshot in doubt is gone.
pub fn release(work_dir: &Path, name: &str) -> Result<(), Failure> {
    let what = local_request::What::Release(pb::Release { name: checked(name)? });
    connect(Daemon::Cache, work_dir)?.tell(what, &[], PATIENCE)
}

/// A connection to the cache on which images of this host that lie in `directory` are brought, as if over a network.
pub(super) fn load(work_dir: &Path, directory: &str) -> Result<OwnedFd, Failure> {
    let failed =
        |e: Errno| Failure::new(FailCode::FailInternal, format!("connection to the cache: {}", e.desc()));
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).map_err(failed)?;
    let what = local_request::What::Load(pb::Load { directory: directory.to_owned() });
    connect(Daemon::Cache, work_dir)?.tell(what, &[theirs.as_fd()], PATIENCE)?;
    Ok(ours)
}

/// Waits until the proxy hears what became of a snapshot.
#[cfg(any(test, feature = "internals"))]
pub fn wait_restored(work_dir: &Path, name: &str, patience: Duration) -> Result<pb::Restored, Failure> {
    let wait_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    let what = local_request::What::WaitRestored(pb::WaitRestored { name: checked(name)?, wait_ms });
    let packets = connect(Daemon::Proxy, work_dir)?;
    match packets.ask(what, &[], patience + PATIENCE)? {
        (local_reply::What::Restored(restored), _) => Ok(restored),
        (other, _) => Err(packets.unexpected(&other)),
    }
}
