//! One trial: a process of its own, init of its own pid namespace, that starts the target, dumps
//! and restores it, and looks from outside whether anything changed.

mod disturbed;
mod remote;

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::case::{Case, Expect, Site};
use crate::chain;
use crate::gate;
use crate::mode::Mode;
use crate::picture::{Picture, Rest};
use crate::reaper::{Ended, Reaper};
use crate::sys;
use crate::tool::{Run, Tool};
use remote::Remote;

/// How a trial ended.
#[derive(Debug)]
pub enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

/// A whole trial that takes longer than this is stuck.
const TRIAL_LIMIT: Duration = Duration::from_secs(600);
/// A target has this long to set up, to answer, to check itself, and to come to rest; on a busy machine too.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// Runs the trial in a worker process and collects its verdict.
pub fn launch(case: &Case, mode: Mode) -> Outcome {
    let dir = match tempfile::Builder::new().prefix("live-").tempdir() {
        Ok(dir) => dir,
        Err(e) => return Outcome::Failed(format!("make a directory for the case: {e}")),
    };
    let mut permissions = std::fs::metadata(dir.path()).expect("case directory").permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    std::fs::set_permissions(dir.path(), permissions).expect("open the case directory");
    let verdict = dir.path().join("verdict");
    let out = std::fs::File::create(&verdict).expect("create verdict file");
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.env("LIVE_WORKER", format!("{}::{}", mode.name(), case.name)).env("LIVE_DIR", dir.path());
    command.stdin(Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
    let mut child = command.spawn().expect("start the worker");
    let until = Instant::now() + TRIAL_LIMIT;
    let status = loop {
        match child.try_wait().expect("wait for the worker") {
            Some(status) => break Some(status),
            None if Instant::now() > until => break None,
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = std::fs::read(&verdict).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    if std::env::var_os("LIVE_KEEP").is_some() {
        eprintln!("{}::{} kept in {}", mode.name(), case.name, dir.keep().display());
    }
    match status.map(|s| s.code()) {
        Some(Some(0)) => Outcome::Passed,
        Some(Some(77)) => Outcome::Skipped(text.trim().to_owned()),
        Some(code) => Outcome::Failed(format!("worker ended with {code:?}\n{text}")),
        None => Outcome::Failed(format!("stuck for {} s\n{text}", TRIAL_LIMIT.as_secs())),
    }
}

/// The worker: first in the harness's namespaces, then, started again, as init of its own.
pub fn main(name: &str) -> ExitCode {
    sys::die_with_parent();
    sys::close_from(3);
    if std::env::var_os("LIVE_INIT").is_none() {
        match sys::new_pid_and_mount_namespace() {
            Ok(()) => {
                let mut command = Command::new(std::env::current_exe().expect("own path"));
                let status = command.env("LIVE_INIT", "1").status().expect("start init");
                return ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1));
            }
            // Without a namespace of our own, orphans come to us as a subreaper.
            Err(_) => sys::become_subreaper(),
        }
    } else {
        sys::private_proc();
    }
    let (mode, case) = name.split_once("::").expect("mode::case");
    let mode = Mode::named(mode).expect("known mode");
    let case = crate::cases::all().find(|c| c.name == case).expect("known case");
    let dir = PathBuf::from(std::env::var_os("LIVE_DIR").expect("LIVE_DIR"));
    let remote = match mode.remote().then(|| Remote::new(mode, &dir)).transpose() {
        Ok(remote) => remote,
        Err(Stop::Fail(text) | Stop::Skip(text)) => {
            println!("{text}");
            return ExitCode::FAILURE;
        }
    };
    let work = dir.join("w");
    let mut trial = Trial { case, mode, work, dir, reaper: Reaper::start(), root: 0, terminal: None, remote };
    match trial.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Skip(reason)) => {
            println!("{reason}");
            ExitCode::from(gate::SKIPPED)
        }
        Err(Stop::Fail(text)) => {
            println!("{text}");
            let log = std::fs::read(gate::control_dir(&trial.dir).join("log")).unwrap_or_default();
            if !log.is_empty() {
                println!("--- the target says:\n{}", String::from_utf8_lossy(&log));
            }
            print!("{}", trial.remote.as_ref().map(Remote::logs).unwrap_or_default());
            for pid in crate::picture::tree_below(sys::getpid()) {
                sys::kill(pid, libc::SIGKILL);
            }
            ExitCode::FAILURE
        }
    }
}

/// Why a trial does not go on.
enum Stop {
    Skip(String),
    Fail(String),
}

impl From<String> for Stop {
    fn from(text: String) -> Stop {
        Stop::Fail(text)
    }
}

type Step<T = ()> = Result<T, Stop>;

fn ensure(holds: bool, text: impl FnOnce() -> String) -> Step {
    if holds { Ok(()) } else { Err(Stop::Fail(text())) }
}

struct Trial {
    case: &'static Case,
    mode: Mode,
    dir: PathBuf,
    work: PathBuf,
    reaper: Reaper,
    root: i32,
    terminal: Option<PathBuf>,
    /// The hosts that images go between, in modes that need two.
    remote: Option<Remote>,
}

impl Trial {
    fn run(&mut self) -> Step {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        self.start()?;
        match (self.case.expect, self.mode) {
            (Expect::Refused(text), _) => self.refused(text)?,
            (Expect::RestoreRefused(text), _) => self.restore_refused(text)?,
            (Expect::Restored, Mode::Running) => self.running()?,
            (Expect::Restored, Mode::Stopped) => self.left_stopped()?,
            (Expect::Restored, Mode::Killed) => self.disturbed(&[libc::SIGKILL])?,
            (Expect::Restored, Mode::Terminated) => {
                self.disturbed(&[libc::SIGTERM, libc::SIGINT])?;
            }
            (Expect::Restored, _) => self.rounds()?,
        }
        self.nothing_left()?;
        if let Some(remote) = &mut self.remote {
            remote.finish(&self.reaper)?;
            self.nothing_left()?;
        }
        let now = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        ensure(mounts == now, || format!("mounts left behind:\nbefore\n{mounts}\nafter\n{now}"))
    }

    fn start(&mut self) -> Step {
        let other_clocks = self.case.source_clocks.or(self.case.host_clocks);
        if other_clocks.is_some() && !Path::new("/proc/self/ns/time").exists() {
            return Err(Stop::Skip("the kernel has no time namespaces".into()));
        }
        let control = gate::control_dir(&self.dir);
        for dir in [&control, &self.work] {
            std::fs::create_dir(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
            // Targets may become another user.
            sys::chmod(dir, 0o777);
        }
        // Leave room below, so that tool processes never sit on the target's ids.
        let _ = std::fs::write("/proc/sys/kernel/ns_last_pid", "99");
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command.env_clear().env("LIVE_TARGET", self.case.name).env("LIVE_DIR", &self.dir);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir(&self.work).arg0("target");
        if let Some(clocks) = self.case.source_clocks {
            sys::in_time_namespace(&mut command, clocks)?;
        }
        if let Some(seed) = std::env::var_os("LIVE_SEED") {
            command.env("LIVE_SEED", seed);
        }
        if self.case.on_terminal {
            // We are its session leader, as a shell would be; the master stays open with us.
            sys::setsid();
            let (_, slave) = sys::open_terminal();
            let open = || std::fs::OpenOptions::new().read(true).write(true).open(&slave);
            let open = || open().map_err(|e| format!("open {}: {e}", slave.display()));
            command.stdin(open()?).stdout(open()?).stderr(open()?);
            self.terminal = Some(slave.clone());
        } else {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        }
        let child = command.spawn().map_err(|e| format!("start the target: {e}"))?;
        self.root = child.id().cast_signed();
        let ready = control.join("ready");
        let until = Instant::now() + STEP_LIMIT;
        while !ready.exists() {
            if let Some(ended) = self.reaper.wait(self.root, Duration::from_millis(1)) {
                if ended == Ended::Exited(i32::from(gate::SKIPPED)) {
                    let reason = std::fs::read_to_string(control.join("skip")).unwrap_or_default();
                    return Err(Stop::Skip(reason));
                }
                return Err(Stop::Fail(format!("target ended before it was ready: {ended:?}")));
            }
            ensure(Instant::now() < until, || "target does not get ready".into())?;
        }
        let _ = std::fs::write("/proc/sys/kernel/ns_last_pid", "20000");
        Ok(())
    }

    fn rounds(&mut self) -> Step {
        let before = self.settled_picture()?;
        for round in 0..self.mode.rounds(self.case) {
            let images = self.images(&format!("img{round}"))?;
            self.dump_and_kill(&images)?;
            if let Some(hook) = self.case.between {
                hook(&self.site());
            }
            if self.mode.chain() {
                self.make_chain(&images)?;
            }
            self.restore(&images)?;
            self.compare(&before, &format!("after restore {}", round + 1))?;
            if !self.case.changing {
                self.alive()?;
            }
            if let Some(remote) = &self.remote {
                remote.arrived(&images.to_string_lossy())?;
            }
            if self.mode == Mode::Fifty {
                let _ = std::fs::remove_dir_all(&images);
            }
        }
        self.finish("restored target")
    }

    fn make_chain(&self, images: &Path) -> Step {
        let seed = self.case.name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let divided = chain::split(images, 3, seed).map_err(|e| format!("make a chain: {e}"))?;
        ensure(divided.pages.iter().all(|pages| *pages > 0) && divided.stale > 0, || {
            format!("this is hardly a chain: {divided:?}")
        })
    }

    fn running(&mut self) -> Step {
        let before = self.settled_picture()?;
        let images = self.images("img")?;
        let run = self.dump(&images, &["-R"])?;
        ensure(run.succeeded(), || format!("dump -R failed: {}", run.tail()))?;
        self.compare(&before, "after dump -R")?;
        let saved = Saved::of(&self.work);
        let control = gate::control_dir(&self.dir);
        let marks = Saved::names(&control);
        let _ = std::fs::create_dir(control.join(gate::ORIGINAL));
        self.finish("original after dump -R")?;
        saved.put_back(&self.work);
        for path in entries(&control) {
            if !marks.contains(&escaped(&path)) {
                let _ = std::fs::remove_dir(&path);
            }
        }
        self.restore(&images)?;
        self.compare(&before, "after restore")?;
        self.finish("restored target")
    }

    fn refused(&mut self, text: &str) -> Step {
        let before = self.settled_picture()?;
        let images = self.images("img")?;
        let run = self.dump(&images, &[])?;
        ensure(matches!(run.ended, Some(Ended::Exited(1..))), || {
            format!("dump was to be refused: {}", run.tail())
        })?;
        self.compare(&before, "after the refused dump")?;
        ensure(run.says(text), || format!("refusal does not say {text:?}: {}", run.tail()))?;
        if let Some(remote) = &self.remote {
            remote.refused()?;
        }
        self.finish("target after a refused dump")
    }

    fn restore_refused(&mut self, text: &str) -> Step {
        let images = self.images("img")?;
        self.dump_and_kill(&images)?;
        if let Some(hook) = self.case.between {
            hook(&self.site());
        }
        let run = self.restorer()?.restore(&self.reaper, &images, self.case.flags);
        ensure(matches!(run.ended, Some(Ended::Exited(1..))), || {
            format!("restore was to be refused: {}", run.tail())
        })?;
        if !self.mode.restorer().is_peer() {
            ensure(run.says(text), || format!("refusal does not say {text:?}: {}", run.tail()))?;
        }
        if let Some(remote) = &self.remote {
            remote.drop_snapshot(&images.to_string_lossy())?;
        }
        self.nothing_left()
    }

    fn dumper(&mut self) -> Step<Tool> {
        let tool = self.mode.dumper().on(self.terminal.clone()).clocks(self.case.host_clocks);
        let tool = tool.denied(self.case.dump_denied);
        match &mut self.remote {
            Some(remote) => remote.dumper(tool, &self.reaper),
            None => Ok(tool),
        }
    }

    fn restorer(&mut self) -> Step<Tool> {
        let tool = self.mode.restorer().on(self.terminal.clone()).clocks(self.case.host_clocks);
        match &mut self.remote {
            Some(remote) => remote.restorer(tool),
            None => Ok(tool),
        }
    }

    fn site(&self) -> Site<'_> {
        Site { dir: &self.work, root: self.root }
    }

    fn images(&self, name: &str) -> Step<PathBuf> {
        let path = self.dir.join(name);
        if self.mode.remote() {
            // Just a name: nothing may come to be there.
            return Ok(path);
        }
        std::fs::create_dir(&path).map_err(|e| format!("make {}: {e}", path.display()))?;
        Ok(path)
    }

    fn picture(&self) -> Picture {
        if self.case.changing {
            return Picture::default();
        }
        let picture = Picture::take(self.root);
        if self.peer_takes_part() { picture.seen_by_criu() } else { picture }
    }

    /// The tree before anything is done to it, when it has come to rest: a task that has just been started or has just left a
    /// mark may not be where it waits.
    fn settled_picture(&self) -> Step<Picture> {
        if self.case.changing {
            return Ok(self.picture());
        }
        let until = Instant::now() + STEP_LIMIT;
        let mut rest = Rest::default();
        let mut last = self.picture();
        loop {
            let all_rest = rest.all(self.root);
            let now = self.picture();
            let text = last.differences(&now, self.case.may_differ);
            if all_rest && text.is_empty() {
                return Ok(now);
            }
            ensure(Instant::now() < until, || format!("the target does not come to rest:\n{text}"))?;
            last = now;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn peer_takes_part(&self) -> bool {
        self.mode.dumper().is_peer() || self.mode.restorer().is_peer()
    }

    fn compare(&self, before: &Picture, when: &str) -> Step {
        let mut may_differ = self.case.may_differ.to_vec();
        if self.peer_takes_part() {
            may_differ.extend_from_slice(self.case.peer_loses);
        }
        let mut differences = before.differences(&self.picture(), &may_differ);
        // A call that ended with EINTR is made again by the target, and shows its temporary mask only then; and
        // CRIU comes back before stopped tasks have stopped again.
        let until = Instant::now() + STEP_LIMIT;
        while !differences.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
            differences = before.differences(&self.picture(), &may_differ);
        }
        ensure(differences.is_empty(), || format!("{when} the tree is not as it was:\n{differences}"))
    }

    fn dump(&mut self, images: &Path, more: &[&str]) -> Step<Run> {
        let flags = [self.case.flags, more].concat();
        let tool = self.dumper()?;
        Ok(match self.case.while_dumping {
            None => tool.dump(&self.reaper, self.root, images, &flags),
            Some(hook) => std::thread::scope(|scope| {
                scope.spawn(|| hook(&self.site()));
                tool.dump(&self.reaper, self.root, images, &flags)
            }),
        })
    }

    fn dump_and_kill(&mut self, images: &Path) -> Step {
        let files = Saved::names(&self.work);
        let run = self.dump(images, &[])?;
        ensure(run.succeeded(), || format!("dump failed: {}", run.tail()))?;
        let ended = self.reaper.wait(self.root, STEP_LIMIT);
        ensure(ended == Some(Ended::Killed(libc::SIGKILL)), || {
            format!("root task after the dump: {ended:?}")
        })?;
        self.nothing_left()?;
        let left = Saved::names(&self.work);
        let known = files.iter().chain(left.iter().filter(|n| n.contains("link_remap")));
        let known: std::collections::BTreeSet<_> = known.cloned().collect();
        ensure(known == left.union(&files).cloned().collect(), || {
            format!("dump left files: before {files:?}, after {left:?}")
        })
    }

    fn restore(&mut self, images: &Path) -> Step {
        self.reaper.forget(self.root);
        let files = Saved::names(&self.work);
        let tool = self.restorer()?;
        let run = tool.restore(&self.reaper, images, self.case.flags);
        ensure(run.succeeded(), || format!("restore failed: {}", run.tail()))?;
        let pid = std::fs::read_to_string(tool.files(images).join("restore.pid")).unwrap_or_default();
        ensure(pid.trim() == self.root.to_string(), || {
            format!("pidfile says {pid:?}, the root task is {}", self.root)
        })?;
        let left: Vec<_> = Saved::names(&self.work).difference(&files).cloned().collect();
        ensure(left.is_empty() || self.case.changing, || format!("restore left files: {left:?}"))
    }

    /// The target runs: it takes away the mark that we set.
    fn alive(&self) -> Step {
        let ping = gate::control_dir(&self.dir).join("ping");
        sys::mkdir(&std::ffi::CString::new(ping.as_os_str().as_bytes()).expect("path"));
        let until = Instant::now() + STEP_LIMIT;
        while ping.exists() {
            if let Some(ended) = self.reaper.wait(self.root, Duration::from_millis(1)) {
                return Err(Stop::Fail(format!("restored target ended too early: {ended:?}")));
            }
            ensure(Instant::now() < until, || {
                format!("restored target does not run: {}", whereabouts(self.root))
            })?;
        }
        Ok(())
    }

    /// Lets the target go and takes its verdict.
    fn finish(&self, who: &str) -> Step {
        let go = gate::control_dir(&self.dir).join("go");
        sys::mkdir(&std::ffi::CString::new(go.as_os_str().as_bytes()).expect("path"));
        // A stopped root must have come back stopped; the target cannot wake itself.
        if sys::stat_field(self.root, 3) == "T" {
            sys::kill(self.root, libc::SIGCONT);
        }
        match self.reaper.wait(self.root, STEP_LIMIT) {
            Some(Ended::Exited(0)) => {}
            Some(ended) => return Err(Stop::Fail(format!("{who}: {ended:?}"))),
            None => {
                return Err(Stop::Fail(format!("{who} does not end: {}", whereabouts(self.root))));
            }
        }
        self.nothing_left()
    }

    /// No task of the tree, and none of the tool, is left.
    fn nothing_left(&self) -> Step {
        let until = Instant::now() + STEP_LIMIT;
        loop {
            let mut left = crate::picture::tree_below(sys::getpid());
            left.retain(|&pid| self.remote.as_ref().is_none_or(|remote| remote.daemons().all(|d| d != pid)));
            if left.is_empty() {
                return Ok(());
            }
            ensure(Instant::now() < until, || {
                let all: Vec<String> = left.iter().map(|&p| whereabouts(p)).collect();
                format!("processes left: {}", all.join("; "))
            })?;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A few words on where a task is, for messages.
fn whereabouts(pid: i32) -> String {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    format!("{pid} {} in {} at {}", sys::stat_field(pid, 3), read("syscall").trim(), read("wchan"))
}

/// The files below the working directory, to put them back for a second restore.
struct Saved {
    files: BTreeMap<PathBuf, (u32, Vec<u8>)>,
}

impl Saved {
    /// Larger files are not kept: no target changes them.
    const LARGEST: u64 = 16 << 20;

    fn names(dir: &Path) -> std::collections::BTreeSet<String> {
        let mut names = std::collections::BTreeSet::new();
        walk(dir, &mut |path, _| {
            names.insert(escaped(path));
        });
        names
    }

    fn of(dir: &Path) -> Saved {
        let mut files = BTreeMap::new();
        walk(dir, &mut |path, meta| {
            if meta.is_file() && meta.len() <= Saved::LARGEST {
                files.insert(path.to_owned(), (meta.mode(), std::fs::read(path).unwrap_or_default()));
            }
        });
        Saved { files }
    }

    fn put_back(&self, dir: &Path) {
        let mut extra = Vec::new();
        walk(dir, &mut |path, meta| {
            if meta.is_file() && !self.files.contains_key(path) && meta.len() <= Saved::LARGEST {
                extra.push(path.to_owned());
            }
        });
        for path in extra {
            let _ = std::fs::remove_file(path);
        }
        for (path, (mode, bytes)) in &self.files {
            if std::fs::read(path).ok().as_ref() != Some(bytes) {
                let _ = std::fs::write(path, bytes);
                sys::chmod(path, mode & 0o7777);
            }
        }
    }
}

fn escaped(path: &Path) -> String {
    path.as_os_str().as_bytes().escape_ascii().to_string()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default()
}

fn walk(dir: &Path, see: &mut dyn FnMut(&Path, &std::fs::Metadata)) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(meta) = entry.path().symlink_metadata() else {
            continue;
        };
        see(&entry.path(), &meta);
        if meta.is_dir() {
            walk(&entry.path(), see);
        }
    }
}
