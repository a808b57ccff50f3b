//! How names are resolved: stat, open and make below one root directory, one way for all paths that come from /proc or
//! from images.
//!
//! A path that the kernel has given (d_path) holds no symbolic links. One that is found there later was put in its place
//! since, perhaps by a process that wants crtool, which runs as root, to open, fill or remove another file than the one
//! that was saved. So links are refused, and what is looked at is a descriptor that was opened before (`openat2` with
//! RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS), never a name twice. Hosts that are laid out differently (`/lib` that has
//! become a link to `usr/lib`, `/var/run` one to `/run`) still work: links that only root can have made are followed, see
//! [`Symlinks::OfRoot`].
//!
//! What this does not do: it takes no credentials of a task, and it does not compare what is found with what was saved.

use std::{
    cell::OnceCell,
    ffi::{CString, OsStr},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat},
    sys::{
        stat::{FileStat, Mode, fstat},
        statfs::{PROC_SUPER_MAGIC, fstatfs},
    },
    unistd::{Uid, dup},
};

use crate::sys::Errno;

/// Longest path that is resolved; the kernel takes no longer one at once (PATH_MAX).
const LONGEST: usize = 4095;
/// Most links followed on one way, as the kernel's own limit (MAXSYMLINKS).
const MOST_LINKS: usize = 40;
/// Write permission of group and others.
const OTHERS_WRITE: u32 = 0o022;

/// Which symbolic links on the way to a file are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Symlinks {
    /// None: the path comes from the kernel a moment ago, so it has none.
    None,
    /// Those of root (or of the user that crtool runs as) in directories that nobody else can write, where every
    /// directory on the way so far is such a one too.
    #[default]
    OfRoot,
    /// All. The caller says that nobody else can write where the files of the tree are.
    All,
}

/// What is wanted of the last component of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    /// The object itself, also where it is a symbolic link.
    Itself,
    /// A directory. Where a file system is mounted on demand (autofs) it is mounted.
    Directory,
    /// What it leads to, if it is a symbolic link that may be followed.
    Target,
}

/// A name that cannot be resolved.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum ViewError {
    /// No absolute path, or one that no file can have.
    #[error("is no path of a file: {0}")]
    Unusable(&'static str),
    /// A symbolic link stands where there was none.
    #[error(
        "{} is a symbolic link now, of user {uid}; only links of root in directories that nobody else can write are \
         followed (--allow-symlinks follows all)",
        at.display()
    )]
    Symlink {
        /// Where.
        at: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// The kernel says no.
    #[error("{}", .0.desc())]
    Sys(Errno),
}

impl From<Errno> for ViewError {
    fn from(errno: Errno) -> Self {
        Self::Sys(errno)
    }
}

impl ViewError {
    /// Whether nothing has this name.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Sys(Errno::ENOENT | Errno::ENOTDIR))
    }
}

/// One directory on the way.
#[derive(Debug)]
struct Level {
    dir: OwnedFd,
    /// It and all above it can be changed by root alone.
    of_root: bool,
}

/// The names below one root directory.
#[derive(Debug)]
pub(crate) struct View {
    root: OwnedFd,
    symlinks: Symlinks,
    /// The directory of our own descriptors in /proc, and our pid: a child of ours has another one.
    descriptors: OnceCell<(u32, OwnedFd)>,
}

impl View {
    /// The names as crtool itself sees them. These are those of every task in its mount namespace too, since paths in
    /// /proc are relative to the root directory of who reads them.
    pub(crate) fn own(symlinks: Symlinks) -> Result<Self, Errno> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self::below(open("/", flags, Mode::empty())?, symlinks))
    }

    /// The names below `root`, a directory.
    pub(crate) fn below(root: OwnedFd, symlinks: Symlinks) -> Self {
        Self { root, symlinks, descriptors: OnceCell::new() }
    }

    /// The object at `path`, without opening it: an O_PATH descriptor. Fifos do not block, devices do nothing.
    pub(crate) fn find(&self, path: &[u8], last: Last) -> Result<OwnedFd, ViewError> {
        let flags = OFlag::O_PATH
            | OFlag::O_CLOEXEC
            | match last {
                Last::Directory => OFlag::O_DIRECTORY,
                Last::Itself => OFlag::O_NOFOLLOW,
                // A link at the end is not followed either: it is an error.
                Last::Target => OFlag::empty(),
            };
        match self.resolve(path, flags) {
            Ok(found) => Ok(found),
            Err(Errno::ELOOP) => self.walk(path, last),
            // An O_DIRECTORY that ends at a link says so in this way.
            Err(Errno::ENOTDIR) if last == Last::Directory => self.walk(path, last),
            Err(errno) => Err(errno.into()),
        }
    }

    /// stat of the object at `path`, of a link itself.
    pub(crate) fn stat(&self, path: &[u8]) -> Result<FileStat, ViewError> {
        Ok(stat_of(&self.find(path, Last::Itself)?)?)
    }

    /// Opens what has this name now, without any link on the way or at its end. Nobody has looked at it before: compare
    /// it with what was found.
    pub(crate) fn open_by_name(&self, path: &[u8], flags: OFlag) -> Result<OwnedFd, Errno> {
        self.resolve(path, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
    }

    /// As [`reopen`], for many objects: /proc/self/fd is looked up only once.
    pub(crate) fn reopen(&self, object: BorrowedFd<'_>, flags: OFlag) -> Result<OwnedFd, Errno> {
        if self.descriptors.get().is_none() {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let _ = self.descriptors.set((std::process::id(), open("/proc/self/fd", flags, Mode::empty())?));
        }
        match self.descriptors.get() {
            Some((pid, dir)) if *pid == std::process::id() => {
                openat(dir, object.as_raw_fd().to_string().as_str(), reopening(flags), Mode::empty())
            }
            _ => reopen(object, flags),
        }
    }

    /// The directory that holds the last component of `path`, and that component: to make or remove it there.
    pub(crate) fn parent(&self, path: &[u8]) -> Result<(OwnedFd, CString), ViewError> {
        let (dir, name) = split(path).ok_or(ViewError::Unusable("it has no last component"))?;
        Ok((self.find(dir, Last::Directory)?, component(name)?))
    }

    /// As [`Self::parent`], where directories on the way may be missing: the last one that is there, the names of those
    /// that are not, from the outside in, and the last component.
    pub(crate) fn nearest(&self, path: &[u8]) -> Result<(OwnedFd, Vec<CString>, CString), ViewError> {
        let (mut dir, name) = split(path).ok_or(ViewError::Unusable("it has no last component"))?;
        let mut missing = Vec::new();
        loop {
            match self.find(dir, Last::Directory) {
                Ok(found) => {
                    missing.reverse();
                    return Ok((found, missing, component(name)?));
                }
                Err(error @ ViewError::Sys(Errno::ENOENT)) => {
                    let (up, name) = split(dir).ok_or(error)?;
                    missing.push(component(name)?);
                    dir = up;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// All at once, without any link on the way.
    fn resolve(&self, path: &[u8], flags: OFlag) -> Result<OwnedFd, Errno> {
        usable(path).map_err(|_| Errno::EINVAL)?;
        let how = OpenHow::new().flags(flags).resolve(
            ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS
                | ResolveFlag::RESOLVE_IN_ROOT,
        );
        loop {
            // EAGAIN: a rename elsewhere came in between.
            match openat2(&self.root, to_path(path), how) {
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                result => return result,
            }
        }
    }

    /// Component by component, following the links that may be followed.
    fn walk(&self, path: &[u8], last: Last) -> Result<OwnedFd, ViewError> {
        usable(path)?;
        let mut todo: Vec<Vec<u8>> = components(path).rev().map(<[u8]>::to_vec).collect();
        let root = stat_of(&self.root)?;
        let mut levels = vec![Level {
            dir: dup(&self.root)?,
            of_root: ours(root.st_uid) && root.st_mode & OTHERS_WRITE == 0,
        }];
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == b".." {
                if levels.len() > 1 {
                    levels.pop();
                }
                continue;
            }
            let Some(at) = levels.last() else { return Err(Errno::ENOENT.into()) };
            let here = stat_of(&at.dir)?;
            let mut flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let found = openat(&at.dir, to_path(&name), flags, Mode::empty())?;
            let stat = stat_of(&found)?;
            if is_link(&stat) && !(todo.is_empty() && last == Last::Itself) {
                let private = at.of_root && here.st_mode & OTHERS_WRITE == 0 && ours(stat.st_uid);
                let followed = match self.symlinks {
                    Symlinks::None => false,
                    Symlinks::OfRoot => private,
                    Symlinks::All => true,
                };
                // Those of /proc lead to whoever follows them, or are no paths at all.
                let magic = fstatfs(&found)?.filesystem_type() == PROC_SUPER_MAGIC;
                if !followed || magic {
                    let at = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()));
                    let at = at.unwrap_or_else(|_| to_path(path).to_owned());
                    return Err(ViewError::Symlink { at, uid: stat.st_uid });
                }
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::ELOOP.into());
                }
                let target = readlinkat(&found, "")?.into_vec();
                if target.first() == Some(&b'/') {
                    levels.truncate(1);
                }
                todo.extend(components(&target).rev().map(<[u8]>::to_vec));
                continue;
            }
            if todo.is_empty() && last != Last::Directory {
                return Ok(found);
            }
            // With O_DIRECTORY what is to be mounted there is mounted.
            flags |= OFlag::O_DIRECTORY;
            let dir = openat(&at.dir, to_path(&name), flags, Mode::empty())?;
            let stat = stat_of(&dir)?;
            // An entry of root in a directory with the sticky bit cannot be renamed by others.
            let kept = here.st_mode & OTHERS_WRITE == 0 || here.st_mode & libc::S_ISVTX != 0;
            let of_root = at.of_root && kept && ours(stat.st_uid);
            levels.push(Level { dir, of_root });
        }
        levels.pop().map(|level| level.dir).ok_or(ViewError::Sys(Errno::ENOENT))
    }
}

/// The link of a descriptor in /proc: leads to its object, whatever names that has. Not for more than that.
pub(crate) fn magic_link(object: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", object.as_raw_fd())).unwrap_or_default()
}

/// A new description of what `object` stands for, which may be an O_PATH descriptor (but not of a symbolic link).
pub(crate) fn reopen(object: BorrowedFd<'_>, flags: OFlag) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    open(path.as_str(), reopening(flags), Mode::empty())
}

/// Flags to open a magic link with, which must be followed, whatever the flags say of the file's own name.
fn reopening(flags: OFlag) -> OFlag {
    (flags - OFlag::O_NOFOLLOW) | OFlag::O_CLOEXEC | OFlag::O_NOCTTY
}

/// The directory and the last component of an absolute path; `None` without one.
pub(crate) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = path.iter().rposition(|&b| b == b'/')?;
    let (dir, name) = path.split_at_checked(at)?;
    let name = name.get(1..)?;
    let dir = if dir.is_empty() { b"/" } else { dir };
    (!name.is_empty()).then_some((dir, name))
}

/// Whether a path is one that the kernel may have given: absolute, of components that name something, not too long.
fn usable(path: &[u8]) -> Result<(), ViewError> {
    let bad = |why| Err(ViewError::Unusable(why));
    if path.first() != Some(&b'/') {
        return bad("it is not absolute");
    }
    if path.contains(&0) {
        return bad("it holds a NUL byte");
    }
    if path.len() > LONGEST {
        return bad("it is longer than 4095 bytes (PATH_MAX)");
    }
    let dots = path.split(|&b| b == b'/').any(|part| part == b"." || part == b"..");
    if dots { bad("it holds . or ..") } else { Ok(()) }
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".")
}

fn component(name: &[u8]) -> Result<CString, ViewError> {
    if name == b"." || name == b".." {
        return Err(ViewError::Unusable("it holds . or .."));
    }
    CString::new(name).map_err(|_| ViewError::Unusable("it holds a NUL byte"))
}

fn stat_of(fd: &OwnedFd) -> Result<FileStat, Errno> {
    fstat(fd)
}

fn is_link(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFLNK
}

/// Whether what belongs to `uid` is root's, or our own.
fn ours(uid: u32) -> bool {
    uid == 0 || uid == Uid::effective().as_raw()
}

fn to_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    use super::*;

    /// A root directory, as root made it, and the way to it.
    struct Site(tempfile::TempDir);

    impl Site {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
            let site = Self(dir);
            for dir in ["usr", "usr/lib", "home", "home/deep"] {
                site.dir(dir, 0o755, 0);
            }
            std::fs::write(site.at("usr/lib/file"), b"x").unwrap();
            std::fs::write(site.at("home/deep/secret"), b"x").unwrap();
            site
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn dir(&self, name: &str, mode: u32, uid: u32) {
            std::fs::create_dir(self.at(name)).unwrap();
            std::fs::set_permissions(self.at(name), std::fs::Permissions::from_mode(mode)).unwrap();
            chown(self.at(name), Some(uid), None).unwrap();
        }

        fn link(&self, name: &str, to: &str, uid: u32) {
            symlink(to, self.at(name)).unwrap();
            std::os::unix::fs::lchown(self.at(name), Some(uid), None).unwrap();
        }

        fn view(&self, symlinks: Symlinks) -> View {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            View::below(open(self.0.path(), flags, Mode::empty()).unwrap(), symlinks)
        }

        /// Whether `path` leads to the file at `to` with each kind of links: none, of root, all.
        fn leads(&self, path: &str, to: &str) -> [bool; 3] {
            let want = std::fs::metadata(self.at(to)).unwrap().ino();
            [Symlinks::None, Symlinks::OfRoot, Symlinks::All].map(|symlinks| {
                match self.view(symlinks).find(path.as_bytes(), Last::Target) {
                    Ok(found) => {
                        assert_eq!(fstat(&found).unwrap().st_ino, want, "{path}");
                        true
                    }
                    Err(ViewError::Symlink { .. }) => false,
                    Err(other) => panic!("{path}: {other}"),
                }
            })
        }
    }

    fn root() -> bool {
        let root = Uid::effective().is_root();
        if !root {
            eprintln!("skipped: needs root");
        }
        root
    }

    const ALWAYS: [bool; 3] = [true; 3];
    const OF_ROOT: [bool; 3] = [false, true, true];
    const ONLY_ALL: [bool; 3] = [false, false, true];

    #[test]
    fn links_that_only_root_can_have_made() {
        if !root() {
            return;
        }
        let site = Site::new();
        site.link("lib", "usr/lib", 0);
        site.link("lib2", "/usr/../usr/./lib//", 0);
        site.link("usr/up", "../home", 0);
        site.link("usr/lib/alias", "file", 0);
        site.dir("tmp", 0o1777, 0);
        site.dir("tmp/kept", 0o755, 0);
        site.link("tmp/kept/lib", "/usr/lib", 0);
        assert_eq!(site.leads("/usr/lib/file", "usr/lib/file"), ALWAYS);
        for path in ["/lib/file", "/lib2/file", "/usr/lib/alias", "/lib/alias", "/tmp/kept/lib/file"] {
            assert_eq!(site.leads(path, "usr/lib/file"), OF_ROOT, "{path}");
        }
        assert_eq!(site.leads("/usr/up/deep/secret", "home/deep/secret"), OF_ROOT);
    }

    #[test]
    fn links_that_others_may_have_made() {
        if !root() {
            return;
        }
        let site = Site::new();
        // Of another user.
        site.link("theirs", "home", 1000);
        assert_eq!(site.leads("/theirs/deep/secret", "home/deep/secret"), ONLY_ALL);
        // Of root, but in directories in which others can rename.
        for (name, mode, uid) in [("a", 0o777, 0), ("b", 0o1777, 0), ("c", 0o775, 0), ("d", 0o755, 1000)] {
            site.dir(name, mode, uid);
            site.link(&format!("{name}/link"), "/home", 0);
            assert_eq!(site.leads(&format!("/{name}/link/deep/secret"), "home/deep/secret"), ONLY_ALL);
            // And below such a directory, which may itself be another one than it was.
            if mode != 0o1777 {
                site.dir(&format!("{name}/of-root"), 0o755, 0);
                site.link(&format!("{name}/of-root/link"), "/home", 0);
                let path = format!("/{name}/of-root/link/deep/secret");
                assert_eq!(site.leads(&path, "home/deep/secret"), ONLY_ALL, "{path}");
            }
        }
    }

    #[test]
    fn the_root_directory_is_never_left() {
        let site = Site::new();
        site.link("out", "../../../../../../usr/lib", 0);
        let out = site.view(Symlinks::All).find(b"/out/file", Last::Target).unwrap();
        assert_eq!(fstat(&out).unwrap().st_ino, std::fs::metadata(site.at("usr/lib/file")).unwrap().ino());
        let circle = site.view(Symlinks::All);
        site.link("round", "round", 0);
        assert_eq!(circle.find(b"/round", Last::Target).unwrap_err(), ViewError::Sys(Errno::ELOOP));
    }

    #[test]
    fn links_of_proc_are_never_followed() {
        let view = View::own(Symlinks::All).unwrap();
        for path in ["/proc/self/status", "/proc/self/root/etc", "/proc/thread-self/comm"] {
            let error = view.find(path.as_bytes(), Last::Target).unwrap_err();
            assert!(matches!(error, ViewError::Symlink { .. }), "{path}: {error}");
        }
        let exe = format!("/proc/{}/exe", std::process::id());
        let error = view.find(exe.as_bytes(), Last::Target).unwrap_err();
        assert!(matches!(error, ViewError::Symlink { .. }), "{error}");
        assert!(is_link(&view.stat(exe.as_bytes()).unwrap()), "the link itself is an object");
    }

    #[test]
    fn names_that_no_file_has() {
        let site = Site::new();
        let view = site.view(Symlinks::All);
        let long = [b"/usr/".repeat(1000), b"file".to_vec()].concat();
        let bad: [&[u8]; 7] =
            [b"", b"usr/lib", b"/usr/../usr/lib/file", b"/usr/./lib", b"/usr/lib\0/file", b"/..", &long];
        for path in bad {
            for last in [Last::Itself, Last::Target, Last::Directory] {
                let error = view.find(path, last).unwrap_err();
                let told = matches!(error, ViewError::Unusable(_) | ViewError::Sys(Errno::EINVAL));
                assert!(told, "{}: {error}", String::from_utf8_lossy(path));
            }
        }
        let names: [&[u8]; 4] = [b"/usr/..", b"/usr/.", b"/usr/a\0b", b"file"];
        for path in names {
            assert!(view.parent(path).is_err() && view.nearest(path).is_err());
        }
    }

    #[test]
    fn what_is_missing_of_a_path() {
        let site = Site::new();
        let view = site.view(Symlinks::OfRoot);
        let (dir, missing, name) = view.nearest(b"/usr/no/such/file").unwrap();
        assert_eq!(fstat(&dir).unwrap().st_ino, std::fs::metadata(site.at("usr")).unwrap().ino());
        assert_eq!((missing, name), (vec![c"no".into(), c"such".into()], c"file".into()));
        site.link("planted", "/home", 1000);
        assert!(
            matches!(view.nearest(b"/planted/x/y"), Err(ViewError::Symlink { uid: 1000, .. })) || !root()
        );
        assert_eq!(view.nearest(b"/usr/lib/file/x").unwrap_err(), ViewError::Sys(Errno::ENOTDIR));
    }

    #[test]
    fn the_last_component() {
        let site = Site::new();
        site.link("alias", "usr/lib", 0);
        let view = site.view(Symlinks::All);
        assert!(is_link(&view.stat(b"/alias").unwrap()));
        let is_dir = |fd: OwnedFd| fstat(&fd).unwrap().st_mode & libc::S_IFMT == libc::S_IFDIR;
        assert!(is_dir(view.find(b"/alias", Last::Target).unwrap()));
        assert!(is_dir(view.find(b"/alias", Last::Directory).unwrap()));
        assert!(is_dir(view.find(b"/", Last::Directory).unwrap()));
        let error = view.find(b"/usr/lib/file", Last::Directory).unwrap_err();
        assert_eq!(error, ViewError::Sys(Errno::ENOTDIR));
    }
}
