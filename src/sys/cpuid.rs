//! The processor's own description of itself.

/// The four registers of one leaf: eax, ebx, ecx, edx.
#[allow(unused_unsafe)]
pub fn leaf(leaf: u32, sub: u32) -> [u32; 4] {
    // SAFETY: every x86_64 processor has the instruction; leaves it does not know read as zero.
    let r = unsafe { std::arch::x86_64::__cpuid_count(leaf, sub) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// XCR0: the parts of the xsave area that the kernel lets user space use; x87 and SSE where there is no xsave.
pub fn xcr0() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if leaf(1, 0)[2] & OSXSAVE == 0 {
        return 3;
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE says that user space may execute xgetbv; it changes eax and edx only.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0u32, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Whether the kernel can make the cpuid instruction fault (ARCH_SET_CPUID).
pub fn can_fault() -> bool {
    const ARCH_SET_CPUID: i32 = 0x1012;
    // SAFETY: this says that the instruction does not fault, which is so.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_CPUID, 1u64) == 0 }
}

/// Features of the xsave area that programs may use, some of them when they ask (ARCH_GET_XCOMP_SUPP, Linux 5.16); 0 for a
/// kernel that knows no permissions.
pub fn xcomp_supported() -> u64 {
    const ARCH_GET_XCOMP_SUPP: i32 = 0x1021;
    let mut mask = 0u64;
    // SAFETY: `mask` is live.
    let done = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &raw mut mask) == 0 };
    if done { mask } else { 0 }
}
