//! PR_SET_THP_DISABLE: no transparent huge pages for a process, or only where they are advised. Its value is in the mm image.

use crate::{
    image::pb,
    tracee::{List, Want},
};

const PR_SET_THP_DISABLE: i32 = 41;
/// Linux 6.18.
const PR_THP_DISABLE_EXCEPT_ADVISED: u64 = 2;

pub(super) fn plan(mm: &pb::MmEntry, list: &mut List) {
    let off = u32::from(mm.thp_disabled());
    let flags = if mm.thp_disabled() && mm.thp_except_advised() { PR_THP_DISABLE_EXCEPT_ADVISED } else { 0 };
    let args = [PR_SET_THP_DISABLE.into(), off.into(), flags.into()];
    list.call("PR_SET_THP_DISABLE", libc::SYS_prctl, &args, Want::Zero);
}
