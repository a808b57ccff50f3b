//! The file that tells scripts the pid of a restored root, or of a daemon.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;

/// The file cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("write of pid file {}", path.display())]
pub struct PidfileError {
    path: PathBuf,
    source: io::Error,
}

/// Writes `pid`, in decimal and without a newline as CRIU does, to `file`; a relative name is relative to the
/// work dir. What the file held before is lost.
pub fn write(work_dir: &Path, file: &Path, pid: Pid) -> Result<(), PidfileError> {
    let path = work_dir.join(file);
    OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(pid.to_string().as_bytes()))
        .map_err(|source| PidfileError { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces() {
        let dir = tempfile::tempdir().unwrap();
        let file = Path::new("p");
        write(dir.path(), file, Pid::from_raw(123_456)).unwrap();
        write(dir.path(), file, Pid::from_raw(7)).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("p")).unwrap(), "7");
        let error = write(dir.path(), Path::new("no/p"), Pid::from_raw(7)).unwrap_err();
        assert!(error.to_string().ends_with("/no/p"), "{error}");
    }
}
