//! Open files of a tree that is dumped: every description once.

use std::{
    cell::OnceCell,
    collections::{HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use nix::{
    dir::Dir,
    fcntl::{OFlag, open, openat, readlinkat},
    sys::{
        resource::{Resource, getrlimit},
        stat::{Mode, fstat},
    },
};

use super::{
    DumpCx, DumpTable, DumpTables, DumpedFd, FdView, FileError, FileUse, KINDS, Place, RestoreCx, Stat,
    fd_view::Source,
    fifo, install,
    kind::Kind,
    locks, memfd,
    path::bytes_of,
    pipe,
    refused::{self, Refusal},
    regular,
    remap::{self, Remaps},
    restore,
};
use crate::{
    deadline,
    finding::Finding,
    image::{ImageKind, Store, TypedStore, pb},
    proc::{fdinfo, fdinfo::Fdinfo, status},
    settings::{DumpSettings, RestoreSettings},
    sys::{Errno, kcmp, pid::HostPid},
};

/// What two descriptors of one description have in common, read cheaply.
type Key = (u64, u64, u32, i64);

/// A description that was met, under the first descriptor that showed it.
#[derive(Debug)]
struct Known {
    pid: HostPid,
    fd: i32,
    /// `None` when it was refused.
    id: Option<u32>,
}

/// One object that is no descriptor (mapped, exe, cwd, root): device, inode, writable, path.
type ObjectKey = (u64, u64, bool, Vec<u8>);

/// The open files of a tree while it is dumped.
#[allow(missing_debug_implementations)] // stores are no Debug
pub struct FilesDump<'a> {
    pub(super) cx: DumpCx<'a>,
    tables: DumpTables,
    /// In the order of `files.img`.
    entries: Vec<Rc<pb::FileEntry>>,
    /// Where an id is in `entries`.
    entry_of: HashMap<u32, usize>,
    /// One descriptor of each description.
    places: HashMap<u32, Place>,
    known: HashMap<Key, Vec<Known>>,
    objects: HashMap<ObjectKey, Option<u32>>,
    /// Where a file was met first, for messages: the task, and what it is there.
    met: HashMap<u32, (HostPid, String)>,
}

impl<'a> FilesDump<'a> {
    /// To judge a tree that runs: finds what a dump would, touches and writes nothing.
    pub fn of_running(store: &'a dyn Store, settings: &'a DumpSettings) -> Self {
        let mut this = Self::new(store, settings);
        this.cx.frozen = false;
        this
    }

    /// Nothing is read or written yet.
    pub fn new(store: &'a dyn Store, settings: &'a DumpSettings) -> Self {
        Self {
            cx: DumpCx::new(store, settings),
            tables: DumpTables::default(),
            entries: Vec::new(),
            entry_of: HashMap::new(),
            places: HashMap::new(),
            known: HashMap::new(),
            objects: HashMap::new(),
            met: HashMap::new(),
        }
    }

    /// Reads one descriptor table. `pid` is a frozen task that uses it (a thread's id when the leader has exited) and
    /// `pidfd` is of that task. Call it once per table; what cannot be saved goes to `findings`.
    pub fn table(
        &mut self,
        pid: HostPid,
        files_id: u32,
        pidfd: BorrowedFd<'_>,
        findings: &mut Vec<Finding>,
    ) -> Result<(), FileError> {
        let links = open_dir(&pid.to_string(), "fd")?;
        let numbers = numbers(&links)?;
        self.descriptors(pid, files_id, pidfd, &numbers, findings)
    }

    /// Reads the descriptors `numbers` of a table.
    pub(super) fn descriptors(
        &mut self,
        pid: HostPid,
        files_id: u32,
        pidfd: BorrowedFd<'_>,
        numbers: &[i32],
        findings: &mut Vec<Finding>,
    ) -> Result<(), FileError> {
        let mut fds = Vec::new();
        let infos = open_dir(&pid.to_string(), "fdinfo")?;
        let ours = open_dir("self", "fd")?;
        let mut text = Vec::with_capacity(4096);
        for &fd in numbers {
            deadline::looking_at(pid, deadline::Object::Fd(fd));
            let here = |source: FileError, link: &[u8]| FileError::Fd {
                pid,
                fd,
                link: String::from_utf8_lossy(link).into_owned(),
                source: Box::new(source),
            };
            let file = crate::sys::pidfd::getfd(pidfd, fd)
                .map_err(|e| here(FileError::sys("fetch the descriptor")(e), b""))?;
            // Our own copy has the same number every time, which /proc answers several times faster than the task's.
            let link = match readlinkat(&ours, file.as_raw_fd().to_string().as_str()) {
                Ok(link) => bytes_of(link),
                Err(Errno::ENAMETOOLONG) => {
                    findings.push(Finding {
                        pid,
                        what: format!("fd {fd}"),
                        reason: "the path of the file is longer than 4 KiB".into(),
                        hint: String::new(),
                    });
                    continue;
                }
                Err(e) => return Err(here(FileError::sys("read the link of")(e), b"")),
            };
            read_at(&infos, &fd.to_string(), &mut text).map_err(|e| here(e, &link))?;
            let info = fdinfo::parse(&text).map_err(|e| here(e.into(), &link))?;
            let stat = fstat(&file).map_err(|e| here(FileError::sys("stat the descriptor")(e), &link))?;
            let view = FdView {
                pid,
                fd,
                link: &link,
                info: &info,
                stat: Stat::new(&stat),
                source: Source::Task(pidfd),
                fetched: OnceCell::from(file),
            };
            if let Some(id) = self.description(&view, findings).map_err(|e| here(e, &link))? {
                let (dev, ino) = (view.stat.dev, view.stat.ino);
                let cloexec = info.flags & libc::O_CLOEXEC.cast_unsigned() != 0;
                fds.push(DumpedFd { fd, id, cloexec, dev, ino, locks: info.locks });
            }
        }
        self.tables.0.push(DumpTable { files_id, pid, fds });
        Ok(())
    }

    /// The id of the description behind `view`; `None` when it was refused.
    fn description(
        &mut self,
        view: &FdView<'_>,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<u32>, FileError> {
        let key = (view.stat.dev, view.stat.ino, view.flags(), view.info.pos);
        let place = match self.known.get(&key) {
            None => 0,
            Some(known) => {
                // A plain search by hand: comparing may fail.
                let (mut low, mut high) = (0, known.len());
                while low < high {
                    let middle = usize::midpoint(low, high);
                    let Some(other) = known.get(middle) else { break };
                    let order = kcmp::kcmp(
                        other.pid,
                        view.pid,
                        kcmp::Kind::File,
                        u64::from(other.fd.cast_unsigned()),
                        u64::from(view.fd.cast_unsigned()),
                    )
                    .or_else(|e| match e {
                        // In a tree that runs, the other one may have been closed since.
                        Errno::EBADF | Errno::ESRCH if !self.cx.frozen => Ok(std::cmp::Ordering::Less),
                        e => Err(FileError::sys("compare descriptors (kcmp)")(e)),
                    })?;
                    match order {
                        std::cmp::Ordering::Equal => return Ok(other.id),
                        std::cmp::Ordering::Less => low = middle + 1,
                        std::cmp::Ordering::Greater => high = middle,
                    }
                }
                low
            }
        };
        let id = self.take(view, findings)?;
        let known = Known { pid: view.pid, fd: view.fd, id };
        self.known.entry(key).or_default().insert(place, known);
        if let Some(id) = id {
            self.places.insert(id, Place { pid: view.pid, fd: view.fd });
        }
        Ok(id)
    }

    /// Dumps what `view` shows.
    fn take(&mut self, view: &FdView<'_>, findings: &mut Vec<Finding>) -> Result<Option<u32>, FileError> {
        let mut finding = |reason: String, hint: String| {
            findings.push(Finding { pid: view.pid, what: what_of(view), reason, hint });
        };
        let refused = |rows: &'static [Refusal]| rows.iter().find(|row| row.owns(view));
        if let Some(row) = refused(refused::FIRST) {
            finding(format!("{}: {}", row.name, row.reason), row.hint.to_owned());
            return Ok(None);
        }
        let Some(kind) = KINDS.iter().find(|kind| (kind.owns)(view)) else {
            match refused(refused::LAST) {
                Some(row) => finding(format!("{}: {}", row.name, row.reason), row.hint.to_owned()),
                None => finding("a kind of file that is not known".to_owned(), String::new()),
            }
            return Ok(None);
        };
        let id = self.cx.next_id();
        self.met.insert(id, (view.pid, what_of(view)));
        let made = (kind.dump)(&mut self.cx, view, id);
        let extra = std::mem::take(&mut self.cx.extra);
        match made {
            Ok(entry) => {
                for entry in extra.into_iter().chain([entry]) {
                    self.entry_of.insert(entry.id, self.entries.len());
                    self.entries.push(Rc::new(entry));
                }
                Ok(Some(id))
            }
            Err(FileError::Unsupported { reason, hint }) => {
                finding(reason.into_owned(), hint.into_owned());
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    /// The id of a file that no descriptor stands for: mapped, executed, current or root directory. `file` is any
    /// descriptor of it (O_PATH will do), `link` what /proc shows. `writable` makes the entry one for shared writable
    /// mappings. The same file gets the same id. `None`: refused, see `findings`.
    pub fn file_for(
        &mut self,
        pid: HostPid,
        link: &[u8],
        file: BorrowedFd<'_>,
        writable: bool,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<u32>, FileError> {
        let stat = Stat::new(&fstat(file).map_err(FileError::path("stat", link))?);
        let key = (stat.dev, stat.ino, writable, link.to_vec());
        if let Some(id) = self.objects.get(&key) {
            return Ok(*id);
        }
        let flags = if writable { libc::O_RDWR } else { libc::O_RDONLY };
        let info = Fdinfo { flags: flags.cast_unsigned(), ..Fdinfo::default() };
        let view = FdView {
            pid,
            fd: -1,
            link,
            info: &info,
            stat,
            source: Source::Ours(file),
            fetched: OnceCell::new(),
        };
        let id = self.take(&view, findings)?;
        self.objects.insert(key, id);
        Ok(id)
    }

    /// As [`Self::file_for`] for `exe`, `cwd` or `root` of a task.
    pub fn link_of_task(
        &mut self,
        pid: HostPid,
        name: &'static str,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<u32>, FileError> {
        deadline::looking_at(pid, deadline::Object::Link(name));
        let path = format!("/proc/{pid}/{name}");
        let link = match nix::fcntl::readlink(path.as_str()) {
            Ok(link) => bytes_of(link),
            Err(Errno::ENAMETOOLONG) => {
                let what = match name {
                    "cwd" => "current directory",
                    "root" => "root directory",
                    _ => "program",
                };
                findings.push(Finding {
                    pid,
                    what: what.into(),
                    reason:
                        "its path is longer than 4095 bytes (PATH_MAX): it cannot be opened again by one name"
                            .into(),
                    hint: "a directory less deep, or shorter names".into(),
                });
                return Ok(None);
            }
            Err(e) => return Err(FileError::path("read the link", path.as_bytes())(e)),
        };
        let file = open(path.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(FileError::path("open", path.as_bytes()))?;
        self.file_for(pid, &link, file.as_fd(), false, findings)
    }

    /// Current directory, root and umask of a task: its `fs-PID.img`. `None`: refused, see `findings`.
    pub fn fs(
        &mut self,
        pid: HostPid,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<pb::FsEntry>, FileError> {
        let path = format!("/proc/{pid}/status");
        let text = std::fs::read(&path).map_err(|e| {
            FileError::path("read", path.as_bytes())(Errno::from_raw(e.raw_os_error().unwrap_or(0)))
        })?;
        let umask = status::parse(&text)?.umask;
        let cwd = self.link_of_task(pid, "cwd", findings)?;
        let root = self.link_of_task(pid, "root", findings)?;
        Ok(cwd.zip(root).map(|(cwd_id, root_id)| pb::FsEntry { cwd_id, root_id, umask }))
    }

    /// After the last table and file: completes all entries. The clocks of the tree are taken to have stood when CLOCK_MONOTONIC of
    /// crtool was `clock`.
    pub fn complete(&mut self, clock: Duration, findings: &mut Vec<Finding>) -> Result<(), FileError> {
        self.cx.clock = Some(clock);
        for entry in &mut self.entries {
            let Some(at) = self.places.get(&entry.id).copied() else { continue };
            let Some(kind) = kind_of(entry) else { continue };
            match (kind.complete)(&mut self.cx, &self.tables, Rc::make_mut(entry), at) {
                Ok(()) => {}
                Err(FileError::Unsupported { reason, hint }) => findings.push(Finding {
                    pid: at.pid,
                    what: format!("fd {} ({})", at.fd, kind.name),
                    reason: reason.into_owned(),
                    hint: hint.into_owned(),
                }),
                Err(source) => {
                    return Err(FileError::File { id: entry.id, kind: kind.name, source: Box::new(source) });
                }
            }
        }
        locks::finish_dump(&mut self.cx, &self.tables, findings)
    }

    /// What a restore on this host would refuse, when all entries are complete: its own checks run on what is going to be
    /// written. `uses` says how files are used besides being open.
    pub(crate) fn would_restore(
        &mut self,
        uses: &HashSet<(u32, FileUse)>,
        findings: &mut Vec<Finding>,
    ) -> Result<(), FileError> {
        let settings = RestoreSettings {
            common: self.cx.settings.common.clone(),
            ..RestoreSettings::new(&self.cx.settings.common.images_dir)
        };
        let store = self.cx.store;
        let mut cx = RestoreCx::new(store, &settings);
        cx.entries = self.entries.iter().map(|entry| (entry.id, Rc::clone(entry))).collect();
        remap::hand_over(&mut self.cx, &mut cx);
        memfd::hand_over(&mut self.cx, &mut cx);
        pipe::hand_over(&mut self.cx, &mut cx);
        fifo::hand_over(&mut self.cx, &mut cx);
        let mut found = |id: u32, result: Result<(), FileError>| {
            let (reason, hint) = match result {
                Ok(()) => return,
                Err(FileError::Unsupported { reason, hint }) => (reason.into_owned(), hint.into_owned()),
                Err(error) => {
                    let mut reason = "it could not be restored here: ".to_owned() + &error.to_string();
                    let mut source = std::error::Error::source(&error);
                    while let Some(cause) = source {
                        reason = reason + ": " + &cause.to_string();
                        source = cause.source();
                    }
                    (reason, String::new())
                }
            };
            let (pid, what) = self.met.get(&id).cloned().unwrap_or_default();
            findings.push(Finding { pid, what, reason, hint });
        };
        let parts = restore::parts(&cx.entries);
        for entry in self.entries.iter().filter(|entry| self.met.contains_key(&entry.id)) {
            if let Some(kind) = kind_of(entry).filter(|_| !parts.contains(&entry.id)) {
                found(entry.id, (kind.would_open)(&mut cx, entry));
            }
        }
        for (id, usage) in uses {
            found(*id, regular::would_serve(&mut cx, *id, *usage));
        }
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard);
        self.check_limits(limit, findings);
        Ok(())
    }

    /// Descriptors that a restore with this limit of open files cannot have, or not give to a task.
    pub(super) fn check_limits(&self, limit: u64, findings: &mut Vec<Finding>) {
        let mut finding = |pid, what: &str, error: FileError| {
            if let FileError::Unsupported { reason, hint } = error {
                findings.push(Finding {
                    pid,
                    what: what.into(),
                    reason: reason.into_owned(),
                    hint: hint.into_owned(),
                });
            }
        };
        let tables = self.tables.0.iter().map(|table| table.fds.iter().map(|fd| fd.id).collect());
        let needed = restore::most_needed(&self.entries, tables);
        if u64::try_from(needed).is_ok_and(|needed| needed > limit) {
            let pid = self.tables.0.first().map_or(HostPid::NONE, |table| table.pid);
            finding(pid, "open files", restore::too_many(needed));
        }
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        for table in &self.tables.0 {
            let wanted = table.fds.iter().zip(0..);
            let wanted = wanted
                .map(|(fd, number)| (fd.fd, install::Origin { fd: number, cloexec: fd.cloexec }))
                .collect();
            if let Err(error) = install::plan(&wanted, limit).map_err(|_| restore::no_room(&wanted, limit)) {
                finding(table.pid, "descriptors", error);
            }
        }
    }

    /// What `fdinfo-N.img` will hold for a descriptor table.
    pub fn fdinfo(&self, table: &DumpTable) -> Vec<pb::FdinfoEntry> {
        let r#type = |id: &u32| self.entry_of.get(id).and_then(|at| self.entries.get(*at));
        let fds = table.fds.iter().map(|fd| pb::FdinfoEntry {
            id: fd.id,
            flags: if fd.cloexec { libc::FD_CLOEXEC.cast_unsigned() } else { 0 },
            r#type: r#type(&fd.id).map_or(0, |entry| entry.r#type),
            fd: fd.fd.cast_unsigned(),
            ..Default::default()
        });
        fds.collect()
    }

    /// Writes all images of files. Nothing was found that cannot be saved.
    pub fn write(&mut self) -> Result<(), FileError> {
        for kind in KINDS {
            (kind.finish_dump)(&mut self.cx)?;
        }
        self.cx.store.write_all(ImageKind::Files, None, self.entries.iter().map(|entry| &**entry))?;
        for table in &self.tables.0 {
            self.cx.store.write_all(ImageKind::Fdinfo, u64::from(table.files_id), &self.fdinfo(table))?;
        }
        Ok(())
    }

    /// The dump succeeded: hard links made for it stay. Without this they are removed when the value is dropped.
    pub fn commit(mut self) {
        self.cx.state::<Remaps>().keep();
    }
}

/// A descriptor, or what is mapped or used otherwise, for messages.
fn what_of(view: &FdView<'_>) -> String {
    if view.fd >= 0 { format!("fd {} ({})", view.fd, view.link_text()) } else { view.link_text() }
}

/// The row that an entry of an image belongs to.
pub(super) fn kind_of(entry: &pb::FileEntry) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| i32::from(kind.r#type) == entry.r#type)
}

/// A directory of a task under /proc.
fn open_dir(pid: &str, name: &str) -> Result<OwnedFd, FileError> {
    let path = format!("/proc/{pid}/{name}");
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path.as_str(), flags, Mode::empty()).map_err(FileError::path("open", path.as_bytes()))
}

/// The numbers in a directory of numbers, in order.
fn numbers(dir: &OwnedFd) -> Result<Vec<i32>, FileError> {
    let copy = dir.try_clone().map_err(|_| FileError::sys("list descriptors")(Errno::last()))?;
    let mut all = Vec::new();
    for entry in Dir::from_fd(copy).map_err(FileError::sys("list descriptors"))?.iter() {
        let entry = entry.map_err(FileError::sys("list descriptors"))?;
        if let Some(number) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) {
            all.push(number);
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// Reads a whole file of /proc into `text`, replacing what is there.
fn read_at(dir: &OwnedFd, name: &str, text: &mut Vec<u8>) -> Result<(), FileError> {
    let file = openat(dir, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(FileError::sys("open fdinfo"))?;
    text.clear();
    let mut piece = [0u8; 4096];
    loop {
        match nix::unistd::read(&file, &mut piece) {
            // The kernel prints all at once: what comes short is the end.
            Ok(len) => {
                text.extend_from_slice(piece.get(..len).unwrap_or_default());
                if len < piece.len() {
                    return Ok(());
                }
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(FileError::sys("read fdinfo")(e)),
        }
    }
}
