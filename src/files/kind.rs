//! What a kind of open file is to the rest: one trait, one row in the table of [`super::KINDS`].
//!
//! A kind is one module that knows one kernel object in both directions. `eventfd.rs` is the example to follow.
//!
//! At dump, for every open file description once: `owns` (what `refused::FIRST` lists goes first; then rows are asked in
//! order, the first wins), then `dump`. When all tables of the tree are read: `complete` for every entry, then `finish_dump`
//! once per kind.
//!
//! Then `would_open` for every entry: what its restore would refuse here is known before the tree is killed.
//!
//! At restore: `open` for every entry of `files.img`, in the supervisor, before any task exists (but not for paths that
//! belong to a fifo or terminal, or stand for a link remap). When all tasks exist: `open_late` for those that asked for it.
//! While the list of a task is made: `plan`, for the tables that hold the file, until one of them has done it. Just before the tasks run: `before_resume`.

use std::{
    any::{Any, TypeId},
    cell::OnceCell,
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use super::{DumpTables, FdView, FileError, RestoreTable};
use crate::{
    image::{Store, pb},
    ns::time::Running,
    settings::{DumpSettings, RestoreSettings},
    sys::pid::HostPid,
    tracee::List,
    view::{Symlinks, View},
};

/// One kind of open file: what it looks like, how it is saved, how it is made again.
pub trait FileKind {
    /// Its message in `files.img`.
    type Entry: 'static;

    /// The kernel's word for it, for messages.
    const NAME: &'static str;

    /// Its type in `fdinfo` and `files.img`.
    const TYPE: pb::FdTypes;

    /// Whether the descriptor is of this kind: by link text, fdinfo and stat only.
    fn owns(fd: &FdView<'_>) -> bool;

    /// The entry of a description, called once for each. `id` is the id to store. Only reads: the task goes on using it.
    /// [`FileError::Unsupported`] becomes a finding and the dump looks at the rest; any other error ends it.
    fn dump(cx: &mut DumpCx<'_>, fd: &FdView<'_>, id: u32) -> Result<Self::Entry, FileError>;

    /// Completes an entry that speaks of other files (epoll), when all tables are known. `at` is one place where the
    /// description is open. Errors as in `dump`.
    fn complete(
        _cx: &mut DumpCx<'_>,
        _tables: &DumpTables,
        _entry: &mut Self::Entry,
        _at: Place,
    ) -> Result<(), FileError> {
        Ok(())
    }

    /// Writes images of its own (contents of pipes, ttys, ...), when all entries are complete. Called once, also when there
    /// is no file of the kind.
    fn finish_dump(_cx: &mut DumpCx<'_>) -> Result<(), FileError> {
        Ok(())
    }

    /// Makes the description again, in the supervisor. Descriptors are close-on-exec; status flags (O_NONBLOCK, O_APPEND,
    /// ...) are set by the kind, the owner (fown) and the descriptor's own flags are not.
    fn open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<Opened, FileError>;

    /// What `open` would refuse here and now: its own checks, with nothing opened, made or changed that anybody could notice. A
    /// dump asks it for every entry before it commits, with the messages that it is going to write.
    fn would_open(cx: &mut RestoreCx<'_>, entry: &Self::Entry) -> Result<(), FileError>;

    /// As `open`, for an entry whose `open` said [`Opened::Late`]: all tasks of the tree exist, under their pids, stopped.
    fn open_late(_cx: &mut RestoreCx<'_>, _entry: &Self::Entry) -> Result<OwnedFd, FileError> {
        Err(FileError::unsupported("this kind of file is never opened late", ""))
    }

    /// Adds calls that must be made by a task that holds the file, after its table is complete (epoll items).
    /// `fd` is its number in `table`. [`Planned::Elsewhere`]: this table cannot, ask another one.
    fn plan(
        _cx: &mut RestoreCx<'_>,
        _entry: &Self::Entry,
        _table: &RestoreTable,
        _fd: i32,
        _list: &mut List,
    ) -> Result<Planned, FileError> {
        Ok(Planned::Done)
    }

    /// Last touch by the supervisor when everything else is in place (timers start to run here). `fd` is the
    /// supervisor's own descriptor of the description.
    fn before_resume(
        _cx: &mut RestoreCx<'_>,
        _entry: &Self::Entry,
        _fd: BorrowedFd<'_>,
    ) -> Result<(), FileError> {
        Ok(())
    }

    /// Puts the entry into its member of `file`.
    fn pack(file: &mut pb::FileEntry, entry: Self::Entry);

    /// The entry's member of `file`.
    fn unpack(file: &pb::FileEntry) -> Option<&Self::Entry>;

    /// As [`Self::unpack`], to change it.
    fn unpack_mut(file: &mut pb::FileEntry) -> Option<&mut Self::Entry>;

    /// The owner as the entry holds it; `None` for kinds without one.
    fn fown(entry: &Self::Entry) -> Option<&pb::FownEntry>;
}

/// Where a description is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// A task.
    pub pid: HostPid,
    /// Its descriptor number.
    pub fd: i32,
}

/// What `open` gives.
#[derive(Debug)]
pub enum Opened {
    /// The description, ready.
    Now(OwnedFd),
    /// It needs the tasks to exist: [`FileKind::open_late`] makes it.
    Late,
}

/// Whether `plan` has done its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planned {
    /// All calls are in this list.
    Done,
    /// Nothing was added; another holder must do it. When all say so, the restore fails.
    Elsewhere,
}

/// One value per type: what kinds remember between their calls.
#[derive(Default)]
pub(super) struct States(HashMap<TypeId, Box<dyn Any>>);

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("States").field(&self.0.len()).finish()
    }
}

impl States {
    fn get<T: Default + 'static>(&mut self) -> &mut T {
        let state = self.0.entry(TypeId::of::<T>()).or_insert_with(|| Box::new(T::default()));
        state.downcast_mut().expect("stored under its own type")
    }
}

/// What a kind has at hand while a tree is dumped.
#[allow(missing_debug_implementations)] // stores are no Debug
pub struct DumpCx<'a> {
    /// Where images go.
    pub store: &'a dyn Store,
    /// What was asked for.
    pub settings: &'a DumpSettings,
    /// No task of the tree runs. Else it is only looked at, and nothing may be touched even for a moment.
    pub(super) frozen: bool,
    /// CLOCK_MONOTONIC of crtool when the clocks of the tree were where the images say; known when entries are completed.
    pub(super) clock: Option<Duration>,
    view: OnceCell<Rc<View>>,
    pub(super) states: States,
    pub(super) last_id: u32,
    /// Entries that come before the one being made, see [`Self::add_entry`].
    pub(super) extra: Vec<pb::FileEntry>,
}

impl<'a> DumpCx<'a> {
    /// With nothing remembered yet.
    pub(super) fn new(store: &'a dyn Store, settings: &'a DumpSettings) -> Self {
        Self {
            store,
            settings,
            frozen: true,
            clock: None,
            view: OnceCell::new(),
            states: States::default(),
            last_id: 0,
            extra: Vec::new(),
        }
    }

    /// How paths that /proc shows are resolved. None of them holds a symbolic link.
    pub(super) fn view(&self) -> Result<Rc<View>, FileError> {
        view(&self.view, Symlinks::None)
    }

    /// What the kind remembers between its calls: one value per type, made by `Default`.
    pub fn state<T: Default + 'static>(&mut self) -> &mut T {
        self.states.get()
    }

    /// An id that no other file has.
    pub fn next_id(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    /// Adds an entry to `files.img` besides the one being made: a file that no descriptor stands for.
    pub fn add_entry(&mut self, entry: pb::FileEntry) {
        self.extra.push(entry);
    }
}

/// What a kind has at hand while a tree is restored.
#[allow(missing_debug_implementations)] // stores are no Debug
pub struct RestoreCx<'a> {
    /// Where images are.
    pub store: &'a dyn Store,
    /// What was asked for.
    pub settings: &'a RestoreSettings,
    view: OnceCell<Rc<View>>,
    pub(super) states: States,
    /// All entries of `files.img`. By id, which is the order in which they were read: so they are met as they lie in memory.
    pub(super) entries: BTreeMap<u32, Rc<pb::FileEntry>>,
    /// Files that are in a descriptor table; the others are mapped, executed, or a part of another file.
    pub(super) in_tables: HashSet<u32>,
    /// Files that somebody uses.
    pub(super) taken: HashSet<u32>,
    /// The clocks of the tree, if they have gone on where they stood.
    pub(super) clocks: Option<Running>,
}

impl<'a> RestoreCx<'a> {
    /// With nothing remembered yet.
    pub(super) fn new(store: &'a dyn Store, settings: &'a RestoreSettings) -> Self {
        Self {
            store,
            settings,
            view: OnceCell::new(),
            states: States::default(),
            entries: BTreeMap::new(),
            in_tables: HashSet::new(),
            taken: HashSet::new(),
            clocks: None,
        }
    }

    /// How paths of the images are resolved.
    pub(super) fn view(&self) -> Result<Rc<View>, FileError> {
        view(&self.view, symlinks(self.settings))
    }

    /// What the kind remembers between its calls: one value per type, made by `Default`.
    pub fn state<T: Default + 'static>(&mut self) -> &mut T {
        self.states.get()
    }

    /// The entry of the file with a path behind a fifo or terminal (`regf_id`).
    pub(super) fn regular_entry(&self, id: u32) -> Result<pb::RegFileEntry, FileError> {
        self.entries
            .get(&id)
            .and_then(|file| file.reg.as_deref().cloned())
            .ok_or_else(|| FileError::entry(id, "it should be a file with a path"))
    }
}

/// Which symbolic links may stand where the tree had none.
pub(super) fn symlinks(settings: &RestoreSettings) -> Symlinks {
    if settings.allow_symlinks { Symlinks::All } else { Symlinks::OfRoot }
}

fn view(cell: &OnceCell<Rc<View>>, symlinks: Symlinks) -> Result<Rc<View>, FileError> {
    if let Some(view) = cell.get() {
        return Ok(Rc::clone(view));
    }
    let view = Rc::new(View::own(symlinks).map_err(FileError::path("open", b"/"))?);
    let _ = cell.set(Rc::clone(&view));
    Ok(view)
}

/// A kind with its entry type erased.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) r#type: pb::FdTypes,
    pub(super) owns: fn(&FdView<'_>) -> bool,
    pub(super) dump: fn(&mut DumpCx<'_>, &FdView<'_>, u32) -> Result<pb::FileEntry, FileError>,
    pub(super) complete: fn(&mut DumpCx<'_>, &DumpTables, &mut pb::FileEntry, Place) -> Result<(), FileError>,
    pub(super) finish_dump: fn(&mut DumpCx<'_>) -> Result<(), FileError>,
    pub(super) open: fn(&mut RestoreCx<'_>, &pb::FileEntry) -> Result<Opened, FileError>,
    pub(super) would_open: fn(&mut RestoreCx<'_>, &pb::FileEntry) -> Result<(), FileError>,
    pub(super) open_late: fn(&mut RestoreCx<'_>, &pb::FileEntry) -> Result<OwnedFd, FileError>,
    pub(super) plan:
        fn(&mut RestoreCx<'_>, &pb::FileEntry, &RestoreTable, i32, &mut List) -> Result<Planned, FileError>,
    pub(super) before_resume: fn(&mut RestoreCx<'_>, &pb::FileEntry, BorrowedFd<'_>) -> Result<(), FileError>,
    pub(super) fown: fn(&pb::FileEntry) -> Option<&pb::FownEntry>,
}

fn member<K: FileKind>(file: &pb::FileEntry) -> Result<&K::Entry, FileError> {
    K::unpack(file).ok_or_else(|| FileError::entry(file.id, format!("no {} entry in it", K::NAME)))
}

/// The row of a kind.
pub(super) const fn kind<K: FileKind>() -> Kind {
    Kind {
        name: K::NAME,
        r#type: K::TYPE,
        owns: K::owns,
        dump: |cx, fd, id| {
            let mut file = pb::FileEntry { r#type: K::TYPE.into(), id, ..Default::default() };
            K::pack(&mut file, K::dump(cx, fd, id)?);
            Ok(file)
        },
        complete: |cx, tables, file, at| match K::unpack_mut(file) {
            Some(entry) => K::complete(cx, tables, entry, at),
            None => Ok(()),
        },
        finish_dump: K::finish_dump,
        open: |cx, file| K::open(cx, member::<K>(file)?),
        would_open: |cx, file| K::would_open(cx, member::<K>(file)?),
        open_late: |cx, file| K::open_late(cx, member::<K>(file)?),
        plan: |cx, file, table, fd, list| K::plan(cx, member::<K>(file)?, table, fd, list),
        before_resume: |cx, file, fd| K::before_resume(cx, member::<K>(file)?, fd),
        fown: |file| K::unpack(file).and_then(K::fown),
    }
}

/// Implements the three functions between an entry and its member of `file_entry`.
macro_rules! packed_in {
    ($member:ident) => {
        fn pack(file: &mut $crate::image::pb::FileEntry, entry: Self::Entry) {
            file.$member = Some(entry.into());
        }
        fn unpack(file: &$crate::image::pb::FileEntry) -> Option<&Self::Entry> {
            file.$member.as_ref().map(|entry| &*entry as &Self::Entry)
        }
        fn unpack_mut(file: &mut $crate::image::pb::FileEntry) -> Option<&mut Self::Entry> {
            file.$member.as_mut().map(|entry| &mut *entry as &mut Self::Entry)
        }
    };
}
pub(super) use packed_in;
