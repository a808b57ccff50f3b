//! Files of /proc that hold one number: personality and coredump_filter in hexadecimal, loginuid, sessionid,
//! timerslack_ns and /proc/sys/kernel/pid_max in decimal, oom_score_adj with a sign. And files of /sys that hold a list of
//! them: which processors there are.

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

/// Highest number in a list.
const LIST_MAX: u64 = 1 << 16;

/// Reads a list such as `0-3,8`: bit N of the result, lowest byte first, is set for N.
pub fn bits_of_list(file: &'static str, bytes: &[u8]) -> Result<Vec<u8>, ParseError> {
    let bad = || ParseError::new(file, 1, "not a list of numbers");
    let mut s = Scan::new(bytes.strip_suffix(b"\n").unwrap_or(bytes));
    let mut bits = Vec::new();
    while !s.is_empty() {
        let first = s.dec().ok_or_else(bad)?;
        let last = if s.text(b"-").is_some() { s.dec().ok_or_else(bad)? } else { first };
        if last < first || last >= LIST_MAX || (!s.is_empty() && s.text(b",").is_none()) {
            return Err(bad());
        }
        for number in first..=last {
            let byte = usize::try_from(number / 8).map_err(|_| bad())?;
            bits.resize(bits.len().max(byte + 1), 0u8);
            bits.get_mut(byte).into_iter().for_each(|byte| *byte |= 1 << (number % 8));
        }
    }
    Ok(bits)
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

    #[test]
    fn lists() {
        assert_eq!(bits_of_list("online", b"0-3,8\n"), Ok(vec![0b1111, 1]));
        assert_eq!(bits_of_list("online", b"17"), Ok(vec![0, 0, 2]));
        assert_eq!(bits_of_list("online", b"\n"), Ok(Vec::new()));
        for bad in [&b"1-"[..], b"3-1", b"1;2", b"a", b"0-99999999999", b"65536", b",1"] {
            assert!(bits_of_list("online", bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = (dec("a", &bytes), signed("a", &bytes), hex("a", &bytes), bits_of_list("a", &bytes));
        }
    }
}
