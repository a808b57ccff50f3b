//! Registers, and what the kernel keeps for user space at every switch: bases, rseq, robust lists.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::asm;
use crate::case::Case;
use crate::gate::{Gate, fork, join};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("registers", registers).fifty(),
    Case::new("registers_of_threads", registers_of_threads).disturbed(),
    Case::new("vector_registers", vector_registers).disturbed(),
    Case::new("sse_registers", sse_registers),
    Case::new("x87_and_mxcsr", x87_and_mxcsr).disturbed(),
    Case::new("tiles", tiles).peer_fails("refuses or loses AMX").disturbed(),
    Case::new("tiles_of_threads", tiles_of_threads).peer_fails("refuses or loses AMX"),
    Case::new("tiles_permitted", tiles_permitted).peer_fails("loses the permission"),
    Case::new("gs_base", gs_base),
    Case::new("tls_descriptors", tls_descriptors),
    Case::new("rseq", rseq),
    Case::new("rseq_of_threads", rseq_of_threads),
    Case::new("robust_mutex", robust_mutex),
    Case::new("robust_mutex_of_thread", robust_mutex_of_thread),
    Case::new("robust_mutex_in_file", robust_mutex_in_file)
        .peer_fails("lets the kernel break locks in files"),
    Case::new("robust_list_in_file", robust_list_in_file).peer_fails("lets the kernel break locks in files"),
    Case::new("thread_id_in_file", thread_id_in_file).peer_fails("lets the kernel clear words in files"),
    Case::new("syscall_user_dispatch", syscall_user_dispatch).refused("syscall user dispatch"),
];

/// Runs `spin` in a thread while the gate is closed.
fn spinning<T: Send + 'static>(
    gate: &Gate,
    spin: impl FnOnce(&'static AtomicU64) -> T + Send + 'static,
) -> T {
    let flag: &'static AtomicU64 = Box::leak(Box::default());
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        control.mark("spins");
        spin(flag)
    });
    gate.await_mark("spins");
    // It needs a moment to be inside the loop; if it is not, the case is weaker, not wrong.
    sys::nap(Duration::from_millis(3));
    gate.ready();
    flag.store(7, Ordering::Relaxed);
    thread.join().expect("spinning thread")
}

fn registers(gate: &Gate) {
    let found = spinning(gate, asm::spin_gprs);
    assert_eq!(found[..14], asm::expected_gprs(7), "general registers");
    assert_eq!(found[14] & asm::STATUS_FLAGS, asm::STATUS_FLAGS, "flags");
}

fn registers_of_threads(gate: &Gate) {
    let flag: &'static AtomicU64 = Box::leak(Box::default());
    let names = ["s0", "s1", "s2", "s3"];
    let threads: Vec<_> = names
        .into_iter()
        .map(|name| {
            let control = gate.clone_for_thread();
            std::thread::spawn(move || {
                control.mark(name);
                asm::spin_gprs(flag)
            })
        })
        .collect();
    for name in names {
        gate.await_mark(name);
    }
    sys::nap(Duration::from_millis(5));
    gate.ready();
    flag.store(9, Ordering::Relaxed);
    for thread in threads {
        let found = thread.join().expect("spinning thread");
        assert_eq!(found[..14], asm::expected_gprs(9), "general registers");
    }
}

fn vectors(gate: &Gate, width: usize) {
    let count = if width == 64 { 32 } else { 16 };
    let bytes: Vec<u8> = (0..count * width).map(|n| (sys::pattern(5, n) >> 11) as u8).collect();
    let masks: [u64; 8] = std::array::from_fn(|n| sys::pattern(6, n));
    let given = bytes.clone();
    let (found, found_masks) = spinning(gate, move |flag| asm::spin_vectors(flag, width, &given, &masks));
    for n in 0..count {
        let range = n * width..(n + 1) * width;
        assert_eq!(found[range.clone()], bytes[range], "vector register {n} of {width} bytes");
    }
    assert_eq!(found_masks, masks, "mask registers");
}

fn vector_registers(gate: &Gate) {
    let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    vectors(
        gate,
        if wide {
            64
        } else if is_x86_feature_detected!("avx") {
            32
        } else {
            16
        },
    );
}

fn sse_registers(gate: &Gate) {
    vectors(gate, 16);
}

fn x87_and_mxcsr(gate: &Gate) {
    let values = [1.5, -2.25, 1e300, -0.0, 3.0, 1e-300, 123_456.75, f64::INFINITY];
    let (found, words) = spinning(gate, move |flag| asm::spin_x87(flag, &values));
    assert_eq!(found.map(f64::to_bits), values.map(f64::to_bits), "x87 stack");
    assert_eq!(words, asm::X87_WORDS, "mxcsr and x87 control word");
}

const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
const TILE_DATA: usize = 18;

fn may_use_tiles(gate: &Gate) {
    if sys!(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA).is_err() {
        gate.skip("this processor or kernel has no AMX");
    }
}

/// Palette 1, eight tiles of 16 rows of 64 bytes.
fn tile_config() -> [u8; 64] {
    let mut config = [0; 64];
    config[0] = 1;
    for tile in 0..8 {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
    }
    config
}

fn tile_bytes(seed: u64) -> [u8; 8192] {
    std::array::from_fn(|n| (sys::pattern(seed, n) >> 13) as u8)
}

fn tiles(gate: &Gate) {
    may_use_tiles(gate);
    let found = spinning(gate, |flag| asm::spin_tiles(flag, &tile_bytes(1), &tile_config()));
    assert!(found.0 == tile_bytes(1), "tiles");
    assert_eq!(found.1, tile_config(), "their configuration");
}

/// Some threads have tiles in use, others may use them and do not.
fn tiles_of_threads(gate: &Gate) {
    may_use_tiles(gate);
    let flag: &'static AtomicU64 = Box::leak(Box::default());
    let threads: Vec<_> = (0..4_u64)
        .map(|n| {
            let control = gate.clone_for_thread();
            std::thread::spawn(move || {
                control.mark(&format!("tiles{n}"));
                if n % 2 == 1 {
                    control.wait();
                }
                let found = asm::spin_tiles(flag, &tile_bytes(n), &tile_config());
                assert!(found == (tile_bytes(n).to_vec(), tile_config()), "tiles of thread {n}");
            })
        })
        .collect();
    for n in 0..4 {
        gate.await_mark(&format!("tiles{n}"));
    }
    sys::nap(Duration::from_millis(5));
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        let found = asm::spin_tiles(&AtomicU64::new(1), &tile_bytes(9), &tile_config());
        assert!(found.0 == tile_bytes(9), "tiles of a child");
    });
    gate.await_mark("child");
    gate.ready();
    flag.store(1, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("thread");
    }
    join(child);
}

/// The permission is there, and no tile is in use.
fn tiles_permitted(gate: &Gate) {
    may_use_tiles(gate);
    asm::spin_tiles(&AtomicU64::new(1), &tile_bytes(1), &tile_config());
    gate.ready();
    let found = asm::spin_tiles(&AtomicU64::new(1), &tile_bytes(2), &tile_config());
    assert!(found.0 == tile_bytes(2), "tiles");
}

/// The gs base belongs to the program on x86-64; each thread has its own.
fn gs_base(gate: &Gate) {
    const ARCH_SET_GS: usize = 0x1001;
    let memory = sys::anon(8192);
    let set = move |n: usize| {
        memory.set(n * 4096 + 16, 0xfeed_0000_u64 + n as u64);
        sys!(SYS_arch_prctl, ARCH_SET_GS, memory.at(n * 4096)).expect("ARCH_SET_GS");
    };
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        set(1);
        control.mark("thread");
        control.wait();
        assert_eq!(asm::read_gs(16), 0xfeed_0001, "word at gs:16 of the thread");
    });
    set(0);
    gate.await_mark("thread");
    gate.ready();
    assert_eq!(asm::read_gs(16), 0xfeed_0000, "word at gs:16");
    thread.join().expect("thread");
}

/// set_thread_area: three slots of the GDT per thread.
fn tls_descriptors(gate: &Gate) {
    /// struct user_desc: entry number, base, limit, flag bits.
    fn descriptor(entry: u32, base: u32) -> [u32; 4] {
        // seg_32bit, limit in pages, usable
        [entry, base, 0xf_ffff, 1 | 1 << 4 | 1 << 6]
    }
    for (entry, base) in [(12, 0x1234_5000), (14, 0x7654_3000)] {
        let given = descriptor(entry, base);
        if sys!(SYS_set_thread_area, given.as_ptr()).is_err() {
            gate.skip("set_thread_area is not available");
        }
    }
    gate.ready();
    for (entry, base) in [(12, 0x1234_5000), (14, 0x7654_3000)] {
        let mut found = [entry, 0, 0, 0];
        sys!(SYS_get_thread_area, found.as_mut_ptr()).expect("get_thread_area");
        assert_eq!(found[..3], descriptor(entry, base)[..3], "descriptor {entry}");
    }
}

/// The kernel keeps the cpu number in the registered area up to date.
fn check_rseq(area: u64) {
    let mut all = 0_u64;
    sys!(SYS_sched_getaffinity, 0, 8, &raw mut all).expect("sched_getaffinity");
    for cpu in (0..64).filter(|cpu| all >> cpu & 1 == 1) {
        let only = 1_u64 << cpu;
        sys!(SYS_sched_setaffinity, 0, 8, &raw const only).expect("sched_setaffinity");
        let seen: u32 = sys::peek(area as usize + 4);
        assert_eq!(seen, cpu, "cpu_id in the rseq area");
    }
    sys!(SYS_sched_setaffinity, 0, 8, &raw const all).expect("sched_setaffinity");
}

fn own_rseq_area(gate: &Gate) -> u64 {
    match asm::rseq_offset() {
        Some(offset) => asm::thread_pointer().wrapping_add_signed(offset),
        None => gate.skip("this C library registers no rseq area"),
    }
}

fn rseq(gate: &Gate) {
    let area = own_rseq_area(gate);
    check_rseq(area);
    gate.ready();
    assert_eq!(own_rseq_area(gate), area);
    check_rseq(area);
}

fn rseq_of_threads(gate: &Gate) {
    own_rseq_area(gate);
    let threads: Vec<_> = ["r0", "r1", "r2"]
        .into_iter()
        .map(|name| {
            let control = gate.clone_for_thread();
            std::thread::spawn(move || {
                control.mark(name);
                control.wait();
                check_rseq(own_rseq_area(&control));
            })
        })
        .collect();
    for name in ["r0", "r1", "r2"] {
        gate.await_mark(name);
    }
    gate.ready();
    for thread in threads {
        thread.join().expect("thread");
    }
}

/// A futex word in shared memory, on a robust list made by hand, so that the kernel alone is tested.
struct Robust {
    memory: sys::Mapped,
}

impl Robust {
    /// struct robust_list_head at 0 (list, futex_offset, pending), one entry at 64, its futex at 72.
    const ENTRY: usize = 64;
    const FUTEX: usize = 72;

    fn hold(memory: sys::Mapped) -> Robust {
        memory.set(0, memory.at(Self::ENTRY));
        memory.set(8, (Self::FUTEX - Self::ENTRY) as i64);
        memory.set(16, 0_u64);
        memory.set(Self::ENTRY, memory.at(0));
        memory.set(Self::FUTEX, sys::gettid());
        sys!(SYS_set_robust_list, memory.at(0), 24).expect("set_robust_list");
        Robust { memory }
    }

    /// Waits until the word says that its owner has died.
    fn await_owner_death(memory: sys::Mapped) {
        let start = std::time::Instant::now();
        while memory.get::<u32>(Self::FUTEX) & libc::FUTEX_OWNER_DIED == 0 {
            assert!(start.elapsed() < crate::gate::PATIENCE, "the owner's death was not told");
            sys::nap(Duration::from_micros(300));
        }
    }
}

fn robust_mutex(gate: &Gate) {
    let memory = sys::shared(4096);
    let child = fork(|| {
        let held = Robust::hold(memory);
        gate.mark("held");
        gate.wait();
        let (mut head, mut len) = (0_usize, 0_usize);
        sys!(SYS_get_robust_list, 0, &raw mut head, &raw mut len).expect("get_robust_list");
        assert_eq!((head, len), (held.memory.at(0), 24), "robust list");
        // Dies holding it.
    });
    gate.await_mark("held");
    gate.ready();
    join(child);
    Robust::await_owner_death(memory);
}

fn robust_mutex_of_thread(gate: &Gate) {
    let memory = sys::shared(4096);
    let control = gate.clone_for_thread();
    std::thread::spawn(move || {
        Robust::hold(memory);
        control.mark("held");
        control.wait();
        sys::thread_exit();
    });
    gate.await_mark("held");
    gate.ready();
    Robust::await_owner_death(memory);
}

/// A file of one page, mapped shared.
fn shared_file(name: &str) -> sys::Mapped {
    std::fs::File::create_new(name).expect("create").set_len(4096).expect("set_len");
    let path = std::ffi::CString::new(name).expect("path");
    let fd = sys::open(&path, libc::O_RDWR).expect("open");
    let memory =
        sys::mmap(0, 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0).expect("mmap");
    sys::close(fd);
    memory
}

/// Locks in a file are held by a thread and by the leader; their lists are in memory of their own. When the dumped tasks
/// are killed, nobody may find the locks without an owner.
fn robust_mutex_in_file(gate: &Gate) {
    const OTHER: usize = 1024;
    let file = shared_file("locks");
    let hold = move |head: sys::Mapped, at: usize| {
        // The list has one entry, in the file.
        head.set(0, file.at(at));
        head.set(8, 8_i64);
        head.set(16, 0_u64);
        file.set(at, head.at(0));
        file.set(at + 8, sys::gettid());
        sys!(SYS_set_robust_list, head.at(0), 24).expect("set_robust_list");
    };
    let check = move |head: sys::Mapped, at: usize| {
        assert_eq!(file.get::<i32>(at + 8), sys::gettid(), "owner of the lock");
        assert_eq!((head.get::<usize>(0), file.get::<usize>(at)), (file.at(at), head.at(0)), "robust list");
    };
    let heads = [sys::anon(4096), sys::anon(4096)];
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        hold(heads[1], OTHER);
        control.mark("held");
        control.wait();
        check(heads[1], OTHER);
        sys::thread_exit();
    });
    hold(heads[0], 0);
    gate.await_mark("held");
    gate.ready();
    check(heads[0], 0);
    drop(thread);
    // And the end of the thread itself is told.
    let start = std::time::Instant::now();
    while file.get::<u32>(OTHER + 8) & libc::FUTEX_OWNER_DIED == 0 {
        assert!(start.elapsed() < crate::gate::PATIENCE, "the owner's death was not told");
        sys::nap(Duration::from_micros(300));
    }
}

/// The list itself is in the file.
fn robust_list_in_file(gate: &Gate) {
    let file = shared_file("locks");
    let child = fork(|| {
        let held = Robust::hold(file);
        gate.mark("held");
        gate.wait();
        assert_eq!(held.memory.get::<i32>(Robust::FUTEX), sys::gettid(), "owner of the lock");
        assert_eq!(held.memory.get::<usize>(0), held.memory.at(Robust::ENTRY), "robust list");
    });
    gate.await_mark("held");
    gate.ready();
    join(child);
    Robust::await_owner_death(file);
}

/// The words that the kernel clears when a thread ends are in a file: they say that the threads are there.
fn thread_id_in_file(gate: &Gate) {
    let file = shared_file("ids");
    let control = gate.clone_for_thread();
    let threads: Vec<_> = (0..4)
        .map(|n| {
            let control = control.clone_for_thread();
            std::thread::spawn(move || {
                file.set(8 * n, sys::gettid());
                sys!(SYS_set_tid_address, file.at(8 * n)).expect("set_tid_address");
                control.mark(&format!("set{n}"));
                control.wait();
                assert_eq!(file.get::<i32>(8 * n), sys::gettid(), "id of thread {n}");
                sys::thread_exit();
            })
        })
        .collect();
    for n in 0..4 {
        gate.await_mark(&format!("set{n}"));
    }
    gate.ready();
    for n in 0..4 {
        let start = std::time::Instant::now();
        while file.get::<i32>(8 * n) != 0 {
            assert!(start.elapsed() < crate::gate::PATIENCE, "the end of thread {n} was not told");
            sys::nap(Duration::from_micros(300));
        }
    }
    // Nobody can join them: the word that tells their end to the C library is another one.
    std::mem::forget(threads);
}

fn syscall_user_dispatch(gate: &Gate) {
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    let memory = sys::anon(4096);
    // The selector byte 0 lets every call through.
    if sys!(SYS_prctl, PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, memory.at(0)).is_err() {
        gate.skip("this kernel has no syscall user dispatch");
    }
    gate.ready();
}
