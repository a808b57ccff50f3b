//! `crtool dump`.

use anyhow::Context as _;

use super::{explained, report, watchdog::Watchdog};
use crate::{
    dump::Unconfirmed,
    exit::{Exit, Incomplete},
    interrupt,
    progress::{Shown, Surface},
    remote::client::RemoteDump,
    settings::{DumpSettings, Leave, RemoteSettings, ReportSettings},
    stats::DumpStats,
    sys::pid::HostPid,
};

/// Dumps a tree.
pub fn run(settings: &DumpSettings, report: ReportSettings) -> anyhow::Result<Exit> {
    interrupt::watch().context("hold back of signals")?;
    let _watchdog =
        Watchdog::start(format!("dump of pid {}", settings.pid), "the tree runs on").context("watchdog")?;
    let shown = Shown::begin(Surface::Terminal);
    let dumped = match &settings.remote {
        None => crate::dump::dump(settings).map(|stats| (stats, Ok(()))),
        Some(remote) => to_cache(settings, remote),
    };
    drop(shown);
    let (stats, waited) = dumped
        .map_err(|error| match error.downcast_ref::<Unconfirmed>() {
            Some(_) => error.context(Incomplete("the images are complete")),
            None => explained(error),
        })
        .with_context(|| format!("dump of pid {}", settings.pid))?;
    let exit = done(settings, report, &stats)?;
    waited.context(Incomplete(match settings.leave {
        Leave::Killed => "the tree is gone here and complete in the cache",
        Leave::Running | Leave::Stopped => "the tree is complete in the cache",
    }))?;
    Ok(exit)
}

/// Dumps into a cache; beside the statistics, whether the restore was heard of where that was asked for.
fn to_cache(
    settings: &DumpSettings,
    remote: &RemoteSettings,
) -> anyhow::Result<(DumpStats, anyhow::Result<()>)> {
    crate::dump::look_at_root(HostPid::new(settings.pid.as_raw()))?;
    let store = RemoteDump::connect(remote, settings, false)?;
    let stats = crate::dump::dump_to(&store, None, settings)
        .inspect_err(|error| store.give_up(&format!("{error:#}")))?;
    // Nobody waits for that: the tree is gone, and the destination goes on meanwhile.
    if let Err(failure) = store.taken() {
        let error = anyhow::Error::from(failure);
        return Ok((
            stats,
            Err(if settings.leave == Leave::Killed { error.context(Unconfirmed) } else { error }),
        ));
    }
    let Some(patience) = remote.wait_restored else { return Ok((stats, Ok(()))) };
    let waited = match store.wait_restored(patience) {
        Ok(restored) if restored.ok => {
            tracing::info!("restored at the destination with pid {}", restored.pid);
            Ok(())
        }
        Ok(restored) => Err(anyhow::anyhow!("not restored: {}", restored.text)),
        Err(failure) => Err(anyhow::Error::from(failure).context("its restore was not reported")),
    };
    Ok((stats, waited))
}

/// Says what there is to say about a dump that is complete.
pub fn done(settings: &DumpSettings, report: ReportSettings, stats: &DumpStats) -> anyhow::Result<Exit> {
    // Statistics are no part of the snapshot: without them it is complete all the same.
    if let Err(error) = stats.write(&settings.common.work_dir, settings.common.owner_check) {
        tracing::warn!("{:#}", anyhow::Error::from(error));
    }
    if report.display_stats {
        report::display(stats);
    }
    report::ready(report.status_fd).context(Incomplete("the dump is complete"))?;
    tracing::info!("Dumping finished successfully");
    Ok(Exit::Success)
}
