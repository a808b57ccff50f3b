//! Pids that a restore needs: free, about to be, or taken.
//!
//! A dump on the same machine may have killed the tree a moment ago. Its tasks are dying then, or dead until their
//! parents ask for them, and even after that the kernel keeps a pid for a moment in which no task has it.
//! All that is waited for. Whoever lives on a pid is named.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::{
    interrupt,
    proc::{stat, status},
};

/// How long a killed task may take to die and to be reaped by its parent: init on some machines needs a second.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between a deadly signal and the end of a task are moments at which neither can be seen.
const BLINK: Duration = Duration::from_millis(50);
const PF_EXITING: u32 = 4;

/// Who has a pid.
#[derive(Debug, PartialEq, Eq)]
enum Holder {
    /// No task; still it may be taken, as a group or a session.
    Nobody,
    /// A task that is dead, or has been killed.
    Dying,
    Living,
}

fn holder(pid: i32) -> Holder {
    let Some(stat) = who_is(pid) else { return Holder::Nobody };
    let dead = matches!(stat.state, stat::State::Zombie | stat::State::Dead);
    if dead || stat.flags & PF_EXITING != 0 || killed(pid) { Holder::Dying } else { Holder::Living }
}

/// Whether SIGKILL waits for the task.
fn killed(pid: i32) -> bool {
    let Ok(bytes) = std::fs::read(format!("/proc/{pid}/status")) else { return true };
    status::parse(&bytes).is_ok_and(|s| (s.sigpnd | s.shdpnd) >> (libc::SIGKILL - 1) & 1 == 1)
}

fn who_is(pid: i32) -> Option<stat::Stat> {
    stat::parse(&std::fs::read(format!("/proc/{pid}/stat")).ok()?).ok()
}

/// Waits until no task has `pid`; an error names the one that keeps it.
pub(super) fn wait_for(pid: i32) -> Result<()> {
    let begun = Instant::now();
    while holder(pid) != Holder::Nobody {
        after_refusal(pid, begun)?;
    }
    Ok(())
}

/// `pid` could not be had, for the first time at `begun`. Returns a moment later if another attempt is worth it.
pub(super) fn after_refusal(pid: i32, begun: Instant) -> Result<()> {
    let patience = if holder(pid) == Holder::Living { BLINK } else { PATIENCE };
    if begun.elapsed() > patience {
        return Err(taken(pid));
    }
    interrupt::check()?;
    std::thread::sleep(Duration::from_millis(1));
    Ok(())
}

/// Who keeps a pid.
fn taken(pid: i32) -> anyhow::Error {
    match who_is(pid) {
        Some(stat) => {
            let name = String::from_utf8_lossy(&stat.comm).into_owned();
            let how = match holder(pid) {
                Holder::Living => "",
                _ if matches!(stat.state, stat::State::Zombie) => " (dead, not reaped by its parent yet)",
                _ => " (killed, but not dead yet)",
            };
            anyhow!("pid {pid} is taken by {name}{how}, child of {}; end it first", stat.ppid)
        }
        None => anyhow!("pid {pid} is taken: still in use as a thread, process group or session"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_living_are_named() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let error = wait_for(child.id().cast_signed()).unwrap_err();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(error.to_string().contains("is taken by sleep, child of"), "{error}");
    }

    /// One whose end takes a while, for all its memory.
    #[test]
    fn the_dying_are_waited_for() {
        for _ in 0..3 {
            let mut command = Command::new("tail");
            command.args(["-c", "100000000"]).stdin(Stdio::piped()).stdout(Stdio::null());
            let mut child = command.spawn().unwrap();
            let pid = child.id().cast_signed();
            let mut input = child.stdin.take().unwrap();
            for _ in 0..90 {
                input.write_all(&[0; 1 << 20]).unwrap();
            }
            child.kill().unwrap();
            // Whichever comes first, it is no living task that is in the way.
            assert_ne!(holder(pid), Holder::Living);
            let reaper = std::thread::spawn(move || child.wait());
            wait_for(pid).unwrap();
            reaper.join().unwrap().unwrap();
        }
    }
}
