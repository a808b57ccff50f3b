//! Threads that help to fill the memory of a restored process, held up where they are about to end.

use std::{
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::{
    site::{Site, Trouble, Verdict, fail, lives, numbers},
    sys,
};

/// Enough for helping threads, on a machine with more than one processor.
pub const BYTES: usize = 192 << 20;
/// How long a thread is held at each step.
const HELD: Duration = Duration::from_millis(400);
const TRIES: usize = 10;

/// A restore is over when they are gone, and not before: they execute code that is unmapped then.
pub fn held(site: &mut Site) -> Verdict {
    if thread::available_parallelism().map_or(1, std::num::NonZero::get) < 2 {
        return Err(Trouble::Skip("helping threads are made with two processors".into()));
    }
    let mut tree = site.play("large", "")?;
    let pid = tree.pid;
    site.dumped(&mut tree)?;
    for _ in 0..TRIES {
        let (over, held) = (AtomicBool::new(false), AtomicI32::new(0));
        let run = thread::scope(|scope| {
            let holder = scope.spawn(|| hold(pid, &over, &held));
            let run = site.run(&["restore", "-d"]);
            over.store(true, Ordering::Relaxed);
            let _ = holder.join();
            run
        });
        // Nothing that it does to itself comes later than this.
        thread::sleep(HELD + Duration::from_millis(200));
        let alive = lives(pid);
        if held.load(Ordering::Relaxed) > 0 {
            return match (run.status, alive) {
                (0, false) => fail("the restore succeeded, and the process is dead"),
                (0, true) => Ok(()),
                _ => fail(format!("the restore failed: {}", run.said)),
            };
        }
        run.succeeded("restore")?;
        crate::site::clear(&[]);
    }
    fail("no helping thread was caught")
}

/// Catches a thread of `pid` that is no task of the tree, and holds it at each system call by which it ends.
fn hold(pid: i32, over: &AtomicBool, held: &AtomicI32) {
    let begin = Instant::now();
    let thread = loop {
        if over.load(Ordering::Relaxed) || begin.elapsed() > Duration::from_secs(30) {
            return;
        }
        let tids = numbers(&format!("/proc/{pid}/task"));
        if let Some(tid) = tids.into_iter().find(|tid| *tid != pid) {
            break Pid::from_raw(tid);
        }
    };
    // Of crtool's own threads none has this pid.
    if ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD).is_err() || ptrace::interrupt(thread).is_err() {
        return;
    }
    let mut pass: Option<Signal> = None;
    loop {
        match waitpid(thread, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(_)) => {
                let call = ptrace::getregs(thread).map_or(0, |regs| regs.orig_rax.cast_signed());
                if call == libc::SYS_futex || call == libc::SYS_exit {
                    held.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(HELD);
                }
            }
            Ok(WaitStatus::Stopped(_, signal)) => pass = Some(signal),
            Ok(WaitStatus::PtraceEvent(..)) => {}
            _ => return,
        }
        if ptrace::syscall(thread, pass.take()).is_err() {
            return;
        }
    }
}

/// A process with much memory.
pub fn large() -> ! {
    nix::unistd::setsid().expect("setsid");
    let memory = vec![0x5au8; BYTES];
    crate::site::ready();
    std::hint::black_box(&memory);
    sys::rest()
}
