//! The result as a Markdown table, and which targets are met.

use crate::measure::{FIGURES, Row, Start};

/// Figures by their place in [`FIGURES`].
const TIMES: [usize; 3] = [0, 1, 2];
const FROZEN: usize = 1;
const FROZEN_AND_RESTORE: [usize; 2] = [FROZEN, 2];
const PEAKS: [usize; 2] = [3, 4];
/// Rows in which time frozen and restore have to be well below CRIU's.
const FAST_ROWS: [&str; 2] = ["1g", "mappings"];
const FAST: f64 = 0.7;
/// Rows in which the time frozen has to be at most this part of CRIU's.
const SOON_FROZEN: [(&str, f64); 1] = [(MANY, 0.5)];
/// The row of many processes, whose time frozen is also held against that of the row of few, which are [`MORE`] times
/// fewer: for each of them at most [`LINEAR`] times as much.
const MANY: &str = "processes-4k";
const FEW: &str = "processes";
const MORE: f64 = 40.0;
const LINEAR: f64 = 1.75;
/// Peak memory of the tool stays below, in MiB.
const PEAK_MIB: f64 = 32.0;
/// A start takes less, in ms.
const START_MS: f64 = 10.0;

pub fn print(rows: &[Row], starts: &[Start], runs: usize) {
    println!("Medians of {runs} runs; each cell: crtool / CRIU = ratio.\n");
    if !rows.is_empty() {
        let names: Vec<&str> = FIGURES.iter().map(|figure| figure.name).collect();
        println!("| tree | {} |", names.join(" | "));
        println!("|---|{}", "---:|".repeat(FIGURES.len()));
        for row in rows {
            println!("| {} | {} |", row.what, cells(row).join(" | "));
        }
        println!();
    }
    if !starts.is_empty() {
        println!("| start | ms |\n|---|---:|");
        for start in starts {
            println!("| {} | {} |", start.what, cell(start.ours, start.peer));
        }
        println!();
    }
    let targets = targets(rows, starts);
    let missed: Vec<&(String, bool)> = targets.iter().filter(|(_, met)| !met).collect();
    println!("Targets met: {} of {}", targets.len() - missed.len(), targets.len());
    for (what, _) in missed {
        println!("- missed: {what}");
    }
}

fn cells(row: &Row) -> Vec<String> {
    match (&row.ours, &row.peer) {
        (Err(_), _) => vec!["crtool fails".into(); FIGURES.len()],
        (Ok(ours), Some(Ok(peer))) => {
            ours.iter().zip(peer).map(|(&ours, &peer)| cell(ours, Some(peer))).collect()
        }
        (Ok(ours), Some(Err(_))) => ours.iter().map(|&ours| format!("{} / fails", number(ours))).collect(),
        (Ok(ours), None) => ours.iter().map(|&ours| cell(ours, None)).collect(),
    }
}

fn cell(ours: f64, peer: Option<f64>) -> String {
    match peer {
        Some(peer) => format!("{} / {} = {:.2}", number(ours), number(peer), ours / peer),
        None => number(ours),
    }
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

/// Every target that these rows say something about, and whether it is met.
fn targets(rows: &[Row], starts: &[Start]) -> Vec<(String, bool)> {
    let mut targets = Vec::new();
    for row in rows {
        let Ok(ours) = &row.ours else {
            targets.push((format!("{}: crtool fails", row.what), false));
            continue;
        };
        for figure in PEAKS {
            let text = format!(
                "{}, {}: {:.1}, wanted below {PEAK_MIB}",
                row.what, FIGURES[figure].name, ours[figure]
            );
            targets.push((text, ours[figure] < PEAK_MIB));
        }
        let Some(Ok(peer)) = &row.peer else { continue };
        for figure in TIMES {
            let fast = FAST_ROWS.contains(&row.name) && FROZEN_AND_RESTORE.contains(&figure);
            let soon = SOON_FROZEN.iter().find(|(name, _)| figure == FROZEN && *name == row.name);
            let most = soon.map_or(if fast { FAST } else { 1.0 }, |(_, most)| *most);
            let ratio = ours[figure] / peer[figure];
            let text = format!("{}, {}: ratio {ratio:.2}, wanted {most}", row.what, FIGURES[figure].name);
            targets.push((text, ratio <= most));
        }
    }
    let frozen = |name: &str| Some(rows.iter().find(|row| row.name == name)?.ours.as_ref().ok()?[FROZEN]);
    if let (Some(few), Some(many)) = (frozen(FEW), frozen(MANY)) {
        let ratio = many / (few * MORE);
        let text =
            format!("time frozen for each of many processes: {ratio:.2} of that of few, wanted {LINEAR}");
        targets.push((text, ratio <= LINEAR));
    }
    for start in starts {
        let text = format!("{}: {:.1} ms, wanted below {START_MS}", start.what, start.ours);
        targets.push((text, start.ours < START_MS));
    }
    targets
}
