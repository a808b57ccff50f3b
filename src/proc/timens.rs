//! /proc/PID/timens_offsets: what the time namespace of a task's children adds to the clocks.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "timens_offsets";

/// (seconds, nanoseconds); the nanoseconds are never negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimensOffsets {
    pub monotonic: (i64, u32),
    pub boottime: (i64, u32),
}

/// Reads both offsets.
pub fn parse(bytes: &[u8]) -> Result<TimensOffsets, ParseError> {
    let mut monotonic = None;
    let mut boottime = None;
    for (number, line) in lines(bytes) {
        let mut s = Scan::new(line);
        let slot = match s.word() {
            Some(b"monotonic") => &mut monotonic,
            Some(b"boottime") => &mut boottime,
            _ => return Err(ParseError::new(FILE, number, "unknown clock")),
        };
        *slot = Some(offset(s).ok_or(ParseError::new(FILE, number, "not an offset"))?);
    }
    Ok(TimensOffsets {
        monotonic: monotonic.ok_or(ParseError::whole(FILE, "monotonic"))?,
        boottime: boottime.ok_or(ParseError::whole(FILE, "boottime"))?,
    })
}

fn offset(mut s: Scan<'_>) -> Option<(i64, u32)> {
    s.blanks();
    let seconds = s.signed()?;
    s.blanks();
    let nanoseconds = s.dec_as()?;
    s.end()?;
    (nanoseconds < 1_000_000_000).then_some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn offsets() {
        let got = parse(b"monotonic         -10 999999999\nboottime           86400         0\n");
        assert_eq!(got, Ok(TimensOffsets { monotonic: (-10, 999_999_999), boottime: (86400, 0) }));
    }

    #[test]
    fn malformed() {
        let error = |text: &str| parse(text.as_bytes()).map_err(|e| (e.line, e.what)).unwrap_err();
        assert_eq!(error(""), (0, "monotonic"));
        assert_eq!(error("monotonic 0 0\n"), (0, "boottime"));
        assert_eq!(error("monotonic 0 0\nrealtime 0 0\n"), (2, "unknown clock"));
        assert_eq!(error("monotonic 0 1000000000\n"), (1, "not an offset"));
        assert_eq!(error("monotonic 0\n"), (1, "not an offset"));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
