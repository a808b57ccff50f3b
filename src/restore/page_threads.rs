//! Threads that help a process under construction to fill its memory, gone before it makes anybody.
//!
//! They are threads of that process (one address space), not traced: they end with it, and by themselves when
//! their share is done.
//!
//! Their maker goes on only when the kernel says that they are gone: it clears the word that a clone with
//! CLONE_CHILD_CLEARTID names when the thread executes nothing in the address space any more. A word that the thread stored
//! itself would come too early, because the thread still runs code of the area after it, which is unmapped in the end.
//!
//! They are made when the last mapping has been: the first fault of each mapping takes mmap_lock, and with 20,000 small
//! ones, threads that filled while the process still mapped took 1.6 times as long (Linux 6.18, 2 cores).

use anyhow::{Result, anyhow};

use super::{
    pid_allocator::PidAllocator,
    puppets::{AreaId, Puppets},
};
use crate::{
    sys::clone::CloneArgs,
    tracee::{Area, List, Op, Placed, RemoteAddr, Want},
};

/// More do not get more out of one address space.
const MOST: usize = 7;

/// All helping threads of a restore.
#[derive(Debug)]
pub(super) struct PageThreads {
    most: usize,
    spawned: Vec<(AreaId, RemoteAddr, Placed)>,
}

impl PageThreads {
    pub(super) fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { most: (cpus - 1).min(MOST), spawned: Vec::new() }
    }

    /// Nobody asks any more for those that there were.
    pub(super) fn forget(&mut self) {
        self.spawned.clear();
    }

    /// Fails when a thread could not do its share.
    pub(super) fn check(&self, puppets: &Puppets) -> Result<()> {
        for (area, slot, list) in &self.spawned {
            if let Some(failure) = puppets.area(*area)?.failure(*slot, &[list])? {
                return Err(anyhow!(failure.error).context("filling of memory"));
            }
        }
        Ok(())
    }
}

/// Where threads of one process are made.
#[derive(Debug)]
pub(super) struct Spawner<'a> {
    pub(super) threads: &'a mut PageThreads,
    /// The area of the process.
    pub(super) id: AreaId,
    pub(super) area: &'a mut Area,
    pub(super) pids: &'a mut PidAllocator,
}

impl Spawner<'_> {
    /// How many threads can be had.
    pub(super) fn most(&self) -> usize {
        self.threads.most
    }

    /// Adds the call to `maker` that makes a thread which does `work` and ends. The word is 0 when it is gone.
    pub(super) fn spawn(&mut self, mut work: List, maker: &mut List) -> Result<RemoteAddr> {
        let word = self.area.alloc(64, 64)?;
        self.area.write(word, &1u64.to_ne_bytes())?;
        let mut end = List::new("end of filling");
        end.call("exit", libc::SYS_exit, &[0u64.into()], Want::Any);
        let end = self.area.place(&end)?;
        work.op(Op::Jump(end.start));
        let work = self.area.place(&work)?;
        let slot = self.area.slot()?;
        self.area.arm(slot, work.start, end.start)?;
        let flags = super::THREAD_FLAGS | libc::CLONE_CHILD_CLEARTID as u64;
        let args = CloneArgs { flags, child_tid: word.0, ..CloneArgs::default() };
        let tid = self.pids.pick()?;
        maker.clone3(format!("clone of a filling thread {tid}"), &args, &[tid], slot);
        self.threads.spawned.push((self.id, slot, work));
        Ok(word)
    }
}
