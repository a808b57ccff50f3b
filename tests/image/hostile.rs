//! Damaged images: an error or an answer, never a panic, never much memory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crtool::image::framing::{self, EntryReader};
use crtool::image::json::{self, Style};
use crtool::image::{HasExtra, ImageError, ImageKind, pb};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::Verdict;
use super::generate::{self, Numbers};

/// Reads all entries as the messages that dump and restore use.
fn read_typed(kind: ImageKind, image: &[u8]) -> Result<usize, ImageError> {
    let mut reader = EntryReader::new(image, image.len() as u64, Path::new("image"));
    reader.expect_magic(kind)?;
    macro_rules! all {
        ($message:ident) => {
            while reader.next_entry::<pb::$message>()?.is_some() {}
        };
        ($message:ident with extra) => {
            while let Some(message) = reader.next_entry::<pb::$message>()? {
                reader.extra(message.extra_len())?;
            }
        };
    }
    use ImageKind as K;
    match kind {
        K::Inventory => all!(InventoryEntry),
        K::Fdinfo => all!(FdinfoEntry),
        K::Pagemap | K::ShmemPagemap => {
            reader.next_entry::<pb::PagemapHead>()?;
            all!(PagemapEntry)
        }
        K::Core => all!(CoreEntry),
        K::Ids => all!(TaskKobjIdsEntry),
        K::Mm => all!(MmEntry),
        K::Vmas => all!(VmaEntry),
        K::Files => all!(FileEntry),
        K::RegFiles => all!(RegFileEntry),
        K::Pstree => all!(PstreeEntry),
        K::Fs => all!(FsEntry),
        K::Creds => all!(CredsEntry),
        K::Cgroup => all!(CgroupEntry),
        K::Mnts => all!(MntEntry),
        K::Seccomp => all!(SeccompEntry),
        K::TtyInfo => all!(TtyInfoEntry),
        K::RemapFpath => all!(RemapFilePathEntry),
        K::FileLocks => all!(FileLockEntry),
        K::Timens => all!(TimensEntry),
        K::MemfdInode => all!(MemfdInodeEntry),
        K::PipesData | K::FifoData => all!(PipeDataEntry with extra),
        K::SkQueues => all!(SkPacketEntry with extra),
        K::TcpStream => all!(TcpStreamEntry with extra),
        K::BpfmapData => all!(BpfmapDataEntry with extra),
        K::IpcnsSem => all!(IpcSemEntry with extra),
        K::IpcnsShm => all!(IpcShmEntry with extra),
        K::IpcnsMsg => {
            while let Some(queue) = reader.next_entry::<pb::IpcMsgEntry>()? {
                for _ in 0..queue.qnum {
                    let head = reader.inner::<pb::IpcMsg>()?;
                    reader.extra(u64::from(head.msize).next_multiple_of(8))?;
                }
            }
        }
        K::GhostFile => {
            if let Some(ghost) = reader.next_entry::<pb::GhostFileEntry>()? {
                while ghost.chunks() && reader.left() > 0 {
                    let chunk = reader.inner::<pb::GhostChunkEntry>()?;
                    reader.skip(chunk.len)?;
                }
            }
        }
        K::ExtFiles => all!(ExtFileEntry),
        K::NsFiles => all!(NsFileEntry),
        K::EventfdFile => all!(EventfdFileEntry),
        K::EventpollFile => all!(EventpollFileEntry),
        K::EventpollTfd => all!(EventpollTfdEntry),
        K::Signalfd => all!(SignalfdEntry),
        K::InotifyFile => all!(InotifyFileEntry),
        K::InotifyWd => all!(InotifyWdEntry),
        K::FanotifyFile => all!(FanotifyFileEntry),
        K::FanotifyMark => all!(FanotifyMarkEntry),
        K::Pipes => all!(PipeEntry),
        K::Fifo => all!(FifoEntry),
        K::Sigact => all!(SaEntry),
        K::Unixsk => all!(UnixSkEntry),
        K::Inetsk => all!(InetSkEntry),
        K::Packetsk => all!(PacketSockEntry),
        K::NetlinkSk => all!(NetlinkSkEntry),
        K::Itimers => all!(ItimerEntry),
        K::PosixTimers => all!(PosixTimerEntry),
        K::Utsns => all!(UtsnsEntry),
        K::IpcVar => all!(IpcVarEntry),
        K::Netdev => all!(NetDeviceEntry),
        K::Netns => all!(NetnsEntry),
        K::Autofs => all!(AutofsEntry),
        K::BinfmtMisc | K::BinfmtMiscOld => all!(BinfmtMiscEntry),
        K::TtyFiles => all!(TtyFileEntry),
        K::TtyData => all!(TtyDataEntry),
        K::Rlimit => all!(RlimitEntry),
        K::Signal | K::Psignal => all!(SiginfoEntry),
        K::Tunfile => all!(TunfileEntry),
        K::Timerfd => all!(TimerfdEntry),
        K::Cpuinfo => all!(CpuinfoEntry),
        K::Userns => all!(UsernsEntry),
        K::Pidns => all!(PidnsEntry),
        K::BpfmapFile => all!(BpfmapFileEntry),
        K::Apparmor => all!(ApparmorEntry),
        K::Pidfd => all!(PidfdEntry),
        K::StatsDump | K::StatsRestore => all!(StatsEntry),
        K::IrmapCache => all!(IrmapCacheEntry),
        // Raw kinds have no entries.
        _ => {}
    }
    Ok(reader.entries_read())
}

/// Reads `image` in every way there is.
fn read(kind: ImageKind, image: &[u8]) -> Result<(), String> {
    let what = format!("{} bytes", image.len());
    let read = catch_unwind(AssertUnwindSafe(|| {
        let _ = read_typed(kind, image);
        for (pretty, payload) in [(false, true), (true, false)] {
            let shown =
                json::decode(image, image.len() as u64, Path::new("image"), Style { pretty, payload });
            if let Ok(shown) = shown {
                let _ = json::encode(&shown);
            }
        }
    }));
    read.map_err(|_| format!("panic on {what} of {kind:?}: {image:02x?}"))
}

/// Cut at every byte: an image cut inside an entry is refused.
pub(crate) fn cut(kind: ImageKind) -> Verdict {
    let image = generate::image(kind, 3, 1);
    let whole = read_typed(kind, &image).map_err(|e| format!("the whole image: {e}"))?;
    for len in 0..image.len() {
        let part = image.get(..len).unwrap_or_default();
        read(kind, part)?;
        if read_typed(kind, part).is_ok_and(|entries| entries >= whole) && kind != ImageKind::GhostFile {
            return Err(format!("cut to {len} of {} bytes and still whole", image.len()));
        }
    }
    Ok(None)
}

/// One bit flipped, at each byte.
pub(crate) fn flipped(kind: ImageKind) -> Verdict {
    let mut image = generate::image(kind, 4, 1);
    let mut numbers = Numbers::new(5);
    for at in 0..image.len() {
        let bit = 1 << numbers.below(8);
        image[at] ^= bit;
        read(kind, &image)?;
        image[at] ^= bit;
    }
    // Some more at once.
    for _ in 0..50 {
        let mut image = image.clone();
        for _ in 0..4 {
            let at = numbers.below(image.len());
            image[at] ^= 1 << numbers.below(8);
        }
        read(kind, &image)?;
    }
    Ok(None)
}

/// Random bytes, bare and behind the magic of any kind.
pub(crate) fn random() -> Verdict {
    let kinds = proptest::sample::select(ImageKind::ALL);
    let bytes = proptest::collection::vec(any::<u8>(), 0..400);
    check((kinds, bytes, any::<bool>()), |(kind, bytes, bare)| {
        let image = if bare { bytes } else { [framing::magic_bytes(kind), bytes].concat() };
        read(kind, &image).map_err(TestCaseError::fail)
    })
}

/// Sizes far beyond what is there are refused before anything is allocated.
pub(crate) fn huge_claims() -> Verdict {
    for size in [u32::MAX, 1 << 31, (framing::ENTRY_LIMIT as u32) + 1, framing::ENTRY_LIMIT as u32, 1 << 20] {
        let mut image = framing::magic_bytes(ImageKind::Mm);
        image.extend(size.to_le_bytes());
        image.extend([0; 100]);
        if read_typed(ImageKind::Mm, &image).is_ok() {
            return Err(format!("an entry of {size} bytes in 100"));
        }
    }
    let claims = pb::PipeDataEntry { bytes: u32::MAX, ..Default::default() };
    let mut image = framing::magic_bytes(ImageKind::PipesData);
    framing::put_entry(&mut image, &claims);
    // The file says of itself that it is large enough, as a sparse one does.
    let mut reader = EntryReader::new(image.as_slice(), 1 << 40, Path::new("image"));
    let refused =
        reader.expect_magic(ImageKind::PipesData).and_then(|()| reader.next_entry::<pb::PipeDataEntry>());
    refused.map_err(|e| e.to_string())?;
    match reader.extra(claims.extra_len()) {
        Err(ImageError::TooLarge { .. }) => {}
        other => return Err(format!("4 GiB of pipe: {other:?}")),
    }
    // Nested as deep as bytes allow: refused, not followed.
    let mut nested = Vec::new();
    for _ in 0..20_000 {
        let mut outer = vec![0x12];
        prost::encoding::encode_varint(nested.len() as u64, &mut outer);
        outer.extend(nested);
        nested = outer;
        if nested.len() > 200_000 {
            break;
        }
    }
    let mut image = framing::magic_bytes(ImageKind::Cgroup);
    image.extend((nested.len() as u32).to_le_bytes());
    image.extend(nested);
    read(ImageKind::Cgroup, &image)?;
    Ok(None)
}

/// JSON of the right shape with wrong values.
pub(crate) fn random_json() -> Verdict {
    let value = prop_oneof![
        any::<u64>().prop_map(serde_json::Value::from),
        any::<i64>().prop_map(serde_json::Value::from),
        ".{0,20}".prop_map(serde_json::Value::from),
        Just(serde_json::Value::Null),
        Just(serde_json::json!([])),
        Just(serde_json::json!([1, "x", {}])),
        Just(serde_json::json!({})),
        Just(serde_json::json!([{"field": 0, "raw": "AA=="}])),
        Just(serde_json::json!([{"field": 5, "raw": "////\n"}])),
    ];
    let kinds = proptest::sample::select(ImageKind::ALL);
    check((kinds, value, any::<u64>()), |(kind, value, pick)| {
        let Some(_) = kind.message() else { return Ok(()) };
        let image = generate::image(kind, 1 + pick % 3, 1);
        let shown = json::decode(
            image.as_slice(),
            image.len() as u64,
            Path::new("image"),
            Style { pretty: true, payload: true },
        );
        let mut shown = shown.map_err(|e| TestCaseError::fail(e.to_string()))?;
        let mut numbers = Numbers::new(pick);
        // Walk down to some member and replace it.
        let mut at = &mut shown;
        loop {
            let count =
                at.as_object().map_or_else(|| at.as_array().map_or(0, Vec::len), serde_json::Map::len);
            if count == 0 || numbers.below(4) == 0 {
                break;
            }
            let nth = numbers.below(count);
            at = match at {
                serde_json::Value::Object(members) => members.values_mut().nth(nth).unwrap(),
                serde_json::Value::Array(list) => &mut list[nth],
                _ => break,
            };
        }
        *at = value;
        let encoded = catch_unwind(AssertUnwindSafe(|| json::encode(&shown).map(|_| ())));
        encoded.map(|_| ()).map_err(|_| TestCaseError::fail(format!("panic on {shown}")))
    })
}

fn check<S: Strategy>(strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) -> Verdict {
    let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
    TestRunner::new(config).run(&strategy, test).map(|()| None).map_err(|e| e.to_string())
}
