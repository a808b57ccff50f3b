//! What the restoring process itself has: every task it makes inherits it, and is changed from there.

use std::{borrow::Cow, time::Duration};

use super::{Result, TaskError, error::parse_proc};
use crate::{
    ns::time::Running,
    proc::{
        limits::{self, Limit},
        status,
    },
    sys::{cpuid, pid::HostPid, prctl, task},
    tracee::{List, Want},
};

const CAP_SYS_RESOURCE: u32 = 24;

/// State of the restoring process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supervisor {
    /// Its resource limits, by number.
    pub limits: [Limit; 16],
    /// Whether it has CAP_SYS_RESOURCE.
    pub can_raise_limits: bool,
    /// Permitted capabilities.
    pub cap_prm: u64,
    /// Bounding set.
    pub cap_bnd: u64,
    /// oom_score_adj.
    pub oom_score_adj: i32,
    /// Audit login uid; `None` for a kernel without.
    pub loginuid: Option<u32>,
    /// Nanoseconds between two ticks of the kernel.
    pub tick_ns: u64,
    /// Whether POSIX timers can be made with chosen ids (Linux 6.15).
    pub timer_ids: bool,
    /// Whether crtool has no_new_privs, which cannot be taken back.
    pub no_new_privs: bool,
    /// The clocks of the tree that is restored, if they have gone on where they stood; else timers begin with what was
    /// left of them.
    pub(crate) clocks: Option<Running>,
    /// Whether sessions have autogroups.
    pub autogroup: bool,
    /// What its threads have.
    pub own: Own,
}

/// Attributes of the thread that makes the first task, which inherits them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Own {
    /// ioprio_get(2).
    pub ioprio: u32,
    /// Timer slack.
    pub timer_slack_ns: u64,
    /// PR_GET_SPECULATION_CTRL of store bypass, indirect branch, L1D flush.
    pub speculation: [Option<u32>; 3],
    /// Whether the cpuid instruction can be made to fault.
    pub cpuid_can_fault: bool,
    /// Features of the xsave area that programs may use here, some of them when they ask (ARCH_GET_XCOMP_SUPP).
    pub xcomp_supported: u64,
}

impl Own {
    fn probe() -> Result<Self> {
        let slack = "/proc/self/timerslack_ns".to_owned();
        let state =
            |which| prctl::get(prctl::GET_SPECULATION_CTRL, which).ok().and_then(|s| u32::try_from(s).ok());
        Ok(Self {
            ioprio: task::ioprio(HostPid::NONE)
                .map_err(|e| TaskError::request("ioprio_get", HostPid::own(), e))?,
            timer_slack_ns: parse_proc(HostPid::own(), slack, |b| {
                crate::proc::number::dec("timerslack_ns", b)
            })?,
            speculation: [0, 1, 2].map(state),
            cpuid_can_fault: cpuid::can_fault(),
            xcomp_supported: cpuid::xcomp_supported(),
        })
    }
}

impl Default for Supervisor {
    /// One that has nothing; for tests.
    fn default() -> Self {
        Self {
            limits: [Limit { cur: 0, max: 0 }; 16],
            can_raise_limits: false,
            cap_prm: 0,
            cap_bnd: 0,
            oom_score_adj: 0,
            loginuid: None,
            tick_ns: 0,
            timer_ids: false,
            no_new_privs: false,
            clocks: None,
            autogroup: false,
            own: Own::default(),
        }
    }
}

impl Supervisor {
    /// Looks at this process. Limits must not change afterwards, or say so in `limits`.
    pub fn probe() -> Result<Self> {
        let pid = HostPid::own();
        let status = parse_proc(pid, "/proc/self/status".into(), status::parse)?;
        let number = |path: &str| parse_proc(pid, path.into(), |b| crate::proc::number::signed("number", b));
        let loginuid = match std::fs::exists("/proc/self/loginuid") {
            Ok(true) => u32::try_from(number("/proc/self/loginuid")?).ok(),
            _ => None,
        };
        Ok(Self {
            limits: parse_proc(pid, "/proc/self/limits".into(), limits::parse)?,
            can_raise_limits: status.cap_eff >> CAP_SYS_RESOURCE & 1 == 1,
            cap_prm: status.cap_prm,
            cap_bnd: status.cap_bnd,
            oom_score_adj: i32::try_from(number("/proc/self/oom_score_adj")?).unwrap_or(0),
            loginuid,
            tick_ns: tick_ns(),
            timer_ids: prctl::get(prctl::TIMER_CREATE_RESTORE_IDS, 2).is_ok(),
            no_new_privs: status.no_new_privs.unwrap_or(false),
            clocks: None,
            autogroup: std::fs::exists("/proc/self/autogroup").unwrap_or(false),
            own: Own::probe()?,
        })
    }
}

impl Supervisor {
    /// How long the clocks of the tree have been going on; none for one that has those of crtool.
    pub(crate) fn elapsed(&self) -> Result<Duration> {
        let elapsed = self.clocks.map(|clocks| clocks.elapsed()).transpose();
        elapsed.map(Option::unwrap_or_default).map_err(TaskError::Clocks)
    }
}

/// The coarse clock advances with the ticks.
fn tick_ns() -> u64 {
    let resolution = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    resolution.ok().and_then(|r| u64::try_from(r.tv_nsec()).ok()).unwrap_or(0)
}

/// Adds the writing of a small file of /proc about the task itself.
pub(super) fn write_proc(list: &mut List, name: impl Into<Cow<'static, str>>, path: &str, text: &str) {
    let path_data = list.cstr(path.as_bytes());
    let data = list.bytes(text.as_bytes());
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    let at = libc::AT_FDCWD.into();
    let fd =
        list.call(format!("open {path}"), libc::SYS_openat, &[at, path_data.into(), flags.into()], Want::Ok);
    let want = Want::Equal(text.len() as u64);
    list.call(name, libc::SYS_write, &[fd.into(), data.into(), text.len().into()], want);
    list.call("close", libc::SYS_close, &[fd.into()], Want::Zero);
}
