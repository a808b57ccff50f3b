//! Any bytes as what a cache says to a proxy: `cargo fuzz run proxy_inbox` (see README.md).
//!
//! However they are cut, the same is understood, and no more is held than one message and one read.

#![no_main]

use crtool::remote::proxy::inbox::{Heard, Inbox};
use crtool::remote::wire::{HEADER, Header, seal};
use libfuzzer_sys::fuzz_target;

/// Checks of headers that are right: the fuzzer would hardly find them.
fn mend(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(head) = bytes.get_mut(at..at + HEADER) {
        let head: &mut [u8; HEADER] = head.try_into().expect("as long as a header");
        seal(head);
        let Ok(header) = Header::decode(head) else { return };
        at += HEADER + header.len as usize;
    }
}

/// Everything that is understood, and whether it ended in an error.
fn understood(parts: impl Iterator<Item = Vec<u8>>) -> (Vec<Heard>, bool) {
    let mut inbox = Inbox::default();
    let mut heard = Vec::new();
    for part in parts {
        inbox.feed(&part);
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

fuzz_target!(|input: (usize, bool, Vec<u8>)| {
    let (step, good, mut bytes) = input;
    if good {
        mend(&mut bytes);
    }
    let whole = understood(std::iter::once(bytes.clone()));
    let parts = understood(bytes.chunks(step % 64 + 1).map(<[u8]>::to_vec));
    assert_eq!(whole, parts);
});
