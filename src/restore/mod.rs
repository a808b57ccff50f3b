//! A restore: read, validate, plan, make, apply, hand over or undo.
//!
//! The supervisor (this process) thinks; puppets act. See `tracees.rs` for who holds them, `process_tree/fork_plan.rs` for who
//! makes whom, `memory.rs` for their address spaces. This module knows the order only.

mod clocks;
mod cow;
mod images;
mod memory;
mod page_threads;
mod pid_allocator;
mod shared;
mod tracees;
mod uffd_copy;
mod vdso;

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::Write as _,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
    unistd::{Pid, getpgrp, getsid},
};

use self::{
    clocks::TreeClocks,
    cow::ParentMemory,
    images::{Images, State, Task},
    memory::{Made, MappedObjects, Space},
    page_threads::PageThreads,
    pid_allocator::PidAllocator,
    shared::SharedObjects,
    tracees::Tracees,
};
use crate::{
    action::{self, Action},
    cpuinfo,
    exit::Incomplete,
    files::FilesRestore,
    image::{DirStore, ImageKind, Outcome, Store, pb},
    interrupt,
    mem::pkeys,
    pages::Pages,
    proc::stat,
    process_tree::fork_plan::{self, ForkPlan, Step, Wanted},
    settings::RestoreSettings,
    stats::RestoreStats,
    sys::{
        Errno,
        clone::{CloneArgs, clone_into},
        mapping::{Access, Mapping, memfd},
        pidfd, pipe, ptrace, rseq, ticker,
    },
    task,
    tracee::{Area, KillGuard, List, Op, Placed, RemoteAddr, Want},
};

/// Room for lists: sparse, only what is written takes memory.
const AREA_LEN: u64 = 1 << 30;
/// How long a dead task may take to be reaped by its parent: init on some machines needs a second.
const REAP_PATIENCE: Duration = Duration::from_secs(10);
/// How long a task that was killed a moment ago (by a dump on this machine) may look alive: until it gets a processor.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);
/// Below the area, for the vdso of this kernel beside an old one.
const VDSO_ROOM: u64 = 1 << 20;
const CLONE_PTRACE: u64 = 0x2000;
const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_NAME: u64 = 15;
const RSEQ_FLAG_UNREGISTER: u64 = 1;

/// A tree that has been restored.
#[derive(Debug)]
pub struct Restored {
    /// Pid of its root.
    pub root: Pid,
    /// What it took.
    pub stats: RestoreStats,
}

/// Restores a tree from a directory of images.
pub fn restore(settings: &RestoreSettings) -> Result<Restored> {
    let store = DirStore::open(&settings.common.images_dir)?;
    restore_from(&store, settings)
}

/// Restores a tree from `store`.
pub fn restore_from(store: &dyn Store, settings: &RestoreSettings) -> Result<Restored> {
    let begun = Instant::now();
    let _ticker = ticker::Ticker::start()?;
    let _ = crate::sys::task::raise_soft_limit(libc::RLIMIT_NOFILE);
    let scripts = &settings.common.action_scripts;
    action::run(scripts, Action::PreRestore, None)?;

    let images = Images::read(store)?;
    cpuinfo::check(store, settings.common.cpu_cap)?;
    let mut pids =
        PidAllocator::new(images.tasks.iter().flat_map(|t| t.tids.iter().copied().chain([t.pgid, t.sid])));
    let forks = plan_forks(&images, settings, &mut pids)?;
    let tables = images.tasks.iter().map(|t| t.ids.files_id).collect();
    let mut files = FilesRestore::read(store, settings, &tables)?;
    files.open_early()?;
    let mut clocks = TreeClocks::read(store, &images, settings)?;
    clocks.start_early()?;
    let mut cast = Cast::plan(store, &images, forks, files, clocks, pids)?;
    pids_are_free(&images)?;
    interrupt::check()?;

    let forking = Instant::now();
    let root = cast.make_first(settings)?;
    cast.tracees.settle()?;
    cast.page_threads.check(&cast.tracees.area)?;
    cast.form_groups()?;
    let forking_time = forking.elapsed();
    cast.apply()?;
    cast.set_final_state()?;
    cast.files.before_resume()?;
    cast.files.leftovers()?;

    if let Some(path) = &settings.pidfile {
        crate::pidfile::write(&settings.common.work_dir, path, root)?;
    }
    action::run(scripts, Action::PostRestore, Some(root))?;
    action::run(scripts, Action::PreResume, Some(root))?;
    interrupt::check()?;
    let running = pidfd::open(root.as_raw(), 0).context("pidfd of the root")?;
    store.report(Outcome::Starting(running.as_fd()))?;
    cast.commit()?;
    let let_go = cast.let_go(settings.leave_stopped);
    if let Err(error) = store.report(Outcome::Running(root.as_raw())) {
        tracing::warn!("the tree runs, but that could not be reported: {:#}", anyhow!(error));
    }
    let pages_restored = cast.pages_restored();
    let pages_compared = cast.made.iter().map(|m| m.compared).sum();
    let pages_skipped_cow = cast.made.iter().map(|m| m.kept).sum();
    cast.files.commit();
    let stats = RestoreStats {
        pages_restored,
        pages_compared,
        pages_skipped_cow,
        forking_time,
        restore_time: begun.elapsed(),
    };
    if let Err(error) = action::run(scripts, Action::PostResume, Some(root)) {
        tracing::warn!("{:#}", anyhow!(error));
    }
    let_go.context(Incomplete("the tree is restored"))?;
    Ok(Restored { root, stats })
}

/// Who makes whom; with `--shell-job` what came from outside is replaced by our own session and group.
fn plan_forks(images: &Images, settings: &RestoreSettings, pids: &mut PidAllocator) -> Result<ForkPlan> {
    let root = images.tasks.first().context("no task")?;
    let ours = (getsid(None)?.as_raw(), getpgrp().as_raw());
    let foreign_session = (root.sid != root.pid).then_some(root.sid);
    let foreign_group = (root.pgid != root.pid).then_some(root.pgid);
    if (foreign_session.is_some() || foreign_group.is_some()) && !settings.common.shell_job {
        bail!(
            "task {}: its session {} and group {} come from outside the tree; restore with --shell-job to use \
             those of crtool",
            root.pid,
            root.sid,
            root.pgid
        );
    }
    let index_of = |pid: i32| images.tasks.iter().position(|t| t.pid == pid);
    let wanted: Vec<Wanted> = images
        .tasks
        .iter()
        .enumerate()
        .map(|(i, t)| Wanted {
            pid: t.pid,
            parent: if i == 0 { None } else { index_of(t.ppid) },
            pgid: if Some(t.pgid) == foreign_group || Some(t.pgid) == foreign_session {
                ours.1
            } else {
                t.pgid
            },
            sid: if Some(t.sid) == foreign_session { ours.0 } else { t.sid },
        })
        .collect();
    let mut forks = fork_plan::plan(&wanted, ours)?;
    // Its parent-death signal must not be the end of crtool.
    let asks = |core: &&pb::CoreEntry| {
        core.thread_core.as_ref().is_some_and(|c| c.pdeath_sig.is_some_and(|signal| signal != 0))
    };
    if settings.detached && !settings.sibling && root.cores.iter().any(|core| asks(&core)) {
        forks.add_intermediate_parent(pids.pick()?);
    }
    Ok(forks)
}

/// Everything that takes part.
struct Cast<'i> {
    images: &'i Images,
    forks: ForkPlan,
    files: FilesRestore<'i>,
    clocks: TreeClocks,
    /// Held open: puppets inherit the descriptors.
    _shared: SharedObjects,
    pages: Vec<Pages>,
    made: Vec<Made>,
    /// By pid.
    keys: HashMap<i32, pkeys::Plan>,
    page_threads: PageThreads,
    tracees: Tracees,
    on_fail: RemoteAddr,
    /// Slots of all puppets' leaders.
    slots: Vec<RemoteAddr>,
    /// The first puppet waits for a byte from it. Our death is the end of the pipe, and its own.
    go: File,
    /// The other end, inherited.
    _held: OwnedFd,
    first_list: Placed,
    supervisor: task::Supervisor,
    seccomp: task::seccomp::Plan,
}

impl MappedObjects for (&mut FilesRestore<'_>, &SharedObjects) {
    fn file(&mut self, id: u32, vma: &pb::VmaEntry) -> Result<i32> {
        let shared = vma.flags & libc::MAP_SHARED.cast_unsigned() != 0;
        let write = vma.prot & libc::PROT_WRITE.cast_unsigned() != 0
            || vma.fdflags.unwrap_or(0) & libc::O_ACCMODE.cast_unsigned() == libc::O_RDWR.cast_unsigned();
        Ok(self.0.vma_file(id, shared && write)?)
    }
    fn shared(&mut self, shmid: u64, vma: &pb::VmaEntry) -> Result<i32> {
        if vma.status & memory::status::MEMFD != 0 {
            return self.file(u32::try_from(shmid).context("memfd id")?, vma);
        }
        self.1.get(shmid)
    }
}

impl<'i> Cast<'i> {
    /// Plans the first act of everybody: address spaces and forks.
    fn plan(
        store: &'i dyn Store,
        images: &'i Images,
        forks: ForkPlan,
        mut files: FilesRestore<'i>,
        clocks: TreeClocks,
        pids: PidAllocator,
    ) -> Result<Self> {
        let mms = || images.tasks.iter().filter_map(|t| t.mm.as_ref());
        let mut keys = HashMap::new();
        for task in &images.tasks {
            if let Some(mm) = &task.mm {
                memory::check_vmas(mm, task.pid)?;
                keys.insert(task.pid, pkeys::plan(mm, task.pid, task.knows_protection_keys())?);
            }
            for core in task.cores.iter().filter(|_| !task.is_zombie()) {
                task::final_state(core).with_context(|| format!("state of task {}", task.pid))?;
            }
        }
        let shared = SharedObjects::make(store, mms())?;
        let mut pages = Vec::with_capacity(images.tasks.len());
        for task in &images.tasks {
            pages.push(if task.is_zombie() { Pages::default() } else { pages_of(store, task)? });
        }
        let mut area = make_area(mms())?;
        let mut fail = List::new("after a failure");
        fail.op(Op::Trap);
        let on_fail = area.place(&fail)?.start;
        let (held, go) = pipe::pipe2(libc::O_CLOEXEC).context("pipe")?;
        let mut slots = Vec::with_capacity(forks.puppets.len());
        for _ in &forks.puppets {
            slots.push(area.slot()?);
        }
        let mut tracees = Tracees::new(area, pids);
        let mut first_list = None;
        let own_vdso = vdso::Own::read()?;
        let mut page_threads = PageThreads::new();
        let mut made = Vec::with_capacity(forks.puppets.len());
        for (index, puppet) in forks.puppets.iter().enumerate() {
            let label = match puppet.task {
                Some(_) => format!("task {}", puppet.pid),
                None if index == forks.first => {
                    format!("helper {} (the root's intermediate parent)", puppet.pid)
                }
                None => format!("helper {} (for a dead leader)", puppet.pid),
            };
            let mut list = List::new(format!("creation of {}", puppet.pid));
            if index == forks.first {
                plan_first(&mut list, held.as_raw_fd(), go.as_raw_fd());
                clocks.plan_first(&mut list);
            }
            let at = (tracees.area.start().0, tracees.area.len() as u64);
            let task = puppet.task.and_then(|t| images.tasks.get(t));
            let shares = shares_memory(&forks, images, index)?;
            made.push(match task.and_then(|t| t.mm.as_ref()) {
                Some(_) if shares => Made::default(),
                // What it makes is to have what crtool would have given it.
                None if index == forks.first => Made::default(),
                None => {
                    memory::plan_clear(&mut list, at, &[]);
                    Made::default()
                }
                Some(mm) => {
                    let exe_fd = files.vma_file(mm.exe_file_id, false).context("program")?;
                    let parent = forks.maker(index).and_then(|m| {
                        Some(ParentMemory { mm: images.tasks.get(m)?.mm.as_ref()?, pages: pages.get(m)? })
                    });
                    let vdso = vdso::plan(mm, &pages[index], own_vdso.as_ref(), at.0 - VDSO_ROOM)?;
                    if let vdso::Plan::Foreign { start, end, .. } = &vdso {
                        not_within(task, *start, *end)?;
                    }
                    let space =
                        Space { pid: puppet.pid, mm, pages: &pages[index], exe_fd, parent, area: at, vdso };
                    memory::plan(
                        &mut list,
                        &space,
                        &mut (&mut files, &shared),
                        &mut page_threads.at(&mut tracees),
                    )
                    .with_context(|| format!("memory of task {}", puppet.pid))?
                }
            });
            if let Some(tc) = task.filter(|t| t.is_zombie()).and_then(|t| t.cores.first()?.tc.as_ref()) {
                let comm = list.cstr(&tc.comm);
                list.call("PR_SET_NAME", libc::SYS_prctl, &[PR_SET_NAME.into(), comm.into()], Want::Zero);
            }
            for step in &puppet.steps {
                plan_step(&mut list, *step, &forks, images, &slots, index)?;
                if *step == Step::Setsid && puppet.task.is_some() {
                    files.plan_controlling(puppet.pid, &mut list);
                }
            }
            list.op(Op::Trap);
            list.op(Op::Next);
            log_list(&list);
            let placed = tracees.area.place(&list)?;
            tracees.area.arm(slots[index], placed.start, on_fail)?;
            if index == forks.first {
                first_list = Some(placed.clone());
            }
            tracees.expect(puppet.pid, true, label, slots[index], placed);
        }
        let first_list = first_list.context("no root")?;
        let supervisor = task::Supervisor::probe()?;
        let filters: pb::SeccompEntry =
            crate::image::TypedStore::read_one(store, ImageKind::Seccomp, None)?.unwrap_or_default();
        let alive = images.tasks.iter().filter(|t| !t.is_zombie());
        let processes: Vec<_> = alive.map(|t| (t.pid, t.cores.iter().collect())).collect();
        let seccomp = task::seccomp::Plan::new(&filters, &processes)?;
        Ok(Self {
            images,
            forks,
            files,
            clocks,
            _shared: shared,
            pages,
            made,
            keys,
            page_threads,
            tracees,
            on_fail,
            slots,
            go: File::from(go),
            _held: held,
            first_list,
            supervisor,
            seccomp,
        })
    }

    fn alive(&self) -> impl Iterator<Item = &'i Task> + use<'i> {
        self.images.tasks.iter().filter(|t| !t.is_zombie())
    }

    fn task_of(&self, index: usize) -> Option<&'i Task> {
        self.forks.puppets.get(index)?.task.and_then(|t| self.images.tasks.get(t))
    }

    /// Clones the first puppet and takes it under ptrace before it does anything. Tells the root's pid.
    fn make_first(&mut self, settings: &RestoreSettings) -> Result<Pid> {
        let root = self.images.tasks.first().context("no root")?.pid;
        let slot = *self.slots.get(self.forks.first).context("no slot")?;
        let first = self.forks.puppets.get_mut(self.forks.first).context("no first puppet")?;
        let sibling = settings.detached && settings.sibling;
        let all = SigSet::all();
        let mut old = SigSet::empty();
        let runner = self.tracees.area.runner().0;
        let pid = loop {
            let set_tid = [first.pid];
            let args = CloneArgs {
                flags: if sibling { libc::CLONE_PARENT as u64 } else { 0 },
                exit_signal: if sibling { 0 } else { libc::SIGCHLD as u64 },
                set_tid: set_tid.as_ptr() as u64,
                set_tid_size: 1,
                ..CloneArgs::default()
            };
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), Some(&mut old))?;
            let made = clone_into(&args, runner, self.first_list.start.0, slot.0);
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&old), None)?;
            match made {
                Ok(pid) => break pid,
                Err(Errno::EEXIST) if self.tracees.pids.gave(first.pid) => {
                    let other = self.tracees.pids.pick()?;
                    self.tracees.rename(first.pid, other);
                    first.pid = other;
                }
                Err(Errno::EEXIST) if self.tracees.may_become_free(first.pid) => interrupt::check()?,
                Err(error) => return Err(taken(first.pid, error)),
            }
        };
        self.tracees.running(pid);
        let options = ptrace::O_TRACESYSGOOD | ptrace::O_EXITKILL;
        ptrace::seize(pid, options | ptrace::O_SUSPEND_SECCOMP)
            .or_else(|_| ptrace::seize(pid, options))
            .context("seize of the restored root")?;
        self.go.write_all(&[1]).context("word to the first puppet")?;
        Ok(Pid::from_raw(root))
    }

    /// Everybody exists: join groups; let zombies and helpers end.
    fn form_groups(&mut self) -> Result<()> {
        let mut moving = false;
        for (index, puppet) in self.forks.puppets.clone().iter().enumerate() {
            if let Some(group) = puppet.join_group {
                let mut list = List::new(format!("group of {}", puppet.pid));
                list.call(
                    format!("setpgid({group})"),
                    libc::SYS_setpgid,
                    &[0u64.into(), group.into()],
                    Want::Zero,
                );
                list.op(Op::Trap);
                list.op(Op::Next);
                let placed = self.tracees.area.place(&list)?;
                self.tracees.next_list(puppet.pid, placed)?;
                self.tracees.resume(puppet.pid)?;
                moving = true;
            }
            let _ = index;
        }
        if moving {
            self.tracees.settle()?;
        }
        for (index, puppet) in self.forks.puppets.clone().iter().enumerate() {
            let code = match self.task_of(index).map(|t| t.state) {
                None => 0,
                Some(State::Zombie(code)) => code,
                Some(_) => continue,
            };
            let signal = code & 0x7f;
            if signal == 0 {
                let mut list = List::new(format!("end of {}", puppet.pid));
                list.call("exit_group", libc::SYS_exit_group, &[((code >> 8) & 0xff).into()], Want::Any);
                let placed = self.tracees.area.place(&list)?;
                self.tracees.next_list(puppet.pid, placed)?;
            }
            self.tracees.end(puppet.pid, signal)?;
        }
        self.tracees.settle()
    }

    /// The main act: descriptors, attributes, threads.
    fn apply(&mut self) -> Result<()> {
        self.files.open_late()?;
        self.clocks.start()?;
        self.supervisor.clocks = self.clocks.running();
        let mut tables: Vec<u32> = self.alive().map(|t| t.ids.files_id).collect();
        tables.sort_unstable();
        let tables_shared = tables.windows(2).any(|w| w[0] == w[1]);
        for index in 0..self.forks.puppets.len() {
            let Some(task) = self.task_of(index).filter(|t| !t.is_zombie()) else { continue };
            let placed =
                self.plan_main(index, task, tables_shared).with_context(|| format!("task {}", task.pid))?;
            self.tracees.next_list(task.pid, placed)?;
        }
        if tables_shared {
            for task in self.alive() {
                self.tracees.resume(task.pid)?;
            }
            self.tracees.settle()?;
        }
        // Stopped tasks first, children before parents: a parent hears of the stop, and forgets it, before
        // its own signals are restored.
        let stopped: Vec<&Task> = self.alive().filter(|t| t.state == State::Stopped).collect();
        for task in stopped.into_iter().rev() {
            self.tracees.resume(task.pid)?;
            self.tracees.settle()?;
            self.stop(task).with_context(|| format!("stop of task {}", task.pid))?;
        }
        for task in self.alive().filter(|t| t.state != State::Stopped) {
            self.tracees.resume(task.pid)?;
        }
        self.tracees.settle()
    }

    fn thread_plan<'a>(
        &'a self,
        task: &Task,
        tid: i32,
        core: &'a pb::CoreEntry,
        mm: &pb::MmEntry,
    ) -> task::ThreadPlan<'a> {
        task::ThreadPlan {
            core,
            pid: task.pid,
            tid,
            dumpable: mm.dumpable.unwrap_or(1),
            seccomp: &self.seccomp,
            supervisor: &self.supervisor,
        }
    }

    fn plan_main(&mut self, index: usize, task: &Task, tables_shared: bool) -> Result<Placed> {
        let mut list = List::new(format!("restore of {}", task.pid));
        let core = task.core()?;
        self.clocks.plan_task(&mut list);
        // Helpers that were our children have ended; whoever reaps them now is their parent.
        for puppet in self.forks.puppets.iter().filter(|p| p.parent == Some(index) && p.task.is_none()) {
            list.call(
                format!("wait4 for helper {}", puppet.pid),
                libc::SYS_wait4,
                &[puppet.pid.into(), 0u64.into(), libc::__WALL.into(), 0u64.into()],
                Want::OkRetry,
            );
        }
        let mm = task.mm.as_ref().context("no mm image")?;
        if !shares_memory(&self.forks, self.images, index)? {
            let keys = self.keys.get(&task.pid).context("no protection keys")?;
            memory::plan_late(&mut list, mm, &self.made[index], keys);
        }
        task::plan_process_early(core, &self.supervisor, &mut list)?;
        if let Some(fs) = &task.fs {
            self.files.plan_fs(fs, &mut list)?;
        }
        if tables_shared {
            // Nobody closes what another still has to use under its inherited number.
            list.op(Op::Trap);
        }
        self.files.plan_table(task.ids.files_id, task.pid, &mut list)?;
        task::plan_process(core, mm, &self.supervisor, &mut list)?;
        for (tid, core) in task.tids.iter().zip(&task.cores).skip(1) {
            let mut own = List::new(format!("restore of thread {tid}"));
            task::plan_thread(&self.thread_plan(task, *tid, core, mm), &mut own)?;
            own.op(Op::Trap);
            own.op(Op::Next);
            let placed = self.tracees.area.place(&own)?;
            let slot = self.tracees.area.slot()?;
            self.tracees.area.arm(slot, placed.start, self.on_fail)?;
            self.tracees.expect(*tid, false, format!("thread {tid} of task {}", task.pid), slot, placed);
            let flags = libc::CLONE_VM
                | libc::CLONE_FS
                | libc::CLONE_FILES
                | libc::CLONE_SIGHAND
                | libc::CLONE_THREAD
                | libc::CLONE_SYSVSEM;
            let args = CloneArgs { flags: flags as u64 | CLONE_PTRACE, ..CloneArgs::default() };
            list.clone3(format!("clone of thread {tid}"), &args, &[*tid], slot);
        }
        self.files.plan_threads(task.ids.files_id, &task.tids, &mut list);
        task::plan_thread(&self.thread_plan(task, task.pid, core, mm), &mut list)?;
        list.op(Op::Trap);
        list.op(Op::Next);
        log_list(&list);
        Ok(self.tracees.area.place(&list)?)
    }

    /// Registers, masks, and the area gone: from here on every task is what it was.
    fn set_final_state(&mut self) -> Result<()> {
        let (area, len) = (self.tracees.area.start(), self.tracees.area.len() as u64);
        let mut cleared = HashSet::new();
        for task in self.alive() {
            let label = || format!("final state of task {}", task.pid);
            if cleared.insert(task.ids.vm_id) || task.ids.vm_id == 0 {
                let munmap = [area.0, len, 0, 0, 0, 0];
                let gone = self.tracees.bare_call(task.pid, libc::SYS_munmap, munmap).with_context(label)?;
                ensure!(gone == 0, "task {}: munmap of the area failed with {gone}", task.pid);
                self.tracees.stop_before_user_code(task.pid).with_context(label)?;
            }
            for (tid, core) in task.tids.iter().zip(&task.cores) {
                let mut state = task::final_state(core).with_context(label)?;
                state.enter_call(*tid, core);
                ptrace::set_regset(*tid, ptrace::NT_X86_XSTATE, &state.xstate)
                    .with_context(|| format!("xsave area of thread {tid}"))?;
                ptrace::set_sigmask(*tid, state.sigmask).with_context(label)?;
                ptrace::set_regs(*tid, &state.regs).with_context(|| format!("registers of thread {tid}"))?;
            }
        }
        Ok(())
    }

    /// Stops a task by the signal that had stopped it, while all its signals are still blocked: those
    /// that wait for it are delivered when it goes on, not before.
    fn stop(&self, task: &Task) -> Result<()> {
        let core = task.core()?;
        let wanted = core.tc.as_ref().and_then(|tc| tc.stop_signo).and_then(|s| i32::try_from(s).ok());
        let wanted = wanted.filter(|s| task::sigaction::is_default(core, *s)).unwrap_or(libc::SIGSTOP);
        self.tracees.stop_process(&task.tids, wanted)
    }

    /// The last thing that can fail. Killed before its end, crtool leaves nothing of the tree; killed after it, or with
    /// whatever else goes wrong then, all of it.
    fn commit(&mut self) -> Result<()> {
        let pids: Vec<i32> = self.alive().map(|t| t.pid).collect();
        let kill_guard = KillGuard::arm(&pids);
        for tid in self.alive().flat_map(|t| &t.tids) {
            ptrace::set_options(*tid, 0).with_context(|| format!("release of thread {tid}"))?;
        }
        match kill_guard {
            Ok(mut kill_guard) => kill_guard.disarm(),
            Err(error) => tracing::debug!("{:#}", anyhow!(error)),
        }
        self.tracees.release();
        Ok(())
    }

    /// Lets everybody go, also when that fails for one.
    fn let_go(&self, stop_all: bool) -> Result<()> {
        let mut failed = None;
        let mut note = |result: Result<(), Errno>, what: &str, id: i32| match result {
            // It was killed meanwhile: its own affair.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => drop(failed.get_or_insert_with(|| anyhow!(e).context(format!("{what} {id}")))),
        };
        for task in self.alive().filter(|t| stop_all && t.state != State::Stopped) {
            note(crate::sys::task::kill(task.pid, libc::SIGSTOP), "stop of task", task.pid);
        }
        for tid in self.alive().flat_map(|t| t.tids.iter().rev()) {
            note(ptrace::detach(*tid, 0), "detach of thread", *tid);
        }
        failed.map_or(Ok(()), Err)
    }

    fn pages_restored(&self) -> u64 {
        self.pages.iter().map(Pages::count).sum()
    }
}

/// The pages of a task, also those that parent snapshots have.
fn pages_of(store: &dyn Store, task: &Task) -> Result<Pages> {
    let id = u64::try_from(task.pid)?;
    let name = ImageKind::Pagemap.file_name(id);
    // Without it every page of the task would come back as zero.
    let pages = Pages::read(store, ImageKind::Pagemap, id)?;
    pages.with_context(|| format!("{} is missing", store.path_of(&name).display()))
}

/// What the first puppet does before anything else: hold until it is traced, shed what it has from us.
fn plan_first(list: &mut List, held: i32, go: i32) {
    list.call(
        "prctl(PR_SET_PDEATHSIG)",
        libc::SYS_prctl,
        &[PR_SET_PDEATHSIG.into(), libc::SIGKILL.into()],
        Want::Zero,
    );
    // The signal does not come if we are dead already, nor if we are not its parent. With nobody left who could
    // write, the read gives nothing, which is a failure, and that is a trap, which ends who is not traced.
    list.call("close(pipe)", libc::SYS_close, &[go.into()], Want::Zero);
    let byte = list.bytes(&[0]);
    list.call("read(pipe)", libc::SYS_read, &[held.into(), byte.into(), 1u64.into()], Want::Equal(1));
    list.call("close(pipe)", libc::SYS_close, &[held.into()], Want::Zero);
    if let Some((at, len, signature)) = rseq::own() {
        list.call(
            "rseq(unregister)",
            libc::SYS_rseq,
            &[at.into(), len.into(), RSEQ_FLAG_UNREGISTER.into(), signature.into()],
            Want::Any,
        );
    }
    list.call("set_robust_list", libc::SYS_set_robust_list, &[0u64.into(), 24u64.into()], Want::Zero);
    list.call("set_tid_address", libc::SYS_set_tid_address, &[0u64.into()], Want::Ok);
}

fn plan_step(
    list: &mut List,
    step: Step,
    forks: &ForkPlan,
    images: &Images,
    slots: &[RemoteAddr],
    maker: usize,
) -> Result<()> {
    let (child, sibling) = match step {
        Step::Setsid => {
            list.call("setsid", libc::SYS_setsid, &[], Want::Ok);
            return Ok(());
        }
        Step::LeadGroup => {
            list.call("setpgid(0, 0)", libc::SYS_setpgid, &[0u64.into(), 0u64.into()], Want::Zero);
            return Ok(());
        }
        Step::Make(child) => (child, false),
        Step::MakeSibling(child) => (child, true),
    };
    let puppet = forks.puppets.get(child).context("a fork without a child")?;
    let ids = |p: usize| {
        forks.puppets.get(p).and_then(|p| p.task).and_then(|t| images.tasks.get(t)).map(|t| &t.ids)
    };
    let mut flags = CLONE_PTRACE;
    if sibling {
        flags |= libc::CLONE_PARENT as u64;
    } else if let (Some(a), Some(b)) = (ids(maker), ids(child)) {
        if a.files_id == b.files_id && b.files_id != 0 {
            flags |= libc::CLONE_FILES as u64;
        }
        if a.fs_id == b.fs_id && b.fs_id != 0 {
            flags |= libc::CLONE_FS as u64;
        }
        if a.vm_id == b.vm_id && b.vm_id != 0 {
            flags |= libc::CLONE_VM as u64;
            if a.sighand_id == b.sighand_id {
                flags |= libc::CLONE_SIGHAND as u64;
            }
        }
    }
    let exit_signal = if sibling { 0 } else { libc::SIGCHLD as u64 };
    let args = CloneArgs { flags, exit_signal, ..CloneArgs::default() };
    list.clone3(format!("clone of task {}", puppet.pid), &args, &[puppet.pid], slots[child]);
    Ok(())
}

/// No thread was stopped inside `[start, end)`, code whose data is gone.
fn not_within(task: Option<&Task>, start: u64, end: u64) -> Result<()> {
    let Some(task) = task else { return Ok(()) };
    for (tid, core) in task.tids.iter().zip(&task.cores) {
        let ip = core.thread_info.as_ref().map_or(0, |i| i.gpregs.ip);
        ensure!(
            !(start..end).contains(&ip),
            "thread {tid} of task {} was stopped inside the vdso of another kernel; dump it again",
            task.pid
        );
    }
    Ok(())
}

/// Whether a puppet has the address space of its maker (CLONE_VM).
fn shares_memory(forks: &ForkPlan, images: &Images, index: usize) -> Result<bool> {
    let task = |i: usize| forks.puppets.get(i).and_then(|p| p.task).and_then(|t| images.tasks.get(t));
    let Some(own) = task(index).filter(|t| !t.is_zombie()) else { return Ok(false) };
    if forks.maker(index).and_then(task).is_some_and(|m| m.ids.vm_id == own.ids.vm_id) {
        return Ok(true);
    }
    match images.tasks.iter().find(|t| t.pid != own.pid && !t.is_zombie() && t.ids.vm_id == own.ids.vm_id) {
        // The other one is its child, or a child of a child.
        Some(other) if images.tasks.iter().position(|t| t.pid == other.pid) > Some(index) => Ok(false),
        Some(other) => bail!(
            "task {} shares memory with task {}, which is not its parent; this cannot be made yet",
            own.pid,
            other.pid
        ),
        None => Ok(false),
    }
}

/// The shared memory for lists, where no task of the tree will have anything, nor have we.
fn make_area<'m>(mms: impl Iterator<Item = &'m pb::MmEntry>) -> Result<Area> {
    let mut used: Vec<(u64, u64)> = mms.flat_map(|mm| mm.vmas.iter().map(|v| (v.start, v.end))).collect();
    used.extend(crate::tracee::read_maps(std::process::id().cast_signed())?.iter().map(|v| (v.start, v.end)));
    let at =
        memory::free_everywhere(used, AREA_LEN).context("no address is free in all tasks of the tree")?;
    let at = at + VDSO_ROOM;
    let fd = memfd(c"crtool", AREA_LEN).context("memory for lists")?;
    let map =
        Mapping::shared(fd.as_fd(), 0, usize::try_from(AREA_LEN)?, Access::All, Some(usize::try_from(at)?))
            .context("mapping of the memory for lists")?;
    tracing::debug!("lists at {at:#x}, descriptor {}", fd.as_raw_fd());
    Ok(Area::new(map, RemoteAddr(at))?)
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
            interrupt::check()?;
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

fn who_is(pid: i32) -> Option<stat::Stat> {
    stat::parse(&std::fs::read(format!("/proc/{pid}/stat")).ok()?).ok()
}

/// Why a pid could not be had.
fn taken(pid: i32, error: Errno) -> anyhow::Error {
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
