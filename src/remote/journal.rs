//! What outlives the processes that hand a tree over: a small file in the work dir for each hand-over.
//!
//! The source writes `migrate-ID.journal` before it stops its tree for good, and a line more before it says `Go`: without that
//! line the tree can run nowhere else, with it only the destination can say. The file is locked as long as that crtool lives,
//! and gone when the end is known. A cache writes `handover-ID.journal` before it lets a restore go on,
//! and again when the tree is known to run or not to; so a cache that is started anew can answer the source, and nobody else:
//! it has who brought the tree, too. The file
//! `handover.id` tells a source that it speaks to one that has all of these. With *confirm first* nothing is written.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

use super::draw;
use crate::{
    ownership::{self, Old},
    settings::OwnerCheck,
};

/// Whoever shares descriptors with a crtool that was killed takes a moment to die.
const DYING: Duration = Duration::from_secs(1);
/// Records of a cache that are kept.
const HISTORY: usize = 1000;

/// A process, named for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid on this host.
    pub pid: i32,
    /// Its start time in ticks since boot.
    pub start: u64,
    /// The boot.
    pub boot: String,
}

impl Process {
    /// One that is there.
    pub fn now(pid: i32) -> io::Result<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat"))?;
        let stat = crate::proc::stat::parse(&stat).map_err(|e| io::Error::other(e.to_string()))?;
        Ok(Self { pid, start: stat.starttime, boot: boot()? })
    }

    /// Whether it is there still.
    pub fn is_there(&self) -> bool {
        Self::now(self.pid).is_ok_and(|now| now == *self)
    }
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

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
    input(path)?.take(64 << 10).read_to_string(&mut text)?;
    let (record, more) = text.split_once('\n').ok_or_else(|| odd(path))?;
    Ok((serde_json::from_str(record).map_err(|_| odd(path))?, !more.is_empty()))
}

fn text(value: &Value, name: &str) -> Option<String> {
    value.get(name)?.as_str().map(str::to_owned)
}

fn process_of(value: &Value) -> Option<Process> {
    Some(Process {
        pid: value.get("pid")?.as_i64()?.try_into().ok()?,
        start: value.get("start")?.as_u64()?,
        boot: text(value, "boot")?,
    })
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

/// What a source has written about a tree that it hands over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// Of the snapshot.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The root of the tree.
    pub root: Process,
    /// Host of the cache, if it was reached without a proxy.
    pub address: Option<String>,
    /// And its port.
    pub port: u16,
    /// The journal that the cache keeps.
    pub cache: u64,
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
    fn path(work_dir: &Path, id: u64) -> PathBuf {
        work_dir.join(format!("migrate-{}.journal", shown(id)))
    }

    /// Writes it down.
    pub fn write(&self, work_dir: &Path) -> io::Result<Open> {
        let path = Self::path(work_dir, self.id);
        let value = json!({
            "id": shown(self.id), "name": self.name, "pid": self.root.pid, "start": self.root.start,
            "boot": self.root.boot, "address": self.address, "port": self.port, "cache": shown(self.cache),
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
                root: process_of(&value)?,
                address: text(&value, "address"),
                port: value.get("port")?.as_u64()?.try_into().ok()?,
                cache: parse_id(&text(&value, "cache")?)?,
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

    /// What stands there about a tree that `origin` has brought: how far it came, as which process.
    pub fn look_up(&self, id: u64, origin: &str) -> Option<(Reached, Process)> {
        let (value, _) = read(&Self::path(&self.work_dir, id)).ok()?;
        text(&value, "origin").filter(|of| of == origin)?;
        let reached = match text(&value, "state")?.as_str() {
            "going" => Reached::Going,
            "running" => Reached::Running,
            "fell" => Reached::Fell,
            _ => return None,
        };
        Some((reached, process_of(&value)?))
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
    // One that is gone has no start.
    let process = Process::now(pid).unwrap_or(Process { pid, start: 0, boot: boot()? });
    let value = json!({
        "id": shown(id), "state": state, "pid": process.pid, "start": process.start, "boot": process.boot,
        "origin": origin,
    });
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
            address: Some("::1".into()),
            port: 9996,
            cache: u64::MAX,
            going: false,
        };
        let mut open = departure.write(dir.path()).unwrap();
        assert!(departure.root.is_there());
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
        let departure =
            Departure { id: 77, name: "a".into(), root, address: None, port: 1, cache: 1, going: false };
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
            let (found, process) = journal.look_up(1, "a").unwrap();
            assert_eq!(found, reached);
            assert!(process.is_there());
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
