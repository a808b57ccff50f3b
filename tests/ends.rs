//! How dump and restore end, as a caller sees it: exit status, pid file, status descriptor, statistics, action
//! scripts, who is whose parent, what a signal to crtool does.
//!
//! The workload is a shell that counts into a file until it finds another, and ends with status 7. Each trial has a directory of its
//! own; none runs without root.

use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Completion, Trial};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

type Case = (&'static str, fn(&Work));

static CASES: &[Case] = &[
    ("detached", detached),
    ("attached_status", attached_status),
    ("attached_killed", attached_killed),
    ("attached_interrupted", attached_interrupted),
    ("exec_cmd", exec_cmd),
    ("first_of_a_namespace", first_of_a_namespace),
    ("sibling", sibling),
    ("leave_running", leave_running),
    ("leave_stopped", leave_stopped),
    ("restore_stopped", restore_stopped),
    ("scripts", scripts),
    ("script_fails_dump", script_fails_dump),
    ("script_fails_restore", script_fails_restore),
    ("root_killed_in_dump", root_killed_in_dump),
    ("root_killed_in_restore", root_killed_in_restore),
    ("interrupted_dump", interrupted_dump),
    ("interrupted_restore", interrupted_restore),
    ("pidfile_fails", pidfile_fails),
    ("statistics", statistics),
    ("log_per_pid", log_per_pid),
    ("pid_taken", pid_taken),
    ("pids_of_sessions_that_end", pids_of_sessions_that_end),
    ("restores_at_once", restores_at_once),
    ("memory_for_many_processes", memory_for_many_processes),
];

fn main() -> std::process::ExitCode {
    let args = Arguments::from_args();
    let trials = CASES.iter().map(|&(name, run)| {
        Trial::ignorable_test(name, move || {
            if !nix::unistd::geteuid().is_root() {
                return Ok(Completion::ignored_with("needs root"));
            }
            if !Path::new("/bin/bash").exists() {
                return Ok(Completion::ignored_with("needs bash"));
            }
            run(&Work::start());
            Ok(Completion::Completed)
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit_code()
}

/// Counts until there is a file `end`, then ends with 7. A file `split` makes it leave an orphan
/// in its session and one in that of a child, a file `grow` have 100 MB, a file `many` 800 children. First it closes what the harness may have left open.
const COUNTER: &str = "for f in /proc/$$/fd/*; do n=${f##*/}; ((n > 2)) && eval \"exec $n>&-\"; done
    for ((i = 0; ; i++)); do
        echo $i >>count
        [ ! -e end ] || exit 7
        if [ -e split ]; then
            rm split
            (sleep 1000 & echo $! >orphan)
            setsid bash -c '(sleep 1000 & echo $! >other); echo $$ >leader; exec sleep 1000' &
        fi
        if [ -e grow ]; then
            printf -v large '%*s' 100000000 x
            rm grow
        fi
        if [ -e many ]; then
            for ((child = 0; child < 800; child++)); do sleep 1000 & done
            rm many
        fi
        sleep 0.02
    done";

/// A directory, and a workload that runs in it.
struct Work {
    dir: tempfile::TempDir,
    pid: i32,
}

impl Work {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("images")).expect("directory");
        let mut child = Command::new("setsid")
            .args(["bash", "-c", COUNTER])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the workload starts");
        let pid = child.id().cast_signed();
        // Dead tasks keep their pids until somebody asks for them.
        thread::spawn(move || child.wait());
        let work = Self { dir, pid };
        work.moves();
        work
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn count(&self) -> usize {
        fs::read_to_string(self.path("count")).unwrap_or_default().lines().count()
    }

    /// Waits until the count has grown.
    fn moves(&self) {
        let before = self.count();
        wait_for("the workload to count", || self.count() > before + 1);
    }

    /// The count does not grow.
    fn rests(&self) {
        let before = self.count();
        thread::sleep(Duration::from_millis(120));
        assert_eq!(self.count(), before, "the workload still runs");
    }

    /// It is stopped, and does not count.
    fn stopped(&self) {
        let state = || self.stat().map(|(state, _)| state);
        wait_for("the workload to be stopped", || state() == Some('T'));
        self.rests();
        assert_eq!(state(), Some('T'));
    }

    fn alive(&self) -> bool {
        self.stat().is_some_and(|(state, _)| state != 'Z')
    }

    /// State and parent of the root.
    fn stat(&self) -> Option<(char, i32)> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let mut fields = text.rsplit_once(") ")?.1.split(' ');
        Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crtool"));
        command.args(args).args(["--no-default-config", "-D", "images"]).current_dir(self.dir.path());
        command
    }

    fn crtool(&self, args: &[&str]) -> Output {
        let out = self.command(args).stdin(Stdio::null()).output().expect("crtool starts");
        assert_eq!(out.status.signal(), None, "{args:?}");
        out
    }

    fn dump(&self, more: &[&str]) -> Output {
        let pid = self.pid.to_string();
        self.crtool(&[&["dump", "-t", pid.as_str()], more].concat())
    }

    /// A dump that succeeds and kills the tree.
    fn saved(&self) {
        ok(&self.dump(&[]));
        wait_for("the pid to be free", || self.stat().is_none());
    }

    /// Every thread that has an image.
    fn tasks(&self) -> Vec<i32> {
        let names = fs::read_dir(self.path("images")).expect("images").flatten().map(|e| e.file_name());
        names.filter_map(|n| n.to_str()?.strip_prefix("core-")?.strip_suffix(".img")?.parse().ok()).collect()
    }

    /// An action script of the workload's directory, absolute; written by a shell, so that no descriptor of ours keeps it
    /// from being run.
    fn script(&self, text: &str) -> String {
        let path = self.path("script");
        let made = Command::new("sh")
            .args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" >\"$0\" && chmod 755 \"$0\""])
            .arg(&path)
            .arg(text)
            .status();
        assert!(made.is_ok_and(|status| status.success()));
        path.to_string_lossy().into_owned()
    }

    fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid), signal);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(90);
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn err(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn ok(out: &Output) {
    assert_eq!(out.status.code(), Some(0), "{}", err(out));
}

/// Failed with nothing changed, and said why in one line.
fn failed(out: &Output, wanted: &str) {
    let err = err(out);
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert!(err.lines().all(|line| line.starts_with("Error (crtool): ")) && err.contains(wanted), "{err}");
}

/// Started, and waited for until the restored root counts.
fn attached(work: &Work) -> std::process::Child {
    let child = work.command(&["restore"]).stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
    let child = child.expect("crtool starts");
    work.moves();
    assert_eq!(work.stat().map(|(_, parent)| parent), Some(child.id().cast_signed()));
    child
}

fn detached(work: &Work) {
    ok(&work.dump(&["--status-fd", "1"]));
    wait_for("the pid to be free", || !work.alive());
    work.rests();
    let out = work.crtool(&["restore", "-d", "--pidfile", "pid", "-W", ".", "--status-fd", "1"]);
    ok(&out);
    assert_eq!(out.stdout, [0]);
    assert_eq!(fs::read_to_string(work.path("pid")).ok(), Some(work.pid.to_string()));
    work.moves();
    let lines = fs::read_to_string(work.path("count")).expect("count");
    assert!(lines.lines().enumerate().all(|(n, line)| line == n.to_string()), "a number is missing or twice");
}

fn attached_status(work: &Work) {
    work.saved();
    let mut child = attached(work);
    fs::write(work.path("end"), "").expect("end");
    let status: ExitStatus = child.wait().expect("wait");
    assert_eq!(status.code(), Some(7));
}

fn attached_killed(work: &Work) {
    work.saved();
    let mut child = attached(work);
    work.signal(Signal::SIGKILL);
    assert_eq!(child.wait().expect("wait").code(), Some(128 + 9));
}

fn attached_interrupted(work: &Work) {
    work.saved();
    let mut child = attached(work);
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).expect("kill");
    assert_eq!(child.wait().expect("wait").code(), Some(128 + 15));
    work.moves();
}

fn exec_cmd(work: &Work) {
    work.saved();
    let mut command = work.command(&["restore", "--exec-cmd"]);
    let child = command
        .args(["--", "sh", "-c", "echo $$ >parent; until [ -e over ]; do sleep 0.05; done; exit 5"])
        .spawn();
    let mut child = child.expect("crtool starts");
    wait_for("the program", || {
        fs::read_to_string(work.path("parent")).is_ok_and(|text| text.ends_with('\n'))
    });
    let parent = fs::read_to_string(work.path("parent")).expect("parent");
    assert_eq!(parent.trim(), child.id().to_string());
    assert_eq!(work.stat().map(|(_, parent)| parent), Some(child.id().cast_signed()));
    fs::write(work.path("over"), "").expect("over");
    assert_eq!(child.wait().expect("wait").code(), Some(5));
    work.moves();
}

/// As the first process of a pid namespace it must stay as long as the tree.
fn first_of_a_namespace(work: &Work) {
    work.saved();
    let inside = |args: &[&str]| {
        let inner = work.command(args);
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc"]).arg(inner.get_program()).args(inner.get_args());
        command.current_dir(work.dir.path()).stdin(Stdio::null());
        command
    };
    let out = inside(&["restore", "-d"]).output().expect("unshare starts");
    failed(&out, "as the first process of a pid namespace");
    work.rests();
    let mut child = inside(&["restore"]).spawn().expect("unshare starts");
    work.moves();
    fs::write(work.path("end"), "").expect("end");
    assert_eq!(child.wait().expect("wait").code(), Some(7));
}

fn sibling(work: &Work) {
    work.saved();
    ok(&work.crtool(&["restore", "-d", "-S"]));
    work.moves();
    assert_eq!(work.stat().map(|(_, parent)| parent), Some(std::process::id().cast_signed()));
    work.signal(Signal::SIGKILL);
    let ended = waitpid(Pid::from_raw(work.pid), None).expect("it is our child");
    assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{ended:?}");
}

fn leave_running(work: &Work) {
    ok(&work.dump(&["-R"]));
    work.moves();
    ok(&work.dump(&["--leave-running"]));
    work.moves();
}

fn leave_stopped(work: &Work) {
    ok(&work.dump(&["-s"]));
    work.stopped();
    work.signal(Signal::SIGCONT);
    let _ = kill_children(work.pid, Signal::SIGCONT);
    work.moves();
}

fn restore_stopped(work: &Work) {
    work.saved();
    ok(&work.crtool(&["restore", "-d", "-s"]));
    work.stopped();
    work.signal(Signal::SIGCONT);
    let _ = kill_children(work.pid, Signal::SIGCONT);
    work.moves();
}

fn kill_children(pid: i32, signal: Signal) -> std::io::Result<()> {
    for child in fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?.split_whitespace() {
        let _ = child.parse().map(|child| kill(Pid::from_raw(child), signal));
    }
    Ok(())
}

fn scripts(work: &Work) {
    let script = work.script("echo $CRTOOLS_SCRIPT_ACTION ${CRTOOLS_INIT_PID-none} $(pwd) >>actions");
    let args = ["-W", ".", "--action-script", &script];
    ok(&work.dump(&args));
    wait_for("the pid to be free", || work.stat().is_none());
    ok(&work.crtool(&[&["restore", "-d"], &args[..]].concat()));
    let place = work.dir.path().canonicalize().expect("directory");
    let seen = fs::read_to_string(work.path("actions")).expect("actions");
    let wanted =
        ["pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume"].map(|action| {
            let pid = if action == "pre-restore" { "none".to_owned() } else { work.pid.to_string() };
            format!("{action} {pid} {}", place.display())
        });
    assert_eq!(seen.lines().collect::<Vec<_>>(), wanted);
}

fn script_fails_dump(work: &Work) {
    for action in ["pre-dump", "post-dump"] {
        let script = work.script(&format!("test $CRTOOLS_SCRIPT_ACTION != {action}"));
        failed(&work.dump(&["--action-script", &script]), &format!("failed at {action}"));
        work.moves();
        failed(&work.crtool(&["restore", "-d"]), "inventory.img");
        assert_eq!(fs::read_dir(work.path("images")).expect("images").count(), 0, "{action}");
    }
}

fn script_fails_restore(work: &Work) {
    work.saved();
    for action in ["pre-restore", "post-restore", "pre-resume"] {
        let script = work.script(&format!("test $CRTOOLS_SCRIPT_ACTION != {action}"));
        failed(&work.crtool(&["restore", "-d", "--action-script", &script]), &format!("failed at {action}"));
        work.rests();
        assert!(!work.alive(), "{action}");
    }
    // The tree runs: too late to fail.
    let script = work.script("test $CRTOOLS_SCRIPT_ACTION != post-resume");
    let out = work.crtool(&["restore", "-d", "--action-script", &script]);
    ok(&out);
    assert!(err(&out).starts_with("Warn "), "{}", err(&out));
    work.moves();
}

/// Too late to fail as if nothing had been done: the images are there.
fn root_killed_in_dump(work: &Work) {
    let script = work.script("test $CRTOOLS_SCRIPT_ACTION != post-dump || kill -9 $CRTOOLS_INIT_PID");
    for leave in ["-R", "-s"] {
        let out = work.dump(&[leave, "--action-script", &script]);
        let said = err(&out);
        assert_eq!(out.status.code(), Some(2), "{leave}: {said}");
        assert!(said.contains("the images are complete"), "{leave}: {said}");
        if leave == "-s" {
            for pid in work.tasks() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
            }
        }
        // The shell's child, if it had one, ends by itself.
        let tasks = work.tasks();
        wait_for("the pids to be free", || {
            tasks.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
        });
        ok(&work.crtool(&["restore", "-d"]));
        work.moves();
    }
}

/// Nothing has run yet: nothing is left.
fn root_killed_in_restore(work: &Work) {
    work.saved();
    let script = work.script("test $CRTOOLS_SCRIPT_ACTION != pre-resume || kill -9 $CRTOOLS_INIT_PID");
    failed(&work.crtool(&["restore", "-d", "--action-script", &script]), "release of thread");
    work.rests();
    assert!(!work.alive());
    ok(&work.crtool(&["restore", "-d"]));
    work.moves();
}

/// The script runs as our child while signals are held back: the dump has to notice at its next step.
fn interrupted_dump(work: &Work) {
    for signal in ["INT", "TERM", "HUP"] {
        let script = work.script(&format!("test $CRTOOLS_SCRIPT_ACTION != pre-dump || kill -{signal} $PPID"));
        failed(&work.dump(&["--action-script", &script]), &format!("interrupted by SIG{signal}"));
        work.moves();
    }
    ok(&work.dump(&["-R"]));
}

fn interrupted_restore(work: &Work) {
    work.saved();
    for action in ["pre-restore", "pre-resume"] {
        let script = work.script(&format!("test $CRTOOLS_SCRIPT_ACTION != {action} || kill -INT $PPID"));
        failed(&work.crtool(&["restore", "-d", "--action-script", &script]), "interrupted by SIGINT");
        work.rests();
        assert!(!work.alive());
    }
    ok(&work.crtool(&["restore", "-d"]));
    work.moves();
}

fn pidfile_fails(work: &Work) {
    work.saved();
    failed(&work.crtool(&["restore", "-d", "--pidfile", "nowhere/pid"]), "nowhere/pid");
    work.rests();
    assert!(!work.alive());
    ok(&work.crtool(&["restore", "-d"]));
    work.moves();
}

fn statistics(work: &Work) {
    let out = work.dump(&["--display-stats"]);
    ok(&out);
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(shown.starts_with("Displaying dump stats:\n"), "{shown}");
    let written: u64 = shown
        .lines()
        .find_map(|line| line.strip_prefix("Memory pages written: ")?.split(' ').next()?.parse().ok())
        .expect("pages written");
    let pages =
        |name: &str| File::open(work.path(name)).and_then(|file| file.metadata()).map(|meta| meta.len());
    let mut total = 0;
    for entry in fs::read_dir(work.path("images")).expect("images").flatten() {
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            total += entry.metadata().expect("metadata").len();
        }
    }
    assert_eq!(written * 4096, total, "no memory of this workload is shared");
    assert!(pages("images/stats-dump").is_ok_and(|len| len > 20));
    wait_for("the pid to be free", || work.stat().is_none());
    fs::create_dir(work.path("work")).expect("directory");
    let out = work.crtool(&["restore", "-d", "-W", "work", "--display-stats"]);
    ok(&out);
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("Displaying restore stats:\n"));
    assert!(pages("work/stats-restore").is_ok_and(|len| len > 10));
}

fn log_per_pid(work: &Work) {
    ok(&work.dump(&["-R", "-v4", "-o", "log", "--log-pid", "-W", "."]));
    let log = fs::read_to_string(work.path("log")).expect("log");
    assert!(log.contains("Dumping finished successfully"), "{log}");
    let own = fs::read_to_string(work.path(&format!("log.{}", work.pid))).expect("log of the task");
    assert!(own.lines().all(|line| line.contains(&format!("pid={}", work.pid))), "{own}");
}

/// A restore beside the living original names who has the pid, and leaves it alone.
/// Killed when dropped.
struct Children(i32);

impl Drop for Children {
    fn drop(&mut self) {
        let _ = kill_children(self.0, Signal::SIGKILL);
    }
}

/// What crtool knows of each process does not take much memory. There are so many that it does not keep it as it is (`kept.rs`).
fn memory_for_many_processes(work: &Work) {
    const PROCESSES: u64 = 800;
    const MOST_FOR_EACH: u64 = 12 << 10;
    let script = work.script(
        "echo $CRTOOLS_SCRIPT_ACTION $(grep VmHWM: /proc/$PPID/status) >>peak.$CRTOOLS_SCRIPT_ACTION",
    );
    let script = ["-W", ".", "--action-script", &script];
    let round = || {
        ok(&work.dump(&[&["--timeout", "60"], &script[..]].concat()));
        wait_for("the pid to be free", || work.stat().is_none());
        ok(&work.crtool(&[&["restore", "-d"], &script[..]].concat()));
        work.moves();
    };
    round();
    let _children = Children(work.pid);
    fs::write(work.path("many"), "").expect("a word to the workload");
    wait_for("the children", || !work.path("many").exists());
    round();
    for action in ["post-dump", "post-resume"] {
        let text = fs::read_to_string(work.path(&format!("peak.{action}"))).expect("peaks");
        let peaks: Vec<u64> =
            text.lines().map(|line| line.split(' ').nth(2).expect(line).parse().expect(line)).collect();
        let [one, many] = peaks[..] else { panic!("{text}") };
        let each = (many.saturating_sub(one) << 10) / PROCESSES;
        println!("{action}: {one} KiB for one process, {each} bytes more for each of {PROCESSES}");
        assert!(each < MOST_FOR_EACH, "{action}: {each} bytes for each process; in all {one} and {many} KiB");
    }
}

fn pid_taken(work: &Work) {
    ok(&work.dump(&["-R"]));
    failed(&work.crtool(&["restore", "-d"]), &format!("pid {} is taken by bash", work.pid));
    work.moves();
}

/// Killed when dropped, whatever becomes of the test.
struct Orphan(Pid);

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
    }
}

/// No task has the pid, but somebody outside the tree is still in the session of that number: a dump does not end the tree then. If
/// it ends all the same, a restore waits for that somebody. First for the root, which crtool makes itself, then for a child.
fn pids_of_sessions_that_end(work: &Work) {
    fs::write(work.path("split"), "").expect("split");
    let made = |name| fs::read_to_string(work.path(name)).ok()?.strip_suffix('\n')?.parse().ok();
    let [orphan, other, _leader] = ["orphan", "other", "leader"].map(|name| {
        wait_for(name, || made(name).is_some());
        Orphan(Pid::from_raw(made(name).expect(name)))
    });
    failed(&work.dump(&[]), "is in it and outside of the tree");
    ok(&work.dump(&["--leave-stopped"]));
    for pid in work.tasks() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    wait_for("the pid to be free", || work.stat().is_none());
    let restore = work
        .command(&["restore", "-d", "-v4", "-W", ".", "-o", "log"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("crtool starts");
    wait_for("the restore to make lists", || {
        fs::read(work.path("log")).is_ok_and(|log| String::from_utf8_lossy(&log).contains("lists at"))
    });
    drop(orphan);
    wait_for("the root", || work.stat().is_some());
    drop(other);
    ok(&restore.wait_with_output().expect("wait"));
    work.moves();
}

/// Several restores make threads that help with much memory, and look for ids for them at the same moment.
fn restores_at_once(work: &Work) {
    let more: Vec<Work> = (0..3).map(|_| Work::start()).collect();
    let all: Vec<&Work> = more.iter().chain([work]).collect();
    for work in &all {
        fs::write(work.path("grow"), "").expect("grow");
    }
    for work in &all {
        wait_for("the workload to grow", || !work.path("grow").exists());
    }
    for round in 0..2 {
        all.iter().for_each(|work| work.saved());
        let start = |work: &&Work| {
            let mut command = work.command(&["restore", "-d", "-v4", "-W", ".", "-o", "log"]);
            let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            command.spawn().expect("crtool starts")
        };
        let restores: Vec<_> = all.iter().map(start).collect();
        for (work, restore) in all.iter().zip(restores) {
            let out = restore.wait_with_output().expect("wait");
            assert_eq!(out.status.code(), Some(0), "round {round}: {}", err(&out));
            work.moves();
        }
    }
}
