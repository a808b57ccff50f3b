//! Signal handlers: 62 of them, in the order of their numbers without SIGKILL and SIGSTOP.

use super::{ProcessCx, ProcessInside, Result, Supervisor, TaskError};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

/// `struct sigaction` of the kernel: handler, flags, restorer, mask.
pub type KernelSigaction = [u64; 4];

/// Signals that can have a handler, as images order them.
pub const SIGNALS: [i32; 62] = {
    let mut signals = [0; 62];
    let (mut signal, mut at) = (1, 0);
    while signal <= 64 {
        if signal != libc::SIGKILL && signal != libc::SIGSTOP {
            signals[at] = signal;
            at += 1;
        }
        signal += 1;
    }
    signals
};

impl ProcessInside {
    /// Signals with a handler that lets interrupted calls be made again.
    pub fn restarting(&self) -> u64 {
        let restarts = |action: &KernelSigaction| action[1] & libc::SA_RESTART as u64 != 0;
        let set = SIGNALS.iter().zip(&self.sigactions).filter(|(_, action)| restarts(action));
        set.fold(0, |mask, (signal, _)| mask | 1 << (signal - 1))
    }
}

/// Whether `signal` has its default action in an image.
pub fn is_default(core: &pb::CoreEntry, signal: i32) -> bool {
    let Some(tc) = core.tc.as_deref() else { return false };
    let at = SIGNALS.iter().position(|s| *s == signal);
    at.and_then(|at| tc.sigactions.get(at)).is_some_and(|sa| sa.sigaction == libc::SIG_DFL as u64)
}

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    let to_entry = |&[sigaction, flags, restorer, mask]: &KernelSigaction| pb::SaEntry {
        sigaction,
        flags,
        restorer,
        mask,
        compat_sigaction: Some(false),
        mask_extended: None,
    };
    entry.sigactions = cx.inside.sigactions.iter().map(to_entry).collect();
    Ok(())
}

pub(super) fn plan(entry: &pb::TaskCoreEntry, _: &Supervisor, list: &mut List) -> Result<()> {
    if entry.sigactions.len() != SIGNALS.len() {
        return Err(TaskError::image(format!("{} signal handlers instead of 62", entry.sigactions.len())));
    }
    for (&signal, sa) in SIGNALS.iter().zip(&entry.sigactions) {
        if sa.compat_sigaction() {
            return Err(TaskError::Unsupported {
                what: format!("the handler of signal {signal}"),
                reason: "it belongs to a 32-bit program".into(),
            });
        }
        let action: KernelSigaction = [sa.sigaction, sa.flags, sa.restorer, sa.mask];
        let action = list.value(&action);
        let args = [signal.into(), action.into(), 0u64.into(), 8u64.into()];
        list.call("rt_sigaction", libc::SYS_rt_sigaction, &args, Want::Zero);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_images() {
        assert_eq!(SIGNALS[0], 1);
        assert_eq!((SIGNALS[7], SIGNALS[8]), (8, 10));
        assert_eq!((SIGNALS[16], SIGNALS[17]), (18, 20));
        assert_eq!(SIGNALS[61], 64);
    }

    #[test]
    fn restarting_signals() {
        let mut inside = ProcessInside { sigactions: vec![[0; 4]; 62], ..Default::default() };
        inside.sigactions[8] = [1, libc::SA_RESTART as u64, 0, 0];
        assert_eq!(inside.restarting(), 1 << (libc::SIGUSR1 - 1));
    }
}
