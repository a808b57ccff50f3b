//! /proc/locks, and the `lock:` lines of fdinfo, which look the same.
//!
//! /proc/locks shows who waits (`->`); fdinfo shows only what is held through that descriptor's file description. Pids are
//! those of the reader's pid namespace: 0 for a holder it cannot see, -1 for an OFD lock, which no process owns.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "locks";

/// Which call made the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// fcntl(F_SETLK)
    Posix,
    /// fcntl(F_OFD_SETLK)
    Ofdlck,
    Flock,
    /// fcntl(F_SETLEASE)
    Lease,
    /// A lease of the kernel's NFS server.
    Deleg,
    /// A probe of the kernel itself.
    Access,
    Unknown,
}

/// The second word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    Advisory,
    /// Until Linux 5.15.
    Mandatory,
    /// A lease that nobody asked back.
    Active,
    /// A lease that its holder must give up.
    Breaking,
    /// Somebody who waits for a lease to end.
    Breaker,
    NoInode,
    Unknown,
}

/// What the lock allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockType {
    Read,
    Write,
    Unlck,
}

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// The kernel's running number; the same for a lock and those who wait for it.
    pub id: u64,
    /// This one is not held but waits for the lock above it.
    pub waits: bool,
    pub kind: LockKind,
    pub mode: LockMode,
    pub typ: LockType,
    pub pid: i32,
    /// Major and minor; (0, 0) where the kernel has no inode.
    pub dev: (u32, u32),
    pub ino: u64,
    pub start: i64,
    /// Last byte, itself locked; `None` for the end of the file, wherever that will be.
    pub end: Option<i64>,
}

impl Lock {
    /// Reads one line, in fdinfo what stands behind `lock:`.
    pub(super) fn from_line(line: &[u8]) -> Option<Lock> {
        let mut s = Scan::new(line);
        s.blanks();
        let id = s.dec()?;
        s.text(b":")?;
        s.blanks();
        let waits = s.text(b"->").is_some();
        let kind = match s.word()? {
            b"POSIX" => LockKind::Posix,
            b"OFDLCK" => LockKind::Ofdlck,
            b"FLOCK" => LockKind::Flock,
            b"LEASE" => LockKind::Lease,
            b"DELEG" => LockKind::Deleg,
            b"ACCESS" => LockKind::Access,
            b"UNKNOWN" => LockKind::Unknown,
            _ => return None,
        };
        let mode = match s.word()? {
            b"ADVISORY" => LockMode::Advisory,
            b"MANDATORY" => LockMode::Mandatory,
            b"ACTIVE" => LockMode::Active,
            b"BREAKING" => LockMode::Breaking,
            b"BREAKER" => LockMode::Breaker,
            b"*NOINODE*" => LockMode::NoInode,
            b"UNKNOWN" => LockMode::Unknown,
            _ => return None,
        };
        let typ = match s.word()? {
            b"READ" => LockType::Read,
            b"WRITE" => LockType::Write,
            b"UNLCK" => LockType::Unlck,
            _ => return None,
        };
        s.blanks();
        let pid = s.signed_as()?;
        s.text(b" ")?;
        let (dev, ino) = if s.text(b"<none>:").is_some() {
            ((0, 0), s.dec()?)
        } else {
            let major = s.hex_as()?;
            s.text(b":")?;
            let minor = s.hex_as()?;
            s.text(b":")?;
            ((major, minor), s.dec()?)
        };
        s.text(b" ")?;
        let start = s.signed()?;
        s.text(b" ")?;
        let end = if s.text(b"EOF").is_some() { None } else { Some(s.signed()?) };
        s.end()?;
        Some(Lock { id, waits, kind, mode, typ, pid, dev, ino, start, end })
    }
}

/// Reads /proc/locks.
pub fn parse(bytes: &[u8]) -> Result<Vec<Lock>, ParseError> {
    lines(bytes)
        .map(|(number, line)| Lock::from_line(line).ok_or(ParseError::new(FILE, number, "not a lock")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_kinds() {
        let text = b"1: POSIX  ADVISORY  WRITE 5848 fe:00:10010839 5 14\n\
            1: -> POSIX  ADVISORY  READ  5849 fe:00:10010839 0 EOF\n\
            1:  -> POSIX  ADVISORY  READ  5850 fe:00:10010839 0 EOF\n\
            2: FLOCK  ADVISORY  WRITE 5848 103:ff:18446744073709551615 0 EOF\n\
            3: OFDLCK ADVISORY  READ  -1 00:2d:7 0 9223372036854775806\n\
            4: LEASE  ACTIVE    READ  12 00:2d:7 0 EOF\n\
            5: LEASE  BREAKING  UNLCK 12 00:2d:7 0 EOF\n\
            6: ACCESS *NOINODE*  WRITE 0 <none>:0 0 EOF\n";
        let locks = parse(text).unwrap();
        assert_eq!(
            locks[0],
            Lock {
                id: 1,
                waits: false,
                kind: LockKind::Posix,
                mode: LockMode::Advisory,
                typ: LockType::Write,
                pid: 5848,
                dev: (0xfe, 0),
                ino: 10_010_839,
                start: 5,
                end: Some(14),
            }
        );
        assert_eq!(
            (locks[1].id, locks[1].waits, locks[1].typ, locks[1].end),
            (1, true, LockType::Read, None)
        );
        assert!(locks[2].waits);
        assert_eq!((locks[3].kind, locks[3].dev, locks[3].ino), (LockKind::Flock, (0x103, 0xff), u64::MAX));
        assert_eq!((locks[4].kind, locks[4].pid, locks[4].end), (LockKind::Ofdlck, -1, Some(i64::MAX - 1)));
        assert_eq!((locks[5].kind, locks[5].mode), (LockKind::Lease, LockMode::Active));
        assert_eq!((locks[6].mode, locks[6].typ), (LockMode::Breaking, LockType::Unlck));
        assert_eq!((locks[7].mode, locks[7].dev, locks[7].ino), (LockMode::NoInode, (0, 0), 0));
    }

    #[test]
    fn malformed() {
        let good = "1: POSIX  ADVISORY  WRITE 5848 fe:00:10010839 5 14";
        assert!(parse(good.as_bytes()).is_ok());
        for len in 0..good.len() - 1 {
            assert_eq!(parse(&good.as_bytes()[..len]).is_ok(), len == 0, "{len}");
        }
        for (from, to) in [
            ("POSIX", "POSIXX"),
            ("WRITE", "WROTE"),
            ("5848", "584x"),
            ("14", "14 15"),
            ("fe:00", "fe"),
            ("1:", ""),
        ] {
            let error = parse(good.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert_eq!(error, ParseError { file: "locks", line: 1, what: "not a lock" }, "{to}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn never_panics_on_nearly_locks(line in "[0-9]{1,20}: (-> )?(POSIX |LEASE ) (ADVISORY|ACTIVE) +(READ|WRITE) -?[0-9]{1,11} [0-9a-f]{1,9}:[0-9a-f]{1,9}:[0-9]{1,21} -?[0-9]{1,20} (EOF|[0-9]{1,20})") {
            let _ = parse(line.as_bytes());
        }
    }
}
