//! Whole frames from a source to a cache, in any order and with whatever is in them: `cargo fuzz run snapshots` (see
//! README.md).
//!
//! As for `ingest`: nothing panics, and what can never be restored leaves nothing behind. The fuzzer knows how frames
//! are made, with right sizes and checksums unless it wants wrong ones, so it gets to what bytes at random never reach:
//! whole snapshots, on top of others, of the same names, compressed, too large for the cache.

#![no_main]

use std::collections::BTreeMap;

use crtool::remote::cache::swallow;
use crtool::remote::pb;
use crtool::remote::wire::{HEADER, Header, Kind, LZ4, MAGIC, Sum, VERSION, bare, crc_of_zeros, frame};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// One frame. Few streams, images and names, so that they meet.
#[derive(Debug, Arbitrary)]
enum Op {
    Begin { stream: u8, name: u8, parent: Option<u8>, survives: bool, run_first: bool, expected: u32 },
    Image { stream: u8, image: u8, name: u8 },
    Data { stream: u8, image: u8, bytes: Vec<u8>, times: u16, lz4: bool },
    Zero { stream: u8, image: u8, raw: u32 },
    End { stream: u8, image: u8, wrong: bool },
    Commit { stream: u8, wrong: bool },
    Confirm { stream: u8, survives: bool },
    Abort { stream: u8 },
    Resume { stream: u8, name: u8, confirm: Option<bool> },
    Go { stream: u8, again: Option<u8> },
    Ping,
    Raw(Vec<u8>),
}

/// What has been said, for sizes and checksums that are right.
#[derive(Default)]
struct Said {
    sums: BTreeMap<(u32, u32), Sum>,
    ended: BTreeMap<u32, Vec<pb::commit::Image>>,
}

fn few(number: u8) -> u32 {
    u32::from(number % 3) + 1
}

fn name(number: u8) -> String {
    format!("s{}", number % 4)
}

impl Said {
    fn data(&mut self, at: (u32, u32), raw: &[u8], lz4: bool) -> Vec<u8> {
        let (len, crc) = (raw.len() as u32, crc32c::crc32c(raw));
        self.sums.entry(at).or_default().push(len, crc);
        let block = if lz4 { lz4_flex::block::compress(raw) } else { raw.to_vec() };
        let flags = if lz4 { LZ4 } else { 0 };
        let header = Header { flags, len: block.len() as u32, ..Header::data(at.0, at.1, len, crc) };
        [&header.encode()[..], &block].concat()
    }

    fn bytes(&mut self, op: Op) -> Vec<u8> {
        match op {
            Op::Begin { stream, name: number, parent, survives, run_first, expected } => {
                let begin = pb::SnapshotBegin {
                    name: name(number),
                    parent: parent.map(name).unwrap_or_default(),
                    source_survives: survives,
                    run_first,
                    expected_bytes: expected.into(),
                    id: 7,
                    ..Default::default()
                };
                self.ended.remove(&few(stream));
                frame(Kind::SnapshotBegin, few(stream), 0, &begin)
            }
            Op::Image { stream, image, name } => {
                self.sums.insert((few(stream), few(image)), Sum::default());
                let name = ["inventory.img", "pages-1.img", "core-1.img", "../x"][usize::from(name % 4)];
                let begin = pb::ImageBegin { name: name.to_owned(), expected_bytes: 0 };
                frame(Kind::ImageBegin, few(stream), few(image), &begin)
            }
            Op::Data { stream, image, bytes, times, lz4 } => {
                // Much of it from little, so that the limit is reached.
                let raw: Vec<u8> =
                    bytes.iter().copied().cycle().take(bytes.len() * usize::from(times)).collect();
                self.data((few(stream), few(image)), &raw[..raw.len().min(1 << 20)], lz4)
            }
            Op::Zero { stream, image, raw } => {
                let raw = raw % ((1 << 20) + 2);
                let at = (few(stream), few(image));
                self.sums.entry(at).or_default().push(raw, crc_of_zeros(raw));
                bare(Kind::Zero, at.0, at.1, raw).to_vec()
            }
            Op::End { stream, image, wrong } => {
                let (stream, image) = (few(stream), few(image));
                let sum = self.sums.remove(&(stream, image)).unwrap_or_default();
                let end = pb::ImageEnd { size: sum.size, crc32c: sum.crc ^ u32::from(wrong) };
                let entry = pb::commit::Image { image, size: sum.size, crc32c: sum.crc };
                self.ended.entry(stream).or_default().push(entry);
                frame(Kind::ImageEnd, stream, image, &end)
            }
            Op::Commit { stream, wrong } => {
                let mut images = self.ended.remove(&few(stream)).unwrap_or_default();
                if wrong {
                    images.pop();
                }
                frame(Kind::Commit, few(stream), 0, &pb::Commit { images })
            }
            Op::Confirm { stream, survives } => {
                frame(Kind::Confirm, few(stream), 0, &pb::Confirm { survives })
            }
            Op::Abort { stream } => {
                frame(Kind::Abort, few(stream), 0, &pb::Abort { reason: "why\n".to_owned() })
            }
            Op::Resume { stream, name: number, confirm } => {
                let verdict = confirm.map(|survives| match survives {
                    true => pb::resume::Verdict::Confirm(pb::Confirm { survives }),
                    false => pb::resume::Verdict::Abort(pb::Abort::default()),
                });
                let resume = pb::Resume { name: name(number), id: 7, verdict, journal: 0 };
                frame(Kind::Resume, few(stream), 0, &resume)
            }
            Op::Go { stream, again: None } => frame(Kind::Go, few(stream), 0, &pb::Go {}),
            Op::Go { stream, again: Some(number) } => {
                let verdict = Some(pb::resume::Verdict::Go(pb::Go {}));
                let resume = pb::Resume { name: name(number), id: 7, verdict, journal: 0 };
                frame(Kind::Resume, few(stream), 0, &resume)
            }
            Op::Ping => bare(Kind::Ping, 0, 0, 0).to_vec(),
            Op::Raw(bytes) => bytes,
        }
    }
}

fuzz_target!(|input: (Vec<u8>, Vec<Op>)| {
    let (cuts, ops) = input;
    let mut said = Said::default();
    let hello = pb::Hello { version: VERSION, ..Default::default() };
    let mut bytes = [&MAGIC[..], &frame(Kind::Hello, 0, 0, &hello)].concat();
    for op in ops {
        bytes.extend(said.bytes(op));
        if bytes.len() > 24 << 20 {
            break;
        }
    }
    // Pieces of a byte each would take for ever.
    let cuts = if bytes.len() > 1 << 16 { &[][..] } else { &cuts[..] };
    assert!(bytes.len() >= HEADER);
    assert_eq!(swallow(&bytes, cuts), 0);
});
