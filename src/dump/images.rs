//! Writes what was collected: the pages of memory (or which there are, where they come last), then the images of tasks, the
//! inventory at the very end.

use std::fs::File;

use anyhow::{Context, Result, anyhow};

use super::{collect::Collected, ids::Ids};
use crate::{
    image::{ImageKind, Store, TypedStore, pb},
    mem::MemoryDump,
    ns::time,
    process_tree::ids::in_tree,
    stats::DumpStats,
};

/// Version of the format, `inventory_entry.img_version`.
const IMAGE_VERSION: u32 = 2;

/// Writes pages and areas of all tasks, then shared memory; of pages that `come_last` only which there are.
pub(super) fn memory(
    collected: &mut Collected<'_>,
    memory: &mut MemoryDump<'_>,
    come_last: bool,
    stats: &mut DumpStats,
) -> Result<()> {
    for task in &mut collected.tasks {
        if let Some(space) = task.space.take() {
            let (pid, space) = (in_tree(task.pid), space.space());
            let done =
                if come_last { memory.describe(pid, space, stats) } else { memory.task(pid, space, stats) };
            done.with_context(|| format!("memory of task {}", task.pid))?;
        }
    }
    let shared = match come_last {
        true => memory.describe_shared(&collected.shared, stats),
        false => memory.shared(&collected.shared, stats),
    };
    shared.context("shared memory")
}

/// Writes everything else that was collected.
pub(super) fn tasks(collected: &mut Collected<'_>, store: &dyn Store) -> Result<()> {
    collected.files.write().context("open files")?;
    if let (Some(root), Some(clocks)) = (collected.tasks.first(), collected.clocks) {
        time::write(store, &root.ids, &collected.own_ids, clocks)?;
    }
    for (pid, core) in &collected.dead {
        store.write_one(ImageKind::Core, u64::from(in_tree(*pid).bits()), core)?;
    }
    for task in std::mem::take(&mut collected.tasks) {
        let image = u64::from(in_tree(task.pid).bits());
        for (tid, core) in &task.cores {
            store.write_one(ImageKind::Core, u64::from(in_tree(*tid).bits()), core.message().as_ref())?;
        }
        store.write_one(ImageKind::Ids, image, &task.ids)?;
        if let Some(fs) = &task.fs {
            store.write_one(ImageKind::Fs, image, fs)?;
        }
    }
    let seccomp = std::mem::take(&mut collected.seccomp).finish();
    store.write_one(ImageKind::Seccomp, None, &seccomp)?;
    // See `BEFORE_PAGES`.
    Ok(store.write_all(ImageKind::Pstree, None, &collected.pstree)?)
}

/// Writes the image whose presence makes the others a snapshot.
pub(super) fn inventory(store: &dyn Store, ids: &mut Ids) -> Result<()> {
    let mut random = [0u8; 16];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut random).map_err(|e| anyhow!(e))?;
    let hex: String = random.iter().map(|b| format!("{b:02x}")).collect();
    let run_id = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    let entry = pb::InventoryEntry {
        img_version: IMAGE_VERSION,
        fdinfo_per_id: Some(true),
        root_ids: Some(ids.own()),
        ns_per_id: Some(true),
        root_cg_set: None,
        lsmtype: Some(pb::Lsmtype::NoLsm as i32),
        dump_criu_run_id: Some(run_id.into_bytes()),
        ..Default::default()
    };
    Ok(store.write_one(ImageKind::Inventory, None, &entry)?)
}
