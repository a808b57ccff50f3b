//! Threads that help a puppet to fill its memory, gone before it makes anybody.
//!
//! They are threads of the puppet (one address space), not traced: they end with it, and by themselves when
//! their share is done. Their ids are taken from the far end of the range, where no task of the tree is.

use std::collections::HashSet;

use anyhow::{Result, anyhow};

use super::memory::Crew;
use crate::{
    sys::clone::CloneArgs,
    tracee::{Area, List, Op, Placed, RemoteAddr, Want},
};

/// More do not get more out of one address space.
const MOST: usize = 7;

/// All helping threads of a restore.
#[derive(Debug)]
pub(super) struct Fillers {
    /// Ids of the tree and of threads hired.
    taken: HashSet<i32>,
    next: i32,
    size: usize,
    hired: Vec<(RemoteAddr, Placed)>,
}

impl Fillers {
    pub(super) fn new(tree: impl Iterator<Item = i32>) -> Self {
        let max = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok();
        let next = max.and_then(|m| m.trim().parse::<i32>().ok()).unwrap_or(32768) - 1;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { taken: tree.collect(), next, size: (cpus - 1).min(MOST), hired: Vec::new() }
    }

    /// With room for lists.
    pub(super) fn at<'a>(&'a mut self, area: &'a mut Area) -> Hiring<'a> {
        Hiring { fillers: self, area }
    }

    fn free_tid(&mut self) -> i32 {
        while self.taken.contains(&self.next)
            || std::path::Path::new(&format!("/proc/{}", self.next)).exists()
        {
            self.next -= 1;
        }
        self.taken.insert(self.next);
        self.next
    }

    /// Fails when a thread could not do its share.
    pub(super) fn check(&self, area: &Area) -> Result<()> {
        for (slot, list) in &self.hired {
            if let Some(failure) = area.failure(*slot, &[list])? {
                return Err(anyhow!(failure).context("filling of memory"));
            }
        }
        Ok(())
    }
}

/// Hires into one area.
pub(super) struct Hiring<'a> {
    fillers: &'a mut Fillers,
    area: &'a mut Area,
}

impl Crew for Hiring<'_> {
    fn size(&self) -> usize {
        self.fillers.size
    }

    fn hire(&mut self, mut work: List, maker: &mut List) -> Result<RemoteAddr> {
        let done = self.area.alloc(64, 64)?;
        self.area.write(done, &0u32.to_ne_bytes())?;
        let mut end = List::new("end of filling");
        end.op(Op::Post(done, 1));
        end.call("exit", libc::SYS_exit, &[0u64.into()], Want::Any);
        let end = self.area.place(&end)?;
        work.op(Op::Jump(end.start));
        let work = self.area.place(&work)?;
        let slot = self.area.slot()?;
        self.area.arm(slot, work.start, end.start)?;
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let args = CloneArgs { flags: flags as u64, ..CloneArgs::default() };
        let tid = self.fillers.free_tid();
        maker.clone3(format!("clone of a filling thread {tid}"), &args, &[tid], slot);
        self.fillers.hired.push((slot, work));
        Ok(done)
    }
}
