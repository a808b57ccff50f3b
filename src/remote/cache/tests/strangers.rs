//! Those who have not said who they are, with TLS and without: they have little time, and are never in the way of others.

use super::*;
use crate::remote::net::tls::tests::Ca;
use crate::remote::net::tls::{TlsClient, TlsServer};
use crate::remote::poll::Interest;

/// A cache that wants TLS, and somebody who has a certificate.
struct Guarded {
    server: TlsServer,
    client: TlsClient,
    _ca: Ca,
}

impl Guarded {
    fn new() -> Self {
        let ca = Ca::new();
        let server = TlsServer::new(&ca.member("dst", 2100, 1)).unwrap();
        let client = TlsClient::new(&ca.member("src", 2100, 2), Some("dst")).unwrap();
        Self { server, client, _ca: ca }
    }

    /// Somebody at `origin` connects, and says nothing.
    fn stranger(&self, bench: &mut Bench, origin: &str) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let stream = Stream::new(theirs.into(), "a test".to_owned(), LONG).unwrap().from(origin);
        bench.cache.add_source(stream.secured_server(&self.server).unwrap()).unwrap();
        ours
    }

    /// Who has a certificate, and has said nothing.
    fn member(&self, bench: &mut Bench, origin: &str) -> Stream {
        let socket = self.stranger(bench, origin);
        let stream = Stream::new(socket.into(), "a test".to_owned(), LONG).unwrap();
        stream.secured_client(&self.client).unwrap()
    }
}

fn greet(bench: &mut Bench, member: &mut Stream) {
    bench.until("a handshake", |_| member.greet().unwrap().then_some(()));
}

/// Whether the cache has heard its Hello.
fn hears(bench: &mut Bench, mut member: Stream) -> bool {
    let deadline = Instant::now() + PATIENCE;
    let mut left = hello(wire::VERSION);
    let mut came = [0; 1];
    loop {
        assert!(Instant::now() < deadline);
        match member.greet() {
            Ok(true) if !left.is_empty() => {
                if let Ok(count) = member.write(&left) {
                    left.drain(..count);
                }
            }
            Ok(_) => {}
            Err(_) => return false,
        }
        bench.run();
        match member.read(&mut came) {
            Ok(1) => return true,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            _ => return false,
        }
    }
}

/// What somebody says first who speaks TLS.
fn client_hello(guarded: &Guarded) -> Vec<u8> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let stream = Stream::new(ours.into(), "a test".to_owned(), LONG).unwrap();
    let mut stream = stream.secured_client(&guarded.client).unwrap();
    assert!(!stream.greet().unwrap());
    let mut said = Vec::new();
    let _ = theirs.read_to_end(&mut said);
    assert!(said.len() > 100);
    said
}

/// One byte after another keeps nobody here, before the handshake, in it or after it.
#[test]
fn who_does_not_say_who_they_are_has_to_go() {
    enum Says {
        Plain(Peer),
        Raw(UnixStream),
        Tls(Stream),
    }
    let guarded = Guarded::new();
    let mut bench = Bench::with(None, Duration::from_millis(300));
    let first = client_hello(&guarded);
    for which in 0..6 {
        let mut says = match which {
            0 | 1 => Says::Plain(bench.stranger()),
            2 | 3 => Says::Raw(guarded.stranger(&mut bench, "192.0.2.1")),
            _ => Says::Tls(guarded.member(&mut bench, "192.0.2.1")),
        };
        if let Says::Tls(member) = &mut says {
            greet(&mut bench, member);
        }
        let bytes = match (which, &says) {
            (0 | 2 | 4, _) => Vec::new(),
            (_, Says::Raw(_)) => first.clone(),
            _ => hello(wire::VERSION),
        };
        let mut bytes = bytes.iter();
        let deadline = Instant::now() + PATIENCE;
        while bench.cache.lines() > 0 {
            assert!(Instant::now() < deadline, "{which}");
            let next: Vec<u8> = bytes.next().into_iter().copied().collect();
            match &mut says {
                Says::Plain(peer) => {
                    let _ = peer.socket.write(&next);
                }
                Says::Raw(socket) => {
                    let _ = socket.write(&next);
                }
                Says::Tls(member) => {
                    let _ = member.write(&next);
                }
            }
            std::thread::sleep(Duration::from_millis(20));
            bench.run();
        }
        assert!(bytes.next().is_some() || which % 2 == 0, "{which}: it was let go on to the end");
    }
}

/// From one address or from as many as there are, silent or not.
#[test]
fn strangers_keep_out_nobody_who_has_a_certificate() {
    let guarded = Guarded::new();
    let first = client_hello(&guarded);
    for many in [false, true] {
        for speak in [false, true] {
            let mut bench = Bench::new();
            // The last one of all addresses by any order, known from before.
            let known = guarded.member(&mut bench, "~");
            assert!(hears(&mut bench, known));
            let (mut strangers, mut count) = (Vec::new(), 0);
            let mut flood = |bench: &mut Bench| {
                for _ in 0..300 {
                    count += 1;
                    let origin = if many {
                        format!("192.0.{}.{}", count / 256, count % 256)
                    } else {
                        "192.0.2.1".to_owned()
                    };
                    let mut stranger = guarded.stranger(bench, &origin);
                    if speak {
                        let _ = stranger.write(&first[..50]);
                    }
                    strangers.push(stranger);
                }
                bench.run();
            };
            flood(&mut bench);
            let mut member = guarded.member(&mut bench, "~");
            // Who comes for the first time has a certificate to show, which takes a moment.
            let mut new = guarded.member(&mut bench, "198.51.100.1");
            if many {
                greet(&mut bench, &mut new);
            }
            flood(&mut bench);
            while !member.greet().unwrap() {
                member.wait(Interest::NONE, Instant::now()).unwrap();
                flood(&mut bench);
            }
            flood(&mut bench);
            assert!(hears(&mut bench, member), "{many} {speak}");
            assert!(hears(&mut bench, new), "{many} {speak}");
            assert!(bench.cache.lines() <= 256 + 3);
        }
    }
}
