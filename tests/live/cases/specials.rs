//! Descriptors made by a call of their own: eventfd, timerfd, signalfd, memfd, pidfd.

use std::time::{Duration, Instant};

use crate::case::Case;
use crate::gate::{self, Gate, fork, join};
use crate::sys::{self, Errno, getpid, int};

pub const CASES: &[Case] = &[
    Case::new("eventfd_count", eventfd_count).fifty(),
    Case::new("eventfd_large_count", eventfd_large_count).peer_fails("keeps 32 bits of the count"),
    Case::new("eventfd_semaphore", eventfd_semaphore).peer_fails("forgets EFD_SEMAPHORE"),
    Case::new("eventfd_zero_nonblocking", eventfd_zero_nonblocking),
    Case::new("eventfd_largest", eventfd_largest).peer_fails("keeps 32 bits of the count"),
    Case::new("eventfd_shared", eventfd_shared),
    Case::new("timerfd_clocks", timerfd_clocks),
    Case::new("timerfd_interval", timerfd_interval),
    Case::new("timerfd_ticks", timerfd_ticks).peer_fails("a fast timerfd stops ticking"),
    Case::new("timerfd_fast", timerfd_fast).peer_fails("a fast timerfd stops ticking"),
    Case::new("timerfd_expired", timerfd_expired).peer_fails("drops ticks that were not read"),
    Case::new("timerfd_disarmed", timerfd_disarmed),
    Case::new("timerfd_absolute", timerfd_absolute),
    Case::new("timerfd_shared", timerfd_shared),
    Case::new("signalfd_mask", signalfd_mask),
    Case::new("signalfd_pending", signalfd_pending),
    Case::new("memfd_content", memfd_content).fifty(),
    Case::new("memfd_seals", memfd_seals),
    Case::new("memfd_no_seals", memfd_no_seals),
    Case::new("memfd_close_on_exec", memfd_close_on_exec),
    Case::new("memfd_names", memfd_names),
    Case::new("memfd_opened_again", memfd_opened_again),
    Case::new("memfd_sparse", memfd_sparse),
    Case::new("pidfd_of_child", pidfd_of_child),
    Case::new("pidfd_of_self", pidfd_of_self),
    Case::new("pidfd_of_parent", pidfd_of_parent),
    Case::new("pidfd_of_dead", pidfd_of_dead),
    Case::new("pidfd_of_zombie", pidfd_of_zombie),
    Case::new("pidfd_of_thread", pidfd_of_thread).peer_fails("PIDFD_THREAD"),
    Case::new("pidfd_nonblocking", pidfd_nonblocking),
    Case::new("pidfd_outside", pidfd_outside).refused("pidfd"),
];

fn eventfd(count: u32, flags: i32) -> i32 {
    int(sys!(SYS_eventfd2, count, flags).expect("eventfd2"))
}

fn number(fd: i32) -> Result<u64, Errno> {
    let bytes = sys::read(fd, 8)?;
    Ok(u64::from_ne_bytes(bytes.try_into().expect("eight bytes")))
}

fn add(fd: i32, value: u64) -> Result<usize, Errno> {
    sys::write(fd, &value.to_ne_bytes())
}

fn eventfd_count(gate: &Gate) {
    let fd = eventfd(7, 0);
    add(fd, 1 << 20).expect("add");
    gate.ready();
    assert_eq!(number(fd), Ok((1 << 20) + 7));
}

fn eventfd_large_count(gate: &Gate) {
    let fd = eventfd(7, 0);
    add(fd, 1 << 40).expect("add");
    gate.ready();
    assert_eq!(number(fd), Ok((1 << 40) + 7));
}

fn eventfd_semaphore(gate: &Gate) {
    let fd = eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK);
    gate.ready();
    assert_eq!([number(fd), number(fd), number(fd)], [Ok(1), Ok(1), Ok(1)]);
    assert_eq!(number(fd), Err(libc::EAGAIN));
}

fn eventfd_zero_nonblocking(gate: &Gate) {
    let fd = eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    gate.ready();
    assert_eq!(number(fd), Err(libc::EAGAIN));
    assert_eq!(sys::fcntl(fd, libc::F_GETFD, 0), Ok(libc::FD_CLOEXEC));
}

fn eventfd_largest(gate: &Gate) {
    let fd = eventfd(0, libc::EFD_NONBLOCK);
    add(fd, u64::MAX - 1).expect("add");
    gate.ready();
    assert_eq!(add(fd, 1), Err(libc::EAGAIN));
    assert_eq!(number(fd), Ok(u64::MAX - 1));
}

fn eventfd_shared(gate: &Gate) {
    let fd = eventfd(1, 0);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        assert_eq!(number(fd), Ok(1));
        add(fd, 20).expect("add");
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    assert_eq!(number(fd), Ok(20));
}

fn timerfd(clock: i32, flags: i32) -> i32 {
    int(sys!(SYS_timerfd_create, clock, flags).expect("timerfd_create"))
}

fn arm(fd: i32, value: Duration, interval: Duration) {
    let spec = [sys::timespec(interval), sys::timespec(value)];
    sys!(SYS_timerfd_settime, fd, 0, spec.as_ptr(), 0).expect("timerfd_settime");
}

/// Time left and interval.
fn left(fd: i32) -> (Duration, Duration) {
    let mut spec = [sys::timespec(Duration::ZERO); 2];
    sys!(SYS_timerfd_gettime, fd, spec.as_mut_ptr()).expect("timerfd_gettime");
    let [interval, value] = spec.map(|t| Duration::new(t.tv_sec as u64, t.tv_nsec as u32));
    (value, interval)
}

#[track_caller]
fn check_left(fd: i32, value: Duration, interval: Duration) {
    let (now, every) = left(fd);
    assert_eq!(every, interval);
    assert!(now <= value && now + Duration::from_secs(290) > value, "{now:?} left of {value:?}");
}

fn timerfd_clocks(gate: &Gate) {
    let clocks = [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME];
    let fds = clocks.map(|clock| timerfd(clock, libc::TFD_NONBLOCK));
    for (n, &fd) in (0..).zip(&fds) {
        arm(fd, Duration::from_secs(1000 + n), Duration::ZERO);
    }
    gate.ready();
    for (n, fd) in (0..).zip(fds) {
        check_left(fd, Duration::from_secs(1000 + n), Duration::ZERO);
        assert_eq!(number(fd), Err(libc::EAGAIN));
        arm(fd, Duration::from_millis(1), Duration::ZERO);
        sys::until_readable(fd);
        assert_eq!(number(fd), Ok(1));
    }
}

fn timerfd_interval(gate: &Gate) {
    let fd = timerfd(libc::CLOCK_MONOTONIC, 0);
    let interval = Duration::new(77, 123_456_789);
    arm(fd, Duration::from_secs(500), interval);
    gate.ready();
    check_left(fd, Duration::from_secs(500), interval);
}

fn timerfd_ticks(gate: &Gate) {
    let fd = timerfd(libc::CLOCK_MONOTONIC, 0);
    arm(fd, Duration::from_millis(1), Duration::from_millis(1));
    assert!(number(fd).expect("read") >= 1);
    gate.ready();
    let start = Instant::now();
    let mut ticks = 0;
    while ticks < 5 {
        ticks += number(fd).expect("read");
        assert!(start.elapsed() < gate::PATIENCE);
    }
}

/// Faster than anybody can look at them: a dump meets them in the moment in which they go off.
fn timerfd_fast(gate: &Gate) {
    let clocks = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_REALTIME];
    let timers: Vec<i32> = [2, 10, 50, 100]
        .into_iter()
        .flat_map(|period| clocks.map(|clock| (clock, Duration::from_micros(period))))
        .cycle()
        .take(60)
        .map(|(clock, period)| {
            let fd = timerfd(clock, libc::TFD_NONBLOCK);
            arm(fd, period, period);
            fd
        })
        .collect();
    gate.ready();
    for fd in &timers {
        let _ = number(*fd);
    }
    sys::nap(Duration::from_millis(20));
    for (n, fd) in timers.iter().enumerate() {
        let ticks = number(*fd).unwrap_or_else(|_| panic!("timer {n} stands still"));
        assert!((20..100_000_000).contains(&ticks), "timer {n}: {ticks} in 20 ms");
    }
}

/// Ticks that nobody has read yet are still there, at least.
fn timerfd_expired(gate: &Gate) {
    let fd = timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK);
    arm(fd, Duration::from_micros(100), Duration::from_micros(100));
    sys::until_readable(fd);
    sys::nap(Duration::from_millis(10));
    let once = timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK);
    arm(once, Duration::from_micros(100), Duration::ZERO);
    sys::until_readable(once);
    gate.ready();
    assert!(number(fd).expect("ticks before the dump") >= 90);
    assert_eq!(number(once), Ok(1));
    assert_eq!(number(once), Err(libc::EAGAIN));
}

fn timerfd_disarmed(gate: &Gate) {
    let fd = timerfd(libc::CLOCK_REALTIME, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC);
    gate.ready();
    assert_eq!(left(fd), (Duration::ZERO, Duration::ZERO));
    assert_eq!(number(fd), Err(libc::EAGAIN));
}

/// Armed with an absolute time of the real-time clock.
fn timerfd_absolute(gate: &Gate) {
    let fd = timerfd(libc::CLOCK_REALTIME, libc::TFD_NONBLOCK);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("time");
    let spec = [sys::timespec(Duration::ZERO), sys::timespec(now + Duration::from_secs(3000))];
    sys!(SYS_timerfd_settime, fd, libc::TFD_TIMER_ABSTIME, spec.as_ptr(), 0).expect("timerfd_settime");
    gate.ready();
    check_left(fd, Duration::from_secs(3001), Duration::ZERO);
}

fn timerfd_shared(gate: &Gate) {
    let fd = timerfd(libc::CLOCK_MONOTONIC, 0);
    arm(fd, Duration::from_secs(800), Duration::ZERO);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        check_left(fd, Duration::from_secs(800), Duration::ZERO);
        arm(fd, Duration::from_secs(5000), Duration::ZERO);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    check_left(fd, Duration::from_secs(5000), Duration::ZERO);
}

fn signalfd(mask: u64, flags: i32) -> i32 {
    int(sys!(SYS_signalfd4, -1_i32, &raw const mask, 8, flags).expect("signalfd4"))
}

fn signalfd_mask(gate: &Gate) {
    let signals = [libc::SIGUSR1, 40, 64];
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&signals));
    let fd = signalfd(sys::mask_of(&signals), libc::SFD_NONBLOCK);
    let other = signalfd(sys::mask_of(&[libc::SIGUSR2]), libc::SFD_NONBLOCK);
    gate.ready();
    for signal in [libc::SIGUSR1, 40, 64] {
        sys::tgkill(getpid(), getpid(), signal);
        assert_eq!(sys::read(other, 128), Err(libc::EAGAIN));
        assert_eq!(sys::read(fd, 128).map(|info| info[0]), Ok(signal as u8));
    }
    assert_eq!(sys::read(fd, 128), Err(libc::EAGAIN));
}

fn signalfd_pending(gate: &Gate) {
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[41]));
    let fd = signalfd(sys::mask_of(&[41]), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
    for _ in 0..3 {
        sys::kill(getpid(), 41);
    }
    gate.ready();
    for _ in 0..3 {
        let info = sys::read(fd, 128).expect("read");
        // signo, errno, code, pid
        assert_eq!((info[0], &info[12..16]), (41, &getpid().to_ne_bytes()[..]));
    }
    assert_eq!(sys::read(fd, 128), Err(libc::EAGAIN));
}

fn memfd(name: &std::ffi::CStr, flags: u32) -> i32 {
    int(sys!(SYS_memfd_create, name.as_ptr(), flags).expect("memfd_create"))
}

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|n| (sys::pattern(3, n) >> 9) as u8).collect()
}

fn memfd_content(gate: &Gate) {
    let fd = memfd(c"content", 0);
    let bytes = content(100_001);
    sys::write(fd, &bytes).expect("write");
    sys::lseek(fd, 60_000, libc::SEEK_SET).expect("lseek");
    gate.ready();
    assert!(sys::read(fd, 200_000).expect("read") == bytes[60_000..]);
    assert_eq!(sys::lseek(fd, 0, libc::SEEK_END), Ok(100_001));
}

fn memfd_seals(gate: &Gate) {
    let fd = memfd(c"sealed", libc::MFD_ALLOW_SEALING);
    sys::write(fd, b"sealed").expect("write");
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    sys::fcntl(fd, libc::F_ADD_SEALS, seals as usize).expect("F_ADD_SEALS");
    gate.ready();
    assert_eq!(sys::fcntl(fd, libc::F_GET_SEALS, 0), Ok(seals));
    assert_eq!(sys::write(fd, b"x"), Err(libc::EPERM));
    sys::lseek(fd, 0, libc::SEEK_SET).expect("lseek");
    assert_eq!(sys::read(fd, 10), Ok(b"sealed".to_vec()));
}

fn memfd_no_seals(gate: &Gate) {
    let plain = memfd(c"plain", 0);
    let open = memfd(c"open to seals", libc::MFD_ALLOW_SEALING);
    gate.ready();
    assert_eq!(sys::fcntl(plain, libc::F_GET_SEALS, 0), Ok(libc::F_SEAL_SEAL));
    assert_eq!(sys::fcntl(open, libc::F_GET_SEALS, 0), Ok(0));
    assert_eq!(sys::fcntl(open, libc::F_ADD_SEALS, libc::F_SEAL_GROW as usize), Ok(0));
}

fn memfd_close_on_exec(gate: &Gate) {
    let closes = memfd(c"closes", libc::MFD_CLOEXEC);
    let stays = memfd(c"stays", 0);
    gate.ready();
    assert_eq!(sys::fcntl(closes, libc::F_GETFD, 0), Ok(libc::FD_CLOEXEC));
    assert_eq!(sys::fcntl(stays, libc::F_GETFD, 0), Ok(0));
}

fn memfd_names(gate: &Gate) {
    let names = [c"", c"with spaces", c"a (deleted)", c"slash/slash", c"new\nline"];
    let fds = names.map(|name| memfd(name, 0));
    for (n, &fd) in (0..).zip(&fds) {
        sys::write(fd, &[n; 10]).expect("write");
        sys::lseek(fd, 0, libc::SEEK_SET).expect("lseek");
    }
    gate.ready();
    for (n, fd) in (0..).zip(fds) {
        assert_eq!(sys::read(fd, 100), Ok(vec![n; 10]));
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).expect("readlink");
        let want = format!("/memfd:{} (deleted)", names[n as usize].to_str().expect("text"));
        assert_eq!(link.to_str(), Some(want.as_str()));
    }
}

/// A second description of the same memfd, for reading only, with a position of its own.
fn memfd_opened_again(gate: &Gate) {
    let fd = memfd(c"again", 0);
    sys::write(fd, b"0123456789").expect("write");
    let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).expect("path");
    let again = sys::open(&path, libc::O_RDONLY).expect("open");
    sys::lseek(again, 4, libc::SEEK_SET).expect("lseek");
    gate.ready();
    assert_eq!(sys::read(again, 2), Ok(b"45".to_vec()));
    assert_eq!(sys::write(again, b"x"), Err(libc::EBADF));
    sys::lseek(fd, 6, libc::SEEK_SET).expect("lseek");
    sys::write(fd, b"!").expect("write");
    assert_eq!(sys::read(again, 2), Ok(b"!7".to_vec()));
}

fn memfd_sparse(gate: &Gate) {
    let fd = memfd(c"sparse", 0);
    sys!(SYS_ftruncate, fd, 1_u64 << 32).expect("ftruncate");
    sys!(SYS_pwrite64, fd, b"middle".as_ptr(), 6, 3_u64 << 30).expect("pwrite");
    gate.ready();
    let mut bytes = [0_u8; 6];
    sys!(SYS_pread64, fd, bytes.as_mut_ptr(), 6, 3_u64 << 30).expect("pread");
    assert_eq!(&bytes, b"middle");
    let meta = std::fs::metadata(format!("/proc/self/fd/{fd}")).expect("stat");
    assert_eq!(meta.len(), 1 << 32);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&meta);
    assert!(blocks < 100, "{blocks} blocks");
}

fn pidfd(pid: i32, flags: i32) -> Result<i32, Errno> {
    sys!(SYS_pidfd_open, pid, flags).map(int)
}

/// Whether the process has ended, as poll tells.
fn ended(fd: i32) -> bool {
    let mut item = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    sys!(SYS_poll, &raw mut item, 1, 0).expect("poll") == 1
}

fn send(fd: i32, signal: i32) -> Result<usize, Errno> {
    sys!(SYS_pidfd_send_signal, fd, signal, 0, 0)
}

fn pidfd_of_child(gate: &Gate) {
    let child = sys::fork(|| {
        loop {
            sys::nap(Duration::from_secs(1));
        }
    });
    let fd = pidfd(child, 0).expect("pidfd_open");
    gate.ready();
    assert!(!ended(fd));
    send(fd, libc::SIGTERM).expect("pidfd_send_signal");
    let mut info: libc::siginfo_t = sys::zeroed();
    let got = sys!(SYS_waitid, libc::P_PIDFD, fd, &raw mut info, libc::WEXITED, 0);
    assert_eq!((got, info.si_code), (Ok(0), libc::CLD_KILLED));
    assert!(ended(fd));
}

fn pidfd_of_self(gate: &Gate) {
    let fd = pidfd(getpid(), 0).expect("pidfd_open");
    gate.ready();
    assert_eq!(send(fd, 0), Ok(0));
    assert!(!ended(fd));
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[42]));
    send(fd, 42).expect("pidfd_send_signal");
    let mut pending = 0_u64;
    sys!(SYS_rt_sigpending, &raw mut pending, 8).expect("rt_sigpending");
    assert_eq!(pending, sys::mask_of(&[42]));
}

fn pidfd_of_parent(gate: &Gate) {
    let parent = getpid();
    let child = fork(|| {
        let fd = pidfd(parent, 0).expect("pidfd_open");
        gate.mark("child");
        gate.wait();
        assert_eq!(send(fd, 0), Ok(0));
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).expect("fdinfo");
        assert!(info.contains(&format!("Pid:\t{parent}\n")), "{info}");
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}

/// The process has died and was reaped: signals find nobody, poll says it has ended.
fn pidfd_of_dead(gate: &Gate) {
    let child = fork(|| ());
    let fd = pidfd(child, 0).expect("pidfd_open");
    join(child);
    assert_eq!((send(fd, 0), ended(fd)), (Err(libc::ESRCH), true));
    gate.ready();
    assert_eq!((send(fd, 0), ended(fd)), (Err(libc::ESRCH), true));
}

fn pidfd_of_zombie(gate: &Gate) {
    let child = fork(|| ());
    gate::until_state(child, 'Z');
    let fd = pidfd(child, 0).expect("pidfd_open");
    gate.ready();
    assert!(ended(fd));
    join(child);
    assert_eq!(send(fd, 0), Err(libc::ESRCH));
}

fn pidfd_of_thread(gate: &Gate) {
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    let (send_tid, tid) = std::sync::mpsc::channel();
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        send_tid.send(sys::gettid()).expect("send");
        control.await_mark("end");
    });
    let tid = tid.recv().expect("tid");
    let Ok(fd) = pidfd(tid, PIDFD_THREAD) else {
        gate.skip("this kernel has no PIDFD_THREAD");
    };
    gate.ready();
    assert!(!ended(fd));
    assert_eq!(send(fd, 0), Ok(0));
    gate.mark("end");
    thread.join().expect("thread");
    while !ended(fd) {
        sys::nap(Duration::from_micros(300));
    }
}

fn pidfd_nonblocking(gate: &Gate) {
    let child = fork(|| gate.wait());
    let fd = pidfd(child, libc::O_NONBLOCK).expect("pidfd_open");
    gate.ready();
    let flags = sys::fcntl(fd, libc::F_GETFL, 0).expect("F_GETFL");
    assert_ne!(flags & libc::O_NONBLOCK, 0);
    join(child);
    assert!(ended(fd));
}

/// A process that does not belong to the tree.
fn pidfd_outside(gate: &Gate) {
    let parent = nix::unistd::getppid().as_raw();
    let fd = pidfd(parent, 0).expect("pidfd_open");
    gate.ready();
    assert_eq!(send(fd, 0), Ok(0));
}
