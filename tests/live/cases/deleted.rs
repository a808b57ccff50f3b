//! Files without a name in places that are special: hugetlbfs, overlayfs; and what belongs to them besides their content.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::case::Case;
use crate::gate::Gate;
use crate::sys::{self, int};

pub const CASES: &[Case] = &[
    Case::new("deleted_on_hugetlbfs", hugetlbfs)
        .flags(&["--ghost-limit", "64M"])
        .not_running()
        .peer_fails("writes files of hugetlbfs by write(2)"),
    Case::new("deleted_nameless_linked", nameless_linked).may_differ(&["/fd/"]).peer_fails("loses O_TMPFILE"),
    Case::new("deleted_attributes", attributes).peer_fails("has no place for extended attributes"),
    Case::new("deleted_on_overlay", overlay)
        .not_running()
        .peer_fails("does not find watched files of overlayfs"),
    Case::new("deleted_on_overlay_linked", overlay_linked).refused("link-remap").only_plain(),
];

const HUGE: usize = 2 << 20;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_WRITE;

fn mount(kind: &std::ffi::CStr, at: &str, options: &str) -> Result<usize, i32> {
    fs::create_dir_all(at).expect("mkdir");
    let (at, options) = (CString::new(at).expect("path"), CString::new(options).expect("options"));
    sys!(SYS_mount, c"live".as_ptr(), at.as_ptr(), kind.as_ptr(), 0, options.as_ptr())
}

fn unmount(at: &str) {
    let at = CString::new(at).expect("path");
    sys!(SYS_umount2, at.as_ptr(), libc::MNT_DETACH).expect("umount");
}

/// As QEMU (`-mem-path`) and DPDK have them: a file that is mapped and deleted.
fn hugetlbfs(gate: &Gate) {
    let _ = fs::write("/proc/sys/vm/nr_overcommit_hugepages", "64");
    if let Err(errno) = mount(c"hugetlbfs", "huge", "pagesize=2M") {
        gate.skip(&format!("no hugetlbfs: errno {errno}"));
    }
    let create = |name: &str| {
        let options = fs::File::options().read(true).write(true).create_new(true).clone();
        let file = options.open(format!("huge/{name}")).expect("create");
        file.set_len(4 * HUGE as u64).expect("set_len");
        fs::remove_file(format!("huge/{name}")).expect("remove");
        file
    };
    let (file, private, unmapped) = (create("shared"), create("private"), create("unmapped"));
    let map = |file: &fs::File, flags| sys::mmap(0, 4 * HUGE, READ | WRITE, flags, file.as_raw_fd(), 0);
    let (Ok(memory), Ok(own), Ok(third)) =
        (map(&file, libc::MAP_SHARED), map(&private, libc::MAP_PRIVATE), map(&unmapped, libc::MAP_SHARED))
    else {
        drop((file, private, unmapped));
        unmount("huge");
        gate.skip("no huge pages to be had");
    };
    memory.set::<u64>(HUGE + 8, 77);
    memory.set::<u64>(4 * HUGE - 8, 78);
    own.set::<u64>(8, 79);
    third.set::<u64>(3 * HUGE, 80);
    sys!(SYS_munmap, third.at(0), 4 * HUGE).expect("munmap");
    gate.ready();
    assert_eq!((memory.get::<u64>(HUGE + 8), memory.get::<u64>(4 * HUGE - 8)), (77, 78));
    assert_eq!((memory.get::<u64>(0), own.get::<u64>(8), own.get::<u64>(HUGE)), (0, 79, 0));
    let mut word = [0; 8];
    unmapped.read_exact_at(&mut word, 3 * HUGE as u64).expect("read");
    assert_eq!(u64::from_ne_bytes(word), 80);
    memory.set::<u64>(HUGE + 8, 81);
    file.read_exact_at(&mut word, HUGE as u64 + 8).expect("read");
    assert_eq!(u64::from_ne_bytes(word), 81, "the mapping and the descriptor are of one file");
    assert!(file.metadata().expect("stat").blocks() * 512 <= 3 * HUGE as u64, "holes were filled");
    drop((file, private, unmapped));
    unmount("huge");
}

fn nameless_linked(gate: &Gate) {
    let Ok(fd) = sys::open(c".", libc::O_TMPFILE | libc::O_RDWR) else {
        gate.skip("this file system has no O_TMPFILE");
    };
    assert_eq!(sys::write(fd, b"nameless"), Ok(8));
    gate.ready();
    let from = CString::new(format!("/proc/self/fd/{fd}")).expect("path");
    let to = c"named";
    let follow = libc::AT_SYMLINK_FOLLOW;
    let linked = sys!(SYS_linkat, libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), follow);
    assert_eq!(linked, Ok(0), "linkat");
    assert_eq!(fs::read("named").expect("read"), b"nameless");
}

fn attributes(gate: &Gate) {
    let file = fs::File::options().read(true).write(true).create_new(true).open("f").expect("create");
    let name = c"trusted.live";
    let set = sys!(SYS_fsetxattr, file.as_raw_fd(), name.as_ptr(), b"value".as_ptr(), 5, 0);
    if set.is_err() {
        gate.skip("no extended attributes here");
    }
    fs::set_permissions("f", std::os::unix::fs::PermissionsExt::from_mode(0o4711)).expect("chmod");
    fs::remove_file("f").expect("remove");
    let before = file.metadata().expect("stat");
    gate.ready();
    let mut value = [0_u8; 10];
    let got = sys!(SYS_fgetxattr, file.as_raw_fd(), name.as_ptr(), value.as_mut_ptr(), value.len());
    assert_eq!((got, &value[..5]), (Ok(5), &b"value"[..]));
    let after = file.metadata().expect("stat");
    assert_eq!(
        (after.mode(), after.mtime(), after.mtime_nsec()),
        (before.mode(), before.mtime(), before.mtime_nsec())
    );
}

/// An overlay at `m`, over a tmpfs at `t`.
fn overlay_at(gate: &Gate, lower: &[(&str, &str)]) {
    if mount(c"tmpfs", "t", "").is_err() {
        gate.skip("no tmpfs");
    }
    for dir in ["t/l", "t/u", "t/w"] {
        fs::create_dir(dir).expect("mkdir");
    }
    for (name, content) in lower {
        fs::write(format!("t/l/{name}"), content).expect("write");
    }
    if let Err(errno) = mount(c"overlay", "m", "lowerdir=t/l,upperdir=t/u,workdir=t/w") {
        unmount("t");
        gate.skip(&format!("no overlayfs: errno {errno}"));
    }
}

fn overlay(gate: &Gate) {
    overlay_at(gate, &[("kept", "kept"), ("gone", "gone"), ("copied", "copied"), ("watched", "")]);
    let read = |name: &str| fs::File::open(format!("m/{name}")).expect("open");
    let (kept, gone, copied) = (read("kept"), read("gone"), read("copied"));
    fs::remove_file("m/gone").expect("remove");
    let writer = fs::File::options().write(true).open("m/copied").expect("open");
    writer.write_all_at(b"COPIED", 0).expect("write");
    let upper = fs::File::options().read(true).write(true).create_new(true).open("m/upper").expect("create");
    upper.write_all_at(b"upper", 0).expect("write");
    fs::remove_file("m/upper").expect("remove");
    let mapped = sys::mmap(0, 4096, READ, libc::MAP_PRIVATE, gone.as_raw_fd(), 0).expect("mmap");
    let fd = int(sys!(SYS_inotify_init1, libc::IN_NONBLOCK).expect("inotify_init1"));
    let watch = |path: &std::ffi::CStr, mask: u32| {
        int(sys!(SYS_inotify_add_watch, fd, path.as_ptr(), mask).expect("inotify_add_watch"))
    };
    let watched = watch(c"m/watched", libc::IN_OPEN);
    let directory = watch(c"m", libc::IN_CREATE);
    gate.ready();
    let content = |file: &fs::File| {
        let mut bytes = vec![0; 20];
        let got = file.read_at(&mut bytes, 0).expect("read");
        String::from_utf8_lossy(&bytes[..got]).into_owned()
    };
    assert_eq!([&kept, &gone, &copied, &upper].map(content), ["kept", "gone", "COPIED", "upper"]);
    assert_eq!(mapped.get::<[u8; 4]>(0), *b"gone");
    drop(read("watched"));
    fs::write("m/new", b"").expect("write");
    let events = sys::read(fd, 4096).expect("events");
    let numbers: Vec<i32> =
        [0, 16].map(|at| i32::from_ne_bytes(events[at..at + 4].try_into().expect("four"))).to_vec();
    assert_eq!(numbers, [watched, directory]);
    drop((kept, gone, copied, upper, writer));
    sys!(SYS_munmap, mapped.at(0), 4096).expect("munmap");
    sys::close(fd);
    unmount("m");
    unmount("t");
}

/// Copied up, linked, and one of the two names gone: it still has the other.
fn overlay_linked(gate: &Gate) {
    overlay_at(gate, &[("one", "one")]);
    let file = fs::File::open("m/one").expect("open");
    fs::hard_link("m/one", "m/two").expect("link");
    fs::remove_file("m/one").expect("remove");
    gate.ready();
    let names: Vec<_> = fs::read_dir("m").expect("list").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(names, ["two"], "the dump has left a name");
    sys::close(file.into_raw_fd());
    unmount("m");
    unmount("t");
}
