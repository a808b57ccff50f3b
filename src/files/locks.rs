//! Locks on files: flock(2), POSIX and open-file-description locks of fcntl(2).
//!
//! Saved with `--file-locks`: what is held (`filelocks.img`), by task and descriptor. Who waits for a lock waits again when
//! the call is restarted. Leases are refused. A flock is held by a description and shows in all tables that have it, a POSIX
//! lock by one table; each is stored once and taken again in the list of one task, without waiting.

use std::collections::{BTreeMap, HashSet};

use super::{DumpCx, DumpTables, DumpedFd, FileError, RestoreCx, pipe_data::io_error};
use crate::{
    finding::Finding,
    image::{ImageKind, Store, TypedStore, pb},
    proc::{
        locks::{Lock, LockKind, LockMode, LockType},
        status,
    },
    process_tree::ids::in_tree,
    sys::{pid::HostPid, pid::NsPid},
    tracee::{List, Want},
};

/// Kinds in images: the kernel's old FL_* bits.
const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;

/// Writes `filelocks.img`, or says why not.
pub(super) fn finish_dump(
    cx: &mut DumpCx<'_>,
    tables: &DumpTables,
    findings: &mut Vec<Finding>,
) -> Result<(), FileError> {
    let wanted = cx.settings.common.file_locks;
    let mut entries = Vec::new();
    let mut seen = HashSet::new();
    for table in &tables.0 {
        let pid = match table.fds.iter().any(|fd| !fd.locks.is_empty()) {
            true => process_of(table.pid)?,
            false => continue,
        };
        for fd in &table.fds {
            for lock in &fd.locks {
                // A POSIX lock belongs to the table, the others to the description.
                let owner = if lock.kind == LockKind::Posix { table.files_id } else { 0 };
                if !seen.insert((kind_of(lock), owner, fd.id, lock.start, lock.end)) {
                    continue;
                }
                let entry = match (wanted, entry(pid, fd, lock)) {
                    (true, Ok(entry)) => entry,
                    (false, Ok(_)) => {
                        let reason = "file locks are held, others may take them while the tree does not run";
                        findings.push(finding(pid, fd, lock, reason, "dump with --file-locks"));
                        continue;
                    }
                    (_, Err(reason)) => {
                        findings.push(finding(pid, fd, lock, reason, "let the program give it up"));
                        continue;
                    }
                };
                entries.push(entry);
            }
        }
    }
    if wanted && findings.is_empty() && !entries.is_empty() {
        cx.store.write_all(ImageKind::FileLocks, None, &entries)?;
    }
    Ok(())
}

/// The process of a task, which may be a thread whose leader has exited.
pub(super) fn process_of(tid: HostPid) -> Result<HostPid, FileError> {
    match std::fs::read(format!("/proc/{tid}/status")) {
        Ok(text) => Ok(status::parse(&text)?.tgid),
        Err(e) => Err(io_error("read the status of a task", &e)),
    }
}

fn kind_of(lock: &Lock) -> Option<u32> {
    match lock.kind {
        LockKind::Posix => Some(POSIX),
        LockKind::Flock => Some(FLOCK),
        LockKind::Ofdlck => Some(OFD),
        _ => None,
    }
}

fn name_of(lock: &Lock) -> &'static str {
    match lock.kind {
        LockKind::Posix => "POSIX lock",
        LockKind::Flock => "flock",
        LockKind::Ofdlck => "OFD lock",
        LockKind::Lease => "lease",
        _ => "lock",
    }
}

fn finding(pid: HostPid, fd: &DumpedFd, lock: &Lock, reason: &str, hint: &str) -> Finding {
    let what =
        format!("fd {} ({} on inode {} of {}:{})", fd.fd, name_of(lock), lock.ino, lock.dev.0, lock.dev.1);
    Finding { pid, what, reason: reason.into(), hint: hint.into() }
}

fn entry(pid: HostPid, fd: &DumpedFd, lock: &Lock) -> Result<pb::FileLockEntry, &'static str> {
    let flag = match kind_of(lock) {
        Some(flag) => flag,
        None if lock.kind == LockKind::Lease => return Err("leases cannot be made again"),
        None => return Err("a kind of lock that is not known"),
    };
    if lock.mode != LockMode::Advisory {
        return Err("only advisory locks can be made again");
    }
    let r#type = match lock.typ {
        LockType::Read => libc::F_RDLCK,
        LockType::Write => libc::F_WRLCK,
        LockType::Unlck => return Err("it is being given up"),
    };
    let len = lock.end.map_or(0, |end| end - lock.start + 1);
    Ok(pb::FileLockEntry {
        flag,
        r#type: r#type.cast_unsigned(),
        pid: in_tree(pid).get(),
        fd: fd.fd,
        start: lock.start,
        len,
    })
}

/// Locks of a tree that is restored, by task.
#[derive(Debug, Default)]
pub(super) struct Locks(BTreeMap<NsPid, Vec<pb::FileLockEntry>>);

impl Locks {
    /// Reads and checks `filelocks.img`.
    pub(super) fn read(store: &dyn Store) -> Result<Self, FileError> {
        let mut all: BTreeMap<NsPid, Vec<pb::FileLockEntry>> = BTreeMap::new();
        for lock in store.read_all::<pb::FileLockEntry>(ImageKind::FileLocks, None)? {
            let good = matches!(lock.flag, POSIX | FLOCK | OFD) && lock.start >= 0 && lock.len >= 0;
            if !good || lock_type(&lock).is_none() {
                return Err(FileError::entry(
                    0,
                    format!("a lock on fd {} of task {} makes no sense", lock.fd, lock.pid),
                ));
            }
            all.entry(NsPid::new(lock.pid)).or_default().push(lock);
        }
        Ok(Self(all))
    }

    /// Adds the calls that take the locks of task `pid`, whose table is complete.
    pub(super) fn plan(&mut self, pid: NsPid, list: &mut List) {
        for lock in self.0.remove(&pid).unwrap_or_default() {
            plan(&lock, list);
        }
    }

    /// A task whose locks nobody has taken.
    pub(super) fn left(&self) -> Option<NsPid> {
        self.0.keys().next().copied()
    }
}

fn lock_type(lock: &pb::FileLockEntry) -> Option<i32> {
    [libc::F_RDLCK, libc::F_WRLCK].into_iter().find(|known| known.cast_unsigned() == lock.r#type)
}

fn plan(lock: &pb::FileLockEntry, list: &mut List) {
    let write = lock_type(lock) == Some(libc::F_WRLCK);
    if lock.flag == FLOCK {
        let operation = if write { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
        let name = format!("flock of fd {}", lock.fd);
        list.call(name, libc::SYS_flock, &[lock.fd.into(), operation.into()], Want::Zero);
        return;
    }
    let (kind, command) =
        if lock.flag == POSIX { ("POSIX", libc::F_SETLK) } else { ("OFD", libc::F_OFD_SETLK) };
    let name = format!("{kind} lock of fd {}, {} bytes from {}", lock.fd, lock.len, lock.start);
    let r#type: i32 = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    // struct flock: type and whence (SEEK_SET, 0) are 16 bits each, start and len 64, the pid is not ours to say.
    let mut bytes = [0; 32];
    let words = [i64::from(r#type), lock.start, lock.len, 0];
    let words = words.into_iter().flat_map(i64::to_ne_bytes);
    bytes.iter_mut().zip(words).for_each(|(to, from)| *to = from);
    let flock = list.bytes(&bytes);
    list.call(name, libc::SYS_fcntl, &[lock.fd.into(), command.into(), flock.into()], Want::Zero);
}

/// Reads the locks when the restore begins.
pub(super) fn read(cx: &mut RestoreCx<'_>) -> Result<(), FileError> {
    *cx.state::<Locks>() = Locks::read(cx.store)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::fd::{AsRawFd, OwnedFd},
    };

    use nix::fcntl::{FcntlArg, fcntl};

    use super::super::{
        DumpTable,
        tests::Cycle,
        trial::{Trial, run_list},
    };
    use super::*;
    use crate::proc::fdinfo;

    fn locks(fd: &OwnedFd) -> Vec<(LockKind, LockType, i64, Option<i64>)> {
        let text = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        let mut all: Vec<_> = fdinfo::parse(&text)
            .unwrap()
            .locks
            .iter()
            .map(|lock| (lock.kind, lock.typ, lock.start, lock.end))
            .collect();
        all.sort_by_key(|lock| lock.2);
        all
    }

    fn flock(r#type: i32, start: i64, len: i64) -> libc::flock {
        libc::flock { l_type: r#type as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 }
    }

    fn three(dir: &std::path::Path) -> Vec<OwnedFd> {
        let file = |name: &str| {
            let path = dir.join(name);
            OwnedFd::from(
                File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap(),
            )
        };
        vec![file("flock"), file("posix"), file("ofd")]
    }

    fn take(fds: &[OwnedFd]) {
        File::from(fds[0].try_clone().unwrap()).lock_shared().unwrap();
        fcntl(&fds[1], FcntlArg::F_SETLK(&flock(libc::F_WRLCK, 5, 10))).unwrap();
        fcntl(&fds[1], FcntlArg::F_SETLK(&flock(libc::F_RDLCK, 50, 1))).unwrap();
        fcntl(&fds[2], FcntlArg::F_OFD_SETLK(&flock(libc::F_WRLCK, 100, 0))).unwrap();
    }

    #[test]
    fn all_kinds_again() {
        let dir = tempfile::tempdir().unwrap();
        let fds = three(dir.path());
        take(&fds);
        let before: Vec<_> = fds.iter().map(locks).collect();
        assert_eq!(before.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2, 1]);
        let mut cycle = Cycle::new();
        cycle.dump.common.file_locks = true;
        assert_eq!(cycle.dump(&fds.iter().collect::<Vec<_>>()).unwrap(), []);
        let me = in_tree(HostPid::own());
        let mut restored = Locks::read(&cycle.store).unwrap();
        assert_eq!(restored.0.get(&me).map(Vec::len), Some(4));
        let numbers: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        drop(fds);
        // The child's descriptors have our numbers, so the new files must have the old ones.
        let again = three(dir.path());
        for lock in restored.0.get_mut(&me).unwrap() {
            let index = numbers.iter().position(|number| *number == lock.fd).unwrap();
            lock.fd = again[index].as_raw_fd();
        }
        let mut list = List::new("locks");
        restored.plan(me, &mut list);
        assert_eq!((list.len(), restored.left()), (4, None));
        run_list(&again.iter().collect::<Vec<_>>(), list);
        // The POSIX locks were the child's own and went with it.
        let after: Vec<_> = again.iter().map(locks).collect();
        assert_eq!((&after[0], &after[2]), (&before[0], &before[2]));
        assert_eq!(after[1], []);
    }

    #[test]
    fn without_the_option_they_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let fds = three(dir.path());
        take(&fds);
        let findings = Cycle::new().dump(&fds.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(findings.len(), 4);
        assert!(findings.iter().all(|finding| finding.hint == "dump with --file-locks"));
        assert!(findings[0].what.contains("(flock on inode "), "{}", findings[0]);
    }

    #[test]
    fn a_lease_is_refused_and_shared_locks_are_stored_once() {
        let lock = |text: &str| crate::proc::locks::parse(text.as_bytes()).unwrap().remove(0);
        let fd = |number, text: &str| DumpedFd {
            fd: number,
            id: 9,
            cloexec: false,
            dev: 1,
            ino: 2,
            locks: vec![lock(text)],
        };
        let flock = "1: FLOCK  ADVISORY  WRITE 12212 00:1b:6 0 EOF\n";
        let posix = "1: POSIX  ADVISORY  WRITE 12212 00:1b:6 5 14\n";
        let me = std::process::id().cast_signed();
        let table = |files_id, fds| DumpTable { files_id, pid: HostPid::new(me), fds };
        let tables = DumpTables(vec![
            table(1, vec![fd(3, flock), fd(4, flock), fd(5, posix)]),
            table(2, vec![fd(3, flock), fd(6, posix)]),
        ]);
        let mut trial = Trial::new();
        trial.dump_settings.common.file_locks = true;
        let mut findings = Vec::new();
        trial.cx(|cx| finish_dump(cx, &tables, &mut findings)).unwrap();
        assert_eq!(findings, []);
        let stored: Vec<pb::FileLockEntry> = trial.store.read_all(ImageKind::FileLocks, None).unwrap();
        let want = |flag, fd, start, len| pb::FileLockEntry { flag, r#type: 1, pid: me, fd, start, len };
        assert_eq!(stored, [want(2, 3, 0, 0), want(1, 5, 5, 10), want(1, 6, 5, 10)]);

        let lease = "1: LEASE  ACTIVE    READ 12 00:1b:6 0 EOF\n";
        let tables = DumpTables(vec![table(1, vec![fd(3, lease)])]);
        trial.cx(|cx| finish_dump(cx, &tables, &mut findings)).unwrap();
        assert_eq!(findings[0].reason, "leases cannot be made again");
    }

    #[test]
    fn crafted_entries_are_refused() {
        let good = pb::FileLockEntry { flag: 1, r#type: 1, pid: 1, fd: 3, start: 0, len: 0 };
        let read = |entry: pb::FileLockEntry| {
            let store = crate::image::MemStore::default();
            store.write_one(ImageKind::FileLocks, None, &entry).unwrap();
            Locks::read(&store).is_ok()
        };
        assert!(read(good));
        assert!(!read(pb::FileLockEntry { flag: 3, ..good }));
        assert!(!read(pb::FileLockEntry { r#type: 2, ..good }));
        assert!(!read(pb::FileLockEntry { start: -1, ..good }));
        assert!(!read(pb::FileLockEntry { len: -5, ..good }));
    }
}
