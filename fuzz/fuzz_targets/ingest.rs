//! Any bytes from a source to a cache: `cargo fuzz run ingest` (see README.md).
//!
//! Whatever comes, in whatever pieces, nothing panics, memory stays bounded, and what can never be restored
//! leaves nothing behind.

#![no_main]

use crtool::remote::cache::swallow;
use crtool::remote::pb;
use crtool::remote::wire::{HEADER, Header, Kind, MAGIC, VERSION, frame, seal};
use libfuzzer_sys::fuzz_target;

/// Checksums that are right, where the fuzzer left place for one: it would hardly find them.
fn mend(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(head) = bytes.get_mut(at..at + HEADER) {
        let head: &mut [u8; HEADER] = head.try_into().expect("as long as a header");
        seal(head);
        let Ok(header) = Header::decode(head) else { return };
        let end = at + HEADER + header.len as usize;
        let Some(payload) = bytes.get(at + HEADER..end) else { return };
        let crc = crc32c::crc32c(payload);
        bytes[at..at + HEADER].copy_from_slice(&Header { crc, ..header }.encode());
        at = end;
    }
}

fuzz_target!(|input: (bool, Vec<u8>, Vec<u8>)| {
    let (good, cuts, mut frames) = input;
    if good {
        mend(&mut frames);
    }
    let hello = pb::Hello { version: VERSION, ..Default::default() };
    let bytes = [&MAGIC[..], &frame(Kind::Hello, 0, 0, &hello), &frames].concat();
    assert_eq!(swallow(&bytes, &cuts), 0);
});
