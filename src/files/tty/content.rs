//! What waits in a pty to be read, on either side (`tty-data.img`).
//!
//! The kernel shows it to a reader only. So it is read and put back at once, while nobody in the tree runs and with
//! settings under which it stays what it is; terminals in which nothing waits are not touched but for a look with the line
//! editor off. An end-of-file character that was typed and waits comes back as a NUL.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::FileError;
use crate::sys::{Errno, pipe, tty};

const ICANON: u32 = libc::ICANON;
/// Of the control characters, those that end a line.
const LINE_ENDS: [usize; 2] = [libc::VEOL, libc::VEOL2];
/// More than a pty holds: 4 KiB in the line editor, 64 KiB on the way.
const MOST: usize = 1 << 20;
/// How long the kernel may take to carry bytes from one end to the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// Both ends of a pty.
#[derive(Debug)]
pub(super) struct Ends<'a> {
    pub(super) master: BorrowedFd<'a>,
    pub(super) slave: BorrowedFd<'a>,
}

/// Settings under which bytes pass as they are; `canonical` keeps lines apart.
fn transparent(of: &tty::Termios, canonical: bool) -> tty::Termios {
    let mut cc = [0; 19];
    for index in LINE_ENDS {
        if let (Some(to), Some(from)) = (cc.get_mut(index), of.cc.get(index)) {
            *to = *from;
        }
    }
    if let Some(min) = cc.get_mut(libc::VMIN)
        && !canonical
    {
        *min = 1;
    }
    tty::Termios { iflag: 0, oflag: 0, lflag: if canonical { ICANON } else { 0 }, cc, ..*of }
}

fn set(fd: BorrowedFd<'_>, termios: &tty::Termios) -> Result<(), FileError> {
    tty::set_termios(fd, termios).map_err(FileError::sys("set a terminal up to look into it"))
}

/// Whether bytes wait; what is on its way arrives first.
fn readable(fd: BorrowedFd<'_>) -> Result<bool, FileError> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).map_err(FileError::sys("poll a terminal"))?;
    Ok(fds.iter().any(|fd| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLIN))))
}

fn read_all(fd: BorrowedFd<'_>) -> Result<Vec<u8>, FileError> {
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    while all.len() < MOST && readable(fd)? {
        match nix::unistd::read(fd, &mut piece) {
            Ok(0) | Err(Errno::EAGAIN | Errno::EIO) => break,
            Ok(len) => all.extend_from_slice(piece.get(..len).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(FileError::sys("read what waits in a terminal")(e)),
        }
    }
    Ok(all)
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), FileError> {
    let until = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::from(100u8)).map_err(FileError::sys("poll a terminal"))?;
        let can = fds.iter().any(|fd| fd.revents().is_some_and(|e| e.contains(PollFlags::POLLOUT)));
        if !can && Instant::now() < until {
            continue;
        }
        if Instant::now() >= until {
            return Err(FileError::sys("put everything back that waited in a terminal")(Errno::ENOSPC));
        }
        match nix::unistd::write(fd, bytes) {
            Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(e) => return Err(FileError::sys("put back what waited in a terminal")(e)),
        }
    }
    Ok(())
}

impl Ends<'_> {
    /// What the master, and what the slave would read.
    pub(super) fn dump(&self) -> Result<(Vec<u8>, Vec<u8>), FileError> {
        let before = tty::termios(self.slave).map_err(FileError::sys("read the settings of a terminal"))?;
        let packets =
            tty::packet_mode(self.master).map_err(FileError::sys("read the packet mode of a pty"))?;
        if packets {
            tty::set_packet_mode(self.master, false).map_err(FileError::sys("leave packet mode"))?;
        }
        let taken = self.take(&before);
        // Whatever happened, the terminal gets its settings back.
        let put_back = set(self.slave, &before);
        if packets {
            tty::set_packet_mode(self.master, true).map_err(FileError::sys("enter packet mode again"))?;
        }
        put_back.and(taken)
    }

    fn take(&self, before: &tty::Termios) -> Result<(Vec<u8>, Vec<u8>), FileError> {
        let to_master = read_all(self.master)?;
        self.put(&to_master, &[], before)?;
        let canonical = before.lflag & ICANON != 0;
        if canonical && !readable(self.slave)? {
            // A line that is not finished shows only with the line editor off.
            set(self.slave, &transparent(before, false))?;
            if !readable(self.slave)? {
                return Ok((to_master, Vec::new()));
            }
        }
        set(self.slave, &transparent(before, false))?;
        let to_slave = read_all(self.slave)?;
        self.put(&[], &to_slave, before)?;
        Ok((to_master, to_slave))
    }

    /// Makes `to_master` and `to_slave` wait to be read. `then`: the settings the slave gets in the end, which the caller
    /// sets.
    pub(super) fn put(
        &self,
        to_master: &[u8],
        to_slave: &[u8],
        then: &tty::Termios,
    ) -> Result<(), FileError> {
        if !to_master.is_empty() {
            set(self.slave, &transparent(then, then.lflag & ICANON != 0))?;
            write_all(self.slave, to_master)?;
        }
        if !to_slave.is_empty() {
            let canonical = then.lflag & ICANON != 0;
            set(self.slave, &transparent(then, canonical))?;
            let is_end = |&byte: &u8| {
                byte == b'\n' || byte != 0 && LINE_ENDS.iter().any(|index| then.cc.get(*index) == Some(&byte))
            };
            let lines = if canonical {
                to_slave.iter().rposition(is_end).map_or(0, |at| at + 1)
            } else {
                to_slave.len()
            };
            let (whole, begun) = to_slave.split_at(lines);
            write_all(self.master, whole)?;
            self.arrived(whole.len())?;
            if !begun.is_empty() {
                write_all(self.master, begun)?;
                self.settle(whole.is_empty())?;
            }
        }
        Ok(())
    }

    /// Waits until the slave can read `len` bytes.
    fn arrived(&self, len: usize) -> Result<(), FileError> {
        let until = Instant::now() + PATIENCE;
        loop {
            readable(self.slave)?;
            let there =
                pipe::readable_bytes(self.slave).map_err(FileError::sys("read the amount in a terminal"))?;
            // The line editor holds 4095 bytes; what is behind them comes as it is read.
            if there as usize >= len.min(4000) || Instant::now() > until {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until a line that was begun has arrived, which nothing shows.
    fn settle(&self, alone: bool) -> Result<(), FileError> {
        // A poll that finds nothing carries everything over first.
        readable(self.slave)?;
        if !alone {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// A description of the slave that goes when dropped, to look through.
pub(super) fn open_slave(master: &OwnedFd) -> Result<OwnedFd, FileError> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    tty::open_peer(master.as_fd(), flags).map_err(FileError::sys("open the slave of a pty"))
}
