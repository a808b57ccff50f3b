use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::sys::pipe::pipe2;

const PATIENCE: Duration = Duration::from_secs(60);

/// Ours, and the other end of it.
fn pair() -> (Stream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let fd = OwnedFd::from(near);
    let peer = peer_of(&fd);
    (Stream::new(fd, peer, PATIENCE).unwrap(), far)
}

#[test]
fn nothing_to_read_is_not_the_end() {
    let (mut near, far) = pair();
    assert_eq!(near.peer(), far.local_addr().unwrap().to_string());
    assert_eq!(near.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(near.wait(Interest::READ, Instant::now()).unwrap(), Interest::NONE);
    (&far).write_all(b"abc").unwrap();
    let mut got = [0; 3];
    near.read_exact_within(&mut got, PATIENCE).unwrap();
    assert_eq!(&got, b"abc");
    drop(far);
    assert_eq!(near.wait(Interest::READ, Instant::now() + PATIENCE).unwrap(), Interest::READ);
    assert_eq!(near.read(&mut [0; 8]).unwrap(), 0);
    let closed = near.read_exact_within(&mut got, PATIENCE).unwrap_err();
    assert!(closed.to_string().ends_with("the connection was closed"), "{closed}");
}

#[test]
fn more_than_the_socket_takes_goes_over() {
    let (mut near, mut far) = pair();
    let bytes: Vec<u8> = (0..20_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        got
    });
    let (first, rest) = bytes.split_at(777);
    let mut parts = [IoSlice::new(first), IoSlice::new(&[]), IoSlice::new(rest), IoSlice::new(&[])];
    near.write_slices_within(&mut parts, PATIENCE).unwrap();
    near.end().unwrap();
    assert!(reader.join().unwrap() == bytes);
}

#[test]
fn a_peer_that_takes_nothing_is_given_up() {
    let (mut near, _far) = pair();
    let error = near.write_all_within(&vec![0; 64 << 20], Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, NetError::Silent { .. }), "{error}");
    assert_eq!(Failure::from(error).code, FailCode::FailTimeout);
}

#[test]
fn pipes_are_spliced() {
    let (mut near, mut far) = pair();
    let (read, write) = pipe2(libc::O_CLOEXEC | libc::O_NONBLOCK).unwrap();
    let empty = near.splice_from(read.as_fd(), 10).unwrap_err();
    assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
    nix::unistd::write(&write, b"abcdef").unwrap();
    assert_eq!(near.splice_from(read.as_fd(), 4).unwrap(), 4);
    drop(write);
    assert_eq!(near.splice_from(read.as_fd(), 10).unwrap(), 2);
    assert_eq!(near.splice_from(read.as_fd(), 10).unwrap(), 0);
    drop(near);
    let mut got = String::new();
    far.read_to_string(&mut got).unwrap();
    assert_eq!(got, "abcdef");
}

#[test]
fn only_a_connected_stream_can_be_given() {
    use std::os::fd::IntoRawFd as _;
    let given = |fd: OwnedFd| {
        let fd = fd.into_raw_fd();
        let result = Stream::given(fd, PATIENCE).map(|stream| stream.peer().to_owned());
        if result.is_err() {
            drop(crate::sys::fd::adopt(fd));
        }
        result.map_err(|e| e.to_string().replace(&fd.to_string(), "N"))
    };
    let text = |why: &str| Err(format!("descriptor N given with --ps-socket: {why}"));
    let null = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(given(null.into()), text("it is no socket"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert_eq!(given(listener.into()), text("it listens; an established connection is wanted"));
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_eq!(given(udp.into()), text("it is a socket, but no stream"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = (listener.local_addr().unwrap().port(), port).0;
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    assert_eq!(given(stream.into()), Ok(format!("127.0.0.1:{port}")));
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(given(one.into()), Ok("a local socket".to_owned()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_parts_arrive_in_order(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..20)) {
        let (mut near, mut far) = pair();
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        near.write_slices_within(&mut slices, PATIENCE).unwrap();
        near.end().unwrap();
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        prop_assert_eq!(got, parts.concat());
    }
}
