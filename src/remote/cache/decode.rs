//! Bytes of a connection to frames, whatever the pieces they come in.
//!
//! Only the form is known here. What becomes of a payload is decided by the caller as soon as the header is there:
//! bytes of images are handed on as they come and are never held; messages are gathered first. Nothing is
//! allocated for bytes that have not come.

use std::borrow::Cow;

use super::super::Failure;
use super::super::wire::{HEADER, Header};

/// What to do with the payload of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Take {
    /// Gather it and hand it on in one piece.
    Whole,
    /// Hand it on as it comes.
    Parts,
    /// Throw it away.
    Skip,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// A frame taken as [`Take::Whole`].
    Frame(Header, Cow<'a, [u8]>),
    /// Bytes of one taken as [`Take::Parts`]. At least once for each frame; only the last part may be empty.
    Part(Header, &'a [u8], Last),
}

/// Whether a part is the last of its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    Yes,
    No,
}

/// Takes frames out of a stream of bytes.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    head: [u8; HEADER],
    have: usize,
    body: Option<Body>,
}

#[derive(Debug)]
struct Body {
    header: Header,
    take: Take,
    left: usize,
    gathered: Vec<u8>,
}

/// Cuts at most `most` bytes off the front.
fn cut<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (front, rest) = input.split_at_checked(most).unwrap_or((input, &[]));
    *input = rest;
    front
}

impl Decoder {
    /// Whether the last byte that came ended a frame.
    pub(super) fn is_between(&self) -> bool {
        self.have == 0 && self.body.is_none()
    }

    /// The frame that has begun and not ended, once its header is there.
    pub(super) fn current(&self) -> Option<Header> {
        self.body.as_ref().map(|body| body.header)
    }

    /// Bytes of memory that a frame takes which has not come whole.
    pub(super) fn gathered(&self) -> usize {
        self.body.as_ref().map_or(0, |body| body.gathered.capacity())
    }

    /// The next thing in `input`, which moves on; `None` when all of it is taken. An error is final: where the
    /// next frame begins is not known any more.
    pub(super) fn next<'a>(
        &mut self,
        input: &mut &'a [u8],
        mut judge: impl FnMut(&Header) -> Result<Take, Failure>,
    ) -> Result<Option<Item<'a>>, Failure> {
        loop {
            if self.body.is_none() {
                let missing = cut(input, HEADER - self.have);
                if let Some(into) = self.head.get_mut(self.have..self.have + missing.len()) {
                    into.copy_from_slice(missing);
                }
                self.have += missing.len();
                if self.have < HEADER {
                    return Ok(None);
                }
                let header = Header::decode(&self.head)?;
                let take = judge(&header)?;
                self.have = 0;
                let left = header.len as usize;
                self.body = Some(Body { header, take, left, gathered: Vec::new() });
            }
            let Some(body) = &mut self.body else { return Ok(None) };
            if input.is_empty() && body.left > 0 {
                return Ok(None);
            }
            let came = cut(input, body.left);
            body.left -= came.len();
            let done = body.left == 0;
            let header = body.header;
            let item = match body.take {
                Take::Parts => Some(Item::Part(header, came, if done { Last::Yes } else { Last::No })),
                Take::Whole if done && body.gathered.is_empty() => {
                    Some(Item::Frame(header, Cow::Borrowed(came)))
                }
                Take::Whole => {
                    body.gathered.extend_from_slice(came);
                    let whole = || Item::Frame(header, Cow::Owned(std::mem::take(&mut body.gathered)));
                    done.then(whole)
                }
                Take::Skip => None,
            };
            if done {
                self.body = None;
            }
            if item.is_some() {
                return Ok(item);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::remote::pb;
    use crate::remote::wire::{Kind, bare, frame};

    fn take(header: &Header) -> Take {
        match header.kind {
            Kind::Data => Take::Parts,
            Kind::Abort => Take::Skip,
            _ => Take::Whole,
        }
    }

    /// What came, parts of a frame put together.
    fn all(pieces: &[&[u8]]) -> Vec<(Kind, Vec<u8>)> {
        let mut decoder = Decoder::default();
        let (mut found, mut part) = (Vec::new(), Vec::new());
        for piece in pieces {
            let mut input = *piece;
            while let Some(item) = decoder.next(&mut input, |header| Ok(take(header))).unwrap() {
                match item {
                    Item::Frame(header, payload) => found.push((header.kind, payload.into_owned())),
                    Item::Part(header, bytes, last) => {
                        part.extend_from_slice(bytes);
                        if last == Last::Yes {
                            found.push((header.kind, std::mem::take(&mut part)));
                        }
                    }
                }
            }
            assert!(input.is_empty());
        }
        found
    }

    fn stream() -> (Vec<u8>, Vec<(Kind, Vec<u8>)>) {
        let data = b"twenty bytes of data";
        let abort = pb::Abort { reason: "never seen".to_owned() };
        let end = pb::ImageEnd { size: 20, crc32c: 1 };
        let mut bytes = Header::data(1, 1, 20, 0).encode().to_vec();
        bytes.extend_from_slice(data);
        bytes.extend(frame(Kind::Abort, 1, 0, &abort));
        bytes.extend(bare(Kind::Ping, 0, 0, 0));
        bytes.extend(Header::data(1, 1, 0, 0).encode());
        bytes.extend(frame(Kind::ImageEnd, 1, 1, &end));
        let expected = vec![
            (Kind::Data, data.to_vec()),
            (Kind::Ping, vec![]),
            (Kind::Data, vec![]),
            (Kind::ImageEnd, prost::Message::encode_to_vec(&end)),
        ];
        (bytes, expected)
    }

    #[test]
    fn frames_may_be_cut_at_every_byte() {
        let (bytes, expected) = stream();
        assert_eq!(all(&[&bytes]), expected);
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(all(&single), expected);
        for at in 0..=bytes.len() {
            let (a, b) = bytes.split_at(at);
            assert_eq!(all(&[a, b]), expected, "cut at {at}");
        }
    }

    #[test]
    fn a_length_costs_nothing_before_its_bytes_come() {
        let mut decoder = Decoder::default();
        let header = Header {
            kind: Kind::Commit,
            flags: 0,
            stream: 1,
            image: 0,
            len: 60 << 20,
            raw: 60 << 20,
            crc: 0,
        };
        let mut input = &header.encode()[..];
        assert_eq!(decoder.next(&mut input, |_| Ok(Take::Whole)), Ok(None));
        assert_eq!(decoder.gathered(), 0);
    }

    proptest! {
        #[test]
        fn any_cuts_and_any_bytes(cuts in prop::collection::vec(0usize..200, 0..12), noise in any::<Vec<u8>>()) {
            let (bytes, expected) = stream();
            let mut cuts = cuts;
            cuts.retain(|cut| *cut < bytes.len());
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut from = 0;
            for cut in cuts {
                pieces.push(&bytes[from..cut]);
                from = cut;
            }
            pieces.push(&bytes[from..]);
            prop_assert_eq!(all(&pieces), expected);

            let mut decoder = Decoder::default();
            let mut input = &noise[..];
            while let Ok(Some(_)) = decoder.next(&mut input, |header| Ok(take(header))) {}
        }
    }
}
