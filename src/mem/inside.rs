//! What only the task itself can tell of its address space: part of the list of queries that a dump runs in it.
//!
//! Most of it is asked for at once. What few tasks have (a descriptor table, the nodes of policies) is asked for by a second list,
//! when the first one has told that it is there.

use super::{
    MemError, ldt, lock_future, merge, pkeys,
    policy::{self, Modes},
};
use crate::{
    image::pb,
    sys::Errno,
    tracee::{CallId, List, RemoteAddr, Results, Want},
};

/// Where the results of [`queries`] will be.
#[derive(Debug, Clone)]
pub struct Queries {
    pkeys: pkeys::Queries,
    modes: Modes,
    merge: CallId,
    lock_future: lock_future::Question,
    ldt: ldt::Question,
}

/// Where the results of [`Inside::more`] will be.
#[derive(Debug, Clone)]
pub struct More {
    ldt: Option<ldt::Question>,
    policies: Vec<(u64, policy::Question)>,
}

/// What the task told.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inside {
    /// Protection keys that are allocated, a bit each; `None` where there are no keys.
    pub(super) pkeys: Option<u32>,
    /// PR_GET_MEMORY_MERGE.
    pub(super) merge: bool,
    /// Flags of mlockall, if new memory is locked.
    pub(super) lock_future: Option<u32>,
    /// The local descriptor table.
    pub(super) ldt: Option<Vec<u8>>,
    /// Policies of areas, by where they begin.
    pub(super) policies: Vec<(u64, pb::MempolicyEntry)>,
    has_ldt: bool,
    with_policy: Vec<u64>,
}

/// Bytes of the area that the questions take for each of so many areas of the task.
pub fn room(areas: usize) -> usize {
    areas * 96 + (4 << 10)
}

/// Adds what one thread of a process is asked about its address space, whose areas begin at `areas`. `untouched` is a page of
/// the area with the lists that is used for nothing.
pub fn queries(list: &mut List, areas: &[u64], untouched: RemoteAddr) -> Queries {
    Queries {
        pkeys: pkeys::queries(list),
        modes: policy::ask_modes(list, areas),
        merge: list.call(
            "PR_GET_MEMORY_MERGE",
            libc::SYS_prctl,
            &[merge::PR_GET_MEMORY_MERGE.into()],
            Want::Any,
        ),
        lock_future: lock_future::ask(list, untouched),
        ldt: ldt::ask(list, 8),
    }
}

impl Queries {
    /// Reads what the task told, once the list has run.
    pub fn read(&self, results: &Results) -> Result<Inside, MemError> {
        let merge = match results.value(self.merge).map_err(MemError::Inside)? {
            told @ 0.. => told != 0,
            failed => match Errno::from_raw(i32::try_from(-failed).unwrap_or(0)) {
                // Linux 6.4, CONFIG_KSM.
                Errno::EINVAL => false,
                source => return Err(MemError::Call { what: "PR_GET_MEMORY_MERGE", source }),
            },
        };
        Ok(Inside {
            pkeys: self.pkeys.read(results)?,
            merge,
            lock_future: self.lock_future.read(results)?,
            has_ldt: self.ldt.read_len(results)? > 0,
            with_policy: self.modes.read(results)?,
            ..Inside::default()
        })
    }
}

impl Inside {
    /// Bytes of the area that [`Inside::more`] takes; 0 when there is nothing more to ask.
    pub fn more_room(&self) -> usize {
        let ldt = if self.has_ldt { ldt::LEN + (4 << 10) } else { 0 };
        ldt + self.with_policy.len() * 512
    }

    /// Adds what there is to ask about what the task has.
    pub fn more(&self, list: &mut List) -> More {
        More {
            ldt: self.has_ldt.then(|| ldt::ask(list, ldt::LEN)),
            policies: self.with_policy.iter().map(|at| (*at, policy::ask(list, Some(*at)))).collect(),
        }
    }

    /// Reads what the task told to that.
    pub fn read_more(&mut self, more: &More, results: &Results) -> Result<(), MemError> {
        self.ldt = more.ldt.as_ref().map(|ldt| ldt.read(results)).transpose()?;
        for (at, question) in &more.policies {
            self.policies.extend(question.read(results)?.map(|policy| (*at, policy)));
        }
        Ok(())
    }
}
