//! Processes under construction ("puppets"): under ptrace, each of their threads waiting or running a list.
//!
//! A puppet has an area of its own for lists, private memory at an address that is free in the whole tree, which crtool writes
//! through process_vm_writev(2). Only puppets that share their address space share an area. The runner in it cannot be
//! written by the puppet. So whoever may write the memory of one task of the tree, as a process of the same user may once the
//! task has its credentials, cannot reach code that another task executes.
//!
//! [`Puppets`] knows who is there, lets lists run, and takes reports until everybody it waits for has come to the end of its list. Dropped
//! before [`Puppets::release`], it kills and reaps everything it holds; and if crtool itself is killed, EXITKILL does the same.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::pid_allocator::PidAllocator;
use crate::{
    deadline,
    process_tree::ids::on_host,
    progress,
    sys::{
        Errno,
        mapping::Mapping,
        pid::{HostPid, NsPid},
        ptrace, task, wait,
        wait::Status,
    },
    task::robust_list::{self, SharedBytes},
    tracee::{
        Area, CODE_LEN, Failure, KnownNames, List, Memory, Op, Placed, RemoteAddr, TraceError, code_page,
        procfs,
    },
};

const PAGE: usize = 4096;
/// What of an area is mapped from the beginning: enough for most processes.
const FIRST_LEN: usize = 256 << 10;

/// Bytes of a `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// Index of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct AreaId(usize);

/// Where areas lie in every puppet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) at: RemoteAddr,
    /// Most bytes that an area may have.
    pub(super) len: usize,
}

/// What a thread of ours is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Announced, not seen yet.
    Expected,
    /// Running a list.
    Running,
    /// At the end of its list.
    Waiting,
    /// Ended, as planned.
    Gone,
}

/// How a thread is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Not now.
    No,
    /// By itself, with any status.
    Exit,
    /// By this signal.
    Signal(i32),
}

/// One thread of a puppet.
#[derive(Debug)]
struct Member {
    label: String,
    area: AreaId,
    slot: RemoteAddr,
    /// The first list.
    start: RemoteAddr,
    /// The list that it has not come to the end of.
    list: Option<Placed>,
    doing: Doing,
    end: End,
    /// The area that its maker had, if it comes with a copy of that which is to become its own.
    copy_of: Option<AreaId>,
}

/// An area and how much of it is mapped.
#[derive(Debug)]
struct Mapped {
    area: Area,
    len: usize,
    leader_slot: RemoteAddr,
}

/// All threads of a restore.
#[derive(Debug)]
pub(super) struct Puppets {
    place: Place,
    areas: Vec<Mapped>,
    /// Where a list goes on that has failed; at the same place in all areas.
    on_fail: RemoteAddr,
    members: HashMap<HostPid, Member>,
    /// What lists are called.
    names: KnownNames,
    /// Process ids, in the order in which they were announced.
    leaders: Vec<HostPid>,
    armed: bool,
    pub(super) pids: PidAllocator,
    /// The id that was found to be taken last, and when that was found first.
    taken: Option<(NsPid, Instant)>,
    /// Ids that somebody else had taken, and what came instead.
    renamed: HashMap<NsPid, NsPid>,
    /// Threads at the exit of a call that crtool made in them.
    within_call: HashSet<HostPid>,
    /// Pages that they all had in memory when that was last looked at.
    resident: u64,
}

/// Waits for the next report of a thread.
fn report_of(tid: HostPid) -> Result<Status> {
    loop {
        match wait::wait_raw(tid, 0) {
            Ok(Some((_, raw))) => {
                deadline::progress();
                return Ok(Status::from_raw(raw));
            }
            Ok(None) => {}
            Err(Errno::EINTR) => deadline::check()?,
            Err(e) => return Err(anyhow!(e).context(format!("wait for thread {tid}"))),
        }
    }
}

impl Puppets {
    pub(super) fn new(place: Place, pids: PidAllocator) -> Self {
        Self {
            place,
            areas: Vec::new(),
            on_fail: place.at,
            members: HashMap::new(),
            names: KnownNames::default(),
            leaders: Vec::new(),
            armed: true,
            pids,
            taken: None,
            renamed: HashMap::new(),
            within_call: HashSet::new(),
            resident: 0,
        }
    }

    /// An area for one more address space.
    pub(super) fn add_area(&mut self) -> Result<AreaId> {
        let mut area = Area::planned(self.place.at, self.place.len);
        let leader_slot = area.slot()?;
        let mut fail = List::new("after a failure");
        fail.op(Op::Trap);
        self.on_fail = area.place(&fail)?.start;
        self.areas.push(Mapped { area, len: 0, leader_slot });
        Ok(AreaId(self.areas.len() - 1))
    }

    pub(super) fn area(&self, id: AreaId) -> Result<&Area> {
        Ok(&self.areas.get(id.0).context("no such area")?.area)
    }

    fn mapped(&mut self, id: AreaId) -> Result<&mut Mapped> {
        self.areas.get_mut(id.0).context("no such area")
    }

    /// An area to plan in, and ids for threads.
    pub(super) fn area_and_pids(&mut self, id: AreaId) -> Result<(&mut Area, &mut PidAllocator)> {
        let mapped = self.areas.get_mut(id.0).context("no such area")?;
        Ok((&mut mapped.area, &mut self.pids))
    }

    /// The slot of a process that is alone in its area.
    pub(super) fn leader_slot(&mut self, id: AreaId) -> Result<RemoteAddr> {
        Ok(self.mapped(id)?.leader_slot)
    }

    /// One more slot in an area.
    pub(super) fn add_slot(&mut self, id: AreaId) -> Result<RemoteAddr> {
        Ok(self.mapped(id)?.area.slot()?)
    }

    /// Announces a process that another one is going to make, with its first list. `copy_of`: it comes with a copy of that
    /// area, which becomes its own; `None` if it shares the area.
    pub(super) fn expect_process(
        &mut self,
        pid: HostPid,
        label: String,
        (area, slot): (AreaId, RemoteAddr),
        copy_of: Option<AreaId>,
        list: &List,
    ) -> Result<()> {
        self.leaders.push(pid);
        self.expect(pid, label, (area, slot), copy_of, list)
    }

    /// Announces a thread `tid` that a list is going to make.
    pub(super) fn expect_thread(
        &mut self,
        tid: HostPid,
        label: String,
        at: (AreaId, RemoteAddr),
        list: &List,
    ) -> Result<()> {
        self.expect(tid, label, at, None, list)
    }

    fn expect(
        &mut self,
        tid: HostPid,
        label: String,
        (area, slot): (AreaId, RemoteAddr),
        copy_of: Option<AreaId>,
        list: &List,
    ) -> Result<()> {
        let on_fail = self.on_fail;
        let mapped = self.mapped(area)?;
        let mut list = mapped.area.place(list)?;
        mapped.area.arm(slot, list.start, on_fail)?;
        mapped.area.pack();
        self.names.share(&mut list);
        let start = list.start;
        let list = Some(list);
        let member = Member { label, area, slot, start, list, doing: Doing::Expected, end: End::No, copy_of };
        ensure!(self.members.insert(tid, member).is_none(), "id {tid} occurs twice");
        Ok(())
    }

    /// Maps the area of the first process in our own memory, of which it is going to be a copy. The mapping goes when it is
    /// dropped: after the clone.
    pub(super) fn map_first(&mut self, id: AreaId) -> Result<Arc<Mapping>> {
        let place = self.place;
        let mapped = self.mapped(id)?;
        mapped.len = mapped.area.used().next_multiple_of(PAGE).max(FIRST_LEN).min(place.len);
        let at = usize::try_from(place.at.0)?;
        let map = Arc::new(Mapping::private(mapped.len, Some(at)).context("memory for lists")?);
        map.write(0, &code_page(place.at, place.len)).context("memory for lists")?;
        map.protect_code(CODE_LEN).context("memory for lists")?;
        mapped.area.attach(Memory::Own(Arc::clone(&map)));
        mapped.area.flush()?;
        Ok(map)
    }

    /// Entry point of the runner, and where process `pid` begins: its first list and its slot.
    pub(super) fn entry(&self, pid: HostPid) -> Result<(RemoteAddr, RemoteAddr, RemoteAddr)> {
        let member = self.members.get(&pid).context("nobody to start")?;
        Ok((self.area(member.area)?.runner(), member.start, member.slot))
    }

    /// The first process has been cloned from us, and runs.
    pub(super) fn first_runs(&mut self, pid: HostPid) -> Result<()> {
        let member = self.members.get_mut(&pid).context("nobody has been cloned")?;
        member.doing = Doing::Running;
        let area = member.area;
        self.mapped(area)?.area.attach(Memory::Process(pid));
        Ok(())
    }

    /// Gives a waiting thread its next list; it starts with [`Self::resume`].
    pub(super) fn next_list(&mut self, tid: HostPid, list: &List) -> Result<()> {
        let member = self.members.get(&tid).context("a list for nobody")?;
        let (area, slot) = (member.area, member.slot);
        let mapped = self.mapped(area)?;
        let mut placed = mapped.area.place(list)?;
        mapped.area.set_next(slot, placed.start)?;
        self.flush(tid)?;
        self.names.share(&mut placed);
        if let Some(member) = self.members.get_mut(&tid) {
            member.list = Some(placed);
        }
        Ok(())
    }

    /// Lets a waiting thread run a list to its end, whatever became of the list before.
    pub(super) fn run_list(&mut self, tid: HostPid, list: &List) -> Result<()> {
        self.next_list(tid, list)?;
        let member = self.members.get(&tid).context("nobody to run a list")?;
        let start = member.list.as_ref().context("a list without a place")?.start;
        let mut regs = ptrace::get_regs(tid)?;
        (regs.rip, regs.rbx, regs.orig_rax) = (self.area(member.area)?.runner().0, start.0, u64::MAX);
        ptrace::set_regs(tid, &regs)?;
        self.resume(tid)?;
        self.settle()
    }

    /// What lies behind the first `used` bytes of an area is needed no more; lists there must have been run, and the next one comes
    /// by [`Self::run_list`].
    pub(super) fn rewind(&mut self, id: AreaId, used: usize) -> Result<()> {
        Ok(self.mapped(id)?.area.rewind(used)?)
    }

    /// Brings to a thread's process what has been planned for it; it must be stopped.
    fn flush(&mut self, tid: HostPid) -> Result<()> {
        let id = self.members.get(&tid).context("nobody to write to")?.area;
        let used = self.mapped(id)?.area.used().next_multiple_of(PAGE);
        let len = self.mapped(id)?.len;
        if used > len {
            // Twice as much as is needed: what is not used takes no memory.
            let longer = (2 * used).min(self.place.len) - len;
            let at = self.place.at.0 + len as u64;
            let flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let args = [at, longer as u64, prot as u64, flags as u64, u64::MAX, 0];
            let before = ptrace::get_regs(tid)?;
            let made = self.bare_call(tid, libc::SYS_mmap, args)?;
            ptrace::set_regs(tid, &before)?;
            ensure!(made == at.cast_signed(), "thread {tid}: more memory for lists: error {}", -made);
            self.mapped(id)?.len = len + longer;
        }
        Ok(self.mapped(id)?.area.flush()?)
    }

    /// Lets a waiting thread go on.
    pub(super) fn resume(&mut self, tid: HostPid) -> Result<()> {
        let area = self.members.get(&tid).context("nobody to resume")?.area;
        let (behind, next) = (self.area(area)?.behind_stop().0, self.area(area)?.next_entry().0);
        let mut regs = ptrace::get_regs(tid)?;
        // It does not leave the end of a list by itself.
        if regs.rip == behind {
            (regs.rip, regs.orig_rax) = (next, u64::MAX);
            ptrace::set_regs(tid, &regs)?;
        }
        let member = self.members.get_mut(&tid).context("nobody to resume")?;
        ptrace::cont(tid, 0).with_context(|| format!("{}: resume", member.label))?;
        member.doing = Doing::Running;
        self.within_call.remove(&tid);
        Ok(())
    }

    /// Lets a waiting process run to its end: by itself, or by the signal that its list sends.
    pub(super) fn end(&mut self, tid: HostPid, signal: Option<i32>) -> Result<()> {
        let member = self.members.get_mut(&tid).context("nobody to end")?;
        member.end = signal.map_or(End::Exit, End::Signal);
        self.resume(tid)
    }

    /// Takes reports until nobody runs or is expected.
    pub(super) fn settle(&mut self) -> Result<()> {
        let mut busy =
            self.members.values().filter(|m| matches!(m.doing, Doing::Expected | Doing::Running)).count();
        while busy > 0 {
            let (tid, raw) = match wait::wait_raw(wait::ANY, 0) {
                Ok(Some(report)) => report,
                Ok(None) => continue,
                Err(Errno::EINTR) => {
                    self.look_for_progress();
                    deadline::check()?;
                    continue;
                }
                Err(e) => return Err(anyhow!(e).context("wait for the tasks being restored")),
            };
            deadline::progress();
            if self.report(tid, Status::from_raw(raw))? {
                busy -= 1;
            }
        }
        Ok(())
    }

    /// Tasks that read their memory report nothing for as long as that takes, but they grow.
    pub(super) fn look_for_progress(&mut self) {
        let resident = self.leaders.iter().filter_map(|pid| procfs::resident_pages(*pid)).sum();
        progress::at(resident * crate::pages::PAGE);
        if std::mem::replace(&mut self.resident, resident) != resident {
            deadline::progress();
        }
    }

    /// Takes one report; says whether its thread has come to rest.
    fn report(&mut self, tid: HostPid, status: Status) -> Result<bool> {
        let Some(member) = self.members.get(&tid) else { return Ok(false) };
        match (status, member.end) {
            (Status::Stopped(_, ptrace::EVENT_STOP), _) => {
                self.start(tid)?;
                Ok(false)
            }
            // Whoever may signal a task sends it such signals too, and may even have them come instead of its own. What counts
            // is where it is, because a list that is not over must not be taken for one that is: the task would keep all
            // rights that the rest of the list takes away. Also a list
            // that was to end its task may fail.
            (Status::Stopped(libc::SIGTRAP, 0), _) if self.is_at(tid, Area::behind_trap)? => self.failed(tid),
            // It ends by its own signal: the kernel asks us about that like about any other.
            (Status::Stopped(signal, 0), End::Signal(wanted)) => {
                self.go_on(tid, if signal == wanted { signal } else { 0 })
            }
            (Status::Stopped(libc::SIGSTOP, 0), End::No) if self.is_at(tid, Area::behind_stop)? => {
                self.at_end_of_list(tid)
            }
            (
                Status::Stopped(signal @ (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE), 0),
                _,
            ) => {
                let at = ptrace::get_regs(tid).map(|r| r.rip).unwrap_or(0);
                bail!("{}: signal {signal} at {at:#x} while being restored", member.label)
            }
            // Nobody else can mean a task that is not there yet; stop signals cannot be blocked.
            (Status::Stopped(_, 0), _) => self.go_on(tid, 0),
            (Status::Exited(_) | Status::Signaled(..), End::Exit) => Ok(self.gone(tid)),
            (Status::Signaled(signal, _), End::Signal(wanted)) if signal == wanted => Ok(self.gone(tid)),
            (Status::Exited(_) | Status::Signaled(..), _) => {
                let label = member.label.clone();
                // Somebody else may have its pid from now on: it must not be killed.
                self.gone(tid);
                match status {
                    Status::Exited(code) => bail!("{label}: ended with status {code} while being restored"),
                    _ => bail!("{label}: killed while being restored ({status:?})"),
                }
            }
            _ => Ok(false),
        }
    }

    fn go_on(&mut self, tid: HostPid, signal: i32) -> Result<bool> {
        ptrace::cont(tid, signal).with_context(|| format!("thread {tid}: resume"))?;
        Ok(false)
    }

    fn gone(&mut self, tid: HostPid) -> bool {
        if let Some(member) = self.members.get_mut(&tid) {
            member.doing = Doing::Gone;
        }
        true
    }

    /// A stop that is no trap: the first one of a process or thread that has just been made.
    fn start(&mut self, tid: HostPid) -> Result<()> {
        let member = self.members.get_mut(&tid).context("nobody to start")?;
        let first = member.doing == Doing::Expected;
        member.doing = Doing::Running;
        let (area, slot, label) = (member.area, member.slot, member.label.clone());
        let list = member.start;
        if let Some(maker) = member.copy_of.take().filter(|_| first) {
            // Until now it has nothing of its own; what its area holds is what its maker's held.
            let len = self.mapped(maker)?.len;
            let mapped = self.mapped(area)?;
            mapped.len = len;
            mapped.area.attach(Memory::Process(tid));
            self.flush(tid).with_context(|| label.clone())?;
            let mut regs = ptrace::get_regs(tid).with_context(|| format!("{label}: registers"))?;
            regs.rip = self.area(area)?.runner().0;
            regs.rbx = list.0;
            regs.rbp = slot.0;
            regs.orig_rax = u64::MAX;
            ptrace::set_regs(tid, &regs).with_context(|| format!("{label}: registers"))?;
        }
        ptrace::cont(tid, 0).with_context(|| format!("{label}: start"))
    }

    /// Whether a thread is stopped at a place in the runner.
    fn is_at(&self, tid: HostPid, place: impl Fn(&Area) -> RemoteAddr) -> Result<bool> {
        let member = self.members.get(&tid).context("nobody at that place")?;
        let regs = ptrace::get_regs(tid).with_context(|| format!("{}: registers", member.label))?;
        Ok(regs.rip == place(self.area(member.area)?).0)
    }

    /// Where [`Op::Stop`] stops a thread.
    fn at_end_of_list(&mut self, tid: HostPid) -> Result<bool> {
        let member = self.members.get_mut(&tid).context("nobody at the end of a list")?;
        member.doing = Doing::Waiting;
        member.list = None;
        Ok(true)
    }

    /// The trap that follows a call which did not return what it must.
    fn failed(&mut self, tid: HostPid) -> Result<bool> {
        let member = self.members.get_mut(&tid).context("nobody at a trap")?;
        member.doing = Doing::Waiting;
        let (area, slot) = (member.area, member.slot);
        let member = self.members.get(&tid).context("nobody at a trap")?;
        let lists: Vec<&Placed> = member.list.iter().collect();
        match self.area(area)?.failure(slot, &lists)? {
            None => bail!("{}: a trap that no list has", member.label),
            Some(failure) => match (&failure.error, failure.chosen_id) {
                (TraceError::Call { source: Errno::EEXIST, .. }, Some(id)) => self.again(tid, id, &failure),
                _ => Err(anyhow!(failure.error).context(member.label.clone())),
            },
        }
    }

    /// Lets a thread that could not clone `id`, because that id was taken, try again, if there is hope.
    fn again(&mut self, tid: HostPid, id: NsPid, failure: &Failure) -> Result<bool> {
        let member = self.members.get(&tid).context("nobody to try again")?;
        let (area, slot) = (member.area, member.slot);
        if self.pids.gave(id) {
            let other = self.pids.pick()?;
            tracing::debug!("pid {id} has been taken by somebody else; {other} does as well");
            self.mapped(area)?.area.set_chosen_id(failure, other)?;
            self.rename(id, other);
        } else if !self.may_become_free(id) {
            return Err(super::taken(id, Errno::EEXIST));
        }
        deadline::check()?;
        let mut regs = ptrace::get_regs(tid)?;
        let mapped = self.mapped(area)?;
        mapped.area.retry(slot)?;
        regs.rbx = failure.entry.0;
        regs.rip = mapped.area.runner().0;
        regs.orig_rax = u64::MAX;
        ptrace::set_regs(tid, &regs)?;
        self.resume(tid)?;
        Ok(false)
    }

    /// Whether crtool has made a call in a thread since it last ran by itself.
    pub(super) fn is_within_call(&self, tid: HostPid) -> bool {
        self.within_call.contains(&tid)
    }

    /// The id of a process that was announced as `pid`.
    pub(super) fn current_id(&self, pid: NsPid) -> NsPid {
        let next = |id: &NsPid| self.renamed.get(id).copied();
        std::iter::successors(Some(pid), next).last().unwrap_or(pid)
    }

    /// A process that is expected as `old` will be `new`.
    pub(super) fn rename(&mut self, old: NsPid, new: NsPid) {
        self.renamed.insert(old, new);
        if let Some(member) = self.members.remove(&on_host(old)) {
            self.members.insert(on_host(new), member);
        }
        for pid in self.leaders.iter_mut().filter(|pid| **pid == on_host(old)) {
            *pid = on_host(new);
        }
    }

    /// Whether an id that is taken may be free in a moment, which is waited for: the kernel gives it back somewhat later
    /// than the parent of its last owner is told, what keeps it is a group or session of the dead, or whoever has it
    /// came after all ids had been found free, and may be gone as fast.
    pub(super) fn may_become_free(&mut self, id: NsPid) -> bool {
        let since = self.taken.filter(|(last, _)| *last == id).map_or_else(Instant::now, |(_, since)| since);
        self.taken = Some((id, since));
        let may = since.elapsed() < super::patience(super::who_is(id).as_ref());
        if may {
            std::thread::sleep(Duration::from_micros(500));
        }
        may
    }

    /// A system call in a waiting thread, from which nothing has to come back but its result. The
    /// thread is left at the exit of the call.
    pub(super) fn bare_call(&mut self, tid: HostPid, nr: i64, args: [u64; 6]) -> Result<i64> {
        self.call(tid, nr, args, false)
    }

    /// As [`Self::bare_call`], for a call that would sleep: it is interrupted as soon as it does, and what the kernel then keeps
    /// of it stays with the thread.
    pub(super) fn interrupted_call(&mut self, tid: HostPid, nr: i64, args: [u64; 6]) -> Result<i64> {
        self.call(tid, nr, args, true)
    }

    fn call(&mut self, tid: HostPid, nr: i64, args: [u64; 6], interrupted: bool) -> Result<i64> {
        self.within_call.insert(tid);
        let mut regs = ptrace::get_regs(tid)?;
        let area = self.members.get(&tid).context("nobody to make a call")?.area;
        regs.rip = self.area(area)?.bare_syscall().0;
        regs.orig_rax = u64::MAX;
        regs.rax = nr.cast_unsigned();
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        ptrace::set_regs(tid, &regs)?;
        let mut at = regs;
        for exit in [false, true] {
            if exit && interrupted {
                ptrace::interrupt(tid)?;
            }
            ptrace::syscall(tid, 0)?;
            loop {
                match report_of(tid)? {
                    Status::Stopped(signal, 0) if signal == libc::SIGTRAP | 0x80 => break,
                    Status::Stopped(_, _) => ptrace::syscall(tid, 0)?,
                    other => bail!("thread {tid}: {other:?} in a system call of its restore"),
                }
            }
            at = ptrace::get_regs(tid)?;
            // The instruction is in memory that others of its user may write once the task is dumpable. A task that is killed
            // where a call begins does not make it.
            let same = at.orig_rax == nr.cast_unsigned()
                && [at.rdi, at.rsi, at.rdx, at.r10, at.r8, at.r9] == args
                && at.rip == regs.rip + SYSCALL_LEN;
            ensure!(same, "thread {tid}: somebody else has changed the code that crtool executes in it");
        }
        Ok(at.rax.cast_signed())
    }

    /// As [`Self::bare_call`], for a call that must return 0. The thread waits for its next list again.
    pub(super) fn call_between(&mut self, tid: HostPid, name: &str, nr: i64, args: [u64; 6]) -> Result<()> {
        let before = ptrace::get_regs(tid)?;
        let result = self.bare_call(tid, nr, args)?;
        ensure!(
            result == 0,
            anyhow!(Errno::from_raw(i32::try_from(-result).unwrap_or(0))).context(format!("{name} in {tid}"))
        );
        Ok(ptrace::set_regs(tid, &before)?)
    }

    /// Memory of the area of a waiting thread with these bytes in it, for a call.
    pub(super) fn bytes(&mut self, tid: HostPid, bytes: &[u8]) -> Result<RemoteAddr> {
        let id = self.members.get(&tid).context("nobody to write to")?.area;
        let area = &mut self.mapped(id)?.area;
        let at = area.alloc(bytes.len(), 64)?;
        area.write(at, bytes)?;
        self.flush(tid)?;
        Ok(at)
    }

    /// The area that a thread uses, and what of it is mapped.
    pub(super) fn range_of(&self, tid: HostPid) -> Result<(AreaId, u64, u64)> {
        let id = self.members.get(&tid).context("nobody has that area")?.area;
        let mapped = self.areas.get(id.0).context("no such area")?;
        Ok((id, self.place.at.0, mapped.len as u64))
    }

    /// From the end of a bare call to a stop from which the kernel looks for signals, and restarts calls, before the
    /// thread executes anything. All its signals must be blocked.
    pub(super) fn stop_before_user_code(&self, tid: HostPid) -> Result<()> {
        ptrace::interrupt(tid)?;
        ptrace::cont(tid, 0)?;
        loop {
            match report_of(tid)? {
                Status::Stopped(_, ptrace::EVENT_STOP) => return Ok(()),
                Status::Stopped(_, _) => ptrace::cont(tid, 0)?,
                other => bail!("thread {tid}: {other:?} before its registers were set"),
            }
        }
    }

    /// Brings the waiting threads of a process into a group stop by `signal`; SIGSTOP if the kernel ignores it
    /// (an orphaned process group).
    pub(super) fn stop_process(&self, tids: &[HostPid], signal: i32) -> Result<()> {
        let Some(leader) = tids.first().copied() else { return Ok(()) };
        for try_signal in [signal, libc::SIGSTOP] {
            ptrace::set_sigmask(leader, !(1u64 << (try_signal - 1)))?;
            task::kill(leader, try_signal)?;
            ptrace::cont(leader, 0)?;
            let event = loop {
                match report_of(leader)? {
                    Status::Stopped(event, ptrace::EVENT_STOP) => break event,
                    Status::Stopped(got, 0) => {
                        // Whatever becomes of the signal, no instruction is executed.
                        ptrace::interrupt(leader)?;
                        ptrace::cont(leader, if got == try_signal { got } else { 0 })?;
                    }
                    other => bail!("thread {leader}: {other:?} while being stopped"),
                }
            };
            if event != libc::SIGTRAP {
                break;
            }
        }
        for tid in tids.iter().skip(1) {
            ptrace::interrupt(*tid)?;
            ptrace::cont(*tid, 0)?;
            while let Status::Stopped(_, event) = report_of(*tid)? {
                if event == ptrace::EVENT_STOP {
                    break;
                }
                ptrace::cont(*tid, 0)?;
            }
        }
        Ok(())
    }

    /// Nothing is killed from here on: everybody has its final state.
    pub(super) fn release(&mut self) {
        self.armed = false;
    }

    fn kill_all(&mut self) {
        let us = HostPid::own();
        for (tid, member) in &mut self.members {
            // It may be there and not have reported yet; or somebody else has the id.
            if member.doing == Doing::Expected && crate::tracee::tracer_of(*tid) == us {
                member.doing = Doing::Running;
            }
        }
        let there = |m: &Member| !matches!(m.doing, Doing::Gone | Doing::Expected);
        // Locks in files must be whole for another attempt.
        let mut shared = Vec::new();
        for tid in self.members.iter().filter(|(_, m)| there(m)).map(|(tid, _)| *tid) {
            if let Err(error) = robust_list::disarm(tid, &mut shared) {
                tracing::debug!("locks that thread {tid} was to hold: {:#}", anyhow!(error));
            }
        }
        for pid in &self.leaders {
            if self.members.get(pid).is_some_and(there) {
                let _ = task::kill(*pid, libc::SIGKILL);
            }
        }
        // Threads report to us as their tracer, leaders last; reap until nobody is left.
        let mut left: Vec<HostPid> =
            self.members.iter().filter(|(_, m)| there(m)).map(|(tid, _)| *tid).collect();
        let deadline = Instant::now() + Duration::from_secs(5);
        while !left.is_empty() && Instant::now() < deadline {
            match wait::poll(wait::ANY) {
                Ok(Some((tid, Status::Exited(_) | Status::Signaled(..)))) => left.retain(|t| *t != tid),
                // Somebody appeared after the kill (a clone in flight), or reports a stop on its way out.
                Ok(Some((tid, _))) => {
                    let _ = task::kill(tid, libc::SIGKILL);
                    let _ = ptrace::cont(tid, 0);
                }
                Ok(None) => std::thread::sleep(Duration::from_micros(200)),
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
        shared.iter().for_each(SharedBytes::put_back);
    }
}

impl Drop for Puppets {
    fn drop(&mut self) {
        if self.armed {
            self.kill_all();
        }
    }
}
