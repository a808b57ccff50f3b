//! Ids for what a restore makes for itself: helping threads, and the intermediate parent of a detached root.
//!
//! They are taken from the far end of the range, where no task of the tree is and the kernel, which counts upwards,
//! rarely comes. Another restore may look for some at the same moment, and whoever comes second takes others.

use std::{collections::HashSet, path::Path};

use anyhow::{Context, Result};

use crate::{process_tree::ids::on_host, sys::pid::NsPid};

/// Hands out ids, each once.
#[derive(Debug)]
pub(super) struct PidAllocator {
    tree: HashSet<NsPid>,
    given: HashSet<NsPid>,
    /// All above have been looked at.
    next: i32,
}

impl PidAllocator {
    /// Ids that are not in `tree`.
    pub(super) fn new(tree: impl Iterator<Item = NsPid>) -> Self {
        let max = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok();
        let next = max.and_then(|m| m.trim().parse::<i32>().ok()).unwrap_or(32768);
        Self { tree: tree.collect(), given: HashSet::new(), next }
    }

    /// An id that nobody has at this moment.
    pub(super) fn pick(&mut self) -> Result<NsPid> {
        let is_free =
            |id: &NsPid| !self.tree.contains(id) && !Path::new(&format!("/proc/{}", on_host(*id))).exists();
        let id = (2..self.next).rev().map(NsPid::new).find(is_free).context("no pid is free")?;
        self.next = id.get();
        self.given.insert(id);
        Ok(id)
    }

    /// Whether `id` is from here: any other does as well.
    pub(super) fn gave(&self, id: NsPid) -> bool {
        self.given.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_given_once_and_none_of_the_tree() {
        let first = PidAllocator::new(std::iter::empty()).pick().unwrap();
        let mut pids = PidAllocator::new([first, NsPid::new(first.get() - 2)].into_iter());
        let picked: Vec<NsPid> = (0..5).map(|_| pids.pick().unwrap()).collect();
        assert!(
            picked.iter().all(|id| *id < first && id.get() != first.get() - 2 && pids.gave(*id)),
            "{picked:?}"
        );
        assert!(picked.is_sorted_by(|a, b| a > b), "{picked:?}");
        assert!(!pids.gave(first));
    }
}
