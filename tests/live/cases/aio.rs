//! Asynchronous I/O: contexts with their rings, and results that nobody has taken yet.

use std::os::fd::IntoRawFd;

use crate::case::Case;
use crate::gate::{Gate, fork, join};
use crate::sys;

pub const CASES: &[Case] = &[
    Case::new("aio_unused", unused),
    Case::new("aio_unread_results", unread_results),
    Case::new("aio_wrapped_ring", wrapped_ring).fifty(),
    Case::new("aio_full_ring", full_ring),
    Case::new("aio_many_contexts", many_contexts),
    Case::new("aio_of_forked", of_forked),
    Case::new("aio_after_direct", after_direct),
];

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    second: i64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u64,
    code: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// The header that programs may look at.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Header {
    id: u32,
    nr: u32,
    head: u32,
    tail: u32,
    magic: u32,
}

fn setup(requests: u32) -> u64 {
    let mut context = 0_u64;
    sys!(SYS_io_setup, requests, &raw mut context).expect("io_setup");
    context
}

fn header(context: u64) -> Header {
    sys::peek(context as usize)
}

/// Asks for `count` reads of `/dev/zero`, of as many bytes as their number says; numbered from `first` on.
fn read_zeros(context: u64, fd: i32, first: u64, count: u64) -> Result<usize, i32> {
    let buffer = Box::leak(Box::new([0_u8; 4096]));
    let mut requests: Vec<Request> = (first..first + count)
        .map(|data| Request {
            data,
            fd: fd.cast_unsigned(),
            buffer: buffer.as_ptr() as u64,
            bytes: data % 4096,
            ..Request::default()
        })
        .collect();
    let pointers: Vec<*mut Request> = requests.iter_mut().map(|request| &raw mut *request).collect();
    sys!(SYS_io_submit, context, pointers.len(), pointers.as_ptr())
}

/// Takes up to `most` results that are there.
fn take(context: u64, most: usize) -> Vec<Event> {
    let mut events = vec![Event::default(); most];
    let none = sys::timespec(std::time::Duration::ZERO);
    let got = sys!(SYS_io_getevents, context, 0, most, events.as_mut_ptr(), &raw const none);
    events.truncate(got.expect("io_getevents"));
    events
}

#[track_caller]
fn check(events: &[Event], first: u64, count: u64) {
    let found: Vec<(u64, i64)> = events.iter().map(|event| (event.data, event.result)).collect();
    let want: Vec<(u64, i64)> = (first..first + count).map(|data| (data, (data % 4096) as i64)).collect();
    assert_eq!(found, want);
}

fn zero() -> i32 {
    std::fs::File::open("/dev/zero").expect("open").into_raw_fd()
}

/// It can be used afterwards, for as many requests as before.
#[track_caller]
fn still_works(context: u64, fd: i32) {
    let room = u64::from(header(context).nr) / 2;
    for round in 0..5 {
        assert_eq!(read_zeros(context, fd, round * 1000, room), Ok(room as usize));
        check(&take(context, room as usize + 10), round * 1000, room);
    }
}

fn unused(gate: &Gate) {
    let (context, fd) = (setup(10), zero());
    let before = header(context);
    gate.ready();
    let after = header(context);
    assert_eq!((after.nr, after.head, after.tail, after.magic), (before.nr, 0, 0, 0xa10a_10a1));
    assert_eq!(take(context, 10), []);
    still_works(context, fd);
    sys!(SYS_io_destroy, context).expect("io_destroy");
}

fn unread_results(gate: &Gate) {
    let (context, fd) = (setup(300), zero());
    assert_eq!(read_zeros(context, fd, 100, 50), Ok(50));
    check(&take(context, 20), 100, 20);
    gate.ready();
    let ring = header(context);
    assert_eq!((ring.head, ring.tail), (20, 50));
    check(&take(context, 100), 120, 30);
    still_works(context, fd);
}

/// The next result goes to the beginning of the ring again.
fn wrapped_ring(gate: &Gate) {
    let (context, fd) = (setup(10), zero());
    let nr = u64::from(header(context).nr);
    let mut next = 0;
    while next < nr + 10 {
        assert_eq!(read_zeros(context, fd, next, 30), Ok(30));
        next += 30;
        if next < nr + 10 {
            check(&take(context, 100), next - 30, 30);
        }
    }
    let before = header(context);
    assert!(before.tail < before.head, "{before:?}");
    gate.ready();
    let after = header(context);
    assert_eq!((after.head, after.tail), (before.head, before.tail));
    check(&take(context, 100), next - 30, 30);
    still_works(context, fd);
}

/// As many results as the ring takes.
fn full_ring(gate: &Gate) {
    let (context, fd) = (setup(10), zero());
    let mut count = 0;
    while read_zeros(context, fd, count, 1).is_ok() {
        count += 1;
    }
    gate.ready();
    // How many fit depends a little on the processors that they were asked for on.
    check(&take(context, count as usize + 10), 0, count);
    still_works(context, fd);
}

fn many_contexts(gate: &Gate) {
    let fd = zero();
    let contexts: Vec<u64> = (0..20).map(|n| setup(10 << (n % 4))).collect();
    // Their own numbers have a gap.
    sys!(SYS_io_destroy, contexts[3]).expect("io_destroy");
    let live: Vec<u64> = contexts.into_iter().enumerate().filter(|(n, _)| *n != 3).map(|(_, c)| c).collect();
    for (n, context) in (0..).zip(&live) {
        assert_eq!(read_zeros(*context, fd, n * 10, n), Ok(n as usize));
        check(&take(*context, n as usize / 2), n * 10, n / 2);
    }
    gate.ready();
    for (n, context) in (0..).zip(&live) {
        check(&take(*context, 100), n * 10 + n / 2, n - n / 2);
        still_works(*context, fd);
    }
}

/// A child has its parent's ring mapped, and one of its own.
fn of_forked(gate: &Gate) {
    let (context, fd) = (setup(10), zero());
    assert_eq!(read_zeros(context, fd, 0, 5), Ok(5));
    let child = fork(|| {
        let own = setup(20);
        assert_eq!(read_zeros(own, fd, 50, 7), Ok(7));
        gate.mark("child");
        gate.wait();
        check(&take(own, 100), 50, 7);
        still_works(own, fd);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    check(&take(context, 100), 0, 5);
    still_works(context, fd);
}

/// Requests that a device has to do: they have ended by the time the ring is saved.
fn after_direct(gate: &Gate) {
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_DIRECT;
    let Ok(fd) = sys!(SYS_open, c"direct".as_ptr(), flags, 0o600) else {
        gate.skip("no O_DIRECT here");
    };
    let context = setup(200);
    let memory = sys::anon(64 * 4096);
    memory.fill(5);
    let mut requests: Vec<Request> = (0..64)
        .map(|n| Request {
            data: n,
            code: 1,
            fd: fd as u32,
            buffer: memory.at(n as usize * 4096) as u64,
            bytes: 4096,
            offset: n as i64 * 4096,
            ..Request::default()
        })
        .collect();
    let pointers: Vec<*mut Request> = requests.iter_mut().map(|request| &raw mut *request).collect();
    assert_eq!(sys!(SYS_io_submit, context, pointers.len(), pointers.as_ptr()), Ok(64));
    gate.ready();
    let mut found: Vec<u64> = take(context, 100).iter().map(|event| event.data).collect();
    found.sort_unstable();
    assert_eq!(found, (0..64).collect::<Vec<_>>());
    sys::close(fd as i32);
}
