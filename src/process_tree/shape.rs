//! What a task of a tree is to the others: its parent, session and group, and what it shares.

use crate::sys::pid::NsPid;

/// One task. Tasks are listed parents before children, the root first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Process id.
    pub(crate) pid: NsPid,
    /// Index of the parent; `None` for the root.
    pub(crate) parent: Option<usize>,
    /// Process group.
    pub(crate) pgid: NsPid,
    /// Session.
    pub(crate) sid: NsPid,
    /// What it shares with other tasks; `None` for a zombie, which has nothing.
    pub(crate) sharing: Option<Sharing>,
}

/// What tasks may share, as ids: the same number, the same object. 0 is nobody's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// Address space.
    pub(crate) vm: u32,
    /// Signal handlers; only tasks with one address space can share them.
    pub(crate) sighand: u32,
    /// Descriptor table.
    pub(crate) files: u32,
    /// Root, current directory and umask.
    pub(crate) fs: u32,
}

/// Session and group of whoever makes the tree: what its root has before it becomes a leader of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outside {
    /// Session.
    pub(crate) sid: NsPid,
    /// Process group.
    pub(crate) pgid: NsPid,
}

impl Shape {
    /// Whether it leads its session.
    pub(crate) fn leads_session(&self) -> bool {
        self.sid == self.pid
    }
}

/// One task as images or /proc list it, the root first, parents before children.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Process id.
    pub(crate) pid: NsPid,
    /// Of its parent, which for the root is outside.
    pub(crate) ppid: NsPid,
    /// Process group.
    pub(crate) pgid: NsPid,
    /// Session.
    pub(crate) sid: NsPid,
    /// See [`Shape::sharing`].
    pub(crate) sharing: Option<Sharing>,
}

/// What is wanted of a listed tree when it is made in `outside`: the session and group that its root had from outside of the
/// tree become those of `outside`, for all tasks that have them.
pub(crate) fn shapes(listed: &[Listed], outside: Outside) -> Vec<Shape> {
    let root = listed.first();
    let foreign_session = root.filter(|r| r.sid != r.pid).map(|r| r.sid);
    let foreign_group = root.filter(|r| r.pgid != r.pid).map(|r| r.pgid);
    let index_of: std::collections::HashMap<NsPid, usize> =
        listed.iter().enumerate().map(|(index, task)| (task.pid, index)).collect();
    let shape = |(index, task): (usize, &Listed)| {
        let from_outside = Some(task.pgid) == foreign_group || Some(task.pgid) == foreign_session;
        Shape {
            pid: task.pid,
            parent: if index == 0 { None } else { index_of.get(&task.ppid).copied() },
            pgid: if from_outside { outside.pgid } else { task.pgid },
            sid: if Some(task.sid) == foreign_session { outside.sid } else { task.sid },
            sharing: task.sharing,
        }
    };
    listed.iter().enumerate().map(shape).collect()
}
