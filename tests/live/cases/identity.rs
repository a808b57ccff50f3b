//! Who a task is and what it may do: credentials, limits, scheduling, names, places, settings.

use std::fs;

use crate::case::Case;
use crate::gate::{self, Gate, fork, join};
use crate::sys::{self, deny, getpid, install};

pub const CASES: &[Case] = &[
    Case::new("user_and_groups", user_and_groups).peer_fails("limits of another user's task"),
    Case::new("mixed_ids", mixed_ids).peer_fails("limits of another user's task"),
    Case::new("mixed_ids_of_root", mixed_ids_of_root).peer_fails("limits of a task with other ids"),
    Case::new("many_groups", many_groups),
    Case::new("no_groups", no_groups),
    Case::new("capabilities", capabilities),
    Case::new("ambient_capabilities", ambient_capabilities),
    Case::new("bounding_set", bounding_set),
    Case::new("securebits", securebits),
    Case::new("no_new_privs", no_new_privs),
    Case::new("threads_own_credentials", threads_own_credentials)
        .disturbed()
        .peer_fails("threads with credentials of their own"),
    Case::new("child_of_other_user", child_of_other_user).peer_fails("limits of another user's task"),
    Case::new("seccomp_strict", seccomp_strict),
    Case::new("seccomp_filter", seccomp_filter),
    Case::new("seccomp_two_filters", seccomp_two_filters),
    Case::new("seccomp_tsync", seccomp_tsync),
    Case::new("seccomp_per_thread", seccomp_per_thread).disturbed(),
    Case::new("seccomp_in_child", seccomp_in_child),
    Case::new("seccomp_log_flag", seccomp_log_flag),
    Case::new("limits", limits),
    Case::new("nice", nice),
    Case::new("nice_of_threads", nice_of_threads),
    Case::new("sched_fifo", sched_fifo),
    Case::new("sched_rr_of_thread", sched_rr_of_thread),
    Case::new("sched_batch", sched_batch),
    Case::new("sched_idle", sched_idle),
    Case::new("name_odd_bytes", name_odd_bytes),
    Case::new("name_empty", name_empty),
    Case::new("directory", directory),
    Case::new("directory_of_child", directory_of_child),
    Case::new("directory_deleted", directory_deleted),
    Case::new("changed_root", changed_root),
    Case::new("umask", umask),
    Case::new("oom_score", oom_score),
    Case::new("personality", personality).peer_fails("refuses personality bits"),
    Case::new("not_dumpable", not_dumpable),
    Case::new("death_signal", death_signal),
    Case::new("death_signal_of_root", death_signal_of_root)
        .disturbed()
        .peer_fails("criu makes the root itself, and its own end is the signal's cause"),
    Case::new("no_huge_pages", no_huge_pages),
    Case::new("membarrier", membarrier),
    Case::new("keep_capabilities", keep_capabilities),
    Case::new("child_dies_with_parent", child_dies_with_parent),
];

fn set_groups(groups: &[u32]) {
    sys!(SYS_setgroups, groups.len(), groups.as_ptr()).expect("setgroups");
}

fn set_gids(real: u32, effective: u32, saved: u32) {
    sys!(SYS_setresgid, real, effective, saved).expect("setresgid");
}

fn set_uids(real: u32, effective: u32, saved: u32) {
    sys!(SYS_setresuid, real, effective, saved).expect("setresuid");
}

/// Real, effective, saved uid and gid of this thread.
fn ids() -> ([u32; 3], [u32; 3]) {
    let (mut uids, mut gids) = ([0_u32; 3], [0_u32; 3]);
    let [a, b, c] = uids.each_mut().map(std::ptr::from_mut);
    sys!(SYS_getresuid, a, b, c).expect("getresuid");
    let [a, b, c] = gids.each_mut().map(std::ptr::from_mut);
    sys!(SYS_getresgid, a, b, c).expect("getresgid");
    (uids, gids)
}

fn groups() -> Vec<u32> {
    let mut list = vec![0_u32; 70_000];
    let got = sys!(SYS_getgroups, list.len(), list.as_mut_ptr()).expect("getgroups");
    list.truncate(got);
    list
}

fn user_and_groups(gate: &Gate) {
    set_groups(&[5, 60, 700]);
    set_gids(1234, 1234, 1234);
    set_uids(4321, 4321, 4321);
    gate.ready();
    assert_eq!(ids(), ([4321; 3], [1234; 3]));
    assert_eq!(groups(), [5, 60, 700]);
    assert_eq!(sys!(SYS_setuid, 0), Err(libc::EPERM));
}

fn mixed_ids(gate: &Gate) {
    set_gids(10, 20, 30);
    sys!(SYS_setfsgid, 40).expect("setfsgid");
    set_uids(100, 200, 300);
    gate.ready();
    assert_eq!(ids(), ([100, 200, 300], [10, 20, 30]));
    assert_eq!(sys!(SYS_setresuid, 300, 300, 300), Ok(0), "the saved one can be taken");
}

/// A set-uid program that has dropped its privileges for the time being.
fn mixed_ids_of_root(gate: &Gate) {
    set_gids(10, 20, 0);
    set_uids(100, 200, 0);
    gate.ready();
    assert_eq!(ids(), ([100, 200, 0], [10, 20, 0]));
    assert_eq!(sys!(SYS_setresuid, -1_i32, 0, -1_i32), Ok(0), "back to root");
}

fn many_groups(gate: &Gate) {
    let all: Vec<u32> = (0..500).map(|n| n * 7 + 3).collect();
    set_groups(&all);
    gate.ready();
    assert_eq!(groups(), all);
}

fn no_groups(gate: &Gate) {
    set_groups(&[]);
    gate.ready();
    assert_eq!(groups(), [0_u32; 0]);
}

const CAP_HEADER: [u32; 2] = [0x2008_0522, 0];

/// Effective, permitted, inheritable: low and high words in turn.
fn capset(effective: u64, permitted: u64, inheritable: u64) {
    let low = |bits: u64| bits as u32;
    let high = |bits: u64| (bits >> 32) as u32;
    let data = [
        [low(effective), low(permitted), low(inheritable)],
        [high(effective), high(permitted), high(inheritable)],
    ];
    sys!(SYS_capset, CAP_HEADER.as_ptr(), data.as_ptr()).expect("capset");
}

fn capget() -> [u64; 3] {
    let mut data = [[0_u32; 3]; 2];
    sys!(SYS_capget, CAP_HEADER.as_ptr(), data.as_mut_ptr()).expect("capget");
    [0, 1, 2].map(|n| u64::from(data[0][n]) | u64::from(data[1][n]) << 32)
}

const CHOWN: u64 = 1 << 0;
const KILL: u64 = 1 << 5;
const SETPCAP: u64 = 1 << 8;
const NET_BIND: u64 = 1 << 10;

fn capabilities(gate: &Gate) {
    capset(CHOWN, CHOWN | KILL | NET_BIND, NET_BIND);
    gate.ready();
    assert_eq!(capget(), [CHOWN, CHOWN | KILL | NET_BIND, NET_BIND]);
}

fn ambient_capabilities(gate: &Gate) {
    const PR_CAP_AMBIENT: i32 = 47;
    let [_, permitted, _] = capget();
    capset(permitted, permitted, NET_BIND | KILL);
    sys!(SYS_prctl, PR_CAP_AMBIENT, 2, 10, 0, 0).expect("PR_CAP_AMBIENT_RAISE");
    gate.ready();
    assert_eq!(sys!(SYS_prctl, PR_CAP_AMBIENT, 1, 10, 0, 0), Ok(1));
    assert_eq!(sys!(SYS_prctl, PR_CAP_AMBIENT, 1, 5, 0, 0), Ok(0));
}

fn bounding_set(gate: &Gate) {
    for capability in [13, 25, 37] {
        sys::prctl(libc::PR_CAPBSET_DROP, capability, 0).expect("PR_CAPBSET_DROP");
    }
    gate.ready();
    for capability in 0..38 {
        let want = i32::from(![13, 25, 37].contains(&capability));
        let got = sys::prctl(libc::PR_CAPBSET_READ, capability, 0);
        // Some were missing from the start.
        assert!(got == Ok(want) || got == Ok(0), "capability {capability}: {got:?}");
    }
}

fn securebits(gate: &Gate) {
    // NOROOT, NO_SETUID_FIXUP locked, NO_CAP_AMBIENT_RAISE.
    let bits = 1 | 1 << 2 | 1 << 3 | 1 << 6;
    if sys::prctl(libc::PR_SET_SECUREBITS, bits, 0).is_err() {
        gate.skip("securebits cannot be set");
    }
    gate.ready();
    assert_eq!(sys::prctl(libc::PR_GET_SECUREBITS, 0, 0), Ok(bits as i32));
    capset(SETPCAP, SETPCAP, 0);
    let cleared = sys::prctl(libc::PR_SET_SECUREBITS, 0, 0);
    assert_eq!(cleared, Err(libc::EPERM), "one is locked");
}

fn no_new_privs(gate: &Gate) {
    sys!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).expect("PR_SET_NO_NEW_PRIVS");
    gate.ready();
    assert_eq!(sys::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0), Ok(1));
}

/// The raw calls change one thread alone, unlike the C library's.
fn threads_own_credentials(gate: &Gate) {
    let threads: Vec<_> = (1..4_u32)
        .map(|n| {
            let control = gate.clone_for_thread();
            std::thread::spawn(move || {
                set_groups(&[n, n * 10]);
                set_gids(n * 100, n * 100, 0);
                set_uids(n * 1000, 0, 0);
                capset(CHOWN << n, CHOWN << n | KILL, 0);
                control.mark(["c0", "c1", "c2", "c3"][n as usize]);
                control.wait();
                assert_eq!(ids(), ([n * 1000, 0, 0], [n * 100, n * 100, 0]));
                assert_eq!(groups(), [n, n * 10]);
                assert_eq!(capget(), [CHOWN << n, CHOWN << n | KILL, 0]);
            })
        })
        .collect();
    for name in ["c1", "c2", "c3"] {
        gate.await_mark(name);
    }
    gate.ready();
    for thread in threads {
        thread.join().expect("thread");
    }
    assert_eq!(ids(), ([0; 3], [0; 3]));
}

fn child_of_other_user(gate: &Gate) {
    let child = fork(|| {
        set_groups(&[77]);
        set_gids(77, 77, 77);
        set_uids(77, 77, 77);
        gate.mark("child");
        gate.wait();
        assert_eq!(ids(), ([77; 3], [77; 3]));
        assert_eq!(capget()[0], 0);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
    assert_eq!(ids(), ([0; 3], [0; 3]));
}

/// Strict mode allows read, write, exit and sigreturn: a child waits in a read.
fn seccomp_strict(gate: &Gate) {
    let (from, to) = sys::pipe(0);
    let (answer, to_answer) = sys::pipe(0);
    let child = sys::fork(|| {
        let _ = sys!(SYS_prctl, libc::PR_SET_SECCOMP, 1, 0, 0, 0);
        let mut byte = [0_u8; 1];
        let _ = sys!(SYS_read, from, byte.as_mut_ptr(), 1);
        let _ = sys!(SYS_write, to_answer, byte.as_ptr(), 1);
        let _ = sys!(SYS_exit, 0);
        // Not reached: this would be killed.
        1
    });
    gate::until_in_call(child, child, libc::SYS_read);
    gate.ready();
    let status = fs::read_to_string(format!("/proc/{child}/status")).expect("status");
    assert!(status.contains("\nSeccomp:\t1\n"), "{status}");
    sys::write(to, b"!").expect("write");
    assert_eq!(sys::read(answer, 1), Ok(b"!".to_vec()));
    join(child);
}

fn seccomp_filter(gate: &Gate) {
    install(&deny(libc::SYS_getppid, 55), 0).expect("seccomp");
    gate.ready();
    assert_eq!(sys!(SYS_getppid), Err(55));
    assert!(sys!(SYS_getpid).is_ok());
}

/// The later filter is asked first; of two errnos the first one found wins.
fn seccomp_two_filters(gate: &Gate) {
    install(&deny(libc::SYS_getppid, 51), 0).expect("seccomp");
    install(&deny(libc::SYS_getpgrp, 52), 0).expect("seccomp");
    install(&deny(libc::SYS_getppid, 53), 0).expect("seccomp");
    gate.ready();
    assert_eq!(sys!(SYS_getpgrp), Err(52));
    assert_eq!(sys!(SYS_getppid), Err(53), "the latest of equals");
}

fn seccomp_tsync(gate: &Gate) {
    const TSYNC: usize = 1;
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        control.await_mark("filtered");
        control.mark("thread");
        control.wait();
        assert_eq!(sys!(SYS_getppid), Err(54));
    });
    install(&deny(libc::SYS_getppid, 54), TSYNC).expect("seccomp");
    gate.mark("filtered");
    gate.await_mark("thread");
    gate.ready();
    assert_eq!(sys!(SYS_getppid), Err(54));
    thread.join().expect("thread");
}

/// Each thread has a filter of its own, the leader none.
fn seccomp_per_thread(gate: &Gate) {
    let threads: Vec<_> = (0..3)
        .map(|n| {
            let control = gate.clone_for_thread();
            std::thread::spawn(move || {
                install(&deny(libc::SYS_getppid, 60 + n), 0).expect("seccomp");
                control.mark(["f0", "f1", "f2"][n as usize]);
                control.wait();
                assert_eq!(sys!(SYS_getppid), Err(60 + n));
            })
        })
        .collect();
    for name in ["f0", "f1", "f2"] {
        gate.await_mark(name);
    }
    gate.ready();
    assert!(sys!(SYS_getppid).is_ok());
    for thread in threads {
        thread.join().expect("thread");
    }
}

/// A child inherits a filter and adds one; a filter may forbid what a restorer likes to call.
fn seccomp_in_child(gate: &Gate) {
    install(&deny(libc::SYS_prctl, 56), 0).expect("seccomp");
    let child = fork(|| {
        let program = deny(libc::SYS_mmap, 57);
        let program = (program.len(), program.as_ptr());
        sys!(SYS_seccomp, 1, 0, &raw const program).expect("seccomp");
        gate.mark("child");
        gate.wait();
        assert_eq!(sys!(SYS_prctl, libc::PR_GET_DUMPABLE), Err(56));
        assert_eq!(sys!(SYS_mmap, 0, 4096, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1_i32, 0), Err(57));
    });
    gate.await_mark("child");
    gate.ready();
    assert_eq!(sys!(SYS_prctl, libc::PR_GET_DUMPABLE), Err(56));
    join(child);
}

fn seccomp_log_flag(gate: &Gate) {
    const LOG: usize = 2;
    install(&deny(libc::SYS_getppid, 58), LOG).expect("seccomp");
    gate.ready();
    assert_eq!(sys!(SYS_getppid), Err(58));
}

/// The harness compares /proc/PID/limits; here is what getrlimit says.
fn limits(gate: &Gate) {
    let mut all = Vec::new();
    for which in 0..16_u32 {
        let mut now = [0_u64; 2];
        sys!(SYS_prlimit64, 0, which, 0, now.as_mut_ptr()).expect("prlimit");
        // Not the stack, the address space, nor what would stop us now.
        let lower = [now[1].min(1 << 30).saturating_sub(1), now[1].min(1 << 40)];
        let untouched =
            [libc::RLIMIT_STACK, libc::RLIMIT_AS, libc::RLIMIT_DATA, libc::RLIMIT_CPU, libc::RLIMIT_RTTIME];
        if !untouched.contains(&which) && now[1] > 100 {
            let _ = sys!(SYS_prlimit64, 0, which, lower.as_ptr(), 0);
        }
        sys!(SYS_prlimit64, 0, which, 0, now.as_mut_ptr()).expect("prlimit");
        all.push(now);
    }
    gate.ready();
    for (which, before) in all.into_iter().enumerate() {
        let mut now = [0_u64; 2];
        sys!(SYS_prlimit64, 0, which, 0, now.as_mut_ptr()).expect("prlimit");
        assert_eq!(now, before, "limit {which}");
    }
}

fn priority(tid: i32) -> i32 {
    // The call gives 20 - nice.
    20 - sys::int(sys!(SYS_getpriority, libc::PRIO_PROCESS, tid).expect("getpriority"))
}

fn nice(gate: &Gate) {
    sys!(SYS_setpriority, libc::PRIO_PROCESS, 0, 7).expect("setpriority");
    let child = fork(|| {
        sys!(SYS_setpriority, libc::PRIO_PROCESS, 0, 19).expect("setpriority");
        gate.mark("child");
        gate.wait();
        assert_eq!(priority(0), 19);
    });
    gate.await_mark("child");
    gate.ready();
    assert_eq!(priority(0), 7);
    join(child);
}

fn nice_of_threads(gate: &Gate) {
    // Whatever the tests were started with.
    let own = priority(0);
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        sys!(SYS_setpriority, libc::PRIO_PROCESS, 0, 11).expect("setpriority");
        control.mark("thread");
        control.wait();
        assert_eq!(priority(0), 11);
    });
    gate.await_mark("thread");
    gate.ready();
    assert_eq!(priority(0), own);
    thread.join().expect("thread");
}

fn set_policy(gate: &Gate, policy: i32, level: i32) {
    if let Err(errno) = sys!(SYS_sched_setscheduler, 0, policy, &raw const level) {
        gate.skip(&format!("scheduling policy {policy} is not allowed: errno {errno}"));
    }
}

fn policy() -> (i32, i32) {
    let mut level = -1_i32;
    sys!(SYS_sched_getparam, 0, &raw mut level).expect("sched_getparam");
    (sys::int(sys!(SYS_sched_getscheduler, 0).expect("sched_getscheduler")), level)
}

fn sched_fifo(gate: &Gate) {
    set_policy(gate, libc::SCHED_FIFO, 3);
    gate.ready();
    assert_eq!(policy(), (libc::SCHED_FIFO, 3));
}

fn sched_rr_of_thread(gate: &Gate) {
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        set_policy(&control, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 5);
        control.mark("thread");
        control.wait();
        assert_eq!(policy(), (libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 5));
    });
    gate.await_mark("thread");
    gate.ready();
    assert_eq!(policy(), (libc::SCHED_OTHER, 0));
    thread.join().expect("thread");
}

fn sched_batch(gate: &Gate) {
    set_policy(gate, libc::SCHED_BATCH, 0);
    sys!(SYS_setpriority, libc::PRIO_PROCESS, 0, 3).expect("setpriority");
    gate.ready();
    assert_eq!((policy(), priority(0)), ((libc::SCHED_BATCH, 0), 3));
}

fn sched_idle(gate: &Gate) {
    set_policy(gate, libc::SCHED_IDLE, 0);
    gate.ready();
    assert_eq!(policy(), (libc::SCHED_IDLE, 0));
}

fn named(gate: &Gate, name: &[u8]) {
    let mut bytes = [0_u8; 16];
    bytes[..name.len()].copy_from_slice(name);
    sys::prctl(libc::PR_SET_NAME, bytes.as_ptr() as usize, 0).expect("PR_SET_NAME");
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        let other = *b"other\n(thread) \0";
        sys::prctl(libc::PR_SET_NAME, other.as_ptr() as usize, 0).expect("PR_SET_NAME");
        control.mark("thread");
        control.wait();
        let mut found = [0_u8; 16];
        sys::prctl(libc::PR_GET_NAME, found.as_mut_ptr() as usize, 0).expect("PR_GET_NAME");
        assert_eq!(found, other);
    });
    gate.await_mark("thread");
    gate.ready();
    let mut found = [0_u8; 16];
    sys::prctl(libc::PR_GET_NAME, found.as_mut_ptr() as usize, 0).expect("PR_GET_NAME");
    assert_eq!(found, bytes);
    thread.join().expect("thread");
}

fn name_odd_bytes(gate: &Gate) {
    named(gate, b") R 1 \n\xff\\a(b)");
}

fn name_empty(gate: &Gate) {
    named(gate, b"");
}

fn directory(gate: &Gate) {
    fs::create_dir("some where").expect("mkdir");
    std::env::set_current_dir("some where").expect("chdir");
    gate.ready();
    fs::write("here", b"x").expect("write");
    assert!(std::env::current_dir().expect("cwd").ends_with("some where"));
    std::env::set_current_dir("..").expect("chdir");
    assert!(fs::exists("some where/here").expect("stat"));
}

fn directory_of_child(gate: &Gate) {
    let child = fork(|| {
        std::env::set_current_dir("/usr").expect("chdir");
        gate.mark("child");
        gate.wait();
        assert_eq!(std::env::current_dir().expect("cwd").to_str(), Some("/usr"));
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}

fn directory_deleted(gate: &Gate) {
    fs::create_dir("gone").expect("mkdir");
    std::env::set_current_dir("gone").expect("chdir");
    fs::remove_dir("../gone").expect("rmdir");
    gate.ready();
    assert!(std::env::current_dir().is_err(), "there is no way to it");
    let link = fs::read_link("/proc/self/cwd").expect("readlink");
    assert!(link.to_string_lossy().ends_with(" (deleted)"), "{link:?}");
    assert!(fs::write("new", b"").is_err(), "nothing can be made in it");
}

/// A child in a chroot.
fn changed_root(gate: &Gate) {
    fs::create_dir_all("jail/inside").expect("mkdir");
    fs::write("jail/inside/file", b"in jail").expect("write");
    let jail = std::env::current_dir().expect("cwd").join("jail");
    let child = sys::fork(|| {
        if std::os::unix::fs::chroot("jail").is_err() || std::env::set_current_dir("/inside").is_err() {
            return 2;
        }
        let file = sys::open(c"file", libc::O_RDONLY).expect("open");
        // The marks are out of reach; the parent's signal lets us go.
        sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[libc::SIGUSR1]));
        let set = sys::mask_of(&[libc::SIGUSR1]);
        while sys!(SYS_rt_sigtimedwait, &raw const set, 0, 0, 8).is_err() {}
        let same = fs::read("/inside/file").is_ok_and(|text| text == b"in jail");
        let cwd = std::env::current_dir().is_ok_and(|d| d.to_str() == Some("/inside"));
        let open = sys::read(file, 20) == Ok(b"in jail".to_vec());
        i32::from(!(same && cwd && open))
    });
    sys::sigprocmask(libc::SIG_BLOCK, sys::mask_of(&[libc::SIGCHLD]));
    gate::until_in_call(child, child, libc::SYS_rt_sigtimedwait);
    gate.ready();
    assert_eq!(fs::read_link(format!("/proc/{child}/root")).expect("readlink"), jail);
    sys::kill(child, libc::SIGUSR1);
    join(child);
}

fn umask(gate: &Gate) {
    sys!(SYS_umask, 0o137).expect("umask");
    let child = fork(|| {
        sys!(SYS_umask, 0).expect("umask");
        gate.mark("child");
        gate.wait();
        assert_eq!(sys!(SYS_umask, 0o22), Ok(0));
    });
    gate.await_mark("child");
    gate.ready();
    assert_eq!(sys!(SYS_umask, 0o22), Ok(0o137));
    join(child);
}

fn oom_score(gate: &Gate) {
    fs::write("/proc/self/oom_score_adj", "321").expect("write oom_score_adj");
    gate.ready();
    assert_eq!(fs::read_to_string("/proc/self/oom_score_adj").expect("read"), "321\n");
}

fn personality(gate: &Gate) {
    const ADDR_NO_RANDOMIZE: usize = 0x004_0000;
    sys!(SYS_personality, ADDR_NO_RANDOMIZE).expect("personality");
    gate.ready();
    assert_eq!(sys!(SYS_personality, u32::MAX), Ok(ADDR_NO_RANDOMIZE));
}

fn not_dumpable(gate: &Gate) {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).expect("PR_SET_DUMPABLE");
    gate.ready();
    assert_eq!(sys::prctl(libc::PR_GET_DUMPABLE, 0, 0), Ok(0));
}

fn death_signal(gate: &Gate) {
    let child = fork(|| {
        sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as usize, 0).expect("PR_SET_PDEATHSIG");
        gate.mark("child");
        gate.wait();
        let mut signal = 0_i32;
        sys::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal as usize, 0).expect("PR_GET_PDEATHSIG");
        assert_eq!(signal, libc::SIGTERM);
    });
    gate.await_mark("child");
    gate.ready();
    join(child);
}

/// The root of the tree asked for it, too: it does not come when crtool has made the root and ends.
fn death_signal_of_root(gate: &Gate) {
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as usize, 0).expect("PR_SET_PDEATHSIG");
    let child = fork(|| gate.wait());
    gate.ready();
    let mut signal = 0_i32;
    sys::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal as usize, 0).expect("PR_GET_PDEATHSIG");
    assert_eq!(signal, libc::SIGTERM);
    join(child);
}

/// The parent dies after the restore: the child gets the signal it asked for.
fn child_dies_with_parent(gate: &Gate) {
    sys::become_subreaper();
    let parent = fork(|| {
        fork(|| {
            sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as usize, 0).expect("PR_SET_PDEATHSIG");
            gate.mark("child");
            loop {
                sys::nap(std::time::Duration::from_secs(1));
            }
        });
        gate.await_mark("child");
        gate.mark("parent");
        gate.wait();
    });
    gate.await_mark("parent");
    gate.ready();
    join(parent);
    let (_, status) = sys::waitpid(-1, 0).expect("the orphan");
    assert_eq!(status, libc::SIGKILL);
}

fn no_huge_pages(gate: &Gate) {
    sys::prctl(libc::PR_SET_THP_DISABLE, 1, 0).expect("PR_SET_THP_DISABLE");
    gate.ready();
    assert_eq!(sys::prctl(libc::PR_GET_THP_DISABLE, 0, 0), Ok(1));
}

fn membarrier(gate: &Gate) {
    // REGISTER_PRIVATE_EXPEDITED, REGISTER_GLOBAL_EXPEDITED, REGISTER_PRIVATE_EXPEDITED_SYNC_CORE.
    for command in [16, 4, 64] {
        if sys!(SYS_membarrier, command, 0, 0).is_err() {
            gate.skip("membarrier registrations are not supported");
        }
    }
    gate.ready();
    // PRIVATE_EXPEDITED and its SYNC_CORE form need the registration.
    assert_eq!(sys!(SYS_membarrier, 8, 0, 0), Ok(0));
    assert_eq!(sys!(SYS_membarrier, 32, 0, 0), Ok(0));
    // What was not registered stays so (PRIVATE_EXPEDITED_RSEQ).
    assert_eq!(sys!(SYS_membarrier, 128, 0, 0), Err(libc::EPERM));
}

/// PR_SET_KEEPCAPS is a securebit that execve clears.
fn keep_capabilities(gate: &Gate) {
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).expect("PR_SET_KEEPCAPS");
    gate.ready();
    assert_eq!(sys::prctl(libc::PR_GET_KEEPCAPS, 0, 0), Ok(1));
    assert_eq!(getpid(), sys::gettid());
}
