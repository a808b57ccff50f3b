//! /proc/PID/ns/*: the link text that names a namespace, such as `pid:[4026531836]`.
//!
//! The number is the namespace's inode in nsfs. It is unique among living namespaces, but a dead one's may come again.

use super::ParseError;
use super::scan::Scan;

const FILE: &str = "ns";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NsKind {
    Cgroup,
    Ipc,
    Mnt,
    Net,
    Pid,
    Time,
    User,
    Uts,
}

impl NsKind {
    pub const ALL: [NsKind; 8] = [
        NsKind::Cgroup,
        NsKind::Ipc,
        NsKind::Mnt,
        NsKind::Net,
        NsKind::Pid,
        NsKind::Time,
        NsKind::User,
        NsKind::Uts,
    ];

    /// The name in /proc/PID/ns and in link texts.
    pub fn name(self) -> &'static str {
        match self {
            NsKind::Cgroup => "cgroup",
            NsKind::Ipc => "ipc",
            NsKind::Mnt => "mnt",
            NsKind::Net => "net",
            NsKind::Pid => "pid",
            NsKind::Time => "time",
            NsKind::User => "user",
            NsKind::Uts => "uts",
        }
    }
}

/// One namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NsLink {
    pub kind: NsKind,
    pub ino: u64,
}

/// Reads the text of a link in /proc/PID/ns, of an nsfs descriptor, or the root of an nsfs mount.
pub fn parse(text: &[u8]) -> Result<NsLink, ParseError> {
    let link = || {
        let mut s = Scan::new(text);
        let word = s.until(b':')?;
        let kind = NsKind::ALL.into_iter().find(|kind| kind.name().as_bytes() == word)?;
        s.text(b"[")?;
        let ino = s.dec()?;
        (s.rest() == b"]").then_some(NsLink { kind, ino })
    };
    link().ok_or(ParseError::new(FILE, 1, "not a namespace"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn own_namespaces() {
        let mut seen = 0;
        for kind in NsKind::ALL {
            // Not every kernel has every kind.
            if let Ok(text) = std::fs::read_link(format!("/proc/self/ns/{}", kind.name())) {
                let link = parse(text.as_os_str().as_bytes()).unwrap();
                assert!(link.kind == kind && link.ino > 0, "{link:?}");
                seen += 1;
            }
        }
        assert!(seen > 0);
        assert_eq!(parse(b"pid:[4026531836]"), Ok(NsLink { kind: NsKind::Pid, ino: 4_026_531_836 }));
    }

    #[test]
    fn malformed() {
        for bad in [
            &b""[..],
            b"pid",
            b"pid:",
            b"pid:[]",
            b"pid:[1",
            b"pid:[1]\n",
            b"pid:[1] (deleted)",
            b"pipe:[1]",
            b"pid:1",
        ] {
            assert_eq!(parse(bad), Err(ParseError { file: "ns", line: 1, what: "not a namespace" }));
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
