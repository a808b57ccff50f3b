//! Names that are there for one moment: a file is made, opened and loses its name again, all or nothing, even when this
//! process is killed in between.
//!
//! All names are looked up in directories that are open already, and no symbolic link is followed, so nobody who may
//! write there can lead us elsewhere. A name is removed only while it still leads to what was made.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI32, AtomicPtr, Ordering},
    },
};

use super::{Errno, Result, ret_int};

/// The id of the child that is at work, 0 for none, in memory that is shared with whoever holds our descriptor table after our
/// end: closed too early, the directory would be gone before the name is. Null while nobody else holds it.
static AT_WORK: AtomicPtr<AtomicI32> = AtomicPtr::new(ptr::null_mut());
/// There is one at a time.
static ONE: Mutex<()> = Mutex::new(());

/// What [`AT_WORK`] leads to, for processes that share it.
#[derive(Debug, Clone, Copy)]
pub(super) struct AtWork(Option<&'static AtomicI32>);

impl AtWork {
    /// Shares it with all processes that are made from here on.
    pub(super) fn share() -> Result<Self> {
        let now = Self::now();
        if now.0.is_some() {
            return Ok(now);
        }
        let len = size_of::<AtomicI32>();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, which nobody unmaps.
        let at =
            unsafe { libc::mmap(ptr::null_mut(), len, prot, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        AT_WORK.store(at.cast(), Ordering::Release);
        Ok(Self::now())
    }

    fn now() -> Self {
        // SAFETY: null, or a mapping that stays, of zeros at first.
        Self(unsafe { AT_WORK.load(Ordering::Acquire).as_ref() })
    }

    /// Where the kernel writes the id as it makes the child, before that runs. So there is none without a child, whenever
    /// its parent is killed.
    fn place(self, other: &AtomicI32) -> *mut i32 {
        self.0.unwrap_or(other).as_ptr()
    }

    fn end(self) {
        if let Some(child) = self.0 {
            child.store(0, Ordering::SeqCst);
        }
    }

    /// Whether a child is.
    pub(super) fn any(self) -> bool {
        self.0.is_some_and(|child| child.load(Ordering::SeqCst) != 0)
    }
}

/// How the file comes to be. What is made belongs to us, and only we may read and write it.
#[derive(Debug, Clone, Copy)]
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
    /// A further name of this file, which may be open with O_PATH.
    HardLink(BorrowedFd<'a>),
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
    /// Somebody has put another file in the place of what was made.
    Swapped,
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
    base: i32,
    parents: &'a [CString],
    name: &'a CStr,
    origin: Origin<'a>,
    /// Room for a descriptor of each directory that is made.
    dirs: Vec<i32>,
    at_work: AtWork,
    result: std::result::Result<i32, Failed>,
}

extern "C" fn work(arg: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `open` passes its own live struct, and does not run until this returns.
    let job = unsafe { &mut *arg.cast::<Job<'_>>() };
    // Whoever kills our whole process group does not mean us. The pid is a new one, so it cannot fail.
    // SAFETY: no pointers.
    unsafe { libc::setpgid(0, 0) };
    job.result = pass(job);
    job.at_work.end();
    0
}

/// Only system calls on memory that is there already: it runs beside the heap and the locks of a process that may be dead.
fn pass(job: &mut Job<'_>) -> std::result::Result<i32, Failed> {
    let at = |step| move |errno| Failed { step, errno };
    let mut result = Ok(());
    let mut within = job.base;
    for (index, name) in job.parents.iter().enumerate() {
        match make_parent(within, name) {
            Ok(dir) => {
                // Within its capacity.
                job.dirs.push(dir);
                within = dir;
            }
            Err(errno) => {
                result = Err(Failed { step: Step::Parent(index), errno });
                break;
            }
        }
    }
    let mut fd = -1;
    result =
        result.and_then(|()| make(within, job.name, job.origin).map_err(at(Step::Make))).and_then(|made| {
            fd = match made {
                Some(fd) => fd,
                None => open_made(within, job.name, libc::O_PATH).map_err(at(Step::Open))?,
            };
            let ours = is_made(fd, job.origin) && is_at(within, job.name, fd);
            if !ours {
                return Err(Failed { step: Step::Swapped, errno: Errno::EEXIST });
            }
            let how = if matches!(job.origin, Origin::Directory) { libc::AT_REMOVEDIR } else { 0 };
            // SAFETY: a terminated string.
            ret_int(unsafe { libc::unlinkat(within, job.name.as_ptr(), how) }).map_err(at(Step::Remove))?;
            match job.origin {
                // Somebody has given it another name in the meantime: it would stay for everybody to see.
                Origin::Regular if stat(fd).is_some_and(|stat| stat.st_nlink != 0) => {
                    Err(Failed { step: Step::Swapped, errno: Errno::EEXIST })
                }
                _ => Ok(()),
            }
        });
    for index in (0..job.dirs.len()).rev() {
        let within = if index == 0 { job.base } else { job.dirs[index - 1] };
        // SAFETY: the descriptor is one that was opened above; the string is terminated.
        let gone = unsafe {
            libc::close(job.dirs[index]);
            ret_int(libc::unlinkat(within, job.parents[index].as_ptr(), libc::AT_REMOVEDIR))
        };
        result = result.and(gone.map(drop).map_err(at(Step::Remove)));
    }
    if result.is_err() && fd != -1 {
        // SAFETY: it was opened above, and nobody else knows it.
        unsafe { libc::close(fd) };
    }
    result.map(|()| fd)
}

fn make_parent(within: i32, name: &CStr) -> Result<i32> {
    // SAFETY: a terminated string.
    ret_int(unsafe { libc::mkdirat(within, name.as_ptr(), 0o700) })?;
    let opened = open_made(within, name, libc::O_PATH | libc::O_DIRECTORY);
    if let Ok(dir) = opened
        && is_made(dir, Origin::Directory)
    {
        return Ok(dir);
    }
    // SAFETY: a terminated string.
    unsafe { libc::unlinkat(within, name.as_ptr(), libc::AT_REMOVEDIR) };
    opened.and(Err(Errno::EEXIST))
}

fn open_made(within: i32, name: &CStr, flags: i32) -> Result<i32> {
    // SAFETY: a terminated string.
    ret_int(unsafe { libc::openat(within, name.as_ptr(), flags | libc::O_NOFOLLOW | libc::O_CLOEXEC) })
}

/// Whether the file behind `fd` can be what was just made: of the type, ours, with no other name.
fn is_made(fd: i32, origin: Origin<'_>) -> bool {
    let kind = match origin {
        Origin::Regular => libc::S_IFREG,
        Origin::Directory => libc::S_IFDIR,
        Origin::Fifo => libc::S_IFIFO,
        Origin::Symlink(_) => libc::S_IFLNK,
        Origin::CharDevice(_) => libc::S_IFCHR,
        Origin::HardLink(of) => return same(fd, of.as_raw_fd()),
    };
    let Some(stat) = stat(fd) else { return false };
    let device = match origin {
        Origin::CharDevice(rdev) => rdev == stat.st_rdev,
        _ => true,
    };
    // SAFETY: no pointers.
    let own = unsafe { libc::geteuid() };
    stat.st_mode & libc::S_IFMT == kind
        && stat.st_uid == own
        && device
        && (stat.st_nlink == 1 || kind == libc::S_IFDIR)
}

/// Whether `name` leads to the file behind `fd`.
fn is_at(within: i32, name: &CStr, fd: i32) -> bool {
    // SAFETY: a structure of integers, which the call fills; the string is terminated.
    let found = unsafe {
        let mut stat = std::mem::zeroed::<libc::stat>();
        let done = libc::fstatat(within, name.as_ptr(), &raw mut stat, libc::AT_SYMLINK_NOFOLLOW);
        (done == 0).then_some((stat.st_dev, stat.st_ino))
    };
    found.is_some() && found == stat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

fn same(one: i32, other: i32) -> bool {
    let key = |fd| stat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    key(one).is_some() && key(one) == key(other)
}

fn stat(fd: i32) -> Option<libc::stat> {
    // SAFETY: a structure of integers, which the call fills.
    unsafe {
        let mut stat = std::mem::zeroed::<libc::stat>();
        (libc::fstat(fd, &raw mut stat) == 0).then_some(stat)
    }
}

/// Makes the file; of a regular one the descriptor, since only what makes and opens at once cannot be given another.
fn make(within: i32, name: &CStr, origin: Origin<'_>) -> Result<Option<i32>> {
    const OWN: libc::mode_t = 0o600;
    let name = name.as_ptr();
    // SAFETY: all strings are terminated, and no memory is handed over.
    let made = unsafe {
        match origin {
            Origin::Regular => {
                let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC;
                return ret_int(libc::openat(within, name, flags, OWN)).map(Some);
            }
            Origin::Directory => libc::mkdirat(within, name, 0o700),
            Origin::Fifo => libc::mknodat(within, name, libc::S_IFIFO | OWN, 0),
            Origin::Symlink(target) => libc::symlinkat(target.as_ptr(), within, name),
            Origin::CharDevice(rdev) => libc::mknodat(within, name, libc::S_IFCHR | OWN, rdev),
            Origin::HardLink(of) => {
                libc::linkat(of.as_raw_fd(), c"".as_ptr(), within, name, libc::AT_EMPTY_PATH)
            }
        }
    };
    ret_int(made).map(|_| None)
}

/// Makes a file called `name`, which must be free, in the directory `base`, opens it (O_PATH, or O_RDWR for a regular
/// file; close-on-exec) and removes the name again; /proc shows the descriptor with that name from then on. Before it the
/// directories `parents` are made in `base`, each in the one before, and the file in the last; after it they are removed.
///
/// A child that shares our memory and descriptors does it. It does not die with us, so nobody finds the name later,
/// whatever becomes of us.
pub fn open(
    base: BorrowedFd<'_>,
    parents: &[CString],
    name: &CStr,
    origin: Origin<'_>,
) -> std::result::Result<OwnedFd, Failed> {
    let begin = |errno| Failed { step: Step::Begin, errno };
    let mut stack = vec![0u128; 1 << 12];
    let mut job = Job {
        base: base.as_raw_fd(),
        parents,
        name,
        origin,
        dirs: Vec::with_capacity(parents.len()),
        at_work: AtWork::now(),
        result: Err(begin(Errno::EIO)),
    };
    // Without a signal at its end: nobody is to be told but us.
    let how = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_PARENT_SETTID;
    // SAFETY: structures of bits, which the calls fill.
    let (mut all, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
    // Neither may a signal end the child half-way: it would take our handlers for its own.
    // SAFETY: live structures of the right type.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let nowhere = AtomicI32::new(0);
    let id = job.at_work.place(&nowhere);
    // SAFETY: with CLONE_VFORK this thread waits until the child, which runs on a stack of its own, has ended. If we are
    // killed meanwhile, the child keeps the memory alive.
    let pid = ret_int(unsafe {
        let top = stack.as_mut_ptr_range().end;
        libc::clone(work, top.cast(), how, (&raw mut job).cast(), id)
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
    use std::{os::fd::AsFd, path::Path};

    use super::*;

    fn dir_of(path: &Path) -> std::fs::File {
        std::fs::File::open(path).unwrap()
    }

    fn left(dir: &Path) -> usize {
        std::fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn every_origin_leaves_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let linked = std::fs::File::create_new(dir.path().join("f")).unwrap();
        let origins = [
            (Origin::Regular, libc::S_IFREG),
            (Origin::Directory, libc::S_IFDIR),
            (Origin::Fifo, libc::S_IFIFO),
            (Origin::Symlink(c"to"), libc::S_IFLNK),
            (Origin::CharDevice(libc::makedev(1, 3)), libc::S_IFCHR),
            (Origin::HardLink(linked.as_fd()), libc::S_IFREG),
        ];
        for (origin, kind) in origins {
            let path = dir.path().join("a/b/name");
            let parents = [c"a".into(), c"b".into()];
            let fd = match open(dir_of(dir.path()).as_fd(), &parents, c"name", origin) {
                // Nodes of devices are for those who may make them.
                Err(Failed { step: Step::Make, errno: Errno::EPERM }) => continue,
                opened => opened.unwrap(),
            };
            let shown = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            assert_eq!(shown.to_str().unwrap(), format!("{} (deleted)", path.display()));
            assert_eq!(nix::sys::stat::fstat(&fd).unwrap().st_mode & libc::S_IFMT, kind);
            assert_eq!(left(dir.path()), 1, "{origin:?}");
        }
    }

    #[test]
    fn failures_leave_nothing_either() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, b"theirs").unwrap();
        let base = dir_of(dir.path());
        let taken = open(base.as_fd(), &[], c"f", Origin::Regular).unwrap_err();
        assert_eq!(taken, Failed { step: Step::Make, errno: Errno::EEXIST });
        let no_parent = open(base.as_fd(), &[c"f".into()], c"x", Origin::Regular).unwrap_err();
        assert_eq!(no_parent, Failed { step: Step::Parent(0), errno: Errno::EEXIST });
        let deep = [c"d".into(), c"e".into(), c"e/f".into()];
        let nowhere = open(base.as_fd(), &deep, c"x", Origin::Directory).unwrap_err();
        assert_eq!(nowhere, Failed { step: Step::Parent(2), errno: Errno::ENOENT });
        assert_eq!(std::fs::read(&file).unwrap(), b"theirs");
        assert_eq!(left(dir.path()), 1);
    }

    #[test]
    fn links_that_were_planted_are_not_followed() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("d")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path().join("new"), dir.path().join("f")).unwrap();
        let base = dir_of(dir.path());
        for origin in [Origin::Regular, Origin::Directory, Origin::Fifo] {
            let parent = open(base.as_fd(), &[c"d".into()], c"x", origin).unwrap_err();
            assert_eq!(parent, Failed { step: Step::Parent(0), errno: Errno::EEXIST });
            let name = open(base.as_fd(), &[], c"f", origin).unwrap_err();
            assert_eq!(name, Failed { step: Step::Make, errno: Errno::EEXIST });
        }
        assert_eq!((left(elsewhere.path()), left(dir.path())), (0, 2));
    }

    /// Somebody renames what was made, and puts a file of their own in its place, as fast as they can.
    #[test]
    fn what_was_swapped_is_neither_taken_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = dir.path().join("theirs");
        std::fs::write(&theirs, b"theirs").unwrap();
        let (name, away) = (dir.path().join("name"), dir.path().join("away"));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    if std::fs::rename(&name, &away).is_ok() {
                        let _ = std::fs::hard_link(&theirs, &name);
                        let _ = std::fs::remove_file(&away);
                    }
                }
            });
            let base = dir_of(dir.path());
            let mine = nix::sys::stat::stat(&theirs).unwrap().st_ino;
            for _ in 0..2000 {
                for origin in [Origin::Regular, Origin::Fifo] {
                    if let Ok(fd) = open(base.as_fd(), &[], c"name", origin) {
                        assert_ne!(nix::sys::stat::fstat(&fd).unwrap().st_ino, mine);
                    }
                    let _ = std::fs::remove_file(&name);
                }
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(std::fs::read(&theirs).unwrap(), b"theirs");
    }

    /// Killed again and again in the middle of it, also where a process holds the descriptor table and closes it then.
    #[test]
    fn who_is_killed_leaves_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir_of(dir.path());
        for round in 0..80 {
            let (ended, held) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
            // SAFETY: the child does nothing but what is tested, and is killed.
            let pid = ret_int(unsafe { libc::fork() }).unwrap();
            if pid == 0 {
                if round % 2 == 1 && crate::sys::clone::table_holder().is_err() {
                    std::process::abort();
                }
                loop {
                    let made = open(base.as_fd(), &[], c"name", Origin::Regular);
                    let _ = nix::unistd::write(&held, &[u8::from(made.is_ok())]);
                }
            }
            drop(held);
            let mut made = [0];
            assert_eq!((nix::unistd::read(&ended, &mut made), made), (Ok(1), [1]));
            std::thread::sleep(std::time::Duration::from_micros(round * 4));
            let pid = super::super::pid::HostPid::new(pid);
            super::super::task::kill(pid, libc::SIGKILL).unwrap();
            super::super::wait::wait(pid).unwrap();
            // The pipe ends when the last of those who share its descriptors has.
            while nix::unistd::read(&ended, &mut [0; 4096]).unwrap() > 0 {}
            assert_eq!(left(dir.path()), 0, "round {round}");
        }
    }
}
