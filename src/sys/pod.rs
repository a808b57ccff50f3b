//! Plain kernel structs as bytes and back.

use std::mem::{MaybeUninit, size_of};

/// A struct for which every bit pattern is a value and which has no padding that matters.
///
/// # Safety
/// Only for `#[repr(C)]` integers-only types: any bytes of the right length must be a valid value.
pub unsafe trait Pod: Copy + 'static {}

macro_rules! pod {
    ($($t:ty),* $(,)?) => { $(
        // SAFETY: an integer, or a C struct of integers (and arrays of them) only.
        unsafe impl Pod for $t {}
    )* };
}

pod!(
    u8,
    u16,
    u32,
    u64,
    i32,
    i64,
    libc::user_regs_struct,
    libc::iovec,
    libc::timespec,
    libc::itimerval,
    libc::itimerspec,
    libc::rlimit64,
    libc::sock_filter
);
// SAFETY: arrays of plain values are plain.
unsafe impl<T: Pod, const N: usize> Pod for [T; N] {}

/// The bytes of `value`.
pub fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: `T` is `Pod`, so its memory is `size_of::<T>()` readable bytes for the borrow's life.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
}

/// The bytes of all `values`.
pub fn bytes_of_all<T: Pod>(values: &[T]) -> &[u8] {
    // SAFETY: as above, for as many values as there are.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// The value whose bytes are at the start of `bytes`; `None` when there are too few.
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    let bytes = bytes.get(..size_of::<T>())?;
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: source and destination are `size_of::<T>()` bytes, and every pattern is a `T`.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast::<u8>(), bytes.len());
        Some(value.assume_init())
    }
}

/// An all-zero value.
pub fn zeroed<T: Pod>() -> T {
    // SAFETY: every bit pattern, zero too, is a `T`.
    unsafe { MaybeUninit::<T>::zeroed().assume_init() }
}
