//! The list of robust futexes that a thread holds, and what the kernel does with it when the thread ends.
//!
//! At the end of a thread the kernel marks every futex of its list (FUTEX_OWNER_DIED), and clears the word whose address the
//! thread has told (set_tid_address). Where these lie in memory that outlives the tree, in a file that is mapped shared, the
//! owner that is restored would find its lock broken, and others would have found it free. So a thread that is killed
//! because images of it are safe, or because a restore has failed, holds nothing when it dies: its list is emptied
//! from outside ([`disarm`]), and what lies in a shared file is put back afterwards ([`SharedBytes`]).

use std::{fs::File, os::unix::fs::FileExt};

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    sys::{self, Errno, pid::HostPid, pod},
    tracee::{List, RemoteAddr, RemoteMemory, TraceError, Want, read_maps},
};

/// `struct robust_list_head`, the only length there is.
const LEN: u32 = 24;

pub(super) fn dump(view: &ThreadView<'_>, parts: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    let tid = view.cx.tid;
    let (head, len) =
        sys::task::get_robust_list(tid).map_err(|e| TaskError::request("get_robust_list", tid, e))?;
    parts.core.futex_rla = head;
    parts.core.futex_rla_len = u32::try_from(len).unwrap_or(LEN);
    Ok(())
}

/// Last of all: until then a thread whose restore fails holds nothing, even if crtool is killed.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let thread = plan.thread()?;
    if thread.futex_rla != 0 && thread.futex_rla_len != LEN {
        return Err(TaskError::image(format!("a robust list of {} bytes", thread.futex_rla_len)));
    }
    // Also an empty one is set: a clone may have inherited another.
    let args = [thread.futex_rla.into(), LEN.into()];
    list.call("set_robust_list", libc::SYS_set_robust_list, &args, Want::Zero);
    Ok(())
}

/// Bytes of a file that tasks about to be killed have mapped.
#[derive(Debug)]
pub(crate) struct SharedBytes {
    file: File,
    offset: u64,
    bytes: Vec<u8>,
}

impl SharedBytes {
    /// Those at `at` of a task, if they lie in the shared mapping `start..end` that begins at `pgoff` in its file.
    pub(crate) fn of(
        tid: HostPid,
        (start, end, pgoff): (u64, u64, u64),
        at: u64,
        len: usize,
    ) -> std::io::Result<Option<Self>> {
        if at < start || at.saturating_add(len as u64) > end {
            return Ok(None);
        }
        let file = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{tid}/map_files/{start:x}-{end:x}"))?;
        let offset = pgoff + (at - start);
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(Some(Self { file, offset, bytes }))
    }

    /// Gives the file the bytes that it had. When all tasks are dead.
    pub(crate) fn put_back(&self) {
        if let Err(error) = self.file.write_all_at(&self.bytes, self.offset) {
            tracing::warn!("a shared file keeps what the end of a task has done to it: {error}");
        }
    }
}

/// Empties the robust list of a stopped thread, because it is going to be killed. What of it lies in a shared file is added to
/// `kept`, to be put back when it is dead.
pub(crate) fn disarm(tid: HostPid, kept: &mut Vec<SharedBytes>) -> std::result::Result<(), TraceError> {
    let (head, _) = match sys::task::get_robust_list(tid) {
        Ok(head) => head,
        Err(Errno::ESRCH) => return Ok(()),
        Err(e) => return Err(TraceError::request("get_robust_list", tid, e)),
    };
    let mut words = [0u8; LEN as usize];
    let read = sys::process_vm::read(tid, &[(head, words.len())], &mut words);
    // A list that cannot be read holds nothing: the kernel could not read it either.
    let Some([next, futex_offset, pending]) =
        pod::from_bytes::<[u64; 3]>(&words).filter(|_| read == Ok(words.len()))
    else {
        return Ok(());
    };
    if head == 0 || (next == head && pending == 0) {
        return Ok(());
    }
    let area = read_maps(tid)?.into_iter().find(|area| (area.start..area.end).contains(&head));
    if let Some(area) = area.filter(|area| area.shared && area.path().is_some()) {
        let found = SharedBytes::of(tid, (area.start, area.end, area.pgoff_bytes), head, words.len());
        let path = format!("/proc/{tid}/map_files/{}", area.map_files_name());
        kept.extend(found.map_err(|source| TraceError::Proc { path, source })?);
    }
    RemoteMemory::open(tid)?.write(RemoteAddr(head), pod::bytes_of(&[head, futex_offset, 0]))
}
