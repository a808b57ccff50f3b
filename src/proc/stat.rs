//! /proc/PID/stat and /proc/PID/task/TID/stat.
//!
//! One line of numbers around `comm`, which the task chooses freely: it may hold blanks, newlines and `) S 1 (`.
//! Nothing behind it holds a `)`, so it ends at the last one. Addresses read as 0 (or 1 for a kernel that
//! hides them) without the right to trace the task.

use super::ParseError;
use super::scan::Scan;
use crate::sys::pid::HostPid;

const FILE: &str = "stat";

/// What one letter says about a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// `R`
    Running,
    /// `S`
    Sleeping,
    /// `D`
    DiskSleep,
    /// `T`: stopped by a signal
    Stopped,
    /// `t`: stopped for its tracer
    TracingStop,
    /// `Z`
    Zombie,
    /// `X`
    Dead,
    /// `P`
    Parked,
    /// `I`: an idle kernel thread
    Idle,
    /// A letter this list does not have.
    Other(u8),
}

impl State {
    pub(super) fn from_letter(letter: u8) -> State {
        match letter {
            b'R' => State::Running,
            b'S' => State::Sleeping,
            b'D' => State::DiskSleep,
            b'T' => State::Stopped,
            b't' => State::TracingStop,
            b'Z' => State::Zombie,
            b'X' | b'x' => State::Dead,
            b'P' => State::Parked,
            b'I' => State::Idle,
            other => State::Other(other),
        }
    }
}

/// The fields of stat by the names of proc(5); those nobody needs are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    pub pid: i32,
    /// As it is, not escaped.
    pub comm: Vec<u8>,
    pub state: State,
    pub ppid: HostPid,
    pub pgrp: HostPid,
    pub session: HostPid,
    /// Device number of the controlling terminal in the kernel's own encoding; 0 for none.
    pub tty_nr: i32,
    /// Foreground group of that terminal; -1 for none.
    pub tpgid: i32,
    /// PF_* of the kernel.
    pub flags: u32,
    /// In clock ticks.
    pub utime: u64,
    /// In clock ticks.
    pub stime: u64,
    pub priority: i64,
    pub nice: i64,
    pub num_threads: u64,
    /// Clock ticks from boot, in the boot clock.
    pub starttime: u64,
    pub vsize_bytes: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    /// What the parent gets when this task ends; -1 for a thread that is not the leader.
    pub exit_signal: i32,
    pub processor: i32,
    pub rt_priority: u32,
    pub policy: u32,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// As waitpid would tell it.
    pub exit_code: i32,
}

/// Reads stat of a process or of a thread.
pub fn parse(bytes: &[u8]) -> Result<Stat, ParseError> {
    let open = bytes.iter().position(|&b| b == b'(').ok_or(ParseError::new(FILE, 1, "no command name"))?;
    let close = bytes.iter().rposition(|&b| b == b')').ok_or(ParseError::new(
        FILE,
        1,
        "command name does not end",
    ))?;
    let comm = bytes.get(open + 1..close).ok_or(ParseError::new(FILE, 1, "command name does not end"))?;
    let pid = bytes.get(..open).and_then(pid_before_comm).ok_or(ParseError::new(FILE, 1, "no pid"))?;
    let behind = bytes.get(close + 1..).unwrap_or_default();
    let behind = behind.strip_suffix(b"\n").unwrap_or(behind);
    fields(pid, comm, Scan::new(behind)).ok_or(ParseError::new(FILE, 1, "missing or malformed field"))
}

fn pid_before_comm(bytes: &[u8]) -> Option<i32> {
    let mut s = Scan::new(bytes);
    let pid = s.dec_as()?;
    s.text(b" ")?;
    s.is_empty().then_some(pid)
}

fn fields(pid: i32, comm: &[u8], mut s: Scan<'_>) -> Option<Stat> {
    let [letter] = s.word()? else { return None };
    let state = State::from_letter(*letter);
    let ppid = HostPid::new(signed(&mut s)?);
    let pgrp = HostPid::new(signed(&mut s)?);
    let session = HostPid::new(signed(&mut s)?);
    let tty_nr = signed(&mut s)?;
    let tpgid = signed(&mut s)?;
    let flags = dec(&mut s)?;
    skip(&mut s, 4)?; // minflt cminflt majflt cmajflt
    let utime = dec(&mut s)?;
    let stime = dec(&mut s)?;
    skip(&mut s, 2)?; // cutime cstime
    let priority = signed(&mut s)?;
    let nice = signed(&mut s)?;
    let num_threads = dec(&mut s)?;
    skip(&mut s, 1)?; // itrealvalue
    let starttime = dec(&mut s)?;
    let vsize_bytes = dec(&mut s)?;
    skip(&mut s, 2)?; // rss rsslim
    let start_code = dec(&mut s)?;
    let end_code = dec(&mut s)?;
    let start_stack = dec(&mut s)?;
    skip(&mut s, 9)?; // kstkesp kstkeip signal blocked sigignore sigcatch wchan nswap cnswap
    let exit_signal = signed(&mut s)?;
    let processor = signed(&mut s)?;
    let rt_priority = dec(&mut s)?;
    let policy = dec(&mut s)?;
    skip(&mut s, 3)?; // delayacct_blkio_ticks guest_time cguest_time
    let start_data = dec(&mut s)?;
    let end_data = dec(&mut s)?;
    let start_brk = dec(&mut s)?;
    let arg_start = dec(&mut s)?;
    let arg_end = dec(&mut s)?;
    let env_start = dec(&mut s)?;
    let env_end = dec(&mut s)?;
    let exit_code = signed(&mut s)?;
    Some(Stat {
        pid,
        comm: comm.to_vec(),
        state,
        ppid,
        pgrp,
        session,
        tty_nr,
        tpgid,
        flags,
        utime,
        stime,
        priority,
        nice,
        num_threads,
        starttime,
        vsize_bytes,
        start_code,
        end_code,
        start_stack,
        exit_signal,
        processor,
        rt_priority,
        policy,
        start_data,
        end_data,
        start_brk,
        arg_start,
        arg_end,
        env_start,
        env_end,
        exit_code,
    })
}

fn dec<T: TryFrom<u64>>(s: &mut Scan<'_>) -> Option<T> {
    let mut word = Scan::new(s.word()?);
    let value = word.dec_as()?;
    word.is_empty().then_some(value)
}

fn signed<T: TryFrom<i64>>(s: &mut Scan<'_>) -> Option<T> {
    let mut word = Scan::new(s.word()?);
    let value = word.signed_as()?;
    word.is_empty().then_some(value)
}

fn skip(s: &mut Scan<'_>, fields: usize) -> Option<()> {
    for _ in 0..fields {
        s.word()?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BEHIND: &str = "T 5802 5803 4171 34816 -1 4194304 100 0 0 0 7 8 0 0 20 -5 3 0 93749 3133440 380 18446744073709551615 94090770788352 94090770808233 140727801068560 0 0 0 0 0 0 0 0 0 17 1 50 2 0 0 0 94090770824240 94090770825856 94091594227712 140727801076240 140727801076260 140727801076261 140727801077739 256\n";

    #[test]
    fn every_field() {
        let stat = parse(format!("5813 (cat) {BEHIND}").as_bytes()).unwrap();
        let want = Stat {
            pid: 5813,
            comm: b"cat".to_vec(),
            state: State::Stopped,
            ppid: HostPid::new(5802),
            pgrp: HostPid::new(5803),
            session: HostPid::new(4171),
            tty_nr: 34816,
            tpgid: -1,
            flags: 4_194_304,
            utime: 7,
            stime: 8,
            priority: 20,
            nice: -5,
            num_threads: 3,
            starttime: 93749,
            vsize_bytes: 3_133_440,
            start_code: 94_090_770_788_352,
            end_code: 94_090_770_808_233,
            start_stack: 140_727_801_068_560,
            exit_signal: 17,
            processor: 1,
            rt_priority: 50,
            policy: 2,
            start_data: 94_090_770_824_240,
            end_data: 94_090_770_825_856,
            start_brk: 94_091_594_227_712,
            arg_start: 140_727_801_076_240,
            arg_end: 140_727_801_076_260,
            env_start: 140_727_801_076_261,
            env_end: 140_727_801_077_739,
            exit_code: 256,
        };
        assert_eq!(stat, want);
    }

    #[test]
    fn hostile_names() {
        for comm in [
            &b""[..],
            b") R 1 (",
            b"a)b",
            b"\n",
            b"x\ny) Z 1 1 1 (",
            b"((",
            b"))",
            b"\xff\xfe (deleted)",
            b" ",
        ] {
            let text = [b"1 (", comm, b") ", BEHIND.as_bytes()].concat();
            let stat = parse(&text).unwrap();
            assert_eq!(
                (stat.pid, &stat.comm[..], stat.ppid.get()),
                (1, comm, 5802),
                "{}",
                comm.escape_ascii()
            );
        }
    }

    #[test]
    fn malformed() {
        let error = |text: &str| parse(text.as_bytes()).unwrap_err().what;
        assert_eq!(error(""), "no command name");
        assert_eq!(error("1 (cat"), "command name does not end");
        assert_eq!(error(")("), "command name does not end");
        assert_eq!(error(&format!("(cat) {BEHIND}")), "no pid");
        assert_eq!(error(&format!("1x (cat) {BEHIND}")), "no pid");
        assert_eq!(error("1 (cat)"), "missing or malformed field");
        assert_eq!(error("1 (cat) R 1 1\n"), "missing or malformed field");
        assert_eq!(
            error(&format!("1 (cat) {}", BEHIND.replace("5802", "58o2"))),
            "missing or malformed field"
        );
        assert_eq!(
            error(&format!("1 (cat) {}", BEHIND.replace("5802", "2147483648"))),
            "missing or malformed field"
        );
    }

    #[test]
    fn every_prefix_is_refused() {
        let text = format!("1 (cat) {BEHIND}");
        // The last number has three digits, and the newline may miss.
        for len in 0..text.len() - 4 {
            assert!(parse(&text.as_bytes()[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn own_stat() {
        let stat = parse(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(u32::try_from(stat.pid), Ok(std::process::id()));
        assert_eq!(stat.exit_signal, libc::SIGCHLD);
        assert!(stat.start_code < stat.end_code);
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn comm_comes_back(comm: Vec<u8>) {
            let text = [b"1 (", &comm[..], b") ", BEHIND.as_bytes()].concat();
            prop_assert_eq!(parse(&text).unwrap().comm, comm);
        }
    }
}
