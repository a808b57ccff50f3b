//! The nice value of a session's autogroup (sched(7)): with CONFIG_SCHED_AUTOGROUP the tasks of a session share one place among all
//! sessions. A session that is restored gets an autogroup of its own; its leader's image has the value.

use super::{ProcessCx, Result, Supervisor, TaskError, error::read_proc};
use crate::{finding::Finding, image::pb, tracee::List};

/// Nice value of an autogroup as /proc/PID/autogroup tells it: `/autogroup-25 nice 0`. `None` where there is none.
fn nice(text: &[u8]) -> Option<i32> {
    let text = std::str::from_utf8(text).ok()?;
    text.trim_end().rsplit_once(" nice ")?.1.parse().ok()
}

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    if !cx.leads_session {
        return Ok(());
    }
    let path = format!("/proc/{}/autogroup", cx.tid);
    let text = match std::fs::exists(&path) {
        Ok(true) => read_proc(cx.pid, path)?,
        _ => return Ok(()),
    };
    entry.autogroup_nice = nice(&text).filter(|nice| *nice != 0);
    Ok(())
}

/// Of a process that has become the leader of a session, while /proc is there.
pub(super) fn plan(entry: &pb::TaskCoreEntry, supervisor: &Supervisor, list: &mut List) -> Result<()> {
    let Some(nice) = entry.autogroup_nice else { return Ok(()) };
    if !(-20..=19).contains(&nice) {
        return Err(TaskError::image(format!("nice value {nice} of an autogroup")));
    }
    if !supervisor.autogroup {
        tracing::warn!("the autogroup of a session had the nice value {nice}; this kernel has no autogroups");
        return Ok(());
    }
    let name = format!("nice value {nice} of the autogroup");
    super::supervisor::write_proc(list, name, "/proc/self/autogroup", &nice.to_string());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::nice;

    #[test]
    fn nice_value_of_a_line() {
        assert_eq!(nice(b"/autogroup-25 nice -7\n"), Some(-7));
        assert_eq!((nice(b""), nice(b"/autogroup-1 nice x")), (None, None));
    }
}
