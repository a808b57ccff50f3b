//! Names that are there for one moment: a file is made, opened and loses its name again, all or nothing, even when this
//! process is killed in between.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::{Errno, Result, ret_int};

/// How the file comes to be. What is made belongs to us, and only we may read and write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin<'a> {
    /// An empty regular file.
    Regular,
    /// A directory.
    Directory,
    /// A fifo.
    Fifo,
    /// A symbolic link to this text.
    Symlink(&'a CStr),
    /// A character device of this number (`makedev` encoding).
    CharDevice(u64),
    /// A further name of the file at this path.
    HardLink(&'a CStr),
}

/// What of it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The call itself: nothing was done.
    Begin,
    /// Making the directory with this index.
    Parent(usize),
    /// Making the file.
    Make,
    /// Opening what was made.
    Open,
    /// Removing the name, or a directory: it is still there.
    Remove,
}

/// A step that failed. What the steps before it made is removed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    /// Which.
    pub step: Step,
    /// Why.
    pub errno: Errno,
}

struct Job<'a> {
    path: &'a CStr,
    parents: &'a [CString],
    origin: Origin<'a>,
    result: std::result::Result<i32, Failed>,
}

extern "C" fn work(arg: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `open` passes its own live struct, and does not run until this returns.
    let job = unsafe { &mut *arg.cast::<Job<'_>>() };
    // Whoever kills our whole process group does not mean us. The pid is a new one, so it cannot fail.
    // SAFETY: no pointers.
    unsafe { libc::setpgid(0, 0) };
    job.result = pass(job);
    0
}

/// Only system calls on memory that is there already: it runs beside the heap and the locks of a process that may be dead.
fn pass(job: &Job<'_>) -> std::result::Result<i32, Failed> {
    let at = |step| move |errno| Failed { step, errno };
    let mut result = Ok(());
    let mut made = 0;
    for (index, parent) in job.parents.iter().enumerate() {
        // SAFETY: a terminated string.
        if let Err(errno) = ret_int(unsafe { libc::mkdir(parent.as_ptr(), 0o700) }) {
            result = Err(Failed { step: Step::Parent(index), errno });
            break;
        }
        made = index + 1;
    }
    let mut fd = -1;
    result = result.and_then(|()| make(job.path, job.origin).map_err(at(Step::Make))).and_then(|()| {
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: a terminated string.
        fd = unsafe { libc::open(job.path.as_ptr(), flags) };
        let opened = ret_int(fd).map(drop).map_err(at(Step::Open));
        let how = if job.origin == Origin::Directory { libc::AT_REMOVEDIR } else { 0 };
        // SAFETY: a terminated string.
        let gone = ret_int(unsafe { libc::unlinkat(libc::AT_FDCWD, job.path.as_ptr(), how) });
        gone.map(drop).map_err(at(Step::Remove)).and(opened)
    });
    for parent in job.parents.iter().take(made).rev() {
        // SAFETY: a terminated string.
        let gone = ret_int(unsafe { libc::rmdir(parent.as_ptr()) });
        result = result.and(gone.map(drop).map_err(at(Step::Remove)));
    }
    if result.is_err() && fd != -1 {
        // SAFETY: it was opened above, and nobody else knows it.
        unsafe { libc::close(fd) };
    }
    result.map(|()| fd)
}

fn make(path: &CStr, origin: Origin<'_>) -> Result<()> {
    const OWN: libc::mode_t = 0o600;
    let path = path.as_ptr();
    // SAFETY: all strings are terminated, and no memory is handed over.
    let made = unsafe {
        match origin {
            Origin::Regular => libc::mknod(path, libc::S_IFREG | OWN, 0),
            Origin::Directory => libc::mkdir(path, 0o700),
            Origin::Fifo => libc::mknod(path, libc::S_IFIFO | OWN, 0),
            Origin::Symlink(target) => libc::symlink(target.as_ptr(), path),
            Origin::CharDevice(rdev) => libc::mknod(path, libc::S_IFCHR | OWN, rdev),
            Origin::HardLink(from) => libc::link(from.as_ptr(), path),
        }
    };
    ret_int(made).map(drop)
}

/// Makes a file at `path`, which must be free, opens it (O_PATH, close-on-exec) and removes the name again; /proc shows the
/// descriptor with that name from then on. Before it the directories `parents` are made, outermost first, and after it
/// they are removed.
///
/// A child that shares our memory and descriptors does it. It does not die with us, so nobody finds the name later,
/// whatever becomes of us.
pub fn open(path: &CStr, parents: &[CString], origin: Origin<'_>) -> std::result::Result<OwnedFd, Failed> {
    let begin = |errno| Failed { step: Step::Begin, errno };
    let mut stack = vec![0u128; 1 << 12];
    let mut job = Job { path, parents, origin, result: Err(begin(Errno::EIO)) };
    // Without a signal at its end: nobody is to be told but us.
    let how = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
    // SAFETY: structures of bits, which the calls fill.
    let (mut all, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
    // Neither may a signal end the child half-way: it would take our handlers for its own.
    // SAFETY: live structures of the right type.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    // SAFETY: with CLONE_VFORK this thread waits until the child, which runs on a stack of its own, has ended. If we are
    // killed meanwhile, the child keeps the memory alive.
    let pid = ret_int(unsafe {
        let top = stack.as_mut_ptr_range().end;
        libc::clone(work, top.cast(), how, (&raw mut job).cast())
    });
    // SAFETY: the structure that the first call filled.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    let pid = pid.map_err(begin)?;
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) } == -1
        && Errno::last() == Errno::EINTR
    {}
    super::fd::adopt(job.result?).map_err(begin)
}

/// Sets the times of the file behind a descriptor, which may be an O_PATH one, of a symbolic link too (Linux 5.8).
pub fn set_times(fd: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> Result<()> {
    // SAFETY: an empty terminated string, and two times.
    ret_int(unsafe { libc::utimensat(fd.as_raw_fd(), c"".as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::ffi::OsStrExt, path::Path};

    use super::*;

    fn c(path: &Path) -> CString {
        CString::new(path.as_os_str().as_bytes()).unwrap()
    }

    fn left(dir: &Path) -> usize {
        std::fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn every_origin_leaves_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        std::fs::write(other.path().join("f"), b"x").unwrap();
        let linked = c(&other.path().join("f"));
        let origins = [
            (Origin::Regular, libc::S_IFREG),
            (Origin::Directory, libc::S_IFDIR),
            (Origin::Fifo, libc::S_IFIFO),
            (Origin::Symlink(c"to"), libc::S_IFLNK),
            (Origin::HardLink(&linked), libc::S_IFREG),
        ];
        for (origin, kind) in origins {
            let path = dir.path().join("a/b/name");
            let parents = [c(&dir.path().join("a")), c(&dir.path().join("a/b"))];
            let fd = match open(&c(&path), &parents, origin) {
                // Between two file systems.
                Err(Failed { step: Step::Make, errno: Errno::EXDEV }) => continue,
                opened => opened.unwrap(),
            };
            let shown = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            assert_eq!(shown.to_str().unwrap(), format!("{} (deleted)", path.display()));
            assert_eq!(nix::sys::stat::fstat(&fd).unwrap().st_mode & libc::S_IFMT, kind);
            assert_eq!(left(dir.path()), 0, "{origin:?}");
        }
    }

    #[test]
    fn failures_leave_nothing_either() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, b"theirs").unwrap();
        let taken = open(&c(&file), &[], Origin::Regular).unwrap_err();
        assert_eq!(taken, Failed { step: Step::Make, errno: Errno::EEXIST });
        let parents = [c(&dir.path().join("d")), c(&file)];
        let no_parent = open(&c(&dir.path().join("d/x")), &parents, Origin::Regular).unwrap_err();
        assert_eq!(no_parent, Failed { step: Step::Parent(1), errno: Errno::EEXIST });
        let nowhere = open(&c(&dir.path().join("no/x")), &parents[..1], Origin::Directory).unwrap_err();
        assert_eq!(nowhere, Failed { step: Step::Make, errno: Errno::ENOENT });
        assert_eq!(std::fs::read(&file).unwrap(), b"theirs");
        assert_eq!(left(dir.path()), 1);
    }

    /// Killed again and again in the middle of it.
    #[test]
    fn who_is_killed_leaves_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = c(&dir.path().join("name"));
        for round in 0..40 {
            let (ended, held) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
            // SAFETY: the child does nothing but what is tested, and is killed.
            let pid = ret_int(unsafe { libc::fork() }).unwrap();
            if pid == 0 {
                loop {
                    let made = open(&path, &[], Origin::Regular);
                    let _ = nix::unistd::write(&held, &[u8::from(made.is_ok())]);
                }
            }
            drop(held);
            let mut made = [0];
            assert_eq!((nix::unistd::read(&ended, &mut made), made), (Ok(1), [1]));
            std::thread::sleep(std::time::Duration::from_micros(round * 7));
            super::super::task::kill(pid, libc::SIGKILL).unwrap();
            super::super::wait::wait(pid).unwrap();
            // The pipe ends when the last of those who share its descriptors has.
            while nix::unistd::read(&ended, &mut [0; 4096]).unwrap() > 0 {}
            assert_eq!(left(dir.path()), 0, "round {round}");
        }
    }
}
