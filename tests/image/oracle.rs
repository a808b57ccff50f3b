//! `crit` as the oracle: the same JSON for the same file.

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crtool::image::json::{self, Style};
use crtool::image::names::Extra;
use crtool::image::{ImageKind, descriptors, framing};
use serde_json::Value;

use super::Verdict;
use super::generate::{self, Numbers};

/// Kinds that crit 3.17 refuses, although CRIU writes them.
const UNKNOWN_TO_CRIT: &[ImageKind] = &[
    ImageKind::Signal,
    ImageKind::Psignal,
    ImageKind::BinfmtMisc,
    ImageKind::BinfmtMiscOld,
    ImageKind::Pidfd,
];

/// Members that CRIU's format has but crit 3.17 does not know.
const NEWER_MEMBERS: &[&str] = &[
    "allow_uprobes",
    "cap_amb",
    "cet",
    "cg_set",
    "compat_nr_pages",
    "dump_criu_run_id",
    "ipv4_sysctl",
    "is_threaded",
    "membarrier_registration_mask",
    "mode",
    "no_new_privs",
    "pidfd",
    "pktinfo",
    "plugins_entry",
    "stop_signo",
    "tcp_opts",
    "tos",
    "ttl",
];

/// Numbers of fields that CRIU's format does not have, and ours alone has: from here.
const FIRST_OF_OURS: u32 = 15_000;

/// Names of the fields that ours alone has.
fn extensions() -> &'static HashSet<String> {
    static NAMES: OnceLock<HashSet<String>> = OnceLock::new();
    NAMES.get_or_init(|| {
        let fields = descriptors::pool().all_messages().flat_map(|m| m.fields().collect::<Vec<_>>());
        fields.filter(|field| field.number() >= FIRST_OF_OURS).map(|field| field.name().to_owned()).collect()
    })
}

/// Values of enumerations that crit 3.17 does not know: it drops the member.
const NEWER_VALUES: &[&str] = &["PIDFD", "LOONGARCH64", "RISCV64", "CGROUP2", "SERIAL"];

/// Why crit cannot be asked, if so.
pub(crate) fn no_crit() -> Option<String> {
    let found = Command::new("crit").arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) { None } else { Some("no crit in PATH".into()) }
}

/// Runs `crit` with these words and the file.
pub(crate) fn crit(words: &[&str], file: &Path) -> Result<Vec<u8>, String> {
    let output = Command::new("crit").args(words).arg(file).output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let why = String::from_utf8_lossy(&output.stderr);
    Err(format!("crit {words:?}: {}", why.lines().last().unwrap_or_default()))
}

/// Our JSON of `image`.
pub(crate) fn ours(image: &[u8], path: &Path, style: Style) -> Result<Value, String> {
    json::decode(image, image.len() as u64, path, style).map_err(|e| format!("{e} ({e:?})"))
}

/// Whether both tools show `path` alike in every style, and `encode` undoes `decode`.
pub(crate) fn compare(kind: ImageKind, path: &Path) -> Result<(), String> {
    let image = std::fs::read(path).map_err(|e| e.to_string())?;
    for (words, pretty, payload) in [
        (&["decode", "-i"][..], false, true),
        (&["decode", "--pretty", "-i"], true, true),
        (&["show", "--nopl"], true, false),
    ] {
        // crit 3.17 stops with an AttributeError at --nopl and BPF maps.
        if !payload && matches!(kind.extra(), Extra::None | Extra::BpfMap) {
            continue;
        }
        let shown = ours(&image, path, Style { pretty, payload })?;
        if payload {
            let back = json::encode(&shown).map_err(|e| format!("{words:?}: {e}"))?;
            if back != image {
                return Err(format!("{words:?}: encode does not undo decode: {shown}"));
            }
        }
        let theirs = crit(words, path)?;
        let mut text = Vec::new();
        json::write(&mut text, &shown, pretty).map_err(|e| e.to_string())?;
        text.push(b'\n');
        if text == theirs {
            // crit 3.17 cannot encode these two, its own output neither (TypeError).
            if pretty && payload && !matches!(kind.extra(), Extra::IpcShm | Extra::BpfMap) {
                let file = path.with_extension("json");
                std::fs::write(&file, &text).map_err(|e| e.to_string())?;
                if crit(&["encode", "-i"], &file)? != image {
                    return Err("crit encodes our JSON otherwise".into());
                }
            }
            continue;
        }
        let theirs: Value = serde_json::from_slice(&theirs).map_err(|e| e.to_string())?;
        alike(&theirs, &shown, "").map_err(|why| format!("{words:?}: {why}"))?;
    }
    Ok(())
}

/// Equal, but for what crit does not know.
fn alike(theirs: &Value, ours: &Value, at: &str) -> Result<(), String> {
    match (theirs, ours) {
        (Value::Array(theirs), Value::Array(ours)) if theirs.len() == ours.len() => {
            let mut pairs = theirs.iter().zip(ours).enumerate();
            pairs.try_for_each(|(number, (theirs, ours))| alike(theirs, ours, &format!("{at}[{number}]")))
        }
        (Value::Object(theirs), Value::Object(ours)) => {
            let newer = |name: &str, value: &Value| {
                NEWER_MEMBERS.contains(&name)
                    || extensions().contains(name)
                    || value.as_str().is_some_and(|value| NEWER_VALUES.contains(&value))
            };
            let known = ours.iter().filter(|(name, value)| theirs.contains_key(*name) || !newer(name, value));
            let known: Vec<(&String, &Value)> = known.collect();
            let mut left: Vec<&String> = theirs.keys().collect();
            let mut right: Vec<&String> = known.iter().map(|(name, _)| *name).collect();
            if right.len() < ours.len() {
                left.sort();
                right.sort();
            }
            if left != right {
                return Err(format!("{at}: crit has {left:?}, we {right:?}"));
            }
            let mut pairs = known.into_iter();
            pairs.try_for_each(|(name, ours)| {
                alike(theirs.get(name).unwrap_or(&Value::Null), ours, &format!("{at}.{name}"))
            })
        }
        (theirs, ours) if theirs == ours => Ok(()),
        _ => Err(format!("{at}: crit shows {theirs}, we {ours}")),
    }
}

/// Generated images of `kind`.
pub(crate) fn same_as_crit(kind: ImageKind) -> Verdict {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let path = dir.path().join("image");
    if UNKNOWN_TO_CRIT.contains(&kind) {
        return round_trip(kind).map(|()| None);
    }
    if let Some(reason) = no_crit() {
        return Ok(Some(reason));
    }
    // A ghost file has one entry only, in one of two forms.
    let seeds = if kind.extra() == Extra::GhostFile { 1..5 } else { 1..2 };
    for seed in seeds {
        std::fs::write(&path, generate::image(kind, seed, 6)).map_err(|e| e.to_string())?;
        compare(kind, &path).map_err(|why| format!("seed {seed}: {why}"))?;
    }
    Ok(None)
}

fn round_trip(kind: ImageKind) -> Result<(), String> {
    for seed in 1..5 {
        let image = generate::image(kind, seed, 6);
        for pretty in [false, true] {
            let shown = ours(&image, Path::new("image"), Style { pretty, payload: true })?;
            if json::encode(&shown).map_err(|e| e.to_string())? != image {
                return Err(format!("encode does not undo decode: {shown}"));
            }
        }
    }
    Ok(())
}

/// Names of UNIX sockets of all sorts, shown as quoted-printable text.
pub(crate) fn socket_names() -> Verdict {
    if let Some(reason) = no_crit() {
        return Ok(Some(reason));
    }
    let mut numbers = Numbers::new(7);
    let mut image = framing::magic_bytes(ImageKind::Unixsk);
    let pieces: [&[u8]; 10] =
        [b"\0", b"/tmp/", b"=", b".", b" ", b"\n", b"\t", b"\xff", b"abcdefghijklmnop", b"\r\n"];
    for _ in 0..300 {
        let len = numbers.below(12);
        let name: Vec<u8> = (0..len).flat_map(|_| pieces[numbers.below(pieces.len())]).copied().collect();
        let entry = crtool::image::pb::UnixSkEntry { name, ..Default::default() };
        framing::put_entry(&mut image, &entry);
    }
    let shown = ours(&image, Path::new("image"), Style { pretty: false, payload: true })?;
    if json::encode(&shown).map_err(|e| e.to_string())? != image {
        return Err("encode does not undo decode".into());
    }
    let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    std::fs::write(file.path(), &image).map_err(|e| e.to_string())?;
    let theirs: Value =
        serde_json::from_slice(&crit(&["decode", "-i"], file.path())?).map_err(|e| e.to_string())?;
    let name =
        |shown: &Value, at: usize| shown["entries"][at]["name"].as_str().unwrap_or_default().to_owned();
    for at in 0..300 {
        let (theirs, ours) = (name(&theirs, at), name(&shown, at));
        // Line ends that crit's text mode loses are the one thing that we write otherwise.
        if theirs != ours && !ours.contains("=0A") {
            return Err(format!("crit shows {theirs:?}, we {ours:?}"));
        }
    }
    Ok(None)
}

/// Fields of a later version of the format survive, wherever they are.
pub(crate) fn unknown_fields_come_back() -> Verdict {
    let inner = [&[0x08, 1, 0x10, 2, 0x18, 3, 0x20, 4, 0x28, 5][..], &[0xa8, 0x3f, 0x07]].concat();
    let fown = [&[0x2a, inner.len() as u8][..], &inner].concat();
    let entry = [
        &[0x08, 1, 0x10, 2, 0x18, 3][..],
        // Field 4, below known ones: 64 bits.
        &[0x21, 1, 2, 3, 4, 5, 6, 7, 8],
        &fown,
        &[0x32, 2, b'/', 0xff],
        // Field 2000: bytes, twice; field 2001: 32 bits.
        &[0x82, 0x7d, 2, 9, 9, 0x82, 0x7d, 0],
        &[0x8d, 0x7d, 1, 0, 0, 0xff],
    ]
    .concat();
    let mut image = framing::magic_bytes(ImageKind::RegFiles);
    image.extend((entry.len() as u32).to_le_bytes());
    image.extend(entry);
    for pretty in [false, true] {
        let shown = ours(&image, Path::new("image"), Style { pretty, payload: true })?;
        let fields = shown["entries"][0]["unknown_fields"].as_array().map_or(0, Vec::len);
        let name = &shown["entries"][0]["name"];
        if fields != 4 || name != r"b'/\xff'" {
            return Err(format!("shown as {shown}"));
        }
        if json::encode(&shown).map_err(|e| e.to_string())? != image {
            return Err(format!("encode does not undo decode: {shown}"));
        }
    }
    Ok(None)
}
