//! Character devices without state: opening the node again is all there is to it.

use crate::view::View;

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
pub(super) fn evade(view: &View, link: &[u8], rdev: u64) -> Option<(Vec<u8>, u32)> {
    let node = |path: &[u8]| {
        let stat = view.stat(path).ok()?;
        (stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == rdev).then_some(stat.st_mode)
    };
    if node(link).is_some() {
        return None;
    }
    USUAL_NAMES.iter().find_map(|name| Some((name.as_bytes().to_vec(), node(name.as_bytes())?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evades_only_where_needed() {
        let view = View::own(crate::view::Symlinks::None).unwrap();
        let zero = view.stat(b"/dev/zero").unwrap().st_rdev;
        assert_eq!(evade(&view, b"/dev/zero", zero), None);
        let name = |link: &[u8]| evade(&view, link, zero).map(|(name, _)| name);
        assert_eq!(name(b"/container/dev/zero (deleted)"), Some(b"/dev/zero".to_vec()));
        assert_eq!(name(b"/dev/null"), Some(b"/dev/zero".to_vec()), "another device has the name now");
        assert_eq!(evade(&view, b"/nowhere", 0), None);
    }
}
