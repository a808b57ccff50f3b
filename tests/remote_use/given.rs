//! `--ps-socket`: a connection that the caller has made is used, and no other.

use std::{fs, os::fd::OwnedFd, process::Stdio};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::{
    certificates::Ca,
    program::Memory,
    site::{Site, connection, has_ended, wait_for},
};

const NONE: &[&str] = &[];

fn cache_of(site: &Site, fd: OwnedFd, more: &[String]) -> crate::site::Daemon {
    let words = ["image-cache", "--ps-socket", "7"].map(str::to_owned).to_vec();
    site.daemon("dst", &mut site.crtool_given("dst", &[words, more.to_vec()].concat(), fd, 7))
}

fn proxy_of(site: &Site, fd: OwnedFd) -> crate::site::Daemon {
    site.daemon("src", &mut site.crtool_given("src", &["image-proxy", "--ps-socket", "7"], fd, 7))
}

/// Only the dump has a connection that was given to it.
pub fn dump() {
    let mut site = Site::new(Memory::Text);
    let cache = site.cache(NONE);
    let fd = std::net::TcpStream::connect(("127.0.0.1", cache.port())).unwrap().into();
    let words = site.dump_words(&["--ps-socket", "7"]);
    Site::run(&mut site.crtool_given("src", &words, fd, 7)).succeeded();
    site.restore_and_end();
}

/// Proxy and cache at the two ends of one connection; when all is over, both end by themselves.
pub fn proxy() {
    let mut site = Site::new(Memory::Noise);
    let (source, destination) = connection();
    let mut cache = cache_of(&site, destination, &[]);
    let mut proxy = proxy_of(&site, source);
    Site::run(&mut site.dump(NONE)).succeeded();
    site.restore_and_end();
    assert_eq!(proxy.stop(), Some(0), "{}", proxy.log());
    assert_eq!(cache.ended(), Some(0), "{}", cache.log());
    assert_eq!((proxy.errors(), cache.errors()), (Vec::new(), Vec::new()));
}

/// The cache has a connection that the dump made: the other way round than usual. Any stream will do.
pub fn cache() {
    let mut site = Site::new(Memory::Text);
    let flags = SockFlag::SOCK_CLOEXEC;
    let (source, destination) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
    let mut cache = cache_of(&site, destination, &[]);
    let words = site.dump_words(&["--ps-socket", "0"]);
    Site::run(&mut site.crtool_given("src", &words, source, 0)).succeeded();
    // The connection has ended, and the cache keeps what it has.
    site.restore_and_end();
    assert_eq!(cache.ended(), Some(0), "{}", cache.log());
    assert_eq!(cache.errors(), Vec::<String>::new());
}

/// With -d, and as standard input, which a daemon in the background gives up otherwise.
pub fn in_the_background() {
    let mut site = Site::new(Memory::Text);
    let (source, destination) = connection();
    let pids =
        [("dst", "image-cache", destination), ("src", "image-proxy", source)].map(|(work, name, fd)| {
            let words = [name, "-d", "--ps-socket", "0", "--pidfile", "pid", "-o", "log"];
            let mut command = site.crtool_given(work, &words, fd, 0);
            Site::run(command.stdout(Stdio::null())).succeeded();
            fs::read_to_string(site.work(work).join("pid")).unwrap().parse::<i32>().unwrap()
        });
    for pid in pids {
        for fd in 0..3 {
            let open = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
            assert_eq!(open, std::path::Path::new("/dev/null"));
        }
    }
    Site::run(&mut site.dump(NONE)).succeeded();
    site.restore_and_end();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pids[1]), nix::sys::signal::Signal::SIGTERM).unwrap();
    for pid in pids {
        wait_for("a daemon does not end", || has_ended(pid).then_some(()));
    }
}

/// The connection that was given speaks TLS; the certificate is for the name in --address.
pub fn with_tls() {
    let mut site = Site::new(Memory::Text);
    let ca = Ca::new(site.path());
    let (source, destination) = connection();
    let mut cache = cache_of(&site, destination, &ca.member(1));
    let words =
        [["--ps-socket", "7", "--address", "other.example"].map(str::to_owned).to_vec(), ca.member(2)];
    let words = site.dump_words(&words.concat());
    let error = Site::run(&mut site.crtool_given("src", &words, source, 7)).failed();
    assert!(error.contains("its certificate is not for other.example"), "{error}");
    site.counts();
    assert_eq!(cache.ended(), Some(0), "{}", cache.log());

    let (source, destination) = connection();
    let _cache = cache_of(&site, destination, &ca.member(1));
    let words = [["--ps-socket", "7", "--address", "127.0.0.1"].map(str::to_owned).to_vec(), ca.member(2)];
    let words = site.dump_words(&words.concat());
    Site::run(&mut site.crtool_given("src", &words, source, 7)).succeeded();
    site.restore_and_end();
}

/// A descriptor that is something else, or whose other end is gone: one line, and nothing has happened.
pub fn what_is_none() {
    let mut site = Site::new(Memory::Text);
    let file = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let listener = || OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let alone = || connection().0;
    let dump = site.dump_words(&["--ps-socket", "7"]);
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<String>>();
    for all in
        [dump, words(&["image-proxy", "--ps-socket", "7"]), words(&["image-cache", "--ps-socket", "7"])]
    {
        for (fd, wanted) in [
            (file(), "descriptor 7 given with --ps-socket: it is no socket"),
            (
                listener(),
                "descriptor 7 given with --ps-socket: it listens; an established connection is wanted",
            ),
        ] {
            let error = Site::run(&mut site.crtool_given("src", &all, fd, 7)).failed();
            assert!(error.contains(wanted), "{all:?}: {error}");
        }
    }
    let words = site.dump_words(&["--ps-socket", "7", "--timeout", "5"]);
    let ended = Site::run(&mut site.crtool_given("src", &words, alone(), 7));
    let error = ended.failed();
    assert!(error.contains("connection"), "{error}");
    site.counts();
    site.end();
}
