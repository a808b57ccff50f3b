//! The tools under test: crtool, and the peer CRIU.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::case::Clocks;
use crate::reaper::{Ended, Reaper};

/// A program with CRIU's command line.
#[derive(Debug, Clone)]
pub struct Tool {
    path: PathBuf,
    peer: bool,
    /// What it gets as its standard input: a terminal, or nothing.
    terminal: Option<PathBuf>,
    /// The clocks of its host.
    clocks: Option<Clocks>,
    /// A call that it may not make.
    denied: Option<i64>,
    /// It gets this signal so long after its start.
    disturbance: Option<(i32, Duration)>,
    /// The work dir of its host, and options for the way from or to the other one.
    remote: Option<(PathBuf, Vec<String>)>,
}

/// How one run of a tool ended.
#[derive(Debug)]
pub struct Run {
    pub ended: Option<Ended>,
    /// What it said on stdout and stderr, and its log file.
    pub text: String,
}

/// A dump or restore that takes longer than this has failed.
const LIMIT: Duration = Duration::from_secs(120);

/// The tool the suite judges.
pub fn main_tool() -> Tool {
    match std::env::var_os("LIVE_TOOL") {
        Some(path) => {
            let path = PathBuf::from(path);
            let peer = path.file_name().is_some_and(|n| n == "criu");
            Tool { path, peer, terminal: None, clocks: None, denied: None, disturbance: None, remote: None }
        }
        None => Tool {
            path: PathBuf::from(env!("CARGO_BIN_EXE_crtool")),
            peer: false,
            terminal: None,
            clocks: None,
            denied: None,
            disturbance: None,
            remote: None,
        },
    }
}

/// The real CRIU, if this machine has one.
pub fn peer() -> Option<Tool> {
    let listed = std::env::var_os("LIVE_PEER").map(PathBuf::from);
    let known = ["/opt/criu-peer/bin/criu", "/usr/sbin/criu", "/usr/local/sbin/criu", "/usr/bin/criu"];
    let mut paths = listed.into_iter().chain(known.iter().map(PathBuf::from));
    paths.find(|p| p.exists()).map(|path| Tool {
        path,
        peer: true,
        terminal: None,
        clocks: None,
        denied: None,
        disturbance: None,
        remote: None,
    })
}

impl Tool {
    /// Runs it on a terminal, as from a shell.
    pub fn on(mut self, terminal: Option<PathBuf>) -> Tool {
        self.terminal = terminal;
        self
    }

    /// Runs it where the clocks stand so.
    pub fn clocks(mut self, clocks: Option<Clocks>) -> Tool {
        self.clocks = clocks;
        self
    }

    /// Runs it without permission for this call.
    pub fn denied(mut self, number: Option<i64>) -> Tool {
        self.denied = number;
        self
    }

    /// Sends it `signal` when it has run for `after`.
    pub fn disturbed(mut self, signal: i32, after: Duration) -> Tool {
        self.disturbance = Some((signal, after));
        self
    }

    /// Its files are in this work dir, and it gets these words.
    pub fn remote(mut self, work: PathBuf, words: Vec<String>) -> Tool {
        self.remote = Some((work, words));
        self
    }

    pub fn is_peer(&self) -> bool {
        self.peer
    }

    pub fn dump(&self, reaper: &Reaper, pid: i32, images: &Path, flags: &[&str]) -> Run {
        let pid = pid.to_string();
        let mut args = vec!["dump", "-t", &pid, "-v4", "-o", "dump.log"];
        args.extend_from_slice(flags);
        self.run(reaper, images, "dump.log", &args)
    }

    pub fn restore(&self, reaper: &Reaper, images: &Path, flags: &[&str]) -> Run {
        let mut args = vec!["restore", "-d", "-v4", "-o", "restore.log", "--pidfile", "restore.pid"];
        args.extend_from_slice(flags);
        self.run(reaper, images, "restore.log", &args)
    }

    /// Where its log and pid file are: beside the images, or in the work dir of its host.
    pub fn files<'a>(&'a self, images: &'a Path) -> &'a Path {
        self.remote.as_ref().map_or(images, |(work, _)| work)
    }

    fn run(&self, reaper: &Reaper, images: &Path, log: &str, args: &[&str]) -> Run {
        let out_path = images.with_extension(format!("{}.out", args[0]));
        let mut command = Command::new(&self.path);
        command.args(args).arg("-D");
        match &self.remote {
            // The name of the snapshot is any text: the path of a directory that is not there.
            Some((work, words)) => command.arg(images).arg("-W").arg(work).args(words),
            None => command.arg(images),
        };
        let mut run = self.start(reaper, command, &out_path);
        run.text.push_str(&read_lossy(&self.files(images).join(log)));
        run
    }

    /// Runs just the words that [`Tool::remote`] was given.
    pub fn command(&self, reaper: &Reaper, out: &Path) -> Run {
        let mut command = Command::new(&self.path);
        if let Some((work, words)) = &self.remote {
            command.args(words).arg("-W").arg(work);
        }
        self.start(reaper, command, &out.with_extension("out"))
    }

    fn start(&self, reaper: &Reaper, mut command: Command, out_path: &Path) -> Run {
        let terminal =
            self.terminal.as_ref().map(|path| std::fs::OpenOptions::new().read(true).write(true).open(path));
        let input = terminal.transpose().expect("open the terminal");
        command.stdin(input.map_or_else(Stdio::null, Stdio::from));
        let out = std::fs::File::create(out_path).expect("create tool output file");
        command.stdout(out.try_clone().expect("dup tool output"));
        command.stderr(out);
        if let Some(clocks) = self.clocks {
            crate::sys::in_time_namespace(&mut command, clocks).expect("clocks of the tool's host");
        }
        if let Some(number) = self.denied {
            crate::sys::without_call(&mut command, number);
        }
        #[allow(clippy::zombie_processes)] // the reaper waits for it
        let child = command.spawn().unwrap_or_else(|e| panic!("start {}: {e}", self.path.display()));
        let pid = child.id().cast_signed();
        if let Some((signal, after)) = self.disturbance {
            std::thread::sleep(after);
            crate::sys::kill(pid, signal);
        }
        let ended = reaper.wait(pid, LIMIT);
        if ended.is_none() {
            crate::sys::kill(pid, libc::SIGKILL);
            reaper.wait(pid, LIMIT);
        }
        Run { ended, text: read_lossy(out_path) }
    }
}

impl Run {
    pub fn succeeded(&self) -> bool {
        self.ended == Some(Ended::Exited(0))
    }

    /// Whether it named each thing (parted by `|`), in whatever case.
    pub fn says(&self, texts: &str) -> bool {
        let said = self.text.to_lowercase();
        texts.split('|').all(|text| said.contains(&text.to_lowercase()))
    }

    /// The end of what it said, for a failure message; errors first.
    pub fn tail(&self) -> String {
        let lines: Vec<&str> = self.text.lines().collect();
        let errors = lines.iter().filter(|l| l.contains("Error") || l.contains("rror:"));
        let mut tail: Vec<&str> = errors.take(12).copied().collect();
        tail.push("...");
        tail.extend(lines.iter().skip(lines.len().saturating_sub(12)));
        format!("ended {:?}\n{}", self.ended, tail.join("\n"))
    }
}

fn read_lossy(path: &Path) -> String {
    std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
}
