//! `kill -9` of crtool at each of its system calls in turn, where it decides what becomes of the tree.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use crate::reaper::End;
use crate::site::{Run, Site, processes};
use crate::stepper::Stepper;
use crate::target::IDLE;

/// Exit status of a stepper whose tool has come to its end by itself.
const ENDED: u8 = 3;
/// Whatever becomes of a tree becomes of it within this time.
const LIMIT: Duration = Duration::from_secs(60);

/// The stepper: runs the command of its arguments after the first under ptrace. From when the file that the first one
/// names is there, it counts returns from system calls, and kills the tool at the one asked for.
pub fn main(at: &str) -> ExitCode {
    let at: usize = at.parse().expect("FAULTS_STEPPER");
    let mut words = env::args_os().skip(1);
    let from = PathBuf::from(words.next().expect("a file"));
    let mut command = Command::new(words.next().expect("a tool"));
    let mut tool = Stepper::start(command.args(words).env_remove("FAULTS_STEPPER"));
    let mut stops = 0;
    loop {
        match tool.step() {
            Some(0) => return ExitCode::from(ENDED),
            Some(status) => panic!("the tool ends with status {status}"),
            None if stops > 0 || from.exists() => stops += 1,
            None => {}
        }
        // The first is a return from the call that made the file; entries and returns take turns.
        if stops == 2 * at - 1 {
            tool.kill();
            return ExitCode::SUCCESS;
        }
    }
}

/// A dump that is to end the tree is killed after its images are complete: all of the tree runs, or nothing of it.
pub fn end_of_dump(site: &mut Site) -> Result<(), String> {
    let tree = family()?;
    let (mut gone, mut runs) = (0, 0);
    for at in 1.. {
        let images = site.fresh("images")?;
        let pid = site.pid.to_string();
        let run = site.begin_stepped(
            &images.join("inventory.img"),
            at,
            &["dump", "-t", &pid, "--timeout", "100"],
            &images,
        )?;
        let (ended, when) = stepped(run.end()?, at)?;
        if nothing_or_all(site, &tree).map_err(|text| format!("{when}: {text}"))? {
            gone += 1;
            site.restore(&images).map_err(|text| format!("{when}: {text}"))?;
        } else {
            runs += 1;
        }
        // Then it only waits for the dead.
        if ended || gone == 40 {
            break;
        }
    }
    if gone < 5 || runs < 2 {
        return Err(format!("{runs} trees ran on and {gone} were gone: the kills did not come at the end"));
    }
    site.finish()
}

/// A restore is killed after the tree is complete: all of it runs, or nothing is left.
pub fn end_of_restore(site: &mut Site) -> Result<(), String> {
    let tree = family()?;
    let images = site.fresh("images")?;
    site.dump_and_kill(&images)?;
    let pidfile = site.dir.join("pidfile");
    let words = ["restore", "-d", "--pidfile", "pidfile", "--timeout", "100"];
    let (mut gone, mut runs) = (0, 0);
    for at in 1.. {
        let _ = fs::remove_file(&pidfile);
        let (ended, when) = stepped(site.begin_stepped(&pidfile, at, &words, &images)?.end()?, at)?;
        if nothing_or_all(site, &tree).map_err(|text| format!("{when}: {text}"))? {
            gone += 1;
        } else {
            runs += 1;
        }
        site.clear()?;
        // Then it only cleans up.
        if ended || runs == 20 {
            break;
        }
    }
    if gone < 5 || runs < 5 {
        return Err(format!("{runs} trees ran and {gone} were gone: the kills did not come at the end"));
    }
    site.restore(&images)?;
    site.finish()
}

/// The tree, as soon as it is complete: the root, its echo, and the idle ones.
pub fn family() -> Result<Vec<i32>, String> {
    let begin = Instant::now();
    loop {
        let tree = processes();
        if tree.len() == 2 + IDLE {
            return Ok(tree);
        }
        if begin.elapsed() > LIMIT {
            return Err(format!("the tree is not complete: {tree:?}"));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a tool came to its end before it was killed; and when that was, in words.
pub fn stepped(run: Run, at: usize) -> Result<(bool, String), String> {
    match run.end {
        End::Exited(0) => Ok((false, format!("killed after call {at}"))),
        End::Exited(status) if status == i32::from(ENDED) => Ok((true, "at its end".to_owned())),
        end => Err(format!("call {at}: {end:?}: {}", run.said)),
    }
}

/// Whether nothing remains of the tree; `false` when all of it works.
pub fn nothing_or_all(site: &Site, tree: &[i32]) -> Result<bool, String> {
    let begin = Instant::now();
    let mut last = String::new();
    loop {
        let now = processes();
        if now.is_empty() {
            return Ok(true);
        }
        if now == tree {
            match site.works() {
                Ok(()) => return Ok(false),
                Err(text) => last = text,
            }
        }
        if begin.elapsed() > LIMIT {
            return Err(format!("of {tree:?} there is {now:?}, neither gone nor at work: {last}"));
        }
        thread::sleep(Duration::from_millis(2));
    }
}
