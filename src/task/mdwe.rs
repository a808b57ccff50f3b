//! PR_SET_MDWE: memory that is written is not executed, and the other way round; for the process, and unless it says
//! otherwise for its children.

use super::{ProcessCx, Result, Supervisor, TaskError};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

const PR_SET_MDWE: i32 = 65;
/// PR_MDWE_REFUSE_EXEC_GAIN, PR_MDWE_NO_INHERIT.
const BITS: u32 = 3;

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    entry.mdwe = u32::try_from(cx.inside.mdwe).ok().filter(|bits| *bits != 0);
    Ok(())
}

/// When all memory has its protection.
pub(super) fn plan(entry: &pb::TaskCoreEntry, _: &Supervisor, list: &mut List) -> Result<()> {
    let Some(bits) = entry.mdwe else { return Ok(()) };
    if bits & !BITS != 0 {
        return Err(TaskError::image(format!("PR_SET_MDWE {bits:#x}")));
    }
    list.call(
        format!("PR_SET_MDWE {bits:#x}"),
        libc::SYS_prctl,
        &[PR_SET_MDWE.into(), bits.into()],
        Want::Zero,
    );
    Ok(())
}
