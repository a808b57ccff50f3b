//! The image-cache: takes snapshots from other hosts into memory and gives them to restores of this host.
//!
//! - [`run`](run()): the daemon as a whole.
//! - [`serve`]: the one thread, its sockets and its clock.
//! - [`source`]: a connection from a source: which frame may follow which; [`decode`] takes them out of its bytes.
//! - [`local`]: commands of this host.
//! - [`restorer`]: restores that it starts by itself.
//! - [`needs`]: whether an offered tree could be restored here.
//! - [`snapshots`]: all snapshots, phase by phase, and what becomes of each.
//! - [`keep`]: what outlives the cache.
//! - [`ledger`]: what each source takes, and may take.
//! - [`snapshot`], [`images`], [`memory`]: one snapshot, its images, the bytes of one image.
//!
//! Images are never written to a disk but at the end, with `--spill`. What is not here: how sockets come to be, and how the daemon
//! starts.

mod decode;
mod images;
mod keep;
mod ledger;
mod local;
mod memory;
mod needs;
mod restorer;
mod run;
mod serve;
mod snapshot;
mod snapshots;
mod source;
#[cfg(test)]
mod tests;

pub use ledger::Limits;
pub use memory::prepare;
pub use run::run;
pub use serve::Cache;

/// What the other side did that nobody may do.
fn protocol(text: impl Into<String>) -> super::Failure {
    super::Failure::new(super::pb::FailCode::FailProtocol, text)
}

/// What a connection does to a cache that holds at most 16 MiB: `bytes` come in pieces as long as the numbers in
/// `cuts` say, then it is lost. Without sockets, for fuzzing. The memory that is still taken by what can never be
/// restored, which must be none.
#[cfg(any(test, feature = "internals"))]
pub fn swallow(bytes: &[u8], cuts: &[u8]) -> u64 {
    use super::pb::snapshot_info::State;
    let second = std::time::Duration::from_secs(1);
    let mut snapshots = snapshots::Snapshots::new(Limits::new(Some(16 << 20), None, 1 << 20), second);
    let mut source = source::Source::new(1, "somewhere".into(), second);
    let mut cuts = cuts.iter().cycle();
    let mut left = bytes;
    while !left.is_empty() && !source.is_over() {
        let len = cuts.next().map_or(left.len(), |cut| usize::from(*cut) + 1).min(left.len());
        let (piece, rest) = left.split_at_checked(len).unwrap_or((left, &[]));
        left = rest;
        if let Err(failure) = source.feed(&mut snapshots, piece) {
            source.refuse(&mut snapshots, &failure);
        }
    }
    snapshots.lost(1, "the end");
    let kept = |state| matches!(state, State::Ready | State::InDoubt);
    let needed: u64 = snapshots.all().filter(|s| kept(s.state)).map(snapshot::Snapshot::reserved).sum();
    // Parents of those are in them too: one that is not, is not live and has images.
    let parents: u64 =
        snapshots.all().filter(|s| !kept(s.state) && s.children > 0).map(snapshot::Snapshot::reserved).sum();
    snapshots.used() - needed - parents
}
