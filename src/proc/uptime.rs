//! /proc/uptime: seconds since boot with two decimals, and the idle time of all processors, which nobody needs.

use std::time::Duration;

use super::ParseError;
use super::scan::Scan;

const FILE: &str = "uptime";

/// Reads the time since boot, by the boot clock of the reader's time namespace.
pub fn parse(bytes: &[u8]) -> Result<Duration, ParseError> {
    let read = || {
        let mut s = Scan::new(bytes);
        let seconds = s.dec()?;
        s.text(b".")?;
        let hundredths = s.dec_as::<u32>().filter(|h| *h < 100)?;
        s.text(b" ")?;
        Some(Duration::new(seconds, hundredths * 10_000_000))
    };
    read().ok_or(ParseError::new(FILE, 1, "not a time"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times() {
        assert_eq!(parse(b"938.09 1794.11\n"), Ok(Duration::from_millis(938_090)));
        assert!(parse(&std::fs::read("/proc/uptime").unwrap()).unwrap() > Duration::ZERO);
        for bad in [&b""[..], b"938", b"938.", b"938.100 1\n", b".1 1\n", b"938.09\n"] {
            assert_eq!(parse(bad), Err(ParseError { file: "uptime", line: 1, what: "not a time" }));
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
