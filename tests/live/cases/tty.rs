//! Terminals: pty pairs inside the tree, controlling terminals, and the one outside of a shell job.

use crate::case::Case;
use crate::gate::{Gate, fork, join};
use crate::sys::{self, getpid};

pub const CASES: &[Case] = &[
    Case::new("pty_settings", pty_settings),
    Case::new("pty_content", pty_content).peer_fails("loses what was written to the slave"),
    Case::new("pty_two_slaves", pty_two_slaves),
    Case::new("pty_controlling", pty_controlling).peer_loses(&["tty_nr"]),
    Case::new("pty_of_child_only", pty_of_child_only),
    Case::new("pty_dev_tty", pty_dev_tty)
        .peer_fails("a controlling terminal whose slave the parent holds too"),
    Case::new("pty_master_only", pty_master_only),
    Case::new("pty_packet_mode", pty_packet_mode),
    Case::new("pty_locked", pty_locked),
    Case::new("pty_several", pty_several),
    Case::new("shell_job", shell_job).on_terminal().flags(&["--shell-job"]),
    Case::new("shell_job_of_two", shell_job_of_two).on_terminal().flags(&["--shell-job"]),
    Case::new("shell_job_refused", shell_job).on_terminal().refused("shell-job"),
];

/// A pty pair; it does not become our controlling terminal.
fn pty() -> (i32, i32) {
    let (master, path) = sys::open_terminal();
    let path = std::ffi::CString::new(path.to_str().expect("text")).expect("path");
    (master, sys::open(&path, libc::O_RDWR | libc::O_NOCTTY).expect("open the slave"))
}

fn settings(fd: i32) -> libc::termios {
    let mut settings = sys::zeroed();
    sys!(SYS_ioctl, fd, libc::TCGETS, &raw mut settings).expect("TCGETS");
    settings
}

fn set(fd: i32, settings: &libc::termios) {
    sys!(SYS_ioctl, fd, libc::TCSETS, std::ptr::from_ref(settings)).expect("TCSETS");
}

/// No echo, no line editing, no translation.
fn raw(fd: i32) {
    let mut raw = settings(fd);
    raw.c_lflag = 0;
    raw.c_oflag = 0;
    raw.c_iflag = 0;
    raw.c_cc[libc::VMIN] = 1;
    set(fd, &raw);
}

fn size(fd: i32) -> [u16; 4] {
    let mut size = [0_u16; 4];
    sys!(SYS_ioctl, fd, libc::TIOCGWINSZ, size.as_mut_ptr()).expect("TIOCGWINSZ");
    size
}

fn pty_settings(gate: &Gate) {
    let (master, slave) = pty();
    let mut wanted = settings(slave);
    wanted.c_iflag = libc::IGNBRK | libc::IXON;
    wanted.c_oflag = 0;
    wanted.c_lflag = libc::ICANON | libc::NOFLSH;
    wanted.c_cc[libc::VINTR] = 7;
    wanted.c_cc[libc::VEOF] = 9;
    set(slave, &wanted);
    let wanted_size = [33_u16, 121, 1000, 2000];
    sys!(SYS_ioctl, master, libc::TIOCSWINSZ, wanted_size.as_ptr()).expect("TIOCSWINSZ");
    let all = |fd| {
        let s = settings(fd);
        (s.c_iflag, s.c_oflag, s.c_cflag, s.c_lflag, s.c_line, s.c_cc[..19].to_vec())
    };
    let before = all(slave);
    gate.ready();
    assert_eq!(all(slave), before);
    assert_eq!((size(slave), size(master)), (wanted_size, wanted_size));
    sys::write(slave, b"out").expect("write");
    assert_eq!(sys::read(master, 10), Ok(b"out".to_vec()));
    sys::write(master, b"in\n").expect("write");
    assert_eq!(sys::read(slave, 10), Ok(b"in\n".to_vec()));
}

/// Unread in both directions.
fn pty_content(gate: &Gate) {
    let (master, slave) = pty();
    raw(slave);
    sys::write(slave, b"from the slave").expect("write");
    sys::write(master, b"from the master").expect("write");
    gate.ready();
    assert_eq!(sys::read(master, 100), Ok(b"from the slave".to_vec()));
    assert_eq!(sys::read(slave, 100), Ok(b"from the master".to_vec()));
}

/// Two descriptions of one slave with flags of their own, and a dup.
fn pty_two_slaves(gate: &Gate) {
    let (master, slave) = pty();
    raw(slave);
    let path = std::fs::read_link(format!("/proc/self/fd/{slave}")).expect("readlink");
    let path = std::ffi::CString::new(path.to_str().expect("text")).expect("path");
    let other = sys::open(&path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY).expect("open");
    sys!(SYS_dup2, master, 60).expect("dup2");
    gate.ready();
    assert_eq!(sys::read(other, 1), Err(libc::EAGAIN));
    sys::write(60, b"x").expect("write");
    assert_eq!(sys::read(other, 9), Ok(b"x".to_vec()));
    assert_eq!(sys::write(other, b"x"), Err(libc::EBADF));
    sys::write(slave, b"y").expect("write");
    assert_eq!(sys::read(master, 9), Ok(b"y".to_vec()));
}

fn foreground(fd: i32) -> i32 {
    let mut group = -1_i32;
    sys!(SYS_ioctl, fd, libc::TIOCGPGRP, &raw mut group).expect("TIOCGPGRP");
    group
}

/// What `script` or `expect` make: a child with the slave as controlling terminal.
fn pty_controlling(gate: &Gate) {
    let (master, slave) = pty();
    let child = sys::fork(|| {
        sys::setsid();
        sys::close(master);
        sys!(SYS_ioctl, slave, libc::TIOCSCTTY, 0).expect("TIOCSCTTY");
        for fd in 0..3 {
            sys!(SYS_dup2, slave, fd).expect("dup2");
        }
        let me = getpid();
        // A background group and a foreground group.
        let member = fork(|| {
            sys!(SYS_setpgid, 0, 0).expect("setpgid");
            gate.mark("member");
            gate.wait();
        });
        gate.await_mark("member");
        assert_eq!(foreground(0), me);
        gate.mark("child");
        gate.wait();
        assert_eq!(foreground(0), me);
        assert_ne!(sys::stat_field(me, 7), "0", "controlling terminal");
        assert!(sys::open(c"/dev/tty", libc::O_RDWR).is_ok());
        join(member);
        gate.mark("checked");
        // Ctrl-C from the terminal reaches the foreground.
        loop {
            sys::nap(std::time::Duration::from_secs(1));
        }
    });
    sys::close(slave);
    gate.await_mark("child");
    gate.ready();
    gate.await_mark("checked");
    sys::write(master, b"\x03").expect("write");
    assert_eq!(sys::waitpid(child, 0), Ok((child, libc::SIGINT)));
}

/// Master and slave in different tasks, none of them in the root.
fn pty_of_child_only(gate: &Gate) {
    let (master, slave) = pty();
    raw(slave);
    let reader = fork(|| {
        sys::close(master);
        gate.mark("reader");
        gate.wait();
        assert_eq!(sys::read(slave, 10), Ok(b"hello".to_vec()));
    });
    let writer = fork(|| {
        sys::close(slave);
        gate.mark("writer");
        gate.wait();
        sys::write(master, b"hello").expect("write");
        join_other(gate);
    });
    sys::close(master);
    sys::close(slave);
    gate.await_mark("reader");
    gate.await_mark("writer");
    gate.ready();
    join(reader);
    gate.mark("reader is gone");
    join(writer);
}

fn join_other(gate: &Gate) {
    gate.await_mark("reader is gone");
}

fn pty_dev_tty(gate: &Gate) {
    let (master, slave) = pty();
    raw(slave);
    let child = fork(|| {
        sys::setsid();
        sys!(SYS_ioctl, slave, libc::TIOCSCTTY, 0).expect("TIOCSCTTY");
        let tty = sys::open(c"/dev/tty", libc::O_RDWR).expect("open /dev/tty");
        gate.mark("child");
        gate.wait();
        assert_eq!(sys::write(tty, b"via /dev/tty"), Ok(12));
    });
    gate.await_mark("child");
    gate.ready();
    assert_eq!(sys::read(master, 100), Ok(b"via /dev/tty".to_vec()));
    join(child);
}

fn pty_master_only(gate: &Gate) {
    let (master, path) = sys::open_terminal();
    gate.ready();
    let path = std::ffi::CString::new(path.to_str().expect("text")).expect("path");
    let slave = sys::open(&path, libc::O_RDWR | libc::O_NOCTTY).expect("open the slave");
    raw(slave);
    sys::write(slave, b"works").expect("write");
    assert_eq!(sys::read(master, 100), Ok(b"works".to_vec()));
}

fn pty_packet_mode(gate: &Gate) {
    let (master, slave) = pty();
    raw(slave);
    let on = 1_i32;
    sys!(SYS_ioctl, master, libc::TIOCPKT, &raw const on).expect("TIOCPKT");
    gate.ready();
    sys::write(slave, b"x").expect("write");
    let got = sys::read(master, 100).expect("read");
    // Control packets (first byte not 0) may come before the data.
    let data = if got[0] == 0 { got } else { sys::read(master, 100).expect("read") };
    assert_eq!(data, b"\0x", "data comes in packets");
}

/// The slave of a new master is locked until TIOCSPTLCK says otherwise.
fn pty_locked(gate: &Gate) {
    let master = sys::open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY).expect("open /dev/ptmx");
    gate.ready();
    let (mut locked, mut number) = (0_i32, 0_i32);
    const TIOCGPTLCK: usize = 0x8004_5439;
    sys!(SYS_ioctl, master, TIOCGPTLCK, &raw mut locked).expect("TIOCGPTLCK");
    sys!(SYS_ioctl, master, libc::TIOCGPTN, &raw mut number).expect("TIOCGPTN");
    assert_eq!(locked, 1);
}

fn pty_several(gate: &Gate) {
    let ptys: Vec<(i32, i32)> = (0..5).map(|_| pty()).collect();
    for (n, (master, slave)) in (1..).zip(&ptys) {
        raw(*slave);
        let size = [n, n * 10, 0, 0_u16];
        sys!(SYS_ioctl, *master, libc::TIOCSWINSZ, size.as_ptr()).expect("TIOCSWINSZ");
    }
    gate.ready();
    for (n, (master, slave)) in (1_u16..).zip(ptys) {
        assert_eq!(size(slave), [n, n * 10, 0, 0]);
        sys::write(slave, &[n as u8]).expect("write");
        assert_eq!(sys::read(master, 9), Ok(vec![n as u8]));
    }
}

/// As started from a shell: session and terminal belong to somebody outside the tree.
fn shell_job(gate: &Gate) {
    let session = sys::stat_field(getpid(), 6);
    assert_ne!(session, getpid().to_string());
    gate.ready();
    assert_eq!(sys::stat_field(getpid(), 6), session);
    assert_ne!(sys::stat_field(getpid(), 7), "0", "controlling terminal");
    assert_eq!(sys::write(1, b"to the terminal"), Ok(15));
    assert!(sys::open(c"/dev/tty", libc::O_RDWR).is_ok());
}

fn shell_job_of_two(gate: &Gate) {
    let child = fork(|| {
        sys!(SYS_setpgid, 0, 0).expect("setpgid");
        gate.mark("child");
        gate.wait();
        assert_ne!(sys::stat_field(getpid(), 7), "0", "controlling terminal");
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}
