//! The second act: all processes exist; they join their groups, go to their parents, and those that are not to live end.
//!
//! Helpers end first (see `process_tree/fork_plan.rs`), then the tasks that were zombies, each by the signal or with the status
//! that its parent is going to be told.

use anyhow::{Context, Result};

use super::{create::Construction, images::State};
use crate::{
    process_tree::{Move, ids::on_host},
    sys::pid::NsPid,
    tracee::{List, Want},
};

const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const SIG_SETMASK: u64 = 2;

impl Construction<'_> {
    /// Everybody to where it belongs.
    pub(super) fn moves(&mut self) -> Result<()> {
        for step in self.forks.moves.clone() {
            match step {
                Move::Join { who, group } => {
                    let args = [0, u64::from(group.bits()), 0, 0, 0, 0];
                    let name = format!("setpgid({group})");
                    self.puppets.call_between(on_host(self.pid(who)?), &name, libc::SYS_setpgid, args)?;
                }
                Move::Adopt { by, from } => {
                    self.subreaper(by, true)?;
                    self.end_helper(from)?;
                    self.subreaper(by, false)?;
                }
                Move::End { who } => self.end_helper(who)?,
            }
        }
        for index in 0..self.images.tasks.len() {
            if let Some(State::Zombie(status)) = self.task_of(index).map(|t| t.state) {
                self.end_zombie(self.pid(index)?, status)?;
            }
        }
        self.puppets.settle()
    }

    fn subreaper(&mut self, index: usize, on: bool) -> Result<()> {
        let args = [PR_SET_CHILD_SUBREAPER, u64::from(on), 0, 0, 0, 0];
        self.puppets.call_between(on_host(self.pid(index)?), "PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, args)
    }

    /// Lets a helper end; helpers that were its children have ended before.
    fn end_helper(&mut self, index: usize) -> Result<()> {
        let pid = self.pid(index)?;
        let mut list = List::new(format!("end of {pid}"));
        self.plan_reaping(index, &mut list)?;
        list.call("exit_group", libc::SYS_exit_group, &[0u64.into()], Want::Any);
        self.puppets.next_list(on_host(pid), &list)?;
        self.puppets.end(on_host(pid), None)?;
        self.puppets.settle()
    }

    /// Adds the calls by which process `index` asks for the ends of helpers that are its children.
    pub(super) fn plan_reaping(&self, index: usize, list: &mut List) -> Result<()> {
        let helper = |other: &usize| {
            let process = self.forks.processes.get(*other);
            process.is_some_and(|p| p.parent == Some(index) && p.task.is_none())
        };
        for other in (self.images.tasks.len()..self.forks.processes.len()).filter(helper) {
            let pid = self.pid(other)?;
            let args = [pid.into(), 0u64.into(), libc::__WALL.into(), 0u64.into()];
            list.call(format!("wait4 for helper {pid}"), libc::SYS_wait4, &args, Want::OkRetry);
        }
        Ok(())
    }

    /// Lets a task end with this wait status.
    fn end_zombie(&mut self, pid: NsPid, status: i32) -> Result<()> {
        let mut list = List::new(format!("end of {pid}"));
        let signal = status & 0x7f;
        if signal != 0 {
            // Signals that we ignore, it ignores; and it must not leave a core file a second time.
            let default = list.value(&[0u64; 4]);
            let open = list.value(&0u64);
            let args = [signal.into(), default.into(), 0u64.into(), 8u64.into()];
            list.call("rt_sigaction(SIG_DFL)", libc::SYS_rt_sigaction, &args, Want::Any);
            list.call("PR_SET_DUMPABLE", libc::SYS_prctl, &[PR_SET_DUMPABLE.into(), 0u64.into()], Want::Zero);
            let args = [SIG_SETMASK.into(), open.into(), 0u64.into(), 8u64.into()];
            list.call("rt_sigprocmask", libc::SYS_rt_sigprocmask, &args, Want::Zero);
            list.call("kill", libc::SYS_kill, &[pid.into(), signal.into()], Want::Zero);
        }
        // After a signal this is not reached.
        let code = (status >> 8) & 0xff;
        list.call("exit_group", libc::SYS_exit_group, &[code.into()], Want::Any);
        self.puppets.next_list(on_host(pid), &list).context("a zombie that was not made")?;
        self.puppets.end(on_host(pid), (signal != 0).then_some(signal))
    }
}
