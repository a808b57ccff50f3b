//! From the numbers a puppet inherited to the numbers its task had.
//!
//! A puppet starts with a copy of the supervisor's descriptor table, which holds every description of the tree
//! under some number. One description may go to many numbers; a target number may at the same time be the source
//! of another; so this is a parallel move, with cycles taken apart through one free number. Then everything
//! else is closed, so the task has exactly what it had, and descriptors that the supervisor opened
//! after the puppet was cloned are fetched from it.

use std::collections::{BTreeMap, BTreeSet};

use super::FileError;
use crate::tracee::{List, Want};

/// Where the descriptor for a number comes from.
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
    /// dup3(from, to).
    Dup { from: i32, to: i32, cloexec: bool },
    /// fcntl(F_SETFD).
    Cloexec { fd: i32, on: bool },
    /// close_range(first, last).
    Close { first: u32, last: u32 },
    /// pidfd_getfd(pidfd, remote), which must give `to`.
    Fetch { pidfd: i32, remote: i32, to: i32 },
}

/// What becomes of a table.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// Numbers whose descriptions the puppet has inherited.
    pub(super) inherited: BTreeMap<i32, Origin>,
    /// Numbers whose descriptions only the supervisor has.
    pub(super) late: BTreeMap<i32, Origin>,
    /// The supervisor's pidfd of itself, inherited; needed for late ones only.
    pub(super) supervisor: Option<i32>,
}

/// No number below the limit is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoRoom;

/// The lowest number that none of `taken` holds.
fn lowest_free(taken: &BTreeSet<i32>) -> i32 {
    let mut free = 0;
    for &number in taken {
        if number != free {
            break;
        }
        free += 1;
    }
    free
}

/// The calls that make a puppet's table the one that is wanted.
pub(super) fn plan(wanted: &Wanted, limit: i32) -> Result<Vec<Step>, NoRoom> {
    let mut steps = Vec::new();
    let mut moves: BTreeMap<i32, Origin> = wanted.inherited.clone();
    let mut busy: BTreeSet<i32> = BTreeSet::new();
    busy.extend(moves.keys().chain(wanted.late.keys()));
    busy.extend(moves.values().map(|origin| origin.fd));
    // The pidfd stays until the end at a number that nobody wants.
    let mut pidfd = None;
    if !wanted.late.is_empty() {
        let from = wanted.supervisor.ok_or(NoRoom)?;
        busy.insert(from);
        let at = if moves.contains_key(&from) || wanted.late.contains_key(&from) {
            lowest_free(&busy)
        } else {
            from
        };
        busy.insert(at);
        moves.insert(at, Origin { fd: from, cloexec: true });
        pidfd = Some(at);
    }
    let spare = lowest_free(&busy);
    parallel_move(&moves, spare, limit, &mut steps)?;
    if moves.keys().chain(wanted.late.keys()).any(|to| *to >= limit) {
        return Err(NoRoom);
    }
    close_gaps(moves.keys().copied(), &mut steps);
    if let Some(pidfd) = pidfd {
        let mut have: BTreeSet<i32> = moves.keys().copied().collect();
        for (&to, origin) in &wanted.late {
            let at = lowest_free(&have);
            steps.push(Step::Fetch { pidfd, remote: origin.fd, to: at });
            if at == to {
                steps.push(Step::Cloexec { fd: to, on: origin.cloexec });
            } else {
                steps.push(Step::Dup { from: at, to, cloexec: origin.cloexec });
                steps.push(Step::Close { first: at.cast_unsigned(), last: at.cast_unsigned() });
            }
            have.insert(to);
        }
        steps.push(Step::Close { first: pidfd.cast_unsigned(), last: pidfd.cast_unsigned() });
    }
    Ok(steps)
}

fn parallel_move(
    moves: &BTreeMap<i32, Origin>,
    spare: i32,
    limit: i32,
    steps: &mut Vec<Step>,
) -> Result<(), NoRoom> {
    let mut pending: BTreeMap<i32, Origin> = BTreeMap::new();
    // How many pending moves still read a number, and which.
    let mut readers: BTreeMap<i32, BTreeSet<i32>> = BTreeMap::new();
    for (&to, &origin) in moves {
        if to == origin.fd {
            steps.push(Step::Cloexec { fd: to, on: origin.cloexec });
        } else {
            pending.insert(to, origin);
            readers.entry(origin.fd).or_default().insert(to);
        }
    }
    let mut ready: Vec<i32> = pending.keys().copied().filter(|to| !readers.contains_key(to)).collect();
    loop {
        while let Some(to) = ready.pop() {
            let Some(origin) = pending.remove(&to) else { continue };
            steps.push(Step::Dup { from: origin.fd, to, cloexec: origin.cloexec });
            if let Some(left) = readers.get_mut(&origin.fd) {
                left.remove(&to);
                if left.is_empty() {
                    readers.remove(&origin.fd);
                    if pending.contains_key(&origin.fd) {
                        ready.push(origin.fd);
                    }
                }
            }
        }
        // What is left is cycles: take what one of them would overwrite out of the way.
        let Some((&to, _)) = pending.first_key_value() else { return Ok(()) };
        if spare >= limit {
            return Err(NoRoom);
        }
        steps.push(Step::Dup { from: to, to: spare, cloexec: true });
        let moved = readers.remove(&to).unwrap_or_default();
        for reader in &moved {
            if let Some(origin) = pending.get_mut(reader) {
                origin.fd = spare;
            }
        }
        readers.insert(spare, moved);
        ready.push(to);
    }
}

/// Closes all that lies between the numbers `kept`, which come in order.
fn close_gaps(kept: impl Iterator<Item = i32>, steps: &mut Vec<Step>) {
    let mut next = 0u32;
    for number in kept {
        let number = number.cast_unsigned();
        if number > next {
            steps.push(Step::Close { first: next, last: number - 1 });
        }
        next = number + 1;
    }
    steps.push(Step::Close { first: next, last: u32::MAX });
}

/// Adds the calls to a list.
pub(super) fn add(steps: &[Step], list: &mut List) -> Result<(), FileError> {
    for step in steps {
        match *step {
            Step::Dup { from, to, cloexec } => {
                let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
                let want = Want::Equal(u64::from(to.cast_unsigned()));
                list.call(
                    format!("put a descriptor at {to}"),
                    libc::SYS_dup3,
                    &[from.into(), to.into(), flags.into()],
                    want,
                );
            }
            Step::Cloexec { fd, on } => {
                let flags = if on { libc::FD_CLOEXEC } else { 0 };
                list.call(
                    format!("set the flags of descriptor {fd}"),
                    libc::SYS_fcntl,
                    &[fd.into(), libc::F_SETFD.into(), flags.into()],
                    Want::Zero,
                );
            }
            Step::Close { first, last } => {
                list.call(
                    "close what the task did not have",
                    libc::SYS_close_range,
                    &[first.into(), last.into(), 0u32.into()],
                    Want::Zero,
                );
            }
            Step::Fetch { pidfd, remote, to } => {
                list.call(
                    "fetch a descriptor that was opened late",
                    libc::SYS_pidfd_getfd,
                    &[pidfd.into(), remote.into(), 0u32.into()],
                    Want::Equal(u64::from(to.cast_unsigned())),
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A table as the kernel would keep it: number -> (which description, cloexec).
    type Table = BTreeMap<i32, (i32, bool)>;

    fn execute(mut table: Table, remote: &BTreeMap<i32, i32>, steps: &[Step], limit: i32) -> Table {
        for step in steps {
            match *step {
                Step::Dup { from, to, cloexec } => {
                    assert!(from != to && to < limit, "{step:?}");
                    let what = table.get(&from).unwrap_or_else(|| panic!("{step:?} in {table:?}")).0;
                    table.insert(to, (what, cloexec));
                }
                Step::Cloexec { fd, on } => table.get_mut(&fd).unwrap().1 = on,
                Step::Close { first, last } => {
                    assert!(first <= last);
                    table.retain(|fd, _| !(first..=last).contains(&fd.cast_unsigned()));
                }
                Step::Fetch { pidfd, remote: number, to } => {
                    assert_eq!(table.get(&pidfd), Some(&(-1, true)), "the pidfd is where it should be");
                    let free = lowest_free(&table.keys().copied().collect());
                    assert_eq!(free, to);
                    table.insert(free, (remote[&number], true));
                }
            }
        }
        table
    }

    fn check(
        inherited: &BTreeMap<i32, (i32, bool)>,
        late: &BTreeMap<i32, (i32, bool)>,
        pidfd: i32,
        all: i32,
    ) {
        // The supervisor: description n at number n, its pidfd (description -1) at `pidfd`, late ones at 1000 + n.
        let mut table: Table = (0..all).map(|n| (n, (n, true))).collect();
        table.insert(pidfd, (-1, true));
        let origin = |(&to, &(fd, cloexec)): (&i32, &(i32, bool))| (to, Origin { fd, cloexec });
        let wanted = Wanted {
            inherited: inherited.iter().map(origin).collect(),
            late: late.iter().map(|(&to, &(n, cloexec))| (to, Origin { fd: 1000 + n, cloexec })).collect(),
            supervisor: Some(pidfd),
        };
        let remote = (0..all).map(|n| (1000 + n, 5000 + n)).collect();
        let limit = 300;
        let steps = plan(&wanted, limit).unwrap();
        let got = execute(table.clone(), &remote, &steps, limit);
        let mut want: Table =
            inherited.iter().map(|(&to, &(fd, cloexec))| (to, (table[&fd].0, cloexec))).collect();
        want.extend(late.iter().map(|(&to, &(n, cloexec))| (to, (5000 + n, cloexec))));
        assert_eq!(got, want, "{steps:?}");
    }

    #[test]
    fn a_swap_and_a_ring() {
        let swap = BTreeMap::from([(3, (4, false)), (4, (3, true))]);
        check(&swap, &BTreeMap::new(), 20, 8);
        let ring = BTreeMap::from([
            (0, (1, false)),
            (1, (2, false)),
            (2, (0, false)),
            (7, (0, true)),
            (5, (5, false)),
        ]);
        check(&ring, &BTreeMap::new(), 6, 8);
    }

    #[test]
    fn a_table_that_is_full_has_room_for_no_cycle() {
        let all: BTreeMap<i32, Origin> =
            (0..4).map(|n| (n, Origin { fd: (n + 1) % 4, cloexec: false })).collect();
        let wanted = Wanted { inherited: all, ..Wanted::default() };
        assert_eq!(plan(&wanted, 4), Err(NoRoom));
        assert!(plan(&wanted, 5).is_ok());
    }

    #[test]
    fn an_empty_table_is_empty() {
        check(&BTreeMap::new(), &BTreeMap::new(), 3, 5);
    }

    proptest! {
        #[test]
        fn any_table(
            inherited in proptest::collection::btree_map(0..40i32, (0..40i32, any::<bool>()), 0..40),
            late in proptest::collection::btree_map(0..60i32, (0..40i32, any::<bool>()), 0..6),
            pidfd in 40..50i32,
        ) {
            let late = late.into_iter().filter(|(to, _)| !inherited.contains_key(to)).collect();
            check(&inherited, &late, pidfd, 40);
        }
    }
}
