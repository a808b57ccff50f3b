//! The relay between dumps and caches that follow a script.

mod ring;

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, socket,
};
use proptest::prelude::*;

use super::link::{Dial, Dialed};
use super::relay::{Door, Ended, Relay, Rules};
use crate::remote::last_words::LastWord;
use crate::remote::net::Stream;
use crate::remote::pb::local_reply::What as Reply;
use crate::remote::pb::local_request::What as Request;
use crate::remote::pb::snapshot_info::State;
use crate::remote::pb::{self, FailCode};
use crate::remote::wire::{self, HEADER, Header, Kind, MAGIC, MAX_DATA};
use crate::remote::{crc, local};
use crate::sys;
use crate::tracee::{Decision, Stage};

/// Nothing here takes that long unless it is broken.
const LONG: Duration = Duration::from_secs(40);

/// Connections as they are laid out for the proxy.
#[derive(Debug, Clone, Default)]
struct Laid(Arc<Mutex<VecDeque<Stream>>>);

#[derive(Debug)]
struct Script {
    laid: Laid,
    once: bool,
    used: bool,
}

impl Dial for Script {
    type Conn = Stream;

    fn target(&self) -> String {
        "cache:1".to_owned()
    }

    fn step(&mut self, now: Instant) -> Dialed<Stream> {
        match self.laid.0.lock().unwrap().pop_front() {
            Some(stream) => {
                self.used = true;
                Dialed::Ready(stream)
            }
            None => {
                let why = "connect to cache:1: Connection refused".to_owned();
                Dialed::Failed { why, again: now + Duration::from_millis(5), for_good: false, nobody: false }
            }
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_spent(&self) -> bool {
        self.once && self.used
    }
}

#[derive(Debug)]
struct Listener(OwnedFd);

impl Door for Listener {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn accept(&self) -> Option<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = accept4(self.0.as_raw_fd(), flags).ok()?;
        Some(sys::fd::adopt(fd).unwrap())
    }
}

/// A proxy in a thread.
struct Proxy {
    dir: Arc<tempfile::TempDir>,
    laid: Laid,
    stop: OwnedFd,
    thread: Option<JoinHandle<std::io::Result<Ended>>>,
}

impl Proxy {
    fn start(timeout: Duration) -> Self {
        Self::with(timeout, Duration::ZERO, false)
    }

    fn with(timeout: Duration, settle: Duration, once: bool) -> Self {
        Self::at(Arc::new(tempfile::tempdir().unwrap()), timeout, settle, once)
    }

    /// In a work dir in which another one may have been.
    fn at(dir: Arc<tempfile::TempDir>, timeout: Duration, settle: Duration, once: bool) -> Self {
        let _ = std::fs::remove_file(dir.path().join("s"));
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&dir.path().join("s")).unwrap()).unwrap();
        listen(&listener, Backlog::new(64).unwrap()).unwrap();
        let (read, stop) = nix::unistd::pipe().unwrap();
        let laid = Laid::default();
        let script = Script { laid: laid.clone(), once, used: false };
        let rules = Rules {
            timeout,
            settle,
            compress: true,
            host: "here".to_owned(),
            work_dir: Some(dir.path().to_owned()),
        };
        let thread = std::thread::spawn(move || {
            let mut relay = Relay::new(script, Box::new(Listener(listener)), rules).unwrap();
            relay.stop_at(read.as_fd()).unwrap();
            relay.run()
        });
        Self { dir, laid, stop, thread: Some(thread) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// The cache's end of a connection that the proxy will get.
    fn lay(&self) -> Cache {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LONG)).unwrap();
        ours.set_write_timeout(Some(LONG)).unwrap();
        let stream = Stream::new(theirs.into(), "cache:1".to_owned(), LONG).unwrap();
        self.laid.0.lock().unwrap().push_back(stream);
        Cache { socket: ours, pings: 0 }
    }

    fn cache(&self) -> Cache {
        let mut cache = self.lay();
        cache.greet();
        cache
    }

    /// One that cannot decompress: dumps get rings.
    fn plain_cache(&self) -> Cache {
        let mut cache = self.lay();
        cache.greet_with(0);
        cache
    }

    fn dump(&self, name: &str) -> Dump {
        let dump = Dump::connect(&self.path());
        dump.send(Request::Open(begin(name)), &[]);
        dump
    }

    fn status(&self) -> Vec<pb::SnapshotInfo> {
        let asker = Dump::connect(&self.path());
        asker.send(Request::Status(pb::Empty {}), &[]);
        let mut all = Vec::new();
        loop {
            let (Reply::Snapshots(page), _) = asker.receive() else { panic!("no list") };
            all.extend(page.snapshots);
            if !page.more {
                return all;
            }
        }
    }

    /// Waits until the newest snapshot of that name looks like this.
    fn until(&self, name: &str, state: State) -> pb::SnapshotInfo {
        let until = Instant::now() + LONG;
        loop {
            let all = self.status();
            let newest = all.into_iter().rfind(|s| s.name == name);
            match newest {
                Some(info) if info.state() == state => return info,
                other if Instant::now() > until => panic!("{name} is not {state:?} but {other:?}"),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn join(mut self) -> Ended {
        self.thread.take().unwrap().join().unwrap().unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            nix::unistd::write(&self.stop, b"x").unwrap();
            let ended = thread.join();
            if !std::thread::panicking() {
                assert_eq!(ended.unwrap().unwrap(), Ended::Well);
            }
        }
    }
}

fn begin(name: &str) -> pb::SnapshotBegin {
    pb::SnapshotBegin { name: name.to_owned(), pid: 7, comm: "x".to_owned(), ..Default::default() }
}

/// The other end of the connection.
struct Cache {
    socket: UnixStream,
    pings: u32,
}

impl Cache {
    fn greet(&mut self) {
        self.greet_with(wire::FEATURE_LZ4);
    }

    fn greet_with(&mut self, features: u64) {
        self.send(&MAGIC);
        let hello =
            pb::Hello { version: wire::VERSION, features, timeout_ms: 3_600_000, ..Default::default() };
        self.send(&wire::frame(Kind::Hello, 0, 0, &hello));
        let mut magic = [0; MAGIC.len()];
        self.socket.read_exact(&mut magic).unwrap();
        assert_eq!(magic, MAGIC);
        assert_eq!(self.frame().0.kind, Kind::Hello);
    }

    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    fn say<M: prost::Message>(&mut self, kind: Kind, stream: u32, message: &M) {
        self.send(&wire::frame(kind, stream, 0, message));
    }

    /// The next frame, of any kind.
    fn raw(&mut self) -> (Header, Vec<u8>) {
        let mut head = [0; HEADER];
        self.socket.read_exact(&mut head).unwrap();
        let header = Header::decode(&head).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.socket.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// The next frame that is no Ping; those are answered.
    fn frame(&mut self) -> (Header, Vec<u8>) {
        loop {
            let (header, payload) = self.raw();
            match header.kind {
                Kind::Ping => {
                    self.pings += 1;
                    self.send(&wire::bare(Kind::Pong, 0, 0, 0));
                }
                Kind::Pong => {}
                _ => return (header, payload),
            }
        }
    }

    fn expect<M: prost::Message + Default>(&mut self, kind: Kind) -> (u32, M) {
        let (header, payload) = self.frame();
        assert_eq!(header.kind, kind, "{:?}", String::from_utf8_lossy(&payload));
        (header.stream, wire::message(&header, &payload).unwrap())
    }

    /// A snapshot is offered.
    fn offered(&mut self) -> (u32, pb::SnapshotBegin) {
        self.expect(Kind::SnapshotBegin)
    }

    /// A snapshot is offered, and there is room for it.
    fn begun(&mut self) -> (u32, pb::SnapshotBegin) {
        let (stream, begin) = self.offered();
        self.say(Kind::Room, stream, &pb::Room::default());
        (stream, begin)
    }

    /// The proxy has hung up.
    fn closed(&mut self) {
        let mut rest = Vec::new();
        // Unread bytes of ours make it a reset.
        let _ = self.socket.read_to_end(&mut rest);
    }
}

/// The other end of the local socket.
struct Dump {
    socket: OwnedFd,
    pipe: Option<std::fs::File>,
    /// The memory of the ring, and what the proxy counts up.
    ring: Option<(OwnedFd, OwnedFd)>,
}

impl Dump {
    fn connect(path: &Path) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        Self { socket, pipe: None, ring: None }
    }

    fn send(&self, what: Request, fds: &[BorrowedFd<'_>]) {
        let request = pb::LocalRequest { what: Some(what) };
        local::send(self.socket.as_fd(), &request, fds).unwrap();
    }

    fn is_ready(&self, patience: Duration) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, u16::try_from(patience.as_millis()).unwrap()).unwrap() > 0
    }

    fn receive(&self) -> (Reply, Vec<OwnedFd>) {
        assert!(self.is_ready(LONG), "no answer");
        let packet = local::receive::<pb::LocalReply>(self.socket.as_fd()).unwrap().expect("an answer");
        (packet.message.what.unwrap(), packet.fds)
    }

    fn opened(&mut self) -> u64 {
        let (reply, fds) = self.receive();
        let Reply::Opened(opened) = reply else { panic!("{reply:?}") };
        let mut fds = fds.into_iter();
        if opened.ring {
            self.ring = fds.next().zip(fds.next());
        }
        self.pipe = Some(fds.next().unwrap().into());
        assert!(fds.next().is_none());
        opened.features
    }

    fn write(&mut self, bytes: &[u8]) {
        self.pipe.as_mut().unwrap().write_all(bytes).unwrap();
    }

    fn guard(&self) -> Decision {
        let decision = Decision::new().unwrap();
        self.send(Request::Guard(pb::Empty {}), &[decision.as_fd()]);
        decision
    }

    fn commit(&mut self) {
        self.write(&wire::frame(Kind::Commit, 0, 0, &pb::Commit::default()));
    }

    fn prepared(&self) {
        let (reply, _) = self.receive();
        assert!(matches!(reply, Reply::Prepared(_)), "{reply:?}");
    }

    fn failed(&self) -> pb::Failed {
        let (reply, _) = self.receive();
        let Reply::Failed(failed) = reply else { panic!("{reply:?}") };
        failed
    }

    fn restored(&self) -> pb::Restored {
        let (reply, _) = self.receive();
        let Reply::Restored(restored) = reply else { panic!("{reply:?}") };
        restored
    }

    /// The cache has the last word.
    fn taken(&self) {
        let (reply, _) = self.receive();
        assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
    }

    fn confirm(&self) {
        self.send(Request::Confirm(pb::Confirm { survives: false }), &[]);
    }
}

fn image(number: u32, name: &str, parts: &[Vec<u8>]) -> Vec<u8> {
    let begin = pb::ImageBegin { name: name.to_owned(), expected_bytes: 0 };
    let mut bytes = wire::frame(Kind::ImageBegin, 0, number, &begin);
    let mut sum = wire::Sum::default();
    for part in parts {
        let crc = crc::of(part);
        let len = u32::try_from(part.len()).unwrap();
        bytes.extend(Header::data(0, number, len, crc).encode());
        bytes.extend(part);
        sum.push(len, crc);
    }
    bytes.extend(wire::frame(Kind::ImageEnd, 0, number, &pb::ImageEnd { size: sum.size, crc32c: sum.crc }));
    bytes
}

/// Takes a snapshot to the point where the dump has the last word.
fn prepared(proxy: &Proxy, cache: &mut Cache, name: &str) -> (Dump, u32) {
    let mut dump = proxy.dump(name);
    let (stream, _) = cache.begun();
    dump.opened();
    dump.guard();
    dump.commit();
    cache.expect::<pb::Commit>(Kind::Commit);
    cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 0 });
    dump.prepared();
    (dump, stream)
}

#[test]
fn the_whole_way() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    let (stream, begun) = cache.begun();
    assert_eq!(dump.opened(), wire::FEATURE_LZ4);
    assert_eq!((begun.name.as_str(), begun.host.as_str()), ("a", "here"));
    assert!(stream != 0 && begun.id != 0 && begun.created != 0);
    dump.write(&image(1, "x.img", &[vec![1; 5], vec![2; 100_000]]));
    dump.guard();
    dump.commit();
    let kinds: Vec<_> = (0..5).map(|_| cache.frame().0).map(|h| (h.kind, h.stream, h.image, h.len)).collect();
    let expected =
        [(Kind::ImageBegin, 1), (Kind::Data, 1), (Kind::Data, 1), (Kind::ImageEnd, 1), (Kind::Commit, 0)];
    assert_eq!(kinds.iter().map(|k| (k.0, k.2)).collect::<Vec<_>>(), expected);
    assert!(kinds.iter().all(|k| k.1 == stream));
    assert_eq!(kinds[2].3, 100_000);
    cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 100_005 });
    dump.prepared();
    assert_eq!(proxy.until("a", State::Prepared).bytes, 100_005);
    dump.confirm();
    assert!(!cache.expect::<pb::Confirm>(Kind::Confirm).1.survives);
    let info = proxy.until("a", State::Ready);
    assert_eq!((info.images, info.pid, info.comm.as_str()), (1, 7, "x"));
    let waits = Dump::connect(&proxy.path());
    waits.send(Request::WaitRestored(pb::WaitRestored { name: "a".to_owned(), wait_ms: 60_000 }), &[]);
    // The answer comes only when there is one.
    assert!(!waits.is_ready(Duration::from_millis(20)));
    cache.say(Kind::Restored, stream, &pb::Restored { ok: true, pid: 77, text: String::new() });
    assert_eq!((dump.restored().pid, waits.restored().pid), (77, 77));
    assert_eq!(proxy.until("a", State::Restored).restored_pid, 77);
}

// ---- The connection is not there, or not any more.

#[test]
fn a_dump_waits_for_the_connection() {
    let proxy = Proxy::start(LONG);
    let mut dump = proxy.dump("a");
    assert_eq!(proxy.until("a", State::Receiving).text, "waits for the connection to the cache");
    let mut cache = proxy.cache();
    assert_eq!(cache.begun().1.name, "a");
    dump.opened();
}

#[test]
fn a_cache_that_waits_for_the_first_word_gets_it_at_once() {
    // Nothing else happens in an hour.
    let proxy = Proxy::start(Duration::from_secs(3600));
    let mut cache = proxy.lay();
    let mut dumps = Vec::new();
    for name in ["a", "b"] {
        let mut magic = [0; MAGIC.len()];
        cache.socket.read_exact(&mut magic).unwrap();
        assert_eq!(magic, MAGIC);
        assert_eq!(cache.frame().0.kind, Kind::Hello);
        drop(cache);
        cache = proxy.lay();
        dumps.push(proxy.dump(name));
    }
}

#[test]
fn a_connection_that_does_not_come() {
    let proxy = Proxy::start(Duration::from_millis(200));
    let failed = proxy.dump("a").failed();
    assert_eq!(failed.code(), FailCode::FailLost);
    assert_eq!(failed.text, "no connection to the cache: connect to cache:1: Connection refused");
    assert_eq!(proxy.until("a", State::Failed).text, failed.text);
    // The next one may.
    let mut cache = proxy.lay();
    cache.greet();
    let proxied = proxy.until("a", State::Failed);
    assert_eq!(proxied.bytes, 0);
}

#[test]
fn a_connection_lost_before_the_last_frame() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    dump.write(&image(1, "x.img", &[vec![1; 100]]));
    for _ in 0..3 {
        cache.frame();
    }
    drop(cache);
    let failed = dump.failed();
    assert_eq!(failed.code(), FailCode::FailLost);
    assert_eq!(failed.text, "the connection to cache:1 is lost: the cache closed the connection");
    // The pipe is closed after the reason was sent.
    let error = loop {
        if let Err(error) = dump.pipe.as_mut().unwrap().write_all(&[0; 24]) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    // The same dump may try again at once.
    let mut cache = proxy.lay();
    let mut again = proxy.dump("a");
    cache.greet();
    assert_eq!(cache.begun().1.name, "a");
    again.opened();
}

#[test]
fn a_connection_lost_with_the_answer() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    let id = cache.begun().1.id;
    dump.opened();
    dump.guard();
    dump.commit();
    cache.expect::<pb::Commit>(Kind::Commit);
    drop(cache);
    assert_eq!(dump.failed().code(), FailCode::FailLost);
    // The cache may have it all: it is told that the tree runs on before anything else.
    let mut cache = proxy.lay();
    let mut again = proxy.dump("a");
    cache.greet();
    let (stream, resume) = cache.expect::<pb::Resume>(Kind::Resume);
    assert_eq!((resume.name.as_str(), resume.id), ("a", id));
    assert!(matches!(resume.verdict, Some(pb::resume::Verdict::Abort(_))));
    let (second, begun) = cache.begun();
    assert!(second != stream && begun.id != id);
    again.opened();
    let gone = pb::Failed { code: FailCode::FailNotFound.into(), text: "no such".to_owned() };
    cache.say(Kind::Failed, stream, &gone);
    let states = |all: Vec<pb::SnapshotInfo>| all.iter().map(|s| s.state()).collect::<Vec<_>>();
    let until = Instant::now() + LONG;
    while states(proxy.status()) != [State::Failed, State::Receiving] {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_last_word_is_brought_over_a_new_connection() {
    // The word comes while there is no connection.
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let (dump, _) = prepared(&proxy, &mut cache, "a");
    drop(cache);
    proxy.until("a", State::InDoubt);
    dump.confirm();
    let mut cache = proxy.cache();
    let (stream, resume) = cache.expect::<pb::Resume>(Kind::Resume);
    assert!(matches!(resume.verdict, Some(pb::resume::Verdict::Confirm(_))));
    // And again, as long as there is no answer.
    drop(cache);
    let mut cache = proxy.cache();
    let (again, same) = cache.expect::<pb::Resume>(Kind::Resume);
    assert!(again != stream && same == resume);
    proxy.until("a", State::InDoubt);
    cache.say(Kind::Prepared, again, &pb::Prepared { bytes: 0 });
    dump.taken();
    proxy.until("a", State::Ready);
    // The dump still waits, so another connection is made to ask.
    drop(cache);
    let mut cache = proxy.cache();
    let (third, _) = cache.expect::<pb::Resume>(Kind::Resume);
    cache.say(Kind::Restored, third, &pb::Restored { ok: true, pid: 5, text: String::new() });
    assert_eq!(dump.restored().pid, 5);
}

/// Somebody asks the proxy about a tree that was handed over, and hears what the cache says of it, or that nobody knows.
#[test]
fn what_is_taken_back_is_answered() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let abort = || {
        let verdict = pb::resume::Verdict::Abort(pb::Abort { reason: "back".to_owned() });
        let dump = Dump::connect(&proxy.path());
        let resume = pb::Resume { name: "a".to_owned(), id: 5, verdict: Some(verdict), journal: 7 };
        dump.send(Request::Resume(resume), &[]);
        dump
    };
    // What a cache does not know may have run under another one, however often that is asked.
    for _ in 0..2 {
        let dump = abort();
        let (stream, resume) = cache.expect::<pb::Resume>(Kind::Resume);
        assert_eq!(resume.journal, 7);
        let unknown = pb::Failed { code: FailCode::FailNotFound.into(), text: "unknown".to_owned() };
        cache.say(Kind::Failed, stream, &unknown);
        assert_eq!(dump.failed(), unknown);
    }
    // Too late: said at once, and from then on it is only asked what becomes of it.
    let dump = abort();
    let (stream, _) = cache.expect::<pb::Resume>(Kind::Resume);
    cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 0 });
    assert!(matches!(dump.receive().0, Reply::Prepared(_)));
    drop(cache);
    let mut cache = proxy.cache();
    let (stream, resume) = cache.expect::<pb::Resume>(Kind::Resume);
    assert!(matches!(resume.verdict, Some(pb::resume::Verdict::Go(_))));
    cache.say(Kind::Restored, stream, &pb::Restored { ok: true, pid: 5, text: String::new() });
    proxy.until("a", State::Restored);
    assert!(abort().restored().ok);
}

/// A dump that ends well has seen its last word arrive.
#[test]
fn a_dump_hears_when_the_cache_has_the_last_word() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let written = || LastWord::all(proxy.dir.path());
    let (dump, stream) = prepared(&proxy, &mut cache, "a");
    assert!(written().is_empty());
    dump.confirm();
    while cache.raw().0.kind != Kind::Confirm {}
    assert!(!dump.is_ready(Duration::from_millis(50)));
    assert_eq!(written().len(), 1);
    assert_eq!(cache.raw().0.kind, Kind::Ping);
    cache.send(&wire::bare(Kind::Pong, 0, 0, 0));
    dump.taken();
    assert!(written().is_empty());
    cache.say(Kind::Restored, stream, &pb::Restored { ok: true, pid: 5, text: String::new() });
    assert_eq!(dump.restored().pid, 5);
    // Restored before that was heard of.
    let (dump, stream) = prepared(&proxy, &mut cache, "b");
    dump.confirm();
    while cache.raw().0.kind != Kind::Confirm {}
    cache.say(Kind::Restored, stream, &pb::Restored { ok: true, pid: 6, text: String::new() });
    assert_eq!(dump.restored().pid, 6);
    assert!(written().is_empty());
}

#[test]
fn what_a_proxy_had_still_to_say_the_next_one_says() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let start = || Proxy::at(dir.clone(), LONG, Duration::ZERO, false);
    let proxy = start();
    let mut cache = proxy.cache();
    let (confirmed, _) = prepared(&proxy, &mut cache, "a");
    let (aborted, _) = prepared(&proxy, &mut cache, "b");
    confirmed.confirm();
    aborted.send(Request::Abort(pb::Abort { reason: "no".to_owned() }), &[]);
    for kind in [Kind::Confirm, Kind::Abort] {
        while cache.raw().0.kind != kind {}
    }
    drop((proxy, cache));
    // What is for another cache stays.
    let foreign = LastWord {
        id: 1,
        name: "c".to_owned(),
        target: "elsewhere:1".to_owned(),
        pid: 7,
        word: Err("no".to_owned()),
    };
    foreign.write(dir.path()).unwrap();
    assert_eq!(LastWord::all(dir.path()).len(), 3);

    let proxy = start();
    let waiting = proxy.until("a", State::InDoubt);
    assert!(waiting.pid == 7 && waiting.text.contains("an earlier image-proxy"), "{waiting:?}");
    let mut cache = proxy.cache();
    for _ in 0..2 {
        let (stream, resume) = cache.expect::<pb::Resume>(Kind::Resume);
        assert_ne!(resume.id, 0);
        match (resume.name.as_str(), resume.verdict) {
            ("a", Some(pb::resume::Verdict::Confirm(_))) => {
                cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 0 });
            }
            ("b", Some(pb::resume::Verdict::Abort(_))) => {
                cache.say(Kind::Failed, stream, &pb::Failed::default());
            }
            other => panic!("{other:?}"),
        }
    }
    proxy.until("a", State::Ready);
    proxy.until("b", State::Failed);
    assert_eq!(LastWord::all(dir.path()), [foreign]);
}

#[test]
fn a_confirm_that_was_not_answered_is_sent_again() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let (dump, _) = prepared(&proxy, &mut cache, "a");
    dump.confirm();
    drop(dump);
    while cache.raw().0.kind != Kind::Confirm {}
    // The Ping behind it stays without an answer.
    drop(cache);
    let info = proxy.until("a", State::InDoubt);
    assert!(info.text.contains("trying again"), "{}", info.text);
    let mut cache = proxy.cache();
    let (stream, resume) = cache.expect::<pb::Resume>(Kind::Resume);
    assert!(matches!(resume.verdict, Some(pb::resume::Verdict::Confirm(_))));
    cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 0 });
    proxy.until("a", State::Ready);
}

#[test]
fn a_silent_cache_is_given_up() {
    let proxy = Proxy::start(Duration::from_millis(300));
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    // It neither answers Pings nor takes bytes.
    let failed = dump.failed();
    assert!(failed.text.ends_with("nothing came from it for 0.3 s"), "{}", failed.text);
    cache.closed();
    // Nor does it help to accept and say nothing.
    let mut mute = proxy.lay();
    mute.closed();
    assert!(proxy.dump("b").failed().text.starts_with("no connection to the cache: "));
}

#[test]
fn a_cache_that_answers_is_kept() {
    let proxy = Proxy::start(Duration::from_millis(300));
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    let (stream, _) = cache.begun();
    dump.opened();
    while cache.pings < 20 {
        let (header, _) = cache.raw();
        assert_eq!(header.kind, Kind::Ping);
        cache.pings += 1;
        cache.send(&wire::bare(Kind::Pong, 0, 0, 0));
    }
    cache.send(&wire::bare(Kind::Ping, 0, 0, 0));
    while cache.raw().0.kind != Kind::Pong {
        cache.send(&wire::bare(Kind::Pong, 0, 0, 0));
    }
    cache.say(Kind::Failed, stream, &pb::Failed { code: FailCode::FailMemory.into(), text: "no".into() });
    assert_eq!(dump.failed().text, "no");
}

#[test]
fn a_given_connection_is_the_only_one() {
    for lost in [false, true] {
        let proxy = Proxy::with(LONG, LONG, true);
        let mut cache = proxy.cache();
        let (dump, stream) = prepared(&proxy, &mut cache, "a");
        if !lost {
            dump.confirm();
            cache.expect::<pb::Confirm>(Kind::Confirm);
            cache.say(Kind::Restored, stream, &pb::Restored { ok: true, ..Default::default() });
            dump.restored();
        }
        drop(cache);
        assert_eq!(proxy.join(), if lost { Ended::Lost } else { Ended::Well });
    }
}

// ---- Dumps that go.

#[test]
fn a_dump_that_goes_before_the_end_is_aborted() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut other = proxy.dump("other");
    let (beside, _) = cache.begun();
    other.opened();
    let whole = image(1, "x.img", &[vec![3; 300_000]]);
    // At the ends of frames, inside of heads, and inside of payloads large and small.
    for (round, cut) in [0, 10, 24, 30, 60, 80, 5000, 200_000, whole.len()].into_iter().enumerate() {
        let name = format!("a{round}");
        let mut dump = proxy.dump(&name);
        let (stream, _) = cache.begun();
        dump.opened();
        dump.write(&whole[..cut]);
        other.write(&wire::bare(Kind::Zero, 0, 1, 4096));
        drop(dump);
        let mut zeros = 0;
        let reason = loop {
            let (header, payload) = cache.frame();
            assert!(header.stream == stream || header.stream == beside);
            match header.kind {
                Kind::Zero => zeros += 1,
                Kind::Abort => break wire::message::<pb::Abort>(&header, &payload).unwrap().reason,
                // Whole, or not at all.
                Kind::Data => assert_eq!(crc::of(&payload), header.crc),
                _ => {}
            }
        };
        let pid = std::process::id();
        let gone = format!("the dump (pid {pid}) ended before the snapshot was complete");
        assert_eq!(reason, gone);
        if zeros == 0 {
            assert_eq!(cache.frame().0.kind, Kind::Zero, "the other dump goes on");
        }
        assert_eq!(proxy.until(&name, State::Failed).text, gone);
    }
    proxy.until("other", State::Receiving);
}

#[test]
fn a_dump_that_gives_up_is_aborted() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let abort = || Request::Abort(pb::Abort { reason: "why not".to_owned() });
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    dump.send(abort(), &[]);
    assert_eq!(cache.expect::<pb::Abort>(Kind::Abort).1.reason, "why not");
    assert_eq!(proxy.until("a", State::Failed).text, "why not");
    // Also when the cache has it all.
    let (dump, stream) = prepared(&proxy, &mut cache, "b");
    dump.send(abort(), &[]);
    assert_eq!(cache.expect::<pb::Abort>(Kind::Abort).0, stream);
    assert_eq!(proxy.until("b", State::Failed).text, "why not");
    // And when there is no connection.
    let proxy = Proxy::start(LONG);
    let dump = proxy.dump("c");
    dump.send(abort(), &[]);
    assert_eq!(proxy.until("c", State::Failed).text, "why not");
}

/// A process that connects to the proxy and lives until it is told.
struct Other {
    child: Child,
    hand: OwnedFd,
}

impl Other {
    /// It, and its connection.
    fn connect(path: &Path) -> (Self, Dump) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (hand, theirs) =
            nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "remote::proxy::tests::as_another_process", "--nocapture"])
            .env("CRTOOL_TEST_SOCKET", path)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut fds = [PollFd::new(hand.as_fd(), PollFlags::POLLIN)];
        assert!(poll(&mut fds, 60_000u16).unwrap() > 0);
        let packet = local::receive::<pb::Empty>(hand.as_fd()).unwrap().unwrap();
        let socket = packet.fds.into_iter().next().unwrap();
        (Self { child, hand }, Dump { socket, pipe: None, ring: None })
    }

    fn kill(self) {
        drop(self);
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.hand.as_fd();
    }
}

/// Not a test but what [`Other`] is.
#[test]
fn as_another_process() {
    let Some(path) = std::env::var_os("CRTOOL_TEST_SOCKET") else { return };
    let dump = Dump::connect(Path::new(&path));
    let stdin = std::io::stdin();
    local::send(stdin.as_fd(), &pb::Empty {}, &[dump.socket.as_fd()]).unwrap();
    drop(dump);
    // Until the other end closes.
    let _ = nix::unistd::read(stdin.as_fd(), &mut [0]);
}

/// A dump of another process, with all of its frames sent and, if `told`, the cache's word.
fn another(proxy: &Proxy, cache: &mut Cache, name: &str, told: bool) -> (Other, Dump, Decision, u32) {
    let (other, mut dump) = Other::connect(&proxy.path());
    dump.send(Request::Open(begin(name)), &[]);
    let (stream, _) = cache.begun();
    dump.opened();
    let decision = dump.guard();
    dump.commit();
    cache.expect::<pb::Commit>(Kind::Commit);
    if told {
        cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 0 });
        dump.prepared();
    }
    (other, dump, decision, stream)
}

#[test]
fn a_dump_killed_before_it_killed_the_tree() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    for told in [false, true] {
        let (other, dump, _decision, stream) = another(&proxy, &mut cache, "a", told);
        let pid = other.child.id();
        drop(dump);
        other.kill();
        let (on, abort) = cache.expect::<pb::Abort>(Kind::Abort);
        assert_eq!(
            (on, abort.reason),
            (stream, format!("the dump (pid {pid}) was killed; the tree runs on"))
        );
        let until = Instant::now() + LONG;
        while proxy.status().iter().any(|s| s.state() != State::Failed) {
            assert!(Instant::now() < until);
            // The Ping behind the word is answered.
            cache.socket.set_nonblocking(true).unwrap();
            let pinged = cache.socket.read_exact(&mut [0; HEADER]).is_ok();
            cache.socket.set_nonblocking(false).unwrap();
            if pinged {
                cache.send(&wire::bare(Kind::Pong, 0, 0, 0));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_dump_killed_after_it_killed_the_tree() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    for dump_first in [false, true] {
        let (other, dump, decision, stream) = another(&proxy, &mut cache, "a", true);
        decision.advance(Stage::Begun).unwrap();
        if dump_first {
            // Its kill_guard finishes the work.
            drop(dump);
            other.kill();
            std::thread::sleep(Duration::from_millis(100));
            decision.advance(Stage::Killed).unwrap();
        } else {
            decision.advance(Stage::Killed).unwrap();
            drop(dump);
            other.kill();
        }
        assert_eq!(cache.expect::<pb::Confirm>(Kind::Confirm).0, stream);
        assert_eq!(proxy.until("a", State::Ready).text, "");
        cache.say(Kind::Restored, stream, &pb::Restored { ok: true, ..Default::default() });
        proxy.until("a", State::Restored);
    }
}

#[test]
fn a_tree_that_is_gone_before_the_cache_has_all() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let (other, dump, decision, stream) = another(&proxy, &mut cache, "a", false);
    decision.advance(Stage::Killed).unwrap();
    drop(dump);
    other.kill();
    // Nothing can be confirmed before there is something.
    proxy.until("a", State::Receiving);
    cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 0 });
    assert_eq!(cache.expect::<pb::Confirm>(Kind::Confirm).0, stream);
    proxy.until("a", State::Ready);
}

/// As long as the dump lives it may still kill the tree, and as long as nobody says that all are killed some may run: no
/// word goes out before, however long that takes.
#[test]
fn no_word_before_it_is_certain() {
    // No Ping comes between.
    let proxy = Proxy::start(90 * LONG);
    let mut cache = proxy.cache();
    let (other, dump, decision, stream) = another(&proxy, &mut cache, "a", true);
    let mut silent = || {
        cache.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        assert!(cache.socket.read_exact(&mut [0; HEADER]).is_err());
    };
    drop(dump);
    silent();
    decision.advance(Stage::Begun).unwrap();
    silent();
    other.kill();
    silent();
    decision.advance(Stage::Killed).unwrap();
    cache.socket.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(cache.expect::<pb::Confirm>(Kind::Confirm).0, stream);
}

#[test]
fn a_dump_killed_while_the_connection_is_lost() {
    for gone in [false, true] {
        let proxy = Proxy::start(LONG);
        let mut cache = proxy.cache();
        let (other, dump, decision, _) = another(&proxy, &mut cache, "a", true);
        drop(cache);
        proxy.until("a", State::InDoubt);
        if gone {
            decision.advance(Stage::Killed).unwrap();
        }
        drop(dump);
        other.kill();
        let mut cache = proxy.cache();
        let (stream, resume) = cache.expect::<pb::Resume>(Kind::Resume);
        if gone {
            assert!(matches!(resume.verdict, Some(pb::resume::Verdict::Confirm(_))));
            cache.say(Kind::Prepared, stream, &pb::Prepared { bytes: 0 });
            proxy.until("a", State::Ready);
        } else {
            assert!(matches!(resume.verdict, Some(pb::resume::Verdict::Abort(_))));
            cache.say(Kind::Failed, stream, &pb::Failed::default());
            proxy.until("a", State::Failed);
        }
    }
}

// ---- Refusals.

#[test]
fn a_refusal_reaches_a_dump_that_writes() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    let (stream, _) = cache.begun();
    dump.opened();
    let refusal = pb::Failed { code: FailCode::FailMemory.into(), text: "too large".to_owned() };
    cache.say(Kind::Failed, stream, &refusal);
    // The cache goes on reading, and throws away.
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 20];
        while cache.socket.read(&mut bytes).is_ok_and(|n| n > 0) {}
    });
    let frame = image(1, "x.img", &[vec![0; 200_000]]);
    let error = loop {
        if let Err(error) = dump.pipe.as_mut().unwrap().write_all(&frame) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    assert_eq!(dump.failed(), refusal);
    proxy.until("a", State::Failed);
    drop(proxy);
    reader.join().unwrap();
}

fn kind_255() -> Vec<u8> {
    let mut bytes = [0xff; HEADER];
    wire::seal(&mut bytes);
    bytes.to_vec()
}

#[test]
fn dumps_that_break_the_rules() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let foreign = wire::frame(Kind::Confirm, 0, 0, &pb::Confirm { survives: false });
    let of_another = wire::frame(Kind::ImageBegin, 1, 1, &pb::ImageBegin::default());
    for (bytes, why) in [
        (kind_255(), "bad frame: kind 255"),
        (foreign, "bad frame: Confirm for stream 0 from a dump"),
        (of_another, "bad frame: ImageBegin for stream 1 from a dump"),
        (
            wire::frame(Kind::Commit, 0, 0, &pb::Commit::default()),
            "the dump has not shown what it decides about its tree before the list of images",
        ),
    ] {
        let mut dump = proxy.dump("a");
        let (stream, _) = cache.begun();
        dump.opened();
        dump.write(&bytes);
        let failed = dump.failed();
        assert_eq!((failed.code(), failed.text.as_str()), (FailCode::FailProtocol, why));
        let (on, abort) = cache.expect::<pb::Abort>(Kind::Abort);
        assert_eq!((on, abort.reason.as_str()), (stream, why));
    }
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    dump.write(&[0xff; HEADER]);
    let failed = dump.failed();
    let why = "bad frame: wrong checksum of its header";
    assert_eq!((failed.code(), failed.text.as_str()), (FailCode::FailChecksum, why));
    cache.expect::<pb::Abort>(Kind::Abort);
    // Nothing comes after the list.
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    dump.guard();
    dump.commit();
    dump.write(&wire::bare(Kind::Zero, 0, 1, 1));
    assert_eq!(dump.failed().text, "bad frame: Zero after the list of images");
    cache.expect::<pb::Commit>(Kind::Commit);
    cache.expect::<pb::Abort>(Kind::Abort);
    // A pipe that ends too early, with the socket still open.
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    dump.write(&[1; 3]);
    dump.pipe = None;
    assert_eq!(dump.failed().text, "the dump closed its pipe in the middle of a frame");
    cache.expect::<pb::Abort>(Kind::Abort);
}

/// As many as there may be, all idle: one asks again and again, the others never did.
#[test]
fn idle_processes_do_not_keep_others_out() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    let idle: Vec<Dump> = (0..300).map(|_| Dump::connect(&proxy.path())).collect();
    // The first ones may have had to make room.
    for asker in &idle[280..] {
        asker.send(Request::Status(pb::Empty {}), &[]);
    }
    // Whoever comes is served, and a dump at work is not sent away for it.
    assert_eq!(proxy.status().len(), 1);
    dump.guard();
    dump.commit();
    cache.expect::<pb::Commit>(Kind::Commit);
    drop(idle);
}

#[test]
fn requests_out_of_turn() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let stranger = Dump::connect(&proxy.path());
    for what in [
        Request::Confirm(pb::Confirm { survives: false }),
        Request::Guard(pb::Empty {}),
        Request::Get(pb::Get::default()),
    ] {
        stranger.send(what, &[]);
        assert_eq!(stranger.failed().code(), FailCode::FailProtocol);
    }
    stranger.send(Request::WaitRestored(pb::WaitRestored { name: "no".to_owned(), wait_ms: 1 }), &[]);
    assert_eq!(stranger.failed().code(), FailCode::FailNotFound);
    stranger.send(Request::Open(begin("")), &[]);
    assert_eq!(stranger.failed().code(), FailCode::FailName);
    let mut dump = proxy.dump("a");
    cache.begun();
    dump.opened();
    let null = std::fs::File::open("/dev/null").unwrap();
    dump.send(Request::Guard(pb::Empty {}), &[null.as_fd()]);
    assert!(dump.failed().text.contains("it holds no decision"));
    dump.send(Request::Open(begin("b")), &[]);
    assert_eq!(dump.failed().text, "one connection is for one snapshot");
    dump.confirm();
    assert_eq!(dump.failed().text, "the last word before the cache had all of the snapshot");
    let wait = pb::WaitRestored { name: "a".to_owned(), wait_ms: 1 };
    stranger.send(Request::WaitRestored(wait), &[]);
    assert_eq!(stranger.failed().code(), FailCode::FailTimeout);
    // No message at all.
    nix::unistd::write(&stranger.socket, &[0xff; 9]).unwrap();
    assert_eq!(stranger.failed().text, "this is no request");
    assert!(local::receive::<pb::LocalReply>(stranger.socket.as_fd()).unwrap().is_none());
    proxy.until("a", State::Receiving);
}

#[test]
fn a_process_that_asks_for_nothing_is_dropped() {
    let proxy = Proxy::start(Duration::from_millis(100));
    let silent = Dump::connect(&proxy.path());
    assert!(silent.is_ready(LONG));
    assert!(local::receive::<pb::LocalReply>(silent.socket.as_fd()).unwrap().is_none());
}

#[test]
fn caches_that_break_the_rules() {
    let hello = |version| wire::frame(Kind::Hello, 0, 0, &pb::Hello { version, ..Default::default() });
    let good = [MAGIC.to_vec(), hello(wire::VERSION)].concat();
    let after = |more: Vec<u8>| [good.clone(), more].concat();
    let mut broken = hello(wire::VERSION);
    *broken.last_mut().unwrap() ^= 1;
    let huge = Header { len: MAX_DATA, raw: MAX_DATA, ..Header::data(0, 1, 0, 0) }.encode();
    let refusal = pb::Failed { code: FailCode::FailVersion.into(), text: "too old".to_owned() };
    for (bytes, why) in [
        (b"HTTP/1.1 400 Bad Request".to_vec(), "does not speak this protocol"),
        ([MAGIC.to_vec(), vec![0xff; 24]].concat(), "wrong checksum of its header"),
        ([MAGIC.to_vec(), kind_255()].concat(), "kind 255"),
        ([MAGIC.to_vec(), hello(9)].concat(), "speaks version 9"),
        ([MAGIC.to_vec(), broken].concat(), "wrong checksum"),
        ([MAGIC.to_vec(), wire::frame(Kind::Failed, 0, 0, &refusal)].concat(), "too old"),
        ([MAGIC.to_vec(), wire::bare(Kind::Ping, 0, 0, 0).to_vec()].concat(), "Ping before Hello"),
        (after(huge.to_vec()), "from a cache"),
        (after(hello(1)), "said Hello twice"),
        (after(wire::bare(Kind::Pong, 0, 0, 0).to_vec()), "answers more than it was asked"),
        (after(wire::frame(Kind::Prepared, 77, 0, &pb::Prepared::default())), "for no stream of ours"),
        (after(wire::frame(Kind::Prepared, 1, 0, &pb::Prepared::default())), "that is Offered"),
        (after(wire::frame(Kind::Restored, 1, 0, &pb::Restored::default())), "that is Offered"),
    ] {
        let proxy = Proxy::start(LONG);
        let mut dump = proxy.dump("a");
        proxy.until("a", State::Receiving);
        let mut cache = proxy.lay();
        cache.send(&bytes);
        let failed = loop {
            match dump.receive() {
                (Reply::Opened(_), fds) => dump.pipe = fds.into_iter().next().map(Into::into),
                (Reply::Failed(failed), _) => break failed,
                (other, _) => panic!("{other:?}"),
            }
        };
        assert!(failed.text.contains(why), "{}: {}", why, failed.text);
        cache.closed();
        // The next connection is as good as the first.
        let mut cache = proxy.lay();
        let mut dump = proxy.dump("b");
        cache.greet();
        cache.begun();
        dump.opened();
    }
}

// ---- Many bytes, many dumps.

#[test]
fn a_stalled_dump_holds_up_nobody() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let large = image(1, "x.img", &[vec![9; MAX_DATA as usize]]);
    let fits = image(1, "x.img", &[vec![9; 200_000]]);
    // Inside of a head, of a payload that is waited for in the pipe, of one that is not.
    let mut stalled = Vec::new();
    for (bytes, cut) in [(&large, 40), (&fits, 30_000), (&large, 500_000)] {
        let mut dump = proxy.dump("stalled");
        let (stream, _) = cache.begun();
        dump.opened();
        dump.write(&bytes[..cut]);
        assert_eq!(cache.expect::<pb::ImageBegin>(Kind::ImageBegin).0, stream);
        stalled.push((dump, stream, bytes[cut..].to_vec()));
    }
    let mut dump = proxy.dump("a");
    let (stream, _) = cache.begun();
    dump.opened();
    for _ in 0..50 {
        dump.write(&image(1, "y.img", &[vec![1; 100_000]]));
        let mut ends = 0;
        while ends == 0 {
            let (header, _) = cache.frame();
            ends += u32::from(header.stream == stream && header.kind == Kind::ImageEnd);
            assert_eq!(header.stream, stream);
        }
    }
    // They go on as if nothing had been.
    for (mut dump, stream, rest) in stalled {
        let writer = std::thread::spawn(move || {
            dump.write(&rest);
            dump
        });
        loop {
            let (header, payload) = cache.frame();
            assert_eq!(header.stream, stream);
            assert_eq!(crc::of(&payload), header.crc);
            if header.kind == Kind::ImageEnd {
                break;
            }
        }
        drop(writer.join().unwrap());
        cache.expect::<pb::Abort>(Kind::Abort);
    }
}

#[test]
fn a_stalled_cache_holds_up_the_dump() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    let mut dump = proxy.dump("a");
    let (stream, _) = cache.begun();
    dump.opened();
    let pipe = dump.pipe.take().unwrap();
    let one = image(1, "x.img", &[vec![5; MAX_DATA as usize], vec![6; 200_000]]);
    let rounds = 64;
    let writer = std::thread::spawn(move || {
        let mut pipe = pipe;
        for _ in 0..rounds {
            pipe.write_all(&one).unwrap();
        }
        pipe
    });
    // Full everywhere: what is on the way is a few frames, not the image.
    std::thread::sleep(Duration::from_millis(300));
    assert!(!writer.is_finished());
    let mut ends = 0;
    while ends < rounds {
        let (header, payload) = cache.frame();
        assert_eq!((header.stream, crc::of(&payload)), (stream, header.crc));
        ends += u32::from(header.kind == Kind::ImageEnd);
    }
    drop(writer.join().unwrap());
}

#[test]
fn a_list_longer_than_a_frame() {
    // No Ping comes between.
    let proxy = Proxy::start(90 * LONG);
    let mut cache = proxy.cache();
    let entry = pb::commit::Image { image: 1_999_999, size: 1 << 40, crc32c: u32::MAX };
    let list = pb::Commit { images: vec![entry; 200_000] };
    let bytes = wire::frame(Kind::Commit, 0, 0, &list);
    assert!(bytes.len() > 3 << 20);
    for cut in [None, Some(30), Some(2 << 20)] {
        let mut dump = proxy.dump("a");
        let (stream, _) = cache.begun();
        dump.opened();
        dump.guard();
        let part = bytes[..cut.unwrap_or(bytes.len())].to_vec();
        let writer = std::thread::spawn(move || {
            dump.write(&part);
            dump
        });
        if cut.is_none() {
            assert_eq!(cache.expect::<pb::Commit>(Kind::Commit).1, list);
            writer.join().unwrap().send(Request::Abort(pb::Abort::default()), &[]);
        } else {
            let mut head = [0; HEADER];
            cache.socket.read_exact(&mut head).unwrap();
            let header = Header::decode(&head).unwrap();
            assert_eq!(header.kind, Kind::Commit);
            // It has to wait for the end of the frame.
            let mut other = proxy.dump("b");
            let mut payload = vec![0; header.len as usize];
            let reader = std::thread::spawn(move || {
                cache.socket.read_exact(&mut payload).unwrap();
                (cache, payload)
            });
            let dump = writer.join().unwrap();
            dump.send(Request::Abort(pb::Abort::default()), &[]);
            let (back, payload) = reader.join().unwrap();
            cache = back;
            // The frame is made whole, and cannot be mistaken for what it was to be.
            assert_ne!(crc::of(&payload), header.crc);
            let mut after = [cache.frame().0, cache.frame().0];
            after.sort_by_key(|h| h.stream);
            assert_eq!(after.map(|h| h.kind), [Kind::Abort, Kind::SnapshotBegin]);
            cache.say(Kind::Room, after[1].stream, &pb::Room::default());
            other.opened();
            other.send(Request::Abort(pb::Abort::default()), &[]);
            cache.expect::<pb::Abort>(Kind::Abort);
            continue;
        }
        assert_eq!(cache.expect::<pb::Abort>(Kind::Abort).0, stream);
    }
}

#[test]
fn a_list_that_stops_in_the_middle() {
    let proxy = Proxy::start(Duration::from_millis(400));
    let mut cache = proxy.cache();
    let entry = pb::commit::Image { image: 1_999_999, size: 1 << 40, crc32c: u32::MAX };
    let bytes = wire::frame(Kind::Commit, 0, 0, &pb::Commit { images: vec![entry; 100_000] });
    let mut dump = proxy.dump("a");
    let (stream, _) = cache.begun();
    dump.opened();
    dump.guard();
    dump.write(&bytes[..100_000]);
    assert_eq!(dump.failed().text, "the dump stopped in the middle of the list of images");
    let (header, payload) = cache.frame();
    assert_ne!(crc::of(&payload), header.crc);
    assert_eq!(cache.expect::<pb::Abort>(Kind::Abort).0, stream);
}

/// Any frames a dump may send.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let len = prop_oneof![
        8 => 0usize..100,
        4 => 3000..40_000usize,
        2 => 200_000..300_000usize,
        1 => Just(MAX_DATA as usize),
    ];
    prop::collection::vec((len, any::<u8>()), 0..12).prop_map(|parts| {
        let parts: Vec<_> = parts.into_iter().map(|(len, byte)| vec![byte; len]).collect();
        image(1, "x.img", &parts)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn frames_come_over_however_they_are_cut(
        dumps in prop::collection::vec((frames(), prop::collection::vec(1usize..400_000, 1..8)), 1..5),
    ) {
        let proxy = Proxy::start(LONG);
        let mut cache = proxy.cache();
        let mut sent = std::collections::HashMap::new();
        let (mut opened, mut writers) = (Vec::new(), Vec::new());
        for (bytes, cuts) in dumps {
            let mut dump = proxy.dump("a");
            let (stream, _) = cache.begun();
            dump.opened();
            dump.guard();
            let bytes = [bytes, wire::frame(Kind::Commit, 0, 0, &pb::Commit::default())].concat();
            sent.insert(stream, bytes.clone());
            opened.push((dump, bytes, cuts));
        }
        for (mut dump, bytes, cuts) in opened {
            writers.push(std::thread::spawn(move || {
                let mut rest = &bytes[..];
                for cut in cuts.into_iter().cycle() {
                    let (now, later) = rest.split_at(cut.min(rest.len()));
                    dump.write(now);
                    rest = later;
                    if rest.is_empty() {
                        return dump;
                    }
                }
                dump
            }));
        }
        let mut came = std::collections::HashMap::<u32, Vec<u8>>::new();
        let mut commits = 0;
        while commits < sent.len() {
            let (header, payload) = cache.frame();
            let bytes = came.entry(header.stream).or_default();
            bytes.extend(Header { stream: 0, ..header }.encode());
            bytes.extend(payload);
            commits += usize::from(header.kind == Kind::Commit);
        }
        prop_assert!(came == sent);
        let dumps: Vec<Dump> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        for dump in &dumps {
            dump.send(Request::Abort(pb::Abort::default()), &[]);
        }
        for _ in &dumps {
            cache.expect::<pb::Abort>(Kind::Abort);
        }
    }
}

#[test]
fn a_long_list_comes_in_parts() {
    let proxy = Proxy::start(LONG);
    let mut cache = proxy.cache();
    for number in 0..100 {
        let mut dump = proxy.dump(&format!("{number}{}", "x".repeat(1000)));
        cache.begun();
        dump.opened();
        dump.send(Request::Abort(pb::Abort { reason: "y".repeat(5000) }), &[]);
        cache.expect::<pb::Abort>(Kind::Abort);
    }
    let all = proxy.status();
    assert_eq!(all.len(), 100);
    assert!(all.iter().all(|s| s.text.starts_with("yyy")));
}

#[test]
fn told_to_end_it_settles_what_it_can() {
    let proxy = Proxy::with(LONG, LONG, false);
    let mut cache = proxy.cache();
    let (last, stream) = prepared(&proxy, &mut cache, "last");
    let mut dump = proxy.dump("a");
    let (early, _) = cache.begun();
    dump.opened();
    nix::unistd::write(&proxy.stop, b"x").unwrap();
    assert_eq!(dump.failed().text, "image-proxy was told to end");
    assert_eq!(cache.expect::<pb::Abort>(Kind::Abort).0, early);
    // This dump may be killing its tree.
    last.confirm();
    assert_eq!(cache.expect::<pb::Confirm>(Kind::Confirm).0, stream);
    let answers = std::thread::spawn(move || {
        let mut bytes = [0; HEADER];
        while cache.socket.read_exact(&mut bytes).is_ok() {
            let _ = cache.socket.write_all(&wire::bare(Kind::Pong, 0, 0, 0));
        }
    });
    assert_eq!(proxy.join(), Ended::Well);
    answers.join().unwrap();
}

#[test]
fn a_dump_waits_for_its_turn() {
    let proxy = Proxy::start(Duration::from_secs(3));
    let mut cache = proxy.cache();
    let dump = proxy.dump("a");
    let (stream, _) = cache.offered();
    assert!(!dump.is_ready(Duration::from_millis(50)), "nobody has said that there is room");
    let place = |dump: &Dump| match dump.receive().0 {
        Reply::Queue(queue) => queue.place,
        other => panic!("{other:?}"),
    };
    cache.say(Kind::Queue, stream, &pb::Queue { place: 2, ..Default::default() });
    assert_eq!(place(&dump), 2);
    // Again as long as the cache answers.
    for _ in 0..3 {
        assert_eq!(cache.raw().0.kind, Kind::Ping);
        cache.send(&wire::bare(Kind::Pong, 0, 0, 0));
        assert_eq!(place(&dump), 2);
    }
    cache.say(Kind::Room, stream, &pb::Room { lacks: vec!["pid 7 is taken".to_owned()] });
    let _pipe = loop {
        match dump.receive() {
            (Reply::Opened(opened), fds) => {
                assert_eq!(opened.lacks, ["pid 7 is taken"]);
                break fds;
            }
            (Reply::Queue(_), _) => {}
            (other, _) => panic!("{other:?}"),
        }
    };
    // Who waits and gives up is forgotten there too.
    let other = proxy.dump("b");
    let (stream, _) = cache.offered();
    drop(other);
    assert_eq!(cache.expect::<pb::Abort>(Kind::Abort).0, stream);
}
