//! A cache at its limit.

use nix::fcntl::{FallocateFlags, fallocate};

use super::*;

const MIB: usize = 1 << 20;

fn announced(stream: u32, name: &str, bytes: usize) -> Script {
    Script::from(stream, &pb::SnapshotBegin { expected_bytes: bytes as u64, ..begin(name) })
}

#[test]
fn what_does_not_fit_fails_at_once() {
    let mut bench = Bench::with(Some(4 * MIB as u64), LONG);
    let mut peer = bench.source();
    bench.send(&mut peer, &Script::new(1, "big").image("a.img", &noise(5 * MIB, 1)).frames);
    let failed = bench.failed(&mut peer, 1);
    assert_eq!(code(&failed), FailCode::FailMemory);
    let expected = "snapshot big does not fit: it has 4 MiB so far; 1 MiB more are wanted, and the cache holds 4 of 4 \
                    MiB (--max-memory); restore or drop another snapshot";
    assert!(failed.text == expected || failed.text == expected.replace("has 4", "has 3"), "{failed}");
    assert_eq!(bench.info("big").resident, 0);
    // Zeros take nothing.
    let script = Script::new(2, "zeros").parts("a.img", &[Part::Zeros(100 * MIB as u64), Part::Data(b"x")]);
    bench.bring(&mut peer, script);
    assert!(bench.info("zeros").resident < 20_000);
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

/// The last word of one tree comes through whatever another on the same connection sends.
#[test]
fn one_that_does_not_fit_is_in_nobodys_way() {
    let mut bench = Bench::with(Some(8 * MIB as u64), LONG);
    let mut peer = bench.source();
    bench.prepare(&mut peer, Script::new(1, "first").image("a.img", &noise(5 * MIB, 1)));
    let second = Script::new(2, "second").image("a.img", &noise(5 * MIB, 2)).commit();
    bench.send(&mut peer, &[second, confirm(1)].concat());
    assert_eq!(code(&bench.failed(&mut peer, 2)), FailCode::FailMemory);
    assert_eq!((bench.state("first"), bench.state("second")), (State::Ready, State::Failed));
    // When there is room it is taken.
    let restore = bench.take("first");
    bench.done(&restore, ran(1));
    bench.restored(&mut peer, 1);
    bench.bring(&mut peer, Script::new(3, "second").image("a.img", &noise(5 * MIB, 2)));
}

/// Two trees that do not fit together: one of them is taken, and the other hears it before it has sent anything.
#[test]
fn what_is_announced_is_kept_or_refused() {
    let mut bench = Bench::with(Some(8 * MIB as u64), LONG);
    let (mut one, mut two) = (bench.source(), bench.source());
    let first = announced(1, "first", 5 * MIB);
    bench.send(&mut one, &first.frames);
    let second = announced(1, "second", 4 * MIB).image("a.img", &noise(4 * MIB, 2)).commit();
    bench.send(&mut two, &second);
    let failed = bench.failed(&mut two, 1);
    assert_eq!(code(&failed), FailCode::FailMemory);
    let wanted =
        "snapshot second is not taken: 4 MiB more are wanted, and the cache holds 6 of 8 MiB (--max-memory)";
    assert!(failed.text.contains(wanted), "{failed}");
    // Nor does what was not announced take what was kept for another.
    bench.send(&mut two, &Script::new(2, "third").image("a.img", &noise(4 * MIB, 3)).frames);
    assert_eq!(code(&bench.failed(&mut two, 2)), FailCode::FailMemory);
    // What was kept and not needed is for others once all is there.
    let whole = first.clone().image("a.img", &noise(3 * MIB, 1)).commit();
    bench.send(&mut one, &whole[first.frames.len()..]);
    bench.prepared(&mut one, 1);
    bench.bring(&mut two, announced(3, "second", 4 * MIB).image("a.img", &noise(4 * MIB, 2)));
    // And what was kept for one that does not come.
    for end in [abort(4), Script::new(4, "again").frames] {
        bench.send(&mut two, &announced(4, "fourth", MIB / 2).frames);
        bench.send(&mut two, &end);
        bench.until("its end", |bench| (bench.state("fourth") == State::Failed).then_some(()));
        two.came.clear();
    }
    assert_eq!(code(&bench.lacking(8 * MIB)), FailCode::FailMemory);
}

impl Bench {
    /// What a source hears that announces so much.
    fn lacking(&mut self, bytes: usize) -> Failure {
        let mut peer = self.source();
        self.send(&mut peer, &announced(1, "lacking", bytes).frames);
        self.failed(&mut peer, 1)
    }
}

#[test]
fn announcements_without_a_limit_keep_nothing() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.send(&mut peer, &announced(1, "a", usize::MAX).frames);
    bench.bring(&mut peer, announced(2, "b", usize::MAX).image("a.img", b"a"));
}

#[test]
fn room_is_made_as_a_restore_reads() {
    let mut bench = Bench::with(Some(8 * MIB as u64), LONG);
    let mut peer = bench.source();
    bench.bring(&mut peer, Script::new(1, "first").image("a.img", &noise(5 * MIB, 1)));
    let restore = bench.take("first");
    let read = pb::ReadImage { name: "a.img".to_owned(), consume: true, ..Default::default() };
    let (reply, mut fds) = bench.ask(&restore, local_request::What::ReadImage(read));
    let local_reply::What::Image(info) = reply else { panic!("{reply:?}") };
    let file = fds.pop().unwrap();
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, how, i64::try_from(info.offset).unwrap(), 5 * MIB as i64).unwrap();
    bench.bring(&mut peer, Script::new(2, "second").image("a.img", &noise(5 * MIB, 2)));
}
