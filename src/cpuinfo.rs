//! The processor a tree was dumped on: `cpuinfo.img`.
//!
//! Written when a dump is asked for it (`--cpu-cap` with anything but `none`), and compared when a restore is
//! asked to (`--cpu-cap` again). Programs look at the processor once, when they start, and choose their
//! instructions; on a lesser one they die of SIGILL, perhaps hours later.
//!
//! The capability words stand in the order of CRIU's second version: words of cpuid leaves, with three (2, 5 and 12) for
//! processors nobody has, and one (3) that the kernel makes up, of which CRIU sets three bits.

use crate::{
    image::{ImageError, ImageKind, Store, TypedStore, pb},
    settings::CpuCap,
    sys::cpuid::{leaf, xcr0},
};

/// Version of the order of words.
const CAPABILITY_VERSION: u32 = 2;
/// cpuid is there, long no-ops are, string moves are fast.
const MADE_UP: u32 = 1 << 25 | 1 << 20 | 1 << 16;
/// CRIU does not count the SSE part of the xsave area among its features, nor what it cannot name.
const COUNTED_FEATURES: u64 = 0b1111_1101;

/// Words whose bits are instructions or what goes with them.
const INSTRUCTION_WORDS: [usize; 9] = [0, 1, 4, 6, 9, 10, 11, 13, 18];

/// Names of bits that programs choose by: word, bit, name.
static NAMES: &[(usize, u32, &str)] = &[
    (0, 23, "mmx"),
    (0, 25, "sse"),
    (0, 26, "sse2"),
    (1, 27, "rdtscp"),
    (4, 0, "sse3"),
    (4, 1, "pclmulqdq"),
    (4, 9, "ssse3"),
    (4, 12, "fma"),
    (4, 13, "cmpxchg16b"),
    (4, 19, "sse4_1"),
    (4, 20, "sse4_2"),
    (4, 22, "movbe"),
    (4, 23, "popcnt"),
    (4, 25, "aes"),
    (4, 26, "xsave"),
    (4, 27, "osxsave"),
    (4, 28, "avx"),
    (4, 29, "f16c"),
    (4, 30, "rdrand"),
    (6, 5, "abm"),
    (6, 6, "sse4a"),
    (9, 3, "bmi1"),
    (9, 5, "avx2"),
    (9, 8, "bmi2"),
    (9, 9, "erms"),
    (9, 11, "rtm"),
    (9, 16, "avx512f"),
    (9, 17, "avx512dq"),
    (9, 18, "rdseed"),
    (9, 19, "adx"),
    (9, 21, "avx512ifma"),
    (9, 28, "avx512cd"),
    (9, 29, "sha_ni"),
    (9, 30, "avx512bw"),
    (9, 31, "avx512vl"),
    (10, 1, "xsavec"),
    (10, 3, "xsaves"),
    (11, 1, "avx512vbmi"),
    (11, 3, "pku"),
    (11, 6, "avx512_vbmi2"),
    (11, 8, "gfni"),
    (11, 9, "vaes"),
    (11, 10, "vpclmulqdq"),
    (11, 11, "avx512_vnni"),
    (11, 12, "avx512_bitalg"),
    (11, 14, "avx512_vpopcntdq"),
    (18, 4, "fsrm"),
    (18, 8, "avx512_vp2intersect"),
    (18, 22, "amx_bf16"),
    (18, 23, "avx512_fp16"),
    (18, 24, "amx_tile"),
];

/// This processor will not do for that tree.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum CpuError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the images do not say which processor they need: dump with --cpu-cap too")]
    Absent,
    #[error("cpuinfo.img does not describe a processor of this architecture")]
    Foreign,
    #[error("this processor lacks instructions that the tree may use: {}; --cpu-cap=none takes the risk", .0.join(" "))]
    Instructions(Vec<String>),
    #[error("this processor keeps less floating point and vector state than that of the dump ({what})")]
    State { what: &'static str },
    #[error("this processor is not the one of the dump ({what} differs)")]
    Other { what: &'static str },
}

/// Writes `cpuinfo.img` if a dump is to have one.
pub fn write(store: &dyn Store, caps: Option<CpuCap>) -> Result<(), ImageError> {
    if caps.is_none_or(|caps| caps == CpuCap::NONE) {
        return Ok(());
    }
    store.write_one(ImageKind::Cpuinfo, None, &own())
}

/// Compares this processor with `cpuinfo.img` as far as a restore is asked to.
pub fn check(store: &dyn Store, caps: Option<CpuCap>) -> Result<(), CpuError> {
    let Some(caps) = caps.filter(|&caps| caps != CpuCap::NONE) else { return Ok(()) };
    let Some(entry) = store.read_one::<pb::CpuinfoEntry>(ImageKind::Cpuinfo, None)? else {
        // State is checked with the registers of every thread, image or not.
        return if caps.cpu || caps.ins { Err(CpuError::Absent) } else { Ok(()) };
    };
    compare_with_own(&entry, caps)
}

/// What `cpuinfo.img` would say of this processor.
pub(crate) fn own() -> pb::CpuinfoEntry {
    pb::CpuinfoEntry { x86_entry: vec![describe()], ..Default::default() }
}

/// Compares this processor with another one.
pub(crate) fn compare_with_own(theirs: &pb::CpuinfoEntry, caps: CpuCap) -> Result<(), CpuError> {
    let [theirs] = theirs.x86_entry.as_slice() else { return Err(CpuError::Foreign) };
    compare(theirs, &describe(), caps)
}

fn compare(theirs: &pb::CpuinfoX86Entry, ours: &pb::CpuinfoX86Entry, caps: CpuCap) -> Result<(), CpuError> {
    if theirs.capability_ver != CAPABILITY_VERSION && (caps.cpu || caps.ins) {
        return Err(CpuError::Other { what: "the version of the description" });
    }
    if caps.fpu {
        if theirs.xfeatures_mask() & !ours.xfeatures_mask() != 0 {
            return Err(CpuError::State { what: "kinds of state" });
        }
        if theirs.xsave_size() > ours.xsave_size_max() {
            return Err(CpuError::State { what: "its size" });
        }
    }
    if caps.ins {
        let missing = missing(&theirs.capability, &ours.capability);
        if !missing.is_empty() {
            return Err(CpuError::Instructions(missing));
        }
    }
    if caps.cpu {
        let differs = [
            (theirs.vendor_id != ours.vendor_id, "vendor"),
            (theirs.cpu_family != ours.cpu_family, "family"),
            (theirs.model != ours.model, "model"),
            (theirs.stepping != ours.stepping, "stepping"),
            (theirs.capability != ours.capability, "what it can do"),
        ];
        if let Some((_, what)) = differs.into_iter().find(|(differs, _)| *differs) {
            return Err(CpuError::Other { what });
        }
    }
    Ok(())
}

/// Names of the instructions that `theirs` has and `ours` has not.
fn missing(theirs: &[u32], ours: &[u32]) -> Vec<String> {
    let mut names = Vec::new();
    for word in INSTRUCTION_WORDS {
        let [theirs, ours] = [theirs, ours].map(|words| words.get(word).copied().unwrap_or(0));
        let lacking = theirs & !ours;
        for bit in (0..32).filter(|bit| lacking & (1 << bit) != 0) {
            let name = NAMES.iter().find(|(w, b, _)| (*w, *b) == (word, bit));
            names.push(
                name.map_or_else(|| format!("word-{word}-bit-{bit}"), |(_, _, name)| (*name).to_owned()),
            );
        }
    }
    names
}

/// This processor.
fn describe() -> pb::CpuinfoX86Entry {
    let [basic, b, c, d] = leaf(0, 0);
    let [extended, ..] = leaf(0x8000_0000, 0);
    // A leaf beyond the last one answers with something else.
    let at = |number: u32, sub: u32| {
        let last = if number >= 0x8000_0000 { extended } else { basic };
        if number <= last { leaf(number, sub) } else { [0; 4] }
    };
    let vendor = [b, d, c].map(u32::to_le_bytes).concat();
    let vendor_id = match vendor.as_slice() {
        b"GenuineIntel" => pb::cpuinfo_x86_entry::Vendor::Intel,
        b"AuthenticAMD" => pb::cpuinfo_x86_entry::Vendor::Amd,
        _ => pb::cpuinfo_x86_entry::Vendor::Unknown,
    };
    let [signature, _, one_ecx, one_edx] = at(1, 0);
    let [_, _, far_ecx, far_edx] = at(0x8000_0001, 0);
    let [_, seven_ebx, seven_ecx, seven_edx] = at(7, 0);
    let family = match signature >> 8 & 0xf {
        0xf => 0xf + (signature >> 20 & 0xff),
        family => family,
    };
    let model = (signature >> 4 & 0xf) | if family >= 6 { (signature >> 16 & 0xf) << 4 } else { 0 };
    let [_, xsave_size, xsave_size_max, _] = at(0xd, 0);
    let capability = vec![
        one_edx,
        far_edx,
        0,
        MADE_UP,
        one_ecx,
        0,
        far_ecx,
        0,
        0,
        seven_ebx,
        at(0xd, 1)[0],
        seven_ecx,
        at(0xf, 1)[3],
        at(0x8000_0008, 0)[1],
        at(6, 0)[0],
        at(0x8000_000a, 0)[3],
        at(0xf, 0)[3],
        at(0x8000_0007, 0)[1],
        seven_edx,
    ];
    let brand: Vec<u8> = (0x8000_0002..=0x8000_0004u32)
        .flat_map(|number| at(number, 0))
        .flat_map(u32::to_le_bytes)
        .take_while(|&byte| byte != 0)
        .collect();
    pb::CpuinfoX86Entry {
        vendor_id: vendor_id.into(),
        cpu_family: family,
        model,
        stepping: signature & 0xf,
        capability_ver: CAPABILITY_VERSION,
        capability,
        model_id: Some(brand.trim_ascii().to_vec()),
        xfeatures_mask: Some(xcr0() & COUNTED_FEATURES),
        xsave_size: Some(xsave_size),
        xsave_size_max: Some(xsave_size_max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::MemStore;

    const INS: CpuCap = CpuCap { fpu: false, cpu: false, ins: true };
    const CPU: CpuCap = CpuCap { fpu: false, cpu: true, ins: false };
    const FPU: CpuCap = CpuCap { fpu: true, cpu: false, ins: false };

    #[test]
    fn itself_will_do() {
        let store = MemStore::new();
        write(&store, Some(CpuCap::ALL)).unwrap();
        check(&store, Some(CpuCap::ALL)).unwrap();
        check(&store, None).unwrap();
    }

    #[test]
    fn only_when_asked_for() {
        let store = MemStore::new();
        write(&store, None).unwrap();
        write(&store, Some(CpuCap::NONE)).unwrap();
        assert!(store.names().unwrap().is_empty());
        check(&store, None).unwrap();
        check(&store, Some(CpuCap::NONE)).unwrap();
        check(&store, Some(FPU)).unwrap();
        assert!(matches!(check(&store, Some(INS)), Err(CpuError::Absent)));
        assert!(matches!(check(&store, Some(CPU)), Err(CpuError::Absent)));
    }

    #[test]
    fn a_lesser_processor_will_not() {
        let theirs = describe();
        let mut ours = describe();
        ours.capability[9] &= !(1 << 5);
        ours.capability[4] &= !(1 << 20);
        let mut better = theirs.clone();
        better.capability[9] |= 1 << 5;
        better.capability[4] |= 1 << 20;
        match compare(&better, &ours, INS) {
            Err(CpuError::Instructions(names)) => assert_eq!(names, ["sse4_2", "avx2"]),
            other => panic!("{other:?}"),
        }
        // A better one will do for instructions, and is another one all the same.
        compare(&ours, &better, INS).unwrap();
        assert!(matches!(compare(&ours, &better, CPU), Err(CpuError::Other { what: "what it can do" })));
        assert!(matches!(
            compare(&pb::CpuinfoX86Entry { stepping: ours.stepping + 1, ..ours.clone() }, &ours, CPU),
            Err(CpuError::Other { what: "stepping" })
        ));
        let wide = pb::CpuinfoX86Entry { xfeatures_mask: Some(u64::MAX), ..theirs.clone() };
        assert!(matches!(compare(&wide, &theirs, FPU), Err(CpuError::State { .. })));
        let large = pb::CpuinfoX86Entry { xsave_size: Some(u32::MAX), ..theirs.clone() };
        assert!(matches!(compare(&large, &theirs, FPU), Err(CpuError::State { .. })));
        compare(&large, &theirs, INS).unwrap();
        // Words that an image does not have are no instructions.
        let short = pb::CpuinfoX86Entry { capability: Vec::new(), ..theirs.clone() };
        compare(&short, &theirs, INS).unwrap();
    }
}
