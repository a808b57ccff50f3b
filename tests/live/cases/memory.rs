//! Memory of one task, without files: contents, protections, advice, layout.

use crate::case::Case;
use crate::gate::{Gate, fork, join, until_in_call};
use crate::sys::{self, Mapped};

pub const CASES: &[Case] = &[
    Case::new("private_memory", private_memory).disturbed().fifty(),
    Case::new("pages_of_one_value", pages_of_one_value),
    Case::new("no_access_with_content", no_access_with_content),
    Case::new("read_only_with_content", read_only_with_content),
    Case::new("write_only", write_only),
    Case::new("own_code", own_code),
    Case::new("guard_pages", guard_pages).peer_fails("drops MADV_GUARD_INSTALL"),
    Case::new("grows_down", grows_down),
    Case::new("deep_stack", deep_stack),
    Case::new("locked", locked).disturbed(),
    Case::new("locked_all", locked_all),
    Case::new("locked_on_fault", locked_on_fault).peer_fails("makes MLOCK_ONFAULT a full lock"),
    Case::new("advice_dont_fork", advice_dont_fork),
    Case::new("advice_dont_dump", advice_dont_dump),
    Case::new("advice_wipe_on_fork", advice_wipe_on_fork).peer_fails("drops MADV_WIPEONFORK"),
    Case::new("advice_sequential", advice_sequential),
    Case::new("advice_random", advice_random),
    Case::new("advice_huge_page", advice_huge_page),
    Case::new("advice_no_huge_page", advice_no_huge_page),
    Case::new("advice_mergeable", advice_mergeable),
    Case::new("huge_pages_transparent", huge_pages_transparent),
    Case::new("huge_pages_private", huge_pages_private),
    Case::new("huge_pages_shared", huge_pages_shared).peer_loses(&["/maps/"]),
    Case::new("zero_pages", zero_pages),
    Case::new("brk", brk),
    Case::new("brk_shrunk", brk_shrunk),
    Case::new("arguments_rewritten", arguments_rewritten),
    Case::new("vdso", vdso),
    Case::new("vdso_of_threads", vdso_of_threads),
    Case::new("vdso_unmapped", vdso_unmapped).peer_fails("loses the data pages too"),
    Case::new("vdso_protected", vdso_protected).peer_fails("gives the usual protection back"),
    Case::new("mappings_20000", mappings_20000),
    Case::new("reservation_100_gib", reservation_100_gib),
    Case::new("sparse_pages", sparse_pages),
    Case::new("large_areas", large_areas),
    Case::new("lowest_and_highest", lowest_and_highest),
    Case::new("moved", moved),
    Case::new("holes", holes),
    Case::new("secret_memory", secret_memory).refused("secretmem"),
];

pub const PAGE: usize = 4096;
pub const MIB: usize = 1 << 20;
pub const READ: i32 = libc::PROT_READ;
pub const WRITE: i32 = libc::PROT_WRITE;
pub const EXEC: i32 = libc::PROT_EXEC;

pub fn protect(part: Mapped, access: i32) {
    sys!(SYS_mprotect, part.addr, part.len, access).expect("mprotect");
}

pub fn advise(part: Mapped, advice: i32) -> Result<usize, sys::Errno> {
    sys!(SYS_madvise, part.addr, part.len, advice)
}

pub fn part(of: Mapped, offset: usize, len: usize) -> Mapped {
    assert!(offset + len <= of.len);
    Mapped { addr: of.addr + offset, len }
}

fn private_memory(gate: &Gate) {
    let memory = sys::anon(4 * MIB);
    memory.fill(11);
    gate.ready();
    memory.check(11);
    memory.fill(12);
    memory.check(12);
}

/// Pages of zeros among others, a page with one byte at its end, one at its start.
fn pages_of_one_value(gate: &Gate) {
    let memory = sys::anon(64 * PAGE);
    for page in 0..64 {
        match page % 4 {
            0 => memory.set(page * PAGE, 0_u8),
            1 => memory.set(page * PAGE, 0xff_u8),
            2 => memory.set(page * PAGE + PAGE - 1, 0xee_u8),
            _ => part(memory, page * PAGE, PAGE).fill(page as u64),
        }
    }
    gate.ready();
    for page in 0..64 {
        let this = part(memory, page * PAGE, PAGE);
        match page % 4 {
            1 => assert_eq!(this.get::<u8>(0), 0xff),
            2 => assert_eq!(this.get::<u8>(PAGE - 1), 0xee),
            3 => this.check(page as u64),
            _ => this.check_zero(),
        }
        if page % 4 == 1 {
            this.set(0, 0_u8);
            this.check_zero();
        }
    }
}

fn no_access_with_content(gate: &Gate) {
    let memory = sys::anon(16 * PAGE);
    memory.fill(70);
    protect(memory, libc::PROT_NONE);
    let empty = sys::mmap(0, 16 * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        .expect("mmap");
    gate.ready();
    protect(memory, READ);
    memory.check(70);
    protect(empty, READ);
    empty.check_zero();
}

fn read_only_with_content(gate: &Gate) {
    let memory = sys::anon(16 * PAGE);
    memory.fill(71);
    protect(part(memory, 0, 8 * PAGE), READ);
    protect(part(memory, 8 * PAGE, 8 * PAGE), READ | EXEC);
    gate.ready();
    memory.check(71);
}

fn write_only(gate: &Gate) {
    let memory = sys::anon(4 * PAGE);
    memory.fill(72);
    protect(memory, WRITE);
    gate.ready();
    protect(memory, READ | WRITE);
    memory.check(72);
}

/// `mov eax, value; ret`
pub fn code(memory: Mapped, value: u32) {
    memory.set(0, 0xb8_u8);
    memory.set(1, value.to_le_bytes());
    memory.set(5, 0xc3_u8);
}

fn own_code(gate: &Gate) {
    let memory = sys::anon(2 * PAGE);
    code(memory, 815);
    protect(memory, READ | WRITE | EXEC);
    gate.ready();
    assert_eq!(sys::run_code(memory.addr), 815);
    code(memory, 816);
    assert_eq!(sys::run_code(memory.addr), 816);
}

/// Whether the kernel can read a byte there in our name.
pub fn readable(addr: usize) -> bool {
    let (from, to) = sys::pipe(0);
    let got = sys!(SYS_write, to, addr, 1);
    sys::close(from);
    sys::close(to);
    got == Ok(1)
}

fn guard_pages(gate: &Gate) {
    const MADV_GUARD_INSTALL: i32 = 102;
    let memory = sys::anon(16 * PAGE);
    memory.fill(80);
    if advise(part(memory, 4 * PAGE, 3 * PAGE), MADV_GUARD_INSTALL).is_err() {
        gate.skip("this kernel has no MADV_GUARD_INSTALL");
    }
    gate.ready();
    for page in 0..16 {
        assert_eq!(readable(memory.at(page * PAGE)), !(4..7).contains(&page), "page {page}");
    }
    part(memory, 0, 4 * PAGE).check(80);
    for offset in (7 * PAGE..16 * PAGE).step_by(8) {
        assert_eq!(memory.get::<u64>(offset), sys::pattern(80, offset));
    }
}

fn grows_down(gate: &Gate) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // A wide hole to grow into.
    let room = sys::mmap(0, 8 * MIB, libc::PROT_NONE, flags, -1, 0).expect("mmap");
    sys!(SYS_munmap, room.addr, room.len).expect("munmap");
    let top = room.addr + 4 * MIB;
    let memory = sys::mmap(top, 4 * PAGE, READ | WRITE, flags | libc::MAP_GROWSDOWN, -1, 0).expect("mmap");
    memory.fill(90);
    for page in 1..20 {
        sys::poke(top - page * PAGE, page as u64);
    }
    gate.ready();
    memory.check(90);
    for page in 1..20 {
        assert_eq!(sys::peek::<u64>(top - page * PAGE), page as u64, "page {page} below");
    }
    for page in 20..40 {
        sys::poke(top - page * PAGE, page as u64);
    }
}

#[inline(never)]
fn recurse(depth: u32, then: &mut dyn FnMut()) -> u64 {
    let local = std::hint::black_box([u64::from(depth); 64]);
    let below = if depth == 0 {
        then();
        0
    } else {
        recurse(depth - 1, then)
    };
    assert_eq!(std::hint::black_box(local), [u64::from(depth); 64], "locals at depth {depth}");
    below + local[depth as usize % 64]
}

fn deep_stack(gate: &Gate) {
    let sum = recurse(500, &mut || gate.ready());
    assert_eq!(sum, 500 * 501 / 2);
    // And the stack grows on.
    assert_eq!(recurse(1500, &mut || ()), 1500 * 1501 / 2);
}

fn locked(gate: &Gate) {
    let memory = sys::anon(16 * PAGE);
    memory.fill(100);
    if sys!(SYS_mlock, memory.addr + 4 * PAGE, 4 * PAGE).is_err() {
        gate.skip("mlock is not allowed");
    }
    gate.ready();
    memory.check(100);
}

fn locked_all(gate: &Gate) {
    let memory = sys::anon(16 * PAGE);
    memory.fill(101);
    if sys!(SYS_mlockall, libc::MCL_CURRENT).is_err() {
        gate.skip("mlockall is not allowed");
    }
    gate.ready();
    memory.check(101);
}

fn locked_on_fault(gate: &Gate) {
    const MLOCK_ONFAULT: usize = 1;
    let memory = sys::anon(64 * PAGE);
    memory.set(8, 5_u64);
    if sys!(SYS_mlock2, memory.addr, memory.len, MLOCK_ONFAULT).is_err() {
        gate.skip("mlock2 is not allowed");
    }
    gate.ready();
    assert_eq!(memory.get::<u64>(8), 5);
}

/// Advice shows in smaps, which the harness compares; here is its effect.
fn advised(gate: &Gate, advice: i32, check: impl FnOnce(Mapped)) {
    let memory = sys::anon(16 * PAGE);
    memory.fill(110);
    if let Err(errno) = advise(part(memory, 4 * PAGE, 4 * PAGE), advice) {
        gate.skip(&format!("madvise {advice} fails with errno {errno}"));
    }
    gate.ready();
    memory.check(110);
    check(part(memory, 4 * PAGE, 4 * PAGE));
}

fn advice_dont_fork(gate: &Gate) {
    advised(gate, libc::MADV_DONTFORK, |advised| {
        join(fork(|| assert!(!readable(advised.addr), "the child has the mapping")));
    });
}

fn advice_dont_dump(gate: &Gate) {
    advised(gate, libc::MADV_DONTDUMP, drop);
}

fn advice_wipe_on_fork(gate: &Gate) {
    advised(gate, libc::MADV_WIPEONFORK, |advised| join(fork(|| advised.check_zero())));
}

fn advice_sequential(gate: &Gate) {
    advised(gate, libc::MADV_SEQUENTIAL, drop);
}

fn advice_random(gate: &Gate) {
    advised(gate, libc::MADV_RANDOM, drop);
}

fn advice_huge_page(gate: &Gate) {
    advised(gate, libc::MADV_HUGEPAGE, drop);
}

fn advice_no_huge_page(gate: &Gate) {
    advised(gate, libc::MADV_NOHUGEPAGE, drop);
}

fn advice_mergeable(gate: &Gate) {
    advised(gate, libc::MADV_MERGEABLE, drop);
}

fn huge_pages_transparent(gate: &Gate) {
    let memory = sys::anon(12 * MIB);
    let start = memory.addr.next_multiple_of(2 * MIB) - memory.addr;
    let aligned = part(memory, start, 8 * MIB);
    if advise(aligned, libc::MADV_HUGEPAGE).is_err() {
        gate.skip("no transparent huge pages");
    }
    aligned.fill(120);
    // A hole inside one.
    advise(part(aligned, 2 * MIB + PAGE, PAGE), libc::MADV_DONTNEED).expect("MADV_DONTNEED");
    gate.ready();
    part(aligned, 0, 2 * MIB).check(120);
    part(aligned, 2 * MIB + PAGE, PAGE).check_zero();
    for offset in (2 * MIB + 2 * PAGE..8 * MIB).step_by(8) {
        assert_eq!(aligned.get::<u64>(offset), sys::pattern(120, offset));
    }
}

fn huge_pages(gate: &Gate, flags: i32) {
    // Lets the kernel make a few on demand; they go with the mapping.
    let _ = std::fs::write("/proc/sys/vm/nr_overcommit_hugepages", "64");
    let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = match sys::mmap(0, 6 * MIB, READ | WRITE, flags, -1, 0) {
        Ok(memory) => memory,
        Err(errno) => gate.skip(&format!("no huge pages to be had: errno {errno}")),
    };
    part(memory, 0, 2 * MIB).fill(121);
    part(memory, 4 * MIB, 2 * MIB).fill(122);
    gate.ready();
    part(memory, 0, 2 * MIB).check(121);
    part(memory, 4 * MIB, 2 * MIB).check(122);
    part(memory, 2 * MIB, 2 * MIB).check_zero();
}

fn huge_pages_private(gate: &Gate) {
    huge_pages(gate, libc::MAP_PRIVATE);
}

fn huge_pages_shared(gate: &Gate) {
    huge_pages(gate, libc::MAP_SHARED);
}

/// A number of /proc/PID/smaps_rollup, in KiB.
pub fn rollup(pid: i32, name: &str) -> usize {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
    let line = text.lines().find_map(|l| l.strip_prefix(name)).expect("line of smaps_rollup");
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("number of KiB")
}

/// Pages only ever read stay the zero page: no memory after the restore either.
fn zero_pages(gate: &Gate) {
    let memory = sys::anon(32 * MIB);
    advise(memory, libc::MADV_NOHUGEPAGE).expect("MADV_NOHUGEPAGE");
    for offset in (0..memory.len).step_by(PAGE) {
        assert_eq!(memory.get::<u64>(offset), 0);
    }
    memory.set(5 * PAGE, 1_u64);
    let before = rollup(sys::getpid(), "Pss");
    gate.ready();
    let after = rollup(sys::getpid(), "Pss");
    assert!(after < before + 16 * 1024, "zero pages cost memory: {before} KiB before, {after} after");
    assert_eq!(memory.get::<u64>(5 * PAGE), 1);
    part(memory, 6 * PAGE, MIB).check_zero();
}

fn brk(gate: &Gate) {
    let start = sys!(SYS_brk, 0).expect("brk");
    let end = start.next_multiple_of(PAGE) + 8 * PAGE;
    assert_eq!(sys!(SYS_brk, end), Ok(end));
    let memory = Mapped { addr: end - 8 * PAGE, len: 8 * PAGE };
    memory.fill(130);
    gate.ready();
    assert_eq!(sys!(SYS_brk, 0), Ok(end));
    memory.check(130);
    assert_eq!(sys!(SYS_brk, end + 4 * PAGE), Ok(end + 4 * PAGE), "the heap grows on");
    Mapped { addr: end, len: 4 * PAGE }.check_zero();
    sys::poke(end + 8, 1_u64);
}

/// A break that is not at a page boundary, below where it once was.
fn brk_shrunk(gate: &Gate) {
    let start = sys!(SYS_brk, 0).expect("brk");
    let end = start.next_multiple_of(PAGE) + 6 * PAGE;
    assert_eq!(sys!(SYS_brk, end), Ok(end));
    Mapped { addr: end - 6 * PAGE, len: 6 * PAGE }.fill(131);
    let shrunk = end - 3 * PAGE - 100;
    assert_eq!(sys!(SYS_brk, shrunk), Ok(shrunk));
    gate.ready();
    assert_eq!(sys!(SYS_brk, 0), Ok(shrunk));
    Mapped { addr: end - 6 * PAGE, len: 2 * PAGE }.check(131);
}

/// A program that changes its title as ps shows it; the harness compares cmdline and environ.
fn arguments_rewritten(gate: &Gate) {
    let field = |n| sys::stat_field(sys::getpid(), n).parse::<usize>().expect("stat");
    let (start, end) = (field(48), field(49));
    for (n, addr) in (start..end - 1).enumerate() {
        sys::poke(addr, b'A' + n as u8);
    }
    let title = std::fs::read("/proc/self/cmdline").expect("cmdline");
    gate.ready();
    assert_eq!(std::fs::read("/proc/self/cmdline").expect("cmdline"), title);
    assert!(title.starts_with(b"ABC"));
}

fn check_clock() {
    let mut last = std::time::Instant::now();
    for _ in 0..1000 {
        let now = std::time::Instant::now();
        assert!(now >= last);
        last = now;
    }
    let mut by_call = sys::timespec(std::time::Duration::ZERO);
    sys!(SYS_clock_gettime, libc::CLOCK_REALTIME, &raw mut by_call).expect("clock_gettime");
    let by_vdso = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time");
    assert!(by_vdso.as_secs().abs_diff(by_call.tv_sec as u64) <= 60, "vdso and kernel disagree");
    let cpu = nix::sched::sched_getcpu().expect("sched_getcpu");
    assert!(cpu < 4096);
}

fn vdso(gate: &Gate) {
    check_clock();
    let start = std::time::Instant::now();
    gate.ready();
    assert!(start.elapsed() < std::time::Duration::from_secs(3600));
    check_clock();
}

/// Threads that are inside the vdso most of the time.
fn vdso_of_threads(gate: &Gate) {
    let threads: Vec<_> = ["v0", "v1", "v2"]
        .into_iter()
        .map(|name| {
            let control = gate.clone_for_thread();
            std::thread::spawn(move || {
                control.mark(name);
                while !control.open() {
                    check_clock();
                }
            })
        })
        .collect();
    for name in ["v0", "v1", "v2"] {
        gate.await_mark(name);
    }
    gate.ready();
    for thread in threads {
        thread.join().expect("thread");
    }
}

/// The areas of the vdso of a task.
fn vdso_areas(pid: i32) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    maps.lines()
        .filter(|line| line.contains("[v") && !line.contains("[vsyscall]"))
        .map(str::to_owned)
        .collect()
}

/// Children that may not use it, or some of it: they make system calls only.
fn vdso_protected(gate: &Gate) {
    let children: Vec<i32> = [&["[vvar]"][..], &["[vvar]", "[vvar_vclock]"], &["[vdso]"]]
        .iter()
        .map(|names| {
            let mark = names.join("");
            let pid = fork(|| {
                for line in
                    vdso_areas(sys::getpid()).iter().filter(|line| names.iter().any(|n| line.ends_with(n)))
                {
                    let (start, rest) = line.split_once('-').expect("a range");
                    let end = rest.split(' ').next().expect("its end");
                    let [start, end] =
                        [start, end].map(|n| usize::from_str_radix(n, 16).expect("an address"));
                    protect(Mapped { addr: start, len: end - start }, libc::PROT_NONE);
                }
                let before = vdso_areas(sys::getpid());
                gate.mark(&mark);
                gate.wait();
                assert_eq!(vdso_areas(sys::getpid()), before);
            });
            gate.await_mark(&mark);
            pid
        })
        .collect();
    gate.ready();
    children.into_iter().for_each(join);
}

/// Children that have unmapped some of it; what is left stays, and nothing comes back.
fn vdso_unmapped(gate: &Gate) {
    let whole = vdso_areas(sys::getpid());
    assert!(whole.iter().any(|line| line.ends_with("[vdso]")), "{whole:?}");
    let gone: &[&[&str]] = &[&["[vdso]"], &["[vdso]", "[vvar]", "[vvar_vclock]"], &["[vvar_vclock]"]];
    let children: Vec<_> = gone
        .iter()
        .map(|gone| {
            let ranges: Vec<(usize, usize)> = whole
                .iter()
                .filter(|line| gone.iter().any(|name| line.ends_with(name)))
                .map(|line| {
                    let (start, rest) = line.split_once('-').expect("a range");
                    let end = rest.split(' ').next().expect("its end");
                    let number = |text| usize::from_str_radix(text, 16).expect("an address");
                    (number(start), number(end))
                })
                .collect();
            // From then on it makes system calls only.
            let pid = only_calls(ranges);
            until_in_call(pid, pid, libc::SYS_pause);
            let left = vdso_areas(pid);
            assert!(left.len() < whole.len() || gone == &["[vvar_vclock]"], "{left:?}");
            (pid, left)
        })
        .collect();
    gate.ready();
    for (pid, left) in children {
        assert_eq!(vdso_areas(pid), left);
        sys::kill(pid, libc::SIGKILL);
        assert_eq!(sys::waitpid(pid, 0), Ok((pid, libc::SIGKILL)));
    }
}

fn only_calls(unmapped: Vec<(usize, usize)>) -> i32 {
    sys::fork(|| {
        for (start, end) in &unmapped {
            sys!(SYS_munmap, *start, end - start).expect("munmap");
        }
        loop {
            let _ = sys!(SYS_pause);
        }
    })
}

fn mappings_20000(gate: &Gate) {
    const COUNT: usize = 20_000;
    let memory = sys::anon(COUNT * PAGE);
    for n in (0..COUNT).step_by(2) {
        protect(part(memory, n * PAGE, PAGE), READ);
    }
    for n in (1..COUNT).step_by(200) {
        memory.set(n * PAGE, n as u64);
    }
    gate.ready();
    for n in (1..COUNT).step_by(200) {
        assert_eq!(memory.get::<u64>(n * PAGE), n as u64);
    }
    assert_eq!(memory.get::<u64>(0), 0);
}

fn reservation_100_gib(gate: &Gate) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let Ok(memory) = sys::mmap(0, 100 << 30, READ | WRITE, flags, -1, 0) else {
        gate.skip("no 100 GiB of address space to be had");
    };
    memory.set(50 << 30, 5_u64);
    gate.ready();
    assert_eq!(memory.get::<u64>(50 << 30), 5);
    assert_eq!(memory.get::<u64>(70 << 30), 0);
}

/// One page in every 2 MiB of 2 GiB.
fn sparse_pages(gate: &Gate) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let memory = sys::mmap(0, 2 << 30, READ | WRITE, flags, -1, 0).expect("mmap");
    advise(memory, libc::MADV_NOHUGEPAGE).expect("MADV_NOHUGEPAGE");
    for n in 0..1024 {
        memory.set(n * 2 * MIB + n, n as u8 | 1);
    }
    gate.ready();
    for n in 0..1024 {
        assert_eq!(memory.get::<u8>(n * 2 * MIB + n), n as u8 | 1, "page {n}");
    }
    assert!(rollup(sys::getpid(), "Pss") < 64 * 1024);
}

/// Areas large enough for any other way of filling there may be: full, with holes small and large, not accessible; a child
/// that has the same with some changes, and areas of its own.
fn large_areas(gate: &Gate) {
    const STEP: usize = 128 << 10;
    let full = sys::anon(3 * MIB + PAGE);
    full.fill(1);
    let holed = sys::anon(4 * MIB);
    let blocks = || (0..holed.len / STEP).map(|n| (n as u64 + 2, n * STEP));
    blocks().for_each(|(seed, at)| part(holed, at, STEP / 2 + PAGE).fill(seed));
    let scattered = sys::anon(4 * MIB);
    (0..scattered.len).step_by(2 * PAGE).for_each(|at| scattered.set(at, at as u64 | 1));
    let closed = sys::anon(2 * MIB);
    closed.fill(4);
    protect(closed, libc::PROT_NONE);
    let check = move || {
        full.check(1);
        for (seed, at) in blocks() {
            part(holed, at, STEP / 2 + PAGE).check(seed);
            part(holed, at + STEP / 2 + PAGE, STEP / 2 - PAGE).check_zero();
        }
        for at in (0..scattered.len).step_by(PAGE) {
            let value = if at % (2 * PAGE) == 0 { at as u64 | 1 } else { 0 };
            assert_eq!(scattered.get::<u64>(at), value, "page at {at:#x}");
        }
        protect(closed, READ | WRITE);
        closed.check(4);
        closed.fill(5);
        closed.check(5);
    };
    let child = fork(|| {
        let own = sys::anon(2 * MIB);
        own.fill(6);
        part(full, MIB, PAGE).fill(7);
        gate.mark("child");
        gate.wait();
        own.check(6);
        part(full, MIB, PAGE).check(7);
        (0..PAGE).step_by(8).for_each(|at| {
            let at = MIB + at;
            full.set(at, sys::pattern(1, at));
        });
        check();
    });
    gate.await_mark("child");
    gate.ready();
    check();
    join(child);
}

/// Mappings where a restorer might like to put its own things.
fn lowest_and_highest(gate: &Gate) {
    let lowest: usize = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(65536);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let places = [lowest.max(PAGE), 0x10_0000, 0x1_0000_0000, 0x7fff_ffff_e000];
    let memory: Vec<Mapped> = places
        .into_iter()
        .filter_map(|addr| sys::mmap(addr, PAGE, READ | WRITE, flags | libc::MAP_FIXED_NOREPLACE, -1, 0).ok())
        .collect();
    for m in &memory {
        m.fill(m.addr as u64);
    }
    gate.ready();
    for m in &memory {
        m.check(m.addr as u64);
    }
}

fn moved(gate: &Gate) {
    let memory = sys::anon(16 * PAGE);
    memory.fill(150);
    let addr = sys!(SYS_mremap, memory.addr, 16 * PAGE, 40 * PAGE, libc::MREMAP_MAYMOVE).expect("mremap");
    let moved = Mapped { addr, len: 40 * PAGE };
    gate.ready();
    part(moved, 0, 16 * PAGE).check(150);
    part(moved, 16 * PAGE, 24 * PAGE).check_zero();
}

fn holes(gate: &Gate) {
    let memory = sys::anon(64 * PAGE);
    memory.fill(151);
    for n in (1..64).step_by(3) {
        sys!(SYS_munmap, memory.at(n * PAGE), PAGE).expect("munmap");
    }
    gate.ready();
    for n in 0..64 {
        if n % 3 == 1 {
            assert!(!readable(memory.at(n * PAGE)), "page {n}");
        } else {
            let (got, want): (u64, u64) = (memory.get(n * PAGE + 8), sys::pattern(151, n * PAGE + 8));
            assert_eq!(got, want, "page {n}");
        }
    }
}

fn secret_memory(gate: &Gate) {
    let Ok(fd) = sys!(SYS_memfd_secret, 0) else {
        gate.skip("no memfd_secret");
    };
    let fd = sys::int(fd);
    sys!(SYS_ftruncate, fd, 2 * PAGE).expect("ftruncate");
    let memory = match sys::mmap(0, 2 * PAGE, READ | WRITE, libc::MAP_SHARED, fd, 0) {
        Ok(memory) => memory,
        Err(errno) => gate.skip(&format!("mapping secret memory: errno {errno}")),
    };
    memory.fill(170);
    gate.ready();
    memory.check(170);
}
