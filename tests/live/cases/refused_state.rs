//! State of tasks that is refused by name; and what looks like it and is not.

use crate::case::Case;
use crate::gate::{Gate, fork, join};

pub const CASES: &[Case] = &[
    Case::new("semaphore_undo", semaphore_undo).refused("SEM_UNDO"),
    Case::new("semaphore_undo_raised", semaphore_undo_raised).refused("SEM_UNDO"),
    Case::new("semaphore_undo_of_thread", semaphore_undo_of_thread).refused("SEM_UNDO"),
    Case::new("semaphore_undo_in_child", semaphore_undo_in_child).refused("SEM_UNDO"),
    Case::new("semaphore_given_back", semaphore_given_back).not_running(),
    Case::new("semaphore_without_undo", semaphore_without_undo).not_running(),
    Case::new("semaphore_of_others", semaphore_of_others).not_running(),
    Case::new("pid_namespace_for_children", pid_namespace_for_children).refused("pid namespace for children"),
    Case::new("pid_namespace_for_children_of_thread", pid_namespace_of_thread)
        .refused("pid namespace for children"),
    Case::new("pid_namespace_for_children_in_use", pid_namespace_in_use).refused("pid namespace"),
    Case::new("namespace_of_thread", namespace_of_thread).refused("uts namespace"),
    Case::new("thread_keyring", |gate| keyring(gate, -1)).refused("thread keyring"),
    Case::new("process_keyring", |gate| keyring(gate, -2)).refused("process keyring"),
    Case::new("landlock", |gate| landlock(gate, false)).refused("Landlock domain"),
    Case::new("landlock_of_thread", |gate| landlock(gate, true)).refused("Landlock domain"),
    Case::new("io_ports", io_ports).refused("ioperm"),
    Case::new("io_ports_all", io_ports_all).refused("iopl"),
];

/// A set of three semaphores with these values, gone when the target ends.
struct Semaphores(usize);

impl Semaphores {
    fn new(gate: &Gate, values: [u16; 3]) -> Semaphores {
        let Ok(id) = sys!(SYS_semget, libc::IPC_PRIVATE, 3, 0o600) else {
            gate.skip("no System V semaphores");
        };
        sys!(SYS_semctl, id, 0, 17, values.as_ptr()).expect("SETALL");
        Semaphores(id)
    }

    fn change(&self, number: i16, by: i16, flags: i32) {
        let operation = [number, by, flags as i16];
        sys!(SYS_semop, self.0, operation.as_ptr(), 1).expect("semop");
    }

    fn values(&self) -> [u16; 3] {
        let mut values = [0; 3];
        sys!(SYS_semctl, self.0, 0, 13, values.as_mut_ptr()).expect("GETALL");
        values
    }
}

impl Drop for Semaphores {
    fn drop(&mut self) {
        let _ = sys!(SYS_semctl, self.0, 0, libc::IPC_RMID, 0);
    }
}

fn semaphore_undo(gate: &Gate) {
    let semaphores = Semaphores::new(gate, [1, 5, 16_000]);
    semaphores.change(0, -1, libc::SEM_UNDO);
    gate.ready();
    assert_eq!(semaphores.values(), [0, 5, 16_000], "a dump has changed them");
}

fn semaphore_undo_raised(gate: &Gate) {
    let semaphores = Semaphores::new(gate, [1, 5, 30_000]);
    semaphores.change(2, 1, libc::SEM_UNDO);
    semaphores.change(2, -1, 0);
    gate.ready();
    assert_eq!(semaphores.values(), [1, 5, 30_000], "a dump has changed them");
}

fn semaphore_undo_of_thread(gate: &Gate) {
    let semaphores = Semaphores::new(gate, [1, 5, 16_000]);
    let (control, id) = (gate.clone_for_thread(), semaphores.0);
    let thread = std::thread::spawn(move || {
        let mine = std::mem::ManuallyDrop::new(Semaphores(id));
        // A list of its own.
        sys!(SYS_unshare, libc::CLONE_SYSVSEM).expect("unshare");
        mine.change(1, -2, libc::SEM_UNDO);
        control.mark("undo");
        control.wait();
    });
    gate.await_mark("undo");
    gate.ready();
    thread.join().expect("thread");
    // A thread can be joined a moment before its operations are undone.
    let start = std::time::Instant::now();
    while semaphores.values() != [1, 5, 16_000] {
        assert!(start.elapsed() < crate::gate::PATIENCE, "undone at its end: {:?}", semaphores.values());
        crate::sys::nap(std::time::Duration::from_millis(1));
    }
}

fn semaphore_undo_in_child(gate: &Gate) {
    let semaphores = Semaphores::new(gate, [1, 5, 16_000]);
    let child = fork(|| {
        semaphores.change(0, -1, libc::SEM_UNDO);
        gate.mark("undo");
        gate.wait();
    });
    gate.await_mark("undo");
    gate.ready();
    join(child);
    assert_eq!(semaphores.values(), [1, 5, 16_000], "undone at its end");
}

/// A list of adjustments, all of them nothing.
fn semaphore_given_back(gate: &Gate) {
    let semaphores = Semaphores::new(gate, [1, 5, 16_000]);
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || control.wait());
    semaphores.change(0, -1, libc::SEM_UNDO);
    semaphores.change(0, 1, libc::SEM_UNDO);
    gate.ready();
    assert_eq!(semaphores.values(), [1, 5, 16_000]);
    thread.join().expect("thread");
}

fn semaphore_without_undo(gate: &Gate) {
    let semaphores = Semaphores::new(gate, [1, 5, 16_000]);
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || control.wait());
    semaphores.change(0, -1, 0);
    gate.ready();
    assert_eq!(semaphores.values(), [0, 5, 16_000]);
    thread.join().expect("thread");
}

/// Somebody outside the tree has adjustments; the tree, which has threads, has none.
fn semaphore_of_others(gate: &Gate) {
    let semaphores = Semaphores::new(gate, [1, 5, 16_000]);
    semaphores.change(1, -2, 0);
    let control = gate.clone_for_thread();
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let control = control.clone_for_thread();
            std::thread::spawn(move || control.wait())
        })
        .collect();
    gate.ready();
    assert_eq!(semaphores.values(), [1, 3, 16_000]);
    threads.into_iter().for_each(|thread| thread.join().expect("thread"));
}

fn pid_namespace_for_children(gate: &Gate) {
    sys!(SYS_unshare, libc::CLONE_NEWPID).expect("unshare");
    gate.ready();
}

fn pid_namespace_of_thread(gate: &Gate) {
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        sys!(SYS_unshare, libc::CLONE_NEWPID).expect("unshare");
        control.mark("prepared");
        control.wait();
    });
    gate.await_mark("prepared");
    gate.ready();
    thread.join().expect("thread");
}

/// There is a first process in it.
fn pid_namespace_in_use(gate: &Gate) {
    sys!(SYS_unshare, libc::CLONE_NEWPID).expect("unshare");
    let child = fork(|| gate.wait());
    gate.ready();
    join(child);
}

fn namespace_of_thread(gate: &Gate) {
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        sys!(SYS_unshare, libc::CLONE_NEWUTS).expect("unshare");
        control.mark("unshared");
        control.wait();
    });
    gate.await_mark("unshared");
    gate.ready();
    thread.join().expect("thread");
}

fn keyring(gate: &Gate, which: i32) {
    // KEYCTL_GET_KEYRING_ID, and make one
    if sys!(SYS_keyctl, 0, which, 1).is_err() {
        gate.skip("this kernel has no keyrings");
    }
    gate.ready();
    assert!(sys!(SYS_keyctl, 0, which, 0).is_ok(), "the keyring is gone");
}

fn io_ports(gate: &Gate) {
    if sys!(SYS_ioperm, 0x80, 1, 1).is_err() {
        gate.skip("no access to I/O ports");
    }
    gate.ready();
}

/// A task that has given up the right to ask for it.
fn io_ports_all(gate: &Gate) {
    if sys!(SYS_iopl, 3).is_err() {
        gate.skip("no access to I/O ports");
    }
    sys!(SYS_setresuid, 65_534, 65_534, 65_534).expect("setresuid");
    gate.ready();
}

/// A task, or a thread of it, that may not open files for writing.
fn landlock(gate: &Gate, of_thread: bool) {
    let (handled, no_new_privs) = (1_u64 << 1, 38);
    let Ok(rules) = sys!(SYS_landlock_create_ruleset, &raw const handled, 8, 0) else {
        gate.skip("this kernel has no Landlock")
    };
    let restrict = move || {
        sys!(SYS_prctl, no_new_privs, 1, 0, 0, 0).expect("no_new_privs");
        sys!(SYS_landlock_restrict_self, rules, 0).expect("landlock_restrict_self");
    };
    let close = || sys!(SYS_close, rules).expect("close");
    if !of_thread {
        restrict();
        close();
        return gate.ready();
    }
    let control = gate.clone_for_thread();
    let thread = std::thread::spawn(move || {
        restrict();
        control.mark("restricted");
        control.wait();
    });
    gate.await_mark("restricted");
    close();
    gate.ready();
    thread.join().expect("thread");
}
