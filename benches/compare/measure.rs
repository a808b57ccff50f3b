//! One row: workload, dump, restore, check, again and again.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crtool::image::{ImageKind, framing::EntryReader, pb};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tool::{Reaper, Run, Tool};
use crate::workload;

/// A workload and its name.
#[derive(Debug)]
pub struct Kind {
    pub name: &'static str,
    pub what: &'static str,
    workload: &'static str,
}

const fn row(name: &'static str, what: &'static str, workload: &'static str) -> Kind {
    Kind { name, what, workload }
}

/// All of them, from small to large.
pub const ROWS: &[Kind] = &[
    row("16m", "16 MiB random", "random:16777216"),
    row("256m", "256 MiB random", "random:268435456"),
    row("1g", "1 GiB random", "random:1073741824"),
    row("4g", "4 GiB random", "random:4294967296"),
    row("1g-half", "1 GiB, half of it zero", "half:1073741824"),
    row("processes", "100 idle processes", "processes:100"),
    row("threads", "500 threads", "threads:500"),
    row("mappings", "20,000 mappings", "mappings:20000"),
    row("files", "1,000 open files", "files:1000"),
    row("files-10k", "10,000 open files", "files:10000"),
    row("1g-of-16", "1 GiB in 16 processes", "spread:1073741824"),
    row("processes-4k", "4,000 idle processes", "processes:4000"),
    row("clocks", "16 MiB random, in a time namespace", "clocks:16777216"),
];

/// What one run of one tool gave. Times in ms, sizes in MiB.
#[derive(Debug, Clone, Copy)]
struct Sample {
    dump: f64,
    frozen: f64,
    restore: f64,
    dump_peak: f64,
    restore_peak: f64,
    images: f64,
}

/// Medians of one tool, or why there are none.
pub type Medians = Result<[f64; FIGURES.len()], String>;

/// A figure of the table.
#[derive(Debug)]
pub struct Figure {
    pub name: &'static str,
    get: fn(&Sample) -> f64,
}

pub const FIGURES: [Figure; 6] = [
    Figure { name: "dump, ms", get: |s| s.dump },
    Figure { name: "frozen, ms", get: |s| s.frozen },
    Figure { name: "restore, ms", get: |s| s.restore },
    Figure { name: "peak of dump, MiB", get: |s| s.dump_peak },
    Figure { name: "peak of restore, MiB", get: |s| s.restore_peak },
    Figure { name: "images, MiB", get: |s| s.images },
];

/// A finished row.
#[derive(Debug)]
pub struct Row {
    pub name: &'static str,
    pub what: &'static str,
    pub ours: Medians,
    pub peer: Option<Medians>,
}

impl Row {
    pub fn failed(&self) -> bool {
        self.ours.is_err()
    }
}

/// A start of the program: medians in ms.
#[derive(Debug)]
pub struct Start {
    pub what: &'static str,
    pub ours: f64,
    pub peer: Option<f64>,
}

/// The place and the tools.
#[derive(Debug)]
pub struct Bench {
    dir: PathBuf,
    runs: usize,
    ours: Tool,
    peer: Option<Tool>,
    reaper: Reaper,
}

/// A workload has this long to set up and to check itself.
const PATIENCE: Duration = Duration::from_secs(120);

impl Bench {
    pub fn new(dir: PathBuf, runs: usize, ours: Tool, peer: Option<Tool>) -> Self {
        Self { dir, runs, ours, peer, reaper: Reaper::start() }
    }

    /// Measures one row with both tools.
    pub fn row(&self, kind: &Kind) -> Row {
        let tools: Vec<&Tool> = [Some(&self.ours), self.peer.as_ref()].into_iter().flatten().collect();
        let mut samples: Vec<Result<Vec<Sample>, String>> = tools.iter().map(|_| Ok(Vec::new())).collect();
        for run in 0..self.runs {
            for turn in 0..tools.len() {
                let which = (run + turn) % tools.len();
                if let Ok(taken) = &mut samples[which] {
                    match self.sample(tools[which], kind) {
                        Ok(sample) => taken.push(sample),
                        Err(text) => {
                            eprintln!("{}: {text}", kind.what);
                            samples[which] = Err(text);
                        }
                    }
                }
            }
            if samples.iter().all(Result::is_err) {
                break;
            }
            eprintln!("{}: run {} of {}", kind.what, run + 1, self.runs);
        }
        let mut medians = samples.into_iter().map(|taken| {
            taken.map(|samples| {
                FIGURES.each_ref().map(|figure| median(samples.iter().map(figure.get).collect()))
            })
        });
        let ours = medians.next().expect("one for each tool");
        Row { name: kind.name, what: kind.what, ours, peer: medians.next() }
    }

    fn sample(&self, tool: &Tool, kind: &Kind) -> Result<Sample, String> {
        let _ = fs::remove_dir_all(&self.dir);
        fs::create_dir(&self.dir).map_err(|e| format!("make {}: {e}", self.dir.display()))?;
        let result = self.sample_in(&self.dir, tool, kind);
        let _ = fs::remove_dir_all(&self.dir);
        result
    }

    fn sample_in(&self, dir: &Path, tool: &Tool, kind: &Kind) -> Result<Sample, String> {
        let (images, work) = (dir.join("images"), dir.join("work"));
        for dir in [&images, &work] {
            fs::create_dir(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        }
        let pid = self.start(dir, kind)?;
        let number = pid.to_string();
        let (images_dir, work_dir) = (images.to_string_lossy(), work.to_string_lossy());
        let out = work.join("out");
        let common = ["-D", &images_dir, "-W", &work_dir, "-o", "log"];
        let result = tool
            .run(&self.reaper, &[&["dump", "-t", &number], &common[..]].concat(), &out, false)
            .and_then(|dump| self.gone(pid).map(|()| dump))
            .and_then(|dump| {
                tool.run(&self.reaper, &[&["restore", "-d"], &common[..]].concat(), &out, false)
                    .map(|restore| (dump, restore))
            });
        let (dump, restore): (Run, Run) = match result {
            Ok(runs) => runs,
            Err(text) => {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                self.reaper.wait(pid, PATIENCE);
                return Err(text + &errors(&work.join("log")));
            }
        };
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        match self.reaper.wait(pid, PATIENCE) {
            Some((ended, _)) if ended.status == 0 => {}
            ended => return Err(format!("restored by {}, the workload is not intact: {ended:?}", tool.name)),
        }
        Ok(Sample {
            dump: millis(dump.wall),
            frozen: frozen(&work)?,
            restore: millis(restore.wall),
            dump_peak: kib(dump.peak_kib),
            restore_peak: kib(restore.peak_kib),
            images: kib(sizes(&images) >> 10),
        })
    }

    fn start(&self, dir: &Path, kind: &Kind) -> Result<i32, String> {
        let child = Command::new(env::current_exe().expect("own path"))
            .env_clear()
            .env(workload::KIND, kind.workload)
            .env(workload::DIR, dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("start the workload: {e}"))?;
        let pid = child.id().cast_signed();
        let begin = Instant::now();
        while !dir.join("ready").exists() {
            if begin.elapsed() > PATIENCE || self.reaper.wait(pid, Duration::from_millis(2)).is_some() {
                return Err("the workload does not get ready".into());
            }
        }
        // Its last write, and its fall into sleep.
        thread::sleep(Duration::from_millis(50));
        Ok(pid)
    }

    /// Waits until a tree is gone. Its root is the first that is killed, not always the last to end.
    fn gone(&self, pid: i32) -> Result<(), String> {
        let survived = || Err("the workload survived its dump".into());
        if self.reaper.wait(pid, PATIENCE).is_none() {
            return survived();
        }
        let begin = Instant::now();
        // In a pid namespace of our own, there is nobody else.
        while others().map_err(|e| format!("list of processes: {e}"))? {
            if begin.elapsed() > PATIENCE {
                return survived();
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts of the program that do next to nothing.
    pub fn starts(&self) -> Vec<Start> {
        let out = self.dir.with_extension("out");
        let runs = self.runs.max(20);
        let starts = [("`--version`", "--version"), ("`check`", "check")].map(|(what, word)| {
            let mut ours = Vec::new();
            let mut peer = Vec::new();
            for _ in 0..runs {
                // What `check` finds is not the question here.
                if let Ok(run) = self.ours.run(&self.reaper, &[word], &out, true) {
                    ours.push(millis(run.wall));
                }
                if let Some(Ok(run)) = self.peer.as_ref().map(|p| p.run(&self.reaper, &[word], &out, true)) {
                    peer.push(millis(run.wall));
                }
            }
            Start { what, ours: median(ours), peer: (!peer.is_empty()).then(|| median(peer)) }
        });
        let _ = fs::remove_file(&out);
        starts.into()
    }
}

/// Whether there is a process besides this one.
fn others() -> std::io::Result<bool> {
    let own = std::process::id().to_string();
    let pids = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    for entry in fs::read_dir("/proc")? {
        if entry?.file_name().to_str().is_some_and(|name| pids(name) && name != own) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The last errors of a log.
fn errors(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|l| l.contains("Error")).collect();
    lines.iter().skip(lines.len().saturating_sub(3)).map(|l| format!("\n    {l}")).collect()
}

fn frozen(work: &Path) -> Result<f64, String> {
    let path = work.join("stats-dump");
    let file = File::open(&path).map_err(|e| format!("open {}: {e}", path.display()))?;
    let len = file.metadata().map_err(|e| e.to_string())?.len();
    let mut reader = EntryReader::new(file, len, &path);
    reader.expect_magic(ImageKind::StatsDump).map_err(|e| e.to_string())?;
    let entry: Option<pb::StatsEntry> = reader.next_entry().map_err(|e| e.to_string())?;
    let dump = entry.and_then(|e| e.dump).ok_or("statistics without numbers of a dump")?;
    Ok(f64::from(dump.frozen_time) / 1e3)
}

fn sizes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).map(|d| d.flatten().collect()).unwrap_or_else(|_| Vec::new());
    entries.iter().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn kib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}
