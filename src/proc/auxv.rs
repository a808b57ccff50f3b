//! /proc/PID/auxv: what the kernel told the program at exec, as pairs of a key AT_* and a value.
//!
//! Kept as plain words, because that is how PR_SET_MM_MAP takes them back. A 32-bit program's halves are not told
//! apart here.

use super::ParseError;

const FILE: &str = "auxv";

/// Reads the words, the closing AT_NULL pair included. Empty for a zombie or a kernel thread.
pub fn parse(bytes: &[u8]) -> Result<Vec<u64>, ParseError> {
    let (words, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() || words.len() % 2 != 0 {
        return Err(ParseError::whole(FILE, "not a whole number of pairs"));
    }
    Ok(words.iter().map(|word| u64::from_ne_bytes(*word)).collect())
}

/// The value of the first pair with this key, such as `libc::AT_SYSINFO_EHDR`; AT_NULL ends the search.
pub fn get(words: &[u64], key: u64) -> Option<u64> {
    let (pairs, _) = words.as_chunks::<2>();
    pairs.iter().take_while(|[k, _]| *k != libc::AT_NULL).find(|[k, _]| *k == key).map(|[_, value]| *value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pairs() {
        let words = [libc::AT_PAGESZ, 4096, libc::AT_NULL, 0, libc::AT_UID, 5];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        assert_eq!(parse(&bytes).unwrap(), words);
        assert_eq!(get(&words, libc::AT_PAGESZ), Some(4096));
        assert_eq!(get(&words, libc::AT_UID), None);
        assert_eq!(parse(b""), Ok(vec![]));
        for cut in [1, 8, 24, 47] {
            assert!(parse(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn own_auxv() {
        let words = parse(&std::fs::read("/proc/self/auxv").unwrap()).unwrap();
        assert_eq!(get(&words, libc::AT_UID), Some(u64::from(nix::unistd::getuid().as_raw())));
        assert_eq!(words[words.len() - 2], libc::AT_NULL);
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>, words: Vec<u64>, key: u64) {
            let _ = parse(&bytes);
            let _ = get(&words, key);
        }
    }
}
