//! Messages in CRIU's form, from `tracing` events.
//!
//! ```text
//! (00.001234) Error (src/dump/mod.rs:12): what went wrong
//! (00.001240) Warn  (src/files/tty.rs:40): what is odd
//! (00.001251) information and debug lines as they are
//! ```
//!
//! The time since start stands before a line from level 3 on. Newlines inside a message are
//! escaped, so one event is one line. An event with a field `pid` goes to `FILE.PID` under `--log-pid`.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

use crate::{
    ownership::{self, Old, OwnershipError},
    progress,
    settings::{LogSettings, OwnerCheck},
};

/// Times are printed from this level on.
const STAMPED: u8 = 3;

/// What the process has been told about messages, once.
static STATE: OnceLock<State> = OnceLock::new();

#[derive(Debug)]
struct State {
    level: u8,
    to_stderr: bool,
}

/// As messages name it.
const WHAT: &str = "log file";

/// The log file cannot be made.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct LogError(#[from] OwnershipError);

#[derive(Debug)]
enum Sink {
    Stderr,
    Stdout,
    File { file: File, path: PathBuf },
}

#[derive(Debug)]
struct Lines {
    sink: Sink,
    stamped: bool,
    per_pid: bool,
    owner_check: OwnerCheck,
    start: Instant,
    /// It has been said that the file takes nothing.
    told: AtomicBool,
}

/// Opens the log and sends every later event there. Only the first call of a process counts.
pub fn start(settings: &LogSettings, start: Instant) -> Result<(), LogError> {
    let sink = match &settings.file {
        None => Sink::Stderr,
        Some(path) if path.as_os_str() == "-" => Sink::Stdout,
        Some(path) => {
            let path = settings.work_dir.join(path);
            let file = ownership::output(&path, WHAT, Old::Truncated, settings.owner_check)?;
            Sink::File { file, path }
        }
    };
    let filter = match settings.level {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        _ => LevelFilter::TRACE,
    };
    let state = State { level: settings.level, to_stderr: matches!(sink, Sink::Stderr) };
    let lines = Lines {
        sink,
        stamped: settings.level >= STAMPED,
        per_pid: settings.per_pid,
        owner_check: settings.owner_check,
        start,
        told: AtomicBool::new(false),
    };
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter));
    if tracing::subscriber::set_global_default(subscriber).is_ok() {
        let _ = STATE.set(state);
    }
    Ok(())
}

/// Says why the program failed, in the log, and on standard error if that is elsewhere.
///
/// A message is one line, unless it lists several things: then each of them is one, marked like the first.
pub fn failure(message: &str) {
    let state = STATE.get();
    if matches!(state, Some(State { level: 0, .. })) {
        return;
    }
    for line in message.lines() {
        if state.is_some() {
            tracing::error!(target: "crtool::failure", "{line}");
        }
        if state.is_none_or(|state| !state.to_stderr) {
            let _ = progress::aside(|| writeln!(io::stderr(), "Error (crtool): {}", one_line(line)));
        }
    }
}

/// Newlines and other control characters escaped.
fn one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\t' {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Message and fields of an event.
#[derive(Debug, Default)]
struct Text {
    message: String,
    fields: String,
    pid: Option<i64>,
}

impl Visit for Text {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "pid" {
            self.pid = Some(value);
        }
        self.record_debug(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "pid" {
            self.pid = i64::try_from(value).ok();
        }
        self.record_debug(field, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}

impl Lines {
    fn text(&self, event: &Event<'_>, text: &Text) -> String {
        let meta = event.metadata();
        let mut line = String::with_capacity(80 + text.message.len());
        if self.stamped {
            let since = self.start.elapsed();
            let _ = write!(line, "({:02}.{:06}) ", since.as_secs(), since.subsec_micros());
        }
        let word = match *meta.level() {
            Level::ERROR => "Error",
            Level::WARN => "Warn ",
            _ => "",
        };
        if !word.is_empty() {
            let _ = match (meta.file(), meta.line()) {
                (Some(file), Some(at)) if meta.target() != "crtool::failure" => {
                    write!(line, "{word} ({file}:{at}): ")
                }
                _ => write!(line, "{word} (crtool): "),
            };
        }
        line.push_str(&one_line(&text.message));
        line.push_str(&one_line(&text.fields));
        line.push('\n');
        line
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = self.text(event, &text);
        // A log that cannot be written must not stop the work.
        let written = match (&self.sink, text.pid) {
            (Sink::Stderr, _) => progress::aside(|| io::stderr().write_all(line.as_bytes())),
            (Sink::Stdout, _) if io::stdout().is_terminal() => {
                progress::aside(|| io::stdout().write_all(line.as_bytes()))
            }
            (Sink::Stdout, _) => io::stdout().write_all(line.as_bytes()),
            (Sink::File { path, .. }, Some(pid)) if self.per_pid => {
                append(path, pid, &line, self.owner_check)
            }
            (Sink::File { file, .. }, _) => (&mut &*file).write_all(line.as_bytes()),
        };
        if let (Err(error), Sink::File { path, .. }) = (written, &self.sink)
            && !self.told.swap(true, Ordering::Relaxed)
        {
            let _ = writeln!(io::stderr(), "Warn  (crtool): log file {}: {error}", path.display());
        }
    }
}

/// Writes a line to `FILE.PID`.
fn append(path: &Path, pid: i64, line: &str, check: OwnerCheck) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{pid}"));
    let file = ownership::output(&PathBuf::from(name), WHAT, Old::Kept, check);
    file.map_err(io::Error::other)?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let file = File::create(&path).unwrap();
        let lines = Lines {
            sink: Sink::File { file, path: path.clone() },
            stamped: false,
            per_pid: true,
            owner_check: OwnerCheck::On,
            start: Instant::now(),
            told: AtomicBool::new(false),
        };
        let subscriber = tracing_subscriber::registry().with(lines);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(fd = 3, "opened {}", "a\nb");
            tracing::warn!("odd");
            tracing::error!(target: "crtool::failure", "dump of pid 5: why");
            tracing::info!(pid = 7, "task");
        });
        let text = std::fs::read_to_string(&path).unwrap();
        let mut found = text.lines();
        assert_eq!(found.next(), Some(r"opened a\nb fd=3"));
        let warn = found.next().unwrap();
        assert!(warn.starts_with("Warn  (src/log.rs:") && warn.ends_with("): odd"), "{warn}");
        assert_eq!(found.next(), Some("Error (crtool): dump of pid 5: why"));
        assert_eq!(found.next(), None);
        let task = std::fs::read_to_string(dir.path().join("log.7")).unwrap();
        assert_eq!(task, "task pid=7\n");
    }
}
