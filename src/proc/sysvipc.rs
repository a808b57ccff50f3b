//! /proc/sysvipc/sem: the sets of System V semaphores of the reader's IPC namespace.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "sysvipc/sem";

/// One set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SemaphoreSet {
    /// Its id.
    pub id: i32,
    /// How many semaphores it has.
    pub count: u32,
    /// Seconds since the epoch of the last operation, 0 for none.
    pub otime: u64,
}

/// Reads all sets.
pub fn semaphores(bytes: &[u8]) -> Result<Vec<SemaphoreSet>, ParseError> {
    // A line with the names of the columns comes first: key semid perms nsems uid gid cuid cgid otime ctime.
    lines(bytes).skip(1).map(|(n, line)| set(line).ok_or(ParseError::new(FILE, n, "not a set"))).collect()
}

fn set(line: &[u8]) -> Option<SemaphoreSet> {
    let mut s = Scan::new(line);
    let mut column = || {
        s.blanks();
        s.signed()
    };
    let _key = column()?;
    let id = column()?.try_into().ok()?;
    let _perms = column()?;
    let count = column()?.try_into().ok()?;
    for _ in 0..4 {
        // uid_t may be as large as 4294967295, which is still a number.
        column()?;
    }
    let otime = column()?.try_into().ok()?;
    Some(SemaphoreSet { id, count, otime })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sets() {
        let text = b"       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n\
            \x20        0          0   600          1     0     0     0     0          0 1795750327\n\
            1997170858     32769   666         17 4294967295  1000     0     0 1795755561 1795750327\n";
        let all = semaphores(text).unwrap();
        assert_eq!(all[0], SemaphoreSet { id: 0, count: 1, otime: 0 });
        assert_eq!(all[1], SemaphoreSet { id: 32769, count: 17, otime: 1_795_755_561 });
        assert_eq!(all.len(), 2);
        assert!(semaphores(b"key\n 1 2 3\n").is_err());
        if let Ok(bytes) = std::fs::read("/proc/sysvipc/sem") {
            semaphores(&bytes).unwrap();
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = semaphores(&bytes);
        }
    }
}
