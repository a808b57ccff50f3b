//! Snapshots by number, and which have a name, came from a connection, or belong to a dump.
//!
//! What they are looked up by never changes, so that nothing here depends on what becomes of them: who asks looks whether a
//! snapshot still is what is wanted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

use crate::remote::cache::snapshot::Snapshot;

/// All snapshots, also those that have ended, oldest first.
#[derive(Debug, Default)]
pub(super) struct Table {
    all: BTreeMap<u64, Snapshot>,
    names: HashMap<String, BTreeSet<u64>>,
    /// By the number that the dump has drawn.
    dumps: HashMap<u64, BTreeSet<u64>>,
    /// By connections that live.
    sources: HashMap<u64, BTreeSet<u64>>,
}

fn without<K: Hash + Eq>(index: &mut HashMap<K, BTreeSet<u64>>, key: &K, id: u64) {
    if let Some(ids) = index.get_mut(key) {
        ids.remove(&id);
        if ids.is_empty() {
            index.remove(key);
        }
    }
}

impl Table {
    pub(super) fn insert(&mut self, id: u64, snapshot: Snapshot) {
        self.names.entry(snapshot.begin.name.clone()).or_default().insert(id);
        self.dumps.entry(snapshot.begin.id).or_default().insert(id);
        if let Some(owner) = snapshot.owner {
            self.brought(owner.source, id);
        }
        self.all.insert(id, snapshot);
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<Snapshot> {
        let snapshot = self.all.remove(&id)?;
        without(&mut self.names, &snapshot.begin.name, id);
        without(&mut self.dumps, &snapshot.begin.id, id);
        if let Some(owner) = snapshot.owner {
            without(&mut self.sources, &owner.source, id);
        }
        Some(snapshot)
    }

    pub(super) fn get(&self, id: u64) -> Option<&Snapshot> {
        self.all.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Snapshot> {
        self.all.get_mut(&id)
    }

    pub(super) fn ids(&self) -> Vec<u64> {
        self.all.keys().copied().collect()
    }

    pub(super) fn values(&self) -> impl DoubleEndedIterator<Item = &Snapshot> {
        self.all.values()
    }

    fn those<'a>(
        &'a self,
        ids: Option<&'a BTreeSet<u64>>,
    ) -> impl DoubleEndedIterator<Item = (u64, &'a Snapshot)> {
        ids.into_iter().flatten().filter_map(|id| Some((*id, self.all.get(id)?)))
    }

    /// All that had this name.
    pub(super) fn named(&self, name: &str) -> impl DoubleEndedIterator<Item = (u64, &Snapshot)> {
        self.those(self.names.get(name))
    }

    /// All that a dump with this number has made.
    pub(super) fn of_dump(&self, number: u64) -> impl DoubleEndedIterator<Item = (u64, &Snapshot)> {
        self.those(self.dumps.get(&number))
    }

    /// A connection tells about a snapshot from now on.
    pub(super) fn brought(&mut self, source: u64, id: u64) {
        self.sources.entry(source).or_default().insert(id);
    }

    /// What a connection that is gone has ever told about.
    pub(super) fn forget_source(&mut self, source: u64) -> BTreeSet<u64> {
        self.sources.remove(&source).unwrap_or_default()
    }
}
