//! How far a command is, for whoever sits in front of it: what it does, how many bytes have moved, how fast, and how long the rest
//! takes.
//!
//! The work says what it does ([`phase`], [`add`], [`at`]), which costs next to nothing. Whether anybody sees that is the
//! command's matter ([`Shown`]): a line on the terminal at standard error, or whatever else takes a [`Look`]. Nothing is shown of what is
//! over within a second, and nothing where standard error is no terminal.
//!
//! A thread of its own draws, because a terminal may take nothing (Ctrl-S) while a tree is frozen. It holds SIGTTOU back: a crtool in the
//! background of a terminal with `stty tostop` would be stopped otherwise, and the tree with it.

use std::{
    fmt,
    io::{self, IsTerminal as _},
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{BinaryBytes, FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::{getpgrp, tcgetpgrp},
};

/// What is over sooner is not shown.
const QUIET: Duration = Duration::from_secs(1);
/// Between two looks.
const TICK: Duration = Duration::from_millis(100);
/// How long a terminal may take to be cleared: what takes nothing is left as it is.
const CLEAR: Duration = Duration::from_millis(200);

static DONE: AtomicU64 = AtomicU64::new(0);
static TOTAL: AtomicU64 = AtomicU64::new(0);
static STATE: Mutex<State> = Mutex::new(State { phase: "", since: None, wanted: false, there: false });
static CHANGED: Condvar = Condvar::new();
/// The line on the terminal, for those who write other lines there.
static LINE: Mutex<Option<ProgressBar>> = Mutex::new(None);

struct State {
    phase: &'static str,
    since: Option<Instant>,
    /// Somebody wants to see it.
    wanted: bool,
    /// The thread is there.
    there: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What begins now, and how many bytes of it there are; 0: not known.
pub(crate) fn phase(name: &'static str, total: u64) {
    let mut state = lock(&STATE);
    (state.phase, state.since) = (name, Some(Instant::now()));
    DONE.store(0, Ordering::Relaxed);
    TOTAL.store(total, Ordering::Relaxed);
}

/// So many more bytes have moved.
pub(crate) fn add(bytes: u64) {
    DONE.fetch_add(bytes, Ordering::Relaxed);
}

/// So many bytes have moved in this phase.
pub(crate) fn at(bytes: u64) {
    DONE.fetch_max(bytes, Ordering::Relaxed);
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Look {
    /// What is being done.
    pub(crate) phase: &'static str,
    /// Bytes of it that have moved.
    pub(crate) bytes: u64,
    /// Of so many, as far as that is known; an estimate.
    pub(crate) total: Option<u64>,
    /// Bytes in a second since the phase began.
    pub(crate) rate: f64,
}

impl Look {
    fn new(phase: &'static str, bytes: u64, total: u64, elapsed: Duration) -> Self {
        #[allow(clippy::cast_precision_loss)] // for people
        let rate = bytes as f64 / elapsed.as_secs_f64().max(1e-3);
        // It was an estimate.
        Self { phase, bytes, total: (total > 0).then_some(total.max(bytes)), rate }
    }

    /// Seconds until the phase is over, if it goes on like this.
    pub(crate) fn rest(&self) -> Option<f64> {
        #[allow(clippy::cast_precision_loss)]
        let left = (self.total? - self.bytes) as f64;
        (self.rate > 0.0).then(|| left / self.rate)
    }
}

impl fmt::Display for Look {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // for people
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.phase)?;
        let Some(total) = self.total else { return Ok(()) };
        let percent = self.bytes.saturating_mul(100) / total;
        write!(f, ": {} of {} ({percent} %)", BinaryBytes(self.bytes), BinaryBytes(total))?;
        write!(f, ", {}/s", BinaryBytes(self.rate as u64))?;
        match self.rest() {
            Some(rest) => write!(f, ", {} left", FormattedDuration(Duration::from_secs(rest.ceil() as u64))),
            None => Ok(()),
        }
    }
}

/// Who sees it.
#[allow(missing_debug_implementations)] // a function has none
pub(crate) enum Surface {
    /// The terminal at standard error, if there is one.
    Terminal,
    /// Something that is called about once a second.
    Lines(Box<dyn Fn(&Look) + Send>),
}

/// It is shown until this is dropped, or until [`quiet`]. There is one at a time.
#[derive(Debug)]
pub(crate) struct Shown(());

impl Shown {
    /// Shows it from now on; no more than a missing thread makes it invisible.
    pub(crate) fn begin(surface: Surface) -> Self {
        let seen = matches!(surface, Surface::Lines(_)) || io::stderr().is_terminal();
        let mut state = lock(&STATE);
        if seen && !state.there {
            let draw = move || {
                let mut background = SigSet::empty();
                background.add(Signal::SIGTTOU);
                let _ = background.thread_block();
                show(&surface);
            };
            let made = thread::Builder::new().stack_size(256 << 10).spawn(draw).is_ok();
            (state.wanted, state.there) = (made, made);
        }
        Self(())
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        quiet();
    }
}

/// Nothing is shown any more: the terminal belongs to somebody else.
pub(crate) fn quiet() {
    let mut state = lock(&STATE);
    if std::mem::take(&mut state.wanted) {
        CHANGED.notify_all();
        drop(CHANGED.wait_timeout_while(state, CLEAR, |state| state.there));
    }
}

/// Does what writes on the terminal, with the line out of the way.
pub(crate) fn aside<R>(write: impl FnOnce() -> R) -> R {
    let line = lock(&LINE).clone();
    match line {
        Some(line) => line.suspend(write),
        None => write(),
    }
}

fn show(surface: &Surface) {
    let begun = Instant::now();
    let mut told = begun;
    loop {
        let state = lock(&STATE);
        let waited = CHANGED.wait_timeout_while(state, TICK, |state| state.wanted);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !state.wanted {
            drop(state);
            if let Some(line) = lock(&LINE).take() {
                line.finish_and_clear();
            }
            state = lock(&STATE);
            state.there = false;
            CHANGED.notify_all();
            return;
        }
        let (phase, since) = (state.phase, state.since.unwrap_or(begun));
        drop(state);
        let (bytes, total) = (DONE.load(Ordering::Relaxed), TOTAL.load(Ordering::Relaxed));
        let look = Look::new(phase, bytes, total, since.elapsed());
        match surface {
            _ if begun.elapsed() < QUIET || phase.is_empty() => {}
            Surface::Terminal => draw(&look),
            Surface::Lines(line) if told.elapsed() >= QUIET => {
                told = Instant::now();
                line(&look);
            }
            Surface::Lines(_) => {}
        }
    }
}

fn draw(look: &Look) {
    // Whoever is in the background of a terminal leaves it alone.
    if tcgetpgrp(io::stderr()).is_ok_and(|group| group != getpgrp()) {
        return;
    }
    let line = lock(&LINE).get_or_insert_with(|| on(ProgressDrawTarget::stderr())).clone();
    line.set_message(look.to_string());
}

/// A line of text, cut at the width of the terminal.
fn on(target: ProgressDrawTarget) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::with_draw_target(None, target).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::*;
    use indicatif::InMemoryTerm;

    #[test]
    fn rate_and_rest() {
        let look = Look::new("memory", 100, 400, Duration::from_secs(2));
        assert_eq!((look.total, look.rest()), (Some(400), Some(6.0)));
        // More came than was thought.
        let look = Look::new("memory", 500, 400, Duration::from_secs(1));
        assert_eq!((look.total, look.rest()), (Some(500), Some(0.0)));
        let look = Look::new("freeze", 0, 0, Duration::ZERO);
        assert_eq!((look.total, look.rest()), (None, None));
    }

    #[test]
    fn what_a_terminal_shows() {
        let term = InMemoryTerm::new(5, 80);
        let line = on(ProgressDrawTarget::term_like(Box::new(term.clone())));
        line.set_message(Look::new("freezing", 0, 0, Duration::from_secs(1)).to_string());
        assert_eq!(term.contents(), "freezing");
        thread::sleep(TICK);
        line.set_message(Look::new("memory", 3 << 20, 4 << 20, Duration::from_secs(6)).to_string());
        assert_eq!(term.contents(), "memory: 3.00 MiB of 4.00 MiB (75 %), 512.00 KiB/s, 00:00:02 left");
        line.finish_and_clear();
        assert_eq!(term.contents(), "");
    }

    #[test]
    fn lines_after_a_second_and_none_after_the_end() {
        let (lines, all) = std::sync::mpsc::channel();
        let shown = Shown::begin(Surface::Lines(Box::new(move |look| {
            let _ = lines.send(*look);
        })));
        phase("memory", 10);
        add(4);
        at(3);
        let look = all.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!((look.phase, look.bytes, look.total), ("memory", 4, Some(10)));
        drop(shown);
        // The thread is gone, and its end of the channel.
        assert!(all.iter().count() < 10);
    }
}
