//! Ptys of the test process, through the whole of a dump and a restore.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::Command,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use super::{super::tests::Cycle, *};
use crate::sys::tty::{self, Termios, Winsize};

/// Runs `test` where nobody else takes the number of a pty between its end and its return: with terminals of our own.
/// Who may not mount has to hope.
fn with_own_ptys(test: impl FnOnce() + Send) {
    let own = || {
        let run = |program: &str, args: &[&str]| {
            let status = Command::new(program).args(args).status().expect(program);
            assert!(status.success(), "{program} {args:?}: {status}");
        };
        if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_ok() {
            run("mount", &["--make-rprivate", "/"]);
            run("mount", &["-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", "/dev/pts"]);
        }
        test();
    };
    // The namespace is the thread's, and goes with it.
    std::thread::scope(|scope| {
        if let Err(panic) = scope.spawn(own).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn master() -> OwnedFd {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    open("/dev/ptmx", flags, Mode::empty()).unwrap()
}

fn slave(master: &OwnedFd) -> OwnedFd {
    tty::set_pty_locked(master.as_fd(), false).unwrap();
    let path = format!("/dev/pts/{}", tty::pty_index(master.as_fd()).unwrap());
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    open(path.as_str(), flags, Mode::empty()).unwrap()
}

fn raw(fd: &OwnedFd) {
    let old = tty::termios(fd.as_fd()).unwrap();
    let mut cc = old.cc;
    cc[libc::VMIN] = 1;
    tty::set_termios(fd.as_fd(), &Termios { iflag: 0, oflag: 0, lflag: 0, cc, ..old }).unwrap();
}

fn write(fd: &OwnedFd, bytes: &[u8]) {
    assert_eq!(nix::unistd::write(fd, bytes).unwrap(), bytes.len());
}

/// All that can be read, at least `least` bytes.
fn read(fd: &OwnedFd, least: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut piece = [0; 1000];
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while std::time::Instant::now() < until {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(20u8)).unwrap();
        if fds[0].revents().unwrap().contains(PollFlags::POLLIN) {
            let len = nix::unistd::read(fd, &mut piece).unwrap();
            all.extend_from_slice(&piece[..len]);
        } else if all.len() >= least {
            break;
        }
    }
    all
}

fn again(fds: Vec<OwnedFd>) -> Vec<OwnedFd> {
    Cycle::new().run(fds, || {})
}

#[test]
fn settings_size_and_modes() {
    with_own_ptys(|| {
        let master = master();
        let slave = slave(&master);
        raw(&slave);
        let mut termios = tty::termios(slave.as_fd()).unwrap();
        termios.cc = std::array::from_fn(|i| i as u8 + 1);
        termios.iflag = libc::IXON | libc::IGNBRK;
        tty::set_termios(slave.as_fd(), &termios).unwrap();
        let size = Winsize { rows: 33, cols: 121, xpixel: 1000, ypixel: 2000 };
        tty::set_winsize(master.as_fd(), &size).unwrap();
        tty::set_packet_mode(master.as_fd(), true).unwrap();
        tty::set_exclusive(slave.as_fd(), true).unwrap();
        let files = again(vec![master, slave]);
        let (master, slave) = (files[0].as_fd(), files[1].as_fd());
        assert_eq!(tty::termios(slave).unwrap(), termios);
        assert_eq!((tty::winsize(slave).unwrap(), tty::winsize(master).unwrap()), (size, size));
        assert!(tty::packet_mode(master).unwrap() && tty::exclusive(slave).unwrap());
        assert!(!tty::exclusive(master).unwrap() && !tty::pty_locked(master).unwrap());
    });
}

#[test]
fn content_raw_and_the_source_keeps_it() {
    with_own_ptys(|| {
        let (master, cycle) = (master(), Cycle::new());
        let slave = slave(&master);
        raw(&slave);
        write(&slave, b"from\nthe slave");
        write(&master, b"from\nthe master");
        tty::set_packet_mode(master.as_fd(), true).unwrap();
        let before = tty::termios(slave.as_fd()).unwrap();
        assert_eq!(cycle.dump(&[&slave, &master]).unwrap(), []);
        assert_eq!(tty::termios(slave.as_fd()).unwrap(), before);
        let mut restored = cycle.restore().unwrap();
        let (new_master, new_slave) =
            (restored.remove(&master.as_raw_fd()).unwrap(), restored.remove(&slave.as_raw_fd()).unwrap());
        for (master, slave) in [(master, slave), (new_master, new_slave)] {
            assert_eq!(read(&master, 15), b"\0from\nthe slave");
            assert_eq!(read(&slave, 15), b"from\nthe master");
        }
    });
}

#[test]
fn content_in_lines() {
    with_own_ptys(|| {
        let master = master();
        let slave = slave(&master);
        write(&master, b"one\ntwo\nhal");
        // The echo comes by itself, a little later.
        while crate::sys::pipe::readable_bytes(master.as_fd()).unwrap() < 13 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        write(&slave, b"out\n");
        let seen = b"one\r\ntwo\r\nhalout\r\n";
        let files = again(vec![master, slave]);
        let (master, slave) = (&files[0], &files[1]);
        assert_eq!(read(master, seen.len()), seen);
        let mut line = [0; 100];
        assert_eq!(nix::unistd::read(slave, &mut line).unwrap(), 4);
        assert_eq!(nix::unistd::read(slave, &mut line).unwrap(), 4);
        // What was begun can still be edited: DEL takes the l away.
        write(master, b"\x7flf\n");
        assert_eq!(nix::unistd::read(slave, &mut line).unwrap(), 5);
        assert_eq!(&line[..5], b"half\n".as_slice());
    });
}

#[test]
fn a_master_alone() {
    with_own_ptys(|| {
        let never = master();
        let files = again(vec![never]);
        assert!(tty::pty_locked(files[0].as_fd()).unwrap());
        assert!(!has_hung_up(&files[0]).unwrap());
        drop(files);

        let closed = master();
        let end = slave(&closed);
        raw(&end);
        write(&end, b"last words");
        drop(end);
        let files = again(vec![closed]);
        assert_eq!(nix::unistd::read(&files[0], &mut [0; 100]).unwrap(), 10);
        assert_eq!(nix::unistd::read(&files[0], &mut [0; 100]).unwrap_err(), Errno::EIO);
    });
}

#[test]
fn a_slave_that_was_hung_up() {
    with_own_ptys(|| {
        let master = master();
        let end = slave(&master);
        drop(master);
        let cycle = Cycle::new();
        assert_eq!(cycle.dump(&[&end]).unwrap(), []);
        let restored = cycle.restore().unwrap().remove(&end.as_raw_fd()).unwrap();
        for end in [&end, &restored] {
            assert_eq!(nix::unistd::read(end, &mut [0; 10]).unwrap(), 0);
            assert_eq!(nix::unistd::write(end, b"x").unwrap_err(), Errno::EIO);
        }
    });
}

#[test]
fn dev_tty() {
    with_own_ptys(|| {
        let master = master();
        let end = slave(&master);
        raw(&end);
        let ctty =
            tty::open_controlling(end.as_fd(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC).unwrap();
        assert_eq!(tty::session(master.as_fd()), Err(Errno::ENOTTY));
        let files = again(vec![ctty, master, end]);
        write(&files[0], b"through /dev/tty");
        assert_eq!(read(&files[1], 16), b"through /dev/tty");
    });
}

#[test]
fn a_slave_whose_master_is_outside() {
    with_own_ptys(|| {
        let master = master();
        let end = slave(&master);
        let findings = Cycle::new().dump(&[&end]).unwrap();
        assert_eq!(findings[0].reason, "the terminal belongs to somebody outside the tree");
        assert!(findings[0].hint.contains("--shell-job"));

        let mut cycle = Cycle::new();
        let stat = nix::sys::stat::fstat(&end).unwrap();
        let key = super::key(image_dev(stat.st_rdev), image_dev(stat.st_dev));
        cycle.dump.common.externals.push(crate::settings::External { key: key.clone(), value: None });
        assert_eq!(cycle.dump(&[&end]).unwrap(), []);
        assert!(cycle.restore().is_err());
        let other = slave(&master);
        cycle.restore.inherit_fds.push(crate::settings::InheritFd { key, fd: other.as_raw_fd() });
        let restored = cycle.restore().unwrap().remove(&end.as_raw_fd()).unwrap();
        raw(&restored);
        write(&restored, b"mine");
        assert_eq!(read(&master, 4), b"mine");
    });
}
