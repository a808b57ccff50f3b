//! A directory with the process, its daemons, and the commands that are typed there.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::program::{self, Memory};

/// Longer than any step takes on a machine under load.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Gone, or a zombie that nobody has reaped yet.
pub fn has_ended(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A run of a command that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub said: String,
    pub took: Duration,
}

impl Ended {
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.said);
        self
    }

    /// The one line that says why it failed.
    #[track_caller]
    pub fn failed(&self) -> String {
        assert_eq!(self.code, Some(1), "{}", self.said);
        let errors: Vec<&str> = self.said.lines().filter(|line| line.contains("Error (")).collect();
        assert_eq!(errors.len(), 1, "{}", self.said);
        errors[0].to_owned()
    }
}

/// A daemon in the foreground, child of the harness.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Port of a cache.
    pub fn port(&self) -> u16 {
        let log = self.log();
        let rest = log.split("listening on 127.0.0.1:").nth(1).unwrap_or_else(|| panic!("{log}"));
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    }

    /// Waits for its end by itself.
    pub fn ended(&mut self) -> Option<i32> {
        wait_for("a daemon does not end", || self.child.try_wait().unwrap()).code()
    }

    /// Ends it as an operator does.
    pub fn stop(&mut self) -> Option<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        self.ended()
    }

    /// Waits until its log has a line with this.
    pub fn says(&self, what: &str) -> String {
        let line = || Some(self.log().lines().find(|line| line.contains(what))?.to_owned());
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = line() {
                return line;
            }
            assert!(Instant::now() < until, "{what:?} is not in {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lines of its log that speak of errors.
    pub fn errors(&self) -> Vec<String> {
        self.log().lines().filter(|line| line.contains("Error (")).map(str::to_owned).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Site {
    dir: tempfile::TempDir,
    /// Waits for its first end, at once: a dump waits until nobody has the pid any more.
    reaper: Option<JoinHandle<()>>,
    /// Pid of the tree, wherever it runs.
    pub pid: i32,
}

impl Site {
    /// With a tree that counts.
    pub fn new(memory: Memory) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = program::command(dir.path(), memory).spawn().unwrap();
        let pid = child.id().cast_signed();
        let reaper = thread::spawn(move || drop(child.wait()));
        let site = Self { dir, reaper: Some(reaper), pid };
        site.counts();
        site
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn count(&self) -> Option<u64> {
        fs::read_to_string(self.path().join("count")).ok()?.parse().ok()
    }

    /// The tree runs: its count goes up.
    #[track_caller]
    pub fn counts(&self) {
        let before = self.count().unwrap_or(0);
        wait_for("the tree does not count", || self.count().filter(|&now| now > before + 2));
    }

    /// A work dir.
    pub fn work(&self, name: &str) -> PathBuf {
        let dir = self.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// crtool with the work dir `work`.
    pub fn crtool<W: AsRef<str>>(&self, work: &str, words: &[W]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crtool"));
        command.args(words.iter().map(AsRef::as_ref));
        command.args(["--no-default-config", "-W"]).arg(self.work(work)).stdin(Stdio::null());
        command
    }

    /// The same, with a descriptor that it knows as `number`.
    pub fn crtool_given<W: AsRef<str>>(&self, work: &str, words: &[W], fd: OwnedFd, number: i32) -> Command {
        let inner = self.crtool(work, words);
        let mut command = Command::new("sh");
        let script = if number == 0 {
            r#"exec "$@""#.to_owned()
        } else {
            format!(r#"exec "$@" {number}<&0 </dev/null"#)
        };
        command.args(["-c", &script, "sh"]).arg(inner.get_program()).args(inner.get_args());
        command.stdin(fd);
        command
    }

    pub fn run(command: &mut Command) -> Ended {
        let begin = Instant::now();
        let output = command.output().unwrap();
        Ended { code: output.status.code(), said: text(&output.stderr), took: begin.elapsed() }
    }

    /// Runs a daemon until it is ready.
    pub fn daemon(&self, work: &str, command: &mut Command) -> Daemon {
        let log = self.work(work).join("log");
        let mut child = command
            .args(["-o", "log", "--status-fd", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Whoever has started it may keep the other end too.
        let mut told = [1];
        let count = child.stdout.take().unwrap().read(&mut told).unwrap();
        let daemon = Daemon { child, log };
        assert_eq!((count, told), (1, [0]), "{}", daemon.log());
        daemon
    }

    pub fn cache<W: AsRef<str>>(&self, more: &[W]) -> Daemon {
        let words = ["image-cache", "--address", "127.0.0.1", "--port", "0"];
        let words: Vec<&str> = words.into_iter().chain(more.iter().map(AsRef::as_ref)).collect();
        self.daemon("dst", &mut self.crtool("dst", &words))
    }

    pub fn proxy<W: AsRef<str>>(&self, port: u16, more: &[W]) -> Daemon {
        let port = port.to_string();
        let words = ["image-proxy", "--address", "127.0.0.1", "--port", &port];
        let words: Vec<&str> = words.into_iter().chain(more.iter().map(AsRef::as_ref)).collect();
        self.daemon("src", &mut self.crtool("src", &words))
    }

    /// `crtool dump --remote`, with these words behind it.
    pub fn dump<W: AsRef<str>>(&self, more: &[W]) -> Command {
        self.crtool("src", &self.dump_words(more))
    }

    pub fn dump_words<W: AsRef<str>>(&self, more: &[W]) -> Vec<String> {
        let words = ["dump", "--remote", "-t", &self.pid.to_string()].map(str::to_owned);
        words.into_iter().chain(more.iter().map(|word| word.as_ref().to_owned())).collect()
    }

    /// Waits for the end that a dump gave the tree.
    pub fn reap(&mut self) {
        if let Some(reaper) = self.reaper.take() {
            reaper.join().unwrap();
        }
    }

    /// Restores what was dumped, tells it to end, and looks what it says.
    pub fn restore_and_end(&mut self) {
        self.reap();
        let before = self.count();
        Self::run(&mut self.crtool("dst", &["restore", "--remote", "-d", "--timeout", "20"])).succeeded();
        self.counts();
        assert!(self.count() > before);
        self.end();
    }

    /// Tells the tree to end, and looks what it says.
    pub fn end(&mut self) {
        fs::write(self.path().join("stop"), "").unwrap();
        let said = wait_for("the tree does not end", || {
            fs::read_to_string(self.path().join("end")).ok().filter(|said| !said.is_empty())
        });
        assert_eq!(said, "well");
        self.reap();
        wait_for("the tree does not end", || has_ended(self.pid).then_some(()));
    }

    fn is_tree(&self) -> bool {
        let environ = fs::read(format!("/proc/{}/environ", self.pid)).unwrap_or_default();
        let wanted = self.path().as_os_str().as_encoded_bytes();
        environ.windows(wanted.len()).any(|part| part == wanted)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.is_tree() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
        self.reap();
    }
}

/// A command of the operator of the cache.
pub fn operator(site: &Site, words: &[&str]) -> Ended {
    Site::run(&mut site.crtool("dst", &[&["image-cache"], words].concat()))
}

/// What the cache has.
pub fn list(site: &Site) -> String {
    let output = site.crtool("dst", &["image-cache", "list"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Two ends of a connection over the loopback: the one that connected first.
pub fn connection() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (cache, _) = listener.accept().unwrap();
    (source.into(), cache.into())
}

/// A port that hands all on to the cache, and counts what comes from the source.
pub struct Meter {
    pub port: u16,
    bytes: Arc<AtomicU64>,
}

impl Meter {
    pub fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let bytes: Arc<AtomicU64> = Arc::default();
        let counted = bytes.clone();
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(cache) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                let (from, back) = (source.try_clone().unwrap(), cache.try_clone().unwrap());
                let counted = counted.clone();
                thread::spawn(move || copy(from, cache, Some(&counted)));
                thread::spawn(move || copy(back, source, None));
            }
        });
        Self { port, bytes }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, counted: Option<&AtomicU64>) {
    let mut piece = vec![0; 64 << 10];
    let mut once = || -> io::Result<bool> {
        let n = from.read(&mut piece)?;
        if let Some(counted) = counted {
            counted.fetch_add(n as u64, Ordering::SeqCst);
        }
        to.write_all(piece.get(..n).unwrap_or_default())?;
        Ok(n > 0)
    };
    while once().unwrap_or(false) {}
    let _ = to.shutdown(Shutdown::Write);
}
