//! Character devices without state: opening the node again is all there is to it.

use std::{
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use super::path::to_path;

/// null, zero, full, random, urandom: (major 1, minor).
const MEMORY_DEVICES: &[u32] = &[3, 5, 7, 8, 9];

/// Where they are on every machine.
const USUAL_NAMES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];

/// Whether the device behaves the same for everybody who opens it.
pub(super) fn is_simple(rdev: u64) -> bool {
    libc::major(rdev) == 1 && MEMORY_DEVICES.contains(&libc::minor(rdev))
}

/// `--evasive-devices`: another name for a device whose own name `link` does not lead to it (any more), and the mode of
/// the node that has it.
pub(super) fn evade(link: &[u8], rdev: u64) -> Option<(Vec<u8>, u32)> {
    let node = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        (meta.file_type().is_char_device() && meta.rdev() == rdev).then(|| meta.mode())
    };
    if node(to_path(link)).is_some() {
        return None;
    }
    USUAL_NAMES.iter().find_map(|name| Some((name.as_bytes().to_vec(), node(Path::new(name))?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evades_only_where_needed() {
        let zero = std::fs::metadata("/dev/zero").unwrap().rdev();
        assert_eq!(evade(b"/dev/zero", zero), None);
        let name = |link: &[u8]| evade(link, zero).map(|(name, _)| name);
        assert_eq!(name(b"/container/dev/zero (deleted)"), Some(b"/dev/zero".to_vec()));
        assert_eq!(name(b"/dev/null"), Some(b"/dev/zero".to_vec()), "another device has the name now");
        assert_eq!(evade(b"/nowhere", 0), None);
    }
}
