//! One size: target, move, check, again and again.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::source::Source;
use crate::target::{PATIENCE, Target};
use crate::tool::{Reaper, Tool};
use crate::ways::{self, Place, Sample, Way};

/// What all runs of one way gave, or why one failed.
pub type Samples = Result<Vec<Sample>, String>;

/// A finished size.
#[derive(Debug)]
pub struct Row {
    pub bytes: u64,
    pub ways: Vec<(Way, Samples)>,
}

impl Row {
    pub fn failed(&self) -> bool {
        self.ways.iter().any(|(way, samples)| !way.needs_peer() && samples.is_err())
    }
}

/// The place and the tools.
#[derive(Debug)]
pub struct Bench {
    dir: PathBuf,
    runs: usize,
    ways: Vec<Way>,
    ours: (PathBuf, Tool),
    peer: Option<Tool>,
    reaper: Reaper,
}

impl Bench {
    pub fn new(dir: PathBuf, runs: usize, ways: Vec<Way>, ours: (PathBuf, Tool), peer: Option<Tool>) -> Self {
        Self { dir, runs, ways, ours, peer, reaper: Reaper::start() }
    }

    /// Measures all ways at one size.
    pub fn row(&self, bytes: u64) -> Row {
        let mut taken: Vec<(Way, Samples)> = self.ways.iter().map(|&way| (way, Ok(Vec::new()))).collect();
        for run in 0..self.runs {
            for turn in 0..taken.len() {
                let at = (run + turn) % taken.len();
                let (way, samples) = &mut taken[at];
                let Ok(so_far) = samples else { continue };
                match self.sample(*way, bytes) {
                    Ok(sample) => so_far.push(sample),
                    Err(text) => {
                        eprintln!("{} MiB, {}: {text}", bytes >> 20, way.name());
                        *samples = Err(text);
                    }
                }
            }
            eprintln!("{} MiB: run {} of {}", bytes >> 20, run + 1, self.runs);
        }
        Row { bytes, ways: taken }
    }

    fn sample(&self, way: Way, bytes: u64) -> Result<Sample, String> {
        let _ = fs::remove_dir_all(&self.dir);
        fs::create_dir(&self.dir).map_err(|e| format!("make {}: {e}", self.dir.display()))?;
        let result = self.sample_in(&self.dir, way, bytes);
        let _ = fs::remove_dir_all(&self.dir);
        result
    }

    fn sample_in(&self, dir: &Path, way: Way, bytes: u64) -> Result<Sample, String> {
        let source = Source::start(dir, &self.reaper)?;
        let target = Target::start(&source, dir, bytes, &self.reaper)?;
        let count = if way == Way::MigrateFour { 3 } else { 0 };
        let dirs: Vec<PathBuf> = (0..count).map(|number| dir.join(format!("beside{number}"))).collect();
        let mut beside = Vec::new();
        for dir in &dirs {
            fs::create_dir(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
            beside.push(Target::start(&source, dir, bytes, &self.reaper)?);
        }
        let (ours_path, ours) = &self.ours;
        let peer = self.peer.as_ref();
        let place =
            Place { dir, source: &source, ours, ours_path, peer, reaper: &self.reaper, beside: &beside };
        match place.go(way, &target) {
            Ok(mut sample) => {
                let moved = !matches!(way, Way::Floor(_));
                let mut gap = target.end(moved, dir, &self.reaper)?;
                for (other, dir) in beside.iter().zip(&dirs) {
                    gap = gap.max(other.end(moved, dir, &self.reaper)?);
                }
                if moved {
                    sample.gap = Some(gap.as_secs_f64());
                }
                Ok(sample)
            }
            Err(text) => {
                // At the source it ends with its namespace.
                let _ = kill(Pid::from_raw(target.pid), Signal::SIGKILL);
                drop(source);
                self.reaper.wait(target.carrier, PATIENCE);
                Err(text + &ways::errors(dir))
            }
        }
    }
}
