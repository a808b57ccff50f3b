//! Threads that were stopped in the code of the vDSO.
//!
//! That code reads a clock in several steps: the time of the machine, then what the time namespace of the task adds to it.
//! Restored between the two, a thread would add what its new namespace adds to the time of another machine, and a clock
//! would jump by days. On a kernel with another vDSO it would even go on in code that does not fit the data it reads. So
//! a thread is let go on, instruction by instruction, until it has left the vDSO.
//!
//! Signals are not blocked meanwhile, since a thread whose tracer is killed must be as it was. One that comes is delivered:
//! its handler is outside of the vDSO, and the frame from which it will return there is a part of the memory like any other.

use std::ops::Range;

use super::{Stop, Thread, TraceError};
use crate::{
    proc::maps::{Vma, VmaName},
    sys::{
        ptrace,
        wait::{self, Status},
    },
};

/// A reading of a clock takes less than a hundred instructions; a thread that calls something there again and again, with no
/// instruction of its own between, is let be after so many.
const MOST_STEPS: u32 = 20_000;

/// Whether a stopped thread may be in the vDSO. One that sleeps in a system call is not, because no function of the vDSO
/// makes a call that sleeps.
pub(crate) fn may_be_inside(thread: &Thread) -> bool {
    const CALLS: [i64; 6] = [
        libc::SYS_clock_gettime,
        libc::SYS_gettimeofday,
        libc::SYS_time,
        libc::SYS_clock_getres,
        libc::SYS_getcpu,
        libc::SYS_getrandom,
    ];
    let call = thread.regs.orig_rax.cast_signed();
    call == -1 || CALLS.contains(&call)
}

/// Where the vDSO is mapped.
pub(crate) fn place(maps: &[Vma]) -> Option<Range<u64>> {
    maps.iter().find(|vma| vma.name == Some(VmaName::Vdso)).map(|vma| vma.start..vma.end)
}

/// Lets a thread that is in the vDSO, which is mapped at `vdso`, go on until it has left it. `check` may end the wait.
pub(crate) fn leave(
    thread: Thread,
    vdso: &Range<u64>,
    check: &dyn Fn() -> Result<(), TraceError>,
) -> Result<Thread, TraceError> {
    if !vdso.contains(&thread.regs.rip) {
        return Ok(thread);
    }
    let Thread { stopped, seccomp_suspended, .. } = thread;
    let tid = stopped.tid();
    let request = |what| move |e| TraceError::request(what, tid, e);
    let mut signal = 0;
    let mut steps = 0;
    while steps < MOST_STEPS {
        ptrace::single_step(tid, signal).map_err(request("PTRACE_SINGLESTEP"))?;
        signal = match stopped.report(check)? {
            Status::Stopped(libc::SIGTRAP, 0) => 0,
            // A process that is stopped already notices nothing of it.
            Status::Stopped(libc::SIGSTOP, 0) if matches!(stopped.stop(), Stop::Group(_)) => 0,
            Status::Stopped(signal, 0) => signal,
            Status::Stopped(_, ptrace::EVENT_STOP) => 0,
            stop => return Err(TraceError::Stop { tid, stop, doing: "leaving the vDSO" }),
        };
        steps += 1;
        if signal == 0 && !vdso.contains(&stopped.regs()?.rip) {
            break;
        }
    }
    tracing::debug!("thread {tid} was in the vDSO, and left it after {steps} instructions");
    // It is held where it would have stopped by itself, not at the trap of a step.
    ptrace::interrupt(tid).map_err(request("PTRACE_INTERRUPT"))?;
    loop {
        ptrace::cont(tid, signal).map_err(request("PTRACE_CONT"))?;
        signal = match stopped.report(check)? {
            Status::Stopped(_, ptrace::EVENT_STOP) => break,
            Status::Stopped(libc::SIGSTOP, 0) if matches!(stopped.stop(), Stop::Group(_)) => 0,
            Status::Stopped(signal, 0) => signal,
            stop => return Err(TraceError::Stop { tid, stop, doing: "leaving the vDSO" }),
        };
    }
    debug_assert!(wait::has_report(tid) == Ok(false));
    let mut thread = Thread::new(stopped)?;
    thread.seccomp_suspended = seccomp_suspended;
    Ok(thread)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::{
        sys::pid::HostPid,
        tracee::{Seized, procfs, read_maps},
    };

    struct Reader(Child);

    impl Drop for Reader {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_thread_that_reads_the_time_leaves_the_vdso() {
        let program =
            "$SIG{USR1} = sub { $n++ }; $t = 0; while (1) { $u = time; $u >= $t || exit 3; $t = $u }";
        let Ok(child) = Command::new("perl").args(["-e", program]).spawn() else { return };
        let reader = Reader(child);
        let tid = HostPid::new(reader.0.id().cast_signed());
        let patient = || Ok(());
        let (mut inside, mut tries) = (0, 0);
        while inside < 10 {
            tries += 1;
            assert!(tries < 100_000, "it was in the vDSO {inside} times only");
            std::thread::sleep(std::time::Duration::from_micros(100));
            let thread =
                Thread::new(Seized::seize(tid, &patient).unwrap().settle(&patient).unwrap()).unwrap();
            let Some(place) = place(&read_maps(tid).unwrap()) else { continue };
            if place.contains(&thread.regs.rip) {
                inside += 1;
                assert!(may_be_inside(&thread));
                // Also when a signal comes, with a handler or without one.
                let signal = [0, libc::SIGUSR1, libc::SIGCHLD][inside % 3];
                crate::sys::task::kill(tid, signal).unwrap();
            }
            let thread = leave(thread, &place, &patient).unwrap();
            assert!(!place.contains(&thread.regs.rip));
            assert!(thread.stopped.holds());
            thread.stopped.detach().unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!procfs::is_dead(&procfs::stat(tid).unwrap()), "it ended");
    }
}
