//! Images of an attacker: one of a real tree with one thing in it changed, over and over. Whatever that is, the restore
//! succeeds, or it refuses with one line and leaves nothing behind. Nobody outside of the tree notices.
//!
//! A mutation is made from a seed and its number alone, so each can be made again:
//! - `HOSTILE_SEED` (1 if not given) and `HOSTILE_FIRST` (0) say which comes first,
//! - `HOSTILE_COUNT` (100) how many there are, `HOSTILE_SECONDS` for how long at most,
//! - `ATTACKS_KEEP=1` prints the counts and keeps the directory,
//! - `HOSTILE_IMAGES=DIR` copies the images of the tree there, for fuzz targets, and changes nothing.

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    fs,
    io::Read as _,
    os::unix::{fs::MetadataExt as _, fs::symlink, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use crtool::image::{
    ImageKind, descriptors,
    json::{self, Style},
};
use prost_reflect::{Cardinality, FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Value, json};

use crate::{
    site::{self, Site, Verdict, clear, fail, field, numbers, others, ready, state, until},
    sys,
};

/// Nothing that is refused takes so long, on the busiest of machines.
const LONGEST: Duration = Duration::from_secs(60);
/// Most memory of crtool, in KiB: the tree has a few MiB.
const MOST_MEMORY: u64 = 300 << 10;

/// A tree with something of most things that images can hold.
pub fn tree() -> ExitCode {
    nix::unistd::setsid().expect("setsid");
    let dir = site::dir();
    let (shared, private) = (libc::MAP_SHARED | libc::MAP_ANONYMOUS, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let memory = sys::map(0, 64 << 10, rw, shared, -1);
    sys::poke(memory, b"shared");
    let large = sys::map(0, 600 << 10, rw, private, -1);
    for page in 0..150 {
        sys::poke(large + page * 4096, b"private");
    }
    let mapped = fs::File::options().read(true).write(true).open(dir.join("mapped")).expect("a file");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&mapped);
    sys::map(0, 4096, rw, libc::MAP_SHARED, fd);
    sys::map(0, 4096, rw, libc::MAP_PRIVATE, fd);
    // Deleted, and still open.
    let ghost = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.join("tree/ghost"))
        .expect("a file that is going to be deleted");
    fs::write(dir.join("tree/ghost"), "what only the image has").expect("write");
    fs::remove_file(dir.join("tree/ghost")).expect("delete");
    nix::fcntl::Flock::lock(mapped, nix::fcntl::FlockArg::LockExclusive)
        .map(std::mem::forget)
        .expect("flock");
    std::mem::forget(ghost);
    let mut pipe = [0i32; 2];
    sys!(SYS_pipe2, pipe.as_mut_ptr(), 0).expect("pipe");
    sys!(SYS_write, pipe[1], b"in the pipe".as_ptr(), 11).expect("write");
    sys!(SYS_eventfd2, 3, 0).expect("eventfd");
    let memfd = sys!(SYS_memfd_create, c"memfd".as_ptr(), 0).expect("memfd");
    sys!(SYS_write, memfd, b"in the memfd".as_ptr(), 12).expect("write");
    let epoll = sys!(SYS_epoll_create1, 0).expect("epoll");
    let event = libc::epoll_event { events: libc::EPOLLIN.cast_unsigned(), u64: 5 };
    sys!(SYS_epoll_ctl, epoll, libc::EPOLL_CTL_ADD, pipe[0], &raw const event).expect("epoll");
    let inotify = sys!(SYS_inotify_init1, 0).expect("inotify");
    let path = std::ffi::CString::new(dir.join("tree").into_os_string().into_encoded_bytes()).expect("path");
    sys!(SYS_inotify_add_watch, inotify, path.as_ptr(), libc::IN_CREATE).expect("watch");
    let time = [0u64, 0, 5000, 0];
    let timer = sys!(SYS_timerfd_create, libc::CLOCK_MONOTONIC, 0).expect("timerfd");
    sys!(SYS_timerfd_settime, timer, 0, time.as_ptr(), 0).expect("timerfd");
    let blocked = 1u64 << (libc::SIGUSR2 - 1) | 1u64 << (libc::SIGRTMIN() - 1);
    sys!(SYS_signalfd4, usize::MAX, &raw const blocked, 8, 0).expect("signalfd");
    sys!(SYS_setitimer, libc::ITIMER_REAL, [0u64, 0, 5000, 0].as_ptr(), 0).expect("setitimer");
    let mut id = 0i32;
    sys!(SYS_timer_create, libc::CLOCK_MONOTONIC, 0, &raw mut id).expect("timer_create");
    sys!(SYS_timer_settime, id, 0, time.as_ptr(), 0).expect("timer_settime");
    let mut ring = 0usize;
    // Where the kernel has no asynchronous I/O there is none.
    let _ = sys!(SYS_io_setup, 8, &raw mut ring);
    sys::ignore(libc::SIGHUP);
    sys::fork(|| {
        // Another session, with another user in it, and a child in a group of its own.
        sys!(SYS_setsid).expect("setsid");
        sys::fork(|| {
            sys!(SYS_setpgid, 0, 0).expect("setpgid");
            sys::poke(large, b"differs");
            sys::rest()
        });
        sys::become_user(site::NOBODY, true);
        sys::rest()
    });
    let zombie = sys::fork(|| 3);
    let shares = libc::CLONE_FILES | libc::CLONE_FS | libc::SIGCHLD;
    sys::clone_like_fork(shares, || sys::rest());
    sys!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const blocked, 0, 8).expect("block");
    sys!(SYS_kill, std::process::id(), libc::SIGUSR2).expect("kill");
    sys!(SYS_kill, std::process::id(), libc::SIGRTMIN()).expect("kill");
    until("the zombie is one", || state(zombie) == 'Z').expect("a zombie");
    sys::forbid_mkdir();
    for _ in 0..2 {
        thread::Builder::new().stack_size(64 << 10).spawn(|| sys::rest()).expect("thread");
    }
    ready();
    sys::rest()
}

/// Somebody who has nothing to do with the tree, and whom no signal ends: those that come stay.
pub fn bystander() -> ExitCode {
    sys!(SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const ALL, 0, 8).expect("block");
    ready();
    sys::rest()
}
static ALL: u64 = u64::MAX;

/// Numbers that look random, always the same.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64, number: u64) -> Self {
        let mut numbers =
            Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        numbers.next();
        numbers
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap_or(0)
    }

    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// What values are changed to.
struct Edges {
    numbers: Vec<i128>,
    texts: Vec<String>,
}

impl Edges {
    /// `pids` are ids that mean something; `victim` is the path of a file that is none of the tree's business.
    fn new(pids: &[i32], victim: &Path) -> Self {
        let mut numbers = vec![0, 1, 2, 3, -1, -2, 7, 63, 64, 65, 255, 256, 1000, 4095, 4096, 4097, 65535];
        for bit in [15, 16, 20, 22, 30, 31, 32, 40, 46, 47, 48, 62, 63, 64] {
            numbers.extend([(1i128 << bit) - 1, 1i128 << bit, (1i128 << bit) - 4096, -(1i128 << (bit - 1))]);
        }
        numbers.extend([0x7fff_ffff_f000, 0x7fff_ffff_e000, 0xffff_ffff_ff60_0000]);
        numbers.extend(pids.iter().map(|&pid| i128::from(pid)));
        let victim = victim.display().to_string();
        let texts = [
            "",
            "/",
            ".",
            "..",
            "a",
            "a\0b",
            "../../../../../../etc/hostname",
            "/proc/self/mem",
            "/proc/1/root",
            "/proc/sysrq-trigger",
            "/dev/full",
            "/nowhere/at/all",
            "%s%n\n\u{1b}[2J",
        ];
        let mut texts: Vec<String> = texts.map(str::to_owned).to_vec();
        texts.extend([
            victim.clone(),
            format!("..{victim}"),
            format!("{victim}/"),
            "x/".repeat(3000),
            "y".repeat(70_000),
        ]);
        Self { numbers, texts }
    }

    fn value(&self, like: &Value, random: &mut Numbers) -> Value {
        match like {
            Value::Bool(is) => Value::Bool(!is),
            Value::Number(old) => {
                let old = old.as_i128().unwrap_or(0);
                let new = match random.below(5) {
                    0 => old + 1,
                    1 => old - 1,
                    2 => old ^ 1i128 << random.below(32),
                    _ => *random.one_of(&self.numbers),
                };
                number(new)
            }
            Value::String(_) => Value::String(random.one_of(&self.texts).clone()),
            other => other.clone(),
        }
    }
}

fn number(value: i128) -> Value {
    u64::try_from(value).map_or_else(|_| i64::try_from(value).map_or(json!(0), Value::from), Value::from)
}

/// A place in an image: where it is, and what message describes it.
type Place = (Vec<Step>, Option<MessageDescriptor>);

#[derive(Debug, Clone)]
enum Step {
    Member(String),
    Nth(usize),
}

/// All places below `value`.
fn places(value: &Value, message: Option<&MessageDescriptor>, at: &mut Vec<Step>, all: &mut Vec<Place>) {
    all.push((at.clone(), message.cloned()));
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let kind = message.and_then(|m| m.get_field_by_name(name)).map(|f: FieldDescriptor| f.kind());
                let below = kind.and_then(|kind| kind.as_message().cloned());
                at.push(Step::Member(name.clone()));
                places(member, below.as_ref(), at, all);
                at.pop();
            }
        }
        // Of a long list the begin is enough, since all of it is read alike.
        Value::Array(list) => {
            for (nth, item) in list.iter().enumerate().take(40) {
                at.push(Step::Nth(nth));
                places(item, message, at, all);
                at.pop();
            }
        }
        _ => {}
    }
}

fn go<'v>(value: &'v mut Value, path: &[Step]) -> &'v mut Value {
    path.iter().fold(value, |value, step| match step {
        Step::Member(name) => &mut value[name.as_str()],
        Step::Nth(nth) => &mut value[*nth],
    })
}

/// Changes one thing in an image; says what.
fn change(shown: &mut Value, kind: ImageKind, edges: &Edges, random: &mut Numbers) -> String {
    let entries = shown["entries"].as_array().map_or(0, Vec::len);
    let entry = random.below(entries);
    let name = kind.message_at(entry);
    let message = name.and_then(descriptors::message);
    let mut all = Vec::new();
    let list = &mut shown["entries"];
    if entries == 0 || random.below(20) == 0 {
        // Something about the list.
        let Some(list) = list.as_array_mut() else { return "no list".into() };
        return match (random.below(4), list.get(entry).cloned()) {
            (0, Some(_)) => {
                list.remove(entry);
                format!("entry {entry} is not there")
            }
            (1, Some(again)) => {
                list.push(again);
                format!("entry {entry} is there twice")
            }
            (2, Some(again)) => {
                list.extend(vec![again; 1000]);
                format!("entry {entry} is there 1,001 times")
            }
            _ => {
                list.reverse();
                "the entries come in the opposite order".into()
            }
        };
    }
    places(&list[entry], message.as_ref(), &mut vec![Step::Nth(entry)], &mut all);
    let (path, message) = random.one_of(&all).clone();
    let at = go(list, &path);
    let said = path.iter().fold(String::from("entries"), |said, step| match step {
        Step::Member(name) => format!("{said}.{name}"),
        Step::Nth(nth) => format!("{said}[{nth}]"),
    });
    match at {
        Value::Object(members) => {
            let fields: Vec<FieldDescriptor> = message.iter().flat_map(MessageDescriptor::fields).collect();
            if random.below(3) == 0 && !members.is_empty() {
                let name = members.keys().nth(random.below(members.len())).cloned().unwrap_or_default();
                members.remove(&name);
                return format!("{said}.{name} is not there");
            }
            if fields.is_empty() {
                return format!("nothing known of {said}");
            }
            let field = random.one_of(&fields);
            let like = match field.kind() {
                Kind::Message(_) => json!({}),
                Kind::Bytes if descriptors::is_text(field) => json!("text"),
                Kind::Bytes => json!("AAAA\n"),
                Kind::Bool => json!(false),
                _ => json!(0),
            };
            let mut new = match like.as_str() {
                Some("AAAA\n") => like,
                _ => edges.value(&like, random),
            };
            if field.cardinality() == Cardinality::Repeated {
                new = Value::Array(vec![new; *random.one_of(&[0, 1, 2, 64, 1000])]);
            }
            let shown = new.to_string();
            members.insert(field.name().to_owned(), new);
            format!("{said}.{} = {}", field.name(), shown.get(..60).unwrap_or(&shown))
        }
        Value::Array(list) => match random.below(4) {
            0 => {
                list.clear();
                format!("{said} is empty")
            }
            1 => {
                list.pop();
                format!("{said} has one less")
            }
            2 => {
                list.reverse();
                format!("{said} is turned round")
            }
            _ => {
                if let Some(first) = list.first().cloned() {
                    list.extend(vec![first; 1000]);
                }
                format!("{said} has 1,000 more")
            }
        },
        leaf => {
            let old = leaf.to_string();
            *leaf = edges.value(leaf, random);
            let new = leaf.to_string();
            format!("{said} = {}, was {}", new.get(..60).unwrap_or(&new), old.get(..60).unwrap_or(&old))
        }
    }
}

/// Changes one image of `dir` (which holds copies); says what, or nothing if what came out is no image.
fn mutate(
    dir: &Path,
    name: &str,
    names: &[String],
    edges: &Edges,
    random: &mut Numbers,
) -> Result<Option<String>, String> {
    let path = dir.join(name);
    let failed = |e: std::io::Error| format!("{name}: {e}");
    let image = fs::read(&path).map_err(failed)?;
    let raw = random.below(40);
    let kind = ImageKind::by_file_name(name).map(|(kind, _)| kind);
    if raw > 5
        && let Some(kind) = kind
    {
        let style = Style { pretty: false, payload: true };
        let Ok(mut shown) = json::decode(image.as_slice(), image.len() as u64, &path, style) else {
            return Ok(None);
        };
        let said = change(&mut shown, kind, edges, random);
        let Ok(changed) = json::encode(&shown) else { return Ok(None) };
        fs::write(&path, changed).map_err(failed)?;
        return Ok(Some(format!("{name}: {said}")));
    }
    let said = match raw {
        0 => {
            let len = random.below(image.len());
            fs::write(&path, image.get(..len).unwrap_or_default()).map_err(failed)?;
            format!("cut to {len} of {} bytes", image.len())
        }
        1 => {
            fs::remove_file(&path).map_err(failed)?;
            "is not there".into()
        }
        2 => {
            fs::remove_file(&path).map_err(failed)?;
            let to = ["/dev/zero", "/dev/tty", ".", "nowhere"][random.below(4)];
            symlink(to, &path).map_err(failed)?;
            format!("is a link to {to}")
        }
        3 => {
            let other = random.one_of(names);
            let bytes = fs::read(dir.join(other)).map_err(failed)?;
            fs::write(&path, bytes).map_err(failed)?;
            format!("is {other}")
        }
        4 => {
            let file = fs::File::options().write(true).open(&path).map_err(failed)?;
            file.set_len(1 << 40).map_err(failed)?;
            "is a hole of 1 TiB after its end".into()
        }
        _ => {
            let mut image = image;
            if image.is_empty() {
                return Ok(None);
            }
            let (at, bit) = (random.below(image.len()), random.below(8));
            image[at] ^= 1 << bit;
            fs::write(&path, image).map_err(failed)?;
            format!("bit {bit} of byte {at} is turned")
        }
    };
    Ok(Some(format!("{name}: {said}")))
}

/// What nobody may change: files, mounts.
fn world(dirs: &[PathBuf]) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // Mounts of others come and go beside ours.
    all.insert("mounts".into(), mounts.lines().count().to_string());
    let mut todo = dirs.to_vec();
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            let content = if meta.is_file() { begin_of(&path) } else { Vec::new() };
            let said = format!("{:o} {} {} {:?}", meta.mode(), meta.uid(), meta.nlink(), content);
            if meta.is_dir() {
                todo.push(path.clone());
            }
            all.insert(path.display().to_string(), said);
        }
    }
    all
}

fn begin_of(path: &Path) -> Vec<u8> {
    let mut begin = vec![0; 64];
    let len = fs::File::open(path).and_then(|mut file| file.read(&mut begin)).unwrap_or(0);
    begin.truncate(len);
    begin
}

/// Tries one directory of images: what is wrong, if something is, and whether it was restored.
fn tried(site: &Site, bystander: i32, watched: &[PathBuf], stop: bool) -> (bool, Vec<String>) {
    let before = world(watched);
    let mut wrong = Vec::new();
    let err = site.path("crtool.err");
    let words: &[&str] = if stop {
        &["restore", "-d", "--file-locks", "--leave-stopped"]
    } else {
        &["restore", "-d", "--file-locks"]
    };
    let file = fs::File::create(&err).expect("file for crtool's words");
    let mut child = site.command(words).stderr(file).spawn().expect("start crtool");
    let begun = Instant::now();
    let pid = child.id().cast_signed();
    let mut memory = 0;
    let end = loop {
        let peak = field(pid, pid, "VmHWM");
        memory = memory.max(peak.trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0));
        if let Ok(Some(end)) = child.try_wait() {
            break end;
        }
        if begun.elapsed() > LONGEST {
            wrong.push(format!("it takes more than {LONGEST:?}"));
            let _ = child.kill();
            break child.wait().expect("end of crtool");
        }
        thread::sleep(Duration::from_millis(1));
    };
    let said = String::from_utf8_lossy(&fs::read(&err).unwrap_or_default()).into_owned();
    if said.contains("panicked") || end.code().is_none() {
        wrong.push(format!("crtool ended with {:?} and signal {:?}: {said}", end.code(), end.signal()));
    }
    let restored = match end.code() {
        Some(0) => true,
        // Restored, but a task has died since: nothing says that what images show can live.
        Some(code) if said.contains("the tree is restored") => code != 1,
        _ => false,
    };
    if memory > MOST_MEMORY {
        wrong.push(format!("crtool had {} MiB of memory", memory >> 10));
    }
    if !restored {
        if said.trim().is_empty() || said.trim_end().lines().count() > 1 {
            wrong.push(format!("not one line: {said:?}"));
        }
        let gone = || others().into_iter().all(|pid| pid == bystander || matches!(state(pid), '-' | 'Z'));
        let begun = Instant::now();
        while !gone() && begun.elapsed() < Duration::from_secs(5) {
            thread::sleep(Duration::from_millis(1));
        }
        if !gone() {
            let left: Vec<i32> = others().into_iter().filter(|&pid| pid != bystander).collect();
            wrong.push(format!("refused, but these tasks are left: {left:?}: {said}"));
        }
    }
    clear(&[bystander]);
    let pending = field(bystander, bystander, "ShdPnd") + &field(bystander, bystander, "SigPnd");
    if state(bystander) != 'S' || !pending.trim_start_matches('0').is_empty() {
        wrong.push(format!("the bystander is {} and got signals: {pending}", state(bystander)));
    }
    let differ = site::differences(&before, &world(watched));
    if !differ.is_empty() {
        wrong.push(format!("(status {:?}) {differ}{said}", end.code()));
    }
    (restored, wrong)
}

pub fn wanted(name: &str, otherwise: u64) -> u64 {
    env::var(name).ok().and_then(|word| word.parse().ok()).unwrap_or(otherwise)
}

/// Every change: restored, or refused.
pub fn one_thing_changed(site: &mut Site) -> Verdict {
    let io = |e: std::io::Error| e.to_string();
    let seeds = env::var_os("HOSTILE_IMAGES").map(PathBuf::from);
    if let Some(seeds) = &seeds {
        // The images are good for as long as the program stays what it is.
        let program = seeds.with_extension("program");
        fs::create_dir_all(seeds).and_then(|()| fs::copy(&site.program, &program)).map_err(io)?;
        site.program = program;
    }
    let (tree_dir, outside) = (site.path("tree"), site.path("outside"));
    for dir in [&tree_dir, &outside] {
        fs::create_dir(dir).map_err(io)?;
    }
    fs::write(site.path("mapped"), [7; 4096]).map_err(io)?;
    let victim = outside.join("victim");
    fs::write(&victim, "nobody's business").map_err(io)?;
    let bystander = site.play("bystander", "")?;
    let mut tree = site.play("tree", "")?;
    let mut pids: Vec<i32> =
        others().into_iter().flat_map(|pid| numbers(&format!("/proc/{pid}/task"))).collect();
    pids.push(1);
    let pid = tree.pid.to_string();
    site.run(&["dump", "--file-locks", "-t", &pid]).succeeded("dump")?;
    tree.until_ended()?;
    let pristine = site.path("pristine");
    fs::rename(site.path("images"), &pristine).map_err(io)?;
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(&pristine).map_err(io)? {
        names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| !name.starts_with("stats"));
    names.sort();
    if let Some(seeds) = seeds {
        for name in &names {
            fs::copy(pristine.join(name), seeds.join(name)).map_err(io)?;
        }
        return Ok(());
    }
    let edges = Edges::new(&pids, &victim);
    let watched = [outside, tree_dir, PathBuf::from("/dev/shm"), pristine.clone()];
    // In memory, because they are copied over and over.
    let images = site.path("images");
    fs::create_dir(&images).map_err(io)?;
    // The other one because everybody else of this machine uses it meanwhile.
    for dir in [images.as_path(), Path::new("/dev/shm")] {
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "mode=755", "none"]).arg(dir).status();
        if !mount.map_err(io)?.success() {
            return fail(format!("no tmpfs at {}", dir.display()));
        }
    }
    let copy = |name: &String| -> Result<(), String> {
        let _ = fs::remove_file(images.join(name));
        fs::copy(pristine.join(name), images.join(name)).map(drop).map_err(io)
    };
    names.iter().try_for_each(copy)?;
    let (restored, wrong) = tried(site, bystander.pid, &watched, false);
    if !restored || !wrong.is_empty() {
        let said = fs::read_to_string(site.path("crtool.err")).unwrap_or_default();
        return fail(format!("as they are: {said}{wrong:?}"));
    }
    let (seed, first) = (wanted("HOSTILE_SEED", 1), wanted("HOSTILE_FIRST", 0));
    let seconds = wanted("HOSTILE_SECONDS", u64::MAX);
    let count = wanted("HOSTILE_COUNT", if seconds == u64::MAX { 100 } else { u64::MAX });
    let begun = Instant::now();
    let (mut tries, mut restores, mut all) = (0u64, 0u64, String::new());
    let mut found = 0;
    for number in first..first.saturating_add(count) {
        if begun.elapsed().as_secs() >= seconds || found >= 40 {
            break;
        }
        let mut random = Numbers::new(seed, number);
        let name = random.one_of(&names);
        let changed = mutate(&images, name, &names, &edges, &mut random)?;
        let Some(said) = changed else { continue };
        fs::write(site.path("now"), format!("{number} {said}\n")).map_err(io)?;
        let (restored, wrong) = tried(site, bystander.pid, &watched, random.below(4) != 0);
        copy(name)?;
        tries += 1;
        restores += u64::from(restored);
        for what in wrong {
            found += 1;
            let _ = writeln!(all, "HOSTILE_SEED={seed} HOSTILE_FIRST={number}: {said}\n  {what}");
            if env::var_os("ATTACKS_KEEP").is_some() {
                let _ = fs::write(site.path("found"), &all);
            }
        }
    }
    println!("{tries} changes in {:?}: {restores} restored, {} refused", begun.elapsed(), tries - restores);
    if all.is_empty() { Ok(()) } else { fail(all) }
}
