//! The bytes of one image in memory.
//!
//! Small images live on the heap, so that a hundred thousand of them need no descriptor each; larger ones live in
//! a file of a tmpfs that is mounted nowhere, which also is what a reader gets. It is like a memfd, but for its
//! larger pages: a write allocates pages as large as itself, which takes a fifth of the time of one after the other,
//! and giving them back takes next to none. Where such a tmpfs cannot be had it is a memfd. Bytes come through a
//! buffer and pwrite(2): for 1 GiB over loopback that had 1.2 to 1.4 times the throughput of receiving into a mapping
//! of a memfd, whose page faults and zeroed pages cost more than the second copy out of a warm cache. Zeros are holes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;

use nix::fcntl::{FallocateFlags, OFlag, fallocate, openat};
use nix::sys::stat::Mode;

use crate::proc::status;
use crate::sys;

/// Images up to this many bytes stay on the heap.
pub(super) const SMALL: u64 = 64 << 10;
const PAGE: u64 = 4096;
const CAP_SYS_ADMIN: u64 = 1 << 21;
/// The largest page that a write may allocate.
const HUGE: u64 = 2 << 20;

/// An image that grows at its end.
#[derive(Debug)]
pub(super) struct Bytes {
    size: u64,
    /// Memory it takes, or is about to take.
    charged: u64,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Heap(Vec<u8>),
    File {
        file: File,
        /// Pages before this one are allocated or stay holes.
        pages: u64,
    },
}

/// Where images lie that are not small.
static LARGE: LazyLock<Option<OwnedFd>> = LazyLock::new(|| {
    let made = tmpfs();
    if let Err(e) = &made {
        tracing::debug!("images are kept in memfds: no tmpfs with large pages: {e}");
    }
    made.ok()
});

/// Makes what large images lie in, before the cache says that it is ready: who has the capability for it but runs under a
/// filter that kills for these calls is to end now, not at the first large image.
pub fn prepare() {
    LazyLock::force(&LARGE);
}

/// Without a limit of its own, as memfds have none.
fn tmpfs() -> io::Result<OwnedFd> {
    // A service without capabilities often has such a filter: it is not even asked for.
    let status = std::fs::read("/proc/self/status")?;
    let held = status::parse(&status).map_err(io::Error::other)?.cap_eff;
    if held & CAP_SYS_ADMIN == 0 {
        return Err(io::Error::other("it takes CAP_SYS_ADMIN"));
    }
    let fs = sys::tmpfs::begin()?;
    sys::tmpfs::set(fs.as_fd(), c"huge", c"within_size")?;
    sys::tmpfs::set(fs.as_fd(), c"size", c"0")?;
    sys::tmpfs::set(fs.as_fd(), c"nr_inodes", c"0")?;
    Ok(sys::tmpfs::mount(fs.as_fd())?)
}

/// Frees what a write has allocated of the hole that ends where the write began, both in bytes: to write the last page of
/// 2 MiB allocates all of them (Linux 6.18). A memfd has nothing there, and nothing is done.
fn keep_hole(file: &File, from: u64, to: u64) -> io::Result<()> {
    let from = from.next_multiple_of(PAGE).max(to / HUGE * HUGE);
    let to = to / PAGE * PAGE;
    if from < to {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed =
            |bytes: u64| i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
        fallocate(file, how, signed(from)?, signed(to - from)?)?;
    }
    Ok(())
}

fn unnamed(root: &OwnedFd) -> io::Result<File> {
    let how = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(File::from(openat(root, ".", how, Mode::S_IRUSR | Mode::S_IWUSR)?))
}

/// A file for an image that is not small.
fn large() -> io::Result<File> {
    LARGE.as_ref().map_or_else(memfd, unnamed)
}

fn memfd() -> io::Result<File> {
    let fd = sys::event::memfd(c"crtool-image", libc::MFD_CLOEXEC)?;
    Ok(File::from(fd))
}

impl Bytes {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self { size: 0, charged: 0, place: Place::Heap(Vec::new()) }
    }

    /// Bytes it has.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory it takes.
    pub(super) fn charged(&self) -> u64 {
        self.charged
    }

    /// Bytes of memory that `more` bytes of data will take beyond those it takes now.
    pub(super) fn cost(&self, more: u32) -> u64 {
        let end = self.size + u64::from(more);
        match self.place {
            Place::Heap(_) if end <= SMALL => u64::from(more),
            Place::Heap(_) => end.div_ceil(PAGE) * PAGE - self.charged,
            Place::File { pages, .. } => {
                end.div_ceil(PAGE).saturating_sub(pages.max(self.size / PAGE)) * PAGE
            }
        }
    }

    /// As [`Self::cost`], for zeros.
    pub(super) fn cost_of_zeros(&self, more: u32) -> u64 {
        match self.place {
            Place::Heap(_) if self.size + u64::from(more) <= SMALL => u64::from(more),
            // What is there moves into pages.
            Place::Heap(_) => self.size.div_ceil(PAGE) * PAGE - self.charged,
            Place::File { .. } => 0,
        }
    }

    /// From the heap into a file.
    fn spill(&mut self) -> io::Result<()> {
        if let Place::Heap(bytes) = &self.place {
            let file = large()?;
            file.write_all_at(bytes, 0)?;
            let pages = self.size.div_ceil(PAGE);
            self.charged = pages * PAGE;
            self.place = Place::File { file, pages };
        }
        Ok(())
    }

    /// Appends data.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let end = self.size + bytes.len() as u64;
        if end > SMALL {
            self.spill()?;
        }
        match &mut self.place {
            Place::Heap(heap) => {
                heap.extend_from_slice(bytes);
                self.charged += bytes.len() as u64;
            }
            Place::File { file, pages } => {
                file.write_all_at(bytes, self.size)?;
                keep_hole(file, *pages * PAGE, self.size)?;
                let after = end.div_ceil(PAGE);
                self.charged += after.saturating_sub((*pages).max(self.size / PAGE)) * PAGE;
                *pages = after;
            }
        }
        self.size = end;
        Ok(())
    }

    /// Appends zeros.
    pub(super) fn append_zeros(&mut self, len: u32) -> io::Result<()> {
        let end = self.size + u64::from(len);
        if end > SMALL {
            self.spill()?;
        }
        if let Place::Heap(heap) = &mut self.place {
            heap.resize(heap.len() + len as usize, 0);
            self.charged += u64::from(len);
        }
        self.size = end;
        Ok(())
    }

    /// All bytes have come.
    pub(super) fn end(&mut self) -> io::Result<()> {
        match &mut self.place {
            Place::Heap(heap) => heap.shrink_to_fit(),
            // The last of them may be a hole.
            Place::File { file, .. } => file.set_len(self.size)?,
        }
        Ok(())
    }

    /// A descriptor that reads it, with a position of its own, and cannot write it.
    pub(super) fn reader(&self) -> io::Result<OwnedFd> {
        let reopen = |file: &File| File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let file = match &self.place {
            Place::Heap(bytes) => {
                let file = memfd()?;
                file.write_all_at(bytes, 0)?;
                reopen(&file)?
            }
            Place::File { file, .. } => reopen(file)?,
        };
        Ok(file.into())
    }

    /// A descriptor for a reader that punches holes where it has read. `true`: into the image itself.
    pub(super) fn consumer(&self) -> io::Result<(OwnedFd, bool)> {
        Ok(match &self.place {
            Place::Heap(bytes) => {
                let file = memfd()?;
                file.write_all_at(bytes, 0)?;
                (file.into(), false)
            }
            Place::File { file, .. } => (file.try_clone()?.into(), true),
        })
    }

    /// Looks how much is left of an image that is being consumed; how much became free.
    pub(super) fn measure(&mut self) -> u64 {
        let Place::File { file, .. } = &self.place else { return 0 };
        let Ok(metadata) = file.metadata() else { return 0 };
        let freed = self.charged.saturating_sub(metadata.blocks() * 512);
        self.charged -= freed;
        freed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &Bytes) -> Vec<u8> {
        let file = File::from(bytes.reader().unwrap());
        let mut all = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    #[test]
    fn readers_cannot_write_and_have_their_own_position() {
        for size in [10, 100_000] {
            let mut bytes = Bytes::new();
            bytes.append(&vec![7; size]).unwrap();
            bytes.end().unwrap();
            let (mut a, mut b) = (File::from(bytes.reader().unwrap()), File::from(bytes.reader().unwrap()));
            let mut one = [0; 1];
            io::Read::read_exact(&mut a, &mut one).unwrap();
            assert_eq!(io::Seek::stream_position(&mut b).unwrap(), 0);
            assert!(a.write_at(b"x", 0).is_err());
            assert_eq!(a.metadata().unwrap().len(), size as u64);
        }
    }

    #[test]
    fn what_is_consumed_is_given_back() {
        let mut bytes = Bytes::new();
        for _ in 0..10 {
            bytes.append(&vec![3; 100_000]).unwrap();
        }
        bytes.end().unwrap();
        let before = bytes.charged();
        assert_eq!(before, 1_000_000_u64.div_ceil(PAGE) * PAGE);
        let (fd, itself) = bytes.consumer().unwrap();
        assert!(itself);
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&fd, how, 0, 1 << 20).unwrap();
        assert_eq!((bytes.measure(), bytes.charged()), (before, 0));
        assert_eq!(read(&bytes), vec![0; 1_000_000]);
    }

    #[test]
    fn a_small_one_is_consumed_as_a_copy() {
        let mut bytes = Bytes::new();
        bytes.append(b"small").unwrap();
        let (fd, itself) = bytes.consumer().unwrap();
        assert!(!itself);
        File::from(fd).set_len(0).unwrap();
        assert_eq!((bytes.measure(), read(&bytes)), (0, b"small".to_vec()));
    }

    #[test]
    fn holes_cost_nothing() {
        let mut bytes = Bytes::new();
        for _ in 0..5 << 10 {
            assert_eq!(bytes.cost_of_zeros(1 << 20), 0);
            bytes.append_zeros(1 << 20).unwrap();
        }
        bytes.append(b"end").unwrap();
        bytes.end().unwrap();
        assert_eq!((bytes.size(), bytes.charged()), ((5 << 30) + 3, PAGE));
        let file = File::from(bytes.reader().unwrap());
        assert!(file.metadata().unwrap().blocks() * 512 <= 4 << 20);
        let mut end = [0; 4];
        file.read_exact_at(&mut end, (5 << 30) - 1).unwrap();
        assert_eq!(&end, b"\0end");
    }

    #[test]
    fn holes_stay_holes_whatever_is_written_behind_them() {
        let data = vec![5u8; 1 << 20];
        for (hole, full) in
            [(HUGE - PAGE, PAGE), (1 << 20, 1 << 20), (3 * HUGE - 5, 5), (HUGE + 100, 300_000)]
        {
            let mut bytes = Bytes::new();
            bytes.append(&data[..70_000]).unwrap();
            for _ in 0..20 {
                bytes.append_zeros(u32::try_from(hole).unwrap()).unwrap();
                bytes.append(&data[..usize::try_from(full).unwrap()]).unwrap();
            }
            bytes.end().unwrap();
            let file = File::from(bytes.reader().unwrap());
            let taken = file.metadata().unwrap().blocks() * 512;
            assert_eq!(taken, bytes.charged(), "{hole} {full}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_appended_is_read(parts in prop::collection::vec((any::<bool>(), 0u32..70_000), 0..8)) {
            let (mut bytes, mut expected) = (Bytes::new(), Vec::new());
            for (n, (zeros, len)) in parts.into_iter().enumerate() {
                let before = bytes.charged();
                let cost = if zeros { bytes.cost_of_zeros(len) } else { bytes.cost(len) };
                if zeros {
                    bytes.append_zeros(len).unwrap();
                    expected.resize(expected.len() + len as usize, 0);
                } else {
                    let part = vec![n as u8 + 1; len as usize];
                    // In two pieces: the cost is that of the whole.
                    let (a, b) = part.split_at(part.len() / 3);
                    bytes.append(a).unwrap();
                    bytes.append(b).unwrap();
                    expected.extend(part);
                }
                prop_assert_eq!(bytes.charged(), before + cost);
            }
            bytes.end().unwrap();
            prop_assert_eq!(bytes.size(), expected.len() as u64);
            if let Place::File { file, .. } = &bytes.place {
                prop_assert!(file.metadata().unwrap().blocks() * 512 >= bytes.charged());
            }
            prop_assert_eq!(read(&bytes), expected);
        }
    }
}
