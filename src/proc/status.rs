//! /proc/PID/status and /proc/PID/task/TID/status.
//!
//! `Name` is the only text a task chooses; the kernel writes its newlines as `\n` and its backslashes as `\\`, so it cannot
//! add lines. A zombie has neither Umask nor any Vm line; which others are there depends on the kernel's
//! version and configuration, and those are `Option`.

use super::ParseError;
use super::scan::{Scan, lines};
use super::stat::State;
use crate::sys::pid::HostPid;

const FILE: &str = "status";

/// Real, effective, saved and filesystem id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    pub real: u32,
    pub effective: u32,
    pub saved: u32,
    pub fs: u32,
}

/// The lines of status; bits of a signal set and of a capability set count from 0, so signal N is bit N - 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The command name, unescaped.
    pub name: Vec<u8>,
    /// Linux 4.7; not for a zombie.
    pub umask: Option<u32>,
    pub state: State,
    pub tgid: HostPid,
    pub pid: i32,
    pub ppid: i32,
    /// 0 when nobody traces it.
    pub tracer_pid: i32,
    /// As the reader's user namespace sees them.
    pub uid: Ids,
    pub gid: Ids,
    pub fdsize: u32,
    pub groups: Vec<u32>,
    /// The ids in each pid namespace, from that of the mounted /proc inwards. Empty without CONFIG_PID_NS.
    pub nstgid: Vec<i32>,
    pub nspid: Vec<i32>,
    pub nspgid: Vec<i32>,
    pub nssid: Vec<i32>,
    /// Linux 6.8.
    pub kthread: Option<bool>,
    /// Not for a zombie or a kernel thread, like every `vm_` field.
    pub vm_size_bytes: Option<u64>,
    pub vm_lck_bytes: Option<u64>,
    pub vm_rss_bytes: Option<u64>,
    /// Of that anonymous memory.
    pub rss_anon_bytes: Option<u64>,
    /// Of that shared memory.
    pub rss_shmem_bytes: Option<u64>,
    pub vm_swap_bytes: Option<u64>,
    pub core_dumping: Option<bool>,
    /// Whether PR_SET_THP_DISABLE was not used. Linux 5.0.
    pub thp_enabled: Option<bool>,
    /// Linux 6.4.
    pub untag_mask: Option<u64>,
    pub threads: u32,
    /// Queued signals of the real user, and the limit.
    pub sigq: (u64, u64),
    /// Pending for this thread.
    pub sigpnd: u64,
    /// Pending for the process.
    pub shdpnd: u64,
    pub sigblk: u64,
    pub sigign: u64,
    pub sigcgt: u64,
    pub cap_inh: u64,
    pub cap_prm: u64,
    pub cap_eff: u64,
    pub cap_bnd: u64,
    /// Linux 4.3.
    pub cap_amb: Option<u64>,
    /// Linux 4.10.
    pub no_new_privs: Option<bool>,
    /// 0, 1 strict or 2 filter. Not without CONFIG_SECCOMP.
    pub seccomp: Option<u32>,
    /// Linux 5.10.
    pub seccomp_filters: Option<u32>,
    /// `shstk`, `wrss`. Linux 6.6, x86 with user shadow stacks.
    pub x86_thread_features: Vec<Vec<u8>>,
    pub x86_thread_features_locked: Vec<Vec<u8>>,
}

/// The lines by their keys. The kernel's order hardly changes, so each search begins where the last one ended.
struct Lines<'a> {
    all: Vec<(usize, &'a [u8], &'a [u8])>,
    next: usize,
}

impl<'a> Lines<'a> {
    fn find(&mut self, key: &'static str) -> Option<(usize, Scan<'a>)> {
        let (before, after) = self.all.split_at_checked(self.next)?;
        let here = after.iter().chain(before).position(|(_, k, _)| *k == key.as_bytes())?;
        let at = (self.next + here) % self.all.len();
        let (number, _, value) = self.all.get(at)?;
        self.next = at + 1;
        Some((*number, Scan::new(value)))
    }

    fn maybe<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Scan<'a>) -> Option<T>,
    ) -> Result<Option<T>, ParseError> {
        let Some((number, mut s)) = self.find(key) else {
            return Ok(None);
        };
        s.blanks();
        read(&mut s).filter(|_| s.end().is_some()).map(Some).ok_or(ParseError::new(FILE, number, key))
    }

    fn must<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Scan<'a>) -> Option<T>,
    ) -> Result<T, ParseError> {
        self.maybe(key, read)?.ok_or(ParseError::whole(FILE, key))
    }
}

fn ids(s: &mut Scan<'_>) -> Option<Ids> {
    let mut next = || {
        s.blanks();
        s.dec_as()
    };
    Some(Ids { real: next()?, effective: next()?, saved: next()?, fs: next()? })
}

fn list<T: TryFrom<i64>>(s: &mut Scan<'_>) -> Option<Vec<T>> {
    let mut all = Vec::new();
    s.blanks();
    while !s.is_empty() {
        all.push(s.signed_as()?);
        s.blanks();
    }
    Some(all)
}

fn words(s: &mut Scan<'_>) -> Option<Vec<Vec<u8>>> {
    Some(std::iter::from_fn(|| s.word().map(<[u8]>::to_vec)).collect())
}

fn kib(s: &mut Scan<'_>) -> Option<u64> {
    let value = s.dec()?;
    s.text(b" kB")?;
    value.checked_mul(1024)
}

fn flag(s: &mut Scan<'_>) -> Option<bool> {
    match s.dec()? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn state(s: &mut Scan<'_>) -> Option<State> {
    let state = State::from_letter(s.byte()?);
    s.text(b" (")?;
    s.until(b')')?;
    Some(state)
}

fn sigq(s: &mut Scan<'_>) -> Option<(u64, u64)> {
    let queued = s.dec()?;
    s.text(b"/")?;
    Some((queued, s.dec()?))
}

/// Undoes the kernel's `\n` and `\\`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        rest = match rest {
            [] => return plain,
            [b'\\', b'n', tail @ ..] => {
                plain.push(b'\n');
                tail
            }
            [b'\\', b'\\', tail @ ..] => {
                plain.push(b'\\');
                tail
            }
            [byte, tail @ ..] => {
                plain.push(*byte);
                tail
            }
        };
    }
}

/// Reads status of a process or of a thread. The error names the line that is missing or malformed.
pub fn parse(bytes: &[u8]) -> Result<Status, ParseError> {
    let mut all = Vec::with_capacity(64);
    let mut name = None;
    for (number, line) in lines(bytes) {
        let mut s = Scan::new(line);
        let key = s.until(b':').ok_or(ParseError::new(FILE, number, "not a key and value"))?;
        if number == 1 {
            // Blanks around the name are part of it, so only the one tab goes.
            s.text(b"\t").filter(|()| key == b"Name").ok_or(ParseError::new(FILE, 1, "Name"))?;
            name = Some(unescape(s.rest()));
        } else {
            all.push((number, key, s.rest()));
        }
    }
    let mut l = Lines { all, next: 0 };
    Ok(Status {
        name: name.ok_or(ParseError::whole(FILE, "Name"))?,
        umask: l.maybe("Umask", Scan::oct_as)?,
        state: l.must("State", state)?,
        tgid: HostPid::new(l.must("Tgid", Scan::dec_as)?),
        pid: l.must("Pid", Scan::dec_as)?,
        ppid: l.must("PPid", Scan::dec_as)?,
        tracer_pid: l.must("TracerPid", Scan::dec_as)?,
        uid: l.must("Uid", ids)?,
        gid: l.must("Gid", ids)?,
        fdsize: l.must("FDSize", Scan::dec_as)?,
        groups: l.must("Groups", list)?,
        nstgid: l.maybe("NStgid", list)?.unwrap_or_default(),
        nspid: l.maybe("NSpid", list)?.unwrap_or_default(),
        nspgid: l.maybe("NSpgid", list)?.unwrap_or_default(),
        nssid: l.maybe("NSsid", list)?.unwrap_or_default(),
        kthread: l.maybe("Kthread", flag)?,
        vm_size_bytes: l.maybe("VmSize", kib)?,
        vm_lck_bytes: l.maybe("VmLck", kib)?,
        vm_rss_bytes: l.maybe("VmRSS", kib)?,
        rss_anon_bytes: l.maybe("RssAnon", kib)?,
        rss_shmem_bytes: l.maybe("RssShmem", kib)?,
        vm_swap_bytes: l.maybe("VmSwap", kib)?,
        core_dumping: l.maybe("CoreDumping", flag)?,
        thp_enabled: l.maybe("THP_enabled", flag)?,
        untag_mask: l.maybe("untag_mask", |s| s.text(b"0x").and_then(|()| s.hex()))?,
        threads: l.must("Threads", Scan::dec_as)?,
        sigq: l.must("SigQ", sigq)?,
        sigpnd: l.must("SigPnd", Scan::hex)?,
        shdpnd: l.must("ShdPnd", Scan::hex)?,
        sigblk: l.must("SigBlk", Scan::hex)?,
        sigign: l.must("SigIgn", Scan::hex)?,
        sigcgt: l.must("SigCgt", Scan::hex)?,
        cap_inh: l.must("CapInh", Scan::hex)?,
        cap_prm: l.must("CapPrm", Scan::hex)?,
        cap_eff: l.must("CapEff", Scan::hex)?,
        cap_bnd: l.must("CapBnd", Scan::hex)?,
        cap_amb: l.maybe("CapAmb", Scan::hex)?,
        no_new_privs: l.maybe("NoNewPrivs", flag)?,
        seccomp: l.maybe("Seccomp", Scan::dec_as)?,
        seccomp_filters: l.maybe("Seccomp_filters", Scan::dec_as)?,
        x86_thread_features: l.maybe("x86_Thread_features", words)?.unwrap_or_default(),
        x86_thread_features_locked: l.maybe("x86_Thread_features_locked", words)?.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TASK: &str = "Name:\tcat\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t5811\nNgid:\t0\nPid:\t5812\nPPid:\t5802\n\
        TracerPid:\t9\nUid:\t0\t1\t2\t4294967294\nGid:\t5\t6\t7\t8\nFDSize:\t256\nGroups:\t4 24 1000 \nNStgid:\t5811\t1\n\
        NSpid:\t5812\t2\nNSpgid:\t5802\t0\nNSsid:\t4171\t0\nKthread:\t0\nVmPeak:\t    3060 kB\nVmSize:\t    3060 kB\n\
        VmLck:\t       8 kB\nVmRSS:\t    1756 kB\nVmSwap:\t       4 kB\nCoreDumping:\t0\nTHP_enabled:\t1\n\
        untag_mask:\t0xffffffffffffffff\nThreads:\t3\nSigQ:\t2/96365\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000004000\n\
        SigBlk:\t0000000000010000\nSigIgn:\t0000000000001000\nSigCgt:\t8000000000000002\nCapInh:\t0000000000000001\n\
        CapPrm:\t000001fffeffffff\nCapEff:\t0000000000000002\nCapBnd:\t0000000000000003\nCapAmb:\t0000000000000004\n\
        NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\nSpeculation_Store_Bypass:\tvulnerable\n\
        Cpus_allowed:\t3\nx86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\tshstk wrss \n";

    #[test]
    fn every_line() {
        let s = parse(TASK.as_bytes()).unwrap();
        assert_eq!((&s.name[..], s.umask, s.state), (&b"cat"[..], Some(0o22), State::Sleeping));
        assert_eq!((s.tgid.get(), s.pid, s.ppid, s.tracer_pid), (5811, 5812, 5802, 9));
        assert_eq!(s.uid, Ids { real: 0, effective: 1, saved: 2, fs: 4_294_967_294 });
        assert_eq!(s.gid, Ids { real: 5, effective: 6, saved: 7, fs: 8 });
        assert_eq!((s.fdsize, &s.groups[..]), (256, &[4, 24, 1000][..]));
        assert_eq!([s.nstgid, s.nspid, s.nspgid, s.nssid], [[5811, 1], [5812, 2], [5802, 0], [4171, 0]]);
        assert_eq!((s.vm_size_bytes, s.vm_lck_bytes), (Some(3060 << 10), Some(8 << 10)));
        assert_eq!((s.vm_rss_bytes, s.vm_swap_bytes), (Some(1756 << 10), Some(4 << 10)));
        assert_eq!((s.kthread, s.core_dumping, s.thp_enabled), (Some(false), Some(false), Some(true)));
        assert_eq!((s.untag_mask, s.threads, s.sigq), (Some(u64::MAX), 3, (2, 96365)));
        assert_eq!(
            [s.sigpnd, s.shdpnd, s.sigblk, s.sigign, s.sigcgt],
            [0x100, 0x4000, 0x10000, 0x1000, 0x8000_0000_0000_0002]
        );
        assert_eq!([s.cap_inh, s.cap_prm, s.cap_eff, s.cap_bnd], [1, 0x1ff_feff_ffff, 2, 3]);
        assert_eq!(
            (s.cap_amb, s.no_new_privs, s.seccomp, s.seccomp_filters),
            (Some(4), Some(true), Some(2), Some(1))
        );
        assert_eq!(s.x86_thread_features, [b"shstk", b"wrss".as_slice()]);
        assert_eq!(s.x86_thread_features_locked, [b"shstk", b"wrss".as_slice()]);
    }

    #[test]
    fn zombie_of_an_old_kernel() {
        let keys =
            ["Umask", "Vm", "Core", "THP", "untag", "NS", "Kthread", "CapAmb", "NoNew", "Seccomp", "x86"];
        let text: String = TASK
            .lines()
            .filter(|l| !keys.iter().any(|k| l.starts_with(k)))
            .map(|l| if l.starts_with("State") { "State:\tZ (zombie)\n".into() } else { format!("{l}\n") })
            .collect();
        let s = parse(text.as_bytes()).unwrap();
        assert_eq!(
            (s.state, s.umask, s.vm_size_bytes, s.nspid.len(), s.cap_amb),
            (State::Zombie, None, None, 0, None)
        );
        assert_eq!(s.cap_bnd, 3);
    }

    #[test]
    fn order_does_not_matter() {
        let (first, rest) = TASK.split_once('\n').unwrap();
        let turned: Vec<_> = std::iter::once(first).chain(rest.lines().rev()).collect();
        assert_eq!(parse(turned.join("\n").as_bytes()), parse(TASK.as_bytes()));
    }

    #[test]
    fn hostile_names() {
        for (raw, name) in [
            ("\\nTgid:\\t1", b"\nTgid:\\t1".as_slice()),
            ("a\\\\n", b"a\\n"),
            ("\\", b"\\"),
            ("", b""),
            (" a\t", b" a\t"),
            (") R 1 (:", b") R 1 (:"),
        ] {
            let s = parse(TASK.replace("Name:\tcat", &format!("Name:\t{raw}")).as_bytes()).unwrap();
            assert_eq!((&s.name[..], s.tgid.get()), (name, 5811));
        }
    }

    #[test]
    fn missing_and_malformed_lines_are_named() {
        let error = |text: String| parse(text.as_bytes()).map_err(|e| (e.line, e.what)).unwrap_err();
        for key in ["State", "Tgid", "Uid", "Groups", "Threads", "SigCgt", "CapBnd"] {
            let text: String =
                TASK.lines().filter(|l| !l.starts_with(key)).map(|l| format!("{l}\n")).collect();
            assert_eq!(error(text), (0, key));
        }
        assert_eq!(error(TASK.replace("Name", "Game")), (1, "Name"));
        assert_eq!(error(TASK.replace("0022", "0029")), (2, "Umask"));
        assert_eq!(error(TASK.replace("\t1\t2\t", "\t1\t")), (9, "Uid"));
        assert_eq!(error(TASK.replace("4294967294", "4294967296")), (9, "Uid"));
        assert_eq!(error(TASK.replace("2/96365", "2")), (27, "SigQ"));
        assert_eq!(error(TASK.replace("8000000000000002", "80000000000000020")), (32, "SigCgt"));
        assert_eq!(error(String::new()), (0, "Name"));
    }

    #[test]
    fn own_status() {
        let s = parse(&std::fs::read("/proc/self/status").unwrap()).unwrap();
        assert_eq!(s.tgid, HostPid::own());
        assert!(s.vm_size_bytes.unwrap() > 0);
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn never_panics_when_damaged(at in 0..TASK.len(), byte: u8, cut in 0..TASK.len()) {
            let mut bytes = TASK.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse(&bytes);
            bytes.truncate(cut);
            let _ = parse(&bytes);
        }
    }
}
