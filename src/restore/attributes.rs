//! The third act: descriptors, attributes, threads.
//!
//! A process goes through four stages. Most do so by one list; where descriptors can only be opened when all tasks and
//! threads are there, or several tasks share a table, everybody ends each stage before anybody begins the next one.

use anyhow::{Context, Result};

use super::{CLONE_PTRACE, THREAD_FLAGS, Task, create::Construction, images::State, layout, log_list};
use crate::{
    image::pb,
    process_tree::ids::on_host,
    sys::{
        clone::CloneArgs,
        pid::{HostPid, NsPid},
    },
    task,
    tracee::{List, Op},
};

/// A part of a process's way to what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Protections of memory, what has to be set while /proc is there, threads.
    Threads,
    /// Root and current directory.
    Directories,
    /// The descriptor table.
    Table,
    /// Everything else, credentials last.
    Attributes,
}

const STAGES: [Stage; 4] = [Stage::Threads, Stage::Directories, Stage::Table, Stage::Attributes];

impl Construction<'_> {
    /// Everything that tasks do for themselves.
    pub(super) fn attributes(&mut self) -> Result<()> {
        self.clocks.start()?;
        self.supervisor.clocks = self.clocks.running();
        self.files.set_clocks(self.clocks.running());
        if self.files.needs_stages() {
            for stage in &STAGES[..3] {
                if *stage == Stage::Directories {
                    self.files.open_late()?;
                }
                self.stage_of_all(*stage)?;
                if *stage == Stage::Directories {
                    self.files.directories_are_set();
                }
            }
            self.give_lists(&STAGES[3..])?;
        } else {
            self.give_lists(&STAGES)?;
        }
        // Stopped tasks first, children before parents: a parent hears of the stop, and forgets it, before
        // its own signals are restored.
        let stopped: Vec<&Task> = self.alive().filter(|t| t.state == State::Stopped).collect();
        for task in stopped.into_iter().rev() {
            self.puppets.resume(on_host(task.pid))?;
            self.puppets.settle()?;
            self.stop(task).with_context(|| format!("stop of task {}", task.pid))?;
        }
        for task in self.alive().filter(|t| t.state != State::Stopped) {
            self.puppets.resume(on_host(task.pid))?;
        }
        self.puppets.settle()
    }

    /// One stage of all tasks; of descriptor tables only so many at once that the files of them may be open.
    fn stage_of_all(&mut self, stage: Stage) -> Result<()> {
        let mut given = Vec::new();
        for index in 0..self.images.tasks.len() {
            let Some(task) = self.task_of(index).filter(|t| !t.is_zombie()) else { continue };
            if stage == Stage::Table && self.files.is_full_for(task.ids.files_id) {
                self.run_stage(&mut given)?;
            }
            self.give_list(&[stage], index, task)?;
            given.push(on_host(task.pid));
        }
        self.run_stage(&mut given)
    }

    fn run_stage(&mut self, given: &mut Vec<HostPid>) -> Result<()> {
        for pid in given.drain(..) {
            self.puppets.resume(pid)?;
        }
        self.puppets.settle()?;
        Ok(self.files.tables_are_made()?)
    }

    fn give_lists(&mut self, stages: &[Stage]) -> Result<()> {
        for index in 0..self.images.tasks.len() {
            if let Some(task) = self.task_of(index).filter(|t| !t.is_zombie()) {
                self.give_list(stages, index, task)?;
            }
        }
        Ok(())
    }

    fn give_list(&mut self, stages: &[Stage], index: usize, task: &Task) -> Result<()> {
        let mut list = List::new(format!("restore of {}", task.pid));
        let images = (task.core()?, task.mm().context("no mm image")?);
        for stage in stages {
            let planned = self.plan_stage(*stage, index, task, (&images.0, &images.1), &mut list);
            planned.with_context(|| format!("task {}", task.pid))?;
        }
        list.op(Op::Stop);
        list.op(Op::Next);
        log_list(&list);
        self.puppets.next_list(on_host(task.pid), &list)
    }

    fn plan_stage(
        &mut self,
        stage: Stage,
        index: usize,
        task: &Task,
        (core, mm): (&pb::CoreEntry, &pb::MmEntry),
        list: &mut List,
    ) -> Result<()> {
        match stage {
            Stage::Threads => {
                self.clocks.plan_task(list);
                self.plan_reaping(index, list)?;
                if !self.share_of(index).vm {
                    let made = self.made.get(index).context("a task that was not made")?;
                    let keys = self.keys.get(&task.pid).context("no protection keys")?;
                    layout::plan_late(list, mm, task.pid, made, keys)?;
                }
                task::plan_process_early(core, &self.supervisor, list)?;
                self.plan_threads(index, task, list)?;
            }
            Stage::Directories => {
                if let Some(fs) = &task.fs {
                    let mut descriptors = self.descriptors_of(index);
                    self.files.plan_fs(fs, &mut descriptors, list)?;
                    self.next_shared = self.next_shared.max(descriptors.end());
                }
            }
            Stage::Table => self.files.plan_table(task.ids.files_id, task.pid, list)?,
            Stage::Attributes => {
                task::plan_process(core, mm, &self.supervisor, list)?;
                task::plan_thread(&self.thread_plan(task, task.pid, core), list)?;
            }
        }
        Ok(())
    }

    /// All stages of all tasks, for nobody.
    #[cfg(feature = "internals")]
    pub(super) fn rehearse_attributes(&mut self) -> Result<()> {
        for stage in STAGES {
            for index in 0..self.images.tasks.len() {
                let Some(task) = self.task_of(index).filter(|t| !t.is_zombie()) else { continue };
                let mut list = List::new(format!("restore of {}", task.pid));
                let images = (task.core()?, task.mm().context("no mm image")?);
                self.plan_stage(stage, index, task, (&images.0, &images.1), &mut list)?;
                log_list(&list);
            }
        }
        Ok(())
    }

    fn thread_plan<'a>(&'a self, task: &Task, tid: NsPid, core: &'a pb::CoreEntry) -> task::ThreadPlan<'a> {
        task::ThreadPlan { core, pid: task.pid, tid, seccomp: &self.seccomp, supervisor: &self.supervisor }
    }

    /// Threads beside the leader, each with a list of its own attributes.
    fn plan_threads(&mut self, index: usize, task: &Task, list: &mut List) -> Result<()> {
        let (area, _) = self.place(index)?;
        for (tid, core) in task.threads().skip(1) {
            let mut own = List::new(format!("restore of thread {tid}"));
            task::plan_thread(&self.thread_plan(task, tid, &core), &mut own)?;
            own.op(Op::Stop);
            own.op(Op::Next);
            let slot = self.puppets.add_slot(area)?;
            let label = format!("thread {tid} of task {}", task.pid);
            self.puppets.expect_thread(on_host(tid), label, (area, slot), &own)?;
            let args = CloneArgs { flags: THREAD_FLAGS | CLONE_PTRACE, ..CloneArgs::default() };
            list.clone3(format!("clone of thread {tid}"), &args, &[tid], slot);
        }
        Ok(())
    }

    /// Stops a task by the signal that had stopped it, while all its signals are still blocked: those
    /// that wait for it are delivered when it goes on, not before.
    fn stop(&self, task: &Task) -> Result<()> {
        let core = task.core()?;
        let wanted = core.tc.as_ref().and_then(|tc| tc.stop_signo).and_then(|s| i32::try_from(s).ok());
        let wanted = wanted.filter(|s| task::sigaction::is_default(&core, *s)).unwrap_or(libc::SIGSTOP);
        let tids: Vec<HostPid> = task.tids.iter().copied().map(on_host).collect();
        self.puppets.stop_process(&tids, wanted)
    }
}
