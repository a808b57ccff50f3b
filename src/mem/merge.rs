//! Merging of pages with the same content (KSM) for a whole address space: PR_SET_MEMORY_MERGE. That of single areas is advice
//! (MADV_MERGEABLE, `vma.rs`).
//!
//! Which pages are merged is not saved: the kernel finds them again.

use super::vma;
use crate::{
    image::pb,
    tracee::{List, Want},
};

const PR_SET_MEMORY_MERGE: i32 = 67;
pub(super) const PR_GET_MEMORY_MERGE: i32 = 68;
const MERGEABLE: u64 = 1 << libc::MADV_MERGEABLE;

/// Behind the advice of the areas: it makes all areas mergeable, those that were not are taken out again.
pub(super) fn plan(mm: &pb::MmEntry, list: &mut List) {
    if !mm.memory_merge() {
        return;
    }
    list.call("PR_SET_MEMORY_MERGE", libc::SYS_prctl, &[PR_SET_MEMORY_MERGE.into(), 1u64.into()], Want::Zero);
    let special = vma::VSYSCALL | vma::VDSO | vma::VVAR | vma::GUARD;
    let out = |area: &&pb::VmaEntry| area.status & special == 0 && area.madv() & MERGEABLE == 0;
    for area in mm.vmas.iter().filter(out) {
        let args = [area.start.into(), (area.end - area.start).into(), libc::MADV_UNMERGEABLE.into()];
        list.call("madvise(MADV_UNMERGEABLE)", libc::SYS_madvise, &args, Want::Zero);
    }
}
