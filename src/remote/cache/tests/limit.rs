//! A cache at its limit.

use super::*;

const MIB: usize = 1 << 20;

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut bench = Bench::with(Some(4 * MIB as u64), LONG);
    let mut peer = bench.source();
    bench.send(&mut peer, &Script::new(1, "big").image("a.img", &noise(5 * MIB, 1)).frames);
    let failed = bench.failed(&mut peer, 1);
    assert_eq!(code(&failed), FailCode::FailMemory);
    let expected = "snapshot big does not fit: it has 4 MiB so far, the cache holds 4 of 4 MiB (--max-memory); \
                    restore or drop another snapshot";
    assert!(failed.text == expected || failed.text == expected.replace("has 4", "has 3"), "{failed}");
    assert_eq!(bench.info("big").resident, 0);
    // Zeros take nothing.
    let script = Script::new(2, "zeros").parts("a.img", &[Part::Zeros(100 * MIB as u64), Part::Data(b"x")]);
    bench.bring(&mut peer, script);
    assert!(bench.info("zeros").resident < 10_000);
}

#[test]
fn many_empty_images_take_something_too() {
    let mut bench = Bench::with(Some(MIB as u64), LONG);
    let mut peer = bench.source();
    let mut script = Script::new(1, "many");
    for n in 0..3000 {
        script = script.image(&format!("i{n}"), b"");
    }
    bench.send(&mut peer, &script.frames);
    assert_eq!(code(&bench.failed(&mut peer, 1)), FailCode::FailMemory);
}

/// A connection that waits for memory, and the snapshot that has it.
fn full(timeout: Duration) -> (Bench, Peer, Peer) {
    let mut bench = Bench::with(Some(8 * MIB as u64), timeout);
    let (mut first, mut second) = (bench.source(), bench.source());
    bench.bring(&mut first, Script::new(1, "first").image("a.img", &noise(5 * MIB, 1)));
    second.socket.set_nonblocking(true).unwrap();
    let script = Script::new(1, "second").image("a.img", &noise(5 * MIB, 2)).commit();
    // More than the sockets hold is not taken: the cache does not read.
    let mut left = &script[..];
    let mut stuck = 0;
    while stuck < 20 {
        match second.socket.write(left) {
            Ok(count) => left = &left[count..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => stuck += 1,
            Err(e) => panic!("{e}"),
        }
        bench.run();
        if left.is_empty() {
            break;
        }
    }
    assert!(!left.is_empty());
    assert_eq!(bench.state("second"), State::Receiving);
    second.came.clear();
    // The rest goes when there is room.
    let rest = left.to_vec();
    let mut socket = second.socket.try_clone().unwrap();
    socket.set_nonblocking(false).unwrap();
    std::thread::spawn(move || socket.write_all(&rest));
    (bench, first, second)
}

#[test]
fn a_source_waits_until_a_restore_has_made_room() {
    let (mut bench, _first, mut second) = full(LONG);
    let restore = bench.take("first");
    bench.done(&restore, ran(1));
    bench.until("the second", |bench| (bench.state("second") == State::Prepared).then_some(()));
    second.socket.set_nonblocking(true).unwrap();
    bench.prepared(&mut second, 1);
    bench.send(&mut second, &confirm(1));
    let restore = bench.take("second");
    assert!(bench.read(&restore, "a.img") == noise(5 * MIB, 2));
}

#[test]
fn room_is_made_as_a_restore_reads() {
    let (mut bench, _first, _second) = full(LONG);
    let restore = bench.take("first");
    let read = pb::ReadImage { name: "a.img".to_owned(), consume: true, ..Default::default() };
    let (local_reply::What::Image(info), mut fds) = bench.ask(&restore, local_request::What::ReadImage(read))
    else {
        panic!()
    };
    let file = fds.pop().unwrap();
    let how =
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&file, how, i64::try_from(info.offset).unwrap(), 5 * MIB as i64).unwrap();
    bench.until("the second", |bench| (bench.state("second") == State::Prepared).then_some(()));
}

#[test]
fn a_source_waits_no_longer_than_the_time_out() {
    let (mut bench, _first, mut second) = full(Duration::from_secs(3));
    second.socket.set_nonblocking(true).unwrap();
    let mut pings = 0;
    let failed = loop {
        let (header, payload) = bench.frame(&mut second);
        match header.kind {
            Kind::Ping => pings += 1,
            _ => break failure(&header, &payload).unwrap(),
        }
    };
    assert_eq!(code(&failed), FailCode::FailMemory);
    assert!(failed.text.contains("snapshot second does not fit"), "{failed}");
    // It was told that it is not forgotten.
    assert!(pings >= 1);
    assert_eq!(bench.info("second").resident, 0);
    assert_eq!(bench.state("first"), State::Ready);
}

#[test]
fn a_source_that_dies_as_it_waits() {
    let (mut bench, _first, second) = full(LONG);
    second.socket.shutdown(std::net::Shutdown::Both).unwrap();
    drop(second);
    let info = bench.wait_state("second", State::Failed);
    assert_eq!(info.resident, 0);
    assert_eq!(bench.state("first"), State::Ready);
}
