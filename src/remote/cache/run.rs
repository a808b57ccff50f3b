//! The daemon: from what it listens to to its end.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};

use super::super::front::Front;
use super::super::journal::Journal;
use super::super::notify::{self, Notify};
use super::super::{Failure, pb::FailCode};
use super::keep::Keeper;
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
/// Signals within this time are one: a terminal and a shell may both send it.
const ONCE: Duration = Duration::from_secs(1);
/// How often a service manager hears that the end takes longer.
const AGAIN: Duration = Duration::from_secs(10);
/// How long the disk may take for all snapshots.
const SPILL: Duration = Duration::from_secs(600);

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
        Ok(journal) => cache.snapshots().keep_journal(journal),
        Err(e) => {
            tracing::warn!("a source cannot be told after a restart what became of its tree: journal: {e}")
        }
    }
    cache.snapshots().set_at_once(settings.at_once);
    let mut restorer =
        settings.restore.as_ref().map(|of| Restorer::new(&settings.work_dir, &of.words, RESTORES));
    if let Some(restores) = &settings.restore {
        cache.restore_all(&restores.settings);
    }
    let manager = Notify::from_env();
    if let (Some(manager), most @ 1..) = (Notify::from_env(), notify::most_kept()) {
        cache.snapshots().keep_at(Keeper::new(manager, most));
    }
    cache.adopt(front.take_kept(), settings.spill.as_deref());
    let mut closing: Option<Closing> = None;
    loop {
        if let Some(restorer) = &mut restorer {
            restorer.start(&mut cache);
        }
        if let Some(closing) = &mut closing
            && closing.is_over(&mut cache, settings.spill.as_deref(), manager.as_ref())
        {
            cache.part();
            return Ok(());
        }
        for token in cache.turn(closing.as_ref().map(|closing| closing.again)).map_err(internal)? {
            match token {
                SIGNALS => {
                    if !front.is_told_to_end() {
                        continue;
                    }
                    match &closing {
                        None => {
                            front.stop_listening();
                            closing = Some(Closing::begin(&mut cache));
                        }
                        Some(closing) if closing.since.elapsed() < ONCE => {}
                        Some(_) => {
                            tracing::warn!("told to end once more");
                            cache.part();
                            return Ok(());
                        }
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
        if is_single && cache.lines() == 0 && !cache.snapshots().has_live() {
            if cache.is_torn() {
                let text = "the connection given with --ps-socket was lost with a snapshot on its way";
                return Err(Failure::new(FailCode::FailLost, text));
            }
            return Ok(());
        }
    }
}

/// The cache was told to end. It goes on for those of this host as long as an end would lose a tree.
#[derive(Debug)]
struct Closing {
    since: Instant,
    told: Option<usize>,
    /// Not all could be written to the disk.
    unspilled: bool,
    /// When to look again.
    again: Instant,
}

impl Closing {
    fn begin(cache: &mut Cache) -> Self {
        let now = Instant::now();
        cache.close();
        Self { since: now, told: None, unspilled: false, again: now }
    }

    /// Whether nothing would be lost any more by an end.
    fn is_over(&mut self, cache: &mut Cache, spill: Option<&Path>, manager: Option<&Notify>) -> bool {
        let spill = spill.filter(|_| !self.unspilled);
        let mut risk = cache.snapshots().at_risk(spill.is_some());
        if risk == 0
            && let Some(dir) = spill
        {
            // Again it takes as long as the disk takes.
            extend(manager, 0, SPILL);
            self.unspilled = cache.snapshots().spill(dir) > 0;
            risk = cache.snapshots().at_risk(false);
        }
        if risk == 0 {
            return true;
        }
        if self.told != Some(risk) {
            self.told = Some(risk);
            tracing::warn!(
                "told to end, with {risk} snapshots that would be lost or torn out of a restore: restore them, or \
                 image-cache save, or image-cache drop; a second SIGTERM ends it at once"
            );
            extend(manager, risk, AGAIN * 3);
        } else if Instant::now() >= self.again {
            extend(manager, risk, AGAIN * 3);
        }
        self.again = Instant::now() + AGAIN;
        false
    }
}

/// Tells the service manager that the end takes longer.
fn extend(manager: Option<&Notify>, risk: usize, time: Duration) {
    let Some(manager) = manager else { return };
    let line = format!(
        "STOPPING=1\nEXTEND_TIMEOUT_USEC={}\nSTATUS=Told to end; {risk} snapshots would be lost: restore, save or drop them",
        time.as_micros()
    );
    if let Err(e) = manager.tell(&line, &[]) {
        tracing::warn!("the service manager cannot be told that the end takes longer: {e}");
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
