//! Memory protection keys (pkeys(7)), and memory that may be executed and not read.
//!
//! An address space has up to 16 keys, each area has one of them, and each thread has rights for each key in its PKRU
//! register, which travels with its xsave area. Saved are the allocation map of the address space, the key of each area,
//! and which key the kernel itself has taken for memory that is mapped PROT_EXEC and nothing else.
//!
//! Measured (Linux 6.12 and 6.18):
//! - pkey_mprotect of memory that is not there fails with ENOMEM for an allocated key and with EINVAL for another, and changes
//!   nothing: sixteen such calls tell the map.
//! - The key for execute-only memory looks like one that is not allocated, to that call and to pkey_free. It shows
//!   in smaps as the key of areas with PROT_EXEC alone, and nothing gives it back but execve; a fork inherits it.
//!   Without such an area it cannot be seen, and is not saved.
//! - pkey_alloc gives the lowest key that is free, and sets the rights of the calling thread.
//! - A key may be freed while areas have it; they keep it.
//! - Neither process_vm_readv nor /proc/PID/mem asks for rights: a dump reads every area.
//!
//! A restore does all of this late, when every child has been forked: a child may have another execute-only key
//! than its parent, and could not get rid of that one.

use std::sync::LazyLock;

use super::{MemError, vma};
use crate::{
    image::pb,
    sys::{Errno, pid::NsPid, pkey},
    tracee::{CallId, List, Results, Want},
};

/// Keys there are: two bits each in the 32 of PKRU.
const COUNT: u32 = 16;
const EXEC: u32 = libc::PROT_EXEC.cast_unsigned();
/// Areas that are the kernel's or no areas: none of them has a key.
const SPECIAL: u32 = vma::VSYSCALL | vma::VDSO | vma::VVAR | vma::GUARD;

/// Whether this processor and kernel have keys.
static HERE: LazyLock<bool> = LazyLock::new(|| pkey::is_allocated(0).unwrap_or(false));

/// Where the answers about each key will be.
#[derive(Debug, Clone)]
pub(super) struct Queries(Vec<CallId>);

/// Asks for each key whether it is allocated.
pub(super) fn queries(list: &mut List) -> Queries {
    let keys = if *HERE { 0..COUNT } else { 0..0 };
    let ask = |key: u32| {
        let args = [pkey::NEVER_MAPPED.into(), 4096u64.into(), libc::PROT_READ.into(), key.into()];
        list.call("pkey_mprotect of nothing", libc::SYS_pkey_mprotect, &args, Want::Any)
    };
    Queries(keys.map(ask).collect())
}

impl Queries {
    /// The map of allocated keys; `None` where there are no keys.
    pub(super) fn read(&self, results: &Results) -> Result<Option<u32>, MemError> {
        let mut allocated = 0;
        for (key, call) in self.0.iter().enumerate() {
            let result = results.value(*call).map_err(MemError::Inside)?;
            match Errno::from_raw(i32::try_from(-result).unwrap_or(0)) {
                Errno::ENOMEM => allocated |= 1 << key,
                Errno::EINVAL => {}
                source => return Err(MemError::Pkey { key, source }),
            }
        }
        Ok((!self.0.is_empty()).then_some(allocated))
    }
}

/// The key that the kernel has taken for execute-only memory: one that areas with PROT_EXEC alone have, and that the task
/// has not allocated. `Err` with two such keys: one of them has been freed, and there is no telling which.
pub(super) fn execute_only(allocated: u32, vmas: &[pb::VmaEntry]) -> Result<Option<u32>, (u32, u32)> {
    let mut found = None;
    for area in vmas.iter().filter(|area| area.prot == EXEC && area.pkey() != 0) {
        let key = area.pkey();
        if allocated >> key & 1 == 1 {
            continue;
        }
        match found {
            Some(other) if other != key => return Err((other, key)),
            _ => found = Some(key),
        }
    }
    Ok(found)
}

/// How the keys of one address space are restored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Keys that are to be allocated in the end.
    allocated: u32,
    /// Highest key that is needed while areas get theirs.
    highest: u32,
    execute_only: Option<u32>,
    /// PROT_EXEC alone means what it means on a processor without keys: memory that can be read.
    readable_code: bool,
}

/// Whether the processor that a thread was dumped on had memory protection keys: then there is a register for them.
pub fn known_to(core: &pb::CoreEntry) -> bool {
    let xsave = core.thread_info.as_ref().and_then(|info| info.fpregs.xsave.as_ref());
    xsave.is_some_and(|xsave| !xsave.pkru.is_empty())
}

/// Checks what an image says about keys, and whether they can be had here. `keys_at_source` tells whether the processor
/// of the dump had keys.
pub fn plan(mm: &pb::MmEntry, pid: NsPid, keys_at_source: bool) -> Result<Plan, MemError> {
    plan_for(mm, pid, keys_at_source, *HERE)
}

fn plan_for(mm: &pb::MmEntry, pid: NsPid, keys_at_source: bool, keys_here: bool) -> Result<Plan, MemError> {
    let bad = |what: String| Err(MemError::BadImage { pid, what });
    let areas = || mm.vmas.iter().filter(|area| area.status & SPECIAL == 0);
    let allocated = mm.pkeys.unwrap_or(1);
    let execute_only = mm.execute_only_pkey;
    if allocated >> COUNT != 0 {
        return bad(format!("a map of protection keys {allocated:#x}"));
    }
    if execute_only.is_some_and(|key| key == 0 || key >= COUNT || allocated >> key & 1 == 1) {
        return bad(format!("key {} for execute-only memory", mm.execute_only_pkey()));
    }
    let mut used = 0u32;
    for area in areas().filter(|area| area.pkey() != 0) {
        let key = area.pkey();
        if key >= COUNT || (Some(key) == execute_only && area.prot != EXEC) {
            return bad(format!("mapping {:#x}-{:#x} with protection key {key}", area.start, area.end));
        }
        used |= 1 << key;
    }
    let own = (allocated & !1 | used) & !execute_only.map_or(0, |key| 1 << key);
    if !keys_here && own != 0 {
        let keys: Vec<String> = (1..COUNT).filter(|key| own >> key & 1 == 1).map(|k| k.to_string()).collect();
        return Err(MemError::Unsupported {
            pid,
            what: format!("memory protection keys ({})", keys.join(", ")),
            reason: "this processor or kernel has none".into(),
        });
    }
    if !keys_here {
        if execute_only.is_some() {
            tracing::warn!(
                "task {pid}: execute-only memory can be read from now on: this processor has no protection keys"
            );
        }
        return Ok(Plan::default());
    }
    let all = allocated | used | execute_only.map_or(0, |key| 1 << key);
    Ok(Plan {
        allocated,
        highest: all.checked_ilog2().unwrap_or(0),
        execute_only,
        readable_code: mm.pkeys.is_some() || !keys_at_source,
    })
}

/// Protection of an area before it gets its key. Execute-only memory would take a key as soon as it is mapped.
pub fn early_prot(prot: u32) -> u32 {
    if prot == EXEC { EXEC | libc::PROT_READ.cast_unsigned() } else { prot }
}

impl Plan {
    /// Before areas get their final protection: every key is in use but that for execute-only memory, so the kernel
    /// takes that one.
    pub fn begin(&self, list: &mut List) {
        for key in 1..=self.highest {
            let args = [0u64.into(), 0u64.into()];
            list.call(
                format!("pkey_alloc of key {key}"),
                libc::SYS_pkey_alloc,
                &args,
                Want::Equal(key.into()),
            );
        }
        if let Some(key) = self.execute_only {
            free(list, key);
        }
    }

    /// The key that has to be named when the area's final protection is set; for the others mprotect will do.
    fn named_key(&self, area: &pb::VmaEntry) -> Option<u32> {
        let key = area.pkey();
        if area.status & SPECIAL != 0 || (key != 0 && Some(key) == self.execute_only) {
            return None;
        }
        let code = self.readable_code && area.prot == EXEC;
        (self.highest > 0 && key != 0 || code && key == 0).then_some(key)
    }

    /// Whether mprotect gives `area` what it had.
    pub fn mprotect_will_do(&self, area: &pb::VmaEntry) -> bool {
        self.named_key(area).is_none()
    }

    /// When areas have been filled and locked, and those for which mprotect will do have their protection.
    pub fn finish(&self, list: &mut List, vmas: &[pb::VmaEntry]) {
        for area in vmas {
            let Some(key) = self.named_key(area) else { continue };
            let args = [area.start.into(), (area.end - area.start).into(), area.prot.into(), key.into()];
            list.call(format!("pkey_mprotect with key {key}"), libc::SYS_pkey_mprotect, &args, Want::Zero);
        }
        for key in (1..=self.highest).filter(|key| Some(*key) != self.execute_only) {
            if self.allocated >> key & 1 == 0 {
                free(list, key);
            }
        }
        if self.highest > 0 && self.allocated & 1 == 0 {
            free(list, 0);
        }
    }
}

fn free(list: &mut List, key: u32) {
    list.call(format!("pkey_free of key {key}"), libc::SYS_pkey_free, &[key.into()], Want::Zero);
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u32 = libc::PROT_READ.cast_unsigned();

    fn area(start: u64, prot: u32, pkey: u32) -> pb::VmaEntry {
        let pkey = (pkey != 0).then_some(pkey);
        pb::VmaEntry { start, end: start + 4096, prot, status: vma::REGULAR, pkey, ..Default::default() }
    }

    fn mm(pkeys: Option<u32>, execute_only_pkey: Option<u32>, vmas: Vec<pb::VmaEntry>) -> pb::MmEntry {
        pb::MmEntry { pkeys, execute_only_pkey, vmas, ..Default::default() }
    }

    fn steps(mm: &pb::MmEntry, keys_at_source: bool) -> Vec<String> {
        let plan = plan_for(mm, NsPid::new(1), keys_at_source, true).unwrap();
        let mut list = List::new("test");
        plan.begin(&mut list);
        for area in mm.vmas.iter().filter(|area| plan.mprotect_will_do(area)) {
            list.call(format!("mprotect {:#x}", area.start), libc::SYS_mprotect, &[], Want::Zero);
        }
        plan.finish(&mut list, &mm.vmas);
        let text = list.describe();
        text.lines()
            .map(|line| line.split(": ").nth(1).unwrap().split(" op ").next().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn the_kernel_is_left_one_key_for_execute_only_memory() {
        let areas =
            vec![area(0x1000, READ, 0), area(0x2000, EXEC, 2), area(0x3000, READ, 3), area(0x4000, EXEC, 0)];
        assert_eq!(execute_only(0b1001, &areas), Ok(Some(2)));
        let steps = steps(&mm(Some(0b1001), Some(2), areas), true);
        let want = [
            "pkey_alloc of key 1",
            "pkey_alloc of key 2",
            "pkey_alloc of key 3",
            "pkey_free of key 2",
            "mprotect 0x1000",
            "mprotect 0x2000",
            "pkey_mprotect with key 3",
            "pkey_mprotect with key 0",
            "pkey_free of key 1",
        ];
        assert_eq!(steps, want);
    }

    #[test]
    fn keys_that_were_freed_stay_with_their_areas() {
        let areas = vec![area(0x1000, READ, 5)];
        let steps = steps(&mm(Some(1), None, areas), true);
        assert_eq!(steps[4..6], ["pkey_alloc of key 5", "pkey_mprotect with key 5"]);
        assert_eq!(steps.iter().filter(|step| step.starts_with("pkey_free")).count(), 5);
        assert_eq!(execute_only(1, &[area(0, EXEC, 2), area(0, EXEC, 3)]), Err((2, 3)));
    }

    #[test]
    fn without_keys_nothing_is_done() {
        assert!(steps(&mm(Some(1), None, Vec::new()), true).is_empty());
        assert_eq!(steps(&mm(Some(0), None, Vec::new()), true), [""; 0]);
        // Of CRIU, on a processor with keys: what PROT_EXEC means there.
        assert_eq!(steps(&mm(None, None, vec![area(0x1000, EXEC, 0)]), true), ["mprotect 0x1000"]);
        // On one without, such memory can be read.
        assert_eq!(steps(&mm(None, None, vec![area(0x1000, EXEC, 0)]), false), ["pkey_mprotect with key 0"]);
    }

    #[test]
    fn a_processor_without_keys_is_refused_by_name() {
        let need = mm(Some(0b101), None, vec![area(0x1000, READ, 4)]);
        let error = plan_for(&need, NsPid::new(7), true, false).unwrap_err().to_string();
        assert!(error.contains("task 7") && error.contains("keys (2, 4)"), "{error}");
        let code = mm(Some(1), Some(1), vec![area(0x1000, EXEC, 1)]);
        assert_eq!(plan_for(&code, NsPid::new(7), true, false).unwrap(), Plan::default());
    }

    #[test]
    fn crafted_images_are_refused() {
        let one = |vma| vec![vma];
        for bad in [
            mm(Some(1 << 16), None, Vec::new()),
            mm(Some(1), Some(16), Vec::new()),
            mm(Some(1), Some(0), Vec::new()),
            mm(Some(3), Some(1), Vec::new()),
            mm(Some(1), None, one(area(0x1000, READ, 16))),
            mm(Some(1), None, one(area(0x1000, READ, u32::MAX))),
            mm(Some(1), Some(2), one(area(0x1000, READ, 2))),
        ] {
            assert!(
                matches!(plan_for(&bad, NsPid::new(1), true, true), Err(MemError::BadImage { .. })),
                "{bad:?}"
            );
        }
    }
}
