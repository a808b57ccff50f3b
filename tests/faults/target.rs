//! The target: every thread does one thing that a careless dump disturbs, and checks it.
//!
//! Each thread counts its rounds in a line of the file `progress`; the first one that finds something wrong writes it to
//! the file `wrong`. SIGTERM ends the tree: exit status 0 if nothing was wrong.

use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};

use crate::sys;

/// Which target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Six threads and a child, all at work.
    Busy,
    /// As `Busy`, and children that nothing ends but this target.
    Family,
    /// As `Busy`, and a child that sits in a vfork and cannot be frozen.
    Stuck,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Busy => "busy",
            Kind::Family => "family",
            Kind::Stuck => "stuck",
        }
    }
}

/// Threads that count.
pub const COUNTERS: usize = 6;
/// Children of a family that nothing ends.
pub const IDLE: usize = 3;
/// Bytes of a counter's line.
pub const LINE: usize = 24;

static COUNTS: [AtomicU64; COUNTERS] = [const { AtomicU64::new(0) }; COUNTERS];
static WRONG: AtomicBool = AtomicBool::new(false);

pub fn main(kind: &str) -> ExitCode {
    match kind {
        "echo" => echo(),
        "idle" => loop {
            thread::park();
        },
        "vfork" => sys::stuck(),
        _ => return busy(kind),
    }
    ExitCode::SUCCESS
}

fn busy(kind: &str) -> ExitCode {
    sys::close_inherited();
    nix::unistd::setsid().expect("new session");
    let dir = env::var_os("FAULTS_DIR").expect("FAULTS_DIR");
    let dir = Path::new(&dir);
    sys::count_signal(libc::SIGUSR1, true);
    // Without SA_RESTART: what it interrupts comes back with EINTR.
    sys::count_signal(libc::SIGALRM, false);
    // SIGTERM is the main thread's, by sigwait; SIGALRM comes to the thread that sleeps.
    let term: SigSet = [Signal::SIGTERM].into_iter().collect();
    let alarm: SigSet = [Signal::SIGALRM].into_iter().collect();
    term.thread_block().expect("block SIGTERM");
    alarm.thread_block().expect("block SIGALRM");

    let own = env::current_exe().expect("own path");
    let mut command = Command::new(&own);
    command.env("FAULTS_TARGET", "echo").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    #[allow(clippy::zombie_processes)] // it ends when its input does, with this process
    let mut child = command.spawn().expect("start the echo");
    let (to, from) = (child.stdin.take().expect("pipe"), child.stdout.take().expect("pipe"));
    if kind == "stuck" {
        let mut command = Command::new(&own);
        command.env("FAULTS_TARGET", "vfork").stdin(Stdio::null()).stdout(Stdio::null());
        #[allow(clippy::zombie_processes)] // the trial kills it
        let stuck = command.spawn().expect("start the vfork").id();
        // With the child there, its parent is where no tracer can stop it.
        let children = format!("/proc/{stuck}/task/{stuck}/children");
        while fs::read(&children).expect("children of the vfork").is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
    }
    let progress = File::create(dir.join("progress")).expect("make progress");
    let spawn = |number: usize, mut round: Box<dyn FnMut(u64) -> Result<(), String> + Send>| {
        let wrong = dir.join("wrong");
        let progress = progress.try_clone().expect("dup");
        let body = move || {
            for n in 0.. {
                if let Err(text) = round(n) {
                    WRONG.store(true, Ordering::SeqCst);
                    fs::write(&wrong, format!("thread {number}, round {n}: {text}\n"))
                        .expect("say what is wrong");
                    return;
                }
                COUNTS[number].store(n, Ordering::SeqCst);
                let line = format!("{n:>width$}\n", width = LINE - 1);
                progress.write_all_at(line.as_bytes(), (number * LINE) as u64).expect("say how far");
            }
        };
        thread::Builder::new().stack_size(256 << 10).spawn(body).expect("start a thread");
    };
    spawn(0, Box::new(integers));
    spawn(1, Box::new(floats));
    spawn(2, Box::new(pipe_with_child(to, from)));
    spawn(3, Box::new(signals));
    spawn(4, Box::new(sleeps(alarm)));
    spawn(5, Box::new(memory()));
    let mut idle = Vec::new();
    if kind == "family" {
        for _ in 0..IDLE {
            let mut command = Command::new(&own);
            command.env("FAULTS_TARGET", "idle").stdin(Stdio::null()).stdout(Stdio::null());
            idle.push(command.spawn().expect("start an idle child"));
        }
    }
    sys::tick(7000);
    term.wait().expect("wait for SIGTERM");
    for mut child in idle {
        child.kill().and_then(|()| child.wait()).expect("end an idle child");
    }
    if WRONG.load(Ordering::SeqCst) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Gives every eight bytes back until there are no more.
fn echo() {
    let mut word = [0; 8];
    while io::stdin().read_exact(&mut word).is_ok() {
        io::stdout().write_all(&word).and_then(|()| io::stdout().flush()).expect("echo");
    }
}

/// General registers: a computation with a known end.
fn integers(_: u64) -> Result<(), String> {
    let mut lanes = [1u64, 2, 3, 5, 7, 11, 13, 17];
    for _ in 0..20_000 {
        for (number, lane) in lanes.iter_mut().enumerate() {
            *lane = lane.wrapping_mul(6_364_136_223_846_793_005).rotate_left(17) ^ number as u64;
        }
    }
    let sum = lanes.iter().fold(0u64, |sum, lane| sum.wrapping_mul(31).wrapping_add(*lane));
    static RIGHT: AtomicU64 = AtomicU64::new(0);
    agree(&RIGHT, sum)
}

/// Vector registers: as above, with numbers that are summed side by side.
fn floats(_: u64) -> Result<(), String> {
    let mut lanes = [1.0f64, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75];
    for _ in 0..20_000 {
        for lane in &mut lanes {
            *lane = (*lane * 1.000_000_1 + 0.125).sqrt() + 0.75;
        }
    }
    let sum = lanes.iter().fold(0u64, |sum, lane| sum.rotate_left(7) ^ lane.to_bits());
    static RIGHT: AtomicU64 = AtomicU64::new(0);
    agree(&RIGHT, sum)
}

/// The first round says what is right.
fn agree(right: &AtomicU64, sum: u64) -> Result<(), String> {
    match right.compare_exchange(0, sum, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => Ok(()),
        Err(before) if before == sum => Ok(()),
        Err(before) => Err(format!("computed {sum:#x} after {before:#x}")),
    }
}

/// System calls that block, on both ends of two pipes.
fn pipe_with_child(
    mut to: impl Write + Send,
    mut from: impl Read + Send,
) -> impl FnMut(u64) -> Result<(), String> {
    // Whoever kills the tree kills one process after the other: this one may see that the child is dead.
    let unless_killed = |what: &str, error: io::Error| {
        thread::sleep(Duration::from_millis(300));
        format!("{what}: {error}")
    };
    move |round| {
        to.write_all(&round.to_le_bytes()).map_err(|e| unless_killed("write", e))?;
        let mut word = [0; 8];
        from.read_exact(&mut word).map_err(|e| unless_killed("read", e))?;
        let got = u64::from_le_bytes(word);
        if got == round { Ok(()) } else { Err(format!("sent {round}, got {got}")) }
    }
}

/// Signals to itself, each of which must have been handled when the call is over; none twice.
fn signals(_: u64) -> Result<(), String> {
    let before = sys::HANDLED.load(Ordering::SeqCst);
    sys::raise(libc::SIGUSR1);
    thread::sleep(Duration::from_micros(300));
    let times = sys::HANDLED.load(Ordering::SeqCst) - before;
    if times == 1 { Ok(()) } else { Err(format!("a signal was handled {times} times")) }
}

/// Sleeps that are not shorter than asked for, though a timer interrupts them.
fn sleeps(alarm: SigSet) -> impl FnMut(u64) -> Result<(), String> {
    let (mut last_alarm, mut seen) = (0, 0);
    move |round| {
        if round == 0 {
            alarm.thread_unblock().map_err(|e| format!("unblock: {e}"))?;
        }
        let begin = Instant::now();
        thread::sleep(Duration::from_millis(3));
        if begin.elapsed() < Duration::from_millis(3) {
            return Err(format!("slept {:?} instead of 3 ms", begin.elapsed()));
        }
        let ticks = sys::TICKS.load(Ordering::SeqCst);
        if ticks != seen {
            (seen, last_alarm) = (ticks, round);
        }
        // In rounds, for the time runs on while the tree is dead.
        if round - last_alarm > 2000 {
            return Err("the timer does not tick any more".into());
        }
        Ok(())
    }
}

/// Memory that changes all the time, and whose sum does not.
fn memory() -> impl FnMut(u64) -> Result<(), String> {
    let mut words: Vec<u64> = (0..(2 << 20) / 8).collect();
    let right: u64 = words.iter().sum();
    move |round| {
        let half = words.len() / 2;
        let by = usize::try_from(round % 997).unwrap_or(0);
        words.swap(by, half + by);
        words[by] = words[by].wrapping_add(round);
        words[half + by] = words[half + by].wrapping_sub(round);
        if round % 64 != 0 {
            return Ok(());
        }
        let sum = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
        if sum == right { Ok(()) } else { Err(format!("the sum is {sum} instead of {right}")) }
    }
}
