//! What cannot be dumped is refused by name, and the tree goes on untouched.

use crate::case::Case;
use crate::gate::{Gate, fork, join};
use crate::sys::{self, int};

pub const CASES: &[Case] = &[
    Case::new("unix_stream_pair", unix_stream_pair).refused("unix"),
    Case::new("unix_listening", unix_listening).refused("unix"),
    Case::new("unix_datagram", unix_datagram).refused("unix"),
    Case::new("unix_in_child", unix_in_child).refused("unix"),
    Case::new("inet_listening", inet_listening).refused("inet"),
    Case::new("inet_connected", inet_connected).refused("inet"),
    Case::new("inet_udp", inet_udp).refused("inet"),
    Case::new("inet6_udp", inet6_udp).refused("inet"),
    Case::new("netlink", netlink).refused("netlink"),
    Case::new("packet", packet).refused("packet"),
    Case::new("vsock", vsock).refused("socket"),
    Case::new("io_uring", io_uring).refused("io_uring"),
    Case::new("bpf_map", bpf_map).refused("bpf"),
    Case::new("fanotify", fanotify).refused("fanotify"),
    Case::new("userfaultfd", userfaultfd).refused("userfaultfd"),
    Case::new("perf_event", perf_event).refused("perf"),
    Case::new("mount_fd", mount_fd).refused("fscontext"),
    Case::new("landlock_ruleset", landlock_ruleset).refused("landlock"),
    Case::new("message_queue", message_queue).refused("mqueue"),
    Case::new("namespace_fd_of_other", namespace_fd_of_other).refused("namespace"),
    Case::new("other_uts_namespace", other_uts_namespace).refused("namespace"),
    Case::new("other_net_namespace", other_net_namespace).refused("namespace"),
    Case::new("other_mount_namespace", other_mount_namespace).refused("namespace"),
    Case::new("traced_child", traced_child).refused("trac"),
    Case::new("all_named_at_once", all_named_at_once).refused("netlink|userfaultfd|io_uring|unix"),
];

fn socket(domain: i32, kind: i32, protocol: i32) -> Result<i32, sys::Errno> {
    sys!(SYS_socket, domain, kind, protocol).map(int)
}

fn unix_stream_pair(gate: &Gate) {
    let mut fds = [0_i32; 2];
    sys!(SYS_socketpair, libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr()).expect("socketpair");
    sys::write(fds[0], b"hello").expect("write");
    gate.ready();
    assert_eq!(sys::read(fds[1], 10), Ok(b"hello".to_vec()));
}

fn unix_listening(gate: &Gate) {
    let listener = std::os::unix::net::UnixListener::bind("socket").expect("bind");
    gate.ready();
    let mut client = std::os::unix::net::UnixStream::connect("socket").expect("connect");
    let (_server, _) = listener.accept().expect("accept");
    std::io::Write::write_all(&mut client, b"x").expect("write");
}

fn unix_datagram(gate: &Gate) {
    let socket = std::os::unix::net::UnixDatagram::bind("socket").expect("bind");
    gate.ready();
    assert_eq!(socket.send_to(b"x", "socket").expect("send"), 1);
}

fn unix_in_child(gate: &Gate) {
    let child = fork(|| {
        let _pair = std::os::unix::net::UnixStream::pair().expect("pair");
        gate.mark("child");
        gate.wait();
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}

fn inet_listening(gate: &Gate) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    gate.ready();
    std::net::TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
}

fn inet_connected(gate: &Gate) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let mut client = std::net::TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (mut server, _) = listener.accept().expect("accept");
    gate.ready();
    std::io::Write::write_all(&mut client, b"hello").expect("write");
    let mut bytes = [0; 5];
    std::io::Read::read_exact(&mut server, &mut bytes).expect("read");
    assert_eq!(&bytes, b"hello");
}

fn inet_udp(gate: &Gate) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    gate.ready();
    assert_eq!(socket.send_to(b"x", socket.local_addr().expect("address")).expect("send"), 1);
}

fn inet6_udp(gate: &Gate) {
    let Ok(socket) = std::net::UdpSocket::bind("[::1]:0") else {
        gate.skip("no IPv6");
    };
    gate.ready();
    assert!(socket.local_addr().is_ok());
}

fn netlink(gate: &Gate) {
    let fd = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).expect("socket");
    gate.ready();
    assert!(sys::fcntl(fd, libc::F_GETFD, 0).is_ok());
}

fn packet(gate: &Gate) {
    let Ok(fd) = socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0) else {
        gate.skip("no packet sockets");
    };
    gate.ready();
    assert!(sys::fcntl(fd, libc::F_GETFD, 0).is_ok());
}

fn vsock(gate: &Gate) {
    let Ok(fd) = socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) else {
        gate.skip("no vsock");
    };
    gate.ready();
    assert!(sys::fcntl(fd, libc::F_GETFD, 0).is_ok());
}

fn make_io_uring() -> Option<i32> {
    let mut params = [0_u8; 120];
    sys!(SYS_io_uring_setup, 4, params.as_mut_ptr()).ok().map(int)
}

fn io_uring(gate: &Gate) {
    let Some(fd) = make_io_uring() else {
        gate.skip("no io_uring");
    };
    gate.ready();
    assert!(sys::fcntl(fd, libc::F_GETFD, 0).is_ok());
}

fn bpf_map(gate: &Gate) {
    // BPF_MAP_CREATE of an array: type, key size, value size, entries.
    let mut attr = [0_u32; 32];
    attr[..4].copy_from_slice(&[2, 4, 8, 10]);
    let Ok(fd) = sys!(SYS_bpf, 0, attr.as_mut_ptr(), 128) else {
        gate.skip("no bpf");
    };
    gate.ready();
    assert!(sys::fcntl(int(fd), libc::F_GETFD, 0).is_ok());
}

fn fanotify(gate: &Gate) {
    let Ok(fd) = sys!(SYS_fanotify_init, 0, libc::O_RDONLY) else {
        gate.skip("no fanotify");
    };
    gate.ready();
    assert!(sys::fcntl(int(fd), libc::F_GETFD, 0).is_ok());
}

fn make_userfaultfd() -> Option<i32> {
    sys!(SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK).ok().map(int)
}

fn userfaultfd(gate: &Gate) {
    let Some(fd) = make_userfaultfd() else {
        gate.skip("no userfaultfd");
    };
    gate.ready();
    assert!(sys::fcntl(fd, libc::F_GETFD, 0).is_ok());
}

fn perf_event(gate: &Gate) {
    // A software event: type 1, size 128, config 0 (cpu clock).
    let mut attr = [0_u64; 16];
    attr[0] = 1 | 128 << 32;
    let Ok(fd) = sys!(SYS_perf_event_open, attr.as_ptr(), 0, -1_i32, -1_i32, 0) else {
        gate.skip("no perf events");
    };
    gate.ready();
    assert!(sys::fcntl(int(fd), libc::F_GETFD, 0).is_ok());
}

/// A file system under construction.
fn mount_fd(gate: &Gate) {
    let Ok(fd) = sys!(SYS_fsopen, c"tmpfs".as_ptr(), 0) else {
        gate.skip("no fsopen");
    };
    gate.ready();
    assert!(sys::fcntl(int(fd), libc::F_GETFD, 0).is_ok());
}

fn landlock_ruleset(gate: &Gate) {
    let attr = 1_u64;
    let Ok(fd) = sys!(SYS_landlock_create_ruleset, &raw const attr, 8, 0) else {
        gate.skip("no landlock");
    };
    gate.ready();
    assert!(sys::fcntl(int(fd), libc::F_GETFD, 0).is_ok());
}

fn message_queue(gate: &Gate) {
    let name = std::ffi::CString::new(gate.token()).expect("name");
    let Ok(fd) = sys!(SYS_mq_open, name.as_ptr(), libc::O_RDWR | libc::O_CREAT, 0o600, 0) else {
        gate.skip("no POSIX message queues");
    };
    sys!(SYS_mq_unlink, name.as_ptr()).expect("mq_unlink");
    gate.ready();
    assert!(sys::fcntl(int(fd), libc::F_GETFD, 0).is_ok());
}

/// A descriptor that holds a namespace which is not ours.
fn namespace_fd_of_other(gate: &Gate) {
    let child = fork(|| {
        sys!(SYS_unshare, libc::CLONE_NEWUTS).expect("unshare");
        gate.mark("unshared");
        gate.await_mark("opened");
    });
    gate.await_mark("unshared");
    let file = std::fs::File::open(format!("/proc/{child}/ns/uts")).expect("open");
    gate.mark("opened");
    join(child);
    gate.ready();
    assert!(file.metadata().is_ok());
}

fn unshared(gate: &Gate, namespace: i32) {
    let child = fork(|| {
        sys!(SYS_unshare, namespace).expect("unshare");
        gate.mark("child");
        gate.wait();
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}

fn other_uts_namespace(gate: &Gate) {
    unshared(gate, libc::CLONE_NEWUTS);
}

fn other_net_namespace(gate: &Gate) {
    unshared(gate, libc::CLONE_NEWNET);
}

fn other_mount_namespace(gate: &Gate) {
    unshared(gate, libc::CLONE_NEWNS);
}

/// A debugger within the tree: its tracee cannot be seized a second time.
fn traced_child(gate: &Gate) {
    const PTRACE_SEIZE: usize = 0x4206;
    let child = fork(|| gate.wait());
    sys!(SYS_ptrace, PTRACE_SEIZE, child, 0, 0).expect("PTRACE_SEIZE");
    gate.ready();
    let text = std::fs::read_to_string(format!("/proc/{child}/status")).expect("status");
    let tracer = format!("TracerPid:\t{}\n", sys::getpid());
    assert!(text.contains(&tracer), "still traced by us");
    join(child);
}

/// One dump tells everything that is in the way.
fn all_named_at_once(gate: &Gate) {
    socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).expect("socket");
    if make_userfaultfd().is_none() || make_io_uring().is_none() {
        gate.skip("no userfaultfd or no io_uring");
    }
    unix_in_child(gate);
}
