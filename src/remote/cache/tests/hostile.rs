//! Sources that break the rules.

use proptest::prelude::*;

use super::*;
use crate::remote::cache::source::MAX_STREAMS;
use crate::remote::cache::swallow;

#[test]
fn frames_cut_at_every_byte() {
    let mut bench = Bench::new();
    let zeros = vec![0; 5000];
    let script =
        unnumbered(1, "a").parts("b.img", &[Part::Data(b"bytes"), Part::Zeros(70_000), Part::Lz4(&zeros)]);
    let whole = [hello(wire::VERSION), script.commit(), confirm(1)].concat();
    // One byte after the other.
    let mut peer = bench.stranger();
    for byte in &whole {
        bench.send(&mut peer, &[*byte]);
    }
    let restore = bench.take("a");
    assert_eq!(bench.read(&restore, "b.img").len(), 75_005);
    bench.done(&restore, ran(1));
    // In two pieces.
    for at in 0..whole.len() {
        let mut peer = bench.stranger();
        bench.send(&mut peer, &whole[..at]);
        bench.send(&mut peer, &whole[at..]);
        let restore = bench.take("a");
        bench.done(&restore, ran(1));
    }
}

#[test]
fn a_version_that_nobody_knows() {
    let mut bench = Bench::new();
    let mut peer;
    for old in [0, wire::VERSION - 1] {
        peer = bench.stranger();
        bench.send(&mut peer, &hello(old));
        assert_eq!(code(&bench.failed(&mut peer, 0)), FailCode::FailVersion);
        bench.until("the end", |_| peer.is_closed().then_some(()));
    }
    // A newer one is met where we are.
    let mut peer = bench.stranger();
    bench.send(&mut peer, &hello(77));
    let (header, payload) = bench.frame(&mut peer);
    let hello: pb::Hello = wire::message(&header, &payload).unwrap();
    assert_eq!((hello.version, hello.features), (wire::VERSION, wire::FEATURE_LZ4));
}

#[test]
fn who_is_no_crtool_gets_no_answer() {
    for noise in [&b"GET / HTTP/1.1\r\n"[..], b"crtool\x02\n", &[0; 100]] {
        let mut bench = Bench::new();
        let mut peer = bench.stranger();
        bench.send(&mut peer, noise);
        bench.until("the end", |_| peer.is_closed().then_some(()));
        assert!(peer.came.is_empty());
    }
}

#[test]
fn frames_that_lose_the_thread_end_the_connection() {
    let unknown = {
        let mut bytes = wire::bare(Kind::Ping, 0, 0, 0);
        bytes[0] = 99;
        wire::seal(&mut bytes);
        bytes.to_vec()
    };
    let huge = {
        let mut bytes = wire::bare(Kind::Ping, 0, 0, 0);
        bytes[0] = Kind::Commit as u8;
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        wire::seal(&mut bytes);
        bytes.to_vec()
    };
    for bad in [
        unknown,
        huge,
        hello(wire::VERSION)[MAGIC.len()..].to_vec(),
        wire::frame(Kind::Prepared, 1, 0, &pb::Prepared::default()),
    ] {
        let mut bench = Bench::new();
        let mut peer = bench.source();
        bench.prepare(&mut peer, small(1, "whole"));
        bench.send(&mut peer, &small(2, "a").frames);
        bench.send(&mut peer, &bad);
        assert_eq!(code(&bench.failed(&mut peer, 2)), FailCode::FailProtocol);
        bench.until("the end", |_| peer.is_closed().then_some(()));
        drop(peer);
        // What was complete is not lost for it.
        bench.wait_state("whole", State::InDoubt);
        assert_eq!(bench.state("a"), State::Failed);
    }
}

/// What comes, why it is refused, and that only this snapshot suffers.
#[test]
fn a_snapshot_that_breaks_the_rules_suffers_alone() {
    let image = |name: &str, number| {
        wire::frame(Kind::ImageBegin, 1, number, &pb::ImageBegin { name: name.to_owned(), expected_bytes: 0 })
    };
    let end = |number, size, crc32c| wire::frame(Kind::ImageEnd, 1, number, &pb::ImageEnd { size, crc32c });
    let data = |number, bytes: &[u8], crc| {
        let header = Header::data(1, number, u32::try_from(bytes.len()).unwrap(), crc);
        [&header.encode()[..], bytes].concat()
    };
    let lz4 = |bytes: &[u8], raw| {
        let header =
            Header { flags: wire::LZ4, raw, ..Header::data(1, 1, u32::try_from(bytes.len()).unwrap(), 0) };
        [&header.encode()[..], bytes].concat()
    };
    let commit = |images: Vec<(u32, u64, u32)>| {
        let images =
            images.into_iter().map(|(image, size, crc32c)| pb::commit::Image { image, size, crc32c });
        wire::frame(Kind::Commit, 1, 0, &pb::Commit { images: images.collect() })
    };
    let good = crc::of(b"abc");
    let damaged = {
        let mut frame = image("a.img", 1);
        *frame.last_mut().unwrap() ^= 1;
        frame
    };
    let cases = [
        (damaged, FailCode::FailChecksum),
        (image("../a", 1), FailCode::FailName),
        ([image("a.img", 1), image("b.img", 1)].concat(), FailCode::FailProtocol),
        ([image("a.img", 1), image("a.img", 2)].concat(), FailCode::FailProtocol),
        (data(1, b"abc", good), FailCode::FailProtocol),
        (wire::bare(Kind::Zero, 1, 1, 10).to_vec(), FailCode::FailProtocol),
        (end(1, 0, 0), FailCode::FailProtocol),
        ([image("a.img", 1), data(1, b"abc", good ^ 1)].concat(), FailCode::FailChecksum),
        ([image("a.img", 1), data(1, b"abc", good), end(1, 4, good)].concat(), FailCode::FailShort),
        ([image("a.img", 1), data(1, b"abc", good), end(1, 3, good ^ 1)].concat(), FailCode::FailChecksum),
        ([image("a.img", 1), end(1, 0, 0), data(1, b"abc", good)].concat(), FailCode::FailProtocol),
        ([image("a.img", 1), end(1, 0, 0), end(1, 0, 0)].concat(), FailCode::FailProtocol),
        ([image("a.img", 1), lz4(b"garbage", 1000)].concat(), FailCode::FailChecksum),
        ([image("a.img", 1), lz4(&lz4_flex::block::compress(b"abc"), 4)].concat(), FailCode::FailChecksum),
        (
            [image("a.img", 1), lz4(&lz4_flex::block::compress(&[7; 1000]), 10)].concat(),
            FailCode::FailChecksum,
        ),
        ([image("a.img", 1), commit(vec![(1, 0, 0)])].concat(), FailCode::FailShort),
        ([image("a.img", 1), end(1, 0, 0), commit(vec![])].concat(), FailCode::FailShort),
        ([image("a.img", 1), end(1, 0, 0), commit(vec![(2, 0, 0)])].concat(), FailCode::FailShort),
        ([image("a.img", 1), end(1, 0, 0), commit(vec![(1, 1, 0)])].concat(), FailCode::FailShort),
        ([image("a.img", 1), end(1, 0, 0), commit(vec![(1, 0, 0); 2])].concat(), FailCode::FailShort),
        (commit(vec![(1, 0, 0); 50]), FailCode::FailProtocol),
        (confirm(1), FailCode::FailProtocol),
    ];
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let other = small(2, "other");
    bench.send(&mut peer, &other.frames);
    for (n, (bad, expected)) in cases.into_iter().enumerate() {
        bench.send(&mut peer, &Script::new(1, "bad").frames);
        bench.send(&mut peer, &bad);
        let failed = bench.failed(&mut peer, 1);
        assert_eq!(code(&failed), expected, "case {n}: {failed}");
        let info = bench.info("bad");
        assert_eq!((info.state(), info.resident), (State::Failed, 0), "case {n}");
        // The source did not know yet: what still comes is thrown away.
        let late = Script::new(1, "bad").image("late.img", b"late");
        bench.send(&mut peer, &late.clone().frames[Script::new(1, "bad").frames.len()..]);
        bench.send(&mut peer, &confirm(1));
        bench.no_frame(&mut peer);
    }
    let commit = pb::Commit { images: other.images };
    bench.send(&mut peer, &wire::frame(Kind::Commit, 2, 0, &commit));
    bench.prepared(&mut peer, 2);
}

#[test]
fn a_stream_that_begins_twice_is_refused_once() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let begin = Script::new(1, "a").frames;
    bench.send(&mut peer, &[&begin[..], &begin[..]].concat());
    assert_eq!(bench.failed(&mut peer, 1).text, "stream 1 begins twice");
    bench.no_frame(&mut peer);
    assert_eq!(bench.state("a"), State::Failed);
}

#[test]
fn a_name_that_no_snapshot_may_have() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    for name in ["", "a\nb", &"x".repeat(1025)] {
        bench.send(&mut peer, &Script::new(1, name).frames);
        assert_eq!(code(&bench.failed(&mut peer, 1)), FailCode::FailName);
    }
    let long = pb::SnapshotBegin { comm: "\x1b".repeat(3000) + &"ä".repeat(3000), ..begin("a") };
    bench.send(&mut peer, &Script::from(1, &long).frames);
    let info = bench.info("a");
    assert_eq!(info.comm, "ä".repeat(128));
}

#[test]
fn a_stream_that_never_began() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let commit = wire::frame(Kind::Commit, 5, 0, &pb::Commit::default());
    bench.send(&mut peer, &commit);
    assert_eq!(code(&bench.failed(&mut peer, 5)), FailCode::FailProtocol);
    for late in [commit, confirm(5), abort(5)] {
        bench.send(&mut peer, &late);
        bench.no_frame(&mut peer);
    }
    bench.bring(&mut peer, small(5, "a"));
}

#[test]
fn as_many_streams_as_may_be() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let scripts: Vec<Script> = (0..64)
        .map(|n| {
            Script::new(n, &format!("s{n}")).image("a.img", &noise(10_000, n)).image("b.img", &[n as u8])
        })
        .collect();
    let wholes: Vec<Vec<u8>> = scripts.into_iter().map(Script::commit).collect();
    // One frame of each in turn.
    let mut left: Vec<&[u8]> = wholes.iter().map(|whole| &whole[..]).collect();
    let (mut one_more, most) = (true, u32::try_from(MAX_STREAMS).unwrap());
    while left.iter().any(|left| !left.is_empty()) {
        for rest in &mut left {
            if rest.is_empty() {
                continue;
            }
            let header = Header::decode(rest[..HEADER].try_into().unwrap()).unwrap();
            let (frame, others) = rest.split_at(HEADER + header.len as usize);
            bench.send(&mut peer, frame);
            *rest = others;
        }
        if std::mem::take(&mut one_more) {
            for n in 64..most {
                bench.send(&mut peer, &Script::new(n, &format!("s{n}")).frames);
            }
            bench.send(&mut peer, &small(most, "too-many").frames);
            assert_eq!(code(&bench.failed(&mut peer, most)), FailCode::FailProtocol);
        }
    }
    for n in 0..64 {
        bench.prepared(&mut peer, n);
        bench.send(&mut peer, &confirm(n));
    }
    for n in 0..64_u32 {
        let restore = bench.take(&format!("s{n}"));
        assert!(bench.read(&restore, "a.img") == noise(10_000, n));
        assert_eq!(bench.read(&restore, "b.img"), [n as u8]);
        bench.done(&restore, ran(1));
    }
}

#[test]
fn as_many_open_images_as_may_be() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let mut script = Script::new(1, "a");
    for n in 0..4097 {
        script.image_begin(&format!("i{n}"));
    }
    bench.send(&mut peer, &script.frames);
    assert_eq!(code(&bench.failed(&mut peer, 1)), FailCode::FailProtocol);
}

#[test]
fn strangers_are_limited_and_time_out() {
    let mut bench = Bench::with(None, Duration::from_millis(500));
    let mut silent: Vec<Peer> = (0..300).map(|_| bench.stranger()).collect();
    bench.run();
    assert!(silent.iter_mut().map(Peer::is_closed).filter(|closed| *closed).count() >= 300 - 256);
    bench.until("all to be gone", |_| silent.iter_mut().all(Peer::is_closed).then_some(()));
    assert_eq!(bench.cache.lines(), 0);
}

#[test]
fn a_source_that_falls_silent_is_given_up() {
    let mut bench = Bench::with(None, Duration::from_millis(300));
    let mut peer = bench.source();
    bench.send(&mut peer, &small(1, "a").frames);
    let info = bench.wait_state("a", State::Failed);
    assert!(info.text.contains("nothing was heard"), "{}", info.text);
    assert!(bench.until("the end", |_| peer.is_closed().then_some(true)));
}

#[test]
fn who_reads_no_answers_is_given_up() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let pings = wire::bare(Kind::Ping, 0, 0, 0).repeat(10_000);
    let deadline = Instant::now() + PATIENCE;
    // It closes its end in the middle of this.
    while bench.cache.lines() > 0 {
        let _ = peer.socket.write(&pings);
        bench.run();
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn pings_are_answered_in_order() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let ping = wire::bare(Kind::Ping, 0, 0, 0);
    bench.send(&mut peer, &[&ping[..], &small(1, "a").commit(), &ping].concat());
    let kinds: Vec<Kind> = (0..3).map(|_| bench.frame(&mut peer).0.kind).collect();
    assert!(kinds.iter().filter(|kind| **kind == Kind::Pong).count() == 2 && kinds.contains(&Kind::Prepared));
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let image = pb::ImageBegin { name: "a.img".to_owned(), expected_bytes: 0 };
    let end = pb::ImageEnd { size: 0, crc32c: 0 };
    let commit = pb::Commit { images: vec![pb::commit::Image { image: 1, size: 0, crc32c: 0 }] };
    let resume = pb::Resume {
        name: "s".to_owned(),
        id: 4711,
        verdict: Some(pb::resume::Verdict::Confirm(pb::Confirm::default())),
        journal: 0,
    };
    // None comes twice but those that are not numbered.
    let of = |stream, name, id| Script::from(stream, &pb::SnapshotBegin { id, ..begin(name) }).frames;
    let kinds = vec![
        of(1, "s", 0),
        of(2, "s", 4711),
        of(2, "t", 0),
        wire::frame(Kind::ImageBegin, 1, 1, &image),
        wire::frame(Kind::ImageBegin, 2, 1, &image),
        [&Header::data(1, 1, 3, crc::of(b"abc")).encode()[..], b"abc"].concat(),
        wire::bare(Kind::Zero, 1, 1, 100_000).to_vec(),
        wire::frame(Kind::ImageEnd, 1, 1, &end),
        wire::frame(Kind::ImageEnd, 2, 1, &end),
        wire::frame(Kind::Commit, 1, 0, &commit),
        wire::frame(Kind::Commit, 2, 0, &commit),
        confirm(1),
        survive(2),
        abort(1),
        wire::frame(Kind::Resume, 3, 0, &resume),
        wire::bare(Kind::Ping, 0, 0, 0).to_vec(),
    ];
    prop::sample::select(kinds)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever comes, the cache goes on, and memory comes back.
    #[test]
    fn any_frames_in_any_order(
        frames in prop::collection::vec(any_frame(), 0..40),
        noise in any::<Vec<u8>>(),
        at in any::<prop::sample::Index>(),
    ) {
        let mut bench = Bench::new();
        let mut peer = bench.source();
        let mut bytes = frames.concat();
        if !noise.is_empty() && !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes.splice(at..at, noise);
        }
        let _ = peer.socket.write(&bytes);
        bench.run();
        while peer.next().is_some() {}
        drop(peer);
        bench.until("the connection to be gone", |bench| (bench.cache.lines() == 0).then_some(()));
        let (all, _) = bench.status();
        for info in all {
            prop_assert!(!matches!(info.state(), State::Receiving | State::Prepared), "{info:?}");
            prop_assert!(info.resident == 0 || matches!(info.state(), State::Ready | State::InDoubt), "{info:?}");
        }
        // It serves on.
        let mut peer = bench.source();
        bench.bring(&mut peer, small(1, "fine"));
        let restore = bench.take("fine");
        prop_assert_eq!(bench.read(&restore, "inventory.img"), b"inventory");
    }
}

proptest! {
    #[test]
    fn any_bytes_in_any_pieces(
        frames in prop::collection::vec(any_frame(), 0..30),
        noise in any::<Vec<u8>>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cuts in any::<Vec<u8>>(),
    ) {
        let mut bytes = [hello(wire::VERSION), frames.concat(), noise].concat();
        prop_assert_eq!(swallow(&bytes, &cuts), 0);
        for (at, with) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= with;
        }
        prop_assert_eq!(swallow(&bytes, &cuts), 0);
    }
}
