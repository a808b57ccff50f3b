//! Dumps and restores that do not run through: killed, interrupted, or told to leave the tree
//! stopped. Whatever the moment, the tree is whole: it runs on as it was, or is not there at all.

use std::time::{Duration, Instant};

use super::{STEP_LIMIT, Step, Stop, Trial, ensure, whereabouts};
use crate::picture::{Picture, tree_below};
use crate::sys;

/// Moments tried between the start of a run and a bit beyond its usual end.
const MOMENTS: u32 = 16;

impl Trial {
    /// `dump -s` leaves every task stopped and nothing else changed; SIGCONT sets it going.
    pub(super) fn left_stopped(&mut self) -> Step {
        let before = self.settled_picture()?;
        let images = self.images("img")?;
        let run = self.dump(&images, &["-s"])?;
        ensure(run.succeeded(), || format!("dump -s failed: {}", run.tail()))?;
        let tree: Vec<i32> = [self.root].into_iter().chain(tree_below(self.root)).collect();
        for &pid in &tree {
            let until = Instant::now() + STEP_LIMIT;
            while !matches!(sys::stat_field(pid, 3).as_str(), "T" | "Z") {
                ensure(Instant::now() < until, || {
                    format!("after dump -s it is not stopped: {}", whereabouts(pid))
                })?;
            }
        }
        // A call that changes the mask while it sleeps is left for the time being.
        self.compare_but(&before, "after dump -s", &["/state", "/SigBlk"])?;
        for pid in tree {
            if !before.says(&format!("{pid}/{pid}/state"), "T") {
                sys::kill(pid, libc::SIGCONT);
            }
        }
        self.settle(&before, "after dump -s and SIGCONT", &[])?;
        self.finish("tree after dump -s")
    }

    /// Dumps, then restores, each disturbed by a signal at many moments; after all of them the
    /// tree still goes through an undisturbed dump and restore, and passes.
    pub(super) fn disturbed(&mut self, signals: &[i32]) -> Step {
        let before = self.settled_picture()?;
        let images = self.images("first")?;
        let start = Instant::now();
        let run = self.dump(&images, &["-R"])?;
        let usual = start.elapsed();
        ensure(run.succeeded(), || format!("dump -R failed: {}", run.tail()))?;
        // A killed crtool may leave one unused mapping, and a stopped task must run before it can
        // put its mask back; no more.
        let lenient: &[&str] = match signals {
            [libc::SIGKILL] if before.any_says("/state", "T") => &["/maps/", "/SigBlk"],
            [libc::SIGKILL] => &["/maps/"],
            _ => &[],
        };
        for moment in 0..MOMENTS {
            let after = usual * moment / (MOMENTS - 3);
            let images = self.images(&format!("dump{moment}"))?;
            let tool = self.mode.dumper().disturbed(pick(signals, moment), after);
            let flags = [self.case.flags, &["-R"]].concat();
            let run = tool.dump(&self.reaper, self.root, &images, &flags);
            self.settle(&before, &format!("after a dump disturbed at {after:?} ({:?})", run.ended), lenient)?;
            self.alive()?;
        }
        let images = self.images("whole")?;
        self.dump_and_kill(&images)?;
        let start = Instant::now();
        self.restore(&images)?;
        let usual = start.elapsed();
        self.settle(&before, "after the restore", lenient)?;
        let images = self.images("again")?;
        self.dump_and_kill(&images)?;
        for moment in 0..MOMENTS {
            let after = usual * moment / (MOMENTS - 3);
            let tool = self.mode.restorer().disturbed(pick(signals, moment), after);
            let run = tool.restore(&self.reaper, &images, self.case.flags);
            let when = format!("after a restore disturbed at {after:?} ({:?})", run.ended);
            if self.all_or_nothing(&before, &when, lenient)? {
                // It was through already: kill the tree, so that the next one can have its pids.
                for pid in [self.root].into_iter().chain(tree_below(self.root)) {
                    sys::kill(pid, libc::SIGKILL);
                }
                self.reaper.wait(self.root, STEP_LIMIT);
            }
            self.nothing_left()?;
            self.reaper.forget(self.root);
        }
        self.restore(&images)?;
        self.settle(&before, "after the last restore", lenient)?;
        self.finish("restored target")
    }

    /// Waits until the tree is as it was; tracees take a moment to go on after their tracer's death.
    fn settle(&self, before: &Picture, when: &str, lenient: &[&str]) -> Step {
        let until = Instant::now() + STEP_LIMIT;
        loop {
            match self.compare_but(before, when, lenient) {
                Ok(()) => return Ok(()),
                Err(Stop::Fail(text)) if Instant::now() > until => {
                    let ended = self.reaper.wait(self.root, Duration::ZERO);
                    let root = ended.map_or_else(|| whereabouts(self.root), |e| format!("{e:?}"));
                    return Err(Stop::Fail(format!("{text}\nroot task: {root}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Whether the whole tree is there; an error if only a part of it is.
    fn all_or_nothing(&self, before: &Picture, when: &str, lenient: &[&str]) -> Step<bool> {
        let until = Instant::now() + STEP_LIMIT;
        loop {
            if tree_below(sys::getpid()).is_empty() {
                return Ok(false);
            }
            let whole = self.compare_but(before, when, lenient);
            match whole {
                Ok(()) => return Ok(true),
                Err(Stop::Fail(text)) if Instant::now() > until => {
                    let left: Vec<String> = tree_below(sys::getpid()).into_iter().map(whereabouts).collect();
                    return Err(Stop::Fail(format!("{text}\nleft are {}", left.join("; "))));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn compare_but(&self, before: &Picture, when: &str, lenient: &[&str]) -> Step {
        let may_differ = [self.case.may_differ, lenient].concat();
        let differences = before.differences(&self.picture(), &may_differ);
        ensure(differences.is_empty(), || format!("{when} the tree is not as it was:\n{differences}"))
    }
}

fn pick(signals: &[i32], moment: u32) -> i32 {
    signals.iter().copied().cycle().nth(moment as usize).unwrap_or(libc::SIGKILL)
}
