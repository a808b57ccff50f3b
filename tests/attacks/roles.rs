//! The parts: programs that are dumped, and who helps them.

use std::{process::ExitCode, thread};

use crate::{
    site::{NOBODY, ready, word},
    sys,
};

pub fn main(role: &str) -> ExitCode {
    sys::close_inherited();
    match role {
        "mixed" => mixed(),
        "bare" => bare(),
        "no-queue" => no_queue(),
        "sharing" => crate::tables::sharing(),
        "large" => crate::threads::large(),
        "tree" => crate::hostile::tree(),
        "bystander" => crate::hostile::bystander(),
        "mounts" => crate::mounts::tree(),
        "gadget" => crate::gadget::main(),
        _ => panic!("no role {role}"),
    }
}

fn threads(number: usize) {
    for _ in 0..number {
        thread::Builder::new().stack_size(64 << 10).spawn(|| sys::rest()).expect("thread");
    }
}

/// A root process with threads, and a child of somebody without privileges.
fn mixed() -> ExitCode {
    nix::unistd::setsid().expect("setsid");
    sys::fork(|| {
        sys::drop_capabilities_at_exec();
        // A neighbour may end it by that otherwise.
        sys::ignore(libc::SIGTRAP);
        sys::become_user(NOBODY, true);
        sys::rest()
    });
    threads(word().parse().unwrap_or(4));
    ready();
    sys::rest()
}

/// Root without capabilities, with threads.
fn bare() -> ExitCode {
    nix::unistd::setsid().expect("setsid");
    sys::drop_capabilities();
    threads(word().parse().unwrap_or(4));
    ready();
    sys::rest()
}

/// Somebody whose pending signals come without what they say, because there is no room for it.
fn no_queue() -> ExitCode {
    nix::unistd::setsid().expect("setsid");
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    sys!(SYS_setrlimit, libc::RLIMIT_SIGPENDING, &raw const none).expect("RLIMIT_SIGPENDING");
    threads(2);
    sys::become_user(NOBODY, true);
    ready();
    sys::rest()
}
