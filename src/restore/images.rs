//! What the images say about the tree: read, checked, indexed.
//!
//! Everything small is read before anything is made; the pages stay where they are. The messages of a task are decoded anew
//! each time they are needed, because those of thousands of tasks would take ten times the memory. They come from what has been
//! read once, not from the images again: somebody might have changed those meanwhile.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    image::{ImageKind, Store, TypedStore, pb},
    kept::{Form, Kept},
    sys::pid::NsPid,
};

/// Largest pid the kernel can have (PID_MAX_LIMIT).
const PID_MAX: u32 = 4 << 20;
/// `task_core_entry.task_state` values.
const TASK_ALIVE: u32 = 1;
const TASK_DEAD: u32 = 2;
const TASK_STOPPED: u32 = 3;

/// What a task is to be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Alive,
    Stopped,
    Zombie(i32),
}

/// One task of the images.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) pid: NsPid,
    pub(super) ppid: NsPid,
    pub(super) pgid: NsPid,
    pub(super) sid: NsPid,
    pub(super) state: State,
    /// Thread ids, the leader first.
    pub(super) tids: Vec<NsPid>,
    /// One for each thread, in the same order.
    cores: Vec<Kept<pb::CoreEntry>>,
    pub(super) ids: pb::TaskKobjIdsEntry,
    mm: Option<Kept<pb::MmEntry>>,
    pub(super) dumpable: i32,
    pub(super) fs: Option<pb::FsEntry>,
}

impl Task {
    /// The core image of the leader.
    pub(super) fn core(&self) -> Result<Cow<'_, pb::CoreEntry>> {
        let core = self.cores.first().with_context(|| format!("core-{}.img has no entry", self.pid))?;
        Ok(core.message())
    }

    /// All threads with their core images, the leader first.
    pub(super) fn threads(&self) -> impl Iterator<Item = (NsPid, Cow<'_, pb::CoreEntry>)> + '_ {
        self.tids.iter().copied().zip(self.cores.iter().map(Kept::message))
    }

    /// Its address space; `None` for a zombie.
    pub(super) fn mm(&self) -> Option<Cow<'_, pb::MmEntry>> {
        self.mm.as_ref().map(Kept::message)
    }

    pub(super) fn is_zombie(&self) -> bool {
        matches!(self.state, State::Zombie(_))
    }
}

/// All tasks, parents before children.
#[derive(Debug)]
pub(super) struct Images {
    pub(super) tasks: Vec<Task>,
}

/// The image that makes the others a snapshot. Its `root_ids` are those of whoever dumped it: namespaces that tasks share with it
/// need not be made.
pub(super) fn inventory(store: &dyn Store) -> Result<pb::InventoryEntry> {
    let inventory: pb::InventoryEntry = match store.read_one(ImageKind::Inventory, None)? {
        Some(inventory) => inventory,
        None => bail!(
            "no complete snapshot: {} is missing (wrong directory, or a dump that did not finish)",
            store.path_of("inventory.img").display()
        ),
    };
    ensure!(
        matches!(inventory.img_version, 1 | 2),
        "inventory.img: image version {} is not known",
        inventory.img_version
    );
    Ok(inventory)
}

fn id(value: u32, what: &str) -> Result<NsPid> {
    ensure!(value <= PID_MAX, "pstree.img: {what} {value} is no process id");
    Ok(NsPid::new(i32::try_from(value)?))
}

/// Whether a task can have ended with this wait status. One that does not end anybody would leave a restore waiting.
fn ends(status: u32) -> bool {
    let lives_on = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    let signal = (status & 0x7f).cast_signed();
    status <= 0xffff && signal <= libc::SIGRTMAX() && !lives_on.contains(&signal)
}

impl Images {
    /// Ids of the descriptor tables of all living tasks; one that is shared is there for each.
    pub(super) fn tables(&self) -> Vec<u32> {
        self.tasks.iter().filter(|task| !task.is_zombie()).map(|task| task.ids.files_id).collect()
    }

    pub(super) fn read(store: &dyn Store) -> Result<Self> {
        let entries: Vec<pb::PstreeEntry> = store.read_all(ImageKind::Pstree, None)?;
        ensure!(
            !entries.is_empty() || store.exists(ImageKind::Pstree, None)?,
            "{}: no such image",
            store.path_of("pstree.img").display()
        );
        ensure!(!entries.is_empty(), "pstree.img has no task");
        let mut tasks = Vec::with_capacity(entries.len());
        let mut seen = HashSet::new();
        let form = Form::of_tree(entries.iter().map(|entry| entry.threads.len()).sum());
        for entry in &entries {
            let task = Self::task(store, entry, form)?;
            for tid in &task.tids {
                ensure!(seen.insert(*tid), "pstree.img: id {tid} occurs twice");
            }
            tasks.push(task);
        }
        let images = Self { tasks };
        images.check_tree()?;
        Ok(images)
    }

    fn check_tree(&self) -> Result<()> {
        let mut known: HashMap<NsPid, usize> = HashMap::new();
        for (index, task) in self.tasks.iter().enumerate() {
            if index == 0 {
                ensure!(!task.is_zombie(), "pstree.img: the root {} is a zombie", task.pid);
            } else {
                ensure!(
                    known.get(&task.ppid).is_some_and(|i| !self.tasks[*i].is_zombie()),
                    "pstree.img: task {} has no living parent {} before it",
                    task.pid,
                    task.ppid
                );
            }
            known.insert(task.pid, index);
        }
        Ok(())
    }

    fn task(store: &dyn Store, entry: &pb::PstreeEntry, form: Form) -> Result<Task> {
        let pid = id(entry.pid, "pid")?;
        ensure!(pid.get() > 0, "pstree.img: pid 0");
        let mut tids = vec![pid];
        let dead = |core: &pb::CoreEntry| core.tc.as_ref().is_some_and(|tc| tc.task_state == TASK_DEAD);
        let leader: pb::CoreEntry = store.need_one(ImageKind::Core, u64::from(pid.bits()))?;
        // CRIU leaves whatever it has in the threads of a dead task.
        for tid in entry.threads.iter().filter(|_| !dead(&leader)) {
            let tid = id(*tid, "thread id")?;
            if tid != pid {
                tids.push(tid);
            }
        }
        let mut cores = Vec::with_capacity(tids.len());
        for tid in &tids {
            let core: pb::CoreEntry = match *tid == pid {
                true => leader.clone(),
                false => store.need_one(ImageKind::Core, u64::from(tid.bits()))?,
            };
            ensure!(
                core.mtype == pb::core_entry::March::X8664 as i32,
                "core-{tid}.img is of another architecture"
            );
            cores.push(Kept::new(core, form));
        }
        let tc = leader.tc.as_ref().with_context(|| format!("core-{pid}.img has no task part"))?;
        let state = match tc.task_state {
            TASK_ALIVE => State::Alive,
            TASK_STOPPED => State::Stopped,
            TASK_DEAD => {
                ensure!(ends(tc.exit_code), "core-{pid}.img: no task ends with status {:#x}", tc.exit_code);
                State::Zombie(tc.exit_code.cast_signed())
            }
            other => bail!("core-{pid}.img: task state {other} is not known"),
        };
        let image = u64::from(pid.bits());
        let alive = !matches!(state, State::Zombie(_));
        let ids = match (alive, store.read_one(ImageKind::Ids, image)?) {
            (_, Some(ids)) => ids,
            (false, None) => pb::TaskKobjIdsEntry::default(),
            (true, None) => match &leader.ids {
                Some(ids) => *ids,
                None => bail!("ids-{pid}.img is missing"),
            },
        };
        let mm: Option<pb::MmEntry> = if alive { Some(store.need_one(ImageKind::Mm, image)?) } else { None };
        let fs = if alive { store.read_one(ImageKind::Fs, image)? } else { None };
        Ok(Task {
            pid,
            ppid: id(entry.ppid, "ppid")?,
            pgid: id(entry.pgid, "pgid")?,
            sid: id(entry.sid, "sid")?,
            state,
            tids,
            cores,
            ids,
            dumpable: mm.as_ref().and_then(|mm| mm.dumpable).unwrap_or(1),
            mm: mm.map(|mm| Kept::new(mm, form)),
            fs,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_of_tasks_that_have_ended() {
        for status in [0, 0x300, 0xff00, 9, 9 | 0x80, 64, 15] {
            assert!(ends(status), "{status:#x}");
        }
        for status in [0x7f, 0x2ff, 65, 19, 0x137f, 20, 18, 17, 0x1_0000, 0xffff_ffff] {
            assert!(!ends(status), "{status:#x}");
        }
    }
}
