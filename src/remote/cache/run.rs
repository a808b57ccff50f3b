//! The daemon: from what it listens to to its end.

use std::io;
use std::os::fd::AsFd as _;

use nix::sys::resource::{Resource, getrlimit};

use super::super::front::Front;
use super::super::journal::Journal;
use super::super::{Failure, pb::FailCode};
use super::restorer::Restorer;
use super::{Cache, Limits};
use crate::settings::CacheSettings;
use crate::sys;

const SIGNALS: u64 = 0;
const LOCAL: u64 = 1;
const NETWORK: u64 = 2;
/// And up: restores that were started here.
const RESTORES: u64 = 1 << 16;
/// Connections taken before others have their turn.
const TURN: usize = 16;

fn internal(e: io::Error) -> Failure {
    Failure::new(FailCode::FailInternal, format!("image-cache: {e}"))
}

/// Serves until it is told to end, or with `--ps-socket` until that connection and all snapshots have ended. Fails
/// if that connection was lost while a snapshot was on its way.
pub fn run(mut front: Front, settings: &CacheSettings) -> Result<(), Failure> {
    let descriptors = raise_limit();
    let limits = Limits::new(settings.max_memory, settings.max_per_source, descriptors);
    let place = match front.addresses() {
        Some(addresses) => format!("listening on {addresses}"),
        None => "with one connection that was given to it".to_owned(),
    };
    let mut cache = Cache::new(limits, settings.net.timeout, place).map_err(internal)?;
    cache.watch(front.signals(), SIGNALS).map_err(internal)?;
    cache.watch(front.local(), LOCAL).map_err(internal)?;
    for (token, fd) in (NETWORK..).zip(front.listeners()) {
        cache.watch(fd, token).map_err(internal)?;
    }
    let given = front.take_given();
    let is_single = given.is_some();
    if let Some(stream) = given {
        cache.add_source(stream).map_err(internal)?;
    }
    match Journal::open(&settings.work_dir) {
        Ok(journal) => cache.keep_journal(journal),
        Err(e) => {
            tracing::warn!("a source cannot be told after a restart what became of its tree: journal: {e}")
        }
    }
    let mut restorer =
        settings.restore.as_ref().map(|words| Restorer::new(&settings.work_dir, words, RESTORES));
    if restorer.is_some() {
        cache.restore_all();
    }
    loop {
        if let Some(restorer) = &mut restorer {
            restorer.start(&mut cache);
        }
        for token in cache.turn(None).map_err(internal)? {
            match token {
                SIGNALS => {
                    if front.is_told_to_end() {
                        cache.part();
                        return Ok(());
                    }
                }
                LOCAL => {
                    for peer in std::iter::from_fn(|| front.accept_local()).take(TURN) {
                        let process = sys::pidfd::of_peer(peer.fd.as_fd());
                        let process = process.or_else(|_| sys::pidfd::open(peer.pid, 0)).ok();
                        refused(cache.add_client(peer.fd, peer.pid, process));
                    }
                }
                RESTORES.. => {
                    if let Some(restorer) = &mut restorer {
                        restorer.ended(token, &mut cache);
                    }
                }
                _ => {
                    for stream in std::iter::from_fn(|| front.accept()).take(TURN) {
                        refused(cache.add_source(stream));
                    }
                }
            }
        }
        if is_single && cache.lines() == 0 && !cache.has_live() {
            if cache.is_torn() {
                let text = "the connection given with --ps-socket was lost with a snapshot on its way";
                return Err(Failure::new(FailCode::FailLost, text));
            }
            return Ok(());
        }
    }
}

fn refused(added: io::Result<()>) {
    if let Err(e) = added {
        tracing::warn!("a connection cannot be served: {e}");
    }
}

/// Each snapshot and each connection takes descriptors; how many there may be.
fn raise_limit() -> u64 {
    if let Err(e) = sys::own::raise_open_files() {
        tracing::warn!("the limit of open files stays as it is: {e}");
    }
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft)
}
