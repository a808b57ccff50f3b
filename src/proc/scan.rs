//! A cursor over one line of bytes, and the lines of a file.
//!
//! Every step takes what it names and moves on, or says `None`. After a `None` the position means nothing.

/// What is left of a line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scan<'a>(&'a [u8]);

impl<'a> Scan<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Scan<'a> {
        Scan(bytes)
    }

    /// Everything not yet taken.
    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// Takes one byte.
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Takes exactly this text.
    pub(super) fn text(&mut self, text: &[u8]) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }

    /// Skips blanks and tabs, also none.
    pub(super) fn blanks(&mut self) {
        while let [b' ' | b'\t', rest @ ..] = self.0 {
            self.0 = rest;
        }
    }

    /// Takes everything before `stop`, and `stop`.
    pub(super) fn until(&mut self, stop: u8) -> Option<&'a [u8]> {
        let at = self.0.iter().position(|&b| b == stop)?;
        let (word, rest) = self.0.split_at_checked(at)?;
        self.0 = rest.get(1..)?;
        Some(word)
    }

    /// Skips blanks, then takes a word: all up to the next blank or the end; `None` if there is none.
    pub(super) fn word(&mut self) -> Option<&'a [u8]> {
        self.blanks();
        let len = self.0.iter().position(|b| matches!(b, b' ' | b'\t')).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }

    /// Takes a decimal number; `None` without a digit or above u64.
    #[inline]
    pub(super) fn dec(&mut self) -> Option<u64> {
        self.digits(10, |b| match b {
            b'0'..=b'9' => Some(b - b'0'),
            _ => None,
        })
    }

    /// Takes a hexadecimal number without `0x`.
    #[inline]
    pub(super) fn hex(&mut self) -> Option<u64> {
        self.digits(16, hex_digit)
    }

    /// Takes an octal number; the kernel's leading 0 is one of its digits.
    pub(super) fn oct(&mut self) -> Option<u64> {
        self.digits(8, |b| match b {
            b'0'..=b'7' => Some(b - b'0'),
            _ => None,
        })
    }

    #[inline]
    fn digits(&mut self, radix: u64, digit: impl Fn(u8) -> Option<u8>) -> Option<u64> {
        let mut value = 0u64;
        let mut rest = self.0;
        while let Some((first, tail)) = rest.split_first()
            && let Some(d) = digit(*first)
        {
            value = value.checked_mul(radix)?.checked_add(u64::from(d))?;
            rest = tail;
        }
        if rest.len() == self.0.len() {
            return None;
        }
        self.0 = rest;
        Some(value)
    }

    /// Takes a decimal number that may be negative.
    pub(super) fn signed(&mut self) -> Option<i64> {
        if let Some(rest) = self.0.strip_prefix(b"-") {
            self.0 = rest;
            0i64.checked_sub_unsigned(self.dec()?)
        } else {
            i64::try_from(self.dec()?).ok()
        }
    }

    /// [`dec`](Scan::dec) into whatever integer the field has.
    pub(super) fn dec_as<T: TryFrom<u64>>(&mut self) -> Option<T> {
        T::try_from(self.dec()?).ok()
    }

    /// [`signed`](Scan::signed) into whatever integer the field has.
    pub(super) fn signed_as<T: TryFrom<i64>>(&mut self) -> Option<T> {
        T::try_from(self.signed()?).ok()
    }

    /// [`hex`](Scan::hex) into whatever integer the field has.
    pub(super) fn hex_as<T: TryFrom<u64>>(&mut self) -> Option<T> {
        T::try_from(self.hex()?).ok()
    }

    /// [`oct`](Scan::oct) into whatever integer the field has.
    pub(super) fn oct_as<T: TryFrom<u64>>(&mut self) -> Option<T> {
        T::try_from(self.oct()?).ok()
    }

    /// Skips blanks and says whether nothing is left: used at the end of a line.
    pub(super) fn end(mut self) -> Option<()> {
        self.blanks();
        self.is_empty().then_some(())
    }
}

/// The value of one hexadecimal digit.
pub(super) fn hex_digit(b: u8) -> Option<u8> {
    match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        b'A'..=b'F' => Some(b - b'A' + 10),
        _ => None,
    }
}

/// The lines of a file with their numbers from 1, without their newlines. A last line without newline counts.
pub(super) fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut left = bytes;
    let mut number = 0;
    std::iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let len = memchr::memchr(b'\n', left).unwrap_or(left.len());
        let (line, rest) = left.split_at_checked(len)?;
        left = rest.get(1..).unwrap_or_default();
        number += 1;
        Some((number, line))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stop_at_their_limits() {
        assert_eq!(Scan::new(b"18446744073709551615").dec(), Some(u64::MAX));
        assert_eq!(Scan::new(b"18446744073709551616").dec(), None);
        assert_eq!(Scan::new(b"ffffffffffffffff-").hex(), Some(u64::MAX));
        assert_eq!(Scan::new(b"10000000000000000").hex(), None);
        assert_eq!(Scan::new(b"-9223372036854775808").signed(), Some(i64::MIN));
        assert_eq!(Scan::new(b"-9223372036854775809").signed(), None);
        assert_eq!(Scan::new(b"9223372036854775808").signed(), None);
        assert_eq!(Scan::new(b"x").dec(), None);
        assert_eq!(Scan::new(b"-").signed(), None);
        assert_eq!(Scan::new(b"0100002").oct(), Some(0o100002));
        assert_eq!(Scan::new(b"256").dec_as::<u8>(), None);
    }

    #[test]
    fn words_and_ends() {
        let mut s = Scan::new(b"  one\ttwo ");
        assert_eq!(s.word(), Some(&b"one"[..]));
        assert_eq!(s.word(), Some(&b"two"[..]));
        assert!(s.end().is_some());
        assert_eq!(s.word(), None);
    }

    #[test]
    fn lines_keep_the_unfinished_last_one() {
        let got: Vec<_> = lines(b"a\n\nb").collect();
        assert_eq!(got, [(1, &b"a"[..]), (2, b""), (3, b"b")]);
        assert_eq!(lines(b"a\n").count(), 1);
        assert_eq!(lines(b"").count(), 0);
    }
}
