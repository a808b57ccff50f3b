//! Memory protection keys: which are allocated, which area has which, what rights each thread has; and memory that may be
//! executed and not read, for which the kernel takes a key of its own.

use crate::asm;
use crate::case::Case;
use crate::cases::memory::{EXEC, PAGE, READ, WRITE, code, part, protect, readable};
use crate::gate::{Gate, fork, join};
use crate::sys::{self, Mapped};

const PEER: &str = "knows no protection keys";

pub const CASES: &[Case] = &[
    Case::new("protection_keys", protection_keys).peer_fails(PEER).disturbed(),
    Case::new("protection_keys_unused", protection_keys_unused).peer_fails(PEER),
    Case::new("protection_keys_freed", protection_keys_freed).peer_fails(PEER),
    Case::new("protection_keys_of_kinds", protection_keys_of_kinds).peer_fails(PEER),
    Case::new("protection_keys_of_threads", protection_keys_of_threads).peer_fails(PEER),
    Case::new("protection_keys_of_children", protection_keys_of_children).peer_fails(PEER),
    Case::new("protection_keys_all", protection_keys_all).peer_fails(PEER),
    Case::new("protection_key_0_write_denied", protection_key_0_write_denied).peer_fails(PEER),
    Case::new("execute_only", execute_only).disturbed(),
    Case::new("execute_only_not_first", execute_only_not_first).peer_fails(PEER),
    Case::new("execute_only_of_file", execute_only_of_file),
    Case::new("execute_only_of_children", execute_only_of_children).peer_fails(PEER),
    Case::new("execute_only_without_key", execute_only_without_key).peer_fails(PEER),
];

/// Two bits for each key in PKRU: no access, no writes.
const NO_ACCESS: u32 = 1;
const NO_WRITE: u32 = 2;

fn new_key(gate: &Gate, rights: u32) -> u32 {
    match sys!(SYS_pkey_alloc, 0, rights) {
        Ok(key) => u32::try_from(key).expect("a small number"),
        Err(_) => gate.skip("this processor or kernel has no protection keys"),
    }
}

fn has_keys() -> bool {
    std::fs::read_to_string("/proc/self/smaps").expect("smaps").contains("ProtectionKey:")
}

fn free_key(key: u32) {
    sys!(SYS_pkey_free, key).expect("pkey_free");
}

fn give_key(part: Mapped, access: i32, key: u32) {
    sys!(SYS_pkey_mprotect, part.addr, part.len, access, key).expect("pkey_mprotect");
}

fn rights(key: u32) -> u32 {
    asm::read_pkru() >> (2 * key) & 3
}

fn set_rights(key: u32, rights: u32) {
    asm::write_pkru(asm::read_pkru() & !(3 << (2 * key)) | rights << (2 * key));
}

/// The key that smaps shows for the area which begins at `addr`.
fn key_of(addr: usize) -> u32 {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let head = format!("{addr:x}-");
    let area = text.split("VmFlags:").find(|area| area.lines().any(|line| line.starts_with(&head)));
    let line = area.and_then(|area| area.lines().find_map(|line| line.strip_prefix("ProtectionKey:")));
    line.expect("ProtectionKey").trim().parse().expect("a number")
}

/// Takes all keys that are free, and tells which they were. None is free afterwards.
fn take_all() -> Vec<u32> {
    std::iter::from_fn(|| sys!(SYS_pkey_alloc, 0, 0).ok().and_then(|key| u32::try_from(key).ok())).collect()
}

fn protection_keys(gate: &Gate) {
    let key = new_key(gate, 0);
    let memory = sys::anon(4 * PAGE);
    memory.fill(3);
    give_key(part(memory, 0, 2 * PAGE), READ | WRITE, key);
    set_rights(key, NO_WRITE);
    let pkru = asm::read_pkru();
    gate.ready();
    assert_eq!(asm::read_pkru(), pkru, "pkru");
    memory.check(3);
    assert_eq!((key_of(memory.addr), key_of(memory.at(2 * PAGE))), (key, 0), "keys of areas");
    set_rights(key, NO_ACCESS);
    assert!(!readable(memory.addr) && readable(memory.at(2 * PAGE)));
    set_rights(key, 0);
    memory.fill(4);
    assert_eq!(take_all(), (1..16).filter(|free| *free != key).collect::<Vec<_>>(), "keys that were free");
}

/// Keys that are allocated, and no area has one of them.
fn protection_keys_unused(gate: &Gate) {
    let keys = [new_key(gate, 0), new_key(gate, NO_ACCESS), new_key(gate, NO_WRITE)];
    free_key(keys[1]);
    let pkru = asm::read_pkru();
    gate.ready();
    assert_eq!(asm::read_pkru(), pkru, "pkru");
    let free: Vec<u32> = (1..16).filter(|key| *key != keys[0] && *key != keys[2]).collect();
    assert_eq!(take_all(), free, "keys that were free");
}

/// A key that was freed stays with its area.
fn protection_keys_freed(gate: &Gate) {
    let keys = [new_key(gate, 0), new_key(gate, 0), new_key(gate, 0)];
    let memory = sys::anon(2 * PAGE);
    memory.fill(5);
    give_key(memory, READ, keys[1]);
    free_key(keys[1]);
    gate.ready();
    assert_eq!(key_of(memory.addr), keys[1]);
    memory.check(5);
    set_rights(keys[1], NO_ACCESS);
    assert!(!readable(memory.addr));
    assert_eq!(new_key(gate, 0), keys[1], "it was free");
}

/// Every kind of mapping may have a key, and every protection.
fn protection_keys_of_kinds(gate: &Gate) {
    let keys = [new_key(gate, 0), new_key(gate, 0)];
    let shared = sys::shared(2 * PAGE);
    let file = std::fs::File::create_new("of-a-file").expect("create");
    file.set_len(4 * PAGE as u64).expect("set_len");
    let fd = sys::open(c"of-a-file", libc::O_RDWR).expect("open");
    let memfd = sys::int(sys!(SYS_memfd_create, c"of-a-memfd".as_ptr(), 0).expect("memfd_create"));
    sys!(SYS_ftruncate, memfd, 4 * PAGE).expect("ftruncate");
    let map = |len, access, flags, fd| sys::mmap(0, len, access, flags, fd, 0).expect("mmap");
    let areas = [
        (shared, READ | WRITE, keys[0]),
        (map(PAGE, READ | WRITE, libc::MAP_SHARED, fd), READ, keys[1]),
        (map(2 * PAGE, READ | WRITE, libc::MAP_PRIVATE, fd), READ | WRITE, keys[0]),
        (map(PAGE, READ | WRITE, libc::MAP_SHARED, memfd), READ | WRITE, keys[1]),
        (map(PAGE, READ | WRITE, libc::MAP_PRIVATE, memfd), READ, keys[0]),
        (map(PAGE, READ | WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1), libc::PROT_NONE, keys[1]),
        (map(PAGE, READ | WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1), READ | EXEC, keys[1]),
        (map(PAGE, READ | WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1), EXEC, keys[1]),
        (map(PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1), WRITE, keys[0]),
    ];
    for (n, (area, access, key)) in areas.into_iter().enumerate() {
        if n < 8 {
            area.fill(n as u64);
        }
        give_key(area, access, key);
    }
    for key in keys {
        set_rights(key, NO_ACCESS);
    }
    gate.ready();
    for (area, _, key) in areas {
        assert_eq!(key_of(area.addr), key, "key of {:x}", area.addr);
        assert!(!readable(area.addr));
    }
    for key in keys {
        set_rights(key, 0);
    }
    // The last writes win: areas 1 and 3 are the objects under areas 2 and 4, which have pages of their own.
    for (n, (area, access, key)) in areas.into_iter().enumerate().take(8) {
        give_key(area, access | READ, key);
        area.check(n as u64);
    }
}

/// Rights belong to threads.
fn protection_keys_of_threads(gate: &Gate) {
    let keys = [new_key(gate, 0), new_key(gate, 0)];
    let memory = sys::anon(PAGE);
    memory.fill(6);
    give_key(memory, READ, keys[0]);
    let threads: Vec<_> = [0, NO_ACCESS, NO_WRITE, NO_ACCESS | NO_WRITE]
        .into_iter()
        .map(|wanted| {
            let control = gate.clone_for_thread();
            let name = format!("rights{wanted}");
            let mark = name.clone();
            let thread = std::thread::spawn(move || {
                set_rights(keys[0], wanted);
                set_rights(keys[1], 3 - wanted);
                let pkru = asm::read_pkru();
                control.mark(&mark);
                control.wait();
                assert_eq!(asm::read_pkru(), pkru, "pkru");
                assert_eq!(readable(memory.addr), wanted & NO_ACCESS == 0, "rights {wanted}");
            });
            (name, thread)
        })
        .collect();
    for (name, _) in &threads {
        gate.await_mark(name);
    }
    gate.ready();
    for (_, thread) in threads {
        thread.join().expect("thread");
    }
}

/// Children inherit keys, and go their own ways; one shares the address space.
fn protection_keys_of_children(gate: &Gate) {
    let keys = [new_key(gate, 0), new_key(gate, 0)];
    let memory = sys::anon(64 * PAGE);
    memory.fill(7);
    give_key(memory, READ | WRITE, keys[0]);
    let children = [
        fork(|| {
            gate.wait();
            assert_eq!(key_of(memory.addr), keys[0]);
            memory.check(7);
            assert_eq!(new_key(gate, 0), 3);
        }),
        fork(|| {
            let third = new_key(gate, 0);
            give_key(part(memory, 0, 8 * PAGE), READ, third);
            free_key(keys[1]);
            let inner = fork(|| {
                give_key(part(memory, 0, 8 * PAGE), READ | WRITE, 0);
                part(memory, 0, PAGE).fill(8);
                gate.mark("inner");
                gate.wait();
                assert_eq!((key_of(memory.addr), key_of(memory.at(8 * PAGE))), (0, keys[0]));
                part(memory, 0, PAGE).check(8);
            });
            gate.mark("child");
            gate.wait();
            join(inner);
            assert_eq!((key_of(memory.addr), key_of(memory.at(8 * PAGE))), (third, keys[0]));
            memory.check(7);
            assert_eq!(new_key(gate, 0), keys[1]);
        }),
    ];
    for mark in ["inner", "child"] {
        gate.await_mark(mark);
    }
    // Of the address space there is one, of the register two.
    let body = |arg: usize| {
        let (gate, key) = *sys::borrow::<(usize, u32)>(arg);
        set_rights(key, NO_ACCESS);
        Gate::at(gate).mark("vm");
        Gate::at(gate).wait();
        i32::from(rights(key) != NO_ACCESS)
    };
    let arg = Box::leak(Box::new((gate.address(), keys[0])));
    let vm =
        sys::clone_child(libc::CLONE_VM | libc::SIGCHLD, body, std::ptr::from_ref(arg).expose_provenance());
    gate.await_mark("vm");
    gate.ready();
    assert_eq!((key_of(memory.addr), rights(keys[0])), (keys[0], 0));
    memory.check(7);
    for child in children.into_iter().chain([vm]) {
        join(child);
    }
}

fn protection_keys_all(gate: &Gate) {
    let first = new_key(gate, 0);
    let mut keys = take_all();
    keys.insert(0, first);
    let memory = sys::anon(16 * PAGE);
    for (n, key) in keys.iter().enumerate() {
        part(memory, n * PAGE, PAGE).fill(n as u64);
        give_key(part(memory, n * PAGE, PAGE), READ, *key);
    }
    gate.ready();
    for (n, key) in keys.iter().enumerate() {
        assert_eq!(key_of(memory.at(n * PAGE)), *key);
        part(memory, n * PAGE, PAGE).check(n as u64);
    }
    assert!(take_all().is_empty());
}

/// The mapping that an address lies in.
fn mapping_of(addr: usize) -> Mapped {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let hex = |text: &str| usize::from_str_radix(text, 16).expect("address");
    let ranges = maps.lines().filter_map(|line| line.split(' ').next()?.split_once('-'));
    let (start, end) = ranges
        .map(|(start, end)| (hex(start), hex(end)))
        .find(|(start, end)| (*start..*end).contains(&addr))
        .expect("mapping");
    Mapped { addr: start, len: end - start }
}

/// A thread that may write nowhere but to its stack.
fn protection_key_0_write_denied(gate: &Gate) {
    let key = new_key(gate, 0);
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        let here = std::ptr::from_ref(&key).expose_provenance();
        // The whole stack, which has the thread's own variables and what the kernel writes for rseq at its end.
        let stack = mapping_of(here);
        give_key(stack, READ | WRITE, key);
        control.mark("denied");
        set_rights(0, NO_WRITE);
        while !control.open() {
            let nap = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let _ = sys!(SYS_nanosleep, &raw const nap, 0);
        }
        let found = rights(0);
        set_rights(0, 0);
        give_key(stack, READ | WRITE, 0);
        assert_eq!(found, NO_WRITE, "rights for key 0");
    });
    gate.await_mark("denied");
    sys::nap(std::time::Duration::from_millis(3));
    gate.ready();
    thread.join().expect("thread");
}

fn execute_only(gate: &Gate) {
    let memory = sys::anon(PAGE);
    code(memory, 4711);
    protect(memory, EXEC);
    let key = has_keys().then(|| key_of(memory.addr));
    assert_eq!(key.is_some_and(|key| key != 0), !readable(memory.addr));
    gate.ready();
    assert_eq!(sys::run_code(memory.addr), 4711);
    assert_eq!(has_keys().then(|| key_of(memory.addr)), key);
    assert_eq!(key.is_some_and(|key| key != 0), !readable(memory.addr));
    let other = sys::mmap(0, PAGE, EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).expect("mmap");
    assert_eq!(has_keys().then(|| key_of(other.addr)), key, "more memory gets the same key");
}

/// The kernel's key is behind two of the program's own, and above it is one more.
fn execute_only_not_first(gate: &Gate) {
    let keys = [new_key(gate, 0), new_key(gate, 0)];
    let memory = sys::anon(2 * PAGE);
    code(memory, 4711);
    protect(part(memory, 0, PAGE), EXEC);
    let above = new_key(gate, 0);
    assert_eq!((key_of(memory.addr), above), (3, 4));
    free_key(keys[0]);
    give_key(part(memory, PAGE, PAGE), READ, above);
    gate.ready();
    assert_eq!((key_of(memory.addr), key_of(memory.at(PAGE))), (3, above));
    assert!(!readable(memory.addr));
    assert_eq!(sys::run_code(memory.addr), 4711);
    assert_eq!(sys!(SYS_pkey_free, 3), Err(libc::EINVAL), "it is the kernel's");
    assert_eq!(take_all(), [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
}

/// Never written, so nothing but its protection is there to be restored.
fn execute_only_of_file(gate: &Gate) {
    let bytes = [0xb8, 0x67, 0x12, 0, 0, 0xc3];
    std::fs::write("code", bytes).expect("write code");
    let fd = sys::open(c"code", libc::O_RDONLY).expect("open");
    let memory = sys::mmap(0, PAGE, EXEC, libc::MAP_PRIVATE, fd, 0).expect("mmap");
    let shared = sys::mmap(0, PAGE, EXEC, libc::MAP_SHARED, fd, 0).expect("mmap");
    sys::close(fd);
    gate.ready();
    assert_eq!((sys::run_code(memory.addr), sys::run_code(shared.addr)), (0x1267, 0x1267));
    assert_eq!((readable(memory.addr), readable(shared.addr)), (!has_keys(), !has_keys()));
}

/// A parent without such memory, a child that has it, another with another key for it.
fn execute_only_of_children(gate: &Gate) {
    if !has_keys() {
        gate.skip("this processor or kernel has no protection keys");
    }
    let memory = sys::anon(64 * PAGE);
    memory.fill(9);
    code(memory, 4711);
    let page = part(memory, 0, PAGE);
    let child = |name: &str, keys: usize| {
        let pid = fork(|| {
            let own: Vec<u32> = (0..keys).map(|_| new_key(gate, 0)).collect();
            protect(page, EXEC);
            assert_eq!(key_of(page.addr), u32::try_from(keys).expect("few") + 1);
            gate.mark(name);
            gate.wait();
            assert_eq!(key_of(page.addr), u32::try_from(keys).expect("few") + 1);
            assert!(!readable(page.addr));
            assert_eq!(sys::run_code(page.addr), 4711);
            own.into_iter().for_each(free_key);
        });
        gate.await_mark(name);
        pid
    };
    let children = [child("one", 0), child("two", 1), child("three", 5)];
    let late = fork(|| {
        protect(page, READ | WRITE | EXEC);
        gate.mark("late");
        gate.wait();
        page.set(1, 4712_u32.to_le_bytes());
        assert_eq!(sys::run_code(page.addr), 4712);
    });
    gate.await_mark("late");
    gate.ready();
    assert_eq!(key_of(memory.addr), 0);
    assert_eq!(take_all(), (1..16).collect::<Vec<_>>());
    for pid in children.into_iter().chain([late]) {
        join(pid);
    }
}

/// Such memory when all keys are taken: it can be read, and is so ever after.
fn execute_only_without_key(gate: &Gate) {
    let first = new_key(gate, 0);
    let keys = take_all();
    let memory = sys::anon(2 * PAGE);
    code(memory, 4711);
    protect(part(memory, 0, PAGE), EXEC);
    assert_eq!(key_of(memory.addr), 0);
    keys.into_iter().for_each(free_key);
    give_key(part(memory, PAGE, PAGE), READ, first);
    gate.ready();
    assert_eq!((key_of(memory.addr), key_of(memory.at(PAGE))), (0, first));
    assert!(readable(memory.addr));
    assert_eq!(sys::run_code(memory.addr), 4711);
}
