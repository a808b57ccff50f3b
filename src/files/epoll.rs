//! epoll(7): a set of watched files.
//!
//! Saved: every item with its events and data. An item is the pair of a file and the number it was added under, and outlives
//! the closing of that number while the file is open elsewhere. So what an item watches is found by kcmp(KCMP_EPOLL_TFD)
//! among the open descriptors of the tasks that hold the epoll, never by number alone. Images name the number of a
//! descriptor that is open (as CRIU's), and in `id`, which CRIU leaves at 0, the file itself.
//! A one-shot item that has fired stays silent, but for an error or hang-up that comes later. What was ready is ready again, also where it was edge-triggered and seen.

use std::collections::{HashMap, HashSet};

use super::{
    DumpCx, DumpTable, DumpTables, DumpedFd, FdView, FileError, FileKind, Opened, Place, Planned, RestoreCx,
    RestoreTable, flags, kind::packed_in,
};
use crate::{
    image::pb,
    proc::fdinfo::kernel_dev,
    sys::{Errno, event, kcmp},
    tracee::{Arg, List, Want},
};

const ONESHOT: u32 = libc::EPOLLONESHOT.cast_unsigned();
/// The kernel adds these to every item; a one-shot item that has fired loses them.
const ALWAYS: u32 = (libc::EPOLLERR | libc::EPOLLHUP).cast_unsigned();
const EVENT_BYTES: usize = 12;

/// A set of watched files.
#[derive(Debug)]
pub(super) struct Epoll;

/// Items that a list adds already, by epoll and position.
#[derive(Debug, Default)]
struct Added(HashMap<u32, HashSet<usize>>);

impl FileKind for Epoll {
    type Entry = pb::EventpollFileEntry;
    const NAME: &'static str = "epoll";
    const TYPE: pb::FdTypes = pb::FdTypes::Eventpoll;

    fn owns(fd: &FdView<'_>) -> bool {
        fd.is_anon_inode("[eventpoll]")
    }

    fn dump(_cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError> {
        let items = fd.info.tfds.iter().map(|target| pb::EventpollTfdEntry {
            id: 0,
            tfd: target.tfd.cast_unsigned(),
            events: target.events,
            data: target.data,
            dev: target.sdev,
            inode: target.ino,
            pos: target.pos.map(i64::cast_unsigned),
        });
        Ok(pb::EventpollFileEntry { id, flags: fd.flags(), fown: fd.fown()?, tfd: items.collect() })
    }

    fn complete(
        _cx: &mut DumpCx<'_>,
        tables: &DumpTables,
        entry: &mut Self::Entry,
        at: Place,
    ) -> Result<(), FileError> {
        let holders: Vec<&DumpTable> =
            tables.0.iter().filter(|table| table.fds.iter().any(|fd| fd.id == entry.id)).collect();
        let mut seen: HashMap<u32, u32> = HashMap::new();
        let mut used = HashSet::new();
        for item in &mut entry.tfd {
            let offset = seen.entry(item.tfd).or_default();
            let slot = Slot { at, number: item.tfd, offset: *offset };
            *offset += 1;
            let found = find(&holders, item, slot, &used)?;
            let Some((number, id)) = found else {
                return Err(FileError::unsupported(
                    format!("no task that holds it has the file open that it watches as {}", item.tfd),
                    "the program should remove it from the epoll (EPOLL_CTL_DEL) before closing it",
                ));
            };
            (item.tfd, item.id) = (number, id);
            used.insert((number, id));
        }
        Ok(())
    }

    fn open(_cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError> {
        let fd = event::epoll(libc::EPOLL_CLOEXEC).map_err(FileError::sys("make an epoll"))?;
        flags::apply(&fd, entry.flags)?;
        Ok(Opened::Now(fd))
    }

    fn would_open(_: &mut RestoreCx<'_>, _: &Self::Entry) -> Result<(), FileError> {
        // The dump has found what its items watch.
        Ok(())
    }

    fn plan(
        cx: &mut RestoreCx<'_>,
        entry: &Self::Entry,
        table: &RestoreTable,
        fd: i32,
        list: &mut List,
    ) -> Result<Planned, FileError> {
        let added = cx.state::<Added>().0.entry(entry.id).or_default();
        let mut now: Vec<(usize, Way)> = Vec::new();
        for (index, item) in entry.tfd.iter().enumerate().filter(|(index, _)| !added.contains(index)) {
            let number = i32::try_from(item.tfd)
                .map_err(|_| FileError::entry(entry.id, format!("{:#x} is no descriptor", item.tfd)))?;
            match way(entry.id, item, number, table) {
                Some(way) => now.push((index, way)),
                // Without the file's id only the number tells, and it means something in one table only.
                None if is_bare(entry.id, item) => return Ok(Planned::Elsewhere),
                None => {}
            }
        }
        // Fired one-shot items first: silencing them takes events, and there must be no others yet.
        let is_spent = |index: usize| entry.tfd.get(index).is_some_and(is_spent);
        now.sort_by_key(|(index, _)| !is_spent(*index));
        for (index, way) in now {
            let Some(item) = entry.tfd.get(index) else { continue };
            way.plan(fd, item, list);
            added.insert(index);
        }
        Ok(if added.len() == entry.tfd.len() { Planned::Done } else { Planned::Elsewhere })
    }

    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry> {
        Some(&entry.fown)
    }

    packed_in!(epfd);
}

/// How kcmp names an item: the `offset`-th of those added as `number`.
#[derive(Debug, Clone, Copy)]
struct Slot {
    at: Place,
    number: u32,
    offset: u32,
}

/// An open descriptor of the file that an item watches, and the file's id. One that no item has yet, where there is one.
fn find(
    holders: &[&DumpTable],
    item: &pb::EventpollTfdEntry,
    slot: Slot,
    used: &HashSet<(u32, u32)>,
) -> Result<Option<(u32, u32)>, FileError> {
    let mut spare = None;
    // The table through which the epoll was met has the first word.
    let first = |table: &&&DumpTable| table.pid == slot.at.pid;
    for table in holders.iter().filter(first).chain(holders.iter().filter(|table| !first(table))) {
        let same = |fd: &&DumpedFd| fd.fd.cast_unsigned() == slot.number;
        let fits = |fd: &&DumpedFd| may_be(fd, item);
        let others = table.fds.iter().filter(|fd| !same(fd) && fits(fd));
        for fd in table.fds.iter().filter(same).chain(others) {
            let number = fd.fd.cast_unsigned();
            let efd = slot.at.fd.cast_unsigned();
            let found = kcmp::kcmp_epoll(table.pid, number, slot.at.pid, efd, slot.number, slot.offset);
            match found {
                Ok(std::cmp::Ordering::Equal)
                    if number == slot.number || !used.contains(&(number, fd.id)) =>
                {
                    return Ok(Some((number, fd.id)));
                }
                // All its numbers are spoken for: this one is given a number of its own again.
                Ok(std::cmp::Ordering::Equal) => spare = Some((slot.number, fd.id)),
                Ok(_) => {}
                Err(Errno::ENOENT) => {
                    return Err(FileError::sys("find an item of an epoll again (kcmp)")(Errno::ENOENT));
                }
                Err(e) => return Err(FileError::sys("compare an item of an epoll (kcmp)")(e)),
            }
        }
    }
    Ok(spare)
}

/// Whether the descriptor can be the item's file, by device and inode.
fn may_be(fd: &DumpedFd, item: &pb::EventpollTfdEntry) -> bool {
    let dev = (nix::sys::stat::major(fd.dev), nix::sys::stat::minor(fd.dev));
    let same_dev = item.dev.map(kernel_dev).is_none_or(|(major, minor)| dev == (major.into(), minor.into()));
    item.inode.is_none_or(|ino| ino == fd.ino) && same_dev
}

/// Without the file's id: of CRIU's making.
fn is_bare(epoll: u32, item: &pb::EventpollTfdEntry) -> bool {
    item.id == 0 || item.id == epoll
}

fn is_spent(item: &pb::EventpollTfdEntry) -> bool {
    item.events & ONESHOT != 0 && item.events & ALWAYS == 0
}

/// How an item gets back under its number.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// The number is the file's.
    Direct(i32),
    /// The number is free: the file gets it for a moment.
    Borrow { from: i32, number: i32 },
    /// The number is another file's, which makes room for a moment.
    Swap { from: i32, number: i32, cloexec: bool },
}

fn way(epoll: u32, item: &pb::EventpollTfdEntry, number: i32, table: &RestoreTable) -> Option<Way> {
    let there = table.fds.get(&number);
    if is_bare(epoll, item) {
        return there.map(|_| Way::Direct(number));
    }
    if there.is_some_and(|fd| fd.id == item.id) {
        return Some(Way::Direct(number));
    }
    let from = *table.fds.iter().find(|(_, fd)| fd.id == item.id)?.0;
    Some(match there {
        None => Way::Borrow { from, number },
        Some(other) => Way::Swap { from, number, cloexec: other.cloexec },
    })
}

impl Way {
    fn plan(self, epoll: i32, item: &pb::EventpollTfdEntry, list: &mut List) {
        let cloexec = libc::O_CLOEXEC;
        match self {
            Self::Direct(number) => add(epoll.into(), number, item, list),
            Self::Borrow { from, number } => {
                let args = [from.into(), number.into(), cloexec.into()];
                list.call("lend a number to an epoll item", libc::SYS_dup3, &args, Want::Ok);
                add(epoll.into(), number, item, list);
                list.call("take the number back", libc::SYS_close, &[number.into()], Want::Zero);
            }
            Self::Swap { from, number, cloexec: keep } => {
                let args = [number.into(), libc::F_DUPFD_CLOEXEC.into(), 0.into()];
                let aside = list.call("put a file aside", libc::SYS_fcntl, &args, Want::Ok);
                let args = [from.into(), number.into(), cloexec.into()];
                list.call("lend a number to an epoll item", libc::SYS_dup3, &args, Want::Ok);
                // The epoll itself may be what made room.
                add(if number == epoll { aside.into() } else { epoll.into() }, number, item, list);
                let args = [aside.into(), number.into(), (if keep { cloexec } else { 0 }).into()];
                list.call("put the file back", libc::SYS_dup3, &args, Want::Ok);
                list.call("close its other number", libc::SYS_close, &[aside.into()], Want::Zero);
            }
        }
    }
}

/// The kernel's `struct epoll_event`: packed.
fn event_bytes(item: &pb::EventpollTfdEntry) -> [u8; EVENT_BYTES] {
    let mut bytes = [0; EVENT_BYTES];
    let words = item.events.to_ne_bytes().into_iter().chain(item.data.to_ne_bytes());
    bytes.iter_mut().zip(words).for_each(|(to, from)| *to = from);
    bytes
}

fn add(epoll: Arg, number: i32, item: &pb::EventpollTfdEntry, list: &mut List) {
    let event = list.bytes(&event_bytes(item));
    let args = [epoll, libc::EPOLL_CTL_ADD.into(), number.into(), event.into()];
    list.call(format!("add {number} to an epoll"), libc::SYS_epoll_ctl, &args, Want::Zero);
    if is_spent(item) {
        // Where the file has hung up meanwhile, one event comes: taken, the item is as silent as it was.
        let space = list.space(EVENT_BYTES);
        let args = [epoll, space.into(), 1.into(), 0.into()];
        list.call("silence a fired item of an epoll", libc::SYS_epoll_wait, &args, Want::Any);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};

    use super::super::{
        TableFd,
        testing::with_view,
        trial::{Trial, run_list},
    };
    use super::*;
    use crate::{proc::fdinfo, sys::pipe};

    fn items(epoll: &OwnedFd) -> Vec<(u32, u64, Option<u64>)> {
        let text = std::fs::read(format!("/proc/self/fdinfo/{}", epoll.as_raw_fd())).unwrap();
        let mut items: Vec<_> =
            fdinfo::parse(&text).unwrap().tfds.iter().map(|t| (t.events, t.data, t.ino)).collect();
        items.sort_unstable();
        items
    }

    fn numbers(epoll: &OwnedFd) -> Vec<(u64, i32)> {
        let text = std::fs::read(format!("/proc/self/fdinfo/{}", epoll.as_raw_fd())).unwrap();
        let mut all: Vec<_> = fdinfo::parse(&text).unwrap().tfds.iter().map(|t| (t.data, t.tfd)).collect();
        all.sort_unstable();
        all
    }

    /// A table of our own descriptors, ids from 100.
    fn table(epoll: &OwnedFd, files: &[&OwnedFd]) -> DumpTable {
        let row = |(index, fd): (usize, &&OwnedFd)| {
            with_view(fd, |view| DumpedFd {
                fd: fd.as_raw_fd(),
                id: if fd.as_raw_fd() == epoll.as_raw_fd() { 1 } else { 100 + index as u32 },
                cloexec: true,
                dev: view.stat.dev,
                ino: view.stat.ino,
                locks: Vec::new(),
            })
        };
        let fds = files.iter().chain([&epoll]).enumerate().map(row).collect();
        DumpTable { files_id: 1, pid: crate::sys::pid::HostPid::own(), fds }
    }

    /// Dumps `epoll`, and adds the items to a new one in the name of a child that has the same table.
    fn again(epoll: &OwnedFd, files: &[&OwnedFd]) -> Result<(OwnedFd, pb::EventpollFileEntry), FileError> {
        let mut trial = Trial::new();
        let dumped = table(epoll, files);
        let mut entry = trial.dump::<Epoll>(epoll);
        let at = Place { pid: dumped.pid, fd: epoll.as_raw_fd() };
        trial.cx(|cx| Epoll::complete(cx, &DumpTables(vec![dumped.clone()]), &mut entry, at))?;
        let new = trial.restore::<Epoll>(&entry);
        let mut restored = RestoreTable::default();
        for fd in &dumped.fds {
            let number = if fd.id == 1 { new.as_raw_fd() } else { fd.fd };
            restored.fds.insert(number, TableFd { id: fd.id, cloexec: true });
        }
        let mut list = List::new("epoll");
        let planned =
            trial.restore_cx(|cx| Epoll::plan(cx, &entry, &restored, new.as_raw_fd(), &mut list)).unwrap();
        assert_eq!(planned, Planned::Done);
        let inherited: Vec<&OwnedFd> = files.iter().copied().chain([&new]).collect();
        run_list(&inherited, list);
        Ok((new, entry))
    }

    fn edge() -> u32 {
        (libc::EPOLLIN | libc::EPOLLET).cast_unsigned()
    }

    #[test]
    fn items_duplicates_and_closed_numbers() {
        let epoll = event::epoll(libc::EPOLL_CLOEXEC).unwrap();
        let inner = event::epoll(libc::EPOLL_CLOEXEC).unwrap();
        let (read, write) = pipe::pipe2(libc::O_CLOEXEC).unwrap();
        let (other, _other_write) = pipe::pipe2(libc::O_CLOEXEC).unwrap();
        let closed = read.try_clone().unwrap();
        let reused = read.try_clone().unwrap();
        event::epoll_add(epoll.as_fd(), read.as_raw_fd(), 1, u64::MAX).unwrap();
        event::epoll_add(epoll.as_fd(), closed.as_raw_fd(), edge(), 2).unwrap();
        event::epoll_add(epoll.as_fd(), reused.as_raw_fd(), 1, 3).unwrap();
        event::epoll_add(epoll.as_fd(), inner.as_raw_fd(), 1, 4).unwrap();
        event::epoll_add(epoll.as_fd(), write.as_raw_fd(), libc::EPOLLONESHOT.cast_unsigned() | 4, 5)
            .unwrap();
        assert!(event::epoll_take(epoll.as_fd()).unwrap(), "the one-shot item fires");
        // The number of `reused` is now another file's.
        let mut reused = reused;
        nix::unistd::dup2(&other, &mut reused).unwrap();
        drop(closed);
        let (new, entry) = again(&epoll, &[&read, &write, &other, &reused, &inner]).unwrap();
        let silent = |mut items: Vec<(u32, u64, Option<u64>)>| {
            items.iter_mut().filter(|item| item.1 == 5).for_each(|item| item.0 &= !ALWAYS);
            items
        };
        assert_eq!(silent(items(&new)), silent(items(&epoll)));
        let spent = entry.tfd.iter().find(|item| item.data == 5).unwrap();
        assert_eq!(spent.events, libc::EPOLLONESHOT.cast_unsigned());
        assert!(entry.tfd.iter().all(|item| item.id >= 100));
        assert_eq!(numbers(&new), numbers(&epoll));
    }

    #[test]
    fn a_fired_item_stays_silent() {
        let epoll = event::epoll(libc::EPOLL_CLOEXEC).unwrap();
        let (read, write) = pipe::pipe2(libc::O_CLOEXEC).unwrap();
        drop(write);
        event::epoll_add(epoll.as_fd(), read.as_raw_fd(), libc::EPOLLONESHOT.cast_unsigned() | 1, 5).unwrap();
        assert!(event::epoll_take(epoll.as_fd()).unwrap());
        let (new, _) = again(&epoll, &[&read]).unwrap();
        assert_eq!(items(&new), items(&epoll));
        assert!(!event::epoll_take(new.as_fd()).unwrap());
    }

    #[test]
    fn a_file_that_nobody_has_open_here_is_refused() {
        let epoll = event::epoll(libc::EPOLL_CLOEXEC).unwrap();
        let (read, _write) = pipe::pipe2(libc::O_CLOEXEC).unwrap();
        event::epoll_add(epoll.as_fd(), read.as_raw_fd(), 1, 5).unwrap();
        let error = again(&epoll, &[]).unwrap_err();
        assert!(error.to_string().starts_with("no task that holds it has the file open"), "{error}");
    }

    #[test]
    fn bare_items_need_their_number() {
        let item = pb::EventpollTfdEntry { tfd: 7, ..Default::default() };
        let mut table = RestoreTable::default();
        assert!(way(3, &item, 7, &table).is_none());
        table.fds.insert(7, TableFd { id: 9, cloexec: false });
        assert!(matches!(way(3, &item, 7, &table), Some(Way::Direct(7))));
    }
}
