//! Terminals at restore: ptys made again, the caller's own terminal, inherited ones.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    fcntl::{OFlag, open as open_path},
    sys::stat::{Mode, fchmod, fstat},
    unistd::{Gid, Uid, fchown, isatty},
};

use super::{
    super::{Descriptors, FileError, RestoreCx, external, flags, path::to_path, pipe_data::io_error},
    content, image_dev, key, masters, settings,
};
use crate::{
    image::{ImageKind, TypedStore, pb},
    sys::{self, pid::NsPid, tty},
    tracee::{List, Want},
    view::{self, Last, View},
};

const ACCESS: u32 = 0o3;
const BY_PATH: u32 = 0o100_000;
/// Ptys that may be passed over to get at the wanted number.
const MOST_PTYS: usize = 4096;

/// A pty made again.
#[derive(Debug)]
struct Made {
    /// Until the master's description takes it.
    master: Option<OwnedFd>,
    /// Ours, until the tasks run.
    keep: OwnedFd,
    slave: Option<OwnedFd>,
}

#[derive(Debug, Default)]
pub(super) struct Restored {
    read: bool,
    infos: BTreeMap<u32, pb::TtyInfoEntry>,
    data: HashMap<u32, Vec<u8>>,
    masters: BTreeSet<u32>,
    /// Infos that files refer to.
    used: BTreeSet<u32>,
    /// Owner and mode of slaves, by info.
    modes: HashMap<u32, u32>,
    made: BTreeMap<u32, Made>,
    /// What the caller's terminal stands for.
    job: Option<pb::TtyInfoEntry>,
}

fn state<'c>(cx: &'c mut RestoreCx<'_>) -> Result<&'c mut Restored, FileError> {
    if cx.state::<Restored>().read {
        return Ok(cx.state::<Restored>());
    }
    let infos: Vec<pb::TtyInfoEntry> = cx.store.read_all(ImageKind::TtyInfo, None)?;
    let data: Vec<pb::TtyDataEntry> = cx.store.read_all(ImageKind::TtyData, None)?;
    let mut used = BTreeSet::new();
    let mut modes = HashMap::new();
    for file in cx.entries.values().filter_map(|file| file.tty.as_ref()) {
        used.insert(file.tty_info_id);
        let path = file.regf_id.and_then(|id| cx.entries.get(&id)).and_then(|file| file.reg.as_ref());
        if let Some(mode) = path.and_then(|path| path.mode) {
            modes.insert(file.tty_info_id, mode & 0o7777);
        }
    }
    let state = cx.state::<Restored>();
    state.infos = infos.into_iter().map(|info| (info.id, info)).collect();
    state.masters = masters(&state.infos, &used);
    for entry in data {
        state.data.entry(entry.tty_id).or_default().extend(entry.data);
    }
    (state.used, state.modes, state.read) = (used, modes, true);
    Ok(state)
}

/// The description of `entry`.
pub(super) fn open(cx: &mut RestoreCx<'_>, entry: &pb::TtyFileEntry) -> Result<OwnedFd, FileError> {
    let settings = cx.settings;
    let path = match entry.regf_id {
        Some(id) => Some(cx.regular_entry(id)?.name),
        None => None,
    };
    let view = cx.view()?;
    let state = state(cx)?;
    let bad = |what: String| FileError::entry(entry.id, what);
    let info = state
        .infos
        .get(&entry.tty_info_id)
        .cloned()
        .ok_or_else(|| bad(format!("there is no terminal {}", entry.tty_info_id)))?;
    let key = key(info.rdev, info.dev.unwrap_or(0));
    if let Some(given) = settings.inherit_fds.iter().find(|given| given.key == key) {
        return external::duplicate(given, Some(libc::S_IFCHR));
    }
    let kind = pb::TtyType::try_from(info.r#type).map_err(|_| bad("a terminal of unknown type".into()))?;
    let index = match kind {
        pb::TtyType::Pty => info.pty.map(|pty| pty.index),
        pb::TtyType::Ctty => info.pty.map(|pty| pty.index).or_else(|| state.pty_of_session(info.sid)),
        pb::TtyType::ExtTty => {
            return Err(FileError::path("find an --inherit-fd for", &key)(sys::Errno::ENOENT));
        }
        other => return Err(bad(format!("a terminal of type {} is not supported", other.as_str_name()))),
    };
    let Some(index) = index.filter(|index| state.masters.contains(index)) else {
        if kind == pb::TtyType::Pty && info.termios.is_none() {
            return hung_up(&view, entry);
        }
        if !settings.common.shell_job {
            return Err(FileError::unsupported(
                "the terminal was somebody else's",
                "restore with --shell-job to use yours, or with --inherit-fd",
            ));
        }
        let fd = own_terminal(kind, entry)?;
        if state.job.is_none() {
            state.job = Some(info);
        }
        return Ok(fd);
    };
    if !state.made.contains_key(&index) {
        let made = state.make(&view, index, path.as_deref())?;
        state.made.insert(index, made);
    }
    let made = state.made.get_mut(&index).ok_or_else(|| bad("lost".into()))?;
    let how = (entry.flags & (ACCESS | BY_PATH)).cast_signed() | libc::O_NOCTTY;
    let failed = FileError::sys("open a terminal");
    match kind {
        pb::TtyType::Ctty => {
            let slave = made.slave.as_ref().ok_or_else(|| bad("its terminal has no slave".into()))?;
            tty::open_controlling(slave.as_fd(), how | libc::O_CLOEXEC)
                .map_err(FileError::sys("open /dev/tty"))
        }
        _ if info.rdev == image_dev(libc::makedev(5, 2)) => {
            made.master.take().ok_or_else(|| bad(format!("the master of pty {index} is open twice")))
        }
        _ => tty::open_peer(made.keep.as_fd(), how).map_err(failed),
    }
}

/// A slave whose master has gone.
fn hung_up(view: &View, entry: &pb::TtyFileEntry) -> Result<OwnedFd, FileError> {
    let master = open_master(view, b"/dev/ptmx")?;
    tty::set_pty_locked(master.as_fd(), false).map_err(FileError::sys("unlock a pty"))?;
    let flags = (entry.flags & (ACCESS | BY_PATH)).cast_signed() | libc::O_NOCTTY;
    tty::open_peer(master.as_fd(), flags).map_err(FileError::sys("open the slave of a pty"))
}

/// Whether there is what ptys are made by. Terminals of others are given when the tree is restored.
pub(super) fn would_open(cx: &RestoreCx<'_>, entry: &pb::TtyFileEntry) -> Result<(), FileError> {
    let path = match entry.regf_id {
        Some(id) => cx.regular_entry(id)?.name,
        None => return Ok(()),
    };
    if path.ends_with(b"ptmx") { find_master(&*cx.view()?, &path).map(drop) } else { Ok(()) }
}

/// The multiplexer of ptys at `path`, not opened.
fn find_master(view: &View, path: &[u8]) -> Result<OwnedFd, FileError> {
    let node = view.find(path, Last::Target).map_err(FileError::name("open", path))?;
    let stat = fstat(&node).map_err(FileError::path("stat", path))?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR
        || image_dev(stat.st_rdev) != image_dev(libc::makedev(5, 2))
    {
        return Err(FileError::Changed {
            path: to_path(path).to_owned(),
            what: "is no multiplexer of ptys".into(),
        });
    }
    Ok(node)
}

fn open_master(view: &View, path: &[u8]) -> Result<OwnedFd, FileError> {
    let node = find_master(view, path)?;
    view::reopen(node.as_fd(), OFlag::O_RDWR).map_err(FileError::path("open", path))
}

/// The terminal that crtool itself was started from.
fn own_terminal(kind: pb::TtyType, entry: &pb::TtyFileEntry) -> Result<OwnedFd, FileError> {
    let flags =
        OFlag::from_bits_retain((entry.flags & ACCESS).cast_signed()) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let open = |path: &str| open_path(path, flags, Mode::empty());
    if kind == pb::TtyType::Ctty {
        return open("/dev/tty").map_err(FileError::path("open", b"/dev/tty"));
    }
    let number = (0..3).find(|number| sys::fd::dup(*number).is_ok_and(|fd| isatty(&fd).unwrap_or(false)));
    match number {
        Some(number) => open(&format!("/proc/self/fd/{number}"))
            .or_else(|_| sys::fd::dup(number))
            .map_err(FileError::sys("use our own terminal")),
        None => open("/dev/tty")
            .map_err(FileError::sys("find our own terminal (no descriptor from 0 to 2 is one)")),
    }
}

impl Restored {
    fn pty_of_session(&self, session: u32) -> Option<u32> {
        let of = |info: &&pb::TtyInfoEntry| {
            info.r#type == i32::from(pb::TtyType::Pty) && session != 0 && info.sid == session
        };
        self.infos.values().find(of).and_then(|info| Some(info.pty?.index))
    }

    /// Makes both ends of pty `index`, set up, with what waits in them.
    fn make(&self, view: &View, index: u32, path: Option<&[u8]>) -> Result<Made, FileError> {
        let path = path.filter(|path| path.ends_with(b"ptmx")).unwrap_or(b"/dev/ptmx");
        let master = numbered(view, index, path)?;
        let keep = master.try_clone().map_err(|e| io_error("duplicate a pty", &e))?;
        let (master_id, slave_id) = (index << 1 | 1, index << 1);
        let (Some(info), slave_info) = (self.infos.get(&master_id), self.infos.get(&slave_id)) else {
            return Err(FileError::entry(master_id, "the master of a pty is missing"));
        };
        settings::apply(master.as_fd(), slave_info.unwrap_or(info))?;
        let empty = Vec::new();
        let to_master = self.data.get(&master_id).unwrap_or(&empty);
        let to_slave = self.data.get(&slave_id).unwrap_or(&empty);
        // Its controlling session and descriptions of /dev/tty need it too, whatever its own info is.
        let controls = info.sid != 0;
        let mut slave = None;
        if slave_info.is_some() || controls || !to_master.is_empty() || !to_slave.is_empty() {
            tty::set_pty_locked(master.as_fd(), false).map_err(FileError::sys("unlock a pty"))?;
            let end = content::open_slave(&keep)?;
            let then = slave_info.unwrap_or(info).termios.as_ref().map(settings::termios);
            if let Some(then) = then {
                let ends = content::Ends { master: keep.as_fd(), slave: end.as_fd() };
                // Too much must fail, not wait. The master's own entry sets its flags later.
                flags::apply(&keep, libc::O_NONBLOCK.cast_unsigned())?;
                ends.put(to_master, to_slave, &then)?;
                flags::apply(&keep, 0)?;
                tty::set_termios(end.as_fd(), &then)
                    .map_err(FileError::sys("set a terminal up (TCSETS2)"))?;
            }
            if let (Some(info), Some(mode)) = (slave_info, self.modes.get(&slave_id)) {
                let (uid, gid) = (info.uid.map(Uid::from_raw), info.gid.map(Gid::from_raw));
                fchown(&end, uid, gid).map_err(FileError::sys("set the owner of a terminal"))?;
                fchmod(&end, Mode::from_bits_truncate(*mode))
                    .map_err(FileError::sys("set the mode of a terminal"))?;
            }
            slave = Some(end);
        }
        Ok(Made { master: Some(master), keep, slave })
    }
}

/// A master whose slave has this number; numbers below may have become free, so the kernel is asked until it comes. If it is
/// somebody else's now, any other.
fn numbered(view: &View, index: u32, path: &[u8]) -> Result<OwnedFd, FileError> {
    let mut passed = Vec::new();
    loop {
        let master = open_master(view, path)?;
        let got = tty::pty_index(master.as_fd()).map_err(FileError::sys("read the number of a pty"))?;
        if got == index {
            return Ok(master);
        }
        if got > index || passed.len() >= MOST_PTYS {
            tracing::warn!("/dev/pts/{index} is taken by somebody else: it becomes /dev/pts/{got}");
            return Ok(master);
        }
        passed.push(master);
    }
}

/// The pty that the session of `pid` has, and its foreground group.
fn led_by(cx: &mut RestoreCx<'_>, pid: NsPid) -> Option<(i32, u32)> {
    let state = cx.state::<Restored>();
    let led = state.made.iter().find_map(|(index, made)| {
        let info =
            state.infos.get(&(index << 1 | 1)).filter(|info| NsPid::new(info.sid.cast_signed()) == pid)?;
        Some((made.slave.as_ref()?.as_raw_fd(), info.pgrp))
    });
    led.filter(|_| pid.get() > 0)
}

/// See [`FilesRestore::plan_controlling`](super::super::FilesRestore::plan_controlling).
pub(super) fn plan_controlling(
    cx: &mut RestoreCx<'_>,
    pid: NsPid,
    descriptors: &mut Descriptors,
    list: &mut List,
) {
    let Some((slave, _)) = led_by(cx, pid) else { return };
    let slave = descriptors.fetch(list, slave);
    let args = [slave.into(), libc::TIOCSCTTY.into(), 0.into()];
    list.call("take the controlling terminal (TIOCSCTTY)", libc::SYS_ioctl, &args, Want::Zero);
}

/// See [`super::plan_foreground`].
pub(super) fn plan_foreground(
    cx: &mut RestoreCx<'_>,
    pid: NsPid,
    descriptors: &mut Descriptors,
    list: &mut List,
) {
    let Some((slave, group)) = led_by(cx, pid) else { return };
    if group != 0 {
        let slave = descriptors.fetch(list, slave);
        let group = list.value(&group);
        let args = [slave.into(), libc::TIOCSPGRP.into(), group.into()];
        // A foreground group that has ended meanwhile leaves the leader's own.
        list.call("set the foreground group (TIOCSPGRP)", libc::SYS_ioctl, &args, Want::Any);
    }
}

/// What a shell job knew of its terminal.
pub(super) fn job_info(cx: &mut RestoreCx<'_>) -> Result<Option<pb::TtyInfoEntry>, FileError> {
    Ok(state(cx)?.job.clone())
}

/// What would have been in the way before: locks, modes; then our own descriptors go.
pub(super) fn finish(cx: &mut RestoreCx<'_>) -> Result<(), FileError> {
    let state = cx.state::<Restored>();
    for (index, made) in std::mem::take(&mut state.made) {
        let (master, slave) = (state.infos.get(&(index << 1 | 1)), state.infos.get(&(index << 1)));
        let Some(master) = master else { continue };
        tty::set_packet_mode(made.keep.as_fd(), master.packet_mode)
            .map_err(FileError::sys("set the packet mode of a pty"))?;
        if master.exclusive {
            tty::set_exclusive(made.keep.as_fd(), true).map_err(FileError::sys("make a pty exclusive"))?;
        }
        if let (Some(end), true) = (&made.slave, slave.is_some_and(|slave| slave.exclusive)) {
            tty::set_exclusive(end.as_fd(), true).map_err(FileError::sys("make a terminal exclusive"))?;
        }
        tty::set_pty_locked(made.keep.as_fd(), master.locked).map_err(FileError::sys("lock a pty"))?;
    }
    Ok(())
}
