//! The end of the cache, and its next start: what is complete goes from one to the other.
//!
//! How that is kept is for [`keep`](crate::remote::cache::keep). Told to end, the cache takes nothing any more; what has not come whole
//! fails, so that its tree runs on, and what nobody else has keeps the cache from ending.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use super::offers::CLOSING;
use super::{Snapshots, in_doubt};
use crate::remote::Failure;
use crate::remote::cache::keep::{self, Keeper, Record};
use crate::remote::cache::snapshot::{Snapshot, Turn, word};
use crate::remote::handover::Event;
use crate::remote::pb::{self, FailCode, snapshot_info::State};

impl Snapshots {
    /// From now on complete snapshots are held by the service manager too.
    pub(crate) fn keep_at(&mut self, keeper: Keeper) {
        self.keeper = Some(keeper);
    }

    /// Hands a complete snapshot to the service manager, if there is one that takes it.
    pub(super) fn keep(&mut self, id: u64) {
        let Some(mut keeper) = self.keeper.take() else { return };
        self.counted(id, |snapshot| {
            let Some(images) = &snapshot.images else { return };
            match keeper.keep(&snapshot.record(id), &snapshot.kept_state(), images.record().1) {
                Ok(kept) => snapshot.kept = Some(kept),
                Err(e) => {
                    let name = &snapshot.begin.name;
                    tracing::warn!("snapshot {name} is not kept for the next start of this cache: {e}");
                }
            }
        });
        self.keeper = Some(keeper);
    }

    /// Takes what an earlier cache had. Nothing of it is refused: there is nobody else who has it.
    pub(crate) fn adopt(&mut self, mut records: Vec<Record>) {
        records.sort_by_key(|record| record.snapshot.number);
        let needed: BTreeSet<u64> = records.iter().map(|record| record.snapshot.parent).collect();
        let mut numbers = HashMap::new();
        for Record { snapshot: old, state: was, images, kept, spilled } in records {
            let mut snapshot = Snapshot {
                turn: Turn::Given,
                state: was.state(),
                since: was.since,
                images: Some(images),
                parent: numbers.get(&old.parent).copied(),
                survives: was.survives,
                confirmed: was.confirmed,
                started: was.started,
                freed: was.freed,
                replaced: was.replaced,
                restored_pid: was.restored_pid,
                saved: was.saved,
                ..Snapshot::new(old.begin.unwrap_or_default(), old.origin.into())
            };
            let name = snapshot.begin.name.clone();
            let before = snapshot.held();
            let after = before.after(Event::Restarted).held;
            if let (Some(keeper), Some(kept)) = (&mut self.keeper, &kept) {
                keeper.add(kept);
            }
            if !after.is_live() && !needed.contains(&old.number) {
                if before.is_live() {
                    tracing::error!(
                        "snapshot {name}: a restore had it, and freed what it had read, when the cache ended: nothing \
                         is left to be restored; see whether its tree runs here"
                    );
                }
                if let (Some(keeper), Some(kept)) = (&mut self.keeper, &kept) {
                    keeper.forget(kept);
                }
                continue;
            }
            snapshot.text = match before.state {
                State::Prepared => {
                    "the cache ended before the source confirmed that its tree is gone".to_owned()
                }
                State::Restoring | State::Starting => {
                    "the cache ended while a restore had it: its tree may run here".to_owned()
                }
                _ => was.text,
            };
            (snapshot.state, snapshot.started, snapshot.kept) = (after.state, after.started, kept);
            tracing::info!("snapshot {name} of an earlier cache: {}", word(after.state));
            if after.state == State::InDoubt {
                tracing::warn!("{}", in_doubt(&snapshot).text);
            }
            snapshot.note();
            let is_kept = snapshot.kept.is_some();
            let id = self.insert(snapshot);
            numbers.insert(old.number, id);
            if !is_kept {
                self.keep(id);
            }
            if let Some(place) = spilled {
                keep::remove_spilled(&place);
            }
        }
    }

    /// The cache is told to end: nothing begins any more, and what has not come whole fails, so that its tree runs on.
    pub(crate) fn close(&mut self) {
        self.closing = true;
        let offers = std::mem::take(&mut self.offers.queue);
        for id in std::mem::take(&mut self.offers.arriving).into_iter().chain(offers) {
            if self.table.get(id).is_some_and(|s| s.state == State::Receiving) {
                self.fail(id, Failure::new(FailCode::FailBusy, CLOSING));
            }
        }
    }

    /// Whether it was told to end.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing
    }

    /// How many snapshots an end would lose, or tear out of somebody's hands; `spilled`: not those that can be written to a
    /// disk.
    pub(crate) fn at_risk(&self, spilled: bool) -> usize {
        let safe = |s: &Snapshot| {
            let elsewhere = s.survives && matches!(s.state, State::Ready | State::InDoubt);
            let held = s.kept.is_some() || spilled || elsewhere || !s.is_live();
            s.reader.is_none() && s.saver.is_none() && held
        };
        self.table.values().filter(|s| s.images.is_some() && !safe(s)).count()
    }

    /// Writes all that the service manager does not hold below `dir`. How many could not be written.
    pub(crate) fn spill(&mut self, dir: &Path) -> usize {
        let (mut written, mut unwritten) = (BTreeMap::new(), Vec::new());
        for id in self.table.ids() {
            let Some(snapshot) = self.table.get(id).filter(|s| s.kept.is_none()) else { continue };
            let Some(images) = &snapshot.images else { continue };
            match keep::spill(dir, &snapshot.record(id), &snapshot.kept_state(), images) {
                Ok(place) => drop(written.insert(id, place)),
                Err(e) => {
                    tracing::error!("snapshot {} cannot be spilled: {e}", snapshot.begin.name);
                    unwritten.push(id);
                }
            }
        }
        // What goes on from memory takes what it builds on from there too.
        for id in &unwritten {
            let mut next = self.table.get(*id);
            while let Some((id, snapshot)) = next.and_then(|s| Some((s.parent?, self.table.get(s.parent?)?)))
            {
                written.remove(&id).iter().for_each(|place: &PathBuf| keep::remove_spilled(place));
                next = Some(snapshot);
            }
        }
        for id in written.into_keys() {
            // Whoever brought it asks the next cache.
            self.forget_owner(id);
            self.happen(id, Event::Dropped, &format!("written to {} for the next start", dir.display()));
        }
        unwritten.len()
    }

    /// The cache ends. Says what goes with it.
    pub(crate) fn part(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.settle();
        }
        for s in self.table.values().filter(|s| s.is_live() && s.kept.is_none()) {
            let pb::SnapshotBegin { name, pid, comm, host, .. } = &s.begin;
            let line = format!("snapshot {name} of task {pid} ({comm}) at {host} ends with this cache");
            match s.state {
                State::Ready if !s.survives => tracing::error!("{line}: it was all there was of its tree"),
                State::InDoubt => {
                    tracing::error!("{line}: it was in doubt, and may be all there was of its tree")
                }
                state => tracing::warn!("{line}: {}", word(state)),
            }
        }
    }
}
