//! /proc/PID/limits: the resource limits of a task, readable where prlimit of another user's task is refused.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "limits";

/// `unlimited`, the kernel's RLIM_INFINITY.
pub const UNLIMITED: u64 = u64::MAX;

/// One resource: what is enforced, and how far the task may raise it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub cur: u64,
    pub max: u64,
}

/// The kernel's text for each resource, by RLIMIT_ number.
const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// Reads all 16 limits, indexed by RLIMIT_ number. None may miss: the file is empty for a task that has just gone.
pub fn parse(bytes: &[u8]) -> Result<[Limit; 16], ParseError> {
    let mut found = [None; 16];
    for (number, line) in lines(bytes).skip(1) {
        let mut place = None;
        for (name, slot) in NAMES.iter().zip(&mut found) {
            let mut s = Scan::new(line);
            if s.text(name.as_bytes()).is_some() && s.rest().first() == Some(&b' ') {
                place = Some((slot, s));
                break;
            }
        }
        let (slot, mut s) = place.ok_or(ParseError::new(FILE, number, "unknown resource"))?;
        let mut read = || value(s.word()?);
        let (Some(cur), Some(max)) = (read(), read()) else {
            return Err(ParseError::new(FILE, number, "not a limit"));
        };
        if slot.replace(Limit { cur, max }).is_some() {
            return Err(ParseError::new(FILE, number, "resource is there twice"));
        }
    }
    let mut limits = [Limit { cur: 0, max: 0 }; 16];
    for (limit, slot) in limits.iter_mut().zip(found) {
        *limit = slot.ok_or(ParseError::whole(FILE, "a resource is missing"))?;
    }
    Ok(limits)
}

fn value(word: &[u8]) -> Option<u64> {
    if word == b"unlimited" {
        return Some(UNLIMITED);
    }
    let mut s = Scan::new(word);
    let value = s.dec()?;
    s.is_empty().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max file size             1                    unlimited            bytes     
Max data size             2                    3                    bytes     
Max stack size            8388608              unlimited            bytes     
Max core file size        0                    unlimited            bytes     
Max resident set          unlimited            unlimited            bytes     
Max processes             96365                96365                processes 
Max open files            20000                20001                files     
Max locked memory         8388608              8388608              bytes     
Max address space         unlimited            unlimited            bytes     
Max file locks            unlimited            unlimited            locks     
Max pending signals       96365                96365                signals   
Max msgqueue size         819200               819200               bytes     
Max nice priority         0                    0                    
Max realtime priority     7                    9                    
Max realtime timeout      unlimited            18446744073709551614 us        
";

    #[test]
    fn all_in_order() {
        let limits = parse(TEXT.as_bytes()).unwrap();
        let at = |resource: u32| limits[resource as usize];
        assert_eq!(at(libc::RLIMIT_CPU), Limit { cur: UNLIMITED, max: UNLIMITED });
        assert_eq!(at(libc::RLIMIT_FSIZE), Limit { cur: 1, max: UNLIMITED });
        assert_eq!(at(libc::RLIMIT_DATA), Limit { cur: 2, max: 3 });
        assert_eq!(at(libc::RLIMIT_NOFILE), Limit { cur: 20000, max: 20001 });
        assert_eq!(at(libc::RLIMIT_NICE), Limit { cur: 0, max: 0 });
        assert_eq!(at(libc::RLIMIT_RTPRIO), Limit { cur: 7, max: 9 });
        assert_eq!(at(libc::RLIMIT_RTTIME), Limit { cur: UNLIMITED, max: UNLIMITED - 1 });
    }

    #[test]
    fn own_limits_agree_with_getrlimit() {
        let limits = parse(&std::fs::read("/proc/self/limits").unwrap()).unwrap();
        for (resource, limit) in [
            (nix::sys::resource::Resource::RLIMIT_NOFILE, limits[libc::RLIMIT_NOFILE as usize]),
            (nix::sys::resource::Resource::RLIMIT_STACK, limits[libc::RLIMIT_STACK as usize]),
            (nix::sys::resource::Resource::RLIMIT_MSGQUEUE, limits[libc::RLIMIT_MSGQUEUE as usize]),
            (nix::sys::resource::Resource::RLIMIT_CORE, limits[libc::RLIMIT_CORE as usize]),
        ] {
            assert_eq!(nix::sys::resource::getrlimit(resource), Ok((limit.cur, limit.max)), "{resource:?}");
        }
    }

    #[test]
    fn malformed() {
        let error = |text: String| parse(text.as_bytes()).map_err(|e| (e.line, e.what)).unwrap_err();
        assert_eq!(error(String::new()), (0, "a resource is missing"));
        for (cut, name) in NAMES.iter().enumerate() {
            let text: String =
                TEXT.lines().filter(|l| !l.starts_with(name)).map(|l| format!("{l}\n")).collect();
            assert_eq!(error(text), (0, "a resource is missing"), "{cut}");
        }
        assert_eq!(error(TEXT.replace("Max nice", "Max nicer")), (15, "unknown resource"));
        assert_eq!(error(TEXT.replace("file locks  ", "cpu time    ")), (12, "resource is there twice"));
        assert_eq!(error(TEXT.replace("20001", "x")), (9, "not a limit"));
        assert_eq!(error(TEXT.replace("18446744073709551614", "18446744073709551616")), (17, "not a limit"));
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
