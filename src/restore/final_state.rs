//! The fourth act: what nobody may touch afterwards. From here on every task is what it was, but for being held.
//!
//! For each thread the pending signals are queued: by itself, because only a task itself may be sent any siginfo, and by
//! calls that crtool makes one by one, because a list ends in a SIGSTOP, which takes back a SIGCONT that pends. Then
//! `dumpable` is set and the area unmapped, in this order and at the very end: what makes a task open to others of its
//! user comes when nothing of ours is executed in it any more.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{Task, create::Construction};
use crate::{
    deadline,
    image::pb,
    process_tree::ids::on_host,
    sys::{
        pid::{HostPid, NsPid},
        ptrace,
    },
    task::{self, call::Again},
};

/// How long a thread that has ended may be listed: until it gets a processor.
const END_PATIENCE: Duration = Duration::from_secs(5);

impl Construction<'_> {
    /// Signals, registers, masks, and the area gone.
    pub(super) fn final_state(&mut self) -> Result<()> {
        let tasks: Vec<&Task> = self.alive().collect();
        let mut calls = HashMap::new();
        for task in &tasks {
            let label = || format!("final state of task {}", task.pid);
            self.no_strangers(task).with_context(label)?;
            for (tid, core) in task.threads() {
                self.queue_signals(task.pid, tid, &core).with_context(label)?;
                if let Some(call) = self.call_again(on_host(tid), &core).with_context(label)? {
                    calls.insert(tid, call);
                }
            }
        }
        let mut cleared = HashSet::new();
        for task in &tasks {
            let label = || format!("final state of task {}", task.pid);
            let (area, at, len) = self.puppets.range_of(on_host(task.pid))?;
            if cleared.insert(area) {
                self.take_area(task, at, len).with_context(label)?;
            }
        }
        for task in &tasks {
            let label = || format!("final state of task {}", task.pid);
            for (tid, core) in task.threads() {
                self.pending_stops.extend(task::pending_stop(&core).map(|stop| (task.pid, tid, stop)));
                let thread = on_host(tid);
                if self.puppets.is_within_call(thread) {
                    self.puppets.stop_before_user_code(thread).with_context(label)?;
                }
                let mut state = task::final_state(&core).with_context(label)?;
                match calls.get(&tid) {
                    Some((call, result)) => call.enter(&mut state.regs, *result),
                    None => drop(state.enter_call(thread, &core)),
                }
                ptrace::set_regset(thread, ptrace::NT_X86_XSTATE, &state.xstate)
                    .with_context(|| format!("xsave area of thread {tid}"))?;
                ptrace::set_sigmask(thread, state.sigmask).with_context(label)?;
                ptrace::set_regs(thread, &state.regs)
                    .with_context(|| format!("registers of thread {tid}"))?;
            }
        }
        Ok(())
    }

    /// What can be told of it without any task.
    #[cfg(feature = "internals")]
    pub(super) fn rehearse_final_state(&self) -> Result<()> {
        for task in self.alive() {
            for (_, core) in task.threads() {
                for (info, _) in task::pending_signals(&core)? {
                    let _ = task::signal_of(&info);
                }
                let mut state = task::final_state(&core)?;
                if let Some(call) = task::call::again(&core, self.supervisor.elapsed()?)? {
                    let memory = u64::from(call.memory().is_some());
                    let _ = (call.number(), call.arguments(memory));
                    call.enter(&mut state.regs, 0);
                }
            }
            let _ = task::dumpable_to_set(task.dumpable)?;
        }
        Ok(())
    }

    /// No thread is there but those of the images: nobody executes anything in the area any more. Threads that filled memory
    /// are through with it, and need a moment to vanish.
    fn no_strangers(&self, task: &Task) -> Result<()> {
        let begun = Instant::now();
        let known: HashSet<HostPid> = task.tids.iter().copied().map(on_host).collect();
        loop {
            let dir =
                std::fs::read_dir(format!("/proc/{}/task", on_host(task.pid))).context("list of threads")?;
            let mut tids =
                dir.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok().map(HostPid::new));
            let Some(stranger) = tids.find(|tid| !known.contains(tid)) else { return Ok(()) };
            ensure!(begun.elapsed() < END_PATIENCE, "thread {stranger} should not be there any more");
            std::thread::sleep(Duration::from_micros(200));
            deadline::check()?;
        }
    }

    fn queue_signals(&mut self, pid: NsPid, tid: NsPid, core: &pb::CoreEntry) -> Result<()> {
        for (info, shared) in task::pending_signals(core)? {
            let signal = u64::from(task::signal_of(&info));
            let at = self.puppets.bytes(on_host(tid), &info)?;
            let (pid, thread) = (u64::from(pid.bits()), u64::from(tid.bits()));
            let (name, nr, args) = if shared {
                ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, [pid, signal, at.0, 0, 0, 0])
            } else {
                ("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, [pid, thread, signal, at.0, 0, 0])
            };
            let result = self.puppets.bare_call(on_host(tid), nr, args)?;
            ensure!(result == 0, "{name} of signal {signal} failed with error {}", -result);
        }
        Ok(())
    }

    /// Lets a thread be in a call again that waits for a while. Gives what the call has returned to us.
    fn call_again(&mut self, tid: HostPid, core: &pb::CoreEntry) -> Result<Option<(Again, i64)>> {
        let Some(call) = task::call::again(core, self.supervisor.elapsed()?)? else { return Ok(None) };
        let memory = match call.memory() {
            Some(bytes) => self.puppets.bytes(tid, &bytes)?.0,
            None => 0,
        };
        let result = self.puppets.interrupted_call(tid, call.number(), call.arguments(memory))?;
        tracing::debug!("thread {tid} is in call {} again: {result}", call.number());
        Ok(Some((call, result)))
    }

    /// Sets `dumpable` and unmaps the area.
    fn take_area(&mut self, task: &Task, at: u64, len: u64) -> Result<()> {
        let pid = on_host(task.pid);
        let dumpable = task.dumpable;
        let value = task::dumpable_to_set(dumpable)?;
        let prctl = |option: i32, value| [u64::from(option.cast_unsigned()), value, 0, 0, 0, 0];
        let has = self.puppets.bare_call(pid, libc::SYS_prctl, prctl(libc::PR_GET_DUMPABLE, 0))?;
        // It cannot be set to 2: where fs.suid_dumpable is 2, a change of credentials has done that, as at the source.
        if dumpable != 2 || has != 2 {
            let set = self.puppets.bare_call(pid, libc::SYS_prctl, prctl(libc::PR_SET_DUMPABLE, value))?;
            ensure!(set == 0, "PR_SET_DUMPABLE failed with error {}", -set);
            if dumpable == 2 {
                tracing::warn!("task {}: dumpable is 0 instead of 2: no core file at all", task.pid);
            }
        }
        let gone = self.puppets.bare_call(pid, libc::SYS_munmap, [at, len, 0, 0, 0, 0])?;
        ensure!(gone == 0, "munmap of the memory for lists failed with error {}", -gone);
        Ok(())
    }
}
