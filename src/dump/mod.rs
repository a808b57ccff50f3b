//! A dump: freeze, look inside, collect, write, commit or undo.
//!
//! This module knows the order only. Until the end is decided at the very end, every early return lets the
//! tree go on as it was: [`Tree`] detaches when dropped, the store removes what was written.

mod check;
mod collect;
mod finish;
mod ids;
mod images;
mod inside;
mod restorable;
mod stopped;
mod tree;

pub use check::check_tree;
pub use stopped::{Before, Member, Waiting, go_on_again};

use std::{os::fd::AsFd, time::Instant};

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use self::{
    collect::{Collected, Source},
    tree::{State, Tree},
};
use crate::{
    action::{self, Action, ActionScripts},
    cpuinfo,
    deadline::{self, Deadline, Limit},
    finding::Finding,
    image::{DirStore, DirSync, Store},
    interrupt,
    kept::Form,
    mem::MemoryDump,
    pages::PAGE,
    progress,
    settings::{DumpSettings, Leave},
    stats::DumpStats,
    sys::{pid::HostPid, ticker::Ticker},
    tracee::Decision,
    tracee::{TraceError, procfs},
};

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

/// How a tree is handed over to somebody who lets it run before it ends here.
pub trait HandOver {
    /// The tree is about to be frozen.
    fn freezing(&self);

    /// Waits until the restored tree is complete there, and stopped. An error lets the tree go on here.
    fn armed(&self) -> Result<()>;

    /// The tree is about to be stopped so that it stays so if crtool is killed; `before` is what [`go_on_again`] wants to know
    /// then. An error lets it go on here.
    fn stopping(&self, before: &Before) -> Result<()>;

    /// Lets it run there, and waits for as long as it takes to learn what became of that. An error says that nothing was
    /// said, and lets the tree go on here.
    fn go(&self) -> Result<Fate>;
}

/// What became of a tree that was handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It runs there.
    There,
    /// It does not and is not going to, and why.
    Here(String),
}

/// Dumps a tree into a directory.
pub fn dump(settings: &DumpSettings) -> Result<DumpStats> {
    let sync = match settings.leave {
        _ if !settings.sync => DirSync::Never,
        // Then the images are all there is.
        Leave::Killed => DirSync::BeforeCommit,
        Leave::Running | Leave::Stopped => DirSync::AtEnd,
    };
    // A directory of a file system that does not answer is a reason to give up like any other.
    let opening = Deadline::begin(Limit::Total(settings.timeout));
    let store = DirStore::for_dump_checked(&settings.common.images_dir, settings.common.owner_check, sync)?;
    opening.finish();
    let stats = dump_to(&store, None, settings)?;
    store.finish().context("the tree goes on, but its images are not safe")?;
    Ok(stats)
}

/// Dumps a tree into `store`, and commits it; then it is killed or goes on as `settings` say, or is handed over.
pub fn dump_to(
    store: &dyn Store,
    hand_over: Option<&dyn HandOver>,
    settings: &DumpSettings,
) -> Result<DumpStats> {
    let pid = HostPid::new(settings.pid.as_raw());
    let scripts = &settings.common.action_scripts;
    let root = Some(settings.pid);
    let deadline = Deadline::begin(Limit::Total(settings.timeout));
    look_at_root(pid)?;
    action::run(scripts, Action::PreDump, root)?;
    let mut memory = MemoryDump::new(store);
    let pids = procfs::walk(pid);
    memory.reserve(&pids).context("room for the pages")?;
    let mut collected = Collected::new(store, settings, Source::Frozen);
    let ticker = Ticker::start()?;
    deadline.next(Limit::Total(settings.timeout));
    let check = || Ok(deadline.check()?);
    collected.prepare(&pids);
    let mut stats = DumpStats::default();

    if let Some(to) = hand_over {
        to.freezing();
    }
    progress::phase("freezing", 0);
    // Dropped after the tree, which goes on before it can be reached again.
    let mut lock = NetworkLock { scripts, root, held: false };
    let freezing = Instant::now();
    let tree = ticker.busy(|| Tree::freeze(pid, &check)).context("freeze of the tree")?;
    stats.freezing_time = freezing.elapsed();
    let frozen = Instant::now();
    if tree.processes.first().is_some_and(|root| matches!(root.state, State::Zombie(_))) {
        bail!("task {pid} is dead (a zombie): there is nothing to dump; its parent has not reaped it");
    }
    if settings.remote.is_some() {
        lock.take()?;
    }

    progress::phase("looking at the tree", 0);
    collected.form = Form::of_tree(tree.processes.iter().map(|process| process.threads.len()).sum());
    for process in &tree.processes {
        collected.process(process, &check)?;
    }
    collected.complete()?;
    restorable::check(&mut collected, settings)?;
    // All that a restore will read of this tree is in `collected` now, and nothing of it is written.
    let findings = collected.findings();
    if !findings.is_empty() {
        return Err(Refused(findings).into());
    }

    // Pages may take as long as they take, while there are some that do not stand still.
    deadline.next(Limit::Idle(settings.standstill));
    let writing = Instant::now();
    let resident = tree.processes.iter().filter_map(|process| procfs::resident_pages(process.pid));
    progress::phase("memory", resident.sum::<u64>() * PAGE);
    images::memory(&mut collected, &mut memory, store.pages_come_last(), &mut stats)?;
    stats.memdump_time = writing.elapsed();
    cpuinfo::write(store, settings.common.cpu_cap)?;
    images::tasks(&mut collected, store)?;
    let writing = Instant::now();
    memory.pages(&mut stats).context("memory")?;
    stats.memdump_time += writing.elapsed();
    tree.verify().context("the tree changed while it was frozen")?;
    deadline.check()?;
    images::inventory(store, &mut collected.ids)?;
    let decision = Decision::new().context("file of what is decided about the tree")?;
    store.guard(decision.as_fd())?;
    // How long a disk takes to write all of it out cannot be seen from here, and a cache has a limit of its own.
    deadline.next(Limit::Idle(None));
    progress::phase("making sure that all of it is there", 0);
    store.commit()?;
    // After this nothing can be taken back.
    if let Err(error) = post_dump(store, scripts, root) {
        store.withdraw()?;
        return Err(error);
    }
    progress::phase("last steps", 0);
    let finishing = deadline::pause();
    let words = std::mem::take(&mut collected.words);
    if let Some(to) = hand_over {
        // Until it is known to run there, nothing is final.
        finish::hand_over(tree, &decision, words, to)?;
        lock.held = false;
        deadline.finish();
        collected.files.commit();
        stats.frozen_time = frozen.elapsed();
        deadline::unwatch();
        drop(finishing);
        return Ok(stats);
    }
    deadline::settle("the images are complete", || ());
    deadline.finish();
    collected.files.commit();
    stats.frozen_time = frozen.elapsed();
    lock.held &= settings.leave != Leave::Killed;
    finish::decide(tree, settings.leave, &decision, words, &|survives| Ok(store.confirm(survives)?))?;
    if settings.leave != Leave::Killed {
        // Killed tasks are frozen no more; what takes time is their parents' asking for them.
        stats.frozen_time = frozen.elapsed();
    }
    // The tree goes on or is gone. Who waits for the images to be on the disk now is crtool alone.
    deadline::unwatch();
    drop(finishing);
    Ok(stats)
}

/// What scripts do so that nobody reaches a tree that is on its way. Dropped, it is undone.
struct NetworkLock<'a> {
    scripts: &'a ActionScripts,
    root: Option<Pid>,
    held: bool,
}

impl NetworkLock<'_> {
    fn take(&mut self) -> Result<()> {
        self.held = true;
        Ok(action::run(self.scripts, Action::NetworkLock, self.root)?)
    }
}

impl Drop for NetworkLock<'_> {
    fn drop(&mut self) {
        if self.held
            && let Err(error) = action::run(self.scripts, Action::NetworkUnlock, self.root)
        {
            tracing::error!("{:#}", anyhow::Error::from(error));
        }
    }
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
pub fn look_at_root(pid: HostPid) -> Result<()> {
    /// PF_KTHREAD.
    const KERNEL: u32 = 0x0020_0000;
    let stat = match procfs::stat(pid) {
        Ok(stat) => stat,
        Err(TraceError::Proc { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            bail!("no process has pid {pid}")
        }
        Err(error) => return Err(error.into()),
    };
    if stat.flags & KERNEL != 0 {
        bail!("task {pid} is a thread of the kernel: there is nothing to dump");
    }
    // What cannot be read here is told by what needs it.
    if let Ok(bytes) = std::fs::read(format!("/proc/{pid}/status"))
        && let Ok(status) = crate::proc::status::parse(&bytes)
        && status.tgid != pid
    {
        bail!("{pid} is a thread of process {}: dump that one", status.tgid);
    }
    not_ourselves(pid)
}

fn not_ourselves(pid: HostPid) -> Result<()> {
    let mut at = HostPid::own();
    while at != HostPid::NONE {
        if at == pid {
            bail!("task {pid} is crtool itself or one of its ancestors: it cannot be frozen from within");
        }
        let Ok(stat) = procfs::stat(at) else { break };
        at = stat.ppid;
    }
    Ok(())
}
