//! Process trees: parents, threads, sessions, groups, zombies, stopped tasks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::case::Case;
use crate::gate::{self, Gate, fork, join};
use crate::sys::{self, getpid, gettid};

pub const CASES: &[Case] = &[
    Case::new("counter", counter).disturbed().fifty(),
    Case::new("three_levels", three_levels).disturbed().fifty(),
    Case::new("threads_count", threads_count).disturbed().fifty(),
    Case::new("thread_own_state", thread_own_state).disturbed(),
    Case::new("child_of_thread", child_of_thread),
    Case::new("dead_leader", dead_leader).disturbed().peer_fails("a process whose leader thread is gone"),
    Case::new("sessions", sessions),
    Case::new("process_groups", process_groups),
    Case::new("dead_session_leader", dead_session_leader).peer_fails("a session whose leader is gone"),
    Case::new("dead_group_leader", dead_group_leader),
    Case::new("zombie_exited", zombie_exited).disturbed(),
    Case::new("zombie_exited_255", zombie_exited_255).peer_fails("makes exit status 255 of it 127"),
    Case::new("zombie_killed", zombie_killed),
    Case::new("zombies_of_every_signal", zombies_of_every_signal)
        .peer_fails("zombies of some signals become others"),
    Case::new("zombie_session_leader", zombie_session_leader)
        .peer_fails("a session whose leader is a zombie"),
    // After dump -R CRIU leaves a SIGCONT pending.
    Case::new("stopped_child", stopped_child).disturbed().peer_loses(&["ShdPnd"]),
    Case::new("stopped_root", stopped_root).peer_loses(&["ShdPnd"]),
    Case::new("subreaper", subreaper),
    Case::new("orphans_at_subreaper", orphans_at_subreaper),
    Case::new("orphan_outside", orphan_outside)
        .refused("is in it and outside of the tree|end that process first")
        .only_plain(),
    Case::new("shared_fd_table", shared_fd_table),
    Case::new("shared_fs", shared_fs).peer_fails("refuses tasks that share their fs"),
    Case::new("shared_handlers", shared_handlers).peer_fails("refuses tasks that share their memory"),
    Case::new("forks_all_the_time", forks_all_the_time).changing(),
    Case::new("threads_all_the_time", threads_all_the_time).changing(),
    Case::new("threads_500", threads_500),
    Case::new("thread_own_table", thread_own_table).refused("descriptor table"),
    // A thread in vfork(2) sleeps where no tracer can stop it.
    Case::new("vfork", vfork).refused("vfork"),
    // One that comes out of it soon is waited for.
    Case::new("vfork_again_and_again", vfork_again_and_again).changing().only_plain().fifty(),
    // The image format has no place for it.
    Case::new("exit_signal", exit_signal).refused("exit signal"),
    Case::new("tid_address", tid_address),
    Case::new("many_children", many_children),
    Case::new("ten_children", ten_children).disturbed(),
];

fn counter(gate: &Gate) {
    let mut n = 0_u64;
    let pid = getpid();
    sys::setsid();
    gate.ready();
    for _ in 0..1000 {
        n += 1;
    }
    assert_eq!(n, 1000);
    assert_eq!(getpid(), pid);
    assert_eq!(gettid(), pid);
    assert_eq!(sys::stat_field(pid, 6), pid.to_string(), "session");
}

fn three_levels(gate: &Gate) {
    let me = getpid();
    let child = fork(|| {
        let own = getpid();
        let grandchild = fork(|| {
            gate.mark("grandchild");
            gate.wait();
            assert_eq!(nix::unistd::getppid().as_raw(), own);
        });
        gate.await_mark("grandchild");
        gate.mark("child");
        gate.wait();
        assert_eq!(nix::unistd::getppid().as_raw(), me);
        join(grandchild);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}

fn threads_count(gate: &Gate) {
    const THREADS: usize = 8;
    let counters: Arc<[AtomicU64; THREADS]> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..THREADS)
        .map(|n| {
            let (counters, stop) = (counters.clone(), stop.clone());
            std::thread::spawn(move || {
                let tid = gettid();
                let mut own = 0;
                while !stop.load(Ordering::Relaxed) {
                    own += 1;
                    assert_eq!(counters[n].fetch_add(1, Ordering::Relaxed), own - 1);
                    if own % 1000 == 0 {
                        sys::nap(Duration::from_micros(200));
                    }
                }
                assert_eq!(gettid(), tid);
                own
            })
        })
        .collect();
    while counters.iter().any(|c| c.load(Ordering::Relaxed) == 0) {
        std::thread::yield_now();
    }
    gate.ready();
    let seen: Vec<u64> = counters.iter().map(|c| c.load(Ordering::Relaxed)).collect();
    while counters.iter().zip(&seen).any(|(c, s)| c.load(Ordering::Relaxed) == *s) {
        std::thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    for (n, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().expect("thread"), counters[n].load(Ordering::Relaxed));
    }
}

/// Each thread with a mask, an alternate stack, a name and a thread-local of its own.
fn thread_own_state(gate: &Gate) {
    thread_local!(static OWN: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    let start = Arc::new(std::sync::Barrier::new(7));
    let threads: Vec<_> = (1..=6_i32)
        .map(|n| {
            let start = start.clone();
            let control = gate.clone_for_thread();
            std::thread::spawn(move || {
                let mask = sys::mask_of(&[libc::SIGUSR1, 40 + n]);
                sys::sigprocmask(libc::SIG_SETMASK, mask);
                let stack = sys::anon(64 << 10);
                let alt = libc::stack_t { ss_sp: stack.addr as *mut _, ss_flags: 0, ss_size: stack.len };
                sys!(SYS_sigaltstack, &raw const alt, 0).expect("sigaltstack");
                let name = std::ffi::CString::new(format!("own-{n}")).expect("name");
                sys::prctl(libc::PR_SET_NAME, name.as_ptr() as usize, 0).expect("PR_SET_NAME");
                OWN.set(n as u64 * 1000);
                let mut base = 0_u64;
                sys!(SYS_arch_prctl, 0x1003, &raw mut base).expect("ARCH_GET_FS");
                let tid = gettid();
                start.wait();
                control.wait();
                assert_eq!(gettid(), tid);
                assert_eq!(sys::current_mask(), mask, "mask of thread {n}");
                let mut now: libc::stack_t = sys::zeroed();
                sys!(SYS_sigaltstack, 0, &raw mut now).expect("sigaltstack");
                assert_eq!((now.ss_sp as usize, now.ss_size, now.ss_flags), (stack.addr, stack.len, 0));
                let mut comm = [0_u8; 16];
                sys::prctl(libc::PR_GET_NAME, comm.as_mut_ptr() as usize, 0).expect("PR_GET_NAME");
                assert_eq!(&comm[..6], format!("own-{n}\0").as_bytes());
                assert_eq!(OWN.get(), n as u64 * 1000);
                let mut base_now = 0_u64;
                sys!(SYS_arch_prctl, 0x1003, &raw mut base_now).expect("ARCH_GET_FS");
                assert_eq!(base_now, base, "fs base");
                // The stack goes away with the thread.
                let off =
                    libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
                sys!(SYS_sigaltstack, &raw const off, 0).expect("sigaltstack off");
            })
        })
        .collect();
    start.wait();
    gate.ready();
    for thread in threads {
        thread.join().expect("thread");
    }
}

/// A child forked by a thread that is not the leader: it is everybody's to wait for, and stays so.
fn child_of_thread(gate: &Gate) {
    let control = gate.clone_for_thread();
    let forked = std::thread::spawn(move || {
        let me = getpid();
        let inner = control.clone_for_thread();
        let pid = fork(move || {
            inner.mark("forked");
            inner.wait();
            assert_eq!(nix::unistd::getppid().as_raw(), me);
        });
        control.await_mark("forked");
        control.mark("thread");
        control.wait();
        join(pid);
    });
    gate.await_mark("thread");
    gate.ready();
    forked.join().expect("thread");
}

/// The leader ends first; the other threads run on, and end the process with a status of their own.
fn dead_leader(gate: &Gate) {
    let control = gate.clone_for_thread();
    std::thread::spawn(move || {
        gate::until_state(getpid(), 'Z');
        control.ready();
        assert_eq!(sys::stat_field(getpid(), 3), "Z", "state of the leader");
        assert_ne!(gettid(), getpid());
        sys::exit_now(0);
    });
    sys::thread_exit();
}

fn sid_and_pgid(pid: i32) -> (i32, i32) {
    let number = |field| sys::stat_field(pid, field).parse().expect("stat field");
    (number(6), number(5))
}

fn sessions(gate: &Gate) {
    let me = getpid();
    let inside = fork(|| {
        gate.mark("inside");
        gate.wait();
        assert_eq!(sid_and_pgid(getpid()), (me, me));
    });
    let own = fork(|| {
        sys::setsid();
        let leader = getpid();
        let member = fork(|| {
            gate.mark("member");
            gate.wait();
            assert_eq!(sid_and_pgid(getpid()), (leader, leader));
        });
        gate.await_mark("member");
        gate.mark("own");
        gate.wait();
        assert_eq!(sid_and_pgid(getpid()), (leader, leader));
        join(member);
    });
    gate.await_mark("inside");
    gate.await_mark("own");
    gate.ready();
    assert_eq!(sid_and_pgid(me), (me, me));
    join(inside);
    join(own);
}

fn process_groups(gate: &Gate) {
    let me = getpid();
    let leader = fork(|| {
        sys!(SYS_setpgid, 0, 0).expect("setpgid");
        gate.mark("leader");
        gate.wait();
        assert_eq!(sid_and_pgid(getpid()), (me, getpid()));
    });
    gate.await_mark("leader");
    let member = fork(|| {
        sys!(SYS_setpgid, 0, leader).expect("setpgid");
        gate.mark("member");
        gate.wait();
        assert_eq!(sid_and_pgid(getpid()), (me, leader));
    });
    gate.await_mark("member");
    gate.ready();
    join(leader);
    join(member);
}

/// A session whose leader has died and was reaped; its members, orphans, live on with its id.
fn dead_session_leader(gate: &Gate) {
    sys::become_subreaper();
    let leader = fork(|| {
        sys::setsid();
        let leader = getpid();
        fork(|| {
            while nix::unistd::getppid().as_raw() == leader {
                sys::nap(Duration::from_micros(300));
            }
            gate.mark("orphan");
            gate.wait();
            assert_eq!(sid_and_pgid(getpid()), (leader, leader));
        });
    });
    join(leader);
    gate.await_mark("orphan");
    gate.ready();
    let (orphan, status) = sys::waitpid(-1, 0).expect("wait for the orphan");
    assert_eq!(status, 0, "status of orphan {orphan}");
}

fn dead_group_leader(gate: &Gate) {
    let me = getpid();
    let leader = fork(|| {
        sys!(SYS_setpgid, 0, 0).expect("setpgid");
        gate.mark("leader");
        gate.await_mark("joined");
    });
    gate.await_mark("leader");
    let member = fork(|| {
        sys!(SYS_setpgid, 0, leader).expect("setpgid");
        gate.mark("joined");
        gate.await_mark("reaped");
        gate.mark("member");
        gate.wait();
        assert_eq!(sid_and_pgid(getpid()), (me, leader));
    });
    join(leader);
    gate.mark("reaped");
    gate.await_mark("member");
    gate.ready();
    join(member);
}

fn zombie_exited(gate: &Gate) {
    zombies(gate, &[42, 0, 1, 127]);
}

fn zombie_exited_255(gate: &Gate) {
    zombies(gate, &[255, 128]);
}

fn zombies(gate: &Gate, statuses: &[i32]) {
    let children: Vec<i32> = statuses.iter().map(|&status| sys::fork(|| status)).collect();
    for &pid in &children {
        gate::until_state(pid, 'Z');
    }
    gate.ready();
    for (pid, status) in children.into_iter().zip(statuses) {
        assert_eq!(sys::waitpid(pid, 0), Ok((pid, status << 8)));
    }
    assert_eq!(sys::waitpid(-1, 0), Err(libc::ECHILD));
}

fn zombie_killed(gate: &Gate) {
    let signals = [libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1];
    let children = signals.map(|_| {
        sys::fork(|| {
            loop {
                sys::nap(Duration::from_secs(1));
            }
        })
    });
    for (pid, signal) in children.into_iter().zip(signals) {
        sys::kill(pid, signal);
        gate::until_state(pid, 'Z');
    }
    gate.ready();
    for (pid, signal) in children.into_iter().zip(signals) {
        assert_eq!(sys::waitpid(pid, 0), Ok((pid, signal)));
    }
}

/// A zombie that still holds its session and group together for a living member.
fn zombie_session_leader(gate: &Gate) {
    sys::become_subreaper();
    let leader = sys::fork(|| {
        sys::setsid();
        let leader = getpid();
        fork(|| {
            while nix::unistd::getppid().as_raw() == leader {
                sys::nap(Duration::from_micros(300));
            }
            gate.mark("orphan");
            gate.wait();
            assert_eq!(sid_and_pgid(getpid()), (leader, leader));
        });
        7
    });
    gate::until_state(leader, 'Z');
    gate.await_mark("orphan");
    gate.ready();
    assert_eq!(sys::waitpid(leader, 0), Ok((leader, 7 << 8)));
    let (orphan, status) = sys::waitpid(-1, 0).expect("wait for the orphan");
    assert_eq!(status, 0, "status of orphan {orphan}");
}

fn stopped_child(gate: &Gate) {
    let child = fork(|| gate.wait());
    sys::kill(child, libc::SIGSTOP);
    gate::until_state(child, 'T');
    gate.ready();
    assert_eq!(sys::stat_field(child, 3), "T", "state of the child");
    sys::nap(Duration::from_millis(5));
    assert_eq!(sys::stat_field(child, 3), "T", "state of the child");
    sys::kill(child, libc::SIGCONT);
    join(child);
}

/// The root itself is stopped by a child of its own when it gets dumped.
fn stopped_root(gate: &Gate) {
    let me = getpid();
    let child = fork(|| {
        gate.await_mark("stop");
        sys::kill(me, libc::SIGSTOP);
        gate::until_state(me, 'T');
        // From here on the child speaks for the tree.
        gate.ready();
    });
    gate.mark("stop");
    // Not before SIGCONT does this go on.
    while sys::stat_field(child, 3) != "Z" {
        sys::nap(Duration::from_millis(1));
    }
    join(child);
}

fn is_subreaper() -> i32 {
    let mut is = 0_i32;
    sys::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut is as usize, 0).expect("PR_GET_CHILD_SUBREAPER");
    is
}

/// One that was killed by each signal that can do so; the parent must be told.
fn zombies_of_every_signal(gate: &Gate) {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    sys!(SYS_prlimit64, 0, libc::RLIMIT_CORE, &raw const none, 0).expect("no core files");
    let harmless = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGURG,
        libc::SIGWINCH,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
    ];
    let zombies: Vec<(i32, i32)> = (1..=64)
        .filter(|signal| !harmless.contains(signal))
        .map(|signal| {
            let child = fork(|| {
                sys::default_signals();
                // The standard library has handlers for some.
                let default = [0_u64; 4];
                let _ = sys!(SYS_rt_sigaction, signal, default.as_ptr(), 0, 8);
                sys!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const default, 0, 8).expect("mask");
                sys::kill(getpid(), signal);
                loop {
                    sys::nap(Duration::from_secs(1));
                }
            });
            gate::until_state(child, 'Z');
            (child, signal)
        })
        .collect();
    gate.ready();
    for (child, signal) in zombies {
        assert_eq!(sys::waitpid(child, 0), Ok((child, signal)), "zombie of signal {signal}");
    }
}

fn subreaper(gate: &Gate) {
    let child = fork(|| {
        sys::become_subreaper();
        gate.mark("child");
        gate.wait();
        assert_eq!(is_subreaper(), 1, "subreaper flag of the child");
        // It works, too: an orphan comes here.
        let middle = fork(|| {
            fork(|| sys::nap(Duration::from_millis(5)));
        });
        join(middle);
        let (_, status) = sys::waitpid(-1, 0).expect("the orphan comes to the subreaper");
        assert_eq!(status, 0);
    });
    gate.await_mark("child");
    gate.ready();
    assert_eq!(is_subreaper(), 0, "subreaper flag of the root");
    join(child);
}

/// Grandchildren whose parent died before the dump belong to the subreaper above.
fn orphans_at_subreaper(gate: &Gate) {
    sys::become_subreaper();
    let me = getpid();
    let middle = fork(|| {
        let middle = getpid();
        for name in ["one", "two"] {
            fork(|| {
                while nix::unistd::getppid().as_raw() == middle {
                    sys::nap(Duration::from_micros(300));
                }
                gate.mark(name);
                gate.wait();
                assert_eq!(nix::unistd::getppid().as_raw(), me);
            });
        }
    });
    join(middle);
    gate.await_mark("one");
    gate.await_mark("two");
    gate.ready();
    for _ in 0..2 {
        assert_eq!(sys::waitpid(-1, 0).expect("an orphan").1, 0);
    }
}

/// Init has adopted a task that is still in the session of the tree: that keeps the id of the root taken.
fn orphan_outside(gate: &Gate) {
    let orphan = sys::shared(4096);
    let middle = fork(|| {
        let pid = fork(|| {
            sys::nap(Duration::from_secs(1000));
        });
        sys::atomic(orphan.at(0)).store(u64::from(pid.cast_unsigned()), Ordering::SeqCst);
    });
    join(middle);
    let orphan = i32::try_from(sys::atomic(orphan.at(0)).load(Ordering::SeqCst)).expect("a pid");
    gate.ready();
    sys::kill(orphan, libc::SIGKILL);
}

fn shared_fd_table(gate: &Gate) {
    fn body(gate: usize) -> i32 {
        // The gate lives in the parent's frame, of which the child has a copy.
        let gate: &Gate = Gate::at(gate);
        gate.mark("child");
        gate.wait();
        let fd = sys::open(c"/dev/zero", libc::O_RDONLY).expect("open /dev/zero");
        if fd == 50 { 1 } else { i32::from(sys!(SYS_dup2, fd, 50) != Ok(50)) }
    }
    let child = sys::clone_child(libc::CLONE_FILES | libc::SIGCHLD, body, gate.address());
    gate.await_mark("child");
    gate.ready();
    join(child);
    assert_eq!(sys::read(50, 4), Ok(vec![0; 4]), "the fd that the child opened");
}

fn shared_fs(gate: &Gate) {
    fn body(gate: usize) -> i32 {
        let gate: &Gate = Gate::at(gate);
        gate.mark("child");
        gate.wait();
        let changed = sys!(SYS_chdir, c"/proc".as_ptr()).is_ok();
        let _ = sys!(SYS_umask, 0o31);
        i32::from(!changed)
    }
    let child = sys::clone_child(libc::CLONE_FS | libc::SIGCHLD, body, gate.address());
    gate.await_mark("child");
    gate.ready();
    join(child);
    assert_eq!(std::env::current_dir().expect("cwd"), std::path::Path::new("/proc"));
    assert_eq!(sys!(SYS_umask, 0), Ok(0o31), "umask that the child set");
}

extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A child that shares memory and signal handlers, but is a process of its own.
/// A thread that has left the descriptor table of its process, which images cannot say.
fn thread_own_table(gate: &Gate) {
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        sys!(SYS_unshare, libc::CLONE_FILES).expect("unshare");
        control.mark("own");
        control.wait();
    });
    gate.await_mark("own");
    gate.ready();
    thread.join().expect("thread");
}

fn shared_handlers(gate: &Gate) {
    fn body(gate: usize) -> i32 {
        let gate: &Gate = Gate::at(gate);
        gate.mark("child");
        gate.wait();
        sys::handle(40, ignore, 0);
        0
    }
    let flags = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_FS | libc::CLONE_FILES | libc::SIGCHLD;
    let child = sys::clone_child(flags, body, gate.address());
    gate.await_mark("child");
    gate.ready();
    join(child);
    let mut action: [u64; 4] = [0; 4];
    sys!(SYS_rt_sigaction, 40, 0, action.as_mut_ptr(), 8).expect("rt_sigaction");
    assert_eq!(action[0], ignore as *const () as u64, "the handler that the child installed");
}

/// Children come and go all the time, while it is frozen too.
fn forks_all_the_time(gate: &Gate) {
    let busy: Vec<i32> = (0..3)
        .map(|n| {
            fork(|| {
                let mut rounds = 0_u32;
                while !gate.open() {
                    let child = fork(|| {
                        let deeper = fork(|| ());
                        join(deeper);
                    });
                    join(child);
                    rounds += 1;
                    if rounds == 3 {
                        gate.mark(["f0", "f1", "f2"][n]);
                    }
                }
            })
        })
        .collect();
    for name in ["f0", "f1", "f2"] {
        gate.await_mark(name);
    }
    gate.ready();
    for pid in busy {
        join(pid);
    }
    assert_eq!(sys::waitpid(-1, 0), Err(libc::ECHILD));
}

fn threads_all_the_time(gate: &Gate) {
    let rounds = Arc::new(AtomicU64::new(0));
    let makers: Vec<_> = (0..3)
        .map(|_| {
            let (control, rounds) = (gate.clone_for_thread(), rounds.clone());
            std::thread::spawn(move || {
                while !control.open() {
                    let made: Vec<_> = (0..4).map(|n| std::thread::spawn(move || n * 2)).collect();
                    for (n, thread) in made.into_iter().enumerate() {
                        assert_eq!(thread.join().expect("short thread"), n * 2);
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    while rounds.load(Ordering::Relaxed) < 3 {
        std::thread::yield_now();
    }
    gate.ready();
    for maker in makers {
        maker.join().expect("maker");
    }
}

fn threads_500(gate: &Gate) {
    let pair = Arc::new((std::sync::Mutex::new((0, false)), std::sync::Condvar::new()));
    let threads: Vec<_> = (0..500_u64)
        .map(|n| {
            let pair = pair.clone();
            let run = move || {
                let tid = gettid();
                let local = std::hint::black_box([n; 16]);
                let (state, changed) = &*pair;
                let mut held = state.lock().expect("lock");
                held.0 += 1;
                changed.notify_all();
                while !held.1 {
                    held = changed.wait(held).expect("wait");
                }
                assert_eq!(gettid(), tid);
                local.iter().sum::<u64>()
            };
            std::thread::Builder::new().stack_size(64 << 10).spawn(run).expect("spawn")
        })
        .collect();
    let (state, changed) = &*pair;
    let mut held = state.lock().expect("lock");
    while held.0 < 500 {
        held = changed.wait(held).expect("wait");
    }
    drop(held);
    gate.ready();
    state.lock().expect("lock").1 = true;
    changed.notify_all();
    for (n, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().expect("thread"), n as u64 * 16);
    }
}

/// A parent in vfork(2) waits for a child that shares its memory.
fn vfork(gate: &Gate) {
    fn body(gate: usize) -> i32 {
        let gate: &Gate = Gate::at(gate);
        gate.mark("child");
        gate.wait();
        3
    }
    let control = gate.clone_for_thread();
    // The thread sleeps inside clone(CLONE_VFORK) until its child exits.
    let waiting = std::thread::spawn(move || {
        let flags = libc::CLONE_VFORK | libc::CLONE_VM | libc::SIGCHLD;
        let child = sys::clone_child(flags, body, control.address());
        assert_eq!(sys::waitpid(child, 0), Ok((child, 3 << 8)));
    });
    gate.await_mark("child");
    gate.ready();
    waiting.join().expect("thread in vfork");
}

/// A thread that runs one program after the other, as make and shells do.
fn vfork_again_and_again(gate: &Gate) {
    let control = gate.clone_for_thread();
    let (send, begun) = std::sync::mpsc::channel();
    let runner = std::thread::spawn(move || {
        while !control.open() {
            let status = std::process::Command::new("/bin/true").status().expect("run a program");
            assert!(status.success(), "{status}");
            let _ = send.send(());
        }
    });
    begun.recv().expect("the first program");
    gate.ready();
    runner.join().expect("thread");
}

/// Children that tell of their death by another signal than SIGCHLD, or by none.
fn exit_signal(gate: &Gate) {
    fn body(gate: usize) -> i32 {
        Gate::at(gate).wait();
        0
    }
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[libc::SIGUSR2, libc::SIGCHLD]));
    let loud = sys::clone_child(libc::SIGUSR2, body, gate.address());
    let mute = sys::clone_child(0, body, gate.address());
    gate.ready();
    for pid in [loud, mute] {
        assert_eq!(sys::waitpid(pid, libc::__WALL), Ok((pid, 0)));
    }
    let mut pending = 0_u64;
    sys!(SYS_rt_sigpending, &raw mut pending, 8).expect("rt_sigpending");
    assert_eq!(pending, sys::mask_of(&[libc::SIGUSR2]), "signals of dead children");
}

/// set_tid_address: the kernel clears the word and wakes a waiter when the thread ends.
fn tid_address(gate: &Gate) {
    let control = gate.clone_for_thread();
    let word = sys::anon(4096);
    let thread = std::thread::spawn(move || {
        sys!(SYS_set_tid_address, word.at(0)).expect("set_tid_address");
        word.set(0, gettid());
        control.mark("thread");
        control.wait();
        sys::thread_exit();
    });
    gate.await_mark("thread");
    gate.ready();
    let tid: i32 = word.get(0);
    if tid != 0 {
        let limit = sys::timespec(gate::PATIENCE);
        let woken = sys!(SYS_futex, word.at(0), libc::FUTEX_WAIT, tid, &raw const limit);
        assert!(matches!(woken, Ok(0) | Err(libc::EAGAIN)), "futex wait: {woken:?}");
    }
    assert_eq!(word.get::<i32>(0), 0, "cleared by the kernel");
    std::mem::forget(thread);
}

fn many_children(gate: &Gate) {
    children(gate, 100);
}

fn ten_children(gate: &Gate) {
    children(gate, 10);
}

fn children(gate: &Gate, count: u64) {
    let me = getpid();
    let arrived = sys::shared(4096);
    let children: Vec<i32> = (0..count)
        .map(|n| {
            fork(|| {
                let own = getpid();
                sys::atomic(arrived.at(0)).fetch_add(1, Ordering::SeqCst);
                gate.wait();
                assert_eq!(getpid(), own);
                assert_eq!(nix::unistd::getppid().as_raw(), me);
                assert!(n < count);
            })
        })
        .collect();
    while sys::atomic(arrived.at(0)).load(Ordering::SeqCst) < count {
        sys::nap(Duration::from_micros(300));
    }
    gate.ready();
    for pid in children {
        join(pid);
    }
}
