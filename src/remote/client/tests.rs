//! A dump's end against a cache that is played by a thread, byte for byte.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::unistd::Pid;

use super::super::wire::{self, HEADER, Header, Kind, LZ4, MAGIC, Sum};
use super::super::{Failure, crc, pb, pb::FailCode};
use super::RemoteDump;
use crate::image::{ImageKind, Store, TypedStore, pb as images};
use crate::pages::copy::{Source, Span, copy};
use crate::pages::pagemap::{PRESENT, Run};
use crate::pages::{PAGE, PagemapWriter, PagesError};
use crate::settings::{DumpSettings, NetSettings, RemoteSettings};

const PAGES: u64 = 3000;

/// What the played cache does instead of its duty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Twist {
    None,
    RefuseName,
    RefuseCommit,
    CloseAfterFrames(usize),
    SayNothing,
    /// Has the source wait for so many Pings.
    Queue(usize),
    /// Reads no more once there is room, as behind a cable that is cut.
    Stop,
}

/// What it got.
#[derive(Debug, Default)]
struct Got {
    images: BTreeMap<String, Vec<u8>>,
    verdict: Option<Kind>,
    zero_frames: usize,
    lz4_frames: usize,
}

struct Peer {
    stream: TcpStream,
    names: BTreeMap<u32, (String, Vec<u8>, Sum)>,
    got: Got,
}

impl Peer {
    fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).ok()?;
        let header = Header::decode(&header).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some((header, payload))
    }

    fn say<M: prost::Message>(&mut self, kind: Kind, message: &M) {
        let stream = if kind == Kind::Hello { 0 } else { 1 };
        self.stream.write_all(&wire::frame(kind, stream, 0, message)).unwrap();
    }

    fn play(mut self, twist: Twist) -> Got {
        let mut magic = [0; MAGIC.len()];
        self.stream.read_exact(&mut magic).unwrap();
        assert_eq!(magic, MAGIC);
        let (hello, _) = self.frame().unwrap();
        assert_eq!(hello.kind, Kind::Hello);
        if twist == Twist::SayNothing {
            while self.frame().is_some() {}
            return self.got;
        }
        self.stream.write_all(&MAGIC).unwrap();
        let hello = pb::Hello {
            version: wire::VERSION,
            features: wire::FEATURE_LZ4,
            timeout_ms: 30_000,
            ..Default::default()
        };
        self.say(Kind::Hello, &hello);
        let mut frames = 0;
        while let Some((header, payload)) = self.frame() {
            frames += 1;
            if twist == Twist::CloseAfterFrames(frames) {
                return self.got;
            }
            self.take(twist, header, &payload);
            if twist == Twist::Stop {
                std::mem::forget(self.stream.try_clone().unwrap());
                return self.got;
            }
        }
        self.got
    }

    fn take(&mut self, twist: Twist, header: Header, payload: &[u8]) {
        match header.kind {
            Kind::SnapshotBegin if twist == Twist::RefuseName => {
                self.say(Kind::Failed, &failed(FailCode::FailExists));
            }
            Kind::SnapshotBegin => {
                if let Twist::Queue(pings) = twist {
                    self.say(Kind::Queue, &pb::Queue { place: 1, ..Default::default() });
                    for _ in 0..pings {
                        assert_eq!(self.frame().unwrap().0.kind, Kind::Ping);
                        self.stream.write_all(&wire::bare(Kind::Pong, 0, 0, 0)).unwrap();
                    }
                }
                self.say(Kind::Room, &pb::Room::default());
            }
            Kind::ImageBegin => {
                let begin: pb::ImageBegin = wire::message(&header, payload).unwrap();
                let new = self.names.insert(header.image, (begin.name, Vec::new(), Sum::default()));
                assert!(new.is_none());
            }
            Kind::Data | Kind::Zero => {
                let raw = header.raw as usize;
                let bytes = match header.kind {
                    Kind::Zero => vec![0; raw],
                    _ if header.flags & LZ4 != 0 => lz4_flex::block::decompress(payload, raw).unwrap(),
                    _ => payload.to_vec(),
                };
                self.got.zero_frames += usize::from(header.kind == Kind::Zero);
                self.got.lz4_frames += usize::from(header.flags & LZ4 != 0);
                assert_eq!((bytes.len(), crc::of(&bytes)), (raw, header.crc));
                let (_, content, sum) = self.names.get_mut(&header.image).unwrap();
                content.extend(bytes);
                sum.push(header.raw, header.crc);
            }
            Kind::ImageEnd => {
                let end: pb::ImageEnd = wire::message(&header, payload).unwrap();
                let (name, content, sum) = self.names.get_mut(&header.image).unwrap();
                assert_eq!((end.size, end.crc32c), (sum.size, sum.crc), "{name}");
                assert_eq!(sum.size, content.len() as u64);
                self.got.images.insert(name.clone(), std::mem::take(content));
            }
            Kind::Commit if twist == Twist::RefuseCommit => {
                self.say(Kind::Failed, &failed(FailCode::FailMemory));
            }
            Kind::Commit => {
                let commit: pb::Commit = wire::message(&header, payload).unwrap();
                assert_eq!(commit.images.len(), self.got.images.len());
                self.say(Kind::Prepared, &pb::Prepared { bytes: 1 });
            }
            Kind::Ping => self.stream.write_all(&wire::bare(Kind::Pong, 0, 0, 0)).unwrap(),
            Kind::Confirm | Kind::Abort => self.got.verdict = Some(header.kind),
            _ => {}
        }
    }
}

fn failed(code: FailCode) -> pb::Failed {
    Failure::new(code, "no, for this reason").into()
}

fn cache(twist: Twist) -> (u16, JoinHandle<Got>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let played = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        Peer { stream, names: BTreeMap::new(), got: Got::default() }.play(twist)
    });
    (port, played)
}

fn connect(port: u16, compress: bool, timeout: Duration) -> Result<RemoteDump, Failure> {
    let net =
        NetSettings { address: Some("127.0.0.1".to_owned()), port, ps_socket: None, tls: None, timeout };
    let remote = RemoteSettings {
        snapshot: "one".to_owned(),
        direct: Some(net),
        work_dir: ".".into(),
        compress,
        timeout,
        wait_snapshot: timeout,
        wait_restored: None,
        snapshot_id: 0,
        free_as_read: false,
    };
    RemoteDump::connect(&remote, &DumpSettings::new(Pid::this(), Path::new(".")), false)
}

/// Pages: a third zero, a third alike, a third random.
struct Made;

fn page(addr: u64) -> Vec<u8> {
    let number = addr / PAGE;
    let mut state = number;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    match number / 50 % 3 {
        0 => vec![0; PAGE as usize],
        1 => vec![number as u8 | 1; PAGE as usize],
        _ => (0..PAGE).map(|_| random()).collect(),
    }
}

impl Source for Made {
    fn read(&self, spans: &[Span], into: &mut [u8]) -> Result<(), PagesError> {
        let addrs = spans.iter().flat_map(|s| (s.run.start..s.run.end()).step_by(PAGE as usize));
        for (addr, into) in addrs.zip(into.chunks_mut(PAGE as usize)) {
            into.copy_from_slice(&page(addr));
        }
        Ok(())
    }
}

fn write_pages(store: &dyn Store) -> anyhow::Result<()> {
    let run = Run { start: 0x10_0000, pages: PAGES, flags: PRESENT };
    let spans = [Ok(Span { run, zero_is_absent: false, unreadable: false })];
    let pagemap = PagemapWriter::create(store, ImageKind::Pagemap, 1, 1)?;
    copy(&Made, spans.into_iter(), Some(pagemap), store.create_pages("pages-1.img", 0)?, 1)?;
    Ok(())
}

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn images_arrive_as_they_were_written() {
    for compress in [false, true] {
        let (port, played) = cache(Twist::None);
        let store = connect(port, compress, PATIENCE).unwrap();
        store.write_all(ImageKind::Pstree, None, &[] as &[images::PstreeEntry]).unwrap();
        let entry = images::PstreeEntry { pid: 7, threads: (0..200_000).collect(), ..Default::default() };
        store.write_one(ImageKind::Mm, 3, &entry).unwrap();
        let mut empty = store.create_raw("empty.img").unwrap();
        empty.end().unwrap();
        drop(empty);
        write_pages(&store).unwrap();
        store.commit().unwrap();
        store.confirm(false).unwrap();
        drop(store);
        let got = played.join().unwrap();
        assert_eq!(got.verdict, Some(Kind::Confirm));
        assert!(got.images["empty.img"].is_empty());
        assert_eq!(got.images["pstree.img"].len(), 8);
        assert!(got.images["mm-3.img"].len() > 200_000);
        let want: Vec<u8> = (0..PAGES).flat_map(|i| page(0x10_0000 + i * PAGE)).collect();
        assert!(got.images["pages-1.img"] == want, "compress: {compress}");
        assert!(got.zero_frames > 0);
        assert_eq!(got.lz4_frames > 0, compress);
    }
}

#[test]
fn a_name_that_is_taken_is_known_before_the_first_image() {
    let (port, played) = cache(Twist::RefuseName);
    let failure = connect(port, false, PATIENCE).unwrap_err();
    assert_eq!((failure.code, failure.text.as_str()), (FailCode::FailExists, "no, for this reason"));
    played.join().unwrap();
}

#[test]
fn a_refused_commit_is_no_commit() {
    let (port, played) = cache(Twist::RefuseCommit);
    let store = connect(port, false, PATIENCE).unwrap();
    write_pages(&store).unwrap();
    let error = format!("{:#}", anyhow::Error::from(store.commit().unwrap_err()));
    assert!(error.contains("no, for this reason"), "{error}");
    drop(store);
    assert_ne!(played.join().unwrap().verdict, Some(Kind::Confirm));
}

#[test]
fn what_is_dropped_is_aborted() {
    let (port, played) = cache(Twist::None);
    let store = connect(port, false, PATIENCE).unwrap();
    write_pages(&store).unwrap();
    drop(store);
    assert_eq!(played.join().unwrap().verdict, Some(Kind::Abort));
}

#[test]
fn what_is_complete_is_not_thrown_away_without_a_word() {
    let (port, played) = cache(Twist::None);
    let store = connect(port, false, PATIENCE).unwrap();
    write_pages(&store).unwrap();
    store.commit().unwrap();
    drop(store);
    assert_eq!(played.join().unwrap().verdict, None);
    let (port, played) = cache(Twist::None);
    let store = connect(port, false, PATIENCE).unwrap();
    write_pages(&store).unwrap();
    store.commit().unwrap();
    store.withdraw().unwrap();
    drop(store);
    assert_eq!(played.join().unwrap().verdict, Some(Kind::Abort));
}

#[test]
fn an_image_without_its_end_prevents_the_commit() {
    let (port, played) = cache(Twist::None);
    let store = connect(port, false, PATIENCE).unwrap();
    drop(store.create_raw("half.img").unwrap());
    assert!(store.commit().is_err());
    drop(store);
    assert_eq!(played.join().unwrap().verdict, Some(Kind::Abort));
}

#[test]
fn a_lost_connection_is_an_error_of_whatever_comes_next() {
    for frames in [3, 4, 10] {
        let (port, played) = cache(Twist::CloseAfterFrames(frames));
        let store = connect(port, false, PATIENCE).unwrap();
        let result = write_pages(&store).and_then(|()| Ok(store.commit()?));
        let error = format!("{:#}", result.unwrap_err());
        assert!(error.contains("127.0.0.1"), "{error}");
        drop(store);
        played.join().unwrap();
    }
}

#[test]
fn a_peer_that_says_nothing_is_given_up() {
    let (port, played) = cache(Twist::SayNothing);
    let failure = connect(port, false, Duration::from_millis(300)).unwrap_err();
    assert_eq!(failure.code, FailCode::FailTimeout, "{failure}");
    played.join().unwrap();
}

#[test]
fn a_dump_waits_for_its_turn_as_long_as_the_cache_is_there() {
    // Longer than it waits for anything else.
    let timeout = Duration::from_millis(600);
    let (port, played) = cache(Twist::Queue(12));
    let begun = std::time::Instant::now();
    let store = connect(port, false, timeout).unwrap();
    assert!(begun.elapsed() >= timeout * 3, "{:?}", begun.elapsed());
    drop(store);
    assert_eq!(played.join().unwrap().verdict, Some(Kind::Abort));
}

#[test]
fn a_cut_is_noticed_within_the_time_out() {
    let timeout = Duration::from_secs(2);
    for busy in [true, false] {
        let (port, played) = cache(Twist::Stop);
        let store = connect(port, false, timeout).unwrap();
        played.join().unwrap();
        let cut = std::time::Instant::now();
        if busy {
            while write_pages(&store).is_ok() {}
        } else {
            assert!(store.armed(None).is_err());
        }
        let took = cut.elapsed();
        assert!(took >= timeout / 2 && took < timeout * 2, "{busy} {took:?}");
    }
}
