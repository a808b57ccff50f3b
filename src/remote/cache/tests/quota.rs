//! Sources that want more than their share.

use super::*;

const MIB: usize = 1 << 20;

/// Limits that leave other sources something.
fn shared(memory: usize) -> Limits {
    Limits::new(Some(memory as u64), None, 4096)
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A dump from another host goes through.
fn others_still_can(bench: &mut Bench, name: &str) {
    let mut peer = bench.source_at("192.0.2.99");
    bench.bring(&mut peer, Script::new(1, name).image("a.img", &noise(3 * MIB, 9)));
    let restore = bench.take(name);
    assert!(bench.read(&restore, "a.img") == noise(3 * MIB, 9));
    bench.done(&restore, ran(1));
}

#[test]
fn one_source_cannot_have_all_the_memory() {
    let mut bench = Bench::limited(shared(16 * MIB), LONG);
    let mut greedy = bench.source_at("192.0.2.1");
    bench.send(&mut greedy, &Script::new(1, "greedy").image("a.img", &noise(15 * MIB, 1)).frames);
    let failed = bench.failed(&mut greedy, 1);
    assert_eq!(code(&failed), FailCode::FailMemory);
    assert!(failed.text.contains("192.0.2.1 has 12 of 12 MiB (--max-per-source)"), "{failed}");
    bench.send(&mut greedy, &Script::new(2, "greedy").image("a.img", &noise(11 * MIB, 1)).frames);
    others_still_can(&mut bench, "legitimate");
}

#[test]
fn one_source_cannot_have_all_the_connections() {
    let mut bench = Bench::limited(Limits::new(None, None, 256), LONG);
    let mut greedy: Vec<Peer> = Vec::new();
    let refused = loop {
        let mut peer = bench.stranger_at("192.0.2.1");
        bench.send(&mut peer, &hello(wire::VERSION));
        let (header, payload) = bench.frame(&mut peer);
        if let Some(failure) = failure(&header, &payload) {
            break failure;
        }
        greedy.push(peer);
    };
    assert_eq!(code(&refused), FailCode::FailBusy);
    assert!(refused.text.contains("192.0.2.1 has 16 connections"), "{refused}");
    others_still_can(&mut bench, "a");
    drop(greedy);
    bench.run();
    bench.source_at("192.0.2.1");
}

/// Each connection sends all of a compressed frame but its last byte.
#[test]
fn frames_that_never_end_take_no_more_than_their_share() {
    let mut bench = Bench::limited(Limits::new(Some(100 * MIB as u64), None, 40_000), LONG);
    let junk = vec![0; MIB - 1];
    let mut peers = Vec::new();
    for n in 0..100 {
        let mut peer = bench.source_at("192.0.2.1");
        let mut script = Script::new(1, &format!("s{n}"));
        let image = script.image_begin("x");
        let header = Header { flags: wire::LZ4, ..Header::data(1, image, MIB as u32, 0) };
        bench.send(&mut peer, &[&script.frames[..], &header.encode(), &junk].concat());
        peers.push(peer);
    }
    // Half of a quarter of the limit. What a frame is gathered in grows by doubling.
    let alive = peers.iter_mut().filter_map(|peer| (!peer.is_closed()).then_some(())).count();
    assert!((5..=13).contains(&alive), "{alive}");
    let (_, daemon) = bench.status();
    assert!(daemon.contains("MiB of frames"), "{daemon}");
    others_still_can(&mut bench, "legitimate");
}

#[test]
fn answers_that_are_not_read_take_no_more_than_their_share() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let pings = wire::bare(Kind::Ping, 0, 0, 0).repeat(10_000);
    let deadline = Instant::now() + PATIENCE;
    while bench.cache.lines() > 0 {
        let _ = peer.socket.write(&pings);
        bench.run();
        // What was read at once, and what is answered to it.
        assert!(bench.buffered() < 2 * MIB as u64);
        assert!(Instant::now() < deadline);
    }
    assert_eq!(bench.buffered(), 0);
}

/// 1.8 MB on the wire once took all descriptors there were.
#[test]
fn no_number_of_images_takes_descriptors() {
    let mut bench = Bench::limited(shared(100 * MIB), LONG);
    let mut victim = bench.source_at("192.0.2.99");
    bench.bring(&mut victim, small(1, "victim"));
    let mut greedy = bench.source_at("192.0.2.1");
    let before = open_files();
    let mut script = Script::new(1, "greedy");
    for n in 0..9000 {
        script = script.parts(&format!("i{n}"), &[Part::Zeros(65_537)]);
    }
    bench.send(&mut greedy, &script.frames);
    // Tests beside this one have some of their own.
    assert!(open_files() < before + 2000);
    assert!(bench.info("greedy").resident > 9 * MIB as u64, "they are charged");
    let restore = bench.take("victim");
    assert_eq!(bench.read(&restore, "inventory.img"), b"inventory");
}

#[test]
fn a_snapshot_without_an_inventory_is_none() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    for script in [Script::new(1, "empty"), Script::new(1, "empty").image("core-1.img", b"core")] {
        bench.send(&mut peer, &script.commit_as_it_is());
        let failed = bench.failed(&mut peer, 1);
        assert_eq!(code(&failed), FailCode::FailShort);
        assert!(failed.text.contains("there is no inventory.img among its images"), "{failed}");
    }
    assert_eq!(bench.state("empty"), State::Failed);
}

#[test]
fn one_source_cannot_have_all_the_snapshots() {
    let mut bench = Bench::limited(Limits::new(None, None, 400), LONG);
    let mut greedy = bench.source_at("192.0.2.1");
    let mut count = 0;
    let refused = loop {
        bench.send(&mut greedy, &small(count, &format!("s{count}")).commit());
        let (header, payload) = bench.frame(&mut greedy);
        if let Some(failure) = failure(&header, &payload) {
            break failure;
        }
        bench.send(&mut greedy, &confirm(count));
        count += 1;
    };
    assert_eq!((code(&refused), count), (FailCode::FailBusy, 75));
    assert!(refused.text.contains("192.0.2.1 has 75 snapshots"), "{refused}");
    others_still_can(&mut bench, "legitimate");
}

#[test]
fn one_source_cannot_push_the_records_of_others_out() {
    let mut bench = Bench::new();
    let mut victim = bench.source_at("192.0.2.99");
    bench.send(&mut victim, &[small(1, "victim").frames, abort(1)].concat());
    let mut greedy = bench.source_at("192.0.2.1");
    for n in 0..1200 {
        bench.send(&mut greedy, &[Script::new(1, &format!("s{n}")).frames, abort(1)].concat());
    }
    let (all, _) = bench.status();
    assert_eq!(all.len(), 1000);
    assert_eq!((all[0].name.as_str(), all[999].name.as_str()), ("victim", "s1199"));
}

#[test]
fn who_sends_no_bytes_keeps_no_memory() {
    let mut bench = Bench::limited(shared(16 * MIB), Duration::from_millis(200));
    let mut idle = bench.source_at("192.0.2.1");
    bench.send(&mut idle, &Script::new(1, "idle").image("a.img", &noise(11 * MIB, 1)).frames);
    let ping = wire::bare(Kind::Ping, 0, 0, 0);
    let deadline = Instant::now() + PATIENCE;
    while bench.state("idle") != State::Failed {
        bench.send(&mut idle, &ping);
        std::thread::sleep(Duration::from_millis(20));
        assert!(Instant::now() < deadline);
    }
    let info = bench.info("idle");
    assert!(info.text.contains("bytes of it came in 1.2 s (6 times --timeout"), "{}", info.text);
    assert_eq!(info.resident, 0);
    // Who is complete may take time: a script copies files, and nothing comes meanwhile.
    let mut patient = bench.source_at("192.0.2.2");
    bench.prepare(&mut patient, small(1, "patient"));
    let until = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < until {
        bench.send(&mut patient, &ping);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(bench.state("patient"), State::Prepared);
}

/// Bytes now and then, of every kind that costs little: a name is not kept for them, nor who waits for it.
#[test]
fn who_sends_too_few_bytes_keeps_no_name() {
    for kind in 0..4 {
        let mut bench = Bench::with(None, Duration::from_millis(100));
        let restore = bench.command();
        restore.say(get_within("a", 600_000));
        let mut slow = bench.source_at("192.0.2.1");
        let mut script = Script::new(0, "a");
        let image = script.image_begin("a.img");
        bench.send(&mut slow, &script.frames);
        if kind == 3 {
            // The header of a large one, whose bytes do not come.
            bench.send(&mut slow, &Header::data(0, image, 1 << 20, 0).encode());
        }
        let (deadline, mut number) = (Instant::now() + PATIENCE, image);
        while bench.state("a") != State::Failed {
            number += 1;
            let few = match kind {
                0 => wire::bare(Kind::Zero, 0, image, 1 << 20).to_vec(),
                1 => [&Header::data(0, image, 1, crc::of(b"x")).encode()[..], b"x"].concat(),
                2 => {
                    let begin = pb::ImageBegin { name: format!("i{number}"), expected_bytes: 0 };
                    wire::frame(Kind::ImageBegin, 0, number, &begin)
                }
                _ => vec![0],
            };
            // What is answered to them counts for nothing, on whatever stream.
            let ping = wire::bare(Kind::Ping, 0, 0, 0).repeat(if kind == 3 { 0 } else { 100 });
            bench.send(&mut slow, &[few, ping].concat());
            std::thread::sleep(Duration::from_millis(20));
            slow.came.clear();
            while slow.next().is_some() {}
            assert!(Instant::now() < deadline, "{kind}");
        }
        let text = bench.info("a").text;
        assert!(text.contains("16384 are the least"), "{kind}: {text}");
        let (local_reply::What::Passed(_), _) = bench.answer(&restore) else { panic!() };
        let mut good = bench.source_at("192.0.2.2");
        bench.bring(&mut good, small(1, "a"));
        assert!(matches!(bench.answer(&restore).0, local_reply::What::Snapshot(_)));
    }
}

/// A large frame on a slow link is progress long before its end.
#[test]
fn who_is_slow_and_goes_on_is_let_be() {
    const TIMEOUT: Duration = Duration::from_millis(300);
    let lease = TIMEOUT * 6;
    let half = [noise(MIB / 2, 1), vec![0; MIB / 2]].concat();
    // A host that stands still itself, for as long as the cache waits, is no proof of anything.
    for _ in 0..5 {
        let mut bench = Bench::with(None, TIMEOUT);
        let mut slow = bench.stranger();
        let hello = pb::Hello { version: wire::VERSION, timeout_ms: 60_000, ..Default::default() };
        bench.send(&mut slow, &[&MAGIC[..], &wire::frame(Kind::Hello, 0, 0, &hello)].concat());
        assert_eq!(bench.frame(&mut slow).0.kind, Kind::Hello);
        let script = Script::new(1, "a").parts("a.img", &[Part::Lz4(&half)]);
        let whole = script.commit();
        let pieces: Vec<&[u8]> = whole.chunks(16 << 10).collect();
        let pause = lease * 3 / 2 / u32::try_from(pieces.len()).unwrap();
        let (begun, mut longest) = (Instant::now(), Duration::ZERO);
        for piece in pieces {
            let before = Instant::now();
            std::thread::sleep(pause);
            bench.send(&mut slow, piece);
            longest = longest.max(before.elapsed());
        }
        if longest < lease / 3 {
            assert!(begun.elapsed() > lease);
            bench.prepared(&mut slow, 1);
            return;
        }
    }
}

#[test]
fn a_name_belongs_to_who_brought_it() {
    let mut bench = Bench::new();
    let mut good = bench.source_at("192.0.2.1");
    bench.prepare(&mut good, small(1, "web"));
    bench.send(&mut good, &survive(1));
    let mut evil = bench.source_at("192.0.2.66");
    bench.send(&mut evil, &small(1, "web").frames);
    let failed = bench.failed(&mut evil, 1);
    assert_eq!(code(&failed), FailCode::FailExists);
    assert!(failed.text.contains("web of 192.0.2.1, and only that source can replace it"), "{failed}");
    let mut again = bench.source_at("192.0.2.1");
    bench.bring(&mut again, small(1, "web"));
    assert!(bench.restored(&mut good, 1).text.contains("replaced"));
    assert_eq!(bench.info("web").origin, "192.0.2.1");
}

#[test]
fn strangers_push_out_their_own() {
    let mut bench = Bench::new();
    let mut other = bench.stranger_at("192.0.2.99");
    let mut spoke = bench.stranger_at("192.0.2.1");
    bench.send(&mut spoke, &MAGIC[..3]);
    // As many as there may be, again and again.
    let strangers: Vec<Peer> = (0..1000).map(|_| bench.stranger_at("192.0.2.1")).collect();
    bench.run();
    assert!(!other.is_closed() && !spoke.is_closed());
    assert!(bench.cache.lines() <= 256);
    bench.send(&mut spoke, &hello(wire::VERSION)[3..]);
    assert_eq!(bench.frame(&mut spoke).0.kind, Kind::Hello);
    drop(strangers);
}
