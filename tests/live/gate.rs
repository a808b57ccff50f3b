//! The target's side: set up, say so, wait to be let go, check.
//!
//! Nothing of it is an external resource: the gate is a directory of marks, looked at by system
//! calls that leave no trace (`mkdir`, `access`, `nanosleep`), so a target has only the descriptors
//! and mappings it made itself.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::sys;

/// Exit status of a target that found it cannot run here.
pub const SKIPPED: u8 = 77;
/// Exit status of a forked child whose checks failed.
pub const CHILD_FAILED: i32 = 101;

/// How long a target waits for what must come, however busy the machine.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// The mark that a tree gets which goes on after `dump -R`.
pub const ORIGINAL: &str = "original";

/// The marks between harness and target, below the case's directory.
#[derive(Debug)]
pub struct Gate {
    control: PathBuf,
    ready: CString,
    go: CString,
    ping: CString,
}

/// Where a target keeps its marks; `LIVE_DIR` is the case's directory.
pub fn control_dir(case_dir: &Path) -> PathBuf {
    case_dir.join("ctl")
}

/// Becomes the target called `name`.
pub fn main(name: &str) -> ExitCode {
    let case = crate::cases::all().find(|c| c.name == name);
    let (Some(case), Some(dir)) = (case, std::env::var_os("LIVE_DIR")) else {
        return ExitCode::from(2);
    };
    sys::close_from(3);
    if !case.on_terminal {
        sys::setsid();
    }
    let gate = Gate::new(&control_dir(Path::new(&dir)));
    let log = gate.control.join("log");
    std::panic::set_hook(Box::new(move |info| {
        use std::io::Write;
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log);
        if let Ok(mut file) = file {
            let _ = writeln!(file, "[{}] {info}", sys::gettid());
        }
    }));
    match catch_unwind(AssertUnwindSafe(|| (case.target)(&gate))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("path without NUL")
}

impl Gate {
    fn new(control: &Path) -> Gate {
        Gate {
            control: control.to_owned(),
            ready: c_path(&control.join("ready")),
            go: c_path(&control.join("go")),
            ping: c_path(&control.join("ping")),
        }
    }

    /// Everything is set up: tells the harness and comes back when the target is to check itself.
    pub fn ready(&self) {
        sys::mkdir(&self.ready);
        while !self.open() {
            if sys::exists(&self.ping) {
                sys::rmdir(&self.ping);
            }
            sys::nap(Duration::from_millis(1));
        }
    }

    /// The harness has let us go.
    pub fn open(&self) -> bool {
        sys::exists(&self.go)
    }

    /// Waits to be let go; for the other tasks of a tree.
    pub fn wait(&self) {
        while !self.open() {
            sys::nap(Duration::from_millis(1));
        }
    }

    /// Another handle on the same marks, for a thread to own.
    pub fn clone_for_thread(&self) -> Gate {
        Gate::new(&self.control)
    }

    /// The gate as a number, for children made by clone(2).
    pub fn address(&self) -> usize {
        std::ptr::from_ref(self).expose_provenance()
    }

    /// The gate from its number; it must live as long as the process.
    pub fn at(address: usize) -> &'static Gate {
        sys::borrow(address)
    }

    /// Ends the target: the machine cannot do what the case needs.
    pub fn skip(&self, reason: &str) -> ! {
        std::fs::write(self.control.join("skip"), reason).expect("write the reason to skip");
        sys::exit_now(i32::from(SKIPPED));
    }

    /// Says something that is shown if the trial fails.
    pub fn note(&self, text: &str) {
        use std::io::Write;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.control.join("log"));
        writeln!(log.expect("open the log"), "{text}").expect("write to the log");
    }

    /// Leaves a mark for other tasks of the tree.
    pub fn mark(&self, name: &str) {
        sys::mkdir(&c_path(&self.control.join(name)));
    }

    /// A name of our own, for things outside the working directory.
    pub fn token(&self) -> String {
        let dir = self.control.parent().and_then(Path::file_name);
        dir.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// We were dumped with -R and never restored.
    pub fn is_original(&self) -> bool {
        self.control.join(ORIGINAL).exists()
    }

    /// Whether a mark has been left.
    pub fn has_mark(&self, name: &str) -> bool {
        self.control.join(name).exists()
    }

    /// Waits for a mark that another task of the tree leaves.
    pub fn await_mark(&self, name: &str) {
        let path = c_path(&self.control.join(name));
        while !sys::exists(&path) {
            sys::nap(Duration::from_micros(300));
        }
    }
}

/// Forks a child that runs `body` and exits 0, or `CHILD_FAILED` when a check in it fails.
pub fn fork(body: impl FnOnce()) -> i32 {
    sys::fork(|| match catch_unwind(AssertUnwindSafe(body)) {
        Ok(()) => 0,
        Err(_) => CHILD_FAILED,
    })
}

/// Waits for a child and checks that it exited with status 0.
#[track_caller]
pub fn join(pid: i32) {
    assert_eq!(sys::waitpid(pid, 0), Ok((pid, 0)), "wait status of child {pid}");
}

/// Waits until thread `tid` of task `pid` sleeps in system call `number`.
#[track_caller]
pub fn until_in_call(pid: i32, tid: i32, number: i64) {
    let path = format!("/proc/{pid}/task/{tid}/syscall");
    let want = format!("{number} ");
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if std::fs::read_to_string(&path).is_ok_and(|s| s.starts_with(&want)) {
            return;
        }
        sys::nap(Duration::from_micros(500));
    }
    panic!("{path} never showed call {number}: {:?}", std::fs::read_to_string(&path));
}

/// Waits until task `pid` is in `state`, as /proc/PID/stat calls it.
#[track_caller]
pub fn until_state(pid: i32, state: char) {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if sys::stat_field(pid, 3) == state.to_string() {
            return;
        }
        sys::nap(Duration::from_micros(500));
    }
    panic!("task {pid} never reached state {state}: {}", sys::stat_field(pid, 3));
}
