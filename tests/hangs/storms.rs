//! Trees that change all the time, dumped again and again while they run on.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;

use crate::{
    reaper::End,
    site::{Site, Trouble, fail, signal},
};

const LIMIT: Duration = Duration::from_secs(5);
const SECONDS: &str = "5";
/// Dumps of each tree.
const DUMPS: usize = 60;

pub fn exec_by_thread(site: &mut Site) -> Result<(), Trouble> {
    storm(site, "exec-thread")
}

pub fn exec_by_leader(site: &mut Site) -> Result<(), Trouble> {
    storm(site, "exec-leader")
}

pub fn threads(site: &mut Site) -> Result<(), Trouble> {
    storm(site, "threads")
}

pub fn processes(site: &mut Site) -> Result<(), Trouble> {
    storm(site, "processes")
}

/// Every dump succeeds.
fn storm(site: &mut Site, kind: &str) -> Result<(), Trouble> {
    site.start(kind)?;
    site.hold();
    for number in 0..Site::times(DUMPS) {
        // A check passes over who is gone before it is looked at, and says so.
        let (what, done) = match number % 4 {
            3 => ("check", site.check(&["--timeout", SECONDS])?),
            _ => ("dump", site.dump(&["-R", "--timeout", SECONDS])?),
        };
        done.succeeded(&format!("{what} {number}, after {:?}", done.took))?;
        done.in_time(LIMIT)?;
        site.works()?;
    }
    Ok(())
}

/// Somebody stops and continues the tree all the time: a dump succeeds, or says in time that it cannot.
pub fn stops(site: &mut Site) -> Result<(), Trouble> {
    site.start("computing")?;
    let (pid, over) = (site.pid, AtomicBool::new(false));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            let all = [Signal::SIGSTOP, Signal::SIGCONT, Signal::SIGTSTP, Signal::SIGCONT];
            for (number, stop) in all.into_iter().cycle().enumerate() {
                if over.load(Ordering::Relaxed) {
                    return signal(pid, Signal::SIGCONT);
                }
                signal(pid, stop);
                thread::sleep(Duration::from_micros(50 + number as u64 % 700));
            }
        });
        let run = || {
            for number in 0..Site::times(DUMPS) {
                let limit = ["--timeout", "2"];
                let done = match number % 4 {
                    3 => site.check(&limit)?,
                    _ => site.dump(&[&["-R"], &limit[..]].concat())?,
                };
                done.in_time(Duration::from_secs(2))?;
                if !matches!(done.end, End::Exited(0 | 1)) {
                    return fail(format!("dump {number}: {:?}\n{}", done.end, done.said));
                }
            }
            Ok(())
        };
        let result = run();
        over.store(true, Ordering::Relaxed);
        result
    });
    result?;
    site.works()
}
