//! Memory shared with targets: the runner, lists and their data, slots.
//!
//! crtool maps it too, so that lists are written and results read directly. Space is handed out once
//! and never taken back: an area lives for one injection or one restore.

use std::{
    mem::{offset_of, size_of},
    sync::Arc,
};

use super::{CallId, Data, List, RemoteAddr, TraceError, list::Slot};
use crate::sys::{
    clone::CloneArgs,
    mapping::Mapping,
    pod,
    runner::{self, Entry},
};

const PAGE: usize = 4096;
/// Calls whose first arguments are a range.
const RANGED: [i64; 5] =
    [libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_madvise, libc::SYS_mlock2];

/// The shared memory, our view and the target's address of it.
#[derive(Debug)]
pub struct Area {
    map: Arc<Mapping>,
    remote: RemoteAddr,
    next: usize,
}

/// A list that has its place in an area.
#[derive(Debug, Clone)]
pub struct Placed {
    /// Its first entry.
    pub start: RemoteAddr,
    entries: usize,
    data: RemoteAddr,
    label: String,
    names: Arc<Vec<std::borrow::Cow<'static, str>>>,
}

impl Area {
    /// Puts the runner at the start of `map`, which targets see at `remote`.
    pub fn new(map: Mapping, remote: RemoteAddr) -> Result<Self, TraceError> {
        let code = runner::code();
        map.write(0, code).map_err(TraceError::Area)?;
        Ok(Self { map: Arc::new(map), remote, next: code.len().next_multiple_of(64) })
    }

    /// Entry point of the runner in a target.
    pub fn runner(&self) -> RemoteAddr {
        self.remote
    }

    /// A `syscall` instruction in a target.
    pub fn bare_syscall(&self) -> RemoteAddr {
        self.remote.plus(runner::bare_syscall_offset())
    }

    /// Where it begins in a target.
    pub fn start(&self) -> RemoteAddr {
        self.remote
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Bytes handed out so far.
    pub fn used(&self) -> usize {
        self.next
    }

    /// Hands out `len` bytes, aligned to `align` (a power of two, at most a page).
    pub fn alloc(&mut self, len: usize, align: usize) -> Result<RemoteAddr, TraceError> {
        let at = self.next.next_multiple_of(align.clamp(1, PAGE));
        let end = at.checked_add(len).filter(|end| *end <= self.map.len());
        self.next = end.ok_or(TraceError::AreaFull { wanted: len, size: self.map.len() })?;
        Ok(self.remote.plus(at as u64))
    }

    fn offset(&self, addr: RemoteAddr) -> Result<usize, TraceError> {
        addr.0
            .checked_sub(self.remote.0)
            .and_then(|o| usize::try_from(o).ok())
            .ok_or(TraceError::Area(crate::sys::Errno::EFAULT))
    }

    /// Writes at an address inside.
    pub fn write(&self, addr: RemoteAddr, bytes: &[u8]) -> Result<(), TraceError> {
        self.map.write(self.offset(addr)?, bytes).map_err(TraceError::Area)
    }

    /// Reads from an address inside.
    pub fn read(&self, addr: RemoteAddr, bytes: &mut [u8]) -> Result<(), TraceError> {
        self.map.read(self.offset(addr)?, bytes).map_err(TraceError::Area)
    }

    /// Reads a plain value from an address inside.
    pub fn value<T: pod::Pod>(&self, addr: RemoteAddr) -> Result<T, TraceError> {
        let mut bytes = vec![0u8; size_of::<T>()];
        self.read(addr, &mut bytes)?;
        pod::from_bytes(&bytes).ok_or(TraceError::Area(crate::sys::Errno::EINVAL))
    }

    /// A new slot whose failure goes on at `on_fail`.
    pub fn slot(&mut self) -> Result<RemoteAddr, TraceError> {
        let at = self.alloc(size_of::<Slot>(), 64)?;
        self.write(at, &[0u8; size_of::<Slot>()])?;
        Ok(at)
    }

    /// Sets what the slot's thread does: first list, list after a failure.
    pub fn arm(&self, slot: RemoteAddr, start: RemoteAddr, on_fail: RemoteAddr) -> Result<(), TraceError> {
        self.write(slot.plus(16), &on_fail.0.to_ne_bytes())?;
        self.write(slot.plus(24), &start.0.to_ne_bytes())
    }

    /// Sets the list that [`Op::Next`](super::Op::Next) goes on with.
    pub fn set_next(&self, slot: RemoteAddr, next: RemoteAddr) -> Result<(), TraceError> {
        self.write(slot.plus(32), &next.0.to_ne_bytes())
    }

    /// Gives `list` its place and writes it.
    pub fn place(&mut self, list: &List) -> Result<Placed, TraceError> {
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
        })
    }

    /// What a call returned (negative errno on failure); meaningful once the list has run.
    pub fn result(&self, placed: &Placed, call: CallId) -> Result<i64, TraceError> {
        let at = placed.start.plus((call.0 * size_of::<Entry>()) as u64 + 80);
        self.value::<i64>(at)
    }

    /// Data of a list, as calls have left it.
    pub fn data(&self, placed: &Placed, data: Data, len: usize) -> Result<Vec<u8>, TraceError> {
        let mut bytes = vec![0u8; len];
        self.read(placed.data.plus(data.0), &mut bytes)?;
        Ok(bytes)
    }

    /// Takes back the failure that a slot reports; the entry to go on with to try the failed call again.
    pub fn retry(&self, slot: RemoteAddr) -> Result<RemoteAddr, TraceError> {
        let failed = self.value::<u64>(slot.plus(8))?;
        self.write(slot, &0u64.to_ne_bytes())?;
        Ok(RemoteAddr(failed))
    }

    /// Changes the id that the clone3 asks for whose failure a slot reports.
    pub fn set_child_id(&self, slot: RemoteAddr, id: i32) -> Result<(), TraceError> {
        let failed = self.value::<u64>(slot.plus(8))?;
        let args = self.value::<u64>(RemoteAddr(failed + 8))?;
        let ids = self.value::<u64>(RemoteAddr(args + offset_of!(CloneArgs, set_tid) as u64))?;
        self.write(RemoteAddr(ids), &id.to_ne_bytes())
    }

    /// The failure a slot reports, named by whichever of `lists` it happened in.
    pub fn failure(&self, slot: RemoteAddr, lists: &[&Placed]) -> Result<Option<TraceError>, TraceError> {
        if self.value::<u64>(slot)? == 0 {
            return Ok(None);
        }
        let failed = self.value::<u64>(slot.plus(8))?;
        for placed in lists {
            let size = size_of::<Entry>() as u64;
            let end = placed.start.0 + placed.entries as u64 * size;
            if (placed.start.0..end).contains(&failed) {
                let index = usize::try_from((failed - placed.start.0) / size).unwrap_or(0);
                let result = self.value::<i64>(RemoteAddr(failed + 80))?;
                let mut name = placed.names.get(index).map(ToString::to_string).unwrap_or_default();
                // Lists have these by the thousand, so their names do not say where.
                if RANGED.contains(&self.value::<i64>(RemoteAddr(failed))?) {
                    let at = self.value::<u64>(RemoteAddr(failed + 8))?;
                    let len = self.value::<u64>(RemoteAddr(failed + 16))?;
                    name = format!("{name} {at:#x}-{:#x}", at.wrapping_add(len));
                }
                return Ok(Some(TraceError::call(&placed.label, &name, index, result)));
            }
        }
        Ok(Some(TraceError::call("unknown list", "unknown call", 0, 0)))
    }
}

impl Placed {
    /// Address of data of this list in the target.
    pub fn data_addr(&self, data: Data) -> RemoteAddr {
        self.data.plus(data.0)
    }
}

impl Area {
    /// Stores a word and wakes those who wait for it.
    pub fn post(&self, word: RemoteAddr, value: u32) -> Result<(), TraceError> {
        self.write(word, &value.to_ne_bytes())?;
        crate::sys::futex::wake_all(self.map.addr() + self.offset(word)?).map_err(TraceError::Area)
    }
}
