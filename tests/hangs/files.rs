//! Files whose file system does not answer.

use std::{fs, thread, time::Duration};

use nix::sys::signal::Signal;

use crate::{
    reaper::End,
    site::{Site, Trouble, fail, hangs, signal},
};

const LIMIT: Duration = Duration::from_secs(1);
const SECONDS: &str = "1";

pub fn cwd(site: &mut Site) -> Result<(), Trouble> {
    silent(site, "cwd", "at cwd of task")
}

pub fn open(site: &mut Site) -> Result<(), Trouble> {
    silent(site, "open", "/fuse/f)")
}

pub fn mapped(site: &mut Site) -> Result<(), Trouble> {
    silent(site, "mapped", "at a mapping of task")
}

pub fn program(site: &mut Site) -> Result<(), Trouble> {
    silent(site, "program", "at exe of task")
}

/// A target whose file does not answer: dump and check end in time, and by a signal, and the target runs on.
fn silent(site: &mut Site, kind: &str, place: &str) -> Result<(), Trouble> {
    site.mount()?;
    site.start(kind)?;
    // While it answers, nothing is wrong.
    site.dump(&["-R"])?.succeeded("dump -R")?;
    site.works()?;
    site.silence(true)?;
    let limit = ["--timeout", SECONDS];
    site.dump(&limit)?.failed_in_time(LIMIT, &["--timeout", place])?;
    site.works()?;
    let checked = site.check(&limit)?;
    checked.failed_in_time(LIMIT, &["--timeout", place])?;
    site.works()?;
    for asked in [Signal::SIGTERM, Signal::SIGINT] {
        let tool = site.begin_dump(&["--timeout", "0"])?;
        site.until("crtool hangs", || hangs(tool.pid))?;
        // It hangs for good, not for a moment.
        thread::sleep(Duration::from_millis(300));
        site.asked_to_end(tool, asked)?;
        site.works()?;
    }
    // And a kill that nobody can prepare for: also then the tree is let go, whatever hangs.
    let tool = site.begin_dump(&["--timeout", "0"])?;
    site.until("crtool hangs", || hangs(tool.pid))?;
    signal(tool.pid, Signal::SIGKILL);
    let done = site.end(tool)?;
    if done.end != End::Killed(libc::SIGKILL) {
        return fail(format!("killed, it ended with {:?}", done.end));
    }
    site.works()?;
    site.silence(false)?;
    site.dump(&["-R"])?.succeeded("dump -R, when the file system answers again")?;
    site.works()
}

/// A task that itself waits for the file system cannot be stopped.
pub fn waiting(site: &mut Site) -> Result<(), Trouble> {
    site.mount()?;
    site.start("waiting")?;
    site.silence(true)?;
    fs::write(site.dir.join("silent"), "").map_err(|e| e.to_string())?;
    site.until("a task waits", || site.dir.join("asking").exists())?;
    thread::sleep(Duration::from_millis(100));
    let done = site.dump(&["--timeout", SECONDS])?;
    // Interruptible at first, as FUSE waits, it may be stopped, and then is like any other.
    if done.end != End::Exited(0) {
        done.failed_in_time(LIMIT, &["sleeps in the kernel"])?;
        site.works()?;
    }
    Ok(())
}

/// The images are to be, or are, where nobody answers.
pub fn images(site: &mut Site) -> Result<(), Trouble> {
    site.mount()?;
    site.start("plain")?;
    site.silence(true)?;
    site.images = site.dir.join("fuse");
    for words in [["dump", "-R"], ["restore", "-d"]] {
        let pid = site.pid.to_string();
        let root = if words[0] == "dump" { &["-t", &pid][..] } else { &[] };
        let limit = ["--timeout", SECONDS];
        site.run(&[&words, root, &limit[..]].concat())?.failed_in_time(LIMIT, &["--timeout"])?;
        let tool = site.begin(&[&words, root, &["--timeout", "0"]].concat())?;
        site.until("crtool hangs", || hangs(tool.pid))?;
        signal(tool.pid, Signal::SIGTERM);
        // Nothing has begun: it ends as any program does.
        let done = site.end(tool)?;
        if done.end != End::Killed(libc::SIGTERM) {
            return fail(format!("asked to end, it ended with {:?}: {}", done.end, done.said));
        }
        site.works()?;
    }
    Ok(())
}

/// The file system is a task of the tree: frozen with it, it cannot answer.
pub fn server_in_the_tree(site: &mut Site) -> Result<(), Trouble> {
    if !crate::fuse::available() {
        return Err(Trouble::Skip("no /dev/fuse".into()));
    }
    site.start("server")?;
    let file = site.dir.join("fuse/f");
    site.until("the file system is there", || file.exists())?;
    thread::sleep(Duration::from_millis(100));
    for _ in 0..3 {
        let done = site.dump(&["--timeout", SECONDS])?;
        done.in_time(LIMIT)?;
        if done.end != End::Exited(1) {
            return fail(format!("a tree with its own file system was dumped: {:?} {}", done.end, done.said));
        }
        site.works()?;
        site.until("the file system answers", || fs::read(&file).is_ok())?;
    }
    Ok(())
}

pub fn restore_open(site: &mut Site) -> Result<(), Trouble> {
    restore(site, "open")
}

pub fn restore_cwd(site: &mut Site) -> Result<(), Trouble> {
    restore(site, "cwd")
}

pub fn restore_mapped(site: &mut Site) -> Result<(), Trouble> {
    restore(site, "mapped")
}

/// The file does not answer when the tree is to be restored: nothing is left, and it works when it answers again.
fn restore(site: &mut Site, kind: &str) -> Result<(), Trouble> {
    site.mount()?;
    site.start(kind)?;
    site.dump_and_kill()?;
    site.silence(true)?;
    let done = site.run(&["restore", "-d", "--timeout", SECONDS])?;
    done.failed_in_time(LIMIT, &["--timeout"])?;
    site.nothing_left(&[site.fuse])?;
    let tool = site.begin(&["restore", "-d", "--timeout", "0"])?;
    site.until("crtool hangs", || hangs(tool.pid))?;
    site.asked_to_end(tool, Signal::SIGTERM)?;
    site.nothing_left(&[site.fuse])?;
    site.silence(false)?;
    site.run(&["restore", "-d"])?.succeeded("restore")?;
    site.works()
}
