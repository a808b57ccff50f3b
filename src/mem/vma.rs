//! What an area is, in the words of `vma_entry`.
//!
//! `status` says the kind, `flags` are those of mmap that make the area again, `madv` has bit
//! 1 << MADV_X for each piece of advice that is in force, `shmid` is the id of the mapped file in
//! `files.img` or, for anonymous shared memory, of the object (`pagemap-shmem-ID.img`). `fd` is
//! always -1 in an image. `fdflags` says how the file must be opened.

use super::MemError;
use crate::pages::PAGE;
use crate::proc::maps::VmaName;
use crate::proc::smaps::{Smap, VmFlags};
use crate::tracee::room::TASK_SIZE;
use crate::{image::pb, sys::pid::NsPid};

/// An ordinary area; [`VSYSCALL`], [`AIORING`] and [`GUARD`] are none.
pub const REGULAR: u32 = 1 << 0;
/// `[vsyscall]`: the kernel's, the same everywhere.
pub const VSYSCALL: u32 = 1 << 2;
/// `[vdso]`: its code is content, a task may stand in it.
pub const VDSO: u32 = 1 << 3;
/// `[heap]`
pub const HEAP: u32 = 1 << 5;
/// A file, copy on write.
pub const FILE_PRIVATE: u32 = 1 << 6;
/// A file, changes go to it.
pub const FILE_SHARED: u32 = 1 << 7;
/// Anonymous memory shared by fork.
pub const ANON_SHARED: u32 = 1 << 8;
/// Memory of the task's own.
pub const ANON_PRIVATE: u32 = 1 << 9;
/// System V shared memory.
pub const SYSVIPC: u32 = 1 << 10;
/// A mapped socket.
pub const SOCKET: u32 = 1 << 11;
/// `[vvar]`, with `[vvar_vclock]`: clocks of the kernel, no content.
pub const VVAR: u32 = 1 << 12;
/// Completion ring of asynchronous I/O.
pub const AIORING: u32 = 1 << 13;
/// The mapped file is a memfd (beside a FILE_ bit, or without one when shared).
pub const MEMFD: u32 = 1 << 14;
/// No area but guard pages in others: MADV_GUARD_INSTALL.
pub const GUARD: u32 = 1 << 16;

/// Linux 6.11: pages may be dropped at any time.
pub const MAP_DROPPABLE: u32 = 0x08;

/// Beside MAP_LOCKED: only pages that are touched are locked (mlock2 with MLOCK_ONFAULT). mmap
/// itself knows no such flag; MAP_NONBLOCK without MAP_POPULATE means nothing to it.
pub const LOCK_ON_FAULT: u32 = libc::MAP_NONBLOCK.cast_unsigned();

/// Kinds of areas that map something, at a place of their own.
const MAPPED: u32 =
    VDSO | VVAR | FILE_PRIVATE | FILE_SHARED | ANON_SHARED | SYSVIPC | SOCKET | AIORING | MEMFD;

const SHARED: u32 = libc::MAP_SHARED.cast_unsigned();
const PRIVATE: u32 = libc::MAP_PRIVATE.cast_unsigned();

/// Checks the areas of an mm image: order, alignment, range.
pub fn check(mm: &pb::MmEntry, pid: NsPid) -> Result<(), MemError> {
    let mut last = 0u64;
    for vma in &mm.vmas {
        let (start, end) = (vma.start, vma.end);
        let wrong =
            |what| Err(MemError::BadImage { pid, what: format!("mapping {start:#x}-{end:#x} is {what}") });
        let has = |kinds: u32| vma.status & kinds != 0;
        // The first two pass by the checks below, so they must not claim a kind as well whose range is used later.
        if has(VSYSCALL) && has(GUARD | MAPPED) || has(GUARD) && has(MAPPED) {
            return wrong("of several kinds");
        }
        if vma.status & (VSYSCALL | GUARD) != 0 {
            // They lie over or beside the others.
            if start >= end || (vma.status & VSYSCALL == 0 && end > TASK_SIZE) {
                return wrong("out of range");
            }
            continue;
        }
        if start % PAGE != 0 || end % PAGE != 0 {
            return wrong("not made of whole pages");
        }
        if start < last || start >= end || end > TASK_SIZE {
            return wrong("out of order or out of range");
        }
        // One object is mapped at most, and what is mapped from one is no memory of the task's own.
        let object = vma.status & (FILE_PRIVATE | FILE_SHARED | ANON_SHARED);
        let kinds = object | vma.status & (VDSO | VVAR | AIORING);
        if kinds.count_ones() > 1 || object != 0 && has(ANON_PRIVATE) {
            return wrong("of several kinds");
        }
        // The content of private memory is written to it: it must not go to what others share. MAP_SHARED_VALIDATE
        // has the bits of both.
        let shared = match vma.flags & libc::MAP_TYPE.cast_unsigned() {
            SHARED => true,
            PRIVATE | MAP_DROPPABLE => false,
            _ => return wrong("neither shared nor private"),
        };
        // Memory that others share may also be mapped privately, as a file may.
        if has(FILE_SHARED) && !shared || has(FILE_PRIVATE | ANON_PRIVATE) && shared {
            return wrong("shared in one field and private in another");
        }
        last = end;
    }
    Ok(())
}

/// Advice that shows in VmFlags, and its MADV_ number.
const ADVICE: &[(VmFlags, i32)] = &[
    (VmFlags::RAND_READ, libc::MADV_RANDOM),
    (VmFlags::SEQ_READ, libc::MADV_SEQUENTIAL),
    (VmFlags::DONTCOPY, libc::MADV_DONTFORK),
    (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
    (VmFlags::HUGEPAGE, libc::MADV_HUGEPAGE),
    (VmFlags::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
    (VmFlags::DONTDUMP, libc::MADV_DONTDUMP),
    (VmFlags::WIPEONFORK, libc::MADV_WIPEONFORK),
];

/// The `madv` field of an area with these flags.
pub fn advice(flags: VmFlags) -> Option<u64> {
    // What a droppable area is made with is not to be said again.
    let implied = if flags.contains(VmFlags::DROPPABLE) {
        VmFlags::WIPEONFORK | VmFlags::DONTDUMP
    } else {
        VmFlags::empty()
    };
    let bits = ADVICE
        .iter()
        .filter(|(flag, _)| flags.difference(implied).contains(*flag))
        .fold(0, |bits, (_, madv)| bits | 1u64 << madv);
    (bits != 0).then_some(bits)
}

/// The mmap flags of an area, without those that come from what is mapped (MAP_ANONYMOUS).
pub fn map_flags(area: &Smap) -> u32 {
    let mut bits = if area.vma.shared {
        libc::MAP_SHARED.cast_unsigned()
    } else if area.flags.contains(VmFlags::DROPPABLE) {
        MAP_DROPPABLE
    } else {
        libc::MAP_PRIVATE.cast_unsigned()
    };
    for (flag, map) in [
        (VmFlags::GROWSDOWN, libc::MAP_GROWSDOWN),
        (VmFlags::NORESERVE, libc::MAP_NORESERVE),
        (VmFlags::LOCKED, libc::MAP_LOCKED),
        (VmFlags::HUGETLB, libc::MAP_HUGETLB),
        (VmFlags::SYNC, libc::MAP_SYNC),
    ] {
        if area.flags.contains(flag) {
            bits |= map.cast_unsigned();
        }
    }
    if area.flags.contains(VmFlags::LOCKED | VmFlags::LOCKONFAULT) {
        bits |= LOCK_ON_FAULT;
    }
    if area.flags.contains(VmFlags::HUGETLB) {
        bits |= area.kernel_page_bytes.trailing_zeros() << libc::MAP_HUGE_SHIFT;
    }
    bits
}

/// Protection that the kernel gives to the areas of the vdso; `None` for other areas.
pub fn kernel_prot(entry: &pb::VmaEntry) -> Option<u32> {
    let prot = match entry.status & (VDSO | VVAR) {
        VDSO => libc::PROT_READ | libc::PROT_EXEC,
        VVAR => libc::PROT_READ,
        _ => return None,
    };
    Some(prot.cast_unsigned())
}

/// An entry with everything that maps and VmFlags say; kind, file and shmid are still to come.
pub fn entry(area: &Smap) -> pb::VmaEntry {
    pb::VmaEntry {
        start: area.vma.start,
        end: area.vma.end,
        pgoff: area.vma.pgoff_bytes,
        shmid: 0,
        prot: area.vma.prot.cast_unsigned(),
        flags: map_flags(area),
        status: REGULAR,
        fd: -1,
        madv: advice(area.flags),
        fdflags: None,
        pkey: area.pkey.filter(|key| *key != 0),
        object_bytes: None,
        mempolicy: None,
        anon_name: match &area.vma.name {
            Some(VmaName::Anon(name) | VmaName::AnonShmem(name)) => Some(name.clone()),
            _ => None,
        },
    }
}

/// Whether pages of the area may be fetched late: anonymous memory that nothing forces to be there.
pub fn can_be_lazy(entry: &pb::VmaEntry) -> bool {
    let never = (libc::MAP_LOCKED | libc::MAP_HUGETLB).cast_unsigned();
    entry.status & (REGULAR | ANON_PRIVATE | VDSO | VVAR) == REGULAR | ANON_PRIVATE
        && entry.flags & never == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(flags: &str, shared: bool, page_kib: u32) -> Smap {
        let s = if shared { 's' } else { 'p' };
        let text =
            format!("1000-2000 rw-{s} 00000000 00:00 0 \nKernelPageSize: {page_kib} kB\nVmFlags: {flags} \n");
        crate::proc::smaps::parse(text.as_bytes()).unwrap().remove(0)
    }

    #[test]
    fn crafted_areas_are_refused() {
        let mm = |status, start, end| pb::MmEntry {
            vmas: vec![pb::VmaEntry { status, start, end, ..Default::default() }],
            ..Default::default()
        };
        for status in [GUARD, GUARD | ANON_SHARED, VSYSCALL, 0] {
            assert!(check(&mm(status, 0x3000, 0x1000), NsPid::new(1)).is_err(), "{status:#x}");
        }
        assert!(check(&mm(GUARD, 0x1000, u64::MAX), NsPid::new(1)).is_err());
        assert!(check(&mm(GUARD, 0x1000, 0x3000), NsPid::new(1)).is_ok());
    }

    #[test]
    fn flags_as_mmap_takes_them() {
        for (flags, shared, page_kib, want) in [
            ("rd wr", false, 4, 0x2),
            ("rd wr gd", false, 4, 0x102),
            ("rd wr nr", true, 4, 0x4001),
            ("rd wr lo", false, 4, 0x2002),
            ("rd wr lo lf", false, 4, 0x1_2002),
            ("rd wr ht de", false, 2048, 0x5404_0002),
            ("rd wr ht de", true, 1 << 20, 0x7804_0001),
            ("rd wr nr wf dd dp", false, 4, 0x4008),
        ] {
            assert_eq!(map_flags(&area(flags, shared, page_kib)), want, "{flags}");
        }
    }

    #[test]
    fn areas_of_two_kinds_are_refused() {
        let area = |status, flags: i32, start, end| pb::VmaEntry {
            status,
            flags: flags.cast_unsigned(),
            start,
            end,
            ..Default::default()
        };
        let good = |entry: &pb::VmaEntry| {
            check(&pb::MmEntry { vmas: vec![entry.clone()], ..Default::default() }, NsPid::new(1)).is_ok()
        };
        let (private, shared) = (libc::MAP_PRIVATE, libc::MAP_SHARED);
        let last = u64::MAX - PAGE + 1;
        for (status, flags, want) in [
            (REGULAR | ANON_PRIVATE, private, true),
            (REGULAR | ANON_PRIVATE, 8, true),
            (REGULAR | FILE_PRIVATE, private, true),
            (REGULAR | FILE_PRIVATE | MEMFD, private, true),
            (REGULAR | FILE_SHARED, shared, true),
            (REGULAR | ANON_SHARED, shared, true),
            (REGULAR | ANON_SHARED, private, true),
            (REGULAR | MEMFD, shared, true),
            (REGULAR | FILE_SHARED, libc::MAP_SHARED_VALIDATE, false),
            (REGULAR | FILE_SHARED, private, false),
            (REGULAR | FILE_PRIVATE, shared, false),
            (REGULAR | ANON_PRIVATE, shared, false),
            (REGULAR | ANON_PRIVATE | FILE_SHARED, shared, false),
            (REGULAR | ANON_PRIVATE, 0, false),
            (REGULAR | VDSO | ANON_PRIVATE, private, true),
            (AIORING, shared, true),
            (REGULAR | VDSO | FILE_SHARED, shared, false),
            (REGULAR | AIORING | ANON_SHARED, shared, false),
            (REGULAR | ANON_PRIVATE | ANON_SHARED, private, false),
            (REGULAR | ANON_PRIVATE | FILE_PRIVATE, private, false),
            (REGULAR | FILE_SHARED | MEMFD, shared, true),
        ] {
            assert_eq!(good(&area(status, flags, PAGE, 2 * PAGE)), want, "{status:#x} {flags}");
        }
        assert!(good(&area(VSYSCALL | ANON_PRIVATE, private, last - PAGE, last)));
        for kind in [VDSO, VVAR, GUARD, ANON_SHARED, FILE_SHARED] {
            assert!(!good(&area(VSYSCALL | kind, private, last - PAGE, last)), "{kind:#x}");
        }
    }

    #[test]
    fn advice_is_a_bit_for_each_number() {
        for (flags, want) in [
            ("rd wr", None),
            ("rd wr dc", Some(1 << 10)),
            ("rd wr wf", Some(1 << 18)),
            ("rd wr dd", Some(1 << 16)),
            ("rd wr rr nh", Some(1 << 1 | 1 << 15)),
            ("rd wr sr hg mg", Some(1 << 2 | 1 << 14 | 1 << 12)),
            ("rd wr nr wf dd dp", None),
        ] {
            assert_eq!(advice(area(flags, false, 4).flags), want, "{flags}");
        }
    }
}
