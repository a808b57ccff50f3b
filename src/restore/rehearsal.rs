//! What a restore thinks, and nothing of what it does: for fuzz targets.
//!
//! Images are read and checked, files are opened, and all lists of all tasks are made, in the order in which a restore does it. No
//! process is made. Files of tasks that would have to be there are not opened, so what is planned for tables with such
//! files is not reached.

use anyhow::Result;

use super::{
    clocks::TreeClocks,
    create::Construction,
    images::{Images, inventory},
    plan,
};
use crate::{cpuinfo, files::FilesRestore, image::Store, ns::time, settings::RestoreSettings};

/// Plans the restore of a tree from `store`. The settings must ask for the clocks of the host, because other ones are made
/// by a process.
pub fn rehearse(store: &dyn Store, settings: &RestoreSettings) -> Result<()> {
    inventory(store)?;
    let images = Images::read(store)?;
    cpuinfo::check(store, settings.common.cpu_cap)?;
    let forks = plan::forks(&images, settings)?;
    let mut files = FilesRestore::read(store, settings, &images.tables())?;
    files.open_early()?;
    if let Some(root) = images.tasks.first()
        && let Some(frozen) = time::read(store, &root.ids, inventory(store)?.root_ids.as_ref())?
    {
        let _ = time::host_clocks_suffice(frozen);
    }
    let clocks = TreeClocks::read(store, &images, settings)?;
    let mut tree = Construction::plan(store, &images, forks, files, clocks)?;
    tree.rehearse_attributes()?;
    tree.rehearse_final_state()
}
