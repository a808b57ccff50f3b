//! Keyrings of a thread or a process (keyrings(7)): refused, because keys have numbers that a program remembers and nobody can
//! choose, and because their content is not everybody's to read.
//!
//! Not saved, with a warning: the keys of the session keyring. A restored task has that of crtool. It is no reason to refuse a
//! dump, because whatever was started by a login or a service manager has one, and hardly any program looks at it. (To
//! ask for it gives a task that has none the one of its user, as any use would do.)

use std::sync::{LazyLock, Mutex, PoisonError};

use super::{ProcessCx, Result, TaskError, ThreadParts, ThreadView};
use crate::{
    finding::Finding,
    image::pb,
    sys::{Errno, task},
    tracee::{CallId, List, Results, Want},
};

const KEYCTL_GET_KEYRING_ID: u64 = 0;
/// KEY_SPEC_THREAD_KEYRING, KEY_SPEC_PROCESS_KEYRING.
const KINDS: [(i32, &str); 2] = [(-1, "thread"), (-2, "process")];

const KEYCTL_READ: u64 = 11;
const KEY_SPEC_SESSION_KEYRING: i32 = -3;

/// Where the answers about a session keyring will be: its number, and the length of its list of keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Session(CallId, CallId);

/// Asks a process for its session keyring.
pub(super) fn ask_session(list: &mut List) -> Session {
    let id = [KEYCTL_GET_KEYRING_ID.into(), KEY_SPEC_SESSION_KEYRING.into(), 0u64.into()];
    let id = list.call("KEYCTL_GET_KEYRING_ID", libc::SYS_keyctl, &id, Want::Any);
    let keys = [KEYCTL_READ.into(), KEY_SPEC_SESSION_KEYRING.into(), 0u64.into(), 0u64.into()];
    Session(id, list.call("KEYCTL_READ", libc::SYS_keyctl, &keys, Want::Any))
}

impl Session {
    /// The number of a keyring that has keys.
    pub(super) fn read(self, results: &Results) -> Result<Option<i32>> {
        let value = |call| results.value(call).map_err(TaskError::Results);
        Ok(i32::try_from(value(self.0)?)
            .ok()
            .filter(|id| *id > 0)
            .filter(|_| value(self.1).is_ok_and(|len| len > 0)))
    }
}

pub(super) fn dump_session(cx: &ProcessCx, _: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    /// That of crtool.
    static OWN: LazyLock<Option<i32>> = LazyLock::new(|| task::session_keyring().ok());
    static SAID: Mutex<Vec<i32>> = Mutex::new(Vec::new());
    let Some(id) = cx.inside.session_keyring.filter(|id| Some(*id) != *OWN) else { return Ok(()) };
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !said.contains(&id) {
        said.push(id);
        tracing::warn!("keys in the session keyring of process {} are not saved", cx.pid);
    }
    Ok(())
}

/// Where the answers will be.
#[derive(Debug, Clone)]
pub(super) struct Questions([CallId; 2]);

/// Asks for both, and makes none.
pub(super) fn ask(list: &mut List) -> Questions {
    Questions(KINDS.map(|(which, _)| {
        let args = [KEYCTL_GET_KEYRING_ID.into(), which.into(), 0u64.into()];
        list.call("KEYCTL_GET_KEYRING_ID", libc::SYS_keyctl, &args, Want::Any)
    }))
}

impl Questions {
    /// Which of the two there are.
    pub(super) fn read(&self, results: &Results) -> Result<[bool; 2]> {
        let mut found = [false; 2];
        for (found, call) in found.iter_mut().zip(self.0) {
            let result = results.value(call).map_err(TaskError::Results)?;
            *found = match Errno::from_raw(i32::try_from(-result).unwrap_or(0)) {
                _ if result >= 0 => true,
                Errno::ENOKEY | Errno::ENOSYS => false,
                source => return Err(TaskError::Inside { what: "KEYCTL_GET_KEYRING_ID", source }),
            };
        }
        Ok(found)
    }
}

pub(super) fn dump(view: &ThreadView<'_>, _: &mut ThreadParts, findings: &mut Vec<Finding>) -> Result<()> {
    for ((_, name), _) in KINDS.iter().zip(view.cx.inside.keyrings).filter(|(_, there)| *there) {
        findings.push(Finding {
            pid: view.cx.pid,
            what: format!("thread {}: {name} keyring", view.cx.tid),
            reason: "keys cannot be made again with the numbers they had".into(),
            hint: String::new(),
        });
    }
    Ok(())
}
