//! Files of /proc that belong to a task: which task, and what must be there before they can be opened again.
//!
//! Such a path is a name for a task, and another task may have that name after a restore. So it is saved only for tasks of the
//! tree, and opened only for those. Some stand for more than the pid says: `mem`, `maps` and the like for the memory that the
//! task had when they were opened; what they show must still be the memory that it has. Those of a descriptor or mapping are
//! opened by the task itself, in its list, when it has made its table. Of a task that is gone a descriptor
//! still works after a fashion (reading gives ESRCH): to open it again somebody must have that pid for a while, a child of the
//! supervisor that does nothing.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    sys::{
        stat::Mode,
        statfs::{PROC_SUPER_MAGIC, fstatfs},
        uio::pread,
    },
};

use super::{
    DumpTables, FdView, FileError, RestoreCx, RestoreTable, locks, path::proc_pid, pidfd, pipe_data::io_error,
};
use crate::{
    image::{ImageKind, TypedStore, pb},
    proc::auxv,
    process_tree::ids::on_host,
    sys::{self, Errno, clone, pid::HostPid, pid::NsPid},
    tracee::{List, Want},
};

/// What the memory of a task is shown by, as it was when the file was opened.
const OF_MEMORY: &[&[u8]] =
    &[b"mem", b"pagemap", b"maps", b"smaps", b"smaps_rollup", b"numa_maps", b"environ", b"auxv"];
const AT_RANDOM: u64 = 25;
const PAGE: u64 = 4096;

/// What must be there before a file of a task can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// The process.
    Process(i32),
    /// A thread of a process that is not its leader.
    Thread(i32, i32),
    /// The descriptor table, or the mappings, of a process.
    Content(i32),
}

/// What the path needs; `None` for one that is not of a task.
pub(super) fn needs(path: &[u8]) -> Option<Needs> {
    let pid = proc_pid(path)?;
    let mut parts = path.split(|&b| b == b'/').skip(3);
    let mut part = || parts.next().unwrap_or_default();
    let number = |part: &[u8]| std::str::from_utf8(part).ok()?.parse::<i32>().ok();
    let content =
        |name: &[u8], more: &[u8]| matches!(name, b"fd" | b"fdinfo" | b"map_files") && !more.is_empty();
    let first = part();
    let second = part();
    match number(second).filter(|_| first == b"task") {
        Some(tid) if tid != pid => Some(Needs::Thread(pid, tid)),
        Some(_) => {
            let name = part();
            Some(if content(name, part()) { Needs::Content(pid) } else { Needs::Process(pid) })
        }
        None if content(first, second) => Some(Needs::Content(pid)),
        None => Some(Needs::Process(pid)),
    }
}

impl Needs {
    /// `/proc/TID` works for a thread too, though no list of /proc shows it. `leader` tells the process of a thread.
    fn of(path: &[u8], leader: impl Fn(i32) -> Option<i32>) -> Option<Self> {
        let needs = needs(path)?;
        Some(match needs {
            Self::Process(pid) | Self::Content(pid) => match leader(pid) {
                Some(leader) if leader != pid => Self::Thread(leader, pid),
                _ => needs,
            },
            Self::Thread(..) => needs,
        })
    }

    fn process(self) -> i32 {
        let (Self::Process(pid) | Self::Thread(pid, _) | Self::Content(pid)) = self;
        pid
    }

    /// As it is in a tree that is dumped.
    fn now(path: &[u8]) -> Option<Self> {
        Self::of(path, |tid| Some(locks::process_of(HostPid::new(tid)).ok()?.get()))
    }
}

/// Whether the file is on a proc file system.
fn on_proc(fd: &FdView<'_>) -> bool {
    // Only such files have no size and a device without a number of its own; all others need no look.
    libc::major(fd.stat.dev) == 0
        && fd.stat.size == 0
        && fd.file().is_ok_and(|file| fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == PROC_SUPER_MAGIC))
}

/// Refuses files of tasks that would be something else after a restore. `root` is the root of the tree. True for a file that
/// shows a task of the tree, under its name.
pub(super) fn check(fd: &FdView<'_>, root: HostPid, at_its_name: bool) -> Result<bool, FileError> {
    const CLOSE: &str = "let the program close it before the dump";
    if !on_proc(fd) {
        return Ok(false);
    }
    let Some(needs) = Needs::now(fd.link) else {
        let of_task =
            fd.link.split(|&b| b == b'/').any(|part| !part.is_empty() && part.iter().all(u8::is_ascii_digit));
        if of_task && !fd.link.starts_with(b"/proc/") {
            return Err(FileError::unsupported(
                "a file of a task, of a proc file system that is not at /proc",
                CLOSE,
            ));
        }
        return Ok(false);
    };
    let pid = HostPid::new(needs.process());
    let alive = nix::sys::stat::lstat(format!("/proc/{pid}").as_str()).is_ok();
    if !alive {
        return Ok(false);
    }
    if !at_its_name {
        let what = match needs {
            Needs::Process(_) => "of a process that is gone, and whose pid another has now",
            Needs::Thread(..) => "of a thread that has ended",
            Needs::Content(_) => "of a descriptor or mapping that is gone",
        };
        return Err(FileError::unsupported(format!("a file of /proc {what}"), CLOSE));
    }
    if !pidfd::descends_from(pid, root)? {
        return Err(FileError::unsupported(
            format!(
                "it shows process {pid}, which is not in the tree: after a restore another may have that pid"
            ),
            "let the program close it, or dump a tree that holds both",
        ));
    }
    if fd.fd < 0 && matches!(needs, Needs::Content(_)) {
        return Err(FileError::unsupported(
            "a file of /proc of a descriptor or mapping, which is mapped itself",
            "",
        ));
    }
    check_memory(fd, pid)?;
    Ok(true)
}

/// What the text of smaps or numa_maps says of where areas are. How many of their pages are there, and who else has
/// them, changes from one moment to the next, also while the task stands still.
fn areas(text: &[u8]) -> Vec<u8> {
    let whole = text.iter().rposition(|&b| b == b'\n').and_then(|end| text.get(..end)).unwrap_or_default();
    let first_word = |line: &[u8]| line.split(|&b| b == b' ').next().map(<[u8]>::to_vec);
    let words = whole.split(|&b| b == b'\n').filter_map(first_word);
    words.filter(|word| word.last() != Some(&b':')).collect::<Vec<_>>().join(&b' ')
}

/// Whether a file that shows memory shows that which the task has now. A program that was run since has another.
fn check_memory(fd: &FdView<'_>, pid: HostPid) -> Result<(), FileError> {
    let name = fd.link.rsplit(|&b| b == b'/').next().unwrap_or_default();
    let flags = fd.flags().cast_signed();
    if !OF_MEMORY.contains(&name) || flags & libc::O_PATH != 0 {
        return Ok(());
    }
    if flags & libc::O_ACCMODE == libc::O_WRONLY {
        return Err(FileError::unsupported(
            "it is open for writing only, so whose memory it writes to cannot be told",
            "",
        ));
    }
    let path = String::from_utf8_lossy(fd.link).into_owned();
    let words = auxv::parse(
        &std::fs::read(format!("/proc/{pid}/auxv")).map_err(|e| io_error("read the auxv of a task", &e))?,
    )?;
    // Sixteen random bytes, others for each program that is run.
    let random = auxv::get(&words, AT_RANDOM).unwrap_or(0);
    let at = match name {
        b"mem" => random,
        b"pagemap" => random / PAGE * 8,
        _ => 0,
    };
    let len = match name {
        b"mem" => 16,
        b"pagemap" => 8,
        _ => 4096,
    };
    let now = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(FileError::path("open", fd.link))?;
    let read = |from: BorrowedFd<'_>| {
        let mut bytes = vec![0u8; len];
        let got = pread(from, &mut bytes, i64::try_from(at).ok()?).ok()?;
        bytes.truncate(got);
        Some(bytes)
    };
    let read = |from: BorrowedFd<'_>| match name {
        b"smaps" | b"smaps_rollup" | b"numa_maps" => read(from).map(|text| areas(&text)),
        _ => read(from),
    };
    let (then, now) = (read(fd.file()?), read(now.as_fd()));
    if then.as_ref().is_some_and(|bytes| !bytes.is_empty()) && then == now {
        return Ok(());
    }
    Err(FileError::unsupported(
        format!("it shows memory that process {pid} no longer has: it has run another program since"),
        "let the program close it before the dump",
    ))
}

/// Children with chosen pids, ended and reaped when dropped.
#[derive(Debug, Default)]
pub(super) struct StandIns(Vec<HostPid>);

impl Drop for StandIns {
    fn drop(&mut self) {
        for pid in self.0.drain(..) {
            let _ = sys::task::kill(pid, libc::SIGKILL);
            clone::reap(pid);
        }
    }
}

/// Makes a child for each of `pids`. The tree exists already, so no pid of its own is taken. They must stay until every task
/// has gone to its current directory: one of a task that is gone cannot be entered.
pub(super) fn stand_ins(pids: &[NsPid]) -> Result<StandIns, FileError> {
    let mut made = StandIns::default();
    for pid in pids.iter().copied().map(on_host) {
        match clone::stand_in(pid) {
            Ok(()) => made.0.push(pid),
            Err(Errno::EEXIST) => {
                return Err(FileError::unsupported(
                    format!(
                        "a file of /proc/{pid} is open, of a task that was gone; now another task has that pid"
                    ),
                    "restore in a pid namespace where it is free, or reboot",
                ));
            }
            Err(e) => return Err(FileError::sys("make a task with the pid of one that is gone")(e)),
        }
    }
    Ok(made)
}

/// Refuses, when all tables are known, a file that the task must open itself, but does not hold alone.
pub(super) fn check_holder(id: u32, path: &[u8], tables: &DumpTables) -> Result<(), FileError> {
    let Some(Needs::Content(pid)) = Needs::now(path) else { return Ok(()) };
    let holders: Vec<_> = tables.0.iter().filter(|table| table.fds.iter().any(|fd| fd.id == id)).collect();
    let own = match holders[..] {
        [table] => locks::process_of(table.pid)?.get() == pid,
        _ => false,
    };
    if !own {
        return Err(FileError::unsupported(
            "a file of /proc of a descriptor or mapping, which another process than that one holds",
            "let the program close it before the dump",
        ));
    }
    let root =
        std::fs::read_link(format!("/proc/{pid}/root")).map_err(|e| io_error("read a root directory", &e))?;
    if root.as_os_str() == "/" {
        return Ok(());
    }
    Err(FileError::unsupported(
        "a file of /proc of a descriptor or mapping, in a task with another root directory",
        "let the program close it before the dump",
    ))
}

/// Threads of the images, each with its process.
#[derive(Debug, Default)]
struct Tree(Option<HashMap<NsPid, NsPid>>);

/// Files that a task must open itself: id, process, path, flags, position.
#[derive(Debug, Default)]
struct ByTasks(BTreeMap<u32, (NsPid, Vec<u8>, i32, u64)>);

/// What the images know of threads.
fn tree<'c>(cx: &'c mut RestoreCx<'_>) -> Result<&'c HashMap<NsPid, NsPid>, FileError> {
    let store = cx.store;
    match &mut cx.state::<Tree>().0 {
        Some(tree) => Ok(tree),
        none => {
            let tasks: Vec<pb::PstreeEntry> = store.read_all(ImageKind::Pstree, None)?;
            let threads = tasks.iter().flat_map(|task| {
                let all = task.threads.iter().chain([&task.pid]);
                let id = |id: &u32| NsPid::new(id.cast_signed());
                all.map(move |tid| (id(tid), id(&task.pid)))
            });
            Ok(none.insert(threads.collect()))
        }
    }
}

/// Opens a file of /proc of a task: all processes and threads are there. `None`: it has to be opened as others are. What the task must open
/// itself is remembered, and any descriptor stands for it until then.
pub(super) fn open_late(
    cx: &mut RestoreCx<'_>,
    entry: &pb::RegFileEntry,
    gone: bool,
) -> Result<Option<OwnedFd>, FileError> {
    let tree = tree(cx)?;
    let Some(needs) = Needs::of(&entry.name, |tid| tree.get(&NsPid::new(tid)).map(|pid| pid.get())) else {
        return Ok(None);
    };
    let pid = NsPid::new(needs.process());
    // Whoever else has that pid by now is none of the tree's business.
    if !gone && !tree.contains_key(&pid) {
        return Err(FileError::entry(entry.id, format!("it shows process {pid}, which is not in the tree")));
    }
    if gone || !matches!(needs, Needs::Content(_)) {
        return Ok(None);
    }
    let flags = entry.flags.cast_signed() & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC);
    cx.state::<ByTasks>().0.insert(entry.id, (pid, entry.name.clone(), flags, entry.pos));
    let stand_in = OFlag::O_PATH | OFlag::O_CLOEXEC;
    open("/", stand_in, Mode::empty()).map(Some).map_err(FileError::path("open", b"/"))
}

/// Adds the calls by which process `pid` opens files of its descriptors and mappings, when its list has made `table`.
pub(super) fn plan_own(cx: &mut RestoreCx<'_>, table: &RestoreTable, pid: NsPid, list: &mut List) {
    cx.state::<ByTasks>().0.retain(|id, (of, path, flags, pos)| {
        let mut numbers = table.fds.iter().filter(|(_, fd)| fd.id == *id).peekable();
        if *of != pid || numbers.peek().is_none() {
            return true;
        }
        let name = String::from_utf8_lossy(path).into_owned();
        let at = list.cstr(path);
        let flags = *flags & !libc::O_CLOEXEC;
        let args = [libc::AT_FDCWD.into(), at.into(), flags.into(), 0u64.into()];
        let made = list.call(format!("open of {name}"), libc::SYS_openat, &args, Want::Ok);
        if *pos != 0 && flags & libc::O_PATH == 0 {
            let args = [made.into(), (*pos).into(), libc::SEEK_SET.into()];
            list.call(format!("position in {name}"), libc::SYS_lseek, &args, Want::Equal(*pos));
        }
        for (number, fd) in numbers {
            let cloexec = if fd.cloexec { libc::O_CLOEXEC } else { 0 };
            let args = [made.into(), (*number).into(), cloexec.into()];
            list.call(format!("{name} as {number}"), libc::SYS_dup3, &args, Want::Ok);
        }
        list.call("close its other number", libc::SYS_close, &[made.into()], Want::Zero);
        false
    });
}

/// A file that no task has opened.
pub(super) fn unopened(cx: &mut RestoreCx<'_>) -> Option<u32> {
    cx.state::<ByTasks>().0.keys().next().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_of_a_text_about_memory() {
        let text = |rss: &str| {
            format!("1000-2000 r--p 0 08:01 5 /bin/x\nRss:  {rss} kB\n3000-4000 rw-p 0 0:0 0\nRss:   4 k")
        };
        assert_eq!(areas(text("4").as_bytes()), b"1000-2000 3000-4000");
        assert_eq!(areas(text("8").as_bytes()), areas(text("4").as_bytes()));
        assert_eq!(areas(b"1000 default file=/bin/x mapped=3\n3000 default anon=2\n"), b"1000 3000");
    }

    #[test]
    fn what_a_path_needs() {
        for (path, want) in [
            (&b"/proc/17"[..], Some(Needs::Process(17))),
            (b"/proc/17/status", Some(Needs::Process(17))),
            (b"/proc/17/fd", Some(Needs::Process(17))),
            (b"/proc/17/fdinfo/3", Some(Needs::Content(17))),
            (b"/proc/17/fd/3", Some(Needs::Content(17))),
            (b"/proc/17/map_files/1000-2000", Some(Needs::Content(17))),
            (b"/proc/17/task", Some(Needs::Process(17))),
            (b"/proc/17/task/17/comm", Some(Needs::Process(17))),
            (b"/proc/17/task/17/fdinfo/3", Some(Needs::Content(17))),
            (b"/proc/17/task/18", Some(Needs::Thread(17, 18))),
            (b"/proc/17/task/18/comm", Some(Needs::Thread(17, 18))),
            (b"/proc/meminfo", None),
            (b"/proc/sys/kernel/ostype", None),
            (b"/home/17/task/18", None),
        ] {
            assert_eq!(needs(path), want, "{}", String::from_utf8_lossy(path));
        }
    }
}
