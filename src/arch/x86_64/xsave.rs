//! The xsave area: where its parts lie on this processor.
//!
//! The area is in the standard format, as PTRACE_GETREGSET (NT_X86_XSTATE) gives and takes it: 512
//! bytes of fxsave, a header of 64 bytes, and one part for each feature at an offset that the processor
//! tells (AVX-512 lies elsewhere on AMD than on Intel).

use std::sync::OnceLock;

use crate::{image::pb, sys::cpuid};

/// Length of the fxsave part.
pub const FXSAVE_LEN: usize = 512;
/// Where the header ends and the parts begin.
pub const HEADER_END: usize = 576;
/// Where the kernel notes in the fxsave part which features it gives.
const SW_XCR0: usize = 464;
/// Features that a process must ask for before it may use them: AMX tile data.
pub const DYNAMIC: u64 = 1 << 18;

/// One part of the area, by the number of its feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Bit in the header.
    pub feature: u32,
    /// Offset of its first byte.
    pub at: usize,
    /// Its length in bytes.
    pub len: usize,
}

/// The parts that the kernel lets user space use here, beyond x87 and SSE.
pub fn parts() -> &'static [Part] {
    static PARTS: OnceLock<Vec<Part>> = OnceLock::new();
    PARTS.get_or_init(|| {
        let xcr0 = cpuid::xcr0();
        (2..63)
            .filter(|feature| xcr0 >> feature & 1 == 1)
            .filter_map(|feature| {
                let [len, at, _, _] = cpuid::leaf(0xd, feature);
                let part = Part { feature, at: usize::try_from(at).ok()?, len: usize::try_from(len).ok()? };
                // Nothing lies further out than a few tens of KiB; a hypervisor that says so is wrong.
                (part.len > 0 && part.at >= HEADER_END && part.at + part.len <= 1 << 20).then_some(part)
            })
            .collect()
    })
}

/// The part of one feature, if this processor has it.
pub fn part(feature: u32) -> Option<Part> {
    parts().iter().copied().find(|p| p.feature == feature)
}

/// Length of the whole area, which PTRACE_SETREGSET wants exactly.
pub fn len() -> usize {
    parts().iter().map(|p| p.at + p.len).max().unwrap_or(HEADER_END)
}

fn word(area: &[u8], at: usize) -> u64 {
    area.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// The header's first word: features that are not in their initial state.
pub fn in_use(area: &[u8]) -> u64 {
    word(area, FXSAVE_LEN)
}

/// Features that this area speaks of, without those that need a permission and hold nothing.
pub(super) fn features(area: &[u8]) -> u64 {
    let told = word(area, SW_XCR0);
    let all = if told & 3 == 3 { told } else { cpuid::xcr0() };
    (all & !(DYNAMIC & !in_use(area))) | 3
}

/// Length of the area up to the last of its [`features`].
pub(super) fn used_len(area: &[u8]) -> usize {
    let features = features(area);
    let used = parts().iter().filter(|p| features >> p.feature & 1 == 1);
    used.map(|p| p.at + p.len).max().unwrap_or(HEADER_END)
}

/// An image's processor state that cannot be had here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XsaveError {
    /// This processor or kernel lacks a feature whose registers are in use.
    #[error("processor feature {} is in use, and this machine does not have it", name(*.0))]
    Lacks(u32),
    /// A part has the wrong length.
    #[error("{what} has {got} values instead of {want}")]
    Length {
        /// The field.
        what: &'static str,
        /// Values there are.
        got: usize,
        /// Values there must be.
        want: usize,
    },
}

/// Features as people call them.
pub fn name(feature: u32) -> &'static str {
    match feature {
        0 => "x87",
        1 => "SSE",
        2 => "AVX",
        3 | 4 => "MPX",
        5..=7 => "AVX-512",
        9 => "protection keys",
        11 | 12 => "shadow stacks",
        17 | 18 => "AMX",
        19 => "APX",
        _ => "unknown to crtool",
    }
}

/// Features that the image format has a place for.
const IN_IMAGE: u64 = 0x2ff;

/// Features that go into fields of our own: AMX configuration and tiles, APX.
const IN_PARTS: u64 = 7 << 17;

/// The first feature in use in this area that images cannot carry.
pub fn not_in_image(area: &[u8]) -> Option<u32> {
    let odd = in_use(area) & !(IN_IMAGE | IN_PARTS);
    (odd != 0).then(|| odd.trailing_zeros())
}

fn words32(area: &[u8], at: usize, len: usize) -> Vec<u32> {
    let bytes = area.get(at..at + len).unwrap_or_default();
    bytes.chunks_exact(4).filter_map(|c| c.try_into().ok().map(u32::from_ne_bytes)).collect()
}

fn words64(area: &[u8], feature: u32) -> Vec<u64> {
    let bytes = part(feature).and_then(|p| area.get(p.at..p.at + p.len)).unwrap_or_default();
    bytes.chunks_exact(8).filter_map(|c| c.try_into().ok().map(u64::from_ne_bytes)).collect()
}

fn half(area: &[u8], at: usize) -> u32 {
    area.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, |b| u32::from(u16::from_ne_bytes(b)))
}

fn part32(area: &[u8], feature: u32) -> Vec<u32> {
    part(feature).map(|p| words32(area, p.at, p.len)).unwrap_or_default()
}

/// The image message of an xsave area as PTRACE_GETREGSET gives it.
pub fn to_entry(area: &[u8]) -> pb::UserX86FpregsEntry {
    let mxcsr = words32(area, 24, 8);
    pb::UserX86FpregsEntry {
        cwd: half(area, 0),
        swd: half(area, 2),
        twd: half(area, 4),
        fop: half(area, 6),
        rip: word(area, 8),
        rdp: word(area, 16),
        mxcsr: mxcsr.first().copied().unwrap_or(0),
        mxcsr_mask: mxcsr.get(1).copied().unwrap_or(0),
        st_space: words32(area, 32, 128),
        xmm_space: words32(area, 160, 256),
        padding: Vec::new(),
        xsave: (!parts().is_empty()).then(|| pb::UserX86XsaveEntry {
            xstate_bv: in_use(area) & IN_IMAGE,
            ymmh_space: part32(area, 2),
            bndreg_state: words64(area, 3),
            bndcsr_state: words64(area, 4),
            opmask_reg: words64(area, 5),
            zmm_upper: words64(area, 6),
            hi16_zmm: words64(area, 7),
            pkru: part32(area, 9),
            cet: None,
            parts: (0..64u32)
                .filter(|feature| (in_use(area) & IN_PARTS) >> feature & 1 == 1)
                .filter_map(|feature| {
                    let part = part(feature)?;
                    let data = area.get(part.at..part.at + part.len)?.to_vec();
                    Some(pb::UserX86XsavePartEntry { feature, data })
                })
                .collect(),
        }),
    }
}

fn put_words<const N: usize>(area: &mut [u8], at: usize, words: impl Iterator<Item = [u8; N]>) {
    for (to, word) in area.get_mut(at..).unwrap_or_default().chunks_exact_mut(N).zip(words) {
        to.copy_from_slice(&word);
    }
}

/// Puts one part where it belongs here, if it is in use.
fn put_part<const N: usize>(
    area: &mut [u8],
    bv: u64,
    feature: u32,
    what: &'static str,
    words: impl ExactSizeIterator<Item = [u8; N]>,
) -> Result<(), XsaveError> {
    if bv >> feature & 1 == 0 {
        return Ok(());
    }
    let part = part(feature).ok_or(XsaveError::Lacks(feature))?;
    let (got, want) = (words.len(), part.len / N);
    // The tails of these two are reserved, and an image may lack them.
    let short = matches!(feature, 4 | 9) && (1..want).contains(&got);
    if got != want && !short {
        return Err(XsaveError::Length { what, got, want });
    }
    put_words(area, part.at, words);
    Ok(())
}

/// Feature of the PKRU register: rights for memory protection keys.
const PKRU: u32 = 9;
/// What the kernel starts programs with: no rights for any key but key 0.
const PKRU_DEFAULT: u32 = 0x5555_5554;
/// Rights for key 0, which all memory has that nobody gave a key.
const PKRU_KEY_0: u32 = 3;

/// This area with all rights for protection key 0, if it denies any of them.
pub fn with_rights_for_key_0(area: &[u8]) -> Option<Vec<u8>> {
    let at = part(PKRU)?.at;
    let pkru = area.get(at..at + 4)?;
    let denied = in_use(area) >> PKRU & 1 == 1 && u32::from(*pkru.first()?) & PKRU_KEY_0 != 0;
    let mut granted = denied.then(|| area.to_vec())?;
    *granted.get_mut(at)? &= 0xfc;
    Some(granted)
}

/// Puts the rights for protection keys where they belong, and tells what that makes of `bv`.
fn put_pkru(area: &mut [u8], bv: u64, pkru: &[u32]) -> Result<u64, XsaveError> {
    let used = bv >> PKRU & 1 == 1;
    match part(PKRU) {
        // From a processor without keys: what a program has that starts here.
        Some(part) if !used && pkru.is_empty() => {
            put_words(area, part.at, [PKRU_DEFAULT.to_ne_bytes()].into_iter());
            Ok(bv | 1 << PKRU)
        }
        // To one without: whoever has keys is refused elsewhere, and rights for the rest say nothing.
        None if used && pkru.first().is_some_and(|rights| rights & PKRU_KEY_0 == 0) => Ok(bv & !(1 << PKRU)),
        _ => {
            put_part(area, bv, PKRU, "pkru", pkru.iter().map(|w| w.to_ne_bytes()))?;
            Ok(bv)
        }
    }
}

/// The xsave area of this processor, as PTRACE_SETREGSET takes it, with the state of the message.
pub fn from_entry(entry: &pb::UserX86FpregsEntry) -> Result<Vec<u8>, XsaveError> {
    for (what, got, want) in
        [("st_space", entry.st_space.len(), 32), ("xmm_space", entry.xmm_space.len(), 64)]
    {
        if got != want {
            return Err(XsaveError::Length { what, got, want });
        }
    }
    let mut area = vec![0u8; len()];
    let halves = [entry.cwd, entry.swd, entry.twd, entry.fop];
    put_words(&mut area, 0, halves.iter().map(|h| u16::try_from(h & 0xffff).unwrap_or(0).to_ne_bytes()));
    put_words(&mut area, 8, [entry.rip, entry.rdp].iter().map(|w| w.to_ne_bytes()));
    put_words(&mut area, 24, [entry.mxcsr, entry.mxcsr_mask].iter().map(|w| w.to_ne_bytes()));
    put_words(&mut area, 32, entry.st_space.iter().map(|w| w.to_ne_bytes()));
    put_words(&mut area, 160, entry.xmm_space.iter().map(|w| w.to_ne_bytes()));
    // Without an xsave part the message is from a processor that only had x87 and SSE.
    let Some(x) = &entry.xsave else {
        let bv = put_pkru(&mut area, 3, &[])?;
        put_words(&mut area, FXSAVE_LEN, [bv.to_ne_bytes()].into_iter());
        return Ok(area);
    };
    if x.xstate_bv & !IN_IMAGE != 0 {
        return Err(XsaveError::Lacks((x.xstate_bv & !IN_IMAGE).trailing_zeros()));
    }
    let mut bv = put_pkru(&mut area, x.xstate_bv, &x.pkru)?;
    for entry in &x.parts {
        let feature = entry.feature;
        if feature > 63 || IN_PARTS >> feature & 1 == 0 {
            return Err(XsaveError::Lacks(feature));
        }
        let part = part(feature).ok_or(XsaveError::Lacks(feature))?;
        if entry.data.len() != part.len {
            return Err(XsaveError::Length { what: name(feature), got: entry.data.len(), want: part.len });
        }
        put_words(&mut area, part.at, entry.data.iter().map(|byte| [*byte]));
        bv |= 1 << feature;
    }
    put_words(&mut area, FXSAVE_LEN, [bv.to_ne_bytes()].into_iter());
    put_part(&mut area, bv, 2, "ymmh_space", x.ymmh_space.iter().map(|w| w.to_ne_bytes()))?;
    put_part(&mut area, bv, 3, "bndreg_state", x.bndreg_state.iter().map(|w| w.to_ne_bytes()))?;
    put_part(&mut area, bv, 4, "bndcsr_state", x.bndcsr_state.iter().map(|w| w.to_ne_bytes()))?;
    put_part(&mut area, bv, 5, "opmask_reg", x.opmask_reg.iter().map(|w| w.to_ne_bytes()))?;
    put_part(&mut area, bv, 6, "zmm_upper", x.zmm_upper.iter().map(|w| w.to_ne_bytes()))?;
    put_part(&mut area, bv, 7, "hi16_zmm", x.hi16_zmm.iter().map(|w| w.to_ne_bytes()))?;
    Ok(area)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An area with random registers; reserved bytes, where the processor has nothing, are zero.
    fn area(bytes: &[u8], bv: u64) -> Vec<u8> {
        let mut area = vec![0u8; len()];
        let mut fill = |at: usize, len: usize| {
            for (n, byte) in area[at..at + len].iter_mut().enumerate() {
                *byte = bytes[(at + n) % bytes.len()];
            }
        };
        fill(0, 416);
        for part in parts() {
            if bv >> part.feature & 1 == 1 {
                fill(part.at, part.len);
            }
        }
        area[FXSAVE_LEN..FXSAVE_LEN + 8].copy_from_slice(&bv.to_ne_bytes());
        area
    }

    proptest! {
        #[test]
        fn every_register_comes_back(bytes in proptest::collection::vec(any::<u8>(), 997..2000), bits: u64) {
            let have = parts().iter().fold(3, |have, p| have | 1u64 << p.feature);
            let area = area(&bytes, bits & have & (IN_IMAGE | IN_PARTS));
            prop_assert_eq!(from_entry(&to_entry(&area)).unwrap(), area);
        }

        #[test]
        fn any_message_is_an_area_or_an_error(bv: u64, n in 0usize..200) {
            let mut entry = to_entry(&area(&[1, 2, 3], 3));
            let x = entry.xsave.as_mut().unwrap();
            x.xstate_bv = bv;
            x.hi16_zmm = vec![7; n];
            if let Ok(area) = from_entry(&entry) {
                prop_assert_eq!(area.len(), len());
            }
        }
    }

    #[test]
    fn what_this_machine_lacks_is_named() {
        let mut entry = to_entry(&area(&[0], 3));
        entry.xsave.as_mut().unwrap().xstate_bv = 1 << 18;
        let error = from_entry(&entry).unwrap_err();
        assert_eq!(error.to_string(), "processor feature AMX is in use, and this machine does not have it");
        entry.st_space.pop();
        assert!(matches!(
            from_entry(&entry),
            Err(XsaveError::Length { what: "st_space", got: 31, want: 32 })
        ));
        let mut amx = area(&[0], 3);
        assert_eq!(not_in_image(&amx), None);
        amx[FXSAVE_LEN + 2] = 2;
        assert_eq!(not_in_image(&amx), None);
        amx[FXSAVE_LEN + 2] = 0x10;
        assert_eq!(not_in_image(&amx), Some(20));
    }

    #[test]
    fn parts_do_not_overlap_and_fill_the_size_the_processor_tells() {
        let mut parts = parts().to_vec();
        parts.sort_by_key(|p| p.at);
        for pair in parts.windows(2) {
            assert!(pair[0].at + pair[0].len <= pair[1].at, "{pair:?}");
        }
        assert_eq!(len(), usize::try_from(cpuid::leaf(0xd, 0)[1]).unwrap());
    }

    #[test]
    fn tile_data_counts_only_when_used() {
        let mut area = vec![0u8; HEADER_END];
        area[SW_XCR0..SW_XCR0 + 8].copy_from_slice(&(7u64 | DYNAMIC).to_ne_bytes());
        assert_eq!(features(&area), 7);
        area[FXSAVE_LEN..FXSAVE_LEN + 8].copy_from_slice(&DYNAMIC.to_ne_bytes());
        assert_eq!(features(&area), 7 | DYNAMIC);
    }
}
