//! Whether a restore could make the tree again: the restore's own planning, on the messages that the dump is going to write.
//!
//! A tree is ended once it is saved, so what a restore would refuse has to be known before. What depends on the tree alone stops
//! every dump. What depends on this host (its limits, ids that others have) stops a dump that is going to be restored here, and is
//! a warning when the images go to another one. Files have their own checks ([`crate::files`]).

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::unistd::{Pid, getpgid, getpgrp, getsid};

use super::collect::Collected;
use crate::{
    finding::Finding,
    image::pb,
    mem::{KeptSpace, pkeys, vma},
    proc::{
        limits::{self, Limit},
        stat::{Stat, State},
    },
    process_tree::{
        self, ForkPlan, Listed, Outside, Sharing,
        ids::{in_tree, on_host},
    },
    settings::{DumpSettings, Leave},
    sys::pid::{HostPid, NsPid},
    task::{self, Supervisor, TaskError, seccomp},
    tracee::{
        List, procfs,
        room::{self, AREA_MAPPINGS, Need, Used},
    },
};

/// Adds what stands in the way of a restore to the findings of `collected`.
pub(super) fn check(collected: &mut Collected<'_>, settings: &DumpSettings) -> Result<()> {
    let mut checks = Checks { findings: Vec::new(), host: Vec::new(), ends: settings.leave == Leave::Killed };
    if let Some(forks) = checks.forks(collected)? {
        checks.ids_of_leaders(&forks, collected)?;
    }
    checks.tasks(collected)?;
    let Checks { findings, host, .. } = checks;
    collected.findings.extend(findings);
    if settings.remote.is_none() {
        collected.findings.extend(host);
    } else {
        for finding in host {
            tracing::warn!("it could not be restored on this host: {finding}");
        }
    }
    Ok(())
}

struct Checks {
    /// About the tree.
    findings: Vec<Finding>,
    /// About this host.
    host: Vec<Finding>,
    /// The tree is going to be ended.
    ends: bool,
}

/// How long a process that has ended may be listed: until its parent gets a processor.
const REAP_PATIENCE: Duration = Duration::from_millis(300);

/// The id of those that are `taken` which process `pid` has, or is in a session or group of.
fn held_by(pid: HostPid, taken: &dyn Fn(&HostPid) -> bool) -> Option<HostPid> {
    let begun = Instant::now();
    loop {
        let of = Some(Pid::from_raw(pid.get()));
        let ids = [of, getsid(of).ok(), getpgid(of).ok()];
        let id = ids.into_iter().flatten().map(|id| HostPid::new(id.as_raw())).find(taken)?;
        let ended = procfs::stat(pid).is_ok_and(|stat| matches!(stat.state, State::Zombie | State::Dead));
        if !ended || begun.elapsed() > REAP_PATIENCE {
            return Some(id);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether somebody of the tree is a forefather of the process with this `stat`.
fn descends(stat: &Stat, inside: &BTreeSet<HostPid>) -> bool {
    let mut parent = stat.ppid;
    // Ids may be used again while they are followed, so the chain might have no end.
    for _ in 0..4096 {
        if inside.contains(&parent) {
            return true;
        }
        match procfs::stat(parent) {
            Ok(stat) if parent > HostPid::NONE => parent = stat.ppid,
            _ => return false,
        }
    }
    false
}

fn finding(pid: HostPid, what: impl Into<String>, reason: impl Into<String>, hint: &str) -> Finding {
    Finding { pid, what: what.into(), reason: reason.into(), hint: hint.into() }
}

/// How crtool sees a task that is going to be in the images.
fn pid_of(entry: &pb::PstreeEntry) -> HostPid {
    on_host(NsPid::new(entry.pid.cast_signed()))
}

/// What this host allows, and what crtool may do on it.
struct Here {
    /// Most mappings of one address space.
    mappings: usize,
    limits: [Limit; 16],
    supervisor: Supervisor,
}

impl Here {
    fn read() -> Result<Self> {
        let path = "/proc/sys/vm/max_map_count";
        let mappings = std::fs::read_to_string(path).context(path)?.trim().parse().context(path)?;
        let limits = std::fs::read("/proc/self/limits").context("limits of crtool")?;
        let limits = limits::parse(&limits).context("limits of crtool")?;
        let supervisor = Supervisor::probe().context("state of crtool")?;
        Ok(Self { mappings, limits, supervisor })
    }

    fn hard(&self, resource: libc::__rlimit_resource_t) -> u64 {
        self.limits.get(resource as usize).map_or(u64::MAX, |Limit { max, .. }| *max)
    }
}

impl Checks {
    /// Who would fork whom; `None` if that is not known, or cannot be.
    fn forks(&mut self, collected: &Collected<'_>) -> Result<Option<ForkPlan>> {
        let tasks: BTreeMap<NsPid, &pb::TaskKobjIdsEntry> =
            collected.tasks.iter().map(|task| (in_tree(task.pid), &task.ids)).collect();
        let dead: BTreeSet<NsPid> = collected.dead.iter().map(|(pid, _)| in_tree(*pid)).collect();
        let mut listed = Vec::with_capacity(collected.pstree.len());
        for entry in &collected.pstree {
            let [pid, ppid, pgid, sid] =
                [entry.pid, entry.ppid, entry.pgid, entry.sid].map(|id| NsPid::new(id.cast_signed()));
            let sharing = tasks.get(&pid).map(|ids| Sharing {
                vm: ids.vm_id,
                sighand: ids.sighand_id,
                files: ids.files_id,
                fs: ids.fs_id,
            });
            if sharing.is_none() && !dead.contains(&pid) {
                // It was refused, or is gone: there is a finding about it already.
                return Ok(None);
            }
            listed.push(Listed { pid, ppid, pgid, sid, sharing });
        }
        let own = |id: Pid| in_tree(HostPid::new(id.as_raw()));
        let outside = Outside { sid: own(getsid(None)?), pgid: own(getpgrp()) };
        match process_tree::plan(&process_tree::shapes(&listed, outside), outside) {
            Ok(forks) => Ok(Some(forks)),
            Err(error) => {
                let reason = format!("this shape of a tree cannot be made again: {}", error.reason);
                self.findings.push(finding(on_host(error.pid), "process tree", reason, ""));
                Ok(None)
            }
        }
    }

    /// Ids of sessions and groups, which somebody outside of the tree who is in such a one keeps taken: those of dead leaders, which
    /// helpers must have, and those of the tree itself once it has ended (its orphans that init has adopted, the other end of
    /// a pipeline).
    fn ids_of_leaders(&mut self, forks: &ForkPlan, collected: &Collected<'_>) -> Result<()> {
        let dead: BTreeSet<HostPid> = forks.ids_of_the_dead().map(on_host).collect();
        let inside: BTreeSet<HostPid> = collected.pstree.iter().map(pid_of).collect();
        let root = collected.pstree.first().map_or(HostPid::NONE, pid_of);
        for entry in std::fs::read_dir("/proc").context("list of processes")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).map(HostPid::new)
            else {
                continue;
            };
            if inside.contains(&pid) {
                continue;
            }
            let taken = |id: &HostPid| dead.contains(id) || inside.contains(id);
            let Some(id) = held_by(pid, &taken) else { continue };
            // Who ends meanwhile is in nobody's way; nor is who is in the tree, and was made since a running one was looked at.
            let Ok(stat) = procfs::stat(pid) else { continue };
            if descends(&stat, &inside) {
                continue;
            }
            let name = String::from_utf8_lossy(&stat.comm).into_owned();
            let what = format!("session or process group {id}");
            if dead.contains(&id) {
                let reason = format!(
                    "it is that of a leader outside of the tree; process {pid} ({name}) keeps it taken, so that the tasks \
                     which are in it could not be restored here"
                );
                let hint = "end that process first, or dump a tree that holds it";
                self.host.push(finding(root, what, reason, hint));
            } else if self.ends {
                let reason = format!(
                    "process {pid} ({name}) is in it and outside of the tree, and would keep the id of task {id} taken when \
                     the tree has ended, so that it could not be restored here"
                );
                let hint = "end that process first, or dump a tree that holds it";
                self.host.push(finding(id, what, reason, hint));
            } else {
                continue;
            }
            break;
        }
        Ok(())
    }

    /// Each task, whose messages are decoded for that once.
    fn tasks(&mut self, collected: &Collected<'_>) -> Result<()> {
        let here = Here::read()?;
        let root = collected.pstree.first().map_or(HostPid::NONE, pid_of);
        let mut seccomp = match seccomp::Plan::new(collected.seccomp.entry()) {
            Ok(plan) => plan,
            Err(error) => return self.task_error(root, error),
        };
        let (mut used, mut need) = (Used::default(), Need::default());
        for task in &collected.tasks {
            let Some(mm) = task.space.as_ref().map(KeptSpace::entry) else { continue };
            used.add(mm.vmas.iter().map(|v| (v.start, v.end)));
            need.mappings = need.mappings.max(mm.vmas.len() as u64);
            need.threads = need.threads.max(task.cores.len() as u64);
            self.mappings(task.pid, &mm, &here);
            self.address_space(task.pid, &mm, &here);
            let cores: Vec<_> = task.cores.iter().map(|(tid, core)| (*tid, core.message())).collect();
            self.state(task.pid, &mm, &cores, &here.supervisor, &mut seccomp)?;
        }
        self.room(root, &used, need);
        Ok(())
    }

    /// Room for lists.
    fn room(&mut self, root: HostPid, used: &Used, need: Need) {
        if let Err(bytes) = room::place(used.ranges(), need) {
            let reason = format!(
                "a restore needs {} MiB of addresses that are free at the same place in all tasks",
                bytes.div_ceil(1 << 20)
            );
            self.findings.push(finding(root, "address space", reason, ""));
        }
    }

    /// The number of mappings, and what they are.
    fn mappings(&mut self, pid: HostPid, mm: &pb::MmEntry, here: &Here) {
        if let Err(error) = vma::check(mm, in_tree(pid)) {
            self.findings.push(finding(pid, "address space", format!("{error:#}"), ""));
        }
        // Guards are no mappings of their own, nor is the vsyscall page one of the task's.
        let own = |v: &&pb::VmaEntry| v.status & (vma::GUARD | vma::VSYSCALL) == 0;
        let count = mm.vmas.iter().filter(own).count();
        if count + AREA_MAPPINGS > here.mappings {
            let reason = format!(
                "{count} mappings, and a restore needs {AREA_MAPPINGS} more; this host allows {} in all",
                here.mappings
            );
            self.host.push(finding(pid, "address space", reason, "raise vm.max_map_count"));
        }
    }

    /// Limits of crtool's that tasks have until they have their own.
    fn address_space(&mut self, pid: HostPid, mm: &pb::MmEntry, here: &Here) {
        let sum = |of: &dyn Fn(&pb::VmaEntry) -> bool| -> u64 {
            let lens = mm.vmas.iter().filter(|v| v.status & (vma::VSYSCALL | vma::GUARD) == 0 && of(v));
            lens.map(|v| v.end - v.start).sum()
        };
        let private = libc::MAP_PRIVATE.cast_unsigned();
        for (name, resource, bytes) in [
            ("RLIMIT_AS", libc::RLIMIT_AS, sum(&|_| true)),
            ("RLIMIT_DATA", libc::RLIMIT_DATA, sum(&|v| v.flags & private != 0)),
        ] {
            // The area comes on top.
            let needed = bytes.saturating_add(16 << 20);
            let hard = here.hard(resource);
            if needed > hard {
                let reason = format!(
                    "a restore needs {} MiB of {name}, and crtool may have {} MiB here",
                    needed.div_ceil(1 << 20),
                    hard >> 20
                );
                self.host.push(finding(pid, "address space", reason, "start crtool without that limit"));
            }
        }
    }

    /// What a task is besides memory and files.
    fn state(
        &mut self,
        pid: HostPid,
        mm: &pb::MmEntry,
        cores: &[(HostPid, Cow<'_, pb::CoreEntry>)],
        supervisor: &Supervisor,
        seccomp: &mut seccomp::Plan,
    ) -> Result<()> {
        let mut list = List::new("what a restore would do");
        let mut plans = || -> Result<(), TaskError> {
            seccomp.process(in_tree(pid), cores.iter().map(|(_, core)| core.as_ref()))?;
            let (_, leader) = cores.first().ok_or_else(|| TaskError::image("no thread"))?;
            task::plan_process_early(leader, supervisor, &mut list)?;
            task::plan_process(leader, mm, supervisor, &mut list)?;
            for (tid, core) in cores {
                task::final_state(core)?;
                task::pending_signals(core)?;
                let plan =
                    task::ThreadPlan { core, pid: in_tree(pid), tid: in_tree(*tid), seccomp, supervisor };
                task::plan_thread(&plan, &mut list)?;
            }
            task::dumpable_to_set(mm.dumpable.unwrap_or(1)).map(drop)
        };
        if let Err(error) = plans() {
            self.task_error(pid, error)?;
        }
        let knows_keys = cores.iter().any(|(_, core)| pkeys::known_to(core));
        if let Err(error) = pkeys::plan(mm, in_tree(pid), knows_keys) {
            self.host.push(finding(pid, "address space", error.to_string(), ""));
        }
        Ok(())
    }

    fn task_error(&mut self, pid: HostPid, error: TaskError) -> Result<()> {
        match error {
            TaskError::Unsupported { what, reason } => {
                self.host.push(finding(pid, what, format!("it could not be restored here: {reason}"), ""));
                Ok(())
            }
            other => Err(anyhow::anyhow!(other).context(format!("what a restore would make of task {pid}"))),
        }
    }
}
