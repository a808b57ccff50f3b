//! Restores that the cache starts by itself (`image-cache --restore`): one for each snapshot whose source ends its tree last.
//!
//! They are plain `crtool restore --remote -d` of this program. Options come from the operator of the cache; a source may ask
//! for those of [`ASKED`], without which its tree could not be restored. This module starts them and sees their ends;
//! what a restore does, and what comes of it, is between it and the cache's socket.

use std::{
    ffi::OsString,
    io::Read as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::super::{Failure, journal, pb::FailCode};
use super::Cache;
use crate::sys;

/// Options that a source may ask for.
const ASKED: [&str; 3] = ["file-locks", "link-remap", "evasive-devices"];
/// Restores at once.
const MOST: usize = 64;
/// Longest message of one that is told to the source, in bytes.
const MESSAGE: u64 = 4 << 10;

/// A snapshot that wants to be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its number in the cache.
    pub(super) id: u64,
    pub(super) name: String,
    /// As its source drew it.
    pub(super) drawn: u64,
    /// What the source asks for.
    pub(super) options: Vec<String>,
}

/// All that have been started and have not ended.
#[derive(Debug)]
pub(super) struct Restorer {
    work_dir: PathBuf,
    words: Vec<OsString>,
    /// By the tokens of their pidfds.
    running: Vec<(u64, u64, Child, std::os::fd::OwnedFd)>,
    next: u64,
}

impl Restorer {
    /// Restores with these options beside those that it gives itself; their ends are watched under tokens from `first` on.
    pub(super) fn new(work_dir: &Path, words: &[OsString], first: u64) -> Self {
        Self { work_dir: work_dir.to_owned(), words: words.to_owned(), running: Vec::new(), next: first }
    }

    /// Starts what is wanted.
    pub(super) fn start(&mut self, cache: &mut Cache) {
        for wanted in cache.snapshots().take_wanted() {
            let id = wanted.id;
            if let Err(failure) = self.begin(cache, &wanted) {
                tracing::error!("snapshot {}: {failure}", wanted.name);
                cache.snapshots().restore_ended(id, &failure.text);
            }
        }
    }

    fn begin(&mut self, cache: &Cache, wanted: &Wanted) -> Result<(), Failure> {
        let failed = |text: String| Failure::new(FailCode::FailInternal, text);
        if self.running.len() >= MOST {
            return Err(failed(format!("{MOST} restores are at work here; try later")));
        }
        if let Some(odd) = wanted.options.iter().find(|option| !ASKED.contains(&option.as_str())) {
            return Err(failed(format!("the source asks for restore --{odd}, which is not for it to say")));
        }
        let drawn = journal::shown(wanted.drawn);
        let log = format!("restore-{drawn}.log");
        let child = Command::new("/proc/self/exe")
            .args([
                "restore",
                "--remote",
                "-d",
                "-D",
                &wanted.name,
                "--snapshot-id",
                &drawn,
                "-o",
                &log,
                "-W",
            ])
            .arg(&self.work_dir)
            .args(wanted.options.iter().map(|option| format!("--{option}")))
            .args(&self.words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| failed(format!("start of a restore: {e}")))?;
        let pidfd = sys::pidfd::open(child.id().cast_signed(), 0)
            .map_err(|e| failed(format!("pidfd of a restore: {e}")))?;
        let token = self.next;
        self.next += 1;
        cache.watch(pidfd.as_fd(), token).map_err(|e| failed(format!("epoll: {e}")))?;
        tracing::info!("snapshot {}: restore with pid {} begins, log {log}", wanted.name, child.id());
        self.running.push((token, wanted.id, child, pidfd));
        Ok(())
    }

    /// The one of this token has ended.
    pub(super) fn ended(&mut self, token: u64, cache: &mut Cache) {
        let Some(at) = self.running.iter().position(|(of, ..)| *of == token) else { return };
        let (_, id, mut child, _) = self.running.swap_remove(at);
        journal::trim(&self.work_dir, "restore-", ".log");
        match child.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => {
                let text = status.to_string();
                let said = child.stderr.take().map(said).unwrap_or_default();
                cache.snapshots().restore_ended(id, if said.is_empty() { &text } else { &said });
            }
            Err(e) => cache.snapshots().restore_ended(id, &e.to_string()),
        }
    }
}

/// What a restore has said that has ended. All of that is in the pipe; more is not waited for, because a script of it may have
/// left somebody behind who holds the other end.
fn said(err: ChildStderr) -> String {
    let mut said = Vec::new();
    if fcntl(&err, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok() {
        // What has come before an error is kept.
        let _ = err.take(MESSAGE).read_to_end(&mut said);
    }
    String::from_utf8_lossy(&said).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_left_behind_is_not_waited_for() {
        // The shell writes down who that is, for the test to end it.
        let script = r#"printf 'why \377\n' >&2; sleep 1000 >/dev/null & echo $!; exit 1"#;
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let mut left = String::new();
        out.read_to_string(&mut left).unwrap();
        child.wait().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || tell.send(said(err)));
        let came = told.recv_timeout(std::time::Duration::from_secs(30));
        let left = nix::unistd::Pid::from_raw(left.trim().parse().unwrap());
        nix::sys::signal::kill(left, nix::sys::signal::Signal::SIGKILL).unwrap();
        reader.join().unwrap().unwrap();
        assert_eq!(came.unwrap(), "why \u{fffd}");
    }
}
