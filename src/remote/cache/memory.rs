//! The bytes of images in memory.
//!
//! Small images live on the heap. The larger ones of a snapshot share one sparse file, so that a snapshot takes one
//! descriptor however many images it has: each has a region of 4 TiB to itself, which costs nothing where nothing is
//! written, and so lies in one piece whatever else arrives between its bytes. Offsets up to 2^63 and regions without end
//! cost nothing in reading and writing (Linux 6.18: 1 GiB at the two millionth region is as fast as at the first); the
//! kernel's index of a region that is used takes about 2 KiB.
//!
//! The file is one of a tmpfs that is mounted nowhere. It is like a memfd, but for its larger pages, which take a third of
//! the time of small ones, and giving them back takes next to none. Where such a tmpfs cannot be had it is a memfd. Bytes
//! come through a buffer and pwrite(2): for 1 GiB over loopback that had 1.2 to 1.4 times the throughput of receiving into
//! a mapping of a memfd, whose page faults and zeroed pages cost more than the second copy out of a warm cache. Zeros are
//! holes.
//!
//! Below the end of the file any write allocates a whole large page (Linux 6.18, `huge=within_size`). What of it gets
//! no content is given back as soon as the image goes on behind it or ends; so at most one such page of an image is
//! taken and not charged, and of few images at once ([`BEGUN`]).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::fcntl::{FallocateFlags, OFlag, fallocate, openat};
use nix::sys::stat::Mode;

use crate::proc::status;
use crate::sys;

/// Images up to this many bytes stay on the heap.
pub(super) const SMALL: u64 = 64 << 10;
/// Most bytes of an image.
const REGION: u64 = 1 << 42;
/// What the kernel takes for a region beside its pages, at most.
const REGION_COST: u64 = 4096;
const PAGE: u64 = 4096;
const CAP_SYS_ADMIN: u64 = 1 << 21;
/// The largest page that a write may allocate.
const HUGE: u64 = 2 << 20;
/// Images that may hold a page of [`HUGE`] in which not all is content yet. The pages of others are cut after each write,
/// which costs time but no memory.
const BEGUN: usize = 16;

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
    File(Region),
}

/// The part of the file that belongs to an image.
#[derive(Debug)]
struct Region {
    base: u64,
    /// The page of [`HUGE`] in which was written last.
    last: u64,
    /// Which small pages of that have content.
    content: [u64; 8],
    begun: Option<Begun>,
}

/// The right to leave a page begun.
#[derive(Debug)]
struct Begun;

static HELD: AtomicUsize = AtomicUsize::new(0);

impl Begun {
    fn new() -> Option<Self> {
        let more = |held: usize| (held < BEGUN).then_some(held + 1);
        HELD.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self)
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The file that the images of a snapshot lie in that are not small.
#[derive(Debug, Default)]
pub(super) struct Space {
    file: Option<File>,
    regions: u64,
    len: u64,
}

/// Where a reader finds an image.
#[derive(Debug)]
pub(super) struct Readable {
    pub(super) fd: OwnedFd,
    pub(super) offset: u64,
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

fn unnamed(root: &OwnedFd) -> io::Result<File> {
    let how = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(File::from(openat(root, ".", how, Mode::S_IRUSR | Mode::S_IWUSR)?))
}

/// A file for images that are not small.
fn large() -> io::Result<File> {
    LARGE.as_ref().map_or_else(memfd, unnamed)
}

fn memfd() -> io::Result<File> {
    let fd = sys::event::memfd(c"crtool-image", libc::MFD_CLOEXEC)?;
    Ok(File::from(fd))
}

fn reopened(file: &File) -> io::Result<OwnedFd> {
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}

fn gone() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Space {
    /// A file that has images already, the last of which begins at `last`.
    pub(super) fn adopt(file: File, last: u64) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file: Some(file), regions: last / REGION + 1, len })
    }

    /// The file, if there is one.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    fn region(&mut self) -> io::Result<Region> {
        if self.file.is_none() {
            self.file = Some(large()?);
        }
        let base = self.regions * REGION;
        self.regions += 1;
        Ok(Region { base, last: 0, content: [0; 8], begun: None })
    }

    fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(gone)
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file()?.write_all_at(bytes, at)?;
        self.len = self.len.max(at + bytes.len() as u64);
        Ok(())
    }

    /// The last bytes of an image may be a hole.
    fn extend(&mut self, end: u64) -> io::Result<()> {
        if self.len < end {
            self.file()?.set_len(end)?;
            self.len = end;
        }
        Ok(())
    }

    fn punch(&self, from: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed =
            |bytes: u64| i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
        Ok(fallocate(self.file()?, how, signed(from)?, signed(len)?)?)
    }

    /// Bytes of memory that the file takes now.
    pub(super) fn taken(&self) -> u64 {
        let metadata = self.file.as_ref().and_then(|file| file.metadata().ok());
        metadata.map_or(0, |metadata| metadata.blocks() * 512)
    }
}

impl Region {
    fn has(&self, page: u64) -> bool {
        let bit = page % (HUGE / PAGE);
        page * PAGE / HUGE == self.last
            && self.content.get(bit as usize / 64).is_some_and(|word| word & 1 << (bit % 64) != 0)
    }

    /// Small pages that bytes from `from` to `to` need beyond those that have content.
    fn pages(&self, from: u64, to: u64) -> u64 {
        (to.div_ceil(PAGE) - from / PAGE).saturating_sub(u64::from(self.has(from / PAGE)))
    }

    fn append(&mut self, space: &mut Space, bytes: &[u8], at: u64) -> io::Result<()> {
        let end = at + bytes.len() as u64;
        space.write(bytes, self.base + at)?;
        for page in at / PAGE..end.div_ceil(PAGE) {
            let huge = page * PAGE / HUGE;
            if huge != self.last {
                self.trim(space)?;
                (self.last, self.content) = (huge, [0; 8]);
            }
            let bit = page % (HUGE / PAGE);
            if let Some(word) = self.content.get_mut(bit as usize / 64) {
                *word |= 1 << (bit % 64);
            }
        }
        if self.begun.is_none() {
            self.begun = Begun::new();
        }
        if self.begun.is_none() { self.trim(space) } else { Ok(()) }
    }

    /// Frees what is allocated of the last large page and has no content.
    fn trim(&self, space: &Space) -> io::Result<()> {
        let mut page = 0;
        while page < HUGE / PAGE {
            let first = page;
            let at = self.last * (HUGE / PAGE);
            while page < HUGE / PAGE && !self.has(at + page) {
                page += 1;
            }
            if page > first {
                space.punch(self.base + (at + first) * PAGE, (page - first) * PAGE)?;
            }
            page += 1;
        }
        Ok(())
    }
}

impl Bytes {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self { size: 0, charged: 0, place: Place::Heap(Vec::new()) }
    }

    /// One that is complete: `size` bytes of the file from `base` on, or what is in `content`.
    pub(super) fn adopt(size: u64, place: Result<u64, Vec<u8>>) -> Self {
        match place {
            Ok(base) => {
                let region = Region { base, last: 0, content: [0; 8], begun: None };
                Self { size, charged: REGION_COST, place: Place::File(region) }
            }
            Err(content) => Self { size, charged: size, place: Place::Heap(content) },
        }
    }

    /// Where it lies in the file; what it is if it is not there.
    pub(super) fn place(&self) -> Result<u64, &[u8]> {
        match &self.place {
            Place::File(region) => Ok(region.base),
            Place::Heap(bytes) => Err(bytes),
        }
    }

    /// Bytes it has.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory it takes.
    pub(super) fn charged(&self) -> u64 {
        self.charged
    }

    /// How many of those are in the file.
    pub(super) fn filed(&self) -> u64 {
        if matches!(self.place, Place::File(_)) { self.charged.saturating_sub(REGION_COST) } else { 0 }
    }

    /// Bytes of memory that `more` bytes of data will take beyond those it takes now, at most.
    pub(super) fn cost(&self, more: u32) -> u64 {
        let end = self.size + u64::from(more);
        match &self.place {
            Place::Heap(_) if end <= SMALL => room(end).saturating_sub(self.charged),
            Place::Heap(_) => (REGION_COST + end.next_multiple_of(PAGE)).saturating_sub(self.charged),
            Place::File(region) => region.pages(self.size, end) * PAGE,
        }
    }

    /// As [`Self::cost`], for zeros.
    pub(super) fn cost_of_zeros(&self, more: u32) -> u64 {
        match self.place {
            Place::Heap(_) if self.size + u64::from(more) <= SMALL => self.cost(more),
            // What is there moves into pages.
            Place::Heap(_) => (REGION_COST + self.size.next_multiple_of(PAGE)).saturating_sub(self.charged),
            Place::File(_) => 0,
        }
    }

    /// Makes room for bytes up to `end`: more than the heap takes go into the file.
    fn grow(&mut self, space: &mut Space, end: u64) -> io::Result<()> {
        if end > REGION {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let Place::Heap(bytes) = &mut self.place else { return Ok(()) };
        if end <= SMALL {
            bytes.reserve_exact((room(end) as usize).saturating_sub(bytes.len()));
            self.charged = self.charged.max(room(end));
            return Ok(());
        }
        let mut region = space.region()?;
        region.append(space, bytes, 0)?;
        self.charged = REGION_COST + self.size.next_multiple_of(PAGE);
        self.place = Place::File(region);
        Ok(())
    }

    /// Appends data.
    pub(super) fn append(&mut self, space: &mut Space, bytes: &[u8]) -> io::Result<()> {
        let end = self.size + bytes.len() as u64;
        self.grow(space, end)?;
        match &mut self.place {
            Place::Heap(heap) => heap.extend_from_slice(bytes),
            Place::File(region) => {
                let pages = region.pages(self.size, end);
                region.append(space, bytes, self.size)?;
                self.charged += pages * PAGE;
            }
        }
        self.size = end;
        Ok(())
    }

    /// Appends zeros.
    pub(super) fn append_zeros(&mut self, space: &mut Space, len: u32) -> io::Result<()> {
        let end = self.size + u64::from(len);
        self.grow(space, end)?;
        if let Place::Heap(heap) = &mut self.place {
            heap.resize(heap.len() + len as usize, 0);
        }
        self.size = end;
        Ok(())
    }

    /// All bytes have come.
    pub(super) fn end(&mut self, space: &mut Space) -> io::Result<()> {
        match &mut self.place {
            Place::Heap(heap) => {
                heap.shrink_to_fit();
                self.charged = self.size;
            }
            Place::File(region) => {
                region.trim(space)?;
                region.begun = None;
                space.extend(region.base + self.size)?;
            }
        }
        Ok(())
    }

    /// Whether what there is can be read while more comes, which is so in the file. The last bytes may be a hole, and a mapping
    /// ends with the file.
    pub(super) fn ready_part(&self, space: &mut Space) -> io::Result<bool> {
        match &self.place {
            Place::Heap(_) => Ok(false),
            Place::File(region) => space.extend(region.base + self.size).map(|()| true),
        }
    }

    /// A descriptor that reads it, and cannot write it.
    pub(super) fn reader(&self, space: &Space) -> io::Result<Readable> {
        Ok(match &self.place {
            Place::Heap(bytes) => {
                let file = memfd()?;
                file.write_all_at(bytes, 0)?;
                Readable { fd: reopened(&file)?, offset: 0 }
            }
            Place::File(region) => Readable { fd: reopened(space.file()?)?, offset: region.base },
        })
    }

    /// A descriptor for a reader that punches holes where it has read. `true`: into the image itself.
    pub(super) fn consumer(&self, space: &Space) -> io::Result<(Readable, bool)> {
        Ok(match &self.place {
            Place::Heap(_) => (self.reader(space)?, false),
            Place::File(region) => {
                (Readable { fd: space.file()?.try_clone()?.into(), offset: region.base }, true)
            }
        })
    }
}

/// Bytes of the heap that are taken for an image of `size`.
fn room(size: u64) -> u64 {
    if size == 0 { 0 } else { size.next_power_of_two().max(64) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(space: &Space, bytes: &Bytes) -> Vec<u8> {
        let Readable { fd, offset } = bytes.reader(space).unwrap();
        let mut all = vec![0; usize::try_from(bytes.size()).unwrap()];
        File::from(fd).read_exact_at(&mut all, offset).unwrap();
        all
    }

    #[test]
    fn readers_cannot_write() {
        for size in [10, 100_000] {
            let (mut space, mut bytes) = (Space::default(), Bytes::new());
            bytes.append(&mut space, &vec![7; size]).unwrap();
            bytes.end(&mut space).unwrap();
            let Readable { fd, offset } = bytes.reader(&space).unwrap();
            assert!(File::from(fd).write_at(b"x", offset).is_err());
        }
    }

    #[test]
    fn what_is_consumed_is_given_back() {
        let (mut space, mut bytes) = (Space::default(), Bytes::new());
        let mut other = Bytes::new();
        other.append(&mut space, &[4; 100_000]).unwrap();
        for _ in 0..10 {
            bytes.append(&mut space, &vec![3; 100_000]).unwrap();
        }
        bytes.end(&mut space).unwrap();
        other.end(&mut space).unwrap();
        let of_other = 100_000_u64.next_multiple_of(PAGE);
        let all = 1_000_000_u64.next_multiple_of(PAGE) + of_other;
        assert_eq!(bytes.charged() + other.charged() - 2 * REGION_COST, all);
        assert_eq!(space.taken(), all);
        let (Readable { fd, offset }, itself) = bytes.consumer(&space).unwrap();
        assert!(itself);
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&fd, how, i64::try_from(offset).unwrap(), 1 << 20).unwrap();
        assert_eq!(space.taken(), of_other);
        assert_eq!(read(&space, &bytes), vec![0; 1_000_000]);
        assert_eq!(read(&space, &other), vec![4; 100_000]);
    }

    #[test]
    fn a_small_one_is_consumed_as_a_copy() {
        let (mut space, mut bytes) = (Space::default(), Bytes::new());
        bytes.append(&mut space, b"small").unwrap();
        let (_, itself) = bytes.consumer(&space).unwrap();
        assert!(!itself);
        assert_eq!((read(&space, &bytes), space.taken()), (b"small".to_vec(), 0));
    }

    #[test]
    fn holes_cost_nothing() {
        let (mut space, mut bytes) = (Space::default(), Bytes::new());
        for n in 0..5 << 10 {
            assert_eq!(bytes.cost_of_zeros(1 << 20), if n == 0 { REGION_COST } else { 0 });
            bytes.append_zeros(&mut space, 1 << 20).unwrap();
        }
        bytes.append(&mut space, b"end").unwrap();
        bytes.end(&mut space).unwrap();
        assert_eq!((bytes.size(), bytes.charged()), ((5 << 30) + 3, REGION_COST + PAGE));
        assert_eq!(space.taken(), PAGE);
        let Readable { fd, offset } = bytes.reader(&space).unwrap();
        let mut end = [0; 4];
        File::from(fd).read_exact_at(&mut end, offset + (5 << 30) - 1).unwrap();
        assert_eq!(&end, b"\0end");
    }

    /// Images of data and holes in turn, `many` of them side by side in one file.
    fn side_by_side(many: usize, hole: u64, full: u64) -> (Space, Vec<Bytes>) {
        let data = vec![5u8; 1 << 20];
        let mut space = Space::default();
        let mut all: Vec<Bytes> = (0..many).map(|_| Bytes::new()).collect();
        for bytes in &mut all {
            bytes.append(&mut space, &data[..70_000]).unwrap();
        }
        for _ in 0..10 {
            for bytes in &mut all {
                bytes.append_zeros(&mut space, u32::try_from(hole).unwrap()).unwrap();
                bytes.append(&mut space, &data[..usize::try_from(full).unwrap()]).unwrap();
            }
        }
        (space, all)
    }

    #[test]
    fn holes_stay_holes_whatever_is_written_around_them() {
        for (hole, full) in
            [(HUGE - PAGE, PAGE), (1 << 20, 1 << 20), (3 * HUGE - 5, 5), (HUGE + 100, 300_000), (PAGE, PAGE)]
        {
            for many in [1, 3, 2 * BEGUN] {
                let (mut space, mut all) = side_by_side(many, hole, full);
                let charged = |all: &[Bytes]| all.iter().map(|b| b.charged() - REGION_COST).sum::<u64>();
                let open = space.taken();
                assert!(open <= charged(&all) + HUGE * BEGUN as u64, "{hole} {full} {many}: {open}");
                all.iter_mut().for_each(|bytes| bytes.end(&mut space).unwrap());
                assert_eq!(space.taken(), charged(&all), "{hole} {full} {many}");
            }
        }
        assert_eq!(HELD.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_image_ends_where_the_next_begins() {
        let (mut space, mut bytes) = (Space::default(), Bytes::new());
        bytes.append(&mut space, &[1; 100_000]).unwrap();
        bytes.size = REGION;
        assert_eq!(bytes.append(&mut space, b"x").unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(bytes.append_zeros(&mut space, 1).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        // The last of as many as there may be.
        space.regions = u64::from(crate::remote::wire::MAX_IMAGES) - 1;
        let mut last = Bytes::new();
        last.append(&mut space, &[2; 100_000]).unwrap();
        last.append_zeros(&mut space, 1 << 20).unwrap();
        last.end(&mut space).unwrap();
        assert_eq!(read(&space, &last)[..100_000], [2; 100_000]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_appended_is_read(
            parts in prop::collection::vec((0usize..3, any::<bool>(), 0u32..70_000), 0..16),
        ) {
            let mut space = Space::default();
            let mut all: Vec<(Bytes, Vec<u8>)> = (0..3).map(|_| (Bytes::new(), Vec::new())).collect();
            for (n, (which, zeros, len)) in parts.into_iter().enumerate() {
                let (bytes, expected) = &mut all[which];
                let before = bytes.charged();
                let cost = if zeros { bytes.cost_of_zeros(len) } else { bytes.cost(len) };
                if zeros {
                    bytes.append_zeros(&mut space, len).unwrap();
                    expected.resize(expected.len() + len as usize, 0);
                } else {
                    let part = vec![n as u8 + 1; len as usize];
                    // In two pieces: the cost is that of the whole.
                    let (a, b) = part.split_at(part.len() / 3);
                    bytes.append(&mut space, a).unwrap();
                    bytes.append(&mut space, b).unwrap();
                    expected.extend(part);
                }
                prop_assert!(bytes.charged() <= before + cost);
            }
            let mut taken = 0;
            for (bytes, expected) in &mut all {
                bytes.end(&mut space).unwrap();
                prop_assert_eq!(bytes.size(), expected.len() as u64);
                if matches!(bytes.place, Place::File(_)) {
                    taken += bytes.charged() - REGION_COST;
                }
            }
            prop_assert_eq!(space.taken(), taken);
            for (bytes, expected) in &all {
                prop_assert_eq!(&read(&space, bytes), expected);
            }
        }
    }
}
