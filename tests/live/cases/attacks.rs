//! Directories in which somebody else puts links and files of their own while the tree does not run: a restore, which runs
//! as root, follows none of them, for whatever the tree had there.

use std::fs;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::case::{Case, Site};
use crate::gate::Gate;
use crate::sys;

const LINK: &str = "is a symbolic link now, of user 65534";

const fn refused(name: &'static str, target: fn(&Gate)) -> Case {
    Case::new(name, target).between(swap).restore_refused(LINK).only_plain()
}

pub const CASES: &[Case] = &[
    refused("attack_open_file", open_file),
    refused("attack_directory", directory),
    refused("attack_current_directory", current_directory),
    refused("attack_root_directory", root_directory),
    refused("attack_mapped_file", mapped_file),
    refused("attack_shared_mapping", shared_mapping),
    refused("attack_program", program),
    refused("attack_fifo", fifo),
    refused("attack_deleted_file", deleted_file),
    refused("attack_watched_file", watched_file),
    Case::new("attack_hard_link", open_file)
        .between(another_name)
        .restore_refused("belongs to user 0 and group 0")
        .only_plain(),
    Case::new("links_allowed", open_file)
        .between(swap)
        .flags(&["--allow-symlinks"])
        .may_differ(&["/fd/"])
        .only_plain()
        .peer_fails("knows no such option"),
];

const OTHERS: u32 = 65534;

/// A directory with a file, of somebody else.
fn set_up() {
    fs::create_dir("d").expect("mkdir");
    fs::write("d/name", b"0123456789").expect("write");
    fs::set_permissions("d/name", fs::Permissions::from_mode(0o644)).expect("chmod");
    lchown("d/name", Some(OTHERS), Some(OTHERS)).expect("chown");
    lchown("d", Some(OTHERS), Some(OTHERS)).expect("chown");
}

/// Their directory leads to one of root's that looks the same.
fn swap(site: &Site<'_>) {
    fs::rename(site.dir.join("d"), site.dir.join("roots")).expect("rename");
    symlink("roots", site.dir.join("d")).expect("symlink");
    lchown(site.dir.join("d"), Some(OTHERS), Some(OTHERS)).expect("chown");
}

/// Their name leads to a file of root's.
fn another_name(site: &Site<'_>) {
    fs::write(site.dir.join("roots"), b"0123456789").expect("write");
    fs::set_permissions(site.dir.join("roots"), fs::Permissions::from_mode(0o644)).expect("chmod");
    fs::remove_file(site.dir.join("d/name")).expect("remove");
    fs::hard_link(site.dir.join("roots"), site.dir.join("d/name")).expect("link");
}

fn become_other() {
    sys!(SYS_setresgid, OTHERS, OTHERS, OTHERS).expect("setresgid");
    sys!(SYS_setresuid, OTHERS, OTHERS, OTHERS).expect("setresuid");
}

fn open_file(gate: &Gate) {
    set_up();
    let fd = sys::open(c"d/name", libc::O_RDWR).expect("open");
    become_other();
    gate.ready();
    assert_eq!(sys::read(fd, 20).as_deref(), Ok(&b"0123456789"[..]));
}

fn directory(gate: &Gate) {
    set_up();
    let _fd = sys::open(c"d", libc::O_RDONLY | libc::O_DIRECTORY).expect("open");
    become_other();
    gate.ready();
}

fn current_directory(gate: &Gate) {
    set_up();
    std::env::set_current_dir("d").expect("chdir");
    become_other();
    gate.ready();
}

fn root_directory(gate: &Gate) {
    set_up();
    let child = crate::gate::fork(|| {
        sys!(SYS_chroot, c"d".as_ptr()).expect("chroot");
        loop {
            sys::nap(std::time::Duration::from_millis(1));
        }
    });
    while fs::read_link(format!("/proc/{child}/root")).is_ok_and(|root| root.as_os_str() == "/") {
        sys::nap(std::time::Duration::from_millis(1));
    }
    gate.ready();
    sys::kill(child, libc::SIGKILL);
}

fn mapped_file(gate: &Gate) {
    set_up();
    let file = fs::File::open("d/name").expect("open");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let map = sys::mmap(0, 4096, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0).expect("mmap");
    drop(file);
    become_other();
    gate.ready();
    assert_eq!(map.get::<u8>(9), b'9');
}

fn shared_mapping(gate: &Gate) {
    set_up();
    let file = fs::File::options().read(true).write(true).open("d/name").expect("open");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let map = sys::mmap(0, 4096, access, libc::MAP_SHARED, fd, 0).expect("mmap");
    drop(file);
    become_other();
    gate.ready();
    map.set::<u8>(9, b'X');
}

fn program(gate: &Gate) {
    set_up();
    fs::copy("/bin/sleep", "d/name").expect("copy");
    fs::set_permissions("d/name", fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut child = Command::new("d/name").arg("1000").arg0("sleep").spawn().expect("run");
    gate.ready();
    child.kill().expect("kill");
    child.wait().expect("wait");
}

fn fifo(gate: &Gate) {
    set_up();
    fs::remove_file("d/name").expect("remove");
    sys!(SYS_mknodat, libc::AT_FDCWD, c"d/name".as_ptr(), libc::S_IFIFO | 0o600, 0).expect("mkfifo");
    let _fd = sys::open(c"d/name", libc::O_RDWR).expect("open");
    gate.ready();
}

fn deleted_file(gate: &Gate) {
    set_up();
    let _fd = sys::open(c"d/name", libc::O_RDWR).expect("open");
    fs::remove_file("d/name").expect("remove");
    become_other();
    gate.ready();
}

fn watched_file(gate: &Gate) {
    set_up();
    let fd = sys::int(sys!(SYS_inotify_init1, libc::IN_NONBLOCK).expect("inotify_init1"));
    sys!(SYS_inotify_add_watch, fd, c"d/name".as_ptr(), libc::IN_OPEN).expect("inotify_add_watch");
    become_other();
    gate.ready();
}
