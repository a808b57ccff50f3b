//! Threads that help a puppet to fill its memory, gone before it makes anybody.
//!
//! They are threads of the puppet (one address space), not traced: they end with it, and by themselves when
//! their share is done.
//!
//! They are made when the last mapping has been: the first fault of each mapping takes mmap_lock, and with 20,000 small
//! ones, threads that filled while the puppet still mapped took 1.6 times as long (Linux 6.18, 2 cores).

use anyhow::{Result, anyhow};

use super::{memory::SpawnPageThread, tracees::Tracees};
use crate::{
    sys::clone::CloneArgs,
    tracee::{Area, List, Op, Placed, RemoteAddr, Want},
};

/// More do not get more out of one address space.
const MOST: usize = 7;

/// All helping threads of a restore.
#[derive(Debug)]
pub(super) struct PageThreads {
    size: usize,
    spawned: Vec<(RemoteAddr, Placed)>,
}

impl PageThreads {
    pub(super) fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { size: (cpus - 1).min(MOST), spawned: Vec::new() }
    }

    /// With room for lists, and ids.
    pub(super) fn at<'a>(&'a mut self, tracees: &'a mut Tracees) -> PageThreadSpawner<'a> {
        PageThreadSpawner { page_threads: self, tracees }
    }

    /// Fails when a thread could not do its share.
    pub(super) fn check(&self, area: &Area) -> Result<()> {
        for (slot, list) in &self.spawned {
            if let Some(failure) = area.failure(*slot, &[list])? {
                return Err(anyhow!(failure).context("filling of memory"));
            }
        }
        Ok(())
    }
}

/// Hires for one tracees.
pub(super) struct PageThreadSpawner<'a> {
    page_threads: &'a mut PageThreads,
    tracees: &'a mut Tracees,
}

impl SpawnPageThread for PageThreadSpawner<'_> {
    fn size(&self) -> usize {
        self.page_threads.size
    }

    fn spawn(&mut self, mut work: List, maker: &mut List) -> Result<RemoteAddr> {
        let area = &mut self.tracees.area;
        let done = area.alloc(64, 64)?;
        area.write(done, &0u32.to_ne_bytes())?;
        let mut end = List::new("end of filling");
        end.op(Op::Post(done, 1));
        end.call("exit", libc::SYS_exit, &[0u64.into()], Want::Any);
        let end = area.place(&end)?;
        work.op(Op::Jump(end.start));
        let work = area.place(&work)?;
        let slot = area.slot()?;
        area.arm(slot, work.start, end.start)?;
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let args = CloneArgs { flags: flags as u64, ..CloneArgs::default() };
        let tid = self.tracees.pids.pick()?;
        maker.clone3(format!("clone of a filling thread {tid}"), &args, &[tid], slot);
        self.page_threads.spawned.push((slot, work));
        Ok(done)
    }
}
