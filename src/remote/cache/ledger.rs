//! What all that comes over the network takes of this host, and how much of it one source may have.
//!
//! Everything a source can make the cache hold is counted here, in all and for each source: memory of images and of
//! what is announced, buffers of frames that have not come whole, snapshots (each has a descriptor), connections, and
//! records of what has ended. A source is a host by its address, or with TLS by the subject of its certificate. One of
//! them never gets all there is, so that others can still send. Commands of this host have descriptors of their own that
//! nothing here is given.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Who is behind a connection: an address, or the subject of a certificate.
pub(super) type Origin = Arc<str>;

/// The origin of what a command of this host brings. It has no quota: whoever may enter there may do worse.
pub(super) const HERE: &str = "this host";

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Bytes of images, held or announced.
    Memory,
    /// Bytes of frames that have not come whole, and of answers that are not read.
    Buffers,
    /// Snapshots that hold images.
    Snapshots,
    /// Connections that have said Hello.
    Connections,
    /// Records of snapshots that have ended.
    Records,
}

const KINDS: usize = 5;
/// Records of what has ended.
const RECORDS: u64 = 1000;
/// Most connections that have said Hello.
const CONNECTIONS: u64 = 1024;
/// Most connections that have not said Hello.
const STRANGERS: u64 = 256;
/// Bytes of buffers, at least and at most.
const BUFFERS: (u64, u64) = (8 << 20, 64 << 20);
/// What of the memory one source may have where nothing else is said: this of 4.
const SHARE: u64 = 3;

/// The most there may be of each, in all and from one source.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    all: [u64; KINDS],
    one: [u64; KINDS],
    strangers: u64,
}

impl Limits {
    /// For a cache that holds at most `memory` bytes of images, of one source at most `of_one`, and may have so many
    /// `descriptors`.
    pub fn new(memory: Option<u64>, of_one: Option<u64>, descriptors: u64) -> Self {
        let whole = memory.unwrap_or(u64::MAX);
        let share = memory.map_or(u64::MAX, |memory| (memory / 4).saturating_mul(SHARE));
        let (least, most) = BUFFERS;
        let buffers = (whole / 4).clamp(least, most);
        // Snapshots take two each. A quarter of all is for commands of this host.
        let (connections, snapshots) = (CONNECTIONS.min(descriptors / 8), descriptors / 4);
        Self {
            all: [whole, buffers, snapshots, connections, RECORDS],
            one: [
                of_one.unwrap_or(share),
                buffers / 2,
                snapshots - snapshots / 4,
                connections / 2,
                RECORDS / 2,
            ],
            strangers: STRANGERS.min(descriptors / 8),
        }
    }

    /// Connections that have not said who they are.
    pub(super) fn strangers(&self) -> usize {
        usize::try_from(self.strangers).unwrap_or(usize::MAX)
    }

    fn get(of: &[u64; KINDS], what: What) -> u64 {
        of.get(what as usize).copied().unwrap_or(0)
    }
}

/// Why there is no room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lack {
    what: What,
    wanted: u64,
    used: u64,
    limit: u64,
    /// It is the quota of this source that is used up.
    of: Option<Origin>,
}

/// Whole mebibytes, for people.
pub(super) fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, wanted, used, limit, of } = self;
        let (whose, option) = match of {
            Some(origin) => (format!("{origin} has"), "--max-per-source"),
            None => ("the cache holds".to_owned(), "--max-memory"),
        };
        match what {
            What::Memory => write!(
                f,
                "{} MiB more are wanted, and {whose} {} of {} MiB ({option}); restore or drop another snapshot",
                mib(*wanted),
                mib(*used),
                mib(*limit)
            ),
            What::Buffers => write!(f, "{whose} too many frames begun and not ended: {} MiB", mib(*used)),
            What::Snapshots => {
                write!(f, "{whose} {used} snapshots, and no more than {limit} are allowed (ulimit -n)")
            }
            What::Connections => {
                write!(f, "{whose} {used} connections, and no more than {limit} are allowed (ulimit -n)")
            }
            What::Records => write!(f, "{whose} {used} records"),
        }
    }
}

/// What is used.
#[derive(Debug)]
pub(super) struct Ledger {
    limits: Limits,
    all: [u64; KINDS],
    by_origin: HashMap<Origin, [u64; KINDS]>,
}

impl Ledger {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, all: [0; KINDS], by_origin: HashMap::new() }
    }

    /// How much is used in all.
    pub(super) fn used(&self, what: What) -> u64 {
        Limits::get(&self.all, what)
    }

    /// The most that may be.
    pub(super) fn most(&self, what: What) -> u64 {
        Limits::get(&self.limits.all, what)
    }

    fn used_by(&self, origin: &str, what: What) -> u64 {
        self.by_origin.get(origin).map_or(0, |used| Limits::get(used, what))
    }

    /// Whether `more` could be taken if nothing else were there.
    pub(super) fn could_ever(&self, origin: &Origin, what: What, more: u64) -> Result<(), Lack> {
        Self::new(self.limits).room(origin, what, more)
    }

    /// Whether `more` may be taken.
    pub(super) fn room(&self, origin: &Origin, what: What, more: u64) -> Result<(), Lack> {
        let lack = |used: u64, limit: u64, of| {
            let fits = used.checked_add(more).is_some_and(|after| after <= limit);
            if fits { Ok(()) } else { Err(Lack { what, wanted: more, used, limit, of }) }
        };
        lack(self.used(what), self.most(what), None)?;
        if &**origin == HERE {
            return Ok(());
        }
        let quota = Limits::get(&self.limits.one, what);
        lack(self.used_by(origin, what), quota, Some(origin.clone()))
    }

    /// Whether one source has more than its share.
    pub(super) fn is_over(&self, origin: &str, what: What) -> bool {
        self.used_by(origin, what) > Limits::get(&self.limits.one, what)
    }

    /// What `origin` uses of it is `after` and was `before`.
    pub(super) fn change(&mut self, origin: &Origin, what: What, before: u64, after: u64) {
        if before == after {
            return;
        }
        let count = |of: &mut [u64; KINDS]| {
            if let Some(used) = of.get_mut(what as usize) {
                *used = (*used + after).saturating_sub(before);
            }
        };
        count(&mut self.all);
        let theirs = self.by_origin.entry(origin.clone()).or_default();
        count(theirs);
        if *theirs == [0; KINDS] {
            self.by_origin.remove(origin);
        }
    }

    /// One more.
    pub(super) fn add(&mut self, origin: &Origin, what: What) {
        self.change(origin, what, 0, 1);
    }

    /// One less.
    pub(super) fn remove(&mut self, origin: &Origin, what: What) {
        self.change(origin, what, 1, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_leaves_room_for_others() {
        let mut ledger = Ledger::new(Limits::new(Some(100 << 20), None, 1000));
        let (one, other): (Origin, Origin) = ("192.0.2.1".into(), "192.0.2.2".into());
        assert_eq!(ledger.room(&one, What::Memory, 75 << 20), Ok(()));
        ledger.change(&one, What::Memory, 0, 70 << 20);
        let lack = ledger.room(&one, What::Memory, 6 << 20).unwrap_err().to_string();
        let wanted = "6 MiB more are wanted, and 192.0.2.1 has 70 of 75 MiB (--max-per-source)";
        assert!(lack.starts_with(wanted), "{lack}");
        assert_eq!(ledger.room(&other, What::Memory, 30 << 20), Ok(()));
        let lack = ledger.room(&other, What::Memory, 31 << 20).unwrap_err().to_string();
        assert!(lack.contains("the cache holds 70 of 100 MiB (--max-memory)"), "{lack}");
        assert_eq!(ledger.room(&HERE.into(), What::Memory, 30 << 20), Ok(()));
        ledger.change(&one, What::Memory, 70 << 20, 0);
        assert_eq!((ledger.used(What::Memory), ledger.by_origin.len()), (0, 0));
        assert!(ledger.room(&other, What::Memory, u64::MAX).is_err());
    }

    #[test]
    fn descriptors_are_left_for_commands_of_this_host() {
        for descriptors in [64, 256, 1024, 4096, 20_000, 1 << 20, 1 << 30] {
            let Limits { all, one, strangers } = Limits::new(None, None, descriptors);
            let [_, _, snapshots, connections, _] = all;
            let most = 2 * snapshots + connections + strangers;
            assert!(snapshots > 0 && strangers > 0 && most <= descriptors / 4 * 3, "{descriptors}: {all:?}");
            assert!(one[1..].iter().zip(&all[1..]).all(|(one, all)| one < all), "{one:?} {all:?}");
        }
    }
}
