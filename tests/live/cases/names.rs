//! Paths that are awkward to write down: spaces, newlines, " (deleted)", bytes that are no UTF-8,
//! the longest.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::case::Case;
use crate::gate::Gate;
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("name_with_spaces", name_with_spaces),
    Case::new("name_with_newline", name_with_newline),
    Case::new("name_says_deleted", name_says_deleted),
    Case::new("name_says_deleted_and_is", name_says_deleted_and_is),
    Case::new("name_not_utf8", name_not_utf8),
    Case::new("name_with_escapes", name_with_escapes),
    Case::new("name_of_4096_bytes", name_of_4096_bytes).peer_fails("its buffer for a path is one byte short"),
    Case::new("name_of_deleted_not_utf8", name_of_deleted_not_utf8),
    Case::new("name_through_link", name_through_link),
];

/// The file is open, mapped, and the working directory has such a name, too.
fn named(gate: &Gate, name: &[u8]) {
    let path = Path::new(OsStr::from_bytes(name));
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).expect("create");
    file.write_all_at(&[b'n'; 8192], 0).expect("write");
    let access = libc::PROT_READ;
    let memory = sys::mmap(0, 8192, access, libc::MAP_PRIVATE, file.as_raw_fd(), 0).expect("mmap");
    let mut position = &file;
    position.seek(SeekFrom::Start(8190)).expect("seek");
    gate.ready();
    assert_eq!(memory.get::<[u8; 4]>(4096), *b"nnnn");
    let mut rest = Vec::new();
    position.read_to_end(&mut rest).expect("read");
    assert_eq!(rest, b"nn");
    let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("readlink");
    assert!(link.as_os_str().as_bytes().ends_with(name), "{link:?}");
}

fn name_with_spaces(gate: &Gate) {
    named(gate, b" a  name with\tspaces ");
}

fn name_with_newline(gate: &Gate) {
    named(gate, b"two\nlines\n");
}

fn name_says_deleted(gate: &Gate) {
    named(gate, b"file (deleted)");
}

fn name_not_utf8(gate: &Gate) {
    named(gate, b"caf\xe9 \xff\xfe");
}

fn name_with_escapes(gate: &Gate) {
    named(gate, b"back\\040slash\\n\"quote\" %s $(x) -rf");
}

/// "x (deleted)" exists and is open; "x" is open and was deleted, so its link reads the same.
fn name_says_deleted_and_is(gate: &Gate) {
    fs::write("x (deleted)", b"exists").expect("write");
    fs::write("x", b"was deleted").expect("write");
    let exists = fs::File::open("x (deleted)").expect("open");
    let deleted = fs::File::open("x").expect("open");
    fs::remove_file("x").expect("remove");
    gate.ready();
    let read = |mut file: &fs::File| {
        let mut text = String::new();
        file.read_to_string(&mut text).expect("read");
        text
    };
    assert_eq!(read(&exists), "exists");
    assert_eq!(read(&deleted), "was deleted");
}

/// As long as a path can be: 4095 bytes and the NUL.
fn name_of_4096_bytes(gate: &Gate) {
    let mut path = std::env::current_dir().expect("cwd");
    while path.as_os_str().len() + 202 < 4095 {
        path.push("d".repeat(200));
    }
    let left = 4095 - path.as_os_str().len() - 1;
    // A component holds 255 bytes at most.
    let name = if left > 255 {
        path.push("e".repeat(left - 250));
        "f".repeat(249)
    } else {
        "f".repeat(left)
    };
    fs::create_dir_all(&path).expect("mkdir -p");
    path.push(name);
    assert_eq!(path.as_os_str().len(), 4095);
    fs::write(&path, b"deep").expect("write");
    let mut file = fs::File::open(&path).expect("open");
    gate.ready();
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read");
    assert_eq!(text, "deep");
}

fn name_of_deleted_not_utf8(gate: &Gate) {
    let path = Path::new(OsStr::from_bytes(b"gone \xe9\n(deleted)"));
    fs::write(path, b"still here").expect("write");
    let mut file = fs::File::open(path).expect("open");
    fs::remove_file(path).expect("remove");
    gate.ready();
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read");
    assert_eq!(text, "still here");
}

/// Opened through a symbolic link that has gone since: the file's own path counts.
fn name_through_link(gate: &Gate) {
    fs::create_dir("real").expect("mkdir");
    fs::write("real/file", b"found").expect("write");
    std::os::unix::fs::symlink("real", "alias").expect("symlink");
    let mut file = fs::File::open("alias/file").expect("open");
    fs::remove_file("alias").expect("remove");
    gate.ready();
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read");
    assert_eq!(text, "found");
}
