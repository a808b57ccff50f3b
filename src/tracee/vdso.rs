//! Threads that were stopped in the code of the vDSO.
//!
//! That code reads a clock in several steps: the time of the machine, then what the time namespace of the task adds to it.
//! Restored between the two, a thread would add what its new namespace adds to the time of another machine, and a clock
//! would jump by days. On a kernel with another vDSO it would even go on in code that does not fit the data it reads. So
//! a thread that was stopped there goes on for a moment, and is stopped again, until it is elsewhere.
//!
//! It is not led out by single steps: the trap of a step changes what the task does with SIGTRAP, and a thread whose
//! tracer is killed would keep the trap flag.
//!
//! What this does not do: a thread in a signal handler that came in the middle of the vDSO goes back there, and one that
//! is stopped by job control stays where it is.

use std::{
    cell::OnceCell,
    ops::Range,
    time::{Duration, Instant},
};

use libc::user_regs_struct;

use super::{Stop, Stopped, TraceError, read_maps};
use crate::{proc::maps::VmaName, sys::pid::HostPid};

/// So long the threads of a process may take to be elsewhere, all together. A reading of a clock takes some 50 ns, but on a busy
/// machine a thread gets a processor only after a while.
const LONGEST: Duration = Duration::from_millis(500);
/// For so long a thread goes on at first, and at last.
const PAUSES: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(5));

/// Whether a stopped thread may be in the vDSO. One that sleeps in a system call is not, because no function of the vDSO
/// makes a call that sleeps.
fn may_be_inside(regs: &user_regs_struct) -> bool {
    /// Of 64-bit code: the vDSO of 32-bit code is the way into every system call.
    const USER_CS: u64 = 0x33;
    const CALLS: [i64; 6] = [
        libc::SYS_clock_gettime,
        libc::SYS_gettimeofday,
        libc::SYS_time,
        libc::SYS_clock_getres,
        libc::SYS_getcpu,
        libc::SYS_getrandom,
    ];
    let call = regs.orig_rax.cast_signed();
    regs.cs == USER_CS && (call == -1 || CALLS.contains(&call))
}

/// The vDSO of one process, whose threads are about to be held.
#[derive(Debug)]
pub(crate) struct Vdso {
    /// Where it is mapped; looked at when it is needed, since that takes a while.
    place: OnceCell<Option<Range<u64>>>,
    until: Instant,
}

impl Vdso {
    /// Not looked at yet.
    pub(crate) fn new() -> Self {
        Self { place: OnceCell::new(), until: Instant::now() + LONGEST }
    }

    fn has(&self, tid: HostPid, regs: &user_regs_struct) -> bool {
        let look = || {
            let maps = read_maps(tid).ok()?;
            maps.iter().find(|vma| vma.name == Some(VmaName::Vdso)).map(|vma| vma.start..vma.end)
        };
        may_be_inside(regs) && self.place.get_or_init(look).as_ref().is_some_and(|at| at.contains(&regs.rip))
    }

    /// Lets a thread that is in it go on until it is stopped elsewhere. `check` may end the wait.
    pub(crate) fn leave(
        &self,
        mut stopped: Stopped,
        check: &dyn Fn() -> Result<(), TraceError>,
    ) -> Result<Stopped, TraceError> {
        let mut pause = PAUSES.0;
        while stopped.stop() == Stop::Running && self.has(stopped.tid(), &stopped.regs()?) {
            if Instant::now() > self.until {
                let tid = stopped.tid();
                tracing::warn!(
                    "thread {tid} reads a clock all the time: after a restore one reading may be wrong"
                );
                break;
            }
            stopped = stopped.go_on(pause, check)?;
            pause = (pause * 2).min(PAUSES.1);
        }
        Ok(stopped)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        process::{Child, Command, Stdio},
    };

    use super::*;
    use crate::tracee::{Seized, procfs};

    struct Reader(Child);

    impl Drop for Reader {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_thread_that_reads_the_time_leaves_the_vdso() {
        let program = "$SIG{USR1} = sub { $n++ }; $SIG{TRAP} = 'IGNORE'; $t = 0; $| = 1; print \"ready\\n\"; \
                       while (1) { $u = time; $u >= $t || exit 3; $t = $u }";
        let spawned = Command::new("perl").args(["-e", program]).stdout(Stdio::piped()).spawn();
        let Ok(child) = spawned else { return };
        let mut reader = Reader(child);
        let mut ready = [0; 6];
        reader.0.stdout.take().unwrap().read_exact(&mut ready).unwrap();
        let tid = HostPid::new(reader.0.id().cast_signed());
        let patient = || Ok(());
        let (mut inside, mut tries) = (0, 0);
        let signals = || {
            let status = crate::tracee::read_status(tid, tid).unwrap();
            (status.sigblk, status.sigign, status.sigcgt)
        };
        let mut before = None;
        while inside < 10 {
            tries += 1;
            assert!(tries < 100_000, "it was in the vDSO {inside} times only");
            std::thread::sleep(std::time::Duration::from_micros(100));
            let stopped = Seized::seize(tid, &patient).unwrap().settle(&patient).unwrap();
            let vdso = Vdso::new();
            if vdso.has(tid, &stopped.regs().unwrap()) {
                inside += 1;
                before.get_or_insert_with(signals);
                // Also when a signal comes, with a handler or without one.
                let signal = [0, libc::SIGUSR1, libc::SIGCHLD][inside % 3];
                crate::sys::task::kill(tid, signal).unwrap();
            }
            let stopped = vdso.leave(stopped, &patient).unwrap();
            assert!(!vdso.has(tid, &stopped.regs().unwrap()));
            assert!(stopped.holds());
            stopped.detach().unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!procfs::is_dead(&procfs::stat(tid).unwrap()), "it ended");
        assert_eq!(Some(signals()), before);
    }
}
