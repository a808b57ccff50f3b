//! The moment at which the clocks of the tree stand in the images: all that is left of a time is what is left then.
//!
//! It comes after everything that runs on its own has been read, so that nothing in the images has happened before its time.

use std::{cell::OnceCell, fs, time::Duration};

use super::{
    call::{self, Wait},
    itimer, pending, posix_timer,
};
use crate::{arch::registers, host::peek::TaskPeek, image::pb, ns::time::Clocks, sys::pid::HostPid};

/// Most threads that are looked at before they are stopped.
const MOST_LOOKED_AT: usize = 256;

/// What the kernel alone knows of tasks, where it can be read. It takes some milliseconds to find out how, which only those pay
/// who need it.
#[derive(Debug)]
pub(crate) struct Peek(OnceCell<Option<TaskPeek>>);

impl Peek {
    /// Without `thorough` only what tasks tell is used.
    pub(crate) fn new(thorough: bool) -> Self {
        Self(if thorough { OnceCell::new() } else { OnceCell::from(None) })
    }

    fn open(&self) -> Option<&TaskPeek> {
        let open = TaskPeek::open;
        let opened = self.0.get_or_init(|| {
            open().inspect_err(|error| tracing::debug!("calls are not looked into: {error}")).ok()
        });
        opened.as_ref()
    }

    /// Gets ready, if some thread of the processes `pids` waits in a call with a timeout now, so that it need not be done
    /// while they are stopped.
    pub(crate) fn prepare(&self, pids: &[HostPid]) {
        let tasks = pids.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok());
        let threads = tasks.flatten().flatten().take(MOST_LOOKED_AT);
        let mut calls = threads.filter_map(|entry| fs::read_to_string(entry.path().join("syscall")).ok());
        if calls.any(|text| call::may_be_timed(&text)) {
            self.open();
        }
    }
}

/// The clocks at that moment, and what else is needed to find out what is left.
#[derive(Debug)]
pub(crate) struct Moment<'a> {
    /// Of the tree.
    tree: Clocks,
    /// Of the host, if they can be told.
    host: Option<Clocks>,
    peek: &'a Peek,
}

impl<'a> Moment<'a> {
    /// The clocks of the tree and of the host.
    pub(crate) fn new(tree: Clocks, host: Option<Clocks>, peek: &'a Peek) -> Self {
        Self { tree, host, peek }
    }

    /// Settles the core images of a process, all of whose threads are stopped. Its clocks were `read` when its timers
    /// were.
    pub(crate) fn settle(&self, cores: &mut [(HostPid, pb::CoreEntry)], read: [[u64; 2]; 2]) {
        let [[sec, nsec], _] = read;
        let read = Duration::from_secs(sec).saturating_add(Duration::from_nanos(nsec));
        let gone = self.tree.monotonic.saturating_sub(read);
        Self::timers(cores, gone);
        for (tid, core) in cores {
            self.call(*tid, core);
        }
    }

    fn timers(cores: &mut [(HostPid, pb::CoreEntry)], gone: Duration) {
        let infos = cores.iter().flat_map(|(_, core)| pending::infos(core));
        let waiting = infos.filter_map(|info| posix_timer::sender(&info.siginfo)).collect();
        for timers in cores.iter_mut().filter_map(|(_, core)| core.tc.as_mut()?.timers.as_mut()) {
            itimer::settle(timers, gone);
            posix_timer::settle(&mut timers.posix, gone, &waiting);
        }
    }

    /// What an interrupted call still waits for. Where that is not known, it has ended with EINTR.
    fn call(&self, tid: HostPid, core: &mut pb::CoreEntry) {
        let (Some(info), Some(thread)) = (core.thread_info.as_deref_mut(), core.thread_core.as_deref_mut())
        else {
            return;
        };
        if thread.call_left_ns.take().is_none() {
            return;
        }
        let Some(host) = self.host else { return };
        let block = self.peek.open().map(|peek| peek.restart_block(tid));
        let block = match block {
            Some(Ok(block)) => block,
            Some(Err(error)) => return tracing::debug!("thread {tid}: {error}"),
            None => return,
        };
        let Some((number, wait)) = call::waits(&info.gpregs, &block, host) else {
            return tracing::debug!("thread {tid}: {block:?} is not what its registers say");
        };
        registers::name_call(&mut info.gpregs, number);
        match wait {
            Wait::AsAsked => registers::make_again(&mut info.gpregs),
            // A restore makes only calls again that it knows by their registers.
            Wait::For(left) if call::is_known(&info.gpregs) => {
                thread.call_left_ns = u64::try_from(left.as_nanos()).ok();
            }
            Wait::For(_) => tracing::debug!("thread {tid}: its call has ended with EINTR"),
        }
    }
}
