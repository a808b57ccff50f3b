//! CLOCK_MONOTONIC and CLOCK_BOOTTIME go on where the tree was frozen, and everything that waits for a time of theirs
//! follows, whatever the clocks of the host are.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::case::{Case, Clocks, Site};
use crate::gate::{Gate, fork, join, until_in_call};
use crate::sys::{self, Errno, clock, getpid, int};

const DAY: i64 = 24 * 60 * 60;
/// Far from each other, from most hosts, and from zero.
const AHEAD: Clocks = Clocks { monotonic: 400 * DAY, boottime: 777 * DAY };
const YOUNG: Clocks = Clocks { monotonic: 100, boottime: 150 };

/// A row for a source like its host, one whose clocks are days ahead, one days behind.
macro_rules! three {
    ($name:literal, $target:expr $(, $more:ident($arg:expr))*) => {{
        const PLAIN: Case = Case::new($name, $target)$(.$more($arg))*;
        const FAR: Case = Case { name: concat!($name, "_ahead"), ..PLAIN }.source_clocks(AHEAD);
        const NEAR: Case = Case { name: concat!($name, "_behind"), ..PLAIN };
        [PLAIN, FAR, NEAR.source_clocks(YOUNG).host_clocks(AHEAD)]
    }};
}

const GO_ON: [Case; 3] = three!("clocks_go_on", clocks_go_on, between(pause));
const SLEEPS: [Case; 3] = three!("clocks_sleeps", clocks_sleeps, between(pause));
const TIMERS: [Case; 3] = three!("clocks_timers", clocks_timers, between(pause));
const TIMEOUTS: [Case; 3] = three!("clocks_timeouts", clocks_timeouts, between(pause), peer_fails(EINTR));
const FORKS: [Case; 3] = three!("clocks_of_all_tasks", clocks_of_all_tasks, between(pause));

/// What CRIU makes of calls with a timeout.
const EINTR: &str = "ends calls with a timeout with EINTR";

pub const CASES: &[Case] = &[
    TIMEOUTS[0],
    TIMEOUTS[1].only_plain(),
    TIMEOUTS[2].only_plain(),
    Case::new("clocks_timeouts_stopped", clocks_timeouts_stopped)
        .between(pause)
        .peer_fails(EINTR)
        .only_plain(),
    Case::new("clocks_timeouts_not_told", clocks_timeouts_end).dump_denied(libc::SYS_bpf).only_plain(),
    Case::new("clocks_timeouts_no_types", clocks_timeouts_no_types).only_plain(),
    Case::new("clocks_timeouts_ended", clocks_timeouts_ended).peer_fails(EINTR),
    Case::new("clocks_timeout_interrupted", clocks_timeout_interrupted).peer_fails(EINTR),
    GO_ON[0],
    GO_ON[1].disturbed().fifty(),
    GO_ON[2].disturbed(),
    SLEEPS[0],
    SLEEPS[1],
    SLEEPS[2],
    TIMERS[0],
    TIMERS[1],
    TIMERS[2],
    FORKS[0],
    FORKS[1],
    FORKS[2],
    Case::new("clocks_read_always", clocks_read_always)
        .source_clocks(YOUNG)
        .host_clocks(AHEAD)
        .disturbed()
        .peer_fails("its threads go on in the middle of a reading"),
    Case::new("clocks_shared_memory", clocks_shared_memory)
        .between(pause)
        .source_clocks(AHEAD)
        .peer_fails("tasks that share memory"),
    Case::new("clocks_several", clocks_several)
        .refused("time namespace: it is another one than that of task"),
    Case::new("clocks_prepared", clocks_prepared)
        .refused("time namespace: another one is prepared for its children"),
    Case::new("clocks_prepared_by_thread", clocks_prepared_by_thread)
        .refused("thread|time namespace: another one is prepared for its children"),
];

/// How long the tree is not there, at least.
const GONE: Duration = Duration::from_millis(1500);

/// Between dump and restore; the mark tells the target.
fn pause(site: &Site<'_>) {
    std::thread::sleep(GONE);
    let control = site.dir.parent().expect("directory of the case").join("ctl");
    let _ = std::fs::create_dir(control.join("paused"));
}

fn monotonic() -> Duration {
    clock(libc::CLOCK_MONOTONIC)
}

fn boottime() -> Duration {
    clock(libc::CLOCK_BOOTTIME)
}

/// Neither clock ever goes back, neither counts the time in which the tree was not there, and they keep their distance.
fn clocks_go_on(gate: &Gate) {
    let all = || {
        let ids =
            [libc::CLOCK_MONOTONIC, libc::CLOCK_MONOTONIC_RAW, libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME];
        ids.map(clock)
    };
    // The closest readings: on a busy machine a thread may lose its processor between two clocks.
    let apart = || {
        let reading = || {
            let (first, boottime, last) = (monotonic(), boottime(), monotonic());
            (last - first, boottime.abs_diff(last))
        };
        (0..50).map(|_| reading()).min().expect("readings").1
    };
    let was = apart();
    let control = gate.clone_for_thread();
    let watcher = std::thread::spawn(move || {
        let mut last = all();
        let mut skipped = [Duration::ZERO; 4];
        while !control.open() {
            sys::nap(Duration::from_millis(1));
            let now = all();
            for ((skipped, last), now) in skipped.iter_mut().zip(last).zip(now) {
                let step =
                    now.checked_sub(last).unwrap_or_else(|| panic!("a clock went from {last:?} to {now:?}"));
                *skipped = step.max(*skipped);
            }
            last = now;
        }
        skipped
    });
    gate.ready();
    let skipped = watcher.join().expect("watcher");
    if gate.has_mark("paused") {
        let [.., world] = skipped;
        assert!(world >= GONE, "it was not away: {world:?}");
        for (clock, skipped) in skipped.iter().take(3).enumerate() {
            let most = world - GONE + Duration::from_millis(20);
            assert!(
                *skipped <= most,
                "clock {clock} went on by {skipped:?} while the world did by {world:?}"
            );
        }
    }
    let is = apart();
    assert!(
        // The peer reads them one after the other, and may lose its processor between them.
        was.abs_diff(is) < Duration::from_millis(100),
        "the clocks were {was:?} apart, now they are {is:?}"
    );
    // Ticks since boot, of this boot.
    let start: u64 = sys::stat_field(getpid(), 22).parse().expect("start time");
    assert!(u128::from(start) * 10 <= boottime().as_millis(), "a start time in the future: {start}");
    let uptime = std::fs::read_to_string("/proc/uptime").expect("uptime");
    let uptime: f64 = uptime.split(' ').next().and_then(|t| t.parse().ok()).expect("uptime");
    assert!((uptime - boottime().as_secs_f64()).abs() < 1.0, "{uptime} {:?}", boottime());
}

/// Threads that do nothing but read clocks are mostly frozen in the code of the kernel's vDSO, some of them between the
/// reading of the clock and of what the namespace adds to it.
fn clocks_read_always(gate: &Gate) {
    const THREADS: usize = 12;
    let ready = Arc::new(std::sync::Barrier::new(THREADS + 1));
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (control, ready) = (gate.clone_for_thread(), Arc::clone(&ready));
            std::thread::spawn(move || {
                ready.wait();
                let mut last = [monotonic(), boottime()];
                while !control.open() {
                    for _ in 0..1000 {
                        let now = [monotonic(), boottime()];
                        for (last, now) in last.into_iter().zip(now) {
                            let step = now.checked_sub(last);
                            assert!(
                                step.is_some_and(|step| step < Duration::from_secs(300)),
                                "a clock went from {last:?} to {now:?}"
                            );
                        }
                        last = now;
                    }
                }
            })
        })
        .collect();
    ready.wait();
    gate.ready();
    for thread in threads {
        thread.join().expect("thread");
    }
}

/// How long each wait of [`clocks_sleeps`] lasts.
const ASKED: Duration = Duration::from_millis(1200);

/// Threads that sleep, or wait with a timeout, for what never comes, in the ways that languages do: none returns too
/// early, and none sleeps much longer.
fn clocks_sleeps(gate: &Gate) {
    let absolute = |id: i32| {
        let until = sys::timespec(clock(id) + ASKED);
        let slept = sys!(SYS_clock_nanosleep, id, libc::TIMER_ABSTIME, &raw const until, 0);
        assert_eq!(slept, Ok(0), "clock_nanosleep to a time of clock {id}");
    };
    let futex = |op: i32, id: i32| {
        let word = 0_u32;
        let until = sys::timespec(clock(id) + ASKED);
        let got = sys!(SYS_futex, &raw const word, op, 0, &raw const until, 0, u32::MAX);
        assert_eq!(got, Err(libc::ETIMEDOUT), "futex to a time of clock {id}");
    };
    let condition = || {
        let pair = (Mutex::new(false), Condvar::new());
        let guard = pair.0.lock().expect("lock");
        let (_guard, result) = pair.1.wait_timeout_while(guard, ASKED, |done| !*done).expect("wait");
        assert!(result.timed_out());
    };
    type Wait = Box<dyn FnOnce() + Send>;
    let waits: Vec<(&str, Wait)> = vec![
        ("sleep of a thread", Box::new(|| std::thread::sleep(ASKED))),
        ("clock_nanosleep CLOCK_MONOTONIC", Box::new(move || absolute(libc::CLOCK_MONOTONIC))),
        ("clock_nanosleep CLOCK_BOOTTIME", Box::new(move || absolute(libc::CLOCK_BOOTTIME))),
        ("condition variable", Box::new(condition)),
        (
            "park",
            Box::new(|| {
                let until = Instant::now() + ASKED;
                while Instant::now() < until {
                    std::thread::park_timeout(until - Instant::now());
                }
            }),
        ),
        ("futex", Box::new(move || futex(libc::FUTEX_WAIT_BITSET, libc::CLOCK_MONOTONIC))),
        (
            "receive with a timeout",
            Box::new(|| {
                let (_send, receive) = std::sync::mpsc::channel::<()>();
                assert!(receive.recv_timeout(ASKED).is_err());
            }),
        ),
    ];
    let (ready, gone) = (Arc::new(std::sync::Barrier::new(waits.len() + 1)), gate.address());
    let threads: Vec<_> = waits
        .into_iter()
        .map(|(name, wait)| {
            let ready = Arc::clone(&ready);
            let thread = std::thread::spawn(move || {
                ready.wait();
                let start = monotonic();
                wait();
                let took = monotonic() - start;
                Gate::at(gone).wait();
                took
            });
            (name, thread)
        })
        .collect();
    ready.wait();
    sys::nap(Duration::from_millis(30));
    gate.ready();
    for (name, thread) in threads {
        let took = thread.join().unwrap_or_else(|_| panic!("{name} failed"));
        assert!(took >= ASKED, "{name} took only {took:?}");
        assert!(took < ASKED + LATE, "{name} took {took:?}");
    }
}

/// On a busy machine something may be so late.
const LATE: Duration = Duration::from_secs(15);

/// Without them crtool cannot see how long a call is still to wait.
fn need_types_of_the_kernel(gate: &Gate) {
    const PROG_LOAD: i32 = 5;
    if !sys::exists(c"/sys/kernel/btf/vmlinux") {
        gate.skip("the kernel does not tell its types (BTF)");
    }
    if let Err(libc::EPERM | libc::ENOSYS) = sys!(SYS_bpf, PROG_LOAD, 0, 0) {
        gate.skip("BPF programs are not permitted");
    }
}

/// Runs each of `calls` in a thread of its own, and gives what they return and how long they took when the gate is open.
fn in_threads<T: Send + 'static>(
    gate: &Gate,
    calls: Vec<(i64, Box<dyn FnOnce() -> T + Send>)>,
    stopped: bool,
    release: impl FnOnce(&[i32]),
) -> Vec<(T, Duration)> {
    let address = gate.address();
    let (send, receive) = std::sync::mpsc::channel();
    let mut tids = Vec::new();
    let mut threads = Vec::new();
    for (number, call) in calls {
        let send = send.clone();
        threads.push(std::thread::spawn(move || {
            send.send(sys::gettid()).expect("send");
            let start = monotonic();
            let result = call();
            let took = monotonic() - start;
            Gate::at(address).wait();
            (result, took)
        }));
        let tid = receive.recv().expect("tid");
        until_in_call(getpid(), tid, number);
        tids.push(tid);
    }
    if stopped {
        join(fork(|| tids.iter().for_each(|tid| stop_once(*tid))));
    }
    gate.ready();
    release(&tids);
    threads.into_iter().map(|thread| thread.join().expect("thread")).collect()
}

/// Stops a thread and lets it go on, as debuggers and shells do. A call that keeps its time is then another one,
/// restart_syscall.
fn stop_once(tid: i32) {
    let request = |request: u32| sys!(SYS_ptrace, request, tid, 0, 0).map(drop).expect("ptrace");
    request(libc::PTRACE_SEIZE);
    request(libc::PTRACE_INTERRUPT);
    sys::waitpid(tid, libc::__WALL).expect("stop");
    request(libc::PTRACE_DETACH);
    until_in_call(int(sys!(SYS_getppid).expect("getppid")), tid, libc::SYS_restart_syscall);
}

/// A call by its name, number, what it returns when its time is over.
type Timed = (&'static str, i64, Result<usize, Errno>, Box<dyn FnOnce() -> Result<usize, Errno> + Send>);

/// Every call that waits for a while and is interrupted by any stop.
fn timed_calls(asked: Duration) -> Vec<Timed> {
    let spec = sys::timespec(asked);
    let sleep = move |id: i32| sys!(SYS_clock_nanosleep, id, 0, &raw const spec, 0);
    let number = libc::SYS_clock_nanosleep;
    vec![
        ("nanosleep", libc::SYS_nanosleep, Ok(0), Box::new(move || sys!(SYS_nanosleep, &raw const spec, 0))),
        ("clock_nanosleep CLOCK_MONOTONIC", number, Ok(0), Box::new(move || sleep(libc::CLOCK_MONOTONIC))),
        ("clock_nanosleep CLOCK_BOOTTIME", number, Ok(0), Box::new(move || sleep(libc::CLOCK_BOOTTIME))),
        ("clock_nanosleep CLOCK_REALTIME", number, Ok(0), Box::new(move || sleep(libc::CLOCK_REALTIME))),
        (
            "nanosleep that tells the rest",
            libc::SYS_nanosleep,
            Ok(0),
            Box::new(move || {
                let mut rest = sys::timespec(Duration::ZERO);
                sys!(SYS_nanosleep, &raw const spec, &raw mut rest)
            }),
        ),
        (
            "poll",
            libc::SYS_poll,
            Ok(0),
            Box::new(move || {
                let mut none = libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 };
                sys!(SYS_poll, &raw mut none, 1, asked.as_millis())
            }),
        ),
        (
            "futex",
            libc::SYS_futex,
            Err(libc::ETIMEDOUT),
            Box::new(move || {
                let word = 0_u32;
                sys!(SYS_futex, &raw const word, libc::FUTEX_WAIT, 0, &raw const spec)
            }),
        ),
    ]
}

/// Calls with a timeout go on with what was left of it: none ends with EINTR, none too early.
fn clocks_timeouts(gate: &Gate) {
    time_out(gate, false, LONG, timed_calls(LONG), |_| ());
}

/// Calls that have been interrupted and gone on before: how long they wait, for what, and even which calls they are, is kept
/// by the kernel alone.
fn clocks_timeouts_stopped(gate: &Gate) {
    let longer = 2 * LONG;
    let mut calls = timed_calls(longer);
    let (from, to) = sys::pipe(0);
    let until = sys::timespec(monotonic() + longer);
    calls.extend::<[Timed; 2]>([
        (
            "poll without a timeout",
            libc::SYS_poll,
            Ok(1),
            Box::new(move || {
                let mut item = libc::pollfd { fd: from, events: libc::POLLIN, revents: 0 };
                sys!(SYS_poll, &raw mut item, 1, -1_i32)
            }),
        ),
        (
            "futex until a time",
            libc::SYS_futex,
            Err(libc::ETIMEDOUT),
            Box::new(move || {
                let word = 0_u32;
                sys!(SYS_futex, &raw const word, libc::FUTEX_WAIT_BITSET, 0, &raw const until, 0, 5)
            }),
        ),
    ]);
    // The one until a time begins after that was set.
    time_out(gate, true, longer - Duration::from_secs(1), calls, |_| {
        while monotonic() < Duration::new(until.tv_sec as u64, until.tv_nsec as u32) {
            sys::nap(Duration::from_millis(10));
        }
        sys::write(to, b"x").expect("write");
    });
}

/// Where crtool may not ask the kernel how long a call is still to wait, a dump succeeds all the same, and the call ends.
fn clocks_timeouts_end(gate: &Gate) {
    let (names, calls): (Vec<_>, Vec<_>) =
        timed_calls(LATE).into_iter().map(|(name, number, _, call)| (name, (number, call))).unzip();
    for (name, (result, took)) in names.into_iter().zip(in_threads(gate, calls, false, |_| ())) {
        assert_eq!(result, Err(libc::EINTR), "{name} after {took:?}");
    }
}

/// Likewise where the kernel does not tell its types: as here, where their place is covered.
fn clocks_timeouts_no_types(gate: &Gate) {
    let place = c"/sys/kernel/btf";
    let covered = sys::exists(place);
    if covered {
        let tmpfs = c"tmpfs".as_ptr();
        sys!(SYS_mount, tmpfs, place.as_ptr(), tmpfs, 0, 0).expect("mount");
    }
    clocks_timeouts_end(gate);
    if covered {
        sys!(SYS_umount2, place.as_ptr(), 0).expect("umount");
    }
}

/// So that all are in their calls for long enough.
const LONG: Duration = Duration::from_secs(2);

fn time_out(gate: &Gate, stopped: bool, asked: Duration, calls: Vec<Timed>, release: impl FnOnce(&[i32])) {
    need_types_of_the_kernel(gate);
    let (whats, calls): (Vec<_>, Vec<_>) =
        calls.into_iter().map(|(name, number, ends, call)| ((name, ends), (number, call))).unzip();
    for ((name, ends), (result, took)) in whats.into_iter().zip(in_threads(gate, calls, stopped, release)) {
        assert_eq!(result, ends, "{name}");
        assert!(took >= asked, "{name} took only {took:?}");
        assert!(took < asked + LATE, "{name} took {took:?}");
    }
}

/// What such calls wait for comes in time.
fn clocks_timeouts_ended(gate: &Gate) {
    need_types_of_the_kernel(gate);
    let (from, to) = sys::pipe(0);
    let word = sys::anon(4096);
    let at = word.at(0);
    let poll = move || {
        let mut item = libc::pollfd { fd: from, events: libc::POLLIN, revents: 0 };
        sys!(SYS_poll, &raw mut item, 1, 600_000).map(|got| got + item.revents.cast_unsigned() as usize * 100)
    };
    let limit = sys::timespec(Duration::from_secs(600));
    let futex = move || sys!(SYS_futex, at, libc::FUTEX_WAIT, 0, &raw const limit);
    type Call = Box<dyn FnOnce() -> Result<usize, Errno> + Send>;
    let calls: Vec<(i64, Call)> = vec![(libc::SYS_poll, Box::new(poll)), (libc::SYS_futex, Box::new(futex))];
    let ended = in_threads(gate, calls, false, |_| {
        sys::write(to, b"x").expect("write");
        while sys!(SYS_futex, at, libc::FUTEX_WAKE, 1) != Ok(1) {
            sys::nap(Duration::from_millis(1));
        }
    });
    let results: Vec<_> = ended.into_iter().map(|(result, _)| result).collect();
    assert_eq!(results, [Ok(1 + 100 * libc::POLLIN as usize), Ok(0)]);
}

/// A handler ends such a call with EINTR, and the program is told what was left.
fn clocks_timeout_interrupted(gate: &Gate) {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    need_types_of_the_kernel(gate);
    sys::handle(libc::SIGUSR1, nothing, libc::SA_RESTART);
    let sleep = move || {
        let (asked, mut rest) = (sys::timespec(Duration::from_secs(600)), sys::timespec(Duration::ZERO));
        let result = sys!(SYS_nanosleep, &raw const asked, &raw mut rest);
        (result, Duration::from_secs(rest.tv_sec.cast_unsigned()))
    };
    type Call = Box<dyn FnOnce() -> (Result<usize, Errno>, Duration) + Send>;
    let calls: Vec<(i64, Call)> = vec![(libc::SYS_nanosleep, Box::new(sleep))];
    let ended = in_threads(gate, calls, false, |tids| {
        // In the call again, as restart_syscall.
        until_in_call(getpid(), tids[0], libc::SYS_restart_syscall);
        sys::tgkill(getpid(), tids[0], libc::SIGUSR1);
    });
    let ((result, rest), took) = ended[0];
    assert_eq!(result, Err(libc::EINTR));
    let sum = rest + took;
    let asked = Duration::from_secs(600);
    assert!(sum < asked + LATE && sum + Duration::from_secs(2) > asked, "{took:?} and {rest:?}");
}

/// Timers to a time, and after a while, expire in time, and not before.
fn clocks_timers(gate: &Gate) {
    let signal = 41;
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[signal]));
    let left = Duration::from_millis(1400);
    let mut waits = Vec::new();
    for id in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME] {
        for (flags, what) in [(0, "after a while"), (libc::TIMER_ABSTIME, "to a time")] {
            let event = [0, signal as u64, 0, 0, 0, 0, 0, 0];
            let mut timer = -1_i32;
            sys!(SYS_timer_create, id, event.as_ptr(), &raw mut timer).expect("timer_create");
            let fd = int(sys!(SYS_timerfd_create, id, libc::TFD_CLOEXEC).expect("timerfd_create"));
            let deadline = clock(id) + left;
            let value = if flags == 0 { left } else { deadline };
            let spec = [sys::timespec(Duration::ZERO), sys::timespec(value)];
            sys!(SYS_timer_settime, timer, flags, spec.as_ptr(), 0).expect("timer_settime");
            sys!(SYS_timerfd_settime, fd, flags, spec.as_ptr(), 0).expect("timerfd_settime");
            waits.push((format!("timer of clock {id} {what}"), id, deadline, Some(timer), None));
            waits.push((format!("timerfd of clock {id} {what}"), id, deadline, None, Some(fd)));
        }
    }
    gate.ready();
    for (what, id, deadline, timer, fd) in waits {
        if let Some(fd) = fd {
            assert_eq!(sys::read(fd, 8), Ok(1_u64.to_ne_bytes().to_vec()), "{what}");
        }
        let now = loop {
            let mut spec = [sys::timespec(Duration::ZERO); 2];
            match timer {
                Some(timer) => sys!(SYS_timer_gettime, timer, spec.as_mut_ptr()).expect("timer_gettime"),
                None => 0,
            };
            if (spec[1].tv_sec, spec[1].tv_nsec) == (0, 0) {
                break clock(id);
            }
            sys::nap(Duration::from_millis(1));
        };
        assert!(now >= deadline, "{what}: it expired {:?} too early", deadline - now);
        assert!(now < deadline + LATE, "{what}: it expired {:?} too late", now - deadline);
    }
}

/// Children, and theirs, read the same clocks.
fn clocks_of_all_tasks(gate: &Gate) {
    let start = [monotonic(), boottime()];
    let root = getpid();
    let check = move || {
        for (start, now) in start.into_iter().zip([monotonic(), boottime()]) {
            let gone = now.checked_sub(start).expect("a clock went back");
            assert!(gone < Duration::from_secs(300), "{gone:?} since the start");
        }
        let namespaces = ["time", "time_for_children"]
            .map(|name| std::fs::read_link(format!("/proc/self/ns/{name}")).ok());
        assert_eq!(namespaces[0], namespaces[1]);
        let root = std::fs::read_link(format!("/proc/{root}/ns/time")).ok();
        assert_eq!(namespaces[0], root, "time namespace of the root");
    };
    let child = fork(|| {
        let grandchild = fork(|| {
            sys::setsid();
            gate.mark("grandchild");
            gate.wait();
            check();
        });
        gate.wait();
        check();
        join(grandchild);
    });
    gate.await_mark("grandchild");
    gate.ready();
    check();
    join(child);
    // Whoever is made now is there too.
    join(fork(check));
}

/// A child with the memory of its parent cannot enter a time namespace by itself.
fn clocks_shared_memory(gate: &Gate) {
    fn child(arg: usize) -> i32 {
        let (gate, start): &(usize, Duration) = sys::borrow(arg);
        let gate = Gate::at(*gate);
        gate.mark("child");
        gate.wait();
        let gone = monotonic().saturating_sub(*start);
        i32::from(gone.is_zero() || gone > Duration::from_secs(300))
    }
    let pair = (gate.address(), monotonic());
    let pid = sys::clone_child(libc::CLONE_VM | libc::SIGCHLD, child, (&raw const pair).expose_provenance());
    gate.await_mark("child");
    gate.ready();
    assert_eq!(sys::waitpid(pid, 0), Ok((pid, 0)));
}

const CLONE_NEWTIME: i32 = 0x80;

fn unshare_time(gate: &Gate) {
    if sys!(SYS_unshare, CLONE_NEWTIME).is_err() {
        gate.skip("the kernel has no time namespaces");
    }
}

/// A child in a time namespace of its own.
fn clocks_several(gate: &Gate) {
    let child = fork(|| {
        unshare_time(gate);
        let next = sys::open(c"/proc/self/ns/time_for_children", libc::O_RDONLY).expect("open");
        sys!(SYS_setns, next, CLONE_NEWTIME).expect("setns");
        sys::close(next);
        gate.mark("child");
        gate.wait();
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}

fn clocks_prepared(gate: &Gate) {
    unshare_time(gate);
    gate.ready();
}

fn clocks_prepared_by_thread(gate: &Gate) {
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        unshare_time(&control);
        control.mark("thread");
        control.wait();
    });
    gate.await_mark("thread");
    gate.ready();
    thread.join().expect("thread");
}
