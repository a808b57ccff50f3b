//! What is asked before anything is frozen: whether there is room, whether the destination has what the tree needs, and
//! whose turn it is.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    program::Memory,
    site::{Daemon, Ended, Site, wait_for},
};

const NONE: &[&str] = &[];

/// What comes of `work`, and whether somebody has seized or stopped the tree meanwhile.
fn watched<T>(site: &Site, work: impl FnOnce() -> T) -> (T, bool) {
    let (over, path) = (AtomicBool::new(false), format!("/proc/{}/status", site.pid));
    let stopped = |status: &str| {
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            || status.lines().any(|line| line.starts_with("State:\tT") || line.starts_with("State:\tt"))
    };
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut seen = false;
            while !over.load(Ordering::Acquire) {
                seen |= fs::read_to_string(&path).is_ok_and(|status| stopped(&status));
                thread::sleep(Duration::from_micros(200));
            }
            seen
        });
        let came = work();
        over.store(true, Ordering::Release);
        (came, watch.join().unwrap())
    })
}

/// A dump is refused, and its tree has not noticed. One that leaves the tree running shows that it could have been noticed.
fn refused(site: &Site, command: &mut Command) -> Ended {
    let (ended, stopped) = watched(site, || Site::run(command));
    assert!(!stopped, "it was frozen: {}", ended.said);
    site.counts();
    ended
}

/// A cache that sees the same files, but for the directory of the programs that are tested.
fn cache_without_programs(site: &Site, more: &[&str]) -> Daemon {
    let words = ["image-cache", "--address", "127.0.0.1", "--port", "0"];
    let inner = site.crtool("dst", &[&words, more].concat());
    let programs = std::env::current_exe().unwrap();
    let script = format!("mount -t tmpfs none {} && exec \"$@\"", programs.parent().unwrap().display());
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).arg(inner.get_program()).args(inner.get_args());
    command.stdin(Stdio::null());
    site.daemon("dst", &mut command)
}

/// A program is missing at the destination, for a dump and a migration, directly and by a proxy.
pub fn a_file_is_missing() {
    let mut site = Site::new(Memory::Text);
    let cache = cache_without_programs(&site, &["--restore"]);
    let port = cache.port().to_string();
    let _proxy = site.proxy(cache.port(), NONE);
    let direct = ["--address", "127.0.0.1", "--port", &port];
    let pid = site.pid.to_string();
    let to = format!("127.0.0.1:{port}");
    let program = std::env::current_exe().unwrap().display().to_string();
    for mut command in [
        site.dump(NONE),
        site.dump(&direct),
        site.crtool("src", &["migrate", "-t", &pid, "--to", &to]),
        site.crtool("src", &["migrate", "-t", &pid]),
    ] {
        let error = refused(&site, &mut command).failed();
        for part in ["is not taken: the destination lacks what the tree needs: ", &program, "ENOENT"] {
            assert!(error.contains(part), "{error}");
        }
    }
    drop(cache);
    // Where all of it is there, one is frozen, and that can be seen.
    let cache = site.cache(NONE);
    let port = cache.port().to_string();
    let words = ["-R", "--address", "127.0.0.1", "--port", &port];
    let (ended, stopped) = watched(&site, || Site::run(&mut site.dump(&words)));
    ended.succeeded();
    assert!(stopped);
    site.end();
}

/// A migration to where its pids are taken: by itself, since they are shared, or by somebody else. A dump is told of
/// the latter, and goes on.
pub fn a_pid_is_taken() {
    let mut site = Site::new(Memory::Text);
    let pid = site.pid.to_string();
    let cache = site.cache(&["--restore"]);
    let to = format!("127.0.0.1:{}", cache.port());
    let error = refused(&site, &mut site.crtool("src", &["migrate", "-t", &pid, "--to", &to])).failed();
    assert!(error.contains("source and destination share their pids"), "{error}");
    drop(cache);

    let words = ["image-cache", "--address", "127.0.0.1", "--port", "0", "--restore"];
    let inner = site.crtool("dst", &words);
    let script = format!(
        "mount -t proc proc /proc && echo {} > /proc/sys/kernel/ns_last_pid && {{ sleep 1000 >/dev/null 2>&1 & }} && exec \"$@\"",
        site.pid - 1
    );
    let mut command = Command::new("unshare");
    command.args(["-pmf", "--kill-child", "sh", "-c", &script, "sh"]);
    command.arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
    let cache = site.daemon("dst", &mut command);
    let port = cache.port().to_string();
    let to = format!("127.0.0.1:{port}");
    let error = refused(&site, &mut site.crtool("src", &["migrate", "-t", &pid, "--to", &to])).failed();
    assert!(error.contains(&format!("pid {pid} is taken by sleep")), "{error}");
    let words = ["-R", "--address", "127.0.0.1", "--port", &port];
    let said = Site::run(&mut site.dump(&words)).succeeded().said;
    let wanted = format!("at the destination now: pid {pid} is taken by sleep");
    assert!(said.contains(&wanted), "{said}");
    site.end();
}

/// A cache whose restores could not do what every restore does, or would look for a script in vain, says so.
pub fn restores_could_not_work() {
    let mut site = Site::new(Memory::Text);
    let pid = site.pid.to_string();
    let words = ["image-cache", "--address", "127.0.0.1", "--port", "0", "--restore"];
    let caps = "-sys_admin,-checkpoint_restore";
    for (shell, wanted) in [
        (
            &*format!("exec setpriv --bounding-set {caps} --inh-caps {caps} \"$@\""),
            "clone3_set_tid (see crtool check): ",
        ),
        ("exec \"$@\" -- --action-script /no/such/script", "start of action script /no/such/script: "),
    ] {
        let inner = site.crtool("dst", &words);
        // With pids of its own, like another host.
        let mut command = Command::new("unshare");
        command.args(["-pf", "--mount-proc", "--kill-child", "sh", "-c", shell, "sh"]);
        command.arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
        let cache = site.daemon("dst", &mut command);
        let to = format!("127.0.0.1:{}", cache.port());
        let error = refused(&site, &mut site.crtool("src", &["migrate", "-t", &pid, "--to", &to])).failed();
        assert!(error.contains("the destination lacks what the tree needs: "), "{error}");
        assert!(error.contains(wanted), "{error}");
    }
    // What is no option is known before anybody comes.
    let error = Site::run(site.crtool("dst", &words).args(["--", "--no-such-option"])).failed();
    let wanted = "options of the restores that image-cache starts: ";
    assert!(error.contains(wanted) && error.contains("no-such-option"), "{error}");
    site.end();
}

/// More than the cache has room for.
pub fn too_little_memory() {
    let mut site = Site::new(Memory::Noise);
    let cache = site.cache(&["--max-memory", "3M", "--max-per-source", "3M"]);
    let port = cache.port().to_string();
    let _proxy = site.proxy(cache.port(), NONE);
    for words in [&["--address", "127.0.0.1", "--port", &port][..], NONE] {
        let error = refused(&site, &mut site.dump(words)).failed();
        assert!(error.contains("snapshot default is not taken: "), "{error}");
    }
    site.end();
}

/// A dump that has its turn and begins nothing before `go` is there.
struct Slow {
    child: Child,
    go: std::path::PathBuf,
}

impl Slow {
    fn start(site: &Site, words: &[&str]) -> Self {
        let (go, begun) = (site.path().join("go"), site.path().join("begun"));
        let script = site.path().join("slow").display().to_string();
        let made = format!(
            "cat > {script} <<'END'; chmod 755 {script}\n#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = pre-dump ] || exit 0\n\
             touch {}\nwhile ! [ -e {} ]; do sleep 0.02; done\nEND",
            begun.display(),
            go.display()
        );
        assert!(Command::new("sh").args(["-c", &made]).status().unwrap().success());
        let words = [&["--timeout", "60", "--action-script", &script], words].concat();
        let child = site.dump(&words).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("the first dump does not begin", || begun.exists().then_some(()));
        Self { child, go }
    }

    fn ended(mut self) -> (Option<i32>, String) {
        fs::write(&self.go, "").unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

/// A dump that says that it waits, and its other lines.
fn waiting(command: &mut Command) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("waiting for its turn at ") {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "it does not wait");
    }
    assert!(line.contains("127.0.0.1") && line.contains(": 1 before it; the tree runs on"), "{line}");
    (child, lines)
}

/// One after another: who waits runs, may give up, and has its turn when the first one has all of it there.
pub fn turns() {
    for proxied in [false, true] {
        let (mut one, mut two) = (Site::new(Memory::Text), Site::new(Memory::Text));
        let cache = one.cache(NONE);
        let port = cache.port().to_string();
        let _proxy = proxied.then(|| two.proxy(cache.port(), NONE));
        let direct = ["--address", "127.0.0.1", "--port", &port];
        let slow = Slow::start(&one, &direct);
        let other = [&["-D", "other", "-R"][..], if proxied { NONE } else { &direct }].concat();

        let ((), stopped) = watched(&two, || {
            let (mut child, mut lines) = waiting(&mut two.dump(&other));
            two.counts();
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
            let mut rest = String::new();
            lines.read_to_string(&mut rest).unwrap();
            assert!(!child.wait().unwrap().success(), "{rest}");
        });
        assert!(!stopped);
        two.counts();

        let (mut child, mut lines) = waiting(&mut two.dump(&other));
        let (code, said) = slow.ended();
        assert_eq!(code, Some(0), "{said}");
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{rest}");
        one.restore_and_end();
        two.end();
    }
}

/// The first one does nothing with its turn: others go on before it, and it is not forgotten for that.
pub fn a_turn_that_is_not_used() {
    let (mut one, mut two) = (Site::new(Memory::Text), Site::new(Memory::Text));
    let cache = one.cache(&["--timeout", "3"]);
    let port = cache.port().to_string();
    let direct = ["--address", "127.0.0.1", "--port", &port];
    let slow = Slow::start(&one, &direct);
    let begun = Instant::now();
    let (mut child, mut lines) = waiting(&mut two.dump(&[&["-D", "other", "-R"], &direct[..]].concat()));
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{rest}");
    assert!(begun.elapsed() > Duration::from_secs(1));
    let (code, said) = slow.ended();
    assert_eq!(code, Some(0), "{said}");
    one.restore_and_end();
    two.end();
}
