//! A restore: read, plan, create, move, attributes, final state, let go; or undo.
//!
//! The supervisor (this process) does all the thinking; puppets, the processes that it makes, execute lists of system
//! calls. This module knows the order only:
//!
//! 1. [`images`] reads everything small and checks it.
//! 2. [`plan`] decides who forks whom (`process_tree/`) and where lists lie.
//! 3. [`create`] makes all processes, each with its final address space, filled ([`layout`], [`cow`], [`uffd_copy`],
//!    [`page_threads`], [`vdso`], [`shared`]); [`ahead`] does so while images arrive.
//! 4. [`moves`] brings them into their groups and to their parents, and lets helpers and zombies end.
//! 5. [`attributes`] gives them descriptors, attributes and threads; [`clocks`] lets theirs go on.
//! 6. [`final_state`] sets what nobody may touch afterwards: pending signals, `dumpable`, registers; and takes the area away.
//! 7. [`release`] lets all go at once, and looks whether they live; [`job`] gives a shell job its terminal before.
//!
//! Until 7 a failure kills and reaps everything ([`puppets`]).

mod ahead;
mod attributes;
mod clocks;
mod cow;
mod create;
mod final_state;
mod images;
mod job;
mod layout;
mod moves;
mod page_threads;
mod pid_allocator;
mod plan;
mod puppets;
#[cfg(feature = "internals")]
mod rehearsal;
mod release;
mod shared;
mod uffd_copy;
mod vdso;

use std::{
    cell::Cell,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use nix::unistd::Pid;

#[cfg(feature = "internals")]
pub use self::rehearsal::rehearse;
use self::{
    clocks::TreeClocks,
    create::Construction,
    images::{Images, Task},
};
use crate::{
    action::{self, Action},
    cpuinfo,
    deadline::{self, Deadline, Limit},
    exit::{Exit, Incomplete},
    files::{FilesRestore, JobTerminal},
    image::{DirStore, Outcome, Store},
    proc::stat,
    process_tree::ids::on_host,
    progress,
    settings::RestoreSettings,
    stats::RestoreStats,
    sys::{Errno, pid::NsPid, pidfd, ticker},
    tracee::{Decision, List},
};

/// How long a dead task may take to be reaped by its parent: init on some machines needs a second.
const REAP_PATIENCE: Duration = Duration::from_secs(10);
/// How long a task that was killed a moment ago (by a dump on this machine) may look alive: until it gets a processor.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);
/// The new thread is under ptrace as its maker is.
const CLONE_PTRACE: u64 = 0x2000;
/// What threads of a process share.
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;

/// What is the case when nothing can go wrong any more.
const RUNS: &str = "the tree is restored and runs";

/// A tree that has been restored.
#[derive(Debug)]
pub struct Restored {
    /// Pid of its root.
    pub root: Pid,
    /// What it took.
    pub stats: RestoreStats,
    /// The terminal of a shell job, which the job has now; for whoever stays with the tree.
    pub(crate) job: Option<JobTerminal>,
}

/// Restores a tree from a directory of images.
pub fn restore(settings: &RestoreSettings) -> Result<Restored> {
    let opening = Deadline::begin(Limit::Idle(settings.timeout));
    let store = DirStore::open_checked(&settings.common.images_dir, settings.common.owner_check)?;
    opening.finish();
    restore_from(&store, settings)
}

/// Restores a tree from `store`.
pub fn restore_from(store: &dyn Store, settings: &RestoreSettings) -> Result<Restored> {
    let begun = Instant::now();
    let _ticker = ticker::Ticker::start()?;
    let _ = crate::sys::own::raise_open_files();
    let scripts = Cell::new(false);
    if store.arrival().is_some() {
        match attempt(store, settings, begun, &scripts) {
            Err(error) if error.is::<ahead::GivenUp>() => {
                store.arrived()?;
                tracing::info!("{error:#}");
            }
            done => return done,
        }
    }
    attempt(store, settings, begun, &scripts)
}

/// Runs what is to be done before a restore, once: when all images are there, since a script may rely on what the dump has done.
fn before(settings: &RestoreSettings, done: &Cell<bool>) -> Result<()> {
    if !done.replace(true) {
        action::run(&settings.common.action_scripts, Action::PreRestore, None)?;
    }
    Ok(())
}

/// Restores a tree from what is there and, as long as that is not all of it, from what comes.
fn attempt(
    store: &dyn Store,
    settings: &RestoreSettings,
    begun: Instant,
    scripts_ran: &Cell<bool>,
) -> Result<Restored> {
    let deadline = Deadline::begin(Limit::Idle(settings.timeout));
    let scripts = &settings.common.action_scripts;
    let arriving = store.arrival().is_some();
    if !arriving {
        before(settings, scripts_ran)?;
        images::inventory(store)?;
    }
    let read = || -> Result<_> {
        let images = Images::read(store)?;
        cpuinfo::check(store, settings.common.cpu_cap)?;
        Ok(images)
    };
    let forking = Instant::now();
    let images = if arriving { read().context(ahead::GivenUp)? } else { read()? };
    let (mut tree, forking_time) = if arriving {
        let mut tree = ahead::make(store, &images, settings).context(ahead::GivenUp)?;
        store.arrived()?;
        before(settings, scripts_ran)?;
        ahead::check(&tree).context(ahead::GivenUp)?;
        images::inventory(store)?;
        tree.files.open_early()?;
        tree.clocks = TreeClocks::read(store, &images, settings)?;
        (tree, forking.elapsed())
    } else {
        let forks = plan::forks(&images, settings)?;
        let mut files = FilesRestore::read(store, settings, &images.tables())?;
        files.open_early()?;
        let mut clocks = TreeClocks::read(store, &images, settings)?;
        clocks.start_early()?;
        let mut tree = Construction::plan(store, &images, forks, files, clocks)?;
        pids_are_free(&images)?;
        deadline::check()?;
        let forking = Instant::now();
        tree.create(settings)?;
        tree.moves()?;
        (tree, forking.elapsed())
    };
    let root = tree.root()?;
    progress::phase("last steps", 0);
    tree.attributes()?;
    tree.final_state()?;
    tree.files.before_resume()?;
    tree.files.leftovers()?;

    if let Some(path) = &settings.pidfile {
        crate::pidfile::write(&settings.common.work_dir, path, root, settings.common.owner_check)?;
    }
    action::run(scripts, Action::PostRestore, Some(root))?;
    action::run(scripts, Action::PreResume, Some(root))?;
    deadline::check()?;
    let running = pidfd::open(root.as_raw(), 0).context("pidfd of the root")?;
    let decision = Decision::new().context("file of what is decided about the tree")?;
    {
        // The source of what comes from a cache may have the last word, which takes as long as it takes.
        let _waiting = deadline::pause();
        store.report(Outcome::Starting { root: running.as_fd(), decision: decision.as_fd() })?;
    }
    // The tree may run now, and nowhere else: it can be reached here from now on.
    if settings.remote.is_some()
        && let Err(error) = action::run(scripts, Action::NetworkUnlock, Some(root))
    {
        tracing::error!("{:#}", anyhow!(error));
    }
    // Whose terminal it may be is at it again.
    progress::quiet();
    let mut job = job::terminal(&images, settings, &mut tree.files)?;
    if let Some(job) = &mut job {
        job.hand_over()?;
    }
    tree.commit(&decision)?;
    deadline.finish();
    crate::sys::own::set_out_of_memory_status(Exit::Incomplete.status());
    let let_go = tree.let_go(settings.leave_stopped);
    if let Err(error) = store.report(Outcome::Running(root.as_raw())) {
        tracing::warn!("the tree runs, but that could not be reported: {:#}", anyhow!(error));
    }
    let mut stats = tree.stats();
    tree.files.commit();
    stats.forking_time = forking_time;
    stats.restore_time = begun.elapsed();
    if let Err(error) = action::run(scripts, Action::PostResume, Some(root)) {
        tracing::warn!("{:#}", anyhow!(error));
    }
    let_go.context(Incomplete("the tree is restored"))?;
    if let Some(job) = &job {
        job.tell_size();
    }
    Ok(Restored { root, stats, job })
}

/// At `-v4`, what a puppet is going to do, one line a step.
fn log_list(list: &List) {
    if tracing::enabled!(tracing::Level::TRACE) {
        for line in list.describe().lines() {
            tracing::trace!("{line}");
        }
    }
}

/// Waits a moment for tasks that are dead but not reaped, and names whoever else is in the way.
fn pids_are_free(images: &Images) -> Result<()> {
    let begun = Instant::now();
    for tid in images.tasks.iter().flat_map(|t| &t.tids) {
        while let Some(stat) = who_is(*tid) {
            if begun.elapsed() > patience(Some(&stat)) {
                return Err(taken(*tid, Errno::EEXIST));
            }
            std::thread::sleep(Duration::from_millis(2));
            deadline::check()?;
        }
    }
    Ok(())
}

/// How long whoever has a pid may go on having it; nobody may, for a while.
fn patience(owner: Option<&stat::Stat>) -> Duration {
    match owner.map(|stat| stat.state) {
        None | Some(stat::State::Zombie | stat::State::Dead) => REAP_PATIENCE,
        Some(_) => DEATH_PATIENCE,
    }
}

fn who_is(pid: NsPid) -> Option<stat::Stat> {
    stat::parse(&std::fs::read(format!("/proc/{}/stat", on_host(pid))).ok()?).ok()
}

/// Why a process or thread with this pid could not be made here, if somebody has it.
pub(crate) fn pid_is_taken(pid: i32) -> Option<String> {
    let pid = NsPid::new(pid);
    who_is(pid).map(|_| taken(pid, Errno::EEXIST).to_string())
}

/// Why a pid could not be had.
fn taken(pid: NsPid, error: Errno) -> anyhow::Error {
    if error != Errno::EEXIST {
        return anyhow!(error).context(format!("clone of task {pid}"));
    }
    match who_is(pid) {
        Some(stat) => {
            let name = String::from_utf8_lossy(&stat.comm).into_owned();
            let zombie = matches!(stat.state, stat::State::Zombie);
            let how = if zombie { " (dead, not reaped by its parent yet)" } else { "" };
            anyhow!("pid {pid} is taken by {name}{how}, child of {}; end it first", stat.ppid)
        }
        None => anyhow!("pid {pid} is taken: still in use as a thread, process group or session"),
    }
}
