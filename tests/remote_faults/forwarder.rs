//! Somebody between source and cache who hands on what he gets, until he is told not to.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicI32, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use crtool::remote::wire::{HEADER, Header, Kind, MAGIC};

use crate::hosts::{Host, Hosts};
use crate::tree::kill_dead;

/// What is done to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends before it.
    Before,
    /// The connection ends within its header.
    InHeader,
    /// The connection ends before its last byte (or, if it is a bare header, within that).
    BeforeEnd,
    /// The connection ends after it.
    After,
    /// One bit of it is another: this one of its header, or of its payload.
    Flip { bit: usize, header: bool },
    /// It stops there for so long.
    Stall(Duration),
    /// The process that is aimed at is killed, before or after it.
    Kill { after: bool },
    /// Each byte from here on for this many bytes goes in a packet of its own.
    Split(usize),
}

/// Which frame, since the spot was armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// The one before which so many have passed.
    Number(usize),
    /// The first of its kind.
    First(Kind),
}

/// Which frame, and what is done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// From the source, or from the cache.
    pub from_source: bool,
    pub frame: Frame,
    pub fault: Fault,
}

impl Frame {
    fn is(self, number: usize, kind: Kind) -> bool {
        match self {
            Self::Number(this) => this == number,
            Self::First(this) => this == kind,
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// What is to happen, and what has happened to a frame of which kind.
    spot: Mutex<(Option<Spot>, Option<Kind>)>,
    victim: AtomicI32,
    /// Frames since the last [`Forwarder::arm`], from the source and from the cache.
    frames: [AtomicUsize; 2],
}

#[derive(Debug)]
pub struct Forwarder {
    shared: Arc<Shared>,
    pub port: u16,
}

impl Forwarder {
    /// Listens on the host itself, for connections to `to`.
    pub fn start(hosts: &Hosts, on: Host, to: SocketAddr) -> Result<Self, String> {
        hosts.enter(on)?;
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| format!("listen: {e}"))?;
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        let shared: Arc<Shared> = Arc::default();
        let own = shared.clone();
        // It stays on the host where it is started.
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let own = own.clone();
                thread::spawn(move || {
                    // A cache that is not there: the source finds its connection closed.
                    if let Ok(cache) = TcpStream::connect_timeout(&to, Duration::from_secs(5)) {
                        connection(&own, source, cache);
                    }
                });
            }
        });
        hosts.leave()?;
        Ok(Self { shared, port })
    }

    /// The next fault; counts frames from here.
    pub fn arm(&self, spot: Option<Spot>) {
        *self.shared.spot.lock().expect("the spot") = (spot, None);
        self.shared.victim.store(0, Ordering::SeqCst);
        self.shared.frames.iter().for_each(|n| n.store(0, Ordering::SeqCst));
    }

    /// Frames since then, from the source and from the cache.
    pub fn frames(&self) -> (usize, usize) {
        let [source, cache] = &self.shared.frames;
        (source.load(Ordering::SeqCst), cache.load(Ordering::SeqCst))
    }

    /// What the frame was that the fault has happened to.
    pub fn hit(&self) -> Option<Kind> {
        self.shared.spot.lock().expect("the spot").1
    }

    /// Nothing happens from here on. What the frame was that the fault has happened to.
    pub fn disarm(&self) -> Option<Kind> {
        let mut spot = self.shared.spot.lock().expect("the spot");
        spot.0 = None;
        spot.1
    }

    /// Who is killed; the fault waits for this.
    pub fn aim_at(&self, pid: i32) {
        self.shared.victim.store(pid, Ordering::SeqCst);
    }
}

fn connection(shared: &Arc<Shared>, source: TcpStream, cache: TcpStream) {
    let (Ok(back_to), Ok(back_from)) = (source.try_clone(), cache.try_clone()) else { return };
    let own = shared.clone();
    let back = thread::spawn(move || {
        let _ = hand_on(&own, false, &back_from, &back_to);
        let _ = back_to.shutdown(Shutdown::Both);
        let _ = back_from.shutdown(Shutdown::Both);
    });
    let _ = hand_on(shared, true, &source, &cache);
    let _ = source.shutdown(Shutdown::Both);
    let _ = cache.shutdown(Shutdown::Both);
    let _ = back.join();
}

/// Hands frames on until the end, or until the fault that ends the connection.
fn hand_on(shared: &Shared, from_source: bool, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let _ = to.set_nodelay(true);
    let mut magic = [0; MAGIC.len()];
    from.read_exact(&mut magic)?;
    to.write_all(&magic)?;
    loop {
        let mut frame = vec![0; HEADER];
        from.read_exact(&mut frame)?;
        let header = frame.as_slice().try_into().ok().and_then(|bytes| Header::decode(bytes).ok());
        let Some(header) = header else { return Ok(()) };
        frame.resize(HEADER + header.len as usize, 0);
        from.read_exact(&mut frame[HEADER..])?;
        let number = shared.frames[usize::from(!from_source)].fetch_add(1, Ordering::SeqCst);
        let fault = {
            let mut spot = shared.spot.lock().expect("the spot");
            let here =
                spot.0.is_some_and(|s| s.from_source == from_source && s.frame.is(number, header.kind));
            let fault = if here { spot.0.take().map(|s| s.fault) } else { None };
            spot.1 = fault.map(|_| header.kind).or(spot.1);
            fault
        };
        let end = frame.len();
        let upto = match fault {
            Some(Fault::Before) => Some(0),
            Some(Fault::InHeader) => Some(HEADER / 2),
            Some(Fault::BeforeEnd) => Some(end - 1),
            Some(Fault::After) => Some(end),
            Some(Fault::Flip { bit, header }) => {
                let part = if header || end == HEADER { &mut frame[..HEADER] } else { &mut frame[HEADER..] };
                let bit = bit % (part.len() * 8);
                part[bit / 8] ^= 1 << (bit % 8);
                None
            }
            Some(Fault::Kill { after }) => {
                if after {
                    to.write_all(&frame)?;
                    frame.clear();
                }
                let pid = loop {
                    match shared.victim.load(Ordering::SeqCst) {
                        0 => thread::sleep(Duration::from_micros(200)),
                        pid => break pid,
                    }
                };
                // Only when it is dead goes what is left of the frame on its way.
                kill_dead(pid);
                None
            }
            Some(Fault::Stall(time)) => {
                thread::sleep(time);
                None
            }
            Some(Fault::Split(bytes)) => {
                let whole = bytes.min(end);
                for byte in &frame[..whole] {
                    to.write_all(&[*byte])?;
                }
                frame.drain(..whole);
                None
            }
            None => None,
        };
        match upto {
            Some(upto) => {
                to.write_all(&frame[..upto])?;
                return Ok(());
            }
            None => to.write_all(&frame)?,
        }
    }
}
