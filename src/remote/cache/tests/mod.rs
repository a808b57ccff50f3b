//! Scripted sources and commands at the ends of socket pairs. One thread plays all parts, so that what happens
//! next is never a matter of luck.

mod hostile;
mod life;
mod limit;
mod offers;
mod owners;
mod quota;
mod readers;
mod sizes;
mod strangers;
mod whole;

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;

use super::ledger::What;
use super::{Cache, Limits};
use crate::image::ImageFile;
use crate::remote::net::Stream;
use crate::remote::pb::snapshot_info::State;
use crate::remote::pb::{self, FailCode, local_reply, local_request};
use crate::remote::wire::{self, HEADER, Header, Kind, MAGIC, Sum};
use crate::remote::{Failure, crc, local};
use crate::tracee::{Decision, Stage};

/// Longer than any test may wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);
/// The time-out of caches that are not to be seen waiting.
const LONG: Duration = Duration::from_secs(600);

/// A cache and what belongs to no socket.
struct Bench {
    cache: Cache,
}

/// The other end of a connection from a source.
struct Peer {
    socket: UnixStream,
    came: Vec<u8>,
    greeted: bool,
    /// Streams whose offers were taken, and what was said with that.
    rooms: Vec<(u32, pb::Room)>,
}

/// The other end of a command's connection.
struct Command {
    socket: OwnedFd,
}

fn seqpacket() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
}

impl Bench {
    fn new() -> Self {
        Self::with(None, LONG)
    }

    fn with(max: Option<u64>, timeout: Duration) -> Self {
        Self::limited(Limits::new(max, max, 40_000), timeout)
    }

    fn limited(limits: Limits, timeout: Duration) -> Self {
        Self { cache: Cache::new(limits, timeout, "in a test".to_owned()).unwrap() }
    }

    /// Bytes of frames that have not come whole, and of answers that are not read.
    fn buffered(&mut self) -> u64 {
        self.cache.snapshots().ledger().used(What::Buffers)
    }

    /// Lets the cache do what it can do now.
    fn run(&mut self) {
        // Twice: what one turn leads to may be seen in the next.
        for _ in 0..2 {
            self.cache.turn(Some(Instant::now())).unwrap();
        }
    }

    /// Lets it work until something is there.
    fn until<T>(&mut self, what: &str, mut is_there: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = is_there(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "waiting for {what}");
            self.cache.turn(Some(Instant::now() + Duration::from_millis(5))).unwrap();
        }
    }

    /// A connection that has said nothing yet.
    fn stranger(&mut self) -> Peer {
        self.stranger_at("a local socket")
    }

    fn stranger_at(&mut self, origin: &str) -> Peer {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let stream = Stream::new(theirs.into(), "a test".to_owned(), LONG).unwrap().from(origin);
        self.cache.add_source(stream).unwrap();
        Peer { socket: ours, came: Vec::new(), greeted: false, rooms: Vec::new() }
    }

    /// A connection that has said Hello.
    fn source(&mut self) -> Peer {
        self.source_at("a local socket")
    }

    /// The same from another host.
    fn source_at(&mut self, origin: &str) -> Peer {
        let mut peer = self.stranger_at(origin);
        self.send(&mut peer, &hello(wire::VERSION));
        let (header, _) = self.frame(&mut peer);
        assert_eq!(header.kind, Kind::Hello);
        peer
    }

    fn send(&mut self, peer: &mut Peer, bytes: &[u8]) {
        let mut left = bytes;
        let deadline = Instant::now() + PATIENCE;
        while !left.is_empty() {
            match peer.socket.write(left) {
                Ok(count) => left = &left[count..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
            assert!(Instant::now() < deadline, "the cache does not read");
            self.cache.turn(Some(Instant::now())).unwrap();
        }
        self.run();
    }

    /// The next frame from the cache that does not say that there is room.
    fn frame(&mut self, peer: &mut Peer) -> (Header, Vec<u8>) {
        self.until("a frame", |_| peer.next())
    }

    fn no_frame(&mut self, peer: &mut Peer) {
        self.run();
        let next = peer.next();
        assert!(next.is_none(), "{next:?}");
    }

    fn prepared(&mut self, peer: &mut Peer, stream: u32) -> pb::Prepared {
        let (header, payload) = self.frame(peer);
        assert_eq!(
            (header.kind, header.stream),
            (Kind::Prepared, stream),
            "{:?}",
            failure(&header, &payload)
        );
        wire::message(&header, &payload).unwrap()
    }

    fn failed(&mut self, peer: &mut Peer, stream: u32) -> Failure {
        let (header, payload) = self.frame(peer);
        assert_eq!((header.kind, header.stream), (Kind::Failed, stream));
        failure(&header, &payload).unwrap()
    }

    fn restored(&mut self, peer: &mut Peer, stream: u32) -> pb::Restored {
        self.message(peer, Kind::Restored, stream)
    }

    /// The next frame from the cache, which is of this kind.
    fn message<M: prost::Message + Default>(&mut self, peer: &mut Peer, kind: Kind, stream: u32) -> M {
        let (header, payload) = self.frame(peer);
        assert_eq!((header.kind, header.stream), (kind, stream), "{:?}", failure(&header, &payload));
        wire::message(&header, &payload).unwrap()
    }

    /// Brings a snapshot as far as Prepared.
    fn prepare(&mut self, peer: &mut Peer, script: Script) {
        let stream = script.stream;
        self.send(peer, &script.commit());
        self.prepared(peer, stream);
    }

    /// Brings a snapshot as far as READY.
    fn bring(&mut self, peer: &mut Peer, script: Script) {
        let stream = script.stream;
        self.prepare(peer, script);
        self.send(peer, &confirm(stream));
    }

    fn command(&mut self) -> Command {
        self.command_of(i32::try_from(std::process::id()).unwrap())
    }

    fn command_of(&mut self, pid: i32) -> Command {
        let (ours, theirs) = seqpacket();
        let process = crate::sys::pidfd::open(pid, 0).unwrap();
        self.cache.add_client(theirs, pid, Some(process)).unwrap();
        Command { socket: ours }
    }

    /// The answer to a request.
    fn ask(&mut self, command: &Command, what: local_request::What) -> (local_reply::What, Vec<OwnedFd>) {
        command.say(what);
        self.answer(command)
    }

    fn answer(&mut self, command: &Command) -> (local_reply::What, Vec<OwnedFd>) {
        self.until("an answer", |_| command.next())
    }

    fn no_answer(&mut self, command: &Command) {
        self.run();
        let next = command.next();
        assert!(next.is_none(), "{next:?}");
    }

    fn refused(&mut self, command: &Command, what: local_request::What) -> Failure {
        match self.ask(command, what).0 {
            local_reply::What::Failed(failed) => failed.into(),
            other => panic!("{other:?}"),
        }
    }

    fn done(&mut self, command: &Command, what: local_request::What) {
        let (reply, _) = self.ask(command, what);
        assert_eq!(reply, local_reply::What::Done(pb::Empty {}));
    }

    /// A restore that has taken a snapshot.
    fn take(&mut self, name: &str) -> Command {
        let command = self.command();
        match self.ask(&command, get(name)).0 {
            local_reply::What::Snapshot(info) => assert_eq!(info.name, name),
            other => panic!("{other:?}"),
        }
        command
    }

    fn read(&mut self, command: &Command, name: &str) -> Vec<u8> {
        contents(&self.open(command, name, 0))
    }

    fn open(&mut self, command: &Command, name: &str, generation: u32) -> ImageFile {
        let (reply, mut fds) = self.ask(command, read(name, generation));
        let local_reply::What::Image(info) = reply else { panic!("{reply:?}") };
        assert_eq!((info.name.as_str(), info.complete), (name, true));
        ImageFile::part(File::from(fds.pop().unwrap()), info.offset, info.size)
    }

    fn status(&mut self) -> (Vec<pb::SnapshotInfo>, String) {
        let command = self.command();
        command.say(local_request::What::Status(pb::Empty {}));
        let mut all = Vec::new();
        loop {
            let (reply, _) = self.answer(&command);
            let local_reply::What::Snapshots(page) = reply else { panic!("{reply:?}") };
            all.extend(page.snapshots);
            if !page.more {
                return (all, page.daemon);
            }
        }
    }

    /// The newest snapshot of a name.
    fn info(&mut self, name: &str) -> pb::SnapshotInfo {
        let (all, _) = self.status();
        all.into_iter().rev().find(|info| info.name == name).unwrap()
    }

    fn state(&mut self, name: &str) -> State {
        self.info(name).state()
    }

    fn wait_state(&mut self, name: &str, state: State) -> pb::SnapshotInfo {
        self.until(&format!("{name} to be {state:?}"), |bench| {
            let (all, _) = bench.status();
            all.into_iter().rev().find(|info| info.name == name && info.state() == state)
        })
    }
}

impl Peer {
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut more = [0; 4096];
        while let Ok(count @ 1..) = self.socket.read(&mut more) {
            self.came.extend_from_slice(&more[..count]);
        }
        if !self.greeted && self.came.len() >= MAGIC.len() {
            assert_eq!(self.came[..MAGIC.len()], MAGIC);
            self.came.drain(..MAGIC.len());
            self.greeted = true;
        }
        let header = Header::decode(self.came.get(..HEADER)?.try_into().unwrap()).unwrap();
        let end = HEADER + header.len as usize;
        let payload = self.came.get(HEADER..end)?.to_vec();
        self.came.drain(..end);
        if header.kind == Kind::Room {
            self.rooms.push((header.stream, wire::message(&header, &payload).unwrap()));
            return self.next();
        }
        Some((header, payload))
    }

    /// Whether the cache has closed its end.
    fn is_closed(&mut self) -> bool {
        let mut more = [0; 4096];
        loop {
            match self.socket.read(&mut more) {
                Ok(0) => return true,
                Ok(count) => self.came.extend_from_slice(&more[..count]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => return true,
            }
        }
    }
}

impl Command {
    fn say(&self, what: local_request::What) {
        self.say_with(what, &[]);
    }

    fn say_with(&self, what: local_request::What, fds: &[&OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        local::send(self.socket.as_fd(), &pb::LocalRequest { what: Some(what) }, &fds).unwrap();
    }

    fn next(&self) -> Option<(local_reply::What, Vec<OwnedFd>)> {
        let packet = local::receive::<pb::LocalReply>(self.socket.as_fd()).ok()??;
        Some((packet.message.what.unwrap(), packet.fds))
    }

    fn is_closed(&self) -> bool {
        matches!(local::receive::<pb::LocalReply>(self.socket.as_fd()), Ok(None))
    }
}

/// A snapshot as frames.
#[derive(Clone)]
struct Script {
    stream: u32,
    frames: Vec<u8>,
    images: Vec<pb::commit::Image>,
    last: u32,
    inventory: bool,
}

/// A piece of an image.
enum Part<'a> {
    Data(&'a [u8]),
    Lz4(&'a [u8]),
    Zeros(u64),
}

thread_local! {
    /// What was drawn last for each name; every test has a thread of its own.
    static DRAWN: RefCell<HashMap<String, u64>> = RefCell::default();
}

/// The number of the last snapshot of this name.
fn drawn(name: &str) -> u64 {
    DRAWN.with_borrow(|drawn| drawn[name])
}

fn begin(name: &str) -> pb::SnapshotBegin {
    // Always as long when it is written.
    let id = crate::remote::draw() | 1 << 63;
    DRAWN.with_borrow_mut(|drawn| drawn.insert(name.to_owned(), id));
    pb::SnapshotBegin {
        name: name.to_owned(),
        pid: 77,
        comm: "counter".to_owned(),
        host: "there".to_owned(),
        created: 1,
        id,
        before_pages: "inventory.img".to_owned(),
        ..Default::default()
    }
}

impl Script {
    fn new(stream: u32, name: &str) -> Self {
        Self::from(stream, &begin(name))
    }

    fn from(stream: u32, begin: &pb::SnapshotBegin) -> Self {
        let frames = wire::frame(Kind::SnapshotBegin, stream, 0, begin);
        Self { stream, frames, images: Vec::new(), last: 0, inventory: false }
    }

    fn image_begin(&mut self, name: &str) -> u32 {
        self.last += 1;
        self.inventory |= name == "inventory.img";
        let begin = pb::ImageBegin { name: name.to_owned(), expected_bytes: 0 };
        self.frames.extend(wire::frame(Kind::ImageBegin, self.stream, self.last, &begin));
        self.last
    }

    fn part(&mut self, image: u32, part: &Part<'_>, sum: &mut Sum) {
        match part {
            Part::Data(bytes) => {
                for bytes in bytes.chunks(wire::MAX_DATA as usize) {
                    let crc = crc::of(bytes);
                    let len = u32::try_from(bytes.len()).unwrap();
                    self.frames.extend(Header::data(self.stream, image, len, crc).encode());
                    self.frames.extend_from_slice(bytes);
                    sum.push(len, crc);
                }
            }
            Part::Lz4(bytes) => {
                let block = lz4_flex::block::compress(bytes);
                let (crc, raw) = (crc::of(bytes), u32::try_from(bytes.len()).unwrap());
                let len = u32::try_from(block.len()).unwrap();
                let header = Header { flags: wire::LZ4, len, ..Header::data(self.stream, image, raw, crc) };
                self.frames.extend(header.encode());
                self.frames.extend_from_slice(&block);
                sum.push(raw, crc);
            }
            Part::Zeros(len) => {
                let mut left = *len;
                while left > 0 {
                    let now = u32::try_from(left.min(wire::MAX_DATA.into())).unwrap();
                    self.frames.extend(wire::bare(Kind::Zero, self.stream, image, now));
                    sum.push(now, wire::crc_of_zeros(now));
                    left -= u64::from(now);
                }
            }
        }
    }

    fn image_end(&mut self, image: u32, sum: Sum) {
        let end = pb::ImageEnd { size: sum.size, crc32c: sum.crc };
        self.frames.extend(wire::frame(Kind::ImageEnd, self.stream, image, &end));
        self.images.push(pb::commit::Image { image, size: sum.size, crc32c: sum.crc });
    }

    fn parts(mut self, name: &str, parts: &[Part<'_>]) -> Self {
        let image = self.image_begin(name);
        let mut sum = Sum::default();
        for part in parts {
            self.part(image, part, &mut sum);
        }
        self.image_end(image, sum);
        self
    }

    fn image(self, name: &str, bytes: &[u8]) -> Self {
        self.parts(name, &[Part::Data(bytes)])
    }

    fn commit(mut self) -> Vec<u8> {
        if !self.inventory {
            self = self.image("inventory.img", b"inventory");
        }
        self.commit_as_it_is()
    }

    fn commit_as_it_is(mut self) -> Vec<u8> {
        let commit = pb::Commit { images: self.images };
        self.frames.extend(wire::frame(Kind::Commit, self.stream, 0, &commit));
        self.frames
    }
}

/// One that may come twice.
fn unnumbered(stream: u32, name: &str) -> Script {
    let begin = pb::SnapshotBegin { id: 0, ..begin(name) };
    Script::from(stream, &begin).image("inventory.img", b"inventory")
}

/// A small whole one.
fn small(stream: u32, name: &str) -> Script {
    Script::new(stream, name).image("inventory.img", b"inventory").image("empty.img", b"")
}

/// The same from a source that ends its tree last.
fn run_first(stream: u32, name: &str) -> Script {
    let begin = pb::SnapshotBegin { run_first: true, ..begin(name) };
    Script::from(stream, &begin).image("inventory.img", b"inventory").image("empty.img", b"")
}

fn hello(version: u32) -> Vec<u8> {
    let hello = pb::Hello { version, host: "there".to_owned(), timeout_ms: 10, ..Default::default() };
    [&MAGIC[..], &wire::frame(Kind::Hello, 0, 0, &hello)].concat()
}

fn confirm(stream: u32) -> Vec<u8> {
    wire::frame(Kind::Confirm, stream, 0, &pb::Confirm { survives: false })
}

fn survive(stream: u32) -> Vec<u8> {
    wire::frame(Kind::Confirm, stream, 0, &pb::Confirm { survives: true })
}

fn abort(stream: u32) -> Vec<u8> {
    wire::frame(Kind::Abort, stream, 0, &pb::Abort { reason: "changed its mind".to_owned() })
}

fn failure(header: &Header, payload: &[u8]) -> Option<Failure> {
    (header.kind == Kind::Failed).then(|| pb::Failed::decode(payload).unwrap().into())
}

fn get(name: &str) -> local_request::What {
    get_within(name, 0)
}

fn get_within(name: &str, wait_ms: u64) -> local_request::What {
    local_request::What::Get(pb::Get { name: name.to_owned(), id: 0, wait_ms, early: false })
}

fn get_early(name: &str) -> local_request::What {
    local_request::What::Get(pb::Get { name: name.to_owned(), id: 0, wait_ms: 0, early: true })
}

fn read(name: &str, generation: u32) -> local_request::What {
    let read = pb::ReadImage { name: name.to_owned(), generation, ..Default::default() };
    local_request::What::ReadImage(read)
}

fn drop_it(name: &str, force: bool) -> local_request::What {
    local_request::What::Drop(pb::Drop { name: name.to_owned(), force })
}

fn release(name: &str) -> local_request::What {
    local_request::What::Release(pb::Release { name: name.to_owned() })
}

fn ran(pid: i32) -> local_request::What {
    local_request::What::Ran(pb::Ran { pid })
}

fn give_up() -> local_request::What {
    local_request::What::GiveUp(pb::Abort { reason: "no memory".to_owned() })
}

fn contents(image: &ImageFile) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(image.len()).unwrap()];
    image.read_exact_at(&mut all, 0).unwrap();
    all
}

/// Bytes that repeat late.
fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    })
    .take(len)
    .collect()
}

/// A process that waits to be killed, as the root of a restored tree.
struct Root(std::process::Child);

impl Root {
    fn new() -> Self {
        Self::of("exec sleep 1000")
    }

    fn of(script: &str) -> Self {
        let mut command = std::process::Command::new("sh");
        Self(command.args(["-c", script]).stdin(std::process::Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    fn pidfd(&self) -> OwnedFd {
        crate::sys::pidfd::open(self.pid(), 0).unwrap()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The restore is about to let its tree go; what it decides about it.
fn starting(bench: &mut Bench, command: &Command, root: &Root) -> Decision {
    let decision = say_starting(command, root);
    assert_eq!(bench.answer(command).0, local_reply::What::Done(pb::Empty {}));
    decision
}

fn say_starting(command: &Command, root: &Root) -> Decision {
    let decision = Decision::new().unwrap();
    let fds = [&root.pidfd(), &decision.as_fd().try_clone_to_owned().unwrap()];
    command.say_with(local_request::What::Starting(pb::Empty {}), &fds);
    decision
}

/// What a failure's code is, for assertions that show the text.
fn code(failure: &Failure) -> FailCode {
    failure.code
}

fn resume(stream: u32, name: &str, id: u64, verdict: pb::resume::Verdict) -> Vec<u8> {
    let resume = pb::Resume { name: name.to_owned(), id, verdict: Some(verdict), journal: 0 };
    wire::frame(Kind::Resume, stream, 0, &resume)
}

fn yes() -> pb::resume::Verdict {
    pb::resume::Verdict::Confirm(pb::Confirm { survives: false })
}

fn no() -> pb::resume::Verdict {
    pb::resume::Verdict::Abort(pb::Abort { reason: "it runs on".to_owned() })
}

fn go(stream: u32) -> Vec<u8> {
    wire::frame(Kind::Go, stream, 0, &pb::Go {})
}

fn go_again() -> pb::resume::Verdict {
    pb::resume::Verdict::Go(pb::Go {})
}

/// A restore that has all but let the tree go.
fn armed(bench: &mut Bench, peer: &mut Peer, name: &str) -> (Command, Root) {
    bench.prepare(peer, run_first(1, name));
    let restore = bench.take(name);
    let root = Root::new();
    say_starting(&restore, &root);
    let armed: pb::Armed = bench.message(peer, Kind::Armed, 1);
    assert_eq!(armed.pid, root.pid());
    bench.no_answer(&restore);
    assert_eq!(bench.state(name), State::Armed);
    (restore, root)
}
