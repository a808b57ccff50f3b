//! Child subreaper: orphans below this process become its children.

use super::{ProcessCx, Result, Supervisor};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    entry.child_subreaper = Some(cx.inside.child_subreaper);
    Ok(())
}

pub(super) fn plan(entry: &pb::TaskCoreEntry, _: &Supervisor, list: &mut List) -> Result<()> {
    let on = u32::from(entry.child_subreaper());
    let args = [libc::PR_SET_CHILD_SUBREAPER.into(), on.into()];
    list.call("PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, &args, Want::Zero);
    Ok(())
}
