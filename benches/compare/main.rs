//! crtool and CRIU side by side: the same workloads, in turn, in one run.
//!
//! `cargo bench --bench compare -- [--rows NAME,...] [--runs N] [--dir DIR] [--ours PATH] [--peer PATH] [--list]`
//!
//! For each row and run, and for one tool after the other (who is first changes with each run), a fresh workload is
//! started, dumped, restored and asked whether it is intact. What is printed are medians: wall time of the dump
//! and of the restore, time frozen as each tool's own `stats-dump` says it, peak memory of the tool as the
//! kernel counted it, and the size of the images. The last part of the table compares starts of the program.
//! Everything happens on tmpfs and in a pid namespace of its own.

// A benchmark exports nothing; `pub` here means "for the other modules".
#![allow(unreachable_pub)]

mod measure;
// Shared with the benchmark `remote`.
#[allow(dead_code)]
mod sys;
mod table;
#[allow(dead_code)]
mod tool;
mod workload;

use std::{
    env,
    path::PathBuf,
    process::{Command, ExitCode},
};

use measure::Bench;
use tool::Tool;

/// What was asked for.
struct Options {
    rows: Option<Vec<String>>,
    runs: usize,
    dir: PathBuf,
    ours: PathBuf,
    peer: PathBuf,
    list: bool,
}

/// Marks the process that is init of the benchmark's own pid namespace, and tells its parent's pid, which is unique.
const INSIDE: &str = "BENCH_INSIDE";

fn main() -> ExitCode {
    if let Some(kind) = env::var_os(workload::KIND) {
        return workload::main(&kind.to_string_lossy());
    }
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::FAILURE;
        }
    };
    if options.list {
        for row in measure::ROWS {
            println!("{:<14} {}", row.name, row.what);
        }
        return ExitCode::SUCCESS;
    }
    if env::var_os(INSIDE).is_none() {
        return inside();
    }
    let ours = Tool::new("crtool", &options.ours);
    let peer = options.peer.exists().then(|| Tool::new("CRIU", &options.peer));
    if peer.is_none() {
        eprintln!("no CRIU at {}: only crtool is measured", options.peer.display());
    }
    let number = env::var(INSIDE).unwrap_or_default();
    let bench = Bench::new(options.dir.join(format!("crtool-bench-{number}")), options.runs, ours, peer);
    let chosen = |name: &str| options.rows.as_ref().is_none_or(|rows| rows.iter().any(|r| r == name));
    let rows: Vec<_> =
        measure::ROWS.iter().filter(|row| chosen(row.name)).map(|row| bench.row(row)).collect();
    let starts = if chosen("start") { bench.starts() } else { Vec::new() };
    table::print(&rows, &starts, options.runs);
    if rows.iter().any(measure::Row::failed) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        rows: None,
        runs: 5,
        dir: "/dev/shm".into(),
        ours: env!("CARGO_BIN_EXE_crtool").into(),
        peer: "/opt/criu-peer/bin/criu".into(),
        list: false,
    };
    let mut words = env::args().skip(1);
    while let Some(word) = words.next() {
        let (name, attached) = match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word, None),
        };
        let mut value = || attached.clone().or_else(|| words.next()).ok_or(format!("{name} wants a value"));
        match name.as_str() {
            // What cargo itself adds.
            "--bench" => {}
            "--list" => options.list = true,
            "--rows" => options.rows = Some(value()?.split(',').map(str::to_owned).collect()),
            "--runs" => options.runs = value()?.parse().map_err(|e| format!("--runs: {e}"))?,
            "--dir" => options.dir = value()?.into(),
            "--ours" => options.ours = value()?.into(),
            "--peer" => options.peer = value()?.into(),
            _ => return Err(format!("unknown word {name}; see the top of benches/compare/main.rs")),
        }
    }
    let known = |name: &String| name == "start" || measure::ROWS.iter().any(|row| row.name == *name);
    if let Some(name) = options.rows.iter().flatten().find(|name| !known(name)) {
        return Err(format!("no row {name}; --list names them"));
    }
    if options.runs == 0 { Err("--runs 0 measures nothing".into()) } else { Ok(options) }
}

/// Starts this program again in namespaces of its own: pids are free, and nothing survives.
fn inside() -> ExitCode {
    let status = Command::new("unshare")
        .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(env::current_exe().expect("own path"))
        .args(env::args_os().skip(1))
        .env(INSIDE, std::process::id().to_string())
        .status()
        .expect("start unshare (util-linux)");
    ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
}
