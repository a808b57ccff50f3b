//! PR_SET_THP_DISABLE: no transparent huge pages for a process. Its value is in the mm image.

use super::{ProcessCx, Result};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

const PR_SET_THP_DISABLE: i32 = 41;
const OFF_BUT_WHERE_ADVISED: u32 = 3;

pub(super) fn dump(cx: &ProcessCx, _: &mut pb::TaskCoreEntry, findings: &mut Vec<Finding>) -> Result<()> {
    if cx.inside.thp_disable == OFF_BUT_WHERE_ADVISED {
        findings.push(Finding {
            pid: cx.pid,
            what: "PR_SET_THP_DISABLE with PR_THP_DISABLE_EXCEPT_ADVISED".into(),
            reason: "the image format only knows on and off".into(),
            hint: String::new(),
        });
    }
    Ok(())
}

pub(super) fn plan(mm: &pb::MmEntry, list: &mut List) {
    let off = u32::from(mm.thp_disabled());
    let args = [PR_SET_THP_DISABLE.into(), off.into()];
    list.call("PR_SET_THP_DISABLE", libc::SYS_prctl, &args, Want::Zero);
}
