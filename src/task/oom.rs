//! oom_score_adj: how eagerly a process is killed when memory is short.

use super::{ProcessCx, Result, Supervisor, TaskError, error::parse_proc};
use crate::{finding::Finding, image::pb, tracee::List};

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    let path = format!("/proc/{}/oom_score_adj", cx.pid);
    let value = parse_proc(cx.pid, path, |bytes| crate::proc::number::signed("oom_score_adj", bytes))?;
    entry.oom_score_adj = i32::try_from(value).ok();
    Ok(())
}

pub(super) fn plan(entry: &pb::TaskCoreEntry, supervisor: &Supervisor, list: &mut List) -> Result<()> {
    let Some(want) = entry.oom_score_adj else { return Ok(()) };
    if !(-1000..=1000).contains(&want) {
        return Err(TaskError::image(format!("oom_score_adj {want}")));
    }
    if want != supervisor.oom_score_adj {
        let name = format!("oom_score_adj {want} (crtool itself has {})", supervisor.oom_score_adj);
        super::supervisor::write_proc(list, name, "/proc/self/oom_score_adj", &want.to_string());
    }
    Ok(())
}
