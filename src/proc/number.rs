//! Files of /proc that hold one number: personality and coredump_filter in hexadecimal, loginuid, sessionid,
//! timerslack_ns and /proc/sys/kernel/pid_max in decimal, oom_score_adj with a sign.

use super::ParseError;
use super::scan::Scan;

/// Reads a decimal number. `file` is for the error.
pub fn dec(file: &'static str, bytes: &[u8]) -> Result<u64, ParseError> {
    only(file, bytes, Scan::dec)
}

/// Reads a decimal number that may be negative.
pub fn signed(file: &'static str, bytes: &[u8]) -> Result<i64, ParseError> {
    only(file, bytes, Scan::signed)
}

/// Reads a hexadecimal number without `0x`.
pub fn hex(file: &'static str, bytes: &[u8]) -> Result<u64, ParseError> {
    only(file, bytes, Scan::hex)
}

fn only<'a, T>(
    file: &'static str,
    bytes: &'a [u8],
    read: impl FnOnce(&mut Scan<'a>) -> Option<T>,
) -> Result<T, ParseError> {
    let mut s = Scan::new(bytes.strip_suffix(b"\n").unwrap_or(bytes));
    read(&mut s).filter(|_| s.is_empty()).ok_or(ParseError::new(file, 1, "not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers() {
        assert_eq!(dec("loginuid", b"4294967295"), Ok(4_294_967_295));
        assert_eq!(signed("oom_score_adj", b"-1000\n"), Ok(-1000));
        assert_eq!(hex("personality", b"00040000\n"), Ok(0x40000));
        assert!(hex("personality", &std::fs::read("/proc/self/personality").unwrap()).is_ok());
        let error = ParseError { file: "personality", line: 1, what: "not a number" };
        for bad in [&b""[..], b"\n", b"0x1", b"1 ", b"1\n\n", b"-1"] {
            assert_eq!(hex("personality", bad), Err(error));
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = (dec("a", &bytes), signed("a", &bytes), hex("a", &bytes));
        }
    }
}
