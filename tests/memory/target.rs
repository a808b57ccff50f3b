//! What the children do: make areas of every kind, then stop.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use libc::{MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE};

use crate::PAGE;

const RW: i32 = PROT_READ | PROT_WRITE;
const ANON: i32 = MAP_PRIVATE | MAP_ANONYMOUS;
const SHARED: i32 = MAP_SHARED | MAP_ANONYMOUS;
const MAP_DROPPABLE: i32 = 0x08;
const MADV_GUARD_INSTALL: i32 = 102;

/// Makes areas one after another at known addresses and writes down their names.
struct Maps {
    next: usize,
    table: File,
    dir: PathBuf,
}

/// One area.
#[derive(Clone, Copy)]
struct Map(usize, usize);

impl Maps {
    /// Maps `pages`; `None` when the kernel refuses.
    fn try_map(
        &mut self,
        name: &str,
        pages: usize,
        prot: i32,
        flags: i32,
        fd: i32,
        page: usize,
    ) -> Option<Map> {
        let at = self.next;
        let len = pages * PAGE;
        // SAFETY: a fresh range that nothing uses; the kernel refuses if it is not free.
        let got = unsafe {
            libc::mmap(at as *mut _, len, prot, flags | libc::MAP_FIXED_NOREPLACE, fd, (page * PAGE) as i64)
        };
        self.next += len.next_multiple_of(1 << 24) + (1 << 24);
        if got as usize != at {
            return None;
        }
        writeln!(self.table, "{name} {at} {pages}").unwrap();
        Some(Map(at, len))
    }

    fn map(&mut self, name: &str, pages: usize, prot: i32, flags: i32) -> Map {
        self.try_map(name, pages, prot, flags, -1, 0).unwrap_or_else(|| panic!("map {name}"))
    }

    fn file(&mut self, name: &str, pages: usize, prot: i32, flags: i32, file: &File, page: usize) -> Map {
        let fd = file.as_raw_fd();
        self.try_map(name, pages, prot, flags, fd, page).unwrap_or_else(|| panic!("map {name}"))
    }

    fn open(&self, name: &str, pages: usize) -> File {
        let path = self.dir.join(name);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        for page in 0..pages {
            file.write_all(&[page as u8 + 1; PAGE]).unwrap();
        }
        file
    }
}

impl Map {
    fn write(self, page: usize, byte: u8) {
        assert!(page * PAGE < self.1);
        // SAFETY: inside the area, which is ours and writable at this time.
        unsafe { std::ptr::write_volatile((self.0 + page * PAGE + 17) as *mut u8, byte) };
    }

    fn read(self, page: usize) -> u8 {
        assert!(page * PAGE < self.1);
        // SAFETY: inside the area, readable at this time.
        unsafe { std::ptr::read_volatile((self.0 + page * PAGE + 17) as *const u8) }
    }

    fn fill(self) -> Self {
        (0..self.1 / PAGE).for_each(|page| self.write(page, page as u8 | 1));
        self
    }

    fn protect(self, prot: i32) {
        // SAFETY: our own area; nothing of this program lies in it.
        assert_eq!(unsafe { libc::mprotect(self.0 as *mut _, self.1, prot) }, 0);
    }

    fn advise(self, advice: i32) -> bool {
        self.advise_pages(0, self.1 / PAGE, advice)
    }

    fn advise_pages(self, page: usize, pages: usize, advice: i32) -> bool {
        // SAFETY: our own area; nothing of this program lies in it.
        unsafe { libc::madvise((self.0 + page * PAGE) as *mut _, pages * PAGE, advice) == 0 }
    }
}

fn memfd(name: &str, flags: u32, pages: usize) -> Option<File> {
    let name = CString::new(name).unwrap();
    // SAFETY: a C string that lives across the call; the descriptor is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), flags);
        (fd >= 0).then(|| File::from_raw_fd(fd))
    }?;
    file.set_len((pages * PAGE) as u64).ok()?;
    Some(file)
}

fn call(number: libc::c_long, args: [usize; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    // SAFETY: addresses are of our own live areas.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

/// Becomes the target `case`; its files and its table lie in the current directory.
pub fn main(case: &str) -> ! {
    let dir = std::env::current_dir().unwrap();
    let mut maps =
        Maps { next: 0x1000_0000_0000, table: File::create(dir.join("table")).unwrap(), dir: dir.clone() };
    match case {
        "kinds" => kinds(&mut maps),
        "guards" => guards(&mut maps),
        "hugetlb" => hugetlb(&mut maps),
        "many" => many(&mut maps),
        "sparse" => sparse(&mut maps),
        "droppable" => droppable(&mut maps),
        "large" => large(&mut maps),
        "refused" => refused(&mut maps),
        other => panic!("no target {other}"),
    }
    drop(maps);
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    // SAFETY: plain calls without pointers of ours.
    unsafe {
        libc::setsid();
        for fd in 0..3 {
            libc::dup2(null.as_raw_fd(), fd);
        }
        // A userfaultfd's areas are registered as long as it is open.
        if case != "refused" {
            libc::close_range(3, u32::MAX, 0);
        }
        loop {
            libc::raise(libc::SIGSTOP);
        }
    }
}

fn kinds(maps: &mut Maps) {
    maps.map("untouched", 16, RW, ANON);
    let m = maps.map("zero_dropped", 16, RW, ANON);
    [(0, 1), (2, 1), (3, 0), (4, 9)].into_iter().for_each(|(page, byte)| m.write(page, byte));
    let m = maps.map("zero_page", 16, RW, ANON);
    assert_eq!(m.read(5), 0);
    maps.map("read_only", 4, RW, ANON).fill().protect(PROT_READ);
    maps.map("no_access", 4, RW, ANON).fill().protect(PROT_NONE);
    maps.map("execute_only", 4, RW, ANON).fill().protect(PROT_EXEC);
    maps.map("write_only", 4, RW, ANON).fill().protect(PROT_WRITE);
    maps.map("noreserve", 16, RW, ANON | libc::MAP_NORESERVE).write(3, 3);
    maps.map("locked", 4, RW, ANON | libc::MAP_LOCKED).write(1, 3);
    let m = maps.map("lock_on_fault", 4, RW, ANON);
    assert_eq!(call(libc::SYS_mlock2, [m.0, m.1, 1, 0, 0, 0]), 0);
    m.write(2, 8);
    for (name, advice) in [
        ("dontfork", libc::MADV_DONTFORK),
        ("wipeonfork", libc::MADV_WIPEONFORK),
        ("dontdump", libc::MADV_DONTDUMP),
        ("hugepage", libc::MADV_HUGEPAGE),
        ("nohugepage", libc::MADV_NOHUGEPAGE),
        ("random", libc::MADV_RANDOM),
        ("sequential", libc::MADV_SEQUENTIAL),
    ] {
        assert!(maps.map(name, 4, RW, ANON).fill().advise(advice), "{name}");
    }
    // Not on every kernel.
    maps.map("mergeable", 4, RW, ANON).fill().advise(libc::MADV_MERGEABLE);
    maps.map("growsdown", 4, RW, ANON | libc::MAP_GROWSDOWN).write(3, 1);

    let m = maps.map("shared", 16, RW, SHARED);
    m.write(0, 1);
    m.write(5, 2);
    m.write(6, 0);
    maps.map("shared_no_access", 16, RW, SHARED).fill().protect(PROT_NONE);
    maps.map("shared_noreserve", 16, RW, SHARED | libc::MAP_NORESERVE);

    let file = maps.open("data", 16);
    let read_only = File::open(maps.dir.join("data")).unwrap();
    maps.file("file_private_ro", 4, PROT_READ, MAP_PRIVATE, &read_only, 0).read(1);
    maps.file("file_private_untouched", 4, RW, MAP_PRIVATE, &read_only, 0);
    let m = maps.file("file_private", 4, RW, MAP_PRIVATE, &file, 4);
    m.write(1, 77);
    m.read(2);
    let m = maps.file("file_private_zeroed", 4, RW, MAP_PRIVATE, &file, 4);
    // SAFETY: one page of our own area.
    unsafe { std::ptr::write_bytes((m.0 + PAGE) as *mut u8, 0, PAGE) };
    let m = maps.file("file_relro", 4, RW, MAP_PRIVATE, &file, 4);
    m.write(3, 77);
    m.protect(PROT_READ);
    maps.file("file_shared_ro", 4, PROT_READ, MAP_SHARED, &read_only, 0).read(0);
    maps.file("file_shared_ro_of_rw", 4, PROT_READ, MAP_SHARED, &file, 0).read(0);
    maps.file("file_shared", 4, RW, MAP_SHARED, &file, 0).write(0, 99);
    maps.file("file_beyond_end", 32, RW, MAP_PRIVATE, &file, 0).write(3, 99);
    let gone = maps.open("gone", 4);
    std::fs::remove_file(maps.dir.join("gone")).unwrap();
    maps.file("deleted_shared", 4, RW, MAP_SHARED, &gone, 0).write(2, 55);
    maps.file("deleted_private", 4, RW, MAP_PRIVATE, &gone, 0).write(2, 56);

    let hello = memfd("hello", 2, 16).unwrap();
    let m = maps.file("memfd_shared", 16, RW, MAP_SHARED, &hello, 0);
    m.write(0, 7);
    m.write(9, 7);
    maps.file("memfd_private", 16, RW, MAP_PRIVATE, &hello, 0).write(1, 8);
    maps.file("memfd_ro", 8, PROT_READ, MAP_SHARED, &hello, 8).read(0);

    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
    maps.file("dev_zero_private", 4, RW, MAP_PRIVATE, &zero, 0).write(0, 1);
    maps.file("dev_zero_shared", 4, RW, MAP_SHARED, &zero, 0).write(0, 1);
}

fn guards(maps: &mut Maps) {
    let m = maps.map("guarded", 16, RW, ANON).fill();
    let installed = m.advise_pages(4, 2, MADV_GUARD_INSTALL) && m.advise_pages(9, 1, MADV_GUARD_INSTALL);
    let m = maps.map("guarded_untouched", 16, RW, ANON);
    let installed = installed && m.advise_pages(0, 16, MADV_GUARD_INSTALL);
    let file = maps.open("data", 16);
    let m = maps.file("guarded_shared", 16, RW, MAP_SHARED, &file, 0);
    m.write(1, 5);
    let installed = installed && m.advise_pages(2, 1, MADV_GUARD_INSTALL);
    if !installed {
        // Older kernels have none: the table says so.
        maps.table.set_len(0).unwrap();
    }
}

fn hugetlb(maps: &mut Maps) {
    let huge = libc::MAP_HUGETLB;
    let private = maps.try_map("huge_private", 1024, RW, ANON | huge, -1, 0);
    let shared = maps.try_map("huge_shared", 512, RW, SHARED | huge, -1, 0);
    let memfd = memfd("huge", libc::MFD_HUGETLB, 512)
        .and_then(|file| maps.try_map("huge_memfd", 512, RW, MAP_SHARED, file.as_raw_fd(), 0));
    let (Some(private), Some(shared), Some(memfd)) = (private, shared, memfd) else {
        maps.table.set_len(0).unwrap();
        return;
    };
    private.write(700, 1);
    shared.write(5, 2);
    memfd.write(6, 3);
}

fn many(maps: &mut Maps) {
    for i in 0..20_000 {
        // Neighbours of different protection stay two areas; their pages touch.
        let prot = if i % 2 == 0 { RW } else { RW | PROT_EXEC };
        let at = 0x2000_0000_0000 + i * PAGE;
        // SAFETY: a fresh range.
        let got = unsafe { libc::mmap(at as *mut _, PAGE, prot, ANON | libc::MAP_FIXED_NOREPLACE, -1, 0) };
        assert_eq!(got as usize, at);
        if i % 3 != 0 {
            Map(at, PAGE).write(0, i as u8 | 1);
        }
    }
    writeln!(maps.table, "many {} 20000", 0x2000_0000_0000u64).unwrap();
}

fn sparse(maps: &mut Maps) {
    let pages = (100 << 30) / PAGE;
    let m = maps.map("sparse", pages, RW, ANON | libc::MAP_NORESERVE);
    m.write(0, 1);
    m.write(pages / 2, 2);
    m.write(pages - 1, 3);
}

fn droppable(maps: &mut Maps) {
    match maps.try_map("droppable", 4, RW, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0) {
        Some(m) => m.write(0, 1),
        None => maps.table.set_len(0).unwrap(),
    }
}

/// Enough for several workers; every seventh page zero, every eleventh untouched.
fn large(maps: &mut Maps) {
    let m = maps.map("large", 16 << 8, RW, ANON);
    m.advise(libc::MADV_NOHUGEPAGE);
    let mut x = 88_172_645_463_325_252u64;
    for page in 0..16usize << 8 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        if page % 11 != 0 {
            m.write(page, if page % 7 == 0 { 0 } else { x as u8 | 1 });
        }
    }
}

fn refused(maps: &mut Maps) {
    let m = maps.map("sealed", 4, RW, ANON);
    let sealed = call(462, [m.0, m.1, 0, 0, 0, 0]) == 0;
    // SysV shared memory, marked to go with its last user.
    let id = call(libc::SYS_shmget, [libc::IPC_PRIVATE as usize, 4 * PAGE, 0o600, 0, 0, 0]);
    let sysv = id >= 0 && call(libc::SYS_shmat, [id as usize, maps.next, 0, 0, 0, 0]) == maps.next as i64;
    maps.next += 1 << 24;
    call(libc::SYS_shmctl, [id as usize, libc::IPC_RMID as usize, 0, 0, 0, 0]);
    let mut context = 0usize;
    let aio = call(libc::SYS_io_setup, [8, &raw mut context as usize, 0, 0, 0, 0]) == 0;
    let uffd = call(libc::SYS_userfaultfd, [libc::O_CLOEXEC as usize, 0, 0, 0, 0, 0]);
    let registered = uffd >= 0 && {
        let m = maps.map("uffd", 4, RW, ANON);
        let api = [0xaau64, 0, 0];
        let register = [m.0 as u64, m.1 as u64, 1, 0];
        call(libc::SYS_ioctl, [uffd as usize, 0xc018_aa3f, api.as_ptr() as usize, 0, 0, 0]) == 0
            && call(libc::SYS_ioctl, [uffd as usize, 0xc020_aa00, register.as_ptr() as usize, 0, 0, 0]) == 0
    };
    writeln!(
        maps.table,
        "made {} {}",
        usize::from(sealed) | usize::from(sysv) << 1,
        usize::from(aio) | usize::from(registered) << 1
    )
    .unwrap();
}
