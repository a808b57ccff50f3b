//! /proc/PID/timers: the POSIX timers of a process, without their times, which only the task itself can ask for.
//!
//! There only with CONFIG_POSIX_TIMERS and CONFIG_CHECKPOINT_RESTORE.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "timers";

/// One timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timer {
    pub id: i32,
    pub signal: i32,
    /// The value that comes with the signal.
    pub sigval: u64,
    /// `sigev_notify` as timer_create takes it: SIGEV_SIGNAL, NONE or THREAD, with SIGEV_THREAD_ID or not.
    pub sigev_notify: i32,
    /// Process, or thread with SIGEV_THREAD_ID, in the pid namespace of this /proc; 0 when it is gone or not visible.
    pub target: i32,
    pub clockid: i32,
}

/// Reads the list; empty for a process without timers.
pub fn parse(bytes: &[u8]) -> Result<Vec<Timer>, ParseError> {
    let mut timers = Vec::new();
    let mut all = lines(bytes);
    while let Some(first) = all.next() {
        let id = field(Some(first), b"ID: ", "ID", Scan::signed_as)?;
        let (signal, sigval) = field(all.next(), b"signal: ", "signal", |s| {
            let signal = s.signed_as()?;
            s.text(b"/")?;
            Some((signal, s.hex()?))
        })?;
        let (sigev_notify, target) = field(all.next(), b"notify: ", "notify", |s| {
            let how = match s.until(b'/')? {
                b"signal" => libc::SIGEV_SIGNAL,
                b"none" => libc::SIGEV_NONE,
                b"thread" => libc::SIGEV_THREAD,
                _ => return None,
            };
            let thread = match s.until(b'.')? {
                b"pid" => 0,
                b"tid" => libc::SIGEV_THREAD_ID,
                _ => return None,
            };
            Some((how | thread, s.signed_as()?))
        })?;
        let clockid = field(all.next(), b"ClockID: ", "ClockID", Scan::signed_as)?;
        timers.push(Timer { id, signal, sigval, sigev_notify, target, clockid });
    }
    Ok(timers)
}

fn field<'a, T>(
    line: Option<(usize, &'a [u8])>,
    key: &[u8],
    what: &'static str,
    read: impl FnOnce(&mut Scan<'a>) -> Option<T>,
) -> Result<T, ParseError> {
    let (number, line) = line.ok_or(ParseError::whole(FILE, what))?;
    let mut s = Scan::new(line);
    s.text(key)
        .and_then(|()| read(&mut s))
        .filter(|_| s.end().is_some())
        .ok_or(ParseError::new(FILE, number, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "ID: 1\nsignal: 10/00007ffe0000dead\nnotify: signal/pid.5848\nClockID: 1\n\
        ID: 0\nsignal: 14/0000000000000000\nnotify: none/pid.0\nClockID: -6\n\
        ID: 7\nsignal: 34/ffffffffffffffff\nnotify: signal/tid.5850\nClockID: 0\n\
        ID: 8\nsignal: 0/0000000000000001\nnotify: thread/pid.5848\nClockID: 7\n";

    #[test]
    fn all_kinds() {
        let timers = parse(TEXT.as_bytes()).unwrap();
        let first = Timer {
            id: 1,
            signal: 10,
            sigval: 0x7ffe_0000_dead,
            sigev_notify: libc::SIGEV_SIGNAL,
            target: 5848,
            clockid: 1,
        };
        assert_eq!(timers[0], first);
        assert_eq!((timers[1].id, timers[1].sigev_notify, timers[1].clockid), (0, libc::SIGEV_NONE, -6));
        assert_eq!(
            (timers[2].sigev_notify, timers[2].target, timers[2].sigval),
            (libc::SIGEV_THREAD_ID, 5850, u64::MAX)
        );
        assert_eq!(timers[3].sigev_notify, libc::SIGEV_THREAD);
        assert_eq!(parse(b""), Ok(vec![]));
    }

    #[test]
    fn malformed() {
        let error = |text: String| parse(text.as_bytes()).map_err(|e| (e.line, e.what)).unwrap_err();
        assert_eq!(error(TEXT.replace("ClockID: 7\n", "")), (0, "ClockID"));
        assert_eq!(error(TEXT.replace("ClockID: 1\n", "")), (4, "ClockID"));
        assert_eq!(error(TEXT.replace("none/", "some/")), (7, "notify"));
        assert_eq!(error(TEXT.replace("tid.", "gid.")), (11, "notify"));
        assert_eq!(error(TEXT.replace("10/", "10/x")), (2, "signal"));
        assert_eq!(error(TEXT.replace("ID: 0", "ID: 0 0")), (5, "ID"));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn never_panics_when_damaged(at in 0..TEXT.len(), byte: u8, cut in 0..TEXT.len()) {
            let mut bytes = TEXT.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse(&bytes);
            bytes.truncate(cut);
            let _ = parse(&bytes);
        }
    }
}
