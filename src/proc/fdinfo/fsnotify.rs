//! The lines of inotify and fanotify: what they watch, as device and inode and, where the filesystem has them, as a
//! file handle.
//!
//! Every number is hexadecimal but the one of a mount namespace.

use super::super::scan::{Scan, hex_digit};
use super::last;

/// A file handle as name_to_handle_at gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHandle {
    pub kind: i32,
    pub bytes: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InotifyWatch {
    pub wd: i32,
    pub ino: u64,
    /// In the kernel's own encoding, see [`kernel_dev`](super::kernel_dev).
    pub sdev: u32,
    pub mask: u32,
    /// Not for a filesystem that has no handles.
    pub handle: Option<FileHandle>,
}

/// What fanotify_init was called with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FanotifyGroup {
    pub flags: u32,
    pub event_flags: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FanotifyMark {
    pub object: FanotifyObject,
    pub mflags: u32,
    pub mask: u64,
    pub ignored_mask: u64,
}

/// What a mark is on. An `sdev` is in the kernel's own encoding, see [`kernel_dev`](super::kernel_dev).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FanotifyObject {
    Inode {
        ino: u64,
        sdev: u32,
        handle: Option<FileHandle>,
    },
    Mount {
        mnt_id: i32,
    },
    Filesystem {
        sdev: u32,
    },
    /// Linux 6.14.
    MountNamespace {
        mnt_ns: u32,
    },
}

/// A line of fanotify.
pub(super) enum Fanotify {
    Group(FanotifyGroup),
    Mark(FanotifyMark),
}

/// What stands behind `fanotify `.
pub(super) fn fanotify(mut s: Scan<'_>) -> Option<Fanotify> {
    if s.text(b"flags:").is_some() {
        let flags = s.hex_as()?;
        s.text(b" event-flags:")?;
        return Some(Fanotify::Group(FanotifyGroup { flags, event_flags: last(s, Scan::hex_as)? }));
    }
    let mut object = if s.text(b"ino:").is_some() {
        let ino = s.hex()?;
        s.text(b" sdev:")?;
        FanotifyObject::Inode { ino, sdev: s.hex_as()?, handle: None }
    } else if s.text(b"mnt_id:").is_some() {
        FanotifyObject::Mount { mnt_id: s.hex_as()? }
    } else if s.text(b"sdev:").is_some() {
        FanotifyObject::Filesystem { sdev: s.hex_as()? }
    } else {
        s.text(b"mnt_ns:")?;
        FanotifyObject::MountNamespace { mnt_ns: s.dec_as()? }
    };
    s.text(b" mflags:")?;
    let mflags = s.hex_as()?;
    s.text(b" mask:")?;
    let mask = s.hex()?;
    s.text(b" ignored_mask:")?;
    let ignored_mask = s.hex()?;
    if let FanotifyObject::Inode { handle, .. } = &mut object {
        *handle = file_handle(&mut s)?;
    }
    s.end()?;
    Some(Fanotify::Mark(FanotifyMark { object, mflags, mask, ignored_mask }))
}

/// What stands behind `inotify wd:`.
pub(super) fn inotify(mut s: Scan<'_>) -> Option<InotifyWatch> {
    let wd = s.hex_as()?;
    s.text(b" ino:")?;
    let ino = s.hex()?;
    s.text(b" sdev:")?;
    let sdev = s.hex_as()?;
    s.text(b" mask:")?;
    let mask = s.hex_as()?;
    s.text(b" ignored_mask:")?;
    s.hex()?; // always 0
    let handle = file_handle(&mut s)?;
    s.end()?;
    Some(InotifyWatch { wd, ino, sdev, mask, handle })
}

/// `Some(None)` where the line ends before it.
fn file_handle(s: &mut Scan<'_>) -> Option<Option<FileHandle>> {
    s.blanks();
    if s.is_empty() {
        return Some(None);
    }
    s.text(b"fhandle-bytes:")?;
    let len: usize = s.hex_as()?;
    s.text(b" fhandle-type:")?;
    // Printed as unsigned, though a type is an int.
    let kind = i32::from_ne_bytes(s.hex_as::<u32>()?.to_ne_bytes());
    s.text(b" f_handle:")?;
    let mut bytes = Vec::new();
    for pair in s.word().unwrap_or_default().chunks(2) {
        let &[high, low] = pair else { return None };
        bytes.push(hex_digit(high)? << 4 | hex_digit(low)?);
    }
    (bytes.len() == len).then_some(Some(FileHandle { kind, bytes }))
}

#[cfg(test)]
mod tests {
    use super::super::tests::with;
    use super::*;

    #[test]
    fn inotify_watches() {
        let info = with(
            "inotify wd:a ino:3c4a7 sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000\n\
             inotify wd:1 ino:2 sdev:15 mask:fff ignored_mask:0 \n",
        );
        let handle = FileHandle { kind: 1, bytes: vec![0xa7, 0xc4, 3, 0, 0, 0, 0, 0] };
        let first =
            InotifyWatch { wd: 10, ino: 0x3c4a7, sdev: 0xfe0_0000, mask: 0x100, handle: Some(handle) };
        let second = InotifyWatch { wd: 1, ino: 2, sdev: 0x15, mask: 0xfff, handle: None };
        assert_eq!(info.inotify, [first, second]);
    }

    #[test]
    fn fanotify() {
        let info = with(
            "fanotify flags:200 event-flags:8000\n\
             fanotify ino:3c4a7 sdev:fe00000 mflags:40 mask:2 ignored_mask:40000000 fhandle-bytes:1 fhandle-type:fe f_handle:a7\n\
             fanotify mnt_id:1b mflags:0 mask:2 ignored_mask:0\n\
             fanotify sdev:fe00000 mflags:0 mask:8 ignored_mask:1\n\
             fanotify mnt_ns:4026531841 mflags:0 mask:1000000 ignored_mask:0\n",
        );
        assert_eq!(info.fanotify, Some(FanotifyGroup { flags: 0x200, event_flags: 0x8000 }));
        let handle = Some(FileHandle { kind: 0xfe, bytes: vec![0xa7] });
        let inode = FanotifyObject::Inode { ino: 0x3c4a7, sdev: 0xfe0_0000, handle };
        assert_eq!(
            info.fanotify_marks,
            [
                FanotifyMark { object: inode, mflags: 0x40, mask: 2, ignored_mask: 0x4000_0000 },
                FanotifyMark {
                    object: FanotifyObject::Mount { mnt_id: 0x1b },
                    mflags: 0,
                    mask: 2,
                    ignored_mask: 0
                },
                FanotifyMark {
                    object: FanotifyObject::Filesystem { sdev: 0xfe0_0000 },
                    mflags: 0,
                    mask: 8,
                    ignored_mask: 1
                },
                FanotifyMark {
                    object: FanotifyObject::MountNamespace { mnt_ns: 4_026_531_841 },
                    mflags: 0,
                    mask: 0x100_0000,
                    ignored_mask: 0
                },
            ]
        );
    }
}
