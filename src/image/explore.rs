//! What a directory of images holds, as text: tasks, open files, mappings, pages.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;

use super::error::ImageError;
use super::json::text;
use super::names::ImageKind;
use super::pb;
use super::store::{Store, TypedStore};

/// What to look at.
#[derive(Debug, Clone, Copy)]
pub enum What {
    /// The process tree.
    Tasks,
    /// Descriptors, current and root directory of each task.
    Files,
    /// Mappings of each task.
    Mappings,
    /// Pages of each task, next to the mappings they lie in.
    Pages,
}

/// A mapping that belongs to none of the plain kinds has one of these bits in its status.
mod status {
    pub(super) const REGULAR: u32 = 0x1;
    pub(super) const STACK: u32 = 0x2;
    pub(super) const VSYSCALL: u32 = 0x4;
    pub(super) const VDSO: u32 = 0x8;
    pub(super) const FILE_PRIVATE: u32 = 0x40;
    pub(super) const FILE_SHARED: u32 = 0x80;
    pub(super) const ANON_SHARED: u32 = 0x100;
    pub(super) const SYSVIPC: u32 = 0x400;
    pub(super) const SOCKET: u32 = 0x800;
}

const PAGE: u64 = 4096;

/// The text about the snapshot in `store`.
pub fn explore(store: &dyn Store, what: What) -> Result<String, ImageError> {
    if !store.exists(ImageKind::Pstree, None)? {
        return Err(ImageError::Absent { path: store.path_of(&ImageKind::Pstree.file_name(None)) });
    }
    let tasks: Vec<pb::PstreeEntry> = store.read_all(ImageKind::Pstree, None)?;
    let mut text = String::new();
    match what {
        What::Tasks => show_tasks(store, &tasks, &mut text)?,
        What::Files => {
            let files = Files::read(store)?;
            for task in &tasks {
                line(&mut text, format_args!("{}", task.pid));
                show_files(store, &files, task, &mut text)?;
            }
        }
        What::Mappings => {
            let files = Files::read(store)?;
            let mut shared = HashMap::new();
            for task in &tasks {
                line(&mut text, format_args!("{}", task.pid));
                show_mappings(store, &files, task, &mut shared, &mut text)?;
            }
        }
        What::Pages => {
            let files = Files::read(store)?;
            for task in &tasks {
                line(&mut text, format_args!("{}", task.pid));
                show_pages(store, &files, task, &mut text)?;
            }
        }
    }
    Ok(text)
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{content}");
}

/// Bytes of a name as text: other encodings and control characters escaped, so that a name
/// can neither break a line nor steer a terminal.
fn printable(name: &[u8]) -> String {
    let mut text = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() { text.extend(c.escape_default()) } else { text.push(c) }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

fn show_tasks(store: &dyn Store, tasks: &[pb::PstreeEntry], text: &mut String) -> Result<(), ImageError> {
    line(text, format_args!("{:>7}{:>7}{:>7}   COMM", "PID", "PGID", "SID"));
    let pids: BTreeSet<u32> = tasks.iter().map(|task| task.pid).collect();
    let mut children: BTreeMap<u32, Vec<&pb::PstreeEntry>> = BTreeMap::new();
    let mut roots = Vec::new();
    for task in tasks {
        if task.ppid != task.pid && pids.contains(&task.ppid) {
            children.entry(task.ppid).or_default().push(task);
        } else {
            roots.push(task);
        }
    }
    // Depth first, in the order of the image. Each list of children is taken out as it is
    // shown, so that damaged parents cannot make a circle.
    let mut todo: Vec<(usize, &pb::PstreeEntry)> = roots.into_iter().rev().map(|task| (0, task)).collect();
    while let Some((depth, task)) = todo.pop() {
        let core: Option<pb::CoreEntry> = store.read_one(ImageKind::Core, u64::from(task.pid))?;
        let comm = core.and_then(|core| core.tc).map(|tc| printable(&tc.comm));
        let comm = comm.as_deref().unwrap_or("?");
        let indent = 4 * depth;
        line(text, format_args!("{:>7}{:>7}{:>7}   {:indent$}{comm}", task.pid, task.pgid, task.sid, ""));
        let below = children.remove(&task.pid).unwrap_or_default();
        todo.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
    }
    Ok(())
}

/// The open files of a snapshot, by id.
struct Files(HashMap<u32, pb::FileEntry>);

impl Files {
    fn read(store: &dyn Store) -> Result<Files, ImageError> {
        let files: Vec<pb::FileEntry> = store.read_all(ImageKind::Files, None)?;
        Ok(Files(files.into_iter().map(|file| (file.id, file)).collect()))
    }

    fn path(&self, id: u32) -> Option<String> {
        let file = self.0.get(&id)?;
        file.reg.as_ref().map(|reg| printable(&reg.name))
    }

    fn describe(&self, fd: &pb::FdinfoEntry) -> String {
        let kind = fd.r#type().as_str_name();
        let file = self.0.get(&fd.id);
        if let Some(path) = self.path(fd.id) {
            return path;
        }
        if let Some(pipe) = file.and_then(|file| file.pipe.as_ref()) {
            return format!("pipe[{}]", pipe.pipe_id);
        }
        if let Some(socket) = file.and_then(|file| file.usk.as_ref()) {
            let name = if socket.name.is_empty() {
                String::new()
            } else {
                format!(" {}", printable(text::quoted(&socket.name).as_bytes()))
            };
            return format!("unix[{} ({}){name}]", socket.ino, socket.peer);
        }
        format!("{kind}.{}", fd.id)
    }
}

fn show_files(
    store: &dyn Store,
    files: &Files,
    task: &pb::PstreeEntry,
    text: &mut String,
) -> Result<(), ImageError> {
    let pid = u64::from(task.pid);
    // A zombie has neither ids nor files.
    let ids: Option<pb::TaskKobjIdsEntry> = store.read_one(ImageKind::Ids, pid)?;
    if let Some(ids) = ids {
        let descriptors: Vec<pb::FdinfoEntry> = store.read_all(ImageKind::Fdinfo, u64::from(ids.files_id))?;
        for fd in descriptors {
            line(text, format_args!("\t{:>7}: {}", fd.fd, files.describe(&fd)));
        }
    }
    let fs: Option<pb::FsEntry> = store.read_one(ImageKind::Fs, pid)?;
    if let Some(fs) = fs {
        let path = |id| files.path(id).unwrap_or_else(|| "?".to_owned());
        line(text, format_args!("\t{:>7}: {}", "cwd", path(fs.cwd_id)));
        line(text, format_args!("\t{:>7}: {}", "root", path(fs.root_id)));
    }
    Ok(())
}

/// The file that a mapping shows, if it shows one.
fn mapped_file(files: &Files, vma: &pb::VmaEntry) -> Option<String> {
    if vma.status & (status::FILE_PRIVATE | status::FILE_SHARED) == 0 {
        return None;
    }
    let path = u32::try_from(vma.shmid).ok().and_then(|id| files.path(id));
    Some(path.unwrap_or_else(|| "unknown path".to_owned()))
}

fn show_mappings(
    store: &dyn Store,
    files: &Files,
    task: &pb::PstreeEntry,
    shared: &mut HashMap<u64, usize>,
    text: &mut String,
) -> Result<(), ImageError> {
    let mm: Option<pb::MmEntry> = store.read_one(ImageKind::Mm, u64::from(task.pid))?;
    let Some(mm) = mm else { return Ok(()) };
    let exe = files.path(mm.exe_file_id).unwrap_or_else(|| "unknown path".to_owned());
    line(text, format_args!("\t{:<36}    {exe}", "exe"));
    for vma in &mm.vmas {
        let range = format!("{:08x}-{:08x}", vma.start, vma.end);
        let bit = |bit, c| if vma.prot & bit != 0 { c } else { '-' };
        let prot: String = [bit(1, 'r'), bit(2, 'w'), bit(4, 'x')].iter().collect();
        let what = describe_mapping(files, vma, shared);
        let irregular = if vma.status & status::REGULAR == 0 { " *" } else { "" };
        line(text, format_args!("\t{range:<36}{prot}{what}{irregular}"));
    }
    Ok(())
}

fn describe_mapping(files: &Files, vma: &pb::VmaEntry, shared: &mut HashMap<u64, usize>) -> String {
    const MAP_GROWSDOWN: u32 = 0x100;
    let is = |bit| vma.status & bit != 0;
    let mut number = || {
        let next = shared.len() + 1;
        *shared.entry(vma.shmid).or_insert(next)
    };
    if let Some(path) = mapped_file(files, vma) {
        let shared = if is(status::FILE_SHARED) { " (s)" } else { "" };
        let offset = if vma.pgoff != 0 { format!(" + {:#x}", vma.pgoff) } else { String::new() };
        format!(" {path}{offset}{shared}")
    } else if is(status::ANON_SHARED) {
        format!(" shmem[{}]", number())
    } else if is(status::STACK) {
        " [stack]".to_owned()
    } else if is(status::VSYSCALL) {
        " [vsyscall]".to_owned()
    } else if is(status::VDSO) {
        " [vdso]".to_owned()
    } else if is(status::SYSVIPC) {
        format!(" ips[{}]", number())
    } else if is(status::SOCKET) {
        format!(" packet[{}]", number())
    } else if vma.flags & MAP_GROWSDOWN != 0 {
        " [stack?]".to_owned()
    } else {
        String::new()
    }
}

fn show_pages(
    store: &dyn Store,
    files: &Files,
    task: &pb::PstreeEntry,
    text: &mut String,
) -> Result<(), ImageError> {
    let pid = u64::from(task.pid);
    let mm: Option<pb::MmEntry> = store.read_one(ImageKind::Mm, pid)?;
    let (Some(mm), Some(mut pagemap)) = (mm, store.open(ImageKind::Pagemap, pid)?) else { return Ok(()) };
    pagemap.next_entry::<pb::PagemapHead>()?;
    let mut vmas = mm.vmas.iter().enumerate().peekable();
    let mut shown = None;
    while let Some(run) = pagemap.next_entry::<pb::PagemapEntry>()? {
        let pages = run.nr_pages.unwrap_or_else(|| u64::from(run.compat_nr_pages));
        let end = run.vaddr.saturating_add(pages.saturating_mul(PAGE));
        let mut start = format!("\t{:x} / {pages:<8}", run.vaddr);
        while vmas.next_if(|(_, vma)| vma.end <= run.vaddr).is_some() {}
        while let Some((at, vma)) = vmas.peek().copied().filter(|(_, vma)| vma.start < end) {
            if shown == Some(at) {
                line(text, format_args!("{start:<24} ~"));
            } else {
                let file = mapped_file(files, vma).map(|path| format!(" {path}")).unwrap_or_default();
                let len = vma.end.saturating_sub(vma.start) / PAGE;
                line(text, format_args!("{start:<24} {:08x} / {len:<8}{file}", vma.start));
                shown = Some(at);
            }
            start = "\t".to_owned();
            if vma.end >= end {
                break;
            }
            vmas.next();
        }
        line(text, format_args!("{start:<24}"));
    }
    Ok(())
}
