//! What the cache says: bytes in, frames out.
//!
//! Holds at most one message and what one read brings. The kinds a cache may send are known here; what they
//! mean for a snapshot is not.

use crate::remote::net::tls::looks_like_tls;
use crate::remote::wire::{self, HEADER, Header, Kind, MAGIC};
use crate::remote::{Failure, pb, pb::FailCode};

/// A frame from the cache.
#[derive(Debug, PartialEq)]
pub enum Heard {
    /// The answer to our own.
    Hello(pb::Hello),
    /// The snapshot of this stream is complete there.
    Prepared(u32, pb::Prepared),
    /// The snapshot of this stream is refused or lost; stream 0: the connection is.
    Failed(u32, pb::Failed),
    /// What became of the snapshot of this stream.
    Restored(u32, pb::Restored),
    /// The restored tree of this stream is complete, and stopped.
    Armed(u32, pb::Armed),
    /// It does not run there and is not going to.
    Fell(u32, pb::Fell),
    /// There is room for the snapshot of this stream.
    Room(u32, pb::Room),
    /// It has to wait.
    Queue(u32, pb::Queue),
    /// Wants a Pong.
    Ping,
    /// Answers a Ping.
    Pong,
}

/// The bytes that have come and not been understood yet.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    at: usize,
    greeted: bool,
}

impl Inbox {
    /// Takes bytes in the order they came. Call [`Self::next`] until it has nothing before the next ones, so that no
    /// more than one frame is held.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame, if it is whole. After an error nothing more can be understood.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Heard>, Failure> {
        if !self.greeted {
            let came = self.bytes.get(self.at..).unwrap_or_default();
            // What a cache with --tls says is shorter than the magic, and is not told from other bytes by fewer than these.
            if came.len() >= 2 && !MAGIC.starts_with(came.get(..MAGIC.len()).unwrap_or(came)) {
                let text = if looks_like_tls(came) {
                    "it wants TLS; --tls gives it, with a certificate of ours"
                } else {
                    "it does not speak this protocol: no crtool image-cache listens there, or one of another version"
                };
                return Err(Failure::new(FailCode::FailProtocol, text));
            }
            if came.len() < MAGIC.len() {
                return Ok(None);
            }
            self.at += MAGIC.len();
            self.greeted = true;
        }
        let came = self.bytes.get(self.at..).unwrap_or_default();
        let Some((head, rest)) = came.split_first_chunk::<HEADER>() else { return Ok(None) };
        let header = Header::decode(head)?;
        let form = match header.kind {
            Kind::Hello | Kind::Ping | Kind::Pong => header.stream == 0,
            Kind::Prepared | Kind::Restored | Kind::Armed | Kind::Fell | Kind::Room | Kind::Queue => {
                header.stream != 0
            }
            Kind::Failed => true,
            _ => false,
        };
        if !form {
            let text = format!("bad frame: {:?} for stream {} from a cache", header.kind, header.stream);
            return Err(Failure::new(FailCode::FailProtocol, text));
        }
        let Some(payload) = rest.get(..header.len as usize) else { return Ok(None) };
        self.at += HEADER + payload.len();
        let stream = header.stream;
        Ok(Some(match header.kind {
            Kind::Hello => Heard::Hello(wire::told(&header, payload)?),
            Kind::Prepared => Heard::Prepared(stream, wire::message(&header, payload)?),
            Kind::Failed => Heard::Failed(stream, wire::told(&header, payload)?),
            Kind::Restored => Heard::Restored(stream, wire::told(&header, payload)?),
            Kind::Armed => Heard::Armed(stream, wire::message(&header, payload)?),
            Kind::Fell => Heard::Fell(stream, wire::told(&header, payload)?),
            Kind::Room => Heard::Room(stream, wire::told(&header, payload)?),
            Kind::Queue => Heard::Queue(stream, wire::message(&header, payload)?),
            Kind::Ping => Heard::Ping,
            _ => Heard::Pong,
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything that is understood of bytes that come in such parts, and whether it ended in an error.
    fn understood<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Heard>, bool) {
        let mut inbox = Inbox::default();
        let mut heard = Vec::new();
        for part in parts {
            inbox.feed(part);
            loop {
                match inbox.next() {
                    Ok(Some(frame)) => heard.push(frame),
                    Ok(None) => break,
                    Err(_) => return (heard, true),
                }
            }
        }
        (heard, false)
    }

    fn talk() -> Vec<u8> {
        [
            MAGIC.to_vec(),
            wire::frame(Kind::Hello, 0, 0, &pb::Hello { version: wire::VERSION, ..Default::default() }),
            wire::bare(Kind::Ping, 0, 0, 0).to_vec(),
            wire::frame(Kind::Prepared, 1, 0, &pb::Prepared { bytes: 7 }),
            wire::frame(Kind::Failed, 2, 0, &pb::Failed { code: 3, text: "why".to_owned() }),
            wire::bare(Kind::Pong, 0, 0, 0).to_vec(),
            wire::frame(Kind::Restored, 1, 0, &pb::Restored { ok: true, pid: 5, text: String::new() }),
        ]
        .concat()
    }

    #[test]
    fn a_talk_cut_at_every_byte() {
        let talk = talk();
        let (heard, broken) = understood([&talk[..]].into_iter());
        assert_eq!((heard.len(), broken), (6, false));
        for cut in 0..=talk.len() {
            let (a, b) = talk.split_at(cut);
            assert_eq!(understood([a, b].into_iter()), (understood([&talk[..]].into_iter()).0, false));
        }
        assert_eq!(understood(talk.chunks(1)).0.len(), 6);
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_nothing(at in 0..200usize, bit in 0..8u32, step in 1..50usize) {
            let mut talk = talk();
            let at = at % talk.len();
            talk[at] ^= 1 << bit;
            let whole = understood([&talk[..]].into_iter());
            prop_assert_eq!(&understood(talk.chunks(step)), &whole);
            prop_assert!(whole.0.len() <= 6);
        }

        #[test]
        fn any_bytes_are_understood_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let (_, broken) = understood([&bytes[..]].into_iter());
            prop_assert!(broken || bytes.len() < 2 || bytes.len() < MAGIC.len() && MAGIC.starts_with(&bytes));
            let _ = understood([&MAGIC[..], &bytes].into_iter());
        }
    }
}
