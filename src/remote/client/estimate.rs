//! How much a dump is going to send, as far as that can be known of a tree that runs.
//!
//! The cache keeps so much memory for it, or refuses it before anything is frozen. Every process brings its anonymous pages
//! and what of them is swapped out; memory that several share is sent once, so that only the largest is counted. Pages
//! of zeros are not sent, and the tree may grow until it is frozen: it is an estimate.

use std::collections::BTreeSet;
use std::path::Path;

use crate::proc::{children, status};

/// Most processes that are looked at: more are no reason to wait.
const MOST: usize = 50_000;

/// Bytes of images that a dump of the tree with this root sends, roughly; 0 if nothing is known.
pub(super) fn bytes(root: i32) -> u64 {
    let mut seen = BTreeSet::from([root]);
    let mut left = vec![root];
    let (mut private, mut shared) = (0_u64, 0);
    while let Some(pid) = left.pop() {
        let dir = Path::new("/proc").join(pid.to_string());
        // Who has ended meanwhile brings nothing.
        let Ok(text) = std::fs::read(dir.join("status")) else { continue };
        if let Ok(status) = status::parse(&text) {
            private += status.rss_anon_bytes.unwrap_or(0) + status.vm_swap_bytes.unwrap_or(0);
            shared = shared.max(status.rss_shmem_bytes.unwrap_or(0));
        }
        for thread in std::fs::read_dir(dir.join("task")).into_iter().flatten().flatten() {
            let text = std::fs::read(thread.path().join("children")).unwrap_or_default();
            let children = children::parse(&text).unwrap_or_default();
            left.extend(children.into_iter().filter(|child| seen.len() < MOST && seen.insert(*child)));
        }
    }
    private + shared
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_counts_too() {
        let own = i32::try_from(std::process::id()).unwrap();
        let before = bytes(own);
        assert!(before > 0);
        let memory = vec![1_u8; 64 << 20];
        let after = bytes(own);
        assert!(after >= before + (60 << 20), "{before} {after}");
        drop(memory);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let alone = bytes(i32::try_from(child.id()).unwrap());
        let whole = bytes(own);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(alone > 0 && whole >= alone, "{alone} {whole}");
        assert_eq!(bytes(i32::MAX), 0);
    }
}
