//! More comes to a cache than it has room for.

use std::{fs, io::Write as _};

use crtool::remote::{
    crc, pb,
    wire::{self, Header, Kind, MAX_DATA},
};

use crate::{
    chain::Source,
    program::Memory,
    site::{Daemon, Site},
};

const NONE: &[&str] = &[];
const MIB: u64 = 1 << 20;

/// Bytes of memory that a daemon takes, images included.
fn resident(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let kib = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    kib("RssAnon:") << 10
}

fn descriptors(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count()
}

/// One of them goes through, the other is refused as long as its memory is announced only: both run.
pub fn two_trees() {
    let (mut one, other) = (Site::new(Memory::Noise), Site::new(Memory::Noise));
    // Each has 4 MiB and a little.
    let cache = one.cache(&["--max-memory", "8M", "--max-per-source", "8M"]);
    let _proxy = one.proxy(cache.port(), NONE);
    Site::run(&mut one.dump(NONE)).succeeded();
    let port = cache.port().to_string();
    let direct = ["-D", "other", "--address", "127.0.0.1", "--port", &port];
    let refused = Site::run(&mut other.dump(&direct)).failed();
    for part in ["snapshot other is not taken: ", "MiB more are wanted", "of 8 MiB (--max-memory)"] {
        assert!(refused.contains(part), "{refused}");
    }
    other.counts();
    one.restore_and_end();
    Site::run(&mut other.dump(&direct)).succeeded();
    let words = ["restore", "--remote", "-d", "-D", "other", "--timeout", "20"];
    let mut other = other;
    other.reap();
    Site::run(&mut one.crtool("dst", &words)).succeeded();
    other.counts();
    other.end();
}

/// A tree is migrated beside whoever is greedy.
fn others_still_can(site: &mut Site, cache: &Daemon) {
    let port = cache.port().to_string();
    Site::run(&mut site.dump(&["--address", "127.0.0.1", "--port", &port])).succeeded();
    site.restore_and_end();
}

/// Connections that each send a compressed frame but for its last byte.
pub fn frames_that_never_end() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(&["--max-memory", "100M", "--at-once", "1000"]);
    let before = resident(&cache);
    let junk = vec![0; MAX_DATA as usize - 1];
    let mut sources = Vec::new();
    for n in 0..200 {
        let mut source = Source::connect(&cache);
        let begin = pb::SnapshotBegin { name: format!("greedy{n}"), ..pb::SnapshotBegin::default() };
        source.say(Kind::SnapshotBegin, 0, &begin);
        let image = pb::ImageBegin { name: "x".to_owned(), expected_bytes: 0 };
        source.say(Kind::ImageBegin, 1, &image);
        let header = Header { flags: wire::LZ4, ..Header::data(0, 1, MAX_DATA, 0) };
        // It may be closed before all of it is written.
        let _ = source.stream.write_all(&[&header.encode()[..], &junk].concat());
        sources.push(source);
    }
    cache.says("too many frames begun and not ended");
    let after = resident(&cache);
    assert!(after < before + 40 * MIB, "{before} {after}");
    others_still_can(&mut site, &cache);
}

/// An image that just does not fit on the heap takes no descriptor.
pub fn images_without_end() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(&["--max-memory", "100M"]);
    let mut source = Source::connect(&cache);
    source.say(
        Kind::SnapshotBegin,
        0,
        &pb::SnapshotBegin { name: "greedy".to_owned(), ..Default::default() },
    );
    let before = descriptors(&cache);
    let raw = 65_537;
    let crc = wire::crc_of_zeros(raw);
    assert_eq!(crc, crc::of(&vec![0; raw as usize]));
    for number in 1..20_000_u32 {
        source.say(
            Kind::ImageBegin,
            number,
            &pb::ImageBegin { name: format!("i{number}"), expected_bytes: 0 },
        );
        source.stream.write_all(&wire::bare(Kind::Zero, 0, number, raw)).unwrap();
        source.say(Kind::ImageEnd, number, &pb::ImageEnd { size: raw.into(), crc32c: crc });
    }
    let (header, payload) = source.hear();
    assert_eq!(header.kind, Kind::Failed);
    let failed: pb::Failed = wire::message(&header, &payload).unwrap();
    assert!(failed.text.contains("of 75 MiB (--max-per-source)"), "{}", failed.text);
    let after = descriptors(&cache);
    assert!(after <= before + 1, "{before} {after}");
    others_still_can(&mut site, &cache);
}
