//! Pipes and FIFOs: what is in them, how large they are, who holds which end.

use std::fs;

use crate::case::Case;
use crate::gate::{Gate, fork, join, until_in_call};
use crate::sys::{self, Errno};

pub const CASES: &[Case] = &[
    Case::new("pipe_content", pipe_content).disturbed().fifty(),
    Case::new("pipe_empty", pipe_empty),
    Case::new("pipe_odd_writes", pipe_odd_writes),
    Case::new("pipe_full", pipe_full),
    Case::new("pipe_1_mib_full", pipe_1_mib_full),
    Case::new("pipe_size", pipe_size),
    Case::new("pipe_packets", pipe_packets).peer_fails("refuses packet mode"),
    Case::new("pipe_flags", pipe_flags),
    Case::new("pipe_between_tasks", pipe_between_tasks).disturbed(),
    Case::new("pipe_chain", pipe_chain),
    Case::new("pipe_of_children_only", pipe_of_children_only),
    Case::new("pipe_no_reader", pipe_no_reader),
    Case::new("pipe_no_writer", pipe_no_writer),
    Case::new("pipe_no_writer_empty", pipe_no_writer_empty),
    Case::new("pipe_no_reader_with_content", pipe_no_reader_with_content)
        .peer_fails("drops content that nobody can read"),
    Case::new("pipe_dup_ends", pipe_dup_ends),
    Case::new("pipe_reopened", pipe_reopened),
    Case::new("pipes_200", pipes_200),
    Case::new("fifo_content", fifo_content),
    Case::new("fifo_read_write", fifo_read_write),
    Case::new("fifo_between_tasks", fifo_between_tasks),
    Case::new("fifo_deleted", fifo_deleted),
    Case::new("fifo_no_writer", fifo_no_writer),
    Case::new("fifo_size", fifo_size),
    Case::new("fifo_never_written", fifo_never_written)
        .peer_fails("shows a hang-up to a reader that has had no writer (criu#3109)"),
    Case::new("fifo_never_written_deleted", fifo_never_written_deleted)
        .peer_fails("shows a hang-up to a reader that has had no writer (criu#3109)"),
];

fn content(len: usize, seed: u64) -> Vec<u8> {
    (0..len).map(|n| (sys::pattern(seed, n) >> 13) as u8).collect()
}

fn nonblocking(fd: i32) {
    let flags = sys::fcntl(fd, libc::F_GETFL, 0).expect("F_GETFL");
    sys::fcntl(fd, libc::F_SETFL, (flags | libc::O_NONBLOCK) as usize).expect("F_SETFL");
}

/// Everything in it, without waiting for more.
fn drain(fd: i32) -> Result<Vec<u8>, Errno> {
    nonblocking(fd);
    let mut all = Vec::new();
    loop {
        match sys::read(fd, 1 << 16) {
            Ok(some) if some.is_empty() => return Ok(all),
            Ok(some) => all.extend(some),
            Err(libc::EAGAIN) => return Ok(all),
            Err(errno) => return Err(errno),
        }
    }
}

fn pipe_content(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let bytes = content(10_000, 1);
    assert_eq!(sys::write(to, &bytes), Ok(10_000));
    assert_eq!(sys::read(from, 1234).expect("read"), bytes[..1234]);
    gate.ready();
    assert_eq!(sys::write(to, b"end"), Ok(3));
    let rest = drain(from).expect("read");
    assert!(rest == [&bytes[1234..], b"end"].concat(), "{} bytes", rest.len());
}

fn pipe_empty(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    gate.ready();
    assert_eq!(drain(from), Ok(vec![]));
    assert_eq!(sys::write(to, b"x"), Ok(1));
    assert_eq!(sys::read(from, 10), Ok(b"x".to_vec()));
}

/// Buffers that are filled in part, and pages that were spliced in.
fn pipe_odd_writes(gate: &Gate) {
    let (from, to) = sys::pipe(libc::O_DIRECT);
    sys::fcntl(to, libc::F_SETFL, 0).expect("F_SETFL");
    let mut want = Vec::new();
    for (n, len) in [1, 4096, 100, 4095, 2, 5000].into_iter().enumerate() {
        let bytes = content(len, n as u64);
        assert_eq!(sys::write(to, &bytes), Ok(len));
        want.extend(bytes);
    }
    fs::write("spliced", content(6000, 9)).expect("write");
    let file = sys::open(c"spliced", libc::O_RDONLY).expect("open");
    let mut left = 6000;
    while left > 0 {
        left -= sys!(SYS_splice, file, 0, to, 0, left, 0).expect("splice");
    }
    sys::close(file);
    want.extend(content(6000, 9));
    gate.ready();
    let got = drain(from).expect("read");
    assert!(got == want, "{} bytes, wanted {}", got.len(), want.len());
}

fn full(gate: &Gate, size: usize) {
    let (from, to) = sys::pipe(0);
    if sys::fcntl(to, libc::F_SETPIPE_SZ, size) != Ok(size as i32) {
        gate.skip(&format!("no pipe of {size} bytes to be had"));
    }
    let bytes = content(size, 2);
    assert_eq!(sys::write(to, &bytes), Ok(size));
    nonblocking(to);
    assert_eq!(sys::write(to, b"x"), Err(libc::EAGAIN));
    gate.ready();
    assert_eq!(sys::write(to, b"x"), Err(libc::EAGAIN), "it is still full");
    assert_eq!(sys::fcntl(from, libc::F_GETPIPE_SZ, 0), Ok(size as i32));
    assert!(drain(from).expect("read") == bytes);
    assert_eq!(sys::write(to, b"x"), Ok(1));
}

fn pipe_full(gate: &Gate) {
    full(gate, 1 << 16);
}

fn pipe_1_mib_full(gate: &Gate) {
    full(gate, 1 << 20);
}

fn pipe_size(gate: &Gate) {
    let pipes: Vec<(i32, usize)> = [4096, 8192, 1 << 19]
        .into_iter()
        .map(|size| {
            let (from, to) = sys::pipe(0);
            sys::fcntl(from, libc::F_SETPIPE_SZ, size).expect("F_SETPIPE_SZ");
            sys::write(to, b"content").expect("write");
            (from, size)
        })
        .collect();
    gate.ready();
    for (from, size) in pipes {
        assert_eq!(sys::fcntl(from, libc::F_GETPIPE_SZ, 0), Ok(size as i32));
        assert_eq!(sys::read(from, 100), Ok(b"content".to_vec()));
    }
}

/// Packet mode: one read gives one write, the rest of a packet is thrown away.
fn pipe_packets(gate: &Gate) {
    let (from, to) = sys::pipe(libc::O_DIRECT);
    for packet in [&b"first"[..], b"2", b"the third packet"] {
        sys::write(to, packet).expect("write");
    }
    gate.ready();
    sys::write(to, b"after").expect("write");
    assert_eq!(sys::read(from, 100), Ok(b"first".to_vec()));
    assert_eq!(sys::read(from, 100), Ok(b"2".to_vec()));
    assert_eq!(sys::read(from, 3), Ok(b"the".to_vec()));
    assert_eq!(sys::read(from, 100), Ok(b"after".to_vec()));
}

fn pipe_flags(gate: &Gate) {
    let (from, to) = sys::pipe(libc::O_NONBLOCK | libc::O_CLOEXEC);
    sys::fcntl(to, libc::F_SETFL, 0).expect("F_SETFL");
    gate.ready();
    let status = |fd| sys::fcntl(fd, libc::F_GETFL, 0).expect("F_GETFL");
    assert_eq!(status(from), libc::O_RDONLY | libc::O_NONBLOCK);
    assert_eq!(status(to), libc::O_WRONLY);
    assert_eq!(sys::fcntl(from, libc::F_GETFD, 0), Ok(libc::FD_CLOEXEC));
    assert_eq!(sys::read(from, 1), Err(libc::EAGAIN));
}

fn pipe_between_tasks(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let child = fork(|| {
        sys::close(to);
        assert_eq!(sys::read(from, 5), Ok(b"first".to_vec()));
        gate.mark("child");
        gate.wait();
        assert_eq!(sys::read(from, 7), Ok(b" second".to_vec()));
        assert_eq!(sys::read(from, 10), Ok(b" third".to_vec()));
        assert_eq!(sys::read(from, 10), Ok(vec![]), "end of file when the writer closes");
    });
    sys::close(from);
    sys::write(to, b"first second").expect("write");
    gate.await_mark("child");
    gate.ready();
    wait_until_empty(to);
    sys::write(to, b" third").expect("write");
    sys::close(to);
    join(child);
}

/// How many bytes are in it.
fn held(fd: i32) -> i32 {
    let mut held = 0_i32;
    sys!(SYS_ioctl, fd, libc::FIONREAD, &raw mut held).expect("FIONREAD");
    held
}

fn wait_until_empty(fd: i32) {
    while held(fd) > 0 {
        sys::nap(std::time::Duration::from_micros(200));
    }
}

/// Like `a | b | c`: each link between two children, with content under way.
fn pipe_chain(gate: &Gate) {
    let (from_parent, to_first) = sys::pipe(0);
    let mut from = from_parent;
    let mut children = Vec::new();
    for stage in 0..4_u8 {
        let (next_from, next_to) = sys::pipe(0);
        let input = from;
        children.push(fork(|| {
            sys::close(to_first);
            sys::close(next_from);
            loop {
                let some = sys::read(input, 7).expect("read");
                if some.is_empty() {
                    break;
                }
                let more: Vec<u8> = some.iter().map(|b| b.wrapping_add(stage)).collect();
                assert_eq!(sys::write(next_to, &more), Ok(more.len()));
            }
        }));
        sys::close(input);
        sys::close(next_to);
        from = next_from;
    }
    // Every stage waits for input.
    for &child in &children {
        until_in_call(child, child, libc::SYS_read);
    }
    let bytes = content(30_000, 5);
    sys::write(to_first, &bytes[..20_000]).expect("write");
    gate.ready();
    sys::write(to_first, &bytes[20_000..]).expect("write");
    sys::close(to_first);
    let mut got = Vec::new();
    loop {
        let some = sys::read(from, 4096).expect("read");
        if some.is_empty() {
            break;
        }
        got.extend(some);
    }
    let want: Vec<u8> = bytes.iter().map(|b| b.wrapping_add(6)).collect();
    assert!(got == want, "{} bytes came through", got.len());
    for child in children {
        join(child);
    }
}

/// The root does not have the pipe at all.
fn pipe_of_children_only(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let reader = fork(|| {
        sys::close(to);
        gate.mark("reader");
        gate.wait();
        assert_eq!(sys::read(from, 100), Ok(b"hello".to_vec()));
    });
    let writer = fork(|| {
        sys::close(from);
        gate.mark("writer");
        gate.wait();
        sys::write(to, b"hello").expect("write");
    });
    sys::close(from);
    sys::close(to);
    gate.await_mark("reader");
    gate.await_mark("writer");
    gate.ready();
    join(writer);
    join(reader);
}

/// Rust programs ignore SIGPIPE.
fn pipe_no_reader(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    sys::close(from);
    gate.ready();
    assert_eq!(sys::write(to, b"x"), Err(libc::EPIPE));
}

fn pipe_no_writer(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    sys::write(to, b"last words").expect("write");
    sys::close(to);
    gate.ready();
    assert_eq!(sys::read(from, 100), Ok(b"last words".to_vec()));
    assert_eq!(sys::read(from, 100), Ok(vec![]), "end of file");
}

fn pipe_no_writer_empty(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    sys::close(to);
    gate.ready();
    assert_eq!(sys::read(from, 100), Ok(vec![]), "end of file");
}

fn pipe_no_reader_with_content(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    sys::write(to, b"unread").expect("write");
    sys::close(from);
    gate.ready();
    assert_eq!(sys::write(to, b"x"), Err(libc::EPIPE));
    assert_eq!(held(to), 6);
}

fn pipe_dup_ends(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    sys!(SYS_dup2, to, 40).expect("dup2");
    sys!(SYS_dup2, from, 41).expect("dup2");
    sys::close(to);
    gate.ready();
    sys::write(40, b"abc").expect("write");
    assert_eq!(sys::read(41, 2), Ok(b"ab".to_vec()));
    assert_eq!(sys::read(from, 2), Ok(b"c".to_vec()));
    sys::close(40);
    assert_eq!(sys::read(from, 2), Ok(vec![]), "that was the last writer");
}

/// Opened again through /proc: a description of its own, for reading and writing.
fn pipe_reopened(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let path = std::ffi::CString::new(format!("/proc/self/fd/{from}")).expect("path");
    let both = sys::open(&path, libc::O_RDWR | libc::O_NONBLOCK).expect("open");
    let reader = sys::open(&path, libc::O_RDONLY | libc::O_NONBLOCK).expect("open");
    sys::write(both, b"in the pipe").expect("write");
    gate.ready();
    assert_eq!(sys::read(reader, 3), Ok(b"in ".to_vec()));
    assert_eq!(sys::read(both, 3), Ok(b"the".to_vec()));
    assert_eq!(sys::read(from, 30), Ok(b" pipe".to_vec()));
    sys::close(to);
    assert_eq!(sys::read(reader, 1), Err(libc::EAGAIN), "there still is a writer");
    sys::close(both);
    assert_eq!(sys::read(reader, 1), Ok(vec![]));
}

fn pipes_200(gate: &Gate) {
    let pipes: Vec<(i32, i32)> = (0..200).map(|_| sys::pipe(0)).collect();
    for (n, (_, to)) in pipes.iter().enumerate() {
        sys::write(*to, &content(n, n as u64)).expect("write");
    }
    gate.ready();
    for (n, (from, _)) in pipes.into_iter().enumerate() {
        assert!(drain(from).expect("read") == content(n, n as u64), "pipe {n}");
    }
}

fn make_fifo() {
    sys!(SYS_mknod, c"fifo".as_ptr(), libc::S_IFIFO | 0o644, 0).expect("mknod");
}

fn fifo_content(gate: &Gate) {
    make_fifo();
    let from = sys::open(c"fifo", libc::O_RDONLY | libc::O_NONBLOCK).expect("open");
    let to = sys::open(c"fifo", libc::O_WRONLY).expect("open");
    let bytes = content(9000, 6);
    sys::write(to, &bytes).expect("write");
    gate.ready();
    sys::write(to, b"end").expect("write");
    assert!(drain(from).expect("read") == [&bytes[..], b"end"].concat());
    // Opening it by name reaches the same pipe.
    let named = sys::open(c"fifo", libc::O_WRONLY | libc::O_NONBLOCK).expect("open by name");
    sys::write(named, b"by name").expect("write");
    assert_eq!(sys::read(from, 100), Ok(b"by name".to_vec()));
}

fn fifo_read_write(gate: &Gate) {
    make_fifo();
    let fd = sys::open(c"fifo", libc::O_RDWR).expect("open");
    sys::write(fd, b"to myself").expect("write");
    gate.ready();
    assert_eq!(sys::read(fd, 100), Ok(b"to myself".to_vec()));
}

fn fifo_between_tasks(gate: &Gate) {
    make_fifo();
    let child = fork(|| {
        let from = sys::open(c"fifo", libc::O_RDONLY).expect("open");
        gate.mark("child");
        gate.wait();
        assert_eq!(sys::read(from, 100), Ok(b"hello".to_vec()));
    });
    let to = sys::open(c"fifo", libc::O_WRONLY).expect("open");
    gate.await_mark("child");
    sys::write(to, b"hello").expect("write");
    gate.ready();
    join(child);
}

fn fifo_deleted(gate: &Gate) {
    make_fifo();
    let fd = sys::open(c"fifo", libc::O_RDWR).expect("open");
    fs::remove_file("fifo").expect("remove");
    sys::write(fd, b"nameless").expect("write");
    gate.ready();
    assert_eq!(sys::read(fd, 100), Ok(b"nameless".to_vec()));
    assert!(!fs::exists("fifo").expect("stat"), "the name has come back");
}

fn fifo_no_writer(gate: &Gate) {
    make_fifo();
    let from = sys::open(c"fifo", libc::O_RDONLY | libc::O_NONBLOCK).expect("open");
    let to = sys::open(c"fifo", libc::O_WRONLY).expect("open");
    sys::write(to, b"last").expect("write");
    sys::close(to);
    gate.ready();
    assert_eq!(sys::read(from, 100), Ok(b"last".to_vec()));
    assert_eq!(sys::read(from, 100), Ok(vec![]), "end of file");
}

fn hung_up(fd: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    sys!(SYS_poll, &raw mut poll, 1, 0).expect("poll");
    poll.revents & libc::POLLHUP != 0
}

/// One reader was there before any writer, another saw one leave.
fn never_written(gate: &Gate, deleted: bool) {
    make_fifo();
    let reader = || sys::open(c"fifo", libc::O_RDONLY | libc::O_NONBLOCK).expect("open");
    let left = reader();
    sys::close(sys::open(c"fifo", libc::O_WRONLY).expect("open"));
    let waiting = reader();
    sys::fcntl(waiting, libc::F_SETPIPE_SZ, 1 << 18).expect("F_SETPIPE_SZ");
    if deleted {
        fs::remove_file("fifo").expect("remove");
    }
    assert_eq!((hung_up(left), hung_up(waiting)), (true, false));
    gate.ready();
    assert_eq!((hung_up(left), hung_up(waiting)), (true, false));
    assert_eq!(sys::fcntl(waiting, libc::F_GETPIPE_SZ, 0), Ok(1 << 18));
    let path = std::ffi::CString::new(format!("/proc/self/fd/{waiting}")).expect("path");
    let to = sys::open(&path, libc::O_WRONLY | libc::O_NONBLOCK).expect("open for writing");
    sys::write(to, b"first").expect("write");
    assert_eq!(sys::read(waiting, 10), Ok(b"first".to_vec()));
    assert!(!hung_up(waiting) && !hung_up(left));
    sys::close(to);
    assert!(hung_up(waiting) && hung_up(left));
}

fn fifo_never_written(gate: &Gate) {
    never_written(gate, false);
}

fn fifo_never_written_deleted(gate: &Gate) {
    never_written(gate, true);
}

fn fifo_size(gate: &Gate) {
    make_fifo();
    let fd = sys::open(c"fifo", libc::O_RDWR).expect("open");
    sys::fcntl(fd, libc::F_SETPIPE_SZ, 1 << 18).expect("F_SETPIPE_SZ");
    let bytes = content(200_000, 7);
    sys::write(fd, &bytes).expect("write");
    gate.ready();
    assert_eq!(sys::fcntl(fd, libc::F_GETPIPE_SZ, 0), Ok(1 << 18));
    assert!(drain(fd).expect("read") == bytes);
}
