//! `crtool migrate`: a tree goes on on another host, and ends here only then; and what an operator does when its end is not
//! known ([`ask`]).

mod unsettled;

use std::{
    cell::{Cell, RefCell},
    io::{self, IsTerminal as _, Write as _},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

pub use self::unsettled::ask;
use super::{dump::done, explained, watchdog::Watchdog};
use crate::{
    dump::{Before, Fate, HandOver},
    exit::Exit,
    interrupt,
    progress::{self, Shown, Surface},
    remote::{
        client::{self, RemoteDump},
        handover::{Heard, Source},
        journal::{self, Departure, Open, Way, Word},
        pb::{self, resume::Verdict},
        process::Process,
    },
    settings::{MigrateSettings, RemoteSettings, ReportSettings},
    sys::pid::HostPid,
};

/// How long the destination is listened to before the operator is.
const ASK: Duration = Duration::from_secs(1);
/// How often the log says that the end is not known.
const REMIND: Duration = Duration::from_secs(30);

/// What is going on, for whoever sits in front of it or reads lines of JSON; nothing where nobody does.
struct Progress {
    json: bool,
    /// To the thread that writes: a reader that takes nothing must not hold up whoever holds a tree.
    lines: Option<mpsc::Sender<String>>,
    written: Option<mpsc::Receiver<()>>,
    begun: Instant,
}

impl Progress {
    fn new(json: bool) -> Self {
        let mut progress = Self { json, lines: None, written: None, begun: Instant::now() };
        if json || io::stdout().is_terminal() {
            let (lines, all) = mpsc::channel::<String>();
            let (done, written) = mpsc::channel();
            let write = move || {
                // A reader that has seen enough is no failure.
                all.iter().for_each(|line| drop(progress::aside(|| writeln!(io::stdout(), "{line}"))));
                let _ = done.send(());
            };
            if thread::Builder::new().stack_size(256 << 10).spawn(write).is_ok() {
                (progress.lines, progress.written) = (Some(lines), Some(written));
            }
        }
        progress
    }

    /// Where it is seen how the bytes move.
    fn surface(&self) -> Surface {
        let (begun, lines) = (self.begun, self.lines.clone());
        match lines.filter(|_| self.json) {
            Some(lines) => Surface::Lines(Box::new(move |look| {
                let line = serde_json::json!({
                    "phase": "moving", "seconds": begun.elapsed().as_secs_f64(), "text": look.phase,
                    "bytes": look.bytes, "total": look.total, "rate": look.rate, "rest": look.rest(),
                });
                let _ = lines.send(line.to_string());
            })),
            None => Surface::Terminal,
        }
    }

    fn say(&self, phase: &str, text: &str, numbers: &[(&str, serde_json::Value)]) {
        tracing::info!("{text}");
        let Some(lines) = &self.lines else { return };
        let seconds = self.begun.elapsed().as_secs_f64();
        let line = if self.json {
            let mut line = serde_json::json!({ "phase": phase, "seconds": seconds, "text": text });
            for (name, value) in numbers {
                line[*name] = value.clone();
            }
            line.to_string()
        } else {
            format!("{seconds:8.3}  {text}")
        };
        let _ = lines.send(line);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.lines = None;
        if let Some(written) = self.written.take() {
            let _ = written.recv_timeout(ASK);
        }
    }
}

/// A hand-over, as the dump sees it.
struct Migration<'a> {
    store: &'a RemoteDump,
    settings: &'a MigrateSettings,
    remote: &'a RemoteSettings,
    progress: &'a Progress,
    frozen: Cell<Option<Instant>>,
    journal: RefCell<Option<Open>>,
    state: Cell<Source>,
    /// Root of the restored tree, when it runs.
    restored: Cell<i32>,
}

/// Migrates a tree.
pub fn run(settings: &MigrateSettings, report: ReportSettings) -> anyhow::Result<Exit> {
    interrupt::watch().context("hold back of signals")?;
    let pid = settings.dump.pid;
    let _watchdog =
        Watchdog::start(format!("migration of pid {pid}"), "the tree runs on").context("watchdog")?;
    let remote = settings.dump.remote.as_ref().context("no destination")?;
    let progress = Progress::new(settings.json);
    let _shown = Shown::begin(progress.surface());
    let failed = |error: &anyhow::Error| {
        if settings.json {
            progress.say("failed", &format!("{error:#}"), &[]);
        }
    };
    let (stats, restored) = handed_over(settings, remote, &progress)
        .inspect_err(failed)
        .map_err(explained)
        .with_context(|| format!("migration of pid {pid}"))?;
    let text = format!("it runs at the destination as pid {restored}, and is ended here");
    progress.say("running", &text, &[("pid", restored.into())]);
    done(&settings.dump, report, &stats)
}

fn handed_over(
    settings: &MigrateSettings,
    remote: &RemoteSettings,
    progress: &Progress,
) -> anyhow::Result<(crate::stats::DumpStats, i32)> {
    crate::dump::look_at_root(HostPid::new(settings.dump.pid.as_raw()))?;
    let (open, _) = Departure::all(&remote.work_dir).unwrap_or_default();
    if !open.is_empty() {
        tracing::warn!("{} earlier migrations have no known end: crtool migrate list", open.len());
    }
    let store = RemoteDump::connect(remote, &settings.dump, true)?;
    if !store.restores() && settings.max_pause.is_none() {
        let text = "image-cache runs there without --restore, so nobody lets the tree run: start it with --restore, or say \
                    with --max-pause how long crtool restore --remote is to be waited for";
        store.give_up(text);
        bail!(text);
    }
    let migration = Migration {
        store: &store,
        settings,
        remote,
        progress,
        frozen: Cell::new(None),
        journal: RefCell::new(None),
        state: Cell::new(Source::Sending),
        restored: Cell::new(0),
    };
    let stats = crate::dump::dump_to(&store, Some(&migration), &settings.dump);
    // The tree is gone here, or goes on.
    if let Some(open) = migration.journal.take() {
        open.close();
    }
    let stats = stats.inspect_err(|error| store.give_up(&format!("{error:#}")))?;
    Ok((stats, migration.restored.get()))
}

impl Migration<'_> {
    fn departure(&self, before: &Before) -> anyhow::Result<Departure> {
        Ok(Departure {
            id: self.store.id(),
            name: self.remote.snapshot.clone(),
            root: Process::now(self.settings.dump.pid.as_raw()).context("root of the tree")?,
            way: Way::of(self.remote.direct.as_ref()).context("files for TLS")?,
            cache: self.store.journal(),
            before: before.clone(),
            scripts: self.settings.dump.common.action_scripts.clone(),
            going: false,
        })
    }

    /// Whether the tree may go on here by the word of the operator: not if the destination itself says that it runs there.
    fn thawed(&self) -> bool {
        let about = about(&self.remote.snapshot, self.store.id(), self.store.journal(), back());
        let late = matches!(client::take_back(self.remote, about), Ok(false));
        if late {
            tracing::error!("it runs at the destination, or is about to: it does not go on here");
        }
        !late
    }

    fn enter(&self, heard: Heard) -> Source {
        self.state.set(self.state.get().after(heard));
        self.state.get()
    }
}

impl HandOver for Migration<'_> {
    fn freezing(&self) {
        let now = Instant::now();
        self.frozen.set(Some(now));
        self.progress.say("frozen", "the destination takes it; the tree is being frozen", &[]);
        if let Some(limit) = self.settings.max_pause {
            self.store.limit(now + limit);
        }
    }

    fn armed(&self) -> anyhow::Result<()> {
        self.progress.say("sent", "the destination has all of it", &[]);
        let until = self.settings.max_pause.zip(self.frozen.get()).map(|(limit, since)| since + limit);
        let armed = self.store.armed(until).context("the tree was not restored at the destination");
        let armed = armed.and_then(|armed| Ok(interrupt::check().map(|()| armed)?));
        armed.inspect_err(|_| self.state.set(self.state.get().after(Heard::GivenUp)))?;
        self.progress.say("armed", "the restored tree is complete at the destination", &[]);
        Ok(())
    }

    fn stopping(&self, before: &Before) -> anyhow::Result<()> {
        let open =
            self.departure(before)?.write(&self.remote.work_dir).context("journal of the hand-over")?;
        self.journal.replace(Some(open));
        self.enter(Heard::Armed);
        Ok(())
    }

    fn go(&self) -> anyhow::Result<Fate> {
        if let Some(open) = self.journal.borrow_mut().as_mut() {
            open.going().context("journal of the hand-over")?;
        }
        if let Err(failure) = self.store.go() {
            // It may have gone out all the same.
            tracing::warn!("{failure}");
        }
        let (id, work_dir) = (self.store.id(), &self.remote.work_dir);
        let mut told: Option<Instant> = None;
        let mut why = String::new();
        loop {
            let heard = match self.store.fate(ASK) {
                Ok(client::Fate::Runs(pid)) => {
                    self.restored.set(pid);
                    Some(Heard::Restored)
                }
                Ok(client::Fate::Fell(text)) => {
                    why = text;
                    Some(Heard::Fell)
                }
                Err(failure) => {
                    // One that is not forgotten would end every attempt to ask.
                    let interrupted = interrupt::forget();
                    if interrupted.is_some() || told.is_none_or(|told| told.elapsed() > REMIND) {
                        told = Some(Instant::now());
                        crate::log::failure(&format!(
                            "whether the tree runs at the destination is not known: {1}; it stays frozen here, and \
                             the destination is asked on; `crtool migrate thaw {0}` lets it go on here, `crtool migrate \
                             kill {0}` ends it",
                            journal::shown(id),
                            interrupted.map_or(failure.text, |interrupted| interrupted.to_string())
                        ));
                    }
                    std::thread::sleep(ASK / 4);
                    None
                }
            };
            let heard = heard.or_else(|| match Word::heard(work_dir, id)? {
                // Not before whoever can say so has had the time to.
                Word::Kill => match self.store.fate(self.remote.timeout) {
                    Ok(client::Fate::Fell(text)) => {
                        why = text;
                        Some(Heard::Fell)
                    }
                    Ok(client::Fate::Runs(pid)) => {
                        self.restored.set(pid);
                        Some(Heard::Restored)
                    }
                    Err(_) => Some(Heard::Kill),
                },
                Word::Thaw => self.thawed().then(|| {
                    why = "the operator has said so".to_owned();
                    Heard::Thaw
                }),
            });
            match heard.map(|heard| self.enter(heard)) {
                Some(Source::Over) => return Ok(Fate::There),
                Some(Source::Back) => {
                    self.store.back(&format!("the tree runs on: {why}"));
                    return Ok(Fate::Here(format!(
                        "it does not run at the destination, and goes on here: {why}"
                    )));
                }
                _ => {}
            }
        }
    }
}

fn resume(departure: &Departure, verdict: Verdict) -> pb::Resume {
    about(&departure.name, departure.id, departure.cache, verdict)
}

fn about(name: &str, id: u64, journal: u64, verdict: Verdict) -> pb::Resume {
    pb::Resume { name: name.to_owned(), id, verdict: Some(verdict), journal }
}

fn back() -> Verdict {
    Verdict::Abort(pb::Abort { reason: "the tree runs on at the source".to_owned() })
}
