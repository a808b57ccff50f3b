//! Threads caught inside a system call: after the restore the call goes on, or ends as the kernel
//! would end it, and the event they wait for reaches them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::case::Case;
use crate::gate::{Gate, PATIENCE, fork, until_in_call};
use crate::sys::{self, Errno, getpid, gettid, int};

pub const CASES: &[Case] = &[
    Case::new("in_read_of_pipe", in_read_of_pipe).disturbed(),
    Case::new("in_write_to_full_pipe", in_write_to_full_pipe),
    Case::new("in_nanosleep", in_nanosleep),
    Case::new("in_clock_nanosleep_absolute", in_clock_nanosleep_absolute),
    Case::new("in_poll", in_poll),
    Case::new("in_poll_with_timeout", in_poll_with_timeout),
    Case::new("in_ppoll", in_ppoll),
    Case::new("in_select", in_select),
    Case::new("in_epoll_wait", in_epoll_wait),
    Case::new("in_epoll_pwait", in_epoll_pwait),
    Case::new("in_epoll_pwait2", in_epoll_pwait2),
    Case::new("in_semop", in_semop),
    Case::new("in_semtimedop", in_semtimedop),
    Case::new("in_futex", in_futex).disturbed(),
    Case::new("in_futex_with_timeout", in_futex_with_timeout),
    Case::new("in_futex_bitset", in_futex_bitset),
    Case::new("in_sigsuspend", in_sigsuspend).disturbed(),
    Case::new("in_pause", in_pause),
    Case::new("in_sigtimedwait", in_sigtimedwait),
    Case::new("in_wait4", in_wait4),
    Case::new("in_waitid", in_waitid),
    Case::new("in_eventfd_read", in_eventfd_read),
    Case::new("in_timerfd_read", in_timerfd_read),
    Case::new("in_signalfd_read", in_signalfd_read),
    Case::new("in_fcntl_lock", in_fcntl_lock)
        .flags(&["--file-locks"])
        .peer_fails("gives the waiting task the lock"),
    Case::new("sa_restart", sa_restart),
    Case::new("no_sa_restart", no_sa_restart),
];

/// A thread does `call` (system call `number`), is in it while dumped, and `release` lets it out.
fn blocked<T: Send + 'static>(
    gate: &Gate,
    number: i64,
    call: impl FnOnce() -> T + Send + 'static,
    release: impl FnOnce(i32),
) -> T {
    static TID: AtomicU64 = AtomicU64::new(0);
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        TID.store(u64::from(gettid().cast_unsigned()), Ordering::SeqCst);
        let got = call();
        // A call that ends by itself may do so at any time: the thread is to be there all the same.
        control.wait();
        got
    });
    let tid = loop {
        match i32::try_from(TID.load(Ordering::SeqCst)) {
            Ok(tid) if tid != 0 => break tid,
            _ => std::thread::yield_now(),
        }
    };
    until_in_call(getpid(), tid, number);
    gate.ready();
    release(tid);
    thread.join().expect("blocked thread")
}

/// Repeats a call that may end with EINTR though no handler ran (signal(7): after a stop).
fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(libc::EINTR) => {}
            other => return other,
        }
    }
}

fn in_read_of_pipe(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let got = blocked(
        gate,
        libc::SYS_read,
        move || sys::read(from, 10),
        |_| {
            sys::write(to, b"hello").expect("write");
        },
    );
    assert_eq!(got, Ok(b"hello".to_vec()));
}

fn in_write_to_full_pipe(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    assert_eq!(sys::write(to, &[1; 65536]), Ok(65536));
    let got = blocked(
        gate,
        libc::SYS_write,
        move || sys::write(to, &[2; 5000]),
        |_| {
            let mut left = 65536 + 5000;
            let mut twos = 0;
            while left > 0 {
                let some = sys::read(from, left).expect("read");
                twos += some.iter().filter(|&&b| b == 2).count();
                left -= some.len();
            }
            assert_eq!(twos, 5000);
        },
    );
    assert_eq!(got, Ok(5000));
}

fn in_nanosleep(gate: &Gate) {
    let took = blocked(
        gate,
        libc::SYS_nanosleep,
        || {
            let start = Instant::now();
            let mut left = sys::timespec(Duration::from_millis(700));
            let result = retry(|| {
                let want = left;
                sys!(SYS_nanosleep, &raw const want, &raw mut left)
            });
            assert_eq!(result, Ok(0));
            start.elapsed()
        },
        |_| (),
    );
    assert!(took >= Duration::from_millis(700), "slept only {took:?}");
}

fn in_clock_nanosleep_absolute(gate: &Gate) {
    let call = || {
        let mut now = sys::timespec(Duration::ZERO);
        sys!(SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut now).expect("clock_gettime");
        let until = libc::timespec { tv_sec: now.tv_sec + 1, ..now };
        let flags = libc::TIMER_ABSTIME;
        // Restarted by the kernel, without EINTR.
        let result = sys!(SYS_clock_nanosleep, libc::CLOCK_MONOTONIC, flags, &raw const until, 0);
        sys!(SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut now).expect("clock_gettime");
        (result, (now.tv_sec, now.tv_nsec) >= (until.tv_sec, until.tv_nsec))
    };
    assert_eq!(blocked(gate, libc::SYS_clock_nanosleep, call, |_| ()), (Ok(0), true));
}

fn pollfd(fd: i32) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

fn in_poll(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let call = move || {
        let mut item = pollfd(from);
        (sys!(SYS_poll, &raw mut item, 1, -1_i32), item.revents)
    };
    let got = blocked(gate, libc::SYS_poll, call, |_| {
        sys::write(to, b"x").expect("write");
    });
    assert_eq!(got, (Ok(1), libc::POLLIN));
}

fn in_poll_with_timeout(gate: &Gate) {
    let (from, _to) = sys::pipe(0);
    let call = move || {
        let mut item = pollfd(from);
        retry(|| sys!(SYS_poll, &raw mut item, 1, 400))
    };
    assert_eq!(blocked(gate, libc::SYS_poll, call, |_| ()), Ok(0));
}

fn in_ppoll(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let before = sys::current_mask();
    let call = move || {
        let mut item = pollfd(from);
        let mask = sys::mask_of(&[libc::SIGUSR1, 50]);
        // Restarted by the kernel, without EINTR.
        let got = sys!(SYS_ppoll, &raw mut item, 1, 0, &raw const mask, 8);
        (got, item.revents, sys::current_mask())
    };
    let got = blocked(gate, libc::SYS_ppoll, call, |_| {
        sys::write(to, b"x").expect("write");
    });
    assert_eq!(got, (Ok(1), libc::POLLIN, before));
}

fn in_select(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let call = move || {
        let mut set = [0_u64; 16];
        set[0] = 1 << from;
        let got = sys!(SYS_select, from + 1, set.as_mut_ptr(), 0, 0, 0);
        (got, set[0])
    };
    let got = blocked(gate, libc::SYS_select, call, |_| {
        sys::write(to, b"x").expect("write");
    });
    assert_eq!(got, (Ok(1), 1 << from));
}

/// Waits for an event of an epoll instance without a timeout by `call`, which gets it, an event to fill, and a mask.
fn epoll_case(
    gate: &Gate,
    number: i64,
    call: fn(i32, *mut libc::epoll_event, *const u64) -> Result<usize, Errno>,
) {
    let (from, to) = sys::pipe(0);
    let epoll = int(sys!(SYS_epoll_create1, 0).expect("epoll_create1"));
    let event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0xabcd };
    sys!(SYS_epoll_ctl, epoll, libc::EPOLL_CTL_ADD, from, &raw const event).expect("epoll_ctl");
    let before = sys::current_mask();
    let call = move || {
        let mut event: libc::epoll_event = sys::zeroed();
        let mask = sys::mask_of(&[libc::SIGUSR1, 50]);
        let got = call(epoll, &raw mut event, &raw const mask);
        (got, event.u64, sys::current_mask())
    };
    let got = blocked(gate, number, call, |_| {
        sys::write(to, b"x").expect("write");
    });
    assert_eq!(got, (Ok(1), 0xabcd, before));
}

fn in_epoll_wait(gate: &Gate) {
    epoll_case(gate, libc::SYS_epoll_wait, |epoll, event, _| sys!(SYS_epoll_wait, epoll, event, 1, -1_i32));
}

fn in_epoll_pwait(gate: &Gate) {
    epoll_case(gate, libc::SYS_epoll_pwait, |epoll, event, mask| {
        sys!(SYS_epoll_pwait, epoll, event, 1, -7_i32, mask, 8)
    });
}

fn in_epoll_pwait2(gate: &Gate) {
    epoll_case(gate, libc::SYS_epoll_pwait2, |epoll, event, mask| {
        sys!(SYS_epoll_pwait2, epoll, event, 1, 0, mask, 8)
    });
}

/// A System V semaphore, which nobody saves: it is there all the time.
fn semaphore_case(gate: &Gate, number: i64, call: fn(i32, *const libc::sembuf) -> Result<usize, Errno>) {
    let id = int(sys!(SYS_semget, libc::IPC_PRIVATE, 1, 0o600).expect("semget"));
    let take = libc::sembuf { sem_num: 0, sem_op: -1, sem_flg: 0 };
    let give = libc::sembuf { sem_op: 1, ..take };
    let got = blocked(
        gate,
        number,
        move || call(id, &raw const take),
        |_| {
            sys!(SYS_semop, id, &raw const give, 1).expect("semop");
        },
    );
    // The original of a `dump -R` leaves it to the copy.
    if !gate.is_original() {
        sys!(SYS_semctl, id, 0, libc::IPC_RMID).expect("IPC_RMID");
    }
    assert_eq!(got, Ok(0));
}

fn in_semop(gate: &Gate) {
    semaphore_case(gate, libc::SYS_semop, |id, take| sys!(SYS_semop, id, take, 1));
}

fn in_semtimedop(gate: &Gate) {
    semaphore_case(gate, libc::SYS_semtimedop, |id, take| sys!(SYS_semtimedop, id, take, 1, 0));
}

fn futex_case(gate: &Gate, wait: fn(usize) -> Result<usize, Errno>) -> Result<usize, Errno> {
    let word = sys::anon(4096);
    blocked(
        gate,
        libc::SYS_futex,
        move || wait(word.at(0)),
        |_| {
            let start = Instant::now();
            // It may be a moment before it sleeps again.
            loop {
                let woken = sys!(SYS_futex, word.at(0), libc::FUTEX_WAKE, 1).expect("futex wake");
                if woken == 1 {
                    break;
                }
                assert!(start.elapsed() < PATIENCE, "nobody waits on the futex");
                sys::nap(Duration::from_micros(300));
            }
        },
    )
}

fn in_futex(gate: &Gate) {
    let got = futex_case(gate, |word| sys!(SYS_futex, word, libc::FUTEX_WAIT, 0, 0));
    assert_eq!(got, Ok(0));
}

fn in_futex_with_timeout(gate: &Gate) {
    let got = futex_case(gate, |word| {
        let limit = sys::timespec(Duration::from_secs(600));
        retry(|| sys!(SYS_futex, word, libc::FUTEX_WAIT, 0, &raw const limit))
    });
    assert_eq!(got, Ok(0));
}

fn in_futex_bitset(gate: &Gate) {
    let got = futex_case(gate, |word| {
        let mut until = sys::timespec(Duration::ZERO);
        sys!(SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut until).expect("clock_gettime");
        until.tv_sec += 600;
        sys!(SYS_futex, word, libc::FUTEX_WAIT_BITSET, 0, &raw const until, 0, u32::MAX)
    });
    assert_eq!(got, Ok(0));
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

fn in_sigsuspend(gate: &Gate) {
    sys::handle(libc::SIGUSR1, count, 0);
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[libc::SIGUSR1]));
    let call = || {
        let own = sys::current_mask();
        let mask = sys::mask_of(&[libc::SIGUSR2]);
        let got = sys!(SYS_rt_sigsuspend, &raw const mask, 8);
        (got, HANDLED.load(Ordering::SeqCst), sys::current_mask() == own)
    };
    let got = blocked(gate, libc::SYS_rt_sigsuspend, call, |tid| {
        sys::tgkill(getpid(), tid, libc::SIGUSR1);
    });
    assert_eq!(got, (Err(libc::EINTR), 1, true));
}

fn in_pause(gate: &Gate) {
    sys::handle(libc::SIGUSR1, count, 0);
    let call = || (sys!(SYS_pause), HANDLED.load(Ordering::SeqCst));
    let got = blocked(gate, libc::SYS_pause, call, |tid| {
        until_in_call(getpid(), tid, libc::SYS_pause);
        sys::tgkill(getpid(), tid, libc::SIGUSR1);
    });
    assert_eq!(got, (Err(libc::EINTR), 1));
}

fn in_sigtimedwait(gate: &Gate) {
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[libc::SIGUSR1]));
    let call = || {
        let set = sys::mask_of(&[libc::SIGUSR1]);
        sys!(SYS_rt_sigtimedwait, &raw const set, 0, 0, 8)
    };
    let got = blocked(gate, libc::SYS_rt_sigtimedwait, call, |tid| {
        sys::tgkill(getpid(), tid, libc::SIGUSR1);
    });
    assert_eq!(got, Ok(libc::SIGUSR1 as usize));
}

fn in_wait4(gate: &Gate) {
    let control = gate.clone_for_thread();
    let child = fork(move || control.wait());
    let got = blocked(gate, libc::SYS_wait4, move || sys::waitpid(child, 0), |_| ());
    assert_eq!(got, Ok((child, 0)));
}

fn in_waitid(gate: &Gate) {
    let control = gate.clone_for_thread();
    let child = sys::fork(move || {
        control.wait();
        9
    });
    let call = move || {
        let mut info: libc::siginfo_t = sys::zeroed();
        let got = sys!(SYS_waitid, libc::P_ALL, 0, &raw mut info, libc::WEXITED, 0);
        (got, info.si_signo, info.si_code)
    };
    let got = blocked(gate, libc::SYS_waitid, call, |_| ());
    assert_eq!(got, (Ok(0), libc::SIGCHLD, libc::CLD_EXITED), "child {child}");
}

fn in_eventfd_read(gate: &Gate) {
    let fd = int(sys!(SYS_eventfd2, 0, 0).expect("eventfd2"));
    let got = blocked(
        gate,
        libc::SYS_read,
        move || sys::read(fd, 8),
        |_| {
            sys::write(fd, &5_u64.to_ne_bytes()).expect("write");
        },
    );
    assert_eq!(got, Ok(5_u64.to_ne_bytes().to_vec()));
}

fn in_timerfd_read(gate: &Gate) {
    let fd = int(sys!(SYS_timerfd_create, libc::CLOCK_MONOTONIC, 0).expect("timerfd_create"));
    let got = blocked(
        gate,
        libc::SYS_read,
        move || sys::read(fd, 8),
        |_| {
            let time = libc::itimerspec {
                it_interval: sys::timespec(Duration::ZERO),
                it_value: sys::timespec(Duration::from_millis(2)),
            };
            sys!(SYS_timerfd_settime, fd, 0, &raw const time, 0).expect("timerfd_settime");
        },
    );
    assert_eq!(got, Ok(1_u64.to_ne_bytes().to_vec()));
}

fn in_signalfd_read(gate: &Gate) {
    let set = sys::mask_of(&[libc::SIGUSR2]);
    sys::sigprocmask(libc::SIG_BLOCK, set);
    let fd = int(sys!(SYS_signalfd4, -1_i32, &raw const set, 8, 0).expect("signalfd4"));
    let got = blocked(
        gate,
        libc::SYS_read,
        move || sys::read(fd, 128),
        |tid| {
            sys::tgkill(getpid(), tid, libc::SIGUSR2);
        },
    );
    let info = got.expect("read of signalfd");
    assert_eq!((info.len(), info[0]), (128, libc::SIGUSR2 as u8));
}

fn in_fcntl_lock(gate: &Gate) {
    let fd = sys::open(c"locked", libc::O_RDWR | libc::O_CREAT).expect("open");
    let lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 10, l_pid: 0 };
    let control = gate.clone_for_thread();
    let holder = fork(move || {
        sys::fcntl(fd, libc::F_SETLK, &raw const lock as usize).expect("F_SETLK");
        control.mark("held");
        control.wait();
    });
    gate.await_mark("held");
    let call = move || sys::fcntl(fd, libc::F_SETLKW, &raw const lock as usize);
    let got = blocked(gate, libc::SYS_fcntl, call, |_| ());
    assert_eq!(got, Ok(0));
    crate::gate::join(holder);
}

fn interrupted_read(gate: &Gate, flags: i32) -> Result<Vec<u8>, Errno> {
    sys::handle(libc::SIGUSR1, count, flags);
    let (from, to) = sys::pipe(0);
    blocked(
        gate,
        libc::SYS_read,
        move || sys::read(from, 10),
        |tid| {
            sys::tgkill(getpid(), tid, libc::SIGUSR1);
            while HANDLED.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            sys::write(to, b"late").expect("write");
        },
    )
}

fn sa_restart(gate: &Gate) {
    assert_eq!(interrupted_read(gate, libc::SA_RESTART), Ok(b"late".to_vec()));
}

/// Right after the restore the thread may not be back in its call yet; then the read succeeds.
fn no_sa_restart(gate: &Gate) {
    sys::handle(libc::SIGUSR1, count, 0);
    let (from, to) = sys::pipe(0);
    let got = blocked(
        gate,
        libc::SYS_read,
        move || sys::read(from, 10),
        |tid| {
            until_in_call(getpid(), tid, libc::SYS_read);
            sys::tgkill(getpid(), tid, libc::SIGUSR1);
            while HANDLED.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            sys::write(to, b"late").expect("write");
        },
    );
    assert_eq!(got, Err(libc::EINTR));
}
