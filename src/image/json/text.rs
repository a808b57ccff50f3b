//! Bytes as text, the way `crit` writes them.

use std::fmt::Write;
use std::net::Ipv6Addr;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/// Bytes in one line of base64: 76 characters, as in MIME.
const BASE64_LINE: usize = 57;

/// Base64 in lines of 76 characters, each with a newline, also the last one.
pub(super) fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() / BASE64_LINE * 77 + 80);
    for line in bytes.chunks(BASE64_LINE) {
        for three in line.chunks(3) {
            let [a, b, c] = [0, 1, 2].map(|i| three.get(i).copied().unwrap_or(0));
            let bits = u32::from(a) << 16 | u32::from(b) << 8 | u32::from(c);
            for i in 0..4 {
                let six = (bits >> (18 - 6 * i)) & 63;
                text.push(if i <= three.len() { char::from(ALPHABET[six as usize]) } else { '=' });
            }
        }
        text.push('\n');
    }
    text
}

/// The bytes of base64 in lines of any length; `None` when it is none.
pub(super) fn from_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count, mut padding) = (0u32, 0, 0);
    for c in text.bytes().filter(|c| !c.is_ascii_whitespace()) {
        let six = match c {
            b'=' => {
                padding += 1;
                0
            }
            _ if padding > 0 => return None,
            _ => ALPHABET.iter().position(|a| *a == c)?,
        };
        bits = bits << 6 | u32::try_from(six).ok()?;
        count += 1;
        if count == 4 {
            let [_, a, b, c] = bits.to_be_bytes();
            bytes.extend([a, b, c].iter().take(3usize.checked_sub(padding)?));
            (bits, count) = (0, 0);
        }
    }
    (count == 0).then_some(bytes)
}

/// Text that need not be UTF-8: itself where it is, and otherwise the bytes in Python's
/// notation (`b'/tmp/\xff'`). UTF-8 that looks like that notation is written in it too, so
/// that [`from_lossless`] gives back the same bytes.
pub(super) fn lossless(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if from_repr(text).is_none() => text.to_owned(),
        _ => repr(bytes),
    }
}

/// The bytes that [`lossless`] wrote.
pub(super) fn from_lossless(text: &str) -> Vec<u8> {
    from_repr(text).unwrap_or_else(|| text.as_bytes().to_vec())
}

/// A bytes literal of Python, as its `repr` writes it.
fn repr(bytes: &[u8]) -> String {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
    let mut text = format!("b{quote}");
    for &byte in bytes {
        match byte {
            b'\\' => text.push_str("\\\\"),
            b'\t' => text.push_str("\\t"),
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b' '..=b'~' if char::from(byte) == quote => text.extend(['\\', quote]),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => push_hex(&mut text, "\\x", byte, false),
        }
    }
    text.push(quote);
    text
}

fn push_hex(text: &mut String, prefix: &str, byte: u8, upper: bool) {
    let written = match upper {
        true => write!(text, "{prefix}{byte:02X}"),
        false => write!(text, "{prefix}{byte:02x}"),
    };
    debug_assert!(written.is_ok());
}

/// The bytes of a literal exactly as [`repr`] would write it.
fn from_repr(text: &str) -> Option<Vec<u8>> {
    let quote = text.strip_prefix('b')?.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let inner = text.get(2..)?.strip_suffix(quote)?;
    let mut bytes = Vec::new();
    let mut chars = inner.bytes();
    while let Some(c) = chars.next() {
        bytes.push(match c {
            b'\\' => match chars.next()? {
                b't' => b'\t',
                b'n' => b'\n',
                b'r' => b'\r',
                b'x' => hex_pair(chars.next()?, chars.next()?)?,
                c @ (b'\\' | b'\'' | b'"') => c,
                _ => return None,
            },
            c => c,
        });
    }
    (repr(&bytes) == text).then_some(bytes)
}

fn hex_pair(high: u8, low: u8) -> Option<u8> {
    let digit = |c: u8| char::from(c).to_digit(16);
    u8::try_from(digit(high)? << 4 | digit(low)?).ok()
}

/// Longest line of quoted-printable text.
const QUOTED_LINE: usize = 76;

/// The name of a UNIX socket as quoted-printable text (RFC 2045).
pub(in crate::image) fn quoted(bytes: &[u8]) -> String {
    let text = quoted_text(bytes);
    if from_quoted(&text) == bytes {
        return text;
    }
    // Line ends that text mode does not keep: all of them as `=0A`, `=0D`.
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            b'!'..=b'<' | b'>'..=b'~' => text.push(char::from(byte)),
            _ => push_hex(&mut text, "=", byte, true),
        }
    }
    text
}

fn quoted_text(bytes: &[u8]) -> String {
    let first_end = bytes.iter().position(|b| *b == b'\n');
    let crlf = first_end.is_some_and(|at| at > 0 && bytes.get(at - 1) == Some(&b'\r'));
    let line_end = if crlf { "\r\n" } else { "\n" };
    let mut text = String::new();
    let mut line = 0;
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let next = bytes.get(at + 1).copied();
        let quote = byte > 126
            || byte == b'='
            || (byte == b'.' && line == 0 && matches!(next, None | Some(b'\n' | b'\r' | 0)))
            || (matches!(byte, b' ' | b'\t') && next.is_none())
            || (byte < 33 && !matches!(byte, b'\r' | b'\n' | b'\t' | b' '));
        if quote {
            if line + 3 >= QUOTED_LINE {
                text.push('=');
                text.push_str(line_end);
                line = 0;
            }
            push_hex(&mut text, "=", byte, true);
            line += 3;
            at += 1;
        } else if byte == b'\n' || (byte == b'\r' && next == Some(b'\n')) {
            // White space before the end of a line is quoted after the fact.
            if let Some(last) = text.bytes().last().filter(|c| matches!(c, b' ' | b'\t')) {
                text.pop();
                push_hex(&mut text, "=", last, true);
            }
            text.push_str(line_end);
            line = 0;
            at += if byte == b'\r' { 2 } else { 1 };
        } else {
            if next.is_some_and(|next| next != b'\n') && line + 1 >= QUOTED_LINE {
                text.push('=');
                text.push_str(line_end);
                line = 0;
            }
            text.push(char::from(byte));
            line += 1;
            at += 1;
        }
    }
    text
}

/// The bytes of quoted-printable text.
pub(super) fn from_quoted(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let rest = bytes.get(at + 1..).unwrap_or_default();
        match (byte, rest) {
            (b'=', [b'\n', ..]) => at += 2,
            (b'=', [b'\r', b'\n', ..]) => at += 3,
            (b'=', [high, low, ..]) if hex_pair(*high, *low).is_some() => {
                out.extend(hex_pair(*high, *low));
                at += 3;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    out
}

/// An IPv6 address in groups of hexadecimal digits only, also an IPv4-mapped one.
pub(super) fn ipv6(address: Ipv6Addr) -> String {
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] => format!("::ffff:{high:x}:{low:x}"),
        _ => address.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn base64_is_mime() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"hello\xff\0world"), "aGVsbG//AHdvcmxk\n");
        assert_eq!(base64(b"ab"), "YWI=\n");
        assert_eq!(base64(&[b'a'; 58]).lines().map(str::len).collect::<Vec<_>>(), [76, 4]);
        for bad in ["YWI", "Y=I=", "====", "Y!==", "... <12B>"] {
            assert_eq!(from_base64(bad), None, "{bad}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_python_literals() {
        assert_eq!(lossless(b"/a\xff"), r"b'/a\xff'");
        assert_eq!(lossless(b"'\xff"), r#"b"'\xff""#);
        assert_eq!(lossless("/é".as_bytes()), "/é");
        assert_eq!(lossless(b"b'/a'"), r#"b"b'/a'""#);
        assert_eq!(lossless(b"b'"), "b'");
    }

    #[test]
    fn unix_names_are_quoted_printable() {
        assert_eq!(quoted(b"\0abs\0x"), "=00abs=00x");
        assert_eq!(quoted(b"\n\0"), "\n=00");
        assert_eq!(quoted("é".as_bytes()), "=C3=A9");
    }

    proptest! {
        #[test]
        fn all_bytes_come_back(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(from_base64(&base64(&bytes)).unwrap(), bytes.clone());
            prop_assert_eq!(from_lossless(&lossless(&bytes)), bytes.clone());
            prop_assert_eq!(from_quoted(&quoted(&bytes)), bytes.clone());
        }

        #[test]
        fn printable_bytes_come_back(text in "[b'\"\\\\x=a \\t\\n\\r.é]{0,100}") {
            prop_assert_eq!(from_lossless(&lossless(text.as_bytes())), text.as_bytes());
            prop_assert_eq!(from_quoted(&quoted(text.as_bytes())), text.as_bytes());
        }

        #[test]
        fn any_text_is_read_without_harm(text in ".{0,60}") {
            let _ = from_base64(&text);
            let _ = from_lossless(&text);
            let _ = from_quoted(&text);
        }
    }
}
