//! Frames: what travels from a source to a cache, on the pipe to the proxy and on the connection alike.
//!
//! A frame is a header of 24 bytes, little-endian, and a payload:
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0 | kind | [`Kind`] |
//! | 1 | flags | bit 0: the payload is an LZ4 block ([`LZ4`]) |
//! | 2-3 | check | low half of the CRC32C of the other 22 bytes |
//! | 4-7 | stream | one snapshot on its way; the proxy gives each of its dumps a number of its own |
//! | 8-11 | image | numbered by the source, from 1, per stream; 0 where no image is meant |
//! | 12-15 | len | bytes of payload |
//! | 16-19 | raw | `Data`, `Zero`: bytes of the image that the frame stands for; else equal to `len` |
//! | 20-23 | crc | CRC32C of those bytes, before compression; else of the payload |
//!
//! `Data` and `Zero` append to their image. All other payloads are messages of `proto/remote.proto`. This module
//! knows the form of frames only; which one may follow which is decided by those who read them.

use super::{
    Failure, crc, name,
    pb::{self, FailCode},
};

/// Version of the protocol that this program speaks.
pub const VERSION: u32 = 3;
/// First bytes of a connection in both directions, before the first frame.
pub const MAGIC: [u8; 8] = *b"crtool\x01\n";
/// Bytes of a header.
pub const HEADER: usize = 24;
/// Most bytes of an image in one frame, and most of its payload.
pub const MAX_DATA: u32 = 1 << 20;
/// Longest payload of a message, but for the list of a commit.
pub const MAX_MESSAGE: u32 = 64 << 10;
/// Longest list of a commit.
pub const MAX_COMMIT: u32 = 64 << 20;
/// Most images in one snapshot.
pub const MAX_IMAGES: u32 = 2_000_000;
/// Longest text of a cache that is shown, in bytes.
const TEXT: usize = 4 << 10;
/// Most of what an offer lacks that is shown; no cache of ours says more.
const LACKS: usize = 100;
/// Flag of a `Data` frame: the payload is an LZ4 block.
pub const LZ4: u8 = 1;
/// Feature bit in `Hello`: frames may carry LZ4 blocks.
pub const FEATURE_LZ4: u64 = 1;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `pb::Hello`, both ways, first.
    Hello = 1,
    /// `pb::SnapshotBegin`, to the cache: an offer.
    SnapshotBegin = 2,
    /// `pb::ImageBegin`, to the cache.
    ImageBegin = 3,
    /// Bytes of an image, to the cache.
    Data = 4,
    /// Zeros of an image, to the cache; no payload.
    Zero = 5,
    /// `pb::ImageEnd`, to the cache.
    ImageEnd = 6,
    /// `pb::Commit`, to the cache.
    Commit = 7,
    /// `pb::Prepared`, from the cache.
    Prepared = 8,
    /// `pb::Confirm`, to the cache.
    Confirm = 9,
    /// `pb::Abort`, to the cache.
    Abort = 10,
    /// `pb::Failed`, from the cache.
    Failed = 11,
    /// `pb::Restored`, from the cache.
    Restored = 12,
    /// Are you there? Both ways, no payload.
    Ping = 13,
    /// I am. Both ways, no payload.
    Pong = 14,
    /// `pb::Resume`, to the cache.
    Resume = 15,
    /// `pb::Armed`, from the cache.
    Armed = 16,
    /// `pb::Go`, to the cache.
    Go = 17,
    /// `pb::Fell`, from the cache.
    Fell = 18,
    /// `pb::Room`, from the cache: the offer is taken.
    Room = 19,
    /// `pb::Queue`, from the cache: the offer has to wait.
    Queue = 20,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::SnapshotBegin,
            3 => Self::ImageBegin,
            4 => Self::Data,
            5 => Self::Zero,
            6 => Self::ImageEnd,
            7 => Self::Commit,
            8 => Self::Prepared,
            9 => Self::Confirm,
            10 => Self::Abort,
            11 => Self::Failed,
            12 => Self::Restored,
            13 => Self::Ping,
            14 => Self::Pong,
            15 => Self::Resume,
            16 => Self::Armed,
            17 => Self::Go,
            18 => Self::Fell,
            19 => Self::Room,
            20 => Self::Queue,
            _ => return None,
        })
    }

    /// Whether it brings images, and so is what a snapshot gets on by.
    pub fn is_of_images(self) -> bool {
        matches!(self, Self::ImageBegin | Self::Data | Self::Zero | Self::ImageEnd | Self::Commit)
    }

    /// Longest payload.
    fn most(self) -> u32 {
        match self {
            Self::Data => MAX_DATA,
            Self::Zero | Self::Ping | Self::Pong => 0,
            Self::Commit => MAX_COMMIT,
            _ => MAX_MESSAGE,
        }
    }
}

/// The head of a frame, checked as far as it can be by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it says.
    pub kind: Kind,
    /// [`LZ4`] or 0.
    pub flags: u8,
    /// Which snapshot.
    pub stream: u32,
    /// Which image of it.
    pub image: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Bytes of the image it stands for.
    pub raw: u32,
    /// CRC32C of those.
    pub crc: u32,
}

impl Header {
    /// For bytes of an image as they are; at most [`MAX_DATA`].
    pub fn data(stream: u32, image: u32, bytes: u32, crc: u32) -> Self {
        Self { kind: Kind::Data, flags: 0, stream, image, len: bytes, raw: bytes, crc }
    }

    /// As it travels.
    pub fn encode(&self) -> [u8; HEADER] {
        let first = u32::from(self.kind as u8) | u32::from(self.flags) << 8;
        let words = [first, self.stream, self.image, self.len, self.raw, self.crc];
        let mut bytes = [0; HEADER];
        for (into, word) in bytes.chunks_exact_mut(4).zip(words) {
            into.copy_from_slice(&word.to_le_bytes());
        }
        seal(&mut bytes);
        bytes
    }

    /// Checks and takes apart.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, Failure> {
        let mut sealed = *bytes;
        seal(&mut sealed);
        if sealed != *bytes {
            return Err(Failure::new(FailCode::FailChecksum, "bad frame: wrong checksum of its header"));
        }
        let mut words = bytes.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap_or_default()));
        let mut word = || words.next().unwrap_or(0);
        let (first, stream, image, len, raw, crc) = (word(), word(), word(), word(), word(), word());
        let [kind, flags, ..] = first.to_le_bytes();
        let bad = |what: String| Failure::new(FailCode::FailProtocol, format!("bad frame: {what}"));
        let kind = Kind::from_byte(kind).ok_or_else(|| bad(format!("kind {kind}")))?;
        let header = Self { kind, flags, stream, image, len, raw, crc };
        if len > kind.most() {
            return Err(bad(format!("{kind:?} of {len} bytes")));
        }
        let form = match kind {
            Kind::Data if flags & LZ4 != 0 => raw > 0 && raw <= MAX_DATA && len > 0,
            Kind::Data => raw == len,
            Kind::Zero => raw > 0 && raw <= MAX_DATA,
            _ => raw == len,
        };
        let flags_known = flags & !(if kind == Kind::Data { LZ4 } else { 0 }) == 0;
        let of_image = matches!(kind, Kind::ImageBegin | Kind::Data | Kind::Zero | Kind::ImageEnd);
        let of_none = !matches!(kind, Kind::Ping | Kind::Pong) || stream == 0 && crc == 0;
        if !of_none || !form || !flags_known || of_image != (image != 0) {
            return Err(bad(format!("{header:?}")));
        }
        Ok(header)
    }
}

/// Puts the check of a header into it: a bit that is another on its way does not make it mean something else.
pub fn seal(bytes: &mut [u8; HEADER]) {
    let [kind, flags, low, high, rest @ ..] = bytes;
    let check = crc::append(crc::of(&[*kind, *flags]), rest) as u16;
    [*low, *high] = check.to_le_bytes();
}

/// A whole frame around a message.
pub fn frame<M: prost::Message>(kind: Kind, stream: u32, image: u32, message: &M) -> Vec<u8> {
    let payload = message.encode_to_vec();
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let crc = crc::of(&payload);
    let header = Header { kind, flags: 0, stream, image, len, raw: len, crc };
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    frame.extend_from_slice(&header.encode());
    frame.extend_from_slice(&payload);
    frame
}

/// A frame without payload: `Ping`, `Pong`, `Zero` (with `raw` bytes of zeros).
pub fn bare(kind: Kind, stream: u32, image: u32, raw: u32) -> [u8; HEADER] {
    let crc = if kind == Kind::Zero { crc_of_zeros(raw) } else { 0 };
    Header { kind, flags: 0, stream, image, len: 0, raw, crc }.encode()
}

/// The message in a payload, its CRC checked.
pub fn message<M: prost::Message + Default>(header: &Header, payload: &[u8]) -> Result<M, Failure> {
    if crc::of(payload) != header.crc {
        let text = format!("{:?} frame: wrong checksum", header.kind);
        return Err(Failure::new(FailCode::FailChecksum, text));
    }
    M::decode(payload)
        .map_err(|e| Failure::new(FailCode::FailProtocol, format!("bad frame: {:?}: {e}", header.kind)))
}

/// A message of a cache with texts in it, which stand in lines of ours.
pub fn told<M: Texts>(header: &Header, payload: &[u8]) -> Result<M, Failure> {
    let mut told: M = message(header, payload)?;
    for text in told.texts() {
        *text = name::one_line(text, TEXT);
    }
    Ok(told)
}

/// What a cache says to people.
pub trait Texts: prost::Message + Default {
    /// All of it that is looked at.
    fn texts(&mut self) -> Vec<&mut String>;
}

impl Texts for pb::Hello {
    fn texts(&mut self) -> Vec<&mut String> {
        vec![&mut self.software, &mut self.host]
    }
}

impl Texts for pb::Failed {
    fn texts(&mut self) -> Vec<&mut String> {
        vec![&mut self.text]
    }
}

impl Texts for pb::Fell {
    fn texts(&mut self) -> Vec<&mut String> {
        vec![&mut self.text]
    }
}

impl Texts for pb::Restored {
    fn texts(&mut self) -> Vec<&mut String> {
        vec![&mut self.text]
    }
}

impl Texts for pb::Room {
    fn texts(&mut self) -> Vec<&mut String> {
        self.lacks.truncate(LACKS);
        self.lacks.iter_mut().collect()
    }
}

/// CRC32C of so many zeros, at most [`MAX_DATA`].
pub fn crc_of_zeros(len: u32) -> u32 {
    // Most frames of zeros are as long as can be.
    static LONGEST: std::sync::LazyLock<u32> = std::sync::LazyLock::new(|| crc_of_page_by_page(MAX_DATA));
    if len >= MAX_DATA { *LONGEST } else { crc_of_page_by_page(len) }
}

fn crc_of_page_by_page(len: u32) -> u32 {
    static ZEROS: [u8; 4096] = [0; 4096];
    let (mut crc, mut left) = (0, len as usize);
    while left > 0 {
        let now = left.min(ZEROS.len());
        crc = crc::append(crc, ZEROS.get(..now).unwrap_or_default());
        left -= now;
    }
    crc
}

/// Size and CRC32C of an image, from those of its frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// Bytes.
    pub size: u64,
    /// CRC32C.
    pub crc: u32,
}

impl Sum {
    /// Appends `raw` bytes whose CRC32C is `crc`.
    pub fn push(&mut self, raw: u32, crc: u32) {
        self.crc = if self.size == 0 { crc } else { crc::combine(self.crc, crc, raw) };
        self.size += u64::from(raw);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::remote::pb;

    #[test]
    fn headers_come_back() {
        let header = Header::data(7, 3, 4096, 0xdead_beef);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        let lz4 = Header { flags: LZ4, len: 17, ..header };
        assert_eq!(Header::decode(&lz4.encode()), Ok(lz4));
        let zero = bare(Kind::Zero, 1, 2, 8192);
        assert_eq!(Header::decode(&zero).map(|h| (h.raw, h.len)), Ok((8192, 0)));
    }

    #[test]
    fn hostile_headers_are_refused() {
        let good = Header::data(7, 3, 4096, 0);
        for bad in [
            Header { len: MAX_DATA + 1, raw: MAX_DATA + 1, ..good },
            Header { len: 1, ..good },
            Header { flags: 2, ..good },
            Header { image: 0, ..good },
            Header { kind: Kind::Zero, len: 0, raw: MAX_DATA + 1, ..good },
            Header { kind: Kind::Ping, len: 1, raw: 1, image: 0, ..good },
            Header { kind: Kind::Hello, len: MAX_MESSAGE + 1, raw: MAX_MESSAGE + 1, image: 0, ..good },
        ] {
            assert_eq!(Header::decode(&bad.encode()).unwrap_err().code, FailCode::FailProtocol, "{bad:?}");
        }
        let mut unknown = good.encode();
        unknown[0] = 77;
        assert!(Header::decode(&unknown).is_err());
    }

    #[test]
    fn a_header_with_wrong_bits_is_refused() {
        let good = Header::data(7, 3, 4096, 0xdead_beef).encode();
        for first in 0..HEADER * 8 {
            for second in first..HEADER * 8 {
                let mut bad = good;
                bad[first / 8] ^= 1 << (first % 8);
                if second != first {
                    bad[second / 8] ^= 1 << (second % 8);
                }
                assert_eq!(
                    Header::decode(&bad).unwrap_err().code,
                    FailCode::FailChecksum,
                    "{first} {second}"
                );
            }
        }
    }

    #[test]
    fn a_message_with_a_wrong_bit_is_refused() {
        let begin = pb::ImageBegin { name: "pages-1.img".to_owned(), expected_bytes: 0 };
        let mut frame = frame(Kind::ImageBegin, 1, 1, &begin);
        let header = Header::decode(frame[..HEADER].try_into().unwrap()).unwrap();
        assert_eq!(message::<pb::ImageBegin>(&header, &frame[HEADER..]), Ok(begin));
        *frame.last_mut().unwrap() ^= 1;
        let error = message::<pb::ImageBegin>(&header, &frame[HEADER..]).unwrap_err();
        assert_eq!(error.code, FailCode::FailChecksum);
    }

    #[test]
    fn what_a_cache_says_is_shown_in_lines() {
        fn as_told<M: Texts>(kind: Kind, message: &M) -> M {
            let frame = frame(kind, 1, 0, message);
            told(&Header::decode(frame[..HEADER].try_into().unwrap()).unwrap(), &frame[HEADER..]).unwrap()
        }
        let odd = "a\nError: b\x1b[2J".to_owned();
        let fit = "a Error: b[2J";
        let hello = pb::Hello { software: odd.clone(), host: odd.clone(), ..pb::Hello::default() };
        let hello = as_told(Kind::Hello, &hello);
        assert_eq!((&hello.software[..], &hello.host[..]), (fit, fit));
        assert_eq!(as_told(Kind::Failed, &pb::Failed { code: 1, text: odd.clone() }).text, fit);
        assert_eq!(as_told(Kind::Fell, &pb::Fell { text: odd.clone() }).text, fit);
        assert_eq!(
            as_told(Kind::Restored, &pb::Restored { text: odd.clone(), ..Default::default() }).text,
            fit
        );
        let room = as_told(Kind::Room, &pb::Room { lacks: vec![odd; 1000] });
        assert!(room.lacks.len() == LACKS && room.lacks.iter().all(|text| text == fit));
        assert_eq!(as_told(Kind::Fell, &pb::Fell { text: "x".repeat(60_000) }).text.len(), TEXT);
    }

    #[test]
    fn zeros() {
        for len in [0, 1, 4096, 5000, MAX_DATA] {
            assert_eq!(crc_of_zeros(len), crc::of(&vec![0; len as usize]), "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_refused(bytes in any::<[u8; HEADER]>()) {
            let mut sealed = bytes;
            seal(&mut sealed);
            if let Ok(header) = Header::decode(&sealed) {
                prop_assert_eq!(header.encode(), sealed);
            }
            prop_assert!(sealed == bytes || Header::decode(&bytes).is_err());
        }

        #[test]
        fn sums_of_parts_are_the_sum(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8)) {
            let mut sum = Sum::default();
            for part in &parts {
                sum.push(part.len() as u32, crc::of(part));
            }
            let whole = parts.concat();
            prop_assert_eq!(sum, Sum { size: whole.len() as u64, crc: crc::of(&whole) });
        }
    }
}
