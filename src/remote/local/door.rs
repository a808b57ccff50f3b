//! The socket in a work dir at which a daemon and the commands of its host meet, and who may be at either end.
//!
//! It is for the user who started the daemon, and for root: the file has mode 0600 from its first moment on, and who
//! connects is looked at. A work dir may be one in which others can make files too, so commands look as well: the
//! file must be a socket of root's or of their own user, and so must be who listens there. Else somebody else would get the
//! memory of a tree, or decide what runs here.
//!
//! What is at the other end of a connection is not known here.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Uid, geteuid};

use crate::remote::{Failure, local, pb};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// How long another daemon may take to put its socket into the same directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// In the work dir while a daemon puts its socket there.
const LOCK: &str = ".crtool.lock";

/// A daemon that cannot have its socket.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DoorError {
    #[error("socket {}: another {daemon}{} uses it; stop that one, or choose another work dir (-W)", path.display(), of_pid(*pid))]
    Alive { path: PathBuf, daemon: &'static str, pid: Option<i32> },
    #[error("socket {}: a file of that name is there and is no socket; remove it or choose another work dir (-W)", path.display())]
    NoSocket { path: PathBuf },
    #[error("socket {}: the path is longer than 107 bytes; choose another work dir (-W)", path.display())]
    TooLong { path: PathBuf },
    #[error("lock {} belongs to uid {uid}; choose another work dir (-W)", path.display())]
    Lock { path: PathBuf, uid: u32 },
    #[error("{action} {}", path.display())]
    Path { action: &'static str, path: PathBuf, source: Errno },
}

/// A command that does not get to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Of the kernel.
    Call(Errno),
    /// What lies there is no socket.
    NoSocket,
    /// It is somebody else's.
    Stranger {
        /// Whose.
        uid: u32,
    },
}

fn of_pid(pid: Option<i32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Root, and the user that we are.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || Uid::from_raw(uid) == geteuid()
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// Connects to a daemon, if it is one of ours. The connection does not block.
pub fn enter(path: &Path) -> Result<OwnedFd, Refused> {
    let call = |error: io::Error| Refused::Call(errno(&error));
    // The file that is looked at is the one that is connected to, and no link to another daemon of ours.
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(call)?;
    let meta = file.metadata().map_err(call)?;
    if !meta.file_type().is_socket() {
        return Err(Refused::NoSocket);
    }
    if !is_trusted(meta.uid()) {
        return Err(Refused::Stranger { uid: meta.uid() });
    }
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    let address = UnixAddr::new(itself.as_str()).map_err(Refused::Call)?;
    let socket = new_socket().map_err(Refused::Call)?;
    connect(socket.as_raw_fd(), &address).map_err(Refused::Call)?;
    let peer = socket::getsockopt(&socket, sockopt::PeerCredentials).map_err(Refused::Call)?;
    if is_trusted(peer.uid()) { Ok(socket) } else { Err(Refused::Stranger { uid: peer.uid() }) }
}

/// A process at the socket, allowed to be there.
#[derive(Debug)]
pub struct LocalPeer {
    /// The connection, not blocking, SOCK_SEQPACKET.
    pub fd: OwnedFd,
    /// Whose it is.
    pub pid: i32,
}

/// The daemon's end: a socket with a name in the work dir. The name goes when this is dropped.
#[derive(Debug)]
pub struct Door {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the name, to know it again.
    id: (u64, u64),
}

impl Door {
    /// Makes it, unless another daemon has the name.
    pub fn open(work_dir: &Path, name: &str, daemon: &'static str) -> Result<Self, DoorError> {
        let path = work_dir.join(name);
        let failed = |action: &'static str| {
            let path = path.clone();
            move |source| DoorError::Path { action, path, source }
        };
        let address = UnixAddr::new(&path).map_err(|_| DoorError::TooLong { path: path.clone() })?;
        // From looking at what is there until our own is, nobody else does the same.
        let _lock = Lock::take(work_dir)?;
        match fs::symlink_metadata(&path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(DoorError::NoSocket { path }),
            Ok(_) => {
                if let Some(pid) = owner(&address) {
                    return Err(DoorError::Alive { path, daemon, pid });
                }
                tracing::info!("socket {}: left by a daemon that is gone", path.display());
                nix::unistd::unlink(&path).map_err(failed("remove"))?;
            }
            // Binding will say what is wrong.
            Err(_) => {}
        }
        let fd = new_socket().map_err(failed("make of socket"))?;
        // The name gets the mode that the socket has; so there is no moment at which it is open to others.
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(failed("make of socket"))?;
        bind(fd.as_raw_fd(), &address).map_err(failed("make of socket"))?;
        let meta = fs::symlink_metadata(&path).map_err(|e| failed("make of socket")(errno(&e)))?;
        let made = Self { fd, path: path.clone(), id: (meta.dev(), meta.ino()) };
        listen(&made.fd, Backlog::new(BACKLOG).map_err(failed("listen on"))?).map_err(failed("listen on"))?;
        Ok(made)
    }

    /// To be watched for reading, and accepted from.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks who has connected. Who is not allowed is told so.
    pub fn admit(&self, fd: OwnedFd) -> Option<LocalPeer> {
        let who = socket::getsockopt(&fd, sockopt::PeerCredentials).ok()?;
        if is_trusted(who.uid()) {
            return Some(LocalPeer { fd, pid: who.pid() });
        }
        tracing::warn!("uid {} (pid {}) was sent away: not our user", who.uid(), who.pid());
        let text = format!("this daemon is for uid {} and for root", geteuid());
        let failed = pb::Failed::from(Failure::new(pb::FailCode::FailDenied, text));
        let reply = pb::LocalReply { what: Some(pb::local_reply::What::Failed(failed)) };
        let _ = local::send(fd.as_fd(), &reply, &[]);
        None
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Somebody may have removed it and made their own.
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Keeps other daemons from changing the sockets of a directory. A file that others cannot open, since whoever can open the
/// directory can lock that; it goes when this is dropped.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Lock {
    fn take(work_dir: &Path) -> Result<Self, DoorError> {
        let path = work_dir.join(LOCK);
        let failed =
            |source| DoorError::Path { action: "lock of work dir", path: work_dir.to_owned(), source };
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            let mut options = File::options();
            options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let file = options.open(&path).map_err(|e| failed(errno(&e)))?;
            let meta = file.metadata().map_err(|e| failed(errno(&e)))?;
            if !is_trusted(meta.uid()) {
                return Err(DoorError::Lock { path, uid: meta.uid() });
            }
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Whoever had it may have removed it since it was opened.
                Ok(file) => {
                    let same = |there: fs::Metadata| (there.dev(), there.ino()) == (meta.dev(), meta.ino());
                    if fs::symlink_metadata(&path).is_ok_and(same) {
                        return Ok(Self { path, _file: file });
                    }
                }
                Err((_, Errno::EAGAIN)) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err((_, error)) => return Err(failed(error)),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Who listens at a socket: its pid, if it can be told. Nobody if `None`.
fn owner(address: &UnixAddr) -> Option<Option<i32>> {
    let probe = new_socket().ok()?;
    match connect(probe.as_raw_fd(), address) {
        Ok(()) => Some(socket::getsockopt(&probe, sockopt::PeerCredentials).ok().map(|who| who.pid())),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => None,
        // It is there: busy, of another kind or of another user.
        Err(_) => Some(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn commands_enter_what_is_ours_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let refused = |path: &Path| enter(path).unwrap_err();
        assert_eq!(refused(&path), Refused::Call(Errno::ENOENT));
        let door = Door::open(dir.path(), "s", "a daemon").unwrap();
        let command = enter(&path).unwrap();
        let peer = door.admit(crate::remote::net::listen::accept(door.fd()).unwrap().unwrap()).unwrap();
        assert_eq!(peer.pid, std::process::id().cast_signed());
        drop(command);
        // Another name for it, a file, and what nobody listens at any more.
        let (link, file, dead) = (dir.path().join("link"), dir.path().join("file"), dir.path().join("dead"));
        symlink(&path, &link).unwrap();
        assert_eq!(refused(&link), Refused::NoSocket);
        fs::write(&file, "").unwrap();
        assert_eq!(refused(&file), Refused::NoSocket);
        fs::rename(&path, &dead).unwrap();
        drop(door);
        assert_eq!(refused(&dead), Refused::Call(Errno::ECONNREFUSED));
        if geteuid().is_root() {
            let _door = Door::open(dir.path(), "s", "a daemon").unwrap();
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            assert_eq!(refused(&path), Refused::Stranger { uid: 65534 });
        }
    }

    #[test]
    fn who_can_open_the_work_dir_cannot_lock_it() {
        let dir = tempfile::tempdir().unwrap();
        let others = Flock::lock(File::open(dir.path()).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        let begun = Instant::now();
        drop(Door::open(dir.path(), "s", "a daemon").unwrap());
        assert!(begun.elapsed() < LOCK_PATIENCE / 2);
        drop(others);
        // Nothing is left, and nobody else can lock the file while it is there.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let lock = Lock::take(dir.path()).unwrap();
        assert_eq!(fs::metadata(&lock.path).unwrap().permissions().mode() & 0o777, 0o600);
        if geteuid().is_root() {
            std::os::unix::fs::chown(&lock.path, Some(65534), None).unwrap();
            let error = Door::open(dir.path(), "s", "a daemon").unwrap_err().to_string();
            assert!(error.contains("belongs to uid 65534"), "{error}");
        }
    }

    #[test]
    fn two_at_once_wait_for_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path()).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| Lock::take(dir.path()).map(drop));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!other.is_finished());
            drop(lock);
            other.join().unwrap().unwrap();
        });
    }
}
