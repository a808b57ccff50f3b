//! Instructions of the target's own code that an injection begins and ends with.
//!
//! Before our runner is mapped, and when it is unmapped, two pieces of existing code do: `syscall; ret`
//! and the "return from signal" stub that every C library has (`mov $15, %eax; syscall`). With them a
//! call can be followed by rt_sigreturn without any code of ours, so a target whose tracer dies between
//! the two heals itself.
//!
//! Code of shared mappings is not used: somebody else may change it between our look and the call. Code of private mappings
//! can still be changed by other threads and by who may write the file, so what it returns is not relied on.

use std::collections::HashMap;

use super::{RemoteAddr, RemoteMemory, TraceError};
use crate::{
    proc::maps::{Vma, VmaName},
    sys::pid::HostPid,
};

const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
const SIGRETURN: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05], &[0xb8, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05]];
/// Code beyond this much is not searched.
const SEARCH_LIMIT: u64 = 64 << 20;

/// Addresses of the two pieces.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gadgets {
    /// `syscall; ret`.
    pub(super) syscall_ret: RemoteAddr,
    /// `mov $15, %eax; syscall`, if there is one.
    pub(super) sigreturn: Option<RemoteAddr>,
}

/// A mapping of a file: device, inode, offset.
type Place = ((u32, u32), u64, u64);
/// Offsets of both pieces from the start of a mapping.
type Offsets = (Option<u64>, Option<u64>);

/// Where the pieces lie in files seen before: many tasks of a tree map the same C library.
#[derive(Debug, Default)]
pub struct GadgetCache {
    found: HashMap<Place, Offsets>,
}

fn find(text: &[u8], pattern: &[u8]) -> Option<u64> {
    let first = *pattern.first()?;
    let mut from = 0;
    while let Some(at) = text.get(from..)?.iter().position(|b| *b == first) {
        if text[from + at..].starts_with(pattern) {
            return Some((from + at) as u64);
        }
        from += at + 1;
    }
    None
}

impl GadgetCache {
    /// Finds both in private executable mappings; the vdso, which nobody can change, and C libraries first.
    pub(super) fn search(
        &mut self,
        pid: HostPid,
        maps: &[Vma],
        memory: &RemoteMemory,
    ) -> Result<Gadgets, TraceError> {
        let mut code: Vec<&Vma> = maps
            .iter()
            .filter(|v| v.prot & (libc::PROT_EXEC | libc::PROT_READ) == libc::PROT_EXEC | libc::PROT_READ)
            .filter(|v| !v.shared && !matches!(v.name, Some(VmaName::Vsyscall)))
            .collect();
        let likely = |v: &Vma| match v.path() {
            _ if matches!(v.name, Some(VmaName::Vdso)) => 0,
            Some(p) if p.windows(5).any(|w| w == b"/libc" || w == b"/ld-m") => 1,
            None => 2,
            Some(_) => 3,
        };
        code.sort_by_key(|v| likely(v));
        let (mut call, mut back) = (None, None);
        let mut searched = 0;
        for vma in code {
            let (c, b) = self.in_mapping(vma, memory);
            let checked = |offset: Option<u64>, patterns: &[&[u8]]| {
                let at = RemoteAddr(vma.start + offset?);
                let mut bytes = [0u8; 9];
                let n = memory.read_some(at, &mut bytes);
                patterns.iter().any(|p| bytes[..n].starts_with(p)).then_some(at)
            };
            call = call.or_else(|| checked(c, &[SYSCALL_RET]));
            back = back.or_else(|| checked(b, &SIGRETURN));
            searched += vma.len();
            if (call.is_some() && back.is_some()) || searched > SEARCH_LIMIT {
                break;
            }
        }
        Ok(Gadgets { syscall_ret: call.ok_or(TraceError::NoSyscall(pid))?, sigreturn: back })
    }

    fn in_mapping(&mut self, vma: &Vma, memory: &RemoteMemory) -> Offsets {
        let key = (vma.dev, vma.ino, vma.pgoff_bytes);
        if vma.ino != 0
            && let Some(known) = self.found.get(&key)
        {
            return *known;
        }
        let mut text = vec![0u8; usize::try_from(vma.len().min(SEARCH_LIMIT)).unwrap_or(0)];
        let n = memory.read_some(RemoteAddr(vma.start), &mut text);
        text.truncate(n);
        let found = (find(&text, SYSCALL_RET), SIGRETURN.iter().find_map(|p| find(&text, p)));
        if vma.ino != 0 {
            self.found.insert(key, found);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_overlapping_beginnings() {
        assert_eq!(find(&[0x0f, 0x0f, 0x05, 0xc3], SYSCALL_RET), Some(1));
        assert_eq!(find(&[0x0f, 0x05], SYSCALL_RET), None);
        assert_eq!(find(&[], SYSCALL_RET), None);
    }
}
