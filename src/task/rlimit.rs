//! Resource limits.
//!
//! They are read from /proc/PID/limits: prlimit would need CAP_SYS_RESOURCE for tasks of other users.
//! A restored task inherits the supervisor's limits and can lower them; raising a hard limit
//! needs CAP_SYS_RESOURCE, which is checked when planning, so that the error names the limit.

use super::{ProcessCx, Result, Supervisor, TaskError, error::parse_proc};
use crate::{
    finding::Finding,
    image::pb,
    proc::limits::{self, Limit, UNLIMITED},
    tracee::{List, Want},
};

/// Limits there are.
const COUNT: usize = 16;

/// By number.
const NAMES: [&str; COUNT] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

pub(super) fn dump(cx: &ProcessCx, entry: &mut pb::TaskCoreEntry, _: &mut Vec<Finding>) -> Result<()> {
    let all = parse_proc(cx.pid, format!("/proc/{}/limits", cx.pid), limits::parse)?;
    let rlimits = all.iter().map(|l| pb::RlimitEntry { cur: l.cur, max: l.max }).collect();
    entry.rlimits = Some(pb::TaskRlimitsEntry { rlimits });
    Ok(())
}

fn text(value: u64) -> String {
    if value == UNLIMITED { "unlimited".into() } else { value.to_string() }
}

pub(super) fn plan(entry: &pb::TaskCoreEntry, supervisor: &Supervisor, list: &mut List) -> Result<()> {
    let Some(rlimits) = &entry.rlimits else { return Ok(()) };
    if rlimits.rlimits.len() > COUNT {
        return Err(TaskError::image(format!("{} resource limits", rlimits.rlimits.len())));
    }
    let all = (0u32..).zip(NAMES).zip(&rlimits.rlimits).zip(&supervisor.limits);
    for (((resource, name), want), have) in all {
        if want.cur > want.max {
            return Err(TaskError::image(format!("{name}: soft limit above the hard limit")));
        }
        let want = Limit { cur: want.cur, max: want.max };
        if want == *have {
            continue;
        }
        if want.max > have.max && !supervisor.can_raise_limits {
            return Err(TaskError::Unsupported {
                what: format!("{name} with the hard limit {}", text(want.max)),
                reason: format!(
                    "crtool runs with the hard limit {} and may not raise it without CAP_SYS_RESOURCE; \
                     start it from where the limit is higher",
                    text(have.max)
                ),
            });
        }
        let value = list.value(&[want.cur, want.max]);
        let args = [0u64.into(), resource.into(), value.into(), 0u64.into()];
        list.call(format!("prlimit {name}"), libc::SYS_prlimit64, &args, Want::Zero);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(of: impl Fn(usize) -> (u64, u64)) -> pb::TaskCoreEntry {
        let rlimits = (0..COUNT).map(of).map(|(cur, max)| pb::RlimitEntry { cur, max }).collect();
        pb::TaskCoreEntry { rlimits: Some(pb::TaskRlimitsEntry { rlimits }), ..Default::default() }
    }

    fn supervisor(can_raise_limits: bool) -> Supervisor {
        Supervisor { limits: [Limit { cur: 5, max: 10 }; COUNT], can_raise_limits, ..Default::default() }
    }

    #[test]
    fn only_what_differs_is_set() {
        let mut list = List::new("test");
        plan(&entry(|n| (5, if n == 7 { 9 } else { 10 })), &supervisor(false), &mut list).unwrap();
        assert_eq!(list.len(), 1);
        assert!(list.describe().contains("RLIMIT_NOFILE"));
    }

    #[test]
    fn a_limit_that_cannot_be_raised_is_named() {
        let raised = entry(|n| (5, if n == 8 { UNLIMITED } else { 10 }));
        let error = plan(&raised, &supervisor(false), &mut List::new("test")).unwrap_err().to_string();
        assert!(error.contains("RLIMIT_MEMLOCK with the hard limit unlimited"), "{error}");
        assert!(plan(&raised, &supervisor(true), &mut List::new("test")).is_ok());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(plan(&entry(|_| (11, 10)), &supervisor(true), &mut List::new("test")).is_err());
    }
}
