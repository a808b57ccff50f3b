//! image-proxy: takes snapshots from the dumps of this host and brings them to the cache, over one connection.
//!
//! ```text
//!  dump           proxy                                  cache
//!   │──open────────▶│──SnapshotBegin──────────────────────▶│
//!   │◀─Opened, pipe─│                                      │
//!   │══frames══════▶│══frames, the streams of all dumps═══▶│
//!   │──guard───────▶│                                      │
//!   │══Commit══════▶│══Commit═════════════════════════════▶│
//!   │◀─Prepared─────│◀─────────────────────────────Prepared│
//!   │  kills        │                                      │
//!   │──confirm─────▶│──Confirm, Ping──────────────────────▶│
//!   │               │◀─────────────────────────────────Pong│
//!   │◀─Restored─────│◀─────────────────────────────Restored│
//! ```
//!
//! - [`pipe`]: frames out of the pipe of a dump. [`outbox`]: into the connection.
//! - [`link`]: the connection itself. [`client`]: a process at the local socket.
//! - [`snapshot`]: what is known of one.
//! - [`relay`]: the one thread that does all of it. [`feed`]: what goes to the cache. [`answers`]: what comes from it. [`settle`]: the
//!   last word. [`requests`]: what the processes of this host ask for.
//!
//! Payloads are relayed as they are: neither their checksums nor their order is looked at, nothing is
//! compressed or written to a disk. What is held is bounded: a pipe and at most one frame for each dump.
//!
//! A dump that is refused while it still writes finds its pipe closed (EPIPE) and the reason in its socket, where it
//! was put before. After `Prepared` a dump hears of nothing but `Restored`.

mod answers;
mod client;
mod feed;
mod link;
mod outbox;
mod pipe;
mod relay;
mod requests;
mod settle;
mod snapshot;

#[cfg(test)]
mod tests;

use std::os::fd::{BorrowedFd, OwnedFd};

use link::{Dial, Given};
use relay::{Door, Ended, Relay, Rules};

use super::front::Front;
use super::{Failure, host, pb::FailCode};
use crate::settings::ProxySettings;

/// Works until the daemon is told to end, or its only connection has ended. That is an error if a snapshot was on
/// its way then, or if the cache may not have heard the last word about one.
pub fn run(mut front: Front, settings: &ProxySettings) -> Result<(), Failure> {
    let ended = match (front.take_given(), front.take_connector()) {
        (Some(stream), _) => relay(Given::new(stream), front, settings),
        (None, Some(connector)) => relay(connector, front, settings),
        (None, None) => return Err(Failure::new(FailCode::FailInternal, "there is no cache to connect to")),
    };
    match ended.map_err(|e| Failure::new(FailCode::FailInternal, format!("epoll: {e}")))? {
        Ended::Well => Ok(()),
        Ended::Lost => {
            let text = "the connection to the cache ended before a snapshot was there";
            Err(Failure::new(FailCode::FailLost, text))
        }
    }
}

fn relay<D: Dial>(dial: D, front: Front, settings: &ProxySettings) -> std::io::Result<Ended> {
    let timeout = settings.net.timeout;
    let rules = Rules {
        timeout,
        settle: timeout,
        compress: settings.compress,
        host: host(),
        work_dir: Some(settings.work_dir.clone()),
    };
    let stop = front.signals().try_clone_to_owned()?;
    let mut relay = Relay::new(dial, Box::new(front), rules)?;
    relay.stop_at(std::os::fd::AsFd::as_fd(&stop))?;
    relay.run()
}

impl Door for Front {
    fn fd(&self) -> BorrowedFd<'_> {
        self.local()
    }

    fn accept(&self) -> Option<OwnedFd> {
        self.accept_local().map(|peer| peer.fd)
    }
}
