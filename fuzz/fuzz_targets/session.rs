//! Any bytes as what a cache says to a source: `cargo fuzz run session` (see README.md).
//!
//! However they are cut, the same is understood, and no more is held than one message and one read.

#![no_main]

use std::time::{Duration, Instant};

use crtool::remote::session::{Session, inbox::Heard};
use crtool::remote::wire::{HEADER, Header, MAGIC, seal};
use libfuzzer_sys::fuzz_target;

/// Checks of headers that are right: the fuzzer would hardly find them.
fn mend(bytes: &mut [u8]) {
    let mut at = MAGIC.len().min(bytes.len());
    bytes[..at].copy_from_slice(&MAGIC[..at]);
    while let Some(head) = bytes.get_mut(at..at + HEADER) {
        let head: &mut [u8; HEADER] = head.try_into().expect("as long as a header");
        seal(head);
        let Ok(header) = Header::decode(head) else { return };
        at += HEADER + header.len as usize;
    }
}

/// Everything that is understood, how many Pongs are owed, and how it ended.
fn understood(bytes: &[u8], step: usize) -> (Vec<Heard>, bool, Option<String>) {
    let now = Instant::now();
    let mut session = Session::new(Duration::from_secs(10), now);
    let mut heard = Vec::new();
    // The answers to so many are not too many.
    (0..8).for_each(|_| drop(session.ping(now)));
    let ended = bytes.chunks(step).find_map(|part| session.feed(part, now, &mut heard).err());
    assert!(session.pongs() <= session.pings());
    assert!(heard.is_empty() || session.peer().is_some());
    (heard, session.pong().is_some(), ended.map(|failure| failure.text))
}

fuzz_target!(|input: (usize, bool, Vec<u8>)| {
    let (step, good, mut bytes) = input;
    if good {
        mend(&mut bytes);
    }
    let whole = understood(&bytes, bytes.len().max(1));
    assert_eq!(whole, understood(&bytes, step % 64 + 1));
});
