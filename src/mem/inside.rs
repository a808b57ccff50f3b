//! What only the task itself can tell of its address space: part of the list of queries that a dump runs in it.

use super::{MemError, pkeys};
use crate::tracee::{List, Results};

/// Where the results of [`queries`] will be.
#[derive(Debug, Clone)]
pub struct Queries {
    pkeys: pkeys::Queries,
}

/// What the task told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inside {
    /// Protection keys that are allocated, a bit each; `None` where there are no keys.
    pub(super) pkeys: Option<u32>,
}

/// Adds what one thread of a process is asked about its address space.
pub fn queries(list: &mut List) -> Queries {
    Queries { pkeys: pkeys::queries(list) }
}

impl Queries {
    /// Reads what the task told, once the list has run.
    pub fn read(&self, results: &Results) -> Result<Inside, MemError> {
        Ok(Inside { pkeys: self.pkeys.read(results)? })
    }
}
