//! Images of a real tree with some things in them changed: `cargo fuzz run plan` (see README.md, which says how the images
//! in `fuzz/seeds` are made).
//!
//! The input says what is changed. Whatever that is, all that a restore thinks before and while it makes processes ends in a
//! plan or in an error: no panic, no hang, no memory beyond what the images hold, no file left, no descriptor left.
//!
//! The target needs root. It has a mount namespace of its own, in which everything is read-only but the directory of the
//! tree's files, in a tmpfs, and the directory of the fuzzer.

#![no_main]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, atomic::AtomicBool},
};

use crtool::{
    image::{
        ImageError, ImageFile, ImageKind, ImageSink, PagesSink, Store, descriptors,
        json::{self, Style},
    },
    restore,
    settings::RestoreSettings,
};
use libfuzzer_sys::{arbitrary::Unstructured, fuzz_target};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use prost_reflect::{Cardinality, Kind, MessageDescriptor};
use serde_json::{Map, Value, json};

/// Most things that are changed at once.
const MOST_EDITS: usize = 8;

/// One image as it was dumped.
struct Image {
    name: String,
    file: Arc<File>,
    bytes: Vec<u8>,
    kind: Option<ImageKind>,
    shown: Option<Value>,
}

/// Everything that inputs are applied to.
struct Base {
    images: Vec<Image>,
    /// What values are changed to.
    numbers: Vec<i128>,
    texts: Vec<String>,
    /// What is in the tmpfs, and how many descriptors there are.
    files: Vec<PathBuf>,
    descriptors: Vec<PathBuf>,
}

static BASE: OnceLock<Base> = OnceLock::new();

fn in_memory(bytes: &[u8]) -> Arc<File> {
    let file = nix::sys::memfd::memfd_create("image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let mut file = File::from(file.expect("memfd"));
    file.write_all(bytes).expect("write");
    Arc::new(file)
}

/// Everything becomes read-only, but the fuzzer's directory and `/tmp`, which is empty.
fn enclose() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (are you root?)");
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("private mounts");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    assert!(!here.starts_with("/tmp"), "the fuzz target hides /tmp");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    mount(Some(here), here, none, MsFlags::MS_BIND, none).expect("bind");
    // By its name, since the descriptor of it is of the mount below.
    let current = std::env::current_dir().expect("current directory");
    std::env::set_current_dir(current).expect("current directory");
    for at in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        if let Err(error) = mount(none, at, none, flags, none) {
            eprintln!("{at} stays as it is: {error}");
        }
    }
    mount(Some("fuzz"), "/tmp", Some("tmpfs"), MsFlags::empty(), Some("size=64m,mode=1777")).expect("tmpfs");
}

/// Numbers and texts that occur in images.
fn gather(value: &Value, numbers: &mut Vec<i128>, texts: &mut Vec<String>) {
    match value {
        Value::Number(number) => numbers.extend(number.as_i128()),
        Value::String(text) if text.len() < 300 => texts.push(text.clone()),
        Value::Array(list) => list.iter().for_each(|item| gather(item, numbers, texts)),
        Value::Object(members) => members.values().for_each(|item| gather(item, numbers, texts)),
        _ => {}
    }
}

/// Makes the files below /tmp that the tree had, as the images say.
fn make_files(images: &[Image]) {
    let entries = |name: &str| {
        let image = images.iter().find(|image| image.name == name);
        image.and_then(|image| image.shown.as_ref()?["entries"].as_array().cloned()).unwrap_or_default()
    };
    let remapped: Vec<Value> = entries("remap-fpath.img").iter().map(|e| e["orig_id"].clone()).collect();
    for entry in entries("files.img") {
        let reg = &entry["reg"];
        let Some(path) = reg["name"].as_str().filter(|name| name.starts_with("/tmp/")) else { continue };
        let mode = u32::try_from(reg["mode"].as_u64().unwrap_or(0)).unwrap_or(0);
        let path = Path::new(path);
        if mode & 0o170_000 == 0o040_000 {
            fs::create_dir_all(path).expect("directory");
        } else {
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            if remapped.contains(&entry["id"]) {
                continue;
            }
            let file = File::create(path).expect("file");
            file.set_len(reg["size"].as_u64().unwrap_or(0)).expect("size");
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777)).expect("mode");
    }
    for watch in
        entries("files.img").iter().flat_map(|e| e["ify"]["wd"].as_array().cloned().unwrap_or_default())
    {
        if let Some(path) = watch["f_handle"]["path"].as_str().filter(|path| path.starts_with("tmp/")) {
            fs::create_dir_all(Path::new("/").join(path)).expect("directory");
        }
    }
}

fn files_below(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files_below(&path, all);
        }
        all.push(path);
    }
}

fn files() -> Vec<PathBuf> {
    let mut all = Vec::new();
    files_below(Path::new("/tmp"), &mut all);
    all.sort();
    all
}

fn own_descriptors() -> Vec<PathBuf> {
    let numbers = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = numbers.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    // The fuzzer talks by pipes to a program that tells it the names of functions.
    let of_fuzzer = |path: &PathBuf| path.to_string_lossy().starts_with("pipe:");
    let this = PathBuf::from(format!("/proc/{}/fd", std::process::id()));
    all.retain(|path| *path != this && !of_fuzzer(path));
    all.sort();
    all
}

fn base() -> Base {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let mut images = Vec::new();
    for entry in fs::read_dir(&seeds).expect("no seeds: see README.md").flatten() {
        let name = entry.file_name().into_string().expect("a name");
        let bytes = fs::read(entry.path()).expect("image");
        let kind = ImageKind::by_file_name(&name).map(|(kind, _)| kind);
        let style = Style { pretty: false, payload: true };
        let shown = json::decode(bytes.as_slice(), bytes.len() as u64, Path::new(&name), style).ok();
        images.push(Image { name, file: in_memory(&bytes), bytes, kind, shown });
    }
    images.sort_by(|a, b| a.name.cmp(&b.name));
    let mut numbers = Vec::new();
    let mut texts: Vec<String> =
        ["", "/", "/..", ".", "/proc/1/mem", "/dev/full", "/nowhere", "a\0b", "\u{1b}[2J"]
            .map(str::to_owned)
            .to_vec();
    texts.extend(["x/".repeat(3000), "y".repeat(70_000)]);
    for bit in [15, 16, 20, 22, 30, 31, 32, 40, 46, 47, 48, 62, 63, 64] {
        numbers.extend([(1i128 << bit) - 1, 1i128 << bit, (1i128 << bit) - 4096, -(1i128 << (bit - 1))]);
    }
    for image in &images {
        image.shown.iter().for_each(|shown| gather(shown, &mut numbers, &mut texts));
    }
    numbers.sort_unstable();
    numbers.dedup();
    texts.sort();
    texts.dedup();
    enclose();
    make_files(&images);
    let mut base = Base { images, numbers, texts, files: files(), descriptors: Vec::new() };
    let unchanged = Snapshot::of(&base);
    if let Err(error) = restore::rehearse(&unchanged, &settings(0xff)) {
        panic!("the seeds do not fit this machine, make them again (README.md): {error:#}");
    }
    base.descriptors = own_descriptors();
    base
}

fn settings(bits: u8) -> RestoreSettings {
    let mut settings = RestoreSettings::new(Path::new("."));
    settings.host_clocks = true;
    settings.common.file_locks = bits & 1 != 0;
    settings.detached = bits & 2 != 0;
    settings.common.shell_job = bits & 4 == 0;
    settings.common.link_remap = bits & 8 != 0;
    settings.common.evasive_devices = bits & 16 == 0;
    settings.skip_file_rwx_check = bits & 32 == 0;
    settings
}

/// Images, some of them changed.
struct Snapshot(BTreeMap<String, Arc<File>>);

impl Snapshot {
    fn of(base: &Base) -> Self {
        Self(base.images.iter().map(|image| (image.name.clone(), Arc::clone(&image.file))).collect())
    }
}

impl Store for Snapshot {
    fn create_raw(&self, _: &str) -> Result<Box<dyn ImageSink>, ImageError> {
        unreachable!("a restore writes no images")
    }
    fn create_pages(&self, _: &str, _: u64) -> Result<PagesSink, ImageError> {
        unreachable!("a restore writes no images")
    }
    fn open_raw(&self, name: &str) -> Result<Option<ImageFile>, ImageError> {
        let Some(file) = self.0.get(name) else { return Ok(None) };
        let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        file.and_then(ImageFile::whole).map(Some).map_err(|source| ImageError::Io { action: "open", path: self.path_of(name), source })
    }
    fn names(&self) -> Result<Vec<String>, ImageError> {
        Ok(self.0.keys().cloned().collect())
    }
    fn commit(&self) -> Result<(), ImageError> {
        Ok(())
    }
    fn withdraw(&self) -> Result<(), ImageError> {
        Ok(())
    }
    fn parent(&self) -> Result<Option<Arc<dyn Store>>, ImageError> {
        Ok(None)
    }
    fn link_parent(&self, _: &Path) -> Result<(), ImageError> {
        Ok(())
    }
    fn path_of(&self, name: &str) -> PathBuf {
        Path::new("fuzz").join(name)
    }
    fn unfinished(&self) -> Arc<AtomicBool> {
        Arc::default()
    }
}

/// What the input chooses; all zero when it has ended.
struct Choice<'b, 'u> {
    base: &'b Base,
    input: Unstructured<'u>,
    /// Something has been multiplied; once is enough.
    many: bool,
}

/// Most bytes of what is multiplied, as JSON.
const MOST_BYTES: usize = 1 << 17;

impl Choice<'_, '_> {
    fn byte(&mut self) -> usize {
        self.input.arbitrary::<u8>().unwrap_or(0).into()
    }

    fn word(&mut self) -> usize {
        self.input.arbitrary::<u16>().unwrap_or(0).into()
    }

    fn below(&mut self, end: usize) -> usize {
        (if end > 255 { self.word() } else { self.byte() }) % end.max(1)
    }

    fn number(&mut self, old: i128) -> i128 {
        match self.byte() % 6 {
            0 => self.input.arbitrary::<u64>().unwrap_or(0).into(),
            1 => self.byte() as i128,
            2 => old + self.byte() as i128 - 128,
            3 => old ^ 1 << (self.byte() % 64),
            4 => old + (self.byte() as i128 - 128) * 4096,
            _ => {
                let nth = self.below(self.base.numbers.len());
                self.base.numbers.get(nth).copied().unwrap_or(0)
            }
        }
    }

    fn text(&mut self, old: &str) -> String {
        match self.byte() % 4 {
            // Of base64 it leaves something that can be decoded.
            0 if !old.is_empty() && old.is_ascii() => {
                let mut bytes = old.as_bytes().to_vec();
                let at = self.below(bytes.len());
                if bytes[at].is_ascii_alphanumeric() {
                    bytes[at] = b"ABCDwxyz01289afg"[self.byte() % 16];
                }
                String::from_utf8(bytes).unwrap_or_default()
            }
            1 if old.is_ascii() => old[..self.below(old.len() + 1) / 4 * 4].to_owned(),
            2 if old.len() < 1 << 16 => old.repeat(1 + self.byte() % 16),
            _ => {
                let nth = self.below(self.base.texts.len());
                self.base.texts.get(nth).cloned().unwrap_or_default()
            }
        }
    }

    /// As a field of this type can have it.
    fn fitting(&mut self, old: i128, kind: Option<&Kind>) -> Value {
        let new = self.number(old);
        match kind {
            Some(Kind::Uint32 | Kind::Fixed32) => json!(new as u32),
            Some(Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 | Kind::Enum(_)) => json!(new as i32),
            Some(Kind::Int64 | Kind::Sint64 | Kind::Sfixed64) => json!(new as i64),
            _ => json!(new as u64),
        }
    }

    fn new_field(&mut self, kind: &Kind, depth: usize) -> Value {
        match kind {
            Kind::Message(message) => {
                let mut members = Map::new();
                for field in message.fields().filter(|field| field.cardinality() == Cardinality::Required) {
                    if depth < 4 {
                        members.insert(field.name().to_owned(), self.new_field(&field.kind(), depth + 1));
                    }
                }
                Value::Object(members)
            }
            Kind::Bytes => json!(["", "text", "AAAA\n", "/tmp"][self.byte() % 4]),
            Kind::Bool => json!(self.byte() & 1 != 0),
            kind => self.fitting(0, Some(kind)),
        }
    }

    /// Changes something at or below `at`.
    fn edit(&mut self, at: &mut Value, message: Option<&MessageDescriptor>, kind: Option<&Kind>) {
        match at {
            Value::Object(members) => {
                let nth = self.below(members.len() + 2);
                if let Some((name, member)) = members.iter_mut().nth(nth) {
                    let kind = message.and_then(|m| m.get_field_by_name(name)).map(|field| field.kind());
                    let below = kind.as_ref().and_then(|kind| kind.as_message().cloned());
                    return self.edit(member, below.as_ref(), kind.as_ref());
                }
                let nth = nth - members.len();
                if nth == 0 {
                    let name = members.keys().nth(self.below(members.len())).cloned().unwrap_or_default();
                    members.remove(&name);
                } else if let Some(message) = message {
                    let nth = self.below(message.fields().len());
                    let Some(field) = message.fields().nth(nth) else { return };
                    let mut new = self.new_field(&field.kind(), 0);
                    if field.cardinality() == Cardinality::Repeated {
                        let most = if std::mem::replace(&mut self.many, true) { 2 } else { 1000 };
                        let many = [0, 1, 2, 16, 64, 1000][self.byte() % 6].min(most);
                        new = Value::Array(vec![new; many]);
                    }
                    members.insert(field.name().to_owned(), new);
                }
            }
            Value::Array(list) => {
                let nth = self.below(list.len() + 5);
                if let Some(item) = list.get_mut(nth) {
                    return self.edit(item, message, kind);
                }
                let which = self.below(list.len());
                match (nth - list.len(), list.get(which).cloned()) {
                    (0, Some(_)) => drop(list.remove(which)),
                    (1, Some(item)) => list.insert(self.below(list.len()), item),
                    (2, Some(item)) if !std::mem::replace(&mut self.many, true) => {
                        let most = MOST_BYTES / item.to_string().len().max(1);
                        list.extend(vec![item; [1, 3, 30, 300, 3000][self.byte() % 5].min(most)]);
                    }
                    (3, _) => list.reverse(),
                    (4, Some(_)) => {
                        let other = self.below(list.len());
                        list.swap(which, other);
                    }
                    _ => {}
                }
            }
            Value::Bool(is) => *is = !*is,
            Value::String(_) if matches!(kind, Some(Kind::Enum(_))) => {
                let new = self.number(0) as i32;
                *at = json!(new);
            }
            Value::String(text) => *text = self.text(text),
            Value::Number(old) => {
                let old = old.as_i128().unwrap_or(0);
                *at = self.fitting(old, kind);
            }
            Value::Null => {}
        }
    }
}

/// Changes images as the input says.
fn changed(base: &Base, choice: &mut Choice<'_, '_>) -> Snapshot {
    let mut snapshot = Snapshot::of(base);
    let mut edited: BTreeMap<usize, Value> = BTreeMap::new();
    for _ in 0..MOST_EDITS {
        if choice.input.is_empty() {
            break;
        }
        let nth = choice.below(base.images.len());
        let image = &base.images[nth];
        let how = choice.byte();
        match (&image.shown, image.kind) {
            (Some(shown), Some(kind)) if how >= 8 => {
                let shown = edited.entry(nth).or_insert_with(|| shown.clone());
                let Some(entries) = shown["entries"].as_array_mut() else { continue };
                let entry = choice.below(entries.len());
                let message = kind.message_at(entry).and_then(descriptors::message);
                match entries.get_mut(entry) {
                    Some(entry) if how >= 16 => choice.edit(entry, message.as_ref(), None),
                    _ => choice.edit(&mut shown["entries"], message.as_ref(), None),
                }
            }
            _ => {
                let mut bytes = image.bytes.clone();
                match how % 4 {
                    0 => drop(snapshot.0.remove(&image.name)),
                    1 => bytes.truncate(choice.below(bytes.len())),
                    2 => {
                        let other = choice.below(base.images.len());
                        bytes.clone_from(&base.images[other].bytes);
                    }
                    _ => {
                        let at = choice.below(bytes.len());
                        if let Some(byte) = bytes.get_mut(at) {
                            *byte = choice.byte() as u8;
                        }
                    }
                }
                if how % 4 != 0 {
                    snapshot.0.insert(image.name.clone(), in_memory(&bytes));
                }
            }
        }
    }
    for (nth, shown) in edited {
        if let Ok(bytes) = json::encode(&shown) {
            snapshot.0.insert(base.images[nth].name.clone(), in_memory(&bytes));
        }
    }
    snapshot
}

fuzz_target!(|input: &[u8]| {
    let base = BASE.get_or_init(base);
    let mut choice = Choice { base, input: Unstructured::new(input), many: false };
    let settings = settings(u8::try_from(choice.byte()).unwrap_or(0));
    let snapshot = changed(base, &mut choice);
    let outcome = restore::rehearse(&snapshot, &settings);
    if std::env::var_os("PLAN_SAYS").is_some() {
        eprintln!("{outcome:#?}");
    }
    drop(snapshot);
    assert_eq!(files(), base.files, "files are left or gone");
    assert_eq!(own_descriptors(), base.descriptors, "descriptors are left");
});
