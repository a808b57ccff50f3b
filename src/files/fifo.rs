//! fifo(7): a pipe with a name.
//!
//! Saved: each description as a file with a path, and the content. Ends are opened while an end for both ways is held, so none
//! waits for the other; that one goes before the tasks run. Who else has the fifo open is not looked at: its name is for
//! meeting strangers. If they have kept the content alive meanwhile, it is left as it is.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use super::{
    DumpCx, FdView, FileError, FileKind, Opened, RestoreCx, flags, fown,
    kind::packed_in,
    pipe_data::{self, Content, DataWriter},
    regular,
};
use crate::image::{ImageKind, pb};

const ACCESS: u32 = libc::O_ACCMODE.cast_unsigned();
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
    contents: Option<BTreeMap<u32, Content>>,
    /// Descriptions for both ways.
    held: HashMap<u32, OwnedFd>,
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
        if frozen && fd.flags() & ACCESS != WRITE && !dumped.saved.contains(&pipe_id) {
            dumped.saved.push(pipe_id);
            dumped.image.dump(store, ImageKind::FifoData, pipe_id, fd.file()?, true)?;
        }
        Ok(pb::FifoEntry { id, pipe_id, regf_id: Some(regf_id) })
    }

    fn finish_dump(cx: &mut DumpCx<'_>) -> Result<(), FileError> {
        cx.state::<Dumped>().image.finish()
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        let path_id = entry.regf_id.unwrap_or(entry.id);
        let wanted = cx.regular_entry(path_id)?.flags;
        let object = regular::path_of(cx, path_id)?;
        let store = cx.store;
        let state = cx.state::<Restored>();
        if !state.held.contains_key(&entry.pipe_id) {
            let both = reopen(&object, libc::O_RDWR.cast_unsigned())?;
            let contents = match &mut state.contents {
                Some(contents) => contents,
                none => none.insert(pipe_data::read(store, ImageKind::FifoData)?),
            };
            if let Some(content) = contents.remove(&entry.pipe_id)
                && !content.is_in(both.as_fd())?
            {
                content.fill(&both, wanted & DIRECT != 0)?;
            }
            state.held.insert(entry.pipe_id, both);
        }
        let fd = reopen(&object, wanted & ACCESS)?;
        flags::apply(&fd, wanted)?;
        Ok(Opened::Now(fd))
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        entry: &Self::Entry,
        fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        cx.state::<Restored>().held.clear();
        // Its flags and owner are those of the entry that has its path.
        let path = cx.regular_entry(entry.regf_id.unwrap_or(entry.id))?;
        fown::apply(fd, &path.fown)
    }

    fn fown(_entry: &Self::Entry) -> Option<&pb::FownEntry> {
        None
    }

    packed_in!(fifo);
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

fn reopen(object: &OwnedFd, access: u32) -> Result<OwnedFd, FileError> {
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    // Never waits: an end for both ways is open, or is what is being opened.
    let flags = OFlag::from_bits_retain(access.cast_signed()) | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    open(path.as_str(), flags, Mode::empty()).map_err(FileError::sys("open a fifo"))
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

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
