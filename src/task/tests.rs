//! Live: state is set up in one child, dumped, restored into another one, and dumped there again.

use super::*;
use crate::{
    arch::target::Target,
    sys::ptrace,
    tracee::{Arg, List, Want},
};

/// Dumps a stopped child as a process of one thread.
fn dump(target: &mut Target, seccomp: &mut seccomp::Dump) -> (pb::CoreEntry, Vec<Finding>, ProcessInside) {
    let (pid, regs, xstate) = (target.pid(), target.regs, target.xstate());
    let sigmask = ptrace::get_sigmask(pid).unwrap();
    let mut list = List::new("queries");
    let capabilities = crate::tracee::read_status(pid, pid).unwrap().cap_eff;
    let thread = thread_queries(&mut list, capabilities, None);
    let process = process_queries(&mut list, &posix_timer_ids(pid).unwrap());
    let placed = target.run(&list).unwrap();
    let results = target.area.results(&placed).unwrap();
    let process = process.read(&results).unwrap();
    let inside = thread.read(&results).unwrap();
    let restarting = process.restarting();
    let cx = ThreadCx { pid, tid: pid, regs, xstate, sigmask, restarting, inside };
    let mut findings = Vec::new();
    let parts = dump_thread(&cx, seccomp, &mut findings).unwrap();
    let cx = ProcessCx {
        pid,
        tid: pid,
        threads: 1,
        sigmask,
        stop_signal: None,
        leads_session: false,
        inside: process,
    };
    let tc = dump_process(&cx, &mut findings).unwrap();
    let core = pb::CoreEntry {
        mtype: pb::core_entry::March::X8664 as i32,
        thread_info: Some(Box::new(parts.info)),
        tc: Some(Box::new(tc)),
        ids: None,
        thread_core: Some(Box::new(parts.core)),
    };
    (core, findings, cx.inside)
}

/// A child to restore into: what it has of its own is what a new task inherits, with all signals blocked.
fn puppet() -> Target {
    let mut target = Target::new();
    ptrace::set_sigmask(target.pid(), u64::MAX).unwrap();
    let rseq = ptrace::get_rseq(target.pid()).unwrap();
    let mut list = List::new("unregister");
    let args = [rseq.abi_pointer.into(), rseq.abi_size.into(), 1u64.into(), rseq.signature.into()];
    list.call("rseq", libc::SYS_rseq, &args, Want::Zero);
    target.run(&list).unwrap();
    target
}

struct RoundTrip {
    before: pb::CoreEntry,
    after: pb::CoreEntry,
    inside_before: ProcessInside,
    inside_after: ProcessInside,
    filters: pb::SeccompEntry,
}

/// Runs `setup` in a child and carries its state over to another one. Panics unless both dumps are equal but for
/// registers, which a list cannot set, and times, which pass.
fn carry_with(supervisor: &Supervisor, setup: impl FnOnce(&Target, &mut List)) -> RoundTrip {
    let mut from = Target::new();
    let mut list = List::new("setup");
    setup(&from, &mut list);
    // As long as it runs no signal may come in between.
    ptrace::set_sigmask(from.pid(), u64::MAX).unwrap();
    from.run(&list).unwrap();
    let mut filters = seccomp::Dump::default();
    let (before, findings, inside_before) = dump(&mut from, &mut filters);
    assert!(findings.is_empty(), "{findings:?}");
    let filters = filters.finish();

    let mut to = puppet();
    let mm = pb::MmEntry {
        thp_disabled: Some(inside_before.thp_disable == 1),
        dumpable: i32::try_from(inside_before.dumpable).ok(),
        ..Default::default()
    };
    let mut image = before.clone();
    for timer in &mut image.tc.as_mut().unwrap().timers.as_mut().unwrap().posix {
        // In a real restore the pid is the same one.
        timer.notify_thread_id = timer.notify_thread_id.map(|_| to.pid().get());
    }
    let pid = NsPid::new(to.pid().get());
    let mut seccomp = seccomp::Plan::new(&filters).unwrap();
    seccomp.process(pid, [&image]).unwrap();
    let plan = ThreadPlan { core: &image, pid, tid: pid, seccomp: &seccomp, supervisor };
    let mut list = List::new("restore");
    plan_process_early(&before, supervisor, &mut list).unwrap();
    plan_process(&before, &mm, supervisor, &mut list).unwrap();
    plan_thread(&plan, &mut list).unwrap();
    to.run(&list).unwrap();
    last_calls(&to, &image, mm.dumpable());
    let mut filters_after = seccomp::Dump::default();
    let (after, findings, inside_after) = dump(&mut to, &mut filters_after);
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(filters_after.finish(), filters);
    assert_eq!(timeless(&after), timeless(&before));
    assert_eq!(inside_after.thp_disable, inside_before.thp_disable);
    RoundTrip { before, after, inside_before, inside_after, filters }
}

/// What the supervisor makes a task do at the very end.
fn last_calls(to: &Target, image: &pb::CoreEntry, dumpable: i32) {
    let pid = to.pid().bits().into();
    for (info, shared) in pending_signals(image).unwrap() {
        to.write(to.scratch(), &info);
        let signal = signal_of(&info).into();
        let result = if shared {
            to.call(libc::SYS_rt_sigqueueinfo, &[pid, signal, to.scratch()])
        } else {
            to.call(libc::SYS_rt_tgsigqueueinfo, &[pid, pid, signal, to.scratch()])
        };
        assert_eq!(result, 0);
    }
    let value = dumpable_to_set(dumpable).unwrap();
    assert_eq!(to.call(libc::SYS_prctl, &[u64::from(libc::PR_SET_DUMPABLE.cast_unsigned()), value]), 0);
}

fn carry(setup: impl FnOnce(&Target, &mut List)) -> RoundTrip {
    carry_with(&Supervisor::probe().unwrap(), setup)
}

/// A core without registers and without the time that is left to timers.
fn timeless(core: &pb::CoreEntry) -> pb::CoreEntry {
    let mut core = core.clone();
    let info = core.thread_info.as_mut().unwrap();
    info.gpregs = pb::UserX86RegsEntry::default();
    info.fpregs = pb::UserX86FpregsEntry::default();
    let tc = core.tc.as_mut().unwrap();
    // PF_* of the kernel: whether it forked without exec, used privileges, ...
    tc.flags = 0;
    let timers = tc.timers.as_mut().unwrap();
    for timer in [&mut timers.real, &mut timers.virt, &mut timers.prof] {
        (timer.vsec, timer.vusec) = (u64::from(timer.vsec + timer.vusec > 0), 0);
    }
    for timer in &mut timers.posix {
        (timer.vsec, timer.vnsec) = (u64::from(timer.vsec + timer.vnsec > 0), 0);
        timer.notify_thread_id = timer.notify_thread_id.map(|_| 0);
    }
    core
}

fn call(list: &mut List, name: &'static str, nr: i64, args: &[Arg]) {
    list.call(name, nr, args, Want::Ok);
}

fn prctl(list: &mut List, option: i32, arg2: u64, arg3: u64) {
    call(list, "prctl", libc::SYS_prctl, &[option.into(), arg2.into(), arg3.into()]);
}

fn thread(core: &pb::CoreEntry) -> &pb::ThreadCoreEntry {
    core.thread_core.as_ref().unwrap()
}

fn process(core: &pb::CoreEntry) -> &pb::TaskCoreEntry {
    core.tc.as_ref().unwrap()
}

#[test]
fn nothing_is_odd_about_a_usual_child() {
    let mut target = Target::new();
    let (core, findings, inside) = dump(&mut target, &mut seccomp::Dump::default());
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(inside.dumpable, 1);
    let tc = process(&core);
    assert_eq!((tc.comm.as_slice(), tc.task_state, tc.sigactions.len()), (&b"sleep"[..], TASK_ALIVE, 62));
    let thread = thread(&core);
    assert_eq!(thread.comm.as_deref(), Some(&b"sleep"[..]));
    assert!(thread.rseq_entry.is_some_and(|r| r.rseq_abi_pointer != 0));
    assert_eq!(thread.seccomp_mode, None);
    let info = core.thread_info.as_ref().unwrap();
    assert_ne!(info.clear_tid_addr, 0);
    // clock_nanosleep with a time left ends with EINTR.
    assert_eq!(info.gpregs.ax.cast_signed(), -4);
    let state = final_state(&core).unwrap();
    assert_eq!(state.regs.rsp, target.regs.rsp);
    assert_eq!(state.xstate.len(), target.xstate().len());
    assert_eq!(state.xstate[576..], target.xstate()[576..]);
}

#[test]
fn a_usual_child_comes_back() {
    carry(|_, _| {});
}

#[test]
fn names_and_marks() {
    let trip = carry(|target, list| {
        let name = list.cstr(b"a) b\n\xff");
        call(list, "name", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
        prctl(list, libc::PR_SET_PDEATHSIG, 12, 0);
        prctl(list, libc::PR_SET_CHILD_SUBREAPER, 1, 0);
        prctl(list, 41, 1, 0); // PR_SET_THP_DISABLE
        prctl(list, libc::PR_SET_DUMPABLE, 0, 0);
        call(list, "personality", libc::SYS_personality, &[0x0044_0000u64.into()]);
        call(list, "tid address", libc::SYS_set_tid_address, &[target.scratch().into()]);
        call(list, "robust", libc::SYS_set_robust_list, &[(target.scratch() + 64).into(), 24u64.into()]);
        for command in [4u64, 16] {
            call(list, "membarrier", libc::SYS_membarrier, &[command.into(), 0u64.into()]);
        }
        supervisor::write_proc(list, "oom", "/proc/self/oom_score_adj", "321");
        let stack = list.value(&[target.scratch() - 65536, 1 << 31, 32768u64]);
        call(list, "sigaltstack", libc::SYS_sigaltstack, &[stack.into(), 0u64.into()]);
    });
    assert_eq!(thread(&trip.before).comm.as_deref(), Some(&b"a) b\n\xff"[..]));
    assert_eq!(thread(&trip.before).pdeath_sig, Some(12));
    assert_eq!(process(&trip.before).membarrier_registration_mask, Some(20));
    assert_eq!(process(&trip.before).oom_score_adj, Some(321));
    assert_eq!(process(&trip.before).personality, 0x0044_0000);
    assert_eq!(process(&trip.before).child_subreaper, Some(true));
    assert_eq!((trip.inside_before.dumpable, trip.inside_after.dumpable), (0, 0));
    assert_eq!(trip.inside_after.thp_disable, 1);
}

#[test]
fn handlers() {
    let trip = carry(|_, list| {
        for (signal, action) in [
            (1u64, [1u64, 0, 0, 0]),
            (10, [0x1234_5678, 0x0c00_0004, 0x9876_5432, 0x800]),
            (17, [0, 2, 0, 0]),
            (64, [0x1111, 0x1400_0000, 0x2222, u64::MAX]),
        ] {
            let action = list.value(&action);
            let args = [signal.into(), action.into(), 0u64.into(), 8u64.into()];
            call(list, "rt_sigaction", libc::SYS_rt_sigaction, &args);
        }
    });
    let all = &process(&trip.after).sigactions;
    assert_eq!((all[0].sigaction, all[8].restorer, all[61].sigaction), (1, 0x9876_5432, 0x1111));
    assert_eq!(trip.inside_after.restarting(), 1 << 63);
}

#[test]
fn pending_signals_in_order_with_everything() {
    let trip = carry(|target, list| {
        let pid = NsPid::new(target.pid().get());
        let send = |list: &mut List, private: bool, signal: u32, code: i32, value: u64| {
            let mut info = [0u32; 32];
            info[0] = signal;
            info[2] = code.cast_unsigned();
            info[4] = 4711;
            info[6] = u32::try_from(value).unwrap();
            info[31] = 7;
            let info = list.value(&info);
            if private {
                let args = [pid.into(), pid.into(), signal.into(), info.into()];
                call(list, "private", libc::SYS_rt_tgsigqueueinfo, &args);
            } else {
                call(list, "shared", libc::SYS_rt_sigqueueinfo, &[pid.into(), signal.into(), info.into()]);
            }
        };
        for n in 0..40 {
            send(list, false, 40, libc::SI_QUEUE, n);
            send(list, true, 41, libc::SI_QUEUE, 100 + n);
        }
        send(list, false, 10, 0, 1);
        send(list, true, 12, libc::SI_TIMER, 2);
        send(list, true, 17, 1, 3);
        send(list, false, 20, 0x80, 4);
    });
    let shared = &process(&trip.after).signals_s.as_ref().unwrap().signals;
    let private = &thread(&trip.after).signals_p.as_ref().unwrap().signals;
    assert_eq!((shared.len(), private.len()), (42, 42));
    let values: Vec<u8> = shared.iter().map(|info| info.siginfo[24]).take(40).collect();
    assert_eq!(values, (0..40).collect::<Vec<u8>>());
}

#[test]
fn what_came_while_it_was_made_is_dropped() {
    // The children of a puppet's making leave a SIGCHLD; the restored task must not see it.
    let mut to = puppet();
    let mut list = List::new("noise");
    call(&mut list, "kill", libc::SYS_kill, &[to.pid().get().into(), libc::SIGCHLD.into()]);
    to.run(&list).unwrap();
    let supervisor = Supervisor::probe().unwrap();
    let (core, ..) = dump(&mut Target::new(), &mut seccomp::Dump::default());
    let (pid, filters) = (NsPid::new(to.pid().get()), seccomp::Plan::default());
    let plan = ThreadPlan { core: &core, pid, tid: pid, seccomp: &filters, supervisor: &supervisor };
    let mut list = List::new("restore");
    plan_thread(&plan, &mut list).unwrap();
    to.run(&list).unwrap();
    let (after, ..) = dump(&mut to, &mut seccomp::Dump::default());
    assert_eq!(process(&after).signals_s.as_ref().unwrap().signals, []);
}

fn timers(trip: &RoundTrip) -> [&pb::TaskTimersEntry; 2] {
    [&trip.before, &trip.after].map(|core| process(core).timers.as_ref().unwrap())
}

fn set_up_timers(target: &Target, list: &mut List) {
    let pid = target.pid();
    // Ids 0 to 5; 1, 3 and 4 go again.
    for n in 0u32..6 {
        let (notify, who) = if n == 5 { (libc::SIGEV_THREAD_ID, pid.get()) } else { (i32::from(n == 2), 0) };
        let mut event = [0u32; 16];
        event[..5].copy_from_slice(&[7 + n, 1, 34 + n, notify.cast_unsigned(), who.cast_unsigned()]);
        let event = list.value(&event);
        let id = list.value(&n);
        let clock: i32 = [0, 1, 7, 0, 0, 2][n as usize];
        call(list, "timer_create", libc::SYS_timer_create, &[clock.into(), event.into(), id.into()]);
    }
    for id in [1u64, 3, 4] {
        call(list, "timer_delete", libc::SYS_timer_delete, &[id.into()]);
    }
    let times = list.value(&[3u64, 4, 1000, 5]);
    let set = |list: &mut List, id: u64| {
        let args = [id.into(), 0u64.into(), times.into()];
        call(list, "timer_settime", libc::SYS_timer_settime, &args);
    };
    set(list, 2);
    set(list, 5);
    for which in 0u64..3 {
        let times = list.value(&[which, 5, 500 + which, 6u64]);
        call(list, "setitimer", libc::SYS_setitimer, &[which.into(), times.into()]);
    }
}

#[test]
fn timers_with_their_ids_and_the_time_left() {
    let trip = carry(set_up_timers);
    let [before, after] = timers(&trip);
    assert_eq!(before.posix.iter().map(|t| t.it_id).collect::<Vec<_>>(), [0, 2, 5]);
    assert_eq!(after.posix[1].isec, 3);
    assert_eq!((after.posix[2].sival_ptr, after.posix[2].si_signo), (0x1_0000_000c, 39));
    // What was left is about what is left; nothing has run for 5 seconds.
    for (before, after) in before.posix.iter().zip(&after.posix) {
        assert!(before.vsec.abs_diff(after.vsec) <= 5, "{before:?} {after:?}");
    }
    assert!(before.real.vsec.abs_diff(after.real.vsec) <= 5);
    assert!(before.posix[0].vsec == 0 && before.posix[1].vsec > 900);
}

#[test]
fn timers_by_counting_up_on_older_kernels() {
    let supervisor = Supervisor { timer_ids: false, ..Supervisor::probe().unwrap() };
    carry_with(&supervisor, set_up_timers);
}

#[test]
fn limits() {
    let trip = carry(|_, list| {
        for (resource, cur, max) in
            [(4u64, 11u64, 22u64), (7, 50, 60), (12, 5000, 6000), (9, 1 << 40, u64::MAX)]
        {
            let value = list.value(&[cur, max]);
            let args = [0u64.into(), resource.into(), value.into()];
            call(list, "prlimit", libc::SYS_prlimit64, &args);
        }
    });
    let limits = &process(&trip.after).rlimits.as_ref().unwrap().rlimits;
    assert_eq!((limits[4].cur, limits[7].max, limits[9].cur), (11, 60, 1 << 40));
}

#[test]
fn scheduling() {
    for (policy, priority, nice) in [(0u64, 0u32, -7), (3, 0, 5), (5, 0, 3), (1, 9, 0), (0x4000_0002, 3, -3)]
    {
        let trip = carry(|_, list| {
            let args = [libc::PRIO_PROCESS.into(), 0u64.into(), nice.into()];
            call(list, "setpriority", libc::SYS_setpriority, &args);
            let param = list.value(&priority);
            let args = [0u64.into(), policy.into(), param.into()];
            call(list, "sched_setscheduler", libc::SYS_sched_setscheduler, &args);
        });
        let thread = thread(&trip.after);
        assert_eq!(u64::from(thread.sched_policy()), policy);
        assert_eq!((thread.sched_prio(), thread.sched_nice()), (priority, nice));
    }
}

fn capset(list: &mut List, inh: u32, prm: u32, eff: u32, high: u32) {
    let header = list.value(&[0x2008_0522u32, 0]);
    let data = list.value(&[eff, prm, inh, high, high, 0]);
    call(list, "capset", libc::SYS_capset, &[header.into(), data.into()]);
}

/// A task that has given up root but keeps some capabilities.
fn set_up_creds(list: &mut List) {
    let groups = list.value(&[5u32, 7, 9]);
    call(list, "setgroups", libc::SYS_setgroups, &[3u64.into(), groups.into()]);
    call(list, "setresgid", libc::SYS_setresgid, &[1001u64.into(), 1002u64.into(), 1003u64.into()]);
    call(list, "setfsgid", libc::SYS_setfsgid, &[1001u64.into()]);
    prctl(list, 28, 1 << 2 | 1 << 4, 0); // NO_SETUID_FIXUP, KEEP_CAPS
    prctl(list, libc::PR_CAPBSET_DROP, 12, 0);
    call(list, "setresuid", libc::SYS_setresuid, &[2001u64.into(), 2002u64.into(), 2003u64.into()]);
    call(list, "setfsuid", libc::SYS_setfsuid, &[2003u64.into()]);
    let all = u32::try_from(Supervisor::probe().unwrap().cap_prm & 0xffff_ffff).unwrap();
    capset(list, 1 << 5 | 1 << 6, all, all, 0);
    prctl(list, libc::PR_CAP_AMBIENT, 2, 5);
    prctl(list, 28, 1 << 4 | 3, 0);
    capset(list, 1 << 5 | 1 << 6, 1 << 5 | 1 << 7, 1 << 7, 0);
}

#[test]
fn credentials() {
    let trip = carry(|_, list| set_up_creds(list));
    let creds = thread(&trip.after).creds.as_ref().unwrap();
    assert_eq!((creds.uid, creds.euid, creds.suid, creds.fsuid), (2001, 2002, 2003, 2003));
    assert_eq!((creds.gid, creds.egid, creds.sgid, creds.fsgid), (1001, 1002, 1003, 1001));
    assert_eq!(creds.groups, [5, 7, 9]);
    assert_eq!((creds.cap_prm[0], creds.cap_eff[0], creds.cap_inh[0]), (0xa0, 0x80, 0x60));
    assert_eq!(creds.cap_amb, [1 << 5, 0]);
    assert_eq!(creds.cap_bnd[0] >> 12 & 1, 0);
    assert_eq!(creds.secbits, 0x13);
    assert_eq!(creds.no_new_privs, None);
}

#[test]
fn credentials_with_everything_else() {
    let trip = carry(|target, list| {
        set_up_creds(list);
        prctl(list, libc::PR_SET_PDEATHSIG, 9, 0);
        prctl(list, libc::PR_SET_DUMPABLE, 1, 0);
        prctl(list, libc::PR_SET_NO_NEW_PRIVS, 1, 0);
        set_up_timers(target, list);
    });
    let thread = thread(&trip.after);
    assert_eq!((thread.pdeath_sig, trip.inside_after.dumpable), (Some(9), 1));
    assert_eq!(thread.creds.as_ref().unwrap().no_new_privs, Some(1));
}

/// Installs a filter that gives `errno` for mknod.
fn filter(list: &mut List, errno: u16, flags: u64) {
    let insn = |code: u16, jt: u8, jf: u8, k: u32| {
        let [a, b] = code.to_ne_bytes();
        let [c, d, e, f] = k.to_ne_bytes();
        [a, b, jt, jf, c, d, e, f]
    };
    let mknod = u32::try_from(libc::SYS_mknod).unwrap();
    let program = [
        insn(0x20, 0, 0, 0),
        insn(0x15, 0, 1, mknod),
        insn(0x06, 0, 0, 0x0005_0000 | u32::from(errno)),
        insn(0x06, 0, 0, 0x7fff_0000),
    ];
    let insns = list.bytes(&program.concat());
    let fprog = list.value(&[4u64, 0]);
    list.pointer(fprog.at(8), insns);
    call(list, "seccomp", libc::SYS_seccomp, &[1u64.into(), flags.into(), fprog.into()]);
}

#[test]
fn filters() {
    let trip = carry(|_, list| {
        filter(list, 7, 0);
        filter(list, 8, 2);
        set_up_creds(list);
    });
    assert_eq!(thread(&trip.after).seccomp_mode, Some(2));
    assert_eq!(thread(&trip.after).seccomp_filter, Some(1));
    let chain: Vec<_> = trip.filters.seccomp_filters.iter().map(|f| (f.prev, f.flags)).collect();
    // The thread names the oldest, the newest has none after it.
    assert_eq!(chain, [(None, Some(2)), (Some(0), Some(0))]);
    assert_eq!(trip.filters.seccomp_filters[1].filter[20], 7);
}

#[test]
fn strict_mode() {
    let trip = carry(|_, list| prctl(list, libc::PR_SET_SECCOMP, 1, 0));
    assert_eq!(thread(&trip.after).seccomp_mode, Some(1));
}

#[test]
fn fields_of_our_own() {
    let trip = carry(|_, list| {
        prctl(list, libc::PR_SET_TIMERSLACK, 123, 0);
        prctl(list, 26, 2, 0); // PR_SET_TSC
        prctl(list, 33, 1, 1); // PR_MCE_KILL
        prctl(list, 65, 1, 0); // PR_SET_MDWE
        call(list, "ioprio", libc::SYS_ioprio_set, &[1u64.into(), 0u64.into(), 0x6003u64.into()]);
        supervisor::write_proc(list, "filter", "/proc/self/coredump_filter", "0x7f");
    });
    let (thread, process) = (thread(&trip.after), process(&trip.after));
    assert_eq!((thread.timer_slack_ns, thread.tsc, thread.mce_kill), (Some(123), Some(2), Some(1)));
    assert_eq!((thread.ioprio, process.coredump_filter, process.mdwe), (Some(0x6003), Some(0x7f), Some(1)));
}

#[test]
fn what_is_not_carried_is_named() {
    let mut target = Target::new();
    let mut list = List::new("setup");
    // Signals of the thread are blocked for it, so that nothing is dispatched.
    call(&mut list, "dispatch", libc::SYS_prctl, &[59u64.into(), 1u64.into(), 0u64.into(), u64::MAX.into()]);
    target.run(&list).unwrap();
    let (_, findings, _) = dump(&mut target, &mut seccomp::Dump::default());
    let all: Vec<&str> = findings.iter().map(|f| f.what.as_str()).collect();
    assert!(matches!(all[..], [what] if what.contains("syscall user dispatch")), "{all:?}");
}

/// Whatever a damaged image says is planned or refused; nothing panics.
#[test]
fn damaged_images_are_planned_or_refused() {
    use prost::Message;
    let mut from = Target::new();
    let mut list = List::new("setup");
    set_up_timers(&from, &mut list);
    filter(&mut list, 7, 0);
    ptrace::set_sigmask(from.pid(), u64::MAX).unwrap();
    call(&mut list, "kill", libc::SYS_kill, &[from.pid().get().into(), 10u64.into()]);
    from.run(&list).unwrap();
    let mut filters = seccomp::Dump::default();
    let (mut core, ..) = dump(&mut from, &mut filters);
    let filters = filters.finish();
    // Vector registers are most of the bytes, and have a test of their own.
    let x = core.thread_info.as_mut().unwrap().fpregs.xsave.as_mut().unwrap();
    *x = pb::UserX86XsaveEntry { xstate_bv: 3, ..Default::default() };
    let supervisor = Supervisor { timer_ids: false, ..Supervisor::probe().unwrap() };
    let mut outcomes = [0; 2];
    let mut attempt = |core: &pb::CoreEntry, filters: &pb::SeccompEntry| {
        let planned = (|| {
            final_state(core)?;
            let mut seccomp = seccomp::Plan::new(filters)?;
            seccomp.process(NsPid::new(1), [core])?;
            let plan = ThreadPlan {
                core,
                pid: NsPid::new(1),
                tid: NsPid::new(1),
                seccomp: &seccomp,
                supervisor: &supervisor,
            };
            let mut list = List::new("restore");
            plan_process_early(core, &supervisor, &mut list)?;
            plan_process(core, &pb::MmEntry::default(), &supervisor, &mut list)?;
            plan_thread(&plan, &mut list)
        })();
        outcomes[usize::from(planned.is_err())] += 1;
    };
    let bytes = core.encode_to_vec();
    for at in (0..bytes.len()).step_by(3) {
        for value in [0, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x80] {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            if let Ok(core) = pb::CoreEntry::decode(&damaged[..]) {
                attempt(&core, &filters);
            }
        }
    }
    let bytes = filters.encode_to_vec();
    for at in 0..bytes.len() {
        for value in [0, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x80] {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            if let Ok(filters) = pb::SeccompEntry::decode(&damaged[..]) {
                attempt(&core, &filters);
            }
        }
    }
    assert!(outcomes[0] > 100 && outcomes[1] > 20, "{outcomes:?}");
}
