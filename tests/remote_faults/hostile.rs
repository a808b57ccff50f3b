//! Caches that speak the protocol and mean ill: whatever they send, and however little they read, a dump ends as it should, its
//! tree runs on, and neither dump nor proxy takes memory for it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use crtool::remote::{
    pb,
    wire::{self, HEADER, Header, Kind, MAGIC},
};
use nix::sys::signal::Signal;

use crate::cases::listen;
use crate::reaper::End;
use crate::site::{LIMIT, PROXY, Site, Tool, Way};

/// Time-out of tools and daemons.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How much is sent as fast as it is taken, in bytes.
const FLOOD: usize = 16 << 20;
/// What a process may take more of memory for that than one that comes as far without a flood, in KiB. To keep it all would take
/// more than it has bytes.
const MOST: u64 = 8 << 10;
/// What a machine under load may take longer than is said.
const SLACK: Duration = Duration::from_secs(15);

/// How much has been sent to the source.
static SENT: AtomicUsize = AtomicUsize::new(0);

/// Greets, and reads until a snapshot is offered; its stream.
fn offered(stream: &mut TcpStream) -> Option<u32> {
    stream.read_exact(&mut [0; MAGIC.len()]).ok()?;
    let timeout_ms = TIMEOUT.as_millis() as u32;
    let hello = pb::Hello { version: wire::VERSION, timeout_ms, ..Default::default() };
    stream.write_all(&[&MAGIC[..], &wire::frame(Kind::Hello, 0, 0, &hello)].concat()).ok()?;
    loop {
        let mut head = [0; HEADER];
        stream.read_exact(&mut head).ok()?;
        let header = Header::decode(&head).ok()?;
        stream.read_exact(&mut vec![0; header.len as usize]).ok()?;
        match header.kind {
            Kind::SnapshotBegin => return Some(header.stream),
            Kind::Ping => stream.write_all(&wire::bare(Kind::Pong, 0, 0, 0)).ok()?,
            _ => {}
        }
    }
}

/// Sends these for ever: at first as fast as they are taken, then so that the other side is never without.
fn flood(stream: &mut TcpStream, frames: &[u8]) {
    let mut sent = 0;
    while stream.write_all(frames).is_ok() {
        sent += frames.len();
        SENT.store(sent, Ordering::SeqCst);
        if sent > FLOOD {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Has everybody wait for a turn that never comes, and reads nothing.
fn queue(mut stream: TcpStream) {
    let Some(number) = offered(&mut stream) else { return };
    let frame = |place| wire::frame(Kind::Queue, number, 0, &pb::Queue { place, ..Default::default() });
    flood(&mut stream, &(1..500).flat_map(frame).collect::<Vec<u8>>());
}

/// The same, and falls silent after a while.
fn queue_and_stop(mut stream: TcpStream) {
    let Some(number) = offered(&mut stream) else { return };
    let frame = |place| wire::frame(Kind::Queue, number, 0, &pb::Queue { place, ..Default::default() });
    let _ = stream.write_all(&(1..500).flat_map(frame).collect::<Vec<u8>>());
    thread::sleep(LIMIT * 2);
}

/// Has room, and asks whether the source lives, again and again.
fn ping(mut stream: TcpStream) {
    let Some(number) = offered(&mut stream) else { return };
    let _ = stream.write_all(&wire::frame(Kind::Room, number, 0, &pb::Room::default()));
    flood(&mut stream, &wire::bare(Kind::Ping, 0, 0, 0).repeat(500));
}

/// The same, and falls silent at once.
fn room_and_stop(mut stream: TcpStream) {
    let Some(number) = offered(&mut stream) else { return };
    let _ = stream.write_all(&wire::frame(Kind::Room, number, 0, &pb::Room::default()));
    thread::sleep(LIMIT * 2);
}

/// The most memory that a process has had, in KiB.
fn peak(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok())
}

/// A dump to that port, one way or the other.
fn begin(site: &mut Site, way: Way, port: &str, name: &str) -> Result<Tool, String> {
    let (address, timeout) = (site.at.other().ipv4(), TIMEOUT.as_secs().to_string());
    let to = ["--address", address, "--port", port, "--timeout", &timeout];
    let root = site.root();
    let words = ["dump", "-t", &root, "--remote", "-D", name, "-v4", "-o", "dump.log"];
    if way == Way::Direct {
        return site.begin(site.at, &[&words[..], &to].concat());
    }
    site.stop(site.at, PROXY)?;
    site.daemon(site.at, PROXY, &to)?;
    site.begin(site.at, &[&words[..], &to[4..]].concat())
}

/// Lets a dump run until it was sent the flood, and on to its end, which is brought about by a signal if there is one; how long that
/// took. No memory is taken for it that was not taken without.
fn flooded(
    site: &mut Site,
    way: Way,
    port: &str,
    usual: [u64; 2],
    signal: Option<Signal>,
) -> Result<Duration, String> {
    SENT.store(0, Ordering::SeqCst);
    let tool = begin(site, way, port, "flooded")?;
    let (begun, mut peaks, mut told) = (Instant::now(), [0; 2], None);
    let ended = loop {
        let pids = [Some(tool.pid), site.pid_of(site.at, PROXY)];
        for (most, pid) in peaks.iter_mut().zip(pids) {
            *most = pid.and_then(peak).unwrap_or(0).max(*most);
        }
        if let Some(ended) = tool.end_within(Duration::from_millis(10)) {
            break ended;
        }
        if SENT.load(Ordering::SeqCst) > FLOOD
            && let (Some(signal), None) = (signal, told)
        {
            tool.signal(signal);
            told = Some(Instant::now());
        }
        if begun.elapsed() > LIMIT {
            return Err(format!("{way:?}: it does not end: {}", tool.said()));
        }
    };
    let took = told.unwrap_or(begun).elapsed();
    let sent = SENT.load(Ordering::SeqCst);
    println!("{way:?}: {sent} bytes sent, ended after {took:?}, KiB {peaks:?}, without {usual:?}");
    if ended.end == End::Exited(0) || ended.said.contains("panicked") || sent <= FLOOD {
        return Err(format!("{way:?}: {sent} bytes sent, {:?}: {}", ended.end, ended.said));
    }
    if peaks.iter().zip(usual).any(|(most, usual)| *most > usual + MOST) {
        return Err(format!("{way:?}: it takes {peaks:?} KiB, without a flood {usual:?}"));
    }
    site.works()?;
    Ok(took)
}

/// What dump and proxy take if nobody floods them, in KiB.
fn usual(site: &mut Site, way: Way, port: &str) -> Result<[u64; 2], String> {
    let tool = begin(site, way, port, "usual")?;
    let mut peaks = [0; 2];
    let begun = Instant::now();
    while tool.end_within(Duration::from_millis(5)).is_none() {
        for (most, pid) in peaks.iter_mut().zip([Some(tool.pid), site.pid_of(site.at, PROXY)]) {
            *most = pid.and_then(peak).unwrap_or(0).max(*most);
        }
    }
    let ended = tool.end()?.failed("")?;
    // It waits as long as the cache is there, which it looks for at least once in a time-out.
    if begun.elapsed() > TIMEOUT * 3 + SLACK {
        return Err(format!("{way:?}: {:?} after the cache fell silent: {}", begun.elapsed(), ended.said));
    }
    site.works()?;
    Ok(peaks)
}

/// It has the source wait for a turn that never comes.
pub fn queues(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    let to = site.at.other();
    let (endless, silent) = (listen(site, to, queue)?, listen(site, to, queue_and_stop)?);
    for way in [Way::Direct, Way::Proxied] {
        let usual = usual(site, way, &silent)?;
        // It waits as long as it is told to, with its tree running, and as long as nobody ends it.
        let took = flooded(site, way, &endless, usual, Some(Signal::SIGINT))?;
        if took > TIMEOUT * 3 + SLACK {
            return Err(format!("{way:?}: it ends {took:?} after SIGINT"));
        }
    }
    Ok(())
}

/// It asks without end whether the source lives, and reads nothing of what it is sent.
pub fn pings(site: &mut Site) -> Result<(), String> {
    // More than lies in sockets.
    site.start_tree(64)?;
    let to = site.at.other();
    let (endless, silent) = (listen(site, to, ping)?, listen(site, to, room_and_stop)?);
    // Directly it waits so long once, and not again to say that it gives up.
    for (way, limit) in [(Way::Direct, TIMEOUT * 6), (Way::Proxied, Duration::from_secs(30) + SLACK)] {
        let usual = usual(site, way, &silent)?;
        let took = flooded(site, way, &endless, usual, None)?;
        if took >= limit {
            return Err(format!("{way:?}: it ends after {took:?}"));
        }
    }
    Ok(())
}
