//! `crtool demo` from outside: it shows a migration, and whatever happens leaves nothing behind.
//!
//! Each trial gives it a directory for its temporary files: a process that has the path of that directory in its
//! environment is of this trial, and what is in it at the end was left.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Completion, Trial};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

/// Longer than any step takes on a machine under load.
const PATIENCE: Duration = Duration::from_secs(120);
/// What it says, in this order, one line each.
const STEPS: &[&str] = &["start", "cache", "count", "migrate", "count", "end"];

fn main() -> std::process::ExitCode {
    let args = Arguments::from_args();
    let mut trials = vec![
        trial("whole", || whole(&Place::new())),
        trial("reader_gone", || reader_gone(&Place::new())),
        trial("no_room", || no_room(&Place::new())),
        trial("no_root", || no_root(&Place::new())),
    ];
    // Just after each of its lines, and some time into what comes next.
    for (number, step) in STEPS.iter().enumerate() {
        for (whom, group) in [("alone", false), ("group", true)] {
            let delay = Duration::from_millis(7 * number as u64 * u64::from(group));
            trials.push(trial(&format!("interrupted_{whom}_{number}_{step}"), move || {
                interrupted(&Place::new(), number + 1, delay, group);
            }));
        }
    }
    trials.push(trial("interrupted_at_once", || interrupted(&Place::new(), 0, Duration::ZERO, false)));
    for step in 0..8u64 {
        // Between the first count and the end of the migration most things happen.
        let delay = Duration::from_millis(step * 23);
        trials.push(trial(&format!("interrupted_moving_{step}"), move || {
            interrupted(&Place::new(), 3, delay, false);
        }));
    }
    libtest_mimic::run(&args, trials).exit_code()
}

fn trial(name: &str, run: impl FnOnce() + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        if !nix::unistd::geteuid().is_root() {
            return Ok(Completion::ignored_with("needs root"));
        }
        run();
        Ok(Completion::Completed)
    })
}

/// A directory for one demo.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("temporary directory"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn demo(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crtool"));
        command.arg("demo").env("TMPDIR", self.path()).stdin(Stdio::null());
        command
    }

    /// Living processes that were started here, and files that are here.
    fn left(&self) -> (Vec<String>, Vec<PathBuf>) {
        let mark = format!("={}", self.path().display());
        let processes = fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .filter(|entry| {
                let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
                environ.windows(mark.len()).any(|window| window == mark.as_bytes())
            })
            .map(|entry| {
                let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                format!("{:?}: {}", entry.file_name(), String::from_utf8_lossy(&cmdline).replace('\0', " "))
            })
            .collect();
        let files =
            fs::read_dir(self.path()).expect("directory").flatten().map(|entry| entry.path()).collect();
        (processes, files)
    }

    fn is_empty(&self) {
        let (processes, files) = self.left();
        assert!(processes.is_empty() && files.is_empty(), "left behind: {processes:?} {files:?}");
    }
}

fn whole(place: &Place) {
    let out = place.demo().output().expect("it starts");
    let (text, err) = (stdout(&out), stderr(&out));
    assert_eq!(out.status.code(), Some(0), "{text}{err}");
    let steps: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(steps, STEPS, "{text}");
    assert!(!text.contains('\x1b') && err.is_empty(), "{text}{err}");
    assert!(text.contains("without a gap") && text.contains("stood still for"), "{text}");
    place.is_empty();
}

fn reader_gone(place: &Place) {
    let mut child = place.demo().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    drop(child.stdout.take());
    let (status, err) = end(&mut child);
    assert_eq!(status.code(), Some(0), "{err}");
    place.is_empty();
}

fn interrupted(place: &Place, lines: usize, delay: Duration, group: bool) {
    let mut command = place.demo();
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().expect("it starts");
    let pid = Pid::from_raw(child.id().cast_signed());
    let mut out = BufReader::new(child.stdout.take().expect("pipe"));
    let mut said = String::new();
    for _ in 0..lines {
        assert!(out.read_line(&mut said).expect("output") > 0, "{said}{}", end(&mut child).1);
    }
    thread::sleep(delay);
    // Not waited for yet: the pid is its own.
    let sent = if group { killpg(pid, Signal::SIGINT) } else { kill(pid, Signal::SIGINT) };
    sent.expect("signal");
    out.read_to_string(&mut said).expect("output");
    let (status, err) = end(&mut child);
    let whole = said.contains("without a gap");
    // It may have been through before the signal came; and before it is ready for one, any signal ends it.
    let fine = match status.code() {
        Some(0) => whole && err.is_empty(),
        Some(1) => err == "Error (crtool): interrupted by SIGINT\n",
        None => lines == 0 && said.is_empty() && err.is_empty(),
        _ => false,
    };
    assert!(fine, "{status}\n{said}{err}");
    place.is_empty();
}

fn no_room(place: &Place) {
    let full = place.path().join("full");
    fs::create_dir(&full).expect("directory");
    let out = Command::new("unshare")
        .args(["-m", "sh", "-c", "mount -t tmpfs -o size=64k none \"$1\" && exec \"$0\" demo"])
        .arg(env!("CARGO_BIN_EXE_crtool"))
        .arg(&full)
        .env("TMPDIR", &full)
        .stdin(Stdio::null())
        .output()
        .expect("unshare starts");
    failed(&out, &["TMPDIR", "No space left on device"]);
    fs::remove_dir(&full).expect("an empty directory");
    place.is_empty();
}

fn no_root(place: &Place) {
    // Where nobody may go.
    let program = place.path().join("crtool");
    // By another process: while a descriptor of ours is open for writing, in any thread's child, it cannot be run.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_crtool")).arg(&program).status();
    assert!(copied.is_ok_and(|status| status.success()), "a copy");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(place.path(), open).expect("mode");
    let out = Command::new(&program)
        .arg("demo")
        .env("TMPDIR", place.path())
        .env("HOME", place.path())
        .uid(65534)
        .gid(65534)
        .stdin(Stdio::null())
        .output()
        .expect("it starts");
    failed(&out, &["root"]);
    fs::remove_file(&program).expect("the copy");
    place.is_empty();
}

/// Failed, said why in one line and nothing else.
fn failed(out: &Output, wanted: &[&str]) {
    let err = stderr(out);
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert!(err.lines().count() == 1 && wanted.iter().all(|&part| err.contains(part)), "{err}");
    assert!(out.stdout.is_empty());
}

/// Waits for its end; a child that does not come to one is killed.
fn end(child: &mut Child) -> (ExitStatus, String) {
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        if begin.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("it does not end");
        }
        thread::sleep(Duration::from_millis(5));
    };
    let mut err = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut err).expect("messages");
    }
    (status, err)
}

fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}
