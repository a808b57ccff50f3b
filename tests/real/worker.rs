//! One trial, seen from the init of its pid namespace.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::program::{Expect, PROGRAMS, Program};
use crate::reaper::{End, Reaper};

/// Exit status of a worker that cannot do its trial.
pub const SKIPPED: i32 = 77;

/// One run of a program, or of a tool, takes no longer.
const LIMIT: Duration = Duration::from_secs(300);
/// Time that a program works between `mid` and the dump, and between restore and the next dump.
const AWHILE: Duration = Duration::from_millis(150);
/// Dumps and restores in one run.
const ROUNDS: usize = 2;

pub fn main(name: &str) -> ExitCode {
    close_inherited();
    let program = PROGRAMS.iter().find(|p| p.name == name).expect("a program of the table");
    let dir = PathBuf::from(env::var_os("REAL_DIR").expect("REAL_DIR"));
    let tool = env::var_os("REAL_TOOL").map_or_else(|| env!("CARGO_BIN_EXE_crtool").into(), PathBuf::from);
    if tool.file_name().is_some_and(|n| n == "criu") && program.expect != Expect::Survives {
        println!("the wording of a refusal is crtool's own");
        return ExitCode::from(77);
    }
    let site = Site { program, dir, tool, reaper: Reaper::start() };
    match site.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            println!("{text}");
            ExitCode::FAILURE
        }
    }
}

struct Site {
    program: &'static Program,
    dir: PathBuf,
    tool: PathBuf,
    reaper: Reaper,
}

impl Site {
    fn run(&self) -> Result<(), String> {
        // Both in a place of the same name, for programs that look where they are.
        let right = self.undisturbed()?;
        fs::remove_dir_all(self.work()).map_err(|e| e.to_string())?;
        let pid = self.start()?;
        for round in 1..=ROUNDS {
            thread::sleep(AWHILE);
            let images = self.dir.join(format!("images{round}"));
            fs::create_dir(&images).map_err(|e| e.to_string())?;
            if !self.through(round, pid, &images)? {
                break;
            }
        }
        self.end(pid, &right)
    }

    /// A run without us, and its result.
    fn undisturbed(&self) -> Result<Vec<u8>, String> {
        let pid = self.start()?;
        self.may_end()?;
        let end = self.reaper.wait(pid, LIMIT);
        if end != Some(End::Exited(0)) {
            return Err(format!("undisturbed it ends with {end:?}: {}", self.said()));
        }
        fs::read(self.work().join("result")).map_err(|e| format!("undisturbed it has no result: {e}"))
    }

    /// One dump and restore; false if it was refused, as expected.
    fn through(&self, round: usize, pid: i32, images: &Path) -> Result<bool, String> {
        let dump = self.tool("dump", &["-t", &pid.to_string()], images)?;
        match (self.program.expect, dump) {
            (Expect::Survives, (End::Exited(0), _)) => {}
            (Expect::Refused(text), (End::Exited(1), said)) if said.contains(text) => return Ok(false),
            (_, (end, said)) => return Err(format!("dump {round}: {end:?}\n{said}")),
        }
        match self.reaper.wait(pid, LIMIT) {
            Some(End::Killed(_)) => {}
            end => return Err(format!("after dump {round} the root is {end:?}")),
        }
        self.nothing_left()?;
        match self.tool("restore", &["-d"], images)? {
            (End::Exited(0), _) => Ok(true),
            (end, said) => Err(format!("restore {round}: {end:?}\n{said}")),
        }
    }

    /// Tells the program that it may come to its end.
    fn may_end(&self) -> Result<(), String> {
        fs::write(self.work().join("end"), "").map_err(|e| format!("let it end: {e}"))
    }

    fn end(&self, pid: i32, right: &[u8]) -> Result<(), String> {
        self.may_end()?;
        let end = self.reaper.wait(pid, LIMIT);
        if end != Some(End::Exited(0)) {
            return Err(format!("it ends with {end:?}: {}", self.said()));
        }
        let result = fs::read(self.work().join("result")).map_err(|e| format!("no result: {e}"))?;
        if result != right {
            let (result, right) = (String::from_utf8_lossy(&result), String::from_utf8_lossy(right));
            return Err(format!("another result:\n{result}\ninstead of\n{right}\n{}", self.said()));
        }
        self.nothing_left()
    }

    fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// Starts the program and waits until it is in the middle of its work.
    fn start(&self) -> Result<i32, String> {
        let work = self.work();
        fs::create_dir(&work).map_err(|e| e.to_string())?;
        for (name, text) in self.program.files {
            fs::write(work.join(name), text).map_err(|e| e.to_string())?;
        }
        let setup = self.command("sh", &["-c", self.program.setup])?.spawn().map_err(|e| e.to_string())?;
        let end = self.reaper.wait(setup.id().cast_signed(), LIMIT);
        if end != Some(End::Exited(0)) {
            return Err(format!("its setup ends with {end:?}: {}", self.said()));
        }
        let line = format!("exec {}", self.program.line);
        let child = self.command("setsid", &["sh", "-c", &line])?.spawn().map_err(|e| e.to_string())?;
        let pid = child.id().cast_signed();
        let begin = Instant::now();
        while !work.join("mid").exists() {
            if begin.elapsed() > LIMIT {
                return Err(format!("it does not come to the middle: {}", self.said()));
            }
            if fs::metadata(format!("/proc/{pid}")).is_err() {
                return Err(format!("it ended before the middle: {}", self.said()));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(pid)
    }

    /// A command in the program's place, on files.
    fn command(&self, program: &str, words: &[&str]) -> Result<Command, String> {
        let out = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("out"))
            .map_err(|e| e.to_string())?;
        let mut command = Command::new(program);
        command.args(words).current_dir(self.work()).stdin(Stdio::null());
        for name in ["REAL_DIR", "REAL_WORKER", "REAL_TOOL"] {
            command.env_remove(name);
        }
        command.stdout(out.try_clone().map_err(|e| e.to_string())?).stderr(out);
        Ok(command)
    }

    fn said(&self) -> String {
        fs::read(self.dir.join("out")).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Runs the tool; its end, and what it said.
    fn tool(&self, command: &str, words: &[&str], images: &Path) -> Result<(End, String), String> {
        let out_path = self.dir.join("tool.out");
        let out = fs::File::create(&out_path).map_err(|e| e.to_string())?;
        let log = format!("{command}.log");
        let child = Command::new(&self.tool)
            .arg(command)
            .args(words)
            .args(self.program.flags)
            .args(["-v4", "-o", &log, "-D"])
            .arg(images)
            .stdin(Stdio::null())
            .stdout(out.try_clone().map_err(|e| e.to_string())?)
            .stderr(out)
            .spawn()
            .map_err(|e| format!("start {}: {e}", self.tool.display()))?;
        let end = self.reaper.wait(child.id().cast_signed(), LIMIT);
        let end = end.ok_or_else(|| format!("{command} is stuck"))?;
        let mut said = fs::read_to_string(&out_path).unwrap_or_default();
        let log = fs::read(images.join(log)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        said.extend(log.lines().filter(|l| l.contains("Error")).map(|l| format!("{l}\n")));
        Ok((end, said))
    }

    /// All of the tree, and all of the tool, is gone.
    fn nothing_left(&self) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            let pids: Vec<i32> = fs::read_dir("/proc")
                .map_err(|e| e.to_string())?
                .flatten()
                .filter_map(|e| e.file_name().to_str()?.parse().ok())
                .filter(|&pid| pid != 1)
                .collect();
            if pids.is_empty() {
                return Ok(());
            }
            if begin.elapsed() > LIMIT {
                let names: Vec<String> = pids
                    .iter()
                    .map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default())
                    .collect();
                return Err(format!("processes left: {names:?}"));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What the caller's shell left open is not for the program.
fn close_inherited() {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    for fd in open.into_iter().filter(|&fd| fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}
