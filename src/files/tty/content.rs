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
/// The line editor holds somewhat more.
const FITS: usize = 4000;
/// How long the kernel may take to carry bytes from one end to the other.
const PATIENCE: Duration = Duration::from_secs(5);

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
        // A line that is not finished shows only with the line editor off.
        let to_slave = set(self.slave, &transparent(before, false)).and_then(|()| read_all(self.slave));
        // What was taken out goes back, whatever went wrong.
        let put_back = self.put(&to_master, to_slave.as_deref().unwrap_or_default(), before);
        put_back.and(to_slave).map(|to_slave| (to_master, to_slave))
    }

    /// Makes `to_master` and `to_slave` wait to be read. `then`: the settings the slave gets in the end, which the caller
    /// sets.
    pub(super) fn put(
        &self,
        to_master: &[u8],
        to_slave: &[u8],
        then: &tty::Termios,
    ) -> Result<(), FileError> {
        let plain = transparent(then, then.lflag & ICANON != 0);
        // First, so that the master has nothing to read yet but what comes back from here.
        if !to_slave.is_empty() {
            set(self.slave, &plain)?;
            let is_end = |&byte: &u8| {
                byte == b'\n' || byte != 0 && LINE_ENDS.iter().any(|index| then.cc.get(*index) == Some(&byte))
            };
            let lines = if plain.lflag & ICANON != 0 {
                to_slave.iter().rposition(is_end).map_or(0, |at| at + 1)
            } else {
                to_slave.len()
            };
            let (whole, begun) = to_slave.split_at(lines);
            write_all(self.master, whole)?;
            self.arrived(whole.len())?;
            if to_slave.len() > FITS {
                // What does not fit into the line editor has no echo yet: it arrives as the rest is read.
                write_all(self.master, begun)?;
            } else if !begun.is_empty() {
                // Nobody can read a line that was begun. That it has arrived is seen by its echo.
                set(self.slave, &tty::Termios { lflag: plain.lflag | libc::ECHO, ..plain })?;
                write_all(self.master, begun)?;
                self.take_echo(begun.len())?;
            }
        }
        if !to_master.is_empty() {
            set(self.slave, &plain)?;
            write_all(self.slave, to_master)?;
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
            // What is behind them comes as it is read.
            if there as usize >= len.min(FITS) || Instant::now() > until {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reads `len` bytes, the echo, from the master.
    fn take_echo(&self, mut len: usize) -> Result<(), FileError> {
        let late = FileError::sys("see a line arrive in a terminal");
        let until = Instant::now() + PATIENCE;
        let mut piece = [0; 4096];
        while len > 0 {
            let mut fds = [PollFd::new(self.master, PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(100u8)).map_err(FileError::sys("poll a terminal"))?;
            if fds.iter().any(|fd| fd.revents().is_some_and(|e| e.contains(PollFlags::POLLIN))) {
                let most = len.min(piece.len());
                match nix::unistd::read(self.master, piece.get_mut(..most).unwrap_or_default()) {
                    Ok(got) => len = len.saturating_sub(got),
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    Err(e) => return Err(FileError::sys("read the echo of a terminal")(e)),
                }
            }
            if len > 0 && Instant::now() > until {
                return Err(late(Errno::ETIMEDOUT));
            }
        }
        Ok(())
    }
}

/// A description of the slave that goes when dropped, to look through.
pub(super) fn open_slave(master: &OwnedFd) -> Result<OwnedFd, FileError> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
    tty::open_peer(master.as_fd(), flags).map_err(FileError::sys("open the slave of a pty"))
}
