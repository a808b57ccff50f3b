//! Room in the images, set aside while the tasks still run.
//!
//! Half of the time it takes to write a page on tmpfs goes into finding memory for it, and writers of
//! one file wait for each other there. Done beforehand, both are gone from the time in which the tree is
//! frozen. How much will be written is a guess from what is in memory now; what was too much is given back
//! when the pages are known, and where the guess cannot be had (a full disk, a file system without
//! fallocate) nothing is set aside.

use std::collections::BTreeMap;
use std::fs;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::MemError;
use crate::interrupt;
use crate::pages::PAGE;
use crate::{
    image::{ImageKind, PagesSink, Store},
    sys::pid::HostPid,
};

/// Below this a task's pages are written faster than room is made.
const LEAST_BYTES: u64 = 4 << 20;
/// Set aside at once; between two of them we listen whether to stop.
const STEP_BYTES: u64 = 256 << 20;

/// Pages images made beforehand, by task.
#[derive(Debug, Default)]
pub(super) struct ReservedImages(BTreeMap<HostPid, (u32, PagesSink)>);

impl ReservedImages {
    /// For the processes `tree`, which run and change: what is missed gets its room later.
    pub(super) fn make(
        store: &dyn Store,
        tree: &[HostPid],
        next_pages_id: &mut u32,
    ) -> Result<Self, MemError> {
        let mut made = BTreeMap::new();
        for &pid in tree {
            let bytes = own_bytes(pid).unwrap_or(0);
            if bytes < LEAST_BYTES {
                continue;
            }
            let pages_id = *next_pages_id;
            *next_pages_id += 1;
            let pages = store.create_pages(&ImageKind::Pages.file_name(u64::from(pages_id)), bytes)?;
            let result = reserve(&pages, bytes);
            made.insert(pid, (pages_id, pages));
            if result.is_err() {
                // All or nothing: half of a tree's pages would keep the rest from being written.
                for (_, pages) in made.values() {
                    if let PagesSink::File(file) = pages {
                        let _ = file.set_len(0);
                    }
                }
                break;
            }
        }
        Ok(Self(made))
    }

    /// The image made for `pid`.
    pub(super) fn take(&mut self, pid: HostPid) -> Option<(u32, PagesSink)> {
        self.0.remove(&pid)
    }

    /// The number of the image made for `pid`.
    pub(super) fn number(&self, pid: HostPid) -> Option<u32> {
        self.0.get(&pid).map(|(pages_id, _)| *pages_id)
    }

    /// An image whose task is no more.
    pub(super) fn take_any(&mut self) -> Option<(u32, PagesSink)> {
        self.0.pop_first().map(|(_, image)| image)
    }
}

fn reserve(pages: &PagesSink, bytes: u64) -> Result<(), Errno> {
    // A stream takes no room here.
    let PagesSink::File(file) = pages else { return Ok(()) };
    let mut at = 0;
    while at < bytes {
        interrupt::check().map_err(|_| Errno::EINTR)?;
        let len = STEP_BYTES.min(bytes - at);
        let [from, len] = [at, len].map(|n| i64::try_from(n).map_err(|_| Errno::EFBIG));
        match fallocate(file, FallocateFlags::empty(), from?, len?) {
            Ok(()) => at += STEP_BYTES,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What is in memory and of no file: statm's resident pages less its shared ones.
fn own_bytes(pid: HostPid) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let mut words = statm.split(' ').skip(1).map(|word| word.parse::<u64>().ok());
    let (resident, shared) = (words.next()??, words.next()??);
    resident.checked_sub(shared)?.checked_mul(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::MemStore;

    #[test]
    fn room_for_what_is_in_memory() {
        let memory = vec![1u8; 32 << 20];
        let (store, mut next) = (MemStore::new(), 3);
        let own = HostPid::own();
        let mut aside = ReservedImages::make(&store, &[own], &mut next).unwrap();
        assert!(memory.iter().all(|byte| *byte == 1) && next > 3);
        let (id, PagesSink::File(file)) = aside.take(own).unwrap() else {
            panic!("a store in memory streams")
        };
        assert_eq!(id, 3);
        assert!(file.metadata().unwrap().len() >= 32 << 20);
        assert!(aside.take(own).is_none());
    }

    #[test]
    fn nothing_for_a_task_that_is_gone() {
        let (store, mut next) = (MemStore::new(), 1);
        let mut aside = ReservedImages::make(&store, &[HostPid::new(i32::MAX)], &mut next).unwrap();
        assert!(aside.take_any().is_none() && next == 1 && store.names().unwrap().is_empty());
    }
}
