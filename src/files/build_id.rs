//! The build id of ELF files: a note that the linker wrote, which changes with the content.

use std::{collections::HashMap, os::fd::AsFd};

use nix::sys::uio::pread;

use super::{DumpCx, FdView, FileError};

/// Note type NT_GNU_BUILD_ID.
const GNU_BUILD_ID: u32 = 3;
/// Notes larger than this are not read; real ones have a few hundred bytes.
const NOTES_LIMIT: u64 = 64 << 10;
/// More program headers than this are not looked at; real files have a dozen.
const HEADERS_LIMIT: usize = 256;
const PT_NOTE: u32 = 4;
const MAGIC: [u8; 4] = *b"\x7fELF";

/// Build ids of files looked at before, by device and inode.
#[derive(Debug, Default)]
struct Cache(HashMap<(u64, u64), Vec<u32>>);

/// The build id of a file in the words of the image; empty for files without.
pub(super) fn of(cx: &mut DumpCx<'_>, fd: &FdView<'_>) -> Result<Vec<u32>, FileError> {
    // Reading what a driver makes up may have effects, and is no ELF.
    if fd.stat.size < 64 || fd.link.starts_with(b"/proc/") || fd.link.starts_with(b"/sys/") {
        return Ok(Vec::new());
    }
    // Opening thousands of data files only to see that they are none takes a good part of a dump.
    let program = fd.stat.mode & 0o111 != 0 || memchr::memmem::find(fd.link, b".so").is_some();
    if !program && fd.fd >= 0 {
        return Ok(Vec::new());
    }
    let key = (fd.stat.dev, fd.stat.ino);
    if let Some(id) = cx.state::<Cache>().0.get(&key) {
        return Ok(id.clone());
    }
    let id = read(&fd.file()?).unwrap_or_default();
    cx.state::<Cache>().0.insert(key, id.clone());
    Ok(id)
}

/// Reads the build id, opening the file again for reading.
pub(super) fn read(file: &impl AsFd) -> Option<Vec<u32>> {
    let file = super::path::readable(file.as_fd()).ok()?;
    let at = |offset: u64, len: usize| {
        let mut bytes = vec![0u8; len];
        let got = pread(&file, &mut bytes, i64::try_from(offset).ok()?).ok()?;
        bytes.truncate(got);
        Some(bytes)
    };
    find(&at)
}

/// Finds the note by means of `at`, which reads from the file (possibly less than asked for).
fn find(at: &dyn Fn(u64, usize) -> Option<Vec<u8>>) -> Option<Vec<u32>> {
    let header = at(0, 64)?;
    if header.get(..4)? != MAGIC || *header.get(5)? != 1 {
        return None;
    }
    let wide = match header.get(4)? {
        1 => false,
        2 => true,
        _ => return None,
    };
    let (table, entry_size, count) = if wide {
        (word64(&header, 32)?, word16(&header, 54)?, word16(&header, 56)?)
    } else {
        (u64::from(word32(&header, 28)?), word16(&header, 42)?, word16(&header, 44)?)
    };
    let count = usize::from(count).min(HEADERS_LIMIT);
    let entry_size = usize::from(entry_size);
    if entry_size < if wide { 56 } else { 32 } {
        return None;
    }
    let headers = at(table, entry_size * count)?;
    for header in headers.chunks_exact(entry_size) {
        if word32(header, 0)? != PT_NOTE {
            continue;
        }
        let (offset, size) = if wide {
            (word64(header, 8)?, word64(header, 32)?)
        } else {
            (u64::from(word32(header, 4)?), u64::from(word32(header, 16)?))
        };
        let notes = at(offset, usize::try_from(size.min(NOTES_LIMIT)).ok()?)?;
        if let Some(id) = in_notes(&notes) {
            return Some(id);
        }
    }
    None
}

fn in_notes(mut notes: &[u8]) -> Option<Vec<u32>> {
    loop {
        let name_len = usize::try_from(word32(notes, 0)?).ok()?;
        let desc_len = usize::try_from(word32(notes, 4)?).ok()?;
        let r#type = word32(notes, 8)?;
        let name = notes.get(12..)?.get(..name_len)?;
        let desc_at = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let desc = notes.get(desc_at..)?.get(..desc_len)?;
        if r#type == GNU_BUILD_ID && name == b"GNU\0" && !desc.is_empty() {
            let words = desc.chunks(4).map(|piece| {
                let mut word = [0u8; 4];
                word.iter_mut().zip(piece).for_each(|(to, from)| *to = *from);
                u32::from_le_bytes(word)
            });
            return Some(words.collect());
        }
        notes = notes.get(desc_at.checked_add(desc_len.checked_next_multiple_of(4)?)?..)?;
    }
}

fn word16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn within(bytes: &[u8]) -> impl Fn(u64, usize) -> Option<Vec<u8>> {
        move |at, len| {
            let rest = bytes.get(usize::try_from(at).ok()?..)?;
            Some(rest.get(..len.min(rest.len()))?.to_vec())
        }
    }

    #[test]
    fn our_own_build_id_is_the_one_readelf_tells() {
        let id = read(&std::fs::File::open("/bin/sh").unwrap()).unwrap();
        let bytes: String = id.iter().flat_map(|w| w.to_le_bytes()).map(|b| format!("{b:02x}")).collect();
        let Ok(out) = std::process::Command::new("readelf").args(["-n", "/bin/sh"]).output() else {
            eprintln!("skipped: no readelf");
            return;
        };
        assert!(String::from_utf8_lossy(&out.stdout).contains(&bytes), "{bytes}");
    }

    #[test]
    fn text_has_none() {
        assert_eq!(read(&std::fs::File::open("/proc/self/status").unwrap()), None);
    }

    proptest! {
        #[test]
        fn never_panics(mut bytes: Vec<u8>, wide: bool) {
            let head = [0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1];
            bytes.splice(0..head.len().min(bytes.len()), head);
            let _ = find(&within(&bytes));
            let _ = in_notes(&bytes);
        }
    }
}
