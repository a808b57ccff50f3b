//! The shape of a process tree: who forks whom, in which order, so that parents, sessions, process groups and sharing come
//! out as they were.
//!
//! It lies below `dump` and `restore`, because both plan: a restore to act on it, a dump to learn before it ends anything
//! whether a restore could. Nothing here makes a system call.
//!
//! - [`shape`]: what is wanted of each task.
//! - [`fork_plan`]: the steps that make it.
//! - [`ids`]: which id crtool has for what has another one in the tree.
//! - [`model`]: what the kernel makes of these steps. Every plan is tried in it before it is given out.

pub(crate) mod fork_plan;
pub(crate) mod ids;
mod model;
pub(crate) mod shape;
#[cfg(test)]
mod tests;

pub(crate) use fork_plan::{ForkPlan, Move, PlannedPid, Share, Step, plan};
pub(crate) use shape::{Listed, Outside, Shape, Sharing, shapes};
