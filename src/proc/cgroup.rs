//! /proc/PID/cgroup: where a task is in each cgroup hierarchy.
//!
//! A path is seen from the reader's cgroup namespace and may begin with `/..`; it may hold `:`, but the kernel refuses
//! newlines in it. ` (deleted)` at its end is the mark of a removed v2 group, or part of its name.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "cgroup";

/// One hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// 0 for cgroup v2.
    pub hierarchy: u32,
    /// `cpu,cpuacct`, `name=systemd`, or empty for v2.
    pub controllers: Vec<u8>,
    pub path: Vec<u8>,
}

impl Membership {
    /// Whether this is the one hierarchy of cgroup v2.
    pub fn is_unified(&self) -> bool {
        self.hierarchy == 0 && self.controllers.is_empty()
    }
}

/// Reads /proc/PID/cgroup.
pub fn parse(bytes: &[u8]) -> Result<Vec<Membership>, ParseError> {
    let one = |line| {
        let mut s = Scan::new(line);
        let hierarchy = s.dec_as()?;
        s.text(b":")?;
        let controllers = s.until(b':')?.to_vec();
        let path = s.rest();
        path.starts_with(b"/").then(|| Membership { hierarchy, controllers, path: path.to_vec() })
    };
    lines(bytes)
        .map(|(number, line)| one(line).ok_or(ParseError::new(FILE, number, "not a cgroup")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hierarchies() {
        let got = parse(b"9:name=systemd:/\n4:cpu,cpuacct:/a:b\xff (deleted)\n0::/../c\n").unwrap();
        let row = |m: &Membership| (m.hierarchy, m.controllers.clone(), m.path.clone(), m.is_unified());
        assert_eq!(row(&got[0]), (9, b"name=systemd".to_vec(), b"/".to_vec(), false));
        assert_eq!(row(&got[1]), (4, b"cpu,cpuacct".to_vec(), b"/a:b\xff (deleted)".to_vec(), false));
        assert_eq!(row(&got[2]), (0, vec![], b"/../c".to_vec(), true));
        assert_eq!(parse(b""), Ok(vec![]));
    }

    #[test]
    fn malformed() {
        for bad in [&b"\n"[..], b"x::/", b"0:/", b"0::", b"0::a", b"4294967296:cpu:/"] {
            let text = [b"0::/\n", bad].concat();
            assert_eq!(parse(&text), Err(ParseError { file: "cgroup", line: 2, what: "not a cgroup" }));
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
