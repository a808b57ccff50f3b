//! The last act: all go at once, and crtool looks once more whether they live.

use anyhow::{Context, Result, anyhow, bail};

use super::{RUNS, create::Construction, images::State};
use crate::{
    deadline,
    process_tree::ids::on_host,
    sys::{
        Errno,
        pid::{HostPid, NsPid},
        ptrace,
    },
    task::PendingStop,
    tracee::{Decision, KillGuard, Stage},
};

impl Construction<'_> {
    /// The last thing that can fail. Killed before its end, crtool leaves nothing of the tree; killed after it, or with
    /// whatever else goes wrong then, all of it.
    pub(super) fn commit(&mut self, decision: &Decision) -> Result<()> {
        let pids: Vec<HostPid> = self.alive().map(|t| on_host(t.pid)).collect();
        let kill_guard = KillGuard::arm(&pids, decision);
        // Who has no EXITKILL any more would run from the death of crtool on, until the kill_guard ends it.
        decision.advance(Stage::Begun).context("begin to release the tree")?;
        for tid in self.alive().flat_map(|t| &t.tids) {
            ptrace::set_options(on_host(*tid), 0).with_context(|| format!("release of thread {tid}"))?;
        }
        deadline::settle(RUNS, || decision.advance(Stage::LetGo)).context("release the tree")?;
        match kill_guard {
            Ok(kill_guard) => kill_guard.dismiss(),
            Err(error) => tracing::debug!("{:#}", anyhow!(error)),
        }
        self.puppets.release();
        Ok(())
    }

    /// Lets everybody go, also when that fails for one. Fails when a task is not there any more, or dies of a fault at once.
    pub(super) fn let_go(&self, stop_all: bool) -> Result<()> {
        let mut failed = None;
        let mut note = |result: Result<(), Errno>, what: &str, id: NsPid| {
            if let Err(e) = result {
                failed.get_or_insert_with(|| anyhow!(e).context(format!("{what} {id}")));
            }
        };
        for task in self.alive() {
            if stop_all && task.state != State::Stopped {
                note(crate::sys::task::kill(on_host(task.pid), libc::SIGSTOP), "stop of task", task.pid);
            }
        }
        // They could not be queued before, since nothing blocks them.
        for &(pid, tid, stop) in &self.pending_stops {
            match stop {
                PendingStop::Process => {
                    note(crate::sys::task::kill(on_host(pid), libc::SIGSTOP), "pending SIGSTOP of", pid);
                }
                PendingStop::Thread => note(
                    crate::sys::task::tgkill(on_host(pid), on_host(tid), libc::SIGSTOP),
                    "pending SIGSTOP of thread",
                    tid,
                ),
            }
        }
        for tid in self.alive().flat_map(|t| t.tids.iter().rev()) {
            match ptrace::detach(on_host(*tid), 0) {
                // Another thread, which runs already, has ended it: how, the next look tells.
                Err(Errno::ESRCH) => tracing::debug!("thread {tid} has ended already"),
                result => note(result, "detach of thread", *tid),
            }
        }
        failed.map_or(Ok(()), Err)?;
        self.look_again()
    }

    /// A tree that dies of a fault as soon as it runs has not been restored.
    fn look_again(&self) -> Result<()> {
        /// Signals by which the kernel ends who has done something that cannot be.
        const FAULTS: [i32; 6] =
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];
        for task in self.alive() {
            match super::who_is(task.pid) {
                Some(stat) => {
                    let signal = stat.exit_code & 0x7f;
                    let dead = matches!(
                        stat.state,
                        crate::proc::stat::State::Zombie | crate::proc::stat::State::Dead
                    );
                    if dead && FAULTS.contains(&signal) {
                        bail!("task {} died of signal {signal} as soon as it ran", task.pid);
                    }
                }
                None => tracing::debug!("task {} has ended already", task.pid),
            }
        }
        Ok(())
    }
}
