//! Our own registration of restartable sequences, which a cloned child inherits.

/// Address, size and signature of what glibc (2.35+) registered for this thread; `None` without.
pub fn own() -> Option<(u64, u32, u32)> {
    // SAFETY: looks up symbols by name; null when the C library has none.
    let (offset, size) = unsafe {
        (
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>(),
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>(),
        )
    };
    if offset.is_null() || size.is_null() {
        return None;
    }
    let base: u64;
    // SAFETY: glibc's two symbols are constant after start, and fs:0 holds the thread pointer.
    let (offset, size) = unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) base, options(nostack, pure, readonly));
        (*offset, *size)
    };
    // RSEQ_SIG of x86; glibc registers at least the original 32 bytes.
    (size != 0).then(|| (base.wrapping_add_signed(offset as i64), size.max(32), 0x5305_3053))
}
