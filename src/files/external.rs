//! Files that are not ours: `--external file[MNT_ID:INODE]` at dump, `--inherit-fd fd[N]:KEY` at restore.

use std::os::fd::OwnedFd;

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::stat::fstat,
};

use super::{FdView, FileError, flags, path::to_path, regular::kind_name};
use crate::{
    image::pb,
    settings::{DumpSettings, InheritFd, RestoreSettings},
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

/// A duplicate of the descriptor that the user gave for `key`, which must be of the type `kind` (S_IFMT bits), if that is
/// known.
pub(super) fn inherited_by_key(
    settings: &RestoreSettings,
    key: &[u8],
    kind: Option<u32>,
) -> Result<Option<OwnedFd>, FileError> {
    let Some(given) = settings.inherit_fds.iter().find(|i| i.key == key) else { return Ok(None) };
    duplicate(given, kind).map(Some)
}

/// A duplicate of a descriptor that the user gave, if it is of the type that is wanted.
pub(super) fn duplicate(given: &InheritFd, kind: Option<u32>) -> Result<OwnedFd, FileError> {
    let name = [format!("--inherit-fd fd[{}]:", given.fd).as_bytes(), &given.key].concat();
    let fd = fd::dup(given.fd).map_err(FileError::path("duplicate the descriptor of", &name))?;
    let is = fstat(&fd).map_err(FileError::path("stat the descriptor of", &name))?.st_mode & libc::S_IFMT;
    match kind {
        Some(kind) if kind & libc::S_IFMT != is => Err(FileError::Changed {
            path: to_path(&name).to_owned(),
            what: format!("it is {}, but {} is wanted", kind_name(is), kind_name(kind)),
        }),
        _ => Ok(fd),
    }
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
        Some(key) => inherited_by_key(settings, key, entry.mode)?,
        None => None,
    };
    match found {
        Some(fd) => {
            let now =
                fcntl(&fd, FcntlArg::F_GETFL).map_err(FileError::path("read the flags of", &entry.name))?;
            if !allows(now, entry.flags.cast_signed()) {
                return Err(FileError::Changed {
                    path: to_path(&entry.name).to_owned(),
                    what: "the descriptor given by --inherit-fd is not open for reading or writing as the file was"
                        .into(),
                });
            }
            if now & libc::O_PATH == 0 {
                flags::apply(&fd, entry.flags)?;
            }
            Ok(Some(fd))
        }
        None if external => {
            Err(FileError::path("find an --inherit-fd for external", &entry.name)(Errno::ENOENT))
        }
        None => Ok(None),
    }
}

/// Whether a description with the flags `now` can do what one with the flags `then` could.
fn allows(now: i32, then: i32) -> bool {
    if (now | then) & libc::O_PATH != 0 {
        return then & libc::O_PATH != 0;
    }
    let (now, then) = (now & libc::O_ACCMODE, then & libc::O_ACCMODE);
    now == libc::O_RDWR || now == then
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access() {
        assert!(allows(libc::O_RDWR | libc::O_APPEND, libc::O_RDONLY));
        assert!(allows(libc::O_WRONLY, libc::O_WRONLY | libc::O_NONBLOCK));
        assert!(!allows(libc::O_RDONLY, libc::O_RDWR) && !allows(libc::O_PATH, libc::O_RDONLY));
        assert!(allows(libc::O_PATH, libc::O_PATH) && allows(libc::O_RDWR, libc::O_PATH));
    }
}
