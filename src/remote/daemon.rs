//! How a process becomes a daemon: into the background, ready, and its pid file.
//!
//! ```text
//!  caller        crtool image-cache -d         daemon
//!    │──────────────▶│ background()────fork──────▶│ opens its sockets
//!    │               │◀──────────────ready()──────│ pid file, status descriptor
//!    │◀─────status 0─│                            │ loop
//! ```
//!
//! What it listens to is made by [`front`](super::front).

use std::fs::{self, File};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, setsid};

use super::notify::Notify;
use crate::pidfile::{self, PidfileError};
use crate::settings::DaemonSettings;
use crate::sys;

/// A process that cannot become a daemon.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DaemonError {
    #[error(transparent)]
    Pidfile(#[from] PidfileError),
    #[error("{action}")]
    Call { action: &'static str, source: Errno },
    #[error("write to status descriptor {fd}")]
    Status { fd: RawFd, source: io::Error },
}

fn call(action: &'static str) -> impl Fn(Errno) -> DaemonError {
    move |source| DaemonError::Call { action, source }
}

/// Which of the two a process is after [`background`].
#[derive(Debug)]
pub enum Place {
    /// The daemon, or what may become one.
    Daemon(Readiness),
    /// The process that the caller started; the daemon is ready (true) or has failed and said why.
    Caller(bool),
}

/// Who waits to hear that the daemon is ready.
#[derive(Debug)]
pub struct Readiness {
    caller: Option<OwnedFd>,
}

/// Goes into the background, if that is asked for. To be called while there is one thread only.
pub fn background(settings: &DaemonSettings) -> Result<Place, DaemonError> {
    if !settings.detach {
        return Ok(Place::Daemon(Readiness { caller: None }));
    }
    let (news, caller) = sys::pipe::pipe2(libc::O_CLOEXEC).map_err(call("pipe to the daemon"))?;
    match sys::fork::fork().map_err(call("fork of the daemon"))? {
        sys::fork::Side::Child => {
            drop(news);
            // Signals of the caller's terminal are not for it.
            setsid().map_err(call("new session of the daemon"))?;
            Ok(Place::Daemon(Readiness { caller: Some(caller) }))
        }
        sys::fork::Side::Parent(pid) => {
            drop(caller);
            let mut word = [0];
            let ready = loop {
                match nix::unistd::read(&news, &mut word) {
                    Err(Errno::EINTR) => {}
                    other => break other == Ok(1),
                }
            };
            if !ready {
                // It has said why it failed, and ends now; unless it was killed.
                match waitpid(Pid::from_raw(pid), None) {
                    Ok(WaitStatus::Signaled(_, signal, _)) => {
                        crate::log::failure(&format!(
                            "the daemon was killed by {signal} before it was ready"
                        ));
                    }
                    Ok(WaitStatus::Exited(_, 0)) => {
                        crate::log::failure("the daemon ended before it was ready")
                    }
                    _ => {}
                }
            }
            Ok(Place::Caller(ready))
        }
    }
}

impl Readiness {
    /// The daemon listens. Writes the pid file, tells the status descriptor and the caller; a daemon in the
    /// background lets go of terminal, current directory and whatever else it has of its caller.
    pub fn ready(self, work_dir: &Path, settings: &DaemonSettings) -> Result<Running, DaemonError> {
        let mut running = Running { pidfile: None };
        if let Some(file) = &settings.pidfile {
            pidfile::write(work_dir, file, getpid(), settings.owner_check)?;
            running.pidfile = Some(work_dir.join(file));
        }
        if self.caller.is_some() {
            let null = File::options().read(true).write(true).open("/dev/null");
            let null = null.map_err(|e| {
                call("open /dev/null")(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
            })?;
            nix::unistd::chdir("/").map_err(call("change of directory to /"))?;
            nix::unistd::dup2_stdin(&null).map_err(call("dup2"))?;
            nix::unistd::dup2_stdout(&null).map_err(call("dup2"))?;
            nix::unistd::dup2_stderr(&null).map_err(call("dup2"))?;
        }
        if let Some(manager) = Notify::from_env()
            && let Err(e) = manager.tell("READY=1", &[])
        {
            tracing::warn!("the service manager cannot be told that the daemon is ready: {e}");
        }
        if let Some(fd) = settings.status_fd {
            tell(fd).map_err(|source| DaemonError::Status { fd, source })?;
        }
        if let Some(caller) = self.caller {
            // A pipe or a lock of somebody else would be held as long as the daemon runs.
            sys::fd::close_inherited().map_err(call("close of what was inherited"))?;
            // A caller that did not wait has gone its way.
            let _ = nix::unistd::write(&caller, &[0]);
        }
        Ok(running)
    }
}

/// One zero byte, and closed.
fn tell(fd: RawFd) -> io::Result<()> {
    use std::io::Write as _;
    File::from(sys::fd::dup(fd)?).write_all(&[0])?;
    Ok(sys::fd::give_up(fd)?)
}

/// A daemon that is ready. Its pid file goes when this is dropped.
#[derive(Debug)]
pub struct Running {
    pidfile: Option<PathBuf>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(path) = self.pidfile.take() else { return };
        // Another daemon may have written its own since.
        if fs::read_to_string(&path).is_ok_and(|pid| pid == getpid().to_string()) {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (read, write) = sys::pipe::pipe2(libc::O_CLOEXEC).unwrap();
        let daemon = DaemonSettings {
            pidfile: Some("p".into()),
            status_fd: Some(std::os::fd::IntoRawFd::into_raw_fd(write)),
            ..DaemonSettings::default()
        };
        let Place::Daemon(readiness) = background(&daemon).unwrap() else { panic!("not asked for") };
        let running = readiness.ready(dir.path(), &daemon).unwrap();
        let mut told = Vec::new();
        io::Read::read_to_end(&mut File::from(read), &mut told).unwrap();
        assert_eq!(told, [0]);
        let pidfile = dir.path().join("p");
        assert_eq!(fs::read_to_string(&pidfile).unwrap(), getpid().to_string());
        drop(running);
        assert!(!pidfile.exists());
    }
}
