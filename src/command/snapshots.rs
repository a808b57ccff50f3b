//! Snapshots as a table, for people and for `awk`.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use crate::remote::name::is_hidden;
use crate::remote::pb::{SnapshotInfo, snapshot_info::State};

/// What a list is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// What is held.
    Held,
    /// Also what was.
    All,
}

/// Longest field, in characters: one long name does not make every line so long.
const LONGEST: usize = 40;

const HEAD: [&str; 9] = ["NAME", "STATE", "SIZE", "MEMORY", "IMAGES", "TASK", "HOST", "FOR", "FROM"];

/// One line for each snapshot, columns aligned, and a note below where there is something to say.
pub(super) fn table(snapshots: &[SnapshotInfo], which: Which, now: SystemTime) -> String {
    let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let held = |info: &&SnapshotInfo| which == Which::All || !is_over(info.state());
    let mut rows: Vec<([String; 9], String)> = vec![(HEAD.map(str::to_owned), String::new())];
    for info in snapshots.iter().filter(held) {
        let for_now = since_epoch.saturating_sub(Duration::from_secs(info.since));
        let (name, from) = (one_word(&info.name), one_word(&info.origin));
        let row = [
            cut(&name),
            info.state().as_str_name().to_owned(),
            size(info.bytes),
            size(info.resident),
            info.images.to_string(),
            format!("{}({})", info.pid, cut(&one_word(&info.comm))),
            cut(&one_word(&info.host)),
            span(for_now),
            cut(&from),
        ];
        let mut note = plain(&info.text);
        if note.is_empty() && info.state() == State::Restored && info.restored_pid > 0 {
            note = format!("runs as pid {}", info.restored_pid);
        }
        if !info.saved.is_empty() && !is_over(info.state()) {
            let saved = format!("saved in {}: restore only one of the two", plain(&info.saved));
            note = [note, saved].join("; ").trim_start_matches("; ").to_owned();
        }
        if !info.parent.is_empty() {
            note = [note, format!("on top of {}", plain(&info.parent))].join("; ");
            note = note.trim_start_matches("; ").to_owned();
        }
        if row.first() != Some(&name) {
            note = [format!("named {name}"), note].join("; ");
            note = note.trim_end_matches("; ").to_owned();
        }
        if row.last() != Some(&from) {
            note = [note, format!("from {from}")].join("; ").trim_start_matches("; ").to_owned();
        }
        rows.push((row, note));
    }
    let mut widths = [0; 9];
    for (row, _) in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = String::new();
    for (row, note) in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        let _ = writeln!(out, "{}", line.trim_end());
        if !note.is_empty() {
            let _ = writeln!(out, "    {note}");
        }
    }
    out
}

fn is_over(state: State) -> bool {
    matches!(state, State::Restored | State::Failed | State::Dropped)
}

/// What another host sent is shown, not obeyed.
fn plain(text: &str) -> String {
    let shown = |c: char| if is_hidden(c) { c.escape_default().collect() } else { vec![c] };
    text.chars().flat_map(shown).collect()
}

/// As one field of a line; nothing is `-`.
fn one_word(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    if text.chars().any(char::is_whitespace) { format!("\"{}\"", plain(text)) } else { plain(text) }
}

/// Its beginning, if it is long.
fn cut(field: &str) -> String {
    if field.chars().count() <= LONGEST {
        return field.to_owned();
    }
    field.chars().take(LONGEST - 3).chain("...".chars()).collect()
}

fn size(bytes: u64) -> String {
    let mut unit = 0u32;
    while unit < 4 && bytes >> (10 * unit) >= 10_240 {
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB"].get(unit as usize).copied().unwrap_or_default();
    format!("{}{name}", bytes >> (10 * unit))
}

fn span(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..=119 => format!("{s}s"),
        120..=7199 => format!("{}m", s / 60),
        7200..=172_799 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_and_notes() {
        let info = |name: &str, state: State, text: &str| SnapshotInfo {
            name: name.to_owned(),
            state: state.into(),
            pid: 7,
            comm: "my prog".to_owned(),
            host: "src".to_owned(),
            bytes: 5 << 30,
            images: 12,
            since: 940,
            text: text.to_owned(),
            origin: "CN=src,O=Example".to_owned(),
            ..SnapshotInfo::default()
        };
        let all = [
            SnapshotInfo { origin: "192.0.2.1".to_owned(), ..info("web/1", State::InDoubt, "") },
            SnapshotInfo { restored_pid: 9, parent: "web/1".to_owned(), ..info("b c", State::Restored, "") },
            info("x", State::Failed, "the connection\nwas lost"),
        ];
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(
            table(&all, Which::All, now),
            "NAME   STATE     SIZE     MEMORY  IMAGES  TASK          HOST  FOR  FROM\n\
             web/1  IN_DOUBT  5120MiB  0B      12      7(\"my prog\")  src   60s  192.0.2.1\n\
             \"b c\"  RESTORED  5120MiB  0B      12      7(\"my prog\")  src   60s  CN=src,O=Example\n    \
             runs as pid 9; on top of web/1\n\
             x      FAILED    5120MiB  0B      12      7(\"my prog\")  src   60s  CN=src,O=Example\n    \
             the connection\\nwas lost\n"
        );
        assert_eq!(table(&all, Which::Held, now).lines().count(), 2);
        // What is long or not to be seen does no harm to the others, and can be typed.
        let long = "x".repeat(1024);
        let odd = info("a\u{202e}b\u{200b}", State::Ready, "");
        let shown = table(&[info(&long, State::Ready, "why"), odd], Which::Held, now);
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[1].starts_with(&format!("{}...  READY", "x".repeat(37))), "{shown}");
        assert_eq!(lines[2], format!("    named {long}; why"));
        assert!(lines[3].starts_with("a\\u{202e}b\\u{200b}  ") && lines[3].len() < 130, "{shown}");
        let long = format!("CN={}", "y\n".repeat(100));
        let shown =
            table(&[SnapshotInfo { origin: long, ..info("a", State::Ready, "why") }], Which::Held, now);
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines.len() == 3 && lines[1].len() < 110, "{shown}");
        assert!(lines[2].starts_with("    why; from \"CN=y\\ny"), "{shown}");
        assert_eq!(size(10_239), "10239B");
        assert_eq!(size(u64::MAX), "16777215TiB");
    }
}
