//! Probes about memory.

use std::{
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    statfs::{HUGETLBFS_MAGIC, fstatfs},
};

use super::{
    Trouble, call,
    child::{Child, Made, Script},
    expect,
};
use crate::{
    proc::{
        maps::{self, VmaName},
        stat,
    },
    sys::{
        self, Errno,
        mapping::{self, Access, Mapping},
        pagemap::{self, PageRegion, Query, category},
        pod,
    },
};

const PAGE: u64 = 4096;
/// Where children map things: nothing of ours is that low, and it is no address of a 32-bit task.
const SOMEWHERE: u64 = 0x10_0000_0000;
/// For what has to be below 4 GiB.
const LOW: u64 = 0x6000_0000;

const ARCH_MAP_VDSO_32: i32 = 0x2002;
const ARCH_MAP_VDSO_64: i32 = 0x2003;
const MADV_GUARD_INSTALL: i32 = 102;

fn own_maps() -> Result<Vec<maps::Vma>, Trouble> {
    Ok(maps::parse(&fs::read("/proc/self/maps").map_err(Trouble::Proc)?)?)
}

/// Adds a mapping of `pages` private pages at `SOMEWHERE`.
fn map(script: &mut Script, pages: u64) -> Made {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let len = pages * PAGE;
    script.call(
        libc::SYS_mmap,
        &[SOMEWHERE.into(), len.into(), prot.into(), flags.into(), (-1).into(), 0.into()],
    )
}

/// Adds a write to one of those pages.
fn touch(script: &mut Script, page: u64) -> Made {
    let addr = SOMEWHERE + page * PAGE;
    script.call(libc::SYS_getrandom, &[addr.into(), 1.into(), 0.into()])
}

/// What a task has mapped can be opened through `map_files`.
pub(super) fn map_files() -> Result<(), Trouble> {
    let maps = own_maps()?;
    let vma = maps.iter().find(|vma| vma.path().is_some());
    let vma = vma.ok_or(Trouble::NoEffect("no file is mapped"))?;
    let path = format!("/proc/self/map_files/{}", vma.map_files_name());
    let meta = fs::metadata(path).map_err(Trouble::Proc)?;
    expect(meta.ino() == vma.ino, "it leads to another file")
}

/// Memory of another task is read as it is.
pub(super) fn process_vm_readv() -> Result<(), Trouble> {
    let text = *b"what the child has";
    let mut script = call("pipe", Script::new())?;
    let addr = script.data(&text);
    let child = call("fork", script.start())?;
    let mut read = [0; 18];
    let n = call("process_vm_readv", sys::process_vm::read(child.pid(), &[(addr, 18)], &mut read))?;
    expect(n == text.len() && read == text, "other bytes were read")
}

/// Pages that were touched are found, others are not.
pub(super) fn pagemap_scan() -> Result<(), Trouble> {
    let fd = call("memfd_create", mapping::memfd(c"probe", 4 * PAGE))?;
    let memory = call("mmap", Mapping::shared(fd.as_fd(), 0, 4 * 4096, Access::ReadWrite, None))?;
    call("write", memory.write(2 * 4096, &[1]))?;
    let pagemap = File::open("/proc/self/pagemap").map_err(Trouble::Proc)?;
    let start = memory.addr() as u64;
    let query = Query { all: category::PRESENT, report: category::PRESENT, ..Query::default() };
    let found = scanned(&pagemap, start, start + 4 * PAGE, query)?;
    expect(found == [(start + 2 * PAGE, start + 3 * PAGE)], "other pages are reported")
}

fn scanned(pagemap: &File, start: u64, end: u64, query: Query) -> Result<Vec<(u64, u64)>, Trouble> {
    let mut regions = [PageRegion { start: 0, end: 0, categories: 0 }; 8];
    let scan = pagemap::scan(pagemap.as_fd(), start, end, query, &mut regions);
    let (n, _) = call("PAGEMAP_SCAN", scan)?;
    Ok(regions.iter().take(n).map(|region| (region.start, region.end)).collect())
}

/// The layout of an address space takes the values it is given.
pub(super) fn mm_map() -> Result<(), Trouble> {
    let stat = stat::parse(&fs::read("/proc/self/stat").map_err(Trouble::Proc)?)?;
    let heap = own_maps()?.into_iter().find(|vma| vma.name == Some(VmaName::Heap));
    let brk = heap.map_or(stat.start_brk, |vma| vma.end);
    // struct prctl_mm_map; the arguments become empty.
    let fields = [
        stat.start_code,
        stat.end_code,
        stat.start_data,
        stat.end_data,
        stat.start_brk,
        brk,
        stat.start_stack,
        stat.arg_start,
        stat.arg_start,
        stat.env_start,
        stat.env_end,
        0,
        u64::from(u32::MAX) << 32,
    ];
    let mut script = call("pipe", Script::new())?;
    let map = script.data(pod::bytes_of(&fields));
    let set = script.call(
        libc::SYS_prctl,
        &[libc::PR_SET_MM.into(), libc::PR_SET_MM_MAP.into(), map.into(), 104.into(), 0.into()],
    );
    let child = call("fork", script.start())?;
    call("PR_SET_MM_MAP", child.result(set))?;
    let after = stat::parse(&child.proc("stat").map_err(Trouble::Proc)?)?;
    expect(after.arg_end == stat.arg_start && after.env_end == stat.env_end, "the values were not taken")
}

/// The vdso can be mapped again at a chosen address.
pub(super) fn map_vdso() -> Result<(), Trouble> {
    moved_vdso(ARCH_MAP_VDSO_64, SOMEWHERE)
}

/// The same for the one of 32-bit tasks.
pub(super) fn map_vdso_32() -> Result<(), Trouble> {
    moved_vdso(ARCH_MAP_VDSO_32, LOW)
}

fn moved_vdso(which: i32, at: u64) -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    for vma in own_maps()? {
        if matches!(vma.name, Some(VmaName::Vdso | VmaName::Vvar | VmaName::VvarVclock)) {
            script.call(libc::SYS_munmap, &[vma.start.into(), vma.len().into()]);
        }
    }
    let mapped = script.call(libc::SYS_arch_prctl, &[which.into(), at.into()]);
    let child = call("fork", script.start())?;
    call("ARCH_MAP_VDSO", child.result(mapped))?;
    let maps = maps::parse(&child.proc("maps").map_err(Trouble::Proc)?)?;
    let vdso = maps.iter().find(|vma| vma.name == Some(VmaName::Vdso));
    expect(vdso.is_some_and(|vma| (at..at + 64 * PAGE).contains(&vma.start)), "the vdso is somewhere else")
}

/// A memfd may lie on huge pages.
pub(super) fn memfd_hugetlb() -> Result<(), Trouble> {
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_CLOEXEC;
    let fd = call("memfd_create with MFD_HUGETLB", memfd_create(c"probe", flags))?;
    let fs = call("fstatfs", fstatfs(&fd))?;
    expect(fs.filesystem_type() == HUGETLBFS_MAGIC, "it lies on ordinary pages")
}

/// Linux 6.13: a guard page faults, its neighbour does not.
pub(super) fn guards() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    map(&mut script, 2);
    let guard = script.call(libc::SYS_madvise, &[SOMEWHERE.into(), PAGE.into(), MADV_GUARD_INSTALL.into()]);
    let (guarded, free) = (touch(&mut script, 0), touch(&mut script, 1));
    let child = call("fork", script.start())?;
    call("MADV_GUARD_INSTALL", child.result(guard))?;
    expect(
        child.result(guarded) == Err(Errno::EFAULT) && child.result(free) == Ok(1),
        "the guard page does not fault",
    )
}

/// A guard page is told from the page beside it.
pub(super) fn scan_guards() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    map(&mut script, 2);
    let guard = script.call(libc::SYS_madvise, &[SOMEWHERE.into(), PAGE.into(), MADV_GUARD_INSTALL.into()]);
    touch(&mut script, 1);
    let child = call("fork", script.start())?;
    call("MADV_GUARD_INSTALL", child.result(guard))?;
    let pagemap = File::open(format!("/proc/{}/pagemap", child.pid())).map_err(Trouble::Proc)?;
    let query = Query { all: category::GUARD, report: category::GUARD, ..Query::default() };
    let found = scanned(&pagemap, SOMEWHERE, SOMEWHERE + 2 * PAGE, query)?;
    expect(found == [(SOMEWHERE, SOMEWHERE + PAGE)], "other pages are reported")
}

/// An asynchronous I/O ring is an area of its own.
pub(super) fn aio() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    let context = script.data(&[0; 8]);
    let made = script.call(libc::SYS_io_setup, &[8.into(), context.into()]);
    let child = call("fork", script.start())?;
    call("io_setup", child.result(made))?;
    let maps = maps::parse(&child.proc("maps").map_err(Trouble::Proc)?)?;
    let ring = maps.iter().any(|vma| vma.path().is_some_and(|path| path.starts_with(b"/[aio]")));
    expect(ring, "no ring is mapped")
}

const UFFDIO_API: u32 = 0xc018_aa3f;
const UFFDIO_REGISTER: u32 = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: u32 = 0xc018_aa06;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

/// Adds a userfaultfd with these features; gives it, the handshake, and where its answer is.
fn userfaultfd(script: &mut Script, features: u64) -> (Made, Made, u64) {
    let fd = script.call(libc::SYS_userfaultfd, &[(libc::O_CLOEXEC | libc::O_NONBLOCK).into()]);
    let api = script.data(pod::bytes_of(&[UFFD_API, features, 0]));
    let shaken = script.call(libc::SYS_ioctl, &[fd.into(), UFFDIO_API.into(), api.into()]);
    (fd, shaken, api)
}

/// The features that the kernel offers, read where it wrote them.
fn offered(child: &Child, api: u64) -> Result<u64, Trouble> {
    let mut bytes = [0; 24];
    let read = sys::process_vm::read(child.pid(), &[(api, 24)], &mut bytes);
    call("process_vm_readv", read)?;
    let [_, features, _] = pod::from_bytes::<[u64; 3]>(&bytes).unwrap_or_default();
    Ok(features)
}

/// Page faults can be handled by a process.
pub(super) fn uffd() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    let (fd, shaken, api) = userfaultfd(&mut script, 0);
    let child = call("fork", script.start())?;
    call("userfaultfd", child.result(fd))?;
    call("UFFDIO_API", child.result(shaken))?;
    expect(offered(&child, api)? != 0, "no features are offered")
}

/// And the handler hears of forks and changed mappings.
pub(super) fn uffd_noncoop() -> Result<(), Trouble> {
    const EVENTS: u64 = UFFD_FEATURE_EVENT_FORK
        | UFFD_FEATURE_EVENT_REMAP
        | UFFD_FEATURE_EVENT_REMOVE
        | UFFD_FEATURE_EVENT_UNMAP;
    let mut script = call("pipe", Script::new())?;
    let (fd, shaken, api) = userfaultfd(&mut script, EVENTS);
    let child = call("fork", script.start())?;
    call("userfaultfd", child.result(fd))?;
    call("UFFDIO_API", child.result(shaken))?;
    expect(offered(&child, api)? & EVENTS == EVENTS, "not all events are offered")
}

/// Linux 6.7: of two protected pages, the one that was written is reported, and the writer did not stop.
pub(super) fn uffd_wp_async() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED;
    let (fd, shaken, _) = userfaultfd(&mut script, features);
    map(&mut script, 4);
    let area = script.data(pod::bytes_of(&[SOMEWHERE, 4 * PAGE, UFFDIO_REGISTER_MODE_WP, 0]));
    let registered = script.call(libc::SYS_ioctl, &[fd.into(), UFFDIO_REGISTER.into(), area.into()]);
    let area = script.data(pod::bytes_of(&[SOMEWHERE, 4 * PAGE, UFFDIO_WRITEPROTECT_MODE_WP]));
    let protected = script.call(libc::SYS_ioctl, &[fd.into(), UFFDIO_WRITEPROTECT.into(), area.into()]);
    let written = touch(&mut script, 1);
    let child = call("fork", script.start())?;
    call("userfaultfd", child.result(fd))?;
    call("UFFDIO_API", child.result(shaken))?;
    call("UFFDIO_REGISTER", child.result(registered))?;
    call("UFFDIO_WRITEPROTECT", child.result(protected))?;
    call("write to a protected page", child.result(written))?;
    let pagemap = File::open(format!("/proc/{}/pagemap", child.pid())).map_err(Trouble::Proc)?;
    let query = Query { all: category::WRITTEN, report: category::WRITTEN, ..Query::default() };
    let found = scanned(&pagemap, SOMEWHERE, SOMEWHERE + 4 * PAGE, query)?;
    expect(found == [(SOMEWHERE + PAGE, SOMEWHERE + 2 * PAGE)], "other pages are reported")
}

/// Of two clean pages, the one that was written is dirty.
pub(super) fn soft_dirty() -> Result<(), Trouble> {
    const SOFT_DIRTY: u64 = 1 << 55;
    let mut script = call("pipe", Script::new())?;
    map(&mut script, 2);
    touch(&mut script, 0);
    touch(&mut script, 1);
    let path = script.data(b"/proc/self/clear_refs\0");
    let fd =
        script.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), libc::O_WRONLY.into(), 0.into()]);
    let four = script.data(b"4");
    let cleared = script.call(libc::SYS_write, &[fd.into(), four.into(), 1.into()]);
    touch(&mut script, 1);
    let child = call("fork", script.start())?;
    call("write to clear_refs", child.result(cleared))?;
    let pagemap = File::open(format!("/proc/{}/pagemap", child.pid())).map_err(Trouble::Proc)?;
    let mut bytes = [0; 16];
    pagemap.read_exact_at(&mut bytes, SOMEWHERE / PAGE * 8).map_err(Trouble::Proc)?;
    let [clean, dirty] = pod::from_bytes::<[u64; 2]>(&bytes).unwrap_or_default();
    expect(
        clean & SOFT_DIRTY == 0 && dirty & SOFT_DIRTY != 0,
        "writes leave no mark (CONFIG_MEM_SOFT_DIRTY is off)",
    )
}
