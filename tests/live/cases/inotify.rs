//! inotify: watches with their numbers and masks, on files and directories.

use std::fs;

use crate::case::Case;
use crate::gate::Gate;
use crate::sys::{self, int};

pub const CASES: &[Case] = &[
    Case::new("inotify_directory", inotify_directory),
    Case::new("inotify_several", inotify_several),
    Case::new("inotify_none", inotify_none),
    Case::new("inotify_gaps", inotify_gaps),
    Case::new("inotify_two", inotify_two),
    Case::new("inotify_mask_flags", inotify_mask_flags).peer_fails("drops IN_ONESHOT"),
];

fn inotify(flags: i32) -> i32 {
    int(sys!(SYS_inotify_init1, flags | libc::IN_NONBLOCK).expect("inotify_init1"))
}

fn watch(fd: i32, path: &std::ffi::CStr, mask: u32) -> i32 {
    int(sys!(SYS_inotify_add_watch, fd, path.as_ptr(), mask).expect("inotify_add_watch"))
}

/// Events as watch, mask, name.
fn events(fd: i32) -> Vec<(i32, u32, String)> {
    let Ok(bytes) = sys::read(fd, 4096) else { return Vec::new() };
    let mut all = Vec::new();
    let mut rest = &bytes[..];
    while let Some((head, tail)) = rest.split_first_chunk::<16>() {
        let word =
            |n: usize| u32::from_ne_bytes([head[n * 4], head[n * 4 + 1], head[n * 4 + 2], head[n * 4 + 3]]);
        let (name, more) = tail.split_at(word(3) as usize);
        let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
        all.push((word(0).cast_signed(), word(1), name));
        rest = more;
    }
    all
}

fn event(watch: i32, mask: u32, name: &str) -> (i32, u32, String) {
    (watch, mask, name.to_owned())
}

fn inotify_directory(gate: &Gate) {
    let fd = inotify(libc::IN_CLOEXEC);
    fs::create_dir("dir").expect("mkdir");
    let dir = watch(fd, c"dir", libc::IN_CREATE | libc::IN_DELETE);
    gate.ready();
    assert_eq!(events(fd), []);
    fs::write("dir/new", b"").expect("write");
    fs::remove_file("dir/new").expect("remove");
    assert_eq!(events(fd), [event(dir, libc::IN_CREATE, "new"), event(dir, libc::IN_DELETE, "new")]);
}

fn inotify_several(gate: &Gate) {
    let fd = inotify(0);
    fs::create_dir("dir").expect("mkdir");
    fs::write("file", b"x").expect("write");
    fs::write("other", b"x").expect("write");
    let dir = watch(fd, c"dir", libc::IN_CREATE);
    let file = watch(fd, c"file", libc::IN_MODIFY);
    let other = watch(fd, c"other", libc::IN_OPEN);
    gate.ready();
    drop(fs::File::open("other").expect("open"));
    fs::write("dir/new", b"").expect("write");
    fs::OpenOptions::new().append(true).open("file").expect("open").set_len(0).expect("truncate");
    let want = [
        event(other, libc::IN_OPEN, ""),
        event(dir, libc::IN_CREATE, "new"),
        event(file, libc::IN_MODIFY, ""),
    ];
    assert_eq!(events(fd), want);
}

fn inotify_none(gate: &Gate) {
    let fd = inotify(0);
    gate.ready();
    assert_eq!(events(fd), []);
    let here = watch(fd, c".", libc::IN_CREATE);
    fs::write("new", b"").expect("write");
    assert_eq!(events(fd), [event(here, libc::IN_CREATE, "new")]);
}

/// Watches 1 and 3 were removed: numbers are not used again, and the ones left keep theirs.
fn inotify_gaps(gate: &Gate) {
    let fd = inotify(0);
    let names = [c"a", c"b", c"c", c"d"];
    let watches = names.map(|name| {
        fs::create_dir(name.to_str().expect("text")).expect("mkdir");
        watch(fd, name, libc::IN_CREATE)
    });
    for n in [0, 2] {
        sys!(SYS_inotify_rm_watch, fd, watches[n]).expect("inotify_rm_watch");
    }
    // The removals themselves are told.
    assert_eq!(events(fd).len(), 2);
    gate.ready();
    for name in ["a", "b", "c", "d"] {
        fs::write(format!("{name}/new"), b"").expect("write");
    }
    assert_eq!(
        events(fd),
        [event(watches[1], libc::IN_CREATE, "new"), event(watches[3], libc::IN_CREATE, "new")]
    );
}

fn inotify_two(gate: &Gate) {
    let (one, two) = (inotify(0), inotify(0));
    let in_one = watch(one, c".", libc::IN_CREATE);
    let in_two = watch(two, c".", libc::IN_CREATE | libc::IN_MOVED_TO);
    gate.ready();
    fs::write("new", b"").expect("write");
    assert_eq!(events(one), [event(in_one, libc::IN_CREATE, "new")]);
    assert_eq!(events(two), [event(in_two, libc::IN_CREATE, "new")]);
}

/// IN_ONESHOT and IN_EXCL_UNLINK stay with the watch.
fn inotify_mask_flags(gate: &Gate) {
    let fd = inotify(0);
    fs::create_dir("dir").expect("mkdir");
    let dir = watch(fd, c"dir", libc::IN_CREATE | libc::IN_ONESHOT);
    gate.ready();
    fs::write("dir/one", b"").expect("write");
    fs::write("dir/two", b"").expect("write");
    assert_eq!(events(fd), [event(dir, libc::IN_CREATE, "one"), event(dir, libc::IN_IGNORED, "")]);
}
