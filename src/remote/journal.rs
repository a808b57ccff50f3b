//! What outlives the processes that hand a tree over: a small file in the work dir for each hand-over.
//!
//! The source writes `migrate-ID.journal` before it stops its tree for good, and a line more before it says `Go`: without that
//! line the tree can run nowhere else, with it only the destination can say. The file is locked as long as that crtool lives,
//! and gone when the end is known. A cache writes `handover-ID.journal` before it lets a restore go on,
//! and again when the tree is known to run or not to; so a cache that is started anew can answer the source, and nobody else:
//! it has who brought the tree, too. The file
//! `handover.id` tells a source that it speaks to one that has all of these. With *confirm first* nothing is written.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{self, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use super::{draw, process::Process};
use crate::{
    action::ActionScripts,
    dump::{Before, Member, Waiting},
    ownership::{self, Old},
    settings::{NetSettings, OwnerCheck, TlsSettings},
};

/// Whoever shares descriptors with a crtool that was killed takes a moment to die.
const DYING: Duration = Duration::from_secs(1);
/// Longest journal: a tree of tens of thousands of processes may have one of some MiB.
const LONGEST: u64 = 64 << 20;
/// Records of a cache that are kept.
const HISTORY: usize = 1000;

/// Whoever shows it shows one line, with the reason in it.
pub fn with_cause(error: ownership::OwnershipError) -> io::Error {
    io::Error::other(format!("{:#}", anyhow::Error::from(error)))
}

fn odd(path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "{} is no journal of crtool, or not whole: that of a crtool that was killed before it stopped its tree, and can be \
             removed",
            path.display()
        ),
    )
}

/// One of our files, to be read: what others have put there, or could have changed, says nothing about any process.
fn input(path: &Path) -> io::Result<File> {
    ownership::input(path, "journal", OwnerCheck::On).map_err(with_cause)
}

/// The record, and whether anything stands behind it.
fn read(path: &Path) -> io::Result<(Value, bool)> {
    let mut text = String::new();
    input(path)?.take(LONGEST).read_to_string(&mut text)?;
    let (record, more) = text.split_once('\n').ok_or_else(|| odd(path))?;
    Ok((serde_json::from_str(record).map_err(|_| odd(path))?, !more.is_empty()))
}

fn text(value: &Value, name: &str) -> Option<String> {
    value.get(name)?.as_str().map(str::to_owned)
}

/// A path, in whatever letters.
fn path_to_json(path: &Path) -> Value {
    path.to_str().map_or_else(|| json!(path.as_os_str().as_bytes()), |text| json!(text))
}

fn path_from_json(value: &Value) -> Option<PathBuf> {
    match value {
        Value::String(text) => Some(text.into()),
        value => Some(OsString::from_vec(bytes_from_json(value)?).into()),
    }
}

fn bytes_from_json(value: &Value) -> Option<Vec<u8>> {
    value.as_array()?.iter().map(|byte| byte.as_u64()?.try_into().ok()).collect()
}

fn all<T>(value: &Value, name: &str, of: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.get(name)?.as_array()?.iter().map(of).collect()
}

/// Reads such an id.
pub fn parse_id(id: &str) -> Option<u64> {
    u64::from_str_radix(id, 16).ok().filter(|_| id.len() == 16)
}

/// An id as people and names of files have it.
pub fn shown(id: u64) -> String {
    format!("{id:016x}")
}

/// Writes a journal, which is there whole and locked or not at all, whenever its writer is killed.
fn write(path: &Path, value: &Value) -> io::Result<Flock<File>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.new"));
    let file = ownership::output(&new, "journal", Old::Truncated, OwnerCheck::On).map_err(with_cause)?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| io::Error::from(e))?;
    let written = (&*lock).write_all(format!("{value}\n").as_bytes()).and_then(|()| lock.sync_data());
    if let Err(error) = written.and_then(|()| fs::rename(&new, path)) {
        // Half of it would stand for a hand-over that has not begun.
        let _ = fs::remove_file(&new);
        return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
    }
    Ok(lock)
}

/// How the destination of a tree is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Through the proxy of the work dir.
    Proxy,
    /// Over a connection that was given and is gone.
    Given,
    /// Over connections of our own.
    Direct {
        /// Host of the cache.
        address: String,
        /// And its port.
        port: u16,
        /// Files for TLS, by absolute paths.
        tls: Option<TlsSettings>,
    },
}

impl Way {
    /// As these settings say.
    pub fn of(direct: Option<&NetSettings>) -> io::Result<Self> {
        let Some(net) = direct else { return Ok(Self::Proxy) };
        let (None, Some(address)) = (net.ps_socket, &net.address) else { return Ok(Self::Given) };
        let absolute = |tls: &TlsSettings| -> io::Result<TlsSettings> {
            Ok(TlsSettings {
                cacert: path::absolute(&tls.cacert)?,
                cacrl: tls.cacrl.as_ref().map(path::absolute).transpose()?,
                cert: path::absolute(&tls.cert)?,
                key: path::absolute(&tls.key)?,
                ..tls.clone()
            })
        };
        let tls = net.tls.as_ref().map(absolute).transpose()?;
        Ok(Self::Direct { address: address.clone(), port: net.port, tls })
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Proxy => json!("proxy"),
            Self::Given => json!("given"),
            Self::Direct { address, port, tls } => {
                let tls = tls.as_ref().map(|tls| {
                    json!({
                        "cacert": path_to_json(&tls.cacert), "cacrl": tls.cacrl.as_deref().map(path_to_json),
                        "cert": path_to_json(&tls.cert), "key": path_to_json(&tls.key),
                        "no_cn_verify": tls.no_cn_verify, "allow": tls.allow,
                    })
                });
                json!({ "address": address, "port": port, "tls": tls })
            }
        }
    }

    fn from_json(value: &Value) -> Option<Self> {
        match value.as_str() {
            Some("proxy") => return Some(Self::Proxy),
            Some("given") => return Some(Self::Given),
            _ => {}
        }
        let tls = |value: &Value| {
            let path = |name: &str| path_from_json(value.get(name)?);
            Some(TlsSettings {
                cacert: path("cacert")?,
                cacrl: path("cacrl"),
                cert: path("cert")?,
                key: path("key")?,
                no_cn_verify: value.get("no_cn_verify")?.as_bool()?,
                allow: all(value, "allow", |name| name.as_str().map(str::to_owned))?,
            })
        };
        let tls = match value.get("tls")? {
            Value::Null => None,
            value => Some(tls(value)?),
        };
        Some(Self::Direct {
            address: text(value, "address")?,
            port: value.get("port")?.as_u64()?.try_into().ok()?,
            tls,
        })
    }
}

fn member_to_json(member: &Member) -> Value {
    json!([member.pid, member.start])
}

fn member_from_json(value: &Value) -> Option<Member> {
    Some(Member { pid: value.get(0)?.as_i64()?.try_into().ok()?, start: value.get(1)?.as_u64()? })
}

fn before_to_json(before: &Before) -> Value {
    let waiting = |waiting: &Waiting| {
        json!([member_to_json(&waiting.process), waiting.thread, waiting.info.as_slice()])
    };
    json!({
        "members": before.members.iter().map(member_to_json).collect::<Vec<_>>(),
        "stopped": before.stopped.iter().map(member_to_json).collect::<Vec<_>>(),
        "told": before.told.iter().map(member_to_json).collect::<Vec<_>>(),
        "continued": before.continued.iter().map(waiting).collect::<Vec<_>>(),
    })
}

fn before_from_json(value: &Value) -> Option<Before> {
    let waiting = |value: &Value| {
        let thread = match value.get(1)? {
            Value::Null => None,
            tid => Some(tid.as_i64()?.try_into().ok()?),
        };
        Some(Waiting {
            process: member_from_json(value.get(0)?)?,
            thread,
            info: bytes_from_json(value.get(2)?)?.try_into().ok()?,
        })
    };
    Some(Before {
        members: all(value, "members", member_from_json)?,
        stopped: all(value, "stopped", member_from_json)?,
        told: all(value, "told", member_from_json)?,
        continued: all(value, "continued", waiting)?,
    })
}

/// What a source has written about a tree that it hands over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// Of the snapshot.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The root of the tree.
    pub root: Process,
    /// How the cache was reached.
    pub way: Way,
    /// The journal that the cache keeps.
    pub cache: u64,
    /// What cannot be seen any more in the stopped tree.
    pub before: Before,
    /// Scripts that have run when the tree was frozen, and want to know if it goes on here.
    pub scripts: ActionScripts,
    /// `Go` may have been said.
    pub going: bool,
}

/// A departure whose end is not known yet. Dropped, the file stays: somebody else has to find out.
#[derive(Debug)]
pub struct Open {
    path: PathBuf,
    file: Flock<File>,
}

impl Departure {
    /// The file of one.
    pub fn path(work_dir: &Path, id: u64) -> PathBuf {
        work_dir.join(format!("migrate-{}.journal", shown(id)))
    }

    /// Writes it down.
    pub fn write(&self, work_dir: &Path) -> io::Result<Open> {
        let path = Self::path(work_dir, self.id);
        let value = json!({
            "id": shown(self.id), "name": self.name, "root": self.root.to_json(), "way": self.way.to_json(),
            "cache": shown(self.cache), "before": before_to_json(&self.before),
            "scripts": self.scripts.scripts.iter().map(|path| path_to_json(path)).collect::<Vec<_>>(),
            "images_dir": path_to_json(&self.scripts.images_dir), "work_dir": path_to_json(&self.scripts.work_dir),
        });
        let file = write(&path, &value)?;
        Ok(Open { path, file })
    }

    /// All that stand in a work dir, and what of them cannot be read.
    pub fn all(work_dir: &Path) -> io::Result<(Vec<Self>, Vec<io::Error>)> {
        let (mut all, mut broken) = (Vec::new(), Vec::new());
        sweep(work_dir);
        for entry in fs::read_dir(work_dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let id = name.strip_prefix("migrate-").and_then(|name| name.strip_suffix(".journal"));
            let Some(id) = id.and_then(parse_id) else { continue };
            match Self::read(work_dir, id) {
                Ok(departure) => all.push(departure),
                Err(error) => broken.push(error),
            }
        }
        all.sort_by_key(|departure| departure.id);
        Ok((all, broken))
    }

    /// One of them.
    pub fn read(work_dir: &Path, id: u64) -> io::Result<Self> {
        let path = Self::path(work_dir, id);
        let (value, going) = read(&path)?;
        let parsed = || {
            Some(Self {
                id: parse_id(&text(&value, "id")?)?,
                name: text(&value, "name")?,
                root: Process::from_json(value.get("root")?)?,
                way: Way::from_json(value.get("way")?)?,
                cache: parse_id(&text(&value, "cache")?)?,
                before: before_from_json(value.get("before")?)?,
                scripts: ActionScripts {
                    scripts: all(&value, "scripts", path_from_json)?,
                    images_dir: path_from_json(value.get("images_dir")?)?,
                    work_dir: path_from_json(value.get("work_dir")?)?,
                },
                going,
            })
        };
        parsed().filter(|departure| departure.id == id).ok_or_else(|| odd(&path))
    }

    /// Takes it over, if whoever wrote it is dead. `None`: that crtool lives, and looks for [`Word`]s.
    pub fn take_over(&self, work_dir: &Path) -> io::Result<Option<Open>> {
        let path = Self::path(work_dir, self.id);
        let mut file = input(&path)?;
        let begun = Instant::now();
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Some(Open { path, file: lock })),
                Err((_, nix::errno::Errno::EWOULDBLOCK)) if begun.elapsed() > DYING => return Ok(None),
                Err((back, nix::errno::Errno::EWOULDBLOCK)) => file = back,
                Err((_, e)) => return Err(e.into()),
            }
            thread::sleep(DYING / 50);
        }
    }
}

/// What an operator says to a crtool that waits for the end of a hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// The tree does not run at the destination: it shall go on here.
    Thaw,
    /// It runs there: it shall end here.
    Kill,
}

impl Word {
    fn path(self, work_dir: &Path, id: u64) -> PathBuf {
        let ending = match self {
            Self::Thaw => "thaw",
            Self::Kill => "kill",
        };
        work_dir.join(format!("migrate-{}.{ending}", shown(id)))
    }

    /// Says it.
    pub fn say(self, work_dir: &Path, id: u64) -> io::Result<()> {
        ownership::replace(&self.path(work_dir, id), "word of the operator", b"", OwnerCheck::On)
            .map_err(with_cause)
    }

    /// One that has been said, once.
    pub fn heard(work_dir: &Path, id: u64) -> Option<Self> {
        let said = |word: &Self| {
            let path = word.path(work_dir, id);
            input(&path).is_ok() && fs::remove_file(path).is_ok()
        };
        [Self::Thaw, Self::Kill].into_iter().find(said)
    }
}

impl Open {
    /// `Go` is about to be said. It has to outlive this process, not this host, whose trees end with it.
    pub fn going(&mut self) -> io::Result<()> {
        self.file.write_all(b"going\n")
    }

    /// The end is known.
    pub fn close(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("{} cannot be removed: {error}", self.path.display());
        }
    }
}

/// How far a tree came at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// A restore was told to let it go.
    Going,
    /// It ran.
    Running,
    /// It did not.
    Fell,
}

/// Removes what was being written when its writer was killed: nobody else takes that long.
pub fn sweep(work_dir: &Path) {
    const LONG: Duration = Duration::from_secs(60);
    for entry in fs::read_dir(work_dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        let ours = [".handover", ".migrate-", ".last-word-"].iter().any(|kind| name.starts_with(kind));
        if ours && name.ends_with(".new") && age().is_some_and(|age| age > LONG) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Removes the oldest files of these names but [`HISTORY`] of them; whether there were too many.
pub fn trim(work_dir: &Path, prefix: &str, suffix: &str) -> bool {
    let Ok(entries) = fs::read_dir(work_dir) else { return false };
    let ours = |name: &str| name.starts_with(prefix) && name.ends_with(suffix);
    let mut all: Vec<_> = entries
        .flatten()
        .filter(|entry| ours(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    all.sort();
    let surplus = all.len().saturating_sub(HISTORY);
    for (_, path) in all.iter().take(surplus) {
        let _ = fs::remove_file(path);
    }
    surplus > 0
}

/// The journal of a cache.
#[derive(Debug)]
pub struct Journal {
    work_dir: PathBuf,
    /// See [`Self::identity`].
    identity: u64,
}

impl Journal {
    /// That of this work dir; begun if there is none.
    pub fn open(work_dir: &Path) -> io::Result<Self> {
        let path = work_dir.join("handover.id");
        sweep(work_dir);
        // Without some of its records it is another journal.
        let known = input(&path).and_then(io::read_to_string).ok().and_then(|id| parse_id(id.trim()));
        let known = known.filter(|_| !trim(work_dir, "handover-", ".journal"));
        let identity = match known {
            Some(identity) => identity,
            None => {
                let identity = draw();
                ownership::replace(&path, "journal", shown(identity).as_bytes(), OwnerCheck::On)
                    .map_err(with_cause)?;
                identity
            }
        };
        Ok(Self { work_dir: work_dir.to_owned(), identity })
    }

    /// Which journal this is: it is another one where the records of an earlier cache are not.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    fn path(work_dir: &Path, id: u64) -> PathBuf {
        work_dir.join(format!("handover-{}.journal", shown(id)))
    }

    /// Writes down how far a tree has come that `origin` has brought.
    pub fn note(&self, id: u64, reached: Reached, pid: i32, origin: &str) -> io::Result<()> {
        write_arrival(&self.work_dir, id, reached, pid, Some(origin))
    }

    /// Whether anything stands there about it.
    pub fn knows(&self, id: u64) -> bool {
        Self::path(&self.work_dir, id).exists()
    }

    /// What stands there about a tree that `origin` has brought: how far it came, with which pid.
    pub fn look_up(&self, id: u64, origin: &str) -> Option<(Reached, i32)> {
        let (value, _) = read(&Self::path(&self.work_dir, id)).ok()?;
        text(&value, "origin").filter(|of| of == origin)?;
        let reached = match text(&value, "state")?.as_str() {
            "going" => Reached::Going,
            "running" => Reached::Running,
            "fell" => Reached::Fell,
            _ => return None,
        };
        Some((reached, value.get("pid")?.as_i64()?.try_into().ok()?))
    }
}

/// Writes down how far a tree has come, for a restore whose cache is gone: that has written who brought it.
pub fn note(work_dir: &Path, id: u64, reached: Reached, pid: i32) -> io::Result<()> {
    let origin = read(&Journal::path(work_dir, id)).ok().and_then(|(value, _)| text(&value, "origin"));
    write_arrival(work_dir, id, reached, pid, origin.as_deref())
}

fn write_arrival(
    work_dir: &Path,
    id: u64,
    reached: Reached,
    pid: i32,
    origin: Option<&str>,
) -> io::Result<()> {
    let state = match reached {
        Reached::Going => "going",
        Reached::Running => "running",
        Reached::Fell => "fell",
    };
    let value = json!({ "id": shown(id), "state": state, "pid": pid, "origin": origin });
    ownership::replace(
        &Journal::path(work_dir, id),
        "journal",
        format!("{value}\n").as_bytes(),
        OwnerCheck::On,
    )
    .map_err(with_cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn departures() {
        let dir = tempfile::tempdir().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let departure = Departure {
            id: 77,
            name: "a \"b\"\n".into(),
            root: Process::now(own).unwrap(),
            way: Way::of(Some(&NetSettings {
                address: Some("::1".into()),
                port: 9996,
                ps_socket: None,
                tls: Some(TlsSettings {
                    cacert: "/ca".into(),
                    cacrl: None,
                    cert: "cert".into(),
                    key: OsString::from_vec(vec![b'/', 0xff]).into(),
                    no_cn_verify: true,
                    allow: vec!["CN=a".into()],
                }),
                timeout: DYING,
            }))
            .unwrap(),
            cache: u64::MAX,
            before: Before {
                members: vec![Member { pid: 3, start: 4 }],
                stopped: vec![Member { pid: 5, start: 6 }],
                told: vec![Member { pid: 7, start: 8 }],
                continued: [None, Some(9)]
                    .map(|thread| Waiting { process: Member { pid: 9, start: 10 }, thread, info: [18; 128] })
                    .into(),
            },
            scripts: ActionScripts {
                scripts: vec!["./a".into()],
                images_dir: "/i".into(),
                work_dir: dir.path().to_owned(),
            },
            going: false,
        };
        let Way::Direct { tls: Some(tls), .. } = &departure.way else { panic!("{:?}", departure.way) };
        assert!(tls.cert.is_absolute(), "{tls:?}");
        let mut open = departure.write(dir.path()).unwrap();
        assert_eq!(Departure::read(dir.path(), 77).unwrap(), departure);
        fs::write(dir.path().join("migrate-000000000000000a.journal"), "{").unwrap();
        let (all, broken) = Departure::all(dir.path()).unwrap();
        assert_eq!((all.as_slice(), broken.len()), (&[departure.clone()][..], 1));
        // While it is held by somebody, nobody else has it.
        assert!(departure.take_over(dir.path()).unwrap().is_none());
        open.going().unwrap();
        assert!(Departure::read(dir.path(), 77).unwrap().going);
        drop(open);
        departure.take_over(dir.path()).unwrap().unwrap().close();
        assert!(departure.take_over(dir.path()).is_err());
    }

    #[test]
    fn what_others_write_is_not_read() {
        use std::os::unix::fs::PermissionsExt as _;

        let dir = tempfile::tempdir().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let root = Process::now(own).unwrap();
        let (before, scripts) = (Before::default(), ActionScripts::default());
        let (name, way) = ("a".into(), Way::Proxy);
        let departure = Departure { id: 77, name, root, way, cache: 1, before, scripts, going: false };
        let open = departure.write(dir.path()).unwrap();
        let path = open.path.clone();
        drop(open);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let (all, broken) = Departure::all(dir.path()).unwrap();
        assert!(all.is_empty() && broken[0].to_string().contains("write to it"), "{broken:?}");
        assert!(departure.take_over(dir.path()).is_err());
        // One that nobody writes into does not keep whoever looks.
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(Departure::all(dir.path()).unwrap().1.len(), 1);
        Word::Kill.say(dir.path(), 5).unwrap();
        let word = Word::Kill.path(dir.path(), 5);
        fs::set_permissions(&word, fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(Word::heard(dir.path(), 5), None);
    }

    #[test]
    fn words_are_heard_once() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Word::heard(dir.path(), 5), None);
        Word::Kill.say(dir.path(), 5).unwrap();
        assert_eq!(Word::heard(dir.path(), 6), None);
        assert_eq!(Word::heard(dir.path(), 5), Some(Word::Kill));
        assert_eq!(Word::heard(dir.path(), 5), None);
    }

    #[test]
    fn what_was_being_written_goes_when_nobody_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let old = std::time::SystemTime::now() - Duration::from_secs(100);
        for (name, left) in
            [(".handover-1.journal.new", true), (".handover-2.journal.new", false), (".other.new", true)]
        {
            let file = File::create(at(name)).unwrap();
            file.set_modified(if left { old } else { std::time::SystemTime::now() }).unwrap();
        }
        Journal::open(dir.path()).unwrap();
        let there = |name: &str| at(name).exists();
        assert!(!there(".handover-1.journal.new") && there(".handover-2.journal.new") && there(".other.new"));
    }

    #[test]
    fn the_journal_of_a_cache() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert!(journal.look_up(1, "a").is_none() && !journal.knows(1));
        let own = i32::try_from(std::process::id()).unwrap();
        for reached in [Reached::Going, Reached::Running, Reached::Fell] {
            journal.note(1, reached, own, "a").unwrap();
            assert_eq!(journal.look_up(1, "a"), Some((reached, own)));
            assert!(journal.look_up(1, "b").is_none() && journal.knows(1));
        }
        // A restore does not know who brought it.
        note(dir.path(), 1, Reached::Running, own).unwrap();
        assert_eq!(journal.look_up(1, "a").unwrap().0, Reached::Running);
        assert_eq!(Journal::open(dir.path()).unwrap().identity(), journal.identity());
        // Whose records are gone is another one: what it does not know may have run.
        for id in 2..HISTORY as u64 + 2 {
            fs::write(Journal::path(dir.path(), id), "").unwrap();
        }
        assert_ne!(Journal::open(dir.path()).unwrap().identity(), journal.identity());
    }
}
