//! /proc/PID/maps: the areas of an address space.
//!
//! The kernel writes a newline in a path as `\012` and escapes nothing else, the backslash included. So a file really
//! called `a\012b` looks the same as one with a newline, and [`Vma::path`] gives the bytes as they stand. Who needs
//! the file itself takes it by /proc/PID/map_files or by (dev, ino), not by this text. " (deleted)" at the end
//! is not proof of anything either: a file may be called so.

use super::ParseError;
use super::scan::{Scan, lines};

const FILE: &str = "maps";

/// One area, as its line in maps (and its header in smaps) tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    pub start: u64,
    /// First address behind the area.
    pub end: u64,
    /// `libc::PROT_READ | PROT_WRITE | PROT_EXEC`
    pub prot: i32,
    /// MAP_SHARED at the time of mmap (`s`), else private (`p`).
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub pgoff_bytes: u64,
    /// Major and minor number; (0, 0) without a file.
    pub dev: (u32, u32),
    /// 0 without a file.
    pub ino: u64,
    pub name: Option<VmaName>,
}

/// The last column of maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmaName {
    /// A mapped file, as the kernel wrote it (see the module's text about `\012` and " (deleted)").
    Path(Vec<u8>),
    Heap,
    Stack,
    Vdso,
    Vvar,
    /// Linux 6.13: the clock pages behind `[vvar]`.
    VvarVclock,
    Vsyscall,
    /// `[anon:NAME]`, set with PR_SET_VMA_ANON_NAME on private memory.
    Anon(Vec<u8>),
    /// `[anon_shmem:NAME]`, the same on shared anonymous memory.
    AnonShmem(Vec<u8>),
    /// Another `[...]`, such as `[uprobes]`; brackets included.
    Special(Vec<u8>),
}

impl Vma {
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// False for every area that [`parse`] returns.
    #[allow(dead_code)] // beside `len`
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The text of a mapped file's name, as the kernel wrote it.
    pub fn path(&self) -> Option<&[u8]> {
        match &self.name {
            Some(VmaName::Path(path)) => Some(path),
            _ => None,
        }
    }

    /// The name of this area in /proc/PID/map_files.
    pub fn map_files_name(&self) -> String {
        format!("{:x}-{:x}", self.start, self.end)
    }

    /// Reads one line. `None` if it is not as the kernel writes it.
    pub(super) fn from_line(line: &[u8]) -> Option<Vma> {
        let mut s = Scan::new(line);
        let start = s.hex()?;
        s.text(b"-")?;
        let end = s.hex()?;
        if start >= end {
            return None;
        }
        s.text(b" ")?;
        let mut prot = 0;
        for (letter, bit) in [(b'r', libc::PROT_READ), (b'w', libc::PROT_WRITE), (b'x', libc::PROT_EXEC)] {
            match s.byte()? {
                b'-' => {}
                b if b == letter => prot |= bit,
                _ => return None,
            }
        }
        let shared = match s.byte()? {
            b's' => true,
            b'p' => false,
            _ => return None,
        };
        s.text(b" ")?;
        let pgoff_bytes = s.hex()?;
        s.text(b" ")?;
        let major = s.hex_as()?;
        s.text(b":")?;
        let minor = s.hex_as()?;
        s.text(b" ")?;
        let ino = s.dec()?;
        let name = match s.byte() {
            // Only blanks in front are filling; blanks at the end belong to the name.
            Some(b' ') => {
                s.blanks();
                VmaName::from_text(s.rest())
            }
            Some(_) => return None,
            None => None,
        };
        Some(Vma { start, end, prot, shared, pgoff_bytes, dev: (major, minor), ino, name })
    }
}

impl VmaName {
    fn from_text(text: &[u8]) -> Option<VmaName> {
        // The kernel's own names have brackets, and no path it prints begins with one.
        if text.first() != Some(&b'[') {
            return (!text.is_empty()).then(|| VmaName::Path(text.to_vec()));
        }
        Some(match text {
            b"[heap]" => VmaName::Heap,
            b"[stack]" => VmaName::Stack,
            b"[vdso]" => VmaName::Vdso,
            b"[vvar]" => VmaName::Vvar,
            b"[vvar_vclock]" => VmaName::VvarVclock,
            b"[vsyscall]" => VmaName::Vsyscall,
            _ => {
                let inside = |prefix| text.strip_prefix(prefix)?.strip_suffix(b"]");
                if let Some(name) = inside(&b"[anon:"[..]) {
                    VmaName::Anon(name.to_vec())
                } else if let Some(name) = inside(&b"[anon_shmem:"[..]) {
                    VmaName::AnonShmem(name.to_vec())
                } else {
                    VmaName::Special(text.to_vec())
                }
            }
        })
    }
}

/// Reads /proc/PID/maps. Empty for a zombie or a kernel thread.
pub fn parse(bytes: &[u8]) -> Result<Vec<Vma>, ParseError> {
    lines(bytes)
        .map(|(number, line)| Vma::from_line(line).ok_or(ParseError::new(FILE, number, "not a mapping")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn file_and_anonymous() {
        let text =
            b"559cb8ff0000-559cb8ff2000 r--p 00001000 fe:00 247282                     /usr/bin/a b \n\
            7f0000000000-7f0000001000 rwxs 00000000 00:00 0 \n\
            7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let vmas = parse(text).unwrap();
        assert_eq!(vmas.len(), 4);
        assert_eq!(
            vmas[0],
            Vma {
                start: 0x559c_b8ff_0000,
                end: 0x559c_b8ff_2000,
                prot: libc::PROT_READ,
                shared: false,
                pgoff_bytes: 0x1000,
                dev: (0xfe, 0),
                ino: 247_282,
                name: Some(VmaName::Path(b"/usr/bin/a b ".to_vec())),
            }
        );
        assert_eq!(vmas[0].len(), 0x2000);
        assert_eq!(vmas[0].map_files_name(), "559cb8ff0000-559cb8ff2000");
        assert!(vmas[1].shared && vmas[1].name.is_none());
        assert_eq!(vmas[1].prot, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        assert_eq!(vmas[2].name, Some(VmaName::Stack));
        assert_eq!((vmas[3].end, &vmas[3].name), (0xffff_ffff_ff60_1000, &Some(VmaName::Vsyscall)));
    }

    #[test]
    fn names() {
        let name = |text: &[u8]| {
            let line = [b"1000-2000 rw-s 00000000 00:01 2050                       ".as_slice(), text, b"\n"]
                .concat();
            parse(&line).unwrap().remove(0).name.unwrap()
        };
        assert_eq!(name(b"[heap]"), VmaName::Heap);
        assert_eq!(name(b"[vdso]"), VmaName::Vdso);
        assert_eq!(name(b"[vvar]"), VmaName::Vvar);
        assert_eq!(name(b"[vvar_vclock]"), VmaName::VvarVclock);
        assert_eq!(name(b"[anon:glibc: malloc]"), VmaName::Anon(b"glibc: malloc".to_vec()));
        assert_eq!(name(b"[anon_shmem:x]"), VmaName::AnonShmem(b"x".to_vec()));
        assert_eq!(name(b"[uprobes]"), VmaName::Special(b"[uprobes]".to_vec()));
        assert_eq!(name(b"[anon:x"), VmaName::Special(b"[anon:x".to_vec()));
        assert_eq!(name(b"/[heap]"), VmaName::Path(b"/[heap]".to_vec()));
        assert_eq!(name(b"/dev/zero (deleted)"), VmaName::Path(b"/dev/zero (deleted)".to_vec()));
        assert_eq!(name(b"/a\\012b\\\xff\xfe"), VmaName::Path(b"/a\\012b\\\xff\xfe".to_vec()));
        assert_eq!(name(b"anon_inode:[perf_event]"), VmaName::Path(b"anon_inode:[perf_event]".to_vec()));
    }

    #[test]
    fn a_bad_line_is_named() {
        let good = b"1000-2000 rw-p 00000000 00:00 0 \n".to_vec();
        for bad in [
            &b"\n"[..],
            b"1000-2000\n",
            b"1000-2000 rw-\n",
            b"1000-2000 rw-x 00000000 00:00 0\n",
            b"1000-2000 xw-p 00000000 00:00 0\n",
            b"2000-2000 rw-p 00000000 00:00 0\n",
            b"1000-10000000000000000 rw-p 00000000 00:00 0\n",
            b"1000-2000 rw-p 00000000 00:00 0x\n",
            b"1000-2000 rw-p 00000000 100000000:00 0\n",
            b"/b 1000-2000 rw-p 00000000 00:00 0\n",
        ] {
            let text = [&good, bad].concat();
            assert_eq!(
                parse(&text).unwrap_err(),
                ParseError { file: "maps", line: 2, what: "not a mapping" }
            );
        }
    }

    #[test]
    fn nothing_mapped() {
        assert_eq!(parse(b""), Ok(vec![]));
    }

    #[test]
    fn own_maps() {
        let text = std::fs::read("/proc/self/maps").unwrap();
        let vmas = parse(&text).unwrap();
        let here = FILE.as_ptr() as u64;
        assert!(vmas.iter().any(|v| v.start <= here && here < v.end && v.path().is_some()));
        assert!(vmas.iter().any(|v| v.name == Some(VmaName::Stack)));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn never_panics_on_nearly_maps(line in "[0-9a-f]{1,17}-[0-9a-f]{1,17} [-r][-w][-x][sp] [0-9a-f]{8} [0-9a-f]{2,9}:[0-9]{2} [0-9]{1,21} {0,9}.*") {
            let _ = parse(line.as_bytes());
        }
    }
}
