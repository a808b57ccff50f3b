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
