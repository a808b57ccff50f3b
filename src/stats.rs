//! What a dump or a restore counted: the two messages of `stats-dump` and `stats-restore`.
//!
//! Times are microseconds. Both files go to the work dir, not to the images.

use std::{fmt, path::Path, time::Duration};

use crate::{
    image::{ImageKind, framing, pb},
    ownership::{self, OwnershipError},
    settings::OwnerCheck,
};

/// Counts and times of one dump.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// From the first interrupt until everything stood still.
    pub freezing_time: Duration,
    /// From then on until the tree was let go or killed.
    pub frozen_time: Duration,
    /// Finding out which pages to write.
    pub memdump_time: Duration,
    /// Writing them.
    pub memwrite_time: Duration,
    /// Pages of private memory looked at.
    pub pages_scanned: u64,
    /// Of these, unchanged since the parent image.
    pub pages_skipped_parent: u64,
    /// Of these, written.
    pub pages_written: u64,
    /// Of these, left for later.
    pub pages_lazy: u64,
    /// Pages of shared memory looked at.
    pub shpages_scanned: u64,
    /// Of these, unchanged since the parent image.
    pub shpages_skipped_parent: u64,
    /// Of these, written.
    pub shpages_written: u64,
}

/// Counts and times of one restore.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// Pages compared with the parent's before they were written.
    pub pages_compared: u64,
    /// Of these, left shared.
    pub pages_skipped_cow: u64,
    /// Pages written into the new tasks.
    pub pages_restored: u64,
    /// Making the tasks.
    pub forking_time: Duration,
    /// The whole restore.
    pub restore_time: Duration,
}

impl DumpStats {
    fn entry(&self) -> pb::StatsEntry {
        pb::StatsEntry {
            dump: Some(pb::DumpStatsEntry {
                freezing_time: micros(self.freezing_time),
                frozen_time: micros(self.frozen_time),
                memdump_time: micros(self.memdump_time),
                memwrite_time: micros(self.memwrite_time),
                pages_scanned: self.pages_scanned,
                pages_skipped_parent: self.pages_skipped_parent,
                pages_written: self.pages_written,
                irmap_resolve: Some(0),
                pages_lazy: self.pages_lazy,
                page_pipes: None,
                page_pipe_bufs: None,
                shpages_scanned: Some(self.shpages_scanned),
                shpages_skipped_parent: Some(self.shpages_skipped_parent),
                shpages_written: Some(self.shpages_written),
            }),
            restore: None,
        }
    }

    /// Writes `stats-dump`.
    pub fn write(&self, work_dir: &Path, check: OwnerCheck) -> Result<(), StatsError> {
        write(work_dir, ImageKind::StatsDump, &self.entry(), check)
    }
}

/// As `--display-stats` prints it.
impl fmt::Display for DumpStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Displaying dump stats:")?;
        writeln!(f, "Freezing time: {} us", self.freezing_time.as_micros())?;
        writeln!(f, "Frozen time: {} us", self.frozen_time.as_micros())?;
        writeln!(f, "Memory dump time: {} us", self.memdump_time.as_micros())?;
        writeln!(f, "Memory write time: {} us", self.memwrite_time.as_micros())?;
        writeln!(f, "IRMAP resolve time: 0 us")?;
        count(f, "Memory pages scanned", self.pages_scanned)?;
        count(f, "Memory pages skipped from parent", self.pages_skipped_parent)?;
        count(f, "Memory pages written", self.pages_written)?;
        count(f, "Lazy memory pages", self.pages_lazy)
    }
}

impl RestoreStats {
    fn entry(&self) -> pb::StatsEntry {
        pb::StatsEntry {
            dump: None,
            restore: Some(pb::RestoreStatsEntry {
                pages_compared: self.pages_compared,
                pages_skipped_cow: self.pages_skipped_cow,
                forking_time: micros(self.forking_time),
                restore_time: micros(self.restore_time),
                pages_restored: Some(self.pages_restored),
            }),
        }
    }

    /// Writes `stats-restore`.
    pub fn write(&self, work_dir: &Path, check: OwnerCheck) -> Result<(), StatsError> {
        write(work_dir, ImageKind::StatsRestore, &self.entry(), check)
    }
}

/// As `--display-stats` prints it.
impl fmt::Display for RestoreStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Displaying restore stats:")?;
        count(f, "Pages compared", self.pages_compared)?;
        count(f, "Pages skipped COW", self.pages_skipped_cow)?;
        count(f, "Pages restored", self.pages_restored)?;
        writeln!(f, "Restore time: {} us", self.restore_time.as_micros())?;
        writeln!(f, "Forking time: {} us", self.forking_time.as_micros())
    }
}

fn count(f: &mut fmt::Formatter<'_>, what: &str, n: u64) -> fmt::Result {
    writeln!(f, "{what}: {n} ({n:#x})")
}

/// Microseconds; more than the field holds (71 minutes) is shown as its largest value.
fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// The file cannot be written.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct StatsError(#[from] OwnershipError);

fn write(
    work_dir: &Path,
    kind: ImageKind,
    entry: &pb::StatsEntry,
    check: OwnerCheck,
) -> Result<(), StatsError> {
    let mut bytes = framing::magic_bytes(kind);
    framing::put_entry(&mut bytes, entry);
    let path = work_dir.join(kind.file_name(None));
    Ok(ownership::replace(&path, "statistics", &bytes, check)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::image::framing::EntryReader;

    #[test]
    fn written_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let stats = DumpStats {
            frozen_time: Duration::from_micros(3116),
            pages_written: 30,
            shpages_written: 2,
            ..DumpStats::default()
        };
        stats.write(dir.path(), OwnerCheck::On).unwrap();
        let path = dir.path().join("stats-dump");
        let bytes = fs::read(&path).unwrap();
        assert_eq!(&bytes[..8], [0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57]);
        let mut entries = EntryReader::new(bytes.as_slice(), bytes.len() as u64, &path);
        entries.expect_magic(ImageKind::StatsDump).unwrap();
        let entry: pb::StatsEntry = entries.next_entry().unwrap().unwrap();
        assert_eq!(entry, stats.entry());
        assert_eq!(entries.left(), 0);

        RestoreStats { pages_restored: 7, ..RestoreStats::default() }
            .write(dir.path(), OwnerCheck::On)
            .unwrap();
        assert!(dir.path().join("stats-restore").exists());
        assert!(stats.write(&dir.path().join("nowhere"), OwnerCheck::On).is_err());
    }

    #[test]
    fn printed() {
        let stats = DumpStats { pages_scanned: 58, ..DumpStats::default() };
        let text = stats.to_string();
        assert!(text.starts_with("Displaying dump stats:\nFreezing time: 0 us\n"), "{text}");
        assert!(text.contains("\nMemory pages scanned: 58 (0x3a)\n"), "{text}");
    }
}
