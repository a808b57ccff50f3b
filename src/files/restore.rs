//! Open files of a tree that is restored.
//!
//! The supervisor opens every description of `files.img` itself: what it can before any task exists
//! ([`FilesRestore::open_early`]), the rest when all tasks and threads are there ([`FilesRestore::open_late`]). Tasks fetch
//! what they need by their own lists, see `install.rs`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
};

use nix::fcntl::OFlag;

use super::{
    FileError, Opened, Planned, RestoreCx, RestoreTable, TableFd,
    dump::kind_of,
    flags, fown,
    install::{self, Descriptors},
    kind::Kind,
    locks::{self, Locks},
    procfs::{self, StandIns},
    regular, remap,
    remap::RestoreRemaps,
    tty,
};
use crate::{
    image::{ImageKind, Store, TypedStore, pb},
    ns::time::Running,
    settings::RestoreSettings,
    sys::{Errno, fd::close_all, pid::NsPid},
    tracee::{List, Want},
};

/// One file of the images.
#[derive(Debug)]
struct File {
    entry: Rc<pb::FileEntry>,
    kind: &'static Kind,
    fd: Option<OwnedFd>,
    late: bool,
    planned: bool,
}

impl File {
    fn failed(&self, source: FileError) -> FileError {
        FileError::File { id: self.entry.id, kind: self.kind.name, source: Box::new(source) }
    }
}

/// The open files of a tree while it is restored.
#[allow(missing_debug_implementations)] // stores are no Debug
pub struct FilesRestore<'a> {
    pub(super) cx: RestoreCx<'a>,
    /// In the order of `files.img`.
    order: Vec<u32>,
    files: BTreeMap<u32, File>,
    /// Files opened once more, for writable mappings.
    writable: HashMap<u32, OwnedFd>,
    tables: BTreeMap<u32, RestoreTable>,
    planned_tables: HashSet<u32>,
    /// Some tasks share a table.
    shared_tables: bool,
    /// Files that are opened when the table that holds them is made, and closed once its task has them: there are more files
    /// than may be open at once.
    waiting: HashSet<u32>,
    /// Those of them that are open, and how many may be.
    opened: Vec<u32>,
    most_opened: usize,
    /// Of tasks that are gone, until all have been to their current directories.
    stand_ins: StandIns,
}

impl<'a> FilesRestore<'a> {
    /// Reads and checks all images of files; opens nothing.
    pub fn read(
        store: &'a dyn Store,
        settings: &'a RestoreSettings,
        tables_of_tasks: &[u32],
    ) -> Result<Self, FileError> {
        let mut cx = RestoreCx::new(store, settings);
        let mut files = BTreeMap::new();
        let mut order = Vec::new();
        let mut image = store.open(ImageKind::Files, None)?;
        while let Some(entry) =
            image.as_mut().map_or(Ok(None), |image| image.next_entry::<pb::FileEntry>())?
        {
            let id = entry.id;
            let Some(kind) = kind_of(&entry) else {
                return Err(FileError::entry(id, format!("{} cannot be restored", type_name(entry.r#type))));
            };
            let entry = Rc::new(entry);
            cx.entries.insert(id, Rc::clone(&entry));
            let file = File { entry, kind, fd: None, late: false, planned: false };
            if files.insert(id, file).is_some() {
                return Err(FileError::entry(id, "it is there twice"));
            }
            order.push(id);
        }
        remap::read(&mut cx)?;
        locks::read(&mut cx)?;
        let mut ids = tables_of_tasks.to_vec();
        ids.sort_unstable();
        let shared_tables = ids.windows(2).any(|two| two[0] == two[1]);
        let mut tables = BTreeMap::new();
        for name in store.names()? {
            let Some((ImageKind::Fdinfo, Some(id))) = ImageKind::by_file_name(&name) else { continue };
            let files_id = u32::try_from(id).map_err(|_| FileError::entry(0, "a files id is too large"))?;
            // The others are of an older snapshot in the same place, which had more tasks.
            if ids.binary_search(&files_id).is_ok() {
                tables.insert(files_id, read_table(store, files_id, &files)?);
            }
        }
        cx.in_tables = tables.values().flat_map(|table| table.fds.values().map(|fd| fd.id)).collect();
        Ok(Self {
            cx,
            order,
            files,
            writable: HashMap::new(),
            tables,
            planned_tables: HashSet::new(),
            shared_tables,
            waiting: HashSet::new(),
            opened: Vec::new(),
            most_opened: usize::MAX,
            stand_ins: StandIns::default(),
        })
    }

    /// Opens the files of mappings, before all images are there. Only those that have their names, and nothing is made for.
    pub(crate) fn open_mapped(&mut self, ids: &HashSet<u32>) -> Result<(), FileError> {
        for file in self.files.values_mut() {
            let id = file.entry.id;
            let refuse = |what: &'static str| Err(FileError::entry(id, what));
            if file.entry.tty.is_some() {
                return refuse("a terminal has to be there before the tasks");
            }
            if !ids.contains(&id) {
                continue;
            }
            let Some(entry) = file.entry.reg.as_ref().filter(|reg| reg.ext != Some(true)) else {
                return refuse("it cannot be mapped before all images are there");
            };
            if remap::is_remapped(&mut self.cx, id) || super::path::proc_pid(&entry.name).is_some() {
                return refuse("it cannot be mapped before it is made");
            }
            match (file.kind.open)(&mut self.cx, &file.entry).map_err(|e| file.failed(e))? {
                Opened::Now(fd) => file.fd = Some(fd),
                Opened::Late => return refuse("it cannot be mapped before the tasks are there"),
            }
        }
        Ok(())
    }

    /// Fails if a file that is open already is not the one any more that its name leads to, or has changed.
    pub(crate) fn recheck(&self) -> Result<(), FileError> {
        for file in self.files.values() {
            let (Some(fd), Some(entry)) = (&file.fd, &file.entry.reg) else { continue };
            let inode = |fd: &OwnedFd| {
                let stat = nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
                stat.map_err(FileError::path("stat", &entry.name))
            };
            let now = regular::find(&self.cx, entry).map_err(|e| file.failed(e))?;
            if inode(fd)? != inode(&now)? {
                return Err(file.failed(FileError::entry(file.entry.id, "it has been replaced")));
            }
        }
        Ok(())
    }

    /// Opens everything that needs no task of the tree and is not open yet. Before the first clone, where there is one to come.
    pub fn open_early(&mut self) -> Result<(), FileError> {
        let mut parts = parts(&self.cx.entries);
        parts.extend(self.cx.state::<RestoreRemaps>().link_ids());
        self.choose_waiting(&parts);
        let now = self
            .files
            .values()
            .filter(|f| f.fd.is_none())
            .filter(|f| !self.waiting.contains(&f.entry.id) && !parts.contains(&f.entry.id));
        let now: Vec<_> = now.map(|file| Rc::clone(&file.entry)).collect();
        for (id, fd) in regular::open_ahead(&mut self.cx, &now) {
            if let Some(file) = self.files.get_mut(&id) {
                file.fd = Some(fd);
            }
        }
        for id in &self.order {
            if self.waiting.contains(id) {
                continue;
            }
            if parts.contains(id) {
                // Opened by the one that it is a part of.
                self.cx.taken.insert(*id);
                continue;
            }
            let Some(file) = self.files.get_mut(id).filter(|file| file.fd.is_none()) else { continue };
            match (file.kind.open)(&mut self.cx, &file.entry) {
                Ok(Opened::Now(fd)) => file.fd = Some(fd),
                Ok(Opened::Late) => file.late = true,
                Err(e) if is_emfile(&e) => return Err(too_many(self.order.len())),
                Err(e) => return Err(file.failed(e)),
            }
        }
        Ok(())
    }

    /// Chooses the files that wait for their table if not all can be open at once.
    fn choose_waiting(&mut self, parts: &HashSet<u32>) {
        let limit = usize::try_from(open_limit()).unwrap_or(usize::MAX);
        if self.order.len() + OWN_DESCRIPTORS <= limit {
            return;
        }
        let tables = self.tables.values().map(|table| table.fds.values().map(|fd| fd.id).collect());
        let entries = self.files.values().map(|file| &*file.entry);
        let waiting = in_one_table(entries, tables).into_iter().flatten();
        self.waiting = waiting.filter(|id| !parts.contains(id)).collect();
        let always = self.order.len() - self.waiting.len() + OWN_DESCRIPTORS;
        self.most_opened = limit.saturating_sub(always);
    }

    /// Opens a file that waits, and keeps it.
    fn open_waiting(&mut self, id: u32) -> Result<(), FileError> {
        if self.waiting.remove(&id)
            && let Some(file) = self.files.get_mut(&id)
        {
            match (file.kind.open)(&mut self.cx, &file.entry).map_err(|e| file.failed(e))? {
                Opened::Now(fd) => file.fd = Some(fd),
                Opened::Late => file.late = true,
            }
        }
        Ok(())
    }

    /// Whether tasks that have been given the lists for their tables must run them before this one is given its own.
    pub(crate) fn is_full_for(&self, files_id: u32) -> bool {
        let table = self.tables.get(&files_id).filter(|_| !self.opened.is_empty());
        let more = table.map_or(0, |t| t.fds.values().filter(|fd| self.waiting.contains(&fd.id)).count());
        self.opened.len() + more > self.most_opened
    }

    /// The tasks with planned tables have them: what was opened for them alone is closed.
    pub(crate) fn tables_are_made(&mut self) -> Result<(), FileError> {
        for id in std::mem::take(&mut self.opened) {
            self.touch_last(id)?;
            if let Some(file) = self.files.get_mut(&id) {
                file.fd = None;
            }
        }
        Ok(())
    }

    /// Whether there is something to be opened late, or a table that several tasks share, or more files than can be open
    /// at once: then no task may go on with its descriptors before all have done their part.
    pub fn needs_stages(&self) -> bool {
        self.files.values().any(|file| file.late) || self.shared_tables || !self.waiting.is_empty()
    }

    /// Opens the rest: all tasks of the tree and their threads exist, and are stopped.
    pub fn open_late(&mut self) -> Result<(), FileError> {
        let dead = self.cx.state::<RestoreRemaps>().dead_tasks();
        self.stand_ins = procfs::stand_ins(&dead)?;
        for id in &self.order {
            let Some(file) = self.files.get_mut(id) else { continue };
            if file.late && file.fd.is_none() {
                let fd = (file.kind.open_late)(&mut self.cx, &file.entry).map_err(|e| file.failed(e))?;
                file.fd = Some(fd);
            }
        }
        Ok(())
    }

    /// Current and root directories are set: nobody has to stand for the dead any more.
    pub fn directories_are_set(&mut self) {
        self.stand_ins = StandIns::default();
    }

    /// The supervisor's number of the file for a mapping, or `exe`; `writable` for shared mappings that can be
    /// written. Files opened late have none.
    pub fn vma_file(&mut self, id: u32, writable: bool) -> Result<i32, FileError> {
        let number = self.early_number(id)?;
        let flags = self.files.get(&id).map_or(0, |file| flags_of(&file.entry)).cast_signed();
        if !writable || flags & libc::O_ACCMODE == libc::O_RDWR {
            return Ok(number);
        }
        if let Some(fd) = self.writable.get(&id) {
            return Ok(fd.as_raw_fd());
        }
        // CRIU's entries of mapped files are all read-only; the mapping says what it needs.
        let file = self.files.get(&id).and_then(|file| file.fd.as_ref());
        let file = file.ok_or_else(|| FileError::entry(id, "no such file"))?.as_fd();
        let view = self.cx.view()?;
        let fd = view
            .reopen(file, OFlag::O_RDWR)
            .map_err(FileError::sys("open for a shared writable mapping"))
            .map_err(|e| {
                self.files.get(&id).map_or(FileError::entry(id, "no such file"), |file| file.failed(e))
            })?;
        Ok(self.writable.entry(id).or_insert(fd).as_raw_fd())
    }

    fn early_number(&mut self, id: u32) -> Result<i32, FileError> {
        self.open_waiting(id)?;
        let file = self.files.get(&id).ok_or_else(|| FileError::entry(id, "no such file"))?;
        let fd = file.fd.as_ref().filter(|_| !file.late);
        let fd = fd.ok_or_else(|| FileError::entry(id, "it can only be opened when the tasks exist"))?;
        self.cx.taken.insert(id);
        Ok(fd.as_raw_fd())
    }

    /// Adds the calls that make the table of task `pid` what it was, and those of its files that need a task (epoll items).
    /// The task has one descriptor, [`SUPERVISOR`](super::SUPERVISOR). A table that several tasks share is made by the first
    /// of them: none of the others may use descriptors at that time.
    pub fn plan_table(&mut self, files_id: u32, pid: NsPid, list: &mut List) -> Result<(), FileError> {
        let mut descriptors = Descriptors::alone();
        tty::plan_foreground(&mut self.cx, pid, &mut descriptors, list);
        descriptors.close_all(list);
        if !self.planned_tables.insert(files_id) {
            self.cx.state::<Locks>().plan(pid, list);
            return Ok(());
        }
        let mut table = match self.tables.get(&files_id) {
            Some(table) => table.clone(),
            // CRIU writes no image for a table without descriptors.
            None => RestoreTable::default(),
        };
        table.pid = pid;
        let mut wanted = BTreeMap::new();
        for (&to, fd) in &table.fds {
            if self.waiting.contains(&fd.id) {
                self.open_waiting(fd.id)?;
                self.opened.push(fd.id);
            }
            let file = self.files.get(&fd.id).ok_or_else(|| FileError::entry(fd.id, "no such file"))?;
            let from = file.fd.as_ref().ok_or_else(|| FileError::entry(fd.id, "it is not open yet"))?;
            wanted.insert(to, install::Origin { fd: from.as_raw_fd(), cloexec: fd.cloexec });
            self.cx.taken.insert(fd.id);
        }
        let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map_or(i32::MAX, |(soft, _)| i32::try_from(soft).unwrap_or(i32::MAX));
        let steps = install::plan(&wanted, limit).map_err(|_| no_room(&wanted, limit))?;
        install::add(&steps, list);
        for (&number, fd) in &table.fds {
            let Some(file) = self.files.get_mut(&fd.id) else { continue };
            if !file.planned {
                let planned = (file.kind.plan)(&mut self.cx, &file.entry, &table, number, list);
                file.planned = planned.map_err(|e| file.failed(e))? == Planned::Done;
            }
        }
        procfs::plan_own(&mut self.cx, &table, pid, list);
        self.cx.state::<Locks>().plan(pid, list);
        Ok(())
    }

    /// Adds the calls that set root, current directory and umask. Before [`Self::plan_table`] of the same task.
    pub(crate) fn plan_fs(
        &mut self,
        fs: &pb::FsEntry,
        descriptors: &mut Descriptors,
        list: &mut List,
    ) -> Result<(), FileError> {
        let cwd = descriptors.fetch(list, self.directory(fs.cwd_id)?);
        let root = descriptors.fetch(list, self.directory(fs.root_id)?);
        let root_is_ours = match self.files.get(&fs.root_id).and_then(|file| file.fd.as_ref()) {
            Some(fd) => {
                let theirs = nix::sys::stat::fstat(fd).map_err(FileError::sys("stat a root directory"))?;
                let ours = nix::sys::stat::stat("/").map_err(FileError::sys("stat the root directory"))?;
                (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
            }
            None => false,
        };
        if !root_is_ours {
            let here = list.cstr(b".");
            list.call("go to the root directory", libc::SYS_fchdir, &[root.into()], Want::Zero);
            list.call("change the root directory", libc::SYS_chroot, &[here.into()], Want::Zero);
        }
        list.call("go to the current directory", libc::SYS_fchdir, &[cwd.into()], Want::Zero);
        descriptors.close_all(list);
        if let Some(umask) = fs.umask {
            list.call("set the umask", libc::SYS_umask, &[umask.into()], Want::Any);
        }
        Ok(())
    }

    /// The supervisor's number of a directory.
    fn directory(&mut self, id: u32) -> Result<i32, FileError> {
        self.open_waiting(id)?;
        let file = self.files.get(&id).ok_or_else(|| FileError::entry(id, "no such file"))?;
        let fd = file.fd.as_ref().ok_or_else(|| FileError::entry(id, "it is not open yet"))?;
        self.cx.taken.insert(id);
        Ok(fd.as_raw_fd())
    }

    /// The clocks of the tree go on; `None`: it has those of crtool.
    pub(crate) fn set_clocks(&mut self, clocks: Option<Running>) {
        self.cx.clocks = clocks;
    }

    /// The last touch: owners of files, timers. All tasks are in place; none has run yet.
    pub fn before_resume(&mut self) -> Result<(), FileError> {
        for id in self.order.clone() {
            self.touch_last(id)?;
        }
        Ok(())
    }

    fn touch_last(&mut self, id: u32) -> Result<(), FileError> {
        let Some(file) = self.files.get(&id) else { return Ok(()) };
        let Some(fd) = &file.fd else { return Ok(()) };
        if let Some(owner) = (file.kind.fown)(&file.entry) {
            fown::apply(fd.as_fd(), owner).map_err(|e| file.failed(e))?;
        }
        flags::apply_async(fd, flags_of(&file.entry)).map_err(|e| file.failed(e))?;
        (file.kind.before_resume)(&mut self.cx, &file.entry, fd.as_fd()).map_err(|e| file.failed(e))
    }

    /// Fails when something in the images was used by no task.
    pub fn leftovers(&mut self) -> Result<(), FileError> {
        if let Some(id) = procfs::unopened(&mut self.cx) {
            return Err(FileError::entry(id, "no task could open this file of /proc"));
        }
        if let Some(pid) = self.cx.state::<Locks>().left() {
            return Err(FileError::entry(0, format!("no task {pid} takes the file locks that it had")));
        }
        if let Some(id) = self.tables.keys().find(|id| !self.planned_tables.contains(id)) {
            return Err(FileError::entry(*id, "no task uses this descriptor table"));
        }
        for id in &self.order {
            let Some(file) = self.files.get(id) else { continue };
            if !self.cx.taken.contains(id) {
                return Err(file.failed(FileError::entry(*id, "no task uses it")));
            }
            if self.cx.in_tables.contains(id) && !file.planned {
                return Err(file.failed(FileError::entry(*id, "no task could complete it")));
            }
        }
        Ok(())
    }

    /// The restore succeeded: what the dump had put into the file system for it is removed.
    pub fn commit(mut self) {
        self.cx.state::<RestoreRemaps>().commit();
        close_all(self.files.values_mut().filter_map(|file| file.fd.take()).collect());
    }
}

/// Files that only stand for the path of another one.
pub(super) fn parts(entries: &BTreeMap<u32, Rc<pb::FileEntry>>) -> HashSet<u32> {
    let fifos = entries.values().filter_map(|file| file.fifo.as_ref()?.regf_id);
    let terminals = entries.values().filter_map(|file| file.tty.as_ref()?.regf_id);
    fifos.chain(terminals).collect()
}

/// Descriptors that crtool has besides those of the tree: images, logs, processes.
const OWN_DESCRIPTORS: usize = 64;

/// Most files that we may have open.
pub(super) fn open_limit() -> u64 {
    use nix::sys::resource::{Resource, getrlimit};
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard)
}

/// How many descriptors a restore needs at once.
pub(super) fn most_needed(
    entries: &[Rc<pb::FileEntry>],
    tables: impl Iterator<Item = HashSet<u32>>,
) -> usize {
    let all = entries.len() + OWN_DESCRIPTORS;
    let waiting = in_one_table(entries.iter().map(|entry| &**entry), tables);
    let largest = waiting.iter().map(Vec::len).max().unwrap_or(0);
    all - waiting.iter().map(Vec::len).sum::<usize>() + largest
}

/// Regular files that one table alone holds, of each table: they can be opened when it is made.
fn in_one_table<'e>(
    entries: impl Iterator<Item = &'e pb::FileEntry>,
    tables: impl Iterator<Item = HashSet<u32>>,
) -> Vec<Vec<u32>> {
    let regular = |entry: &&pb::FileEntry| {
        let reg = entry.reg.as_ref().filter(|_| entry.r#type == pb::FdTypes::Reg as i32);
        reg.is_some_and(|reg| super::path::proc_pid(&reg.name).is_none())
    };
    let regular: HashSet<u32> = entries.filter(regular).map(|entry| entry.id).collect();
    let mut alone: Vec<Vec<u32>> = Vec::new();
    let mut holders: HashMap<u32, usize> = HashMap::new();
    for table in tables {
        for id in &table {
            *holders.entry(*id).or_default() += 1;
        }
        alone.push(table.into_iter().filter(|id| regular.contains(id)).collect());
    }
    for table in &mut alone {
        table.retain(|id| holders.get(id) == Some(&1));
    }
    alone
}

/// Why so many files cannot be open.
pub(super) fn too_many(files: usize) -> FileError {
    FileError::unsupported(
        format!("{files} files of the tree must be open at once"),
        "raise the limit: ulimit -n, or LimitNOFILE=",
    )
}

/// Why a table cannot be made.
pub(super) fn no_room(wanted: &BTreeMap<i32, install::Origin>, limit: i32) -> FileError {
    let highest = wanted.keys().next_back().copied().unwrap_or(0);
    FileError::unsupported(
        format!("descriptor {highest} does not fit below our limit of {limit} open files"),
        "raise it: ulimit -n, or LimitNOFILE=",
    )
}

fn read_table(
    store: &dyn Store,
    files_id: u32,
    files: &BTreeMap<u32, File>,
) -> Result<RestoreTable, FileError> {
    let mut table = RestoreTable::default();
    for entry in store.read_all::<pb::FdinfoEntry>(ImageKind::Fdinfo, u64::from(files_id))? {
        let Some(file) = files.get(&entry.id) else {
            return Err(FileError::entry(entry.id, format!("fd {} names it, but it is not there", entry.fd)));
        };
        if file.entry.r#type != entry.r#type {
            return Err(FileError::entry(entry.id, format!("fd {} has another type for it", entry.fd)));
        }
        let number = i32::try_from(entry.fd)
            .map_err(|_| FileError::entry(entry.id, format!("fd {} is no descriptor number", entry.fd)))?;
        let cloexec = entry.flags & libc::FD_CLOEXEC.cast_unsigned() != 0;
        if table.fds.insert(number, TableFd { id: entry.id, cloexec }).is_some() {
            return Err(FileError::entry(entry.id, format!("fd {number} is there twice")));
        }
    }
    Ok(table)
}

fn is_emfile(error: &FileError) -> bool {
    matches!(
        error,
        FileError::Sys { source: Errno::EMFILE, .. } | FileError::Path { source: Errno::EMFILE, .. }
    )
}

fn type_name(value: i32) -> String {
    match pb::FdTypes::try_from(value) {
        Ok(r#type) => format!("a file of type {}", r#type.as_str_name()),
        Err(_) => format!("a file of unknown type {value}"),
    }
}

#[cfg(test)]
impl FilesRestore<'_> {
    /// Our descriptor of a file.
    pub(super) fn fd_of(&self, id: u32) -> Option<&OwnedFd> {
        self.files.get(&id).and_then(|file| file.fd.as_ref())
    }

    /// The table `files_id`.
    pub(super) fn table_of(&self, files_id: u32) -> Option<&RestoreTable> {
        self.tables.get(&files_id)
    }
}

/// Flags of open(2) in an entry of any kind that has them.
fn flags_of(entry: &pb::FileEntry) -> u32 {
    let e = entry;
    None.or(e.reg.as_ref().map(|e| e.flags))
        .or(e.pipe.as_ref().map(|e| e.flags))
        .or(e.tty.as_ref().map(|e| e.flags))
        .or(e.efd.as_ref().map(|e| e.flags))
        .or(e.memfd.as_ref().map(|e| e.flags))
        .or(e.ify.as_ref().map(|e| e.flags))
        .unwrap_or(0)
}
