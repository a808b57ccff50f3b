//! Who makes whom, and when: the order of clones that gives every task its parent, session and group.
//!
//! A task can only be born into the session its maker has at that moment, and can leave it only by
//! becoming a leader itself. So children that are still in the old session of their parent are made
//! before the parent's setsid, the others after it. A session whose leader is dead gets a helper: a
//! short-lived task with the leader's pid that becomes leader and makes the members for its own parent
//! (CLONE_PARENT). Helpers also stand for dead leaders of process groups.

use std::collections::{HashMap, HashSet};

use anyhow::{Result, bail};

/// What is wanted of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) pid: i32,
    /// Index of the parent; `None` for the root.
    pub(crate) parent: Option<usize>,
    pub(crate) pgid: i32,
    pub(crate) sid: i32,
}

/// A step in the life of a puppet, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Makes this puppet as its child.
    Make(usize),
    /// Makes this puppet as its sibling (CLONE_PARENT).
    MakeSibling(usize),
    /// Becomes leader of a session.
    Setsid,
    /// Becomes leader of a group.
    LeadGroup,
}

/// One puppet: a task (index below the number of tasks) or a helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) pid: i32,
    /// Index of the task, `None` for a helper.
    pub(crate) task: Option<usize>,
    /// Who is its parent, `None` for a child of crtool.
    pub(crate) parent: Option<usize>,
    pub(crate) steps: Vec<Step>,
    /// Group to join once all puppets are there.
    pub(crate) join_group: Option<i32>,
}

/// All puppets; tasks first, at the same indices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForkPlan {
    pub(crate) puppets: Vec<Planned>,
    /// The one that crtool makes itself: the root, or its intermediate parent.
    pub(crate) first: usize,
}

impl ForkPlan {
    /// Puts a helper with this pid between crtool and the root. It ends like all helpers, long before the tree runs: then
    /// the root is a child of whoever adopts orphans, and the end of crtool is nothing to it.
    pub(crate) fn add_intermediate_parent(&mut self, pid: i32) {
        let intermediate = self.puppets.len();
        if let Some(root) = self.puppets.first_mut() {
            root.parent = Some(intermediate);
        }
        let steps = vec![Step::Make(0)];
        self.puppets.push(Planned { pid, task: None, parent: None, steps, join_group: None });
        self.first = intermediate;
    }

    /// The puppet that makes puppet `index`.
    pub(crate) fn maker(&self, index: usize) -> Option<usize> {
        let makes = |step: &Step| matches!(step, Step::Make(c) | Step::MakeSibling(c) if *c == index);
        let parent = self.puppets.get(index)?.parent?;
        // Nearly always its parent.
        let made_by = |p: &usize| self.puppets.get(*p).is_some_and(|p| p.steps.iter().any(makes));
        Some(parent).filter(made_by).or_else(|| (0..self.puppets.len()).find(made_by))
    }
}

/// Plans the forks. `outside` is the session and the group that come from outside the tree
/// (`--shell-job`): those of crtool itself, which every task without an inner one gets.
pub(crate) fn plan(tasks: &[Wanted], outside: (i32, i32)) -> Result<ForkPlan> {
    let pids: HashSet<i32> = tasks.iter().map(|t| t.pid).collect();
    let mut puppets: Vec<Planned> = tasks
        .iter()
        .enumerate()
        .map(|(i, t)| Planned {
            pid: t.pid,
            task: Some(i),
            parent: t.parent,
            steps: Vec::new(),
            join_group: None,
        })
        .collect();
    let children = |of: usize| -> Vec<usize> {
        tasks.iter().enumerate().filter(|(_, t)| t.parent == Some(of)).map(|(i, _)| i).collect()
    };

    // Session each task is born into. A leader may be born into any, unless a child needs an older one.
    let mut born: Vec<Option<i32>> = tasks.iter().map(|t| (t.sid != t.pid).then_some(t.sid)).collect();
    let mut before_setsid: HashSet<usize> = HashSet::new();
    let mut by_helper: Vec<(usize, i32)> = Vec::new();
    // Children before parents: what a child needs decides what its parent must be born into.
    for index in (0..tasks.len()).rev() {
        let task = tasks[index];
        for child in children(index) {
            let Some(needed) = born[child] else { continue };
            if needed == task.sid {
                continue;
            }
            let leader = task.sid == task.pid;
            match born[index] {
                None if leader && !by_helper_needed(tasks, &pids, index, needed) => {
                    born[index] = Some(needed);
                    before_setsid.insert(child);
                }
                Some(b) if leader && b == needed => {
                    before_setsid.insert(child);
                }
                _ => by_helper.push((child, needed)),
            }
        }
    }
    if let (Some(root), Some(Some(needed))) = (tasks.first(), born.first())
        && *needed != outside.0
        && root.sid != root.pid
    {
        bail!("session {needed} of the root task is not there; restore with --shell-job to use this one");
    }
    if let Some(Some(needed)) = born.first()
        && *needed != outside.0
    {
        // The root is a leader whose children are in a session older than it.
        let orphans: Vec<usize> =
            before_setsid.iter().copied().filter(|c| tasks[*c].parent == Some(0)).collect();
        for child in orphans {
            before_setsid.remove(&child);
            by_helper.push((child, *needed));
        }
        born[0] = None;
    }

    // Helpers for sessions without a leader, one for each (parent, session).
    let mut session_helpers: HashMap<(usize, i32), usize> = HashMap::new();
    let mut sibling_of: HashMap<usize, usize> = HashMap::new();
    by_helper.sort_unstable();
    by_helper.dedup();
    for (child, session) in by_helper {
        let parent = tasks[child].parent.unwrap_or(0);
        if let Some(leader) = tasks.iter().position(|t| t.pid == session) {
            // A living leader, elsewhere: it can make the task if both have the same parent.
            if tasks[leader].parent == Some(parent) && tasks[leader].sid == session {
                sibling_of.insert(child, leader);
                continue;
            }
            bail!(
                "task {}: its session {session} belongs to a task that is neither its ancestor nor its sibling; \
                 this shape of tree cannot be made yet",
                tasks[child].pid
            );
        }
        let helper = *session_helpers.entry((parent, session)).or_insert_with(|| {
            puppets.push(Planned {
                pid: session,
                task: None,
                parent: Some(parent),
                steps: vec![Step::Setsid],
                join_group: None,
            });
            puppets.len() - 1
        });
        if session_helpers.keys().filter(|(_, s)| *s == session).count() > 1 {
            bail!(
                "session {session} has lost its leader and has members under several parents; this cannot be made yet"
            );
        }
        sibling_of.insert(child, helper);
    }

    // Groups: leaders in the tree lead from the start; a group whose leader is dead gets a helper.
    let mut group_helpers: HashMap<i32, usize> = HashMap::new();
    for (index, task) in tasks.iter().enumerate() {
        if task.pgid == task.pid && task.sid != task.pid {
            puppets[index].steps.push(Step::LeadGroup);
        } else if task.pgid != task.pid && task.pgid != outside.1 {
            puppets[index].join_group = Some(task.pgid);
            let led = pids.contains(&task.pgid)
                || session_helpers.keys().any(|(_, s)| *s == task.pgid)
                || group_helpers.contains_key(&task.pgid);
            if !led {
                puppets.push(Planned {
                    pid: task.pgid,
                    task: None,
                    parent: Some(index),
                    steps: vec![Step::LeadGroup],
                    join_group: None,
                });
                group_helpers.insert(task.pgid, puppets.len() - 1);
            }
        }
    }

    // Steps in order: children of the old session, setsid, helpers, everybody else.
    for index in 0..tasks.len() {
        let mut steps = Vec::new();
        let mine = children(index);
        for child in &mine {
            if before_setsid.contains(child) {
                steps.push(Step::Make(*child));
            }
        }
        if tasks[index].sid == tasks[index].pid {
            steps.push(Step::Setsid);
        }
        steps.append(&mut puppets[index].steps);
        for (at, puppet) in puppets.iter().enumerate().skip(tasks.len()) {
            if puppet.parent == Some(index) {
                steps.push(Step::Make(at));
            }
        }
        for child in &mine {
            if !before_setsid.contains(child) && !sibling_of.contains_key(child) {
                steps.push(Step::Make(*child));
            }
        }
        let mut siblings: Vec<usize> =
            sibling_of.iter().filter(|(_, maker)| **maker == index).map(|(c, _)| *c).collect();
        siblings.sort_unstable();
        steps.extend(siblings.into_iter().map(Step::MakeSibling));
        puppets[index].steps = steps;
    }
    for (index, puppet) in puppets.iter_mut().enumerate().skip(tasks.len()) {
        let mut siblings: Vec<usize> =
            sibling_of.iter().filter(|(_, maker)| **maker == index).map(|(c, _)| *c).collect();
        siblings.sort_unstable();
        puppet.steps.extend(siblings.into_iter().map(Step::MakeSibling));
    }
    Ok(ForkPlan { puppets, first: 0 })
}

/// Whether `needed` is a session that nobody above `index` can hand down.
fn by_helper_needed(tasks: &[Wanted], pids: &HashSet<i32>, index: usize, needed: i32) -> bool {
    let mut above = tasks[index].parent;
    while let Some(at) = above {
        if tasks[at].sid == needed || tasks[at].pid == needed {
            return false;
        }
        above = tasks[at].parent;
    }
    // Not seen above: it may still come from outside the tree, unless its leader is inside.
    pids.contains(&needed) || tasks.first().is_some_and(|root| root.sid == root.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(pid: i32, parent: Option<usize>, pgid: i32, sid: i32) -> Wanted {
        Wanted { pid, parent, pgid, sid }
    }

    #[test]
    fn plain_tree() {
        let forks = plan(&[t(10, None, 10, 10), t(11, Some(0), 10, 10)], (1, 1)).unwrap();
        assert_eq!(forks.puppets[0].steps, [Step::Setsid, Step::Make(1)]);
        assert_eq!(forks.puppets[1].join_group, Some(10));
    }

    #[test]
    fn intermediate_parent() {
        let mut forks = plan(&[t(10, None, 10, 10), t(11, Some(0), 10, 10)], (1, 1)).unwrap();
        assert_eq!((forks.first, forks.maker(0)), (0, None));
        forks.add_intermediate_parent(7);
        assert_eq!((forks.first, forks.maker(0), forks.maker(1)), (2, Some(2), Some(0)));
        assert_eq!(forks.puppets[2].steps, [Step::Make(0)]);
    }

    #[test]
    fn child_of_the_old_session_comes_first() {
        let tasks =
            [t(10, None, 10, 10), t(11, Some(0), 11, 11), t(12, Some(1), 10, 10), t(13, Some(1), 11, 11)];
        let forks = plan(&tasks, (1, 1)).unwrap();
        assert_eq!(forks.puppets[1].steps, [Step::Make(2), Step::Setsid, Step::Make(3)]);
    }

    #[test]
    fn dead_session_leader() {
        let tasks = [t(10, None, 10, 10), t(12, Some(0), 11, 11)];
        let forks = plan(&tasks, (1, 1)).unwrap();
        assert_eq!(forks.puppets[2].pid, 11);
        assert_eq!(forks.puppets[2].steps, [Step::Setsid, Step::MakeSibling(1)]);
        assert_eq!(forks.puppets[0].steps, [Step::Setsid, Step::Make(2)]);
        assert_eq!(forks.puppets[1].join_group, Some(11));
    }

    #[test]
    fn dead_group_leader() {
        let tasks = [t(10, None, 10, 10), t(12, Some(0), 11, 10), t(13, Some(0), 11, 10)];
        let forks = plan(&tasks, (1, 1)).unwrap();
        assert_eq!(forks.puppets.len(), 4);
        assert_eq!(forks.puppets[3].pid, 11);
        assert_eq!(forks.puppets[1].steps, [Step::Make(3)]);
    }

    #[test]
    fn session_from_outside() {
        assert!(plan(&[t(10, None, 10, 9)], (1, 1)).is_err());
        assert!(plan(&[t(10, None, 1, 1)], (1, 1)).is_ok());
    }
}
