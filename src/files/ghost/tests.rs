//! Ghosts through the whole of dump and restore, on the file system of the temporary directory and on tmpfs.

use std::{
    ffi::CString,
    fs::{self, File, Permissions},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, PermissionsExt, chown},
        },
    },
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags, FcntlArg, fcntl, open},
    sys::stat::fstat,
    unistd::linkat,
};

use super::{super::tests::Cycle, *};
use crate::sys::{inode, xattr};

/// Directories on different file systems.
fn places() -> Vec<tempfile::TempDir> {
    let shm = Path::new("/dev/shm").is_dir().then(|| tempfile::tempdir_in("/dev/shm").unwrap());
    std::iter::once(tempfile::tempdir().unwrap()).chain(shm).collect()
}

fn magic(fd: &OwnedFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

fn create(path: &Path) -> OwnedFd {
    File::options().read(true).write(true).create_new(true).open(path).unwrap().into()
}

fn cycled(mut cycle: Cycle, fd: OwnedFd) -> OwnedFd {
    cycle.dump.ghost_limit = 1 << 30;
    cycle.run(vec![fd], || {}).remove(0)
}

#[test]
fn extended_attributes_and_access_lists() {
    let mut tried = 0;
    for dir in places() {
        let path = dir.path().join("f");
        let fd = create(&path);
        let at = CString::new(path.as_os_str().as_bytes()).unwrap();
        // Version 2; user r-x, user 1000 rwx, group r--, mask rwx, others ---.
        let list: Vec<u8> = [2u32.to_le_bytes().to_vec()]
            .into_iter()
            .chain(
                [
                    (1u16, 5u16, u32::MAX),
                    (2, 7, 1000),
                    (4, 4, u32::MAX),
                    (16, 7, u32::MAX),
                    (32, 0, u32::MAX),
                ]
                .map(|(tag, access, id)| {
                    [&tag.to_le_bytes()[..], &access.to_le_bytes(), &id.to_le_bytes()].concat()
                }),
            )
            .flatten()
            .collect();
        let wanted: [(&std::ffi::CStr, &[u8]); 4] = [
            (c"user.crtool.one", b"value\0with NUL"),
            (c"user.crtool.empty", b""),
            (c"trusted.crtool", &[7; 300]),
            (c"system.posix_acl_access", &list),
        ];
        let set: Vec<_> =
            wanted.into_iter().filter(|(name, value)| xattr::set(&at, name, value).is_ok()).collect();
        tried += set.len();
        fs::remove_file(&path).unwrap();
        let mode = fstat(&fd).unwrap().st_mode;
        let again = cycled(Cycle::new(), fd);
        for (name, value) in set {
            assert_eq!(xattr::get(&magic(&again), name).as_deref(), Ok(value), "{name:?} in {dir:?}");
        }
        assert_eq!(fstat(&again).unwrap().st_mode, mode);
    }
    assert!(tried >= 3 || !nix::unistd::Uid::effective().is_root(), "{tried}");
}

/// Owner, set-id bits, capabilities (which a change of the owner removes), times to the nanosecond.
#[test]
fn what_depends_on_the_order() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    for dir in places() {
        let path = dir.path().join("f");
        let fd = create(&path);
        chown(&path, Some(12), Some(34)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o6755)).unwrap();
        let at = CString::new(path.as_os_str().as_bytes()).unwrap();
        // struct vfs_cap_data, version 2: CAP_NET_RAW permitted and effective.
        let capability: Vec<u8> =
            [0x0200_0001u32, 1 << 13, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        let capable = xattr::set(&at, c"security.capability", &capability).is_ok();
        let file = File::from(fd);
        let times = fs::FileTimes::new()
            .set_accessed(UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789))
            .set_modified(UNIX_EPOCH + Duration::new(2_000_000_000, 987_654_321));
        file.set_times(times).unwrap();
        fs::remove_file(&path).unwrap();
        let again = cycled(Cycle::new(), file.into());
        let stat = fstat(&again).unwrap();
        assert_eq!((stat.st_uid, stat.st_gid, stat.st_mode & 0o7777), (12, 34, 0o6755));
        assert_eq!((stat.st_atime, stat.st_atime_nsec), (1_000_000_000, 123_456_789));
        assert_eq!((stat.st_mtime, stat.st_mtime_nsec), (2_000_000_000, 987_654_321));
        if capable {
            assert_eq!(xattr::get(&magic(&again), c"security.capability"), Ok(capability));
        }
    }
}

/// Flags that forbid what restoring does: they come last.
#[test]
fn attribute_flags() {
    let mut tried = 0;
    for dir in places() {
        for flag in [inode::APPEND, inode::IMMUTABLE, 0x40 | 0x80] {
            let path = dir.path().join(format!("f{flag}"));
            let fd = create(&path);
            nix::unistd::write(&fd, b"content").unwrap();
            fs::remove_file(&path).unwrap();
            let Ok(before) = inode::flags(fd.as_fd()) else { continue };
            if inode::set_flags(fd.as_fd(), before | flag).is_err() {
                continue;
            }
            tried += 1;
            let writes = |fd: &OwnedFd| nix::sys::uio::pwrite(fd, b"x", 0).is_ok();
            let could_write = writes(&fd);
            let again = cycled(Cycle::new(), fd);
            assert_eq!(inode::flags(again.as_fd()).unwrap() & flag, flag, "{dir:?}");
            let mut found = [0; 20];
            assert_eq!(File::from(again.try_clone().unwrap()).read_at(&mut found, 0).unwrap(), 7);
            assert_eq!(writes(&again), could_write, "{flag:#x} in {dir:?}");
        }
    }
    assert!(tried > 0 || !nix::unistd::Uid::effective().is_root());
}

#[test]
fn a_nameless_file_can_be_given_a_name() {
    for dir in places() {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let Ok(fd) = open(dir.path(), flags, Mode::from_bits_retain(0o640)) else { continue };
        nix::unistd::write(&fd, b"nameless").unwrap();
        let cycle = Cycle::new();
        let numbers = fd.as_raw_fd();
        let reader = view::reopen(fd.as_fd(), OFlag::O_RDONLY).unwrap();
        let before = fcntl(&fd, FcntlArg::F_GETFL).unwrap();
        assert_eq!(cycle.dump(&[&reader, &fd]).unwrap(), []);
        let reader_number = reader.as_raw_fd();
        drop((fd, reader));
        let mut again = cycle.restore().unwrap();
        let (fd, reader) = (again.remove(&numbers).unwrap(), again.remove(&reader_number).unwrap());
        assert_eq!(fstat(&fd).unwrap().st_ino, fstat(&reader).unwrap().st_ino);
        assert_eq!(fcntl(&fd, FcntlArg::F_GETFL).unwrap(), before, "O_TMPFILE shows in the flags");
        assert_eq!((fstat(&fd).unwrap().st_nlink, fstat(&fd).unwrap().st_mode & 0o777), (0, 0o640));
        nix::unistd::write(&fd, b"!").unwrap();
        let name = dir.path().join("named");
        linkat(AT_FDCWD, &*magic(&reader), AT_FDCWD, &name, AtFlags::AT_SYMLINK_FOLLOW).unwrap();
        assert_eq!(fs::read(&name).unwrap(), b"nameless!");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

/// The same file under two names, both gone.
#[test]
fn two_names_of_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let first = create(&one);
    fs::hard_link(&one, &two).unwrap();
    let second: OwnedFd = File::open(&two).unwrap().into();
    nix::unistd::write(&first, b"same").unwrap();
    fs::remove_file(one).unwrap();
    fs::remove_file(two).unwrap();
    let cycle = Cycle::new();
    let numbers = (first.as_raw_fd(), second.as_raw_fd());
    assert_eq!(cycle.dump(&[&first, &second]).unwrap(), []);
    drop((first, second));
    let again = cycle.restore().unwrap();
    let (first, second) = (&again[&numbers.0], &again[&numbers.1]);
    assert_eq!(fstat(first).unwrap().st_ino, fstat(second).unwrap().st_ino);
    nix::unistd::write(first, b"d").unwrap();
    let mut found = [0; 9];
    assert_eq!(nix::unistd::read(second, &mut found), Ok(5));
    assert_eq!(&found[..5], b"samed");
}

/// With and without FIEMAP: the same content, and holes that stay holes.
#[test]
fn sparse_files() {
    for dir in places() {
        for fiemap in [true, false] {
            let path = dir.path().join(format!("f{fiemap}"));
            let file = File::from(create(&path));
            let size = 1 << 30;
            file.set_len(size).unwrap();
            // More parts than one call of FIEMAP tells; not all on the borders of pages.
            let places: Vec<u64> = (0..400).map(|n| n * 2_500_003).collect();
            for (n, place) in places.iter().enumerate() {
                file.write_all_at(&[n as u8 | 1; 5000], *place).unwrap();
            }
            file.write_all_at(b"end", size - 3).unwrap();
            // Allocated, and never written.
            let allocated =
                nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 1 << 29, 1 << 20);
            fs::remove_file(&path).unwrap();
            let blocks = file.metadata().unwrap().blocks();
            let mut cycle = Cycle::new();
            cycle.dump.ghost_fiemap = fiemap;
            let again = File::from(cycled(cycle, file.into()));
            assert_eq!(again.metadata().unwrap().len(), size);
            assert!(again.metadata().unwrap().blocks() <= blocks + 64, "{dir:?} {allocated:?}");
            let mut found = [0; 5002];
            for (n, place) in places.iter().enumerate().skip(1) {
                again.read_exact_at(&mut found, place - 1).unwrap();
                assert_eq!((found[0], found[5001]), (0, 0));
                assert!(found[1..5001].iter().all(|byte| *byte == n as u8 | 1), "part {n} in {dir:?}");
            }
            again.read_exact_at(&mut found[..3], size - 3).unwrap();
            assert_eq!(&found[..3], b"end");
        }
    }
}

#[test]
fn a_program_that_was_deleted_can_be_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prog");
    fs::copy("/bin/true", &path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    let fd: OwnedFd = File::open(&path).unwrap().into();
    fs::remove_file(&path).unwrap();
    let again = cycled(Cycle::new(), fd);
    let run = format!("/proc/{}/fd/{}", std::process::id(), again.as_raw_fd());
    assert!(std::process::Command::new(run).status().unwrap().success());
}

#[test]
fn crafted_content_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let file = File::from(create(&path));
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"x", 1 << 19).unwrap();
    fs::remove_file(&path).unwrap();
    let cycle = Cycle::new();
    let fd = OwnedFd::from(file);
    assert_eq!(cycle.dump(&[&fd]).unwrap(), []);
    drop(fd);
    let mut image = cycle.store.open(ImageKind::GhostFile, 1).unwrap().unwrap();
    let mut entry: pb::GhostFileEntry = image.next_entry().unwrap().unwrap();
    let chunk: pb::GhostChunkEntry = image.next_entry().unwrap().unwrap();
    let rewrite = |entry: &pb::GhostFileEntry| {
        let mut image = cycle.store.create(ImageKind::GhostFile, 1).unwrap();
        image.entry(entry).unwrap();
        image.entry(&chunk).unwrap();
        image.extra(&vec![0; usize::try_from(chunk.len).unwrap()]).unwrap();
        image.finish().unwrap();
        let error = cycle.restore().map(drop).unwrap_err();
        format!("{:#}", anyhow::Error::from(error))
    };
    entry.size = Some(chunk.off);
    assert!(rewrite(&entry).contains("behind the end"));
    entry.size = Some(1 << 20);
    entry.huge_page = Some(2 << 20);
    assert!(rewrite(&entry).contains("is not on a hugetlbfs with pages of 2097152 bytes"));
    entry.huge_page = None;
    entry.xattrs = vec![pb::GhostXattrEntry { name: b"user.a\0b".to_vec(), value: Vec::new() }];
    assert!(rewrite(&entry).contains("set an extended attribute"));
    entry.xattrs.clear();
    entry.mode = libc::S_IFBLK | 0o600;
    assert!(rewrite(&entry).contains("cannot be made again"));
}
