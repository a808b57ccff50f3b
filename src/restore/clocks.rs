//! The clocks of a tree under construction.
//!
//! They go on when the memory of the tree is there, so that it notices as little of the restore as can be: every task enters
//! the time namespace by itself then, before it has a second thread. A task whose memory another one shares cannot enter
//! any more; in a tree with such tasks the first one enters before it makes the others.

use std::collections::HashSet;

use anyhow::{Context, Result, anyhow};

use super::images::{Images, inventory};
use crate::{
    image::Store,
    ns::time::{self, Clocks, Running, TimeNamespace},
    settings::RestoreSettings,
    tracee::List,
};

/// What is known of the clocks of a tree, and the time namespace that it gets.
#[derive(Debug)]
pub(super) struct TreeClocks {
    /// Where they stood when the tree was frozen, and the namespace; `None` for a tree that gets the clocks of crtool.
    made: Option<(Clocks, TimeNamespace)>,
    /// The first task enters it, not each by itself.
    early: bool,
}

/// Whether tasks share their memory.
pub(super) fn share_memory(images: &Images) -> bool {
    let mut spaces = HashSet::new();
    let mut alive = images.tasks.iter().filter(|task| !task.is_zombie());
    !alive.all(|task| task.ids.vm_id == 0 || spaces.insert(task.ids.vm_id))
}

impl TreeClocks {
    /// Not known yet, of a tree whose tasks do not share memory.
    pub(super) fn later() -> Self {
        Self { made: None, early: false }
    }

    /// Reads the clocks from the images and makes a time namespace for them.
    pub(super) fn read(store: &dyn Store, images: &Images, settings: &RestoreSettings) -> Result<Self> {
        let early = share_memory(images);
        let none = Self { made: None, early };
        if settings.host_clocks {
            return Ok(none);
        }
        let root = images.tasks.first().context("no task")?;
        let Some(frozen) = time::read(store, &root.ids, inventory(store)?.root_ids.as_ref())? else {
            tracing::warn!(
                "the images do not say where the clocks of the tree stood: it gets those of this machine"
            );
            return Ok(none);
        };
        match TimeNamespace::make() {
            Ok(namespace) => Ok(Self { made: Some((frozen, namespace)), early }),
            Err(error) => {
                let error = format!("{:#}", anyhow!(error));
                time::host_clocks_suffice(frozen).with_context(|| error.clone())?;
                tracing::warn!(
                    "the tree gets the clocks of this machine, which are ahead of its own: {error}"
                );
                Ok(none)
            }
        }
    }

    /// Tasks that share memory are about to be made.
    pub(super) fn start_early(&mut self) -> Result<()> {
        if self.early { self.go_on() } else { Ok(()) }
    }

    /// The memory of the tree is there.
    pub(super) fn start(&mut self) -> Result<()> {
        if self.early { Ok(()) } else { self.go_on() }
    }

    fn go_on(&mut self) -> Result<()> {
        if let Some((frozen, namespace)) = &mut self.made {
            namespace.start(*frozen).context("clocks of the tree")?;
        }
        Ok(())
    }

    /// In the list of the first task, after [`Self::start_early`].
    pub(super) fn plan_first(&self, list: &mut List) {
        if self.early {
            self.plan_entry(list);
        }
    }

    /// In the list of each task that has its memory and no threads yet, after [`Self::start`].
    pub(super) fn plan_task(&self, list: &mut List) {
        if !self.early {
            self.plan_entry(list);
        }
    }

    /// Its clocks, once they go on.
    pub(super) fn running(&self) -> Option<Running> {
        self.made.as_ref().and_then(|(_, namespace)| namespace.clocks())
    }

    fn plan_entry(&self, list: &mut List) {
        if let Some((_, namespace)) = &self.made {
            namespace.plan_entry(list);
        }
    }
}
