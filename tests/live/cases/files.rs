//! Open files: regular ones with position and flags, deleted and changed ones, devices, /proc, /sys.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};

use crate::case::{Case, Site};
use crate::gate::{Gate, fork, join};
use crate::sys::{self, getpid};

pub const CASES: &[Case] = &[
    Case::new("file_position", file_position).fifty(),
    Case::new("file_flags", file_flags),
    Case::new("file_append", file_append),
    Case::new("file_path_only", file_path_only).peer_loses(&["/fd/"]),
    Case::new("file_directory", file_directory).peer_loses(&["/fd/"]),
    Case::new("file_dup", file_dup),
    Case::new("file_dup_across_fork", file_dup_across_fork).disturbed(),
    Case::new("file_opened_twice", file_opened_twice),
    Case::new("file_close_on_exec", file_close_on_exec),
    Case::new("file_high_numbers", file_high_numbers),
    Case::new("file_gaps_in_numbers", file_gaps_in_numbers),
    Case::new("file_no_stdio", file_no_stdio),
    Case::new("files_more_than_one_may_open", files_more_than_one_may_open)
        .only_plain()
        .peer_fails("it has the limit of one process for all files of the tree"),
    Case::new("files_1000", files_1000),
    Case::new("file_owner_and_signal", file_owner_and_signal),
    Case::new("file_async_pipe", file_async_pipe),
    Case::new("file_changed_since", file_position).between(grow).restore_refused("position").only_plain(),
    Case::new("file_removed_since", file_position).between(remove).restore_refused("position").only_plain(),
    Case::new("file_mode_changed_since", file_position)
        .between(forbid)
        .restore_refused("position")
        .only_plain(),
    Case::new("program_not_executable", program_not_executable).refused("may not be executed any more"),
    Case::new("file_made_immutable", file_made_immutable)
        .refused("open it again with the access it had")
        .only_plain(),
    Case::new("ghost_file", ghost_file).disturbed().fifty(),
    Case::new("ghost_shared", ghost_shared),
    Case::new("ghost_empty", ghost_empty),
    Case::new("ghost_sparse", ghost_sparse),
    Case::new("ghost_read_only", ghost_read_only),
    Case::new("ghost_too_large", ghost_too_large).refused("ghost"),
    Case::new("ghost_large_allowed", ghost_too_large).flags(&["--ghost-limit", "4M"]),
    Case::new("ghost_directory", ghost_directory),
    // The file comes back under no name, however it was made.
    Case::new("ghost_tmpfile", ghost_tmpfile).may_differ(&["/fd/"]),
    Case::new("ghost_name_taken", ghost_name_taken),
    Case::new("linked_elsewhere", linked_elsewhere).flags(&["--link-remap"]).not_running(),
    Case::new("linked_elsewhere_refused", linked_elsewhere).refused("link-remap"),
    Case::new("devices", devices),
    Case::new("device_full_and_random", device_full_and_random),
    Case::new("device_kmsg", device_kmsg).refused("/dev/kmsg"),
    Case::new("proc_self_status", proc_self_status),
    Case::new("proc_of_child", proc_of_child),
    Case::new("proc_global", proc_global),
    Case::new("proc_of_dead", proc_of_dead),
    Case::new("proc_of_thread", proc_of_thread).peer_fails("opens it before the threads are there"),
    Case::new("proc_memory", proc_memory)
        .may_differ(&["auxv"])
        .peer_fails("cannot: opens files of /proc early"),
    Case::new("proc_memory_of_another_program", proc_memory_of_another_program)
        .refused("memory that process")
        .only_plain(),
    Case::new("proc_of_stranger", proc_of_stranger)
        .refused("process 1, which is not in the tree")
        .only_plain(),
    Case::new("proc_of_thread_of_another", proc_of_thread_of_another)
        .peer_fails("opens it before the threads are there"),
    Case::new("proc_of_descriptor_of_another", proc_of_descriptor_of_another)
        .refused("which another process than that one holds")
        .only_plain(),
    Case::new("proc_of_dead_thread", proc_of_dead_thread).refused("of a thread that has ended").only_plain(),
    Case::new("directory_of_dead", directory_of_dead).peer_fails("cannot enter the directory of a dead task"),
    Case::new("sys_file", sys_file),
];

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;

fn content(len: usize, seed: u64) -> Vec<u8> {
    (0..len).map(|n| (sys::pattern(seed, n) >> 20) as u8).collect()
}

/// Checks the rest of a file from where it stands.
#[track_caller]
fn check_rest(mut file: &fs::File, want: &[u8]) {
    let mut rest = Vec::new();
    file.read_to_end(&mut rest).expect("read");
    assert!(rest == want, "the rest of the file differs: {} bytes, wanted {}", rest.len(), want.len());
}

fn file_position(gate: &Gate) {
    let bytes = content(10_000, 1);
    fs::write("position", &bytes).expect("write");
    let mut reader = fs::File::open("position").expect("open");
    reader.seek(SeekFrom::Start(4321)).expect("seek");
    let mut beyond = fs::File::open("position").expect("open");
    beyond.seek(SeekFrom::Start(1 << 40)).expect("seek");
    gate.ready();
    check_rest(&reader, &bytes[4321..]);
    assert_eq!(beyond.stream_position().expect("position"), 1 << 40);
}

fn grow(site: &Site<'_>) {
    let mut file = OpenOptions::new().append(true).open(site.dir.join("position")).expect("open");
    file.write_all(b"more").expect("write");
}

fn remove(site: &Site<'_>) {
    fs::remove_file(site.dir.join("position")).expect("remove");
}

/// CRIU takes a file with another mode for another file, and so do we.
fn forbid(site: &Site<'_>) {
    fs::set_permissions(site.dir.join("position"), fs::Permissions::from_mode(0o000)).expect("chmod");
}

/// The kernel would not take its program file at restore: said before the tree is killed.
fn program_not_executable(gate: &Gate) {
    fs::copy("/bin/sleep", "program").expect("copy");
    fs::set_permissions("program", fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut child = std::process::Command::new("./program").arg("1000").spawn().expect("run");
    fs::set_permissions("program", fs::Permissions::from_mode(0o644)).expect("chmod");
    gate.ready();
    child.kill().expect("kill");
    child.wait().expect("wait");
}

/// Open for writing, and not to be opened so again.
fn file_made_immutable(gate: &Gate) {
    const GET: u64 = 0x8008_6601;
    const SET: u64 = 0x4008_6602;
    const IMMUTABLE: i32 = 0x10;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open("immutable").expect("create");
    let mut flags = 0_i32;
    let told = sys!(SYS_ioctl, file.as_raw_fd(), GET, &raw mut flags);
    let fixed = flags | IMMUTABLE;
    if told.is_err() || sys!(SYS_ioctl, file.as_raw_fd(), SET, &raw const fixed).is_err() {
        gate.skip("no attributes on this file system");
    }
    gate.ready();
    sys!(SYS_ioctl, file.as_raw_fd(), SET, &raw const flags).expect("FS_IOC_SETFLAGS");
}

/// Every mode and flag that fcntl shows; the harness compares fdinfo, too.
fn file_flags(gate: &Gate) {
    fs::write("flags", b"0123456789").expect("write");
    let sets = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDWR | libc::O_NONBLOCK,
        libc::O_RDWR | libc::O_APPEND | libc::O_CLOEXEC,
        libc::O_WRONLY | libc::O_SYNC,
        libc::O_WRONLY | libc::O_DSYNC,
        libc::O_RDONLY | libc::O_NOATIME,
        libc::O_RDONLY | libc::O_NOFOLLOW,
        libc::O_PATH | libc::O_NOFOLLOW,
        libc::O_RDWR | libc::O_DIRECT,
        libc::O_RDONLY | libc::O_LARGEFILE,
    ];
    // O_DIRECT is not to be had on every file system.
    let open: Vec<(i32, i32)> =
        sets.into_iter().filter_map(|s| Some((s, sys::open(c"flags", s).ok()?))).collect();
    assert!(open.len() >= 9);
    let before: Vec<i32> =
        open.iter().map(|(_, fd)| sys::fcntl(*fd, libc::F_GETFL, 0).expect("F_GETFL")).collect();
    gate.ready();
    for ((asked, fd), before) in open.iter().zip(before) {
        assert_eq!(sys::fcntl(*fd, libc::F_GETFL, 0), Ok(before), "flags asked for: {asked:#o}");
        let closes = i32::from(asked & libc::O_CLOEXEC != 0);
        assert_eq!(sys::fcntl(*fd, libc::F_GETFD, 0), Ok(closes), "flags asked for: {asked:#o}");
    }
}

fn file_append(gate: &Gate) {
    fs::write("log", b"one ").expect("write");
    let mut file = OpenOptions::new().append(true).open("log").expect("open");
    file.write_all(b"two ").expect("write");
    gate.ready();
    file.write_all(b"three").expect("write");
    assert_eq!(fs::read("log").expect("read"), b"one two three");
}

fn file_path_only(gate: &Gate) {
    fs::write("path", b"x").expect("write");
    fs::create_dir("dir").expect("mkdir");
    std::os::unix::fs::symlink("nowhere", "link").expect("symlink");
    let file = sys::open(c"path", libc::O_PATH).expect("open");
    let dir = sys::open(c"dir", libc::O_PATH | libc::O_DIRECTORY).expect("open");
    let link = sys::open(c"link", libc::O_PATH | libc::O_NOFOLLOW);
    gate.ready();
    assert_eq!(sys::read(file, 1), Err(libc::EBADF), "a path is not open for reading");
    assert_eq!(sys!(SYS_mkdirat, dir, c"inside".as_ptr(), 0o755), Ok(0));
    assert!(fs::metadata("dir/inside").expect("stat").is_dir());
    fs::remove_dir("dir/inside").expect("rmdir");
    let mut target = [0_u8; 7];
    let link = link.expect("open the link itself");
    let got = sys!(SYS_readlinkat, link, c"".as_ptr(), target.as_mut_ptr(), target.len());
    assert_eq!((got, &target), (Ok(7), b"nowhere"));
}

fn file_directory(gate: &Gate) {
    fs::create_dir("dir").expect("mkdir");
    for n in 0..50 {
        fs::write(format!("dir/{n}"), b"").expect("write");
    }
    let dir = sys::open(c"dir", libc::O_RDONLY | libc::O_DIRECTORY).expect("open");
    let mut buffer = vec![0_u8; 300];
    // Somewhere in the middle.
    sys!(SYS_getdents64, dir, buffer.as_mut_ptr(), buffer.len()).expect("getdents64");
    let rest = |dir: i32| {
        let mut all = Vec::new();
        let mut buffer = vec![0_u8; 4096];
        loop {
            let got = sys!(SYS_getdents64, dir, buffer.as_mut_ptr(), buffer.len()).expect("getdents64");
            if got == 0 {
                return all;
            }
            all.extend_from_slice(&buffer[..got]);
        }
    };
    let place = sys::lseek(dir, 0, libc::SEEK_CUR).expect("lseek");
    let before = rest(dir);
    sys!(SYS_lseek, dir, place, libc::SEEK_SET).expect("lseek");
    gate.ready();
    assert_eq!(sys::lseek(dir, 0, libc::SEEK_CUR), Ok(place));
    assert!(rest(dir) == before, "the rest of the directory differs");
    assert!(!before.is_empty());
}

fn position(fd: i32) -> usize {
    sys::lseek(fd, 0, libc::SEEK_CUR).expect("lseek")
}

/// Descriptors of one description share its position; the numbers are any.
fn file_dup(gate: &Gate) {
    fs::write("dup", content(1000, 2)).expect("write");
    let fd = sys::open(c"dup", libc::O_RDWR).expect("open");
    let copies = [sys!(SYS_dup, fd).expect("dup") as i32, 100, 17];
    for copy in &copies[1..] {
        sys!(SYS_dup2, fd, *copy).expect("dup2");
    }
    sys!(SYS_dup3, fd, 200, libc::O_CLOEXEC).expect("dup3");
    sys::lseek(fd, 10, libc::SEEK_SET).expect("lseek");
    gate.ready();
    for (n, copy) in copies.into_iter().enumerate() {
        sys::lseek(copy, 100 + n as i64, libc::SEEK_SET).expect("lseek");
        assert_eq!(position(fd), 100 + n);
    }
    assert_eq!(position(200), 102);
    assert_eq!(sys::fcntl(200, libc::F_GETFD, 0), Ok(libc::FD_CLOEXEC));
    assert_eq!(sys::fcntl(100, libc::F_GETFD, 0), Ok(0));
    sys::fcntl(17, libc::F_SETFL, libc::O_APPEND as usize).expect("F_SETFL");
    let flags = sys::fcntl(fd, libc::F_GETFL, 0).expect("F_GETFL");
    assert_ne!(flags & libc::O_APPEND, 0, "flags belong to the description");
}

/// The child has it under another number, the parent has closed its own first one.
fn file_dup_across_fork(gate: &Gate) {
    fs::write("dup", content(1000, 3)).expect("write");
    let fd = sys::open(c"dup", libc::O_RDONLY).expect("open");
    sys!(SYS_dup2, fd, 60).expect("dup2");
    let child = fork(|| {
        sys!(SYS_dup2, fd, 30).expect("dup2");
        sys::close(fd);
        sys::close(60);
        gate.mark("child");
        gate.wait();
        gate.await_mark("parent has moved");
        assert_eq!(position(30), 5);
        sys::lseek(30, 77, libc::SEEK_SET).expect("lseek");
    });
    sys::close(fd);
    gate.await_mark("child");
    gate.ready();
    sys::lseek(60, 5, libc::SEEK_SET).expect("lseek");
    gate.mark("parent has moved");
    join(child);
    assert_eq!(position(60), 77);
}

/// Two descriptions of one file stay two.
fn file_opened_twice(gate: &Gate) {
    fs::write("twice", content(1000, 4)).expect("write");
    let one = sys::open(c"twice", libc::O_RDONLY).expect("open");
    let two = sys::open(c"twice", libc::O_RDONLY).expect("open");
    sys::lseek(one, 1, libc::SEEK_SET).expect("lseek");
    sys::lseek(two, 2, libc::SEEK_SET).expect("lseek");
    gate.ready();
    assert_eq!((position(one), position(two)), (1, 2));
    sys::lseek(one, 500, libc::SEEK_SET).expect("lseek");
    assert_eq!(position(two), 2);
}

fn file_close_on_exec(gate: &Gate) {
    fs::write("exec", b"").expect("write");
    let stays = sys::open(c"exec", libc::O_RDONLY).expect("open");
    let closes = sys::open(c"exec", libc::O_RDONLY | libc::O_CLOEXEC).expect("open");
    gate.ready();
    let child = sys::fork(|| {
        let test = format!("test -e /proc/self/fd/{stays} && ! test -e /proc/self/fd/{closes}");
        let test = CString::new(test).expect("text");
        let args = [c"sh".as_ptr(), c"-c".as_ptr(), test.as_ptr(), std::ptr::null()];
        let _ = sys!(SYS_execve, c"/bin/sh".as_ptr(), args.as_ptr(), 0);
        99
    });
    join(child);
}

fn file_high_numbers(gate: &Gate) {
    fs::write("high", content(100, 5)).expect("write");
    let fd = sys::open(c"high", libc::O_RDONLY).expect("open");
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("getrlimit");
    let highest = hard.clamp(1024, 5000) - 1;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)
        .expect("setrlimit");
    let numbers = [1000, 1023, highest as i32];
    for number in numbers {
        sys!(SYS_dup2, fd, number).expect("dup2");
    }
    gate.ready();
    sys::lseek(fd, 50, libc::SEEK_SET).expect("lseek");
    for number in numbers {
        assert_eq!(position(number), 50, "fd {number}");
    }
}

fn file_gaps_in_numbers(gate: &Gate) {
    fs::write("gaps", b"").expect("write");
    let numbers: Vec<i32> = (0..20).map(|_| sys::open(c"gaps", libc::O_RDONLY).expect("open")).collect();
    for number in numbers.iter().step_by(3) {
        sys::close(*number);
    }
    gate.ready();
    for (n, number) in numbers.iter().enumerate() {
        assert_eq!(sys::fcntl(*number, libc::F_GETFD, 0).is_ok(), n % 3 != 0, "fd {number}");
    }
    assert_eq!(sys::open(c"gaps", libc::O_RDONLY), Ok(numbers[0]), "the lowest free number");
}

/// A daemon without descriptors 0, 1 and 2.
fn file_no_stdio(gate: &Gate) {
    sys::close_from(0);
    gate.ready();
    let open = fs::read_dir("/proc/self/fd").expect("read_dir").count();
    // The directory itself.
    assert_eq!(open, 1);
    assert_eq!(sys::open(c"/dev/null", libc::O_RDWR), Ok(0));
}

/// Each process has as many as it may, and all together more than crtool may have.
fn files_more_than_one_may_open(gate: &Gate) {
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(limit).expect("getrlimit");
    nix::sys::resource::setrlimit(limit, hard, hard).expect("setrlimit");
    fs::write("many", content(100, 5)).expect("write");
    // Where the limit is high, more than it would take minutes.
    let each = i32::try_from(hard / 2).unwrap_or(i32::MAX).min(10_000);
    let children = [1, 2, 3].map(|n| {
        fork(|| {
            let place = |fd: i32| i64::from(fd * n % 90);
            let open = || sys::open(c"many", libc::O_RDONLY).expect("open");
            let fds: Vec<i32> = (0..each).map(|_| open()).collect();
            for &fd in &fds {
                sys::lseek(fd, place(fd), libc::SEEK_SET).expect("lseek");
            }
            gate.mark(["one", "two", "three"][n as usize - 1]);
            gate.wait();
            for &fd in &fds {
                assert_eq!(position(fd) as i64, place(fd), "fd {fd}");
            }
        })
    });
    ["one", "two", "three"].iter().for_each(|name| gate.await_mark(name));
    gate.ready();
    children.into_iter().for_each(join);
}

fn files_1000(gate: &Gate) {
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 2000, 2000);
    let open: Vec<fs::File> = (0..1000)
        .map(|n| {
            let name = format!("{}", n % 300);
            let mut file =
                OpenOptions::new().create(true).append(n % 2 == 0).write(true).open(&name).expect("open");
            file.write_all(&[n as u8]).expect("write");
            file.seek(SeekFrom::Start(n)).expect("seek");
            file
        })
        .collect();
    gate.ready();
    for (n, mut file) in open.into_iter().enumerate() {
        assert_eq!(file.stream_position().expect("position"), n as u64);
    }
}

/// F_SETOWN and F_SETSIG on several kinds.
fn file_owner_and_signal(gate: &Gate) {
    fs::write("owned", b"").expect("write");
    let group = sys::open(c"owned", libc::O_RDONLY).expect("open");
    sys::fcntl(group, libc::F_SETOWN, -getpid() as usize).expect("F_SETOWN");
    let (own, _) = sys::pipe(0);
    sys::fcntl(own, libc::F_SETOWN, getpid() as usize).expect("F_SETOWN");
    sys::fcntl(own, F_SETSIG, 40).expect("F_SETSIG");
    gate.ready();
    let owner = |fd| {
        let mut owner = [0_i32; 2];
        sys::fcntl(fd, F_GETOWN_EX, owner.as_mut_ptr() as usize).expect("F_GETOWN_EX");
        owner
    };
    const F_OWNER_PID: i32 = 1;
    const F_OWNER_PGRP: i32 = 2;
    assert_eq!(owner(group), [F_OWNER_PGRP, getpid()]);
    assert_eq!(owner(own), [F_OWNER_PID, getpid()]);
    assert_eq!(sys::fcntl(own, F_GETSIG, 0), Ok(40));
    assert_eq!(sys::fcntl(group, F_GETSIG, 0), Ok(0));
}

/// O_ASYNC: input on the pipe raises the chosen signal.
fn file_async_pipe(gate: &Gate) {
    let mask = sys::mask_of(&[41]);
    sys::sigprocmask(libc::SIG_BLOCK, mask);
    let (from, to) = sys::pipe(0);
    sys::fcntl(from, libc::F_SETOWN, getpid() as usize).expect("F_SETOWN");
    sys::fcntl(from, F_SETSIG, 41).expect("F_SETSIG");
    sys::fcntl(from, libc::F_SETFL, libc::O_ASYNC as usize).expect("F_SETFL");
    gate.ready();
    sys::write(to, b"x").expect("write");
    let limit = sys::timespec(crate::gate::PATIENCE);
    assert_eq!(sys!(SYS_rt_sigtimedwait, &raw const mask, 0, &raw const limit, 8), Ok(41));
}

fn ghost(name: &str, bytes: &[u8]) -> fs::File {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(name).expect("create");
    file.write_all_at(bytes, 0).expect("write");
    file
}

fn ghost_file(gate: &Gate) {
    let bytes = content(50_000, 10);
    let mut file = ghost("ghost", &bytes);
    fs::set_permissions("ghost", fs::Permissions::from_mode(0o4751)).expect("chmod");
    std::os::unix::fs::chown("ghost", Some(12), Some(34)).expect("chown");
    file.seek(SeekFrom::Start(20_000)).expect("seek");
    fs::remove_file("ghost").expect("remove");
    gate.ready();
    check_rest(&file, &bytes[20_000..]);
    let meta = file.metadata().expect("stat");
    assert_eq!((meta.nlink(), meta.len()), (0, 50_000));
    assert_eq!((meta.uid(), meta.gid()), (12, 34));
    file.write_all(b"end").expect("write");
    assert_eq!(file.metadata().expect("stat").len(), 50_003);
    assert!(!fs::exists("ghost").expect("stat"), "the name has come back");
}

/// One deleted file, opened twice, by two tasks.
fn ghost_shared(gate: &Gate) {
    let file = ghost("ghost", &content(3000, 11));
    let again = fs::File::open("ghost").expect("open");
    let child_own = fs::File::open("ghost").expect("open");
    fs::remove_file("ghost").expect("remove");
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        gate.await_mark("written");
        check_rest(&child_own, b"new");
    });
    drop(child_own);
    gate.await_mark("child");
    gate.ready();
    file.set_len(0).expect("truncate");
    file.write_all_at(b"new", 0).expect("write");
    check_rest(&again, b"new");
    assert_eq!(file.metadata().expect("stat").ino(), again.metadata().expect("stat").ino());
    gate.mark("written");
    join(child);
}

fn ghost_empty(gate: &Gate) {
    let file = ghost("ghost", b"");
    fs::remove_file("ghost").expect("remove");
    gate.ready();
    assert_eq!(file.metadata().expect("stat").len(), 0);
    file.write_all_at(b"x", 0).expect("write");
}

/// 1 GiB of holes, 12 KiB of content: within the limit, and still holes afterwards.
fn ghost_sparse(gate: &Gate) {
    let file = ghost("ghost", &content(4096, 12));
    file.write_all_at(&content(4096, 13), 500 << 20).expect("write");
    file.write_all_at(&content(4096, 14), (1 << 30) - 4096).expect("write");
    fs::remove_file("ghost").expect("remove");
    gate.ready();
    let meta = file.metadata().expect("stat");
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    for (seed, offset) in [(12, 0), (13, 500 << 20), (14, (1 << 30) - 4096)] {
        let mut bytes = vec![0; 4096];
        file.read_exact_at(&mut bytes, offset).expect("read");
        assert!(bytes == content(4096, seed), "content at {offset:#x}");
    }
    let mut bytes = vec![1; 4096];
    file.read_exact_at(&mut bytes, 300 << 20).expect("read");
    assert!(bytes.iter().all(|b| *b == 0), "a hole");
}

fn ghost_read_only(gate: &Gate) {
    drop(ghost("ghost", &content(100, 15)));
    let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).clone();
    let file = options.open("ghost").expect("open");
    fs::set_permissions("ghost", fs::Permissions::from_mode(0o400)).expect("chmod");
    fs::remove_file("ghost").expect("remove");
    gate.ready();
    check_rest(&file, &content(100, 15));
    assert!(file.write_all_at(b"x", 0).is_err(), "opened for reading only");
}

/// More than the megabyte that travels without being asked for.
fn ghost_too_large(gate: &Gate) {
    let bytes = content(2 << 20, 16);
    let file = ghost("ghost", &bytes);
    fs::remove_file("ghost").expect("remove");
    gate.ready();
    check_rest(&file, &bytes);
}

fn ghost_directory(gate: &Gate) {
    fs::create_dir("gone").expect("mkdir");
    let dir = fs::File::open("gone").expect("open");
    fs::remove_dir("gone").expect("rmdir");
    gate.ready();
    assert!(dir.metadata().expect("stat").is_dir());
    assert!(!fs::exists("gone").expect("stat"), "the name has come back");
}

/// O_TMPFILE: a file that never had a name.
fn ghost_tmpfile(gate: &Gate) {
    let Ok(fd) = sys::open(c".", libc::O_TMPFILE | libc::O_RDWR) else {
        gate.skip("this file system has no O_TMPFILE");
    };
    assert_eq!(sys::write(fd, b"nameless"), Ok(8));
    gate.ready();
    sys::lseek(fd, 0, libc::SEEK_SET).expect("lseek");
    assert_eq!(sys::read(fd, 100), Ok(b"nameless".to_vec()));
}

/// Deleted, and its name belongs to another file now, which must not be taken for it.
fn ghost_name_taken(gate: &Gate) {
    let old = ghost("name", b"the old one");
    fs::remove_file("name").expect("remove");
    fs::write("name", b"the new one").expect("write");
    let replaced = ghost("target", b"replaced by rename");
    fs::write("other", b"after rename").expect("write");
    fs::rename("other", "target").expect("rename");
    gate.ready();
    check_rest(&old, b"the old one");
    assert_eq!(fs::read("name").expect("read"), b"the new one");
    check_rest(&replaced, b"replaced by rename");
    assert_eq!(fs::read("target").expect("read"), b"after rename");
}

/// The name it was opened by is gone, another one is left: it is still that file.
fn linked_elsewhere(gate: &Gate) {
    let file = ghost("first", b"both names");
    fs::hard_link("first", "second").expect("link");
    fs::remove_file("first").expect("remove");
    gate.ready();
    check_rest(&file, b"both names");
    let (ours, theirs) = (file.metadata().expect("stat"), fs::metadata("second").expect("stat"));
    assert_eq!((ours.dev(), ours.ino()), (theirs.dev(), theirs.ino()));
    assert_eq!(theirs.nlink(), 1, "no further name is left behind");
    assert!(!fs::exists("first").expect("stat"), "the old name has come back");
}

fn open_device(path: &std::ffi::CStr, flags: i32) -> i32 {
    sys::open(path, flags).unwrap_or_else(|e| panic!("open {path:?}: errno {e}"))
}

fn devices(gate: &Gate) {
    let null = open_device(c"/dev/null", libc::O_RDWR | libc::O_APPEND);
    let zero = open_device(c"/dev/zero", libc::O_RDONLY);
    let urandom = open_device(c"/dev/urandom", libc::O_RDONLY);
    let again = open_device(c"/dev/null", libc::O_WRONLY);
    gate.ready();
    assert_eq!(sys::write(null, b"gone"), Ok(4));
    assert_eq!(sys::read(null, 4), Ok(vec![]));
    assert_eq!(sys::read(zero, 4), Ok(vec![0; 4]));
    assert_eq!(sys::read(urandom, 32).map(|b| b.len()), Ok(32));
    assert_eq!(sys::read(again, 4), Err(libc::EBADF));
}

fn device_full_and_random(gate: &Gate) {
    let full = open_device(c"/dev/full", libc::O_RDWR);
    let random = open_device(c"/dev/random", libc::O_RDONLY);
    gate.ready();
    assert_eq!(sys::write(full, b"x"), Err(libc::ENOSPC));
    assert_eq!(sys::read(full, 3), Ok(vec![0; 3]));
    assert!(sys::read(random, 4).is_ok());
}

fn device_kmsg(gate: &Gate) {
    if sys::open(c"/dev/kmsg", libc::O_RDONLY | libc::O_NONBLOCK).is_err() {
        gate.skip("no /dev/kmsg");
    }
    gate.ready();
}

/// The file shows the task that opened it: after the restore the same one, alive.
fn proc_self_status(gate: &Gate) {
    let mut status = fs::File::open("/proc/self/status").expect("open");
    let stat = fs::File::open("/proc/self/task").expect("open");
    status.seek(SeekFrom::Start(5)).expect("seek");
    gate.ready();
    assert_eq!(status.stream_position().expect("position"), 5);
    status.seek(SeekFrom::Start(0)).expect("seek");
    let mut text = String::new();
    status.read_to_string(&mut text).expect("read");
    let pid = getpid();
    assert!(text.contains(&format!("\nPid:\t{pid}\n")), "{text}");
    assert!(stat.metadata().expect("stat").is_dir());
}

fn proc_of_child(gate: &Gate) {
    let child = fork(|| gate.wait());
    let name = format!("/proc/{child}/oom_score_adj");
    let mut score = OpenOptions::new().read(true).write(true).open(&name).expect("open");
    let dir = fs::File::open(format!("/proc/{child}")).expect("open");
    gate.ready();
    score.write_all(b"123").expect("write");
    assert_eq!(fs::read(&name).expect("read"), b"123\n");
    let fd = dir.into_raw_fd();
    let stat = sys!(SYS_openat, fd, c"stat".as_ptr(), libc::O_RDONLY).expect("openat");
    let text = sys::read(sys::int(stat), 100).expect("read");
    assert!(text.starts_with(format!("{child} (").as_bytes()));
    join(child);
}

fn proc_global(gate: &Gate) {
    let mut uptime = fs::File::open("/proc/uptime").expect("open");
    let sysctl = fs::File::open("/proc/sys/kernel/ostype").expect("open");
    gate.ready();
    let mut text = String::new();
    uptime.read_to_string(&mut text).expect("read");
    assert!(text.contains('.'), "{text:?}");
    check_rest(&sysctl, b"Linux\n");
}

/// A file below /proc of a task that is gone: reading it says so, before and after.
fn proc_of_dead(gate: &Gate) {
    let child = fork(|| gate.await_mark("die"));
    let file = fs::File::open(format!("/proc/{child}/stat")).expect("open");
    gate.mark("die");
    join(child);
    let read = |file: &fs::File| {
        let mut byte = [0];
        file.read_at(&mut byte, 0).map_err(|e| e.raw_os_error())
    };
    assert_eq!(read(&file), Err(Some(libc::ESRCH)));
    gate.ready();
    assert_eq!(read(&file), Err(Some(libc::ESRCH)));
}

/// The current directory is that of a process under /proc that has ended.
fn directory_of_dead(gate: &Gate) {
    let child = fork(|| {
        loop {
            sys::nap(std::time::Duration::from_secs(1));
        }
    });
    let work = std::env::current_dir().expect("current directory");
    std::env::set_current_dir(format!("/proc/{child}")).expect("chdir");
    sys::kill(child, libc::SIGKILL);
    sys::waitpid(child, 0).expect("waitpid");
    let name = fs::read_link("/proc/self/cwd").expect("readlink");
    gate.ready();
    assert_eq!(fs::read_link("/proc/self/cwd").expect("readlink"), name);
    assert!(fs::read_link(format!("/proc/{child}/exe")).is_err(), "somebody has its pid");
    std::env::set_current_dir(work).expect("chdir");
}

fn sys_file(gate: &Gate) {
    let Ok(mut file) = fs::File::open("/sys/kernel/mm/transparent_hugepage/enabled") else {
        gate.skip("no such file in /sys");
    };
    let mut before = String::new();
    file.read_to_string(&mut before).expect("read");
    gate.ready();
    file.seek(SeekFrom::Start(0)).expect("seek");
    check_rest(&file, before.as_bytes());
    assert!(file.as_raw_fd() > 2);
}

/// Files of a thread, by both of its names, and of a descriptor: there is nothing to be opened before those are made.
fn proc_of_thread(gate: &Gate) {
    let (send, receive) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        send.send(sys::gettid()).expect("send");
        let _ = ended.recv();
    });
    let tid = receive.recv().expect("tid");
    let open = |name: &str, flags: i32| {
        OpenOptions::new().read(true).write(flags & 1 != 0).custom_flags(flags & !3).open(name).expect(name)
    };
    let mut comm = open(&format!("/proc/self/task/{tid}/comm"), 1);
    let mut status = open(&format!("/proc/{tid}/status"), 0);
    let dir = open(&format!("/proc/self/task/{tid}"), libc::O_DIRECTORY);
    let path = open(&format!("/proc/self/task/{tid}/stat"), libc::O_PATH);
    let file = fs::File::open("/dev/null").expect("open");
    let info = open(&format!("/proc/self/fdinfo/{}", file.as_raw_fd()), 0);
    let link = open(&format!("/proc/self/fd/{}", file.as_raw_fd()), libc::O_PATH | libc::O_NOFOLLOW);
    let copy = comm.try_clone().expect("dup");
    status.seek(SeekFrom::Start(3)).expect("seek");
    gate.ready();
    comm.write_all(b"renamed").expect("write");
    assert_eq!(fs::read(format!("/proc/self/task/{tid}/comm")).expect("read"), b"renamed\n");
    assert_eq!(status.stream_position().expect("position"), 3);
    status.seek(SeekFrom::Start(0)).expect("seek");
    let mut text = String::new();
    status.read_to_string(&mut text).expect("read");
    assert!(text.contains(&format!("\nPid:\t{tid}\n")), "{text}");
    let name = |file: &fs::File| {
        fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("readlink").display().to_string()
    };
    let pid = getpid();
    assert_eq!(name(&copy), format!("/proc/{pid}/task/{tid}/comm").as_str());
    assert_eq!(name(&dir), format!("/proc/{pid}/task/{tid}").as_str());
    assert_eq!(name(&path), format!("/proc/{pid}/task/{tid}/stat").as_str());
    assert_eq!(name(&link), format!("/proc/{pid}/fd/{}", file.as_raw_fd()).as_str());
    let mut bytes = [0; 4];
    info.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"pos:");
    drop(end);
    thread.join().expect("join");
}

/// Memory of a member of the tree, and what it looks like.
fn proc_memory(gate: &Gate) {
    let memory = sys::anon(4096);
    memory.set::<u64>(8, 77);
    let child = fork(|| {
        memory.set::<u64>(8, 78);
        gate.mark("child");
        gate.wait();
        gate.await_mark("written");
        assert_eq!(memory.get::<u64>(8), 79);
    });
    gate.await_mark("child");
    let open = |pid: &str, name: &str| {
        let file = OpenOptions::new().read(true).write(name == "mem").open(format!("/proc/{pid}/{name}"));
        file.expect("open")
    };
    let (own, of_child) = (open("self", "mem"), open(&child.to_string(), "mem"));
    let others = ["maps", "pagemap", "environ", "auxv", "smaps"].map(|name| open(&child.to_string(), name));
    gate.ready();
    let word = |file: &fs::File| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, memory.at(8) as u64).expect("read memory");
        u64::from_ne_bytes(word)
    };
    assert_eq!((word(&own), word(&of_child)), (77, 78));
    of_child.write_all_at(&79_u64.to_ne_bytes(), memory.at(8) as u64).expect("write memory");
    for mut file in others {
        file.seek(SeekFrom::Start(0)).expect("seek");
        assert!(file.read(&mut [0; 64]).expect("read") > 0);
    }
    gate.mark("written");
    join(child);
}

/// A process that has run another program since its memory was opened: another memory has its name now.
fn proc_memory_of_another_program(gate: &Gate) {
    let child = sys::fork(|| {
        gate.await_mark("run");
        let arguments = [c"sleep".as_ptr(), c"1000".as_ptr(), std::ptr::null()];
        let environment = [std::ptr::null::<i8>()];
        let _ = sys!(SYS_execve, c"/bin/sleep".as_ptr(), arguments.as_ptr(), environment.as_ptr());
        1
    });
    let file = fs::File::open(format!("/proc/{child}/mem")).expect("open");
    gate.mark("run");
    while !fs::read_link(format!("/proc/{child}/exe")).is_ok_and(|exe| exe.ends_with("sleep")) {
        sys::nap(std::time::Duration::from_millis(1));
    }
    crate::gate::until_state(child, 'S');
    gate.ready();
    drop(file);
    sys::kill(child, libc::SIGKILL);
    sys::waitpid(child, 0).expect("waitpid");
}

/// A process that is not of the tree: after a restore its pid may be another's.
fn proc_of_stranger(gate: &Gate) {
    let file = fs::File::open("/proc/1/status").expect("open");
    gate.ready();
    drop(file);
}

/// A descriptor of another process: nobody could open it for us in time.
fn proc_of_descriptor_of_another(gate: &Gate) {
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
    });
    gate.await_mark("child");
    let file = fs::File::open(format!("/proc/{child}/fdinfo/0")).expect("open");
    gate.ready();
    drop(file);
    join(child);
}

/// The thread of another process, also as the current directory.
fn proc_of_thread_of_another(gate: &Gate) {
    let child = fork(|| {
        let own = gate.clone_for_thread();
        let thread = std::thread::spawn(move || {
            fs::write("tid", sys::gettid().to_string()).expect("write");
            own.mark("thread");
            own.wait();
            own.await_mark("looked");
        });
        thread.join().expect("join");
    });
    gate.await_mark("thread");
    let tid = fs::read_to_string("tid").expect("read");
    let file = fs::File::open(format!("/proc/{child}/task/{tid}/status")).expect("open");
    let work = std::env::current_dir().expect("current directory");
    std::env::set_current_dir(format!("/proc/{child}/task/{tid}")).expect("chdir");
    gate.ready();
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"Name:");
    assert!(fs::exists("comm").expect("stat"));
    std::env::set_current_dir(work).expect("chdir");
    gate.mark("looked");
    join(child);
}

/// The thread has ended, its process has not.
fn proc_of_dead_thread(gate: &Gate) {
    let tid = std::sync::Arc::new(std::sync::atomic::AtomicI32::new(0));
    let own = std::sync::Arc::clone(&tid);
    let file = std::thread::spawn(move || {
        own.store(sys::gettid(), std::sync::atomic::Ordering::Release);
        fs::File::open("/proc/thread-self/comm").expect("open")
    });
    let file = file.join().expect("join");
    let tid = tid.load(std::sync::atomic::Ordering::Acquire);
    while fs::exists(format!("/proc/self/task/{tid}")).expect("stat") {
        sys::nap(std::time::Duration::from_millis(1));
    }
    gate.ready();
    drop(file);
}
