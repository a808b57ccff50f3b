//! The file that tells scripts the pid of a restored root, or of a daemon.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use nix::unistd::Pid;

use crate::{
    ownership::{self, Old, OwnershipError},
    settings::OwnerCheck,
};

/// The file cannot be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PidfileError {
    #[error(transparent)]
    Open(#[from] OwnershipError),
    #[error("write of pid file {}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Writes `pid`, in decimal and without a newline as CRIU does, to `file`; a relative name is relative to the
/// work dir. What the file held before is lost.
pub fn write(work_dir: &Path, file: &Path, pid: Pid, check: OwnerCheck) -> Result<(), PidfileError> {
    let path = work_dir.join(file);
    let mut file = ownership::output(&path, "pid file", Old::Truncated, check)?;
    file.write_all(pid.to_string().as_bytes()).map_err(|source| PidfileError::Write { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces() {
        let dir = tempfile::tempdir().unwrap();
        let file = Path::new("p");
        write(dir.path(), file, Pid::from_raw(123_456), OwnerCheck::On).unwrap();
        write(dir.path(), file, Pid::from_raw(7), OwnerCheck::On).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("p")).unwrap(), "7");
        let error = write(dir.path(), Path::new("no/p"), Pid::from_raw(7), OwnerCheck::On).unwrap_err();
        assert!(format!("{:#}", anyhow::Error::from(error)).contains("/no/p: No such file"));
    }
}
