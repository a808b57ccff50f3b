//! The terminal of a job that is restored in the foreground of a shell.

use anyhow::{Context, Result};
use nix::unistd::getpgrp;

use super::images::Images;
use crate::{
    files::{FilesRestore, JobGroups, JobTerminal},
    process_tree::ids::on_host,
    settings::RestoreSettings,
    sys::pid::{HostPid, NsPid},
};

/// The terminal, for a caller who stays with the tree: the shell takes it back as soon as crtool ends. `None` for a tree with
/// a session of its own.
pub(super) fn terminal(
    images: &Images,
    settings: &RestoreSettings,
    files: &mut FilesRestore<'_>,
) -> Result<Option<JobTerminal>> {
    let root = images.tasks.first().context("no task")?;
    if settings.detached || settings.exec_cmd.is_some() || root.sid == root.pid {
        return Ok(None);
    }
    let ours = HostPid::new(getpgrp().as_raw());
    let now = |group: NsPid| {
        if group == root.sid || group == root.pgid && root.pgid != root.pid { ours } else { on_host(group) }
    };
    let alive = images.tasks.iter().filter(|task| !task.is_zombie());
    let all = alive.map(|task| (task.pgid, now(task.pgid))).collect();
    files.job_terminal(&JobGroups { root: now(root.pgid), all }).context("terminal of the job")
}
