//! Files that are not ours: `--external file[MNT_ID:INODE]` at dump, `--inherit-fd fd[N]:KEY` at restore.

use std::os::fd::OwnedFd;

use super::{FdView, FileError, flags};
use crate::{
    image::pb,
    settings::{DumpSettings, RestoreSettings},
    sys::{Errno, fd},
};

/// The key under which the user named this file as external: `file[mnt_id:inode]`, both hexadecimal.
pub(super) fn file_key(settings: &DumpSettings, view: &FdView<'_>) -> Option<Vec<u8>> {
    if settings.common.externals.is_empty() {
        return None;
    }
    let key = format!("file[{:x}:{:x}]", view.info.mnt_id?, view.stat.ino).into_bytes();
    settings.common.externals.iter().any(|e| e.key == key).then_some(key)
}

/// A duplicate of the descriptor that the user gave for `key`.
pub(super) fn inherited_by_key(settings: &RestoreSettings, key: &[u8]) -> Result<Option<OwnedFd>, FileError> {
    let Some(given) = settings.inherit_fds.iter().find(|i| i.key == key) else { return Ok(None) };
    fd::dup(given.fd).map(Some).map_err(FileError::path("duplicate the inherited descriptor of", key))
}

/// The descriptor that the user gave for this file, by its external key or by its path without the leading slash.
/// As CRIU does, its flags are set to those of the file where they can be.
pub(super) fn inherited(
    settings: &RestoreSettings,
    entry: &pb::RegFileEntry,
) -> Result<Option<OwnedFd>, FileError> {
    let external = entry.ext == Some(true);
    let key = if external { Some(&entry.name[..]) } else { entry.name.strip_prefix(b"/") };
    let found = match key {
        Some(key) => inherited_by_key(settings, key)?,
        None => None,
    };
    match found {
        Some(fd) => {
            flags::apply(&fd, entry.flags)?;
            Ok(Some(fd))
        }
        None if external => {
            Err(FileError::path("find an --inherit-fd for external", &entry.name)(Errno::ENOENT))
        }
        None => Ok(None),
    }
}
