//! What a terminal is set to, and its entry in `tty-info.img`.

use std::os::fd::BorrowedFd;

use super::super::FileError;
use crate::{
    image::pb,
    sys::{Errno, tty},
};

/// Control characters of the kernel's termios.
const CC: usize = 19;

/// Reads what both ends have in common; `None` for a terminal that was hung up.
pub(super) fn dump(fd: BorrowedFd<'_>) -> Result<Option<pb::TtyInfoEntry>, FileError> {
    let termios = match tty::termios(fd) {
        Ok(termios) => termios,
        Err(Errno::EIO) => return Ok(None),
        Err(e) => return Err(FileError::sys("read the settings of a terminal (TCGETS2)")(e)),
    };
    let locked = tty::locked_termios(fd).map_err(FileError::sys("read locked terminal settings"))?;
    let size = tty::winsize(fd).map_err(FileError::sys("read the size of a terminal"))?;
    let exclusive = tty::exclusive(fd).map_err(FileError::sys("read the exclusive mode of a terminal"))?;
    Ok(Some(pb::TtyInfoEntry {
        exclusive,
        termios: Some(termios_entry(&termios)),
        termios_locked: Some(termios_entry(&locked)),
        winsize: Some(pb::WinsizeEntry {
            ws_row: size.rows.into(),
            ws_col: size.cols.into(),
            ws_xpixel: size.xpixel.into(),
            ws_ypixel: size.ypixel.into(),
        }),
        ..Default::default()
    }))
}

/// CRIU packs the characters, four to a word, into the first words of `c_cc`, and writes 19 words.
fn termios_entry(termios: &tty::Termios) -> pb::TermiosEntry {
    let mut cc: Vec<u32> = termios
        .cc
        .chunks(4)
        .map(|four| four.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte)))
        .collect();
    cc.resize(CC, 0);
    pb::TermiosEntry {
        c_iflag: termios.iflag,
        c_oflag: termios.oflag,
        c_cflag: termios.cflag,
        c_lflag: termios.lflag,
        c_line: termios.line.into(),
        c_ispeed: termios.ispeed,
        c_ospeed: termios.ospeed,
        c_cc: cc,
    }
}

/// The settings in an entry.
pub(super) fn termios(entry: &pb::TermiosEntry) -> tty::Termios {
    let mut cc = [0; CC];
    let bytes = entry.c_cc.iter().flat_map(|word| word.to_le_bytes());
    cc.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    tty::Termios {
        iflag: entry.c_iflag,
        oflag: entry.c_oflag,
        cflag: entry.c_cflag,
        lflag: entry.c_lflag,
        // Another line discipline than N_TTY has state of its own.
        line: 0,
        cc,
        ispeed: entry.c_ispeed,
        ospeed: entry.c_ospeed,
    }
}

/// Sets what `info` says, but not what would be in the way of opening it.
pub(super) fn apply(fd: BorrowedFd<'_>, info: &pb::TtyInfoEntry) -> Result<(), FileError> {
    if let Some(entry) = &info.termios {
        tty::set_termios(fd, &termios(entry)).map_err(FileError::sys("set a terminal up (TCSETS2)"))?;
    }
    if let Some(entry) = info.termios_locked.as_ref().map(termios).filter(is_any) {
        tty::set_locked_termios(fd, &entry).map_err(FileError::sys("lock terminal settings"))?;
    }
    if let Some(size) = &info.winsize {
        let word = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size = tty::Winsize {
            rows: word(size.ws_row),
            cols: word(size.ws_col),
            xpixel: word(size.ws_xpixel),
            ypixel: word(size.ws_ypixel),
        };
        tty::set_winsize(fd, &size).map_err(FileError::sys("set the size of a terminal"))?;
    }
    Ok(())
}

fn is_any(locked: &tty::Termios) -> bool {
    // CRIU leaves rubbish behind the 19 characters, which `termios` does not take.
    *locked != tty::Termios::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_packed() {
        let cc: [u8; CC] = std::array::from_fn(|i| i as u8 + 1);
        let want = tty::Termios { iflag: 1, oflag: 2, cflag: 3, lflag: 4, line: 0, cc, ispeed: 5, ospeed: 6 };
        let entry = termios_entry(&want);
        assert_eq!((entry.c_cc.len(), entry.c_cc[0], entry.c_cc[4]), (CC, 0x0403_0201, 0x0013_1211));
        assert_eq!(termios(&entry), want);
        let short = pb::TermiosEntry { c_cc: vec![u32::MAX], ..entry };
        assert_eq!(termios(&short).cc[..5], [255, 255, 255, 255, 0]);
    }
}
