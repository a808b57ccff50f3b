//! Signals: actions, masks, pending queues, alternate stacks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::case::{Case, Site};
use crate::gate::{self, Gate, fork, join};
use crate::sys::{self, getpid, gettid};

pub const CASES: &[Case] = &[
    Case::new("actions", actions).fifty(),
    Case::new("pending_shared", pending_shared),
    Case::new("pending_private", pending_private),
    Case::new("pending_of_threads", pending_of_threads).disturbed(),
    Case::new("pending_in_order", pending_in_order),
    Case::new("pending_any_siginfo", pending_any_siginfo),
    Case::new("pending_at_stopped", pending_at_stopped).peer_loses(&["ShdPnd", "SigBlk"]),
    Case::new("mask_in_handler", mask_in_handler).disturbed(),
    Case::new("alternate_stack", alternate_stack),
    Case::new("on_alternate_stack", on_alternate_stack).disturbed(),
    Case::new("autodisarm_stack", autodisarm_stack),
    Case::new("ignored", ignored),
    Case::new("ignored_sigchld", ignored_sigchld),
    Case::new("sigchld_handler", sigchld_handler),
    Case::new("no_child_wait", no_child_wait),
    Case::new("stopped_by_sigtstp", stopped_by_sigtstp).peer_loses(&["ShdPnd"]),
    Case::new("sent_while_frozen", sent_while_frozen).while_dumping(send_many).changing(),
    Case::new("mask_full", mask_full),
    // CRIU loses those that its parasite uses itself.
    Case::new("pending_of_every_number", pending_of_every_number).peer_fails("a pending SIGTRAP"),
    Case::new("pending_continue", pending_continue)
        .peer_fails("it refuses threads with a pending SIGTRAP, and loses a pending SIGCONT"),
    Case::new("stop_pending", stop_pending).peer_fails("its restore stops at a SIGSTOP that it queues"),
    Case::new("stop_pending_at_thread", stop_pending_at_thread)
        .peer_fails("its restore stops at a SIGSTOP that it queues"),
];

/// struct kernel_sigaction: handler, flags, restorer, mask.
type Action = [u64; 4];

fn set_action(signal: i32, action: &Action) {
    sys!(SYS_rt_sigaction, signal, action.as_ptr(), 0, 8).expect("set rt_sigaction");
}

fn action(signal: i32) -> Action {
    let mut found = [0; 4];
    sys!(SYS_rt_sigaction, signal, 0, found.as_mut_ptr(), 8).expect("get rt_sigaction");
    found
}

const SA_RESTORER: u64 = 0x0400_0000;
const UNBLOCKABLE: [i32; 2] = [libc::SIGKILL, libc::SIGSTOP];

/// All 62 settable actions, each different in handler, flags, restorer and mask.
fn actions(gate: &Gate) {
    let flag_sets = [
        0,
        libc::SA_SIGINFO,
        libc::SA_RESTART | libc::SA_ONSTACK,
        libc::SA_NODEFER | libc::SA_SIGINFO,
        libc::SA_RESETHAND,
        libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT,
    ];
    let wanted: Vec<(i32, Action)> = (1..=64)
        .filter(|s| !UNBLOCKABLE.contains(s))
        .map(|s| {
            let n = s as u64;
            let flags = u64::from(flag_sets[s as usize % flag_sets.len()].cast_unsigned()) | SA_RESTORER;
            let mask = sys::pattern(n, s as usize) & !sys::mask_of(&UNBLOCKABLE);
            (s, [0x10_0000 + n * 16, flags, 0x20_0000 + n * 16, mask])
        })
        .collect();
    for (signal, wanted) in &wanted {
        set_action(*signal, wanted);
    }
    gate.ready();
    for (signal, wanted) in &wanted {
        assert_eq!(action(*signal), *wanted, "action of signal {signal}");
        set_action(*signal, &[0; 4]);
    }
}

/// The head of a siginfo as sigqueue makes it: signo, errno, code, pad, pid, uid, value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Info {
    signo: i32,
    errno: i32,
    code: i32,
    pad: i32,
    pid: i32,
    uid: u32,
    value: u64,
    rest: [u64; 12],
}

const _: () = assert!(size_of::<Info>() == 128);

impl Info {
    fn queued(signo: i32, value: u64) -> Info {
        let uid = nix::unistd::getuid().as_raw();
        Info { signo, errno: 0, code: libc::SI_QUEUE, pad: 0, pid: getpid(), uid, value, rest: [0; 12] }
    }

    fn send(&self, pid: i32) {
        sys!(SYS_rt_sigqueueinfo, pid, self.signo, std::ptr::from_ref(self)).expect("rt_sigqueueinfo");
    }

    fn send_to_thread(&self, pid: i32, tid: i32) {
        let info = std::ptr::from_ref(self);
        sys!(SYS_rt_tgsigqueueinfo, pid, tid, self.signo, info).expect("rt_tgsigqueueinfo");
    }

    /// Takes the next pending signal of `mask`; `None` if there is none.
    fn take(mask: u64) -> Option<Info> {
        let mut info: Info = sys::zeroed();
        let now = sys::timespec(Duration::ZERO);
        match sys!(SYS_rt_sigtimedwait, &raw const mask, &raw mut info, &raw const now, 8) {
            Ok(_) => Some(info),
            Err(libc::EAGAIN) => None,
            Err(e) => panic!("rt_sigtimedwait: errno {e}"),
        }
    }
}

fn block(signals: &[i32]) -> u64 {
    let mask = sys::mask_of(signals);
    sys::sigprocmask(libc::SIG_BLOCK, mask);
    mask
}

#[track_caller]
fn take_all(mask: u64, wanted: &[Info]) {
    for want in wanted {
        assert_eq!(Info::take(mask), Some(*want));
    }
    assert_eq!(Info::take(mask), None, "one signal too many");
}

/// All that can pend, to the process and to the thread, whatever becomes of them when they are delivered; and again through
/// a signalfd.
fn pending_of_every_number(gate: &Gate) {
    let kept: [fn(i32); 3] = [
        |_| {},
        |signal| set_action(signal, &[libc::SIG_IGN as u64, 0, 0, 0]),
        // The C library keeps two signals for itself.
        |signal| {
            if ![32, 33].contains(&signal) {
                sys::handle(signal, nothing, libc::SA_SIGINFO);
            }
        },
    ];
    let children: Vec<i32> = kept
        .iter()
        .enumerate()
        .map(|(n, action)| {
            let child = fork(|| {
                sys::default_signals();
                let all = u64::MAX;
                sys!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, 8).expect("mask");
                // A SIGCONT would take back the stop signals.
                let numbers: Vec<i32> =
                    (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP, libc::SIGCONT].contains(s)).collect();
                let mask = sys::mask_of(&numbers);
                let fd = sys!(SYS_signalfd4, usize::MAX, &raw const mask, 8, libc::SFD_NONBLOCK)
                    .expect("signalfd");
                numbers.iter().for_each(|signal| action(*signal));
                for signal in &numbers {
                    Info::queued(*signal, 1000 + *signal as u64).send(getpid());
                    Info::queued(*signal, 2000 + *signal as u64).send_to_thread(getpid(), gettid());
                }
                gate.mark(["default", "ignored", "handled"][n]);
                gate.wait();
                for signal in &numbers {
                    let one = sys::mask_of(&[*signal]);
                    let private = Info::take(one);
                    assert_eq!(private, Some(Info::queued(*signal, 2000 + *signal as u64)));
                    if signal % 2 == 0 {
                        assert_eq!(Info::take(one), Some(Info::queued(*signal, 1000 + *signal as u64)));
                    }
                }
                let read = sys::read(fd as i32, 128 * 64).expect("read of the signalfd");
                let odd: Vec<u32> = numbers.iter().filter(|s| **s % 2 == 1).map(|s| *s as u32).collect();
                let got: Vec<u32> = read
                    .chunks(128)
                    .map(|i| u32::from_ne_bytes(i[..4].try_into().expect("4 bytes")))
                    .collect();
                assert_eq!(got.iter().collect::<std::collections::BTreeSet<_>>(), odd.iter().collect());
            });
            gate.await_mark(["default", "ignored", "handled"][n]);
            child
        })
        .collect();
    gate.ready();
    children.into_iter().for_each(join);
}

extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A SIGCONT that is blocked, beside others.
fn pending_continue(gate: &Gate) {
    let mask = block(&[libc::SIGCONT, libc::SIGTRAP, libc::SIGUSR2]);
    sys::handle(libc::SIGCONT, nothing, libc::SA_SIGINFO);
    let sent =
        [Info::queued(libc::SIGTRAP, 1), Info::queued(libc::SIGUSR2, 2), Info::queued(libc::SIGCONT, 3)];
    sent.iter().for_each(|info| info.send(getpid()));
    gate.ready();
    take_all(mask, &sent);
}

/// A stopped child with one more stop signal pending: it stays stopped, and the signal stays pending.
fn stop_pending(gate: &Gate) {
    let child = fork(|| gate.wait());
    sys::kill(child, libc::SIGSTOP);
    sys::waitpid(child, libc::WUNTRACED).expect("the stop");
    sys::kill(child, libc::SIGSTOP);
    gate.ready();
    gate::until_state(child, 'T');
    sys::kill(child, libc::SIGCONT);
    join(child);
}

/// The same for a thread.
fn stop_pending_at_thread(gate: &Gate) {
    let child = fork(|| {
        let thread = std::thread::spawn({
            let gate = gate.clone_for_thread();
            move || gate.wait()
        });
        gate.wait();
        thread.join().expect("thread");
    });
    let thread = loop {
        let tasks = std::fs::read_dir(format!("/proc/{child}/task")).expect("threads").flatten();
        let mut tids = tasks.filter_map(|t| t.file_name().to_str()?.parse::<i32>().ok());
        if let Some(tid) = tids.find(|tid| *tid != child) {
            break tid;
        }
        sys::nap(Duration::from_millis(1));
    };
    sys::kill(child, libc::SIGSTOP);
    sys::waitpid(child, libc::WUNTRACED).expect("the stop");
    sys::tgkill(child, thread, libc::SIGSTOP);
    gate.ready();
    gate::until_state(child, 'T');
    sys::kill(child, libc::SIGCONT);
    join(child);
}

fn pending_shared(gate: &Gate) {
    let mask = block(&[libc::SIGUSR1, libc::SIGHUP, 40, 63]);
    let sent = [
        Info::queued(libc::SIGHUP, 0x1111_2222_3333_4444),
        Info::queued(libc::SIGUSR1, 2),
        Info::queued(40, 3),
        Info::queued(63, u64::MAX),
    ];
    for info in &sent {
        info.send(getpid());
    }
    gate.ready();
    take_all(mask, &sent);
}

fn pending_private(gate: &Gate) {
    let mask = block(&[libc::SIGUSR1, libc::SIGHUP, 40]);
    let sent = [Info::queued(libc::SIGHUP, 5), Info::queued(libc::SIGUSR1, 6), Info::queued(40, 7)];
    for info in &sent {
        info.send_to_thread(getpid(), gettid());
    }
    gate.ready();
    take_all(mask, &sent);
}

/// The same signal in each thread's own queue, and none leaks into another's.
fn pending_of_threads(gate: &Gate) {
    let mask = block(&[libc::SIGUSR1, 45]);
    let threads: Vec<_> = (0..4_u64)
        .map(|n| {
            let control = gate.clone_for_thread();
            let name = ["p0", "p1", "p2", "p3"][n as usize];
            std::thread::spawn(move || {
                let sent =
                    [Info::queued(libc::SIGUSR1, n), Info::queued(45, 100 + n), Info::queued(45, 200 + n)];
                for info in &sent {
                    info.send_to_thread(getpid(), gettid());
                }
                control.mark(name);
                control.wait();
                take_all(mask, &sent);
            })
        })
        .collect();
    for name in ["p0", "p1", "p2", "p3"] {
        gate.await_mark(name);
    }
    gate.ready();
    for thread in threads {
        thread.join().expect("thread");
    }
    assert_eq!(Info::take(mask), None, "nothing is pending at the leader");
}

/// 200 real-time signals of one number, and others in between.
fn pending_in_order(gate: &Gate) {
    let mask = block(&[50, 51]);
    let first: Vec<Info> = (0..200).map(|n| Info::queued(50, n * n)).collect();
    let second: Vec<Info> = (0..10).map(|n| Info::queued(51, n)).collect();
    for (n, info) in first.iter().enumerate() {
        info.send(getpid());
        if n < second.len() {
            second[n].send(getpid());
        }
    }
    gate.ready();
    take_all(mask, &[first, second].concat());
}

/// Codes and contents that only a kernel or rt_sigqueueinfo to oneself can make.
fn pending_any_siginfo(gate: &Gate) {
    let mask = block(&[libc::SIGSEGV, libc::SIGCHLD, 52, 53]);
    let full = |signo, code, seed| Info {
        signo,
        errno: 17,
        code,
        pad: 0,
        pid: 0x1234,
        uid: 0x5678,
        value: sys::pattern(seed, 1),
        rest: [0; 12],
    };
    let mut wide = full(52, -60, 3);
    // The kernel keeps 48 bytes.
    for (n, word) in wide.rest.iter_mut().take(2).enumerate() {
        *word = sys::pattern(9, n);
    }
    let sent = [full(libc::SIGSEGV, -6, 1), full(libc::SIGCHLD, -2, 2), wide, full(53, -5, 4)];
    for info in &sent {
        info.send_to_thread(getpid(), gettid());
    }
    gate.ready();
    take_all(mask, &sent);
}

static HANDLED: AtomicU64 = AtomicU64::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// A stopped task keeps signals for the time when it goes on.
fn pending_at_stopped(gate: &Gate) {
    let child = fork(|| {
        sys::handle(libc::SIGUSR1, count, 0);
        gate.mark("handler");
        gate.wait();
        let start = Instant::now();
        while HANDLED.load(Ordering::SeqCst) == 0 {
            assert!(start.elapsed() < crate::gate::PATIENCE, "the pending signal never came");
            sys::nap(Duration::from_millis(1));
        }
        assert_eq!(HANDLED.load(Ordering::SeqCst), 1);
    });
    gate.await_mark("handler");
    sys::kill(child, libc::SIGSTOP);
    gate::until_state(child, 'T');
    sys::kill(child, libc::SIGUSR1);
    gate.ready();
    assert_eq!(sys::stat_field(child, 3), "T");
    sys::kill(child, libc::SIGCONT);
    join(child);
}

static GATE: AtomicU64 = AtomicU64::new(0);

fn gate_in_handler() -> &'static Gate {
    Gate::at(GATE.load(Ordering::SeqCst) as usize)
}

extern "C" fn gate_handler(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let info: Info = sys::peek(info as usize);
    VALUE.store(info.value, Ordering::SeqCst);
    gate_in_handler().ready();
    HANDLED.store(sys::current_mask(), Ordering::SeqCst);
}

/// Dumped inside a handler: its mask holds there, and the old one comes back after it.
fn mask_in_handler(gate: &Gate) {
    GATE.store(gate.address() as u64, Ordering::SeqCst);
    let before = block(&[libc::SIGALRM]);
    assert_eq!(sys::current_mask(), before);
    sys::handle(libc::SIGUSR1, gate_handler, 0);
    Info::queued(libc::SIGUSR1, 0x77).send_to_thread(getpid(), gettid());
    assert_eq!(HANDLED.load(Ordering::SeqCst), before | sys::mask_of(&[libc::SIGUSR1]));
    assert_eq!(VALUE.load(Ordering::SeqCst), 0x77);
    assert_eq!(sys::current_mask(), before, "mask after the handler");
}

fn set_stack(memory: sys::Mapped, flags: i32) -> libc::stack_t {
    let stack = libc::stack_t { ss_sp: memory.addr as *mut _, ss_flags: flags, ss_size: memory.len };
    sys!(SYS_sigaltstack, &raw const stack, 0).expect("sigaltstack");
    stack
}

fn stack() -> (usize, usize, i32) {
    let mut stack: libc::stack_t = sys::zeroed();
    sys!(SYS_sigaltstack, 0, &raw mut stack).expect("sigaltstack");
    (stack.ss_sp as usize, stack.ss_size, stack.ss_flags)
}

fn alternate_stack(gate: &Gate) {
    let memory = sys::anon(64 << 10);
    set_stack(memory, 0);
    gate.ready();
    assert_eq!(stack(), (memory.addr, memory.len, 0));
    sys::handle(libc::SIGUSR1, note_stack, libc::SA_ONSTACK);
    sys::tgkill(getpid(), gettid(), libc::SIGUSR1);
    let at = VALUE.load(Ordering::SeqCst) as usize;
    assert!((memory.addr..memory.addr + memory.len).contains(&at), "handler ran at {at:#x}");
    set_stack(memory, libc::SS_DISABLE);
}

extern "C" fn note_stack(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let here = 0_u8;
    VALUE.store((&raw const here).expose_provenance() as u64, Ordering::SeqCst);
}

extern "C" fn wait_on_stack(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    gate_in_handler().ready();
    note_stack(signal, info, context);
    HANDLED.store(stack().2.cast_unsigned().into(), Ordering::SeqCst);
}

/// Dumped while a handler runs on the alternate stack.
fn on_alternate_stack(gate: &Gate) {
    GATE.store(gate.address() as u64, Ordering::SeqCst);
    let memory = sys::anon(256 << 10);
    set_stack(memory, 0);
    sys::handle(libc::SIGUSR1, wait_on_stack, libc::SA_ONSTACK);
    sys::tgkill(getpid(), gettid(), libc::SIGUSR1);
    let at = VALUE.load(Ordering::SeqCst) as usize;
    assert!((memory.addr..memory.addr + memory.len).contains(&at), "handler ran at {at:#x}");
    assert_eq!(HANDLED.load(Ordering::SeqCst), libc::SS_ONSTACK as u64);
    assert_eq!(stack(), (memory.addr, memory.len, 0));
    set_stack(memory, libc::SS_DISABLE);
}

fn autodisarm_stack(gate: &Gate) {
    const SS_AUTODISARM: i32 = 1 << 31;
    let memory = sys::anon(64 << 10);
    set_stack(memory, SS_AUTODISARM);
    gate.ready();
    assert_eq!(stack(), (memory.addr, memory.len, SS_AUTODISARM));
    set_stack(memory, libc::SS_DISABLE);
}

fn ignored(gate: &Gate) {
    const SIG_IGN: u64 = 1;
    for signal in [libc::SIGTERM, libc::SIGINT, 44] {
        set_action(signal, &[SIG_IGN, SA_RESTORER, 0x1000, 0]);
    }
    gate.ready();
    for signal in [libc::SIGTERM, libc::SIGINT, 44] {
        assert_eq!(action(signal)[0], SIG_IGN);
        sys::kill(getpid(), signal);
    }
}

/// With SIGCHLD ignored, dead children vanish: before the dump and after the restore.
fn ignored_sigchld(gate: &Gate) {
    set_action(libc::SIGCHLD, &[1, SA_RESTORER, 0x1000, 0]);
    let child = fork(|| gate.wait());
    gate.ready();
    assert_eq!(sys::waitpid(child, 0), Err(libc::ECHILD), "the child left no zombie");
}

fn no_child_wait(gate: &Gate) {
    sys::handle(libc::SIGCHLD, count, libc::SA_NOCLDWAIT | libc::SA_RESTART);
    let child = fork(|| gate.wait());
    gate.ready();
    assert_eq!(sys::waitpid(child, 0), Err(libc::ECHILD), "the child left no zombie");
    assert_eq!(HANDLED.load(Ordering::SeqCst), 1);
}

extern "C" fn child_died(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let info: [i32; 7] = sys::peek(info as usize);
    // signo, errno, code, pad, pid, uid, status
    VALUE.store((info[4] as u64) << 32 | (info[2] as u64) << 16 | info[6] as u64, Ordering::SeqCst);
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// Children that die after the restore are told, once each; the restore itself tells nothing.
fn sigchld_handler(gate: &Gate) {
    sys::handle(libc::SIGCHLD, child_died, libc::SA_RESTART);
    let child = sys::fork(|| {
        gate.await_mark("die");
        23
    });
    gate.ready();
    assert_eq!(HANDLED.load(Ordering::SeqCst), 0, "no child has died yet");
    gate.mark("die");
    while HANDLED.load(Ordering::SeqCst) == 0 {
        sys::nap(Duration::from_micros(300));
    }
    let want = (child as u64) << 32 | (libc::CLD_EXITED as u64) << 16 | 23;
    assert_eq!(VALUE.load(Ordering::SeqCst), want);
    assert_eq!(sys::waitpid(child, 0), Ok((child, 23 << 8)));
}

/// The stop was by SIGTSTP and the parent has not looked yet: it still can.
fn stopped_by_sigtstp(gate: &Gate) {
    let child = fork(|| {
        // Orphaned groups are not stopped by SIGTSTP; this one has its parent in the session.
        sys!(SYS_setpgid, 0, 0).expect("setpgid");
        gate.mark("own group");
        gate.wait();
    });
    gate.await_mark("own group");
    sys::kill(child, libc::SIGTSTP);
    gate::until_state(child, 'T');
    gate.ready();
    let status = libc::SIGTSTP << 8 | 0x7f;
    assert_eq!(sys::waitpid(child, libc::WUNTRACED | libc::WNOHANG), Ok((child, status)));
    sys::kill(child, libc::SIGCONT);
    join(child);
}

/// How many the harness sends per dump.
const MANY: u64 = 300;

/// What the harness sends while the dump is under way comes in full, or, if the dump killed the
/// target in between, up to some signal without a gap.
fn sent_while_frozen(gate: &Gate) {
    let mask = block(&[40]);
    gate.ready();
    let taken: Vec<Info> = std::iter::from_fn(|| Info::take(mask)).collect();
    let mut next = 0;
    for (n, info) in taken.iter().enumerate() {
        // A second dump has its own numbers.
        let again = info.value == 0;
        assert!(info.value == next || again, "signal {n} of {}: {}", taken.len(), info.value);
        next = info.value + 1;
    }
    if gate.is_original() {
        assert_eq!(next, MANY, "a dump that lets the target live loses none");
    }
}

fn send_many(site: &Site<'_>) {
    for value in 0..MANY {
        let info = Info::queued(40, value);
        let sent = sys!(SYS_rt_sigqueueinfo, site.root, 40, &raw const info);
        if sent.is_err() {
            return;
        }
        sys::nap(Duration::from_micros(200));
    }
}

fn mask_full(gate: &Gate) {
    let all = !sys::mask_of(&UNBLOCKABLE);
    sys::sigprocmask(libc::SIG_SETMASK, u64::MAX);
    assert_eq!(sys::current_mask(), all);
    gate.ready();
    assert_eq!(sys::current_mask(), all);
}
