//! Trees with a file of a network file system: what one has written to it is there before the tree is; and one whose end the
//! file system holds up is not given away before.
//!
//! The network file system is a FUSE file system of this process with one file: what has come here is what another host would
//! read.

use std::{
    ffi::OsStr,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant, UNIX_EPOCH},
};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, WriteFlags,
};

use crate::{
    program::Memory,
    site::{Site, has_ended, list, wait_for},
};

const FILE: INodeNo = INodeNo(2);
const LEN: usize = 4096;
const TTL: Duration = Duration::from_secs(3600);

/// What the server has, and how often it was asked to make it safe.
#[derive(Default)]
struct Held {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicUsize,
    /// The process with this pid waits where it closes the file, also when it is killed.
    holds: AtomicU32,
    /// It does.
    closing: Mutex<Vec<ReplyEmpty>>,
}

impl Held {
    /// The number at the beginning of the file.
    fn number(&self) -> u64 {
        u64::from_le_bytes(self.bytes.lock().unwrap()[..8].try_into().unwrap())
    }
}

struct Server(Arc<Held>);

fn attributes(ino: INodeNo) -> FileAttr {
    let (kind, size, perm) = match ino {
        FILE => (FileType::RegularFile, LEN as u64, 0o600),
        _ => (FileType::Directory, 0, 0o700),
    };
    let (time, nlink, blksize) = (UNIX_EPOCH, 1, 4096);
    FileAttr {
        ino,
        size,
        blocks: 1,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize,
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("file") => reply.entry(&TTL, &attributes(FILE), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(ino));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        reply.data(&self.0.bytes.lock().unwrap());
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let offset = usize::try_from(offset).unwrap();
        self.0.bytes.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
        reply.written(u32::try_from(data.len()).unwrap());
    }

    fn flush(&self, request: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let mut closing = self.0.closing.lock().unwrap();
        if self.0.holds.load(SeqCst) == request.pid() {
            closing.push(reply);
        } else {
            reply.ok();
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.flushes.fetch_add(1, SeqCst);
        reply.ok();
    }
}

/// Counts in a mapping of the file, with no descriptor of it.
const COUNTS: &str = "
import mmap, os, sys, time
os.closerange(3, 1024)
fd = os.open(sys.argv[1], os.O_RDWR)
at = mmap.mmap(fd, 4096)
os.close(fd)
number = 0
while True:
    number += 1
    at[0:8] = number.to_bytes(8, 'little')
    if number == 10: os.utime(sys.argv[2])
    time.sleep(0.001)
";

pub fn can_be_tried() -> bool {
    let python = Command::new("python3").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    std::fs::File::open("/dev/fuse").is_ok() && python.is_ok_and(|status| status.success())
}

/// Has the file open, and says again and again that it runs.
const HOLDS: &str = "
import os, sys, time
os.closerange(3, 1024)
fd = os.open(sys.argv[1], os.O_RDWR)
while True:
    os.utime(sys.argv[2])
    time.sleep(0.001)
";

/// Its restore is killed when it has been told to let the tree go, and the tree takes its time to die.
pub fn whoever_dies_slowly_is_not_given_away() {
    const LONG: Duration = Duration::from_secs(3);
    let site = Site::new(Memory::Text);
    let cache = site.cache(&[] as &[&str]);
    let held = Arc::new(Held { bytes: Mutex::new(vec![0; LEN]), ..Held::default() });
    let at = site.work("mounted");
    let mounted = fuser::spawn_mount(Server(held.clone()), &at, &Config::default()).unwrap();
    let sign = site.path().join("sign");
    std::fs::write(&sign, "").unwrap();
    let runs = |what: &str| {
        let begun = std::fs::metadata(&sign).unwrap().modified().unwrap();
        wait_for(what, || (std::fs::metadata(&sign).unwrap().modified().unwrap() != begun).then_some(()));
    };
    let mut target = Command::new("setsid");
    target.args(["python3", "-c", HOLDS]).args([&at.join("file"), &sign]).current_dir("/");
    target.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = target.spawn().unwrap();
    runs("it does not run");
    let (pid, port) = (child.id().cast_signed(), cache.port().to_string());
    let words = ["dump", "--remote", "-t", &pid.to_string(), "--address", "127.0.0.1", "--port", &port];
    let reaper = std::thread::spawn(move || child.wait());
    Site::run(&mut site.crtool("src", &words)).succeeded();
    reaper.join().unwrap().unwrap();

    let [there, go, script] = ["there", "go", "script"].map(|name| site.path().join(name));
    let lines = format!(
        "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = network-unlock ] || exit 0\ntouch {}\n\
         while [ ! -e {} ]; do sleep 0.01; done\nkill -9 $PPID\n",
        there.display(),
        go.display()
    );
    std::fs::write(&script, lines).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&script, mode).unwrap();
    let restore = ["restore", "--remote", "-d"];
    let killed = [&restore[..], &["--action-script", script.to_str().unwrap()]].concat();
    let mut killed = site.crtool("dst", &killed);
    let killed = std::thread::spawn(move || Site::run(&mut killed));
    wait_for("it is not about to start", || there.exists().then_some(()));
    assert!(list(&site).contains("STARTING"), "{}", list(&site));
    // The restore itself ends at once.
    held.holds.store(pid.cast_unsigned(), SeqCst);
    std::fs::write(&go, "").unwrap();
    wait_for("it does not die", || (!held.closing.lock().unwrap().is_empty()).then_some(()));
    // Longer than anybody would wait who goes by the time.
    let begun = Instant::now();
    while begun.elapsed() < LONG {
        let listed = list(&site);
        assert!(listed.contains("STARTING"), "{listed}");
        assert!(!has_ended(pid));
        std::thread::sleep(Duration::from_millis(20));
    }
    held.holds.store(0, SeqCst);
    held.closing.lock().unwrap().drain(..).for_each(ReplyEmpty::ok);
    wait_for("it cannot be restored again", || list(&site).contains("READY").then_some(()));
    assert!(has_ended(pid));
    assert_ne!(killed.join().unwrap().code, Some(0));
    cache.says("nobody of the tree has run");
    wait_for("its pid is taken", || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
    Site::run(&mut site.crtool("dst", &restore)).succeeded();
    runs("it does not run again");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_for("it does not end", || has_ended(pid).then_some(()));
    drop(mounted);
}

/// What was written through a mapping.
pub fn before_the_hand_over() {
    let site = Site::new(Memory::Text);
    let cache = site.cache(&[] as &[&str]);
    let held = Arc::new(Held { bytes: Mutex::new(vec![0; LEN]), ..Held::default() });
    let at = site.work("mounted");
    let mounted = fuser::spawn_mount(Server(held.clone()), &at, &Config::default()).unwrap();
    let (file, sign) = (at.join("file"), site.path().join("sign"));
    std::fs::write(&sign, "").unwrap();
    let begun = std::fs::metadata(&sign).unwrap().modified().unwrap();
    let mut target = Command::new("python3");
    target.args(["-c", COUNTS]).args([&file, &sign]).current_dir("/");
    target.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    std::os::unix::process::CommandExt::process_group(&mut target, 0);
    let mut child = target.spawn().unwrap();
    wait_for("nobody counts", || {
        (std::fs::metadata(&sign).unwrap().modified().unwrap() != begun).then_some(())
    });

    let pid = child.id().to_string();
    let port = cache.port().to_string();
    let words = ["dump", "--remote", "--shell-job", "-t", &pid, "--address", "127.0.0.1", "--port", &port];
    let mut dump = site.crtool("src", &words);
    let dump = std::thread::spawn(move || Site::run(&mut dump));
    // The tree is gone, and may be restored elsewhere from now on.
    let there = wait_for("neither ends", || {
        let gone = child.try_wait().unwrap().is_some();
        (gone || dump.is_finished()).then(|| held.number())
    });
    let _ = child.kill();
    let _ = child.wait();
    dump.join().unwrap().succeeded();
    let written = number_of(&file);
    assert!(there >= 10 && there == written, "{there} there, {written} written");
    assert!(held.flushes.load(SeqCst) > 0);
    drop(mounted);
}

/// As this host sees it.
fn number_of(file: &Path) -> u64 {
    u64::from_le_bytes(std::fs::read(file).unwrap()[..8].try_into().unwrap())
}
