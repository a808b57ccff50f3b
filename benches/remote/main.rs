//! Live migration over loopback, in turn with what it is measured against, in one run.
//!
//! `cargo bench --bench remote -- [--sizes 256m,1g,4g] [--ways NAME,...] [--runs N] [--dir DIR] [--ours PATH]
//! [--peer PATH] [--rate RATE] [--list]`
//!
//! The target holds so much random memory, looks at the clock every half millisecond and remembers the longest gap,
//! which is the time from freeze to running as the target itself lived it; when told to end it checks every byte.
//! For each size and run, one way after the other (who is first changes with each run) moves a fresh target. The
//! floor only reads the memory of the target, which keeps running, sends it and writes it into a memfd. What is
//! printed are medians. Everything happens on tmpfs and in a pid namespace of its own, targets and dumps in one below
//! that: destinations have pids of their own. With `--rate` loopback is a link of that rate (iproute2). docs/benchmarks.md says what each figure means.

// A benchmark exports nothing; `pub` here means "for the other modules".
#![allow(unreachable_pub)]

// Shared with the live cases.
#[path = "../../tests/live/certificates.rs"]
#[allow(dead_code)]
mod certificates;
mod daemon;
mod floor;
mod measure;
mod source;
// Shared with the benchmark `compare`.
#[path = "../compare/sys.rs"]
#[allow(dead_code)]
mod sys;
mod table;
mod target;
#[path = "../compare/tool.rs"]
#[allow(dead_code)]
mod tool;
mod ways;

use std::{
    env,
    path::{self, PathBuf},
    process::{Command, ExitCode},
};

use measure::Bench;
use tool::Tool;
use ways::Way;

/// What was asked for.
struct Options {
    sizes: Vec<u64>,
    ways: Vec<Way>,
    runs: usize,
    dir: PathBuf,
    ours: PathBuf,
    peer: PathBuf,
    list: bool,
    /// Of loopback, as tc(8) writes it.
    rate: Option<String>,
}

/// Marks the process that is init of the benchmark's own pid namespace, and tells its parent's pid, which is unique.
const INSIDE: &str = "BENCH_INSIDE";

fn main() -> ExitCode {
    if let Some(size) = env::var_os(target::SIZE) {
        return target::main(&size.to_string_lossy());
    }
    if let Some(role) = env::var_os(floor::ROLE) {
        return floor::main(&role.to_string_lossy());
    }
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::FAILURE;
        }
    };
    if options.list {
        for way in ways::WAYS {
            println!("{:<14} {}", way.name(), way.what());
        }
        return ExitCode::SUCCESS;
    }
    if env::var_os(INSIDE).is_none() {
        return inside(options.rate.as_deref());
    }
    let ours = (options.ours.clone(), Tool::new("crtool", &options.ours));
    let peer = options.peer.exists().then(|| Tool::new("CRIU", &options.peer));
    if peer.is_none() {
        eprintln!("no CRIU at {}: it is left out", options.peer.display());
    }
    let number = env::var(INSIDE).unwrap_or_default();
    let ways = options.ways.into_iter().filter(|way| peer.is_some() || !way.needs_peer()).collect();
    let dir = options.dir.join(format!("crtool-remote-bench-{number}"));
    let bench = Bench::new(dir, options.runs, ways, ours, peer);
    let rows: Vec<_> = options.sizes.iter().map(|&size| bench.row(size)).collect();
    table::print(&rows, options.runs);
    if rows.iter().any(measure::Row::failed) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        sizes: vec![256 << 20, 1 << 30, 4 << 30],
        ways: ways::WAYS.to_vec(),
        runs: 5,
        dir: "/dev/shm".into(),
        ours: env!("CARGO_BIN_EXE_crtool").into(),
        peer: "/opt/criu-peer/bin/criu".into(),
        list: false,
        rate: None,
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
            "--sizes" => options.sizes = value()?.split(',').map(size).collect::<Result<_, _>>()?,
            "--ways" => {
                let way = |name: &str| Way::named(name).ok_or(format!("no way {name}; --list names them"));
                options.ways = value()?.split(',').map(way).collect::<Result<_, _>>()?;
            }
            "--rate" => options.rate = Some(value()?),
            "--runs" => options.runs = value()?.parse().map_err(|e| format!("--runs: {e}"))?,
            "--dir" => options.dir = value()?.into(),
            "--ours" => options.ours = path::absolute(value()?).map_err(|e| format!("--ours: {e}"))?,
            "--peer" => options.peer = value()?.into(),
            _ => return Err(format!("unknown word {name}; see the top of benches/remote/main.rs")),
        }
    }
    if options.runs == 0 { Err("--runs 0 measures nothing".into()) } else { Ok(options) }
}

/// Bytes, from `256m` or `1g`.
fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("--sizes: {text} is no size such as 256m or 1g");
    let (number, shift) = match text.strip_suffix(['m', 'M']) {
        Some(number) => (number, 20),
        None => (text.strip_suffix(['g', 'G']).ok_or_else(bad)?, 30),
    };
    number.parse::<u64>().ok().filter(|n| (1..=1 << 20).contains(n)).map(|n| n << shift).ok_or_else(bad)
}

/// Starts this program again in namespaces of its own: pids are free, and nothing survives.
fn inside(rate: Option<&str>) -> ExitCode {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL"]);
    match rate {
        None => command.arg("--"),
        Some(rate) => {
            let script = format!(
                "ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 1mb latency 50ms && exec \"$@\""
            );
            command.args(["--net", "--", "sh", "-c", &script, "sh"])
        }
    };
    let status = command
        .arg(env::current_exe().expect("own path"))
        .args(env::args_os().skip(1))
        .env(INSIDE, std::process::id().to_string())
        .status()
        .expect("start unshare (util-linux)");
    ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
}
