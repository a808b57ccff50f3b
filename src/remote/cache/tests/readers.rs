//! Restores that read in every order, and those who do not ask as they should.

use nix::fcntl::{FallocateFlags, fallocate};

use super::*;

#[test]
fn asked_for_before_anything_arrives() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let restore = bench.command();
    restore.say(get_within("a", 600_000));
    bench.no_answer(&restore);
    let script = small(1, "a");
    bench.send(&mut peer, &script.frames);
    bench.no_answer(&restore);
    let commit = pb::Commit { images: script.images };
    bench.send(&mut peer, &wire::frame(Kind::Commit, 1, 0, &commit));
    bench.prepared(&mut peer, 1);
    bench.no_answer(&restore);
    bench.send(&mut peer, &confirm(1));
    assert!(matches!(bench.answer(&restore).0, local_reply::What::Snapshot(_)));
}

#[test]
fn what_is_not_there_is_told_with_what_is() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let restore = bench.command();
    assert!(bench.refused(&restore, get("a")).text.contains("the cache is empty"));
    bench.bring(&mut peer, small(1, "b"));
    bench.send(&mut peer, &small(2, "a").frames);
    bench.send(&mut peer, &abort(2));
    let refused = bench.refused(&restore, get_within("a", 20));
    assert_eq!(code(&refused), FailCode::FailNotFound);
    for part in ["no snapshot a has come in 0.02 s", "failed (changed its mind)", "there is b (ready)"] {
        assert!(refused.text.contains(part), "{refused}");
    }
    assert_eq!(code(&bench.refused(&restore, get("\n"))), FailCode::FailName);
}

#[test]
fn a_waiting_restore_hears_of_the_end_and_goes_on() {
    for early in [false, true] {
        let mut bench = Bench::new();
        let restores = [bench.command(), bench.command()];
        for restore in &restores {
            let get = pb::Get { name: "a".to_owned(), wait_ms: 600_000, early, ..Default::default() };
            restore.say(local_request::What::Get(get));
        }
        // Before it is described, of which nobody gets anything.
        for end in 0..3 {
            let mut peer = bench.source();
            bench.send(&mut peer, &Script::new(1, "a").image("core-1.img", b"core").frames);
            match end {
                0 => drop(peer),
                1 => bench.send(&mut peer, &abort(1)),
                _ => bench.send(&mut peer, &confirm(1)),
            }
            for restore in &restores {
                let (local_reply::What::Passed(failed), _) = bench.answer(restore) else { panic!() };
                assert!(failed.text.contains("snapshot a failed"), "{}", failed.text);
            }
        }
        let mut peer = bench.source();
        bench.bring(&mut peer, small(1, "a"));
        assert!(matches!(bench.answer(&restores[0]).0, local_reply::What::Snapshot(_)));
        assert!(matches!(bench.answer(&restores[1]).0, local_reply::What::Failed(_)), "there is one only");
    }
}

/// However many come to nothing: its own time is up, and it takes no memory.
#[test]
fn a_restore_that_waits_in_vain_waits_no_longer_than_it_said() {
    let mut bench = Bench::new();
    let restore = bench.command();
    restore.say(get_within("a", 300));
    let begun = Instant::now();
    let mut passed = 0;
    let refused = loop {
        let mut peer = bench.source();
        for stream in 0..10 {
            bench.send(&mut peer, &[small(stream, "a").frames, abort(stream)].concat());
        }
        match restore.next() {
            Some((local_reply::What::Passed(_), _)) => passed += 1,
            Some((local_reply::What::Failed(failed), _)) => break failed,
            other => assert!(other.is_none() && begun.elapsed() < PATIENCE, "{other:?}"),
        }
    };
    assert!(passed > 0 && begun.elapsed() >= Duration::from_millis(300));
    assert!(refused.text.contains("no snapshot a has come in 0.3 s"), "{}", refused.text);
}

/// Who wants one and no other does not wait for others of its name, and gets none of them.
#[test]
fn a_restore_of_one_snapshot_is_for_that_one() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.prepare(&mut peer, small(1, "a"));
    bench.send(&mut peer, &survive(1));
    let older = drawn("a");
    bench.send(&mut peer, &run_first(2, "a").frames);
    let get = |id| local_request::What::Get(pb::Get { name: "a".to_owned(), id, ..Default::default() });
    let (of_older, of_newer) = (bench.command(), bench.command());
    of_newer.say(get(drawn("a")));
    bench.no_answer(&of_newer);
    let (local_reply::What::Snapshot(info), _) = bench.ask(&of_older, get(older)) else { panic!() };
    assert_eq!(info.id, older);
    bench.send(&mut peer, &abort(2));
    assert!(matches!(bench.answer(&of_newer).0, local_reply::What::Failed(_)));
}

#[test]
fn a_waiting_restore_hears_of_one_that_came_and_went_at_once() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    // What failed before it asked is no answer to it.
    bench.send(&mut peer, &[small(1, "a").frames, abort(1)].concat());
    let restore = bench.command();
    restore.say(get_within("a", 600_000));
    bench.no_answer(&restore);
    bench.send(&mut peer, &[small(2, "b").frames, abort(2)].concat());
    bench.no_answer(&restore);
    let both = [small(3, "a").frames, abort(3)].concat();
    std::io::Write::write_all(&mut peer.socket, &both).unwrap();
    let (local_reply::What::Passed(failed), _) = bench.answer(&restore) else { panic!() };
    assert_eq!(failed.text, "snapshot a failed: changed its mind");
}

#[test]
fn two_restores_at_once() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let (first, second) = (bench.command(), bench.command());
    first.say(get_within("a", 600_000));
    second.say(get_within("a", 600_000));
    bench.bring(&mut peer, small(1, "a"));
    assert!(matches!(bench.answer(&first).0, local_reply::What::Snapshot(_)));
    let (local_reply::What::Failed(failed), _) = bench.answer(&second) else { panic!() };
    assert_eq!(failed.code(), FailCode::FailBusy);
    assert!(failed.text.contains(&format!("pid {}", std::process::id())), "{}", failed.text);
    // One has one snapshot at a time, and only what it has is read.
    bench.bring(&mut peer, small(2, "b"));
    assert_eq!(code(&bench.refused(&first, get("b"))), FailCode::FailProtocol);
    assert_eq!(code(&bench.refused(&second, read("inventory.img", 0))), FailCode::FailProtocol);
    // The first gives it back: the second can have it.
    drop(first);
    bench.wait_state("a", State::Ready);
    assert!(matches!(bench.ask(&second, get("a")).0, local_reply::What::Snapshot(_)));
}

#[test]
fn images_in_any_order_and_again() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let large = noise(200_000, 3);
    let script = Script::new(1, "s").image("a.img", b"aaa").image("b.img", &large).image("c.img", b"");
    bench.bring(&mut peer, script);
    let restore = bench.take("s");
    let mut a = bench.open(&restore, "a.img", 0);
    let mut one = [0; 1];
    a.read_exact(&mut one).unwrap();
    // B before the end of A, twice, from the middle, while A stays open.
    let b = bench.open(&restore, "b.img", 0);
    let again = bench.open(&restore, "b.img", 0);
    let mut middle = [0; 100];
    again.read_exact_at(&mut middle, 123_456).unwrap();
    assert_eq!(middle, large[123_456..123_556]);
    drop(again);
    assert!(contents(&b) == large);
    assert!(b.file().write_at(b"x", b.start()).is_err());
    assert_eq!(bench.read(&restore, "c.img"), b"");
    assert_eq!(bench.read(&restore, "a.img"), b"aaa");
    let refused = bench.refused(&restore, read("d.img", 0));
    assert_eq!(
        (code(&refused), refused.text.as_str()),
        (FailCode::FailNotFound, "snapshot s has no image d.img")
    );
    assert_eq!(code(&bench.refused(&restore, read("../a", 0))), FailCode::FailName);
    let mut rest = Vec::new();
    a.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"aa");
}

#[test]
fn lists_come_in_pages() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let mut script = Script::new(1, "s");
    let names: Vec<String> = (0..3000).map(|n| format!("image-with-a-long-name-{n:05}.img")).collect();
    for name in &names {
        script = script.image(name, name.as_bytes());
    }
    bench.bring(&mut peer, script.image("inventory.img", b"inventory"));
    let restore = bench.take("s");
    let (mut found, mut pages) = (Vec::new(), 0);
    loop {
        let after = found.last().cloned().unwrap_or_default();
        let list = pb::ListImages { after, generation: 0 };
        let (local_reply::What::Images(page), _) = bench.ask(&restore, local_request::What::ListImages(list))
        else {
            panic!()
        };
        found.extend(page.images.into_iter().map(|image| image.name));
        pages += 1;
        if !page.more {
            break;
        }
    }
    assert_eq!(found[..3000], names);
    assert!(pages > 1);
}

#[test]
fn read_while_it_arrives() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let begin = pb::SnapshotBegin { before_pages: "a.img".to_owned(), ..begin("s") };
    let mut script = Script::from(1, &begin);
    bench.send(&mut peer, &script.frames);
    script.frames.clear();
    let restore = bench.command();
    let get = pb::Get { name: "s".to_owned(), id: 0, wait_ms: 10_000, early: true };
    restore.say(local_request::What::Get(get));
    bench.no_answer(&restore);
    let mut script = script.image("a.img", b"first");
    bench.send(&mut peer, &script.frames);
    script.frames.clear();
    assert!(matches!(bench.answer(&restore).0, local_reply::What::Snapshot(_)));
    let other = bench.command();
    assert_eq!(code(&bench.refused(&other, get_early("s"))), FailCode::FailBusy);
    assert_eq!(bench.read(&restore, "a.img"), b"first");
    // One that has not begun, then has, then is there.
    restore.say(read("b.img", 0));
    bench.no_answer(&restore);
    let image = script.image_begin("b.img");
    let mut sum = Sum::default();
    script.part(image, &Part::Data(b"second"), &mut sum);
    bench.send(&mut peer, &script.frames);
    script.frames.clear();
    bench.no_answer(&restore);
    script.image_end(image, sum);
    bench.send(&mut peer, &script.frames);
    script.frames.clear();
    let (local_reply::What::Image(info), fds) = bench.answer(&restore) else { panic!() };
    assert_eq!((info.size, fds.len()), (6, 1));
    // One that never comes.
    restore.say(read("c.img", 0));
    bench.no_answer(&restore);
    bench.send(&mut peer, &script.commit());
    bench.prepared(&mut peer, 1);
    let (local_reply::What::Failed(failed), _) = bench.answer(&restore) else { panic!() };
    assert_eq!(failed.code(), FailCode::FailNotFound);
    // The tree must not run before the source has confirmed.
    let root = Root::new();
    let _decision = say_starting(&restore, &root);
    bench.no_answer(&restore);
    assert_eq!(bench.state("s"), State::Prepared);
    bench.send(&mut peer, &confirm(1));
    assert_eq!(bench.answer(&restore).0, local_reply::What::Done(pb::Empty {}));
    bench.done(&restore, ran(root.pid()));
    assert_eq!(bench.state("s"), State::Restored);
}

fn part(name: &str, least: u64) -> local_request::What {
    let read = pb::ReadImage { name: name.to_owned(), least, ..Default::default() };
    local_request::What::ReadImage(read)
}

#[test]
fn an_image_is_read_while_it_arrives() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let mut script = small(1, "s");
    bench.send(&mut peer, &script.frames);
    let restore = bench.command();
    bench.ask(&restore, get_early("s"));
    restore.say(part("pages-1.img", 200_000));
    bench.no_answer(&restore);
    let bytes = noise(300_000, 5);
    script.frames.clear();
    let image = script.image_begin("pages-1.img");
    let mut sum = Sum::default();
    let mut send = |bench: &mut Bench, script: &mut Script, parts: &[Part<'_>]| {
        parts.iter().for_each(|part| script.part(image, part, &mut sum));
        bench.send(&mut peer, &std::mem::take(&mut script.frames));
        sum
    };
    send(&mut bench, &mut script, &[Part::Data(&bytes[..150_000])]);
    bench.no_answer(&restore);
    // As much as asked for, and what more there is: also zeros at its end.
    send(&mut bench, &mut script, &[Part::Data(&bytes[150_000..]), Part::Zeros(100_000)]);
    let (local_reply::What::Image(info), mut fds) = bench.answer(&restore) else { panic!() };
    assert_eq!((info.size, info.complete), (400_000, false));
    let file = ImageFile::part(File::from(fds.pop().unwrap()), info.offset, info.size);
    let want = [&bytes[..], &[0; 100_000]].concat();
    assert!(contents(&file) == want);
    // A frame that has not come whole does not count.
    let mut sum = send(&mut bench, &mut script, &[]);
    script.part(image, &Part::Data(&bytes), &mut sum);
    let frame = std::mem::take(&mut script.frames);
    restore.say(part("pages-1.img", 400_001));
    bench.send(&mut peer, &frame[..frame.len() - 1]);
    bench.no_answer(&restore);
    bench.send(&mut peer, &frame[frame.len() - 1..]);
    let (local_reply::What::Image(info), _) = bench.answer(&restore) else { panic!() };
    assert_eq!((info.size, info.complete), (700_000, false));
    // More than it will ever have: answered when it is complete.
    restore.say(part("pages-1.img", 1 << 40));
    bench.no_answer(&restore);
    script.image_end(image, sum);
    bench.send(&mut peer, &std::mem::take(&mut script.frames));
    let (local_reply::What::Image(info), _) = bench.answer(&restore) else { panic!() };
    assert_eq!((info.size, info.complete), (700_000, true));
    // It can be let go when all have come and the source has confirmed, and hears of that.
    restore.say(get("s"));
    bench.no_answer(&restore);
    bench.send(&mut peer, &script.commit());
    bench.prepared(&mut peer, 1);
    bench.no_answer(&restore);
    bench.send(&mut peer, &confirm(1));
    assert!(matches!(bench.answer(&restore).0, local_reply::What::Snapshot(_)));
    assert_eq!(bench.state("s"), State::Restoring);
}

#[test]
fn what_was_read_while_it_arrived_may_never_be_complete() {
    let mut bench = Bench::new();
    for wrong in [true, false] {
        let mut peer = bench.source();
        let mut script = small(1, "s");
        let image = script.image_begin("pages-1.img");
        let mut sum = Sum::default();
        script.part(image, &Part::Data(&noise(100_000, 5)), &mut sum);
        bench.send(&mut peer, &script.frames);
        let restore = bench.command();
        bench.ask(&restore, get_early("s"));
        let (local_reply::What::Image(info), _) = bench.ask(&restore, part("pages-1.img", 1)) else {
            panic!()
        };
        assert!(!info.complete);
        restore.say(get("s"));
        bench.no_answer(&restore);
        let before = script.frames.len();
        if wrong {
            sum.crc ^= 1;
            script.image_end(image, sum);
            bench.send(&mut peer, &script.frames[before..]);
        } else {
            drop(peer);
        }
        let (local_reply::What::Passed(failed), _) = bench.answer(&restore) else { panic!() };
        let code = if wrong { FailCode::FailChecksum } else { FailCode::FailLost };
        assert_eq!(failed.code(), code);
        assert!(failed.text.starts_with("snapshot s failed: "), "{}", failed.text);
    }
}

#[test]
fn an_early_reader_hears_of_the_end() {
    let mut bench = Bench::new();
    for lost in [true, false] {
        let mut peer = bench.source();
        bench.send(&mut peer, &small(1, "s").frames);
        let restore = bench.command();
        bench.ask(&restore, get_early("s"));
        if lost {
            restore.say(read("b.img", 0));
            drop(peer);
            let (local_reply::What::Failed(failed), _) = bench.answer(&restore) else { panic!() };
            assert_eq!(failed.code(), FailCode::FailLost);
        } else {
            bench.send(&mut peer, &abort(1));
            assert_eq!(code(&bench.refused(&restore, read("b.img", 0))), FailCode::FailAborted);
        }
        let root = Root::new();
        let _decision = say_starting(&restore, &root);
        assert!(matches!(bench.answer(&restore).0, local_reply::What::Failed(_)));
    }
    // It leaves early: the snapshot goes on.
    let mut peer = bench.source();
    let script = small(1, "s");
    bench.send(&mut peer, &script.frames);
    let restore = bench.command();
    bench.ask(&restore, get_early("s"));
    drop(restore);
    bench.run();
    let commit = pb::Commit { images: script.images };
    bench.send(&mut peer, &wire::frame(Kind::Commit, 1, 0, &commit));
    bench.prepared(&mut peer, 1);
    bench.send(&mut peer, &confirm(1));
    assert_eq!(bench.state("s"), State::Ready);
}

fn consume(name: &str) -> local_request::What {
    let read = pb::ReadImage { name: name.to_owned(), consume: true, ..Default::default() };
    local_request::What::ReadImage(read)
}

#[test]
fn what_is_consumed_cannot_be_restored_again() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let large = noise(1 << 20, 3);
    let script = unnumbered(1, "s").image("pages-1.img", &large);
    bench.bring(&mut peer, script.clone());
    let restore = bench.take("s");
    let (local_reply::What::Image(info), mut fds) = bench.ask(&restore, consume("pages-1.img")) else {
        panic!()
    };
    let file = ImageFile::part(File::from(fds.pop().unwrap()), info.offset, info.size);
    assert!(contents(&file) == large);
    let before = bench.info("s").resident;
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.file(), how, i64::try_from(file.start()).unwrap(), 1 << 20).unwrap();
    assert_eq!(bench.info("s").resident, before - (1 << 20));
    drop(restore);
    let info = bench.wait_state("s", State::Failed);
    assert!(info.text.contains("--free-as-read"), "{}", info.text);
    let told = bench.restored(&mut peer, 1);
    assert!(!told.ok && told.text.contains("--free-as-read"), "{told:?}");

    // A small one is a copy; what was not taken is whole.
    bench.bring(&mut peer, script.clone());
    let restore = bench.take("s");
    let (local_reply::What::Image(_), mut fds) = bench.ask(&restore, consume("inventory.img")) else {
        panic!()
    };
    assert!(File::from(fds.pop().unwrap()).set_len(0).is_err());
    drop(restore);
    bench.wait_state("s", State::Ready);
    let restore = bench.take("s");
    assert_eq!(bench.read(&restore, "inventory.img"), b"inventory");
    bench.done(&restore, ran(1));

    // Before the source has confirmed nothing may be lost.
    bench.send(&mut peer, &script.frames);
    bench.restored(&mut peer, 1);
    let restore = bench.command();
    bench.ask(&restore, get_early("s"));
    let (local_reply::What::Image(_), mut fds) = bench.ask(&restore, consume("pages-1.img")) else {
        panic!()
    };
    let file = File::from(fds.pop().unwrap());
    assert!(fallocate(&file, how, 0, 1 << 20).is_err());
}

#[test]
fn silent_commands_are_limited_and_harm_nobody() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    bench.bring(&mut peer, small(1, "a"));
    let restore = bench.take("a");
    let silent: Vec<Command> = (0..300).map(|_| bench.command()).collect();
    bench.run();
    assert_eq!(silent.iter().filter(|command| command.is_closed()).count(), 300 - 256);
    // Who has asked for something once and stays is no better.
    for command in (0..300).map(|_| bench.command()).collect::<Vec<_>>() {
        if !command.is_closed() {
            bench.refused(&command, get_within("none", 0));
        }
    }
    assert_eq!(bench.read(&restore, "inventory.img"), b"inventory");
    drop(silent);
    bench.run();
    assert_eq!(bench.state("a"), State::Restoring);
}

#[test]
fn a_command_that_reads_nothing_is_not_read() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    for n in 0..200 {
        let begin = pb::SnapshotBegin { parent: String::new(), ..begin(&format!("{n}{}", "x".repeat(1000))) };
        bench.bring(&mut peer, Script::from(1, &begin).image("a.img", b"a"));
    }
    let deaf = bench.command();
    let mut asked = 0;
    loop {
        let request = pb::LocalRequest { what: Some(local_request::What::Status(pb::Empty {})) };
        match local::send(deaf.socket.as_fd(), &request, &[]) {
            Ok(()) => asked += 1,
            Err(e) => break assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        bench.run();
        assert!(asked < 10_000);
    }
    // Others are answered, and so is it when it reads; then in full.
    let (all, _) = bench.status();
    assert_eq!(all.len(), 200);
    let mut came = 0;
    for _ in 0..asked {
        loop {
            let (local_reply::What::Snapshots(page), _) = bench.answer(&deaf) else { panic!() };
            came += page.snapshots.len();
            if !page.more {
                break;
            }
        }
    }
    assert_eq!(came, 200 * asked);
}

#[test]
fn nonsense_is_answered() {
    let mut bench = Bench::new();
    for what in [
        local_request::What::Open(begin("x")),
        local_request::What::Guard(pb::Empty {}),
        local_request::What::WaitRestored(pb::WaitRestored::default()),
        ran(1),
        local_request::What::Starting(pb::Empty {}),
        local_request::What::ListImages(pb::ListImages::default()),
    ] {
        let command = bench.command();
        bench.refused(&command, what);
    }
    let command = bench.command();
    nix::unistd::write(&command.socket, &[0xff; 30]).unwrap();
    let (reply, _) = bench.answer(&command);
    assert!(matches!(reply, local_reply::What::Failed(_)));
    bench.run();
    assert!(command.is_closed());
    // No variant at all.
    let command = bench.command();
    local::send(command.socket.as_fd(), &pb::LocalRequest { what: None }, &[]).unwrap();
    bench.run();
    let next = command.next();
    assert!(next.is_none_or(|(reply, _)| matches!(reply, local_reply::What::Failed(_))));
}
