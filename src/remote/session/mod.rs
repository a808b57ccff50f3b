//! One connection of a source with a cache, without the connection: bytes that came go in, what was said comes out, and so does
//! what has to be sent to keep it alive.
//!
//! The proxy, which has the streams of many dumps on one connection, and a dump that speaks to the cache itself both speak
//! through this, so that a cache is greeted, believed and given up in the same way by both. There is no socket and no clock in
//! here, and nothing is known of what an answer means for a snapshot.
//!
//! - [`inbox`]: frames out of bytes. [`keepalive`]: whether the other side lives.

pub mod inbox;
mod keepalive;

use std::time::{Duration, Instant};

use inbox::{Heard, Inbox};
use keepalive::{Keepalive, Look};

use super::wire::{self, FEATURE_LZ4, HEADER, Kind, MAGIC};
use super::{Failure, host, pb, pb::FailCode};

/// From the first byte to the last.
#[derive(Debug)]
pub struct Session {
    inbox: Inbox,
    /// What the cache said about itself.
    peer: Option<pb::Hello>,
    timeout: Duration,
    keepalive: Keepalive,
    /// A Ping has come. One answer is enough for several, so that a cache that asks and does not read fills no memory.
    asked: bool,
}

impl Session {
    /// Of a connection that was made just now. `timeout` is the longest silence of the other side.
    pub fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            inbox: Inbox::default(),
            peer: None,
            timeout,
            keepalive: Keepalive::new(timeout, now),
            asked: false,
        }
    }

    /// What is sent first.
    pub fn opening(&self) -> Vec<u8> {
        let hello = pb::Hello {
            version: wire::VERSION,
            features: FEATURE_LZ4,
            software: concat!("crtool ", env!("CARGO_PKG_VERSION")).to_owned(),
            host: host(),
            timeout_ms: u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX),
            ..pb::Hello::default()
        };
        [&MAGIC[..], &wire::frame(Kind::Hello, 0, 0, &hello)].concat()
    }

    /// Takes bytes in the order they came and appends what they say to `heard`: `Hello` first, then what is about streams, and a
    /// `Pong` for each Ping that is answered. After an error nothing more can be understood; what came before it counts.
    pub fn feed(&mut self, bytes: &[u8], now: Instant, heard: &mut Vec<Heard>) -> Result<(), Failure> {
        self.keepalive.heard(now);
        self.inbox.feed(bytes);
        while let Some(frame) = self.inbox.next()? {
            let odd = |text: String| Err(Failure::new(FailCode::FailProtocol, text));
            match &frame {
                Heard::Failed(0, failed) => return Err(failed.clone().into()),
                Heard::Hello(hello) if self.peer.is_none() => {
                    if hello.version != wire::VERSION {
                        let text = format!(
                            "it speaks version {} of the protocol and this program {}: use the same crtool on both hosts",
                            hello.version,
                            wire::VERSION
                        );
                        return Err(Failure::new(FailCode::FailVersion, text));
                    }
                    self.keepalive.heed(hello.timeout_ms);
                    self.peer = Some(hello.clone());
                }
                Heard::Hello(_) => return odd("it said Hello twice".to_owned()),
                _ if self.peer.is_none() => return odd(format!("{frame:?} before Hello")),
                Heard::Ping => {
                    self.asked = true;
                    continue;
                }
                Heard::Pong if !self.keepalive.pong() => {
                    return odd("it answers more than it was asked".to_owned());
                }
                _ => {}
            }
            heard.push(frame);
        }
        Ok(())
    }

    /// What the cache said about itself, once it has.
    pub fn peer(&self) -> Option<&pb::Hello> {
        self.peer.as_ref()
    }

    /// A Ping to send now.
    pub fn ping(&mut self, now: Instant) -> [u8; HEADER] {
        self.keepalive.pinged(now);
        wire::bare(Kind::Ping, 0, 0, 0)
    }

    /// How many Pings there were. Pings are answered in order, after everything that came before them.
    pub fn pings(&self) -> u64 {
        self.keepalive.pings()
    }

    /// How many of them have been answered.
    pub fn pongs(&self) -> u64 {
        self.keepalive.pongs()
    }

    /// Whether all have been.
    pub fn is_answered(&self) -> bool {
        self.keepalive.is_answered()
    }

    /// The answer that is owed. Asked for only when the connection takes bytes.
    pub fn pong(&mut self) -> Option<[u8; HEADER]> {
        std::mem::take(&mut self.asked).then(|| wire::bare(Kind::Pong, 0, 0, 0))
    }

    /// A Ping if it is time for one; an error if the other side is silent. `progress` is as in [`Keepalive::look`]; `busy`: no
    /// Ping can be sent now.
    pub fn look(
        &mut self,
        now: Instant,
        progress: (u64, u32),
        busy: bool,
    ) -> Result<Option<[u8; HEADER]>, Failure> {
        match self.keepalive.look(now, progress, busy || self.peer.is_none()) {
            Look::Fine => Ok(None),
            Look::Ping => Ok(Some(self.ping(now))),
            Look::Dead => {
                let what = match self.peer {
                    Some(_) => "nothing came from it",
                    None => "it accepted the connection and said nothing",
                };
                let text = format!("{what} for {} s", self.timeout.as_secs_f32());
                Err(Failure::new(FailCode::FailTimeout, text))
            }
        }
    }

    /// When to [`Self::look`] again at the latest.
    pub fn next_look(&self, now: Instant) -> Instant {
        self.keepalive.next(now, self.peer.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn hello(version: u32) -> Vec<u8> {
        [&MAGIC[..], &wire::frame(Kind::Hello, 0, 0, &pb::Hello { version, ..pb::Hello::default() })].concat()
    }

    /// What a session makes of what a cache says after a right Hello.
    fn after_hello(frames: &[&[u8]]) -> (Session, Vec<Heard>, Result<(), Failure>) {
        let now = Instant::now();
        let mut session = Session::new(SECOND, now);
        let mut heard = Vec::new();
        session.feed(&hello(wire::VERSION), now, &mut heard).unwrap();
        assert!(session.peer().is_some() && matches!(heard.pop(), Some(Heard::Hello(_))) && heard.is_empty());
        let ended = session.feed(&frames.concat(), now, &mut heard);
        (session, heard, ended)
    }

    #[test]
    fn an_opening_is_understood() {
        let session = Session::new(SECOND, Instant::now());
        let mut inbox = Inbox::default();
        inbox.feed(&session.opening());
        let Ok(Some(Heard::Hello(hello))) = inbox.next() else { panic!("no Hello") };
        assert_eq!((hello.version, hello.timeout_ms), (wire::VERSION, 1000));
        assert_eq!(inbox.next(), Ok(None));
    }

    #[test]
    fn what_no_cache_says_ends_it() {
        let (ping, pong) = (wire::bare(Kind::Ping, 0, 0, 0), wire::bare(Kind::Pong, 0, 0, 0));
        let prepared = wire::frame(Kind::Prepared, 1, 0, &pb::Prepared { bytes: 7 });
        let (mut session, heard, ended) = after_hello(&[&ping, &prepared, &ping]);
        assert_eq!((heard.len(), ended), (1, Ok(())));
        assert!(session.pong().is_some() && session.pong().is_none());
        let again =
            wire::frame(Kind::Hello, 0, 0, &pb::Hello { version: wire::VERSION, ..pb::Hello::default() });
        let failed = wire::frame(Kind::Failed, 0, 0, &pb::Failed { code: 3, text: "why".to_owned() });
        for (last, code) in [
            (&pong[..], FailCode::FailProtocol),
            (&again, FailCode::FailProtocol),
            (&failed, pb::Failed { code: 3, ..Default::default() }.code()),
        ] {
            let (_, heard, ended) = after_hello(&[&prepared, last]);
            assert_eq!((heard.len(), ended.unwrap_err().code), (1, code));
        }
        let now = Instant::now();
        let mut early = Session::new(SECOND, now);
        let bytes = [&MAGIC[..], &prepared].concat();
        assert!(early.feed(&bytes, now, &mut Vec::new()).is_err_and(|f| f.text.ends_with("before Hello")));
        let mut other = Session::new(SECOND, now);
        let code = other.feed(&hello(wire::VERSION + 1), now, &mut Vec::new()).unwrap_err().code;
        assert_eq!(code, FailCode::FailVersion);
    }

    #[test]
    fn who_does_not_greet_is_given_up() {
        let begun = Instant::now();
        let mut session = Session::new(SECOND, begun);
        let mut now = begun;
        let failure = loop {
            now = session.next_look(now);
            match session.look(now, (0, 0), false) {
                Ok(ping) => assert_eq!(ping, None),
                Err(failure) => break failure,
            }
        };
        assert!((SECOND..2 * SECOND).contains(&(now - begun)), "{:?}", now - begun);
        assert_eq!(failure.text, "it accepted the connection and said nothing for 1 s");
    }
}
