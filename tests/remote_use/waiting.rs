//! Restores that wait, dumps that fail meanwhile or before, and daemons that are told to end.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    certificates::Ca,
    program::Memory,
    site::{PATIENCE, Site, wait_for},
};

const NONE: &[&str] = &[];

/// A restore that has not ended.
struct Waiting {
    child: Child,
    begin: Instant,
}

impl Waiting {
    fn start(site: &Site, more: &[&str]) -> Self {
        let words = [&["restore", "--remote", "-d"], more].concat();
        let child = site.crtool("dst", &words).stderr(Stdio::piped()).spawn().unwrap();
        Self { child, begin: Instant::now() }
    }

    /// What it says until it ends, and its status.
    fn ended(mut self) -> (Option<i32>, Vec<String>, Duration) {
        let lines = BufReader::new(self.child.stderr.take().unwrap()).lines().map_while(Result::ok).collect();
        let code = wait_for("a restore does not end", || self.child.try_wait().unwrap()).code();
        assert!(self.begin.elapsed() < PATIENCE);
        (code, lines, self.begin.elapsed())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said(lines: &[String], word: &str) -> Vec<String> {
    lines.iter().filter(|line| line.starts_with(word)).cloned().collect()
}

/// A dump that fails after it has begun: an action script of it does not like what it sees.
fn failing(site: &Site, more: &[&str]) -> String {
    let words = [&["--action-script", "false"], more].concat();
    let error = Site::run(&mut site.dump(&words)).failed();
    assert!(error.contains("false"), "{error}");
    site.counts();
    error
}

/// Whoever waits for a dump that fails hears why, and how the tree is, and goes on waiting for the next one.
pub fn the_dump_fails() {
    for proxied in [true, false] {
        let mut site = Site::new(Memory::Text);
        let cache = site.cache(NONE);
        let port = cache.port().to_string();
        let direct = ["--address", "127.0.0.1", "--port", &port];
        let proxy = proxied.then(|| site.proxy(cache.port(), NONE));
        let restore = Waiting::start(&site, NONE);
        wait_for("nobody waits", || {
            let fds = std::fs::read_dir(format!("/proc/{}/fd", restore.child.id())).ok()?;
            fds.flatten().find(|fd| {
                std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
            })
        });
        // It may have connected and not asked yet.
        thread::sleep(Duration::from_millis(100));
        let way = if proxied { NONE } else { &direct };
        failing(&site, way);
        Site::run(&mut site.dump(way)).succeeded();
        site.reap();
        let (code, lines, _) = restore.ended();
        assert_eq!((code, said(&lines, "Error").len()), (Some(0), 0), "{lines:?}");
        let warnings = said(&lines, "Warn");
        let failed: Vec<&String> = warnings.iter().filter(|line| line.contains("default failed")).collect();
        assert_eq!(failed.len(), 1, "{lines:?}");
        for part in ["the dump failed and the tree runs on: ", "false", "; waiting for the next one"] {
            assert!(failed[0].contains(part), "{lines:?}");
        }
        site.counts();
        drop(proxy);
        site.end();
    }
}

/// Who comes later may wait for the next one, and is told so; it is told what became of the last one.
pub fn the_dump_has_failed() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(NONE);
    let _proxy = site.proxy(cache.port(), NONE);
    failing(&site, NONE);
    let (code, lines, took) = Waiting::start(&site, &["--timeout", "2"]).ended();
    let (warnings, errors) = (said(&lines, "Warn"), said(&lines, "Error"));
    assert_eq!((code, warnings.len(), errors.len()), (Some(1), 1, 1), "{lines:?}");
    let wanted =
        "waiting at most 2 s (--timeout) for a snapshot default to come; the last one of that name is FAILED";
    assert!(warnings[0].contains(wanted), "{lines:?}");
    assert!(warnings[0].contains("false"), "{lines:?}");
    assert!(errors[0].contains("no snapshot default has come in 2 s"), "{lines:?}");
    assert!((2..20).contains(&took.as_secs()), "{took:?}");
    // The next one comes.
    let restore = Waiting::start(&site, NONE);
    Site::run(&mut site.dump(NONE)).succeeded();
    site.reap();
    let (code, lines, _) = restore.ended();
    assert_eq!(code, Some(0), "{lines:?}");
    site.counts();
    site.end();
}

/// Daemons that have nothing to do end without an error, whichever is first.
pub fn daemons_end() {
    for (proxy_first, tls) in [(false, false), (true, false), (false, true)] {
        let mut site = Site::new(Memory::Text);
        let ca = Ca::new(site.path());
        let member = |serial| if tls { ca.member(serial) } else { Vec::new() };
        let mut cache = site.cache(&member(1));
        let mut proxy = site.proxy(cache.port(), &member(2));
        proxy.says("connected to crtool");
        if proxy_first {
            // Also after work that is done.
            Site::run(&mut site.dump(NONE)).succeeded();
            site.restore_and_end();
            assert_eq!(proxy.stop(), Some(0), "{}", proxy.log());
            assert_eq!(cache.stop(), Some(0), "{}", cache.log());
        } else {
            assert_eq!(cache.stop(), Some(0), "{}", cache.log());
            proxy.says("has closed the connection; nothing was on its way");
            assert_eq!(proxy.stop(), Some(0), "{}", proxy.log());
            site.end();
        }
        for daemon in [&cache, &proxy] {
            let odd: Vec<String> = daemon
                .log()
                .lines()
                .filter(|l| l.contains("Error (") || l.contains("Warn "))
                .map(str::to_owned)
                .collect();
            assert_eq!(odd, Vec::<String>::new());
        }
    }
}

/// Who sits in front of a terminal sees what goes on for more than a second; a file gets no line of that.
pub fn on_a_terminal() {
    const WORDS: [&str; 4] = ["restore", "--remote", "--timeout", "2"];
    const SHOWN: &str = "waiting for the snapshot";
    let site = Site::new(Memory::Noise);
    let _cache = site.cache(NONE);
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut child = site.crtool("dst", &WORDS).stderr(pty.slave).spawn().unwrap();
    let mut seen = String::new();
    let mut terminal = std::fs::File::from(pty.master);
    let mut some = [0; 4096];
    // An error: nobody has the other end any more.
    while let Ok(read) = terminal.read(&mut some) {
        seen += &String::from_utf8_lossy(&some[..read]);
    }
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let (last, error) = (seen.rfind(SHOWN), seen.find("no snapshot default has come"));
    assert!(last.is_some() && last < error, "{seen}");
    assert!(seen[last.unwrap()..].contains('\r'), "the line stays: {seen}");

    let piped = site.crtool("dst", &WORDS).output().unwrap();
    assert!(!String::from_utf8_lossy(&piped.stderr).contains(SHOWN));
}

/// An action script that does something when all images are there.
fn script(site: &Site, line: &str) -> String {
    let script = site.path().join("script").display().to_string();
    // By another process: what a child of ours had open for a moment could not be run (ETXTBSY).
    let made = format!(
        "cat > {script} <<'END'; chmod 755 {script}\n#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-dump ] || exit 0\n{line}\nEND"
    );
    assert!(Command::new("sh").args(["-c", &made]).status().unwrap().success());
    script
}

/// Whoever carried the images or has them is killed while the script works: nobody would ever restore them, so the
/// tree runs on.
pub fn killed_in_a_script() {
    for (proxied, victim) in [(true, "proxy"), (true, "cache"), (false, "cache")] {
        let mut site = Site::new(Memory::Text);
        let cache = site.cache(NONE);
        let port = cache.port().to_string();
        let proxy = site.proxy(cache.port(), NONE);
        let pid = if victim == "proxy" { proxy.pid() } else { cache.pid() };
        let script = script(&site, &format!("kill -KILL {pid}; sleep 0.5"));
        let direct = ["--address", "127.0.0.1", "--port", &port];
        let words = [&["--action-script", &script][..], if proxied { NONE } else { &direct }].concat();
        let ended = Site::run(&mut site.dump(&words));
        let error = ended.failed();
        assert!(error.contains("keep remote:default: "), "{error}");
        site.counts();
        site.end();
    }
}

/// A script after the last image takes its time, and the dump is told to end meanwhile: the tree runs on, and what
/// has arrived is forgotten.
pub fn interrupted_in_a_script() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(NONE);
    let port = cache.port().to_string();
    let _proxy = site.proxy(cache.port(), NONE);
    let script = script(&site, "kill -TERM $PPID");
    let script = ["--action-script", &script];
    let direct = ["--address", "127.0.0.1", "--port", &port];
    let images = site.work("images").display().to_string();
    let local = ["-D", &images];
    let pid = site.pid.to_string();
    for words in [
        [&["dump", "--remote", "-t", &pid][..], &script].concat(),
        [&["dump", "--remote", "-t", &pid][..], &script, &direct].concat(),
        [&["dump", "-t", &pid][..], &script, &local].concat(),
    ] {
        let error = Site::run(&mut site.crtool("src", &words)).failed();
        assert!(error.contains("interrupted by SIGTERM"), "{error}");
        site.counts();
    }
    let held = site.crtool("dst", &["image-cache", "list"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&held.stdout).lines().count(), 1);
    site.end();
}
