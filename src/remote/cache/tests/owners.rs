//! What belongs to one source, and others who know its name and its number.

use super::*;
use crate::remote::journal::Journal;

const OWNER: &str = "CN=src,O=Example";
const OTHER: &str = "CN=other,O=Example";

/// What a source and a restore have done to snapshot "a", and what still belongs to that.
struct Held {
    bench: Bench,
    /// Which journal the cache keeps, and where.
    journal: (u64, tempfile::TempDir),
    owner: Option<Peer>,
    _restore: Option<(Command, Option<Root>)>,
}

/// All states in which a snapshot can be that has come whole.
fn held(state: State, linked: bool) -> Held {
    let mut bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    let identity = journal.identity();
    bench.cache.snapshots().keep_journal(journal);
    let mut owner = bench.source_at(OWNER);
    let restore = match state {
        State::Armed => {
            let (restore, root) = armed(&mut bench, &mut owner, "a");
            Some((restore, Some(root)))
        }
        _ => {
            bench.prepare(&mut owner, small(1, "a"));
            if !matches!(state, State::Prepared | State::InDoubt) {
                bench.send(&mut owner, &confirm(1));
            }
            match state {
                State::Restoring => Some((bench.take("a"), None)),
                State::Starting | State::Restored => {
                    let (restore, root) = (bench.take("a"), Root::new());
                    starting(&mut bench, &restore, &root);
                    if state == State::Restored {
                        bench.done(&restore, ran(root.pid()));
                        bench.restored(&mut owner, 1);
                    }
                    Some((restore, Some(root)))
                }
                _ => None,
            }
        }
    };
    let owner = linked.then_some(owner);
    bench
        .until("the end of a connection", |bench| (bench.cache.lines() == usize::from(linked)).then_some(()));
    bench.wait_state("a", state);
    if state == State::Armed && !linked {
        // Later than here where another test makes a process at this moment, which has the other end for a while.
        bench.until("the end of the connection", |bench| {
            bench.info("a").text.contains("is gone").then_some(())
        });
    }
    Held { bench, journal: (identity, dir), owner, _restore: restore }
}

const STATES: [(State, bool); 9] = [
    (State::Prepared, true),
    (State::InDoubt, false),
    (State::Ready, true),
    (State::Ready, false),
    (State::Restoring, true),
    (State::Armed, true),
    (State::Armed, false),
    (State::Starting, false),
    (State::Restored, false),
];

/// Neither the last word, nor the question, nor the connection.
#[test]
fn what_another_source_says_of_it_counts_for_nothing() {
    for (state, linked) in STATES {
        for verdict in [yes(), no(), go_again()] {
            let Held { mut bench, journal, owner, _restore } = held(state, linked);
            let before = bench.info("a");
            let mut other = bench.source_at(OTHER);
            // Who says which journal is meant would be told of a tree that is not here that it was never let go.
            let verdict = Some(verdict);
            let said = pb::Resume {
                name: "a".to_owned(),
                id: drawn("a"),
                verdict: verdict.clone(),
                journal: journal.0,
            };
            bench.send(&mut other, &wire::frame(Kind::Resume, 1, 0, &said));
            let failed = bench.failed(&mut other, 1);
            assert_eq!(code(&failed), FailCode::FailNotFound, "{state:?} {verdict:?}");
            // As if it were not here.
            let wanted = format!("the cache knows no snapshot a of that dump that {OTHER} has brought");
            assert_eq!(failed.text, wanted);
            bench.no_frame(&mut other);
            // Nor on a stream of the number that it had.
            for last in [confirm(1), abort(1), go(1)] {
                let mut other = bench.source_at(OTHER);
                bench.send(&mut other, &last);
                assert_eq!(code(&bench.failed(&mut other, 0)), FailCode::FailProtocol);
            }
            assert_eq!(bench.info("a"), before, "{state:?} {verdict:?}");
            let Some(mut owner) = owner else { continue };
            // It is still told to where it was told.
            match state {
                State::Prepared => {
                    bench.send(&mut owner, &confirm(1));
                    assert_eq!(bench.state("a"), State::Ready);
                }
                State::Armed => {
                    bench.send(&mut owner, &go(1));
                    assert_eq!(bench.state("a"), State::Starting);
                }
                _ => {
                    let operator = bench.command();
                    bench.done(&operator, drop_it("a", true));
                    assert!(!bench.restored(&mut owner, 1).ok);
                }
            }
        }
    }
}

/// The same words of its own source do count, over any connection.
#[test]
fn what_its_own_source_says_counts() {
    for (state, linked) in STATES {
        let Held { mut bench, owner: _owner, _restore, journal: _journal } = held(state, linked);
        let mut again = bench.source_at(OWNER);
        bench.send(&mut again, &resume(1, "a", drawn("a"), no()));
        let failed = !matches!(state, State::Starting | State::Restored);
        let wanted = if failed { State::Failed } else { state };
        assert_eq!(bench.state("a"), wanted, "{state:?}");
    }
}

#[test]
fn nobody_else_replaces_it_or_builds_on_it() {
    for (state, linked) in STATES {
        let Held { mut bench, owner: _owner, _restore, journal: _journal } = held(state, linked);
        let before = bench.info("a");
        let mut other = bench.source_at(OTHER);
        bench.send(&mut other, &small(1, "a").frames);
        if state == State::Restored {
            // The name is free.
            bench.no_frame(&mut other);
            continue;
        }
        let failed = bench.failed(&mut other, 1);
        assert_eq!(code(&failed), FailCode::FailExists);
        // Nothing about what became of it.
        let wanted = format!("the cache has a snapshot a of {OWNER}, and only that source can replace it");
        assert!(failed.text.starts_with(&wanted) && !failed.text.contains("counter"), "{failed}");
        let child = pb::SnapshotBegin { parent: "a".to_owned(), ..begin("b") };
        bench.send(&mut other, &Script::from(2, &child).frames);
        assert_eq!(code(&bench.failed(&mut other, 2)), FailCode::FailParent, "{state:?}");
        assert_eq!(bench.info("a"), before);
    }
}

#[test]
fn none_comes_twice() {
    for ended in [false, true] {
        let mut bench = Bench::new();
        let mut owner = bench.source_at(OWNER);
        let frames = small(1, "a").commit();
        bench.send(&mut owner, &frames);
        bench.prepared(&mut owner, 1);
        if ended {
            bench.send(&mut owner, &confirm(1));
            let restore = bench.take("a");
            bench.done(&restore, ran(1));
            bench.restored(&mut owner, 1);
        } else {
            bench.send(&mut owner, &abort(1));
        }
        let before = bench.info("a");
        // Recorded, and sent again.
        for origin in [OWNER, OTHER] {
            let mut again = bench.source_at(origin);
            bench.send(&mut again, &[&frames[..], &confirm(1)].concat());
            let failed = bench.failed(&mut again, 1);
            assert_eq!(code(&failed), FailCode::FailExists);
            assert!(failed.text.contains("it has been here already, and none comes twice"), "{failed}");
            bench.run();
            assert_eq!(bench.info("a"), before);
        }
        let mut owner = bench.source_at(OWNER);
        bench.bring(&mut owner, small(2, "a"));
    }
}

#[test]
fn the_next_cache_answers_the_same_source_and_knows_what_has_come() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new();
    bench.cache.snapshots().keep_journal(Journal::open(dir.path()).unwrap());
    let mut owner = bench.source_at(OWNER);
    let (restore, root) = armed(&mut bench, &mut owner, "a");
    bench.send(&mut owner, &go(1));
    assert_eq!(bench.answer(&restore).0, local_reply::What::Done(pb::Empty {}));
    bench.done(&restore, ran(root.pid()));
    assert!(bench.restored(&mut owner, 1).ok);
    drop(bench);

    let mut bench = Bench::new();
    let journal = Journal::open(dir.path()).unwrap();
    let identity = journal.identity();
    bench.cache.snapshots().keep_journal(journal);
    let says = |verdict, origin: &str, bench: &mut Bench| {
        let mut peer = bench.source_at(origin);
        let verdict = Some(verdict);
        let resume = pb::Resume { name: "a".to_owned(), id: drawn("a"), verdict, journal: identity };
        bench.send(&mut peer, &wire::frame(Kind::Resume, 1, 0, &resume));
        peer
    };
    let mut other = says(go_again(), OTHER, &mut bench);
    assert_eq!(code(&bench.failed(&mut other, 1)), FailCode::FailNotFound);
    // Too late to have it back, too.
    let mut late = says(no(), OWNER, &mut bench);
    assert!(bench.restored(&mut late, 1).ok);
    let mut again = says(go_again(), OWNER, &mut bench);
    assert!(bench.restored(&mut again, 1).ok);
    let replayed = pb::SnapshotBegin { id: drawn("a"), ..begin("b") };
    bench.send(&mut again, &Script::from(2, &replayed).frames);
    assert_eq!(code(&bench.failed(&mut again, 2)), FailCode::FailExists);
}
