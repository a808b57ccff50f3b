//! CRIU restores our memory images: it dumps a target itself, then its pagemap, pages and mm images
//! are replaced by ours, and after its restore the memory must be what it was.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crtool::image::{DirStore, ImageKind, MemStore, Store, TypedStore, pb};
use crtool::mem::vma;
use libtest_mimic::Completion;

use crate::child::Child;
use crate::{PAGE, dump, model};

const PEER: &str = "/opt/criu-peer/bin/criu";

fn criu(dir: &Path, args: &[&str]) {
    let out = Command::new(PEER).args(args).args(["-v4", "-o", "log", "-D"]).arg(dir).output().unwrap();
    let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
    assert!(out.status.success(), "criu {args:?}: {errors:#?}");
}

pub fn peer_restores(case: &str) -> Completion {
    if !Path::new(PEER).exists() {
        return Completion::ignored_with(format!("no CRIU at {PEER}"));
    }
    let mut child = Child::target(case);
    if child.table.is_empty() {
        return Completion::ignored_with("not on this kernel");
    }
    let pid = child.pid();
    let images = tempfile::tempdir_in("/dev/shm").unwrap();
    criu(images.path(), &["dump", "-R", "-t", &pid.to_string()]);
    let theirs = DirStore::open(images.path()).unwrap();
    let id = u64::from(pid.cast_unsigned());
    let their_mm: pb::MmEntry = theirs.need_one(ImageKind::Mm, id).unwrap();

    let store = MemStore::new();
    let (mut mm, _, _) = dump(&child, &store);
    // Ids of files, and what the task alone knows, are CRIU's.
    mm.exe_file_id = their_mm.exe_file_id;
    mm.mm_brk = their_mm.mm_brk;
    let files: BTreeMap<u64, u64> = their_mm.vmas.iter().map(|v| (v.start, v.shmid)).collect();
    for area in &mut mm.vmas {
        if area.status & (vma::FILE_PRIVATE | vma::FILE_SHARED) != 0 {
            area.shmid = files[&area.start];
        }
    }
    // Beside what is meant to be different, the areas are the same.
    let told = |vmas: &[pb::VmaEntry]| -> Vec<(u64, u64, u64, u32)> {
        vmas.iter()
            .map(|v| (v.start, v.end, if v.status & vma::ANON_SHARED == 0 { v.pgoff } else { 0 }, v.prot))
            .collect()
    };
    assert_eq!(told(&mm.vmas), told(&their_mm.vmas));
    for name in theirs.names().unwrap() {
        if ["pages-", "pagemap-", "mm-"].iter().any(|prefix| name.starts_with(prefix)) {
            std::fs::remove_file(images.path().join(name)).unwrap();
        }
    }
    store.write_one(ImageKind::Mm, id, &mm).unwrap();
    for name in store.names().unwrap() {
        let mut from = store.open_raw(&name).unwrap().unwrap();
        std::io::copy(&mut from, &mut File::create(images.path().join(&name)).unwrap()).unwrap();
    }

    let before = snapshot(pid, &mm);
    child.end();
    criu(images.path(), &["restore", "-d"]);
    let restored = Restored(pid);
    let after = snapshot(pid, &mm);
    let differ = |(addr, page): (&u64, &Vec<u8>)| {
        let now = after.get(addr).unwrap_or_else(|| panic!("{addr:x} is gone"));
        let bytes = page.iter().zip(now).filter(|(a, b)| a != b).count();
        (bytes > 0).then_some((*addr, bytes))
    };
    let different: Vec<_> = before.iter().filter_map(differ).collect();
    // The kernel writes the number of the processor into the rseq area.
    let allowed = different.len() <= 1 && different.iter().all(|(_, bytes)| *bytes <= 16);
    assert!(allowed, "not what it was: {different:x?}");
    assert_eq!(before.len(), after.len());
    drop(restored);
    drop(model::pages(&store, ImageKind::Pagemap, id));
    Completion::Completed
}

/// Every page that can be read, but what the kernel makes anew.
fn snapshot(pid: i32, mm: &pb::MmEntry) -> BTreeMap<u64, Vec<u8>> {
    let mem = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut pages = BTreeMap::new();
    let kernels = vma::VVAR | vma::VSYSCALL | vma::VDSO | vma::GUARD;
    for area in mm.vmas.iter().filter(|v| v.status & kernels == 0 && v.flags & 0xf != vma::MAP_DROPPABLE) {
        for addr in (area.start..area.end).step_by(PAGE) {
            let mut bytes = vec![0; PAGE];
            if mem.read_exact_at(&mut bytes, addr).is_ok() {
                pages.insert(addr, bytes);
            }
        }
    }
    pages
}

/// A restored task: not our child, so only killed. It may stay a zombie, if nobody reaps orphans here.
struct Restored(i32);

impl Drop for Restored {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let state = |stat: String| stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        let alive = || std::fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(state);
        while alive().is_some_and(|state| state != 'Z') {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
