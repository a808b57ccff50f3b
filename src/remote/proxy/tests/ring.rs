//! Pages that go through the ring.

use std::thread::JoinHandle;

use super::*;
use crate::remote::ring::{Place, SLOT, SLOTS};
use crate::sys::mapping::{Access, Mapping};

const WHOLE: usize = SLOT * SLOTS;

impl Dump {
    fn map(&self) -> Mapping {
        let (memory, _) = self.ring.as_ref().expect("a ring");
        Mapping::shared(memory.as_fd(), 0, WHOLE, Access::ReadWrite, None).unwrap()
    }
}

/// The head of a frame whose payload lies in the ring.
fn placed(image: u32, at: usize, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    Header::data(Place::at(at).encode(), image, len, crc::of(payload)).encode().to_vec()
}

/// A frame in every slot.
fn fill(dump: &mut Dump) {
    let map = dump.map();
    for slot in 0..SLOTS {
        let payload = vec![7; SLOT];
        map.write(slot * SLOT, &payload).unwrap();
        dump.write(&placed(1, slot * SLOT, &payload));
    }
}

/// One after another, waited for.
fn take_one(count: &OwnedFd) {
    let mut fds = [PollFd::new(count.as_fd(), PollFlags::POLLIN)];
    assert!(poll(&mut fds, 40_000u16).unwrap() > 0, "nothing is freed");
    assert_eq!(nix::unistd::read(count, &mut [0]), Ok(1));
}

#[test]
fn only_who_does_not_compress_gets_one() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    cache.begun();
    assert_ne!(dump.opened(), 0);
    assert!(dump.ring.is_none());
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.plain_cache();
    let mut dumps: Vec<Dump> = (0..9).map(|i| proxy.dump(&format!("b{i}"))).collect();
    for _ in &dumps {
        cache.begun();
    }
    for dump in &mut dumps {
        assert_eq!(dump.opened(), 0);
    }
    let rings = dumps.iter().filter(|dump| dump.ring.is_some()).count();
    assert_eq!(rings, 8, "more dumps than that go through the pipe");
}

#[test]
fn places_that_are_none() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.plain_cache();
    let beyond = placed(1, WHOLE - 4096, &[1; 4097]);
    let far = Header { stream: u32::MAX, ..Header::data(0, 1, 1, 0) }.encode().to_vec();
    let of_another_kind = wire::bare(Kind::Zero, 1, 1, 4096).to_vec();
    for bytes in [beyond, far, of_another_kind] {
        let mut dump = proxy.dump("a");
        cache.begun();
        dump.opened();
        dump.write(&bytes);
        let failed = dump.failed();
        assert_eq!(failed.code(), FailCode::FailProtocol);
        assert!(failed.text.starts_with("bad frame: "), "{}", failed.text);
        cache.expect::<pb::Abort>(Kind::Abort);
    }
    // And one where there is no ring.
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    dump.write(&placed(1, 0, &[1]));
    assert_eq!(dump.failed().text, "bad frame: Data for stream 1 from a dump");
    cache.expect::<pb::Abort>(Kind::Abort);
}

#[test]
fn the_ring_keeps_its_length() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.plain_cache();
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    let (memory, _) = dump.ring.as_ref().unwrap();
    assert!(nix::unistd::ftruncate(memory, 0).is_err());
    assert!(nix::unistd::ftruncate(memory, 1 << 30).is_err());
    assert!(sys::event::add_seals(memory.as_fd(), libc::F_SEAL_WRITE.cast_unsigned()).is_err());
}

#[test]
fn a_payload_is_freed_when_the_connection_has_it() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.plain_cache();
    let mut dump = proxy.dump("a");
    let (stream, _) = cache.begun();
    dump.opened();
    let map = dump.map();
    // More than the sockets hold.
    let rounds = 4 * SLOTS;
    let (_, count) = dump.ring.take().unwrap();
    let mut pipe = dump.pipe.take().unwrap();
    let writer: JoinHandle<_> = std::thread::spawn(move || {
        for round in 0..rounds {
            if round >= SLOTS {
                take_one(&count);
            }
            let payload = vec![u8::try_from(round).unwrap() | 1; SLOT];
            let at = round % SLOTS * SLOT;
            map.write(at, &payload).unwrap();
            pipe.write_all(&placed(1, at, &payload)).unwrap();
        }
        for _ in 0..SLOTS {
            take_one(&count);
        }
        let mut more = [PollFd::new(count.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut more, 50u16).unwrap(), 0, "more was freed than was used");
        pipe
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!writer.is_finished(), "the cache has taken nothing, so nothing is free");
    for round in 0..rounds {
        let (header, payload) = cache.frame();
        assert_eq!((header.kind, header.stream, payload.len()), (Kind::Data, stream, SLOT));
        assert_eq!(crc::of(&payload), header.crc, "{round}");
        assert!(payload.iter().all(|byte| *byte == u8::try_from(round).unwrap() | 1));
    }
    drop(writer.join().unwrap());
}

#[test]
fn a_dump_that_goes_leaves_whole_frames() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.plain_cache();
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    fill(&mut dump);
    // The connection is full in the middle of one of them.
    std::thread::sleep(Duration::from_millis(100));
    drop(dump);
    proxy.until("a", State::Failed);
    loop {
        let (header, payload) = cache.frame();
        match header.kind {
            Kind::Data => assert_eq!((payload.len(), crc::of(&payload)), (SLOT, header.crc)),
            Kind::Abort => break,
            kind => panic!("{kind:?}"),
        }
    }
    // The connection is as good as before.
    let mut next = proxy.dump("b");
    cache.begun();
    next.opened();
}

#[test]
fn a_dump_that_makes_holes_harms_only_itself() {
    use nix::fcntl::{FallocateFlags, fallocate};
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.plain_cache();
    let mut dump = proxy.dump("a");
    let (stream, _) = cache.begun();
    dump.opened();
    fill(&mut dump);
    std::thread::sleep(Duration::from_millis(100));
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&dump.ring.as_ref().unwrap().0, how, 0, WHOLE as i64).unwrap();
    let mut wrong = 0;
    for _ in 0..SLOTS {
        let (header, payload) = cache.frame();
        assert_eq!((header.kind, header.stream, payload.len()), (Kind::Data, stream, SLOT));
        wrong += usize::from(crc::of(&payload) != header.crc);
    }
    assert_ne!(wrong, 0, "the checksums give it away");
    let mut next = proxy.dump("b");
    cache.begun();
    next.opened();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn frames_of_both_kinds_keep_their_order(
        dumps in prop::collection::vec(
            prop::collection::vec((1usize..=SLOT, any::<u8>(), any::<bool>()), 1..60), 1..4,
        ),
    ) {
        let proxy = Proxy::start(LONG);
        let mut cache = proxy.plain_cache();
        let mut sent = std::collections::HashMap::new();
        let (mut opened, mut writers) = (Vec::new(), Vec::new());
        for frames in dumps {
            let mut dump = proxy.dump("a");
            let (stream, _) = cache.begun();
            dump.opened();
            dump.guard();
            sent.insert(stream, frames.iter().map(|(len, byte, _)| (*len, *byte)).collect::<Vec<_>>());
            opened.push((dump, frames));
        }
        for (mut dump, frames) in opened {
            writers.push(std::thread::spawn(move || {
                let map = dump.map();
                let (_, count) = dump.ring.take().unwrap();
                let mut used = 0;
                for (len, byte, in_ring) in frames {
                    let payload = vec![byte; len];
                    if in_ring {
                        if used >= SLOTS {
                            take_one(&count);
                        }
                        let at = used % SLOTS * SLOT;
                        used += 1;
                        map.write(at, &payload).unwrap();
                        dump.write(&placed(1, at, &payload));
                    } else {
                        let len = u32::try_from(len).unwrap();
                        let head = Header::data(0, 1, len, crc::of(&payload)).encode();
                        dump.write(&[&head, &payload[..]].concat());
                    }
                }
                dump.commit();
                dump
            }));
        }
        let mut came = std::collections::HashMap::<u32, Vec<(usize, u8)>>::new();
        let mut commits = 0;
        while commits < sent.len() {
            let (header, payload) = cache.frame();
            if header.kind == Kind::Commit {
                commits += 1;
                continue;
            }
            prop_assert_eq!(crc::of(&payload), header.crc);
            came.entry(header.stream).or_default().push((payload.len(), payload[0]));
        }
        prop_assert_eq!(came, sent);
        for writer in writers {
            drop(writer.join().unwrap());
        }
    }
}
