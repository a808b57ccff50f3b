//! A long way between two hosts, since there is no netem here: 50 ms in each direction, 100 Mbit/s, and one packet in a hundred is lost.
//!
//! A packet that is lost is one that TCP sends again: what comes after it waits for it for a round trip.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::hosts::{Host, Hosts};
use crate::kills::Victim;
use crate::run_first;
use crate::site::{Site, Way};

const DELAY: Duration = Duration::from_millis(50);
/// Bytes of a packet.
const PACKET: usize = 1448;
/// What each takes at 100 Mbit/s.
const SLOT: Duration = Duration::from_micros(116);
/// One in so many is lost.
const LOSS: u64 = 100;
/// Packets on their way in one direction.
const WINDOW: usize = 1024;

/// Listens on the host itself, for connections to `to`.
fn start(hosts: &Hosts, on: Host, to: SocketAddr) -> Result<u16, String> {
    hosts.enter(on)?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| format!("listen: {e}"))?;
    let port = listener.local_addr().map_err(|e| e.to_string())?.port();
    thread::spawn(move || {
        for (number, near) in listener.incoming().flatten().enumerate() {
            thread::spawn(move || {
                let Ok(far) = TcpStream::connect_timeout(&to, Duration::from_secs(5)) else { return };
                let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else { return };
                let back = thread::spawn(move || carry(far_too, near_too, number as u64 * 2 + 1));
                carry(near, far, number as u64 * 2);
                let _ = back.join();
            });
        }
    });
    hosts.leave()?;
    Ok(port)
}

fn carry(mut from: TcpStream, to: TcpStream, seed: u64) {
    let (packets, way) = mpsc::sync_channel::<(Instant, Vec<u8>)>(WINDOW);
    let mut end = to;
    let _ = end.set_nodelay(true);
    let arrives = thread::spawn(move || {
        for (when, packet) in way {
            thread::sleep(when.saturating_duration_since(Instant::now()));
            if end.write_all(&packet).is_err() {
                break;
            }
        }
        let _ = end.shutdown(Shutdown::Both);
    });
    let (mut state, mut free, mut last) = (seed | 1 << 40, Instant::now(), Instant::now());
    let mut packet = vec![0; PACKET];
    while let Ok(len @ 1..) = from.read(&mut packet) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        free = free.max(Instant::now()) + SLOT;
        let lost = (state >> 33).is_multiple_of(LOSS);
        last = last.max(free + DELAY + if lost { 2 * DELAY } else { Duration::ZERO });
        if packets.send((last, packet[..len].to_vec())).is_err() {
            break;
        }
    }
    drop(packets);
    let _ = arrives.join();
    let _ = from.shutdown(Shutdown::Both);
}

/// Migrations over it, of which each second one loses somebody.
pub fn far_apart(site: &mut Site) -> Result<(), String> {
    let at = |host: Host| SocketAddr::new(host.ipv4().parse().expect("an address"), 9996);
    let left = start(&site.hosts, Host::Left, at(Host::Right))?;
    let right = start(&site.hosts, Host::Right, at(Host::Left))?;
    site.detour = Some([left, right]);
    let begun = Instant::now();
    run_first::series(site, Way::Direct, Victim::Dump, 2)?;
    if begun.elapsed() < 20 * DELAY {
        return Err(format!("it was not far: {:?}", begun.elapsed()));
    }
    run_first::series(site, Way::Proxied, Victim::Proxy, 2)?;
    run_first::series(site, Way::Direct, Victim::Cache, 2)?;
    // The same with a dump that says first that its tree is gone.
    for way in [Way::Direct, Way::Proxied] {
        site.migrate(way, &format!("far {way:?}"))?;
    }
    Ok(())
}
