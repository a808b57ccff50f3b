//! `comm`: the name of a thread, up to 15 bytes of anything but NUL.

use super::{ProcessCx, Result, TaskError, ThreadParts, ThreadPlan, ThreadView, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

/// Bytes of a name without its NUL.
const MAX: usize = 15;

pub(super) fn dump_thread(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    _: &mut Vec<Finding>,
) -> Result<()> {
    parts.core.comm = Some(view.stat.comm.clone());
    Ok(())
}

pub(super) fn dump_process(
    cx: &ProcessCx,
    entry: &mut pb::TaskCoreEntry,
    _: &mut Vec<Finding>,
) -> Result<()> {
    let path = format!("/proc/{0}/task/{0}/stat", cx.pid);
    entry.comm = parse_proc(cx.pid, path, crate::proc::stat::parse)?.comm;
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let of_thread = plan.thread()?.comm.as_ref();
    let Some(comm) = of_thread.or(plan.process().map(|tc| &tc.comm)) else { return Ok(()) };
    if comm.len() > MAX || comm.contains(&0) {
        return Err(TaskError::image(format!("comm {:?} is no name", String::from_utf8_lossy(comm))));
    }
    let name = list.cstr(comm);
    list.call("PR_SET_NAME", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()], Want::Zero);
    Ok(())
}
