//! Thread-local storage in the GDT: three descriptors, which 64-bit code seldom uses.

use super::{Result, ThreadParts, ThreadPlan, ThreadView, inside::GDT_TLS_MIN};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

/// Bits of the last word of `struct user_desc`.
const SEG_32BIT: u32 = 1;
const CONTENTS_L: u32 = 1 << 1;
const CONTENTS_H: u32 = 1 << 2;
const READ_EXEC_ONLY: u32 = 1 << 3;
const LIMIT_IN_PAGES: u32 = 1 << 4;
const SEG_NOT_PRESENT: u32 = 1 << 5;
const USEABLE: u32 = 1 << 6;

fn to_entry(index: u32, [_, base, limit, flags]: [u32; 4]) -> pb::UserDescT {
    // A kernel without such descriptors tells nothing: that is an empty one.
    let flags = if [base, limit, flags] == [0; 3] { READ_EXEC_ONLY | SEG_NOT_PRESENT } else { flags };
    pb::UserDescT {
        entry_number: GDT_TLS_MIN + index,
        base_addr: base,
        limit,
        seg_32bit: flags & SEG_32BIT != 0,
        contents_h: flags & CONTENTS_H != 0,
        contents_l: flags & CONTENTS_L != 0,
        read_exec_only: flags & READ_EXEC_ONLY != 0,
        limit_in_pages: flags & LIMIT_IN_PAGES != 0,
        seg_not_present: flags & SEG_NOT_PRESENT != 0,
        usable: flags & USEABLE != 0,
    }
}

fn to_words(desc: &pb::UserDescT) -> [u32; 4] {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    let flags = bit(desc.seg_32bit, SEG_32BIT)
        | bit(desc.contents_h, CONTENTS_H)
        | bit(desc.contents_l, CONTENTS_L)
        | bit(desc.read_exec_only, READ_EXEC_ONLY)
        | bit(desc.limit_in_pages, LIMIT_IN_PAGES)
        | bit(desc.seg_not_present, SEG_NOT_PRESENT)
        | bit(desc.usable, USEABLE);
    [desc.entry_number, desc.base_addr, desc.limit, flags]
}

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    parts.info.tls = (0..).zip(view.cx.inside.tls).map(|(n, words)| to_entry(n, words)).collect();
    Ok(())
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let Some(info) = plan.core.thread_info.as_deref() else { return Ok(()) };
    // A new thread has none, so only those in use are set.
    for desc in info.tls.iter().filter(|d| !d.seg_not_present) {
        let desc = list.value(&to_words(desc));
        list.call("set_thread_area", libc::SYS_set_thread_area, &[desc.into()], Want::Zero);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_comes_back() {
        for flags in 1..0x80 {
            let words = [GDT_TLS_MIN + 1, 0x1000, 0xfffff, flags];
            assert_eq!(to_words(&to_entry(1, words)), words);
        }
        let empty = to_entry(0, [12, 0, 0, 0]);
        assert!(empty.seg_not_present && empty.read_exec_only && !empty.usable);
    }
}
