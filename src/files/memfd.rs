//! memfd_create(2): a file of memory with a name, and perhaps seals.
//!
//! Saved: name, size, owner, mode, seals and page size of every such file once (`memfd.img`); per description its flags and
//! position. The content is an object of shared memory (`pagemap-shmem-N.img`), since tasks may have it mapped too.
//! Seals come last, when the tasks have their mappings: some forbid what restoring needs.
//!
//! The description that memfd_create gives is open for writing, but the kernel does not count it as a writer, so the file can
//! be executed while it is open; one that was opened through /proc is counted. So the first writable description of a file is
//! the one that memfd_create gives at restore, unless the dump has seen that it was another.

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
    ffi::{CStr, CString},
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::OnceLock,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fchmod, fstat},
    unistd::{Gid, Uid, Whence, fchown, ftruncate, lseek},
};

use super::{
    DumpCx, DumpTables, FdView, FileError, FileKind, FilesDump, Opened, Place, RestoreCx, flags,
    kind::packed_in, pipe_data::io_error,
};
use crate::{
    image::{ImageKind, Store, TypedStore, pb},
    mem::SharedMemory,
    pages::{Pages, fill::Object},
    sys::{Errno, event, lease},
    view,
};

const PREFIX: &[u8] = b"/memfd:";
const DELETED: &[u8] = b" (deleted)";
const FLAGS_OF_OPEN: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_LARGEFILE | libc::O_PATH;
/// Seal: nobody can make it executable, or take that away (Linux 6.3).
const F_SEAL_EXEC: u32 = 0x20;
/// Flags of memfd_create: it cannot be executed and has that seal; it can be (Linux 6.3).
const MFD_NOEXEC_SEAL: u32 = 0x8;
const MFD_EXEC: u32 = 0x10;

/// A description of a memory file.
#[derive(Debug)]
pub(super) struct Memfd;

#[derive(Debug, Default)]
struct Dumped {
    by_inode: HashMap<(u64, u64), u32>,
    entries: Vec<pb::MemfdInodeEntry>,
    /// Files that have writers which the kernel counts.
    counted: HashSet<u32>,
    /// How many writable descriptions of a file were met.
    writable: HashMap<u32, usize>,
}

#[derive(Debug)]
struct Made {
    /// What memfd_create gave; not counted as a writer.
    original: OwnedFd,
    /// An entry has it.
    taken: bool,
    seals: u32,
}

#[derive(Debug, Default)]
struct Restored {
    entries: Option<BTreeMap<u64, pb::MemfdInodeEntry>>,
    made: BTreeMap<u64, Made>,
}

impl FileKind for Memfd {
    type Entry = pb::MemfdFileEntry;
    const NAME: &'static str = "memfd";
    const TYPE: pb::FdTypes = pb::FdTypes::Memfd;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.link.starts_with(PREFIX)
            && fd.link.ends_with(DELETED)
            && fd.stat.kind() == libc::S_IFREG
            && fd.stat.nlink == 0
            && kernel_mounts().iter().any(|(dev, _)| *dev == fd.stat.dev)
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let key = (fd.stat.dev, fd.stat.ino);
        let inode_id = match cx.state::<Dumped>().by_inode.get(&key) {
            Some(id) => *id,
            None => {
                let (inode, counted) = inode(cx, fd)?;
                let dumped = cx.state::<Dumped>();
                let inode_id = u32::try_from(dumped.entries.len() + 1)
                    .map_err(|_| FileError::unsupported("there are too many memory files", ""))?;
                if counted {
                    dumped.counted.insert(inode_id);
                }
                dumped.entries.push(pb::MemfdInodeEntry { inode_id: u64::from(inode_id), ..inode });
                dumped.by_inode.insert(key, inode_id);
                inode_id
            }
        };
        if fd.fd >= 0 && is_writable(fd.flags()) {
            *cx.state::<Dumped>().writable.entry(inode_id).or_default() += 1;
        }
        let pos = u64::try_from(fd.info.pos).unwrap_or(0);
        Ok(pb::MemfdFileEntry { id, flags: fd.flags(), pos, fown: fd.fown()?, inode_id, reopened: None })
    }

    fn complete(
        cx: &mut DumpCx<'_>,
        _tables: &DumpTables,
        entry: &mut Self::Entry,
        _at: Place,
    ) -> Result<(), FileError> {
        let dumped = cx.state::<Dumped>();
        // With several it cannot be told which of them it is.
        let alone = dumped.writable.get(&entry.inode_id) == Some(&1);
        if alone && is_writable(entry.flags) && dumped.counted.contains(&entry.inode_id) {
            entry.reopened = Some(true);
        }
        Ok(())
    }

    fn finish_dump(cx: &mut DumpCx<'_>) -> Result<(), FileError> {
        let entries = std::mem::take(&mut cx.state::<Dumped>().entries);
        if !entries.is_empty() {
            cx.store.write_all(ImageKind::MemfdInode, None, &entries)?;
        }
        Ok(())
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        let (store, key) = (cx.store, u64::from(entry.inode_id));
        let in_table = cx.in_tables.contains(&entry.id);
        let state = cx.state::<Restored>();
        let inodes = match &mut state.entries {
            Some(inodes) => inodes,
            none => none.insert(read(store)?),
        };
        let made = match state.made.entry(key) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(place) => {
                let inode = inodes
                    .remove(&key)
                    .ok_or_else(|| FileError::entry(entry.id, format!("there is no memory file {key}")))?;
                place.insert(make(store, &inode)?)
            }
        };
        let flags = entry.flags.cast_signed() & FLAGS_OF_OPEN;
        let as_made =
            flags & (libc::O_ACCMODE | libc::O_PATH) == libc::O_RDWR && entry.reopened != Some(true);
        let fd = if as_made && (!in_table || !made.taken) {
            let fd = made.original.try_clone().map_err(|e| io_error("duplicate a memory file", &e))?;
            if made.taken {
                // A mapping needs the description only; it is as an entry before has left it.
                return Ok(Opened::Now(fd));
            }
            made.taken = in_table;
            flags::apply(&fd, entry.flags)?;
            fd
        } else {
            view::reopen(made.original.as_fd(), OFlag::from_bits_retain(flags))
                .map_err(FileError::sys("open a memory file"))?
        };
        if flags & libc::O_PATH == 0 {
            let pos = i64::try_from(entry.pos)
                .map_err(|_| FileError::entry(entry.id, "its position is no file offset"))?;
            lseek(&fd, pos, Whence::SeekSet).map_err(FileError::sys("set the position in a memory file"))?;
        }
        Ok(Opened::Now(fd))
    }

    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError> {
        let inodes = cx.state::<Restored>().entries.as_ref();
        let Some(inode) = inodes.and_then(|inodes| inodes.get(&u64::from(entry.inode_id))) else {
            return Ok(());
        };
        // An empty one, which nobody else can see.
        make_empty(inode).map(drop)
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        _entry: &Self::Entry,
        _fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        // The first of the kind does it for all files.
        for made in std::mem::take(&mut cx.state::<Restored>().made).into_values() {
            if made.seals != 0 {
                event::add_seals(made.original.as_fd(), made.seals)
                    .map_err(FileError::sys("seal a memory file (F_ADD_SEALS)"))?;
            }
        }
        Ok(())
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(memfd);
}

impl FilesDump<'_> {
    /// Where the content of memory files goes; the same collection that takes the mapped ones. Before the first table.
    pub fn set_shared_memory(&mut self, shared: SharedMemory) {
        *self.cx.state::<SharedMemory>() = shared;
    }
}

/// Devices of the kernel's own mounts for memory files and for shared memory, with the flags that lead to each.
pub(super) fn kernel_mounts() -> &'static [(u64, u32)] {
    static MOUNTS: OnceLock<Vec<(u64, u32)>> = OnceLock::new();
    MOUNTS.get_or_init(|| {
        let sizes = [21, 30].map(|log| libc::MFD_HUGETLB | log << libc::MFD_HUGE_SHIFT);
        [0].into_iter()
            .chain(sizes)
            .filter_map(|flags| {
                let fd = event::memfd(c"crtool", flags | libc::MFD_CLOEXEC).ok()?;
                Some((fstat(&fd).ok()?.st_dev, flags))
            })
            .collect()
    })
}

fn is_writable(flags: u32) -> bool {
    let flags = flags.cast_signed();
    flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// The entry of a memory file, but for its id.
///
/// Also whether it has writers which the kernel counts.
fn inode(cx: &mut DumpCx<'_>, fd: &FdView<'_>) -> Result<(pb::MemfdInodeEntry, bool), FileError> {
    // A view of a mapping may hold no more than O_PATH; the inode is the same.
    let path = format!("/proc/self/fd/{}", fd.file()?.as_raw_fd());
    let file = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(FileError::sys("open a memory file to read it"))?;
    // The answer is a guess at a running tree, for which nobody has use. Where the kernel gives none, it is as memfd_create
    // leaves it.
    let counted = cx.frozen && lease::is_open_for_writing(file.as_fd()).unwrap_or(false);
    let seals = event::seals(file.as_fd()).map_err(FileError::sys("read the seals (F_GET_SEALS)"))?;
    let shmid = cx
        .state::<SharedMemory>()
        .object(&file)
        .map_err(|e| FileError::unsupported(format!("its content cannot be read: {e}"), ""))?;
    let name = fd
        .link
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_suffix(DELETED))
        .ok_or(FileError::unsupported("it has no name", ""))?;
    let huge = kernel_mounts().iter().find(|(dev, _)| *dev == fd.stat.dev).map_or(0, |(_, flags)| *flags);
    let entry = pb::MemfdInodeEntry {
        name: name.to_vec(),
        uid: fd.stat.uid,
        gid: fd.stat.gid,
        size: fd.stat.size,
        shmid,
        seals,
        inode_id: 0,
        hugetlb_flag: (huge != 0).then_some(huge),
        mode: Some(fd.stat.mode & 0o7777),
    };
    Ok((entry, counted))
}

fn read(store: &dyn Store) -> Result<BTreeMap<u64, pb::MemfdInodeEntry>, FileError> {
    let entries: Vec<pb::MemfdInodeEntry> = store.read_all(ImageKind::MemfdInode, None)?;
    Ok(entries.into_iter().map(|entry| (entry.inode_id, entry)).collect())
}

/// Tells a restore that is only tried what the dump has met.
pub(super) fn hand_over(from: &mut DumpCx<'_>, to: &mut RestoreCx<'_>) {
    let entries = from.state::<Dumped>().entries.iter();
    to.state::<Restored>().entries = Some(entries.map(|entry| (entry.inode_id, entry.clone())).collect());
}

fn bad(inode: &pb::MemfdInodeEntry, what: String) -> FileError {
    FileError::entry(u32::try_from(inode.inode_id).unwrap_or(u32::MAX), what)
}

/// Makes a memory file, without content.
fn make_empty(inode: &pb::MemfdInodeEntry) -> Result<OwnedFd, FileError> {
    let name = CString::new(&inode.name[..]).map_err(|_| bad(inode, "its name holds a NUL byte".into()))?;
    let huge = inode.hugetlb_flag.unwrap_or(0);
    let allowed = libc::MFD_HUGETLB | libc::MFD_HUGE_MASK << libc::MFD_HUGE_SHIFT;
    if huge & !allowed != 0 {
        return Err(bad(inode, format!("unknown flags {huge:#x}")));
    }
    create(&name, inode, huge)
}

/// Makes a memory file with its content, not sealed yet.
fn make(store: &dyn Store, inode: &pb::MemfdInodeEntry) -> Result<Made, FileError> {
    let file = make_empty(inode)?;
    let size = i64::try_from(inode.size).map_err(|_| bad(inode, "its size is no file size".into()))?;
    ftruncate(&file, size).map_err(FileError::sys("set the size of a memory file"))?;
    let file = File::from(file);
    fill(store, inode, &file)?;
    let file = OwnedFd::from(file);
    fchown(&file, Some(Uid::from_raw(inode.uid)), Some(Gid::from_raw(inode.gid)))
        .map_err(FileError::sys("set the owner of a memory file"))?;
    if let Some(mode) = inode.mode {
        fchmod(&file, Mode::from_bits_truncate(mode))
            .map_err(FileError::sys("set the mode of a memory file"))?;
    }
    Ok(Made { original: file, taken: false, seals: inode.seals })
}

/// memfd_create as the file needs it: whether it can be executed is decided there.
fn create(name: &CStr, inode: &pb::MemfdInodeEntry, huge: u32) -> Result<OwnedFd, FileError> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    let how =
        if inode.seals & F_SEAL_EXEC != 0 && inode.mode() & 0o111 == 0 { MFD_NOEXEC_SEAL } else { MFD_EXEC };
    match event::memfd(name, flags | how) {
        // Before Linux 6.3 there was no choice.
        Err(Errno::EINVAL) => event::memfd(name, flags).map_err(FileError::sys("make a memory file")),
        Err(Errno::EACCES) => Err(FileError::unsupported(
            "memory files that can be executed are forbidden here",
            "sysctl vm.memfd_noexec=1 or 0 allows them",
        )),
        made => made.map_err(FileError::sys("make a memory file")),
    }
}

/// Copies the pages of the object into the file.
fn fill(store: &dyn Store, inode: &pb::MemfdInodeEntry, file: &File) -> Result<(), FileError> {
    let content = |source| FileError::Content { shmid: inode.shmid, source };
    let Some(pages) = Pages::read(store, ImageKind::ShmemPagemap, u64::from(inode.shmid)).map_err(content)?
    else {
        return match inode.size {
            0 => Ok(()),
            _ => Err(FileError::entry(inode.shmid, "the content of a memory file is missing")),
        };
    };
    let object = Object { shmid: inode.shmid, file, size: inode.size };
    crate::pages::fill::fill(object, &pages).map_err(content)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::trial::Trial;
    use super::*;
    use crate::{mem::MemoryDump, stats::DumpStats};

    fn memfd(name: &std::ffi::CStr, flags: u32) -> OwnedFd {
        event::memfd(name, libc::MFD_CLOEXEC | flags).unwrap()
    }

    /// Dumps the descriptions, the file and its content; makes all again.
    fn again(fds: &[&OwnedFd]) -> Vec<OwnedFd> {
        let shared = SharedMemory::new();
        let mut trial = Trial::new();
        trial.set_state(shared.clone());
        let entries: Vec<_> = fds.iter().map(|fd| trial.dump::<Memfd>(fd)).collect();
        trial.finish::<Memfd>().unwrap();
        MemoryDump::new(&trial.store).shared(&shared, &mut DumpStats::default()).unwrap();
        trial.try_restore::<Memfd>(&entries.iter().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn descriptions_content_and_seals() {
        let name = c"a name (deleted) \n\xff";
        let file = memfd(name, libc::MFD_ALLOW_SEALING);
        let content: Vec<u8> = (0..3_000_005u32).map(|i| (i % 253) as u8).collect();
        let mut file = File::from(file);
        std::io::Write::write_all(&mut file, &content).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(b"end", (1 << 30) - 3).unwrap();
        let file = OwnedFd::from(file);
        fchmod(&file, Mode::from_bits_truncate(0o640)).unwrap();
        fchown(&file, Some(Uid::from_raw(7)), Some(Gid::from_raw(8))).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let other = open(path.as_str(), flags, Mode::empty()).unwrap();
        lseek(&other, 3, Whence::SeekSet).unwrap();
        let seals = (libc::F_SEAL_SHRINK | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL).cast_unsigned();
        event::add_seals(file.as_fd(), seals).unwrap();

        let made = again(&[&file, &other]);
        let [one, two] = &made[..] else { panic!() };
        let stat = fstat(one).unwrap();
        assert_eq!((stat.st_mode & 0o7777, stat.st_uid, stat.st_gid, stat.st_size), (0o640, 7, 8, 1 << 30));
        assert_eq!(stat.st_ino, fstat(two).unwrap().st_ino);
        assert!(stat.st_blocks < 10_000, "holes were filled: {} blocks", stat.st_blocks);
        assert_eq!(event::seals(two.as_fd()).unwrap(), seals);
        let mut trial = Trial::new();
        let (first, second) = (trial.dump::<Memfd>(one), trial.dump::<Memfd>(two));
        assert_eq!((first.pos, second.pos), (3_000_005, 3));
        assert_eq!(second.flags & 0o4003, libc::O_NONBLOCK.cast_unsigned());
        assert_eq!(first.flags, 0o100_002);
        let mut found = vec![0; content.len()];
        let file = File::from(one.try_clone().unwrap());
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == content);
        file.read_exact_at(&mut found[..3], (1 << 30) - 3).unwrap();
        assert_eq!(&found[..3], b"end");
        let link = nix::fcntl::readlink(format!("/proc/self/fd/{}", one.as_raw_fd()).as_str()).unwrap();
        let want = [PREFIX, name.to_bytes(), DELETED].concat();
        assert_eq!(std::os::unix::ffi::OsStrExt::as_bytes(link.as_os_str()), want);
    }

    /// Runs the program in the file behind a descriptor of ours.
    fn runs(fd: &OwnedFd) -> std::io::Result<()> {
        let path = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        std::process::Command::new(path).spawn()?.wait().map(drop)
    }

    fn reopened(fd: &OwnedFd, flags: OFlag) -> OwnedFd {
        view::reopen(fd.as_fd(), flags).unwrap()
    }

    /// Dumps and restores descriptors of ours, in a table, with the contents of memory files.
    fn cycle(fds: Vec<OwnedFd>) -> Vec<OwnedFd> {
        let cycle = super::super::tests::Cycle::new();
        let shared = SharedMemory::new();
        let numbers: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        assert_eq!(cycle.dump_with(&fds.iter().collect::<Vec<_>>(), Some(shared.clone())).unwrap(), []);
        MemoryDump::new(&cycle.store).shared(&shared, &mut DumpStats::default()).unwrap();
        drop(fds);
        let mut again = cycle.restore().unwrap();
        numbers.iter().map(|number| again.remove(number).unwrap()).collect()
    }

    #[test]
    fn programs() {
        let busy = |fd: &OwnedFd| runs(fd).unwrap_err().raw_os_error() == Some(libc::ETXTBSY);
        let make = || {
            let file = memfd(c"prog", 0);
            std::io::Write::write_all(&mut File::from(file.try_clone().unwrap()), b"#!/bin/true").unwrap();
            file
        };
        // As it was made, alone, with readers, and with paths.
        for others in
            [vec![], vec![OFlag::O_RDONLY], vec![OFlag::O_PATH], vec![OFlag::O_PATH, OFlag::O_RDONLY]]
        {
            let file = make();
            let mut fds: Vec<OwnedFd> = others.iter().map(|flags| reopened(&file, *flags)).collect();
            fds.push(file);
            fds.iter().for_each(|fd| runs(fd).unwrap());
            let again = cycle(fds);
            again.iter().for_each(|fd| runs(fd).unwrap());
            let again = cycle(again);
            again.iter().for_each(|fd| runs(fd).unwrap());
            let inode = |fd: &OwnedFd| fstat(fd).unwrap().st_ino;
            assert!(again.iter().all(|fd| inode(fd) == inode(&again[0])));
        }
        // Only readers are left.
        let file = make();
        let reader = reopened(&file, OFlag::O_RDONLY);
        drop(file);
        runs(&cycle(vec![reader])[0]).unwrap();
        // A writer that is counted keeps it from running, alone or beside the first.
        let file = make();
        let writer = reopened(&file, OFlag::O_RDWR);
        let mut again = cycle(vec![file, writer]);
        assert!(busy(&again[0]) && busy(&again[1]));
        again.truncate(1);
        runs(&again[0]).unwrap();
        let file = make();
        let (writer, reader) = (reopened(&file, OFlag::O_RDWR), reopened(&file, OFlag::O_RDONLY));
        drop(file);
        assert!(busy(&reader));
        let again = cycle(vec![writer, reader]);
        assert!(busy(&again[1]));
        drop(again.into_iter().next());
    }

    #[test]
    fn programs_that_cannot_be() {
        let Ok(file) = event::memfd(c"data", libc::MFD_CLOEXEC | MFD_NOEXEC_SEAL) else {
            eprintln!("skipped: before Linux 6.3");
            return;
        };
        let (mode, seals) = (fstat(&file).unwrap().st_mode & 0o7777, event::seals(file.as_fd()).unwrap());
        assert_eq!((mode, seals), (0o666, F_SEAL_EXEC));
        let again = cycle(vec![file]).remove(0);
        assert_eq!((fstat(&again).unwrap().st_mode & 0o7777, event::seals(again.as_fd())), (mode, Ok(seals)));
        assert!(fchmod(&again, Mode::from_bits_truncate(0o777)).is_err());
        // Can be executed, for good, so it cannot be written.
        let file = event::memfd(c"prog", libc::MFD_CLOEXEC | MFD_EXEC | libc::MFD_ALLOW_SEALING).unwrap();
        std::io::Write::write_all(&mut File::from(file.try_clone().unwrap()), b"#!/bin/true").unwrap();
        event::add_seals(file.as_fd(), F_SEAL_EXEC).unwrap();
        let seals = event::seals(file.as_fd());
        let again = cycle(vec![file]).remove(0);
        assert_eq!(event::seals(again.as_fd()), seals);
        runs(&again).unwrap();
    }

    #[test]
    fn not_sealable_and_empty() {
        let file = memfd(c"", 0);
        let made = again(&[&file]);
        assert_eq!(event::seals(made[0].as_fd()).unwrap(), libc::F_SEAL_SEAL.cast_unsigned());
        assert_eq!(fstat(&made[0]).unwrap().st_size, 0);
    }

    #[test]
    fn deleted_files_with_such_a_name_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memfd:x");
        let file = OwnedFd::from(File::create(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        super::super::testing::with_view(&file, |view| {
            let view = FdView {
                link: b"/memfd:x (deleted)",
                pid: view.pid,
                fd: view.fd,
                info: view.info,
                stat: view.stat,
                source: super::super::fd_view::Source::Ours(file.as_fd()),
                fetched: std::cell::OnceCell::new(),
            };
            assert!(!Memfd::owns(&view));
        });
    }

    #[test]
    fn pages_behind_the_end_are_refused() {
        let file = memfd(c"x", 0);
        File::from(file.try_clone().unwrap()).write_all_at(&[1; 9000], 0).unwrap();
        let shared = SharedMemory::new();
        let mut trial = Trial::new();
        trial.set_state(shared.clone());
        let entry = trial.dump::<Memfd>(&file);
        trial.finish::<Memfd>().unwrap();
        MemoryDump::new(&trial.store).shared(&shared, &mut DumpStats::default()).unwrap();
        let mut inode: pb::MemfdInodeEntry = trial.store.need_one(ImageKind::MemfdInode, None).unwrap();
        inode.size = 4096;
        trial.store.write_one(ImageKind::MemfdInode, None, &inode).unwrap();
        let error = trial.try_restore::<Memfd>(&[&entry]).unwrap_err();
        let error = format!("{:#}", anyhow::Error::from(error));
        assert!(error.contains("content of memory file ") && error.contains("behind the end"), "{error}");
    }
}
