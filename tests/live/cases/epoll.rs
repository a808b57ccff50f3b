//! epoll: what is watched, by which description, with which events and data.

use crate::case::Case;
use crate::gate::{Gate, fork, join};
use crate::sys::{self, Errno, int};

pub const CASES: &[Case] = &[
    Case::new("epoll_pipes", epoll_pipes).fifty(),
    Case::new("epoll_empty", epoll_empty),
    Case::new("epoll_edge_triggered", epoll_edge_triggered),
    Case::new("epoll_one_shot", epoll_one_shot),
    Case::new("epoll_one_shot_spent", epoll_one_shot_spent),
    Case::new("epoll_nested", epoll_nested),
    Case::new("epoll_of_dup", epoll_of_dup),
    Case::new("epoll_same_file_twice", epoll_same_file_twice),
    Case::new("epoll_closed_fd", epoll_closed_fd).peer_fails("a watched descriptor that was closed"),
    Case::new("epoll_number_reused", epoll_number_reused).peer_fails("a watched descriptor that was closed"),
    Case::new("epoll_shared", epoll_shared),
    Case::new("epoll_of_many_kinds", epoll_of_many_kinds),
    Case::new("epoll_1000", epoll_1000),
];

const IN: u32 = libc::EPOLLIN as u32;
const ET: u32 = libc::EPOLLET as u32;
const ONE_SHOT: u32 = libc::EPOLLONESHOT as u32;

fn epoll() -> i32 {
    int(sys!(SYS_epoll_create1, 0).expect("epoll_create1"))
}

fn control(epoll: i32, op: i32, fd: i32, events: u32, data: u64) -> Result<usize, Errno> {
    let event = libc::epoll_event { events, u64: data };
    sys!(SYS_epoll_ctl, epoll, op, fd, &raw const event)
}

fn watch(epoll: i32, fd: i32, events: u32, data: u64) {
    control(epoll, libc::EPOLL_CTL_ADD, fd, events, data).expect("EPOLL_CTL_ADD");
}

/// What is ready now: data and events, sorted by data.
fn ready(epoll: i32) -> Vec<(u64, u32)> {
    let mut events = [sys::zeroed::<libc::epoll_event>(); 64];
    let got = sys!(SYS_epoll_wait, epoll, events.as_mut_ptr(), events.len(), 0).expect("epoll_wait");
    let mut all: Vec<(u64, u32)> = events[..got].iter().map(|e| (e.u64, e.events)).collect();
    all.sort_unstable();
    all
}

fn epoll_pipes(gate: &Gate) {
    let epoll = epoll();
    let (a, to_a) = sys::pipe(0);
    let (b, to_b) = sys::pipe(0);
    watch(epoll, a, IN, 0x1111_2222_3333_4444);
    watch(epoll, b, IN | libc::EPOLLRDHUP as u32, u64::MAX);
    sys::write(to_b, b"x").expect("write");
    gate.ready();
    assert_eq!(ready(epoll), [(u64::MAX, IN)]);
    sys::write(to_a, b"x").expect("write");
    assert_eq!(ready(epoll), [(0x1111_2222_3333_4444, IN), (u64::MAX, IN)]);
    control(epoll, libc::EPOLL_CTL_DEL, a, 0, 0).expect("EPOLL_CTL_DEL");
    sys::close(to_b);
    assert_eq!(ready(epoll), [(u64::MAX, IN | libc::EPOLLHUP as u32)]);
}

fn epoll_empty(gate: &Gate) {
    let epoll = int(sys!(SYS_epoll_create1, libc::EPOLL_CLOEXEC).expect("epoll_create1"));
    gate.ready();
    assert_eq!(ready(epoll), []);
    assert_eq!(sys::fcntl(epoll, libc::F_GETFD, 0), Ok(libc::FD_CLOEXEC));
}

/// After the restore an edge may be told once more, but not lost, and it stays edge-triggered.
fn epoll_edge_triggered(gate: &Gate) {
    let epoll = epoll();
    let (from, to) = sys::pipe(0);
    watch(epoll, from, IN | ET, 5);
    gate.ready();
    assert_eq!(ready(epoll), []);
    sys::write(to, b"x").expect("write");
    assert_eq!(ready(epoll), [(5, IN)]);
    assert_eq!(ready(epoll), [], "told once");
}

fn epoll_one_shot(gate: &Gate) {
    let epoll = epoll();
    let (from, to) = sys::pipe(0);
    watch(epoll, from, IN | ONE_SHOT, 6);
    sys::write(to, b"x").expect("write");
    gate.ready();
    assert_eq!(ready(epoll), [(6, IN)]);
    assert_eq!(ready(epoll), [], "one shot");
}

/// It has fired before the dump: it must not fire again.
fn epoll_one_shot_spent(gate: &Gate) {
    let epoll = epoll();
    let (from, to) = sys::pipe(0);
    watch(epoll, from, IN | ONE_SHOT, 7);
    sys::write(to, b"x").expect("write");
    assert_eq!(ready(epoll), [(7, IN)]);
    gate.ready();
    assert_eq!(ready(epoll), [], "it is spent");
    control(epoll, libc::EPOLL_CTL_MOD, from, IN, 8).expect("EPOLL_CTL_MOD");
    assert_eq!(ready(epoll), [(8, IN)]);
}

fn epoll_nested(gate: &Gate) {
    let (outer, middle, inner) = (epoll(), epoll(), epoll());
    let (from, to) = sys::pipe(0);
    watch(inner, from, IN, 1);
    watch(middle, inner, IN, 2);
    watch(outer, middle, IN, 3);
    gate.ready();
    assert_eq!(ready(outer), []);
    sys::write(to, b"x").expect("write");
    assert_eq!((ready(outer), ready(middle), ready(inner)), (vec![(3, IN)], vec![(2, IN)], vec![(1, IN)]));
}

/// Two descriptors of one description are two items.
fn epoll_of_dup(gate: &Gate) {
    let epoll = epoll();
    let (from, to) = sys::pipe(0);
    sys!(SYS_dup2, from, 77).expect("dup2");
    watch(epoll, from, IN, 1);
    watch(epoll, 77, IN, 2);
    gate.ready();
    sys::write(to, b"x").expect("write");
    assert_eq!(ready(epoll), [(1, IN), (2, IN)]);
    control(epoll, libc::EPOLL_CTL_DEL, 77, 0, 0).expect("EPOLL_CTL_DEL");
    assert_eq!(ready(epoll), [(1, IN)]);
}

fn epoll_same_file_twice(gate: &Gate) {
    let (one, two) = (epoll(), epoll());
    let (from, to) = sys::pipe(0);
    watch(one, from, IN, 1);
    watch(two, from, IN, 2);
    sys!(SYS_dup2, two, 90).expect("dup2");
    gate.ready();
    sys::write(to, b"x").expect("write");
    assert_eq!((ready(one), ready(two), ready(90)), (vec![(1, IN)], vec![(2, IN)], vec![(2, IN)]));
}

/// The watched number is closed, but a duplicate keeps the description, so the item lives on.
fn epoll_closed_fd(gate: &Gate) {
    let epoll = epoll();
    let (from, to) = sys::pipe(0);
    watch(epoll, from, IN, 9);
    sys!(SYS_dup2, from, 88).expect("dup2");
    sys::close(from);
    gate.ready();
    sys::write(to, b"x").expect("write");
    assert_eq!(ready(epoll), [(9, IN)]);
}

/// The same, and the number now is another file's, which is not watched.
fn epoll_number_reused(gate: &Gate) {
    let epoll = epoll();
    let (from, to) = sys::pipe(0);
    watch(epoll, from, IN, 9);
    sys!(SYS_dup2, from, 88).expect("dup2");
    let (other, to_other) = sys::pipe(0);
    sys!(SYS_dup2, other, from).expect("dup2");
    gate.ready();
    sys::write(to_other, b"x").expect("write");
    assert_eq!(ready(epoll), [], "the other file is not watched");
    sys::write(to, b"x").expect("write");
    assert_eq!(ready(epoll), [(9, IN)]);
}

fn epoll_shared(gate: &Gate) {
    let epoll = epoll();
    let (from, to) = sys::pipe(0);
    watch(epoll, from, IN, 1);
    let child = fork(|| {
        gate.mark("child");
        gate.wait();
        gate.await_mark("written");
        assert_eq!(ready(epoll), [(1, IN)]);
        control(epoll, libc::EPOLL_CTL_MOD, from, 0, 1).expect("EPOLL_CTL_MOD");
    });
    gate.await_mark("child");
    gate.ready();
    sys::write(to, b"x").expect("write");
    gate.mark("written");
    join(child);
    assert_eq!(ready(epoll), []);
}

fn epoll_of_many_kinds(gate: &Gate) {
    let epoll = epoll();
    let event = int(sys!(SYS_eventfd2, 0, 0).expect("eventfd2"));
    let timer = int(sys!(SYS_timerfd_create, libc::CLOCK_MONOTONIC, 0).expect("timerfd_create"));
    let mask = sys::mask_of(&[44]);
    sys::sigprocmask(libc::SIG_BLOCK, mask);
    let signal = int(sys!(SYS_signalfd4, -1_i32, &raw const mask, 8, 0).expect("signalfd4"));
    let notify = int(sys!(SYS_inotify_init1, 0).expect("inotify_init1"));
    sys!(SYS_inotify_add_watch, notify, c".".as_ptr(), libc::IN_CREATE).expect("inotify_add_watch");
    for (n, fd) in (1..).zip([event, timer, signal, notify]) {
        watch(epoll, fd, IN, n);
    }
    gate.ready();
    assert_eq!(ready(epoll), []);
    sys::write(event, &1_u64.to_ne_bytes()).expect("write");
    let spec = [sys::timespec(std::time::Duration::ZERO), sys::timespec(std::time::Duration::from_nanos(1))];
    sys!(SYS_timerfd_settime, timer, 0, spec.as_ptr(), 0).expect("timerfd_settime");
    sys::kill(sys::getpid(), 44);
    std::fs::write("created", b"").expect("write");
    sys::until_readable(timer);
    assert_eq!(ready(epoll), [(1, IN), (2, IN), (3, IN), (4, IN)]);
}

fn epoll_1000(gate: &Gate) {
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 2000, 2000);
    let epoll = epoll();
    let fds: Vec<i32> = (0..1000).map(|_| int(sys!(SYS_eventfd2, 0, 0).expect("eventfd2"))).collect();
    for (n, &fd) in (0..).zip(&fds) {
        watch(epoll, fd, IN, n);
    }
    gate.ready();
    for n in [0, 500, 999] {
        sys::write(fds[n], &1_u64.to_ne_bytes()).expect("write");
    }
    assert_eq!(ready(epoll), [(0, IN), (500, IN), (999, IN)]);
}
