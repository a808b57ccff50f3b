//! Who else could have put a file where it is found: what crtool believes, as root, must come from root or the caller.
//!
//! Images decide which credentials a restored task has, and a log or pid file is written over whatever its name leads
//! to. So, as ssh does with its own files, directories and files are taken only if root or the caller owns them and
//! nobody else may write to them, and a symbolic link on the way is followed only if it is root's or the caller's.
//! Everything is asked of open descriptors, never of a path twice, because a stranger who owns a directory on the way
//! may rename what is in it at any moment.
//!
//! Not looked at: who owns the directories on the way. A stranger among them can put another directory in place,
//! but only one that itself is root's or the caller's.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, openat, readlinkat, renameat},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat},
        statfs::{PROC_SUPER_MAGIC, fstatfs},
    },
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};

use crate::settings::OwnerCheck;

/// As many as the kernel follows.
const MOST_LINKS: usize = 40;
/// Write permission of the group and of others.
const OTHERS_WRITE: u32 = 0o022;

/// A file or directory that is not taken, or cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum OwnershipError {
    /// The system refused.
    #[error("{action} {what} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// With what: "images directory", "log file", ...
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody else decides what is there.
    #[error(
        "{what} {} is owned by uid {owner} and has mode {mode:04o}: {why} (--no-owner-check takes it all the same)",
        path.display()
    )]
    Stranger {
        /// Of what sort.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
        /// What is wrong with that.
        why: &'static str,
    },
}

impl OwnershipError {
    fn io(action: &'static str, what: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { action, what, path: path.to_owned(), source: source.into() }
    }

    fn stranger(what: &'static str, path: &Path, stat: &FileStat, why: &'static str) -> Self {
        let mode = stat.st_mode & 0o7777;
        Self::Stranger { what, path: path.to_owned(), owner: stat.st_uid, mode, why }
    }
}

const NOT_OURS: &str = "it must be owned by root or by the caller";
const WRITABLE: &str = "nobody but its owner may be able to write to it";
const LINKED: &str = "it has more names than this one, in a directory where others can make some";

/// Who can give names to files in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// Root and the caller.
    Ours,
    /// Everybody, each for files of their own (`/tmp`); what is root's or the caller's stays where it is.
    Sticky,
    /// Nobody has asked.
    Unchecked,
}

fn is_ours(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// Checks an open directory.
pub fn check_dir(
    dir: BorrowedFd<'_>,
    what: &'static str,
    path: &Path,
    check: OwnerCheck,
) -> Result<Names, OwnershipError> {
    if check == OwnerCheck::Off {
        return Ok(Names::Unchecked);
    }
    let stat = fstat(dir).map_err(|e| OwnershipError::io("look at", what, path, e))?;
    if !is_ours(stat.st_uid) {
        return Err(OwnershipError::stranger(what, path, &stat, NOT_OURS));
    }
    if stat.st_mode & OTHERS_WRITE == 0 {
        Ok(Names::Ours)
    } else if stat.st_mode & Mode::S_ISVTX.bits() != 0 {
        Ok(Names::Sticky)
    } else {
        Err(OwnershipError::stranger(what, path, &stat, WRITABLE))
    }
}

/// Checks an open file, found in a directory where `names` were given.
pub fn check_file(
    file: BorrowedFd<'_>,
    what: &'static str,
    path: &Path,
    names: Names,
) -> Result<(), OwnershipError> {
    if names == Names::Unchecked {
        return Ok(());
    }
    let stat = fstat(file).map_err(|e| OwnershipError::io("look at", what, path, e))?;
    let refused = |why| Err(OwnershipError::stranger(what, path, &stat, why));
    if !is_ours(stat.st_uid) {
        refused(NOT_OURS)
    } else if stat.st_mode & OTHERS_WRITE != 0 {
        refused(WRITABLE)
    } else if names == Names::Sticky && stat.st_nlink > 1 {
        refused(LINKED)
    } else {
        Ok(())
    }
}

/// Opens the directory `path`, relative to `at`.
pub fn open_dir(
    at: BorrowedFd<'_>,
    what: &'static str,
    path: &Path,
    check: OwnerCheck,
) -> Result<OwnedFd, OwnershipError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let failed = |e| OwnershipError::io("open", what, path, e);
    if check == OwnerCheck::Off {
        return openat(at, path, flags, Mode::empty()).map_err(failed);
    }
    let found = walk(at, what, path, check)?.found.ok_or(Errno::ENOENT).map_err(failed)?;
    openat(&found, ".", flags, Mode::empty()).map_err(failed)
}

/// What becomes of a file that is there when it is opened for writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Old {
    /// What it held is lost.
    Truncated,
    /// What is written comes after it.
    Kept,
}

/// Opens `path` for writing at its end, and makes it (0600) if it is not there. A file is not written to, and nothing
/// is made, where a stranger has led the path; devices, pipes and descriptors of ours (`/dev/stderr`) are.
pub fn output(path: &Path, what: &'static str, old: Old, check: OwnerCheck) -> Result<File, OwnershipError> {
    let failed = |e: Errno| OwnershipError::io("open", what, path, e);
    let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    if check == OwnerCheck::Off {
        let truncate = if old == Old::Truncated { OFlag::O_TRUNC } else { OFlag::empty() };
        return openat(AT_FDCWD, path, flags | OFlag::O_CREAT | truncate, private)
            .map(File::from)
            .map_err(failed);
    }
    let place = walk(AT_FDCWD, what, path, check)?;
    let Some(found) = place.found else {
        let new = flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        return openat(&place.dir, place.name.as_os_str(), new, private).map(File::from).map_err(failed);
    };
    let stat = fstat(&found).map_err(failed)?;
    let regular = kind(&stat) == SFlag::S_IFREG;
    if place.of_proc {
        // The caller's own descriptor: who may write to it is for the caller to know.
    } else if regular {
        let names = check_dir(place.dir.as_fd(), what, path, check).unwrap_or(Names::Sticky);
        check_file(found.as_fd(), what, path, names)?;
    } else if kind(&stat) == SFlag::S_IFIFO && !is_ours(stat.st_uid) {
        return Err(OwnershipError::stranger(what, path, &stat, NOT_OURS));
    }
    // What was looked at, whatever its name leads to by now.
    let open = format!("/proc/self/fd/{}", found.as_raw_fd());
    let file = openat(AT_FDCWD, open.as_str(), flags, Mode::empty()).map(File::from).map_err(failed)?;
    if regular && old == Old::Truncated && !place.of_proc {
        file.set_len(0).map_err(|e| OwnershipError::io("write", what, path, e))?;
    }
    Ok(file)
}

/// Opens the regular file `path` for reading, if no stranger decides what stands in it.
pub fn input(path: &Path, what: &'static str, check: OwnerCheck) -> Result<File, OwnershipError> {
    let failed = |e: Errno| OwnershipError::io("open", what, path, e);
    let place = walk(AT_FDCWD, what, path, check)?;
    let found = place.found.ok_or(Errno::ENOENT).map_err(failed)?;
    if kind(&fstat(&found).map_err(failed)?) != SFlag::S_IFREG {
        return Err(failed(Errno::EINVAL));
    }
    let names = check_dir(place.dir.as_fd(), what, path, check).unwrap_or(Names::Sticky);
    check_file(found.as_fd(), what, path, names)?;
    // What was looked at, whatever its name leads to by now.
    let open = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    openat(AT_FDCWD, open.as_str(), flags, Mode::empty()).map(File::from).map_err(failed)
}

/// Writes the whole of a file, which is the old one or the new one at every moment.
pub fn replace(
    path: &Path,
    what: &'static str,
    content: &[u8],
    check: OwnerCheck,
) -> Result<(), OwnershipError> {
    let failed = |action| move |e: Errno| OwnershipError::io(action, what, path, e);
    let place = walk(AT_FDCWD, what, path, check)?;
    if let Some(found) = &place.found
        && kind(&fstat(found).map_err(failed("look at"))?) != SFlag::S_IFREG
    {
        let mut there = output(path, what, Old::Kept, check)?;
        return there.write_all(content).map_err(|e| OwnershipError::io("write", what, path, e));
    }
    let mut temporary = OsString::from(".");
    temporary.push(&place.name);
    temporary.push(".new");
    let temporary = temporary.as_os_str();
    let remove = || unlinkat(&place.dir, temporary, UnlinkatFlags::NoRemoveDir);
    // Left by somebody who was killed.
    let _ = remove();
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mode = Mode::from_bits_truncate(0o644);
    let mut file = openat(&place.dir, temporary, flags, mode).map(File::from).map_err(failed("create"))?;
    let written =
        file.write_all(content).map_err(|e| OwnershipError::io("write", what, path, e)).and_then(|()| {
            renameat(&place.dir, temporary, &place.dir, place.name.as_os_str()).map_err(failed("write"))
        });
    if written.is_err() {
        let _ = remove();
    }
    written
}

/// Where a path leads.
#[derive(Debug)]
struct Place {
    /// The directory of the last name.
    dir: OwnedFd,
    /// The last name; no symbolic link.
    name: OsString,
    /// What has it, with O_PATH; nothing, if there is nothing.
    found: Option<OwnedFd>,
    /// Reached through a link of /proc, which leads to an open file and not by a name.
    of_proc: bool,
}

/// Follows a path name by name.
fn walk(
    at: BorrowedFd<'_>,
    what: &'static str,
    path: &Path,
    check: OwnerCheck,
) -> Result<Place, OwnershipError> {
    let mut todo: Vec<OsString> = Vec::new();
    let mut walked = PathBuf::from(if path.is_absolute() { "/" } else { "" });
    let mut links = 0;
    push(&mut todo, path);
    let mut dir = start(at, path).map_err(|e| OwnershipError::io("open", what, path, e))?;
    let mut of_proc = false;
    while let Some(name) = todo.pop() {
        walked.push(&name);
        let failed = |e: Errno| OwnershipError::io("open", what, path, e);
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let last = todo.is_empty();
        let found = match openat(&dir, name.as_os_str(), flags, Mode::empty()) {
            Ok(found) => found,
            Err(Errno::ENOENT) if last => return Ok(Place { dir, name, found: None, of_proc: false }),
            Err(e) => return Err(failed(e)),
        };
        let stat = fstat(&found).map_err(failed)?;
        of_proc = false;
        let found = if kind(&stat) != SFlag::S_IFLNK {
            found
        } else {
            if check == OwnerCheck::On && !is_ours(stat.st_uid) {
                return Err(OwnershipError::stranger("symbolic link", &walked, &stat, NOT_OURS));
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(failed(Errno::ELOOP));
            }
            if fstatfs(&found).map_err(failed)?.filesystem_type() == PROC_SUPER_MAGIC {
                of_proc = true;
                let follow = OFlag::O_PATH | OFlag::O_CLOEXEC;
                openat(&dir, name.as_os_str(), follow, Mode::empty()).map_err(failed)?
            } else {
                let target = readlinkat(&found, "").map_err(failed)?;
                let target = Path::new(&target);
                push(&mut todo, target);
                if target.is_absolute() {
                    dir = start(at, target).map_err(failed)?;
                    walked = PathBuf::from("/");
                } else {
                    walked.pop();
                }
                continue;
            }
        };
        if todo.is_empty() {
            return Ok(Place { dir, name, found: Some(found), of_proc });
        }
        // Not a directory: the next name is looked for in it, and the kernel says so.
        dir = found;
    }
    // The path was nothing but the root, or dots.
    let found = openat(&dir, ".", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| OwnershipError::io("open", what, path, e))?;
    Ok(Place { dir, name: ".".into(), found: Some(found), of_proc })
}

fn start(at: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let from = if path.is_absolute() { OsStr::from_bytes(b"/") } else { OsStr::from_bytes(b".") };
    openat(at, from, flags, Mode::empty())
}

/// Puts the names of `path` on top of those still to be followed.
fn push(todo: &mut Vec<OsString>, path: &Path) {
    let names = path.components().rev().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    todo.extend(names);
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink},
    };

    use super::*;

    const STRANGER: u32 = 12_345;

    fn write(path: &Path, old: Old) -> Result<(), String> {
        let file = output(path, "log file", old, OwnerCheck::On).map_err(|error| error.to_string())?;
        (&file).write_all(b"new").map_err(|error| error.to_string())
    }

    #[test]
    fn outputs_are_made_or_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        write(&path, Old::Truncated).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        write(&path, Old::Kept).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newnew");
        write(&path, Old::Truncated).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        // Through links of the caller's, also to what is not there yet.
        symlink("log", dir.path().join("link")).unwrap();
        symlink(dir.path().join("later"), dir.path().join("dangling")).unwrap();
        write(&dir.path().join("link"), Old::Kept).unwrap();
        write(&dir.path().join("dangling"), Old::Truncated).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newnew");
        assert_eq!(fs::read(dir.path().join("later")).unwrap(), b"new");
        for device in ["/dev/null", "/proc/self/fd/../fd/1"] {
            output(Path::new(device), "log file", Old::Truncated, OwnerCheck::On).unwrap();
        }
        assert!(write(dir.path(), Old::Truncated).unwrap_err().starts_with("open log file /"));
        assert!(write(&dir.path().join("no/log"), Old::Truncated).is_err());
        assert!(write(Path::new(""), Old::Truncated).is_err());
        assert!(write(Path::new("/"), Old::Truncated).is_err());
    }

    #[test]
    fn outputs_stay_out_of_what_strangers_have_prepared() {
        if !geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let (theirs, victim) = (base.path().join("theirs"), base.path().join("victim"));
        fs::create_dir(&theirs).unwrap();
        fs::write(&victim, "safe").unwrap();
        lchown(&theirs, Some(STRANGER), None).unwrap();
        let mine = |name: &str| theirs.join(name);
        symlink(&victim, mine("link")).unwrap();
        symlink(base.path().join("made"), mine("dangling")).unwrap();
        symlink(base.path(), mine("directory")).unwrap();
        fs::hard_link(&victim, mine("hard")).unwrap();
        fs::write(mine("own"), "theirs").unwrap();
        nix::unistd::mkfifo(&mine("fifo"), Mode::S_IRWXU).unwrap();
        for name in ["link", "dangling", "directory", "own", "fifo"] {
            lchown(mine(name), Some(STRANGER), None).unwrap();
        }
        for (name, wanted) in [
            ("link", "symbolic link /"),
            ("dangling", "symbolic link /"),
            ("directory/victim", "symbolic link /"),
            ("hard", "more names"),
            ("own", "owned by uid 12345"),
            ("fifo", "owned by uid 12345"),
        ] {
            for old in [Old::Truncated, Old::Kept] {
                let said = write(&mine(name), old).unwrap_err();
                assert!(said.contains(wanted) && said.contains("--no-owner-check"), "{name}: {said}");
            }
            if name != "hard" && name != "own" && name != "fifo" {
                replace(&mine(name), "statistics", b"new", OwnerCheck::On).unwrap_err();
            }
        }
        assert_eq!(fs::read(&victim).unwrap(), b"safe");
        assert_eq!(fs::read(mine("own")).unwrap(), b"theirs");
        assert!(!base.path().join("made").exists());
        // A new file in their directory harms nobody.
        write(&mine("new"), Old::Truncated).unwrap();
        let file = output(&mine("link"), "log file", Old::Kept, OwnerCheck::Off).unwrap();
        (&file).write_all(b"!").unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"safe!");
    }

    #[test]
    fn what_is_replaced_is_never_half_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats-dump");
        for content in [&b"first"[..], b"second"] {
            replace(&path, "statistics", content, OwnerCheck::On).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        let (other, kept) = (dir.path().join("other"), dir.path().join("kept"));
        fs::hard_link(&path, &kept).unwrap();
        symlink(&path, &other).unwrap();
        replace(&other, "statistics", b"third", OwnerCheck::On).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(fs::read(&kept).unwrap(), b"second");
        assert!(fs::symlink_metadata(&other).unwrap().is_symlink());
        // What is no file is written to and stays what it is.
        fs::remove_file(&other).unwrap();
        symlink("/dev/null", &other).unwrap();
        replace(&other, "statistics", b"fourth", OwnerCheck::On).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 3, "nothing else is left");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o022, 0);
    }
}
