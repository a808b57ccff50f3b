//! The tools, started and waited for.

use std::{
    collections::HashMap,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::sys::{self, Ended};

/// A program with CRIU's command line.
#[derive(Debug)]
pub struct Tool {
    pub name: &'static str,
    words: Vec<PathBuf>,
}

/// One run of a tool.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub wall: Duration,
    pub peak_kib: u64,
    pub cpu: Duration,
}

/// A tool at work.
#[derive(Debug)]
pub struct Started {
    pub pid: i32,
    begin: Instant,
    what: String,
    out: PathBuf,
}

/// A run that takes longer than this is stuck.
const LIMIT: Duration = Duration::from_secs(120);

impl Tool {
    pub fn new(name: &'static str, path: &Path) -> Self {
        // A CRIU unpacked beside the system starts through a shell script; that shell is none of its cost.
        let root = path.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        let (lib, program) = (root.join("usr/lib/x86_64-linux-gnu"), root.join("usr/sbin/criu"));
        let loader = lib.join("ld-linux-x86-64.so.2");
        // Not all of it: a child's peak begins with its parent's size.
        let mut head = [0; 2];
        let script =
            File::open(path).is_ok_and(|mut file| file.read_exact(&mut head).is_ok() && head == *b"#!");
        let words = if script && loader.exists() && program.exists() {
            vec![loader, "--library-path".into(), lib, program]
        } else {
            vec![path.to_owned()]
        };
        Self { name, words }
    }

    /// The same tool started through another program.
    #[allow(dead_code)] // one of the two benchmarks has it
    pub fn behind(&self, prefix: &[String]) -> Self {
        let words = prefix.iter().map(PathBuf::from).chain(self.words.iter().cloned()).collect();
        Self { name: self.name, words }
    }

    /// Runs it with `words`; anything but exit status 0 is an error unless `any_end`.
    pub fn run(&self, reaper: &Reaper, words: &[&str], out: &Path, any_end: bool) -> Result<Run, String> {
        self.start(words, out)?.end(reaper, any_end)
    }

    /// Starts it with `words`; what it prints goes to `out`.
    pub fn start(&self, words: &[&str], out: &Path) -> Result<Started, String> {
        let [program, first @ ..] = self.words.as_slice() else { return Err("no program".into()) };
        let file = File::create(out).map_err(|e| format!("{}: {e}", out.display()))?;
        let mut command = Command::new(program);
        command.args(first).args(words).stdin(Stdio::null());
        command.stdout(file.try_clone().map_err(|e| e.to_string())?).stderr(file);
        let begin = Instant::now();
        let child = command.spawn().map_err(|e| format!("start {}: {e}", self.name))?;
        let pid = child.id().cast_signed();
        Ok(Started { pid, begin, what: format!("{} {}", self.name, words[0]), out: out.to_owned() })
    }
}

impl Started {
    /// Waits for its end; anything but exit status 0 is an error unless `any_end`.
    pub fn end(self, reaper: &Reaper, any_end: bool) -> Result<Run, String> {
        let Some((ended, at)) = reaper.wait(self.pid, LIMIT) else {
            // Init of the namespace takes it along when the benchmark ends.
            return Err(format!("{} is stuck", self.what));
        };
        if ended.status != 0 && !any_end {
            let said = std::fs::read(&self.out).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            let last = said.lines().rfind(|l| l.contains("rror")).or(said.lines().last());
            let last = last.unwrap_or("").trim();
            return Err(format!("{} failed (status {:#x}): {last}", self.what, ended.status));
        }
        Ok(Run { wall: at - self.begin, peak_kib: ended.peak_kib, cpu: ended.cpu })
    }
}

type Dead = HashMap<i32, (Ended, Instant)>;

/// Collects every child as soon as it ends: tools, workloads, and orphans, for we are init.
#[derive(Debug, Clone)]
pub struct Reaper {
    dead: Arc<(Mutex<Dead>, Condvar)>,
}

impl Reaper {
    pub fn start() -> Self {
        let reaper = Self { dead: Arc::default() };
        let own = reaper.clone();
        thread::spawn(move || {
            loop {
                match sys::wait_any() {
                    Ok(ended) => {
                        let at = Instant::now();
                        let (dead, changed) = &*own.dead;
                        dead.lock().expect("reaper lock").insert(ended.pid, (ended, at));
                        changed.notify_all();
                    }
                    // No child at all.
                    Err(_) => thread::sleep(Duration::from_micros(100)),
                }
            }
        });
        reaper
    }

    /// Takes the end of `pid`, waiting for it at most `limit`.
    pub fn wait(&self, pid: i32, limit: Duration) -> Option<(Ended, Instant)> {
        let until = Instant::now() + limit;
        let (dead, changed) = &*self.dead;
        let mut dead = dead.lock().expect("reaper lock");
        loop {
            if let Some(ended) = dead.remove(&pid) {
                return Some(ended);
            }
            let left = until.checked_duration_since(Instant::now())?;
            dead = changed.wait_timeout(dead, left).expect("reaper lock").0;
        }
    }
}
