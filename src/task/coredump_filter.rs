//! coredump_filter: which kinds of memory go into a core file. It belongs to the address space, and a fork inherits it.

use super::{ProcessCx, Result, Supervisor, error::parse_proc};
use crate::{
    sys::pid::HostPid,
    {finding::Finding, image::pb, tracee::List},
};

const PATH: &str = "coredump_filter";

fn of(task: &str) -> Result<u64> {
    parse_proc(HostPid::own(), format!("/proc/{task}/{PATH}"), |bytes| crate::proc::number::hex(PATH, bytes))
}

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    entry.coredump_filter = u32::try_from(of(&cx.tid.to_string())?).ok();
    Ok(())
}

/// While /proc is there.
pub(super) fn plan(entry: &pb::TaskCoreEntry, _: &Supervisor, list: &mut List) -> Result<()> {
    let Some(want) = entry.coredump_filter else { return Ok(()) };
    if u64::from(want) != of("self")? {
        let name = format!("coredump_filter {want:#x}");
        super::supervisor::write_proc(list, name, "/proc/self/coredump_filter", &format!("{want:#x}"));
    }
    Ok(())
}
