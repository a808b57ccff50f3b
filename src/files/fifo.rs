//! fifo(7): a pipe with a name.
//!
//! Saved: each description as a file with a path, the content and the capacity. Who else has the fifo open is not looked at:
//! its name is for meeting strangers. If they have kept the content alive meanwhile, it is left as it is.
//!
//! A reader that was opened without waiting, and to whom no writer has come yet, does not see a hang-up (POLLHUP), though
//! nobody holds the other end; one whose writers have left does. The kernel decides that when it is opened. So all
//! descriptions of a fifo are opened together, in two steps: first those that have met a writer, while an end for both ways is
//! held, so that none of them waits for another; then, with no writer there, the others.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::fstat,
};

use super::{
    DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, flags, fown,
    kind::packed_in,
    pipe_data::{self, Content, DataWriter, Need},
    regular,
};
use crate::{
    image::{ImageKind, pb},
    sys::{Errno, pipe},
    view,
};

const ACCESS: u32 = libc::O_ACCMODE.cast_unsigned();
const READ: u32 = libc::O_RDONLY.cast_unsigned();
const BOTH: u32 = libc::O_RDWR.cast_unsigned();
const WRITE: u32 = libc::O_WRONLY.cast_unsigned();
const DIRECT: u32 = libc::O_DIRECT.cast_unsigned();

/// An end of a fifo.
#[derive(Debug)]
pub(super) struct Fifo;

#[derive(Debug, Default)]
struct Dumped {
    ids: HashMap<(u64, u64), u32>,
    saved: Vec<u32>,
    image: DataWriter,
}

#[derive(Debug, Default)]
struct Restored {
    /// Before there are images: what contents need.
    needs: BTreeMap<u32, Need>,
    contents: Option<BTreeMap<u32, Content>>,
    /// Descriptions that were opened, by entry, until it takes them.
    opened: HashMap<u32, OwnedFd>,
    /// Keeps fifos and what is in them until their entries have all that they need.
    kept: HashMap<u32, OwnedFd>,
}

impl FileKind for Fifo {
    type Entry = pb::FifoEntry;
    const NAME: &'static str = "fifo";
    const TYPE: pb::FdTypes = pb::FdTypes::Fifo;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.stat.kind() == libc::S_IFIFO
            && fd.link.first() == Some(&b'/')
            && fd.flags() & libc::O_PATH.cast_unsigned() == 0
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let regf_id = regular::add_path_of(cx, fd)?;
        let (store, frozen) = (cx.store, cx.frozen);
        let dumped = cx.state::<Dumped>();
        let pipe_id = dumped.id_of((fd.stat.dev, fd.stat.ino));
        let readable = fd.flags() & ACCESS != WRITE;
        if frozen && readable && !dumped.saved.contains(&pipe_id) {
            dumped.saved.push(pipe_id);
            dumped.image.dump(store, ImageKind::FifoData, pipe_id, fd.file()?, true)?;
        }
        let no_writer_yet = (fd.flags() & ACCESS == READ && no_writer_yet(fd.file()?)?).then_some(true);
        Ok(pb::FifoEntry { id, pipe_id, regf_id: Some(regf_id), no_writer_yet })
    }

    fn finish_dump(cx: &mut DumpCx<'_>) -> Result<(), FileError> {
        cx.state::<Dumped>().image.finish()
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        if let Some(fd) = cx.state::<Restored>().opened.remove(&entry.id) {
            return Ok(Opened::Now(fd));
        }
        let mut all: Vec<pb::FifoEntry> =
            cx.entries.values().filter_map(|file| file.fifo.as_deref().copied()).collect();
        all.retain(|other| other.pipe_id == entry.pipe_id && other.id != entry.id);
        all.push(*entry);
        all.sort_unstable_by_key(|entry| entry.id);
        open_all(cx, &all)?;
        let fd = cx.state::<Restored>().opened.remove(&entry.id);
        fd.map(Opened::Now).ok_or_else(|| FileError::entry(entry.id, "it is there twice"))
    }

    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError> {
        let need = cx.state::<Restored>().needs.get(&entry.pipe_id).copied();
        need.map_or(Ok(()), Need::try_out)?;
        regular::would_find(cx, entry.regf_id.unwrap_or(entry.id))
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        entry: &Self::Entry,
        fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        cx.state::<Restored>().kept.clear();
        // Its flags and owner are those of the entry that has its path.
        let path = cx.regular_entry(entry.regf_id.unwrap_or(entry.id))?;
        fown::apply(fd, &path.fown)
    }

    fn fown(_entry: &Self::Entry) -> Option<&pb::FownEntry> {
        None
    }

    packed_in!(fifo);
}

/// Tells a restore that is only tried what the dump has met.
pub(super) fn hand_over(from: &mut DumpCx<'_>, to: &mut RestoreCx<'_>) {
    to.state::<Restored>().needs = from.state::<Dumped>().image.needs();
}

impl Dumped {
    /// The inode number, as in CRIU's images, unless a fifo of another device has it.
    fn id_of(&mut self, inode: (u64, u64)) -> u32 {
        if let Some(id) = self.ids.get(&inode) {
            return *id;
        }
        let mut id = u32::try_from(inode.1 & u64::from(u32::MAX)).unwrap_or_default();
        while self.ids.values().any(|taken| *taken == id) {
            id = id.wrapping_add(1);
        }
        self.ids.insert(inode, id);
        id
    }
}

/// Whether a reader waits for its first writer: it sees no hang-up, though no writer is there.
fn no_writer_yet(reader: BorrowedFd<'_>) -> Result<bool, FileError> {
    let mut fds = [PollFd::new(reader, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).map_err(FileError::sys("poll a fifo"))?;
    let seen = fds.iter().filter_map(PollFd::revents).fold(PollFlags::empty(), |all, some| all | some);
    if seen.contains(PollFlags::POLLHUP) {
        return Ok(false);
    }
    if pipe::readable_bytes(reader).map_err(FileError::sys("read the amount in a fifo"))? > 0 {
        // Somebody has written. Whether they are still there cannot be seen without reading; they nearly always are.
        return Ok(false);
    }
    // Copying from an empty one is over at once without a writer, and has to wait with one.
    let (_read, write) = pipe::pipe2(libc::O_CLOEXEC).map_err(FileError::sys("make a pipe"))?;
    match pipe::tee(reader, write.as_fd(), 1) {
        Ok(copied) => Ok(copied == 0),
        Err(Errno::EAGAIN) => Ok(false),
        Err(e) => Err(FileError::sys("look for the writers of a fifo (tee)")(e)),
    }
}

/// Opens the descriptions of one fifo.
fn open_all(cx: &mut RestoreCx<'_>, entries: &[pb::FifoEntry]) -> Result<(), FileError> {
    let (early, late): (Vec<&pb::FifoEntry>, Vec<&pb::FifoEntry>) =
        entries.iter().partition(|entry| entry.no_writer_yet != Some(true));
    let mut both = None;
    for entry in early.into_iter().chain(late) {
        let path_id = entry.regf_id.unwrap_or(entry.id);
        let wanted = cx.regular_entry(path_id)?.flags;
        let object = regular::path_of(cx, path_id)?;
        let kind = fstat(&object).map_err(FileError::sys("stat a fifo"))?.st_mode & libc::S_IFMT;
        if kind != libc::S_IFIFO {
            return Err(FileError::entry(entry.id, "there is no fifo at its path"));
        }
        if !cx.state::<Restored>().kept.contains_key(&entry.pipe_id) {
            let end = reopen(&object, BOTH)?;
            fill(cx, entry.pipe_id, &end, wanted & DIRECT != 0)?;
            let reader = reopen(&object, READ)?;
            cx.state::<Restored>().kept.insert(entry.pipe_id, reader);
            both = Some(end);
        }
        if entry.no_writer_yet == Some(true) {
            if wanted & ACCESS != READ {
                return Err(FileError::entry(entry.id, "only a reader can wait for its first writer"));
            }
            both = None;
        }
        let fd = reopen(&object, wanted & ACCESS)?;
        flags::apply(&fd, wanted)?;
        cx.state::<Restored>().opened.insert(entry.id, fd);
    }
    drop(both);
    Ok(())
}

/// Gives a fifo its capacity and content.
fn fill(cx: &mut RestoreCx<'_>, pipe_id: u32, end: &OwnedFd, packets: bool) -> Result<(), FileError> {
    let store = cx.store;
    let state = cx.state::<Restored>();
    let contents = match &mut state.contents {
        Some(contents) => contents,
        none => none.insert(pipe_data::read(store, ImageKind::FifoData)?),
    };
    let Some(content) = contents.remove(&pipe_id) else { return Ok(()) };
    if content.is_in(end.as_fd())? { content.resize(end) } else { content.fill(end, packets) }
}

fn reopen(object: &OwnedFd, access: u32) -> Result<OwnedFd, FileError> {
    // Never waits: an end for both ways is open, or is what is being opened, or it is a reader, which need not.
    let flags = OFlag::from_bits_retain(access.cast_signed()) | OFlag::O_NONBLOCK;
    view::reopen(object.as_fd(), flags).map_err(FileError::sys("open a fifo"))
}

#[cfg(test)]
mod tests {
    use nix::{errno::Errno, fcntl::open, sys::stat::Mode};

    use super::super::tests::Cycle;
    use super::*;

    fn at(path: &std::path::Path, flags: i32) -> OwnedFd {
        open(path, OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
    }

    fn read(fd: &OwnedFd) -> Vec<u8> {
        let mut buffer = vec![0; 100];
        let len = nix::unistd::read(fd, &mut buffer).unwrap();
        buffer.truncate(len);
        buffer
    }

    #[test]
    fn both_ends_and_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let reader = at(&path, libc::O_RDONLY | libc::O_NONBLOCK);
        let writer = at(&path, libc::O_WRONLY);
        nix::unistd::write(&writer, b"left in it").unwrap();
        let again = Cycle::new().run(vec![reader, writer], || {});
        assert_eq!(read(&again[0]), b"left in it");
        assert_eq!(nix::unistd::read(&again[0], &mut [0; 10]).unwrap_err(), Errno::EAGAIN);
        nix::unistd::write(&again[1], b"more").unwrap();
        assert_eq!(read(&again[0]), b"more");
    }

    #[test]
    fn one_end_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let both = at(&path, libc::O_RDWR);
        let writer = at(&path, libc::O_WRONLY);
        drop(both);
        let again = Cycle::new().run(vec![writer], || {});
        assert_eq!(nix::unistd::write(&again[0], b"x").unwrap_err(), Errno::EPIPE);
        let reader = at(&path, libc::O_RDONLY | libc::O_NONBLOCK);
        drop(again);
        let again = Cycle::new().run(vec![reader], || {});
        assert_eq!(nix::unistd::read(&again[0], &mut [0; 10]).unwrap(), 0);
    }

    fn hung_up(fd: &OwnedFd) -> bool {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap();
        fds[0].revents().unwrap().contains(PollFlags::POLLHUP)
    }

    /// A reader sees a hang-up only when it has met a writer; all ways to open it, one beside the other.
    #[test]
    fn readers_before_and_after_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let reader = || at(&path, libc::O_RDONLY | libc::O_NONBLOCK);
        let left = reader();
        drop(at(&path, libc::O_WRONLY));
        let waiting = reader();
        assert_eq!((hung_up(&left), hung_up(&waiting)), (true, false));
        let again = Cycle::new().run(vec![waiting, left], || {});
        assert_eq!((hung_up(&again[1]), hung_up(&again[0])), (true, false));
        assert_eq!(nix::unistd::read(&again[0], &mut [0; 10]), Ok(0));
        let writer = at(&path, libc::O_WRONLY | libc::O_NONBLOCK);
        nix::unistd::write(&writer, b"first").unwrap();
        assert_eq!(read(&again[0]), b"first");
        drop(writer);
        assert!(hung_up(&again[0]));
        // With a writer in the tree nobody waits for the first.
        let writer = at(&path, libc::O_WRONLY);
        let mut again = Cycle::new().run(vec![again.into_iter().next().unwrap(), writer, reader()], || {});
        assert!(!hung_up(&again[0]) && !hung_up(&again[2]));
        again.remove(1);
        assert!(hung_up(&again[0]) && hung_up(&again[1]));
    }

    #[test]
    fn capacity_of_an_empty_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        for flags in [libc::O_RDONLY | libc::O_NONBLOCK, libc::O_RDWR] {
            let end = at(&path, flags);
            pipe::set_capacity(end.as_fd(), 1 << 18).unwrap();
            let again = Cycle::new().run(vec![end], || {});
            assert_eq!(pipe::capacity(again[0].as_fd()), Ok(1 << 18));
        }
    }

    #[test]
    fn a_file_in_its_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let cycle = Cycle::new();
        let end = at(&path, libc::O_RDWR);
        assert_eq!(cycle.dump(&[&end]).unwrap(), []);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"").unwrap();
        let error = format!("{:#}", anyhow::Error::from(cycle.restore().unwrap_err()));
        assert!(error.contains("is a regular file now, but was a fifo"), "{error}");
    }

    #[test]
    fn content_that_was_kept_alive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let both = at(&path, libc::O_RDWR | libc::O_NONBLOCK);
        nix::unistd::write(&both, b"once").unwrap();
        let stranger = at(&path, libc::O_RDWR);
        let again = Cycle::new().run(vec![both], || {});
        assert_eq!(read(&again[0]), b"once");
        assert_eq!(nix::unistd::read(&again[0], &mut [0; 10]).unwrap_err(), Errno::EAGAIN);
        drop(stranger);
    }

    #[test]
    fn a_deleted_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let both = at(&path, libc::O_RDWR);
        nix::unistd::write(&both, b"ghost").unwrap();
        std::fs::remove_file(&path).unwrap();
        let again = Cycle::new().run(vec![both], || {});
        assert_eq!(read(&again[0]), b"ghost");
        assert!(!path.exists());
    }
}
