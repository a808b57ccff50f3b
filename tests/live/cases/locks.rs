//! File locks: flock, POSIX record locks, open file description locks; leases.

use crate::case::Case;
use crate::gate::{Gate, fork, join};
use crate::sys::{self, Errno, getpid};

pub const CASES: &[Case] = &[
    Case::new("flock_exclusive", flock_exclusive).flags(LOCKS),
    Case::new("flock_shared", flock_shared).flags(LOCKS),
    Case::new("flock_inherited", flock_inherited).flags(LOCKS),
    Case::new("flock_of_dup", flock_of_dup).flags(LOCKS),
    Case::new("posix_lock", posix_lock).flags(LOCKS),
    Case::new("posix_lock_ranges", posix_lock_ranges).flags(LOCKS),
    Case::new("posix_locks_of_two", posix_locks_of_two)
        .flags(LOCKS)
        .peer_fails("loses the child's lock on a shared description"),
    Case::new("ofd_lock", ofd_lock).flags(LOCKS),
    Case::new("ofd_lock_inherited", ofd_lock_inherited).flags(LOCKS),
    Case::new("locks_all_kinds", locks_all_kinds).flags(LOCKS),
    Case::new("lock_without_option", flock_exclusive).refused("file-locks"),
    Case::new("lease", lease).flags(LOCKS).refused("lease"),
];

const LOCKS: &[&str] = &["--file-locks"];

fn open() -> i32 {
    sys::open(c"locked", libc::O_RDWR | libc::O_CREAT).expect("open")
}

fn flock(fd: i32, how: i32) -> Result<usize, Errno> {
    sys!(SYS_flock, fd, how | libc::LOCK_NB)
}

fn record(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 }
}

fn set(fd: i32, command: i32, lock: libc::flock) -> Result<i32, Errno> {
    sys::fcntl(fd, command, &raw const lock as usize)
}

/// What stands in the way of `lock`: type, start, length, holder.
fn conflict(fd: i32, command: i32, mut lock: libc::flock) -> (i32, i64, i64, i32) {
    sys::fcntl(fd, command, &raw mut lock as usize).expect("F_GETLK");
    (lock.l_type.into(), lock.l_start, lock.l_len, lock.l_pid)
}

/// As another process sees it.
fn from_outside(check: impl FnOnce()) {
    join(fork(check));
}

fn flock_exclusive(gate: &Gate) {
    let fd = open();
    flock(fd, libc::LOCK_EX).expect("flock");
    gate.ready();
    from_outside(|| {
        let other = open();
        assert_eq!(flock(other, libc::LOCK_SH), Err(libc::EWOULDBLOCK));
    });
    flock(fd, libc::LOCK_UN).expect("unlock");
    from_outside(|| assert_eq!(flock(open(), libc::LOCK_EX), Ok(0)));
}

fn flock_shared(gate: &Gate) {
    let (one, two) = (open(), open());
    flock(one, libc::LOCK_SH).expect("flock");
    flock(two, libc::LOCK_SH).expect("flock");
    gate.ready();
    flock(one, libc::LOCK_UN).expect("unlock");
    from_outside(|| {
        let other = open();
        assert_eq!(flock(other, libc::LOCK_EX), Err(libc::EWOULDBLOCK), "the second lock is there");
        assert_eq!(flock(other, libc::LOCK_SH), Ok(0), "it is shared");
    });
}

/// The lock belongs to the description, which parent and child share.
fn flock_inherited(gate: &Gate) {
    let fd = open();
    flock(fd, libc::LOCK_EX).expect("flock");
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        assert_eq!(flock(open(), libc::LOCK_SH), Err(libc::EWOULDBLOCK));
        flock(fd, libc::LOCK_UN).expect("unlock");
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    assert_eq!(flock(open(), libc::LOCK_EX), Ok(0), "the child has released it");
}

fn flock_of_dup(gate: &Gate) {
    let fd = open();
    sys!(SYS_dup2, fd, 70).expect("dup2");
    flock(fd, libc::LOCK_EX).expect("flock");
    sys::close(fd);
    gate.ready();
    assert_eq!(flock(open(), libc::LOCK_SH), Err(libc::EWOULDBLOCK));
    sys::close(70);
    assert_eq!(flock(open(), libc::LOCK_SH), Ok(0));
}

fn posix_lock(gate: &Gate) {
    let fd = open();
    set(fd, libc::F_SETLK, record(libc::F_WRLCK, 0, 0)).expect("F_SETLK");
    let me = getpid();
    gate.ready();
    from_outside(|| {
        let other = open();
        let found = conflict(other, libc::F_GETLK, record(libc::F_RDLCK, 5, 1));
        assert_eq!(found, (libc::F_WRLCK, 0, 0, me));
    });
}

fn posix_lock_ranges(gate: &Gate) {
    let fd = open();
    set(fd, libc::F_SETLK, record(libc::F_RDLCK, 10, 20)).expect("F_SETLK");
    set(fd, libc::F_SETLK, record(libc::F_WRLCK, 100, 1)).expect("F_SETLK");
    set(fd, libc::F_SETLK, record(libc::F_WRLCK, 1 << 40, 0)).expect("F_SETLK");
    let me = getpid();
    gate.ready();
    from_outside(|| {
        let other = open();
        let found = |start| conflict(other, libc::F_GETLK, record(libc::F_WRLCK, start, 1));
        assert_eq!(found(15), (libc::F_RDLCK, 10, 20, me));
        assert_eq!(found(100), (libc::F_WRLCK, 100, 1, me));
        assert_eq!(found(1 << 41), (libc::F_WRLCK, 1 << 40, 0, me));
        assert_eq!(found(50).0, libc::F_UNLCK);
        assert_eq!(set(other, libc::F_SETLK, record(libc::F_RDLCK, 10, 5)), Ok(0), "a read lock is shared");
    });
}

/// Record locks belong to a process: child and parent hold one each.
fn posix_locks_of_two(gate: &Gate) {
    let fd = open();
    let me = getpid();
    let child = fork(|| {
        set(fd, libc::F_SETLK, record(libc::F_WRLCK, 10, 10)).expect("F_SETLK");
        gate.mark("child");
        gate.wait();
        assert_eq!(conflict(fd, libc::F_GETLK, record(libc::F_WRLCK, 0, 5)), (libc::F_WRLCK, 0, 10, me));
        gate.await_mark("checked");
    });
    gate.await_mark("child");
    set(fd, libc::F_SETLK, record(libc::F_WRLCK, 0, 10)).expect("F_SETLK");
    gate.ready();
    assert_eq!(conflict(fd, libc::F_GETLK, record(libc::F_WRLCK, 12, 1)), (libc::F_WRLCK, 10, 10, child));
    gate.mark("checked");
    join(child);
    assert_eq!(conflict(fd, libc::F_GETLK, record(libc::F_WRLCK, 12, 1)).0, libc::F_UNLCK);
}

fn ofd_lock(gate: &Gate) {
    let (one, two) = (open(), open());
    set(one, libc::F_OFD_SETLK, record(libc::F_WRLCK, 3, 4)).expect("F_OFD_SETLK");
    set(two, libc::F_OFD_SETLK, record(libc::F_RDLCK, 30, 4)).expect("F_OFD_SETLK");
    gate.ready();
    let found = |fd, start| conflict(fd, libc::F_OFD_GETLK, record(libc::F_WRLCK, start, 1));
    assert_eq!(found(two, 3), (libc::F_WRLCK, 3, 4, -1));
    assert_eq!(found(one, 31), (libc::F_RDLCK, 30, 4, -1));
    assert_eq!(found(one, 3).0, libc::F_UNLCK, "its own lock is not in its way");
}

fn ofd_lock_inherited(gate: &Gate) {
    let fd = open();
    set(fd, libc::F_OFD_SETLK, record(libc::F_WRLCK, 0, 0)).expect("F_OFD_SETLK");
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        set(fd, libc::F_OFD_SETLK, record(libc::F_UNLCK, 0, 10)).expect("unlock a part");
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    let found = |start| conflict(open(), libc::F_OFD_GETLK, record(libc::F_WRLCK, start, 1));
    assert_eq!(found(5).0, libc::F_UNLCK);
    assert_eq!(found(20), (libc::F_WRLCK, 10, 0, -1));
}

fn locks_all_kinds(gate: &Gate) {
    let fd = open();
    flock(fd, libc::LOCK_EX).expect("flock");
    set(fd, libc::F_SETLK, record(libc::F_WRLCK, 0, 1)).expect("F_SETLK");
    set(fd, libc::F_OFD_SETLK, record(libc::F_WRLCK, 10, 1)).expect("F_OFD_SETLK");
    let me = getpid();
    gate.ready();
    from_outside(|| {
        let other = open();
        assert_eq!(flock(other, libc::LOCK_SH), Err(libc::EWOULDBLOCK));
        assert_eq!(conflict(other, libc::F_GETLK, record(libc::F_WRLCK, 0, 1)).3, me);
        assert_eq!(conflict(other, libc::F_GETLK, record(libc::F_WRLCK, 10, 1)).3, -1);
    });
}

fn lease(gate: &Gate) {
    const F_SETLEASE: i32 = 1024;
    const F_GETLEASE: i32 = 1025;
    drop(std::fs::write("leased", b""));
    let fd = sys::open(c"leased", libc::O_RDONLY).expect("open");
    if sys::fcntl(fd, F_SETLEASE, libc::F_RDLCK as usize).is_err() {
        gate.skip("no leases on this file system");
    }
    gate.ready();
    assert_eq!(sys::fcntl(fd, F_GETLEASE, 0), Ok(libc::F_RDLCK));
}
