//! Mapped files: private and shared, changed, deleted, longer or shorter than the mapping; memfd.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;

use crate::case::{Case, Site};
use crate::gate::{Gate, fork, join};
use crate::sys::{self, Mapped, int};

pub const CASES: &[Case] = &[
    Case::new("file_private", file_private),
    Case::new("file_private_changed", file_private_changed).fifty(),
    Case::new("file_private_relro", file_private_relro),
    Case::new("file_private_in_child", file_private_in_child),
    Case::new("file_shared", file_shared),
    Case::new("file_shared_by_two", file_shared_by_two),
    Case::new("file_shared_read_only", file_shared_read_only),
    Case::new("file_beyond_end", file_beyond_end),
    Case::new("file_odd_size", file_odd_size),
    Case::new("file_at_offset", file_at_offset),
    Case::new("file_renamed", file_renamed),
    Case::new("file_deleted_private", file_deleted_private),
    Case::new("file_deleted_shared", file_deleted_shared),
    Case::new("file_deleted_with_fd", file_deleted_with_fd),
    Case::new("file_linked_elsewhere", file_linked_elsewhere).flags(&["--link-remap"]).not_running(),
    Case::new("file_grown_since", file_private).between(grow).restore_refused("mapped").only_plain(),
    Case::new("file_gone_since", file_private).between(remove).restore_refused("mapped").only_plain(),
    Case::new("file_on_tmpfs", file_on_tmpfs),
    Case::new("own_binary_changed", own_binary_changed),
    Case::new("memfd_shared", memfd_shared),
    Case::new("memfd_private", memfd_private),
    Case::new("memfd_without_fd", memfd_without_fd),
    Case::new("memfd_sealed_mapping", memfd_sealed_mapping),
    Case::new("memfd_in_child", memfd_in_child),
    Case::new("memfd_huge_pages", memfd_huge_pages),
    Case::new("memfd_executed", memfd_executed).peer_fails("opens it anew, as a writer (ETXTBSY)"),
    Case::new("memfd_program", memfd_program).peer_fails("opens it anew, as a writer (ETXTBSY)"),
    Case::new("device_memory", device_memory).refused("/dev/mem"),
];

const PAGE: usize = 4096;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_WRITE;

/// A file of `len` bytes with the pattern of `seed`, open for reading and writing.
fn file(name: &str, len: usize, seed: u64) -> fs::File {
    let mut bytes: Vec<u8> =
        (0..len.next_multiple_of(8)).step_by(8).flat_map(|o| sys::pattern(seed, o).to_ne_bytes()).collect();
    bytes.truncate(len);
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(name).expect("create");
    file.write_all_at(&bytes, 0).expect("fill the file");
    file
}

fn map(file: &impl AsRawFd, len: usize, access: i32, flags: i32) -> Mapped {
    sys::mmap(0, len, access, flags, file.as_raw_fd(), 0).expect("mmap a file")
}

#[track_caller]
fn check_file(name: &str, seed: u64) {
    let bytes = fs::read(name).expect("read the file");
    for (n, word) in bytes.chunks_exact(8).enumerate() {
        assert_eq!(word, sys::pattern(seed, n * 8).to_ne_bytes(), "{name} at offset {}", n * 8);
    }
}

fn file_private(gate: &Gate) {
    let memory = map(&file("mapped", 8 * PAGE, 1), 8 * PAGE, READ, libc::MAP_PRIVATE);
    gate.ready();
    memory.check(1);
}

fn grow(site: &Site<'_>) {
    let file = OpenOptions::new().write(true).open(site.dir.join("mapped")).expect("open");
    file.set_len(100_000).expect("set_len");
}

fn remove(site: &Site<'_>) {
    fs::remove_file(site.dir.join("mapped")).expect("remove");
}

/// Odd pages are changed, even ones still the file's.
fn change_odd(memory: Mapped, pages: usize, value: u64) {
    for page in (1..pages).step_by(2) {
        memory.set(page * PAGE + 24, value + page as u64);
    }
}

#[track_caller]
fn check_odd(memory: Mapped, pages: usize, seed: u64, value: u64) {
    for page in 0..pages {
        for offset in (page * PAGE..(page + 1) * PAGE).step_by(8) {
            let changed = page % 2 == 1 && offset % PAGE == 24;
            let want = if changed { value + page as u64 } else { sys::pattern(seed, offset) };
            assert_eq!(memory.get::<u64>(offset), want, "at {offset:#x}");
        }
    }
}

fn file_private_changed(gate: &Gate) {
    let memory = map(&file("mapped", 16 * PAGE, 2), 16 * PAGE, READ | WRITE, libc::MAP_PRIVATE);
    change_odd(memory, 16, 0x100);
    gate.ready();
    check_odd(memory, 16, 2, 0x100);
    change_odd(memory, 16, 0x200);
    check_odd(memory, 16, 2, 0x200);
    check_file("mapped", 2);
}

/// Changed first, then read-only, as a dynamic linker does with relocations.
fn file_private_relro(gate: &Gate) {
    let memory = map(&file("mapped", 8 * PAGE, 3), 8 * PAGE, READ | WRITE, libc::MAP_PRIVATE);
    change_odd(memory, 8, 0x300);
    sys!(SYS_mprotect, memory.addr, 4 * PAGE, READ).expect("mprotect");
    sys!(SYS_mprotect, memory.at(4 * PAGE), 2 * PAGE, libc::PROT_NONE).expect("mprotect");
    gate.ready();
    sys!(SYS_mprotect, memory.addr, memory.len, READ).expect("mprotect");
    check_odd(memory, 8, 3, 0x300);
}

fn file_private_in_child(gate: &Gate) {
    let memory = map(&file("mapped", 16 * PAGE, 4), 16 * PAGE, READ | WRITE, libc::MAP_PRIVATE);
    change_odd(memory, 8, 0x400);
    let child = fork(|| {
        change_odd(memory, 16, 0x500);
        gate.mark("child");
        gate.wait();
        check_odd(memory, 16, 4, 0x500);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    check_odd(Mapped { addr: memory.addr, len: 8 * PAGE }, 8, 4, 0x400);
    for offset in (8 * PAGE..16 * PAGE).step_by(8) {
        assert_eq!(memory.get::<u64>(offset), sys::pattern(4, offset));
    }
}

fn file_shared(gate: &Gate) {
    let memory = map(&file("mapped", 8 * PAGE, 5), 8 * PAGE, READ | WRITE, libc::MAP_SHARED);
    memory.fill(6);
    gate.ready();
    memory.check(6);
    check_file("mapped", 6);
    memory.fill(7);
    check_file("mapped", 7);
}

fn file_shared_by_two(gate: &Gate) {
    let memory = map(&file("mapped", 8 * PAGE, 8), 8 * PAGE, READ | WRITE, libc::MAP_SHARED);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        memory.check(8);
        memory.fill(9);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    memory.check(9);
}

/// Opened for reading only: the mapping can never become writable, which smaps shows.
fn file_shared_read_only(gate: &Gate) {
    drop(file("mapped", 4 * PAGE, 10));
    let memory = map(&fs::File::open("mapped").expect("open"), 4 * PAGE, READ, libc::MAP_SHARED);
    gate.ready();
    memory.check(10);
    assert_eq!(sys!(SYS_mprotect, memory.addr, PAGE, READ | WRITE), Err(libc::EACCES));
}

/// The mapping goes on where the file has ended: changed pages there are impossible, reading faults.
fn file_beyond_end(gate: &Gate) {
    let shared = map(&file("mapped", 2 * PAGE, 11), 6 * PAGE, READ | WRITE, libc::MAP_SHARED);
    let file = file("private", 6 * PAGE, 12);
    let private = map(&file, 6 * PAGE, READ | WRITE, libc::MAP_PRIVATE);
    change_odd(private, 6, 0x600);
    // Cut off after two pages: the kernel drops the changed copies beyond the end, too.
    file.set_len(2 * PAGE as u64).expect("set_len");
    gate.ready();
    Mapped { addr: shared.addr, len: 2 * PAGE }.check(11);
    check_odd(Mapped { addr: private.addr, len: 2 * PAGE }, 2, 12, 0x600);
    // When the file grows, the pages are there.
    let grown = OpenOptions::new().write(true).open("mapped").expect("open");
    grown.set_len(6 * PAGE as u64).expect("set_len");
    assert_eq!(shared.get::<u64>(5 * PAGE), 0);
    shared.set(5 * PAGE, 0x11_u64);
    let mut word = [0; 8];
    fs::File::open("mapped").expect("open").read_exact_at(&mut word, 5 * PAGE as u64).expect("read");
    assert_eq!(word, 0x11_u64.to_ne_bytes());
}

/// The rest of the last page belongs to the mapping, not to the file.
fn file_odd_size(gate: &Gate) {
    let memory = map(&file("mapped", 5000, 13), 2 * PAGE, READ | WRITE, libc::MAP_PRIVATE);
    memory.set(5000, *b"tail");
    memory.set(2 * PAGE - 8, 0xabc_u64);
    gate.ready();
    assert_eq!(memory.get::<[u8; 4]>(5000), *b"tail");
    assert_eq!(memory.get::<u64>(2 * PAGE - 8), 0xabc);
    assert_eq!(memory.get::<u64>(4992), sys::pattern(13, 4992));
    assert_eq!(fs::metadata("mapped").expect("stat").len(), 5000);
}

fn file_at_offset(gate: &Gate) {
    let file = file("mapped", 8 * PAGE, 14);
    let far: u64 = 5 << 30;
    file.write_all_at(b"far away", far + 8).expect("write");
    let flags = libc::MAP_PRIVATE;
    let near = sys::mmap(0, 2 * PAGE, READ | WRITE, flags, file.as_raw_fd(), 3 * PAGE as i64).expect("mmap");
    let away = sys::mmap(0, PAGE, READ, flags, file.as_raw_fd(), far as i64).expect("mmap");
    near.set(PAGE, 0x700_u64);
    gate.ready();
    assert_eq!(near.get::<u64>(0), sys::pattern(14, 3 * PAGE));
    assert_eq!(near.get::<u64>(PAGE), 0x700);
    assert_eq!(away.get::<[u8; 8]>(8), *b"far away");
}

fn file_renamed(gate: &Gate) {
    let memory = map(&file("before", 4 * PAGE, 15), 4 * PAGE, READ, libc::MAP_PRIVATE);
    fs::rename("before", "after").expect("rename");
    gate.ready();
    memory.check(15);
}

fn file_deleted_private(gate: &Gate) {
    let memory = map(&file("gone", 8 * PAGE, 16), 8 * PAGE, READ | WRITE, libc::MAP_PRIVATE);
    fs::remove_file("gone").expect("remove");
    change_odd(memory, 8, 0x800);
    gate.ready();
    check_odd(memory, 8, 16, 0x800);
}

fn file_deleted_shared(gate: &Gate) {
    let memory = map(&file("gone", 8 * PAGE, 17), 8 * PAGE, READ | WRITE, libc::MAP_SHARED);
    fs::remove_file("gone").expect("remove");
    memory.fill(18);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        memory.check(18);
        memory.fill(19);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    memory.check(19);
}

/// The descriptor and the mapping are still one file.
fn file_deleted_with_fd(gate: &Gate) {
    let file = file("gone", 4 * PAGE, 20);
    let memory = map(&file, 4 * PAGE, READ | WRITE, libc::MAP_SHARED);
    fs::remove_file("gone").expect("remove");
    gate.ready();
    memory.check(20);
    memory.set(PAGE, 0x900_u64);
    let mut word = [0; 8];
    file.read_exact_at(&mut word, PAGE as u64).expect("read");
    assert_eq!(word, 0x900_u64.to_ne_bytes());
}

fn file_linked_elsewhere(gate: &Gate) {
    let memory = map(&file("first", 4 * PAGE, 21), 4 * PAGE, READ | WRITE, libc::MAP_SHARED);
    fs::hard_link("first", "second").expect("link");
    fs::remove_file("first").expect("remove");
    gate.ready();
    memory.check(21);
    memory.fill(22);
    check_file("second", 22);
}

fn file_on_tmpfs(gate: &Gate) {
    let name = format!("/dev/shm/live-{}-{}", std::process::id(), gate.token());
    let memory = map(&file(&name, 4 * PAGE, 23), 4 * PAGE, READ | WRITE, libc::MAP_SHARED);
    gate.ready();
    memory.fill(24);
    check_file(&name, 24);
    if !gate.is_original() {
        fs::remove_file(&name).expect("remove");
    }
}

static CHANGED: [std::sync::atomic::AtomicU64; 1024] = [const { std::sync::atomic::AtomicU64::new(7) }; 1024];

/// The data segment of the program itself: private pages of its file, changed.
fn own_binary_changed(gate: &Gate) {
    let data = Mapped { addr: (&raw const CHANGED).expose_provenance(), len: 8192 };
    data.fill(25);
    gate.ready();
    data.check(25);
}

fn memfd(flags: u32, len: usize) -> i32 {
    let fd = int(sys!(SYS_memfd_create, c"live memory".as_ptr(), flags).expect("memfd_create"));
    sys!(SYS_ftruncate, fd, len).expect("ftruncate");
    fd
}

fn memfd_shared(gate: &Gate) {
    let fd = memfd(0, 8 * PAGE);
    let memory = map(&Fd(fd), 8 * PAGE, READ | WRITE, libc::MAP_SHARED);
    memory.fill(30);
    gate.ready();
    memory.check(30);
    memory.fill(31);
    let bytes = fs::read(format!("/proc/self/fd/{fd}")).expect("read the memfd");
    assert_eq!(bytes[8..16], sys::pattern(31, 8).to_ne_bytes());
}

/// For `map`: a bare descriptor.
struct Fd(i32);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> i32 {
        self.0
    }
}

fn memfd_private(gate: &Gate) {
    let fd = memfd(0, 8 * PAGE);
    map(&Fd(fd), 8 * PAGE, READ | WRITE, libc::MAP_SHARED).fill(32);
    let memory = map(&Fd(fd), 8 * PAGE, READ | WRITE, libc::MAP_PRIVATE);
    change_odd(memory, 8, 0xa00);
    gate.ready();
    check_odd(memory, 8, 32, 0xa00);
}

fn memfd_without_fd(gate: &Gate) {
    let fd = memfd(0, 8 * PAGE);
    let memory = map(&Fd(fd), 8 * PAGE, READ | WRITE, libc::MAP_SHARED);
    sys::close(fd);
    memory.fill(33);
    gate.ready();
    memory.check(33);
}

fn memfd_sealed_mapping(gate: &Gate) {
    const F_SEAL_FUTURE_WRITE: i32 = 0x10;
    let fd = memfd(libc::MFD_ALLOW_SEALING, 4 * PAGE);
    let memory = map(&Fd(fd), 4 * PAGE, READ | WRITE, libc::MAP_SHARED);
    memory.fill(34);
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE;
    sys::fcntl(fd, libc::F_ADD_SEALS, seals as usize).expect("F_ADD_SEALS");
    gate.ready();
    assert_eq!(sys::fcntl(fd, libc::F_GET_SEALS, 0), Ok(seals));
    memory.check(34);
    memory.fill(35);
    assert_eq!(sys::write(fd, b"x"), Err(libc::EPERM));
}

fn memfd_in_child(gate: &Gate) {
    let fd = memfd(0, 4 * PAGE);
    let memory = map(&Fd(fd), 4 * PAGE, READ | WRITE, libc::MAP_SHARED);
    memory.fill(36);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        memory.check(36);
        memory.fill(37);
        assert_eq!(sys::lseek(fd, 0, libc::SEEK_CUR), Ok(0));
        sys::lseek(fd, 4, libc::SEEK_SET).expect("lseek");
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    memory.check(37);
    assert_eq!(sys::lseek(fd, 0, libc::SEEK_CUR), Ok(4), "one description");
}

fn memfd_huge_pages(gate: &Gate) {
    let _ = fs::write("/proc/sys/vm/nr_overcommit_hugepages", "64");
    let Ok(fd) = sys!(SYS_memfd_create, c"huge".as_ptr(), libc::MFD_HUGETLB) else {
        gate.skip("no memfd with huge pages");
    };
    let fd = int(fd);
    sys!(SYS_ftruncate, fd, 2 << 20).expect("ftruncate");
    let memory = match sys::mmap(0, 2 << 20, READ | WRITE, libc::MAP_SHARED, fd, 0) {
        Ok(memory) => memory,
        Err(errno) => gate.skip(&format!("no huge pages to be had: errno {errno}")),
    };
    memory.fill(38);
    gate.ready();
    memory.check(38);
}

/// Runs the program in a memory file; its exit status.
fn run(fd: i32) -> Result<i32, i32> {
    let arguments = [c"true".as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<i8>()];
    let child = sys::fork(|| {
        let at = libc::AT_EMPTY_PATH;
        let failed = sys!(SYS_execveat, fd, c"".as_ptr(), arguments.as_ptr(), environment.as_ptr(), at);
        100 + failed.expect_err("execveat came back")
    });
    sys::waitpid(child, 0).map(|(_, status)| status >> 8 & 0xff)
}

/// What memfd_create gave is no writer to the kernel; what was opened through /proc is one.
fn memfd_executed(gate: &Gate) {
    let program = fs::read("/bin/true").expect("read");
    let fd = int(sys!(SYS_memfd_create, c"program".as_ptr(), 0).expect("memfd_create"));
    for piece in program.chunks(1 << 16) {
        assert_eq!(sys::write(fd, piece), Ok(piece.len()));
    }
    let again = |flags| {
        let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).expect("path");
        sys::open(&path, flags).expect("open")
    };
    let (reader, path) = (again(libc::O_RDONLY), again(libc::O_PATH));
    let memory = sys::mmap(0, PAGE, READ | WRITE, libc::MAP_SHARED, fd, 0).expect("mmap");
    assert_eq!([fd, reader, path].map(run), [Ok(0); 3]);
    gate.ready();
    assert_eq!([fd, reader, path].map(run), [Ok(0); 3]);
    assert_eq!(memory.get::<[u8; 4]>(0), *b"\x7fELF");
    let writer = again(libc::O_RDWR);
    assert_eq!(run(fd), Ok(100 + libc::ETXTBSY));
    sys::close(writer);
    sys::close(fd);
    assert_eq!(run(reader), Ok(0));
}

/// A process whose program is a memory file.
fn memfd_program(gate: &Gate) {
    let program = fs::read("/bin/sleep").expect("read");
    let fd = int(sys!(SYS_memfd_create, c"sleep".as_ptr(), libc::MFD_CLOEXEC).expect("memfd_create"));
    for piece in program.chunks(1 << 16) {
        assert_eq!(sys::write(fd, piece), Ok(piece.len()));
    }
    let arguments = [c"sleep".as_ptr(), c"1000".as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<i8>()];
    let child = sys::fork(|| {
        let at = libc::AT_EMPTY_PATH;
        let _ = sys!(SYS_execveat, fd, c"".as_ptr(), arguments.as_ptr(), environment.as_ptr(), at);
        1
    });
    let exe = format!("/proc/{child}/exe");
    let runs = || fs::read_link(&exe).is_ok_and(|link| link.as_os_str() == "/memfd:sleep (deleted)");
    while !runs() {
        sys::nap(std::time::Duration::from_millis(1));
    }
    crate::gate::until_state(child, 'S');
    gate.ready();
    assert!(runs(), "{:?}", fs::read_link(&exe));
    assert_eq!(fs::read(&exe).expect("read"), program);
    sys::kill(child, libc::SIGKILL);
    sys::waitpid(child, 0).expect("waitpid");
}

fn device_memory(gate: &Gate) {
    let Ok(file) = fs::File::open("/dev/mem") else {
        gate.skip("no /dev/mem");
    };
    let fd = file.into_raw_fd();
    if sys::mmap(0, PAGE, READ, libc::MAP_SHARED, fd, 0xf_0000).is_err() {
        gate.skip("/dev/mem cannot be mapped");
    }
    sys::close(fd);
    gate.ready();
}
