//! Which kernel objects tasks share: descriptor tables, fs, signal handlers, address spaces, namespaces.

use std::{cmp::Ordering, collections::HashMap};

use super::collect::Source;
use crate::{
    image::pb,
    sys::{
        Errno,
        kcmp::{Kind, kcmp},
        pid::HostPid,
    },
};

/// Objects of one kind, ordered by kcmp, each with the id it got.
#[derive(Debug)]
struct Objects {
    kind: Kind,
    /// (task that has it, id), sorted.
    known: Vec<(HostPid, u32)>,
    next: u32,
    source: Source,
}

impl Objects {
    fn new(kind: Kind, next: u32, source: Source) -> Self {
        Self { kind, known: Vec::new(), next, source }
    }

    fn id(&mut self, tid: HostPid) -> Result<u32, Errno> {
        let mut error = None;
        let found = self.known.binary_search_by(|(other, _)| {
            kcmp(*other, tid, self.kind, 0, 0).unwrap_or_else(|e| match e {
                // The other one has ended since it was looked at.
                Errno::ESRCH if self.source == Source::Running => Ordering::Less,
                e => {
                    error.get_or_insert(e);
                    Ordering::Equal
                }
            })
        });
        if let Some(error) = error {
            return Err(error);
        }
        Ok(match found {
            Ok(at) => self.known[at].1,
            Err(at) => {
                let id = self.next;
                self.next += 1;
                self.known.insert(at, (tid, id));
                id
            }
        })
    }
}

/// The namespaces of `task_kobj_ids_entry`, in the order in which ids are given.
const NAMESPACES: [&str; 8] = ["pid", "net", "ipc", "uts", "time", "mnt", "user", "cgroup"];

/// Gives ids to what tasks share.
#[derive(Debug)]
pub(super) struct Ids {
    vm: Objects,
    files: Objects,
    fs: Objects,
    sighand: Objects,
    namespaces: HashMap<(usize, u64), u32>,
}

impl Ids {
    /// Ids begin at 2 for tasks: 1 is crtool's own, as the inventory has it.
    pub(super) fn new(source: Source) -> Self {
        Self {
            vm: Objects::new(Kind::Vm, 2, source),
            files: Objects::new(Kind::Files, 2, source),
            fs: Objects::new(Kind::Fs, 2, source),
            sighand: Objects::new(Kind::Sighand, 2, source),
            namespaces: HashMap::new(),
        }
    }

    fn namespace(&mut self, task: &str, kind: usize) -> u32 {
        use std::os::unix::fs::MetadataExt;
        let Some(name) = NAMESPACES.get(kind) else { return 0 };
        let Ok(meta) = std::fs::metadata(format!("/proc/{task}/ns/{name}")) else { return 0 };
        let next = u32::try_from(self.namespaces.len() + 1).unwrap_or(u32::MAX);
        *self.namespaces.entry((kind, meta.ino())).or_insert(next)
    }

    fn with_namespaces(&mut self, task: &str, mut ids: pb::TaskKobjIdsEntry) -> pb::TaskKobjIdsEntry {
        let mut ns = [0; NAMESPACES.len()];
        for (kind, id) in ns.iter_mut().enumerate() {
            *id = self.namespace(task, kind);
        }
        let some = |id: u32| (id != 0).then_some(id);
        ids.pid_ns_id = some(ns[0]);
        ids.net_ns_id = some(ns[1]);
        ids.ipc_ns_id = some(ns[2]);
        ids.uts_ns_id = some(ns[3]);
        ids.time_ns_id = some(ns[4]);
        ids.mnt_ns_id = some(ns[5]);
        ids.user_ns_id = some(ns[6]);
        ids.cgroup_ns_id = some(ns[7]);
        ids
    }

    /// Ids of crtool itself: the namespaces that need not be made again.
    pub(super) fn own(&mut self) -> pb::TaskKobjIdsEntry {
        let ids =
            pb::TaskKobjIdsEntry { vm_id: 1, files_id: 1, fs_id: 1, sighand_id: 1, ..Default::default() };
        self.with_namespaces("self", ids)
    }

    /// Ids of a task, through a living thread of it.
    pub(super) fn task(&mut self, tid: HostPid) -> Result<pb::TaskKobjIdsEntry, Errno> {
        let ids = pb::TaskKobjIdsEntry {
            vm_id: self.vm.id(tid)?,
            files_id: self.files.id(tid)?,
            fs_id: self.fs.id(tid)?,
            sighand_id: self.sighand.id(tid)?,
            ..Default::default()
        };
        Ok(self.with_namespaces(&tid.to_string(), ids))
    }
}

/// Names of the namespaces in which `task` is not where `own` is, but for time namespaces, which are saved.
pub(super) fn foreign(task: &pb::TaskKobjIdsEntry, own: &pb::TaskKobjIdsEntry) -> Vec<&'static str> {
    let pairs = [
        (task.pid_ns_id, own.pid_ns_id),
        (task.net_ns_id, own.net_ns_id),
        (task.ipc_ns_id, own.ipc_ns_id),
        (task.uts_ns_id, own.uts_ns_id),
        (task.time_ns_id, own.time_ns_id),
        (task.mnt_ns_id, own.mnt_ns_id),
        (task.user_ns_id, own.user_ns_id),
        (task.cgroup_ns_id, own.cgroup_ns_id),
    ];
    let others = NAMESPACES.into_iter().zip(pairs).filter(|(name, (a, b))| a != b && *name != "time");
    others.map(|(name, _)| name).collect()
}
