use proptest::prelude::*;

use super::*;
use crate::sys::pid::NsPid;

const OUTSIDE: Outside = Outside { sid: NsPid::new(1), pgid: NsPid::new(1) };
/// What somebody sees whose session and group are led from outside of his pid namespace.
const OTHER_NAMESPACE: Outside = Outside { sid: NsPid::new(0), pgid: NsPid::new(0) };

fn own(index: u32) -> Option<Sharing> {
    Some(Sharing { vm: index, sighand: index, files: index, fs: index })
}

/// Tasks that share nothing.
fn tree(tasks: &[(i32, Option<usize>, i32, i32)]) -> Vec<Shape> {
    let shape = |(index, &(pid, parent, pgid, sid)): (u32, &(i32, _, i32, i32))| {
        let [pid, pgid, sid] = [pid, pgid, sid].map(NsPid::new);
        Shape { pid, parent, pgid, sid, sharing: own(index) }
    };
    (1u32..).zip(tasks).map(shape).collect()
}

fn make(child: usize) -> Step {
    Step::Make { child, sibling: false, share: Share::default() }
}

fn make_sibling(child: usize) -> Step {
    Step::Make { child, sibling: true, share: Share::default() }
}

#[test]
fn plain_tree() {
    let plan = plan(&tree(&[(10, None, 10, 10), (11, Some(0), 10, 10)]), OUTSIDE).unwrap();
    assert_eq!(plan.processes[0].steps, [Step::Setsid, make(1)]);
    // It is made in that group.
    assert_eq!(plan.moves, []);
}

#[test]
fn intermediate_parent() {
    let mut plan = plan(&tree(&[(10, None, 10, 10), (11, Some(0), 10, 10)]), OUTSIDE).unwrap();
    plan.add_intermediate_parent();
    assert_eq!((plan.first, plan.processes[0].maker, plan.processes[1].maker), (2, Some(2), Some(0)));
    assert_eq!(plan.processes[2].steps, [make(0)]);
    assert_eq!(plan.moves.last(), Some(&Move::End { who: 2 }));
}

#[test]
fn child_of_the_old_session_comes_first() {
    let tasks =
        tree(&[(10, None, 10, 10), (11, Some(0), 11, 11), (12, Some(1), 10, 10), (13, Some(1), 11, 11)]);
    let plan = plan(&tasks, OUTSIDE).unwrap();
    assert_eq!(plan.processes[1].steps, [make(2), Step::Setsid, make(3)]);
}

#[test]
fn dead_session_leader() {
    let plan = plan(&tree(&[(10, None, 10, 10), (12, Some(0), 11, 11)]), OUTSIDE).unwrap();
    assert_eq!(plan.processes[2].pid, PlannedPid::Exact(NsPid::new(11)));
    assert_eq!(plan.processes[2].steps, [Step::Setsid, make_sibling(1)]);
    assert_eq!(plan.processes[0].steps, [Step::Setsid, make(2)]);
    assert_eq!(plan.ids_of_the_dead().collect::<Vec<_>>(), [NsPid::new(11)]);
}

#[test]
fn dead_session_leader_whose_members_stand_side_by_side() {
    // 11 forked 20 and 21, which forked 22 and 23 and became leaders of their own; then 11 died.
    let tasks = tree(&[
        (10, None, 10, 10),
        (20, Some(0), 20, 20),
        (21, Some(0), 21, 21),
        (22, Some(1), 11, 11),
        (23, Some(2), 11, 11),
    ]);
    plan(&tasks, OUTSIDE).unwrap();
}

#[test]
fn dead_group_leader() {
    let tasks = tree(&[(10, None, 10, 10), (12, Some(0), 11, 10), (13, Some(0), 11, 10)]);
    let plan = plan(&tasks, OUTSIDE).unwrap();
    assert_eq!(plan.processes.len(), 4);
    assert_eq!(plan.processes[3].pid, PlannedPid::Exact(NsPid::new(11)));
    assert_eq!(plan.processes[1].steps, [make(3)]);
}

#[test]
fn session_from_outside() {
    assert!(plan(&tree(&[(10, None, 10, 9)]), OUTSIDE).is_err());
    assert!(plan(&tree(&[(10, None, 1, 1)]), OUTSIDE).is_ok());
    // A leader with a child in the session of whoever restores.
    assert!(plan(&tree(&[(10, None, 10, 10), (11, Some(0), 1, 1)]), OUTSIDE).is_ok());
}

#[test]
fn grandchild_left_to_a_subreaper() {
    // 12 led a session and made a task that made 13 and died: 13 is the root's now, in the session of its grandchild.
    let tasks =
        tree(&[(10, None, 10, 10), (11, Some(0), 10, 10), (12, Some(1), 12, 12), (13, Some(0), 12, 12)]);
    let plan = plan(&tasks, OUTSIDE).unwrap();
    assert!(plan.moves.contains(&Move::Adopt { by: 0, from: 4 }));
}

#[test]
fn leader_that_has_left_its_group() {
    let tasks =
        tree(&[(10, None, 10, 10), (11, Some(0), 10, 10), (12, Some(0), 11, 10), (13, Some(0), 13, 10)]);
    let plan = plan(&tasks, OUTSIDE).unwrap();
    assert!(plan.processes[1].steps.contains(&Step::LeadGroup));
    assert_eq!(plan.moves.last(), Some(&Move::Join { who: 1, group: NsPid::new(10) }));
}

#[test]
fn tables_shared_by_siblings() {
    let mut tasks = tree(&[
        (10, None, 10, 10),
        (11, Some(0), 10, 10),
        (12, Some(0), 10, 10),
        (13, Some(1), 10, 10),
        (14, Some(0), 10, 10),
    ]);
    for (index, files) in [(1, 7), (2, 7), (3, 7)] {
        tasks[index].sharing.as_mut().unwrap().files = files;
    }
    // The grandchild shares with its grandmother, and not with its mother.
    tasks[0].sharing.as_mut().unwrap().fs = 9;
    tasks[3].sharing.as_mut().unwrap().fs = 9;
    plan(&tasks, OUTSIDE).unwrap();
}

#[test]
fn what_cannot_be_made_is_named() {
    let mut tasks = tree(&[(10, None, 10, 10), (11, Some(0), 10, 10), (12, Some(0), 10, 10)]);
    tasks[1].sharing.as_mut().unwrap().vm = 7;
    tasks[2].sharing.as_mut().unwrap().vm = 7;
    let error = plan(&tasks, OUTSIDE).unwrap_err();
    assert_eq!(error.pid.get(), 12);
    assert!(error.reason.contains("address space"), "{error}");
}

#[test]
fn what_is_inherited_from_another_namespace_can_be_made() {
    let tasks = tree(&[(10, None, 0, 0), (11, Some(0), 11, 0), (12, Some(1), 11, 0), (13, Some(0), 13, 13)]);
    let made = plan(&tasks, OTHER_NAMESPACE).unwrap();
    assert_eq!(made.moves, []);
    assert!(plan(&tasks, OUTSIDE).is_err());
}

#[test]
fn a_group_of_another_namespace_is_not_joined() {
    // Such a tree comes to be when somebody leads a group after it has forked.
    let tasks = tree(&[(10, None, 10, 0), (11, Some(0), 11, 0), (12, Some(1), 0, 0), (13, Some(0), 10, 0)]);
    let made = plan(&tasks, OTHER_NAMESPACE).unwrap();
    assert_eq!(made.processes[0].steps, [make(1), Step::LeadGroup, make(3)]);
    assert_eq!(made.processes[1].steps, [make(2), Step::LeadGroup]);
    // Who leads a session and makes one below that is in the group of the other namespace.
    let tasks = tree(&[(10, None, 10, 10), (11, Some(0), 0, 10)]);
    assert!(plan(&tasks, OTHER_NAMESPACE).is_err());
}

#[test]
fn what_is_led_from_elsewhere_is_named() {
    let error = plan(&tree(&[(10, None, 10, 10), (11, Some(0), 0, 0)]), OUTSIDE).unwrap_err();
    assert_eq!((error.pid.get(), error.reason.contains("pid namespace")), (11, true));
    let error = plan(&tree(&[(10, None, 10, 9), (11, Some(0), 10, 10)]), OUTSIDE).unwrap_err();
    assert_eq!((error.pid.get(), error.reason.contains("from outside the tree")), (10, true));
}

/// A kernel in which a tree comes to be by random system calls: what it gives is what dumps meet.
mod history {
    use super::*;

    #[derive(Debug, Clone, Copy)]
    struct Task {
        pid: NsPid,
        parent: usize,
        pgid: NsPid,
        sid: NsPid,
        objects: Sharing,
        zombie: bool,
        subreaper: bool,
    }

    #[derive(Debug, Default)]
    pub(super) struct Kernel {
        tasks: Vec<Option<Task>>,
        next: i32,
        object: u32,
    }

    impl Kernel {
        pub(super) fn new(leader: bool, outside: Outside) -> Self {
            let mut kernel = Self { tasks: Vec::new(), next: 10, object: 0 };
            let objects = kernel.objects();
            let pid = NsPid::new(10);
            let (pgid, sid) = if leader { (pid, pid) } else { (outside.pgid, outside.sid) };
            let root = Task { pid, parent: 0, pgid, sid, objects, zombie: false, subreaper: false };
            kernel.tasks.push(Some(root));
            kernel
        }

        fn objects(&mut self) -> Sharing {
            let [vm, sighand, files, fs] = [(); 4].map(|()| {
                self.object += 1;
                self.object
            });
            Sharing { vm, sighand, files, fs }
        }

        fn alive(&self) -> Vec<usize> {
            let alive = |(index, task): (usize, &Option<Task>)| task.filter(|t| !t.zombie).map(|_| index);
            self.tasks.iter().enumerate().filter_map(alive).collect()
        }

        pub(super) fn call(&mut self, who: usize, what: u8, with: usize) {
            let alive = self.alive();
            let index = alive[who % alive.len()];
            let Some(task) = self.tasks[index] else { return };
            match what {
                0..=39 => self.fork(index, task, with),
                40..=54 if self.tasks.iter().flatten().all(|t| t.pgid != task.pid) => {
                    self.set(index, |t| (t.sid, t.pgid) = (t.pid, t.pid));
                }
                40..=54 => {}
                55..=69 => {
                    let to = self.tasks[alive[with % alive.len()]].map_or(NsPid::new(0), |t| t.pgid);
                    let to = if with.is_multiple_of(3) { task.pid } else { to };
                    let there = self.tasks.iter().flatten().any(|t| t.pgid == to && t.sid == task.sid)
                        && to.get() > 0;
                    if task.sid != task.pid && (there || to == task.pid) {
                        self.set(index, |t| t.pgid = to);
                    }
                }
                70..=79 => self.set(index, |t| t.subreaper = !t.subreaper),
                80..=87 => {
                    let objects = self.objects();
                    self.set(index, |t| {
                        if with.is_multiple_of(2) {
                            t.objects.files = objects.files;
                        } else {
                            t.objects.fs = objects.fs;
                        }
                    });
                }
                _ if index != 0 => self.exit(index, with.is_multiple_of(2)),
                _ => {}
            }
        }

        fn set(&mut self, index: usize, change: impl FnOnce(&mut Task)) {
            if let Some(task) = self.tasks[index].as_mut() {
                change(task);
            }
        }

        fn fork(&mut self, index: usize, task: Task, with: usize) {
            self.next += 1;
            let mut objects = self.objects();
            let sibling = index != 0 && with.is_multiple_of(11);
            if with.is_multiple_of(5) {
                objects.files = task.objects.files;
            }
            if with.is_multiple_of(7) {
                objects.fs = task.objects.fs;
            }
            if with.is_multiple_of(13) {
                objects.vm = task.objects.vm;
            }
            let parent = if sibling { task.parent } else { index };
            let child =
                Task { pid: NsPid::new(self.next), parent, objects, zombie: false, subreaper: false, ..task };
            self.tasks.push(Some(child));
        }

        /// Orphans go to the nearest subreaper, or leave the tree, and all below them too.
        fn exit(&mut self, index: usize, reaped: bool) {
            let Some(task) = self.tasks[index] else { return };
            let mut up = Some(task.parent);
            while let Some(at) = up {
                let Some(above) = self.tasks[at] else { break };
                if above.subreaper && !above.zombie {
                    break;
                }
                up = (at != 0).then_some(above.parent);
            }
            let orphans: Vec<usize> = (1..self.tasks.len())
                .filter(|i| *i != index && self.tasks[*i].is_some_and(|t| t.parent == index))
                .collect();
            for orphan in orphans {
                match up {
                    Some(parent) => self.set(orphan, |t| t.parent = parent),
                    None => self.leave(orphan),
                }
            }
            if reaped {
                self.tasks[index] = None;
            } else {
                self.set(index, |t| t.zombie = true);
            }
        }

        fn leave(&mut self, index: usize) {
            self.tasks[index] = None;
            for below in 1..self.tasks.len() {
                if self.tasks[below].is_some_and(|t| t.parent == index) {
                    self.leave(below);
                }
            }
        }

        /// The tree as a dump sees it, parents before children.
        pub(super) fn shapes(&self) -> Vec<Shape> {
            let mut order = vec![0];
            let mut at = 0;
            while let Some(index) = order.get(at).copied() {
                let child = |i: &usize| self.tasks[*i].is_some_and(|t| t.parent == index);
                order.extend((1..self.tasks.len()).filter(child));
                at += 1;
            }
            let place = |index: usize| order.iter().position(|i| *i == index);
            let shape = |index: &usize| {
                let task = self.tasks[*index]?;
                Some(Shape {
                    pid: task.pid,
                    parent: if *index == 0 { None } else { place(task.parent) },
                    pgid: task.pgid,
                    sid: task.sid,
                    sharing: (!task.zombie).then_some(task.objects),
                })
            };
            order.iter().filter_map(shape).collect()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever system calls can bring about can be made again, but for what is said to be out of reach.
    #[test]
    fn what_has_come_to_be_can_be_made(
        leader in any::<bool>(),
        namespace in any::<bool>(),
        calls in proptest::collection::vec((any::<usize>(), 0u8..100, any::<usize>()), 0..60),
    ) {
        let outside = if namespace { OTHER_NAMESPACE } else { OUTSIDE };
        let mut kernel = history::Kernel::new(leader, outside);
        for (who, what, with) in calls {
            kernel.call(who, what, with);
        }
        let shapes = kernel.shapes();
        if let Err(error) = plan(&shapes, outside) {
            let known = ["address space", "descriptor table", "root and current directory"];
            prop_assert!(known.iter().any(|what| error.reason.contains(what)), "{error}: {:?}", shapes.iter().map(|s| (s.pid, s.parent, s.pgid, s.sid, s.sharing.is_none())).collect::<Vec<_>>());
        }
    }
}
