//! Offers: who has to wait, who has not what its tree needs, and what is said in which order.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::*;
use crate::image::pb as images;
use crate::remote::namespace_of_pids;
use crate::settings::RestoreSettings;

const SECOND: Duration = Duration::from_secs(1);

impl Bench {
    fn at_once(most: usize, timeout: Duration) -> Self {
        let mut bench = Self::with(None, timeout);
        bench.cache.snapshots().set_at_once(most);
        bench
    }

    fn place(&mut self, peer: &mut Peer, stream: u32) -> u32 {
        self.message::<pb::Queue>(peer, Kind::Queue, stream).place
    }

    fn room(&mut self, peer: &mut Peer, stream: u32) -> pb::Room {
        self.until("room", |_| {
            let next = peer.next();
            assert!(next.is_none(), "{next:?}");
            peer.rooms.iter().find(|(of, _)| *of == stream).map(|(_, room)| room.clone())
        })
    }
}

/// An offer and the rest of its frames.
fn parted(stream: u32, name: &str) -> (Vec<u8>, Vec<u8>) {
    let offer = Script::new(stream, name).frames;
    let rest = small(stream, name).commit().split_off(offer.len());
    (offer, rest)
}

#[test]
fn an_answer_to_a_ping_comes_last() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let damaged = Header::data(1, 1, 4, 1).encode();
    let mut frames = Script::new(1, "a");
    frames.image_begin("x.img");
    let all = [&frames.frames[..], &damaged, b"abcd", &wire::bare(Kind::Ping, 0, 0, 0)].concat();
    // In one piece, so that all of it is taken in one turn.
    std::io::Write::write_all(&mut peer.socket, &all).unwrap();
    assert_eq!(code(&bench.failed(&mut peer, 1)), FailCode::FailChecksum);
    assert_eq!(bench.frame(&mut peer).0.kind, Kind::Pong);
}

#[test]
fn sources_wait_in_order() {
    let mut bench = Bench::at_once(1, LONG);
    let mut peers: Vec<Peer> = (0..4).map(|_| bench.source()).collect();
    let all: Vec<(Vec<u8>, Vec<u8>)> = (0..4).map(|n| parted(1, &format!("s{n}"))).collect();
    for (n, (peer, (offer, _))) in peers.iter_mut().zip(&all).enumerate() {
        bench.send(peer, offer);
        match n {
            0 => drop(bench.room(peer, 1)),
            _ => assert_eq!(bench.place(peer, 1), n as u32),
        }
    }
    assert!(bench.info("s2").text.contains("2 before it"));
    // One that waits gives up: the one behind it hears.
    bench.send(&mut peers[1], &abort(1));
    assert_eq!((bench.place(&mut peers[2], 1), bench.place(&mut peers[3], 1)), (1, 2));
    let is_there = |bench: &mut Bench, name: &str| bench.status().0.iter().any(|info| info.name == name);
    assert!(!is_there(&mut bench, "s1"));
    // What comes has its turn until all of it is there.
    bench.send(&mut peers[0], &all[0].1);
    bench.prepared(&mut peers[0], 1);
    bench.room(&mut peers[2], 1);
    assert_eq!(bench.place(&mut peers[3], 1), 1);
    // Who is gone has no turn.
    drop(peers.remove(2));
    bench.room(&mut peers[2], 1);
    bench.send(&mut peers[2], &all[3].1);
    bench.prepared(&mut peers[2], 1);
}

/// What is handed over has its turn until the restored tree runs, where the cache sees to that.
#[test]
fn a_turn_ends_with_the_hand_over() {
    for restores in [false, true] {
        let mut bench = Bench::at_once(1, LONG);
        if restores {
            bench.cache.restore_all(&RestoreSettings::new(Path::new(".")));
        }
        let (mut first, mut second) = (bench.source(), bench.source());
        bench.prepare(&mut first, run_first(1, "a"));
        bench.send(&mut second, &Script::new(1, "b").frames);
        if restores {
            assert_eq!(bench.place(&mut second, 1), 1);
            bench.send(&mut first, &abort(1));
        }
        bench.room(&mut second, 1);
    }
}

#[test]
fn images_before_the_turn_are_refused() {
    let mut bench = Bench::at_once(1, LONG);
    let (mut one, mut two) = (bench.source(), bench.source());
    bench.send(&mut one, &parted(1, "one").0);
    bench.send(&mut two, &small(1, "two").commit());
    assert_eq!(bench.place(&mut two, 1), 1);
    let failed = bench.failed(&mut two, 1);
    assert_eq!(code(&failed), FailCode::FailProtocol, "{failed}");
    bench.send(&mut one, &parted(1, "one").1);
    bench.prepared(&mut one, 1);
}

#[test]
fn who_stands_still_loses_its_turn_and_then_its_room() {
    let mut bench = Bench::at_once(1, SECOND);
    let (mut one, mut two) = (bench.source(), bench.source());
    let (mut pinged, begun) = (Instant::now(), Instant::now());
    bench.send(&mut one, &parted(1, "one").0);
    let (offer, rest) = parted(1, "two");
    bench.send(&mut two, &offer);
    assert_eq!(bench.place(&mut two, 1), 1);
    let mut ping = |bench: &mut Bench, one: &mut Peer, two: &mut Peer| {
        if pinged.elapsed() > SECOND / 5 {
            pinged = Instant::now();
            bench.send(one, &wire::bare(Kind::Ping, 0, 0, 0));
            bench.send(two, &wire::bare(Kind::Ping, 0, 0, 0));
        }
    };
    bench.until("the turn of the second", |bench| {
        ping(bench, &mut one, &mut two);
        while two.next().is_some() {}
        (!two.rooms.is_empty()).then_some(())
    });
    assert!(begun.elapsed() >= SECOND);
    bench.send(&mut two, &rest);
    bench.until("all of the second", |bench| {
        ping(bench, &mut one, &mut two);
        (bench.state("two") == State::Prepared).then_some(())
    });
    assert_eq!(bench.state("one"), State::Receiving);
    let failed = bench.until("the end of the first", |bench| {
        ping(bench, &mut one, &mut two);
        one.next().and_then(|(header, payload)| failure(&header, &payload))
    });
    assert!(failed.text.contains("bytes of it came in"), "{failed}");
}

#[test]
fn memory_is_kept_from_the_turn_on() {
    let mut bench = Bench::with(Some(8 << 20), LONG);
    bench.cache.snapshots().set_at_once(1);
    let (mut one, mut two) = (bench.source(), bench.source());
    let offer = |name: &str, bytes| {
        Script::from(1, &pb::SnapshotBegin { expected_bytes: bytes, ..begin(name) }).frames
    };
    bench.send(&mut one, &offer("one", 6 << 20));
    bench.send(&mut two, &offer("two", 6 << 20));
    assert_eq!(bench.place(&mut two, 1), 1);
    // What can never fit does not wait.
    let mut three = bench.source();
    bench.send(&mut three, &offer("three", 9 << 20));
    assert_eq!(code(&bench.failed(&mut three, 1)), FailCode::FailMemory);
    bench.send(&mut one, &abort(1));
    bench.room(&mut two, 1);
}

/// Begins with what a tree needs.
fn needing(stream: u32, name: &str, needs: pb::Needs) -> Vec<u8> {
    Script::from(stream, &pb::SnapshotBegin { needs: Some(needs), ..begin(name) }).frames
}

fn file(path: &std::path::Path, size: Option<u64>) -> pb::needs::File {
    let name = path.as_os_str().as_bytes().to_vec();
    let entry = images::RegFileEntry { name, size, ..Default::default() };
    pb::needs::File { entry: entry.encode_to_vec(), code: false, may_come: false }
}

#[test]
fn what_the_tree_needs_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let (there, gone) = (dir.path().join("there"), dir.path().join("gone"));
    std::fs::write(&there, b"four").unwrap();
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let needs = |files| pb::Needs { files, ..Default::default() };
    bench.send(&mut peer, &needing(1, "a", needs(vec![file(&there, Some(4)), file(&there, None)])));
    assert_eq!(bench.room(&mut peer, 1), pb::Room::default());
    let script = needing(2, "b", needs(vec![file(&there, Some(5)), file(&gone, None)]));
    bench.send(&mut peer, &script);
    if nix::unistd::geteuid().is_root() {
        let failed = bench.failed(&mut peer, 2);
        assert_eq!(code(&failed), FailCode::FailLacks);
        for part in ["snapshot b is not taken: ", "size is 4 bytes, but was 5", "gone: ENOENT"] {
            assert!(failed.text.contains(part), "{failed}");
        }
    }
    let come = pb::needs::File { may_come: true, ..file(&gone, None) };
    bench.send(&mut peer, &needing(3, "c", needs(vec![come])));
    let lacks = bench.room(&mut peer, 3).lacks;
    assert!(lacks.len() == 1 && lacks[0].contains("gone"), "{lacks:?}");
    // No more is said than can be read, whatever is asked.
    let many = (0..4000).map(|n| file(&dir.path().join(format!("f{n}")), None)).collect();
    let mut bytes = needs(many);
    bytes.files.truncate(600);
    bench.send(&mut peer, &needing(4, "d", bytes));
    if nix::unistd::geteuid().is_root() {
        let failed = bench.failed(&mut peer, 4);
        assert!(failed.text.len() < 1000 && failed.text.contains(" more"), "{failed}");
    }
    // A fifo is not opened, and what is no entry is not looked at.
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let odd = pb::needs::File { entry: vec![0xff; 9], code: true, may_come: false };
    bench.send(&mut peer, &needing(5, "e", needs(vec![odd, file(&fifo, Some(1))])));
    bench.room(&mut peer, 5);
}

#[test]
fn pids_and_processors_are_looked_at() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let pids = vec![std::process::id().cast_signed(), i32::MAX];
    // Those of the tree itself are free when that is gone.
    let needs = pb::Needs { pids: pids.clone(), pids_of: namespace_of_pids(), ..Default::default() };
    bench.send(&mut peer, &needing(1, "a", needs));
    assert_eq!(bench.room(&mut peer, 1), pb::Room::default());
    let needs = pb::Needs { pids, pids_of: "elsewhere".to_owned(), ..Default::default() };
    bench.send(&mut peer, &needing(2, "b", needs));
    let lacks = bench.room(&mut peer, 2).lacks;
    assert!(lacks.len() == 1 && lacks[0].contains("is taken by"), "{lacks:?}");
    let mut other = crate::cpuinfo::own();
    let own = other.encode_to_vec();
    other.x86_entry[0].capability[9] |= !0;
    for (stream, cpu, cpu_caps) in [(3, own, 7), (4, other.encode_to_vec(), 0), (5, other.encode_to_vec(), 2)]
    {
        bench.send(
            &mut peer,
            &needing(stream, &format!("c{stream}"), pb::Needs { cpu, cpu_caps, ..Default::default() }),
        );
        match stream {
            3 => assert_eq!(bench.room(&mut peer, stream), pb::Room::default()),
            4 => assert!(bench.room(&mut peer, stream).lacks[0].contains("lacks instructions")),
            _ => assert_eq!(code(&bench.failed(&mut peer, stream)), FailCode::FailLacks),
        }
    }
}
