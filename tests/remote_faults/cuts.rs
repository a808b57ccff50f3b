//! The connection breaks, stops, or brings something else than what was sent.

use std::{net::SocketAddr, time::Duration};

use crtool::remote::wire::Kind;

use crate::forwarder::{Fault, Forwarder, Frame, Spot};
use crate::hosts::Host;
use crate::kills::{Outcome, Plan, Victim, expect, settle};
use crate::reaper::End;
use crate::site::{PROXY, Site, Way};

/// A way between the hosts with a forwarder in each direction.
pub struct Road {
    forwarders: [Forwarder; 2],
    /// Frames of a migration without trouble, from the source and from the cache.
    frames: (usize, usize),
}

impl Road {
    pub fn open(site: &mut Site, way: Way) -> Result<Self, String> {
        let to = |host: Host| SocketAddr::new(host.ipv4().parse().expect("an address"), 9996);
        let start = |on: Host| Forwarder::start(&site.hosts, on, to(on.other()));
        let forwarders = [start(Host::Left)?, start(Host::Right)?];
        site.detour = Some([forwarders[0].port, forwarders[1].port]);
        site.start_tree(0)?;
        let mut road = Self { forwarders, frames: (0, 0) };
        for number in 0..2 {
            let from = site.at;
            road.at(from).arm(None);
            site.migrate(way, &format!("probe {number}"))?;
            road.frames = road.at(from).frames();
        }
        Ok(road)
    }

    pub fn at(&self, host: Host) -> &Forwarder {
        &self.forwarders[host as usize]
    }

    /// A migration with a fault on its way; the tree works in one place afterwards. Tells what frame was hit, if any.
    fn migrate(
        &self,
        site: &mut Site,
        way: Way,
        spot: Spot,
        name: &str,
        early: bool,
    ) -> Result<(Option<Kind>, Outcome), String> {
        let forwarder = self.at(site.at);
        if spot.frame == Frame::First(Kind::Hello) {
            // It is said when a proxy starts.
            site.stop(site.at, PROXY)?;
        }
        forwarder.arm(Some(spot));
        site.daemons(way)?;
        let waiting = if early { Some(site.begin_restore(name)?) } else { None };
        let dump = site.begin_dump(way, name)?.end()?;
        let plan = Plan { way, victim: Victim::Nobody, early };
        if !matches!(dump.end, End::Exited(0..=2)) {
            return Err(format!("the dump ended with {:?}: {}", dump.end, dump.said));
        }
        if dump.end != End::Exited(0) && dump.said.trim().lines().count() == 0 {
            return Err(format!("the dump does not say why it ended with {:?}", dump.end));
        }
        let outcome =
            settle(site, plan, name, waiting, dump.end).map_err(|e| format!("{e}\nthe dump: {dump:?}"))?;
        expect(outcome, dump.end)?;
        let hit = forwarder.hit();
        forwarder.arm(None);
        Ok((hit, outcome))
    }
}

/// What must have become of the tree, where that is certain.
fn certain(way: Way, spot: Spot, hit: Option<Kind>) -> Option<Outcome> {
    let cut = matches!(spot.fault, Fault::Before | Fault::InHeader | Fault::BeforeEnd);
    match hit {
        None => Some(Outcome::Moved),
        // A proxy may try to connect again before the first snapshot.
        Some(Kind::Hello) => None,
        Some(
            Kind::SnapshotBegin | Kind::Room | Kind::ImageBegin | Kind::Data | Kind::Zero | Kind::ImageEnd,
        ) => Some(Outcome::Stayed),
        Some(Kind::Commit) if cut => Some(Outcome::Stayed),
        Some(Kind::Commit) => None,
        // The source never hears that it can go on.
        Some(Kind::Prepared) if cut && way == Way::Direct => Some(Outcome::Stayed),
        Some(Kind::Confirm) if way == Way::Proxied => Some(Outcome::Moved),
        // Through a proxy they may be about an earlier snapshot.
        _ => None,
    }
}

/// One migration with a fault; whether it has happened.
fn one(road: &Road, site: &mut Site, way: Way, spot: Spot, name: &str, early: bool) -> Result<bool, String> {
    let (hit, outcome) =
        road.migrate(site, way, spot, name, early).map_err(|e| format!("{name}, {spot:?}: {e}"))?;
    match certain(way, spot, hit) {
        Some(must) if must != outcome => {
            Err(format!("{name}, {spot:?}, which was {hit:?}: the tree {outcome:?}"))
        }
        _ => Ok(hit.is_some()),
    }
}

const CUTS: [Fault; 4] = [Fault::Before, Fault::InHeader, Fault::BeforeEnd, Fault::After];

/// Kinds of frames of a migration; which come in any.
pub const KINDS: [(bool, Kind, bool); 12] = [
    (true, Kind::Hello, true),
    (true, Kind::SnapshotBegin, true),
    (true, Kind::ImageBegin, true),
    (true, Kind::Data, true),
    (true, Kind::Zero, false),
    (true, Kind::ImageEnd, true),
    (true, Kind::Commit, true),
    (true, Kind::Confirm, true),
    (false, Kind::Hello, true),
    (false, Kind::Room, true),
    (false, Kind::Prepared, true),
    (false, Kind::Restored, false),
];

/// The first frame of each kind, broken in each way.
pub fn kinds(site: &mut Site) -> Result<(), String> {
    for way in [Way::Proxied, Way::Direct] {
        let road = Road::open(site, way)?;
        let mut hits = 0;
        for (from_source, kind, always) in KINDS {
            for fault in CUTS {
                let name = format!("{way:?} {kind:?} {from_source} {fault:?}");
                let spot = Spot { from_source, frame: Frame::First(kind), fault };
                let hit = one(&road, site, way, spot, &name, false)?;
                hits += usize::from(hit);
                if always && !hit {
                    return Err(format!("{name}: there was none"));
                }
            }
        }
        println!("{way:?}: {hits} connections cut");
        site.finish()?;
    }
    Ok(())
}

pub fn random(site: &mut Site) -> Result<(), String> {
    at_random(site, Way::Proxied, 25, |site| CUTS[usize::try_from(site.random(4)).unwrap_or(0)])
}

pub fn random_direct(site: &mut Site) -> Result<(), String> {
    at_random(site, Way::Direct, 20, |site| CUTS[usize::try_from(site.random(4)).unwrap_or(0)])
}

/// Whatever bit is another on its way: the cache finds out.
pub fn flips(site: &mut Site) -> Result<(), String> {
    for way in [Way::Proxied, Way::Direct] {
        let road = Road::open(site, way)?;
        // The last word, with another checksum, as a Ping, and for a stream that has not begun: it is said again.
        for bit in [184, 2, 46] {
            let fault = Fault::Flip { bit, header: true };
            let spot = Spot { from_source: true, frame: Frame::First(Kind::Confirm), fault };
            let (hit, outcome) =
                road.migrate(site, way, spot, &format!("{way:?} last word {bit}"), bit == 2)?;
            if (hit, outcome) != (Some(Kind::Confirm), Outcome::Moved) {
                return Err(format!("{way:?}, bit {bit} of {hit:?}: the tree {outcome:?}"));
            }
        }
        site.finish()?;
    }
    at_random(site, Way::Proxied, 20, |site| Fault::Flip {
        bit: usize::try_from(site.random(1 << 20)).unwrap_or(0),
        header: site.random(2) == 0,
    })
}

fn at_random(
    site: &mut Site,
    way: Way,
    times: usize,
    fault: impl Fn(&mut Site) -> Fault,
) -> Result<(), String> {
    let road = Road::open(site, way)?;
    let (times, mut hits) = (Site::times(times), 0);
    for number in 0..times {
        let fault = fault(site);
        let frame = usize::try_from(site.random(road.frames.0 as u64)).unwrap_or(0);
        let spot = Spot { from_source: true, frame: Frame::Number(frame), fault };
        let name = format!("random {number}");
        hits += usize::from(one(&road, site, way, spot, &name, number % 2 == 1)?);
    }
    println!("{way:?}: {hits} faults in {times} migrations");
    Ok(())
}

/// Frames that come byte for byte are frames.
pub fn split(site: &mut Site) -> Result<(), String> {
    for way in [Way::Proxied, Way::Direct] {
        let road = Road::open(site, way)?;
        for number in 0..12 {
            let frame = usize::try_from(site.random(road.frames.0 as u64)).unwrap_or(0);
            let spot = Spot { from_source: true, frame: Frame::Number(frame), fault: Fault::Split(3000) };
            let (_, outcome) = road.migrate(site, way, spot, &format!("split {number}"), number % 2 == 1)?;
            if outcome != Outcome::Moved {
                return Err(format!("{spot:?}: a frame in pieces was not taken"));
            }
        }
        site.finish()?;
    }
    Ok(())
}

/// A pause that is shorter than the time-out is none; after a longer one everyone has given up, and says so.
pub fn stalls(site: &mut Site) -> Result<(), String> {
    let road = Road::open(site, Way::Proxied)?;
    for (number, seconds, outcome) in
        [(0, 2, Outcome::Moved), (1, 2, Outcome::Moved), (2, 40, Outcome::Stayed)]
    {
        let frame = Frame::Number(road.frames.0 / 2 + number);
        let spot = Spot { from_source: true, frame, fault: Fault::Stall(Duration::from_secs(seconds)) };
        let (_, became) = road.migrate(site, Way::Proxied, spot, &format!("stall {number}"), false)?;
        if became != outcome {
            return Err(format!("after a pause of {seconds} s the tree {became:?}"));
        }
    }
    Ok(())
}
