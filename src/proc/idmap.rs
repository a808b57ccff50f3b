//! /proc/PID/uid_map and gid_map: how ids of a user namespace look to the reader.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "uid_map or gid_map";

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id inside the namespace.
    pub inside: u32,
    /// The same id as the reader sees it; u32::MAX when it does not.
    pub outside: u32,
    pub count: u32,
}

/// Reads the ranges; empty for a namespace whose map was not written yet.
pub fn parse(bytes: &[u8]) -> Result<Vec<IdRange>, ParseError> {
    let one = |line| {
        let mut s = Scan::new(line);
        let mut next = || {
            s.blanks();
            s.dec_as()
        };
        let range = IdRange { inside: next()?, outside: next()?, count: next()? };
        s.end()?;
        (range.count > 0).then_some(range)
    };
    lines(bytes)
        .map(|(number, line)| one(line).ok_or(ParseError::new(FILE, number, "not a range of ids")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges() {
        let got = parse(b"         0          0 4294967295\n         1     100000      65536\n").unwrap();
        let all = IdRange { inside: 0, outside: 0, count: u32::MAX };
        assert_eq!(got, [all, IdRange { inside: 1, outside: 100_000, count: 65536 }]);
        assert_eq!(parse(b""), Ok(vec![]));
        assert!(parse(&std::fs::read("/proc/self/uid_map").unwrap()).is_ok());
    }

    #[test]
    fn malformed() {
        for bad in ["\n", "0 0\n", "0 0 0\n", "0 0 4294967296\n", "0 0 1 1\n", "0 x 1\n"] {
            let error = parse(format!("0 0 1\n{bad}").as_bytes()).unwrap_err();
            assert_eq!((error.line, error.what), (2, "not a range of ids"), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
