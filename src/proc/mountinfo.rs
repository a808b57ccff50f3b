//! /proc/PID/mountinfo: the mounts that a task sees below its root.
//!
//! Blanks, tabs, newlines, backslashes (and `#` in a source) come as three octal digits and are unescaped here, so a
//! mount point may hold any byte but NUL. The root of a mount ends in `//deleted` when its directory is gone, which no
//! real path can.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "mountinfo";

/// One mount. Options are texts separated by commas, unescaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub id: i32,
    /// May be a mount that this task does not see.
    pub parent: i32,
    /// Major and minor: the `st_dev` of its files, except for btrfs and the like.
    pub dev: (u32, u32),
    /// The directory or file of the filesystem that is mounted here.
    pub root: Vec<u8>,
    /// Seen from the task's root.
    pub mountpoint: Vec<u8>,
    pub options: Vec<u8>,
    /// Peer group that it sends to and receives from.
    pub shared: Option<i32>,
    /// Peer group that it only receives from.
    pub master: Option<i32>,
    /// The nearest group below this task's root that it receives from, when `master` itself is not seen.
    pub propagate_from: Option<i32>,
    pub unbindable: bool,
    /// Optional fields of a newer kernel.
    pub other_fields: Vec<Vec<u8>>,
    /// With the subtype: `fuse.sshfs`.
    pub fstype: Vec<u8>,
    /// What mount(2) was told; may be empty.
    pub source: Vec<u8>,
    pub super_options: Vec<u8>,
}

impl Mount {
    /// Reads one line. `None` if it is not as the kernel writes it.
    fn from_line(line: &[u8]) -> Option<Mount> {
        let mut s = Scan::new(line);
        let id = s.signed_as()?;
        s.text(b" ")?;
        let parent = s.signed_as()?;
        s.text(b" ")?;
        let major = s.dec_as()?;
        s.text(b":")?;
        let minor = s.dec_as()?;
        s.text(b" ")?;
        let root = unescape(s.until(b' ')?);
        let mountpoint = unescape(s.until(b' ')?);
        let options = unescape(s.until(b' ')?);
        let mut mount = Mount {
            id,
            parent,
            dev: (major, minor),
            root,
            mountpoint,
            options,
            shared: None,
            master: None,
            propagate_from: None,
            unbindable: false,
            other_fields: Vec::new(),
            fstype: Vec::new(),
            source: Vec::new(),
            super_options: Vec::new(),
        };
        loop {
            match s.until(b' ')? {
                b"-" => break,
                field => mount.take_field(field)?,
            }
        }
        // Strictly by single blanks, for the source may be empty.
        mount.fstype = unescape(s.until(b' ')?);
        mount.source = unescape(s.until(b' ')?);
        mount.super_options = unescape(s.rest());
        Some(mount)
    }

    fn take_field(&mut self, field: &[u8]) -> Option<()> {
        let group = |prefix: &[u8]| field.strip_prefix(prefix).map(Scan::new);
        if let Some(s) = group(b"shared:") {
            self.shared = Some(peer_group(s)?);
        } else if let Some(s) = group(b"master:") {
            self.master = Some(peer_group(s)?);
        } else if let Some(s) = group(b"propagate_from:") {
            self.propagate_from = Some(peer_group(s)?);
        } else if field == b"unbindable" {
            self.unbindable = true;
        } else {
            self.other_fields.push(unescape(field));
        }
        Some(())
    }
}

fn peer_group(mut s: Scan<'_>) -> Option<i32> {
    let id = s.dec_as()?;
    s.is_empty().then_some(id)
}

/// Undoes the kernel's `\040`. A backslash without three octal digits stays.
pub fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        rest = match rest {
            [] => return plain,
            [b'\\', high @ b'0'..=b'3', middle @ b'0'..=b'7', low @ b'0'..=b'7', tail @ ..] => {
                plain.push((high - b'0') << 6 | (middle - b'0') << 3 | (low - b'0'));
                tail
            }
            [byte, tail @ ..] => {
                plain.push(*byte);
                tail
            }
        };
    }
}

/// Reads /proc/PID/mountinfo.
pub fn parse(bytes: &[u8]) -> Result<Vec<Mount>, ParseError> {
    lines(bytes)
        .map(|(number, line)| Mount::from_line(line).ok_or(ParseError::new(FILE, number, "not a mount")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(line: &str) -> Mount {
        parse(line.as_bytes()).unwrap().remove(0)
    }

    #[test]
    fn every_field() {
        let mount = one(
            "36 35 98:4095 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 propagate_from:2 unbindable later:1 - ext3.sub /dev/root rw,errors=continue\n",
        );
        let want = Mount {
            id: 36,
            parent: 35,
            dev: (98, 4095),
            root: b"/mnt1".to_vec(),
            mountpoint: b"/mnt 2".to_vec(),
            options: b"rw,noatime".to_vec(),
            shared: Some(7),
            master: Some(1),
            propagate_from: Some(2),
            unbindable: true,
            other_fields: vec![b"later:1".to_vec()],
            fstype: b"ext3.sub".to_vec(),
            source: b"/dev/root".to_vec(),
            super_options: b"rw,errors=continue".to_vec(),
        };
        assert_eq!(mount, want);
    }

    #[test]
    fn odd_texts() {
        let mount = one("22 27 0:21 net:[4026531840] /a\\011\\012\\134040\\ - rw - nsfs  rw");
        assert_eq!(mount.mountpoint, b"/a\t\n\\040\\");
        assert_eq!((&mount.options[..], &mount.source[..]), (&b"-"[..], &b""[..]));
        assert_eq!(mount.root, b"net:[4026531840]");
        let mount = one("22 27 0:21 /x//deleted / ro - tmpfs \\043a ");
        assert_eq!(
            (&mount.root[..], &mount.source[..], &mount.super_options[..]),
            (&b"/x//deleted"[..], &b"#a"[..], &b""[..])
        );
        let bytes = parse(b"22 27 0:21 / /\xff\xfe rw - tmpfs none rw\n").unwrap();
        assert_eq!(bytes[0].mountpoint, b"/\xff\xfe");
    }

    #[test]
    fn unescapes_what_the_kernel_escapes_and_no_more() {
        assert_eq!(unescape(b"\\377\\400\\08\\"), b"\xff\\400\\08\\");
        assert_eq!(unescape(b"\\134040"), b"\\040");
    }

    #[test]
    fn malformed() {
        let good = "22 27 0:21 / /proc rw shared:1 - proc proc rw\n";
        assert!(parse(good.as_bytes()).is_ok());
        for bad in [
            "\n",
            "22 27 0:21 / /proc rw shared:1 proc proc rw\n",
            "22 27 0:21 / /proc rw shared:x - proc proc rw\n",
            "22 27 0:21 / /proc rw - proc proc\n",
            "22 27 0 / /proc rw - proc proc rw\n",
            "22 2147483648 0:21 / /proc rw - proc proc rw\n",
        ] {
            let error = parse(format!("{good}{bad}").as_bytes()).unwrap_err();
            assert_eq!(error, ParseError { file: "mountinfo", line: 2, what: "not a mount" }, "{bad}");
        }
    }

    #[test]
    fn own_mounts() {
        let mounts = parse(&std::fs::read("/proc/self/mountinfo").unwrap()).unwrap();
        let proc = mounts.iter().find(|m| m.mountpoint == b"/proc").unwrap();
        assert_eq!(proc.fstype, b"proc");
        assert!(mounts.iter().all(|m| m.other_fields.is_empty()));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let _ = unescape(&bytes);
        }

        #[test]
        fn mount_points_come_back(path: Vec<u8>) {
            let mut line = b"1 2 3:4 / /".to_vec();
            for byte in &path {
                match byte {
                    b' ' | b'\t' | b'\n' | b'\\' => line.extend(format!("\\{byte:03o}").bytes()),
                    _ => line.push(*byte),
                }
            }
            line.extend(b" rw - tmpfs none rw\n");
            let mounts = parse(&line).unwrap();
            prop_assert_eq!(&mounts[0].mountpoint[1..], &path[..]);
        }
    }
}
