//! Several files of a kind through the test process: dumped together, restored together.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::Command,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    unistd::Pid,
};

use super::{
    DumpCx, DumpTables, FileError, FileKind, Opened, Place, RestoreCx, kind::States, testing::with_view,
};
use crate::{
    image::MemStore,
    settings::{DumpSettings, RestoreSettings},
    sys::pid::HostPid,
    tracee::{GadgetCache, Injection, List, Seized, Thread},
};

/// A store, and one dump into it.
pub(super) struct Trial {
    pub(super) store: MemStore,
    pub(super) dump_settings: DumpSettings,
    pub(super) restore_settings: RestoreSettings,
    states: States,
    last_id: u32,
}

impl Trial {
    pub(super) fn new() -> Self {
        Self {
            store: MemStore::default(),
            dump_settings: DumpSettings::new(Pid::this(), Path::new(".")),
            restore_settings: RestoreSettings::new(Path::new(".")),
            states: States::default(),
            last_id: 0,
        }
    }

    /// What a kind finds as its state.
    pub(super) fn set_state<T: Default + 'static>(&mut self, value: T) {
        self.cx(|cx| *cx.state::<T>() = value);
    }

    /// Runs `f` as a part of the dump.
    pub(super) fn cx<T>(&mut self, f: impl FnOnce(&mut DumpCx<'_>) -> T) -> T {
        let mut cx = DumpCx::new(&self.store, &self.dump_settings);
        (cx.states, cx.last_id) = (std::mem::take(&mut self.states), self.last_id);
        let result = f(&mut cx);
        (self.states, self.last_id) = (cx.states, cx.last_id);
        result
    }

    /// Dumps one of our descriptors, or says why not.
    pub(super) fn try_dump<K: FileKind>(&mut self, fd: &OwnedFd) -> Result<K::Entry, FileError> {
        self.cx(|cx| {
            let id = cx.next_id();
            with_view(fd, |view| {
                assert!(K::owns(view), "{} does not own {}", K::NAME, view.link_text());
                K::dump(cx, view, id)
            })
        })
    }

    /// As `try_dump`, which must work.
    pub(super) fn dump<K: FileKind>(&mut self, fd: &OwnedFd) -> K::Entry {
        self.try_dump::<K>(fd).unwrap()
    }

    /// Completes a copy of `entry`, with no tables.
    pub(super) fn complete<K: FileKind>(&mut self, entry: &K::Entry) -> Result<K::Entry, FileError>
    where
        K::Entry: Clone,
    {
        let mut entry = entry.clone();
        let at = Place { pid: HostPid::own(), fd: -1 };
        self.cx(|cx| K::complete(cx, &DumpTables::default(), &mut entry, at))?;
        Ok(entry)
    }

    /// Writes the kind's own images.
    pub(super) fn finish<K: FileKind>(&mut self) -> Result<(), FileError> {
        self.cx(|cx| K::finish_dump(cx))
    }

    /// Runs `f` as a part of a restore.
    pub(super) fn restore_cx<T>(&self, f: impl FnOnce(&mut RestoreCx<'_>) -> T) -> T {
        f(&mut RestoreCx::new(&self.store, &self.restore_settings))
    }

    /// Opens all entries, then takes the last step with all of them.
    pub(super) fn try_restore<K: FileKind>(&self, entries: &[&K::Entry]) -> Result<Vec<OwnedFd>, FileError> {
        let mut cx = RestoreCx::new(&self.store, &self.restore_settings);
        let mut files = Vec::new();
        for entry in entries {
            files.push(match K::open(&mut cx, entry)? {
                Opened::Now(fd) => fd,
                Opened::Late => K::open_late(&mut cx, entry)?,
            });
        }
        for (fd, entry) in files.iter().zip(entries) {
            K::before_resume(&mut cx, entry, fd.as_fd())?;
        }
        Ok(files)
    }

    /// As `try_restore` of one entry, which must work.
    pub(super) fn restore<K: FileKind>(&self, entry: &K::Entry) -> OwnedFd {
        self.try_restore::<K>(&[entry]).unwrap().remove(0)
    }
}

/// Runs `list` in a child that has inherited `files` under our numbers.
pub(super) fn run_list(files: &[&OwnedFd], list: List) {
    let inheritable = |on: bool| {
        for fd in files {
            let flag = if on { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
            fcntl(fd, FcntlArg::F_SETFD(flag)).unwrap();
        }
    };
    inheritable(true);
    let child = Command::new("/bin/sleep").arg("1000").spawn();
    inheritable(false);
    let mut child = child.unwrap();
    let tid = HostPid::new(child.id().cast_signed());
    let stopped = Seized::seize(tid, &|| Ok(())).and_then(|seized| seized.settle(&|| Ok(()))).unwrap();
    let seccomp = stopped.seccomp_suspended();
    let mut thread = Thread::new(stopped).unwrap();
    thread.seccomp_suspended = seccomp;
    let mut cache = GadgetCache::default();
    let mut injection = Injection::enter(tid, &thread, &[&thread], 1 << 16, &mut cache, &|| Ok(())).unwrap();
    let outcome = injection.run(&[(&thread, list)]).map(drop);
    injection.leave().unwrap();
    thread.stopped.detach().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    outcome.unwrap();
}
