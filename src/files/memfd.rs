//! memfd_create(2): a file of memory with a name, and perhaps seals.
//!
//! Saved: name, size, owner, mode, seals and page size of every such file once (`memfd.img`); per description its flags and
//! position. The content is an object of shared memory (`pagemap-shmem-N.img`), since tasks may have it mapped too.
//! Seals come last, when the tasks have their mappings: some forbid what restoring needs.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    ffi::CString,
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::OnceLock,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fchmod, fstat},
    unistd::{Gid, Uid, Whence, fchown, ftruncate, lseek},
};

use super::{DumpCx, FdView, FileError, FileKind, FilesDump, Opened, RestoreCx, kind::packed_in};
use crate::{
    image::{ImageKind, Store, TypedStore, pb},
    mem::SharedMemory,
    pages::{Pages, fill::Object},
    sys::event,
};

const PREFIX: &[u8] = b"/memfd:";
const DELETED: &[u8] = b" (deleted)";
const FLAGS_OF_OPEN: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_LARGEFILE;

/// A description of a memory file.
#[derive(Debug)]
pub(super) struct Memfd;

#[derive(Debug, Default)]
struct Dumped {
    by_inode: HashMap<(u64, u64), u32>,
    entries: Vec<pb::MemfdInodeEntry>,
}

#[derive(Debug)]
struct Made {
    file: OwnedFd,
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
            && (fd.fd < 0 || fd.flags() & libc::O_PATH.cast_unsigned() == 0)
            && kernel_mounts().iter().any(|(dev, _)| *dev == fd.stat.dev)
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let key = (fd.stat.dev, fd.stat.ino);
        let inode_id = match cx.state::<Dumped>().by_inode.get(&key) {
            Some(id) => *id,
            None => {
                let inode = inode(cx, fd)?;
                let dumped = cx.state::<Dumped>();
                let inode_id = u32::try_from(dumped.entries.len() + 1)
                    .map_err(|_| FileError::unsupported("there are too many memory files", ""))?;
                dumped.entries.push(pb::MemfdInodeEntry { inode_id: u64::from(inode_id), ..inode });
                dumped.by_inode.insert(key, inode_id);
                inode_id
            }
        };
        let pos = u64::try_from(fd.info.pos).unwrap_or(0);
        Ok(pb::MemfdFileEntry { id, flags: fd.flags(), pos, fown: fd.fown()?, inode_id })
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
        let flags = OFlag::from_bits_retain(entry.flags.cast_signed() & FLAGS_OF_OPEN) | OFlag::O_CLOEXEC;
        let path = format!("/proc/self/fd/{}", made.file.as_raw_fd());
        let fd = open(path.as_str(), flags, Mode::empty()).map_err(FileError::sys("open a memory file"))?;
        if entry.pos != 0 {
            let pos = i64::try_from(entry.pos)
                .map_err(|_| FileError::entry(entry.id, "its position is no file offset"))?;
            lseek(&fd, pos, Whence::SeekSet).map_err(FileError::sys("set the position in a memory file"))?;
        }
        Ok(Opened::Now(fd))
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        _entry: &Self::Entry,
        _fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        // The first of the kind does it for all files.
        for made in std::mem::take(&mut cx.state::<Restored>().made).into_values() {
            if made.seals != 0 {
                event::add_seals(made.file.as_fd(), made.seals)
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

/// The entry of a memory file, but for its id.
fn inode(cx: &mut DumpCx<'_>, fd: &FdView<'_>) -> Result<pb::MemfdInodeEntry, FileError> {
    // A view of a mapping may hold no more than O_PATH; the inode is the same.
    let path = format!("/proc/self/fd/{}", fd.file()?.as_raw_fd());
    let file = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(FileError::sys("open a memory file to read it"))?;
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
    Ok(pb::MemfdInodeEntry {
        name: name.to_vec(),
        uid: fd.stat.uid,
        gid: fd.stat.gid,
        size: fd.stat.size,
        shmid,
        seals,
        inode_id: 0,
        hugetlb_flag: (huge != 0).then_some(huge),
        mode: Some(fd.stat.mode & 0o7777),
    })
}

fn read(store: &dyn Store) -> Result<BTreeMap<u64, pb::MemfdInodeEntry>, FileError> {
    let entries: Vec<pb::MemfdInodeEntry> = store.read_all(ImageKind::MemfdInode, None)?;
    Ok(entries.into_iter().map(|entry| (entry.inode_id, entry)).collect())
}

/// Makes a memory file with its content, not sealed yet.
fn make(store: &dyn Store, inode: &pb::MemfdInodeEntry) -> Result<Made, FileError> {
    let bad = |what: String| FileError::entry(u32::try_from(inode.inode_id).unwrap_or(u32::MAX), what);
    let name = CString::new(&inode.name[..]).map_err(|_| bad("its name holds a NUL byte".into()))?;
    let huge = inode.hugetlb_flag.unwrap_or(0);
    let allowed = libc::MFD_HUGETLB | libc::MFD_HUGE_MASK << libc::MFD_HUGE_SHIFT;
    if huge & !allowed != 0 {
        return Err(bad(format!("unknown flags {huge:#x}")));
    }
    let file = event::memfd(&name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge)
        .map_err(FileError::sys("make a memory file"))?;
    let size = i64::try_from(inode.size).map_err(|_| bad("its size is no file size".into()))?;
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
    Ok(Made { file, seals: inode.seals })
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
