//! Images that CRIU and crtool make of small programs.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crtool::image::ImageKind;
use crtool::image::explore::{self, What};
use crtool::image::names::Family;

use super::Verdict;
use super::{oracle, split};

/// A program that says `ready` when there is something to dump.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    interpreter: &'static str,
    text: &'static str,
}

pub(crate) const PROGRAMS: &[Program] = &[
    Program {
        name: "shell",
        interpreter: "bash",
        text: "trap 'x=1' USR1; ulimit -n 512; sleep 1000 | cat & exec 7</dev/null; echo ready; while :; do read -t 1000 <><(:); done",
    },
    Program {
        name: "pipes_and_descriptors",
        interpreter: "python3",
        text: r#"
import ctypes, fcntl, os, select, sys, tempfile
libc = ctypes.CDLL(None)
r, w = os.pipe()
os.write(w, b"hello\xff\x00world" * 20)
poll = select.epoll(); poll.register(r, select.EPOLLIN)
timer = libc.timerfd_create(1, 0)
event = libc.eventfd(7, 0)
mask = ctypes.c_ulong(1 << 9)
signalfd = libc.signalfd(-1, ctypes.byref(mask), 8)
watch = libc.inotify_init(); libc.inotify_add_watch(watch, b"/", 0x100)
odd = open(os.path.join(sys.argv[1].encode(), b"na me\n\xc3\xa9"), "w+"); odd.write("x"); odd.flush()
fcntl.flock(odd, fcntl.LOCK_EX)
ghost = open(os.path.join(sys.argv[1], "ghost"), "w+"); ghost.write("ghost\n" * 1000); ghost.flush(); os.unlink(ghost.name)
memory = os.memfd_create("memory"); os.write(memory, b"z" * 5000)
fifo = os.path.join(sys.argv[1], "fifo"); os.mkfifo(fifo)
fifo = os.open(fifo, os.O_RDWR); os.write(fifo, b"fifo data")
print("ready", flush=True)
select.select([], [], [])
"#,
    },
    Program {
        name: "terminal",
        interpreter: "python3",
        text: r#"
import os, time
master, slave = os.openpty()
os.write(master, b"typed ahead\n")
print("ready", flush=True)
time.sleep(1000)
"#,
    },
    Program {
        name: "tree",
        interpreter: "python3",
        text: r#"
import mmap, os, resource, signal, threading, time
shared = mmap.mmap(-1, 65536); shared[0:4] = b"abcd"
private = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); private[4096] = 1
signal.setitimer(signal.ITIMER_REAL, 5000, 7)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, 40])
os.kill(os.getpid(), signal.SIGUSR1)
signal.signal(signal.SIGUSR2, lambda *_: None)
leader = os.fork()
if leader == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    time.sleep(1000)
dead = os.fork()
if dead == 0:
    os._exit(3)
for _ in range(3):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
while not open(f"/proc/{leader}/task/{leader}/children").read():
    time.sleep(0.01)
os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
print("ready", flush=True)
time.sleep(1000)
"#,
    },
    Program {
        name: "unix_sockets",
        interpreter: "python3",
        text: r#"
import socket, time
a, b = socket.socketpair()
a.send(b"stream")
c, d = socket.socketpair(type=socket.SOCK_DGRAM)
c.send(b"datagram"); c.send(b"")
e = socket.socket(socket.AF_UNIX); e.bind(b"\0name of\xff a socket"); e.listen(3)
print("ready", flush=True)
time.sleep(1000)
"#,
    },
];

/// Who makes the images.
#[derive(Clone, Copy)]
pub(crate) enum Maker {
    Criu,
    Crtool,
}

/// Closes what the program inherits beyond its standard descriptors, then becomes it.
const BARE: &str =
    r#"for fd in /proc/$$/fd/*; do fd=${fd##*/}; [ "$fd" -gt 2 ] && eval "exec $fd>&-"; done; exec "$@""#;

fn peer() -> Option<PathBuf> {
    let named = std::env::var_os("LIVE_PEER").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("criu"));
    let candidates = named.into_iter().chain([PathBuf::from("/opt/criu-peer/bin/criu")]).chain(found);
    candidates.into_iter().find(|path| path.is_file())
}

/// Ends and reaps what the program left, whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(Some(_))) {
            return;
        }
        let mut all = vec![self.0.id()];
        let mut at = 0;
        // Also those that made a session of their own. Each is stopped before its
        // children are looked for, so that none is missed.
        while let Some(&pid) = all.get(at) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::SIGSTOP);
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for task in tasks {
                let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            }
            at += 1;
        }
        for pid in all {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// Dumps `program` and compares each image.
pub(crate) fn same_as_crit(program: &'static Program, maker: Maker) -> Verdict {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Some("needs root".into()));
    }
    let tool = match maker {
        Maker::Crtool => PathBuf::from(env!("CARGO_BIN_EXE_crtool")),
        Maker::Criu => match peer() {
            Some(criu) => criu,
            None => return Ok(Some("no CRIU at LIVE_PEER, /opt/criu-peer/bin/criu or in PATH".into())),
        },
    };
    if let Some(reason) = oracle::no_crit() {
        return Ok(Some(reason));
    }
    let work = tempfile::tempdir().map_err(|e| e.to_string())?;
    let images = work.path().join("images");
    std::fs::create_dir(&images).map_err(|e| e.to_string())?;
    if let Some(reason) = dump(program, &tool, work.path(), &images)? {
        return Ok(Some(reason));
    }

    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(&images).map_err(|e| e.to_string())? {
        let name = entry.map_err(|e| e.to_string())?.file_name().to_string_lossy().into_owned();
        let kind = ImageKind::by_file_name(&name).map(|(kind, _)| kind);
        if let Some(kind) = kind.filter(|kind| kind.family() != Family::Raw) {
            oracle::compare(kind, &images.join(&name)).map_err(|why| format!("{name}: {why}"))?;
            names.push(name);
        }
    }
    for needed in ["pstree.img", "files.img", "inventory.img", "stats-dump"] {
        if !names.iter().any(|name| name == needed) {
            return Err(format!("the dump made no {needed}, only {names:?}"));
        }
    }
    explored(&images)?;

    // The same when pages are left to parents.
    split::split(&images, 3, 0x1a9e).map_err(|e| format!("make a chain: {e}"))?;
    for dir in [images.clone(), split::older(&images, 1), split::older(&images, 2)] {
        for entry in std::fs::read_dir(&dir).map_err(|e| e.to_string())?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some((kind @ (ImageKind::Pagemap | ImageKind::ShmemPagemap), _)) =
                ImageKind::by_file_name(&name)
            {
                oracle::compare(kind, &entry.path()).map_err(|why| format!("{name} of a chain: {why}"))?;
            }
        }
    }
    explored(&images)?;
    Ok(None)
}

/// Runs and dumps; says why the tool cannot, if so.
fn dump(program: &Program, tool: &Path, work: &Path, images: &Path) -> Result<Option<String>, String> {
    // A file to speak into, not a pipe: its other end would be outside of the tree.
    let said = work.join("said");
    let stdout = File::create(&said).map_err(|e| e.to_string())?;
    let mut command = Command::new("bash");
    command.args(["-c", BARE, "bash", program.interpreter, "-c", program.text]).arg(work);
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null());
    // Not the shims of a version manager: those are programs of their own.
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").process_group(0);
    let mut running = Running(command.spawn().map_err(|e| e.to_string())?);
    for tries in 0.. {
        if std::fs::read_to_string(&said).is_ok_and(|said| said.trim() == "ready") {
            break;
        }
        if let Ok(Some(status)) = running.0.try_wait() {
            return Ok(Some(format!("{} does not run here: {status}", program.interpreter)));
        }
        if tries == 600 {
            return Err("the program is not ready after a minute".into());
        }
        sleep(Duration::from_millis(100));
    }

    let pid = running.0.id().to_string();
    let mut dumping = Command::new(tool)
        .args(["dump", "-o", "dump.log", "--shell-job", "--file-locks", "-t", &pid, "-D"])
        .arg(images)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    // The dump waits until its target is gone, and so reaped.
    while matches!(dumping.try_wait(), Ok(None)) {
        let _ = running.0.try_wait();
        sleep(Duration::from_millis(20));
    }
    let dumped = dumping.wait_with_output().map_err(|e| e.to_string())?;
    if dumped.status.success() {
        return Ok(None);
    }
    let log = std::fs::read_to_string(images.join("dump.log")).unwrap_or_default();
    let stderr = String::from_utf8_lossy(&dumped.stderr);
    let said = if log.contains("Error") { log.as_str() } else { &stderr };
    let why: Vec<&str> =
        said.lines().filter(|line| line.contains("Error") && !line.contains("rlimit:")).collect();
    Ok(Some(format!("no dump: {}", why.join("; "))))
}

/// `x` says the same too, as far as crit gets: it stops at zombies.
fn explored(images: &Path) -> Result<(), String> {
    let store = crtool::image::DirStore::open(images).map_err(|e| e.to_string())?;
    for (word, what) in
        [("ps", What::Tasks), ("fds", What::Files), ("mems", What::Mappings), ("rss", What::Pages)]
    {
        let ours = explore::explore(&store, what).map_err(|e| e.to_string())?;
        let theirs =
            Command::new("crit").arg("x").arg(images).arg(word).output().map_err(|e| e.to_string())?;
        let theirs = String::from_utf8_lossy(&theirs.stdout).into_owned();
        // A name with a line end is one line with us.
        let theirs = theirs.replace("na me\n", "na me\\n");
        if !ours.starts_with(&theirs) || theirs.is_empty() {
            let pairs = ours.lines().zip(theirs.lines()).find(|(ours, theirs)| ours != theirs);
            return Err(format!("x {word}: ours and theirs first differ in {pairs:?}"));
        }
    }
    Ok(())
}
