//! Commands of membarrier(2) that a process has registered for.

use super::{ProcessCx, Result, Supervisor, TaskError};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

/// The four that register: global expedited, private expedited, its sync-core and its rseq kinds.
const REGISTERS: u32 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8;

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    let mask = cx.inside.membarrier;
    entry.membarrier_registration_mask = (mask != 0).then_some(mask);
    Ok(())
}

pub(super) fn plan(entry: &pb::TaskCoreEntry, _: &Supervisor, list: &mut List) -> Result<()> {
    let mask = entry.membarrier_registration_mask();
    if mask & !REGISTERS != 0 {
        return Err(TaskError::image(format!("membarrier registrations {mask:#x}")));
    }
    for bit in 0..32 {
        let command = mask & 1 << bit;
        if command != 0 {
            let args = [command.into(), 0u64.into(), 0u64.into()];
            list.call(format!("membarrier {command:#x}"), libc::SYS_membarrier, &args, Want::Zero);
        }
    }
    Ok(())
}
