//! Pages that are made with their content, by userfaultfd(2), instead of made of zeros and then written.
//!
//! That takes two thirds of the processor time: 0.29 s for each GiB where MADV_POPULATE_WRITE and preadv take 0.43 s
//! (Linux 6.18, image in a tmpfs with large pages; 0.36 and 0.50 s without). A puppet maps the image for as long as it
//! is filled, and copies from there.
//!
//! What is not done this way:
//! - Memory of files, and what is shared copy-on-write with the maker of the puppet: its pages are there.
//! - Images on disk: a mapping reads ahead less than preadv does. Images that are freed as they are read.
//! - Anything where the kernel gives large pages unasked, since this makes small ones; under a limit of address space
//!   (RLIMIT_AS), which the image may not fit into; and where it cannot be done at all (tried once).
//! - Areas of few or scattered pages: there a call each costs more than it saves.

use std::os::fd::AsRawFd;
use std::sync::LazyLock;

use anyhow::Result;

use super::layout::{private, status};
use crate::{
    files::Descriptors,
    image::pb,
    pages::{Pages, Piece},
    sys::userfault,
    tracee::{List, Want, room},
};

const PAGE: u64 = 4096;
/// Bytes of an area that are worth it.
const MIN_AREA: u64 = 512 << 10;
/// And of its pieces, on average.
const MIN_PIECE: u64 = 32 << 10;

/// Whether it can and should be done here.
static USABLE: LazyLock<bool> =
    LazyLock::new(|| userfault::works() && address_space_is_free() && !large_pages_unasked());

/// Whether an image can be mapped beside what is filled from it.
fn address_space_is_free() -> bool {
    use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
    getrlimit(Resource::RLIMIT_AS).is_ok_and(|(soft, _)| soft == RLIM_INFINITY)
}

/// Whether anonymous memory gets pages larger than 4 KiB without asking for them.
fn large_pages_unasked() -> bool {
    let dir = std::path::Path::new("/sys/kernel/mm/transparent_hugepage");
    let always =
        |path: &std::path::Path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("[always]"));
    let sizes = std::fs::read_dir(dir).into_iter().flatten().flatten();
    always(&dir.join("enabled")) || sizes.into_iter().any(|size| always(&size.path().join("enabled")))
}

/// What of an address space comes this way.
#[derive(Debug, Default)]
pub(super) struct UffdCopies {
    areas: Vec<(u64, u64)>,
    pub(super) pieces: Vec<Piece>,
    /// Which images it can be done from; looked at once.
    fit: Option<Vec<bool>>,
    /// The puppet's userfaultfd.
    number: Option<i32>,
    /// The images, as the puppet maps them.
    sources: Vec<Source>,
}

/// A part of an image in the puppet's address space.
#[derive(Debug, Clone, Copy)]
struct Source {
    image: usize,
    fd: i32,
    /// Where the image begins in its file.
    base: u64,
    /// Where the part begins in the image, and how long it is.
    offset: u64,
    len: u64,
    /// Where the puppet has it.
    at: u64,
}

impl UffdCopies {
    /// Takes the pages of `vma`, which is not inherited, if they are to come this way.
    pub(super) fn take(&mut self, vma: &pb::VmaEntry, pages: &Pages) -> bool {
        let huge = vma.flags & libc::MAP_HUGETLB.cast_unsigned() != 0;
        if huge || !private(vma) || vma.status & status::ANON_PRIVATE == 0 || !*USABLE {
            return false;
        }
        let own = || pages.within(vma.start, vma.end);
        let (bytes, count) = own().fold((0, 0), |(bytes, count), piece| (bytes + piece.len(), count + 1));
        if bytes < MIN_AREA || bytes / count < MIN_PIECE {
            return false;
        }
        let fit = self.fit.get_or_insert_with(|| {
            pages.images().iter().map(|image| !image.consumed && image.is_in_memory()).collect()
        });
        if !own().all(|piece| fit.get(piece.image).copied().unwrap_or(false)) {
            return false;
        }
        self.areas.push((vma.start, vma.end));
        self.pieces.extend(own());
        true
    }

    /// Maps the images and readies the areas, which are mapped already. `taken` is what else there is in the
    /// puppet's address space, or will be. What comes back has to come another way: there may be no room for an
    /// image.
    pub(super) fn begin(
        &mut self,
        list: &mut List,
        pages: &Pages,
        mut taken: Vec<(u64, u64)>,
        descriptors: &mut Descriptors,
    ) -> Result<Vec<Piece>> {
        for (number, image) in pages.images().iter().enumerate() {
            let mine = || self.pieces.iter().filter(|piece| piece.image == number);
            let Some(offset) = mine().map(|piece| piece.offset).min() else { continue };
            let len = mine().map(|piece| piece.offset + piece.len()).max().unwrap_or(offset) - offset;
            let Some(at) = room::free(taken.clone(), len) else {
                self.sources.clear();
                return Ok(std::mem::take(&mut self.pieces));
            };
            taken.push((at, at + len));
            let (file, base) = image.file()?;
            self.sources.push(Source { image: number, fd: file.as_raw_fd(), base, offset, len, at });
        }
        if self.sources.is_empty() {
            return Ok(Vec::new());
        }
        for &Source { fd, base, offset, len, at, .. } in &self.sources {
            let fd = descriptors.fetch(list, fd);
            list.call(
                "mmap of the pages image",
                libc::SYS_mmap,
                &[
                    at.into(),
                    len.into(),
                    libc::PROT_READ.into(),
                    (libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE).into(),
                    fd.into(),
                    (base + offset).into(),
                ],
                Want::Equal(at),
            );
        }
        let flags = libc::O_CLOEXEC | userfault::USER_MODE_ONLY;
        let made = list.call("userfaultfd", libc::SYS_userfaultfd, &[flags.into()], descriptors.want());
        // The threads that help know it by this number.
        self.number = Some(descriptors.keep(list, made));
        let api = list.value(&userfault::API_WORDS);
        self.ioctl(list, "UFFDIO_API", userfault::API, api);
        for (start, end) in &self.areas {
            let words = list.value(&[*start, end - start, userfault::MISSING, 0]);
            self.ioctl(list, format!("UFFDIO_REGISTER of {start:#x}-{end:#x}"), userfault::REGISTER, words);
        }
        Ok(Vec::new())
    }

    /// Puts these pages into place.
    pub(super) fn copy(&self, list: &mut List, pieces: &[Piece], most: u64) {
        for piece in pieces.iter().flat_map(|piece| piece.in_parts(most)) {
            let Some(source) = self.sources.iter().find(|source| source.image == piece.image) else {
                continue;
            };
            let from = source.at + (piece.offset - source.offset);
            let words = list.value(&[piece.start, from, piece.len(), userfault::DONT_WAKE, 0]);
            self.ioctl(
                list,
                format!("UFFDIO_COPY of {} bytes of pages", piece.len()),
                userfault::COPY,
                words,
            );
        }
    }

    /// Leaves nothing behind but the pages.
    pub(super) fn end(&self, list: &mut List) {
        // The userfaultfd is closed with all other descriptors.
        for source in &self.sources {
            list.call(
                "munmap of the pages image",
                libc::SYS_munmap,
                &[source.at.into(), source.len.into()],
                Want::Zero,
            );
        }
    }

    fn ioctl(
        &self,
        list: &mut List,
        name: impl Into<std::borrow::Cow<'static, str>>,
        request: u64,
        words: crate::tracee::Data,
    ) {
        let number = self.number.unwrap_or(-1);
        list.call(name, libc::SYS_ioctl, &[number.into(), request.into(), words.into()], Want::Zero);
    }
}

const _: () = assert!(MIN_PIECE.is_multiple_of(PAGE));

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::image::{ImageKind, MemStore, PagesSink, Store};
    use crate::pages::PagemapWriter;
    use crate::pages::pagemap::{PRESENT, Run};

    #[test]
    fn without_room_pages_come_another_way() {
        let store = MemStore::new();
        let mut pagemap = PagemapWriter::create(&store, ImageKind::Pagemap, 1, 1).unwrap();
        pagemap.push(Run { start: 0x10_0000, pages: 300, flags: PRESENT }).unwrap();
        pagemap.finish().unwrap();
        let PagesSink::File(image) = store.create_pages("pages-1.img", 0).unwrap() else { panic!("no file") };
        image.write_all_at(&[1], 300 * PAGE - 1).unwrap();
        let pages = Pages::read(&store, ImageKind::Pagemap, 1).unwrap().unwrap();
        let mut uffd = UffdCopies { pieces: pages.pieces().to_vec(), ..UffdCopies::default() };
        let mut list = List::new("no room");
        let back =
            uffd.begin(&mut list, &pages, vec![(0, room::TASK_SIZE)], &mut Descriptors::alone()).unwrap();
        uffd.end(&mut list);
        assert_eq!(back, pages.pieces());
        assert!(list.is_empty() && uffd.pieces.is_empty() && uffd.sources.is_empty());
    }
}
