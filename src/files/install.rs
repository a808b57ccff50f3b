//! Descriptors of a process that is being restored: fetched from the supervisor, one by one.
//!
//! A process begins with one descriptor, the pidfd of the supervisor under number [`SUPERVISOR`], by which it fetches copies of
//! the supervisor's own (pidfd_getfd(2)). So it never has more than it needs, none of the supervisor's can stay in it, and the
//! supervisor's limit of open files is not the tree's.
//!
//! The kernel gives the lowest free number, so numbers are known when a list is made ([`Descriptors`]), and a table is filled
//! in ascending order ([`plan`]). Where processes share a table (CLONE_FILES), each keeps to numbers of its own.
//!
//! A fetch takes about as long as two dup3(2) (Linux 6.18).

use std::collections::{BTreeMap, HashMap};

use crate::tracee::{CallId, List, Want};

/// Where a process that is being restored has the pidfd of the supervisor.
pub(crate) const SUPERVISOR: i32 = 0;
/// First number for those who share a table. Below it are the numbers that they have for a moment each.
pub(crate) const FIRST_SHARED: i32 = 256;

/// The descriptors that a process has while it is made, besides [`SUPERVISOR`].
#[derive(Debug)]
pub(crate) struct Descriptors {
    first: i32,
    next: i32,
    /// Nobody else has the table, so that the kernel's choice of numbers is known.
    alone: bool,
    /// Numbers by those of the supervisor.
    fetched: HashMap<i32, i32>,
}

impl Descriptors {
    /// Of a process with a table of its own, in which nothing else is.
    pub(crate) fn alone() -> Self {
        Self { first: SUPERVISOR + 1, next: SUPERVISOR + 1, alone: true, fetched: HashMap::new() }
    }

    /// Of one that shares its table with others, which use numbers below `first`.
    pub(crate) fn sharing(first: i32) -> Self {
        Self { first, next: first, alone: false, fetched: HashMap::new() }
    }

    /// The number behind the last that is used.
    pub(crate) fn end(&self) -> i32 {
        self.next
    }

    /// The process's number for the supervisor's descriptor `from`, fetched if it is not there yet.
    pub(crate) fn fetch(&mut self, list: &mut List, from: i32) -> i32 {
        if let Some(number) = self.fetched.get(&from) {
            return *number;
        }
        let args = [SUPERVISOR.into(), from.into(), 0u32.into()];
        let want = self.want();
        let made = list.call("fetch a descriptor (pidfd_getfd)", libc::SYS_pidfd_getfd, &args, want);
        let number = self.keep(list, made);
        self.fetched.insert(from, number);
        number
    }

    /// What a call that makes a descriptor must return, whose result goes to [`Self::keep`].
    pub(crate) fn want(&self) -> Want {
        if self.alone { Want::Equal(u64::from(self.next.cast_unsigned())) } else { Want::Ok }
    }

    /// The number of a descriptor that `made` has just made.
    pub(crate) fn keep(&mut self, list: &mut List, made: CallId) -> i32 {
        let number = self.next;
        self.next += 1;
        if !self.alone {
            let args = [made.into(), number.into(), libc::O_CLOEXEC.into()];
            list.call(
                "dup3 of a descriptor",
                libc::SYS_dup3,
                &args,
                Want::Equal(number.cast_unsigned().into()),
            );
            list.call("close of its other number", libc::SYS_close, &[made.into()], Want::Zero);
        }
        number
    }

    /// Closes all but [`SUPERVISOR`].
    pub(crate) fn close_all(&mut self, list: &mut List) {
        if self.next > self.first {
            let range = [self.first.into(), (self.next - 1).into()];
            list.call("close_range", libc::SYS_close_range, &range, Want::Zero);
        }
        // Numbers of those who share a table are not used again: somebody else may be at the same point at any time.
        if self.alone {
            self.next = self.first;
        } else {
            self.first = self.next;
        }
        self.fetched.clear();
    }
}

/// Where the descriptor for a number of a finished table comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    /// A number of the supervisor.
    pub(super) fd: i32,
    /// FD_CLOEXEC of the result.
    pub(super) cloexec: bool,
}

/// One call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// pidfd_getfd from the supervisor, which gives `to` with FD_CLOEXEC.
    Fetch { supervisor: i32, remote: i32, to: i32 },
    /// fcntl(F_DUPFD) or F_DUPFD_CLOEXEC.
    Copy { from: i32, to: i32, cloexec: bool },
    /// Takes FD_CLOEXEC from a descriptor.
    Keep { fd: i32 },
    /// close.
    Close { fd: i32 },
}

/// No number below the limit is free for the pidfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoRoom;

/// The calls that make the table `wanted` out of one in which [`SUPERVISOR`] is and nothing else.
pub(super) fn plan(wanted: &BTreeMap<i32, Origin>, limit: i32) -> Result<Vec<Step>, NoRoom> {
    let mut steps = Vec::with_capacity(wanted.len());
    let mut supervisor = SUPERVISOR;
    if wanted.contains_key(&SUPERVISOR) {
        supervisor = (SUPERVISOR..).find(|number| !wanted.contains_key(number)).ok_or(NoRoom)?;
        if supervisor >= limit {
            return Err(NoRoom);
        }
        steps.push(Step::Copy { from: SUPERVISOR, to: supervisor, cloexec: true });
        steps.push(Step::Close { fd: SUPERVISOR });
    }
    if wanted.keys().next_back().is_some_and(|highest| *highest >= limit) {
        return Err(NoRoom);
    }
    let mut there: HashMap<i32, i32> = HashMap::with_capacity(wanted.len());
    // The lowest number that is free: all below are the pidfd's or have been filled, as numbers ascend.
    let mut lowest = if supervisor == SUPERVISOR { SUPERVISOR + 1 } else { SUPERVISOR };
    for (&to, origin) in wanted {
        if let Some(&from) = there.get(&origin.fd) {
            steps.push(Step::Copy { from, to, cloexec: origin.cloexec });
        } else {
            let at = lowest;
            steps.push(Step::Fetch { supervisor, remote: origin.fd, to: at });
            if at != to {
                steps.push(Step::Copy { from: at, to, cloexec: origin.cloexec });
                steps.push(Step::Close { fd: at });
            } else if !origin.cloexec {
                steps.push(Step::Keep { fd: to });
            }
            there.insert(origin.fd, to);
        }
        while (lowest <= to && wanted.contains_key(&lowest)) || lowest == supervisor {
            lowest += 1;
        }
    }
    steps.push(Step::Close { fd: supervisor });
    Ok(steps)
}

/// Adds the calls of `steps` to `list`.
pub(super) fn add(steps: &[Step], list: &mut List) {
    for step in steps {
        match *step {
            Step::Fetch { supervisor, remote, to } => {
                let want = Want::Equal(u64::from(to.cast_unsigned()));
                let args = [supervisor.into(), remote.into(), 0u32.into()];
                list.call("fetch a descriptor (pidfd_getfd)", libc::SYS_pidfd_getfd, &args, want);
            }
            Step::Copy { from, to, cloexec } => {
                let command = if cloexec { libc::F_DUPFD_CLOEXEC } else { libc::F_DUPFD };
                let want = Want::Equal(u64::from(to.cast_unsigned()));
                let args = [from.into(), command.into(), to.into()];
                list.call("duplicate (F_DUPFD)", libc::SYS_fcntl, &args, want);
            }
            Step::Keep { fd } => {
                let args = [fd.into(), libc::F_SETFD.into(), 0u32.into()];
                list.call("set flags (F_SETFD)", libc::SYS_fcntl, &args, Want::Zero);
            }
            Step::Close { fd } => {
                list.call("close", libc::SYS_close, &[fd.into()], Want::Zero);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel makes of `steps`: numbers, with what is behind them and FD_CLOEXEC.
    fn execute(steps: &[Step], limit: i32) -> BTreeMap<i32, (i32, bool)> {
        let mut table = BTreeMap::from([(SUPERVISOR, (-1, true))]);
        for step in steps {
            let lowest = |table: &BTreeMap<i32, (i32, bool)>, from: i32| {
                (from..).find(|n| !table.contains_key(n)).filter(|n| *n < limit).unwrap()
            };
            match *step {
                Step::Fetch { supervisor, remote, to } => {
                    assert_eq!(table.get(&supervisor), Some(&(-1, true)), "the pidfd is where it should be");
                    assert_eq!(lowest(&table, 0), to);
                    table.insert(to, (remote, true));
                }
                Step::Copy { from, to, cloexec } => {
                    let (what, _) = table[&from];
                    assert_eq!(lowest(&table, to), to);
                    table.insert(to, (what, cloexec));
                }
                Step::Keep { fd } => table.get_mut(&fd).unwrap().1 = false,
                Step::Close { fd } => drop(table.remove(&fd).unwrap()),
            }
        }
        table
    }

    fn check(wanted: &BTreeMap<i32, (i32, bool)>) {
        let origin = |(&to, &(fd, cloexec)): (&i32, &(i32, bool))| (to, Origin { fd, cloexec });
        let steps = plan(&wanted.iter().map(origin).collect(), 300).unwrap();
        assert_eq!(&execute(&steps, 300), wanted, "{steps:?}");
    }

    #[test]
    fn tables() {
        check(&BTreeMap::new());
        check(&BTreeMap::from([(0, (7, false)), (1, (7, false)), (2, (7, true))]));
        check(&BTreeMap::from([(1, (7, true)), (5, (8, false)), (200, (7, false))]));
    }

    #[test]
    fn a_full_table_has_no_room_for_the_pidfd() {
        let all = (0..4).map(|n| (n, Origin { fd: n, cloexec: false })).collect();
        assert_eq!(plan(&all, 4), Err(NoRoom));
        assert!(plan(&all, 5).is_ok());
        let high = BTreeMap::from([(4, Origin { fd: 4, cloexec: false })]);
        assert_eq!(plan(&high, 4), Err(NoRoom));
    }

    #[test]
    fn numbers_are_known() {
        let mut list = List::new("test");
        let mut alone = Descriptors::alone();
        assert_eq!(
            (alone.fetch(&mut list, 30), alone.fetch(&mut list, 40), alone.fetch(&mut list, 30)),
            (1, 2, 1)
        );
        assert_eq!(list.len(), 2);
        alone.close_all(&mut list);
        assert_eq!(alone.fetch(&mut list, 40), 1);
        let mut shared = Descriptors::sharing(FIRST_SHARED);
        assert_eq!(shared.fetch(&mut list, 30), FIRST_SHARED);
        shared.close_all(&mut list);
        assert_eq!((shared.fetch(&mut list, 30), shared.end()), (FIRST_SHARED + 1, FIRST_SHARED + 2));
    }

    proptest! {
        #[test]
        fn any_table(wanted in proptest::collection::btree_map(0..250i32, (0..40i32, any::<bool>()), 0..60)) {
            check(&wanted);
        }
    }
}
