//! Jobs of interactive shells: a real shell on a terminal starts a job, the job is dumped, and a shell on another terminal
//! (or the same one) restores it. What a user sees is what counts: echo and output, the keys ^C and ^Z, `fg`, the shell's words
//! about the job, its prompt, and the terminal as it is left.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Completion, Trial};
use nix::{
    fcntl::OFlag,
    pty::{grantpt, posix_openpt, ptsname_r, unlockpt},
    sys::{
        signal::{Signal, kill},
        termios::{LocalFlags, tcgetattr},
    },
    unistd::Pid,
};

type Case = (&'static str, fn(&Work));

static CASES: &[Case] = &[
    ("foreground", foreground),
    ("foreground_of_dash", foreground_of_dash),
    ("foreground_of_zsh", foreground_of_zsh),
    ("same_terminal", same_terminal),
    ("without_echo", without_echo),
    ("again_and_back", again_and_back),
    ("stopped", stopped),
    ("stopped_detached", stopped_detached),
    ("stopped_by_reading", stopped_by_reading),
    ("detached", detached),
    ("background", background),
    ("restored_in_background", restored_in_background),
    ("killed", killed),
    ("of_several_processes", of_several_processes),
    ("member_of_a_group", member_of_a_group),
    ("shell_in_a_shell", shell_in_a_shell),
    ("by_a_script", by_a_script),
    ("leader_of_the_terminal", leader_of_the_terminal),
    ("other_size", other_size),
    ("left_running", left_running),
    ("left_stopped", left_stopped),
    ("restore_that_fails", restore_that_fails),
];

fn main() -> std::process::ExitCode {
    let args = Arguments::from_args();
    let trials = CASES.iter().map(|&(name, run)| {
        Trial::ignorable_test(name, move || {
            if !nix::unistd::geteuid().is_root() {
                return Ok(Completion::ignored_with("needs root"));
            }
            let shell = ["dash", "zsh"].into_iter().find(|shell| name.ends_with(shell)).unwrap_or("bash");
            if !["/bin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(shell).exists()) {
                return Ok(Completion::ignored_with(format!("needs {shell}")));
            }
            run(&Work::new());
            Ok(Completion::Completed)
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit_code()
}

/// However busy the machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What shells show when they want a command; it is never typed.
const PROMPT: &str = "prompt42> ";
/// Says what it reads, and ends with 7 when that is `end`.
const READER: &str = "echo $$ >pid
    trap 'echo got-int' INT
    trap 'echo got-winch $(stty size)' WINCH
    i=0
    echo started
    while read -r -t 300 l; do i=$((i+1)); echo \"n$i:$l\"; [ \"$l\" = end ] && exit 7; done
    echo nothing more to read";
/// Reads a line first, as `read` does that has no time limit, and then is the reader.
const ASKER: &str = "echo $$ >pid
    read -r l
    echo \"asked:$l\"
    . ./reader";
/// Counts into a file until it finds another.
const COUNTER: &str = "echo $$ >pid
    for ((i = 0; ; i++)); do echo $i >>count; [ ! -e end ] || exit 7; sleep 0.02; done";

/// A directory with the programs of the jobs.
struct Work {
    dir: tempfile::TempDir,
}

impl Work {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let work = Self { dir };
        for (name, text) in [("reader", READER), ("asker", ASKER), ("counter", COUNTER)] {
            fs::write(work.path(name), text).expect("program of a job");
        }
        work
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The pid that the job has written down.
    fn pid(&self) -> i32 {
        let mut pid = 0;
        wait_for("the job to write its pid", || {
            let text = fs::read_to_string(self.path("pid")).unwrap_or_default();
            pid = text.strip_suffix('\n').and_then(|text| text.parse().ok()).unwrap_or(0);
            pid != 0
        });
        pid
    }

    fn crtool(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crtool"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null()).output().expect("crtool")
    }

    /// Dumps the job from outside, as from another terminal.
    fn dump(&self, pid: i32, more: &[&str]) {
        let images = self.path("images");
        let _ = fs::remove_dir_all(&images);
        fs::create_dir(&images).expect("directory");
        let pid = pid.to_string();
        let args = ["dump", "-j", "-D", "images", "-o", "dump.log", "-t", &pid];
        let out = self.crtool(&[&args[..], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    /// Waits until nobody has the pid any more, and dead tasks are reaped.
    fn gone(&self, pid: i32) {
        wait_for("the job to be gone", || stat(pid).is_none());
    }

    /// The same for a job whose shell asks for it only when it comes to its prompt.
    fn gone_after(&self, pid: i32, shell: &mut Terminal) {
        shell.line("");
        shell.prompt();
        self.gone(pid);
    }

    fn count(&self) -> usize {
        fs::read_to_string(self.path("count")).unwrap_or_default().lines().count()
    }

    /// Waits until the count has grown.
    fn counts(&self) {
        let before = self.count();
        wait_for("the job to count", || self.count() > before + 1);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.path("pid")).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.filter(|pid| stat(*pid).is_some()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// State, parent, process group, session, foreground group of its terminal.
fn stat(pid: i32) -> Option<(char, [i32; 4])> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = text.rsplit_once(") ")?.1.split(' ');
    let state = words.next()?.chars().next()?;
    let number = |word: Option<&str>| word.and_then(|word| word.parse().ok());
    let [parent, group, session] = [number(words.next())?, number(words.next())?, number(words.next())?];
    Some((state, [parent, group, session, number(words.nth(1))?]))
}

/// Whether the group of a task has the terminal of its session.
fn has_terminal(pid: i32) -> bool {
    stat(pid).is_some_and(|(_, [_, group, _, foreground])| group == foreground)
}

/// A shell on a terminal of its own, and what it shows.
struct Terminal {
    keyboard: File,
    slave: PathBuf,
    shell: Child,
    /// What has been shown.
    screen: Arc<Mutex<Vec<u8>>>,
    /// How much of it has been looked at.
    seen: usize,
}

impl Terminal {
    /// An interactive bash that waits for a command.
    fn bash(work: &Work) -> Self {
        Self::shell(work, &["bash", "--norc", "--noprofile", "-i"])
    }

    fn shell(work: &Work, shell: &[&str]) -> Self {
        let mut this = Self::program(work, shell);
        this.prompt();
        this
    }

    fn program(work: &Work, program: &[&str]) -> Self {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).expect("a terminal");
        grantpt(&master).expect("grantpt");
        unlockpt(&master).expect("unlockpt");
        let slave = PathBuf::from(ptsname_r(&master).expect("ptsname"));
        let end = || OpenOptions::new().read(true).write(true).open(&slave).expect("slave of the terminal");
        let tools = Path::new(env!("CARGO_BIN_EXE_crtool")).parent().expect("directory").to_owned();
        // What the harness has left open must not be the job's; and a shell that is not interactive forgets PS1.
        let start = "for f in /proc/$$/fd/*; do n=${f##*/}; ((n > 2)) && eval \"exec $n>&-\"; done
            exec env --default-signal=INT,QUIT,HUP,TSTP,TTIN,TTOU \"PS1=$PROMPT42\" setsid -c \"$@\"";
        let shell = Command::new("bash")
            .args(["-c", start, "start"])
            .args(program)
            .env_clear()
            .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display()))
            .env("PROMPT42", PROMPT)
            .env("TERM", "dumb")
            .env("HOME", work.dir.path())
            .current_dir(work.dir.path())
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("a shell");
        let fd = master.as_fd().try_clone_to_owned().expect("dup");
        let keyboard = File::from(fd);
        let mut reader = keyboard.try_clone().expect("dup");
        drop(master);
        let screen = Arc::new(Mutex::new(Vec::new()));
        let shown = Arc::clone(&screen);
        thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut piece) {
                shown.lock().expect("screen").extend_from_slice(&piece[..len]);
            }
        });
        Self { keyboard, slave, shell, screen, seen: 0 }
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("press a key");
    }

    fn line(&mut self, text: &str) {
        self.press(&format!("{text}\n"));
    }

    /// What has been shown since it was looked at last.
    fn rest(&self) -> String {
        let screen = self.screen.lock().expect("screen");
        String::from_utf8_lossy(&screen[self.seen..]).into_owned()
    }

    /// Waits for `text`; what came up to its end has been looked at, and is returned.
    #[track_caller]
    fn shows(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let found = {
                let screen = self.screen.lock().expect("screen");
                let rest = &screen[self.seen..];
                rest.windows(text.len()).position(|part| part == text.as_bytes()).map(|at| {
                    let end = at + text.len();
                    (String::from_utf8_lossy(&rest[..end]).into_owned(), end)
                })
            };
            if let Some((text, len)) = found {
                self.seen += len;
                return text;
            }
            assert!(Instant::now() < end, "the terminal does not show {text:?}, but {:?}", self.rest());
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    fn prompt(&mut self) -> String {
        self.shows(PROMPT)
    }

    /// Starts the job, which says that it has started, and gives its pid.
    #[track_caller]
    fn start(&mut self, work: &Work, command: &str) -> i32 {
        let _ = fs::remove_file(work.path("pid"));
        self.line(command);
        let pid = work.pid();
        if command.contains("reader") {
            self.shows("started");
        }
        pid
    }

    /// Restores the job, which then runs with the terminal.
    #[track_caller]
    fn restore(&mut self, work: &Work, pid: i32, then: &str) {
        work.gone(pid);
        self.line(&format!("crtool restore -v4 -j -D images -o restore.log{then}"));
        wait_for("the restore", || {
            let log = fs::read(work.path("images/restore.log")).unwrap_or_default();
            String::from_utf8_lossy(&log).contains("Restore finished successfully")
        });
        self.shows("restore.log");
        assert!(has_terminal(pid), "the restored job has no terminal");
    }

    /// The job has the terminal, and gets the line that it asks for.
    #[track_caller]
    fn asks(&mut self, pid: i32) {
        wait_for("the job to have the terminal", || has_terminal(pid));
        self.line("yes");
        self.shows("asked:yes");
        self.shows("started");
    }

    /// The job reads, echoes, gets keys; in the end it ends with 7.
    #[track_caller]
    fn job_works(&mut self, work: &Work, pid: i32, count: u32) {
        self.line("a line");
        self.shows("a line\r\n");
        self.shows(&format!("n{count}:a line"));
        self.press("\x03");
        self.shows("got-int");
        self.press("\x1a");
        // "Stopped", "suspended".
        self.shows("ed");
        self.prompt();
        assert_eq!(stat(pid).map(|(state, _)| state), Some('T'));
        assert!(!has_terminal(pid));
        self.line("echo $((1000 + 1))");
        self.shows("1001");
        self.prompt();
        self.line("fg");
        wait_for("the job to have the terminal again", || {
            has_terminal(pid) && stat(pid).is_some_and(|(state, _)| state != 'T')
        });
        self.line("another one");
        self.shows(&format!("n{}:another one", count + 1));
        self.ends(work, pid, count + 2);
    }

    /// The job ends with 7, and so does crtool; the shell has its terminal.
    #[track_caller]
    fn ends(&mut self, work: &Work, pid: i32, count: u32) {
        self.line("end");
        self.shows(&format!("n{count}:end"));
        self.prompt();
        work.gone(pid);
        self.line("echo status $?");
        self.shows("status 7");
        self.prompt();
        self.is_sane();
    }

    /// Programs find the terminal as a shell leaves it to them.
    #[track_caller]
    fn is_sane(&mut self) {
        self.line("stty -a | tr ' ' '\\n' | grep -xc -e echo -e icanon -e isig -e icrnl -e opost");
        self.shows("\n5");
        self.prompt();
    }

    /// Whether what is typed is shown.
    fn echoes(&self) -> bool {
        let slave = OpenOptions::new().read(true).open(&self.slave).expect("slave");
        tcgetattr(&slave).expect("tcgetattr").local_flags.contains(LocalFlags::ECHO)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let screen = self.screen.lock().map(|s| String::from_utf8_lossy(&s).into_owned());
            eprintln!("--- {} showed:\n{}", self.slave.display(), screen.unwrap_or_default());
        }
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

fn foreground_of(work: &Work, shell: &[&str]) {
    let mut first = Terminal::shell(work, shell);
    let pid = first.start(work, "bash reader");
    first.line("one");
    first.shows("n1:one");
    work.dump(pid, &[]);
    // The shell hears that its job is dead.
    first.shows("illed");
    first.prompt();
    first.is_sane();
    let mut second = Terminal::shell(work, shell);
    second.restore(work, pid, "");
    second.job_works(work, pid, 2);
}

fn foreground(work: &Work) {
    foreground_of(work, &["bash", "--norc", "--noprofile", "-i"]);
}

fn foreground_of_dash(work: &Work) {
    foreground_of(work, &["dash", "-i"]);
}

fn foreground_of_zsh(work: &Work) {
    foreground_of(work, &["zsh", "-f", "-i", "+Z"]);
}

/// Stopped, dumped by the same shell, and restored there.
fn same_terminal(work: &Work) {
    let mut terminal = Terminal::bash(work);
    let pid = terminal.start(work, "bash reader");
    terminal.press("\x1a");
    terminal.prompt();
    fs::create_dir(work.path("images")).expect("directory");
    terminal.line(&format!("crtool dump -j -t {pid} -D images; echo dump $?"));
    terminal.shows("dump 0");
    terminal.prompt();
    work.gone(pid);
    terminal.line("crtool restore -j -D images -o restore.log");
    terminal.shows("Stopped");
    terminal.prompt();
    terminal.line("fg");
    wait_for("the job to have the terminal", || has_terminal(pid));
    terminal.job_works(work, pid, 1);
}

/// The settings that a job in the foreground had made are those of the other terminal.
fn without_echo(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "stty -echo; bash reader; stty echo");
    assert!(!first.echoes());
    work.dump(pid, &[]);
    let mut second = Terminal::bash(work);
    second.restore(work, pid, "; stty echo");
    assert!(!second.echoes());
    second.line("secret");
    assert_eq!(second.shows("n1:secret").matches("secret").count(), 1, "it was shown when it was typed");
    second.line("end");
    second.shows("n2:end");
    second.prompt();
    second.is_sane();
}

fn again_and_back(work: &Work) {
    let mut first = Terminal::bash(work);
    let mut second = Terminal::bash(work);
    let pid = first.start(work, "bash reader");
    for round in 0..3 {
        work.dump(pid, &[]);
        if round > 0 {
            // What it waited for has died of SIGKILL.
            first.prompt();
            first.line("echo status $?");
            first.shows("status 137");
        }
        first.prompt();
        first.is_sane();
        second.restore(work, pid, "");
        second.line("hello");
        second.shows(&format!("n{}:hello", round + 1));
        std::mem::swap(&mut first, &mut second);
    }
    first.job_works(work, pid, 4);
}

fn stopped(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash reader");
    first.press("\x1a");
    first.shows("Stopped");
    first.prompt();
    work.dump(pid, &[]);
    let mut second = Terminal::bash(work);
    work.gone_after(pid, &mut first);
    second.line("crtool restore -j -D images -o restore.log");
    second.shows("Stopped");
    second.prompt();
    assert_eq!(stat(pid).map(|(state, _)| state), Some('T'));
    second.is_sane();
    second.line("fg");
    wait_for("the job to have the terminal", || has_terminal(pid));
    second.job_works(work, pid, 1);
}

/// Whoever has the job then must be able to continue it.
fn stopped_detached(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash counter");
    work.counts();
    first.press("\x1a");
    first.shows("Stopped");
    first.prompt();
    work.dump(pid, &[]);
    work.gone_after(pid, &mut first);
    let mut second = Terminal::bash(work);
    second.line("crtool restore -d -j -D images -o restore.log; echo status $?");
    second.shows("status 0");
    second.prompt();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(stat(pid).map(|(state, _)| state), Some('T'), "it is not stopped any more");
    let before = work.count();
    second.is_sane();
    assert_eq!(work.count(), before);
    second.line(&format!("kill -CONT -- -{pid}"));
    work.counts();
    fs::write(work.path("end"), "").expect("end");
    wait_for("its end", || stat(pid).is_none_or(|(state, _)| state == 'Z'));
}

/// A job in the background that wants to read is stopped; in the foreground it reads.
fn stopped_by_reading(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash asker &");
    wait_for("the job to stop", || stat(pid).is_some_and(|(state, _)| state == 'T'));
    work.dump(pid, &[]);
    work.gone_after(pid, &mut first);
    let mut second = Terminal::bash(work);
    second.line("crtool restore -j -D images -o restore.log");
    second.shows("Stopped");
    second.prompt();
    second.line("fg");
    second.asks(pid);
    second.job_works(work, pid, 1);
}

fn detached(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash counter");
    work.counts();
    work.dump(pid, &[]);
    first.shows("Killed");
    first.prompt();
    let mut second = Terminal::bash(work);
    work.gone(pid);
    second.line("crtool restore -d -j -D images -o restore.log; echo status $?");
    second.shows("status 0");
    second.prompt();
    work.counts();
    assert!(!has_terminal(pid));
    second.is_sane();
    work.counts();
    fs::write(work.path("end"), "").expect("end");
    wait_for("its end", || stat(pid).is_none_or(|(state, _)| state == 'Z'));
}

/// Dumped while the shell had the terminal, and had set it up for its own editor.
fn background(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash counter &");
    work.counts();
    first.prompt();
    wait_for("the line editor of the shell", || !first.echoes());
    work.dump(pid, &[]);
    work.gone_after(pid, &mut first);
    let mut second = Terminal::bash(work);
    second.restore(work, pid, "");
    work.counts();
    assert!(second.echoes(), "the job has got the settings of a line editor");
    second.press("\x03");
    second.prompt();
    second.line("echo status $?");
    second.shows("status 130");
    second.prompt();
    second.is_sane();
    work.gone(pid);
}

fn restored_in_background(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash asker");
    wait_for("the job to read", || stat(pid).is_some_and(|(state, _)| state == 'S'));
    work.dump(pid, &[]);
    first.prompt();
    work.gone(pid);
    let mut second = Terminal::bash(work);
    second.line("crtool restore -j -D images -o restore.log &");
    second.prompt();
    wait_for("the job to stop as it reads", || stat(pid).is_some_and(|(state, _)| state == 'T'));
    wait_for("crtool to stop", || {
        let parent = stat(pid).map(|(_, [parent, ..])| parent).and_then(stat);
        parent.is_some_and(|(state, _)| state == 'T')
    });
    second.line("");
    second.shows("Stopped");
    second.prompt();
    second.line("fg");
    second.asks(pid);
    second.job_works(work, pid, 1);
}

/// A job that dies cannot put the terminal back.
fn killed(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "stty raw -echo; bash reader");
    work.dump(pid, &[]);
    let mut second = Terminal::bash(work);
    second.restore(work, pid, "");
    wait_for("the settings of the job", || !second.echoes());
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
    second.prompt();
    second.line("echo status $?");
    second.shows("status 137");
    second.prompt();
    second.is_sane();
}

/// A pipeline, and children of the job.
fn of_several_processes(work: &Work) {
    let mut first = Terminal::bash(work);
    let pipeline = "bash -c 'echo $$ >pid; echo started reader; cat | (while read -r l; do echo \"<$l>\"; done; sleep 1000) | cat'";
    let pid = first.start(work, pipeline);
    first.line("one");
    first.shows("<one>");
    work.dump(pid, &[]);
    first.prompt();
    let mut second = Terminal::bash(work);
    second.restore(work, pid, "");
    second.line("two");
    second.shows("<two>");
    second.press("\x1a");
    second.shows("Stopped");
    second.prompt();
    let group: Vec<char> = group_of(pid).into_iter().filter_map(stat).map(|(state, _)| state).collect();
    assert!(group.len() >= 4 && group.iter().all(|state| *state == 'T'), "{group:?}");
    second.line("fg");
    wait_for("the job to have the terminal", || has_terminal(pid));
    second.line("three");
    second.shows("<three>");
    second.press("\x03");
    second.prompt();
    wait_for("the group to be gone", || group_of(pid).is_empty());
    second.is_sane();
}

/// The members of a process group.
fn group_of(group: i32) -> Vec<i32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| stat(*pid).is_some_and(|(_, [_, its, ..])| its == group)).collect()
}

/// Its group is led by somebody outside: it gets that of crtool, and the keys reach both.
fn member_of_a_group(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "(bash reader; true)");
    assert!(stat(pid).is_some_and(|(_, [_, group, ..])| group != pid));
    work.dump(pid, &[]);
    first.prompt();
    let mut second = Terminal::bash(work);
    second.restore(work, pid, "");
    second.job_works(work, pid, 1);
}

/// A job that is a shell gives the terminal to jobs of its own.
fn shell_in_a_shell(work: &Work) {
    let mut first = Terminal::bash(work);
    first.line("PS1=inner43'> ' bash --norc --noprofile -i");
    first.shows("inner43> ");
    first.line("echo $$ >pid; i=0");
    first.shows("inner43> ");
    let pid = work.pid();
    first.line("bash -c 'echo $$ >inner; exec cat'");
    let inner = || fs::read_to_string(work.path("inner")).ok()?.strip_suffix('\n')?.parse::<i32>().ok();
    wait_for("the inner job", || inner().is_some_and(has_terminal));
    let inner = inner().expect("inner job");
    first.line("one");
    first.shows("one\r\none");
    work.dump(pid, &[]);
    first.prompt();
    work.gone(pid);
    let mut second = Terminal::bash(work);
    second.line("crtool restore -j -D images -o restore.log");
    wait_for("the inner job to have the terminal", || has_terminal(inner));
    second.line("two");
    second.shows("two\r\ntwo");
    // That is the inner shell's affair.
    second.press("\x1a");
    second.shows("inner43> ");
    second.line("fg");
    wait_for("the inner job to have the terminal", || has_terminal(inner));
    second.press("\x03");
    second.shows("inner43> ");
    second.line("suspend");
    second.shows("Stopped");
    second.prompt();
    second.line("fg");
    second.shows("inner43> ");
    second.line("exit 9");
    second.prompt();
    second.line("echo status $?");
    second.shows("status 9");
    second.prompt();
    second.is_sane();
}

/// A script has no jobs: crtool has its group, and when the job stops, the whole script does.
fn by_a_script(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash reader");
    work.dump(pid, &[]);
    first.prompt();
    let script =
        "crtool restore -j -D images -o restore.log\necho after $?\nread -r l\necho \"script: $l\"\nexit 7\n";
    fs::write(work.path("script"), script).expect("script");
    work.gone(pid);
    let mut second = Terminal::bash(work);
    second.line("sh script");
    wait_for("the job to have the terminal", || has_terminal(pid));
    second.line("one");
    second.shows("n1:one");
    second.press("\x1a");
    second.shows("Stopped");
    second.prompt();
    second.line("fg");
    wait_for("the job to have the terminal", || has_terminal(pid));
    second.line("end");
    second.shows("n2:end");
    second.shows("after 7");
    second.line("mine");
    second.shows("script: mine");
    second.prompt();
    second.is_sane();
}

/// Without a shell nobody could continue crtool: ^Z is not for such a job.
fn leader_of_the_terminal(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash reader");
    work.dump(pid, &[]);
    first.prompt();
    work.gone(pid);
    let mut second =
        Terminal::program(work, &["crtool", "restore", "-j", "-D", "images", "-o", "restore.log"]);
    wait_for("the job to have the terminal", || has_terminal(pid));
    second.line("one");
    second.shows("n1:one");
    second.press("\x1a");
    wait_for("the job to run with the terminal", || {
        has_terminal(pid) && stat(pid).is_some_and(|(state, _)| state == 'S')
    });
    second.line("two");
    second.shows("n2:two");
    second.line("end");
    second.shows("n3:end");
    let mut status = None;
    wait_for("crtool to end", || {
        status = second.shell.try_wait().expect("wait");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(7));
}

/// The terminal keeps its size, and the job hears of it.
fn other_size(work: &Work) {
    let mut first = Terminal::bash(work);
    first.line("stty rows 20 cols 60");
    first.prompt();
    let pid = first.start(work, "bash reader");
    work.dump(pid, &[]);
    first.prompt();
    let mut second = Terminal::bash(work);
    second.line("stty rows 33 cols 111");
    second.prompt();
    second.restore(work, pid, "");
    second.shows("got-winch 33 111");
    second.ends(work, pid, 1);
    second.line("stty size");
    second.shows("33 111");
}

fn left_running(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash reader");
    first.line("one");
    first.shows("n1:one");
    work.dump(pid, &["-R"]);
    first.job_works(work, pid, 2);
    let mut second = Terminal::bash(work);
    second.restore(work, pid, "");
    second.job_works(work, pid, 2);
}

fn left_stopped(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "bash reader");
    work.dump(pid, &["-s"]);
    first.shows("Stopped");
    first.prompt();
    first.line("fg");
    wait_for("the job to run with the terminal", || {
        has_terminal(pid) && stat(pid).is_some_and(|(state, _)| state == 'S')
    });
    first.job_works(work, pid, 1);
}

/// The shell's terminal is as it was.
fn restore_that_fails(work: &Work) {
    let mut first = Terminal::bash(work);
    let pid = first.start(work, "stty raw; bash reader");
    work.dump(pid, &[]);
    let mut second = Terminal::bash(work);
    work.gone(pid);
    fs::write(work.path("no"), "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != pre-resume ]\n").expect("script");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(work.path("no"), mode).expect("chmod");
    second.line("crtool restore -j -D images -o restore.log --action-script $PWD/no; echo status $?");
    second.shows("status 1");
    second.prompt();
    second.is_sane();
    work.gone(pid);
    second.restore(work, pid, "");
}
