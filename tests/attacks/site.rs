//! The place of a trial: its directory, who plays a part in it, crtool.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Read as _,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

use crate::stepper::{Call, Stepper};

/// Somebody without privileges.
pub const NOBODY: u32 = 65534;
/// Nothing takes longer, on the busiest of machines: whoever waits so long is stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);

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

pub type Verdict = Result<(), Trouble>;

pub fn fail<T>(text: impl Into<String>) -> Result<T, Trouble> {
    Err(Trouble::Fail(text.into()))
}

/// A trial's place. Nobody but root may write it, others may go through it.
#[derive(Debug)]
pub struct Site {
    pub dir: PathBuf,
    tool: PathBuf,
    /// Who plays the parts: this program.
    pub program: PathBuf,
}

/// A run of crtool that has ended.
#[derive(Debug)]
pub struct Run {
    /// Its status, negative for a signal.
    pub status: i32,
    /// What it said on standard error.
    pub said: String,
}

/// Somebody who plays a part.
#[derive(Debug)]
pub struct Player {
    child: Option<Child>,
    pub pid: i32,
}

impl Site {
    pub fn new(dir: PathBuf) -> Self {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).expect("permissions");
        let tool =
            env::var_os("ATTACKS_TOOL").map_or_else(|| env!("CARGO_BIN_EXE_crtool").into(), PathBuf::from);
        let program = env::current_exe().expect("own path");
        let site = Self { dir, tool, program };
        fs::create_dir(site.path("images")).expect("directory for images");
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A directory that belongs to somebody without privileges.
    pub fn of_nobody(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).expect("directory of nobody");
        std::os::unix::fs::chown(&path, Some(NOBODY), Some(NOBODY)).expect("chown");
        path
    }

    /// Starts a part of [`crate::roles`], with a word for it.
    pub fn play(&self, role: &str, word: &str) -> Result<Player, Trouble> {
        let said = fs::File::create(self.path(&format!("{role}.out"))).map_err(|e| e.to_string())?;
        let child = Command::new(&self.program)
            .env_clear()
            .env("ATTACKS_ROLE", role)
            .env("ATTACKS_WORD", word)
            .env("ATTACKS_DIR", &self.dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(said.try_clone().map_err(|e| e.to_string())?)
            .stderr(said)
            .spawn()
            .map_err(|e| format!("start {role}: {e}"))?;
        let pid = child.id().cast_signed();
        let mut player = Player { child: Some(child), pid };
        let begin = Instant::now();
        while !self.said_by(role).contains("ready\n") {
            if player.ended().is_some() || begin.elapsed() > PATIENCE {
                return fail(format!("{role} is not ready: {}", self.said_by(role)));
            }
            thread::sleep(Duration::from_millis(1));
        }
        if role != "gadget" {
            // Only who does not wait yet makes others.
            until("all are at rest", all_rest)?;
        }
        Ok(player)
    }

    /// What a part has said.
    pub fn said_by(&self, role: &str) -> String {
        fs::read_to_string(self.path(&format!("{role}.out"))).unwrap_or_default()
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.tool);
        // Steps take their time.
        command
            .args(["--timeout", "600"])
            .args(words)
            .args(["--no-default-config", "-v4", "-D"])
            .arg(self.path("images"))
            .arg("-W")
            .arg(&self.dir)
            .arg("-o")
            .arg(self.path("log"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// Runs crtool to its end.
    pub fn run(&self, words: &[&str]) -> Run {
        let mut child = self.command(words).stderr(Stdio::piped()).spawn().expect("start crtool");
        let mut said = Vec::new();
        let _ = child.stderr.take().map(|mut err| err.read_to_end(&mut said));
        let end = child.wait().expect("wait for crtool");
        let status = end.code().unwrap_or_else(|| -end.signal().unwrap_or(0));
        Run { status, said: String::from_utf8_lossy(&said).into_owned() }
    }

    /// Runs crtool step by step; `at` is called at each stop with its pid, until it says that it has seen enough.
    pub fn step(&self, words: &[&str], mut at: impl FnMut(i32, Call) -> bool) -> Run {
        let err = self.path("crtool.err");
        let file = fs::File::create(&err).expect("file for crtool's words");
        let mut stepper = Stepper::start(self.command(words).stderr(file));
        let pid = stepper.pid().as_raw();
        let status = loop {
            match stepper.step() {
                Ok(call) if at(pid, call) => break stepper.finish(),
                Ok(_) => {}
                Err(status) => break status,
            }
        };
        Run { status, said: fs::read_to_string(err).unwrap_or_default() }
    }

    /// A dump that ends its tree.
    pub fn dumped(&self, player: &mut Player) -> Verdict {
        let pid = player.pid.to_string();
        self.run(&["dump", "-t", &pid]).succeeded("dump")?;
        player.until_ended()
    }

    /// The directory of images, empty.
    pub fn fresh_images(&self) {
        let _ = fs::remove_dir_all(self.path("images"));
        fs::create_dir(self.path("images")).expect("directory for images");
    }
}

impl Run {
    pub fn succeeded(&self, what: &str) -> Verdict {
        if self.status == 0 { Ok(()) } else { fail(format!("{what}: status {}: {}", self.status, self.said)) }
    }

    /// It succeeded, or it failed as a command fails.
    pub fn ended_well(&self) -> Verdict {
        let refused = self.status == 1 && !self.said.trim().is_empty();
        if (self.status == 0 || refused) && !self.said.contains("panicked") {
            return Ok(());
        }
        fail(format!("crtool ended with status {}: {}", self.status, self.said))
    }

    /// It refused, for this reason.
    pub fn refused(&self, why: &str) -> Verdict {
        self.ended_well()?;
        if self.status == 1 && self.said.contains(why) {
            return Ok(());
        }
        fail(format!("no refusal because of {why:?}, but status {}: {}", self.status, self.said))
    }
}

impl Player {
    /// Its status, if it has ended.
    pub fn ended(&mut self) -> Option<i32> {
        let end = self.child.as_mut()?.try_wait().ok()??;
        Some(end.code().unwrap_or_else(|| -end.signal().unwrap_or(0)))
    }

    pub fn until_ended(&mut self) -> Verdict {
        let begin = Instant::now();
        while self.ended().is_none() {
            if begin.elapsed() > PATIENCE {
                return fail(format!("task {} is still there", self.pid));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Numbers in a directory of /proc.
pub fn numbers(dir: &str) -> Vec<i32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut all: Vec<i32> = entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    all.sort_unstable();
    all
}

/// Every process of the trial but its init and us.
pub fn others() -> Vec<i32> {
    let us = std::process::id().cast_signed();
    numbers("/proc").into_iter().filter(|&pid| pid != 1 && pid != us).collect()
}

/// Every thread of [`others`].
fn tasks() -> Vec<(i32, i32)> {
    let threads = |pid: i32| numbers(&format!("/proc/{pid}/task")).into_iter().map(move |tid| (pid, tid));
    others().into_iter().flat_map(threads).collect()
}

/// Whether everybody waits in pause(2), or has ended. Whoever is made while this looks counts too, because its maker may
/// have come to rest between the two looks at the list.
pub fn all_rest() -> bool {
    let pause = format!("{} ", libc::SYS_pause);
    let rests = |&(pid, tid): &(i32, i32)| {
        matches!(state(pid), '-' | 'Z')
            || fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall"))
                .is_ok_and(|call| call.starts_with(&pause))
    };
    let there = tasks();
    there.iter().all(rests) && tasks() == there
}

/// Kills all of them but `but`, and waits until they are gone.
pub fn clear(but: &[i32]) {
    let begin = Instant::now();
    loop {
        let left: Vec<i32> = others().into_iter().filter(|pid| !but.contains(pid)).collect();
        if left.is_empty() || begin.elapsed() > PATIENCE {
            return;
        }
        for pid in left.into_iter().map(Pid::from_raw) {
            let _ = kill(pid, Signal::SIGKILL);
            // Some are children of ours that nobody else waits for, also such as send no signal at their end.
            let _ = waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// A field of /proc/PID/task/TID/status.
pub fn field(pid: i32, tid: i32, name: &str) -> String {
    let status = fs::read(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    let status = String::from_utf8_lossy(&status).into_owned();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// What makes up the rights of every thread of these processes.
pub fn rights(pids: &[i32]) -> BTreeMap<String, String> {
    let names = [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "SigCgt",
        "SigIgn",
    ];
    let mut all = BTreeMap::new();
    for &pid in pids {
        for tid in numbers(&format!("/proc/{pid}/task")) {
            for name in names {
                all.insert(format!("{tid} {name}"), field(pid, tid, name));
            }
        }
    }
    all
}

/// What differs, in words.
pub fn differences(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> String {
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let differ = keys.into_iter().filter(|&key| before.get(key) != now.get(key));
    differ.map(|key| format!("{key}\n  was {:?}\n  is  {:?}\n", before.get(key), now.get(key))).collect()
}

/// Waits until something is the case.
pub fn until(what: &str, mut is: impl FnMut() -> bool) -> Verdict {
    let begin = Instant::now();
    while !is() {
        if begin.elapsed() > PATIENCE {
            return fail(format!("it does not come to this: {what}"));
        }
        thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// The state of a process, as in /proc/PID/stat; `-` when it is gone.
pub fn state(pid: i32) -> char {
    field(pid, pid, "State").chars().next().unwrap_or('-')
}

/// Whether a process lives, and runs freely.
pub fn lives(pid: i32) -> bool {
    !['-', 'Z', 'X', 't'].contains(&state(pid)) && field(pid, pid, "TracerPid") == "0"
}

/// A word of the harness, for a part.
pub fn word() -> String {
    env::var("ATTACKS_WORD").unwrap_or_default()
}

/// The directory of the trial, for a part.
pub fn dir() -> PathBuf {
    env::var_os("ATTACKS_DIR").map(PathBuf::from).expect("ATTACKS_DIR")
}

/// A part is ready.
pub fn ready() {
    println!("ready");
}
