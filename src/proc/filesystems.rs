//! /proc/filesystems: the types that this kernel can mount now, without modules not yet loaded.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "filesystems";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filesystem {
    pub name: Vec<u8>,
    /// Needs no block device.
    pub nodev: bool,
}

/// Reads the list.
pub fn parse(bytes: &[u8]) -> Result<Vec<Filesystem>, ParseError> {
    let one = |line| {
        let mut s = Scan::new(line);
        let nodev = s.text(b"nodev").is_some();
        s.text(b"\t")?;
        let name = s.rest();
        (!name.is_empty()).then(|| Filesystem { name: name.to_vec(), nodev })
    };
    lines(bytes)
        .map(|(number, line)| one(line).ok_or(ParseError::new(FILE, number, "not a filesystem")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn types() {
        let got = parse(b"nodev\tsysfs\n\text4\n").unwrap();
        let ext4 = Filesystem { name: b"ext4".to_vec(), nodev: false };
        assert_eq!(got, [Filesystem { name: b"sysfs".to_vec(), nodev: true }, ext4]);
        assert_eq!(parse(b"\text4\next4\n").unwrap_err().line, 2);
        assert_eq!(parse(b"nodev\t\n").unwrap_err().line, 1);
        let own = parse(&std::fs::read("/proc/filesystems").unwrap()).unwrap();
        assert!(own.iter().any(|f| f.name == b"proc" && f.nodev));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
