//! Memory that several tasks have together: shared, or copied on write.

use std::sync::atomic::Ordering;

use super::memory::{MIB, PAGE, READ, WRITE, advise, part, protect, readable, rollup};
use crate::case::Case;
use crate::gate::{Gate, fork, join};
use crate::sys::{self, Mapped};

pub const CASES: &[Case] = &[
    Case::new("shared_memory", shared_memory).disturbed(),
    Case::new("shared_by_five", shared_by_five),
    Case::new("shared_in_parts", shared_in_parts)
        .peer_fails("restores shared memory only as far as its first task maps it"),
    Case::new("shared_mapped_twice", shared_mapped_twice),
    Case::new("dev_zero_shared", dev_zero_shared),
    Case::new("dev_zero_private", dev_zero_private),
    Case::new("copy_on_write_kept", copy_on_write_kept),
    Case::new("copy_on_write_changed", copy_on_write_changed),
    Case::new("child_layout_differs", child_layout_differs),
    Case::new("sysv_shm", sysv_shm).refused("sysv"),
    Case::new("sysv_shm_in_child", sysv_shm_in_child).refused("sysv"),
];

fn shared_memory(gate: &Gate) {
    let memory = sys::shared(MIB);
    memory.fill(20);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        memory.check(20);
        memory.fill(21);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    memory.check(21);
}

fn shared_by_five(gate: &Gate) {
    let memory = sys::shared(2 * MIB);
    memory.fill(30);
    let turns = sys::shared(PAGE);
    let children: Vec<i32> = (0..4_u64)
        .map(|n| {
            fork(|| {
                sys::atomic(turns.at(8)).fetch_add(1, Ordering::SeqCst);
                gate.wait();
                while sys::atomic(turns.at(0)).load(Ordering::SeqCst) != n {
                    sys::nap(std::time::Duration::from_micros(200));
                }
                memory.check(30 + n);
                memory.fill(31 + n);
                sys::atomic(turns.at(0)).store(n + 1, Ordering::SeqCst);
            })
        })
        .collect();
    while sys::atomic(turns.at(8)).load(Ordering::SeqCst) < 4 {
        sys::nap(std::time::Duration::from_micros(200));
    }
    gate.ready();
    for child in children {
        join(child);
    }
    memory.check(34);
}

/// Parent and child have each unmapped another part; nobody maps the last page.
fn shared_in_parts(gate: &Gate) {
    let memory = sys::shared(16 * PAGE);
    memory.fill(40);
    let unmap = |offset: usize, len: usize| {
        sys!(SYS_munmap, memory.addr + offset, len).expect("munmap");
    };
    let child = fork(|| {
        unmap(0, 6 * PAGE);
        unmap(15 * PAGE, PAGE);
        gate.mark("child");
        gate.wait();
        for offset in (6 * PAGE..15 * PAGE).step_by(8) {
            assert_eq!(memory.get::<u64>(offset), sys::pattern(40, offset), "at {offset:#x}");
        }
        memory.set(8 * PAGE, 0x1234_u64);
    });
    unmap(10 * PAGE, 6 * PAGE);
    gate.await_mark("child");
    gate.ready();
    join(child);
    assert_eq!(memory.get::<u64>(8 * PAGE), 0x1234, "the page that both still map");
    part(memory, 0, 8 * PAGE).check(40);
}

/// One piece of shared memory at two addresses (mremap with old size 0).
fn shared_mapped_twice(gate: &Gate) {
    let memory = sys::shared(8 * PAGE);
    memory.fill(50);
    let again = sys!(SYS_mremap, memory.addr, 0, memory.len, libc::MREMAP_MAYMOVE).expect("mremap");
    let again = Mapped { addr: again, len: memory.len };
    gate.ready();
    again.check(50);
    again.fill(51);
    memory.check(51);
}

fn dev_zero(flags: i32) -> Mapped {
    let fd = sys::open(c"/dev/zero", libc::O_RDWR).expect("open /dev/zero");
    let memory = sys::mmap(0, 4 * PAGE, READ | WRITE, flags, fd, 0).expect("mmap /dev/zero");
    sys::close(fd);
    memory
}

fn dev_zero_shared(gate: &Gate) {
    let memory = dev_zero(libc::MAP_SHARED);
    memory.fill(60);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        memory.check(60);
        memory.fill(61);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    memory.check(61);
}

fn dev_zero_private(gate: &Gate) {
    let memory = dev_zero(libc::MAP_PRIVATE);
    memory.set(PAGE + 8, 0x77_u64);
    gate.ready();
    assert_eq!(memory.get::<u64>(PAGE + 8), 0x77);
    part(memory, 2 * PAGE, PAGE).check_zero();
}

/// A parent and four children that share its memory copy-on-write need it once, not five times.
fn copy_on_write_kept(gate: &Gate) {
    let memory = sys::anon(32 * MIB);
    memory.fill(140);
    let arrived = sys::shared(PAGE);
    let children: Vec<i32> = (0..4)
        .map(|_| {
            fork(|| {
                sys::atomic(arrived.at(0)).fetch_add(1, Ordering::SeqCst);
                gate.wait();
                gate.await_mark("measured");
                memory.check(140);
            })
        })
        .collect();
    while sys::atomic(arrived.at(0)).load(Ordering::SeqCst) < 4 {
        sys::nap(std::time::Duration::from_micros(300));
    }
    gate.ready();
    let all = children.iter().copied().chain([sys::getpid()]);
    let total: usize = all.map(|pid| rollup(pid, "Pss")).sum();
    gate.mark("measured");
    for child in children {
        join(child);
    }
    memory.check(140);
    assert!(total < 64 * 1024, "the five tasks need {total} KiB together");
}

/// Each side has changed some of the pages that were shared.
fn copy_on_write_changed(gate: &Gate) {
    let memory = sys::anon(64 * PAGE);
    memory.fill(141);
    let child = fork(|| {
        part(memory, 8 * PAGE, 8 * PAGE).fill(142);
        // Zeroed in the child, content in the parent; and gone in the child.
        for offset in (16 * PAGE..20 * PAGE).step_by(8) {
            memory.set(offset, 0_u64);
        }
        advise(part(memory, 20 * PAGE, 4 * PAGE), libc::MADV_DONTNEED).expect("MADV_DONTNEED");
        gate.mark("child");
        gate.wait();
        part(memory, 0, 8 * PAGE).check(141);
        part(memory, 8 * PAGE, 8 * PAGE).check(142);
        part(memory, 16 * PAGE, 8 * PAGE).check_zero();
        for offset in (24 * PAGE..64 * PAGE).step_by(8) {
            assert_eq!(memory.get::<u64>(offset), sys::pattern(141, offset), "child at {offset:#x}");
        }
    });
    gate.await_mark("child");
    part(memory, 0, 4 * PAGE).fill(143);
    part(memory, 32 * PAGE, 4 * PAGE).fill(144);
    gate.ready();
    join(child);
    part(memory, 0, 4 * PAGE).check(143);
    part(memory, 32 * PAGE, 4 * PAGE).check(144);
    for offset in (4 * PAGE..32 * PAGE).chain(36 * PAGE..64 * PAGE).step_by(8) {
        assert_eq!(memory.get::<u64>(offset), sys::pattern(141, offset), "parent at {offset:#x}");
    }
}

/// The child has unmapped, remapped and re-protected what it inherited.
fn child_layout_differs(gate: &Gate) {
    let memory = sys::anon(64 * PAGE);
    memory.fill(145);
    let child = fork(|| {
        sys!(SYS_munmap, memory.addr + 8 * PAGE, 8 * PAGE).expect("munmap");
        protect(part(memory, 24 * PAGE, 8 * PAGE), READ);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let fresh = sys::mmap(memory.addr + 32 * PAGE, 8 * PAGE, READ | WRITE, flags, -1, 0).expect("mmap");
        fresh.set(16, 9_u64);
        gate.mark("child");
        gate.wait();
        part(memory, 0, 8 * PAGE).check(145);
        assert!(!readable(memory.addr + 8 * PAGE), "unmapped in the child");
        assert_eq!(fresh.get::<u64>(16), 9);
        part(fresh, PAGE, 7 * PAGE).check_zero();
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    memory.check(145);
}

/// A SysV segment, removed as soon as it is attached, so that none is left behind.
fn attach_segment(gate: &Gate) -> Mapped {
    let Ok(id) = sys!(SYS_shmget, libc::IPC_PRIVATE, 4 * PAGE, 0o600) else {
        gate.skip("no SysV shared memory");
    };
    let addr = sys!(SYS_shmat, id, 0, 0).expect("shmat");
    sys!(SYS_shmctl, id, libc::IPC_RMID, 0).expect("IPC_RMID");
    Mapped { addr, len: 4 * PAGE }
}

fn sysv_shm(gate: &Gate) {
    let memory = attach_segment(gate);
    memory.fill(160);
    gate.ready();
    memory.check(160);
}

fn sysv_shm_in_child(gate: &Gate) {
    let child = fork(|| {
        let memory = attach_segment(gate);
        memory.fill(161);
        gate.mark("child");
        gate.wait();
        memory.check(161);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}
