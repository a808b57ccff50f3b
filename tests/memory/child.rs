//! Stopped children.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// A child that stands still; killed and reaped when dropped.
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    dir: tempfile::TempDir,
    /// Start and number of pages of each area the target names.
    pub table: BTreeMap<String, (u64, u64)>,
}

impl Child {
    /// This binary as the target `case`, stopped when all is made.
    pub fn target(case: &str) -> Child {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let process = Command::new("/proc/self/exe")
            .env("MEMORY_TARGET", case)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Child { process, dir, table: BTreeMap::new() };
        let status = waitpid(child.raw(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert!(matches!(status, WaitStatus::Stopped(_, Signal::SIGSTOP)), "target: {status:?}");
        let table = std::fs::read_to_string(child.dir.path().join("table")).unwrap();
        for line in table.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [name, start, pages] = words[..] else { panic!("{line}") };
            child.table.insert(name.to_owned(), (start.parse().unwrap(), pages.parse().unwrap()));
        }
        child
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.process.id()).unwrap()
    }

    fn raw(&self) -> Pid {
        Pid::from_raw(self.pid())
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Kills and reaps the process; its directory stays.
    pub fn end(&mut self) {
        let _ = kill(self.raw(), Signal::SIGKILL);
        let _ = self.process.wait();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.end();
    }
}
