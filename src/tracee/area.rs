//! Memory of a target in which lists lie: the runner, lists and their data, slots.
//!
//! An area belongs to one address space alone: private memory, which crtool writes and reads through the kernel
//! (/proc/PID/mem or process_vm_writev(2)). It is not mapped into crtool or into any other task, because whoever may write
//! the memory of one task of a tree must not reach the code that another one executes.
//!
//! Space is handed out once and never taken back, since an area lives for one injection or one restore. What is written to
//! space that was just handed out is collected and goes to the target with [`Area::flush`], in one call for many pieces.
//! What is read back is what the target says of itself, and as little to be trusted as an image.

use std::{
    collections::HashSet,
    mem::{offset_of, size_of},
    sync::Arc,
};

use super::{
    CallId, Data, List, RemoteAddr, RemoteMemory, TraceError,
    list::{ChosenId, Names},
};
use crate::{
    kept::Packed,
    sys::{
        Errno,
        mapping::Mapping,
        pid::{HostPid, NsPid},
        pod, process_vm,
        runner::{self, Entry, Slot, flag},
    },
};

const PAGE: usize = 4096;
/// The first page holds the runner and the header; nothing in it is ever written by the target.
pub(crate) const CODE_LEN: usize = PAGE;
/// Collected at most before it is written.
const FLUSH_AT: usize = 1 << 20;
/// Longer ones are not packed: who adds to them would wait for that each time.
const PACK_MAX: usize = 64 << 10;
const ARCH_MAP_VDSO_64: u64 = 0x2003;
/// Calls whose first arguments are a range.
const RANGED: [i64; 5] =
    [libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_madvise, libc::SYS_mlock2];
/// First words of a header: chance does not make them.
const MAGIC: [u64; 2] = [0x6372_746f_6f6c_2061, 0x7265_6120_6f66_206c];

/// The header is the end of the code page. It says whose the area is, and how long, to an injection that comes after one
/// that was killed: magic words, the address, the length.
const HEADER_AT: usize = CODE_LEN - size_of::<[u64; 4]>();

/// The length of an area that begins at `at`, from its code page; `None` for any other page.
pub(super) fn len_of_stale(at: RemoteAddr, page: &[u8]) -> Option<u64> {
    let words: [u64; 4] = pod::from_bytes(page.get(HEADER_AT..CODE_LEN)?)?;
    let ours = page.starts_with(runner::code()) && words[..3] == [MAGIC[0], MAGIC[1], at.0];
    ours.then_some(words[3]).filter(|len| *len > 0 && len.is_multiple_of(PAGE as u64))
}

/// The code page of an area.
pub(crate) fn code_page(at: RemoteAddr, len: usize) -> Vec<u8> {
    let mut page = runner::code().to_vec();
    page.resize(HEADER_AT, 0);
    page.extend_from_slice(pod::bytes_of(&[MAGIC[0], MAGIC[1], at.0, len as u64]));
    page
}

/// How an area is written and read.
#[derive(Debug, Clone)]
pub(crate) enum Memory {
    /// Through /proc/PID/mem, whatever the protection.
    File(Arc<RemoteMemory>),
    /// Through process_vm_writev(2) of the task with this id, which must be alive.
    Process(HostPid),
    /// Our own memory, which a child of ours is going to inherit: the mapping begins where the area does.
    Own(Arc<Mapping>),
}

impl Memory {
    fn read(&self, base: RemoteAddr, at: RemoteAddr, bytes: &mut [u8]) -> Result<(), TraceError> {
        match self {
            Self::File(memory) => memory.read(at, bytes),
            Self::Process(pid) => match process_vm::read(*pid, &[(at.0, bytes.len())], bytes) {
                Ok(n) if n == bytes.len() => Ok(()),
                Ok(_) => Err(TraceError::Area(Errno::EFAULT)),
                Err(Errno::ESRCH) => Err(TraceError::Died(*pid)),
                Err(e) => Err(TraceError::Area(e)),
            },
            Self::Own(map) => map.read(offset(base, at)?, bytes).map_err(TraceError::Area),
        }
    }

    fn write(&self, base: RemoteAddr, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        match self {
            Self::File(memory) => memory.write(at, bytes),
            Self::Process(pid) => match process_vm::write(*pid, at.0, bytes) {
                Ok(n) if n == bytes.len() => Ok(()),
                Ok(_) => Err(TraceError::Area(Errno::EFAULT)),
                Err(Errno::ESRCH) => Err(TraceError::Died(*pid)),
                Err(e) => Err(TraceError::Area(e)),
            },
            Self::Own(map) => map.write(offset(base, at)?, bytes).map_err(TraceError::Area),
        }
    }
}

fn offset(base: RemoteAddr, at: RemoteAddr) -> Result<usize, TraceError> {
    at.0.checked_sub(base.0).and_then(|o| usize::try_from(o).ok()).ok_or(TraceError::Area(Errno::EFAULT))
}

/// The area of one address space.
#[derive(Debug)]
pub struct Area {
    remote: RemoteAddr,
    len: usize,
    next: usize,
    memory: Option<Memory>,
    /// What has been written to `[next - buffer.len(), next)` and not yet to the target.
    buffer: Vec<u8>,
    /// The buffer, as long as nobody writes to it.
    packed: Option<Packed>,
}

/// A list that has its place in an area.
#[derive(Debug, Clone)]
pub struct Placed {
    /// Its first entry.
    pub start: RemoteAddr,
    entries: usize,
    /// Its data lie before its entries.
    data: RemoteAddr,
    label: String,
    names: Arc<Names>,
    clones: Arc<Vec<ChosenId>>,
}

/// What the calls of lists are named in errors, kept once for all lists that are alike.
#[derive(Debug, Default)]
pub(crate) struct KnownNames(HashSet<Arc<Names>>);

impl KnownNames {
    /// Lets `placed` have its names in common with others.
    pub(crate) fn share(&mut self, placed: &mut Placed) {
        match self.0.get(&placed.names) {
            Some(names) => placed.names = Arc::clone(names),
            None => drop(self.0.insert(Arc::clone(&placed.names))),
        }
    }
}

/// A call that did not return what it must.
#[derive(Debug)]
pub struct Failure {
    /// Which, and what it returned.
    pub error: TraceError,
    /// The entry.
    pub(crate) entry: RemoteAddr,
    /// The id that it asked for, if it was a clone.
    pub(crate) chosen_id: Option<NsPid>,
    /// Where that id lies.
    id_at: Option<RemoteAddr>,
}

impl Area {
    /// An area of `len` bytes at `remote` in an address space that will be there later (see [`Self::attach`]). Its code
    /// page is written by somebody else.
    pub(crate) fn planned(remote: RemoteAddr, len: usize) -> Self {
        Self { remote, len, next: CODE_LEN, memory: None, buffer: Vec::new(), packed: None }
    }

    /// An area with its code page, written when it is flushed.
    pub(crate) fn with_code(remote: RemoteAddr, len: usize, memory: Memory) -> Self {
        let buffer = code_page(remote, len);
        Self { remote, len, next: CODE_LEN, memory: Some(memory), buffer, packed: None }
    }

    /// Says how the area is reached, once its address space is there.
    pub(crate) fn attach(&mut self, memory: Memory) {
        self.memory = Some(memory);
    }

    fn memory(&self) -> Result<&Memory, TraceError> {
        self.memory.as_ref().ok_or(TraceError::Area(Errno::ESRCH))
    }

    /// Entry point of the runner in a target.
    pub(crate) fn runner(&self) -> RemoteAddr {
        self.remote
    }

    /// A `syscall` instruction in a target.
    pub(crate) fn bare_syscall(&self) -> RemoteAddr {
        self.remote.plus(runner::bare_syscall_offset())
    }

    /// Where a thread is that has executed [`Op::Trap`].
    pub(crate) fn behind_trap(&self) -> RemoteAddr {
        self.remote.plus(runner::behind_trap_offset())
    }

    /// Where a thread is that has sent itself the signal of [`Op::Stop`].
    pub(crate) fn behind_stop(&self) -> RemoteAddr {
        self.remote.plus(runner::behind_stop_offset())
    }

    /// Where a thread goes on that was stopped so.
    pub(crate) fn next_entry(&self) -> RemoteAddr {
        self.remote.plus(runner::next_entry_offset())
    }

    /// Where it begins in a target.
    pub(crate) fn start(&self) -> RemoteAddr {
        self.remote
    }

    /// Most bytes it may have.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes handed out so far, from its beginning.
    pub(crate) fn used(&self) -> usize {
        self.next
    }

    /// Takes back what was handed out behind the first `used` bytes: nobody needs it any more.
    pub(crate) fn rewind(&mut self, used: usize) -> Result<(), TraceError> {
        self.flush()?;
        self.next = self.next.min(used);
        Ok(())
    }

    /// Hands out `len` zero bytes, aligned to `align` (a power of two, at most a page).
    pub(crate) fn alloc(&mut self, len: usize, align: usize) -> Result<RemoteAddr, TraceError> {
        self.unpack();
        // What is not mapped yet cannot be written; of an injection all is.
        if self.buffer.len() > FLUSH_AT && matches!(self.memory, Some(Memory::File(_))) {
            self.flush()?;
        }
        let at = self.next.next_multiple_of(align.clamp(1, PAGE));
        let end = at.checked_add(len).filter(|end| *end <= self.len);
        let end = end.ok_or(TraceError::AreaFull { wanted: len, size: self.len })?;
        self.buffer.resize(self.buffer.len() + (end - self.next), 0);
        self.next = end;
        Ok(self.remote.plus(at as u64))
    }

    /// Writes at an address that was handed out.
    pub(crate) fn write(&mut self, at: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.unpack();
        let from = offset(self.remote, at)?;
        let buffered = self.next - self.buffer.len();
        match from.checked_sub(buffered) {
            Some(from) => {
                let place = self.buffer.get_mut(from..from + bytes.len());
                place.ok_or(TraceError::Area(Errno::ERANGE))?.copy_from_slice(bytes);
                Ok(())
            }
            None if from + bytes.len() > buffered => Err(TraceError::Area(Errno::ERANGE)),
            None => self.memory()?.write(self.remote, at, bytes),
        }
    }

    /// What has been written has to wait until its address space is there, among that of many others.
    pub(crate) fn pack(&mut self) {
        if self.memory.is_none() && !self.buffer.is_empty() && self.buffer.len() <= PACK_MAX {
            self.packed = Some(Packed::new(&std::mem::take(&mut self.buffer)));
        }
    }

    fn unpack(&mut self) {
        if let Some(packed) = self.packed.take() {
            self.buffer = packed.bytes();
        }
    }

    /// Brings what has been written to the target.
    pub(crate) fn flush(&mut self) -> Result<(), TraceError> {
        self.unpack();
        if !self.buffer.is_empty() {
            let at = self.remote.plus((self.next - self.buffer.len()) as u64);
            self.memory()?.write(self.remote, at, &self.buffer)?;
            // Every process of a tree has an area, and few are written to at the same time.
            self.buffer = Vec::new();
        }
        Ok(())
    }

    /// Reads at an address inside, as the target has left it.
    fn read(&self, at: RemoteAddr, bytes: &mut [u8]) -> Result<(), TraceError> {
        self.memory()?.read(self.remote, at, bytes)
    }

    /// Reads a plain value at an address inside.
    pub(crate) fn value<T: pod::Pod>(&self, at: RemoteAddr) -> Result<T, TraceError> {
        let mut bytes = vec![0u8; size_of::<T>()];
        self.read(at, &mut bytes)?;
        pod::from_bytes(&bytes).ok_or(TraceError::Area(Errno::EINVAL))
    }

    /// A new slot, all zero.
    pub(crate) fn slot(&mut self) -> Result<RemoteAddr, TraceError> {
        self.alloc(size_of::<Slot>(), 64)
    }

    /// Sets what the slot's thread does: first list, list after a failure.
    pub(crate) fn arm(
        &mut self,
        slot: RemoteAddr,
        start: RemoteAddr,
        on_fail: RemoteAddr,
    ) -> Result<(), TraceError> {
        self.write(slot.plus(offset_of!(Slot, on_fail) as u64), &on_fail.0.to_ne_bytes())?;
        self.write(slot.plus(offset_of!(Slot, start) as u64), &start.0.to_ne_bytes())
    }

    /// Sets the list that [`Op::Next`](super::Op::Next) goes on with.
    pub(crate) fn set_next(&mut self, slot: RemoteAddr, next: RemoteAddr) -> Result<(), TraceError> {
        self.write(slot.plus(offset_of!(Slot, next) as u64), &next.0.to_ne_bytes())
    }

    /// Gives `list` its place.
    pub(crate) fn place(&mut self, list: &List) -> Result<Placed, TraceError> {
        let data = self.alloc(list.blob.len(), 64)?;
        let start = self.alloc(list.entries.len() * size_of::<Entry>(), 64)?;
        self.write(data, &list.blob)?;
        for &(at, to) in &list.pointers {
            if at + 8 <= list.blob.len() as u64 {
                self.write(data.plus(at), &data.plus(to).0.to_ne_bytes())?;
            }
        }
        self.write(start, pod::bytes_of_all(&list.entries))?;
        for (at, address) in list.addresses(start, data) {
            self.write(start.plus(at), &address.to_ne_bytes())?;
        }
        Ok(Placed {
            start,
            entries: list.entries.len(),
            data,
            label: list.label.to_string(),
            names: Arc::clone(&list.names),
            clones: Arc::new(list.clones.clone()),
        })
    }

    /// What a list that has run has left: results of its calls and its data.
    pub fn results(&self, placed: &Placed) -> Result<Results, TraceError> {
        let entries = usize::try_from(placed.start.0 - placed.data.0).unwrap_or(0);
        let mut bytes = vec![0u8; entries + placed.entries * size_of::<Entry>()];
        self.read(placed.data, &mut bytes)?;
        Ok(Results { bytes, entries })
    }

    /// Takes back the failure that a slot reports.
    pub(crate) fn retry(&mut self, slot: RemoteAddr) -> Result<(), TraceError> {
        self.write(slot.plus(offset_of!(Slot, status) as u64), &0u64.to_ne_bytes())
    }

    /// Changes the id that a failed clone asks for.
    pub(crate) fn set_chosen_id(&mut self, failure: &Failure, id: NsPid) -> Result<(), TraceError> {
        self.write(failure.id_at.ok_or(TraceError::Area(Errno::EINVAL))?, &id.get().to_ne_bytes())
    }

    /// The failure a slot reports, named by whichever of `lists` it happened in.
    pub(crate) fn failure(&self, slot: RemoteAddr, lists: &[&Placed]) -> Result<Option<Failure>, TraceError> {
        let slot: Slot = self.value(slot)?;
        if slot.status != runner::FAILED {
            return Ok(None);
        }
        let at = RemoteAddr(slot.failed);
        for placed in lists {
            let size = size_of::<Entry>() as u64;
            let end = placed.start.0 + placed.entries as u64 * size;
            if !(placed.start.0..end).contains(&at.0) {
                continue;
            }
            let index = usize::try_from((at.0 - placed.start.0) / size).unwrap_or(0);
            let entry: Entry = self.value(at)?;
            let mut name = placed.names.of(index).to_owned();
            // Lists have these by the thousand, so their names do not say where.
            if RANGED.contains(&entry.op) {
                let [at, len, ..] = entry.args;
                name = format!("{name} {at:#x}-{:#x}", at.wrapping_add(len));
            }
            match entry.op {
                libc::SYS_pidfd_getfd if entry.flags & flag::EQUAL != 0 => {
                    name = format!("{name} as {}", entry.expect);
                }
                libc::SYS_arch_prctl if entry.args[0] == ARCH_MAP_VDSO_64 => {
                    name = format!("{name} at {:#x}", entry.args[1]);
                }
                libc::SYS_rt_sigaction => name = format!("{name} of signal {}", entry.args[0]),
                libc::SYS_fcntl => name = format!("{name} of descriptor {}", entry.args[0]),
                _ => {}
            }
            let error = TraceError::call(&placed.label, &name, index, entry.result.cast_signed());
            let chosen = placed.clones.iter().find(|clone| clone.entry == index);
            return Ok(Some(Failure {
                error,
                entry: at,
                chosen_id: chosen.map(|clone| clone.tid),
                id_at: chosen.map(|clone| placed.data.plus(clone.set_tid)),
            }));
        }
        let error = TraceError::call("unknown list", "unknown call", 0, 0);
        Ok(Some(Failure { error, entry: at, chosen_id: None, id_at: None }))
    }

    /// Whether a thread has come to the end of its list, see [`Slot::done`].
    pub(super) fn is_done(&self, slot: RemoteAddr) -> Result<bool, TraceError> {
        Ok(self.value::<Slot>(slot)?.done == 1)
    }
}

/// What a list that has run has left.
#[derive(Debug)]
pub struct Results {
    /// The list's data and entries.
    bytes: Vec<u8>,
    /// Where the entries begin.
    entries: usize,
}

impl Results {
    /// What a call returned (a negative error number on failure).
    pub fn value(&self, call: CallId) -> Result<i64, TraceError> {
        let at = self.entries + call.0 * size_of::<Entry>() + offset_of!(Entry, result);
        let bytes = self.bytes.get(at..at + size_of::<i64>());
        bytes.and_then(pod::from_bytes).ok_or(TraceError::Area(Errno::ERANGE))
    }

    /// Data of the list, as its calls have left it.
    pub fn data(&self, data: Data, len: usize) -> Result<&[u8], TraceError> {
        let at = usize::try_from(data.0).map_err(|_| TraceError::Area(Errno::ERANGE))?;
        self.bytes.get(at..at.saturating_add(len)).ok_or(TraceError::Area(Errno::ERANGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracee::Want;

    #[test]
    fn a_header_tells_areas_from_everything_else() {
        let at = RemoteAddr(0x7000_0000);
        let page = code_page(at, 3 * PAGE);
        assert_eq!(page.len(), CODE_LEN);
        assert_eq!(len_of_stale(at, &page), Some(3 * PAGE as u64));
        assert_eq!(len_of_stale(RemoteAddr(0x7000_1000), &page), None, "a copy elsewhere is not ours");
        for flipped in [0, 100, HEADER_AT, HEADER_AT + 8, HEADER_AT + 16] {
            let mut other = page.clone();
            other[flipped] ^= 1;
            assert_eq!(len_of_stale(at, &other), None, "{flipped}");
        }
        assert_eq!(len_of_stale(at, &page[..100]), None);
    }

    #[test]
    fn what_is_written_before_the_memory_is_there_comes_later() {
        let len = 4 * PAGE;
        let map = Arc::new(Mapping::private(len, None).unwrap());
        let at = RemoteAddr(map.addr() as u64);
        let mut area = Area::planned(at, len);
        let mut list = List::new("test");
        let word = list.value(&7u64);
        let call = list.call("getpid", libc::SYS_getpid, &[word.into()], Want::Ok);
        let placed = area.place(&list).unwrap();
        let slot = area.slot().unwrap();
        area.pack();
        area.arm(slot, placed.start, RemoteAddr(1)).unwrap();
        assert!(area.flush().is_err(), "nobody to flush to");
        area.pack();
        area.attach(Memory::Own(map));
        area.flush().unwrap();
        area.set_next(slot, RemoteAddr(2)).unwrap();
        let slot: Slot = area.value(slot).unwrap();
        assert_eq!((slot.start, slot.on_fail, slot.next), (placed.start.0, 1, 2));
        let results = area.results(&placed).unwrap();
        assert_eq!(results.data(word, 8).unwrap(), 7u64.to_ne_bytes());
        assert_eq!(results.value(call).unwrap(), 0);
        assert!(results.data(word, 1 << 20).is_err());
        assert!(area.alloc(len, 1).is_err());
    }
}
