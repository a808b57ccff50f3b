//! What is decided before anything is made: who forks whom, and where the lists of all processes lie.

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::{Pid, getpgrp, getsid};

use super::{
    images::{Images, State, Task},
    puppets::Place,
};
use crate::{
    image::pb,
    process_tree::{self, ForkPlan, Listed, Outside, Sharing, ids::in_tree},
    settings::RestoreSettings,
    sys::pid::HostPid,
    tracee::{
        RemoteAddr,
        room::{self, Need, Used},
    },
};

impl Task {
    /// What it shares; `None` for a zombie.
    fn sharing(&self) -> Option<Sharing> {
        let pb::TaskKobjIdsEntry { vm_id: vm, sighand_id: sighand, files_id: files, fs_id: fs, .. } =
            self.ids;
        (!self.is_zombie()).then_some(Sharing { vm, sighand, files, fs })
    }
}

/// Who makes whom; with `--shell-job` what came from outside is replaced by our own session and group.
pub(super) fn forks(images: &Images, settings: &RestoreSettings) -> Result<ForkPlan> {
    let root = images.tasks.first().context("no task")?;
    let own = |id: Pid| in_tree(HostPid::new(id.as_raw()));
    let outside = Outside { sid: own(getsid(None)?), pgid: own(getpgrp()) };
    if (root.sid != root.pid || root.pgid != root.pid) && !settings.common.shell_job {
        bail!(
            "task {}: its session {} and group {} come from outside the tree; restore with --shell-job to use \
             those of crtool",
            root.pid,
            root.sid,
            root.pgid
        );
    }
    let listed: Vec<Listed> = images
        .tasks
        .iter()
        .map(|t| Listed { pid: t.pid, ppid: t.ppid, pgid: t.pgid, sid: t.sid, sharing: t.sharing() })
        .collect();
    let shapes = process_tree::shapes(&listed, outside);
    let mut forks = process_tree::plan(&shapes, outside)
        .map_err(|error| anyhow!(error).context("this shape of a tree cannot be made"))?;
    if settings.detached && !settings.sibling && must_not_be_our_child(root, images) {
        forks.add_intermediate_parent();
    }
    Ok(forks)
}

/// Whether the end of crtool, which does not stay, would be felt by the root: as its parent's end by a parent-death signal,
/// or by stopped tasks in the session of crtool, whose group it leaves orphaned.
fn must_not_be_our_child(root: &Task, images: &Images) -> bool {
    let asks = |core: &pb::CoreEntry| {
        core.thread_core.as_ref().is_some_and(|c| c.pdeath_sig.is_some_and(|signal| signal != 0))
    };
    let stopped = images.tasks.iter().any(|task| task.state == State::Stopped);
    root.threads().any(|(_, core)| asks(&core)) || (stopped && root.sid != root.pid)
}

/// What decides where lists are to lie.
#[derive(Debug, Default)]
pub(super) struct Areas {
    used: Used,
    need: Need,
}

impl Areas {
    /// Adds the address space of a task that has so many threads.
    pub(super) fn add(&mut self, mm: &pb::MmEntry, threads: usize) {
        self.used.add(mm.vmas.iter().map(|v| (v.start, v.end)));
        self.need.mappings = self.need.mappings.max(mm.vmas.len() as u64);
        self.need.threads = self.need.threads.max(threads as u64);
    }

    /// Where lists are to lie: where no task of the tree will have anything, nor have we. With it the whole range that must
    /// be left alone.
    pub(super) fn place(mut self) -> Result<(Place, (u64, u64))> {
        self.used.add(crate::tracee::read_maps(HostPid::own())?.iter().map(|v| (v.start, v.end)));
        match room::place(self.used.ranges(), self.need) {
            Ok(room::Place { room, at, len }) => {
                tracing::debug!("lists at {at:#x}");
                Ok((Place { at: RemoteAddr(at), len: usize::try_from(len)? }, (room, at + len)))
            }
            Err(bytes) => bail!(
                "no address is free in all tasks of the tree: {} MiB are needed, at the same place in each",
                bytes.div_ceil(1 << 20)
            ),
        }
    }
}
