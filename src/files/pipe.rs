//! pipe(2): two ends, a queue of bytes or packets between them.
//!
//! Saved: flags of each end, capacity, content. An end that nobody holds is not made again, so end of file and EPIPE come as
//! before. A pipe whose other end is held outside the tree only is not ours: it is refused unless named `--external
//! pipe[INODE]`; at restore `--inherit-fd fd[N]:pipe[INODE]` gives its replacement.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
};

use super::{
    DumpCx, DumpTables, FdView, FileError, FileKind, Opened, Place, RestoreCx, external, flags,
    kind::packed_in,
    pipe_data::{self, Content, DataWriter, Need},
};
use crate::{
    image::{ImageKind, Store, pb},
    settings::{DumpSettings, RestoreSettings},
    sys, view,
};

const ACCESS: u32 = libc::O_ACCMODE.cast_unsigned();
const READ: u32 = libc::O_RDONLY.cast_unsigned();
const WRITE: u32 = libc::O_WRONLY.cast_unsigned();
const DIRECT: u32 = libc::O_DIRECT.cast_unsigned();
/// In the flags of a description that was opened by a path (/proc/self/fd/N), not by pipe(2).
const BY_PATH: u32 = 0o100_000;

/// An end of a pipe.
#[derive(Debug)]
pub(super) struct Pipe;

/// A pipe met at dump.
#[derive(Debug, Default)]
struct Met {
    /// A description that reads, one that writes, was seen.
    read: bool,
    write: bool,
    /// Somebody, seen or not, holds the end that the first description is not.
    other_end: bool,
    saved: bool,
}

#[derive(Debug, Default)]
struct Dumped {
    pipes: HashMap<u32, Met>,
    image: DataWriter,
}

/// A pipe made at restore: the ends that no entry has taken yet, and one that stays to open more by.
#[derive(Debug)]
struct Made {
    read: Option<OwnedFd>,
    write: Option<OwnedFd>,
    any: OwnedFd,
}

#[derive(Debug, Default)]
struct Restored {
    /// Before there are images: what contents need.
    needs: BTreeMap<u32, Need>,
    contents: Option<BTreeMap<u32, Content>>,
    pipes: HashMap<u32, Made>,
}

impl FileKind for Pipe {
    type Entry = pb::PipeEntry;
    const NAME: &'static str = "pipe";
    const TYPE: pb::FdTypes = pb::FdTypes::Pipe;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.stat.kind() == libc::S_IFIFO
            && fd.link.starts_with(b"pipe:[")
            && fd.flags() & libc::O_PATH.cast_unsigned() == 0
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let pipe_id = u32::try_from(fd.stat.ino)
            .map_err(|_| FileError::unsupported("its inode number is larger than 32 bits", ""))?;
        let (store, frozen, file) = (cx.store, cx.frozen, fd.file()?);
        let access = fd.flags() & ACCESS;
        let dumped = cx.state::<Dumped>();
        let met = dumped.pipes.entry(pipe_id).or_default();
        if !met.read && !met.write {
            if sys::pipe::has_watch_queue(file) {
                return Err(FileError::unsupported(
                    "it is a notification pipe (O_NOTIFICATION_PIPE): what it watches cannot be read",
                    "",
                ));
            }
            met.other_end = has_other_end(file, access)?;
        }
        met.read |= access != WRITE;
        met.write |= access != READ;
        if met.read && !met.saved && frozen {
            met.saved = true;
            dumped.image.dump(store, ImageKind::PipesData, pipe_id, file, true)?;
        }
        if access == WRITE && !met.other_end && !met.saved && frozen {
            met.saved = true;
            dumped.save_unread(store, pipe_id, file)?;
        }
        Ok(pb::PipeEntry { id, pipe_id, flags: fd.flags(), fown: fd.fown()? })
    }

    fn complete(
        cx: &mut DumpCx<'_>,
        _tables: &DumpTables,
        entry: &mut Self::Entry,
        _at: Place,
    ) -> Result<(), FileError> {
        let settings = cx.settings;
        let met = cx.state::<Dumped>().pipes.entry(entry.pipe_id).or_default();
        if met.other_end && !(met.read && met.write) && !is_external(settings, entry.pipe_id) {
            let end = if met.read { "write" } else { "read" };
            let ino = entry.pipe_id;
            return Err(FileError::unsupported(
                format!("the {end} end of the pipe is held by a process outside the tree"),
                format!(
                    "dump with --external pipe[{ino}] and restore with --inherit-fd fd[N]:pipe[{ino}], or dump a tree that holds both ends"
                ),
            ));
        }
        Ok(())
    }

    fn finish_dump(cx: &mut DumpCx<'_>) -> Result<(), FileError> {
        cx.state::<Dumped>().image.finish()
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        if entry.flags & ACCESS == ACCESS {
            return Err(FileError::entry(entry.id, "no such access mode"));
        }
        let (store, settings) = (cx.store, cx.settings);
        if entry.flags & ACCESS == READ {
            pipe_data::must_exist(store, ImageKind::PipesData)?;
        }
        let state = cx.state::<Restored>();
        let contents = match &mut state.contents {
            Some(contents) => contents,
            none => none.insert(pipe_data::read(store, ImageKind::PipesData)?),
        };
        let made = match state.pipes.entry(entry.pipe_id) {
            std::collections::hash_map::Entry::Occupied(made) => made.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let made = match inherited(settings, entry.pipe_id)? {
                    Some(any) => Made { read: None, write: None, any },
                    None => Made::new()?,
                };
                if let Some(content) = contents.remove(&entry.pipe_id) {
                    let write = match &made.write {
                        Some(write) => write.try_clone().map_err(|e| pipe_data::io_error("duplicate", &e))?,
                        None => reopen(&made.any, WRITE)?,
                    };
                    content.fill(&write, entry.flags & DIRECT != 0)?;
                }
                place.insert(made)
            }
        };
        let taken = match entry.flags & (ACCESS | BY_PATH) {
            READ => made.read.take(),
            WRITE => made.write.take(),
            _ => None,
        };
        let fd = match taken {
            Some(fd) => fd,
            None => reopen(&made.any, entry.flags & ACCESS)?,
        };
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError> {
        let need = cx.state::<Restored>().needs.get(&entry.pipe_id).copied();
        need.map_or(Ok(()), Need::try_out)
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        _entry: &Self::Entry,
        _fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        // Ends that nobody took close here; that is what their absence means.
        cx.state::<Restored>().pipes.clear();
        Ok(())
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(pipe);
}

/// Tells a restore that is only tried what the dump has met.
pub(super) fn hand_over(from: &mut DumpCx<'_>, to: &mut RestoreCx<'_>) {
    to.state::<Restored>().needs = from.state::<Dumped>().image.needs();
}

impl Dumped {
    /// Saves a pipe that nobody can read from. Its content is of use only to who opens it anew through /proc, as is done
    /// here: for a moment it has a reader, while its writers are frozen.
    fn save_unread(&mut self, store: &dyn Store, pipe_id: u32, end: BorrowedFd<'_>) -> Result<(), FileError> {
        let there = sys::pipe::readable_bytes(end).map_err(FileError::sys("read the amount in a pipe"))?;
        if there == 0 {
            // It has a capacity all the same.
            return self.image.dump(store, ImageKind::PipesData, pipe_id, end, false);
        }
        let path = format!("/proc/self/fd/{}", end.as_raw_fd());
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let reader =
            open(path.as_str(), flags, Mode::empty()).map_err(FileError::sys("open a pipe once more"))?;
        self.image.dump(store, ImageKind::PipesData, pipe_id, reader.as_fd(), true)
    }
}

impl Made {
    fn new() -> Result<Self, FileError> {
        let (read, write) = sys::pipe::pipe2(libc::O_CLOEXEC).map_err(FileError::sys("make a pipe"))?;
        // O_PATH: keeps the pipe, but is no end of it.
        let path = format!("/proc/self/fd/{}", read.as_raw_fd());
        let any = open(path.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(FileError::sys("open a pipe by its path"))?;
        Ok(Self { read: Some(read), write: Some(write), any })
    }
}

/// One more description of a pipe.
fn reopen(any: &OwnedFd, access: u32) -> Result<OwnedFd, FileError> {
    let path = format!("/proc/self/fd/{}", any.as_raw_fd());
    let flags = OFlag::from_bits_retain(access.cast_signed()) | OFlag::O_CLOEXEC;
    open(path.as_str(), flags, Mode::empty()).map_err(FileError::sys("open a pipe once more"))
}

/// Whether the end that `file` is not is open somewhere.
fn has_other_end(file: BorrowedFd<'_>, access: u32) -> Result<bool, FileError> {
    let gone = match access {
        READ => PollFlags::POLLHUP,
        WRITE => PollFlags::POLLERR,
        _ => return Ok(true),
    };
    let mut fds = [PollFd::new(file, PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).map_err(FileError::sys("poll a pipe"))?;
    Ok(!fds.iter().any(|fd| fd.revents().is_some_and(|events| events.contains(gone))))
}

/// The user's names for a pipe: as the manual has it, and as /proc shows it.
fn keys(pipe_id: u32) -> [Vec<u8>; 2] {
    [format!("pipe[{pipe_id}]").into_bytes(), format!("pipe:[{pipe_id}]").into_bytes()]
}

fn is_external(settings: &DumpSettings, pipe_id: u32) -> bool {
    settings.common.externals.iter().any(|external| keys(pipe_id).contains(&external.key))
}

fn inherited(settings: &RestoreSettings, pipe_id: u32) -> Result<Option<OwnedFd>, FileError> {
    let Some(given) = settings.inherit_fds.iter().find(|given| keys(pipe_id).contains(&given.key)) else {
        return Ok(None);
    };
    let end = external::duplicate(given, Some(libc::S_IFIFO))?;
    view::reopen(end.as_fd(), OFlag::O_PATH)
        .map(Some)
        .map_err(FileError::sys("open a pipe that was inherited"))
}

#[cfg(test)]
mod tests {
    use super::super::trial::Trial;
    use super::*;
    use crate::settings::{External, InheritFd};
    use std::{
        fs::File,
        io::{Read, Write},
    };

    fn pair(flags: i32) -> (OwnedFd, OwnedFd) {
        sys::pipe::pipe2(libc::O_CLOEXEC | flags).unwrap()
    }

    /// Dumps both ends, makes them again.
    fn again(trial: &mut Trial, ends: &[&OwnedFd]) -> Vec<OwnedFd> {
        let entries: Vec<_> = ends.iter().map(|fd| trial.dump::<Pipe>(fd)).collect();
        for entry in &entries {
            trial.complete::<Pipe>(entry).unwrap();
        }
        trial.finish::<Pipe>().unwrap();
        let entries: Vec<_> = entries.iter().collect();
        trial.try_restore::<Pipe>(&entries).unwrap()
    }

    fn all(fd: OwnedFd) -> Vec<u8> {
        let mut bytes = Vec::new();
        File::from(fd).read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn content_capacity_flags() {
        let (read, write) = pair(libc::O_NONBLOCK);
        sys::pipe::set_capacity(read.as_fd(), 1 << 20).unwrap();
        let content: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251) as u8).collect();
        File::from(write.try_clone().unwrap()).write_all(&content).unwrap();
        let mut restored = again(&mut Trial::new(), &[&write, &read]);
        let (new_read, new_write) = (restored.pop().unwrap(), restored.pop().unwrap());
        assert_eq!(sys::pipe::capacity(new_read.as_fd()).unwrap(), 1 << 20);
        let full = nix::unistd::write(&new_write, b"x").unwrap_err();
        assert_eq!(full, nix::errno::Errno::EAGAIN);
        drop(new_write);
        assert!(all(new_read) == content);
        drop(write);
        assert!(all(read) == content, "the source lost its content");
    }

    #[test]
    fn packets_keep_their_borders() {
        let (read, write) = pair(libc::O_DIRECT);
        for piece in [&b"ab"[..], b"c", &[7; 4096]] {
            nix::unistd::write(&write, piece).unwrap();
        }
        let restored = again(&mut Trial::new(), &[&read, &write]);
        let mut buffer = [0; 8192];
        for len in [2, 1, 4096] {
            assert_eq!(nix::unistd::read(&restored[0], &mut buffer).unwrap(), len);
            assert_eq!(nix::unistd::read(&read, &mut buffer).unwrap(), len);
        }
        let (read, write) = pair(libc::O_DIRECT);
        nix::unistd::write(&write, b"abc").unwrap();
        let restored = again(&mut Trial::new(), &[&write, &read]);
        nix::unistd::write(&restored[0], b"def").unwrap();
        assert_eq!(nix::unistd::read(&restored[1], &mut buffer).unwrap(), 3);
        assert_eq!(nix::unistd::read(&restored[1], &mut buffer).unwrap(), 3);
    }

    #[test]
    fn a_closed_end_stays_closed() {
        let (read, write) = pair(0);
        nix::unistd::write(&write, b"last words").unwrap();
        drop(write);
        let mut restored = again(&mut Trial::new(), &[&read]);
        assert_eq!(all(restored.remove(0)), b"last words");
        assert_eq!(all(read), b"last words");

        let (read, write) = pair(0);
        nix::unistd::write(&write, b"unread").unwrap();
        drop(read);
        let restored = again(&mut Trial::new(), &[&write]);
        assert_eq!(nix::unistd::write(&restored[0], b"x").unwrap_err(), nix::errno::Errno::EPIPE);
        assert_eq!(sys::pipe::readable_bytes(restored[0].as_fd()).unwrap(), 6);
        assert_eq!(nix::unistd::write(&write, b"x").unwrap_err(), nix::errno::Errno::EPIPE);
    }

    #[test]
    fn descriptions_opened_by_path() {
        let (read, write) = pair(0);
        let both = reopen(&read, libc::O_RDWR.cast_unsigned()).unwrap();
        nix::unistd::write(&write, b"data").unwrap();
        let mut trial = Trial::new();
        let restored = again(&mut trial, &[&both, &read, &write]);
        let flags: Vec<_> = restored.iter().map(|fd| trial.dump::<Pipe>(fd).flags).collect();
        let want: Vec<_> = [&both, &read, &write].map(|fd| trial.dump::<Pipe>(fd).flags).to_vec();
        assert_eq!(flags, want);
        let mut buffer = [0; 64];
        assert_eq!(nix::unistd::read(&restored[0], &mut buffer).unwrap(), 4);
    }

    #[test]
    fn held_outside() {
        let (read, write) = pair(0);
        let mut trial = Trial::new();
        let entry = trial.dump::<Pipe>(&read);
        let error = trial.complete::<Pipe>(&entry).unwrap_err();
        assert!(
            error.to_string().contains("the write end of the pipe is held by a process outside"),
            "{error}"
        );
        trial
            .dump_settings
            .common
            .externals
            .push(External { key: format!("pipe[{}]", entry.pipe_id).into_bytes(), value: None });
        trial.complete::<Pipe>(&entry).unwrap();
        nix::unistd::write(&write, b"never dumped").unwrap();

        let (other_read, other_write) = pair(0);
        let key = format!("pipe:[{}]", entry.pipe_id).into_bytes();
        trial.restore_settings.inherit_fds.push(InheritFd { key, fd: other_read.as_raw_fd() });
        trial.finish::<Pipe>().unwrap();
        let again = trial.restore::<Pipe>(&entry);
        nix::unistd::write(&other_write, b"new").unwrap();
        drop(other_write);
        assert_eq!(all(again), b"new");
    }

    #[test]
    fn only_a_pipe_stands_for_a_pipe() {
        let (read, _write) = pair(0);
        let mut trial = Trial::new();
        let entry = trial.dump::<Pipe>(&read);
        trial.finish::<Pipe>().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("f")).unwrap();
        let null = File::open("/dev/null").unwrap();
        let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
        let key = format!("pipe:[{}]", entry.pipe_id).into_bytes();
        for (fd, what) in [
            (file.as_raw_fd(), "is a regular file, but a fifo is wanted"),
            (null.as_raw_fd(), "is a character device, but a fifo is wanted"),
            (socket.as_raw_fd(), "is a socket, but a fifo is wanted"),
            (1 << 20, "--inherit-fd fd[1048576]"),
        ] {
            trial.restore_settings.inherit_fds = vec![InheritFd { key: key.clone(), fd }];
            let error = trial.try_restore::<Pipe>(&[&entry]).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn capacities_of_empty_pipes() {
        let (read, write) = pair(0);
        sys::pipe::set_capacity(read.as_fd(), 1 << 18).unwrap();
        let restored = again(&mut Trial::new(), &[&read, &write]);
        assert_eq!(sys::pipe::capacity(restored[0].as_fd()), Ok(1 << 18));
        drop(read);
        let restored = again(&mut Trial::new(), &[&write]);
        assert_eq!(sys::pipe::capacity(restored[0].as_fd()), Ok(1 << 18));
    }

    #[test]
    fn content_that_does_not_fit() {
        let (_read, write) = pair(0);
        let content = Content::of(vec![vec![1; 100_000]]);
        assert!(content.fill(&write, false).is_err());
    }
}
