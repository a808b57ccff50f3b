//! CRC32C (Castagnoli), which every frame and every image carries.

use std::sync::LazyLock;

use crc_fast::{CrcAlgorithm::Crc32Iscsi, Digest};

/// Of all `bytes`.
pub fn of(bytes: &[u8]) -> u32 {
    append(0, bytes)
}

/// Of bytes whose CRC32C is `crc` with `bytes` behind them.
pub fn append(crc: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    // 32 bits wide.
    digest.finalize() as u32
}

/// Of bytes whose CRC32C is `crc` with `len` more behind them, whose own is `next`.
pub fn combine(crc: u32, next: u32, len: u32) -> u32 {
    let powers = SHIFTS.iter().enumerate().filter(|(bit, _)| len & (1 << bit) != 0);
    powers.fold(crc, |crc, (_, shift)| shift.of(crc)) ^ next
}

/// What 2^n bytes of zeros make of a CRC: that is linear, so it is known by what they make of each bit of it. Libraries
/// find it anew each time, which takes as long as the CRC of 256 KiB.
static SHIFTS: LazyLock<[Shift; 32]> = LazyLock::new(|| {
    /// The polynomial, bits reversed.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut bit = Shift([0; 32]);
    for (n, to) in bit.0.iter_mut().enumerate() {
        *to = if n == 0 { POLYNOMIAL } else { 1 << (n - 1) };
    }
    let mut shift = bit.twice().twice().twice();
    std::array::from_fn(|_| {
        let twice = shift.twice();
        std::mem::replace(&mut shift, twice)
    })
});

#[derive(Debug, Clone, Copy)]
struct Shift([u32; 32]);

impl Shift {
    fn of(&self, crc: u32) -> u32 {
        self.0.iter().enumerate().fold(0, |sum, (bit, to)| if crc & (1 << bit) != 0 { sum ^ to } else { sum })
    }

    fn twice(&self) -> Self {
        Self(self.0.map(|to| self.of(to)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_the_one_of_the_standard() {
        // RFC 3720, B.4.
        assert_eq!(of(&[0; 32]), 0x8a91_36aa);
        assert_eq!(of(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(of(b"123456789"), 0xe306_9283);
        assert_eq!(of(b""), 0);
    }

    proptest! {
        #[test]
        fn parts_make_the_whole(a: Vec<u8>, b in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let whole = of(&[a.clone(), b.clone()].concat());
            prop_assert_eq!(append(of(&a), &b), whole);
            prop_assert_eq!(combine(of(&a), of(&b), b.len() as u32), whole);
        }
    }

    #[test]
    fn far_behind() {
        let zeros = vec![0; (1 << 20) + 12345];
        let len = u32::try_from(zeros.len()).unwrap();
        assert_eq!(combine(of(b"crtool"), of(&zeros), len), append(of(b"crtool"), &zeros));
    }
}
