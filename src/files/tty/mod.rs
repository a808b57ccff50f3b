//! Terminals: pseudoterminals of the tree, /dev/tty, and the terminal of a shell job.
//!
//! Saved: descriptions (`tty.img` members of `files.img`), settings once per end (`tty-info.img`), what waits to be read
//! (`tty-data.img`), session and foreground group. A pty whose master is in the tree is made again under its number, or, if
//! that is taken by now, under another. One whose master is outside is the terminal of the caller's shell (`--shell-job`, see `job.rs`), or
//! named (`--external tty[RDEV:DEV]`, `--inherit-fd`). Its session's leader takes it as controlling terminal in its own list.

mod content;
mod job;
mod pair;
mod settings;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub(crate) use self::job::{JobGroups, JobTerminal};
use super::{
    Descriptors, DumpCx, DumpTables, FdView, FileError, FileKind, FilesRestore, Opened, Place, RestoreCx,
    flags, kind::packed_in, pipe_data::io_error, regular,
};
use crate::{
    image::{ImageKind, TypedStore, pb},
    proc::stat,
    process_tree::ids::in_tree,
    sys::{
        pid::{HostPid, NsPid},
        tty,
    },
    tracee::List,
};

const PTMX: (u32, u32) = (5, 2);
const CTTY: (u32, u32) = (5, 0);
/// CRIU's number for /dev/tty, where it would keep the number of a pty.
const CTTY_INDEX: u32 = 1006;
/// Ids from here on are ours: terminals for which CRIU has no number of their own.
const OWN_IDS: u32 = 1 << 20;
const SLAVES: std::ops::Range<u32> = 136..144;
const HINT: &str = "use --shell-job for the terminal of a shell, or --external tty[RDEV:DEV]";

/// A terminal.
#[derive(Debug)]
pub(super) struct Tty;

/// A pty met at dump; descriptors of ours keep it until the end.
#[derive(Debug, Default)]
struct Met {
    master: Option<OwnedFd>,
    slave: Option<OwnedFd>,
    /// Somebody who holds a slave has it as controlling terminal: session, foreground group.
    controls: Option<(u32, u32)>,
}

#[derive(Debug, Default)]
struct Dumped {
    infos: BTreeMap<u32, pb::TtyInfoEntry>,
    ptys: BTreeMap<u32, Met>,
    own_ids: u32,
}

impl FileKind for Tty {
    type Entry = pb::TtyFileEntry;
    const NAME: &'static str = "terminal";
    const TYPE: pb::FdTypes = pb::FdTypes::Tty;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.stat.kind() == libc::S_IFCHR
            && fd.flags() & libc::O_PATH.cast_unsigned() == 0
            && (SLAVES.contains(&libc::major(fd.stat.rdev))
                || [PTMX, CTTY, (5, 1)].contains(&node(fd.stat.rdev)))
    }

    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let entry = |info, regf_id| {
            Ok(pb::TtyFileEntry { id, tty_info_id: info, flags: fd.flags(), fown: fd.fown()?, regf_id })
        };
        if is_external(cx, fd) {
            let info = external_info(cx, fd);
            return entry(info, Some(regular::add_path_of(cx, fd)?));
        }
        let settings = settings::dump(fd.file()?)?;
        // A terminal that was hung up has no name any more either.
        let regf_id = match &settings {
            Some(_) => Some(regular::add_path_of(cx, fd)?),
            None => None,
        };
        let info = match node(fd.stat.rdev) {
            PTMX => master(cx, fd, settings)?,
            CTTY => controlling(cx, fd, settings)?,
            (major, minor) if SLAVES.contains(&major) => {
                slave(cx, fd, settings, (major - 136) * 256 + minor)?
            }
            _ => {
                return Err(FileError::unsupported(
                    "consoles are shared with the whole machine",
                    "use --external tty[RDEV:DEV] and --inherit-fd",
                ));
            }
        };
        entry(info, regf_id)
    }

    fn complete(
        cx: &mut DumpCx<'_>,
        _tables: &DumpTables,
        entry: &mut Self::Entry,
        _at: Place,
    ) -> Result<(), FileError> {
        let shell_job = cx.settings.common.shell_job;
        let dumped = cx.state::<Dumped>();
        let Some(info) = dumped.infos.get(&entry.tty_info_id) else { return Ok(()) };
        let Some(index) = info.pty.map(|pty| pty.index).filter(|_| info.termios.is_some()) else {
            return Ok(());
        };
        let met = dumped.ptys.entry(index).or_default();
        if met.master.is_some() || shell_job && met.controls.is_some() {
            return Ok(());
        }
        let reason = if shell_job {
            "it is neither a terminal of the tree nor the one that controls it"
        } else {
            "the terminal belongs to somebody outside the tree"
        };
        Err(FileError::unsupported(reason, HINT))
    }

    fn finish_dump(cx: &mut DumpCx<'_>) -> Result<(), FileError> {
        let dumped = std::mem::take(cx.state::<Dumped>());
        let (infos, data) = dumped.finish()?;
        if !infos.is_empty() {
            cx.store.write_all(ImageKind::TtyInfo, None, &infos)?;
        }
        if !data.is_empty() {
            cx.store.write_all(ImageKind::TtyData, None, &data)?;
        }
        Ok(())
    }

    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        let fd = pair::open(cx, entry)?;
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError> {
        pair::would_open(cx, entry)
    }

    fn before_resume(
        cx: &mut RestoreCx<'_>,
        _entry: &Self::Entry,
        _fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        pair::finish(cx)
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(tty);
}

impl FilesRestore<'_> {
    /// Adds the call by which the leader `pid` of a session takes its controlling terminal: right behind setsid, so that the
    /// children it makes from then on inherit it, and while it has the descriptors of the supervisor.
    pub(crate) fn plan_controlling(&mut self, pid: NsPid, descriptors: &mut Descriptors, list: &mut List) {
        pair::plan_controlling(&mut self.cx, pid, descriptors, list);
    }
}

/// Adds the call by which the leader `pid` of a session sets the foreground group, when all groups are there.
pub(super) fn plan_foreground(
    cx: &mut RestoreCx<'_>,
    pid: NsPid,
    descriptors: &mut Descriptors,
    list: &mut List,
) {
    pair::plan_foreground(cx, pid, descriptors, list);
}

/// Major and minor.
fn node(rdev: u64) -> (u32, u32) {
    (libc::major(rdev), libc::minor(rdev))
}

/// As images hold a device number: the encoding of the kernel's older stat.
fn image_dev(dev: u64) -> u32 {
    let (major, minor) = node(dev);
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The key under which the user names a terminal, both hexadecimal.
fn key(rdev: u32, dev: u32) -> Vec<u8> {
    format!("tty[{rdev:x}:{dev:x}]").into_bytes()
}

fn is_external(cx: &DumpCx<'_>, fd: &FdView<'_>) -> bool {
    let key = key(image_dev(fd.stat.rdev), image_dev(fd.stat.dev));
    cx.settings.common.externals.iter().any(|external| external.key == key)
}

fn named(fd: &FdView<'_>, r#type: pb::TtyType, settings: Option<pb::TtyInfoEntry>) -> pb::TtyInfoEntry {
    pb::TtyInfoEntry {
        r#type: r#type.into(),
        rdev: image_dev(fd.stat.rdev),
        dev: Some(image_dev(fd.stat.dev)),
        uid: Some(fd.stat.uid),
        gid: Some(fd.stat.gid),
        ..settings.unwrap_or_default()
    }
}

fn external_info(cx: &mut DumpCx<'_>, fd: &FdView<'_>) -> u32 {
    let info = named(fd, pb::TtyType::ExtTty, None);
    cx.state::<Dumped>().own(info)
}

/// The master of a pty.
fn master(
    cx: &mut DumpCx<'_>,
    fd: &FdView<'_>,
    settings: Option<pb::TtyInfoEntry>,
) -> Result<u32, FileError> {
    let file = fd.file()?;
    let index = tty::pty_index(file).map_err(FileError::sys("read the number of a pty (TIOCGPTN)"))?;
    let id = index << 1 | 1;
    let mut info = named(fd, pb::TtyType::Pty, settings);
    info.id = id;
    info.pty = Some(pb::TtyPtyEntry { index });
    info.locked = tty::pty_locked(file).map_err(FileError::sys("read the lock of a pty"))?;
    info.packet_mode = tty::packet_mode(file).map_err(FileError::sys("read the packet mode of a pty"))?;
    let dumped = cx.state::<Dumped>();
    dumped.infos.insert(id, info);
    dumped.ptys.entry(index).or_default().master = Some(own(file)?);
    Ok(id)
}

/// The slave of a pty.
fn slave(
    cx: &mut DumpCx<'_>,
    fd: &FdView<'_>,
    settings: Option<pb::TtyInfoEntry>,
    index: u32,
) -> Result<u32, FileError> {
    let hung_up = settings.is_none();
    let mut info = named(fd, pb::TtyType::Pty, settings);
    info.pty = Some(pb::TtyPtyEntry { index });
    let controls = controlling_of(fd.pid)?.filter(|(device, ..)| *device == fd.stat.rdev);
    let file = own(fd.file()?)?;
    let dumped = cx.state::<Dumped>();
    if hung_up {
        // Its number may be another's by now.
        return Ok(dumped.own(info));
    }
    let id = index << 1;
    info.id = id;
    let met = dumped.ptys.entry(index).or_default();
    met.controls = met.controls.or(controls.map(|(_, session, group)| (session, group)));
    if met.slave.is_none() || fd.flags() & 3 == libc::O_RDWR.cast_unsigned() {
        met.slave = Some(file);
    }
    dumped.infos.entry(id).or_insert(info);
    Ok(id)
}

/// /dev/tty: stands for the terminal that controlled its opener.
fn controlling(
    cx: &mut DumpCx<'_>,
    fd: &FdView<'_>,
    settings: Option<pb::TtyInfoEntry>,
) -> Result<u32, FileError> {
    if settings.is_none() {
        return Err(FileError::unsupported(
            "/dev/tty of a terminal that was hung up",
            "let the program close it",
        ));
    }
    let device = tty::device(fd.file()?).map_err(FileError::sys("find the terminal behind /dev/tty"))?;
    let (major, minor) = node(device);
    if !SLAVES.contains(&major) {
        return Err(FileError::unsupported("/dev/tty stands for a terminal that is no pty", HINT));
    }
    let index = (major - 136) * 256 + minor;
    let controls = controlling_of(fd.pid)?.filter(|(controls, ..)| *controls == device);
    let mut info = named(fd, pb::TtyType::Ctty, settings);
    info.pty = Some(pb::TtyPtyEntry { index });
    let dumped = cx.state::<Dumped>();
    let met = dumped.ptys.entry(index).or_default();
    met.controls = met.controls.or(controls.map(|(_, session, group)| (session, group)));
    let same = |info: &pb::TtyInfoEntry| {
        info.r#type == i32::from(pb::TtyType::Ctty) && info.pty.is_some_and(|pty| pty.index == index)
    };
    if let Some((id, _)) = dumped.infos.iter().find(|(_, info)| same(info)) {
        return Ok(*id);
    }
    let id = CTTY_INDEX << 1;
    if dumped.infos.contains_key(&id) {
        return Ok(dumped.own(info));
    }
    info.id = id;
    dumped.infos.insert(id, info);
    Ok(id)
}

fn own(fd: BorrowedFd<'_>) -> Result<OwnedFd, FileError> {
    fd.try_clone_to_owned().map_err(|e| io_error("duplicate a terminal", &e))
}

/// The controlling terminal of a task: its device, session and foreground group.
fn controlling_of(pid: HostPid) -> Result<Option<(u64, u32, u32)>, FileError> {
    let text =
        std::fs::read(format!("/proc/{pid}/stat")).map_err(|e| io_error("read the stat of a task", &e))?;
    let stat = stat::parse(&text)?;
    if stat.tty_nr == 0 {
        return Ok(None);
    }
    let number = stat.tty_nr.cast_unsigned();
    let device = libc::makedev(number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    let positive = |id| u32::try_from(in_tree(id).get()).unwrap_or(0);
    Ok(Some((device, positive(stat.session), positive(HostPid::new(stat.tpgid)))))
}

impl Dumped {
    /// Gives `info` an id of ours.
    fn own(&mut self, mut info: pb::TtyInfoEntry) -> u32 {
        info.id = OWN_IDS + self.own_ids;
        self.own_ids += 1;
        let id = info.id;
        self.infos.insert(id, info);
        id
    }

    /// The two images.
    fn finish(mut self) -> Result<(Vec<pb::TtyInfoEntry>, Vec<pb::TtyDataEntry>), FileError> {
        let mut data = Vec::new();
        for (&index, met) in &self.ptys {
            let mut controls = met.controls;
            if let Some(master) = &met.master {
                controls = session_of(master)?;
                let slave_id = index << 1;
                let had_slave = self.infos.contains_key(&slave_id);
                let closed = met.slave.is_none() && has_hung_up(master)?;
                if closed && !had_slave {
                    // No file has this id: it says that the slave was open once.
                    let mut info = self.infos.get(&(slave_id | 1)).cloned().unwrap_or_default();
                    (info.id, info.locked, info.packet_mode, info.exclusive) =
                        (slave_id, false, false, false);
                    info.rdev = image_dev(libc::makedev(136 + index / 256, index % 256));
                    self.infos.insert(slave_id, info);
                }
                waiting(index, master, met.slave.as_ref(), closed, &mut data)?;
            }
            let (session, group) = controls.unwrap_or((0, 0));
            let of_pty = |info: &&mut pb::TtyInfoEntry| {
                info.termios.is_some() && info.pty.is_some_and(|pty| pty.index == index)
            };
            for info in self.infos.values_mut().filter(of_pty) {
                (info.sid, info.pgrp) = (session, group);
            }
        }
        // The master is made first.
        let (masters, others): (Vec<_>, Vec<_>) =
            self.infos.into_values().partition(|info| info.rdev == image_dev(libc::makedev(5, 2)));
        Ok((masters.into_iter().chain(others).collect(), data))
    }
}

/// Session and foreground group of a pty, asked of its master.
fn session_of(master: &OwnedFd) -> Result<Option<(u32, u32)>, FileError> {
    let positive = |id| u32::try_from(in_tree(id).get()).unwrap_or(0);
    match tty::session(master.as_fd()) {
        Ok(session) if session > 0 => {
            let group = tty::foreground(master.as_fd()).unwrap_or(0);
            Ok(Some((positive(HostPid::new(session)), positive(HostPid::new(group)))))
        }
        Ok(_) | Err(crate::sys::Errno::ENOTTY) => Ok(None),
        Err(e) => Err(FileError::sys("read the session of a pty (TIOCGSID)")(e)),
    }
}

/// Whether the slave of `master` was open and is not any more.
fn has_hung_up(master: &OwnedFd) -> Result<bool, FileError> {
    let mut fds = [PollFd::new(master.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).map_err(FileError::sys("poll a pty"))?;
    Ok(fds.iter().any(|fd| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))))
}

/// What waits in a pty of the tree.
fn waiting(
    index: u32,
    master: &OwnedFd,
    slave: Option<&OwnedFd>,
    closed: bool,
    data: &mut Vec<pb::TtyDataEntry>,
) -> Result<(), FileError> {
    let mut ready = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::ZERO).map_err(FileError::sys("poll a pty"))?;
    let some = ready.iter().any(|fd| fd.revents().is_some_and(|e| e.contains(PollFlags::POLLIN)));
    let opened;
    let slave = match slave {
        // Nobody has the slave open: only the master can have something to read.
        None if !closed || !some => return Ok(()),
        // What can be read and written is what both directions need.
        _ => {
            let locked = tty::pty_locked(master.as_fd()).unwrap_or(false);
            if locked {
                tty::set_pty_locked(master.as_fd(), false).map_err(FileError::sys("unlock a pty"))?;
            }
            let slave = content::open_slave(master);
            if locked {
                tty::set_pty_locked(master.as_fd(), true).map_err(FileError::sys("lock a pty"))?;
            }
            opened = slave?;
            &opened
        }
    };
    let ends = content::Ends { master: master.as_fd(), slave: slave.as_fd() };
    let (to_master, to_slave) = ends.dump()?;
    for (tty_id, data_) in [(index << 1 | 1, to_master), (index << 1, to_slave)] {
        if !data_.is_empty() {
            data.push(pb::TtyDataEntry { tty_id, data: data_ });
        }
    }
    Ok(())
}

/// Numbers of the ptys whose masters the images have.
fn masters(entries: &BTreeMap<u32, pb::TtyInfoEntry>, used: &BTreeSet<u32>) -> BTreeSet<u32> {
    let ptmx = image_dev(libc::makedev(PTMX.0, PTMX.1));
    let is_master = |(id, info): &(&u32, &pb::TtyInfoEntry)| info.rdev == ptmx && used.contains(id);
    entries.iter().filter(is_master).filter_map(|(_, info)| Some(info.pty?.index)).collect()
}
