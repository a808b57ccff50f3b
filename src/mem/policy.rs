//! Memory policies: on which nodes of a machine memory is to be taken (set_mempolicy(2), mbind(2)), of threads and of areas.
//!
//! Not saved, since the kernel does not tell: the home node of an area (set_mempolicy_home_node(2)); where in its round an
//! interleaving policy is; that parts of one area of shared memory have policies given to the object through another
//! mapping. Where the pages lay: those that are restored lie where the policies of the restored area allow.
//!
//! A policy of nodes that the machine of the restore does not have is left out, with a warning.

use std::collections::HashMap;

use super::MemError;
use crate::{
    image::pb,
    sys::{
        Errno,
        pid::NsPid,
        sched::{NODES_LEN, can_have_memory_policy, memory_policy},
    },
    tracee::{CallId, Data, List, Results, Want},
};

/// Bits of the mask that is asked for.
const NODES: usize = NODES_LEN * 8;
/// The policy is asked for at an address.
const MPOL_F_ADDR: u64 = 1 << 1;
/// mbind: pages that are there already move.
const MPOL_MF_MOVE: u64 = 1 << 1;
/// MPOL_F_STATIC_NODES, RELATIVE_NODES, NUMA_BALANCING.
const FLAGS: u32 = 7 << 13;
/// Above all modes: MPOL_WEIGHTED_INTERLEAVE is 6.
const MODE_MAX: u32 = 64;

/// The nodes of a policy, as the kernel takes them.
type Nodes = [u8; NODES_LEN];

/// Where the answer to one question will be.
#[derive(Debug, Clone)]
pub struct Question {
    call: CallId,
    mode: Data,
    nodes: Data,
}

/// Asks for the policy of the thread, or of the area at an address.
pub fn ask(list: &mut List, at: Option<u64>) -> Question {
    let (mode, nodes) = (list.space(4), list.space(NODES_LEN));
    let flags = if at.is_some() { MPOL_F_ADDR } else { 0 };
    let args = [mode.into(), nodes.into(), NODES.into(), at.unwrap_or(0).into(), flags.into()];
    Question { call: list.call("get_mempolicy", libc::SYS_get_mempolicy, &args, Want::Any), mode, nodes }
}

impl Question {
    /// The answer; `None` where there are no policies.
    pub fn read(&self, results: &Results) -> Result<Option<pb::MempolicyEntry>, MemError> {
        if absent(results.value(self.call).map_err(MemError::Inside)?)? {
            return Ok(None);
        }
        let data = |data, len| results.data(data, len).map_err(MemError::Inside);
        let mode = data(self.mode, 4)?.try_into().map_or(0, u32::from_ne_bytes);
        let mut nodes = data(self.nodes, NODES_LEN)?.to_vec();
        while nodes.last() == Some(&0) {
            nodes.pop();
        }
        Ok(Some(pb::MempolicyEntry { mode, nodes: (!nodes.is_empty()).then_some(nodes) }))
    }
}

/// Whether a result says that the kernel has no policies.
fn absent(result: i64) -> Result<bool, MemError> {
    match Errno::from_raw(i32::try_from(-result).unwrap_or(0)) {
        _ if result >= 0 => Ok(false),
        Errno::ENOSYS => Ok(true),
        source => Err(MemError::Call { what: "get_mempolicy", source }),
    }
}

/// Questions for the mode alone, one for each area: most have none, and the nodes are only asked for of those that have.
#[derive(Debug, Clone)]
pub(super) struct Modes {
    areas: Vec<(u64, CallId)>,
    modes: Data,
}

/// Asks for the modes of the areas that begin at these addresses.
pub(super) fn ask_modes(list: &mut List, areas: &[u64]) -> Modes {
    let modes = list.space(4 * areas.len());
    let ask = |(n, start): (u64, &u64)| {
        let args = [modes.at(4 * n).into(), 0u64.into(), 0u64.into(), (*start).into(), MPOL_F_ADDR.into()];
        (*start, list.call("get_mempolicy", libc::SYS_get_mempolicy, &args, Want::Any))
    };
    Modes { areas: (0..).zip(areas).map(ask).collect(), modes }
}

impl Modes {
    /// The areas that have a policy.
    pub(super) fn read(&self, results: &Results) -> Result<Vec<u64>, MemError> {
        let modes = results.data(self.modes, 4 * self.areas.len()).map_err(MemError::Inside)?;
        let mut found = Vec::new();
        for ((start, call), mode) in self.areas.iter().zip(modes.as_chunks::<4>().0) {
            if absent(results.value(*call).map_err(MemError::Inside)?)? {
                return Ok(Vec::new());
            }
            if u32::from_ne_bytes(*mode) != 0 {
                found.push(*start);
            }
        }
        Ok(found)
    }
}

/// What this process has, and what it can have: each policy is tried once.
#[derive(Debug, Default)]
pub struct Tried(HashMap<(u32, Nodes), bool>);

/// A policy as calls take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Policy {
    mode: u32,
    nodes: Nodes,
}

impl Policy {
    fn of(entry: &pb::MempolicyEntry) -> Result<Self, String> {
        let given = entry.nodes();
        if entry.mode & !FLAGS >= MODE_MAX || given.len() > NODES_LEN {
            return Err(format!("memory policy {:#x} with {} bytes of nodes", entry.mode, given.len()));
        }
        let mut nodes = [0; NODES_LEN];
        nodes.iter_mut().zip(given).for_each(|(to, from)| *to = *from);
        Ok(Self { mode: entry.mode, nodes })
    }
}

impl Tried {
    fn can(&mut self, policy: Policy) -> bool {
        let key = (policy.mode, policy.nodes);
        *self.0.entry(key).or_insert_with(|| can_have_memory_policy(policy.mode, &policy.nodes).is_ok())
    }
}

/// Plans the policy of a thread. `whose` is for the warning. `Err` says what is wrong with the image.
pub fn plan_thread(
    list: &mut List,
    entry: &pb::MempolicyEntry,
    whose: &str,
    tried: &mut Tried,
) -> Result<(), String> {
    let policy = Policy::of(entry)?;
    let own = memory_policy()
        .map_or(Policy { mode: 0, nodes: [0; NODES_LEN] }, |(mode, nodes)| Policy { mode, nodes });
    if policy == own {
        return Ok(());
    }
    if !tried.can(policy) {
        left_out(whose);
        return Ok(());
    }
    let nodes = list.bytes(&policy.nodes);
    let args = [policy.mode.into(), nodes.into(), (NODES + 1).into()];
    list.call("set_mempolicy", libc::SYS_set_mempolicy, &args, Want::Zero);
    Ok(())
}

/// Plans the policies of areas, which are there and filled.
pub(super) fn plan(mm: &pb::MmEntry, pid: NsPid, list: &mut List) -> Result<(), MemError> {
    let mut tried = Tried::default();
    for area in &mm.vmas {
        let Some(entry) = &area.mempolicy else { continue };
        let policy = Policy::of(entry).map_err(|what| MemError::BadImage { pid, what })?;
        if !tried.can(policy) {
            left_out(&format!("memory {:x}-{:x} of task {pid}", area.start, area.end));
            continue;
        }
        let nodes = list.bytes(&policy.nodes);
        let args = [
            area.start.into(),
            (area.end - area.start).into(),
            policy.mode.into(),
            nodes.into(),
            (NODES + 1).into(),
            MPOL_MF_MOVE.into(),
        ];
        list.call("mbind", libc::SYS_mbind, &args, Want::Zero);
    }
    Ok(())
}

fn left_out(whose: &str) {
    tracing::warn!("the memory policy of {whose} is left out: this machine does not have its nodes");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crafted_policies_are_refused() {
        let entry = |mode, nodes: usize| pb::MempolicyEntry { mode, nodes: Some(vec![1; nodes]) };
        assert!(Policy::of(&entry(2 | 1 << 15, 128)).is_ok());
        assert!(Policy::of(&entry(2, 129)).is_err() && Policy::of(&entry(64, 1)).is_err());
        assert!(Policy::of(&entry(1 << 20, 1)).is_err());
    }

    #[test]
    fn a_policy_of_nodes_that_are_not_there_is_left_out() {
        let far = pb::MempolicyEntry { mode: 2, nodes: Some([&[0; 127][..], &[0x80]].concat()) };
        let mut list = List::new("test");
        plan_thread(&mut list, &far, "thread 1", &mut Tried::default()).unwrap();
        assert!(list.is_empty());
    }
}
