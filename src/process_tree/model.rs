//! What the kernel makes of a plan, by its rules for fork, setsid, setpgid, unshare and the end of a parent.
//!
//! It knows no threads and no time: steps of different processes happen side by side in the kernel, but what one of them
//! becomes depends on its maker at one moment alone, so any order gives the same.

use std::collections::HashMap;

use super::{ForkPlan, Move, Outside, PlannedPid, Shape, Share, Sharing, Step, fork_plan::Impossible};
use crate::sys::pid::NsPid;

/// One process of the model.
#[derive(Debug, Clone, Copy)]
struct Process {
    pid: NsPid,
    /// `None`: a child of whoever makes the tree, or of whoever adopts its orphans.
    parent: Option<usize>,
    sid: NsPid,
    pgid: NsPid,
    objects: Sharing,
    alive: bool,
}

/// Why a step fails.
type Failed = (NsPid, String);

struct Model<'p> {
    plan: &'p ForkPlan,
    processes: Vec<Option<Process>>,
    next_object: u32,
}

/// Fails unless `plan` gives `tasks`. For each [`Move::Join`]: whether it changes anything.
pub(super) fn check(tasks: &[Shape], plan: &ForkPlan, outside: Outside) -> Result<Vec<bool>, Impossible> {
    let made = run(plan, outside);
    let (made, joins) = made.map_err(|(pid, reason)| Impossible { pid, reason })?;
    for (index, task) in tasks.iter().enumerate() {
        let wrong = |reason: String| Err(Impossible { pid: task.pid, reason });
        let Some(process) = made.get(index).copied().flatten() else {
            return wrong("nobody can make it".into());
        };
        if process.parent != task.parent {
            return wrong("it would have another parent".into());
        }
        if process.sid != task.sid {
            return wrong(format!("it would be in session {} instead of {}", process.sid, task.sid));
        }
        if process.pgid != task.pgid {
            return wrong(format!("it would be in process group {} instead of {}", process.pgid, task.pgid));
        }
    }
    shared_as_wanted(tasks, &made)?;
    Ok(joins)
}

/// Which of the objects that tasks share.
type Kind = (&'static str, fn(&Sharing) -> u32);

/// Tasks share exactly what they should.
fn shared_as_wanted(tasks: &[Shape], made: &[Option<Process>]) -> Result<(), Impossible> {
    let kinds: [Kind; 4] = [
        ("its address space", |s| s.vm),
        ("its signal handlers", |s| s.sighand),
        ("its descriptor table", |s| s.files),
        ("its root and current directory", |s| s.fs),
    ];
    for (what, id_of) in kinds {
        // Each object of the model stands for one object of the images, and the other way round.
        let mut wanted_of: HashMap<u32, (u32, NsPid)> = HashMap::new();
        let mut made_of: HashMap<u32, (u32, NsPid)> = HashMap::new();
        for (index, task) in tasks.iter().enumerate() {
            let (Some(wanted), Some(Some(process))) = (&task.sharing, made.get(index)) else { continue };
            let (object, mut id) = (id_of(&process.objects), id_of(wanted));
            if id == 0 {
                // Nobody's: one of its own.
                id = u32::MAX - u32::try_from(index).unwrap_or(0);
            }
            let (known_id, other) = *wanted_of.entry(object).or_insert((id, task.pid));
            if known_id != id {
                let reason = format!("{what} would be shared with task {other}");
                return Err(Impossible { pid: task.pid, reason });
            }
            let (known_object, other) = *made_of.entry(id).or_insert((object, task.pid));
            if known_object != object {
                let reason =
                    format!("{what} is shared with task {other}, from which it cannot be handed to it");
                return Err(Impossible { pid: task.pid, reason });
            }
        }
    }
    Ok(())
}

fn run(plan: &ForkPlan, outside: Outside) -> Result<(Vec<Option<Process>>, Vec<bool>), Failed> {
    let mut model = Model { plan, processes: vec![None; plan.processes.len()], next_object: 1 };
    let objects = model.new_objects();
    let first = Process {
        pid: model.pid(plan.first),
        parent: None,
        sid: outside.sid,
        pgid: outside.pgid,
        objects,
        alive: true,
    };
    model.made(plan.first, first)?;
    let mut joins = Vec::new();
    for step in &plan.moves {
        let changes = model.step(*step, outside)?;
        if matches!(step, Move::Join { .. }) {
            joins.push(changes);
        }
    }
    Ok((model.processes, joins))
}

impl Model<'_> {
    fn pid(&self, index: usize) -> NsPid {
        match self.plan.processes.get(index).map(|p| p.pid) {
            Some(PlannedPid::Exact(pid)) => pid,
            _ => NsPid::new(-1 - i32::try_from(index).unwrap_or(0)),
        }
    }

    fn new_object(&mut self) -> u32 {
        self.next_object += 1;
        self.next_object
    }

    fn new_objects(&mut self) -> Sharing {
        let [vm, sighand, files, fs] = [(); 4].map(|()| self.new_object());
        Sharing { vm, sighand, files, fs }
    }

    fn get(&self, index: usize) -> Result<Process, Failed> {
        let there = self.processes.get(index).copied().flatten().filter(|p| p.alive);
        there.ok_or_else(|| (self.pid(index), "it is not there when it is needed".into()))
    }

    fn set(&mut self, index: usize, change: impl FnOnce(&mut Process)) {
        if let Some(Some(process)) = self.processes.get_mut(index) {
            change(process);
        }
    }

    /// A process that has just been made, and all it makes.
    fn made(&mut self, index: usize, process: Process) -> Result<(), Failed> {
        match self.processes.get_mut(index) {
            Some(place @ None) => *place = Some(process),
            _ => return Err((process.pid, "it would be made twice".into())),
        }
        let plan = self.plan;
        let steps_of = |index: usize| plan.processes[index].steps.iter().map(move |step| (index, *step));
        let mut waiting = vec![steps_of(index)];
        // Depth first: a child goes through its steps before its maker goes on.
        while let Some(top) = waiting.last_mut() {
            let Some((index, step)) = top.next() else {
                waiting.pop();
                continue;
            };
            if let Step::Make { child, sibling, share } = step {
                self.make(index, child, sibling, share)?;
                waiting.push(steps_of(child));
            } else {
                self.own_step(index, step)?;
            }
        }
        Ok(())
    }

    fn make(&mut self, maker: usize, child: usize, sibling: bool, share: Share) -> Result<(), Failed> {
        let by = self.get(maker)?;
        if self.processes.get(child).is_none_or(Option::is_some) {
            return Err((self.pid(child), "it would be made twice".into()));
        }
        let mut objects = self.new_objects();
        for (shared, object, theirs) in [
            (share.vm, &mut objects.vm, by.objects.vm),
            (share.sighand && share.vm, &mut objects.sighand, by.objects.sighand),
            (share.files, &mut objects.files, by.objects.files),
            (share.fs, &mut objects.fs, by.objects.fs),
        ] {
            if shared {
                *object = theirs;
            }
        }
        let parent = if sibling { by.parent } else { Some(maker) };
        let (sid, pgid) = (by.sid, by.pgid);
        self.processes[child] =
            Some(Process { pid: self.pid(child), parent, sid, pgid, objects, alive: true });
        Ok(())
    }

    fn group_exists(&self, group: NsPid, sid: NsPid) -> bool {
        self.processes.iter().flatten().any(|p| p.alive && p.pgid == group && p.sid == sid)
    }

    fn own_step(&mut self, index: usize, step: Step) -> Result<(), Failed> {
        let process = self.get(index)?;
        match step {
            Step::Setsid => {
                let taken = self.processes.iter().flatten().any(|p| p.alive && p.pgid == process.pid);
                if taken {
                    let reason = "it leads a process group and cannot lead a session any more".into();
                    return Err((process.pid, reason));
                }
                self.set(index, |p| (p.sid, p.pgid) = (p.pid, p.pid));
            }
            Step::LeadGroup => {
                if process.sid == process.pid {
                    let reason = "the leader of a session cannot lead another group".into();
                    return Err((process.pid, reason));
                }
                self.set(index, |p| p.pgid = p.pid);
            }
            Step::Unshare { files, fs } => {
                let (new_files, new_fs) = (self.new_object(), self.new_object());
                self.set(index, |p| {
                    if files {
                        p.objects.files = new_files;
                    }
                    if fs {
                        p.objects.fs = new_fs;
                    }
                });
            }
            Step::Make { .. } => {}
        }
        Ok(())
    }

    /// One move; says whether anything changes.
    fn step(&mut self, step: Move, outside: Outside) -> Result<bool, Failed> {
        match step {
            Move::Join { who, group } => {
                let process = self.get(who)?;
                if process.pgid == group {
                    return Ok(false);
                }
                let is_outside = process.sid == outside.sid && group == outside.pgid;
                let exists = group.get() > 0 && (is_outside || self.group_exists(group, process.sid));
                if process.sid == process.pid || !exists {
                    let reason = format!("its process group {group} is not in its session {}", process.sid);
                    return Err((process.pid, reason));
                }
                self.set(who, |p| p.pgid = group);
            }
            Move::Adopt { by, from } => {
                self.get(by)?;
                self.end(from, Some(by))?;
            }
            Move::End { who } => self.end(who, None)?,
        }
        Ok(true)
    }

    /// The end of a helper: its children go to the subreaper above it.
    fn end(&mut self, who: usize, subreaper: Option<usize>) -> Result<(), Failed> {
        let process = self.get(who)?;
        let mut up = process.parent;
        while up.is_some() && up != subreaper {
            up = up.and_then(|at| self.processes.get(at).copied().flatten()).and_then(|p| p.parent);
        }
        if subreaper.is_some() && up.is_none() {
            return Err((process.pid, "it is not below the task that is to get its children".into()));
        }
        for child in self.processes.iter_mut().flatten().filter(|p| p.parent == Some(who)) {
            child.parent = up;
        }
        self.set(who, |p| p.alive = false);
        Ok(())
    }
}
