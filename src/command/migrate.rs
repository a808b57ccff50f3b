//! `crtool migrate`: a tree goes on on another host, and ends here only then; and what an operator does when its end is not
//! known.

use std::{
    cell::{Cell, RefCell},
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};

use super::{dump::done, explained, watchdog::Watchdog};
use crate::{
    dump::{Fate, HandOver},
    exit::Exit,
    interrupt,
    progress::{self, Shown, Surface},
    remote::{
        Failure,
        client::{self, RemoteDump},
        handover::{Heard, Source},
        journal::{self, Departure, Open, Process, Word},
        pb::{self, resume::Verdict},
    },
    settings::{MigrateRequest, MigrateSettings, NetSettings, RemoteSettings, ReportSettings},
    sys::{Errno, pid::HostPid, task},
    tracee::procfs,
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
    fn departure(&self) -> anyhow::Result<Departure> {
        let net = self.remote.direct.as_ref();
        Ok(Departure {
            id: self.store.id(),
            name: self.remote.snapshot.clone(),
            root: Process::now(self.settings.dump.pid.as_raw()).context("root of the tree")?,
            address: net.and_then(|net| net.address.clone()),
            port: net.map_or(0, |net| net.port),
            cache: self.store.journal(),
            going: false,
        })
    }

    /// Whether the tree may go on here by the word of the operator: not if the destination itself says that it runs there.
    fn thawed(&self) -> bool {
        let told =
            self.departure().map(|departure| client::take_back(self.remote, resume(&departure, back())));
        let late = matches!(told, Ok(Ok(false)));
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
        // Before the tree is stopped for good: whoever finds it stopped finds this too.
        let open = self.departure()?.write(&self.remote.work_dir).context("journal of the hand-over")?;
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
                    if told.is_none_or(|told| told.elapsed() > REMIND) {
                        told = Some(Instant::now());
                        tracing::warn!(
                            "whether the tree runs at the destination is not known: {failure}; it stays frozen here, and \
                             the destination is asked on; `crtool migrate thaw {0}` lets it go on here, `crtool migrate \
                             kill {0}` ends it",
                            journal::shown(id)
                        );
                    }
                    std::thread::sleep(ASK / 4);
                    None
                }
            };
            let heard = heard.or_else(|| match Word::heard(work_dir, id)? {
                Word::Kill => Some(Heard::Kill),
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

/// Does what an operator wants about earlier migrations of this work dir.
pub fn ask(request: &MigrateRequest, remote: &RemoteSettings) -> anyhow::Result<Exit> {
    interrupt::watch().context("hold back of signals")?;
    let work_dir = &remote.work_dir;
    match request {
        MigrateRequest::List => list(work_dir),
        MigrateRequest::Settle(only) => settle_all(*only, remote),
        MigrateRequest::Thaw(id) => decide(*id, Word::Thaw, remote),
        MigrateRequest::Kill(id) => decide(*id, Word::Kill, remote),
    }
}

fn list(work_dir: &Path) -> anyhow::Result<Exit> {
    let (all, broken) =
        Departure::all(work_dir).with_context(|| format!("work dir {}", work_dir.display()))?;
    let mut text = String::new();
    for departure in &all {
        let owner = match departure.take_over(work_dir) {
            Ok(None) => "asked by the crtool that migrates it",
            _ if !departure.root.is_there() => "not there any more",
            _ if is_stopped(departure) => "stopped; crtool migrate settle",
            _ => "runs here; crtool migrate settle",
        };
        let to = departure.address.as_deref().unwrap_or("image-proxy");
        text += &format!(
            "{}  pid {}  {}  to {to}: {owner}\n",
            journal::shown(departure.id),
            departure.root.pid,
            departure.name
        );
    }
    let _ = io::stdout().write_all(text.as_bytes());
    for error in broken {
        tracing::warn!("{error}");
    }
    Ok(Exit::Success)
}

/// Every process of the tree that is there.
fn processes(departure: &Departure) -> Vec<HostPid> {
    if departure.root.is_there() { procfs::walk(HostPid::new(departure.root.pid)) } else { Vec::new() }
}

/// Whether the whole tree is stopped.
fn is_stopped(departure: &Departure) -> bool {
    processes(departure).into_iter().all(|pid| {
        procfs::stat(pid).is_ok_and(|stat| {
            use crate::proc::stat::State;
            matches!(stat.state, State::Stopped | State::Zombie | State::Dead)
        })
    })
}

fn signal(departure: &Departure, signal: i32) -> anyhow::Result<()> {
    // Children first go on last: nobody misses what a parent does; and a parent that is killed cannot make any.
    for pid in processes(departure) {
        match task::kill(pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(anyhow!(e).context(format!("signal {signal} to task {pid}"))),
        }
    }
    Ok(())
}

fn settle_all(only: Option<u64>, remote: &RemoteSettings) -> anyhow::Result<Exit> {
    let work_dir = &remote.work_dir;
    let (all, broken) = match only {
        Some(id) => (vec![known(work_dir, id)?], Vec::new()),
        None => Departure::all(work_dir).with_context(|| format!("work dir {}", work_dir.display()))?,
    };
    let mut open: Vec<String> = broken.iter().map(ToString::to_string).collect();
    for departure in all {
        let id = journal::shown(departure.id);
        match settle(&departure, remote) {
            Ok(text) => {
                let _ = writeln!(io::stdout(), "{id}: {text}");
            }
            Err(error) => open.push(format!("{id}: {error:#}")),
        }
    }
    if open.is_empty() { Ok(Exit::Success) } else { bail!(open.join("; ")) }
}

fn known(work_dir: &Path, id: u64) -> anyhow::Result<Departure> {
    Departure::read(work_dir, id)
        .with_context(|| format!("no open migration {} in {}", journal::shown(id), work_dir.display()))
}

/// How the destination of a departure is asked: as it was reached, unless the command line says otherwise.
fn way(departure: &Departure, remote: &RemoteSettings) -> RemoteSettings {
    let mut remote = remote.clone();
    if remote.direct.is_none()
        && let Some(address) = &departure.address
    {
        let (address, port, timeout) = (Some(address.clone()), departure.port, remote.timeout);
        remote.direct = Some(NetSettings { address, port, ps_socket: None, tls: None, timeout });
    }
    remote
}

fn resume(departure: &Departure, verdict: Verdict) -> pb::Resume {
    pb::Resume {
        name: departure.name.clone(),
        id: departure.id,
        verdict: Some(verdict),
        journal: departure.cache,
    }
}

fn take_over(departure: &Departure, remote: &RemoteSettings) -> anyhow::Result<Option<Open>> {
    departure.take_over(&remote.work_dir).context("journal of the hand-over")
}

fn settle(departure: &Departure, remote: &RemoteSettings) -> anyhow::Result<&'static str> {
    let Some(open) = take_over(departure, remote)? else {
        bail!("the crtool that migrates it lives, and asks by itself");
    };
    let way = way(departure, remote);
    let ask = || {
        let asked = client::ask(&way, resume(departure, Verdict::Go(pb::Go {})), way.timeout);
        asked.context("whether it runs at the destination is not known")
    };
    if !departure.going && departure.root.is_there() {
        // Nobody was told to let it run there: what of it is stopped goes on.
        let told = client::take_back(&way, resume(departure, back()));
        return back_here(departure, open, told, "it was not handed over, and runs here");
    }
    if !departure.going {
        bail!(
            "it was not handed over, and its root, process {}, is not there any more; crtool migrate kill ends the rest",
            departure.root.pid
        );
    }
    if !departure.root.is_there() {
        // Whoever migrated it may have died when all was done but this.
        if let client::Fate::Fell(why) = ask()? {
            bail!(
                "its root, process {}, is not there any more, and it does not run at the destination: {why}; if a snapshot {} \
                   is in doubt there, image-cache release lets it be restored",
                departure.root.pid,
                departure.name
            );
        }
        open.close();
        return Ok("it runs at the destination, and is gone here");
    }
    match ask()? {
        client::Fate::Runs(_) => {
            signal(departure, libc::SIGKILL)?;
            open.close();
            Ok("it runs at the destination, and is ended here")
        }
        client::Fate::Fell(_) => {
            let told = client::take_back(&way, resume(departure, back()));
            back_here(departure, open, told, "it does not run at the destination, and goes on here")
        }
    }
}

fn back() -> Verdict {
    Verdict::Abort(pb::Abort { reason: "the tree runs on at the source".to_owned() })
}

fn back_here(
    departure: &Departure,
    open: Open,
    told: Result<bool, Failure>,
    text: &'static str,
) -> anyhow::Result<&'static str> {
    match told {
        Ok(true) => {}
        Ok(false) => bail!(
            "it runs at the destination, or is about to, and does not go on here: crtool migrate settle"
        ),
        Err(failure) => tracing::warn!(
            "the destination could not be told: {failure}; a snapshot {} there is to be dropped",
            departure.name
        ),
    }
    signal(departure, libc::SIGCONT)?;
    open.close();
    Ok(text)
}

/// The operator knows.
fn decide(id: u64, word: Word, remote: &RemoteSettings) -> anyhow::Result<Exit> {
    let departure = known(&remote.work_dir, id)?;
    let text = match take_over(&departure, remote)? {
        None => {
            word.say(&remote.work_dir, id).context("word for the crtool that migrates it")?;
            "said to the crtool that migrates it"
        }
        Some(open) if word == Word::Kill => {
            signal(&departure, libc::SIGKILL)?;
            open.close();
            "ended here"
        }
        Some(open) => {
            if !departure.root.is_there() {
                bail!(
                    "its root, process {}, is not there any more: nothing can go on here",
                    departure.root.pid
                );
            }
            let told = client::take_back(&way(&departure, remote), resume(&departure, back()));
            back_here(&departure, open, told, "goes on here")?
        }
    };
    let _ = writeln!(io::stdout(), "{}: {text}", journal::shown(id));
    Ok(Exit::Success)
}
