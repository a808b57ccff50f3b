//! Capabilities: which of those that matter here this process lacks, and what that limits.

use crate::proc::status;

/// A capability that makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Bit number.
    pub bit: u8,
    /// Its name without `CAP_`.
    pub name: &'static str,
    /// Nothing works without it.
    pub essential: bool,
    /// What cannot be done without it.
    pub limit: &'static str,
}

const fn essential(bit: u8, name: &'static str, limit: &'static str) -> Capability {
    Capability { bit, name, essential: true, limit }
}

const fn useful(bit: u8, name: &'static str, limit: &'static str) -> Capability {
    Capability { bit, name, essential: false, limit }
}

/// In the order of their numbers.
pub(super) static CAPABILITIES: &[Capability] = &[
    useful(0, "CHOWN", "deleted files cannot get their owner back"),
    useful(1, "DAC_OVERRIDE", "files of other users may not open"),
    useful(3, "FOWNER", "modes of files of other users cannot be set"),
    useful(5, "KILL", "processes of other users cannot be signalled"),
    useful(6, "SETGID", "group ids of other groups cannot be restored"),
    useful(7, "SETUID", "user ids of other users cannot be restored"),
    useful(8, "SETPCAP", "capability sets cannot be restored in full"),
    useful(14, "IPC_LOCK", "locked memory above its limit cannot be restored"),
    useful(18, "SYS_CHROOT", "a changed root directory cannot be restored"),
    useful(19, "SYS_PTRACE", "processes of other users cannot be dumped"),
    essential(21, "SYS_ADMIN", "seccomp filters, map_files and more are out of reach"),
    useful(23, "SYS_NICE", "higher priorities and real-time policies cannot be restored"),
    useful(
        24,
        "SYS_RESOURCE",
        "hard limits cannot be raised, pipes cannot grow above pipe-max-size, oom_score_adj cannot be lowered",
    ),
    useful(30, "AUDIT_CONTROL", "the login uid cannot be restored"),
    useful(40, "CHECKPOINT_RESTORE", "it only helps where SYS_ADMIN is missing"),
];

/// Those of the table that this process has not in effect.
pub fn missing() -> Result<Vec<&'static Capability>, super::Trouble> {
    let text = std::fs::read("/proc/self/status").map_err(super::Trouble::Proc)?;
    Ok(missing_of(status::parse(&text)?.cap_eff))
}

fn missing_of(effective: u64) -> Vec<&'static Capability> {
    let has = |bit: u8| effective & (1 << bit) != 0;
    // CAP_SYS_ADMIN contains CAP_CHECKPOINT_RESTORE.
    let covered = |bit: u8| has(bit) || (bit == 40 && has(21));
    CAPABILITIES.iter().filter(|cap| !covered(cap.bit)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_missing() {
        let names = |set| missing_of(set).iter().map(|cap| cap.name).collect::<Vec<_>>();
        assert_eq!(names(u64::MAX), [""; 0]);
        assert_eq!(names(0x1ff_feff_ffff), ["SYS_RESOURCE"]);
        assert_eq!(names(0x0ff_ffff_ffff), [""; 0]);
        assert_eq!(names(0).len(), CAPABILITIES.len());
    }
}
