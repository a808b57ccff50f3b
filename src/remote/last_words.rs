//! The last word about a snapshot, in a small file of the work dir until the cache is known to have it.
//!
//! A proxy that is killed takes with it what it had still to say, and a dump whose proxy was killed has nobody to say it to.
//! The next proxy with that work dir says it (`Resume`). Without fsync: what has to be outlived is a process, not the
//! host, whose end is the end of the tree at the source in any case.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::journal::{parse_id, shown, sweep, with_cause};
use crate::ownership;
use crate::settings::OwnerCheck;

/// Longest file that is read.
const LONGEST: u64 = 64 << 10;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LastWord {
    /// Of the snapshot.
    pub(super) id: u64,
    /// Its name.
    pub(super) name: String,
    /// The cache that has it, as the proxy calls that.
    pub(super) target: String,
    /// Root of the tree.
    pub(super) pid: i32,
    /// Why the tree runs on at the source, or that it may be restored.
    pub(super) word: Result<Confirm, String>,
}

/// It may be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Confirm {
    /// The tree was left at the source on purpose.
    pub(super) survives: bool,
}

fn path(work_dir: &Path, id: u64) -> PathBuf {
    work_dir.join(format!("last-word-{}.json", shown(id)))
}

impl LastWord {
    /// Writes it down.
    pub(super) fn write(&self, work_dir: &Path) -> io::Result<()> {
        let (survives, aborted) = match &self.word {
            Ok(confirm) => (confirm.survives, None),
            Err(reason) => (false, Some(reason)),
        };
        let value = json!({
            "id": shown(self.id), "name": self.name, "target": self.target, "pid": self.pid,
            "survives": survives, "aborted": aborted,
        });
        let (path, text) = (path(work_dir, self.id), format!("{value}\n"));
        // Whole or not at all: who writes it may be killed.
        ownership::replace(&path, "last word", text.as_bytes(), OwnerCheck::On).map_err(with_cause)
    }

    fn parse(value: &Value) -> Option<Self> {
        let text = |name| value.get(name)?.as_str().map(str::to_owned);
        Some(Self {
            id: parse_id(&text("id")?)?,
            name: text("name")?,
            target: text("target")?,
            pid: value.get("pid")?.as_i64()?.try_into().ok()?,
            word: match text("aborted") {
                Some(reason) => Err(reason),
                None => Ok(Confirm { survives: value.get("survives")?.as_bool()? }),
            },
        })
    }

    fn read(path: &Path) -> io::Result<Self> {
        let file = ownership::input(path, "last word", OwnerCheck::On).map_err(with_cause)?;
        let mut text = String::new();
        file.take(LONGEST).read_to_string(&mut text)?;
        let value = serde_json::from_str(&text).map_err(io::Error::other)?;
        Self::parse(&value).ok_or_else(|| io::Error::other("it is not whole"))
    }

    /// All that lie in a work dir. What cannot be read is said, and stays.
    pub(super) fn all(work_dir: &Path) -> Vec<Self> {
        sweep(work_dir);
        let ours = |name: &str| name.starts_with("last-word-") && name.ends_with(".json");
        let entries = fs::read_dir(work_dir).into_iter().flatten().flatten();
        let paths =
            entries.filter(|entry| ours(&entry.file_name().to_string_lossy())).map(|entry| entry.path());
        let read = |path: PathBuf| {
            Self::read(&path).inspect_err(|e| tracing::warn!("{}: {e}; it stays there", path.display())).ok()
        };
        paths.filter_map(read).collect()
    }

    /// The cache has it.
    pub(super) fn forget(work_dir: &Path, id: u64) {
        let _ = fs::remove_file(path(work_dir, id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let of = |id, word| LastWord {
            id,
            name: "a \"b\"/ü".to_owned(),
            target: "dst:9996".to_owned(),
            pid: 77,
            word,
        };
        let all = [
            of(1, Ok(Confirm { survives: false })),
            of(2, Ok(Confirm { survives: true })),
            of(u64::MAX, Err("it was killed".to_owned())),
        ];
        for word in &all {
            word.write(dir.path()).unwrap();
            // Said again.
            word.write(dir.path()).unwrap();
        }
        for (name, text) in [("last-word-1.json", "{}"), ("last-word-2.json", "x"), ("other.json", "{}")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        if nix::unistd::geteuid().is_root() {
            let forged = path(dir.path(), 3);
            fs::copy(path(dir.path(), 1), &forged).unwrap();
            std::os::unix::fs::chown(&forged, Some(65534), None).unwrap();
        }
        let mut read = LastWord::all(dir.path());
        read.sort_by_key(|word| word.id);
        assert_eq!(read, all);
        for word in all {
            LastWord::forget(dir.path(), word.id);
        }
        assert!(LastWord::all(dir.path()).is_empty());
    }
}
