//! The audit login uid: set once at login, kept for life.

use super::{ProcessCx, Result, Supervisor, error::parse_proc};
use crate::{finding::Finding, image::pb, tracee::List};

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    let path = format!("/proc/{}/loginuid", cx.pid);
    // A kernel without audit does not have the file.
    if std::path::Path::new(&path).exists() {
        let value = parse_proc(cx.pid, path, |bytes| crate::proc::number::dec("loginuid", bytes))?;
        entry.loginuid = u32::try_from(value).ok();
    }
    Ok(())
}

pub(super) fn plan(entry: &pb::TaskCoreEntry, supervisor: &Supervisor, list: &mut List) -> Result<()> {
    let (Some(want), Some(have)) = (entry.loginuid, supervisor.loginuid) else { return Ok(()) };
    if want != have {
        super::supervisor::write_proc(list, "loginuid", "/proc/self/loginuid", &want.to_string());
    }
    Ok(())
}
