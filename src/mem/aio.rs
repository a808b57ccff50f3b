//! Rings of asynchronous I/O (io_setup): where the kernel puts the results of finished requests.
//!
//! A context is named by the address of its ring, a mapping of a nameless file (`/[aio] (deleted)`). Saved as CRIU does: the
//! area (AIORING), its pages with the header and the finished requests that nobody has taken yet, and a request count that
//! makes a ring of the same length. What the kernel knows beside the ring is where the next result goes, and how many can be
//! outstanding. Both come right when as many requests as the ring has seen since its beginning are made again, of nothing
//! from the program's own file: each puts one result into the ring, over which the saved pages are written afterwards.
//!
//! Requests that are under way cannot be saved, and the kernel does not tell of them. Those of block devices are waited for:
//! the tasks are stopped, so they end soon, and /sys tells what is under way on a device. IOCB_CMD_POLL on something that is
//! not ready yet shows nowhere; it is lost, as with CRIU.
//!
//! A child of fork inherits the mapping, but no context. It looks the same, and gets a context of its own.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use super::{MemError, vma};
use crate::{
    image::pb,
    pages::{PAGE, Pages},
    sys::pid::{HostPid, NsPid},
    tracee::{Arg, List, Want},
};

/// `f_type` of the file system that rings are on.
pub const FS_MAGIC: i64 = 0xa10a_10a1;
/// In the header of every ring.
const MAGIC: u32 = 0xa10a_10a1;
/// Bytes of the header, and of a result.
const HEADER: u64 = 32;
const EVENT: u64 = 32;
/// `struct iocb`.
const IOCB: usize = 64;
/// Requests handed in with one call.
const AT_ONCE: u64 = 256;
/// How long requests on block devices may take to end.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long what a device has done may take to become a result.
const FINISH: Duration = Duration::from_millis(10);

/// The header of a ring, as far as it is the task's business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    /// Results that the ring has room for.
    nr: u32,
    /// The next one to be taken.
    head: u32,
    /// Where the next one goes.
    tail: u32,
}

impl Header {
    /// `None` for something that is no ring of `len` bytes.
    fn parse(bytes: &[u8; HEADER as usize], len: u64) -> Option<Self> {
        let word = |at: usize| {
            let word = bytes.get(at..at + 4)?;
            Some(u32::from_ne_bytes(word.try_into().ok()?))
        };
        let (nr, head, tail) = (word(4)?, word(8)?, word(12)?);
        let room = len.checked_sub(HEADER)? / EVENT;
        let good = word(16)? == MAGIC && u64::from(nr) == room && head < nr && tail < nr;
        good.then_some(Self { nr, head, tail })
    }

    /// Results that wait to be taken.
    fn unread(self) -> u64 {
        (u64::from(self.tail) + u64::from(self.nr) - u64::from(self.head)) % u64::from(self.nr)
    }
}

/// The ring at `start` of a stopped task: what `mm_entry` says of it. `None` when there is no whole ring.
pub fn dump(tid: HostPid, start: u64, end: u64) -> Result<Option<pb::AioRingEntry>, MemError> {
    let failed = |source| MemError::Proc { pid: tid, file: "mem".into(), source };
    let memory = File::open(format!("/proc/{tid}/mem")).map_err(failed)?;
    let mut bytes = [0; HEADER as usize];
    memory.read_exact_at(&mut bytes, start).map_err(failed)?;
    let (len, Some(header)) = (end - start, Header::parse(&bytes, end - start)) else { return Ok(None) };
    let Ok(ring_len) = u32::try_from(len) else { return Ok(None) };
    // The kernel doubles what is asked for, and adds two.
    Ok(Some(pb::AioRingEntry { id: start, nr_req: header.nr.saturating_sub(2) / 2, ring_len }))
}

/// Waits until nothing is under way on any block device, or not for the stopped tasks at least; false if that takes too long.
pub fn settle() -> bool {
    let begun = Instant::now();
    let mut busy = devices();
    loop {
        // Each needs to be idle for one moment only: who is stopped begins nothing new.
        busy.retain(|path| !is_idle(&std::fs::read_to_string(path).unwrap_or_default()));
        if busy.is_empty() {
            // What has ended on a device may have to be finished by a thread of the kernel.
            std::thread::sleep(FINISH);
            return true;
        }
        if begun.elapsed() > PATIENCE {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where each block device tells how many reads and writes are under way.
fn devices() -> Vec<std::path::PathBuf> {
    let Ok(list) = std::fs::read_dir("/sys/block") else { return Vec::new() };
    list.flatten().map(|entry| entry.path().join("inflight")).collect()
}

fn is_idle(inflight: &str) -> bool {
    inflight.split_ascii_whitespace().all(|number| number == "0")
}

/// Bytes of the ring that io_setup makes for so many requests, on a machine with `processors` possible ones.
fn ring_bytes(nr_req: u32, processors: u64) -> u64 {
    let slots = u64::from(nr_req).max(processors * 4) * 2 + 2;
    (HEADER + slots * EVENT).next_multiple_of(PAGE)
}

/// Processors that the kernel has room for: `0-3` is four.
fn possible_processors(text: &str) -> Option<u64> {
    let last = text.trim().rsplit([',', '-']).next()?;
    last.parse::<u64>().ok()?.checked_add(1)
}

/// A ring of an image, checked.
#[derive(Debug)]
struct Ring {
    start: u64,
    len: u64,
    nr_req: u32,
    header: Header,
}

fn ring(
    pid: NsPid,
    mm: &pb::MmEntry,
    entry: &pb::AioRingEntry,
    pages: &Pages,
    processors: u64,
) -> Result<Ring, MemError> {
    let (start, len) = (entry.id, u64::from(entry.ring_len));
    let bad = |what: String| MemError::BadImage { pid, what };
    let is_area = |area: &&pb::VmaEntry| {
        area.status & vma::AIORING != 0 && (area.start, area.end) == (start, start.saturating_add(len))
    };
    if mm.vmas.iter().find(is_area).is_none() {
        return Err(bad(format!("there is no area of the ring of asynchronous I/O at {start:#x}")));
    }
    let pieces: Vec<_> = pages.within(start, start + PAGE).collect();
    let mut page = vec![0; PAGE as usize];
    if pieces.iter().map(crate::pages::Piece::len).sum::<u64>() != PAGE {
        return Err(bad(format!("the header of the ring of asynchronous I/O at {start:#x} is missing")));
    }
    pages.fetch(&pieces, &mut page)?;
    let header = page.first_chunk().and_then(|bytes| Header::parse(bytes, len));
    let header =
        header.ok_or_else(|| bad(format!("what is at {start:#x} is no ring of asynchronous I/O")))?;
    if ring_bytes(entry.nr_req, processors) != len {
        return Err(MemError::Unsupported {
            pid,
            what: format!("the ring of asynchronous I/O at {start:#x}"),
            reason: format!(
                "it has {len} bytes, and the kernel here, with room for {processors} processors, makes one of {} bytes",
                ring_bytes(entry.nr_req, processors)
            ),
        });
    }
    Ok(Ring { start, len, nr_req: entry.nr_req, header })
}

/// The rings of an address space that is being made.
#[derive(Debug, Default)]
pub struct Rings(Vec<Ring>);

impl Rings {
    /// Reads and checks what an image says of rings.
    pub fn read(pid: NsPid, mm: &pb::MmEntry, pages: &Pages) -> Result<Self, MemError> {
        let areas = mm.vmas.iter().filter(|area| area.status & vma::AIORING != 0).count();
        if areas != mm.aios.len() {
            let what = format!("{areas} areas of asynchronous I/O, but {} rings", mm.aios.len());
            return Err(MemError::BadImage { pid, what });
        }
        if areas == 0 {
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string("/sys/devices/system/cpu/possible");
        let processors = text.ok().and_then(|text| possible_processors(&text)).unwrap_or(1);
        let rings = mm.aios.iter().map(|entry| ring(pid, mm, entry, pages, processors));
        rings.collect::<Result<_, _>>().map(Self)
    }

    /// None at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes the contexts, when all other areas are mapped and before pages are filled: rings at their addresses, with the
    /// kernel's own counts. `file` is a descriptor that can be read, of a file that says so at once when nothing is asked for.
    pub fn plan(&self, list: &mut List, pid: NsPid, file: i32) {
        // The kernel chooses where a ring comes first; it must not choose where another one goes.
        for ring in &self.0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let args =
                [ring.start.into(), ring.len.into(), libc::PROT_NONE.into(), flags.into(), (-1i64).into()];
            list.call("mmap in the place of a ring", libc::SYS_mmap, &args, Want::Equal(ring.start));
        }
        let mut request = [0u8; IOCB];
        // IOCB_CMD_PREAD is 0; nothing is read to nowhere.
        if let Some(fd) = request.get_mut(20..24) {
            fd.copy_from_slice(&file.to_ne_bytes());
        }
        let request = list.bytes(&request);
        let most = self.0.iter().map(|ring| u64::from(ring.header.nr)).max().unwrap_or(0).min(AT_ONCE);
        let requests = list.space(usize::try_from(most * 8).unwrap_or(0));
        for index in 0..most {
            list.pointer(requests.at(index * 8), request);
        }
        for ring in &self.0 {
            let context = list.value(&0u64);
            let args = [ring.nr_req.into(), context.into()];
            list.call(format!("io_setup({})", ring.nr_req), libc::SYS_io_setup, &args, Want::Zero);
            let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let args = [Arg::Word(context), ring.len.into(), ring.len.into(), how.into(), ring.start.into()];
            list.call(
                format!("mremap of a ring to {:#x}", ring.start),
                libc::SYS_mremap,
                &args,
                Want::Equal(ring.start),
            );
            ring.plan_requests(list, pid, requests.into(), most);
        }
    }

    /// When pages are filled, which brings the headers: the contexts' own ids.
    pub fn plan_ids(&self, list: &mut List, pid: NsPid) {
        // An address space that has just been made gives them from 0 on.
        for (id, ring) in (0u32..).zip(&self.0) {
            write(list, pid, ring.start, &id.to_ne_bytes(), "id of a ring");
        }
    }
}

impl Ring {
    /// As many requests as it takes to have `head` results taken, and the others not.
    fn plan_requests(&self, list: &mut List, pid: NsPid, requests: Arg, most: u64) {
        let submit = |list: &mut List, count: u64| {
            let args = [self.start.into(), count.into(), requests];
            list.call(format!("io_submit of {count}"), libc::SYS_io_submit, &args, Want::Equal(count));
        };
        let at_once = most.min(u64::from(self.header.nr) / 2).max(1);
        let mut done = 0;
        let head = u64::from(self.header.head);
        while done < head {
            let count = at_once.min(head - done);
            submit(list, count);
            done += count;
            let now = u32::try_from(done).unwrap_or(0);
            write(list, pid, self.start + 8, &now.to_ne_bytes(), "head of a ring");
        }
        let mut left = self.header.unread();
        while left > 0 {
            let count = at_once.min(left);
            submit(list, count);
            left -= count;
        }
    }
}

/// Writes bytes of the list's own to an address of the process.
fn write(list: &mut List, pid: NsPid, at: u64, bytes: &[u8], what: &'static str) {
    let from = list.bytes(bytes);
    let local = list.value(&[at, bytes.len() as u64]);
    let remote = list.value(&[0u64, bytes.len() as u64]);
    list.pointer(remote, from);
    let args = [pid.into(), local.into(), 1u64.into(), remote.into(), 1u64.into(), 0u64.into()];
    list.call(what, libc::SYS_process_vm_readv, &args, Want::Equal(bytes.len() as u64));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(nr: u32, head: u32, tail: u32, magic: u32) -> [u8; 32] {
        let mut bytes = [0; 32];
        let words = [5, nr, head, tail, magic, 1, 0, 32];
        bytes.iter_mut().zip(words.into_iter().flat_map(u32::to_ne_bytes)).for_each(|(to, from)| *to = from);
        bytes
    }

    #[test]
    fn headers() {
        let good = Header::parse(&header(127, 3, 2, MAGIC), 4096).unwrap();
        assert_eq!((good.nr, good.unread()), (127, 126));
        assert_eq!(Header::parse(&header(127, 3, 7, MAGIC), 4096).unwrap().unread(), 4);
        assert_eq!(Header::parse(&header(127, 3, 3, MAGIC), 4096).unwrap().unread(), 0);
        for (bytes, len) in [
            (header(127, 3, 2, MAGIC + 1), 4096),
            (header(127, 127, 2, MAGIC), 4096),
            (header(127, 0, 127, MAGIC), 4096),
            (header(128, 3, 2, MAGIC), 4096),
            (header(127, 3, 2, MAGIC), 8192),
            (header(0, 0, 0, MAGIC), 32),
            (header(0, 0, 0, MAGIC), 0),
        ] {
            assert_eq!(Header::parse(&bytes, len), None);
        }
    }

    /// Seen on a machine with two processors.
    #[test]
    fn lengths() {
        assert_eq!(ring_bytes(10, 2), 4096);
        assert_eq!(ring_bytes(62, 2), 4096);
        assert_eq!(ring_bytes(500, 2), 32768);
        assert_eq!(ring_bytes(510, 2), 32768);
        assert_eq!(ring_bytes(62, 64), 20480);
        assert_eq!(possible_processors("0-1\n"), Some(2));
        assert_eq!(possible_processors("0\n"), Some(1));
        assert_eq!(possible_processors("0-3,8-11\n"), Some(12));
        assert_eq!(possible_processors("\n"), None);
        assert!(is_idle("       0        0\n") && !is_idle("       0        1\n"));
    }

    #[test]
    fn crafted_images_are_refused() {
        let area = |status| pb::VmaEntry { start: 0x1000, end: 0x2000, status, ..Default::default() };
        let ring = |id, ring_len| pb::AioRingEntry { id, nr_req: 62, ring_len };
        let said = |vmas, aios| {
            let mm = pb::MmEntry { vmas, aios, ..Default::default() };
            Rings::read(NsPid::new(7), &mm, &Pages::default()).map(drop).unwrap_err().to_string()
        };
        assert!(said(vec![area(vma::AIORING)], vec![]).contains("1 areas of asynchronous I/O, but 0 rings"));
        for entry in [ring(0x2000, 4096), ring(0x1000, 8192), ring(u64::MAX, 4096)] {
            assert!(said(vec![area(vma::AIORING)], vec![entry]).contains("there is no area of the ring"));
        }
        assert!(said(vec![area(vma::AIORING)], vec![ring(0x1000, 4096)]).contains("header"));
    }

    /// What goes into the image makes a ring of the same length again, whatever was asked for.
    #[test]
    fn request_counts() {
        for processors in [1, 2, 8, 64] {
            for asked in (1..3000).chain([60_000]) {
                let len = ring_bytes(asked, processors);
                let nr = u32::try_from((len - HEADER) / EVENT).unwrap();
                let saved = nr.saturating_sub(2) / 2;
                assert_eq!(ring_bytes(saved, processors), len, "{asked} requests, {processors} processors");
            }
        }
    }
}
