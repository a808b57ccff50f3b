//! Dumps of address spaces without the rest of a dump: this binary, started again as a target,
//! makes areas of every kind and stops; it is collected and written into a store; then the memory
//! that the images describe is compared, page by page, with the one that the target has.

#![allow(unreachable_pub)] // "pub" means "for the other modules" here

mod child;
mod interop;
mod model;
mod target;

use std::process::ExitCode;

use crtool::finding::Finding;
use crtool::image::{ImageKind, ImageSink, MemStore, PagesSink, Store, TypedStore, pb};
use crtool::mem::{Inside, MappedFile, MemoryDump, SharedMemory, Task, VmaFiles, collect, vma};
use crtool::stats::DumpStats;
use crtool::sys::pid::{HostPid, NsPid};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use child::Child;

pub const PAGE: usize = 4096;

fn main() -> ExitCode {
    if let Ok(case) = std::env::var("MEMORY_TARGET") {
        target::main(&case);
    }
    let trial = |name, test: fn() -> Completion| {
        Trial::ignorable_test(name, move || {
            if nix::unistd::geteuid().is_root() {
                Ok::<_, Failed>(test())
            } else {
                Ok(Completion::ignored_with("needs root"))
            }
        })
    };
    let trials = vec![
        trial("kinds", kinds),
        trial("guards", guards),
        trial("hugetlb", hugetlb),
        trial("many", many),
        trial("sparse", sparse),
        trial("droppable", droppable),
        trial("large", large),
        trial("refused", refused),
        trial("full_disk", full_disk),
        trial("peer_restores_kinds", || interop::peer_restores("kinds")),
        trial("peer_restores_many", || interop::peer_restores("many")),
        trial("peer_restores_large", || interop::peer_restores("large")),
        trial("peer_restores_hugetlb", || interop::peer_restores("hugetlb")),
        trial("peer_restores_droppable", || interop::peer_restores("droppable")),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Gives ids to files and remembers what was asked.
#[derive(Debug, Default)]
pub struct Files(pub Vec<(Vec<u8>, i32, Option<u32>)>);

impl VmaFiles for Files {
    fn mapped_file(
        &mut self,
        mapped: MappedFile<'_>,
    ) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        self.0.push((mapped.path.to_vec(), mapped.flags, mapped.memfd));
        Ok(u32::try_from(self.0.len())?)
    }
}

fn task(pid: i32) -> Task {
    let pid = HostPid::new(pid);
    Task {
        pid,
        tid: pid,
        brk: 0,
        dumpable: 1,
        thp_disable: 0,
        exe_file_id: 1,
        ours: Vec::new(),
        inside: Inside::default(),
    }
}

/// Dumps the memory of `child`.
pub fn dump(child: &Child, store: &dyn Store) -> (pb::MmEntry, DumpStats, Files) {
    let (mut files, shared, mut findings) = (Files::default(), SharedMemory::new(), Vec::new());
    let space = collect(&task(child.pid()), &mut files, &shared, &mut findings).unwrap();
    assert!(findings.is_empty(), "{findings:?}");
    let mut stats = DumpStats::default();
    let mut dump = MemoryDump::new(store);
    dump.task(NsPid::new(child.pid()), space, &mut stats).unwrap();
    dump.shared(&shared, &mut stats).unwrap();
    let id = u64::from(child.pid().cast_unsigned());
    (store.need_one(ImageKind::Mm, id).unwrap(), stats, files)
}

fn rss_pages(pid: i32) -> i64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    statm.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Dumps a target, compares all of it, and says what the images have of each named area.
struct Dumped {
    child: Child,
    mm: pb::MmEntry,
    stats: DumpStats,
    files: Files,
    store: MemStore,
}

impl Dumped {
    fn new(case: &str) -> Dumped {
        let child = Child::target(case);
        let store = MemStore::new();
        let before = rss_pages(child.pid());
        let (mm, stats, files) = dump(&child, &store);
        let more = rss_pages(child.pid()) - before;
        assert!(more <= 2, "a dump brings {more} pages into memory, more than the vdso's");
        let written: u64 = store
            .names()
            .unwrap()
            .iter()
            .filter(|name| name.starts_with("pages-"))
            .map(|name| store.open_raw(name).unwrap().unwrap().len())
            .sum();
        assert_eq!(written, (stats.pages_written + stats.shpages_written) * PAGE as u64);
        model::compare(child.pid(), &store, 1 << 16);
        Dumped { child, mm, stats, files, store }
    }

    fn made(&self) -> bool {
        !self.child.table.is_empty()
    }

    fn entry(&self, name: &str) -> &pb::VmaEntry {
        let (start, pages) = self.child.table[name];
        let end = start + pages * PAGE as u64;
        let found = self.mm.vmas.iter().find(|v| v.start == start && v.end == end);
        found.unwrap_or_else(|| panic!("no area for {name}"))
    }

    /// Which pages of an area are in the task's own image.
    fn pages(&self, name: &str) -> Vec<u64> {
        let (start, pages) = self.child.table[name];
        let pid = u64::from(self.child.pid().cast_unsigned());
        let all = model::pages(&self.store, ImageKind::Pagemap, pid);
        let page = |addr: &u64| (addr - start) / PAGE as u64;
        all.range(start..start + pages * PAGE as u64).map(|(addr, _)| page(addr)).collect()
    }
}

/// Every ordinary kind of area, in the words that CRIU 4.1 uses for it.
fn kinds() -> Completion {
    let dumped = Dumped::new("kinds");
    const ANON: u32 = 0x201;
    for (name, prot, flags, status, madv, fdflags) in [
        ("untouched", 3, 0x22, ANON, None, None),
        ("read_only", 1, 0x22, ANON, None, None),
        ("no_access", 0, 0x22, ANON, None, None),
        ("execute_only", 4, 0x22, ANON, None, None),
        ("noreserve", 3, 0x4022, ANON, None, None),
        ("locked", 3, 0x2022, ANON, None, None),
        ("lock_on_fault", 3, 0x2022 | vma::LOCK_ON_FAULT, ANON, None, None),
        ("dontfork", 3, 0x22, ANON, Some(1 << 10), None),
        ("wipeonfork", 3, 0x22, ANON, Some(1 << 18), None),
        ("dontdump", 3, 0x22, ANON, Some(1 << 16), None),
        ("hugepage", 3, 0x22, ANON, Some(1 << 14), None),
        ("nohugepage", 3, 0x22, ANON, Some(1 << 15), None),
        ("random", 3, 0x22, ANON, Some(1 << 1), None),
        ("sequential", 3, 0x22, ANON, Some(1 << 2), None),
        ("growsdown", 3, 0x122, ANON, None, None),
        ("shared", 3, 0x21, 0x101, None, None),
        ("shared_no_access", 0, 0x21, 0x101, None, None),
        ("shared_noreserve", 3, 0x4021, 0x101, None, None),
        ("file_private_ro", 1, 2, 0x41, None, Some(0)),
        ("file_private", 3, 2, 0x41, None, Some(0)),
        ("file_relro", 1, 2, 0x41, None, Some(0)),
        ("file_shared_ro", 1, 1, 0x81, None, Some(0)),
        ("file_shared_ro_of_rw", 1, 1, 0x81, None, Some(2)),
        ("file_shared", 3, 1, 0x81, None, Some(2)),
        ("deleted_shared", 3, 1, 0x81, None, Some(2)),
        ("memfd_shared", 3, 1, 0x4081, None, Some(2)),
        ("memfd_private", 3, 2, 0x4041, None, Some(0)),
        ("memfd_ro", 1, 1, 0x4081, None, Some(2)),
        ("dev_zero_private", 3, 2, 0x41, None, Some(0)),
        ("dev_zero_shared", 3, 0x21, 0x101, None, None),
    ] {
        let entry = dumped.entry(name);
        let got = (entry.prot, entry.flags, entry.status, entry.madv, entry.fdflags);
        assert_eq!(got, (prot, flags, status, madv, fdflags), "{name}");
        assert_eq!(entry.fd, -1);
    }
    for (name, pages) in [
        ("untouched", &[][..]),
        ("zero_dropped", &[0, 2, 4]),
        ("zero_page", &[]),
        ("read_only", &[0, 1, 2, 3]),
        ("no_access", &[0, 1, 2, 3]),
        ("execute_only", &[0, 1, 2, 3]),
        ("write_only", &[0, 1, 2, 3]),
        ("noreserve", &[3]),
        ("locked", &[1]),
        ("lock_on_fault", &[2]),
        ("growsdown", &[3]),
        ("shared", &[]),
        ("file_private_ro", &[]),
        ("file_private_untouched", &[]),
        ("file_private", &[1]),
        ("file_private_zeroed", &[1]),
        ("file_relro", &[3]),
        ("file_shared", &[]),
        ("file_beyond_end", &[3]),
        ("deleted_shared", &[]),
        ("deleted_private", &[2]),
        ("memfd_shared", &[]),
        ("memfd_private", &[1]),
        ("dev_zero_private", &[0]),
    ] {
        assert_eq!(dumped.pages(name), pages, "{name}");
    }
    assert_eq!(dumped.entry("memfd_ro").pgoff, 8 * PAGE as u64);
    assert_eq!(dumped.entry("memfd_ro").shmid, dumped.entry("memfd_shared").shmid);
    assert_ne!(dumped.entry("shared").shmid, dumped.entry("dev_zero_shared").shmid);
    // data ro and rw, gone ro and rw, hello ro and rw, /dev/zero, and this program with its libraries.
    let asked = |path: &[u8]| dumped.files.0.iter().filter(|(p, _, _)| p.ends_with(path)).count();
    assert!(asked(b"/gone (deleted)") == 2 && asked(b"/dev/zero") == 1);
    let memfds: Vec<_> = dumped.files.0.iter().filter_map(|(_, _, memfd)| *memfd).collect();
    assert!(!memfds.is_empty() && memfds.iter().all(|id| *id == memfds[0]), "{memfds:?}");

    let has = |status| dumped.mm.vmas.iter().filter(|v| v.status == status).count();
    assert_eq!((has(0x209), has(0x1201), has(0x204)), (1, 1, 1), "vdso, vvar, vsyscall");
    let vdso = dumped.mm.vmas.iter().find(|v| v.status == 0x209).unwrap();
    let auxv = &dumped.mm.mm_saved_auxv;
    assert!(auxv.chunks(2).any(|pair| pair == [libc::AT_SYSINFO_EHDR, vdso.start]), "{auxv:?}");
    assert!(auxv.chunks(2).all(|pair| pair[0] != libc::AT_NULL));
    // Objects: shared, shared_no_access, shared_noreserve, hello, dev_zero_shared.
    let names = dumped.store.names().unwrap();
    assert_eq!(names.iter().filter(|name| name.starts_with("pagemap-shmem-")).count(), 5);
    assert_eq!(dumped.stats.shpages_written, 2 + 16 + 2 + 1);
    Completion::Completed
}

fn guards() -> Completion {
    let dumped = Dumped::new("guards");
    if !dumped.made() {
        return Completion::ignored_with("this kernel has no guard pages");
    }
    let guard = |name: &str, page: u64, pages: u64| {
        let start = dumped.child.table[name].0 + page * PAGE as u64;
        (start, start + pages * PAGE as u64)
    };
    let got: Vec<_> = dumped
        .mm
        .vmas
        .iter()
        .filter(|v| v.status & vma::GUARD != 0)
        .map(|v| (v.start, v.end))
        .filter(|(start, _)| *start < 0x2000_0000_0000)
        .collect();
    let want = [
        guard("guarded", 4, 2),
        guard("guarded", 9, 1),
        guard("guarded_untouched", 0, 16),
        guard("guarded_shared", 2, 1),
    ];
    assert_eq!(got, want);
    assert_eq!(dumped.pages("guarded"), [0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 15]);
    Completion::Completed
}

fn hugetlb() -> Completion {
    let dumped = Dumped::new("hugetlb");
    if !dumped.made() {
        return Completion::ignored_with("no huge pages are set aside (vm.nr_hugepages)");
    }
    for (name, flags, status) in [
        ("huge_private", 0x5404_0022, 0x201),
        ("huge_shared", 0x5404_0021, 0x101),
        ("huge_memfd", 0x5404_0001, 0x4081),
    ] {
        let entry = dumped.entry(name);
        assert_eq!((entry.flags, entry.status), (flags, status), "{name}");
    }
    assert_eq!(dumped.pages("huge_private"), [700]);
    Completion::Completed
}

fn many() -> Completion {
    let dumped = Dumped::new("many");
    assert_eq!(dumped.mm.vmas.iter().filter(|v| v.start >> 44 == 2).count(), 20_000);
    assert_eq!(dumped.pages("many").len(), 13_333);
    Completion::Completed
}

fn sparse() -> Completion {
    let child = Child::target("sparse");
    // The time of this thread, whatever else the machine has to do.
    let now = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    let begin = now();
    let store = MemStore::new();
    dump(&child, &store);
    let took = now() - begin;
    // Some milliseconds; a look at each page would take many seconds.
    assert!(took.tv_sec() < 2, "{took}");
    model::compare(child.pid(), &store, 1 << 16);
    let (start, pages) = child.table["sparse"];
    let own = model::pages(&store, ImageKind::Pagemap, u64::from(child.pid().cast_unsigned()));
    let got: Vec<u64> = own.range(start..).map(|(addr, _)| (addr - start) / PAGE as u64).take(3).collect();
    assert_eq!(got, [0, pages / 2, pages - 1]);
    Completion::Completed
}

fn droppable() -> Completion {
    let dumped = Dumped::new("droppable");
    if !dumped.made() {
        return Completion::ignored_with("this kernel has no MAP_DROPPABLE");
    }
    let entry = dumped.entry("droppable");
    assert_eq!((entry.flags & !0x4000, entry.madv), (0x28, None));
    assert!(dumped.pages("droppable").is_empty(), "states of random generators come but once");
    Completion::Completed
}

fn large() -> Completion {
    let dumped = Dumped::new("large");
    let want: Vec<u64> = (0..16 << 8).filter(|page| page % 11 != 0 && page % 7 != 0).collect();
    assert_eq!(dumped.pages("large"), want);
    Completion::Completed
}

fn refused() -> Completion {
    let child = Child::target("refused");
    let (mut files, shared, mut findings) = (Files::default(), SharedMemory::new(), Vec::new());
    let space = collect(&task(child.pid()), &mut files, &shared, &mut findings).unwrap();
    let (one, two) = child.table["made"];
    let names = |text: &str| {
        let fits = |finding: &&Finding| finding.reason.contains(text) && finding.what.starts_with("memory 1");
        findings.iter().filter(fits).count()
    };
    let made = [one & 1, one >> 1, two >> 1].map(|made| made as usize);
    assert_eq!([names("mseal"), names("System V"), names("userfaultfd")], made, "{findings:?}");
    // What is saved by now is none of them.
    let rings = space.entry.vmas.iter().filter(|area| area.status & vma::AIORING != 0).count();
    assert_eq!(rings, two as usize & 1);
    assert_eq!(findings.len(), made.iter().sum::<usize>(), "{findings:?}");
    assert!(findings.len() >= 2, "this kernel makes too little of it: {findings:?}");
    Completion::Completed
}

/// A store on a disk that is full: an error, no hang of the workers that wait for each other.
fn full_disk() -> Completion {
    struct Full(MemStore);
    impl Store for Full {
        fn create_raw(&self, name: &str) -> Result<Box<dyn ImageSink>, crtool::image::ImageError> {
            self.0.create_raw(name)
        }
        fn create_pages(&self, _: &str, _: u64) -> Result<PagesSink, crtool::image::ImageError> {
            Ok(PagesSink::File(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap()))
        }
        fn open_raw(
            &self,
            name: &str,
        ) -> Result<Option<crtool::image::ImageFile>, crtool::image::ImageError> {
            self.0.open_raw(name)
        }
        fn names(&self) -> Result<Vec<String>, crtool::image::ImageError> {
            self.0.names()
        }
        fn commit(&self) -> Result<(), crtool::image::ImageError> {
            self.0.commit()
        }
        fn withdraw(&self) -> Result<(), crtool::image::ImageError> {
            self.0.withdraw()
        }
        fn parent(&self) -> Result<Option<std::sync::Arc<dyn Store>>, crtool::image::ImageError> {
            self.0.parent()
        }
        fn link_parent(&self, target: &std::path::Path) -> Result<(), crtool::image::ImageError> {
            self.0.link_parent(target)
        }
        fn path_of(&self, name: &str) -> std::path::PathBuf {
            self.0.path_of(name)
        }
        fn unfinished(&self) -> std::sync::Arc<std::sync::atomic::AtomicBool> {
            self.0.unfinished()
        }
    }
    let child = Child::target("large");
    let (mut files, shared, mut findings) = (Files::default(), SharedMemory::new(), Vec::new());
    let space = collect(&task(child.pid()), &mut files, &shared, &mut findings).unwrap();
    let store = Full(MemStore::new());
    let mut stats = DumpStats::default();
    let error = MemoryDump::new(&store).task(NsPid::new(child.pid()), space, &mut stats).unwrap_err();
    assert_eq!(error.to_string(), "write pages-1.img");
    assert!(store.0.unfinished().load(std::sync::atomic::Ordering::Acquire), "cannot be committed");
    Completion::Completed
}
