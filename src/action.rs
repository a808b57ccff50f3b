//! Action scripts: programs of the user that run at certain points of a dump or a restore.
//!
//! A script gets what it has to know through its environment, under the names that CRIU uses:
//! `CRTOOLS_SCRIPT_ACTION`, `CRTOOLS_IMAGE_DIR`, and, where the root task exists as seen from
//! here, `CRTOOLS_INIT_PID`. It runs in the work dir with our standard streams. A status other than
//! zero, or a death by signal, fails the step.

use std::{
    io,
    path::{Path, PathBuf},
    process::Command,
};

use nix::unistd::{AccessFlags, Pid, access};

use crate::{deadline, sys};

/// A point at which scripts run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Before anything is frozen.
    PreDump,
    /// The tree is frozen and is to go on on another host: from now on nobody shall reach it here.
    NetworkLock,
    /// Images are complete, the tree still frozen.
    PostDump,
    /// Before the first task is made.
    PreRestore,
    /// All is restored, nothing runs yet.
    PostRestore,
    /// After `PostRestore`, last moment before the tree runs; must not fail.
    PreResume,
    /// The tree is about to run after it was on its way to another host: there, or where it was after all.
    NetworkUnlock,
    /// The tree runs.
    PostResume,
}

impl Action {
    /// The value of `CRTOOLS_SCRIPT_ACTION`.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreDump => "pre-dump",
            Self::NetworkLock => "network-lock",
            Self::NetworkUnlock => "network-unlock",
            Self::PostDump => "post-dump",
            Self::PreRestore => "pre-restore",
            Self::PostRestore => "post-restore",
            Self::PreResume => "pre-resume",
            Self::PostResume => "post-resume",
        }
    }
}

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActionError {
    /// The program could not be started.
    #[error("start of action script {}", path.display())]
    Start {
        /// A name that is looked for in PATH, or where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ran and did not succeed.
    #[error("action script {} failed at {action} ({status})", path.display())]
    Failed {
        /// As the user gave it.
        path: PathBuf,
        /// The point.
        action: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
    },
}

/// The scripts of one command, in the order given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ActionScripts {
    /// Programs; a relative path is relative to the work dir.
    pub scripts: Vec<PathBuf>,
    /// Told to the scripts.
    pub images_dir: PathBuf,
    /// Where they run.
    pub work_dir: PathBuf,
}

impl ActionScripts {
    /// A bare name is looked up in `PATH`, anything else from the work dir.
    fn program(&self, path: &Path) -> PathBuf {
        if path.components().count() == 1 && path.is_relative() {
            path.to_owned()
        } else {
            self.work_dir.join(path)
        }
    }
}

/// Runs every script, one after another, and stops at the first that fails.
///
/// `root` is the root task as seen from here, if it exists at this point.
pub fn run(scripts: &ActionScripts, action: Action, root: Option<Pid>) -> Result<(), ActionError> {
    // How long they take is their affair.
    let _pause = deadline::pause();
    for path in &scripts.scripts {
        tracing::debug!("running {} script {}", action.name(), path.display());
        let mut command = Command::new(scripts.program(path));
        command
            .env("CRTOOLS_SCRIPT_ACTION", action.name())
            .env("CRTOOLS_IMAGE_DIR", &scripts.images_dir)
            .current_dir(&scripts.work_dir);
        if let Some(pid) = root {
            command.env("CRTOOLS_INIT_PID", pid.to_string());
        }
        let status = sys::own::with_first_limits(&mut command)
            .status()
            .map_err(|source| ActionError::Start { path: scripts.program(path), source })?;
        if !status.success() {
            return Err(ActionError::Failed { path: path.clone(), action: action.name(), status });
        }
    }
    Ok(())
}

/// Whether a file could be run; why not.
fn runs(program: &Path) -> io::Result<()> {
    access(program, AccessFlags::X_OK)?;
    // As execve(2) has it for a directory.
    if program.is_file() { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// Scripts that could not be started now, and why. Nothing is run.
pub fn not_there(scripts: &ActionScripts) -> Vec<ActionError> {
    let found = |path: &Path| -> io::Result<()> {
        let program = scripts.program(path);
        if program.is_absolute() || program.components().count() > 1 {
            return runs(&program);
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut places = std::env::split_paths(&path).map(|dir| dir.join(&program));
        match places.any(|place| runs(&place).is_ok()) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    };
    let missing = scripts.scripts.iter().filter_map(|path| Some((path, found(path).err()?)));
    missing.map(|(path, source)| ActionError::Start { path: scripts.program(path), source }).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, process::Stdio};

    use super::*;

    /// Written by another process: a descriptor of ours, inherited by a child of another test, would keep the
    /// script from being run.
    fn script(dir: &Path, name: &str, text: &str) {
        let mut shell = Command::new("sh")
            .args(["-c", "cat > \"$0\" && chmod 755 \"$0\"", name])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = shell.stdin.take().unwrap();
        input.write_all(format!("#!/bin/sh\n{text}\n").as_bytes()).unwrap();
        drop(input);
        assert!(shell.wait().unwrap().success());
    }

    fn scripts(dir: &Path, names: &[&str]) -> ActionScripts {
        ActionScripts {
            scripts: names.iter().map(PathBuf::from).collect(),
            images_dir: dir.join("images"),
            work_dir: dir.to_owned(),
        }
    }

    #[test]
    fn environment_and_place() {
        let dir = tempfile::tempdir().unwrap();
        script(
            dir.path(),
            "a",
            "{ echo $CRTOOLS_SCRIPT_ACTION ${CRTOOLS_INIT_PID-none} $CRTOOLS_IMAGE_DIR; pwd; } >> out",
        );
        let scripts = scripts(dir.path(), &["./a"]);
        run(&scripts, Action::PreDump, Some(Pid::from_raw(77))).unwrap();
        run(&scripts, Action::PostRestore, None).unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let place = dir.display();
        assert_eq!(
            fs::read_to_string(dir.join("out")).unwrap(),
            format!("pre-dump 77 {place}/images\n{place}\npost-restore none {place}/images\n{place}\n")
        );
    }

    #[test]
    fn first_failure_stops() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "good", "echo good >> out");
        script(dir.path(), "bad", "exit 3");
        let error = run(&scripts(dir.path(), &["./good", "./bad", "./good"]), Action::PostDump, None);
        let error = error.unwrap_err().to_string();
        assert_eq!(error, "action script ./bad failed at post-dump (exit status: 3)");
        assert_eq!(fs::read_to_string(dir.path().join("out")).unwrap(), "good\n");
        let error = run(&scripts(dir.path(), &["./none"]), Action::PostDump, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("start of action script {}", dir.path().join("./none").display())
        );
        // A bare name is a program of PATH, not of the work dir.
        run(&scripts(dir.path(), &["true"]), Action::PostDump, None).unwrap();
        assert!(run(&scripts(dir.path(), &["good"]), Action::PostDump, None).is_err());
    }
}
