//! The programs that are dumped. Each counts in the file `progress` of its directory while it runs; one that finds itself
//! damaged writes the file `wrong`.

use std::{
    env,
    fs::{self, File, OpenOptions},
    os::{
        fd::AsRawFd as _,
        unix::{fs::FileExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use crate::{fuse, sys};

pub fn main(kind: &str) -> ExitCode {
    sys::close_inherited();
    let dir: PathBuf = env::var_os("HANGS_DIR").expect("HANGS_DIR").into();
    if env::var_os("HANGS_AGAIN").is_none() {
        nix::unistd::setsid().expect("new session");
    }
    match kind {
        "cwd" => env::set_current_dir(dir.join("fuse")).expect("chdir"),
        "open" => std::mem::forget(File::open(dir.join("fuse/f")).expect("open")),
        "mapped" => sys::map(File::open(dir.join("fuse/f")).expect("open").as_raw_fd()),
        "program" => drop(run_from_fuse(&dir)),
        "waiting" => waiting(&dir),
        "server" => server(&dir),
        "exec-thread" => return exec_all_the_time(&dir, true),
        "exec-leader" => return exec_all_the_time(&dir, false),
        "threads" => threads(),
        "processes" => processes(),
        "plain" => {}
        "tracer" => tracer(),
        "computing" => computing(&dir),
        "large" => std::mem::forget(memory()),
        _ => panic!("no target {kind}"),
    }
    count(&dir)
}

/// Memory that takes its time to be restored.
fn memory() -> Vec<u64> {
    (0..8u64 << 20).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
}

/// A file that others watch grow.
fn progress(dir: &Path) -> File {
    OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("progress")).expect("progress")
}

/// Goes on for ever.
fn count(dir: &Path) -> ! {
    let file = progress(dir);
    let mut number = 0u64;
    loop {
        number += 1;
        file.write_all_at(format!("{number:20}").as_bytes(), 0).expect("write progress");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A child that executes the program in the mount.
fn run_from_fuse(dir: &Path) -> std::process::Child {
    let mut command = Command::new(dir.join("fuse/f"));
    command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("run the program")
}

/// A child that waits for a file system that does not answer, once `silent` says that it does not.
fn waiting(dir: &Path) {
    sys::fork(|| {
        while !dir.join("silent").exists() {
            thread::sleep(Duration::from_millis(1));
        }
        fs::write(dir.join("asking"), "").expect("mark");
        let _ = fs::metadata(dir.join("fuse/f"));
        loop {
            thread::park();
        }
    });
}

/// A child that traces another.
fn tracer() {
    let asleep = || {
        loop {
            thread::park();
        }
    };
    let traced = nix::unistd::Pid::from_raw(sys::fork(asleep));
    sys::fork(|| {
        nix::sys::ptrace::seize(traced, nix::sys::ptrace::Options::empty()).expect("seize");
        asleep()
    });
    // Until it is.
    thread::sleep(Duration::from_millis(100));
}

/// The file system itself is a child, as is one who has its file open and its directory as the current one.
fn server(dir: &Path) {
    let device = fuse::begin(&dir.join("fuse")).expect("mount");
    sys::fork(|| fuse::answer(device).expect("serve"));
    let mount = dir.join("fuse");
    sys::fork(|| {
        std::mem::forget(File::open(mount.join("f")).expect("open"));
        env::set_current_dir(&mount).expect("chdir");
        loop {
            thread::park();
        }
    });
}

/// Executes itself again and again, from another thread or from the leader, while a third thread sleeps.
fn exec_all_the_time(dir: &Path, by_thread: bool) -> ExitCode {
    let file = progress(dir);
    let number: u64 = env::var("HANGS_AGAIN").ok().and_then(|n| n.parse().ok()).unwrap_or(0) + 1;
    file.write_all_at(format!("{number:20}").as_bytes(), 0).expect("write progress");
    let execute = move || {
        thread::sleep(Duration::from_micros(200));
        let mut command = Command::new("/proc/self/exe");
        command.env("HANGS_AGAIN", number.to_string());
        panic!("exec: {}", command.exec());
    };
    for _ in 0..3 {
        thread::spawn(|| {
            loop {
                thread::park();
            }
        });
    }
    if by_thread {
        thread::spawn(execute);
        loop {
            thread::park();
        }
    }
    execute()
}

/// Threads that make threads, and wait for them.
fn threads() {
    for _ in 0..4 {
        thread::spawn(|| {
            loop {
                let many: Vec<_> = (0..3)
                    .map(|_| thread::Builder::new().stack_size(64 << 10).spawn(thread::yield_now))
                    .collect();
                for thread in many.into_iter().flatten() {
                    thread.join().expect("join");
                }
            }
        });
    }
}

/// Children that come and go: by fork and vfork, and orphans, for which this is the subreaper.
fn processes() {
    sys::become_subreaper();
    for kind in 0..3 {
        sys::fork(|| {
            sys::become_subreaper();
            loop {
                match kind {
                    0 => sys::fork_and_wait(false),
                    1 => sys::fork_and_wait(true),
                    _ => sys::orphan(),
                }
            }
        });
    }
}

/// Threads that compute what they know the result of.
fn computing(dir: &Path) {
    static ROUNDS: AtomicU64 = AtomicU64::new(0);
    for seed in 1..4u64 {
        let dir = dir.to_owned();
        thread::spawn(move || {
            let round =
                |seed: u64| (0..5000u64).fold(seed, |x, n| x.rotate_left(5).wrapping_mul(0x9e37_79b9) ^ n);
            let expected = round(seed);
            loop {
                if std::hint::black_box(round(std::hint::black_box(seed))) != expected {
                    let _ = fs::write(dir.join("wrong"), "a computation");
                }
                ROUNDS.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(100));
            }
        });
    }
}
