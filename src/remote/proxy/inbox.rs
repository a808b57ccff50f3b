//! What the cache says: bytes in, frames out.
//!
//! Holds at most one message and what one read brings. The kinds a cache may send are known here; what they
//! mean for a snapshot is not.

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
            if !MAGIC.starts_with(came.get(..MAGIC.len()).unwrap_or(came)) {
                let text = "it does not speak this protocol: no crtool image-cache listens there, or one of \
                            another version, or one with --tls";
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
            Kind::Prepared | Kind::Restored => header.stream != 0,
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
            Kind::Hello => Heard::Hello(wire::message(&header, payload)?),
            Kind::Prepared => Heard::Prepared(stream, wire::message(&header, payload)?),
            Kind::Failed => Heard::Failed(stream, wire::message(&header, payload)?),
            Kind::Restored => Heard::Restored(stream, wire::message(&header, payload)?),
            Kind::Ping => Heard::Ping,
            _ => Heard::Pong,
        }))
    }
}
