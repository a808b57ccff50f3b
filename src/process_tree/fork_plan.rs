//! Who forks whom, and when: the order of system calls that gives every task its parent, session, group and sharing.
//!
//! The rules of the kernel behind it:
//!
//! - A task is made in the session and group that its maker has at that moment. It leaves a session only by becoming
//!   the leader of its own, so children that are still in the session their parent had before are made before the
//!   parent's setsid(2), the others after it.
//! - A child of P that is in the session of somebody below P was left to P when its own parent died. It is made by a
//!   helper below the leader of that session; P is a subreaper while the helper ends, and gets it. Where the leader is a child
//!   of P itself, it makes the task as its sibling (CLONE_PARENT).
//! - A session whose leader is dead gets a helper with the leader's pid, which leads it and makes the members, and ends when
//!   all is made. Likewise a process group whose leader is dead.
//! - A leader of a group that is in another group now leads its own until all members have joined.
//! - A descriptor table (or root and current directory) can only be shared with who makes a task. Where two tasks share that do
//!   not make one another, those between them share too, and unshare(2) when both are there.
//!
//! Not every shape can be made: a plan is tried in the model of the kernel ([`super::model`]) before it is given out, and
//! what comes out otherwise than wanted is an error that names the task.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Outside, Shape, model, shape::Sharing};
use crate::sys::pid::NsPid;

/// Why a tree cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("task {pid}: {reason}")]
pub(crate) struct Impossible {
    /// The task that would not be as it was.
    pub(crate) pid: NsPid,
    /// What would not.
    pub(crate) reason: String,
}

impl Impossible {
    /// Of a helper nobody has heard: what it cannot do, the tree cannot.
    fn of_task(self, tasks: &[Shape]) -> Self {
        match tasks.first() {
            Some(root) if tasks.iter().all(|task| task.pid != self.pid) => {
                let reason = match self.pid.get() {
                    0.. => format!("of process {}, which is dead: {}", self.pid, self.reason),
                    _ => self.reason,
                };
                Self { pid: root.pid, reason }
            }
            _ => self,
        }
    }
}

/// The id of a process that is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlannedPid {
    /// This one: it is a task's, or a session or group has it.
    Exact(NsPid),
    /// Any that is free.
    Any,
}

/// What a child shares with its maker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Share {
    /// CLONE_VM.
    pub(crate) vm: bool,
    /// CLONE_SIGHAND.
    pub(crate) sighand: bool,
    /// CLONE_FILES.
    pub(crate) files: bool,
    /// CLONE_FS.
    pub(crate) fs: bool,
}

/// A step in the life of a process, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Makes this process, as its child or with CLONE_PARENT as its sibling.
    Make {
        /// Index of the process.
        child: usize,
        /// As a sibling.
        sibling: bool,
        /// What they have in common.
        share: Share,
    },
    /// Becomes leader of a session.
    Setsid,
    /// Becomes leader of a group.
    LeadGroup,
    /// Gets a descriptor table, or root and current directory, of its own: a copy.
    Unshare {
        /// CLONE_FILES.
        files: bool,
        /// CLONE_FS.
        fs: bool,
    },
}

/// What happens when all processes are there, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Move {
    /// Joins a group of its session.
    Join {
        /// Index of the process.
        who: usize,
        /// The group.
        group: NsPid,
    },
    /// A helper ends while `by` is a subreaper, which gets the helper's children.
    Adopt {
        /// Index of the new parent.
        by: usize,
        /// Index of the helper.
        from: usize,
    },
    /// A helper ends.
    End {
        /// Index of the helper.
        who: usize,
    },
}

/// A process that is made: a task or a helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Its id.
    pub(crate) pid: PlannedPid,
    /// Index of the task, `None` for a helper.
    pub(crate) task: Option<usize>,
    /// Who makes it, `None` for the first.
    pub(crate) maker: Option<usize>,
    /// Its parent when all is made, `None` for a child of whoever makes the tree.
    pub(crate) parent: Option<usize>,
    /// What it does as soon as it is there.
    pub(crate) steps: Vec<Step>,
}

/// How to make a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForkPlan {
    /// All processes; those of tasks first, at the tasks' indices.
    pub(crate) processes: Vec<Planned>,
    /// The one that is made from outside: the root, or the intermediate parent between it and who restores.
    pub(crate) first: usize,
    /// What happens once all are there, in order. Helpers that are in none of them end last.
    pub(crate) moves: Vec<Move>,
}

impl ForkPlan {
    /// Puts a helper between whoever makes the tree and the root. It ends like all helpers, long before the tree runs: then
    /// the root is a child of whoever adopts orphans, and the end of crtool is nothing to it.
    pub(crate) fn add_intermediate_parent(&mut self) {
        let intermediate = self.processes.len();
        if let Some(root) = self.processes.first_mut() {
            root.maker = Some(intermediate);
        }
        let steps = vec![Step::Make { child: 0, sibling: false, share: Share::default() }];
        self.processes.push(Planned { pid: PlannedPid::Any, task: None, maker: None, parent: None, steps });
        self.moves.push(Move::End { who: intermediate });
        self.first = intermediate;
    }

    /// Indices of all processes, makers before those they make.
    pub(crate) fn order(&self) -> Vec<usize> {
        let mut order = vec![self.first];
        let mut at = 0;
        while let Some(process) = order.get(at).and_then(|index| self.processes.get(*index)) {
            order.extend(process.steps.iter().filter_map(|step| match step {
                Step::Make { child, .. } => Some(*child),
                _ => None,
            }));
            at += 1;
        }
        order
    }

    /// What each process shares with its maker.
    pub(crate) fn shares(&self) -> Vec<Share> {
        let mut shares = vec![Share::default(); self.processes.len()];
        for step in self.processes.iter().flat_map(|process| &process.steps) {
            if let Step::Make { child, share, .. } = step
                && let Some(of_child) = shares.get_mut(*child)
            {
                *of_child = *share;
            }
        }
        shares
    }

    /// Ids that no task has and that helpers must have: those of dead leaders.
    pub(crate) fn ids_of_the_dead(&self) -> impl Iterator<Item = NsPid> + '_ {
        self.processes.iter().filter(|p| p.task.is_none()).filter_map(|p| match p.pid {
            PlannedPid::Exact(pid) => Some(pid),
            PlannedPid::Any => None,
        })
    }
}

/// Plans the making of `tasks`, parents before children, by somebody in `outside`.
pub(crate) fn plan(tasks: &[Shape], outside: Outside) -> Result<ForkPlan, Impossible> {
    // `NONE`: a session or group that is led from another pid namespace. It can be inherited from outside, and never be joined.
    let cannot_be = |task: &&Shape| {
        let session = task.sid < NsPid::NONE || task.sid == NsPid::NONE && outside.sid != NsPid::NONE;
        let group = task.pgid < NsPid::NONE
            || task.pgid == NsPid::NONE && (outside.pgid != NsPid::NONE || task.sid != outside.sid);
        session || group
    };
    if let Some(task) = tasks.iter().find(cannot_be) {
        let reason = "its session or process group is led from outside of this pid namespace";
        return Err(Impossible { pid: task.pid, reason: reason.into() });
    }
    let mut planner = Planner::new(tasks, outside);
    planner.sessions()?;
    planner.makers();
    planner.groups();
    let mut plan = planner.steps();
    let joins = model::check(tasks, &plan, outside).map_err(|error| error.of_task(tasks))?;
    let mut joins = joins.into_iter();
    plan.moves.retain(|step| !matches!(step, Move::Join { .. }) || joins.next() == Some(true));
    Ok(plan)
}

/// How a task is made whose parent cannot make it in the right session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// By this process, as its sibling.
    Sibling(usize),
    /// By a helper of this process; it is adopted by its parent.
    Adopted(usize),
}

struct Planner<'t> {
    tasks: &'t [Shape],
    outside: Outside,
    index_of: HashMap<NsPid, usize>,
    children: Vec<Vec<usize>>,
    /// The session that a task is made in; `None` for leaders of which no child asks for one.
    made_in: Vec<Option<NsPid>>,
    /// Made before the setsid of its parent.
    early: BTreeSet<usize>,
    /// Not made by its parent.
    guests: BTreeMap<usize, Guest>,
    processes: Vec<Planned>,
    /// Helpers that lead a session for a dead leader, by session.
    session_helpers: BTreeMap<NsPid, usize>,
    /// Helpers that lead a group for a dead leader, by group, and who makes them.
    group_helpers: BTreeMap<NsPid, (usize, usize)>,
    /// Tasks that lead a group which they are not in any more.
    former_leaders: BTreeSet<usize>,
    moves: Vec<Move>,
}

impl<'t> Planner<'t> {
    fn new(tasks: &'t [Shape], outside: Outside) -> Self {
        let mut children = vec![Vec::new(); tasks.len()];
        for (index, task) in tasks.iter().enumerate() {
            if let Some(of) = task.parent.and_then(|p| children.get_mut(p)) {
                of.push(index);
            }
        }
        let processes = tasks.iter().enumerate().map(|(index, task)| Planned {
            pid: PlannedPid::Exact(task.pid),
            task: Some(index),
            maker: task.parent,
            parent: task.parent,
            steps: Vec::new(),
        });
        Self {
            tasks,
            outside,
            index_of: tasks.iter().enumerate().map(|(index, task)| (task.pid, index)).collect(),
            children,
            made_in: tasks.iter().map(|t| (!t.leads_session()).then_some(t.sid)).collect(),
            early: BTreeSet::new(),
            guests: BTreeMap::new(),
            processes: processes.collect(),
            session_helpers: BTreeMap::new(),
            group_helpers: BTreeMap::new(),
            former_leaders: BTreeSet::new(),
            moves: Vec::new(),
        }
    }

    fn parent(&self, index: usize) -> Option<usize> {
        self.tasks.get(index).and_then(|t| t.parent)
    }

    /// From the parent of a task up to the root.
    fn ancestors(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(self.parent(index), |at| self.parent(*at))
    }

    fn add_helper(&mut self, pid: PlannedPid, maker: usize, parent: usize) -> usize {
        let process =
            Planned { pid, task: None, maker: Some(maker), parent: Some(parent), steps: Vec::new() };
        self.processes.push(process);
        self.processes.len() - 1
    }

    /// Whether task `index`, a leader, can be made in `session`, which it then leaves.
    fn can_be_made_in(&self, index: usize, session: NsPid) -> bool {
        match self.index_of.get(&session) {
            // Nobody below a task can hand a session down to it.
            Some(leader) => *leader != index && !self.ancestors(*leader).any(|above| above == index),
            None => self.handed_down(index, session),
        }
    }

    /// Whether a session that has lost its leader comes to task `index` from above.
    fn handed_down(&self, index: usize, session: NsPid) -> bool {
        for above in self.ancestors(index) {
            if self.tasks[above].sid == session {
                return true;
            }
            // Who is no leader has been in its own session always.
            if !self.tasks[above].leads_session() {
                return false;
            }
        }
        session == self.outside.sid
    }

    /// Decides in which session each task is made, and who cannot be made by its parent.
    fn sessions(&mut self) -> Result<(), Impossible> {
        let mut foreign: BTreeMap<NsPid, BTreeSet<usize>> = BTreeMap::new();
        // Children before parents: what a child needs decides what its parent must be made in.
        for index in (0..self.tasks.len()).rev() {
            let task = self.tasks[index];
            for child in self.children[index].clone() {
                let Some(needed) = self.made_in[child].filter(|needed| *needed != task.sid) else { continue };
                let free = self.made_in[index].is_none_or(|made_in| made_in == needed);
                if task.leads_session() && free && self.can_be_made_in(index, needed) {
                    self.made_in[index] = Some(needed);
                    self.early.insert(child);
                } else {
                    foreign.entry(needed).or_default().insert(child);
                }
            }
        }
        if let (Some(Some(made_in)), Some(root)) = (self.made_in.first(), self.tasks.first())
            && *made_in != self.outside.sid
        {
            return Err(Impossible {
                pid: root.pid,
                reason: format!("its session {made_in} is led from outside the tree"),
            });
        }
        for (session, members) in foreign {
            match self.index_of.get(&session) {
                Some(leader) => self.guests_of_living(*leader, &members)?,
                None => self.guests_of_dead(session, members)?,
            }
        }
        Ok(())
    }

    /// Members of a session whose leader is in the tree, which their parents are not.
    fn guests_of_living(&mut self, leader: usize, members: &BTreeSet<usize>) -> Result<(), Impossible> {
        for &member in members {
            let parent = self.parent(member);
            if self.tasks[leader].leads_session() && self.parent(leader) == parent {
                self.guests.insert(member, Guest::Sibling(leader));
            } else if self.tasks[leader].leads_session() && self.ancestors(leader).any(|a| Some(a) == parent)
            {
                self.guests.insert(member, Guest::Adopted(leader));
            } else {
                return Err(self.out_of_reach(member));
            }
        }
        Ok(())
    }

    fn out_of_reach(&self, member: usize) -> Impossible {
        let task = self.tasks[member];
        let reason = format!("its session {} belongs to a task that is not below its parent", task.sid);
        Impossible { pid: task.pid, reason }
    }

    /// From a task and its parent up to the root.
    fn chain(&self, index: usize) -> Vec<usize> {
        std::iter::once(index).chain(self.ancestors(index)).collect()
    }

    /// Members of a session that has lost its leader: a helper stands for it.
    fn guests_of_dead(&mut self, session: NsPid, members: BTreeSet<usize>) -> Result<(), Impossible> {
        // As low as possible, because it can leave tasks to its parent and to whoever is above that.
        let mut hosts: Vec<usize> = members.iter().flat_map(|m| self.ancestors(*m)).collect();
        hosts.sort_unstable_by_key(|host| (std::cmp::Reverse(self.chain(*host).len()), *host));
        hosts.dedup();
        let reached = |host: &usize| Some((*host, self.lifted(&self.chain(*host), session, &members)?));
        let Some((host, (early, guests))) = hosts.iter().find_map(reached) else {
            let member = members.first().copied().unwrap_or(0);
            return Err(self.out_of_reach(member));
        };
        for child in early {
            self.early.insert(child);
            if let Some(parent) = self.parent(child) {
                self.made_in[parent] = Some(session);
            }
        }
        let helper = self.add_helper(PlannedPid::Exact(session), host, host);
        self.session_helpers.insert(session, helper);
        for member in guests {
            let guest = if self.parent(member) == Some(host) {
                Guest::Sibling(helper)
            } else {
                Guest::Adopted(helper)
            };
            self.guests.insert(member, guest);
        }
        Ok(())
    }

    /// Who has to be made by a helper whose parent is the first of `chain`, so that `members` are in `session`: they
    /// themselves, or leaders above them, which make the next below before they leave the session. First the children that
    /// are made so. `None` when there is no way.
    fn lifted(
        &self,
        chain: &[usize],
        session: NsPid,
        members: &BTreeSet<usize>,
    ) -> Option<(BTreeSet<usize>, BTreeSet<usize>)> {
        let (mut early, mut guests) = (BTreeSet::new(), BTreeSet::new());
        for member in members {
            let mut at = *member;
            loop {
                let parent = self.parent(at)?;
                if chain.contains(&parent) {
                    guests.insert(at);
                    break;
                }
                let leads = self.tasks[parent].leads_session();
                if !leads || self.made_in[parent].is_some_and(|made_in| made_in != session) {
                    return None;
                }
                early.insert(at);
                at = parent;
            }
        }
        Some((early, guests))
    }

    /// Sets the makers of those that are not made by their parents.
    fn makers(&mut self) {
        for (member, guest) in self.guests.clone() {
            let maker = match guest {
                Guest::Sibling(of) => of,
                Guest::Adopted(below) => {
                    let helper = self.add_helper(PlannedPid::Any, below, below);
                    if let Some(by) = self.parent(member) {
                        self.moves.push(Move::Adopt { by, from: helper });
                    }
                    helper
                }
            };
            self.processes[member].maker = Some(maker);
        }
    }

    /// Groups: who leads one from the beginning, who stands for dead leaders, who joins when.
    fn groups(&mut self) {
        let mut joins = Vec::new();
        let mut later = Vec::new();
        for (index, task) in self.tasks.iter().enumerate() {
            if task.pgid == task.pid || task.leads_session() {
                continue;
            }
            let is_outside = task.sid == self.outside.sid && task.pgid == self.outside.pgid;
            match self.index_of.get(&task.pgid) {
                _ if is_outside || self.session_helpers.contains_key(&task.pgid) => {}
                Some(leader) => {
                    let leader_of = self.tasks[*leader];
                    if leader_of.pgid != leader_of.pid {
                        self.former_leaders.insert(*leader);
                    }
                }
                None if self.group_helpers.contains_key(&task.pgid) => {}
                None => {
                    let pid = PlannedPid::Exact(task.pgid);
                    let process = Planned {
                        pid,
                        task: None,
                        maker: Some(index),
                        parent: Some(index),
                        steps: Vec::new(),
                    };
                    self.processes.push(process);
                    self.group_helpers.insert(task.pgid, (self.processes.len() - 1, index));
                }
            }
            joins.push((index, task.pgid));
        }
        for (who, group) in joins {
            if self.former_leaders.contains(&who) {
                later.push((who, group));
            } else {
                self.moves.push(Move::Join { who, group });
            }
        }
        self.leave_groups(later);
    }

    /// Former leaders join their groups: each when its own is kept by others, who have joined it.
    fn leave_groups(&mut self, mut waiting: Vec<(usize, NsPid)>) {
        let mut kept: BTreeSet<NsPid> = self
            .moves
            .iter()
            .filter_map(|step| match step {
                Move::Join { group, .. } => Some(*group),
                _ => None,
            })
            .collect();
        while !waiting.is_empty() {
            let is_free = |(who, _): &(usize, NsPid)| {
                let own = self.tasks[*who].pid;
                kept.contains(&own) || !waiting.iter().any(|(_, group)| *group == own)
            };
            if let Some(at) = waiting.iter().position(is_free) {
                let (who, group) = waiting.remove(at);
                kept.insert(group);
                self.moves.push(Move::Join { who, group });
            } else if let Some((who, _)) = waiting.first().copied() {
                // They wait for each other: a helper that is made in the group keeps it.
                self.add_helper(PlannedPid::Any, who, who);
                kept.insert(self.tasks[who].pid);
            }
        }
    }

    /// Processes that are, or make others that are, in a group that is led from another pid namespace.
    fn in_foreign_group(&self) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        for (index, process) in self.processes.iter().enumerate() {
            if process.task.is_some_and(|task| self.tasks[task].pgid == NsPid::NONE) {
                let mut at = Some(index);
                while let Some(one) = at.filter(|one| found.insert(*one)) {
                    at = self.processes[one].maker;
                }
            }
        }
        found
    }

    /// The steps of everybody.
    fn steps(mut self) -> ForkPlan {
        let sharing = Classes::new(self.tasks, &self.processes);
        let mut made: Vec<Vec<usize>> = vec![Vec::new(); self.processes.len()];
        for (index, process) in self.processes.iter().enumerate() {
            if let Some(of) = process.maker.and_then(|m| made.get_mut(m)) {
                of.push(index);
            }
        }
        let in_foreign_group = self.in_foreign_group();
        for (index, children) in made.into_iter().enumerate() {
            let mut before = Vec::new();
            let mut after = Vec::new();
            for child in children {
                if self.early.contains(&child) && self.processes[child].maker == self.parent(child) {
                    before.push(child);
                } else {
                    after.push(child);
                }
            }
            let task = self.processes[index].task.map(|t| self.tasks[t]);
            let pid = self.processes[index].pid;
            let is_leader = |helpers: &BTreeMap<NsPid, usize>| {
                helpers.values().any(|h| *h == index) && matches!(pid, PlannedPid::Exact(_))
            };
            let mut steps = Vec::new();
            let mut order = sharing.order(index, before, after);
            steps.append(&mut order.before);
            if task.is_some_and(|t| t.leads_session()) || is_leader(&self.session_helpers) {
                steps.push(Step::Setsid);
            }
            let leads_group = task.is_some_and(|t| t.pgid == t.pid && !t.leads_session())
                || self.former_leaders.contains(&index)
                || self.group_helpers.values().any(|(helper, _)| *helper == index);
            // Who is in the group that nobody can join has to be made in it.
            let inherits =
                |step: &Step| matches!(step, Step::Make { child, .. } if in_foreign_group.contains(child));
            let first =
                order.after.iter().rposition(inherits).filter(|_| leads_group).map_or(0, |last| last + 1);
            steps.extend(order.after.drain(..first));
            if leads_group {
                steps.push(Step::LeadGroup);
            }
            steps.append(&mut order.after);
            for step in &mut steps {
                if let Step::Make { child, sibling, .. } = step {
                    *sibling = self.guests.get(child) == Some(&Guest::Sibling(index));
                }
            }
            self.processes[index].steps = steps;
        }
        let mut plan = ForkPlan { processes: self.processes, first: 0, moves: self.moves };
        let ended: BTreeSet<usize> = plan
            .moves
            .iter()
            .filter_map(|m| match m {
                Move::Adopt { from, .. } => Some(*from),
                _ => None,
            })
            .collect();
        for (who, process) in plan.processes.iter().enumerate() {
            if process.task.is_none() && !ended.contains(&who) {
                plan.moves.push(Move::End { who });
            }
        }
        plan
    }
}

/// Which tasks share descriptor tables and the like, and how that goes down the tree of makers.
struct Classes {
    sharing: Vec<Option<Sharing>>,
    /// For each process and kind: the object that it must have while it makes some of its children, because others
    /// outside of what it makes have it too.
    carried: Vec<[Option<u32>; 2]>,
}

/// What can be shared by others than who makes a task, on the way to it.
const KINDS: [fn(&Sharing) -> u32; 2] = [|s| s.files, |s| s.fs];

/// Children in order, as steps.
#[derive(Default)]
struct Order {
    before: Vec<Step>,
    after: Vec<Step>,
}

impl Classes {
    fn new(tasks: &[Shape], processes: &[Planned]) -> Self {
        let sharing: Vec<Option<Sharing>> =
            processes.iter().map(|p| p.task.and_then(|t| tasks[t].sharing)).collect();
        let mut carried = vec![[None; 2]; processes.len()];
        for (kind, id_of) in KINDS.iter().enumerate() {
            let mut members: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
            for (index, sharing) in sharing.iter().enumerate() {
                if let Some(id) = sharing.as_ref().map(id_of).filter(|id| *id != 0) {
                    members.entry(id).or_default().push(index);
                }
            }
            for (id, members) in members.into_iter().filter(|(_, m)| m.len() > 1) {
                // Everybody on the way from a member up to whoever is above all members.
                let mut seen: BTreeMap<usize, usize> = BTreeMap::new();
                for member in &members {
                    let up = std::iter::successors(Some(*member), |at| processes[*at].maker);
                    for at in up.take(processes.len()) {
                        *seen.entry(at).or_default() += 1;
                    }
                }
                for (at, _) in seen.iter().filter(|(_, count)| **count < members.len()) {
                    carried[*at][kind] = carried[*at][kind].or(Some(id));
                }
            }
        }
        Self { sharing, carried }
    }

    fn own(&self, index: usize, kind: usize) -> Option<u32> {
        self.sharing[index].as_ref().map(KINDS[kind])
    }

    /// When a child is made, by what it needs to share: first what the maker was made with and does not keep, then what
    /// only children share, then what the maker keeps.
    fn rank(&self, maker: usize, child: usize, kind: usize) -> (u8, u32) {
        match self.carried[child][kind] {
            None => (2, 0),
            Some(id) if self.own(maker, kind) == Some(id) => (2, 0),
            Some(id) if self.carried[maker][kind] == Some(id) => (0, id),
            Some(id) => (1, id),
        }
    }

    fn order(&self, maker: usize, mut before: Vec<usize>, mut after: Vec<usize>) -> Order {
        let key = |child: &usize| (self.rank(maker, *child, 0), self.rank(maker, *child, 1), *child);
        before.sort_by_key(key);
        after.sort_by_key(key);
        let mut order = Order::default();
        // What the maker has at the moment that it is not to keep, by kind.
        let mut held: [Option<u32>; 2] = std::array::from_fn(|kind| {
            self.carried[maker][kind].filter(|id| self.own(maker, kind) != Some(*id))
        });
        let split = before.len();
        let all: Vec<usize> = before.into_iter().chain(after).collect();
        for (position, child) in all.iter().copied().enumerate() {
            let ranks: [(u8, u32); 2] = std::array::from_fn(|kind| self.rank(maker, child, kind));
            let steps = if position < split { &mut order.before } else { &mut order.after };
            let leaves = |kind: usize| held[kind].is_some_and(|id| ranks[kind].0 == 2 || ranks[kind].1 != id);
            // Whoever shares nothing gets a copy of whatever is there.
            let indifferent = |kind: usize| self.carried[child][kind].is_none();
            let [files, fs] = [0, 1].map(|kind| leaves(kind) && !indifferent(kind));
            if files || fs {
                steps.push(Step::Unshare { files, fs });
            }
            for (kind, unshared) in [files, fs].into_iter().enumerate() {
                if unshared {
                    held[kind] = None;
                }
                if ranks[kind].0 < 2 {
                    held[kind] = Some(ranks[kind].1);
                }
            }
            let share = self.share(maker, child);
            steps.push(Step::Make { child, sibling: false, share });
        }
        let [files, fs] = held.map(|held| held.is_some());
        if files || fs {
            order.after.push(Step::Unshare { files, fs });
        }
        order
    }

    fn share(&self, maker: usize, child: usize) -> Share {
        let (ours, theirs) = (self.sharing[maker], self.sharing[child]);
        let same = |id: fn(&Sharing) -> u32| {
            ours.as_ref().zip(theirs.as_ref()).is_some_and(|(a, b)| id(a) == id(b) && id(a) != 0)
        };
        let vm = same(|s| s.vm);
        Share {
            vm,
            sighand: vm && same(|s| s.sighand),
            files: self.carried[child][0].is_some(),
            fs: self.carried[child][1].is_some(),
        }
    }
}
