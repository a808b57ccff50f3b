//! The place of a trial: its target, its tool, and what the target looks like from outside.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::aim::Aim;
use crate::reaper::{End, Reaper};
use crate::target::{COUNTERS, Kind, LINE};

/// Nothing takes longer, on the busiest of machines: whoever waits so long is stuck.
pub const LIMIT: Duration = Duration::from_secs(120);
/// The tree is seen as it is when so many looks in a row agree.
const AGREEING: usize = 4;

#[derive(Debug)]
pub struct Site {
    pub dir: PathBuf,
    pub pid: i32,
    pub reaper: Reaper,
    random: u64,
    pub tool: PathBuf,
}

/// A run of the tool that has ended.
#[derive(Debug)]
pub struct Run {
    pub end: End,
    /// What it said on standard error.
    pub said: String,
    pub took: Duration,
}

impl Site {
    /// Starts the target and waits until all of it is at work.
    pub fn new(dir: PathBuf, kind: Kind) -> Result<Self, String> {
        let seed = env::var("FAULTS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5eed);
        let tool =
            env::var_os("FAULTS_TOOL").map_or_else(|| env!("CARGO_BIN_EXE_crtool").into(), PathBuf::from);
        let mut site = Self { dir, pid: 0, reaper: Reaper::start(), random: seed, tool };
        let child = Command::new(env::current_exe().map_err(|e| e.to_string())?)
            .env_clear()
            .env("FAULTS_TARGET", kind.name())
            .env("FAULTS_DIR", &site.dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("start the target: {e}"))?;
        site.pid = child.id().cast_signed();
        site.works()?;
        Ok(site)
    }

    /// How often to do what is done `times` by default.
    pub fn times(times: usize) -> usize {
        let factor = env::var("FAULTS_FACTOR").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
        times * factor
    }

    /// The next random number below `limit`.
    pub fn random(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit.max(1)
    }

    /// A random moment of a run. A machine may be ten times slower than a moment ago: see [`Aim`].
    pub fn moment(&mut self, aim: &Aim) -> Duration {
        aim.moment(|limit| self.random(limit))
    }

    /// A new empty directory.
    pub fn fresh(&self, name: &str) -> Result<PathBuf, String> {
        let path = self.dir.join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).map_err(|e| format!("make {}: {e}", path.display()))?;
        Ok(path)
    }

    /// Starts the tool.
    pub fn begin(&self, words: &[&str], images: &Path) -> Result<Tool<'_>, String> {
        self.begin_as(Command::new(&self.tool), words, images)
    }

    /// Runs the tool to its end under limits as prlimit(1) takes them.
    pub fn run_limited(&self, limits: &str, words: &[&str], images: &Path) -> Result<Run, String> {
        let mut command = Command::new("prlimit");
        command.arg(limits).arg(&self.tool);
        self.begin_as(command, words, images)?.end()
    }

    /// Runs the tool to its end in a control group.
    pub fn run_grouped(&self, group: &Path, words: &[&str], images: &Path) -> Result<Run, String> {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$0\"/cgroup.procs && exec \"$@\""]).arg(group).arg(&self.tool);
        self.begin_as(command, words, images)?.end()
    }

    /// Starts one of several tools that are at work at the same time.
    pub fn begin_beside(&self, number: usize, words: &[&str], images: &Path) -> Result<Tool<'_>, String> {
        self.begin_named(&format!("tool-{number}"), Command::new(&self.tool), words, images)
    }

    /// Starts the tool in the hands of a stepper, which kills it after the call `at` that it makes from the one on
    /// that makes the file `from`.
    pub fn begin_stepped(
        &self,
        from: &Path,
        at: usize,
        words: &[&str],
        images: &Path,
    ) -> Result<Tool<'_>, String> {
        let mut command = Command::new(env::current_exe().map_err(|e| e.to_string())?);
        command.env("FAULTS_STEPPER", at.to_string()).arg(from).arg(&self.tool);
        self.begin_as(command, words, images)
    }

    fn begin_as(&self, command: Command, words: &[&str], images: &Path) -> Result<Tool<'_>, String> {
        self.begin_named("tool", command, words, images)
    }

    fn begin_named(
        &self,
        name: &str,
        mut command: Command,
        words: &[&str],
        images: &Path,
    ) -> Result<Tool<'_>, String> {
        let out = self.dir.join(format!("{name}.out"));
        let file = fs::File::create(&out).map_err(|e| e.to_string())?;
        let log = self.dir.join(format!("{name}.log"));
        let child = command
            .args(words)
            .arg("-D")
            .arg(images)
            .args(["-W".as_ref(), self.dir.as_os_str(), "-v4".as_ref(), "-o".as_ref(), log.as_os_str()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .map_err(|e| format!("start {}: {e}", self.tool.display()))?;
        Ok(Tool { site: self, pid: child.id().cast_signed(), out, begin: Instant::now() })
    }

    /// Runs the tool to its end.
    pub fn run(&self, words: &[&str], images: &Path) -> Result<Run, String> {
        self.begin(words, images)?.end()
    }

    pub fn dump(&self, more: &[&str], images: &Path) -> Result<Run, String> {
        let pid = self.pid.to_string();
        self.run(&[&["dump", "-t", &pid], more].concat(), images)
    }

    pub fn begin_dump(&self, more: &[&str], images: &Path) -> Result<Tool<'_>, String> {
        let pid = self.pid.to_string();
        self.begin(&[&["dump", "-t", &pid], more].concat(), images)
    }

    /// The time that a dump without trouble takes, and a restore.
    pub fn durations(&self) -> Result<(Duration, Duration), String> {
        let mut dumps = Vec::new();
        for _ in 0..5 {
            let images = self.fresh("probe")?;
            let run = self.dump(&["-R"], &images)?;
            run.succeeded("dump -R")?;
            dumps.push(run.took);
        }
        dumps.sort();
        let images = self.fresh("probe")?;
        self.dump_and_kill(&images)?;
        let restore = self.restore(&images)?;
        Ok((dumps[2], restore))
    }

    /// A dump that ends the target.
    pub fn dump_and_kill(&self, images: &Path) -> Result<(), String> {
        self.dump(&[], images)?.succeeded("dump")?;
        match self.reaper.wait(self.pid, LIMIT) {
            Some(End::Killed(libc::SIGKILL)) => self.nothing_left(),
            end => Err(format!("after its dump the target is {end:?}")),
        }
    }

    /// A restore after which the target works.
    pub fn restore(&self, images: &Path) -> Result<Duration, String> {
        let run = self.run(&["restore", "-d"], images)?;
        run.succeeded("restore")?;
        self.works()?;
        Ok(run.took)
    }

    /// Every thread of the target goes on, none is stopped or traced, and nothing is wrong.
    pub fn works(&self) -> Result<(), String> {
        let begin = Instant::now();
        let before = self.counters();
        loop {
            if let Ok(text) = fs::read_to_string(self.dir.join("wrong")) {
                return Err(format!("the target found itself damaged: {text}"));
            }
            let now = self.counters();
            // Two rounds more: the first may have been under way.
            if now.len() == COUNTERS
                && (0..COUNTERS).all(|n| now[n] > before.get(n).copied().unwrap_or(0) + 1)
            {
                break;
            }
            // The end may also be of the task that had this pid before and was cleared away: told late.
            if let Some(end) = self.reaper.wait(self.pid, Duration::ZERO)
                && !std::path::Path::new(&format!("/proc/{}", self.pid)).exists()
            {
                return Err(format!("the target has ended: {end:?}"));
            }
            if begin.elapsed() > LIMIT {
                return Err(format!("the target stands still: {before:?}, then {now:?}\n{}", self.states()));
            }
            thread::sleep(Duration::from_micros(500));
        }
        for task in tasks(self.pid) {
            let (state, tracer) = (field(&task, "State:"), field(&task, "TracerPid:"));
            if state.starts_with(['T', 't']) || tracer != "0" {
                return Err(format!("{}: state {state}, tracer {tracer}", task.display()));
            }
        }
        Ok(())
    }

    /// Waits until the tool has stopped a thread of the root; false when it has not and is over.
    pub fn until_traced(&self, tool: &Tool<'_>) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            if tasks(self.pid).iter().any(|task| !["", "0"].contains(&field(task, "TracerPid:").as_str())) {
                return true;
            }
            if !Path::new(&format!("/proc/{}", tool.pid)).exists() {
                return false;
            }
        }
        false
    }

    /// A short look: does any of its threads count? One that has just been let go may not have come to it.
    pub fn counts(&self) -> bool {
        let before = self.counters();
        thread::sleep(Duration::from_millis(20));
        Path::new(&format!("/proc/{}", self.pid)).exists() && self.counters() != before
    }

    fn counters(&self) -> Vec<u64> {
        let text = fs::read(self.dir.join("progress")).unwrap_or_default();
        let lines = text.chunks(LINE).map(|line| String::from_utf8_lossy(line).trim().parse());
        lines.map_while(Result::ok).collect()
    }

    /// Every task of the namespace in a few words.
    fn states(&self) -> String {
        let all = processes().into_iter().flat_map(tasks);
        all.map(|task| {
            let read = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
            format!(
                "{}: {} in {} at {}\n",
                task.display(),
                field(&task, "State:"),
                read("syscall").trim(),
                read("wchan")
            )
        })
        .collect()
    }

    /// Asks the target to end and takes its verdict.
    pub fn finish(&self) -> Result<(), String> {
        self.works()?;
        kill(Pid::from_raw(self.pid), Signal::SIGTERM).map_err(|e| format!("end of the target: {e}"))?;
        match self.reaper.wait(self.pid, LIMIT) {
            Some(End::Exited(0)) => self.nothing_left(),
            end => Err(format!("the target ends with {end:?}")),
        }
    }

    /// Kills everything in the namespace but ourselves.
    pub fn clear(&self) -> Result<(), String> {
        let begin = Instant::now();
        while !processes().is_empty() {
            for pid in processes() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            if begin.elapsed() > LIMIT {
                return Err(format!("something cannot be killed:\n{}", self.states()));
            }
            thread::sleep(Duration::from_millis(1));
        }
        // Ends that nobody asked for.
        while self.reaper.wait(self.pid, Duration::ZERO).is_some() {}
        Ok(())
    }

    /// No process is left: no puppet, no tool, nothing of the tree.
    pub fn nothing_left(&self) -> Result<(), String> {
        let begin = Instant::now();
        while !processes().is_empty() {
            if begin.elapsed() > LIMIT {
                return Err(format!("something is left:\n{}", self.states()));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Everything of the tree that must not change.
    fn look(&self) -> BTreeMap<String, String> {
        let mut picture = BTreeMap::new();
        let mut pipes = BTreeMap::new();
        for pid in processes() {
            let proc = PathBuf::from(format!("/proc/{pid}"));
            for name in ["maps", "limits", "cgroup", "comm", "cmdline"] {
                let text = fs::read(proc.join(name)).unwrap_or_default();
                for line in String::from_utf8_lossy(&text).lines() {
                    let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
                    picture.insert(format!("{pid} {name} {first}"), rest.trim().to_owned());
                }
            }
            for entry in fs::read_dir(proc.join("fd")).into_iter().flatten().flatten() {
                let link = fs::read_link(entry.path()).unwrap_or_default().display().to_string();
                // A restored pipe has another number, the same at both ends.
                let next = pipes.len();
                let link = match link.strip_prefix("pipe:") {
                    Some(pipe) => format!("pipe {}", pipes.entry(pipe.to_owned()).or_insert(next)),
                    None => link,
                };
                let number = entry.file_name();
                let info = fs::read_to_string(proc.join("fdinfo").join(&number)).unwrap_or_default();
                let flags = info.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
                let key = format!("{pid} fd {}", number.display());
                picture.insert(key, format!("{link} {flags}"));
            }
            for task in tasks(pid) {
                let status = fs::read_to_string(task.join("status")).unwrap_or_default();
                for line in status.lines() {
                    let (name, value) = line.split_once(':').unwrap_or((line, ""));
                    if !RESTLESS.iter().any(|restless| name.starts_with(restless)) {
                        picture.insert(format!("{} {name}", task.display()), value.trim().to_owned());
                    }
                }
                picture.insert(format!("{} SigBlk", task.display()), format!("{:#x}", blocked(&task)));
            }
        }
        picture
    }

    /// The tree as it is once it has settled: each of its threads has gone round between one look and the next, and all
    /// looks show the same. One alone may show a thread that has just begun, or that is held up in a signal handler.
    pub fn picture(&self) -> Result<BTreeMap<String, String>, String> {
        let begin = Instant::now();
        let (mut picture, mut agreeing) = (self.look(), 1);
        while agreeing < AGREEING {
            self.works()?;
            let again = self.look();
            agreeing = if again == picture { agreeing + 1 } else { 1 };
            if begin.elapsed() > LIMIT {
                return Err(format!("the tree does not settle:\n{}", differences(&picture, &again)));
            }
            picture = again;
        }
        Ok(picture)
    }

    /// The tree is exactly as it was, as soon as each of its threads has had its turn.
    pub fn same(&self, before: &BTreeMap<String, String>) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            let text = differences(before, &self.look());
            if text.is_empty() {
                return Ok(());
            }
            if begin.elapsed() > LIMIT {
                return Err(format!("the tree has changed:\n{text}"));
            }
        }
    }
}

fn differences(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> String {
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let differ = keys.into_iter().filter(|&key| before.get(key) != now.get(key));
    differ.map(|key| format!("{key}\n  was {:?}\n  is  {:?}\n", before.get(key), now.get(key))).collect()
}

/// Lines of /proc/PID/status that change while a program just runs.
const RESTLESS: [&str; 15] = [
    "State",
    "SigBlk",
    "Vm",
    "Rss",
    "voluntary",
    "nonvoluntary",
    "SigQ",
    "SigPnd",
    "ShdPnd",
    "Cpus",
    "Mems",
    "THP",
    "x86_",
    "untag",
    "Seccomp_f",
];

/// A tool at work.
#[derive(Debug)]
pub struct Tool<'a> {
    site: &'a Site,
    pid: i32,
    out: PathBuf,
    begin: Instant,
}

impl Tool<'_> {
    /// Sends it a signal; it may have ended by now.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid), signal);
    }

    /// Waits for its end.
    pub fn end(self) -> Result<Run, String> {
        let Some(end) = self.site.reaper.wait(self.pid, LIMIT) else {
            return Err(format!("the tool is stuck:\n{}", self.site.states()));
        };
        let said = fs::read(&self.out).unwrap_or_default();
        let took = self.begin.elapsed();
        Ok(Run { end, said: String::from_utf8_lossy(&said).into_owned(), took })
    }
}

impl Run {
    pub fn succeeded(&self, what: &str) -> Result<(), String> {
        if self.end == End::Exited(0) {
            Ok(())
        } else {
            Err(format!("{what}: {:?}\n{}", self.end, self.said))
        }
    }

    /// It failed as a command fails: status 1, something said, no panic.
    pub fn failed_cleanly(&self) -> Result<(), String> {
        let panicked = self.said.contains("panicked") || self.said.contains("internal error");
        if self.end == End::Exited(1) && !self.said.trim().is_empty() && !panicked {
            Ok(())
        } else {
            Err(format!("not a clean failure: {:?}\n{}", self.end, self.said))
        }
    }
}

/// Every process of the namespace but its init, which is us.
pub fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<i32> = entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    pids.retain(|&pid| pid != 1);
    pids.sort_unstable();
    pids
}

fn tasks(pid: i32) -> Vec<PathBuf> {
    let mut tasks: Vec<PathBuf> =
        fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().map(|e| e.path()).collect();
    tasks.sort();
    tasks
}

/// The signals that a task blocks all the time: while a handler runs there is one more.
fn blocked(task: &Path) -> u64 {
    let mut mask = u64::MAX;
    for _ in 0..4 {
        mask &= u64::from_str_radix(&field(task, "SigBlk:"), 16).unwrap_or(0);
        thread::sleep(Duration::from_micros(700));
    }
    mask
}

fn field(task: &Path, name: &str) -> String {
    let status = fs::read_to_string(task.join("status")).unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
    line.trim_start_matches(name).trim().to_owned()
}
