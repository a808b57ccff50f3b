//! One connection from a source: which frame may follow which, and what each does.
//!
//! A frame that is damaged, out of place or does not fit spoils its own snapshot only; the others on the
//! connection go on. Where it is not known any more where the next frame begins, the connection is given up.
//! Frames of a snapshot that has ended are thrown away: the source may not know yet. This module moves no bytes
//! over sockets: it is fed, and what it says waits in [`Source::out`].

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::super::pb::snapshot_info::State;
use super::super::pb::{self, FailCode};
use super::super::wire::{self, FEATURE_LZ4, Header, Kind, LZ4, MAGIC, MAX_DATA};
use super::super::{Failure, crc, host};
use super::decode::{Decoder, Item, Last, Take};
use super::images::Images;
use super::ledger::{Origin, What};
use super::protocol;
use super::snapshot::Owner;
use super::snapshots::Snapshots;

/// Most snapshots on their way, or waiting for their turn, at once on one connection.
pub(super) const MAX_STREAMS: usize = 512;
/// Most images that have begun and not ended on one connection.
pub(super) const MAX_OPEN: usize = 4096;
/// Most bytes of answers that a connection may leave unread while it asks for more.
pub(super) const MAX_OUT: usize = 64 << 10;
/// How many streams that have ended are remembered: what still comes for them is no fault.
const REMEMBERED: usize = 1024;
/// Longest time-out of the other side that is respected.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// So many bytes of the magic have come.
    Magic(usize),
    Hello,
    Open,
    /// Nothing counts any more.
    Over,
}

/// The snapshots of a connection by their streams.
#[derive(Debug)]
struct Streams {
    source: u64,
    origin: Origin,
    active: BTreeMap<u32, u64>,
    over: VecDeque<u32>,
}

impl Streams {
    fn end(&mut self, stream: u32) {
        self.active.remove(&stream);
        if !self.over.contains(&stream) {
            self.over.push_back(stream);
        }
        if self.over.len() > REMEMBERED {
            self.over.pop_front();
        }
    }

    /// The snapshot that images on this stream belong to.
    fn receiving(&mut self, snapshots: &Snapshots, stream: u32) -> Option<u64> {
        let id = *self.active.get(&stream)?;
        let state = snapshots.get(id).map(|s| s.state);
        let open =
            |state| matches!(state, State::Receiving | State::Prepared | State::Armed | State::Starting);
        if state.is_none_or(|state| !open(state)) {
            // It ended for a reason of ours.
            self.end(stream);
        }
        (state == Some(State::Receiving)).then_some(id)
    }

    fn fail(&mut self, snapshots: &mut Snapshots, stream: u32, failure: Failure) {
        if let Some(id) = self.receiving(snapshots, stream) {
            snapshots.fail(id, failure);
            self.end(stream);
        }
    }

    fn open_images(&self, snapshots: &Snapshots) -> usize {
        self.active.values().filter_map(|id| snapshots.images(*id)).map(Images::open).sum()
    }

    /// What to do with the payload of a frame, now that its header is there.
    fn judge(
        &mut self,
        snapshots: &mut Snapshots,
        out: &mut Vec<u8>,
        header: &Header,
    ) -> Result<Take, Failure> {
        match header.kind {
            Kind::SnapshotBegin | Kind::Resume | Kind::Ping | Kind::Pong => return Ok(Take::Whole),
            Kind::Hello
            | Kind::Prepared
            | Kind::Failed
            | Kind::Restored
            | Kind::Armed
            | Kind::Fell
            | Kind::Room
            | Kind::Queue => {
                let text = format!("{:?} frame from a source", header.kind);
                return Err(protocol(text));
            }
            _ => {}
        }
        let stream = header.stream;
        if !self.active.contains_key(&stream) && !self.over.contains(&stream) {
            let text = format!("{:?} frame for stream {stream}, which has not begun", header.kind);
            let failure = protocol(text);
            if matches!(header.kind, Kind::Confirm | Kind::Abort | Kind::Go) {
                // It was meant for another, which must get it.
                return Err(failure);
            }
            let failed = pb::Failed::from(failure);
            out.extend(wire::frame(Kind::Failed, stream, 0, &failed));
            self.end(stream);
        }
        if matches!(header.kind, Kind::Confirm | Kind::Abort | Kind::Go) {
            return Ok(if self.active.contains_key(&stream) { Take::Whole } else { Take::Skip });
        }
        let Some(id) = self.receiving(snapshots, stream) else { return Ok(Take::Skip) };
        let (raw, image) = (header.raw, header.image);
        let room = match header.kind {
            _ if !snapshots.has_turn(id) => {
                let text = "images came before the cache had said that there is room";
                Err(protocol(text))
            }
            Kind::ImageBegin if self.open_images(snapshots) >= MAX_OPEN => {
                Err(protocol(format!("more than {MAX_OPEN} images begun and not ended")))
            }
            Kind::ImageBegin => snapshots.room_for_image(id),
            Kind::Data => snapshots.room_for(id, image, raw, false),
            Kind::Zero => snapshots.room_for(id, image, raw, true),
            Kind::Commit
                if u64::from(header.len) > snapshots.images(id).map_or(0, Images::longest_commit) =>
            {
                let text = "the list of images is longer than what has come";
                Err(protocol(text))
            }
            _ => Ok(()),
        };
        Ok(match room {
            Ok(()) if header.kind == Kind::Data && header.flags & LZ4 == 0 => Take::Parts,
            Ok(()) => Take::Whole,
            Err(failure) => {
                self.fail(snapshots, stream, failure);
                Take::Skip
            }
        })
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Source {
    stage: Stage,
    decoder: Decoder,
    streams: Streams,
    /// CRC32C of what has come of the frame that is on its way.
    crc: u32,
    out: Vec<u8>,
    timeout: Duration,
    silence: Duration,
    host: String,
    /// It is among the connections of its origin.
    counted: bool,
    /// Where what it brings lies too.
    saved: String,
}

impl Source {
    /// A connection that was accepted just now, as number `id`.
    pub(super) fn new(id: u64, origin: Origin, timeout: Duration) -> Self {
        let (active, over) = (BTreeMap::new(), VecDeque::new());
        Self {
            stage: Stage::Magic(0),
            decoder: Decoder::default(),
            streams: Streams { source: id, origin, active, over },
            crc: 0,
            out: Vec::new(),
            timeout,
            silence: timeout,
            host: String::new(),
            counted: false,
            saved: String::new(),
        }
    }

    /// Frames that wait to be sent.
    pub(super) fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Its number.
    pub(super) fn id(&self) -> u64 {
        self.streams.source
    }

    /// Who is behind it.
    pub(super) fn origin(&self) -> &Origin {
        &self.streams.origin
    }

    /// What it brings lies in a directory too.
    pub(super) fn set_saved(&mut self, directory: String) {
        self.saved = directory;
    }

    /// The other side has proven who it is.
    pub(super) fn set_origin(&mut self, origin: Origin) {
        self.streams.origin = origin;
    }

    /// Bytes of memory that it takes, beside its snapshots.
    pub(super) fn buffered(&self) -> u64 {
        (self.decoder.gathered() + self.out.capacity()) as u64
    }

    /// Whether nothing waits to be sent.
    pub(super) fn has_said_all(&self) -> bool {
        self.out.is_empty()
    }

    /// Whether the other side has said who it is.
    pub(super) fn is_known(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Whether nothing counts any more.
    pub(super) fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }

    /// Name of the host, as it says.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// How long it may say nothing.
    pub(super) fn silence(&self) -> Duration {
        self.silence
    }

    /// Whether a snapshot of this connection is neither confirmed nor ended.
    pub(super) fn is_busy(&self, snapshots: &Snapshots) -> bool {
        let states = self.streams.active.values().filter_map(|id| snapshots.get(*id)).map(|s| s.state);
        states.into_iter().any(|state| matches!(state, State::Receiving | State::Prepared | State::Armed))
    }

    /// Whether the last byte ended a frame.
    pub(super) fn is_between(&self) -> bool {
        self.decoder.is_between()
    }

    /// Takes bytes that came. An error is final: [`Self::refuse`] tells it to the other side.
    pub(super) fn feed(&mut self, snapshots: &mut Snapshots, mut input: &[u8]) -> Result<(), Failure> {
        while let Stage::Magic(have) = self.stage {
            let Some((first, rest)) = input.split_first() else { return Ok(()) };
            if MAGIC.get(have) != Some(first) {
                self.stage = Stage::Over;
                let text = match (have, *first) {
                    (0, 0x16) => "it speaks TLS, and this cache runs without --tls",
                    _ => "this is no crtool",
                };
                return Err(protocol(text));
            }
            input = rest;
            let have = have + 1;
            self.stage = if have == MAGIC.len() { Stage::Hello } else { Stage::Magic(have) };
        }
        loop {
            if self.stage == Stage::Over {
                return Ok(());
            }
            let Self { decoder, streams, out, stage, .. } = self;
            let stage = *stage;
            let judge = |header: &Header| match stage {
                Stage::Open => streams.judge(snapshots, out, header),
                _ if header.kind == Kind::Hello => Ok(Take::Whole),
                _ => Err(protocol(format!("{:?} frame before Hello", header.kind))),
            };
            let before = input.len();
            let item = decoder.next(&mut input, judge)?;
            let header = match &item {
                Some(Item::Part(header, ..) | Item::Frame(header, _)) => Some(*header),
                None => decoder.current(),
            };
            if let Some(header) = header.filter(|header| header.kind.is_of_images())
                && let Some(id) = streams.active.get(&header.stream)
            {
                snapshots.came(*id, (before - input.len()) as u64);
            }
            match item {
                None => return Ok(()),
                Some(Item::Part(header, bytes, last)) => self.part(snapshots, &header, bytes, last),
                Some(Item::Frame(header, payload)) if stage == Stage::Hello => {
                    self.hello(snapshots, &header, &payload)?
                }
                Some(Item::Frame(header, payload)) => self.frame(snapshots, &header, &payload)?,
            }
        }
    }

    fn hello(&mut self, snapshots: &mut Snapshots, header: &Header, payload: &[u8]) -> Result<(), Failure> {
        let hello: pb::Hello = wire::message(header, payload)?;
        self.out.extend(MAGIC);
        if hello.version < wire::VERSION {
            let text = format!(
                "this cache speaks version {} of the protocol, and the source version {}: use the same crtool on both hosts",
                wire::VERSION,
                hello.version
            );
            return Err(Failure::new(FailCode::FailVersion, text));
        }
        let origin = &self.streams.origin;
        let room = snapshots.ledger().room(origin, What::Connections, 1);
        room.map_err(|lack| {
            Failure::new(FailCode::FailBusy, format!("the connection is not taken: {lack}"))
        })?;
        snapshots.ledger().add(origin, What::Connections);
        self.counted = true;
        let answer = pb::Hello {
            version: wire::VERSION,
            features: FEATURE_LZ4,
            software: concat!("crtool ", env!("CARGO_PKG_VERSION")).to_owned(),
            host: host(),
            timeout_ms: u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX),
            journal: snapshots.journal(),
            restores: snapshots.restores(),
        };
        self.out.extend(wire::frame(Kind::Hello, 0, 0, &answer));
        // It says something every third of its own time-out.
        let theirs = Duration::from_millis(hello.timeout_ms.into()).min(LONGEST_SILENCE);
        self.silence = self.timeout.max(theirs);
        self.host = hello.host.chars().filter(|c| !c.is_control()).take(64).collect();
        self.stage = Stage::Open;
        Ok(())
    }

    fn part(&mut self, snapshots: &mut Snapshots, header: &Header, bytes: &[u8], last: Last) {
        if let Some(id) = self.streams.receiving(snapshots, header.stream) {
            self.crc = crc::append(self.crc, bytes);
            let mut done = snapshots.append(id, header.image, bytes);
            if last == Last::Yes {
                done = done.and_then(|()| snapshots.appended(id, header, self.crc));
            }
            if let Err(failure) = done {
                self.streams.fail(snapshots, header.stream, failure);
            }
        }
        if last == Last::Yes {
            self.crc = 0;
        }
    }

    fn frame(&mut self, snapshots: &mut Snapshots, header: &Header, payload: &[u8]) -> Result<(), Failure> {
        let stream = header.stream;
        match header.kind {
            Kind::Ping if self.out.len() > MAX_OUT => {
                return Err(protocol("it does not read what it is told"));
            }
            Kind::Ping => {
                // The answer proves that what came before has been dealt with: what there is to say of that goes first.
                self.out.extend(snapshots.take_letters_to(self.streams.source));
                self.out.extend(wire::bare(Kind::Pong, 0, 0, 0));
            }
            Kind::Pong => {}
            Kind::SnapshotBegin | Kind::Resume => {
                let begun = if header.kind == Kind::Resume {
                    wire::message(header, payload).map(|resume| {
                        let owner = Owner { source: self.streams.source, stream };
                        snapshots.resume(owner, &self.streams.origin, &resume);
                        None
                    })
                } else {
                    self.begin(snapshots, header, payload)
                };
                match begun {
                    Ok(Some(id)) => {
                        self.streams.over.retain(|over| *over != stream);
                        self.streams.active.insert(stream, id);
                    }
                    Ok(None) => self.streams.end(stream),
                    Err(failure) => {
                        tracing::warn!("a snapshot was refused: {failure}");
                        self.out.extend(wire::frame(Kind::Failed, stream, 0, &pb::Failed::from(failure)));
                        self.streams.end(stream);
                    }
                }
            }
            Kind::Confirm | Kind::Abort | Kind::Go => self.verdict(snapshots, header, payload)?,
            _ => {
                if let Some(id) = self.streams.receiving(snapshots, stream)
                    && let Err(failure) = of_images(snapshots, id, header, payload)
                {
                    self.streams.fail(snapshots, stream, failure);
                }
            }
        }
        Ok(())
    }

    /// None if it has ended what was on its way in that stream.
    fn begin(
        &mut self,
        snapshots: &mut Snapshots,
        header: &Header,
        payload: &[u8],
    ) -> Result<Option<u64>, Failure> {
        let stream = header.stream;
        let begin: pb::SnapshotBegin = wire::message(header, payload)?;
        if self.streams.active.contains_key(&stream) {
            let failure = protocol(format!("stream {stream} begins twice"));
            if self.streams.receiving(snapshots, stream).is_none() {
                return Err(failure);
            }
            // The source hears of it as of the end of its snapshot.
            self.streams.fail(snapshots, stream, failure);
            return Ok(None);
        }
        if self.streams.active.len() >= MAX_STREAMS {
            let text = format!("more than {MAX_STREAMS} snapshots at once on one connection");
            return Err(protocol(text));
        }
        let owner = Owner { source: self.streams.source, stream };
        let id = snapshots.begin(owner, &self.streams.origin, begin)?;
        snapshots.set_saved(id, &self.saved);
        Ok(Some(id))
    }

    /// The last word. One that was damaged ends the connection: the source says it again over another, and would not
    /// if this one went on.
    fn verdict(&mut self, snapshots: &mut Snapshots, header: &Header, payload: &[u8]) -> Result<(), Failure> {
        let stream = header.stream;
        let owner = Owner { source: self.streams.source, stream };
        let Some(id) = self.streams.active.get(&stream).copied() else { return Ok(()) };
        // A snapshot that was resumed elsewhere listens there.
        let Some(state) = snapshots.get(id).filter(|s| s.owner == Some(owner)).map(|s| s.state) else {
            self.streams.end(stream);
            return Ok(());
        };
        if header.kind == Kind::Abort {
            let reason = wire::message::<pb::Abort>(header, payload).map(|abort| abort.reason);
            snapshots.abort(id, &reason.unwrap_or_default());
            self.streams.end(stream);
            return Ok(());
        }
        if header.kind == Kind::Go && state != State::Receiving {
            wire::message::<pb::Go>(header, payload)?;
            snapshots.go(id);
            return Ok(());
        }
        match (wire::message::<pb::Confirm>(header, payload), state) {
            (Ok(confirm), State::Prepared | State::Armed) => {
                snapshots.confirm(id, confirm.survives);
                self.streams.end(stream);
            }
            (Err(failure), State::Receiving) => self.streams.fail(snapshots, stream, failure),
            (Ok(_), State::Receiving) => {
                let text = "confirmed before all images had come";
                self.streams.fail(snapshots, stream, protocol(text));
            }
            (Err(failure), _) => return Err(failure),
            (Ok(_), _) => {}
        }
        Ok(())
    }

    /// It is gone, and with it what it used.
    pub(super) fn leave(&mut self, snapshots: &mut Snapshots) {
        if std::mem::take(&mut self.counted) {
            snapshots.ledger().remove(&self.streams.origin, What::Connections);
        }
    }

    /// Says why the connection is given up, to all whose images were on their way.
    pub(super) fn refuse(&mut self, snapshots: &mut Snapshots, failure: &Failure) {
        let silent = matches!(self.stage, Stage::Magic(_)) || self.stage == Stage::Over;
        self.stage = Stage::Over;
        self.decoder = Decoder::default();
        let streams: Vec<u32> = self.streams.active.keys().copied().collect();
        if streams.is_empty() && !silent {
            self.out.extend(wire::frame(Kind::Failed, 0, 0, &pb::Failed::from(failure.clone())));
        }
        for stream in streams {
            self.streams.fail(snapshots, stream, failure.clone());
        }
    }
}

/// What carries images.
fn of_images(snapshots: &mut Snapshots, id: u64, header: &Header, payload: &[u8]) -> Result<(), Failure> {
    match header.kind {
        Kind::ImageBegin => snapshots.image_begin(id, header.image, wire::message(header, payload)?),
        Kind::ImageEnd => snapshots.image_end(id, header.image, &wire::message(header, payload)?),
        Kind::Zero => snapshots.zeros(id, header),
        Kind::Commit => snapshots.commit(id, &wire::message(header, payload)?),
        // The only data that is taken whole.
        _ => {
            let mut raw = vec![0; header.raw.min(MAX_DATA) as usize];
            match lz4_flex::block::decompress_into(payload, &mut raw) {
                Ok(len) if len == raw.len() => {
                    snapshots.append(id, header.image, &raw)?;
                    snapshots.appended(id, header, crc::of(&raw))
                }
                _ => Err(Failure::new(FailCode::FailChecksum, "compressed bytes were damaged on their way")),
            }
        }
    }
}
