//! What this kernel and these capabilities can do, found by trying.
//!
//! A probe brings about the effect on a child of ours (or on ourselves where that leaves no trace) and looks at
//! it; that a call returned no error proves nothing. Only `crtool check` and the tests run all of them; other
//! commands run none, or the one they need.

mod caps;
pub(crate) mod child;
mod files;
mod mem;
mod namespaces;
pub(crate) mod peek;
mod tasks;

use std::io;

pub use caps::missing as missing_capabilities;

use crate::{proc::ParseError, sys::Errno};

/// How much depends on a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Category {
    /// Nothing works without it.
    Essential,
    /// Some trees need it.
    Extra,
    /// New, or only makes things faster.
    Experimental,
}

/// Why a probe found that a feature is not there.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum Trouble {
    #[error("{0}")]
    Call(&'static str, #[source] Errno),
    #[error("read of /proc")]
    Proc(#[source] io::Error),
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// The calls were accepted and what they should bring about did not happen.
    #[error("{0}")]
    NoEffect(&'static str),
}

/// Answers a question to the kernel.
type Ask = fn() -> Result<(), Trouble>;

/// A feature of the kernel, by CRIU's name for it where it has one.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// What `--feature` takes.
    pub name: &'static str,
    /// How much depends on it.
    pub category: Category,
    /// What it is for.
    pub purpose: &'static str,
    ask: Ask,
}

impl Probe {
    /// Tries it.
    pub fn ask(&self) -> Result<(), Trouble> {
        (self.ask)()
    }
}

const fn essential(name: &'static str, purpose: &'static str, ask: Ask) -> Probe {
    Probe { name, category: Category::Essential, purpose, ask }
}

const fn extra(name: &'static str, purpose: &'static str, ask: Ask) -> Probe {
    Probe { name, category: Category::Extra, purpose, ask }
}

const fn experimental(name: &'static str, purpose: &'static str, ask: Ask) -> Probe {
    Probe { name, category: Category::Experimental, purpose, ask }
}

/// Everything we can ask.
pub static PROBES: &[Probe] = &[
    essential("ptrace_seize", "freeze a task unseen", tasks::ptrace_seize),
    essential("ptrace_peeksiginfo", "save pending signals", tasks::peek_siginfo),
    essential("get_rseq_conf", "save restartable sequences", tasks::rseq_conf),
    essential("proc_children", "find the tasks of a tree", tasks::children),
    essential("kcmp", "tell shared objects", tasks::kcmp),
    essential("pidfd_getfd", "fetch the descriptors of a task", tasks::pidfd_getfd),
    essential("clone3_set_tid", "give tasks the pids they had", tasks::clone3_set_tid),
    essential("posix_timers", "save POSIX timers", tasks::posix_timers),
    essential("map_files", "open what a task has mapped", mem::map_files),
    essential("process_vm_readv", "copy memory out of a task", mem::process_vm_readv),
    essential("pagemap_scan", "find the pages worth saving", mem::pagemap_scan),
    essential("mm_map", "restore the layout of an address space", mem::mm_map),
    essential("can_map_vdso", "put the vdso where it was", mem::map_vdso),
    essential("mnt_id", "know the mount of an open file", files::mnt_id),
    essential("fdinfo_lock", "save file locks", files::fdinfo_lock),
    extra("seccomp_filters", "save seccomp filters", tasks::seccomp_filters),
    extra("seccomp_suspend", "dump tasks under seccomp", tasks::seccomp_suspend),
    extra("timerfd", "save timerfd descriptors", files::timerfd),
    extra("kcmp_epoll", "save epoll items whose descriptor is closed", files::kcmp_epoll),
    extra("openat2", "open files within a directory", files::openat2),
    extra("memfd_hugetlb", "save memfd descriptors on huge pages", mem::memfd_hugetlb),
    extra("madv_guards", "keep guard pages", mem::guards),
    extra("pagemap_scan_guard_pages", "find guard pages", mem::scan_guards),
    extra("aio_remap", "move asynchronous I/O rings", mem::aio),
    extra("compat_cr", "give 32-bit tasks their vdso", mem::map_vdso_32),
    extra("overlayfs_maps", "files of overlays that are mapped", files::overlay_maps),
    extra("loginuid", "save the login uid", files::loginuid),
    extra("autofs", "automounted file systems", files::autofs),
    extra("timer_cr_ids", "give POSIX timers the ids they had", tasks::timer_ids),
    extra("userns", "user namespaces", namespaces::user),
    extra("cgroupns", "cgroup namespaces", namespaces::cgroup),
    extra("timens", "time namespaces", namespaces::time),
    extra("tun", "TUN devices", namespaces::tun),
    extra("tun_ns", "TUN devices in network namespaces", namespaces::tun_ns),
    experimental("uffd", "load pages on demand", mem::uffd),
    experimental("uffd-noncoop", "load pages of forking tasks on demand", mem::uffd_noncoop),
    experimental("uffd_wp_async", "track writes without stopping", mem::uffd_wp_async),
    experimental("mem_dirty_track", "track writes by soft-dirty bits", mem::soft_dirty),
];

/// A feature that CRIU knows and nothing here uses yet.
#[derive(Debug, Clone, Copy)]
pub struct Unused {
    /// What `--feature` takes.
    pub name: &'static str,
    /// What it belongs to.
    pub belongs_to: &'static str,
}

const fn unused(name: &'static str, belongs_to: &'static str) -> Unused {
    Unused { name, belongs_to }
}

/// The rest of CRIU's feature names.
pub static UNUSED: &[Unused] = &[
    unused("tcp_half_closed", "sockets"),
    unused("sk_ns", "sockets"),
    unused("sk_unix_file", "sockets"),
    unused("net_diag_raw", "sockets"),
    unused("sockopt_buf_lock", "sockets"),
    unused("ipv6_freebind", "sockets"),
    unused("nsid", "network namespaces"),
    unused("link_nsid", "network namespaces"),
    unused("external_net_ns", "network namespaces"),
    unused("newifindex", "network namespaces"),
    unused("nftables", "network locks"),
    unused("has_ipt_legacy", "network locks"),
    unused("network_lock_nftables", "network locks"),
    unused("network_lock_iptables", "network locks"),
    unused("ns_pid", "pid namespaces"),
    unused("move_mount_set_group", "mount namespaces"),
    unused("apparmor_stacking", "AppArmor profiles"),
    unused("pidfd_store", "RPC"),
    unused("breakpoints", "breakpoints"),
];

/// What `--feature NAME` finds.
#[derive(Debug, Clone, Copy)]
pub enum Feature {
    /// It can be asked for.
    Probe(&'static Probe),
    /// It is known and of no use yet.
    Unused(&'static Unused),
}

/// Finds a feature by name.
pub fn feature(name: &str) -> Option<Feature> {
    let probe = PROBES.iter().find(|probe| probe.name == name).map(Feature::Probe);
    probe.or_else(|| UNUSED.iter().find(|unused| unused.name == name).map(Feature::Unused))
}

/// Names a failed call.
fn call<T>(what: &'static str, result: Result<T, Errno>) -> Result<T, Trouble> {
    result.map_err(|errno| Trouble::Call(what, errno))
}

/// An effect that must be seen.
fn expect(seen: bool, otherwise: &'static str) -> Result<(), Trouble> {
    if seen { Ok(()) } else { Err(Trouble::NoEffect(otherwise)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = PROBES.iter().map(|p| p.name).chain(UNUSED.iter().map(|u| u.name)).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }

    /// What this machine must be able to do for any other test to mean something.
    #[test]
    fn essentials_are_there() {
        let missing = missing_capabilities().unwrap();
        if missing.iter().any(|cap| cap.essential) {
            println!("skipped: CAP_SYS_ADMIN is missing");
            return;
        }
        for probe in PROBES.iter().filter(|probe| probe.category == Category::Essential) {
            if let Err(trouble) = probe.ask() {
                panic!("{}: {:#}", probe.name, anyhow::Error::from(trouble));
            }
        }
    }

    #[test]
    fn other_probes_say_why() {
        for probe in PROBES.iter().filter(|probe| probe.category != Category::Essential) {
            // Neither our own child's death nor our own impatience is an answer.
            if let Err(Trouble::Call(what, errno @ (Errno::ESRCH | Errno::ETIMEDOUT))) = probe.ask() {
                panic!("{}: {what}: {errno}", probe.name);
            }
        }
    }
}
