//! The result as Markdown tables, and which targets are met.

use crate::measure::Row;
use crate::ways::{Sample, Way};

/// Of the floor's throughput, at least.
const DIRECT: f64 = 0.8;
const THROUGH_PROXY: f64 = 0.65;
/// Of CRIU's time from freeze to running, at most.
const GAP: f64 = 0.5;
/// Resident memory of the proxy, MiB, stays below.
const PROXY_MIB: f64 = 96.0;
/// What the cache keeps, as a multiple of the target's memory, at most.
const CACHE: f64 = 1.05;
/// And once it is restored, MiB.
const CACHE_AFTER_MIB: f64 = 32.0;

/// A way's medians.
struct Medians<'a> {
    samples: &'a [Sample],
}

impl Medians<'_> {
    fn of(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let mut values: Vec<f64> = self.samples.iter().filter_map(figure).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.get(values.len() / 2)?;
        Some(if values.len() % 2 == 1 {
            *middle
        } else {
            f64::midpoint(values[values.len() / 2 - 1], *middle)
        })
    }

    fn sent(&self) -> Option<f64> {
        self.of(|s| Some(s.sent))
    }

    fn gap(&self) -> Option<f64> {
        self.of(|s| s.gap)
    }
}

impl Row {
    fn medians(&self, way: Way) -> Option<Medians<'_>> {
        let (_, samples) = self.ways.iter().find(|(w, _)| *w == way)?;
        samples.as_ref().ok().filter(|s| !s.is_empty()).map(|samples| Medians { samples })
    }

    /// The best form of the floor.
    fn floor(&self) -> Option<f64> {
        let floors = self.ways.iter().filter(|(way, _)| matches!(way, Way::Floor(_)));
        floors.filter_map(|(way, _)| self.medians(*way)?.sent()).min_by(f64::total_cmp)
    }
}

pub fn print(rows: &[Row], runs: usize) {
    println!("Medians of {runs} runs.\n");
    println!(
        "| target | way | sent, ms | MiB/s | of the floor | freeze to running, ms | CPU s/GiB: dump | proxy | cache | \
         restore | proxy, MiB | cache, MiB: most | half-way through restore | after |"
    );
    println!("|---|---|{}", "---:|".repeat(12));
    for row in rows {
        for (way, samples) in &row.ways {
            let cells = match samples {
                Err(_) => format!("fails |{}", " |".repeat(11)),
                Ok(_) => row.medians(*way).map(|m| cells(row, &m)).unwrap_or_default(),
            };
            println!("| {} | {} | {cells}", size(row.bytes), way.what());
        }
    }
    println!();
    let targets: Vec<_> = rows.iter().flat_map(targets).collect();
    let missed: Vec<_> = targets.iter().filter(|(_, met)| !met).collect();
    println!("Targets met: {} of {}", targets.len() - missed.len(), targets.len());
    for (what, met) in &targets {
        println!("- {}: {what}", if *met { "met" } else { "missed" });
    }
}

fn size(bytes: u64) -> String {
    if bytes >= 1 << 30 { format!("{} GiB", bytes >> 30) } else { format!("{} MiB", bytes >> 20) }
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn cells(row: &Row, medians: &Medians<'_>) -> String {
    let gib = row.bytes as f64 / f64::from(1 << 30);
    let sent = medians.sent();
    let per_gib = |figure: fn(&Sample) -> Option<f64>| medians.of(figure).map(|cpu| cpu / gib);
    let cells = [
        sent.map(|s| s * 1e3),
        sent.map(|s| gib * 1024.0 / s),
        sent.and_then(|s| Some(row.floor()? / s)),
        medians.gap().map(|s| s * 1e3),
        per_gib(|s| Some(s.cpu_dump)),
        per_gib(|s| s.cpu_proxy),
        per_gib(|s| s.cpu_cache),
        per_gib(|s| s.cpu_restore),
        medians.of(|s| s.proxy_peak.map(mib)),
        medians.of(|s| s.cache.map(|c| mib(c.most))),
        medians.of(|s| s.cache.map(|c| mib(c.halfway))),
        medians.of(|s| s.cache.map(|c| mib(c.after))),
    ];
    cells.iter().map(|cell| format!("{} |", cell.map_or(String::new(), number))).collect::<Vec<_>>().join(" ")
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.2}")
    } else if value < 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// Every target that a row says something about, and whether it is met.
fn targets(row: &Row) -> Vec<(String, bool)> {
    let mut targets = Vec::new();
    let mut target = |text: String, is: Option<f64>, fits: &dyn Fn(f64) -> bool| {
        if let Some(is) = is {
            targets.push((format!("{}, {text}: {}", size(row.bytes), number(is)), fits(is)));
        }
    };
    for (way, of_floor) in [(Way::Direct, DIRECT), (Way::Proxy, THROUGH_PROXY)] {
        let medians = row.medians(way);
        let sent = medians.as_ref().and_then(Medians::sent);
        let ratio = sent.and_then(|s| Some(row.floor()? / s));
        target(format!("{} of the floor, wanted {of_floor}", way.what()), ratio, &|r| r >= of_floor);
        for peer in [Way::PageServer, Way::Tar] {
            let theirs = row.medians(peer).and_then(|m| m.gap());
            let ratio = medians.as_ref().and_then(Medians::gap).and_then(|ours| Some(ours / theirs?));
            let text = format!("{} to {}, freeze to running, wanted {GAP}", way.what(), peer.what());
            target(text, ratio, &|r| r <= GAP);
        }
        let Some(medians) = medians else { continue };
        let proxy = medians.of(|s| s.proxy_peak.map(mib));
        target(format!("MiB of the proxy, wanted below {PROXY_MIB}"), proxy, &|m| m < PROXY_MIB);
        let most = medians.of(|s| s.cache.map(|c| mib(c.most) / mib(row.bytes >> 10)));
        target(format!("{}, cache to target, wanted {CACHE}", way.what()), most, &|r| r <= CACHE);
        let after = medians.of(|s| s.cache.map(|c| mib(c.after)));
        let text = format!("{}, MiB of the cache after the restore, wanted {CACHE_AFTER_MIB}", way.what());
        target(text, after, &|m| m < CACHE_AFTER_MIB);
    }
    targets
}
