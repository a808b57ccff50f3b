//! A dump: freeze, look inside, collect, write, commit or undo.
//!
//! This module knows the order only. Until the end is decided at the very end, every early return lets the
//! tree go on as it was: [`Tree`] detaches when dropped, the store removes what was written.

mod finish;
mod ids;
mod inside;
mod survey;
mod tree;

pub use survey::check_tree;

use std::{
    collections::HashMap,
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    time::Instant,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::Pid;

use self::{
    ids::Ids,
    inside::Inside,
    tree::{Process, State, Tree},
};
use crate::{
    action::{self, Action, ActionScripts},
    cpuinfo,
    files::FilesDump,
    finding::Finding,
    image::{DirStore, ImageKind, Store, TypedStore, pb},
    interrupt,
    mem::{self, AddressSpace, MappedFile, MemoryDump, SharedMemory, VmaFiles},
    settings::{DumpSettings, Leave},
    stats::DumpStats,
    sys::{
        kcmp::{Kind, kcmp},
        pidfd,
        ticker::Ticker,
    },
    task,
};

/// Version of the format, `inventory_entry.img_version`.
const IMAGE_VERSION: u32 = 2;

/// What cannot be saved, all of it.
#[derive(Debug, thiserror::Error)]
#[error("the tree cannot be dumped; it runs on as before:{}", lines(.0))]
pub struct Refused(pub Vec<Finding>);

fn lines(findings: &[Finding]) -> String {
    findings.iter().map(|f| format!("\n  {f}")).collect()
}

/// The tree is gone and its snapshot is complete, but the cache could not be told.
#[derive(Debug, thiserror::Error)]
#[error(
    "the tree is killed and the cache has all of it, but could not be told so: look there with \
     `crtool image-cache list`, and if the snapshot is in doubt, `crtool image-cache release` makes it restorable"
)]
pub struct Unconfirmed;

/// Dumps a tree into a directory.
pub fn dump(settings: &DumpSettings) -> Result<DumpStats> {
    let store = DirStore::for_dump(&settings.common.images_dir)?;
    dump_to(&store, settings)
}

/// Dumps a tree into `store`, and commits it.
pub fn dump_to(store: &dyn Store, settings: &DumpSettings) -> Result<DumpStats> {
    let pid = settings.pid.as_raw();
    let scripts = &settings.common.action_scripts;
    let root = Some(settings.pid);
    look_at_root(pid)?;
    action::run(scripts, Action::PreDump, root)?;
    let mut collected = Collected::new(store, settings);
    collected.memory.reserve(pid).context("room for the pages")?;
    let _ticker = Ticker::start()?;
    let check = tree::checker(settings.timeout);
    let mut stats = DumpStats::default();

    let freezing = Instant::now();
    let tree = Tree::freeze(pid, &check).context("freeze of the tree")?;
    stats.freezing_time = freezing.elapsed();
    let frozen = Instant::now();
    if tree.processes.first().is_some_and(|p| p.threads.is_empty()) {
        bail!("task {pid} is dead (a zombie): there is nothing to dump; its parent has not reaped it");
    }

    collected.look_inside(&tree, &check)?;
    collected.objects(&tree)?;
    collected.refuse()?;

    let memory = Instant::now();
    collected.write_memory(&mut stats)?;
    stats.memdump_time = memory.elapsed();
    collected.write_tasks(&tree, settings)?;
    tree.verify().context("the tree changed while it was frozen")?;
    // The time limit is for the collection: pages may take as long as they take.
    interrupt::check()?;
    cpuinfo::write(store, settings.common.cpu_cap)?;
    write_inventory(store, &mut collected.ids)?;
    if let Some(root) = tree.processes.first() {
        store.guard(pidfd::open(root.pid, 0).context("pidfd of the root")?.as_fd())?;
    }
    store.commit()?;
    // After this nothing can be taken back.
    if let Err(error) = post_dump(store, scripts, root) {
        store.withdraw()?;
        return Err(error);
    }
    collected.files.commit();
    stats.frozen_time = frozen.elapsed();
    finish::decide(tree, settings.leave, &|survives| Ok(store.confirm(survives)?))?;
    if settings.leave != Leave::Killed {
        // Killed tasks are frozen no more; what takes time is their parents' asking for them.
        stats.frozen_time = frozen.elapsed();
    }
    Ok(stats)
}

/// Runs the scripts that want to see all images, and looks what has happened in the time they took.
fn post_dump(store: &dyn Store, scripts: &ActionScripts, root: Option<Pid>) -> Result<()> {
    action::run(scripts, Action::PostDump, root)?;
    interrupt::check()?;
    if !scripts.scripts.is_empty() {
        store.recheck()?;
    }
    Ok(())
}

/// What can be said about a pid that is no tree to dump, before anybody is bothered with it.
pub fn look_at_root(pid: i32) -> Result<()> {
    /// PF_KTHREAD.
    const KERNEL: u32 = 0x0020_0000;
    let stat = match std::fs::read(format!("/proc/{pid}/stat")) {
        Ok(bytes) => crate::proc::stat::parse(&bytes)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!("no process has pid {pid}"),
        // Said better by what looks at it again.
        Err(_) => return not_ourselves(pid),
    };
    if stat.flags & KERNEL != 0 {
        bail!("task {pid} is a thread of the kernel: there is nothing to dump");
    }
    not_ourselves(pid)
}

fn not_ourselves(pid: i32) -> Result<()> {
    let mut at = std::process::id().cast_signed();
    while at > 0 {
        if at == pid {
            bail!("task {pid} is crtool itself or one of its ancestors: it cannot be frozen from within");
        }
        let Ok(bytes) = std::fs::read(format!("/proc/{at}/stat")) else { break };
        at = crate::proc::stat::parse(&bytes)?.ppid;
    }
    Ok(())
}

/// What one process is, ready to be written.
struct Ready {
    ids: pb::TaskKobjIdsEntry,
    space: Option<AddressSpace>,
    fs: Option<pb::FsEntry>,
    cores: Vec<(i32, pb::CoreEntry)>,
}

struct Collected<'s> {
    files: FilesDump<'s>,
    shared: SharedMemory,
    memory: MemoryDump<'s>,
    seccomp: task::seccomp::Dump,
    ids: Ids,
    inside: HashMap<i32, Inside>,
    ready: Vec<(i32, Ready)>,
    findings: Vec<Finding>,
    store: &'s dyn Store,
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
    fn new(store: &'s dyn Store, settings: &'s DumpSettings) -> Self {
        let shared = SharedMemory::new();
        let mut files = FilesDump::new(store, settings);
        files.set_shared_memory(shared.clone());
        Self {
            files,
            shared,
            memory: MemoryDump::new(store),
            seccomp: task::seccomp::Dump::default(),
            ids: Ids::new(),
            inside: HashMap::new(),
            ready: Vec::new(),
            findings: Vec::new(),
            store,
            settings,
        }
    }

    fn finding(&mut self, pid: i32, what: impl Into<String>, reason: impl Into<String>, hint: &str) {
        self.findings.push(Finding { pid, what: what.into(), reason: reason.into(), hint: hint.into() });
    }

    /// Runs the queries in every task.
    fn look_inside(
        &mut self,
        tree: &Tree,
        check: &dyn Fn() -> Result<(), crate::tracee::TraceError>,
    ) -> Result<()> {
        if let Some(root) = tree.processes.first()
            && root.sid != root.pid
            && !self.settings.common.shell_job
        {
            self.finding(
                root.pid,
                "session",
                format!("the root task is no session leader: its session {} is outside the tree", root.sid),
                "use --shell-job, or start the program with setsid",
            );
        }
        let mut cache = crate::tracee::GadgetCache::default();
        for process in tree.processes.iter().filter(|p| !p.threads.is_empty()) {
            if let Some(inside) = inside::look(process, &mut cache, check, &mut self.findings)
                .with_context(|| format!("look inside task {}", process.pid))?
            {
                self.inside.insert(process.pid, inside);
            }
        }
        Ok(())
    }

    /// Ids, descriptors, address spaces and cores of all tasks.
    fn objects(&mut self, tree: &Tree) -> Result<()> {
        let own = self.ids.own();
        let mut tables = HashMap::new();
        let mut spaces: HashMap<u32, i32> = HashMap::new();
        for process in &tree.processes {
            let Some(agent) = process.agent().map(crate::tracee::Thread::tid) else { continue };
            let pid = process.pid;
            let ids = self.ids.task(agent).with_context(|| format!("kcmp of task {pid}"))?;
            for name in ids::foreign(&ids, &own) {
                self.finding(
                    pid,
                    format!("{name} namespace"),
                    "it is another one than crtool's; namespaces are not supported yet",
                    "run crtool inside them (nsenter)",
                );
            }
            let mut owns_space = true;
            if let Some(other) = spaces.get(&ids.vm_id).copied() {
                owns_space = false;
                if other != process.ppid {
                    let reason = format!("shared with task {other}, which is not its parent (CLONE_VM)");
                    self.finding(pid, "address space", reason, "");
                }
            }
            spaces.insert(ids.vm_id, pid);
            if process.ppid != 0 && process.exit_signal != libc::SIGCHLD {
                self.finding(
                    pid,
                    "exit signal",
                    format!(
                        "its end is told by signal {}, for which images have no place",
                        process.exit_signal
                    ),
                    "",
                );
            }
            for tid in process.threads.iter().map(crate::tracee::Thread::tid).filter(|t| *t != agent) {
                for (kind, what) in
                    [(Kind::Files, "descriptor table"), (Kind::Fs, "current directory, root and umask")]
                {
                    let same =
                        kcmp(agent, tid, kind, 0, 0).with_context(|| format!("kcmp of thread {tid}"))?;
                    if same.is_ne() {
                        let what = format!("thread {tid}: {what}");
                        let reason = "its own (unshare): images have a place for those of a process only";
                        self.finding(pid, what, reason, "");
                    }
                }
            }
            let Some(inside) = self.inside.remove(&pid) else { continue };
            if let std::collections::hash_map::Entry::Vacant(new) = tables.entry(ids.files_id) {
                new.insert(pid);
                let fd = task_fd(agent, pid)?;
                self.files
                    .table(agent, ids.files_id, fd.as_fd(), &mut self.findings)
                    .with_context(|| format!("descriptors of task {pid}"))?;
            }
            let fs = self.files.fs(agent, &mut self.findings).with_context(|| format!("fs of task {pid}"))?;
            let exe = self
                .files
                .link_of_task(agent, "exe", &mut self.findings)
                .with_context(|| format!("program of task {pid}"))?;
            let subject = mem::Task {
                pid,
                tid: agent,
                brk: inside.process.brk,
                dumpable: i32::try_from(inside.process.dumpable).unwrap_or(0),
                thp_disabled: inside.process.thp_disable != 0,
                exe_file_id: exe.unwrap_or(0),
                ours: Vec::new(),
                inside: inside.memory.clone(),
            };
            let mut mapped_findings = Vec::new();
            let mut mapped = Mapped(&mut self.files, &mut mapped_findings);
            let mut space = mem::collect(&subject, &mut mapped, &self.shared, &mut self.findings)
                .with_context(|| format!("address space of task {pid}"))?;
            if !owns_space {
                space.without_pages();
            }
            self.findings.append(&mut mapped_findings);
            let cores = self.cores(process, &inside, &ids).with_context(|| format!("state of task {pid}"))?;
            self.ready.push((pid, Ready { ids, space: Some(space), fs, cores }));
        }
        self.files.finish(&mut self.findings).context("open files")
    }

    fn cores(
        &mut self,
        process: &Process,
        inside: &Inside,
        ids: &pb::TaskKobjIdsEntry,
    ) -> Result<Vec<(i32, pb::CoreEntry)>> {
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
                inside: inside.process.clone(),
            },
            &mut self.findings,
        )?);
        let _ = ids;
        let mut cores = Vec::with_capacity(process.threads.len() + 1);
        for (thread, inside_thread) in process.threads.iter().zip(&inside.threads) {
            let cx = task::ThreadCx {
                pid: process.pid,
                tid: thread.tid(),
                regs: thread.regs,
                xstate: thread.xstate.clone(),
                sigmask: thread.sigmask,
                in_delivery: None,
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

    fn refuse(&mut self) -> Result<()> {
        if self.findings.is_empty() {
            Ok(())
        } else {
            Err(Refused(std::mem::take(&mut self.findings)).into())
        }
    }

    fn write_memory(&mut self, stats: &mut DumpStats) -> Result<()> {
        for (pid, ready) in &mut self.ready {
            if let Some(space) = ready.space.take() {
                self.memory.task(*pid, space, stats).with_context(|| format!("memory of task {pid}"))?;
            }
        }
        self.memory.shared(&self.shared, stats).context("shared memory")
    }

    fn write_tasks(&mut self, tree: &Tree, settings: &DumpSettings) -> Result<()> {
        let store = self.store;
        let mut pstree = Vec::with_capacity(tree.processes.len());
        for process in &tree.processes {
            let mut threads: Vec<u32> = process.threads.iter().map(|t| t.tid().cast_unsigned()).collect();
            if process.dead_leader || threads.is_empty() {
                threads.insert(0, process.pid.cast_unsigned());
            }
            pstree.push(pb::PstreeEntry {
                pid: process.pid.cast_unsigned(),
                ppid: process.ppid.cast_unsigned(),
                pgid: process.pgid.cast_unsigned(),
                sid: process.sid.cast_unsigned(),
                threads,
            });
            if let State::Zombie(status) = process.state {
                write_zombie(store, process.pid, status)?;
            }
        }
        for (pid, ready) in &self.ready {
            let image = u64::from(pid.cast_unsigned());
            for (tid, core) in &ready.cores {
                store.write_one(ImageKind::Core, u64::from(tid.cast_unsigned()), core)?;
            }
            store.write_one(ImageKind::Ids, image, &ready.ids)?;
            if let Some(fs) = &ready.fs {
                store.write_one(ImageKind::Fs, image, fs)?;
            }
        }
        store.write_one(ImageKind::Seccomp, None, &std::mem::take(&mut self.seccomp).finish())?;
        store.write_all(ImageKind::Pstree, None, &pstree)?;
        write_timens(store)?;
        let _ = settings;
        Ok(())
    }
}

/// A pidfd for pidfd_getfd: of the process, or of a thread when the leader is dead.
fn task_fd(tid: i32, pid: i32) -> Result<OwnedFd> {
    let flags = if tid == pid { 0 } else { pidfd::PIDFD_THREAD };
    pidfd::open(tid, flags).with_context(|| format!("pidfd of task {pid}"))
}

fn write_zombie(store: &dyn Store, pid: i32, status: i32) -> Result<()> {
    let core = pb::CoreEntry {
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
    };
    Ok(store.write_one(ImageKind::Core, u64::from(pid.cast_unsigned()), &core)?)
}

/// The clocks of this machine, so that timers against them can be moved to another.
fn write_timens(store: &dyn Store) -> Result<()> {
    use nix::time::{ClockId, clock_gettime};
    let clock = |id: ClockId| -> Result<pb::Timespec> {
        let now = clock_gettime(id)?;
        Ok(pb::Timespec { tv_sec: u64::try_from(now.tv_sec())?, tv_nsec: u64::try_from(now.tv_nsec())? })
    };
    let entry = pb::TimensEntry {
        monotonic: clock(ClockId::CLOCK_MONOTONIC)?,
        boottime: clock(ClockId::CLOCK_BOOTTIME)?,
    };
    Ok(store.write_one(ImageKind::Timens, 0, &entry)?)
}

fn write_inventory(store: &dyn Store, ids: &mut Ids) -> Result<()> {
    let mut random = [0u8; 16];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut random).map_err(|e| anyhow!(e))?;
    let hex: String = random.iter().map(|b| format!("{b:02x}")).collect();
    let run_id = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    let entry = pb::InventoryEntry {
        img_version: IMAGE_VERSION,
        fdinfo_per_id: Some(true),
        root_ids: Some(ids.own()),
        ns_per_id: Some(true),
        root_cg_set: None,
        lsmtype: Some(pb::Lsmtype::NoLsm as i32),
        dump_criu_run_id: Some(run_id.into_bytes()),
        ..Default::default()
    };
    Ok(store.write_one(ImageKind::Inventory, None, &entry)?)
}
