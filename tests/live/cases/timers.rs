//! Interval timers and POSIX timers: time left, interval, overruns, whom they tell.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::case::Case;
use crate::gate::{Gate, PATIENCE};
use crate::sys::{self, Errno, gettid};

pub const CASES: &[Case] = &[
    Case::new("itimer_real", itimer_real),
    Case::new("itimer_virtual", itimer_virtual),
    Case::new("itimer_prof", itimer_prof),
    Case::new("itimer_ticks", itimer_ticks).may_differ(&["ShdPnd", "SigBlk"]),
    Case::new("itimer_one_shot", itimer_one_shot),
    Case::new("timer_ids_with_gaps", timer_ids_with_gaps).disturbed().fifty(),
    Case::new("timer_clocks", timer_clocks),
    Case::new("timer_signal_value", timer_signal_value),
    Case::new("timer_of_thread", timer_of_thread),
    Case::new("timer_none", timer_none),
    Case::new("timer_overrun", timer_overrun),
    Case::new("timer_disarmed", timer_disarmed),
    Case::new("timer_process_cputime", timer_process_cputime),
    Case::new("timer_default_event", timer_default_event),
];

fn set_itimer(which: i32, value: Duration, interval: Duration) {
    let timeval = |d: Duration| [d.as_secs(), u64::from(d.subsec_micros())];
    let spec = [timeval(interval), timeval(value)];
    sys!(SYS_setitimer, which, spec.as_ptr(), 0).expect("setitimer");
}

/// Time left and interval.
fn itimer(which: i32) -> (Duration, Duration) {
    let mut spec = [[0_u64; 2]; 2];
    sys!(SYS_getitimer, which, spec.as_mut_ptr()).expect("getitimer");
    let [interval, value] = spec.map(|[s, us]| Duration::from_secs(s) + Duration::from_micros(us));
    (value, interval)
}

fn itimer_keeps(gate: &Gate, which: i32) {
    let interval = Duration::from_micros(12_345_678);
    set_itimer(which, Duration::from_secs(1000), interval);
    gate.ready();
    let (left, every) = itimer(which);
    assert_eq!(every, interval);
    assert!(left <= Duration::from_secs(1001) && left > Duration::from_secs(1000) - GONE, "left: {left:?}");
}

fn itimer_real(gate: &Gate) {
    itimer_keeps(gate, libc::ITIMER_REAL);
}

fn itimer_virtual(gate: &Gate) {
    itimer_keeps(gate, libc::ITIMER_VIRTUAL);
}

fn itimer_prof(gate: &Gate) {
    itimer_keeps(gate, libc::ITIMER_PROF);
}

/// So much of the time of a timer may be gone at the end, on a busy machine.
const GONE: Duration = Duration::from_secs(290);

static TICKS: AtomicU64 = AtomicU64::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);
static TID: AtomicU64 = AtomicU64::new(0);

extern "C" fn tick(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // signo errno, code pad, timer id and overrun, value
    let info: [u64; 4] = sys::peek(info as usize);
    VALUE.store(info[3], Ordering::SeqCst);
    TID.store(gettid() as u64, Ordering::SeqCst);
    TICKS.fetch_add(1, Ordering::SeqCst);
}

#[track_caller]
fn await_ticks(more: u64) {
    let (start, seen) = (Instant::now(), TICKS.load(Ordering::SeqCst));
    while TICKS.load(Ordering::SeqCst) < seen + more {
        assert!(start.elapsed() < PATIENCE, "the timer does not tick any more");
        sys::nap(Duration::from_millis(1));
    }
}

/// A fast timer ticks on.
fn itimer_ticks(gate: &Gate) {
    sys::handle(libc::SIGALRM, tick, libc::SA_RESTART);
    set_itimer(libc::ITIMER_REAL, Duration::from_millis(2), Duration::from_millis(2));
    await_ticks(2);
    gate.ready();
    await_ticks(3);
    set_itimer(libc::ITIMER_REAL, Duration::ZERO, Duration::ZERO);
}

/// A timer that would have fired between dump and restore fires after it, once.
fn itimer_one_shot(gate: &Gate) {
    sys::handle(libc::SIGALRM, tick, libc::SA_RESTART);
    set_itimer(libc::ITIMER_REAL, Duration::from_millis(900), Duration::ZERO);
    gate.ready();
    let start = Instant::now();
    while TICKS.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < PATIENCE, "the timer never fired");
        sys::nap(Duration::from_millis(1));
    }
    assert_eq!(itimer(libc::ITIMER_REAL), (Duration::ZERO, Duration::ZERO));
    assert_eq!(TICKS.load(Ordering::SeqCst), 1);
}

/// struct sigevent: value, signo, notify, thread id.
fn sigevent(signal: i32, notify: i32, value: u64, tid: i32) -> [u64; 8] {
    let words = |low: i32, high: i32| u64::from(low.cast_unsigned()) | u64::from(high.cast_unsigned()) << 32;
    [value, words(signal, notify), words(tid, 0), 0, 0, 0, 0, 0]
}

fn create(clock: i32, event: &[u64; 8]) -> Result<i32, Errno> {
    let mut id = -1_i32;
    sys!(SYS_timer_create, clock, event.as_ptr(), &raw mut id)?;
    Ok(id)
}

fn arm(id: i32, value: Duration, interval: Duration) {
    let spec = [sys::timespec(interval), sys::timespec(value)];
    sys!(SYS_timer_settime, id, 0, spec.as_ptr(), 0).expect("timer_settime");
}

/// Time left and interval.
fn left(id: i32) -> Result<(Duration, Duration), Errno> {
    let mut spec = [sys::timespec(Duration::ZERO); 2];
    sys!(SYS_timer_gettime, id, spec.as_mut_ptr())?;
    let [interval, value] = spec.map(|t| Duration::new(t.tv_sec as u64, t.tv_nsec as u32));
    Ok((value, interval))
}

#[track_caller]
fn check_left(id: i32, value: Duration, interval: Duration) {
    let (now, every) = left(id).expect("timer_gettime");
    assert_eq!(every, interval, "interval of timer {id}");
    assert!(now <= value && now + GONE > value, "timer {id}: {now:?} left of {value:?}");
}

fn timer_ids_with_gaps(gate: &Gate) {
    let event = sigevent(40, libc::SIGEV_SIGNAL, 0, 0);
    let ids: Vec<i32> =
        (0..12).map(|_| create(libc::CLOCK_MONOTONIC, &event).expect("timer_create")).collect();
    let gone = [0, 3, 4, 5, 9];
    for n in gone {
        sys!(SYS_timer_delete, ids[n]).expect("timer_delete");
    }
    let kept: Vec<usize> = (0..12).filter(|n| !gone.contains(n)).collect();
    for &n in &kept {
        arm(ids[n], Duration::from_secs(1000 + n as u64), Duration::from_nanos(n as u64 * 1_000_003 + 7));
    }
    gate.ready();
    for &n in &kept {
        check_left(
            ids[n],
            Duration::from_secs(1000 + n as u64),
            Duration::from_nanos(n as u64 * 1_000_003 + 7),
        );
    }
    for n in gone {
        assert_eq!(left(ids[n]), Err(libc::EINVAL), "timer {n} was deleted before the dump");
    }
    for n in kept {
        sys!(SYS_timer_delete, ids[n]).expect("timer_delete");
    }
    // New timers work, and do not collide.
    create(libc::CLOCK_MONOTONIC, &event).expect("timer_create");
}

fn timer_clocks(gate: &Gate) {
    let clocks = [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_TAI];
    let event = sigevent(41, libc::SIGEV_SIGNAL, 0, 0);
    let timers: Vec<(i32, i32)> =
        clocks.into_iter().filter_map(|c| Some((c, create(c, &event).ok()?))).collect();
    assert!(timers.len() >= 3);
    for &(clock, id) in &timers {
        arm(id, Duration::from_secs(2000 + clock as u64), Duration::ZERO);
    }
    gate.ready();
    for (clock, id) in timers {
        check_left(id, Duration::from_secs(2000 + clock as u64), Duration::ZERO);
    }
}

fn timer_signal_value(gate: &Gate) {
    sys::handle(42, tick, libc::SA_RESTART);
    let value = 0xdead_beef_0123_4567;
    let id =
        create(libc::CLOCK_MONOTONIC, &sigevent(42, libc::SIGEV_SIGNAL, value, 0)).expect("timer_create");
    arm(id, Duration::from_secs(600), Duration::from_secs(1));
    gate.ready();
    arm(id, Duration::from_millis(1), Duration::from_millis(1));
    await_ticks(2);
    arm(id, Duration::ZERO, Duration::ZERO);
    assert_eq!(VALUE.load(Ordering::SeqCst), value, "value of the signal");
}

fn timer_of_thread(gate: &Gate) {
    sys::handle(43, tick, libc::SA_RESTART);
    let control = gate.clone_for_thread();
    let (send, receive) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        send.send(gettid()).expect("send tid");
        control.await_mark("done");
    });
    let tid = receive.recv().expect("tid");
    const SIGEV_THREAD_ID: i32 = 4;
    let event = sigevent(43, SIGEV_THREAD_ID, 0x99, tid);
    let id = create(libc::CLOCK_MONOTONIC, &event).expect("timer_create");
    arm(id, Duration::from_secs(600), Duration::ZERO);
    gate.ready();
    arm(id, Duration::from_millis(1), Duration::from_millis(1));
    await_ticks(2);
    arm(id, Duration::ZERO, Duration::ZERO);
    assert_eq!(TID.load(Ordering::SeqCst), tid as u64, "the thread that got the signal");
    gate.mark("done");
    thread.join().expect("thread");
}

fn timer_none(gate: &Gate) {
    let id = create(libc::CLOCK_MONOTONIC, &sigevent(0, libc::SIGEV_NONE, 0, 0)).expect("timer_create");
    arm(id, Duration::from_secs(500), Duration::from_secs(3));
    gate.ready();
    check_left(id, Duration::from_secs(500), Duration::from_secs(3));
}

/// A blocked signal's timer ran over many times: one signal is pending, and the timer ticks on.
/// (The count itself cannot be set in a kernel; it starts anew.)
fn timer_overrun(gate: &Gate) {
    let mask = sys::mask_of(&[44]);
    sys::sigprocmask(libc::SIG_BLOCK, mask);
    let id = create(libc::CLOCK_MONOTONIC, &sigevent(44, libc::SIGEV_SIGNAL, 77, 0)).expect("timer_create");
    arm(id, Duration::from_micros(100), Duration::from_micros(100));
    let mut pending = 0_u64;
    while pending & mask == 0 {
        sys!(SYS_rt_sigpending, &raw mut pending, 8).expect("rt_sigpending");
    }
    sys::nap(Duration::from_millis(20));
    gate.ready();
    for _ in 0..5 {
        // signo errno, code pad, timer id and overrun, value
        let mut info = [0_u64; 16];
        let limit = sys::timespec(PATIENCE);
        let got = sys!(SYS_rt_sigtimedwait, &raw const mask, info.as_mut_ptr(), &raw const limit, 8);
        assert_eq!(got, Ok(44));
        assert_eq!((info[1] as i32, info[2] as i32, info[3]), (libc::SI_TIMER, id, 77));
    }
    sys::nap(Duration::from_millis(5));
    let limit = sys::timespec(PATIENCE);
    assert_eq!(sys!(SYS_rt_sigtimedwait, &raw const mask, 0, &raw const limit, 8), Ok(44));
    let overrun = sys!(SYS_timer_getoverrun, id).expect("timer_getoverrun");
    assert!(overrun >= 20, "overruns: {overrun}");
    arm(id, Duration::ZERO, Duration::ZERO);
}

fn timer_disarmed(gate: &Gate) {
    let id = create(libc::CLOCK_REALTIME, &sigevent(45, libc::SIGEV_SIGNAL, 0, 0)).expect("timer_create");
    gate.ready();
    assert_eq!(left(id), Ok((Duration::ZERO, Duration::ZERO)));
    sys::handle(45, tick, 0);
    arm(id, Duration::from_millis(1), Duration::ZERO);
    await_ticks(1);
}

fn timer_process_cputime(gate: &Gate) {
    let event = sigevent(46, libc::SIGEV_SIGNAL, 0, 0);
    let id = create(libc::CLOCK_PROCESS_CPUTIME_ID, &event).expect("timer_create");
    arm(id, Duration::from_secs(300), Duration::from_secs(7));
    gate.ready();
    check_left(id, Duration::from_secs(300), Duration::from_secs(7));
}

/// timer_create without a sigevent: SIGALRM with the timer's id as value.
fn timer_default_event(gate: &Gate) {
    sys::handle(libc::SIGALRM, tick, libc::SA_RESTART);
    let mut id = -1_i32;
    sys!(SYS_timer_create, libc::CLOCK_MONOTONIC, 0, &raw mut id).expect("timer_create");
    arm(id, Duration::from_secs(600), Duration::ZERO);
    gate.ready();
    arm(id, Duration::from_millis(1), Duration::ZERO);
    await_ticks(1);
    assert_eq!(VALUE.load(Ordering::SeqCst) as u32, id as u32, "value of the signal");
}
