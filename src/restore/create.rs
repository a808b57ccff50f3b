//! The first act: all processes are made, each with its final address space, filled.
//!
//! The first one is cloned from crtool, the others by their makers. Each leaves what it had from its maker and maps
//! what is its own before it makes anybody, so that children share pages copy-on-write as they did.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fs::File,
    io::Write as _,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    rc::Rc,
};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use super::{
    CLONE_PTRACE, Images, Task,
    clocks::TreeClocks,
    cow::ParentMemory,
    layout::{self, Made, MappedObjects, Space},
    log_list,
    page_threads::{PageThreads, Spawner},
    pid_allocator::PidAllocator,
    plan,
    puppets::{AreaId, Puppets},
    shared::{SharedObjects, WantedObjects},
    taken, vdso,
};
use crate::{
    deadline,
    files::{Descriptors, FIRST_SHARED, FilesRestore, SUPERVISOR},
    image::{ImageKind, Store, TypedStore, pb},
    mem::{pkeys, vma},
    pages::{PAGE, Pages},
    process_tree::{ForkPlan, PlannedPid, Share, Step, ids::on_host},
    progress,
    settings::RestoreSettings,
    stats::RestoreStats,
    sys::{
        Errno,
        clone::{CloneArgs, clone_into},
        pid::{HostPid, NsPid},
        pidfd, pipe, ptrace, rseq,
    },
    task::{self, PendingStop},
    tracee::{List, Op, RemoteAddr, Want},
};

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_NAME: u64 = 15;
const RSEQ_FLAG_UNREGISTER: u64 = 1;

/// A tree under construction.
pub(super) struct Construction<'i> {
    pub(super) images: &'i Images,
    pub(super) forks: ForkPlan,
    /// What each process shares with its maker.
    shares: Vec<Share>,
    /// Those that are made with a descriptor table that others have too.
    in_shared_tables: HashSet<usize>,
    pub(super) files: FilesRestore<'i>,
    pub(super) puppets: Puppets,
    /// Ids of all processes, also of helpers.
    pub(super) pids: Vec<NsPid>,
    /// Areas and slots of all processes.
    pub(super) places: Vec<(AreaId, RemoteAddr)>,
    pub(super) made: Vec<Made>,
    pub(super) clocks: TreeClocks,
    /// Protection keys, by pid.
    pub(super) keys: HashMap<NsPid, pkeys::Plan>,
    pub(super) seccomp: task::seccomp::Plan,
    pub(super) supervisor: task::Supervisor,
    /// Numbers for descriptors of those who share a table: none is used twice.
    pub(super) next_shared: i32,
    /// SIGSTOPs that pend, which come when all are let go.
    pub(super) pending_stops: Vec<(NsPid, NsPid, PendingStop)>,
    pub(super) page_threads: PageThreads,
    /// The address space of the task that makes the one which is planned.
    maker_mm: Option<(usize, Rc<Cow<'i, pb::MmEntry>>)>,
    pub(super) pages: Vec<Pages>,
    /// Held open until all have mapped them.
    pub(super) shared: SharedObjects,
    /// What lists may not touch.
    reserved: (u64, u64),
    own_vdso: Option<vdso::Own>,
    /// Of ourselves, for processes to fetch descriptors by.
    pidfd: OwnedFd,
    gate: Gate,
}

/// The first process waits for a byte from it. Our death is the end of the pipe, and its own.
struct Gate {
    go: File,
    held: OwnedFd,
}

impl MappedObjects for (&mut FilesRestore<'_>, &SharedObjects) {
    fn file(&mut self, id: u32, vma: &pb::VmaEntry) -> Result<i32> {
        let shared = vma.flags & libc::MAP_SHARED.cast_unsigned() != 0;
        let write = vma.prot & libc::PROT_WRITE.cast_unsigned() != 0
            || vma.fdflags.unwrap_or(0) & libc::O_ACCMODE.cast_unsigned() == libc::O_RDWR.cast_unsigned();
        Ok(self.0.vma_file(id, shared && write)?)
    }
    fn shared(&mut self, shmid: u64, vma: &pb::VmaEntry) -> Result<i32> {
        if vma.status & layout::status::MEMFD != 0 {
            return self.file(u32::try_from(shmid).context("memfd id")?, vma);
        }
        self.1.get(shmid)
    }
}

impl<'i> Construction<'i> {
    /// Plans the first lists of everybody: address spaces and clones.
    pub(super) fn plan(
        store: &'i dyn Store,
        images: &'i Images,
        forks: ForkPlan,
        files: FilesRestore<'i>,
        clocks: TreeClocks,
    ) -> Result<Self> {
        let mut this = Self::new(store, images, forks, files, clocks)?;
        this.shared.fill()?;
        for index in this.forks.order() {
            this.plan_process(index)?;
        }
        this.maker_mm = None;
        Ok(this)
    }

    /// Reads and checks what is needed for the lists of everybody; pages need not be there yet.
    pub(super) fn new(
        store: &'i dyn Store,
        images: &'i Images,
        forks: ForkPlan,
        files: FilesRestore<'i>,
        clocks: TreeClocks,
    ) -> Result<Self> {
        let filters: pb::SeccompEntry = store.read_one(ImageKind::Seccomp, None)?.unwrap_or_default();
        let mut seccomp = task::seccomp::Plan::new(&filters)?;
        let mut keys = HashMap::new();
        let (mut areas, mut wanted) = (plan::Areas::default(), WantedObjects::default());
        for task in &images.tasks {
            let Some(mm) = task.mm() else { continue };
            vma::check(&mm, task.pid)?;
            let cores: Vec<_> = task.threads().map(|(_, core)| core).collect();
            keys.insert(
                task.pid,
                pkeys::plan(&mm, task.pid, cores.iter().any(|core| pkeys::known_to(core)))?,
            );
            for core in &cores {
                task::final_state(core).with_context(|| format!("state of task {}", task.pid))?;
            }
            seccomp.process(task.pid, cores.iter().map(AsRef::as_ref))?;
            areas.add(&mm, cores.len());
            wanted.add(&mm)?;
        }
        let shared = SharedObjects::make(store, wanted)?;
        let mut pages = Vec::with_capacity(images.tasks.len());
        for task in &images.tasks {
            pages.push(if task.is_zombie() { Pages::default() } else { pages_of(store, task)? });
        }
        progress::phase("memory", pages.iter().map(Pages::count).sum::<u64>() * PAGE);
        let (place, reserved) = areas.place()?;
        let of_tree = images.tasks.iter().flat_map(|t| t.tids.iter().copied().chain([t.pgid, t.sid]));
        let mut allocator = PidAllocator::new(of_tree);
        let mut pids = Vec::with_capacity(forks.processes.len());
        for process in &forks.processes {
            pids.push(match process.pid {
                PlannedPid::Exact(pid) => pid,
                PlannedPid::Any => allocator.pick()?,
            });
        }
        let (held, go) = pipe::pipe2(libc::O_CLOEXEC).context("pipe")?;
        let shares = forks.shares();
        let with_shares = forks.processes.iter().zip(&shares).enumerate();
        let sharing = with_shares.filter(|(_, (_, share))| share.files);
        let in_shared_tables =
            sharing.flat_map(|(index, (process, _))| [Some(index), process.maker]).flatten();
        let in_shared_tables = in_shared_tables.collect();
        let mut this = Self {
            images,
            shares,
            in_shared_tables,
            files,
            puppets: Puppets::new(place, allocator),
            pids,
            places: Vec::new(),
            made: Vec::new(),
            keys,
            clocks,
            seccomp,
            supervisor: task::Supervisor::probe()?,
            next_shared: FIRST_SHARED,
            pending_stops: Vec::new(),
            page_threads: PageThreads::new(),
            maker_mm: None,
            pages,
            shared,
            reserved,
            own_vdso: vdso::Own::read()?,
            pidfd: pidfd::open(HostPid::own().get(), 0).context("pidfd of crtool")?,
            gate: Gate { go: File::from(go), held },
            forks,
        };
        this.places = this.add_places()?;
        this.made.resize_with(this.forks.processes.len(), Made::default);
        Ok(this)
    }

    /// Areas and slots of all processes: those that share their address space share the area.
    fn add_places(&mut self) -> Result<Vec<(AreaId, RemoteAddr)>> {
        let mut places = vec![None; self.forks.processes.len()];
        for index in self.forks.order() {
            let maker = self.forks.processes.get(index).and_then(|p| p.maker);
            let of_maker = maker.and_then(|m| places.get(m).copied().flatten());
            let shared = of_maker.filter(|_| self.share_of(index).vm);
            let place = match shared {
                Some((area, _)) => (area, self.puppets.add_slot(area)?),
                None => {
                    let area = self.puppets.add_area()?;
                    (area, self.puppets.leader_slot(area)?)
                }
            };
            *places.get_mut(index).context("a process that nobody has planned")? = Some(place);
        }
        places.into_iter().map(|place| place.context("a process that nobody makes")).collect()
    }

    pub(super) fn place(&self, index: usize) -> Result<(AreaId, RemoteAddr)> {
        self.places.get(index).copied().context("a process without a place")
    }

    pub(super) fn pid(&self, index: usize) -> Result<NsPid> {
        self.pids.get(index).copied().context("a process without an id")
    }

    pub(super) fn alive(&self) -> impl Iterator<Item = &'i Task> + use<'i> {
        self.images.tasks.iter().filter(|t| !t.is_zombie())
    }

    pub(super) fn task_of(&self, index: usize) -> Option<&'i Task> {
        self.forks.processes.get(index)?.task.and_then(|t| self.images.tasks.get(t))
    }

    /// Numbers for the descriptors that process `index` has while it is made.
    pub(super) fn descriptors_of(&self, index: usize) -> Descriptors {
        if self.in_shared_tables.contains(&index) {
            Descriptors::sharing(self.next_shared)
        } else {
            Descriptors::alone()
        }
    }

    /// What process `index` shares with its maker.
    pub(super) fn share_of(&self, index: usize) -> Share {
        self.shares.get(index).copied().unwrap_or_default()
    }

    /// The first list of one process.
    fn plan_process(&mut self, index: usize) -> Result<()> {
        let mut list = List::new(format!("creation of {}", self.pid(index)?));
        let mut descriptors = self.descriptors_of(index);
        if self.plan_begin(index, &mut descriptors, &mut list)? {
            self.plan_content(index, &mut descriptors, &mut list)
                .with_context(|| format!("memory of process {index}"))?;
        }
        let steps = self.forks.processes.get(index).map_or(0, |process| process.steps.len());
        self.plan_steps(index, 0..steps, &mut descriptors, &mut list)?;
        self.next_shared = self.next_shared.max(descriptors.end());
        self.announce(index, list)
    }

    /// Announces a process with its first list.
    pub(super) fn announce(&mut self, index: usize, mut list: List) -> Result<()> {
        list.op(Op::Stop);
        list.op(Op::Next);
        log_list(&list);
        let pid = self.pid(index)?;
        let process = self.forks.processes.get(index).context("a process that is not planned")?;
        let label = match process.task {
            Some(_) => format!("task {pid}"),
            None if index == self.forks.first => format!("helper {pid} (the root's intermediate parent)"),
            None => format!("helper {pid}"),
        };
        let copy_of = match process.maker {
            Some(maker) if !self.share_of(index).vm => Some(self.place(maker)?.0),
            _ => None,
        };
        let place = self.place(index)?;
        self.puppets.expect_process(on_host(pid), label, place, copy_of, &list)
    }

    /// What a process does first; says whether it has mapped memory that is to be filled.
    pub(super) fn plan_begin(
        &mut self,
        index: usize,
        descriptors: &mut Descriptors,
        list: &mut List,
    ) -> Result<bool> {
        let process = self.forks.processes.get(index).context("a process that is not planned")?;
        let (first, maker) = (index == self.forks.first, process.maker);
        let task = self.task_of(index);
        if first {
            plan_first(list, &self.gate, self.pidfd.as_raw_fd());
            self.clocks.plan_first(list);
        } else if maker.is_some_and(|maker| self.in_shared_tables.contains(&maker))
            && !self.share_of(index).files
        {
            // The copy of a table holds what others who share it had at that moment.
            plan_shed(list);
        }
        let mut mapped = false;
        match task.filter(|t| !t.is_zombie()) {
            Some(_) if self.share_of(index).vm => {}
            // What it makes is to have what crtool would have given it.
            None if first => {}
            None => layout::plan_clear(list, self.reserved, &[]),
            Some(task) => {
                let made = self
                    .plan_memory(index, task, descriptors, list)
                    .with_context(|| format!("memory of task {}", task.pid))?;
                *self.made.get_mut(index).context("a task that is not planned")? = made;
                mapped = true;
            }
        }
        if let Some(core) = task.filter(|t| t.is_zombie()).and_then(|t| t.core().ok())
            && let Some(tc) = &core.tc
        {
            let comm = list.cstr(&tc.comm);
            list.call("PR_SET_NAME", libc::SYS_prctl, &[PR_SET_NAME.into(), comm.into()], Want::Zero);
        }
        Ok(mapped)
    }

    /// Steps of a process.
    pub(super) fn plan_steps(
        &mut self,
        index: usize,
        which: Range<usize>,
        descriptors: &mut Descriptors,
        list: &mut List,
    ) -> Result<()> {
        let pid = self.pid(index)?;
        let process = self.forks.processes.get(index).context("a process that is not planned")?;
        let steps = process.steps.get(which).unwrap_or_default().to_vec();
        for step in steps {
            self.plan_step(list, step)?;
            if step == Step::Setsid && self.task_of(index).is_some() {
                self.files.plan_controlling(pid, descriptors, list);
                descriptors.close_all(list);
            }
        }
        Ok(())
    }

    fn plan_memory(
        &mut self,
        index: usize,
        task: &'i Task,
        descriptors: &mut Descriptors,
        list: &mut List,
    ) -> Result<Made> {
        let mm = task.mm().context("no mm image")?;
        let exe_fd = self.files.vma_file(mm.exe_file_id, false).context("program")?;
        let maker =
            self.forks.processes.get(index).and_then(|p| p.maker).and_then(|m| self.forks.processes.get(m));
        let maker = maker.and_then(|maker| maker.task);
        // One after another has the same maker.
        if self.maker_mm.as_ref().is_none_or(|(of, _)| Some(*of) != maker) {
            self.maker_mm = maker.and_then(|of| Some((of, Rc::new(self.images.tasks.get(of)?.mm()?))));
        }
        let maker_mm = self.maker_mm.clone();
        let parent =
            maker_mm.as_ref().and_then(|(of, mm)| Some(ParentMemory { mm, pages: self.pages.get(*of)? }));
        let pages = self.pages.get(index).context("a task without pages")?;
        let space = Space { pid: task.pid, mm: &mm, pages, exe_fd, parent, area: self.reserved };
        layout::plan_map(list, &space, &mut (&mut self.files, &self.shared), descriptors)
    }

    /// Fills memory that is mapped, all of whose pages are there, and finishes it.
    fn plan_content(&mut self, index: usize, descriptors: &mut Descriptors, list: &mut List) -> Result<()> {
        self.plan_load(index, None, descriptors, list)?;
        self.plan_last_of_memory(index, descriptors, list)
    }

    /// Fills memory with what of its pages lies in the first bytes of each image, or with all. Says whether there was anything.
    pub(super) fn plan_load(
        &mut self,
        index: usize,
        there: Option<&[u64]>,
        descriptors: &mut Descriptors,
        list: &mut List,
    ) -> Result<bool> {
        let id = self.place(index)?.0;
        let pages = self.pages.get(index).context("a task without pages")?;
        let made = self.made.get_mut(index).context("a task that is not planned")?;
        let load = match there {
            Some(there) => made.take_there(pages, there)?,
            None => made.take_all(pages)?,
        };
        let (area, pids) = self.puppets.area_and_pids(id)?;
        let mut spawner = Spawner { threads: &mut self.page_threads, id, area, pids };
        layout::plan_fill(list, pages, (&load, made), descriptors, &mut spawner)?;
        Ok(!load.is_empty())
    }

    /// What is left to be done in memory that is filled.
    pub(super) fn plan_last_of_memory(
        &mut self,
        index: usize,
        descriptors: &mut Descriptors,
        list: &mut List,
    ) -> Result<()> {
        let task = self.task_of(index).context("memory of nobody")?;
        let mm = task.mm().context("no mm image")?;
        let pages = self.pages.get(index).context("a task without pages")?;
        let vdso = vdso::plan(&mm, pages, self.own_vdso.as_ref(), self.reserved.0)?;
        if let vdso::Plan::Foreign { start, end, .. } = &vdso {
            not_within(task, *start, *end)?;
        }
        let made = self.made.get(index).context("a task that is not planned")?;
        layout::plan_end(list, (task.pid, pages), made, &vdso, descriptors)
    }

    fn plan_step(&self, list: &mut List, step: Step) -> Result<()> {
        match step {
            Step::Setsid => {
                list.call("setsid", libc::SYS_setsid, &[], Want::Ok);
            }
            Step::LeadGroup => {
                list.call("setpgid(0, 0)", libc::SYS_setpgid, &[0u64.into(), 0u64.into()], Want::Zero);
            }
            Step::Unshare { files, fs } => {
                let flags = if files { libc::CLONE_FILES } else { 0 } | if fs { libc::CLONE_FS } else { 0 };
                list.call("unshare", libc::SYS_unshare, &[flags.into()], Want::Zero);
                if files {
                    plan_shed(list);
                }
            }
            Step::Make { child, sibling, share } => {
                let mut flags = CLONE_PTRACE;
                for (wanted, flag) in [
                    (sibling, libc::CLONE_PARENT),
                    (share.vm, libc::CLONE_VM),
                    (share.sighand, libc::CLONE_SIGHAND),
                    (share.files, libc::CLONE_FILES),
                    (share.fs, libc::CLONE_FS),
                ] {
                    if wanted {
                        flags |= u64::from(flag.cast_unsigned());
                    }
                }
                // With CLONE_PARENT a child has the exit signal of its maker.
                let exit_signal = if sibling { 0 } else { libc::SIGCHLD as u64 };
                let args = CloneArgs { flags, exit_signal, ..CloneArgs::default() };
                let pid = self.pid(child)?;
                list.clone3(format!("clone of task {pid}"), &args, &[pid], self.place(child)?.1);
            }
        }
        Ok(())
    }

    /// Clones the first process, and all others by it.
    pub(super) fn create(&mut self, settings: &RestoreSettings) -> Result<()> {
        self.start_first(settings)?;
        self.puppets.settle()?;
        self.page_threads.check(&self.puppets)?;
        self.know_ids();
        Ok(())
    }

    /// The root's pid.
    pub(super) fn root(&self) -> Result<Pid> {
        let root = self.images.tasks.first().context("no root")?.pid;
        Ok(Pid::from_raw(on_host(root).get()))
    }

    /// Clones the first process.
    pub(super) fn start_first(&mut self, settings: &RestoreSettings) -> Result<()> {
        let first = self.forks.first;
        let (area, _) = self.place(first)?;
        let sibling = settings.detached && settings.sibling;
        let map = self.puppets.map_first(area)?;
        let pid = loop {
            let wanted = self.pid(first)?;
            let (runner, list, slot) = self.puppets.entry(on_host(wanted))?;
            let set_tid = [wanted];
            let args = CloneArgs {
                flags: if sibling { libc::CLONE_PARENT as u64 } else { 0 },
                exit_signal: if sibling { 0 } else { libc::SIGCHLD as u64 },
                set_tid: set_tid.as_ptr() as u64,
                set_tid_size: 1,
                ..CloneArgs::default()
            };
            match clone_into(&args, runner.0, list.0, slot.0) {
                Ok(pid) => break pid,
                Err(Errno::EEXIST) if self.puppets.pids.gave(wanted) => {
                    let other = self.puppets.pids.pick()?;
                    self.puppets.rename(wanted, other);
                    *self.pids.get_mut(first).context("nobody is first")? = other;
                }
                Err(Errno::EEXIST) if self.puppets.may_become_free(wanted) => deadline::check()?,
                Err(error) => return Err(taken(wanted, error)),
            }
        };
        self.puppets.first_runs(pid)?;
        drop(map);
        let options = ptrace::O_TRACESYSGOOD | ptrace::O_EXITKILL;
        ptrace::seize(pid, options | ptrace::O_SUSPEND_SECCOMP)
            .or_else(|_| ptrace::seize(pid, options))
            .context("seize of the restored root")?;
        self.gate.go.write_all(&[1]).context("word to the first process")
    }

    /// Ids that somebody else had taken were exchanged for others.
    pub(super) fn know_ids(&mut self) {
        for (planned, known) in self.forks.processes.iter().zip(&mut self.pids) {
            if planned.pid == PlannedPid::Any {
                *known = self.puppets.current_id(*known);
            }
        }
    }

    /// What the restore took.
    pub(super) fn stats(&self) -> RestoreStats {
        RestoreStats {
            pages_restored: self.pages.iter().map(Pages::count).sum(),
            pages_compared: self.made.iter().map(|m| m.compared).sum(),
            pages_skipped_cow: self.made.iter().map(|m| m.kept).sum(),
            ..RestoreStats::default()
        }
    }
}

/// The pages of a task, also those that parent snapshots have.
fn pages_of(store: &dyn Store, task: &Task) -> Result<Pages> {
    let id = u64::from(task.pid.bits());
    let name = ImageKind::Pagemap.file_name(id);
    // Without it every page of the task would come back as zero.
    let pages = Pages::read(store, ImageKind::Pagemap, id)?;
    pages.with_context(|| format!("{} is missing", store.path_of(&name).display()))
}

/// Closes all descriptors but that of the supervisor.
fn plan_shed(list: &mut List) {
    let others = [(SUPERVISOR + 1).into(), u32::MAX.into()];
    list.call("close_range", libc::SYS_close_range, &others, Want::Zero);
}

/// What the first process does before anything else: hold until it is traced, shed what it has from us.
fn plan_first(list: &mut List, gate: &Gate, pidfd: i32) {
    list.call(
        "prctl(PR_SET_PDEATHSIG)",
        libc::SYS_prctl,
        &[PR_SET_PDEATHSIG.into(), libc::SIGKILL.into()],
        Want::Zero,
    );
    // The signal does not come if we are dead already, nor if we are not its parent. With nobody left who could
    // write, the read gives nothing, which is a failure, and that is a trap, which ends who is not traced.
    list.call("close(pipe)", libc::SYS_close, &[gate.go.as_raw_fd().into()], Want::Zero);
    let byte = list.bytes(&[0]);
    let args = [gate.held.as_raw_fd().into(), byte.into(), 1u64.into()];
    list.call("read(pipe)", libc::SYS_read, &args, Want::Equal(1));
    if pidfd != SUPERVISOR {
        let args = [pidfd.into(), SUPERVISOR.into(), libc::O_CLOEXEC.into()];
        list.call(
            "dup3 of the pidfd",
            libc::SYS_dup3,
            &args,
            Want::Equal(u64::from(SUPERVISOR.cast_unsigned())),
        );
    }
    plan_shed(list);
    if let Some((at, len, signature)) = rseq::own() {
        list.call(
            "rseq(unregister)",
            libc::SYS_rseq,
            &[at.into(), len.into(), RSEQ_FLAG_UNREGISTER.into(), signature.into()],
            Want::Any,
        );
    }
    // Of a root that has no capabilities a process of the same kind may write the memory, and its threads do not become so all
    // at once. Where other ids are set the kernel does this by itself.
    let args = [libc::PR_SET_DUMPABLE.into(), 0u64.into()];
    list.call("PR_SET_DUMPABLE", libc::SYS_prctl, &args, Want::Zero);
    list.call("set_robust_list", libc::SYS_set_robust_list, &[0u64.into(), 24u64.into()], Want::Zero);
    list.call("set_tid_address", libc::SYS_set_tid_address, &[0u64.into()], Want::Ok);
}

/// No thread was stopped inside `[start, end)`, code whose data is gone.
fn not_within(task: &Task, start: u64, end: u64) -> Result<()> {
    for (tid, core) in task.threads() {
        let ip = core.thread_info.as_ref().map_or(0, |i| i.gpregs.ip);
        ensure!(
            !(start..end).contains(&ip),
            "thread {tid} of task {} was stopped inside the vdso of another kernel; dump it again",
            task.pid
        );
    }
    Ok(())
}
