//! What a restore needs to know of a tree, collected process by process, as messages.
//!
//! Everything is looked at that a dump would look at, and nothing is written but what cannot be kept in memory (data in
//! pipes, deleted files). Where the processes come from makes no difference: a dump holds the whole tree, `check -t`
//! one process after another. So both say the same of the same tree.

use std::{
    collections::HashSet,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use anyhow::{Context, Result};

use super::{
    ids::{self, Ids},
    inside::{self, Inside},
    tree::{Check, Process, State},
};
use crate::{
    deadline,
    files::{FileUse, FilesDump},
    finding::Finding,
    image::{Store, pb},
    kept::{Form, Kept},
    mem::{self, AddressSpace, KeptSpace, MappedFile, SharedMemory, VmaFiles},
    ns::{
        threads::Namespaces,
        time::{self, Clocks, TimeDump},
    },
    process_tree::ids::in_tree,
    settings::DumpSettings,
    sys::{
        kcmp::{Kind, kcmp},
        pid::HostPid,
        pidfd,
    },
    task::{
        self,
        robust_list::SharedBytes,
        settle::{Moment, Peek},
    },
    tracee::{GadgetCache, Thread},
};

/// Whether the tree can change while it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// All its threads are held.
    Frozen,
    /// Only the process that is looked at is held; nothing may be touched, even for a moment.
    Running,
}

/// The messages of one living process. Those of all are kept until all are known.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) pid: HostPid,
    pub(super) ids: pb::TaskKobjIdsEntry,
    /// Its areas, as `mm-PID.img` will have them, and which of their pages are wanted; until they are written.
    pub(super) space: Option<KeptSpace>,
    /// `None`: refused, see the findings.
    pub(super) fs: Option<pb::FsEntry>,
    /// Of all its threads, the leader's first.
    pub(super) cores: Vec<(HostPid, Kept<pb::CoreEntry>)>,
    /// Its clocks when its timers were read.
    timers_read: [[u64; 2]; 2],
}

/// All that has been collected of a tree.
pub(super) struct Collected<'s> {
    /// `pstree.img`, parents before children.
    pub(super) pstree: Vec<pb::PstreeEntry>,
    /// Living processes.
    pub(super) tasks: Vec<Task>,
    /// Core images of zombies.
    pub(super) dead: Vec<(HostPid, pb::CoreEntry)>,
    /// Open and mapped files, descriptor tables.
    pub(super) files: FilesDump<'s>,
    /// Objects of shared memory.
    pub(super) shared: SharedMemory,
    pub(super) seccomp: task::seccomp::Dump,
    pub(super) ids: Ids,
    /// What cannot be saved.
    pub(super) findings: Vec<Finding>,
    /// Words in shared files that the kernel clears when threads end.
    pub(super) words: Vec<SharedBytes>,
    /// As the tree reads them; from when all its timers have been read.
    pub(super) clocks: Option<Clocks>,
    /// Of crtool itself.
    pub(super) own_ids: pb::TaskKobjIdsEntry,
    time: TimeDump,
    /// Descriptor tables that have been looked at.
    tables: HashSet<u32>,
    /// Address spaces that have been looked at.
    spaces: HashSet<u32>,
    /// What files are needed for besides being open.
    uses: HashSet<(u32, FileUse)>,
    gadgets: GadgetCache,
    peek: Peek,
    /// How messages are kept.
    pub(super) form: Form,
    settings: &'s DumpSettings,
}

/// Mapped files go where open files go.
struct Mapped<'f, 's>(&'f mut FilesDump<'s>, &'f mut Vec<Finding>);

impl VmaFiles for Mapped<'_, '_> {
    fn mapped_file(
        &mut self,
        mapped: MappedFile<'_>,
    ) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        let writable = mapped.flags & libc::O_ACCMODE == libc::O_RDWR;
        // maps escapes newlines; the link of the descriptor does not.
        let link = nix::fcntl::readlink(format!("/proc/self/fd/{}", mapped.file.as_raw_fd()).as_str());
        let link = link.map_or_else(|_| mapped.path.to_vec(), |l| l.as_bytes().to_vec());
        let id = self.0.file_for(mapped.pid, &link, mapped.file.as_fd(), writable, self.1)?;
        // 0 only beside a finding, which ends the dump.
        Ok(id.unwrap_or(0))
    }
}

impl<'s> Collected<'s> {
    pub(super) fn new(store: &'s dyn Store, settings: &'s DumpSettings, source: Source) -> Self {
        let shared = SharedMemory::new();
        let mut files = match source {
            Source::Frozen => FilesDump::new(store, settings),
            Source::Running => FilesDump::of_running(store, settings),
        };
        files.set_shared_memory(shared.clone());
        let mut ids = Ids::new(source);
        Self {
            pstree: Vec::new(),
            tasks: Vec::new(),
            dead: Vec::new(),
            files,
            shared,
            seccomp: task::seccomp::Dump::default(),
            clocks: None,
            own_ids: ids.own(),
            time: TimeDump::default(),
            ids,
            findings: Vec::new(),
            words: Vec::new(),
            tables: HashSet::new(),
            spaces: HashSet::new(),
            uses: HashSet::new(),
            gadgets: GadgetCache::default(),
            peek: Peek::new(source == Source::Frozen),
            form: Form::Packed,
            settings,
        }
    }

    fn finding(&mut self, pid: HostPid, what: impl Into<String>, reason: impl Into<String>, hint: &str) {
        self.findings.push(Finding { pid, what: what.into(), reason: reason.into(), hint: hint.into() });
    }

    /// Collects one process, which is held. Parents come before their children, the root first.
    pub(super) fn process(&mut self, process: &Process, check: Check<'_>) -> Result<()> {
        let pid = process.pid;
        deadline::looking_at(pid, deadline::Object::Task);
        if self.pstree.is_empty() && process.sid != pid && !self.settings.common.shell_job {
            self.finding(
                pid,
                "session",
                format!(
                    "the root task is no session leader: its session {} is outside the tree",
                    process.sid
                ),
                "use --shell-job, or start the program with setsid",
            );
        }
        self.pstree.push(pstree_entry(process));
        self.findings.extend(process.unheld.iter().cloned());
        if let State::Zombie(status) = process.state {
            self.dead.push((pid, zombie(pid, status)));
            return Ok(());
        }
        if !process.unheld.is_empty() {
            return Ok(());
        }
        let inside = inside::look(process, &mut self.gadgets, check, &mut self.findings)
            .with_context(|| format!("look inside task {pid}"))?;
        let agent = process.agent().context("no thread")?.tid();
        let ids = self.ids.task(agent).with_context(|| format!("kcmp of task {pid}"))?;
        let owns_space = self.relations(process, &ids)?;
        // What looks into its memory cannot be had of one in which nothing may be run.
        let Some(inside) = inside else { return Ok(()) };
        if self.tables.insert(ids.files_id) {
            let fd = task_fd(agent, pid)?;
            self.files
                .table(agent, ids.files_id, fd.as_fd(), &mut self.findings)
                .with_context(|| format!("descriptors of task {pid}"))?;
        }
        let fs =
            self.files.fs(agent, &mut self.findings).with_context(|| format!("directories of task {pid}"))?;
        let mut space =
            self.space(pid, agent, &inside).with_context(|| format!("address space of task {pid}"))?;
        if !owns_space {
            space.without_pages();
        }
        let cores = self.cores(process, &inside).with_context(|| format!("state of task {pid}"))?;
        let timers_read = inside.process.clocks;
        self.words_cleared(agent, &space, &cores).with_context(|| format!("thread ids of task {pid}"))?;
        self.uses.extend(uses_of(&space.entry));
        let space = Some(space.keep(self.form));
        self.tasks.push(Task { pid, ids, space, fs, cores: kept(cores, self.form), timers_read });
        Ok(())
    }

    /// What it shares with other tasks, and with crtool. Says whether its address space was not met before.
    fn relations(&mut self, process: &Process, ids: &pb::TaskKobjIdsEntry) -> Result<bool> {
        let pid = process.pid;
        for name in ids::foreign(ids, &self.own_ids) {
            self.finding(
                pid,
                format!("{name} namespace"),
                "it is another one than crtool's; namespaces are not supported yet",
                "run crtool inside them (nsenter)",
            );
        }
        let is_new = self.spaces.insert(ids.vm_id);
        if process.ppid != HostPid::NONE && process.exit_signal != libc::SIGCHLD {
            self.finding(
                pid,
                "exit signal",
                format!("its end is told by signal {}, for which images have no place", process.exit_signal),
                "",
            );
        }
        let mut tids = process.threads.iter().map(Thread::tid);
        let agent = tids.next().unwrap_or(pid);
        let namespaces = Namespaces::of(pid, agent);
        if let Some(namespaces) = &namespaces {
            self.time.thread(pid, agent, namespaces, &mut self.findings);
            namespaces.prepared(pid, agent, &mut self.findings);
        }
        for tid in tids {
            if let (Some(of_process), Some(own)) = (&namespaces, Namespaces::of(pid, tid)) {
                self.time.thread(pid, tid, &own, &mut self.findings);
                own.compare(of_process, pid, tid, &mut self.findings);
                own.prepared(pid, tid, &mut self.findings);
            }
            for (kind, what) in
                [(Kind::Files, "descriptor table"), (Kind::Fs, "current directory, root and umask")]
            {
                let same = kcmp(agent, tid, kind, 0, 0).with_context(|| format!("kcmp of thread {tid}"))?;
                if same.is_ne() {
                    let what = format!("thread {tid}: {what}");
                    let reason = "its own (unshare): images have a place for those of a process only";
                    self.finding(pid, what, reason, "");
                }
            }
        }
        Ok(is_new)
    }

    fn space(&mut self, pid: HostPid, agent: HostPid, inside: &Inside) -> Result<AddressSpace> {
        let exe = self.files.link_of_task(agent, "exe", &mut self.findings).context("program")?;
        let task = mem::Task {
            pid,
            tid: agent,
            brk: inside.process.brk,
            dumpable: i32::try_from(inside.process.dumpable).unwrap_or(0),
            thp_disable: inside.process.thp_disable,
            exe_file_id: exe.unwrap_or(0),
            ours: Vec::new(),
            inside: inside.memory.clone(),
        };
        let mut in_files = Vec::new();
        let mut mapped = Mapped(&mut self.files, &mut in_files);
        let space = mem::collect(&task, &mut mapped, &self.shared, &mut self.findings)?;
        self.findings.append(&mut in_files);
        Ok(space)
    }

    /// Words that are cleared at the end of threads, where files are mapped shared.
    fn words_cleared(
        &mut self,
        agent: HostPid,
        space: &AddressSpace,
        cores: &[(HostPid, pb::CoreEntry)],
    ) -> Result<()> {
        let shared = |area: &&pb::VmaEntry| area.status & mem::vma::FILE_SHARED != 0;
        let areas: Vec<_> = space.entry.vmas.iter().filter(shared).collect();
        let words = cores.iter().filter_map(|(_, core)| Some(core.thread_info.as_ref()?.clear_tid_addr));
        for at in words.filter(|at| *at != 0 && !areas.is_empty()) {
            for area in &areas {
                self.words.extend(SharedBytes::of(agent, (area.start, area.end, area.pgoff), at, 4)?);
            }
        }
        Ok(())
    }

    fn cores(&mut self, process: &Process, inside: &Inside) -> Result<Vec<(HostPid, pb::CoreEntry)>> {
        let agent = process.agent().context("no thread")?;
        let stop_signal = match process.state {
            State::Stopped(signal) => Some(signal),
            _ => None,
        };
        let mut tc = Some(task::dump_process(
            &task::ProcessCx {
                pid: process.pid,
                tid: agent.tid(),
                threads: process.threads.len(),
                sigmask: agent.sigmask,
                stop_signal,
                leads_session: process.sid == process.pid,
                inside: inside.process.clone(),
            },
            &mut self.findings,
        )?);
        let mut cores = Vec::with_capacity(process.threads.len() + usize::from(process.dead_leader));
        for (thread, inside_thread) in process.threads.iter().zip(&inside.threads) {
            let cx = task::ThreadCx {
                pid: process.pid,
                tid: thread.tid(),
                regs: thread.regs,
                xstate: thread.xstate.whole(),
                sigmask: thread.sigmask,
                restarting: inside.process.restarting(),
                inside: inside_thread.clone(),
            };
            let parts = task::dump_thread(&cx, &mut self.seccomp, &mut self.findings)
                .with_context(|| format!("thread {}", thread.tid()))?;
            let mut core = pb::CoreEntry {
                mtype: pb::core_entry::March::X8664 as i32,
                thread_info: Some(Box::new(parts.info)),
                thread_core: Some(Box::new(parts.core)),
                ..Default::default()
            };
            if process.dead_leader && cores.is_empty() {
                let dead = inside::dead_leader(process, &core, inside.exit_gadget)?;
                let tc = tc.take().map(Box::new);
                cores.push((process.pid, pb::CoreEntry { tc, ..dead }));
            }
            core.tc = tc.take().map(Box::new);
            cores.push((thread.tid(), core));
        }
        Ok(cores)
    }

    /// Before anything is stopped: what takes a while and may be needed of the processes `pids`.
    pub(super) fn prepare(&self, pids: &[HostPid]) {
        self.peek.prepare(pids);
    }

    /// After the last process: what only all of them together tell.
    pub(super) fn complete(&mut self) -> Result<()> {
        let (own, clocks) = self.time.clocks().context("clocks of the tree")?;
        // Only for what is carried where it can be told.
        let host = time::of_host(own).inspect_err(|e| tracing::debug!("clocks of the host: {e}")).ok();
        let moment = Moment::new(clocks, host, &self.peek);
        for task in &mut self.tasks {
            let cores = std::mem::take(&mut task.cores).into_iter();
            let mut cores: Vec<_> = cores.map(|(tid, core)| (tid, core.into_message())).collect();
            moment.settle(&mut cores, task.timers_read);
            task.cores = kept(cores, self.form);
        }
        self.clocks = Some(clocks);
        self.files.complete(own.monotonic, &mut self.findings).context("open files")?;
        self.files.would_restore(&self.uses, &mut self.findings).context("whether open files can be restored")
    }

    /// All that stands in the way of a dump, each said once.
    pub(super) fn findings(&mut self) -> Vec<Finding> {
        let mut seen = HashSet::new();
        let mut findings = std::mem::take(&mut self.findings);
        findings.retain(|finding| seen.insert(finding.to_string()));
        findings
    }
}

/// The program of an address space, and the files whose code it has mapped.
fn uses_of(entry: &pb::MmEntry) -> impl Iterator<Item = (u32, FileUse)> + '_ {
    let code = |vma: &&pb::VmaEntry| {
        vma.status & (mem::vma::FILE_PRIVATE | mem::vma::FILE_SHARED) != 0
            && vma.prot & libc::PROT_EXEC.cast_unsigned() != 0
    };
    let mapped = entry.vmas.iter().filter(code).filter_map(|vma| u32::try_from(vma.shmid).ok());
    let program = (entry.exe_file_id, FileUse::Program);
    std::iter::once(program).chain(mapped.map(|id| (id, FileUse::Code)))
}

fn kept(cores: Vec<(HostPid, pb::CoreEntry)>, form: Form) -> Vec<(HostPid, Kept<pb::CoreEntry>)> {
    cores.into_iter().map(|(tid, core)| (tid, Kept::new(core, form))).collect()
}

fn pstree_entry(process: &Process) -> pb::PstreeEntry {
    let mut threads: Vec<u32> = process.threads.iter().map(|t| in_tree(t.tid()).bits()).collect();
    if process.dead_leader || threads.is_empty() {
        threads.insert(0, in_tree(process.pid).bits());
    }
    pb::PstreeEntry {
        pid: in_tree(process.pid).bits(),
        ppid: in_tree(process.ppid).bits(),
        pgid: in_tree(process.pgid).bits(),
        sid: in_tree(process.sid).bits(),
        threads,
    }
}

/// A pidfd for pidfd_getfd: of the process, or of a thread when the leader is dead.
fn task_fd(tid: HostPid, pid: HostPid) -> Result<OwnedFd> {
    let flags = if tid == pid { 0 } else { pidfd::PIDFD_THREAD };
    pidfd::open(tid.get(), flags).with_context(|| format!("pidfd of task {pid}"))
}

/// The core image of a zombie.
fn zombie(pid: HostPid, status: i32) -> pb::CoreEntry {
    pb::CoreEntry {
        mtype: pb::core_entry::March::X8664 as i32,
        tc: Some(Box::new(pb::TaskCoreEntry {
            task_state: task::TASK_DEAD,
            exit_code: status.cast_unsigned(),
            comm: std::fs::read(format!("/proc/{pid}/comm"))
                .map(|c| c.trim_ascii_end().to_vec())
                .unwrap_or_default(),
            ..Default::default()
        })),
        ..Default::default()
    }
}
