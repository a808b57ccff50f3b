//! Permission to use parts of the processor's state that are large (arch_prctl(2), ARCH_REQ_XCOMP_PERM): AMX tile data, for the
//! process itself and for virtual machines that it runs. A process keeps it for good, whether it uses the tiles or not.

use super::{ProcessCx, Result, Supervisor, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    arch::xsave,
    finding::Finding,
    image::pb,
    tracee::{List, Op, Want},
};

const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
const ARCH_REQ_XCOMP_GUEST_PERM: u64 = 0x1025;

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    entry.xcomp_perm = cx.inside.xcomp_perm.filter(|mask| mask & xsave::DYNAMIC != 0);
    entry.xcomp_guest_perm = cx.inside.xcomp_guest_perm.filter(|mask| mask & xsave::DYNAMIC != 0);
    Ok(())
}

pub(super) fn dump_thread(_: &ThreadView<'_>, _: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    Ok(())
}

/// A thread with tiles in use: until it has used one, the kernel has no room for the registers that it is to get.
pub(super) fn plan_thread(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let xsave = plan.core.thread_info.as_deref().and_then(|info| info.fpregs.xsave.as_ref());
    let parts = xsave.map(|xsave| &xsave.parts[..]).unwrap_or_default();
    if parts.iter().any(|part| part.feature < 64 && xsave::DYNAMIC >> part.feature & 1 == 1) {
        list.op(Op::Tiles);
    }
    Ok(())
}

/// Before there are threads, and signal stacks that would be too small: the kernel looks at all of them.
pub(super) fn plan(entry: &pb::TaskCoreEntry, supervisor: &Supervisor, list: &mut List) -> Result<()> {
    for (name, request, wanted) in [
        ("ARCH_REQ_XCOMP_PERM", ARCH_REQ_XCOMP_PERM, entry.xcomp_perm()),
        ("ARCH_REQ_XCOMP_GUEST_PERM", ARCH_REQ_XCOMP_GUEST_PERM, entry.xcomp_guest_perm()),
    ] {
        // Whatever needs no permission is there or not, which the registers of threads decide.
        for feature in (0..64u32).filter(|bit| (wanted & xsave::DYNAMIC) >> bit & 1 == 1) {
            if supervisor.own.xcomp_supported >> feature & 1 == 0 {
                return Err(TaskError::Unsupported {
                    what: format!("the permission to use {} ({name})", xsave::name(feature)),
                    reason: "this processor or kernel does not have it".into(),
                });
            }
            let args = [request.into(), feature.into()];
            list.call(format!("{name} of feature {feature}"), libc::SYS_arch_prctl, &args, Want::Zero);
        }
    }
    Ok(())
}
