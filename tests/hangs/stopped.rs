//! Somebody stops crtool, or what it works on.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{ptrace, signal::Signal, wait::waitpid},
    unistd::Pid,
};

use crate::{
    guard::{GROUPS, remove_group},
    reaper::End,
    site::{GRACE, Site, Trouble, alive, fail, processes, signal, slack, state},
};

const LIMIT: Duration = Duration::from_secs(1);
const SECONDS: &str = "1";

/// A crtool that is stopped while the tree is frozen is continued when its time is over, and gives up.
pub fn dump(site: &mut Site) -> Result<(), Trouble> {
    site.start("computing")?;
    let mut caught = 0;
    for stop in [Signal::SIGSTOP, Signal::SIGTSTP, Signal::SIGTTIN].into_iter().cycle().take(60) {
        let tool = site.begin_dump(&["-R", "--timeout", SECONDS])?;
        site.until_traced(&tool)?;
        signal(tool.pid, stop);
        let done = site.end(tool)?;
        done.in_time(LIMIT)?;
        match done.end {
            End::Exited(1) => {
                done.failed_in_time(LIMIT, &["--timeout"])?;
                caught += 1;
            }
            // It was done with the tree by then, or pages were being written.
            End::Exited(0) => {}
            end => return fail(format!("stopped, it ended with {end:?}: {}", done.said)),
        }
        site.works()?;
        if caught == 3 {
            return Ok(());
        }
    }
    fail(format!("only {caught} dumps were stopped in time"))
}

/// A check that is stopped while it holds a task lets it go in time.
pub fn check(site: &mut Site) -> Result<(), Trouble> {
    site.start("computing")?;
    let mut caught = 0;
    for _ in 0..20 {
        let tool = site.begin_check(&["--timeout", SECONDS])?;
        site.until_traced(&tool)?;
        signal(tool.pid, Signal::SIGSTOP);
        let begin = Instant::now();
        // Stopped after that, it holds nobody, and nobody needs it to go on.
        site.works()?;
        let took = begin.elapsed();
        if took > LIMIT + GRACE + slack() {
            return fail(format!("the tree stood still for {took:?}"));
        }
        caught += usize::from(took > LIMIT / 2);
        signal(tool.pid, Signal::SIGCONT);
        let done = site.end(tool)?;
        if !matches!(done.end, End::Exited(0 | 1)) {
            return fail(format!("stopped, it ended with {:?}: {}", done.end, done.said));
        }
        if caught == 2 {
            return Ok(());
        }
    }
    fail(format!("only {caught} checks were stopped in time"))
}

/// The same for a restore: it gives up and nothing is left, or goes on where it was and succeeds.
pub fn restore(site: &mut Site) -> Result<(), Trouble> {
    site.start("large")?;
    site.dump_and_kill()?;
    let mut caught = 0;
    for number in 0..30u64 {
        let tool = site.begin(&["restore", "-d", "--timeout", SECONDS])?;
        // From when it can hurt anybody on.
        site.until("crtool is at work", || alive(site.pid) || !alive(tool.pid))?;
        thread::sleep(Duration::from_millis(3 * (number % 5)));
        signal(tool.pid, Signal::SIGSTOP);
        thread::sleep(LIMIT + GRACE + Duration::from_millis(500));
        // When the tree is restored nobody waits for crtool any more; it then only has to end.
        let over = alive(tool.pid) && state(tool.pid) == 'T';
        signal(tool.pid, Signal::SIGCONT);
        let done = site.end(tool)?;
        caught += usize::from(!over && done.took > LIMIT);
        match done.end {
            End::Exited(1) if !over => {
                if !done.said.contains("--timeout") {
                    return fail(format!("the reason is not said: {}", done.said));
                }
                site.nothing_left(&[])?;
            }
            End::Exited(0) => {
                site.works()?;
                signal(site.pid, Signal::SIGKILL);
                site.nothing_left(&[])?;
            }
            end => return fail(format!("stopped, it ended with {end:?}: {}", done.said)),
        }
        if caught == 2 {
            site.run(&["restore", "-d"])?.succeeded("restore")?;
            return site.works();
        }
    }
    fail(format!("only {caught} restores were stopped before their end"))
}

/// A debugger holds crtool: it is killed when its time is over, and the tree runs on.
pub fn debugged(site: &mut Site) -> Result<(), Trouble> {
    site.start("computing")?;
    let tool = site.begin_dump(&["-R", "--timeout", SECONDS])?;
    site.until_traced(&tool)?;
    let pid = Pid::from_raw(tool.pid);
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| e.to_string())?;
    let tasks: Vec<i32> = tasks.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for tid in tasks {
        if ptrace::attach(Pid::from_raw(tid)).is_err() {
            return Err(Trouble::Skip("the dump was over before a debugger could come".into()));
        }
    }
    let begin = Instant::now();
    // The reaper, a thread of ours, takes the reports.
    while alive(tool.pid) && begin.elapsed() < LIMIT * 5 {
        let _ = waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
        thread::sleep(Duration::from_millis(5));
    }
    if begin.elapsed() > LIMIT + GRACE + slack() {
        return fail(format!("it lived for {:?}", begin.elapsed()));
    }
    site.works()
}

/// Dump and check of a task that somebody else traces say so at once, whatever that one does.
fn traced(site: &Site) -> Result<(), Trouble> {
    for _ in 0..3 {
        let limit = ["--timeout", SECONDS];
        let done = site.dump(&limit)?;
        done.in_time(LIMIT)?;
        if done.end != End::Exited(1) || !done.said.contains("is traced by task") {
            return fail(format!("dump of a traced tree: {:?} {}", done.end, done.said));
        }
        let done = site.check(&limit)?;
        done.in_time(LIMIT)?;
        if done.end != End::Exited(1) {
            return fail(format!("check of a traced tree: {:?} {}", done.end, done.said));
        }
    }
    Ok(())
}

/// A tracer that is stopped, and its tracee in a stop that nobody but it can end.
pub fn tracer(site: &mut Site) -> Result<(), Trouble> {
    site.start("computing")?;
    let root = Pid::from_raw(site.pid);
    let mark = site.dir.join("attached");
    let tracer = crate::sys::fork(|| {
        ptrace::seize(root, ptrace::Options::empty()).expect("seize");
        fs::write(&mark, "").expect("mark");
        loop {
            thread::park();
        }
    });
    site.until("it is traced", || mark.exists())?;
    signal(tracer, Signal::SIGSTOP);
    site.until("its tracer is stopped", || state(tracer) == 'T')?;
    traced(site)?;
    site.works()?;
    // A signal stops a tracee until its tracer has seen it.
    signal(site.pid, Signal::SIGWINCH);
    site.until("it is in a stop of its tracer's", || state(site.pid) == 't')?;
    traced(site)?;
    signal(tracer, Signal::SIGKILL);
    site.works()?;
    site.dump(&["-R"])?.succeeded("dump, when the tracer is gone")?;
    site.works()
}

/// A tracer that is frozen with its tracee.
pub fn tracer_in_the_tree(site: &mut Site) -> Result<(), Trouble> {
    site.start("tracer")?;
    traced(site)?;
    site.works()
}

/// A directory of a cgroup file system of this kind, in which a new cgroup can be made.
fn mounted(kind: &str, option: &str) -> Result<PathBuf, Trouble> {
    let text = fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let found = text.lines().find(|line| {
        let (_, behind) = line.split_once(" - ").unwrap_or_default();
        behind.starts_with(&format!("{kind} ")) && behind.split([' ', ',']).any(|word| word == option)
    });
    let Some(line) = found else { return Err(Trouble::Skip(format!("no {kind} with {option}"))) };
    Ok(line.split(' ').nth(4).unwrap_or_default().into())
}

/// A cgroup of a trial, gone with it.
struct Group(PathBuf);

impl Group {
    fn new(site: &Site, root: &Path) -> Result<Self, Trouble> {
        let path = root.join(format!("hangs-{}", std::process::id()));
        let path =
            path.with_extension(format!("{:?}", Instant::now()).replace(|c: char| !c.is_ascii_digit(), ""));
        // Before it is there: should we be killed now, somebody knows.
        fs::write(site.dir.join(GROUPS), format!("{}\n", path.display())).map_err(|e| e.to_string())?;
        fs::create_dir(&path).map_err(|e| Trouble::Skip(format!("no cgroup can be made: {e}")))?;
        Ok(Self(path))
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Trouble> {
        Ok(fs::write(self.0.join(file), text).map_err(|e| format!("{file} of the cgroup: {e}"))?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        remove_group(&self.0);
    }
}

/// crtool itself is frozen while it holds a tree: no thread of it runs, but the kernel's timer kills it.
pub fn frozen_crtool(site: &mut Site) -> Result<(), Trouble> {
    let group = Group::new(site, &mounted("cgroup2", "rw")?)?;
    site.start("computing")?;
    for _ in 0..20 {
        let tool = site.begin_dump(&["-R", "--timeout", SECONDS])?;
        let pid = tool.pid.to_string();
        group.write("cgroup.procs", &pid)?;
        site.until_traced(&tool)?;
        group.write("cgroup.freeze", "1")?;
        let done = site.end(tool)?;
        group.write("cgroup.freeze", "0")?;
        done.in_time(LIMIT)?;
        site.works()?;
        match done.end {
            End::Killed(libc::SIGKILL) => return Ok(()),
            End::Exited(_) => {}
            end => return fail(format!("frozen, it ended with {end:?}")),
        }
    }
    fail("no dump was frozen before its end")
}

/// The tree is frozen: nothing can be run in it, and that is said at once.
fn frozen_tree(site: &mut Site, group: &Group, freeze: (&str, &str), thaw: &str) -> Result<(), Trouble> {
    site.start("plain")?;
    group.write("cgroup.procs", &site.pid.to_string())?;
    group.write(freeze.0, freeze.1)?;
    thread::sleep(Duration::from_millis(100));
    site.hold();
    for words in [["dump", "-R"], ["check", "-v4"]] {
        let pid = site.pid.to_string();
        let done = site.run(&[&words[..1], &["-t", &pid, "--timeout", SECONDS], &words[1..]].concat())?;
        done.in_time(LIMIT)?;
        let said = done.said.clone();
        if done.end != End::Exited(1) || (words[0] == "dump" && !said.contains("cgroup is frozen")) {
            return fail(format!("{words:?} of a frozen tree: {:?} {said}", done.end));
        }
    }
    group.write(freeze.0, thaw)?;
    site.works()?;
    site.dump(&["-R"])?.succeeded("dump of the tree that is thawed")?;
    site.works()
}

pub fn frozen_tree_v1(site: &mut Site) -> Result<(), Trouble> {
    let group = Group::new(site, &mounted("cgroup", "freezer")?)?;
    frozen_tree(site, &group, ("freezer.state", "FROZEN"), "THAWED")
}

pub fn frozen_tree_v2(site: &mut Site) -> Result<(), Trouble> {
    let group = Group::new(site, &mounted("cgroup2", "rw")?)?;
    frozen_tree(site, &group, ("cgroup.freeze", "1"), "0")
}

/// Somebody stops all that a restore makes, all the time.
pub fn stopped_tasks(site: &mut Site) -> Result<(), Trouble> {
    site.start("computing")?;
    site.dump_and_kill()?;
    for _ in 0..Site::times(10) {
        let tool = site.begin(&["restore", "-d", "--timeout", SECONDS])?;
        let begin = Instant::now();
        while alive(tool.pid) && begin.elapsed() < LIMIT * 4 {
            for pid in processes().into_iter().filter(|pid| *pid != tool.pid) {
                signal(pid, Signal::SIGSTOP);
            }
        }
        let done = site.end(tool)?;
        // Whoever crtool has left is to clear away must be able to.
        for pid in processes() {
            signal(pid, Signal::SIGCONT);
        }
        // What moves is restored, however slowly; what does not is given up.
        match done.end {
            End::Exited(1) => site.nothing_left(&[])?,
            End::Exited(0) => {
                signal(site.pid, Signal::SIGKILL);
                site.nothing_left(&[])?;
            }
            end => return fail(format!("it ended with {end:?}: {}", done.said)),
        }
    }
    site.run(&["restore", "-d"])?.succeeded("restore")?;
    site.works()
}
