//! personality(2): address space layout, and how old programs are humoured.
//!
//! Each thread has its own. The format has one for a process, that of the leader, which its threads inherit; those that differ
//! say so in a field of ours.

use super::{ProcessCx, Result, Supervisor, ThreadParts, ThreadPlan, ThreadView, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    let path = format!("/proc/{}/personality", cx.pid);
    let value = parse_proc(cx.pid, path, |bytes| crate::proc::number::hex("personality", bytes))?;
    entry.personality = u32::try_from(value).unwrap_or(0);
    Ok(())
}

pub(super) fn dump_thread(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    _: &mut Vec<Finding>,
) -> Result<()> {
    if view.cx.tid != view.cx.pid {
        parts.core.personality = Some(view.cx.inside.personality);
    }
    Ok(())
}

pub(super) fn plan_thread(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    if let Some(value) = plan.thread()?.personality {
        // 0xffffffff would only ask; no task can have it.
        list.call("personality", libc::SYS_personality, &[value.into()], Want::Ok);
    }
    Ok(())
}

/// Bits that no personality has.
const UNUSED: u32 = 0x1_ff00;

/// What an image means: CRIU 4.1 writes the hexadecimal digits of /proc as if they were decimal ones, which then shows
/// in bits that cannot be set.
fn meant(value: u32) -> u32 {
    if value & UNUSED == 0 {
        return value;
    }
    u32::from_str_radix(&value.to_string(), 16).ok().filter(|v| v & UNUSED == 0).unwrap_or(value)
}

pub(super) fn plan(entry: &pb::TaskCoreEntry, _: &Supervisor, list: &mut List) -> Result<()> {
    // 0xffffffff would only ask; no task can have it.
    list.call("personality", libc::SYS_personality, &[meant(entry.personality).into()], Want::Ok);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::meant;

    #[test]
    fn digits_of_criu_are_understood() {
        for flags in [0u32, 8, 0x2_0000, 0x4_0000, 0x44_0000, 0x40_0008, 0x10_0000, 0x800_0000] {
            let of_criu = format!("{flags:x}").parse().unwrap();
            assert_eq!((meant(flags), meant(of_criu)), (flags, flags), "{flags:#x}");
        }
        assert_eq!(meant(0x1ff00), 0x1ff00);
    }
}
