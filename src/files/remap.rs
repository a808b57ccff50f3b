//! Files whose name is gone.
//!
//! Three ways, told apart by stat and never by the text ` (deleted)`:
//! - no name left at all (nlink 0): the file travels with the images as a ghost, see `ghost.rs`;
//! - names left elsewhere: a hard link `link_remap.N` is made beside the old name (`--link-remap`), and opened at restore;
//! - a file of /proc whose task is gone: at restore a task gets that pid for the moment of opening, see `procfs.rs`.
//!
//! `remap-fpath.img` says which file of `files.img` is to be had in which way.

use std::{
    collections::HashMap,
    ffi::CString,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    sys::{
        stat::{fstat, fstatat, lstat},
        statfs::{OVERLAYFS_SUPER_MAGIC, Statfs, fstatfs},
    },
    unistd::{AccessFlags, UnlinkatFlags, faccessat, linkat, unlinkat},
};

use super::{
    DumpCx, FdView, FileError, RestoreCx, Stat, ghost,
    path::{DELETED, proc_pid},
    procfs, regular,
};
use crate::{
    image::{ImageKind, TypedStore, pb},
    process_tree::ids::in_tree,
    sys::{
        Errno, handle,
        passing::{self, Failed, Origin, Step},
        pid::{HostPid, NsPid},
    },
    view::{Last, magic_link, split},
};

/// How the names of hard links begin that a dump makes, as CRIU's.
const LINK: &[u8] = b"link_remap.";

/// A hard link that was made for the images.
#[derive(Debug)]
struct HardLink {
    dir: Rc<OwnedFd>,
    name: CString,
    /// Device and inode of the file that it is a link of.
    file: (u64, u64),
}

impl HardLink {
    /// Removes it, unless somebody has put another file there.
    fn remove(&self) {
        let found = fstatat(&*self.dir, &*self.name, AtFlags::AT_SYMLINK_NOFOLLOW);
        if found.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.file) {
            let _ = unlinkat(&*self.dir, &*self.name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// What is remembered of remapped files while a tree is dumped.
#[derive(Debug, Default)]
pub(super) struct Remaps {
    /// Of `remap-fpath.img`.
    entries: Vec<pb::RemapFilePathEntry>,
    /// Ghosts by device and inode.
    ghosts: HashMap<(u64, u64), u32>,
    /// Entries of linked files by device and inode.
    linked: HashMap<(u64, u64), u32>,
    /// Hard links made by us.
    links: Vec<HardLink>,
    /// Directories that they are in.
    dirs: HashMap<Vec<u8>, Rc<OwnedFd>>,
}

impl Remaps {
    /// The links made belong to the images now.
    pub(super) fn keep(&mut self) {
        self.links.clear();
    }
}

impl Drop for Remaps {
    fn drop(&mut self) {
        self.links.iter().for_each(HardLink::remove);
    }
}

/// The name to store for the file, and what it takes to find it at restore. `id` is that of its entry.
pub(super) fn name(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Vec<u8>, FileError> {
    if fd.link.len() > 4095 {
        return Err(FileError::unsupported(
            "its path is longer than 4095 bytes (PATH_MAX): it cannot be opened again by one name",
            "",
        ));
    }
    let base = fd.link.strip_suffix(DELETED);
    let found = if fd.stat.nlink == 0 {
        None
    } else if is_at(cx, fd, fd.link)? {
        Some(fd.link)
    } else {
        match base {
            Some(base) if is_at(cx, fd, base)? => Some(base),
            _ => None,
        }
    };
    procfs::check(fd, HostPid::new(cx.settings.pid.as_raw()), found.is_some())?;
    if let Some(found) = found {
        return Ok(found.to_vec());
    }
    if let Some(pid) = dead_task(fd, base.unwrap_or(fd.link)) {
        let pid = in_tree(pid).bits();
        cx.state::<Remaps>().entries.push(remap(id, pid, pb::RemapType::Procfs));
        return Ok(base.unwrap_or(fd.link).to_vec());
    }
    let deleted_dir = fd.stat.kind() == libc::S_IFDIR && base.is_some();
    let no_name =
        fd.stat.nlink == 0 || deleted_dir || base.is_some_and(|base| is_of_lower_layer(cx, fd, base));
    if no_name {
        let remap_id = ghost(cx, fd)?;
        cx.state::<Remaps>().entries.push(remap(id, remap_id, pb::RemapType::Ghost));
        return Ok(base.unwrap_or(fd.link).to_vec());
    }
    let Some(base) = base else {
        return Err(FileError::unsupported(
            "another file is found at its path",
            "it may be mounted over, on a file system that was unmounted, or outside of this root directory",
        ));
    };
    match linked(cx, fd, base)? {
        Some(remap_id) => {
            cx.state::<Remaps>().entries.push(remap(id, remap_id, pb::RemapType::Linked));
        }
        None => {
            let remap_id = ghost(cx, fd)?;
            cx.state::<Remaps>().entries.push(remap(id, remap_id, pb::RemapType::Ghost));
        }
    }
    Ok(base.to_vec())
}

/// Writes `remap-fpath.img`, if there is anything to tell.
pub(super) fn write(cx: &mut DumpCx<'_>) -> Result<(), FileError> {
    let entries = std::mem::take(&mut cx.state::<Remaps>().entries);
    if !entries.is_empty() {
        cx.store.write_all(ImageKind::RemapFpath, None, &entries)?;
    }
    Ok(())
}

fn remap(orig_id: u32, remap_id: u32, r#type: pb::RemapType) -> pb::RemapFilePathEntry {
    pb::RemapFilePathEntry { orig_id, remap_id, remap_type: Some(r#type.into()) }
}

fn is_at(cx: &DumpCx<'_>, fd: &FdView<'_>, path: &[u8]) -> Result<bool, FileError> {
    Ok(cx.view()?.stat(path).is_ok_and(|found| Stat::new(&found).same_file(&fd.stat)))
}

/// Whether a deleted file is one of a lower layer of overlayfs: stat shows the names that it has there, but in the overlay it
/// has none any more, and what is in it cannot change. A file of the upper layer may have other names, and one that was
/// copied up cannot be told from one of the lower layer by its handle; only the kernel knows the names of both. So it is asked to make
/// one more for a moment, which it does only where there are others.
fn is_of_lower_layer(cx: &DumpCx<'_>, fd: &FdView<'_>, base: &[u8]) -> bool {
    /// In a handle of overlayfs, behind three bytes: version, this, length, flags.
    const MAGIC: u8 = 0xfb;
    const OF_UPPER: u8 = 0x4;
    let Ok(file) = fd.file() else { return false };
    let overlay = fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == OVERLAYFS_SUPER_MAGIC);
    if !overlay || fd.stat.kind() != libc::S_IFREG {
        return false;
    }
    let Ok((_, handle)) = handle::of(file, c"") else { return false };
    if handle.get(4) != Some(&MAGIC) || handle.get(6).is_none_or(|flags| flags & OF_UPPER != 0) {
        return false;
    }
    if !cx.frozen {
        // Nothing may be touched, not even for a moment: what is likely is assumed.
        return true;
    }
    let Ok((dir, _)) = cx.view().map_err(drop).and_then(|view| view.parent(base).map_err(drop)) else {
        return false;
    };
    let name = CString::new(format!(".crtool.{}.{}", std::process::id(), fd.stat.ino)).unwrap_or_default();
    let made = passing::open(dir.as_fd(), &[], &name, Origin::HardLink(file));
    matches!(made, Err(Failed { step: Step::Make, errno: Errno::ENOENT }))
}

/// The task whose directory under /proc the file was in, when that task is gone.
fn dead_task(fd: &FdView<'_>, path: &[u8]) -> Option<HostPid> {
    let pid = HostPid::new(proc_pid(path)?);
    let on_proc = nix::sys::statfs::fstatfs(fd.file().ok()?)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC);
    (on_proc && lstat(format!("/proc/{pid}").as_str()) == Err(Errno::ENOENT)).then_some(pid)
}

/// Whether the place of a deleted file is on the file system of the file, where it is made again. Another one may be mounted over it,
/// or its own may have been unmounted, which leaves a path that begins at the root of what was mounted.
fn is_on_its_file_system(cx: &DumpCx<'_>, fd: &FdView<'_>) -> Result<bool, FileError> {
    let path = fd.link.strip_suffix(DELETED).unwrap_or(fd.link);
    let (dir, ..) = cx.view()?.nearest(path).map_err(FileError::name("look for the place of", path))?;
    let there = fstat(&dir).map_err(FileError::path("stat the directory of", path))?;
    if there.st_dev == fd.stat.dev {
        return Ok(true);
    }
    // Files of overlayfs may show a device of their layer.
    let of =
        |object: BorrowedFd<'_>| fstatfs(object).map_err(FileError::path("look at the file system of", path));
    let (there, own) = (of(dir.as_fd())?, of(fd.file()?)?);
    let overlay = |fs: &Statfs| fs.filesystem_type() == OVERLAYFS_SUPER_MAGIC;
    Ok(overlay(&there) && overlay(&own) && there.filesystem_id() == own.filesystem_id())
}

/// The ghost of the file, made when it was not there yet.
fn ghost(cx: &mut DumpCx<'_>, fd: &FdView<'_>) -> Result<u32, FileError> {
    let key = (fd.stat.dev, fd.stat.ino);
    if !is_on_its_file_system(cx, fd)? {
        return Err(FileError::unsupported(
            "it is deleted, and its file system is not the one that is found at its place",
            "it may be mounted over, or unmounted; close the file",
        ));
    }
    if let Some(id) = cx.state::<Remaps>().ghosts.get(&key) {
        return Ok(*id);
    }
    let id = u32::try_from(cx.state::<Remaps>().ghosts.len()).unwrap_or(u32::MAX).saturating_add(1);
    ghost::dump(cx, fd, id)?;
    cx.state::<Remaps>().ghosts.insert(key, id);
    Ok(id)
}

/// The entry of a hard link beside the old name of the file, made when it was not there yet.
/// `None`: stat counts names, but the kernel knows of none.
fn linked(cx: &mut DumpCx<'_>, fd: &FdView<'_>, base: &[u8]) -> Result<Option<u32>, FileError> {
    let key = (fd.stat.dev, fd.stat.ino);
    if let Some(id) = cx.state::<Remaps>().linked.get(&key) {
        return Ok(Some(*id));
    }
    if !cx.settings.common.link_remap {
        return Err(FileError::unsupported(
            "its name is gone, but it has others",
            "--link-remap links it back beside its old name",
        ));
    }
    let (path, _) = split(base).ok_or(FileError::unsupported("its path has no directory", ""))?;
    let dir = match cx.state::<Remaps>().dirs.get(path) {
        Some(dir) => Rc::clone(dir),
        None => match cx.view()?.find(path, Last::Directory) {
            Ok(dir) => Rc::new(dir),
            Err(e) if e.is_absent() => {
                return Err(FileError::unsupported(
                    "its name is gone, and the directory of that name too",
                    "the file cannot be linked back; close it, or delete its other names",
                ));
            }
            Err(e) => return Err(FileError::name("open", path)(e)),
        },
    };
    cx.state::<Remaps>().dirs.insert(path.to_vec(), Rc::clone(&dir));
    let file = fd.file()?;
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    let (id, name) = loop {
        let id = cx.next_id();
        let name = [LINK, id.to_string().as_bytes()].concat();
        // Of a tree that runs, which is only looked at, nothing is linked.
        if !cx.frozen {
            break (id, name);
        }
        match linkat(AT_FDCWD, from.as_str(), &*dir, &name[..], AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => break (id, name),
            Err(Errno::EEXIST) => {}
            Err(Errno::ENOENT) => return Ok(None),
            Err(e) => {
                return Err(FileError::unsupported(
                    format!("its name is gone, and it cannot be linked back: {}", e.desc()),
                    "",
                ));
            }
        }
    };
    let path = [path.strip_suffix(b"/").unwrap_or(path), b"/", &name].concat();
    let name = CString::new(name).map_err(|_| FileError::path("use", base)(Errno::EINVAL))?;
    if cx.frozen {
        cx.state::<Remaps>().links.push(HardLink { dir, name, file: key });
    }
    let entry = pb::FileEntry {
        r#type: pb::FdTypes::Reg.into(),
        id,
        reg: Some(pb::RegFileEntry { id, name: path, ..Default::default() }.into()),
        ..Default::default()
    };
    cx.add_entry(entry);
    cx.state::<Remaps>().linked.insert(key, id);
    Ok(Some(id))
}

/// What is remembered of remapped files while a tree is restored.
#[derive(Debug, Default)]
pub(super) struct RestoreRemaps {
    by_file: HashMap<u32, (pb::RemapType, u32)>,
    /// The files of each remap, once that has been asked for.
    users: Option<HashMap<(i32, u32), Vec<u32>>>,
    /// Names of linked files.
    links: HashMap<u32, Vec<u8>>,
    /// Files that were made or found, by kind of remap and id; only those that several entries are for.
    objects: HashMap<(i32, u32), OwnedFd>,
    /// Descriptions that came with their files, by entry.
    descriptions: HashMap<u32, OwnedFd>,
    /// Attribute flags of ghosts, to be set in the end.
    attributes: Vec<(OwnedFd, u32)>,
    /// Hard links that are no longer needed when the restore has succeeded.
    used_links: Vec<HardLink>,
}

impl RestoreRemaps {
    /// The files that are remapped to this.
    fn users(&mut self, key: (i32, u32)) -> &[u32] {
        let by_file = &self.by_file;
        let users = self.users.get_or_insert_with(|| {
            let mut users: HashMap<_, Vec<u32>> = HashMap::new();
            for (file, (r#type, id)) in by_file {
                users.entry((i32::from(*r#type), *id)).or_default().push(*file);
            }
            users
        });
        users.get(&key).map_or(&[], Vec::as_slice)
    }

    /// Ids of linked files: they exist only for others.
    pub(super) fn link_ids(&self) -> impl Iterator<Item = u32> {
        self.links.keys().copied()
    }

    /// Tasks that must exist for a moment while files of /proc are opened.
    pub(super) fn dead_task_of(&self, file: u32) -> Option<NsPid> {
        match self.by_file.get(&file) {
            Some((pb::RemapType::Procfs, pid)) => i32::try_from(*pid).ok().map(NsPid::new),
            _ => None,
        }
    }

    /// Pids of all tasks of which files of /proc are open though they are gone.
    pub(super) fn dead_tasks(&self) -> Vec<NsPid> {
        let mut pids: Vec<NsPid> = self.by_file.keys().filter_map(|id| self.dead_task_of(*id)).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Removes the hard links that the dump had made: the restore succeeded.
    pub(super) fn commit(&mut self) {
        self.used_links.drain(..).for_each(|link| link.remove());
    }
}

/// Reads `remap-fpath.img`, when the entries of `files.img` are known.
pub(super) fn read(cx: &mut RestoreCx<'_>) -> Result<(), FileError> {
    let entries: Vec<pb::RemapFilePathEntry> = cx.store.read_all(ImageKind::RemapFpath, None)?;
    let mut remaps = RestoreRemaps::default();
    for entry in entries {
        // Written since the field exists; before, all were ghosts or links by number.
        let r#type = entry.remap_type();
        if r#type == pb::RemapType::Linked {
            let name = cx
                .entries
                .get(&entry.remap_id)
                .and_then(|file| file.reg.as_ref())
                .map(|reg| reg.name.clone())
                .ok_or_else(|| FileError::entry(entry.remap_id, "a remapped file is not there"))?;
            remaps.links.insert(entry.remap_id, name);
        }
        remaps.by_file.insert(entry.orig_id, (r#type, entry.remap_id));
    }
    *cx.state::<RestoreRemaps>() = remaps;
    Ok(())
}

/// The object behind an entry whose name is gone: to be opened again through /proc/self/fd. `None` for all others.
pub(super) fn object(cx: &mut RestoreCx<'_>, entry: &pb::RegFileEntry) -> Result<Option<OwnedFd>, FileError> {
    let Some((r#type, remap_id)) = cx.state::<RestoreRemaps>().by_file.get(&entry.id).copied() else {
        return Ok(None);
    };
    let key = (i32::from(r#type), remap_id);
    if let Some(object) = cx.state::<RestoreRemaps>().objects.get(&key) {
        return copy(object, entry).map(Some);
    }
    let object = match r#type {
        pb::RemapType::Ghost => {
            let maker = made_by(cx, remap_id);
            let made = ghost::open(cx, maker.as_ref().unwrap_or(entry), remap_id)?;
            let state = cx.state::<RestoreRemaps>();
            if let Some(attributes) = made.attributes {
                state.attributes.push((copy(&made.object, entry)?, attributes));
            }
            state.descriptions.extend(made.description);
            made.object
        }
        pb::RemapType::Linked => open_link(cx, entry, remap_id)?,
        pb::RemapType::Procfs => return Ok(None),
    };
    let state = cx.state::<RestoreRemaps>();
    // Each takes a descriptor, of which there may be few.
    if state.users(key).len() < 2 {
        return Ok(Some(object));
    }
    let duplicate = copy(&object, entry)?;
    state.objects.insert(key, object);
    Ok(Some(duplicate))
}

/// The entry whose description made the ghost `remap_id` by O_TMPFILE, if it is still there.
fn made_by(cx: &mut RestoreCx<'_>, remap_id: u32) -> Option<pb::RegFileEntry> {
    let users = cx.state::<RestoreRemaps>().users((i32::from(pb::RemapType::Ghost), remap_id)).to_vec();
    let entries = users.iter().filter_map(|id| cx.entries.get(id)?.reg.as_deref());
    entries.filter(|reg| reg.flags & ghost::TMPFILE != 0).min_by_key(|reg| reg.id).cloned()
}

/// Tells a restore that is only tried what the dump has met.
pub(super) fn hand_over(from: &mut DumpCx<'_>, to: &mut RestoreCx<'_>) {
    let entries = from.state::<Remaps>().entries.iter();
    let by_file = entries.map(|entry| (entry.orig_id, (entry.remap_type(), entry.remap_id))).collect();
    to.state::<RestoreRemaps>().by_file = by_file;
}

/// Whether the file is not to be had by its name.
pub(super) fn is_remapped(cx: &mut RestoreCx<'_>, file: u32) -> bool {
    cx.state::<RestoreRemaps>().by_file.contains_key(&file)
}

/// Whether a file without its name could be made again, or linked back: the directory must take it.
pub(super) fn would_make(cx: &mut RestoreCx<'_>, entry: &pb::RegFileEntry) -> Result<(), FileError> {
    match cx.state::<RestoreRemaps>().by_file.get(&entry.id) {
        None | Some((pb::RemapType::Procfs, _)) => return Ok(()),
        Some((pb::RemapType::Ghost | pb::RemapType::Linked, _)) => {}
    }
    let (dir, ..) = cx.view()?.nearest(&entry.name).map_err(FileError::name("make", &entry.name))?;
    let access = AccessFlags::W_OK | AccessFlags::X_OK;
    faccessat(AT_FDCWD, &*magic_link(dir.as_fd()), access, AtFlags::AT_EACCESS)
        .map_err(FileError::path("make, for a moment, a file in the place of the deleted", &entry.name))
}

/// Whether the file is one of /proc of a task that is gone.
pub(super) fn is_of_dead_task(cx: &mut RestoreCx<'_>, file: u32) -> bool {
    cx.state::<RestoreRemaps>().dead_task_of(file).is_some()
}

/// The description of an entry, where its file was made with one.
pub(super) fn description(cx: &mut RestoreCx<'_>, entry: u32) -> Option<OwnedFd> {
    cx.state::<RestoreRemaps>().descriptions.remove(&entry)
}

/// The last touch, when everybody has opened their files.
pub(super) fn before_resume(cx: &mut RestoreCx<'_>) -> Result<(), FileError> {
    for (object, attributes) in std::mem::take(&mut cx.state::<RestoreRemaps>().attributes) {
        ghost::set_attributes(&object, attributes)?;
    }
    Ok(())
}

fn copy(object: &OwnedFd, entry: &pb::RegFileEntry) -> Result<OwnedFd, FileError> {
    object.try_clone().map_err(|e| {
        FileError::path("duplicate", &entry.name)(Errno::from_raw(e.raw_os_error().unwrap_or(0)))
    })
}

/// Opens the hard link `link_remap.N`, by its old name when nobody has it, so that /proc shows the same path as before.
fn open_link(cx: &mut RestoreCx<'_>, entry: &pb::RegFileEntry, remap_id: u32) -> Result<OwnedFd, FileError> {
    let link = cx.state::<RestoreRemaps>().links.get(&remap_id).cloned().unwrap_or_default();
    let unlike = || FileError::entry(remap_id, "a linked file is not called link_remap.N");
    if !split(&link).is_some_and(|(_, name)| name.starts_with(LINK)) {
        return Err(unlike());
    }
    let view = cx.view()?;
    let object = view.find(&link, Last::Itself).map_err(FileError::name("open", &link))?;
    regular::validate(cx.settings, &object, &pb::RegFileEntry { name: link.clone(), ..entry.clone() })?;
    let stat = fstat(&object).map_err(FileError::path("stat", &link))?;
    let (dir, name) = view.parent(&link).map_err(FileError::name("open", &link))?;
    let used = HardLink { dir: Rc::new(dir), name, file: (stat.st_dev, stat.st_ino) };
    // Somebody may have the name, or its directory may be gone: then it is shown by the link's own.
    let made = match view.parent(&entry.name) {
        Ok((dir, name)) => passing::open(dir.as_fd(), &[], &name, Origin::HardLink(object.as_fd())),
        Err(_) => Err(Failed { step: Step::Begin, errno: Errno::ENOENT }),
    };
    cx.state::<RestoreRemaps>().used_links.push(used);
    match made {
        Ok(object) => Ok(object),
        Err(Failed { step: Step::Remove, errno }) => Err(FileError::path("remove", &entry.name)(errno)),
        Err(_) => Ok(object),
    }
}
