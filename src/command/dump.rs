//! `crtool dump`.

use anyhow::Context as _;

use super::report;
use crate::{
    exit::{Exit, Incomplete},
    interrupt,
    settings::{DumpSettings, ReportSettings},
    stats::DumpStats,
};

/// Dumps a tree.
pub fn run(settings: &DumpSettings, report: ReportSettings) -> anyhow::Result<Exit> {
    interrupt::watch().context("hold back of signals")?;
    let stats = crate::dump::dump(settings).with_context(|| format!("dump of pid {}", settings.pid))?;
    done(settings, report, &stats)
}

/// Says what there is to say about a dump that is complete.
pub fn done(settings: &DumpSettings, report: ReportSettings, stats: &DumpStats) -> anyhow::Result<Exit> {
    // Statistics are no part of the snapshot: without them it is complete all the same.
    if let Err(error) = stats.write(&settings.common.work_dir) {
        tracing::warn!("{:#}", anyhow::Error::from(error));
    }
    if report.display_stats {
        report::display(stats);
    }
    report::ready(report.status_fd).context(Incomplete("the dump is complete"))?;
    tracing::info!("Dumping finished successfully");
    Ok(Exit::Success)
}
