//! What becomes of snapshots.

use super::*;

#[test]
fn the_whole_way() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let pages = noise(3_000_000, 1);
    let zeros = vec![0; 5_000_000];
    let script = small(3, "a").parts(
        "pages-1.img",
        &[Part::Data(&pages), Part::Zeros(5_000_000), Part::Lz4(&zeros[..900_000]), Part::Data(b"end")],
    );
    bench.send(&mut peer, &script.clone().commit());
    let whole = [&pages[..], &zeros, &zeros[..900_000], b"end"].concat();
    let prepared = bench.prepared(&mut peer, 3);
    assert_eq!(prepared.bytes, 9 + whole.len() as u64);
    assert_eq!(bench.state("a"), State::Prepared);

    let restore = bench.command();
    restore.say(get("a"));
    bench.no_answer(&restore);
    bench.send(&mut peer, &confirm(3));
    let (local_reply::What::Snapshot(info), _) = bench.answer(&restore) else { panic!() };
    assert_eq!((info.pid, info.comm.as_str(), info.host.as_str()), (77, "counter", "there"));
    assert_eq!((info.images, info.bytes), (3, prepared.bytes));
    let list = pb::ListImages { after: String::new(), generation: 0 };
    let (local_reply::What::Images(images), _) = bench.ask(&restore, local_request::What::ListImages(list))
    else {
        panic!()
    };
    let names: Vec<_> = images.images.iter().map(|image| (image.name.as_str(), image.complete)).collect();
    assert_eq!(names, [("empty.img", true), ("inventory.img", true), ("pages-1.img", true)]);
    assert!(bench.read(&restore, "pages-1.img") == whole);
    assert_eq!(bench.read(&restore, "inventory.img"), b"inventory");
    assert_eq!(bench.read(&restore, "empty.img"), b"");
    assert!(bench.info("a").resident > 3_000_000);

    let root = Root::new();
    starting(&mut bench, &restore, &root);
    assert_eq!(bench.state("a"), State::Starting);
    bench.done(&restore, ran(root.pid()));
    let restored = bench.restored(&mut peer, 3);
    assert_eq!((restored.ok, restored.pid), (true, root.pid()));
    let info = bench.info("a");
    assert_eq!((info.state(), info.restored_pid, info.resident), (State::Restored, root.pid(), 0));
    assert_eq!((info.images, info.bytes), (3, prepared.bytes));
    assert!(!bench.cache.snapshots().has_live());
}

#[test]
fn finished_right_after_the_last_image() {
    let mut bench = Bench::new();
    for n in 0..300 {
        let mut peer = bench.source();
        let name = format!("s{n}");
        let body = noise(1000 + n * 331, n as u32);
        let script = Script::new(1, &name).image("a.img", &body).image("last.img", b"");
        bench.prepare(&mut peer, script);
        bench.send(&mut peer, &confirm(1));
        drop(peer);
        let restore = bench.take(&name);
        assert!(bench.read(&restore, "a.img") == body);
        bench.done(&restore, ran(1));
    }
}

#[test]
fn a_lost_connection_in_every_state() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let script = small(1, "a");
    bench.send(&mut peer, &script.frames);
    drop(peer);
    let info = bench.wait_state("a", State::Failed);
    assert!(info.text.contains("before all images had come"), "{}", info.text);
    assert_eq!(info.resident, 0);

    // In doubt: the tree is there and is not to be had.
    let mut peer = bench.source();
    bench.prepare(&mut peer, small(1, "a"));
    drop(peer);
    let info = bench.wait_state("a", State::InDoubt);
    assert!(info.resident > 0);
    let restore = bench.command();
    let refused = bench.refused(&restore, get("a"));
    assert_eq!(code(&refused), FailCode::FailInDoubt);
    assert!(refused.text.contains("image-cache drop a") && refused.text.contains("image-cache release a"));
    let mut second = bench.source();
    bench.send(&mut second, &small(1, "a").frames);
    assert_eq!(code(&bench.failed(&mut second, 1)), FailCode::FailExists);
    bench.done(&restore, release("a"));
    assert_eq!(bench.state("a"), State::Ready);
    bench.done(&restore, release("a"));

    // Ready: nothing happens to it.
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "b"));
    drop(peer);
    bench.run();
    assert_eq!(bench.state("b"), State::Ready);

    // Being restored: neither.
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "c"));
    let restore = bench.take("c");
    drop(peer);
    bench.run();
    assert_eq!(bench.read(&restore, "inventory.img"), b"inventory");
    bench.done(&restore, ran(5));
    assert_eq!(bench.state("c"), State::Restored);
}

#[test]
fn a_snapshot_in_doubt_can_be_dropped() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.prepare(&mut peer, small(1, "a"));
    drop(peer);
    bench.wait_state("a", State::InDoubt);
    let operator = bench.command();
    bench.done(&operator, drop_it("a", false));
    let info = bench.info("a");
    assert_eq!((info.state(), info.resident), (State::Dropped, 0));
    assert_eq!(code(&bench.refused(&operator, drop_it("a", false))), FailCode::FailNotFound);
    assert_eq!(code(&bench.refused(&operator, release("a"))), FailCode::FailNotFound);
}

#[test]
fn the_source_takes_it_back() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.send(&mut peer, &small(1, "a").frames);
    bench.send(&mut peer, &abort(1));
    assert_eq!(bench.state("a"), State::Failed);
    assert_eq!(bench.info("a").text, "changed its mind");
    // Also after it was complete; the number of a stream can be used again.
    bench.prepare(&mut peer, small(1, "a"));
    bench.send(&mut peer, &abort(1));
    assert_eq!(bench.state("a"), State::Failed);
    // Too late: it is ready.
    bench.bring(&mut peer, small(1, "a"));
    bench.send(&mut peer, &abort(1));
    assert_eq!(bench.state("a"), State::Ready);
}

#[test]
fn the_same_name_again() {
    let mut bench = Bench::new();
    let (mut first, mut second) = (bench.source(), bench.source());
    let mut exists = |bench: &mut Bench, what: &str| {
        bench.send(&mut second, &small(9, "a").frames);
        let failed = bench.failed(&mut second, 9);
        assert_eq!(code(&failed), FailCode::FailExists, "{what}");
        assert!(failed.text.contains(what), "{failed}");
    };
    let script = small(1, "a");
    bench.send(&mut first, &script.frames);
    exists(&mut bench, "arriving");
    let commit = pb::Commit { images: script.images };
    bench.send(&mut first, &wire::frame(Kind::Commit, 1, 0, &commit));
    bench.prepared(&mut first, 1);
    exists(&mut bench, "not yet confirmed");
    bench.send(&mut first, &confirm(1));
    exists(&mut bench, "ready");
    let restore = bench.take("a");
    exists(&mut bench, "being restored");
    let root = Root::new();
    starting(&mut bench, &restore, &root);
    exists(&mut bench, "starting");
    bench.done(&restore, ran(root.pid()));
    // What has ended blocks nothing.
    bench.bring(&mut second, small(10, "a"));
    assert_eq!(bench.state("a"), State::Ready);
}

#[test]
fn a_newer_one_replaces_what_its_source_survived() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.prepare(&mut peer, Script::new(1, "a").image("x.img", b"old"));
    bench.send(&mut peer, &survive(1));
    let newer = small(2, "a").image("x.img", b"new");
    bench.send(&mut peer, &newer.frames);
    // The old one is there as long as the new one is not.
    let restore = bench.take("a");
    assert_eq!(bench.read(&restore, "x.img"), b"old");
    drop(restore);
    bench.run();
    let commit = pb::Commit { images: newer.images };
    bench.send(&mut peer, &wire::frame(Kind::Commit, 2, 0, &commit));
    bench.prepared(&mut peer, 2);
    bench.send(&mut peer, &survive(2));
    let replaced = bench.restored(&mut peer, 1);
    assert!(!replaced.ok && replaced.text.contains("newer"), "{replaced:?}");
    let restore = bench.take("a");
    assert_eq!(bench.read(&restore, "x.img"), b"new");
    // An even newer one comes while that is being restored; the restore fails then.
    bench.send(&mut peer, &small(3, "a").frames);
    assert_eq!(code(&bench.failed(&mut peer, 3)), FailCode::FailExists);
}

#[test]
fn dropped_by_hand() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let operator = bench.command();
    // Arriving: the tree runs on at the source.
    bench.send(&mut peer, &small(1, "a").frames);
    bench.done(&operator, drop_it("a", false));
    assert_eq!(code(&bench.failed(&mut peer, 1)), FailCode::FailAborted);
    // Handed over just now.
    bench.prepare(&mut peer, small(2, "b"));
    assert_eq!(code(&bench.refused(&operator, drop_it("b", false))), FailCode::FailBusy);
    // All there is.
    bench.send(&mut peer, &confirm(2));
    let refused = bench.refused(&operator, drop_it("b", false));
    assert!(refused.text.contains("--force"), "{refused}");
    let restore = bench.take("b");
    assert_eq!(code(&bench.refused(&operator, drop_it("b", false))), FailCode::FailBusy);
    bench.done(&restore, give_up());
    bench.done(&operator, drop_it("b", true));
    let told = bench.restored(&mut peer, 2);
    assert_eq!((told.ok, told.text.as_str()), (false, "dropped by hand"));
    assert_eq!(bench.info("b").resident, 0);
    // The tree runs on at the source.
    bench.prepare(&mut peer, small(3, "c"));
    bench.send(&mut peer, &survive(3));
    bench.done(&operator, drop_it("c", false));
    assert_eq!(bench.state("c"), State::Dropped);
    assert!(!bench.restored(&mut peer, 3).ok);
    // A restore has it: its next request is told.
    bench.bring(&mut peer, small(4, "d"));
    let restore = bench.take("d");
    bench.done(&operator, drop_it("d", true));
    let refused = bench.refused(&restore, read("inventory.img", 0));
    assert_eq!(refused.text, "dropped by hand");
    assert_eq!(code(&bench.refused(&operator, drop_it("nothing", true))), FailCode::FailNotFound);
}

#[test]
fn a_restore_that_ends_early_gives_the_snapshot_back() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "a"));
    let restore = bench.take("a");
    bench.done(&restore, give_up());
    let info = bench.info("a");
    assert_eq!(info.state(), State::Ready);
    assert!(info.text.contains("no memory"), "{}", info.text);
    let restore = bench.take("a");
    drop(restore);
    bench.wait_state("a", State::Ready);
    let restore = bench.take("a");
    assert_eq!(bench.read(&restore, "inventory.img"), b"inventory");
    bench.no_frame(&mut peer);
}

/// A restore of another process than this one, which has said that it lets its tree go.
fn another(bench: &mut Bench, root: &Root) -> (Root, Command, Decision) {
    let process = Root::new();
    let restore = bench.command_of(process.pid());
    assert!(matches!(bench.ask(&restore, get("a")).0, local_reply::What::Snapshot(_)));
    let decision = starting(bench, &restore, root);
    (process, restore, decision)
}

/// It is known what became of the tree only when its restore can do no more, and never by how the root looks.
#[test]
fn a_restore_that_dies_before_it_lets_the_tree_go() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "a"));
    let mut root = Root::new();
    let (mut process, restore, _decision) = another(&mut bench, &root);
    drop(restore);
    bench.run();
    let other = bench.command();
    assert_eq!(code(&bench.refused(&other, get("a"))), FailCode::FailBusy);
    process.kill();
    // The root takes its time to die, as a large one does.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(bench.state("a"), State::Starting);
    root.kill();
    let info = bench.wait_state("a", State::Ready);
    assert!(info.text.contains("nobody of the tree has run"), "{}", info.text);
    bench.no_frame(&mut peer);
}

#[test]
fn a_restore_that_gives_up_has_ended_the_tree() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "a"));
    let root = Root::new();
    let (_process, restore, decision) = another(&mut bench, &root);
    decision.advance(Stage::Begun).unwrap();
    bench.done(&restore, give_up());
    assert_eq!(bench.state("a"), State::Ready);
}

/// What has run must not run again, whether it still runs, has ended by itself or was killed since.
#[test]
fn a_restore_that_dies_after_it_let_the_tree_go() {
    for end in [None, Some(0), Some(libc::SIGKILL)] {
        let mut bench = Bench::new();
        let mut peer = bench.source();
        bench.bring(&mut peer, small(1, "a"));
        let mut root = Root::of(if end == Some(0) { "true" } else { "exec sleep 1000" });
        let pid = root.pid();
        let (mut process, restore, decision) = another(&mut bench, &root);
        decision.advance(Stage::LetGo).unwrap();
        match end {
            Some(0) => drop(root.0.wait().unwrap()),
            Some(_) => root.kill(),
            None => {}
        }
        process.kill();
        drop(restore);
        let info = bench.wait_state("a", State::Restored);
        assert!(info.restored_pid == pid || end == Some(0), "{info:?}");
        assert!(bench.restored(&mut peer, 1).ok);
    }
}

#[test]
fn a_restore_that_dies_while_it_lets_the_tree_go() {
    for killed in [false, true] {
        let mut bench = Bench::new();
        let mut peer = bench.source();
        let begin = pb::SnapshotBegin { id: 9, ..begin("a") };
        bench.bring(&mut peer, Script::from(1, &begin).image("inventory.img", b"inventory"));
        let mut root = Root::new();
        let (mut process, restore, decision) = another(&mut bench, &root);
        decision.advance(Stage::Begun).unwrap();
        process.kill();
        if killed {
            decision.advance(Stage::Killed).unwrap();
            root.kill();
        }
        drop(restore);
        let info = bench.wait_state("a", State::InDoubt);
        assert!(info.text.contains("some of which may have run") && info.resident > 0, "{info:?}");
        // Nobody gets it, the list says what to look at, and the source knows nothing about it.
        let other = bench.command();
        let refused = bench.refused(&other, get("a"));
        assert_eq!(code(&refused), FailCode::FailInDoubt);
        assert!(refused.text.contains("runs on this host") && refused.text.contains("image-cache release a"));
        bench.send(&mut peer, &resume(2, "a", 9, yes()));
        bench.prepared(&mut peer, 2);
        assert_eq!(bench.state("a"), State::InDoubt);
        if killed {
            bench.done(&other, release("a"));
            let again = bench.take("a");
            assert_eq!(bench.read(&again, "inventory.img"), b"inventory");
        } else {
            bench.done(&other, drop_it("a", false));
            assert_eq!(bench.info("a").resident, 0);
        }
    }
}

#[test]
fn a_doubt_about_what_was_freed_as_it_was_read() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.bring(&mut peer, Script::new(1, "a").image("pages-1.img", &noise(1 << 20, 1)));
    let root = Root::new();
    let mut process = Root::new();
    let restore = bench.command_of(process.pid());
    assert!(matches!(bench.ask(&restore, get("a")).0, local_reply::What::Snapshot(_)));
    let consume = pb::ReadImage { name: "pages-1.img".to_owned(), consume: true, ..Default::default() };
    assert!(matches!(
        bench.ask(&restore, local_request::What::ReadImage(consume)).0,
        local_reply::What::Image(_)
    ));
    let decision = starting(&mut bench, &restore, &root);
    decision.advance(Stage::Begun).unwrap();
    process.kill();
    drop(restore);
    let info = bench.wait_state("a", State::Failed);
    assert!(info.text.contains("may have run") && info.text.contains("--free-as-read"), "{}", info.text);
}

#[test]
fn the_last_words_of_a_restore_count() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "a"));
    let restore = bench.take("a");
    let root = Root::new();
    let _decision = say_starting(&restore, &root);
    restore.say(ran(root.pid()));
    drop(restore);
    bench.wait_state("a", State::Restored);
    assert!(bench.restored(&mut peer, 1).ok);
}

#[test]
fn a_restore_must_show_its_root_and_what_it_decides() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "a"));
    let restore = bench.take("a");
    let root = Root::new();
    let decision = || Decision::new().unwrap().as_fd().try_clone_to_owned().unwrap();
    let (neither, _) = seqpacket();
    let wrong: [&[&OwnedFd]; 4] =
        [&[], &[&root.pidfd()], &[&neither, &decision()], &[&root.pidfd(), &neither]];
    for fds in wrong {
        restore.say_with(local_request::What::Starting(pb::Empty {}), fds);
        let local_reply::What::Failed(failed) = bench.answer(&restore).0 else { panic!("taken") };
        assert_eq!(failed.code(), FailCode::FailProtocol);
    }
    assert_eq!(bench.state("a"), State::Restoring);
    let decision = starting(&mut bench, &restore, &root);
    decision.advance(Stage::LetGo).unwrap();
}

#[test]
fn a_broken_connection_is_resumed() {
    let mut bench = Bench::new();
    let mut old = bench.source();
    bench.prepare(&mut old, small(1, "a"));
    // Another dump of that name, or one that never resumes, is another snapshot.
    let mut new = bench.source();
    for id in [0, 1] {
        bench.send(&mut new, &resume(5, "a", id, yes()));
        assert_eq!(code(&bench.failed(&mut new, 5)), FailCode::FailNotFound);
    }
    // The old connection is not yet known to be dead.
    bench.send(&mut new, &resume(5, "a", drawn("a"), yes()));
    bench.prepared(&mut new, 5);
    assert_eq!(bench.state("a"), State::Ready);
    bench.send(&mut old, &abort(1));
    assert_eq!(bench.state("a"), State::Ready);
    drop(old);
    bench.run();
    let restore = bench.take("a");
    bench.done(&restore, ran(9));
    assert!(bench.restored(&mut new, 5).ok);
    bench.send(&mut new, &resume(7, "a", drawn("a"), yes()));
    assert!(bench.restored(&mut new, 7).ok);

    // In doubt.
    for (verdict, state) in [(yes(), State::Ready), (no(), State::Failed)] {
        let mut old = bench.source();
        let name = format!("{state:?}");
        bench.prepare(&mut old, small(1, &name));
        drop(old);
        bench.wait_state(&name, State::InDoubt);
        bench.send(&mut new, &resume(8, &name, drawn(&name), verdict.clone()));
        if state == State::Ready {
            bench.prepared(&mut new, 8);
        } else {
            assert_eq!(code(&bench.failed(&mut new, 8)), FailCode::FailAborted);
        }
        assert_eq!(bench.state(&name), state);
    }
    // While it arrives there is nothing to resume.
    bench.send(&mut new, &small(9, "c").frames);
    bench.send(&mut new, &resume(10, "c", drawn("c"), yes()));
    assert_eq!(code(&bench.failed(&mut new, 10)), FailCode::FailProtocol);
    assert_eq!(bench.state("c"), State::Receiving);
}

/// Also what an operator released wrongly, and what a restore has, up to the moment in which it lets the tree go.
#[test]
fn the_source_takes_back_what_does_not_run_yet() {
    let mut bench = Bench::new();
    let mut new = bench.source();
    for (stream, taken) in [(1, false), (2, true)] {
        let mut old = bench.source();
        bench.prepare(&mut old, small(1, "a"));
        drop(old);
        bench.wait_state("a", State::InDoubt);
        let operator = bench.command();
        bench.done(&operator, release("a"));
        assert_eq!(bench.state("a"), State::Ready);
        let restore = taken.then(|| bench.take("a"));
        bench.send(&mut new, &resume(stream, "a", drawn("a"), no()));
        assert_eq!(code(&bench.failed(&mut new, stream)), FailCode::FailAborted);
        assert_eq!(bench.state("a"), State::Failed);
        if let Some(restore) = restore {
            let root = Root::new();
            say_starting(&restore, &root);
            let (local_reply::What::Failed(failed), _) = bench.answer(&restore) else { panic!() };
            assert_eq!(failed.code(), FailCode::FailAborted);
        }
    }
}

/// A source that ends its tree only after the restored one runs.
mod run_first {
    use super::*;

    fn fell(bench: &mut Bench, peer: &mut Peer, stream: u32) {
        let _: pb::Fell = bench.message(peer, Kind::Fell, stream);
    }

    #[test]
    fn it_runs_when_the_source_says_so() {
        let mut bench = Bench::new();
        let mut peer = bench.source();
        let (restore, root) = armed(&mut bench, &mut peer, "a");
        bench.send(&mut peer, &go(1));
        assert_eq!(bench.answer(&restore).0, local_reply::What::Done(pb::Empty {}));
        assert_eq!(bench.state("a"), State::Starting);
        // Whoever asks meanwhile hears of it later.
        let mut again = bench.source();
        bench.send(&mut again, &resume(2, "a", drawn("a"), go_again()));
        bench.no_frame(&mut again);
        bench.done(&restore, ran(root.pid()));
        assert!(bench.restored(&mut again, 2).ok);
        bench.send(&mut again, &resume(3, "a", drawn("a"), go_again()));
        assert!(bench.restored(&mut again, 3).ok);
        // Too late to have it back.
        bench.send(&mut again, &resume(4, "a", drawn("a"), no()));
        assert!(bench.restored(&mut again, 4).ok);
    }

    #[test]
    fn a_restore_that_fails_before_leaves_it_with_the_source() {
        let mut bench = Bench::new();
        for step in 0..3 {
            let mut peer = bench.source();
            let (restore, _root) = if step == 2 {
                let (restore, root) = armed(&mut bench, &mut peer, "a");
                (restore, Some(root))
            } else {
                bench.prepare(&mut peer, run_first(1, "a"));
                (bench.take("a"), None)
            };
            if step == 0 {
                bench.done(&restore, give_up());
            }
            drop(restore);
            assert_eq!(code(&bench.failed(&mut peer, 1)), FailCode::FailAborted);
            assert_eq!(bench.state("a"), State::Failed);
            // Said before that was heard.
            let mut again = bench.source();
            bench.send(&mut again, &resume(2, "a", drawn("a"), go_again()));
            fell(&mut bench, &mut again, 2);
        }
    }

    #[test]
    fn a_restore_that_fails_after_it_is_told_to_the_source() {
        let mut bench = Bench::new();
        let mut peer = bench.source();
        let (restore, mut root) = armed(&mut bench, &mut peer, "a");
        bench.send(&mut peer, &go(1));
        assert_eq!(bench.answer(&restore).0, local_reply::What::Done(pb::Empty {}));
        bench.done(&restore, give_up());
        root.kill();
        fell(&mut bench, &mut peer, 1);
        // Kept until the source says that it has the tree: it may be gone.
        assert_eq!(bench.state("a"), State::InDoubt);
        bench.send(&mut peer, &abort(1));
        assert_eq!(bench.state("a"), State::Failed);
    }

    #[test]
    fn a_source_that_is_gone_is_waited_for() {
        let mut bench = Bench::with(None, Duration::from_millis(300));
        let mut peer = bench.source();
        let (restore, root) = armed(&mut bench, &mut peer, "a");
        drop(peer);
        bench.run();
        assert_eq!(bench.state("a"), State::Armed);
        // It comes back.
        let mut again = bench.source();
        bench.send(&mut again, &resume(2, "a", drawn("a"), go_again()));
        assert_eq!(bench.answer(&restore).0, local_reply::What::Done(pb::Empty {}));
        bench.done(&restore, ran(root.pid()));
        assert!(bench.restored(&mut again, 2).ok);
        // It does not.
        let mut peer = bench.source();
        let (restore, _root) = armed(&mut bench, &mut peer, "b");
        drop(peer);
        let (local_reply::What::Failed(failed), _) = bench.answer(&restore) else { panic!() };
        assert_eq!(failed.code(), FailCode::FailInDoubt);
        assert_eq!(bench.state("b"), State::InDoubt);
        let mut again = bench.source();
        bench.send(&mut again, &resume(2, "b", drawn("b"), go_again()));
        fell(&mut bench, &mut again, 2);
        bench.send(&mut again, &resume(3, "b", drawn("b"), no()));
        assert_eq!(code(&bench.failed(&mut again, 3)), FailCode::FailAborted);
    }
}

#[test]
fn a_waiting_restore_outlives_the_doubt() {
    let mut bench = Bench::new();
    let mut old = bench.source();
    bench.prepare(&mut old, small(1, "a"));
    let restore = bench.command();
    restore.say(get_within("a", 1));
    bench.run();
    drop(old);
    bench.wait_state("a", State::InDoubt);
    bench.no_answer(&restore);
    let mut new = bench.source();
    bench.send(&mut new, &resume(1, "a", drawn("a"), yes()));
    assert!(matches!(bench.answer(&restore).0, local_reply::What::Snapshot(_)));

    let mut bench = Bench::with(None, Duration::from_millis(300));
    let mut old = bench.source();
    bench.prepare(&mut old, small(1, "a"));
    let restore = bench.command();
    restore.say(get_within("a", 1));
    bench.run();
    drop(old);
    let (local_reply::What::Failed(failed), _) = bench.answer(&restore) else { panic!() };
    assert_eq!(failed.code(), FailCode::FailInDoubt);
}

#[test]
fn the_history_is_short() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    for n in 0..1100 {
        bench.bring(&mut peer, small(1, &format!("s{n}")));
        let restore = bench.take(&format!("s{n}"));
        bench.done(&restore, ran(1));
        bench.restored(&mut peer, 1);
    }
    let (all, daemon) = bench.status();
    assert_eq!(all.len(), 1000);
    assert_eq!(all.last().unwrap().name, "s1099");
    assert!(daemon.contains(" 0 MiB in use"), "{daemon}");
}

#[test]
fn chains_of_parents() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let child = |name: &str, parent: &str| {
        let begin = pb::SnapshotBegin { parent: parent.to_owned(), ..begin(name) };
        Script::from(1, &begin).image("x.img", name.as_bytes()).image(&format!("only-{name}.img"), b"1")
    };
    bench.send(&mut peer, &child("b", "a").frames);
    assert_eq!(code(&bench.failed(&mut peer, 1)), FailCode::FailParent);
    for (name, parent) in [("a", ""), ("b", "a"), ("c", "b")] {
        bench.prepare(&mut peer, child(name, parent));
        let last = if name == "c" { confirm(1) } else { survive(1) };
        bench.send(&mut peer, &last);
    }
    let operator = bench.command();
    assert_eq!(code(&bench.refused(&operator, drop_it("a", true))), FailCode::FailParent);
    let restore = bench.take("c");
    // At random, again and again.
    for n in [2_u32, 0, 1, 1, 0, 2, 2, 0] {
        let name = ["c", "b", "a"][n as usize];
        assert_eq!(contents(&bench.open(&restore, "x.img", n)), name.as_bytes());
        let list = pb::ListImages { after: "only".to_owned(), generation: n };
        let (local_reply::What::Images(page), _) = bench.ask(&restore, local_request::What::ListImages(list))
        else {
            panic!()
        };
        let names: Vec<_> = page.images.iter().map(|image| image.name.clone()).collect();
        assert_eq!(names, [format!("only-{name}.img"), "x.img".to_owned()]);
    }
    let list = pb::ListImages { after: String::new(), generation: 3 };
    assert_eq!(code(&bench.refused(&restore, local_request::What::ListImages(list))), FailCode::FailNotFound);
    assert_eq!(code(&bench.refused(&restore, read("x.img", 3))), FailCode::FailNotFound);
    bench.done(&restore, ran(1));
    for name in ["a", "b", "c"] {
        assert_eq!(bench.info(name).resident, 0, "{name}");
    }
    assert_eq!((bench.state("a"), bench.state("b")), (State::Dropped, State::Dropped));
}

#[test]
fn a_parent_is_kept_for_its_child() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.prepare(&mut peer, small(1, "a"));
    bench.send(&mut peer, &survive(1));
    let begin = pb::SnapshotBegin { parent: "a".to_owned(), ..begin("b") };
    bench.bring(&mut peer, Script::from(2, &begin).image("x.img", b"x"));
    // The parent runs somewhere; its child can be restored all the same.
    let restore = bench.take("a");
    bench.done(&restore, ran(1));
    let info = bench.info("a");
    assert_eq!(info.state(), State::Restored);
    assert!(info.resident > 0);
    bench.restored(&mut peer, 1);
    let late = pb::SnapshotBegin { parent: "a".to_owned(), ..super::begin("c") };
    bench.send(&mut peer, &Script::from(3, &late).frames);
    assert_eq!(code(&bench.failed(&mut peer, 3)), FailCode::FailParent);
    let restore = bench.take("b");
    assert_eq!(contents(&bench.open(&restore, "inventory.img", 1)), b"inventory");
    bench.done(&restore, ran(2));
    assert!(bench.restored(&mut peer, 2).ok);
    assert_eq!(bench.info("a").resident, 0);
    // A child that fails leaves its parent as it was.
    bench.prepare(&mut peer, small(1, "d"));
    bench.send(&mut peer, &survive(1));
    let begin = pb::SnapshotBegin { parent: "d".to_owned(), ..super::begin("e") };
    bench.send(&mut peer, &Script::from(2, &begin).frames);
    bench.send(&mut peer, &abort(2));
    assert_eq!(bench.state("d"), State::Ready);
    let operator = bench.command();
    bench.done(&operator, drop_it("d", false));
}

#[test]
fn a_chain_outlives_the_cache_whatever_became_of_its_parent() {
    // The parent has gone to a restore, or its child has taken its name.
    for name in ["b", "a"] {
        let (mut bench, dir) = (Bench::new(), tempfile::tempdir().unwrap());
        let mut peer = bench.source();
        bench.prepare(&mut peer, Script::new(1, "a"));
        bench.send(&mut peer, &survive(1));
        let begin = pb::SnapshotBegin { parent: "a".to_owned(), ..begin(name) };
        bench.bring(&mut peer, Script::from(2, &begin));
        if name == "b" {
            let restore = bench.take("a");
            bench.done(&restore, ran(1));
        }
        assert_eq!(bench.cache.snapshots().spill(dir.path()), 0);
        let mut next = Bench::new();
        next.cache.adopt(Vec::new(), Some(dir.path()));
        assert_eq!(next.state(name), State::Ready);
        let restore = next.take(name);
        assert_eq!(contents(&next.open(&restore, "inventory.img", 1)), b"inventory", "{name}");
        next.done(&restore, ran(2));
        assert_eq!(next.cache.snapshots().used(), 0, "{name}");
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}

/// A file system in memory of this many KiB, for this thread alone; none without the right to mount one.
fn disk(at: &std::path::Path, kib: u32) -> bool {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    unshare(CloneFlags::CLONE_NEWNS).is_ok()
        && mount(None::<&str>, "/", None::<&str>, private, None::<&str>).is_ok()
        && mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), Some(&*format!("size={kib}k"))).is_ok()
}

#[test]
fn a_chain_that_does_not_fit_on_the_disk_stays_in_memory_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    if !disk(dir.path(), 256) {
        println!("skipped: no tmpfs can be mounted here");
        return;
    }
    let mut bench = Bench::new();
    let mut peer = bench.source();
    for (name, parent, kib) in [("a", "", 1), ("b", "a", 1), ("c", "b", 512), ("other", "", 1)] {
        let begin = pb::SnapshotBegin { parent: parent.to_owned(), ..begin(name) };
        let script = Script::from(1, &begin).image("pages-1.img", &noise(kib << 10, 1));
        bench.prepare(&mut peer, script);
        bench.send(&mut peer, &if ["a", "b"].contains(&name) { survive(1) } else { confirm(1) });
    }
    let snapshots = bench.cache.snapshots();
    assert_eq!((snapshots.at_risk(true), snapshots.spill(dir.path()), snapshots.at_risk(false)), (0, 1, 1));
    for (name, state) in
        [("a", State::Ready), ("b", State::Ready), ("c", State::Ready), ("other", State::Dropped)]
    {
        assert_eq!(bench.state(name), state, "{name}");
    }
    // Nothing else of it could run from there.
    let mut next = Bench::new();
    next.cache.adopt(Vec::new(), Some(dir.path()));
    let (all, _) = next.status();
    assert_eq!(all.iter().map(|info| &info.name[..]).collect::<Vec<_>>(), ["other"]);
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    let restore = bench.take("c");
    assert_eq!(contents(&bench.open(&restore, "pages-1.img", 2)), noise(1 << 10, 1));
    bench.done(&restore, ran(1));
    assert_eq!((bench.state("a"), bench.cache.snapshots().at_risk(false)), (State::Dropped, 0));
}

#[test]
fn a_damaged_last_word_ends_the_connection() {
    let mut bench = Bench::new();
    let word = confirm(1);
    let crc = word.len().min(wire::HEADER) - 1;
    // Another checksum; a Ping; for a stream that has not begun.
    for (name, byte, bit) in [("crc", crc, 0), ("kind", 0, 2), ("stream", 5, 6)] {
        let mut source = bench.source();
        bench.prepare(&mut source, Script::new(1, name));
        let mut word = word.clone();
        word[byte] ^= 1 << bit;
        bench.send(&mut source, &word);
        // It would prove that all before it was dealt with.
        bench.send(&mut source, &wire::bare(Kind::Ping, 0, 0, 0));
        bench.wait_state(name, State::InDoubt);
        while let Some((header, _)) = source.next() {
            assert_ne!(header.kind, Kind::Pong, "{name}");
        }
    }
}
