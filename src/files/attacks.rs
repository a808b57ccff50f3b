//! A restore meets a directory in which somebody else has put links and files of their own: nothing of root's is opened,
//! filled, watched or removed.

use std::{
    fs::{self, Permissions},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink},
    },
    path::PathBuf,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::Uid,
};

use super::{FileError, tests::Cycle};

const NOBODY: u32 = 65534;

/// `theirs/d` belongs to nobody, who can do there what they like; `secret` is root's, with files of the same names.
struct Site(tempfile::TempDir);

impl Site {
    /// `None`: not root, so there is nobody to attack.
    fn new() -> Option<Self> {
        if !Uid::effective().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let site = Self(dir);
        for (name, mode, uid) in
            [("theirs", 0o755, NOBODY), ("theirs/d", 0o755, NOBODY), ("secret", 0o700, 0)]
        {
            fs::create_dir(site.at(name)).unwrap();
            fs::set_permissions(site.at(name), Permissions::from_mode(mode)).unwrap();
            chown(site.at(name), Some(uid), Some(uid)).unwrap();
        }
        site.file("secret/name", 0);
        Some(site)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, uid: u32) {
        fs::write(self.at(name), b"0123456789").unwrap();
        fs::set_permissions(self.at(name), Permissions::from_mode(0o600)).unwrap();
        chown(self.at(name), Some(uid), Some(uid)).unwrap();
    }

    fn open(&self, name: &str, flags: i32) -> OwnedFd {
        let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC | libc::O_NONBLOCK);
        open(&self.at(name), flags, Mode::empty()).unwrap()
    }

    /// What nobody does while the tree does not run: `d` leads to root's directory now.
    fn swap_directory(&self) {
        fs::rename(self.at("theirs/d"), self.at("theirs/old")).unwrap();
        symlink("../secret", self.at("theirs/d")).unwrap();
        lchown(self.at("theirs/d"), Some(NOBODY), Some(NOBODY)).unwrap();
    }

    /// The same for a file in it.
    fn swap_file(&self) {
        let _ = fs::remove_file(self.at("theirs/d/name"));
        symlink("../../secret/name", self.at("theirs/d/name")).unwrap();
        lchown(self.at("theirs/d/name"), Some(NOBODY), Some(NOBODY)).unwrap();
    }

    /// Root's directory is as it was.
    fn untouched(&self) {
        let names: Vec<_> =
            fs::read_dir(self.at("secret")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["name"]);
        let meta = fs::metadata(self.at("secret/name")).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777, meta.nlink()), (0, 0o600, 1));
        assert_eq!(fs::read(self.at("secret/name")).unwrap(), b"0123456789");
    }
}

fn refused(result: Result<impl Sized, FileError>, words: &str) {
    let Err(error) = result else { panic!("it was restored") };
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains(words), "{text}");
}

/// Dumps `fds` and closes them, and has them restored after `attack`: with a refusal that says `words`.
fn attacked(site: &Site, cycle: &Cycle, fds: Vec<OwnedFd>, attack: impl FnOnce(), words: &str) {
    assert_eq!(cycle.dump(&fds.iter().collect::<Vec<_>>()).unwrap(), []);
    drop(fds);
    attack();
    refused(cycle.restore(), words);
    site.untouched();
}

const LINK: &str = "is a symbolic link now, of user 65534";

#[test]
fn a_directory_on_the_way_becomes_a_link() {
    for flags in [libc::O_RDWR, libc::O_RDONLY | libc::O_NOFOLLOW, libc::O_PATH] {
        let Some(site) = Site::new() else { return };
        site.file("theirs/d/name", 0);
        let fd = site.open("theirs/d/name", flags);
        attacked(&site, &Cycle::new(), vec![fd], || site.swap_directory(), LINK);
    }
}

#[test]
fn a_file_becomes_a_link() {
    for flags in [libc::O_RDWR, libc::O_PATH] {
        let Some(site) = Site::new() else { return };
        site.file("theirs/d/name", 0);
        let fd = site.open("theirs/d/name", flags);
        attacked(&site, &Cycle::new(), vec![fd], || site.swap_file(), LINK);
    }
}

/// Where the kernel lets everybody link everything (fs.protected_hardlinks is 0), names lead to files of others.
#[test]
fn a_file_becomes_another_name_of_somebody_elses() {
    let Some(site) = Site::new() else { return };
    site.file("theirs/d/name", NOBODY);
    let fd = site.open("theirs/d/name", libc::O_RDWR);
    let cycle = Cycle::new();
    assert_eq!(cycle.dump(&[&fd]).unwrap(), []);
    fs::remove_file(site.at("theirs/d/name")).unwrap();
    fs::hard_link(site.at("secret/name"), site.at("theirs/d/name")).unwrap();
    refused(cycle.restore(), "belongs to user 0 and group 0, but belonged to 65534 and 65534");
}

#[test]
fn a_directory_that_is_open_becomes_a_link() {
    for flags in [libc::O_RDONLY | libc::O_DIRECTORY, libc::O_PATH] {
        let Some(site) = Site::new() else { return };
        let fd = site.open("theirs/d", flags);
        attacked(&site, &Cycle::new(), vec![fd], || site.swap_directory(), LINK);
    }
}

#[test]
fn a_fifo_becomes_a_link() {
    let Some(site) = Site::new() else { return };
    nix::unistd::mkfifo(&site.at("theirs/d/name"), Mode::S_IRWXU).unwrap();
    let fd = site.open("theirs/d/name", libc::O_RDWR);
    attacked(&site, &Cycle::new(), vec![fd], || site.swap_file(), LINK);
}

#[test]
fn a_deleted_file_is_not_made_behind_a_link() {
    for directory in [false, true] {
        let Some(site) = Site::new() else { return };
        site.file("theirs/d/gone", NOBODY);
        let fd = site.open("theirs/d/gone", libc::O_RDWR);
        fs::remove_file(site.at("theirs/d/gone")).unwrap();
        if directory {
            fs::remove_dir(site.at("theirs/d")).unwrap();
        }
        let swap = || {
            if directory {
                fs::create_dir(site.at("theirs/d")).unwrap();
            }
            site.swap_directory();
        };
        attacked(&site, &Cycle::new(), vec![fd], swap, LINK);
    }
}

/// Its own name leads somewhere else: it gets another one for the moment.
#[test]
fn a_deleted_file_does_not_go_through_a_planted_name() {
    let Some(site) = Site::new() else { return };
    site.file("theirs/d/name", NOBODY);
    let fd = site.open("theirs/d/name", libc::O_RDWR);
    fs::remove_file(site.at("theirs/d/name")).unwrap();
    let cycle = Cycle::new();
    assert_eq!(cycle.dump(&[&fd]).unwrap(), []);
    let number = fd.as_raw_fd();
    drop(fd);
    site.swap_file();
    let again = cycle.restore().unwrap();
    nix::unistd::write(&again[&number], b"written to the ghost").unwrap();
    site.untouched();
    assert!(fs::symlink_metadata(site.at("theirs/d/name")).unwrap().is_symlink(), "theirs is theirs");
}

/// A file that was deleted, but is called `theirs/other` too, and a dump that links it back.
fn linked(site: &Site) -> (Cycle, OwnedFd, PathBuf) {
    site.file("theirs/d/name", NOBODY);
    fs::hard_link(site.at("theirs/d/name"), site.at("theirs/other")).unwrap();
    let fd = site.open("theirs/d/name", libc::O_RDWR);
    fs::remove_file(site.at("theirs/d/name")).unwrap();
    let mut cycle = Cycle::new();
    cycle.dump.common.link_remap = true;
    assert_eq!(cycle.dump(&[&fd]).unwrap(), []);
    let link = fs::read_dir(site.at("theirs/d")).unwrap().next().unwrap().unwrap().path();
    (cycle, fd, link)
}

#[test]
fn a_hard_link_of_ours_becomes_a_link_to_another_file() {
    let Some(site) = Site::new() else { return };
    let (cycle, fd, link) = linked(&site);
    drop(fd);
    fs::remove_file(&link).unwrap();
    symlink("../../secret/name", &link).unwrap();
    refused(cycle.restore(), "is a symbolic link now, but was a regular file");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "it is not ours to remove");
    site.untouched();

    fs::remove_file(&link).unwrap();
    fs::hard_link(site.at("secret/name"), &link).unwrap();
    refused(cycle.restore(), "belongs to user 0 and group 0");
    fs::remove_file(&link).unwrap();
    site.untouched();
}

#[test]
fn the_directory_of_a_hard_link_of_ours_becomes_a_link() {
    let Some(site) = Site::new() else { return };
    let (cycle, fd, link) = linked(&site);
    drop(fd);
    let name = link.file_name().unwrap().to_owned();
    site.swap_directory();
    fs::copy(site.at("secret/name"), site.at("secret").join(&name)).unwrap();
    refused(cycle.restore(), LINK);
    fs::remove_file(site.at("secret").join(&name)).unwrap();
    site.untouched();
}

/// What is to be removed when the restore has succeeded is only what was taken.
#[test]
fn a_hard_link_that_was_replaced_in_the_meantime_is_not_removed() {
    let Some(site) = Site::new() else { return };
    let (cycle, _fd, link) = linked(&site);
    let mut files = super::FilesRestore::read(&cycle.store, &cycle.restore, &[super::tests::TABLE]).unwrap();
    files.open_early().unwrap();
    fs::remove_file(&link).unwrap();
    fs::write(&link, b"theirs").unwrap();
    files.commit();
    assert_eq!(fs::read(&link).unwrap(), b"theirs");
}

#[test]
fn a_watched_file_becomes_a_link() {
    let Some(site) = Site::new() else { return };
    site.file("theirs/d/name", NOBODY);
    let fd = crate::sys::event::inotify(libc::IN_CLOEXEC | libc::IN_NONBLOCK).unwrap();
    let path =
        std::ffi::CString::new(site.at("theirs/d/name").into_os_string().into_encoded_bytes()).unwrap();
    crate::sys::event::inotify_add(std::os::fd::AsFd::as_fd(&fd), &path, libc::IN_MODIFY).unwrap();
    attacked(&site, &Cycle::new(), vec![fd], || site.swap_directory(), LINK);
}

/// The same host, with directories moved and links of root in their place: as before.
#[test]
fn links_of_root_are_followed_and_all_with_the_option() {
    let Some(site) = Site::new() else { return };
    site.file("secret/name", 0);
    let fd = site.open("secret/name", libc::O_RDWR);
    let number = fd.as_raw_fd();
    let mut cycle = Cycle::new();
    assert_eq!(cycle.dump(&[&fd]).unwrap(), []);
    drop(fd);
    fs::rename(site.at("secret"), site.at("moved")).unwrap();
    symlink("moved", site.at("secret")).unwrap();
    let again = cycle.restore().unwrap();
    let shown = fs::read_link(format!("/proc/self/fd/{}", again[&number].as_raw_fd())).unwrap();
    assert_eq!(shown, site.at("moved/name"));

    lchown(site.at("secret"), Some(NOBODY), None).unwrap();
    refused(cycle.restore(), LINK);
    cycle.restore.allow_symlinks = true;
    cycle.restore().unwrap();
}
