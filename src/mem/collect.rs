//! The areas of one task and the fields of its address space, as they go into `mm-PID.img`.
//!
//! Everything is read through /proc/TID of a living thread: the files of a dead leader are empty.
//! A mapped file is opened through map_files with O_PATH, which opens nothing on its device, and
//! handed to whoever writes `files.img`.

use std::borrow::Cow;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statfs::fstatfs;

use super::scan::{Target, Wanted};
use super::shared::FileKey;
use super::{Inside, MemError, SharedMemory, aio, pkeys, vma};
use crate::finding::Finding;
use crate::image::pb;
use crate::kept::{Form, Kept};
use crate::proc::maps::VmaName;
use crate::proc::smaps::{self, Smap, VmFlags};
use crate::proc::{auxv, stat};
use crate::{deadline, sys::fd::read_proc, sys::pid::HostPid};

/// A task whose address space is to be saved; what only others know of it.
#[derive(Debug, Clone)]
pub struct Task {
    /// The process.
    pub pid: HostPid,
    /// A thread of it that lives.
    pub tid: HostPid,
    /// Its program break, brk(0).
    pub brk: u64,
    /// PR_GET_DUMPABLE
    pub dumpable: i32,
    /// PR_GET_THP_DISABLE
    pub thp_disable: u32,
    /// Id of /proc/PID/exe in `files.img`.
    pub exe_file_id: u32,
    /// Areas that crtool itself made in the task.
    pub ours: Vec<Range<u64>>,
    /// What the task told.
    pub inside: Inside,
}

/// A file that a task has mapped.
#[derive(Debug)]
pub struct MappedFile<'a> {
    /// The process.
    pub pid: HostPid,
    /// Its name as maps prints it (a newline as `\012`, perhaps " (deleted)" behind).
    pub path: &'a [u8],
    /// The file, opened with O_PATH.
    pub file: OwnedFd,
    /// O_RDWR when it is mapped shared and may be written, else O_RDONLY.
    pub flags: i32,
    /// It is a memfd, the object with this id.
    #[cfg_attr(not(feature = "internals"), allow(dead_code))] // tests look at it
    pub memfd: Option<u32>,
}

/// Where mapped files go.
pub trait VmaFiles {
    /// The id of an entry in `files.img` that opens `mapped` with its flags.
    fn mapped_file(&mut self, mapped: MappedFile<'_>) -> Result<u32, Box<dyn Error + Send + Sync>>;
}

/// What was collected.
#[derive(Debug)]
pub struct AddressSpace {
    /// Thread by which memory can be reached.
    pub(super) tid: HostPid,
    /// Process id, as in the images.
    pub(super) pid: HostPid,
    /// All of `mm-PID.img` but guard regions.
    pub entry: pb::MmEntry,
    /// Areas and what of their pages is wanted.
    pub(super) targets: Vec<Target>,
    /// Pages in private areas.
    pub(super) private_pages: u64,
}

impl AddressSpace {
    /// Another task that has the very same address space (CLONE_VM) brings its pages.
    pub fn without_pages(&mut self) {
        self.targets.clear();
        self.private_pages = 0;
    }

    /// Until it is written, while all others are collected.
    pub(crate) fn keep(self, form: Form) -> KeptSpace {
        let Self { tid, pid, entry, targets, private_pages } = self;
        KeptSpace { tid, pid, entry: Kept::new(entry, form), targets: targets.into(), private_pages }
    }
}

/// An [`AddressSpace`] that waits to be written.
#[derive(Debug)]
pub(crate) struct KeptSpace {
    tid: HostPid,
    pid: HostPid,
    entry: Kept<pb::MmEntry>,
    targets: Box<[Target]>,
    private_pages: u64,
}

impl KeptSpace {
    pub(crate) fn entry(&self) -> Cow<'_, pb::MmEntry> {
        self.entry.message()
    }

    pub(crate) fn space(self) -> AddressSpace {
        let Self { tid, pid, entry, targets, private_pages } = self;
        AddressSpace { tid, pid, entry: entry.into_message(), targets: targets.into(), private_pages }
    }
}

/// Collects the address space of a stopped task. What cannot be saved goes to `findings`; then
/// the result is not to be dumped.
pub fn collect(
    task: &Task,
    files: &mut dyn VmaFiles,
    shared: &SharedMemory,
    findings: &mut Vec<Finding>,
) -> Result<AddressSpace, MemError> {
    let stat = stat::parse(&read(task.tid, "stat")?).map_err(|source| parse_error(task, source))?;
    let mut words = auxv::parse(&read(task.tid, "auxv")?).map_err(|source| parse_error(task, source))?;
    // The closing pair is not part of the image.
    if let Some(end) = words.chunks(2).position(|pair| pair.first() == Some(&libc::AT_NULL)) {
        words.truncate(2 * end);
    }
    let (vmas, targets, aios) = (Vec::new(), Vec::new(), Vec::new());
    let mut collector = Collector { task, files, shared, findings, vmas, targets, aios };
    let mut smaps = Smaps::open(task)?;
    while let Some(areas) = smaps.next_areas()? {
        for area in &areas {
            if !task.ours.iter().any(|ours| ours.start <= area.vma.start && area.vma.end <= ours.end) {
                collector.area(area)?;
            }
        }
    }
    let execute_only_pkey = collector.execute_only_pkey();
    let Collector { vmas, targets, aios, .. } = collector;
    let private_pages = targets
        .iter()
        .filter(|target| matches!(target.wanted, Wanted::Own { .. }))
        .map(|target| (target.end - target.start) / crate::pages::PAGE)
        .sum();
    let entry = pb::MmEntry {
        mm_start_code: stat.start_code,
        mm_end_code: stat.end_code,
        mm_start_data: stat.start_data,
        mm_end_data: stat.end_data,
        mm_start_stack: stat.start_stack,
        mm_start_brk: stat.start_brk,
        mm_brk: task.brk,
        mm_arg_start: stat.arg_start,
        mm_arg_end: stat.arg_end,
        mm_env_start: stat.env_start,
        mm_env_end: stat.env_end,
        exe_file_id: task.exe_file_id,
        mm_saved_auxv: words,
        vmas,
        dumpable: Some(task.dumpable),
        aios,
        thp_disabled: Some(task.thp_disable != 0),
        pkeys: task.inside.pkeys,
        execute_only_pkey,
        memory_merge: task.inside.merge.then_some(true),
        lock_future: task.inside.lock_future,
        ldt: task.inside.ldt.clone(),
        thp_except_advised: (task.thp_disable == super::THP_EXCEPT_ADVISED).then_some(true),
    };
    Ok(AddressSpace { tid: task.tid, pid: task.pid, entry, targets, private_pages })
}

fn read(tid: HostPid, file: &str) -> Result<Vec<u8>, MemError> {
    read_proc(&format!("/proc/{tid}/{file}")).map_err(|source| MemError::Proc {
        pid: tid,
        file: file.to_owned(),
        source,
    })
}

/// /proc/PID/smaps, some areas at a time: the text of 65,530 areas would take 50 MB.
struct Smaps<'a> {
    task: &'a Task,
    file: File,
    text: Vec<u8>,
}

/// Text parsed at once.
const SMAPS_CHUNK: usize = 256 << 10;

impl<'a> Smaps<'a> {
    fn open(task: &'a Task) -> Result<Self, MemError> {
        let file =
            File::open(format!("/proc/{}/smaps", task.tid)).map_err(|e| proc_error(task, "smaps", e))?;
        Ok(Self { task, file, text: Vec::with_capacity(2 * SMAPS_CHUNK) })
    }

    /// The next areas, or `None` at the end.
    fn next_areas(&mut self) -> Result<Option<Vec<Smap>>, MemError> {
        let wanted = SMAPS_CHUNK.saturating_sub(self.text.len()).max(SMAPS_CHUNK / 2);
        let limit = u64::try_from(wanted).unwrap_or(u64::MAX);
        let read = (&mut self.file).take(limit).read_to_end(&mut self.text);
        let read = read.map_err(|e| proc_error(self.task, "smaps", e))?;
        if self.text.is_empty() {
            return Ok(None);
        }
        // An area ends with its flags; what is behind the last flags waits for the rest.
        let whole = if read == 0 {
            self.text.len()
        } else {
            let flags = memchr::memmem::rfind(&self.text, b"\nVmFlags:").map_or(0, |at| at + 1);
            let rest = self.text.get(flags..).unwrap_or_default();
            memchr::memchr(b'\n', rest).map_or(0, |end| flags + end + 1)
        };
        let areas = smaps::parse(self.text.get(..whole).unwrap_or_default())
            .map_err(|source| parse_error(self.task, source))?;
        self.text.drain(..whole);
        Ok(Some(areas))
    }
}

fn proc_error(task: &Task, file: &str, source: io::Error) -> MemError {
    MemError::Proc { pid: task.pid, file: file.to_owned(), source }
}

fn parse_error(task: &Task, source: crate::proc::ParseError) -> MemError {
    MemError::Parse { pid: task.pid, source }
}

struct Collector<'a> {
    task: &'a Task,
    files: &'a mut dyn VmaFiles,
    shared: &'a SharedMemory,
    findings: &'a mut Vec<Finding>,
    vmas: Vec<pb::VmaEntry>,
    targets: Vec<Target>,
    aios: Vec<pb::AioRingEntry>,
}

/// Kinds of file-backed areas.
enum Backing {
    /// A file with a path, or a memfd: an entry of `files.img`.
    File,
    Memfd,
    /// MAP_SHARED | MAP_ANONYMOUS
    AnonShared,
    /// The ring of an asynchronous I/O context.
    AioRing,
    /// MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, which has a nameless file behind it.
    AnonPrivateHuge,
    Refused {
        reason: &'static str,
        hint: &'static str,
    },
}

impl Collector<'_> {
    fn area(&mut self, area: &Smap) -> Result<(), MemError> {
        let mut entry = vma::entry(area);
        let policies = &self.task.inside.policies;
        if let Ok(at) = policies.binary_search_by_key(&entry.start, |(start, _)| *start) {
            entry.mempolicy = policies.get(at).map(|(_, policy)| policy.clone());
        }
        let special = matches!(area.vma.name, Some(VmaName::Vvar | VmaName::VvarVclock | VmaName::Vdso));
        if special && entry.pkey.is_some() {
            self.refuse(area, "vdso", "code of the kernel with a memory protection key", "");
        }
        match &area.vma.name {
            Some(VmaName::Vsyscall) => {
                entry.status = vma::VSYSCALL | vma::ANON_PRIVATE;
                entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
                // Not a place where anything could be read.
                self.vmas.push(entry);
                return Ok(());
            }
            Some(VmaName::Vvar) => {
                self.special(entry, vma::VVAR);
                return Ok(());
            }
            // Linux 6.13 cut it off behind [vvar]; images have one area for both, unless the task has made two of it.
            Some(VmaName::VvarVclock) => {
                match self.vmas.last_mut() {
                    Some(last)
                        if last.status & vma::VVAR != 0
                            && last.end == entry.start
                            && last.prot == entry.prot =>
                    {
                        last.end = entry.end
                    }
                    _ => self.special(entry, vma::VVAR),
                }
                return Ok(());
            }
            Some(VmaName::Vdso) => {
                self.targets.push(Target { start: entry.start, end: entry.end, wanted: Wanted::All });
                self.special(entry, vma::VDSO);
                return Ok(());
            }
            Some(VmaName::Special(name)) => {
                let what = String::from_utf8_lossy(name).into_owned();
                self.refuse(area, &what, "a mapping of the kernel that crtool does not know", "");
                return Ok(());
            }
            _ => {}
        }
        if !self.refuse_flags(area) {
            return Ok(());
        }
        if let Some(VmaName::AnonShmem(_)) = &area.vma.name {
            // The name stands where that of the object would: anonymous shared memory, or a memfd.
            let link = self.link(area)?;
            self.file(area, entry, &link)?;
            return Ok(());
        }
        match area.vma.path() {
            None => self.anonymous(area, entry),
            Some(path) => self.file(area, entry, path)?,
        }
        Ok(())
    }

    fn special(&mut self, mut entry: pb::VmaEntry, kind: u32) {
        entry.status |= kind | vma::ANON_PRIVATE;
        entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
        // [vvar] begins with a page offset of the kernel's own.
        entry.pgoff = 0;
        self.vmas.push(entry);
    }

    fn anonymous(&mut self, area: &Smap, mut entry: pb::VmaEntry) {
        entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
        entry.pgoff = 0;
        entry.status |= vma::ANON_PRIVATE;
        if area.vma.name == Some(VmaName::Heap) {
            entry.status |= vma::HEAP;
        }
        self.own_pages(area, &entry, true);
        self.vmas.push(entry);
    }

    fn file(&mut self, area: &Smap, mut entry: pb::VmaEntry, path: &[u8]) -> Result<(), MemError> {
        let writable = area.vma.shared && area.flags.contains(VmFlags::SHARED);
        let flags = if writable { libc::O_RDWR } else { libc::O_RDONLY };
        let backing = self.backing(area, path)?;
        entry.fdflags = Some(flags.cast_unsigned());
        match backing {
            Backing::Refused { reason, hint } => {
                self.refuse(area, &String::from_utf8_lossy(path), reason, hint);
                return Ok(());
            }
            Backing::AioRing => {
                let path = String::from_utf8_lossy(path);
                if self.aios.is_empty() && !aio::settle() {
                    let reason =
                        "requests of asynchronous I/O may be under way: a block device does not come to rest";
                    self.refuse(area, &path, reason, "try again when it is less busy");
                    return Ok(());
                }
                let Some(ring) = aio::dump(self.task.tid, entry.start, entry.end)? else {
                    self.refuse(area, &path, "a part of a ring of asynchronous I/O", "");
                    return Ok(());
                };
                // As CRIU has it: nothing but this.
                entry.status = vma::AIORING;
                entry.pgoff = 0;
                self.targets.push(Target { start: entry.start, end: entry.end, wanted: Wanted::All });
                self.aios.push(ring);
            }
            Backing::AnonPrivateHuge => {
                entry.status |= vma::ANON_PRIVATE;
                entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
                entry.pgoff = 0;
                entry.fdflags = None;
                self.own_pages(area, &entry, true);
            }
            Backing::AnonShared => {
                entry.status |= vma::ANON_SHARED;
                entry.flags |= libc::MAP_ANONYMOUS.cast_unsigned();
                entry.fdflags = None;
                entry.shmid = u64::from(self.object(area)?);
                let end = area.vma.pgoff_bytes + (entry.end - entry.start);
                entry.object_bytes = Some(self.shared.object_bytes(entry.shmid)?).filter(|len| *len != end);
                if area.vma.shared {
                    self.guards(&entry);
                } else {
                    // Through /proc/PID/map_files it can be mapped privately, like a file.
                    self.own_pages(area, &entry, false);
                }
            }
            Backing::File | Backing::Memfd => {
                let memfd = matches!(backing, Backing::Memfd);
                let Some(id) = self.file_id(area, path, flags, memfd)? else { return Ok(()) };
                entry.shmid = u64::from(id);
                entry.status |= match (area.vma.shared, memfd) {
                    (false, false) => vma::FILE_PRIVATE,
                    (true, false) => vma::FILE_SHARED,
                    (false, true) => vma::FILE_PRIVATE | vma::MEMFD,
                    (true, true) => vma::FILE_SHARED | vma::MEMFD,
                };
                if area.vma.shared {
                    self.guards(&entry);
                } else {
                    self.own_pages(area, &entry, false);
                }
            }
        }
        self.vmas.push(entry);
        Ok(())
    }

    fn own_pages(&mut self, area: &Smap, entry: &pb::VmaEntry, zero_is_absent: bool) {
        // What a droppable area holds may be gone at any time; random states in it must not come twice.
        if area.flags.contains(VmFlags::DROPPABLE) {
            return;
        }
        // process_vm_readv pins pages, and pinning a page that is shared copy-on-write gives the task a
        // copy of its own (Linux 5.19, FOLL_PIN): a dump would multiply the memory of a forked server.
        // /proc/PID/mem does not pin. Pages of this area alone have the same Pss as Rss.
        let shared_pages = area.pss_bytes < area.rss_bytes;
        let unreadable = area.vma.prot & libc::PROT_READ == 0 || shared_pages;
        let wanted = Wanted::Own { zero_is_absent, lazy: vma::can_be_lazy(entry), unreadable };
        self.targets.push(Target { start: entry.start, end: entry.end, wanted });
    }

    fn guards(&mut self, entry: &pb::VmaEntry) {
        self.targets.push(Target { start: entry.start, end: entry.end, wanted: Wanted::Guards });
    }

    fn backing(&self, area: &Smap, path: &[u8]) -> Result<Backing, MemError> {
        let refused = |reason, hint| Ok(Backing::Refused { reason, hint });
        let hugetlb = area.flags.contains(VmFlags::HUGETLB);
        let dev = libc::makedev(area.vma.dev.0, area.vma.dev.1);
        let page_bytes = if hugetlb { area.kernel_page_bytes } else { crate::pages::PAGE };
        // The prefix first: most areas are of ordinary files and need no probe.
        let prefixes: [&[u8]; 5] =
            [b"/dev/zero (deleted)", b"/memfd:", b"/SYSV", b"/anon_hugepage (deleted)", b"/[aio]"];
        if prefixes.iter().any(|prefix| path.starts_with(prefix)) {
            let kernel = self.shared.is_kernel_mount(dev, page_bytes)?;
            if kernel && path == b"/dev/zero (deleted)" {
                return Ok(Backing::AnonShared);
            }
            if kernel && path == b"/anon_hugepage (deleted)" {
                return self.huge_backing(area);
            }
            if kernel && path.starts_with(b"/memfd:") {
                return Ok(Backing::Memfd);
            }
            if kernel && path.starts_with(b"/SYSV") {
                return refused(
                    "System V shared memory is not supported yet",
                    "detach it (shmdt), or use POSIX shared memory",
                );
            }
            if path == b"/[aio] (deleted)" && self.is_on(area, aio::FS_MAGIC)? {
                return Ok(Backing::AioRing);
            }
        }
        if path == b"anon_inode:[io_uring]" {
            return refused("the rings of an io_uring", "close it first");
        }
        if !path.starts_with(b"/") {
            return refused("a mapping of something that is no file", "unmap it first");
        }
        Ok(Backing::File)
    }

    /// MAP_ANONYMOUS | MAP_HUGETLB memory has an object behind it, shared or not; that of a private area has no content of
    /// its own unless it is the object of a shared one, mapped again through /proc/PID/map_files.
    fn huge_backing(&self, area: &Smap) -> Result<Backing, MemError> {
        let dev = libc::makedev(area.vma.dev.0, area.vma.dev.1);
        let split = Backing::Refused {
            reason: "huge pages that are mapped privately here and shared elsewhere",
            hint: "unmap one of them first",
        };
        if area.vma.shared {
            let own = self.shared.is_of_private_area(dev, area.vma.ino);
            return Ok(if own { split } else { Backing::AnonShared });
        }
        let stat = fstat(self.open(area)?).map_err(|e| MemError::Proc {
            pid: self.task.pid,
            file: format!("map_files/{}", area.vma.map_files_name()),
            source: e.into(),
        })?;
        if stat.st_blocks > 0 || self.shared.known(dev, area.vma.ino).is_some() {
            return Ok(Backing::AnonShared);
        }
        self.shared.is_private(dev, area.vma.ino);
        Ok(Backing::AnonPrivateHuge)
    }

    /// Refuses what VmFlags tell; true if the area may go on.
    fn refuse_flags(&mut self, area: &Smap) -> bool {
        let name = match &area.vma.name {
            Some(VmaName::Path(path)) => String::from_utf8_lossy(path).into_owned(),
            _ => "anonymous memory".to_owned(),
        };
        let uffd = VmFlags::UFFD_MISSING | VmFlags::UFFD_WP | VmFlags::UFFD_MINOR;
        for (flag, reason, hint) in [
            (VmFlags::PFNMAP | VmFlags::IO, "memory of a device", "close the device first"),
            (uffd, "registered with a userfaultfd", "unregister it first"),
            (VmFlags::SEALED, "sealed by mseal, which cannot be undone or seen by others", ""),
            (
                VmFlags::SHADOW_STACK,
                "a shadow stack",
                "run the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
            ),
            (VmFlags::NONLINEAR, "a nonlinear mapping", ""),
        ] {
            if area.flags.intersects(flag) {
                self.refuse(area, &name, reason, hint);
                return false;
            }
        }
        if let Some(code) = area.unknown_flags.first() {
            let reason = format!("has a flag that crtool does not know ({})", String::from_utf8_lossy(code));
            self.refuse(area, &name, &reason, "use a newer crtool");
            return false;
        }
        true
    }

    /// The key that the kernel has taken for execute-only memory.
    fn execute_only_pkey(&mut self) -> Option<u32> {
        let found = pkeys::execute_only(self.task.inside.pkeys?, &self.vmas);
        if let Err((one, other)) = found {
            self.findings.push(Finding {
                pid: self.task.pid,
                what: format!("memory protection keys {one} and {other}"),
                reason: "one of them is the kernel's own for execute-only memory, the other was freed while such memory \
                         has it, and which is which cannot be seen"
                    .into(),
                hint: String::new(),
            });
        }
        found.ok().flatten()
    }

    fn refuse(&mut self, area: &Smap, name: &str, reason: &str, hint: &str) {
        self.findings.push(Finding {
            pid: self.task.pid,
            what: format!("memory {:x}-{:x} ({name})", area.vma.start, area.vma.end),
            reason: reason.to_owned(),
            hint: hint.to_owned(),
        });
    }

    /// What /proc/PID/map_files says is mapped.
    fn link(&self, area: &Smap) -> Result<Vec<u8>, MemError> {
        let file = format!("map_files/{}", area.vma.map_files_name());
        let link = fs::read_link(format!("/proc/{}/{file}", self.task.tid));
        let link = link.map_err(|source| MemError::Proc { pid: self.task.pid, file, source })?;
        Ok(link.into_os_string().into_vec())
    }

    /// Whether the area's file is on a file system of the kernel's own.
    fn is_on(&self, area: &Smap, magic: i64) -> Result<bool, MemError> {
        let file = self.open(area)?;
        Ok(fstatfs(&file).is_ok_and(|fs| fs.filesystem_type().0 == magic))
    }

    /// The mapped file, opened so that nothing happens to it.
    fn open(&self, area: &Smap) -> Result<OwnedFd, MemError> {
        deadline::looking_at(self.task.tid, deadline::Object::Mapped(area.vma.start, area.vma.end));
        let file = format!("map_files/{}", area.vma.map_files_name());
        let path = format!("/proc/{}/{file}", self.task.tid);
        open(path.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(|e| MemError::Proc {
            pid: self.task.pid,
            file,
            source: e.into(),
        })
    }

    fn object(&self, area: &Smap) -> Result<u32, MemError> {
        let dev = libc::makedev(area.vma.dev.0, area.vma.dev.1);
        match self.shared.known(dev, area.vma.ino) {
            Some(shmid) => Ok(shmid),
            None => self.shared.object(self.open(area)?),
        }
    }

    /// Id of the area's file; `None` when it was refused.
    fn file_id(
        &mut self,
        area: &Smap,
        path: &[u8],
        flags: i32,
        memfd: bool,
    ) -> Result<Option<u32>, MemError> {
        let key = FileKey { dev: area.vma.dev, ino: area.vma.ino, path: path.to_vec(), flags };
        if let Some(id) = self.shared.known_file(&key) {
            return Ok(Some(id));
        }
        let file = self.open(area)?;
        if !self.may_be_mapped_again(area, path, &file)? {
            return Ok(None);
        }
        // Asking for its object also has its content written.
        let memfd = if memfd { Some(self.shared.object(file.as_fd())?) } else { None };
        let id = self
            .files
            .mapped_file(MappedFile { pid: self.task.pid, path, file, flags, memfd })
            .map_err(|source| MemError::File { pid: self.task.pid, start: area.vma.start, source })?;
        self.shared.file_is(key, id);
        Ok(Some(id))
    }

    /// Regular files, and /dev/zero, which gives anonymous memory. Other devices have a state of their own.
    fn may_be_mapped_again(&mut self, area: &Smap, path: &[u8], file: &OwnedFd) -> Result<bool, MemError> {
        let stat = fstat(file).map_err(|e| MemError::Proc {
            pid: self.task.pid,
            file: format!("map_files/{}", area.vma.map_files_name()),
            source: e.into(),
        })?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        let zero = kind == SFlag::S_IFCHR && stat.st_rdev == libc::makedev(1, 5);
        if kind != SFlag::S_IFREG && !zero {
            let path = String::from_utf8_lossy(path);
            self.refuse(area, &path, "a mapping of something that is no regular file", "unmap it first");
        }
        Ok(kind == SFlag::S_IFREG || zero)
    }
}
