//! A cache that is told to end, or killed, while it holds trees.

use std::{
    fs,
    net::TcpStream,
    os::fd::{AsFd as _, AsRawFd as _},
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
    },
    unistd::Pid,
};

use crate::{
    chain::Source,
    manager::Manager,
    program::Memory,
    site::{Daemon, Site, list, operator, wait_for},
};

const NONE: &[&str] = &[];
const CACHE: [&str; 5] = ["image-cache", "--address", "127.0.0.1", "--port", "0"];

/// Dumps straight to the cache, and waits until it can be restored.
fn dump(site: &mut Site, cache: &Daemon) {
    let port = cache.port().to_string();
    Site::run(&mut site.dump(&["--address", "127.0.0.1", "--port", &port])).succeeded();
    site.reap();
    cache.says("is ready to be restored");
}

fn signal(daemon: &Daemon, signal: Signal) {
    kill(Pid::from_raw(daemon.pid().cast_signed()), signal).unwrap();
}

/// What a dump of the tree into a directory has, brought by a source that is played here.
fn played(site: &mut Site, cache: &Daemon, name: &str) -> Source {
    let images = site.work("images");
    let words = ["dump", "-t", &site.pid.to_string(), "-D", images.to_str().unwrap()];
    Site::run(&mut site.crtool("src", &words)).succeeded();
    site.reap();
    let mut source = Source::connect(cache);
    source.bring(&images, name, "", false).unwrap();
    source
}

/// It goes on for this host until the tree runs.
pub fn it_waits_for_the_restore() {
    let mut site = Site::new(Memory::Text);
    let mut cache = site.cache(NONE);
    let port = cache.port();
    let mut arriving = Source::connect(&cache);
    let begin = crtool::remote::pb::SnapshotBegin { name: "half".to_owned(), ..Default::default() };
    arriving.streams = 1;
    arriving.say(crtool::remote::wire::Kind::SnapshotBegin, 0, &begin);
    dump(&mut site, &cache);
    signal(&cache, Signal::SIGTERM);
    cache.says("told to end, with 1 snapshots that would be lost");
    // Nobody comes in from outside any more, and what has not come whole is refused.
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    let (header, payload) = arriving.hear();
    assert_eq!(header.kind, crtool::remote::wire::Kind::Failed);
    let failed: crtool::remote::pb::Failed = crtool::remote::wire::message(&header, &payload).unwrap();
    assert!(failed.text.contains("told to end"), "{}", failed.text);
    let listed = operator(&site, &["list"]).succeeded();
    assert!(listed.said.contains("told to end, and waits until it holds nothing"), "{}", listed.said);
    let refused = operator(&site, &["load", "x", "-D", site.path().to_str().unwrap()]).failed();
    assert!(refused.contains("inventory") || refused.contains("told to end"), "{refused}");
    thread::sleep(Duration::from_millis(200));
    assert!(list(&site).contains("READY"));
    site.restore_and_end();
    assert_eq!(cache.ended(), Some(0), "{}", cache.log());
    let errors = cache.errors();
    assert!(errors.len() == 1 && errors[0].contains("snapshot half is lost to the cache"), "{errors:?}");
}

/// Whoever insists loses the tree, and it is said.
pub fn told_twice() {
    let mut site = Site::new(Memory::Text);
    let mut cache = site.cache(NONE);
    dump(&mut site, &cache);
    // Both at once are one.
    signal(&cache, Signal::SIGTERM);
    signal(&cache, Signal::SIGINT);
    cache.says("a second SIGTERM ends it at once");
    thread::sleep(Duration::from_millis(1200));
    assert!(list(&site).contains("READY"));
    signal(&cache, Signal::SIGTERM);
    assert_eq!(cache.ended(), Some(0), "{}", cache.log());
    let errors = cache.errors();
    assert!(errors.len() == 1 && errors[0].contains("it was all there was of its tree"), "{errors:?}");
}

/// The service manager hands it to the next start.
pub fn handed_to_the_next_start() {
    let mut site = Site::new(Memory::Noise);
    let manager = Manager::start(site.path());
    let command = || site.crtool("dst", &CACHE);
    let mut cache = site.daemon("dst", &mut manager.service(&command(), 16));
    manager.hears("READY=1");
    dump(&mut site, &cache);
    manager.keeps(&[2]);
    assert_eq!(cache.stop(), Some(0), "{}", cache.log());
    assert_eq!(cache.errors(), Vec::<String>::new());
    manager.hears("BARRIER=1");
    let before = list_of(&site, &manager);
    assert!(before.contains("READY") && before.contains(&format!("{}(", site.pid)), "{before}");
    let command = site.crtool("dst", &CACHE);
    let next = site.daemon("dst", &mut manager.service(&command, 16));
    next.says("snapshot default of an earlier cache: ready");
    site.restore_and_end();
    manager.keeps(&[]);
}

/// One more start and end in between, which changes nothing.
fn list_of(site: &Site, manager: &Manager) -> String {
    let command = site.crtool("dst", &CACHE);
    let mut cache = site.daemon("dst", &mut manager.service(&command, 16));
    let listed = list(site);
    assert_eq!(cache.stop(), Some(0), "{}", cache.log());
    listed
}

/// A cache that is killed loses nothing of what was complete, whatever the source had said.
pub fn killed() {
    let mut site = Site::new(Memory::Noise);
    let manager = Manager::start(site.path());
    let command = site.crtool("dst", &CACHE);
    let mut cache = site.daemon("dst", &mut manager.service(&command, 16));
    let source = played(&mut site, &cache, "default");
    manager.keeps(&[2]);
    signal(&cache, Signal::SIGKILL);
    cache.ended();
    drop(source);
    let command = site.crtool("dst", &CACHE);
    let next = site.daemon("dst", &mut manager.service(&command, 16));
    let listed = list(&site);
    assert!(listed.contains("IN_DOUBT") && listed.contains("ended before the source confirmed"), "{listed}");
    operator(&site, &["release", "default"]).succeeded();
    site.restore_and_end();
    drop(next);
}

/// Killed with a tree in the hands of a restore: it may run.
pub fn killed_with_a_restore() {
    let mut site = Site::new(Memory::Noise);
    let manager = Manager::start(site.path());
    let command = site.crtool("dst", &CACHE);
    let mut cache = site.daemon("dst", &mut manager.service(&command, 16));
    dump(&mut site, &cache);
    // A restore that has it and does nothing with it.
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let address = UnixAddr::new(&site.work("dst").join(crtool::remote::CACHE_SOCKET)).unwrap();
    connect(socket.as_raw_fd(), &address).unwrap();
    let get = crtool::remote::pb::Get { name: "default".to_owned(), ..Default::default() };
    let request =
        crtool::remote::pb::LocalRequest { what: Some(crtool::remote::pb::local_request::What::Get(get)) };
    crtool::remote::local::send(socket.as_fd(), &request, &[]).unwrap();
    wait_for("nobody has it", || list(&site).contains("RESTORING").then_some(()));
    // An orderly end does not tear it out of that hand.
    signal(&cache, Signal::SIGTERM);
    cache.says("torn out of a restore");
    manager.hears("EXTEND_TIMEOUT_USEC=");
    signal(&cache, Signal::SIGKILL);
    cache.ended();
    drop(socket);
    let command = site.crtool("dst", &CACHE);
    let _next = site.daemon("dst", &mut manager.service(&command, 16));
    let listed = list(&site);
    assert!(listed.contains("IN_DOUBT") && listed.contains("its tree may run here"), "{listed}");
    operator(&site, &["release", "default"]).succeeded();
    site.restore_and_end();
}

/// Where the service manager has no room it is said, and the cache waits as if there were none.
pub fn no_room_at_the_manager() {
    let mut site = Site::new(Memory::Noise);
    let manager = Manager::start(site.path());
    let command = site.crtool("dst", &CACHE);
    let mut cache = site.daemon("dst", &mut manager.service(&command, 1));
    dump(&mut site, &cache);
    cache.says("FileDescriptorStoreMax= is 1");
    signal(&cache, Signal::SIGTERM);
    cache.says("told to end, with 1 snapshots");
    site.restore_and_end();
    assert_eq!(cache.ended(), Some(0), "{}", cache.log());
}

/// Written to a disk, and taken from there.
pub fn spilled() {
    let mut site = Site::new(Memory::Noise);
    let dir = site.path().join("spill");
    let words = ["--spill", dir.to_str().unwrap()];
    let mut cache = site.cache(&words);
    dump(&mut site, &cache);
    assert_eq!(cache.stop(), Some(0), "{}", cache.log());
    assert_eq!(cache.errors(), Vec::<String>::new());
    let places: Vec<_> = fs::read_dir(&dir).unwrap().flatten().map(|entry| entry.path()).collect();
    assert_eq!(places.len(), 1);
    for path in [&dir, &places[0]] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o700);
    }
    for entry in fs::read_dir(&places[0]).unwrap().flatten() {
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o7777, 0o600, "{:?}", entry.path());
    }
    let next = site.cache(&words);
    next.says("snapshot default of an earlier cache: ready");
    wait_for("it lies there still", || fs::read_dir(&dir).unwrap().next().is_none().then_some(()));
    site.restore_and_end();
}

/// A cache with `--spill` to a file system of its own, which is mounted with `options`.
fn cache_with_disk(site: &Site, options: &str) -> Daemon {
    let dir = site.work("spill");
    let inner = site.crtool("dst", &[&CACHE[..], &["--spill", dir.to_str().unwrap()]].concat());
    let mut command = Command::new("unshare");
    let script = r#"mount -t tmpfs -o "$1" none "$0" && shift && exec "$@""#;
    command.args(["-m", "sh", "-c", script]).arg(&dir).arg(options);
    site.daemon("dst", command.arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null()))
}

/// A disk that is full, or read-only, or no directory: nothing is lost by that, and nothing lies there.
pub fn spilled_where_nothing_can_be() {
    for (options, why) in [
        (Some("size=256k"), "No space left on device"),
        (Some("ro"), "Read-only file system"),
        (None, "Not a directory"),
    ] {
        let mut site = Site::new(Memory::Noise);
        let mut cache = match options {
            Some(options) => cache_with_disk(&site, options),
            None => {
                let file = site.path().join("file");
                fs::write(&file, "").unwrap();
                site.cache(&["--spill", file.join("spill").to_str().unwrap()])
            }
        };
        dump(&mut site, &cache);
        signal(&cache, Signal::SIGTERM);
        let line = cache.says("snapshot default cannot be spilled");
        assert!(line.contains(why), "{line}");
        cache.says("told to end, with 1 snapshots that would be lost");
        if options.is_some() {
            let there = format!("/proc/{}/root{}", cache.pid(), site.path().join("spill").display());
            assert_eq!(fs::read_dir(there).unwrap().count(), 0);
        }
        assert_eq!(cache.errors().len(), 1, "{}", cache.log());
        site.restore_and_end();
        assert_eq!(cache.ended(), Some(0), "{}", cache.log());
    }
}
