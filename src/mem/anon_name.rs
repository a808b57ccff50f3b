//! Names that programs give to anonymous memory (PR_SET_VMA_ANON_NAME), which show in maps as `[anon:NAME]`.

use std::sync::LazyLock;

use super::MemError;
use crate::{
    image::pb,
    sys::{pid::NsPid, prctl},
    tracee::{List, Want},
};

const PR_SET_VMA: i32 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: u64 = 0;
/// Bytes of a name without its NUL (ANON_VMA_NAME_MAX_LEN).
const MAX: usize = 79;

/// Whether this kernel has names (CONFIG_ANON_VMA_NAME).
static HERE: LazyLock<bool> = LazyLock::new(prctl::can_name_memory);

/// When areas are there for good.
pub(super) fn plan(mm: &pb::MmEntry, pid: NsPid, list: &mut List) -> Result<(), MemError> {
    let mut lost = 0;
    for area in &mm.vmas {
        let Some(name) = &area.anon_name else { continue };
        if name.len() > MAX
            || !name.iter().all(|byte| (0x20..0x7f).contains(byte) && !b"\\`$[]".contains(byte))
        {
            return Err(MemError::BadImage {
                pid,
                what: format!("memory with the name {:?}", name.escape_ascii()),
            });
        }
        if !*HERE {
            lost += 1;
            continue;
        }
        let name = list.cstr(name);
        let args = [
            PR_SET_VMA.into(),
            PR_SET_VMA_ANON_NAME.into(),
            area.start.into(),
            (area.end - area.start).into(),
            name.into(),
        ];
        list.call("PR_SET_VMA_ANON_NAME", libc::SYS_prctl, &args, Want::Zero);
    }
    if lost > 0 {
        tracing::warn!(
            "task {pid}: {lost} areas of memory lose their names, which this kernel does not have"
        );
    }
    Ok(())
}
