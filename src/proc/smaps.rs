//! /proc/PID/smaps: the areas of an address space with their VmFlags.
//!
//! Taken: the header, VmFlags, and the few sizes that decide something. The kernel walks page tables to write the
//! sizes, so smaps costs far more to produce than maps; for the flags there is no other source.

use super::ParseError;
use super::maps::Vma;
use super::scan::{Scan, lines};

const FILE: &str = "smaps";

bitflags::bitflags! {
    /// VmFlags. The bits are ours; the letters are the kernel's.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct VmFlags: u64 {
        /// `rd`
        const READ = 1 << 0;
        /// `wr`
        const WRITE = 1 << 1;
        /// `ex`
        const EXEC = 1 << 2;
        /// `sh`: shared and writable through its file, or shared anonymous
        const SHARED = 1 << 3;
        /// `mr`
        const MAYREAD = 1 << 4;
        /// `mw`
        const MAYWRITE = 1 << 5;
        /// `me`
        const MAYEXEC = 1 << 6;
        /// `ms`
        const MAYSHARE = 1 << 7;
        /// `gd`
        const GROWSDOWN = 1 << 8;
        /// `pf`: page frames without struct page
        const PFNMAP = 1 << 9;
        /// `lo`: mlock
        const LOCKED = 1 << 10;
        /// `io`
        const IO = 1 << 11;
        /// `sr`: MADV_SEQUENTIAL
        const SEQ_READ = 1 << 12;
        /// `rr`: MADV_RANDOM
        const RAND_READ = 1 << 13;
        /// `dc`: MADV_DONTFORK
        const DONTCOPY = 1 << 14;
        /// `de`
        const DONTEXPAND = 1 << 15;
        /// `lf`: MLOCK_ONFAULT
        const LOCKONFAULT = 1 << 16;
        /// `ac`
        const ACCOUNT = 1 << 17;
        /// `nr`: MAP_NORESERVE
        const NORESERVE = 1 << 18;
        /// `ht`
        const HUGETLB = 1 << 19;
        /// `sf`: MAP_SYNC
        const SYNC = 1 << 20;
        /// `ar`: the architecture's own bit
        const ARCH_1 = 1 << 21;
        /// `wf`: MADV_WIPEONFORK
        const WIPEONFORK = 1 << 22;
        /// `dd`: MADV_DONTDUMP
        const DONTDUMP = 1 << 23;
        /// `sd`
        const SOFTDIRTY = 1 << 24;
        /// `mm`
        const MIXEDMAP = 1 << 25;
        /// `hg`: MADV_HUGEPAGE
        const HUGEPAGE = 1 << 26;
        /// `nh`: MADV_NOHUGEPAGE
        const NOHUGEPAGE = 1 << 27;
        /// `mg`: MADV_MERGEABLE
        const MERGEABLE = 1 << 28;
        /// `um`
        const UFFD_MISSING = 1 << 29;
        /// `uw`
        const UFFD_WP = 1 << 30;
        /// `ui`
        const UFFD_MINOR = 1 << 31;
        /// `bt`: arm64 branch target identification
        const ARM64_BTI = 1 << 32;
        /// `mt`: arm64 memory tagging
        const MTE = 1 << 33;
        /// `ss`: shadow stack
        const SHADOW_STACK = 1 << 34;
        /// `sl`: mseal
        const SEALED = 1 << 35;
        /// `dp`: MAP_DROPPABLE
        const DROPPABLE = 1 << 36;
        /// `nl`: nonlinear, until Linux 4.0
        const NONLINEAR = 1 << 37;
        /// `mp`: MPX, until Linux 5.6
        const MPX = 1 << 38;
        /// `gu`: may hold guard pages. Linux 6.19.
        const MAYBE_GUARD = 1 << 39;
    }
}

impl VmFlags {
    /// The flag of a two-letter code.
    pub fn from_code(code: [u8; 2]) -> Option<VmFlags> {
        Some(match &code {
            b"rd" => VmFlags::READ,
            b"wr" => VmFlags::WRITE,
            b"ex" => VmFlags::EXEC,
            b"sh" => VmFlags::SHARED,
            b"mr" => VmFlags::MAYREAD,
            b"mw" => VmFlags::MAYWRITE,
            b"me" => VmFlags::MAYEXEC,
            b"ms" => VmFlags::MAYSHARE,
            b"gd" => VmFlags::GROWSDOWN,
            b"pf" => VmFlags::PFNMAP,
            b"lo" => VmFlags::LOCKED,
            b"io" => VmFlags::IO,
            b"sr" => VmFlags::SEQ_READ,
            b"rr" => VmFlags::RAND_READ,
            b"dc" => VmFlags::DONTCOPY,
            b"de" => VmFlags::DONTEXPAND,
            b"lf" => VmFlags::LOCKONFAULT,
            b"ac" => VmFlags::ACCOUNT,
            b"nr" => VmFlags::NORESERVE,
            b"ht" => VmFlags::HUGETLB,
            b"sf" => VmFlags::SYNC,
            b"ar" => VmFlags::ARCH_1,
            b"wf" => VmFlags::WIPEONFORK,
            b"dd" => VmFlags::DONTDUMP,
            b"sd" => VmFlags::SOFTDIRTY,
            b"mm" => VmFlags::MIXEDMAP,
            b"hg" => VmFlags::HUGEPAGE,
            b"nh" => VmFlags::NOHUGEPAGE,
            b"mg" => VmFlags::MERGEABLE,
            b"um" => VmFlags::UFFD_MISSING,
            b"uw" => VmFlags::UFFD_WP,
            b"ui" => VmFlags::UFFD_MINOR,
            b"bt" => VmFlags::ARM64_BTI,
            b"mt" => VmFlags::MTE,
            b"ss" => VmFlags::SHADOW_STACK,
            b"sl" => VmFlags::SEALED,
            b"dp" => VmFlags::DROPPABLE,
            b"nl" => VmFlags::NONLINEAR,
            b"mp" => VmFlags::MPX,
            b"gu" => VmFlags::MAYBE_GUARD,
            _ => return None,
        })
    }
}

/// One area with what smaps adds to its line in maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smap {
    pub vma: Vma,
    pub flags: VmFlags,
    /// Codes of a kernel newer than this list, and its `??`.
    pub unknown_flags: Vec<[u8; 2]>,
    /// The size of the area's own pages: larger than a page for hugetlb.
    pub kernel_page_bytes: u64,
    pub rss_bytes: u64,
    pub pss_bytes: u64,
    pub anonymous_bytes: u64,
    pub swap_bytes: u64,
    /// Linux 5.0.
    pub thp_eligible: Option<bool>,
    /// The protection key, where the processor has them.
    pub pkey: Option<u32>,
}

impl Smap {
    fn new(vma: Vma) -> Smap {
        Smap {
            vma,
            flags: VmFlags::empty(),
            unknown_flags: Vec::new(),
            kernel_page_bytes: 0,
            rss_bytes: 0,
            pss_bytes: 0,
            anonymous_bytes: 0,
            swap_bytes: 0,
            thp_eligible: None,
            pkey: None,
        }
    }

    /// Takes one `Key: value` line; true if it was VmFlags. `None` if it is not as the kernel writes it.
    fn take(&mut self, line: &[u8]) -> Option<bool> {
        let mut s = Scan::new(line);
        // Two bytes tell whether the line is wanted at all: most are not, and there are 25 for each area.
        match line.get(..2)? {
            b"Vm" => {
                s.text(b"VmFlags:")?;
                self.take_flags(s)?;
                return Some(true);
            }
            b"Ke" if s.text(b"KernelPageSize:").is_some() => self.kernel_page_bytes = kib(s)?,
            b"Rs" if s.text(b"Rss:").is_some() => self.rss_bytes = kib(s)?,
            b"Ps" if s.text(b"Pss:").is_some() => self.pss_bytes = kib(s)?,
            b"An" if s.text(b"Anonymous:").is_some() => self.anonymous_bytes = kib(s)?,
            b"Sw" if s.text(b"Swap:").is_some() => self.swap_bytes = kib(s)?,
            b"TH" if s.text(b"THPeligible:").is_some() => {
                s.blanks();
                self.thp_eligible = Some(s.dec()? != 0);
                s.end()?;
            }
            b"Pr" if s.text(b"ProtectionKey:").is_some() => {
                s.blanks();
                self.pkey = Some(s.dec_as()?);
                s.end()?;
            }
            _ => {}
        }
        Some(false)
    }

    fn take_flags(&mut self, mut s: Scan<'_>) -> Option<()> {
        s.blanks();
        while !s.is_empty() {
            let code = [s.byte()?, s.byte()?];
            match VmFlags::from_code(code) {
                Some(flag) => self.flags |= flag,
                None => self.unknown_flags.push(code),
            }
            if !s.is_empty() {
                s.text(b" ")?;
            }
        }
        Some(())
    }
}

fn kib(mut s: Scan<'_>) -> Option<u64> {
    s.blanks();
    let value = s.dec()?;
    s.text(b" kB")?;
    s.end()?;
    value.checked_mul(1024)
}

/// Reads /proc/PID/smaps. Every area must have its VmFlags: without them state would be lost unseen.
pub fn parse(bytes: &[u8]) -> Result<Vec<Smap>, ParseError> {
    let mut areas = Vec::new();
    let mut open: Option<(usize, Smap)> = None;
    for (number, line) in lines(bytes) {
        match line.first() {
            // A header begins with an address, every other line with a capital letter.
            Some(b'0'..=b'9' | b'a'..=b'f') => {
                if let Some((began, _)) = open {
                    return Err(ParseError::new(FILE, began, "mapping without VmFlags"));
                }
                let vma = Vma::from_line(line).ok_or(ParseError::new(FILE, number, "not a mapping"))?;
                open = Some((number, Smap::new(vma)));
            }
            Some(_) => {
                let Some((_, area)) = &mut open else {
                    return Err(ParseError::new(FILE, number, "line outside of a mapping"));
                };
                // VmFlags is the last line of an area.
                if area.take(line).ok_or(ParseError::new(FILE, number, "not a key and value"))? {
                    areas.extend(open.take().map(|(_, area)| area));
                }
            }
            None => return Err(ParseError::new(FILE, number, "empty line")),
        }
    }
    match open {
        Some((began, _)) => Err(ParseError::new(FILE, began, "mapping without VmFlags")),
        None => Ok(areas),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: &str = "7f0000000000-7f0000200000 rw-p 00000000 00:00 0                          [anon:x]\n\
        Size:               2048 kB\n\
        KernelPageSize:        4 kB\n\
        MMUPageSize:           4 kB\n\
        Rss:                  24 kB\n\
        Pss:                  23 kB\n\
        Pss_Dirty:             0 kB\n\
        Anonymous:            20 kB\n\
        Swap:                  8 kB\n\
        SwapPss:               7 kB\n\
        THPeligible:           1\n\
        ProtectionKey:         3\n\
        VmFlags: rd wr mr mw me ac uw zz ?? \n";

    #[test]
    fn one_area() {
        let areas = parse(ONE.as_bytes()).unwrap();
        let [area] = &areas[..] else { panic!("{areas:?}") };
        assert_eq!(area.vma.start, 0x7f00_0000_0000);
        assert_eq!(area.vma.name, Some(super::super::maps::VmaName::Anon(b"x".to_vec())));
        assert_eq!(
            area.flags,
            VmFlags::READ
                | VmFlags::WRITE
                | VmFlags::MAYREAD
                | VmFlags::MAYWRITE
                | VmFlags::MAYEXEC
                | VmFlags::ACCOUNT
                | VmFlags::UFFD_WP
        );
        assert_eq!(area.unknown_flags, [*b"zz", *b"??"]);
        assert_eq!(
            [area.kernel_page_bytes, area.rss_bytes, area.pss_bytes, area.anonymous_bytes, area.swap_bytes],
            [4 << 10, 24 << 10, 23 << 10, 20 << 10, 8 << 10]
        );
        assert_eq!((area.thp_eligible, area.pkey), (Some(true), Some(3)));
    }

    #[test]
    fn codes_are_all_different() {
        let mut seen = VmFlags::empty();
        for a in b'a'..=b'z' {
            for b in b'a'..=b'z' {
                if let Some(flag) = VmFlags::from_code([a, b]) {
                    assert!(!seen.intersects(flag), "{}{} is there twice", char::from(a), char::from(b));
                    seen |= flag;
                }
            }
        }
        assert_eq!(seen, VmFlags::all());
    }

    #[test]
    fn an_area_must_have_flags() {
        let cut = ONE.replace("VmFlags: rd wr mr mw me ac uw zz ?? \n", "");
        let lost = |line| ParseError { file: "smaps", line, what: "mapping without VmFlags" };
        assert_eq!(parse(cut.as_bytes()), Err(lost(1)));
        assert_eq!(parse(format!("{ONE}{cut}{ONE}").as_bytes()), Err(lost(14)));
    }

    #[test]
    fn bad_lines_are_named() {
        for (bad, line) in [
            ("VmFlags: rd \n".to_string(), 1),
            (format!("{ONE}\n"), 14),
            (format!("{ONE}Rss: 4 kB\n"), 14),
            (ONE.replace("VmFlags: rd", "VmFlags: r"), 13),
            (ONE.replace("VmFlags: rd", "VmFlags: rdx"), 13),
            (ONE.replace("23 kB", "23"), 6),
            (ONE.replace("24 kB", "99999999999999999999 kB"), 5),
            (ONE.replace("24 kB", "18446744073709551615 kB"), 5),
            (ONE.replace("rw-p", "rw-q"), 1),
        ] {
            assert_eq!(parse(bad.as_bytes()).map_err(|e| e.line), Err(line), "{bad}");
        }
    }

    #[test]
    fn own_smaps_agree_with_own_maps() {
        let smaps = parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        assert!(smaps.len() > 5);
        for area in &smaps {
            assert!(area.unknown_flags.is_empty(), "{area:?}");
            assert_eq!(area.flags.contains(VmFlags::READ), area.vma.prot & libc::PROT_READ != 0);
            assert_eq!(area.flags.contains(VmFlags::WRITE), area.vma.prot & libc::PROT_WRITE != 0);
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn never_panics_when_damaged(at in 0..ONE.len(), byte: u8, cut in 0..ONE.len()) {
            let mut bytes = ONE.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse(&bytes);
            bytes.truncate(cut);
            let _ = parse(&bytes);
        }
    }
}
