//! Memory that a child shares with its parent copy-on-write.
//!
//! Images hold the pages of every task in full. A puppet that is cloned after its maker's memory is filled
//! already has the maker's pages; of its own it needs only those that differ, and it gives back those
//! that it must not have. What is equal stays one page for both, as it was before the dump.

use anyhow::Result;

use super::layout::{private, status};
use crate::{
    image::pb,
    pages::{Pages, Piece},
};

const PAGE: u64 = 4096;
/// Bytes compared at a time.
const CHUNK: usize = 256 << 10;
/// Below this a second thread costs more than it saves.
const PARALLEL_FROM: u64 = 16 << 20;

/// What a maker leaves to a puppet.
#[derive(Debug, Clone, Copy)]
pub(super) struct ParentMemory<'a> {
    pub(super) mm: &'a pb::MmEntry,
    pub(super) pages: &'a Pages,
}

/// How the pages of a child differ from those it got at fork(2).
#[derive(Debug, Default)]
pub(super) struct Differing {
    /// To be read from the child's image.
    pub(super) load: Vec<Piece>,
    /// To be given back.
    pub(super) drop: Vec<(u64, u64)>,
    pub(super) compared: u64,
    pub(super) equal: u64,
}

impl ParentMemory<'_> {
    fn same(&self, vma: &pb::VmaEntry) -> bool {
        // The vdso is mapped anew: it costs nothing, and may be in two places (`vdso.rs`).
        let special = status::VSYSCALL | status::GUARD | status::VDSO | status::VVAR;
        let at = self.mm.vmas.partition_point(|v| v.status & status::GUARD == 0 && v.start < vma.start);
        let Some(theirs) = self.mm.vmas.get(at) else { return false };
        if vma.status & special != 0 || theirs.end != vma.end || theirs.start != vma.start {
            return false;
        }
        private(vma)
            && theirs.status == vma.status
            && theirs.flags == vma.flags
            && theirs.pgoff == vma.pgoff
            && theirs.shmid == vma.shmid
            && self.pages.any_in(vma.start, vma.end)
    }

    /// The areas of `mm` that the maker has just so, and filled.
    pub(super) fn kept(&self, mm: &pb::MmEntry) -> Vec<(u64, u64)> {
        mm.vmas.iter().filter(|v| self.same(v)).map(|v| (v.start, v.end)).collect()
    }

    /// Whether keeping anything is better than starting from nothing.
    pub(super) fn worthwhile(&self, mm: &pb::MmEntry) -> bool {
        mm.vmas.iter().any(|v| private(v) && self.same(v))
    }
}

/// Compares the pages of both images in `[start, end)`.
pub(super) fn compare(theirs: &Pages, ours: &Pages, start: u64, end: u64) -> Result<Differing> {
    let mut out = Differing::default();
    let mut both: Vec<(Piece, Piece)> = Vec::new();
    let mut a = theirs.within(start, end).peekable();
    let mut b = ours.within(start, end).peekable();
    // Walks both sorted sequences, cutting pieces at each other's ends.
    let (mut x, mut y) = (a.next(), b.next());
    loop {
        match (x, y) {
            (None, None) => break,
            (Some(p), None) => {
                out.drop.push((p.start, p.end));
                x = a.next();
            }
            (None, Some(q)) => {
                out.load.push(q);
                y = b.next();
            }
            (Some(p), Some(q)) if p.start < q.start => {
                let cut = p.end.min(q.start);
                out.drop.push((p.start, cut));
                x = p.after(cut).or_else(|| a.next());
            }
            (Some(p), Some(q)) if q.start < p.start => {
                let cut = q.end.min(p.start);
                out.load.push(Piece { end: cut, ..q });
                y = q.after(cut).or_else(|| b.next());
            }
            (Some(p), Some(q)) => {
                let cut = p.end.min(q.end);
                both.push((Piece { end: cut, ..q }, Piece { end: cut, ..p }));
                x = p.after(cut).or_else(|| a.next());
                y = q.after(cut).or_else(|| b.next());
            }
        }
    }
    out.compared = both.iter().map(|(q, _)| q.len() / PAGE).sum();
    let differing = compare_all(theirs, ours, &both)?;
    out.equal = out.compared - differing.iter().map(|q| q.len() / PAGE).sum::<u64>();
    out.load.extend(differing);
    out.load.sort_unstable_by_key(|q| q.start);
    Ok(out)
}

/// The pieces of ours, in page units, whose contents differ.
fn compare_all(theirs: &Pages, ours: &Pages, both: &[(Piece, Piece)]) -> Result<Vec<Piece>> {
    let chunks = chunks(both);
    let bytes: u64 = both.iter().map(|(q, _)| q.len()).sum();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(8);
    // What arrives is there in one order.
    if bytes < PARALLEL_FROM || threads == 1 || ours.are_arriving() {
        return compare_chunks(theirs, ours, &chunks);
    }
    let share = chunks.len().div_ceil(threads);
    std::thread::scope(|scope| {
        let parts: Vec<_> = chunks
            .chunks(share)
            .map(|part| {
                let work = move || compare_chunks(theirs, ours, part);
                (part, std::thread::Builder::new().spawn_scoped(scope, work))
            })
            .collect();
        let mut all = Vec::new();
        for (part, thread) in parts {
            all.extend(match thread {
                Ok(thread) => {
                    thread.join().map_err(|_| anyhow::anyhow!("comparison of pages panicked"))??
                }
                // No more threads may be made (a pids cgroup, a limit of memory): then it is done here.
                Err(_) => compare_chunks(theirs, ours, part)?,
            });
        }
        Ok(all)
    })
}

/// Pieces to be compared at one time: not more than the buffers hold.
#[derive(Debug, Default)]
struct Chunk {
    len: u64,
    ours: Vec<Piece>,
    theirs: Vec<Piece>,
}

/// Small pieces together, large ones cut.
fn chunks(both: &[(Piece, Piece)]) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    for (q, p) in both {
        let mut at = q.start;
        while at < q.end {
            let room = chunks.last().map_or(0, |open| CHUNK as u64 - open.len);
            let (open, room) = match chunks.last_mut() {
                Some(open) if room > 0 => (open, room),
                _ => {
                    chunks.push(Chunk::default());
                    continue;
                }
            };
            let end = q.end.min(at + room);
            open.len += end - at;
            open.ours.push(q.within(at, end));
            open.theirs.push(p.within(at, end));
            at = end;
        }
    }
    chunks
}

fn compare_chunks(theirs: &Pages, ours: &Pages, chunks: &[Chunk]) -> Result<Vec<Piece>> {
    let (mut left, mut right) = (vec![0u8; CHUNK], vec![0u8; CHUNK]);
    let mut out: Vec<Piece> = Vec::new();
    for chunk in chunks {
        let len = usize::try_from(chunk.len)?;
        let (l, r) = (&mut left[..len], &mut right[..len]);
        theirs.fetch(&chunk.theirs, l)?;
        ours.fetch(&chunk.ours, r)?;
        if l == r {
            continue;
        }
        let pages = l.chunks(PAGE as usize).zip(r.chunks(PAGE as usize));
        let own = chunk.ours.iter().flat_map(|piece| piece.in_parts(PAGE));
        for ((a, b), page) in pages.zip(own) {
            if a != b && out.last_mut().is_none_or(|last| !last.join(&page)) {
                out.push(page);
            }
        }
    }
    Ok(out)
}
