//! seccomp: strict mode, and filters with their chains.
//!
//! The image has one list of filters; a thread names its oldest, and each names, as `prev`, the one installed
//! next. Threads whose chains are equal share the entries. Filters are installed last but for the capabilities, while ptrace
//! suspends them (PTRACE_O_SUSPEND_SECCOMP).
//!
//! When all threads of a process have the same chain, its leader installs it for all of them
//! (SECCOMP_FILTER_FLAG_TSYNC): then it is one chain in the kernel too, as it had been, and the process can
//! synchronise its threads again later. CRIU says the same with that flag in the image, and leaves the mode of the
//! other threads out.

use std::collections::HashMap;

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    image::pb,
    sys::{Errno, pid::NsPid, pod, ptrace},
    tracee::{List, Want},
};

const SET_MODE_STRICT: u64 = 0;
const SET_MODE_FILTER: u64 = 1;
const FLAG_TSYNC: u32 = 1;
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;
const FLAG_WAIT_KILLABLE: u32 = 1 << 5;
const INSN_LEN: usize = 8;
/// BPF_MAXINSNS.
const MAX_INSNS: usize = 4096;
/// The kernel bounds all filters of a thread together to 32768 instructions, each filter counting 4 more.
const MAX_CHAIN: usize = 32768;

/// Filters found so far in a dump of a whole tree.
#[derive(Debug, Default)]
pub struct Dump {
    entry: pb::SeccompEntry,
    known: HashMap<pb::SeccompFilter, u32>,
}

impl Dump {
    /// Adds the filters of a thread in filter mode.
    pub(super) fn thread(
        &mut self,
        view: &ThreadView<'_>,
        parts: &mut ThreadParts,
        findings: &mut Vec<Finding>,
    ) -> Result<()> {
        if parts.core.seccomp_mode != Some(pb::SeccompMode::Filter as i32) {
            return Ok(());
        }
        let tid = view.cx.tid;
        let mut chain = Vec::new();
        loop {
            let index = chain.len() as u64;
            let insns = match ptrace::seccomp_filter(tid, index) {
                Ok(insns) => insns,
                Err(Errno::ENOENT) => break,
                Err(Errno::EMEDIUMTYPE) => {
                    findings.push(Finding {
                        pid: view.cx.pid,
                        what: format!("seccomp filter {index} of thread {tid}"),
                        reason: "the kernel does not tell its program".into(),
                        hint: String::new(),
                    });
                    return Ok(());
                }
                Err(e) => return Err(TaskError::request("PTRACE_SECCOMP_GET_FILTER", tid, e)),
            };
            let flags = match ptrace::seccomp_filter_flags(tid, index) {
                Ok(flags) => flags,
                // Linux 4.16 tells them.
                Err(Errno::EIO | Errno::EINVAL) => 0,
                Err(e) => return Err(TaskError::request("PTRACE_SECCOMP_GET_METADATA", tid, e)),
            };
            let filter = insns.iter().flat_map(|insn| pod::bytes_of(insn).to_vec()).collect();
            chain.push((filter, u32::try_from(flags).unwrap_or(0)));
        }
        // Number 0 is the oldest.
        let mut prev = None;
        for (filter, flags) in chain.into_iter().rev() {
            prev = Some(self.add(pb::SeccompFilter { filter, prev, flags: Some(flags) }));
        }
        parts.core.seccomp_filter = prev;
        Ok(())
    }

    fn add(&mut self, filter: pb::SeccompFilter) -> u32 {
        let next = u32::try_from(self.entry.seccomp_filters.len()).unwrap_or(u32::MAX);
        let index = *self.known.entry(filter.clone()).or_insert(next);
        if index == next {
            self.entry.seccomp_filters.push(filter);
        }
        index
    }

    /// What [`Self::finish`] will give.
    pub fn entry(&self) -> &pb::SeccompEntry {
        &self.entry
    }

    /// The content of seccomp.img, which is written also when it is empty.
    pub fn finish(self) -> pb::SeccompEntry {
        self.entry
    }
}

pub(super) fn dump_mode(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let mode = view.status.seccomp.unwrap_or(0);
    match i32::try_from(mode).ok().and_then(|m| pb::SeccompMode::try_from(m).ok()) {
        Some(pb::SeccompMode::Disabled) => {}
        Some(mode) => parts.core.seccomp_mode = Some(mode as i32),
        None => findings.push(Finding {
            pid: view.cx.pid,
            what: format!("seccomp mode {mode} of thread {}", view.cx.tid),
            reason: "crtool does not know it".into(),
            hint: String::new(),
        }),
    }
    Ok(())
}

/// One filter as it is installed.
type Filter<'a> = (&'a [u8], u32);

/// Filters of the tree, ready to be installed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    filters: Vec<(Vec<u8>, Option<usize>, u32)>,
    /// Processes all of whose threads have one chain.
    synchronised: Vec<NsPid>,
}

impl Plan {
    /// Checks seccomp.img.
    pub fn new(entry: &pb::SeccompEntry) -> Result<Self> {
        let mut filters = Vec::with_capacity(entry.seccomp_filters.len());
        for (index, f) in entry.seccomp_filters.iter().enumerate() {
            let bad = |what: &str| TaskError::image(format!("seccomp filter {index}: {what}"));
            if f.filter.is_empty() || f.filter.len() % INSN_LEN != 0 || f.filter.len() / INSN_LEN > MAX_INSNS
            {
                return Err(bad("not a program"));
            }
            let flags = f.flags.unwrap_or(0);
            if flags & !(FLAG_TSYNC | FLAG_LOG | FLAG_SPEC_ALLOW | FLAG_WAIT_KILLABLE) != 0 {
                return Err(bad("unknown flags"));
            }
            // Only backwards, so that chains end.
            let prev = f
                .prev
                .map(|p| usize::try_from(p).ok().filter(|p| *p < index).ok_or(bad("no earlier filter")));
            filters.push((f.filter.clone(), prev.transpose()?, flags));
        }
        Ok(Self { filters, synchronised: Vec::new() })
    }

    /// Checks the filters of a process, whose threads have the core images `cores`.
    pub fn process<'c>(
        &mut self,
        pid: NsPid,
        cores: impl IntoIterator<Item = &'c pb::CoreEntry>,
    ) -> Result<()> {
        let threads: Vec<_> = cores.into_iter().filter_map(|core| core.thread_core.as_deref()).collect();
        for thread in &threads {
            self.chain(thread)?;
        }
        let oldest = |t: &&pb::ThreadCoreEntry| (t.seccomp_mode(), t.seccomp_filter);
        let same = threads.windows(2).all(|pair| oldest(&pair[0]) == oldest(&pair[1]));
        if same && threads.len() > 1 && threads[0].seccomp_mode() == pb::SeccompMode::Filter {
            self.synchronised.push(pid);
        }
        Ok(())
    }

    /// Filters of a thread, oldest first.
    fn chain(&self, thread: &pb::ThreadCoreEntry) -> Result<Vec<Filter<'_>>> {
        if thread.seccomp_mode() != pb::SeccompMode::Filter {
            return Ok(Vec::new());
        }
        let oldest = thread.seccomp_filter.and_then(|n| usize::try_from(n).ok());
        let mut at =
            Some(oldest.ok_or_else(|| TaskError::image("a thread in filter mode without a filter"))?);
        let (mut chain, mut insns) = (Vec::new(), 0);
        while let Some(index) = at {
            let (filter, prev, flags) = self
                .filters
                .get(index)
                .ok_or_else(|| TaskError::image(format!("seccomp filter {index} is not there")))?;
            insns += filter.len() / INSN_LEN;
            if insns > MAX_CHAIN {
                return Err(TaskError::image("a thread with more seccomp filters than there can be"));
            }
            chain.push((filter.as_slice(), *flags));
            at = *prev;
        }
        Ok(chain)
    }
}

pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let thread = plan.thread()?;
    if thread.seccomp_mode() == pb::SeccompMode::Strict {
        let args = [SET_MODE_STRICT.into(), 0u64.into(), 0u64.into()];
        list.call("seccomp strict mode", libc::SYS_seccomp, &args, Want::Zero);
        return Ok(());
    }
    let together = plan.seccomp.synchronised.contains(&plan.pid);
    if together && plan.process().is_none() {
        return Ok(());
    }
    for (number, (filter, flags)) in plan.seccomp.chain(thread)?.into_iter().enumerate() {
        let insns = list.bytes(filter);
        // `struct sock_fprog`: length, pointer.
        let program = list.value(&[(filter.len() / INSN_LEN) as u64, 0]);
        list.pointer(program.at(8), insns);
        let leader = plan.process().is_some();
        let flags = if together { flags | FLAG_TSYNC } else { flags };
        let flags = if leader { flags } else { flags & !FLAG_TSYNC };
        // Where filters forbid speculation, the state that the image has says whether these did.
        let flags = if thread.speculation.is_empty() { flags } else { flags | FLAG_SPEC_ALLOW };
        let args = [SET_MODE_FILTER.into(), flags.into(), program.into()];
        list.call(format!("seccomp filter {number}"), libc::SYS_seccomp, &args, Want::Zero);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(prev: Option<u32>) -> pb::SeccompFilter {
        pb::SeccompFilter { filter: vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f], prev, flags: Some(0) }
    }

    fn core(oldest: u32) -> pb::CoreEntry {
        pb::CoreEntry {
            thread_core: Some(Box::new(pb::ThreadCoreEntry {
                seccomp_mode: Some(pb::SeccompMode::Filter as i32),
                seccomp_filter: Some(oldest),
                ..Default::default()
            })),
            ..Default::default()
        }
    }

    #[test]
    fn equal_chains_share_entries() {
        let mut dump = Dump::default();
        let first = dump.add(filter(None));
        let second = dump.add(filter(Some(first)));
        assert_eq!((first, second), (0, 1));
        assert_eq!((dump.add(filter(None)), dump.add(filter(Some(0)))), (0, 1));
        assert_eq!(dump.finish().seccomp_filters.len(), 2);
    }

    #[test]
    fn chains_end() {
        let entry = pb::SeccompEntry { seccomp_filters: vec![filter(None), filter(Some(0))] };
        let (a, b) = (core(1), core(1));
        let mut plan = Plan::new(&entry).unwrap();
        plan.process(NsPid::new(5), [&a, &b]).unwrap();
        plan.process(NsPid::new(6), [&a]).unwrap();
        assert_eq!(plan.synchronised, [NsPid::new(5)]);
        assert_eq!(plan.chain(a.thread_core.as_ref().unwrap()).unwrap().len(), 2);
        for bad in [vec![filter(Some(0))], vec![filter(None), filter(Some(1))], vec![filter(Some(7))]] {
            assert!(Plan::new(&pb::SeccompEntry { seccomp_filters: bad }).is_err());
        }
        assert!(plan.process(NsPid::new(7), [&core(2)]).is_err());
    }
}
