//! The address space of a process under construction: mapped at the final addresses, filled from `pages-N.img`.
//!
//! Everything here ends in calls of a list. What later forks or writes must not see (protections
//! without write, madvise, mlock) comes in a second part, once all children are made.

use std::{iter::Peekable, ops::Range, os::fd::AsRawFd as _};

use anyhow::{Context, Result, ensure};

use super::{
    cow::{self, ParentMemory},
    page_threads::Spawner,
    uffd_copy::UffdCopies,
    vdso,
};
use crate::{
    files::Descriptors,
    image::pb,
    mem::{aio, pkeys},
    pages::{Pages, Piece},
    sys::pid::NsPid,
    sys::pod::{self, Pod},
    tracee::{List, Op, Want, room::TASK_SIZE},
};

const PAGE: u64 = 4096;
const ARCH_MAP_VDSO_64: u64 = 0x2003;
/// Bytes for which one more thread is worth its making.
const FILL_SHARE: u64 = 32 << 20;
/// Where what has been read is freed, it is freed in steps of this.
const FREE_STEP: u64 = 32 << 20;
/// Linux 6.13.
const MADV_GUARD_INSTALL: u64 = 102;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
/// At most this many ranges in a preadv (UIO_MAXIOV), and bytes well below MAX_RW_COUNT.
const IOV_MAX: u64 = 1024;
const READ_MAX: u64 = 1 << 30;
/// What is read with one call, if that does not make too many of them: pages just made are in the cache still.
const READ: u64 = 2 << 20;
/// Calls that one list reads with, about, before they take more at once.
const MOST_READS: u64 = 4096;
/// Fewer bytes than this are not worth a call that makes their pages.
const POPULATE: u64 = 64 << 10;

/// Bits of `vma_entry.status`.
pub(super) use crate::mem::vma as status;

/// Where mapped objects come from: numbers of the supervisor's descriptors.
pub(super) trait MappedObjects {
    /// The file of `files.img` with this id, open as the mapping needs it.
    fn file(&mut self, id: u32, vma: &pb::VmaEntry) -> Result<i32>;
    /// Shared memory object.
    fn shared(&mut self, shmid: u64, vma: &pb::VmaEntry) -> Result<i32>;
}

/// `struct prctl_mm_map`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct MmMap {
    words: [u64; 12],
    auxv_size: u32,
    exe_fd: u32,
}
const _: () = assert!(size_of::<MmMap>() == 104);

fn mm_map_bytes(map: &MmMap) -> Vec<u8> {
    let mut bytes = pod::bytes_of(&map.words).to_vec();
    bytes.extend_from_slice(&map.auxv_size.to_ne_bytes());
    bytes.extend_from_slice(&map.exe_fd.to_ne_bytes());
    bytes
}

pub(super) fn private(vma: &pb::VmaEntry) -> bool {
    vma.flags & libc::MAP_PRIVATE.cast_unsigned() != 0
}

/// One address space to be made.
#[derive(Debug)]
pub(super) struct Space<'a> {
    pub(super) pid: NsPid,
    pub(super) mm: &'a pb::MmEntry,
    pub(super) pages: &'a Pages,
    /// The supervisor's descriptor of the program.
    pub(super) exe_fd: i32,
    /// What the maker of the puppet has, and leaves to it.
    pub(super) parent: Option<ParentMemory<'a>>,
    /// The range where lists are, which is left alone.
    pub(super) area: (u64, u64),
}

/// What is known of an address space after [`plan_map`]: for what comes next, for [`plan_late`] and for counting.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// Starts of the areas that do not have their final protection yet, or may not have it.
    opened: Vec<u64>,
    /// Held until the puppet is filled.
    uffd: UffdCopies,
    rings: aio::Rings,
    /// What is to be read, in order of addresses.
    load: Vec<Piece>,
    /// As `load`, into memory that is all zeros.
    fresh: Vec<Piece>,
    /// Pages compared with the maker's, and found equal.
    pub(super) compared: u64,
    pub(super) kept: u64,
}

/// What is to be filled now.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// By reading.
    read: Vec<Piece>,
    /// By userfaultfd.
    copy: Vec<Piece>,
}

impl Load {
    pub(super) fn is_empty(&self) -> bool {
        self.read.is_empty() && self.copy.is_empty()
    }
}

impl Made {
    /// All that is to be filled, of which everything is there.
    pub(super) fn take_all(&mut self, pages: &Pages) -> Result<Load> {
        self.take_there(pages, &vec![u64::MAX; pages.images().len()])
    }

    /// What is to be filled of the first bytes of each image; so many are there.
    pub(super) fn take_there(&mut self, pages: &Pages, there: &[u64]) -> Result<Load> {
        let mut load = Load { read: cut_off(&mut self.load, there), copy: Vec::new() };
        for piece in cut_off(&mut self.fresh, there) {
            pages.without_holes(piece, &mut load.read)?;
        }
        for piece in cut_off(&mut self.uffd.pieces, there) {
            pages.without_holes(piece, &mut load.copy)?;
        }
        load.read.sort_unstable_by_key(|piece| piece.start);
        Ok(load)
    }

    /// The first piece, in the order of its image, that is to be filled.
    pub(super) fn next(&self) -> Option<&Piece> {
        let all = [&self.load, &self.fresh, &self.uffd.pieces];
        all.into_iter().filter_map(|pieces| pieces.first()).min_by_key(|piece| piece.offset)
    }
}

/// Takes from the front of `pieces` what lies in the first bytes of its image.
fn cut_off(pieces: &mut Vec<Piece>, there: &[u64]) -> Vec<Piece> {
    let end = |piece: &Piece| there.get(piece.image).copied().unwrap_or(u64::MAX) / PAGE * PAGE;
    let whole = pieces.iter().take_while(|piece| piece.offset + piece.len() <= end(piece)).count();
    let rest = pieces.split_off(whole);
    let mut taken = std::mem::replace(pieces, rest);
    if let Some(first) = pieces.first_mut()
        && first.offset < end(first)
    {
        let cut = first.start + (end(first) - first.offset);
        taken.push(first.within(first.start, cut));
        *first = first.within(cut, first.end);
    }
    taken
}

/// Maps an address space. Then it is filled ([`plan_fill`]), and then finished ([`plan_end`]).
pub(super) fn plan_map(
    list: &mut List,
    space: &Space<'_>,
    objects: &mut dyn MappedObjects,
    descriptors: &mut Descriptors,
) -> Result<Made> {
    let mut made = Made::default();
    let mut parent = space.parent.filter(|h| h.mm.exe_file_id == space.mm.exe_file_id);
    if let Some(h) = &parent
        && !h.worthwhile(space.mm)
    {
        parent = None;
    }
    let kept = parent.map(|h| h.kept(space.mm)).unwrap_or_default();
    plan_clear(list, space.area, &kept);
    let exe_fd = if parent.is_some() { -1 } else { descriptors.fetch(list, space.exe_fd) };
    plan_mm(list, space.mm, exe_fd);
    let mut run: Option<Run> = None;
    for vma in &space.mm.vmas {
        let inherited = kept.contains(&(vma.start, vma.end));
        let kernel = status::VSYSCALL | status::VDSO | status::VVAR | status::GUARD;
        if vma.status & kernel != 0 {
            continue;
        }
        if vma.status & status::AIORING != 0 {
            let write = (libc::PROT_READ | libc::PROT_WRITE).cast_unsigned();
            if vma.prot != write {
                made.opened.push(vma.start);
            }
            made.load.extend(space.pages.within(vma.start, vma.end));
            continue;
        }
        if let (true, Some(h)) = (inherited, &parent) {
            made.opened.push(vma.start);
            let differing = cow::compare(h.pages, space.pages, vma.start, vma.end)?;
            for (start, end) in &differing.drop {
                list.call(
                    "madvise(MADV_DONTNEED)",
                    libc::SYS_madvise,
                    &[(*start).into(), (end - start).into(), libc::MADV_DONTNEED.into()],
                    Want::Zero,
                );
            }
            made.compared += differing.compared;
            made.kept += differing.equal;
            made.load.extend(differing.load);
            continue;
        }
        let filled = private(vma) && space.pages.any_in(vma.start, vma.end);
        let prot = early_prot(vma, filled);
        if !run.as_mut().is_some_and(|run| run.extend(vma, prot)) {
            run.take().inspect(|run| run.plan(list));
            run = Run::new(vma, prot);
            if run.is_none() {
                plan_vma(list, vma, prot, objects, descriptors)?;
            }
        }
        if prot != vma.prot {
            made.opened.push(vma.start);
        }
        if filled && !made.uffd.take(vma, space.pages) {
            let objects = status::FILE_PRIVATE | status::FILE_SHARED | status::ANON_SHARED | status::MEMFD;
            let zeros = vma.status & (status::ANON_PRIVATE | objects) == status::ANON_PRIVATE;
            let load = if zeros { &mut made.fresh } else { &mut made.load };
            load.extend(space.pages.within(vma.start, vma.end));
        }
    }
    run.inspect(|run| run.plan(list));
    let mut taken: Vec<(u64, u64)> = space.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
    taken.push(space.area);
    made.rings = aio::Rings::read(space.pid, space.mm, space.pages)?;
    if !made.rings.is_empty() {
        let file = descriptors.fetch(list, space.exe_fd);
        made.rings.plan(list, space.pid, file);
    }
    let others = made.uffd.begin(list, space.pages, taken, descriptors)?;
    if !others.is_empty() {
        made.fresh.extend(others);
        made.fresh.sort_unstable_by_key(|piece| piece.start);
    }
    Ok(made)
}

/// What is left to be done in an address space that is filled. No descriptor is left.
pub(super) fn plan_end(
    list: &mut List,
    (pid, pages): (NsPid, &Pages),
    made: &Made,
    vdso: &vdso::Plan,
    descriptors: &mut Descriptors,
) -> Result<()> {
    made.uffd.end(list);
    made.rings.plan_ids(list, pid);
    plan_vdso(list, vdso, pages, descriptors)?;
    descriptors.close_all(list);
    plan_vdso_entries(list, vdso, pid);
    Ok(())
}

/// Maps the vdso; see `vdso.rs`. The data pages come first and bring the code behind them.
fn plan_vdso(list: &mut List, plan: &vdso::Plan, pages: &Pages, descriptors: &mut Descriptors) -> Result<()> {
    let at = match plan {
        vdso::Plan::None => return Ok(()),
        vdso::Plan::Same { at, .. } | vdso::Plan::Foreign { at, .. } => *at,
    };
    list.call(
        "arch_prctl(ARCH_MAP_VDSO_64)",
        libc::SYS_arch_prctl,
        &[ARCH_MAP_VDSO_64.into(), at.into()],
        Want::Ok,
    );
    if let vdso::Plan::Same { unmapped, .. } = plan {
        for (start, end) in unmapped {
            let args = [(*start).into(), (end - start).into()];
            list.call("munmap of a part of the vdso", libc::SYS_munmap, &args, Want::Zero);
        }
    }
    if let vdso::Plan::Foreign { start, end, .. } = plan {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        list.call(
            "mmap of the old vdso",
            libc::SYS_mmap,
            &[(*start).into(), (end - start).into(), prot.into(), flags.into(), (-1i64).into(), 0u64.into()],
            Want::Equal(*start),
        );
        let load: Vec<Piece> = pages.within(*start, *end).collect();
        let images = fetch_images(list, pages, &load, descriptors)?;
        plan_pages(list, pages, &images, &load);
    }
    Ok(())
}

/// Redirects the entry points of an old vdso; its pages are there. `pid` is the puppet itself.
fn plan_vdso_entries(list: &mut List, plan: &vdso::Plan, pid: NsPid) {
    let vdso::Plan::Foreign { start, end, patches, .. } = plan else { return };
    for (at, code) in patches {
        let from = list.bytes(code);
        let local = list.value(&[*at, code.len() as u64]);
        let remote = list.value(&[0u64, code.len() as u64]);
        list.pointer(remote, from);
        list.call(
            format!("entry point of the old vdso at {at:#x}"),
            libc::SYS_process_vm_readv,
            &[pid.into(), local.into(), 1u64.into(), remote.into(), 1u64.into(), 0u64.into()],
            Want::Equal(code.len() as u64),
        );
    }
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    list.call(
        "mprotect of the old vdso",
        libc::SYS_mprotect,
        &[(*start).into(), (end - start).into(), prot.into()],
        Want::Zero,
    );
}

fn plan_mm(list: &mut List, mm: &pb::MmEntry, exe_fd: i32) {
    let auxv = list.bytes(&mm.mm_saved_auxv.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>());
    let map = MmMap {
        words: [
            mm.mm_start_code,
            mm.mm_end_code,
            mm.mm_start_data,
            mm.mm_end_data,
            mm.mm_start_brk,
            mm.mm_brk,
            mm.mm_start_stack,
            mm.mm_arg_start,
            mm.mm_arg_end,
            mm.mm_env_start,
            mm.mm_env_end,
            0,
        ],
        auxv_size: u32::try_from(mm.mm_saved_auxv.len() * 8).unwrap_or(0),
        exe_fd: exe_fd.cast_unsigned(),
    };
    let data = list.bytes(&mm_map_bytes(&map));
    list.pointer(data.at(88), auxv);
    list.call(
        "prctl(PR_SET_MM_MAP)",
        libc::SYS_prctl,
        &[PR_SET_MM.into(), PR_SET_MM_MAP.into(), data.into(), 104u64.into(), 0u64.into()],
        Want::Zero,
    );
}

/// Protection with which an area is mapped: it has to be filled, and must not take a protection key yet.
fn early_prot(vma: &pb::VmaEntry, filled: bool) -> u32 {
    let fill = if filled { libc::PROT_READ | libc::PROT_WRITE } else { 0 };
    pkeys::early_prot(vma.prot) | fill.cast_unsigned()
}

/// Private anonymous areas side by side, mapped alike: one call maps them all. The kernel would make one area of them too, until
/// they differ.
#[derive(Debug)]
struct Run {
    start: u64,
    end: u64,
    prot: u32,
    flags: u32,
}

impl Run {
    /// `None` for an area that is mapped by itself.
    fn new(vma: &pb::VmaEntry, prot: u32) -> Option<Self> {
        let alone = (libc::MAP_GROWSDOWN | libc::MAP_HUGETLB).cast_unsigned();
        let plain = vma.status & status::ANON_PRIVATE != 0 && private(vma) && vma.flags & alone == 0;
        let objects = status::FILE_PRIVATE
            | status::FILE_SHARED
            | status::ANON_SHARED
            | status::MEMFD
            | status::SYSVIPC
            | status::SOCKET;
        let flags = anonymous_flags(vma);
        (plain && vma.status & objects == 0).then_some(Self { start: vma.start, end: vma.end, prot, flags })
    }

    /// Takes an area that follows; says whether it does.
    fn extend(&mut self, vma: &pb::VmaEntry, prot: u32) -> bool {
        let follows = Self::new(vma, prot)
            .is_some_and(|next| (next.start, next.prot, next.flags) == (self.end, self.prot, self.flags));
        if follows {
            self.end = vma.end;
        }
        follows
    }

    fn plan(&self, list: &mut List) {
        let Self { start, end, prot, flags } = *self;
        let args =
            [start.into(), (end - start).into(), prot.into(), flags.into(), (-1i64).into(), 0u64.into()];
        list.call("mmap", libc::SYS_mmap, &args, Want::Equal(start));
    }
}

/// Locks come late: they would fill the area, and are not inherited.
fn fixed_flags(vma: &pb::VmaEntry) -> u32 {
    vma.flags & !(libc::MAP_LOCKED.cast_unsigned() | status::LOCK_ON_FAULT) | libc::MAP_FIXED.cast_unsigned()
}

fn anonymous_flags(vma: &pb::VmaEntry) -> u32 {
    fixed_flags(vma) | libc::MAP_ANONYMOUS.cast_unsigned()
}

fn plan_vma(
    list: &mut List,
    vma: &pb::VmaEntry,
    prot: u32,
    objects: &mut dyn MappedObjects,
    descriptors: &mut Descriptors,
) -> Result<()> {
    let what = vma.status;
    ensure!(
        what & (status::SYSVIPC | status::SOCKET) == 0,
        "mapping {:#x}-{:#x} of kind {what:#x} is not supported yet",
        vma.start,
        vma.end
    );
    let mut flags = fixed_flags(vma);
    let object = if what & (status::FILE_PRIVATE | status::FILE_SHARED) != 0 {
        Some(objects.file(u32::try_from(vma.shmid).context("file id of a mapping")?, vma)?)
    } else if what & (status::ANON_SHARED | status::MEMFD) != 0 {
        // The object is a file for us, whatever it was made by.
        flags &= !(libc::MAP_ANONYMOUS.cast_unsigned());
        Some(objects.shared(vma.shmid, vma)?)
    } else {
        ensure!(
            what & status::ANON_PRIVATE != 0,
            "mapping {:#x}-{:#x} is of unknown kind {what:#x}",
            vma.start,
            vma.end
        );
        flags = anonymous_flags(vma);
        None
    };
    let fd = object.map_or(-1, |object| descriptors.fetch(list, object));
    let offset = if fd >= 0 { vma.pgoff } else { 0 };
    list.call(
        "mmap",
        libc::SYS_mmap,
        &[
            vma.start.into(),
            (vma.end - vma.start).into(),
            prot.into(),
            flags.into(),
            i64::from(fd).into(),
            offset.into(),
        ],
        Want::Equal(vma.start),
    );
    Ok(())
}

/// Fills with as many threads as are worth it: a page fault for each page is what takes the time.
pub(super) fn plan_fill(
    list: &mut List,
    pages: &Pages,
    (Load { read: load, copy }, made): (&Load, &Made),
    descriptors: &mut Descriptors,
    spawner: &mut Spawner<'_>,
) -> Result<()> {
    let uffd = &made.uffd;
    let len = |pieces: &[Piece]| pieces.iter().map(Piece::len).sum::<u64>();
    let (read, copied) = (len(load), len(copy));
    let wanted = usize::try_from((read + copied) / FILL_SHARE).unwrap_or(usize::MAX);
    let threads = (spawner.most() + 1).min(wanted).max(1);
    let mut reads = split(load, threads, read).into_iter();
    let mut copies = split(copy, threads, copied).into_iter();
    let most = at_once(read + copied);
    let mut done = Vec::new();
    let images = fetch_images(list, pages, load, descriptors)?;
    let fill = |list: &mut List, read: Option<Vec<Piece>>, copied: Option<Vec<Piece>>| {
        plan_pages(list, pages, &images, &read.unwrap_or_default());
        uffd.copy(list, &copied.unwrap_or_default(), most);
    };
    let mine = (reads.next(), copies.next());
    for _ in 1..threads {
        let mut work = List::new("fill");
        fill(&mut work, reads.next(), copies.next());
        done.push(spawner.spawn(work, list)?);
    }
    fill(list, mine.0, mine.1);
    for word in done {
        list.op(Op::WaitZero(word));
    }
    Ok(())
}

/// Fetches the images of these pages: descriptors, and where in their files they begin. By number of the image: threads know the
/// descriptors by the same numbers.
fn fetch_images(
    list: &mut List,
    pages: &Pages,
    load: &[Piece],
    descriptors: &mut Descriptors,
) -> Result<Vec<(i32, u64)>> {
    let mut numbers = Vec::with_capacity(pages.images().len());
    for (number, image) in pages.images().iter().enumerate() {
        if load.iter().any(|piece| piece.image == number) {
            let (file, base) = image.file()?;
            numbers.push((descriptors.fetch(list, file.as_raw_fd()), base));
        } else {
            numbers.push((-1, 0));
        }
    }
    Ok(numbers)
}

/// Cuts pieces into `parts` shares of about the same size.
fn split(load: &[Piece], parts: usize, total: u64) -> Vec<Vec<Piece>> {
    let each = (total / parts.max(1) as u64).next_multiple_of(PAGE).max(PAGE);
    let mut shares = vec![Vec::new()];
    let mut room = each;
    for piece in load {
        let mut piece = *piece;
        loop {
            let len = piece.len();
            if len <= room || shares.len() == parts {
                room = room.saturating_sub(len);
                if let Some(last) = shares.last_mut() {
                    last.push(piece);
                }
                break;
            }
            let cut = piece.start + room;
            if room > 0
                && let Some(last) = shares.last_mut()
            {
                last.push(piece.within(piece.start, cut));
            }
            piece = piece.within(cut, piece.end);
            shares.push(Vec::new());
            room = each;
        }
    }
    shares
}

/// preadv's pages into place: of a stretch of memory, pieces that follow each other in an image go in one call. Pages
/// are made just before they are read, many with one call: that takes two thirds of the time of a fault for each of
/// them.
fn plan_pages(list: &mut List, pages: &Pages, descriptors: &[(i32, u64)], load: &[Piece]) {
    let most = at_once(load.iter().map(Piece::len).sum());
    let mut load = load.iter().flat_map(|piece| piece.in_parts(most)).peekable();
    let mut consumed = vec![0..0; pages.images().len()];
    let mut now: Vec<Piece> = Vec::new();
    while load.peek().is_some() {
        now.clear();
        let mut room = most;
        while let Some(piece) = load.next_if(|piece| piece.len() <= room) {
            room -= piece.len();
            now.push(piece);
        }
        plan_populate(list, &now);
        for (number, (image, fd)) in pages.images().iter().zip(descriptors.iter().copied()).enumerate() {
            let mut mine = now.iter().filter(|piece| piece.image == number).peekable();
            while let Some(first) = mine.peek().map(|piece| piece.offset) {
                let len = plan_read(list, fd, &mut mine);
                let Some(consumed) = consumed.get_mut(number).filter(|_| image.consumed) else { continue };
                if consumed.end != first || consumed.end - consumed.start >= FREE_STEP {
                    plan_free(list, fd, consumed);
                    *consumed = first..first;
                }
                consumed.end += len;
            }
        }
    }
    for (fd, consumed) in descriptors.iter().zip(&consumed) {
        plan_free(list, *fd, consumed);
    }
}

/// How much of so many bytes is read with one call.
fn at_once(total: u64) -> u64 {
    (total / MOST_READS).next_multiple_of(PAGE).clamp(READ, READ_MAX)
}

/// Makes the pages of these pieces.
fn plan_populate(list: &mut List, pieces: &[Piece]) {
    let mut pieces = pieces.iter().peekable();
    while let Some(first) = pieces.next() {
        let mut end = first.end;
        while let Some(next) = pieces.next_if(|next| next.start == end) {
            end = next.end;
        }
        if end - first.start >= POPULATE {
            // Where it cannot be done the read does it, or says why not.
            let advice = libc::MADV_POPULATE_WRITE;
            let args = [first.start.into(), (end - first.start).into(), advice.into()];
            list.call("madvise(MADV_POPULATE_WRITE)", libc::SYS_madvise, &args, Want::Any);
        }
    }
}

/// One read of pieces that lie one behind the other in the image, and of how many bytes.
fn plan_read<'p>(
    list: &mut List,
    (fd, base): (i32, u64),
    pieces: &mut Peekable<impl Iterator<Item = &'p Piece>>,
) -> u64 {
    let first = pieces.peek().map_or(0, |piece| piece.offset);
    let (mut iov, mut total, mut count) = (Vec::new(), 0, 0u64);
    while let Some(piece) = pieces.next_if(|piece| count < IOV_MAX && piece.offset == first + total) {
        iov.extend_from_slice(&piece.start.to_ne_bytes());
        iov.extend_from_slice(&piece.len().to_ne_bytes());
        total += piece.len();
        count += 1;
    }
    let iov = list.bytes(&iov);
    list.call(
        format!("preadv of {total} bytes of pages"),
        libc::SYS_preadv,
        &[fd.into(), iov.into(), count.into(), (base + first).into(), 0u64.into()],
        Want::Equal(total),
    );
    total
}

/// Frees a range of the image.
fn plan_free(list: &mut List, (fd, base): (i32, u64), range: &Range<u64>) {
    if range.is_empty() {
        return;
    }
    let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    list.call(
        "fallocate(FALLOC_FL_PUNCH_HOLE)",
        libc::SYS_fallocate,
        &[fd.into(), how.into(), (base + range.start).into(), (range.end - range.start).into()],
        Want::Any,
    );
}

/// What has to wait until no puppet is made from this one any more.
pub(super) fn plan_late(
    list: &mut List,
    mm: &pb::MmEntry,
    pid: NsPid,
    made: &Made,
    keys: &pkeys::Plan,
) -> Result<()> {
    keys.begin(list);
    for vma in &mm.vmas {
        let len = vma.end - vma.start;
        if vma.status & status::GUARD != 0 {
            list.call(
                "madvise(MADV_GUARD_INSTALL)",
                libc::SYS_madvise,
                &[vma.start.into(), len.into(), MADV_GUARD_INSTALL.into()],
                Want::Zero,
            );
            continue;
        }
        if vma.status & (status::VSYSCALL | status::VDSO | status::VVAR) != 0 {
            // Somebody may have taken away what the kernel allows there.
            if status::kernel_prot(vma).is_some_and(|usual| usual != vma.prot) {
                let args = [vma.start.into(), len.into(), vma.prot.into()];
                list.call("mprotect of the vdso", libc::SYS_mprotect, &args, Want::Zero);
            }
            continue;
        }
        if made.opened.binary_search(&vma.start).is_ok() && keys.mprotect_will_do(vma) {
            list.call(
                "mprotect",
                libc::SYS_mprotect,
                &[vma.start.into(), len.into(), vma.prot.into()],
                Want::Zero,
            );
        }
        let advice = vma.madv.unwrap_or(0);
        for bit in (0..64u64).filter(|b| advice & (1 << b) != 0) {
            list.call(
                format!("madvise({bit})"),
                libc::SYS_madvise,
                &[vma.start.into(), len.into(), bit.into()],
                Want::Zero,
            );
        }
        if vma.flags & libc::MAP_LOCKED.cast_unsigned() != 0 {
            let on_fault = vma.flags & status::LOCK_ON_FAULT != 0;
            list.call(
                "mlock2",
                libc::SYS_mlock2,
                &[vma.start.into(), len.into(), u64::from(on_fault).into()],
                // The lock counts even where pages cannot be had now: no access, or beyond the end of a file.
                Want::Any,
            );
        }
    }
    keys.finish(list, &mm.vmas);
    Ok(crate::mem::plan_last(mm, pid, list)?)
}

/// Unmaps everything but the area and what is kept.
pub(super) fn plan_clear(list: &mut List, area: (u64, u64), kept: &[(u64, u64)]) {
    let mut stay = kept.to_vec();
    stay.push(area);
    stay.sort_unstable();
    stay.push((TASK_SIZE, TASK_SIZE));
    let mut from = 0;
    for (start, end) in stay {
        if start > from {
            list.call("munmap", libc::SYS_munmap, &[from.into(), (start - from).into()], Want::Zero);
        }
        from = from.max(end);
    }
}

/// Keeps the compiler honest about what crosses into a target.
const _: fn() = || {
    fn plain<T: Pod>() {}
    plain::<[u64; 12]>();
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_lose_nothing() {
        let load = [
            Piece { start: 0x1000, end: 0x9000, image: 0, offset: 0 },
            Piece { start: 0x20000, end: 0x21000, image: 0, offset: 0x8000 },
            Piece { start: 0x30000, end: 0x3a000, image: 0, offset: 0x9000 },
        ];
        let total = 0x13000;
        for parts in 1..6 {
            let shares = split(&load, parts, total);
            assert!(shares.len() <= parts, "{parts}");
            let mut offset = 0;
            for piece in shares.iter().flatten() {
                assert!(piece.start < piece.end && piece.offset == offset, "{parts} {shares:x?}");
                offset += piece.end - piece.start;
            }
            assert_eq!(offset, total);
        }
        assert!(split(&[], 3, 0).iter().all(Vec::is_empty));
    }

    #[test]
    fn what_has_come_is_cut_off() {
        let piece = |start: u64, end, image, offset| Piece { start, end, image, offset };
        let mut left = vec![piece(0x1000, 0x3000, 0, 0), piece(0x8000, 0xc000, 0, 0x2000)];
        // Pages of which a part is there are not.
        assert_eq!(cut_off(&mut left, &[0xfff]), []);
        assert_eq!(
            cut_off(&mut left, &[0x4fff]),
            [piece(0x1000, 0x3000, 0, 0), piece(0x8000, 0xa000, 0, 0x2000)]
        );
        assert_eq!(left, [piece(0xa000, 0xc000, 0, 0x4000)]);
        assert_eq!(cut_off(&mut left, &[0x4fff]), []);
        assert_eq!(cut_off(&mut left, &[u64::MAX]), [piece(0xa000, 0xc000, 0, 0x4000)]);
        assert!(left.is_empty());
    }
}
