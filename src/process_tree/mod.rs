//! The shape of a process tree: who forks whom, in which order, so that sessions, process groups and sharing come out as
//! they were.
//!
//! It lies below `dump` and `restore`, because both plan: a restore to act on it, a dump to learn before it ends anything
//! whether a restore could. Nothing here makes a system call.

pub(crate) mod fork_plan;
