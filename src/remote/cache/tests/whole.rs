//! The daemon with real sockets.

use std::os::fd::{AsRawFd as _, IntoRawFd as _};
use std::path::Path;
use std::thread::JoinHandle;

use nix::sys::socket::{UnixAddr, connect, socket};

use super::*;
use crate::remote::CACHE_SOCKET;
use crate::remote::cache::run;
use crate::remote::front::Front;
use crate::settings::{CacheSettings, DaemonSettings, NetSettings};

fn start(dir: &Path) -> (UnixStream, JoinHandle<Result<(), Failure>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let net = NetSettings {
        address: None,
        port: 0,
        ps_socket: Some(theirs.into_raw_fd()),
        tls: None,
        timeout: LONG,
    };
    let daemon = DaemonSettings::default();
    let settings = CacheSettings {
        net,
        work_dir: dir.to_owned(),
        max_memory: None,
        max_per_source: None,
        spill: None,
        at_once: 1,
        restore: None,
        daemon,
    };
    let front = Front::cache(&settings).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    (ours, std::thread::spawn(move || run(front, &settings)))
}

fn frame(peer: &mut UnixStream) -> (Header, Vec<u8>) {
    let mut head = [0; HEADER];
    peer.read_exact(&mut head).unwrap();
    let header = Header::decode(&head).unwrap();
    let mut payload = vec![0; header.len as usize];
    peer.read_exact(&mut payload).unwrap();
    (header, payload)
}

fn greet(peer: &mut UnixStream) {
    peer.write_all(&hello(wire::VERSION)).unwrap();
    let mut magic = [0; MAGIC.len()];
    peer.read_exact(&mut magic).unwrap();
    assert_eq!((magic, frame(peer).0.kind), (MAGIC, Kind::Hello));
}

#[test]
fn one_given_connection_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (mut peer, daemon) = start(dir.path());
    greet(&mut peer);
    peer.write_all(&small(1, "a").commit()).unwrap();
    assert_eq!(frame(&mut peer).0.kind, Kind::Room);
    assert_eq!(frame(&mut peer).0.kind, Kind::Prepared);
    peer.write_all(&confirm(1)).unwrap();
    peer.write_all(&wire::bare(Kind::Ping, 0, 0, 0)).unwrap();
    assert_eq!(frame(&mut peer).0.kind, Kind::Pong);
    drop(peer);

    let restore = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let address = UnixAddr::new(&dir.path().join(CACHE_SOCKET)).unwrap();
    connect(restore.as_raw_fd(), &address).unwrap();
    let restore = Command { socket: restore };
    restore.say(get("a"));
    assert!(matches!(restore.next().unwrap().0, local_reply::What::Snapshot(_)));
    assert!(!daemon.is_finished());
    restore.say(ran(1));
    assert!(matches!(restore.next().unwrap().0, local_reply::What::Done(_)));
    assert_eq!(daemon.join().unwrap(), Ok(()));
    assert!(!dir.path().join(CACHE_SOCKET).exists());
}

#[test]
fn one_given_connection_that_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (mut peer, daemon) = start(dir.path());
    greet(&mut peer);
    peer.write_all(&small(1, "a").frames).unwrap();
    drop(peer);
    let failure = daemon.join().unwrap().unwrap_err();
    assert_eq!(failure.code, FailCode::FailLost);
}
