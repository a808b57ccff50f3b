//! What a tree needs where it is to go on, and how much a dump of it is going to send, as far as that can be known while it runs.
//!
//! The cache keeps so much memory for it and looks whether the rest is there, or refuses the tree before anything is frozen.
//! Every process brings its anonymous pages and what of them is swapped out; memory that several share is sent once, so that
//! only the largest is counted. Pages of zeros are not sent, and the tree may change until it is frozen: all of it is an
//! estimate, and what is not seen here is found out by the restore. Nothing is stopped or asked of the tree.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use prost::Message as _;

use super::super::{FEATURE_FILTERS, namespace_of_pids, pb};
use crate::ns::time;
use crate::proc::{fdinfo, maps, status};
use crate::settings::{CpuCap, DumpSettings};
use crate::sys::pid::HostPid;
use crate::tracee::procfs;
use crate::{cpuinfo, files};

/// Most processes that are looked at: more are no reason to wait.
const MOST: usize = 20_000;
/// Most bytes that files take in the message, which has to fit into a packet and a frame.
const FILES: usize = 40 << 10;
/// Most pids in it.
const PIDS: usize = 3000;
/// Who has written a file so lately may go on with it: its size says nothing.
const QUIET: Duration = Duration::from_secs(60);
/// A process has filters of system calls, as its status says it.
const SECCOMP_FILTER: u32 = 2;
/// Most descriptors of one process that are looked at.
const DESCRIPTORS: usize = 10_000;

/// What a dump of a tree will bring.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// Bytes of images, roughly; 0 if nothing is known.
    pub(super) bytes: u64,
    pub(super) needs: pb::Needs,
}

/// Looks at the tree.
pub(super) fn expected(dump: &DumpSettings) -> Expected {
    let root = dump.pid.as_raw();
    let mut pids = procfs::walk(HostPid::new(root));
    pids.truncate(MOST);
    let mut seen = Files::new(dump);
    let (mut private, mut shared, mut filters) = (0_u64, 0, false);
    for pid in &pids {
        let dir = Path::new("/proc").join(pid.to_string());
        // Who has ended meanwhile brings nothing.
        let Ok(text) = fs::read(dir.join("status")) else { continue };
        if let Ok(status) = status::parse(&text) {
            private += status.rss_anon_bytes.unwrap_or(0) + status.vm_swap_bytes.unwrap_or(0);
            shared = shared.max(status.rss_shmem_bytes.unwrap_or(0));
            filters |= status.seccomp == Some(SECCOMP_FILTER);
        }
        seen.of_process(&dir);
    }
    let clocks = time::of_process(HostPid::new(root)).ok();
    let nanoseconds =
        |clock: Option<Duration>| u64::try_from(clock.unwrap_or_default().as_nanos()).unwrap_or(0);
    let caps = dump.common.cpu_cap.unwrap_or(CpuCap::NONE);
    let mut needs = pb::Needs {
        cpu: cpuinfo::own().encode_to_vec(),
        cpu_caps: u32::from(caps.fpu) | u32::from(caps.ins) << 1 | u32::from(caps.cpu) << 2,
        monotonic: nanoseconds(clocks.map(|clocks| clocks.monotonic)),
        boottime: nanoseconds(clocks.map(|clocks| clocks.boottime)),
        features: if filters { vec![FEATURE_FILTERS.to_owned()] } else { Vec::new() },
        ..pb::Needs::default()
    };
    if same(&Path::new("/proc").join(root.to_string()), "ns/pid") {
        needs.pids_of = namespace_of_pids();
        needs.pids = pids.iter().flat_map(|pid| procfs::tids(*pid)).map(HostPid::get).collect();
        needs.more_pids = u32::try_from(needs.pids.len().saturating_sub(PIDS)).unwrap_or(u32::MAX);
        needs.pids.truncate(PIDS);
    }
    (needs.files, needs.more_files) = seen.done();
    Expected { bytes: private + shared, needs }
}

/// Whether a process has the same as we have: a namespace, a root directory.
fn same(dir: &Path, what: &str) -> bool {
    let own = fs::read_link(Path::new("/proc/self").join(what));
    own.is_ok() && own.ok() == fs::read_link(dir.join(what)).ok()
}

/// Files that are found by their names.
#[derive(Debug)]
struct Files {
    /// Those that are mapped as programs and libraries.
    code: BTreeMap<Vec<u8>, pb::needs::File>,
    others: BTreeMap<Vec<u8>, pb::needs::File>,
    looked_at: BTreeSet<(u64, u64, bool)>,
    /// A script may bring those that are no programs.
    may_come: bool,
    /// What the user gives to the restore otherwise is not told from what must be there.
    only_code: bool,
}

impl Files {
    fn new(dump: &DumpSettings) -> Self {
        Self {
            code: BTreeMap::new(),
            others: BTreeMap::new(),
            looked_at: BTreeSet::new(),
            may_come: !dump.common.action_scripts.scripts.is_empty(),
            only_code: !dump.common.externals.is_empty(),
        }
    }

    fn of_process(&mut self, dir: &Path) {
        // Elsewhere the names mean others, and the restore makes the mounts first.
        if !same(dir, "ns/mnt") || !same(dir, "root") {
            return;
        }
        let text = fs::read(dir.join("maps")).unwrap_or_default();
        for vma in maps::parse(&text).unwrap_or_default() {
            let Some(path) = vma.path().filter(|_| vma.ino != 0) else { continue };
            let code = vma.prot & libc::PROT_EXEC != 0;
            let device = u64::from(vma.dev.0) << 32 | u64::from(vma.dev.1);
            if self.looked_at.insert((device, vma.ino, code)) {
                let link = dir.join("map_files").join(vma.map_files_name());
                self.add(&link, path, code, true);
            }
        }
        for fd in fs::read_dir(dir.join("fd")).into_iter().flatten().flatten().take(DESCRIPTORS) {
            let Ok(path) = fs::read_link(fd.path()) else { continue };
            let text = fs::read(dir.join("fdinfo").join(fd.file_name())).unwrap_or_default();
            let reads = fdinfo::parse(&text).is_ok_and(|info| {
                info.flags & libc::O_ACCMODE.cast_unsigned() == libc::O_RDONLY.cast_unsigned()
            });
            self.add(&fd.path(), path.as_os_str().as_bytes(), false, reads);
        }
    }

    /// The file that `link` leads to, which is called `path`.
    fn add(&mut self, link: &PathBuf, path: &[u8], code: bool, quiet: bool) {
        let known = |path| self.code.contains_key(path) || !code && self.others.contains_key(path);
        let made_up = |path: &[u8]| path.starts_with(b"/proc/") || path.starts_with(b"/sys/");
        if path.first() != Some(&b'/') || made_up(path) || known(path) || !code && self.only_code {
            return;
        }
        // Without a name it travels.
        let Ok(object) = open(link, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) else { return };
        // Nor is it looked for where its name leads elsewhere here: it is linked elsewhere, or the kernel shows the name in other
        // letters.
        let leads_there = fs::metadata(link).ok().zip(fs::metadata(OsStr::from_bytes(path)).ok());
        if leads_there.is_none_or(|(it, named)| (it.dev(), it.ino()) != (named.dev(), named.ino())) {
            return;
        }
        let Some(mut entry) = files::describe_file(&object, path, code) else { return };
        let lately = || {
            let mtime = fs::metadata(link).and_then(|found| found.modified()).unwrap_or(UNIX_EPOCH);
            SystemTime::now().duration_since(mtime).is_ok_and(|since| since < QUIET)
        };
        if !code && (!quiet || lately()) {
            entry.size = None;
        }
        let file = pb::needs::File { entry: entry.encode_to_vec(), code, may_come: !code && self.may_come };
        if code { &mut self.code } else { &mut self.others }.insert(path.to_vec(), file);
        if code {
            self.others.remove(path);
        }
    }

    /// As many as fit, and how many do not.
    fn done(self) -> (Vec<pb::needs::File>, u32) {
        let (mut all, mut len, mut more) = (Vec::new(), 0, 0);
        for file in self.code.into_values().chain(self.others.into_values()) {
            len += file.encoded_len() + 8;
            if len > FILES {
                more += 1;
            } else {
                all.push(file);
            }
        }
        (all, more)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use nix::unistd::Pid;

    use super::*;
    use crate::image::pb as images;

    fn of(pid: i32) -> Expected {
        expected(&DumpSettings::new(Pid::from_raw(pid), Path::new(".")))
    }

    #[test]
    fn a_child_counts_too() {
        let own = i32::try_from(std::process::id()).unwrap();
        let before = of(own).bytes;
        assert!(before > 0);
        let memory = vec![1_u8; 64 << 20];
        let after = of(own).bytes;
        assert!(after >= before + (60 << 20), "{before} {after}");
        drop(memory);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let alone = of(i32::try_from(child.id()).unwrap());
        let whole = of(own);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(alone.bytes > 0 && whole.bytes >= alone.bytes, "{alone:?} {whole:?}");
        assert!(whole.needs.pids.contains(&alone.needs.pids[0]) && whole.needs.pids.contains(&own));
        assert_eq!(of(i32::MAX).bytes, 0);
    }

    #[test]
    fn files_are_named_and_described() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let mut written = fs::File::create(&path).unwrap();
        written.write_all(b"some").unwrap();
        let gone = dir.path().join("gone");
        let _gone = fs::File::create(&gone).unwrap();
        fs::remove_file(&gone).unwrap();
        // Linked elsewhere, and another file in the place of one that is open.
        let moved = dir.path().join("moved");
        let _moved = fs::File::create(&moved).unwrap();
        fs::hard_link(&moved, dir.path().join("elsewhere")).unwrap();
        fs::remove_file(&moved).unwrap();
        let replaced = dir.path().join("replaced");
        let _replaced = fs::File::create(&replaced).unwrap();
        fs::remove_file(&replaced).unwrap();
        fs::write(&replaced, "another").unwrap();
        let needs = of(i32::try_from(std::process::id()).unwrap()).needs;
        let decoded = needs.files.iter().map(|file| {
            let entry = images::RegFileEntry::decode(&file.entry[..]).unwrap();
            (entry.name.clone(), (entry, file.code))
        });
        let all: BTreeMap<Vec<u8>, (images::RegFileEntry, bool)> = decoded.collect();
        let own = std::env::current_exe().unwrap();
        let (program, code) = &all[own.as_os_str().as_bytes()];
        assert!(*code && program.size == Some(fs::metadata(&own).unwrap().len()), "{program:?}");
        let (data, code) = &all[path.as_os_str().as_bytes()];
        assert!(!code && data.size.is_none() && data.mode.is_some(), "{data:?}");
        for odd in [&gone, &moved, &replaced] {
            assert!(!all.keys().any(|name| name.starts_with(odd.as_os_str().as_bytes())), "{odd:?}");
        }
        assert!(needs.encoded_len() < 64 << 10);
    }
}
