//! /proc/PID/task/TID/children: the pids that this thread forked, also zombies.
//!
//! The list is only complete while the children cannot end: of a running tree it may skip some.

use super::ParseError;
use super::scan::Scan;

const FILE: &str = "children";

/// Reads the list; empty for a thread that has none.
pub fn parse(bytes: &[u8]) -> Result<Vec<i32>, ParseError> {
    let mut pids = Vec::new();
    let mut s = Scan::new(bytes.strip_suffix(b"\n").unwrap_or(bytes));
    while let Some(word) = s.word() {
        let mut word = Scan::new(word);
        match word.dec_as() {
            Some(pid @ 1..) if word.is_empty() => pids.push(pid),
            _ => return Err(ParseError::new(FILE, 1, "not a pid")),
        }
    }
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists() {
        assert_eq!(parse(b""), Ok(vec![]));
        assert_eq!(parse(b"7 "), Ok(vec![7]));
        assert_eq!(parse(b"7 8 4194304 "), Ok(vec![7, 8, 4_194_304]));
    }

    #[test]
    fn malformed() {
        for bad in [&b"x "[..], b"7 -1 ", b"0 ", b"2147483648 ", b"7x ", b"7\n8 "] {
            assert_eq!(parse(bad), Err(ParseError { file: "children", line: 1, what: "not a pid" }));
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn come_back(pids in proptest::collection::vec(1..i32::MAX, 0..50)) {
            let text: String = pids.iter().map(|p| format!("{p} ")).collect();
            prop_assert_eq!(parse(text.as_bytes()), Ok(pids));
        }
    }
}
