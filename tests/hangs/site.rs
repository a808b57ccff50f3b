//! The place of a trial: its directory, its target, its tool.

use std::{
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

use crate::{
    fuse,
    guard::HELD,
    reaper::{End, Reaper},
};

/// Nothing takes longer, on the busiest of machines: whoever waits so long is stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// A command ends so long after its time is over.
pub const GRACE: Duration = Duration::from_secs(1);

/// Why a trial does not go on.
#[derive(Debug)]
pub enum Trouble {
    Skip(String),
    Fail(String),
}

impl From<String> for Trouble {
    fn from(text: String) -> Self {
        Self::Fail(text)
    }
}

pub fn fail<T>(text: impl Into<String>) -> Result<T, Trouble> {
    Err(Trouble::Fail(text.into()))
}

#[derive(Debug)]
pub struct Site {
    pub dir: PathBuf,
    /// The root of the target.
    pub pid: i32,
    pub reaper: Reaper,
    /// The file system, if there is one.
    pub fuse: i32,
    pub images: PathBuf,
}

/// A tool at work.
#[derive(Debug)]
pub struct Tool {
    pub pid: i32,
    out: PathBuf,
    begin: Instant,
}

/// One that has ended.
#[derive(Debug)]
pub struct Done {
    pub end: End,
    /// What it said on standard error.
    pub said: String,
    pub took: Duration,
}

impl Site {
    pub fn new(dir: PathBuf) -> Result<Self, Trouble> {
        for name in ["fuse", "images"] {
            fs::create_dir(dir.join(name)).map_err(|e| format!("make {name}: {e}"))?;
        }
        let images = dir.join("images");
        Ok(Self { dir, pid: 0, reaper: Reaper::start(), fuse: 0, images })
    }

    /// How often to do what is done `times` by default.
    pub fn times(times: usize) -> usize {
        let factor = env::var("HANGS_FACTOR").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
        times * factor
    }

    fn own(&self) -> Command {
        let mut command = Command::new(env::current_exe().expect("own path"));
        command.env_clear().env("HANGS_DIR", &self.dir).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// With `HANGS_HOLD`, the trial goes no further.
    pub fn hold(&self) {
        if env::var_os("HANGS_HOLD").is_some() {
            let _ = fs::write(self.dir.join(HELD), "");
            loop {
                thread::park();
            }
        }
    }

    /// Mounts the file system.
    pub fn mount(&mut self) -> Result<(), Trouble> {
        if !fuse::available() {
            return Err(Trouble::Skip("no /dev/fuse".into()));
        }
        let mount = self.dir.join("fuse");
        let child = self.own().env("HANGS_FUSE", &mount).spawn().map_err(|e| format!("start: {e}"))?;
        self.fuse = child.id().cast_signed();
        self.until("the file system is there", || mount.join("f").exists())
    }

    /// The file system does not answer from now on; or does again.
    pub fn silence(&self, silent: bool) -> Result<(), Trouble> {
        signal(self.fuse, if silent { Signal::SIGSTOP } else { Signal::SIGCONT });
        if silent {
            self.until("the file system is stopped", || state(self.fuse) == 'T')?;
        }
        Ok(())
    }

    /// Starts the target, and waits until it counts.
    pub fn start(&mut self, kind: &str) -> Result<(), Trouble> {
        let child = self.own().env("HANGS_TARGET", kind).spawn().map_err(|e| format!("start: {e}"))?;
        self.pid = child.id().cast_signed();
        self.works()
    }

    pub fn until(&self, what: &str, holds: impl Fn() -> bool) -> Result<(), Trouble> {
        let begin = Instant::now();
        while !holds() {
            if begin.elapsed() > PATIENCE {
                return fail(format!("not true after a long time: {what}"));
            }
            thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    fn counter(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join("progress")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// The target goes on, undamaged.
    pub fn works(&self) -> Result<(), Trouble> {
        let begin = Instant::now();
        let before = self.counter();
        loop {
            if let Ok(text) = fs::read_to_string(self.dir.join("wrong")) {
                return fail(format!("the target found itself damaged: {text}"));
            }
            let now = self.counter();
            if now > before + 1 || (now > 2 && now < before) {
                return Ok(());
            }
            if begin.elapsed() > PATIENCE {
                let state = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
                return fail(format!("the target stands still at {now}:\n{state}"));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Starts the tool.
    pub fn begin(&self, words: &[&str]) -> Result<Tool, Trouble> {
        let out = self.dir.join("tool.out");
        let file = fs::File::create(&out).map_err(|e| e.to_string())?;
        let child = Command::new(env!("CARGO_BIN_EXE_crtool"))
            .args(words)
            .arg("-D")
            .arg(&self.images)
            .args(["-W".as_ref(), self.dir.as_os_str(), "-v4".as_ref(), "-o".as_ref(), "log".as_ref()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .map_err(|e| format!("start the tool: {e}"))?;
        Ok(Tool { pid: child.id().cast_signed(), out, begin: Instant::now() })
    }

    pub fn begin_dump(&self, more: &[&str]) -> Result<Tool, Trouble> {
        let pid = self.pid.to_string();
        self.begin(&[&["dump", "-t", &pid], more].concat())
    }

    pub fn end(&self, tool: Tool) -> Result<Done, Trouble> {
        let Some(end) = self.reaper.wait(tool.pid, PATIENCE) else {
            let read =
                |name: &str| fs::read_to_string(format!("/proc/{}/{name}", tool.pid)).unwrap_or_default();
            return fail(format!("the tool is stuck: {} at {}", read("status"), read("wchan")));
        };
        let took = tool.begin.elapsed();
        let said = String::from_utf8_lossy(&fs::read(&tool.out).unwrap_or_default()).into_owned();
        Ok(Done { end, said, took })
    }

    /// Sends it a signal that asks it to end; it says which.
    pub fn asked_to_end(&self, tool: Tool, asked: Signal) -> Result<(), Trouble> {
        signal(tool.pid, asked);
        let begin = Instant::now();
        let mut done = self.end(tool)?;
        done.took = begin.elapsed();
        done.failed_in_time(Duration::ZERO, &[asked.as_str()])
    }

    pub fn run(&self, words: &[&str]) -> Result<Done, Trouble> {
        self.end(self.begin(words)?)
    }

    pub fn dump(&self, more: &[&str]) -> Result<Done, Trouble> {
        self.end(self.begin_dump(more)?)
    }

    pub fn begin_check(&self, more: &[&str]) -> Result<Tool, Trouble> {
        let pid = self.pid.to_string();
        self.begin(&[&["check", "-t", &pid], more].concat())
    }

    pub fn check(&self, more: &[&str]) -> Result<Done, Trouble> {
        self.end(self.begin_check(more)?)
    }

    /// A dump that ends the target.
    pub fn dump_and_kill(&self) -> Result<(), Trouble> {
        self.dump(&[])?.succeeded("dump")?;
        match self.reaper.wait(self.pid, PATIENCE) {
            Some(End::Killed(libc::SIGKILL)) => Ok(()),
            end => fail(format!("after its dump the target is {end:?}")),
        }
    }

    /// Waits until the tool traces the root; fails when it ends before.
    pub fn until_traced(&self, tool: &Tool) -> Result<(), Trouble> {
        self.until("the root is traced", || {
            let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
            text.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
                || !Path::new(&format!("/proc/{}", tool.pid)).exists()
        })
    }

    /// Nothing but what was there before the restore is there.
    pub fn nothing_left(&self, expected: &[i32]) -> Result<(), Trouble> {
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        self.until("nothing is left", || processes() == expected).map_err(|_| {
            let all = processes();
            let text = all.iter().map(|pid| {
                let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
                format!("{} at {}\n", read("stat"), read("wchan"))
            });
            Trouble::Fail(format!("expected {expected:?}:\n{}", text.collect::<String>()))
        })
    }
}

impl Done {
    pub fn succeeded(&self, what: &str) -> Result<(), Trouble> {
        if self.end == End::Exited(0) {
            Ok(())
        } else {
            fail(format!("{what}: {:?}\n{}", self.end, self.said))
        }
    }

    /// It failed as a command fails (status 1, one line that has all of `texts`), at most a moment after `limit`.
    pub fn failed_in_time(&self, limit: Duration, texts: &[&str]) -> Result<(), Trouble> {
        let said = self.said.trim();
        if self.end != End::Exited(1) || said.lines().count() != 1 {
            return fail(format!("not a clean failure: {:?}\n{said}", self.end));
        }
        if let Some(text) = texts.iter().find(|text| !said.contains(**text)) {
            return fail(format!("{text:?} is not said: {said}"));
        }
        self.in_time(limit)
    }

    pub fn in_time(&self, limit: Duration) -> Result<(), Trouble> {
        if self.took <= limit + GRACE + slack() {
            Ok(())
        } else {
            fail(format!("it took {:?} of {limit:?}: {:?}\n{}", self.took, self.end, self.said))
        }
    }
}

/// On a machine with more to do than processors, everything is late, and a virtual one may not run at all for a while. With
/// `HANGS_STRICT` in the environment only what the load explains counts.
pub fn slack() -> Duration {
    if std::env::var_os("HANGS_STRICT").is_none() {
        return Duration::from_secs(2);
    }
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    let processors = thread::available_parallelism().map_or(1, usize::from);
    Duration::from_millis(100).mul_f64((load / processors as f64).max(1.0))
}

/// Whether there is such a task, a zombie too.
pub fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Whether a task waits for a file system that does not answer.
pub fn hangs(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|place| place == "request_wait_answer")
}

/// State letter of a task.
pub fn state(pid: i32) -> char {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or(' ')
}

pub fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Every process of the namespace but its init, which is us.
pub fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<i32> = entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    pids.retain(|&pid| pid != 1);
    pids.sort_unstable();
    pids
}
