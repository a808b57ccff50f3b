//! The local descriptor table of an address space (modify_ldt(2)): segments that old programs and emulators load.
//!
//! It is read as the processor has it, eight bytes for each entry, and written by the kernel's own call, which allows only
//! segments of user space; all that it allows can be told from the bytes again. Empty entries at the end are left out.

use super::MemError;
use crate::{
    image::pb,
    sys::pid::NsPid,
    tracee::{CallId, Data, List, Results, Want},
};

/// Entries there can be (LDT_ENTRIES).
const ENTRIES: usize = 8192;
/// Bytes of the whole table.
pub(super) const LEN: usize = ENTRIES * 8;
const READ: u64 = 0;
/// Writing with all bits of `struct user_desc`.
const WRITE: u64 = 0x11;

/// Where the answer will be.
#[derive(Debug, Clone)]
pub(super) struct Question {
    call: CallId,
    data: Data,
}

/// Asks for the first `len` bytes of the table: 8 tell whether there is one.
pub(super) fn ask(list: &mut List, len: usize) -> Question {
    let data = list.space(len);
    let args = [READ.into(), data.into(), len.into()];
    Question { call: list.call("modify_ldt", libc::SYS_modify_ldt, &args, Want::Any), data }
}

impl Question {
    /// How many bytes were read: none where there is no table.
    pub(super) fn read_len(&self, results: &Results) -> Result<usize, MemError> {
        let result = results.value(self.call).map_err(MemError::Inside)?;
        // It returns an int in a long: a negative one looks huge.
        let result = i32::from_ne_bytes((result as u32).to_ne_bytes());
        match result {
            // CONFIG_MODIFY_LDT_SYSCALL is off.
            _ if result == -libc::ENOSYS => Ok(0),
            _ => usize::try_from(result).map_err(|_| MemError::Call {
                what: "modify_ldt",
                source: crate::sys::Errno::from_raw(-result),
            }),
        }
    }

    /// The table without empty entries at its end.
    pub(super) fn read(&self, results: &Results) -> Result<Vec<u8>, MemError> {
        let len = self.read_len(results)?;
        let table = results.data(self.data, len).map_err(MemError::Inside)?;
        let used =
            table.chunks(8).rposition(|entry| entry.iter().any(|byte| *byte != 0)).map_or(0, |n| n + 1);
        Ok(table.get(..used * 8).unwrap_or_default().to_vec())
    }
}

/// `struct user_desc` of the descriptor `entry` at number `index`; `None` for one that user space cannot have made.
fn user_desc(index: u32, entry: u64) -> Option<[u32; 4]> {
    let bits = |at: u32, len: u32| u32::try_from(entry >> at & ((1 << len) - 1)).unwrap_or(0);
    let base = bits(16, 24) | bits(56, 8) << 24;
    let limit = bits(0, 16) | bits(48, 4) << 16;
    let (kind, of_user, level, present) = (bits(40, 4), bits(44, 1), bits(45, 2), bits(47, 1));
    let (useable, long, wide, pages) = (bits(52, 1), bits(53, 1), bits(54, 1), bits(55, 1));
    if of_user != 1 || level != 3 || long != 0 || kind & 1 == 0 {
        return None;
    }
    let flags = wide
        | (kind >> 2 & 3) << 1
        | (kind >> 1 & 1 ^ 1) << 3
        | pages << 4
        | (present ^ 1) << 5
        | useable << 6;
    Some([index, base, limit, flags])
}

/// When no other address space is forked from this one.
pub(super) fn plan(mm: &pb::MmEntry, pid: NsPid, list: &mut List) -> Result<(), MemError> {
    let Some(table) = &mm.ldt else { return Ok(()) };
    let (entries, rest) = table.as_chunks::<8>();
    if entries.len() > ENTRIES || !rest.is_empty() {
        return Err(MemError::BadImage { pid, what: format!("a descriptor table of {} bytes", table.len()) });
    }
    for (index, entry) in (0u32..).zip(entries).filter(|(_, entry)| **entry != [0; 8]) {
        let what = || format!("descriptor {index} of the table: {:x?}", entry);
        let desc = user_desc(index, u64::from_le_bytes(*entry));
        let desc = desc.ok_or_else(|| MemError::BadImage { pid, what: what() })?;
        let desc = list.value(&desc);
        let args = [WRITE.into(), desc.into(), 16u64.into()];
        list.call(format!("modify_ldt of entry {index}"), libc::SYS_modify_ldt, &args, Want::Zero);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel makes a descriptor of a `struct user_desc` (fill_ldt).
    fn descriptor([_, base, limit, flags]: [u32; 4]) -> u64 {
        let bit = |n: u32| u64::from(flags >> n & 1);
        let contents = u64::from(flags >> 1 & 3);
        let kind = (bit(3) ^ 1) << 1 | contents << 2 | 1;
        u64::from(limit & 0xffff)
            | u64::from(base & 0xff_ffff) << 16
            | kind << 40
            | 1 << 44
            | 3 << 45
            | (bit(5) ^ 1) << 47
            | u64::from(limit >> 16 & 0xf) << 48
            | bit(6) << 52
            | bit(0) << 54
            | bit(4) << 55
            | u64::from(base >> 24) << 56
    }

    #[test]
    fn every_descriptor_comes_back() {
        for flags in 0..0x80 {
            let desc = [7, 0x8765_4321, 0xf_edcb, flags];
            assert_eq!(user_desc(7, descriptor(desc)), Some(desc), "{flags:#x}");
        }
    }

    #[test]
    fn descriptors_of_the_kernel_are_refused() {
        let good = descriptor([0, 0, 0xf_ffff, 1]);
        for bad in [good & !(1 << 44), good & !(3 << 45), good | 1 << 53, good & !(1 << 40)] {
            let mm = pb::MmEntry { ldt: Some(bad.to_le_bytes().to_vec()), ..Default::default() };
            assert!(plan(&mm, NsPid::new(1), &mut List::new("test")).is_err(), "{bad:#x}");
        }
        let odd = pb::MmEntry { ldt: Some(vec![0; 9]), ..Default::default() };
        assert!(plan(&odd, NsPid::new(1), &mut List::new("test")).is_err());
    }
}
