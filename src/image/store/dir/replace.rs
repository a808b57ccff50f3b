//! How a snapshot takes the place of another one.
//!
//! Both have files of the same names, so they cannot lie beside each other in one directory, and no call exchanges many
//! files at once. Three directories below the images directory (0700) help:
//!
//! ```text
//! .crtool-new        the images of a dump under way, which holds its lock
//! .crtool-leaving    the old snapshot as it moves out, its inventory first, or back, its inventory last
//! .crtool-previous   all of the old snapshot, while the new images move in, their inventory last
//! .crtool-trash      what remains to be removed
//! ```
//!
//! At every moment exactly one complete snapshot is found by this rule: if `inventory.img` has its own name in the images
//! directory, the snapshot is there; else, if there is `.crtool-previous`, in that; else, if there is `.crtool-leaving`,
//! in that one and the images directory together. The old inventory is the first to leave and the new one the last to
//! come, so whoever does not know the rule (CRIU) sees a complete snapshot or none. What a killed dump leaves is
//! brought back or removed by the next one, before it writes anything.
//!
//! Only renames within one file system are needed, no links. What is moved are images by their names; everything
//! else in the directory (logs, statistics, files of the user) stays.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, major, minor, mkdirat};
use nix::unistd::{UnlinkatFlags, syncfs, unlinkat};

use super::{DIRECTORY, INVENTORY, PARENT, PATIENCE, io_error, names_in, same};
use crate::image::error::ImageError;
use crate::image::names::ImageKind;
use crate::ownership;
use crate::proc::locks::{self, Lock, LockKind};
use crate::settings::OwnerCheck;

pub(super) const LEAVING: &str = ".crtool-leaving";
pub(super) const PREVIOUS: &str = ".crtool-previous";
const NEW: &str = ".crtool-new";
const TRASH: &str = ".crtool-trash";

/// Up to so many files are brought to disk one by one; for more it is cheaper to do so with the whole file system.
const MOST_ALONE: usize = 64;

/// A dump's right to replace the snapshot of a directory.
#[derive(Debug)]
pub(super) struct Replacement {
    /// `.crtool-new`, locked.
    new: File,
    /// It has that name no more: all images are in place, and there is nothing that they have replaced.
    done: bool,
    /// The inventory that keeps other dumps away, locked: the one that is replaced, or the new one when it is done.
    inventory: Option<File>,
}

impl Replacement {
    /// Takes the right, if nobody else has it, and clears up after a dump that was killed.
    pub(super) fn begin(dir: &OwnedFd, path: &Path, check: OwnerCheck) -> Result<Self, ImageError> {
        let new = lock_new(dir, path, check)?;
        let begun = Self { new, done: false, inventory: None };
        let cleared = begun.clear_up(dir, path, check);
        if cleared.is_err() {
            begun.end(dir, path);
        }
        cleared?;
        Ok(begun)
    }

    /// Where images are written until commit.
    pub(super) fn place(&self) -> Result<OwnedFd, ImageError> {
        let place = self.new.as_fd().try_clone_to_owned();
        place.map_err(|source| ImageError::Io { action: "open", path: NEW.into(), source })
    }

    /// What a killed dump has left is brought back where it was, or removed.
    fn clear_up(&self, dir: &OwnedFd, path: &Path, check: OwnerCheck) -> Result<(), ImageError> {
        empty(&self.new, &path.join(NEW))?;
        if let Some(trash) = aside(dir, path, TRASH, check)? {
            remove(dir, path, TRASH, &trash)?;
        }
        let previous = aside(dir, path, PREVIOUS, check)?;
        let leaving = aside(dir, path, LEAVING, check)?;
        if present(dir, INVENTORY) {
            // Its images are all there: what they have replaced is not needed any more.
            for (name, old) in [(PREVIOUS, previous), (LEAVING, leaving)] {
                if let Some(old) = old {
                    remove(dir, path, name, &old)?;
                }
            }
            // Nobody is bothered with a dump that could not be committed.
            return take_inventory(dir, path).map(drop);
        }
        let Some(old) = previous.as_ref().or(leaving.as_ref()) else { return Ok(()) };
        tracing::info!("{}: a dump was killed; the snapshot from before it is brought back", path.display());
        let _lock = take_inventory(old, path)?;
        if let Some(previous) = &previous {
            // Those of the new snapshot that have come in. A whole snapshot has left with its link.
            let link = present(previous, INVENTORY).then(|| PARENT.to_owned());
            unlink_all(dir, path, &images(dir, path, &link.into_iter().collect())?)?;
            bring_back(dir, path, previous)
        } else {
            move_back(dir, path, old)
        }
    }

    /// Puts the images of the names `made` in the place of those that are there. When that fails these are back.
    pub(super) fn commit(
        &mut self,
        dir: &OwnedFd,
        path: &Path,
        made: &BTreeSet<String>,
    ) -> Result<(), ImageError> {
        let old = images(dir, path, made)?;
        if !old.is_empty() {
            self.inventory = take_inventory(dir, path)?;
            let made = step::next().and_then(|()| mkdirat(dir, LEAVING, Mode::S_IRWXU));
            made.map_err(|e| io_error("create", &path.join(LEAVING), e))?;
            let leaving = open_subdir(dir, LEAVING).map_err(|e| io_error("open", &path.join(LEAVING), e))?;
            let moved = move_all(dir, &leaving, path, inventory_first(&old))
                .and_then(|()| rename(dir, LEAVING, dir, PREVIOUS, path));
            if let Err(error) = moved {
                return Err(after(error, move_back(dir, path, &leaving)));
            }
        }
        let moved = move_all(self.new.as_fd(), dir, path, inventory_first(made).rev());
        if let Err(error) = moved {
            let undone = self.undo(dir, path, made);
            return Err(after(error, undone));
        }
        if old.is_empty() && self.hold(dir) {
            self.done = rmdir(dir, path, NEW).is_ok();
        }
        Ok(())
    }

    /// Locks the new inventory as a restore does. From then on it keeps other dumps away, as `.crtool-new` did before.
    fn hold(&mut self, dir: &OwnedFd) -> bool {
        self.inventory = super::inventory(std::slice::from_ref(dir));
        self.inventory.as_ref().is_none_or(|inventory| inventory.try_lock_shared().is_ok())
    }

    /// Takes a commit back: of the images `made` none is left, and those that were there before are again.
    pub(super) fn undo(
        &mut self,
        dir: &OwnedFd,
        path: &Path,
        made: &BTreeSet<String>,
    ) -> Result<(), ImageError> {
        unlink_all(dir, path, made)?;
        if let Ok(previous) = open_subdir(dir, PREVIOUS) {
            bring_back(dir, path, &previous)?;
        }
        self.inventory = None;
        Ok(())
    }

    /// Removes what is not needed any more: what was replaced, or what was written and not committed.
    pub(super) fn end(&self, dir: &OwnedFd, path: &Path) {
        let mut ended = Ok(());
        if !self.done
            && present(dir, INVENTORY)
            && let Ok(previous) = open_subdir(dir, PREVIOUS)
        {
            ended =
                rename(dir, PREVIOUS, dir, TRASH, path).and_then(|()| remove(dir, path, TRASH, &previous));
        }
        if !self.done {
            let emptied = ended.and_then(|()| empty(&self.new, &path.join(NEW)));
            ended = emptied.and_then(|()| rmdir(dir, path, NEW));
        }
        if let Err(error) = ended {
            tracing::warn!("{:#}", anyhow::Error::from(error));
        }
        // Also for a helper that lives on with a copy of the descriptor.
        let _ = self.new.unlock();
        if let Some(inventory) = &self.inventory {
            let _ = inventory.unlock();
        }
    }
}

/// Makes and locks the directory for new images.
fn lock_new(dir: &OwnedFd, path: &Path, check: OwnerCheck) -> Result<File, ImageError> {
    let place = path.join(NEW);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match step::next().and_then(|()| mkdirat(dir, NEW, Mode::S_IRWXU)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(io_error("create", &place, e)),
        }
        let new = match open_subdir(dir, NEW) {
            Ok(new) => File::from(new),
            // Whoever had it has just removed it.
            Err(Errno::ENOENT) => continue,
            Err(e) => return Err(io_error("open", &place, e)),
        };
        ownership::check_dir(new.as_fd(), DIRECTORY, &place, check)?;
        match new.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(busy(path, &new, "another dump writes into it"));
            }
            Err(TryLockError::WouldBlock) => {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            // A file system without locks.
            Err(TryLockError::Error(error)) => tracing::warn!("lock of {}: {error}", place.display()),
        }
        if same(&new, open_subdir(dir, NEW).ok().map(File::from).as_ref()) {
            return Ok(new);
        }
    }
}

/// Is a dump into `dir` at work?
pub(super) fn under_way(dir: &OwnedFd) -> bool {
    let new = open_subdir(dir, NEW).map(File::from);
    new.is_ok_and(|new| matches!(new.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Locks the inventory in `dir`, so that nobody reads the snapshot while it is moved; none if there is none.
fn take_inventory(dir: &OwnedFd, path: &Path) -> Result<Option<File>, ImageError> {
    // Some file systems want a file that can be written for this lock.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let open = |access| openat(dir, INVENTORY, flags | access, Mode::empty()).map(File::from);
    let Ok(inventory) = open(OFlag::O_RDWR).or_else(|_| open(OFlag::O_RDONLY)) else { return Ok(None) };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match inventory.try_lock() {
            Ok(()) => return Ok(Some(inventory)),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(busy(
                    path,
                    &inventory,
                    "the snapshot in it is being restored, or has just been dumped",
                ));
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            Err(TryLockError::Error(error)) => {
                tracing::warn!("lock of {}: {error}", path.join(INVENTORY).display());
                return Ok(Some(inventory));
            }
        }
    }
}

fn busy(path: &Path, locked: &File, what: &'static str) -> ImageError {
    ImageError::Busy { path: path.to_owned(), what, pid: holder(locked) }
}

/// The process that has locked a file, as /proc/locks tells.
fn holder(locked: &File) -> Option<i32> {
    let stat = fstat(locked).ok()?;
    let dev = (major(stat.st_dev), minor(stat.st_dev));
    let locks = locks::parse(&fs::read("/proc/locks").ok()?).ok()?;
    let is_it = |lock: &&Lock| {
        let numbers = (u64::from(lock.dev.0), u64::from(lock.dev.1));
        lock.kind == LockKind::Flock && !lock.waits && numbers == dev && lock.ino == stat.st_ino
    };
    locks.iter().find(is_it).map(|lock| lock.pid).filter(|pid| *pid > 0)
}

/// A directory that a dump may have left, if it is there.
pub(super) fn aside(
    dir: &OwnedFd,
    path: &Path,
    name: &str,
    check: OwnerCheck,
) -> Result<Option<OwnedFd>, ImageError> {
    let path = path.join(name);
    match open_subdir(dir, name) {
        Ok(found) => {
            ownership::check_dir(found.as_fd(), DIRECTORY, &path, check)?;
            Ok(Some(found))
        }
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(io_error("open", &path, e)),
    }
}

fn open_subdir(dir: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

fn present(dir: &OwnedFd, name: &str) -> bool {
    fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
}

/// The names in `dir` that belong to a snapshot, or are in the way of one with images of the names `made`.
fn images(dir: &OwnedFd, path: &Path, made: &BTreeSet<String>) -> Result<BTreeSet<String>, ImageError> {
    let mut found = BTreeSet::new();
    let complete = present(dir, INVENTORY);
    for name in names_in(dir.as_fd()).map_err(|e| io_error("list", path, e))? {
        // A link without a snapshot is one that the caller has made for the dump.
        let is_image = (name.ends_with(".img") && ImageKind::by_file_name(&name).is_some())
            || (name == PARENT && complete);
        if !is_image && !made.contains(&name) {
            continue;
        }
        let failed = |e| io_error("replace", &path.join(&name), e);
        let stat = fstatat(dir, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(failed)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        if kind == SFlag::S_IFDIR {
            if name == PARENT && !made.contains(&name) {
                continue;
            }
            return Err(failed(Errno::EISDIR));
        }
        found.insert(name);
    }
    Ok(found)
}

/// The names, the inventory before all others.
fn inventory_first(names: &BTreeSet<String>) -> impl DoubleEndedIterator<Item = &str> {
    let is_inventory = |name: &&str| *name == INVENTORY;
    let names = || names.iter().map(String::as_str);
    names().filter(is_inventory).chain(names().filter(move |name| !is_inventory(name)))
}

fn rename(from: &impl AsFd, old: &str, to: &impl AsFd, new: &str, path: &Path) -> Result<(), ImageError> {
    let renamed = step::next().and_then(|()| renameat(from.as_fd(), old, to.as_fd(), new));
    renamed.map_err(|e| io_error("move into place", &path.join(new), e))
}

fn move_all<'n>(
    from: impl AsFd,
    to: &OwnedFd,
    path: &Path,
    names: impl Iterator<Item = &'n str>,
) -> Result<(), ImageError> {
    for name in names {
        rename(&from, name, to, name, path)?;
    }
    Ok(())
}

/// From `.crtool-previous`, when nothing of another snapshot is in `dir`.
fn bring_back(dir: &OwnedFd, path: &Path, previous: &OwnedFd) -> Result<(), ImageError> {
    rename(dir, PREVIOUS, dir, LEAVING, path)?;
    move_back(dir, path, previous)
}

/// From `.crtool-leaving`.
fn move_back(dir: &OwnedFd, path: &Path, leaving: &OwnedFd) -> Result<(), ImageError> {
    let names = names_in(leaving.as_fd()).map_err(|e| io_error("list", &path.join(LEAVING), e))?;
    let names: BTreeSet<String> = names.into_iter().filter(|name| name != "." && name != "..").collect();
    move_all(leaving, dir, path, inventory_first(&names).rev())?;
    rmdir(dir, path, LEAVING)
}

/// Removes these files from `dir`, as far as they are there, the inventory first.
fn unlink_all(dir: &OwnedFd, path: &Path, names: &BTreeSet<String>) -> Result<(), ImageError> {
    for name in inventory_first(names) {
        unlink(dir, path, name)?;
    }
    Ok(())
}

fn unlink(dir: impl AsFd, path: &Path, name: &str) -> Result<(), ImageError> {
    match step::next().and_then(|()| unlinkat(dir.as_fd(), name, UnlinkatFlags::NoRemoveDir)) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(io_error("remove", &path.join(name), e)),
    }
}

fn rmdir(dir: &OwnedFd, path: &Path, name: &str) -> Result<(), ImageError> {
    match step::next().and_then(|()| unlinkat(dir, name, UnlinkatFlags::RemoveDir)) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(io_error("remove", &path.join(name), e)),
    }
}

/// Removes the files in a directory of ours.
fn empty(dir: impl AsFd, path: &Path) -> Result<(), ImageError> {
    for name in names_in(dir.as_fd()).map_err(|e| io_error("list", path, e))? {
        if name != "." && name != ".." {
            unlink(dir.as_fd(), path, &name)?;
        }
    }
    Ok(())
}

fn remove(dir: &OwnedFd, path: &Path, name: &str, opened: &OwnedFd) -> Result<(), ImageError> {
    empty(opened, &path.join(name))?;
    rmdir(dir, path, name)
}

/// Brings the images `made` in `dir`, and that they are there, to disk.
pub(super) fn sync(dir: &OwnedFd, path: &Path, made: &BTreeSet<String>) -> Result<(), ImageError> {
    let failed =
        |path: &Path, source| ImageError::Io { action: "bring to disk", path: path.to_owned(), source };
    if made.len() > MOST_ALONE {
        return syncfs(dir).map_err(|e| failed(path, e.into()));
    }
    for name in made {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match openat(dir, name.as_str(), flags, Mode::empty()) {
            Ok(image) => {
                File::from(image).sync_data().map_err(|source| failed(&path.join(name), source))?;
            }
            // The link to the parent.
            Err(Errno::ELOOP) => {}
            Err(e) => return Err(failed(&path.join(name), e.into())),
        }
    }
    sync_dir(dir, path)
}

/// Brings the names in `dir` to disk.
pub(super) fn sync_dir(dir: &OwnedFd, path: &Path) -> Result<(), ImageError> {
    match nix::unistd::fsync(dir) {
        // Not every file system has it for directories.
        Ok(()) | Err(Errno::EINVAL | Errno::EROFS) => Ok(()),
        Err(e) => Err(io_error("bring to disk", path, e)),
    }
}

/// An error, and beside it that what it left could not be undone.
fn after(error: ImageError, undone: Result<(), ImageError>) -> ImageError {
    if let Err(second) = undone {
        tracing::warn!("{:#}", anyhow::Error::from(second));
    }
    error
}

/// Comes before each change to a directory. Only a test makes it fail.
mod step {
    #[cfg(not(test))]
    #[allow(clippy::unnecessary_wraps)] // as in tests
    pub(super) fn next() -> Result<(), nix::errno::Errno> {
        Ok(())
    }

    #[cfg(test)]
    pub(super) use super::super::tests::next;
}
