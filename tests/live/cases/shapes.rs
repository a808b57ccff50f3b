//! Trees of any shape: what a number of random system calls makes of one process.
//!
//! The root tells every process what to do, one call at a time, through shared memory: fork and clone with shared tables,
//! sessions, groups, subreapers, ends with and without a parent that asks. The harness compares parents, sessions, groups and
//! zombies before and after; the root compares what tasks share.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::case::Case;
use crate::gate::Gate;
use crate::sys::{self, Mapped, getpid};

macro_rules! random_trees {
    ($($seed:literal)*) => {
        &[$(Case::new(concat!("random_tree_", $seed), random_tree::<$seed>).peer_fails("trees of any shape")),*]
    };
}

pub const CASES: &[Case] = random_trees!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24);

/// Most processes of a tree.
const SLOTS: usize = 40;
/// Calls that make a tree.
const CALLS: usize = 60;

/// What a process is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Call {
    Nothing,
    /// clone(2) with these flags into this slot.
    Clone,
    Setsid,
    Setpgid,
    Subreaper,
    Unshare,
    /// Ends, with this status.
    Exit,
    /// wait4 for this pid.
    Wait,
}

/// Words of a slot: pid, call, two arguments.
const PID: usize = 0;
const CALL: usize = 8;
const FIRST: usize = 16;
const SECOND: usize = 24;
const SLOT_LEN: usize = 32;

/// The memory by which the root tells and is told.
#[derive(Debug, Clone, Copy)]
struct Board(Mapped);

impl Board {
    fn word(&self, slot: usize, word: usize) -> &'static std::sync::atomic::AtomicU64 {
        sys::atomic(self.0.at(slot * SLOT_LEN + word))
    }

    fn finished(&self) -> &'static std::sync::atomic::AtomicU64 {
        sys::atomic(self.0.at(SLOTS * SLOT_LEN))
    }

    fn pid(&self, slot: usize) -> i32 {
        i32::try_from(self.word(slot, PID).load(Ordering::SeqCst)).unwrap()
    }

    /// Makes a process make a call and waits until it has.
    fn tell(&self, slot: usize, call: Call, first: u64, second: u64) {
        if slot == 0 {
            return self.obey(0, call, first, second);
        }
        self.word(slot, FIRST).store(first, Ordering::SeqCst);
        self.word(slot, SECOND).store(second, Ordering::SeqCst);
        self.word(slot, CALL).store(call as u64, Ordering::SeqCst);
        if call == Call::Exit {
            crate::gate::until_state(self.pid(slot), 'Z');
            return;
        }
        while self.word(slot, CALL).load(Ordering::SeqCst) != Call::Nothing as u64 {
            sys::nap(Duration::from_micros(50));
        }
    }

    fn obey(&self, slot: usize, call: Call, first: u64, second: u64) {
        let arg = usize::try_from(first).unwrap();
        match call {
            Call::Nothing => {}
            Call::Clone => {
                let child = usize::try_from(second).unwrap();
                let born = Box::leak(Box::new((*self, child)));
                let flags = i32::try_from(first).unwrap();
                sys::clone_child(flags, live, std::ptr::from_mut(born).expose_provenance());
                while self.pid(child) == 0 {
                    sys::nap(Duration::from_micros(50));
                }
            }
            Call::Setsid => drop(sys!(SYS_setsid)),
            Call::Setpgid => drop(sys!(SYS_setpgid, 0, arg)),
            Call::Subreaper => drop(sys!(SYS_prctl, libc::PR_SET_CHILD_SUBREAPER, arg)),
            Call::Unshare => drop(sys!(SYS_unshare, arg)),
            Call::Exit => sys::exit_now(i32::try_from(first).unwrap()),
            Call::Wait => drop(sys::waitpid(i32::try_from(first).unwrap(), libc::WNOHANG)),
        }
        self.word(slot, CALL).store(Call::Nothing as u64, Ordering::SeqCst);
    }
}

/// A process of the tree: does what it is told until all is over.
fn live(born: usize) -> i32 {
    let &(board, slot): &(Board, usize) = sys::borrow(born);
    board.word(slot, PID).store(u64::from(getpid().cast_unsigned()), Ordering::SeqCst);
    let calls =
        [Call::Clone, Call::Setsid, Call::Setpgid, Call::Subreaper, Call::Unshare, Call::Exit, Call::Wait];
    while board.finished().load(Ordering::SeqCst) == 0 {
        let told = board.word(slot, CALL).load(Ordering::SeqCst);
        if let Some(call) = calls.iter().find(|call| **call as u64 == told) {
            let [first, second] = [FIRST, SECOND].map(|word| board.word(slot, word).load(Ordering::SeqCst));
            board.obey(slot, *call, first, second);
        }
        sys::nap(Duration::from_micros(200));
    }
    0
}

/// The same numbers for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}

/// Whether each two tasks share descriptor tables, and root and current directory.
fn sharing(board: &Board, alive: &[usize]) -> Vec<(i32, i32, usize, bool)> {
    const KCMP_FILES: usize = 2;
    const KCMP_FS: usize = 3;
    let mut all = Vec::new();
    for (at, one) in alive.iter().enumerate() {
        for other in &alive[at + 1..] {
            let (a, b) = (board.pid(*one), board.pid(*other));
            for kind in [KCMP_FILES, KCMP_FS] {
                all.push((a, b, kind, sys!(SYS_kcmp, a, b, kind, 0, 0) == Ok(0)));
            }
        }
    }
    all
}

fn random_tree<const SEED: u64>(gate: &Gate) {
    let board = Board(sys::shared(SLOTS * SLOT_LEN + 8));
    let mut random = Random(SEED);
    board.word(0, PID).store(u64::from(getpid().cast_unsigned()), Ordering::SeqCst);
    sys::become_subreaper();
    let (mut alive, mut made) = (vec![0], 1);
    for _ in 0..CALLS {
        let slot = alive[random.below(alive.len())];
        match random.below(100) {
            0..45 if made < SLOTS => {
                // Siblings of the root would be outside of the tree.
                let parent = if slot != 0 && random.below(8) == 0 { libc::CLONE_PARENT } else { 0 };
                let files = if random.below(4) == 0 { libc::CLONE_FILES } else { 0 };
                let fs = if random.below(5) == 0 { libc::CLONE_FS } else { 0 };
                let shared = if parent == 0 { files | fs } else { 0 };
                let flags = parent | shared | libc::SIGCHLD;
                board.tell(slot, Call::Clone, u64::from(flags.cast_unsigned()), made as u64);
                alive.push(made);
                made += 1;
            }
            45..58 if slot != 0 => board.tell(slot, Call::Setsid, 0, 0),
            58..72 if slot != 0 => {
                let group = match random.below(3) {
                    0 => 0,
                    _ => sys!(SYS_getpgid, board.pid(alive[random.below(alive.len())])).unwrap_or(0),
                };
                board.tell(slot, Call::Setpgid, group as u64, 0);
            }
            72..80 if slot != 0 => board.tell(slot, Call::Subreaper, random.below(2) as u64, 0),
            80..85 => {
                let what = if random.below(2) == 0 { libc::CLONE_FILES } else { libc::CLONE_FS };
                board.tell(slot, Call::Unshare, u64::from(what.cast_unsigned()), 0);
            }
            _ if slot != 0 => {
                let (pid, status) = (board.pid(slot), random.below(100));
                let parent: i32 = sys::stat_field(pid, 4).parse().expect("ppid");
                board.tell(slot, Call::Exit, status as u64, 0);
                alive.retain(|other| *other != slot);
                let parent = alive.iter().find(|other| board.pid(**other) == parent);
                if let (Some(parent), true) = (parent, random.below(3) != 0) {
                    board.tell(*parent, Call::Wait, u64::from(pid.cast_unsigned()), 0);
                }
            }
            _ => {}
        }
    }
    let before = sharing(&board, &alive);
    gate.ready();
    assert_eq!(sharing(&board, &alive), before, "what tasks share");
    board.finished().store(1, Ordering::SeqCst);
    while sys::wait_any().is_some() {}
}
