//! Probes about tasks: ptrace, pids, signals, timers, seccomp.

use std::{
    cmp::Ordering,
    fs::File,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use super::{Trouble, call, child::Script, expect};
use crate::{
    proc::{children as proc_children, timers},
    sys::{self, Errno, clone::CloneArgs, pid::HostPid, pod, ptrace},
};

const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const PR_TIMER_CREATE_RESTORE_IDS_ON: i32 = 1;

/// A seized and interrupted task stands still, and its parent (us, were we no tracer) hears no SIGCHLD for it.
pub(super) fn ptrace_seize() -> Result<(), Trouble> {
    let child = call("fork", Script::new().and_then(Script::start))?;
    call("PTRACE_SEIZE", child.seize(0))?;
    let status = child.proc("status").map_err(Trouble::Proc)?;
    let stopped = status.windows(9).any(|line| line == b"State:\tt ");
    expect(stopped, "the task did not stop")
}

/// A signal that waits is seen with its sender.
pub(super) fn peek_siginfo() -> Result<(), Trouble> {
    const WANTED: i32 = libc::SIGUSR1;
    let mut script = call("pipe", Script::new())?;
    let mask = script.data(&(1u64 << (WANTED - 1)).to_ne_bytes());
    script.call(libc::SYS_rt_sigprocmask, &[libc::SIG_BLOCK.into(), mask.into(), 0.into(), 8.into()]);
    let pid = script.call(libc::SYS_getpid, &[]);
    script.call(libc::SYS_kill, &[pid.into(), WANTED.into()]);
    let child = call("fork", script.start())?;
    call("PTRACE_SEIZE", child.seize(0))?;
    let infos = call("PTRACE_PEEKSIGINFO", ptrace::peek_siginfo(child.pid(), true, 0))?;
    let signal = infos.first().and_then(|info| pod::from_bytes::<i32>(info));
    expect(infos.len() == 1 && signal == Some(WANTED), "the pending signal is not in the queue")
}

/// The registration of a child is the one of the thread that forked it.
pub(super) fn rseq_conf() -> Result<(), Trouble> {
    let child = call("fork", Script::new().and_then(Script::start))?;
    call("PTRACE_SEIZE", child.seize(0))?;
    let conf = call("PTRACE_GET_RSEQ_CONFIGURATION", ptrace::get_rseq(child.pid()))?;
    // The C library registers 20 bytes or more, or has been told not to register anything.
    let plausible = conf.abi_pointer == 0 || conf.abi_size >= 20;
    expect(plausible, "the registration makes no sense")
}

/// A child is listed among the children of the thread that made it.
pub(super) fn children() -> Result<(), Trouble> {
    let child = call("fork", Script::new().and_then(Script::start))?;
    let text = std::fs::read("/proc/thread-self/children").map_err(Trouble::Proc)?;
    let pids = proc_children::parse(&text)?;
    expect(pids.contains(&child.pid().get()), "a child is not listed")
}

/// The same open file is equal to itself, another one is not.
pub(super) fn kcmp() -> Result<(), Trouble> {
    let one = File::open("/dev/null").map_err(Trouble::Proc)?;
    let same = one.try_clone().map_err(Trouble::Proc)?;
    let other = File::open("/dev/null").map_err(Trouble::Proc)?;
    let pid = HostPid::own();
    let compare = |a: &File, b: &File| {
        let [a, b] = [a, b].map(|file| i64::from(file.as_raw_fd()).cast_unsigned());
        call("kcmp", sys::kcmp::kcmp(pid, pid, sys::kcmp::Kind::File, a, b))
    };
    expect(
        compare(&one, &same)? == Ordering::Equal && compare(&one, &other)? != Ordering::Equal,
        "descriptors are not told apart",
    )
}

/// A fetched descriptor is the same open file, not another one.
pub(super) fn pidfd_getfd() -> Result<(), Trouble> {
    let child = call("fork", Script::new().and_then(Script::start))?;
    let file = File::open("/dev/null").map_err(Trouble::Proc)?;
    let me = HostPid::own();
    let pidfd = call("pidfd_open", sys::pidfd::open(me.get(), 0))?;
    let fetched = call("pidfd_getfd", sys::pidfd::getfd(pidfd.as_fd(), file.as_raw_fd()))?;
    let [a, b] = [file.as_raw_fd(), fetched.as_raw_fd()].map(|fd| i64::from(fd).cast_unsigned());
    let order = call("kcmp", sys::kcmp::kcmp(me, me, sys::kcmp::Kind::File, a, b))?;
    // And out of another process.
    let pidfd = call("pidfd_open", sys::pidfd::open(child.pid().get(), 0))?;
    call("pidfd_getfd", sys::pidfd::getfd(pidfd.as_fd(), 0)).or_else(|trouble| match trouble {
        // The child has no standard input where we have none.
        Trouble::Call(_, Errno::EBADF) => Ok(pidfd),
        trouble => Err(trouble),
    })?;
    expect(order == Ordering::Equal, "the fetched descriptor is another file")
}

/// A child gets the pid that was asked for.
pub(super) fn clone3_set_tid() -> Result<(), Trouble> {
    let max = std::fs::read_to_string("/proc/sys/kernel/pid_max").map_err(Trouble::Proc)?;
    let max: i32 = max.trim().parse().unwrap_or(32_768);
    // High numbers are free unless the machine has been up for long; two of us at once must not try the same.
    let first = max.saturating_sub(std::process::id().cast_signed() % 4096);
    let free = (300..first).rev().find(|pid| !Path::new(&format!("/proc/{pid}")).exists());
    let wanted = free.ok_or(Trouble::NoEffect("no pid is free"))?;
    let mut script = call("pipe", Script::new())?;
    let tids = script.data(&wanted.to_ne_bytes());
    let args = CloneArgs {
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        set_tid: tids,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let args = script.data(pod::bytes_of(&args));
    let cloned =
        script.call(libc::SYS_clone3, &[args.into(), (std::mem::size_of::<CloneArgs>() as u64).into()]);
    script.call(libc::SYS_wait4, &[cloned.into(), 0.into(), libc::__WALL.into(), 0.into()]);
    let child = call("fork", script.start())?;
    let got = call("clone3 with set_tid", child.result(cloned))?;
    expect(got == i64::from(wanted), "the child has another pid")
}

/// The timers of a task are listed with their ids.
pub(super) fn posix_timers() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    let id = script.data(&(-1i32).to_ne_bytes());
    let made = script.call(libc::SYS_timer_create, &[libc::CLOCK_MONOTONIC.into(), 0.into(), id.into()]);
    let child = call("fork", script.start())?;
    call("timer_create", child.result(made))?;
    let text = child.proc("timers").map_err(Trouble::Proc)?;
    let timers = timers::parse(&text)?;
    expect(timers.len() == 1, "the timer is not listed")
}

/// Linux 6.15: a timer gets the id that was asked for.
pub(super) fn timer_ids() -> Result<(), Trouble> {
    const WANTED: i32 = 4711;
    let mut script = call("pipe", Script::new())?;
    let on = script.call(
        libc::SYS_prctl,
        &[
            PR_TIMER_CREATE_RESTORE_IDS.into(),
            PR_TIMER_CREATE_RESTORE_IDS_ON.into(),
            0.into(),
            0.into(),
            0.into(),
        ],
    );
    let id = script.data(&WANTED.to_ne_bytes());
    let made = script.call(libc::SYS_timer_create, &[libc::CLOCK_MONOTONIC.into(), 0.into(), id.into()]);
    let child = call("fork", script.start())?;
    call("PR_TIMER_CREATE_RESTORE_IDS", child.result(on))?;
    call("timer_create", child.result(made))?;
    let text = child.proc("timers").map_err(Trouble::Proc)?;
    let timers = timers::parse(&text)?;
    expect(timers.iter().any(|timer| timer.id == WANTED), "the timer has another id")
}

/// A filter that answers getppid with an errno nobody else uses.
fn filtered(script: &mut Script) -> [libc::sock_filter; 4] {
    const LOAD_WORD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let op = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    let getppid = u32::try_from(libc::SYS_getppid).unwrap_or(u32::MAX);
    let program = [
        op(LOAD_WORD, 0, 0),
        op(JUMP_EQUAL, 1, getppid),
        op(RETURN, 0, libc::SECCOMP_RET_ALLOW),
        op(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::EXFULL.unsigned_abs()),
    ];
    let bytes: Vec<u8> = program.iter().flat_map(|op| pod::bytes_of(op).to_vec()).collect();
    let ops = script.data(&bytes);
    let mut fprog = [0u8; 16];
    let (len, addr) = fprog.split_at_mut(8);
    if let [low, ..] = len {
        *low = 4;
    }
    addr.copy_from_slice(&ops.to_ne_bytes());
    let fprog = script.data(&fprog);
    script.call(libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS.into(), 1.into(), 0.into(), 0.into(), 0.into()]);
    script.call(libc::SYS_seccomp, &[libc::SECCOMP_SET_MODE_FILTER.into(), 0.into(), fprog.into()]);
    program
}

/// The filter of a task can be read back as it was set.
pub(super) fn seccomp_filters() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    let program = filtered(&mut script);
    let asked = script.call(libc::SYS_getppid, &[]);
    let child = call("fork", script.start())?;
    expect(child.result(asked) == Err(Errno::EXFULL), "the filter does not filter")?;
    call("PTRACE_SEIZE", child.seize(0))?;
    let read = call("PTRACE_SECCOMP_GET_FILTER", ptrace::seccomp_filter(child.pid(), 0))?;
    let same = read.len() == program.len()
        && read.iter().zip(&program).all(|(a, b)| pod::bytes_of(a) == pod::bytes_of(b));
    expect(same, "the filter read is not the filter set")
}

/// A traced task can do what its filter forbids.
pub(super) fn seccomp_suspend() -> Result<(), Trouble> {
    let mut script = call("pipe", Script::new())?;
    filtered(&mut script);
    script.rest();
    let asked = script.call(libc::SYS_getppid, &[]);
    let child = call("fork", script.start())?;
    call("PTRACE_O_SUSPEND_SECCOMP", child.seize(ptrace::O_SUSPEND_SECCOMP))?;
    call("PTRACE_CONT", ptrace::cont(child.pid(), 0))?;
    // The interrupted read goes on by itself.
    call("wait for the task", child.go())?;
    let parent = call("getppid under a suspended filter", child.result(asked))?;
    expect(parent == i64::from(nix::unistd::getpid().as_raw()), "the filter is not suspended")
}
