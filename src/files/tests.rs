//! Descriptors of the test process, dumped and opened again, through the whole of [`FilesDump`] and [`FilesRestore`].

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{Read, Seek, Write},
    os::unix::process::CommandExt as _,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fstat},
    unistd::Pid,
};

use super::{FileError, FilesDump, FilesRestore};
use crate::{
    finding::Finding,
    image::{MemStore, Store, TypedStore},
    proc::fdinfo,
    settings::{DumpSettings, RestoreSettings},
    sys::{pid::HostPid, pidfd},
};

pub(super) const TABLE: u32 = 5;

pub(super) struct Cycle {
    pub(super) store: MemStore,
    pub(super) dump: DumpSettings,
    pub(super) restore: RestoreSettings,
    /// Open files that a restore is supposed to have at most.
    pub(super) limit: Option<u64>,
}

impl Cycle {
    pub(super) fn new() -> Self {
        Self {
            store: MemStore::default(),
            dump: DumpSettings::new(Pid::this(), Path::new(".")),
            restore: RestoreSettings::new(Path::new(".")),
            limit: None,
        }
    }

    pub(super) fn dump(&self, fds: &[&OwnedFd]) -> Result<Vec<Finding>, FileError> {
        self.dump_with(fds, None)
    }

    /// With a collection for the contents of memory files.
    pub(super) fn dump_with(
        &self,
        fds: &[&OwnedFd],
        shared: Option<crate::mem::SharedMemory>,
    ) -> Result<Vec<Finding>, FileError> {
        let mut findings = Vec::new();
        let me = Pid::this().as_raw();
        let pidfd = pidfd::open(me, 0).unwrap();
        let mut files = FilesDump::new(&self.store, &self.dump);
        if let Some(shared) = shared {
            files.set_shared_memory(shared);
        }
        let numbers: Vec<i32> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        files.descriptors(HostPid::new(me), TABLE, pidfd.as_fd(), &numbers, &mut findings)?;
        files.complete(std::time::Duration::ZERO, &mut findings)?;
        files.would_restore(&HashSet::new(), &mut findings)?;
        if let Some(limit) = self.limit {
            files.check_limits(limit, &mut findings);
        }
        if findings.is_empty() {
            let pid = me.cast_unsigned();
            let task =
                crate::image::pb::PstreeEntry { pid, ppid: 0, pgid: pid, sid: pid, threads: vec![pid] };
            self.store.write_all(crate::image::ImageKind::Pstree, None, &[task])?;
            files.write()?;
        }
        if findings.is_empty() {
            files.commit();
        }
        Ok(findings)
    }

    /// Opens what was dumped, by the numbers it had.
    pub(super) fn restore(&self) -> Result<BTreeMap<i32, OwnedFd>, FileError> {
        let mut files = FilesRestore::read(&self.store as &dyn Store, &self.restore, &[TABLE])?;
        files.open_early()?;
        files.open_late()?;
        files.before_resume()?;
        let table = files.table_of(TABLE).unwrap();
        let fds =
            table.fds.iter().map(|(n, fd)| (*n, files.fd_of(fd.id).unwrap().try_clone().unwrap())).collect();
        files.commit();
        Ok(fds)
    }

    /// Dumps `fds`, closes them after `between`, opens them again; their pictures must be the same.
    pub(super) fn run(&self, fds: Vec<OwnedFd>, between: impl FnOnce()) -> Vec<OwnedFd> {
        let numbers: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let before: Vec<_> = fds.iter().map(picture).collect();
        assert_eq!(self.dump(&fds.iter().collect::<Vec<_>>()).unwrap(), []);
        drop(fds);
        between();
        let mut again = self.restore().unwrap();
        let again: Vec<OwnedFd> = numbers.iter().map(|n| again.remove(n).unwrap()).collect();
        let after: Vec<_> = again.iter().map(picture).collect();
        assert_eq!(before, after);
        again
    }
}

/// What a task can see of a descriptor: link, position, flags, mode, size, owner.
#[derive(Debug, PartialEq)]
struct Picture {
    link: PathBuf,
    pos: i64,
    flags: u32,
    mode: u32,
    size: i64,
    owner: (u32, u32),
    nlink: bool,
}

fn picture(fd: &OwnedFd) -> Picture {
    let number = fd.as_raw_fd();
    let info = fdinfo::parse(&fs::read(format!("/proc/self/fdinfo/{number}")).unwrap()).unwrap();
    let stat = fstat(fd).unwrap();
    // That a file was made by O_TMPFILE still shows in its flags, and is lost.
    let tmpfile = if stat.st_mode & libc::S_IFMT == libc::S_IFDIR { 0 } else { libc::O_TMPFILE };
    let no_state = (libc::O_CLOEXEC | tmpfile).cast_unsigned();
    Picture {
        link: without_inode(fs::read_link(format!("/proc/self/fd/{number}")).unwrap()),
        pos: info.pos,
        flags: info.flags & !no_state,
        mode: stat.st_mode,
        size: stat.st_size,
        owner: (stat.st_uid, stat.st_gid),
        nlink: stat.st_nlink > 0,
    }
}

/// O_TMPFILE calls a file after its inode, which is another one afterwards.
fn without_inode(link: PathBuf) -> PathBuf {
    match link.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with('#')) {
        Some(_) => link.with_file_name("#"),
        None => link,
    }
}

fn open_as(path: impl AsRef<Path>, flags: i32) -> OwnedFd {
    open(path.as_ref(), OFlag::from_bits_retain(flags | libc::O_CLOEXEC), Mode::from_bits_retain(0o640))
        .unwrap()
}

fn read_all(fd: &OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn files_flags_and_positions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a file\nwith \u{e4} name");
    fs::write(&path, b"0123456789").unwrap();
    let mut first = fs::File::options().read(true).write(true).open(&path).unwrap();
    first.seek(std::io::SeekFrom::Start(7)).unwrap();
    let fds = vec![
        first.into(),
        open_as(&path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_ASYNC),
        open_as(&path, libc::O_WRONLY | libc::O_APPEND | libc::O_SYNC),
        open_as(&path, libc::O_PATH),
        open_as(dir.path(), libc::O_RDONLY | libc::O_DIRECTORY),
        open_as("/dev/null", libc::O_RDWR),
        open_as("/dev/urandom", libc::O_RDONLY),
        open_as("/proc/meminfo", libc::O_RDONLY),
        open_as("/sys/kernel/mm/transparent_hugepage/enabled", libc::O_RDONLY),
        open_as(format!("/proc/{}/status", Pid::this()), libc::O_RDONLY),
    ];
    Cycle::new().run(fds, || ());
}

/// So many that several threads open them.
#[test]
fn many_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: usize| dir.path().join(format!("f{n}"));
    let open = |n: usize| {
        fs::write(path(n), b"0123456789").unwrap();
        let flags = [libc::O_RDONLY, libc::O_RDWR | libc::O_APPEND, libc::O_PATH, libc::O_WRONLY][n % 4];
        let mut file = fs::File::from(open_as(path(n), flags));
        if flags & libc::O_PATH == 0 {
            file.seek(std::io::SeekFrom::Start(n as u64 % 7)).unwrap();
        }
        file.into()
    };
    let mut fds: Vec<OwnedFd> = (0..300).map(open).collect();
    for n in (1..300).step_by(50) {
        fs::remove_file(path(n)).unwrap();
    }
    fds.push(open_as(dir.path(), libc::O_RDONLY | libc::O_DIRECTORY));
    fds.push(open_as(format!("/proc/{}/status", Pid::this()), libc::O_RDONLY));
    let cycle = Cycle::new();
    cycle.run(fds, || ());
    fs::write(path(271), b"another one").unwrap();
    let error = cycle.restore().unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.ends_with("f271: size is 11 bytes, but was 10"), "{source}");
}

#[test]
fn a_name_that_only_looks_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x (deleted)");
    fs::write(&path, b"really here").unwrap();
    let hostile = dir.path().join(std::ffi::OsStr::from_bytes(b"\xff\xfe"));
    fs::write(&hostile, b"no text").unwrap();
    Cycle::new().run(vec![open_as(&path, libc::O_RDWR), open_as(&hostile, libc::O_RDONLY)], || ());
}

#[test]
fn a_description_shared_by_dup_is_one_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, b"0123456789").unwrap();
    let first = open_as(&path, libc::O_RDWR);
    let second = first.try_clone().unwrap();
    let other = open_as(&path, libc::O_RDWR);
    let fds = Cycle::new().run(vec![first, second, other], || ());
    let mut ends: Vec<u64> = Vec::new();
    let mut file = fs::File::from(fds[0].try_clone().unwrap());
    file.seek(std::io::SeekFrom::Start(4)).unwrap();
    for fd in &fds {
        ends.push(fs::File::from(fd.try_clone().unwrap()).stream_position().unwrap());
    }
    ends.sort_unstable();
    assert_eq!(ends, [0, 4, 4]);
}

#[test]
fn deleted_files_travel() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut plain =
        fs::File::options().read(true).write(true).create_new(true).mode(0o604).open(path("gone")).unwrap();
    plain.write_all(b"content").unwrap();
    let reader = open_as(path("gone"), libc::O_RDONLY);
    let sparse = fs::File::options().read(true).write(true).create_new(true).open(path("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"start", 0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", 3 << 20).unwrap();
    sparse.set_len((4 << 20) + 1).unwrap();
    fs::create_dir_all(path("d/e")).unwrap();
    let inner = open_as(path("d/e/inner"), libc::O_RDWR | libc::O_CREAT);
    let inner_dir = open_as(path("d"), libc::O_RDONLY | libc::O_DIRECTORY);
    std::os::unix::fs::symlink("to", path("link")).unwrap();
    let link = open_as(path("link"), libc::O_PATH | libc::O_NOFOLLOW);
    let unnamed = open_as(dir.path(), libc::O_RDWR | libc::O_TMPFILE);
    let want = (read_all(&reader), read_all(&sparse.try_clone().unwrap().into()));
    for name in ["gone", "sparse", "d/e/inner", "link"] {
        fs::remove_file(path(name)).unwrap();
    }
    fs::remove_dir(path("d/e")).unwrap();
    fs::remove_dir(path("d")).unwrap();
    let fds = vec![plain.into(), reader, sparse.into(), inner, inner_dir, link, unnamed];
    let again = Cycle::new().run(fds, || ());
    assert_eq!((read_all(&again[1]), read_all(&again[2])), want);
    let (a, b) = (fstat(&again[0]).unwrap(), fstat(&again[1]).unwrap());
    assert_eq!((a.st_dev, a.st_ino), (b.st_dev, b.st_ino), "two descriptors of one deleted file");
    assert!(fstat(&again[2]).unwrap().st_blocks < 4096, "holes are holes again");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "no name is left behind");
}

#[test]
fn a_deleted_file_whose_name_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let old = open_as(&path, libc::O_RDWR | libc::O_CREAT);
    nix::unistd::write(&old, b"old").unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"new").unwrap();
    let cycle = Cycle::new();
    assert_eq!(cycle.dump(&[&old]).unwrap(), []);
    let again = cycle.restore().unwrap();
    assert_eq!(read_all(&again[&old.as_raw_fd()]), b"old");
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_ghost_limit() {
    let dir = tempfile::tempdir().unwrap();
    let file = open_as(dir.path(), libc::O_RDWR | libc::O_TMPFILE);
    nix::unistd::write(&file, &[1u8; 9000]).unwrap();
    let mut cycle = Cycle::new();
    cycle.dump.ghost_limit = 4096;
    let findings = cycle.dump(&[&file]).unwrap();
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].hint.contains("--ghost-limit"), "{findings:?}");
}

#[test]
fn names_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let file = open_as(path("a"), libc::O_RDWR | libc::O_CREAT);
    fs::hard_link(path("a"), path("b")).unwrap();
    fs::remove_file(path("a")).unwrap();
    let mut cycle = Cycle::new();
    let findings = cycle.dump(&[&file]).unwrap();
    assert!(findings[0].hint.contains("--link-remap"), "{findings:?}");
    cycle.dump.common.link_remap = true;
    let again = cycle.run(vec![file], || assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2));
    let (it, b) = (fstat(&again[0]).unwrap(), nix::sys::stat::stat(&path("b")).unwrap());
    assert_eq!(it.st_ino, b.st_ino);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the link is gone");
}

#[test]
fn a_failed_dump_takes_its_links_back() {
    let dir = tempfile::tempdir().unwrap();
    let file = open_as(dir.path().join("a"), libc::O_RDWR | libc::O_CREAT);
    fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
    fs::remove_file(dir.path().join("a")).unwrap();
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut cycle = Cycle::new();
    cycle.dump.common.link_remap = true;
    assert_eq!(cycle.dump(&[&file, &socket.into()]).unwrap().len(), 1);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_changed_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, b"0123456789").unwrap();
    let cycle = Cycle::new();
    let file = open_as(&path, libc::O_RDONLY);
    assert_eq!(cycle.dump(&[&file]).unwrap(), []);
    let error = |cycle: &Cycle| {
        let e = cycle.restore().unwrap_err();
        std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default()
    };
    fs::write(&path, b"012345678").unwrap();
    assert!(error(&cycle).ends_with("f: size is 9 bytes, but was 10"), "{}", error(&cycle));
    fs::write(&path, b"0123456789").unwrap();
    let mode = |bits| fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(bits)).unwrap();
    mode(0o600);
    assert!(error(&cycle).contains("mode is 600, but was 644"), "{}", error(&cycle));
    mode(0o644);
    assert!(cycle.restore().is_ok());
    fs::remove_file(&path).unwrap();
    assert!(error(&cycle).starts_with("open "), "{}", error(&cycle));
    fs::create_dir(&path).unwrap();
    assert!(error(&cycle).contains("is a directory now, but was a regular file"), "{}", error(&cycle));
}

#[test]
fn refused_by_name() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let of = |family, r#type| socket(family, r#type, SockFlag::SOCK_CLOEXEC, None);
    let all: Vec<(&str, OwnedFd)> = [
        ("UNIX socket", of(AddressFamily::Unix, SockType::Stream)),
        ("INET socket", of(AddressFamily::Inet, SockType::Stream)),
        ("INET socket", of(AddressFamily::Inet6, SockType::Datagram)),
        ("netlink socket", of(AddressFamily::Netlink, SockType::Raw)),
        ("packet socket", of(AddressFamily::Packet, SockType::Raw)),
        ("AF_ALG socket", of(AddressFamily::Alg, SockType::SeqPacket)),
        ("namespace", open(Path::new("/proc/self/ns/net"), OFlag::O_RDONLY, Mode::empty())),
        ("character device", open(Path::new("/dev/kmsg"), OFlag::O_RDONLY, Mode::empty())),
    ]
    .into_iter()
    // What this kernel does not have cannot be met either.
    .filter_map(|(name, fd)| Some((name, fd.ok()?)))
    .collect();
    assert!(all.len() >= 3);
    let findings = Cycle::new().dump(&all.iter().map(|(_, fd)| fd).collect::<Vec<_>>()).unwrap();
    assert_eq!(findings.len(), all.len());
    for ((name, fd), finding) in all.iter().zip(&findings) {
        assert!(finding.reason.starts_with(&format!("{name}: ")), "{finding}");
        assert!(finding.what.starts_with(&format!("fd {} (", fd.as_raw_fd())), "{finding}");
        assert!(!finding.hint.is_empty(), "{finding}");
    }
}

#[test]
fn files_of_proc_of_a_dead_task() {
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let path = format!("/proc/{}", child.id());
    let fds = [
        open_as(format!("{path}/status"), libc::O_RDONLY),
        open_as(&path, libc::O_RDONLY | libc::O_DIRECTORY),
    ];
    child.kill().unwrap();
    child.wait().unwrap();
    let cycle = Cycle::new();
    let links = |fds: &[&OwnedFd]| -> Vec<PathBuf> {
        fds.iter().map(|fd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()).collect()
    };
    let all: Vec<&OwnedFd> = fds.iter().collect();
    let before = links(&all);
    assert_eq!(cycle.dump(&all).unwrap(), []);
    let again = cycle.restore().unwrap();
    let again: Vec<&OwnedFd> = fds.iter().map(|fd| &again[&fd.as_raw_fd()]).collect();
    assert_eq!(links(&again), before);
    assert!(!Path::new(&path).exists(), "the stand-in is gone");
    let mut byte = [0u8];
    assert_eq!(nix::unistd::read(again[0], &mut byte), Err(nix::errno::Errno::ESRCH));
}

#[test]
fn owners_of_files() {
    use crate::sys::fown::{
        F_OWNER_PGRP, F_OWNER_PID, F_OWNER_TID, Owner, owner, owner_uids, set_owner_as, set_signal, signal,
    };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let me = Pid::this().as_raw();
    // Not our own: that may be led from another pid namespace.
    let mut leader = std::process::Command::new("sleep").arg("100").process_group(0).spawn().unwrap();
    let group = leader.id().cast_signed();
    let owners =
        [(F_OWNER_PID, me, 0), (F_OWNER_TID, nix::unistd::gettid().as_raw(), 0), (F_OWNER_PGRP, group, 1000)];
    let fds: Vec<OwnedFd> = owners
        .iter()
        .map(|&(kind, pid, euid)| {
            let fd = open_as("/dev/null", libc::O_RDWR);
            set_signal(fd.as_fd(), 40).unwrap();
            set_owner_as(fd.as_fd(), Owner { kind, pid: HostPid::new(pid) }, 0, euid).unwrap();
            fd
        })
        .collect();
    let again = Cycle::new().run(fds, || ());
    for (fd, &(kind, pid, euid)) in again.iter().zip(&owners) {
        assert_eq!(owner(fd.as_fd()).unwrap(), Owner { kind, pid: HostPid::new(pid) });
        assert_eq!(signal(fd.as_fd()).unwrap(), 40);
        assert_eq!(owner_uids(fd.as_fd()).unwrap(), (0, euid));
    }
    leader.kill().unwrap();
    leader.wait().unwrap();
}

#[test]
fn external_and_inherited_files() {
    use crate::settings::{External, InheritFd};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs");
    fs::write(&path, b"0123456789").unwrap();
    let file = open_as(&path, libc::O_RDWR);
    nix::unistd::lseek(&file, 3, nix::unistd::Whence::SeekSet).unwrap();
    let number = file.as_raw_fd();
    let info = fdinfo::parse(&fs::read(format!("/proc/self/fdinfo/{number}")).unwrap()).unwrap();
    let key = format!("file[{:x}:{:x}]", info.mnt_id.unwrap(), fstat(&file).unwrap().st_ino).into_bytes();
    let other = dir.path().join("other");
    fs::write(&other, b"abcdefghij").unwrap();
    let given = open_as(&other, libc::O_RDWR);

    let mut cycle = Cycle::new();
    cycle.dump.common.externals.push(External { key: key.clone(), value: None });
    assert_eq!(cycle.dump(&[&file]).unwrap(), []);
    assert!(cycle.restore().is_err(), "nobody gave a descriptor");
    cycle.restore.inherit_fds.push(InheritFd { key, fd: given.as_raw_fd() });
    let fds = cycle.restore().unwrap();
    assert_eq!(read_all(&fds[&number]), b"abcdefghij");
    assert_eq!(nix::unistd::lseek(&fds[&number], 0, nix::unistd::Whence::SeekCur).unwrap(), 3);

    // By path, of a file that is not external.
    let mut cycle = Cycle::new();
    assert_eq!(cycle.dump(&[&file]).unwrap(), []);
    let key = path.as_os_str().as_bytes()[1..].to_vec();
    cycle.restore.inherit_fds.push(InheritFd { key, fd: given.as_raw_fd() });
    assert_eq!(read_all(&cycle.restore().unwrap()[&number]), b"abcdefghij");
}

#[test]
fn paths_of_four_kilobytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut path = dir.path().to_owned();
    let name = "n".repeat(200);
    while path.as_os_str().len() + 1 + name.len() < 4095 - 20 {
        path.push(&name);
        fs::create_dir(&path).unwrap();
    }
    path.push("l".repeat(4095 - path.as_os_str().len() - 1));
    fs::write(&path, b"far down").unwrap();
    assert_eq!(path.as_os_str().len(), 4095);
    let long = open_as(&path, libc::O_RDONLY);
    assert_eq!(Cycle::new().dump(&[&long]).unwrap(), []);
    let again = Cycle::new().run(vec![long], || ());
    assert_eq!(read_all(&again[0]), b"far down");
    // Deleted, its text has no room any more: refused by name, not truncated.
    fs::remove_file(&path).unwrap();
    let findings = Cycle::new().dump(&[&again[0]]).unwrap();
    assert!(findings[0].reason.contains("4 KiB"), "{findings:?}");
}

#[test]
fn crafted_images_are_refused() {
    use crate::image::{ImageKind, TypedStore, pb};
    let reg = |id, name: &[u8], flags: u32, mode| pb::FileEntry {
        r#type: pb::FdTypes::Reg.into(),
        id,
        reg: Some(pb::RegFileEntry { id, flags, name: name.to_vec(), mode, ..Default::default() }.into()),
        ..Default::default()
    };
    let fd = |id, fd| pb::FdinfoEntry { id, fd, r#type: pb::FdTypes::Reg.into(), ..Default::default() };
    let refused = |files: &[pb::FileEntry], fds: &[pb::FdinfoEntry]| {
        let cycle = Cycle::new();
        cycle.store.write_all(ImageKind::Files, None, files).unwrap();
        cycle.store.write_all(ImageKind::Fdinfo, u64::from(TABLE), fds).unwrap();
        cycle.restore().map(|_| ()).expect_err("should be refused").to_string()
    };
    refused(&[reg(1, b"relative", 0, None)], &[fd(1, 3)]);
    refused(&[reg(1, b"", 0, None)], &[fd(1, 3)]);
    refused(&[reg(1, b"/etc/pass\0wd", 0, None)], &[fd(1, 3)]);
    refused(&[reg(1, b"/dev/kmsg", 0, None)], &[fd(1, 3)]);
    refused(&[reg(1, b"/etc", 0, Some(libc::S_IFREG | 0o644))], &[fd(1, 3)]);
    refused(&[reg(1, b"/dev/null", 0, None)], &[fd(2, 3)]);
    refused(&[reg(1, b"/dev/null", 0, None)], &[fd(1, 3), fd(1, 3)]);
    refused(&[reg(1, b"/dev/null", 0, None)], &[fd(1, u32::MAX)]);
    refused(&[reg(1, b"/dev/null", 0, None), reg(1, b"/dev/null", 0, None)], &[fd(1, 3)]);
    refused(&[pb::FileEntry { reg: None, ..reg(1, b"", 0, None) }], &[fd(1, 3)]);
    refused(&[pb::FileEntry { r#type: 77, ..reg(1, b"/dev/null", 0, None) }], &[fd(1, 3)]);

    // O_CREAT and O_TRUNC of an image make and change nothing.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_EXCL).cast_unsigned();
    refused(&[reg(1, path.as_os_str().as_bytes(), flags, None)], &[fd(1, 3)]);
    assert!(!path.exists());
    fs::write(&path, b"kept").unwrap();
    let cycle = Cycle::new();
    cycle
        .store
        .write_all(ImageKind::Files, None, &[reg(1, path.as_os_str().as_bytes(), flags, None)])
        .unwrap();
    cycle.store.write_all(ImageKind::Fdinfo, u64::from(TABLE), &[fd(1, 3)]).unwrap();
    // What an older snapshot has left is not looked at.
    cycle.store.write_all(ImageKind::Fdinfo, u64::from(TABLE + 1), &[fd(7, 3)]).unwrap();
    cycle.restore().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"kept");
}

/// Undoes a mount of a test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn files_below_a_mount_or_on_one_that_is_gone_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("f"), b"below").unwrap();
    let below = open_as(path.join("f"), libc::O_RDONLY);
    let mount = std::process::Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&path).status();
    if !mount.is_ok_and(|status| status.success()) {
        eprintln!("skipped: mount does not work here");
        return;
    }
    let mounted = Mounted(path.clone());
    fs::write(path.join("f"), b"on top").unwrap();
    let on_top = open_as(path.join("f"), libc::O_RDWR);
    let again = Cycle::new().run(vec![on_top], || ());
    let refused = |fd: &OwnedFd| {
        let findings = Cycle::new().dump(&[fd]).unwrap();
        assert_eq!(findings.len(), 1);
        findings[0].reason.clone()
    };
    assert!(refused(&below).contains("another file is found at its path"), "{}", refused(&below));
    drop(mounted);
    // Its path is cut off at the mount now: "/f".
    assert!(refused(&again[0]).contains("another file is found at its path"), "{}", refused(&again[0]));
    Cycle::new().run(vec![below], || ());
}

#[test]
fn another_build_of_a_program_is_refused() {
    use crate::settings::FileValidation;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("program");
    fs::copy("/bin/sh", &path).unwrap();
    let cycle = Cycle::new();
    assert_eq!(cycle.dump(&[&open_as(&path, libc::O_RDONLY)]).unwrap(), []);
    let id = super::build_id::read(&fs::File::open(&path).unwrap()).expect("distributions have build ids");
    let bytes: Vec<u8> = id.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut content = fs::read(&path).unwrap();
    let at = memchr::memmem::find(&content, &bytes).unwrap();
    content[at] ^= 1;
    fs::write(&path, &content).unwrap();
    let error = cycle.restore().unwrap_err();
    let text = std::error::Error::source(&error).unwrap().to_string();
    assert!(text.contains("build id differs"), "{text}");
    let mut by_size = cycle;
    by_size.restore.common.file_validation = FileValidation::FileSize;
    by_size.restore().unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o500)).unwrap();
    assert!(by_size.restore().is_err());
    by_size.restore.skip_file_rwx_check = true;
    by_size.restore().unwrap();
}

/// What a restore would refuse here is a finding of the dump.
fn refused_at_dump(cycle: &Cycle, fds: &[&OwnedFd], words: &str) {
    let findings = cycle.dump(fds).unwrap();
    assert!(!findings.is_empty() && findings.iter().all(|f| f.to_string().contains(words)), "{findings:?}");
}

#[test]
fn files_that_can_no_longer_be_opened() {
    use crate::sys::inode;
    let dir = tempfile::tempdir().unwrap();
    let open_with = |name: &str, flags: i32| open_as(dir.path().join(name), flags | libc::O_CREAT);
    let (writer, appender) = (open_with("f", libc::O_RDWR), open_with("g", libc::O_WRONLY | libc::O_APPEND));
    let other = open_with("g", libc::O_WRONLY);
    let reader = open_with("f", libc::O_RDONLY);
    let path = open_with("f", libc::O_PATH);
    let cycle = Cycle::new();
    assert_eq!(cycle.dump(&[&writer, &appender, &other, &reader]).unwrap(), []);
    let flags = inode::flags(writer.as_fd()).unwrap();
    if inode::set_flags(writer.as_fd(), flags | inode::IMMUTABLE).is_err() {
        eprintln!("skipped: no attributes here");
        return;
    }
    inode::set_flags(appender.as_fd(), flags | inode::APPEND).unwrap();
    refused_at_dump(&cycle, &[&writer, &reader, &path], "open it again with the access it had");
    refused_at_dump(&cycle, &[&other, &appender], "it has become append-only");
    assert_eq!(cycle.dump(&[&reader, &appender]).unwrap(), []);
    for fd in [&writer, &appender] {
        inode::set_flags(fd.as_fd(), flags).unwrap();
    }
    // A deleted file whose directory takes no new ones.
    fs::remove_file(dir.path().join("f")).unwrap();
    let own = OwnedFd::from(fs::File::open(dir.path()).unwrap());
    let flags = inode::flags(own.as_fd()).unwrap();
    inode::set_flags(own.as_fd(), flags | inode::IMMUTABLE).unwrap();
    let findings = cycle.dump(&[&reader]);
    inode::set_flags(own.as_fd(), flags).unwrap();
    assert!(findings.unwrap()[0].to_string().contains("in the place of the deleted"));
    assert_eq!(cycle.dump(&[&reader]).unwrap(), []);
}

#[test]
fn descriptors_beyond_the_limit() {
    let files: Vec<OwnedFd> = (0..40).map(|_| open_as("/dev/null", libc::O_RDONLY)).collect();
    let all: Vec<&OwnedFd> = files.iter().collect();
    let mut cycle = Cycle::new();
    cycle.limit = Some(10_000);
    assert_eq!(cycle.dump(&all).unwrap(), []);
    cycle.limit = Some(70);
    refused_at_dump(&cycle, &all, "must be open at once");
    let high = crate::sys::fd::dup_above(files[0].as_fd(), 900).unwrap();
    cycle.limit = Some(900);
    refused_at_dump(&cycle, &[&high], "does not fit below our limit of 900");
}
