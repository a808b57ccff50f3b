//! `--compress lz4`: fewer bytes on the way where that is possible, the same memory behind it.

use crate::{
    program::{BYTES, Memory},
    site::{Meter, Site},
};

const LZ4: &[&str] = &["--compress", "lz4"];
const PLAIN: &[&str] = &[];

/// Bytes that a migration without a proxy sends.
fn sent_directly(memory: Memory, more: &[&str]) -> u64 {
    let mut site = Site::new(memory);
    let cache = site.cache(PLAIN);
    let meter = Meter::start(cache.port());
    let port = meter.port.to_string();
    let words = [&["--address", "127.0.0.1", "--port", &port], more].concat();
    Site::run(&mut site.dump(&words)).succeeded();
    site.restore_and_end();
    meter.bytes()
}

/// Bytes that a migration through a proxy sends.
fn sent_by_a_proxy(memory: Memory, more: &[&str]) -> u64 {
    let mut site = Site::new(memory);
    let cache = site.cache(PLAIN);
    let meter = Meter::start(cache.port());
    let _proxy = site.proxy(meter.port, more);
    Site::run(&mut site.dump(PLAIN)).succeeded();
    site.restore_and_end();
    meter.bytes()
}

fn much_less(compressed: u64, plain: u64) {
    assert!(plain > BYTES as u64, "{plain} bytes for {BYTES} in memory");
    assert!(compressed < plain / 2, "{compressed} bytes compressed, {plain} as they are");
}

pub fn directly() {
    much_less(sent_directly(Memory::Text, LZ4), sent_directly(Memory::Text, &["--compress", "none"]));
}

pub fn by_a_proxy() {
    much_less(sent_by_a_proxy(Memory::Text, LZ4), sent_by_a_proxy(Memory::Text, PLAIN));
}

pub fn noise() {
    for sent in [sent_directly, sent_by_a_proxy] {
        let compressed = sent(Memory::Noise, LZ4);
        // The noise as it is, and less of everything else.
        assert!(compressed > BYTES as u64, "{compressed} bytes");
        assert!(compressed < sent(Memory::Noise, PLAIN));
    }
}
