//! All that can happen, tried: two hosts, a net that loses, doubles, delays and reorders, and everybody killed at every step.

use std::collections::{HashSet, VecDeque};

use super::*;

/// Frames that have been sent; any of them may arrive at any time, any number of times, or never.
type Sent = u16;

/// What the destination's journal says of the tree: it outlives the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Journal {
    Nothing,
    Going,
    Running,
    Fell,
}

/// The tree at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Here {
    Frozen,
    /// By a group stop: whoever froze it is dead.
    Stopped,
    Runs,
    Dead,
}

/// The restore and its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum There {
    Nobody,
    /// Makes it.
    Making,
    /// Asked whether to let it run.
    Asked,
    /// Was told so.
    Told,
    /// The tree runs; the restore has yet to say so.
    Runs,
    /// The restore died, nothing runs.
    Died,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    run_first: bool,
    /// `None`: whoever hands it over was killed.
    source: Option<Source>,
    /// The images are complete at the destination, as the source knows.
    prepared: bool,
    here: Here,
    /// `None`: no cache, or one that has never heard of it.
    held: Option<Held>,
    cache: bool,
    journal: Journal,
    there: There,
    /// Trees that run there whose restores are over.
    left: u8,
    to_cache: Sent,
    to_source: Sent,
    released: bool,
}

const COMPLETE: Sent = 1;
const CONFIRM: Sent = 2;
const GO: Sent = 4;
const ABORT: Sent = 8;

const PREPARED: Sent = 1;
const ARMED: Sent = 2;
const RESTORED: Sent = 4;
const FELL: Sent = 8;
const FAILED: Sent = 16;
const NEVER: Sent = 32;

fn arriving(run_first: bool) -> Held {
    let state = State::Receiving;
    Held { state, run_first, taken: false, linked: true, confirmed: false, started: false, freed: false }
}

impl World {
    fn new(run_first: bool) -> Self {
        Self {
            run_first,
            source: Some(Source::Sending),
            prepared: false,
            here: Here::Frozen,
            held: Some(arriving(run_first)),
            cache: true,
            journal: Journal::Nothing,
            there: There::Nobody,
            left: 0,
            to_cache: COMPLETE,
            to_source: 0,
            released: false,
        }
    }

    /// The cache takes an event in.
    fn happens(mut self, event: Event) -> Self {
        let Some(held) = self.held else { return self };
        let next = held.after(event);
        if next.held.state == State::Starting && held.state != State::Starting {
            self.journal = Journal::Going;
        }
        if next.held.state == State::Restored {
            self.journal = Journal::Running;
        }
        if next.say == Some(Say::Fell) && held.started {
            self.journal = Journal::Fell;
        }
        self.held = Some(next.held);
        self.to_source |= match next.say {
            Some(Say::Prepared) => PREPARED,
            Some(Say::Armed) => ARMED,
            Some(Say::Restored) => RESTORED,
            Some(Say::Fell) => FELL,
            Some(Say::Failed) => FAILED,
            Some(Say::Ended) | None => 0,
        };
        self
    }

    /// The source takes something in.
    fn hears(mut self, heard: Heard) -> Self {
        let Some(source) = self.source else { return self };
        let next = source.after(heard);
        match (source, next) {
            (Source::Sending, Source::Going) => self.to_cache |= GO,
            (_, Source::Over) => self.here = Here::Dead,
            (Source::Sending | Source::Going, Source::Back) => {
                self.here = Here::Runs;
                self.to_cache |= ABORT;
            }
            _ => {}
        }
        self.source = Some(next);
        self
    }

    /// Everything that may happen next.
    fn steps(self) -> Vec<Self> {
        let mut all = Vec::new();
        self.of_the_source(&mut all);
        self.of_the_cache(&mut all);
        self.of_the_restore(&mut all);
        all
    }

    fn of_the_source(self, all: &mut Vec<Self>) {
        if let Some(source) = self.source {
            for (bit, heard) in [
                (ARMED, Heard::Armed),
                (RESTORED, Heard::Restored),
                (FELL, Heard::Fell),
                (FAILED, Heard::Fell),
                (NEVER, Heard::Fell),
            ] {
                if self.run_first && self.to_source & bit != 0 {
                    all.push(self.hears(heard));
                }
            }
            if self.to_source & PREPARED != 0 {
                all.push(Self { prepared: true, ..self });
            }
            if !self.run_first && source == Source::Sending {
                if self.prepared {
                    // The kill and the word of it are two steps: who dies in between has said nothing.
                    let dead = Self { here: Here::Dead, ..self };
                    all.push(Self { source: None, ..dead });
                    all.push(Self { source: Some(Source::Over), to_cache: self.to_cache | CONFIRM, ..dead });
                }
                if self.to_source & FAILED != 0 {
                    all.push(self.hears(Heard::Fell));
                }
            }
            all.push(self.hears(Heard::GivenUp));
            // It is killed.
            let here = match (self.here, source) {
                (Here::Frozen, Source::Going) => Here::Stopped,
                (Here::Frozen, _) => Here::Runs,
                (here, _) => here,
            };
            all.push(Self { source: None, here, ..self });
        } else {
            // The journal of the source says what it said last: somebody else asks on.
            if self.here == Here::Stopped {
                all.push(Self { source: Some(Source::Going), here: Here::Frozen, ..self });
            }
            // A proxy has seen the tree dead, or alive.
            if !self.run_first && self.prepared {
                let word = if self.here == Here::Dead { CONFIRM } else { ABORT };
                all.push(Self { to_cache: self.to_cache | word, ..self });
            }
        }
    }

    fn of_the_cache(self, all: &mut Vec<Self>) {
        if !self.cache {
            // It is started again.
            all.push(Self { cache: true, ..self });
            return;
        }
        if self.held.is_some() {
            for (bit, event) in [
                (COMPLETE, Event::Complete),
                (CONFIRM, Event::Confirm),
                (GO, Event::Go),
                (ABORT, Event::Abort),
            ] {
                if self.to_cache & bit != 0 {
                    all.push(self.happens(event));
                }
            }
            all.push(self.happens(Event::Lost));
            // Its images are no good; or the journal cannot be written, without which nothing is let go.
            if self.held.is_some_and(|held| matches!(held.state, State::Receiving | State::Armed)) {
                all.push(self.happens(Event::Spoiled));
            }
            // It ends, and the next one has what somebody has kept for it. A restore that waits hears no more of it.
            let there = if self.there == There::Asked { There::Died } else { self.there };
            all.push(Self { there, ..self.happens(Event::Restarted) });
            if self.held.is_some_and(|held| !held.linked) {
                all.push(self.happens(Event::Abandoned));
            }
            // Whoever releases it has looked at the source.
            if self.here == Here::Dead && self.there != There::Told && !self.runs_there() {
                all.push(Self { released: true, ..self.happens(Event::Release) });
            }
        } else if self.to_cache & GO != 0 {
            // What it knows of it stands in the journal.
            let said = match self.journal {
                Journal::Nothing => NEVER,
                Journal::Running => RESTORED,
                Journal::Fell => FELL,
                Journal::Going if self.runs_there() => RESTORED,
                // What became of it cannot be seen.
                Journal::Going => 0,
            };
            all.push(Self { to_source: self.to_source | said, ..self });
        }
        // Killed. With confirm first that is the end of the tree from when the source may have taken the cache's word on: it
        // is what run first is for.
        let runs = self.here == Here::Runs || self.runs_there();
        if self.run_first || runs || self.to_source & PREPARED == 0 {
            all.push(Self { cache: false, held: None, ..self });
        }
    }

    fn of_the_restore(self, all: &mut Vec<Self>) {
        match self.there {
            There::Nobody | There::Died => {
                // It may be read while it arrives.
                let held = self
                    .held
                    .filter(|held| matches!(held.state, State::Ready | State::Receiving | State::Prepared));
                if held.is_some_and(|held| !held.taken) {
                    all.push(Self { there: There::Making, ..self.happens(Event::Take) });
                }
            }
            There::Making => {
                let kept = Self { there: There::Died, ..self };
                all.push(kept.happens(Event::Undone));
                all.push(kept.happens(Event::Vanished));
                all.push(Self { there: There::Asked, ..self.happens(Event::Starting) });
            }
            There::Asked => {
                // Asked again, as the cache does when something has changed.
                all.push(self.happens(Event::Starting));
                match self.held {
                    Some(held) if held.may_run() => all.push(Self { there: There::Told, ..self }),
                    Some(held) if !held.is_live() || held.state == State::InDoubt => {
                        all.push(Self { there: There::Died, ..self }.happens(Event::Undone));
                    }
                    // The cache is gone: it goes on only if the source is known to be out of it.
                    None => all.push(Self { there: There::Died, ..self }),
                    _ => {}
                }
                let dead = Self { there: There::Died, ..self };
                all.push(dead.happens(Event::Undone));
                all.push(dead.happens(Event::Vanished));
            }
            There::Told => {
                all.push(Self { there: There::Runs, ..self });
                let dead = Self { there: There::Died, ..self };
                all.push(dead.happens(Event::Undone));
                all.push(dead.happens(Event::Vanished));
            }
            There::Runs => {
                let over = Self { there: There::Nobody, left: self.left + 1, ..self };
                all.push(over.happens(Event::Ran));
                // It dies with its word unsaid: the cache sees the tree, or does not know.
                all.push(over.happens(Event::Vanished));
            }
        }
        if self.left > 0 {
            // Seen later.
            all.push(self.happens(Event::Ran));
        }
    }

    fn runs_there(&self) -> bool {
        self.there == There::Runs || self.left > 0
    }

    /// What must hold.
    fn check(&self) -> Result<(), &'static str> {
        let here = self.here == Here::Runs;
        if here && self.runs_there() {
            return Err("it runs twice");
        }
        if self.left + u8::from(matches!(self.there, There::Runs | There::Told)) > 1 {
            return Err("it runs twice there");
        }
        if here && self.there == There::Told {
            return Err("it is about to run twice");
        }
        let kept_here = matches!(self.here, Here::Frozen | Here::Stopped);
        let kept_there = self.there == There::Told || self.held.is_some_and(|held| held.is_live());
        if !here && !self.runs_there() && !kept_here && !kept_there {
            return Err("it is lost");
        }
        // Whoever waits is told in RESTORING, and sees an end in what is over or in doubt.
        if self.held.is_some_and(|held| held.taken && held.state == State::Ready) {
            return Err("a restore has it and waits for ever");
        }
        Ok(())
    }
}

/// Tries everything; how many worlds there are, and in how many of them it ended well in either way.
fn explore(run_first: bool) -> (usize, usize, usize) {
    let first = World::new(run_first);
    let (mut seen, mut queue) = (HashSet::from([first]), VecDeque::from([vec![first]]));
    let (mut moved, mut stayed) = (0, 0);
    while let Some(path) = queue.pop_front() {
        let world = path[path.len() - 1];
        if let Err(what) = world.check() {
            let path: Vec<String> = path.iter().map(|world| format!("{world:?}")).collect();
            panic!("{what}:\n{}", path.join("\n"));
        }
        moved += usize::from(world.here == Here::Dead && world.runs_there());
        stayed += usize::from(world.here == Here::Runs);
        for next in world.steps() {
            if seen.insert(next) {
                let mut path = path.clone();
                path.push(next);
                queue.push_back(path);
            }
        }
    }
    (seen.len(), moved, stayed)
}

#[test]
fn the_tree_runs_once_and_is_never_lost() {
    for run_first in [false, true] {
        let (worlds, moved, stayed) = explore(run_first);
        println!("run first {run_first}: {worlds} worlds, moved in {moved}, stayed in {stayed}");
        assert!(moved > 10 && stayed > 10);
    }
}
