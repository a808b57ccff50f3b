//! Private mappings of objects that others share: pages that were changed are the mapping's own, all others follow
//! the object.

use crate::case::Case;
use crate::cases::memory::{MIB, PAGE, READ, WRITE, part, protect, readable};
use crate::gate::{Gate, fork, join};
use crate::sys::{self, Mapped};

const PEER: &str = "refuses pages of private mappings of shared anonymous memory";

pub const CASES: &[Case] = &[
    Case::new("private_of_shared", private_of_shared).peer_fails(PEER).disturbed(),
    Case::new("private_of_shared_alone", private_of_shared_alone).peer_fails(PEER),
    Case::new("private_of_shared_read_only", private_of_shared_read_only).peer_fails(PEER),
    Case::new("private_of_shared_in_children", private_of_shared_in_children).peer_fails(PEER),
    Case::new("private_of_shared_cut", private_of_shared_cut).peer_fails(PEER),
    Case::new("private_of_shared_huge", private_of_shared_huge).peer_fails(PEER),
    Case::new("private_of_shared_and_descriptor", private_of_shared_and_descriptor).refused("shared memory"),
    Case::new("private_of_memfd", private_of_memfd),
    Case::new("private_of_memfd_in_children", private_of_memfd_in_children),
    Case::new("private_of_memfd_cut", private_of_memfd_cut),
    Case::new("private_of_memfd_huge", private_of_memfd_huge),
    Case::new("private_of_deleted", private_of_deleted),
    Case::new("private_of_dev_zero", private_of_dev_zero).peer_fails(PEER),
    Case::new("private_of_sysv", private_of_sysv).refused("System V"),
];

/// The object behind a shared mapping, as a file.
fn object_of(memory: Mapped) -> i32 {
    let path = format!("/proc/self/map_files/{:x}-{:x}\0", memory.addr, memory.addr + memory.len);
    let path = std::ffi::CStr::from_bytes_with_nul(path.as_bytes()).expect("path");
    sys::open(path, libc::O_RDWR).expect("open map_files")
}

fn map(fd: i32, len: usize, access: i32, flags: i32, offset: usize) -> Mapped {
    sys::mmap(0, len, access, flags, fd, offset as i64).expect("mmap")
}

/// Pages 0 to 5 of the object are filled but for page 4; pages 1 to 5 are mapped privately, and of these the second and the
/// fourth are changed.
#[derive(Clone, Copy)]
struct Pair {
    object: Mapped,
    private: Mapped,
    unit: usize,
}

impl Pair {
    fn new(fd: i32, object: Mapped, unit: usize) -> Pair {
        for page in [0, 1, 2, 3, 5] {
            part(object, page * unit, unit).fill(page as u64);
        }
        let private = map(fd, 5 * unit, READ | WRITE, libc::MAP_PRIVATE, unit);
        let pair = Pair { object, private, unit };
        pair.page(1).fill(11);
        pair.page(3).fill(13);
        pair
    }

    fn page(&self, number: usize) -> Mapped {
        part(self.private, number * self.unit, self.unit)
    }

    fn of_object(&self, number: usize) -> Mapped {
        part(self.object, number * self.unit, self.unit)
    }

    #[track_caller]
    fn check_private(&self) {
        self.page(0).check(1);
        self.page(1).check(11);
        self.page(2).check(3);
        self.page(3).check(13);
        self.page(4).check(5);
    }

    #[track_caller]
    fn check(&self) {
        self.check_private();
        for page in [0, 1, 2, 3, 5] {
            self.of_object(page).check(page as u64);
        }
        self.of_object(4).check_zero();
        self.of_object(3).fill(23);
        self.page(2).check(23);
        self.page(4).fill(15);
        self.of_object(5).check(5);
    }
}

fn shared_pair() -> Pair {
    let object = sys::shared(6 * PAGE);
    let fd = object_of(object);
    let pair = Pair::new(fd, object, PAGE);
    sys::close(fd);
    pair
}

fn memfd(flags: u32, len: usize) -> i32 {
    let fd = sys!(SYS_memfd_create, c"object".as_ptr(), flags).expect("memfd_create");
    sys!(SYS_ftruncate, fd, len).expect("ftruncate");
    sys::int(fd)
}

fn memfd_pair() -> Pair {
    let fd = memfd(0, 6 * PAGE);
    let pair = Pair::new(fd, map(fd, 6 * PAGE, READ | WRITE, libc::MAP_SHARED, 0), PAGE);
    sys::close(fd);
    pair
}

fn private_of_shared(gate: &Gate) {
    let pair = shared_pair();
    gate.ready();
    pair.check();
}

/// Nobody maps the object in any other way.
fn private_of_shared_alone(gate: &Gate) {
    let pair = shared_pair();
    sys!(SYS_munmap, pair.object.addr, pair.object.len).expect("munmap");
    gate.ready();
    pair.check_private();
    let fd = object_of(pair.private);
    let object = map(fd, 6 * PAGE, READ, libc::MAP_SHARED, 0);
    for page in [0, 1, 2, 3, 5] {
        part(object, page * PAGE, PAGE).check(page as u64);
    }
    part(object, 4 * PAGE, PAGE).check_zero();
    assert_eq!(sys::lseek(fd, 0, libc::SEEK_END), Ok(6 * PAGE));
}

fn private_of_shared_read_only(gate: &Gate) {
    let pair = shared_pair();
    protect(pair.private, READ);
    let fd = object_of(pair.object);
    let untouched = map(fd, 3 * PAGE, READ, libc::MAP_PRIVATE, 0);
    sys::close(fd);
    gate.ready();
    untouched_follows(untouched, pair.object);
    protect(pair.private, READ | WRITE);
    pair.check();
}

fn untouched_follows(untouched: Mapped, object: Mapped) {
    part(untouched, PAGE, PAGE).check(1);
    part(object, PAGE, PAGE).fill(31);
    part(untouched, PAGE, PAGE).check(31);
    part(object, PAGE, PAGE).fill(1);
}

fn in_children(gate: &Gate, pair: Pair) {
    let children: Vec<i32> = (0..3)
        .map(|n| {
            let pid = fork(|| {
                if n > 0 {
                    pair.page(n).fill(100 + n as u64);
                }
                if n == 2 {
                    // Given back: it follows the object again.
                    crate::cases::memory::advise(pair.page(3), libc::MADV_DONTNEED).expect("MADV_DONTNEED");
                }
                gate.mark(&format!("child{n}"));
                gate.wait();
                pair.page(1).check(if n == 1 { 101 } else { 11 });
                pair.page(2).check(if n == 2 { 102 } else { 3 });
                if n == 2 {
                    pair.page(3).check_zero();
                } else {
                    pair.page(3).check(13);
                }
                pair.page(4).check(5);
            });
            gate.await_mark(&format!("child{n}"));
            pid
        })
        .collect();
    gate.ready();
    children.into_iter().for_each(join);
    pair.check();
}

fn private_of_shared_in_children(gate: &Gate) {
    in_children(gate, shared_pair());
}

fn private_of_memfd_in_children(gate: &Gate) {
    in_children(gate, memfd_pair());
}

fn private_of_memfd(gate: &Gate) {
    let pair = memfd_pair();
    gate.ready();
    pair.check();
}

/// The object ends before its mappings do: there nothing can be read.
fn cut(gate: &Gate, pair: Pair) {
    let fd = object_of(pair.object);
    sys!(SYS_ftruncate, fd, 3 * PAGE + 100).expect("ftruncate");
    sys::close(fd);
    assert!(!readable(pair.page(3).addr), "what was changed went with the object's end");
    gate.ready();
    pair.page(0).check(1);
    pair.page(1).check(11);
    assert_eq!(pair.page(2).get::<u64>(8), pair.of_object(3).get::<u64>(8));
    for mapped in [pair.page(3), pair.page(4), pair.of_object(4), pair.of_object(5)] {
        assert!(!readable(mapped.addr), "beyond the end of the object");
    }
    let fd = object_of(pair.object);
    assert_eq!(sys::lseek(fd, 0, libc::SEEK_END), Ok(3 * PAGE + 100));
}

fn private_of_shared_cut(gate: &Gate) {
    cut(gate, shared_pair());
}

fn private_of_memfd_cut(gate: &Gate) {
    cut(gate, memfd_pair());
}

const HUGE: usize = 2 * MIB;

/// Lets the kernel make huge pages on demand; they go with the mapping.
fn allow_huge_pages() {
    let _ = std::fs::write("/proc/sys/vm/nr_overcommit_hugepages", "64");
}

fn private_of_memfd_huge(gate: &Gate) {
    allow_huge_pages();
    let Ok(fd) = sys!(SYS_memfd_create, c"object".as_ptr(), libc::MFD_HUGETLB) else {
        gate.skip("no memfd on huge pages");
    };
    let fd = sys::int(fd);
    sys!(SYS_ftruncate, fd, 6 * HUGE).expect("ftruncate");
    let Ok(object) = sys::mmap(0, 6 * HUGE, READ | WRITE, libc::MAP_SHARED, fd, 0) else {
        gate.skip("no huge pages to be had");
    };
    let pair = Pair::new(fd, object, HUGE);
    sys::close(fd);
    gate.ready();
    pair.check();
}

fn private_of_shared_huge(gate: &Gate) {
    allow_huge_pages();
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let Ok(object) = sys::mmap(0, 6 * HUGE, READ | WRITE, flags, -1, 0) else {
        gate.skip("no huge pages to be had");
    };
    let fd = object_of(object);
    let pair = Pair::new(fd, object, HUGE);
    sys::close(fd);
    gate.ready();
    pair.check();
}

/// A descriptor of the object is open too.
fn private_of_shared_and_descriptor(gate: &Gate) {
    let pair = shared_pair();
    object_of(pair.object);
    gate.ready();
    pair.check();
}

/// A file that has no name any more, on disk and in memory.
fn private_of_deleted(gate: &Gate) {
    let pairs = ["gone".to_owned(), format!("/dev/shm/{}", gate.token())].map(|name| {
        let path = std::ffi::CString::new(name.clone()).expect("path");
        std::fs::File::create(&name).expect("create").set_len(6 * PAGE as u64).expect("set_len");
        let fd = sys::open(&path, libc::O_RDWR).expect("open");
        let pair = Pair::new(fd, map(fd, 6 * PAGE, READ | WRITE, libc::MAP_SHARED, 0), PAGE);
        sys::close(fd);
        std::fs::remove_file(name).expect("remove");
        pair
    });
    gate.ready();
    for pair in pairs {
        pair.check();
    }
}

/// There is no object: such memory is anonymous, but for its name.
fn private_of_dev_zero(gate: &Gate) {
    let fd = sys::open(c"/dev/zero", libc::O_RDWR).expect("open /dev/zero");
    let private = map(fd, 8 * PAGE, READ | WRITE, libc::MAP_PRIVATE, 0);
    let shared = map(fd, 8 * PAGE, READ | WRITE, libc::MAP_SHARED, 0);
    sys::close(fd);
    part(private, 0, PAGE).fill(1);
    part(private, 3 * PAGE, PAGE).fill(2);
    protect(part(private, 3 * PAGE, PAGE), READ);
    part(shared, PAGE, PAGE).fill(3);
    let fd = object_of(shared);
    let of_shared = map(fd, 8 * PAGE, READ | WRITE, libc::MAP_PRIVATE, 0);
    sys::close(fd);
    part(of_shared, 0, PAGE).fill(4);
    let child = fork(|| {
        part(private, 0, PAGE).fill(5);
        gate.mark("child");
        gate.wait();
        part(private, 0, PAGE).check(5);
        part(private, 3 * PAGE, PAGE).check(2);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    part(private, 0, PAGE).check(1);
    part(private, PAGE, 2 * PAGE).check_zero();
    part(private, 3 * PAGE, PAGE).check(2);
    part(shared, 0, PAGE).check_zero();
    part(shared, PAGE, PAGE).check(3);
    part(of_shared, 0, PAGE).check(4);
    part(of_shared, PAGE, PAGE).check(3);
}

fn private_of_sysv(gate: &Gate) {
    let Ok(id) = sys!(SYS_shmget, libc::IPC_PRIVATE, 4 * PAGE, 0o600) else {
        gate.skip("no System V shared memory");
    };
    let addr = sys!(SYS_shmat, id, 0, 0).expect("shmat");
    sys!(SYS_shmctl, id, libc::IPC_RMID, 0).expect("IPC_RMID");
    let fd = object_of(Mapped { addr, len: 4 * PAGE });
    map(fd, 2 * PAGE, READ | WRITE, libc::MAP_PRIVATE, 0).fill(1);
    sys::close(fd);
    sys!(SYS_shmdt, addr).expect("shmdt");
    gate.ready();
}
