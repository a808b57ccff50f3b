//! The vdso: kernel code in every address space, called by the C library through addresses it has kept.
//!
//! If the images hold the same vdso as this kernel has, it is simply mapped again where it was. If not (another
//! kernel), the old code stays at its place as ordinary memory, since threads and the C library have addresses
//! into it, and each of its entry points is overwritten by a jump to the one of the new vdso, which is mapped
//! elsewhere; an entry point that the new one lacks becomes a plain system call.
//!
//! A thread that was stopped inside the old vdso cannot go on there, because the data pages beside it are gone.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::{Context, Result, bail, ensure};
use goblin::elf::Elf;

use super::layout::status;
use crate::{
    image::pb,
    pages::{Pages, Piece},
    sys::pid::HostPid,
};

/// Most a vdso may take; 2 pages in Linux 6.18.
const VDSO_MAX: u64 = 64 << 10;

/// What has to be done for the vdso of one address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Plan {
    /// The task has none.
    None,
    /// The kernel's own at this address, data pages first, without what the task has unmapped of it.
    Same { at: u64, unmapped: Vec<(u64, u64)> },
    /// Old code at its place, with these bytes over it; the kernel's own at `at`.
    Foreign { start: u64, end: u64, at: u64, patches: Vec<(u64, Vec<u8>)> },
}

/// This kernel's vdso.
#[derive(Debug)]
pub(super) struct Own {
    /// Bytes before the code: the data pages.
    data_len: u64,
    code: Vec<u8>,
}

impl Own {
    /// Reads it from our own address space; `None` when we have none (vdso=0).
    pub(super) fn read() -> Result<Option<Self>> {
        let maps = crate::tracee::read_maps(HostPid::own())?;
        let Some(code) = maps.iter().find(|v| matches!(v.name, Some(crate::proc::maps::VmaName::Vdso)))
        else {
            return Ok(None);
        };
        let data = maps.iter().filter(|v| {
            matches!(v.name, Some(crate::proc::maps::VmaName::Vvar | crate::proc::maps::VmaName::VvarVclock))
        });
        let first = data.map(|v| v.start).min().unwrap_or(code.start);
        let mut bytes = vec![0u8; usize::try_from(code.len())?];
        File::open("/proc/self/mem")?
            .read_exact_at(&mut bytes, code.start)
            .context("read of our own vdso")?;
        Ok(Some(Self { data_len: code.start - first, code: bytes }))
    }

    /// It lies at `at`; what the images have no area for there is gone.
    fn same(&self, mm: &pb::MmEntry, at: u64) -> Plan {
        let end = at + self.data_len + self.code.len() as u64;
        let mut unmapped = Vec::new();
        let mut from = at;
        for vma in mm.vmas.iter().filter(|v| v.status & (status::VVAR | status::VDSO) != 0) {
            if from < vma.start && vma.start < end {
                unmapped.push((from, vma.start));
            }
            from = from.max(vma.end);
        }
        if from < end {
            unmapped.push((from, end));
        }
        Plan::Same { at, unmapped }
    }
}

/// Compares the vdso of an image with ours. `pids` is an address with room for ours.
pub(super) fn plan(mm: &pb::MmEntry, pages: &Pages, own: Option<&Own>, pids: u64) -> Result<Plan> {
    let Some(vdso) = mm.vmas.iter().find(|v| v.status & status::VDSO != 0) else { return data(mm, own) };
    let Some(own) = own else { bail!("the task has a vdso, this kernel offers none (vdso=0)") };
    let first = mm.vmas.iter().filter(|v| v.status & status::VVAR != 0).map(|v| v.start).min();
    let first = first.unwrap_or(vdso.start);
    ensure!(first <= vdso.start, "the data pages of the vdso lie behind its code");
    let len = vdso.end - vdso.start;
    ensure!(len <= VDSO_MAX, "a vdso of {len} bytes");
    let Some(old) = content(pages, vdso.start, vdso.end)? else {
        // Images without its pages: nothing to compare, the sizes have to do.
        ensure!(
            len == own.code.len() as u64 && vdso.start - first == own.data_len,
            "the vdso of the images is not in them, and has another size than this kernel's"
        );
        return Ok(own.same(mm, first));
    };
    if old == own.code && vdso.start - first == own.data_len {
        return Ok(own.same(mm, first));
    }
    let patches = patches(&old, vdso.start, &own.code, pids + own.data_len)?;
    Ok(Plan::Foreign { start: vdso.start, end: vdso.end, at: pids, patches })
}

/// A task without a vdso: it never had one, or has unmapped it, and the data pages beside it or not.
fn data(mm: &pb::MmEntry, own: Option<&Own>) -> Result<Plan> {
    let Some(data) = mm.vmas.iter().find(|v| v.status & status::VVAR != 0) else { return Ok(Plan::None) };
    let Some(own) = own else { bail!("the task has data pages of a vdso, this kernel offers none (vdso=0)") };
    ensure!(
        data.end - data.start <= own.data_len,
        "the task has more data pages of a vdso than this kernel, and no vdso to use them"
    );
    Ok(own.same(mm, data.start))
}

/// The bytes of an area, if all its pages are in the image.
fn content(pages: &Pages, start: u64, end: u64) -> Result<Option<Vec<u8>>> {
    let pieces: Vec<Piece> = pages.within(start, end).collect();
    if pieces.iter().map(Piece::len).sum::<u64>() != end - start {
        return Ok(None);
    }
    let mut bytes = vec![0u8; usize::try_from(end - start)?];
    pages.fetch(&pieces, &mut bytes)?;
    Ok(Some(bytes))
}

/// Entry points of a vdso: name, offset.
fn entries(elf: &[u8]) -> Result<Vec<(String, u64)>> {
    let elf = Elf::parse(elf).context("the vdso is no ELF file")?;
    let base = elf.program_headers.iter().find(|h| h.p_type == goblin::elf::program_header::PT_LOAD);
    let base = base.map_or(0, |h| h.p_vaddr);
    let mut found = Vec::new();
    for symbol in elf.dynsyms.iter().filter(|s| s.is_function() && s.st_value != 0) {
        if let Some(name) = elf.dynstrtab.get_at(symbol.st_name) {
            found.push((name.to_owned(), symbol.st_value.wrapping_sub(base)));
        }
    }
    Ok(found)
}

/// What each old entry point is overwritten with.
fn patches(old: &[u8], old_at: u64, new: &[u8], new_at: u64) -> Result<Vec<(u64, Vec<u8>)>> {
    let new_entries = entries(new)?;
    let mut patches: Vec<(u64, Vec<u8>)> = Vec::new();
    for (name, offset) in entries(old)? {
        let code = match new_entries.iter().find(|(n, _)| *n == name) {
            Some((_, to)) => jump(new_at + to),
            None => match system_call(&name) {
                Some(code) => code,
                None => bail!("the vdso of the images has {name}, which this kernel does not offer"),
            },
        };
        let end = usize::try_from(offset)?.checked_add(code.len());
        ensure!(end.is_some_and(|end| end <= old.len()), "entry point {name} outside of the vdso");
        // Aliases (clock_gettime, __vdso_clock_gettime) lie at one address.
        if !patches.iter().any(|(at, _)| *at == old_at + offset) {
            patches.push((old_at + offset, code));
        }
    }
    Ok(patches)
}

/// `movabs $to, %rax; jmp *%rax`.
fn jump(to: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    code.extend_from_slice(&to.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xe0]);
    code
}

/// `mov $nr, %eax; syscall; ret` for entry points that are a system call by another name.
fn system_call(name: &str) -> Option<Vec<u8>> {
    let number = match name.trim_start_matches("__vdso_") {
        "clock_gettime" => libc::SYS_clock_gettime,
        "gettimeofday" => libc::SYS_gettimeofday,
        "time" => libc::SYS_time,
        "getcpu" => libc::SYS_getcpu,
        "clock_getres" => libc::SYS_clock_getres,
        // With a state of its own that the C library asks for; -ENOSYS makes it use the system call.
        "getrandom" => return Some(vec![0x48, 0xc7, 0xc0, 0xda, 0xff, 0xff, 0xff, 0xc3]),
        _ => return None,
    };
    let mut code = vec![0xb8];
    code.extend_from_slice(&u32::try_from(number).ok()?.to_le_bytes());
    code.extend_from_slice(&[0x0f, 0x05, 0xc3]);
    Some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_entry_points() {
        let own = Own::read().unwrap().unwrap();
        let names: Vec<String> = entries(&own.code).unwrap().into_iter().map(|(n, _)| n).collect();
        assert!(names.iter().any(|n| n == "__vdso_clock_gettime"), "{names:?}");
        for (_, code) in patches(&own.code, 0x1000, &own.code, 0x9000).unwrap() {
            assert_eq!(code.len(), 12);
        }
    }

    #[test]
    fn rubbish_is_refused() {
        assert!(entries(&[0; 64]).is_err());
        assert!(entries(b"\x7fELF").is_err());
    }
}
